"""Reading rows of a count matrix wherever and however it is stored.

Every reader gives the same thing, ``read(start, stop)``: a CSR matrix of those rows with the
values as they are stored. The structure (pointers, column numbers) is checked before anything
else touches it, because a damaged sparse matrix crashes the process that trusts it.

Axes: C cells, G genes of the file, N stored values.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from genemodel.errors import DataError, GenemodelError

# Bounds on what one block holds, so that memory does not depend on the size of the file.
DENSE_BLOCK_BYTES = 64 * 2**20
BLOCK_VALUES = 16_000_000
# Values of a column-wise stored matrix that one pass over the file turns into rows.
TRANSPOSED_VALUES = 64_000_000


# What file libraries raise on damaged data, and on metadata that a flipped bit gave other names.
_DAMAGE = (
    OSError, EOFError, zlib.error, zipfile.BadZipFile,
    KeyError, IndexError, ValueError, RuntimeError, TypeError, AttributeError, ArithmeticError,
    AssertionError, MemoryError,
)  # fmt: skip


@contextmanager
def refuse_damage(where: str) -> Iterator[None]:
    """Turn what file libraries raise on damaged data into a refusal that names the place."""
    try:
        yield
    except GenemodelError:
        raise
    except Exception as error:
        # Errors of their own that derive from none of those, such as anndata's IORegistryError.
        own = type(error).__module__.partition(".")[0]
        if not isinstance(error, _DAMAGE) and own not in ("anndata", "zarr", "numcodecs", "_csv"):
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise DataError(
            f"{where}: cannot be read ({type(error).__name__}: {reason}). The file is damaged, "
            "cut off or of another layout: copy or make it again"
        ) from error


@runtime_checkable
class Rows(Protocol):
    """Rows of a matrix, read in blocks."""

    @property
    def shape(self) -> tuple[int, int]:
        """(C, G)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored values."""

    @property
    def from_the_start(self) -> bool:
        """Whether reading far from the beginning costs a pass over all that comes before."""

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows ``start`` to ``stop`` as CSR (stop − start, G), values as stored."""

    def stop_of(self, start: int, most: int) -> int:
        """End of a block that begins at ``start`` with at most ``most`` rows and bounded memory."""


class SparseRows:
    """A row-wise (CSR) matrix: three arrays in memory, HDF5 or zarr."""

    from_the_start = False

    def __init__(
        self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int], where: str
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = np.dtype(data.dtype)
        self._data, self._indices, self._where = data, indices, where
        with refuse_damage(where):
            pointers = np.asarray(indptr[:]).astype(np.int64, copy=False)
        if pointers.shape != (self.shape[0] + 1,):
            raise DataError(
                f"{where}: its shape says {self.shape[0]:,} rows, its row pointers "
                f"{pointers.size - 1:,}. The matrix is damaged: make the file again"
            )
        if pointers[0] != 0 or (np.diff(pointers) < 0).any() or pointers[-1] > data.shape[0]:
            raise DataError(
                f"{where}: the row pointers do not ascend from 0 to the {data.shape[0]:,} stored "
                "values. The matrix is damaged: make the file again"
            )
        if indices.shape[0] != data.shape[0]:
            raise DataError(
                f"{where}: {data.shape[0]:,} values but {indices.shape[0]:,} column numbers. The "
                "matrix is damaged: make the file again"
            )
        self._indptr_C1 = pointers

    def stop_of(self, start: int, most: int) -> int:
        """See :class:`Rows`."""
        last = np.searchsorted(self._indptr_C1, self._indptr_C1[start] + BLOCK_VALUES, "right") - 1
        return int(min(start + most, max(start + 1, last), self.shape[0]))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """See :class:`Rows`."""
        first, last = int(self._indptr_C1[start]), int(self._indptr_C1[stop])
        with refuse_damage(self._where):
            data = calculable(np.asarray(self._data[first:last]))
            indices = calculable(np.asarray(self._indices[first:last]))
        check_columns(indices, self.shape[1], self._where)
        return csr_of(
            data, indices, self._indptr_C1[start : stop + 1] - first, (stop - start, self.shape[1])
        )


