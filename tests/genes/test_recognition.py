"""Gene names are known by what they are, not by where they stand."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.cells.contract import find_counts, refuse_numbers
from genemodel.errors import DataError
from genemodel.genes.recognition import (
    are_numbers,
    name_column,
    refuse_turned,
    share_of_genes,
    without_appended,
)
from genemodel.genes.vocabulary import GeneVocabulary


@pytest.fixture(scope="module")
def human():
    genes = GeneVocabulary.builtin().genes
    genes = genes[(genes["species"] == "human") & (genes["symbol"] != "")]
    return genes.iloc[::90].reset_index(drop=True)


def test_genes_and_other_names(human):
    ids, symbols = human["ensembl_id"].tolist(), human["symbol"].tolist()
    barcodes = [f"ACGTACGTACGTAC{i}-1" for i in range(60)]
    assert share_of_genes(ids) == 1 and share_of_genes([f"{i}.7" for i in ids]) == 1
    assert share_of_genes(symbols) > 0.95
    assert share_of_genes([f"GRCh38_{s}" for s in symbols]) > 0.95
    assert share_of_genes([f"ENSDARG{i:011d}" for i in range(50)]) == 1
    for names in (barcodes, [f"cell{i}" for i in range(60)], [str(i) for i in range(60)], []):
        assert share_of_genes(names) == 0


@pytest.mark.parametrize(
    ("names", "is_so"),
    [
        (["0", "1", "2"], True), (range(5), True), (["0-1", "1-1"], True), (["3.0", "4.0"], True),
        (["TP53", "1"], False), (["7SK", "5S"], False), ([], False),
    ],
)  # fmt: skip
def test_numbers_are_no_names(names, is_so):
    assert are_numbers(list(names)) == is_so


@pytest.mark.parametrize(
    "column",
    ["features", "gene_short_name", "ID", "hgnc_symbol", "gene_ids-0", "Accession", "feature_id"],
)
@pytest.mark.parametrize("what", ["ensembl_id", "symbol"])
def test_the_column_of_names_is_found_under_any_name(human, column, what):
    numbers = [str(i) for i in range(len(human))]
    var = pd.DataFrame(
        {
            "note": [f"text {i}" for i in range(len(human))],
            "length": 7,
            "chromosome": "1",
            column: human[what].to_numpy(),
        },
        index=numbers,
    )
    assert name_column(var) == column
    x = sp.csr_matrix(np.eye(len(human), dtype=np.float32))
    counts = find_counts(ad.AnnData(x, var=var))
    assert list(counts.genes.index) == human[what].tolist()
    match = GeneVocabulary.builtin().match(counts.genes, species="human")
    assert match.column == column and match.fraction > 0.95
    # The same where the index holds names, but of something else.
    other = var.set_axis([f"probe{i}" for i in numbers])
    assert GeneVocabulary.builtin().match(other, species="human").column == column


def test_a_species_that_is_not_built_in_has_names_too():
    var = pd.DataFrame({"n": 1.5, "kind": "x", "gene": [f"axo{i}" for i in range(30)]})
    assert name_column(var) == "gene"


def test_numbers_without_names_are_refused_where_names_matter(human):
    var = pd.DataFrame({"length": 5}, index=[str(i) for i in range(20)])
    counts = find_counts(ad.AnnData(np.eye(20, dtype=np.float32), var=var))
    with pytest.raises(DataError, match=r"var_names are numbers \(0, 1, 2 …\).*it has length"):
        refuse_numbers(counts.genes, "x")
    refuse_numbers(pd.DataFrame(index=human["symbol"]), "x")


def test_names_that_were_made_unique_are_undone():
    names = ["TP53", "TP53-1", "TP53-2", "CD4", "CD4.1", "A_1", "A", "MIR1-1", "NKX2-1", "HLA-A"]
    assert without_appended(names) == [
        "TP53", "TP53", "TP53", "CD4", "CD4", "A", "A", "MIR1-1", "NKX2-1", "HLA-A",
    ]  # fmt: skip
    every = GeneVocabulary.builtin().genes["symbol"].tolist()
    assert without_appended(every) == every


@pytest.mark.parametrize("join", ["-", "."])
def test_counts_of_names_made_unique_are_summed_into_their_gene(human, join):
    symbols = human["symbol"].tolist()
    plain = GeneVocabulary.builtin().match(symbols, species="human")
    twice = [*symbols, *(f"{s}{join}1" for s in symbols[:10]), "nothing-1"]
    match = GeneVocabulary.builtin().match(twice, species="human")
    assert (match.token_G[: len(symbols)] == plain.token_G).all()
    assert (match.token_G[len(symbols) : -1] == plain.token_G[:10]).all()
    assert match.token_G[-1] == -1


def test_a_turned_matrix_is_refused(human):
    cells = [f"ACGTACGTACGTAC{i}-1" for i in range(60)]
    genes = human["symbol"].tolist()
    refuse_turned(cells, genes, "x")
    refuse_turned(genes, genes, "x")
    with pytest.raises(DataError, match=r"x: obs_names hold gene names.*Turn it: adata = adata.T"):
        refuse_turned(genes, cells, "x")
    turned = ad.AnnData(
        sp.csr_matrix(np.ones((len(genes), 60), np.float32)),
        obs=pd.DataFrame(index=genes),
        var=pd.DataFrame(index=cells),
    )
    with pytest.raises(DataError, match=r"adata = adata\.T"):
        find_counts(turned)
