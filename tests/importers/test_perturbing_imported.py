"""Genes of cells changed in an imported model, against the published procedure written slowly."""

import numpy as np
import pytest
import torch
from test_genecompass_parity import HUMAN, write_genecompass
from test_genecompass_parity import human as human_gene
from tiny_models import GENES, gene, published_inputs, tokens_of, write_geneformer

import genemodel as gm
from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError
from genemodel.importers.architecture import PRIORS
from genemodel.importers.exporting import source_tokens
from genemodel.importers.importing import import_model
from genemodel.inference.counts import VocabularyCells, window_of
from genemodel.perturbation.passes import How, Perturber
from genemodel.perturbation.variants import vary

pytest.importorskip("transformers")
CONTEXT, N_CELLS = 40, 14


def cells(names, extra=5, seed=0):
    """Cells of two states; some fill the context, some have few genes, some genes are foreign."""
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.3, 2.0, (N_CELLS, len(names) + extra)) * rng.uniform(0.1, 2, (N_CELLS, 1))
    counts = rng.poisson(rate).astype(np.float32)
    counts[:, 0], counts[:, 3] = 30 + np.arange(N_CELLS), 40  # two genes that all cells hold
    obs = pd.DataFrame(
        {"state": ["a", "b"] * (N_CELLS // 2), "species": "human"},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=[*names, *(f"ENSG{900_000 + i:011d}" for i in range(extra))])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture(scope="module")
def geneformers(tmp_path_factory):
    """Bundle, transformers model and medians of both versions."""
    folder, found = tmp_path_factory.mktemp("imported"), {}
    for version in (1, 2):
        bert = write_geneformer(folder / f"v{version}", version)
        bundle = import_model(folder / f"v{version}")
        names = bundle.vocabulary.token_ids()
        median = {name: float(bundle.medians_V[t]) for t, name in enumerate(names)}
        found[version] = bundle, bert, median
    return found


@pytest.fixture(scope="module")
def adata():
    return cells([gene(i) for i in range(GENES)])


def published(bert, sequences, version):
    """Hidden states of the last layer but one (emb_layer=-1), padded to the longest."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    with torch.inference_mode():
        out = bert(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
    hidden = out.hidden_states[-2]
    return [hidden[row, : len(tokens)] for row, tokens in enumerate(sequences)]


def perturbed(tokens, genes, operation, version):
    """The published changes of one sequence; overflow falls off before the closing token."""
    opening, closing = (tokens[:1], tokens[-1:]) if version == 2 else ([], [])
    body = [t for t in (tokens[1:-1] if version == 2 else tokens) if t not in genes]
    if operation == "overexpress":
        body = [*genes, *body][: CONTEXT - len(opening) - len(closing)]
    return [*opening, *body, *closing]


def genes_of(tokens, hidden, version):
    first = 4 if version == 2 else 2
    return {t: hidden[i].double() for i, t in enumerate(tokens) if t >= first}


@pytest.mark.parametrize("operation", ["delete", "overexpress"])
@pytest.mark.parametrize(
    ("version", "mode"), [(1, "cell"), (2, "cell"), (2, "cls"), (1, "cell_and_gene")]
)
def test_shifts_are_those_of_the_published_procedure(geneformers, adata, version, mode, operation):
    bundle, bert, median = geneformers[version]
    sequences = published_inputs(adata, version, median, context=CONTEXT)
    assert max(map(len, sequences)) == CONTEXT > min(map(len, sequences))
    before = published(bert, sequences, version)
    cosine = torch.nn.functional.cosine_similarity

    def vector(tokens, hidden):
        if mode == "cls":
            return hidden[0].double()
        return torch.stack(list(genes_of(tokens, hidden, version).values())).mean(0)

    state = adata.obs["state"].to_numpy()
    goal = torch.stack([
        torch.nn.functional.normalize(vector(t, h), dim=0)
        for t, h, s in zip(sequences, before, state, strict=True) if s == "b"
    ]).mean(0)  # fmt: skip
    token, numbers = tokens_of(version), {f"GENE{i}": gene(i) for i in range(GENES)}
    names = [gene(0), gene(3), f"{gene(5)}+{gene(9)}"]
    result = gm.perturb(
        adata, bundle, genes=names, perturb_type=operation, emb_mode=mode, nulls=0, min_cells=1,
        min_coverage=0.0, min_auc=0.0, state_key="state", start_state="a", goal_state="b",
    )  # fmt: skip
    checked = 0
    for name, own in result.shifts.groupby("Gene_name", observed=True):
        group = [token[numbers.get(part, part)] for part in str(name).split("+")]
        for row in own.itertuples():
            at = adata.obs_names.get_loc(row.cell)
            changed = perturbed(sequences[at], group, operation, version)
            (after,) = published(bert, [changed], version)
            if mode == "cls":
                expected = cosine(before[at][0].double(), after[0].double(), dim=0)
            else:
                old = genes_of(sequences[at], before[at], version)
                new = genes_of(changed, after, version)
                stay = [t for t in new if t in old and t not in group]
                expected = torch.stack([cosine(old[t], new[t], dim=0) for t in stay]).mean()
            assert row.cosine_similarity == pytest.approx(float(expected), abs=1e-5)
            shift = cosine(vector(changed, after), goal, dim=0) - cosine(
                vector(sequences[at], before[at]), goal, dim=0
            )
            assert row.shift_to_b == pytest.approx(float(shift), abs=1e-5)
            assert np.isfinite(row.without_model)
            checked += 1
    assert checked >= (21 if operation == "overexpress" else 10)
    # The published table names genes by its own tokens.
    singles = result.statistics[~result.statistics["Gene"].str.contains("+", regex=False)]
    assert set(singles["Gene"].astype(int)) == {token[gene(0)], token[gene(3)]}


def test_special_tokens_are_no_genes(geneformers, adata):
    bundle = geneformers[2][0]
    result = gm.perturb(
        adata, bundle, emb_mode="cls_and_gene", nulls=0, min_cells=1, min_coverage=0.0
    )
    first = int(np.flatnonzero(source_tokens(bundle) == 4)[0])
    assert first == 4
    assert result.statistics["Gene"].astype(int).min() >= 4
    assert result.gene_shifts["Affected"].min() >= 4
    assert (result.statistics["Ensembl_ID"] != "").all()
    # Each cell loses what it holds, once: the framing is never among it.
    window_length = len(published_inputs(adata, 2, geneformers[2][2], context=CONTEXT)[0]) - 2
    assert (result.shifts["cell"] == "cell0").sum() == window_length


def test_a_model_without_an_opening_token_is_asked_for_the_mean(geneformers, adata):
    with pytest.raises(ConfigError, match="emb_mode=cell"):
        gm.perturb(adata, geneformers[1][0], genes=gene(0), nulls=0)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("operation", ["delete", "inhibit", "activate"])
def test_a_gene_that_is_held_moves_alone(geneformers, adata, version, operation):
    """With the others held, every other token keeps its position."""
    bundle = geneformers[version][0]
    source = VocabularyCells(adata, bundle)
    (chunk,) = source.chunks()
    perturber = Perturber(bundle, How(operation=operation, mode="cell"))
    (batch, rows), *_ = perturber.batches(window_of(chunk), np.arange(N_CELLS))
    token = int(np.flatnonzero([n == gene(0) for n in bundle.vocabulary.token_ids()])[0])
    moves, _ = perturber._moves(batch, rows, [(token,)])
    for held in (False, True):
        found = vary(batch, moves, operation, perturber._inverse_V, tokens=bundle.tokens,
                     held=held)  # fmt: skip
        for w, cell in enumerate(moves.cell_W):
            a, b = batch.starts_C1[cell : cell + 2].tolist()
            old = dict(zip(batch.gene_T[a:b].tolist(), batch.rank_T[a:b].tolist(), strict=True))
            a, b = found.batch.starts_C1[w : w + 2].tolist()
            gene_R, rank_R = found.batch.gene_T[a:b].tolist(), found.batch.rank_T[a:b].tolist()
            if held:
                assert all(old[g] == r for g, r in zip(gene_R, rank_R, strict=True) if g != token)
            else:
                assert rank_R == list(range(len(rank_R)))
            if version == 2:
                assert gene_R[0] == 2 and gene_R[-1] == 3
            if operation == "activate":
                assert gene_R[version - 1] == token
            if operation == "inhibit":
                assert gene_R[-version] == token
            assert (token in gene_R) == (operation != "delete")


@pytest.mark.parametrize("folded", [False, True])
def test_a_genecompass_loses_a_gene_and_its_value(tmp_path, folded):
    write_genecompass(tmp_path / "m", PRIORS)
    bundle = import_model(tmp_path / "m", folded=folded)
    adata = cells([human_gene(i) for i in range(HUMAN)], extra=0, seed=2)
    name = human_gene(0)
    result = gm.perturb(adata, bundle, genes=name, nulls=0, species="human")

    def embedded(of):
        of = of.copy()
        gm.embed(of, bundle, species="human")
        return of.obsm["X_genemodel"].astype(np.float64)

    fewer = adata.copy()
    dense = fewer.X.toarray()
    dense[:, 0] = 0
    fewer.X = type(adata.X)(dense)
    before, after = embedded(adata), embedded(fewer)
    expected = (before * after).sum(1) / np.linalg.norm(before, axis=1)
    expected /= np.linalg.norm(after, axis=1)
    np.testing.assert_allclose(result.shifts["cosine_similarity"], expected, atol=1e-5)
    # Over-expressed, it is read first, with the largest value of the cell; the others keep theirs.
    (chunk,) = VocabularyCells(adata, bundle, InputSettings(species="human")).chunks()
    perturber = Perturber(bundle, How(operation="overexpress"))
    (batch, rows), *_ = perturber.batches(window_of(chunk), np.arange(N_CELLS))
    token = bundle.vocabulary.token_ids().index(name)
    moves, _ = perturber._moves(batch, rows, [(token,)])
    found = vary(batch, moves, "overexpress", perturber._inverse_V, tokens=bundle.tokens).batch
    for w, cell in enumerate(moves.cell_W):
        old, new = (
            {g: (v, r) for g, v, r in zip(
                of.gene_T[a:b].tolist(), of.value_T[a:b].tolist(), of.rank_T[a:b].tolist(),
                strict=True,
            )}
            for of, (a, b) in (
                (batch, batch.starts_C1[cell : cell + 2].tolist()),
                (found, found.starts_C1[w : w + 2].tolist()),
            )
        )  # fmt: skip
        top = max(value for value, _ in old.values())
        assert list(new)[1] == token and new[token][1] == 0
        assert new[token][0] == pytest.approx(top, rel=1e-6)
        assert all(old[g][0] == new[g][0] for g in set(new) & set(old) - {token})
        assert [r for _, r in new.values()] == [0, *range(len(new) - 1)]
