"""Which genes are imputed, and where each comes from: the data, a trained model or a bundle.

Axes: B cells of a batch, C cells, D width, G genes of the data, P genes asked for, S species, U
unmeasured genes among them, V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.cells.source import Source
from genemodel.corpus.statistics import GeneStatistics
from genemodel.errors import ConfigError, DataError
from genemodel.genes.match import USUAL_COLUMNS
from genemodel.heads.decode_counts import CountDecoder
from genemodel.imputation.model import ImputationModel
from genemodel.inference.counts import VocabularyCells, VocabularyChunk
from genemodel.inference.forward import Forward
from genemodel.settings import nearest

logger = logging.getLogger(__name__)

# Cells whose rates over the whole vocabulary are held at once.
_VOCABULARY_CELLS = 64


@dataclass(frozen=True)
class Columns:
    """What is written: its names, and where each comes from.

    ``column_P`` is the gene's position in the data, -1 where it was not measured; ``token_P`` its
    token then.
    """

    names: list[str]
    column_P: np.ndarray
    token_P: np.ndarray

    @property
    def measured_P(self) -> np.ndarray:
        """Which of them the data measured."""
        return self.column_P >= 0

    @property
    def predicted_P(self) -> np.ndarray:
        """Which of the others a bundle's decoder predicts."""
        return ~self.measured_P & (self.token_P >= 0)

    def among(self, known_G: np.ndarray) -> "Columns":
        """Count the columns of the data among these ones only; the others get nothing."""
        place_G = np.full(max([*self.column_P.tolist(), *known_G.tolist(), -1]) + 2, -1)
        place_G[known_G] = np.arange(known_G.size)
        return Columns(self.names, place_G[self.column_P], self.token_P)

    @property
    def unmeasured(self) -> list[str]:
        """Names of the others."""
        return [self.names[p] for p in np.flatnonzero(~self.measured_P)]


def columns_of_model(
    trained: ImputationModel, source: Source, genes: Sequence[str] | None
) -> Columns:
    """Find the genes asked for among the model's; genes it does not know get NaN."""
    place = {name: gene for gene, name in enumerate(trained.genes)}
    if genes is None:
        names = [str(name) for name in source.genes.index]
        unknown = [name for name in names if name not in place]
        if unknown:
            logger.warning(
                "%s: %s genes were not in the training data and get NaN (%s).",
                source.where, f"{len(unknown):,}", ", ".join(unknown[:3]),
            )  # fmt: skip
    else:
        names = _checked_names(genes)
        if unknown := [name for name in names if name not in place]:
            near = nearest(unknown[0], trained.genes)
            raise DataError(
                f"genes: the model does not have {', '.join(unknown[:5])}"
                + (f" (nearest: {near})" if near else "")
                + ". It knows the genes of its training data only: leave these out."
            )
    column_P = np.array([place.get(name, -1) for name in names])
    return Columns(names, column_P, np.full(len(names), -1))


def columns_of_data(
    source: Source, genes: Sequence[str] | None, model: Bundle | None, reading: InputSettings
) -> tuple[Columns, VocabularyCells | None]:
    """Find the genes asked for in the data, then in the model's vocabulary."""
    index = [str(name) for name in source.genes.index]
    if genes is None:
        n = len(index)
        return Columns(index, np.arange(n), np.full(n, -1)), None
    names = _checked_names(genes)
    tables = [index] + [
        [str(name) for name in source.genes[column]]
        for column in USUAL_COLUMNS
        if column in source.genes
    ]
    places = [_places(table) for table in tables]
    column_P = np.full(len(names), -1)
    token_P = np.full(len(names), -1)
    for p, name in enumerate(names):
        found = next((place[name] for place in places if name in place), [])
        if len(found) > 1:
            raise DataError(
                f"{source.where}: {len(found)} genes are called {name!r}. Make the names unique "
                "(adata.var_names_make_unique()), or use their ids."
            )
        if found:
            column_P[p] = found[0]
    missing = np.flatnonzero(column_P < 0)
    if not missing.size:
        return Columns(names, column_P, token_P), None
    if model is None:
        known = [name for table in tables for name in table]
        _refuse_unknown(source, [names[p] for p in missing], known, model)
    cells = VocabularyCells(source, cast(Bundle, model), reading)
    token_P[missing] = _tokens(cells, [names[p] for p in missing])
    column_V = {int(t): g for m in cells.matches.values() for g, t in enumerate(m.token_G)}
    for p in missing.tolist():
        column_P[p] = column_V.get(int(token_P[p]), -1) if token_P[p] >= 0 else -1
    unknown = [names[p] for p in missing if token_P[p] < 0]
    if unknown:
        table = cells.bundle.vocabulary.genes
        known = [name for t in tables for name in t] + table["symbol"].astype(str).tolist()
        _refuse_unknown(source, unknown, known, model)
    token_P[column_P >= 0] = -1  # measured after all, under another name
    columns = Columns(names, column_P, token_P)
    return columns, cells if columns.unmeasured else None


