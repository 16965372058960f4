"""An imported model is a model like any other: heads train on it, and it goes back changed."""

import numpy as np
import pytest
import torch
from test_genecompass_parity import HUMAN, write_genecompass
from test_genecompass_parity import human as human_gene
from tiny_models import GENES, gene, write_geneformer

import genemodel as gm
from genemodel import DecoderSettings, IntegrationSettings
from genemodel.bundle.bundle import Bundle
from genemodel.importers.architecture import PRIORS
from genemodel.importers.importing import import_model

transformers = pytest.importorskip("transformers")
# Without weight decay, which would change weights that no gradient reaches.
SHORT = IntegrationSettings(
    steps=6, passes=0, hidden=16, rank=8, latent=6, batch_cells=32, weight_decay=0.0
)
QUICK = DecoderSettings(hidden=16, latent=4, epochs=1, batch_cells=32)


def cells(names, n_cells=80, seed=0):
    """Two batches of two types, over so many genes."""
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    kind, batch = np.arange(n_cells) % 2, np.arange(n_cells) // (n_cells // 2)
    rate = rng.gamma(0.6, 3.0, (2, len(names)))
    counts = rng.poisson(rate[kind] * (1 + batch[:, None] * (rng.random(len(names)) < 0.2)))
    return ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"batch": np.array(["a", "b"])[batch], "cell_type": np.array(["x", "y"])[kind],
             "species": "human"},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=names),
    )  # fmt: skip


@pytest.fixture(scope="module")
def geneformers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    for version in (1, 2):
        write_geneformer(folder / f"v{version}", version)
    return {v: import_model(folder / f"v{v}") for v in (1, 2)}


@pytest.mark.parametrize(
    ("version", "tune"), [(2, "frozen"), (2, "lora"), (2, "last"), (2, "full"), (1, "lora")]
)
def test_a_head_reaches_the_blocks_that_cells_are_read_from(geneformers, version, tune, tmp_path):
    bundle = geneformers[version]
    adata = cells([gene(i) for i in range(GENES)])
    before = {k: v.clone() for k, v in bundle.model.state_dict().items()}
    model = gm.integrate(
        adata, batch_key="batch", model=bundle, backbone=tune, settings=SHORT, device="cpu"
    )
    after = model.bundle.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    # Of three blocks the vectors are read from the second: the third has no part in them.
    assert not any(name.startswith("blocks.2.") for name in changed)
    matrices = [f"{k}.weight" for k in ("qkv", "out", "ffn.up", "ffn.down")]
    if tune == "frozen":
        assert not changed
    elif tune == "lora":
        assert changed == {f"blocks.{i}.{k}" for i in (0, 1) for k in matrices}
    else:
        assert {f"blocks.1.{k}" for k in matrices} <= changed
        assert ("blocks.0.qkv.weight" in changed) == (tune == "full")
        assert ("embedding.token.weight" in changed) == (tune == "full")
    model.save(tmp_path / "model")
    back = gm.load(tmp_path / "model", device="cpu")
    np.testing.assert_allclose(back.encode(adata), model.encode(adata), rtol=1e-4, atol=1e-5)
    written = gm.export_model(tmp_path / "model" / "bundle", tmp_path / "x")
    again = transformers.BertModel.from_pretrained(written, add_pooling_layer=False)
    torch.testing.assert_close(
        again.encoder.layer[1].attention.self.value.weight, after["blocks.1.qkv.weight"][64:],
        rtol=0, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("version", [1, 2])
def test_counts_are_imputed_beside_it(geneformers, version):
    adata = cells([gene(i) for i in range(GENES)] + ["ENSG00000700001"], seed=1)
    model = geneformers[version]
    gm.impute(adata, model, batch_key="batch", backbone="lora", settings=QUICK, device="cpu")
    assert np.isfinite(np.asarray(adata.layers["imputed"])).all()


@pytest.mark.parametrize("folded", [False, True])
def test_a_genecompass_learns_as_well(tmp_path, folded):
    write_genecompass(tmp_path / "m", PRIORS)
    bundle = import_model(tmp_path / "m", folded=folded)
    adata = cells([human_gene(i) for i in range(HUMAN)], seed=2)
    model = gm.integrate(
        adata, batch_key="batch", model=bundle, backbone="full", settings=SHORT, device="cpu",
        species="human",
    )  # fmt: skip
    before, after = bundle.model.state_dict(), model.bundle.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {"embedding.species.weight", "blocks.1.qkv.weight"} <= changed
    assert ("embedding.fusion.gene_SVD" in changed) == folded
    assert not any("table_QP" in name for name in changed)  # knowledge stays as it was
    model.save(tmp_path / "model")
    back = Bundle.load(tmp_path / "model" / "bundle", device="cpu")
    assert all(torch.equal(v, after[k]) for k, v in back.model.state_dict().items())


def test_labels_are_learnt_on_a_corpus_with_its_tokens(geneformers, tmp_path):
    """Through the loop of pre-training: the closing token is in the cells, and is no target."""
    from genemodel.command.cli import main

    geneformers[2].save(tmp_path / "b")
    adata = cells([gene(i) for i in range(GENES)], n_cells=120, seed=3)
    adata.write_h5ad(tmp_path / "c.h5ad")
    words = (
        f"finetune input={tmp_path / 'c.h5ad'} model={tmp_path / 'b'} out={tmp_path / 'r'} "
        "task=classify label_key=cell_type backbone=last trainer.max_steps=4 "
        "holdout.by=batch device=cpu"
    )
    assert main(words.split()) == 0
    classifier = gm.load(tmp_path / "r" / "classifier", device="cpu")
    assert classifier.tokens.style == classifier.model.settings.hosts == "geneformer_v2"
    assert classifier.medians_V.dtype == np.float64
    np.testing.assert_array_equal(classifier.medians_V[4:], geneformers[2].medians_V[4:])


def test_two_imports_that_read_cells_differently_are_two_models(geneformers, tmp_path):
    write_geneformer(tmp_path / "m", 2)
    other = import_model(tmp_path / "m", cell="opening", cell_layer=0)
    assert other.fingerprint != import_model(tmp_path / "m").fingerprint
