"""The verb: a file in; embedding, imputed counts and models out, by way of an adapted backbone."""

import dataclasses
import json
import shutil
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import genemodel as gm
from genemodel.bundle.bundle import Bundle
from genemodel.command import config_files
from genemodel.command.cli import main
from genemodel.command.finetune import FinetuneSettings, encoder_of
from genemodel.corpus.corpus import Corpus
from genemodel.imputation.model import ImputationModel
from genemodel.integration.model import IntegratedModel
from genemodel.model.tuning import TuningSettings
from genemodel.settings import parse
from genemodel.simulation.cells import synthetic
from genemodel.train.loop import Loop

TINY = [f"integration.{word}" for word in ("steps=6", "passes=0", "hidden=8", "rank=4", "latent=5")]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("finetune") / "cells.h5ad"
    cells = synthetic(120, species=("human",), n_batches=2, n_genes=600, genes_per_cell=80, seed=2)[
        "human"
    ]
    cells.write_h5ad(path)
    return path


@pytest.mark.usefixtures("blank_report")
def test_a_run_writes_embedding_and_model(file, tmp_path, capsys):
    out = tmp_path / "new" / "run"
    words = ["finetune", f"input={file}", "batch_key=[batch,donor]", f"out={out}"]
    assert main([*words, *TINY]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    embedded, data = ad.read_h5ad(out / "embedded.h5ad"), ad.read_h5ad(file)
    assert list(embedded.obs_names) == list(data.obs_names) and embedded.X is None
    assert embedded.obsm["X_integrated"].shape == (120, 5)
    assert embedded.uns["X_integrated"]["settings"]["steps"] == 6
    model = IntegratedModel.load(out / "model")
    assert model.batch_keys == ("batch", "donor")
    assert np.isfinite(model.encode(data)).all()
    assert sorted(p.name for p in out.iterdir()) == [
        "curves.csv", "embedded.h5ad", "finetune.json", "heads", "model", "report.html",
    ]  # fmt: skip
    curves = pd.read_csv(out / "curves.csv")
    assert set(curves["loss"]) == {"nats_per_count", "kl"} and curves["step"].max() == 6
    before = (out / "embedded.h5ad").stat().st_mtime_ns
    assert main([*words, *TINY]) == 0
    assert "is complete" in capsys.readouterr().err
    assert (out / "embedded.h5ad").stat().st_mtime_ns == before
    assert main([*words, *TINY, "seed=1"]) == 2
    said = capsys.readouterr().err
    assert "seed: 0 -> 1" in said and "overwrite=true" in said
    assert main([*words, *TINY, "seed=1", "overwrite=true"]) == 0
    assert (out / "embedded.h5ad").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["input=absent.h5ad"], "absent.h5ad is no file"),
        (["out=/dev/null/run"], "no folder that you may write in"),
        (["batch_key=bach"], "did you mean 'batch'"),
        (["integration.latent=0"], "latent=0"),
        (["task=cook"], "task"),
        (["model=absent"], "No model at absent"),
        (["batch_key=[]"], "task=integrate needs batch_key"),
        (["backbone=lora"], "backbone=lora adapts a pre-trained model: give model=BUNDLE"),
        (["task=impute", "imputation.gene_vectors=true"], "gene_vectors=true needs"),
        (["label_key=cel_type"], "did you mean 'cell_type'"),
        (["backbone.rnk=3"], "did you mean 'backbone.rank'"),
        (["seed=-1"], "seed is -1"),
        (["key_added="], "key_added is empty"),
        (["key_added=a/b"], "key_added=a/b: a slash"),
        (["label_key=batch"], "label_key=batch is a column of batch_key too"),
        (["batch_key=[batch,batch]"], "names a column twice"),
        (["task=impute", "label_key=cell_type"], "says nothing to task=impute"),
        (["warm_up=true"], "with backbone=frozen nothing does"),
        (["task=impute", "hold_out=true"], "says nothing to task=impute"),
        (["backbone=scratch", "size=gigantic"], "size=gigantic: there are base, large"),
        (["backbone=scratch", "holdout.by=donr"], "did you mean donor"),
        (["integration.gene_vectors=true"], "integration.gene_vectors=true needs"),
        (["device=gpu"], "device=gpu: there is no such device"),
        (["layer=raw"], "cells.h5ad: has no layer 'raw'"),
        (["species=mouse"], "set species=human"),
    ],
)
def test_user_errors_are_told_in_a_line(file, tmp_path, capsys, words, said):
    given = [f"input={file}", "batch_key=batch", f"out={tmp_path / 'run'}"]
    taken = {word.partition("=")[0] for word in words}
    kept = [word for word in given if word.partition("=")[0] not in taken]
    assert main(["finetune", *kept, *words, *TINY[:-1]]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_h5ad_is_refused(tmp_path, capsys):
    (tmp_path / "a.h5ad").write_text("no")
    words = ["finetune", f"input={tmp_path / 'a.h5ad'}", "batch_key=b", f"out={tmp_path / 'o'}"]
    assert main(words) == 2
    assert "a.h5ad" in capsys.readouterr().err


# -- by way of the backbone ------------------------------------------------------------------------

STAGE_1 = [
    "tokens.budget=512", "trainer.max_steps=4", "trainer.validate_every=2",
    "trainer.validation_batches=2", "trainer.checkpoint_every=2", "trainer.accelerator=cpu",
    "optim.warmup_steps=1", "optim.lr=0.003", "backbone.rank=2",
]  # fmt: skip
HEADS = [*TINY, "imputation.epochs=1", "imputation.hidden=8", "imputation.latent=4"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory, small_vocabulary):
    """A file of cells that the bundle ``small_start`` has not seen."""
    path = tmp_path_factory.mktemp("mine") / "mine.h5ad"
    cells = synthetic(
        120, species=("human",), n_batches=3, n_genes=300, genes_per_cell=60, seed=5,
        vocabulary=small_vocabulary,
    )["human"]  # fmt: skip
    cells.write_h5ad(path)
    return path


def command(data, start, out, *words):
    return [
        "finetune", f"input={data}", f"model={start / 'run' / 'bundle'}", f"out={out}",
        "batch_key=batch", *STAGE_1, *HEADS, *words,
    ]  # fmt: skip


def test_both_heads_stand_on_the_adapted_backbone(mine, small_start, tmp_path, capsys):
    out = tmp_path / "run"
    words = command(mine, small_start, out, "backbone=lora", "warm_up=true", "task=both")
    assert main([*words, "imputation.gene_vectors=true"]) == 0
    assert {p.name for p in out.iterdir()} == {
        "backbone", "curves.csv", "embedded.h5ad", "finetune.json", "heads", "imputation_model",
        "imputed.h5ad", "model", "report.html",
    }  # fmt: skip
    adapted = Bundle.load(out / "backbone" / "bundle")
    # Each head has gone on from the adapted backbone, on a copy of its own.
    for folder in ("model", "imputation_model"):
        beneath = gm.load(out / folder).bundle
        assert beneath.provenance["start"] == adapted.fingerprint != beneath.fingerprint
    assert adapted.provenance["start"] == Bundle.load(small_start / "run" / "bundle").fingerprint
    imputed, data = ad.read_h5ad(out / "imputed.h5ad"), ad.read_h5ad(mine)
    assert imputed.layers["imputed"].shape == imputed.layers["imputed_sd"].shape == data.shape
    # The model on disk imputes the same cells alike, and others.
    again = data.copy()
    gm.impute(again, ImputationModel.load(out / "imputation_model"))
    np.testing.assert_allclose(again.layers["imputed"], imputed.layers["imputed"], rtol=1e-5)
    curves = pd.read_csv(out / "curves.csv")
    assert set(curves["task"]) == {"integrate", "impute"}
    validation = pd.read_csv(out / "backbone" / "validation.csv")
    assert validation["step"].tolist() == [0, 2, 4]
    page = (out / "report.html").read_text()
    assert "used are the weights of step 4" in page and "<td>masked gene</td>" in page
    assert page.count("<img") == 4 and "90 % intervals hold" in page
    # The result comes first, and nobody reads through the settings to find it.
    heads = ["Before and after", "Imputed counts", "The backbone on", "The head:", "<summary>"]
    places = [page.index(head, page.index("<main>")) for head in heads]
    assert places == sorted(places) and page.index("imputation.gene_vectors") > places[-1]
    assert "same-batch ratio" in page and "after</td>" in page
    # The held-out groups are donors, whole.
    corpus = Corpus.open(out / "backbone" / "corpus")
    assert corpus.codes("batch")[1] == sorted(data.obs["batch"].astype(str).unique())


@pytest.mark.usefixtures("blank_report")
@pytest.mark.parametrize(
    ("words", "step"),
    [
        (("backbone=last",), 4),
        (("backbone=last", "warm_up=true"), 3),
        (("task=impute", "imputation.epochs=6", "imputation.check_every=2"), 4),
    ],
)
def test_a_run_that_was_cut_off_goes_on_and_another_is_refused(
    mine, small_start, tmp_path, capsys, monkeypatch, words, step
):
    """Of a head, also one beneath which a backbone learns, and of the backbone alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(mine, small_start, whole, *words)) == 0
    apply_itself = Loop._apply

    def broken(loop, *args):
        if loop.progress.step == step:
            raise ZeroDivisionError
        return apply_itself(loop, *args)

    monkeypatch.setattr(Loop, "_apply", broken)
    with pytest.raises(ZeroDivisionError):
        main(command(mine, small_start, parts, *words))
    result = "imputed.h5ad" if "task=impute" in words else "embedded.h5ad"
    assert not (parts / result).exists()
    assert main(command(mine, small_start, parts, *words, "seed=3")) == 2
    assert "seed: 0 -> 3" in capsys.readouterr().err
    steps = []

    def counted(loop, *args):
        steps.append(loop.progress.step)
        return apply_itself(loop, *args)

    monkeypatch.setattr(Loop, "_apply", counted)
    assert main(command(mine, small_start, parts, *words)) == 0
    first = step - step % 2  # checkpoints are two steps apart
    assert steps[0] == first and 0 not in steps[: len(steps) if step == 4 else 2]
    expected, got = (ad.read_h5ad(out / result) for out in (whole, parts))
    for key in expected.obsm:
        np.testing.assert_array_equal(expected.obsm[key], got.obsm[key])
    for key in expected.layers:
        np.testing.assert_array_equal(expected.layers[key], got.layers[key])
    # A result that is lost is made again, and nothing is trained.
    (parts / result).unlink()
    if result == "imputed.h5ad":
        shutil.rmtree(parts / "imputation_model")
    steps.clear()
    assert main(command(mine, small_start, parts, *words)) == 0
    assert not steps and (parts / result).exists()
    other = ad.read_h5ad(mine)
    other[:100].copy().write_h5ad(tmp_path / "other.h5ad")
    assert main(command(tmp_path / "other.h5ad", small_start, parts, *words)) == 2
    assert "data: its content is not what the run started with" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_report")
def test_from_scratch_has_the_shape_of_the_model_and_none_of_its_weights(
    mine, small_start, tmp_path
):
    out = tmp_path / "run"
    words = command(
        mine,
        small_start,
        out,
        "backbone=scratch",
        "task=impute",
        "trainer.max_steps=1",
        "imputation.gene_vectors=true",
    )
    assert main(words) == 0
    start, new = Bundle.load(small_start / "run" / "bundle"), Bundle.load(out / "backbone/bundle")
    assert new.model.settings == start.model.settings and new.provenance["start"] == ""
    name = "blocks.0.qkv.weight"
    assert not (start.model.state_dict()[name] == new.model.state_dict()[name]).any()
    assert not (out / "embedded.h5ad").exists() and (out / "imputed.h5ad").exists()


@pytest.mark.usefixtures("blank_report")
def test_a_corpus_is_streamed_and_its_cells_come_out_in_order(small_start, tmp_path, capsys):
    out = tmp_path / "run"
    corpus = Corpus.open(small_start / "corpus")
    words = command(corpus.path, small_start, out, "backbone=full", "task=both")
    assert main([*words, "backbone.layer_decay=0.7"]) == 0
    assert not (out / "backbone").exists()
    embedded, imputed = (ad.read_h5ad(out / f"{name}.h5ad") for name in ("embedded", "imputed"))
    assert embedded.n_obs == imputed.n_obs == len(corpus) == 240
    assert np.isfinite(embedded.obsm["X_integrated"]).all()
    assert embedded.obs["donor"].astype(str).tolist() == corpus.obs()["donor"].astype(str).tolist()
    # Rates of a cell add up to its counts but for what prior and evidence make of each gene.
    total = imputed.layers["imputed"].sum(1)
    assert np.corrcoef(total, corpus.library_C)[0, 1] > 0.99
    assert main(command(corpus.path, small_start, tmp_path / "no", "layer=counts", "genome=x")) == 2
    assert "leave layer and genome out" in capsys.readouterr().err
    words = command(corpus.path, small_start, tmp_path / "no", "backbone=full", "warm_up=true")
    assert main([*words, "batch_key=[batch,donor]"]) == 2
    assert "a corpus has one technical batch" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_report")
def test_imputing_a_corpus_of_two_species_is_refused(tiny_corpus, tmp_path, capsys):
    words = ["finetune", f"input={tiny_corpus}", f"out={tmp_path / 'run'}", "task=impute", *HEADS]
    assert main(words) == 2
    assert "a corpus for each species" in capsys.readouterr().err


def test_a_folder_that_is_not_ours_is_left_alone(mine, small_start, tmp_path, capsys):
    (tmp_path / "run" / "backbone").mkdir(parents=True)
    (tmp_path / "run" / "backbone" / "thesis.txt").write_text("years of work")
    assert main(command(mine, small_start, tmp_path / "run", "backbone=last")) == 2
    assert "no finetune.json" in capsys.readouterr().err
    assert (tmp_path / "run" / "backbone" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("manifest.json", "is a corpus"),
        ("bundle.json", "is a model"),
        ("settings.json", "is a training run"),
        ("report.html", "overwrite=true replaces nothing else"),
    ],
)
def test_what_is_not_of_fine_tuning_is_never_replaced(file, tmp_path, capsys, name, said):
    (tmp_path / name).write_text("mine")
    words = ["finetune", f"input={file}", "batch_key=batch", f"out={tmp_path}", "overwrite=true"]
    assert main([*words, *TINY]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_log_data_are_refused_by_the_name_of_the_file(file, tmp_path, capsys):
    cells = ad.read_h5ad(file)
    cells.X = cells.X.astype(np.float32)
    cells.X.data = np.log1p(cells.X.data)
    cells.write_h5ad(tmp_path / "log.h5ad")
    words = ["finetune", f"input={tmp_path / 'log.h5ad'}", "batch_key=batch"]
    assert main([*words, f"out={tmp_path / 'run'}", *TINY]) == 2
    assert "log.h5ad, X: holds log1p" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_python_has_the_defaults_of_the_command_line():
    values = config_files.compose("finetune", ["batch_key=b"])
    composed = parse(FinetuneSettings, {**values, "data": "d", "out": "o"})
    assert composed == FinetuneSettings(input="d", out="o", batch_key=("b",))
    assert json.dumps(dataclasses.asdict(composed))


TASKS = [
    ("task=integrate", "backbone=lora"),
    ("task=impute", "backbone=last", "imputation.check_every=1"),
    ("task=classify", "label_key=cell_type", "backbone=lora"),
]
RUNS = {"integrate": "heads/integrate", "impute": "heads/impute", "classify": "backbone"}
RESULTS = {"integrate": "embedded.h5ad", "impute": "imputed.h5ad", "classify": "labels.h5ad"}


def for_task(data, start, out, words, *more):
    given = command(data, start, out, *words, *more)
    if words[0] == "task=classify":
        given.remove("batch_key=batch")
    return given


@pytest.mark.slow
@pytest.mark.usefixtures("blank_report")
@pytest.mark.parametrize("words", TASKS, ids=lambda words: words[0])
def test_two_processes_are_one_with_two_micro_batches(mine, small_start, tmp_path, words):
    """Losses, looks and outcome; what follows the training is made once."""
    runs = {"devices": tmp_path / "two", "accumulate": tmp_path / "one"}
    size = ["integration.batch_cells=20", "imputation.batch_cells=20"]
    for name, out in runs.items():
        assert main(for_task(mine, small_start, out, words, *size, f"trainer.{name}=2")) == 0
    two, one = runs.values()
    task = words[0].partition("=")[2]

    def table(out, name, like):
        return pd.read_csv(out / RUNS[task] / name).filter(like=like)

    losses = [table(out, "metrics.csv", "train/") for out in (two, one)]
    np.testing.assert_allclose(*losses, rtol=1e-6, atol=1e-6)
    if task != "integrate":
        looks = [table(out, "validation.csv", "val") for out in (two, one)]
        np.testing.assert_allclose(*looks, rtol=1e-6)
    made = [ad.read_h5ad(out / RESULTS[task]) for out in (two, one)]
    for key in made[0].obsm:
        np.testing.assert_allclose(*(np.asarray(a.obsm[key]) for a in made), atol=1e-4)
    for key in made[0].layers:
        np.testing.assert_allclose(*(a.layers[key] for a in made), rtol=1e-4)


LONG_ENOUGH_TO_KILL = [
    "integration.steps=60", "imputation.epochs=30", "imputation.patience=100",
    "imputation.batch_cells=40", "trainer.max_steps=60", "trainer.checkpoint_every=5",
]  # fmt: skip
# Forks a run of each command and kills it when a checkpoint of step 10 is there: by the parent,
# which has imported what takes longer than the runs, and started no thread.
KILLER = """
import json, os, signal, sys, time
from pathlib import Path
import zarr
from genemodel.command import finetune
from genemodel.command.cli import main

for words, folder in json.loads(sys.argv[1]):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = main(words)
        finally:
            os._exit(code)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if any(int(path.name[5:13]) >= 10 for path in Path(folder).glob("step-????????")):
            break
        time.sleep(0.01)
    assert not ended[0], "it was to be killed before its end"
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(mine, small_start, tmp_path_factory):
    """Of every task a command and the folder of its run, killed whatever it was doing."""
    found = {}
    for words in TASKS:
        parts = tmp_path_factory.mktemp("killed") / "parts"
        given = for_task(mine, small_start, parts, words, *LONG_ENOUGH_TO_KILL)
        found[words[0].partition("=")[2]] = given, parts
    given = [(words, f"{out}/{RUNS[task]}/checkpoints") for task, (words, out) in found.items()]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(given)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("blank_report")
@pytest.mark.parametrize("words", TASKS, ids=lambda words: words[0])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(mine, small_start, killed, tmp_path, words):
    """Kill -9 in the middle of the training, whatever it is doing."""
    whole = tmp_path / "whole"
    assert main(for_task(mine, small_start, whole, words, *LONG_ENOUGH_TO_KILL)) == 0
    task = words[0].partition("=")[2]
    given, parts = killed[task]
    assert not (parts / RESULTS[task]).exists()
    assert main(given) == 0
    expected, got = (ad.read_h5ad(out / RESULTS[task]) for out in (whole, parts))
    for key in expected.obsm:
        np.testing.assert_array_equal(np.asarray(expected.obsm[key]), np.asarray(got.obsm[key]))
    for key in expected.layers:
        np.testing.assert_array_equal(expected.layers[key], got.layers[key])


@pytest.mark.usefixtures("blank_report")
def test_an_embedding_is_looked_at_on_donors_held_out(mine, tmp_path, monkeypatch, caplog):
    from genemodel.integration.head import IntegrationHead

    seen, prepare_itself = {True: [], False: []}, IntegrationHead.prepare

    def prepare(head, batch, **options):
        n = batch.n_cells
        pairs = zip(batch.cell_C[:n].tolist(), batch.batch_C[:n].tolist(), strict=True)
        seen[head.training] += pairs
        return prepare_itself(head, batch, **options)

    monkeypatch.setattr(IntegrationHead, "prepare", prepare)
    given = ["finetune", f"input={mine}", "batch_key=batch", "hold_out=true", *TINY]
    given += ["trainer.validate_every=2", "trainer.accelerator=cpu", "holdout.by=batch"]
    assert main([*given, f"out={tmp_path / 'a'}"]) == 0
    trained, looked = ({cell for cell, _ in seen[side]} for side in (True, False))
    assert looked and not trained & looked and len(trained | looked) == 120
    # Of a batch that is held out whole the decoder knows nothing.
    assert {code for _, code in seen[False]} == {-1} and -1 not in {c for _, c in seen[True]}
    looks = pd.read_csv(tmp_path / "a" / "heads" / "integrate" / "validation.csv")
    assert looks["step"].tolist() == [2, 4, 6] and np.isfinite(looks["val/nats_per_count"]).all()
    embedded = ad.read_h5ad(tmp_path / "a" / "embedded.h5ad")
    assert np.isfinite(embedded.obsm["X_integrated"]).all()  # those held out too
    for values in seen.values():
        values.clear()
    assert main([*given, "holdout.by=", f"out={tmp_path / 'b'}"]) == 0
    assert "Nothing is held out" in caplog.text
    assert len({cell for cell, _ in seen[True]}) == 120 and not seen[False]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_key": ("b",)}, "a network on counts, trained here; no transformer"),
        (
            {"batch_key": ("b",), "model": "runs/x"},
            "a network on counts, beside the cell vectors of the transformer of runs/x, nothing of "
            "which learnt here",
        ),
        (
            {"batch_key": ("b",), "model": "runs/x", "backbone": TuningSettings("lora")},
            "a network on counts, beside the cell vectors of the transformer of runs/x, of which "
            "lora learnt here",
        ),
        (
            {"task": "classify", "label_key": "l", "backbone": TuningSettings("scratch")},
            "the transformer of new weights (tiny), trained on these cells alone",
        ),
    ],
)
def test_a_result_says_which_encoder_it_is_of(given, said):
    assert encoder_of(FinetuneSettings(input="x", out="y", **given)) == said
