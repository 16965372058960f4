"""Variants made by index are the cells that the tokeniser would make of changed counts."""

import numpy as np
import pytest
import torch

from genemodel.batches.loader import pack
from genemodel.batches.tokens import TokenSettings
from genemodel.batches.window import Window
from genemodel.genes.vocabulary import CELL, N_SPECIAL
from genemodel.perturbation.variants import OPERATIONS, Moves, goal_places, vary

N_TOKENS, CONTEXT = 150, 64
TOKENS = TokenSettings(context=CONTEXT, budget=64 * 16)
RNG = np.random.default_rng(3)
INVERSE_V = (1 / np.random.default_rng(1).uniform(0.5, 3.0, N_TOKENS)).astype(np.float32)


def cells(lengths=(30, 5, 63, 12), seed=0):
    """Cells as {token: count}; the third fills the context."""
    rng = np.random.default_rng(seed)
    return [
        dict(zip(
            np.sort(rng.choice(np.arange(N_SPECIAL, N_TOKENS), n, replace=False)).tolist(),
            rng.geometric(0.2, n).astype(float).tolist(), strict=True,
        ))
        for n in lengths
    ]  # fmt: skip


def packed(cells):
    gene_N = np.concatenate([np.array(sorted(c), np.int32) for c in cells])
    count_N = np.concatenate([[c[g] for g in sorted(c)] for c in cells]).astype(np.float32)
    end_C = np.cumsum([len(c) for c in cells])
    begin_C = np.concatenate([[0], end_C[:-1]])
    n = len(cells)
    window = Window(
        begin_C=begin_C, end_C=end_C, gene_N=gene_N, count_N=count_N,
        library_C=np.add.reduceat(count_N, begin_C), species_C=np.arange(n) % 2,
        batch_C=np.full(n, -1), panel_C=np.full(n, -1), cell_C=np.arange(n),
    )  # fmt: skip
    return pack(window, np.arange(n), INVERSE_V, TOKENS)


def tokens(batch, c):
    a, b = int(batch.starts_C1[c]), int(batch.starts_C1[c + 1])
    return batch.gene_T[a:b].tolist(), batch.rank_T[a:b].tolist(), batch.value_T[a:b].numpy()


def place(base, c, gene):
    found = tokens(base, c)[0]
    return found.index(gene) if gene in found else 0


def moves_of(base, groups):
    """``groups``: (cell, genes) of every variant."""
    flat = [(w, c, g) for w, (c, genes) in enumerate(groups) for g in genes]
    return Moves(
        np.array([c for c, _ in groups]),
        np.array([w for w, _, _ in flat]),
        np.array([g for _, _, g in flat]),
        np.array([place(base, c, g) for _, c, g in flat]),
    )


def make(base, groups, operation, **how):
    return vary(
        base, moves_of(base, groups), operation, torch.from_numpy(INVERSE_V), tokens=TOKENS, **how
    )


def some_groups(base, absent=False):
    groups = []
    for c in range(4):
        inside = tokens(base, c)[0][1:]
        outside = sorted(set(range(N_SPECIAL, N_TOKENS)) - set(inside))
        for k in (1, 1, 1, 3):
            genes = RNG.permutation(inside)[:k].tolist()
            groups.append((c, [outside[k], *genes] if absent else genes))
    return groups


def test_deletion_is_the_cell_without_the_gene_counted_again():
    base, raw = packed(cells()), cells()
    groups = some_groups(base, absent=True)  # a gene that is not there changes nothing
    found = make(base, groups, "delete").batch
    again = packed([{g: n for g, n in raw[c].items() if g not in genes} for c, genes in groups])
    assert found.n_cells == len(groups)
    for w in range(len(groups)):
        gene, rank, value = tokens(found, w)
        gene_2, rank_2, value_2 = tokens(again, w)
        assert gene == gene_2 and rank == rank_2
        np.testing.assert_allclose(value, value_2, rtol=1e-5)
    n = len(groups)
    np.testing.assert_allclose(found.library_C, again.library_C[:n], rtol=1e-6)
    assert found.length_C.tolist() == again.length_C.tolist() == found.starts_C1.diff().tolist()
    assert found.longest == int(found.starts_C1.diff().max())
    assert found.species_C.tolist() == [c % 2 for c, _ in groups]


