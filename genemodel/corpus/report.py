"""The AI-readiness report of a corpus: what a curator looks at before a model is trained on it.

Text, table, or one self-contained HTML page with plots.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from genemodel.settings import some
from genemodel.writing import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from genemodel.corpus.corpus import Corpus

# Thresholds of the warnings.
SHALLOW_GENES = 200
SMALL_PANEL = 5_000
FEW_CELLS = 50
MUCH_MITO = 0.2
MUCH_DROPPED = 0.2
MANY_MISSING = 0.5
LOW_MATCH = 0.5
MANY_COUNTS_LOST = 0.2
_METADATA = ("dataset", "batch", "donor", "cell_type", "assay", "tissue")
# More sources than this make no readable plot; the table has them all.
_PLOTTED = 60
_COLOURS = ("#3b6ea5", "#c8553d", "#588b5e", "#8c6bb1", "#b58900", "#5f6b6d", "#2aa198", "#a0527c")


@dataclass(frozen=True, repr=False)
class CorpusReport:
    """What was found.

    Attributes
    ----------
    title
        One line: cells, tokens, species, sources.
    table
        One row per source.
    warnings
        What a curator should look at, worst first.
    facts
        Name and value pairs over the whole corpus.
    """

    title: str
    table: pd.DataFrame
    warnings: tuple[str, ...]
    facts: dict[str, str]
    samples: dict[str, Any] = field(repr=False, default_factory=dict)

    def __repr__(self) -> str:
        return f"CorpusReport({self.title}; {len(self.warnings)} warnings)"

    @classmethod
    def of(cls, corpus: "Corpus") -> Self:
        """Examine a corpus; reads the per-cell index, not the counts."""
        table, codes = _examine(corpus)
        duplicates = _duplicates(corpus)
        warnings = _warnings(corpus, table, codes, duplicates)
        n_values = sum(g.n_values for g in corpus.manifest.groups)
        size = sum(o.size for o in corpus.manifest.objects.values())
        dropped: dict[str, int] = {}
        for source in corpus.sources:
            for reason, n in source.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + n
        facts = {
            "cells kept": f"{len(corpus):,} of {sum(s.n_read for s in corpus.sources):,}",
            "dropped": ", ".join(f"{n:,} {r}" for r, n in dropped.items()) or "none",
            "tokens": f"{len(corpus.vocabulary):,}",
            "genes seen": ", ".join(
                f"{name} {int((part.nonzero_V > 0).sum()):,}"
                for name, part in corpus.statistics.items()
            ),
            "cells per species": ", ".join(
                f"{name} {part.n_cells:,}" for name, part in corpus.statistics.items()
            ),
            "genes per cell": f"median {np.median(corpus.n_genes_C):,.0f}",
            "counts per cell": f"median {np.median(corpus.library_C):,.0f}",
            "counts kept": _counts_kept(corpus),
            "explicit zeros removed": f"{_per_file(corpus, 'explicit_zeros'):,}",
            "fractional counts rounded": f"{_per_file(corpus, 'rounded'):,}",
            "cells that occur twice": f"{duplicates[0]:,}",
            "size": f"{size / 1e6:,.1f} MB, {size / max(1, n_values):.2f} bytes per count",
            "vocabulary": corpus.vocabulary.fingerprint[:16],
            "corpus": corpus.fingerprint[:16],
        }
        title = (
            f"{corpus.path.name}: {len(corpus):,} cells, {len(corpus.statistics)} species, "
            f"{len(corpus.sources)} sources"
        )
        samples = {
            "source": corpus.source_C,
            "names": [_label(s.name, s.species, corpus) for s in corpus.sources],
            "species": [s.species for s in corpus.sources],
            "n_genes": corpus.n_genes_C,
            "library": corpus.library_C,
            "mito": corpus.mito_C / np.maximum(1, corpus.library_C),
            "dropped": [s.dropped for s in corpus.sources],
        }
        return cls(title, table, tuple(warnings), facts, samples)

    def to_frame(self) -> pd.DataFrame:
        """Return the table, one row per source."""
        return self.table.copy()

    def to_text(self) -> str:
        """Everything as plain text."""
        width = max(map(len, self.facts))
        lines = [self.title, ""]
        lines += [f"  {name:<{width}}  {value}" for name, value in self.facts.items()]
        lines += ["", "Warnings" if self.warnings else "No warnings"]
        lines += [f"  {number}. {text}" for number, text in enumerate(self.warnings, start=1)]
        shown = _shown(self.table)
        lines += ["", "Sources", shown.to_string(max_colwidth=40)]
        return "\n".join(lines) + "\n"

    def to_html(self, path: str | Path) -> Path:
        """Write one page that needs no other file; returns its path."""
        path = Path(path)
        figures = "".join(
            f"<figure>{_svg(draw)}<figcaption>{html.escape(caption)}</figcaption></figure>"
            for draw, caption in self._figures()
        )
        facts = "".join(
            f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>"
            for k, v in self.facts.items()
        )
        warnings = "".join(f"<li>{html.escape(w)}</li>" for w in self.warnings)
        table = _shown(self.table).to_html(border=0, classes="sources", justify="left")
        page = _PAGE.format(
            title=html.escape(self.title),
            facts=facts,
            warnings=f"<ol>{warnings}</ol>" if warnings else "<p>None.</p>",
            figures=figures,
            table=table,
        )
        with whole(path) as partial:
            partial.write_text(page, encoding="utf-8")
        return path

    def _figures(self) -> list[tuple[Callable[[], Any], str]]:
        s = {k: v[:_PLOTTED] if isinstance(v, list) else v for k, v in self.samples.items()}
        table = self.table.iloc[:_PLOTTED]
        return [
            (
                lambda: _bars(table, s["names"], s["dropped"]),
                "Cells per source: kept, and dropped with the reason.",
            ),
            (
                lambda: _boxes(s, "n_genes", "genes per cell", log=True),
                "Genes per cell (box: quartiles, whiskers: 5 % and 95 %).",
            ),
            (
                lambda: _boxes(s, "library", "counts per cell", log=True),
                "Counts per cell. Sources of very different depth are told apart by a model.",
            ),
            (
                lambda: _boxes(s, "mito", "mitochondrial share", log=False),
                "Share of mitochondrial counts per cell.",
            ),
            (
                lambda: _missing(table),
                "Share of cells whose metadata is missing or says 'unknown'.",
            ),
            (
                lambda: _matched(table),
                "Genes of each file: in the vocabulary, and not. In per cent: share of the counts "
                "of its cells that these genes hold.",
            ),
        ]


def _label(name: str, species: str, corpus: "Corpus") -> str:
    """Name of a source; with the species where one file gave several."""
    several = sum(s.name == name for s in corpus.sources) > 1
    return f"{name} ({species})" if several else name


def _per_file(corpus: "Corpus", key: str) -> int:
    """Sum over files, of which one may be several sources."""
    values = {(s.name, s.file): int(getattr(s, key)) for s in corpus.sources}
    return sum(values.values())


def _counts_kept(corpus: "Corpus") -> str:
    """How many counts of the cells kept are of genes in the vocabulary, as far as known."""
    known = np.array([source.n_counts is not None for source in corpus.sources], bool)
    total = sum(source.n_counts or 0 for source in corpus.sources)
    kept = int(corpus.library_C[known[corpus.source_C]].sum())
    if not total:
        return "not noted when the corpus was built"
    of = "" if known.all() else f", of {int(known.sum())} of {known.size} sources"
    return f"{kept:,} of {total:,} ({kept / total:.1%}){of}"


def _examine(corpus: "Corpus") -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One row per source, and the codes of the metadata, -1 where missing."""
    codes = {column: corpus.codes(column)[0] for column in _METADATA}
    rows = []
    for number, source in enumerate(corpus.sources):
        (cell,) = np.nonzero(corpus.source_C == number)
        genes, library = corpus.n_genes_C[cell], corpus.library_C[cell]
        mito = corpus.mito_C[cell] / np.maximum(1, library)
        row: dict[str, Any] = {
            "source": _label(source.name, source.species, corpus),
            "species": source.species,
            "kind": source.kind,
            "counts in": source.layer,
            "read": source.n_read,
            "kept": source.n_cells,
            "dropped": "; ".join(f"{n:,} {reason}" for reason, n in source.dropped.items()),
            "genes": source.n_genes,
            "matched": source.n_matched,
            "summed": source.n_summed,
            "counts kept": library.sum() / source.n_counts if source.n_counts else np.nan,
        }
        for key, values in (("genes/cell", genes), ("counts/cell", library)):
            for name, q in (("5 %", 0.05), ("median", 0.5), ("95 %", 0.95)):
                row[f"{key} {name}"] = float(np.quantile(values, q)) if cell.size else np.nan
        row["mito"] = float(np.median(mito)) if cell.size else np.nan
        for column, label in (("batch", "batches"), ("donor", "donors"), ("cell_type", "labels")):
            used = codes[column][cell]
            row[label] = int(np.unique(used[used >= 0]).size)
        for column in _METADATA:
            share = (codes[column][cell] < 0).mean() if cell.size else np.nan
            row[f"no {column}"] = float(share)
        row["explicit zeros"] = source.explicit_zeros
        row["rounded"] = source.rounded
        row["repeated names"] = source.repeated_names
        row["licence"], row["citation"] = source.licence, source.citation
        rows.append(row)
    return pd.DataFrame(rows).set_index("source"), codes


