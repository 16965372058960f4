"""What a run says and keeps while it goes: metrics, progress, checkpoints, stopping.

All of it hangs on Lightning's callbacks and happens at step boundaries only.
"""

import csv
import json
import logging
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from genemodel.model.flops import device_peak, training_flops
from genemodel.train.checkpoint import prune
from genemodel.train.data import Step, StepData
from genemodel.train.module import TrainingModule
from genemodel.train.settings import LogSettings, TrainerSettings

logger = logging.getLogger(__name__)

_SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def keep_rows_up_to(path: Path, step: int) -> None:
    """Drop rows of a metrics file that a restart is about to write again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if int(float(row["step"])) <= step]
    if len(kept) < len(rows):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(kept)


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Append one row to a CSV file; the first row names the columns."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


class Watch(pl.Callback):
    """Write metrics, draw progress, save checkpoints, and end the run when asked or due.

    Parameters
    ----------
    run
        Run directory.
    settings, log
        Of the run.
    on_improvement
        Called on the first rank after a validation better than all before.
    """

    def __init__(
        self,
        run: Path,
        settings: TrainerSettings,
        log: LogSettings,
        *,
        on_improvement: Callable[[TrainingModule], None],
        values: Mapping[str, Any],
    ) -> None:
        self.run, self.settings, self.log_settings = run, settings, log
        self.on_improvement = on_improvement
        self.values = values
        self.best = float("inf")
        self.since_best = 0
        self.signal: int | None = None
        self.finished = False
        self._save_after_look = False
        self._wandb: Any = None
        self._bar: Any = None

    # -- state that a restart needs -----------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Best validation so far and validations since; saved with every checkpoint."""
        return {"best": self.best, "since_best": self.since_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.best, self.since_best = state_dict["best"], state_dict["since_best"]

    # -- start and end ------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over signals; open the log."""
        assert isinstance(pl_module, TrainingModule)
        self._begin = self._row_begin = time.perf_counter()
        self._first_step = pl_module.steps_done
        self._rows: list[dict[str, float]] = []
        self._waited_before = 0.0
        self._peak = (
            device_peak(torch.cuda.get_device_name(trainer.strategy.root_device))
            if trainer.strategy.root_device.type == "cuda"
            else None
        )
        self._previous = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        if trainer.is_global_zero:
            for name in ("metrics.csv", "validation.csv"):
                keep_rows_up_to(self.run / name, pl_module.steps_done)
            self._wandb = start_wandb(self.run, self.log_settings, self.values)
            if sys.stderr.isatty():
                self._bar = tqdm(
                    total=pl_module.max_steps, initial=pl_module.steps_done, unit="step"
                )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: stop now, without saving
        self.signal = number
        logger.info("%s received: saving at the end of this step.", signal.Signals(number).name)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back; close the log."""
        for number, handler in getattr(self, "_previous", {}).items():
            signal.signal(number, handler)
        self._previous = {}
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()

    # -- every step ---------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Step,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Note the step; save and stop where due."""
        assert isinstance(pl_module, TrainingModule)
        done = pl_module.steps_done
        self._note(trainer, pl_module, batch)
        last = done >= pl_module.max_steps
        minutes = (time.perf_counter() - self._begin) / 60
        out_of_time = 0 < self.settings.max_minutes <= minutes
        stop = self._any_rank(
            pl_module, last or out_of_time or self.signal is not None or trainer.should_stop
        )
        due = stop or done % self.settings.checkpoint_every == 0
        looks = stop or done % self.settings.validate_every == 0  # Lightning looks at every stop
        # What counts as the best belongs to the state, so a state is saved after the look at its
        # step; before it as well where somebody may not wait for the end of the look.
        if due and (not looks or (stop and not last)):
            self._save(trainer, done)
        self._save_after_look = due and looks
        self.finished = last
        if stop:
            trainer.should_stop = True

    def _any_rank(self, module: TrainingModule, flag: bool) -> bool:
        """Whether any rank wants to stop: a signal may reach only one of them."""
        if not (dist.is_available() and dist.is_initialized()):
            return flag
        shared = torch.tensor(float(flag), device=module.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared)

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        path = self.run / "checkpoints" / f"step-{step:08d}"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            prune(path.parent, self.settings.keep_checkpoints)

    def _note(self, trainer: pl.Trainer, module: TrainingModule, step: Step) -> None:
        lengths = np.concatenate([b.lengths_C() for b in step.batches])
        forward = module.objectives.forward_flops(module.model, lengths)
        self._rows.append(
            {
                **module.last_step,
                "cells": float(lengths.size),
                "tokens": float(lengths.sum()),
                "fill": float(np.mean([b.fill for b in step.batches])),
                "flops": float(training_flops(forward)),
            }
        )
        done = module.steps_done
        if done % self.settings.log_every and done != module.max_steps:
            if self._bar is not None:
                self._bar.update(done - self._bar.n)
            return
        now = time.perf_counter()
        seconds = now - self._row_begin
        self._row_begin = now
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, StepData)
        waited = data.waited_s
        rows, self._rows = self._rows, []
        world = trainer.world_size
        mean = {
            k: float(np.mean([r[k] for r in rows]))
            for k in rows[0]
            if k not in ("cells", "tokens", "flops", "compute_s")
        }
        total = {k: sum(r[k] for r in rows) for k in ("cells", "tokens", "flops")}
        row = {
            "step": float(done),
            **mean,
            "cells_per_s": total["cells"] * world / seconds,
            "tokens_per_s": total["tokens"] * world / seconds,
            # Useful operations only: real tokens, masked rows, no padding.
            "mfu": total["flops"] / seconds / self._peak if self._peak else float("nan"),
            "data_wait": max(0.0, waited - self._waited_before) / seconds,
            "seconds": now - self._begin,
        }
        self._waited_before = waited
        if trainer.is_global_zero:
            append_row(self.run / "metrics.csv", row)
            self._say(module, row)
            if self._wandb is not None:
                self._wandb.log(row, step=done)

    def _say(self, module: TrainingModule, row: Mapping[str, float]) -> None:
        losses = "  ".join(
            f"{k.removeprefix('train/')} {v:.3f}" for k, v in row.items() if k.startswith("train/")
        )
        if self._bar is not None:
            self._bar.update(module.steps_done - self._bar.n)
            self._bar.set_postfix_str(f"{losses}  {row['cells_per_s']:.0f} cells/s")
            return
        done, here = module.steps_done, module.steps_done - self._first_step
        left = (module.max_steps - done) * row["seconds"] / max(here, 1)
        logger.info(
            "step %s/%s  %s  lr %.2g  %.0f cells/s  fill %.3f  data wait %.0f %%  %s left",
            f"{done:,}", f"{module.max_steps:,}", losses, row["lr"], row["cells_per_s"],
            row["fill"], 100 * row["data_wait"], _duration(left),
        )  # fmt: skip

    # -- every validation -----------------------------------------------------------------------

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the table; remember the best; end the run when it stops improving."""
        assert isinstance(pl_module, TrainingModule)
        result = pl_module.validation
        improved = result["val/total"] < self.best
        # A look at a stop on the way releases what is better, but is none of those that patience
        # counts: a run that was never stopped has not had it.
        in_turn = self.finished or pl_module.steps_done % self.settings.validate_every == 0
        if improved:
            self.best, self.since_best = result["val/total"], 0
        elif in_turn:
            self.since_best += 1
        if trainer.is_global_zero:
            append_row(self.run / "validation.csv", {"step": result["step"], **result})
            for name in pl_module.objectives.weights:
                loss, trivial = result[f"val/{name}"], result[f"val_trivial/{name}"]
                logger.info(
                    "held out  %-14s %8.4f  trivial %8.4f  ratio %.3f",
                    name, loss, trivial, loss / trivial if trivial else float("nan"),
                )  # fmt: skip
            if self._wandb is not None:
                self._wandb.log(result, step=pl_module.steps_done)
            if improved:
                self.on_improvement(pl_module)
        fits = trainer.state.fn == "fit"
        patience = self.settings.early_stopping
        if patience and in_turn and self.since_best >= patience:
            logger.info("No improvement in %s validations: stopping early.", patience)
            trainer.should_stop = True
            if fits:
                # The same command must find a run that has ended, not one that was cut off.
                pl_module.about["ended"] = "early"
                self._save_after_look = True
        if fits and self._save_after_look:
            self._save_after_look = False
            self._save(trainer, pl_module.steps_done)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def start_wandb(run: Path, log: LogSettings, values: Mapping[str, Any]) -> Any:
    """Open a Weights & Biases run, or return None when the log kind is another.

    Settings are sent without anything that looks like a secret, and paths as their last part. The
    run's number is kept in the run directory, so that a restart goes on in the same run.
    """
    if log.kind != "wandb":
        return None
    import wandb

    number_file = run / "wandb-run.json"
    number = (
        json.loads(number_file.read_text())["id"] if number_file.exists() else secrets.token_hex(4)
    )
    number_file.write_text(json.dumps({"id": number}))
    return wandb.init(
        project=log.project,
        name=log.name or run.name,
        id=number,
        resume="allow",
        mode=log.mode,
        dir=str(run),
        config=without_secrets(values),
        # Neither the command line, the host's hardware nor code is anybody's business.
        settings=wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            silent=True,
            program="genemodel",
        ),  # fmt: skip
    )


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy settings for a log: secrets out, absolute paths cut to their last part."""
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if _SECRET.search(key) and key != "tokens":
            clean[key] = "(left out)"
        elif isinstance(value, Mapping):
            clean[key] = without_secrets(value)
        elif isinstance(value, str) and (os.sep in value or "://" in value):
            clean[key] = value.rstrip(os.sep).rsplit(os.sep, 1)[-1]
        else:
            clean[key] = value
    return clean
