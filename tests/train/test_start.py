"""Going on from a bundle: what is taken, what stays as it was, what is released."""

import numpy as np
import pandas as pd
import pytest
import torch

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.genes import GeneVocabulary
from genemodel.settings import parse
from genemodel.simulation.cells import synthetic
from genemodel.train import recipe
from genemodel.train.checkpoint import newest_checkpoint
from genemodel.train.loop import Loop
from genemodel.train.optim import build_optimisers
from genemodel.train.settings import OptimSettings, PretrainSettings

STEPS = 4


def settings(corpus, out, **change):
    values = {
        "corpus": str(corpus),
        "out": str(out),
        "tokens": {"context": 64, "budget": 512},
        "model": {"layers": 2, "width": 16, "heads": 2, "ffn": 16, "components": 4},
        "optim": {"lr": 3e-3, "warmup_steps": 1},
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "validate_every": 2,
            "validation_batches": 2,
            "checkpoint_every": 2,
        },
    }
    for key, value in change.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return parse(PretrainSettings, values)


@pytest.fixture
def corpus(small_start):
    return small_start / "corpus"


@pytest.fixture
def start(small_start):
    return small_start / "run" / "bundle"


def weights(bundle):
    loaded = Bundle.load(bundle, device="cpu")
    return dict(loaded.model.state_dict()), loaded.heads


@pytest.mark.parametrize("tune", ["lora", "last", "full", "frozen"])
def test_what_is_frozen_stays_to_the_bit(start, corpus, tmp_path, tune):
    backbone = {"tune": tune, "rank": 2, "layer_decay": 0.5}
    path = recipe.pretrain(
        settings(
            corpus, tmp_path / "run", start=str(start), backbone=backbone,
            # The shape asked for is not read: it is the bundle's.
            model={"layers": 5}, trainer={"max_steps": 2},
        )
    )  # fmt: skip
    (before, _), (after, heads) = weights(start), weights(path)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {n for n in before if n.startswith("blocks.") and ".norm" not in n}
    expected = {
        "lora": matrices,
        "last": {n for n in before if n.startswith(("blocks.1.", "final_norm."))},
        "frozen": set(),
    }
    steps = Bundle.load(path).provenance["steps"]
    assert steps in (0, 2)
    if tune == "full" and steps:
        assert {"embedding.token.weight", *matrices} <= changed
    elif steps:
        assert changed == expected[tune]
    assert "decode_counts.batch.weight" in heads
    validation = pd.read_csv(tmp_path / "run" / "validation.csv")
    assert validation["step"].tolist() == [0, 2]


def test_the_start_is_what_the_bundle_says(start, corpus, tmp_path):
    """The first look at held-out cells is the bundle's own last one, whatever is tuned."""
    bundle = Bundle.load(start)
    path = recipe.pretrain(
        settings(corpus, tmp_path / "run", start=str(start), backbone={"tune": "lora", "rank": 2})
    )
    first = pd.read_csv(tmp_path / "run" / "validation.csv").iloc[0]
    for name in ("masked_gene", "masked_value", "decode_counts"):
        assert first[f"val/{name}"] == pytest.approx(bundle.provenance["validation"][f"val/{name}"])
    assert Bundle.load(path).provenance["start"] == bundle.fingerprint


def test_heads_are_taken_but_for_the_batches(start, corpus):
    bundle = Bundle.load(start, device="cpu")
    bundle.heads["decode_counts.batch.weight"] = torch.ones(3, 16)
    bundle.heads["masked_value.out.bias"] = torch.ones(7)
    chosen = settings(corpus, "unused")
    _, objectives = recipe.build(chosen, Corpus.open(corpus), np.arange(100), 5, bundle)
    own = objectives.heads.state_dict()
    assert own["decode_counts.batch.weight"].shape == (5, 16)
    assert not own["decode_counts.batch.weight"].any()
    for name in ("decode_counts.gene.weight", "masked_gene.bias_SV", "masked_value.mean_SV"):
        assert torch.equal(own[name], bundle.heads[name]), name
    assert objectives.start_from(bundle.heads) == ["masked_gene", "decode_counts"]


def test_medians_are_those_the_model_has_learnt_with(start, corpus):
    bundle, corpus = Bundle.load(start), Corpus.open(corpus)
    bundle.medians_V = bundle.medians_V * 2
    lost = np.flatnonzero(np.isfinite(bundle.medians_V))[:5]
    bundle.medians_V[lost] = np.nan
    medians_V = recipe.medians_of(corpus, bundle)
    np.testing.assert_array_equal(medians_V[lost], corpus.medians_V[lost])
    kept = np.isfinite(bundle.medians_V)
    np.testing.assert_array_equal(medians_V[kept], bundle.medians_V[kept])


