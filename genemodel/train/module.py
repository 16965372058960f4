"""The training step: global item counts, micro-batches, clip, finite check, step.

Knows modules, losses and ranks; what the data mean is none of its business.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from genemodel.cells.order import Position
from genemodel.errors import GenemodelError
from genemodel.train.data import Step
from genemodel.train.optim import build_optimisers, lr_share
from genemodel.train.settings import OptimSettings


class TrainingStopped(GenemodelError):
    """Training cannot go on: a loss or gradient is not finite."""


class TrainingModule(pl.LightningModule):
    """Backbone and objectives under Lightning.

    Parameters
    ----------
    model
        Encodes a micro-batch.
    objectives
        ``prepare(batch) -> prepared`` (with ``.seen`` and ``.items``), ``forward(model, encoded,
        prepared) -> {name: LossPart}``, ``weights`` and ``forward_flops(model, lengths_C)``.
    optim, max_steps, seed
        Of the run.
    about
        Plain values kept with every checkpoint.
    rate_shares
        Learning rates of the model's parameters by name, as shares of the run's; 1 by default.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: nn.Module,
        *,
        optim: OptimSettings,
        max_steps: int,
        seed: int,
        about: dict[str, Any],
        rate_shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model: Any = model
        self.objectives: Any = objectives
        self.optim_settings = optim
        self.max_steps = max_steps
        self.seed = seed
        self.about = about
        self.rate_shares = {f"model.{k}": share for k, share in (rate_shares or {}).items()}
        self.steps_done = 0
        self.position = Position()
        self.last_step: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self._validation_sums: dict[str, Tensor] = {}

    # -- training ---------------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Build the optimisers."""
        return build_optimisers(self, self.optim_settings, self.rate_shares)

    def training_step(self, step: Step, batch_idx: int) -> None:
        """Do one optimiser step over all micro-batches of this rank."""
        begin = time.perf_counter()
        optimisers = self.optimizers()
        if not isinstance(optimisers, list):
            optimisers = [optimisers]
        share = lr_share(self.steps_done, self.max_steps, self.optim_settings)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.optim_settings.lr * share * group.get("share", 1.0)
            optimiser.zero_grad(set_to_none=True)
        # Dropout's randomness has an address too: a restarted step drops the same units.
        torch.manual_seed(hash((self.seed, self.steps_done, self.global_rank)) & 0x7FFFFFFF)

        prepared = [self.objectives.prepare(batch) for batch in step.batches]
        names = list(self.objectives.weights)
        items = torch.stack(
            [torch.stack([p.items[name] for p in prepared]).sum() for name in names]
        ).double()
        self._sum_over_ranks(items)
        scale = {
            name: weight * self.trainer.world_size / max(float(n), 1.0)
            for (name, weight), n in zip(self.objectives.weights.items(), items, strict=True)
        }
        sums = torch.zeros(2 * len(names), dtype=torch.float64, device=self.device)
        for i, micro in enumerate(prepared):
            with self._gradient_sync(last=i + 1 == len(prepared)):
                parts = self.objectives(self.model, self.model(micro.seen), micro)
                loss = sum(parts[name].total * scale[name] for name in names)
                self.manual_backward(loss)
            sums += torch.stack(
                [parts[n].total.detach().double() for n in names]
                + [parts[n].trivial.double() for n in names]
            )
        self._sum_over_ranks(sums)
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters() if p.grad is not None],
            self.optim_settings.clip or float("inf"),
        )
        means = (sums / items.repeat(2).clamp_min(1)).tolist()
        self._refuse_nonfinite(dict(zip(names, means, strict=False)), float(norm))
        for optimiser in optimisers:
            optimiser.step()
        self.steps_done += 1
        self.position = step.position
        self.last_step = {
            **{f"train/{n}": m for n, m in zip(names, means, strict=False)},
            **{f"trivial/{n}": m for n, m in zip(names, means[len(names) :], strict=True)},
            "lr": self.optim_settings.lr * share,
            "grad_norm": float(norm),
            "compute_s": time.perf_counter() - begin,
        }

    @contextlib.contextmanager
    def _gradient_sync(self, *, last: bool) -> Iterator[None]:
        """Exchange gradients between ranks with the last micro-batch only."""
        strategy = self.trainer.strategy
        if last or not hasattr(strategy, "block_backward_sync"):
            yield
        else:
            with strategy.block_backward_sync():
                yield

    def _sum_over_ranks(self, values: Tensor) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)

    def _refuse_nonfinite(self, losses: dict[str, float], norm: float) -> None:
        # Sums and the gradient are the same on every rank by now, so all ranks stop together.
        wrong = [n for n, x in {**losses, "gradient norm": norm}.items() if not abs(x) < 1e30]
        if wrong:
            raise TrainingStopped(
                f"{', '.join(wrong)} not finite at step {self.steps_done + 1} (before the weights "
                "were changed). The last checkpoint is intact: lower optim.lr or optim.clip, or "
                "look at the cells of this step, and start the run again in a new directory."
            )

    # -- validation -------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        self._validation_sums = {
            name: torch.zeros(3, dtype=torch.float64, device=self.device)
            for name in self.objectives.weights
        }

    def validation_step(self, step: Step, batch_idx: int) -> None:
        """Add up losses of one micro-batch of held-out data."""
        for batch in step.batches:
            prepared = self.objectives.prepare(batch, validation=True)
            parts = self.objectives(self.model, self.model(prepared.seen), prepared)
            for name, part in parts.items():
                self._validation_sums[name] += torch.stack(
                    [part.total.double(), part.trivial.double(), part.items.double()]
                )

    def on_validation_epoch_end(self) -> None:
        """Turn sums over all ranks into means, with each trivial predictor's beside them."""
        result: dict[str, float] = {}
        total: float = 0.0
        for name, sums in self._validation_sums.items():
            self._sum_over_ranks(sums)
            loss, trivial, items = sums.tolist()
            result[f"val/{name}"] = loss / max(items, 1.0)
            result[f"val_trivial/{name}"] = trivial / max(items, 1.0)
            total += self.objectives.weights[name] * result[f"val/{name}"]
        self.validation = {**result, "val/total": total, "step": float(self.steps_done)}

    # -- resume -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know: our step and the position in the data."""
        checkpoint["about"] = {
            **self.about,
            "step": self.steps_done,
            "position": asdict(self.position),
            "validation": self.validation,
        }
        checkpoint["steps_done"] = self.steps_done
        checkpoint["position"] = asdict(self.position)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        self.steps_done = int(checkpoint["steps_done"])
        self.position = Position(**checkpoint["position"])
