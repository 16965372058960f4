"""Opening any file of counts and streaming its cells in bounded memory.

The content of a file decides what it is, not its name. Whatever the format, a source gives blocks
of checked counts (genes of the file, not yet of the vocabulary) with the obs columns that a
corpus keeps. Every cell is given, empty ones too: dropping is the business of whoever builds.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.cells import remote
from genemodel.cells.contract import Candidate, Counts, find_counts
from genemodel.cells.matrices import SequentialRows, refuse_damage
from genemodel.cells.obs_columns import COLUMNS, ColumnPlan
from genemodel.cells.source import OpenOptions, Source
from genemodel.errors import DataError
from genemodel.genes.recognition import TURN_FILE, refuse_turned

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger(__name__)

# Some seconds of work: what processes share out, and what an interruption costs.
GROUP_CELLS = 65_536
_HDF5 = b"\x89HDF\r\n\x1a\n"
_TEXT = (".csv", ".tsv", ".txt", ".tab")
# By content, for files under another name.
_BINARY = {
    b"RDX": "an R workspace: convert it in R, e.g. with zellkonverter::writeH5AD",
    b"RDA": "an R workspace: convert it in R, e.g. with zellkonverter::writeH5AD",
    b"X\n\0": "an R object: convert it in R, e.g. with zellkonverter::writeH5AD",
    b"PK\x03\x04": "an archive: unpack it and give what is inside",
    b"BZh": "compressed with bzip2: unpack it with bunzip2",
    b"\xfd7zXZ": "compressed with xz: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it with unzstd",
    b"PAR1": "a parquet table: write it as h5ad with anndata",
    b"\x93NUMPY": "a numpy array without names: make an AnnData of it and write that",
    b"\x80\x04": "a pickle, which can run any program when it is read: write it as h5ad",
}
_ADVICE = {
    ".rds": "an R object: convert it in R, e.g. with zellkonverter::writeH5AD",
    ".rda": "an R workspace: convert it in R, e.g. with zellkonverter::writeH5AD",
    ".rdata": "an R workspace: convert it in R, e.g. with zellkonverter::writeH5AD",
    ".h5seurat": "a Seurat file: convert it with SeuratDisk::Convert(dest='h5ad')",
    ".zip": "an archive: unpack it and give what is inside",
    ".tar": "an archive: unpack it and give the folder inside",
    ".tgz": "an archive: unpack it and give the folder inside",
    ".xlsx": "a spreadsheet: export it as csv",
    ".parquet": "a parquet table: write it as h5ad with anndata",
}


@dataclass(frozen=True)
class SourceFile:
    """A file of cells and how to read it: a source that any process can open when its turn comes.

    The fields are the parameters of :func:`open_source`.
    """

    path: str
    layer: str | None = None
    species: str | None = None
    columns: Mapping[str, str] | None = None
    keep: tuple[str, ...] = ()
    name: str | None = None
    allow_fractional: bool = False
    genome: str | None = None
    transpose: bool = False
    licence: str | None = None
    citation: str | None = None
    missing_labels: tuple[str, ...] = ()
    column: str | None = None
    values: Mapping[str, str] | None = None

    def open(self) -> Source:
        """Open it."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        return open_source(self.path, **options)


