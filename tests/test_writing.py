"""What is written is there whole or not at all, and a full disk is named and leaves nothing."""

import errno
import os

import pytest

from genemodel import writing
from genemodel.errors import DataError
from genemodel.writing import DiskFull, found_again, put_in_place, whole, whole_directory


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(path, text):
    with whole_directory(path) as folder:
        (folder / "in").mkdir()
        (folder / "in" / "a").write_text(text)


def test_files_and_directories_replace_each_other_and_leave_nothing_beside_them(tmp_path):
    path = tmp_path / "new" / "thing"
    for round_ in "12":
        with whole(path) as partial:
            partial.write_text(round_)
        assert everything(tmp_path) == {"new/thing": round_}
    for round_ in "34":
        write(path, round_)
        assert everything(tmp_path) == {"new/thing/in/a": round_}
    with whole(path) as partial:
        partial.write_text("5")
    assert everything(tmp_path) == {"new/thing": "5"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, DataError])
def test_a_failure_keeps_the_old_one_and_removes_the_beginnings(error, tmp_path):
    write(tmp_path / "x", "old")
    with pytest.raises(error), whole_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("half")
        raise error("stop")
    assert everything(tmp_path) == {"x/in/a": "old"}


def stopped_between_the_moves(monkeypatch, path):
    """Replace ``path``, dying after the old one has stepped aside, as a kill would."""

    class Killed(BaseException):
        pass

    rename = type(path).rename

    def once(self, target):
        if self.name.endswith(".partial"):
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(path), "rename", once)
        write(path, "new")
    assert not path.exists()


def test_an_interrupted_replacement_is_found_again(tmp_path, monkeypatch, caplog):
    path = tmp_path / "x"
    write(path, "old")
    stopped_between_the_moves(monkeypatch, path)
    assert found_again(path) == path and everything(tmp_path) == {"x/in/a": "old"}
    assert "the one before is back" in caplog.text
    stopped_between_the_moves(monkeypatch, path)
    with pytest.raises(RuntimeError), whole_directory(path):
        raise RuntimeError  # the next writer fails, and still the old one is there
    assert everything(tmp_path) == {"x/in/a": "old"}


def test_in_a_folder_that_cannot_be_changed_it_is_read_where_it_stepped_to(
    tmp_path, monkeypatch, caplog
):
    path = tmp_path / "x"
    write(path, "old")
    stopped_between_the_moves(monkeypatch, path)

    def refused(self, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(path), "rename", refused)
    assert (found_again(path) / "in" / "a").read_text() == "old"
    assert "Read-only file system" in caplog.text


def test_a_reader_between_the_two_moves_does_not_stop_the_writer(tmp_path, monkeypatch):
    path, made = tmp_path / "x", tmp_path / "made"
    write(path, "old")
    write(made, "new")
    rename, came = type(path).rename, []

    def with_reader(self, target):
        if self == made and not came:
            came.append(1)
            found_again(path)
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", with_reader)
    put_in_place(made, path)
    assert came and everything(tmp_path) == {"x/in/a": "new"}


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    write(tmp_path / "x", "old")
    begun = []
    with (
        pytest.raises(DataError, match=r"disk is full.*about .* TB \(.*bytes\).*free in.*Make spa"),
        whole_directory(tmp_path / "x", needed=1 << 62),
    ):
        begun.append(1)
    assert not begun and everything(tmp_path) == {"x/in/a": "old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_named_and_what_was_begun_removed(number, tmp_path):
    write(tmp_path / "x", "old")
    with (
        pytest.raises(DataError, match=r"It needs about 3\.0 kB \(3,000 bytes\).*quota") as caught,
        whole_directory(tmp_path / "x", needed=3000) as folder,
    ):
        (folder / "a").write_text("z" * 1000)
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)
    assert everything(tmp_path) == {"x/in/a": "old"}


def test_a_disk_that_fills_in_a_part_is_said_of_the_whole(tmp_path, monkeypatch):
    with (
        pytest.raises(DiskFull, match=r"/x cannot be written.*more than 50 bytes"),
        whole_directory(tmp_path / "x") as folder,
    ):
        (folder / "a").write_text("z" * 50)
        monkeypatch.setattr(writing, "free_bytes", lambda path: 7)
        with whole(folder / "part", needed=8):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "said",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "Can't write data (file write failed: errno = 122, error message = '')",
    ],
)
def test_libraries_that_pass_the_error_on_in_words_are_understood(said):
    assert writing.is_full(RuntimeError(said))
    assert not writing.is_full(RuntimeError("os error 280"))
    outer = RuntimeError("unexpected pos 704 vs 598")
    outer.__context__ = OSError(errno.ENOSPC, "full")
    assert writing.is_full(outer) and not writing.is_full(ValueError("x"))


def save_tensors(path, n):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(n)}, path)


def save_h5ad(path, n):
    import anndata as ad
    import numpy as np

    ad.AnnData(np.ones((n // 100, 100), np.float32)).write_h5ad(path)


def save_zarr(path, n):
    import numpy as np
    import zarr

    group = zarr.open_group(path, mode="w")
    group.create_array("a", shape=(n,), chunks=(n // 10,), dtype="f4")[:] = np.random.rand(n)


@pytest.mark.parametrize("save", [save_tensors, save_h5ad, save_zarr])
def test_on_a_real_full_disk_the_old_one_stays_and_the_same_works_with_space(small_disk, save):
    path = small_disk / "thing"
    with whole(path) as partial:
        partial.write_text("old")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_500_000))
    with pytest.raises(DataError, match="disk is full"), whole(path) as partial:
        save(partial, 250_000)
    assert path.read_text() == "old" and not list(small_disk.glob(".*"))
    filler.unlink()
    with whole(path) as partial:
        save(partial, 250_000)
    assert path.is_dir() or path.stat().st_size > 900_000
