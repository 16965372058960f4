"""Tables from files and corpora: what is read, what it becomes, what is refused."""

import gzip

import numpy as np
import pytest

from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.expression.normalise import log_normalised
from genemodel.genes import GeneVocabulary
from genemodel.genes.knowledge import KnowledgeTable, read_provenance
from genemodel.knowledge.building import KnowledgeBuildSettings, build_knowledge, run_build
from genemodel.settings import parse


@pytest.fixture
def make(vocabulary, tmp_path):
    """Build a table over the small vocabulary from the text of one file."""
    vocabulary.save(tmp_path / "v.tsv.gz")

    def build(kind, text, name="input.tsv", **change):
        (tmp_path / name).write_text(text)
        values = {
            "kind": kind, "input": [str(tmp_path / name)], "dimensions": 8,
            "vocabulary": str(tmp_path / "v.tsv.gz"), "knowledge_dir": str(tmp_path / "k"),
            "overwrite": True, "min_fraction": 0.0, **change,
        }  # fmt: skip
        return build_knowledge(parse(KnowledgeBuildSettings, values))

    return build


@pytest.fixture
def genes(vocabulary):
    """Ids and symbols of human genes, and their tokens."""
    rows = vocabulary.genes
    rows = rows[(rows["species"] == "human") & (rows["symbol"] != "")]
    return rows["ensembl_id"].tolist(), rows["symbol"].tolist(), rows["token"].to_numpy()


def test_families_of_two_columns_and_of_one_field(make, genes):
    ids, symbols, token = genes
    long = "ensembl_id\tfamily_id\n" + "".join(
        f"{gene}\tf{i // 4}\n" for i, gene in enumerate(ids[:40])
    )
    one = make("family", long, dimensions=64)
    assert one.n_known == 40
    near = one.table_VP[token[:40]] @ one.table_VP[token[:40]].T
    assert near[0, 1:4].min() > 0.999 and near[0, 4:].max() < 0.99
    fields = "symbol\tgene_family\n" + "".join(
        f"{gene}\tf{i // 4}|alone{i}\n" for i, gene in enumerate(symbols[:40])
    )
    two = make("family", fields, dimensions=64)
    np.testing.assert_allclose(two.table_VP, one.table_VP, atol=1e-6)


def test_gene_sets_overlap_where_genes_do(make, genes):
    _, symbols, token = genes
    sets = [symbols[0:10], symbols[0:9], symbols[20:30], symbols[21:30]]
    lines = [f"S{i}\thttp://x\t" + "\t".join(these) for i, these in enumerate(sets)]
    table = make("pathway", "\n".join(lines) + "\n", "sets.gmt", dimensions=3)
    near = table.table_VP[token] @ table.table_VP[token].T
    assert near[0, 1] > 0.99 > near[0, 21] + 0.5
    assert table.n_known == 20
    with pytest.raises(DataError, match=r"is no GMT file \(line 1 has 2 fields\)"):
        make("pathway", "S\tx\n", "sets.gmt")


def test_edges_by_symbol_by_id_and_by_two_bare_columns(make, genes):
    ids, symbols, token = genes
    pairs = [(0, i) for i in range(2, 20)] + [(1, i) for i in range(20, 40)]
    text = "tf\ttarget\tsign\ttf_ensembl\ttarget_ensembl\n" + "".join(
        f"{symbols[a]}\tnonsense\t1\t\t{ids[b]}\n" for a, b in pairs
    )
    named = make("grn", text)
    assert named.n_known == 40
    bare = make("grn", "a\tb\n" + "".join(f"{ids[a]}\t{ids[b]}\n" for a, b in pairs))
    near = [each.table_VP[token[:40]] @ each.table_VP[token[:40]].T for each in (named, bare)]
    np.testing.assert_allclose(*near, atol=1e-4)
    assert "38 edges" in named.provenance["made"]
    with pytest.raises(DataError, match="no column for the source"):
        make("grn", f"a\tb\tc\n{ids[0]}\t{ids[1]}\t1\n")
    chosen = make(
        "grn", "a\tb\tc\n" + "".join(f"{ids[a]}\t{ids[b]}\tx\n" for a, b in pairs),
        columns={"source": "a", "target": "b"},
    )  # fmt: skip
    np.testing.assert_allclose(chosen.table_VP, bare.table_VP, atol=1e-5)
    with pytest.raises(DataError, match="columns.target=bb: .* did you mean 'b'"):
        make("grn", f"a\tb\n{ids[0]}\t{ids[1]}\n", columns={"source": "a", "target": "bb"})


