"""Whoever builds a corpus, and however often it is interrupted: the same bytes."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.cells import matrices
from genemodel.cells.sources import open_source
from genemodel.corpus import assembly, engines, manifest, units
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import GeneVocabulary

SETTINGS = {"group_cells": 40, "chunk_cells": 16, "keep": ["lane"]}


def digests(folder):
    """Checksum of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def files(make_cells, tmp_path_factory):
    """Sources of several kinds, with categories that the first ones lack."""
    folder = tmp_path_factory.mktemp("sources")
    human = make_cells(130, seed=1)
    human.obs["lane"] = [f"L{i % 7}" for i in range(130)]
    human.X[37] = 0  # an empty cell: groups do not end where units do
    human.write_h5ad(folder / "human.h5ad")
    mixed = ad.concat(
        [make_cells(50, seed=2), make_cells(60, species="mouse", seed=3)],
        join="outer", index_unique="-", fill_value=0,
    )  # fmt: skip
    mixed = mixed[np.random.default_rng(0).permutation(mixed.n_obs)].copy()
    mixed.X = sp.csc_matrix(mixed.X)
    mixed.write_h5ad(folder / "mixed.h5ad")
    table = make_cells(45, species="mouse", seed=4)
    pd.DataFrame(table.X.toarray().astype(int), table.obs_names, table.var_names).to_csv(
        folder / "table.csv"
    )
    make_cells(90, species="mouse", seed=5).write_zarr(folder / "mouse.zarr")
    return [
        folder / "human.h5ad",
        folder / "mixed.h5ad",
        open_source(folder / "table.csv", species="mouse"),
        folder / "mouse.zarr",
    ]


@pytest.fixture(scope="module")
def expected(files, vocabulary, tmp_path_factory):
    """The corpus that one process builds."""
    out = tmp_path_factory.mktemp("expected") / "corpus"
    Corpus.build(files, out, vocabulary=vocabulary, **SETTINGS)
    return digests(out)


@pytest.fixture(scope="module")
def cluster():
    """A Dask cluster of two processes on this machine."""
    distributed = pytest.importorskip("distributed", reason="distributed is in the [dask] extra")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as local:
        yield local


def test_two_processes_write_the_bytes_of_one(files, vocabulary, expected, tmp_path):
    corpus = Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, workers=2, **SETTINGS)
    assert digests(corpus.path) == expected
    assert corpus.verify() == [] and len(corpus) == 130 + 110 + 45 + 90 - 1
    assert len(corpus.manifest.groups) == 4 + 3 + 1 + 3
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_dask_cluster_writes_the_bytes_of_one_process(
    files, vocabulary, expected, cluster, tmp_path
):
    corpus = Corpus.build(
        files, tmp_path / "c", vocabulary=vocabulary, engine="dask",
        scheduler=cluster.scheduler_address, **SETTINGS,
    )  # fmt: skip
    assert digests(corpus.path) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_appending_by_two_processes_equals_building(files, vocabulary, tmp_path, expected):
    for workers in (1, 2):
        start = Corpus.build(files[:2], tmp_path / str(workers), vocabulary=vocabulary, **SETTINGS)
        start.append(files[2:], workers=workers, **SETTINGS)
    one = digests(tmp_path / "1")
    assert digests(tmp_path / "2") == one
    changed = {name for name in one.keys() | expected.keys() if one.get(name) != expected.get(name)}
    # Appending counts its statistics on; everything else is as if built at once.
    assert changed == {
        "manifest.json", "statistics.0.npz", "medians.0.npz", "statistics.1.npz", "medians.1.npz"
    }  # fmt: skip
    for kind in ("statistics", "medians"):
        assert one[f"{kind}.1.npz"] == expected[f"{kind}.0.npz"]


def test_cells_in_memory_are_read_here_and_files_by_the_workers(
    files, make_cells, vocabulary, tmp_path, caplog
):
    sources = {"a": files[0], "b": make_cells(70, species="mouse", seed=8), "c": files[3]}
    one, two = (
        Corpus.build(sources, tmp_path / str(n), vocabulary=vocabulary, workers=n, **SETTINGS)
        for n in (1, 2)
    )
    assert digests(one.path) == digests(two.path)


