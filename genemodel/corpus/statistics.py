"""What a gene does on average: the trivial predictors that a model must beat, and starts from.

Axes: S species, V vocabulary, X panels (sources, each with its own measured genes).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import scipy.sparse as sp

from genemodel.expression.components import right_singular_vectors
from genemodel.expression.normalise import depth_factor, log_normalised

if TYPE_CHECKING:
    from genemodel.corpus.corpus import Corpus

# Cells looked at. Gene means are known to about a per cent long before this many.
SAMPLE = 50_000


@dataclass(frozen=True)
class GeneStatistics:
    """Per-species gene averages over (a sample of) training cells.

    Attributes
    ----------
    frequency_SV
        Share of all detections that fall on a gene; sums to 1 over the species' genes.
    mean_value_SV
        Mean of log1p(count ÷ library × 10⁴) where the gene was detected.
    rate_SV
        Counts of a gene per count of library, over cells whose panel measured it.
    dispersion_V
        Negative-binomial size θ by moments around ``rate × library``: variance = μ + μ² ÷ θ.
    present_SV
        Genes that belong to the species.
    """

    frequency_SV: np.ndarray
    mean_value_SV: np.ndarray
    rate_SV: np.ndarray
    dispersion_V: np.ndarray
    present_SV: np.ndarray

    @classmethod
    def empty(cls, n_species: int, n_tokens: int) -> Self:
        """Hold places for heads whose parameters are about to be loaded."""
        shape = (n_species, n_tokens)
        return cls(
            frequency_SV=np.ones(shape),
            mean_value_SV=np.zeros(shape),
            rate_SV=np.ones(shape),
            dispersion_V=np.ones(n_tokens),
            present_SV=np.ones(shape, bool),
        )

    @classmethod
    def measure(
        cls, corpus: "Corpus", cells: np.ndarray, *, seed: int = 0, sample: int = SAMPLE
    ) -> Self:
        """Measure over at most ``sample`` of ``cells``, chosen block-wise at random."""
        names = corpus.vocabulary.species
        n_species, n_tokens = len(names), len(corpus.vocabulary)
        species_codes, categories = corpus.codes("species")
        species_of = np.array([names.index(c) for c in categories])[species_codes]
        detections = np.zeros((n_species, n_tokens))
        value = np.zeros((n_species, n_tokens))
        total = np.zeros((n_species, n_tokens))
        square = np.zeros((n_species, n_tokens))
        cross = np.zeros((n_species, n_tokens))  # Σ count × library
        library = np.zeros((n_species, n_tokens))  # Σ library over cells that measured the gene
        library_square = np.zeros((n_species, n_tokens))
        for run in draw_blocks(np.asarray(cells), sample, seed):
            block = corpus.read(int(run[0]), int(run[-1]) + 1)
            lengths = np.diff(block.starts_C1)
            all_cells = np.arange(run[0], run[-1] + 1)
            used = np.isin(all_cells, run)
            row_N = np.repeat(np.arange(all_cells.size), lengths)
            kept = used[row_N]
            row_N, gene = row_N[kept], block.gene_N[kept]
            count = block.count_N[kept].astype(np.float64)
            depth = corpus.library_C[all_cells].astype(np.float64)
            at = species_of[all_cells][row_N] * n_tokens + gene
            for into, weight in (
                (detections, None),
                (value, np.log1p(count * depth_factor(depth[row_N]))),
                (total, count),
                (square, count**2),
                (cross, count * depth[row_N]),
            ):
                into += np.bincount(at, weight, n_species * n_tokens).reshape(into.shape)
            pairs = np.stack([species_of[run], corpus.source_C[run]], 1)
            for s, x in np.unique(pairs, axis=0):
                here = depth[used][(pairs == (s, x)).all(1)]
                library[s] += here.sum() * corpus.measured_SV[x]
                library_square[s] += (here**2).sum() * corpus.measured_SV[x]
        present = np.zeros((n_species, n_tokens), bool)
        for s, name in enumerate(names):
            present[s, corpus.vocabulary.tokens_of(name)] = True
        # A gene never seen gets half a detection, so that no probability is zero.
        smoothed = np.where(present, detections + 0.5, 0.0)
        frequency = smoothed / np.maximum(smoothed.sum(1, keepdims=True), 1.0)
        overall = value.sum() / max(detections.sum(), 1.0)
        rate = np.where(present, (total + 0.01) / np.maximum(library, 1.0), 0.0)
        rate = np.where(present & (library == 0), 1e-7, rate)
        mean = rate * library  # Σ μ, and with rate² Σ library² = Σ μ²
        mean_square = rate**2 * library_square
        excess = (square - 2 * rate * cross + mean_square - mean).sum(0)
        dispersion = np.clip(mean_square.sum(0) / np.maximum(excess, 1e-9), 0.05, 100.0)
        return cls(
            frequency_SV=frequency,
            mean_value_SV=np.where(detections > 0, value / np.maximum(detections, 1), overall),
            rate_SV=rate,
            dispersion_V=np.where(total.sum(0) > 10, dispersion, 1.0),
            present_SV=present,
        )


@dataclass(frozen=True)
class PrincipalGenes:
    """Principal components of log1p(count ÷ library × 10⁴), centred within each species.

    Attributes
    ----------
    loading_VK
        Weight of a gene's value in a component; scores have unit variance over the sample.
    offset_SK
        What centring adds to the scores of a species.
    deviation_VK
        How far a gene's value moves per unit of a component's score.
    mean_SV
        Mean value of every gene, zeros included.
    """

    loading_VK: np.ndarray
    offset_SK: np.ndarray
    deviation_VK: np.ndarray
    mean_SV: np.ndarray

    @classmethod
    def measure(
        cls,
        corpus: "Corpus",
        cells: np.ndarray,
        n_components: int,
        *,
        seed: int = 0,
        sample: int = 8192,
    ) -> Self:
        """Measure over at most ``sample`` of ``cells`` by a randomised range finder."""
        names = corpus.vocabulary.species
        codes, categories = corpus.codes("species")
        species_of = np.array([names.index(c) for c in categories])[codes]
        runs = draw_blocks(np.asarray(cells), sample, seed)
        parts, chosen = [], []
        for run in runs:
            block = corpus.read(int(run[0]), int(run[-1]) + 1)
            rows = run - run[0]
            parts.append(block.to_csr(len(corpus.vocabulary))[rows])
            chosen.append(run)
        cells = np.concatenate(chosen)
        X_CV = sp.vstack(parts, format="csr").astype(np.float32)
        X_CV = log_normalised(X_CV, corpus.library_C[cells])
        member_CS = np.zeros((cells.size, len(names)), np.float32)
        member_CS[np.arange(cells.size), species_of[cells]] = 1.0
        mean_SV = (member_CS.T @ X_CV) / np.maximum(member_CS.sum(0), 1.0)[:, None]

        def times(B_VK: np.ndarray) -> np.ndarray:
            return X_CV @ B_VK - member_CS @ (mean_SV @ B_VK)

        def transposed_times(B_CK: np.ndarray) -> np.ndarray:
            return X_CV.T @ B_CK - mean_SV.T @ (member_CS.T @ B_CK)

        k = min(n_components, cells.size - 1)
        V_VK, size = right_singular_vectors(times, transposed_times, X_CV.shape[1], k, seed=seed)
        size = np.maximum(size, 1e-6)
        spread = size / np.sqrt(cells.size)  # standard deviation of the unscaled scores
        loading_VK = (V_VK / spread).astype(np.float32)
        return cls(
            loading_VK=loading_VK,
            offset_SK=(-mean_SV @ loading_VK).astype(np.float32),
            deviation_VK=(V_VK * spread).astype(np.float32),
            mean_SV=mean_SV.astype(np.float32),
        )


def mean_values(
    corpus: "Corpus", cells: np.ndarray, *, seed: int = 0, sample: int = 8192
) -> np.ndarray:
    """Mean of log1p(count ÷ library × 10⁴), zeros included, of every species and gene: (S, V).

    Over at most ``sample`` of ``cells``; zeros for a species without any.
    """
    names = corpus.vocabulary.species
    codes, categories = corpus.codes("species")
    species_of = np.array([names.index(c) for c in categories])[codes]
    total_SV = np.zeros((len(names), len(corpus.vocabulary)), np.float32)
    n_S = np.zeros(len(names))
    for run in draw_blocks(np.asarray(cells), sample, seed):
        block = corpus.read(int(run[0]), int(run[-1]) + 1)
        X_CV = block.to_csr(len(corpus.vocabulary))[run - run[0]].astype(np.float32)
        X_CV = log_normalised(X_CV, corpus.library_C[run])
        for s in np.unique(species_of[run]):
            total_SV[s] += np.asarray(X_CV[species_of[run] == s].sum(0)).ravel()
        n_S += np.bincount(species_of[run], minlength=len(names))
    return (total_SV / np.maximum(n_S, 1)[:, None]).astype(np.float32)


def draw_blocks(cells: np.ndarray, sample: int, seed: int) -> list[np.ndarray]:
    """Draw runs of nearby cells at random until ``sample`` cells are covered."""
    blocks = np.array_split(cells, max(1, cells.size // 512))
    blocks = [
        run for block in blocks for run in np.split(block, np.flatnonzero(np.diff(block) > 512) + 1)
    ]
    order = np.random.default_rng(seed).permutation(len(blocks))
    chosen, n = [], 0
    for b in order:
        if n >= sample:
            break
        chosen.append(blocks[b])
        n += blocks[b].size
    return chosen
