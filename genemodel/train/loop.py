"""The training loop: global item counts, micro-batches, one look at the numbers, step.

Knows modules, losses and ranks; what the data mean is none of its business. A step reads the device
once, after its gradient is complete and before the weights change: losses, gradient norm and what
any rank wants (to stop, to give up) come in one transfer, so all ranks decide alike.

Axes: K objectives.
"""

import contextlib
import gc
import logging
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.batches.order import Position
from genemodel.errors import GenemodelError
from genemodel.model.devices import is_out_of_memory
from genemodel.train import ranks as at
from genemodel.train.checkpoint import Checkpoint, CheckpointWriter, newest_checkpoint
from genemodel.train.exchange import Exchange, Kind
from genemodel.train.guard import Guard
from genemodel.train.losses import Losses
from genemodel.train.memory import later_bytes, pieces_that_fit, set_aside
from genemodel.train.optim import build_optimisers, lr_share
from genemodel.train.processes import REFUSED, STOPPING, StopSignals
from genemodel.train.profiler import Profiler
from genemodel.train.ranks import Ranks
from genemodel.train.record import Record
from genemodel.train.settings import OptimSettings, TrainerSettings

logger = logging.getLogger(__name__)

# What the report of a step says of every rank besides its losses.
_STOPS = (*STOPPING, "max_minutes")


class TrainingStopped(GenemodelError):
    """Training cannot go on."""


class Stream(Protocol):
    """Micro-batches of one rank, in pieces, with the position after each; counts time waited."""

    @property
    def waited_s(self) -> float:
        """Seconds waited for micro-batches so far."""

    def __iter__(self) -> Generator[tuple[list[CellBatch], Position]]:
        """Start from the stream's position."""


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint.

    Attributes
    ----------
    step
        Optimiser steps done.
    position
        Of the data after them.
    minutes
        Of training in all sessions.
    best, since_best
        Best held-out total, and looks since.
    validation
        The last look.
    skipped
        Steps whose gradient was not applied.
    ended
        Why the run is over before ``max_steps``; empty while it is not.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    minutes: float = 0.0
    best: float = float("inf")
    since_best: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    ended: str = ""


@dataclass(frozen=True)
class _Report:
    """What one transfer from the device says about a step."""

    losses: dict[str, float]
    trivial: dict[str, float]
    norm: float
    stops: list[Any]
    minutes: float

    def total(self, weights: Mapping[str, float]) -> float:
        return sum(weight * self.losses[name] for name, weight in weights.items())


