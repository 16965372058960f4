"""Arrays that the processes of a node share: written once, never wrong, never needed."""

import logging
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from genemodel.batches.loader import CellStream
from genemodel.batches.tokens import TokenSettings
from genemodel.corpus import mapped
from genemodel.corpus.corpus import Corpus
from genemodel.corpus.mapped import mapped_once, shared


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the files lie; every array is large enough for one."""
    monkeypatch.setattr(mapped, "MAPPED_FROM", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    return tmp_path / "node"


def is_mapped(values):
    while values is not None and not isinstance(values, np.memmap):
        values = values.base
    return values is not None


def make(calls, n=1000):
    def parts():
        calls.append(1)
        yield np.arange(n // 2)
        yield np.arange(n // 2, n)

    return parts


def test_the_first_to_ask_writes_and_all_others_map(folder):
    calls = []
    first = mapped_once("key", "library", 1000, np.int64, make(calls))
    again = mapped_once("key", "library", 1000, np.int64, make(calls))
    assert calls == [1] and is_mapped(first) and is_mapped(again)
    np.testing.assert_array_equal(first, np.arange(1000))
    np.testing.assert_array_equal(again, first)
    mapped_once("other", "library", 1000, np.int64, make(calls))
    assert len(calls) == 2
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("keep", [0, 60, 4000])
def test_a_file_that_was_cut_off_is_made_again(folder, keep):
    mapped_once("key", "library", 1000, np.int64, make([]))
    (path,) = folder.rglob("*.npy")
    path.write_bytes(path.read_bytes()[:keep])
    calls = []
    np.testing.assert_array_equal(
        mapped_once("key", "library", 1000, np.int64, make(calls)), np.arange(1000)
    )
    assert calls == [1]


def test_another_type_or_size_is_made_again(folder):
    mapped_once("key", "library", 1000, np.int64, make([]))
    assert mapped_once("key", "library", 1000, np.int32, make([])).dtype == np.int32
    assert mapped_once("key", "library", 500, np.int32, make([], 500)).size == 500


def test_where_no_file_can_be_written_the_process_holds_its_own(folder, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "_write", full)
    with caplog.at_level(logging.WARNING):
        found = mapped_once("key", "library", 1000, np.int64, make([]))
    assert not is_mapped(found)
    np.testing.assert_array_equal(found, np.arange(1000))
    assert "No space left" in caplog.text and "TMPDIR" in caplog.text


def test_a_folder_that_others_can_write_to_is_not_trusted(folder, caplog):
    mapped._folder().chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert not is_mapped(mapped_once("key", "library", 1000, np.int64, make([])))
    assert "can be written by others" in caplog.text


def test_processes_that_ask_at_once_make_it_once(folder):
    code = f"""
import sys, tempfile, time
import numpy as np
from genemodel.corpus import mapped
mapped.MAPPED_FROM = 1
tempfile.tempdir = {str(folder)!r}
def parts():
    print("made", flush=True)
    for i in range(10):
        time.sleep(0.02)
        yield np.arange(i * 100, (i + 1) * 100)
sys.stdin.readline()
found = mapped.mapped_once("key", "library", 1000, np.int64, parts)
assert (found == np.arange(1000)).all()
print("right", flush=True)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert all("right" in text for text in said)
    assert sum(text.count("made") for text in said) == 1


def test_equal_values_are_shared_and_others_are_not(folder, monkeypatch):
    values = np.arange(5000) * 3
    a, b = shared(values), shared(values.copy())
    assert is_mapped(a) and is_mapped(b)
    np.testing.assert_array_equal(a, values)
    shared(values + 1)
    shared(values.astype(np.int32))
    assert len(list(folder.rglob("*.npy"))) == 3
    monkeypatch.setattr(mapped, "MAPPED_FROM", 10_000)
    assert shared(values) is values


def test_a_corpus_hands_out_its_labels_from_files_outside_of_it(
    folder, make_cells, vocabulary, tmp_path
):
    Corpus.build(
        {"h": make_cells(50, seed=1), "m": make_cells(40, seed=2, species="mouse")},
        tmp_path / "corpus", vocabulary=vocabulary, species="obs:species", chunk_cells=30,
    )  # fmt: skip
    before = sorted(tmp_path.joinpath("corpus").rglob("*"))
    corpus = Corpus.open(tmp_path / "corpus")
    codes, names = corpus.codes("species")
    species = [list(vocabulary.species).index(names[code]) for code in codes]
    for name, wanted in (
        ("library", corpus.library_C), ("n_genes", corpus.n_genes_C),
        ("source", corpus.source_C), ("species", species),
    ):  # fmt: skip
        assert is_mapped(corpus.label(name))
        np.testing.assert_array_equal(corpus.label(name), wanted)
    stream = CellStream(
        corpus, np.arange(90), TokenSettings(64, 512), seed=0, endless=False,
        inverse_median_V=np.ones(len(vocabulary), np.float32),
    )  # fmt: skip
    for batch, _ in stream:
        cells = batch.cell_C[: batch.n_cells].numpy()
        np.testing.assert_array_equal(batch.library_C[: batch.n_cells], corpus.library_C[cells])
        np.testing.assert_array_equal(batch.species_C[: batch.n_cells], np.array(species)[cells])
    # Reading needs where every cell's counts begin: that is shared as well.
    assert {path.stem for path in folder.rglob("*.npy")} >= {"library", "species", "starts"}
    assert sorted(tmp_path.joinpath("corpus").rglob("*")) == before
