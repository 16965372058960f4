"""A model fine-tuned for batch-robust embedding: what it needs to embed further cells, on disk too.

As a directory (:mod:`genemodel.bundle.directory`) it has::

    weights.safetensors  network ("net.*"), correction ("correction.*")
    genes.txt            the genes that are read, one a line
    vocabulary.tsv.gz    only where genes are tokens and there is no bundle
    bundle/              only where cell vectors of a pre-trained model are read

Axes: C cells, D latent, G genes read.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

import numpy as np
import pandas as pd
import torch

from genemodel.bundle.bundle import VOCABULARY, Bundle
from genemodel.bundle.directory import INTEGRATION, read_model, write_model
from genemodel.bundle.history import no_history
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.errors import DataError
from genemodel.expression.groups import rows_by_group
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.gene_counts import gene_order, read_counts
from genemodel.inference.obs_keys import EMBEDDED, batch_names
from genemodel.integration.head import IntegrationHead, IntegrationSettings
from genemodel.integration.shared_clusters import SharedClusterCorrection
from genemodel.integration.training import IntegrationNet
from genemodel.model.count_encoder import CountEncoder, encoder_name
from genemodel.settings import parse, some, to_values

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

GENES, BENEATH = "genes.txt", "bundle"
FITTED = ("centre_KD", "mean_KD", "offset_KBD", "reference_CD")


@dataclass(repr=False)
class IntegratedModel:
    """Result of :func:`genemodel.integrate`.

    Attributes
    ----------
    net
        The trained network.
    correction
        Offsets of shared populations; None where ``settings.correct`` is off.
    genes
        Names of the genes that are read: those of the data, or tokens of a vocabulary as text.
    settings
        The recipe.
    batch_keys, batches
        Columns of obs that make the batch, and the batches seen.
    labels
        Cell types of the classification head; empty without.
    bundle
        The pre-trained model whose cell vectors are read.
    vocabulary
        What names genes where ``genes`` are tokens.
    provenance
        How it was made, plain values.
    history
        Losses of the training, a column ``step`` and one for each loss: means of
        stretches of the steps, or of looks at held-out cells where there were any.
    training
        The cells it was trained on, those of the model beneath first; None where nobody knows.
    """

    KIND: ClassVar[str] = "integration model"
    FOLDER: ClassVar[str] = INTEGRATION

    net: IntegrationNet
    correction: SharedClusterCorrection | None
    genes: list[str]
    settings: IntegrationSettings
    batch_keys: tuple[str, ...]
    batches: list[str]
    labels: list[str] = field(default_factory=list)
    bundle: Bundle | None = None
    vocabulary: GeneVocabulary | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    history: pd.DataFrame = field(default_factory=no_history)
    training: TrainingManifest | None = None

    def __repr__(self) -> str:
        beside = "counts" if self.bundle is None else "counts beside cell vectors of a Bundle"
        return (
            f"IntegratedModel({beside} → {self.settings.latent} dimensions; {len(self.genes):,} "
            f"genes; {len(self.batches):,} batches of {', '.join(self.batch_keys)}; labels: "
            f"{some(self.labels, 4)})"
        )

    # -- embedding --------------------------------------------------------------------------

    @reads_cells
    def encode(
        self,
        adata: "AnnData",
        *,
        new_batch: bool | None = None,
        **options: Unpack[InputOptions],
    ) -> np.ndarray:
        """Embed cells without training; float32 (C, D), in input order.

        Parameters
        ----------
        adata
            Raw counts of the same kind of cells.
        new_batch
            None looks at the batch columns: cells of a batch that was trained on get its offsets,
            every other batch is mapped onto the trained cells; without these columns all cells
            are one new batch. True takes all cells as one new batch, False demands known ones.
        **options
            How the cells are read. The species is only asked for by a model over a vocabulary.

        Raises
        ------
        DataError
            No raw counts, too few of the model's genes, or an unknown batch with
            ``new_batch=False``.

        Notes
        -----
        Cells without any count get NaN. A cell of the training data lands close to, not exactly
        on, its row from :func:`genemodel.integrate`, which saw all cells at once.
        """
        reading = InputSettings.given(options)
        name_C = self._names_of_batches(adata, new_batch)
        species = reading.species
        if self.vocabulary is None and self.bundle is None and species is not None:
            raise DataError(
                f"species={species!r} says nothing to this model, which reads genes by the names "
                "in its training data: leave it out, or integrate with species= in the first place."
            )
        counts = read_counts(adata, bundle=self.bundle, vocabulary=self.vocabulary, reading=reading)
        order = gene_order(
            counts.genes, self.genes, counts.measured_G, where="adata.var",
            remedy="Use the gene names of the training data.",
        )  # fmt: skip
        chosen_CG, measured_G = order.apply(counts.counts_CG), order.there_W
        latent_CD = self.net.encode(
            chosen_CG, counts.features_CF, None if measured_G.all() else measured_G
        )
        out_CD = latent_CD.copy()
        empty_C = np.asarray(counts.counts_CG.sum(1)).ravel() == 0
        if self.correction is not None:
            names, number_C = np.unique(name_C.astype(str), return_inverse=True)
            place = {name: code for code, name in enumerate(self.batches)}
            for number, own in rows_by_group(number_C):
                rows, name = own[~empty_C[own]], str(names[number])
                if not rows.size:
                    continue
                if name in place:
                    code_C = np.full(rows.size, place[name])
                    out_CD[rows] = self.correction.map_known(latent_CD[rows], code_C)
                else:
                    out_CD[rows] = self.correction.map_batch(latent_CD[rows])
        out_CD[empty_C] = np.nan
        return out_CD

    def get_latent_representation(
        self, adata: "AnnData", **options: Unpack[InputOptions]
    ) -> np.ndarray:
        """Return what :meth:`encode` does, under the name that scvi-tools has for it."""
        return self.encode(adata, **options)

    @reads_cells
    def embed(
        self,
        adata: "AnnData",
        *,
        new_batch: bool | None = None,
        key_added: str = EMBEDDED,
        **options: Unpack[InputOptions],
    ) -> None:
        """Write :meth:`encode` to ``obsm[key_added]`` and how to ``uns[key_added]``.

        Parameters
        ----------
        adata, new_batch
            As in :meth:`encode`.
        key_added
            Key in ``obsm`` and ``uns``; ``X_integrated`` is that of the cells trained on.
        **options
            How the cells are read.
        """
        adata.obsm[key_added] = self.encode(adata, new_batch=new_batch, **options)
        adata.uns[key_added] = {**self.provenance, "embedded": "without retraining"}

    def _names_of_batches(self, adata: "AnnData", new_batch: bool | None) -> np.ndarray:
        """Name of each cell's batch; the empty name is a batch that nobody knows."""
        there = all(key in adata.obs.columns for key in self.batch_keys)
        if new_batch is True or (new_batch is None and not there):
            if new_batch is None:
                logger.info(
                    "obs has no %s: all cells are taken as one new batch.",
                    ", ".join(self.batch_keys),
                )
            return np.full(adata.n_obs, "", dtype=object)
        name_C = batch_names(
            adata.obs, self.batch_keys, what="batch column of the model", settled=True
        )
        unknown = sorted(set(name_C) - set(self.batches))
        if unknown and new_batch is False:
            raise DataError(
                f"adata.obs: batch {', '.join(map(repr, unknown[:5]))} was not trained on (known: "
                f"{', '.join(self.batches[:10])}). Leave new_batch out to map it onto the "
                "trained cells."
            )
        if unknown:
            logger.info("%d batches are new: mapped onto the trained cells.", len(unknown))
        return name_C

    def describe(self) -> str:
        """Say in a few lines what this is."""
        genes = "names of the training data" if self.vocabulary is None else "tokens"
        species = "not asked" if self.vocabulary is None else some(self.vocabulary.species)
        beneath = "none" if self.bundle is None else self.bundle.fingerprint[:12]
        lines = [
            f"embeds {len(self.genes):,} genes ({genes}) in {self.settings.latent} dimensions",
            f"batches ({', '.join(self.batch_keys)}): {some(self.batches)}",
            f"labels: {some(self.labels)}",
            f"species: {species}",
            f"pre-trained model beneath: {beneath}",
        ]
        told = ("genemodel", "cells", "seed", "seconds", "effective_rank", "mean_cosine")
        lines += [f"{key}: {self.provenance[key]}" for key in told if key in self.provenance]
        lines.append("trained on: unknown" if self.training is None else self.training.describe())
        vanished = some(self.provenance.get("vanished", []))
        return "\n".join([*lines, f"populations that may be over-corrected: {vanished}"])

    # -- disk -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the model as directory ``path``, replacing one of its kind that is there.

        Raises
        ------
        DataError
            If ``path`` exists and is not such a model.
        """
        weights = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        fitted: dict[str, Any] | None = None
        if self.correction is not None:
            values = vars(self.correction)
            fitted = {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}
            for name in FITTED:
                array = np.ascontiguousarray(values[name])
                weights[f"correction.{name}"] = torch.from_numpy(array)

        def fill(folder: Path) -> None:
            (folder / GENES).write_text("".join(f"{name}\n" for name in self.genes), "utf-8")
            if self.bundle is not None:
                self.bundle.save(folder / BENEATH)
            elif self.vocabulary is not None:
                self.vocabulary.save(folder / VOCABULARY)

        about = {
            "settings": to_values(self.settings),
            "correction": fitted,
            "batch_keys": list(self.batch_keys),
            "batches": self.batches,
            "labels": self.labels,
            "bundle": None if self.bundle is None else self.bundle.fingerprint,
        }
        write_model(
            path, INTEGRATION, about, weights, provenance=self.provenance, history=self.history,
            training=self.training, fill=fill,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "auto") -> Self:
        """Read what :meth:`save` wrote; ``device`` is for the bundle, if there is one.

        Raises
        ------
        DataError
            If a file is missing, damaged, or of a newer format.
        """
        wanted = {"settings", "correction", "batch_keys", "batches", "labels", "bundle"}
        stored = read_model(path, INTEGRATION, wanted | {"provenance"})
        about, path = stored.about, stored.path
        settings = parse(IntegrationSettings, about["settings"], where=f"{stored.where}: settings")
        genes = (path / GENES).read_text("utf-8").split("\n")[:-1]
        weights = _as_now(stored.weights)
        bundle = None
        if about["bundle"] is not None:
            bundle = Bundle.load(path / BENEATH, device=device)
        vocabulary = bundle.vocabulary if bundle is not None else None
        if (path / VOCABULARY).is_file():
            vocabulary = GeneVocabulary.read(path / VOCABULARY)
        linear = "net.encoder.components.gene_KG" in weights
        encoder = CountEncoder(
            np.arange(len(genes)), len(genes), hidden=settings.hidden, dropout=settings.dropout,
            n_features=weights["net.encoder.beside.mean_F"].shape[0],
            feature_dropout=settings.feature_dropout,
            n_components=settings.latent if linear else 0,
        )  # fmt: skip
        head = IntegrationHead(
            len(genes), len(about["batches"]), settings, n_labels=len(about["labels"]),
            linear=linear,
        )  # fmt: skip
        net = IntegrationNet(encoder, head)
        net.load_state_dict(
            {k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")}
        )
        correction = None
        if about["correction"] is not None:
            correction = SharedClusterCorrection(**about["correction"])
            for name in FITTED:
                setattr(correction, name, weights[f"correction.{name}"].numpy())
        return cls(
            net=net.eval(),
            correction=correction,
            genes=genes,
            settings=settings,
            batch_keys=tuple(about["batch_keys"]),
            batches=list(about["batches"]),
            labels=list(about["labels"]),
            bundle=bundle,
            vocabulary=vocabulary,
            provenance=stored.provenance,
            history=stored.history,
            training=stored.training,
        )


def _as_now(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name weights as this version does: encoder and head were one module, then had names."""
    encoder = (
        "genes_in", "features_in", "norm_in", "norm_hidden", "hidden", "input_", "feature_",
        "components",
    )  # fmt: skip

    def named(name: str) -> str:
        own = name.removeprefix("net.")
        if own == name:
            return name
        if not own.startswith(("encoder.", "head.")):
            own = f"encoder.{own}" if own.startswith(encoder) else f"head.{own}"
        part, _, rest = own.partition(".")
        return f"net.{part}.{encoder_name(rest) if part == 'encoder' else rest}"

    return {named(name): tensor for name, tensor in weights.items()}
