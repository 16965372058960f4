#!/usr/bin/env python3
"""Mutates valid sources of every kind and says what opening and reading them did.

    python scripts/fuzz_readers.py [inputs=5000] [seed=0] [kind=NAME]

Inputs are shared out over the kinds. A mutation damages bytes (flips, cuts, holes), parts (an HDF5
or zarr member that is gone, of another type or shape; a line, a field, a file of a folder) or, for
an AnnData in memory, tables and types; some change nothing that counts (line ends, a compressed
file under a plain name, float16). An input is

    read      what comes out are whole numbers ≥ 0 that fit names of cells and genes
    refused   a DataError or ConfigError that names the source
    unnamed   the same, without the name
    traceback any other exception, or 60 seconds without an answer
    silent    something that had to be refused was read, or what changes nothing was read otherwise

Ends with 1 where anything is a traceback, silent or unnamed.
"""

import gzip
import io
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
import zarr

from genemodel.cells.sources import open_source
from genemodel.errors import ConfigError, DataError
from genemodel.genes import GeneVocabulary

OUTCOMES = ("read", "refused", "unnamed", "traceback", "silent")
N, G = 24, 40
ANSWER_S = 60
type Rng = np.random.Generator

# -- valid sources ---------------------------------------------------------------------------------


def cells() -> ad.AnnData:
    """Make a few cells of known human genes."""
    rng = np.random.default_rng(0)
    genes = GeneVocabulary.builtin().genes
    genes = genes[(genes["species"] == "human") & (genes["symbol"] != "")].iloc[:G]
    obs = pd.DataFrame(
        {
            "species": "human",
            "cell_type": pd.Categorical(["T cell", "B cell"] * (N // 2)),
            "depth": rng.normal(size=N),
        },
        index=[f"ACGTACGTACGT{i}-1" for i in range(N)],
    )
    var = pd.DataFrame(
        {"gene_symbol": genes["symbol"].to_numpy()}, index=genes["ensembl_id"].to_numpy()
    )
    counts = rng.poisson(1.5, (N, G)) + 1
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def _h5ad(adata: ad.AnnData, folder: Path) -> Path:
    adata.write_h5ad(folder / "case.h5ad")
    return folder / "case.h5ad"


def _dense(adata: ad.AnnData, folder: Path) -> Path:
    adata = adata.copy()
    adata.X = adata.X.toarray()
    return _h5ad(adata, folder)


def _by_columns(adata: ad.AnnData, folder: Path) -> Path:
    adata = adata.copy()
    adata.X = sp.csc_matrix(adata.X)
    adata.layers["counts"] = adata.X
    adata.raw = adata
    return _h5ad(adata, folder)


def _zarr(adata: ad.AnnData, folder: Path) -> Path:
    adata.write_zarr(folder / "case.zarr")
    return folder / "case.zarr"


def _muon(adata: ad.AnnData, folder: Path) -> Path:
    _h5ad(adata, folder)
    with h5py.File(folder / "case.h5mu", "w") as file, h5py.File(folder / "case.h5ad") as own:
        part = file.create_group("mod/rna")
        for key in own:
            own.copy(key, part)
        own.copy("obs", file)
    (folder / "case.h5ad").unlink()
    return folder / "case.h5mu"


def _tenx(adata: ad.AnnData, folder: Path, version: int = 3) -> Path:
    x = sp.csr_matrix(adata.X).astype(np.int32)
    with h5py.File(folder / "case.h5", "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(x, key)
        group["shape"] = np.array(x.shape[::-1])
        group["barcodes"] = np.array(adata.obs_names, dtype="S")
        ids, symbols = (np.array(v, "S") for v in (adata.var_names, adata.var["gene_symbol"]))
        if version == 2:
            group["genes"], group["gene_names"] = ids, symbols
        else:
            features = group.create_group("features")
            features["id"], features["name"] = ids, symbols
            features["feature_type"] = np.array(["Gene Expression"] * G, "S")
            features["genome"] = np.array(["GRCh38"] * G, "S")
    return folder / "case.h5"


def _tenx_2(adata: ad.AnnData, folder: Path) -> Path:
    return _tenx(adata, folder, 2)


def _loom(adata: ad.AnnData, folder: Path) -> Path:
    with h5py.File(folder / "case.loom", "w") as file:
        file["matrix"] = adata.X.toarray().T
        file["row_attrs/Gene"] = np.array(adata.var["gene_symbol"], "S")
        file["row_attrs/Accession"] = np.array(adata.var_names, "S")
        file["col_attrs/CellID"] = np.array(adata.obs_names, "S")
        file["layers/counts"] = adata.X.toarray().T
    return folder / "case.loom"


def _market(adata: ad.AnnData, folder: Path, start: str = "", zipped: bool = False) -> Path:
    path = folder / "case"
    path.mkdir()
    matrix = io.BytesIO()
    scipy.io.mmwrite(matrix, sp.csr_matrix(adata.X).astype(int).T.tocoo(), field="integer")
    features = zip(adata.var_names, adata.var["gene_symbol"], strict=True)
    files = {
        "matrix.mtx": matrix.getvalue(),
        "barcodes.tsv": "\n".join(adata.obs_names).encode(),
        "features.tsv": "".join(f"{i}\t{s}\tGene Expression\n" for i, s in features).encode(),
    }
    for name, content in files.items():
        data = gzip.compress(content) if zipped else content
        (path / f"{start}{name}{'.gz' if zipped else ''}").write_bytes(data)
    return path


def _triplet(adata: ad.AnnData, folder: Path) -> Path:
    return _market(adata, folder, "GSM1_case_", zipped=True) / "GSM1_case_matrix.mtx.gz"


def _frame(adata: ad.AnnData) -> pd.DataFrame:
    columns = adata.var["gene_symbol"].to_numpy()
    return pd.DataFrame(adata.X.toarray().astype(int), adata.obs_names, columns)


def _csv(adata: ad.AnnData, folder: Path) -> Path:
    _frame(adata).to_csv(folder / "case.csv")
    return folder / "case.csv"


def _turned(adata: ad.AnnData, folder: Path) -> Path:
    frame = _frame(adata).T
    frame.insert(0, "Strand", "+")
    frame.insert(0, "Chr", "1")
    frame.to_csv(folder / "case.txt", sep="\t", index_label="Geneid")
    return folder / "case.txt"


def _long(adata: ad.AnnData, folder: Path) -> Path:
    frame = _frame(adata).T.stack()
    frame = frame[frame > 0].rename_axis(["gene", "cell"]).rename("count")
    frame.to_csv(folder / "case.tsv.gz", sep="\t")
    return folder / "case.tsv.gz"


# -- mutations -------------------------------------------------------------------------------------

# What is done, and what has to come of it: "same", "refused", or "" for either.
type Done = tuple[str, str]


def _bytes(path: Path, rng: Rng) -> Done:
    """Damage bytes of a file of the source."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    file = files[int(rng.integers(len(files)))]
    data = bytearray(file.read_bytes())
    if not data:
        return "empty already", ""
    at, how = int(rng.integers(len(data))), int(rng.integers(5))
    if how == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif how == 1:
        del data[at:]
    elif how == 2:
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif how == 3:
        data[at:at] = rng.bytes(int(rng.integers(1, 40)))
    else:
        data[at : at + 16] = rng.bytes(len(data[at : at + 16]))
    file.write_bytes(data)
    return f"bytes {how} of {file.name} at {at}", ""


def _cut(path: Path, rng: Rng) -> Done:
    """Cut an HDF5 file. Of other damage to its bytes libhdf5 itself may never come back."""
    data = path.read_bytes()
    at = int(rng.integers(1, len(data)))
    path.write_bytes(data[:at])
    return f"cut at {at}", "refused"


def _odd_values(rng: Rng, shape: tuple[int, ...]) -> Any:
    """Values of another kind, mostly of the same shape."""
    n = int(np.prod(shape)) if shape else 1
    makers: list[Callable[[], Any]] = [
        lambda: np.full(shape, np.nan),
        lambda: np.full(shape, -1),
        lambda: np.full(shape, 0.5),
        lambda: np.full(shape, np.inf),
        lambda: np.full(shape, 2**62),
        lambda: np.full(shape, b"text", "S4"),
        lambda: np.full(shape, True),
        lambda: np.full(shape, 1 + 2j),
        lambda: np.zeros(shape, np.float16),
        lambda: np.zeros((*shape, 2), np.int32),
        lambda: np.zeros(n + 3, np.int32),
        lambda: np.zeros(max(0, n - 3), np.int64),
        lambda: np.zeros((0,), np.int32),
        lambda: np.int64(7),
        lambda: np.array([b"\xff\xfe"] * max(1, n), "S2"),
        lambda: np.zeros(shape, [("a", "i4"), ("b", "f4")]),
        lambda: np.arange(n)[::-1].reshape(shape).astype(np.int32),
    ]
    return makers[int(rng.integers(len(makers)))]()


def _members(root: Any, start: str = "") -> Iterator[str]:
    for key in sorted(root):
        yield f"{start}{key}"
        if hasattr(root[key], "keys"):
            yield from _members(root[key], f"{start}{key}/")


def _parts(path: Path, rng: Rng) -> Done:
    """Change a member or an attribute of an HDF5 file or a zarr store."""
    is_zarr = path.is_dir()
    # What readers see is the summary of metadata in the root, which then says what was.
    root = (
        zarr.open_group(path, mode="r+", use_consolidated=False)
        if is_zarr
        else h5py.File(path, "r+")
    )
    try:
        names = list(_members(root))
        name = names[int(rng.integers(len(names)))]
        how = int(rng.integers(6))
        item = root[name]
        if how == 0:
            del root[name]
        elif how in (1, 2) and not hasattr(item, "keys"):
            values = _odd_values(rng, item.shape or ())
            attributes = dict(item.attrs)
            del root[name]
            if is_zarr:
                root.create_array(name, data=np.atleast_1d(values))
            else:
                root[name] = values
            if how == 1:
                for key, value in attributes.items():
                    root[name].attrs[key] = value
        elif how == 3 and len(item.attrs):
            keys = sorted(item.attrs)
            del item.attrs[keys[int(rng.integers(len(keys)))]]
        elif how == 4 and len(item.attrs):
            keys = sorted(item.attrs)
            odd: list[Any] = ["", "array", "dataframe", 3, [1, 2], [-5, 10**9], "csr_matrix", [""]]
            item.attrs[keys[int(rng.integers(len(keys)))]] = odd[int(rng.integers(len(odd)))]
        else:
            del root[name]
            root.create_group(name)
        return f"part {how} {name}", ""
    finally:
        if not is_zarr:
            root.close()


_FIELDS = (
    "", "nan", "NA", "-1", "0.5", "1e400", "x", "é", "\0", '"', "'", "99999999999999999999", "1 2",
    "1,2", "1\t2", "#", "%", "inf", "0x1F", "TRUE", "gene", "1e3", "007", " 3 ", "３",
)  # fmt: skip


def _text_of(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()


def _put(file: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    file.write_bytes(gzip.compress(data) if file.read_bytes()[:2] == b"\x1f\x8b" else data)


def _lines(path: Path, rng: Rng) -> Done:
    """Change a line or a field of a text file of the source."""
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in folder.iterdir() if p.is_file())
    file = files[int(rng.integers(len(files)))]
    lines = _text_of(file).splitlines()
    separator = next((s for s in "\t, " if s in lines[-1]), "\t")
    at, how = int(rng.integers(len(lines))), int(rng.integers(9))
    word = _FIELDS[int(rng.integers(len(_FIELDS)))]
    fields = lines[at].split(separator)
    field = int(rng.integers(len(fields)))
    if how == 0:
        del lines[at]
    elif how == 1:
        lines.insert(at, lines[at])
    elif how == 2:
        lines[at] = ""
    elif how == 3:
        del fields[field]
        lines[at] = separator.join(fields)
    elif how == 4:
        lines[at] += separator + word
    elif how == 5:
        lines = lines[:at]
    elif how == 6:
        lines = [line.replace(separator, "|") for line in lines]
    elif how == 7:
        lines[at] = word * 3
    else:
        fields[field] = word
        lines[at] = separator.join(fields)
    _put(file, "\n".join(lines))
    return f"line {how} {at} of {file.name}: {word!r} in field {field}", ""


def _harmless(path: Path, rng: Rng) -> Done:
    """Write the same otherwise."""
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in folder.iterdir() if p.is_file())
    file = files[int(rng.integers(len(files)))]
    text, how = _text_of(file), int(rng.integers(4))
    if how == 0:
        _put(file, text.replace("\n", "\r\n"))
    elif how == 1 and not file.name.endswith((".mtx", ".mtx.gz")):
        _put(file, "\ufeff" + text)
    elif how == 2:
        data = file.read_bytes()
        zipped = data[:2] == b"\x1f\x8b"
        file.write_bytes(gzip.decompress(data) if zipped else gzip.compress(data))
    else:
        _put(file, text.rstrip("\n") + "\n")
    return f"harmless {how} of {file.name}", "same"


def _folder(path: Path, rng: Rng) -> Done:
    """Remove, empty or swap a file of a folder."""
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in folder.iterdir() if p.is_file())
    file = files[int(rng.integers(len(files)))]
    how = int(rng.integers(3))
    if how == 0:
        file.unlink()
    elif how == 1:
        file.write_bytes(b"")
    else:
        other = files[(files.index(file) + 1) % len(files)]
        data = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    return f"folder {how} {file.name}", "refused"


def _in_memory(adata: ad.AnnData, rng: Rng) -> tuple[Any, str, str]:
    """Change an AnnData; also what has to come of it."""
    adata = adata.copy()
    counts = adata.X.toarray()
    same: dict[str, Any] = {
        "float16": counts.astype(np.float16),
        "float64": counts.astype(np.float64),
        "uint64": counts.astype(np.uint64),
        "int8": counts.astype(np.int8),
        "big endian": counts.astype(">f4"),
        "fortran": np.asfortranarray(counts),
        "sparse array": sp.csr_array(counts),
        "csc array": sp.csc_array(counts),
        "unsorted": _unsorted(counts),
    }
    bad: dict[str, Any] = {
        "complex": counts.astype(np.complex64),
        "object": counts.astype(object),
        "nan": np.where(counts == counts.max(), np.nan, counts),
        "negative": -counts,
        "log": np.log1p(counts),
        "zeros": np.zeros_like(counts),
        "huge": counts.astype(np.float64) * 1e12,
    }
    obs: dict[str, Callable[[], Any]] = {
        "two columns": lambda: pd.concat([adata.obs, adata.obs[["cell_type"]]], axis=1),
        "mixed labels": lambda: adata.obs.assign(
            cell_type=pd.Series([1, "a", None, 2.5] * (N // 4), adata.obs_names, dtype=object)
        ),
        "lists": lambda: adata.obs.assign(
            cell_type=pd.Series([[1], [2]] * (N // 2), adata.obs_names, dtype=object)
        ),
        "intervals": lambda: adata.obs.assign(cell_type=pd.cut(adata.obs["depth"], 3)),
        "dates": lambda: adata.obs.assign(cell_type=pd.Timestamp("2020-01-01")),
        "bools": lambda: adata.obs.assign(cell_type=pd.array([True, None] * (N // 2), "boolean")),
        "number names": lambda: adata.obs.assign(**{"1": 1}),
        "no species": lambda: adata.obs.drop(columns="species"),
        "odd species": lambda: adata.obs.assign(species=[3, None] * (N // 2)),
        "bytes": lambda: adata.obs.assign(cell_type=[b"T", b"\xff"] * (N // 2)),
    }
    var: dict[str, Callable[[], Any]] = {
        "two symbols": lambda: pd.concat([adata.var, adata.var], axis=1),
        "repeated genes": lambda: adata.var.set_axis([adata.var_names[0]] * G),
        "mixed types": lambda: adata.var.assign(feature_types=[1, None] * (G // 2)),
        "other types": lambda: adata.var.assign(feature_types=["Peaks", None] * (G // 2)),
        "lists": lambda: adata.var.assign(
            gene_symbol=pd.Series([["a"], ["b"]] * (G // 2), adata.var_names, dtype=object)
        ),
        "numbers": lambda: adata.var.iloc[:, :0].set_axis([str(i) for i in range(G)]),
        "empty names": lambda: adata.var.set_axis([""] * G),
    }
    group = int(rng.integers(4))
    table: dict[str, Any] = (same, bad, obs, var)[group]
    name = sorted(table)[int(rng.integers(len(table)))]
    warnings.simplefilter("ignore")
    if group < 2:
        adata.X = table[name]
        return adata, f"X {name}", "same" if group == 0 else "refused"
    if group == 2:
        adata.obs = table[name]()
        return adata, f"obs {name}", ""
    adata.var = table[name]()
    return adata, f"var {name}", ""


def _unsorted(counts: np.ndarray) -> sp.csr_matrix:
    """The same matrix with the entries of a row in another order."""
    found = sp.csr_matrix(counts)
    for start, stop in zip(found.indptr, found.indptr[1:], strict=False):
        found.indices[start:stop] = found.indices[start:stop][::-1].copy()
        found.data[start:stop] = found.data[start:stop][::-1].copy()
    found.has_sorted_indices = False
    return found


@dataclass(frozen=True)
class Kind:
    """How a valid source is written, and what may be done to it."""

    write: Callable[[ad.AnnData, Path], Path]
    mutations: tuple[Callable[[Path, Rng], Done], ...]


KINDS = {
    "h5ad": Kind(_h5ad, (_cut, *[_parts] * 5)),
    "h5ad dense": Kind(_dense, (_cut, *[_parts] * 5)),
    "h5ad by columns": Kind(_by_columns, (_cut, *[_parts] * 5)),
    "zarr": Kind(_zarr, (_bytes, _parts, _parts)),
    "h5mu": Kind(_muon, (_cut, *[_parts] * 5)),
    "10x h5": Kind(_tenx, (_cut, *[_parts] * 5)),
    "10x h5 v2": Kind(_tenx_2, (_cut, *[_parts] * 5)),
    "loom": Kind(_loom, (_cut, *[_parts] * 5)),
    "10x mtx": Kind(_market, (_bytes, _lines, _lines, _folder, _harmless)),
    "triplet": Kind(_triplet, (_bytes, _lines, _lines, _folder, _harmless)),
    "csv": Kind(_csv, (_bytes, _lines, _lines, _harmless)),
    "genes as rows": Kind(_turned, (_bytes, _lines, _lines, _harmless)),
    "long": Kind(_long, (_bytes, _lines, _lines, _harmless)),
}
IN_MEMORY = "AnnData"

# -- judging ---------------------------------------------------------------------------------------


def judge(data: Any, name: str, wanted: str, valid: ad.AnnData) -> tuple[str, str]:
    """Open and read a source; its outcome and the message."""
    try:
        with open_source(data, species=None if name == IN_MEMORY else "human") as source:
            blocks = [chunk.counts_CG for chunk in source.chunks(7)]
            counts_CG = sp.vstack(blocks, format="csr")
            genes, n_cells = source.genes, source.n_cells
    except (DataError, ConfigError) as error:
        if wanted == "same":
            return "silent", f"what changes nothing is refused: {error}"
        return ("refused" if name in str(error) else "unnamed"), str(error)
    except Exception:  # noqa: BLE001 - that is what is counted
        return "traceback", traceback.format_exc()
    values = counts_CG.data
    if values.dtype.kind != "i" or (values < 0).any() or counts_CG.shape != (n_cells, len(genes)):
        return (
            "silent",
            f"{values.dtype}, {counts_CG.shape} for {n_cells} cells, {len(genes)} genes",
        )
    if wanted == "refused":
        return "silent", "was read"
    if wanted == "same" and (counts_CG.sum() != valid.X.sum() or counts_CG.shape != valid.shape):
        return "silent", f"{counts_CG.shape} with {counts_CG.sum()} counts"
    return "read", ""


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no answer in {ANSWER_S} s")


def fuzz(kind: str, n: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Make and judge ``n`` inputs of a kind; each gives outcome, what was done, and the message."""
    valid = cells()
    signal.signal(signal.SIGALRM, _too_long)
    for number in range(n):
        rng = np.random.default_rng([seed, number, *kind.encode()])
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data: Any
            if kind == IN_MEMORY:
                data, done, wanted = _in_memory(valid, rng)
                name = IN_MEMORY
            else:
                data = KINDS[kind].write(valid, Path(folder))
                mutations = KINDS[kind].mutations
                done, wanted = mutations[int(rng.integers(len(mutations)))](data, rng)
                name = "case"
            signal.alarm(ANSWER_S)
            try:
                outcome, message = judge(data, name, wanted, valid)
            finally:
                signal.alarm(0)
        yield outcome, f"{kind} {number}: {done}", message


def main(words: list[str]) -> int:
    """Run it; returns the exit status."""
    settings = {"inputs": "5000", "seed": "0", "kind": ""}
    for word in words:
        name, _, value = word.partition("=")
        if name not in settings:
            print(__doc__)
            return 2
        settings[name] = value
    kinds = [settings["kind"]] if settings["kind"] else [*KINDS, IN_MEMORY]
    each = -(-int(settings["inputs"]) // len(kinds))
    bad = 0
    print(f"{'kind':16}" + "".join(f"{o:>11}" for o in ("inputs", *OUTCOMES)))
    for kind in kinds:
        found: Counter[str] = Counter()
        for outcome, done, message in fuzz(kind, each, int(settings["seed"])):
            found[outcome] += 1
            if outcome in OUTCOMES[2:]:
                bad += 1
                print(f"{outcome}: {done}\n{message}", file=sys.stderr)
        print(f"{kind:16}{each:11,}" + "".join(f"{found[o]:11,}" for o in OUTCOMES), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
