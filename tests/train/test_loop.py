"""A step against its definition: gradient, clip, dropout's address, means, what a stop keeps."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from genemodel.batches.order import Position
from genemodel.settings import parse
from genemodel.train.checkpoint import newest_checkpoint
from genemodel.train.loop import Loop, Progress
from genemodel.train.losses import Losses
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings


def settings(corpus, out, *, optim=None, dropout=0.0, **trainer):
    return parse(
        PretrainSettings,
        {
            "corpus": str(corpus), "out": str(out),
            "tokens": {"context": 64, "budget": 512},
            "task": {"masked_value": {"weight": 3.0}},
            "model": {
                "layers": 1, "width": 16, "heads": 2, "ffn": 16, "components": 4,
                "dropout": dropout,
            },
            "optim": {"lr": 3e-3, "warmup_steps": 1, **(optim or {})},
            "trainer": {
                "max_steps": 3, "accelerator": "cpu", "validation_batches": 3, "log_every": 1,
                **trainer,
            },
        },
    )  # fmt: skip


def test_the_gradient_of_a_step_is_that_of_all_its_micro_batches(
    tiny_corpus, tmp_path, monkeypatch
):
    gradient_itself, steps = Loop._gradient, []

    def gradient(loop, micro_batches, signals, *, trivial):
        losses = loop.losses
        prepared = [losses.objectives.prepare(b) for pieces in micro_batches for b in pieces]
        weight_K = torch.tensor(list(losses.objectives.weights.values()))
        items_K = sum(torch.stack([p.items[name] for name in losses.names]) for p in prepared)
        total = sum((losses(p, False)[0] * weight_K / items_K).sum() for p in prepared)
        learning = loop.exchange.learning()
        wanted = torch.autograd.grad(total, learning, allow_unused=True)
        found = gradient_itself(loop, micro_batches, signals, trivial=trivial)
        assert len(prepared) == 2 and weight_K.unique().numel() > 1
        for p, grad in zip(learning, wanted, strict=True):
            if grad is not None:
                torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
        total = float(total.detach())
        assert found[0].total(losses.objectives.weights) == pytest.approx(total, rel=1e-4)
        steps.append(total)
        return found

    monkeypatch.setattr(Loop, "_gradient", gradient)
    pretrain(settings(tiny_corpus, tmp_path / "run", accumulate=2, optim={"clip": 0.0}))
    assert len(steps) == 3


def test_the_gradient_is_clipped_and_its_norm_said_before(tiny_corpus, tmp_path, monkeypatch):
    apply_itself, norms = Loop._apply, []

    def apply(loop, report, *args):
        grads = [p.grad for p in loop.exchange.learning() if p.grad is not None]
        norms.append((report.norm, float(torch.cat([g.flatten() for g in grads]).norm())))
        return apply_itself(loop, report, *args)

    monkeypatch.setattr(Loop, "_apply", apply)
    pretrain(settings(tiny_corpus, tmp_path / "run", optim={"clip": 0.01}))
    assert len(norms) == 3
    for said, left in norms:
        assert said > 0.02 and left == pytest.approx(0.01, rel=1e-3)


def test_dropout_of_every_micro_batch_has_an_address_of_its_own(tiny_corpus, tmp_path, monkeypatch):
    forward_itself = Losses.forward
    seeds = []

    def forward(losses, prepared, trivial):
        if torch.is_grad_enabled() and losses.training:
            seeds.append(torch.initial_seed())
        return forward_itself(losses, prepared, trivial)

    monkeypatch.setattr(Losses, "forward", forward)
    pretrain(settings(tiny_corpus, tmp_path / "two", accumulate=2, dropout=0.1))
    two = seeds.copy()
    assert len(set(two)) == 6
    seeds.clear()
    # The address is the micro-batch's number and the seed, not the step.
    pretrain(settings(tiny_corpus, tmp_path / "one", max_steps=6, dropout=0.1))
    assert seeds == two


def test_held_out_losses_are_sums_over_all_micro_batches_by_all_items(
    tiny_corpus, tmp_path, monkeypatch
):
    look_itself, forward_itself, seen = Loop.look, Losses.forward, []

    def forward(losses, prepared, trivial):
        found = forward_itself(losses, prepared, trivial)
        if not torch.is_grad_enabled():
            items_K = torch.stack([prepared.items[name] for name in losses.names])
            seen.append(torch.stack([found[0], found[1], items_K.float()]).double())
        return found

    def look(loop):
        seen.clear()
        look_itself(loop)
        loss_K, trivial_K, items_K = torch.stack(seen).sum(0)
        names, weights = loop.losses.names, loop.losses.objectives.weights
        said = loop.progress.validation
        assert len(seen) == 3 and len(names) == 3
        for k, name in enumerate(names):
            assert said[f"val/{name}"] == pytest.approx(float(loss_K[k] / items_K[k]))
            assert said[f"val_trivial/{name}"] == pytest.approx(float(trivial_K[k] / items_K[k]))
        whole = sum(weights[name] * said[f"val/{name}"] for name in names)
        assert said["val/total"] == pytest.approx(whole)

    monkeypatch.setattr(Losses, "forward", forward)
    monkeypatch.setattr(Loop, "look", look)
    pretrain(settings(tiny_corpus, tmp_path / "run", validate_every=2))
    assert seen


def test_a_run_that_goes_on_knows_all_that_it_knew(tiny_corpus, tmp_path, monkeypatch):
    after_itself, restore_itself = Loop._after_step, Loop.restore
    known, restored = [], []

    def stop(loop, report):
        after_itself(loop, report)
        if loop.progress.step == 2:
            known.append((asdict(loop.progress), loop.guard.state(), states(loop)))
            raise KeyboardInterrupt

    def states(loop):
        return [
            value.clone()
            for optimiser in loop.optimisers
            for state in optimiser.state_dict()["state"].values()
            for value in state.values()
        ]

    def restore(loop, checkpoint):
        restore_itself(loop, checkpoint)
        restored.append((asdict(loop.progress), loop.guard.state(), states(loop)))

    run = settings(tiny_corpus, tmp_path / "run", max_steps=4, validate_every=1, checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_after_step", stop)
        pretrain(run)
    monkeypatch.setattr(Loop, "restore", restore)
    pretrain(run)
    (progress, guard, moments), (again, guard_again, moments_again) = known[0], restored[0]
    assert again == progress and guard_again == guard and guard["recent"]
    assert again["best"] < float("inf") and again["position"]["taken"] == 2
    assert len(moments) == len(moments_again) > 0
    assert all(torch.equal(a, b) for a, b in zip(moments, moments_again, strict=True))


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_a_step_that_is_not_finite_is_left_out(tiny_corpus, tmp_path, monkeypatch, policy):
    forward_itself, apply_itself = Losses.forward, Loop._apply
    calls, seen = [], []

    def forward(losses, prepared, trivial):
        total_K, trivial_K = forward_itself(losses, prepared, trivial)
        if torch.is_grad_enabled() and trivial is not None:
            calls.append(1)
            if len(calls) == 3:
                total_K = total_K * float("nan")
        return total_K, trivial_K

    def apply(loop, report, batches, totals, position):
        before = {k: v.clone() for k, v in loop.losses.state_dict().items()}
        found = apply_itself(loop, report, batches, totals, position)
        after = loop.losses.state_dict()
        same = all(torch.equal(before[k], after[k]) for k in before)
        seen.append((found, same, loop.progress.step, loop.progress.position.taken))
        return found

    monkeypatch.setattr(Losses, "forward", forward)
    monkeypatch.setattr(Loop, "_apply", apply)
    pretrain(
        settings(
            tiny_corpus, tmp_path / "run", on_nonfinite=policy, max_steps=4, checkpoint_every=1
        )
    )
    # Going back to the checkpoint of step 2 changes nothing either, but does the step again.
    third = {"skip": (False, True, 3, 3), "roll_back": (None, True, 2, 3)}[policy]
    assert seen[:3] == [(True, False, 1, 1), (True, False, 2, 2), third]
    assert seen[3:] == {
        "skip": [(True, False, 4, 4)], "roll_back": [(True, False, 3, 4), (True, False, 4, 5)]
    }[policy]  # fmt: skip
    end = newest_checkpoint(tmp_path / "run" / "checkpoints").state()["progress"]
    assert end["skipped"] == 1
    assert all(torch.isfinite(v).all() for v in _weights(tmp_path / "run"))


def _weights(run):
    return newest_checkpoint(run / "checkpoints").state()["module"].values()


def test_looks_without_improvement_are_counted_since_the_best():
    ended, released = [], []
    loop = SimpleNamespace(
        progress=Progress(position=Position()),
        settings=SimpleNamespace(early_stopping=2, early_stopping_gain=0.0, max_steps=100),
        record=SimpleNamespace(look=lambda *_: None),
        losses=SimpleNamespace(names=[]),
        release=lambda: released.append(loop.progress.best),
    )
    for total in (3.0, 2.0, 2.5, 1.0, 1.0, 1.5):
        loop.progress.validation = {"val/total": total}
        Loop._judge_look(loop)
        ended.append(loop.progress.ended)
    assert ended == ["", "", "", "", "", "early"]
    assert released == [3.0, 2.0, 1.0] and loop.progress.since_best == 2
