"""A run goes on with any number of processes that has as many micro-batches a step."""

import copy

import pytest

from genemodel.errors import ConfigError
from genemodel.train.checkpoint import newest_checkpoint
from genemodel.train.recipe import find_checkpoint


@pytest.fixture
def run(small_start):
    return small_start / "run"


def about(run, processes, accumulate):
    found = copy.deepcopy(newest_checkpoint(run / "checkpoints").about)
    found["settings"]["trainer"]["accumulate"] = accumulate
    found["settings"]["trainer"]["devices"] = processes
    found["micro_batches"] = processes * accumulate
    return found


def begun_with(monkeypatch, run, micro_batches):
    from genemodel.train import recipe

    checkpoint = newest_checkpoint(run / "checkpoints")
    checkpoint.about["micro_batches"] = micro_batches
    monkeypatch.setattr(recipe, "checkpoint_of", lambda folder: checkpoint)


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_the_same_product_goes_on(monkeypatch, run, processes, accumulate):
    begun_with(monkeypatch, run, 4)
    assert find_checkpoint(run, about(run, processes, accumulate)) is not None


@pytest.mark.parametrize(
    ("before", "processes", "accumulate", "said"),
    [
        (2, 3, 1, "has 2 micro-batches, now 1 × 3 = 3; 3 processes cannot share 2"),
        (4, 3, 1, "but 1 with 4 micro-batches each, 2 with 2 micro-batches each, 4 with"),
        (
            4,
            2,
            1,
            "now 1 × 2 = 2; 2 processes need 2 each (pretrain, finetune: trainer.accumulate=2)",
        ),
        (64, 48, 2, "32 with 2 micro-batches each, 64 with 1 micro-batches each can"),
    ],
)
def test_another_product_is_refused_with_the_way_out(
    monkeypatch, run, before, processes, accumulate, said
):
    begun_with(monkeypatch, run, before)
    with pytest.raises(ConfigError) as refused:
        find_checkpoint(run, about(run, processes, accumulate))
    assert said in str(refused.value)


def test_another_order_of_cells_is_refused(run):
    changed = {**about(run, 1, 1), "order": -1}
    with pytest.raises(ConfigError, match="another version of genemodel.*start="):
        find_checkpoint(run, changed)