def _duplicates(corpus: "Corpus") -> tuple[int, dict[tuple[int, int], int]]:
    """Cells whose content occurred before, and the pairs of sources that share cells."""
    _, inverse, counts = np.unique(corpus.checksum_C, return_inverse=True, return_counts=True)
    repeated = counts[inverse] > 1
    cells = np.flatnonzero(repeated)
    order = cells[np.argsort(inverse[cells], kind="stable")]
    same = inverse[order[:-1]] == inverse[order[1:]]
    ends = np.stack([corpus.source_C[order[:-1]][same], corpus.source_C[order[1:]][same]])
    found, times = np.unique(ends, axis=1, return_counts=True)
    pairs = {(int(a), int(b)): int(n) for a, b, n in zip(*found, times, strict=True)}
    return int((counts - 1).sum()), pairs


def _warnings(
    corpus: "Corpus",
    table: pd.DataFrame,
    codes: dict[str, np.ndarray],
    duplicates: tuple[int, dict[tuple[int, int], int]],
) -> list[str]:
    """Say what to look at, worst first."""
    found: list[str] = []
    names = list(table.index)
    for (a, b), n in sorted(duplicates[1].items(), key=lambda item: -item[1]):
        where = f"within {names[a]}" if a == b else f"in both {names[a]} and {names[b]}"
        found.append(
            f"{n:,} cells have the same counts {where}: a hold-out split may test on cells that "
            "were trained on"
        )
    found += _confounding(corpus, codes)
    for name, values in zip(names, (row for _, row in table.iterrows()), strict=True):
        if values["kept"] == 0:
            found.append(f"{name}: no cell is left")
            continue
        if values["genes"] < SMALL_PANEL:
            found.append(
                f"{name}: {values['genes']:,} genes only: a panel or a selection; the order of its "
                "genes is not that of a complete cell"
            )
        elif values["matched"] < LOW_MATCH * values["genes"]:
            found.append(
                f"{name}: {values['matched']:,} of {values['genes']:,} genes are in the vocabulary"
            )
        if values["counts kept"] < 1 - MANY_COUNTS_LOST:
            found.append(
                f"{name}: {values['counts kept']:.0%} of the counts of its cells are of genes in "
                "the vocabulary; the rest is lost"
            )
        if values["genes/cell median"] < SHALLOW_GENES:
            found.append(
                f"{name}: very shallow, median {values['genes/cell median']:,.0f} genes per cell"
            )
        if values["mito"] > MUCH_MITO:
            found.append(
                f"{name}: median mitochondrial share {values['mito']:.0%}: stressed or dying cells"
            )
        if values["read"] - values["kept"] > MUCH_DROPPED * values["read"]:
            found.append(f"{name}: dropped {values['dropped']} of {values['read']:,} cells")
        if values["kept"] < FEW_CELLS:
            found.append(f"{name}: {values['kept']:,} cells only")
        if values["repeated names"]:
            found.append(
                f"{name}: {values['repeated names']:,} cells have the name of an earlier one"
            )
    for source, name in zip(corpus.sources, names, strict=True):
        found += [f"{name}: {note}" for note in source.notes]
    for column in _METADATA:
        lacking = [str(n) for n in table.index[table[f"no {column}"] > MANY_MISSING]]
        if lacking:
            found.append(
                f"{column} is missing for most cells of {len(lacking)} of {len(table)} sources: "
                f"{some(lacking, 4)}"
            )
    depth = table["counts/cell median"].dropna()
    if len(depth) > 1 and depth.max() > 50 * depth.min():
        found.append(
            f"median depth runs from {depth.min():,.0f} ({depth.idxmin()}) to {depth.max():,.0f} "
            f"({depth.idxmax()}): read counts beside molecule counts?"
        )
    return found


