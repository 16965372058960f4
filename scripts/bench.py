#!/usr/bin/env python3
"""Speed, as ratios to a named alternative measured in the same run.

    python scripts/bench.py                 # everything, a few minutes on two cores
    python scripts/bench.py tokens packing loader scale step build embed
    python scripts/bench.py heads --heads 10000 100000 1000000  # the last takes half an hour
    python scripts/bench.py perturb         # --size v2 for Geneformer V2's full width
    python scripts/bench.py gpu             # real training runs on a GPU, about ten minutes
    python scripts/bench.py gpu --device cpu --size tiny    # the same code, small, on a CPU

Absolute figures belong to the machine; the ratios are what a claim may quote. ``step`` and ``gpu``
need transformers (extra ``bench``). On a GPU ``step`` runs in bf16 and prints the utilisation too.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


def best_of(run: Callable[[], object], repeats: int = 3) -> float:
    """Fastest of some runs in seconds; the first, which compiles, is not counted."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def line(name: str, figure: str, note: str = "") -> None:
    print(f"  {name:<52}{figure:>18}  {note}", flush=True)


def random_csr(n_cells: int, genes: int, n_tokens: int = 40_000, seed: int = 0) -> sp.csr_matrix:
    """Cells of about ``genes`` expressed genes with skewed counts; ids ascending in a row."""
    rng = np.random.default_rng(seed)
    rows = [
        np.sort(rng.choice(np.arange(3, n_tokens), n, replace=False))
        for n in rng.integers(int(genes * 0.9), int(genes * 1.1), n_cells)
    ]
    indptr = np.concatenate([[0], np.cumsum([r.size for r in rows])])
    indices = np.concatenate(rows)
    data = rng.geometric(0.5, indices.size).astype(np.float32)
    return sp.csr_matrix((data, indices, indptr), shape=(n_cells, n_tokens))


def bench_tokens() -> None:
    """Rank-value tokeniser against a per-cell argsort over CSR rows, one thread, equal result."""
    from genemodel.batches.tokens import rank_cells

    print("tokeniser, 2,000 genes a cell, one thread")
    X = random_csr(3000, 2000)
    median = np.random.default_rng(1).uniform(0.5, 3.0, X.shape[1]).astype(np.float32)
    inverse = (1 / median).astype(np.float32)
    starts, gene = X.indptr.astype(np.int64), X.indices.astype(np.int32)
    out_starts, out = np.empty_like(starts), np.empty(gene.size, np.int64)

    def ours() -> None:
        rank_cells(starts, gene, X.data, inverse, 2048, out_starts, out)

    rows: list[np.ndarray] = []

    def loop() -> None:
        rows.clear()
        for i in range(X.shape[0]):
            row = X[i]
            value = row.data * inverse[row.indices]
            rows.append(row.indices[np.argsort(-value, kind="stable")[:2048]])

    def bare_loop() -> None:
        for i in range(X.shape[0]):
            a, b = X.indptr[i], X.indptr[i + 1]
            value = X.data[a:b] * inverse[X.indices[a:b]]
            X.indices[a:b][np.argsort(-value, kind="stable")[:2048]]

    fast, slow, bare = best_of(ours), best_of(loop, 1), best_of(bare_loop, 1)
    same = all(
        np.array_equal(gene[out[a:b]], row)
        for a, b, row in zip(out_starts[:-1], out_starts[1:], rows, strict=True)
    )
    line("argsort per CSR row (X[i])", f"{X.shape[0] / slow:,.0f} cells/s")
    line("argsort per slice of raw arrays", f"{X.shape[0] / bare:,.0f} cells/s")
    line("genemodel radix", f"{X.shape[0] / fast:,.0f} cells/s", f"equal result: {same}")
    line("ratio to argsort per CSR row", f"{slow / fast:.1f}×", f"{bare / fast:.1f}× to raw slices")


