"""The page that goes with a model on the hub, written from what the model knows of itself.

Nothing on it is typed by hand: sources, licences and losses are those of the training.
"""

import json
from typing import Any

import yaml

import genemodel
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.loading import Model

CARD = "README.md"
_MOST_SOURCES = 200


def model_card(model: Model, address: str, *, licence: str | None = None) -> str:
    """Write the page of a model.

    Parameters
    ----------
    model
        What is to be published.
    address
        ``hf://ORG/NAME`` where it will be.
    licence
        Of the weights, as the hub spells it (``apache-2.0``, ``cc-by-4.0``); None: not stated.
    """
    head: dict[str, Any] = {
        "library_name": "genemodel",
        "tags": ["genemodel", "single-cell", "biology", "transcriptomics"],
    }
    if licence is not None:
        head["license"] = licence
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {address.rpartition('/')[2].partition('@')[0]}",
        f"{model.KIND[:1].upper()}{model.KIND[1:]} of single-cell expression, made with "
        f"[genemodel](https://pypi.org/project/genemodel) {_version(model)}.",
        "```python\nimport genemodel as gm\n\n"
        f'model = gm.load("{address}")\nprint(model.describe())\n```',
        *_sources(model.training),
        *_losses(model),
        *_contamination(model.training, address),
        *_provenance(model),
    ]
    return "\n\n".join(parts) + "\n"


def _version(model: Model) -> str:
    return str(model.provenance.get("genemodel", genemodel.__version__))


def _cell(value: object) -> str:
    """Write a value so that it cannot end a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in row)} |" for row in lines)


def _sources(training: TrainingManifest | None) -> list[str]:
    title = "## Trained on"
    if training is None:
        return [title, "Not known: the model keeps no record of its training cells."]
    rows: list[tuple[object, ...]] = [
        (s.name, s.species, f"{s.n_trained:,}", f"{s.n_cells - s.n_trained:,}",
         s.licence or "not known", s.citation)
        for s in training.sources[:_MOST_SOURCES]
    ]  # fmt: skip
    licences = sorted({s.licence or "not known" for s in training.sources})
    said = f"{training.n_trained:,} cells; licences of the data: {', '.join(licences) or 'none'}."
    if not training.complete:
        said += " Besides, on what the model it started from was trained on, which is unknown."
    if (left := len(training.sources) - len(rows)) > 0:
        said += f" {left:,} further sources are in `model.json`."
    names = ("source", "species", "cells", "held out", "licence", "citation")
    return [title, said, _table(names, rows)]


def _losses(model: Model) -> list[str]:
    found = model.provenance.get("validation") or {}
    rows: list[tuple[object, ...]] = []
    for key, loss in found.items():
        part, _, name = str(key).partition("/")
        trivial = found.get(f"val_trivial/{name}")
        if part == "val" and trivial is not None:
            ratio = f"{loss / trivial:.3f}" if trivial else ""
            rows.append((name, f"{loss:.4f}", f"{trivial:.4f}", ratio))
    if rows:
        return [
            "## Losses on cells held out",
            "Beside the predictor that knows only each gene's frequency and mean; below 1 the "
            "model knows more.",
            _table(("objective", "loss", "trivial predictor", "ratio"), rows),
        ]
    if not len(model.history):
        return []
    last = model.history.iloc[-1]
    return [
        "## Losses",
        _table(("loss", f"step {int(last['step']):,}"),
               [(name, f"{last[name]:.4f}") for name in last.index if name != "step"]),
    ]  # fmt: skip


def _contamination(training: TrainingManifest | None, address: str) -> list[str]:
    if training is None:
        return []
    return [
        "## Cells it has seen",
        "Fingerprints of the training cells go with the model (hashes of their counts, from which "
        "no count can be read). Before you report a score, ask how many of your cells are among "
        "them:",
        f'```python\ngm.contamination(adata, "{address}")\n```',
    ]


def _provenance(model: Model) -> list[str]:
    kept = {k: v for k, v in model.provenance.items() if k != "validation"}
    if settings := getattr(model, "settings", None):
        kept |= {} if not isinstance(settings, dict) else {"settings": settings}
    text = json.dumps(kept, indent=1, default=str, sort_keys=True)
    return ["## How it was made", f"```text\n{model.describe()}\n```", f"```json\n{text}\n```"]
