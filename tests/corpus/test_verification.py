import json
import shutil

import numpy as np
import pytest

from genemodel.corpus.corpus import Corpus, verify_corpus
from genemodel.corpus.manifest import Manifest, file_record, write_manifest
from genemodel.errors import DataError

COUNTS = "cells.zarr/dataset_0/X/data/c/0"
GENES = "cells.zarr/dataset_0/X/indices/c/0"
OBJECTS = {
    "counts": COUNTS,
    "genes": GENES,
    "row pointers": "cells.zarr/dataset_0/X/indptr/c/0",
    "obs": "cells.zarr/dataset_0/obs/donor/codes/c/0",
    "array metadata": "cells.zarr/dataset_0/X/data/zarr.json",
    "group metadata": "cells.zarr/dataset_0/zarr.json",
    "per-cell index": "index/dataset_0.npz",
    "vocabulary": "vocabulary.tsv.gz",
    "statistics": "statistics.0.npz",
    "histograms": "medians.0.npz",
    "manifest": "manifest.json",
}


@pytest.fixture(scope="module")
def whole(make_cells, vocabulary, tmp_path_factory):
    out = tmp_path_factory.mktemp("verify") / "corpus"
    cells = {"a": make_cells(40), "b": make_cells(20, species="mouse", seed=2)}
    return Corpus.build(cells, out, vocabulary=vocabulary).path


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "corpus")


def remove(path):
    path.unlink()


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def test_a_whole_corpus_has_no_fault(whole):
    assert verify_corpus(whole) == [] == Corpus.open(whole).verify()


@pytest.mark.parametrize("damage", [remove, truncate, empty, flip])
@pytest.mark.parametrize("name", OBJECTS)
def test_damage_of_any_object_is_named(name, damage, copy):
    damage(copy / OBJECTS[name])
    problems = verify_corpus(copy)
    assert problems and OBJECTS[name] in problems[0]
    cut = "truncated|damaged"
    expected = {remove: "missing|no manifest", truncate: cut, empty: cut, flip: "changed|damaged"}
    pattern = expected[damage]
    assert any(word in problems[0] for word in pattern.split("|"))


@pytest.mark.parametrize("damage", [remove, truncate, empty])
@pytest.mark.parametrize("name", OBJECTS)
def test_opening_refuses_what_is_missing_or_cut_off(name, damage, copy):
    damage(copy / OBJECTS[name])
    with pytest.raises(DataError, match=r"corpus"):
        Corpus.open(copy)


@pytest.mark.parametrize("name", [COUNTS, GENES])
@pytest.mark.parametrize("damage", [remove, truncate, empty, flip])
def test_no_damage_under_an_open_corpus_reads_as_counts(name, damage, copy):
    corpus = Corpus.open(copy)
    assert len(corpus) == 60  # the index is there, the counts have not been touched yet
    damage(copy / name)
    with pytest.raises(DataError, match=f"{name} is damaged: .*verify"):
        corpus.read(0, 40)


@pytest.mark.parametrize(
    ("before", "after"),
    [('"typesize"', '"t}pesize"'), ('"endian"', '"endiAn"'), ('"shuffle"', '"shuffld"')],
)
def test_metadata_of_other_names_is_refused(before, after, copy):
    file = copy / "cells.zarr/dataset_0/X/data/zarr.json"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    with pytest.raises(DataError, match="dataset_0: cannot be read.*damaged"):
        Corpus.open(copy).read(0, 40)


def test_every_byte_of_the_counts_is_guarded_when_read(copy):
    data = (copy / COUNTS).read_bytes()
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    for place in np.random.default_rng(0).choice(used, 60, replace=False):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        (copy / COUNTS).write_bytes(broken)
        with pytest.raises(DataError, match="is damaged"):
            Corpus.open(copy).read(0, 40)


def test_several_faults_are_all_listed(copy):
    remove(copy / COUNTS)
    flip(copy / "index/dataset_1.npz")
    (copy / "notes.txt").write_text("mine")
    (copy / "append.partial").mkdir()
    (copy / "append.partial" / "x").write_text("")
    problems = "\n".join(verify_corpus(copy))
    assert f"{COUNTS}: missing" in problems
    assert "index/dataset_1.npz: changed" in problems
    assert "notes.txt: unlisted" in problems
    assert "append.partial/x: left by an interrupted append" in problems


def resealed(copy, **values):
    """Write the manifest again with right checksums, as a careless script might."""
    old = Manifest.read(copy)
    objects = {name: file_record(copy / name) for name in old.objects}
    parts = {k: v for k, v in vars(old).items() if k != "fingerprint"}
    write_manifest(copy, Manifest(**(parts | {"objects": objects} | values)))


def rewritten(path, key, change):
    with np.load(path) as stored:
        arrays = {k: stored[k] for k in stored.files}
    arrays[key] = change(arrays[key])
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("name", "key", "what"),
    [
        ("statistics.0.npz", "human/sum_V", "statistics.0.npz: sums of human do not fit"),
        ("statistics.0.npz", "mouse/nonzero_V", "statistics.0.npz: sums of mouse do not fit"),
        ("index/dataset_1.npz", "library", "index/dataset_1.npz: library does not fit"),
        ("index/dataset_0.npz", "checksum", "index/dataset_0.npz: checksum does not fit"),
        ("index/dataset_1.npz", "prints", "index/dataset_1.npz: prints does not fit"),
    ],
)
def test_statistics_that_do_not_fit_the_counts(name, key, what, copy):
    rewritten(copy / name, key, lambda values: values + 1)
    resealed(copy)
    assert what in verify_corpus(copy)[0]
    assert verify_corpus(copy, contents=False) == []


def test_a_manifest_that_contradicts_itself(copy):
    resealed(copy, n_cells=61)
    assert "says 61 cells, its groups have 60, its sources 60" in verify_corpus(copy)[0]


def test_an_edited_manifest_is_refused(copy):
    file = copy / "manifest.json"
    values = json.loads(file.read_text())
    values["sources"][0]["n_cells"] = 4_000_000
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match="was changed after it was written"):
        Corpus.open(copy)


def test_a_manifest_with_the_same_values_in_other_bytes(copy):
    file = copy / "manifest.json"
    file.write_bytes(file.read_bytes()[:-1])  # the end of the last line
    assert Corpus.open(copy).fingerprint
    assert verify_corpus(copy) == [
        "manifest.json: changed: its values are those that were written, its bytes are not"
    ]


def test_a_vocabulary_of_another_corpus(copy, other_vocabulary):
    other_vocabulary.save(copy / "vocabulary.tsv.gz")
    resealed(copy)
    with pytest.raises(DataError, match="not the vocabulary that the corpus was built with"):
        Corpus.open(copy)
    assert "not the vocabulary" in verify_corpus(copy)[0]


def test_a_folder_that_is_no_corpus(tmp_path):
    assert "has no manifest.json" in verify_corpus(tmp_path)[0]
    assert "does not exist" in verify_corpus(tmp_path / "x")[0]
