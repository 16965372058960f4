"""A whole small run: it learns, stops when asked, refuses other settings, and releases a bundle."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from genemodel.batches.loader import CellStream
from genemodel.batches.order import Position
from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import Bundle
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.model.settings import ModelSettings
from genemodel.settings import parse
from genemodel.train.checkpoint import newest_checkpoint
from genemodel.train.optim import build_optimisers, lr_share, parameter_groups
from genemodel.train.processes import OUT_OF_TIME, Unfinished
from genemodel.train.recipe import pretrain
from genemodel.train.settings import OptimSettings, PretrainSettings
from genemodel.train.wandb_log import start_wandb, without_secrets


def settings(corpus, out, **trainer):
    return parse(
        PretrainSettings,
        {
            "corpus": str(corpus),
            "out": str(out),
            "tokens": {"context": 128, "budget": 1024},
            "model": {"layers": 1, "width": 32, "heads": 2, "ffn": 32},
            "optim": {"lr": 3e-3, "warmup_steps": 5},
            "trainer": {
                "max_steps": 60,
                "accelerator": "cpu",
                "validate_every": 20,
                "validation_batches": 4,
                "checkpoint_every": 50,
                **trainer,
            },
        },
    )


@pytest.fixture(scope="module")
def finished(tiny_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    bundle = pretrain(settings(tiny_corpus, out))
    return out, bundle


def rows(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_it_learns_and_writes_what_was_promised(finished):
    out, bundle = finished
    validation = rows(out / "validation.csv")
    assert [row["step"] for row in validation] == [20, 40, 60]
    assert validation[-1]["val/total"] < validation[0]["val/total"]
    for name in ("masked_gene", "masked_value", "decode_counts"):
        assert validation[-1][f"val/{name}"] < validation[-1][f"val_trivial/{name}"]
    metrics = rows(out / "metrics.csv")
    assert [row["step"] for row in metrics] == [10, 20, 30, 40, 50, 60]
    for name in ("cells_per_s", "tokens_per_s", "fill", "data_wait", "lr", "grad_norm"):
        assert all(np.isfinite(row[name]) for row in metrics), name
    assert all(0.5 < row["fill"] <= 1 for row in metrics)
    assert json.loads((out / "settings.json").read_text())["model"]["width"] == 32
    loaded = Bundle.load(bundle)
    assert loaded.provenance["steps"] in (20, 40, 60)
    looks = [row for row in validation if row["step"] <= loaded.provenance["steps"]]
    assert loaded.history.to_dict("records") == looks
    assert {k.split(".")[0] for k in loaded.heads} == {
        "masked_gene", "masked_value", "decode_counts",
    }  # fmt: skip


def test_a_complete_run_is_left_alone_and_a_changed_one_refused(finished, tiny_corpus, caplog):
    out, bundle = finished
    before = (out / "metrics.csv").read_bytes()
    with caplog.at_level("INFO"):
        assert pretrain(settings(tiny_corpus, out)) == bundle
    assert "is complete" in caplog.text
    assert (out / "metrics.csv").read_bytes() == before
    changed = settings(tiny_corpus, out)
    changed = dataclasses.replace(changed, optim=dataclasses.replace(changed.optim, lr=1e-4))
    with pytest.raises(ConfigError, match=r"optim\.lr.*0\.003.*0\.0001") as refusal:
        pretrain(changed)
    assert "choose another out=" in str(refusal.value)


def test_a_damaged_checkpoint_is_passed_over(finished, caplog):
    out, _ = finished
    found = newest_checkpoint(out / "checkpoints")
    assert found is not None and found.step == 60
    state = found.path / "state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    original = state.read_bytes()
    state.write_bytes(data)
    older = newest_checkpoint(out / "checkpoints")
    assert older is not None and older.step == 50
    assert "state.pt is damaged" in caplog.text
    (older.path / "COMPLETE.json").rename(older.path / "aside")
    assert newest_checkpoint(out / "checkpoints") is None
    (older.path / "aside").rename(older.path / "COMPLETE.json")
    state.write_bytes(original)


@pytest.mark.slow
def test_a_signal_saves_at_a_step_and_the_exit_code_says_so(tiny_corpus, tmp_path):
    """What the keyboard sends; those of schedulers are sent by `test_faults.py`."""
    number = signal.SIGINT
    command = [
        sys.executable, "-m", "genemodel", "pretrain", "model=tiny", f"corpus={tiny_corpus}",
        f"out={tmp_path / 'run'}", "model.layers=1", "model.width=16", "model.heads=2",
        "model.ffn=16", "tokens.context=64", "tokens.budget=512", "trainer.accelerator=cpu",
        "trainer.max_steps=100000", "trainer.log_every=1", "trainer.validate_every=100000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "goes on from there" in output and "Traceback" not in output
    saved = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step == int(rows(metrics)[-1]["step"])


def test_early_stopping_ends_a_run_that_does_not_improve(tiny_corpus, tmp_path):
    patient = settings(
        tiny_corpus, tmp_path / "run", validate_every=2, early_stopping=2, max_steps=1000
    )
    patient = dataclasses.replace(
        patient, optim=dataclasses.replace(patient.optim, lr=1e-12, weight_decay=0.0)
    )
    pretrain(patient)
    validation = rows(tmp_path / "run" / "validation.csv")
    assert 3 <= len(validation) < 20


def test_the_saved_state_knows_the_look_at_its_step(tiny_corpus, tmp_path, caplog):
    out = tmp_path / "run"

    def saved():
        found = newest_checkpoint(out / "checkpoints")
        progress = found.state()["progress"]
        return found.step, progress["best"], progress["since_best"]

    often = {"validate_every": 2, "checkpoint_every": 2, "validation_batches": 1}
    # Whoever stops a run may not wait for a look.
    with caplog.at_level("INFO"), pytest.raises(Unfinished) as stopped:
        pretrain(settings(tiny_corpus, out, max_steps=6, max_minutes=1e-9, **often))
    assert stopped.value.code == OUT_OF_TIME
    assert "Stopped by max_minutes after step 1 of 6, saved; the schedule is not" in caplog.text
    assert not (out / "validation.csv").exists() and not (out / "bundle").exists()
    assert saved() == (1, float("inf"), 0)
    bundle = Bundle.load(pretrain(settings(tiny_corpus, out, max_steps=6, **often)), device="cpu")
    totals = [float(row["val/total"]) for row in rows(out / "validation.csv")]
    assert len(totals) == 3
    assert bundle.provenance["validation"]["val/total"] == pytest.approx(min(totals))
    step, best, _ = saved()
    assert step == 6 and best == min(totals)


def test_the_schedule_can_be_told_minutes(tiny_corpus, tmp_path, caplog):
    caplog.set_level("INFO", logger="genemodel")
    timed = settings(tiny_corpus, tmp_path / "run", max_steps=100_000, log_every=1)
    timed = dataclasses.replace(
        timed, optim=dataclasses.replace(timed.optim, warmup_steps=1, horizon_minutes=0.1)
    )
    pretrain(timed)  # ends by itself, and its schedule with it
    last = rows(tmp_path / "run" / "metrics.csv")[-1]
    assert last["lr"] < 0.5 * timed.optim.lr
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.about["ended"] == "horizon" and found.step < 100_000
    assert (tmp_path / "run" / "bundle" / "model.json").exists()
    told = re.findall(r"step 2/100,000 .*  (\d+)m(\d\d)s left of the time allowed", caplog.text)
    assert told and int(told[0][0]) == 0 and int(told[0][1]) <= 6


@pytest.mark.parametrize(
    ("group", "values", "said"),
    [
        ("seed", -1, "seed is -1"),
        ("optim", {"beta1": 1.0}, "optim.beta1 is 1.0"),
        ("optim", {"eps": 0.0}, "optim.eps is 0.0"),
        ("optim", {"weight_decay": -1.0}, "optim.weight_decay is -1.0"),
        ("optim", {"clip": -1.0}, "optim.clip is -1.0"),
        ("trainer", {"max_minutes": -1.0}, "trainer.max_minutes is -1.0"),
        ("trainer", {"early_stopping": -1}, "trainer.early_stopping is -1"),
        ("holdout", {"fraction": 1.0}, "holdout.fraction is 1.0"),
        ("model", {"heads": 0}, "model.heads is 0"),
        ("model", {"norm_eps": 0.0}, "model.norm_eps is 0.0"),
    ],
)
def test_impossible_numbers_are_refused_by_name(group, values, said):
    with pytest.raises(ConfigError, match=said):
        parse(PretrainSettings, {"corpus": "c", "out": "o", group: values})


@pytest.mark.parametrize("name", ["manifest.json", "bundle.json", "finetune.json"])
def test_a_folder_of_something_else_is_refused_before_work(tiny_corpus, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"it holds {name}"):
        pretrain(settings(tiny_corpus, tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        pretrain(settings(tiny_corpus, tmp_path / name))
    with pytest.raises(ConfigError, match="no folder that you may write in"):
        pretrain(settings(tiny_corpus, tmp_path / name / "run"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_held_out_is_said(tiny_corpus, tmp_path, caplog):
    short = settings(tiny_corpus, tmp_path / "run", max_steps=1)
    short = dataclasses.replace(short, holdout=dataclasses.replace(short.holdout, by=""))
    with caplog.at_level("WARNING"):
        pretrain(short)
    assert "Nothing is held out" in caplog.text


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny_corpus, tmp_path):
    bad = settings(tiny_corpus, tmp_path / "run")
    bad = dataclasses.replace(bad, optim=dataclasses.replace(bad.optim, lr=1e12, clip=0.0))
    with pytest.raises(ValueError, match="not finite at step") as refusal:
        pretrain(bad)
    assert "optim.lr" in str(refusal.value)


def test_the_sequence_of_batches_does_not_depend_on_world_size(tiny_corpus):
    corpus = Corpus.open(tiny_corpus)
    inverse = np.ones(len(corpus.vocabulary), np.float32)

    def cells(rank, world, position=None):
        stream = CellStream(
            corpus, np.arange(len(corpus)), TokenSettings(64, 512), seed=3,
            inverse_median_V=inverse, rank=rank, world_size=world, position=position,
            endless=False,
        )  # fmt: skip
        return [(b.cell_C[: b.n_cells].tolist(), p) for b, p in stream]

    alone = cells(0, 1)
    assert sorted(c for batch, _ in alone for c in batch) == list(range(len(corpus)))
    for world in (2, 3):
        ranks = [cells(r, world) for r in range(world)]
        for i, (batch, _) in enumerate(alone):
            got, after = ranks[i % world][i // world]
            assert got == batch
            # Every rank of a round is told the end of the round.
            assert after == alone[min(i // world * world + world, len(alone)) - 1][1]
    # Restart anywhere: the rest is the rest.
    for k in (1, 5, len(alone) - 1):
        assert cells(0, 1, alone[k - 1][1]) == alone[k:]
    assert alone[-1][1] == Position(taken=len(alone), lanes=((1, 0, 0),))


def test_batches_hold_the_corpus_counts(tiny_corpus):
    corpus = Corpus.open(tiny_corpus)
    stream = CellStream(
        corpus, np.arange(0, len(corpus), 3), TokenSettings(64, 512), seed=0,
        inverse_median_V=np.ones(len(corpus.vocabulary), np.float32), endless=False,
    )  # fmt: skip
    seen = 0
    for batch, _ in stream:
        for place in range(batch.n_cells):
            cell = int(batch.cell_C[place])
            block = corpus.read(cell, cell + 1)
            mine = batch.full_cell_N == place
            assert torch.equal(batch.full_gene_N[mine], torch.from_numpy(block.gene_N).long())
            assert np.array_equal(batch.full_count_N[mine].numpy(), block.count_N)
            assert float(batch.library_C[place]) == block.count_N.sum()
            seen += 1
    assert seen == len(range(0, len(corpus), 3))


def test_every_parameter_is_in_one_group_and_muon_takes_the_block_matrices():
    from genemodel.model.gene_model import GeneModel

    model = torch.nn.ModuleDict(
        {"model": GeneModel(ModelSettings(), n_tokens=50, n_species=2, context=16)}
    )
    groups = parameter_groups(model)
    ids = [id(p) for group in groups.values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert len(groups["matrices"]) == 2 * 4
    adamw, muon = build_optimisers(model, OptimSettings(name="muon"))
    assert {id(p) for g in muon.param_groups for p in g["params"]} == {
        id(p) for p in groups["matrices"]
    }
    assert not {id(p) for g in adamw.param_groups for p in g["params"]} & {
        id(p) for p in groups["matrices"]
    }


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_warms_up_and_decays(schedule):
    optim = OptimSettings(schedule=schedule, warmup_steps=10, final_lr=0.1, decay_fraction=0.2)
    share = [lr_share(s, 100, optim) for s in range(101)]
    assert share[0] == pytest.approx(0.1) and share[9] == 1.0
    assert share[100] == pytest.approx(0.1)
    assert all(a >= b - 1e-12 for a, b in zip(share[10:], share[11:], strict=False))
    if schedule == "wsd":
        assert share[79] == 1.0 and share[90] < 0.6


def all_bytes(folder):
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_wandb_offline_leaks_neither_secrets_nor_paths(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from genemodel.train.settings import LogSettings

    monkeypatch.setattr(sys, "argv", ["genemodel", "--api_key=verysecret123"])
    values = {
        "corpus": "/home/somebody/private/corpus",
        "tokens": {"context": 5},
        "hf_token": "verysecret123",
    }
    assert without_secrets(values) == {
        "corpus": "corpus", "tokens": {"context": 5}, "hf_token": "(left out)",
    }  # fmt: skip
    run = start_wandb(tmp_path, LogSettings(kind="wandb"), values)
    run.log({"loss": 1.0}, step=1)
    run.finish()
    # wandb's service process may flush the last records a moment after `finish` has returned.
    deadline = time.monotonic() + 30
    while b"loss" not in (written := all_bytes(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"loss" in written
    assert b"verysecret123" not in written and b"somebody" not in written


def test_an_empty_side_of_the_split_is_refused(tiny_corpus, tmp_path):
    bad = settings(tiny_corpus, tmp_path / "run")
    holdout = dataclasses.replace(bad.holdout, groups=("no such donor",))
    with pytest.raises((ConfigError, DataError), match="no such donor"):
        pretrain(dataclasses.replace(bad, holdout=holdout))
