import gzip

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from genemodel.errors import DataError
from genemodel.genes import GeneVocabulary, add_species
from genemodel.genes.orthologs import one_to_one, ortholog_means

COLUMNS = ["token", "species", "ensembl_id", "symbol", "biotype", "aliases"]


def slow_one_to_one(pairs):
    """Every pair against every other."""
    best = {}
    for known, new, support in pairs:
        best[known, new] = max(support, best.get((known, new), support))
    kept = set()
    for (known, new), support in best.items():
        rivals = [s for (k, n), s in best.items() if (k == known) != (n == new)]
        if all(s < 0.5 * support for s in rivals):
            kept.add((known, new, support))
    return kept


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighted", [True, False])
def test_one_to_one_equals_the_slow_rule(seed, weighted):
    rng = np.random.default_rng(seed)
    pairs = [
        (f"k{rng.integers(40)}", f"n{rng.integers(40)}", float(rng.integers(1, 13)) * weighted + 1)
        for _ in range(70)
    ]
    found = one_to_one(pd.DataFrame(pairs, columns=["known", "new", "support"]))
    as_set = set(found.itertuples(index=False, name=None))
    assert as_set == slow_one_to_one(pairs)
    assert as_set
    assert found["known"].is_unique
    assert found["new"].is_unique


@pytest.fixture
def known():
    rows = [(3 + i, "human", f"ENSG{i:011d}", f"GENE{i}", "protein_coding", "") for i in range(6)]
    rows += [(3, "mouse", "ENSMUSG00000000000", "Gene0", "protein_coding", "")]
    return GeneVocabulary(pd.DataFrame(rows, columns=COLUMNS))


def fish(i):
    return f"ENSDARG{i:011d}"


@pytest.fixture
def genes(tmp_path):
    path = tmp_path / "genes.tsv"
    lines = ["ensembl_id\tsymbol\tbiotype"]
    lines += [f"{fish(i)}\tgene{i}\tprotein_coding" for i in range(8)]
    lines += [f"{fish(8)}\tpseudo\tprocessed_pseudogene", f"{fish(9)}\tmir\tmiRNA"]
    path.write_text("\n".join(lines) + "\n")
    return path


def write(path, text):
    path.write_text(text.replace(" ", "\t"))
    return path


def species_tokens(vocabulary, species):
    rows = vocabulary.species_rows(species)
    return dict(zip(rows["ensembl_id"], map(int, rows["token"]), strict=True))


def test_sharing_and_own_tokens(known, genes, tmp_path):
    # 0 one-to-one; 1 twice (one-to-many); 2 and 3 to one fish gene (many-to-one); 8 not kept.
    pairs = [(0, 0), (1, 1), (1, 2), (2, 3), (3, 3), (4, 8), (5, 5), (99, 6)]
    text = "human_ensembl target_ensembl\n"
    text += "".join(f"ENSG{a:011d} {fish(b)}\n" for a, b in pairs)
    orthologs = write(tmp_path / "o.tsv", text)
    vocabulary, report = add_species(
        name="Danio rerio",
        genes=genes,
        orthologs=orthologs,
        to="human",
        out=tmp_path / "v.tsv.gz",
        vocabulary=known,
    )
    tokens = species_tokens(vocabulary, "zebrafish")
    assert tokens[fish(0)] == 3
    assert tokens[fish(5)] == 8
    own = [tokens[fish(i)] for i in (1, 2, 3, 4, 6, 7, 9)]
    assert own == list(range(9, 16))
    assert fish(8) not in tokens
    assert vocabulary.species == ("human", "mouse", "zebrafish")
    assert vocabulary.extends(known)
    assert GeneVocabulary.read(tmp_path / "v.tsv.gz") == vocabulary
    assert known.with_species("zebrafish", genes, orthologs, "human") == vocabulary
    assert (report.genes_in_table, report.genes_kept) == (10, 9)
    assert (report.shared, report.own) == (2, 7)
    assert (report.dropped_one_to_many, report.unmapped) == (3, 4)
    assert (report.tokens_before, report.tokens_after) == (9, 16)
    assert "2 share a token" in str(report)


