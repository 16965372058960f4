"""What counts as a bad step: against the definition, and only once enough has been seen."""

import math

import pytest

from genemodel.train.guard import LARGEST, NEEDED, REMEMBERED, Guard


def filled(deviations=6.0, n=NEEDED):
    guard = Guard(deviations)
    for i in range(n):
        assert guard.judge({"a": 2.0}, 1.0, 2.0 + 0.1 * (-1) ** i) == ""
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, LARGEST])
def test_what_is_not_finite_is_named_and_not_remembered(bad):
    guard = filled()
    assert guard.judge({"a": 1.0, "b": bad}, 1.0, bad) == "b not finite"
    assert guard.judge({"a": 1.0}, bad, 1.0) == "gradient norm not finite"
    assert len(guard.recent) == NEEDED and all(map(math.isfinite, guard.recent))


def test_a_jump_moves_the_median_only_where_it_was_let_through():
    guard = filled()
    for _ in range(5):
        assert guard.judge({}, 1.0, 50.0)
    assert max(guard.recent) < 3
    for _ in range(2 * NEEDED):
        guard.accept(50.0)
    assert guard.judge({}, 1.0, 50.0) == ""


def test_the_state_is_all_that_is_remembered():
    guard, other = filled(n=REMEMBERED + 7), Guard(6.0)
    other.load(guard.state())
    assert len(other.recent) == REMEMBERED
    for loss in (2.05, 9.0, 2.0):
        assert other.judge({}, 1.0, loss) == guard.judge({}, 1.0, loss)
    assert other.state() == guard.state()
