"""Sources at an address give what the same files give here."""

import socket
import subprocess
import sys
import time

import fsspec
import pytest

from genemodel.cells import remote
from genemodel.cells.sources import open_source
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError

SETTINGS = {"group_cells": 40, "chunk_cells": 16}


@pytest.fixture(scope="module")
def files(make_cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_cells(100, seed=1).write_h5ad(folder / "human.h5ad")
    make_cells(50, species="mouse", seed=2).write_zarr(folder / "mouse.zarr")
    (folder / "table.csv").write_text("cell,A,B\nc1,1,2\n")
    return folder


@pytest.fixture(scope="module")
def here(files, vocabulary, tmp_path_factory):
    out = tmp_path_factory.mktemp("here") / "c"
    sources = [files / "human.h5ad", files / "mouse.zarr"]
    return Corpus.build(sources, out, vocabulary=vocabulary, **SETTINGS)


@pytest.fixture
def bucket(files):
    """An address in memory with the same files."""
    system = fsspec.filesystem("memory")
    system.put(str(files), "/bucket", recursive=True)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def s3(files):
    """An emulated S3 with the same files."""
    pytest.importorskip("moto", reason="moto[server] emulates S3; it is in no extra")
    s3fs = pytest.importorskip("s3fs", reason="s3fs reads s3://; it is in no extra")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    patch = pytest.MonkeyPatch()
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as door:
                if door.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        url = f"http://127.0.0.1:{port}"
        for name, value in {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        system.put(str(files) + "/", "bucket/", recursive=True)
        yield "s3://bucket"
    finally:
        patch.undo()
        server.terminate()
        server.wait()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("where", ["bucket", "s3"])
def test_files_in_memory_and_on_an_emulated_s3_give_the_same_corpus(
    where, workers, request, here, vocabulary, tmp_path
):
    place = request.getfixturevalue(where)
    sources = [f"{place}/human.h5ad", f"{place}/mouse.zarr"]
    corpus = Corpus.build(
        sources, tmp_path / "c", vocabulary=vocabulary, workers=workers, **SETTINGS
    )
    assert corpus.fingerprint == here.fingerprint


def test_what_an_emulated_s3_lacks(s3, vocabulary, tmp_path):
    with pytest.raises(DataError, match=r"s3://bucket/no.h5ad: does not exist. Check the address"):
        Corpus.build([f"{s3}/no.h5ad"], tmp_path / "c", vocabulary=vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_what_lies_there_is_told_from_what_lay_there(bucket, make_cells):
    before = remote.identity(f"{bucket}/human.h5ad"), remote.identity(f"{bucket}/mouse.zarr")
    again = remote.identity(f"{bucket}/human.h5ad"), remote.identity(f"{bucket}/mouse.zarr")
    assert before == again
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/human.h5ad", b"x")
    system.pipe("/bucket/mouse.zarr/X/new", b"x")
    after = remote.identity(f"{bucket}/human.h5ad"), remote.identity(f"{bucket}/mouse.zarr")
    assert before[0] != after[0] and before[1] != after[1]


def test_a_source_at_an_address_is_named_by_its_last_part(bucket):
    with open_source(f"{bucket}/human.h5ad") as source:
        assert (source.name, source.file, source.kind) == ("human", "human.h5ad", "h5ad")
        assert source.n_cells == 100
    assert str(remote.name_of("https://host/a/cells.h5ad?token=1")) == "cells.h5ad"


REFUSED = {
    "absent": ("/no.h5ad", "memory://bucket/no.h5ad: does not exist. Check the address"),
    "text": ("/table.csv", "begins with b'cell,A,B'. At an address, h5ad, 10x h5, loom and zarr"),
    "folder": ("", "memory://bucket: is a folder, but not a zarr store. At an address"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_at_an_address(name, bucket, vocabulary, tmp_path):
    path, what = REFUSED[name]
    with pytest.raises(DataError, match=what):
        Corpus.build([bucket + path], tmp_path / "c", vocabulary=vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://bucket/x.h5ad: a package that reads.*gcsfs"):
        open_source("gs://bucket/x.h5ad")


def test_a_corpus_is_not_opened_at_an_address():
    with pytest.raises(ConfigError, match="corpus=memory://bucket/c is an address, not a path"):
        Corpus.open("memory://bucket/c")
