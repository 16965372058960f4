"""An imported GeneCompass against a slow transcription of its published equations."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import write_json

import genemodel as gm
from genemodel.batches.loader import pack, rank_scale
from genemodel.bundle.bundle import Bundle
from genemodel.errors import DataError
from genemodel.heads.published import PublishedGeneHead, PublishedValueHead
from genemodel.importers.architecture import PRIORS
from genemodel.importers.importing import import_model
from genemodel.inference.counts import VocabularyCells, window_of

HUMAN, MOUSE, SHARED = 60, 55, 35  # genes; so many mouse genes are homologs of human ones
WIDTH, HEADS, FFN, LAYERS, POSITIONS, PRIOR = 16, 2, 24, 2, 30, 12
N = 2 + HUMAN + MOUSE


def human(i):
    return f"ENSG{i + 1:011d}"


def mouse(i):
    return f"ENSMUSG{i + 1:011d}"


def tokens():
    names = ["<pad>", "<mask>", *map(human, range(HUMAN)), *map(mouse, range(MOUSE))]
    return {name: i for i, name in enumerate(names)}


def homolog_index():
    """For a human token that of its homolog; the homologs are not in the order of the genes."""
    index = torch.arange(N)
    order = np.random.default_rng(5).permutation(MOUSE)[:SHARED]
    for i, j in enumerate(order):
        index[2 + 3 + i] = 2 + HUMAN + int(j)
    return index


def random_weights(priors, values=True, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.3 * torch.randn(*shape, generator=draw)

    def linear(name, rows, columns):
        return {f"{name}.weight": normal(rows, columns), f"{name}.bias": normal(rows)}

    def norm(name):
        return {f"{name}.weight": 1 + normal(WIDTH), f"{name}.bias": normal(WIDTH)}

    emb = "bert.embeddings"
    w = {
        f"{emb}.word_embeddings.weight": normal(N, WIDTH),
        f"{emb}.position_embeddings.weight": normal(POSITIONS, WIDTH),
        f"{emb}.token_type_embeddings.weight": normal(2, WIDTH),
        **norm(f"{emb}.LayerNorm"),
        f"{emb}.position_ids": torch.arange(POSITIONS)[None],
        f"{emb}.homologous_index": homolog_index(),
        **linear(f"{emb}.concat_embeddings.cat_fc", WIDTH, WIDTH * (1 + len(priors)) + values),
        **norm(f"{emb}.concat_embeddings.cat_ln"),
        **linear(f"{emb}.concat_embeddings.cat_proj", WIDTH, WIDTH),
        "bert.cls_embedding.weight": normal(2, WIDTH),
        "emb_warmup.alpha": torch.tensor(0.75),
        "emb_warmup.steps": torch.tensor(1234),
    }
    for name in priors:
        w[f"{emb}.{name}_knowledge"] = normal(N, PRIOR)
        w |= linear(f"{emb}.{name}_embeddings.linear1", WIDTH, PRIOR)
    for i in range(LAYERS):
        own = f"bert.encoder.layer.{i}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value"):
            w |= linear(f"{own}.{part}", WIDTH, WIDTH)
        w |= linear(f"{own}.attention.output.dense", WIDTH, WIDTH)
        w |= norm(f"{own}.attention.output.LayerNorm")
        w |= linear(f"{own}.intermediate.dense", FFN, WIDTH)
        w |= linear(f"{own}.output.dense", WIDTH, FFN)
        w |= norm(f"{own}.output.LayerNorm")
    for own, rows in (("cls", N), ("cls4value", 1)):
        w |= linear(f"{own}.predictions.transform.dense", WIDTH, WIDTH)
        w |= norm(f"{own}.predictions.transform.LayerNorm")
        w[f"{own}.predictions.bias"] = normal(rows)
        w[f"{own}.predictions.decoder.bias"] = w[f"{own}.predictions.bias"]
    w["cls.predictions.decoder.weight"] = w[f"{emb}.word_embeddings.weight"]
    w["cls4value.predictions.decoder.weight"] = normal(1, WIDTH)
    return w


def write_genecompass(folder, priors, values=True):
    folder.mkdir()
    w = random_weights(priors, values)
    torch.save(w, folder / "pytorch_model.bin")
    config = {"num_attention_heads": HEADS, "hidden_act": "gelu", "vocab_size": N}
    write_json(folder / "config.json", {**config, "hidden_dropout_prob": 0.02})
    known = folder.parent / "prior_knowledge"
    known.mkdir(exist_ok=True)
    (known / "human_mouse_tokens.pickle").write_bytes(pickle.dumps(tokens(), protocol=4))
    rng = np.random.default_rng(1)
    median = {name: float(rng.uniform(0.4, 5)) for name in tokens() if name.startswith("ENS")}
    del median[human(7)]  # without a median it is 1
    (known / "human_gene_median_after_filter.pickle").write_bytes(pickle.dumps(median))
    return w, median


def norm(w, name, x, eps):
    return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def slow(w, ids, value, species, priors, values=True):
    """Hidden states of one cell, gene by gene and head by head; logits and values of its genes."""
    emb = "bert.embeddings"
    index = w[f"{emb}.homologous_index"]
    rows = [w["bert.cls_embedding.weight"][species]]
    for rank, (token, v) in enumerate(zip(ids, value, strict=True)):
        j = int(index[token]) if species else token
        u = [w[f"{emb}.word_embeddings.weight"][token]]
        if values:
            u.append(torch.tensor([v]))
        for name in priors:
            known = w[f"{emb}.{name}_knowledge"][j]
            u.append(w["emb_warmup.alpha"] * linear(w, f"{emb}.{name}_embeddings.linear1", known))
        z = norm(w, f"{emb}.concat_embeddings.cat_ln",
                 linear(w, f"{emb}.concat_embeddings.cat_fc", torch.cat(u)), 1e-5)  # fmt: skip
        z = linear(w, f"{emb}.concat_embeddings.cat_proj", z * torch.sigmoid(1.702 * z))
        z = z + w[f"{emb}.token_type_embeddings.weight"][0]
        z = z + w[f"{emb}.position_embeddings.weight"][rank]
        rows.append(norm(w, f"{emb}.LayerNorm", z, 1e-12))
    x = torch.stack(rows)
    states, size = [x], WIDTH // HEADS
    for i in range(LAYERS):
        own = f"bert.encoder.layer.{i}"
        q, k, v = (linear(w, f"{own}.attention.self.{n}", x) for n in ("query", "key", "value"))
        mixed = []
        for h in range(HEADS):
            at = slice(h * size, (h + 1) * size)
            mixed.append((q[:, at] @ k[:, at].T / math.sqrt(size)).softmax(-1) @ v[:, at])
        a = linear(w, f"{own}.attention.output.dense", torch.cat(mixed, -1))
        x = norm(w, f"{own}.attention.output.LayerNorm", x + a, 1e-12)
        f = linear(w, f"{own}.output.dense", F.gelu(linear(w, f"{own}.intermediate.dense", x)))
        x = norm(w, f"{own}.output.LayerNorm", x + f, 1e-12)
        states.append(x)

    def transformed(own):
        y = F.gelu(linear(w, f"{own}.predictions.transform.dense", x[1:]))
        return norm(w, f"{own}.predictions.transform.LayerNorm", y, 1e-12)

    logits = transformed("cls") @ w[f"{emb}.word_embeddings.weight"].T + w["cls.predictions.bias"]
    scores = transformed("cls4value") @ w["cls4value.predictions.decoder.weight"].T
    return states, logits, (scores + w["cls4value.predictions.bias"])[:, 0]


def two_species(seed=0):
    """Cells of both, with their own genes."""
    import anndata as ad
    import scipy.sparse as sp

    made = []
    for species, name, n in (("human", human, HUMAN), ("mouse", mouse, MOUSE)):
        rng = np.random.default_rng(seed)
        counts = rng.poisson(rng.gamma(0.5, 3.0, (4, n))).astype(np.float32)
        adata = ad.AnnData(sp.csr_matrix(counts))
        adata.var_names = [name(i) for i in range(n)]
        adata.obs["species"] = species
        made.append(adata)
    return made


def published_cell(adata, row, median):
    """Published tokens and values: a mouse gene with a homolog is that homolog's token."""
    index, token = homolog_index(), tokens()
    human_of = {int(m): h for h, m in enumerate(index.tolist()) if h != m}
    scored = []
    for name, x in zip(adata.var_names, adata.X[row].toarray()[0].astype(np.float64), strict=True):
        if x > 0:
            own = human_of.get(token[name], token[name])
            gene = next(g for g, t in token.items() if t == own)
            scored.append((-np.log2(1 + x / median.get(gene, 1.0)), own))
    scored.sort()
    return [t for _, t in scored][:POSITIONS], [float(np.float32(-v)) for v, _ in scored][
        :POSITIONS
    ]


