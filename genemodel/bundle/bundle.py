"""A pre-trained model as a directory (:mod:`genemodel.bundle.directory`).

::

    weights.safetensors  backbone ("model.*") and heads ("heads.*")
    vocabulary.tsv.gz    genes and tokens
    statistics.tsv.gz    per-gene non-zero medians of the training corpus

No file holds code, and reading needs neither Lightning nor Hydra.
"""

import copy
import gzip
import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.directory import ABOUT, BUNDLE, WEIGHTS, read_model, write_model
from genemodel.bundle.history import no_history
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.errors import DataError
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.model.devices import device_of
from genemodel.model.gene_model import GeneModel, KnowledgeEmbedding
from genemodel.model.hosted import FusionShape, HostedEmbedding
from genemodel.model.settings import ModelSettings
from genemodel.settings import parse, some, to_values

logger = logging.getLogger(__name__)

VOCABULARY, STATISTICS = "vocabulary.tsv.gz", "statistics.tsv.gz"


@dataclass(repr=False)
class Bundle:
    """A backbone with all that is needed to use it.

    Attributes
    ----------
    model
        The backbone.
    vocabulary
        Its genes.
    tokens
        Context and packing.
    medians_V
        Per-gene non-zero medians of the training corpus, counts per 10⁴.
    heads
        Weights of heads by name ("heads.count_decoder.log_theta_V" without the prefix), to be
        taken up by whoever knows the objective.
    settings
        Settings of the objectives behind the heads, plain values by name.
    provenance
        How it was made: corpus fingerprint, steps, versions, validation losses.
    history
        Losses on held-out cells at every look of the training up to this model, a column ``step``
        and one for each loss; no rows where none were kept.
    training
        The cells it was trained on; None where nobody knows (models of earlier versions).
    """

    KIND: ClassVar[str] = "model"
    FOLDER: ClassVar[str] = BUNDLE

    model: GeneModel
    vocabulary: GeneVocabulary
    tokens: TokenSettings
    medians_V: np.ndarray
    heads: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    history: pd.DataFrame = field(default_factory=no_history)
    training: TrainingManifest | None = None

    def __repr__(self) -> str:
        shape = self.model.settings
        n = sum(p.numel() for p in self.model.parameters())
        heads = some(sorted({key.split(".")[0] for key in self.heads}))
        return (
            f"Bundle({shape.layers} layers × {shape.width}, {n:,} parameters, "
            f"{len(self.vocabulary):,} tokens of {some(self.species)}; heads: {heads})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embedding.token.weight.device

    @property
    def species(self) -> tuple[str, ...]:
        """Species of the vocabulary; the position is the species code."""
        return self.vocabulary.species

    @property
    def fingerprint(self) -> str:
        """Sha256 over vocabulary and weights, to name the model in what it writes.

        Of a hosted model also over how it reads: the same weights give other vectors of cells.
        """
        digest = hashlib.sha256(self.vocabulary.fingerprint.encode())
        shape = self.model.settings
        if shape.hosts != "native":
            digest.update(f"{self.tokens.style} {shape.cell} {shape.cell_layer}".encode())
            digest.update(np.ascontiguousarray(self.medians_V).tobytes())
        for name, tensor in sorted(self._weights().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; returns the bundle itself."""
        self.model.to(device)
        self.heads = {name: tensor.to(device) for name, tensor in self.heads.items()}
        return self

    def on(self, device: torch.device) -> Self:
        """Return the bundle on a device: itself, or a copy where it is elsewhere."""
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        return replace(self, model=copy.deepcopy(self.model)).to(device)

    def head(self, name: str, module: nn.Module) -> nn.Module:
        """Load the weights saved as ``name`` into a module made for them."""
        prefix = f"{name}."
        state = {k.removeprefix(prefix): v for k, v in self.heads.items() if k.startswith(prefix)}
        if not state:
            known = sorted({key.split(".")[0] for key in self.heads})
            raise DataError(
                f"This bundle has no head {name!r} (it has {', '.join(known) or 'none'}): use a "
                "bundle trained with that objective."
            )
        module.load_state_dict(state)
        return module.to(self.device)

    def grown(self, vocabulary: GeneVocabulary) -> Self:
        """Return the model over a vocabulary that has further genes or species behind its own.

        What it knows keeps its place; embeddings of new genes and species start at random, its
        knowledge tables say nothing of them, and heads are left as they are: whoever trains them
        starts the new parts.

        Raises
        ------
        DataError
            The vocabulary is not its own with more behind, or the model is an imported one whose
            input is fused with knowledge.
        """
        fused = fusion_of(self.model) is not None
        if not vocabulary.extends(self.vocabulary) or fused:
            why = "has its knowledge in its checkpoint" if fused else "is another"
            raise DataError(
                f"A model over {len(self.vocabulary):,} tokens of {', '.join(self.species)} cannot "
                f"grow to {len(vocabulary):,} tokens of {', '.join(vocabulary.species)}: it {why}. "
                "Use the vocabulary of the model."
            )
        model = GeneModel(
            self.model.settings,
            n_tokens=len(vocabulary),
            n_species=len(vocabulary.species),
            context=self.tokens.context,
            knowledge=_places(
                len(vocabulary), {name: p.table_VP.shape[1] for name, p in _tables(self.model)}
            ),
        )
        state = model.state_dict()
        for name, tensor in self.model.state_dict().items():
            fill_corner(state[name], tensor)
        medians_V = np.full(len(vocabulary), np.nan, self.medians_V.dtype)
        medians_V[: len(self.vocabulary)] = self.medians_V
        return replace(self, model=model, vocabulary=vocabulary, medians_V=medians_V)

    def _weights(self) -> dict[str, Tensor]:
        weights = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        return weights | {f"heads.{k}": v for k, v in self.heads.items()}

    def describe(self) -> str:
        """Say in a few lines what this is."""
        shape = self.model.settings
        n = sum(p.numel() for p in self.model.parameters())
        lines = [
            f"{shape.layers} layers × {shape.width}, {n:,} parameters, context "
            f"{self.tokens.context:,}",
            f"{len(self.vocabulary):,} tokens, species: {', '.join(self.species)}",
            f"heads: {', '.join(sorted({k.split('.')[0] for k in self.heads})) or 'none'}",
        ]
        lines += [f"{key}: {value}" for key, value in self.provenance.items()]
        unknown = "trained on: unknown, it keeps no fingerprints of its training cells"
        lines.append(self.training.describe() if self.training is not None else unknown)
        return "\n".join(lines)

    # -- disk -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the bundle as directory ``path``, replacing a bundle that is there.

        Raises
        ------
        DataError
            If ``path`` exists and is not a bundle.
        """

        def fill(folder: Path) -> None:
            self.vocabulary.save(folder / VOCABULARY)
            write_medians(folder / STATISTICS, self.medians_V)

        fusion = fusion_of(self.model)
        about = {
            "model": to_values(self.model.settings),
            "tokens": to_values(self.tokens),
            "settings": self.settings,
            "vocabulary": self.vocabulary.fingerprint,
            "knowledge": {name: part.table_VP.shape[1] for name, part in _tables(self.model)},
            "fusion": None if fusion is None else to_values(fusion),
        }
        write_model(
            path, BUNDLE, about, self._weights(), provenance=self.provenance,
            history=self.history, training=self.training, fill=fill,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "auto") -> Self:
        """Read a bundle.

        Parameters
        ----------
        path
            Directory written by :meth:`save`.
        device
            Where to put the weights; ``auto`` takes a GPU where there is one.

        Raises
        ------
        DataError
            If a file is missing, damaged, or of a newer format.
        """
        there = device_of(device)
        wanted = {"model", "tokens", "settings", "provenance", "knowledge"}
        stored = read_model(path, BUNDLE, wanted)
        about, weights, path = stored.about, stored.weights, stored.path
        settings = parse(ModelSettings, about["model"], where=f"{stored.where}: model")
        tokens = parse(TokenSettings, about["tokens"], where=f"{stored.where}: tokens")
        vocabulary = GeneVocabulary.read(path / VOCABULARY)
        knowledge = _places(len(vocabulary), about["knowledge"])
        model = GeneModel(
            settings,
            n_tokens=len(vocabulary),
            n_species=len(vocabulary.species),
            context=tokens.context,
            knowledge=knowledge,
            fusion=_fusion(about.get("fusion"), stored.where),
        )
        own = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
        _load_exactly(model, own, path)
        if device == "auto":
            logger.info("Model on %s.", there)
        bundle = cls(
            model=model.eval(),
            vocabulary=vocabulary,
            tokens=tokens,
            medians_V=read_medians(path / STATISTICS, len(vocabulary)),
            heads={
                k.removeprefix("heads."): v for k, v in weights.items() if k.startswith("heads.")
            },
            settings=about["settings"],
            provenance=stored.provenance,
            history=stored.history,
            training=stored.training,
        )
        return bundle.to(there)


def _tables(model: GeneModel) -> list[tuple[str, KnowledgeEmbedding]]:
    """Knowledge tables of a model, by name."""
    return [
        (name, part)
        for name, part in model.embedding.knowledge.items()
        if isinstance(part, KnowledgeEmbedding)
    ]


def _places(n_tokens: int, widths: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Empty knowledge tables of these widths, for what is about to be loaded."""
    return {
        name: (torch.zeros(n_tokens, width), torch.zeros(n_tokens, dtype=torch.bool))
        for name, width in widths.items()
    }


def fusion_of(model: GeneModel) -> FusionShape | None:
    """Say what the input of a hosted GeneCompass is made of; None for every other model."""
    embedding = model.embedding
    if isinstance(embedding, HostedEmbedding) and embedding.fusion is not None:
        return embedding.fusion.shape
    return None


def _fusion(values: Any, where: str) -> FusionShape | None:
    if values is None:
        return None
    return parse(FusionShape, values, where=f"{where}: fusion")


def fill_corner(larger: Tensor, smaller: Tensor) -> None:
    """Write a tensor over the beginning of every axis of another, which may be of its size."""
    larger[tuple(slice(0, n) for n in smaller.shape)] = smaller


def _load_exactly(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        raise DataError(
            f"{path / WEIGHTS} does not fit the architecture in {ABOUT}; first difference: "
            f"{wrong[0][0]} {tuple(wrong[0][1])}. The bundle was put together from two models."
        )
    model.load_state_dict(dict(weights))


def write_medians(path: Path, medians_V: np.ndarray) -> None:
    """Write token and median, one line a gene that was seen; the same bytes every time."""
    text = io.StringIO()
    text.write("token\tnonzero_median_per_10k\n")
    for token in np.flatnonzero(np.isfinite(medians_V)):
        text.write(f"{token}\t{float(medians_V[token])!r}\n")
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        file.write(text.getvalue().encode())


def read_medians(path: Path, n_tokens: int) -> np.ndarray:
    """Read what :func:`write_medians` wrote; NaN where a gene was never seen.

    float32, but for medians of other models, which need all of float64.
    """
    medians_V = np.full(n_tokens, np.nan)
    with gzip.open(path, "rt") as file:
        next(file)
        for line in file:
            token, median = line.split("\t")
            medians_V[int(token)] = float(median)
    short_V = medians_V.astype(np.float32)
    return short_V if np.array_equal(short_V, medians_V, equal_nan=True) else medians_V