@pytest.mark.parametrize(
    "text",
    [
        "human_ensembl zebrafish_ensembl\nENSG00000000000 ENSDARG00000000000\n",
        "zebrafish_symbol human_symbol\ngene0 gene0\n",
        "a b\nGENE0 gene0\n",
        "a b\nENSDARG00000000000 ENSG00000000000\n",
        "human_ensembl target_ensembl target_symbol\nENSG00000000000 ENSDARG99 gene0\n",
        "species human_ensembl target_ensembl n_support\n"
        "zebrafish ENSG00000000000 ENSDARG00000000000 9\n"
        "zebrafish ENSG00000000000 ENSDARG00000000001 4\n"
        "zebrafish ENSG00000000003 ENSDARG00000000001 7\n"
        "pig ENSG00000000000 ENSSSCG00000000001 9\n",
        "human_ensembl zebrafish_ensembl orthology_type\n"
        "ENSG00000000000 ENSDARG00000000000 ortholog_one2one\n"
        "ENSG00000000002 ENSDARG00000000002 ortholog_one2many\n",
    ],
)
def test_layouts_of_ortholog_tables(known, genes, tmp_path, text):
    path = tmp_path / "o.tsv.gz"
    path.write_bytes(gzip.compress(text.replace(" ", "\t").encode()))
    tokens = species_tokens(known.with_species("zebrafish", genes, path, "human"), "zebrafish")
    assert tokens[fish(0)] == 3
    assert tokens[fish(2)] >= 9


BIOMART = {
    "the web page": (
        "Gene stable ID\tGene name\tGene type",
        "Gene stable ID\tZebrafish gene stable ID\tZebrafish gene name\tZebrafish homology type",
        False,
    ),
    "from the fish": (
        "Gene stable ID\tGene name\tGene type",
        "Gene stable ID\tHuman gene stable ID\tHuman gene name\tHuman homology type",
        True,
    ),
    "R": (
        "ensembl_gene_id\texternal_gene_name\tgene_biotype",
        "ensembl_gene_id\tdrerio_homolog_ensembl_gene\tdrerio_homolog_associated_gene_name\t"
        "drerio_homolog_orthology_type",
        False,
    ),
}


@pytest.mark.parametrize("layout", BIOMART)
def test_tables_of_biomart(layout, known, tmp_path):
    genes_header, orthologs_header, turned = BIOMART[layout]
    lines = [f"{fish(i)}\tgene{i}\tprotein_coding" for i in range(5)]
    lines.insert(2, lines[1])  # a line per transcript
    (tmp_path / "g.tsv").write_text("\n".join([genes_header, *lines]) + "\n")
    pairs = [(0, 0, "ortholog_one2one"), (1, 1, "ortholog_one2many"), (1, 2, "ortholog_one2many")]
    rows = []
    for human, other, kind in pairs:
        a, b = f"ENSG{human:011d}", fish(other)
        rows.append(f"{b}\t{a}\t\t{kind}" if turned else f"{a}\t{b}\tgene{other}\t{kind}")
    rows.append(f"{fish(4)}\t\t\t" if turned else f"ENSG{4:011d}\t\t\t")
    (tmp_path / "o.tsv").write_text("\n".join([orthologs_header, *rows]) + "\n")
    grown = known.with_species("zebrafish", tmp_path / "g.tsv", tmp_path / "o.tsv", "human")
    tokens = species_tokens(grown, "zebrafish")
    assert len(tokens) == 5 and tokens[fish(0)] == 3
    assert sorted(tokens[fish(i)] for i in range(1, 5)) == list(range(9, 13))


def test_a_retired_id_is_still_a_rival(known, genes, tmp_path):
    text = "species human_ensembl target_ensembl n_support\n"
    text += f"zebrafish ENSG00000000000 {fish(0)} 6\nzebrafish ENSG00000000000 ENSDARG77 9\n"
    text += f"zebrafish ENSG00000000001 {fish(1)} 6\n"
    path = write(tmp_path / "o.tsv", text)
    tokens = species_tokens(known.with_species("zebrafish", genes, path, "human"), "zebrafish")
    assert tokens[fish(0)] >= 9
    assert tokens[fish(1)] == 4


def test_orthologs_to_mouse_reach_the_shared_token(known, genes, tmp_path):
    path = write(tmp_path / "o.tsv", f"mouse_ensembl zebrafish_id\nENSMUSG00000000000 {fish(7)}\n")
    tokens = species_tokens(known.with_species("zebrafish", genes, path, "mouse"), "zebrafish")
    assert tokens[fish(7)] == 3


