"""What is perturbed and what is measured: one description for the call and for the verb."""

from dataclasses import dataclass
from typing import Literal

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError
from genemodel.perturbation.passes import MODES, How, Mode, Precision
from genemodel.perturbation.variants import OPERATIONS, QUARTILES, Operation
from genemodel.settings import ModelText, PathText, check_seed, texts

# AUC of telling two states apart below which a shift between them is noise: .5 is chance.
MIN_AUC = 0.6
# A gene in fewer cells, or in so small a share of them, has no mean to speak of.
MIN_CELLS, MIN_COVERAGE = 10, 0.01
# Genes that are alike, for each that is tested.
NULLS = 30


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is perturbed and measured, as :func:`genemodel.perturb` describes it."""

    genes: tuple[str, ...] = ("all",)
    perturb_type: Operation = "delete"
    rank_shift: int | None = None
    combos: int = 1
    anchor_gene: str = ""
    group_needs: Literal["any", "all"] = "any"
    emb_mode: Mode = "cls"
    state_key: str = ""
    start_state: str = ""
    goal_state: str = ""
    alt_states: tuple[str, ...] = ()
    donor_key: str = ""
    nulls: int = NULLS
    position_preserving: bool = True
    min_cells: int = MIN_CELLS
    min_coverage: float = MIN_COVERAGE
    min_auc: float = MIN_AUC
    max_cells: int = 2000
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("perturb_type", OPERATIONS), ("emb_mode", MODES), ("group_needs", ("any", "all")),
            ("precision", ("float32", "bfloat16")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}."
                )
        for name in ("genes", "alt_states"):
            object.__setattr__(self, name, texts(getattr(self, name)))
        check_seed(self.seed)
        shifted = self.perturb_type in ("inhibit", "activate")
        if self.rank_shift is not None and not (shifted and 1 <= self.rank_shift < QUARTILES):
            raise ConfigError(
                f"rank_shift is {self.rank_shift} with perturb_type={self.perturb_type}: inhibit "
                f"and activate move a gene by 1 to {QUARTILES - 1} quartiles; leave it out "
                "otherwise."
            )
        if self.combos < 1:
            raise ConfigError(f"combos is {self.combos}: give 1 for each gene alone, 2 for pairs.")
        if self.combos > 1 and self.anchor_gene:
            raise ConfigError(
                f"combos={self.combos} and anchor_gene={self.anchor_gene} both say what is "
                "combined: give one of them."
            )
        if self.combos > 1 and "all" in self.genes:
            raise ConfigError(
                f"combos={self.combos} of all genes are millions: name the genes that are combined."
            )
        if (self.start_state or self.goal_state or self.alt_states) and not self.state_key:
            raise ConfigError("states are named and no state_key: give the obs column they are of.")
        if self.goal_state and not self.start_state:
            raise ConfigError(
                f"goal_state={self.goal_state} has no start_state: say which cells are perturbed."
            )
        if self.state_key and not self.start_state:
            raise ConfigError(
                f"state_key={self.state_key} has no start_state: say which cells are perturbed."
            )
        if self.alt_states and not self.goal_state:
            raise ConfigError("alt_states stand beside a goal_state: give that too.")
        named = [self.goal_state, self.start_state, *self.alt_states]
        named = [name for name in named if name]
        if len(set(named)) < len(named):
            raise ConfigError(f"states {', '.join(named)}: one is named twice.")
        for name in ("nulls", "max_cells", "min_cells"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative.")
        for name in ("min_auc", "min_coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be in [0, 1].")

    @property
    def states(self) -> tuple[str, ...]:
        """Goal, start, alternatives; empty without a goal."""
        return (self.goal_state, self.start_state, *self.alt_states) if self.goal_state else ()

    @property
    def how(self) -> How:
        """What of this the passes through a model know."""
        return How(
            operation=self.perturb_type,
            quartiles=self.rank_shift,
            held=self.position_preserving and self.perturb_type == "delete",
            mode=self.emb_mode,
            all_members=self.group_needs == "all",
            precision=self.precision,
        )


@dataclass(frozen=True, kw_only=True)
class PerturbSettings(Asked, InputSettings):
    """Settings of ``genemodel perturb``, see ``configs/perturb.yaml``."""

    model: ModelText
    input: PathText
    out: PathText
    tables: Literal["parquet", "csv"] = "parquet"
    batch_tokens: int = 0
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        InputSettings.__post_init__(self)
        if self.batch_tokens < 0:
            raise ConfigError(f"batch_tokens is {self.batch_tokens}: it must not be negative.")

    @property
    def asked(self) -> Asked:
        """These alone."""
        return self.part(Asked)
