"""What learns on, how fast, and that adapters are nothing but a change of the matrices."""

import copy

import pytest
import torch

from genemodel.errors import ConfigError
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings
from genemodel.model.tuning import AdaptedLinear, TuningSettings, merged, rate_shares, tune

SHAPE = ModelSettings(layers=3, width=16, heads=2, ffn=32, components=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GeneModel(SHAPE, n_tokens=203, n_species=2, context=128)


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bias", [False, True])
def test_adapters_start_as_nothing_and_merge_into_plain_matrices(pack_random, bias):
    torch.manual_seed(0)
    shape = ModelSettings(layers=2, width=16, heads=2, ffn=32, components=4, bias=bias)
    model = GeneModel(shape, n_tokens=203, n_species=2, context=128)
    batch = pack_random()
    before, plain = model(batch), copy.deepcopy(model)
    tune(model, TuningSettings(tune="lora", rank=3))
    after = model(batch)
    assert torch.equal(before.hidden_TD, after.hidden_TD)
    after.cell_CD.square().sum().backward()
    assert learning(model) == {n for n, _ in model.named_parameters() if n.endswith(("_RI", "_OR"))}
    assert len(learning(model)) == 2 * 4 * 2
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learning(model)), name
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, AdaptedLinear):
                part.up_OR.normal_()
    changed, released = model(batch), merged(model)
    assert not torch.allclose(changed.cell_CD, before.cell_CD)
    assert torch.equal(released(batch).hidden_TD, changed.hidden_TD)
    assert {n: t.shape for n, t in released.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    assert not any(isinstance(part, AdaptedLinear) for part in released.modules())
    # Releasing in the middle of a run leaves the run as it was.
    assert torch.equal(model(batch).hidden_TD, changed.hidden_TD)
    same = torch.equal(released.blocks[0].qkv.weight, plain.blocks[0].qkv.weight)
    assert not same and torch.equal(released.embedding.token.weight, plain.embedding.token.weight)


def test_a_change_is_of_the_rank_asked_for(model):
    tune(model, TuningSettings(tune="lora", rank=3, alpha=6.0))
    part = model.blocks[1].ffn.up
    assert isinstance(part, AdaptedLinear)
    with torch.no_grad():
        part.up_OR.normal_()
        change_OI = part.sum() - part.weight
        assert torch.linalg.matrix_rank(change_OI) == 3
        torch.testing.assert_close(change_OI, 2.0 * part.up_OR @ part.down_RI)


def test_last_and_full_and_frozen(model):
    everything = learning(model)
    tune(model, TuningSettings(tune="last", layers=2))
    assert learning(model) == {
        name for name in everything if name.startswith(("blocks.1.", "blocks.2.", "final_norm."))
    }
    tune(model, TuningSettings(tune="frozen"))
    assert not learning(model)
    tune(model, TuningSettings(tune="full"))
    assert learning(model) == everything
    assert merged(model) is model


def test_rates_fall_with_depth(model):
    shares = rate_shares(model, TuningSettings(layer_decay=0.5))
    assert set(shares) == {name for name, _ in model.named_parameters()}
    found = {name.split(".weight")[0]: share for name, share in shares.items()}
    assert found["final_norm"] == found["blocks.2.qkv"] == 1.0
    assert found["blocks.1.ffn.up"] == 0.5 and found["blocks.0.norm1"] == 0.25
    assert found["embedding.token"] == found["embedding.components.loading"] == 0.125
    assert set(rate_shares(model, TuningSettings()).values()) == {1.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tune": "last", "layers": 4}, "the model has 3 blocks: set it to at most 3"),
        ({"tune": "lora", "rank": 16}, "the matrices of the model are 16 wide"),
        ({"rank": 0}, "backbone.rank is 0"),
        ({"alpha": 0.0}, "backbone.alpha is 0.0"),
        ({"layer_decay": 1.5}, "backbone.layer_decay is 1.5"),
    ],
)
def test_impossible_settings_are_refused(model, change, said):
    with pytest.raises(ConfigError, match=said):
        tune(model, TuningSettings(**change))
