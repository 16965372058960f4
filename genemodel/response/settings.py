"""What is predicted and what it is judged by: one description for the call and for the verb."""

from dataclasses import dataclass
from typing import Literal

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError
from genemodel.settings import ModelText, PathText, check_least, check_seed, texts

type Holdout = Literal["targets", "cell_types", "doses", "donors"]
HOLDOUTS = ("targets", "cell_types", "doses", "donors")
# Cells below which a group has no profile to speak of.
MIN_CELLS = 20
# Molecules of a gene that a group of median size must be expected to hold: of fewer, what is
# measured is which group was larger.
MIN_COUNTS = 10.0
# Parts that targets are held out in; other things are held out one by one.
TARGET_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class AskedResponse:
    """What is predicted and what it is judged by, as :func:`genemodel.respond` describes it."""

    perturbation_key: str
    control: str
    holdout: Holdout = "targets"
    label_key: str = ""
    dose_key: str = ""
    batch_key: str = ""
    donor_key: str = ""
    guide_key: str = ""
    predict: tuple[str, ...] = ()
    folds: int = 0
    repeats: int = 3
    permutations: int = 499
    min_cells: int = MIN_CELLS
    min_counts: float = MIN_COUNTS
    combination: str = "+"
    knowledge: tuple[PathText, ...] = ()
    cells: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.holdout not in HOLDOUTS:
            raise ConfigError(
                f"holdout is {self.holdout!r}: it must be one of {', '.join(HOLDOUTS)}."
            )
        for name in ("predict", "knowledge"):
            object.__setattr__(self, name, texts(getattr(self, name)))
        object.__setattr__(self, "control", str(self.control))
        check_seed(self.seed)
        needed = {"cell_types": "label_key", "doses": "dose_key", "donors": "donor_key"}
        key = needed.get(self.holdout)
        if key is not None and not getattr(self, key):
            raise ConfigError(
                f"holdout={self.holdout} needs {key}: name the obs column of what is held out."
            )
        if self.donor_key and self.holdout != "donors":
            raise ConfigError(
                f"donor_key={self.donor_key} is read with holdout=donors only: to compare cells "
                "within donors, name the column as batch_key."
            )
        keys = [
            getattr(self, name)
            for name in ("perturbation_key", "label_key", "dose_key", "donor_key", "guide_key")
        ]
        keys = [key for key in keys if key]
        if len(set(keys)) < len(keys):
            raise ConfigError(
                f"perturbation_key, label_key, dose_key, donor_key and guide_key are "
                f"{', '.join(keys)}: one column cannot be two of these."
            )
        check_least(self, folds=0, repeats=1, permutations=99, min_cells=4, cells=0, min_counts=0)
        if self.folds == 1:
            raise ConfigError("folds is 1: with everything held out nothing is left to learn from.")
        if not self.combination:
            raise ConfigError("combination is empty: give the text between targets, such as +.")
        if self.knowledge and self.holdout != "targets":
            raise ConfigError(
                f"knowledge is of targets, and holdout={self.holdout} predicts targets that were "
                "measured: leave knowledge out."
            )


@dataclass(frozen=True, kw_only=True)
class RespondSettings(AskedResponse, InputSettings):
    """Settings of ``genemodel respond``, see ``configs/respond.yaml``."""

    input: PathText
    out: PathText
    model: ModelText = ""
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        AskedResponse.__post_init__(self)
        InputSettings.__post_init__(self)
        if self.model and self.holdout != "targets":
            raise ConfigError(
                f"model gives vectors of targets, and holdout={self.holdout} predicts targets that "
                "were measured: leave model out."
            )

    @property
    def asked(self) -> AskedResponse:
        """These alone."""
        return self.part(AskedResponse)
