#!/usr/bin/env python3
"""Damages every file of a corpus, a checkpoint and every kind of model, and says what readers did.

    python scripts/corruption.py [flips=8] [cuts=2] [seed=0]

Each file loses one bit (``flips`` places, drawn, and two near the ends), its end (``cuts`` places,
drawn, and half of it, its last byte, all of it), gets a byte behind its end, and goes missing; then
everything is read. A case is

    refused   a DataError (or, of checkpoints, a warning and the one before instead)
    unnamed   the same, without the name of the file or of what it is part of
    harmless  what is read is equal in every value
    silent    what is read is another thing, and nobody says so
    crash     any other exception, a signal, or two minutes without an answer

Cases are read in a process of their own, so that a segmentation fault is counted and not suffered.
`corpus verify` has to name the file in every case of a corpus, harmless ones included. Ends with 1
where a case is silent, a crash, unnamed, or not found by verify.
"""

import dataclasses
import hashlib
import logging
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.training_manifest import Fingerprints, TrainedSource, TrainingManifest
from genemodel.corpus.corpus import Corpus, verify_corpus
from genemodel.errors import DataError
from genemodel.genes import GeneVocabulary
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import DecoderSettings
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.integrate import integrate
from genemodel.integration.model import IntegratedModel
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings
from genemodel.settings import to_values
from genemodel.train.checkpoint import CheckpointWriter, newest_checkpoint

OUTCOMES = ("refused", "unnamed", "harmless", "silent", "crash")
ANSWER_S = 120.0
N_GENES, N_CELLS = 150, 60


# -- what there is to damage ---------------------------------------------------------------------


def vocabulary() -> GeneVocabulary:
    """Give a few genes of two species."""
    rows = GeneVocabulary.builtin().genes
    return GeneVocabulary(rows[rows["token"] < 3 + N_GENES].reset_index(drop=True))


def cells(genes: GeneVocabulary, species: str, seed: int) -> ad.AnnData:
    """Raw counts with two donors and two batches."""
    rng = np.random.default_rng(seed)
    rows = genes.genes
    names = rows["ensembl_id"][rows["species"] == species].astype(str)
    counts = rng.poisson(rng.gamma(0.6, 1.5, (1, len(names))), (N_CELLS, len(names))) + 0
    counts[:, 0] += 1
    number = np.arange(N_CELLS)
    obs = pd.DataFrame(
        {
            "species": species,
            "batch": [f"b{i % 2}" for i in number],
            "donor": [f"d{i % 3}" for i in number],
            "cell_type": rng.choice(["T cell", "B cell"], N_CELLS),
        },
        index=[f"{species}{i}" for i in number],
    )
    matrix = sp.csr_matrix(counts.astype(np.float32))
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=pd.Index(names)))


def make_corpus(folder: Path) -> Path:
    """Build a corpus of two species, one of them appended."""
    genes = vocabulary()
    human = {"h": cells(genes, "human", 0)}
    corpus = Corpus.build(human, folder / "corpus", vocabulary=genes)
    return corpus.append({"m": cells(genes, "mouse", 1)}).path


def bundle() -> Bundle:
    """Give a model of random weights."""
    genes = vocabulary()
    torch.manual_seed(0)
    shape = ModelSettings(layers=1, width=16, heads=2, ffn=16)
    model = GeneModel(shape, n_tokens=len(genes), n_species=len(genes.species), context=64)
    return Bundle(
        model=model.eval(),
        vocabulary=genes,
        tokens=TokenSettings(context=64, budget=256),
        medians_V=np.linspace(0.5, 2, len(genes)).astype(np.float32),
        heads={"a.weight": torch.arange(4.0)},
        settings={"a": {"n": 4}},
        provenance={"steps": 7, "validation": {"val/total": 1e-05}},
        training=training(len(genes)),
    )


def training(n_tokens: int) -> TrainingManifest:
    """Give a source of as many cells as have a fingerprint."""
    source = TrainedSource("h", "", "human", "CC0", "", "f", N_CELLS, N_CELLS, "0", n_tokens)
    drawn = np.random.default_rng(0).integers(1, 2**64, 3 * N_CELLS, dtype=np.uint64)
    return TrainingManifest((source,), (Fingerprints.of(drawn),))


def make_bundle(folder: Path) -> Path:
    """Save it."""
    bundle().save(folder / "bundle")
    return folder / "bundle"


def make_integrated(folder: Path) -> Path:
    """Train an embedding for a moment, on the cell vectors of a bundle."""
    result = integrate(
        cells(vocabulary(), "human", 0), batch_key="batch", model=bundle(), species="human",
        settings=IntegrationSettings(n_genes=50, hidden=16, rank=8, steps=2, passes=1),
    )  # fmt: skip
    assert isinstance(result, IntegratedModel)
    result.save(folder / "integrated")
    return folder / "integrated"


