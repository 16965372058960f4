"""Heads at growing numbers of cells: time a cell, memory, and the correction at many batches.

Run by ``python scripts/bench.py heads [--heads 10000 100000 1000000]``; each size is a process of
its own, so that its peak memory is its own. The alternative is the smallest size.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

N_GENES, N_BATCHES, GENES_PER_CELL = 2000, 100, 300


def line(name: str, figure: str, note: str = "") -> None:
    print(f"  {name:<52}{figure:>18}  {note}", flush=True)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def generated(n_cells: int, folder: Path) -> Path:
    """Build a corpus of generated cells; nothing of it is timed."""
    from genemodel.cells.sources import stream_source
    from genemodel.corpus.corpus import Corpus
    from genemodel.simulation.cells import SyntheticWorld, synthetic_chunks

    world = SyntheticWorld(
        species=("human",), n_genes=N_GENES, genes_per_cell=GENES_PER_CELL, n_batches=N_BATCHES
    )
    first = next(synthetic_chunks(1000, 1000, world=world))
    # The batches of all cells are needed before their counts are made.
    batch_C = np.concatenate(
        [c.obs["batch"].astype(str) for c in synthetic_chunks(n_cells, 8192, world=world)]
    )
    names = [f"cell{i}" for i in range(n_cells)]
    obs = pd.DataFrame({"dataset": "generated", "batch": batch_C}, index=names)

    def blocks() -> Iterator[sp.csr_matrix]:
        for chunk in synthetic_chunks(n_cells, 8192, world=world):
            yield chunk.X

    source = stream_source("generated", list(first.var_names), obs, blocks, species="human")
    return Corpus.build([source], folder / "corpus").path


def heads_of(n_cells: int, folder: Path) -> None:
    """Integrate and impute so many cells from their corpus; print seconds a cell and memory."""
    from genemodel.corpus.corpus import Corpus
    from genemodel.finetuning.head_run import HeadRun
    from genemodel.imputation.impute_corpus import impute_corpus
    from genemodel.imputation.network import DecoderSettings
    from genemodel.integration.head import IntegrationSettings
    from genemodel.integration.integrate import integrate_cells
    from genemodel.model.tuning import TuningSettings

    built = generated(n_cells, folder)
    before = peak_gib()
    corpus = Corpus.open(built)
    shown = f"{n_cells:,} cells, {corpus.n_genes_C.mean():.0f} genes a cell"

    def timed(name: str, run: Callable[[], object]) -> None:
        begin, cores = time.perf_counter(), time.process_time()
        run()
        seconds = time.perf_counter() - begin
        # On a machine with other work beside it, the time of the cores can still be compared.
        of_cores = time.process_time() - cores
        line(
            f"{name}, {shown}", f"{1e3 * seconds / n_cells:.2f} ms a cell",
            f"{seconds:,.0f} s ({1e3 * of_cores / n_cells:.2f} ms of cores a cell), "
            f"peak {peak_gib():.2f} GiB resident ({before:.2f} before)",
        )  # fmt: skip

    timed(
        "integrate",
        lambda: integrate_cells(
            corpus, ("batch",), None, None, TuningSettings(tune="frozen"),
            settings=IntegrationSettings(), where=HeadRun(folder / "integrate"), seed=0,
        ),
    )  # fmt: skip
    timed(
        "impute, mean and sd of all to zarr",
        lambda: impute_corpus(
            corpus, folder / "imputed.zarr", ("batch",), None, None,
            settings=DecoderSettings(), run=HeadRun(folder / "impute"), seed=0,
        ),
    )  # fmt: skip


def correction(n_batches: int = 1000, of_each: int = 200, width: int = 10) -> None:
    """Fit the correction on random populations in many batches."""
    from genemodel.integration.shared_clusters import SharedClusterCorrection

    rng = np.random.default_rng(0)
    batch_C = np.repeat(np.arange(n_batches), of_each)
    centre_KD = 4 * rng.normal(size=(12, width))
    latent_CD = centre_KD[rng.integers(0, 12, batch_C.size)] + rng.normal(
        size=(batch_C.size, width)
    )
    latent_CD += 0.5 * rng.normal(size=(n_batches, width))[batch_C]
    begin = time.perf_counter()
    SharedClusterCorrection().fit_transform(latent_CD.astype(np.float32), batch_C)
    seconds = time.perf_counter() - begin
    line(
        f"correction, {n_batches:,} batches of {of_each}", f"{seconds:,.0f} s",
        f"peak {peak_gib():.2f} GiB resident",
    )  # fmt: skip


def bench_heads(sizes: list[int]) -> None:
    """Run every size, and the correction, in a process of its own."""
    print(f"heads with their defaults, from a corpus, {N_GENES:,} genes, {N_BATCHES} batches")
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, str(n), folder], check=True)
    subprocess.run([sys.executable, __file__], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        heads_of(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        correction()
