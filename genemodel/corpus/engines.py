"""Who does the units of a build: this process, a pool of processes, or a Dask cluster.

An engine calls ``task(bench, item, desk)`` for every item and gives back the results as they come.
Items that do not travel (cells in memory) are done by this process, whoever does the others.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from genemodel.corpus.units import Bench, Desk, Input
from genemodel.errors import ConfigError, DataError, GenemodelError

log = logging.getLogger(__name__)

# A cluster that grows on demand needs a while for its first worker.
_FIRST_WORKER_S = 60
_CONNECT_S = 20

type Task[Item, Result] = Callable[[Bench, Item, Desk], Result]
type Results[Result] = Iterator[tuple[int, Result]]


@dataclass(frozen=True)
class EngineSettings:
    """Who builds; see :meth:`Corpus.build`."""

    workers: int = 1
    engine: Literal["processes", "dask"] = "processes"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}: it must be at least 1")
        if self.engine not in ("processes", "dask"):
            raise ConfigError(f"engine is {self.engine!r}: it must be 'processes' or 'dask'")
        if self.engine == "processes" and self.scheduler is not None:
            raise ConfigError(
                f"scheduler={self.scheduler} is for engine=dask; processes of this machine are "
                "set by workers=N"
            )
        if self.engine == "dask" and not self.scheduler:
            raise ConfigError(
                "engine=dask needs scheduler=tcp://HOST:8786 (or the scheduler's FILE.json) of a "
                "running cluster; on one machine workers=N does the same without one"
            )
        if self.engine == "dask" and self.workers > 1:
            raise ConfigError(
                f"workers={self.workers} is for processes of this machine; a Dask cluster says "
                "itself how many it has. Leave workers out"
            )

    @contextlib.contextmanager
    def start(self, bench: Bench, desk: Desk) -> "Iterator[Engine]":
        """Start the engine, and end it on the way out."""
        engine: Engine
        if self.engine == "dask":
            engine = DaskCluster(self.scheduler or "", bench, desk)
        elif self.workers > 1:
            engine = Processes(self.workers, desk)
        else:
            engine = OneProcess(desk)
        try:
            yield engine
        finally:
            engine.close()
            desk.close()


class Engine(Protocol):
    """Does a task for many items."""

    def results[Item, Result](
        self, task: Task[Item, Result], bench: Bench, items: Sequence[Item], inputs: Sequence[Input]
    ) -> Results[Result]:
        """Yield (position, result) as they come; of several errors the first item's is raised.

        Parameters
        ----------
        task
            Function of a module, to be found by other processes.
        bench
            What all items share.
        items
            What to do, each for the source at the same place of ``inputs``.
        inputs
            Sources of the items.
        """

    def close(self) -> None:
        """End it."""


class OneProcess:
    """The process that builds, one item after the other."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def results[Item, Result](
        self, task: Task[Item, Result], bench: Bench, items: Sequence[Item], inputs: Sequence[Input]
    ) -> Results[Result]:
        """See :class:`Engine`."""
        for position, item in enumerate(items):
            yield position, task(bench, item, self._desk)

    def close(self) -> None:
        """See :class:`Engine`."""


def _split(inputs: Sequence[Input]) -> tuple[list[int], list[int]]:
    """Positions of the items that travel, and of those that do not."""
    away = [i for i, each in enumerate(inputs) if each.travels]
    return away, [i for i, each in enumerate(inputs) if not each.travels]


# -- processes of this machine -------------------------------------------------------------------

_desk = Desk()


class _Stopped(BaseException):
    """The process that builds asked its workers to stop."""


def _begin(stop: Any) -> None:
    """Make a new process a worker."""
    global _desk
    # Ctrl-C reaches every process of a terminal; only the one that builds decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("genemodel").setLevel(logging.ERROR)  # the survey carries the notes
    parent = multiprocessing.parent_process()
    assert parent is not None

    def outlive_nobody() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=outlive_nobody, daemon=True).start()

    def go_on() -> None:
        if stop.is_set():
            raise _Stopped

    _desk = Desk(go_on=go_on)


def _at_a_desk[Item, Result](task: Task[Item, Result], bench: Bench, item: Item) -> Result:
    return task(bench, item, _desk)


