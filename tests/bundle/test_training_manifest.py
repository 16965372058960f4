"""What a bundle remembers of its training cells: exact sets, a stated error, a round trip."""

from dataclasses import replace

import numpy as np
import pytest

import genemodel as gm
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.training_manifest import (
    FINGERPRINTS,
    Fingerprints,
    TrainedSource,
    TrainingManifest,
)
from genemodel.corpus.corpus import Corpus
from genemodel.errors import DataError


def drawn(n, seed=0):
    return np.random.default_rng(seed).integers(1, 2**64, n, dtype=np.uint64)


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return Corpus.open(tiny_corpus)


@pytest.fixture(scope="module")
def training(corpus):
    """Of every second cell of two species."""
    return TrainingManifest.of(corpus, np.arange(0, len(corpus), 2))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 1000, 1024, 1025])
@pytest.mark.parametrize("low", [np.uint8, np.uint16, np.uint32])
def test_a_set_gives_back_the_leading_bits_of_all_it_was_given(n, low):
    print_N = drawn(n, seed=n)
    prints = Fingerprints.of(np.random.default_rng(1).permutation(np.repeat(print_N, 2)), low)
    bits = np.uint64(64 - 8 * np.dtype(low).itemsize - int(np.ceil(np.log2(n))))
    np.testing.assert_array_equal(prints.values(), np.sort(print_N) >> bits)
    assert len(prints) == n and prints.find(print_N).all()


def test_an_empty_set_holds_nothing():
    prints = Fingerprints.of(np.zeros(0, np.uint64))
    assert len(prints) == 0 and prints.chance == 0 and not prints.find(drawn(5)).any()


def test_extreme_fingerprints_are_told_from_their_neighbours():
    last = np.uint64(2**64 - 1)
    prints = Fingerprints.of(np.array([1, last], np.uint64))
    found = prints.find(np.array([1, last, 2**63, 2**32], np.uint64))
    assert found.tolist() == [True, True, False, False]


@pytest.mark.parametrize("n", [700, 1024])
def test_foreign_fingerprints_are_found_as_often_as_is_said(n):
    prints = Fingerprints.of(drawn(n), np.uint8)
    share = prints.find(drawn(400_000, seed=1)).mean()
    assert share == pytest.approx(prints.chance, rel=0.1)
    assert 2**-9 < prints.chance <= 2**-8
    assert Fingerprints.of(drawn(n)).chance <= 2**-32
    assert not Fingerprints.of(drawn(n)).find(drawn(400_000, seed=1)).any()


def test_a_cell_takes_about_thirteen_bytes():
    assert Fingerprints.of(drawn(300_000)).nbytes / 100_000 < 13.2


def test_sources_say_what_was_trained_on_and_what_was_not(corpus, training):
    assert [source.species for source in training.sources] == ["human", "mouse"]
    assert training.n_trained == 300 and training.complete
    for s, source in enumerate(training.sources):
        assert source.n_cells == int((corpus.source_C == s).sum()) > source.n_trained
        assert source.name == corpus.sources[s].name and source.corpus == corpus.fingerprint
    print_CP = corpus.prints_CP()
    assert (print_CP > 0).any(1).all()
    for source_prints, s in zip(training.fingerprints, (0, 1), strict=True):
        rows = np.flatnonzero(corpus.source_C == s)
        even = rows % 2 == 0
        usable_CP = print_CP[rows] > 0
        found_CP = source_prints.find(print_CP[rows].ravel()).reshape(-1, print_CP.shape[1])
        assert found_CP[even][usable_CP[even]].all()
        assert not found_CP[~even][usable_CP[~even]].any()


def test_the_checksum_is_of_the_cells_and_not_of_their_order(corpus):
    cells = np.arange(0, len(corpus), 3)
    one, other = (TrainingManifest.of(corpus, order) for order in (cells, cells[::-1]))
    assert one.sources == other.sources
    fewer = TrainingManifest.of(corpus, cells[:-1])
    assert one.sources[0] == fewer.sources[0]
    assert one.sources[1].checksum != fewer.sources[1].checksum


def test_the_start_comes_first_and_the_same_cells_once(training, corpus):
    own = TrainingManifest.of(corpus, np.arange(1, len(corpus), 2))
    both = TrainingManifest.after(training, own)
    assert both.sources == (*training.sources, *own.sources) and both.complete
    assert both.chance == pytest.approx(training.chance + own.chance)
    assert TrainingManifest.after(both, own).sources == both.sources
    # A corpus that was appended to has another fingerprint and the same cells.
    appended = replace(own, sources=tuple(replace(s, corpus="other") for s in own.sources))
    assert TrainingManifest.after(both, appended).sources == both.sources
    assert not TrainingManifest.after(None, own).complete
    assert not TrainingManifest.after(TrainingManifest.after(None, own), training).complete


def test_a_bundle_gives_it_back(random_bundle, training, tmp_path):
    replace(random_bundle, training=training).save(tmp_path / "bundle")
    first = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    loaded = gm.load(tmp_path / "bundle", device="cpu")
    assert loaded.training == training
    for saved, made in zip(loaded.training.fingerprints, training.fingerprints, strict=True):
        np.testing.assert_array_equal(saved.values(), made.values())
    loaded.save(tmp_path / "bundle")
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == first
    # Whoever grows it still knows.
    assert loaded.grown(loaded.vocabulary).training is loaded.training


def test_a_bundle_may_have_been_trained_on_nothing(random_bundle, tmp_path):
    replace(random_bundle, training=TrainingManifest()).save(tmp_path / "bundle")
    loaded = gm.load(tmp_path / "bundle", device="cpu")
    assert loaded.training == TrainingManifest()
    assert "trained on: 0 cells of 0 sources" in loaded.describe()


def test_a_bundle_of_before_says_that_it_does_not_know(random_bundle, tmp_path):
    random_bundle.save(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / FINGERPRINTS).exists()
    loaded = gm.load(tmp_path / "bundle", device="cpu")
    assert loaded.training is None
    assert "trained on: unknown" in loaded.describe()


def test_damage_is_refused(random_bundle, training, tmp_path):
    path = tmp_path / "bundle"
    replace(random_bundle, training=training).save(path)
    whole = (path / FINGERPRINTS).read_bytes()
    (path / FINGERPRINTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"training\.safetensors is damaged"):
        Bundle.load(path)
    (path / FINGERPRINTS).unlink()
    with pytest.raises(DataError, match=r"training\.safetensors is missing"):
        Bundle.load(path)


def test_the_description_names_licences_and_does_not_end_in_a_thousand_lines(training):
    source = training.sources[0]
    cited = replace(source, licence="CC-BY 4.0", citation="Doe et al. 2024")
    assert "licence CC-BY 4.0; Doe et al. 2024" in cited.describe()
    assert "licence not known" in source.describe()
    many = tuple(replace(source, name=f"s{i}") for i in range(1000))
    text = TrainingManifest(many).describe()
    assert len(text.splitlines()) < 25 and "980 more" in text
    assert isinstance(many[0], TrainedSource)