def test_symbols_of_the_ortholog_table_become_aliases(known, genes, tmp_path):
    path = write(
        tmp_path / "o.tsv",
        f"human_ensembl target_ensembl target_symbol\nENSG00000000000 {fish(0)} oldname\n"
        f"ENSG00000000001 {fish(1)} gene2\n",
    )
    vocabulary = known.with_species("zebrafish", genes, path, "human")
    match = vocabulary.match(["oldname", "gene2"], species="zebrafish")
    assert match.report()["ensembl_id"].tolist() == [fish(0), fish(2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mouse"}, "'mouse' is in the vocabulary already"),
        ({"name": "Z fish!"}, "cannot be the name of a species"),
        ({"to": "frog"}, "species 'frog' is not in this vocabulary"),
        ({"genes": "absent.tsv"}, "genes table: .*absent.tsv does not exist"),
        ({"genes": "no_id.tsv"}, "no column ensembl_id or gene_id.*it has name, biotype"),
        ({"genes": "twice.tsv"}, "lists ENSDARG00000000001 twice"),
        ({"genes": "ragged.tsv"}, "line 3 of .*ragged.tsv has 1 fields, the header has 2"),
        ({"genes": "pseudo.tsv"}, "no gene of a kept biotype.*its biotypes are pseudogene"),
        ({"genes": "human.tsv"}, "a gene of another species of the vocabulary"),
        ({"genes": "empty.tsv"}, "has no header line"),
        ({"orthologs": "cut.tsv.gz"}, "damaged or cut-off gzip"),
        ({"orthologs": "wide.tsv"}, "has columns a, b, c; need"),
        ({"orthologs": "others.tsv"}, "no row for species 'zebrafish'.*holds cow, pig"),
        ({"orthologs": "strangers.tsv"}, "none of the 1 rows .*names both"),
        ({"orthologs": "support.tsv"}, "'many' in n_support, expected numbers"),
        ({"orthologs": "same.tsv"}, "same column twice"),
    ],
)
def test_bad_tables_are_refused(known, genes, tmp_path, settings, message):
    write(tmp_path / "no_id.tsv", "name biotype\nx protein_coding\n")
    write(tmp_path / "twice.tsv", f"ensembl_id symbol\n{fish(1)} a\n{fish(1)} b\n")
    write(tmp_path / "ragged.tsv", f"ensembl_id symbol\n{fish(1)} a\n{fish(2)}\n")
    write(tmp_path / "pseudo.tsv", f"ensembl_id symbol biotype\n{fish(1)} a pseudogene\n")
    write(tmp_path / "human.tsv", "ensembl_id symbol\nENSG00000000001 a\n")
    write(tmp_path / "empty.tsv", "")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"a\tb\n" * 500)[:-9])
    write(tmp_path / "wide.tsv", "a b c\n1 2 3\n")
    write(tmp_path / "others.tsv", "species human_ensembl target_ensembl\npig x y\ncow x y\n")
    write(tmp_path / "strangers.tsv", "human_ensembl target_ensembl\nENSG1 ENSDARG1\n")
    write(
        tmp_path / "support.tsv",
        f"human_ensembl target_ensembl n_support\nENSG00000000000 {fish(0)} many\n",
    )
    write(tmp_path / "same.tsv", "a a\n1 2\n")
    write(tmp_path / "good.tsv", f"a b\nENSG00000000000 {fish(0)}\n")
    given = {"name": "zebrafish", "genes": genes, "orthologs": "good.tsv", "to": "human"}
    given |= settings
    given["genes"] = tmp_path / given["genes"]
    given["orthologs"] = tmp_path / given["orthologs"]
    out = tmp_path / "v.tsv"
    with pytest.raises(DataError, match=message):
        add_species(**given, out=out, vocabulary=known)
    assert not out.exists()


REAL = {
    "zebrafish": ("orthologs_human_to_16species_hcop", 9_000, 12_000),
    "worm": ("orthologs_human_to_16species_hcop", 2_300, 3_800),
    "fly": ("orthologs_human_to_16species_hcop", 2_900, 4_500),
}


@pytest.fixture(scope="module")
def grown(shared_knowledge, tmp_path_factory):
    """The built-in vocabulary and three more species, one after the other."""
    out = tmp_path_factory.mktemp("grown")
    vocabulary: GeneVocabulary | None = None
    reports = {}
    for name, (orthologs, *_) in REAL.items():
        vocabulary, reports[name] = add_species(
            name=name,
            genes=shared_knowledge / f"genes_{name}.tsv.gz",
            orthologs=shared_knowledge / f"{orthologs}.tsv.gz",
            out=out / f"{name}.tsv.gz",
            vocabulary=vocabulary,
        )
    return vocabulary, reports


