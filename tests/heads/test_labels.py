"""Labels: the loss against an oracle, its gradient in the backbone, calibration."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genemodel.errors import ConfigError
from genemodel.heads.labels import LabelHead, Labels, LabelSettings, fitted_temperature

CODES = np.array([0, 1, 1, -1, 2, 1, 1, 0], np.int32)
LABELS = Labels(("a", "b", "c"), CODES, np.array([20, 200, 2]))


def head(**settings):
    torch.manual_seed(0)
    made = LabelHead(8, LABELS, LabelSettings(weight=1.0, **settings))
    torch.nn.init.normal_(made.out.weight)
    return made.eval()


@pytest.mark.parametrize("balanced", [True, False])
def test_the_loss_is_weighted_cross_entropy_of_labelled_cells(balanced):
    made = head(balanced=balanced)
    cell_CD = torch.randn(5, 8)
    cell_C = torch.tensor([0, 2, 3, 4, -1])  # the fourth cell has no label, the last is no cell
    loss, trivial = made(cell_CD, cell_C)
    known, code = torch.tensor([0, 1, 3]), torch.tensor([0, 1, 2])
    weight = None
    if balanced:
        count = torch.tensor([20.0, 200.0, 2.0])
        weight = (count.mean() / count).clamp_max(10.0)
        weight = weight * count.sum() / (weight * count).sum()
        assert float((weight * count).sum() / count.sum()) == pytest.approx(1.0)
    logits = made.logits(cell_CD)[known]
    expected = F.cross_entropy(logits, code, weight, reduction="none").sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    share = torch.tensor([20.0, 200.0, 2.0]) * (1.0 if weight is None else weight)
    constant = (share / share.sum()).log().expand(3, 3)
    expected = F.cross_entropy(constant, code, weight, reduction="none").sum()
    assert float(trivial) == pytest.approx(float(expected), rel=1e-5)
    assert made(cell_CD, cell_C, trivial=False)[1] is None


def test_it_starts_at_the_trivial_predictor():
    made = LabelHead(8, LABELS, LabelSettings(weight=1.0))
    loss, trivial = made(torch.randn(8, 8), torch.arange(8))
    assert float(loss) == pytest.approx(float(trivial), rel=1e-5)


def test_a_temperature_makes_held_out_logits_most_likely():
    torch.manual_seed(0)
    logits = torch.randn(4000, 3)
    code = torch.distributions.Categorical(logits=logits).sample()
    for factor in (0.25, 1.0, 6.0):  # the model was so many times too sure
        assert fitted_temperature(logits * factor, code) == pytest.approx(factor, rel=0.1)
    assert fitted_temperature(logits[:0], code[:0]) == 1.0


def test_refusals():
    with pytest.raises(ConfigError, match="task.labels.label_key is empty"):
        LabelSettings(weight=1.0, label_key="")
    with pytest.raises(ConfigError, match="task.labels.dropout is 1.5"):
        LabelSettings(dropout=1.5)
