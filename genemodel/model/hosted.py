"""The input of published models, hosted as it is: Geneformer's (BERT's) and GeneCompass's.

Axes as in ``genemodel.batches.batch``: T tokens, D width, V vocabulary, S species; Q rows of a
published knowledge table, P its columns.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.genes.vocabulary import CELL
from genemodel.model.devices import half_of
from genemodel.model.settings import ModelSettings

# GeneCompass's one layer norm that is not BERT's.
FUSION_EPS = 1e-5


@dataclass(frozen=True)
class FusionShape:
    """What GeneCompass's input is made of; its sizes are in no setting but in the checkpoint.

    Attributes
    ----------
    values
        Whether it reads the value of a gene.
    priors
        Name, rows and columns of every knowledge table, in the order in which they are read.
    folded
        One vector per species and gene stands for all that does not depend on the value: the same
        numbers to rounding, without tables and their projections.
    """

    values: bool = True
    priors: tuple[tuple[str, int, int], ...] = ()
    folded: bool = False


class HostedEmbedding(nn.Module):
    """Gene and position, as BERT sums and normalises them; GeneCompass's species token and fusion.

    What the native embedding has besides it has not: nothing says species or depth to Geneformer.
    """

    value = components = None

    def __init__(
        self, settings: ModelSettings, n_tokens: int, n_species: int, fusion: FusionShape | None
    ) -> None:
        super().__init__()
        width = settings.width
        self.token = nn.Embedding(n_tokens, width)
        self.rank = nn.Embedding(settings.max_rank + 1, width)
        # BERT's kinds of a token; every token is of the first.
        self.kind = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=settings.norm_eps)
        self.half_stream = settings.residual == "bfloat16"
        self.knowledge = nn.ModuleDict()
        self.fusion: KnowledgeFusion | FoldedFusion | None = None
        if fusion is not None:
            self.species = nn.Embedding(n_species, width)
            kind = FoldedFusion if fusion.folded else KnowledgeFusion
            self.fusion = kind(fusion, width, n_tokens, n_species)

    def genes(self, gene_T: Tensor) -> Tensor:
        """Embed gene identities alone: (…,) → (…, D)."""
        return self.token(gene_T)

    def forward(self, batch: CellBatch) -> Tensor:
        """Embed a packed batch: (T,) → (T, D)."""
        x_TD = self.token(batch.gene_T)
        if self.fusion is not None:
            species_T = batch.species_C[batch.segment_T]
            x_TD = self.fusion(x_TD, batch.gene_T, batch.value_T, species_T)
        rank_T = batch.rank_T.clamp(max=self.rank.num_embeddings - 1)
        x_TD = self.norm(x_TD + self.kind.weight[0] + self.rank(rank_T))
        if self.fusion is not None:
            # No position, no kind, no norm: it is put before the sequence as it is.
            cell_TD = self.species(species_T).to(x_TD.dtype)
            x_TD = torch.where((batch.gene_T == CELL)[:, None], cell_TD, x_TD)
        half = half_of(x_TD.device)
        return x_TD.to(half) if self.half_stream and half is not None else x_TD


class KnowledgeFusion(nn.Module):
    """Gene, value and knowledge of a gene side by side, through two matrices.

    The knowledge of a shared token is that of the gene in the cell's own species.
    """

    row_SV: Tensor
    alpha: Tensor

    def __init__(self, shape: FusionShape, width: int, n_tokens: int, n_species: int) -> None:
        super().__init__()
        self.shape = shape
        read = width * (1 + len(shape.priors)) + shape.values
        self.up = nn.Linear(read, width)
        self.norm = nn.LayerNorm(width, eps=FUSION_EPS)
        self.down = nn.Linear(width, width)
        self.register_buffer("row_SV", torch.zeros(n_species, n_tokens, dtype=torch.int64))
        self.register_buffer("alpha", torch.ones(()))
        self.tables = nn.ModuleDict()
        for name, rows, columns in shape.priors:
            self.tables[name] = PriorTable(rows, columns, width)

    def parts(self, gene_TD: Tensor, gene_T: Tensor, species_T: Tensor) -> list[Tensor]:
        """Give vectors side by side, the value's place left out."""
        row_T = self.row_SV[species_T, gene_T]
        return [gene_TD, *(self.alpha * table(row_T) for table in self.tables.values())]

    def forward(
        self, gene_TD: Tensor, gene_T: Tensor, value_T: Tensor, species_T: Tensor
    ) -> Tensor:
        """(T, D) → (T, D)."""
        first, *others = self.parts(gene_TD, gene_T, species_T)
        value = [value_T[:, None].to(first.dtype)] if self.shape.values else []
        x_TD = self.up(torch.cat([first, *value, *others], -1))
        return self.down(quick_gelu(self.norm(x_TD)))

    @torch.no_grad()
    def folded(self, token: nn.Embedding) -> "FoldedFusion":
        """Add up, for every species and gene, all that does not depend on the value."""
        n_species, n_tokens = self.row_SV.shape
        width = token.embedding_dim
        made = FoldedFusion(FusionShape(self.shape.values, folded=True), width, n_tokens, n_species)
        no_value = torch.zeros(n_tokens, dtype=token.weight.dtype)
        gene_V = torch.arange(n_tokens)
        for species in range(n_species):
            first, *others = self.parts(token.weight, gene_V, torch.full_like(gene_V, species))
            value = [no_value[:, None]] if self.shape.values else []
            made.gene_SVD[species] = self.up(torch.cat([first, *value, *others], -1))
        if self.shape.values:
            made.value_D.copy_(self.up.weight[:, width])
        made.norm.load_state_dict(self.norm.state_dict())
        made.down.load_state_dict(self.down.state_dict())
        return made


class FoldedFusion(nn.Module):
    """:class:`KnowledgeFusion` with its linear part looked up."""

    def __init__(self, shape: FusionShape, width: int, n_tokens: int, n_species: int) -> None:
        super().__init__()
        self.shape = shape
        self.gene_SVD = nn.Parameter(torch.zeros(n_species, n_tokens, width))
        self.value_D = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=FUSION_EPS)
        self.down = nn.Linear(width, width)

    def forward(
        self, gene_TD: Tensor, gene_T: Tensor, value_T: Tensor, species_T: Tensor
    ) -> Tensor:
        """(T, D) → (T, D)."""
        x_TD = self.gene_SVD[species_T, gene_T] + value_T[:, None] * self.value_D
        return self.down(quick_gelu(self.norm(x_TD)))


class PriorTable(nn.Module):
    """A frozen table of gene vectors and its projection."""

    table_QP: Tensor

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        self.register_buffer("table_QP", torch.zeros(rows, columns))
        self.project = nn.Linear(columns, width)

    def forward(self, row_T: Tensor) -> Tensor:
        """(T,) → (T, D)."""
        return self.project(self.table_QP[row_T])


def quick_gelu(x: Tensor) -> Tensor:
    """Return x · σ(1.702 x)."""
    return x * F.sigmoid(1.702 * x)
