"""Counts → denoised rates with their uncertainty, in place or streamed to a file.

Axes: C cells, G genes, P output columns (genes asked for), V vocabulary.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, get_args

import numpy as np
import scipy.sparse as sp
import torch

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.cells.contract import refuse_numbers
from genemodel.cells.copies import may_copy
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.cells.source import Source
from genemodel.cells.sources import open_source
from genemodel.errors import ConfigError, DataError
from genemodel.finetuning.beneath import backbone_of, beneath_of, learnt_from
from genemodel.finetuning.head_run import HeadRun
from genemodel.genes.recognition import without_appended
from genemodel.genes.species import SPECIES
from genemodel.imputation.impute_genes import (
    Columns,
    Unmeasured,
    columns_of_data,
    columns_of_model,
)
from genemodel.imputation.model import (
    LARGEST_IN_MEMORY,
    MEDIAN_LIBRARY,
    ImputationModel,
    Kind,
    Library,
    check_batch,
    check_library,
)
from genemodel.imputation.network import (
    BLOCK_CELLS,
    DecoderSettings,
)
from genemodel.imputation.output import InPlace, Layers, Sink, Tables, ToFile
from genemodel.imputation.posterior import GammaPosterior
from genemodel.imputation.pretrained import (
    Bring,
    PretrainedImputation,
    in_a_stream,
    joined,
    median_library,
    refuse_without_decoder,
)
from genemodel.imputation.token_backbone import TokenBackbone
from genemodel.inference.cell_vectors import embedding_of
from genemodel.inference.counts import VocabularyCells, VocabularyChunk
from genemodel.inference.gene_counts import GeneOrder, gene_order
from genemodel.inference.obs_keys import batch_names, check_key_added, column
from genemodel.model.devices import device_of
from genemodel.model.tuning import Tune, TuningSettings, check_fits
from genemodel.settings import ModelText, PathText, check_seed, either_seed, to_values

if TYPE_CHECKING:
    from anndata import AnnData

# Models that impute without being trained on the cells.
IMPUTE = (ImputationModel, Bundle)

logger = logging.getLogger(__name__)

KEY = "imputed"
Written = Literal["posterior", "decoder", "log"]


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
    _check_kind(kind, layers)
    check_library(library)
    path = _checked_output(output, overwrite, adata)
    if model is not None:
        model = model_for("impute", IMPUTE, model)
    trained = model if isinstance(model, ImputationModel) else None
    bundle = model if isinstance(model, Bundle) else None
    if trained is not None and settings is not None:
        raise ConfigError("settings are those of a training, and this model is trained: give one.")
    as_it_is = bundle is not None and settings is None and backbone is None
    if as_it_is and bundle is not None:
        refuse_without_decoder(bundle)
    settings = settings or DecoderSettings()
    keys = (batch_key,) if isinstance(batch_key, str) else tuple(batch_key or ())
    vectors = trained is None and settings.gene_vectors
    if vectors and bundle is None:
        raise ConfigError("gene_vectors=true needs a pre-trained model: give model=BUNDLE.")
    tuning = backbone if isinstance(backbone, TuningSettings | None) else TuningSettings(backbone)
    if tuning is not None:
        _check_backbone(bundle, trained, tuning)
    beneath = bundle if trained is None else trained.bundle
    source = _open(
        adata, beneath, reading, keys,
        keep=trained.batch_keys if trained is not None else (),
        needs_species=genes is not None or vectors or tuning is not None or as_it_is
        or (trained is not None and trained.bundle is not None),
    )  # fmt: skip
    try:
        refuse_numbers(source.genes, source.where)
        cells: VocabularyCells | None = None
        order: GeneOrder | None = None
        gene_vectors_GE: np.ndarray | None = None
        if trained is not None:
            own = trained.batch_keys
            # A column that bears a corpus's name is there even where the data have none.
            if not keys and all(k in source.obs and source.obs[k].notna().all() for k in own):
                keys = own
            order, code_C = _order(trained, source, keys)
            if isinstance(adata, str | Path):  # read in a stream: the model is of none yet
                counts_CG = sp.csr_matrix((0, len(trained.genes)), dtype=np.float32)
                trained = trained.of(counts_CG, code_C[:0], order.there_W, where=source.where)
            else:
                trained = _other_cells(trained, source, order, code_C, reading)
            codes_C, names = None, trained.batches
            columns = columns_of_model(trained, source, genes)
        else:
            codes_C, names = _batches(source, keys)
            columns, cells = columns_of_data(source, genes, bundle, reading)
            if vectors and bundle is not None:
                gene_vectors_GE = _gene_vectors(cells or VocabularyCells(source, bundle, reading))
            if as_it_is and keys:
                logger.info(
                    "%s: the batches of %s are unknown to the pre-trained decoder: it decodes the "
                    "average of its own.",
                    source.where, ", ".join(keys),
                )  # fmt: skip
                names = ()
        check_batch(batch, names, source.where)
        if path is None:
            _refuse_too_large(source.n_cells, len(columns.names), layers)
            _refuse_other_genes(adata, source, genes)
        foreign = Unmeasured(cells, columns.token_P) if cells is not None else None
        sink: Sink
        if path is None:
            sink = InPlace(
                cast("AnnData", adata), columns, layers, in_table=genes is not None,
                column_P=source.counts.column_G,
            )  # fmt: skip
        else:
            tables = Tables.of_input(
                adata, source, columns,
                key=key_added, every=genes is None, trained=trained is not None,
            )  # fmt: skip
            sink = ToFile(path, overwrite, tables, layers)
        counts_CG = _read(source) if trained is None and not as_it_is else None
        with ExitStack() as opened, np.errstate(invalid="ignore"):
            # Before the training, so that what cannot be written is refused at once; a training in
            # a folder is not lost, and may be of several processes, of which one writes.
            if run is None:
                opened.enter_context(sink.open())
            asked, kept = library, list[ImputationModel]()
            read = columns
            stream: tuple[Bring, np.ndarray, np.ndarray | None] | None = None
            if order is not None and isinstance(adata, str | Path):
                stream = (order.apply, code_C, order.there_W)
                if beneath is not None:
                    cells = VocabularyCells(source, beneath, reading)
            if as_it_is:
                cells = cells or VocabularyCells(source, cast(Bundle, bundle), reading)
                pretrained = PretrainedImputation(cells, seed=seed)
                trained, read = pretrained.model, columns.among(pretrained.known_G)
                stream = (pretrained.bring, np.zeros(source.n_cells, np.int64), None)
            elif trained is None:
                over = None
                if tuning is not None and bundle is not None:
                    cells = cells or VocabularyCells(source, bundle, reading)
                    over = _over_tokens(cells, tuning)
                trained = ImputationModel.train(
                    counts_CG,
                    codes_C,
                    names,
                    settings,
                    genes=[str(name) for name in source.genes.index],
                    batch_keys=keys,
                    gene_vectors_GE=gene_vectors_GE,
                    backbone=over,
                    run=run or HeadRun(device=device),
                    seed=seed,
                    where=source.where,
                )
                if bundle is not None and (vectors or tuning):
                    trained.provenance["model"] = bundle.fingerprint
                trained.provenance["backbone"] = "" if tuning is None else tuning.tune
                start = bundle if vectors or tuning is not None else None
                if start is not None and cells is None:
                    cells = VocabularyCells(source, start, reading)
                told = _manifest(source, trained, cells if start is not None else None)
                trained.training = learnt_from(told, start)
                trained.vocabulary = None if start is None else start.vocabulary
                if over is not None and bundle is not None and cells is not None:
                    model_beneath = trained.trained.backbone
                    assert model_beneath is not None
                    beneath = (
                        beneath_of(
                            bundle,
                            model_beneath,
                            f"{tuning.tune}, beneath an imputation",
                            trained.history,
                            trained.training,
                        )
                        if tuning is not None and tuning.tune != "frozen"
                        else bundle
                    )
                    trained = trained.with_vectors(beneath, _vectors(source, beneath, reading))
            if run is not None:
                opened.enter_context(sink.open())
            if stream is not None:
                if library == MEDIAN_LIBRARY:
                    asked = median_library(source, stream[0])
                made = in_a_stream(trained, source, cells, *stream)
                blocks = _streamed(made, None if isinstance(adata, str | Path) else kept)
            else:
                blocks = _in_memory(trained, foreign)
            empty = _write(sink, blocks, foreign, read, layers, asked, batch, kind, seed)
            about = _provenance(trained, source, columns, bundle, library, batch, kind, seed)
            about["trained"] = "on other cells" if isinstance(model, ImputationModel) else "here"
            if as_it_is:
                about |= {"trained": "in pre-training", "model": trained.provenance["model"]}
            sink.finish(about, _dispersion(trained, foreign, read))
    finally:
        if isinstance(adata, str | Path):
            source.close()
    if empty:
        as_sequenced = library is None or (isinstance(library, str) and library != MEDIAN_LIBRARY)
        logger.warning(
            "%s: %s of %s cells have no counts and get %s.",
            source.where, f"{empty:,}", f"{source.n_cells:,}", "0" if as_sequenced else "NaN",
        )  # fmt: skip
    return joined(kept) if kept else trained


# -- before the work -----------------------------------------------------------------------------


def _check_kind(kind: str, layers: Layers) -> None:
    if kind not in get_args(Written):
        raise ConfigError(f"kind is {kind!r}; it must be 'posterior', 'decoder' or 'log'.")
    if kind == "log" and len(layers.names) > 1:
        raise ConfigError(
            "kind='log' gives expected logarithms only: leave uncertainty, draws and quantiles to "
            "kind='posterior'."
        )


def _checked_output(output: str | Path | None, overwrite: bool, adata: object) -> Path | None:
    if output is None:
        if isinstance(adata, str | Path):
            raise ConfigError(
                f"{adata} is a path: name output=FILE.h5ad or FILE.zarr for the result, or give an "
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
        if isinstance(adata, str | Path) and path.resolve() == Path(adata).resolve():
            raise ConfigError(f"output={path} is the input itself: name another file.")
    return path


def _open(
    data: "AnnData | str | Path",
    model: Bundle | None,
    reading: InputSettings,
    batch_keys: tuple[str, ...],
    *,
    keep: tuple[str, ...],
    needs_species: bool,
) -> Source:
    columns = {key: key for key in batch_keys}
    if model is not None and reading.species is None and len(model.species) == 1:
        reading = reading.but(species=model.species[0])
    try:
        return open_source(data, columns=columns, keep=keep, **reading.opening())
    except ConfigError:
        if reading.species is not None or (model is not None and needs_species):
            raise
    # The species is not stated, and plays no part where nothing is looked up in a vocabulary.
    reading = reading.but(species=next(iter(SPECIES)))
    source = open_source(data, columns=columns, keep=keep, **reading.opening())
    source.obs = source.obs.drop(columns="species")
    return source


def _batches(source: Source, keys: tuple[str, ...]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if not keys:
        return None, ()
    names, codes_C = np.unique(_batch_names(source, keys), return_inverse=True)
    return codes_C.astype(np.int64), tuple(map(str, names))


def _batch_names(source: Source, keys: tuple[str, ...]) -> np.ndarray:
    for key in keys:
        missing = int(column(source.obs, key, "batch_key", source.where).isna().sum())
        if missing:
            raise DataError(
                f"{source.where}: obs column {key!r} has no value for {missing:,} of "
                f"{source.n_cells:,} cells. Fill them in (a name of their own will do), or leave "
                "those cells out."
            )
    return batch_names(source.obs, keys, source.where, settled=True).astype(str)


def _check_backbone(
    bundle: Bundle | None, trained: ImputationModel | None, tuning: TuningSettings
) -> None:
    if trained is not None:
        raise ConfigError("backbone is of a training, and this model is trained: give one.")
    if tuning.tune == "scratch":
        raise ConfigError(
            "backbone='scratch' means new weights, which pre-training makes: `genemodel finetune "
            "backbone=scratch`, or gm.pretrain; then give the bundle with backbone='frozen'."
        )
    if bundle is None:
        raise ConfigError(
            f"backbone={tuning.tune!r} reads a pre-trained model: give model=BUNDLE, or leave "
            "backbone out."
        )
    check_fits(tuning, bundle.model.settings)


def _over_tokens(cells: VocabularyCells, tuning: TuningSettings) -> TokenBackbone:
    """Find the tokens of the data's own genes, for a transformer beneath."""
    if len(cells.matches) > 1:
        raise ConfigError(
            f"{cells.source.where}: holds several species, whose genes are other tokens in each: "
            "impute one species at a time, or without the vectors of a model."
        )
    bundle = cells.bundle
    ((_, match),) = cells.matches.items()
    return TokenBackbone(
        backbone_of(bundle, tuning), len(bundle.vocabulary), match.token_G, cells.species_C
    )


