"""``trainer.profile``: a trace that a browser opens, and a table that a person reads."""

import json

import pytest

from genemodel.settings import parse
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings


def run(small_start, out, **trainer):
    values = {
        "corpus": str(small_start / "corpus"),
        "out": str(out),
        "tokens": {"context": 64, "budget": 512},
        "model": {"layers": 1, "width": 16, "heads": 2, "ffn": 16, "components": 4},
        "trainer": {"validate_every": 99, "validation_batches": 1, "accelerator": "cpu", **trainer},
    }
    pretrain(parse(PretrainSettings, values))


def test_a_profile_holds_the_steps_asked_for(small_start, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(small_start, tmp_path, max_steps=9, profile=2)
    assert str(tmp_path / "profile" / "rank-0.json") in caplog.text
    trace = json.loads((tmp_path / "profile" / "rank-0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    # Two steps of one micro-batch through one block: a forward and a backward pass of attention.
    for name in ("genemodel::attend_per_cell", "genemodel::attend_per_cell_backward"):
        assert names.count(name) == 2, name
    table = (tmp_path / "profile" / "rank-0.txt").read_text()
    assert "Self CPU" in table and "aten::mm" in table


@pytest.mark.parametrize("steps", [3, 5])
def test_a_run_that_is_too_short_for_a_profile_says_so(small_start, tmp_path, caplog, steps):
    run(small_start, tmp_path, max_steps=steps, profile=2)
    assert "Nothing was profiled" in caplog.text
    assert not list((tmp_path / "profile").glob("*.json"))


def test_without_it_there_is_no_folder(small_start, tmp_path):
    run(small_start, tmp_path, max_steps=2)
    assert not (tmp_path / "profile").exists()
