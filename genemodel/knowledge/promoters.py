"""Promoters as k-mer frequencies: what stands around a gene's start, read in its own direction.

Axes: N genes, K k-mers (4 to the power of k).
"""

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.genes.tables import read_table
from genemodel.knowledge.sources import GENE, Columns

_CHROM = ("chrom", "chromosome", "chromosome_name", "seqname", "chr", "contig")
_TSS = ("tss", "transcription_start_site", "position")
_START = ("start", "gene_start", "txstart")
_END = ("end", "gene_end", "txend")
_STRAND = ("strand",)
# A, C, G, T in either case; all else is no base.
_CODE = np.full(256, 4, np.uint8)
for _code, _base in enumerate("ACGT"):
    _CODE[ord(_base)] = _CODE[ord(_base.lower())] = _code


def sequences(path: str) -> Iterator[tuple[str, np.ndarray]]:
    """Give name and codes (0–3, 4 for no base) of every sequence of a FASTA file, gzipped or not.

    One sequence is held at a time.
    """
    opened = gzip.open(path, "rb") if Path(path).suffix == ".gz" else Path(path).open("rb")
    name: str | None = None
    parts: list[bytes] = []
    try:
        with opened as file:
            for line in file:
                if line.startswith(b">"):
                    if name is not None:
                        yield name, _CODE[np.frombuffer(b"".join(parts), np.uint8)]
                    words = line[1:].split()
                    if not words:
                        raise DataError(f"sequences: {path} has a header without a name")
                    name, parts = words[0].decode("utf-8", "replace"), []
                elif name is None and line.strip():
                    raise DataError(
                        f"sequences: {path} is no FASTA file: its first line does not begin with >"
                    )
                else:
                    parts.append(line.strip())
    except FileNotFoundError as error:
        raise DataError(f"sequences: {path} does not exist") from error
    except (OSError, EOFError) as error:
        raise DataError(f"sequences: {path} cannot be read ({error})") from error
    if name is None:
        raise DataError(f"sequences: {path} holds no sequence")
    yield name, _CODE[np.frombuffer(b"".join(parts), np.uint8)]


def starts(path: str, columns: Columns) -> pd.DataFrame:
    """Read where genes start: columns gene, chrom, tss (1-based), forward.

    A column ``tss`` says it; otherwise it is ``start`` on the forward strand and ``end`` on the
    other, as gene tables have them.
    """
    table = read_table(path, "starts table")
    gene = columns.find(table, "gene", GENE, path, needed=True)
    chrom = columns.find(table, "chrom", _CHROM, path, needed=True)
    strand = columns.find(table, "strand", _STRAND, path, needed=True)
    tss = columns.find(table, "tss", _TSS, path, needed=False)
    forward = table[strand].str.strip().isin(["+", "1", "+1", "forward"])
    backward = table[strand].str.strip().isin(["-", "-1", "reverse"])
    if not (forward | backward).any():
        raise DataError(f"{path}: column {strand} holds neither + nor -")
    if tss is not None:
        position = table[tss]
    else:
        start = columns.find(table, "start", _START, path, needed=True)
        end = columns.find(table, "end", _END, path, needed=True)
        position = table[start].where(forward, table[end])
    found = pd.DataFrame(
        {
            "gene": table[gene].str.strip(),
            "chrom": table[chrom].str.strip(),
            "tss": pd.to_numeric(position, errors="coerce"),
            "forward": forward,
        }
    )
    # Genes on unplaced contigs of other builds have no coordinates: nothing is known of them.
    return found[(forward | backward) & found["tss"].notna() & (found["gene"] != "")]


def kmers(codes: np.ndarray, k: int) -> np.ndarray:
    """Count the k-mers of a sequence of codes, overlapping, (4^k,); none with a 4 in it."""
    if codes.size < k:
        return np.zeros(4**k)
    index = np.zeros(codes.size - k + 1, np.int64)
    valid = np.ones(index.size, bool)
    for step in range(k):
        part = codes[step : step + index.size]
        index = index * 4 + np.minimum(part, 3)
        valid &= part < 4
    return np.bincount(index[valid], minlength=4**k).astype(np.float64)


def window(codes: np.ndarray, tss: int, *, forward: bool, upstream: int, downstream: int):  # type: ignore[no-untyped-def]
    """Codes around a start (1-based), turned so that transcription runs to the right.

    ``upstream`` bases before the start, ``downstream`` from it on, fewer at a sequence's end.
    """
    at = tss - 1
    low, high = (
        (at - upstream, at + downstream) if forward else (at - downstream + 1, at + upstream + 1)
    )
    part = codes[max(low, 0) : max(high, 0)]
    return part if forward else _complement(part[::-1])


def _complement(codes: np.ndarray) -> np.ndarray:
    return np.where(codes < 4, 3 - np.minimum(codes, 3), 4).astype(np.uint8)


def promoters(
    fasta: str, where: pd.DataFrame, *, k: int, upstream: int, downstream: int
) -> tuple[list[str], np.ndarray]:
    """Genes and the square roots of their k-mers' shares (N, K); genes without sequence left out.

    Names of sequences match with and without ``chr``. Square roots make distances of shares
    comparable (Hellinger), rare k-mers not lost beside runs of one base.
    """
    by_chrom = {_plain(str(name)): rows for name, rows in where.groupby("chrom")}
    genes: list[str] = []
    found: list[np.ndarray] = []
    seen: list[str] = []
    for name, codes in sequences(fasta):
        seen.append(name)
        rows = by_chrom.get(_plain(name))
        if rows is None:
            continue
        for gene, tss, forward in zip(rows["gene"], rows["tss"], rows["forward"], strict=True):
            count_K = kmers(
                window(codes, int(tss), forward=forward, upstream=upstream, downstream=downstream),
                k,
            )
            # Half a window of real bases at least: less says more of the gap than of the gene.
            if count_K.sum() >= (upstream + downstream) / 2:
                genes.append(gene)
                found.append(np.sqrt(count_K / count_K.sum()).astype(np.float32))
    if not genes:
        raise DataError(
            f"sequences: no start lies in {fasta}: its sequences are {_some(seen)}, those of the "
            f"starts table {_some(sorted(by_chrom))}"
        )
    return genes, np.stack(found)


def _plain(chrom: str) -> str:
    return chrom.removeprefix("chr")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
