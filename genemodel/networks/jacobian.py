"""What a count more of a gene does to the predicted rates of all others, by differentiation.

A cell's rates are decoded from one vector y, log rate of gene t = w_t · (P y + p) + b_t − log Σ
exp(…). So the derivative of every rate by every count needs no pass per gene, of which there are
thousands, but one backward pass for each direction of y that the targets' w · P see, and one for
the logarithm of the sum; and one such pass gives the derivatives by all tokens of all cells of a
batch.

A count enters in three places: as its own token's value log(1 + x ÷ library × 10⁴), in the library
by which all other tokens' values are divided, and as the depth that the cell token says. The
derivative is the total one, through all of them.

Axes as in ``genemodel.batches.batch``; G genes of the data, S sources, T targets, K directions,
F tokens of sources.
"""

import numpy as np
import torch
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.bundle.bundle import Bundle
from genemodel.expression.normalise import DEPTH
from genemodel.heads.decode_counts import CellProjection
from genemodel.inference.cell_vectors import cell_projection
from genemodel.inference.progress import Progress
from genemodel.model.opening import encode_opening
from genemodel.networks.cells import Genes, NetworkCells, batches

# Directions beyond this share of the squares are left out: 3 % of a derivative's size, and of a
# decoder of 128 dimensions nearly half of the passes.
KEPT = 0.999


class CountJacobian:
    """Derivatives of log rates by counts per 10⁴, summed over the cells that hold the source.

    Parameters
    ----------
    bundle
        With a count decoder and values as input.
    genes
        Sources and targets.
    measured_V
        Genes among which rates are shared out.
    species
        Code of the cells' species.
    kept
        Share of the squares of the targets' w · P that the directions hold; 1 for all.

    Attributes
    ----------
    sum_ST, n_S
        Sums, and how many cells they are of.
    """

    def __init__(
        self,
        bundle: Bundle,
        genes: Genes,
        measured_V: np.ndarray,
        species: int,
        kept: float = KEPT,
    ) -> None:
        self.bundle, self.genes = bundle, genes
        self.model = bundle.model.eval()
        projection = cell_projection(bundle)
        assert isinstance(projection, CellProjection)
        self._projection = projection
        device = bundle.device
        weight_VD = bundle.heads["decode_counts.gene.weight"].detach().float()
        base_V = bundle.heads["decode_counts.base_SV"][species].detach().float()
        known = torch.from_numpy(np.flatnonzero(measured_V)).to(device)
        self._all_GD, self._base_G = weight_VD[known], base_V[known]
        target = torch.from_numpy(genes.targets).to(device)
        # A target is its coordinates in as few directions as the targets span.
        reads_TD = weight_VD[target] @ projection.project.weight.detach().float()
        left_TK, size_K, direction_KD = torch.linalg.svd(reads_TD, full_matrices=False)
        share_K = (size_K.double() ** 2).cumsum(0) / (size_K.double() ** 2).sum()
        n = int(torch.searchsorted(share_K, kept).clamp(max=len(size_K) - 1)) + 1
        self._target_TK = (left_TK * size_K)[:, :n].double()
        self._direction_KD = direction_KD[:n]
        self._source_V = torch.full((len(measured_V),), -1, dtype=torch.int64, device=device)
        self._source_V[torch.from_numpy(genes.sources).to(device)] = torch.arange(
            genes.sources.size, device=device
        )
        shape = genes.sources.size, genes.targets.size
        self.sum_ST = torch.zeros(shape, dtype=torch.float64, device=device)
        self.n_S = torch.zeros(shape[0], dtype=torch.float64, device=device)

    @property
    def passes(self) -> int:
        """Backward passes of a batch."""
        return len(self._direction_KD) + 1

    def add(self, batch: CellBatch) -> None:
        """Differentiate the cells of a batch."""
        batch = batch.to(self.bundle.device)
        source_T = self._source_V[batch.gene_T]
        (at_F,) = (source_T >= 0).nonzero(as_tuple=True)
        if not at_F.numel():
            return
        value_T = batch.value_T.clone().requires_grad_()
        library_C = batch.library_C.clone().requires_grad_()
        batch.value_T, batch.library_C = value_T, library_C
        with torch.enable_grad():
            # Places without a cell read tokens of others.
            opening_CD = encode_opening(self.model, batch)[: batch.n_cells]
            read_CD = self._projection.norm(opening_CD).float()
            z_CD = self._projection.project(read_CD)
            along_CK = read_CD @ self._direction_KD.T
            log_sum_C = torch.logsumexp(z_CD @ self._all_GD.T + self._base_G, 1)
            outputs = [along_CK[:, k].sum() for k in range(along_CK.shape[1])]
            outputs.append(log_sum_C.sum())
        found_FK = torch.empty(at_F.numel(), len(outputs), dtype=torch.float64, device=at_F.device)
        for k, output in enumerate(outputs):
            by_value_T, by_library_C = torch.autograd.grad(
                output, (value_T, library_C), retain_graph=k + 1 < len(outputs)
            )
            found_FK[:, k] = _by_count(by_value_T, by_library_C, batch, at_F)
        change_FT = found_FK[:, :-1] @ self._target_TK.T - found_FK[:, -1:]
        self.sum_ST.index_add_(0, source_T[at_F], change_FT)
        self.n_S.index_add_(0, source_T[at_F], torch.ones_like(found_FK[:, 0]))

    def mean(self) -> np.ndarray:
        """Mean over the cells that hold the source, float32 (S, T); NaN where none does."""
        return (self.sum_ST / self.n_S[:, None]).float().cpu().numpy()


def _by_count(by_value_T: Tensor, by_library_C: Tensor, batch: CellBatch, at_F: Tensor) -> Tensor:
    """From derivatives by values and libraries to those by counts per 10⁴ of some tokens."""
    value_T = batch.value_T.detach().double()
    by_value_T = by_value_T.double()
    library_C = batch.library_C.detach().double()
    # Every value falls as the library grows: v = log(1 + x ÷ L × 10⁴), dv/dL = −(1 − e⁻ᵛ) ÷ L.
    falls_T = by_value_T * (1.0 - torch.exp(-value_T))
    falls_C = torch.zeros_like(library_C).index_add(0, batch.segment_T, falls_T)
    library_C = (by_library_C.double() * library_C - falls_C) / DEPTH
    own_F = by_value_T[at_F] * torch.exp(-value_T[at_F])
    return own_F + library_C[batch.segment_T[at_F]]


def jacobian(
    cells: NetworkCells, bundle: Bundle, genes: Genes, batch_tokens: int = 0
) -> np.ndarray:
    """Mean derivative of the targets' log rates by the sources' counts per 10⁴, (S, T)."""
    found = CountJacobian(
        bundle, genes, cells.measured_V, bundle.vocabulary.species_code(cells.species)
    )
    with Progress("jacobian", len(cells)) as progress:
        for batch in batches(cells, bundle, batch_tokens=batch_tokens):
            found.add(batch)
            progress.add(batch.n_cells)
    return found.mean()
