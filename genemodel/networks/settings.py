"""What networks are made and how they are scored: one description for the call and for the verb."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError
from genemodel.settings import ModelText, PathText, check_seed, nearest

type Method = Literal[
    "attention", "gene_vectors", "perturbation", "jacobian", "pearson", "partial", "grnboost"
]
METHODS: tuple[Method, ...] = (
    "attention", "gene_vectors", "perturbation", "jacobian", "pearson", "partial", "grnboost"
)  # fmt: skip
# Those that ask a model; the others ask the cells alone.
OF_A_MODEL: tuple[Method, ...] = ("attention", "gene_vectors", "perturbation", "jacobian")
# Edges of a method that are written: what benchmarks of networks take.
MAX_EDGES = 50_000
# A gene in fewer cells, or in so small a share of them, correlates with nothing that can be told.
MIN_CELLS, MIN_COVERAGE = 10, 0.05


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is made of which genes and cells, and what it is scored against.

    Attributes
    ----------
    methods
        Any of attention, gene_vectors, perturbation and jacobian, which ask a model, and pearson,
        partial and grnboost, which do not. Empty: all that can be had.
    tfs
        Transcription factors, which edges start from: symbols or Ensembl ids, or one file with a
        name in the first column of every line. Empty: those of ``truth``; without it every gene.
    n_genes
        Targets: so many of the most variable genes, and the transcription factors.
    truth
        Table of known edges to score against: columns tf (or source) and target.
    truth_kind
        Of a table with a column ``kind``: the one that is taken.
    prior
        Tables of edges that the model has been told in training: scores are also given without
        them, as neither edges nor others.
    show
        What a model sees of a cell: ``cell``, all its genes, as in training, of which a context
        that is shorter leaves out most; or ``network``, the genes of the network alone, so that
        pairs of them meet.
    donor_key
        obs column of donors: every network is made of each half of them, too, and both are
        compared.
    max_cells
        Most cells that are looked at; 0 for all.
    jacobian_cells
        Most cells for the Jacobian, which goes backwards through the model once a dimension.
    min_cells, min_coverage
        Least number and share of the cells that hold a gene.
    max_edges
        Edges of a method that are written, the strongest; 0 for all.
    bootstraps
        Resamples of the transcription factors for intervals.
    workers
        Processes for grnboost.
    batch_tokens
        Most tokens at once; 0 for the model's own budget.
    seed
        Of samples, halves, trees and resamples.
    """

    methods: tuple[Method, ...] = ()
    tfs: tuple[str, ...] = ()
    n_genes: int = 1000
    truth: PathText = ""
    truth_kind: str = ""
    prior: tuple[PathText, ...] = ()
    show: Literal["cell", "network"] = "cell"
    donor_key: str = ""
    max_cells: int = 2000
    jacobian_cells: int = 200
    min_cells: int = MIN_CELLS
    min_coverage: float = MIN_COVERAGE
    max_edges: int = MAX_EDGES
    bootstraps: int = 500
    workers: int = 1
    batch_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("methods", "tfs", "prior"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, name, tuple(str(one) for one in value if str(one)))
        for method in self.methods:
            if method not in METHODS:
                near = nearest(method, METHODS)
                raise ConfigError(
                    f"methods names {method!r}"
                    + (f": did you mean {near!r}? " if near else ". ")
                    + f"There are {', '.join(METHODS)}."
                )
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods={list(self.methods)} names one twice.")
        if self.show not in ("cell", "network"):
            raise ConfigError(f"show is {self.show!r}: it must be cell or network.")
        check_seed(self.seed)
        for name, least in (
            ("n_genes", 2), ("max_cells", 0), ("jacobian_cells", 1), ("min_cells", 0),
            ("max_edges", 0), ("bootstraps", 0), ("workers", 1), ("batch_tokens", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least {least}.")
        if not 0 <= self.min_coverage <= 1:
            raise ConfigError(f"min_coverage is {self.min_coverage}: it must be in [0, 1].")
        if (self.truth_kind or self.prior) and not self.truth:
            given = "truth_kind" if self.truth_kind else "prior"
            raise ConfigError(f"{given} is given and no truth: it says what counts of its edges.")


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Asked, InputSettings):
    """Settings of ``genemodel network``, see ``configs/network.yaml``.

    Attributes
    ----------
    input
        File or folder with raw counts.
    out
        Folder to write tables into.
    model
        Folder of a bundle; empty: methods that need none.
    device
        auto, cpu, cuda, cuda:1 and so on.
    overwrite
        Replace an existing ``out``.
    """

    input: PathText
    out: PathText
    model: ModelText = ""
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        InputSettings.__post_init__(self)

    @property
    def asked(self) -> Asked:
        """These alone."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Asked)}
        return Asked(**own)
