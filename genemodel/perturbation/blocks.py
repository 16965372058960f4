"""Shifts on disk while they are made: one file a block of cells, whole or not there.

Axes: C cells, W variants, P perturbations, V vocabulary.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genemodel.inference.shards import Shards
from genemodel.perturbation.passes import GeneSums, Shifts
from genemodel.writing import whole

# Variants of a block: a minute or so of a CPU with a small model, of a GPU with a large one.
BLOCK_VARIANTS = 2048


def block_cells(n_cells: int, n_variants: int) -> int:
    """Cells of a block, so that it has about ``BLOCK_VARIANTS`` variants."""
    per_cell = max(1.0, n_variants / max(1, n_cells))
    return max(1, min(n_cells, int(BLOCK_VARIANTS / per_cell)))


@dataclass(frozen=True)
class Blocks(Shards):
    """Blocks of ``size`` cells each, of all cells that are perturbed."""

    def path(self, number: int) -> Path:
        """Where a block is, or will be."""
        return self.folder / f"{number:06d}.{self.fingerprint[:16]}.npz"

    def has(self, number: int) -> bool:
        """Whether a block is there; it is put in its place when it is whole."""
        return zipfile.is_zipfile(self.path(number))

    def keep(self, number: int, shifts: Shifts) -> None:
        """Write a block."""
        arrays = {name: getattr(shifts, name) for name in Shifts.ARRAYS}
        if shifts.genes is not None:
            there = shifts.genes.n_PV > 0
            arrays["gene_at"] = np.flatnonzero(there)
            for name in ("n_PV", "sum_PV", "square_PV"):
                arrays[name] = getattr(shifts.genes, name)[there]
        with whole(self.path(number)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, shape: tuple[int, int] | None) -> Iterator[Shifts]:
        """Yield the blocks in order; ``shape`` is that of sums over genes, or None."""
        for number in range(len(self)):
            with np.load(self.path(number), allow_pickle=False) as file:
                genes = None
                if shape is not None:
                    genes = GeneSums.zeros(*shape)
                    for name in ("n_PV", "sum_PV", "square_PV"):
                        getattr(genes, name).flat[file["gene_at"]] = file[name]
                yield Shifts(**{name: file[name] for name in Shifts.ARRAYS}, genes=genes)

    def sweep(self) -> None:
        """Remove what belongs to other settings, another model or an earlier input."""
        for file in self.folder.glob("*.npz*"):
            if f".{self.fingerprint[:16]}.npz" not in file.name:
                file.unlink(missing_ok=True)
