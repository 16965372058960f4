"""The R originals: Seurat anchors and ComBat of the package sva, each in a process of its own.

Files are exchanged, so no R library is ever part of this program. On Debian: ``apt-get install
r-cran-seurat r-bioc-sva``.
"""

import logging
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.io
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.evaluation.baselines import Conditions, counts_of, variable_log
from genemodel.expression.components import principal_components

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("seurat.R")
_LINES_OF_AN_ERROR = 6


@cache
def missing_r(package: str) -> str | None:
    """Say why an R package cannot be used, or None where it can."""
    rscript = shutil.which("Rscript")
    if rscript is None:
        return "R is not installed (no Rscript on the path)"
    asked = f'quit(status = if (requireNamespace("{package}", quietly = TRUE)) 0 else 1)'
    found = subprocess.run([rscript, "-e", asked], capture_output=True, check=False)
    return None if found.returncode == 0 else f"the R package {package} is not installed"


def r_version(package: str) -> str:
    """Version of an R package that is there."""
    asked = f'cat(as.character(packageVersion("{package}")))'
    found = subprocess.run(["Rscript", "-e", asked], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "of unknown version"


def seurat_cca(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Integrate with Seurat anchors found by CCA (Stuart et al. 2019), then PCA."""
    return _run_r("seurat_cca", counts_of(adata), conditions.batch_of(adata), conditions).T


def seurat_rpca(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Integrate with Seurat anchors found by reciprocal PCA, then PCA."""
    return _run_r("seurat_rpca", counts_of(adata), conditions.batch_of(adata), conditions).T


def combat_r(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Correct with ComBat of the R package sva (Leek et al. 2012), then PCA."""
    logged_CG = variable_log(adata, conditions)
    corrected_GC = _run_r("combat_r", logged_CG, conditions.batch_of(adata), conditions)
    return principal_components(corrected_GC.T, conditions.n_comps, conditions.seed)


def _run_r(
    method: str, matrix_CG: sp.csr_matrix, batch_C: np.ndarray, conditions: Conditions
) -> np.ndarray:
    """Write the cells, run the script, read its result (rows × cells)."""
    rscript = shutil.which("Rscript")
    if rscript is None:
        raise DataError(f"{method} needs R: no Rscript on the path")
    # R gets numbers for names: any text may stand in a batch column.
    _, code_C = np.unique(batch_C, return_inverse=True)
    with tempfile.TemporaryDirectory(prefix="genemodel-r-") as name:
        folder = Path(name)
        scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(matrix_CG.T), field="real")
        (folder / "batch.csv").write_text("".join(f"b{code}\n" for code in code_C))
        words = [rscript, "--vanilla", str(SCRIPT), method, name]
        words += [str(conditions.n_comps), str(conditions.n_hvg)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        logger.debug("%s: %s", method, done.stderr)
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-_LINES_OF_AN_ERROR:])
            raise DataError(f"{method}: R stopped with status {done.returncode}:\n{last}")
        shape = [int(line) for line in (folder / "shape.txt").read_text().split()]
        values = np.fromfile(folder / "result.bin", dtype="<f8")
    return values.reshape(shape, order="F").astype(np.float32)
