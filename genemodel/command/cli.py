"""The command ``genemodel VERB [group=choice] [key=value ...]``.

A verb is one line of :data:`VERBS` and one file under ``configs/``. The line names a settings
dataclass and a function that takes it; both are reached only when the verb runs, so that the help
answers before any heavy library is imported. Whatever a verb does, the library can do without this
module.
"""

import importlib
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from genemodel import __version__
from genemodel.command import config_files, sweep
from genemodel.errors import ConfigError, GenemodelError
from genemodel.settings import (
    MissingSettingError,
    nearest,
    note_once,
    parse,
    renamed_keys,
    to_values,
)


@dataclass(frozen=True)
class Verb:
    """What a word on the command line stands for.

    Attributes
    ----------
    summary
        One line for the list of verbs. The opening comment of the YAML file says the rest.
    config
        The file under ``configs/``, without ``.yaml``.
    settings
        The settings dataclass, ``module:Class``.
    function
        What runs, ``module:function``: takes the settings, returns text or a path to print or None.
    examples
        Two command lines that show the verb at work, without the leading ``genemodel``.
    takes
        Settings that the first words without ``=`` stand for, in order.
    was
        Names that settings had before -> their names of today.
    """

    summary: str
    config: str
    settings: str
    function: str
    examples: tuple[str, str]
    takes: tuple[str, ...] = ()
    was: Mapping[str, str] = field(default_factory=dict)


