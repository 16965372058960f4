"""What ``bench.py gpu`` measures: real training runs on one device, beside a padded opponent.

Nothing here trains by itself: every row is a run of ``genemodel.train.recipe.pretrain`` on a corpus
on disk, with its threads, copies, losses, clipping, optimiser and log. Only clocks are added.
"""

import contextlib
import csv
import gc
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A run's first steps compile, choose kernels and fill queues.
WARM_UP = 10
# What is wanted of an H100 (useful operations only): cells/s and share of the peak.
BARS = {"small": (1950, 0.16), "base": (360, 0.33)}
GOALS = {"small": (3000, 0.25), "base": (400, 0.40)}


@dataclass(frozen=True)
class Plan:
    """What is run; the defaults are those of a GPU."""

    device: str
    sizes: tuple[str, ...]
    budgets: tuple[int, ...]
    context: int = 2048
    accumulate: int = 4
    steps: int = 20
    cells: int = 8192
    genes: int = 1500
    compile: bool = True
    recompute: bool = False
    profile: int = 0
    opponent: bool = True
    corpus: str = ""
    out: str = ""

    @classmethod
    def of(cls, arguments: Any) -> "Plan":
        """Read the command line; on a CPU everything is small, to show that it runs."""
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        gpu = torch.device(device).type == "cuda"
        plan = cls(
            device=device,
            sizes=tuple(arguments.size or (("small", "base") if gpu else ("tiny",))),
            budgets=tuple(arguments.budget or ((65_536, 32_768, 16_384) if gpu else (2048, 1024))),
            compile=not arguments.no_compile,
            recompute=arguments.activation_checkpointing,
            profile=arguments.profile,
            opponent=not arguments.no_opponent,
            corpus=arguments.corpus or "",
            out=arguments.out or "",
        )
        if not gpu:
            plan = replace(plan, context=256, accumulate=2, steps=10, cells=400, genes=200)
        changed = {
            name: value
            for name in ("context", "steps", "cells")
            if (value := getattr(arguments, name)) is not None
        }
        return replace(plan, **changed)


class Phases:
    """Where a step's time goes: from one mark to the next it belongs to the first.

    On a GPU marks are events in its stream, so that a phase is what the device did, idle included.
    """

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.steps = 0
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if self.steps <= WARM_UP:
            return
        moment: Any = time.perf_counter()
        if self.gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((name, moment))

    def milliseconds(self) -> dict[str, float]:
        """Mean milliseconds a step, by phase."""
        begins = [i for i, (name, _) in enumerate(self._marks) if name == "hide"]
        whole = self._marks[: begins[-1] + 1]  # steps that have ended
        total: dict[str, float] = defaultdict(float)
        for (name, a), (_, b) in zip(whole[:-1], whole[1:], strict=True):
            total[name] += a.elapsed_time(b) if self.gpu else 1e3 * (b - a)
        return {name: t / (len(begins) - 1) for name, t in total.items()}

    @contextlib.contextmanager
    def of_the_loop(self) -> Iterator[None]:
        """Mark the phases of every step that the training loop takes meanwhile."""
        from genemodel.train.exchange import Exchange
        from genemodel.train.loop import Loop
        from genemodel.train.losses import Losses

        def marked(name: str, inner: Callable[..., Any], after: str = "") -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if name == "hide":
                    self.steps += 1
                    if self.steps == WARM_UP and self.gpu:
                        torch.cuda.reset_peak_memory_stats()
                self.mark(name)
                result = inner(*arguments, **options)
                if after:
                    self.mark(after)
                return result

            return call

        places = [
            (Loop, "_gradient", "hide", ""),
            (Losses, "forward", "forward", "backward"),
            (Exchange, "finish", "clip and look", ""),
            (Loop, "_apply", "optimiser", ""),
            (Loop, "_note", "data and host", ""),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _, _ in places]
        for owner, name, phase, after in places:
            setattr(owner, name, marked(phase, getattr(owner, name), after))
        try:
            yield
        finally:
            for owner, name, inner in before:
                setattr(owner, name, inner)


def line(name: str, figure: str, note: str = "") -> None:
    print(f"  {name:<46}{figure:>18}  {note}", flush=True)


