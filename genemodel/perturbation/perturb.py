"""In-silico perturbation: change genes of cells, and see where a model then puts the cells.

Axes: C cells, P perturbations, W variants, S states, V vocabulary.
"""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import numpy as np
import torch

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import bundle_for, model_for
from genemodel.cells.annotations import read_annotations
from genemodel.cells.copies import may_copy
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.errors import ConfigError, DataError
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.obs_keys import check_in_memory, check_key_added
from genemodel.inference.progress import Progress
from genemodel.inference.shards import fingerprint_of, folder_for, identity_of
from genemodel.model.devices import device_of
from genemodel.perturbation.blocks import Blocks, block_cells
from genemodel.perturbation.passes import Mode, Precision, Shifts
from genemodel.perturbation.plan import Plan, plan_of
from genemodel.perturbation.result import PerturbationResult, for_uns, is_ours, top, write_result
from genemodel.perturbation.settings import (
    MIN_AUC,
    MIN_CELLS,
    MIN_COVERAGE,
    NULLS,
    Asked,
    PerturbSettings,
)
from genemodel.perturbation.variants import Operation
from genemodel.settings import check_replaced_folder, either_seed, texts, to_values

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

KEY = "genemodel_perturb"


@either_seed
@may_copy
@reads_cells
def perturb(
    adata: "AnnData",
    model: Bundle | str | Path,
    *,
    genes: str | Sequence[str] = "all",
    perturb_type: Operation = "delete",
    rank_shift: int | None = None,
    combos: int = 1,
    anchor_gene: str = "",
    group_needs: Literal["any", "all"] = "any",
    emb_mode: Mode = "cls",
    state_key: str = "",
    start_state: str = "",
    goal_state: str = "",
    alt_states: str | Sequence[str] = (),
    donor_key: str = "",
    nulls: int = NULLS,
    position_preserving: bool = True,
    min_cells: int = MIN_CELLS,
    min_coverage: float = MIN_COVERAGE,
    min_auc: float = MIN_AUC,
    max_cells: int = 2000,
    precision: Precision = "float32",
    batch_tokens: int = 0,
    device: str | torch.device | None = None,
    seed: int = 0,
    key_added: str = KEY,
    **options: Unpack[InputOptions],
) -> PerturbationResult:
    """Perturb genes of cells in silico, and test what it does.

    Parameters
    ----------
    adata
        Raw counts. ``uns[key_added]`` gets the statistics and a summary.
    model
        From :func:`genemodel.load`, or the path of its folder.
    genes
        Symbols or Ensembl ids, each perturbed alone; ``"A+B"`` together; ``"all"`` for every gene
        in enough cells.
    perturb_type
        ``"delete"``, ``"overexpress"``, ``"inhibit"`` or ``"activate"``. With a model of ranks a
        gene goes, moves to the front, down or up; one that reads values gets that place's value.
    rank_shift
        Quartiles by which inhibit and activate move a gene, 1 to 3; None: to the very end.
    combos
        Perturb up to so many of the genes together, in every combination.
    anchor_gene
        A gene that each of the others is perturbed with, too.
    group_needs
        Cells in which a group is perturbed: those with ``"any"`` of its genes, or with ``"all"``.
    emb_mode
        A cell's vector: ``"cls"``, that of its opening token, or ``"cell"``, the mean of its genes;
        of the layer that :func:`genemodel.embed` reads. ``"cls_and_gene"`` and
        ``"cell_and_gene"`` also measure every other gene.
    state_key
        obs column of the states. With ``start_state`` alone only those cells are perturbed; with
        ``goal_state`` shifts are measured towards it, and towards ``alt_states``.
    start_state, goal_state, alt_states
        Values of the column.
    donor_key
        obs column of donors, which are the replicates.
    nulls
        Genes alike in rank, detection and mean that each gene is compared with; 0 for none.
    position_preserving
        Measure each deletion a second time with the other genes kept at rank and value.
    min_cells, min_coverage
        Least number and share of the cells that a gene must be held by to be tested.
    min_auc
        Stop where start and goal are told apart less well, on donors held out; 0: go on.
    max_cells
        Most cells that are perturbed, and of every other state; 0 for all.
    precision
        On a GPU: ``"float32"``, or ``"bfloat16"``, faster and too coarse for small shifts.
    batch_tokens
        Most tokens at once; 0 for the model's own budget. Cannot change the result.
    device
        Default: where the model is.
    seed
        Of samples and folds.
    key_added
        Key in ``uns``.
    **options
        How the cells are read.

    Returns
    -------
    PerturbationResult
        ``statistics`` and ``shifts`` are DataFrames.

    Raises
    ------
    ConfigError
        Settings contradict each other.
    DataError
        A gene, column or state is unknown, no gene is in enough cells, or the states do not
        separate.
    """
    asked = Asked(
        genes=texts(genes), perturb_type=perturb_type, rank_shift=rank_shift, combos=combos,
        anchor_gene=anchor_gene, group_needs=group_needs, emb_mode=emb_mode, state_key=state_key,
        start_state=start_state, goal_state=goal_state, alt_states=texts(alt_states),
        donor_key=donor_key, nulls=nulls, position_preserving=position_preserving,
        min_cells=min_cells, min_coverage=min_coverage, min_auc=min_auc, max_cells=max_cells,
        precision=precision, seed=seed,
    )  # fmt: skip
    reading = InputSettings.given(options)
    check_key_added(key_added, "uns")
    check_in_memory(adata, "adata", "genemodel perturb")
    bundle = bundle_for("perturb", model, device)
    _check_mode(bundle, asked)
    cells = VocabularyCells(adata, bundle, reading)
    plan = plan_of(cells, adata.obs, bundle, asked, reading, batch_tokens, "adata")
    with Progress("perturb", plan.n_variants, unit="variants") as progress:
        shifts = plan.shifts(np.arange(plan.rows.size), progress.add)
    result = plan.result(shifts)
    adata.uns[key_added] = for_uns(result)
    return result


