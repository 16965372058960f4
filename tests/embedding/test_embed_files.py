"""Files of any size: resumable shards, several devices, ranks, and nothing of the user's lost."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import genemodel as gm
from genemodel.batches.tokens import TokenSettings
from genemodel.embedding import embed as module
from genemodel.embedding.embed import EmbedSettings, embed_file
from genemodel.errors import ConfigError, DataError, GenemodelError
from genemodel.inference import ranks, workers
from genemodel.inference.counts import SHARD_CELLS
from genemodel.inference.forward import Forward, _Result
from genemodel.inference.shards import Shards
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings
from genemodel.settings import to_values
from genemodel.simulation.cells import synthetic

KEY = "X_genemodel"


@pytest.fixture(scope="module")
def human():
    return synthetic(300, species=("human",), n_genes=800, genes_per_cell=150, seed=3)["human"]


@pytest.fixture
def job(random_bundle, human, tmp_path, monkeypatch):
    """Settings for a file of five shards of 64 cells."""
    monkeypatch.setattr(module, "SHARD_CELLS", 64)
    random_bundle.save(tmp_path / "bundle")
    human.write_h5ad(tmp_path / "cells.h5ad")
    return EmbedSettings(
        model=str(tmp_path / "bundle"),
        input=str(tmp_path / "cells.h5ad"),
        output=str(tmp_path / "out.h5ad"),
        device="cpu",
    )


@pytest.fixture
def whole(random_bundle, human):
    adata = human.copy()
    gm.embed(adata, random_bundle)
    return adata.obsm[KEY]


def written(settings):
    return ad.read_h5ad(settings.output).obsm[KEY]


def shards_of(settings):
    return sorted(Path(settings.output).parent.glob(".out.h5ad.shards/*.npy"))


def names(settings):
    return sorted(path.name for path in Path(settings.output).parent.iterdir())


@pytest.fixture
def fails_after(monkeypatch):
    """Make ``fails_after(n)``: writing the shard after n others raises; counts embedded cells."""

    def make(n):
        real = Shards.write
        count = 0

        def write(self, number, values):
            nonlocal count
            if count >= n:
                raise KeyboardInterrupt
            count += 1
            real(self, number, values)

        monkeypatch.setattr(Shards, "write", write)
        return lambda: monkeypatch.setattr(Shards, "write", real)

    return make


@pytest.fixture
def counted(monkeypatch):
    """Cells that went through the model."""
    real = Forward._run
    cells = []

    def run(self, job, batch):
        cells.append(batch.n_cells)
        return real(self, job, batch)

    monkeypatch.setattr(Forward, "_run", run)
    return lambda: sum(cells)


# -- shards ------------------------------------------------------------------------------------


def test_a_file_comes_out_as_the_object_in_memory_and_leaves_nothing_behind(job, whole):
    assert embed_file(job) == Path(job.output)
    np.testing.assert_array_equal(written(job), whole)
    assert names(job) == ["bundle", "cells.h5ad", "out.h5ad"]


def test_an_interrupted_command_goes_on_with_what_is_missing(
    job, whole, fails_after, counted, caplog
):
    mend = fails_after(3)
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        embed_file(job)
    assert "3 of 5 shards are kept in" in caplog.text
    assert len(shards_of(job)) == 3 and not Path(job.output).exists()
    mend()
    before = counted()
    with caplog.at_level(logging.INFO):
        embed_file(job)
    assert counted() - before == 300 - 3 * 64
    assert "Going on with 3 of 5 shards" in caplog.text
    np.testing.assert_array_equal(written(job), whole)
    assert names(job) == ["bundle", "cells.h5ad", "out.h5ad"]


@pytest.mark.parametrize("what", ["input", "model", "batch_size", "species", "damage"])
def test_shards_of_something_else_are_never_taken(
    job, human, random_bundle, fails_after, counted, what
):
    mend = fails_after(3)
    with pytest.raises(KeyboardInterrupt):
        embed_file(job)
    mend()
    fresh = 300
    match what:
        case "input":
            human[::-1].copy().write_h5ad(job.input)
        case "model":
            model = gm.load(job.model, device="cpu")
            with torch.no_grad():
                model.model.embedding.token.weight.mul_(2)
            model.save(job.model)
        case "batch_size":
            job = replace(job, batch_size=5)
        case "species":
            job = replace(job, species="human")
        case "damage":
            file = shards_of(job)[1]
            file.write_bytes(file.read_bytes()[:-100])
            fresh = 300 - 2 * 64
    before = counted()
    embed_file(job)
    assert counted() - before == fresh
    expected = ad.read_h5ad(job.input)
    gm.embed(expected, gm.load(job.model, device="cpu"))
    np.testing.assert_array_equal(written(job), expected.obsm[KEY])
    assert names(job) == ["bundle", "cells.h5ad", "out.h5ad"]


@pytest.mark.slow
def test_kill_minus_nine_and_again_is_bit_identical(job, whole, tmp_path):
    """The process is killed once two shards are there; the same settings then go on."""
    script = textwrap.dedent(
        f"""
        import time
        from genemodel.embedding import embed
        from genemodel.inference import shards
        embed.SHARD_CELLS = 64
        write = shards.Shards.write
        def slowly(self, number, values):
            time.sleep(0.3)
            write(self, number, values)
        shards.Shards.write = slowly
        embed.embed_file(embed.EmbedSettings(
            model={job.model!r}, input={job.input!r}, output={job.output!r}, device="cpu"))
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while len(shards_of(job)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in shards_of(job)}
    assert 2 <= len(kept) < 5
    seen = {}
    real = Shards.remove

    def remove(self):
        seen.update({path.name: path.stat().st_mtime_ns for path in shards_of(job)})
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "remove", remove)
        embed_file(job)
    assert kept.items() <= seen.items()  # not written again
    np.testing.assert_array_equal(written(job), whole)