def _manifest(
    source: Source, trained: ImputationModel, cells: VocabularyCells | None
) -> TrainingManifest:
    """Take down the cells of a training: over a vocabulary, or over the data's own genes."""
    counts_CV, species_C = trained.counts_CG, None
    if cells is not None:
        blocks = [chunk.counts_CV for chunk in cells.chunks()]
        counts_CV = sp.vstack(blocks, format="csr")
        species_C = np.array(cells.bundle.species, dtype=object)[cells.species_C]
    return TrainingManifest.of_counts(
        counts_CV, np.flatnonzero(trained.library_C > 0), species_C, name=source.name,
        file=source.file, licence=source.licence, citation=source.citation,
    )  # fmt: skip


def _vectors(source: Source, bundle: Bundle, reading: InputSettings) -> np.ndarray:
    return embedding_of(VocabularyCells(source, bundle, reading), bundle)


def _gene_vectors(cells: VocabularyCells) -> np.ndarray:
    """Pre-trained vector of every gene of the data, NaN for a gene outside the vocabulary, (G, E).

    Those of the count decoder where the model has one, because they say what ours are to say.
    """
    bundle = cells.bundle
    weight_VE = bundle.heads.get("decode_counts.gene.weight", bundle.model.embedding.token.weight)
    token_G = np.full(len(cells.source.genes), -1)
    for match in cells.matches.values():
        token_G = np.where(token_G >= 0, token_G, match.token_G)
    vectors_GE = weight_VE.detach().float().cpu().numpy()[token_G]
    vectors_GE[token_G < 0] = np.nan
    return vectors_GE