def _checked_names(genes: Sequence[str]) -> list[str]:
    if isinstance(genes, str):
        raise ConfigError(f"genes is the text {genes!r}: give a list of names.")
    names = [str(name) for name in genes]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not names or repeated:
        raise ConfigError(
            f"genes names {', '.join(repeated[:5])} more than once."
            if repeated
            else "genes is an empty list: name genes, or leave it out for all."
        )
    return names


def _places(names: list[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


def _tokens(cells: VocabularyCells, names: list[str]) -> np.ndarray:
    """Token of every name in the first of the cells' species that knows it, else -1."""
    token_P = np.full(len(names), -1)
    for species in cells.matches:
        # Name by name: a few names are too few to be told from another species' by the matcher.
        for p in np.flatnonzero(token_P < 0):
            found = cells.bundle.vocabulary.match(
                [names[p]], species=cells.bundle.species[species], min_fraction=0.0, min_genes=0
            )
            token_P[p] = found.token_G[0]
    return token_P


def _refuse_unknown(
    source: Source, unknown: list[str], known: list[str], model: Bundle | None
) -> None:
    shown = []
    for name in unknown[:5]:
        near = nearest(name, known)
        shown.append(f"{name} (nearest: {near})" if near else name)
    more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
    way_out = (
        "A pre-trained model predicts unmeasured genes of its vocabulary: give it as model."
        if model is None
        else "The model's vocabulary does not have them either: correct or leave out the names."
    )
    raise DataError(f"{source.where}: did not measure {', '.join(shown)}{more}. {way_out}")


class Unmeasured:
    """Prior predictive of genes that the data did not measure, from a pre-trained count decoder.

    The softmax is normalised over the measured genes, on which the library was counted; a gene
    beside them gets its own weight relative to theirs.
    """

    def __init__(self, cells: VocabularyCells, token_P: np.ndarray) -> None:
        bundle = cells.bundle
        n_tokens, n_species = len(bundle.vocabulary), len(bundle.species)
        saved = bundle.heads.get("decode_counts.batch.weight")
        decoder = CountDecoder(
            bundle.model.settings.width,
            GeneStatistics.empty(n_species, n_tokens),
            1 if saved is None else saved.shape[0],
            torch.zeros(1, n_tokens, dtype=torch.bool),
        )
        self.decoder = cast(CountDecoder, bundle.head("decode_counts", decoder)).eval()
        self.cells = cells
        self.token_U = token_P[token_P >= 0]
        theta_V = self.decoder.log_theta_V.detach().exp().cpu().numpy().astype(np.float64)
        self.theta_U = theta_V[self.token_U]
        self.has_SU = np.stack(
            [np.isin(self.token_U, bundle.vocabulary.tokens_of(name)) for name in bundle.species]
        )

        self._measured_SV = torch.from_numpy(cells.measured_SV).to(bundle.device)
        self._token_device_U = torch.from_numpy(self.token_U).to(bundle.device)
        self._forward = Forward(
            bundle, self._shares, self.token_U.size, batch_size=_VOCABULARY_CELLS
        )

    def _shares(self, cell_BD: Tensor, batch: CellBatch) -> Tensor:
        """Share of every gene U in what a cell would hold of the measured genes, (B, U)."""
        species_B = batch.species_C[: cell_BD.shape[0]]
        log_rate_BV = self.decoder.log_rate(
            cell_BD,
            species_B,
            torch.full_like(species_B, -1),
            torch.ones(cell_BD.shape[0], device=cell_BD.device),
            torch.ones_like(self._measured_SV)[species_B],
        ).float()
        outside_BV = ~self._measured_SV[species_B]
        total_B1 = log_rate_BV.masked_fill(outside_BV, -torch.inf).logsumexp(1, keepdim=True)
        return (log_rate_BV[:, self._token_device_U] - total_B1).exp()

    def mean(self, chunk: VocabularyChunk) -> np.ndarray:
        """Means at the cells' own libraries, (C, U); NaN where the species has no such gene."""
        ((_, share_CU),) = self._forward.over([chunk])
        mean_CU = (share_CU * chunk.library_C[:, None]).astype(np.float64)
        mean_CU[~self.has_SU[chunk.species_C]] = np.nan
        return mean_CU
