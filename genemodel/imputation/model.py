"""A trained decoder with the counts it explains: the posterior of any cell and gene on demand.

On disk (:mod:`genemodel.bundle.directory`) it has the decoder and not the counts, and is given
further cells with :meth:`ImputationModel.of`::

    weights.safetensors  decoder ("decoder.*"), dispersion of every gene, which genes have counts
    genes.txt            names of the genes, one a line
    vocabulary.tsv.gz    only where a vocabulary tells its training cells and there is no bundle
    bundle/              only where cell vectors of a pre-trained model are read

Axes: C cells, G genes, M posterior draws, Q quantile levels.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

import genemodel
from genemodel.bundle.bundle import VOCABULARY, Bundle
from genemodel.bundle.directory import IMPUTATION, read_model, write_model
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.errors import ConfigError, DataError
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.imputation.network import (
    BLOCK_CELLS,
    Decoder,
    DecoderSettings,
    VectorEncoder,
    decode_fraction,
)
from genemodel.imputation.posterior import GammaPosterior, posterior_gamma
from genemodel.imputation.token_backbone import TokenBackbone
from genemodel.imputation.training import (
    Coverage,
    TrainedDecoder,
    train_decoder,
)
from genemodel.model.count_encoder import encoder_name
from genemodel.settings import nearest, parse, some, to_values

Kind = Literal["posterior", "decoder"]
"""Whose rates: this cell's, or those of cells like it."""
Library = float | str | None
Selection = slice | Sequence[int] | NDArray[np.integer] | NDArray[np.bool_] | None

GENES, BENEATH = "genes.txt", "bundle"

MEAN_BATCH = "mean"
MEDIAN_LIBRARY = "median"
# A factor on each cell's own library, such as "0.5x".
_OWN_LIBRARY = re.compile(r"(\d+\.?\d*|\.\d+)x")
LARGEST_IN_MEMORY = 4e9
_FEWEST = 20
# Counts that a gene is given which was measured and never seen; the decoder starts from the same.
_UNSEEN = 0.1