@pytest.mark.parametrize("n_priors", range(5))
@pytest.mark.parametrize("folded", [False, True])
def test_hidden_states_logits_and_values_of_both_species(tmp_path, n_priors, folded):
    priors = PRIORS[:n_priors] if n_priors != 2 else ("co_exp", "peca_grn")
    w, median = write_genecompass(tmp_path / "m", priors)
    import_model(tmp_path / "m", folded=folded).save(tmp_path / "b")
    bundle = Bundle.load(tmp_path / "b", device="cpu")
    close = {"rtol": 0, "atol": 1e-4 if folded else 1e-5}
    names = bundle.vocabulary.token_ids()
    source = [tokens().get(name, -1) for name in names]
    gene_head = bundle.head("published_gene", PublishedGeneHead(bundle.model.settings, len(names)))
    value_head = bundle.head("published_value", PublishedValueHead(bundle.model.settings))
    for code, adata in enumerate(two_species()):
        (chunk,) = VocabularyCells(adata, bundle).chunks()
        batch = pack(
            window_of(chunk), np.arange(4), rank_scale(bundle.medians_V, "genecompass"),
            bundle.tokens,
        )  # fmt: skip
        starts = batch.starts_C1.tolist()
        with torch.no_grad():
            ours = [bundle.model(batch, layer).hidden_TD for layer in range(LAYERS + 1)]
            logits = gene_head(ours[-1], bundle.model.embedding.token.weight)
            scores = value_head(ours[-1])
        for row in range(4):
            ids, value = published_cell(adata, row, median)
            a, b = starts[row], starts[row + 1]
            assert [source[t] for t in batch.gene_T[a + 1 : b]] == ids
            np.testing.assert_array_equal(batch.value_T[a + 1 : b].numpy(), np.float32(value))
            states, said, said_values = slow(w, ids, value, code, priors)
            for mine, theirs in zip(ours, states, strict=True):
                torch.testing.assert_close(mine[a:b], theirs, **close)
            known = [t for t, s in enumerate(source) if s > 1]
            torch.testing.assert_close(
                logits[a + 1 : b][:, known], said[:, [source[t] for t in known]], **close
            )
            torch.testing.assert_close(scores[a + 1 : b], said_values, **close)


