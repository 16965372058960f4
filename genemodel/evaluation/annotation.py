"""Annotation across batches or species: one batch lends its labels to another, and back.

Every method sees the same cells and the genes that all batches measured. A method gives, for every
direction, the labels of the query's cells, and those that it would give if it had to name one.

Axes: C cells, D width, G genes, Q cells of the query of a direction, R labelled cells of its
reference.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from genemodel.annotation.annotate import (
    MIN_REFERENCE,
    UNKNOWN,
    UNKNOWN_BELOW,
    Transfer,
    transfer_labels,
)
from genemodel.annotation.label_head import calibration_error, label_counts
from genemodel.cells.input_settings import InputSettings
from genemodel.errors import DataError
from genemodel.evaluation.baselines import (
    SCVI_LOGGERS,
    UNLABELLED,
    Conditions,
    column,
    counts_of,
    hushed,
    none,
    quiet_training,
    scvi,
    scvi_model,
    tuned,
    variable_log,
)
from genemodel.expression.normalise import log_normalised
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.gene_counts import read_counts
from genemodel.settings import some

if TYPE_CHECKING:
    from anndata import AnnData

SPECIES = "species"
MIN_GENES = 50
# Each label of at least so many cells on both sides is left out of the reference in turn, in the
# first directions only: every time a method learns anew.
LEAST_LEFT_OUT, DIRECTIONS_LEFT_OUT = 5, 3

type Embedding = Callable[["AnnData", Conditions], np.ndarray]
type Function = Callable[["AnnData", "AnnData", str], Any]


@dataclass(frozen=True)
class Direction:
    """Who labels whom.

    Attributes
    ----------
    name
        Such as "human → mouse".
    reference_R, query_Q
        Rows of their labelled cells.
    true_Q
        Labels of the query, which no method sees.
    labels
        Those of the reference, in order.
    """

    name: str
    reference_R: np.ndarray
    query_Q: np.ndarray
    true_Q: np.ndarray
    labels: list[str]

    @property
    def shared(self) -> list[str]:
        """Labels that both sides have."""
        return sorted(set(self.labels) & set(self.true_Q))

    @property
    def n_judged(self) -> int:
        """Cells of the query whose label the reference has."""
        return int(np.isin(self.true_Q, self.labels).sum())


@dataclass(frozen=True)
class Called:
    """Labels of a direction's query.

    Attributes
    ----------
    label_Q, forced_Q
        Labels; the second never says unknown.
    confidence_Q
        Probability of ``forced_Q``; None of a method that gives none.
    left_out_auroc
        How well cells of a label left out of the reference are told from those of the others; the
        mean over the labels, nan where nothing was left out.
    """

    label_Q: np.ndarray
    forced_Q: np.ndarray
    confidence_Q: np.ndarray | None = None
    left_out_auroc: float = float("nan")


@dataclass(frozen=True)
class Answer:
    """What a method says of a query: label codes, their probability, novelty, and unknown or not.

    A code of -1 is no label.
    """

    code_Q: np.ndarray
    confidence_Q: np.ndarray
    novelty_Q: np.ndarray
    unknown_Q: np.ndarray

    @classmethod
    def of(cls, probability_QL: np.ndarray) -> "Answer":
        """Say what a method without a rule for the unknown says: the less sure, the newer."""
        best_Q = probability_QL.max(1)
        return cls(probability_QL.argmax(1), best_Q, 1 - best_Q, np.zeros(len(best_Q), bool))


# (rows of the reference, their label codes, rows of the query) -> answer
type Classifier = Callable[[np.ndarray, np.ndarray, np.ndarray], Answer]


def labels_of(adata: "AnnData", label_key: str) -> np.ndarray:
    """Label of each cell as text, None where it is missing; which texts mean that is settled."""
    label = column(adata, label_key)
    missing_C = label.isna().to_numpy()
    label_C = label.astype(str).to_numpy(dtype=object)
    label_C[missing_C] = None
    return label_C


def directions(
    adata: "AnnData", batch_key: str, label_key: str
) -> tuple[list[Direction], dict[str, str]]:
    """Every batch as the query of all others; with two batches there and back.

    Returns
    -------
    The directions, and why others are left out.

    Raises
    ------
    DataError
        Gaps in the batch, a single batch, or no direction that can be judged.
    """
    batch = column(adata, batch_key)
    if batch.isna().any():
        raise DataError(
            f"obs[{batch_key!r}] (batch_key) is missing in {int(batch.isna().sum()):,} cells: fill "
            "it or leave those cells out"
        )
    batch_C, label_C = batch.astype(str).to_numpy(), labels_of(adata, label_key)
    names = sorted(set(batch_C))
    if len(names) < 2:
        raise DataError(
            f"obs[{batch_key!r}] (batch_key) holds one batch only, {', '.join(names)}: nothing "
            "could lend its labels. Name the column that tells batches or species apart"
        )
    labelled_C = np.array([label is not None for label in label_C])
    found, left_out = [], {}
    for query in sorted(names, reverse=len(names) == 2):
        others = next(name for name in names if name != query) if len(names) == 2 else "others"
        reference_R = np.flatnonzero((batch_C != query) & labelled_C)
        query_Q = np.flatnonzero((batch_C == query) & labelled_C)
        labels = sorted(set(label_C[reference_R]))
        one = Direction(f"{others} → {query}", reference_R, query_Q, label_C[query_Q], labels)
        if len(labels) < 2 or len(reference_R) < MIN_REFERENCE:
            left_out[one.name] = (
                f"the reference has {len(labels)} labels in {len(reference_R)} cells; at least 2 "
                f"in {MIN_REFERENCE} are needed"
            )
        elif not one.shared:
            left_out[one.name] = (
                f"no label of {label_key!r} stands on both sides: {some(labels, 4)} against "
                f"{some(sorted(set(one.true_Q)), 4)}; give them common names"
            )
        else:
            found.append(one)
    if not found:
        name, reason = next(iter(left_out.items()))
        raise DataError(f"{name}: {reason}")
    return found, left_out


def shared_genes(adata: "AnnData", batch_key: str) -> "AnnData":
    """Keep the genes with a count in every batch: in a file that joins data sets the others are 0.

    Where ``obs["species"]`` holds several, genes are those of the built-in vocabulary, in which
    orthologs are one.

    Raises
    ------
    DataError
        Fewer than 50 such genes, or a species that the vocabulary does not know.
    """
    from anndata import AnnData

    obs = cast(pd.DataFrame, adata.obs)
    vocabulary = None
    if SPECIES in obs and obs[SPECIES].nunique() > 1:
        vocabulary = GeneVocabulary.builtin()
    counts = read_counts(
        adata,
        bundle=None,
        vocabulary=vocabulary,
        reading=InputSettings(species=None if vocabulary is None else f"obs:{SPECIES}"),
    )
    batch_C = column(adata, batch_key).astype(str).to_numpy()
    seen_G = np.ones(len(counts.genes), bool)
    for batch in sorted(set(batch_C)):
        seen_G &= counts.counts_CG[batch_C == batch].getnnz(0) > 0
    if seen_G.sum() < MIN_GENES:
        raise DataError(
            f"only {int(seen_G.sum())} genes have counts in every batch of obs[{batch_key!r}]: "
            "join the data sets by the same kind of gene names"
            + ("" if vocabulary else "; of several species, name each cell's in obs['species']")
        )
    kept = counts.only(np.flatnonzero(seen_G))
    names = kept.genes
    if vocabulary is not None:
        symbols = vocabulary.token_names()
        names = [symbols[int(token)] for token in kept.genes]
    return AnnData(
        kept.counts_CG.astype(np.float32), obs=obs.copy(), var=pd.DataFrame(index=pd.Index(names))
    )


# -- methods: (adata, conditions) -> what is called in every direction ---------------------------


def _of(adata: "AnnData", conditions: Conditions) -> list[Direction]:
    return directions(adata, cast(str, conditions.batch_key), cast(str, conditions.label_key))[0]


def _classified(
    adata: "AnnData", conditions: Conditions, classify: Classifier, *, leave_out: bool = True
) -> list[Called]:
    """Label every direction's query, and again with each label left out of the reference."""
    label_C = labels_of(adata, cast(str, conditions.label_key))
    called = []
    for number, direction in enumerate(_of(adata, conditions)):
        names = np.array([*direction.labels, UNKNOWN], dtype=object)
        rows_R = direction.reference_R
        code_R = np.searchsorted(np.array(direction.labels, object), label_C[rows_R])
        answer = classify(rows_R, code_R, direction.query_Q)
        forced_Q = names[answer.code_Q]
        auroc = float("nan")
        if leave_out and number < DIRECTIONS_LEFT_OUT:
            auroc = _left_out(direction, code_R, classify)
        called.append(
            Called(
                np.where(answer.unknown_Q, UNKNOWN, forced_Q).astype(object),
                forced_Q,
                answer.confidence_Q,
                auroc,
            )
        )
    return called


