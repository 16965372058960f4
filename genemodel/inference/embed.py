"""AnnData or file → cell embeddings, in input order, in bounded memory.

Axes: C cells, D width.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.cells.sources import Source
from genemodel.errors import ConfigError, DataError
from genemodel.inference.collapse import collapse, warn_of_collapse
from genemodel.inference.counts import VocabularyCells, VocabularyChunk, batches, precision
from genemodel.inference.obs_keys import check_key_added
from genemodel.settings import PathText
from genemodel.tasks.decode_counts import CellProjection
from genemodel.writing import whole

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

KEY = "X_genemodel"


def embed_chunks(
    cells: VocabularyCells, bundle: Bundle, *, batch_size: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, embedding_CD float32) for consecutive cells of a source.

    A cell without any known gene gets NaN.
    """
    for chunk in cells.chunks():
        yield chunk.start, encode(chunk, bundle, batch_size=batch_size)


def embedding_of(
    cells: VocabularyCells, bundle: Bundle, *, batch_size: int | None = None
) -> np.ndarray:
    """Embed all cells of a source; float32 (C, D), in input order."""
    return np.concatenate([part for _, part in embed_chunks(cells, bundle, batch_size=batch_size)])


@torch.inference_mode()
def encode(chunk: VocabularyChunk, bundle: Bundle, *, batch_size: int | None = None) -> np.ndarray:
    """Embed the cells of one chunk; float32 (C, D), NaN for a cell without any known gene.

    Where the model has a count decoder, a cell is the vector that its counts are decoded from:
    library, species and technical batch are terms of their own there, so it need not hold them.
    Otherwise it is the hidden state of the cell token.
    """
    bundle.model.eval()
    projection = cell_projection(bundle)
    device = bundle.device
    out_CD = np.full((chunk.counts_CV.shape[0], bundle.model.settings.width), np.nan, np.float32)
    for rows, batch in batches(chunk, bundle, batch_size):
        with precision(device):
            cell_CD = projection(bundle.model(batch.to(device)).cell_CD[: rows.size])
        out_CD[rows] = cell_CD.float().cpu().numpy()
    return out_CD


def cell_projection(bundle: Bundle) -> nn.Module:
    """Return the count decoder's view of a cell, or the identity for a model without one."""
    if any(name.startswith("decode_counts.projection.") for name in bundle.heads):
        return bundle.head(
            "decode_counts.projection", CellProjection(bundle.model.settings.width)
        ).eval()
    return nn.Identity()


def provenance_of(
    cells: VocabularyCells, bundle: Bundle, embedding_CD: np.ndarray
) -> dict[str, Any]:
    """Say what was done with which model, for ``uns``: plain values only."""
    return {
        "genemodel": genemodel.__version__,
        "model": bundle.fingerprint,
        "vocabulary": bundle.vocabulary.fingerprint,
        "genes_matched": {
            bundle.species[s]: int(match.n_matched) for s, match in cells.matches.items()
        },
        "genes_in_source": len(cells.source.genes),
        **collapse(embedding_CD),
    }


def embed(
    adata: "AnnData | str | Path",
    model: Bundle,
    *,
    layer: str | None = None,
    species: str | None = None,
    key_added: str = KEY,
    batch_size: int | None = None,
) -> "AnnData | None":
    """Embed cells with a model.

    Parameters
    ----------
    adata
        AnnData in memory or backed, whose ``obsm`` is written; or the path of anything
        :func:`genemodel.cells.sources.open_source` reads, which is streamed.
    model
        From :func:`genemodel.load`.
    layer
        Where the raw counts are; default ``X``. Anything but raw counts is refused.
    species
        One species for all cells, or ``"obs:COLUMN"``; default the obs column ``species``.
    key_added
        Key in ``obsm``; ``uns[key_added]`` gets the provenance.
    batch_size
        Most cells at once, for small devices. Cannot change the result.

    Returns
    -------
    None for AnnData (written in place). For a path an AnnData with ``obs``, ``obsm`` and ``uns``,
    without counts.

    Notes
    -----
    ``obsm[key_added]`` is float32 of shape (n_obs, width), in input order. Cells without any gene
    of the vocabulary get NaN and are counted in a warning.
    """
    import anndata as ad

    check_key_added(key_added)
    if not isinstance(model, Bundle):
        raise ConfigError(
            f"model is a {type(model).__name__}: give what genemodel.load returns; a fine-tuned "
            "model embeds with its own method, model.embed(adata)."
        )
    if isinstance(adata, ad.AnnData) and adata.isbacked and adata.is_view:
        raise DataError(
            "adata is a view of a backed AnnData, which nothing can be written to: give the whole "
            "object, or adata.to_memory()."
        )
    cells = VocabularyCells(adata, model, layer=layer, species=species)
    embedding_CD = embedding_of(cells, model, batch_size=batch_size)
    target = adata if isinstance(adata, ad.AnnData) else ad.AnnData(obs=cells.source.obs.copy())
    target.obsm[key_added] = embedding_CD
    target.uns[key_added] = provenance_of(cells, model, embedding_CD)
    _report(embedding_CD, target.uns[key_added], cells.source)
    if target is adata:
        return None
    cells.source.close()
    return target