class Processes:
    """A pool of processes of this machine."""

    def __init__(self, n: int, desk: Desk) -> None:
        # Not forked: numba, zarr and HDF5 have threads and locks that a fork would break.
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._desk = desk
        self._pool = ProcessPoolExecutor(n, context, _begin, (self._stop,))

    def results[Item, Result](
        self, task: Task[Item, Result], bench: Bench, items: Sequence[Item], inputs: Sequence[Input]
    ) -> Results[Result]:
        """See :class:`Engine`."""
        away, here = _split(inputs)
        waiting: dict[Future[Result], int] = {}
        done: set[Future[Result]] = set()
        try:
            for i in away:
                waiting[self._pool.submit(_at_a_desk, task, bench, items[i])] = i
            for i in here:
                yield i, task(bench, items[i], self._desk)
            for future in as_completed(waiting):
                done.add(future)
                if future.exception() is not None:
                    self._refuse(future, waiting)
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            left = [i for f, i in waiting.items() if f not in done or f.exception()] or away
            named = dict.fromkeys(inputs[i].label for i in sorted(left))
            raise DataError(
                f"a worker process ended without a word while {_some(list(named))} "
                f"{'was' if len(named) == 1 else 'were'} being read: killed, or out of memory. "
                "Give the same command again, it goes on from the units that are done; with fewer "
                "workers or a smaller chunk_cells it needs less memory. (A script must call this "
                "below `if __name__ == '__main__':`.)"
            ) from error

    def _refuse[Result](self, failed: Future[Result], waiting: dict[Future[Result], int]) -> None:
        """Raise the error of the first item, as one process would, once the others have ended."""
        error = failed.exception()
        if isinstance(error, BrokenProcessPool):
            raise error
        for future, i in waiting.items():
            if i > waiting[failed]:
                future.cancel()
        for future in sorted(waiting, key=waiting.__getitem__):
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error

    def close(self) -> None:
        """See :class:`Engine`."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def _some(names: Sequence[str], n: int = 4) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n:,} more" if len(names) > n else "")


# -- a Dask cluster ------------------------------------------------------------------------------

# By work folder and thread: a worker has several threads and may serve several builds.
_desks: dict[tuple[str, int], Desk] = {}


def _at_a_dask_desk[Item, Result](task: Task[Item, Result], bench: Bench, item: Item) -> Result:
    key = str(bench.folder), threading.get_ident()
    return task(bench, item, _desks.setdefault(key, Desk()))


def _leave_desks(folder: str) -> None:
    for key in [key for key in _desks if key[0] == folder]:
        _desks.pop(key).close()


def _introduce(folder: str, token: str) -> tuple[str, bool]:
    """Say which genemodel a worker has, and whether it sees a file of the process that builds."""
    from genemodel import __version__

    return f"genemodel {__version__}", (Path(folder) / token).is_file()


class DaskCluster:
    """The workers of a running Dask cluster; all machines share the disk that is written to."""

    def __init__(self, scheduler: str, bench: Bench, desk: Desk) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise ConfigError(
                "engine=dask needs the package distributed: pip install 'genemodel[dask]'"
            ) from error
        self._desk, self._scheduler, self._folder = desk, scheduler, bench.folder
        where = (
            {"scheduler_file": scheduler} if scheduler.endswith(".json") else {"address": scheduler}
        )
        try:
            self._client = Client(**where, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"scheduler={scheduler} cannot be reached ({str(error).strip() or 'no answer'}). "
                "Start one with `dask scheduler`, or give the address that it prints"
            ) from error
        try:
            self._check(bench)
        except BaseException:
            self._client.close()
            raise

    def _check(self, bench: Bench) -> None:
        """Refuse a cluster that cannot do it: no worker, another genemodel, another disk."""
        try:
            self._client.wait_for_workers(1, timeout=_FIRST_WORKER_S)
        except TimeoutError as error:
            raise ConfigError(
                f"scheduler={self._scheduler} has no worker. Start some: `dask worker "
                f"{self._scheduler}`"
            ) from error
        token = self._folder / f"seen-{uuid.uuid4().hex}"
        token.touch()
        try:
            answers = self._client.run(_introduce, str(self._folder), token.name, on_error="return")
        finally:
            token.unlink(missing_ok=True)
        for worker, answer in answers.items():
            if isinstance(answer, BaseException):
                raise ConfigError(
                    f"Dask worker {worker} cannot run genemodel ({answer}). Start the workers in "
                    "an environment like this one"
                )
            version, sees = answer
            if version != bench.made_by:
                raise ConfigError(
                    f"Dask worker {worker} has {version}, here is {bench.made_by}: the corpus "
                    "would depend on which worker does what. Install one version everywhere"
                )
            if not sees:
                raise ConfigError(
                    f"Dask worker {worker} does not see {self._folder}: every machine must share "
                    "the file system that the corpus is built on, under one path. Put the corpus "
                    "on a shared disk"
                )

    def results[Item, Result](
        self, task: Task[Item, Result], bench: Bench, items: Sequence[Item], inputs: Sequence[Input]
    ) -> Results[Result]:
        """See :class:`Engine`."""
        from distributed import as_completed as as_done

        away, here = _split(inputs)
        waiting: dict[Any, tuple[int, Any]] = {}
        try:
            for i in away:
                future = self._client.submit(_at_a_dask_desk, task, bench, items[i], pure=False)
                waiting[future.key] = i, future
            for i in here:
                yield i, task(bench, items[i], self._desk)
            futures = [f for _, f in waiting.values()]
            for future in as_done(futures, loop=self._client.loop):
                position = waiting[future.key][0]
                if future.status != "finished":
                    self._refuse(future, inputs[position])
                yield position, future.result()
                # A result that nobody asks for again need not stay on its worker.
                future.release()
        finally:
            left = [f for _, f in waiting.values() if not f.done()]
            if left:
                with contextlib.suppress(OSError):
                    self._client.cancel(left)

    def _refuse(self, failed: Any, source: Input) -> None:
        error = failed.exception() if failed.status == "error" else None
        if isinstance(error, GenemodelError | OSError):
            raise error
        again = "Give the same command again: it goes on from the units that are done"
        if error is None:
            raise DataError(f"the Dask cluster at {self._scheduler} was lost. {again}")
        if type(error).__module__.startswith("distributed"):
            raise DataError(
                f"{source.label}: the Dask workers that read it ended one after the other "
                f"({str(error).splitlines()[0][:200]}): killed, or out of memory. {again}"
            ) from error
        raise error

    def close(self) -> None:
        """See :class:`Engine`."""
        with contextlib.suppress(OSError, RuntimeError):
            self._client.run(_leave_desks, str(self._folder), on_error="ignore")
        self._client.close()
