"""What knowledge is worth: equal runs, their control, what is counted, and what is kept."""

import json

import numpy as np
import pandas as pd
import pytest

from genemodel.bundle.bundle import Bundle
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError
from genemodel.genes.knowledge import KnowledgeTable
from genemodel.knowledge import ablation
from genemodel.knowledge.ablation import AblateSettings, ablate, arms_of, summarise
from genemodel.settings import parse


@pytest.fixture(scope="module")
def folder(small_start, tmp_path_factory):
    """Two tables over the genes of the small corpus."""
    folder = tmp_path_factory.mktemp("knowledge")
    vocabulary = Corpus.open(small_start / "corpus").vocabulary
    rng = np.random.default_rng(0)
    for name in ("family", "grn"):
        present = rng.random(len(vocabulary)) < 0.7
        present[:3] = False
        values = rng.normal(size=(len(vocabulary), 6)).astype(np.float32) * present[:, None]
        KnowledgeTable(values, present, {"kind": name}).write(folder / f"{name}.tsv.gz", vocabulary)
    return folder


@pytest.fixture
def settings(small_start, folder, tmp_path):
    def make(**change):
        values = {
            "corpus": str(small_start / "corpus"), "out": str(tmp_path / "out"),
            "knowledge": ["none", "family", "shuffled"], "knowledge_dir": str(folder), "seeds": 2,
            "tokens": {"context": 64, "budget": 512}, "keep_models": True,
            "model": {"layers": 1, "width": 16, "heads": 2, "ffn": 16, "components": 2},
            "trainer": {
                "max_steps": 2, "accelerator": "cpu", "validate_every": 2,
                "validation_batches": 1,
            },
        }  # fmt: skip
        return parse(AblateSettings, {**values, **change})

    return make


def test_runs_are_equal_but_for_the_knowledge(settings, tmp_path, monkeypatch):
    found = ablate(settings())
    assert len(found.runs) == 3 * 2 * 3 and set(found.runs["seed"]) == {0, 1}
    trivial = found.runs.groupby(["seed", "objective"])["trivial"].nunique()
    assert (trivial == 1).all()  # the same cells, and the same genes hidden of them
    loss = found.runs.pivot_table(index=["seed", "objective"], columns="knowledge", values="loss")
    assert (loss["none"] != loss["family"]).all() and (
        loss["family"] != loss["family, shuffled"]
    ).all()
    runs = tmp_path / "out" / "runs"
    tables = {}
    for name in ("none", "family", "family.shuffled"):
        bundle = Bundle.load(runs / name / "seed-0" / "bundle", device="cpu")
        knowledge = bundle.model.embedding.knowledge
        tables[name] = knowledge["family"] if name != "none" else None
        assert not (runs / name / "seed-0" / "checkpoints").exists()
    true, mixed = tables["family"], tables["family.shuffled"]
    assert (true.present_V == mixed.present_V).all()
    assert (true.table_VP != mixed.table_VP).any()
    assert sorted(true.table_VP[true.present_V, 0].tolist()) == pytest.approx(
        sorted(mixed.table_VP[true.present_V, 0].tolist()), abs=1e-5
    )
    text = str(found)
    assert "trivial predictor" in text and "family, shuffled" in text
    written = pd.read_csv(tmp_path / "out" / "ablation.tsv", sep="\t")
    pd.testing.assert_frame_equal(written, found.summary, check_exact=False, rtol=1e-4)
    assert len(json.loads((tmp_path / "out" / "ablation.json").read_text())["runs"]) == 18
    # What is finished is kept, and another table needs only its own runs.
    trained = []
    pretrain = ablation.pretrain
    monkeypatch.setattr(ablation, "pretrain", lambda run: trained.append(run.out) or pretrain(run))
    again = ablate(settings(knowledge=["none", "family", "grn", "shuffled"], seeds=1))
    assert len(trained) == 2 and all("grn" in out for out in trained)
    kept = again.runs[again.runs["knowledge"] == "family"]["loss"].tolist()
    before = found.runs[(found.runs["knowledge"] == "family") & (found.runs["seed"] == 0)]
    assert kept == before["loss"].tolist()
    with pytest.raises(ConfigError, match=r"with other settings:\n  settings.optim.lr"):
        ablate(settings(optim={"lr": 5e-4}))
    assert len(trained) == 2


def test_differences_are_paired_by_seed():
    rows = [
        {"knowledge": name, "seed": seed, "objective": "a", "trivial": 9.0,
         "loss": 5 + 10 * seed + extra + jitter[seed]}
        for name, extra, jitter in (
            ("none", 0, (0, 0, 0)), ("x", -1, (0.3, 0, -0.3)), ("x, shuffled", 1, (0, 0, 0))
        )
        for seed in range(3)
    ]  # fmt: skip
    summary = summarise(pd.DataFrame(rows)).set_index("knowledge")
    assert summary.loc["x", "to_none"] == pytest.approx(-1)
    assert summary.loc["x", "to_none_se"] == pytest.approx(0.3 / 3**0.5)
    assert summary.loc["x", "to_shuffled"] == pytest.approx(-2)
    assert summary.loc["x", "loss_se"] > 5  # unpaired, seeds differ by ten
    assert np.isnan(summary.loc["none", ["to_none", "to_shuffled"]].astype(float)).all()
    one = summarise(pd.DataFrame(rows)[lambda x: x["seed"] == 0]).set_index("knowledge")
    assert np.isnan(one.loc["x", "loss_se"]) and one.loc["x", "to_none"] == pytest.approx(-0.7)


def test_tables_together_are_one_thing_to_compare(settings):
    arms = arms_of(settings(knowledge=["family+grn", "shuffled", "none"]))
    assert [arm.name for arm in arms] == ["none", "family+grn", "family+grn, shuffled"]
    assert len(arms[1].tables) == 2 and arms[2].shuffled


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"knowledge": ["none", "shuffled"]}, "names no table"),
        ({"knowledge": ["family", "family"]}, "names something twice"),
        ({"seeds": 0}, "seeds is 0"),
        ({"holdout": {"by": ""}}, "holdout.by is empty"),
        ({"model": {"knowledge": ["family"]}}, "say it in knowledge="),
        ({"trainer": {"early_stopping": 2}}, "compared at equal steps"),
    ],
)
def test_impossible_comparisons_are_refused(settings, values, said):
    with pytest.raises(ConfigError, match=said):
        settings(**values)


def test_an_unknown_table_is_refused_before_work(settings, tmp_path):
    with pytest.raises(ConfigError, match="no table 'famly': did you mean 'family'"):
        ablate(settings(knowledge=["none", "famly"]))
    assert not (tmp_path / "out" / "runs").exists()