def open_source(
    data: "str | Path | AnnData | Source | SourceFile",
    *,
    layer: str | None = None,
    species: str | None = None,
    columns: Mapping[str, str] | None = None,
    keep: Iterable[str] = (),
    name: str | None = None,
    allow_fractional: bool = False,
    genome: str | None = None,
    transpose: bool = False,
    licence: str | None = None,
    citation: str | None = None,
    missing_labels: Sequence[str] = (),
    column: str | None = None,
    values: Mapping[str, str] | None = None,
) -> Source:
    """Open a source of raw counts and prove it, without loading it.

    Parameters
    ----------
    data
        h5ad, zarr (anndata), 10x h5, 10x mtx folder, loom, csv/tsv (gzipped or not); the address
        (``s3://…``) of one of the HDF5 or zarr kinds; an AnnData in memory or backed; or a Source,
        returned as it is.
    layer
        Where the raw counts are: None or ``"X"``, ``"raw"``, or the name of a layer.
    species
        ``"human"`` for all cells, or ``"obs:COLUMN"`` for a species per cell. By default the obs
        column ``species``, which must then exist.
    columns
        Corpus column -> obs column, for example ``{"donor": "patient_id"}``. Columns that bear
        the corpus' own names (``COLUMNS``) are found without.
    keep
        Further obs columns to keep where they exist.
    name
        Name of the source; by default the file's stem.
    allow_fractional, genome, transpose, column
        See :class:`~genemodel.cells.input_settings.InputSettings`.
    licence, citation
        Of the data; by default what an h5ad, zarr or AnnData says in ``uns["license"]`` (or
        ``licence``) and ``uns["citation"]``. A model names them with what it was trained on.
    missing_labels
        Texts in columns of the corpus that stand for a missing value, beside the usual ones
        (``nan``, ``Unknown``, ``unassigned`` …); ``"-unknown"`` makes a label of one.
    values
        Corpus column -> what holds for all cells of the source, for example ``{"donor": "P1"}``;
        it goes before what the file says. A 10x file of which nothing is said is one batch of one
        donor, named like the source.

    Returns
    -------
    Source

    Raises
    ------
    DataError
        Missing, empty, damaged or foreign file; not raw counts; a column that is not there.
    ConfigError
        The species is not stated.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, SourceFile):
        return data.open()
    plan = ColumnPlan.of(species, columns, keep, missing_labels, values)
    if not isinstance(data, str | Path):
        source = _open_anndata(
            data,
            OpenOptions(
                layer, plan, allow_fractional, genome, transpose, name or "AnnData", column
            ),
        )
        source.column = column
        return _said(source, licence, citation)
    local = remote.is_local(str(data))
    path = Path(data) if local else remote.name_of(str(data))
    options = OpenOptions(
        layer, plan, allow_fractional, genome, transpose, name or stem(path), column
    )
    source = open_with(str(data), options)
    source.column = column
    source.opened_from = SourceFile(
        str(data), layer, species, columns, tuple(keep), name, allow_fractional, genome, transpose,
        licence, citation, tuple(missing_labels), column, values,
    )  # fmt: skip
    return _said(source, licence, citation)


def _said(source: Source, licence: str | None, citation: str | None) -> Source:
    """Let what the caller says of the data's origin go before what the file says."""
    source.licence = source.licence if licence is None else licence
    source.citation = source.citation if citation is None else citation
    return source


def _by_file(source: Source, entry: Callable[[str], object]) -> Source:
    """Note licence and citation as far as a file says; ``entry`` gives one of ``uns`` or None."""
    found = entry("license") or entry("licence"), entry("citation")
    source.licence, source.citation = (text if isinstance(text, str) else "" for text in found)
    return source


def open_with(data: str | Path, options: OpenOptions) -> Source:
    """Open a file, folder or address with options that are checked already."""
    if remote.is_local(str(data)):
        with refuse_damage(str(data)):
            return _open_path(Path(data), options)
    return _open_address(str(data), remote.name_of(str(data)), options)