def test_real_species_share_sensible_numbers_of_tokens(grown):
    vocabulary, reports = grown
    assert vocabulary.species == ("human", "mouse", *REAL)
    assert vocabulary.extends(GeneVocabulary.builtin())
    for name, (_, low, high) in REAL.items():
        assert low < reports[name].shared < high, reports[name]
        assert reports[name].shared + reports[name].own == reports[name].genes_kept
        assert len(vocabulary.tokens_of(name)) == reports[name].genes_kept
    # Genes duplicated in the fish's ancestor have their own tokens.
    symbols = vocabulary.genes.set_index(["species", "symbol"])["token"]
    human_pax6 = symbols["human", "PAX6"]
    assert symbols["worm", "vab-3"] == human_pax6
    assert human_pax6 not in vocabulary.tokens_of("zebrafish")
    assert symbols["zebrafish", "GAPDH"] == symbols["human", "GAPDH"]


@pytest.mark.parametrize(
    "name",
    [
        "zebrafish_cd41_gse100911",
        "worm_embryo_packer2019",
        "worm_l2_neurons_cao2017",
        "fly_gut_fca_180",
    ],
)
def test_real_files_of_added_species_match(grown, shared_data, name):
    vocabulary, _ = grown
    adata = ad.read_h5ad(shared_data / f"{name}.h5ad")
    for column in (None, "gene_symbol"):
        match = vocabulary.match(adata.var, species=adata.obs["species"].iloc[0], column=column)
        assert match.fraction > 0.6
    assert vocabulary.match(adata.var, species=match.species).project(adata.X).sum() > (
        0.6 * adata.X.sum()
    )


def test_means_of_orthologs_hold_every_credible_one(tmp_path):
    rows = GeneVocabulary.builtin().genes
    human = rows[rows["species"] == "human"].iloc[:8].copy()
    human["token"] = np.arange(3, 11)
    fish = human.iloc[:5].copy()
    fish["species"], fish["ensembl_id"] = "zebrafish", [f"F{i}" for i in range(5)]
    fish["symbol"], fish["aliases"] = [f"f{i}" for i in range(5)], ""
    fish["token"] = [3, 11, 12, 13, 14]  # the first is a one-to-one ortholog
    vocabulary = GeneVocabulary(pd.concat([human, fish], ignore_index=True))
    ids = human["ensembl_id"].tolist()
    pairs = [
        (ids[0], "F0", 9),  # shares its token: nothing to make up
        (ids[1], "F1", 6), (ids[1], "F2", 6),  # one gene, two copies
        (ids[2], "F3", 8), (ids[3], "F3", 4), (ids[4], "F3", 3),  # the last is not credible
        ("ENSG00000999999", "F4", 9),  # retired
    ]  # fmt: skip
    lines = ["human_ensembl\ttarget_ensembl\tn_support"]
    lines += ["\t".join(map(str, pair)) for pair in [*pairs, pairs[1]]]  # one row twice
    (tmp_path / "o.tsv").write_text("\n".join(lines) + "\n")
    weight = ortholog_means(vocabulary, "zebrafish", tmp_path / "o.tsv", "human").toarray()
    expected = np.zeros((15, 15))
    expected[11, 4] = expected[12, 4] = 1
    expected[13, [5, 6]] = 0.5
    np.testing.assert_array_equal(weight, expected)


def test_duplicated_genes_of_the_fish_find_their_human_gene(grown, shared_knowledge):
    vocabulary, _ = grown
    table = shared_knowledge / "orthologs_human_to_16species_hcop.tsv.gz"
    weight = ortholog_means(vocabulary, "zebrafish", table, "human")
    symbols = vocabulary.genes.set_index(["species", "symbol"])["token"]
    token = vocabulary.genes.set_index("ensembl_id")["token"]
    for copy in ("ENSDARG00000045936", "ENSDARG00000103379"):  # pax6b, pax6a
        row = weight[token[copy]]
        assert row.indices.tolist() == [symbols["human", "PAX6"]] and row.data.tolist() == [1.0]
    reached = (np.diff(weight.indptr) > 0).sum()
    assert 5000 < reached < 9000  # of the 7,661 that have orthologs and share no token