def _confounding(corpus: "Corpus", codes: dict[str, np.ndarray]) -> list[str]:
    """Batch and label that cannot be told apart, within each data set."""
    found = []
    dataset_C, names = corpus.codes("dataset")
    for number, name in enumerate(names):
        here = (dataset_C == number) & (codes["batch"] >= 0) & (codes["cell_type"] >= 0)
        if not here.any():
            continue
        pairs = np.unique(np.stack([codes["batch"][here], codes["cell_type"][here]]), axis=1)
        n_batches, n_labels = np.unique(pairs[0]).size, np.unique(pairs[1]).size
        if n_batches < 2 or n_labels < 2:
            continue
        if pairs.shape[1] == n_batches or pairs.shape[1] == n_labels:
            found.append(
                f"dataset {name}: batch and cell_type are confounded ({n_batches} batches, "
                f"{n_labels} labels, no label in two batches or no batch with two labels): "
                "removing the batch removes the biology"
            )
    return found


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Columns and formats for reading."""
    shown = table.drop(columns=[c for c in table if c.startswith("no ")]).copy()
    lacking = table[[f"no {c}" for c in _METADATA]]
    shown["missing metadata"] = [
        ", ".join(
            f"{c.removeprefix('no ')} {v:.0%}" for c, v in row.items() if v and not np.isnan(v)
        )
        for _, row in lacking.iterrows()
    ]
    for column in shown:
        if column in ("mito", "counts kept"):
            shown[column] = shown[column].map(lambda v: "" if np.isnan(v) else f"{v:.1%}")
        elif shown[column].dtype.kind in "if":
            shown[column] = shown[column].map(lambda v: "" if np.isnan(v) else f"{v:,.0f}")
    rare = ("explicit zeros", "rounded", "repeated names", "summed", "dropped")
    for column in (*rare, "licence", "citation"):
        if (shown[column].isin(["0", ""])).all():
            shown = shown.drop(columns=column)
    return shown


# -- plots ----------------------------------------------------------------------------------------


def _axes(n_rows: int) -> "Axes":
    """Empty axes of a new figure, high enough for so many rows."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 0.9 + 0.26 * max(2, n_rows)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _rows(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [n if len(n) < 42 else n[:40] + "…" for n in names])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _bars(table: pd.DataFrame, names: list[str], dropped: list[dict[str, int]]) -> "Axes":
    axes = _axes(len(names))
    left = table["kept"].to_numpy(float)
    axes.barh(range(len(names)), left, color=_COLOURS[0], label="kept", height=0.7)
    for number, reason in enumerate(dict.fromkeys(r for d in dropped for r in d), start=1):
        part = np.array([d.get(reason, 0) for d in dropped], float)
        colour = _COLOURS[number % len(_COLOURS)]
        axes.barh(range(len(names)), part, left=left, color=colour, label=reason, height=0.7)
        left = left + part
    _rows(axes, names)
    axes.set_xlabel("cells", fontsize=8)
    if any(dropped):
        axes.legend(fontsize=7, frameon=False)
    return axes