def _left_out(direction: Direction, code_R: np.ndarray, classify: Classifier) -> float:
    """Mean AUROC of novelty: cells of a label left out against those of the labels that stay."""
    from sklearn.metrics import roc_auc_score

    if len(direction.labels) < 3:
        return float("nan")
    found = []
    known_Q = np.isin(direction.true_Q, direction.labels)
    for code, name in enumerate(direction.labels):
        new_Q = direction.true_Q == name
        stays_R = code_R != code
        if new_Q.sum() < LEAST_LEFT_OUT or stays_R.sum() < MIN_REFERENCE:
            continue
        if (~stays_R).sum() < LEAST_LEFT_OUT or new_Q[known_Q].all():
            continue
        less_R = np.unique(code_R[stays_R], return_inverse=True)[1]
        answer = classify(direction.reference_R[stays_R], less_R, direction.query_Q)
        found.append(roc_auc_score(new_Q[known_Q], answer.novelty_Q[known_Q]))
    return float(np.mean(found)) if found else float("nan")


def transferred(
    embed: Embedding,
    transfer: Transfer,
    *,
    doubts: bool = True,
    cells: "AnnData | None" = None,
) -> Callable[["AnnData", Conditions], list[Called]]:
    """Make a method of an embedding of all cells, of which no label is known.

    Parameters
    ----------
    embed
        Integration method.
    transfer
        As in :func:`genemodel.annotate`.
    doubts
        Whether it may say unknown, where its confidence is low: ``far_quantile=None`` of
        :func:`genemodel.annotate`.
    cells
        The same cells with all their genes, for what was trained on them; default the shared genes.
    """

    def run(adata: "AnnData", conditions: Conditions) -> list[Called]:
        embedding_CD = np.asarray(embed(adata if cells is None else cells, conditions), np.float32)

        def classify(rows_R: np.ndarray, code_R: np.ndarray, query_Q: np.ndarray) -> Answer:
            usable_R = np.isfinite(embedding_CD[rows_R]).all(1)
            found = transfer_labels(
                embedding_CD[rows_R[usable_R]],
                code_R[usable_R],
                embedding_CD[query_Q],
                transfer=transfer,
                # Another batch or species is far as a whole: that would call nearly all unknown.
                far_quantile=None,
                seed=conditions.seed,
            )
            unknown_Q = found.unknown_C(UNKNOWN_BELOW) if doubts else found.winner_C < 0
            return Answer(found.winner_C, found.confidence_C, 1 - found.confidence_C, unknown_Q)

        return _classified(adata, conditions, classify)

    return run