def _open_path(path: Path, options: OpenOptions) -> Source:
    if path.is_dir():
        return _open_folder(path, options)
    if not path.exists():
        raise DataError(f"{path}: does not exist{_nearby(path)}")
    try:
        with path.open("rb") as start:
            head = start.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from error
    if not head:
        raise DataError(f"{path}: is empty (0 bytes). Copy or make it again")
    if head == _HDF5:
        import h5py

        with refuse_damage(str(path)):
            file = h5py.File(path, "r")
        return _open_hdf5(file, path, options)
    suffixes = [s.lower() for s in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else "".join(suffixes[-1:])
    if kind in _ADVICE:
        raise DataError(f"{path}: is {_ADVICE[kind]}")
    content = _beginning(path)
    for magic, advice in _BINARY.items():
        if content.startswith(magic):
            raise DataError(f"{path}: is {advice}")
    if content.startswith(_HDF5):
        raise DataError(f"{path}: is an HDF5 file compressed with gzip: unpack it with gunzip")
    if content.lower().startswith(b"%%matrixmarket"):
        from genemodel.cells.sources_tenx import open_folder

        return open_folder(path, options)
    is_text = b"\0" not in content and any(c in content for c in (b"\t", b",", b";", b" "))
    if kind in _TEXT or (is_text and kind not in (".h5ad", ".h5", ".hdf5", ".loom")):
        from genemodel.cells.sources_text import open_table

        return open_table(path, options)
    if kind in (".h5ad", ".h5", ".hdf5", ".loom"):
        raise DataError(
            f"{path}: is named like an HDF5 file but begins with {head!r}: it is cut off, "
            "compressed or of another kind. Copy or unpack it again"
        )
    raise DataError(
        f"{path}: is of no known kind (begins with {head!r}). Known are h5ad, zarr, 10x h5, 10x "
        "mtx folders, loom, csv and tsv"
    )


def _beginning(path: Path) -> bytes:
    """Return the first bytes of what a file holds, unpacked where it is compressed by gzip."""
    import gzip

    with refuse_damage(str(path)), path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return gzip.open(file).read(4096) if zipped else file.read(4096)


def stem(path: Path) -> str:
    """File name without its endings (``cells.counts.csv.gz`` -> ``cells.counts``)."""
    name = path.name or path.resolve().name
    for ending in (".gz", ".h5ad", ".zarr", ".h5mu", ".h5", ".loom", ".mtx", *_TEXT):
        if name.lower().endswith(ending) and len(name) > len(ending):
            name = name[: -len(ending)]
            if ending == ".mtx":
                # GSM1_lung_matrix.mtx is the matrix of GSM1_lung.
                name = name.removesuffix("matrix").rstrip("_.-") or name
    return name


def _nearby(path: Path) -> str:
    """Return what else is there that may have been meant."""
    from genemodel.settings import nearest

    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    close = nearest(path.name, [p.name for p in path.parent.iterdir()])
    return f"; did you mean {path.parent / close}?" if close else ""


def _open_folder(path: Path, options: OpenOptions) -> Source:
    names = sorted(p.name for p in path.iterdir())
    if {"zarr.json", ".zgroup", ".zmetadata"} & set(names):
        return _open_zarr(path, options)
    from genemodel.cells.sources_tenx import is_market, open_folder

    if any(is_market(name) for name in names):
        return open_folder(path, options)
    if "manifest.json" in names and "cells.zarr" in names:
        raise DataError(f"{path}: is a genemodel corpus already, not a source of one")
    listed = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    inner = _inside(path)
    shown = " or ".join(str(p) for p in inner[:4])
    hint = f" Give {shown} instead." if inner else ""
    raise DataError(
        f"{path}: is a folder without matrix.mtx(.gz) (10x) and without zarr.json or .zgroup "
        f"(zarr); it holds {listed or 'nothing'}.{hint}"
    )


def _inside(path: Path) -> list[Path]:
    """Return the sources in the folders below, what was filtered before what is raw."""
    from genemodel.cells.sources_tenx import is_market

    found = {
        each.parent
        for pattern in ("*/*", "*/*/*", "*/*/*/*")
        for each in path.glob(pattern)
        if is_market(each.name) or each.name in ("zarr.json", ".zgroup")
    }
    found |= {p for pattern in ("*.h5", "*.h5ad", "*/*.h5") for p in path.glob(pattern)}
    return sorted(found, key=lambda p: ("raw" in p.name, len(p.parts), str(p)))


def _open_address(address: str, name: Path, options: OpenOptions) -> Source:
    opened = remote.open_hdf5(address)
    if opened is None:
        group = remote.open_zarr(address)
        return _open_store(group, name, address, options)
    file, stream = opened
    try:
        source = _open_hdf5(file, name, options)
    except BaseException:
        stream.close()
        raise
    inner = source.closer

    def close() -> None:
        if inner is not None:
            inner()
        stream.close()

    source.closer = close
    return source


def _open_hdf5(file: Any, path: Path, options: OpenOptions) -> Source:
    where = path.name
    try:
        keys = set(file)
        if "obs" in keys and ("X" in keys or "layers" in keys):
            return _open_stored(file, path, "h5ad", options, file.close)
        if "mod" in keys and "obs" in keys:
            return _open_muon(file, path, options)
        if {"row_attrs", "col_attrs", "matrix"} <= keys:
            from genemodel.cells.sources_text import open_loom

            return open_loom(file, path, options)
        from genemodel.cells.sources_tenx import is_tenx, open_hdf5

        if is_tenx(file):
            return open_hdf5(file, path, options)
        raise DataError(
            f"{where}: is an HDF5 file, but neither h5ad (obs, X), 10x (matrix/barcodes) nor loom "
            f"(row_attrs, col_attrs); it holds {', '.join(sorted(keys)[:10]) or 'nothing'}"
        )
    except BaseException:
        # Ctrl-C too: no Source was made that could close the file. Where one was, it stays open.
        file.close()
        raise


def modality_of(file: Any, path: Path) -> str:
    """Name the part of a MuData that holds the genes.

    Raises
    ------
    DataError
        Its names do not tell.
    """
    names = [n for n in file["mod"] if hasattr(file["mod"][n], "keys")]
    genes = [n for n in names if n.lower() in ("rna", "gex", "gene expression", "mrna", "scrna")]
    if len(genes) != 1 and len(names) != 1:
        raise DataError(
            f"{path.name}: is a MuData of {', '.join(names) or 'nothing'}, and which of these are "
            "genes is not clear. Write that one: mdata['NAME'].write_h5ad(...)"
        )
    log.info("%s: is a MuData; its %r is read", path.name, (genes or names)[0])
    return (genes or names)[0]


def _open_muon(file: Any, path: Path, options: OpenOptions) -> Source:
    """Open the genes of a MuData."""
    part = file["mod"][modality_of(file, path)]
    return _open_stored(part, path, "h5mu", options, getattr(file, "close", None))


def _open_zarr(path: Path, options: OpenOptions) -> Source:
    import zarr

    with refuse_damage(str(path)):
        group = zarr.open_group(path, mode="r")
    return _open_store(group, path, str(path), options)


def _open_store(group: Any, path: Path, where: str, options: OpenOptions) -> Source:
    with refuse_damage(where):
        keys = set(group.keys())
    if {"mod", "obs"} <= keys:
        return _open_muon(group, path, options)
    if "obs" not in keys or not {"X", "layers"} & keys:
        raise DataError(
            f"{where}: is a zarr store, but not one of anndata (obs, X); it holds "
            f"{', '.join(sorted(keys)[:10]) or 'nothing'}"
        )
    return _open_stored(group, path, "zarr", options, None)


def refuse_old(table: Any, where: str) -> None:
    """Refuse obs or var of an anndata that wrote them as one array of records."""
    if not hasattr(table, "keys"):
        raise DataError(
            f"{where}: was written by an anndata older than 0.7. Read it once with "
            "anndata.read_h5ad and write it again"
        )


def _open_stored(
    root: Any,
    path: Path,
    kind: str,
    options: OpenOptions,
    closer: Callable[[], None] | None,
) -> Source:
    """Open anndata's own layout without loading more than obs, var and row pointers."""
    import anndata as ad

    where = path.name
    of_cells, of_genes = ("var", "obs") if options.transpose else ("obs", "var")

    @functools.cache
    def var() -> pd.DataFrame:
        with refuse_damage(f"{where}, {of_genes}"):
            return ad.io.read_elem(root[of_genes])

    with refuse_damage(f"{where}, {of_cells}"):
        obs_group = root[of_cells]
        refuse_old(obs_group, where)
        attributes = obs_group.attrs
        index = pd.Index(ad.io.read_elem(obs_group[attributes.get("_index", "_index")]))
        if "__categories" in obs_group:
            frame = ad.io.read_elem(obs_group)
            present, read = list(map(str, frame.columns)), frame.__getitem__
        else:
            present = [str(c) for c in attributes.get("column-order", [])]

            def read(column: str) -> Any:
                return ad.io.read_elem(obs_group[column])

        obs = options.plan.apply(
            index, present, read, where, options.name, genes=var, genome=options.genome
        )

    def raw_var() -> pd.DataFrame:
        with refuse_damage(f"{where}, raw/var"):
            return ad.io.read_elem(root["raw"]["var"])

    def there(group: Any, key: str) -> bool:
        # anndata writes what an object lacks as an array without a shape.
        return key in group and getattr(group[key], "shape", ()) is not None

    turned = options.transpose
    refuse_turned(index, var().index, where, "Leave transpose out" if turned else TURN_FILE)
    candidates = [Candidate("X", "X", root["X"], var, turned)] if there(root, "X") else []
    if "layers" in root:
        candidates += [
            Candidate(f"layers[{n!r}]", n, root["layers"][n], var, turned) for n in root["layers"]
        ]
    # The columns of raw would be cells that no other part of the file knows.
    if there(root, "raw") and there(root["raw"], "X") and not turned:
        candidates = [c for c in candidates if c.setting != "raw"]
        candidates.append(Candidate("raw", "raw", root["raw"]["X"], raw_var))
    counts = options.counts(candidates, where, len(obs))
    kind += ", turned" if turned else ""

    def entry(key: str) -> object:
        if "uns" not in root or key not in root["uns"]:
            return None
        with refuse_damage(f"{where}, uns[{key!r}]"):
            return ad.io.read_elem(root["uns"][key])

    return _by_file(Source(options.name, where, path.name, kind, counts, obs, closer), entry)


def _open_anndata(adata: Any, options: OpenOptions) -> Source:
    import anndata as ad

    if not isinstance(adata, ad.AnnData):
        raise DataError(
            f"a source must be a path or an AnnData, not {type(adata).__module__}."
            f"{type(adata).__name__}"
        )
    obs = options.plan.apply(
        adata.obs_names,
        list(map(str, adata.obs.columns)),
        adata.obs.__getitem__,
        options.name,
        options.name,
        genes=lambda: adata.var,
        genome=options.genome,
    )
    counts = find_counts(
        adata,
        layer=options.layer,
        allow_fractional=options.allow_fractional,
        where=options.name,
        column=options.column,
        genome=options.genome,
        transpose=options.transpose,
    )
    return _by_file(Source(options.name, options.name, "", "AnnData", counts, obs), adata.uns.get)


def stream_source(
    name: str,
    genes: Sequence[str],
    obs: pd.DataFrame,
    blocks: Callable[[], Iterator[sp.csr_matrix]],
    *,
    species: str | None = None,
) -> Source:
    """Make a source of cells that a program generates or converts on the fly.

    Parameters
    ----------
    name
        Name of the source.
    genes
        Names of the G genes.
    obs
        One row per cell, index = cell names; columns of the corpus (``COLUMNS``).
    blocks
        Starts a new pass: CSR blocks of counts in cell order.
    species
        As in :func:`open_source`.
    """
    plan = ColumnPlan.of(species, None, [c for c in obs.columns if c not in COLUMNS])
    table = plan.apply(obs.index, list(map(str, obs.columns)), obs.__getitem__, name, name)
    rows = SequentialRows((len(obs), len(genes)), blocks, name, np.int64)
    var = pd.DataFrame(index=pd.Index(list(genes), dtype=str))
    return Source(name, name, "", "stream", Counts("X", name, rows, var), table)
