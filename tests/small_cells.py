"""Small vocabularies and cells: fixtures of the tests of cells, corpora and micro-batches."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.genes.vocabulary import GeneVocabulary

N_GENES = 260


@pytest.fixture(scope="session")
def vocabulary():
    """About 300 human and mouse genes, most of them shared, some mitochondrial."""
    genes = GeneVocabulary.builtin().genes
    human = genes[genes["species"] == "human"]
    mito = human["symbol"].str.startswith("MT-")
    human = pd.concat([human[~mito].iloc[:N_GENES], human[mito]]).sort_values("token")
    place = {token: i + 3 for i, token in enumerate(human["token"])}
    mouse = genes[(genes["species"] == "mouse") & genes["token"].isin(list(place))]
    rows = pd.concat([human, mouse])
    rows = rows.assign(token=rows["token"].map(place))
    return GeneVocabulary(rows)


@pytest.fixture(scope="session")
def other_vocabulary(vocabulary):
    """A vocabulary that lacks the last gene of another."""
    rows = vocabulary.genes
    return GeneVocabulary(rows[rows["token"] < len(vocabulary) - 1])


@pytest.fixture(scope="session")
def make_cells(vocabulary):
    """``make_cells(n, species=..., seed=...)``: an AnnData of raw counts of vocabulary genes."""

    def make(n=60, *, species="human", seed=0, n_donors=3, n_genes=200, depth=0.4, dataset=None):
        rng = np.random.default_rng(seed)
        genes = vocabulary.genes
        names = genes["ensembl_id"][genes["species"] == species].to_numpy()
        names = rng.permutation(names)[: min(n_genes, len(names))]
        rate = rng.gamma(0.6, 1.5, (1, len(names))) * rng.gamma(2, depth, (n, 1))
        counts = rng.poisson(rate)
        counts[:, 0] += 1  # no cell is empty by accident
        obs = pd.DataFrame(
            {
                "species": species,
                "batch": [f"batch{i % 2}" for i in range(n)],
                "donor": [f"donor{i % n_donors}" for i in range(n)],
                "cell_type": rng.choice(["T cell", "B cell"], n),
            },
            index=[f"cell{i}" for i in range(n)],
        )
        if dataset:
            obs["dataset"] = dataset
        var = pd.DataFrame(index=pd.Index(names.astype(str)))
        return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)

    return make
