"""Small published models with random weights, written as their publishers write them."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

GENES = 120


def gene(number):
    return f"ENSG{number + 3:011d}"


def tokens_of(version, n=GENES):
    specials = ["<pad>", "<mask>"] + (["<cls>", "<eos>"] if version == 2 else [])
    return {name: i for i, name in enumerate([*specials, *(gene(i) for i in range(n))])}


def write_dictionaries(folder, version, *, numpy_scalars=False):
    """Token, median, name and mapping dictionaries, as pickles (of numpy scalars: V1's)."""
    folder.mkdir(parents=True, exist_ok=True)
    token = tokens_of(version)
    rng = np.random.default_rng(version)
    median = {
        name: float(m) for name, m in zip(token, rng.uniform(0.3, 6, len(token)), strict=True)
    }
    median = {name: m for name, m in median.items() if name.startswith("ENSG")}
    mapping = {name: name for name in median} | {"ENSG00099999999": gene(0)}
    if numpy_scalars:
        token = {name: np.int16(t) for name, t in token.items()}
        median = {name: np.float64(m) for name, m in median.items()}
    for name, values in (
        ("token_dictionary_gcX.pkl", token),
        ("gene_median_dictionary_gcX.pkl", median),
        ("ensembl_mapping_dict_gcX.pkl", mapping),
        ("gene_name_id_dict_gcX.pkl", {f"GENE{i}": gene(i) for i in range(GENES)}),
    ):
        (folder / name).write_bytes(pickle.dumps(values, protocol=4))
    return {name: float(m) for name, m in median.items()}


def bert_config(version, **changes):
    from transformers import BertConfig

    return BertConfig(
        **{
            "vocab_size": len(tokens_of(version)), "hidden_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 4, "intermediate_size": 48, "hidden_act": "relu",
            "max_position_embeddings": 40, "hidden_dropout_prob": 0.02, "pad_token_id": 0,
            "layer_norm_eps": 1e-12, **changes,
        }
    )  # fmt: skip


def stirred(model, seed=0):
    """Random everywhere, biases and norms too, so that nothing mapped wrongly goes unseen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def write_geneformer(folder, version=2, kind="BertForMaskedLM", **changes):
    """Write a random Geneformer; returns the transformers model."""
    transformers = pytest.importorskip("transformers")
    model = stirred(getattr(transformers, kind)(bert_config(version, **changes)))
    model.save_pretrained(folder)
    write_dictionaries(Path(folder), version)
    return model


def write_table(path, version, median):
    """The dictionaries as one table."""
    lines = ["gene_id\ttoken\tnonzero_median"]
    lines += [
        f"{name}\t{token}\t{repr(median[name]) if name in median else ''}"
        for name, token in tokens_of(version).items()
    ]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def cells(n_cells=7, seed=0, extra=30, n=GENES):
    """AnnData of raw counts; ``extra`` genes are in no dictionary but in the depth of a cell."""
    import anndata as ad
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.4, 3.0, (n_cells, n + extra))).astype(np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts))
    adata.var_names = [gene(i) for i in range(n)] + [
        f"ENSG{900_000 + i:011d}" for i in range(extra)
    ]
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    return adata


def published_inputs(adata, version, median, *, context):
    """Tokens of the published algorithm, gene by gene, from the AnnData itself."""
    token = tokens_of(version)
    sequences = []
    for row in adata.X.toarray().astype(np.float64):
        total = row.sum()
        scored = [
            (-(x / total * 10_000 / median[name]), token[name])
            for name, x in zip(adata.var_names, row, strict=True)
            if x > 0 and name in token
        ]
        ranked = [t for _, t in sorted(scored)]
        if version == 2:
            ranked = [2, *ranked[: context - 2], 3]
        sequences.append(ranked[:context])
    return sequences


def write_json(path, values):
    Path(path).write_text(json.dumps(values))