def _refuse_too_large(n_cells: int, n_columns: int, layers: Layers) -> None:
    size = 4.0 * n_cells * n_columns * len(layers.names)
    if size > LARGEST_IN_MEMORY:
        raise ConfigError(
            f"{n_cells:,} cells × {n_columns:,} genes × {len(layers.names)} layers take "
            f"{size / 1e9:.1f} GB in memory (most is {LARGEST_IN_MEMORY / 1e9:.0f} GB): write them "
            "to a file with output=FILE.zarr or FILE.h5ad, name the genes you need with "
            "genes=[...], or ask for fewer draws and quantiles."
        )


def _refuse_other_genes(adata: Any, source: Source, genes: Sequence[str] | None) -> None:
    # Features that are no genes get NaN.
    if genes is None and source.counts.column_G is None and len(source.genes) != adata.n_vars:
        raise ConfigError(
            f"{source.where}: the counts have {len(source.genes):,} genes, the AnnData "
            f"{adata.n_vars:,}, so they cannot become a layer. Use output=FILE.h5ad or genes=[...]."
        )


def _read(source: Source) -> sp.csr_matrix:
    parts = [chunk.counts_CG for chunk in source.chunks()]
    counts_CG = sp.csr_matrix(sp.vstack(parts, format="csr") if len(parts) > 1 else parts[0])
    counts_CG.sum_duplicates()
    return counts_CG


