"""``GeneModel``: a transformer over the expressed genes of a cell.

Axes as in ``genemodel.batches.batch``: T tokens, C cells, D width, H heads, K head width, V
vocabulary, P knowledge tables, S species.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genemodel.batches.batch import CellBatch
from genemodel.genes.vocabulary import EOS, N_SPECIAL
from genemodel.model.attention import attend
from genemodel.model.devices import full_precision, half_of, is_host
from genemodel.model.hosted import FusionShape, HostedEmbedding
from genemodel.model.settings import ModelSettings

# value_T below this asks for the learned "value hidden" vector (see genemodel.heads.masking).
HIDDEN_VALUE = -1.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the backbone returns: ``hidden_TD`` of every token and ``cell_CD`` of every cell."""

    hidden_TD: Tensor
    cell_CD: Tensor


class NumberEmbedding(nn.Module):
    """A continuous number as a vector: a two-layer network over fixed, smooth features of it."""

    centre_F: Tensor

    def __init__(self, width: int, top: float, features: int = 32) -> None:
        super().__init__()
        # Gaussian bumps over [0, top] let the network treat low and high values differently
        # without binning them.
        self.register_buffer("centre_F", torch.linspace(0.0, top, features), persistent=False)
        self.spread = top / (features - 1)
        self.up = nn.Linear(features + 1, width)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x_T: Tensor) -> Tensor:
        """Embed numbers of any shape (…,) as (…, D)."""
        bump = torch.exp(-0.5 * ((x_T[..., None] - self.centre_F) / self.spread) ** 2)
        return self.down(F.gelu(self.up(torch.cat([bump, x_T[..., None]], -1))))


class ExpressionComponents(nn.Module):
    """Linear components of a cell's visible values, for its opening token.

    Started at the principal components of the corpus (:meth:`start_at`), so that a model begins
    where PCA ends instead of spending its first epochs finding it. Hidden genes and hidden values
    take no part.
    """

    def __init__(self, n_tokens: int, n_species: int, components: int, width: int) -> None:
        super().__init__()
        self.loading = nn.Embedding(n_tokens, components)
        self.offset = nn.Embedding(n_species, components)
        self.project = nn.Linear(components, width, bias=False)

    def forward(self, batch: CellBatch) -> Tensor:
        """(T,) → (C, D)."""
        visible_T = torch.where(batch.gene_T >= N_SPECIAL, batch.value_T.clamp_min(0.0), 0.0)
        weighted_TK = self.loading(batch.gene_T) * visible_T[:, None]
        if is_host(weighted_TK.device):
            # One token after the other: to the bit the same whatever cells lie beside it.
            start_CK = self.offset(batch.species_C)
            score_CK = start_CK.index_add(0, batch.segment_T, weighted_TK.to(start_CK.dtype))
            return self.project(score_CK)
        # A sum within cells as a product with their indicators: its backward is a product too,
        # where a scatter onto a dozen rows would have the tokens of a cell queue up on a GPU.
        place_C1 = torch.arange(batch.species_C.shape[0], device=batch.segment_T.device)[:, None]
        with full_precision(weighted_TK.device):
            of_CT = (batch.segment_T == place_C1).to(weighted_TK.dtype)
            score_CK = self.offset(batch.species_C) + of_CT @ weighted_TK
        return self.project(score_CK)

    @torch.no_grad()
    def start_at(self, loading_VK: Tensor, offset_SK: Tensor) -> None:
        """Start at given components; K may be fewer than the module's."""
        k = loading_VK.shape[1]
        for part, start in ((self.loading, loading_VK), (self.offset, offset_SK)):
            part.weight.zero_()
            part.weight[:, :k] = start


