"""Run pre-training and note every step exactly: which cells, which masks, which losses.

    python traced_run.py RUNS

Started by test_resume.py. RUNS is a JSON list of lists: PROCESSES CORPUS OUT TRACE STEPS OPTIMISER
KILL_AFTER ACCUMULATE DROPOUT. The runs follow each other, each in processes forked from this one,
which has imported everything and trained nothing: imports take longer than the runs. Every rank
writes TRACE.<rank>, and kills itself without warning after step KILL_AFTER (0: never). What was
said goes to standard output, the exit codes of each run to its last lines.
"""

import functools
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr  # noqa: F401 - imported when a corpus is opened: here, it is so once

from genemodel.batches.packing import plan_bins
from genemodel.settings import parse
from genemodel.train.loop import Loop
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings


def train(corpus, out, trace, max_steps, optimiser, kill_after, accumulate, dropout) -> None:
    file = Path(f"{trace}.{os.environ.get('RANK', '0')}").open("a")
    gradient_itself, after_itself = Loop._gradient, Loop._after_step
    digest = ""

    def gradient(loop, micro_batches, signals, *, trivial):
        nonlocal digest
        found = hashlib.sha256()
        for batch in (piece for pieces in micro_batches for piece in pieces):
            prepared = loop.losses.objectives.prepare(batch)
            found.update(batch.cell_C.numpy().tobytes())
            found.update(prepared.seen.gene_T.numpy().tobytes())
            found.update(prepared.seen.value_T.numpy().tobytes())
        digest = found.hexdigest()
        return gradient_itself(loop, micro_batches, signals, trivial=trivial)

    def after_step(loop, report):
        losses = " ".join(value.hex() for value in report.losses.values())
        file.write(f"{loop.progress.step} {digest} {losses}\n")
        file.flush()
        if loop.progress.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        after_itself(loop, report)

    Loop._gradient, Loop._after_step = gradient, after_step
    pretrain(
        parse(
            PretrainSettings,
            {
                "corpus": corpus,
                "out": out,
                "tokens": {"context": 64, "budget": 512},
                "model": {"layers": 1, "width": 16, "heads": 2, "ffn": 16, "dropout": dropout},
                "optim": {"name": optimiser, "warmup_steps": 3, "clip": 0.5},
                "trainer": {
                    "max_steps": max_steps,
                    "accelerator": "cpu",
                    "accumulate": accumulate,
                    "checkpoint_every": 4,
                    "validate_every": 7,
                    "validation_batches": 2,
                    "log_every": 2,
                },
            },
        )
    )


def ranks_of(n: int) -> list[dict[str, str]]:
    """Give the environment of every process, as torchrun sets it."""
    if n == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        {
            "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
            "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "GENEMODEL_SUPERVISED": "1",
        }
        for r in range(n)
    ]  # fmt: skip


def forked(environment: dict[str, str], run: Callable[[], None]) -> int:
    sys.stdout.flush()
    assert threading.active_count() == 1, "forking with threads"
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ.update(environment)
        run()
        code = 0
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_ranks(n: int, run: Callable[[], None]) -> list[int]:
    """Run in so many processes forked from this one, and wait; gives their exit codes."""
    plan_bins(np.ones(1), budget=1, max_cells=1)  # numba loads itself before its first function
    children = [forked(environment, run) for environment in ranks_of(n)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def main() -> None:
    codes = [
        in_ranks(processes, functools.partial(train, *arguments))
        for processes, *arguments in json.loads(sys.argv[1])
    ]
    print(f"\n{json.dumps(codes)}")


if __name__ == "__main__":
    main()