def test_the_embedding_is_the_species_token_of_the_last_layer(tmp_path):
    w, median = write_genecompass(tmp_path / "m", PRIORS)
    bundle = import_model(tmp_path / "m")
    for code, adata in enumerate(two_species(3)):
        gm.embed(adata, bundle)
        for row in range(4):
            ids, value = published_cell(adata, row, median)
            states, _, _ = slow(w, ids, value, code, PRIORS)
            np.testing.assert_allclose(
                adata.obsm["X_genemodel"][row], states[-1][0], rtol=0, atol=1e-5
            )


def test_without_values_the_fusion_has_no_place_for_them(tmp_path):
    w, median = write_genecompass(tmp_path / "m", ("promoter",), values=False)
    bundle = import_model(tmp_path / "m")
    adata = two_species()[1]
    gm.embed(adata, bundle)
    ids, value = published_cell(adata, 0, median)
    states, _, _ = slow(w, ids, value, 1, ("promoter",), values=False)
    np.testing.assert_allclose(adata.obsm["X_genemodel"][0], states[-1][0], rtol=0, atol=1e-5)


def test_a_third_species_and_a_wrong_dictionary_are_refused(tmp_path):
    w, _ = write_genecompass(tmp_path / "m", PRIORS)
    w["bert.cls_embedding.weight"] = torch.zeros(3, WIDTH)
    torch.save(w, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(DataError, match="3 species tokens"):
        import_model(tmp_path / "m")
    fewer = dict(list(tokens().items())[:-4])
    (tmp_path / "prior_knowledge" / "human_mouse_tokens.pickle").write_bytes(pickle.dumps(fewer))
    with pytest.raises(DataError, match=r"no token dictionary of 117 tokens.*113 tokens"):
        import_model(tmp_path / "m")
