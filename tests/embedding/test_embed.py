"""Embedding: order, batch size, sources and species cannot change a cell's vector."""

import logging
import subprocess
import sys

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import genemodel as gm
from genemodel.embedding.embed import EmbedSettings, embed_file
from genemodel.errors import ConfigError, DataError
from genemodel.simulation.cells import synthetic


@pytest.fixture(scope="module")
def cells():
    parts = synthetic(120, n_genes=800, genes_per_cell=150, seed=3)
    return parts["human"], parts["mouse"]


def vectors(adata, model, **options):
    adata = adata.copy()
    assert gm.embed(adata, model, **options) is None
    return adata.obsm["X_genemodel"]


def test_rows_follow_the_input_and_batch_size_changes_nothing(random_bundle, cells):
    human, _ = cells
    whole = vectors(human, random_bundle)
    assert whole.shape == (60, 16) and whole.dtype == np.float32
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(
        vectors(human[order], random_bundle), whole[order], rtol=1e-4, atol=1e-5
    )
    for batch_size in (1, 7, 1000):
        np.testing.assert_allclose(
            vectors(human, random_bundle, batch_size=batch_size), whole, rtol=1e-4, atol=1e-5
        )
    assert np.abs(whole - whole[0]).max() > 0.1  # cells differ


def test_memory_backed_path_and_command_line_agree(random_bundle, cells, tmp_path):
    human, _ = cells
    human.write_h5ad(tmp_path / "cells.h5ad")
    random_bundle.save(tmp_path / "bundle")
    whole = vectors(human, random_bundle)
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    gm.embed(backed, random_bundle)
    np.testing.assert_array_equal(backed.obsm["X_genemodel"], whole)
    backed.file.close()
    from_path = gm.embed(tmp_path / "cells.h5ad", random_bundle)
    np.testing.assert_array_equal(from_path.obsm["X_genemodel"], whole)
    assert list(from_path.obs_names) == list(human.obs_names)
    done = subprocess.run(
        [
            sys.executable, "-m", "genemodel", "embed", f"model={tmp_path / 'bundle'}",
            f"input={tmp_path / 'cells.h5ad'}", f"output={tmp_path / 'out.h5ad'}", "device=cpu",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_allclose(written.obsm["X_genemodel"], whole, rtol=1e-4, atol=1e-5)
    uns = written.uns["X_genemodel"]
    assert uns["model"] == random_bundle.fingerprint
    assert uns["genes_matched"]["human"] > 700 and uns["effective_rank"] > 2


def test_mixed_species_equal_each_species_alone(random_bundle, cells):
    human, mouse = cells
    both = ad.concat([human, mouse], join="outer", fill_value=0)
    both.obs["species"] = ["human"] * 60 + ["mouse"] * 60
    both = both[np.random.default_rng(1).permutation(120)].copy()
    got = vectors(both, random_bundle)
    for name, part in (("human", human), ("mouse", mouse)):
        rows = (both.obs["species"] == name).to_numpy()
        at = part.obs_names.get_indexer(both.obs_names[rows])
        np.testing.assert_allclose(
            got[rows], vectors(part, random_bundle)[at], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("names", ["ids", "symbols"])
def test_a_file_that_joins_species_unevenly_equals_each_alone(random_bundle, cells, names):
    human, mouse = cells[0].copy(), cells[1][:, :100].copy()
    if names == "symbols":
        for adata in (human, mouse):
            adata.var_names = adata.var["gene_symbol"].astype(str)
            adata.var_names_make_unique()
    alone = [vectors(human, random_bundle), vectors(mouse, random_bundle)]
    joined = ad.concat([human, mouse], join="outer", fill_value=0)
    # A ninth of the columns are of mouse: a share of all would have refused it.
    np.testing.assert_allclose(
        vectors(joined, random_bundle), np.concatenate(alone), rtol=1e-4, atol=1e-5
    )
    joined.obs["species"] = np.where(np.arange(len(joined)) % 2, "human", "mouse")
    gm.embed(joined, random_bundle)  # a wrong species of some cells cannot be seen in the names
    human.obs["species"] = np.where(np.arange(len(human)) % 2, "human", "mouse")
    with pytest.raises(DataError, match="AnnData: .*set species=human"):
        gm.embed(human, random_bundle)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_no_cell_at_once_is_refused(random_bundle, cells, batch_size):
    with pytest.raises(ConfigError, match="at least one cell"):
        gm.embed(cells[0], random_bundle, batch_size=batch_size)


@pytest.mark.parametrize(
    ("species", "said"),
    [
        ("humann", "AnnData: species=humann, .*did you mean species=human"),
        ("obs:donor", r"obs\['donor'\] holds the species human_donor1.*species=obs:COLUMN"),
    ],
)
def test_a_species_is_refused_where_it_was_said(random_bundle, cells, species, said):
    with pytest.raises(DataError, match=said):
        gm.embed(cells[0], random_bundle, species=species)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"overwrite": True, "output": "cells.h5ad"}, "is what is read, .* they are not lost"),
        ({"overwrite": True, "output": "folder.h5ad"}, "is a folder"),
        ({"key_added": ""}, "key_added is empty"),
        ({"key_added": "a/b"}, "a slash divides"),
        ({"device": "gpu"}, "device=gpu: there is no such device"),
    ],
)
def test_the_command_refuses_before_work(cells, random_bundle, tmp_path, words, said):
    cells[0].write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "folder.h5ad").mkdir()
    random_bundle.save(tmp_path / "bundle")
    before = (tmp_path / "cells.h5ad").read_bytes()
    output = words.pop("output", "out.h5ad")
    given = EmbedSettings(
        model=str(tmp_path / "bundle"),
        input=str(tmp_path / "cells.h5ad"),
        output=str(tmp_path / output),
        **words,
    )
    with pytest.raises(ConfigError, match=said):
        embed_file(given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "cells.h5ad", "folder.h5ad"]
    assert (tmp_path / "cells.h5ad").read_bytes() == before


