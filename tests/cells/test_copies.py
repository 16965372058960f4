"""``copy=``, ``random_state=`` and ``verbosity`` as scanpy has them."""

import inspect
import logging

import anndata as ad
import numpy as np
import pytest

import genemodel as gm
from genemodel.cells.copies import may_copy
from genemodel.errors import ConfigError


def test_calls_write_into_a_copy(random_bundle):
    how = {"species": ("human",), "n_genes": 800, "genes_per_cell": 100}
    cells = gm.synthetic(40, **how, random_state=3)["human"]
    same = gm.synthetic(40, **how, seed=3)["human"]
    assert (cells.X != same.X).nnz == 0
    before = cells.copy()
    written = gm.embed(cells, random_bundle, copy=True)
    assert "X_genemodel" in written.obsm and "X_genemodel" in written.uns
    assert not cells.obsm and set(cells.uns) == set(before.uns)
    assert gm.embed(cells, random_bundle) is None
    np.testing.assert_array_equal(cells.obsm["X_genemodel"], written.obsm["X_genemodel"])
    with pytest.raises(ConfigError, match="copy=True is for an AnnData"):
        gm.embed("cells.h5ad", random_bundle, copy=True)


def test_a_call_that_returns_something_returns_it_behind_the_copy():
    @may_copy
    def call(adata: ad.AnnData, value: int) -> int:
        """Write.

        Parameters
        ----------
        value
            Number.

        Returns
        -------
        The number.
        """
        adata.uns["value"] = value
        return value

    cells = ad.AnnData(np.zeros((2, 2)))
    copy, found = call(cells, 3, copy=True)
    assert (copy.uns["value"], found, dict(cells.uns)) == (3, 3, {})
    copy, _ = call(adata=cells, value=4, copy=True)
    assert copy.uns["value"] == 4 and call(cells, 5) == 5 and cells.uns["value"] == 5
    assert "\ncopy\n    Leave ``adata`` as it is" in inspect.getdoc(call)


@pytest.mark.parametrize("name", ["annotate", "embed", "impute", "integrate", "perturb"])
def test_every_call_that_writes_takes_and_describes_copy(name):
    call = getattr(gm, name)
    assert inspect.signature(call).parameters["copy"].default is False
    assert "\ncopy\n    Leave ``adata`` as it is" in inspect.getdoc(call)
    assert "key_added" in inspect.signature(call).parameters


def test_verbosity_is_scanpys(capsys):
    library = logging.getLogger("genemodel")
    level, handlers = library.level, list(library.handlers)
    try:
        for number, (name, there) in enumerate(
            (("error", 40), ("warning", 30), ("info", 20), ("hint", 20), ("debug", 10))
        ):
            for value in (name, number):
                gm.settings.verbosity = value
                assert library.level == there
        assert gm.settings.verbosity == "debug"
        with pytest.raises(ConfigError, match="one of error, warning, info, hint, debug, or 0 to"):
            gm.settings.verbosity = "loud"
        with pytest.raises(ConfigError):
            gm.settings.verbosity = True
    finally:
        library.setLevel(level)
        library.handlers[:] = handlers