def make_imputation(folder: Path) -> Path:
    """Train an imputation for a moment."""
    counts = cells(vocabulary(), "human", 0)
    model = ImputationModel.train(
        sp.csr_matrix(counts.X), np.arange(N_CELLS) % 2, ("a", "b"),
        DecoderSettings(hidden=8, latent=4, epochs=1), genes=list(counts.var_names), seed=0,
    )  # fmt: skip
    model.save(folder / "imputation")
    return folder / "imputation"


def make_checkpoints(folder: Path) -> Path:
    """Save two checkpoints; the newer one is damaged."""
    model = bundle().model
    with CheckpointWriter(keep=2) as writer:
        for step in (1, 2):
            state = {"model": model.state_dict(), "step": step, "seen": [1, 2.5, "x", None]}
            writer.save(folder / "checkpoints" / f"step-{step:08d}", state, {"step": step})
    return folder / "checkpoints" / "step-00000002"


# -- reading everything that is in it --------------------------------------------------------------


def read_corpus(path: Path) -> Any:
    """Give all that a corpus says, counts included."""
    corpus = Corpus.open(path)
    block = corpus.read(0, len(corpus))
    columns = {column: corpus.codes(column) for column in corpus.columns}
    statistics = {name: vars(values) for name, values in corpus.statistics.items()}
    return (
        block.starts_C1, block.gene_N, block.count_N, columns, statistics, corpus.library_C,
        corpus.mito_C, corpus.vocabulary.fingerprint,
    )  # fmt: skip


def read_bundle(path: Path) -> Any:
    """Give all that a bundle holds."""
    return of_bundle(Bundle.load(path, device="cpu"))


def of_bundle(found: Bundle) -> Any:
    """List weights, genes, medians and settings."""
    return (
        found.fingerprint, found.medians_V, to_values(found.model.settings),
        to_values(found.tokens), found.settings, found.provenance,
        of_training(found.training),
    )  # fmt: skip


def of_training(training: TrainingManifest | None) -> Any:
    """List the cells that a model was trained on."""
    if training is None:
        return None
    return training.about(), [prints.values() for prints in training.fingerprints]


def read_integrated(path: Path) -> Any:
    """Give all that a fine-tuned embedding holds."""
    found = IntegratedModel.load(path, device="cpu")
    fitted = vars(found.correction) if found.correction is not None else None
    within = of_bundle(found.bundle) if found.bundle is not None else None
    return (
        found.net.state_dict(), fitted, found.genes, to_values(found.settings), found.batches,
        found.batch_keys, found.labels, within, found.provenance, of_training(found.training),
    )  # fmt: skip


def read_imputation(path: Path) -> Any:
    """Give all that an imputation model holds."""
    found = ImputationModel.load(path)
    trained = found.trained
    return (
        trained.decoder.state_dict(), found.dispersion_G, found.kept_G, found.genes,
        to_values(found.settings), found.batches, found.batch_keys, found.unseen_share,
        trained.heldout_nats, trained.history, dataclasses.asdict(trained.coverage),
        found.provenance, of_training(found.training),
    )  # fmt: skip


class Older(DataError):
    """The checkpoint before was taken, which says so in a warning."""