VERBS: dict[str, Verb] = {
    "demo": Verb(
        summary="the whole path in minutes on a CPU, with a report",
        config="demo",
        settings="genemodel.command.demo:DemoSettings",
        function="genemodel.command.demo:demo",
        examples=("demo", "demo input=lung.h5ad species=human out=runs/lung_demo"),
        was={"data": "input"},
    ),
    "corpus build": Verb(
        summary="make a corpus from files of raw counts",
        config="corpus_build",
        settings="genemodel.command.verbs:CorpusBuildSettings",
        function="genemodel.command.verbs:build_corpus",
        examples=(
            "corpus build 'input=[a.h5ad,b.h5ad]' out=corpora/mine",
            "corpus build 'input=[data/*.h5ad]' out=corpora/lab species=mouse donor_key=animal",
        ),
        was={"sources": "input"},
    ),
    "corpus append": Verb(
        summary="add files to a corpus",
        config="corpus_append",
        settings="genemodel.command.verbs:CorpusAppendSettings",
        function="genemodel.command.verbs:append_to_corpus",
        examples=(
            "corpus append corpus=corpora/mine input=c.h5ad",
            "corpus append corpus=corpora/mine sheet=samples.tsv",
        ),
        was={"path": "corpus", "sources": "input"},
    ),
    "corpus verify": Verb(
        summary="check every file of a corpus and name what is broken",
        config="corpus_verify",
        settings="genemodel.command.verbs:CorpusVerifySettings",
        function="genemodel.command.verbs:verify_corpus",
        examples=("corpus verify corpora/mine", "corpus verify corpus=/archive/corpora/lab"),
        takes=("corpus",),
        was={"path": "corpus"},
    ),
    "corpus describe": Verb(
        summary="report on a corpus: sources, depth, labels, what was dropped",
        config="corpus_describe",
        settings="genemodel.command.verbs:CorpusDescribeSettings",
        function="genemodel.command.verbs:describe_corpus",
        examples=(
            "corpus describe corpora/mine",
            "corpus describe corpus=corpora/mine output=corpus.html",
        ),
        takes=("corpus",),
        was={"path": "corpus", "html": "output"},
    ),
    "pretrain": Verb(
        summary="pre-train a model on a corpus",
        config="pretrain",
        settings="genemodel.train.settings:PretrainSettings",
        function="genemodel.train.recipe:pretrain",
        examples=(
            "pretrain experiment=pretrain_tiny corpus=corpora/mine out=runs/tiny",
            "pretrain corpus=corpora/mine out=runs/small optim.lr=5e-4 log=wandb",
        ),
    ),
    "finetune": Verb(
        summary="adapt a model to a file: batch-robust embedding, imputed counts, labels",
        config="finetune",
        settings="genemodel.command.finetune:FinetuneSettings",
        function="genemodel.command.finetune:finetune",
        examples=(
            "finetune input=lung.h5ad batch_key=donor out=runs/lung",
            "finetune input=lung.h5ad 'batch_key=[donor,study]' label_key=cell_type task=both "
            "model=runs/small/bundle backbone=lora backbone.rank=8 out=runs/lung_lora",
        ),
        was={"data": "input"},
    ),
    "embed": Verb(
        summary="write cell embeddings for a file of any size",
        config="embed",
        settings="genemodel.embedding.embed:EmbedSettings",
        function="genemodel.embedding.embed:embed_file",
        examples=(
            "embed model=runs/small/bundle input=lung.h5ad output=lung.embedded.h5ad",
            "embed model=runs/small/bundle input=a.h5 output=b.h5ad species=mouse device=[0,1]",
        ),
    ),
    "impute": Verb(
        summary="denoise the counts of a file, with calibrated uncertainty",
        config="impute",
        settings="genemodel.imputation.impute:ImputeSettings",
        function="genemodel.imputation.impute:impute_file",
        examples=(
            "impute input=lung.h5ad output=lung.imputed.h5ad uncertainty=true",
            "impute input=lung.h5ad output=lung.zarr batch_key=donor batch=mean library=median",
        ),
    ),
    "annotate": Verb(
        summary="give cells the types of a labelled reference, of another species too",
        config="annotate",
        settings="genemodel.annotation.annotate:AnnotateSettings",
        function="genemodel.annotation.annotate:annotate_file",
        examples=(
            "annotate input=lung.h5ad reference=atlas.h5ad label_key=cell_type "
            "batch_key=[donor] output=lung.labelled.h5ad",
            "annotate model=runs/atlas/model input=mice.h5ad reference=atlas.h5ad "
            "label_key=cell_type species=mouse reference_species=human output=mice.labelled.h5ad",
        ),
        was={"query": "input"},
    ),
    "perturb": Verb(
        summary="change genes of cells in silico, and test where the cells go",
        config="perturb",
        settings="genemodel.perturbation.settings:PerturbSettings",
        function="genemodel.perturbation.perturb:perturb_file",
        examples=(
            "perturb model=runs/small/bundle input=lung.h5ad 'genes=[STAT1,IRF1]' out=stat1",
            "perturb model=runs/small/bundle input=lung.h5ad state_key=condition "
            "start_state=disease goal_state=healthy donor_key=donor out=targets",
        ),
    ),
    "genes": Verb(
        summary="write vectors or labels of genes as a table",
        config="genes",
        settings="genemodel.gene_tasks.genes_file:GenesSettings",
        function="genemodel.gene_tasks.genes_file:genes_file",
        examples=(
            "genes model=runs/small/bundle output=genes.tsv.gz",
            "genes model=runs/small/bundle input=lung.h5ad kind=contextual label_key=cell_type "
            "output=lung_genes.tsv.gz",
        ),
    ),
    "network": Verb(
        summary="gene regulatory networks from a model and from cells, scored side by side",
        config="network",
        settings="genemodel.networks.settings:NetworkSettings",
        function="genemodel.networks.network:network_file",
        examples=(
            "network input=lung.h5ad model=runs/small/bundle tfs=tfs.tsv out=networks/lung",
            "network input=lung.h5ad model=runs/small/bundle truth=collectri.tsv donor_key=donor "
            "'methods=[attention,jacobian,pearson,grnboost]' out=networks/lung",
        ),
    ),
    "trajectory": Verb(
        summary="place cells in time, predict a time between two others, rank what moves cells",
        config="trajectory",
        settings="genemodel.trajectories.settings:TrajectorySettings",
        function="genemodel.trajectories.trajectory:trajectory_file",
        examples=(
            "trajectory input=embryo.h5ad time_key=day donor_key=line out=days",
            "trajectory input=islets.h5ad time_key=stage 'order=[ductal,endocrine,beta]' "
            "model=runs/small/bundle out=stages",
        ),
    ),
    "respond": Verb(
        summary="predict responses to perturbations, and score them beside baselines",
        config="respond",
        settings="genemodel.response.settings:RespondSettings",
        function="genemodel.response.respond:respond_file",
        examples=(
            "respond input=screen.h5ad perturbation_key=target control=non-targeting "
            "holdout=targets knowledge=reactome.gmt.gz model=runs/small/bundle out=responses",
            "respond input=pbmc.h5ad perturbation_key=condition control=ctrl holdout=cell_types "
            "label_key=cell_type batch_key=donor out=ifnb",
        ),
    ),
    "evaluate": Verb(
        summary="score models, published methods and controls on the same cells",
        config="evaluate",
        settings="genemodel.evaluation.evaluate:EvaluateSettings",
        function="genemodel.evaluation.sizes:run",
        examples=(
            "evaluate input=lung.h5ad batch_key=donor label_key=cell_type out=scores/lung "
            "models=runs/small/bundle",
            "evaluate input=lung.h5ad task=impute out=scores/lung_impute",
        ),
        was={"data": "input"},
    ),
    "evaluate genes": Verb(
        summary="score what models know of labelled genes, beside baselines",
        config="evaluate_genes",
        settings="genemodel.evaluation.gene_tasks:EvaluateGenesSettings",
        function="genemodel.evaluation.gene_tasks:run_evaluate_genes",
        examples=(
            "evaluate genes input=lung.h5ad genes=tasks.tsv models=runs/tiny/bundle out=lung_genes",
            "evaluate genes input=lung.h5ad genes=tasks.tsv tasks=[dosage_tf] gene_sets=go.gmt "
            "models=models/geneformer backbones=[last] out=scores/genes",
        ),
    ),
    "describe": Verb(
        summary="say what a corpus, a model, a vocabulary or a knowledge table holds",
        config="describe",
        settings="genemodel.command.verbs:DescribeSettings",
        function="genemodel.command.verbs:describe",
        examples=("describe runs/small/bundle", "describe input=four_species.tsv.gz"),
        takes=("input",),
        was={"path": "input"},
    ),
    "import": Verb(
        summary="make a bundle of a published model: Geneformer or GeneCompass",
        config="import",
        settings="genemodel.importers.importing:ImportSettings",
        function="genemodel.importers.importing:run_import",
        examples=(
            "import Geneformer/Geneformer-V2-104M out=models/geneformer",
            "import GeneCompass/pretrained_models/GeneCompass_Base folded=true verify=true",
        ),
        takes=("input",),
        was={"path": "input"},
    ),
    "export": Verb(
        summary="write an imported model as transformers reads it",
        config="export",
        settings="genemodel.importers.exporting:ExportSettings",
        function="genemodel.importers.exporting:run_export",
        examples=(
            "export models/geneformer format=hf",
            "export runs/lung/backbone/bundle format=hf out=lung_geneformer",
        ),
        takes=("model",),
        was={"path": "model"},
    ),
    "push": Verb(
        summary="publish a model on the Hugging Face hub, with a page about it",
        config="push",
        settings="genemodel.hub.push:PushSettings",
        function="genemodel.hub.push:run_push",
        examples=(
            "push runs/small/bundle hf://our-lab/small-mouse",
            "push runs/lung/model hf://our-lab/lung licence=cc-by-4.0 private=true",
        ),
        takes=("model", "to"),
    ),
    "knowledge build": Verb(
        summary="make gene vectors from families, networks, pathways, promoters or a corpus",
        config="knowledge_build",
        settings="genemodel.knowledge.building:KnowledgeBuildSettings",
        function="genemodel.knowledge.building:run_build",
        examples=(
            "knowledge build kind=family 'input=[hgnc_families.tsv.gz]'",
            "knowledge build kind=grn 'input=[collectri.tsv,dorothea.tsv]' name=tf dimensions=32",
        ),
    ),
    "ablate": Verb(
        summary="say what knowledge is worth: the same run with, without and shuffled",
        config="ablate",
        settings="genemodel.knowledge.ablation:AblateSettings",
        function="genemodel.knowledge.ablation:run_ablate",
        examples=(
            "ablate corpus=corpora/mine out=runs/priors 'knowledge=[none,family,grn,shuffled]'",
            "ablate corpus=corpora/mine out=runs/priors trainer.max_steps=2000 seeds=5 "
            "'knowledge=[none,family+grn,proteins.tsv.gz]'",
        ),
    ),
    "species": Verb(
        summary="add a species to a gene vocabulary",
        config="species",
        settings="genemodel.command.verbs:SpeciesSettings",
        function="genemodel.command.verbs:species",
        examples=(
            "species name=zebrafish genes=genes_zebrafish.tsv.gz orthologs=human_zebrafish.tsv.gz "
            "output=human_mouse_zebrafish.tsv.gz",
            "species name=rat genes=rat.tsv orthologs=mouse_rat.tsv to=mouse "
            "vocabulary=human_mouse_zebrafish.tsv.gz output=four_species.tsv.gz",
        ),
        was={"out": "output"},
    ),
}