def by_function(function: Function) -> Callable[["AnnData", Conditions], list[Called]]:
    """Make a method of a user's ``(reference, query, label_key) -> labels``."""

    def run(adata: "AnnData", conditions: Conditions) -> list[Called]:
        key = cast(str, conditions.label_key)
        called = []
        for direction in _of(adata, conditions):
            query = adata[direction.query_Q].copy()
            del query.obs[key]
            label = pd.Series(
                np.asarray(function(adata[direction.reference_R].copy(), query, key), dtype=object)
            )
            label_Q = label.where(label.notna(), UNKNOWN).astype(str).to_numpy(dtype=object)
            called.append(Called(label_Q, label_Q))
        return called

    return run


def _logistic(
    features: Callable[["AnnData", Conditions], Any],
) -> Callable[["AnnData", Conditions], list[Called]]:
    """Make a method of multinomial logistic regression, scikit-learn's defaults, on these."""

    def run(adata: "AnnData", conditions: Conditions) -> list[Called]:
        from sklearn.linear_model import LogisticRegression

        feature_CG = features(adata, conditions)

        def classify(rows_R: np.ndarray, code_R: np.ndarray, query_Q: np.ndarray) -> Answer:
            model = LogisticRegression(max_iter=500).fit(feature_CG[rows_R], code_R)
            return Answer.of(model.predict_proba(feature_CG[query_Q]))

        return _classified(adata, conditions, classify)

    return run