class ImputationModel:
    """What :func:`genemodel.impute` learned: decoder, dispersion and the counts they explain.

    Parameters
    ----------
    trained
        Decoder over the genes ``kept_G``.
    counts_CG
        Raw counts of all cells and genes, CSR.
    kept_G
        Genes with counts, in order.
    batch_C
        Batch code per cell.
    batches
        Names of the batches; empty where none were told apart.
    settings
        What it was trained with.
    genes
        Names of all genes; their numbers where they have no names.
    batch_keys
        Columns of obs that told the batches apart.
    where
        Name of the data in messages.
    features_CF
        Vectors of the cells by ``bundle``.
    bundle
        Model whose cell vectors are read beside the counts; None without.

    Attributes
    ----------
    provenance
        How it was made, plain values.
    training
        The cells it was trained on, those of the model beneath first; None where nobody knows.
    vocabulary
        What names the genes of ``training``; None where they are the model's own.
    """

    KIND: ClassVar[str] = "imputation model"
    FOLDER: ClassVar[str] = IMPUTATION

    def __init__(
        self,
        trained: TrainedDecoder,
        counts_CG: sp.csr_matrix,
        kept_G: NDArray[np.integer],
        batch_C: NDArray[np.integer],
        batches: tuple[str, ...],
        settings: DecoderSettings,
        *,
        genes: Sequence[str] = (),
        batch_keys: tuple[str, ...] = (),
        where: str = "AnnData",
        features_CF: NDArray[np.floating] | None = None,
        bundle: Bundle | None = None,
    ) -> None:
        self.bundle = bundle
        self.trained = trained
        self.kept_G = kept_G
        self.batches = batches
        self.batch_keys = batch_keys
        self.settings = settings
        self.provenance: dict[str, Any] = {}
        self.training: TrainingManifest | None = None
        self.vocabulary: GeneVocabulary | None = None if bundle is None else bundle.vocabulary
        self.genes = list(genes) or [str(gene) for gene in range(counts_CG.shape[1])]
        self._explain(counts_CG, batch_C, None, where, features_CF)
        self.unseen_share = _UNSEEN / max(float(self.library_C.sum()), 1.0)
        order_G = np.argsort(np.asarray(self._kept_CG.sum(axis=0)).ravel(), kind="stable")
        rarest_G = trained.dispersion_G[order_G[: max(1, len(order_G) // 10)]]
        # A gene measured and never seen is taken to vary as the rarest genes do.
        dispersion_G = np.full(counts_CG.shape[1], np.exp(np.log(rarest_G).mean()))
        dispersion_G[kept_G] = trained.dispersion_G
        self.dispersion_G = dispersion_G

    def _explain(
        self,
        counts_CG: sp.csr_matrix,
        batch_C: NDArray[np.integer],
        measured_G: NDArray[np.bool_] | None,
        where: str,
        features_CF: NDArray[np.floating] | None,
    ) -> None:
        """Take up the cells that are asked about; ``measured_G`` is None where all genes were."""
        self.features_CF = features_CF
        self.counts_CG = counts_CG
        self.batch_C = batch_C
        self.measured_G = measured_G
        self.where = where
        self.library_C = np.asarray(counts_CG.sum(axis=1), dtype=np.float64).ravel()
        self._kept_CG = counts_CG[:, self.kept_G].astype(np.float32)

    def of(
        self,
        counts_CG: sp.csr_matrix,
        batch_C: NDArray[np.integer] | None = None,
        measured_G: NDArray[np.bool_] | None = None,
        *,
        where: str = "AnnData",
        features_CF: NDArray[np.floating] | None = None,
    ) -> Self:
        """Return the same model of other cells, without training.

        Parameters
        ----------
        counts_CG
            Raw counts in the order of ``genes``, CSR; nothing where a gene was not measured.
        batch_C
            Positions in ``batches``; -1, the default, for a batch that was not trained on, which
            gets the mean of all offsets.
        measured_G
            Genes that these cells' data measured; all by default. The others are predicted from
            those.
        where
            Name of the data in messages.
        features_CF
            Vectors of the cells by the model's ``bundle``, where it has one.
        """
        if counts_CG.shape[1] != len(self.genes):
            raise DataError(
                f"{where}: has {counts_CG.shape[1]:,} columns of counts, the model "
                f"{len(self.genes):,} genes: bring the counts in the order of model.genes."
            )
        other = copy.copy(self)
        codes_C = np.full(counts_CG.shape[0], -1) if batch_C is None else np.asarray(batch_C)
        complete = measured_G is None or bool(np.all(measured_G))
        measured_G = None if complete else measured_G
        other._explain(sp.csr_matrix(counts_CG), codes_C, measured_G, where, features_CF)
        return other

    @classmethod
    def train(
        cls,
        counts_CG: sp.csr_matrix,
        batch_C: NDArray[np.integer] | None = None,
        batches: tuple[str, ...] = (),
        settings: DecoderSettings | None = None,
        *,
        genes: Sequence[str] = (),
        batch_keys: tuple[str, ...] = (),
        gene_vectors_GE: NDArray[np.floating] | None = None,
        backbone: TokenBackbone | None = None,
        run: HeadRun | None = None,
        seed: int = 0,
        where: str = "AnnData",
    ) -> Self:
        """Train a decoder on counts and calibrate it on molecules set aside.

        Parameters
        ----------
        counts_CG
            Raw counts, CSR; cells and genes without counts are left out of the training.
        batch_C, batches
            Code per cell and names of the technical batches; one batch where omitted.
        settings
            Default :class:`DecoderSettings`.
        genes
            Names of the genes, by which they are found in other cells.
        batch_keys
            Columns of obs that told the batches apart.
        gene_vectors_GE
            Pre-trained vectors of the genes, NaN where there is none; see :func:`train_decoder`.
        backbone
            A transformer beneath, and how its tokens are found among the genes. The model then has
            it as ``trained.backbone``, but no vectors of the cells yet: see :meth:`with_vectors`.
        run
            Folder and devices of the training.
        seed
            Of the split of molecules and the training.
        where
            Name of the data in messages.

        Raises
        ------
        DataError
            Too few cells or genes with counts.
        """
        settings = settings or DecoderSettings()
        codes_C = np.zeros(counts_CG.shape[0], np.int64)
        if batch_C is not None:
            codes_C = np.asarray(batch_C, np.int64)
        kept_G = np.flatnonzero(np.asarray(counts_CG.sum(axis=0)).ravel())
        kept_C = np.flatnonzero(np.asarray(counts_CG.sum(axis=1)).ravel())
        if min(len(kept_G), len(kept_C)) < _FEWEST:
            raise DataError(
                f"{where}: has {len(kept_C):,} cells and {len(kept_G):,} genes with counts; to "
                f"learn what cells have in common takes {_FEWEST} of each, better thousands. "
                "Impute it together with more cells."
            )
        kept_CG = counts_CG[kept_C][:, kept_G].astype(np.float32)
        own_G, species_C = None, None
        if backbone is not None:
            # The tokens are its vocabulary's, and genes that it does not know come behind.
            kept_CG, own_G = backbone.over_tokens(kept_CG, kept_G)
            species_C = backbone.species_C[kept_C]
        data = TrainingCells.held(
            kept_CG, codes_C[kept_C], species_C=species_C, where=where, seed=seed
        )
        trained = train_decoder(
            data,
            settings,
            gene_G=own_G,
            gene_vectors_GE=None if gene_vectors_GE is None else gene_vectors_GE[kept_G],
            backbone=None if backbone is None else backbone.backbone,
            n_tokens=None if backbone is None else backbone.n_tokens,
            where=run,
            seed=seed,
        )
        model = cls(
            trained, counts_CG, kept_G, codes_C, batches, settings,
            genes=genes, batch_keys=batch_keys, where=where,
        )  # fmt: skip
        model.tell(len(kept_C), seed=seed)
        return model

    def tell(self, n_cells: int, *, seed: int, model: str = "", tune: str = "") -> None:
        """Write down how it was made, as :attr:`provenance`.

        Parameters
        ----------
        n_cells
            Cells that were learnt from.
        seed
            Of the training.
        model, tune
            Fingerprint of the bundle that took part, and what of it learnt.
        """
        self.provenance = {
            "genemodel": genemodel.__version__,
            "task": "impute",
            "batch_key": list(self.batch_keys),
            "settings": to_values(self.settings),
            "seed": seed,
            "cells": n_cells,
            "genes": len(self.kept_G),
            "heldout_nats_per_molecule": self.trained.heldout_nats,
            "model": model,
            "backbone": tune,
        }

    def with_vectors(self, bundle: Bundle, features_CF: NDArray[np.floating]) -> Self:
        """Return the same model with the transformer beneath, and its vectors of the cells."""
        other = copy.copy(self)
        other.bundle, other.features_CF = bundle, features_CF
        other.vocabulary = bundle.vocabulary
        return other

    @property
    def history(self) -> pd.DataFrame:
        """Nats a molecule set aside at every check; a ``step`` is a pass over the cells."""
        return self.trained.table

    def __len__(self) -> int:
        return self.counts_CG.shape[0]

    def __repr__(self) -> str:
        return (
            f"ImputationModel({len(self):,} cells × {self.counts_CG.shape[1]:,} genes, "
            f"{self.trained.heldout_nats:.4f} nats a molecule set aside; {self.trained.coverage})"
        )

    def describe(self) -> str:
        """Say in a few lines what this is."""
        told = ("genemodel", "cells", "seed", "model")
        return "\n".join(
            [
                f"predicts {len(self.genes):,} genes ({some(self.genes, 3)})",
                f"batches ({', '.join(self.batch_keys) or 'none named'}): {some(self.batches)}",
                f"{self.trained.heldout_nats:.4f} nats a molecule set aside",
                str(self.trained.coverage),
                "trained on: unknown" if self.training is None else self.training.describe(),
                *(f"{key}: {self.provenance[key]}" for key in told if key in self.provenance),
            ]
        )

    def library_ratio(self, library: Library, rows: Selection = None) -> NDArray[np.float64]:
        """Return the requested library over each own, (C,); NaN for a cell without counts.

        Parameters
        ----------
        library
            None for the cell's own, ``"0.5x"`` for half of it (any factor), ``"median"`` for the
            median of the cells with counts, or a number of counts per cell.
        rows
            Cells; all by default.
        """
        check_library(library)
        own_C = self.library_C[slice(None) if rows is None else rows]
        if library is None:
            return np.ones(len(own_C))
        if isinstance(library, str) and (factor := _OWN_LIBRARY.fullmatch(library)):
            return np.full(len(own_C), float(factor[1]))
        wanted = self.median_library if library == MEDIAN_LIBRARY else float(library)
        return wanted / np.where(own_C > 0, own_C, np.nan)

    @property
    def median_library(self) -> float:
        """Median of the cells with counts."""
        return float(np.median(self.library_C[self.library_C > 0]))

    def posterior(
        self,
        rows: Selection = None,
        *,
        genes: NDArray[np.integer] | Sequence[int] | None = None,
        library: Library = None,
        batch: str | None = None,
        kind: Kind = "posterior",
    ) -> GammaPosterior:
        """Posterior of the rates of some cells.

        Parameters
        ----------
        rows
            Cells; all by default.
        genes
            Positions of genes; all by default.
        library
            As in :meth:`library_ratio`.
        batch
            None: as measured in the cell's own batch; ``"mean"``: at the mean of all batch
            offsets (batch-corrected); or the name of a batch.
        kind
            ``"posterior"``: with the cell's own counts as evidence; ``"decoder"``: what cells like
            it express, its own counts known to the encoder only.

        Raises
        ------
        ConfigError
            Unknown batch or kind, impossible library, or more than 4 GB of output.
        """
        check_kind(kind)
        at_C = _numbers(rows, len(self))
        at_G = np.arange(self.counts_CG.shape[1]) if genes is None else np.asarray(genes)
        size = 2.0 * 8 * len(at_C) * len(at_G)
        if size > LARGEST_IN_MEMORY:
            raise ConfigError(
                f"posterior of {len(at_C):,} cells × {len(at_G):,} genes takes {size / 1e9:.1f} GB "
                f"(most is {LARGEST_IN_MEMORY / 1e9:.0f} GB): ask for fewer rows at a time, or for "
                "fewer genes."
            )
        own_CG = self._fraction(at_C, at_G, self.batch_C[at_C])
        prior_mean_CG = own_CG * self.library_C[at_C, None]
        exposure_G = np.full(len(at_G), 1.0 if kind == "posterior" else 0.0)
        if self.measured_G is not None:
            exposure_G[~self.measured_G[at_G]] = 0.0
        count_CG = self.counts_CG[at_C][:, at_G].toarray()
        shape_CG, rate_CG = posterior_gamma(
            count_CG, prior_mean_CG, self.dispersion_G[at_G], exposure_G
        )
        if (code := self.batch_code(batch)) is not None:
            # What the counts say about a cell, as a factor on the prior, holds in any batch.
            wanted_CG = self._fraction(at_C, at_G, np.full(len(at_C), code))
            rate_CG *= own_CG / np.maximum(wanted_CG, 1e-30)
        rate_CG /= self.library_ratio(library, at_C)[:, None]
        return GammaPosterior(shape_CG, rate_CG)

    def draws(
        self,
        n: int,
        rows: Selection = None,
        *,
        genes: NDArray[np.integer] | Sequence[int] | None = None,
        library: Library = None,
        batch: str | None = None,
        kind: Kind = "posterior",
        seed: int = 0,
    ) -> NDArray[np.float32]:
        """Draw rates from the posterior for multiple imputation, (M, C, G) float32.

        Parameters
        ----------
        n
            M.
        rows, genes, library, batch, kind
            As in :meth:`posterior`.
        seed
            Of the draws.
        """
        posterior = self.posterior(rows, genes=genes, library=library, batch=batch, kind=kind)
        size = 4.0 * n * posterior.shape_CG.size
        if size > LARGEST_IN_MEMORY:
            raise ConfigError(
                f"{n} draws of {posterior.shape_CG.shape[0]:,} cells × "
                f"{posterior.shape_CG.shape[1]:,} genes take {size / 1e9:.1f} GB (most is "
                f"{LARGEST_IN_MEMORY / 1e9:.0f} GB): ask for fewer rows at a time, or for genes=."
            )
        return posterior.draws(n, np.random.default_rng(seed))

    def batch_code(self, batch: str | None) -> int | None:
        """Code of a batch as :func:`decode_fraction` takes it; None for each cell's own."""
        check_batch(batch, self.batches, self.where)
        if batch is None:
            return None
        return -1 if batch == MEAN_BATCH else self.batches.index(batch)

    def _fraction(
        self, at_C: NDArray[np.integer], at_G: NDArray[np.integer], code_C: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Share of molecules per gene, with a floor for genes measured and never seen."""
        fraction_CG = np.full((len(at_C), len(at_G)), self.unseen_share)
        place_G = np.full(self.counts_CG.shape[1], -1)
        place_G[self.kept_G] = np.arange(len(self.kept_G))
        seen_G = place_G[at_G] >= 0
        for start in range(0, len(at_C), BLOCK_CELLS):
            cells = slice(start, start + BLOCK_CELLS)
            rows = at_C[cells]
            beside = None if self.features_CF is None else self.features_CF[rows]
            all_CG = decode_fraction(
                self.trained.decoder, self._kept_CG[rows], code_C[cells], beside
            )
            if self.measured_G is not None:
                # The library was counted on these genes: the others come on top of it.
                counted_C1 = all_CG[:, self.measured_G[self.kept_G]].sum(1, keepdims=True)
                all_CG /= np.maximum(counted_C1, 1e-12)
            fraction_CG[cells, seen_G] = all_CG[:, place_G[at_G[seen_G]]]
        return fraction_CG

    # -- disk ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the model, without any cells, as directory ``path``, replacing one of its kind.

        Raises
        ------
        DataError
            If ``path`` exists and is not such a model.
        """
        trained = self.trained
        weights = {f"decoder.{k}": v for k, v in trained.decoder.state_dict().items()}
        weights["dispersion_G"] = torch.from_numpy(np.ascontiguousarray(self.dispersion_G))
        weights["kept_G"] = torch.from_numpy(np.asarray(self.kept_G, np.int64))

        def fill(folder: Path) -> None:
            (folder / GENES).write_text("".join(f"{name}\n" for name in self.genes), "utf-8")
            if self.bundle is not None:
                self.bundle.save(folder / BENEATH)
            elif self.vocabulary is not None:
                self.vocabulary.save(folder / VOCABULARY)

        about = {
            "settings": to_values(self.settings),
            "batches": list(self.batches),
            "batch_keys": list(self.batch_keys),
            "unseen_share": self.unseen_share,
            "pretrained": isinstance(trained.decoder.encoder, VectorEncoder),
            "heldout_nats": trained.heldout_nats,
            "bundle": None if self.bundle is None else self.bundle.fingerprint,
            "coverage": {
                "overall": trained.coverage.overall,
                "by_gene_decile": list(trained.coverage.by_gene_decile),
                "by_mean": [list(row) for row in trained.coverage.by_mean],
            },
        }
        write_model(
            path, IMPUTATION, about, weights, provenance=self.provenance, history=self.history,
            training=self.training, fill=fill,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "auto") -> Self:
        """Read what :meth:`save` wrote: a model of no cells, to be given some with :meth:`of`.

        ``device`` is for the bundle, if there is one.

        Raises
        ------
        DataError
            If a file is missing, damaged, or of a newer format.
        """
        wanted = {"settings", "batches", "batch_keys", "unseen_share", "heldout_nats", "coverage"}
        stored = read_model(path, IMPUTATION, wanted)
        about, path = stored.about, stored.path
        settings = parse(DecoderSettings, about["settings"], where=f"{stored.where}: settings")
        weights = stored.weights
        genes = (path / GENES).read_text("utf-8").split("\n")[:-1]
        kept_G = weights["kept_G"].numpy()
        dispersion_G = weights["dispersion_G"].numpy()
        weights = _as_now(weights)
        if about.get("pretrained", False):
            head = (weights["decoder.head.gene_GD"], weights["decoder.head.bias_G"])
            decoder = Decoder.of_vectors(*head)
        else:
            n_batches = weights["decoder.head.offset_BD"].shape[0]
            n_features = weights["decoder.encoder.beside.mean_F"].shape[0]
            decoder = Decoder.new(
                len(kept_G), n_batches, settings, n_features,
                carries="decoder.encoder.carry_F" in weights,
            )  # fmt: skip
        decoder.load_state_dict(
            {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")}
        )
        bundle = None
        if about.get("bundle") is not None:
            bundle = Bundle.load(path / BENEATH, device=device)
        vocabulary = None if bundle is None else bundle.vocabulary
        if (path / VOCABULARY).is_file():
            vocabulary = GeneVocabulary.read(path / VOCABULARY)
        coverage = Coverage(
            overall=about["coverage"]["overall"],
            by_gene_decile=tuple(about["coverage"]["by_gene_decile"]),
            by_mean=tuple((low, share, n) for low, share, n in about["coverage"]["by_mean"]),
        )
        # Before format 4 it stood in the same file as the settings.
        rows = about.get("history", stored.history.to_numpy().tolist())
        history = [(int(epoch), float(nats)) for epoch, nats in rows]
        trained = TrainedDecoder(
            decoder.eval(), dispersion_G[kept_G], about["heldout_nats"], coverage, history
        )
        model = cls(
            trained,
            sp.csr_matrix((0, len(genes)), dtype=np.float32),
            kept_G,
            np.zeros(0, np.int64),
            tuple(about["batches"]),
            settings,
            genes=genes,
            batch_keys=tuple(about["batch_keys"]),
            where=str(path),
            bundle=bundle,
        )
        model.provenance, model.training = stored.provenance, stored.training
        model.vocabulary = vocabulary
        model.unseen_share, model.dispersion_G = about["unseen_share"], dispersion_G
        return model


def _as_now(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name weights as this version does: encoder and head were one module, then had names."""
    named = {}
    for name, tensor in weights.items():
        own = name.removeprefix("decoder.")
        if own != name:
            if not own.startswith(("encoder.", "head.")):
                heads = ("gene_GD", "bias_G", "offset_BD")
                own = f"head.{own}" if own in heads else f"encoder.{own}"
            part, _, rest = own.partition(".")
            name = f"decoder.{part}.{encoder_name(rest) if part == 'encoder' else rest}"
        named[name] = tensor
    if any(name.startswith("decoder.encoder.") for name in named):
        for name in ("mean_F", "sd_F"):  # before format 3 there were none
            named.setdefault(f"decoder.encoder.beside.{name}", torch.zeros(0))
    return named


def _numbers(rows: Selection, n: int) -> NDArray[np.integer]:
    """Row numbers of a selection; of a slice without numbering all of many cells."""
    if rows is None or isinstance(rows, slice):
        return np.arange(*(rows or slice(None)).indices(n))
    return np.arange(n)[rows]


def check_kind(kind: str) -> None:
    """Refuse an unknown kind of answer."""
    if kind not in ("posterior", "decoder"):
        raise ConfigError(f"kind is {kind!r}; it must be 'posterior' or 'decoder'.")


def check_library(library: Library) -> None:
    """Refuse a library that is neither None, ``"median"``, a factor nor a positive number."""
    if library is None or library == MEDIAN_LIBRARY:
        return
    factor = _OWN_LIBRARY.fullmatch(library) if isinstance(library, str) else None
    if factor is not None and float(factor[1]) > 0:
        return
    number = not isinstance(library, str | bool) and np.isfinite(library) and library > 0
    if not number:
        raise ConfigError(
            f"library is {library!r}; it must be None (as sequenced), '0.5x' (half of that; any "
            "factor), 'median', or a positive number of counts per cell."
        )


def check_batch(batch: str | None, batches: Sequence[str], where: str) -> None:
    """Refuse a batch that is not among those told apart."""
    if batch is None:
        return
    if not batches:
        raise ConfigError(f"{where}: batch={batch!r} needs batch_key, the obs column of batches.")
    if batch != MEAN_BATCH and batch not in batches:
        near = nearest(batch, batches)
        shown = ", ".join(batches[:10]) + (" …" if len(batches) > 10 else "")
        raise ConfigError(
            f"{where}: there is no batch {batch!r}"
            + (f": did you mean {near!r}?" if near else ".")
            + f" There are {shown}, and 'mean' for batch-corrected."
        )
