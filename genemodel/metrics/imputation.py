"""Scores of denoised counts against molecules that the method never saw.

Molecular cross-validation (Batson, Royer & Webber 2019): every molecule of the data is put at
random into a training part, with probability `keep`, or into a test part. The method denoises the
training part and is judged on the test part, which is an independent, unbiased draw from the same
cells, so no ground truth is needed. The 0.9/0.1 split and the two headline scores are those of the
denoising task of Open Problems in Single-Cell Analysis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.expression.likelihood import poisson_losses
from genemodel.expression.normalise import log_normalised
from genemodel.expression.thinning import split_molecules

KEEP = 0.9
_TINY_RATE = 1e-6
_ROWS = 512  # cells made dense at a time
_SAMPLED_CELLS, _SAMPLED_GENES = 1_000, 2_000  # for the correlations

type Matrix = np.ndarray | sp.csr_matrix


@dataclass(frozen=True)
class MolecularSplit:
    """The two parts of the molecules.

    Attributes
    ----------
    train, test
        Integer counts, CSR of shape (n_cells, n_genes kept); on all genes they add up to the input.
    gene_kept_G
        Which genes of the input have a molecule in the training part. The others are dropped
        from both parts, since no method could know of them.
    keep
        Probability of a molecule to be in the training part.
    """

    train: sp.csr_matrix
    test: sp.csr_matrix
    gene_kept_G: np.ndarray
    keep: float

    @property
    def test_per_train(self) -> float:
        """Molecules in the test part ÷ molecules in the training part, on the genes kept."""
        return float(self.test.sum()) / float(self.train.sum())


def mcv_split(
    counts: Matrix, keep: float = KEEP, seed: int = 0, *, drop_unseen: bool = True
) -> MolecularSplit:
    """Split the molecules: train ~ Binomial(counts, keep), test = counts - train.

    Parameters
    ----------
    counts
        Raw counts of shape (n_cells, n_genes), whole numbers.
    keep
        Probability of a molecule to stay in the training part.
    seed
        The same seed and counts give the same split.
    drop_unseen
        Drop the genes without any molecule in the training part, as Open Problems does.

    Returns
    -------
    MolecularSplit

    Raises
    ------
    DataError
        Counts that are negative or not whole, ``keep`` outside (0, 1), or an empty training part.
    """
    if not 0.0 < keep < 1.0:
        raise DataError(f"keep = {keep}: the share of molecules kept must lie between 0 and 1")
    whole = sp.csr_matrix(counts, copy=True)
    whole.sum_duplicates()
    values_N = np.rint(whole.data)
    if len(values_N) and (np.abs(values_N - whole.data).max() > 1e-6 or values_N.min() < 0):
        raise DataError(
            "the counts hold negative or fractional values: molecular cross-validation splits "
            "molecules and needs raw counts; name the layer that holds them"
        )
    whole.data = values_N
    train, test = split_molecules(whole, keep, np.random.default_rng(seed), dtype=np.int64)
    if train.nnz == 0:
        raise DataError("no molecule is left in the training part: the counts are all zero")
    gene_kept_G = np.ones(whole.shape[1], dtype=bool)
    if drop_unseen:
        gene_kept_G = np.bincount(train.indices, minlength=whole.shape[1]) > 0
        train, test = train[:, gene_kept_G].tocsr(), test[:, gene_kept_G].tocsr()
    return MolecularSplit(train, test, gene_kept_G, keep)


def score_denoised(
    denoised: Mapping[str, Matrix],
    split: MolecularSplit,
    *,
    correlations: bool = True,
) -> pd.DataFrame:
    r"""Score denoised training counts on the test molecules.

    With test counts :math:`y_{cg}`, denoised training counts :math:`d_{cg} \ge 0` (in units of
    training molecules: what the method believes the training part would be without noise),
    :math:`n` cells × genes:

    - ``mse`` :math:`= \frac1n\sum (\ell(y)_{cg} - \ell(d)_{cg})^2` with
      :math:`\ell(x)_{cg} = \log(1 + 10^4 x_{cg} / \sum_{g'} x_{cg'})`, a cell without any count
      staying at zero. Depth does not matter here.
    - ``poisson`` :math:`= \frac1n\sum (r_{cg} - y_{cg}\log(r_{cg} + 10^{-6}))` with
      :math:`r_{cg} = d_{cg} \cdot \sum y / \sum x`, :math:`x` the training counts: one factor for
      all cells, from the training to the test depth.  Depth matters, and a zero where a
      molecule turns up costs 13.8.
    - ``deviance`` :math:`= \frac2n\sum (y\log\frac{y}{r+10^{-6}} - y + r)`: the same with the
      part that no method can influence taken away, hence ≥ 0 and comparable across data sets.
    - ``mse_ratio``, ``poisson_ratio``, ``deviance_ratio``: ÷ the score of the training counts
      themselves ("no denoising"). Below 1 = better than doing nothing.

    The first two are those of the denoising task of Open Problems. One difference: it takes
    :math:`\sum x` before genes without training molecules are dropped, which changes nothing here
    as these genes have none.

    Parameters
    ----------
    denoised
        Name to array or CSR of shape (n_cells, n_genes) in the order of ``split.train``.
    split
        What `mcv_split` returned.
    correlations
        Add, over *all* entries, zeros included, between :math:`\ell(y)` and :math:`\ell(d)`:
        ``pearson_cell``, ``spearman_cell``, ``pearson_gene``, ``spearman_gene``: means over
        1,000 cells, and over 2,000 of the genes with at least 3 test molecules (the same random
        ones for every method; all of them where there are fewer).

    Returns
    -------
    pandas.DataFrame
        One row per method. "none" is always a row. ``zero_fraction_error``, ``mean_error``
        and ``variance_error`` say whether counts drawn from the denoised rates would look like the
        data: see `count_agreement`.

    Raises
    ------
    DataError
        Shapes that do not match, negative or not finite values.
    """
    rows = {}
    given = dict(denoised)
    given.setdefault("none", split.train)
    for name, matrix in given.items():
        _check_denoised(name, matrix, split)
        row = _losses(matrix, split)
        row |= count_agreement(matrix, split)
        if correlations:
            row |= _correlations(matrix, split)
        rows[name] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "method"
    for score in ("deviance", "poisson", "mse"):
        table.insert(0, f"{score}_ratio", table[score] / rows["none"][score])
    return table


def _check_denoised(name: str, matrix: Matrix, split: MolecularSplit) -> None:
    if matrix.shape != split.train.shape:
        raise DataError(
            f"denoised {name!r} has shape {matrix.shape}; expected {split.train.shape}, as in the "
            "training part (genes without training molecules are dropped)"
        )
    values = np.asarray(matrix.data if sp.issparse(matrix) else matrix)
    if not np.isfinite(values).all() or (values.size and values.min() < 0):
        raise DataError(
            f"denoised {name!r} holds negative or not finite values: expected counts ≥ 0 (undo the "
            "log transform and clip at zero)"
        )


def _dense(matrix: Matrix, start: int, rows: int = _ROWS) -> np.ndarray:
    block: Any = matrix[start : start + rows]
    return np.asarray(block.toarray() if sp.issparse(block) else block, dtype=np.float64)


def _log(count_CG: np.ndarray) -> np.ndarray:
    return log_normalised(count_CG, dtype=np.float64)


def _losses(matrix: Matrix, split: MolecularSplit) -> dict[str, float]:
    squared = poisson = deviance = 0.0
    for start in range(0, split.test.shape[0], _ROWS):
        test_CG, denoised_CG = _dense(split.test, start), _dense(matrix, start)
        squared += float(((_log(test_CG) - _log(denoised_CG)) ** 2).sum())
        rate_CG = denoised_CG * split.test_per_train
        losses = poisson_losses(test_CG, rate_CG, floor=_TINY_RATE)
        poisson, deviance = poisson + losses[0], deviance + losses[1]
    n = float(split.test.shape[0] * split.test.shape[1])
    return {"mse": squared / n, "poisson": poisson / n, "deviance": deviance / n}


def gene_statistics(matrix: Matrix, split: MolecularSplit, *, counts: bool = False) -> pd.DataFrame:
    """Mean, variance and share of zeros of every gene at the depth of the test counts.

    Parameters
    ----------
    matrix
        Denoised training counts; Poisson draws from them × test molecules ÷ training molecules are
        described: variance = mean rate + variance of the rates, zeros = mean of exp(-rate).
    split
        The split.
    counts
        ``matrix`` holds test counts, to be described as they are.

    Returns
    -------
    pandas.DataFrame
        One row per gene: ``mean``, ``variance``, ``zeros``.
    """
    n_cells, n_genes = matrix.shape
    zeros_G, mean_G, square_G = (np.zeros(n_genes) for _ in range(3))
    for start in range(0, n_cells, _ROWS):
        value_CG = _dense(matrix, start) * (1.0 if counts else split.test_per_train)
        zeros_G += (value_CG == 0).sum(axis=0) if counts else np.exp(-value_CG).sum(axis=0)
        mean_G += value_CG.sum(axis=0)
        square_G += (value_CG**2).sum(axis=0)
    mean_G /= n_cells
    variance_G = np.maximum(square_G / n_cells - mean_G**2, 0.0) + (0.0 if counts else mean_G)
    return pd.DataFrame({"mean": mean_G, "variance": variance_G, "zeros": zeros_G / n_cells})


def count_agreement(matrix: Matrix, split: MolecularSplit) -> dict[str, float]:
    r"""Compare Poisson counts drawn from the denoised rates with the test counts.

    With the statistics of `gene_statistics` and e = 1 / cells:

    - ``zero_fraction_error``: mean over genes of |difference of the shares of zeros|.
    - ``mean_error``: mean over the genes with a mean test count ≥ 0.01 of
      |log2((mean of the test counts + e) / (mean of the draws + e))|.
    - ``variance_error``: over the same genes, the same for the variances.

    "none" is scored the same way, so its error is that of taking each count for a rate.
    """
    test = gene_statistics(split.test, split, counts=True)
    drawn = gene_statistics(matrix, split)
    seen = test["mean"] >= 0.01
    tiny = 1.0 / split.test.shape[0]
    error = np.log2((test + tiny) / (drawn + tiny)).abs()
    return {
        "zero_fraction_error": float((test["zeros"] - drawn["zeros"]).abs().mean()),
        "mean_error": float(error.loc[seen, "mean"].mean()),
        "variance_error": float(error.loc[seen, "variance"].mean()),
    }


def _correlations(matrix: Matrix, split: MolecularSplit) -> dict[str, float]:
    """Means over a fixed sample of the cells and of the genes: ranking every entry is slow."""
    draw = np.random.default_rng(0)
    n_cells, n_genes = split.test.shape
    cells = np.sort(draw.permutation(n_cells)[:_SAMPLED_CELLS])
    enough = np.flatnonzero(np.asarray(split.test.sum(axis=0)).ravel() >= 3)
    genes = np.sort(draw.permutation(enough)[:_SAMPLED_GENES])
    test_CG, denoised_CG = (_log_rows(m, cells) for m in (split.test, matrix))
    test_GC, denoised_GC = (_log_columns(m, genes) for m in (split.test, matrix))
    return {
        "pearson_cell": _mean(rowwise_pearson(test_CG, denoised_CG)),
        "spearman_cell": _mean(rowwise_spearman(test_CG, denoised_CG)),
        "pearson_gene": _mean(rowwise_pearson(test_GC, denoised_GC)),
        "spearman_gene": _mean(rowwise_spearman(test_GC, denoised_GC)),
    }


def _log_rows(matrix: Matrix, cells: np.ndarray) -> np.ndarray:
    """Log-scaled profiles of some cells, (cells, genes)."""
    return _log(_dense(matrix[cells], 0, len(cells))).astype(np.float32)


def _log_columns(matrix: Matrix, genes: np.ndarray) -> np.ndarray:
    """Log-scaled values of some genes in all cells, (genes, cells)."""
    value_GC = np.empty((len(genes), matrix.shape[0]), dtype=np.float32)
    for start in range(0, matrix.shape[0], _ROWS):
        value_GC[:, start : start + _ROWS] = _log(_dense(matrix, start))[:, genes].T
    return value_GC


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def rowwise_pearson(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of two arrays of shape (n, m).

    A row that is constant on the right says nothing about the left and scores 0; a row that is
    constant on the left, the truth, cannot be scored and is nan.
    """
    result = np.empty(len(left))
    for start in range(0, len(left), _ROWS):
        a = left[start : start + _ROWS].astype(np.float64)
        b = right[start : start + _ROWS].astype(np.float64)
        # float32 profiles: a row this close to constant is constant
        flat_b = b.std(axis=1) <= 1e-5 * np.abs(b).mean(axis=1)
        a -= a.mean(axis=1, keepdims=True)
        b -= b.mean(axis=1, keepdims=True)
        norm_a, norm_b = np.sqrt((a * a).sum(axis=1)), np.sqrt((b * b).sum(axis=1))
        scored = (norm_a > 0) & ~flat_b
        value = (a * b).sum(axis=1) / np.where(scored, norm_a * norm_b, 1.0)
        value = np.where(scored, value, 0.0)
        result[start : start + _ROWS] = np.where(norm_a > 0, value, np.nan)
    return result