def _log_of_all(adata: "AnnData", conditions: Conditions) -> Any:
    return log_normalised(counts_of(adata))


def head(adata: "AnnData", conditions: Conditions) -> list[Called]:
    """Ours: :func:`genemodel.annotate` without a model, batches of the reference held out."""
    counts_CG = counts_of(adata)
    batch_C = column(adata, cast(str, conditions.batch_key)).astype(str).to_numpy()
    species_C = batch_C
    if SPECIES in adata.obs:
        species_C = column(adata, SPECIES).astype(str).to_numpy()
    several = SPECIES in adata.obs and len(set(species_C)) > 1

    def classify(rows_R: np.ndarray, code_R: np.ndarray, query_Q: np.ndarray) -> Answer:
        answer = label_counts(
            counts_CG[rows_R],
            code_R,
            counts_CG[query_Q],
            batch_R=batch_C[rows_R],
            far=several and not set(species_C[query_Q]) <= set(species_C[rows_R]),
            seed=conditions.seed,
        )
        best_Q = answer.probability_CL.max(1)
        unknown_Q = (best_Q < UNKNOWN_BELOW) | answer.far_C | ~answer.seen_C
        code_Q = np.where(answer.seen_C, answer.probability_CL.argmax(1), -1)
        return Answer(code_Q, best_Q, answer.novelty_C, unknown_Q)

    return _classified(adata, conditions, classify)


