import numpy as np
import pytest

from genemodel.corpus.corpus import Corpus
from genemodel.corpus.split import hold_out, usual_groups
from genemodel.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def corpus(make_cells, vocabulary, tmp_path_factory):
    sources = {name: make_cells(60, seed=i, n_donors=5) for i, name in enumerate(("a", "b", "c"))}
    sources["c"].obs["donor"] = [None, "donor0"] * 30
    for adata in sources.values():
        adata.obs["tissue"] = "blood"
    out = tmp_path_factory.mktemp("split") / "corpus"
    return Corpus.build(sources, out, vocabulary=vocabulary)


def groups(corpus, *columns):
    codes, _ = corpus.codes(*columns)
    return codes


@pytest.mark.parametrize("by", ["donor", "dataset", "cell_type", "batch"])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_is_complete_and_no_group_straddles(corpus, by, share, seed):
    split = hold_out(corpus, by=by, fraction=share, seed=seed)
    train, held = split.train, split.held_out
    np.testing.assert_array_equal(np.sort(np.r_[train, held]), np.arange(len(corpus)))
    assert train.size and held.size and (np.diff(train) > 0).all() and (np.diff(held) > 0).all()
    columns = ("dataset", by) if by in ("donor", "batch") else (by,)
    codes = groups(corpus, *columns)
    assert not set(codes[train]) & set(codes[held])
    again = hold_out(corpus, by=by, fraction=share, seed=seed)
    np.testing.assert_array_equal(again.held_out, held)


def test_the_share_is_one_of_cells_and_at_least_one_group(corpus):
    codes = groups(corpus, "dataset", "donor")
    for share, expected in ((0.01, 12), (0.2, 36), (0.5, 90)):
        split = hold_out(corpus, by="donor", fraction=share)
        assert abs(split.held_out.size - expected) <= 12  # nobody can do better than whole groups
        assert len(split.groups) == len(np.unique(codes[split.held_out])) >= 1
    split = hold_out(corpus, by="donor", fraction=0.999)
    assert len(set(codes[split.train]) - {-1}) == 1  # one group stays


def uneven(make_cells, sizes, **options):
    """One data set whose donors have the given numbers of cells."""
    adata = make_cells(sum(sizes.values()), **options)
    adata.obs["donor"] = np.repeat(list(sizes), list(sizes.values()))
    return adata


@pytest.mark.parametrize("seed", range(6))
def test_a_giant_is_not_drawn_for_a_small_share_whatever_the_order(
    seed, make_cells, vocabulary, tmp_path
):
    sizes = {"giant": 160, **{f"d{i}": 10 for i in range(4)}}
    corpus = Corpus.build({"a": uneven(make_cells, sizes)}, tmp_path / "c", vocabulary=vocabulary)
    split = hold_out(corpus, fraction=0.1, seed=seed)
    assert split.held_out.size == 20 and "a / giant" not in split.groups


def test_every_species_that_can_is_held_out_and_none_disappears(
    make_cells, vocabulary, tmp_path, caplog
):
    cells = {
        "h": uneven(make_cells, {f"d{i}": 10 for i in range(20)}),
        "m": uneven(make_cells, {"big": 50, "small": 30}, species="mouse", seed=2),
    }
    corpus = Corpus.build(cells, tmp_path / "c", vocabulary=vocabulary)
    species, names = corpus.codes("species")
    split = hold_out(corpus, fraction=0.1)
    held = {n: int((species[split.held_out] == i).sum()) for i, n in enumerate(names)}
    assert held == {"human": 20, "mouse": 30}  # mouse: the smaller of its two
    assert "m / small" in split.groups and list(split.groups) == sorted(split.groups)
    assert split.describe().startswith("230 cells to train on, 50 (17.9%) held out: h / d")
    cells["m"].obs["donor"] = "only"
    corpus = Corpus.build(cells, tmp_path / "one", vocabulary=vocabulary)
    split = hold_out(corpus, fraction=0.4)
    assert split.held_out.size == 80
    assert "No cell of mouse is held out: its 80 cells are not of several groups" in caplog.text
    with pytest.raises(DataError, match=r"each group is the only one of a species \(h, m\).*donor"):
        hold_out(corpus, by="dataset")
    assert usual_groups(corpus) == "donor"


