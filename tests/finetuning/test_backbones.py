"""The loss of a head reaches what of a backbone learns, and nothing else."""

import numpy as np
import pytest
import torch

import genemodel as gm
from genemodel import DecoderSettings, IntegrationSettings
from genemodel.errors import ConfigError

# Without weight decay, which would change weights that no gradient reaches.
SHORT = IntegrationSettings(
    steps=6, passes=0, hidden=16, rank=8, latent=6, batch_cells=32, weight_decay=0.0
)
QUICK = DecoderSettings(hidden=16, latent=4, epochs=1, batch_cells=32)


@pytest.fixture(scope="module")
def human():
    return gm.synthetic(
        160, species=("human",), n_batches=2, n_genes=600, genes_per_cell=80, seed=4
    )["human"]


def finetuned(task, adata, bundle, tune):
    if task == "integrate":
        return gm.integrate(
            adata, batch_key="batch", model=bundle, backbone=tune, settings=SHORT, device="cpu"
        )
    return gm.impute(adata, bundle, batch_key="batch", backbone=tune, settings=QUICK, device="cpu")


@pytest.mark.parametrize("tune", ["frozen", "lora", "last", "full"])
@pytest.mark.parametrize("task", ["integrate", "impute"])
def test_the_loss_reaches_what_learns(random_bundle, human, tune, task, tmp_path):
    adata = human.copy()
    before = {k: v.clone() for k, v in random_bundle.model.state_dict().items()}
    model = finetuned(task, adata, random_bundle, tune)
    after = model.bundle.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k].cpu())}
    matrices = {f"blocks.0.{k}.weight" for k in ("qkv", "out", "ffn.up", "ffn.down")}
    if tune == "frozen":
        assert not changed
    elif tune == "lora":
        assert changed == matrices
    else:
        assert changed >= matrices
        assert ("embedding.token.weight" in changed) == (tune == "full")
    # The caller's own bundle stays as it is.
    assert all(torch.equal(v, random_bundle.model.state_dict()[k]) for k, v in before.items())

    model.save(tmp_path / "model")
    back = gm.load(tmp_path / "model", device="cpu")
    if task == "integrate":
        np.testing.assert_allclose(back.encode(adata), model.encode(adata), rtol=1e-4, atol=1e-5)
        return
    other = human.copy()
    gm.impute(other, back)
    np.testing.assert_allclose(
        other.layers["imputed"], adata.layers["imputed"], rtol=1e-3, atol=1e-4
    )


def test_vectors_of_imputation_are_of_the_molecules_shown(random_bundle, human, monkeypatch):
    """Vectors of all molecules would show the encoder those that it is to predict."""
    from genemodel.model.count_encoder import CountsBesideBackbone

    shown, vectors_itself = [], CountsBesideBackbone.vectors

    def vectors(module, batch):
        shown.append((batch.library_C[: batch.n_cells].clone(), batch.per_cell(batch.shown_N)))
        return vectors_itself(module, batch)

    monkeypatch.setattr(CountsBesideBackbone, "vectors", vectors)
    finetuned("impute", human.copy(), random_bundle, "frozen")
    assert len(shown) > 3
    for library_C, shown_C in shown:
        # Genes that the model does not know are shown to the counts alone.
        assert (library_C <= shown_C.clamp_min(1.0)).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backbone": "lora"}, "give model=BUNDLE"),
        ({"backbone": "scratch"}, "pre-training makes"),
    ],
)
def test_a_backbone_that_is_not_there_is_refused(human, options, said):
    with pytest.raises(ConfigError, match=said):
        gm.integrate(human.copy(), batch_key="batch", settings=SHORT, **options)
    with pytest.raises(ConfigError, match=said):
        gm.impute(human.copy(), settings=QUICK, **options)
