"""What the user knows of cells and genes, carried from a source to an output without its counts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.cells.matrices import refuse_damage
from genemodel.cells.source import Source

if TYPE_CHECKING:
    from anndata import AnnData

# All of an AnnData but its counts (X, layers, raw).
KEPT = ("obs", "var", "uns", "obsm", "varm", "obsp", "varp")


def read_annotations(path: Path, source: Source) -> "AnnData":
    """Read everything but the counts of the file behind a source, in its order and types."""
    import anndata as ad

    return ad.AnnData(**_elements_of(path, source))


def copy_annotations(path: Path, source: Source, root: Any) -> None:
    """Write the same to an open HDF5 file, which becomes an h5ad; what is large is never held."""
    import anndata as ad
    import h5py

    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    if source.kind != "h5ad":
        elements = _elements_of(path, source)
        for key in (*KEPT, "layers"):
            ad.io.write_elem(root, key, elements.get(key, {}))
        return
    with refuse_damage(source.where), h5py.File(path, "r") as file:
        for key in KEPT:
            if key not in file:
                ad.io.write_elem(root, key, {})
            elif "__categories" in file[key]:
                # Old tables point at their categories by references, which a copy would lose.
                ad.io.write_elem(root, key, ad.io.read_elem(file[key]))
            else:
                file.copy(file[key], root, name=key)
    ad.io.write_elem(root, "layers", {})


def _elements_of(path: Path, source: Source) -> dict[str, Any]:
    match source.kind:
        case "h5ad":
            import h5py

            with refuse_damage(source.where), h5py.File(path, "r") as file:
                return _elements(file)
        case "zarr":
            import zarr

            with refuse_damage(source.where):
                return _elements(zarr.open_group(path, mode="r"))
        case _:
            return {"obs": _obs_of(path, source), "var": source.genes.copy()}


def _elements(group: Any) -> dict[str, Any]:
    import anndata as ad

    return {key: ad.io.read_elem(group[key]) for key in KEPT if key in group}


def _obs_of(path: Path, source: Source) -> pd.DataFrame:
    """Tables and 10x files have names of cells alone; loom has attributes."""
    obs = pd.DataFrame(index=source.obs.index)
    if source.kind != "loom":
        return obs
    import h5py

    with refuse_damage(source.where), h5py.File(path, "r") as file:
        for name, attribute in file["col_attrs"].items():
            if attribute.shape == (len(obs),):
                values = attribute[:]
                text = values.dtype.kind in "OS"
                obs[name] = attribute.asstr()[:] if text else np.asarray(values)
    return obs
