import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.genes import GeneVocabulary

COLUMNS = ["token", "species", "ensembl_id", "symbol", "biotype", "aliases"]


@pytest.fixture(scope="module")
def builtin():
    return GeneVocabulary.builtin()


@pytest.fixture(scope="module")
def small():
    """Genes whose names collide in every way that the precedence rules must settle."""
    rows = [
        (3, "human", "ENSG00000000001", "ABC1", "", "OLD|SHARED|ENSG00000000099"),
        (4, "human", "ENSG00000000002", "Abc1", "", "shared|TWO|NEW1"),
        (5, "human", "ENSG00000000003", "NEW1", "", "Case"),
        (6, "human", "ENSG00000000004", "DEF2", "", "CASE"),
        (7, "mouse", "ENSMUSG00000000001", "Def2", "", ""),
    ]
    return GeneVocabulary(pd.DataFrame(rows, columns=COLUMNS))


def tokens(vocabulary, names, species="human"):
    return vocabulary.match(names, species=species, min_fraction=0.0, min_genes=0).token_G.tolist()


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("ENSG00000000001", 3),
        ("ensg00000000001", 3),
        ("ENSG00000000001.12", 3),
        ("ENSG00000000001.12_PAR_Y", 3),
        ("ENSG00000000099", 3),  # a further id among the aliases
        ("ENSG00000000099.1", 3),
        ("ABC1_ENSG00000000002", 4),
        ("ENSG00000000002.4|ABC1", 4),
        ("GRCh38_ENSG00000000001", 3),
        ("ABC1", 3),  # as written
        ("Abc1", 4),
        ("abc1", -1),  # ignoring case, two genes
        ("def2", 6),
        ("hg19_DEF2", 6),
        ("hg19-DEF2", 6),
        ("GRCh38______DEF2", 6),
        ("mm10_DEF2", -1),
        ("OLD", 3),
        ("old", 3),
        ("NEW1", 5),  # symbol before another gene's alias
        ("new1", 5),
        ("two", 4),
        ("SHARED", 3),  # the spelling tells the genes apart
        ("Shared", -1),
        ("Case", 5),
        ("case", -1),
        ("ENSG00000000098", -1),
        ("ENSG00000000001234", -1),
        ("", -1),
        ("nan", -1),
    ],
)
def test_precedence(small, name, token):
    assert tokens(small, [name]) == [token]


def test_report_and_summary_account_for_every_gene(small):
    names = ["ABC1", "ENSG00000000001", "abc1", "nothing", "mm10_Def2", "DEF2"]
    match = small.match(names, species="Homo sapiens", min_genes=0)
    assert match.token_G.dtype == np.int32
    assert match.species == "human"
    assert (match.n_genes, match.n_matched, match.n_summed, match.n_other_species) == (6, 3, 1, 1)
    assert match.unmatched == ["nothing"]
    assert match.ambiguous == ["abc1"]
    assert match.fraction == pytest.approx(3 / 5)
    report = match.report()
    assert report["status"].tolist() == [
        "matched",
        "summed",
        "ambiguous",
        "unmatched",
        "other species",
        "matched",
    ]
    assert report["how"].tolist() == ["symbol", "id", "", "", "", "symbol"]
    assert report["ensembl_id"].tolist()[:2] == ["ENSG00000000001"] * 2
    assert report["symbol"].tolist()[5] == "DEF2"
    for part in ("3 of 5 genes", "1 summed", "nothing", "1 ambiguous", "1 of another species"):
        assert part in match.summary()
    assert match.measured_V.tolist() == [t in (3, 6) for t in range(len(small))]


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_every_gene_of_the_builtin_table_finds_itself(builtin, species):
    genes = builtin.genes
    genes = genes[genes["species"] == species]
    token_G = genes["token"].to_numpy()
    for names in (
        genes["ensembl_id"],
        genes["ensembl_id"] + ".7",
        genes["symbol"],
        np.where(np.arange(len(genes)) % 2, genes["symbol"], genes["ensembl_id"]),
    ):
        match = builtin.match(names, species=species)
        np.testing.assert_array_equal(match.token_G, token_G)
    lower = builtin.match(genes["symbol"].str.lower(), species=species)
    assert (lower.token_G == token_G).mean() > 0.999
    assert set(lower.token_G[lower.token_G != token_G]) <= {-1}


