"""Whole runs on a device: compiled, without recompiling, without waiting, cut off and gone on."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from genemodel.bundle.bundle import Bundle
from genemodel.settings import to_values
from genemodel.train import memory, recipe
from genemodel.train.loop import Loop
from genemodel.train.recipe import pretrain

on_gpu = functools.partial(pytest.param, marks=pytest.mark.gpu)


def compiled_lightly(monkeypatch, device):
    """On a CPU trace and differentiate as everywhere, but have nothing written in C++."""
    if device.type == "cpu":
        lightly = functools.partial(recipe.compile_for_training, backend="aot_eager")
        monkeypatch.setattr(recipe, "compile_for_training", lightly)


@pytest.mark.slow
def test_twenty_compiled_steps_learn_and_compile_nothing_anew(
    run_settings, numbers, device, tmp_path, monkeypatch
):
    compiled_lightly(monkeypatch, device)
    graphs = []
    after_step = Loop._after_step

    def noted(loop, report):
        after_step(loop, report)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(Loop, "_after_step", noted)
    settings = run_settings(
        tmp_path, device, compile=True, precision="bf16-mixed", accumulate=2, max_steps=20,
        log_every=3, validate_every=8, optim={"lr": 1e-2},
    )  # fmt: skip
    pretrain(settings)
    assert len(graphs) == 20
    # Steps that are not shown, shown ones and a look: after the eighth all have been there.
    assert 0 < graphs[0] < graphs[7] == graphs[-1], graphs
    found = numbers(tmp_path)
    assert np.isfinite(list(found.values())).all()
    looks = [found["validation.csv", step, "val/total"] for step in (8, 16, 20)]
    assert looks[2] < looks[0]
    for name in ("masked_gene", "masked_value", "decode_counts"):
        assert found["metrics.csv", 20, f"train/{name}"] > 0
    assert Bundle.load(tmp_path / "bundle", device=device).provenance["steps"] in (8, 16, 20)


@pytest.mark.parametrize("trainer", [{}, {"activation_checkpointing": True}])
def test_a_run_is_that_of_full_precision_on_a_cpu(run_settings, numbers, device, tmp_path, trainer):
    """The same cells, masks, sums and steps; what is left is rounding, which steps amplify."""
    cpu = torch.device("cpu")
    pretrain(run_settings(tmp_path / "cpu", cpu, precision="32-true", accumulate=2))
    wanted = numbers(tmp_path / "cpu")
    for precision, loss in (("32-true", 1e-3), ("bf16-mixed", 2e-2)):
        out = tmp_path / precision
        pretrain(run_settings(out, device, precision=precision, accumulate=2, **trainer))
        found = numbers(out)
        assert list(found) == list(wanted)
        for key, value in found.items():
            if key[2].startswith(("train/", "val/", "trivial/")):
                assert value == pytest.approx(wanted[key], rel=loss), (precision, key)


class Killed(BaseException):
    """Stands for a process that ends without saving anything."""


def test_a_run_cut_off_goes_on_as_if_it_had_not_been(
    run_settings, numbers, device, tmp_path, monkeypatch
):
    settings = functools.partial(run_settings, device=device, precision="32-true", accumulate=2)
    pretrain(settings(tmp_path / "whole"))
    after_step = Loop._after_step

    def killed(loop, report):
        after_step(loop, report)
        if loop.progress.step == 6:  # two steps after the last checkpoint
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", killed)
        with pytest.raises(Killed):
            pretrain(settings(tmp_path / "run"))
    pretrain(settings(tmp_path / "run"))
    wanted, found = numbers(tmp_path / "whole"), numbers(tmp_path / "run")
    assert list(found) == list(wanted)
    # On a GPU additions of a backward pass come in any order; on a CPU they do not.
    bound = {"rel": 1e-3} if device.type == "cuda" else {"rel": 0, "abs": 0}
    assert list(found.values()) == pytest.approx(list(wanted.values()), **bound)


RUNS = """
import hashlib, json, os, sys, traceback
import zarr
from genemodel.settings import parse
from genemodel.train.loop import Loop
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings

def train(number, values, last):
    after_step = Loop._after_step

    def noted(loop, report):
        after_step(loop, report)
        step = loop.progress.step
        digest = hashlib.sha256()
        for parameter in loop.losses.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        losses = (x.hex() for x in report.losses.values())
        print("STEP", number, step, digest.hexdigest(), *losses, flush=True)
        if step == last:
            os._exit(9)

    Loop._after_step = noted
    pretrain(parse(PretrainSettings, values))

for number, (values, last) in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if not pid:
        try:
            train(number, values, last)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (9 if last else 0), (number, code)
