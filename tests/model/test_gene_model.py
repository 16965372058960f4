"""The backbone: what may not change a cell's result, what every switch does, what it costs."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genemodel.errors import ConfigError
from genemodel.model import gene_model
from genemodel.model.flops import encoder_flops, gene_head_flops
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings

SMALL = ModelSettings(layers=2, width=32, heads=4, ffn=48, components=6)


def build(settings=SMALL, seed=0, **options):
    torch.manual_seed(seed)
    return GeneModel(settings, n_tokens=203, n_species=2, context=128, **options).eval()


VARIANTS = [
    {},
    {
        "norm": "post",
        "activation": "relu",
        "position": "rank",
        "bias": True,
        "values": False,
        "components": 0,
    },
    {"activation": "swiglu", "embedding_norm": True},
]


@pytest.mark.parametrize("change", VARIANTS)
def test_a_cell_does_not_depend_on_its_company_order_or_budget(pack_random, change):
    model = build(dataclasses.replace(SMALL, **change))
    with torch.no_grad():
        together = model(pack_random()).cell_CD
        shuffled = model(pack_random(cells=[3, 1, 0, 2], budget=400)).cell_CD
        alone = [model(pack_random(cells=[c], budget=128)).cell_CD[0] for c in range(4)]
    for c in range(4):
        torch.testing.assert_close(alone[c], together[c], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled[:4], together[[3, 1, 0, 2]], rtol=1e-4, atol=1e-5)


def test_sums_within_cells_are_on_a_gpu_what_they_are_on_a_host(pack_random, monkeypatch):
    """The way of a GPU, taken on a CPU: products with the cells' indicators."""
    components, batch = build().embedding.components, pack_random()
    with torch.no_grad():
        host = components(batch)
        monkeypatch.setattr(gene_model, "is_host", lambda device: False)
        there = components(batch)
    torch.testing.assert_close(there, host, rtol=1e-4, atol=1e-5)


def test_a_set_model_ignores_the_order_of_genes_and_a_ranked_one_does_not(pack_random):
    batch = pack_random()
    a, b = int(batch.starts_C1[0]) + 1, int(batch.starts_C1[1])
    turned = dataclasses.replace(batch, gene_T=batch.gene_T.clone(), value_T=batch.value_T.clone())
    turned.gene_T[a:b] = batch.gene_T[a:b].flip(0)
    turned.value_T[a:b] = batch.value_T[a:b].flip(0)
    with torch.no_grad():
        model = build()
        torch.testing.assert_close(
            model(batch).cell_CD[0], model(turned).cell_CD[0], rtol=1e-4, atol=1e-5
        )
        ranked = build(dataclasses.replace(SMALL, position="rank"))
        assert (ranked(batch).cell_CD[0] - ranked(turned).cell_CD[0]).abs().max() > 1e-3


