"""AnnData or file → cell embeddings, in input order, in bounded memory, on one device or several.

Axes: B cells of a batch, C cells, D width.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.cells.annotations import (
    annotations_of,
    copy_annotations,
    read_annotations,
    without_counts,
)
from genemodel.cells.copies import may_copy
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.cells.source import Source
from genemodel.cells.whole_file import read_anndata
from genemodel.embedding.between_batches import BatchShifts
from genemodel.errors import ConfigError, DataError
from genemodel.inference.cell_vectors import embedder, embedding_of
from genemodel.inference.collapse import Blocks, collapse, warn_of_collapse
from genemodel.inference.counts import SHARD_CELLS, VocabularyCells
from genemodel.inference.devices import Devices, devices_of
from genemodel.inference.forward import Compile, compiles
from genemodel.inference.obs_keys import EMBEDDED, check_key_added, keys_of
from genemodel.inference.progress import Progress
from genemodel.inference.ranks import Rank
from genemodel.inference.shards import (
    Shards,
    embed_shards,
    fingerprint_of,
    folder_for,
    identity_of,
    refuse_full_disk,
)
from genemodel.inference.workers import Job, embed_on
from genemodel.integration.model import IntegratedModel
from genemodel.integration.plan import batches_of
from genemodel.loading import EMBED
from genemodel.settings import ModelText, PathText, to_values
from genemodel.writing import whole

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

# Columns that tell batches apart, the code of every cell's batch, and their names.
type Batches = tuple[tuple[str, ...], np.ndarray, list[str]]


def provenance_of(
    cells: VocabularyCells, bundle: Bundle, embedding: np.ndarray | Blocks
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
        **collapse(embedding),
    }


@may_copy
@reads_cells
def embed(
    adata: "AnnData | str | Path",
    model: Bundle | IntegratedModel | str | Path,
    *,
    batch_key: str | Sequence[str] | None = None,
    key_added: str | None = None,
    batch_size: int | None = None,
    device: Devices | None = None,
    compile: Compile = "auto",
    new_batch: bool | None = None,
    **options: Unpack[InputOptions],
) -> "AnnData | None":
    """Embed cells with a model.

    Parameters
    ----------
    adata
        AnnData in memory or backed, whose ``obsm`` is written; or the path of anything
        :func:`genemodel.cells.sources.open_source` reads, which is streamed; for an
        IntegratedModel it is read into memory.
    model
        From :func:`genemodel.load` or :func:`genemodel.integrate`, or the path of its folder.
    batch_key
        obs column or columns of study, donor or another technical batch. What each batch differs
        by as a whole is then taken off its vectors, as far as populations that it shares with
        others prove it; nothing is trained. ``uns[key_added]`` says of every batch the evidence
        and the length of its shift. Not for an IntegratedModel, which knows its batches.
    key_added
        Key in ``obsm``; ``uns[key_added]`` gets the provenance. Default ``X_genemodel``, with
        whatever model. Say ``X_integrated`` to set new cells beside those of
        :func:`genemodel.integrate`.
    batch_size
        Most cells at once, for small devices. Cannot change the result; where memory runs out, the
        batch is made smaller by itself.
    device
        Default: where the model is. Else ``"cuda:1"`` or ``1``, or several, such as ``[0, 1]``:
        each gets a process of its own and a share of the rows.
    compile
        Compile the model first; ``"auto"`` does on a GPU from 200,000 cells on.
    new_batch
        Of an IntegratedModel alone, as in :meth:`IntegratedModel.encode`; that in turn is a network
        on counts and takes no ``batch_size``, ``device`` and ``compile``.
    **options
        How the cells are read.

    Returns
    -------
    None for AnnData (written in place). For a path an AnnData with all that the file holds but its
    counts: ``obs``, ``var``, ``uns``, ``obsm`` and so on, with ours among them.

    Notes
    -----
    ``obsm[key_added]`` is float32 of shape (n_obs, width), in input order. Cells without any gene
    of the vocabulary get NaN and are counted in a warning. Without ``batch_key`` a cell's vector
    does not depend on the cells beside it, nor on the number of devices; on the size of a batch
    only by what a device's matrix products round differently for another number of rows (nothing
    on the CPUs we tried).
    """
    import anndata as ad

    reading = InputSettings.given(options)
    if key_added is not None:
        check_key_added(key_added)
    model = model_for("embed", EMBED, model, device=_first(device))
    if isinstance(adata, ad.AnnData) and adata.isbacked and adata.is_view:
        raise DataError(
            "adata is a view of a backed AnnData, which nothing can be written to: give the whole "
            "object, or adata.to_memory()."
        )
    if isinstance(model, IntegratedModel):
        _refuse_of_batches(batch_key)
        _refuse_of_transformer(batch_size=batch_size, device=device, compile=compile)
        given = isinstance(adata, ad.AnnData)
        if isinstance(adata, ad.AnnData):
            target = adata
        else:
            target, reading = read_anndata(adata, reading)
        key = key_added or EMBEDDED
        model.embed(target, new_batch=new_batch, key_added=key, **reading.options())
        return None if given else without_counts(target)
    if new_batch is not None:
        raise ConfigError(
            f"new_batch={new_batch} says nothing to a Bundle, which knows of no batches: leave it "
            "out."
        )
    key_added = key_added or EMBEDDED
    devices = devices_of(model.device if device is None else device)
    cells = VocabularyCells(adata, model, reading)
    # A file that we opened is closed; an AnnData is its owner's.
    with nullcontext() if isinstance(adata, ad.AnnData) else closing(cells):
        keys, code_C, batches = _batches(adata, cells.source, batch_key, reading)
        compiling = compiles(compile, devices[0], len(cells))
        if len(devices) > 1:
            path = None if isinstance(adata, ad.AnnData) else Path(adata)
            embedding_CD = _on_devices(cells, model, devices, path, reading, batch_size, compiling)
        else:
            embedding_CD = embedding_of(
                cells, model.on(devices[0]), batch_size=batch_size, compile=compiling
            )
        provenance = provenance_of(cells, model, embedding_CD)
        _report(_empty(embedding_CD), provenance, cells.source)
        if keys:
            shifts = BatchShifts.fit(embedding_CD, code_C, batches)
            embedding_CD = shifts.apply(embedding_CD, code_C)
            provenance |= _said(shifts, keys, code_C)
        target = (
            adata if isinstance(adata, ad.AnnData) else read_annotations(Path(adata), cells.source)
        )
    target.obsm[key_added] = embedding_CD
    target.uns[key_added] = provenance
    return None if target is adata else target


def _first(device: Devices | None) -> "str | torch.device":
    """Where to put a model that is read from its folder."""
    if device is None:
        return "auto"
    devices = devices_of(device)
    return devices[0] if len(devices) == 1 else "cpu"


def _refuse_of_batches(batch_key: str | Sequence[str] | None) -> None:
    if batch_key:
        raise ConfigError(
            f"batch_key={batch_key} says nothing to an IntegratedModel, which has learnt what its "
            "own batches differ by: leave it out. Cells of a new batch: gm.embed(adata, model, "
            "new_batch=True)."
        )


def _batches(
    data: "AnnData | str | Path",
    source: Source,
    batch_key: str | Sequence[str] | None,
    reading: InputSettings,
) -> Batches:
    """Tell the batches apart; all is empty without a batch_key."""
    if batch_key is None or batch_key == ():
        return (), np.zeros(0, np.int64), []
    obs = annotations_of(data, source, ("obs",))["obs"]
    keys = keys_of(batch_key)
    name_C, batches = batches_of(
        obs, keys, reading.missing_labels, one="there is nothing to align. Leave batch_key out"
    )
    return keys, np.searchsorted(np.array(batches, dtype=object), name_C), batches


def _said(shifts: BatchShifts, keys: Sequence[str], code_C: np.ndarray) -> dict[str, Any]:
    """Say for ``uns`` what was done to the batches; warn of those that stay where they are."""
    alone = [
        name for name, off_D in zip(shifts.batches, shifts.shift_BD, strict=True) if not off_D.any()
    ]
    if alone:
        logger.warning(
            "%d of %d batches of %s share no population that is proven (%s): they stay as they "
            "are.", len(alone), len(shifts.batches), ", ".join(keys), ", ".join(alone[:5]),
        )  # fmt: skip
    return shifts.about(keys, code_C)


def _refuse_of_transformer(**given: Any) -> None:
    """Refuse what an IntegratedModel has no use for."""
    named = [name for name, value in given.items() if value not in (None, 0, "auto")]
    if named:
        raise ConfigError(
            f"{' and '.join(named)} say how a transformer runs, and an IntegratedModel is a "
            "network on counts: leave them out. What it reads of a transformer runs where "
            "genemodel.load(path, device=...) put it."
        )


def _on_devices(
    cells: VocabularyCells,
    model: Bundle,
    devices: list[torch.device],
    path: Path | None,
    reading: InputSettings,
    batch_size: int | None,
    compiling: bool,
) -> np.ndarray:
    """Embed with a process for every device; they read the model and the cells from files."""
    with tempfile.TemporaryDirectory(prefix="genemodel-embed-") as name:
        folder = Path(name)
        model.save(folder / "bundle")
        if path is None:
            path, reading = folder / "cells.h5ad", _as_written(reading, cells.source)
            _write_counts(cells.source, path)
        shards = Shards(folder, len(cells), model.model.settings.width, "0" * 16, SHARD_CELLS)
        job = Job(
            str(folder / "bundle"), str(path), to_values(reading), batch_size, compiling, name,
            shards.fingerprint, shards.size,
        )  # fmt: skip
        with Progress("embed", len(cells)) as progress:
            embed_on(devices, job, shards, progress.add)
        return np.concatenate(list(shards.blocks()))


def _as_written(reading: InputSettings, source: Source) -> InputSettings:
    """Say how :func:`_write_counts` wrote a source."""
    return InputSettings(
        species="obs:species", column=source.column, min_fraction=reading.min_fraction,
        missing_labels=reading.missing_labels,
    )  # fmt: skip


def _write_counts(source: Source, path: Path) -> None:
    """Write the counts of a source, its genes and the species of its cells, chunk by chunk."""
    import anndata as ad
    import h5py

    first = next(source.chunks(1))
    obs = source.obs[["species"]]
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        ad.io.write_elem(file, "obs", obs)
        ad.io.write_elem(file, "var", source.genes)
        ad.io.write_elem(file, "X", first.counts_CG[:0])
        stored: Any = ad.io.sparse_dataset(file["X"])
        for chunk in source.chunks():
            stored.append(chunk.counts_CG)


def _empty(rows_CD: np.ndarray) -> int:
    return int((~np.isfinite(rows_CD).all(1)).sum())


def _report(empty: int, provenance: dict[str, Any], source: Source) -> None:
    _warn_of_empty(empty, source.where, source.n_cells, "gene of the vocabulary")
    warn_of_collapse(provenance, source.where)


def _warn_of_empty(empty: int, where: str, n_cells: int, lacking: str) -> None:
    if empty:
        logger.warning(
            "%s: %s of %s cells have no %s and get NaN.",
            where, f"{empty:,}", f"{n_cells:,}", lacking,
        )  # fmt: skip


@dataclass(frozen=True)
class EmbedSettings(InputSettings):
    """Settings of ``genemodel embed``, see ``configs/embed.yaml``."""

    model: ModelText
    input: PathText
    output: PathText
    batch_key: tuple[str, ...] = ()
    key_added: str | None = None
    batch_size: int = 0
    device: str | int | tuple[str | int, ...] = "auto"
    compile: Compile = "auto"
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
    # Of tables and sparse matrices nobody knows it.
    needed = sum(int(getattr(array, "nbytes", 0)) for array in adata.obsm.values())
    with whole(output, needed=needed) as partial:
        # What is text stays text: anndata would make categories of it.
        adata.write_h5ad(partial, convert_strings_to_categoricals=False)


def embed_file(settings: EmbedSettings) -> Path:
    """Embed a file of any size; neither the counts nor the vectors are ever held whole.

    The vectors are written shard by shard beside the output. After an interruption the same
    settings go on with the shards that are there.

    Returns
    -------
    The output path.
    """
    rank = Rank.of_environment()
    follower = rank is not None and rank.number > 0
    if follower and not settings.overwrite and Path(settings.output).exists():
        logger.info("%s is there already: nothing is left to do.", settings.output)
        return Path(settings.output)
    output = writable_h5ad(settings.output, overwrite=settings.overwrite, inputs=[settings.input])
    if settings.key_added is not None:
        check_key_added(settings.key_added)
    devices = devices_of(settings.device)
    if rank is not None:
        if len(devices) > 1:
            raise ConfigError(
                f"device names {len(devices)} devices, and this is one of {rank.world} processes "
                "that were started side by side: leave device out, so that each takes its own, or "
                "start one process alone."
            )
        devices = [rank.device(devices[0])]
    if not Path(settings.input).exists():
        raise DataError(f"input={settings.input} does not exist.")
    several = len(devices) > 1
    if settings.device == "auto":
        logger.info("Model on %s.", devices[0])
    model = model_for("embed", EMBED, settings.model, device="cpu" if several else devices[0])
    if isinstance(model, IntegratedModel):
        _refuse_of_batches(settings.batch_key)
        return _embed_in_memory(settings, model, rank, output)
    cells = VocabularyCells(settings.input, model, settings.reading)
    with closing(cells):
        batches = _batches(settings.input, cells.source, settings.batch_key, settings.reading)
        compiling = compiles(settings.compile, devices[0], len(cells))
        shards = Shards(
            folder_for(output),
            len(cells),
            model.model.settings.width,
            _fingerprint(settings, model, devices[0], compiling),
            SHARD_CELLS,
        )
        with rank.reporting(shards.folder) if rank else nullcontext():
            if follower:
                assert rank is not None
                _embed_missing(settings, cells, model, shards, compiling, rank)
                return output
            with shards.held():
                shards.sweep()
                refuse_full_disk(shards, output)
                if several:
                    _embed_on_workers(settings, cells, devices, shards, compiling)
                else:
                    _embed_missing(settings, cells, model, shards, compiling, rank)
                _assemble(settings, cells, model, shards, batches, output)
                shards.remove()
    return output


def _embed_in_memory(
    settings: EmbedSettings, model: IntegratedModel, rank: Rank | None, output: Path
) -> Path:
    """Embed with a network on counts: one process, the input in memory."""
    if rank is not None and rank.world > 1:
        raise ConfigError(
            f"This is one of {rank.world} processes that were started side by side, and an "
            "IntegratedModel embeds in one: start it alone."
        )
    several = settings.device if isinstance(settings.device, tuple) else None
    _refuse_of_transformer(batch_size=settings.batch_size, device=several, compile=settings.compile)
    logger.info("%s is read into memory: an IntegratedModel does not stream.", settings.input)
    adata, reading = read_anndata(settings.input, settings.reading)
    key = settings.key_added or EMBEDDED
    model.embed(adata, key_added=key, **reading.options())
    _warn_of_empty(_empty(adata.obsm[key]), settings.input, adata.n_obs, "counts")
    write_whole(without_counts(adata), output)
    return output


def _fingerprint(
    settings: EmbedSettings, model: Bundle, device: torch.device, compiling: bool
) -> str:
    """Name all that a vector depends on, down to what may only change its last bits."""
    return fingerprint_of(
        {
            "genemodel": genemodel.__version__,
            "torch": torch.__version__,
            "model": model.fingerprint,
            "budget": [model.tokens.context, model.tokens.budget],
            "input": identity_of(Path(settings.input)),
            "reading": to_values(settings.reading),
            "batch_size": settings.batch_size,
            "device": device.type,
            "compile": compiling,
            "shard": SHARD_CELLS,
        }
    )


def _progress(shards: Shards, numbers: Sequence[int]) -> Progress:
    """Count all cells of these shards, those of an earlier session included."""
    there = [shards.has(number) for number in numbers]
    sizes = [stop - start for start, stop in map(shards.span, numbers)]
    done = sum(size for size, has in zip(sizes, there, strict=True) if has)
    if any(there):
        logger.info(
            "Going on with %s of %s shards in %s.",
            f"{sum(there):,}", f"{len(numbers):,}", shards.folder,
        )  # fmt: skip
    return Progress("embed", sum(sizes), done=done)


def _embed_missing(
    settings: EmbedSettings,
    cells: VocabularyCells,
    model: Bundle,
    shards: Shards,
    compiling: bool,
    rank: Rank | None,
) -> None:
    """Make the missing shards here: all, or those of this rank; rank 0 then waits for the rest."""
    own = list(range(len(shards)))
    if rank is not None and rank.number:
        own = rank.mine(own)
    with _progress(shards, own) as progress:

        def done(cells: int) -> None:
            progress.add(cells)
            if rank is not None:
                rank.beat(shards.folder)

        missing = shards.missing()
        if rank is not None:
            missing = rank.mine(missing)
        forward = embedder(model, batch_size=settings.batch_size or None, compile=compiling)
        for number in embed_shards(forward, cells, shards, missing, done):
            logger.debug("Shard %d is written.", number)
        if rank is not None and not rank.number:
            rank.wait_for_others(shards, progress.add)


def _embed_on_workers(
    settings: EmbedSettings,
    cells: VocabularyCells,
    devices: list[torch.device],
    shards: Shards,
    compiling: bool,
) -> None:
    job = Job(
        settings.model,
        settings.input,
        to_values(settings.reading),
        settings.batch_size or None,
        compiling,
        str(shards.folder),
        shards.fingerprint,
        shards.size,
    )
    with _progress(shards, range(len(shards))) as progress:
        embed_on(devices, job, shards, progress.add)


def _assemble(
    settings: EmbedSettings,
    cells: VocabularyCells,
    model: Bundle,
    shards: Shards,
    batches: Batches,
    output: Path,
) -> None:
    """Write the output under another name, block by block, then rename it."""
    import anndata as ad
    import h5py

    key = settings.key_added or EMBEDDED
    provenance = provenance_of(cells, model, shards.blocks)
    _report(sum(map(_empty, shards.blocks())), provenance, cells.source)
    keys, code_C, names = batches
    shifts = None
    if keys:
        shifts = BatchShifts.fit_blocks(shards.blocks(), code_C, names)
        provenance |= _said(shifts, keys, code_C)

    needed = 4 * shards.n_cells * shards.width
    with whole(output, needed=needed) as partial, h5py.File(partial, "w") as file:
        copy_annotations(Path(settings.input), cells.source, file)
        if key in file["obsm"]:
            del file["obsm"][key]
        stored = file["obsm"].create_dataset(key, (shards.n_cells, shards.width), np.float32)
        stored.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for number, block_CD in enumerate(shards.blocks()):
            start, stop = shards.span(number)
            if shifts is not None:
                block_CD = shifts.apply(block_CD, code_C[start:stop])
            stored[start:stop] = block_CD
        ad.io.write_elem(file["uns"], key, provenance)
