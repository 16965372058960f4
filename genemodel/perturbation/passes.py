"""Cells and their perturbed variants through a backbone, in packed batches.

The cells as they are go once, however many genes are perturbed; their variants are made from the
packed batch (:mod:`genemodel.perturbation.variants`) and fill batches of their own.

Axes: C cells, W variants, R tokens of the variants, P perturbations, F members of all of them end
to end, S states, D width, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.batches.loader import inverse_medians, pack, rank_scale
from genemodel.batches.packing import plan_bins
from genemodel.batches.window import Window
from genemodel.bundle.bundle import Bundle
from genemodel.errors import ConfigError
from genemodel.expression.normalise import DEPTH
from genemodel.inference.cell_vectors import cell_projection
from genemodel.model.devices import is_out_of_memory
from genemodel.model.gene_model import opening_tokens
from genemodel.model.opening import encode_opening
from genemodel.perturbation.variants import Moves, Operation, Variants, counts_of, vary

logger = logging.getLogger(__name__)

type Mode = Literal["cls", "cell", "cls_and_gene", "cell_and_gene"]
MODES: tuple[Mode, ...] = ("cls", "cell", "cls_and_gene", "cell_and_gene")
type Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class How:
    """What is done to the genes, and what is measured.

    Attributes
    ----------
    operation, quartiles
        See :mod:`genemodel.perturbation.variants`.
    held
        Measure each variant a second time with the other genes held where they were.
    mode
        A cell's vector: that of its opening token (``cls``), or the mean of its genes (``cell``);
        ``…_and_gene`` measures every gene that stays, too.
    all_members
        Only cells that hold all genes of a group, not just one of them.
    precision
        On a GPU. A shift may be smaller than what bfloat16 rounds away.
    """

    operation: Operation = "delete"
    quartiles: int | None = None
    held: bool = True
    mode: Mode = "cls"
    all_members: bool = False
    precision: Precision = "float32"

    @property
    def of_genes(self) -> bool:
        """Whether the genes that stay are measured."""
        return self.mode.endswith("_and_gene")

    @property
    def pooled(self) -> bool:
        """Whether a cell's vector is the mean of its genes."""
        return self.mode.startswith("cell")


@dataclass
class GeneSums:
    """Cosines of every gene before and after, summed over cells; (P, V)."""

    n_PV: np.ndarray
    sum_PV: np.ndarray
    square_PV: np.ndarray

    @classmethod
    def zeros(cls, n_perturbations: int, n_tokens: int) -> "GeneSums":
        """Begin with nothing."""
        shape = n_perturbations, n_tokens
        return cls(np.zeros(shape, np.float32), np.zeros(shape), np.zeros(shape))

    def add(self, other: "GeneSums") -> None:
        """Add those of further cells."""
        self.n_PV += other.n_PV
        self.sum_PV += other.sum_PV
        self.square_PV += other.square_PV


@dataclass
class Shifts:
    """One row for every cell and perturbation that applies to it.

    Attributes
    ----------
    cell_W, perturbation_W
        Which; cells by their row.
    place_W
        Rank of the highest of the genes in the cell; 0 where it holds none of them.
    cosine_W
        Cosine of the cell before and after; with a pooled vector the mean of its genes' own.
    state_WS
        Cosine to each state after, less that before.
    held_W, held_WS
        The same with the other genes held; empty where that was not asked for.
    plain_W
        What the same change does without a model: to the cosine between the cell's values and the
        goal's mean values, or without a goal the cosine of the values before and after.
    genes
        Sums over genes, where they were asked for.
    """

    cell_W: np.ndarray
    perturbation_W: np.ndarray
    place_W: np.ndarray
    cosine_W: np.ndarray
    state_WS: np.ndarray
    held_W: np.ndarray
    held_WS: np.ndarray
    plain_W: np.ndarray
    genes: GeneSums | None = field(default=None, repr=False)

    ARRAYS: ClassVar[tuple[str, ...]] = (
        "cell_W", "perturbation_W", "place_W", "cosine_W", "state_WS", "held_W", "held_WS",
        "plain_W",
    )  # fmt: skip

    def __len__(self) -> int:
        return self.cell_W.size

    @classmethod
    def joined(cls, parts: "Sequence[Shifts]") -> "Shifts":
        """Join those of several blocks of cells."""
        arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in cls.ARRAYS}
        genes = parts[0].genes
        if genes is not None:
            for part in parts[1:]:
                assert part.genes is not None
                genes.add(part.genes)
        return cls(**arrays, genes=genes)


