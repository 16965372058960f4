"""Embedding on a device against the CPU."""

import numpy as np
import pytest

import genemodel as gm
from genemodel.bundle.bundle import Bundle
from genemodel.simulation.cells import synthetic


@pytest.fixture(scope="module")
def cells():
    return synthetic(300, species=("human",), n_genes=800, genes_per_cell=150, seed=3)["human"]


def vectors(adata, model, **options):
    adata = adata.copy()
    gm.embed(adata, model, **options)
    return adata.obsm["X_genemodel"]


def test_vectors_are_those_of_the_cpu(random_bundle, cells, device, tmp_path):
    random_bundle.save(tmp_path / "bundle")
    there = Bundle.load(tmp_path / "bundle", device=device)
    assert there.device.type == device.type
    wanted = vectors(cells, random_bundle)
    found = vectors(cells, there)
    # bf16 on a GPU: eight bits of mantissa.
    similarity = (found * wanted).sum(1) / np.linalg.norm(found, axis=1)
    similarity /= np.linalg.norm(wanted, axis=1)
    assert similarity.min() > 0.999
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    spread = np.linalg.norm(wanted - wanted.mean(0), axis=1).mean()
    assert np.linalg.norm(found - wanted, axis=1).mean() < 0.05 * spread  # cells differ by more


def test_the_size_of_a_batch_changes_no_more_than_rounding(random_bundle, cells, device, tmp_path):
    random_bundle.save(tmp_path / "bundle")
    there = Bundle.load(tmp_path / "bundle", device=device)
    whole = vectors(cells, there)
    for batch_size in (1, 50):
        np.testing.assert_allclose(
            vectors(cells[:50], there, batch_size=batch_size), whole[:50], rtol=0.02, atol=0.02
        )