def _boxes(samples: dict[str, Any], key: str, label: str, *, log: bool) -> "Axes":
    names, source, values = samples["names"], samples["source"], samples[key]
    axes = _axes(len(names))
    known = list(dict.fromkeys(samples["species"]))
    for number, species in enumerate(samples["species"]):
        here = values[source == number]
        if not here.size:
            continue
        low, first, middle, third, high = np.quantile(here, (0.05, 0.25, 0.5, 0.75, 0.95))
        colour = _COLOURS[known.index(species) % len(_COLOURS)]
        axes.plot([low, high], [number, number], color=colour, linewidth=1)
        axes.barh(number, third - first, left=first, height=0.6, color=colour, alpha=0.55)
        axes.plot([middle, middle], [number - 0.3, number + 0.3], color="black", linewidth=1.4)
    if log and (values > 0).any():
        axes.set_xscale("log")
    _rows(axes, names)
    axes.set_xlabel(label, fontsize=8)
    if len(known) > 1:
        for number, species in enumerate(known):
            axes.plot([], [], color=_COLOURS[number % len(_COLOURS)], linewidth=5, label=species)
        axes.legend(fontsize=7, frameon=False)
    return axes


def _missing(table: pd.DataFrame) -> "Axes":
    axes = _axes(len(table))
    shares = table[[f"no {c}" for c in _METADATA]].to_numpy(float)
    axes.imshow(shares, aspect="auto", cmap="OrRd", vmin=0, vmax=1)
    axes.grid(visible=False)
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            colour = "white" if share > 0.6 else "black"
            axes.text(
                column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour
            )
    _rows(axes, list(table.index))
    axes.set_xticks(range(len(_METADATA)), _METADATA)
    return axes