class GeneEmbedding(nn.Module):
    """Gene, value, rank, species and depth as the first hidden state of every token."""

    def __init__(
        self,
        settings: ModelSettings,
        n_tokens: int,
        n_species: int,
        knowledge: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        width = settings.width
        self.token = nn.Embedding(n_tokens, width)
        self.species = nn.Embedding(n_species, width)
        self.depth = NumberEmbedding(width, top=15.0)  # ln of 3 million counts
        self.value = NumberEmbedding(width, top=9.3) if settings.values else None  # log1p(10⁴)
        self.hidden_value_D = nn.Parameter(torch.empty(width)) if settings.values else None
        self.components = (
            ExpressionComponents(n_tokens, n_species, settings.components, width)
            if settings.components
            else None
        )
        self.rank = (
            nn.Embedding(settings.max_rank + 1, width) if settings.position == "rank" else None
        )
        self.norm = (
            nn.LayerNorm(width, eps=settings.norm_eps) if settings.embedding_norm else nn.Identity()
        )
        self.half_stream = settings.residual == "bfloat16"
        self.knowledge = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):  # the weights of the rest do not depend on it
            for name, (table_VP, present_V) in knowledge.items():
                self.knowledge[name] = KnowledgeEmbedding(table_VP, present_V, width)

    def genes(self, gene_T: Tensor) -> Tensor:
        """Embed gene identities alone, knowledge included: (…,) → (…, D)."""
        x_TD = self.token(gene_T)
        for table in self.knowledge.values():
            x_TD = x_TD + table(gene_T)
        return x_TD

    def summed(self, batch: CellBatch) -> Tensor:
        """Add up what is known of every token, not yet normalised: (T,) → (T, D)."""
        x_TD = self.genes(batch.gene_T)
        if self.value is not None and self.hidden_value_D is not None:
            hidden_T1 = (batch.value_T <= HIDDEN_VALUE)[:, None]
            x_TD = x_TD + torch.where(
                hidden_T1, self.hidden_value_D.to(x_TD.dtype), self.value(batch.value_T)
            )
        if self.rank is not None:
            x_TD = x_TD + self.rank(batch.rank_T.clamp(max=self.rank.num_embeddings - 1))
        # Species and depth belong to the cell: they are added to its opening token only.
        cell_CD = self.species(batch.species_C) + self.depth(torch.log1p(batch.library_C))
        if self.components is not None:
            cell_CD = cell_CD + self.components(batch)
        first_C, is_there_C1 = opening_tokens(batch.starts_C1, x_TD.shape[0])
        cell_CD = cell_CD.to(x_TD.dtype).masked_fill(~is_there_C1, 0.0)
        return x_TD.index_add(0, first_C, cell_CD)

    def finished(self, summed_TD: Tensor) -> Tensor:
        """Bring sums to what the first block reads: (T, D) → (T, D)."""
        x_TD = self.norm(summed_TD)
        half = half_of(x_TD.device)
        return x_TD.to(half) if self.half_stream and half is not None else x_TD

    def forward(self, batch: CellBatch) -> Tensor:
        """Embed a packed batch: (T,) → (T, D)."""
        return self.finished(self.summed(batch))


