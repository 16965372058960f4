"""What a run says while it goes: metrics.csv, validation.csv, a bar or lines, Weights & Biases."""

import csv
import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from genemodel.model.flops import training_flops
from genemodel.settings import somebody_looks_on
from genemodel.train.checkpoint import CheckpointWriter
from genemodel.train.settings import LogSettings, TrainerSettings
from genemodel.train.wandb_log import start_wandb
from genemodel.writing import is_full, too_small, whole

logger = logging.getLogger(__name__)

METRICS, VALIDATION = "metrics.csv", "validation.csv"


def keep_rows_up_to(path: Path, step: int) -> None:
    """Drop rows of a metrics file that a restart is about to write again.

    So goes a last row that a kill or a full disk has cut off.
    """
    if not path.exists():
        return
    text = path.read_text()
    whole_lines = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(io.StringIO(whole_lines)))
    kept = [row for row in rows if int(float(row["step"])) <= step]
    if len(kept) == len(rows) and whole_lines == text:
        return
    if not rows:
        path.unlink()  # the next row brings its names
        return
    with whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Append one row to a CSV file; the first row names the columns, further ones are left out.

    Raises
    ------
    DiskFull
        No more of it is there than before.
    """
    names = list(row)
    before = path.stat().st_size if path.exists() else 0
    if before:
        with path.open(newline="") as file:
            names = next(csv.reader(file), names)
    try:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
            if not before:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        if not is_full(error):
            raise
        os.truncate(path, before)
        raise too_small(path, before, exact=False) from error


class Record:
    """Rows, lines and a bar of one run; writes on the first rank, silent on the others.

    Parameters
    ----------
    run
        Run directory.
    trainer, log
        Settings of the run.
    values
        All settings, for Weights & Biases.
    rank, world
        This process, and how many there are.
    peak
        Operations per second that a device can do at most; None where it is not known.
    quiet
        Say ten lines in all, not one a row.
    silent
        Losses that are written and said nowhere; see :class:`genemodel.heads.objective.Objective`.
    """

    def __init__(
        self,
        run: Path,
        trainer: TrainerSettings,
        log: LogSettings,
        *,
        values: Mapping[str, Any],
        rank: int,
        world: int,
        peak: float | None,
        quiet: bool = False,
        silent: Sequence[str] = (),
    ) -> None:
        self.quiet, self.silent = quiet, frozenset(silent)
        self.run, self.settings, self.log_settings = run, trainer, log
        self.values, self.peak = values, peak
        self.world, self.active = world, rank == 0
        self._rows: list[dict[str, float]] = []
        # Of an earlier session: they count for means and not for rates.
        self._untimed = 0
        self._wandb: Any = None
        self._bar: Any = None
        self._first = 0
        self._begin = self._row_begin = time.perf_counter()
        self._waited = 0.0
        self._said = 0

    def start(self, step: int) -> None:
        """Open the logs for a session that begins after ``step``."""
        self._begin = self._row_begin = time.perf_counter()
        self._first = step
        if not self.active:
            return
        self.rewind(step)
        if self._wandb is None:
            self._wandb = start_wandb(self.run, self.log_settings, self.values)
        if somebody_looks_on():
            self._bar = tqdm(total=self.settings.max_steps, initial=step, unit="step")

    def rewind(self, step: int) -> None:
        """Forget rows after ``step``, which will be written again."""
        if self.active:
            for name in (METRICS, VALIDATION):
                keep_rows_up_to(self.run / name, step)

    def state(self) -> list[dict[str, float]]:
        """Give the steps since the last row, for a checkpoint: the next row is their mean too."""
        return list(self._rows)

    def load(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take them back."""
        self._rows = [dict(row) for row in rows]
        self._untimed = len(self._rows)

    def close(self, writer: CheckpointWriter) -> None:
        """Close the logs, and say what saving has cost."""
        if self.active and writer.saves:
            logger.info(
                "%d checkpoints written in %.1f s; training stood still for %.1f s of it.",
                writer.saves, writer.written_s, writer.stalled_s,
            )  # fmt: skip
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def is_due(self, step: int) -> bool:
        """Whether a row is written after ``step``."""
        return step % self.settings.log_every == 0 or step == self.settings.max_steps

    def step(
        self,
        step: int,
        *,
        losses: Mapping[str, float],
        trivial: Mapping[str, float],
        lr: float,
        norm: float,
        cells: int,
        tokens: int,
        fill: float,
        forward_flops: int,
        waited_s: float,
        minutes_left: float | None,
    ) -> None:
        """Note one step; write a row where one is due. ``minutes_left`` of those allowed."""
        self._rows.append(
            {
                **{f"train/{name}": x for name, x in losses.items() if name not in self.silent},
                "grad_norm": norm,
                "fill": fill,
                "cells": float(cells),
                "tokens": float(tokens),
                "flops": float(training_flops(forward_flops)),
            }
        )
        if not self.is_due(step):
            if self._bar is not None:
                self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        seconds = now - self._row_begin
        self._row_begin = now
        rows, self._rows = self._rows, []
        timed, self._untimed = rows[self._untimed :], 0
        total = {k: sum(r[k] for r in timed) for k in ("cells", "tokens", "flops")}
        mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k not in total}
        row = {
            "step": float(step),
            **mean,
            # Of the row's last step: it costs a pass of its own, so not every step has it.
            **{f"trivial/{name}": x for name, x in trivial.items() if name not in self.silent},
            "lr": lr,
            "cells_per_s": total["cells"] * self.world / seconds,
            "tokens_per_s": total["tokens"] * self.world / seconds,
            "cells_per_step": sum(r["cells"] for r in rows) * self.world / len(rows),
            # Useful operations only: real tokens, masked rows, no padding.
            "mfu": total["flops"] / seconds / self.peak if self.peak else float("nan"),
            "data_wait": max(0.0, waited_s - self._waited) / seconds,
            "seconds": now - self._begin,
        }
        self._waited = waited_s
        if not self.active:
            return
        append_row(self.run / METRICS, row)
        self._say(step, row, minutes_left)
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def _say(self, step: int, row: Mapping[str, float], minutes_left: float | None) -> None:
        losses = "  ".join(
            _loss(name.removeprefix("train/"), row) for name in row if name.startswith("train/")
        )
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"{losses}  {row['cells_per_s']:.0f} cells/s")
            return
        if self.quiet and 10 * step // self.settings.max_steps == self._said:
            return
        self._said = 10 * step // self.settings.max_steps
        logger.info(
            "step %s/%s  %s  lr %.2g  %.0f cells/s  fill %.3f  data wait %.0f %%  %s",
            f"{step:,}", f"{self.settings.max_steps:,}", losses, row["lr"], row["cells_per_s"],
            row["fill"], 100 * row["data_wait"], self._left(step, row["seconds"], minutes_left),
        )  # fmt: skip

    def _left(self, step: int, seconds: float, minutes_left: float | None) -> str:
        """Say how long it will be, and whether the time allowed ends it before."""
        per_step = seconds / max(step - self._first, 1)
        left = (self.settings.max_steps - step) * per_step
        if minutes_left is None or left <= 60 * minutes_left:
            return f"{duration(left)} left"
        allowed = 60 * minutes_left
        there = step + int(allowed / max(per_step, 1e-9))
        return (
            f"{duration(max(0.0, allowed))} left of the time allowed, at about step {there:,} of "
            f"{self.settings.max_steps:,}"
        )

    def look(self, step: int, result: Mapping[str, float], names: Sequence[str]) -> None:
        """Write a look at held-out data down."""
        if not self.active:
            return
        unsaid = {f"{kind}/{name}" for kind in ("val", "val_trivial") for name in self.silent}
        shown = {key: value for key, value in result.items() if key not in unsaid}
        append_row(self.run / VALIDATION, {"step": float(step), **shown})
        for name in names:
            if name in self.silent:
                continue
            loss, trivial = result[f"val/{name}"], result[f"val_trivial/{name}"]
            logger.info(
                "held out  %-14s %8.4f  trivial %8.4f  ratio %.3f",
                name, loss, trivial, loss / trivial if trivial else float("nan"),
            )  # fmt: skip
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in shown.items() if k != "step"}, step=step)


def _loss(name: str, row: Mapping[str, float]) -> str:
    """Write a loss beside that of a predictor that ignores the cell."""
    trivial = row.get(f"trivial/{name}")
    beside = f" (trivial {trivial:.3f})" if trivial else ""
    return f"{name} {row[f'train/{name}']:.3f}{beside}"


def duration(seconds: float) -> str:
    """Write a time as people do: 3h07m, 12m05s."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