def _matched(table: pd.DataFrame) -> "Axes":
    axes = _axes(len(table))
    matched = table["matched"].to_numpy(float)
    rest = table["genes"].to_numpy(float) - matched
    axes.barh(range(len(table)), matched, color=_COLOURS[2], label="in the vocabulary", height=0.7)
    axes.barh(range(len(table)), rest, left=matched, color="#cccccc", label="not in it", height=0.7)
    for row, (share, genes) in enumerate(zip(table["counts kept"], table["genes"], strict=True)):
        if not np.isnan(share):
            axes.text(genes, row, f" {share:.1%}", va="center", fontsize=7)
    axes.set_xlim(0, 1.1 * max(1, int(table["genes"].max())))
    axes.axvline(SMALL_PANEL, color="black", linewidth=0.8, linestyle=":")
    _rows(axes, list(table.index))
    axes.set_xlabel("genes of the file", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return axes


def _svg(draw: Callable[[], "Axes"]) -> str:
    """Image of a plot, inlined."""
    figure = draw().get_figure(root=True)
    assert figure is not None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/svg+xml;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; color: #222; background: #fff; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ text-align: left; padding: 3px 10px 3px 0; vertical-align: top; }}
.facts th {{ font-weight: 600; white-space: nowrap; }}
.wide {{ overflow-x: auto; }}
.sources thead th {{ border-bottom: 1px solid #999; }}
.sources tbody tr:nth-child(odd) {{ background: #f5f5f5; }}
.sources td {{ white-space: nowrap; }}
figure {{ margin: 0 0 1.5rem; }} figure img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: 13px; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem; }}
ol {{ padding-left: 1.4rem; }}
</style></head><body>
<h1>{title}</h1>
<h2>Warnings</h2>{warnings}
<h2>Corpus</h2><table class="facts">{facts}</table>
<h2>Plots</h2><div class="plots">{figures}</div>
<h2>Sources</h2><div class="wide">{table}</div>
</body></html>
"""
