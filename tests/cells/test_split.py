import numpy as np
import pytest

from genemodel.cells.corpus import Corpus
from genemodel.cells.split import split_cells
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
    train, held = split_cells(corpus, by=by, holdout=share, seed=seed)
    np.testing.assert_array_equal(np.sort(np.r_[train, held]), np.arange(len(corpus)))
    assert train.size and held.size and (np.diff(train) > 0).all() and (np.diff(held) > 0).all()
    columns = ("dataset", by) if by in ("donor", "batch") else (by,)
    codes = groups(corpus, *columns)
    assert not set(codes[train]) & set(codes[held])
    again = split_cells(corpus, by=by, holdout=share, seed=seed)
    np.testing.assert_array_equal(again[1], held)


def test_the_share_is_one_of_groups_and_at_least_one(corpus):
    codes = groups(corpus, "dataset", "donor")
    n = len(np.unique(codes[codes >= 0]))
    for share, expected in ((0.01, 1), (0.5, round(0.5 * n)), (0.999, n - 1)):
        _, held = split_cells(corpus, by="donor", holdout=share)
        assert len(np.unique(codes[held])) == expected


def test_another_seed_holds_out_other_groups(corpus):
    chosen = {tuple(split_cells(corpus, holdout=0.3, seed=s)[1]) for s in range(8)}
    assert len(chosen) > 1


def test_donors_of_different_data_sets_are_different_donors(corpus):
    dataset = groups(corpus, "dataset")
    _, held = split_cells(corpus, by="donor", holdout=["a / donor1"])
    assert set(dataset[held]) == {0}
    _, held = split_cells(corpus, by="donor", holdout=["donor1"])
    assert set(dataset[held]) == {0, 1}


def test_cells_of_unknown_donor_are_trained_on(corpus):
    codes = groups(corpus, "dataset", "donor")
    train, held = split_cells(corpus, holdout=0.9)
    assert (codes[held] >= 0).all() and (codes == -1).sum() == 30
    assert np.isin(np.flatnonzero(codes == -1), train).all()


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
        _, held = split_cells(corpus, holdout=k / len(names))
        seen += sorted({names[i] for i in np.unique(codes[held])} - set(seen))
    return seen


def test_refusals_name_what_is_there(corpus):
    with pytest.raises(DataError, match=r"by tissue, which has one group only \(blood\).*dataset"):
        split_cells(corpus, by="tissue")
    with pytest.raises(DataError, match=r"assay, which is missing in every source.*donor \(\d+ gr"):
        split_cells(corpus, by="assay")
    with pytest.raises(ConfigError, match="no column 'doner'.*Did you mean 'donor'"):
        split_cells(corpus, by="doner")
    with pytest.raises(ConfigError, match="no dataset 'x' in the corpus; it has a, b, c"):
        split_cells(corpus, by="dataset", holdout=["x"])
    with pytest.raises(ConfigError, match="names all 3 groups of dataset"):
        split_cells(corpus, by="dataset", holdout=["a", "b", "c"])
    with pytest.raises(ConfigError, match="empty list"):
        split_cells(corpus, by="dataset", holdout=[])
    for share in (0.0, 1.0, 7):
        with pytest.raises(ConfigError, match="no share of the groups"):
            split_cells(corpus, holdout=share)
    with pytest.raises(ConfigError, match="give a list of groups"):
        split_cells(corpus, by="dataset", holdout="a")
