#!/usr/bin/env python3
"""The whole path on real counts of five species, and what the model is worth on held-out data.

    python scripts/real_data.py DATA KNOWLEDGE OUT [key=value ...]

DATA holds raw-count h5ad files (obs: species, dataset, batch, cell_type), KNOWLEDGE gene tables
(genes_SPECIES.tsv.gz) and HCOP orthologs (orthologs_human_to_16species_hcop.tsv.gz). Builds the
vocabulary and the corpus of every file with at least 5,000 genes, verifies it, pre-trains `tiny`
with three data sets held out, and scores the embedding of held-out, author-labelled cells beside
PCA and random weights. Further settings go to `genemodel pretrain`. Done parts are not repeated.
"""

import dataclasses
import logging
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch

from genemodel.bundle.bundle import Bundle
from genemodel.command import config_files
from genemodel.corpus.corpus import Corpus
from genemodel.genes import GeneVocabulary, add_species
from genemodel.inference.cell_vectors import encode
from genemodel.inference.counts import VocabularyCells
from genemodel.metrics.light import pca_of_lognorm
from genemodel.model.gene_model import GeneModel
from genemodel.reports.demo import embedding_scores, objective_table
from genemodel.settings import parse
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings

ADDED = ("zebrafish", "worm", "fly")
MIN_GENES = 5000
HELD_OUT = ("pbmc_1k_v3", "pbmc_facs_zheng2017", "mca_scgoclust")
LABELLED = "human_pbmc_facs_zheng2017.h5ad"  # sorted populations, held out


def n_genes(path: Path) -> int:
    """Genes of an h5ad file, read without its counts."""
    with h5py.File(path) as file:
        var = file["var"]
        return int(var[var.attrs["_index"]].shape[0])


def build(data: Path, knowledge: Path, out: Path) -> Corpus:
    """Vocabulary of five species, then the corpus."""
    vocabulary_path = out / "five_species.tsv.gz"
    if not vocabulary_path.exists():
        known = None
        for name in ADDED:
            _, report = add_species(
                name=name,
                genes=knowledge / f"genes_{name}.tsv.gz",
                orthologs=knowledge / "orthologs_human_to_16species_hcop.tsv.gz",
                to="human",
                vocabulary=known,
                out=vocabulary_path.with_name(f"with_{name}.tsv.gz"),
            )
            print(report)
            known = vocabulary_path.with_name(f"with_{name}.tsv.gz")
        assert known is not None
        known.rename(vocabulary_path)
    if (out / "corpus").exists():
        return Corpus.open(out / "corpus")
    files = sorted(p for p in data.glob("*.h5ad") if n_genes(p) >= MIN_GENES)
    begin = time.perf_counter()
    corpus = Corpus.build(files, out / "corpus", vocabulary=GeneVocabulary.read(vocabulary_path))
    print(
        f"corpus: {len(files)} files, {len(corpus):,} cells, "
        f"{len(corpus.vocabulary):,} tokens, {time.perf_counter() - begin:.0f} s"
    )
    print(corpus.describe().to_text())
    return corpus


def main() -> None:
    """Run all parts."""
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    data, knowledge, out = map(Path, sys.argv[1:4])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out.mkdir(parents=True, exist_ok=True)
    corpus = build(data, knowledge, out)
    problems = corpus.verify()
    print(f"verify: {problems or 'clean'}")
    begin = time.perf_counter()
    settings = config_files.compose(
        "pretrain",
        [
            "experiment=pretrain_tiny", f"corpus={out / 'corpus'}", f"out={out / 'run'}",
            "holdout.by=dataset", f"holdout.groups=[{','.join(HELD_OUT)}]",
            "trainer.accelerator=cpu", "trainer.max_steps=1300", "trainer.max_minutes=19",
            "trainer.validate_every=100", "trainer.validation_batches=40",
            "trainer.log_every=20", "optim.lr=2e-3", "task.masked_gene.fraction=0.1",
            *sys.argv[4:],
        ],
    )  # fmt: skip
    bundle = Bundle.load(pretrain(parse(PretrainSettings, settings)))
    minutes = (time.perf_counter() - begin) / 60
    validation = pd.read_csv(out / "run" / "validation.csv")
    best = validation.loc[[validation["val/total"].idxmin()]]
    print(f"\nheld out: {', '.join(HELD_OUT)}; this session {minutes:.1f} minutes")
    print(objective_table(best)[["held_out", "trivial", "ratio"]].round(4).to_string())

    cells = VocabularyCells(data / LABELLED, bundle)
    chunks = list(cells.chunks(100_000))
    assert len(chunks) == 1
    torch.manual_seed(0)
    random = dataclasses.replace(
        bundle,
        heads={},
        model=GeneModel(
            bundle.model.settings, n_tokens=len(bundle.vocabulary), n_species=len(bundle.species),
            context=bundle.tokens.context,
        ),
    )  # fmt: skip
    embeddings = {
        "genemodel": encode(chunks[0], bundle),
        "PCA": pca_of_lognorm(chunks[0].counts_CV, n_comps=30, n_hvg=2000, seed=0),
        "random weights": encode(chunks[0], random),
    }
    labels = cells.source.obs[["cell_type"]].astype(str)
    print(f"\n{LABELLED}: {len(labels):,} cells, labels by sorting, never trained on")
    print(embedding_scores(embeddings, labels).round(3).to_string())
    assert all(np.isfinite(e).all() for e in embeddings.values())


if __name__ == "__main__":
    main()