def perturb_file(settings: PerturbSettings) -> str:
    """Perturb the cells of a file in blocks; an interrupted run goes on. Returns what to print."""
    out = Path(settings.out)
    check_replaced_folder(out, "perturb", is_ours, overwrite=settings.overwrite)
    if not Path(settings.input).exists():
        raise DataError(f"input={settings.input} does not exist.")
    asked = settings.asked
    bundle = model_for("perturb", (Bundle,), settings.model, device=device_of(settings.device))
    _check_mode(bundle, asked)
    cells = VocabularyCells(settings.input, bundle, settings.reading)
    with closing(cells):
        notes = read_annotations(Path(settings.input), cells.source)
        plan = plan_of(
            cells, notes.obs, bundle, asked, settings.reading, settings.batch_tokens,
            settings.input,
        )  # fmt: skip
    blocks = Blocks(
        folder_for(out), plan.rows.size, 0,
        fingerprint_of({
            "genemodel": genemodel.__version__, "torch": torch.__version__,
            "model": bundle.fingerprint, "tokens": to_values(bundle.tokens),
            "input": identity_of(Path(settings.input)), "reading": to_values(settings.reading),
            "asked": to_values(asked), "batch_tokens": settings.batch_tokens,
            "device": bundle.device.type,
        }),
        block_cells(plan.rows.size, plan.n_variants),
    )  # fmt: skip
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with blocks.held():
        blocks.sweep()
        _fill(plan, blocks)
        shape = (len(plan.perturbations), len(bundle.vocabulary)) if plan.of_genes else None
        result = plan.result(Shifts.joined(list(blocks.read(shape))))
        notes.uns[KEY] = for_uns(result)
        write_result(result, notes, out, settings.tables)
        blocks.remove()
    return f"{result.describe()}\n{top(result)}\nTables are in {out}"


def _check_mode(bundle: Bundle, asked: Asked) -> None:
    if asked.emb_mode.startswith("cls") and not bundle.tokens.opens:
        other = asked.emb_mode.replace("cls", "cell")
        raise ConfigError(
            f"emb_mode={asked.emb_mode} reads the token that opens a cell, and a Geneformer V1 has "
            f"none: set emb_mode={other}, the mean of the genes."
        )


def _fill(plan: Plan, blocks: Blocks) -> None:
    missing = blocks.missing()
    there = len(blocks) - len(missing)
    if there:
        logger.info("Going on with %s of %s blocks in %s.", there, len(blocks), blocks.folder)
    done = sum(
        int(plan.variants_C[slice(*blocks.span(n))].sum())
        for n in range(len(blocks)) if n not in set(missing)
    )  # fmt: skip
    with Progress("perturb", plan.n_variants, done=done, unit="variants") as progress:
        for number in missing:
            start, stop = blocks.span(number)
            blocks.keep(number, plan.shifts(np.arange(start, stop), progress.add))
