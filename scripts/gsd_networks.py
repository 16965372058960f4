"""Networks of BEELINE's GSD, a simulated network whose truth is known, by a model of its own cells.

    python scripts/gsd_networks.py KNOWLEDGE OUT [--steps 1500] [--seed 0]

KNOWLEDGE holds ``beeline_gsd_expression.tsv.gz`` (2,000 cells, 19 genes) and
``beeline_gsd_network.tsv``. The expression is no counts: Poisson counts are drawn from it, among
sixty genes of constant rate that stand for the rest of a cell, a small model is trained on them for
some minutes, and all methods are scored on the same counts; GSD's own values beside, for methods
that need no counts. What the data set publishes for |Pearson| is an AUPRC ratio of 1.27.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.bundle.bundle import Bundle
from genemodel.corpus.corpus import Corpus
from genemodel.genes.vocabulary import N_SPECIAL, GeneVocabulary
from genemodel.networks.cells import Genes
from genemodel.networks.classical import grnboost, partial, pearson
from genemodel.networks.network import network
from genemodel.networks.result import shown
from genemodel.networks.scoring import Truth, null_networks, score_table
from genemodel.settings import parse
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings

# Rest of the cell, and molecules of a cell: the depth of a 10x cell's panel.
OTHERS, OTHERS_RATE, MOLECULES = 60, 4.0, 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("knowledge", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--cells", type=int, default=400, help="cells that are looked at")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, seed = arguments.out, arguments.seed
    out.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(arguments.knowledge / "beeline_gsd_expression.tsv.gz", sep="\t")
    genes = [name for name in table if name != "cell" and not name.startswith("pseudotime")]
    values_CG = table[genes].to_numpy(float).clip(0)
    network_file = arguments.knowledge / "beeline_gsd_network.tsv"
    known = pd.read_csv(network_file, sep="\t")
    place = {name: i for i, name in enumerate(genes)}
    edges = np.unique([
        (place[a], place[b]) for a, b in zip(known["tf"], known["target"], strict=True) if a != b
    ], axis=0)  # fmt: skip

    print("GSD's own values")
    every = np.arange(len(genes))
    own = Genes(every, every)
    strengths = {
        "pearson": np.abs(pearson(values_CG, values_CG)),
        "partial": np.abs(partial(values_CG, every, every)[0]),
        "grnboost": grnboost(values_CG.astype(np.float32), every, every, seed=seed),
    }
    mean_G = values_CG.mean(0)
    strengths |= null_networks(own, mean_G, mean_G, seed)
    scores = score_table(strengths, Truth.of(edges, own), mean_G, bootstraps=200, seed=seed)
    print(shown(scores).to_string(index=False))

    vocabulary = _vocabulary(genes)
    rng = np.random.default_rng(seed)
    rate_CG = np.hstack([values_CG, np.full((len(values_CG), OTHERS), OTHERS_RATE)])
    depth_C = MOLECULES * rng.gamma(10, 0.1, len(rate_CG))
    counts = rng.poisson(rate_CG * depth_C[:, None])
    cells = ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {
                "species": "human",
                "dataset": "gsd",
                "donor": [f"d{i % 10}" for i in range(len(table))],
            },
            index=table["cell"].astype(str),
        ),
        var=pd.DataFrame(index=pd.Index(vocabulary.genes["symbol"])),
    )
    if not (out / "run" / "bundle").exists():
        Corpus.build([cells], out / "corpus", vocabulary=vocabulary, overwrite=True)
        pretrain(parse(PretrainSettings, {
            "corpus": str(out / "corpus"), "out": str(out / "run"),
            "tokens": {"context": 128, "budget": 2048},
            "model": {"layers": 2, "width": 32, "heads": 2, "ffn": 64, "components": 16},
            "optim": {"lr": 3e-3, "warmup_steps": 50},
            "task": {"decode_counts": {"weight": 1.0, "keep_min": 0.3, "keep_max": 0.9},
                     "masked_value": {"weight": 1.0}, "masked_gene": {"weight": 0.0}},
            "trainer": {"max_steps": arguments.steps, "validate_every": 250,
                        "accelerator": "cpu"},
            "seed": seed,
        }))  # fmt: skip
    bundle = Bundle.load(out / "run" / "bundle", device="cpu")
    result = network(
        cells, bundle, truth=network_file, tfs=genes, min_coverage=0.0, min_cells=1,
        max_cells=arguments.cells, jacobian_cells=100, min_fraction=0.0, seed=seed,
    )  # fmt: skip
    print("\nPoisson counts, and a model trained on them")
    print(result)


def _vocabulary(genes: list[str]) -> GeneVocabulary:
    """GSD's names, not all of which are genes, and others beside them."""
    names = [*genes, *(f"OTHER{i}" for i in range(OTHERS))]
    return GeneVocabulary(pd.DataFrame({
        "token": np.arange(len(names)) + N_SPECIAL, "species": "human",
        "ensembl_id": [f"ENSG{i:011d}" for i in range(len(names))], "symbol": names,
        "biotype": "protein_coding", "aliases": "",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
