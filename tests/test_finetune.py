"""The verb: a file in, an embedded file and a model out."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from genemodel.cells.synthetic import synthetic
from genemodel.cli import main
from genemodel.inference.integrated_model import IntegratedModel

TINY = [f"integration.{word}" for word in ("steps=6", "passes=0", "hidden=8", "rank=4", "latent=5")]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("finetune") / "cells.h5ad"
    cells = synthetic(120, species=("human",), n_batches=2, n_genes=600, genes_per_cell=80, seed=2)[
        "human"
    ]
    cells.write_h5ad(path)
    return path


def test_a_run_writes_embedding_and_model(file, tmp_path, capsys):
    words = ["finetune", f"data={file}", "batch_key=[batch,donor]", f"out={tmp_path / 'run'}"]
    assert main([*words, *TINY]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run")
    embedded, data = ad.read_h5ad(tmp_path / "run" / "embedded.h5ad"), ad.read_h5ad(file)
    assert list(embedded.obs_names) == list(data.obs_names) and embedded.n_vars == 0
    assert embedded.obsm["X_genemodel"].shape == (120, 5)
    assert embedded.uns["X_genemodel"]["settings"]["steps"] == 6
    model = IntegratedModel.load(tmp_path / "run" / "model")
    assert model.batch_keys == ("batch", "donor")
    assert np.isfinite(model.encode(data)).all()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "curves.csv", "embedded.h5ad", "finetune.json", "model",
    ]  # fmt: skip
    curves = pd.read_csv(tmp_path / "run" / "curves.csv")
    assert set(curves["loss"]) == {"counts", "kl"} and curves["step"].max() == 6
    before = (tmp_path / "run" / "embedded.h5ad").stat().st_mtime_ns
    assert main([*words, *TINY]) == 0
    assert "is complete" in capsys.readouterr().err
    assert (tmp_path / "run" / "embedded.h5ad").stat().st_mtime_ns == before
    assert main([*words, *TINY, "seed=1"]) == 2
    said = capsys.readouterr().err
    assert "seed: 0 -> 1" in said and "overwrite=true" in said
    assert main([*words, *TINY, "seed=1", "overwrite=true"]) == 0
    assert (tmp_path / "run" / "embedded.h5ad").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=absent.h5ad"], "absent.h5ad is no file"),
        (["out=no/such/folder/run"], "does not exist"),
        (["batch_key=bach"], "did you mean 'batch'"),
        (["integration.latent=0"], "latent=0"),
        (["task=cook"], "task"),
        (["model=absent"], "No model at absent"),
    ],
)
def test_user_errors_are_told_in_a_line(file, tmp_path, capsys, words, said):
    given = [f"data={file}", "batch_key=batch", f"out={tmp_path / 'run'}"]
    taken = {word.partition("=")[0] for word in words}
    kept = [word for word in given if word.partition("=")[0] not in taken]
    assert main(["finetune", *kept, *words, *TINY[:-1]]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_h5ad_is_refused(tmp_path, capsys):
    (tmp_path / "a.h5ad").write_text("no")
    words = ["finetune", f"data={tmp_path / 'a.h5ad'}", "batch_key=b", f"out={tmp_path / 'o'}"]
    assert main(words) == 2
    assert "a.h5ad" in capsys.readouterr().err