def test_a_large_hold_out_warns_with_numbers_and_what_to_set(
    make_cells, vocabulary, tmp_path, caplog
):
    sizes = {"x": 55, "y": 45}
    corpus = Corpus.build({"a": uneven(make_cells, sizes)}, tmp_path / "c", vocabulary=vocabulary)
    hold_out(corpus, fraction=0.1)
    assert "45 % of the cells (45 of 100) are held out by donor" in caplog.text
    assert "a / y (45 cells). Set holdout.groups" in caplog.text
    assert "holdout.fraction" in caplog.text and "holdout.by" in caplog.text
    caplog.clear()
    hold_out(corpus, groups=["x"])
    assert "a / x (55 cells)" in caplog.text


def test_no_warning_for_an_ordinary_hold_out(corpus, caplog):
    hold_out(corpus, fraction=0.2)
    assert not caplog.records


def test_another_seed_holds_out_other_groups(corpus):
    chosen = {tuple(hold_out(corpus, fraction=0.3, seed=s).held_out) for s in range(8)}
    assert len(chosen) > 1


def test_donors_of_different_data_sets_are_different_donors(corpus):
    dataset = groups(corpus, "dataset")
    held = hold_out(corpus, by="donor", groups=["a / donor1"]).held_out
    assert set(dataset[held]) == {0}
    held = hold_out(corpus, by="donor", groups=["donor1"]).held_out
    assert set(dataset[held]) == {0, 1}


def test_cells_of_unknown_donor_are_trained_on(corpus):
    codes = groups(corpus, "dataset", "donor")
    split = hold_out(corpus, fraction=0.9)
    assert (codes[split.held_out] >= 0).all() and (codes == -1).sum() == 30
    assert np.isin(np.flatnonzero(codes == -1), split.train).all()


def test_neither_order_nor_company_changes_which_group_goes_first(make_cells, vocabulary, tmp_path):
    one = {"a": make_cells(60, n_donors=6)}
    other = {"b": make_cells(60, n_donors=6, seed=2)}
    first = _ranked(Corpus.build(one, tmp_path / "1", vocabulary=vocabulary))
    both = _ranked(Corpus.build(other | one, tmp_path / "2", vocabulary=vocabulary))
    mine = [name for name in both if name.startswith("a /")]
    assert len(first) == 5 and mine[:5] == first  # one group is always left to train on


def _ranked(corpus):
    """Groups in the order in which growing shares hold them out."""
    codes, names = corpus.codes("dataset", "donor")
    seen: list[str] = []
    for k in range(1, len(names)):
        held = hold_out(corpus, fraction=k / len(names)).held_out
        seen += sorted({names[i] for i in np.unique(codes[held])} - set(seen))
    return seen


def test_refusals_name_what_is_there(corpus):
    with pytest.raises(DataError, match=r"by tissue, which has one group only \(blood\).*dataset"):
        hold_out(corpus, by="tissue")
    missing = r"assay, which is missing in every source\. Hold out by .*donor \(\d+ groups\)"
    with pytest.raises(DataError, match=missing + r".*or nothing.*holdout\.by=.*holdout=auto"):
        hold_out(corpus, by="assay")
    with pytest.raises(ConfigError, match="no column 'doner'.*Did you mean 'donor'"):
        hold_out(corpus, by="doner")
    with pytest.raises(ConfigError, match=r"holdout.groups: there is no dataset 'x'.* a, b, c"):
        hold_out(corpus, by="dataset", groups=["x"])
    with pytest.raises(ConfigError, match="names all 3 groups of dataset"):
        hold_out(corpus, by="dataset", groups=["a", "b", "c"])
    for share in (0.0, 1.0, 7):
        with pytest.raises(ConfigError, match="no share of the cells"):
            hold_out(corpus, fraction=share)
    with pytest.raises(ConfigError, match="give a list of groups"):
        hold_out(corpus, by="dataset", groups="a")
