"""Peaks, antibodies, guides and tags are no genes, whatever holds them and however it is said."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.cells.contract import find_counts
from genemodel.cells.features import genes_among
from genemodel.cells.sources import open_source
from genemodel.errors import DataError

GENES = ["TP53", "CD4", "CD8A"]


def var(column, *types, names=None):
    return pd.DataFrame({column: types}, index=names or [*GENES, "a", "b"][: len(types)])


@pytest.mark.parametrize(
    ("column", "gene", "other"),
    [
        ("feature_types", "Gene Expression", "Peaks"),
        ("feature_type", "Gene Expression", "Antibody Capture"),
        ("feature_types", "Gene Expression", "a word that nobody knows"),
        ("modality", "rna", "atac"),
        ("Modality", "RNA", "ADT"),
        ("feature_biotype", "gene", "spike-in"),
        ("feature_class", "gene", "CRISPR Guide Capture"),
        ("featureType", "Gene", "HTO"),
        ("gene_type", "protein_coding", "Antibody Capture"),
        ("anything", "Gene Expression", "Multiplexing Capture"),
        ("feature_types", None, "Antibody Capture"),
    ],
)
def test_other_features_are_told_from_genes(column, gene, other):
    table = var(column, gene, gene, gene, other, other)
    kept, notes = genes_among(table, "x")
    assert kept.tolist() == [True] * 3 + [False] * 2
    assert len(notes) == 1 and "2 features are not genes" in notes[0] and f"{other}: 2" in notes[0]


@pytest.mark.parametrize(
    ("column", "types"),
    [
        ("feature_types", ["Gene Expression"] * 3),
        ("feature_type", ["protein_coding", "lncRNA", "snRNA"]),
        ("feature_type", ["gene"] * 3),
        ("feature_type", ["chr1", "chr2", "chrX"]),
        ("gene_class", ["protein", "kinase", "transcription factor"]),
        ("remark", ["guide", "tag", "words"]),
        ("modality", [1, 2, 3]),
        ("feature_types", [None, None, None]),
    ],
)
def test_what_says_nothing_of_the_kind_leaves_all_genes(column, types):
    assert genes_among(var(column, *types), "x") == (None, ())


def test_intervals_are_peaks_and_clones_are_genes():
    peaks = ["chr1:100-900", "GRCh38_chrX:5-77", "chr2-10000-10500", "KI270728.1:10-400"]
    genes = ["RP11-34P13.7", "CTD-2369P2.2", "HLA-DRB1", "si:ch211-152c2.3", "NKX2-1", "H2-K1"]
    kept, _ = genes_among(pd.DataFrame(index=peaks + genes), "x")
    assert kept.tolist() == [False] * 4 + [True] * 6


def test_a_source_without_genes_is_refused():
    with pytest.raises(DataError, match="x: has no feature of type 'Gene Expression', only Peaks"):
        genes_among(var("feature_types", "Peaks", "Peaks"), "x")
    with pytest.raises(DataError, match="interval"):
        genes_among(pd.DataFrame(index=["chr1:1-2", "chr1:5-9"]), "x")


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "AnnData", "raw"])
def test_every_container_gives_the_genes_alone(kind, make_cells, tmp_path):
    genes = make_cells(20)
    other = ad.AnnData(
        sp.csr_matrix(np.full((20, 7), 900, np.float32)),
        obs=genes.obs,
        var=pd.DataFrame({"feature_types": "Peaks"}, index=[f"peak {i}" for i in range(7)]),
    )
    named = genes.copy()
    named.var["feature_types"] = "Gene Expression"
    both = ad.concat([other, named], axis=1, merge="same")
    both.obs = genes.obs
    layer = None
    if kind == "raw":
        both.raw, layer = both.copy(), "raw"
        both.X = np.log1p(both.X)
    data = both
    if kind in ("h5ad", "zarr"):
        data = tmp_path / f"both.{kind}"
        getattr(both, f"write_{kind}")(data)
    with open_source(data, layer=layer) as source:
        found = sp.vstack([c.counts_CG for c in source.chunks(6)])
        assert list(source.genes.index) == list(genes.var_names)
        assert (found != genes.X).nnz == 0
        assert any("7 features are not genes and left out (Peaks: 7)" in n for n in source.notes)
        assert source.counts.column_G.tolist() == list(range(7, 7 + genes.n_vars))


def test_the_first_look_is_at_genes_only():
    x = np.ones((30, 5), np.float32)
    x[:, 3:] = 0.37  # normalised antibodies beside raw counts
    table = var("feature_types", *["Gene Expression"] * 3, "Antibody Capture", "Antibody Capture")
    counts = find_counts(ad.AnnData(x + np.eye(30, 5, dtype=np.float32), var=table))
    assert counts.shape == (30, 3)