@dataclass(frozen=True)
class _Base:
    """Cells as they are: packed, their vectors, and their tokens' where those are compared."""

    batch: CellBatch
    rows: np.ndarray
    cell_CD: Tensor
    hidden_TD: Tensor | None


class Perturber:
    """Runs cells and variants through a model.

    Parameters
    ----------
    bundle
        The model; its place is the device.
    how
        What is done and measured.
    budget
        Most tokens at once; default that of the model. Where memory runs out it is halved, which
        changes no result: a variant does not depend on those beside it.
    """

    def __init__(self, bundle: Bundle, how: How, *, budget: int = 0) -> None:
        self.bundle, self.how = bundle, how
        self.model = bundle.model.eval()
        self.budget = max(budget or bundle.tokens.budget, bundle.tokens.context)
        self._scale_V = rank_scale(bundle.medians_V, bundle.tokens.style)
        self._inverse_V = torch.from_numpy(inverse_medians(bundle.medians_V)).to(bundle.device)
        self._project = cell_projection(bundle)

    # -- the cells as they are ---------------------------------------------------------------

    def batches(self, window: Window, rows: np.ndarray) -> Iterator[tuple[CellBatch, np.ndarray]]:
        """Pack rows of a window, those of like length together, on the host."""
        length = window.lengths_C(self.bundle.tokens)[rows]
        order = np.argsort(-length, kind="stable")
        for chosen in plan_bins(length[order], self.budget, self.bundle.tokens.max_cells):
            here = rows[order[chosen]]
            n = int(length[order[chosen]].sum())
            batch = pack(
                window, here, self._scale_V, self.bundle.tokens, budget=n, max_cells=here.size
            )
            if self.bundle.tokens.style.startswith("geneformer"):
                batch = _with_values(batch)
            yield batch, here

    def vectors(self, window: Window, rows: np.ndarray) -> np.ndarray:
        """Vectors of cells as they are, float32, in the order of ``rows``."""
        place = {int(row): i for i, row in enumerate(rows)}
        out = np.empty((rows.size, self.bundle.model.settings.width), np.float32)
        for batch, here in self.batches(window, rows):
            cell_CD, _ = self._encoded(batch.to(self.bundle.device), genes=False)
            out[[place[int(row)] for row in here]] = cell_CD[: here.size].float().cpu().numpy()
        return out

    # -- and perturbed -----------------------------------------------------------------------

    def shifts(
        self,
        window: Window,
        rows: np.ndarray,
        tokens_P: Sequence[tuple[int, ...]],
        states_SD: np.ndarray,
        goal_V: np.ndarray | None = None,
        done: Callable[[int], object] = lambda variants: None,
    ) -> Shifts:
        """Perturb cells and measure.

        Parameters
        ----------
        window, rows
            The cells.
        tokens_P
            Genes of every perturbation.
        states_SD
            Vectors of the states, (S, D); S may be 0.
        goal_V
            Mean values of the goal, for what the change does without a model.
        done
            Told how many variants are through.
        """
        goal_SD = F.normalize(torch.from_numpy(states_SD).double().to(self.bundle.device), dim=1)
        plain_V = None
        if goal_V is not None:
            plain_V = F.normalize(torch.from_numpy(goal_V).double().to(self.bundle.device), dim=0)
        parts = []
        genes = (
            GeneSums.zeros(len(tokens_P), len(self.bundle.vocabulary))
            if self.how.of_genes
            else None
        )
        for batch, here in self.batches(window, rows):
            moves, found = self._moves(batch, here, tokens_P)
            if not len(moves):
                continue
            batch = batch.to(self.bundle.device)
            whole = self.how.of_genes or self.how.pooled
            cell_CD, hidden_TD = self._encoded(batch, genes=whole)
            base = _Base(batch, here, cell_CD, hidden_TD)
            self._fill(base, moves, found, (goal_SD, plain_V), genes, done)
            parts.append(found)
        if not parts:
            none = np.empty(0, np.int64)
            n_held = np.empty((0, len(states_SD)), np.float32)
            empty = np.empty(0, np.float32)
            return Shifts(none, none, none, empty, n_held, empty, n_held, empty, genes)
        joined = Shifts.joined(parts)
        joined.genes = genes
        order = np.lexsort((joined.perturbation_W, joined.cell_W))
        for name in Shifts.ARRAYS:
            values = getattr(joined, name)
            setattr(joined, name, values[order] if len(values) else values)
        return joined

    def cells_of(self, batch: CellBatch, tokens_P: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Cell of the batch of every variant there is, by perturbations."""
        return self._moves(batch, np.arange(batch.n_cells), tokens_P)[0].cell_W

    def _moves(
        self, batch: CellBatch, rows: np.ndarray, tokens_P: Sequence[tuple[int, ...]]
    ) -> tuple[Moves, Shifts]:
        """Say which cells hold which genes, and where."""
        n = batch.n_tokens
        place_CV = np.zeros((batch.n_cells, len(self.bundle.vocabulary)), np.int32)
        cell_T, gene_T = batch.segment_T[:n].numpy(), batch.gene_T[:n].numpy()
        starts_C = batch.starts_C1[: batch.n_cells].numpy()
        is_gene_T = gene_T >= self.bundle.tokens.first_gene
        place_T = np.arange(n) - starts_C[cell_T] + 1 - int(self.bundle.tokens.opens)
        place_CV[cell_T[is_gene_T], gene_T[is_gene_T]] = place_T[is_gene_T]
        size_P = np.array([len(tokens) for tokens in tokens_P])
        first_P = np.cumsum(size_P) - size_P
        gene_F = np.concatenate([np.asarray(tokens, np.int64) for tokens in tokens_P])
        place_CF = place_CV[:, gene_F]
        there_CF = place_CF > 0
        if self.how.operation == "overexpress":
            applies_CP = np.ones((batch.n_cells, size_P.size), bool)
        else:
            asked = np.logical_and if self.how.all_members else np.logical_or
            applies_CP = asked.reduceat(there_CF, first_P, axis=1)
        cell_W, perturbation_W = np.nonzero(applies_CP)
        # Members of every variant, end to end.
        size_W = size_P[perturbation_W]
        variant_M = np.repeat(np.arange(cell_W.size), size_W)
        within_M = np.arange(variant_M.size) - np.repeat(np.cumsum(size_W) - size_W, size_W)
        at_M = first_P[perturbation_W][variant_M] + within_M
        place_M, gene_M = place_CF[cell_W[variant_M], at_M].astype(np.int64), gene_F[at_M]
        top_CP = np.minimum.reduceat(np.where(there_CF, place_CF, 2**30), first_P, axis=1)
        top_W = top_CP[cell_W, perturbation_W]
        if self.how.operation != "overexpress":
            keep_M = place_M > 0
            variant_M, gene_M, place_M = variant_M[keep_M], gene_M[keep_M], place_M[keep_M]
        n_W = cell_W.size
        n_held = n_W if self.how.held else 0
        found = Shifts(
            cell_W=rows[cell_W],
            perturbation_W=perturbation_W,
            place_W=np.where(top_W < 2**30, top_W, 0),
            cosine_W=np.empty(n_W, np.float32),
            state_WS=np.empty(0),
            held_W=np.empty(n_held, np.float32),
            held_WS=np.empty(0),
            plain_W=np.empty(n_W, np.float32),
        )
        return Moves(cell_W, variant_M, gene_M, place_M), found

    def _fill(
        self,
        base: _Base,
        moves: Moves,
        found: Shifts,
        towards: tuple[Tensor, Tensor | None],
        genes: GeneSums | None,
        done: Callable[[int], object],
    ) -> None:
        n_S = towards[0].shape[0]
        found.state_WS = np.empty((len(moves), n_S), np.float32)
        found.held_WS = np.empty((len(found.held_W), n_S), np.float32)
        length_C = np.asarray(base.batch.length_C)
        length_W = moves.lengths_W(length_C, self.how.operation, self.bundle.tokens.context)
        at = 0
        while at < len(moves):
            ends = np.searchsorted(np.cumsum(length_W[at:]), self.budget, side="right")
            stop = at + max(1, int(ends))
            try:
                self._measure(base, moves, at, stop, found, towards, genes)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if stop - at == 1:
                    raise ConfigError(
                        f"{self.bundle.device} is out of memory with a single cell of "
                        f"{int(length_W[at]):,} tokens: free memory on it, or choose another "
                        "device."
                    ) from None
            else:
                done(stop - at)
                at = stop
                continue
            self.budget //= 2
            logger.warning(
                "%s is out of memory: from here on at most %s tokens go at once, which changes no "
                "result.", self.bundle.device, f"{self.budget:,}",
            )  # fmt: skip
            if self.bundle.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def _measure(
        self,
        base: _Base,
        moves: Moves,
        start: int,
        stop: int,
        found: Shifts,
        towards: tuple[Tensor, Tensor | None],
        genes: GeneSums | None,
    ) -> None:
        goal_SD, plain_V = towards
        part = moves.take(start, stop)
        cell_W = torch.from_numpy(part.cell_W).to(self.bundle.device)
        before_WD = F.normalize(base.cell_CD.double(), dim=1)[cell_W]
        for held in (False, True) if self.how.held else (False,):
            variants = vary(
                base.batch, part, self.how.operation, self._inverse_V,
                tokens=self.bundle.tokens, quartiles=self.how.quartiles, held=held,
            )  # fmt: skip
            whole = self.how.of_genes or self.how.pooled
            cell_CD, hidden_RD = self._encoded(variants.batch, genes=whole)
            after_WD = F.normalize(cell_CD.double(), dim=1)
            cosine_W = (before_WD * after_WD).sum(1)
            if hidden_RD is not None and (self.how.pooled or genes is not None):
                cosine_R, stays_R = self._gene_cosines(base, variants, hidden_RD)
                if self.how.pooled:
                    cosine_W = _means(cosine_R, stays_R, variants.batch)
                if genes is not None and not held:
                    perturbation_W = found.perturbation_W[start:stop]
                    _add(genes, cosine_R, stays_R, variants.batch, perturbation_W)
            if not held:
                plain_W = self._without_model(base.batch, variants, cell_W, plain_V)
                found.plain_W[start:stop] = plain_W.float().cpu().numpy()
            shift_WS = (after_WD - before_WD) @ goal_SD.T
            cosine, states = (
                (found.held_W, found.held_WS) if held else (found.cosine_W, found.state_WS)
            )
            cosine[start:stop] = cosine_W.float().cpu().numpy()
            states[start:stop] = shift_WS.float().cpu().numpy()

    def _gene_cosines(
        self, base: _Base, variants: Variants, hidden_RD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosine of every token before and after, and whether it is a gene left alone."""
        assert base.hidden_TD is not None
        stays_R = (
            (variants.source_R >= 0)
            & ~variants.moved_R
            & (variants.batch.gene_T >= self.bundle.tokens.first_gene)
        )
        before_RD = base.hidden_TD[variants.source_R.clamp_min(0)]
        return F.cosine_similarity(before_RD.float(), hidden_RD.float(), dim=1), stays_R

    @torch.inference_mode()
    def _encoded(self, batch: CellBatch, *, genes: bool) -> tuple[Tensor, Tensor | None]:
        """Vectors of the cells, and of the tokens where they are wanted."""
        device = self.bundle.device
        half = self.how.precision == "bfloat16" and device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            if not (genes or self.how.pooled):
                cell_CD: Tensor = self._project(encode_opening(self.model, batch))
                return cell_CD[: batch.n_cells], None
            # As far as the vectors of cells need: published ones are of the last block but one.
            hidden_TD = self.model(batch, self.model.cell_stop).hidden_TD
            if not self.how.pooled:
                first_C, _ = opening_tokens(batch.starts_C1, hidden_TD.shape[0])
                cell_CD = self._project(hidden_TD.index_select(0, first_C))
                return cell_CD[: batch.n_cells], hidden_TD
        is_gene_T = batch.gene_T >= self.bundle.tokens.first_gene
        n = batch.starts_C1.shape[0] - 1
        total_CD = torch.zeros(n, hidden_TD.shape[1], dtype=torch.float64, device=device)
        total_CD.index_add_(0, batch.segment_T, hidden_TD.double() * is_gene_T[:, None])
        n_C = torch.zeros(n, dtype=torch.float64, device=device)
        n_C.index_add_(0, batch.segment_T, is_gene_T.double())
        return (total_CD / n_C.clamp_min(1)[:, None])[: batch.n_cells], hidden_TD

    def _without_model(
        self, base: CellBatch, variants: Variants, cell_W: Tensor, goal_V: Tensor | None
    ) -> Tensor:
        """Cosines of the values themselves: towards a goal after less before, else between both."""
        batch = variants.batch

        def summed(value_R: Tensor, segment_R: Tensor, n: int) -> Tensor:
            total = torch.zeros(n, dtype=torch.float64, device=value_R.device)
            return total.index_add_(0, segment_R, value_R)

        n_base, n_W = base.starts_C1.shape[0] - 1, batch.n_cells
        before_T, after_R = self._plain(base), self._plain(batch)
        length_C = summed(before_T**2, base.segment_T, n_base).sqrt().clamp_min(1e-12)
        length_W = summed(after_R**2, batch.segment_T, n_W).sqrt().clamp_min(1e-12)
        if goal_V is None:
            there_R = before_T[variants.source_R.clamp_min(0)] * (variants.source_R >= 0)
            dot_W = summed(there_R * after_R, batch.segment_T, n_W)
            return dot_W / (length_W * length_C[cell_W])
        after_W = summed(after_R * goal_V[batch.gene_T], batch.segment_T, n_W) / length_W
        before_C = summed(before_T * goal_V[base.gene_T], base.segment_T, n_base) / length_C
        return after_W - before_C[cell_W]

    def _plain(self, batch: CellBatch) -> Tensor:
        """log1p(counts per 10⁴) of every token, whatever the model reads."""
        style = self.bundle.tokens.style
        if style != "genecompass":
            return batch.value_T.double()
        library_T = batch.library_C[batch.segment_T].double()
        count_T = counts_of(batch.value_T, batch.gene_T, library_T, self._inverse_V, style)
        return torch.log1p(count_T * (DEPTH / library_T.clamp_min(1e-9)))


def _with_values(batch: CellBatch) -> CellBatch:
    """Fill in log1p(counts per 10⁴), which a Geneformer does not read and the arithmetic does."""
    n_tokens = int(batch.gene_T.max()) + 1
    key_N = batch.full_cell_N * n_tokens + batch.full_gene_N
    known_N = batch.full_gene_N < n_tokens
    key_N, count_N = key_N[known_N], batch.full_count_N[known_N]
    order_N = torch.argsort(key_N)
    key_T = batch.segment_T * n_tokens + batch.gene_T
    at_T = torch.searchsorted(key_N[order_N], key_T).clamp_max(max(key_N.numel() - 1, 0))
    found_T = key_N[order_N][at_T] == key_T
    count_T = torch.where(found_T, count_N[order_N][at_T], 0.0)
    share_T = count_T.double() / batch.library_C[batch.segment_T].double().clamp_min(1e-9)
    return replace(batch, value_T=torch.log1p(share_T * DEPTH).float())


def _means(cosine_R: Tensor, stays_R: Tensor, batch: CellBatch) -> Tensor:
    """Mean over the genes that stay, of every variant."""
    total_W = torch.zeros(batch.n_cells, dtype=torch.float64, device=cosine_R.device)
    total_W.index_add_(0, batch.segment_T, cosine_R.double() * stays_R)
    n_W = torch.zeros_like(total_W).index_add_(0, batch.segment_T, stays_R.double())
    return total_W / n_W.clamp_min(1)


def _add(
    genes: GeneSums, cosine_R: Tensor, stays_R: Tensor, batch: CellBatch, perturbation_W: np.ndarray
) -> None:
    chosen = stays_R.cpu().numpy()
    segment, gene = batch.segment_T.cpu().numpy()[chosen], batch.gene_T.cpu().numpy()[chosen]
    value = cosine_R.double().cpu().numpy()[chosen]
    at = perturbation_W[segment], gene
    np.add.at(genes.n_PV, at, 1)
    np.add.at(genes.sum_PV, at, value)
    np.add.at(genes.square_PV, at, value**2)
