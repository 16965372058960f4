"""What networks are made and how they are scored: one description for the call and for the verb."""

from dataclasses import dataclass
from typing import Literal

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError
from genemodel.settings import ModelText, PathText, check_least, check_seed, did_you_mean, texts

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
    """What is made of which genes and cells, as :func:`genemodel.network` describes it."""

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
            object.__setattr__(self, name, tuple(filter(None, texts(getattr(self, name)))))
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(
                    f"methods names {method!r}{did_you_mean(method, METHODS, '.')} "
                    f"There are {', '.join(METHODS)}."
                )
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods={list(self.methods)} names one twice.")
        if self.show not in ("cell", "network"):
            raise ConfigError(f"show is {self.show!r}: it must be cell or network.")
        check_seed(self.seed)
        check_least(
            self, n_genes=2, max_cells=0, jacobian_cells=1, min_cells=0, max_edges=0, bootstraps=0,
            workers=1, batch_tokens=0,
        )  # fmt: skip
        if not 0 <= self.min_coverage <= 1:
            raise ConfigError(f"min_coverage is {self.min_coverage}: it must be in [0, 1].")
        if (self.truth_kind or self.prior) and not self.truth:
            given = "truth_kind" if self.truth_kind else "prior"
            raise ConfigError(f"{given} is given and no truth: it says what counts of its edges.")


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Asked, InputSettings):
    """Settings of ``genemodel network``, see ``configs/network.yaml``."""

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
        return self.part(Asked)
