"""Figures of genes: what is drawn is what the tables say."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import genemodel as gm
from genemodel.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def attributed():
    rng = np.random.default_rng(0)
    tables = {}
    for label in ("T cell", "B cell"):
        value = rng.normal(size=30)
        order = np.argsort(-np.abs(value))
        tables[label] = pd.DataFrame(
            {"symbol": [f"G{i}" for i in order], "n_cells": 5, "attribution": value[order],
             "where_held": value[order]},
            index=pd.Index([f"ENSG{i:011d}" for i in order], name="gene"),
        )  # fmt: skip
    return pd.concat(tables, names=["label"])


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(1)
    vector = rng.normal(size=(60, 6))
    vector[:20, 0] += 6
    return pd.DataFrame(
        {"symbol": [f"G{i}" for i in range(60)], "n_cells": np.arange(60) + 1,
         **{f"v{i}": vector[:, i] for i in range(6)}},
        index=pd.Index([f"ENSG{i:011d}" for i in range(60)], name="gene"),
    )  # fmt: skip


def test_bars_are_the_strongest_genes_of_every_label(attributed, tmp_path):
    axes = gm.pl.attributions(attributed, most=5, save=tmp_path / "bars.png")
    assert [ax.get_title() for ax in axes] == ["T cell", "B cell"]
    own = attributed.loc["B cell"]
    expected = own.reindex(own["attribution"].abs().sort_values(ascending=False).index)[:5]
    names = [text.get_text() for text in axes[1].get_yticklabels()]
    assert names == list(expected["symbol"][::-1])
    widths = [bar.get_width() for bar in axes[1].patches]
    np.testing.assert_allclose(widths, expected["attribution"][::-1])
    assert (tmp_path / "bars.png").stat().st_size > 5000
    ax = axes[0].figure.subplots()
    assert gm.pl.attributions(attributed, labels=["B cell"], ax=ax)[0] is ax
    with pytest.raises(DataError, match="no label 'NK'"):
        gm.pl.attributions(attributed, labels=["NK"])
    with pytest.raises(ConfigError, match="ax holds too few axes"):
        gm.pl.attributions(attributed, ax=ax)
    with pytest.raises(DataError, match="no column 'symbol'"):
        gm.pl.attributions(pd.DataFrame({"attribution": [1.0]}))


def test_the_map_is_coloured_by_what_is_known_of_genes(vectors, tmp_path):
    known = {f"ENSG{i:011d}": "high" if i < 20 else "low" for i in range(40)}
    axes = gm.pl.gene_vectors(vectors, known, save=tmp_path / "map.png")
    drawn = sum(len(c.get_offsets()) for c in axes[0].collections)
    assert "60 genes" in axes[0].get_title()
    assert drawn == 60 and (tmp_path / "map.png").stat().st_size > 5000
    few = vectors.iloc[:12]
    points = gm.pl.gene_vectors(few)[0].collections[0].get_offsets()
    # Few genes are laid out by their two leading components.
    centred = few.filter(regex="^v") - few.filter(regex="^v").mean()
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    first = np.sort((left * size)[:, 0])
    at = np.sort(np.asarray(points[:, 0]))
    assert abs(np.corrcoef(at, first)[0, 1]) > 0.999 or np.corrcoef(at, -first[::-1])[0, 1] > 0.999
    with pytest.raises(DataError, match="names no gene"):
        gm.pl.gene_vectors(vectors, {"NOGENE": "x"})
    with pytest.raises(DataError, match="no vectors"):
        gm.pl.gene_vectors(vectors[["symbol", "n_cells"]])
    with pytest.raises(DataError, match="no column 'kind'"):
        gm.pl.gene_vectors(vectors, "kind")