def opening_tokens(starts_C1: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Position of every place's first token, (C,), and whether it has one, (C, 1).

    Places without tokens point at rows of their own, so that gradients find no queue there.
    """
    first_C = starts_C1[:-1].long()
    place_C = torch.arange(first_C.shape[0], device=first_C.device).clamp_max(n_tokens - 1)
    is_there_C = first_C < n_tokens
    return torch.where(is_there_C, first_C, place_C), is_there_C[:, None]


class KnowledgeEmbedding(nn.Module):
    """A fixed table of gene vectors, projected; genes absent from it share a learned vector."""

    table_VP: Tensor
    present_V: Tensor

    def __init__(self, table_VP: Tensor, present_V: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("table_VP", table_VP.float())
        self.register_buffer("present_V", present_V.bool())
        self.project = nn.Linear(table_VP.shape[1], width, bias=False)
        self.absent_D = nn.Parameter(torch.empty(width))

    def forward(self, gene_T: Tensor) -> Tensor:
        """Look up and project: (…,) → (…, D)."""
        return torch.where(
            self.present_V[gene_T][..., None], self.project(self.table_VP[gene_T]), self.absent_D
        )


class FeedForward(nn.Module):
    """Two matrices with an activation between them, or three when gated."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.gated = settings.activation == "swiglu"
        self.relu = settings.activation == "relu"
        self.up = nn.Linear(
            settings.width, settings.ffn * (2 if self.gated else 1), bias=settings.bias
        )
        self.down = nn.Linear(settings.ffn, settings.width, bias=settings.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) → (T, D)."""
        x = self.up(x_TD)
        if self.gated:
            gate, x = x.chunk(2, -1)
            x = F.silu(gate) * x
        else:
            x = F.relu(x) if self.relu else F.gelu(x)
        return self.down(x)


class Block(nn.Module):
    """Attention within cells, then feed-forward, each added to the stream."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.pre = settings.norm == "pre"
        self.norm1 = nn.LayerNorm(width, eps=settings.norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=settings.bias)
        self.out = nn.Linear(width, width, bias=settings.bias)
        self.norm2 = nn.LayerNorm(width, eps=settings.norm_eps)
        self.ffn = FeedForward(settings)
        self.dropout = nn.Dropout(settings.dropout)

    def attention(self, x_TD: Tensor, starts_C1: Tensor, longest: int) -> Tensor:
        """Multi-head attention: (T, D) → (T, D)."""
        q, k, v = self.qkv(x_TD).view(x_TD.shape[0], 3, self.heads, -1).unbind(1)
        return self.out(attend(q, k, v, starts_C1, longest).flatten(1))

    def forward(self, x_TD: Tensor, starts_C1: Tensor, longest: int) -> Tensor:
        """(T, D) → (T, D)."""
        if self.pre:
            x_TD = x_TD + self.dropout(self.attention(self.norm1(x_TD), starts_C1, longest))
            return x_TD + self.dropout(self.ffn(self.norm2(x_TD)))
        # Under autocast norms are made in full precision; the stream keeps its own.
        stream = x_TD.dtype
        x_TD = self.norm1(x_TD + self.dropout(self.attention(x_TD, starts_C1, longest))).to(stream)
        return self.norm2(x_TD + self.dropout(self.ffn(x_TD))).to(stream)


def mean_over_genes(x_TD: Tensor, batch: CellBatch, *, closed: bool) -> Tensor:
    """Mean of every cell's genes, (C, D) float32; zeros for a place without any.

    ``closed`` says that the first row of the vocabulary is no gene but closes every cell.
    """
    is_gene_T = batch.gene_T >= (EOS + 1 if closed else N_SPECIAL)
    n_places = batch.species_C.shape[0]
    if is_host(x_TD.device):
        # One token after the other: to the bit the same whatever cells lie beside it.
        own_TD = x_TD.float() * is_gene_T[:, None]
        sum_CD = own_TD.new_zeros(n_places, x_TD.shape[1]).index_add(0, batch.segment_T, own_TD)
        n_C = own_TD.new_zeros(n_places).index_add(0, batch.segment_T, is_gene_T.float())
        return sum_CD / n_C.clamp_min(1.0)[:, None]
    place_C1 = torch.arange(n_places, device=batch.segment_T.device)[:, None]
    with full_precision(x_TD.device):
        of_CT = (is_gene_T & (batch.segment_T == place_C1)).float()
        return (of_CT @ x_TD.float()) / of_CT.sum(1, keepdim=True).clamp_min(1.0)


class Readout(nn.LayerNorm):
    """The final norm, where there is one, and the cells' opening tokens."""

    def __init__(self, settings: ModelSettings) -> None:
        pre = settings.norm == "pre"
        super().__init__(settings.width, eps=settings.norm_eps, elementwise_affine=pre)
        self.pre = pre

    def forward(self, x_TD: Tensor, starts_C1: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(T, D) → (T, D) and (C, D)."""
        if self.pre:
            x_TD = super().forward(x_TD)
        first_C, _ = opening_tokens(starts_C1, x_TD.shape[0])
        return x_TD, x_TD.index_select(0, first_C)


class GeneModel(nn.Module):
    """The backbone of every size.

    Parameters
    ----------
    settings
        Shape.
    n_tokens
        Size of the vocabulary, special tokens included (V).
    n_species
        Species of the vocabulary (S).
    knowledge
        For every name in ``settings.knowledge``: a (V, P) table and a (V,) mask of known genes.
    context
        No cell is longer; a constant for compiled attention.
    fusion
        What GeneCompass's input is made of, where ``settings.hosts`` says that it is hosted.

    Attributes
    ----------
    recompute
        Keep only what goes into a block, and compute the rest again in the backward pass.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        n_tokens: int,
        n_species: int,
        context: int,
        knowledge: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        fusion: FusionShape | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.context = context
        self.embedding: GeneEmbedding | HostedEmbedding = (
            GeneEmbedding(settings, n_tokens, n_species, knowledge or {})
            if settings.hosts == "native"
            else HostedEmbedding(settings, n_tokens, n_species, fusion)
        )
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.final_norm = Readout(settings)
        self.recompute = False
        initialise(self)

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary (V)."""
        return self.embedding.token.num_embeddings

    def forward(self, batch: CellBatch, layer: int | None = None) -> Encoded:
        """Encode packed cells.

        Parameters
        ----------
        batch
            Packed cells; the pieces of the tail are encoded as cells and mean nothing.
        layer
            Stop after this many blocks (default: all), without the final norm when fewer; the
            vectors of cells are then of the last of them, unless ``settings.cell_layer`` says one
            below.
        """
        return self.encode(self.embedding(batch), batch, layer)

    def encode(self, x_TD: Tensor, batch: CellBatch, layer: int | None = None) -> Encoded:
        """Encode packed cells from their embedded tokens on; see :meth:`forward`."""
        stop = len(self.blocks) if layer is None else layer
        read = len(self.blocks) - self.settings.cell_layer
        read_TD = None
        for number, block in enumerate(self.blocks[:stop]):
            if number == read:
                read_TD = x_TD
            x_TD = self._through(block, x_TD, batch)
        if stop == len(self.blocks):
            x_TD, cell_CD = self.final_norm(x_TD, batch.starts_C1)
        else:
            first_C, _ = opening_tokens(batch.starts_C1, x_TD.shape[0])
            cell_CD = x_TD.index_select(0, first_C)
        if read_TD is not None or self.settings.cell == "genes":
            cell_CD = self._cells(x_TD if read_TD is None else read_TD, batch)
        return Encoded(hidden_TD=x_TD, cell_CD=cell_CD)

    @property
    def cell_stop(self) -> int | None:
        """How many blocks the vectors of cells need; None for all."""
        skipped = self.settings.cell_layer
        return len(self.blocks) - skipped if skipped else None

    def _cells(self, x_TD: Tensor, batch: CellBatch) -> Tensor:
        if self.settings.cell == "genes":
            closed = self.settings.hosts == "geneformer_v2"
            return mean_over_genes(x_TD, batch, closed=closed).to(x_TD.dtype)
        first_C, _ = opening_tokens(batch.starts_C1, x_TD.shape[0])
        return x_TD.index_select(0, first_C)

    def _through(self, block: nn.Module, x_TD: Tensor, batch: CellBatch) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return block(x_TD, batch.starts_C1, batch.longest)
        # Around the compiled block, not inside: it is the same graph with and without.
        return checkpoint(
            block, x_TD, batch.starts_C1, batch.longest, use_reentrant=False,
            preserve_rng_state=self.settings.dropout > 0,
        )  # fmt: skip


def initialise(module: nn.Module) -> None:
    """Initialise every parameter below ``module``; the only place where that happens.

    ==================================  ====================================================
    parameter                           start
    ==================================  ====================================================
    embeddings                          normal, 0.02; genes 1 / √D
    linear weights                      normal, 1 / √(inputs)
    … that write to the stream          … / √(2 × layers), so the stream's size does not grow
    … that project knowledge            normal, 1 / √(inputs × D): as large as a gene's own
    biases                              0
    layer norms                         1 and 0
    vectors (hidden value, absent gene) normal, 0.02
    ==================================  ====================================================

    Knowledge comes last and draws from a generator of its own, so that models with and without it
    begin with the same weights in everything else.

    Heads set their output biases from corpus statistics afterwards (``genemodel.heads``).
    """
    knowing = [part for part in module.modules() if isinstance(part, KnowledgeEmbedding)]
    apart = {inner for part in knowing for inner in part.modules()}
    for part in module.modules():
        if part in apart:
            continue
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            if not part.elementwise_affine:
                continue
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        else:
            for parameter in part.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)
    if isinstance(module, GeneModel):
        # As large as the embedded value beside it: a block sees the sum normalised, and a gene
        # that is small beside its value is learnt late.
        nn.init.normal_(module.embedding.token.weight, std=module.settings.width**-0.5)
        scale = (2 * len(module.blocks)) ** -0.5
        for block in module.blocks:
            assert isinstance(block, Block)
            for out in (block.out, block.ffn.down):
                with torch.no_grad():
                    out.weight.mul_(scale)
    own = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    for table in knowing:
        columns, width = table.project.in_features, table.project.out_features
        nn.init.normal_(table.project.weight, std=(columns * width) ** -0.5, generator=own)
        nn.init.normal_(table.absent_D, std=0.02, generator=own)