def bench_packing() -> None:
    """Packing plan: fill and speed, against padding to the longest of 16."""
    from genemodel.batches.packing import plan_bins

    print("packing, 16,384 tokens, real-like lengths (log-normal, mean ~1,300, cut at 2,048)")
    length = np.random.default_rng(0).lognormal(7.1, 0.55, 8192 * 4).clip(100, 2048).astype(int)
    windows = np.split(length, 4)
    plans = [plan_bins(w, 16_384, 512) for w in windows]
    fill = length.sum() / (sum(len(p) for p in plans) * 16_384)
    groups = length[: length.size // 16 * 16].reshape(-1, 16)
    seconds = best_of(lambda: [plan_bins(w, 16_384, 512) for w in windows])
    line("fill, padded to the longest of 16", f"{groups.mean() / groups.max(1).mean():.3f}")
    line("fill, packed", f"{fill:.4f}", f"{length.size / seconds / 1e6:.1f} M cells/s")


def build_bench_corpus(folder: Path, n_cells: int, genes: int) -> "object":
    from genemodel.corpus.corpus import Corpus
    from genemodel.simulation.cells import synthetic

    files = []
    for name, adata in synthetic(n_cells, n_genes=12_000, genes_per_cell=genes).items():
        path = folder / f"{name}.h5ad"
        adata.write_h5ad(path)
        files.append(path)
    return Corpus.build(files, folder / "corpus")


def bench_loader() -> None:
    """Read, tokenise and pack from disk."""
    from genemodel.batches.loader import CellStream, inverse_medians
    from genemodel.batches.tokens import TokenSettings

    print("loader (read + tokenise + pack), ~1,500 genes a cell, page cache warm")
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_bench_corpus(Path(folder), 24_000, 1500)
        n = len(corpus)
        line("genes a cell", f"{corpus.n_genes_C.mean():.0f}", f"{n:,} cells")
        blocks = [(a, min(a + 128, n)) for a in range(0, n, 128)]
        np.random.default_rng(0).shuffle(blocks)
        groups = [blocks[i : i + 64] for i in range(0, len(blocks), 64)]
        raw = best_of(lambda: [corpus.read_blocks(g) for g in groups])

        def epoch() -> None:
            stream = CellStream(
                corpus, np.arange(n), TokenSettings(), seed=0,
                inverse_median_V=inverse_medians(corpus.medians_V), endless=False,
            )  # fmt: skip
            assert sum(batch.n_cells for batch, _ in stream) == n

        packed = best_of(epoch)
        line("reading alone, random blocks of 128", f"{n / raw:,.0f} cells/s")
        line("read + tokenise + pack", f"{n / packed:,.0f} cells/s", f"{os.cpu_count()} cores")


def tiled_corpus(folder: Path, copies: int) -> "object":
    """Build a corpus of 65,536 generated cells, ``copies`` times by hard links to its groups."""
    from dataclasses import replace

    from genemodel.cells.sources import stream_source
    from genemodel.corpus.corpus import Corpus
    from genemodel.corpus.manifest import write_manifest
    from genemodel.simulation.cells import SyntheticWorld, synthetic_chunks

    n = 65_536
    world = SyntheticWorld(species=("human",), n_genes=12_000, genes_per_cell=1500)
    genes = list(next(synthetic_chunks(1000, 1000, world=world)).var_names)
    obs = pd.DataFrame({"dataset": "generated"}, index=[f"cell{i}" for i in range(n)])
    source = stream_source(
        "generated", genes, obs, lambda: (c.X for c in synthetic_chunks(n, 8192, world=world)),
        species="human",
    )  # fmt: skip
    one = Corpus.build([source], folder / "corpus")
    manifest = one.manifest
    groups, objects = list(manifest.groups), dict(manifest.objects)
    for k in range(1, copies):
        for group in manifest.groups:
            name = f"copy{k}_{group.name}"
            groups.append(replace(group, name=name))
            for path, record in manifest.objects.items():
                copy = path.replace(f"/{group.name}/", f"/{name}/")
                copy = copy.replace(f"/{group.name}.npz", f"/{name}.npz")
                if copy != path:
                    (one.path / copy).parent.mkdir(parents=True, exist_ok=True)
                    (one.path / copy).hardlink_to(one.path / path)
                    objects[copy] = record
    write_manifest(one.path, replace(manifest, n_cells=n * copies, groups=groups, objects=objects))
    return Corpus.open(one.path)


def resident() -> float:
    """GiB of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def bench_scale(n_batches: int = 1200, cells_per_s: float = 3000.0) -> None:
    """What one rank of many spends on cells that are not its own, and whether it keeps up."""
    from genemodel.batches.loader import CellStream, inverse_medians
    from genemodel.batches.tokens import TokenSettings
    from genemodel.batches.transfer import Ahead

    print("one rank of many: read + tokenise + pack its share, CPU time of the process")
    with tempfile.TemporaryDirectory() as folder:
        corpus = tiled_corpus(Path(folder), 16)
        n = len(corpus)
        line("genes a cell", f"{corpus.n_genes_C.mean():.0f}", f"{n:,} cells (65,536, 16 times)")

        def stream(rank: int, world: int) -> CellStream:
            return CellStream(
                corpus, np.arange(n), TokenSettings(), seed=0,
                inverse_median_V=inverse_medians(corpus.medians_V), rank=rank, world_size=world,
            )  # fmt: skip

        ours = stream(0, 64)
        begin = time.process_time()
        planned = [ours.plan(number).cell_C for number in range(32)]
        used = time.process_time() - begin
        line("planning any cell, from lengths", f"{used / sum(map(len, planned)) * 1e6:.2f} µs")
        ours.read_part(planned[0][:1024])
        begin = time.process_time()
        for cell_C in planned[:16]:
            ours.read_part(cell_C[:1024])
        used = time.process_time() - begin
        line("decoding a cell", f"{used / (16 * 1024) * 1e6:.1f} µs")
        for world in (64, 1, 8, 24, 256):
            before = resident()
            batches = iter(stream(0, world))
            for _ in range(800):  # the start: compiling, first plans, the groups' metadata
                next(batches)
            begin, wall, cells = time.process_time(), time.perf_counter(), 0
            for _ in range(n_batches):
                cells += next(batches)[0].n_cells
            used, wall = time.process_time() - begin, time.perf_counter() - wall
            if world == 1:
                held = resident() - before
            batches.close()
            line(
                f"rank 0 of {world}, CPU a global cell",
                f"{used / cells / world * 1e6:.2f} µs",
                f"{used / cells * 1e6:.0f} µs a cell of its own; {cells / wall:,.0f} cells/s",
            )
        line("memory held by rank 0 of 1", f"{held:.2f} GiB", "more than before it began")
        # As for a GPU: a thread of its own takes from the stream.
        ahead = Ahead(stream(0, 64), lambda item: item, lambda item: item)
        batches, cells = iter(ahead), 0
        next(batches)
        begin, before = time.perf_counter(), ahead.waited_s
        while (took := time.perf_counter() - begin) < 30:
            batch, _ = next(batches)
            cells += batch.n_cells
            # The device is busy with all cells so far until then.
            busy_until = begin + (ahead.waited_s - before) + cells / cells_per_s
            time.sleep(max(0.0, busy_until - time.perf_counter()))
        batches.close()
        line(
            f"rank 0 of 64, a consumer of {cells_per_s:,.0f} cells/s waits",
            f"{(ahead.waited_s - before) / took:.2%}",
            f"{cells / took:,.0f} cells/s over {took:.0f} s, {64 * cells / took:,.0f} global",
        )


def bench_step(size: str, n_cells: int, corpus: str | None) -> None:
    """A training step against a padded Hugging Face BertForMaskedLM of the same shape."""
    import torch
    from bench_gpu import bert_of, padded_batches

    from genemodel.batches.loader import pack
    from genemodel.batches.packing import plan_bins
    from genemodel.batches.tokens import TokenSettings
    from genemodel.batches.window import Window
    from genemodel.command.config_files import config_folder, values_of
    from genemodel.corpus.statistics import GeneStatistics
    from genemodel.heads.decode_counts import DecodeCountsSettings
    from genemodel.heads.masked_value import MaskedValueSettings
    from genemodel.heads.pretraining import PretrainingObjectives, PretrainingSettings
    from genemodel.model.compiling import compile_for_training
    from genemodel.model.flops import device_peak, encoder_flops, gene_head_flops, training_flops
    from genemodel.model.gene_model import GeneModel
    from genemodel.model.settings import ModelSettings
    from genemodel.settings import parse, to_values

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    settings = parse(ModelSettings, values_of(config_folder() / "model" / f"{size}.yaml"))
    n_tokens, context = 25_426, 2048
    rng = np.random.default_rng(0)
    if corpus is None:
        length = rng.lognormal(7.1, 0.55, n_cells).clip(100, context - 1).astype(int)
    else:
        from genemodel.corpus.corpus import Corpus

        length = rng.choice(Corpus.open(corpus).n_genes_C, n_cells).clip(8, context - 1)
        length = length.astype(int)
    tokens = int(length.sum() + n_cells)
    budget = 65_536 if cuda else 16_384
    print(
        f"training step, {size} ({settings.layers}×{settings.width}), vocabulary {n_tokens:,}, "
        f"{n_cells} cells of mean length {length.mean():.0f}, {'bf16' if cuda else 'fp32'}, "
        f"{torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'}"
    )
    rng = np.random.default_rng(1)
    genes = np.concatenate(
        [np.sort(rng.choice(np.arange(3, n_tokens), n, replace=False)) for n in length]
    ).astype(np.int32)
    counts = rng.geometric(0.5, genes.size).astype(np.float32)
    ends = np.cumsum(length)
    window = Window(
        ends - length, ends, genes, counts, np.add.reduceat(counts, ends - length),
        np.zeros(n_cells, np.int64), np.full(n_cells, -1), np.zeros(n_cells, np.int64),
        np.arange(n_cells),
    )  # fmt: skip
    token_settings = TokenSettings(context=context, budget=budget).placed(float(length.mean() + 1))
    inverse = np.ones(n_tokens, np.float32)
    batches = [
        pack(window, rows, inverse, token_settings).to(device)
        for rows in plan_bins(window.lengths_C(token_settings), budget, token_settings.max_cells)
    ]

    used: list[float] = []

    def clock(step: Callable[[], object]) -> float:
        def run() -> None:
            begin = time.process_time()
            step()
            if cuda:
                torch.cuda.synchronize()
            used.append(time.process_time() - begin)

        used.clear()
        return best_of(run, 5 if cuda else 2)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=cuda)

    # The same single objective as the opponent: masked gene identity, 15 %.
    torch.manual_seed(0)
    task = PretrainingObjectives(
        PretrainingSettings(
            masked_value=MaskedValueSettings(weight=0),
            decode_counts=DecodeCountsSettings(weight=0),
        ),
        width=settings.width, statistics=GeneStatistics.empty(1, n_tokens), n_batches=0,
        measured_XV=torch.ones(1, 1, dtype=torch.bool), seed=0,
    ).to(device)  # fmt: skip
    model = GeneModel(settings, n_tokens=n_tokens, n_species=1, context=context).to(device)
    if cuda:
        compile_for_training(model, task)
    ours = torch.optim.AdamW([*model.parameters(), *task.parameters()], lr=1e-4, fused=cuda)

    def our_step() -> None:
        for batch in batches:
            prepared = task.prepare(batch)
            with autocast():
                part = task(model, model(prepared.seen), prepared, trivial=False)["masked_gene"]
            (part.total / part.items).backward()
        ours.step()
        ours.zero_grad()

    our_s = clock(our_step)
    our_cpu_s = min(used[1:])
    bert = bert_of(to_values(settings), n_tokens, context).to(device)
    theirs = torch.optim.AdamW(bert.parameters(), lr=1e-4, fused=cuda)
    width = 16
    padded = [
        [x.to(device) for x in batch] for batch in padded_batches(length + 1, n_tokens, width)
    ]

    def their_step() -> None:
        for ids, mask, labels in padded:
            with autocast():
                loss = bert(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
        theirs.step()
        theirs.zero_grad()

    their_s = clock(their_step)
    their_cpu_s = min(used[1:])
    line(f"BertForMaskedLM, padded to the longest of {width}", f"{n_cells / their_s:,.2f} cells/s")
    line("genemodel, packed, head on masked rows", f"{n_cells / our_s:,.2f} cells/s")
    line("ratio", f"{their_s / our_s:.1f}×", f"{tokens / our_s:,.0f} tokens/s")
    if not cuda:
        # On a busy machine the clock also counts what others do.
        line("ratio of CPU time", f"{their_cpu_s / our_cpu_s:.1f}×")
    if cuda and (peak := device_peak(torch.cuda.get_device_name())):
        flops = encoder_flops(settings, length + 1)
        flops += gene_head_flops(settings, int(0.15 * tokens), n_tokens)
        line("useful MFU", f"{training_flops(flops) / our_s / peak:.1%}")


def bench_embed(size: str, n_cells: int, corpus: str | None) -> None:
    """Embedding against one batch at a time: packed on the same thread, copied, run, fetched."""
    import torch

    from genemodel.batches.loader import inverse_medians, pack
    from genemodel.batches.packing import plan_bins
    from genemodel.batches.tokens import TokenSettings
    from genemodel.bundle.bundle import Bundle
    from genemodel.command.config_files import config_folder, values_of
    from genemodel.genes import GeneVocabulary
    from genemodel.inference.cell_vectors import embedder
    from genemodel.inference.counts import VocabularyChunk, precision, window_of
    from genemodel.model.gene_model import GeneModel
    from genemodel.model.settings import ModelSettings
    from genemodel.settings import parse

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    settings = parse(ModelSettings, values_of(config_folder() / "model" / f"{size}.yaml"))
    vocabulary = GeneVocabulary.builtin()
    tokens = TokenSettings()
    torch.manual_seed(0)
    model = GeneModel(
        settings, n_tokens=len(vocabulary), n_species=len(vocabulary.species),
        context=tokens.context,
    )  # fmt: skip
    medians = np.full(len(vocabulary), np.nan, np.float32)
    bundle = Bundle(model.eval(), vocabulary, tokens, medians).to(device)
    rng = np.random.default_rng(0)
    if corpus is None:
        length = rng.lognormal(7.1, 0.55, n_cells).clip(100, 4000).astype(int)
    else:
        from genemodel.corpus.corpus import Corpus

        length = rng.choice(Corpus.open(corpus).n_genes_C, n_cells).astype(int)
    genes = [np.sort(rng.choice(np.arange(3, len(vocabulary)), n, replace=False)) for n in length]
    counts = sp.csr_matrix(
        (
            rng.geometric(0.5, length.sum()).astype(np.float32),
            np.concatenate(genes),
            np.concatenate([[0], np.cumsum(length)]),
        ),
        (n_cells, len(vocabulary)),
    )
    library = np.asarray(counts.sum(1)).ravel().astype(np.float32)
    chunk = VocabularyChunk(0, counts, np.zeros(n_cells, np.int64), library)
    print(
        f"embedding, {size} ({settings.layers}×{settings.width}), {n_cells} cells of mean length "
        f"{length.mean():.0f}, {'bf16' if cuda else 'fp32'}, "
        f"{torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'}"
    )
    inverse = inverse_medians(medians)
    one = np.empty((n_cells, settings.width), np.float32)
    now = np.empty_like(one)

    @torch.inference_mode()
    def one_at_a_time() -> None:
        window = window_of(chunk)
        lengths = window.lengths_C(tokens)
        order = np.argsort(-lengths, kind="stable")
        for rows in plan_bins(lengths[order], tokens.budget, tokens.max_cells):
            batch = pack(window, order[rows], inverse, tokens).to(device)
            with precision(device):
                cells = bundle.model(batch).cell_CD[: rows.size]
            one[order[rows]] = cells.float().cpu().numpy()

    forward = embedder(bundle, compile=cuda)

    def ahead() -> None:
        for _, vectors in forward.over([chunk]):
            now[:] = vectors

    def packing() -> None:
        window = window_of(chunk)
        lengths = window.lengths_C(tokens)
        for rows in plan_bins(lengths, tokens.budget, tokens.max_cells):
            pack(window, rows, inverse, tokens)

    before_s, now_s = best_of(one_at_a_time), best_of(ahead)
    line("packing alone, which nothing waits for now", f"{n_cells / best_of(packing):,.0f} cells/s")
    far = float(np.abs(one - now).max() / np.abs(one).max())
    line("one batch at a time, one thread", f"{n_cells / before_s:,.1f} cells/s")
    line(
        "genemodel, packed ahead, fetched late" + (", compiled" if cuda else ""),
        f"{n_cells / now_s:,.1f} cells/s", f"largest difference {far:.1e} of the largest value",
    )  # fmt: skip
    line("ratio", f"{before_s / now_s:.2f}×")


def build_one(n_cells: int, folder: Path) -> None:
    """Build a corpus of generated cells and print its cells/s and peak memory."""
    from genemodel.cells.sources import stream_source
    from genemodel.corpus.corpus import Corpus
    from genemodel.simulation.cells import SyntheticWorld, synthetic_chunks

    world = SyntheticWorld(species=("human",), n_genes=12_000, genes_per_cell=1000)
    # One pass for the table of genes and cells; the counts of the second are made as they are read.
    first = next(synthetic_chunks(1000, 1000, world=world))
    obs = pd.DataFrame({"dataset": "generated"}, index=[f"cell{i}" for i in range(n_cells)])
    seconds = 0.0

    def blocks() -> Iterator[sp.csr_matrix]:
        nonlocal seconds
        cells = synthetic_chunks(n_cells, 8192, world=world)
        while True:
            begin = time.perf_counter()
            chunk = next(cells, None)
            seconds += time.perf_counter() - begin
            if chunk is None:
                return
            yield chunk.X

    genes = list(first.var_names)
    source = stream_source("generated", genes, obs, blocks, species="human")
    Corpus.build(
        [stream_source("warm", genes, obs[:1000], lambda: iter([first.X]), species="human")],
        folder / "warm",
    )
    begin = time.perf_counter()
    corpus = Corpus.build([source], folder / "corpus")
    total = time.perf_counter() - begin - seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert len(corpus) == n_cells
    line(
        f"{n_cells:,} cells, {corpus.n_genes_C.mean():.0f} genes a cell",
        f"{n_cells / total:,.0f} cells/s",
        f"peak {peak:.2f} GiB resident (generating the cells took {seconds:.0f} s more)",
    )


def bench_build(sizes: list[int]) -> None:
    """Corpus building: memory and speed at growing size, each in a process of its own."""
    print("corpus build from generated cells")
    for n in sizes:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            subprocess.run([sys.executable, __file__, "--build-one", str(n), folder], check=True)


def bench_workers(n_files: int = 2) -> None:
    """Corpus building by several processes and by a Dask cluster: the bytes of one."""
    from distributed import LocalCluster

    from genemodel.cells.sources import GROUP_CELLS
    from genemodel.corpus.corpus import Corpus
    from genemodel.simulation.cells import SyntheticWorld, synthetic_chunks

    n_cells = n_files * GROUP_CELLS
    print(f"corpus build from {n_files} h5ad files of {GROUP_CELLS:,} cells")
    world = SyntheticWorld(species=("human",), n_genes=12_000, genes_per_cell=1000)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        files = []
        for number in range(n_files):
            chunks = list(synthetic_chunks(GROUP_CELLS, 8192, world=world))
            whole = ad.AnnData(sp.vstack([c.X for c in chunks], format="csr"), var=chunks[0].var)
            whole.obs["species"] = "human"
            files.append(folder / f"{number}.h5ad")
            whole.write_h5ad(files[-1])
        fingerprints = set()

        def build(label: str, **engine: object) -> None:
            begin = time.perf_counter()
            corpus = Corpus.build(files, folder / label.replace(" ", "_"), **engine)
            rate = n_cells / (time.perf_counter() - begin)
            fingerprints.add(corpus.fingerprint)
            line(label, f"{rate:,.0f} cells/s", "starting the processes included")

        build("warm-up", workers=1)
        build("workers=1", workers=1)
        build("workers=2", workers=2)
        with LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as cluster:
            build("engine=dask", engine="dask", scheduler=cluster.scheduler_address)
        line("fingerprints", "equal" if len(fingerprints) == 1 else "DIFFERENT")


def main() -> None:
    """Run the benches named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("benches", nargs="*", default=["tokens", "packing", "loader", "step"])
    parser.add_argument(
        "--size",
        nargs="+",
        help="model sizes: one for step, embed (small) and perturb (small, v2); several for gpu",
    )
    parser.add_argument(
        "--corpus", help="step, embed: take the cells' lengths from this corpus; gpu: train on it"
    )
    parser.add_argument("--build", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--heads", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--genes", type=int, default=12, help="perturb: genes that are deleted")
    parser.add_argument("--batch", type=int, default=16, help="perturb: cells of a padded batch")
    gpu = parser.add_argument_group("gpu")
    gpu.add_argument("--device", choices=("cuda", "cpu"), help="by default a GPU")
    gpu.add_argument("--budget", type=int, nargs="+", help="tokens of a micro-batch, a run each")
    gpu.add_argument("--context", type=int, help="most tokens of a cell")
    gpu.add_argument("--steps", type=int, help="steps to measure, after ten to warm up")
    gpu.add_argument("--cells", type=int, help="cells to make; for step: cells in all (32)")
    gpu.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    gpu.add_argument("--activation-checkpointing", action="store_true")
    gpu.add_argument("--no-opponent", action="store_true", help="without BertForMaskedLM")
    gpu.add_argument("--profile", type=int, default=0, help="steps to trace in every run")
    gpu.add_argument("--out", help="folder to keep runs, traces and gpu.json in")
    parser.add_argument("--build-one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build_one:
        build_one(int(arguments.build_one[0]), Path(arguments.build_one[1]))
        return
    for name in arguments.benches:
        match name:
            case "tokens":
                bench_tokens()
            case "packing":
                bench_packing()
            case "loader":
                bench_loader()
            case "scale":
                bench_scale()
            case "step":
                size = (arguments.size or ["small"])[0]
                bench_step(size, arguments.cells or 32, arguments.corpus)
            case "embed":
                size = (arguments.size or ["small"])[0]
                bench_embed(size, arguments.cells or 32, arguments.corpus)
            case "gpu":
                from bench_gpu import Plan, bench_gpu

                bench_gpu(Plan.of(arguments))
            case "perturb":
                from bench_perturb import bench_perturb

                size = (arguments.size or ["small"])[0]
                bench_perturb(size, arguments.cells or 16, arguments.genes, arguments.batch)
            case "heads":
                from bench_heads import bench_heads

                bench_heads(arguments.heads)
            case "build":
                bench_build(arguments.build)
                bench_workers()
            case _:
                known = "tokens, packing, loader, scale, step, gpu, build, embed, heads, perturb"
                parser.error(f"no bench {name!r}: {known}")


if __name__ == "__main__":
    main()
