"""Tokens of real cells, as the published algorithm makes them, with the published dictionaries."""

import gzip

import numpy as np
import pytest
from tiny_models import bert_config

from genemodel.batches.loader import pack, rank_scale
from genemodel.importers.importing import import_model
from genemodel.importers.verifying import masked_gene_loss
from genemodel.inference.counts import VocabularyCells, window_of

transformers = pytest.importorskip("transformers")

FILES = [
    "human_h1esc_snareseq_chen2019.h5ad",
    "human_celllines_li2017.h5ad",
    "human_pbmc_1k_v3.h5ad",
]


def table(path):
    lines = gzip.open(path, "rt").read().splitlines()
    head = lines[0].split("\t")
    return [dict(zip(head, line.split("\t"), strict=True)) for line in lines[1:]]


@pytest.fixture(scope="module", params=[1, 2])
def real(request, shared_parity, tmp_path_factory):
    """A small random model over the whole published vocabulary, and that vocabulary as a dict."""
    version, folder = request.param, tmp_path_factory.mktemp("real")
    if version == 1:
        rows = table(shared_parity / "geneformer_v1_dictionary.tsv.gz")
        median = {r["gene_id"]: float(r["nonzero_median"]) for r in rows if r["nonzero_median"]}
        given = {"dictionaries": shared_parity / "geneformer_v1_dictionary.tsv.gz"}
    else:
        rows = table(shared_parity / "geneformer_v2_vocabulary.tsv.gz")
        medians = shared_parity / "maxtoki_medians.tsv.gz"  # a stand-in: V2's own are not public
        median = {r["gene_id"]: float(r["nonzero_median"]) for r in table(medians)}
        given = {
            "dictionaries": shared_parity / "geneformer_v2_vocabulary.tsv.gz",
            "medians": medians,
        }
    token = {r["gene_id"]: int(r["token"]) for r in rows}
    config = bert_config(
        2, vocab_size=len(token), max_position_embeddings=2048 * version, num_hidden_layers=1
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return version, import_model(folder, **given), token, median


@pytest.mark.parametrize("name", FILES)
def test_tokens_of_real_cells_are_the_published_ones(real, shared_data, name):
    """One gene at a time, in float64: x / n · 10⁴ / median, descending; n of all genes."""
    import anndata as ad

    version, bundle, token, median = real
    path = shared_data / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    adata = ad.read_h5ad(path)[:60].copy()
    view = VocabularyCells(adata, bundle)
    (chunk,) = view.chunks()
    starts, longest = 0, 2048 * version
    rows = np.flatnonzero(chunk.library_C > 0)
    published = {gene.upper(): t for gene, t in token.items()}
    counts = adata.X.toarray().astype(np.float64)
    checked = ties = cut = 0
    for row in rows:
        batch = pack(
            window_of(chunk), np.array([row]), rank_scale(bundle.medians_V, bundle.tokens.style),
            bundle.tokens, budget=longest, max_cells=1,
        )  # fmt: skip
        starts = batch.starts_C1.tolist()
        ours = batch.gene_T[: starts[1]].numpy()
        ours = ours if version == 2 else ours - 1
        total = counts[row].sum()
        scored = [
            (-(x / total * 10_000 / median[gene]), published[gene])
            for gene, x in zip(adata.var_names, counts[row], strict=True)
            if x > 0 and gene in published
        ]
        scored.sort()
        expected = [t for _, t in scored]
        if version == 2:
            expected = [2, *expected[: longest - 2], 3]
        cut += len(expected) > longest
        ties += sum(a[0] == b[0] for a, b in zip(scored, scored[1:], strict=False))
        assert ours.tolist() == expected[:longest]
        checked += 1
    assert checked >= 50


def test_real_sequences_go_through_and_have_a_loss(real, shared_parity):
    version, bundle, _, _ = real
    if version == 2:
        pytest.skip("the published cells are V1's")
    stored = np.load(shared_parity / "geneformer_v1_500cells.npz")
    some = {"tokens": stored["tokens"], "offsets": stored["offsets"][:9]}
    path = bundle.provenance["from"] + "/some.npz"
    np.savez(path, **some)
    loss, _, n_masked, n_cells = masked_gene_loss(bundle, path)
    assert n_cells == 8 and n_masked == pytest.approx(0.15 * some["offsets"][8], rel=0.1)
    assert abs(loss - np.log(25_426)) < 0.5  # random weights