def scanvi(adata: "AnnData", conditions: Conditions) -> list[Called]:
    """Train scANVI (scvi-tools, its defaults) with the query's labels hidden, and ask it.

    It is not trained again for every label left out: that would take hours.
    """
    from scvi.model import SCANVI

    base, seconds, kept_C = scvi_model(adata, conditions)
    conditions.borrowed_seconds += seconds
    at_C = np.cumsum(kept_C) - 1
    epochs = None if conditions.scvi_epochs is None else max(2, conditions.scvi_epochs // 10)

    def classify(rows_R: np.ndarray, code_R: np.ndarray, query_Q: np.ndarray) -> Answer:
        n_labels = int(code_R.max()) + 1
        shown = np.full(adata.n_obs, UNLABELLED, dtype=object)
        shown[rows_R] = code_R.astype(str)
        base.adata.obs["shown"] = pd.Categorical(shown[kept_C])
        with hushed(*SCVI_LOGGERS):
            model = SCANVI.from_scvi_model(
                base, unlabeled_category=UNLABELLED, labels_key="shown", adata=base.adata
            )
            model.train(max_epochs=epochs, **quiet_training())
            soft = model.predict(soft=True)
        probability_QL = np.full((len(query_Q), n_labels), 1 / n_labels)
        there_Q = kept_C[query_Q]
        said = soft.reindex(columns=[str(code) for code in range(n_labels)], fill_value=0.0)
        probability_QL[there_Q] = said.to_numpy()[at_C[query_Q[there_Q]]]
        return Answer.of(probability_QL)

    return _classified(adata, conditions, classify, leave_out=False)


def majority(reference: "AnnData", query: "AnnData", label_key: str) -> np.ndarray:
    """Control: the commonest label of the reference for every cell."""
    label = pd.Series(labels_of(reference, label_key))
    return np.full(query.n_obs, label.value_counts().index[0], dtype=object)


def integrated(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Ours, trained once for both ways of transfer."""
    key = f"genemodel, seed {conditions.seed}"
    if key in conditions.shared:
        embedding_CD, seconds = conditions.shared[key]
        conditions.borrowed_seconds += seconds
        return embedding_CD
    start = time.perf_counter()
    embedding_CD = tuned(adata, conditions)
    conditions.shared[key] = embedding_CD, time.perf_counter() - start
    return embedding_CD


logistic_regression = _logistic(_log_of_all)
logistic_regression_hvg = _logistic(variable_log)
pca_knn = transferred(none, "knn", doubts=False)
scvi_knn = transferred(scvi, "knn", doubts=False)
genemodel_linear = transferred(integrated, "linear")
genemodel_knn = transferred(integrated, "knn")


# -- scores ------------------------------------------------------------------------------------


def problem(called: Any, wanted: Sequence[Direction]) -> str | None:
    """Say what is wrong with a method's answer, or None."""
    for direction, one in zip(wanted, called, strict=True):
        shape = one.label_Q.shape
        if shape != direction.true_Q.shape:
            n = len(direction.true_Q)
            return f"it returned labels of shape {shape} for {direction.name}; expected ({n},)"
    return None


def scores(direction: Direction, called: Called) -> dict[str, float]:
    """Score one direction.

    Returns
    -------
    Over the cells whose label the reference has, unknown counting as wrong: ``accuracy``,
    ``macro_f1`` and ``balanced_accuracy`` (means over the labels of both sides),
    ``accuracy_forced`` and ``macro_f1_forced`` (never unknown), ``unknown`` (the share called so),
    ``accuracy_called`` (among the others), ``ece`` (expected calibration error of the label that is
    forced, ten bins). ``unknown_new``: share called unknown of the cells whose label the reference
    lacks. ``unknown_auroc``: see :class:`Called`. nan where there is nothing to score.
    """
    from sklearn.metrics import f1_score, recall_score

    known_Q = np.isin(direction.true_Q, direction.labels)
    true, label, forced = (
        array_Q[known_Q].astype(str)
        for array_Q in (direction.true_Q, called.label_Q, called.forced_Q)
    )
    over: dict[str, Any] = {"labels": direction.shared, "average": "macro", "zero_division": 0}
    unknown, right = label == UNKNOWN, label == true
    return {
        "accuracy": float(right.mean()),
        "macro_f1": float(f1_score(true, label, **over)),
        "balanced_accuracy": float(recall_score(true, label, **over)),
        "accuracy_forced": float((forced == true).mean()),
        "macro_f1_forced": float(f1_score(true, forced, **over)),
        "accuracy_called": _mean(right[~unknown]),
        "unknown": float(unknown.mean()),
        "ece": float("nan")
        if called.confidence_Q is None
        else calibration_error(called.confidence_Q[known_Q], forced == true),
        "unknown_auroc": called.left_out_auroc,
        "unknown_new": _mean(called.label_Q[~known_Q] == UNKNOWN),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def per_label(direction: Direction, method: str, called: Called) -> pd.DataFrame:
    """Cells, accuracy (nan where the reference lacks the label) and share unknown, by label."""
    cells = pd.DataFrame(
        {
            "label": direction.true_Q,
            "right": called.label_Q == direction.true_Q,
            "unknown": called.label_Q == UNKNOWN,
        }
    )
    table = cells.groupby("label").agg(
        n=("right", "size"), accuracy=("right", "mean"), unknown=("unknown", "mean")
    )
    table.loc[~table.index.isin(direction.labels), "accuracy"] = np.nan
    table = table.reset_index(names="cell_type")
    table.insert(0, "direction", direction.name)
    table.insert(1, "method", method)
    return table