# -- a model that is there -----------------------------------------------------------------------


def _order(
    trained: ImputationModel, source: Source, keys: tuple[str, ...]
) -> tuple[GeneOrder, np.ndarray]:
    """Find the model's genes among those of other cells, and look their batches up."""
    index = [str(name) for name in source.genes.index]
    often = Counter(index)
    if repeated := sorted(name for name in set(trained.genes) if often[name] > 1):
        raise DataError(
            f"{source.where}: genes of the model occur more than once ({', '.join(repeated[:5])}). "
            "Make the names unique (adata.var_names_make_unique()) as in the training data."
        )
    # What scanpy calls GENE-1 is a second row of GENE, unless the model knows it by that name.
    known = set(trained.genes)
    merged = [
        name if name in known else first
        for name, first in zip(index, without_appended(index), strict=True)
    ]
    order = gene_order(
        merged, trained.genes, read_W=trained.kept_G, where=source.where,
        remedy="Use the gene names of the training data, or leave model out to train here.",
    )  # fmt: skip
    code_C = np.full(source.n_cells, -1)
    if keys and trained.batches:
        name_C = _batch_names(source, keys)
        place = {name: code for code, name in enumerate(trained.batches)}
        code_C = np.array([place.get(name, -1) for name in name_C])
    elif not trained.batches:
        code_C[:] = 0
    if (code_C < 0).any():
        logger.info(
            "%s: %s cells are of no batch of the training: they get the mean of all.",
            source.where, f"{int((code_C < 0).sum()):,}",
        )  # fmt: skip
    return order, code_C