def _report(embedding_CD: np.ndarray, provenance: dict[str, Any], source: Source) -> None:
    empty = int((~np.isfinite(embedding_CD).all(1)).sum())
    if empty:
        logger.warning(
            "%s: %s of %s cells have no gene of the vocabulary and get NaN.",
            source.where, f"{empty:,}", f"{len(embedding_CD):,}",
        )  # fmt: skip
    warn_of_collapse(provenance, source.where)


@dataclass(frozen=True)
class EmbedSettings:
    """Embed a file of any size.

    Attributes
    ----------
    model
        Bundle directory.
    input
        File or folder with raw counts.
    output
        h5ad to write: obs, embedding and provenance, without counts.
    layer
        Where the raw counts are; empty for X.
    species
        One species for all cells or obs:COLUMN; empty for the obs column species.
    key_added
        Key in obsm.
    batch_size
        Most cells at once; 0 for as many as fit the token budget.
    device
        auto, cpu, cuda, cuda:1 …
    overwrite
        Replace an existing output.
    """

    model: PathText
    input: PathText
    output: PathText
    layer: str = ""
    species: str = ""
    key_added: str = KEY
    batch_size: int = 0
    device: str = "auto"
    overwrite: bool = False


def writable_h5ad(output: str, *, overwrite: bool, inputs: Sequence[str] = ()) -> Path:
    """Return the path of an h5ad that may be written; refuses every other one.

    ``inputs`` are files that are read and must stay: the output holds no counts.
    """
    path = Path(output)
    if path.suffix != ".h5ad":
        raise ConfigError(f"output={path} does not end in .h5ad: it is written as one.")
    if path.is_dir():
        raise ConfigError(f"output={path} is a folder: name a file.")
    if path.exists() and not overwrite:
        raise ConfigError(f"output={path} exists: set overwrite=true, or another name.")
    if any(path.resolve() == Path(name).resolve() for name in inputs):
        raise ConfigError(
            f"output={path} is what is read, and what is written holds no counts: name another "
            "file, so that they are not lost."
        )
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"output={path}: the folder {path.parent} does not exist.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"output={path}: you may not write in {path.parent}.")
    return path


def write_whole(adata: "AnnData", output: Path) -> None:
    """Write an h5ad, whole or not at all."""
    arrays = (np.asarray(array) for array in adata.obsm.values())
    with whole(output, needed=sum(array.nbytes for array in arrays)) as partial:
        adata.write_h5ad(partial)


def embed_file(settings: EmbedSettings) -> Path:
    """Embed a file; the counts are streamed and never held whole.

    Returns
    -------
    The output path.
    """
    output = writable_h5ad(settings.output, overwrite=settings.overwrite, inputs=[settings.input])
    check_key_added(settings.key_added)
    if not Path(settings.input).exists():
        raise DataError(f"input={settings.input} does not exist.")
    model = Bundle.load(settings.model, device=settings.device)
    result = embed(
        settings.input,
        model,
        layer=settings.layer or None,
        species=settings.species or None,
        key_added=settings.key_added,
        batch_size=settings.batch_size or None,
    )
    assert result is not None
    write_whole(result, output)
    return output
