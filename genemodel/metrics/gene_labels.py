"""How well labels of genes are told apart: areas under both curves, with intervals over genes.

Axes: G genes, L labels, B draws of the bootstrap, U distinct scores.
"""

from dataclasses import asdict, dataclass

import numpy as np

# Draws whose weights are held at once: 64 × 10,000 genes are 5 MB.
_AT_ONCE = 64
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class GeneScores:
    """Scores of one method on one task.

    Attributes
    ----------
    genes, positives
        How many genes are scored; those with the last label.
    auroc, auprc
        Of the last of two labels; of more, the mean over labels of one against the others.
    auroc_low, auroc_high, auprc_low, auprc_high
        95 % intervals of a bootstrap over genes, drawn within labels.
    """

    genes: int
    positives: int
    auroc: float
    auroc_low: float
    auroc_high: float
    auprc: float
    auprc_low: float
    auprc_high: float

    def values(self) -> dict[str, float]:
        """As plain values."""
        return asdict(self)


def gene_scores(
    code_G: np.ndarray, score_GL: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> GeneScores:
    """Score predictions of genes, one a gene.

    Parameters
    ----------
    code_G
        Labels.
    score_GL
        Score of every label, higher for more likely; rows with NaN are left out.
    draws
        Of the bootstrap; 0 for no intervals.
    seed
        Of these.
    """
    known_G = np.isfinite(score_GL).all(1)
    code_G, score_GL = code_G[known_G], score_GL[known_G]
    n_labels = score_GL.shape[1]
    sizes_L = np.bincount(code_G, minlength=n_labels)
    if (sizes_L == 0).any():
        nan = float("nan")
        return GeneScores(len(code_G), int(sizes_L[-1]), nan, nan, nan, nan, nan, nan)
    whole = _curves(code_G, score_GL, np.ones((1, len(code_G))))[:, 0]
    low, high = np.full(2, np.nan), np.full(2, np.nan)
    if draws:
        low, high = np.quantile(_drawn(code_G, score_GL, draws, seed), _TAILS, axis=1)
    return GeneScores(
        len(code_G), int(sizes_L[-1]), float(whole[0]), float(low[0]), float(high[0]),
        float(whole[1]), float(low[1]), float(high[1]),
    )  # fmt: skip


def auroc_gain(
    code_G: np.ndarray,
    score_GL: np.ndarray,
    other_GL: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Give how much higher one AUROC is than another of the same genes, and its 95 % interval."""
    known_G = np.isfinite(score_GL).all(1) & np.isfinite(other_GL).all(1)
    code_G, score_GL, other_GL = code_G[known_G], score_GL[known_G], other_GL[known_G]
    if (np.bincount(code_G, minlength=score_GL.shape[1]) == 0).any():
        return float("nan"), float("nan"), float("nan")
    ones = np.ones((1, len(code_G)))
    gain = _curves(code_G, score_GL, ones)[0, 0] - _curves(code_G, other_GL, ones)[0, 0]
    # Of one seed the draws are the same genes on both sides.
    drawn_B = (_drawn(code_G, score_GL, draws, seed) - _drawn(code_G, other_GL, draws, seed))[0]
    low, high = np.quantile(drawn_B, _TAILS)
    return float(gain), float(low), float(high)


def _drawn(code_G: np.ndarray, score_GL: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Areas of genes drawn again within their labels, (2, B)."""
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, draws, _AT_ONCE):
        n = min(_AT_ONCE, draws - start)
        weight_BG = np.zeros((n, len(code_G)))
        for code in np.unique(code_G):
            of = np.flatnonzero(code_G == code)
            weight_BG[:, of] = rng.multinomial(of.size, np.full(of.size, 1 / of.size), n)
        parts.append(_curves(code_G, score_GL, weight_BG))
    return np.concatenate(parts, 1)


def _curves(code_G: np.ndarray, score_GL: np.ndarray, weight_BG: np.ndarray) -> np.ndarray:
    """Areas of the positive label of two, or the mean over all of more, (2, B)."""
    n_labels = score_GL.shape[1]
    labels = [1] if n_labels == 2 else range(n_labels)
    # Of two labels what counts is by how much the one is more likely.
    margin_GL = score_GL - score_GL[:, ::-1] if n_labels == 2 else score_GL
    areas = [_areas(code_G == k, margin_GL[:, k], weight_BG) for k in labels]
    mean: np.ndarray = np.mean(areas, axis=0)
    return mean


def _areas(positive_G: np.ndarray, score_G: np.ndarray, weight_BG: np.ndarray) -> np.ndarray:
    """AUROC and AUPRC (average precision) of weighted genes, (2, B); ties count half."""
    order = np.argsort(-score_G, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score_G[order]) != 0])
    weight_BG = weight_BG[:, order]
    yes_BU = np.add.reduceat(weight_BG * positive_G[order], starts, axis=1)
    no_BU = np.add.reduceat(weight_BG * ~positive_G[order], starts, axis=1)
    yes_so_far, no_so_far = yes_BU.cumsum(1), no_BU.cumsum(1)
    n_yes, n_no = yes_so_far[:, -1], no_so_far[:, -1]
    auroc = (no_BU * (yes_so_far - yes_BU / 2)).sum(1) / (n_yes * n_no)
    precision_BU = yes_so_far / np.maximum(yes_so_far + no_so_far, 1e-12)
    auprc = (yes_BU * precision_BU).sum(1) / n_yes
    return np.stack([auroc, auprc])
