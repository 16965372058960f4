"""Families of genes stay together in folds; tables of tasks say what is wrong with them."""

import numpy as np
import pytest

from genemodel.errors import ConfigError, DataError
from genemodel.gene_tasks.families import families_of, grouped_folds
from genemodel.gene_tasks.tables import one_task, read_tasks
from genemodel.genes.vocabulary import GeneVocabulary


def test_paralogues_share_a_family_and_orthologs_that_of_their_token():
    vocabulary = GeneVocabulary.builtin()
    family_V = families_of(vocabulary, ("human",))
    token = vocabulary.match(
        ["HOXA1", "HOXB7", "KLF4", "KLF2", "ACTB"], species="human", min_fraction=0
    ).token_G
    assert family_V[token[0]] == family_V[token[1]]
    assert family_V[token[2]] == family_V[token[3]] != family_V[token[0]]
    mouse = vocabulary.match(["Hoxa1"], species="mouse", min_fraction=0, min_genes=1).token_G
    assert families_of(vocabulary, ("mouse",))[mouse[0]] == family_V[token[0]]


def test_a_table_of_groups_decides_and_the_largest_of_several_wins(small_vocabulary, tmp_path):
    genes = small_vocabulary.genes
    human = genes[genes["species"] == "human"]
    a, b, c, d, e = human["ensembl_id"].iloc[:5]
    path = tmp_path / "groups.tsv"
    path.write_text(f"gene\tgroup\n{a}\tsmall\n{a}\tlarge\n{b}\tlarge\n{c}\tlarge\n{d}\tsmall\n")
    family_V = families_of(small_vocabulary, ("human",), path)
    at = human["token"].iloc[:5].tolist()
    assert [family_V[t] for t in at[:4]] == ["large", "large", "large", "small"]
    assert family_V[at[4]].startswith(("stem ", "gene ")) and e
    (tmp_path / "no.tsv").write_text("gene\tkind\n")
    with pytest.raises(DataError, match="no column family or group"):
        families_of(small_vocabulary, ("human",), tmp_path / "no.tsv")


def test_no_family_is_in_two_folds():
    rng = np.random.default_rng(0)
    group_G = [f"g{i}" for i in rng.integers(0, 40, 300)]
    code_G = rng.integers(0, 2, 300)
    fold_G = grouped_folds(code_G, group_G, 5, seed=0)
    folds_of = {}
    for group, fold in zip(group_G, fold_G, strict=True):
        folds_of.setdefault(group, set()).add(int(fold))
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert set(fold_G) == set(range(5))
    # Every fold leaves genes of both labels to learn from.
    for fold in range(5):
        assert set(code_G[fold_G != fold]) == {0, 1}
    with pytest.raises(DataError, match="1 family only"):
        grouped_folds(np.array([0, 0, 1]), ["a", "b", "c"], 3, 0)


def test_reading_tasks(small_vocabulary, tmp_path):
    genes = small_vocabulary.genes
    a, b, c = genes[genes["species"] == "human"]["ensembl_id"].iloc[:3]
    path = tmp_path / "tasks.tsv"

    def write(*rows, header="task\tgene_id\tlabel\tpositive"):
        path.write_text("\n".join([header, *rows]) + "\n")

    write(f"one\t{a}\tgood\t1", f"one\t{b}\tworse\t0", "one\tENSG99999999999\tworse\t0",
          f"two\t{c}\tx\t1", f"two\t{a}\ty\t0")  # fmt: skip
    one, two = read_tasks(path, small_vocabulary, ("human",))
    assert (one.labels, one.gene_G, one.code_G.tolist()) == (("worse", "good"), [a, b], [1, 0])
    assert two.labels == ("y", "x")
    codes = one.codes(len(small_vocabulary), np.array([True, False]))
    assert (codes >= 0).sum() == 1 and codes[one.token_G[1]] == 0
    assert read_tasks(path, small_vocabulary, ("human",), task="two")[0].name == "two"
    with pytest.raises(DataError, match="did you mean 'two'"):
        read_tasks(path, small_vocabulary, ("human",), task="tow")
    with pytest.raises(ConfigError, match="gene_labels.task=one"):
        one_task([one, two], path, "gene_labels.task")
    write(f"one\t{a}\tgood\t1", f"one\t{a}\tworse\t0", f"one\t{b}\tworse\t0")
    with pytest.raises(DataError, match=f"gives {a} two labels"):
        read_tasks(path, small_vocabulary, ("human",))
    write(f"one\t{a}\tgood\t1", f"one\t{b}\tgood\t1")
    with pytest.raises(DataError, match="one label only, good"):
        read_tasks(path, small_vocabulary, ("human",))
    write("one\tNOGENE\tgood\t1")
    with pytest.raises(DataError, match="no gene is of the model's vocabulary"):
        read_tasks(path, small_vocabulary, ("human",))
    write(f"{a}\tgood", header="gene\tkind")
    with pytest.raises(DataError, match="no column label"):
        read_tasks(path, small_vocabulary, ("human",))