"""


def steps_of(*runs):
    """Weights and losses after every step, to the bit, of runs that end after ``last`` (0: whole).

    One after the other, each in a process of its own, forked from one that has imported everything
    and not looked for a GPU.
    """
    given = [(to_values(settings), last) for settings, last in runs]
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(given)],
        env={
            **os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [{} for _ in runs]
    for line in done.stdout.splitlines():
        if line.startswith("STEP"):
            _, number, step, *rest = line.split()
            found[int(number)][int(step)] = rest
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"),
    # On a CPU another precision is three processes more that say nothing about a GPU.
    [("cpu", "32-true"), on_gpu("cuda", "32-true"), on_gpu("cuda", "bf16-mixed")],
)
def test_deterministic_runs_are_equal_to_the_bit_also_when_cut_off(
    run_settings, there_or_skip, tmp_path, kind, precision
):
    device = there_or_skip(kind)
    settings = functools.partial(
        run_settings, device=device, precision=precision, deterministic=True, accumulate=2,
        model={"dropout": 0.1},
    )  # fmt: skip
    cut = settings(tmp_path / "cut")
    whole, first, rest = steps_of((settings(tmp_path / "whole"), 0), (cut, 6), (cut, 0))
    assert sorted(whole) == list(range(1, 9))
    assert first == {step: whole[step] for step in range(1, 7)}
    assert rest == {step: whole[step] for step in range(5, 9)}  # from the checkpoint of step 4


# -- waiting for the device ------------------------------------------------------------------------

SYNCHRONISES = "called a synchronizing CUDA operation"


@contextlib.contextmanager
def counted_waits(counts):
    """Count, for every step, the operations for which the host waits for the device."""
    gradient, after_step = Loop._gradient, Loop._after_step
    gpu = torch.cuda.is_available()
    step = contextlib.ExitStack()
    found = []

    def begin(loop, *arguments, **options):
        found.append(step.enter_context(warnings.catch_warnings(record=True)))
        warnings.simplefilter("always")
        if gpu:
            torch.cuda.set_sync_debug_mode("warn")
        return gradient(loop, *arguments, **options)

    def end(loop, report):
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
        step.close()
        counts.append([w for w in found.pop() if SYNCHRONISES in str(w.message)])
        after_step(loop, report)

    Loop._gradient, Loop._after_step = begin, end
    try:
        yield
    finally:
        Loop._gradient, Loop._after_step = gradient, after_step
        if gpu:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_step_waits_for_the_device_once(
    run_settings, device, tmp_path, monkeypatch, accumulate, optimiser
):
    """From the first micro-batch to the end of the update, whatever their number."""
    if device.type == "cpu":
        # Nothing waits here: that the counting would see it is what is shown.
        wishes = Loop._wishes

        def waiting(loop, signals):
            warnings.warn(SYNCHRONISES, stacklevel=1)
            return wishes(loop, signals)

        monkeypatch.setattr(Loop, "_wishes", waiting)
    counts = []
    settings = run_settings(
        tmp_path, device, precision="bf16-mixed", accumulate=accumulate, max_steps=6, log_every=2,
        validate_every=6, optim={"name": optimiser},
    )  # fmt: skip
    with counted_waits(counts):
        pretrain(settings)
    # The first steps allocate, choose kernels and make the optimiser's state.
    assert [len(waits) for waits in counts[2:]] == [1] * 4, [
        f"{w.filename}:{w.lineno}" for waits in counts[2:] for w in waits
    ]


# -- memory ----------------------------------------------------------------------------------------


def test_a_gpu_that_is_too_small_takes_micro_batches_in_pieces(
    run_settings, numbers, gpu, tmp_path, monkeypatch, caplog
):
    """For real: most of the memory is taken away, so that a whole micro-batch does not fit."""
    monkeypatch.setattr(memory, "MARGIN", 0)
    settings = functools.partial(
        run_settings, device=gpu, precision="bf16-mixed", max_steps=2, validate_every=2,
        model={"layers": 8, "width": 256, "heads": 4, "ffn": 1024, "components": 0},
        tokens={"context": 64, "budget": 131_072},
    )  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pretrain(settings(tmp_path / "whole"))
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / total)
    try:
        with caplog.at_level("WARNING"):
            pretrain(settings(tmp_path / "pieces"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "it is taken in" in caplog.text and "CUDA out of memory" in caplog.text
    wanted, found = numbers(tmp_path / "whole"), numbers(tmp_path / "pieces")
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=5e-3), key


def test_activation_checkpointing_needs_less_memory(run_settings, gpu, tmp_path):
    peaks = {}
    for wanted in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        pretrain(
            run_settings(
                tmp_path / str(wanted), gpu, precision="bf16-mixed", max_steps=2,
                model={"layers": 8, "width": 256, "heads": 4, "ffn": 1024, "components": 0},
                tokens={"context": 64, "budget": 32_768}, activation_checkpointing=wanted,
            )
        )  # fmt: skip
        peaks[wanted] = torch.cuda.max_memory_allocated()
    assert peaks[True] < 0.6 * peaks[False], peaks


# -- several devices -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "deterministic"), [("cpu", True), on_gpu("cuda", True), on_gpu("cuda", False)]
)
def test_two_devices_train_as_one_with_twice_the_micro_batches(
    run_settings, numbers, there_or_skip, tmp_path, monkeypatch, kind, deterministic
):
    device = there_or_skip(kind, 2)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    settings = functools.partial(
        run_settings, device=device, precision="32-true", max_steps=4, deterministic=deterministic
    )
    steps_of((settings(tmp_path / "one", accumulate=2), 0))
    pretrain(settings(tmp_path / "two", devices=2))
    wanted, found = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert list(found) == list(wanted)
    bound = {"rel": 0, "abs": 0} if deterministic else {"rel": 1e-4}
    assert list(found.values()) == pytest.approx(list(wanted.values()), **bound)
