"""Any source of cells as an AnnData in memory, with all that it says of them.

The work on all cells at once (integration, scores, labels) needs the object; what can be opened is
the same as for a corpus.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import scipy.sparse as sp

from genemodel.cells import remote
from genemodel.cells.input_settings import InputSettings
from genemodel.cells.matrices import refuse_damage
from genemodel.cells.obs_columns import ColumnPlan
from genemodel.cells.sources import OpenOptions, modality_of, open_with, refuse_old, stem
from genemodel.errors import DataError
from genemodel.genes.recognition import TURN_FILE, refuse_turned

if TYPE_CHECKING:
    from anndata import AnnData

_PARTS = ("X", "obs", "var", "uns", "obsm", "varm", "obsp", "varp", "layers")


def read_anndata(
    path: str | Path, settings: InputSettings | None = None
) -> "tuple[AnnData, InputSettings]":
    """Read a file or folder of cells, whatever its kind.

    Parameters
    ----------
    path
        What :func:`~genemodel.cells.sources.open_source` opens. h5ad and zarr are read with all
        layers, embeddings and notes; of other kinds the counts, which are proven, and the names and
        columns of cells and genes.
    settings
        How to read it.

    Returns
    -------
    tuple
        The cells, and what is still to be said of them: a matrix that was turned, or taken of a
        layer that is ``X`` now, is not to be looked for again.

    Raises
    ------
    DataError
        Missing, damaged or foreign.
    """
    settings = settings or InputSettings()
    if remote.is_local(str(path)):
        if not Path(path).exists():
            raise DataError(f"{path}: does not exist: name a file of raw counts")
        if (found := _stored(Path(path))) is not None:
            return _as_said(found, str(path), settings)
    import anndata as ad

    name = stem(Path(path) if remote.is_local(str(path)) else remote.name_of(str(path)))
    plan = ColumnPlan({}, {}, None, every=True)
    options = OpenOptions(plan=plan, name=name, **settings.counting())
    with open_with(path, options) as source:
        blocks = [chunk.counts_CG for chunk in source.chunks()]
        counts_CG = (
            sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix(source.counts.shape)
        )
        adata = ad.AnnData(counts_CG, obs=source.obs, var=source.genes)
    return adata, settings.but(layer=None, genome=None, transpose=False)


def _as_said(
    adata: "AnnData", where: str, settings: InputSettings
) -> "tuple[AnnData, InputSettings]":
    """Turn what has genes as rows, where that was said, and refuse it where not."""
    if not settings.transpose:
        refuse_turned(adata.obs_names, adata.var_names, where, TURN_FILE)
        return adata, settings
    refuse_turned(adata.var_names, adata.obs_names, where, "Leave transpose out")
    adata.raw = None  # of other columns, which would be cells
    return adata.T, settings.but(transpose=False)


def _stored(path: Path) -> "AnnData | None":
    """Read what anndata wrote, or programs that write like it; None where it is of another kind."""
    import anndata as ad
    import h5py
    import zarr

    is_zarr = path.is_dir() and any((path / n).exists() for n in ("zarr.json", ".zgroup"))
    if not is_zarr and (path.is_dir() or not h5py.is_hdf5(path)):
        return None
    with refuse_damage(str(path)):
        root = zarr.open_group(path, mode="r") if is_zarr else h5py.File(path, "r")
        try:
            keys = set(root)
            if {"mod", "obs"} <= keys:
                root_of_genes = root["mod"][modality_of(root, path)]
            elif "obs" in keys and keys & {"X", "layers"}:
                root_of_genes = root
            else:
                return None
            refuse_old(root_of_genes["obs"], str(path))
            parts = {
                key: ad.io.read_elem(root_of_genes[key]) for key in _PARTS if key in root_of_genes
            }
            raw: Any = root_of_genes["raw"] if "raw" in root_of_genes else None
            if hasattr(raw, "keys") and "X" in raw:
                read = {
                    key: ad.io.read_elem(raw[key]) for key in ("X", "var", "varm") if key in raw
                }
                parts["raw"] = read
            return ad.AnnData(**parts)
        finally:
            if not is_zarr:
                root.close()