def test_a_second_command_with_the_same_output_is_refused(job, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    real = module.refuse_full_disk

    def wait(shards, output):
        entered.set()
        leave.wait(60)
        real(shards, output)

    monkeypatch.setattr(module, "refuse_full_disk", wait)
    first = threading.Thread(target=embed_file, args=(job,))
    first.start()
    assert entered.wait(60)
    with pytest.raises(ConfigError, match="another process is writing the same output"):
        embed_file(job)
    leave.set()
    first.join()
    assert names(job) == ["bundle", "cells.h5ad", "out.h5ad"]


def test_a_disk_without_room_is_refused_before_the_work(job, monkeypatch, counted):
    usage = type("Usage", (), {"free": 30_000})
    monkeypatch.setattr("genemodel.inference.shards.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"needs 0.00 GB .* disk has 0.00 GB free: make room"):
        embed_file(job)
    assert counted() == 0
    assert names(job) == ["bundle", "cells.h5ad"]


def test_memory_does_not_grow_with_the_cells(random_bundle, tmp_path, monkeypatch):
    """60,000 cells more are 61 MB more of vectors, and next to nothing of memory."""
    rng, genes, width = np.random.default_rng(0), 3, 256
    wide = GeneModel(
        ModelSettings(layers=1, width=width, heads=2, ffn=16),
        n_tokens=len(random_bundle.vocabulary), n_species=2, context=8,
    )  # fmt: skip
    tokens = TokenSettings(context=8, budget=2048)
    replace(random_bundle, model=wide.eval(), tokens=tokens).save(tmp_path / "bundle")
    names = random_bundle.vocabulary.genes.query("species == 'human'")["ensembl_id"][:400]
    monkeypatch.setattr(module, "SHARD_CELLS", 4096)  # all that is held at once, from the start
    # Everything but the arithmetic.
    monkeypatch.setattr(
        Forward,
        "_run",
        lambda self, job, batch: _Result(job, torch.full((batch.n_cells, width), 0.5), None),
    )
    peaks = []
    for n in (20_000, 80_000):
        counts = sp.csr_matrix(
            (
                rng.integers(1, 9, genes * n).astype(np.float32),
                rng.integers(0, 400 // genes, genes * n) * genes + np.tile(range(genes), n),
                np.arange(0, genes * n + 1, genes),
            ),
            (n, 400),
        )
        counts.sort_indices()
        ad.AnnData(counts, var=pd.DataFrame(index=list(names))).write_h5ad(tmp_path / f"{n}.h5ad")
        del counts
        job = EmbedSettings(
            model=str(tmp_path / "bundle"),
            input=str(tmp_path / f"{n}.h5ad"),
            output=str(tmp_path / f"{n}.out.h5ad"),
            species="human",
            device="cpu",
        )
        tracemalloc.start()
        embed_file(job)
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    with h5py.File(tmp_path / "80000.out.h5ad") as file:
        assert file[f"obsm/{KEY}"].shape == (80_000, width)
    assert peaks[1] - peaks[0] < 15, peaks


# -- several devices ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_devices_give_the_vectors_of_one(job, whole, caplog):
    with caplog.at_level(logging.INFO):
        embed_file(replace(job, device=("cpu", "cpu")))
    np.testing.assert_array_equal(written(job), whole)
    assert "embed: 300 cells in" in caplog.text
    assert names(job) == ["bundle", "cells.h5ad", "out.h5ad"]


@pytest.mark.slow
def test_several_devices_for_an_object_in_memory(human, whole, random_bundle):
    """The workers are given a file of the counts, wherever these are."""
    adata = human.copy()
    adata.layers["counts"], adata.X = adata.X, adata.X.astype(np.float32).log1p()
    gm.embed(adata, random_bundle, layer="counts", device=["cpu", "cpu"])
    np.testing.assert_array_equal(adata.obsm[KEY], whole)


@pytest.mark.slow
def test_a_dead_worker_is_named_and_the_others_end(job, monkeypatch):
    begun = []
    real = workers._Worker.__init__

    def watched(self, *arguments):
        real(self, *arguments)
        begun.append(self.process)
        if len(begun) == 2:
            self.process.kill()

    monkeypatch.setattr(workers._Worker, "__init__", watched)
    with pytest.raises(GenemodelError, match=r"worker 2 of 2 on cpu was killed by SIGKILL"):
        embed_file(replace(job, device=("cpu", "cpu")))
    assert all(process.poll() is not None for process in begun)
    assert names(job) == ["bundle", "cells.h5ad"]  # no shard was there to keep


@pytest.mark.slow
def test_what_a_worker_is_refused_is_said_as_if_by_one(job, random_bundle, human):
    adata = human.copy()
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    counts.data[counts.indptr[200]] = 1.5  # the first look does not reach it
    adata.X = counts
    adata.write_h5ad(job.input)
    with pytest.raises(DataError, match=r"worker \d of 2 .*cells\.h5ad, X: .* cell number 200"):
        embed_file(replace(job, device=("cpu", "cpu")))


def test_a_worker_whose_parent_is_gone_ends(job, tmp_path):
    (tmp_path / "shards").mkdir()
    told = workers.Job(
        job.model,
        job.input,
        to_values(job.reading),
        None,
        False,
        str(tmp_path / "shards"),
        "0" * 16,
        64,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "genemodel.inference.shard_worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    words = json.dumps({**asdict(told), "device": "cpu", "shards": list(range(5))})
    out, err = process.communicate(words + "\n", timeout=120)  # and closes its standard input
    assert process.returncode == 1 and "Traceback" not in err
    assert '"shard"' not in out and not list((tmp_path / "shards").iterdir())


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ((), "device names none"),
        (("auto", "cpu"), "device=auto chooses one device and cannot stand in a list"),
        (("cpu", 0), "torch sees|one kind has to make them all"),
        ("gpu", "device=gpu: there is no such device"),
        (7, "device=cuda:7, but torch sees"),
    ],
)
def test_devices_that_cannot_be_are_refused_before_work(job, device, said):
    with pytest.raises(ConfigError, match=said):
        embed_file(replace(job, device=device))
    assert names(job) == ["bundle", "cells.h5ad"]


def test_gpus_by_number_or_name(monkeypatch):
    from genemodel.inference.devices import devices_of

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert devices_of([0, 1]) == devices_of(("cuda", "cuda:1")) == [first, second]
    assert devices_of(1) == devices_of([1]) == devices_of("cuda:1") == [second]
    with pytest.raises(ConfigError, match=r"device=\[0,cuda\] names one device twice"):
        devices_of([0, "cuda"])
    with pytest.raises(ConfigError, match=r"device=\[0,cpu\]: .*one kind"):
        devices_of([0, "cpu"])


# -- ranks -------------------------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch):
    def be(number, world=2):
        for name, value in (("RANK", number), ("WORLD_SIZE", world), ("LOCAL_RANK", number)):
            monkeypatch.setenv(name, str(value))

    return be


def test_ranks_share_the_shards_and_the_first_writes_the_output(job, whole, as_rank, counted):
    as_rank(1)
    embed_file(job)
    assert [path.name[:6] for path in shards_of(job)] == ["000001", "000003"]
    assert counted() == 128 and not Path(job.output).exists()
    as_rank(0)
    embed_file(job)
    assert counted() == 300
    np.testing.assert_array_equal(written(job), whole)
    assert names(job) == ["bundle", "cells.h5ad", "out.h5ad"]
    as_rank(1)  # a late one finds nothing to do
    assert embed_file(job) == Path(job.output) and counted() == 300


def test_the_first_rank_ends_with_the_reason_of_another(job, as_rank, monkeypatch, whole):
    wait = ranks.Rank.wait_for_others

    def meanwhile(self, shards, arrived):
        with pytest.raises(OSError), ranks.Rank(1, 2, 1).reporting(shards.folder):
            raise OSError("disk on fire")
        wait(self, shards, arrived)

    as_rank(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks.Rank, "wait_for_others", meanwhile)
        with pytest.raises(GenemodelError, match="rank 1 of 2 failed: disk on fire"):
            embed_file(job)
    # What failed then is no reason now, though rank 1 comes up after rank 0.
    late = threading.Timer(1.0, embed_file, (job,))

    def then(self, shards, arrived):
        as_rank(1)
        late.start()
        wait(self, shards, arrived)

    monkeypatch.setattr(ranks.Rank, "wait_for_others", then)
    embed_file(job)
    late.join()
    np.testing.assert_array_equal(written(job), whole)


def test_a_silent_rank_is_given_up(job, as_rank, monkeypatch):
    monkeypatch.setattr(ranks, "SILENCE_S", 0.3)
    monkeypatch.setattr(ranks, "_LOOK_S", 0.05)
    as_rank(0, world=3)
    with pytest.raises(GenemodelError, match="rank 1 of 3 has not been heard of"):
        embed_file(job)
    assert len(shards_of(job)) == 2  # kept for the next try


def test_ranks_take_their_own_gpu_and_no_list(job, as_rank, monkeypatch):
    as_rank(1)
    with pytest.raises(ConfigError, match="one of 2 processes .* leave device out"):
        embed_file(replace(job, device=("cpu", "cpu")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    rank = ranks.Rank.of_environment()
    assert rank.device(torch.device("cuda")) == torch.device("cuda", 1)
    assert rank.device(torch.device("cuda", 3)) == torch.device("cuda", 3)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="RANK=2, WORLD_SIZE=2"):
        ranks.Rank.of_environment()


# -- what the user knows of cells and genes ----------------------------------------------------


@pytest.fixture
def rich(human):
    """An AnnData with something in every place."""
    adata = human.copy()
    n, rng = len(adata), np.random.default_rng(0)
    adata.obs["cluster"] = pd.Categorical(
        rng.choice(["b", "a"], n), categories=["never", "b", "a"], ordered=True
    )
    adata.obs["score"] = rng.normal(size=n).astype(np.float32)
    adata.obs["doublet"] = rng.random(n) < 0.1
    adata.obs["note"] = ["x", "y", ""] * (n // 3)
    adata.obs["donor"] = adata.obs["donor"].cat.reorder_categories(
        list(adata.obs["donor"].cat.categories[::-1])
    )
    adata.var["mt"] = np.arange(adata.n_vars) % 2 == 0
    adata.obsm["X_pca"] = rng.normal(size=(n, 3))
    adata.obsm["table"] = pd.DataFrame({"u": np.arange(n)}, index=adata.obs_names)
    adata.varm["loadings"] = rng.normal(size=(adata.n_vars, 2))
    adata.obsp["distances"] = sp.random(n, n, 0.01, format="csr", random_state=0)
    adata.varp["together"] = sp.identity(adata.n_vars, format="csr")
    adata.uns["colours"] = {"a": np.array(["red", "blue"]), "deep": {"k": 3}}
    adata.layers["spliced"] = adata.X.copy()
    return adata


def assert_kept(found, adata):
    pd.testing.assert_frame_equal(found.obs, adata.obs)
    pd.testing.assert_frame_equal(found.var, adata.var)
    assert set(found.obsm) == {*adata.obsm, KEY} and set(found.varm) == set(adata.varm)
    np.testing.assert_array_equal(found.obsm["X_pca"], adata.obsm["X_pca"])
    pd.testing.assert_frame_equal(found.obsm["table"], adata.obsm["table"])
    for mine, theirs in ((found.obsp, adata.obsp), (found.varp, adata.varp)):
        assert set(mine) == set(theirs)
        assert all((mine[key] != theirs[key]).nnz == 0 for key in mine)
    assert set(found.uns) == {*adata.uns, KEY}
    assert found.uns["colours"]["deep"]["k"] == 3
    assert found.X is None and not [name for name in found.layers if name]


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_all_but_the_counts_is_carried_over(job, rich, whole, random_bundle, tmp_path, kind):
    path = tmp_path / f"rich.{kind}"
    rich.write_h5ad(path) if kind == "h5ad" else rich.write_zarr(path)
    embed_file(replace(job, input=str(path)))
    found = ad.read_h5ad(job.output)
    back = ad.read_h5ad(path) if kind == "h5ad" else ad.read_zarr(path)
    assert_kept(found, back)
    assert_kept(gm.embed(path, random_bundle), back)
    np.testing.assert_array_equal(found.obsm[KEY], whole)
    # An output of ours is an input like any other, once it has counts again.
    found.X = rich.X
    found.write_h5ad(tmp_path / "again.h5ad")
    embed_file(replace(job, input=str(tmp_path / "again.h5ad"), overwrite=True))
    assert_kept(ad.read_h5ad(job.output), back)


@pytest.mark.parametrize("write", ["write_h5ad", "write_zarr"])
def test_a_file_without_counts_is_refused(job, rich, tmp_path, write):
    """What anndata writes for an object without X is an array without a shape."""
    path = tmp_path / "bare"
    bare = ad.AnnData(obs=rich.obs, var=rich.var)
    getattr(bare, write)(path)
    with pytest.raises(DataError, match="has no layer 'X'; it has no matrix at all"):
        embed_file(replace(job, input=str(path)))


def test_a_source_of_names_alone_gets_no_invented_columns(job, human, random_bundle, tmp_path):
    table = pd.DataFrame(
        human.X.toarray().astype(int), index=human.obs_names, columns=human.var_names
    )
    table.to_csv(tmp_path / "cells.csv")
    embed_file(replace(job, input=str(tmp_path / "cells.csv"), species="human"))
    found = ad.read_h5ad(job.output)
    assert list(found.obs.columns) == [] and list(found.obs_names) == list(human.obs_names)
    assert list(found.var_names) == list(human.var_names)


def test_attributes_of_a_loom_are_kept(job, human, tmp_path):
    path = tmp_path / "cells.loom"
    with h5py.File(path, "w") as file:
        file["matrix"] = human.X.toarray().T.astype(np.float32)
        file["row_attrs/Accession"] = np.array(list(human.var_names), dtype="S")
        file["col_attrs/CellID"] = np.array(list(human.obs_names), dtype="S")
        file["col_attrs/age"] = np.arange(300)
        file["col_attrs/sort"] = np.array(["p", "q", "r"] * 100, dtype="S")
        file.create_group("layers")
    embed_file(replace(job, input=str(path), species="human"))
    found = ad.read_h5ad(job.output)
    assert list(found.obs.columns) == ["CellID", "age", "sort"]
    assert found.obs["age"].tolist() == list(range(300))
    assert found.obs["sort"].tolist() == ["p", "q", "r"] * 100


def test_shards_are_small_enough_to_redo_and_large_enough_to_count(tmp_path):
    shards = Shards(tmp_path, 10**8, 768, "0" * 64)
    assert len(shards) == 6104 and shards.span(6103) == (6103 * SHARD_CELLS, 10**8)
    assert os.fspath(shards.path(6103)).endswith("006103.0000000000000000.npy")
