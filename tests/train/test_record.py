"""Tables of a run: whole rows only, and the same ones whatever interrupted it."""

import csv

import pytest

from genemodel.train.record import METRICS, VALIDATION, Record, append_row, keep_rows_up_to
from genemodel.train.settings import LogSettings, TrainerSettings
from genemodel.writing import DiskFull


def rows(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def table(path, steps):
    for step in steps:
        append_row(path, {"step": float(step), "loss": step / 3})
    return path.read_text()


def test_rows_that_will_come_again_are_dropped(tmp_path):
    path = tmp_path / "t.csv"
    table(path, range(1, 4))
    three = path.read_text()
    table(path, (4, 5))
    keep_rows_up_to(path, 3)
    assert path.read_text() == three
    keep_rows_up_to(path, 3)
    assert path.read_text() == three
    table(path, [4])
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]
    keep_rows_up_to(tmp_path / "absent.csv", 3)


@pytest.mark.parametrize("left", range(1, 12))
def test_a_row_cut_off_by_a_kill_goes(tmp_path, left):
    path = tmp_path / "t.csv"
    text = table(path, (1, 2, 11))
    # Cut in the middle of "11.0", the last row would be one of step 1.
    path.write_text(text[:-left])
    keep_rows_up_to(path, 5)
    assert [row["step"] for row in rows(path)] == [1, 2]
    table(path, [3])
    assert [row["step"] for row in rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "st", "step,loss\n", "step,loss\n1."])
def test_a_table_without_a_row_begins_anew(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    keep_rows_up_to(path, 5)
    table(path, [6])
    assert rows(path) == [{"step": 6.0, "loss": 2.0}]


def test_a_full_disk_leaves_the_rows_that_were_there(small_disk):
    path = small_disk / "t.csv"
    text = table(path, [1])
    with (
        (small_disk / "ballast").open("wb", buffering=0) as file,
        pytest.raises(OSError, match="sp"),
    ):
        while True:
            file.write(bytes(4096))
    added = 1
    with pytest.raises(DiskFull, match=r"t\.csv cannot be written: the disk is full"):
        for step in range(2, 1000):  # what is left of the last page
            before = path.read_text()
            append_row(path, {"step": float(step), "loss": step / 3})
            added += 1
    assert path.read_text() == before and before.startswith(text)
    assert [row["step"] for row in rows(path)] == list(range(1, added + 1))
    (small_disk / "ballast").unlink()
    append_row(path, {"step": added + 1.0, "loss": 1.0})
    assert [row["step"] for row in rows(path)] == list(range(1, added + 2))


def record(run, log_every=4):
    return Record(
        run, TrainerSettings(max_steps=12, log_every=log_every), LogSettings(), values={}, rank=0,
        world=1, peak=None,
    )  # fmt: skip


def noted(kept, steps):
    for step in steps:
        kept.step(
            step, losses={"a": 1.0 / step}, trivial={}, lr=0.1, norm=float(step), cells=step,
            tokens=10 * step, fill=0.5 + step / 100, forward_flops=1, waited_s=0.0,
            minutes_left=None,
        )  # fmt: skip


@pytest.mark.parametrize("cut", [2, 4, 5, 7, 11])
def test_a_mean_over_steps_of_two_sessions_is_the_same(tmp_path, cut):
    timed = {"cells_per_s", "tokens_per_s", "data_wait", "seconds", "mfu"}
    tables = []
    for name in ("whole", "parts"):
        run = tmp_path / name
        run.mkdir()
        first = record(run)
        first.start(0)
        noted(first, range(1, (13 if name == "whole" else cut + 2)))
        if name == "parts":
            # Saved after the step `cut`, and killed after one more.
            saved = record(tmp_path / "aside")
            saved.active = False
            noted(saved, range(1, cut + 1))
            second = record(run)
            second.load(saved.state())
            second.start(cut)
            noted(second, range(cut + 1, 13))
        tables.append([{k: v for k, v in r.items() if k not in timed} for r in rows(run / METRICS)])
        assert not (run / VALIDATION).exists()
    assert tables[0] == tables[1] and len(tables[0]) == 3


def test_losses_stand_beside_the_trivial_predictor_and_silent_ones_nowhere(tmp_path, caplog):
    kept = Record(
        tmp_path, TrainerSettings(max_steps=4, log_every=1), LogSettings(), values={}, rank=0,
        world=1, peak=None, silent=("raw",),
    )  # fmt: skip
    kept.start(0)
    with caplog.at_level("INFO", logger="genemodel"):
        kept.step(
            1, losses={"raw": -1895.0, "nats": 3.25}, trivial={"raw": -1800.0, "nats": 4.5}, lr=0.1,
            norm=1.0, cells=1, tokens=1, fill=1.0, forward_flops=1, waited_s=0.0, minutes_left=None,
        )  # fmt: skip
        kept.look(
            1,
            {"val/raw": -1.0, "val_trivial/raw": -1.0, "val/nats": 3.0, "val_trivial/nats": 4.0},
            ["raw", "nats"],
        )
    assert "nats 3.250 (trivial 4.500)" in caplog.text
    assert "ratio 0.750" in caplog.text and "raw" not in caplog.text
    for name in (METRICS, VALIDATION):
        (row,) = rows(tmp_path / name)
        assert not [column for column in row if "raw" in column]
    assert row == {"step": 1.0, "val/nats": 3.0, "val_trivial/nats": 4.0}


def test_a_bar_is_shown_on_a_terminal_and_in_a_notebook(tmp_path, monkeypatch):
    import sys
    from types import ModuleType, SimpleNamespace

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    notebook = ModuleType("IPython")
    notebook.get_ipython = lambda: None  # as where a script has imported it
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    log = record(tmp_path)
    log.start(0)
    assert log._bar is None  # lines in a log
    notebook.get_ipython = lambda: SimpleNamespace(kernel=None)
    log = record(tmp_path)
    log.start(0)
    assert log._bar is not None
    log._bar.close()
