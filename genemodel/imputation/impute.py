"""Counts → denoised rates with their uncertainty, in place or streamed to a file.

Axes: C cells, G genes, P output columns (genes asked for), V vocabulary.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.cells.copies import may_copy
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.finetuning.head_run import HeadRun
from genemodel.imputation.asked import Asked, Wanted, Way, Written, checked_output
from genemodel.imputation.model import MEDIAN_LIBRARY, ImputationModel, Library
from genemodel.imputation.network import DecoderSettings
from genemodel.imputation.output import Layers
from genemodel.imputation.plan import opened, plan_imputation
from genemodel.imputation.ways import make_ready
from genemodel.imputation.writing import write
from genemodel.inference.obs_keys import check_key_added
from genemodel.model.devices import device_of
from genemodel.model.tuning import Tune, TuningSettings
from genemodel.settings import ModelText, PathText, check_seed, either_seed

if TYPE_CHECKING:
    from anndata import AnnData

# Models that impute without being trained on the cells.
IMPUTE = (ImputationModel, Bundle)

logger = logging.getLogger(__name__)

KEY = "imputed"


@either_seed
@may_copy
@reads_cells
def impute(
    adata: "AnnData | str | Path",
    model: Bundle | ImputationModel | str | Path | None = None,
    *,
    batch_key: str | Sequence[str] | None = None,
    key_added: str = KEY,
    uncertainty: bool = False,
    draws: int = 0,
    quantiles: Sequence[float] = (),
    library: Library = None,
    batch: str | None = None,
    genes: Sequence[str] | None = None,
    kind: Written = "posterior",
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    settings: DecoderSettings | None = None,
    backbone: Tune | TuningSettings | None = None,
    device: str | torch.device = "auto",
    run: HeadRun | None = None,
    **options: Unpack[InputOptions],
) -> ImputationModel:
    """Denoise counts: the expected count of every gene in every cell, and how sure that is.

    A decoder is trained on the data itself, on molecules hidden from its encoder, or is that of a
    pre-trained model; it is combined with each cell's own counts in closed form; its uncertainty is
    calibrated on a tenth of the molecules set aside, and what the intervals hold of those is logged
    and kept in ``uns``. See ``docs/imputation.md`` for what the numbers are and what they are not
    good for.

    Parameters
    ----------
    adata
        AnnData in memory or backed, written in place unless ``output`` is given; or the path of
        anything :func:`genemodel.cells.sources.open_source` reads, which needs ``output``.
    model
        What an earlier call returned (:class:`ImputationModel`, which can be saved): nothing is
        trained, and its genes are predicted from those of them that these cells measured. Or a
        bundle (:func:`genemodel.load`): its count decoder imputes as it is, and nothing is trained
        either. With ``settings`` or a ``backbone`` a decoder is trained on these cells all the
        same; the bundle's then predicts ``genes`` that the data did not measure, its gene vectors
        are the start where ``settings.gene_vectors`` says so, and its cell vectors are read where
        ``backbone`` says so. Either may be the path of its folder.
    batch_key
        obs column of the technical batch, or several nested ones; with a trained model by default
        its own. A batch that it was not trained on gets the mean of all offsets; a bundle alone
        knows the batches of its pre-training only, and all get the average of those.
    key_added
        Name of the layer, and beginning of the names of the others.
    uncertainty
        Write the posterior standard deviation as ``{key_added}_sd``.
    draws
        Number of posterior draws, written as ``{key_added}_draw0`` and so on; see
        :func:`genemodel.rubin_pool`.
    quantiles
        Levels, written as ``{key_added}_q5`` for 0.05 and so on.
    library
        None: every cell at its own library; ``"0.5x"``: at half of that, or any factor;
        ``"median"``: all at the median; or a number of counts.
    batch
        None: as measured in the cell's own batch; ``"mean"``: batch-corrected; or the name of a
        batch, as if measured there.
    genes
        Only these, by name; the result is then a table in ``obsm`` instead of a layer.
    kind
        ``"posterior"``: this cell's rates given its own counts; ``"decoder"``: what cells like it
        express, closer to biology, further from this cell's own library; ``"log"``: not counts but
        the expected log1p of counts per 10,000 of another measurement of this cell.
    seed
        Of the split of molecules, the training and the draws.
    output
        ``.h5ad`` or ``.zarr`` to write instead, in blocks of cells.
    overwrite
        Replace an existing output.
    settings
        Of the decoder that is trained.
    backbone
        Read the cell vectors of a bundle beside the counts, made in every step of the molecules
        that are shown: ``"frozen"``, ``"lora"``, ``"last"`` or ``"full"`` say what of it learns.
        None, the default, reads counts alone.
    device
        Where to train: ``auto`` takes a GPU where there is one.
    run
        Folder and devices of the training, instead of ``device``; what fine-tuning uses.
    **options
        How the cells are read. The species is only asked for where a bundle is.

    Returns
    -------
    ImputationModel
        For posteriors and draws of chosen cells without writing anything; of no cells where a file
        was read and nothing trained, which is done in a stream.

    Raises
    ------
    DataError
        Not raw counts, too few cells, or genes and columns that are not there.
    ConfigError
        An impossible or contradictory argument, an existing output, or a result over 4 GB that is
        not written to a file.

    Notes
    -----
    Layers are float32 in the order of the input, shape (n_obs, n_vars); with ``genes``, tables of
    shape (n_obs, len(genes)). A cell without counts gets 0, or NaN at a library that is not a
    multiple of its own. The counts are held in memory in sparse form (but of a file, where nothing
    is trained), the dense result only where it is not written to a file.
    """
    reading = InputSettings.given(options)
    check_key_added(key_added, "layers")
    check_seed(seed)
    layers = Layers(key_added, uncertainty, draws, tuple(quantiles))
    wanted = Wanted(layers, kind, library, batch, genes, seed)
    path = checked_output(output, overwrite, adata)
    if model is not None:
        model = model_for("impute", IMPUTE, model)
    way = Way.of(model, settings, backbone)
    keys = (batch_key,) if isinstance(batch_key, str) else tuple(batch_key or ())
    asked = Asked(adata, reading, keys, way, wanted, path, overwrite)
    with opened(asked) as source:
        plan = plan_imputation(asked, source)
        with ExitStack() as written, np.errstate(invalid="ignore"):
            # Before the training, so that what cannot be written is refused at once; a training in
            # a folder is not lost, and may be of several processes, of which one writes.
            if run is None:
                written.enter_context(plan.sink.open())
            ready = make_ready(plan, run or HeadRun(device=device))
            if run is not None:
                written.enter_context(plan.sink.open())
            empty = write(plan, ready)
    if empty:
        as_sequenced = library is None or (isinstance(library, str) and library != MEDIAN_LIBRARY)
        logger.warning(
            "%s: %s of %s cells have no counts and get %s.",
            source.where, f"{empty:,}", f"{source.n_cells:,}", "0" if as_sequenced else "NaN",
        )  # fmt: skip
    return ready.result()


# -- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImputeSettings(InputSettings):
    """Settings of ``genemodel impute``, see ``configs/impute.yaml``."""

    input: PathText
    output: PathText
    model: ModelText = ""
    batch_key: tuple[str, ...] = ()
    key_added: str = KEY
    uncertainty: bool = False
    draws: int = 0
    quantiles: tuple[float, ...] = ()
    library: float | str | None = None
    batch: str = ""
    genes: tuple[str, ...] = ()
    kind: Written = "posterior"
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False


def impute_file(settings: ImputeSettings) -> Path:
    """Denoise a file; the dense result is written in blocks and never held whole.

    Returns
    -------
    The output path.
    """
    device_of(settings.device)
    impute(
        settings.input,
        model_for("impute", IMPUTE, settings.model, device=settings.device)
        if settings.model
        else None,
        batch_key=settings.batch_key,
        key_added=settings.key_added,
        uncertainty=settings.uncertainty,
        draws=settings.draws,
        quantiles=settings.quantiles,
        library=settings.library,
        batch=settings.batch or None,
        genes=settings.genes or None,
        kind=settings.kind,
        seed=settings.seed,
        output=settings.output,
        overwrite=settings.overwrite,
        device=settings.device,
        **settings.options(),
    )
    return Path(settings.output)
