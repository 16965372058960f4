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
from genemodel.train.module import TrainingModule
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings


def main() -> None:
    corpus, out, trace, max_steps, optimiser = sys.argv[1:6]
    kill_after, accumulate, dropout = int(sys.argv[6]), int(sys.argv[7]), float(sys.argv[8])
    file = Path(f"{trace}.{os.environ.get('RANK', '0')}").open("a")
    step_itself = TrainingModule.training_step

    def traced(module, step, batch_idx):
        digest = hashlib.sha256()
        for batch in step.batches:
            prepared = module.objectives.prepare(batch)
            digest.update(batch.cell_C.numpy().tobytes())
            digest.update(prepared.seen.gene_T.numpy().tobytes())
            digest.update(prepared.seen.value_T.numpy().tobytes())
        step_itself(module, step, batch_idx)
        losses = " ".join(
            f"{value.hex()}" for key, value in module.last_step.items() if key.startswith("train/")
        )
        file.write(f"{module.steps_done} {digest.hexdigest()} {losses}\n")
        file.flush()
        if module.steps_done == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingModule.training_step = traced
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
