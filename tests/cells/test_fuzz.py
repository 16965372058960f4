"""Sources that were mutated: read as they are, or refused by name; never a library's traceback."""

import anndata as ad
import numpy as np
import pytest

KINDS = (
    "h5ad", "h5ad dense", "h5ad by columns", "zarr", "h5mu", "10x h5", "10x h5 v2", "loom",
    "10x mtx", "triplet", "csv", "genes as rows", "long", "AnnData",
)  # fmt: skip


@pytest.fixture
def fuzzer(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    import fuzz_readers

    return fuzz_readers


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_sources_are_read_or_refused_by_name(fuzzer, kind):
    assert (*fuzzer.KINDS, fuzzer.IN_MEMORY) == KINDS
    found = list(fuzzer.fuzz(kind, 25, seed=0))
    assert [case for case in found if case[0] not in ("read", "refused")] == []
    assert {case[0] for case in found} == {"read", "refused"}


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_valid_sources_of_every_kind_are_read_alike(fuzzer, kind, tmp_path):
    valid = fuzzer.cells()
    path = fuzzer.KINDS[kind].write(valid, tmp_path)
    assert fuzzer.judge(path, "case", "same", valid) == ("read", "")


def test_the_judge_sees_tracebacks_and_what_is_silent(fuzzer, tmp_path, monkeypatch):
    valid = fuzzer.cells()
    path = fuzzer.KINDS["h5ad"].write(valid, tmp_path)
    assert fuzzer.judge(path, "case", "refused", valid)[0] == "silent"
    half = ad.AnnData(valid.X[: fuzzer.N // 2], obs=valid.obs[: fuzzer.N // 2], var=valid.var)
    assert fuzzer.judge(half, fuzzer.IN_MEMORY, "same", valid)[0] == "silent"
    bad = valid.copy()
    bad.X = np.log1p(valid.X.toarray())
    assert fuzzer.judge(bad, "other", "refused", valid)[0] == "unnamed"
    monkeypatch.setattr(fuzzer, "open_source", lambda *_, **__: 1 / 0)
    assert fuzzer.judge(path, "case", "", valid)[0] == "traceback"
