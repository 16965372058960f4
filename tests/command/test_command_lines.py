"""Names of before, nothing in every spelling, sweeps, runs again, answers before torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from genemodel.command import cli, config_files, sweep
from genemodel.command.finetune import FinetuneSettings
from genemodel.errors import ConfigError
from genemodel.settings import (
    _SAID,
    either_seed,
    parse,
    renamed,
    renamed_keys,
    setting_types,
    to_values,
)
from genemodel.train.settings import PretrainSettings

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    _SAID.clear()
    return run


# -- names and nothing ---------------------------------------------------------------------------


def test_a_name_of_before_is_taken_with_one_note(typed: Said) -> None:
    first = typed("config", "finetune", "data=a.h5ad", "out=o", "batch_key=b")
    assert first[0] == 0 and yaml.safe_load(first[1])["input"] == "a.h5ad"
    assert first[2] == "Note: finetune: data= is now called input=.\n"
    again = typed("config", "finetune", "data=a.h5ad", "out=o", "batch_key=b")
    assert (again[1], again[2]) == (first[1], "")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("corpus build sources=[a.h5ad] out=c", "input", ["a.h5ad"]),
        ("corpus append path=c sources=a.h5ad", "corpus", "c"),
        ("corpus verify path=c", "corpus", "c"),
        ("corpus describe path=c html=p.html", "output", "p.html"),
        ("annotate query=a.h5ad output=b.h5ad", "input", "a.h5ad"),
        ("evaluate data=a.h5ad out=o", "input", "a.h5ad"),
        ("demo data=a.h5ad", "input", ["a.h5ad"]),
        ("import path=m", "input", "m"),
        ("export path=m", "model", "m"),
        ("describe path=m", "input", "m"),
        ("species name=rat genes=g orthologs=o out=v.tsv.gz", "output", "v.tsv.gz"),
        ("describe m", "input", "m"),
        ("corpus describe c", "corpus", "c"),
    ],
)
def test_names_of_before_and_first_words(typed: Said, words: str, name: str, value: object) -> None:
    status, out, _ = typed("config", *words.split())
    assert status == 0
    assert yaml.safe_load(out)[name] == value


def test_two_names_of_one_setting_are_refused(typed: Said) -> None:
    with pytest.raises(ConfigError, match="one setting by two names: leave data out"):
        renamed_keys({"input": 1, "data": 2}, {"data": "input"})


def test_a_call_and_a_class_answer_to_names_of_before(caplog: pytest.LogCaptureFixture) -> None:
    _SAID.clear()
    old = FinetuneSettings(data="a", out="o", task="impute")  # type: ignore[call-arg]
    assert old == FinetuneSettings(input="a", out="o", task="impute")
    assert old.data == "a"  # type: ignore[attr-defined]
    assert parse(FinetuneSettings, {"data": "a", "out": "o", "task": "impute"}) == old
    assert [r.message for r in caplog.records][0] == (
        "Note: gm.FinetuneSettings: data= is now called input=."
    )

    @renamed(query="adata")
    @either_seed
    def call(adata: str, seed: int = 0) -> tuple[str, int]:
        return adata, seed

    assert call(query="a", random_state=3) == ("a", 3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="give one"):
        call("a", seed=1, random_state=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("word", ["null", "None", "''", '""', ""])
def test_nothing_is_nothing_however_it_is_written(typed: Said, word: str) -> None:
    words = ["finetune", "input=a.h5ad", "out=o", "task=impute"]
    plain = typed("config", *words)[1]
    for key in ("model", "label_key", "batch_key", "layer", "species", "log.name"):
        assert typed("config", *words, f"{key}={word}")[:2] == (0, plain), key
    assert typed("config", "finetune", f"input={word}", "out=o", "task=impute")[0] == (
        0 if word == "None" else 2
    )


# -- before anything heavy -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    ["pretrain mdoel=tiny", "embed modle=x", "pretrain model=tny", "finetune optim.lrr=1",
     "pretrain experimnt=x", "evaluate -m seed=1,2", "corpus buld"],
)  # fmt: skip
def test_a_typing_mistake_is_answered_before_torch_is_loaded(words: str) -> None:
    code = (
        f"from genemodel.command.cli import main; import sys; assert main({words.split()}) == 2\n"
        "assert not {'torch', 'pandas', 'anndata', 'lightning', 'numba'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean" in done.stderr


def test_names_known_without_the_classes_are_those_of_the_classes() -> None:
    for name, verb in cli.VERBS.items():
        assert set(config_files.names_of(verb.config)) == set(
            setting_types(cli._reach(verb.settings))
        ), name
        assert set(verb.was.values()) | set(verb.takes) <= set(config_files.names_of(verb.config))


# -- experiments and runs again ------------------------------------------------------------------


def test_an_experiment_that_forgot_its_first_line_works(typed: Said, tmp_path: Path) -> None:
    text = "# Mine.\ntrainer:\n  max_steps: 7\nseed: 3\n"
    found = []
    for name, head in (("with", "# @package _global_\n"), ("without", "")):
        (tmp_path / name / "experiment").mkdir(parents=True)
        (tmp_path / name / "experiment" / "mine.yaml").write_text(head + text)
        found.append(
            typed("config", "pretrain", "experiment=mine", "corpus=c", "out=o", "trainer.devices=2",
                  "--config-dir", str(tmp_path / name))
        )  # fmt: skip
    assert found[0] == found[1]
    values = yaml.safe_load(found[1][1])
    assert (values["trainer"]["max_steps"], values["trainer"]["devices"], values["seed"]) == (
        7, 2, 3,
    )  # fmt: skip
    file = tmp_path / "without" / "experiment" / "mine.yaml"
    file.write_text(f"# Mine.\ndefaults:\n  - override /model: tiny\n{text}")
    status, _, err = typed("config", "pretrain", "experiment=mine", "--config-dir",
                           str(tmp_path / "without"))  # fmt: skip
    assert status == 2 and "its first line has to be `# @package _global_`" in err


def test_the_settings_of_a_run_run_again(typed: Said, tmp_path: Path) -> None:
    words = ["corpus=c", "out=o", "optim.lr=1e-5", "model=tiny", "trainer.max_steps=3"]
    settings = parse(PretrainSettings, cli._values("pretrain", words))
    (tmp_path / "settings.json").write_text(json.dumps({"settings": to_values(settings)}))
    printed = typed("config", "pretrain", *words)[1]
    (tmp_path / "printed.yaml").write_text(printed)
    (tmp_path / "plain.json").write_text(json.dumps(to_values(settings)))
    for source in ("settings.json", "printed.yaml", "plain.json", "."):
        assert typed("config", "pretrain", "--from", str(tmp_path / source)) == (0, printed, "")
    changed = typed(
        "config", "pretrain", f"--from={tmp_path}", "out=new", "tokens=short", "optim.lr=1.0"
    )[1]
    values = yaml.safe_load(changed)
    assert (values["out"], values["optim"]["lr"], values["trainer"]["max_steps"]) == ("new", 1.0, 3)
    short = config_files.values_of(config_files.config_folder() / "tokens" / "short.yaml")
    assert values["tokens"] == short


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pretrain --from", "--from needs a file"),
        ("pretrain --from none.json", "no such file; give the settings.json of a run"),
        ("pretrain --from {folder}", "holds none of settings.json, finetune.json"),
        ("pretrain --from {folder}/list.json", "holds no settings, but list"),
        ("pretrain --from {folder}/other.json", "unknown setting 'cooks'"),
        ("pretrain --from {folder}/ours.json experiment=pretrain_tiny", "leave it or --from out"),
        ("pretrain -m corpus=c out=o", "-m without a setting of several values"),
        ("pretrain -m corpus=c out=o seed=interval(0,1)", "an interval has no end of values"),
        ("pretrain -m corpus=c out=o seed=1,x", "'seed' must be a whole number, not the text 'x'"),
        ("pretrain -m corpus=c out=o model=tiny,tny", "did you mean model=tiny?"),
        ("pretrain corpus=c out=o seed=1,2", "run a job each with -m"),
    ],
)
def test_refusals(typed: Said, tmp_path: Path, words: str, expected: str) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"cooks": 1}')
    (tmp_path / "ours.json").write_text('{"seed": 1}')
    status, out, err = typed(*words.format(folder=tmp_path).split())
    assert (status, out) == (2, "")
    assert expected in err and err.count("\n") == 1


# -- sweeps --------------------------------------------------------------------------------------


def jobs(*words: str) -> list[tuple[str, ...]]:
    return [job.overrides for job in sweep.jobs_of(words, lambda group: ["tiny", "small"])]


def test_jobs_are_hydras_own() -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = ["a=1,2", "b=x", "c=range(3)", "d='u v',w", "e=[1,2],[3]"]
    parsed = OverridesParser.create().parse_overrides(words)
    (theirs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert [list(job) for job in jobs(*words)] == theirs
    assert jobs("model=glob(*)", "out=data/my file (1)") == [
        ("model=tiny", "out=data/my file (1)"), ("model=small", "out=data/my file (1)"),
    ]  # fmt: skip


def test_every_job_has_a_place_of_its_own(typed: Said) -> None:
    _, out, _ = typed("config", "pretrain", "-m", "corpus=c", "out=my runs/a", "seed=0,1",
                      "optim.lr=1e-3,2e-3")  # fmt: skip
    import shlex

    places = []
    for line in out.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["genemodel", "pretrain"]
        places.append(cli._values("pretrain", words[2:])["out"])
    assert places[0] == "my runs/a/seed=0_optim.lr=0.001" and len(set(places)) == 4
    _, out, _ = typed("config", "embed", "-m", "model=a/b,c/d", "input=x.h5ad", "output=y.z.h5ad")
    own = [cli._values("embed", shlex.split(line)[2:])["output"] for line in out.splitlines()]
    assert own == ["y.z.model=a-b.h5ad", "y.z.model=c-d.h5ad"]
    _, out, _ = typed("config", "pretrain", "-m", "corpus=c", "out=a,b")
    assert out == "genemodel pretrain corpus=c out=a\ngenemodel pretrain corpus=c out=b\n"


def test_names_that_are_long_or_alike_are_numbered() -> None:
    made = sweep.jobs_of(["a=x/y,x-y"], lambda group: [])
    assert [job.name for job in made] == ["job=0", "job=1"]
    made = sweep.jobs_of([f"a={'x' * 200},y"], lambda group: [])
    assert [job.name for job in made] == ["job=0", "a=y"]


def test_a_failed_job_ends_no_other_and_a_stop_ends_all(tmp_path: Path) -> None:
    made = sweep.jobs_of(["a=1,2,3"], lambda group: [])
    ran: list[list[str]] = []

    def start(words: list[str]) -> int:
        ran.append(words)
        return 2 if "a=2" in words else 0

    status, text = sweep.run("cook fast", made, tmp_path, ["--config-dir", "d"], start)
    assert status == 1 and ran[2] == ["cook", "fast", "a=3", "--config-dir", "d"]
    assert "2 of 3 jobs without an error" in text
    rows = [line.split("\t")[:2] for line in (tmp_path / sweep.TABLE).read_text().splitlines()]
    assert rows == [["job", "outcome"], ["a=1", "done"], ["a=2", "failed (2)"], ["a=3", "done"]]
    status, text = sweep.run("cook", made, None, [], lambda words: 130)
    assert status == 130 and text.count("not started") == 2


def test_a_sweep_of_real_jobs(typed: Said, tmp_path: Path) -> None:
    from genemodel.genes import GeneVocabulary

    GeneVocabulary.builtin().save(tmp_path / "a.tsv.gz")
    status, out, err = typed("describe", "-m", f"input={tmp_path}/a.tsv.gz,{tmp_path}/none.tsv.gz")
    assert status == 1, err
    assert "failed (2)" in out and "1 of 2 jobs without an error" in out
    assert "job 2 of 2" in err


def test_warnings_of_libraries_stay_off_the_terminal(tmp_path: Path) -> None:
    code = (
        "import sys, warnings\n"
        "from genemodel.command import cli\n"
        "def run(settings):\n"
        "    warnings.simplefilter('always')\n"
        "    warnings.warn_explicit('LeafSpec goes', FutureWarning, '/x/lightning/a.py', 1)\n"
        "    warnings.warn_explicit('ours', UserWarning, cli.__file__, 1)\n"
        "reach = cli._reach\n"
        "cli._reach = lambda name: run if name.endswith(':describe') else reach(name)\n"
        "sys.exit(cli.main(['describe', 'x']))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    assert done.returncode == 0
    assert "ours" in done.stderr and "LeafSpec" not in done.stderr


@dataclass(frozen=True)
class _Plain:
    text: str = ""
    names: tuple[str, ...] = ()
    place: Path | None = None
    needed: str = "x"


def test_parsing_nothing() -> None:
    for nothing in (None, "", "None"):
        assert parse(_Plain, {"text": nothing, "names": nothing, "place": nothing}) == _Plain()
    # Where something is meant, an empty text is a text; the word stays a word in a list.
    assert parse(_Plain, {"needed": ""}).needed == ""
    assert parse(_Plain, {"names": ["None"]}).names == ("None",)