@pytest.mark.parametrize("field", ["gene_T", "value_T", "species_C", "library_C"])
def test_every_input_matters(pack_random, field):
    batch, model = pack_random(), build()
    changed = getattr(batch, field).clone()
    at = 1 if field.endswith("T") else 0  # a gene of the first cell, or the first cell
    changed[at] = {"gene_T": 100, "value_T": 9.0, "species_C": 1, "library_C": 9e4}[field]
    with torch.no_grad():
        before = model(batch).cell_CD
        after = model(dataclasses.replace(batch, **{field: changed})).cell_CD
    assert (before[0] - after[0]).abs().max() > 1e-4
    torch.testing.assert_close(before[1:4], after[1:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field", ["species_C", "library_C", "batch_C"])
def test_the_cell_has_its_species_and_depth_from_vectors_of_their_own(pack_random, field):
    """Without components, which know the species as well; the batch is not seen at all."""
    batch, model = pack_random(), build(dataclasses.replace(SMALL, components=0))
    changed = getattr(batch, field).clone()
    changed[0] = {"species_C": 1 - changed[0], "library_C": 9e4, "batch_C": 1}[field]
    with torch.no_grad():
        before = model(batch).cell_CD
        after = model(dataclasses.replace(batch, **{field: changed})).cell_CD
    moved = (before[0] - after[0]).abs().max()
    assert moved == 0 if field == "batch_C" else moved > 1e-3
    torch.testing.assert_close(before[1:4], after[1:4], rtol=1e-5, atol=1e-6)


def test_knowledge_changes_no_other_weight_and_begins_as_large_as_a_gene(pack_random):
    """So that runs with and without it, and the heads made after it, begin alike."""
    made, after = {}, {}
    for names in ((), ("family",)):
        torch.manual_seed(3)
        table = {name: (torch.randn(203, 40), torch.ones(203, dtype=torch.bool)) for name in names}
        torch.manual_seed(3)
        model = build(dataclasses.replace(SMALL, knowledge=names), knowledge=table)
        made[names], after[names] = model, torch.rand(3)
    assert torch.equal(after[()], after["family",])
    state = made["family",].state_dict()
    for name, tensor in made[()].state_dict().items():
        assert torch.equal(tensor, state[name]), name
    embedding = made["family",].embedding
    added = embedding.knowledge["family"](torch.arange(203))
    assert added.std().item() == pytest.approx(embedding.token.weight.std().item(), rel=0.2)


def test_knowledge_enters_and_absent_genes_share_a_vector(pack_random):
    settings = dataclasses.replace(SMALL, knowledge=("family",))
    present = torch.zeros(203, dtype=torch.bool)
    present[3:100] = True
    model = build(settings, knowledge={"family": (torch.randn(203, 5), present)})
    vectors = model.embedding.knowledge["family"](torch.arange(203))
    assert vectors[100:].unique(dim=0).shape[0] == 1
    assert vectors[3:100].unique(dim=0).shape[0] == 97
    with torch.no_grad():
        before = model(pack_random()).cell_CD[0]
        model.embedding.knowledge["family"].table_VP[3:100] *= 2
        assert (model(pack_random()).cell_CD[0] - before).abs().max() > 1e-4


def test_components_are_linear_in_visible_values_only(pack_random):
    model, batch = build(), pack_random()
    part = model.embedding.components
    part.start_at(torch.randn(203, 4), torch.randn(2, 4))
    value = torch.where(batch.gene_T >= 3, batch.value_T, 0.0)
    expected = part.offset(batch.species_C)
    for t in range(256):
        expected[batch.segment_T[t]] += part.loading.weight[batch.gene_T[t]] * value[t]
    torch.testing.assert_close(part(batch), part.project(expected), rtol=1e-4, atol=1e-4)
    hidden = dataclasses.replace(batch, value_T=batch.value_T.clone())
    hidden.value_T[5] = -1.0
    gone = dataclasses.replace(batch, value_T=batch.value_T.clone())
    gone.value_T[5] = 0.0
    torch.testing.assert_close(part(hidden), part(gone))


def test_stopping_early_runs_fewer_blocks(pack_random):
    model = build()
    with torch.no_grad():
        early = model(pack_random(), layer=1).hidden_TD
        expected = model.blocks[0](model.embedding(pack_random()), pack_random().starts_C1, 256)
    torch.testing.assert_close(early, expected)


@pytest.mark.parametrize("change", VARIANTS)
def test_flops_equal_torchs_counter(pack_random, change):
    settings = dataclasses.replace(SMALL, **change)
    model, batch = build(settings), pack_random(lengths=(60, 60, 60, 72), budget=256)
    # Exactly full: no dummy tail whose attention the useful count leaves out.
    assert batch.n_tokens == 256
    x_TD = model.embedding(batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for block in model.blocks:
            x_TD = block(x_TD, batch.starts_C1, 256)
    assert counter.get_total_flops() == encoder_flops(settings, batch.lengths_C())


def test_gene_head_flops_equal_torchs_counter():
    from genemodel.corpus.statistics import GeneStatistics
    from genemodel.heads.masked_gene import MaskedGeneHead

    head = MaskedGeneHead(32, GeneStatistics.empty(2, 203))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head.logits(torch.randn(17, 32), torch.zeros(17, dtype=torch.long), torch.randn(203, 32))
    assert counter.get_total_flops() == gene_head_flops(SMALL, 17, 203)


def test_compiling_gives_one_graph_for_all_batches(pack_random):
    model = build()
    batches = [pack_random(seed, lengths=(30, 50, 9 + seed, 70)) for seed in range(4)]
    with torch.no_grad():
        eager = [model(b).cell_CD for b in batches]
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, expected in zip(batches, eager, strict=True):
            torch.testing.assert_close(model(batch).cell_CD, expected, rtol=1e-4, atol=1e-5)


def test_the_stream_keeps_its_size_with_depth(pack_random):
    """The residual stream's size stays of one order from 2 to 16 layers at the start."""
    size = []
    for layers in (2, 16):
        model = build(dataclasses.replace(SMALL, layers=layers))
        with torch.no_grad():
            size.append(float(model(pack_random(), layer=layers - 1).hidden_TD.std()))
    assert size[1] < 3 * size[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 5}, "width 32 does not divide by model.heads 5"),
        ({"layers": 0}, "model.layers is 0"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(SMALL, **change)


def test_named_sizes_have_the_promised_shape(repository):
    from genemodel.command.config_files import values_of
    from genemodel.settings import parse

    shapes = {"small": (6, 256), "base": (12, 768), "large": (18, 1152)}
    for name, (layers, width) in shapes.items():
        values = values_of(repository / "configs" / "model" / f"{name}.yaml")
        settings = parse(ModelSettings, values)
        assert (settings.layers, settings.width) == (layers, width)
        assert np.isclose(settings.head_width, 64)