def test_old_symbols_and_ids(builtin):
    names = ["SARS", "SEPT2", "FAM46C", "C12orf73", "ENSG00000148362", "HIST1H4C", "NOV"]
    report = builtin.match(names, species="human", min_genes=0).report()
    assert report["symbol"].tolist() == [
        "SARS1",
        "SEPTIN2",
        "TENT5C",
        "UQCC6",
        "PAXX",
        "H4C3",
        "CCN3",
    ]
    # MLL2 was KMT2D's official symbol and is KMT2B's nickname in half of the literature.
    match = builtin.match([*names, "MLL2"], species="human", min_genes=0)
    assert match.ambiguous == ["MLL2"]


def test_var_tables_choose_the_best_column_and_say_which(builtin):
    genes = builtin.genes
    genes = genes[genes["species"] == "human"].head(300)
    symbols, ids = genes["symbol"].tolist(), genes["ensembl_id"].tolist()
    numbered = pd.DataFrame({"n": range(300), "feature_name": symbols})
    assert builtin.match(numbered, species="human").column == "feature_name"
    both = pd.DataFrame({"gene_ids": ids}, index=symbols)
    assert builtin.match(both, species="human").column == "index"
    fewer = pd.DataFrame({"gene_ids": ids}, index=[*symbols[:200], *map(str, range(100))])
    assert builtin.match(fewer, species="human").column == "gene_ids"
    # Ids stay preferred unless symbols find clearly more.
    slightly = pd.DataFrame({"gene_symbols": symbols}, index=[*ids[:297], "x", "y", "z"])
    assert builtin.match(slightly, species="human").column == "index"
    other = pd.DataFrame({"mine": symbols}, index=ids)
    assert builtin.match(other, species="human", column="mine").column == "mine"
    assert builtin.match(other, species="human", column="index").column == "index"
    categorical = numbered.assign(feature_name=pd.Categorical(symbols))
    assert builtin.match(categorical, species="human").n_matched == 300
    with pytest.raises(DataError, match=r"no column 'symbl'; it has n, feature_name"):
        builtin.match(numbered, species="human", column="symbl")
    with pytest.raises(DataError, match="plain list of names"):
        builtin.match(symbols, species="human", column="gene_ids")


def human_names(builtin, n=400):
    genes = builtin.genes
    return genes[(genes["species"] == "human") & (genes["biotype"] == "protein_coding")].head(n)


def test_wrong_species_is_refused_by_name(builtin):
    genes = builtin.genes
    for species, other in (("human", "mouse"), ("mouse", "human")):
        part = genes[genes["species"] == species]
        for names in (part["symbol"], part["ensembl_id"]):
            with pytest.raises(
                DataError, match=rf"(?:100|9\d)% of these names are {species} genes"
            ):
                builtin.match(names, species=other)
        # The same names in another case are legitimate for the species they are given for.
        assert builtin.match(part["symbol"].str.upper(), species=species).fraction > 0.99
        assert builtin.match(part["symbol"].str.lower(), species=species).fraction > 0.99


def test_panels_of_shared_genes_in_the_other_spelling_are_accepted_with_a_warning(builtin, caplog):
    genes = builtin.genes
    pairs = genes[genes["species"] == "human"].merge(genes[genes["species"] == "mouse"], on="token")
    same = pairs[pairs["symbol_x"].str.lower() == pairs["symbol_y"].str.lower()].head(300)
    match = builtin.match(same["symbol_x"], species="mouse")
    assert match.token_G.tolist() == same["token"].tolist()
    assert "written as human genes are" in caplog.text


