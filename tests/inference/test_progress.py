"""Lines of progress where no bar can be: rate, remaining time, nothing for short work."""

import logging
import sys

import pytest

from genemodel.inference import progress as module
from genemodel.inference.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)

    def move(seconds):
        now[0] += seconds

    return move


def test_lines_with_rate_and_remaining_time(clock, caplog):
    caplog.set_level(logging.INFO)
    with Progress("embed", 10_000, done=2_000) as progress:
        clock(100)  # compiling says nothing about the cells to come
        progress.add(1000)
        for _ in range(6):
            clock(20)
            progress.add(1000)
        clock(20)
        progress.add(1000)
    assert [record.getMessage() for record in caplog.records] == [
        "embed: 4,000 of 10,000 cells (40 %), 50 cells/s, 2 min 00 s left.",
        "embed: 6,000 of 10,000 cells (60 %), 50 cells/s, 1 min 20 s left.",
        "embed: 8,000 of 10,000 cells (80 %), 50 cells/s, 40 s left.",
        "embed: 8,000 cells in 4 min 00 s (33 cells/s).",
    ]


def test_short_work_says_only_its_end_and_failed_work_not_even_that(clock, caplog):
    caplog.set_level(logging.INFO)
    with Progress("embed", 30) as progress:
        for _ in range(3):
            clock(1)
            progress.add(10)
    with pytest.raises(ZeroDivisionError), Progress("embed", 30) as progress:
        progress.add(10)
        raise ZeroDivisionError
    with Progress("embed", 30, done=30):  # all was there
        pass
    assert [record.getMessage() for record in caplog.records] == [
        "embed: 30 cells in 3.0 s (10 cells/s)."
    ]


def test_a_bar_where_somebody_looks_on(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("embed", 30, done=10) as progress:
        progress.add(20)
        assert progress._bar.n == 30
    assert "embed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.7, "1 min 00 s"),
        (3599.6, "1 h 00 min"), (7500, "2 h 05 min"),
    ],
)  # fmt: skip
def test_durations_read_as_people_write_them(seconds, text):
    assert duration(seconds) == text
