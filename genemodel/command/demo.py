"""The main job in miniature: corpus, pre-training, embedding, report, in minutes on a CPU."""

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError, DataError
from genemodel.settings import PathText, renamed
from genemodel.writing import whole

logger = logging.getLogger(__name__)

GENERATED, FETCHED = "generated", "pbmc3k"
# Enough for UMAPs and neighbours that mean something, few enough for seconds.
SHOWN_CELLS = 3000


@renamed(data="input")
@dataclass(frozen=True)
class DemoSettings(InputSettings):
    """Settings of ``genemodel demo``, see ``configs/demo.yaml``."""

    input: tuple[PathText, ...] = (GENERATED,)
    out: PathText = "runs/demo"
    vocabulary: PathText = ""
    cells: int = 6000
    steps: int = 200
    seed: int = 0


def demo(settings: DemoSettings) -> str:
    """Run the demo, and say where everything is."""
    from genemodel.bundle.bundle import Bundle
    from genemodel.corpus.corpus import Corpus
    from genemodel.corpus.split import usual_groups
    from genemodel.genes import GeneVocabulary
    from genemodel.reports.demo import write_demo_report
    from genemodel.train.recipe import pretrain, split

    begin = time.perf_counter()
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    corpus_path = out / "corpus"
    if corpus_path.exists():
        logger.info("1/4 corpus: %s is there already", corpus_path)
        corpus = Corpus.open(corpus_path)
    else:
        files = _files(settings, out)
        logger.info("1/4 corpus: checking counts and matching genes of %s files", len(files))
        vocabulary = (
            GeneVocabulary.read(settings.vocabulary)
            if settings.vocabulary
            else GeneVocabulary.builtin()
        )
        corpus = Corpus.build(
            files,
            corpus_path,
            vocabulary=vocabulary,
            **settings.options(),
        )
    description = corpus.describe()
    description.to_html(out / "corpus.html")
    logger.info("    %s cells; readiness report: %s", f"{len(corpus):,}", out / "corpus.html")

    by = usual_groups(corpus)
    recipe = _recipe(settings, corpus_path, out / "run", by, corpus)
    logger.info("2/4 pre-training %s steps; held out by %s", settings.steps, by or "nothing")
    bundle_path = pretrain(recipe)

    logger.info("3/4 embedding held-out cells")
    bundle = Bundle.load(bundle_path)
    _, cells = split(recipe.holdout, corpus, recipe.corpus)
    rng = np.random.default_rng(settings.seed)
    if cells.size > SHOWN_CELLS:
        cells = np.sort(rng.choice(cells, SHOWN_CELLS, replace=False))
    embeddings, obs = embed_corpus_cells(corpus, cells, bundle, seed=settings.seed)

    logger.info("4/4 report")
    curves = pd.read_csv(out / "run" / "metrics.csv")
    validation = pd.read_csv(out / "run" / "validation.csv")
    report = write_demo_report(
        out / "report.html",
        curves=curves,
        validation=validation,
        embeddings=embeddings,
        obs=obs,
        corpus_text=description.to_text(),
        settings=json.loads((out / "run" / "settings.json").read_text()),
        held_out_by=by,
        seed=settings.seed,
    )
    minutes = (time.perf_counter() - begin) / 60
    return (
        f"{report.to_string()}\n\n"
        f"Done in {minutes:.1f} minutes.\n"
        f"  report     {out / 'report.html'}\n"
        f"  model      {bundle_path}   (gm.load, gm.embed)\n"
        f"  corpus     {corpus_path}   readiness report: {out / 'corpus.html'}\n"
        f"  run        {out / 'run'}   metrics.csv, validation.csv, checkpoints"
    )


def _files(settings: DemoSettings, out: Path) -> list[Path]:
    """Files of raw counts for the corpus: generated, fetched, or the user's."""
    if settings.input == (GENERATED,):
        from genemodel.simulation.cells import synthetic

        logger.info("    generating %s human and mouse cells", f"{settings.cells:,}")
        files = []
        for name, adata in synthetic(
            settings.cells, n_genes=2500, genes_per_cell=350, n_batches=6, seed=settings.seed
        ).items():
            path = out / "data" / f"{name}.h5ad"
            with whole(path) as partial:
                adata.write_h5ad(partial)
            files.append(path)
        return files
    if settings.input == (FETCHED,):
        return [_fetch_pbmc3k(out)]
    files = [Path(name) for name in settings.input]
    for path in files:
        if not path.exists():
            raise DataError(
                f"input={path}: no such file. Give files with raw counts, input={GENERATED} or "
                f"input={FETCHED}."
            )
    return files


