"""What an imputation will do, settled and refused before any work: cells, genes, batches, outputs.

Axes: C cells, G genes of the data, P output columns (genes asked for).
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import scipy.sparse as sp

from genemodel.cells.contract import refuse_numbers
from genemodel.cells.source import Source
from genemodel.cells.sources import open_source
from genemodel.errors import ConfigError, DataError
from genemodel.genes.recognition import without_appended
from genemodel.genes.species import SPECIES
from genemodel.imputation.asked import Asked
from genemodel.imputation.impute_genes import (
    Columns,
    Unmeasured,
    columns_of_data,
    columns_of_model,
)
from genemodel.imputation.model import LARGEST_IN_MEMORY, ImputationModel, check_batch
from genemodel.imputation.output import InPlace, Layers, Sink, Tables, ToFile
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.gene_counts import GeneOrder, gene_order
from genemodel.inference.obs_keys import batch_names, column

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


@contextmanager
def opened(asked: Asked) -> Iterator[Source]:
    """Open the cells; a file is closed again."""
    source = _open(asked)
    try:
        yield source
    finally:
        if asked.of_a_file:
            source.close()


def _open(asked: Asked) -> Source:
    way, reading, model = asked.way, asked.reading, asked.way.beneath
    columns = {key: key for key in asked.batch_keys}
    keep = () if way.trained is None else way.trained.batch_keys
    if model is not None and reading.species is None and len(model.species) == 1:
        reading = reading.but(species=model.species[0])
    looks_up = model is not None and (asked.wanted.genes is not None or way.over_vocabulary)
    try:
        return open_source(asked.data, columns=columns, keep=keep, **reading.opening())
    except ConfigError:
        if reading.species is not None or looks_up:
            raise
    # The species is not stated, and plays no part where nothing is looked up in a vocabulary.
    reading = reading.but(species=next(iter(SPECIES)))
    source = open_source(asked.data, columns=columns, keep=keep, **reading.opening())
    source.obs = source.obs.drop(columns="species")
    return source


@dataclass(frozen=True)
class Plan:
    """What an imputation will do.

    Attributes
    ----------
    asked
        The call.
    source
        The cells, open.
    columns
        Genes that are written, and where each comes from.
    unmeasured
        Predicts those that the data did not measure; None where there are none.
    batch_keys
        Columns that tell the batches apart.
    batches, code_C
        Names of the batches, and which of them every cell is of: -1 for none of them, None where
        they are not told apart.
    order
        How the genes of the data come in the order of a trained model.
    over
        The cells over the vocabulary of the bundle that takes part.
    sink
        Where the layers go.
    counts_CG
        Counts of all cells; None where they are read in a stream.
    """

    asked: Asked
    source: Source
    columns: Columns
    unmeasured: Unmeasured | None
    batch_keys: tuple[str, ...]
    batches: tuple[str, ...]
    code_C: np.ndarray | None
    order: GeneOrder | None
    over: VocabularyCells | None
    sink: Sink
    counts_CG: sp.csr_matrix | None


def plan_imputation(asked: Asked, source: Source) -> Plan:
    """Settle what will be done with some cells.

    Raises
    ------
    DataError
        Genes, columns or values that are not there or are no raw counts.
    ConfigError
        A batch that is not there, or a result over 4 GB that is not written to a file.
    """
    refuse_numbers(source.genes, source.where)
    way, wanted, keys = asked.way, asked.wanted, asked.batch_keys
    over: VocabularyCells | None = None
    order: GeneOrder | None = None
    code_C: np.ndarray | None
    if way.trained is not None:
        own = way.trained.batch_keys
        # A column that bears a corpus's name is there even where the data have none.
        if not keys and all(k in source.obs and source.obs[k].notna().all() for k in own):
            keys = own
        order, code_C = _order(way.trained, source, keys)
        batches = way.trained.batches
        columns = columns_of_model(way.trained, source, wanted.genes)
    else:
        code_C, batches = _batches(source, keys)
        columns, over = columns_of_data(source, wanted.genes, way.bundle, asked.reading)
        if way.as_it_is and keys:
            logger.info(
                "%s: the batches of %s are unknown to the pre-trained decoder: it decodes the "
                "average of its own.",
                source.where, ", ".join(keys),
            )  # fmt: skip
            batches = ()
    check_batch(wanted.batch, batches, source.where)
    if asked.output is None:
        _refuse_too_large(source.n_cells, len(columns.names), wanted.layers)
        _refuse_other_genes(asked, source)
    unmeasured = None if over is None else Unmeasured(over, columns.token_P)
    if over is None and way.over_vocabulary and way.beneath is not None:
        over = VocabularyCells(source, way.beneath, asked.reading)
    if over is not None and (way.as_it_is or way.tuning is not None):
        _refuse_several_species(over, or_else="" if way.as_it_is else _WITHOUT_VECTORS)
    sink = _sink(asked, source, columns)
    in_a_stream = way.as_it_is or (way.trained is not None and asked.of_a_file)
    counts_CG = None if in_a_stream else _read(source)
    return Plan(
        asked, source, columns, unmeasured, keys, batches, code_C, order, over, sink, counts_CG
    )


# -- batches -------------------------------------------------------------------------------------


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


# -- the genes of a model ------------------------------------------------------------------------


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


_WITHOUT_VECTORS = ", or without the vectors of a model"


def _refuse_several_species(over: VocabularyCells, or_else: str) -> None:
    """Each gene of the data is one token where a model reads or predicts them all."""
    if len(over.matches) > 1:
        raise ConfigError(
            f"{over.source.where}: holds several species, whose genes are other tokens in each: "
            f"impute one species at a time{or_else}."
        )


# -- what is written -----------------------------------------------------------------------------


def _refuse_too_large(n_cells: int, n_columns: int, layers: Layers) -> None:
    size = 4.0 * n_cells * n_columns * len(layers.names)
    if size > LARGEST_IN_MEMORY:
        raise ConfigError(
            f"{n_cells:,} cells × {n_columns:,} genes × {len(layers.names)} layers take "
            f"{size / 1e9:.1f} GB in memory (most is {LARGEST_IN_MEMORY / 1e9:.0f} GB): write them "
            "to a file with output=FILE.zarr or FILE.h5ad, name the genes you need with "
            "genes=[...], or ask for fewer draws and quantiles."
        )


def _refuse_other_genes(asked: Asked, source: Source) -> None:
    adata = cast("AnnData", asked.data)
    # Features that are no genes get NaN.
    by_feature = asked.wanted.genes is None and source.counts.column_G is None
    if by_feature and len(source.genes) != adata.n_vars:
        raise ConfigError(
            f"{source.where}: the counts have {len(source.genes):,} genes, the AnnData "
            f"{adata.n_vars:,}, so they cannot become a layer. Use output=FILE.h5ad or genes=[...]."
        )


def _sink(asked: Asked, source: Source, columns: Columns) -> Sink:
    wanted = asked.wanted
    if asked.output is None:
        return InPlace(
            cast("AnnData", asked.data), columns, wanted.layers, in_table=wanted.genes is not None,
            column_P=source.counts.column_G,
        )  # fmt: skip
    tables = Tables.of_input(
        asked.data, source, columns, key=wanted.layers.key, every=wanted.genes is None,
        trained=asked.way.trained is not None,
    )  # fmt: skip
    return ToFile(asked.output, asked.overwrite, tables, wanted.layers)


def _read(source: Source) -> sp.csr_matrix:
    """Take up all counts; what is none is refused."""
    parts = [chunk.counts_CG for chunk in source.chunks()]
    counts_CG = sp.csr_matrix(sp.vstack(parts, format="csr") if len(parts) > 1 else parts[0])
    counts_CG.sum_duplicates()
    return counts_CG
