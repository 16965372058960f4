"""What imputation writes: layers in place, or a file that is complete or not there.

Axes: C cells, P output columns (genes asked for).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import pandas as pd

from genemodel.adapt.imputation import BLOCK_CELLS
from genemodel.adapt.imputation_model import GammaPosterior
from genemodel.cells.source import Source
from genemodel.errors import ConfigError, DataError
from genemodel.inference.impute_genes import Columns
from genemodel.writing import whole

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Layers:
    """Names and values of what is written, checked."""

    key: str
    uncertainty: bool
    draws: int
    quantiles: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.key:
            raise ConfigError("key_added is empty: name the layer to write, such as 'imputed'.")
        if isinstance(self.draws, bool) or self.draws < 0:
            raise ConfigError(f"draws is {self.draws!r}; it must be 0 or a number of draws.")
        for level in self.quantiles:
            if not 0 < level < 1:
                raise ConfigError(f"quantiles holds {level!r}; each must lie between 0 and 1.")
        named = [quantile_name(self.key, level) for level in self.quantiles]
        if repeated := sorted({name for name in named if named.count(name) > 1}):
            raise ConfigError(
                f"quantiles names the layer {repeated[0]!r} twice: levels must differ in their "
                "first six digits."
            )

    @property
    def names(self) -> list[str]:
        """Mean, sd, quantiles, draws."""
        names = [self.key]
        if self.uncertainty:
            names.append(f"{self.key}_sd")
        names += [quantile_name(self.key, level) for level in self.quantiles]
        return names + [f"{self.key}_draw{i}" for i in range(self.draws)]

    def values(
        self, posterior: GammaPosterior, generator: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """Arrays in the order of the names."""
        yield posterior.mean
        if self.uncertainty:
            yield posterior.sd
        if self.quantiles:
            yield from posterior.quantiles(self.quantiles)
        if self.draws:
            yield from posterior.draws(self.draws, generator)


def quantile_name(key: str, level: float) -> str:
    """Name of a quantile's layer: ``imputed_q5`` for 0.05, ``imputed_q97.5`` for 0.975."""
    return f"{key}_q{100 * level:g}"