class ColumnRows:
    """A column-wise (CSC) stored matrix, turned into rows in as many passes as memory asks for."""

    def __init__(
        self, data: Any, indices: Any, indptr: Any, shape: tuple[int, int], where: str
    ) -> None:
        # Seen from the side, a CSC matrix is a CSR matrix of genes: one reader checks both.
        self._genes = SparseRows(data, indices, indptr, (shape[1], shape[0]), where)
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = self._genes.dtype
        values = max(1, int(data.shape[0]))
        self.rows_per_pass = max(1, self.shape[0] * TRANSPOSED_VALUES // values)
        self.from_the_start = self.rows_per_pass < self.shape[0]
        self._held: tuple[int, sp.csr_matrix] | None = None

    def stop_of(self, start: int, most: int) -> int:
        """See :class:`Rows`."""
        start_of_pass = start - start % self.rows_per_pass
        return min(start + most, start_of_pass + self.rows_per_pass, self.shape[0])

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """See :class:`Rows`."""
        parts = []
        while start < stop:
            first = start - start % self.rows_per_pass
            if self._held is None or self._held[0] != first:
                self._held = first, self._pass(first)
            held = self._held[1]
            end = min(stop, first + held.shape[0])
            parts.append(held[start - first : end - first])
            start = end
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def _pass(self, first: int) -> sp.csr_matrix:
        """Rows ``first`` onwards, one pass over the whole matrix."""
        last = min(first + self.rows_per_pass, self.shape[0])
        parts: list[sp.csc_matrix] = []
        gene = 0
        while gene < self.shape[1]:
            stop = self._genes.stop_of(gene, self.shape[1])
            block = self._genes.read(gene, stop)
            inside = (block.indices >= first) & (block.indices < last)
            before = np.concatenate([[0], np.cumsum(inside)])
            indptr = before[block.indptr]
            parts.append(
                sp.csc_matrix(
                    (block.data[inside], block.indices[inside] - first, indptr),
                    shape=(last - first, stop - gene),
                )
            )
            gene = stop
        if not parts:
            return sp.csr_matrix((last - first, 0), dtype=self.dtype)
        return sp.hstack(parts, format="csc").tocsr()


class DenseRows:
    """A dense matrix in memory, HDF5 or zarr; ``transposed`` where genes are its rows."""

    from_the_start = False

    def __init__(self, values: Any, where: str, *, transposed: bool = False) -> None:
        if len(values.shape) != 2:
            raise DataError(
                f"{where}: has {len(values.shape)} dimensions, a count matrix has two "
                "(cells × genes)"
            )
        n, m = (int(values.shape[0]), int(values.shape[1]))
        self.shape = (m, n) if transposed else (n, m)
        self.dtype = np.dtype(values.dtype)
        self._values, self._transposed, self._where = values, transposed, where

    def stop_of(self, start: int, most: int) -> int:
        """See :class:`Rows`."""
        fit = max(1, DENSE_BLOCK_BYTES // max(1, self.shape[1] * self.dtype.itemsize))
        return min(start + min(most, fit), self.shape[0])

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """See :class:`Rows`."""
        with refuse_damage(self._where):
            if self._transposed:
                block = np.asarray(self._values[:, start:stop]).T
            else:
                block = np.asarray(self._values[start:stop])
        return sp.csr_matrix(calculable(block))


class SequentialRows:
    """Rows that can only be read from the beginning on, such as those of a text file.

    Parameters
    ----------
    shape
        (C, G).
    blocks
        Starts a new pass: CSR blocks (any number of rows each, G columns) in row order.
    where
        The place, for messages.
    dtype
        Type of the values.
    """

    from_the_start = True

    def __init__(
        self,
        shape: tuple[int, int],
        blocks: Callable[[], Iterator[sp.csr_matrix]],
        where: str,
        dtype: npt.DTypeLike = np.float64,
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._blocks, self._where = blocks, where
        self._pass: Iterator[sp.csr_matrix] | None = None
        self._held: sp.csr_matrix | None = None
        self._held_start = 0

    def stop_of(self, start: int, most: int) -> int:
        """See :class:`Rows`."""
        # Ending where a block ends saves joining two.
        return min(start + most, self._block_stop(start))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """See :class:`Rows`."""
        parts = []
        while start < stop:
            end = min(stop, self._block_stop(start))
            assert self._held is not None
            parts.append(self._held[start - self._held_start : end - self._held_start])
            start = end
        if not parts:
            return sp.csr_matrix((0, self.shape[1]), dtype=self.dtype)
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def _block_stop(self, row: int) -> int:
        """Go to the block that holds ``row``; returns the row after its last."""
        if self._pass is None or row < self._held_start:
            self._pass, self._held, self._held_start = self._blocks(), None, 0
        while True:
            stop = self._held_start + (0 if self._held is None else self._held.shape[0])
            if row < stop:
                return stop
            with refuse_damage(self._where):
                block = next(self._pass, None)
            if block is None:
                raise DataError(
                    f"{self._where}: ends after {stop:,} cells, {self.shape[0]:,} were announced. "
                    "The file is cut off: copy or make it again"
                )
            if block.shape[1] != self.shape[1]:
                raise DataError(
                    f"{self._where}: cells {stop:,} onwards have {block.shape[1]:,} genes, "
                    f"{self.shape[1]:,} are named"
                )
            self._held, self._held_start = block, stop


@dataclass
class SelectedColumns:
    """Some columns of a matrix."""

    rows: Rows
    columns: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """(C, chosen genes)."""
        return self.rows.shape[0], int(self.columns.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored values."""
        return self.rows.dtype

    @property
    def from_the_start(self) -> bool:
        """See :class:`Rows`."""
        return self.rows.from_the_start

    def stop_of(self, start: int, most: int) -> int:
        """See :class:`Rows`."""
        return self.rows.stop_of(start, most)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """See :class:`Rows`."""
        return self.rows.read(start, stop)[:, self.columns]


def check_columns(indices: npt.NDArray[Any], n_columns: int, where: str) -> None:
    """Refuse column numbers outside the matrix."""
    if indices.size and (indices.min() < 0 or indices.max() >= n_columns):
        wrong = indices.max() if indices.max() >= n_columns else indices.min()
        raise DataError(
            f"{where}: a stored column number is {wrong:,}, the matrix has {n_columns:,} columns. "
            "The matrix is damaged: make the file again"
        )


def calculable(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values in a type that scipy and numba know: not of 2 or 16 bytes, nor turned."""
    kind = values.dtype
    if kind == np.float16:
        return values.astype(np.float32)
    if kind.kind == "f" and kind.itemsize > 8:
        return values.astype(np.float64)
    return values if kind.isnative else values.astype(kind.newbyteorder("="))


def csr_of(
    data: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    indptr: npt.NDArray[Any],
    shape: tuple[int, int],
) -> sp.csr_matrix:
    """CSR matrix of checked arrays, with one integer type for both index arrays."""
    wide = data.size > np.iinfo(np.int32).max or shape[1] > np.iinfo(np.int32).max
    kind = np.int64 if wide else np.int32
    return sp.csr_matrix(
        (data, indices.astype(kind, copy=False), indptr.astype(kind, copy=False)), shape=shape
    )


def rows_of(matrix: Any, where: str, *, transposed: bool = False) -> Rows:
    """Reader of any matrix that AnnData may hold, in memory or backed by a file.

    ``transposed``: the rows that are wanted are its columns.

    Raises
    ------
    DataError
        It is not a matrix of numbers, or of a kind that cannot be read in rows.
    """
    import h5py
    import zarr

    if matrix is None:
        raise DataError(f"{where}: is empty (None). Name the layer that holds raw counts: layer=")
    if isinstance(matrix, Rows):
        return matrix
    if isinstance(matrix, h5py.Group | zarr.Group):
        return _stored_rows(matrix, where, transposed)
    group = getattr(matrix, "group", None)  # anndata's backed sparse matrices
    if isinstance(group, h5py.Group | zarr.Group):
        return _stored_rows(group, where, transposed)
    if sp.issparse(matrix):
        matrix = matrix.T if transposed else matrix
        if matrix.format == "csr":
            rows: Rows = SparseRows(matrix.data, matrix.indices, matrix.indptr, matrix.shape, where)
        elif matrix.format == "csc":
            rows = ColumnRows(matrix.data, matrix.indices, matrix.indptr, matrix.shape, where)
        else:
            return rows_of(matrix.tocsr(), where)
    elif isinstance(matrix, np.ndarray | h5py.Dataset | zarr.Array):
        values = np.ma.getdata(matrix) if np.ma.isMA(matrix) else _complete(matrix)
        rows = DenseRows(values, where, transposed=transposed)
    else:
        raise DataError(
            f"{where}: is a {type(matrix).__module__}.{type(matrix).__name__}, which cannot be "
            "read in rows. Use a numpy array, a scipy CSR or CSC matrix, or a file"
        )
    return numeric(rows, where)


def _stored_rows(group: Any, where: str, transposed: bool) -> Rows:
    """Reader of a sparse matrix as anndata stores it."""
    encoding = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", ""))
    encoding = encoding.decode() if isinstance(encoding, bytes) else str(encoding)
    missing = [key for key in ("data", "indices", "indptr") if key not in group]
    if encoding not in ("csr_matrix", "csc_matrix", "csr", "csc") or missing:
        found = f"it has no {', '.join(missing)}" if missing else f"encoding {encoding!r}"
        raise DataError(
            f"{where}: is not a matrix that anndata wrote ({found}). Write the file again with "
            "anndata, or name another layer: layer="
        )
    shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    if shape is None:
        raise DataError(f"{where}: does not state its shape. Write the file again with anndata")
    # The columns of one layout are the rows of the other.
    kind = SparseRows if encoding.startswith("csr") != transposed else ColumnRows
    shape = tuple(reversed(shape)) if transposed else tuple(shape)
    with refuse_damage(where):
        data, indices, indptr = (_complete(group[key]) for key in ("data", "indices", "indptr"))
    return numeric(kind(data, indices, indptr, (int(shape[0]), int(shape[1])), where), where)


def _complete(array: Any) -> Any:
    """Return the array such that a chunk that is not there is an error; zarr would give zeros."""
    import zarr

    if isinstance(array, zarr.Array):
        return array.with_config({"read_missing_chunks": False})
    return array


def numeric(rows: Rows, where: str) -> Rows:
    """Return ``rows``, or refuse those that do not hold numbers."""
    if rows.dtype.kind not in "iufb":
        kind = "text" if rows.dtype.kind in "OSUT" else f"values of type {rows.dtype}"
        raise DataError(
            f"{where}: holds {kind}, not numbers. Convert the matrix to integers "
            "(adata.X = adata.X.astype('int32')) or name the layer with raw counts: layer="
        )
    return rows
