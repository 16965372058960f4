"""A trained decoder with the counts it explains: the posterior of any cell and gene on demand.

Axes: C cells, G genes, M posterior draws, Q quantile levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from genemodel.adapt.imputation import (
    BLOCK_CELLS,
    DecoderSettings,
    TrainedDecoder,
    decode_fraction,
    train_decoder,
)
from genemodel.adapt.posterior import (
    expected_log1p,
    posterior_draws,
    posterior_gamma,
    rate_quantiles,
)
from genemodel.errors import ConfigError, DataError
from genemodel.settings import nearest

Kind = Literal["posterior", "decoder"]
"""Whose rates: this cell's, or those of cells like it."""
Library = float | str | None
Selection = slice | Sequence[int] | NDArray[np.integer] | NDArray[np.bool_] | None

MEAN_BATCH = "mean"
MEDIAN_LIBRARY = "median"
LARGEST_IN_MEMORY = 4e9
CP10K = 1e4
_FEWEST = 20
# Counts that a gene is given which was measured and never seen; the decoder starts from the same.
_UNSEEN = 0.1


@dataclass(frozen=True, slots=True)
class GammaPosterior:
    """Gamma distributions of the rates of some cells and genes.

    Attributes
    ----------
    shape_CG, rate_CG
        Parameters, float64 (C, G). The rate is NaN where a cell without counts was asked for at
        another library than its own.
    """

    shape_CG: NDArray[np.float64]
    rate_CG: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Posterior mean, (C, G)."""
        return self.shape_CG / self.rate_CG

    @property
    def sd(self) -> NDArray[np.float64]:
        """Posterior standard deviation of the rate (not of a new count), (C, G)."""
        return np.sqrt(self.shape_CG) / self.rate_CG

    def log_mean(self, library_C: NDArray[np.floating]) -> NDArray[np.float64]:
        """Give the expected log1p CP10k of another measurement of the same cells, (C, G).

        Parameters
        ----------
        library_C
            Counts of that measurement per cell, to which the rates belong.
        """
        return expected_log1p(
            self.shape_CG, self.rate_CG, CP10K / np.maximum(library_C, 1.0).astype(np.float64)
        )

    def quantiles(self, levels: Sequence[float]) -> NDArray[np.float64]:
        """Quantiles of the rate, (Q, C, G)."""
        return rate_quantiles(self.shape_CG, self.rate_CG, levels)

    def draws(self, n: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """Draw rates independently, (M, C, G) float32."""
        return posterior_draws(self.shape_CG, self.rate_CG, n, generator)


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
    where
        Name of the data in messages.
    """

    def __init__(
        self,
        trained: TrainedDecoder,
        counts_CG: sp.csr_matrix,
        kept_G: NDArray[np.integer],
        batch_C: NDArray[np.integer],
        batches: tuple[str, ...],
        settings: DecoderSettings,
        where: str = "AnnData",
    ) -> None:
        self.trained = trained
        self.counts_CG = counts_CG
        self.kept_G = kept_G
        self.batch_C = batch_C
        self.batches = batches
        self.settings = settings
        self.where = where
        self.library_C = np.asarray(counts_CG.sum(axis=1), dtype=np.float64).ravel()
        self._kept_CG = counts_CG[:, kept_G].astype(np.float32)
        order_G = np.argsort(np.asarray(self._kept_CG.sum(axis=0)).ravel(), kind="stable")
        rarest_G = trained.dispersion_G[order_G[: max(1, len(order_G) // 10)]]
        # A gene measured and never seen is taken to vary as the rarest genes do.
        dispersion_G = np.full(counts_CG.shape[1], np.exp(np.log(rarest_G).mean()))
        dispersion_G[kept_G] = trained.dispersion_G
        self.dispersion_G = dispersion_G

    @classmethod
    def train(
        cls,
        counts_CG: sp.csr_matrix,
        batch_C: NDArray[np.integer] | None = None,
        batches: tuple[str, ...] = (),
        settings: DecoderSettings | None = None,
        *,
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
        trained = train_decoder(
            counts_CG[kept_C][:, kept_G].astype(np.float32), codes_C[kept_C], settings
        )
        return cls(trained, counts_CG, kept_G, codes_C, batches, settings, where)

    def __len__(self) -> int:
        return self.counts_CG.shape[0]

    def __repr__(self) -> str:
        return (
            f"ImputationModel({len(self):,} cells × {self.counts_CG.shape[1]:,} genes, "
            f"{self.trained.heldout_nats:.4f} nats a molecule set aside; {self.trained.coverage})"
        )

    def library_ratio(self, library: Library) -> NDArray[np.float64]:
        """Return the requested library over each own, (C,); NaN for a cell without counts.

        Parameters
        ----------
        library
            None for the cell's own, ``"median"`` for the median of the cells with counts, or a
            number of counts per cell.
        """
        check_library(library)
        if library is None:
            return np.ones(len(self))
        if library == MEDIAN_LIBRARY:
            wanted = float(np.median(self.library_C[self.library_C > 0]))
        else:
            wanted = float(library)
        own_C = np.where(self.library_C > 0, self.library_C, np.nan)
        return wanted / own_C

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
        ratio_C = self.library_ratio(library)
        at_C = np.arange(len(self))[slice(None) if rows is None else rows]
        at_G = np.arange(self.counts_CG.shape[1]) if genes is None else np.asarray(genes)
        size = 2.0 * 8 * len(at_C) * len(at_G)
        if size > LARGEST_IN_MEMORY:
            raise ConfigError(
                f"posterior of {len(at_C):,} cells × {len(at_G):,} genes takes {size / 1e9:.1f} GB "
                f"(most is {LARGEST_IN_MEMORY / 1e9:.0f} GB): ask for fewer rows at a time, or for "
                "genes=."
            )
        own_CG = self._fraction(at_C, at_G, self.batch_C[at_C])
        prior_mean_CG = own_CG * self.library_C[at_C, None]
        exposure = 1.0 if kind == "posterior" else 0.0
        count_CG = self.counts_CG[at_C][:, at_G].toarray()
        shape_CG, rate_CG = posterior_gamma(
            count_CG, prior_mean_CG, self.dispersion_G[at_G], exposure
        )
        if (code := self.batch_code(batch)) is not None:
            # What the counts say about a cell, as a factor on the prior, holds in any batch.
            wanted_CG = self._fraction(at_C, at_G, np.full(len(at_C), code))
            rate_CG *= own_CG / np.maximum(wanted_CG, 1e-30)
        rate_CG /= ratio_C[at_C, None]
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
        floor = _UNSEEN / max(float(self.library_C.sum()), 1.0)
        fraction_CG = np.full((len(at_C), len(at_G)), floor)
        place_G = np.full(self.counts_CG.shape[1], -1)
        place_G[self.kept_G] = np.arange(len(self.kept_G))
        seen_G = place_G[at_G] >= 0
        for start in range(0, len(at_C), BLOCK_CELLS):
            cells = slice(start, start + BLOCK_CELLS)
            all_CG = decode_fraction(
                self.trained.decoder, self._kept_CG[at_C[cells]], code_C[cells]
            )
            fraction_CG[cells, seen_G] = all_CG[:, place_G[at_G[seen_G]]]
        return fraction_CG


def check_kind(kind: str) -> None:
    """Refuse an unknown kind of answer."""
    if kind not in ("posterior", "decoder"):
        raise ConfigError(f"kind is {kind!r}; it must be 'posterior' or 'decoder'.")


def check_library(library: Library) -> None:
    """Refuse a library that is neither None, ``"median"`` nor a positive number."""
    if library is None or library == MEDIAN_LIBRARY:
        return
    number = not isinstance(library, str | bool) and np.isfinite(library) and library > 0
    if not number:
        raise ConfigError(
            f"library is {library!r}; it must be None (as sequenced), 'median', or a positive "
            "number of counts per cell."
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
