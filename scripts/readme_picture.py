"""Draws the picture of README.md: generated cells before and after `gm.integrate`.

    python scripts/readme_picture.py

The cells are made by the package: human, four batches on platforms of different depth, six types.
About two minutes on one core; the same picture each time.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc

import genemodel as gm
from genemodel.reports.plots import umap_of

OUT = Path(__file__).parents[1] / "docs" / "images" / "before_after.png"
N_CELLS, N_GENES, SEED = 3000, 1500, 1


def main() -> None:
    cells = gm.synthetic(
        2 * N_CELLS, n_genes=N_GENES, genes_per_cell=300, n_cell_types=6, seed=SEED
    )["human"]
    cells.obs["batch"] = [name.replace("human_", "") for name in cells.obs["batch"].astype(str)]
    plain = sc.AnnData(cells.X.copy(), obs=cells.obs)
    sc.pp.normalize_total(plain, target_sum=1e4)
    sc.pp.log1p(plain)
    sc.pp.pca(plain, n_comps=30)
    gm.integrate(cells, batch_key="batch", seed=0)

    figure, axes = plt.subplots(1, 4, figsize=(12, 3.5), dpi=150)
    embeddings = {
        "before: PCA of log counts": plain.obsm["X_pca"],
        "after: gm.integrate": cells.obsm["X_integrated"],
    }
    rng = np.random.default_rng(0)
    for (title, embedding), pair in zip(embeddings.items(), (axes[:2], axes[2:]), strict=True):
        xy, shown = umap_of(embedding, seed=0)
        order = rng.permutation(len(shown))
        for axis, column, palette in zip(
            pair, ("batch", "cell_type"), ("Dark2", "tab10"), strict=True
        ):
            values = cells.obs[column].astype("category").iloc[shown]
            colours = plt.get_cmap(palette)(values.cat.codes.to_numpy())
            axis.scatter(*xy[order].T, c=colours[order], s=2.5, linewidths=0)
            axis.set(xticks=[], yticks=[], box_aspect=1)
            axis.set_title(f"{title}\nby {column.replace('_', ' ')}", fontsize=10)
            for side in axis.spines.values():
                side.set_color("0.8")
            if pair[0] is axes[0]:
                handles = [
                    plt.Line2D([], [], ls="", marker="o", ms=4, color=plt.get_cmap(palette)(i))
                    for i in range(len(values.cat.categories))
                ]
                names = list(values.cat.categories)
                axis.legend(
                    handles, names, fontsize=7, frameon=False, ncols=2, handletextpad=0.1,
                    columnspacing=0.6, loc="upper center", bbox_to_anchor=(0.5, -0.01),
                )  # fmt: skip
    figure.tight_layout(w_pad=0.5)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, bbox_inches="tight", metadata={"Software": None})
    print(f"{OUT}, {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
