"""Settings of the architecture; four named sizes live in ``configs/model``."""

from dataclasses import dataclass
from typing import Literal

from genemodel.batches.tokens import Style
from genemodel.errors import ConfigError
from genemodel.settings import PathText


@dataclass(frozen=True)
class ModelSettings:
    """Shape of the encoder.

    Attributes
    ----------
    layers, width, heads, ffn
        Blocks, width of a token (D), attention heads, hidden width of the feed-forward part.
    norm
        ``pre`` normalises before attention and feed-forward and once at the end; ``post`` after
        each addition, as BERT does (needed to host imported checkpoints).
    activation
        Of the feed-forward part: ``relu``, ``gelu`` or ``swiglu`` (gated, three matrices).
    position
        ``none``: a cell is a set of genes. ``rank``: a learned vector per rank, as Geneformer has.
    max_rank
        Ranks with a vector of their own when ``position`` is ``rank``.
    bias
        Biases in attention and feed-forward.
    values
        Embed the expression value of every token; off for models that know ranks only.
    components
        Linear expression components added to the cell token, started at the corpus's principal
        components; 0 for none. Needs ``values``.
    embedding_norm
        Normalise the sum of the embeddings before the first block (BERT does).
    dropout
        On the outputs of attention and feed-forward, in training.
    norm_eps
        Added to the variance in every layer norm.
    residual
        Number format of the stream between the blocks under mixed precision: ``float32`` (exact
        sums), or ``bfloat16`` (half the memory traffic, rounded at every block). Full-precision
        runs keep float32 whatever it says.
    knowledge
        Gene knowledge tables (names of tables in ``knowledge_dir``, or files: gene id, then
        numbers) projected and added to the gene embedding; a gene missing from a table gets a
        learned vector instead.
    hosts
        ``native``, or the published model whose embedding stands in for ours, as an imported bundle
        has it: ``geneformer_v1``, ``geneformer_v2`` or ``genecompass``.
    cell
        What a cell's vector is: the state of its ``opening`` token, or the mean over its ``genes``,
        no special tokens among them.
    cell_layer
        Blocks below the last one at whose output that is taken: 0 the last, 1 the one before it
        (Geneformer's convention).
    """

    layers: int = 2
    width: int = 128
    heads: int = 4
    ffn: int = 256
    norm: Literal["pre", "post"] = "pre"
    activation: Literal["relu", "gelu", "swiglu"] = "gelu"
    position: Literal["none", "rank"] = "none"
    max_rank: int = 2048
    bias: bool = False
    values: bool = True
    components: int = 50
    embedding_norm: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-5
    residual: Literal["float32", "bfloat16"] = "float32"
    knowledge: tuple[PathText, ...] = ()
    hosts: Style = "native"
    cell: Literal["opening", "genes"] = "opening"
    cell_layer: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "ffn", "max_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.width % self.heads:
            raise ConfigError(
                f"model.width {self.width} does not divide by model.heads {self.heads}: choose "
                f"heads among the divisors of {self.width}."
            )
        if self.norm_eps <= 0:
            raise ConfigError(f"model.norm_eps is {self.norm_eps}: it must be positive.")
        if self.components < 0 or (self.components and not self.values):
            raise ConfigError(
                f"model.components is {self.components} and model.values is {self.values}: the "
                "components are sums of values. Set model.components=0, or model.values=true."
            )
        if not 0 <= self.cell_layer < self.layers:
            raise ConfigError(
                f"model.cell_layer is {self.cell_layer}, but the model has {self.layers} blocks: "
                f"set it from 0 (the last) to {self.layers - 1}."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout is {self.dropout}: it must be in [0, 1).")

    @property
    def head_width(self) -> int:
        """Width of one attention head (K)."""
        return self.width // self.heads