def test_barnyard_references_are_split_by_prefix(builtin):
    genes = builtin.genes
    human = genes[genes["species"] == "human"].head(500)
    mouse = genes[genes["species"] == "mouse"].head(400)
    names = [*("GRCh38_" + human["symbol"]), *("mm10___" + mouse["symbol"])]
    match = builtin.match(names, species="human")
    assert match.token_G[:500].tolist() == human["token"].tolist()
    assert (match.token_G[500:] == -1).all()
    assert match.n_other_species == 400
    match = builtin.match(names, species="mouse")
    assert match.token_G[500:].tolist() == mouse["token"].tolist()
    with pytest.raises(DataError, match="All carry the prefix of another species.*400 of mouse"):
        builtin.match(names[500:], species="human")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [f"feature{i}" for i in range(200)],
            r"only 0 of 200 .*feature0, feature1.*195 more.*setting column",
        ),
        ([str(i) for i in range(200)], "numbers, not gene names"),
        ([f"ENST{i:011d}.1" for i in range(200)], "transcript or protein ids"),
        ([f"ENSDARG{i:011d}" for i in range(200)], "zebrafish ids.*species name=zebrafish"),
        ([], "no gene names"),
        ("TP53", "not the one string 'TP53'"),
    ],
)
def test_hopeless_names_are_refused_with_the_way_out(builtin, names, message):
    with pytest.raises(DataError, match=message):
        builtin.match(names, species="human")


def test_thresholds(builtin):
    names = [*human_names(builtin, 100)["symbol"], *(f"unknown{i}" for i in range(300))]
    with pytest.raises(DataError, match=r"only 100 of 400 .*25\.0%; accepted are 30%.*min_frac"):
        builtin.match(names, species="human")
    assert builtin.match(names, species="human", min_fraction=0.2).n_matched == 100
    with pytest.raises(DataError, match="150 genes"):
        builtin.match(names, species="human", min_fraction=0.2, min_genes=150)
    # A panel smaller than min_genes must match completely.
    assert builtin.match(names[:10], species="human").n_matched == 10
    with pytest.raises(DataError, match="only 10 of 11"):
        builtin.match([*names[:10], "unknown"], species="human")


def slow_projection(X, token_G, n_tokens):
    rows = []
    for row in X.toarray():
        sums = {}
        for gene, count in enumerate(row.tolist()):
            if token_G[gene] >= 0 and count:
                sums[token_G[gene]] = sums.get(token_G[gene], 0) + count
        rows.append(sums)
    dense = np.zeros((len(rows), n_tokens))
    for i, sums in enumerate(rows):
        for token, total in sums.items():
            dense[i, token] = total
    return dense


def noisy_names(builtin):
    """Ids, their symbols again (summed), and unknown names, shuffled."""
    part = human_names(builtin, 300)
    names = [*part["ensembl_id"], *part["symbol"][:80], *(f"unknown{i}" for i in range(60))]
    return np.random.default_rng(5).permutation(names).tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.int64, np.uint16, np.float64, bool])
@pytest.mark.parametrize("layout", ["csr", "unsorted", "duplicates", "zeros", "csc", "dense"])
def test_projection_equals_the_slow_one(builtin, dtype, layout):
    rng = np.random.default_rng(1)
    match = builtin.match(noisy_names(builtin), species="human")
    assert match.n_summed == 80
    counts = rng.poisson(0.7, (31, match.n_genes)) * rng.integers(1, 5000, (31, 1))
    counts[3] = 0
    X = sp.csr_matrix(np.minimum(counts, np.iinfo(np.uint16).max).astype(dtype))
    if layout == "unsorted":
        for i in range(31):
            part = slice(X.indptr[i], X.indptr[i + 1])
            order = rng.permutation(part.stop - part.start)
            X.indices[part], X.data[part] = X.indices[part][order], X.data[part][order]
        X.has_sorted_indices = False
    elif layout == "duplicates":
        if dtype is bool:  # two entries of one boolean add up to one, not two
            X = X.astype(np.int32)
        X = sp.csr_matrix(
            (
                np.tile(X.data, 2),
                (np.tile(np.repeat(np.arange(31), np.diff(X.indptr)), 2), np.tile(X.indices, 2)),
            ),
            shape=X.shape,
        )
    elif layout == "zeros":
        X.data[::3] = 0
    expected = slow_projection(X, match.token_G, len(builtin))
    given = {"csc": X.tocsc, "dense": X.toarray}.get(layout, lambda: X)()
    Y = match.project(given)
    assert Y.shape == (31, len(builtin))
    assert Y.dtype == (np.float32 if np.issubdtype(X.dtype, np.floating) else np.int32)
    np.testing.assert_array_equal(Y.toarray(), expected)
    assert (Y.data != 0).all()
    for i in range(31):
        assert (np.diff(Y.indices[Y.indptr[i] : Y.indptr[i + 1]]) > 0).all()