def test_an_interactome_is_the_same_whichever_end_stands_first(make, genes):
    ids = genes[0]
    rng = np.random.default_rng(0)
    pairs = {tuple(sorted(rng.choice(30, 2, replace=False).tolist())) for _ in range(60)}
    one = make("interactome", "a\tb\n" + "".join(f"{ids[a]}\t{ids[b]}\n" for a, b in pairs))
    other = make("interactome", "a\tb\n" + "".join(f"{ids[b]}\t{ids[a]}\n" for a, b in pairs))
    np.testing.assert_allclose(
        one.table_VP @ one.table_VP.T, other.table_VP @ other.table_VP.T, atol=1e-4
    )


@pytest.mark.parametrize("header", [True, False])
def test_any_table_of_vectors_by_symbol(make, genes, header):
    _, symbols, token = genes
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, (30, 12))
    lines = [f"{g}," + ",".join(map(str, v)) for g, v in zip(symbols, values, strict=False)]
    first = "gene," + ",".join(f"x{i}" for i in range(12)) + "\n" if header else ""
    full = make("table", first + "\n".join(lines), "v.csv", dimensions=None)
    assert full.table_VP.shape[1] == 12 and full.n_known == 30
    scaled = (values - values.mean(0)) / values.std(0)
    np.testing.assert_allclose(full.table_VP[token[:30]], scaled, atol=1e-4)
    few = make("table", first + "\n".join(lines), "v.csv", dimensions=3)
    assert few.table_VP.shape[1] == 3 and "principal components" in few.provenance["made"]
    with pytest.raises(DataError, match="All columns but that of the gene are numbers"):
        make("table", first + "\n".join([*lines, "X," + ",".join("a" * 12)]), "v.csv")


def test_promoters_of_the_vocabulary(make, genes, tmp_path):
    ids, _, token = genes
    rng = np.random.default_rng(0)
    fasta = ">1\n" + "".join(rng.choice(list("ACGT"), 4000)) + "\n"
    rows = [f"{gene}\t1\t{100 + 90 * i}\t{'+-'[i % 2]}\n" for i, gene in enumerate(ids[:40])]
    (tmp_path / "tss.tsv").write_text("gene\tchrom\ttss\tstrand\n" + "".join(rows))
    table = make(
        "promoter", fasta, "g.fa", starts=str(tmp_path / "tss.tsv"), upstream=50, downstream=50,
        kmer=3,
    )  # fmt: skip
    assert table.n_known == 40 and table.present_V[token[:40]].all()
    assert "3-mers" in table.provenance["made"]


def test_coexpression_approximates_correlations_within_sources(tiny_corpus, tmp_path):
    corpus = Corpus.open(tiny_corpus)
    settings = parse(
        KnowledgeBuildSettings,
        {
            "kind": "coexpression", "input": [str(tiny_corpus)], "dimensions": 60,
            "knowledge_dir": str(tmp_path), "holdout": {"by": ""},
        },
    )  # fmt: skip
    table = build_knowledge(settings)
    X = corpus.read(0, len(corpus)).to_csr(len(corpus.vocabulary)).astype(np.float32)
    X = log_normalised(X, corpus.library_C).toarray()
    seen = np.flatnonzero(table.present_V)
    assert 50 < seen.size < len(corpus.vocabulary)
    assert ((X[:, seen] > 0).sum(0) >= 20).all()
    source = np.asarray(corpus.source_C)
    for s in np.unique(source):
        X[source == s] -= X[source == s].mean(0)
    # A gene that a source did not measure has no values there, and they do not count.
    n_measured = np.bincount(source) @ np.asarray(corpus.measured_SV, float)
    z = X[:, seen] / np.sqrt((X[:, seen] ** 2).sum(0) / n_measured[seen])
    exact = z.T @ z / len(z)
    raw = KnowledgeTable.read_raw(settings.path, corpus.vocabulary)
    near = raw.table_VP[seen] @ raw.table_VP[seen].T
    # What a rank of 60 leaves out is about what the best one leaves out.
    left, size, _ = np.linalg.svd(exact)
    best = (left[:, :60] * size[:60]) @ left[:, :60].T
    assert np.linalg.norm(near - exact) < 1.05 * np.linalg.norm(best - exact)
    np.testing.assert_allclose((raw.table_VP[seen] ** 2).sum(0)[:5], size[:5], rtol=1e-3)


