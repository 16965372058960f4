"""In-silico deletion against a transcription of the published procedure, in one run.

Published (Geneformer V2's perturber with a list of genes, cell vectors of ``<cls>``, emb_layer=-1):
one gene at a time; of the cells that hold it, the longest first, every batch is padded to its
longest, and a ``BertForMaskedLM`` with all hidden states and logits runs over the cells as they are
and once more without the gene; read is the last layer but one. Here the same model as a bundle, as
``genemodel import`` makes it: packed, and no layer above the one that is read, of which the rows of
``<cls>`` alone. Both sides have the same weights and give the same cosines.
"""

import time

import numpy as np
import torch
from bench import line
from torch import nn

# Geneformer V2: 12 × 768 is the 104M model; `small` has its vocabulary, context and form.
SHAPES = {
    "small": {"layers": 6, "width": 128, "heads": 4, "ffn": 512},
    "v2": {"layers": 12, "width": 768, "heads": 12, "ffn": 3072},
}
N_TOKENS, CONTEXT, PAD = 20_275, 4096, 0


def _models(shape: dict[str, int]) -> tuple[object, nn.Module]:
    """Make a bundle and a BERT of equal weights."""
    from transformers import BertConfig, BertForMaskedLM

    from genemodel.batches.tokens import TokenSettings
    from genemodel.bundle.bundle import Bundle
    from genemodel.model.gene_model import GeneModel
    from genemodel.model.settings import ModelSettings

    torch.manual_seed(0)
    settings = ModelSettings(
        **shape, norm="post", activation="relu", position="rank", max_rank=CONTEXT - 1, bias=True,
        values=False, components=0, embedding_norm=True, norm_eps=1e-12, hosts="geneformer_v2",
        cell="genes", cell_layer=1,
    )  # fmt: skip
    model = GeneModel(settings, n_tokens=N_TOKENS, n_species=1, context=CONTEXT).eval()
    config = BertConfig(
        vocab_size=N_TOKENS, hidden_size=shape["width"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], intermediate_size=shape["ffn"], hidden_act="relu",
        max_position_embeddings=CONTEXT, pad_token_id=PAD,
    )  # fmt: skip
    bert = BertForMaskedLM(config).eval()
    own, theirs = model.embedding, bert.bert.embeddings
    with torch.no_grad():
        theirs.word_embeddings.weight.copy_(own.token.weight)
        theirs.position_embeddings.weight.copy_(own.rank.weight)
        theirs.token_type_embeddings.weight.copy_(own.kind.weight)
        theirs.LayerNorm.load_state_dict(own.norm.state_dict())
        for block, layer in zip(model.blocks, bert.bert.encoder.layer, strict=True):
            parts = (
                layer.attention.self.query,
                layer.attention.self.key,
                layer.attention.self.value,
            )
            for part, weight, bias in zip(
                parts, block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            layer.attention.output.dense.load_state_dict(block.out.state_dict())
            layer.attention.output.LayerNorm.load_state_dict(block.norm1.state_dict())
            layer.intermediate.dense.load_state_dict(block.ffn.up.state_dict())
            layer.output.dense.load_state_dict(block.ffn.down.state_dict())
            layer.output.LayerNorm.load_state_dict(block.norm2.state_dict())

    class Vocabulary:
        """As much of a vocabulary as the passes read."""

        def __len__(self) -> int:
            return N_TOKENS

    bundle = Bundle(
        model,
        Vocabulary(),
        TokenSettings(context=CONTEXT, style="geneformer_v2"),
        np.ones(N_TOKENS, np.float32),
    )
    return bundle, bert


def _published(bert: nn.Module, cells: list[list[int]], gene: int, batch: int) -> dict[int, float]:
    """Delete one gene as the published perturber does; cosine of every cell that holds it."""

    def first(sequences: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), PAD)
        for row, tokens in enumerate(sequences):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        out = bert(input_ids=ids, attention_mask=(ids != PAD).long(), output_hidden_states=True)
        return out.hidden_states[-2][:, 0]

    found: dict[int, float] = {}
    rows = sorted(
        (c for c, tokens in enumerate(cells) if gene in tokens), key=lambda c: -len(cells[c])
    )
    with torch.inference_mode():
        for at in range(0, len(rows), batch):
            here = rows[at : at + batch]
            before = first([cells[c] for c in here])
            after = first([[t for t in cells[c] if t != gene] for c in here])
            cosine = torch.cosine_similarity(before, after, dim=1)
            found |= dict(zip(here, cosine.tolist(), strict=True))
    return found


