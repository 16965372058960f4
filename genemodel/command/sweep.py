"""Several jobs of one command line: ``genemodel VERB -m key=a,b group=x,y seed=range(3)``.

The words follow Hydra's grammar of sweeps, and every combination is a job of its own, with a folder
or file of its own beside the others'. A job is a process: one that fails, whatever of, ends no
other, and leaves no memory behind on a device. All of them are looked at before the first one
starts.
"""

import itertools
import logging
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genemodel.errors import ConfigError
from genemodel.writing import whole

logger = logging.getLogger(__name__)

TABLE = "sweep.tsv"
# Longest name of a job's folder: what is longer is numbered.
_LONGEST = 100
_STOPPED = 130


@dataclass(frozen=True)
class Job:
    """One combination.

    Attributes
    ----------
    name
        The settings that are its own, as its folder is called.
    overrides
        All of its words.
    """

    name: str
    overrides: tuple[str, ...]

    def words(self, verb: str, options: Sequence[str] = ()) -> list[str]:
        """Give the words of its command line, without the leading ``genemodel``."""
        return [*verb.split(), *self.overrides, *options]


def jobs_of(overrides: Sequence[str], choices: Callable[[str], Sequence[str]]) -> list[Job]:
    """Take a command line apart into jobs, in the order in which Hydra has them.

    Parameters
    ----------
    overrides
        Words that may hold several values.
    choices
        Gives the choices of a group, for ``group=glob(*)``.

    Raises
    ------
    ConfigError
        No word holds several values, or one holds endlessly many.
    """
    options = [_options(text, choices) for text in overrides]
    swept = [place for place, each in enumerate(options) if len(each) > 1]
    if not swept:
        raise ConfigError(
            "-m without a setting of several values: write them as seed=0,1,2, as "
            "'seed=range(3)' or, of a group, as model=tiny,small. For one run leave -m out"
        )
    jobs = []
    for number, words in enumerate(itertools.product(*options)):
        name = "_".join(_plain(words[place]) for place in swept)
        jobs.append(Job(name if len(name) <= _LONGEST else f"job={number}", words))
    if len({job.name for job in jobs}) < len(jobs):
        jobs = [Job(f"job={number}", job.overrides) for number, job in enumerate(jobs)]
    return jobs


def _plain(word: str) -> str:
    """Name a setting and its value by what every file system takes."""
    return re.sub(r"[^\w.=+-]+", "-", word.replace("'", "").replace('"', "")).strip("-.")


def _options(text: str, choices: Callable[[str], Sequence[str]]) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, Override
    from hydra.errors import HydraException

    key, equals, _ = text.partition("=")
    if not equals:
        return [text]
    try:
        parsed: Override = OverridesParser.create().parse_override(text)
        if not parsed.is_sweep_override():
            return [text]
        value: Any = parsed.value()
        if isinstance(value, Glob):
            found = list(value.filter(list(choices(key))))
        elif parsed.is_interval_sweep():
            raise ConfigError(f"{text!r}: an interval has no end of values; write range or a list")
        else:
            found = list(parsed.sweep_string_iterator())
    except HydraException:
        return [text]  # a path with brackets and blanks; what is wrong with it is said later
    if not found:
        raise ConfigError(f"{text!r}: holds no value")
    return [f"{key}={value}" for value in found]


def with_own_place(job: Job, values: dict[str, Any]) -> Job:
    """Give a job a folder or file of its own, named by what is its own.

    Parameters
    ----------
    job
        From :func:`jobs_of`.
    values
        Its settings; ``out`` is a folder, in which it gets one, and ``output`` a file, beside which
        it gets one. Those that are swept themselves stay.
    """
    for key in ("out", "output"):
        place = values.get(key)
        if not isinstance(place, str | Path) or f"{key}=" in job.name:
            continue
        path = Path(place)
        if key == "out":
            own = path / job.name
        else:
            ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
            own = path.with_name(f"{path.name.removesuffix(ending)}.{job.name}{ending}")
        kept = tuple(word for word in job.overrides if word.partition("=")[0] != key)
        escaped = str(own).replace("\\", "\\\\").replace("'", "\\'")
        return Job(job.name, (*kept, f"{key}='{escaped}'"))
    return job


def run(
    verb: str,
    jobs: Sequence[Job],
    out: Path | None,
    options: Sequence[str],
    start: Callable[[list[str]], int] | None = None,
) -> tuple[int, str]:
    """Run jobs one after another.

    Parameters
    ----------
    verb, options
        What stands before and behind the words of each.
    jobs
        What to run.
    out
        Folder in which the table of all jobs is kept; None for none.
    start
        Runs a command line and gives its exit status; by default as a process.

    Returns
    -------
    Exit status (0 where every job ended well, else 1; 130 when stopped) and the table to print.
    """
    start = _process if start is None else start
    rows: list[tuple[str, str, str]] = []
    stopped = False
    for number, job in enumerate(jobs, 1):
        logger.info("job %d of %d: %s", number, len(jobs), job.name)
        begin = time.perf_counter()
        status = start(job.words(verb, options))
        outcome = "done" if status == 0 else f"failed ({status})"
        rows.append((job.name, outcome, f"{time.perf_counter() - begin:.1f}"))
        stopped = status in (_STOPPED, -2)
        if out is not None:
            _write(out, rows)
        if stopped:
            rows[-1] = (job.name, "stopped", rows[-1][2])
            rows += [(left.name, "not started", "") for left in jobs[number:]]
            break
    failed = sum(outcome.startswith("failed") for _, outcome, _ in rows)
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {outcome:<12}  {seconds:>8}" for name, outcome, seconds in rows]
    lines.append(f"{len(rows) - failed} of {len(rows)} jobs without an error" if not stopped else
                 "stopped: the same command goes on where the verb does")  # fmt: skip
    text = "\n".join([f"{'job':<{width}}  {'outcome':<12}  {'seconds':>8}", *lines])
    return (_STOPPED if stopped else 1 if failed else 0), text


def _write(out: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with whole(out / TABLE) as partial:
        partial.write_text(
            "\n".join("\t".join(row) for row in (("job", "outcome", "seconds"), *rows)) + "\n"
        )


def _process(words: list[str]) -> int:
    child = subprocess.Popen([sys.executable, "-m", "genemodel", *words])
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            # The terminal has told the job too, which saves what it has.
            continue


def command_lines(verb: str, jobs: Sequence[Job], options: Sequence[str]) -> str:
    """Give the command line of every job, one a line, for a scheduler or ``xargs``."""
    return "\n".join(shlex.join(["genemodel", *job.words(verb, options)]) for job in jobs)
