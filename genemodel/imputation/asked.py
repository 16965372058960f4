"""What a call of imputation asks for, and of what: refused here where it contradicts itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError
from genemodel.imputation.model import ImputationModel, Library, check_library
from genemodel.imputation.network import DecoderSettings
from genemodel.imputation.output import Layers
from genemodel.imputation.pretrained import refuse_without_decoder
from genemodel.model.tuning import Tune, TuningSettings, check_fits, refuse_scratch

if TYPE_CHECKING:
    from anndata import AnnData

Written = Literal["posterior", "decoder", "log"]


@dataclass(frozen=True)
class Wanted:
    """Which numbers are written; see :func:`genemodel.impute` for each."""

    layers: Layers
    kind: Written
    library: Library
    batch: str | None
    genes: Sequence[str] | None
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Written):
            raise ConfigError(f"kind is {self.kind!r}; it must be 'posterior', 'decoder' or 'log'.")
        if self.kind == "log" and len(self.layers.names) > 1:
            raise ConfigError(
                "kind='log' gives expected logarithms only: leave uncertainty, draws and quantiles "
                "to kind='posterior'."
            )
        check_library(self.library)


@dataclass(frozen=True)
class Way:
    """Who predicts: a trained model, the decoder of a bundle as it is, or one trained here.

    Attributes
    ----------
    trained
        A model that was trained elsewhere; nothing is trained here.
    bundle
        A pre-trained model.
    as_it_is
        Whether it imputes by itself, and nothing is trained here either.
    settings
        Of the decoder that is trained here.
    tuning
        What learns of the bundle beneath it; None where its cell vectors take no part.
    """

    trained: ImputationModel | None
    bundle: Bundle | None
    as_it_is: bool
    settings: DecoderSettings
    tuning: TuningSettings | None

    @classmethod
    def of(
        cls,
        model: Bundle | ImputationModel | None,
        settings: DecoderSettings | None,
        backbone: Tune | TuningSettings | None,
    ) -> "Way":
        """Find the way that a call names; refuses what is of another one."""
        trained = model if isinstance(model, ImputationModel) else None
        bundle = model if isinstance(model, Bundle) else None
        if trained is not None and settings is not None:
            raise ConfigError(
                "settings are those of a training, and this model is trained: give one."
            )
        as_it_is = bundle is not None and settings is None and backbone is None
        if as_it_is and bundle is not None:
            refuse_without_decoder(bundle)
        settings = settings or DecoderSettings()
        if trained is None and settings.gene_vectors and bundle is None:
            raise ConfigError("gene_vectors=true needs a pre-trained model: give model=BUNDLE.")
        tuning = (
            backbone if isinstance(backbone, TuningSettings | None) else TuningSettings(backbone)
        )
        if tuning is not None:
            _check_backbone(bundle, trained, tuning)
        return cls(trained, bundle, as_it_is, settings, tuning)

    @property
    def gene_vectors(self) -> bool:
        """Whether a training starts from gene vectors of the bundle."""
        return self.trained is None and self.settings.gene_vectors

    @property
    def start(self) -> Bundle | None:
        """The bundle that a training here learns from."""
        return self.bundle if self.gene_vectors or self.tuning is not None else None

    @property
    def beneath(self) -> Bundle | None:
        """The bundle over whose vocabulary cells may be read."""
        return self.bundle if self.trained is None else self.trained.bundle

    @property
    def over_vocabulary(self) -> bool:
        """Whether the cells are read over its vocabulary, whichever genes are asked for."""
        if self.trained is not None:
            return self.trained.bundle is not None
        return self.as_it_is or self.start is not None


@dataclass(frozen=True)
class Asked:
    """All that a call asks for.

    Attributes
    ----------
    data
        The cells.
    reading
        How they are read.
    batch_keys
        Columns of the technical batch.
    way, wanted
        Who predicts, and what is written.
    output
        File to write, checked; None in place.
    overwrite
        Whether it may be there.
    """

    data: "AnnData | str | Path"
    reading: InputSettings
    batch_keys: tuple[str, ...]
    way: Way
    wanted: Wanted
    output: Path | None
    overwrite: bool

    @property
    def of_a_file(self) -> bool:
        """Whether the cells are in a file, which is read in a stream where nothing is trained."""
        return isinstance(self.data, str | Path)


def checked_output(output: str | Path | None, overwrite: bool, data: object) -> Path | None:
    """Refuse a file that cannot be written, or none where the cells are in a file."""
    if output is None:
        if isinstance(data, str | Path):
            raise ConfigError(
                f"{data} is a path: name output=FILE.h5ad or FILE.zarr for the result, or give an "
                "AnnData."
            )
        return None
    path = Path(output)
    if path.suffix not in (".h5ad", ".zarr"):
        raise ConfigError(f"output={path} ends neither in .h5ad nor in .zarr: it is one of them.")
    if not path.parent.is_dir():
        raise ConfigError(f"output={path}: the folder {path.parent} does not exist.")
    if path.exists():
        if not overwrite:
            raise ConfigError(f"output={path} exists: set overwrite=true, or another name.")
        if isinstance(data, str | Path) and path.resolve() == Path(data).resolve():
            raise ConfigError(f"output={path} is the input itself: name another file.")
    return path


def _check_backbone(
    bundle: Bundle | None, trained: ImputationModel | None, tuning: TuningSettings
) -> None:
    if trained is not None:
        raise ConfigError("backbone is of a training, and this model is trained: give one.")
    refuse_scratch(tuning)
    if bundle is None:
        raise ConfigError(
            f"backbone={tuning.tune!r} reads a pre-trained model: give model=BUNDLE, or leave "
            "backbone out."
        )
    check_fits(tuning, bundle.model.settings)