def _fetch_pbmc3k(out: Path) -> Path:
    path = out / "data" / "pbmc3k.h5ad"
    if path.exists():
        return path
    import urllib.error

    import scanpy as sc

    logger.info("    fetching pbmc3k through scanpy")
    try:
        adata = sc.datasets.pbmc3k()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"input={FETCHED} needs the internet, and scanpy could not fetch it here ({error}). "
            f"Use input={GENERATED}, or input=FILE.h5ad with raw counts of your own."
        ) from error
    adata.obs["species"] = "human"
    with whole(path) as partial:
        adata.write_h5ad(partial)
    return path


def _recipe(settings: DemoSettings, corpus: Path, run: Path, by: str, opened: Any) -> Any:
    """Compose the demo's pre-training from ``configs/experiment/pretrain_demo.yaml``."""
    from genemodel.command import config_files
    from genemodel.settings import parse
    from genemodel.train.settings import PretrainSettings

    if settings.steps < 1:
        raise ConfigError(f"steps={settings.steps}: it must be at least 1.")
    every = max(1, settings.steps // 5)
    values = config_files.compose(
        "pretrain",
        [
            "experiment=pretrain_demo",
            f"corpus={json.dumps(str(corpus))}",
            f"out={json.dumps(str(run))}",
            f"seed={settings.seed}",
            f"holdout.by={json.dumps(by)}",
            f"trainer.max_steps={settings.steps}",
            f"trainer.validate_every={every}",
            f"trainer.checkpoint_every={every}",
            f"optim.warmup_steps={min(20, settings.steps // 5)}",
        ],
    )
    values["holdout"]["groups"] = _one_group_per_species(opened, by, settings.seed) if by else []
    return parse(PretrainSettings, values)


def _one_group_per_species(corpus: Any, by: str, seed: int) -> list[str]:
    """Draw one group to hold out from every species that has two or more."""
    group_C, names = corpus.codes(by) if by == "dataset" else corpus.codes("dataset", by)
    species_C, _ = corpus.codes("species")
    rng = np.random.default_rng(seed)
    drawn = [
        int(rng.choice(groups))
        for s in np.unique(species_C)
        if (groups := np.unique(group_C[(species_C == s) & (group_C >= 0)])).size >= 2
    ]
    # Groups can hold several species: they count once, and one must stay for training.
    chosen = sorted(set(drawn))[: np.unique(group_C[group_C >= 0]).size - 1]
    return [names[g] for g in chosen] or [names[int(np.max(group_C))]]


def embed_corpus_cells(
    corpus: Any, cells: np.ndarray, bundle: Any, *, seed: int
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Embed cells of a corpus with a model, with PCA, and with a model of random weights.

    Parameters
    ----------
    corpus
        Open corpus.
    cells
        Permanent numbers, ascending.
    bundle
        The model.
    seed
        Of the random weights and of PCA.

    Returns
    -------
    Embeddings by name, one row a cell, and the cells' obs.
    """
    import scipy.sparse as sp
    import torch

    from genemodel.inference.cell_vectors import encode
    from genemodel.inference.counts import VocabularyChunk
    from genemodel.metrics.light import pca_of_lognorm
    from genemodel.model.gene_model import GeneModel

    runs = np.split(cells, np.flatnonzero(np.diff(cells) > 1) + 1)
    blocks = [corpus.read(int(run[0]), int(run[-1]) + 1) for run in runs]
    lengths = np.concatenate([np.diff(block.starts_C1) for block in blocks])
    counts_CV = sp.csr_matrix(
        (
            np.concatenate([block.count_N for block in blocks]).astype(np.float32),
            np.concatenate([block.gene_N for block in blocks]).astype(np.int32),
            np.concatenate([[0], np.cumsum(lengths)]),
        ),
        shape=(cells.size, len(corpus.vocabulary)),
    )
    obs = pd.DataFrame(index=[str(c) for c in cells])
    for column in ("species", "dataset", "batch", "donor", "cell_type"):
        codes, names = corpus.codes(column)
        if (codes[cells] >= 0).any():
            obs[column] = pd.Categorical.from_codes(codes[cells], names).remove_unused_categories()
    position = {name: i for i, name in enumerate(bundle.species)}
    species_C = obs["species"].astype(str).map(position).to_numpy(np.int64)
    chunk = VocabularyChunk(
        0, counts_CV, species_C, np.asarray(counts_CV.sum(1)).ravel().astype(np.float32)
    )
    torch.manual_seed(seed)
    random = dataclasses.replace(
        bundle,
        model=GeneModel(
            bundle.model.settings, n_tokens=len(bundle.vocabulary), n_species=len(bundle.species),
            context=bundle.tokens.context,
        ),
        heads={},
    )  # fmt: skip
    embeddings = {
        "genemodel": encode(chunk, bundle),
        "random weights": encode(chunk, random.to(bundle.device)),
    }
    embeddings["PCA"] = pca_of_lognorm(counts_CV, n_comps=30, n_hvg=2000, seed=seed)
    return embeddings, obs
