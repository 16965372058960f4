"""Micro-batches in pieces: the same cells, masks and losses, agreed on by all ranks."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from genemodel.batches.loader import CellStream
from genemodel.batches.packing import deal
from genemodel.batches.tokens import TokenSettings
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError
from genemodel.model.devices import is_out_of_memory
from genemodel.settings import parse, to_values
from genemodel.train import memory
from genemodel.train.checkpoint import newest_checkpoint
from genemodel.train.data import RankStream
from genemodel.train.loop import TrainingStopped
from genemodel.train.losses import Losses
from genemodel.train.memory import pieces_that_fit
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings
from genemodel.train.weights import build

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def settings(corpus, out, *, dropout=0.0, **trainer):
    return parse(
        PretrainSettings,
        {
            "corpus": str(corpus),
            "out": str(out),
            "tokens": {"context": 64, "budget": 512},
            "model": {
                "layers": 2, "width": 16, "heads": 2, "ffn": 16, "components": 4,
                "dropout": dropout,
            },
            "optim": {"lr": 3e-3, "warmup_steps": 1},
            "trainer": {
                "max_steps": 4, "validate_every": 2, "validation_batches": 3, "log_every": 1,
                "checkpoint_every": 2, "accelerator": "cpu", **trainer,
            },
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(small_start):
    return small_start / "corpus"


@pytest.fixture
def probed(monkeypatch):
    """Let the CPU be probed as a GPU is."""
    monkeypatch.setattr(memory, "PROBED", ("cuda", "cpu"))


@pytest.fixture
def tokens_allowed(monkeypatch):
    """``tokens_allowed(n)``: a device that is full with more than n tokens at once."""
    forward = Losses.forward

    def limit(n):
        def limited(self, prepared, trivial):
            if prepared.seen.gene_T.shape[0] > n:
                raise FULL
            return forward(self, prepared, trivial)

        monkeypatch.setattr(Losses, "forward", limited)

    return limit


def numbers(out):
    """All losses of a run, shown and held out."""
    found = {}
    for name in ("metrics.csv", "validation.csv"):
        with (out / name).open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key.startswith(("train/", "trivial/", "val", "grad")):
                        found[name, row["step"], key] = float(value)
    return found


@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
def test_pieces_are_alike_in_cells_and_in_tokens(pieces):
    rng = np.random.default_rng(0)
    for n in (1, 5, 50, 51, 400):
        length_C = rng.lognormal(5, 1, n).clip(2, 2048).astype(int)
        dealt = deal(length_C, pieces)
        assert sorted(np.concatenate(dealt).tolist()) == list(range(n))
        sizes = [piece.size for piece in dealt]
        assert max(sizes) - min(sizes) <= 1
        most = max(length_C[piece].sum() for piece in dealt)
        assert most <= length_C.sum() / pieces + length_C.max()


def test_a_piece_holds_whatever_a_full_bin_deals_it():
    settings = TokenSettings(2048, 65_536).placed(300.0)
    for pieces in (2, 4, settings.most_pieces):
        piece = settings.piece(pieces)
        assert piece.budget < 65_536 and piece.max_cells * pieces >= settings.max_cells
        length_C = np.full(32, 2048)
        assert max(length_C[p].sum() for p in deal(length_C, pieces)) <= piece.budget
    assert settings.piece(1) == settings


def streams(corpus, pieces, **options):
    opened = Corpus.open(corpus)
    stream = CellStream(
        opened, np.arange(len(opened)), TokenSettings(64, 512), seed=0, pieces=pieces,
        inverse_median_V=np.ones(len(opened.vocabulary), np.float32), **options,
    )  # fmt: skip
    return RankStream(stream, torch.device("cpu"))


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_pieces_hold_the_cells_of_their_micro_batch(corpus, pieces):
    shapes = set()
    for (whole, position), (parts, after) in zip(
        streams(corpus, 1, endless=False), streams(corpus, pieces, endless=False), strict=True
    ):
        assert position == after and len(whole) == 1 and len(parts) == pieces
        assert sum(part.n_tokens for part in parts) == whole[0].n_tokens
        cells = [part.cell_C[: part.n_cells].tolist() for part in parts]
        assert sorted(sum(cells, [])) == sorted(whole[0].cell_C[: whole[0].n_cells].tolist())
        shapes |= {(part.gene_T.shape[0], part.cell_C.shape[0]) for part in parts}
    assert len(shapes) == 1 and shapes.pop()[0] == 512 // pieces + 64


def test_losses_and_gradients_of_pieces_add_up(corpus, tmp_path):
    opened = Corpus.open(corpus)
    torch.manual_seed(0)
    model, objectives = build(settings(corpus, tmp_path), opened, np.arange(len(opened)), 0)
    losses = Losses(model, objectives)

    def whole(pieces):
        sums, items = [], []
        losses.zero_grad()
        batches, _ = next(iter(streams(corpus, pieces)))
        for batch in batches:
            prepared = objectives.prepare(batch)
            total_K, trivial_K = losses(prepared, True)
            total_K.sum().backward()
            sums.append(torch.stack([total_K.detach(), trivial_K]))
            items.append([int(prepared.items[name]) for name in losses.names])
        gradient = torch.cat([p.grad.flatten() for p in losses.parameters() if p.grad is not None])
        return torch.stack(sums).sum(0), np.sum(items, 0).tolist(), gradient

    wanted, items, gradient = whole(1)
    for pieces in (2, 8):
        found, found_items, found_gradient = whole(pieces)
        assert found_items == items
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        assert (found_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_a_piece_without_a_cell_costs_nothing(corpus, tmp_path):
    opened = Corpus.open(corpus)
    model, objectives = build(settings(corpus, tmp_path), opened, np.arange(len(opened)), 0)
    stream = CellStream(
        opened, np.arange(3), TokenSettings(64, 512), seed=0, endless=False, pieces=8,
        inverse_median_V=np.ones(len(opened.vocabulary), np.float32),
    )  # fmt: skip
    ((pieces, _),) = list(RankStream(stream, torch.device("cpu")))
    assert sorted(piece.n_cells for piece in pieces) == [0] * 5 + [1] * 3
    empty = next(piece for piece in pieces if not piece.n_cells)
    total_K, trivial_K = Losses(model, objectives)(objectives.prepare(empty), True)
    assert not total_K.any() and not trivial_K.any()
    total_K.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_device_that_is_too_small_gets_smaller_pieces(
    corpus, tmp_path, probed, tokens_allowed, caplog
):
    pretrain(settings(corpus, tmp_path / "whole"))
    assert "pieces" not in caplog.text
    tokens_allowed(512 // 4 + 64)
    with caplog.at_level("WARNING"):
        pretrain(settings(corpus, tmp_path / "pieces"))
    assert "in 4 pieces" in caplog.text and "tokens.budget ÷ 4" in caplog.text
    assert "Tried to allocate 2.00 GiB" in caplog.text
    wanted, found = numbers(tmp_path / "whole"), numbers(tmp_path / "pieces")
    assert list(found) == list(wanted)
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=2e-4)


def test_the_same_run_goes_on_in_pieces_and_whole_again(
    corpus, tmp_path, probed, tokens_allowed, monkeypatch
):
    """What a device holds is no setting of the run."""
    pretrain(settings(corpus, tmp_path / "whole"))
    out = tmp_path / "run"
    for max_minutes, limit in ((1e-9, 512), (0.0, 512 // 2 + 64)):
        with monkeypatch.context():
            tokens_allowed(limit)
            try:
                pretrain(settings(corpus, out, max_minutes=max_minutes))
            except SystemExit:
                assert max_minutes
    wanted, found = numbers(tmp_path / "whole"), numbers(out)
    assert [k for k in found if k[0] == "metrics.csv"] == [
        k for k in wanted if k[0] == "metrics.csv"
    ]
    for key in found.keys() & wanted.keys():
        assert found[key] == pytest.approx(wanted[key], rel=2e-4), key


def test_what_fits_in_no_pieces_is_refused_before_training(
    corpus, tmp_path, probed, tokens_allowed
):
    tokens_allowed(100)
    with pytest.raises(ConfigError, match=r"(?s)in 8 pieces.*activation_checkpointing=true"):
        pretrain(settings(corpus, tmp_path / "run"))
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_looking_whether_it_fits_leaves_no_trace(corpus, tmp_path, monkeypatch):
    """Dropout draws from the generator, and a step's gradient is summed up: neither is touched."""
    pretrain(settings(corpus, tmp_path / "a", dropout=0.2))
    monkeypatch.setattr(memory, "PROBED", ("cuda", "cpu"))
    rehearsed = []
    monkeypatch.setattr(
        memory, "_failure",
        lambda rehearse, pieces, inner=memory._failure: rehearsed.append(inner(rehearse, pieces)),
    )  # fmt: skip
    pretrain(settings(corpus, tmp_path / "b", dropout=0.2))
    assert rehearsed == [None]
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_another_error_is_not_taken_for_a_lack_of_memory(corpus, tmp_path, probed, monkeypatch):
    def broken(self, prepared, trivial):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Losses, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pretrain(settings(corpus, tmp_path / "run"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(ValueError("out of memory"))


def test_memory_that_runs_out_later_ends_the_run_with_a_way_out(corpus, tmp_path, monkeypatch):
    forward, taken = Losses.forward, []

    def full_at_last(self, prepared, trivial):
        taken.append(torch.is_grad_enabled())
        if sum(taken) == 4:
            raise FULL
        return forward(self, prepared, trivial)

    with monkeypatch.context() as patch:
        patch.setattr(Losses, "forward", full_at_last)
        with pytest.raises(
            TrainingStopped, match=r"(?s)out of memory after step 3 .*tokens\.budget"
        ):
            pretrain(settings(corpus, tmp_path / "run"))
    saved = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 2
    # What the message says to do is allowed.
    pretrain(settings(corpus, tmp_path / "run", activation_checkpointing=True))
    pretrain(settings(corpus, tmp_path / "whole"))
    wanted, found = numbers(tmp_path / "whole"), numbers(tmp_path / "run")
    assert list(found) == list(wanted)
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-5)


class Meeting:
    """Two ranks in two threads; a sum waits for both."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=30)
        self.values = []

    def rank(self):
        return dataclasses.make_dataclass("Exchange", ["fabric", "kind", "sum_"])(
            dataclasses.make_dataclass("Fabric", ["device"])(torch.device("cpu")), "ddp", self.sum_
        )

    def sum_(self, value):
        self.values.append(value.clone())
        self.barrier.wait()
        total = torch.stack(self.values).sum()
        if self.barrier.wait() == 0:
            self.values = []
        self.barrier.wait()
        return total


def test_ranks_agree_on_the_pieces_of_the_one_that_has_least_memory(probed, caplog):
    meeting, found, tried = Meeting(), {}, {0: [], 1: []}

    def rank(number, needs):
        def rehearse(pieces):
            tried[number].append(pieces)
            if pieces < needs:
                raise FULL

        found[number] = pieces_that_fit(rehearse, meeting.rank(), most=8)

    threads = [threading.Thread(target=rank, args=pair) for pair in ((0, 1), (1, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 4, 1: 4} and tried == {0: [1, 2, 4], 1: [1, 2, 4]}
    assert "another rank has said so" in caplog.text


SHORT_OF_MEMORY = """
import functools, json, os, sys
import torch
from traced_run import in_ranks
from genemodel.settings import parse, to_values
from genemodel.train import memory
from genemodel.train.losses import Losses
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings

memory.PROBED = ("cuda", "cpu")
forward = Losses.forward

def limited(self, prepared, trivial):
    if os.environ["RANK"] == "1" and prepared.seen.gene_T.shape[0] > 512 // 2 + 64:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, prepared, trivial)

Losses.forward = limited
for values in json.loads(sys.argv[1]):
    codes = in_ranks(2, functools.partial(pretrain, parse(PretrainSettings, values)))
    assert codes == [0, 0], codes
"""


def of_two_ranks(corpus, out, deterministic):
    return settings(corpus, out, deterministic=deterministic, max_steps=3, devices=2)


@pytest.fixture(scope="module")
def short_of_memory(corpus, tmp_path_factory):
    """Folders of two runs of two ranks each, of which one is full: deterministic, and not.

    Both by one process that has imported everything, which takes longer than they train.
    """
    folder = tmp_path_factory.mktemp("short")
    found = {deterministic: folder / f"{deterministic}" for deterministic in (False, True)}
    given = [to_values(of_two_ranks(corpus, out, which)) for which, out in found.items()]
    here = Path(__file__).resolve()
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, json.dumps(given)],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here.parent)]),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_ranks_of_which_one_is_full_train_like_one_that_is_not(
    corpus, short_of_memory, tmp_path, deterministic
):
    out = short_of_memory[deterministic]
    both = of_two_ranks(corpus, out, deterministic)
    trainer = dataclasses.replace(both.trainer, accumulate=2, devices=1)
    pretrain(dataclasses.replace(both, out=str(tmp_path), trainer=trainer))
    wanted, found = numbers(tmp_path), numbers(out)
    assert list(found) == list(wanted)
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=2e-4)
