"""Objectives: masks with an address, losses against slow oracles, no leak, trivial predictors."""

import dataclasses

import numpy as np
import pytest
import torch

from genemodel.corpus.statistics import GeneStatistics
from genemodel.errors import ConfigError
from genemodel.genes.vocabulary import MASK, N_SPECIAL
from genemodel.heads.masked_gene import MaskedGeneSettings
from genemodel.heads.masking import choose, uniform
from genemodel.heads.pretraining import PretrainingObjectives, PretrainingSettings
from genemodel.model.gene_model import HIDDEN_VALUE, GeneModel
from genemodel.model.settings import ModelSettings

N_TOKENS = 203


def statistics(seed=0):
    rng = np.random.default_rng(seed)
    frequency = rng.dirichlet(np.ones(N_TOKENS), 2)
    present = np.ones((2, N_TOKENS), bool)
    present[:, :N_SPECIAL] = False
    return GeneStatistics(
        frequency_SV=frequency,
        mean_value_SV=rng.uniform(1, 5, (2, N_TOKENS)),
        rate_SV=rng.dirichlet(np.ones(N_TOKENS), 2),
        dispersion_V=rng.uniform(0.5, 3, N_TOKENS),
        present_SV=present,
    )


def objectives(settings=None, seed=0):
    torch.manual_seed(0)
    measured = torch.ones(1, N_TOKENS, dtype=torch.bool)
    measured[:, :N_SPECIAL] = False
    return PretrainingObjectives(
        settings or PretrainingSettings(), width=32, statistics=statistics(), n_batches=2,
        measured_XV=measured, seed=seed,
    )  # fmt: skip


def backbone():
    torch.manual_seed(0)
    return GeneModel(
        ModelSettings(layers=1, width=32, heads=2, ffn=32),
        n_tokens=N_TOKENS, n_species=2, context=128,
    )  # fmt: skip


def test_uniform_numbers_are_uniform_and_depend_on_the_address_only():
    cell, gene = torch.arange(2000)[:, None], torch.arange(100)[None, :]
    u = uniform(1, 1, 0, cell, gene)
    assert abs(float(u.mean()) - 0.5) < 0.005 and abs(float(u.var()) - 1 / 12) < 0.002
    assert float(u.min()) >= 0 and float(u.max()) < 1
    # Neighbouring addresses are unrelated.
    assert abs(float(torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1])) < 0.01
    assert torch.equal(u[7:9, 3:5], uniform(1, 1, 0, cell[7:9], gene[:, 3:5]))
    for other in ((2, 1, 0), (1, 2, 0), (1, 1, 1)):
        assert (uniform(*other, cell, gene) != u).float().mean() > 0.99


def test_masks_do_not_depend_on_packing(pack_random):
    task = objectives()

    def hidden(cells, budget):
        batch = pack_random(cells=cells, budget=budget)
        prepared = task.prepare(batch)
        found = set()
        for kind, chosen in (("gene", prepared.genes), ("value", prepared.values)):
            at = chosen.index_M[chosen.real_M]
            cell = batch.cell_C[batch.segment_T[at]]
            found |= {(kind, int(c), int(g)) for c, g in zip(cell, batch.gene_T[at], strict=True)}
        return found

    together = hidden([0, 1, 2, 3], 256)
    assert together == hidden([2, 0], 256) | hidden([3, 1], 300)
    assert len(together) > 10


def test_epochs_hide_other_tokens_and_validation_always_the_same(pack_random):
    task, batch = objectives(), pack_random()
    later = dataclasses.replace(batch, epoch=1)
    masks = [task.prepare(b).seen.gene_T for b in (batch, later)]
    assert not torch.equal(*masks)
    fixed = [task.prepare(b, validation=True).seen.gene_T for b in (batch, later)]
    assert torch.equal(*fixed)


def test_hidden_tokens_lose_one_thing_and_special_tokens_nothing(pack_random):
    batch = pack_random()
    prepared = objectives().prepare(batch)
    seen = prepared.seen
    lost_gene = seen.gene_T == MASK
    lost_value = seen.value_T == HIDDEN_VALUE
    assert not (lost_gene & lost_value).any()
    assert int(lost_gene.sum()) == int(prepared.items["masked_gene"]) > 0
    assert int(lost_value.sum()) == int(prepared.items["masked_value"]) > 0
    special = batch.gene_T < N_SPECIAL
    assert torch.equal(seen.gene_T[special], batch.gene_T[special])
    assert torch.equal(seen.value_T[special], batch.value_T[special])
    # What is not hidden is as it was.
    assert torch.equal(seen.gene_T[~lost_gene], batch.gene_T[~lost_gene])
    assert torch.equal(seen.value_T[~lost_value], batch.value_T[~lost_value])


def test_the_number_of_masked_places_is_constant():
    u = torch.rand(1000)
    can = torch.rand(1000) > 0.5
    a, b = choose(u, can, 0.0, 0.15), choose(torch.rand(1000), can, 0.0, 0.15)
    assert a.index_M.shape == b.index_M.shape
    wanted = torch.nonzero(can & (u < 0.15))[:, 0]
    assert torch.equal(a.index_M[a.real_M], wanted[: a.index_M.shape[0]])


