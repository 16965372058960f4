"""Which genes are perturbed, alone and together, and which are like them.

Axes: C cells, V vocabulary, P perturbations, K neighbours, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from genemodel.batches.window import Window
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import N_SPECIAL, GeneVocabulary
from genemodel.perturbation.passes import Perturber
from genemodel.settings import nearest

ALL = "all"
# Between genes that are perturbed together: `STAT1+JAK2`.
TOGETHER = "+"


@dataclass(frozen=True)
class Perturbation:
    """Genes that are perturbed together.

    Attributes
    ----------
    tokens
        Of the genes, in the order given: the first goes to the very front.
    part
        ``test``; ``null``: perturbed for comparison with genes that were asked for.
    """

    tokens: tuple[int, ...]
    part: str = "test"


@dataclass(frozen=True)
class GeneTable:
    """What a gene is like in the cells that are perturbed, (V,); the features of matched nulls.

    Attributes
    ----------
    n_V
        Cells whose tokens hold it.
    coverage_V
        Share of the cells.
    rank_V
        Mean rank where it is held, from 0 (front) to 1 (end); NaN where never.
    mean_V
        Mean of log1p(counts per 10⁴) over all cells.
    """

    n_V: np.ndarray
    coverage_V: np.ndarray
    rank_V: np.ndarray
    mean_V: np.ndarray

    @classmethod
    def of(cls, perturber: Perturber, window: Window, rows: np.ndarray) -> "GeneTable":
        """Count over cells, as the model sees them: within its context."""
        n_tokens = len(perturber.bundle.vocabulary)
        n_V, rank_V, mean_V = np.zeros(n_tokens), np.zeros(n_tokens), np.zeros(n_tokens)
        for batch, _ in perturber.batches(window, rows):
            n = batch.n_tokens
            gene_T, cell_T = batch.gene_T[:n].numpy(), batch.segment_T[:n].numpy()
            relative_T = batch.rank_T[:n].numpy() / np.maximum(batch.length_C[cell_T] - 1, 1)
            is_gene_T = gene_T >= perturber.bundle.tokens.first_gene
            gene_T = gene_T[is_gene_T]
            n_V += np.bincount(gene_T, minlength=n_tokens)
            rank_V += np.bincount(gene_T, relative_T[is_gene_T], n_tokens)
            mean_V += np.bincount(gene_T, batch.value_T[:n].numpy()[is_gene_T], n_tokens)
        with np.errstate(invalid="ignore"):
            return cls(n_V.astype(np.int64), n_V / rows.size, rank_V / n_V, mean_V / rows.size)

    def covered_V(self, min_cells: int, min_coverage: float) -> np.ndarray:
        """Genes in enough of the cells, bool (V,)."""
        return (self.n_V >= max(min_cells, 1)) & (self.coverage_V >= min_coverage)


class GeneNames:
    """Names of tokens, and tokens of names, in the species of the cells.

    ``number_V`` are the numbers by which tables name tokens, where they are not our own: those of
    an imported model's dictionary.
    """

    def __init__(
        self,
        vocabulary: GeneVocabulary,
        species: Sequence[str],
        number_V: np.ndarray | None = None,
    ) -> None:
        self.vocabulary, self.species = vocabulary, tuple(species)
        self.number_V = np.arange(len(vocabulary)) if number_V is None else number_V
        self._symbol = [""] * len(vocabulary)
        self._id = [""] * len(vocabulary)
        for name in reversed(self.species):  # the first species has the last word
            rows = vocabulary.species_rows(name)
            for token, symbol, gene in zip(
                rows["token"], rows["symbol"], rows["ensembl_id"], strict=True
            ):
                self._symbol[int(token)], self._id[int(token)] = str(symbol), str(gene)

    def symbol(self, tokens: Sequence[int]) -> str:
        """Symbols of genes, joined."""
        return TOGETHER.join(self._symbol[t] or self._id[t] for t in tokens)

    def number(self, tokens: Sequence[int]) -> str:
        """Numbers of genes, joined."""
        return TOGETHER.join(str(int(self.number_V[t])) for t in tokens)

    def ensembl(self, tokens: Sequence[int]) -> str:
        """Ids of genes, joined."""
        return TOGETHER.join(self._id[t] for t in tokens)

    def tokens(self, names: Sequence[str], setting: str) -> list[int]:
        """Find genes by symbol, id or alias.

        Raises
        ------
        DataError
            One is unknown, or fits two genes.
        """
        token_N = np.full(len(names), -1, np.int64)
        ambiguous: set[str] = set()
        for species in self.species:
            match = self.vocabulary.match(
                names, species=species, min_fraction=0.0, min_genes=0, among=self.species
            )
            token_N = np.where(token_N < 0, match.token_G, token_N)
            ambiguous |= set(match.ambiguous)
        missing = [name for name, token in zip(names, token_N, strict=True) if token < 0]
        if missing:
            why = "fits two genes" if missing[0] in ambiguous else "is no gene"
            near = nearest(missing[0], filter(None, self._symbol))
            raise DataError(
                f"{setting}: {missing[0]!r} {why} of the model's vocabulary "
                f"({', '.join(self.species)})"
                + (f": did you mean {near!r}? " if near and why == "is no gene" else ". ")
                + "Give symbols or Ensembl ids"
                + (f"; {len(missing) - 1} more are unknown." if len(missing) > 1 else ".")
            )
        return [int(token) for token in token_N]


def asked_for(
    genes: Sequence[str],
    names: GeneNames,
    *,
    combos: int = 1,
    anchor: str = "",
    covered_V: np.ndarray,
) -> list[Perturbation]:
    """Return the perturbations that settings name, each once.

    Parameters
    ----------
    genes
        Names; ``A+B`` together; ``all`` for each gene that is covered.
    names
        Of the vocabulary.
    combos
        Up to so many of them together, in every combination.
    anchor
        A gene that each of the others is perturbed with, beside each alone.
    covered_V
        Which ``all`` means.
    """
    if not genes:
        raise ConfigError("genes names none: give symbols or Ensembl ids, or genes=all.")
    if ALL in genes and len(genes) > 1:
        raise ConfigError(f"genes names {ALL!r} and others: give {ALL!r} alone, or the names.")
    singles: list[tuple[int, ...]]
    if ALL in genes:
        singles = [(int(token),) for token in np.flatnonzero(covered_V) if token >= N_SPECIAL]
    else:
        flat = [name for entry in genes for name in entry.split(TOGETHER)]
        found = iter(names.tokens(flat, "genes"))
        singles = [tuple(next(found) for _ in entry.split(TOGETHER)) for entry in genes]
    for entry in singles:
        if len(set(entry)) < len(entry):
            raise ConfigError(f"genes: {names.symbol(entry)} names a gene twice.")
    wanted = list(singles)
    if anchor:
        (token,) = names.tokens([anchor], "anchor_gene")
        wanted = [(token,), *wanted, *((token, *s) for s in singles if token not in s)]
    if combos > 1:
        for size in range(2, combos + 1):
            for chosen in combinations(singles, size):
                together = tuple(token for entry in chosen for token in entry)
                if len(set(together)) == len(together):
                    wanted.append(together)
    seen: dict[frozenset[int], tuple[int, ...]] = {}
    for entry in wanted:
        seen.setdefault(frozenset(entry), entry)
    return [Perturbation(tokens) for tokens in seen.values()]


class MatchedGenes:
    """Genes alike in rank, detection and mean.

    Each feature is replaced by its place among the genes, so that none outweighs the others.
    """

    def __init__(self, table: GeneTable, among_V: np.ndarray) -> None:
        from scipy.stats import rankdata
        from sklearn.neighbors import NearestNeighbors

        self.tokens = np.flatnonzero(among_V & (np.arange(among_V.size) >= N_SPECIAL))
        features = (table.rank_V, table.coverage_V, table.mean_V)
        self._feature_PF = np.column_stack(
            [rankdata(values[self.tokens]) / max(1, self.tokens.size) for values in features]
        )
        self._sorted = [np.sort(values[self.tokens]) for values in features]
        self._values = features
        self._neighbours = NearestNeighbors().fit(self._feature_PF) if self.tokens.size else None

    def like(self, token: int, k: int, without: frozenset[int]) -> list[int]:
        """Return up to ``k`` genes, the most alike first."""
        if self._neighbours is None:
            return []
        at_F = [
            np.searchsorted(order, values[token]) / max(1, self.tokens.size)
            for order, values in zip(self._sorted, self._values, strict=True)
        ]
        n = min(self.tokens.size, k + len(without) + 1)
        index = self._neighbours.kneighbors([at_F], n, return_distance=False)[0]
        found = [int(self.tokens[i]) for i in index]
        return [t for t in found if t != token and t not in without][:k]


def with_nulls(
    wanted: list[Perturbation], matched: MatchedGenes, k: int, table: GeneTable
) -> tuple[list[Perturbation], list[list[int]]]:
    """Add perturbations of matched genes, and say for each perturbation which are its nulls.

    A group's nulls are groups of genes that are like its members, one for one. Where every gene is
    tested (``all``), the nulls of one are others that are tested.

    Returns
    -------
    The perturbations, and for each of the tested the positions of its nulls among them.
    """
    place = {frozenset(one.tokens): i for i, one in enumerate(wanted)}
    everything = list(wanted)
    listed = frozenset(t for one in wanted for t in one.tokens)
    # A sweep compares tested genes with tested genes; of a short list the others are added.
    sweep = len(listed) > matched.tokens.size / 2
    nulls: list[list[int]] = []
    for one in wanted:
        avoid = frozenset(one.tokens) if sweep else listed
        if any(table.n_V[token] == 0 for token in one.tokens):
            nulls.append([])  # of a gene that no cell holds nobody knows what is like it
            continue
        alike = [matched.like(token, k + len(one.tokens), avoid) for token in one.tokens]
        own: list[int] = []
        used: set[frozenset[int]] = set()
        for i in range(min(map(len, alike), default=0)):
            group: list[int] = []
            for choice in alike:
                # The next that this group does not have yet.
                more = [t for t in choice[i:] if t not in group]
                if more:
                    group.append(more[0])
            key = frozenset(group)
            if len(group) < len(one.tokens) or key in used:
                continue
            used.add(key)
            if key not in place:
                place[key] = len(everything)
                everything.append(replace(one, tokens=tuple(group), part="null"))
            own.append(place[key])
            if len(own) == k:
                break
        nulls.append(own)
    return everything, nulls


def facts(wanted: Sequence[Perturbation], names: GeneNames, table: GeneTable) -> pd.DataFrame:
    """One row a perturbation: official names, then what the genes are like."""
    return pd.DataFrame(
        {
            "Gene": [names.number(one.tokens) for one in wanted],
            "Gene_name": [names.symbol(one.tokens) for one in wanted],
            "Ensembl_ID": [names.ensembl(one.tokens) for one in wanted],
            "Mean_rank": [float(np.mean(table.rank_V[list(one.tokens)])) for one in wanted],
            "Mean_expression": [float(np.mean(table.mean_V[list(one.tokens)])) for one in wanted],
        }
    )