def read_checkpoint(path: Path) -> Any:
    """Take the newest checkpoint; the older one counts as a refusal of the damaged one."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("genemodel").addHandler(handler)
    try:
        found = newest_checkpoint(path.parent)
    finally:
        logging.getLogger("genemodel").removeHandler(handler)
    if found is None:
        raise RuntimeError("the whole checkpoint before the damaged one is not found")
    # The older state has to be the older one, to the bit; where it is the newer one, so does that.
    content = (found.state(), found.about)
    if found.path == path:
        return content
    if content[1] != {"step": 1} or content[0]["step"] != 1:
        raise RuntimeError("the checkpoint before the damaged one is another")
    if path.exists():
        raise Older(" ".join(said))
    return content


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "corpus": (make_corpus, read_corpus),
    "checkpoint": (make_checkpoints, read_checkpoint),
    "bundle": (make_bundle, read_bundle),
    "integrated": (make_integrated, read_integrated),
    "imputation": (make_imputation, read_imputation),
}


def digest(value: Any) -> str:
    """Give one number for plain values, arrays and tensors, nested; equal only for equal ones."""
    total = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            add(part.numpy())
        elif isinstance(part, np.ndarray):
            total.update(f"{part.dtype}{part.shape}".encode())
            values = part.tolist() if part.dtype == object else part
            total.update(repr(values).encode() if part.dtype == object else values.tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                total.update(f"<{key}>".encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            total.update(f"[{len(part)}]".encode())
            for inside in part:
                add(inside)
        else:
            total.update(repr(part).encode())

    add(value)
    return total.hexdigest()


# -- damage ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing done to one file."""

    file: str
    damage: str
    place: int = 0

    def done_to(self, whole: bytes) -> bytes | None:
        """Give the damaged content; None for no file."""
        if self.damage == "missing":
            return None
        if self.damage == "cut":
            return whole[: self.place]
        if self.damage == "longer":
            return whole + b"\0"
        broken = bytearray(whole)
        broken[self.place // 8] ^= 1 << (self.place % 8)
        return bytes(broken)


def cases_of(path: Path, flips: int, cuts: int, rng: np.random.Generator) -> Iterator[Case]:
    """List what is done to every file below ``path``."""
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name, size = file.relative_to(path).as_posix(), file.stat().st_size
        yield Case(name, "missing")
        yield Case(name, "longer")
        drawn = rng.integers(0, size, cuts) if size else []
        for length in sorted({0, size // 2, size - 1, *map(int, drawn)} & set(range(size))):
            yield Case(name, "cut", length)
        drawn = rng.integers(0, 8 * size, flips) if size else []
        for bit in sorted({3, 8 * size - 2, *map(int, drawn)} & set(range(8 * size))):
            yield Case(name, "flip", bit)


def judge(kind: str, path: Path, case: Case, whole_digest: str) -> tuple[str, str]:
    """Damage one file, read everything, mend it; give the outcome and what was said."""
    file = path / case.file
    original = file.read_bytes()
    broken = case.done_to(original)
    file.unlink()
    if broken is not None:
        file.write_bytes(broken)
    try:
        said = ""
        try:
            found = digest(KINDS[kind][1](path))
            outcome = "harmless" if found == whole_digest else "silent"
        except DataError as error:
            said = str(error)
            named = (case.file, case.file.split("/")[0], path.name)
            outcome = "refused" if any(name in said for name in named) else "unnamed"
        except Exception as error:  # noqa: BLE001 - that is what is counted
            outcome, said = "crash", f"{type(error).__name__}: {error}"
        if kind == "corpus":
            try:
                listed = verify_corpus(path)
                if not any(case.file in line for line in listed):
                    outcome, said = "silent", f"not found by verify, which lists {listed}"
            except Exception as error:  # noqa: BLE001
                outcome, said = "crash", f"verify: {type(error).__name__}: {error}"
        return outcome, said
    finally:
        file.write_bytes(original)


def work(places: dict[str, Path], cases: list[tuple[str, Case]], pipe: Connection) -> None:
    """Judge cases of any kinds, one answer each."""
    logging.getLogger("genemodel").propagate = False
    wholes: dict[str, str] = {}
    for kind, case in cases:
        if kind not in wholes:
            wholes[kind] = digest(KINDS[kind][1](places[kind]))
        pipe.send(judge(kind, places[kind], case, wholes[kind]))
    pipe.close()


def judged(places: dict[str, Path], cases: list[tuple[str, Case]]) -> Iterator[tuple[str, str]]:
    """Judge cases in a process that may die; it is started again behind the case that killed it.

    One for all kinds: it takes longer to start than to read a model a hundred times.
    """
    context = multiprocessing.get_context("spawn")
    whole = {p: p.read_bytes() for path in places.values() for p in path.rglob("*") if p.is_file()}
    done = 0
    while done < len(cases):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(places, cases[done:], theirs))
        process.start()
        theirs.close()
        try:
            while done < len(cases):
                if not ours.poll(ANSWER_S):
                    raise EOFError
                yield ours.recv()
                done += 1
        except EOFError:
            process.kill()
            process.join()
            for file, content in whole.items():
                file.write_bytes(content)
            yield "crash", f"the process ended with {process.exitcode}"
            done += 1
        process.join()


def matrix(
    folder: Path, *, flips: int = 8, cuts: int = 2, seed: int = 0, kinds: tuple[str, ...] = ()
) -> dict[str, Counter[str]]:
    """Run all cases; prints what is not as it should be, and gives outcomes per kind."""
    places = {kind: KINDS[kind][0](folder) for kind in kinds or KINDS}
    cases = [
        (kind, case)
        for kind, path in places.items()
        for case in cases_of(path, flips, cuts, np.random.default_rng(seed))
    ]
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in places}
    left, begin = Counter(kind for kind, _ in cases), time.perf_counter()
    for (kind, case), (outcome, said) in zip(cases, judged(places, cases), strict=True):
        counts[kind][outcome] += 1
        if outcome not in ("refused", "harmless"):
            print(f"{kind}: {case.file} {case.damage} {case.place}: {outcome}: {said[:300]}")
        left[kind] -= 1
        if not left[kind]:
            row = "  ".join(f"{outcome} {counts[kind][outcome]:5d}" for outcome in OUTCOMES)
            now = time.perf_counter()
            print(
                f"{kind:11s} {counts[kind].total():5d} cases  {row}  {now - begin:.0f} s",
                flush=True,
            )
            begin = now
    return counts


def main(words: list[str]) -> int:
    """Run with the settings of the command line."""
    options = {name: int(value) for name, _, value in (word.partition("=") for word in words)}
    if unknown := set(options) - {"flips", "cuts", "seed"}:
        print(f"no setting {', '.join(sorted(unknown))}; see the text at the top of the script")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="corruption-"))
    try:
        counts = matrix(folder, **options)
    finally:
        shutil.rmtree(folder)
    total = sum(counts.values(), Counter[str]())
    print("all        ", sum(total.values()), "cases ", dict(total))
    return int(any(total[outcome] for outcome in ("unnamed", "silent", "crash")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
