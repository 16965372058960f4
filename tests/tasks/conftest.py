"""A model and objectives whose weights are away from their starts, where nothing is zero."""

import numpy as np
import pytest
import torch

from genemodel.cells.statistics import GeneStatistics
from genemodel.genes.vocabulary import N_SPECIAL
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings
from genemodel.tasks.pretraining import PretrainingObjectives, PretrainingSettings

N_TOKENS = 203


@pytest.fixture(scope="session")
def away():
    """``away(**shape)``: backbone and objectives for the cells of ``pack_random``."""

    def make(**shape):
        rng = np.random.default_rng(0)
        present = np.ones((2, N_TOKENS), bool)
        present[:, :N_SPECIAL] = False
        statistics = GeneStatistics(
            frequency_SV=rng.dirichlet(np.ones(N_TOKENS), 2),
            mean_value_SV=rng.uniform(1, 5, (2, N_TOKENS)),
            rate_SV=rng.dirichlet(np.ones(N_TOKENS), 2),
            dispersion_V=rng.uniform(0.5, 3, N_TOKENS),
            present_SV=present,
        )
        measured = torch.ones(1, N_TOKENS, dtype=torch.bool)
        measured[:, :N_SPECIAL] = False
        torch.manual_seed(0)
        task = PretrainingObjectives(
            PretrainingSettings(), width=32, statistics=statistics, n_batches=2,
            measured_XV=measured, seed=0,
        )  # fmt: skip
        shape = {"layers": 2, "width": 32, "heads": 2, "ffn": 48, "components": 6, **shape}
        model = GeneModel(ModelSettings(**shape), n_tokens=N_TOKENS, n_species=2, context=128)
        with torch.no_grad():
            for weight in (*task.parameters(), *model.parameters()):
                weight.add_(0.05 * torch.randn_like(weight))
        return model, task

    return make
