"""The generated data behave like counts, know their truth, and depend on nothing but their seed."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import NearestNeighbors

from genemodel.errors import ConfigError
from genemodel.genes import GeneVocabulary
from genemodel.simulation import kernels as kernels
from genemodel.simulation.cells import SyntheticWorld, synthetic, synthetic_chunks

COLUMNS = ["cell_type", "batch", "donor", "dataset", "species", "assay", "tissue"]


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(n_genes=1500, genes_per_cell=300, n_cell_types=6, seed=3)


@pytest.fixture(scope="module")
def cells(world):
    return {name: world.cells(name, 0, 900, with_truth=True) for name in world.species}


def log_pca(adata, n: int = 20) -> np.ndarray:
    X = adata.X.toarray().astype(float)
    X = np.log1p(X / X.sum(axis=1, keepdims=True) * 1e4)
    return PCA(n, random_state=0).fit_transform(X)


def same_label_share(values, label, k: int = 10) -> float:
    index = NearestNeighbors(n_neighbors=k + 1).fit(values).kneighbors(values)[1][:, 1:]
    label = np.asarray(label)
    return float((label[index] == label[:, None]).mean())


def test_ids_are_of_the_vocabulary_and_obs_is_complete(cells):
    genes = GeneVocabulary.builtin().genes
    for name, adata in cells.items():
        known = set(genes.loc[genes["species"] == name, "ensembl_id"])
        assert set(adata.var_names) <= known
        assert adata.var_names.is_unique and adata.obs_names.is_unique
        assert list(adata.obs.columns[:7]) == COLUMNS
        assert (adata.obs["species"] == name).all()
        assert adata.obs.notna().all().all()
        assert adata.obs["batch"].nunique() == 4 and adata.obs["dataset"].nunique() == 2
        assert adata.obs.groupby("batch", observed=True)["donor"].nunique().eq(1).all()


def test_counts_are_counts_and_the_depth_is_as_asked(cells):
    for adata in cells.values():
        X = adata.X
        assert X.dtype == np.int32 and X.has_sorted_indices and X.data.min() >= 1
        X.check_format(full_check=True)
        assert np.diff(X.indptr).mean() == pytest.approx(300, rel=0.08)
        library = np.asarray(X.sum(axis=1)).ravel()
        assert np.log(library).std() > 0.3


def test_expression_is_heavy_tailed_with_ribosomal_and_mitochondrial_genes(cells):
    adata = cells["human"]
    total = np.asarray(adata.X.sum(axis=0)).ravel()
    symbol = adata.var["gene_symbol"]
    assert np.sort(total)[-15:].sum() > 0.1 * total.sum()
    assert 0.02 < total[symbol.str.startswith("MT-")].sum() / total.sum() < 0.15
    assert 0.05 < total[symbol.str.match("RP[LS][0-9]")].sum() / total.sum() < 0.5


def test_variance_exceeds_the_mean_within_a_type_and_batch(cells):
    """One type in one batch: what is left beyond Poisson is noise of the gene itself."""
    adata = cells["human"]
    group = adata.obs.groupby(["batch", "cell_type"], observed=True).size().idxmax()
    part = adata[(adata.obs["batch"] == group[0]) & (adata.obs["cell_type"] == group[1])]
    scale = part.obs["true_library"].to_numpy() / part.obs["true_library"].mean()
    X = part.X.toarray()
    mean, variance = X.mean(axis=0), X.var(axis=0, ddof=1)
    poisson = mean + mean**2 * scale.var()
    loud = mean > 2
    assert loud.sum() > 20
    assert np.median(variance[loud] / poisson[loud]) > 1.3


def test_cell_types_stand_apart_within_a_batch_and_batches_within_a_type(cells):
    adata = cells["human"]
    values = log_pca(adata)
    for batch in adata.obs["batch"].unique():
        here = (adata.obs["batch"] == batch).to_numpy()
        label = adata.obs.loc[here, "cell_type"]
        chance = (label.value_counts(normalize=True) ** 2).sum()
        assert same_label_share(values[here], label) > chance + 0.4
    ratios = []
    for cell_type in adata.obs["cell_type"].unique():
        here = (adata.obs["cell_type"] == cell_type).to_numpy()
        batch = adata.obs.loc[here, "batch"]
        chance = (batch.value_counts(normalize=True) ** 2).sum()
        ratios.append(same_label_share(values[here], batch) / chance)
    assert np.mean(ratios) > 1.5


def test_without_batch_strength_batches_differ_less():
    settings = {"species": ("human",), "n_genes": 800, "genes_per_cell": 150, "n_cell_types": 3}

    def share(strength: float) -> float:
        adata = synthetic(500, batch_strength=strength, **settings)["human"]
        return same_label_share(log_pca(adata, 10), adata.obs["batch"])

    assert share(0.0) < share(1.0) - 0.1


def test_some_batches_lack_a_type_and_every_type_is_somewhere():
    world = SyntheticWorld(n_genes=500, genes_per_cell=80, n_batches=6, missing=0.2)
    table = world.cells("human", 0, 3000).obs.groupby(["batch", "cell_type"], observed=False).size()
    table = table.unstack()
    assert (table == 0).sum().sum() == round(0.2 * 6 * 8)
    assert ((table > 0).sum(axis=0) >= 3).all() and ((table > 0).sum(axis=1) >= 4).all()
    full = SyntheticWorld(n_genes=500, genes_per_cell=80, n_batches=6, missing=0.0)
    assert (full.cells("human", 0, 3000).obs.value_counts(["batch", "cell_type"]) > 0).all()


def test_orthologs_share_programs_across_species(world, cells):
    """A type's specific genes are more alike between species for the same type than for others."""
    profiles = {}
    for name, adata in cells.items():
        X = adata.X.toarray().astype(float)
        X = np.log1p(X / X.sum(axis=1, keepdims=True) * 1e4)
        means = pd.DataFrame(X).groupby(adata.obs["cell_type"].to_numpy()).mean()
        means.columns = world._worlds[name].token_G
        profiles[name] = means - means.mean()
    shared = profiles["human"].columns.intersection(profiles["mouse"].columns)
    assert len(shared) > 1000
    human, mouse = (profiles[name][shared].to_numpy() for name in ("human", "mouse"))
    correlation = np.corrcoef(human, mouse)[: len(human), len(human) :]
    assert (correlation.argmax(axis=1) == np.arange(len(human))).all()
    assert np.diag(correlation).mean() > 0.5
    # And each species has genes of its own.
    assert len(shared) < 0.95 * len(profiles["human"].columns)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(world, cells):
    again = SyntheticWorld(n_genes=1500, genes_per_cell=300, n_cell_types=6, seed=3)
    for name in ("human", "mouse"):
        found = again.cells(name, 0, 900, threads=1)
        assert (found.X != cells[name].X).nnz == 0
        pd.testing.assert_frame_equal(found.obs, cells[name].obs[found.obs.columns])
    other = SyntheticWorld(n_genes=1500, genes_per_cell=300, n_cell_types=6, seed=4)
    assert (other.cells("human", 0, 100).X != cells["human"].X[:100]).nnz > 0


