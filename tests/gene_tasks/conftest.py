"""A small random bundle and cells of its genes."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import Bundle
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings

N_GENES, N_CELLS, CONTEXT = 120, 48, 96


@pytest.fixture(scope="session")
def make_gene_bundle(small_vocabulary):
    """``make_gene_bundle(**shape)``: a bundle of random weights."""

    def make(**shape):
        torch.manual_seed(3)
        settings = ModelSettings(
            **{"layers": 2, "width": 16, "heads": 2, "ffn": 24, "components": 4, **shape}
        )
        model = GeneModel(
            settings, n_tokens=len(small_vocabulary), n_species=len(small_vocabulary.species),
            context=CONTEXT,
        )  # fmt: skip
        medians_V = np.random.default_rng(0).uniform(20, 200, len(small_vocabulary))
        return Bundle(
            model.eval(), small_vocabulary, TokenSettings(CONTEXT, CONTEXT * 16),
            medians_V.astype(np.float32),
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def gene_bundle(make_gene_bundle):
    return make_gene_bundle()


@pytest.fixture(scope="session")
def gene_cells(small_vocabulary):
    """Cells of two types; the first thirty genes are higher in one of them."""
    genes = small_vocabulary.genes
    names = genes[genes["species"] == "human"].iloc[:N_GENES]
    rng = np.random.default_rng(5)
    kind = np.arange(N_CELLS) % 2
    rate = np.tile(rng.gamma(0.8, 1.0, N_GENES) + 0.05, (N_CELLS, 1))
    rate[:, :30] *= np.where(kind == 0, 0.3, 4.0)[:, None]
    counts = rng.poisson(rate * rng.gamma(8, 0.125, (N_CELLS, 1)))
    counts[:, -1] = 0  # a gene that no cell holds
    counts[:, 40] += 1  # and one that all do
    obs = pd.DataFrame(
        {"kind": np.array(["a", "b"])[kind], "species": "human"},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    obs.loc[obs.index[5], "kind"] = np.nan
    return ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)), obs=obs,
        var=pd.DataFrame(
            {"symbol": names["symbol"].to_numpy()}, index=names["ensembl_id"].to_numpy()
        ),
    )  # fmt: skip