def test_what_nothing_can_be_written_to_and_what_is_no_bundle_are_refused(
    random_bundle, cells, tmp_path
):
    with pytest.raises(DataError, match="No model at runs/a/bundle"):
        gm.embed(cells[0], "runs/a/bundle")
    with pytest.raises(ConfigError, match="model is a dict, which cannot embed"):
        gm.embed(cells[0], {})
    cells[0].write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(DataError, match=r"view of a backed AnnData.*to_memory"):
        gm.embed(backed[3:9], random_bundle)
    backed.file.close()


def test_cells_without_known_genes_get_nan_and_are_counted(random_bundle, cells, caplog):
    human = cells[0].copy()
    counts = human.X.tolil()
    counts[5] = 0
    human.X = counts.tocsr().astype(np.float32)
    with caplog.at_level(logging.WARNING):
        got = vectors(human, random_bundle)
    assert np.isnan(got[5]).all() and np.isfinite(np.delete(got, 5, 0)).all()
    assert "1 of 60 cells have no gene" in caplog.text


def test_counts_in_a_layer_and_names_in_another_form(random_bundle, cells):
    human = cells[0].copy()
    whole = vectors(human, random_bundle)
    other = human.copy()
    other.layers["counts"] = other.X.copy()
    other.X = other.X.astype(np.float32).log1p()
    other.var_names = [f"{name}.3" for name in other.var_names]
    np.testing.assert_array_equal(vectors(other, random_bundle, layer="counts"), whole)
    with pytest.raises(DataError, match="layer=.?counts"):
        vectors(other, random_bundle)


def test_depth_is_seen_but_does_not_dominate(random_bundle, cells):
    """The library is an input of its own: doubling all counts keeps values and moves depth."""
    human = cells[0].copy()
    doubled = human.copy()
    doubled.X = sp.csr_matrix(human.X) * 2
    a, b = vectors(human, random_bundle), vectors(doubled, random_bundle)
    assert 0 < np.abs(a - b).mean() < 0.5 * np.abs(a - a[::-1]).mean()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": "out.csv"}, "does not end in .h5ad"),
        ({"output": "no/such/folder/out.h5ad"}, "does not exist"),
        ({"input": "absent.h5ad"}, "input=absent.h5ad does not exist"),
    ],
)
def test_files_are_refused_before_work_starts(tmp_path, change, words):
    values = {"model": "m", "input": __file__, "output": str(tmp_path / "o.h5ad"), **change}
    with pytest.raises((ConfigError, DataError), match=words):
        embed_file(EmbedSettings(**values))


def test_an_existing_output_is_not_overwritten(tmp_path):
    (tmp_path / "o.h5ad").write_text("precious")
    with pytest.raises(ConfigError, match="overwrite=true"):
        embed_file(EmbedSettings(model="m", input=__file__, output=str(tmp_path / "o.h5ad")))
    assert (tmp_path / "o.h5ad").read_text() == "precious"


def test_a_species_the_model_does_not_know_is_refused(random_bundle, cells):
    fish = cells[0].copy()
    fish.obs["species"] = "zebrafish"
    with pytest.raises(DataError, match="zebrafish"):
        vectors(fish, random_bundle)


@pytest.mark.gpu
def test_gpu_equals_cpu_within_bf16(random_bundle, cells, tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    random_bundle.save(tmp_path / "bundle")
    on_gpu = gm.load(tmp_path / "bundle", device="cuda")
    np.testing.assert_allclose(
        vectors(cells[0], on_gpu), vectors(cells[0], random_bundle), rtol=0.05, atol=0.05
    )
