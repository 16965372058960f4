"""Networks against known edges: one row a method, beside rows that know nothing of regulation.

Axes: S sources (transcription factors), T targets, B resamples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from genemodel.metrics.networks import MatchedPairs, Pairs, Ranking, interval, rank, resampled
from genemodel.networks.cells import Genes

# Rows that know nothing of regulation: how much there is of a target, or of both genes (truths have
# more edges of loud factors, too), and nothing at all.
EXPRESSION, OF_BOTH, SHUFFLED = "mean expression", "mean of both", "shuffled"


@dataclass(frozen=True)
class Truth:
    """Known edges among the genes of a network.

    Attributes
    ----------
    edge_ST
        Which pairs are edges.
    counts_ST
        Which pairs count: those of a source with an edge, to a gene that is a target of anything
        in the table. A table says nothing about genes that it never names.
    name
        ``all``, or ``without prior``.
    """

    edge_ST: np.ndarray
    counts_ST: np.ndarray
    name: str

    @classmethod
    def of(cls, edges: np.ndarray, genes: Genes, name: str = "all") -> "Truth":
        """Bring edges, (E, 2) tokens, in the order of the genes."""
        edge_ST = _matrix(edges, genes)
        in_table_T = np.isin(genes.targets, edges[:, 1])
        counts_ST = edge_ST.any(1)[:, None] & in_table_T & genes.no_loops_ST
        return cls(edge_ST & counts_ST, counts_ST, name)

    def without(self, edges: np.ndarray, genes: Genes) -> "Truth":
        """Leave pairs out that are edges of a prior, of the truth and of what it is told from."""
        prior_ST = _matrix(edges, genes)
        edge_ST = self.edge_ST & ~prior_ST
        counts_ST = self.counts_ST & ~prior_ST & edge_ST.any(1)[:, None]
        return Truth(edge_ST & counts_ST, counts_ST, "without prior")

    @property
    def n_edges(self) -> int:
        """Edges that count."""
        return int(self.edge_ST.sum())


def _matrix(edges: np.ndarray, genes: Genes) -> np.ndarray:
    edge_ST = np.zeros((genes.sources.size, genes.targets.size), bool)
    known = np.isin(edges[:, 0], genes.sources) & np.isin(edges[:, 1], genes.targets)
    at = edges[known]
    edge_ST[np.searchsorted(genes.sources, at[:, 0]), np.searchsorted(genes.targets, at[:, 1])] = 1
    return edge_ST


def null_networks(
    genes: Genes, mean_S: np.ndarray, mean_T: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Orders of pairs that no regulation is in, (S, T) each; from the genes' mean expression."""
    shape = genes.sources.size, genes.targets.size
    return {
        EXPRESSION: np.broadcast_to(mean_T, shape).astype(np.float32),
        OF_BOTH: (mean_S[:, None] + mean_T).astype(np.float32),
        SHUFFLED: np.random.default_rng(seed).permutation(shape[0] * shape[1]).reshape(shape),
    }


def score_table(
    strengths: Mapping[str, np.ndarray],
    truth: Truth,
    mean_T: np.ndarray,
    *,
    bootstraps: int,
    seed: int,
) -> pd.DataFrame:
    """Score networks; one row each, in order.

    Parameters
    ----------
    strengths
        Name -> (S, T), the larger the earlier; with :func:`null_networks` among them.
    truth
        Known edges.
    mean_T
        Mean expression of the targets.
    bootstraps
        Resamples of the sources.
    seed
        Of them.

    Returns
    -------
    Columns auprc_ratio, epr and matched_auroc, each with ``_low`` and ``_high``;
    ``over_expression``: AUPRC ratio less that of the better row of mean expression, on the same
    resamples; ``said``: share of the pairs about which the method says anything.
    """
    pairs = Pairs.of(truth.edge_ST, truth.counts_ST)
    there_S = truth.counts_ST.any(1)
    drawn_BS = resampled(int(there_S.sum()), bootstraps, seed)
    times_BS = np.zeros((len(drawn_BS), len(there_S)))
    times_BS[:, there_S] = drawn_BS
    matched = MatchedPairs(pairs, truth.edge_ST, mean_T)
    found = {name: rank(each, pairs, times_BS, matched) for name, each in strengths.items()}
    rows = [found[name] for name in (EXPRESSION, OF_BOTH) if name in found]
    base = max(rows, key=lambda row: float(row.auprc_ratio_B[0]), default=None)
    facts = {
        "truth": truth.name, "tfs": int(there_S.sum()),
        "targets": int(truth.counts_ST.any(0).sum()), "edges": truth.n_edges,
        "density": pairs.density,
    }  # fmt: skip
    return pd.DataFrame([
        {"method": name} | facts | _row(ranking, base)
        | {"said": float(np.isfinite(strengths[name][truth.counts_ST]).mean())}
        for name, ranking in found.items()
    ])  # fmt: skip


def _row(ranking: Ranking, base: Ranking | None) -> dict[str, float]:
    row: dict[str, float] = {}
    for name in ("auprc_ratio", "epr", "matched_auroc"):
        estimate, low, high = interval(getattr(ranking, f"{name}_B"))
        row |= {name: estimate, f"{name}_low": max(low, 0.0), f"{name}_high": high}
    if base is not None:
        more_B = ranking.auprc_ratio_B - base.auprc_ratio_B
        name = "over_expression"
        row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(more_B)
    return row
