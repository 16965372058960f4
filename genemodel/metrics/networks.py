"""Scores of a gene network against edges that are known, with intervals over transcription factors.

What is scored is an order of pairs. Precision is divided by the share of true pairs, because truths
differ a hundredfold in how many edges they have: 1 is chance, whatever the truth.

Axes: S sources (transcription factors), T targets, N pairs that count, B resamples of the sources.
"""

from dataclasses import dataclass

import numpy as np

# Pairs that are no edges, on either side of each that is one: alike in expression, louder and
# quieter, and in how many others regulate the target. At ten the mean of a hundred edges is as sure
# as the edges let it be.
MATCHED_A_SIDE = 5
# Of fewer sources no interval is given: resampling two says nothing.
MIN_SOURCES = 3


@dataclass(frozen=True)
class Pairs:
    """The pairs that count, and which of them are edges.

    Attributes
    ----------
    source_N, target_N
        Row and column of every pair.
    edge_N
        Whether it is an edge, bool.
    n_sources
        S.
    """

    source_N: np.ndarray
    target_N: np.ndarray
    edge_N: np.ndarray
    n_sources: int

    @classmethod
    def of(cls, edge_ST: np.ndarray, counts_ST: np.ndarray) -> "Pairs":
        """Take the pairs of a matrix that count, (S, T) bool."""
        source_N, target_N = np.nonzero(counts_ST)
        return cls(source_N, target_N, edge_ST[source_N, target_N], edge_ST.shape[0])

    @property
    def density(self) -> float:
        """Share of the pairs that are edges: the precision of an order by chance."""
        return float(self.edge_N.mean()) if self.edge_N.size else float("nan")


@dataclass(frozen=True)
class Ranking:
    """What an order of pairs is worth; arrays hold the resamples, the first is of all sources.

    Attributes
    ----------
    auprc_ratio_B
        Average precision ÷ density.
    epr_B
        Precision among as many pairs as there are edges, ÷ density.
    matched_auroc_B
        Share of (edge, matched pair that is none) of one source in which the edge comes first.
    """

    auprc_ratio_B: np.ndarray
    epr_B: np.ndarray
    matched_auroc_B: np.ndarray