def bench_perturb(size: str, n_cells: int, n_genes: int, batch: int) -> None:
    """Time both on the same cells and genes."""
    from genemodel.batches.window import Window
    from genemodel.perturbation.passes import How, Perturber

    shape = SHAPES[size]
    bundle, bert = _models(shape)
    rng = np.random.default_rng(0)
    # As many genes as droplet cells have: 400 to 2,000, some more.
    length = rng.lognormal(6.7, 0.5, n_cells).clip(200, CONTEXT - 2).astype(int)
    always = rng.choice(np.arange(4, N_TOKENS), n_genes, replace=False)
    others = np.setdiff1d(np.arange(4, N_TOKENS), always)
    rows = [
        np.sort(np.concatenate([always, rng.choice(others, n - n_genes, replace=False)]))
        for n in length
    ]
    end_C = np.cumsum(length)
    count_N = rng.geometric(0.3, int(end_C[-1])).astype(np.float32)
    unknown = np.full(n_cells, -1)
    window = Window(
        begin_C=end_C - length, end_C=end_C, gene_N=np.concatenate(rows).astype(np.int32),
        count_N=count_N, library_C=np.add.reduceat(count_N, end_C - length),
        species_C=np.zeros(n_cells, np.int64), batch_C=unknown, panel_C=unknown,
        cell_C=np.arange(n_cells),
    )  # fmt: skip
    cells: list[list[int]] = [[] for _ in range(n_cells)]
    perturber = Perturber(bundle, How(held=False))
    for packed, here in perturber.batches(window, np.arange(n_cells)):
        for c, row in enumerate(here):
            a, b = int(packed.starts_C1[c]), int(packed.starts_C1[c + 1])
            cells[int(row)] = packed.gene_T[a:b].tolist()
    print(
        f"deletion, {size} ({shape['layers']}×{shape['width']}, vocabulary {N_TOKENS:,}), "
        f"{n_cells} cells of {length.mean():.0f} genes, {n_genes} genes, batches of {batch}, "
        f"{torch.get_num_threads()} CPU threads"
    )
    nothing = np.empty((0, shape["width"]), np.float32)
    tokens_P = [(int(gene),) for gene in always]
    perturber.shifts(window, np.arange(1), tokens_P[:1], nothing)  # what is compiled at first use
    _published(bert, cells[:1], int(always[0]), batch)
    begin, busy = time.perf_counter(), time.process_time()
    ours = perturber.shifts(window, np.arange(n_cells), tokens_P, nothing)
    middle, busy_middle = time.perf_counter(), time.process_time()
    theirs = [_published(bert, cells, int(gene), batch) for gene in always]
    end, busy_end = time.perf_counter(), time.process_time()
    worst = max(
        abs(theirs[p][int(c)] - float(cosine))
        for c, p, cosine in zip(ours.cell_W, ours.perturbation_W, ours.cosine_W, strict=True)
    )
    n = len(ours)
    line("published, padded, a gene at a time", f"{n / (end - middle):,.2f} variants/s")
    line("genemodel, packed", f"{n / (middle - begin):,.2f} variants/s", f"{n} variants")
    line("ratio", f"{(end - middle) / (middle - begin):.1f}×", f"largest difference {worst:.1e}")
    line("ratio of the cores' time", f"{(busy_end - busy_middle) / (busy_middle - busy):.1f}×")