def test_projection_reaches_every_token(builtin):
    names = builtin.genes["ensembl_id"][builtin.genes["species"] == "human"]
    match = builtin.match(names, species="human")
    rng = np.random.default_rng(2)
    X = sp.csr_array(rng.integers(1, 2**31 - 1, (2, match.n_genes)).astype(np.int32))
    Y = match.project(X)
    np.testing.assert_array_equal(Y[:, match.token_G].toarray(), X.toarray())


def test_projection_refuses_other_counts(builtin):
    match = builtin.match(noisy_names(builtin), species="human")
    with pytest.raises(DataError, match="7 genes, this match was made for 440"):
        match.project(sp.csr_matrix((2, 7)))
    broken = sp.csr_matrix(np.ones((2, match.n_genes), dtype=np.float32))
    broken.indices[3] = match.n_genes
    with pytest.raises(DataError, match="damaged: an entry in column 440 of 440"):
        match.project(broken)
    broken.indices[3] = 3
    broken.indptr[1] = 10_000
    with pytest.raises(DataError, match="row pointers"):
        match.project(broken)
    pair = builtin.match([*human_names(builtin, 60)["symbol"]] * 2, species="human")
    X = sp.csr_matrix(np.full((1, 120), 2**31 - 1, dtype=np.int32))
    with pytest.raises(DataError, match="exceed 2,147,483,647"):
        pair.project(X)


@pytest.mark.parametrize(
    ("name", "fraction", "kept"),
    [
        ("human_pbmc3k_10xv1", 0.7, 0.99),
        ("human_pancreas_baron_h1", 0.95, 0.99),
        ("mouse_gi_mca_219", 0.85, 0.97),
        ("mouse_bonemarrow_paul15", 0.95, 0.95),
    ],
)
def test_real_files_by_id_and_by_symbol(builtin, shared_data, name, fraction, kept):
    adata = ad.read_h5ad(shared_data / f"{name}.h5ad")
    species = adata.obs["species"].iloc[0]
    for column in (None, "index", "gene_symbol"):
        match = builtin.match(adata.var, species=species, column=column)
        assert match.fraction > fraction
        assert match.project(adata.X).sum() > kept * adata.X.sum()
        report = match.report()
        assert report["status"].isin(["matched", "summed"]).sum() == match.n_matched
        assert (report["status"] == "summed").sum() == match.n_summed
    with pytest.raises(DataError, match=f"set species={species}"):
        builtin.match(adata.var, species="mouse" if species == "human" else "human")


def test_genes_of_another_species_of_a_joined_file_count_for_neither():
    vocabulary = GeneVocabulary.builtin()
    human = vocabulary.genes.query("species == 'human'")["ensembl_id"].tolist()[:60]
    mouse = vocabulary.genes.query("species == 'mouse'")["ensembl_id"].tolist()[:600]
    with pytest.raises(DataError, match="set species=mouse"):
        vocabulary.match(human + mouse, species="human")
    match = vocabulary.match(human + mouse, species="human", among=("human", "mouse"))
    assert match.n_matched == 60 and match.n_other_species == 600 and match.fraction == 1
    assert (match.token_G[60:] == -1).all() and len(match.token_G) == 660
    # With next to no name of its own the file is no joined one.
    with pytest.raises(DataError, match="set species=mouse"):
        vocabulary.match(human[:9] + mouse, species="human", among=("human", "mouse"))
