"""Where the latent starts with few cells, and how much of it the vectors of a model make."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from genemodel.expression.normalise import log_normalised
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.linear_start import SPREAD, linear_start, vector_share
from genemodel.integration.training import _Plan, train_integration

N_GENES = 60


@pytest.fixture(scope="module")
def drawn():
    """120 cells of three types in two batches, shallow; and the types' true profiles."""
    rng = np.random.default_rng(0)
    type_C, batch_C = rng.integers(0, 3, 120), rng.integers(0, 2, 120)
    profile_TG = rng.gamma(1.0, 1.0, (3, N_GENES)) + 0.05
    truth_CG = profile_TG[type_C] / profile_TG[type_C].sum(1, keepdims=True)
    chemistry_BG = np.ones((2, N_GENES))
    chemistry_BG[1, :10] = 6.0
    rate_CG = truth_CG * chemistry_BG[batch_C]
    counts_CG = rng.poisson(80 * rate_CG / rate_CG.sum(1, keepdims=True)).astype(np.float32)
    return sp.csr_matrix(counts_CG), batch_C, truth_CG, type_C


def test_components_are_of_the_cells_of_a_batch_and_of_one_size(drawn):
    counts_CG, batch_C, _, _ = drawn
    value_CG = log_normalised(counts_CG).toarray()
    value_CG = value_CG - value_CG.mean(0)
    shifted_CG = value_CG.copy()
    shifted_CG[batch_C == 1] += np.random.default_rng(1).normal(0, 5, N_GENES)
    start = linear_start(value_CG, batch_C, 4, seed=0)
    assert start.gene_KG.shape == (4, N_GENES)
    score_CK = value_CG @ start.gene_KG.T
    assert score_CK.std(0).max() == pytest.approx(SPREAD, rel=1e-4)
    # A shift of a whole batch is no direction: the axes are the same, to a sign.
    of_shifted = linear_start(shifted_CG, batch_C, 4, seed=0).gene_KG
    for mine, other in zip(start.gene_KG, of_shifted, strict=True):
        cosine = mine @ other / np.linalg.norm(mine) / np.linalg.norm(other)
        assert abs(cosine) == pytest.approx(1, abs=1e-4)


def test_fewer_components_than_asked_for_leave_the_rest_at_zero(drawn):
    counts_CG, batch_C, _, _ = drawn
    few = log_normalised(counts_CG[:, :3]).toarray()
    assert linear_start(few - few.mean(0), batch_C, 10, seed=0).gene_KG.shape == (3, 3)


def test_vectors_take_the_share_that_tells_unseen_molecules(drawn):
    counts_CG, batch_C, truth_CG, _ = drawn
    noise_CF = np.random.default_rng(2).normal(size=truth_CG.shape)

    def share(vector_CF):
        seen = []

        def make(row_R, counts_RV):
            seen.append(counts_RV)
            return vector_CF[row_R]

        found = vector_share(counts_CG, np.arange(N_GENES), batch_C, make, 5, seed=0)
        (half,) = seen  # asked once, of about half of the molecules
        assert 0.45 < half.sum() / counts_CG.sum() < 0.55
        return found

    assert share(noise_CF) == 0.0
    assert share(np.log(truth_CG)) > 0
    assert share(np.full_like(truth_CG, np.nan)) == 0.0


def test_the_latent_starts_at_the_components_and_takes_few_passes(drawn):
    counts_CG, batch_C, _, _ = drawn
    data = TrainingCells.held(counts_CG, batch_C)
    settings = IntegrationSettings(hidden=16, rank=8, latent=4)
    plan = _Plan(data, settings, None, None, None, None, 0, HeadRun())
    assert plan.steps == 10  # 120 cells in one step, each ten times
    built = plan.build().model, plan.build().objectives
    latent_CD = plan.encode(plan.build(), torch.device("cpu"))
    value_CG = log_normalised(counts_CG).toarray()
    wanted_CD = (value_CG - value_CG.mean(0)) @ plan.start.gene_KG.T
    # What is clamped at six deviations is of rare genes.
    assert np.corrcoef(latent_CD.ravel(), wanted_CD.ravel())[0, 1] > 0.99
    trained = [p for p in built[0].parameters() if p.requires_grad]
    assert all(p is not built[0].components.gene_KG for p in trained)
    many = _Plan(
        data, IntegrationSettings(few_cells=0), None, None, None, None, 0, HeadRun()
    )  # fmt: skip
    assert many.steps == 1000 and many.build().model.components is None


def test_vectors_of_a_model_take_part_where_it_knows_the_cells(drawn):
    counts_CG, batch_C, truth_CG, _ = drawn
    data = TrainingCells.held(counts_CG, batch_C)
    settings = IntegrationSettings(hidden=16, rank=8, latent=4)
    vectors_NF = np.log(truth_CG).astype(np.float32)
    found = train_integration(
        data, settings=settings, vectors_NF=vectors_NF,
        makes_vectors=lambda row_R, _: vectors_NF[row_R],
    )  # fmt: skip
    assert found.start is not None and found.start.share > 0
    assert np.abs(found.start.feature_KF).sum() > 0
    kept = found.net.encoder.components.feature_KF
    np.testing.assert_array_equal(kept, found.start.feature_KF)
