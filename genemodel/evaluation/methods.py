"""The methods that `genemodel evaluate` knows, and what each of them needs.

A method is a function that takes an AnnData with raw counts in ``X`` and returns an embedding
(integration) or denoised counts (imputation) of the same cells in the same order; to annotate, one
that labels the cells of a query by a reference, see `genemodel.evaluation.annotation`. Users add
theirs in Python, ``evaluate(..., methods={"mine": my_function})``; the command line takes no code,
it scores what stands in ``obsm`` already.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from genemodel.errors import ConfigError
from genemodel.evaluation import annotation, baselines, imputation_baselines, seurat
from genemodel.evaluation.baselines import Conditions
from genemodel.evaluation.imputation_baselines import Denoised
from genemodel.settings import did_you_mean

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["FAILURES", "METHODS", "MIN_CELLS", "Denoised", "Method", "Own", "Task", "choose"]

type Task = Literal["integrate", "impute", "annotate"]
type Own = Callable[..., Any]

# What a published method may raise on data that it cannot handle: it fails, the comparison goes on.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
MIN_CELLS = 10

# What reads the counts in our methods where no model is given: the transformer takes no part.
ON_COUNTS = "a network on the counts of these cells; no transformer"
BY_REGRESSION = "logistic regression on the reference's counts; no transformer"
_BENCH = "pip install 'genemodel[bench]'"
_DEBIAN = "on Debian: apt-get install r-cran-seurat r-bioc-sva"


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    Attributes
    ----------
    run
        ``(adata, conditions) -> array`` (or `Denoised`, or a list of `annotation.Called`).
    kind
        "baseline", "control" (must lose), "ours" or "own" (the user's).
    packages, r_packages
        What must be importable; what R must have.
    seeded
        Random: run once for every seed, not once.
    labels
        Learns from labels; left out where there are none.
    encoder
        Of one of our methods: what turned counts into what is scored, in words.
    """

    run: Callable[["AnnData", Conditions], Any]
    kind: Literal["baseline", "control", "ours", "own"] = "baseline"
    packages: tuple[str, ...] = ()
    r_packages: tuple[str, ...] = ()
    seeded: bool = False
    labels: bool = False
    encoder: str = ""

    def software(self) -> str:
        """Name the packages that compute it, with their versions; empty where it is all ours."""
        homes = metadata.packages_distributions() if self.packages else {}
        names = [name for package in self.packages for name in homes.get(package, [package])[:1]]
        said = [f"{name} {metadata.version(name)}" for name in names]
        said += [f"R {package} {seurat.r_version(package)}" for package in self.r_packages]
        return ", ".join(said)

    def missing(self) -> str | None:
        """Say what is absent from this environment and how to get it, or None."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"the package {', '.join(absent)} is not installed; {_BENCH}"
        for package in self.r_packages:
            reason = seurat.missing_r(package)
            if reason is not None:
                return f"{reason}; {_DEBIAN}"
        return None


METHODS: dict[str, dict[str, Method]] = {
    "integrate": {
        "none": Method(baselines.none),
        "corpus_pca": Method(baselines.corpus_pca),
        "combat": Method(baselines.combat),
        "harmony": Method(baselines.harmony, packages=("harmonypy",), seeded=True),
        "scanorama": Method(baselines.scanorama, packages=("scanorama",), seeded=True),
        "scvi": Method(baselines.scvi, packages=("scvi",), seeded=True),
        "scanvi": Method(baselines.scanvi, packages=("scvi",), seeded=True, labels=True),
        "seurat_cca": Method(seurat.seurat_cca, r_packages=("Seurat",)),
        "seurat_rpca": Method(seurat.seurat_rpca, r_packages=("Seurat",)),
        "combat_r": Method(seurat.combat_r, r_packages=("sva",)),
        "random": Method(baselines.random, kind="control", seeded=True),
        "random_weights": Method(baselines.random_weights, kind="control", seeded=True),
        "genemodel": Method(baselines.genemodel, kind="ours", seeded=True, encoder=ON_COUNTS),
        "genemodel_labels": Method(
            baselines.genemodel_labels, kind="ours", seeded=True, labels=True, encoder=ON_COUNTS
        ),
    },
    "impute": {
        "none": Method(imputation_baselines.none),
        "gene_mean": Method(imputation_baselines.gene_mean),
        "gene_median": Method(imputation_baselines.gene_median),
        "knn_smoothing": Method(imputation_baselines.knn_smoothing),
        "magic": Method(imputation_baselines.magic),
        "magic_log": Method(imputation_baselines.magic_log),
        "alra": Method(imputation_baselines.alra, seeded=True),
        "mice": Method(imputation_baselines.mice, seeded=True),
        "scvi": Method(imputation_baselines.scvi, packages=("scvi",), seeded=True),
        "genemodel": Method(
            imputation_baselines.genemodel, kind="ours", seeded=True, encoder=ON_COUNTS
        ),
        "genemodel_log": Method(
            imputation_baselines.genemodel_log, kind="ours", seeded=True, encoder=ON_COUNTS
        ),
        "genemodel_log_half": Method(
            imputation_baselines.genemodel_log_half, kind="ours", seeded=True, encoder=ON_COUNTS
        ),
    },
    "annotate": {
        "majority": Method(annotation.by_function(annotation.majority), kind="control"),
        "logistic_regression": Method(annotation.logistic_regression),
        "logistic_regression_hvg": Method(annotation.logistic_regression_hvg),
        "pca_knn": Method(annotation.pca_knn),
        "scvi_knn": Method(annotation.scvi_knn, packages=("scvi",), seeded=True),
        "scanvi": Method(annotation.scanvi, packages=("scvi",), seeded=True),
        "genemodel_knn": Method(
            annotation.genemodel_knn, kind="ours", seeded=True, encoder=ON_COUNTS
        ),
        "genemodel_linear": Method(
            annotation.genemodel_linear, kind="ours", seeded=True, encoder=ON_COUNTS
        ),
        "genemodel": Method(annotation.head, kind="ours", encoder=BY_REGRESSION),
    },
}


def choose(
    task: str, wanted: "Sequence[str] | Mapping[str, Own | None] | None", *, has_labels: bool
) -> tuple[dict[str, Method], dict[str, str]]:
    """Resolve what the user asked for.

    Parameters
    ----------
    task
        "integrate", "impute" or "annotate".
    wanted
        ``None``: every method there is. Names: only these. A mapping of names to functions: every
        method there is and these; a name mapped to ``None`` is a built-in one, and where there is
        one, only the named are run.
    has_labels
        Whether there are labels to learn from.

    Returns
    -------
    The methods to run in the order of the registry ("none" always, as the reference), and those
    that are skipped with the reason.

    Raises
    ------
    ConfigError
        An unknown task or method.
    """
    if task not in METHODS:
        raise ConfigError(f"task={task!r}: there are {', '.join(METHODS)}")
    known = METHODS[task]
    own: dict[str, Method] = {}
    names: list[str] = list(known)
    if isinstance(wanted, Mapping):
        own = {name: _own(task, name, fn) for name, fn in wanted.items() if fn is not None}
        named = [name for name, fn in wanted.items() if fn is None]
        names = named or names
    elif wanted is not None:
        names = list(wanted)
    for name in names:
        if name not in known:
            there = f"; there are {', '.join(known)}"
            raise ConfigError(
                f"unknown method {name!r} for {task}{did_you_mean(name, known, there)}"
            )
    chosen: dict[str, Method] = {}
    skipped: dict[str, str] = {}
    for name, method in known.items():
        if name != "none" and name not in names:
            continue
        reason = method.missing()
        if reason is None and method.labels and not has_labels:
            reason = "it learns from labels; name their column with label_key"
        if reason is None:
            chosen[name] = method
        else:
            skipped[name] = reason
    return chosen | own, skipped


def _own(task: str, name: str, function: "Own") -> Method:
    if name in METHODS[task]:
        raise ConfigError(f"method {name!r} is built in: give yours another name")
    if not callable(function):
        raise ConfigError(
            f"method {name!r} is a {type(function).__name__}; expected a function "
            + (
                "(reference, query, label_key) -> labels"
                if task == "annotate"
                else "AnnData -> array"
            )
        )
    if task == "annotate":
        return Method(annotation.by_function(function), kind="own")
    return Method(lambda adata, conditions: function(adata), kind="own")