def test_a_hidden_value_and_a_hidden_gene_do_not_leak(pack_random):
    """Changing only what is hidden must not change what the model sees or says."""
    task, model = objectives(), backbone().eval()
    batch = pack_random()
    prepared = task.prepare(batch)
    at = prepared.values.index_M[prepared.values.real_M]
    other = dataclasses.replace(batch, value_T=batch.value_T.clone())
    other.value_T[at] += 3.0
    again = task.prepare(other)
    assert torch.equal(again.seen.value_T, prepared.seen.value_T)
    with torch.no_grad():
        assert torch.equal(model(prepared.seen).hidden_TD, model(again.seen).hidden_TD)


def test_every_objective_starts_near_its_trivial_predictor_and_learns(pack_random):
    task, model = objectives(), backbone()
    optimiser = torch.optim.AdamW([*task.parameters(), *model.parameters()], lr=3e-3)
    first = last = None
    for step in range(80):
        batch = dataclasses.replace(pack_random(seed=0), epoch=step)
        prepared = task.prepare(batch)
        parts = task(model, model(prepared.seen), prepared)
        ratio = {n: float(p.total.detach() / p.trivial) for n, p in parts.items()}
        first = first or ratio
        last = ratio
        loss = sum(p.total / p.items for p in parts.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(0.8 < r < 1.25 for r in first.values()), first
    assert all(last[n] < first[n] - 0.03 for n in first), (first, last)


@pytest.mark.parametrize("on_host", [True, False])
def test_chunked_cross_entropy_equals_the_plain_one(monkeypatch, on_host):
    from genemodel.heads import masked_gene
    from genemodel.heads.masked_gene import ChunkedCrossEntropy, MaskedGeneHead

    monkeypatch.setattr(masked_gene, "is_host", lambda _: on_host)
    monkeypatch.setattr(ChunkedCrossEntropy, "BUFFER", 5 * N_TOKENS)  # five rows a chunk
    monkeypatch.setattr(ChunkedCrossEntropy, "ROWS", 5)
    torch.manual_seed(0)
    head = MaskedGeneHead(32, statistics())
    hidden = torch.randn(23, 32, requires_grad=True)
    gene_VD = torch.randn(N_TOKENS, 32, requires_grad=True)
    gene, species = torch.randint(3, N_TOKENS, (23,)), torch.arange(23) % 2
    real = torch.arange(23) < 19
    loss, _ = head(hidden, gene, species, real, gene_VD)
    logits = head.logits(hidden, species, gene_VD)
    plain = (torch.nn.functional.cross_entropy(logits, gene, reduction="none") * real).sum()
    torch.testing.assert_close(loss, plain)
    inputs = (hidden, gene_VD, head.bias_SV, head.dense.weight)
    for got, want in zip(
        torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * plain, inputs), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on_host", [True, False])
def test_chunked_cross_entropy_makes_only_the_gradients_that_are_asked_for(monkeypatch, on_host):
    from genemodel.heads import masked_gene
    from genemodel.heads.masked_gene import MaskedGeneHead

    monkeypatch.setattr(masked_gene, "is_host", lambda _: on_host)
    torch.manual_seed(0)
    head = MaskedGeneHead(32, statistics())
    hidden, gene_VD = torch.randn(23, 32), torch.randn(N_TOKENS, 32, requires_grad=True)
    gene, species = torch.randint(3, N_TOKENS, (23,)), torch.arange(23) % 2
    real = torch.arange(23) < 19
    whole, _ = head(hidden, gene, species, real, gene_VD)
    whole.backward()
    wanted = gene_VD.grad.clone()
    for part in head.parameters():
        part.grad = None
    for frozen in (head.bias_SV, *head.dense.parameters(), *head.norm.parameters()):
        frozen.requires_grad_(False)
    gene_VD.grad = None
    loss, _ = head(hidden, gene, species, real, gene_VD)
    h, table, bias = loss.grad_fn.saved_tensors
    assert h is None and bias is None and table is not None
    loss.backward()
    torch.testing.assert_close(gene_VD.grad, wanted, rtol=0, atol=0)
    assert head.bias_SV.grad is None
    with torch.no_grad():
        looked, _ = head(hidden, gene, species, real, gene_VD)
    assert looked == whole and not looked.requires_grad


def test_the_decoder_knows_the_batch_and_the_cell_vector_does_not(pack_random):
    task, model, batch = objectives().eval(), backbone().eval(), pack_random()
    moved = dataclasses.replace(batch, batch_C=torch.where(batch.batch_C >= 0, 1, -1))
    with torch.no_grad():
        assert torch.equal(model(batch).cell_CD, model(moved).cell_CD)
        torch.nn.init.normal_(task.heads["decode_counts"].batch.weight)
        losses = [
            float(task(model, model(b), task.prepare(b))["decode_counts"].total)
            for b in (batch, moved)
        ]
    assert losses[0] != losses[1]


def test_the_batch_is_hidden_from_its_share_of_cells_in_training_only(pack_random):
    n = 400
    batch = pack_random(lengths=(3,) * n, budget=4 * n + 128, max_cells=n)
    batch = dataclasses.replace(batch, batch_C=torch.where(batch.cell_C >= 0, 1, -1))
    task = objectives()
    share = task.settings.decode_counts.batch_dropout
    assert 0.05 < share < 0.95

    def hidden(batch, **options):
        return task.prepare(batch, **options).truth.batch_C[:n] < 0

    first = hidden(batch)
    assert abs(float(first.float().mean()) - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert not torch.equal(hidden(dataclasses.replace(batch, epoch=1)), first)
    assert not hidden(batch, validation=True).any()
    task.eval()
    assert not hidden(batch).any()


def test_an_unknown_batch_has_no_part_in_the_rates(pack_random):
    head = objectives().heads["decode_counts"]
    torch.nn.init.normal_(head.batch.weight)
    cell, species = torch.randn(1, 32), torch.zeros(1, dtype=torch.long)
    measured = torch.ones(1, N_TOKENS, dtype=torch.bool)

    def rate(code):
        return head.log_rate(cell, species, torch.tensor([code]), torch.ones(1), measured)

    unknown = rate(-1)
    assert not torch.equal(unknown, rate(0)) and not torch.equal(rate(0), rate(1))
    torch.nn.init.zeros_(head.batch.weight)
    torch.testing.assert_close(rate(0), unknown)


def test_places_that_are_padding_cost_nothing(pack_random):
    """The same cells with more room beside them: every objective and trivial predictor the same."""
    task, model = objectives(), backbone()
    torch.nn.init.normal_(task.heads["masked_value"].out.weight)
    found = []
    for budget in (176, 400):
        prepared = task.prepare(pack_random(budget=budget))
        assert any((~chosen.real_M).any() for chosen in (prepared.genes, prepared.values))
        found.append(task(model, model(prepared.seen), prepared))
    for name, part in found[0].items():
        other = found[1][name]
        assert part.items == other.items
        torch.testing.assert_close(part.total, other.total, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(part.trivial, other.trivial, rtol=1e-4, atol=1e-3)


def test_unmeasured_genes_cost_nothing(pack_random):
    task, model, batch = objectives().eval(), backbone().eval(), pack_random()
    head = task.heads["decode_counts"]
    unused = torch.ones(N_TOKENS, dtype=torch.bool)
    unused[batch.full_gene_N] = False
    unused[:N_SPECIAL] = False
    assert unused.any()
    head.measured_XV[:, unused] = False
    with torch.no_grad():
        before = task(model, model(batch), task.prepare(batch))["decode_counts"].total
        head.base_SV[:, unused] += 5.0
        head.log_theta_V[unused] -= 2.0
        after = task(model, model(batch), task.prepare(batch))["decode_counts"].total
    torch.testing.assert_close(before, after)


def test_switched_off_objectives_cost_nothing(pack_random):
    settings = PretrainingSettings(masked_gene=MaskedGeneSettings(weight=0))
    task = objectives(settings)
    assert set(task.weights) == {"masked_value", "decode_counts"}
    prepared = task.prepare(pack_random())
    assert prepared.genes is None and not (prepared.seen.gene_T == MASK).any()


def test_impossible_weights_are_refused():
    with pytest.raises(ConfigError, match="at least one must be positive"):
        dataclasses.replace(
            PretrainingSettings(),
            masked_gene=MaskedGeneSettings(weight=0),
            masked_value=dataclasses.replace(PretrainingSettings().masked_value, weight=0),
            decode_counts=dataclasses.replace(PretrainingSettings().decode_counts, weight=0),
        )
    with pytest.raises(ConfigError, match=r"task\.masked_gene\.fraction is 1\.5"):
        MaskedGeneSettings(fraction=1.5)


def test_molecules_that_are_not_shown_are_decoded(pack_random):
    """With a view the decoder's target is what is left, at the library of what is left."""
    task, model = objectives(), backbone()
    batch = pack_random()
    shown = (batch.full_count_N / 2).floor()
    thinned = dataclasses.replace(batch, shown_count_N=shown)
    others = dataclasses.replace(
        batch, full_count_N=batch.full_count_N - shown,
        library_C=batch.library_C.index_put(
            (torch.arange(batch.n_cells),), batch.per_cell(batch.full_count_N - shown)
        ),
    )  # fmt: skip
    encoded = model(batch)

    def cost(batch):
        return task(model, encoded, task.prepare(batch))["decode_counts"].total

    torch.testing.assert_close(cost(thinned), cost(others))
    assert (cost(thinned) - cost(batch)).abs() > 1


def test_every_head_keeps_to_the_one_contract(away):
    """Whoever adds a head adds no case: nothing here asks what a head is."""
    import ast
    import inspect

    from genemodel.heads import pretraining

    tree = ast.parse(inspect.getsource(pretraining))
    called = [node.func.id for node in ast.walk(tree)
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]  # fmt: skip
    assert "isinstance" not in called
    _, task = away()
    for name, head in task.parts.items():
        assert head is task.heads[name] and isinstance(head.starts_anew, bool)
        assert all(callable(getattr(head, one)) for one in ("count", "cost", "compile_region"))