def output_tables(
    adata: object, source: Source, columns: Columns, *, every: bool, trained: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make obs and var of the output; var says which genes were measured.

    ``every``: the columns are those of the data. ``trained``: positions are those of a model.
    """
    obs = source.obs if isinstance(adata, str | Path) else cast(Any, adata).obs
    measured_P = columns.measured_P
    if trained:
        measured_P = np.isin(columns.names, source.genes.index.astype(str))
    if every:
        var = source.genes.copy()
    elif measured_P.all() and not trained:
        var = source.genes.iloc[columns.column_P].copy()
    else:
        # The table has no rows for genes it did not measure: only names are kept.
        var = pd.DataFrame(index=pd.Index(columns.names, dtype=str))
    var["measured"] = measured_P
    return obs.copy(), var


class Sink(Protocol):
    """Where the layers go, block after block of cells."""

    def open(self) -> AbstractContextManager[None]:
        """Make room for all layers, while the context lasts."""

    def write(self, name: str, rows: slice, values_CP: np.ndarray) -> None:
        """Take up a layer's values of some cells."""

    def finish(self, about: dict[str, Any], dispersion_P: np.ndarray) -> None:
        """Add the provenance and every gene's dispersion once all layers are there."""


class InPlace:
    """Layers of an AnnData, or tables in its ``obsm``; nothing is set before all is computed."""

    def __init__(
        self,
        adata: "AnnData",
        columns: Columns,
        layers: Layers,
        *,
        in_table: bool,
        column_P: np.ndarray | None = None,
    ) -> None:
        self.adata, self.columns, self.key, self.in_table = adata, columns, layers.key, in_table
        # Features that are no genes stay NaN.
        self.column_P = None if in_table else column_P
        shape = (adata.n_obs, len(columns.names) if self.column_P is None else adata.n_vars)
        self.arrays = {name: np.full(shape, np.nan, np.float32) for name in layers.names}

    def open(self) -> AbstractContextManager[None]:
        """See :class:`Sink`."""
        return nullcontext()

    def write(self, name: str, rows: slice, values_CP: np.ndarray) -> None:
        """See :class:`Sink`."""
        if self.column_P is None:
            self.arrays[name][rows] = values_CP
        else:
            self.arrays[name][rows, self.column_P] = values_CP

    def finish(self, about: dict[str, Any], dispersion_P: np.ndarray) -> None:
        """See :class:`Sink`."""
        for name, array_CP in self.arrays.items():
            if self.in_table:
                self.adata.obsm[name] = pd.DataFrame(
                    array_CP, index=self.adata.obs_names, columns=self.columns.names
                )
            else:
                self.adata.layers[name] = array_CP
        if self.in_table:
            about = {**about, "dispersion": dispersion_P}
        else:
            if self.column_P is not None:
                every_G = np.full(self.adata.n_vars, np.nan, dispersion_P.dtype)
                every_G[self.column_P] = dispersion_P
                dispersion_P = every_G
            self.adata.var[f"{self.key}_dispersion"] = dispersion_P
        self.adata.uns[self.key] = about


class ToFile:
    """An h5ad or zarr without counts, whose layers are written in blocks of cells.

    It is there once it is complete.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool,
        tables: tuple[pd.DataFrame, pd.DataFrame],
        layers: Layers,
    ) -> None:
        self.path, self.overwrite, self.key = path, overwrite, layers.key
        self.obs, self.var = tables
        self.names = layers.names

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lay the file out, and give it its name once everything is written."""
        _refuse_dates(self.obs, "obs", self.path)
        _refuse_dates(self.var, "var", self.path)
        # HDF5 writes the layers as they are; zarr packs them, by nobody knows how much.
        packed = self.path.suffix == ".zarr"
        n_bytes = np.dtype(np.float32).itemsize * len(self.obs) * len(self.var) * len(self.names)
        with (
            whole(self.path, needed=0 if packed else n_bytes) as partial,
            self._created(partial) as self.root,
        ):
            self._lay_out()
            yield

    def _created(self, partial: Path) -> AbstractContextManager[Any]:
        if self.path.suffix == ".zarr":
            import zarr

            return nullcontext(zarr.open_group(partial, mode="w"))
        import h5py

        return cast(AbstractContextManager[Any], h5py.File(partial, "w"))

    def _lay_out(self) -> None:
        """Write obs and var, and make room for the layers."""
        import anndata as ad

        try:
            ad.io.write_elem(self.root, "/", ad.AnnData(obs=self.obs, var=self.var))
        except (TypeError, ValueError) as error:
            # What HDF5 says to objects in a column, and anndata to names of columns.
            raise DataError(
                f"obs or var of the input cannot be written to {self.path} ({error}): make their "
                "columns text, numbers or categories."
            ) from error
        shape = (len(self.obs), len(self.var))
        self.arrays = {}
        for name in self.names:
            layers = self.root["layers"]
            if self.path.suffix == ".zarr":
                chunks = (min(BLOCK_CELLS, shape[0]), shape[1])
                array = layers.create_array(name, shape=shape, chunks=chunks, dtype="float32")
            else:
                array = layers.create_dataset(name, shape=shape, dtype="float32")
            array.attrs["encoding-type"] = "array"
            array.attrs["encoding-version"] = "0.2.0"
            self.arrays[name] = array

    def write(self, name: str, rows: slice, values_CP: np.ndarray) -> None:
        """See :class:`Sink`."""
        self.arrays[name][rows] = values_CP

    def finish(self, about: dict[str, Any], dispersion_P: np.ndarray) -> None:
        """See :class:`Sink`."""
        import anndata as ad

        self.var[f"{self.key}_dispersion"] = dispersion_P
        ad.io.write_elem(self.root, "var", self.var)
        ad.io.write_elem(self.root, "uns", {self.key: about})


def _refuse_dates(table: pd.DataFrame, what: str, path: Path) -> None:
    """Refuse columns for which the file formats of anndata have no encoding."""
    foreign = pd.PeriodDtype | pd.IntervalDtype | pd.SparseDtype
    odd = [
        str(name)
        for name, dtype in table.dtypes.items()
        if dtype.kind in "mM" or isinstance(dtype, foreign)
    ]
    if odd:
        raise DataError(
            f"{what} columns {', '.join(odd[:5])} of the input cannot be written to {path}: they "
            "hold dates, periods, intervals or sparse values. Make them text or numbers, such as "
            f"adata.{what}[{odd[0]!r}].astype(str)."
        )