def test_a_vocabulary_with_more_behind_starts_new_only_there(tmp_path):
    rows = GeneVocabulary.builtin().genes
    rows = rows[rows["species"] == "human"]
    few, more = (GeneVocabulary(rows[rows["token"] < n].reset_index(drop=True)) for n in (303, 403))
    cells = synthetic(
        120, species=("human",), n_genes=250, genes_per_cell=40, seed=3, vocabulary=more
    )["human"]
    for name, vocabulary in (("few", few), ("more", more)):
        Corpus.build([cells], tmp_path / name, vocabulary=vocabulary)
    first = recipe.pretrain(settings(tmp_path / "few", tmp_path / "a", trainer={"max_steps": 1}))
    chosen = settings(
        tmp_path / "more", tmp_path / "b", start=str(first), backbone={"tune": "frozen"},
        trainer={"max_steps": 1},
    )  # fmt: skip
    path = recipe.pretrain(chosen)
    (before, old), (after, new) = weights(first), weights(path)
    assert torch.equal(after["embedding.token.weight"][:303], before["embedding.token.weight"])
    assert after["embedding.token.weight"][303:].std() > 0.1
    assert torch.equal(after["blocks.1.ffn.up.weight"], before["blocks.1.ffn.up.weight"])
    assert new["decode_counts.gene.weight"].shape == (403, 16)
    change = new["masked_gene.bias_SV"][:, :303] - old["masked_gene.bias_SV"]
    assert change.abs().max() < 0.01  # one step
    assert Bundle.load(path).vocabulary == more
    with pytest.raises(DataError, match="which is not its beginning"):
        recipe.pretrain(settings(tmp_path / "few", tmp_path / "c", start=str(path)))
    with pytest.raises(DataError, match="cannot grow to 303 tokens of human: it is another"):
        Bundle.load(path).grown(few)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(
    start, corpus, tmp_path, monkeypatch, tune
):
    def run(out):
        return settings(
            corpus, tmp_path / out, start=str(start),
            backbone={"tune": tune, "rank": 2, "layer_decay": 0.8},
        )  # fmt: skip

    whole = recipe.pretrain(run("whole"))
    apply_itself = Loop._apply

    def broken(loop, *args):
        if loop.progress.step == STEPS - 1:
            raise KeyboardInterrupt
        return apply_itself(loop, *args)

    monkeypatch.setattr(Loop, "_apply", broken)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        recipe.pretrain(run("parts"))
    saved = newest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert saved is not None and saved.step == 2
    monkeypatch.undo()
    parts = recipe.pretrain(run("parts"))
    (expected, heads), (got, got_heads) = weights(whole), weights(parts)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert all(torch.equal(heads[name], got_heads[name]) for name in heads)
    tables = [
        pd.read_csv(tmp_path / out / "validation.csv").to_numpy() for out in ("whole", "parts")
    ]
    np.testing.assert_array_equal(*tables)


def test_a_run_that_only_harms_releases_its_start_and_is_complete(start, corpus, tmp_path, caplog):
    chosen = settings(
        corpus, tmp_path / "run", start=str(start), optim={"lr": 2.0, "clip": 1.0},
        trainer={"max_steps": 50, "validate_every": 1, "early_stopping": 2},
    )  # fmt: skip
    path = recipe.pretrain(chosen)
    (before, _), (after, _) = weights(start), weights(path)
    assert Bundle.load(path).provenance["steps"] == 0
    assert Bundle.load(path).training == Bundle.load(start).training
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps = pd.read_csv(tmp_path / "run" / "validation.csv")["step"].tolist()
    assert steps == [0, 1, 2]
    with caplog.at_level("INFO"):
        assert recipe.pretrain(chosen) == path
    assert "is complete (2 steps)" in caplog.text
    assert pd.read_csv(tmp_path / "run" / "validation.csv")["step"].tolist() == steps


def test_the_cells_trained_on_are_known_and_those_held_out_are_not(start, corpus):
    opened, training = Corpus.open(corpus), Bundle.load(start).training
    train_cells, held_out = recipe.split(settings(corpus, "run").holdout, opened, "corpus")
    assert training.sources == TrainingManifest.of(opened, train_cells).sources
    assert training.n_trained == train_cells.size == len(opened) - held_out.size
    print_NP = opened.prints_CP()
    for cells, there in ((train_cells, True), (held_out, False)):
        print_N = print_NP[cells][print_NP[cells] > 0]
        assert print_N.size
        assert (training.fingerprints[0].find(print_N) == there).all()