_CONFIG_SUMMARY = "print the settings that a verb would run with"
# Options with what they do, as the overview lists them.
_OPTIONS = {
    "--help": "what a verb does, its settings and two examples",
    "--config-dir DIR": "a folder with groups of your own, such as experiment/mine.yaml",
    "--from FILE": "start from the settings.json of a run, or what `genemodel config` printed",
    "-m": "a job for every combination of values: seed=0,1,2 model=tiny,small",
    "--version": "the version",
}
_NAMES = {**{name.split()[0]: name.split()[0] for name in _OPTIONS},
          "-h": "--help", "--multirun": "-m"}  # fmt: skip
_WITH_VALUE = {
    "--config-dir": "a folder: --config-dir DIR",
    "--from": "a file: --from RUN/settings.json",
}
_PACKAGE = Path(__file__).resolve().parents[1]
_USER_ERROR = 2
_STOPPED = 130


@dataclass(frozen=True)
class _Options:
    """Words with dashes: the user's own folder, the run to start from, those without a value."""

    user_folder: Path | None = None
    run: Path | None = None
    asked: frozenset[str] = frozenset()

    def words(self) -> list[str]:
        """Give those again that a job of a sweep takes over."""
        folder = [] if self.user_folder is None else ["--config-dir", str(self.user_folder)]
        return folder + ([] if self.run is None else ["--from", str(self.run)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    argv
        The words after ``genemodel``; those of the process by default.

    Returns
    -------
    0 when done, 2 after an error that the user can mend, 130 when stopped with Ctrl-C. A mistake of
    the program itself is raised, so that its traceback can be reported.
    """
    try:
        with _progress_on_stderr(), _warnings_of_ours():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except GenemodelError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("genemodel: stopped", file=sys.stderr)
        return _STOPPED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk or a forbidden folder is the machine's, not the program's.
        if error.filename is None and error.errno is None:
            raise
        named = f": {error.filename}" if error.filename else ""
        return _complain(f"{error.strerror or error}{named}")
    except Exception as error:
        error.add_note(
            f"This is a mistake in genemodel {__version__}, not in what you typed: please report "
            "it with the text above and the command."
        )
        raise


def _complain(message: str) -> int:
    print(f"genemodel: error: {message}", file=sys.stderr)
    return _USER_ERROR


@contextmanager
def _progress_on_stderr() -> Iterator[None]:
    """Show the library's progress lines while a command runs; other libraries speak for themselves.

    The handler is not the root's, where messages of libraries that have their own would come twice.
    """
    library = logging.getLogger("genemodel")
    handler = logging.StreamHandler(sys.stderr)
    level = library.level
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


@contextmanager
def _warnings_of_ours() -> Iterator[None]:
    """Keep the terminal free of what libraries have to say to programmers.

    Only here, in a process that is a command's own: the library filters nothing. The filter comes
    before any that the environment asks for, and before what libraries set while they load.
    """
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if Path(filename).is_relative_to(_PACKAGE):
            shown(message, category, filename, *rest, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _run(words: list[str]) -> int:
    words, options = _options(words)
    user_folder, asked = options.user_folder, options.asked
    if "--version" in asked:
        print(f"genemodel {__version__}")
        return 0
    if not words:
        print(_overview())
        return 0
    if words[0] == "config":
        return _show_config(words[1:], options)
    name, overrides = _verb_of(words)
    if name not in VERBS:  # the first word of several verbs, such as `corpus`
        print(_overview(name))
        return 0 if "--help" in asked else _USER_ERROR
    if "--help" in asked:
        print(_verb_help(name, user_folder))
        return 0
    verb = VERBS[name]
    if "-m" in asked:
        jobs, out = _jobs(name, overrides, options)
        status, table = sweep.run(name, jobs, out, options.words())
        print(table)
        return status
    values = _values(name, overrides, options)  # refuses before anything heavy is imported
    settings = parse(_reach(verb.settings), values)
    outcome = _reach(verb.function)(settings)
    if isinstance(outcome, str | Path):
        print(outcome)
    return 0


def _options(words: list[str]) -> tuple[list[str], _Options]:
    """Take the options out of the words; they may stand anywhere."""
    rest: list[str] = []
    asked: set[str] = set()
    given: dict[str, str] = {}
    queue = iter(words)
    for word in queue:
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            rest.append(word)
        elif option in _WITH_VALUE:
            given[option] = value if equals else next(queue, "")
            if not given[option]:
                raise ConfigError(f"{option} needs {_WITH_VALUE[option]}")
        elif word in _NAMES:
            asked.add(_NAMES[word])
        else:
            near = nearest(option, [name for name in _NAMES if name.startswith("--")])
            # `--model=x` is a setting with dashes too many, not an option mistyped.
            near = near if near and near[2] == option.lstrip("-")[:1] else None
            raise ConfigError(
                f"unknown option {option!r}"
                + (f": did you mean {near!r}?" if near else f"; there are {', '.join(_NAMES)}")
                + " Settings are written key=value, without dashes."
            )
    user_folder = None
    if (folder := given.get("--config-dir")) is not None:
        user_folder = config_files.checked_user_folder(Path(folder))
    run = given.get("--from")
    return rest, _Options(user_folder, None if run is None else Path(run), frozenset(asked))


def _first_words() -> list[str]:
    return list(dict.fromkeys(name.split()[0] for name in VERBS))


def _verb_of(words: list[str]) -> tuple[str, list[str]]:
    """Split the words into the verb (one word or two) and its overrides."""
    first, second = words[0], words[1] if len(words) > 1 else ""
    if f"{first} {second}" in VERBS:
        return f"{first} {second}", words[2:]
    if first in VERBS:
        return first, words[1:]
    seconds = [name.split()[1] for name in VERBS if name.split()[0] == first]
    if seconds:
        if not second:
            return first, []
        near = nearest(second, seconds)
        raise ConfigError(
            f"unknown verb '{first} {second}'"
            + (f": did you mean '{first} {near}'?" if near else "")
            + f" There are: {', '.join(f'{first} {word}' for word in seconds)}"
        )
    near = nearest(first, [*_first_words(), "config"])
    raise ConfigError(
        f"unknown verb {first!r}"
        + (f": did you mean {near!r}?" if near else "")
        + " `genemodel --help` lists the verbs."
    )


def _reach(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _spelt(name: str, overrides: Iterable[str]) -> list[str]:
    """Write words as ``key=value`` with the names of today."""
    verb = VERBS[name]
    words = list(overrides)
    for place, key in enumerate(verb.takes[: len(words)]):
        if "=" in words[place]:
            break
        words[place] = f"{key}={words[place]}"
    for place, word in enumerate(words):
        key, equals, value = word.partition("=")
        if equals and key in verb.was:
            note_once(f"Note: {name}: {key}= is now called {verb.was[key]}=.")
            words[place] = f"{verb.was[key]}={value}"
    return words


def _values(name: str, overrides: Iterable[str], options: _Options | None = None) -> dict[str, Any]:
    """Compose the values of a verb and refuse names that nothing reads.

    Nothing of the verb is imported for it: a typing mistake is answered at once.
    """
    verb, options = VERBS[name], options or _Options()
    base = None
    if options.run is not None:
        base = renamed_keys(config_files.values_of_run(options.run), verb.was, name)
    values = config_files.compose(
        verb.config, _spelt(name, overrides), user_folder=options.user_folder, base=base
    )
    values = renamed_keys(values, verb.was, name)  # those of an experiment
    names = config_files.names_of(verb.config)
    groups = [group for group in config_files.defaults_of(verb.config) if group not in names]
    for key in values:
        near = nearest(key, [*names, *groups])
        # Groups such as `experiment` are no settings.
        if key not in names and near in groups:
            raise ConfigError(f"unknown setting {key!r}: did you mean {near!r}?")
    config_files.refuse_unknown(values, names)
    return values


def _jobs(
    name: str, overrides: list[str], options: _Options
) -> tuple[list[sweep.Job], Path | None]:
    """Give the jobs of a sweep, each looked at, and the folder that all of them lie in."""
    jobs, folders = [], set()

    def choices(group: str) -> list[str]:
        return list(config_files.choices(group, options.user_folder))

    for job in sweep.jobs_of(_spelt(name, overrides), choices):
        values = _values(name, job.overrides, options)
        settings = parse(_reach(VERBS[name].settings), values)
        own = sweep.with_own_place(job, to_values(settings))
        if own is not job and (out := getattr(settings, "out", None)) is not None:
            folders.add(Path(out))
        jobs.append(own)
    return jobs, folders.pop() if len(folders) == 1 else None


def _show_config(words: list[str], options: _Options) -> int:
    """Print what a verb would run with: composed, checked, complete."""
    if not words or "--help" in options.asked:
        print(
            f"genemodel config VERB ...: {_CONFIG_SUMMARY}\n\n"
            "Takes the same words as the verb itself, checks them and runs nothing. With -m it "
            "prints the\ncommand line of every job, to be given to a scheduler.\n\nexamples"
        )
        for name in list(VERBS)[:2]:
            print(_example(f"config {VERBS[name].examples[0]}"))
        return 0
    name, overrides = _verb_of(words)
    if name not in VERBS:
        raise ConfigError(f"'{name}' is not a complete verb; `genemodel {name}` lists them")
    if "-m" in options.asked:
        jobs, _ = _jobs(name, overrides, options)
        print(sweep.command_lines(name, jobs, options.words()))
        return 0
    values = _values(name, overrides, options)
    try:
        values = to_values(parse(_reach(VERBS[name].settings), values))
    except MissingSettingError as missing:
        print(f"genemodel: to run this, {missing}", file=sys.stderr)
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return 0


def _width() -> int:
    return max(60, min(100, shutil.get_terminal_size().columns))


def _wrapped(text: str, width: int) -> list[str]:
    """Break at blanks only: paths, keys and names stay whole, to be copied."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _table(rows: Sequence[tuple[str, str]], indent: int = 2) -> str:
    """Lay out names and their meaning in two columns, the second one wrapped."""
    column = min(34, max((len(left) for left, _ in rows), default=0)) + 2
    lines: list[str] = []
    for left, right in rows:
        wrapped = _wrapped(right, max(20, _width() - column - indent)) or [""]
        if len(left) + 2 > column:
            lines.append(left)
        else:
            lines.append(f"{left:<{column}}{wrapped.pop(0)}".rstrip())
        lines += [f"{'':<{column}}{line}" for line in wrapped if line]
    return textwrap.indent("\n".join(lines), " " * indent)


def _overview(first_word: str | None = None) -> str:
    names = [name for name in VERBS if first_word in (None, name.split()[0])]
    rows = [(name, VERBS[name].summary) for name in names]
    if first_word is None:
        rows.append(("config VERB ...", _CONFIG_SUMMARY))
    verb = "VERB" if first_word is None else f"{first_word} VERB"
    return "\n".join(
        [
            f"genemodel {__version__}: foundation models of single-cell expression",
            "",
            f"usage: genemodel {verb} [group=choice] [key=value ...] [options]",
            "",
            "verbs",
            _table(rows),
            "",
            "options",
            _table(list(_OPTIONS.items())),
            "",
            f"`genemodel {verb} --help` shows what a verb does, its settings and two examples.",
        ]
    )


def _verb_help(name: str, user_folder: Path | None) -> str:
    verb = VERBS[name]
    file = config_files.config_folder() / f"{verb.config}.yaml"
    parts = [f"genemodel {name}: {verb.summary}"]
    if opening := config_files.opening_comment(file):
        parts += ["", *_wrapped(opening, _width())]
    groups = config_files.defaults_of(verb.config)
    if rows := [_setting_row(entry) for entry in config_files.entries(file)]:
        parts += ["", "settings (key=value)", _table(rows)]
    for group, chosen in groups.items():
        known = config_files.choices(group, user_folder)
        if not known:
            continue
        parts += ["", f"group {group} ({group}=choice; {chosen or 'none'} by default)"]
        parts.append(_table(list(known.items())))
        chosen_file = config_files.config_folder() / group / f"{chosen}.yaml"
        if chosen is not None and chosen_file.is_file():
            inner = [_setting_row(e, f"{group}.") for e in config_files.entries(chosen_file)]
            parts.append(_table(inner, indent=4))
    parts += ["", "examples", *map(_example, verb.examples)]
    return "\n".join(parts)


def _example(words: str) -> str:
    """Lay out a command line so that it can be copied, over several lines where it is long."""
    lines = _wrapped(f"genemodel {words}", _width() - 6)
    return "  " + " \\\n      ".join(lines)


def _setting_row(entry: config_files.Entry, prefix: str = "") -> tuple[str, str]:
    value = "(required)" if entry.value == "???" else entry.value
    return f"{prefix}{entry.key}={value}", entry.comment