def test_what_is_held_keeps_rank_value_and_library_to_the_bit():
    base = packed(cells())
    groups = some_groups(base)
    found = make(base, groups, "delete", held=True).batch
    for w, (c, genes) in enumerate(groups):
        gene, rank, value = tokens(base, c)
        keep = np.array([g not in genes for g in gene])
        gene_2, rank_2, value_2 = tokens(found, w)
        assert gene_2 == np.array(gene)[keep].tolist()
        assert rank_2 == np.array(rank)[keep].tolist()
        assert np.array_equal(value_2, value[keep])
        assert found.library_C[w] == base.library_C[c]


def test_overexpression_puts_the_genes_first_and_a_full_cell_loses_its_last():
    base = packed(cells())
    groups = some_groups(base, absent=True)
    found = make(base, groups, "overexpress")
    for w, (c, genes) in enumerate(groups):
        before = tokens(base, c)[0]
        gene, rank, value = tokens(found.batch, w)
        rest = [g for g in before[1:] if g not in genes]
        assert gene == [CELL, *genes, *rest][:CONTEXT]
        assert rank == list(range(len(gene)))
        # As much over its median as the cell's largest was: no gene is above it.
        ratio = np.expm1(value[1:]) * INVERSE_V[gene[1:]]
        np.testing.assert_allclose(ratio[: len(genes)], ratio.max(), rtol=1e-4)
    moved = found.moved_R[: len(found.source_R)]
    assert bool((found.source_R[~moved] >= 0).all()) and int((found.source_R < 0).sum()) == 16


@pytest.mark.parametrize("operation", ["activate", "inhibit"])
@pytest.mark.parametrize("quartiles", [None, 1, 2, 3])
def test_a_moved_gene_stands_where_it_was_sent_with_the_value_of_that_place(operation, quartiles):
    base = packed(cells())
    groups = [(c, [g]) for c in range(4) for g in tokens(base, c)[0][1:]]
    found = make(base, groups, operation, quartiles=quartiles)
    for w, (c, (g,)) in enumerate(groups):
        before, _, old = tokens(base, c)
        gene, _, value = tokens(found.batch, w)
        n, at = len(before) - 1, before.index(g)
        goal = int(goal_places(operation, np.array([at]), np.array([n]), quartiles)[0])
        assert gene.index(g) == goal
        assert [x for x in gene if x != g] == [x for x in before if x != g]
        ratio = np.expm1(old[goal]) * INVERSE_V[before[goal]]
        count = np.expm1(old) * float(base.library_C[c]) / 1e4
        count[at] = ratio / INVERSE_V[g] * float(base.library_C[c]) / 1e4
        expected = np.log1p(count[at] / count[1:].sum() * 1e4)
        if c != 2:  # the full cell's library is of genes beyond its context too
            np.testing.assert_allclose(value[goal], expected, rtol=1e-4)


def test_quartiles_are_those_of_the_published_perturber():
    place_M, genes_M = np.array([100, 75, 40, 10]), np.full(4, 100)
    assert goal_places("activate", place_M, genes_M, 1).tolist() == [63, 38, 13, 1]
    assert goal_places("inhibit", place_M, genes_M, 1).tolist() == [100, 88, 63, 38]
    assert goal_places("activate", place_M, genes_M, None).tolist() == [1] * 4


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_variant_does_not_depend_on_those_beside_it(operation):
    base = packed(cells())
    groups = some_groups(base)
    moves = moves_of(base, groups)
    whole = make(base, groups, operation)
    parts = [
        vary(base, moves.take(a, b), operation, torch.from_numpy(INVERSE_V), tokens=TOKENS)
        for a, b in ((0, 3), (3, 4), (4, 16))
    ]
    for name in ("gene_T", "value_T", "rank_T"):
        joined = torch.cat([getattr(part.batch, name) for part in parts])
        assert torch.equal(getattr(whole.batch, name), joined)
