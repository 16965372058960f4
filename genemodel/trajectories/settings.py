"""What is asked of an ordered column: one description for the call and for the verb."""

from dataclasses import dataclass

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError
from genemodel.perturbation.settings import MIN_AUC, MIN_CELLS, MIN_COVERAGE, NULLS
from genemodel.perturbation.variants import OPERATIONS, Operation
from genemodel.settings import ModelText, PathText, check_least, check_seed, texts

PARTS = ("place", "populations", "genes")
N_GENES = 2000
# Of the latent and its decoder: a third of what an integration takes, because one is trained for
# every time that is held out.
STEPS = 300
# Genes that a model is asked about, and cells of a time in which they are perturbed.
PERTURBED, PERTURBED_CELLS = 50, 200


@dataclass(frozen=True, kw_only=True)
class TimeAsked:
    """What is asked of an ordered column, as :func:`genemodel.trajectory` describes it."""

    time_key: str
    order: tuple[str, ...] = ()
    donor_key: str = ""
    parts: tuple[str, ...] = PARTS
    n_genes: int = N_GENES
    steps: int = STEPS
    genes: tuple[str, ...] = ()
    n_perturbed: int = PERTURBED
    perturb_type: Operation = "delete"
    nulls: int = NULLS
    min_cells: int = MIN_CELLS
    min_coverage: float = MIN_COVERAGE
    min_auc: float = MIN_AUC
    max_cells: int = PERTURBED_CELLS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("order", "parts", "genes"):
            object.__setattr__(self, name, texts(getattr(self, name)))
        if not self.time_key:
            raise ConfigError("time_key is empty: name the obs column of times or stages.")
        if self.donor_key == self.time_key:
            raise ConfigError(
                f"donor_key={self.donor_key} is the time_key too: donors that are told by their "
                "time replicate nothing. Name another column, or leave donor_key out."
            )
        unknown = [name for name in self.parts if name not in PARTS]
        if unknown or not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(
                f"parts={list(self.parts)}: give some of {', '.join(PARTS)}, each once."
            )
        if self.perturb_type not in OPERATIONS:
            raise ConfigError(
                f"perturb_type is {self.perturb_type!r}: it must be one of {', '.join(OPERATIONS)}."
            )
        check_least(self, n_genes=10, steps=1, n_perturbed=1, max_cells=10, nulls=0, min_cells=0)
        for name in ("min_auc", "min_coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be in [0, 1].")
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings(TimeAsked, InputSettings):
    """Settings of ``genemodel trajectory``, see ``configs/trajectory.yaml``."""

    input: PathText
    out: PathText
    model: ModelText = ""
    key_added: str = "genemodel_time"
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        TimeAsked.__post_init__(self)
        InputSettings.__post_init__(self)

    @property
    def asked(self) -> TimeAsked:
        """These alone."""
        return self.part(TimeAsked)