class Loop:
    """One run on one rank.

    Parameters
    ----------
    fabric
        Launched.
    losses
        Model and objectives.
    kind
        How gradients of ranks meet.
    optim, trainer, seed
        Of the run.
    train, validation
        Make this rank's streams, from a position and of the held-out cells, with every micro-batch
        in so many pieces. Without held-out cells there are no looks.
    record, ranks
        What is said, and where this rank is.
    about
        Plain values kept with every checkpoint, ``about.json``.
    rate_shares
        Learning rates of the model's parameters by name, as shares of the run's; 1 by default.
    on_improvement
        Called on rank 0 after a look better than all before, with the weights; where there are no
        looks, at the end.
    name_cells
        Says in words which cells these permanent numbers are.
    most_pieces
        Into how many pieces a micro-batch may be dealt where it does not fit the device.

    Attributes
    ----------
    pieces
        Into how many it is dealt; see :meth:`make_room`.
    """

    def __init__(
        self,
        run: Path,
        fabric: Fabric,
        losses: Losses,
        *,
        kind: Kind,
        optim: OptimSettings,
        trainer: TrainerSettings,
        seed: int,
        train: Callable[[Position, int], Stream],
        validation: Callable[[int], Stream] | None,
        record: Record,
        ranks: Ranks,
        about: Mapping[str, Any],
        rate_shares: Mapping[str, float] | None = None,
        on_improvement: Callable[[Progress, Mapping[str, Tensor]], None] = lambda *_: None,
        name_cells: Callable[[np.ndarray], str] = lambda cells: f"{cells.size} cells",
        most_pieces: int = 1,
    ) -> None:
        self.run, self.fabric, self.losses = run, fabric, losses
        self.optim, self.settings, self.seed = optim, trainer, seed
        self.record, self.about = record, dict(about)
        self.on_improvement, self.name_cells = on_improvement, name_cells
        self._train, self._validation = train, validation
        self.pieces, self._most_pieces = 1, most_pieces
        self.exchange = Exchange(fabric, losses, kind)
        shares = {f"model.{k}": share for k, share in (rate_shares or {}).items()}
        self.optimisers = build_optimisers(losses, optim, shares)
        self.guard = Guard(trainer.spike_deviations)
        self.progress = Progress()
        self.writer = CheckpointWriter(trainer.keep_checkpoints)
        self._folder = run / "checkpoints"
        self.stopped_by: Any = None
        self.lr = 0.0
        self._ranks = ranks
        self._session_minutes = 0.0
        # The running mean of what learns, where one is wanted: what is looked at and released.
        self._means_P: list[Tensor] | None = None
        if optim.average_decay:
            self._means_P = [p.detach().clone() for p in self.exchange.learning()]

    @property
    def _weights(self) -> dict[str, float]:
        """Weights of the objectives at this step."""
        share = self.progress.step / self.settings.max_steps
        weights: dict[str, float] = self.losses.objectives.weights_at(share)
        return weights

    def _weight_K(self) -> Tensor:
        """Make them on the device: nothing is copied to it."""
        weights, device = self._weights, self.fabric.device
        return torch.stack(
            [torch.full((), weights[name], device=device) for name in self.losses.names]
        )

    # -- the whole run ---------------------------------------------------------------------------

    def make_room(self) -> None:
        """Find out whether a micro-batch fits the device, and deal it into pieces where not."""
        self.pieces = pieces_that_fit(self._rehearse, self.exchange, self._most_pieces)

    def _rehearse(self, pieces: int) -> None:
        """Take a piece of a real micro-batch forward and backward, and leave nothing behind.

        The first piece has the longest cells. The module is taken without what wraps it, so no
        rank waits for another, and no gradient is kept.
        """
        losses, device = self.losses, self.fabric.device
        with contextlib.closing(iter(self._train(self.progress.position, pieces))) as stream:
            batch = next(stream)[0][0]
        gpus = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(gpus),
            set_aside(later_bytes(self.exchange, self.optimisers), device),
        ):
            prepared = losses.objectives.prepare(batch)
            with self.fabric.autocast():
                total_K, _ = losses(prepared, True)
            total = (total_K * self._weight_K()).sum()
            torch.autograd.grad(total, self.exchange.learning(), allow_unused=True)
            if gpus:
                torch.cuda.synchronize(device)

    def fit(self, signals: StopSignals) -> None:
        """Train until the end, or until something asks to stop; saved either way.

        ``stopped_by`` then holds the signal's number or ``"max_minutes"``, None at the end.
        """
        collecting = gc.isenabled()
        # A collection in the middle of a step holds the device up; one at every look does not, and
        # does not look at what was there before either.
        gc.disable()
        gc.freeze()
        try:
            self._fit(signals)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise self._memory_is_full(error) from error
            raise
        finally:
            gc.unfreeze()
            if collecting:
                gc.enable()
            try:
                self.writer.close()
            finally:
                self.record.close(self.writer)

    def _memory_is_full(self, error: RuntimeError) -> TrainingStopped:
        return TrainingStopped(
            f"{self.fabric.device} ran out of memory after step {self.progress.step:,} "
            f"({str(error).splitlines()[0][:200]}), although a micro-batch fitted when the run "
            "began: perhaps something else uses it. The last checkpoint is intact. Go on from it "
            "with the same command; if it happens again, with less held at once "
            "(pretrain, finetune: trainer.activation_checkpointing=true, or a new run with half "
            "the tokens.budget and twice the trainer.accumulate)."
        )

    def _fit(self, signals: StopSignals) -> None:
        settings = self.settings
        self.record.start(self.progress.step)
        begin, before = time.perf_counter(), self.progress.minutes
        wishes = torch.tensor(self._wishes(signals), dtype=torch.float64, device=self.fabric.device)
        if stops := _wanted(self.exchange.sum_(wishes).tolist()):
            # Asked to stop before there is anything that is not saved.
            self.stopped_by = stops[0]
            return
        stream = self._train(self.progress.position, self.pieces)
        steps = _steps(stream, settings.accumulate)
        profiler = Profiler(self.run, settings.profile, self.exchange.rank)
        # A roll-back puts another progress in its place.
        while self.progress.step < settings.max_steps and not self.progress.ended:
            self._ranks.at(at.DATA)
            micro_batches, position = next(steps)
            self._ranks.at(at.COMPUTE, self.progress.step)
            self._session_minutes = (time.perf_counter() - begin) / 60
            shown = self.record.is_due(self.progress.step + 1)
            report, totals = self._gradient(micro_batches, signals, trivial=shown)
            batches = [piece for pieces in micro_batches for piece in pieces]
            self.progress.minutes = before + report.minutes
            applied = self._apply(report, batches, totals, position)
            profiler.step()
            if applied is None:  # rolled back: the data goes on behind the bad step
                stream = self._train(position, self.pieces)
                steps = _steps(stream, settings.accumulate)
                continue
            self._note(report, batches, stream, shown=shown)
            self._after_step(report)
            if self.stopped_by is not None:
                break
        profiler.close()

    def _after_step(self, report: _Report) -> None:
        """Save and look where due."""
        progress, settings = self.progress, self.settings
        if self.optim.horizon_minutes and progress.minutes >= self.optim.horizon_minutes:
            progress.ended = "horizon"
        last = progress.step >= settings.max_steps or progress.ended != ""
        if report.stops and not last:
            # Whoever asks may not wait for a look: save, and be gone.
            self.stopped_by = report.stops[0]
            self.save(wait=True)
            return
        due = last or progress.step % settings.checkpoint_every == 0
        looks = last or progress.step % settings.validate_every == 0
        if looks and self._validation is not None:
            self.look()
        elif last and self._validation is None:
            self.release()
        # What counts as the best belongs to the state, so it is saved after the look at its step.
        if due or progress.ended:
            self.save(wait=last or progress.ended != "")

    # -- one step --------------------------------------------------------------------------------

    def _seed(self, seed: int) -> None:
        """Seed the device of the run: on a CPU alone, as all others take time where none is."""
        if self.fabric.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _gradient(
        self, micro_batches: list[list[CellBatch]], signals: StopSignals, *, trivial: bool
    ) -> tuple[_Report, list[Tensor]]:
        """Sum the gradient over all micro-batches and ranks, and read the device once.

        Losses come for every piece of every micro-batch.
        """
        losses, exchange = self.losses, self.exchange
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        prepared = [[losses.objectives.prepare(p) for p in pieces] for pieces in micro_batches]
        items_K = torch.stack(
            [
                torch.stack([p.items[name] for pieces in prepared for p in pieces]).sum()
                for name in losses.names
            ]
        ).double()
        self._ranks.at(at.EXCHANGE)
        exchange.sum_(items_K)
        scale_K = (self._weight_K() * exchange.factor / items_K.clamp_min(1)).float()
        totals: list[Tensor] = []
        trivial_K = torch.zeros_like(items_K)
        first = self.progress.position.taken
        for i, pieces in enumerate(prepared):
            # Dropout's randomness has an address too: it belongs to the micro-batch, not the rank.
            number = first + i * exchange.world + exchange.rank
            self._seed(hash((self.seed, number)) & 0x7FFFFFFF)
            for j, piece in enumerate(pieces):
                whole = j + 1 == len(pieces)
                last = whole and i + 1 == len(prepared)
                self._ranks.at(at.EXCHANGE if exchange.kind == "fsdp" else at.COMPUTE)
                with exchange.micro_batch(whole=whole, last=last):
                    with self.fabric.autocast():
                        total_K, without_K = exchange.forward(piece, trivial)
                    if last or (whole and exchange.kind == "ordered"):
                        self._ranks.at(at.EXCHANGE)
                    (total_K * scale_K).sum().backward()
                totals.append(total_K.detach().double())
                trivial_K += without_K.double()
        exchange.finish()
        wishes = torch.stack(
            [
                torch.full((), value, dtype=torch.float64, device=items_K.device)
                for value in self._wishes(signals)
            ]
        )
        summed = torch.cat([torch.stack(totals).sum(0), trivial_K, wishes])
        exchange.sum_(summed)
        norm = exchange.clip_(self.optim.clip)
        n = len(losses.names)
        summed[: 2 * n] /= items_K.clamp_min(1).repeat(2)
        values = torch.cat([summed, norm.double().reshape(1)]).tolist()  # the one look
        self._ranks.at(at.COMPUTE)
        stops = _wanted(values[2 * n :])
        return _Report(
            dict(zip(losses.names, values[:n], strict=True)),
            dict(zip(losses.names, values[n : 2 * n], strict=True)) if trivial else {},
            values[-1],
            stops,
            values[-2],
        ), totals

    def _wishes(self, signals: StopSignals) -> list[float]:
        """Say what this rank wants, a number for each of ``_STOPS``; then rank 0's clock."""
        limit = self.settings.max_minutes
        wanted = {signals.number, "max_minutes" if 0 < limit <= self._session_minutes else 0}
        clock = self._session_minutes if self.exchange.rank == 0 else 0.0
        return [*(float(stop in wanted) for stop in _STOPS), clock]

    def _apply(
        self, report: _Report, batches: list[CellBatch], totals: list[Tensor], position: Position
    ) -> bool | None:
        """Step, unless the numbers say otherwise; None where the run went back to a checkpoint."""
        progress = self.progress
        weights = self._weights
        wrong = self.guard.judge(report.losses, report.norm, report.total(weights))
        if wrong:
            finite = not wrong.endswith("not finite")
            policy = self.settings.on_spike if finite else self.settings.on_nonfinite
            cells = self._name_bad(wrong, batches, totals, finite=finite)
            if policy == "note":
                logger.warning("Step %s: %s. %s", f"{progress.step + 1:,}", wrong, cells)
                self.guard.accept(report.total(weights))
            else:
                return self._refuse(policy, wrong, cells, position)
        self.lr = self.optim.lr * lr_share(
            progress.step, self.settings.max_steps, self.optim, progress.minutes
        )
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.lr * group.get("share", 1.0)
            optimiser.step()
        if self._means_P is not None:
            # The first steps count less: a mean of few would remember the start for long.
            decay = min(self.optim.average_decay, (2 + progress.step) / (11 + progress.step))
            learning: list[Tensor] = list(self.exchange.learning())
            with torch.no_grad():
                torch._foreach_lerp_(self._means_P, learning, 1.0 - decay)
        progress.step += 1
        progress.position = position
        return True

    def _refuse(self, policy: str, wrong: str, cells: str, position: Position) -> bool | None:
        """Do what the settings say with a step that should not count."""
        progress, settings = self.progress, self.settings
        step = progress.step + 1
        setting = "on_nonfinite" if wrong.endswith("not finite") else "on_spike"
        if policy == "stop" or progress.skipped >= settings.max_skips:
            limit = (
                "" if policy == "stop"
                else f" after {progress.skipped} such steps (trainer.max_skips)"
            )  # fmt: skip
            if self.exchange.rank:  # one says it for all
                raise SystemExit(REFUSED)
            raise TrainingStopped(
                f"{wrong} at step {step:,}{limit}, before the weights were changed. {cells} The "
                "last checkpoint is intact. Go on from it with the same command and "
                f"trainer.{setting}=skip (leaves such steps out) or roll_back (goes back to the "
                "checkpoint and on behind them); or lower optim.lr or optim.clip and start in a "
                "new directory."
            )
        progress.skipped += 1
        newest = self._newest() if policy == "roll_back" else None
        if newest is None:
            logger.warning("Step %s left out: %s. %s", f"{step:,}", wrong, cells)
            progress.step += 1
            progress.position = position
            return False
        logger.warning(
            "Step %s: %s. Back to the checkpoint of step %s, and on with the data behind it. %s",
            f"{step:,}", wrong, f"{newest.step:,}", cells,
        )  # fmt: skip
        skipped, minutes = progress.skipped, progress.minutes
        self.restore(newest)
        # The same cells would do the same again, so the data goes on where it is.
        self.progress.position, self.progress.skipped = position, skipped
        self.progress.minutes = minutes
        self.record.rewind(newest.step)
        return None

    def _newest(self) -> Checkpoint | None:
        self.writer.close()
        first = self.exchange.rank == 0
        return self.fabric.broadcast(newest_checkpoint(self._folder) if first else None)

    # -- which cells ------------------------------------------------------------------------------

    def _name_bad(
        self, wrong: str, batches: list[CellBatch], totals: list[Tensor], *, finite: bool
    ) -> str:
        """Name the cells behind a bad step, of all ranks, and write their numbers to a file."""
        rows = torch.stack(totals).cpu()
        if finite:
            per_cell = rows.sum(1) / torch.tensor([max(1, b.n_cells) for b in batches])
            suspects = [int(per_cell.argmax())]
        else:
            suspects = [i for i, row in enumerate(rows) if not torch.isfinite(row).all()]
            suspects = suspects or list(range(len(batches)))
        worst = float(rows.nan_to_num(nan=np.inf).sum(1).max())
        mine = {
            "worst": worst if finite else float(bool(~torch.isfinite(rows).all())),
            "cells": [c for i in suspects for c in self._broken_cells(batches[i])],
        }
        all_ranks = self.exchange.gather_objects(mine)
        highest = max(r["worst"] for r in all_ranks)
        cells = np.unique([c for r in all_ranks if r["worst"] == highest for c in r["cells"]])
        path = self.run / "bad-steps" / f"step-{self.progress.step + 1:08d}.txt"
        if self.exchange.rank == 0:
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join([f"# {wrong}", *map(str, cells.tolist())]) + "\n")
        return f"In question: {self.name_cells(cells)} (all in {path.name})."

    @torch.no_grad()
    def _broken_cells(self, batch: CellBatch) -> list[int]:
        """Cells whose numbers, else whose own encoding, are not finite; all where neither tells."""
        cells = batch.cell_C[: batch.n_cells]
        broken_C = ~torch.isfinite(batch.library_C)
        broken_C[batch.segment_T[~torch.isfinite(batch.value_T)]] = True
        broken_C[batch.full_cell_N[~torch.isfinite(batch.full_count_N)]] = True
        # Under FSDP all ranks together would have to encode.
        if not broken_C.any() and self.exchange.kind != "fsdp":
            with self.fabric.autocast():
                encoded = self.losses.model(batch)
            bad_C = ~torch.isfinite(encoded.cell_CD).all(1)
            broken_C[: bad_C.shape[0]] |= bad_C
            if encoded.hidden_TD.shape[0]:  # an encoder of counts has no tokens
                broken_C[batch.segment_T[~torch.isfinite(encoded.hidden_TD).all(1)]] = True
        chosen = cells[broken_C[: batch.n_cells]]
        return list((chosen if chosen.numel() else cells).tolist())

    # -- looks at held-out data ------------------------------------------------------------------

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the running means in the place of the weights."""
        if self._means_P is None:
            yield
            return
        learning: list[Tensor] = [p.detach() for p in self.exchange.learning()]
        kept = [p.clone() for p in learning]
        torch._foreach_copy_(learning, self._means_P)
        try:
            yield
        finally:
            torch._foreach_copy_(learning, kept)

    def look(self) -> None:
        """Validate: the same micro-batches, and the same sums, for any number of ranks."""
        with torch.no_grad(), self._averaged():
            self._look()

    def _look(self) -> None:
        progress = self.progress
        gc.collect()
        losses = self.losses.eval()
        rows: list[Tensor] = []
        assert self._validation is not None, "something to look at"
        for batches, real in self._rounds(self._validation(self.pieces)):
            self._ranks.at(at.LOOK)
            parts: list[Tensor] = []
            for batch in batches:
                prepared = losses.objectives.prepare(batch, validation=True)
                with self.fabric.autocast():
                    total_K, trivial_K = losses(prepared, True)
                items_K = torch.stack([prepared.items[name] for name in losses.names])
                parts.append(torch.stack([total_K.double(), trivial_K.double(), items_K.double()]))
            if real:
                rows.append(torch.stack(parts).sum(0))
        losses.train()
        progress.validation = self._means(rows)
        self._ranks.at(at.LOOK)
        self._judge_look()

    def _rounds(self, stream: Stream) -> Iterator[tuple[list[CellBatch], bool]]:
        """Yield held-out micro-batches, and whether each counts.

        Sharded weights are gathered by all ranks together, so there a rank without a micro-batch
        of its own does the last one again.
        """
        last: list[CellBatch] = []
        for last, _ in stream:
            if self.exchange.kind == "fsdp":
                self.exchange.sum_(torch.ones(1, device=self.fabric.device))
            yield last, True
        while self.exchange.kind == "fsdp" and last:
            if not self.exchange.sum_(torch.zeros(1, device=self.fabric.device)).item():
                return
            yield last, False

    def _means(self, rows: list[Tensor]) -> dict[str, float]:
        """Mean losses from every rank's sums, added in the order of the micro-batches."""
        exchange, names = self.exchange, self.losses.names
        shape = (0, 3, len(names))
        mine = torch.stack(rows) if rows else torch.zeros(shape, dtype=torch.float64)
        mine = mine.to(self.fabric.device)
        count = torch.tensor([mine.shape[0]], device=mine.device)
        self._ranks.at(at.EXCHANGE)
        longest = int(exchange.gather(count).max())
        padded = mine.new_zeros((longest, *shape[1:]))
        padded[: mine.shape[0]] = mine
        # Rank r holds micro-batches r, r + world, …: rounds first, then ranks.
        in_order = exchange.gather(padded).transpose(0, 1).reshape(-1, *shape[1:]).cpu().numpy()
        total = np.zeros(shape[1:])
        for row in in_order:
            total += row
        result: dict[str, float] = {}
        for k, name in enumerate(names):
            loss, trivial, items = total[:, k].tolist()
            result[f"val/{name}"] = loss / max(items, 1.0)
            result[f"val_trivial/{name}"] = trivial / max(items, 1.0)
        weights = self.losses.objectives.weights
        whole = sum(weights[name] * result[f"val/{name}"] for name in names)
        return {**result, "val/total": whole, "step": float(self.progress.step)}

    def _judge_look(self) -> None:
        progress, patience = self.progress, self.settings.early_stopping
        found, gain = progress.validation["val/total"], self.settings.early_stopping_gain
        improved = found < progress.best
        progress.since_best = 0 if found < progress.best - gain else progress.since_best + 1
        if improved:
            progress.best = found
        self.record.look(progress.step, progress.validation, self.losses.names)
        if improved:
            self.release()
        if patience and progress.since_best >= patience and progress.step < self.settings.max_steps:
            logger.info("No improvement in %s validations: stopping early.", patience)
            progress.ended = "early"

    def release(self) -> None:
        """Hand out the model as it is now; under FSDP all ranks take part."""
        with self._averaged():
            weights = self.exchange.state([])["module"]
            if self.exchange.rank == 0:
                self.on_improvement(self.progress, weights)

    # -- state -----------------------------------------------------------------------------------

    def save(self, *, wait: bool) -> None:
        """Save everything that the same command needs to go on."""
        self._ranks.at(at.SAVE)
        progress = self.progress
        state = self.exchange.state(self.optimisers)
        state["progress"] = asdict(progress)
        state["guard"] = self.guard.state()
        state["record"] = self.record.state()
        if self._means_P is not None:
            state["means"] = self._means_P
        if self.exchange.rank == 0:
            about = {
                **self.about, "step": progress.step, "position": asdict(progress.position),
                "validation": progress.validation, "ended": progress.ended,
            }  # fmt: skip
            path = self._folder / f"step-{progress.step:08d}"
            self.writer.save(path, state, about, wait=wait)
        if wait and self.exchange.world > 1:
            self._ranks.at(at.EXCHANGE)
            self.fabric.barrier()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a saved state."""
        state = checkpoint.state()
        self.exchange.load(state, self.optimisers)
        if self._means_P is not None:
            torch._foreach_copy_(self._means_P, [m.to(self.fabric.device) for m in state["means"]])
        saved = dict(state["progress"])
        position = Position.of(saved.pop("position"))
        self.progress = Progress(**saved, position=position)
        self.guard.load(state["guard"])
        self.record.load(state.get("record", []))

    def _note(
        self, report: _Report, batches: list[CellBatch], stream: Stream, *, shown: bool
    ) -> None:
        lengths = np.concatenate([batch.lengths_C() for batch in batches])
        objectives = self.losses.objectives
        self.record.step(
            self.progress.step,
            losses=report.losses,
            trivial=report.trivial,
            lr=self.lr,
            norm=report.norm,
            cells=lengths.size,
            tokens=int(lengths.sum()),
            fill=float(np.mean([batch.fill for batch in batches])),
            forward_flops=int(objectives.forward_flops(self.losses.model, lengths)),
            waited_s=stream.waited_s,
            minutes_left=self._minutes_left(),
        )

    def _minutes_left(self) -> float | None:
        """Minutes until the session or the schedule ends by the clock; None without such an end."""
        ends = [
            (self.settings.max_minutes, self._session_minutes),
            (self.optim.horizon_minutes, self.progress.minutes),
        ]
        return min((allowed - spent for allowed, spent in ends if allowed), default=None)


def _wanted(wishes: list[float]) -> list[Any]:
    """List what any rank wants to be stopped by."""
    return [stop for stop, wish in zip(_STOPS, wishes, strict=False) if wish > 0]


def _steps(stream: Stream, accumulate: int) -> Iterator[tuple[list[list[CellBatch]], Position]]:
    """Group a rank's micro-batches, in their pieces, into optimiser steps."""
    micro_batches: list[list[CellBatch]] = []
    for pieces, position in stream:
        micro_batches.append(pieces)
        if len(micro_batches) == accumulate:
            yield micro_batches, position
            micro_batches = []


def stopped_name(stopped_by: Any) -> str:
    """Name what has stopped a run."""
    return stopped_by if isinstance(stopped_by, str) else signal.Signals(stopped_by).name