def resampled(n_sources: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each source is drawn, (1 + B, S): all of them once, then with replacement."""
    rng = np.random.default_rng(seed)
    first = np.ones((1, n_sources))
    if n_sources < MIN_SOURCES:
        return first
    drawn = rng.multinomial(n_sources, np.full(n_sources, 1 / n_sources), n_resamples)
    return np.concatenate([first, drawn])


def interval(values_B: np.ndarray) -> tuple[float, float, float]:
    """Estimate and its 95 % interval from the resamples; NaN where there are none.

    The basic interval, quantiles reflected at the estimate: sources that are drawn twice make
    average precision larger than it is, of an order by chance too. Of such orders over twelve
    sources it holds 1 in 92 % of cases, where plain quantiles do in 72 %.
    """
    estimate = float(values_B[0])
    rest = values_B[1:][np.isfinite(values_B[1:])]
    if rest.size < 2 or not np.isfinite(estimate):
        return estimate, float("nan"), float("nan")
    low, high = np.quantile(rest, [0.025, 0.975])
    return estimate, 2 * estimate - float(high), 2 * estimate - float(low)


def rank(
    strength_ST: np.ndarray, pairs: Pairs, times_BS: np.ndarray, matched: "MatchedPairs"
) -> Ranking:
    """Score an order of pairs.

    Parameters
    ----------
    strength_ST
        The larger, the earlier; NaN comes last. Ties count as in random order.
    pairs
        Which count.
    times_BS
        Of :func:`resampled`: the same for orders that are compared with each other.
    matched
        Of the same pairs.
    """
    strength_N = strength_ST[pairs.source_N, pairs.target_N].astype(np.float64)
    strength_N = np.where(np.isnan(strength_N), -np.inf, strength_N)
    order_N = np.argsort(-strength_N, kind="stable")
    sorted_N = strength_N[order_N]
    # Ends of stretches of equal strength: there the order does not depend on chance.
    ends_K = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
    source_N, edge_N = pairs.source_N[order_N], pairs.edge_N[order_N]
    auprc_B, epr_B = np.full(len(times_BS), np.nan), np.full(len(times_BS), np.nan)
    for b, times_S in enumerate(times_BS):
        weight_N = times_S[source_N]
        all_K = np.cumsum(weight_N)[ends_K]
        true_K = np.cumsum(weight_N * edge_N)[ends_K]
        if true_K.size and true_K[-1] > 0:
            auprc_B[b], epr_B[b] = _ratios(all_K, true_K)
    return Ranking(auprc_B, epr_B, matched.auroc(strength_N, times_BS))


def _ratios(all_K: np.ndarray, true_K: np.ndarray) -> tuple[float, float]:
    density = true_K[-1] / all_K[-1]
    with np.errstate(invalid="ignore"):
        precision_K = np.where(all_K > 0, true_K / np.maximum(all_K, 1), 0.0)
    average = float((precision_K * np.diff(true_K, prepend=0.0)).sum() / true_K[-1])
    # As many pairs as there are edges; of a stretch of ties the share that still fits.
    k = true_K[-1]
    at = int(np.searchsorted(all_K, k))
    before_all, before_true = (all_K[at - 1], true_K[at - 1]) if at else (0.0, 0.0)
    share = (k - before_all) / max(all_K[at] - before_all, 1e-12)
    early = (before_true + share * (true_K[at] - before_true)) / k
    return average / density, float(early / density)


class MatchedPairs:
    """For every edge, pairs of the same source that are none and whose targets are alike.

    Alike in mean expression and in how many other sources regulate the target, each by its place
    among the targets; as many louder as quieter, since loud genes have more edges and the nearest
    without one would all be quieter. A predictor that knows how loud a gene is, and nothing about
    the source, scores .5. An edge to the loudest or the quietest target has no such pairs and is
    left out.

    Parameters
    ----------
    pairs
        Which count.
    edge_ST
        All edges, (S, T).
    mean_T
        Mean expression of the targets.
    a_side
        Louder and quieter pairs for each edge.
    """

    def __init__(
        self, pairs: Pairs, edge_ST: np.ndarray, mean_T: np.ndarray, a_side: int = MATCHED_A_SIDE
    ) -> None:
        from scipy.stats import rankdata

        self.pairs = pairs
        degree_T = edge_ST.sum(0)
        # Equal means in the order of their number: every other gene is louder or quieter.
        loud_T = rankdata(mean_T, "ordinal") / mean_T.size
        edges: list[np.ndarray] = []
        others: list[np.ndarray] = []
        for source in range(pairs.n_sources):
            here_M = np.flatnonzero(pairs.source_N == source)
            is_edge_M = pairs.edge_N[here_M]
            yes, no = here_M[is_edge_M], here_M[~is_edge_M]
            if not yes.size or not no.size:
                continue
            target_M = pairs.target_N[here_M]
            # By the other sources: this one's own edge is what is asked about.
            degree_M = rankdata(degree_T[target_M] - is_edge_M) / target_M.size
            louder_EN = loud_T[pairs.target_N[no]] - loud_T[pairs.target_N[yes]][:, None]
            apart_EN = np.hypot(louder_EN, degree_M[~is_edge_M] - degree_M[is_edge_M][:, None])
            n_E = np.minimum((louder_EN > 0).sum(1), (louder_EN < 0).sum(1)).clip(max=a_side)
            for side_EN in (louder_EN > 0, louder_EN < 0):
                order_EN = np.argsort(np.where(side_EN, apart_EN, np.inf), axis=1)[:, :a_side]
                taken_EN = np.arange(order_EN.shape[1]) < n_E[:, None]
                edges.append(yes[np.nonzero(taken_EN)[0]])
                others.append(no[order_EN[taken_EN]])
        none = np.empty(0, np.int64)
        self.edge_M = np.concatenate(edges) if edges else none
        self.other_M = np.concatenate(others) if others else none

    def auroc(self, strength_N: np.ndarray, times_BS: np.ndarray) -> np.ndarray:
        """Share of them in which the edge is stronger, ties half, (B,)."""
        edge_M, other_M = strength_N[self.edge_M], strength_N[self.other_M]
        won_M = (edge_M > other_M) + 0.5 * (edge_M == other_M)
        source_M = self.pairs.source_N[self.edge_M]
        n = self.pairs.n_sources
        won_S, n_S = np.bincount(source_M, won_M, n), np.bincount(source_M, minlength=n)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (times_BS @ won_S) / (times_BS @ n_S)


def stability(one_ST: np.ndarray, other_ST: np.ndarray, counts_ST: np.ndarray, k: int) -> float:
    """Jaccard index of the ``k`` strongest pairs of two networks; NaN where there are none."""
    at = np.nonzero(counts_ST)
    k = min(k, at[0].size)
    if not k:
        return float("nan")
    tops = []
    for strength_ST in (one_ST, other_ST):
        strength_N = np.where(np.isnan(strength_ST[at]), -np.inf, strength_ST[at])
        tops.append(set(np.argsort(-strength_N, kind="stable")[:k].tolist()))
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])
