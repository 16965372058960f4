"""Run pre-training and note every step exactly: which cells, which masks, which losses.

    python traced_run.py CORPUS OUT TRACE STEPS OPTIMISER KILL_AFTER ACCUMULATE DROPOUT

Started by test_resume.py, alone or under torchrun; every rank writes TRACE.<rank>, and kills itself
without warning after step KILL_AFTER (0: never).
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

from genemodel.settings import parse
from genemodel.train.loop import Loop
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings


def main() -> None:
    corpus, out, trace, max_steps, optimiser = sys.argv[1:6]
    kill_after, accumulate, dropout = int(sys.argv[6]), int(sys.argv[7]), float(sys.argv[8])
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
                    "max_steps": int(max_steps),
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


if __name__ == "__main__":
    main()
