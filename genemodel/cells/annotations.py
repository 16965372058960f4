"""What the user knows of cells and genes, carried whole from a source to an output without counts.

Axes: G features of the source, P genes of the output.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.cells.matrices import refuse_damage
from genemodel.cells.source import Source
from genemodel.cells.sources import modality_of
from genemodel.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

# All of an AnnData but its counts (X, layers, raw).
KEPT = ("obs", "var", "uns", "obsm", "varm", "obsp", "varp")
# Where each stands in a file whose rows are the genes.
_TURNED = {"obs": "var", "var": "obs", "obsm": "varm", "varm": "obsm", "obsp": "varp",
           "varp": "obsp"}  # fmt: skip


def without_counts(adata: "AnnData") -> "AnnData":
    """Return all of an AnnData but X, layers and raw."""
    import anndata as ad

    return ad.AnnData(**_of_memory(adata))


def read_annotations(path: Path, source: Source) -> "AnnData":
    """Read everything but the counts of the file behind a source, in its order and types."""
    import anndata as ad

    return ad.AnnData(**annotations_of(path, source))


def annotations_of(
    data: "AnnData | str | Path", source: Source, only: Sequence[str] = KEPT
) -> dict[str, Any]:
    """Give these by their names in an AnnData; what is not there is left out."""
    if not isinstance(data, str | Path):
        return _of_memory(data, only)
    import anndata as ad

    with _stored(Path(data), source) as group:
        if group is not None:
            there = {key: _place(key, source) for key in only}
            return {
                key: ad.io.read_elem(group[name]) for key, name in there.items() if name in group
            }
    return {"obs": _obs_of(Path(data), source), "var": source.genes.copy()}


def copy_annotations(
    data: "AnnData | str | Path", source: Source, root: Any, *, leave_out: Collection[str] = ()
) -> None:
    """Write the same to an open HDF5 file or zarr group, which becomes an AnnData's.

    From h5ad to h5ad nothing is held, however large. ``leave_out`` names what the caller writes.
    """
    import anndata as ad
    import h5py

    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    wanted = [key for key in KEPT if key not in leave_out]
    with _stored(Path(data) if isinstance(data, str) else data, source) as group:
        if isinstance(group, h5py.Group) and isinstance(root, h5py.Group):
            for key in wanted:
                name = _place(key, source)
                if name not in group:
                    write_element(root, key, {})
                elif "__categories" in group[name]:
                    # Old tables point at their categories by references, which a copy would lose.
                    write_element(root, key, ad.io.read_elem(group[name]))
                else:
                    group.copy(group[name], root, name=key)
        else:
            elements = annotations_of(data, source)
            for key in wanted:
                write_element(root, key, elements.get(key, {}))
    write_element(root, "layers", {})


def write_element(root: Any, key: str, value: Any) -> None:
    """Write one element of an AnnData.

    Raises
    ------
    DataError
        It, or a column or entry of it, has no place in a file of anndata.
    """
    error = _refusal(root, key, value)
    if error is not None:
        raise DataError(_unwritable(key, value, error)) from error


def _refusal(root: Any, key: str, value: Any) -> Exception | None:
    """Write an element; returns what anndata or the format has against it."""
    import anndata as ad

    try:
        ad.io.write_elem(root, key, value)
    except Exception as error:
        # anndata's own error derives from Exception alone; a full disk is somebody else's to tell.
        foreign = type(error).__module__.partition(".")[0] == "anndata"
        if not foreign and not isinstance(error, TypeError | ValueError):
            raise
        return error
    return None


def _unwritable(key: str, value: Any, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0][:200]
    if isinstance(value, pd.DataFrame):
        twice = list(dict.fromkeys(map(str, value.columns[value.columns.duplicated()])))
        if twice:
            return (
                f"{key} has several columns of the name {twice[0]!r}, which no file can hold: "
                "rename all but one."
            )
        bad = [str(value.columns[at]) for at in range(value.shape[1]) if not _fits(value, at)]
        if bad:
            return (
                f"{key} columns {', '.join(bad[:5])} of the input cannot be written to a file, "
                "which knows no dates, periods, intervals or objects, and no names that are "
                "numbers or hold a slash: make their columns text, numbers or categories, such as "
                f"adata.{key}[{bad[0]!r}].astype(str)."
            )
    elif isinstance(value, dict):
        bad = [str(name) for name, entry in value.items() if not _fits({name: entry})]
        if bad:
            return (
                f"{key}[{bad[0]!r}] of the input cannot be written to a file ({reason}): leave it "
                f"out with del adata.{key}[{bad[0]!r}], or make it text, numbers or arrays."
            )
    return f"{key} of the input cannot be written to a file ({reason})."


def _fits(value: Any, column: int | None = None) -> bool:
    """Whether a part of an element can be written: tried in memory."""
    import h5py

    if column is not None:
        value = value.iloc[:, [column]].reset_index(drop=True)
        value.index = value.index.astype(str)
    with h5py.File("trial", "w", driver="core", backing_store=False) as file:
        return _refusal(file, "value", value) is None


# -- parts along the genes -------------------------------------------------------------------------


def taken(elements: dict[str, Any], row_P: np.ndarray) -> dict[str, Any]:
    """Take some rows of var, varm and varp; nothing of a table's types and categories changes.

    Rows of -1 are of genes that the data did not measure: missing in var, which then has the
    types of pandas that know missing values; varm and varp are left out.
    """
    var: pd.DataFrame = elements["var"]
    if (row_P < 0).any():
        return {"var": _with_gaps(var, row_P)}
    parts: dict[str, Any] = {"var": var.iloc[row_P].copy()}
    parts["varm"] = {
        name: value.iloc[row_P] if isinstance(value, pd.DataFrame) else value[row_P]
        for name, value in elements.get("varm", {}).items()
    }
    parts["varp"] = {
        name: value[row_P][:, row_P] for name, value in elements.get("varp", {}).items()
    }
    return parts


def _with_gaps(table: pd.DataFrame, row_P: np.ndarray) -> pd.DataFrame:
    columns = []
    for at in range(table.shape[1]):
        values = table.iloc[:, at]
        if values.dtype.kind in "iub" and isinstance(values.dtype, np.dtype):
            # 3 stays 3 and True stays True.
            values = values.convert_dtypes()
        columns.append(values.array.take(row_P, allow_fill=True))
    # Two columns may have one name: they are told apart by their places.
    found = pd.DataFrame(dict(enumerate(columns)), index=pd.RangeIndex(len(row_P)))
    found.columns = table.columns
    return found


# -- where they stand ------------------------------------------------------------------------------


@contextmanager
def _stored(data: Any, source: Source) -> Iterator[Any]:
    """Open the group of a file that anndata wrote; None for anything else."""
    kind = source.kind.partition(",")[0]
    if not isinstance(data, Path) or kind not in ("h5ad", "zarr", "h5mu"):
        yield None
        return
    with refuse_damage(source.where):
        if data.is_dir():
            import zarr

            root: Any = zarr.open_group(data, mode="r")
        else:
            import h5py

            root = h5py.File(data, "r")
        try:
            yield root["mod"][modality_of(root, data)] if kind == "h5mu" else root
        finally:
            if not data.is_dir():
                root.close()


def _place(key: str, source: Source) -> str:
    """Name under which the file has it; ``h5ad, turned`` has genes as rows."""
    return _TURNED.get(key, key) if source.kind.endswith("turned") else key


def _of_memory(adata: "AnnData", only: Sequence[str] = KEPT) -> dict[str, Any]:
    named = {key: getattr(adata, key) for key in only}
    return {
        key: value if isinstance(value, pd.DataFrame) else dict(value)
        for key, value in named.items()
    }


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
