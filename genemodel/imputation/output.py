"""What imputation writes: layers in place, or a file that is complete or not there.

Axes: C cells, F features of the input, P output columns (genes asked for).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np
import pandas as pd

from genemodel.cells.annotations import (
    annotations_of,
    copy_annotations,
    taken,
    write_element,
)
from genemodel.cells.source import Source
from genemodel.errors import ConfigError
from genemodel.imputation.impute_genes import Columns
from genemodel.imputation.network import BLOCK_CELLS
from genemodel.imputation.posterior import GammaPosterior
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


@dataclass(frozen=True)
class Tables:
    """What a file holds beside the layers.

    Attributes
    ----------
    n_cells
        C.
    var
        One row a column of the layers.
    write_rest
        Writes obs and all else of the user's to the open file, which is empty.
    column_P
        Columns of the layers that have values; None for all. The others are NaN.
    """

    n_cells: int
    var: pd.DataFrame
    write_rest: Callable[[Any], None]
    column_P: np.ndarray | None = None

    @classmethod
    def of_corpus(cls, obs: pd.DataFrame, var: pd.DataFrame) -> Self:
        """Make those of cells of which a corpus knows obs alone."""

        def write_rest(root: Any) -> None:
            import anndata as ad

            ad.io.write_elem(root, "/", ad.AnnData(obs=obs, var=var))

        return cls(len(obs), var, write_rest)

    @classmethod
    def of_input(
        cls,
        data: "AnnData | str | Path",
        source: Source,
        columns: Columns,
        *,
        key: str,
        every: bool,
        trained: bool,
    ) -> Self:
        """Make those of the input: all that it says but its counts.

        ``every``: all its features are columns, NaN where they are no genes; else those asked for.
        ``trained``: positions are those of a model. A column of var says which were measured:
        ``measured``, or ``{key}_measured`` where the user has one of that name.
        """
        # Of raw, its own var is the one that belongs to the counts.
        own = source.counts.name != "raw"
        elements = {"var": source.genes}
        if own:
            only = ("var",) if every else ("var", "varm", "varp")
            elements = annotations_of(data, source, only)
        gene_F = source.counts.column_G if own else None
        parts: dict[str, Any] = {}
        if every:
            var, column_P = elements["var"].copy(), gene_F
            measured_P = np.ones(len(var), bool)
            if column_P is not None:
                measured_P = np.zeros(len(var), bool)
                measured_P[column_P] = True
        else:
            row_P, column_P = columns.column_P, None
            if trained:
                row_P = pd.Index(source.genes.index.astype(str)).get_indexer_for(columns.names)
            measured_P = row_P >= 0
            if gene_F is not None:
                row_P = np.where(measured_P, gene_F[row_P], -1)
            parts = taken(elements, row_P)
            var = parts.pop("var")
            if not measured_P.all():
                var.index = pd.Index(columns.names, dtype=str)
        name = "measured" if "measured" not in var else f"{key}_measured"
        var[name] = measured_P

        def write_rest(root: Any) -> None:
            left_out = ("var",) if every and own else ("var", "varm", "varp")
            copy_annotations(data, source, root, leave_out=left_out)
            for name in left_out[1:]:
                write_element(root, name, parts.get(name, {}))

        return cls(source.n_cells, var, write_rest, column_P)


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

    def __init__(self, path: Path, overwrite: bool, tables: Tables, layers: Layers) -> None:
        self.path, self.overwrite, self.key = path, overwrite, layers.key
        self.tables, self.names = tables, layers.names
        self.shape = (tables.n_cells, len(tables.var))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lay the file out, and give it its name once everything is written."""
        # HDF5 writes the layers as they are; zarr packs them, by nobody knows how much.
        packed = self.path.suffix == ".zarr"
        n_bytes = np.dtype(np.float32).itemsize * self.shape[0] * self.shape[1] * len(self.names)
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
        """Write what is the user's, and make room for the layers."""
        self.tables.write_rest(self.root)
        write_element(self.root, "var", self.tables.var)
        self.arrays = {}
        for name in self.names:
            layers = self.root["layers"]
            if self.path.suffix == ".zarr":
                chunks = (min(BLOCK_CELLS, self.shape[0]), self.shape[1])
                array = layers.create_array(name, shape=self.shape, chunks=chunks, dtype="float32")
            else:
                array = layers.create_dataset(name, shape=self.shape, dtype="float32")
            array.attrs["encoding-type"] = "array"
            array.attrs["encoding-version"] = "0.2.0"
            self.arrays[name] = array

    def write(self, name: str, rows: slice, values_CP: np.ndarray) -> None:
        """See :class:`Sink`."""
        if self.tables.column_P is not None:
            every_CF = np.full((len(values_CP), self.shape[1]), np.nan, np.float32)
            every_CF[:, self.tables.column_P] = values_CP
            values_CP = every_CF
        self.arrays[name][rows] = values_CP

    def finish(self, about: dict[str, Any], dispersion_P: np.ndarray) -> None:
        """See :class:`Sink`."""
        if self.tables.column_P is not None:
            every_F = np.full(self.shape[1], np.nan, dispersion_P.dtype)
            every_F[self.tables.column_P] = dispersion_P
            dispersion_P = every_F
        self.tables.var[f"{self.key}_dispersion"] = dispersion_P
        write_element(self.root, "var", self.tables.var)
        write_element(self.root["uns"], self.key, about)
