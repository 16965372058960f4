"""Dictionaries from pickles: what is read, what is refused, and that nothing is executed."""

import collections
import os
import pickle
import struct

import numpy as np
import pytest

from genemodel.errors import DataError
from genemodel.importers.pickles import read_pickle

GENES = {"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2, "ENSG00000000005": 70_000}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "values",
    [
        GENES,
        {"a": 1.5, "b": -2e300, "c": True, "d": None},
        {name: np.int16(i) for i, name in enumerate("abc")},
        {"x": np.float64(2.25), "y": np.float32(0.1)},
        {"table": np.arange(6, dtype=np.float32).reshape(2, 3), "z": np.zeros(0)},
        {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))},
        collections.OrderedDict(a=1, b=2),
        [1, (2, 3), "ünï", b"\x00\xff", 2**70, -(2**40)],
        {i: str(i) for i in range(3000)},
    ],
    ids=str,
)
def test_plain_values_come_as_pickle_gives_them(tmp_path, protocol, values):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(values, protocol=protocol))
    read = read_pickle(path)
    np.testing.assert_equal(read, dict(values) if isinstance(values, dict) else values)
    if isinstance(values, dict):
        assert list(read) == list(values)


class Runs:
    """Runs a command when unpickled."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


class Stated:
    def __setstate__(self, state):
        raise AssertionError("executed")

    def __getstate__(self):
        return {"a": 1}


def global_call(module, name, argument=b"X\x01\x00\x00\x00a"):
    """A pickle that calls module.name with one text."""
    return b"\x80\x02c" + module + b"\n" + name + b"\n" + argument + b"\x85R."


def array_pickle(shape, dtype, content):
    head = b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return head + b"(K\x01" + shape + dtype + b"\x89C" + bytes([len(content)]) + content + b"tb."


F8 = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"
HUGE = b"\x8a\x08" + struct.pack("<q", 2**60)

HOSTILE = {
    "os.system": pickle.dumps(Runs(os.system, "touch {mark}")),
    "eval": pickle.dumps(Runs(eval, "open('{mark}','w')")),
    "exec": global_call(b"builtins", b"exec"),
    "getattr": global_call(b"builtins", b"getattr"),
    "bytes of a size": b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    "numpy.load": global_call(b"numpy", b"load"),
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0elinalg.inv.foo\x93X\x01\x00\x00\x00a\x85R.",
    "import": global_call(b"importlib", b"import_module"),
    "instance": pickle.dumps(Stated()),
    "old instance": b"(ios\nsystem\n.",
    "persistent id": b"Pfile\n.",
    "extension": b"\x80\x02\x82\x01.",
    "object array": pickle.dumps(np.array([1, "a"], dtype=object)),
    "structured array": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
    "text array": pickle.dumps(np.array(["a", "b"])),
    "date array": pickle.dumps(np.array(["2026-01-01"], dtype="datetime64[D]")),
    "three axes": pickle.dumps(np.zeros((2, 2, 2))),
    "matrix": pickle.dumps(np.matrix([[1.0]])),
    "huge shape": array_pickle(HUGE + b"\x85", F8, b"12345678"),
    "negative shape": array_pickle(b"J\xff\xff\xff\xff\x85", F8, b"12345678"),
    "wrong length": array_pickle(b"K\x02\x85", F8, b"12345678"),
    "array without content": b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n"
    b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R.",
    "attribute written": b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.",
    "bare name": b"\x80\x02cnumpy\ndtype\n.",
    "call of a value": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "list as key": b"\x80\x02}]K\x01s.",
    "set": pickle.dumps({1, 2}),
    "truncated": pickle.dumps(GENES)[:-9],
    "text": b"not a pickle at all",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "empty": b"",
    "stack underflow": b"\x80\x02s.",
    "left over": b"\x80\x02K\x01K\x02.",
    "unknown memo": b"\x80\x02h\x05.",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 788424\n",
    "torch weights": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "long digits": b"I" + b"9" * 5000 + b"\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_pickles_are_refused_and_nothing_runs(tmp_path, name):
    mark, path = tmp_path / "executed", tmp_path / "token_dictionary.pkl"
    path.write_bytes(HOSTILE[name].replace(b"{mark}", str(mark).encode().ljust(6)))
    with pytest.raises(DataError, match="token_dictionary.pkl"):
        read_pickle(path)
    assert not mark.exists()


def test_the_message_names_the_call_and_the_remedy(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(global_call(b"builtins", b"exec"))
    with pytest.raises(DataError, match="a call of builtins.exec.*nothing in it is executed"):
        read_pickle(path)


def test_a_pointer_says_how_to_get_the_file(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(HOSTILE["pointer"])
    with pytest.raises(DataError, match="788424 bytes.*sha256:ab.*git lfs pull"):
        read_pickle(path)


def test_a_published_name_dictionary_is_read_and_known_by_its_bytes(tmp_path, shared_parity):
    import gzip

    from genemodel.importers.known import recognised

    lines = gzip.open(shared_parity / "geneformer_v1_names.tsv.gz", "rt").read().splitlines()[1:]
    names = dict(line.split("\t") for line in lines)
    path = tmp_path / "names.pkl"
    path.write_bytes(pickle.dumps(names, protocol=4))
    assert recognised(path)[1].path.endswith("gene_name_id_dict_gc30M.pkl")
    assert read_pickle(path) == names