def test_a_species_does_not_depend_on_which_others_are_asked_for():
    settings = {"n_genes": 500, "genes_per_cell": 80}
    alone = SyntheticWorld(species=("mouse",), **settings).cells("mouse", 0, 50)
    both = SyntheticWorld(**settings).cells("mouse", 0, 50)
    assert (alone.X != both.X).nnz == 0


def test_chunks_are_the_very_same_cells(world):
    parts = list(synthetic_chunks(501, 100, world=world))
    assert [p.n_obs for p in parts] == [100, 100, 51, 100, 100, 50]
    assert [p.obs["species"].iloc[0] for p in parts] == ["human"] * 3 + ["mouse"] * 3
    whole = world.cells("human", 0, 251)
    joined = np.concatenate([p.X.toarray() for p in parts[:3]])
    assert (joined == whole.X.toarray()).all()
    assert [n for p in parts[:3] for n in p.obs_names] == list(whole.obs_names)
    assert (world.cells("human", 130, 140).X != whole.X[130:140]).nnz == 0


def test_chunks_need_bounded_memory(world):
    def peak(n: int) -> int:
        tracemalloc.start()
        for part in synthetic_chunks(n, 500, world=world):
            del part
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1000)
    assert peak(10_000) < 1.3 * peak(2000)


def test_truth_is_the_expectation_of_the_counts_without_technical_effects():
    """One batch, no platform effect: the counts average out to the truth, but for ambient RNA."""
    adata = synthetic(
        4000, species=("human",), n_batches=1, n_cell_types=2, n_genes=400, genes_per_cell=150,
        batch_strength=0.0, with_truth=True,
    )["human"]  # fmt: skip
    for cell_type in adata.obs["cell_type"].cat.categories:
        part = adata[adata.obs["cell_type"] == cell_type]
        seen = np.asarray(part.X.mean(axis=0)).ravel()
        true = part.layers["true_rate"].mean(axis=0)
        loud = true > 1
        assert np.corrcoef(np.log(seen[loud]), np.log(true[loud]))[0, 1] > 0.99
        assert np.median(seen[loud] / true[loud]) == pytest.approx(1.0, abs=0.06)
    np.testing.assert_allclose(
        adata.layers["true_rate"].sum(axis=1), adata.obs["true_library"], rtol=1e-3
    )