def bench_gpu(plan: Plan) -> None:
    """Run all rows, print them, and write them to ``gpu.json``."""
    from genemodel.corpus.corpus import Corpus

    device = torch.device(plan.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"training on {name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads, "
        f"{'compiled' if plan.compile else 'not compiled'}, context {plan.context:,}"
    )
    with contextlib.ExitStack() as stack:
        folder = Path(plan.out or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        path = Path(plan.corpus) if plan.corpus else _generated(plan, folder)
        corpus = Corpus.open(path)
        length = np.minimum(corpus.n_genes_C, plan.context - 1) + 1
        line(
            "cells", f"{len(corpus):,}",
            f"mean {length.mean():,.0f} tokens, vocabulary {len(corpus.vocabulary):,}",
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        for size in plan.sizes:
            for row in _one_size(plan, size, path, folder, length, len(corpus.vocabulary)):
                rows.append(row)
                found = {"device": name, "torch": torch.__version__, "rows": rows}
                (folder / "gpu.json").write_text(json.dumps(found, indent=1))
        if plan.out:
            print(f"  all of it: {folder / 'gpu.json'}")
        if device.type == "cuda":
            _judge(rows)


def _generated(plan: Plan, folder: Path) -> Path:
    from genemodel.corpus.corpus import Corpus
    from genemodel.simulation.cells import synthetic

    begin = time.perf_counter()
    cells = synthetic(
        plan.cells, species=("human",), n_genes=max(2000, 8 * plan.genes), genes_per_cell=plan.genes
    )
    Corpus.build(list(cells.values()), folder / "corpus")
    line("made cells and a corpus", f"{time.perf_counter() - begin:.0f} s")
    return folder / "corpus"


def shape_of(size: str) -> dict[str, Any]:
    """Settings of a named model size."""
    from genemodel.command.config_files import config_folder, values_of

    return values_of(config_folder() / "model" / f"{size}.yaml")


def _one_size(
    plan: Plan, size: str, corpus: Path, folder: Path, length: np.ndarray, n_tokens: int
) -> Iterator[dict[str, Any]]:
    shape = shape_of(size)
    print(f"{size}: {shape['layers']} × {shape['width']}, {shape['heads']} heads")
    # The most important ones first, for whoever has the device for minutes only.
    first, *others = plan.budgets
    best = 0.0
    for budget, n in ((first, plan.accumulate), *((budget, 1) for budget in (first, *others))):
        row = _training(plan, size, shape, corpus, folder, budget, n)
        best = max(best, row["cells_per_s"])
        yield row
    if plan.opponent:
        for compiled in (False, True) if plan.compile else (False,):
            row = _padded(plan, size, shape, length, n_tokens, compiled=compiled)
            line("  genemodel ÷ this", f"{best / row['cells_per_s']:.1f}×")
            yield row
    yield _embedding(plan, size, folder)


def _fresh(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _training(
    plan: Plan, size: str, shape: dict[str, Any], corpus: Path, folder: Path, budget: int, n: int
) -> dict[str, Any]:
    """One run of the real thing; a row of figures."""
    from genemodel.settings import parse
    from genemodel.train.recipe import pretrain
    from genemodel.train.settings import PretrainSettings

    device = torch.device(plan.device)
    gpu = device.type == "cuda"
    out = folder / f"{size}-{budget}-{n}"
    settings = parse(
        PretrainSettings,
        {
            "corpus": str(corpus), "out": str(out), "model": shape,
            "tokens": {"context": plan.context, "budget": budget}, "holdout": {"by": "auto"},
            "trainer": {
                "max_steps": WARM_UP + plan.steps, "accumulate": n, "compile": plan.compile,
                "accelerator": "gpu" if gpu else "cpu", "precision": "bf16-mixed",
                "activation_checkpointing": plan.recompute,
                "log_every": 5, "validate_every": 10**9, "validation_batches": 1,
                "checkpoint_every": 10**9, "profile": plan.profile,
            },
        },
    )  # fmt: skip
    _fresh(device)
    phases = Phases(device)
    begin = time.perf_counter()
    with phases.of_the_loop():
        pretrain(settings)
    seconds = time.perf_counter() - begin
    with (out / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    rows = [row for row in rows if row["step"] > WARM_UP]
    weight = [row["cells_per_step"] / row["cells_per_s"] for row in rows]  # seconds a step

    def mean(key: str) -> float:
        return float(np.average([row[key] for row in rows], weights=weight))

    per_step = phases.milliseconds()
    found = {
        "size": size, "what": "training", "budget": budget, "accumulate": n,
        "cells_per_s": mean("cells_per_s"), "tokens_per_s": mean("tokens_per_s"),
        "mfu": mean("mfu"), "data_wait": mean("data_wait"), "fill": mean("fill"),
        "cells_per_step": mean("cells_per_step"), "milliseconds": per_step,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan"),
        "seconds_in_all": seconds,
    }  # fmt: skip
    line(
        f"{budget:,} tokens × {n}, {found['cells_per_step']:.0f} cells a step",
        f"{found['cells_per_s']:,.1f} cells/s",
        f"{found['tokens_per_s']:,.0f} tokens/s, MFU {found['mfu']:.1%}, "
        f"waiting for data {found['data_wait']:.1%}, peak {found['peak_gib']:.1f} GiB "
        f"({seconds:.0f} s in all)",
    )
    whole = sum(per_step.values())
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in per_step.items())
    line("  of a step, ms", f"{whole:.1f}", parts)
    if plan.profile:
        line("  trace", "", str(out / "profile"))
    return found


def _embedding(plan: Plan, size: str, folder: Path) -> dict[str, Any]:
    """Cells a second from AnnData to obsm, with the bundle of the last run."""
    import genemodel as gm
    from genemodel.simulation.cells import synthetic

    device = torch.device(plan.device)
    _fresh(device)
    bundle = gm.load(
        folder / f"{size}-{plan.budgets[0]}-{plan.accumulate}" / "bundle", device=plan.device
    )
    cells = synthetic(
        plan.cells, species=("human",), n_genes=max(2000, 8 * plan.genes),
        genes_per_cell=plan.genes, seed=1,
    )["human"]  # fmt: skip
    gm.embed(cells[: max(64, plan.cells // 8)].copy(), bundle)  # kernels are chosen
    begin = time.perf_counter()
    gm.embed(cells, bundle)
    rate = cells.n_obs / (time.perf_counter() - begin)
    line("embedding, AnnData in memory", f"{rate:,.0f} cells/s")
    return {"size": size, "what": "embedding", "cells_per_s": rate}


# -- the opponent ----------------------------------------------------------------------------------


def bert_of(shape: dict[str, Any], n_tokens: int, context: int) -> torch.nn.Module:
    """Hugging Face's BertForMaskedLM of the same shape, without dropout, with fused attention."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=n_tokens, hidden_size=shape["width"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], intermediate_size=shape["ffn"],
        max_position_embeddings=context, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return BertForMaskedLM(config)


def padded_batches(
    length: Sequence[int], n_tokens: int, width: int, *, to: int | None = None, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, mask and labels (15 %) of cells, padded to the longest of ``width``, or to ``to``."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for a in range(0, len(length), width):
        sizes = torch.as_tensor(np.asarray(length[a : a + width]))
        longest = to or int(sizes.max())
        ids = torch.randint(3, n_tokens, (len(sizes), longest), generator=generator)
        there = torch.arange(longest) < sizes[:, None]
        chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & there
        labels = torch.where(chosen, ids, -100)
        ids = torch.where(there, torch.where(chosen, 1, ids), 0)
        made.append((ids, there.long(), labels))
    return made


def _padded(
    plan: Plan, size: str, shape: dict[str, Any], length: np.ndarray, n_tokens: int, *,
    compiled: bool,
) -> dict[str, Any]:  # fmt: skip
    """Steps of the opponent on cells of the same lengths; half the batch where memory ends."""
    device = torch.device(plan.device)
    width = 32 if device.type == "cuda" else 8
    while True:
        try:
            rate = _padded_rate(plan, shape, length, n_tokens, width, compiled=compiled)
            break
        except torch.OutOfMemoryError:
            if width == 1:
                raise
        width //= 2
    # Compiled, every length would be another graph: all are padded to the context.
    how = f"compiled, to {plan.context:,}" if compiled else f"to the longest of {width}"
    line(f"BertForMaskedLM, padded {how}", f"{rate:,.1f} cells/s", f"batches of {width}")
    what = "padded BERT, compiled" if compiled else "padded BERT"
    return {"size": size, "what": what, "batch": width, "cells_per_s": rate}


def _padded_rate(
    plan: Plan, shape: dict[str, Any], length: np.ndarray, n_tokens: int, width: int, *,
    compiled: bool,
) -> float:  # fmt: skip
    device = torch.device(plan.device)
    gpu = device.type == "cuda"
    _fresh(device)
    torch.manual_seed(0)
    model: Any = bert_of(shape, n_tokens, plan.context).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled:
        model = torch.compile(model, dynamic=False)
    chosen = np.random.default_rng(0).choice(length, (plan.steps + 3) * width)
    batches = padded_batches(chosen, n_tokens, width, to=plan.context if compiled else None)
    batches = [tuple(x.to(device) for x in batch) for batch in batches]
    begin = 0.0
    for step, (ids, mask, labels) in enumerate(batches):
        if step == 3:  # compiled, kernels chosen
            if gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    if gpu:
        torch.cuda.synchronize()
    return plan.steps * width / (time.perf_counter() - begin)


def _judge(rows: list[dict[str, Any]]) -> None:
    """Say for every size whether the best row reaches what is wanted of an H100."""
    for size, (cells, mfu) in BARS.items():
        mine = [row for row in rows if row["size"] == size and row["what"] == "training"]
        if not mine:
            continue
        best = max(mine, key=lambda row: row["cells_per_s"])
        reached = best["cells_per_s"] >= cells and best["mfu"] >= mfu
        goal = GOALS[size]
        line(
            f"{size}: bar {cells:,} cells/s and {mfu:.0%}",
            "reached" if reached else "not reached",
            f"{best['cells_per_s']:,.0f} and {best['mfu']:.1%} at {best['budget']:,} × "
            f"{best['accumulate']}; goal {goal[0]:,} and {goal[1]:.0%}",
        )