def test_what_the_start_was_trained_on_is_handed_down(start, corpus, tmp_path, small_vocabulary):
    cells = synthetic(
        200, species=("human",), n_genes=500, genes_per_cell=60, seed=8, vocabulary=small_vocabulary
    )["human"]
    other = Corpus.build({"mine": cells}, tmp_path / "other", vocabulary=small_vocabulary)
    always = {"max_steps": 1, "validate_every": 1}
    # One step that helps: a rate of nearly nothing cannot harm.
    chosen = {"start": str(start), "trainer": always, "optim": {"lr": 1e-4}}
    before = Bundle.load(start).training

    def released(corpus, name, **change):
        path = recipe.pretrain(settings(corpus, tmp_path / name, **chosen | change))
        assert Bundle.load(path).provenance["steps"] == 1
        return Bundle.load(path).training

    own = TrainingManifest.of(
        other, recipe.split(settings(other.path, "run").holdout, other, "corpus")[0]
    )
    assert released(other.path, "another") == TrainingManifest.after(before, own)
    assert released(corpus, "again") == before
    # A model of an earlier version keeps none: that stays unknown.
    bundle = Bundle.load(start)
    bundle.training = None
    bundle.save(tmp_path / "earlier")
    own_alone = released(other.path, "after", start=str(tmp_path / "earlier"))
    assert own_alone.sources == own.sources and not own_alone.complete


def test_groups_of_the_optimiser_carry_their_rates():
    module = torch.nn.ModuleDict(
        {"model": torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))}
    )
    shares = {"model.0.weight": 0.25, "model.0.bias": 0.25}
    (adamw,) = build_optimisers(module, OptimSettings(), shares)
    found = {id(p): group["share"] for group in adamw.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        assert found[id(parameter)] == shares.get(name, 1.0), name
    # Nothing for Muon to do is no error: adapters lie beside the matrices, not in them.
    module["model"].requires_grad_(False)
    module["head"] = torch.nn.Linear(2, 2)
    assert len(build_optimisers(module, OptimSettings(name="muon"))) == 1


def test_rates_follow_the_shares(start, corpus, tmp_path, monkeypatch):
    seen = []
    apply_itself = Loop._apply

    def noting(loop, *args):
        applied = apply_itself(loop, *args)
        groups = loop.optimisers[0].param_groups
        seen.append({group["share"]: group["lr"] for group in groups})
        return applied

    monkeypatch.setattr(Loop, "_apply", noting)
    recipe.pretrain(
        settings(
            corpus, tmp_path / "run", start=str(start), backbone={"layer_decay": 0.5},
            trainer={"max_steps": 1},
        )
    )  # fmt: skip
    assert seen == [{1.0: 3e-3, 0.5: 1.5e-3, 0.25: 0.75e-3}]


def test_refusals(start, corpus, tiny_corpus, tmp_path):
    with pytest.raises(ConfigError, match="backbone=lora leaves weights .* set start=BUNDLE"):
        settings(corpus, tmp_path / "run", backbone={"tune": "lora"})
    with pytest.raises(ConfigError, match="backbone=scratch means new weights"):
        settings(corpus, tmp_path / "run", start=str(start), backbone={"tune": "scratch"})
    with pytest.raises(DataError, match="No model at absent"):
        recipe.pretrain(settings(corpus, tmp_path / "run", start="absent"))
    with pytest.raises(DataError, match=r"knows .*\(human.*; 1,003 tokens\).*vocabulary.tsv.gz"):
        recipe.pretrain(settings(tiny_corpus, tmp_path / "run", start=str(start)))
    assert not (tmp_path / "run").exists()


def test_another_bundle_under_the_same_name_is_another_run(start, corpus, tmp_path):
    chosen = settings(
        corpus, tmp_path / "run", start=str(tmp_path / "bundle"), trainer={"max_steps": 1}
    )
    bundle = Bundle.load(start)
    bundle.save(tmp_path / "bundle")
    recipe.pretrain(chosen)
    with torch.no_grad():
        bundle.model.embedding.token.weight.add_(1.0)
    bundle.save(tmp_path / "bundle")
    with pytest.raises(ConfigError, match="start: its content is not what the run started with"):
        recipe.pretrain(chosen)