def rowwise_spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Spearman correlation of each row; equal values share their mean rank."""
    from scipy.stats import rankdata

    result = np.empty(len(left))
    for start in range(0, len(left), _ROWS):
        ranks_left = rankdata(left[start : start + _ROWS], axis=1)
        ranks_right = rankdata(right[start : start + _ROWS], axis=1)
        result[start : start + _ROWS] = rowwise_pearson(ranks_left, ranks_right)
    return result


def predictive_coverage(
    mean: Matrix,
    split: MolecularSplit,
    *,
    sd: Matrix | None = None,
    levels: Sequence[float] = (0.9,),
    bins: int = 10,
    most_cells: int = 500,
) -> pd.DataFrame:
    r"""Share of test counts inside the central prediction intervals that a method implies.

    The method believes in rates with mean :math:`m` and standard deviation :math:`s` at the
    training depth. Taking them for Gamma-distributed, a test count is negative binomial with mean
    :math:`fm` and variance :math:`fm + f^2 s^2`, :math:`f` = test molecules ÷ training molecules;
    Poisson where :math:`s = 0` or ``sd`` is not given.

    Most counts are zero or one, and no interval of whole numbers has a coverage of exactly 90 %:
    a closed one covers more however good the method, so it cannot show that a method is too
    sure of itself. ``coverage`` is therefore that of the *randomised* interval: with
    :math:`u = F(y - 1) + v\,(F(y) - F(y - 1))`, :math:`v` uniform, a count is inside
    where :math:`\alpha/2 \le u \le 1 - \alpha/2`; its expectation over :math:`v` is computed,
    not drawn. It is 90 % for a 90 % interval exactly if the predictions are right (Czado, Gneiting
    & Held 2009). ``coverage_closed`` is that of the closed interval of whole numbers.

    Parameters
    ----------
    mean, sd
        Shape (n_cells, n_genes), at the depth of ``split.train``.
    split
        What `mcv_split` returned.
    levels
        Nominal coverages.
    bins
        Groups of genes of equal size, by their training counts.
    most_cells
        Cells used, a fixed random sample: the distribution functions are slow.

    Returns
    -------
    pandas.DataFrame
        Columns ``level``, ``entries`` ("all", "nonzero", "1" lowest … "10" highest expression),
        ``coverage``, ``coverage_closed``, ``n_entries``.
    """
    n_cells, n_genes = split.test.shape
    cells = np.sort(np.random.default_rng(0).permutation(n_cells)[:most_cells])
    expression_G = np.asarray(split.train.sum(axis=0)).ravel().astype(float)
    groups = {"all": np.ones(n_genes, dtype=bool)} | expression_bins(expression_G, bins)
    names = [*groups, "nonzero"]
    inside = {level: dict.fromkeys(names, 0.0) for level in levels}
    closed = {level: dict.fromkeys(names, 0.0) for level in levels}
    n_entries = dict.fromkeys(names, 0.0)
    for start in range(0, len(cells), _ROWS // 4):
        rows = cells[start : start + _ROWS // 4]
        count_CG = _dense(split.test[rows], 0)
        sd_CG = None if sd is None else _dense(sd[rows], 0)
        below_CG, upto_CG = _predictive(
            count_CG, _dense(mean[rows], 0), sd_CG, split.test_per_train
        )
        there_CG = count_CG > 0
        for name, genes_G in groups.items():
            n_entries[name] += float(len(rows) * genes_G.sum())
        n_entries["nonzero"] += float(there_CG.sum())
        for level in levels:
            low, high = (1 - level) / 2, (1 + level) / 2
            width_CG = np.maximum(upto_CG - below_CG, 1e-300)
            share_CG = np.clip(np.minimum(upto_CG, high) - np.maximum(below_CG, low), 0.0, None)
            share_CG = np.minimum(share_CG / width_CG, 1.0)
            closed_CG = (upto_CG >= low) & (below_CG < high)
            for sums, values_CG in ((inside, share_CG), (closed, closed_CG)):
                by_gene_G = values_CG.sum(axis=0)
                for name, genes_G in groups.items():
                    sums[level][name] += float(by_gene_G[genes_G].sum())
                sums[level]["nonzero"] += float(values_CG[there_CG].sum())
    records = [
        {
            "level": level,
            "entries": name,
            "coverage": inside[level][name] / n_entries[name],
            "coverage_closed": closed[level][name] / n_entries[name],
            "n_entries": int(n_entries[name]),
        }
        for level in levels
        for name in names
        if n_entries[name]
    ]
    return pd.DataFrame(records)


def _predictive(
    count_CG: np.ndarray, mean_CG: np.ndarray, sd_CG: np.ndarray | None, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """P(count - 1 or fewer) and P(count or fewer)."""
    from scipy.special import betainc, gammaincc

    rate_CG = np.maximum(mean_CG * factor, 1e-12)
    upto_CG = gammaincc(count_CG + 1.0, rate_CG)
    below_CG = np.where(count_CG > 0, gammaincc(np.maximum(count_CG, 1.0), rate_CG), 0.0)
    if sd_CG is None:
        return below_CG, upto_CG
    variance_CG = (sd_CG * factor) ** 2
    # beyond this shape a negative binomial is a Poisson to the last digit that matters
    wide_CG = variance_CG > 1e-6 * rate_CG**2
    shape = (rate_CG**2)[wide_CG] / variance_CG[wide_CG]
    chance = shape / (shape + rate_CG[wide_CG])
    count = count_CG[wide_CG]
    upto_CG[wide_CG] = betainc(shape, count + 1.0, chance)
    below_CG[wide_CG] = np.where(count > 0, betainc(shape, np.maximum(count, 1.0), chance), 0.0)
    return below_CG, upto_CG


def expression_bins(expression_G: np.ndarray, bins: int = 10) -> dict[str, np.ndarray]:
    """Equally large groups of the genes with any expression, "1" the lowest; ties by gene order."""
    order = np.argsort(expression_G, kind="stable")
    order = order[expression_G[order] > 0]
    groups = {}
    for number, members in enumerate(np.array_split(order, bins), start=1):
        mask_G = np.zeros(len(expression_G), dtype=bool)
        mask_G[members] = True
        groups[str(number)] = mask_G
    return groups


def mixture_expectation(
    counts: Matrix, proportions_CP: np.ndarray, *, group_C: np.ndarray | None = None
) -> np.ndarray:
    """Give every cell of a mixture of known proportions its expected profile.

    Cells that are mixtures of P sources in known proportions have expected gene shares that are
    linear in the proportions. The sources' shares are fitted to all cells of a group (protocol)
    by maximum Poisson likelihood, so a deep cell weighs more than a shallow one.

    Parameters
    ----------
    counts
        Raw counts of shape (n_cells, n_genes).
    proportions_CP
        Proportion of each of the P sources in each cell; rows sum to 1.
    group_C
        Cells that share a protocol; one fit per group.

    Returns
    -------
    numpy.ndarray
        Expected share of the cell's counts, float32 of shape (n_cells, n_genes), rows sum to 1.

    Raises
    ------
    DataError
        Proportions that do not match the cells or do not sum to 1.
    """
    proportions_CP = np.asarray(proportions_CP, dtype=np.float64)
    if proportions_CP.ndim != 2 or len(proportions_CP) != counts.shape[0]:
        raise DataError(
            f"proportions have shape {proportions_CP.shape}; expected ({counts.shape[0]}, sources)"
        )
    if np.abs(proportions_CP.sum(axis=1) - 1.0).max() > 0.02:
        raise DataError("the proportions of a cell must sum to 1")
    proportions_CP = proportions_CP / proportions_CP.sum(axis=1, keepdims=True)
    whole = sp.csr_matrix(counts, dtype=np.float64)
    group_C = np.zeros(whole.shape[0], dtype=int) if group_C is None else np.asarray(group_C)
    expected_CG = np.zeros(whole.shape, dtype=np.float32)
    for group in pd.unique(group_C):
        rows = np.flatnonzero(group_C == group)
        source_PG = _source_shares(whole[rows], proportions_CP[rows])
        mixed_CG = proportions_CP[rows] @ source_PG
        expected_CG[rows] = mixed_CG / mixed_CG.sum(axis=1, keepdims=True)
    return expected_CG


def _source_shares(counts: sp.csr_matrix, proportions_CP: np.ndarray) -> np.ndarray:
    """Maximum-likelihood shares of the sources: count ~ Poisson(depth × proportions · shares)."""
    # cells of equal proportions have rates that differ by depth alone: their sums are sufficient
    mix_MP, mix_C = np.unique(proportions_CP, axis=0, return_inverse=True)
    member_MC = sp.csr_matrix((np.ones(len(mix_C)), (mix_C.ravel(), np.arange(len(mix_C)))))
    count_MG = (member_MC @ counts).toarray()
    exposure_MP = mix_MP * count_MG.sum(axis=1, keepdims=True)
    mean_G = np.maximum(count_MG.sum(axis=0) / count_MG.sum(), 1e-12)
    share_PG = np.tile(mean_G, (mix_MP.shape[1], 1))
    for _ in range(500):  # expectation-maximisation: monotone, keeps the shares positive
        ratio_MG = count_MG / np.maximum(exposure_MP @ share_PG, 1e-300)
        share_PG *= (exposure_MP.T @ ratio_MG) / exposure_MP.sum(axis=0)[:, None]
    return share_PG


def score_against_expectation(
    denoised: Mapping[str, Matrix], expected_CG: np.ndarray, *, min_share: float = 1e-5
) -> pd.DataFrame:
    """Correlation of denoised profiles with known expected profiles, both as log(1 + 10⁴ × share).

    Parameters
    ----------
    denoised
        Name to array or CSR of shape (n_cells, n_genes).
    expected_CG
        Expected shares, e.g. from `mixture_expectation`.
    min_share
        Genes with a mean expected share below it are left out: their truth is itself noise.

    Returns
    -------
    pandas.DataFrame
        One row per method: ``truth_pearson_cell``, ``truth_spearman_cell``,
        ``truth_pearson_gene``, ``truth_spearman_gene``, ``truth_mse``, ``truth_genes`` (how many).
    """
    genes_G = expected_CG.mean(axis=0) >= min_share
    share_CG = expected_CG[:, genes_G].astype(np.float64)
    truth_CG = log_normalised(share_CG, np.ones(len(share_CG)), dtype=np.float64)
    truth_GC = np.ascontiguousarray(truth_CG.T)
    rows = {}
    for name, matrix in denoised.items():
        if matrix.shape != expected_CG.shape:
            raise DataError(f"denoised {name!r}: shape {matrix.shape}, truth {expected_CG.shape}")
        profile_CG = np.vstack(
            [_log(_dense(matrix, i))[:, genes_G] for i in range(0, matrix.shape[0], _ROWS)]
        )
        profile_GC = np.ascontiguousarray(profile_CG.T)
        rows[name] = {
            "truth_pearson_cell": _mean(rowwise_pearson(truth_CG, profile_CG)),
            "truth_spearman_cell": _mean(rowwise_spearman(truth_CG, profile_CG)),
            "truth_pearson_gene": _mean(rowwise_pearson(truth_GC, profile_GC)),
            "truth_spearman_gene": _mean(rowwise_spearman(truth_GC, profile_GC)),
            "truth_mse": float(((truth_CG - profile_CG) ** 2).mean()),
            "truth_genes": int(genes_G.sum()),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "method"
    return table
