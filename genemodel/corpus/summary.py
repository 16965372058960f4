"""What a corpus knows about genes: sums, frequencies and medians per species, panels of sources."""

from collections.abc import Mapping
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


def write_medians(path: Path, medians: Mapping[str, NonzeroMedians]) -> None:
    """Write histograms by species; few bins of a unit's are not empty, so only those."""
    arrays: dict[str, Any] = {}
    for name, part in medians.items():
        state = part.state()
        count_NS = state.pop("count_NS")
        at = np.flatnonzero(count_NS)
        state |= {"pages": np.array(count_NS.shape), "at_K": at, "count_K": count_NS.ravel()[at]}
        arrays |= {f"{name}/{key}": value for key, value in state.items()}
    np.savez(path, **arrays)


def read_medians(path: Path) -> dict[str, NonzeroMedians]:
    """Read what :func:`write_medians` wrote."""
    states: dict[str, dict[str, Any]] = {}
    with refuse_damage(str(path)), np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            name, _, part = key.rpartition("/")
            states.setdefault(name, {})[part] = stored[key]
    for state in states.values():
        count_NS = np.zeros(state.pop("pages"), np.uint32)
        count_NS.ravel()[state.pop("at_K")] = state.pop("count_K")
        state["count_NS"] = count_NS
    return {name: NonzeroMedians.from_state(state) for name, state in states.items()}


class Statistics:
    """What is accumulated over all cells: histograms per species, the panel of every source."""

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        self.vocabulary = vocabulary
        self.by_species = {
            name: NonzeroMedians(len(vocabulary), per_10k=True) for name in vocabulary.species
        }
        self.panels: list[npt.NDArray[np.bool_]] = []

    def take_in(self, medians: Mapping[str, NonzeroMedians]) -> None:
        """Add the cells of a unit; whole numbers, so the order of units does not matter."""
        for name, part in medians.items():
            if part.n_cells:
                self.by_species[name].merge(part)

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
