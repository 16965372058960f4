"""What a corpus knows about genes: sums, frequencies and medians per species, panels of sources."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genemodel.cells.matrices import refuse_damage
from genemodel.genes.medians import NonzeroMedians
from genemodel.genes.vocabulary import GeneVocabulary


def mitochondrial_V(vocabulary: GeneVocabulary) -> npt.NDArray[np.bool_]:
    """Tokens whose symbol in any species begins with ``MT-`` (``mt-``), bool (V,)."""
    genes = vocabulary.genes
    mito = genes["symbol"].str.lower().str.startswith("mt-")
    result = np.zeros(len(vocabulary), bool)
    result[genes["token"][mito]] = True
    return result


class Statistics:
    """What is accumulated over all cells: histograms per species, the panel of every source."""

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        self.vocabulary = vocabulary
        self.by_species = {
            name: NonzeroMedians(len(vocabulary), per_10k=True) for name in vocabulary.species
        }
        self.panels: list[npt.NDArray[np.bool_]] = []

    def write(self, statistics: Path, medians: Path) -> None:
        """Write the results, and apart from them the histograms."""
        overall = NonzeroMedians(len(self.vocabulary), per_10k=True)
        results: dict[str, Any] = {
            "species": np.array(list(self.by_species), dtype=str),
            "panels": np.packbits(np.array(self.panels, bool), axis=1),
        }
        state: dict[str, Any] = {}
        for name, part in self.by_species.items():
            if part.n_cells:
                overall.merge(part)
            results |= {
                f"{name}/sum_V": part.sum_V,
                f"{name}/nonzero_V": part.nonzero_V,
                f"{name}/medians_V": part.medians_V(),
                f"{name}/n_cells": np.array(part.n_cells),
            }
            if part.n_cells:
                state |= {f"{name}/{key}": value for key, value in part.state().items()}
        results["medians_V"] = overall.medians_V()
        np.savez_compressed(statistics, **results)
        np.savez_compressed(medians, **state)

    @classmethod
    def read(cls, vocabulary: GeneVocabulary, statistics: Path, medians: Path) -> "Statistics":
        """Read both files, to go on from them."""
        result = cls(vocabulary)
        with refuse_damage(str(statistics)), np.load(statistics, allow_pickle=False) as stored:
            panels = np.unpackbits(stored["panels"], axis=1, count=len(vocabulary)).astype(bool)
            result.panels = list(panels)
        with refuse_damage(str(medians)), np.load(medians, allow_pickle=False) as stored:
            for name in vocabulary.species:
                parts = {
                    key.removeprefix(f"{name}/"): stored[key]
                    for key in stored.files
                    if key.startswith(f"{name}/")
                }
                if parts:
                    result.by_species[name] = NonzeroMedians.from_state(parts)
        return result