def _other_cells(
    trained: ImputationModel,
    source: Source,
    order: GeneOrder,
    code_C: np.ndarray,
    reading: InputSettings,
) -> ImputationModel:
    """Read other cells into memory and give the model of them."""
    counts_CG = order.apply(_read(source).astype(np.float32))
    features_CF = None if trained.bundle is None else _vectors(source, trained.bundle, reading)
    return trained.of(counts_CG, code_C, order.there_W, where=source.where, features_CF=features_CF)


# -- the work ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Consecutive cells: row of the first, and which of a model's cells they are.

    ``chunk`` has their counts by token, where genes are predicted that were not measured.
    """

    start: int
    model: ImputationModel
    rows: slice
    chunk: VocabularyChunk | None

    @property
    def library_C(self) -> np.ndarray:
        """Counts of every cell."""
        return self.model.library_C[self.rows]


def _in_memory(trained: ImputationModel, foreign: Unmeasured | None) -> Iterator[_Block]:
    """Go through the cells that a model holds."""
    if foreign is not None:
        for chunk in foreign.cells.chunks(BLOCK_CELLS):
            stop = chunk.start + chunk.counts_CV.shape[0]
            yield _Block(chunk.start, trained, slice(chunk.start, stop), chunk)
        return
    for start in range(0, len(trained), BLOCK_CELLS):
        stop = min(start + BLOCK_CELLS, len(trained))
        yield _Block(start, trained, slice(start, stop), None)


def _streamed(
    made: Iterator[tuple[int, ImputationModel, VocabularyChunk | None]],
    kept: list[ImputationModel] | None,
) -> Iterator[_Block]:
    """Go through cells as they are read; ``kept`` gets them, where they are not too many."""
    for start, model, chunk in made:
        if kept is not None:
            kept.append(model)
        yield _Block(start, model, slice(0, len(model)), chunk)


def _write(
    sink: Sink,
    blocks: Iterator[_Block],
    foreign: Unmeasured | None,
    columns: Columns,
    layers: Layers,
    library: Library,
    batch: str | None,
    kind: Written,
    seed: int,
) -> int:
    """Compute block after block of cells and hand each to the sink; counts cells without counts."""
    measured_P, empty = columns.measured_P, 0
    whose: Kind = "decoder" if kind == "decoder" else "posterior"
    for block in blocks:
        library_C = block.library_C
        empty += int((library_C == 0).sum())
        rows = slice(block.start, block.start + len(library_C))
        ratio_C = block.model.library_ratio(library, block.rows)
        found = block.model.posterior(
            block.rows, genes=columns.column_P[measured_P], library=library, batch=batch, kind=whose
        )
        if not measured_P.all():
            shape_CP = np.ones((len(library_C), len(columns.names)))
            rate_CP = np.full_like(shape_CP, np.nan)
            shape_CP[:, measured_P], rate_CP[:, measured_P] = found.shape_CG, found.rate_CG
            if foreign is not None and block.chunk is not None:
                mean_CU = foreign.mean(block.chunk) * ratio_C[:, None]
                predicted_P = columns.predicted_P
                shape_CP[:, predicted_P] = foreign.theta_U
                rate_CP[:, predicted_P] = foreign.theta_U / np.maximum(mean_CU, 1e-12)
            found = GammaPosterior(shape_CP, rate_CP)
        if kind == "log":
            value_CP = found.log_mean(ratio_C * library_C)
            sink.write(layers.key, rows, value_CP.astype(np.float32))
            continue
        # One stream of chance a block: the order in which blocks are made cannot matter.
        generator = np.random.default_rng((seed, block.start))
        for name, values_CP in zip(layers.names, layers.values(found, generator), strict=True):
            sink.write(name, rows, values_CP.astype(np.float32))
    return empty


def _dispersion(
    trained: ImputationModel, foreign: Unmeasured | None, columns: Columns
) -> np.ndarray:
    dispersion_P = np.full(len(columns.names), np.nan)
    measured_P = columns.measured_P
    dispersion_P[measured_P] = trained.dispersion_G[columns.column_P[measured_P]]
    if foreign is not None:
        dispersion_P[columns.predicted_P] = 1.0 / foreign.theta_U
    return dispersion_P


def _provenance(
    trained: ImputationModel,
    source: Source,
    columns: Columns,
    model: Bundle | None,
    library: Library,
    batch: str | None,
    kind: str,
    seed: int,
) -> dict[str, Any]:
    """Say what was done, for ``uns``: plain values only."""
    coverage = trained.trained.coverage
    about: dict[str, Any] = {
        "genemodel": genemodel.__version__,
        "counts": source.counts.name,
        "kind": kind,
        "library": "as sequenced" if library is None else library,
        "batch": "as measured" if batch is None else batch,
        "batches": list(trained.batches),
        "seed": seed,
        "settings": to_values(trained.settings),
        "passes": trained.trained.history[-1][0],
        "heldout_nats_per_molecule": trained.trained.heldout_nats,
        "dispersion_median": float(np.median(trained.trained.dispersion_G)),
        "coverage": {
            "definition": "90 % randomised interval, molecules set aside",
            "share_of_molecules": trained.settings.calibration_fraction,
            "overall": coverage.overall,
            "by_gene_decile": np.array(coverage.by_gene_decile),
            "by_predicted_mean_from": np.array([low for low, _, _ in coverage.by_mean]),
            "by_predicted_mean": np.array([share for _, share, _ in coverage.by_mean]),
            "entries": np.array([n for _, _, n in coverage.by_mean]),
        },
        "unmeasured": columns.unmeasured,
    }
    if model is not None and columns.unmeasured:
        about["model"] = model.fingerprint
    return about


# -- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImputeSettings(InputSettings):
    """Denoise a file, read as :class:`InputSettings` say, and write the result to another.

    Attributes
    ----------
    input
        File or folder with raw counts.
    output
        h5ad or zarr to write: all that the input holds but its counts, with layers and provenance.
    model
        Folder of an imputation model, or of a bundle with a count decoder: used as it is, nothing
        is trained; empty to train on these cells.
    batch_key
        obs column of the technical batch, several for nested ones; empty for none.
    key_added
        Name of the layer, and beginning of the names of the others.
    uncertainty
        Write the standard deviation.
    draws
        Number of posterior draws to write.
    quantiles
        Levels to write.
    library
        null for as sequenced, 0.5x (half of that; any factor), median, or a number of counts.
    batch
        Empty for each cell's own, mean for batch-corrected, or the name of a batch.
    genes
        Only these; empty for all measured ones.
    kind
        posterior, decoder or log.
    seed
        Of the split of molecules, the training and the draws.
    device
        Where to train, and where the model is: auto, cpu, cuda, cuda:1 …
    overwrite
        Replace an existing output.
    """

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
