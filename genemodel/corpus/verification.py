"""Checking a corpus on disk, file by file and then count by count; never a crash."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genemodel.corpus import manifest as layout
from genemodel.corpus.manifest import Manifest
from genemodel.errors import DataError

if TYPE_CHECKING:
    from genemodel.corpus.corpus import Corpus

# Cells whose counts are held at once.
_BLOCK_CELLS = 8192
# Files that a crash, not damage, leaves behind; the next append removes them.
_LEFT_OVER = ("append.partial/", f".{layout.MANIFEST}.partial", f"{layout.MANIFEST}.partial")


def broken_files(path: Path) -> list[str]:
    """List what is wrong with the files of a corpus, which need not be openable.

    Returns
    -------
    list of str
        One line per fault, each with the file's name; empty where all is well.
    """
    try:
        manifest = Manifest.read(path)
    except DataError as error:
        return [str(error)]
    problems = _written_otherwise(path / layout.MANIFEST)
    for name, record in manifest.objects.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != record.size:
                kind = "truncated" if size < record.size else "longer than written"
                problems.append(f"{name}: {kind}: {size:,} bytes instead of {record.size:,}")
            elif layout.file_record(file).sha256 != record.sha256:
                problems.append(f"{name}: changed: its sha256 is not that of the manifest")
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror or error})")
    for name in layout.files_under(path):
        if name != layout.MANIFEST and name not in manifest.objects:
            kind = "left by an interrupted append" if name.startswith(_LEFT_OVER) else "unlisted"
            problems.append(f"{name}: {kind}: the manifest does not know this file")
    return problems + _inconsistent(manifest)


def _written_otherwise(file: Path) -> list[str]:
    """Whether the manifest has other bytes than were written, though they mean the same."""
    text = file.read_text(encoding="utf-8")
    if text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n":
        return []
    return [f"{file.name}: changed: its values are those that were written, its bytes are not"]


def _inconsistent(manifest: Manifest) -> list[str]:
    """Numbers of the manifest that contradict each other."""
    problems = []
    in_groups = sum(group.n_cells for group in manifest.groups)
    in_sources = sum(source.n_cells for source in manifest.sources)
    if not manifest.n_cells == in_groups == in_sources:
        problems.append(
            f"{layout.MANIFEST}: says {manifest.n_cells:,} cells, its groups have {in_groups:,}, "
            f"its sources {in_sources:,}"
        )
    for group in manifest.groups:
        for key in ("data", "indices"):
            name = f"{layout.COLLECTION}/{group.name}/X/{key}/zarr.json"
            if name not in manifest.objects:
                problems.append(f"{layout.MANIFEST}: lists no {name}")
    return problems


def contradictions(corpus: "Corpus") -> list[str]:
    """Read all counts and compare what was computed from them at build time.

    Returns
    -------
    list of str
        As of :func:`broken_files`.
    """
    from genemodel.cells.kernels import fingerprints, summarise
    from genemodel.corpus.summary import mitochondrial_V

    problems = []
    n_tokens = len(corpus.vocabulary)
    species_C, names = corpus.codes("species")
    sum_SV = np.zeros((len(names), n_tokens))
    nonzero_SV = np.zeros((len(names), n_tokens), np.int64)
    mito_V = mitochondrial_V(corpus.vocabulary)
    print_NP = corpus.prints_CP()
    first = 0
    for group in corpus.manifest.groups:
        index = f"{layout.INDEX}/{group.name}.npz"
        problems += _shape_stated(corpus.path, group.name, group.n_cells, n_tokens)
        for start in range(first, first + group.n_cells, _BLOCK_CELLS):
            stop = min(start + _BLOCK_CELLS, first + group.n_cells)
            block = corpus.read(start, stop)
            step = np.diff(block.gene_N)
            step[block.starts_C1[1:-1] - 1] = 1  # from one cell to the next
            if (step <= 0).any():
                problems.append(
                    f"{layout.COLLECTION}/{group.name}: genes of a cell do not ascend (cells "
                    f"{start:,} to {stop:,})"
                )
            library_C, mito_C, checksum_C = summarise(
                block.starts_C1, block.gene_N, block.count_N, mito_V
            )
            print_CP = fingerprints(block.starts_C1, block.gene_N, block.count_N, n_tokens)
            for key, found, stored in (
                ("library", library_C, corpus.library_C),
                ("mito", mito_C, corpus.mito_C),
                ("checksum", checksum_C, corpus.checksum_C),
                ("prints", print_CP, print_NP),
            ):
                if not np.array_equal(found, stored[start:stop]):
                    problems.append(
                        f"{index}: {key} does not fit the counts (cells {start:,} to {stop:,})"
                    )
            row_N = np.repeat(species_C[start:stop], np.diff(block.starts_C1))
            for s in range(len(names)):
                genes, counts = block.gene_N[row_N == s], block.count_N[row_N == s]
                sum_SV[s] += np.bincount(genes, counts, n_tokens)
                nonzero_SV[s] += np.bincount(genes, minlength=n_tokens)
        first += group.n_cells
    for s, name in enumerate(names):
        known = corpus.statistics.get(name)
        n_cells = int((species_C == s).sum())
        if known is None:
            if n_cells:
                problems.append(f"{corpus.manifest.statistics}: lacks {name}")
        elif not (
            known.n_cells == n_cells
            and np.array_equal(known.sum_V, sum_SV[s])
            and np.array_equal(known.nonzero_V, nonzero_SV[s])
        ):
            problems.append(
                f"{corpus.manifest.statistics}: sums of {name} do not fit the stored counts"
            )
    return problems


def _shape_stated(path: Path, group: str, n_cells: int, n_tokens: int) -> list[str]:
    """Whether the AnnData group says the shape that the manifest says."""
    name = f"{layout.COLLECTION}/{group}/X/zarr.json"
    stated = json.loads((path / name).read_text())["attributes"]["shape"]
    if stated != [n_cells, n_tokens]:
        return [f"{name}: says {stated}, the manifest {[n_cells, n_tokens]}"]
    return []
