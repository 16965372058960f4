"""Devices to test on. What a GPU does differently is tested here; the rest of the tests need none.

    pytest -m gpu tests                  # on a machine with a GPU: all that needs one
    pytest tests/gpu                     # without: the same bodies on the CPU

Every body is a function of a device, and runs on the CPU too, where it can be wrong only about the
device.
"""

import csv
from pathlib import Path

import pytest
import torch

from genemodel.settings import parse
from genemodel.train.settings import PretrainSettings


def _there_or_skip(kind: str, n: int = 1) -> torch.device:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and found < n:
        pytest.skip(f"needs {n} GPU(s); torch sees {found} here")
    return torch.device(kind)


@pytest.fixture(scope="session")
def there_or_skip():
    """``there_or_skip(kind, n)``: a device; skips where there are not so many of it."""
    return _there_or_skip


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The CPU, and a GPU where there is one."""
    return _there_or_skip(request.param)


@pytest.fixture
def gpu():
    """A GPU."""
    return _there_or_skip("cuda")


@pytest.fixture(autouse=True)
def forget_graphs():
    """Compiled graphs of one test are none of the next one's."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def run_settings(small_start):
    """``run_settings(out, device, **trainer)``: a run of a small model on a small corpus."""

    def make(out, device, *, model=None, tokens=None, optim=None, **trainer):
        return parse(
            PretrainSettings,
            {
                "corpus": str(small_start / "corpus"),
                "out": str(out),
                "tokens": {"context": 64, "budget": 1024, **(tokens or {})},
                "model": {
                    "layers": 2, "width": 64, "heads": 2, "ffn": 128, "components": 4,
                    **(model or {}),
                },
                "optim": {"lr": 3e-3, "warmup_steps": 4, **(optim or {})},
                "trainer": {
                    "max_steps": 8, "validate_every": 4, "validation_batches": 2, "log_every": 1,
                    "checkpoint_every": 4,
                    "accelerator": "gpu" if device.type == "cuda" else "cpu", **trainer,
                },
            },
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def numbers():
    """``numbers(run)``: every loss and gradient norm of a run, shown and held out."""

    def read(run: Path) -> dict[tuple[str, int, str], float]:
        found = {}
        for name in ("metrics.csv", "validation.csv"):
            with (run / name).open(newline="") as file:
                for row in csv.DictReader(file):
                    for key, value in row.items():
                        if key.startswith(("train/", "trivial/", "val", "grad_norm")):
                            found[name, int(float(row["step"])), key] = float(value)
        return found

    return read