def test_a_unit_does_not_begin_inside_a_pass_over_columns(files, vocabulary, monkeypatch):
    whole = open_source(files[1])
    assert units._bounds(whole, 40) == (0, 110)
    monkeypatch.setattr(matrices, "TRANSPOSED_VALUES", whole.counts.read(0, 110).nnz // 8)
    passes = open_source(files[1])
    step = passes.counts.rows.rows_per_pass
    assert 1 < step < 20
    bounds = units._bounds(passes, 40)
    assert bounds[-1] == 110 and all(b % step == 0 for b in bounds[:-1])
    assert max(np.diff(bounds)) <= 40 and len(bounds) > 3


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_is_that_of_the_first_bad_source(
    workers, files, make_cells, vocabulary, tmp_path
):
    for name, cell in (("late", 250), ("later", 100)):
        adata = make_cells(600, seed=4)
        adata.X.data[adata.X.indptr[cell]] = np.nan
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    sources = [tmp_path / "late.h5ad", tmp_path / "later.h5ad"]
    with pytest.raises(DataError, match=r"late.h5ad, X: holds NaN.*cell number 250"):
        Corpus.build(
            sources, tmp_path / "c", vocabulary=vocabulary, workers=workers, group_cells=600
        )
    assert not (tmp_path / "c.partial").exists()  # no unit was done: nothing is worth keeping
    (tmp_path / "x.h5ad").write_text("no")
    with pytest.raises(DataError, match=r"x.h5ad: is named like an HDF5 file but begins with"):
        Corpus.build(
            [files[0], tmp_path / "x.h5ad"], tmp_path / "c", vocabulary=vocabulary, workers=workers
        )


# -- interruptions ---------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Stands for a killed process."""


def after(patch, module, name, calls):
    """Let the function stop everything after so many calls."""
    original = getattr(module, name)
    left = [calls]

    def stopping(*args, **kwargs):
        result = original(*args, **kwargs)
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return result

    patch.setattr(module, name, stopping)


# Where a run stops, and how many of its nine units the next one finds.
POINTS = {
    "second unit": (assembly, "_see", 1, 2),
    "last unit": (assembly, "_see", 8, 9),
    "statistics": (assembly, "_write_statistics", 0, 9),
    "moved": (assembly, "_move_in", 0, 9),
    "manifest": (manifest, "write_manifest", 0, None),
    "units removed": (assembly, "_remove_units", 0, 0),
}


@pytest.mark.parametrize("point", POINTS)
def test_the_same_command_makes_only_what_is_missing(
    point, files, vocabulary, expected, tmp_path, caplog
):
    module, name, calls, found = POINTS[point]
    with pytest.MonkeyPatch.context() as patch:
        after(patch, module, name, calls)
        with pytest.raises(Interrupted):
            Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    assert not (tmp_path / "c").exists()
    with caplog.at_level(logging.INFO, logger="genemodel"):
        caplog.clear()
        corpus = Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    assert digests(corpus.path) == expected
    made = [m for m in caplog.messages if "of 9 units, " in m]
    assert len(made) == (0 if found is None else 9 - found)
    if found:
        assert f"{found} of 9 units were there" in caplog.text


def test_a_worker_that_comes_late_finds_what_it_needs(files, vocabulary, tmp_path):
    """One of two workers opens its first source when the left-overs are gone already."""
    with pytest.MonkeyPatch.context() as patch:
        after(patch, assembly, "_see", 0)
        with pytest.raises(Interrupted):
            Corpus.build(files[:1], tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    changed = SETTINGS | {"group_cells": 10}
    Corpus.build(files[:1], tmp_path / "c", vocabulary=vocabulary, workers=2, **changed)


@pytest.mark.parametrize("place", [(units, "write_medians"), (assembly, "_write_statistics")])
def test_a_full_disk_keeps_what_is_done(place, files, vocabulary, expected, tmp_path, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        after(patch, assembly, "_see", 2)
        with pytest.raises(Interrupted):
            Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(DataError, match="disk is full|is full"):
            Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    assert f"{3 if place[0] is units else 9} finished units are in" in caplog.messages[-1]
    corpus = Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    assert digests(corpus.path) == expected


def test_stale_and_damaged_units_are_made_again(files, vocabulary, expected, tmp_path, caplog):
    def interrupt(**changes):
        with pytest.MonkeyPatch.context() as patch:
            after(patch, assembly, "_write_statistics", 0)
            with pytest.raises(Interrupted):
                Corpus.build(
                    files, tmp_path / "c", vocabulary=vocabulary, **{**SETTINGS, **changes}
                )

    def found():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="genemodel"):
            interrupt()
        return sum("of 9 units, " in m for m in caplog.messages)

    interrupt(min_genes=1)
    assert found() == 9  # other settings
    assert found() == 0
    folder = tmp_path / "c.partial" / "units"
    whole = folder / "000000-000000000040" / "0" / "X" / "data" / "c" / "0"
    raw = bytearray(whole.read_bytes())
    raw[10] ^= 1
    whole.write_bytes(raw)
    (folder / "000000-000000000080" / "0.npz").unlink()
    (folder / "000003-000000000000" / "unit.json").write_text('{"fingerprint": ')
    (folder / "000009-000000000000").mkdir()  # of a source that is no longer listed
    assert found() == 3
    os.utime(files[0])  # was perhaps written again: all its four units
    assert found() == 4
    corpus = Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    assert digests(corpus.path) == expected


def test_a_file_that_changes_while_it_is_read_is_refused(
    files, make_cells, vocabulary, tmp_path, monkeypatch
):
    path = tmp_path / "x.h5ad"
    make_cells(30).write_h5ad(path)
    original = units.UnitWriter.write

    def write(*args, **kwargs):
        os.utime(path, ns=(1, 1))
        return original(*args, **kwargs)

    monkeypatch.setattr(units.UnitWriter, "write", write)
    with pytest.raises(DataError, match="x.h5ad: was changed while it was read"):
        Corpus.build([path], tmp_path / "c", vocabulary=vocabulary)


# Places where an append is killed; whether the cells count as added.
APPEND_POINTS = {
    "unit": (assembly, "_see", 1, False),
    "moved": (assembly, "_move_in", 0, False),
    "manifest": (manifest, "write_manifest", 0, True),
    "statistics removed": (assembly, "_remove_unlisted_statistics", 0, True),
}


@pytest.mark.parametrize("point", APPEND_POINTS)
def test_an_append_that_is_given_again_adds_its_cells_once(point, files, vocabulary, tmp_path):
    start = Corpus.build(files[:2], tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    whole = Corpus.build(files[:2], tmp_path / "whole", vocabulary=vocabulary, **SETTINGS)
    whole = whole.append(files[2:], **SETTINGS)
    module, name, calls, added = APPEND_POINTS[point]
    with pytest.MonkeyPatch.context() as patch:
        after(patch, module, name, calls)
        with pytest.raises(Interrupted):
            start.append(files[2:], **SETTINGS)
    again = Corpus.open(start.path)
    assert len(again) == (len(whole) if added else len(start))
    grown = again.append(files[2:], **SETTINGS)
    assert grown.fingerprint == whole.fingerprint
    assert digests(grown.path) == digests(whole.path)


SCRIPT = """
import os, signal, sys
from genemodel.corpus import assembly, units
from genemodel.corpus.corpus import Corpus
from genemodel.cells.sources import open_source
from genemodel.genes.vocabulary import GeneVocabulary

if __name__ == "__main__":
    folder, out, vocabulary, workers, point = sys.argv[1:]
    if point == "moving":
        def kill(folder, out, moves):
            for own, there in moves[: len(moves) // 2]:
                (folder / own).rename(out / there)
            os.kill(os.getpid(), signal.SIGKILL)
        assembly._move_in = kill
    if point == "half a unit":
        make = units.write_medians
        def kill(path, medians, left=[4]):
            left[0] -= 1
            make(path, medians) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
        units.write_medians = kill
    sources = [f"{folder}/human.h5ad", f"{folder}/mixed.h5ad",
               open_source(f"{folder}/table.csv", species="mouse"), f"{folder}/mouse.zarr"]
    Corpus.build(sources, out, vocabulary=GeneVocabulary.read(vocabulary), workers=int(workers),
                 group_cells=40, chunk_cells=16, keep=["lane"])
"""


def finished(folder):
    return sum(".partial" not in path.parent.name for path in folder.glob("*/unit.json"))


def running(pid):
    """Processes whose parent or group is that one."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return [int(word) for word in listed.split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "point"), [(1, "half a unit"), (1, "moving"), (2, "units"), (2, "moving")]
)
def test_kill_minus_nine_and_the_same_command_again(
    workers, point, files, vocabulary, expected, tmp_path, caplog, repository
):
    (tmp_path / "build.py").write_text(SCRIPT)
    vocabulary.save(tmp_path / "vocabulary.tsv.gz")
    vocabulary = GeneVocabulary.read(tmp_path / "vocabulary.tsv.gz")
    process = subprocess.Popen(
        [
            sys.executable, tmp_path / "build.py", files[0].parent, tmp_path / "c",
            tmp_path / "vocabulary.tsv.gz", str(workers), point,
        ],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    folder = tmp_path / "c.partial" / "units"
    children = []
    while process.poll() is None:
        children = running(process.pid) or children
        if point == "units" and finished(folder) >= 3:
            process.kill()
        time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < end:
        time.sleep(0.05)  # workers whose parent is gone end by themselves
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
    assert not (tmp_path / "c").exists()
    done = 9 if point == "moving" else finished(folder)
    assert done >= 3
    with caplog.at_level(logging.INFO, logger="genemodel"):
        corpus = Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **SETTINGS)
    assert digests(corpus.path) == expected
    assert f"{done} of 9 units were there from an interrupted run, {9 - done} were" in caplog.text
    assert [p for p in tmp_path.iterdir() if p.name.startswith("c")] == [tmp_path / "c"]


def test_a_killed_worker_is_named_and_the_command_goes_on(
    files, vocabulary, expected, tmp_path, monkeypatch
):
    def results(self, task, bench, items, inputs):
        if task is units.make:
            victim = next(iter(self._pool._processes))
            os.kill(victim, signal.SIGKILL)
        return original(self, task, bench, items, inputs)

    original = engines.Processes.results
    monkeypatch.setattr(engines.Processes, "results", results)
    with pytest.raises(DataError, match="a worker process ended.*human.h5ad.*the same command"):
        Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, workers=2, **SETTINGS)
    monkeypatch.undo()
    corpus = Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, workers=2, **SETTINGS)
    assert digests(corpus.path) == expected


def test_a_killed_dask_worker_is_replaced(files, vocabulary, expected, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed is in the [dask] extra")

    def results(self, task, bench, items, inputs):
        if task is units.make:
            os.kill(local.workers[0].pid, signal.SIGKILL)
        return original(self, task, bench, items, inputs)

    original = engines.DaskCluster.results
    monkeypatch.setattr(engines.DaskCluster, "results", results)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address=None
    ) as local:
        corpus = Corpus.build(
            files, tmp_path / "c", vocabulary=vocabulary, engine="dask",
            scheduler=local.scheduler_address, **SETTINGS,
        )  # fmt: skip
    assert digests(corpus.path) == expected


def test_notes_on_the_counts_are_said_once_by_whoever_builds(
    make_cells, vocabulary, tmp_path, caplog
):
    adata = make_cells(60)
    adata.X = (adata.X > 0).astype(np.float32)
    adata.write_h5ad(tmp_path / "x.h5ad")
    Corpus.build([tmp_path / "x.h5ad"], tmp_path / "c", vocabulary=vocabulary, workers=2)
    notes = [m for m in caplog.messages if "hold only 0 and 1" in m]
    assert len(notes) == 1 and notes[0].startswith("x.h5ad, X: ")


# -- refusals --------------------------------------------------------------------------------------

WRONG = {
    "no worker": ({"workers": 0}, "workers is 0: it must be at least 1"),
    "no engine": ({"engine": "spark"}, "it must be 'processes' or 'dask'"),
    "no scheduler": ({"engine": "dask"}, "engine=dask needs scheduler=tcp://HOST:8786.*workers=N"),
    "scheduler alone": ({"scheduler": "tcp://x:1"}, "is for engine=dask"),
    "both": ({"engine": "dask", "scheduler": "tcp://x:1", "workers": 2}, "Leave workers out"),
    "address": ({"out": "s3://bucket/corpus"}, "out=s3://bucket/corpus is an address"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_engines_are_refused(name, files, vocabulary, tmp_path, monkeypatch):
    options, what = WRONG[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=what):
        Corpus.build(files, **{"out": tmp_path / "c", "vocabulary": vocabulary, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_that_does_not_answer(files, vocabulary, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="distributed is in the [dask] extra")
    monkeypatch.setattr(engines, "_CONNECT_S", 1)
    with pytest.raises(ConfigError, match="scheduler=tcp://127.0.0.1:9 cannot be reached"):
        Corpus.build(
            files, tmp_path / "c", vocabulary=vocabulary, engine="dask",
            scheduler="tcp://127.0.0.1:9",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_distributed(files, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'genemodel\[dask\]'"):
        Corpus.build(files, tmp_path / "c", engine="dask", scheduler="tcp://127.0.0.1:9")


def test_a_cluster_that_cannot_do_it(files, vocabulary, cluster, tmp_path, monkeypatch):
    dask = {"engine": "dask", "scheduler": cluster.scheduler_address}
    with monkeypatch.context() as patch:
        patch.setattr("genemodel.__version__", "0.0.1")
        with pytest.raises(ConfigError, match=r"has genemodel .*, here is genemodel 0.0.1"):
            Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **dask)
    with monkeypatch.context() as patch:
        # A token that goes to another disk than the workers look at.
        patch.setattr(engines.Path, "touch", lambda self: None)
        with pytest.raises(ConfigError, match="does not see .*must share the file system"):
            Corpus.build(files, tmp_path / "c", vocabulary=vocabulary, **dask)
    (tmp_path / "x.h5ad").write_text("no")
    with pytest.raises(DataError, match=r"x.h5ad: is named like an HDF5 file but begins with"):
        Corpus.build([tmp_path / "x.h5ad"], tmp_path / "c", vocabulary=vocabulary, **dask)


def test_a_unit_that_does_not_show_is_a_disk_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "_SHOWN_S", 0)
    with pytest.raises(ConfigError, match="cannot be seen here: every machine must share"):
        assembly._see(tmp_path / "000000-000000000000")
