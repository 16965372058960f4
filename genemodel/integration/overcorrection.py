"""Did a population that only one batch has vanish into another? A small check afterwards.

Axes: C cells, D width, P populations.
"""

from dataclasses import dataclass

import numpy as np

from genemodel.expression.neighbours import nearest

# Fewer cells have no neighbourhood to lose; more than the next two only cost time.
MIN_CELLS = 10
LOOKED_AT = 200
OTHERS = 5000
NEIGHBOURS = 15


@dataclass(frozen=True)
class Vanished:
    """A private population that moved onto another one.

    ``foreign_before`` and ``foreign_after`` are the mean shares of other populations among the
    nearest cells; ``into`` is the population that most of them belong to.
    """

    population: int
    into: int
    foreign_before: float
    foreign_after: float


def private_populations(
    population_C: np.ndarray, batch_C: np.ndarray, evidence_C: np.ndarray, *, trusted: bool
) -> np.ndarray:
    """Find the populations that one batch alone holds.

    Parameters
    ----------
    population_C
        Code of each cell's population, -1 for none.
    batch_C
        Batch code.
    evidence_C
        Evidence that a cell's population is shared, 0 to 1.
    trusted
        Populations are labels and not clusters: one whose cells are (all but 5 %) of one batch is
        private, whatever the evidence says; a cluster of one batch may just be a batch effect.
    """
    found = []
    for population in np.unique(population_C[population_C >= 0]):
        cells = np.flatnonzero(population_C == population)
        if len(cells) < MIN_CELLS:
            continue
        of_one_batch = np.bincount(batch_C[cells]).max() >= 0.95 * len(cells)
        if evidence_C[cells].mean() < 0.1 or (trusted and of_one_batch):
            found.append(int(population))
    return np.array(found, np.int64)


def vanished(
    before_CD: np.ndarray,
    after_CE: np.ndarray,
    population_C: np.ndarray,
    private_P: np.ndarray,
    *,
    seed: int = 0,
) -> list[Vanished]:
    """Find private populations whose cells have others as neighbours now and had not before.

    A population is named when the share of foreign cells among the 15 nearest rose by 0.3 or more
    and is now above one half. At most 200 cells of it and 5,000 others are looked at.
    """
    rng = np.random.default_rng(seed)
    out = []
    for population in private_P:
        own = np.flatnonzero(population_C == population)
        own = rng.permutation(own)[:LOOKED_AT]
        others = rng.permutation(np.flatnonzero(population_C != population))
        # As many of both sides are left out, so that density alone cannot make cells foreign.
        share = len(own) / max(int((population_C == population).sum()), 1)
        others = others[: min(OTHERS, max(1, int(share * len(others))))]
        pool = np.concatenate([own, others])
        foreign = {}
        for name, space in (("before", before_CD), ("after", after_CE)):
            near_CK = nearest(space[own], space[pool], NEIGHBOURS + 1)[0][:, 1:]
            foreign[name] = near_CK >= len(own)
        before, after = float(foreign["before"].mean()), float(foreign["after"].mean())
        if after - before >= 0.3 and after > 0.5:
            near_CK, _ = nearest(after_CE[own], after_CE[others], NEIGHBOURS)
            met = population_C[others][near_CK.ravel()]
            met = met[met >= 0]
            into = int(np.bincount(met).argmax()) if met.size else -1
            out.append(Vanished(int(population), into, before, after))
    return out