def test_dropout_takes_more_from_shallow_platforms():
    """Beyond what depth explains, a shallow batch sees a gene less often than a deep one."""
    world = SyntheticWorld(species=("human",), n_genes=1500, genes_per_cell=300, batch_strength=0.0)
    adata = world.cells("human", 0, 2000, with_truth=True)
    size_G = world._worlds["human"].size_G
    detected = {}
    for assay in adata.obs["assay"].cat.categories:
        part = adata[(adata.obs["assay"] == assay).to_numpy()]
        rate = part.layers["true_rate"]
        middle = (rate > 0.3) & (rate < 1.5)
        expected = 1 - (1 + rate / size_G) ** -size_G
        detected[assay] = (part.X.toarray() > 0)[middle].sum() / expected[middle].sum()
    assert detected["10x 3' v2"] < detected["10x 3' v3"] - 0.01 < 1.0


def test_trajectory_is_continuous():
    world = SyntheticWorld(
        n_genes=1000, genes_per_cell=300, trajectory=True, species=("human",), n_batches=1
    )
    adata = world.cells("human", 0, 1500)
    path = adata[adata.obs["pseudotime"].notna().to_numpy()]
    assert path.obs["cell_type"].nunique() == 2
    ends = path.obs.groupby("cell_type", observed=True)["pseudotime"].agg(["min", "max"])
    assert sorted(ends["max"].round(1)) == [0.5, 1.0] and sorted(ends["min"].round(1)) == [0.0, 0.5]
    # Expression tells the place on the path, also within either half and on cells left out.
    counts = path.X.toarray()
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    place = path.obs["pseudotime"].to_numpy()
    guess = cross_val_predict(RidgeCV(np.logspace(1, 5, 9)), values, place)
    assert stats.spearmanr(guess, place)[0] > 0.7
    assert all(
        stats.spearmanr(guess[half], place[half])[0] > 0.3 for half in (place < 0.5, place > 0.5)
    )


@pytest.mark.parametrize("mean", [0.3, 4.0, 9.9, 10.1, 60.0, 800.0])
def test_poisson_draws_follow_the_law(mean):
    state = np.array([12345], np.uint64)
    draws = np.array([kernels._poisson(state, mean) for _ in range(4000)])
    assert draws.mean() == pytest.approx(mean, abs=5 * np.sqrt(mean / 4000))
    assert draws.var() == pytest.approx(mean, rel=0.12)
    edges = np.unique(stats.poisson.ppf([0.1, 0.3, 0.5, 0.7, 0.9], mean))
    for edge in edges:
        expected = stats.poisson.cdf(edge, mean)
        assert (draws <= edge).mean() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("mean", "size"), [(0.05, 2.0), (1.0, 0.5), (5.0, 3.0), (19.0, 4.0)])
def test_clusters_of_poisson_points_are_negative_binomial(mean, size):
    state = np.array([99], np.uint64)
    ratio = mean / size
    draws = np.array(
        [
            sum(kernels._cluster(state, ratio, np.log1p(ratio)) for _ in range(points))
            for points in np.random.default_rng(0).poisson(mean, 6000)
        ]
    )
    law = stats.nbinom(size, size / (size + mean))
    for value in range(int(law.ppf(0.9)) + 1):
        assert (draws <= value).mean() == pytest.approx(law.cdf(value), abs=0.025)


def test_alias_tables_give_back_their_probabilities():
    p = np.random.default_rng(0).dirichlet(np.full(50, 0.3))[None]
    table = np.empty((1, 50, 2), np.uint32)
    kernels.alias_tables(p, table)
    keep = table[0, :, 0] / 2.0**32
    found = keep.copy()
    np.add.at(found, table[0, :, 1], 1 - keep)
    np.testing.assert_allclose(found / 50, p[0], atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"species": ("human", "mous")},
            "species 'mous' is not in the vocabulary, which has human",
        ),
        ({"species": ()}, "species is empty"),
        ({"species": ("human", "human")}, "names one species twice"),
        ({"n_genes": 10**6, "genes_per_cell": 100}, "the vocabulary has .* genes of human"),
        ({"n_genes": 1000, "genes_per_cell": 900}, "Raise n_genes to 1500"),
        ({"n_batches": 0}, "n_batches=0; it must be at least 1"),
        ({"missing": 1.5}, r"missing=1.5 must lie in \[0, 1\)"),
        ({"n_cell_types": 1, "trajectory": True}, "needs n_cell_types of at least 2"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        synthetic(10, **settings)


def test_impossible_sizes_are_refused(world):
    with pytest.raises(ConfigError, match="n_cells=0"):
        synthetic(0)
    with pytest.raises(ConfigError, match="16.0 GB"):
        synthetic(1_000_000, with_truth=True)
    with pytest.raises(ConfigError, match="seed would not be used"):
        next(synthetic_chunks(10, world=world, seed=1))
