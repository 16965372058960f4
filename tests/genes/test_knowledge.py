import gzip

import numpy as np
import pytest

from genemodel.errors import ConfigError, DataError
from genemodel.genes.knowledge import (
    KnowledgeTable,
    file_digest,
    find_tables,
    read_provenance,
    tables_in,
)


@pytest.fixture
def table(vocabulary):
    rng = np.random.default_rng(0)
    present = np.zeros(len(vocabulary), bool)
    present[rng.permutation(np.arange(3, len(vocabulary)))[:100]] = True
    values = rng.normal(2.0, 3.0, (len(vocabulary), 4)).astype(np.float32) * present[:, None]
    return KnowledgeTable(values, present, {"kind": "family", "input": "a.tsv 1\nb.tsv 2"})


def test_what_is_written_is_read_again(table, vocabulary, tmp_path):
    path = tmp_path / "a.tsv.gz"
    table.write(path, vocabulary)
    again = KnowledgeTable.read_raw(path, vocabulary)
    np.testing.assert_array_equal(again.present_V, table.present_V)
    np.testing.assert_allclose(again.table_VP, table.table_VP, rtol=1e-5)
    assert again.provenance == table.provenance == read_provenance(path)
    once = file_digest(path)
    again.write(path, vocabulary)
    assert file_digest(path) == once


def test_rows_stand_in_the_order_of_tokens(table, vocabulary, tmp_path):
    table.write(tmp_path / "a.tsv", vocabulary)
    lines = (tmp_path / "a.tsv").read_text().splitlines()
    ids = [line.split("\t")[0] for line in lines if not line.startswith(("#", "gene"))]
    names = vocabulary.token_ids()
    assert ids == [names[token] for token in np.flatnonzero(table.present_V)]


def test_a_built_table_is_scaled_as_a_whole_and_a_plain_one_by_column(table, vocabulary, tmp_path):
    values = table.table_VP * np.array([10, 1, 1, 1], np.float32)
    uneven = KnowledgeTable(values, table.present_V, table.provenance)
    uneven.write(tmp_path / "built.tsv", vocabulary)
    lines = (tmp_path / "built.tsv").read_text().splitlines()
    plain = [line for line in lines if not line.startswith(("#", "gene"))]
    (tmp_path / "plain.tsv").write_text("\n".join(plain) + "\n")
    for name, even in (("built", False), ("plain", True)):
        read = KnowledgeTable.read(tmp_path / f"{name}.tsv", vocabulary)
        known = read.table_VP[read.present_V]
        assert not read.table_VP[~read.present_V].any()
        np.testing.assert_allclose(known.mean(0), 0, atol=1e-5)
        assert np.mean(known**2) == pytest.approx(1, abs=1e-4)
        spread = known.std(0)
        assert bool(spread.max() < 1.01 * spread[1:].max()) is even


def test_a_token_shared_by_orthologs_is_the_mean_of_its_genes(vocabulary, tmp_path):
    genes = vocabulary.genes
    shared = genes[genes["token"].duplicated(keep=False)].sort_values("token")
    first, second = shared["ensembl_id"].iloc[:2]
    alone = genes["ensembl_id"].iloc[5]
    rows = [f"{first}\t1\t0\n", f"{second}\t3\t0\n", f"{alone}\t0\t7\n"]
    (tmp_path / "a.tsv").write_text("".join(rows))
    read = KnowledgeTable.read_raw(tmp_path / "a.tsv", vocabulary)
    np.testing.assert_array_equal(read.table_VP[shared["token"].iloc[0]], [2, 0])
    assert read.n_known == 2


def test_shuffling_keeps_the_vectors_and_who_is_known(table):
    mixed = table.shuffled(3)
    np.testing.assert_array_equal(mixed.present_V, table.present_V)
    assert not mixed.table_VP[~mixed.present_V].any()
    for each in (mixed, table):
        assert each.table_VP.shape == table.table_VP.shape

    def rows(one):
        return sorted(map(tuple, one.table_VP[one.present_V].tolist()))

    assert rows(mixed) == rows(table)
    moved = (mixed.table_VP != table.table_VP).any(1)[table.present_V]
    assert moved.mean() > 0.9
    np.testing.assert_array_equal(mixed.table_VP, table.shuffled(3).table_VP)
    assert (table.shuffled(4).table_VP != mixed.table_VP).any()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{0}\t1\t2\n{1}\t1\n", "1 values where earlier rows have 2"),
        ("{0}\t1\tx\n", "Every row is a gene id and numbers"),
        ("{0}\t1\tnan\n", "not finite"),
        ("NOBODY\t1\t2\n", "for none of the vocabulary's"),
        ("{0}\n", "for none of the vocabulary's"),
    ],
)
def test_bad_tables_are_refused(vocabulary, tmp_path, row, said):
    (tmp_path / "a.tsv").write_text(row.format(*vocabulary.genes["ensembl_id"]))
    with pytest.raises(DataError, match=said):
        KnowledgeTable.read(tmp_path / "a.tsv", vocabulary)


def test_a_cut_off_gzip_file_is_refused(table, vocabulary, tmp_path):
    table.write(tmp_path / "a.tsv.gz", vocabulary)
    data = (tmp_path / "a.tsv.gz").read_bytes()
    (tmp_path / "a.tsv.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged or cut-off gzip"):
        KnowledgeTable.read(tmp_path / "a.tsv.gz", vocabulary)
    assert gzip.decompress(data)


def test_tables_are_found_by_name_and_by_path(tmp_path):
    folder = tmp_path / "knowledge"
    folder.mkdir()
    for name in ("family.tsv.gz", "grn.tsv", "notes.md"):
        (folder / name).touch()
    own = tmp_path / "mine.v2.tsv"
    own.touch()
    assert tables_in(folder) == ["family", "grn"]
    found = find_tables(("grn", "family", str(own)), folder)
    assert list(found) == ["grn", "family", "mine"]
    assert found["family"] == folder / "family.tsv.gz"
    with pytest.raises(ConfigError, match=r"no table 'famly': did you mean 'family'\?"):
        find_tables(("famly",), folder)
    with pytest.raises(ConfigError, match="holds none"):
        find_tables(("family",), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="would both be called 'grn'"):
        find_tables(("grn", str(folder / "grn.tsv")), folder)