def test_cells_held_out_take_no_part_in_coexpression(tiny_corpus, tmp_path):
    made = {}
    for by in ("", "donor"):
        settings = parse(
            KnowledgeBuildSettings,
            {
                "kind": "coexpression", "input": [str(tiny_corpus)], "dimensions": 8,
                "knowledge_dir": str(tmp_path), "name": f"by{by}", "holdout": {"by": by},
            },
        )  # fmt: skip
        made[by] = build_knowledge(settings).provenance["made"]
    assert "600 cells" in made[""] and "600 cells" not in made["donor"]


def test_provenance_says_what_a_table_was_made_from(make, genes, tmp_path):
    ids = genes[0]
    make("family", f"ensembl_id\tfamily\n{ids[0]}\tx\n{ids[1]}\tx\n", name="f.tsv")
    about = read_provenance(tmp_path / "k" / "family.tsv.gz")
    assert about["kind"] == "family"
    assert about["input"].startswith("f.tsv ") and "sha256" in about["input"]
    assert "dimensions=8" in about["settings"]
    with gzip.open(tmp_path / "k" / "family.tsv.gz", "rt") as file:
        assert str(tmp_path) not in file.read()


def test_orthologs_lend_their_vectors_to_genes_that_share_no_token(tmp_path):
    rows = GeneVocabulary.builtin().genes
    human = rows[(rows["species"] == "human")].iloc[:60].copy()
    human["token"] = np.arange(3, 63)
    fish = human.iloc[:3].copy()
    fish["species"], fish["ensembl_id"] = "zebrafish", ["F1", "F2", "F3"]
    fish["symbol"], fish["aliases"], fish["token"] = ["f1", "f2", "f3"], "", [63, 64, 65]
    import pandas as pd

    vocabulary = GeneVocabulary(pd.concat([human, fish], ignore_index=True))
    vocabulary.save(tmp_path / "v.tsv.gz")
    ids = human["ensembl_id"].tolist()
    (tmp_path / "f.tsv").write_text(
        "gene\tgroup\n" + "".join(f"{gene}\tg{i // 2}\n" for i, gene in enumerate(ids[:40]))
    )
    # f1: one ortholog; f2: two, one of them unknown to the table; f3: none that is known.
    (tmp_path / "o.tsv").write_text(
        "human_ensembl\ttarget_ensembl\tn_support\n"
        f"{ids[0]}\tF1\t5\n{ids[2]}\tF2\t5\n{ids[4]}\tF2\t4\n{ids[6]}\tF2\t1\n{ids[50]}\tF3\t5\n"
    )
    values = {
        "kind": "family", "input": [str(tmp_path / "f.tsv")], "knowledge_dir": str(tmp_path),
        "vocabulary": str(tmp_path / "v.tsv.gz"), "orthologs": str(tmp_path / "o.tsv"),
    }  # fmt: skip
    table = build_knowledge(parse(KnowledgeBuildSettings, values))
    assert table.present_V[[63, 64, 65]].tolist() == [True, True, False]
    np.testing.assert_allclose(table.table_VP[63], table.table_VP[3])
    np.testing.assert_allclose(table.table_VP[64], table.table_VP[[5, 7]].mean(0), atol=1e-6)
    assert "2 more through orthologs of human" in table.provenance["made"]
    with pytest.raises(ConfigError, match="exists: models may be trained with it"):
        run_build(parse(KnowledgeBuildSettings, values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "promoter"}, "needs starts=TABLE"),
        ({"starts": "t.tsv"}, "read for kind=promoter only"),
        ({"dimensions": 1}, "at least 2"),
        ({"kmer": 9}, "from 1 to 8"),
        ({"kind": "table", "input": ["a", "b"]}, "is made from one"),
        ({"input": []}, "input is empty"),
        ({"name": "a.b"}, "it is a word"),
        ({"cells": 0}, "cells is 0"),
        ({"min_fraction": 2}, "min_fraction is 2"),
    ],
)
def test_impossible_settings_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        parse(KnowledgeBuildSettings, {"kind": "family", "input": ["a"], **values})


def test_describe_says_what_a_table_is(make, genes, tmp_path):
    from genemodel.command.verbs import DescribeSettings, describe

    ids = genes[0]
    make("family", f"ensembl_id\tfamily\n{ids[0]}\tx\n{ids[1]}\tx\n")
    said = describe(DescribeSettings(tmp_path / "k" / "family.tsv.gz"))
    assert said.startswith("knowledge table") and "kind: family" in said and "1 sets" in said


def test_names_of_another_species_are_refused_with_what_to_look_at(make):
    text = "gene\tgroup\n" + "".join(f"YAL{i:03d}W\tg\n" for i in range(20))
    with pytest.raises(DataError, match=r"0 of 20 gene names are known in human, not YAL000W"):
        make("family", text)
