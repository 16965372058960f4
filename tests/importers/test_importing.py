"""What import recognises, what it refuses and says, adapters, classifiers, and the way back."""

import json
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from tiny_models import (
    GENES,
    bert_config,
    cells,
    gene,
    stirred,
    tokens_of,
    write_dictionaries,
    write_geneformer,
    write_json,
    write_table,
)

import genemodel as gm
from genemodel.bundle.bundle import Bundle
from genemodel.command.cli import main
from genemodel.errors import ConfigError, DataError
from genemodel.heads.published import PublishedClassifier
from genemodel.importers.architecture import recognise
from genemodel.importers.checkpoint import Checkpoint
from genemodel.importers.importing import import_model
from genemodel.importers.verifying import masked_gene_loss

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    """A folder with a random Geneformer V2; copied where a test changes it."""
    folder = tmp_path_factory.mktemp("v2") / "m"
    write_geneformer(folder, 2)
    return folder


@pytest.fixture
def changed(v2, tmp_path):
    """A copy of it."""
    return shutil.copytree(v2, tmp_path / "m")


def tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rewritten(folder, tensors):
    from safetensors.torch import save_file

    save_file({name: t.contiguous().clone() for name, t in tensors.items()},
              folder / "model.safetensors")  # fmt: skip


def same_weights(a, b):
    for (name, one), (other, two) in zip(
        sorted(a.model.state_dict().items()), sorted(b.model.state_dict().items()), strict=True
    ):
        assert name == other and torch.equal(one, two), name
    assert set(a.heads) == set(b.heads)
    assert all(torch.equal(a.heads[name], b.heads[name]) for name in a.heads)


# -- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("tied", [False, True])
def test_a_bin_file_with_any_prefix_is_the_same_model(changed, v2, prefix, tied):
    tensors = tensors_of(changed)
    if tied:
        tensors["cls.predictions.decoder.weight"] = tensors[
            "bert.embeddings.word_embeddings.weight"
        ]
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
        tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save({prefix + name: t for name, t in tensors.items()}, changed / "pytorch_model.bin")
    (changed / "model.safetensors").unlink()
    same_weights(import_model(changed), import_model(v2))


def test_dictionaries_are_found_in_a_clone_and_read_from_json_and_tables(v2, tmp_path):
    clone = tmp_path / "Geneformer"
    model = clone / "Geneformer-V2-tiny"
    model.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(v2 / name, model / name)
    median = write_dictionaries(clone / "geneformer", 2)
    write_dictionaries(clone / "geneformer" / "gene_dictionaries_30m", 1)  # of another size
    first = import_model(model)
    same_weights(first, import_model(v2))
    shutil.rmtree(clone / "geneformer")
    (clone / "geneformer").mkdir()
    write_json(clone / "geneformer" / "token_dictionary.json", tokens_of(2))
    write_json(clone / "geneformer" / "gene_median_dictionary.json", median)
    again = import_model(model)
    np.testing.assert_array_equal(first.medians_V, again.medians_V)
    write_table(tmp_path / "genes.tsv.gz", 2, median)
    table = import_model(model, dictionaries=tmp_path / "genes.tsv.gz")
    np.testing.assert_array_equal(first.medians_V, table.medians_V)


def test_dictionaries_of_two_versions_in_a_folder_do_not_mix(changed, v2):
    """Medians of another version would rank every cell wrongly, and say nothing."""
    other = {gene(i): 1.0 for i in range(GENES)}
    for name in ("gene_median_dictionary_gc30M.pkl", "gene_median_dictionary.pkl"):
        (changed / name).write_bytes(pickle.dumps(other))
    for old in list(changed.glob("*_gcX.pkl")):
        old.rename(changed / old.name.replace("gcX", "gc104M"))
    np.testing.assert_array_equal(import_model(changed).medians_V, import_model(v2).medians_V)
    (changed / "token_dictionary_gc104M.pkl").rename(changed / "token_dictionary.pkl")
    assert set(import_model(changed).medians_V[4:]) == {1.0}


def test_numpy_scalars_and_float64_medians_survive_the_bundle(tmp_path):
    write_geneformer(tmp_path / "m", 1)
    median = write_dictionaries(tmp_path / "m", 1, numpy_scalars=True)
    import_model(tmp_path / "m").save(tmp_path / "b")
    bundle = Bundle.load(tmp_path / "b", device="cpu")
    ids = bundle.vocabulary.token_ids()
    assert bundle.medians_V.dtype == np.float64
    assert {ids[t]: bundle.medians_V[t] for t in range(3, len(ids))} == median


def test_ids_that_the_publishers_sum_are_summed(v2):
    adata = cells(n_cells=4)
    both = adata.copy()
    both.var_names = ["ENSG00099999999.2" if n == gene(GENES - 1) else n for n in adata.var_names]
    summed = adata.copy().X.toarray()
    first, last = adata.var_names.get_loc(gene(0)), adata.var_names.get_loc(gene(GENES - 1))
    summed[:, first] += summed[:, last]
    summed[:, last] = 0
    adata.X = type(adata.X)(summed)
    bundle = import_model(v2)
    gm.embed(adata, bundle)
    gm.embed(both, bundle)
    np.testing.assert_array_equal(adata.obsm["X_genemodel"], both.obsm["X_genemodel"])


def test_symbols_of_the_name_dictionary_are_known(v2):
    bundle = import_model(v2)
    assert bundle.vocabulary.token_names()[4:7] == ["GENE0", "GENE1", "GENE2"]
    assert bundle.vocabulary.match([f"GENE{i}" for i in range(GENES)], species="human").n_matched


def test_provenance_says_where_from_and_describe_shows_it(v2, tmp_path, capsys):
    assert main(["import", str(v2), f"out={tmp_path / 'b'}", "verify=true"]) == 0
    assert "sha256 of model.safetensors" in capsys.readouterr().out
    assert main(["describe", f"input={tmp_path / 'b'}"]) == 0
    said = capsys.readouterr().out
    assert "licence: Apache-2.0" in said and "token_dictionary_gcX.pkl" in said
    assert "Geneformer of another shape" in said


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((6, 256, 25_426, 512, 2048), "Geneformer-V1-10M"),
        ((12, 512, 25_426, 1024, 2048), "gf-12L-30M-i2048"),
        ((12, 512, 20_275, 1024, 4096), "gf-12L-95M-i4096"),
        ((20, 896, 20_275, 1792, 4096), "gf-20L-95M-i4096"),
        ((12, 768, 20_275, 3072, 4096), "Geneformer-V2-104M"),
        ((18, 1152, 20_275, 4608, 4096), "Geneformer-V2-316M"),
    ],
)
def test_every_published_shape_is_named_from_shapes_alone(shape, name):
    """Meta tensors: the names and sizes of the real files, without their weights."""
    layers, width, size, ffn, positions = shape
    config = bert_config(
        2, vocab_size=size, hidden_size=width, num_hidden_layers=layers, intermediate_size=ffn,
        num_attention_heads=width // 64, max_position_embeddings=positions,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config)
    state = {k: v for k, v in model.state_dict().items() if "decoder" not in k}
    found = recognise(Checkpoint(None, "model.safetensors", state, config.to_dict()))
    assert name in found.name and found.family == "geneformer"
    assert (found.settings.heads, found.settings.max_rank) == (width // 64, positions - 1)
    bare = recognise(Checkpoint(None, "model.safetensors", state))  # no config.json
    assert bare.settings.heads == width // 64 and bare.settings.activation == "relu"
    # Numbers in all, as counted from the published files.
    numbers = {
        (6, 256): 10_288_722, (12, 512, 25_426): 39_591_250, (12, 512, 20_275): 37_997_363,
        (20, 896): 151_313_459, (12, 768): 104_386_867, (18, 1152): 316_354_867,
    }  # fmt: skip
    expected = numbers.get((layers, width), numbers.get((layers, width, size)))
    assert sum(t.numel() for t in state.values()) == expected
    assert len(state) == 10 + 16 * layers


def test_the_published_v2_dictionary_is_known_by_its_bytes(tmp_path, shared_parity):
    """The real file, made again from its content, with a small model of its vocabulary."""
    import gzip

    lines = gzip.open(shared_parity / "geneformer_v2_vocabulary.tsv.gz", "rt").read().splitlines()
    token = {row.split("\t")[0]: int(row.split("\t")[1]) for row in lines[1:]}
    model = transformers.BertForMaskedLM(bert_config(2, vocab_size=20_275))
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "token_dictionary_gc104M.pkl").write_bytes(pickle.dumps(token, protocol=4))
    bundle = import_model(tmp_path / "m", medians=shared_parity / "maxtoki_medians.tsv.gz")
    files = bundle.provenance["dictionaries"]
    assert any(
        "geneformer/token_dictionary_gc104M.pkl" in name
        and digest == "67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f"
        for name, digest in files.items()
    )
    assert len(bundle.vocabulary) == 20_275 and bundle.tokens.style == "geneformer_v2"


# -- what is refused --------------------------------------------------------------------------


def without(name):
    def change(folder):
        tensors = tensors_of(folder)
        del tensors[name]
        rewritten(folder, tensors)

    return change


def with_tensor(name, tensor):
    return lambda folder: rewritten(folder, {**tensors_of(folder), name: tensor})


def with_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", {**config, **values})

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def only(name, content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


class Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 417571156\n"
REFUSED = {
    "weights are a pointer": (written("model.safetensors", POINTER), "git-lfs pointer.*417571156"),
    "dictionary is a pointer": (written("token_dictionary_gcX.pkl", POINTER), "git-lfs pointer"),
    "weights are empty": (written("model.safetensors", b""), "is empty"),
    "weights are cut off": (
        lambda f: os.truncate(f / "model.safetensors", 5000), "damaged or cut off"),
    "bin runs code": (only("pytorch_model.bin", pickle.dumps(Runs())), "is refused"),
    "bin is text": (only("pytorch_model.bin", b"hello"), "is refused"),
    "dictionary runs code": (
        written("token_dictionary_gcX.pkl", pickle.dumps(Runs())), "a call of .*system"),
    "dictionary is a list": (
        written("token_dictionary_gcX.pkl", pickle.dumps([1])), "holds a list"),
    "medians are hostile": (
        written("gene_median_dictionary_gcX.pkl", pickle.dumps(Runs())), "a call of .*system"),
    "medians of other genes": (
        written("gene_median_dictionary_gcX.pkl", pickle.dumps({"ENSG1": 1.0})),
        "120 of the 120 genes .* no median"),
    "medians are zero": (
        written("gene_median_dictionary_gcX.pkl", pickle.dumps({gene(0): 0.0})), "positive"),
    "no medians": (
        lambda f: (f / "gene_median_dictionary_gcX.pkl").unlink(), "no medians.*medians=TABLE"),
    "no dictionary": (
        lambda f: (f / "token_dictionary_gcX.pkl").unlink(), "no token dictionary of 124 tokens"),
    "other dictionary": (
        written("token_dictionary_gcX.pkl", pickle.dumps(tokens_of(1))), "122 tokens"),
    "tokens twice": (
        written("token_dictionary_gcX.pkl", pickle.dumps({**tokens_of(2), gene(5): 8})),
        "each once"),
    "MaxToki's dictionary": (
        written("token_dictionary_gcX.pkl", pickle.dumps({**tokens_of(2), "<bos>": 124})),
        "MaxToki"),
    "a tensor is missing": (
        without("bert.encoder.layer.1.output.dense.bias"), "lacks bert.encoder.layer.1.output"),
    "a layer is missing": (
        lambda f: rewritten(f, {k: v for k, v in tensors_of(f).items() if "layer.1." not in k}),
        "layers are .0, 2."),
    "a tensor too many": (with_tensor("bert.extra", torch.zeros(2)), "no place for: bert.extra"),
    "a tensor of another shape": (
        with_tensor("bert.encoder.layer.0.attention.output.dense.bias", torch.zeros(7)),
        r"is \(7,\), but \(32,\)"),
    "untied": (
        with_tensor("cls.predictions.decoder.weight", torch.zeros(124, 32)), "not equal to"),
    "config of another size": (with_config(hidden_size=64), "hidden_size is 64.*weights say 32"),
    "other positions": (
        with_config(position_embedding_type="relative_key"), "position_embedding_type"),
    "other activation": (with_config(hidden_act="silu"), "hidden_act is 'silu'"),
    "heads that do not divide": (with_config(num_attention_heads=5), "num_attention_heads is 5"),
    "config is damaged": (written("config.json", b"{"), "config.json cannot be read"),
    "MaxToki": (
        lambda f: rewritten(f, {"model.embed_tokens.weight": torch.zeros(4, 2)}), "MaxToki"),
    "multi-task": (
        with_tensor("classification_heads.0.weight", torch.zeros(2, 32)), "multi-task"),
    "scGPT": (
        lambda f: rewritten(f, {"transformer_encoder.layers.0.x": torch.zeros(2)}), "scGPT"),
    "something else": (
        lambda f: rewritten(f, {"decoder.w": torch.zeros(2)}), "neither Geneformer nor"),
    "nothing": (lambda f: [one.unlink() for one in f.iterdir()], "has no model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exactly_a_published_model_is_refused_by_name(changed, name, monkeypatch):
    change, words = REFUSED[name]
    change(changed)
    monkeypatch.chdir(changed)
    with pytest.raises(DataError, match=words) as refused:
        import_model(changed)
    assert not (changed / "executed").exists()
    assert "weights_only" not in str(refused.value)  # no library's advice to let it run after all


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["import"], "input"),
        (["import", "{m}", "out={m}"], "exists: set overwrite=true"),
        (["import", "{m}", "dictionaries=nowhere"], "dictionaries=nowhere does not exist"),
        (["import", "{m}", "medians=nowhere"], "medians=nowhere is no file"),
        (["import", "{m}", "base={m}"], "is no adapter"),
        (["import", "{m}", "cells=a.h5ad"], "verify=true"),
        (["import", "{m}", "cell_layer=3"], "model has 3 blocks"),
        (["import", "nowhere"], "nowhere does not exist"),
        (["import", "{m}/config.json"], "is a file"),
        (["import", "{m}", "spam=1"], "spam"),
        (["export", "{m}"], "no model.json"),
        (["export", "{m}", "format=onnx"], "onnx"),
    ],
)  # fmt: skip
def test_the_command_line_says_what_is_wrong(v2, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("{m}", str(v2)) for word in words]) == 2
    assert said in capsys.readouterr().err


# -- adapters and classifiers -----------------------------------------------------------------


def write_adapter(folder, base, rank=4, alpha=6.0, **settings):
    """As peft writes it: low-rank changes of queries and values, and a classifier as it is."""
    from safetensors.torch import save_file

    folder.mkdir()
    rng = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(3):
        for part in ("query", "value"):
            own = f"base_model.model.bert.encoder.layer.{i}.attention.self.{part}"
            tensors[f"{own}.lora_A.weight"] = torch.randn(rank, 32, generator=rng)
            tensors[f"{own}.lora_B.weight"] = torch.randn(32, rank, generator=rng)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": str(base),
         **settings},
    )  # fmt: skip
    return tensors


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_adapter_is_added_to_the_model_that_it_names(v2, tmp_path, rslora):
    low = write_adapter(tmp_path / "a", v2, use_rslora=rslora)
    base, tuned = import_model(v2), import_model(tmp_path / "a")
    scale = 6.0 / (2.0 if rslora else 4.0)
    own = "base_model.model.bert.encoder.layer.1.attention.self.value"
    change = scale * low[f"{own}.lora_B.weight"] @ low[f"{own}.lora_A.weight"]
    expected = base.model.blocks[1].qkv.weight[64:] + change
    torch.testing.assert_close(tuned.model.blocks[1].qkv.weight[64:], expected)
    assert torch.equal(
        tuned.model.blocks[1].qkv.weight[32:64], base.model.blocks[1].qkv.weight[32:64]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"base_model_name_or_path": "ctheodoris/Geneformer"},
            "which is not here: give base=FOLDER",
        ),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"query": 2}}, "merge it with peft"),
        ({"r": 3}, "of rank 4"),
        ({"lora_alpha": None}, "no r or lora_alpha"),
    ],
)
def test_other_adapters_are_refused(v2, tmp_path, settings, words):
    write_adapter(tmp_path / "a", v2, **settings)
    with pytest.raises(DataError, match=words):
        import_model(tmp_path / "a")


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_a_fine_tuned_classifier_keeps_its_head_and_labels(tmp_path, kind):
    labels = {0: "healthy", 1: "dilated", 2: "hypertrophic"}
    theirs = write_geneformer(
        tmp_path / "m", 2, kind, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    bundle = import_model(tmp_path / "m")
    said = bundle.settings["published"]
    assert said["config"]["id2label"]["1"] == "dilated"
    assert said["head"] == ("cells" if "Sequence" in kind else "genes")
    head = PublishedClassifier(bundle.heads)
    from test_geneformer_parity import packed

    batch = packed(bundle, cells(n_cells=3))
    starts = batch.starts_C1.tolist()
    for row in range(3):
        own = slice(starts[row], starts[row + 1])
        with torch.no_grad():
            hidden = bundle.model(batch).hidden_TD[own]
            expected = theirs(batch.gene_T[own][None]).logits[0]
            got = head(hidden[:1])[0] if "Sequence" in kind else head(hidden)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_an_imported_classifier_of_cells_labels_cells(tmp_path):
    """V1 pools the first token, which is the highest gene."""
    from test_geneformer_parity import packed

    labels = {0: "healthy", 1: "dilated", 2: "hypertrophic"}
    theirs = write_geneformer(tmp_path / "m", 1, "BertForSequenceClassification", id2label=labels)
    bundle = import_model(tmp_path / "m")
    adata = cells(n_cells=12, seed=8)
    gm.annotate(adata, model=bundle, key_added="label")
    batch = packed(bundle, adata)
    starts = batch.starts_C1.tolist()
    for row in range(12):
        ids = batch.gene_T[starts[row] : starts[row + 1]] - 1
        with torch.no_grad():
            probability = theirs(ids[None]).logits[0].softmax(-1).numpy()
        np.testing.assert_allclose(adata.obsm["label_probability"][row], probability, atol=1e-5)
    assert list(adata.uns["label"]["labels"]) == list(labels.values())


# -- the way back -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "kind",
    ["BertForMaskedLM", "BertModel", "BertForSequenceClassification", "BertForTokenClassification"],
)
def test_transformers_loads_an_export_silently_and_to_the_bit(tmp_path, version, kind, caplog):
    theirs = write_geneformer(tmp_path / "m", version, kind)
    import_model(tmp_path / "m").save(tmp_path / "b")
    written = gm.export_model(tmp_path / "b", tmp_path / "x")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again, info = getattr(transformers, kind).from_pretrained(written, output_loading_info=True)
    assert not [one for one in said if "transformers" in str(one.filename)]
    assert not caplog.records
    assert not any(info.values()), info
    one, two = theirs.state_dict(), again.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("hidden_act", "layer_norm_eps", "pad_token_id", "num_attention_heads"):
        assert getattr(theirs.config, name) == getattr(again.config, name)
    # And here again: the folder has its dictionaries with it.
    same_weights(import_model(written), import_model(tmp_path / "m"))


def test_a_native_model_and_a_strange_folder_are_not_exported(random_bundle, v2, tmp_path):
    with pytest.raises(
        ConfigError, match="a model of our own, which BERT cannot express: it .*depth"
    ):
        gm.export_model(random_bundle, tmp_path / "x")
    bundle = import_model(v2)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="is not what export writes"):
        gm.export_model(bundle, tmp_path / "mine", overwrite=True)
    with pytest.raises(ConfigError, match="set overwrite=true"):
        gm.export_model(bundle, tmp_path / "mine")


def test_the_loss_on_masked_genes_is_that_of_transformers(v2, tmp_path):
    bundle = import_model(v2)
    own = [np.array([2, 9, 30, 77, 50, 3]), np.array([2, *range(60, 98), 3])]
    np.savez(
        tmp_path / "s.npz", tokens=np.concatenate([o[1:-1] for o in own]).astype(np.uint16),
        offsets=np.cumsum([0, *(len(o) - 2 for o in own)]),
    )  # fmt: skip
    loss, accuracy, n_masked, n_cells = masked_gene_loss(bundle, tmp_path / "s.npz")
    assert n_cells == 2 and n_masked > 1

    from genemodel.heads.masking import uniform
    from genemodel.importers.verifying import _PURPOSE, _SEED, FRACTION

    theirs = transformers.BertForMaskedLM.from_pretrained(v2).eval()
    total, n = 0.0, 0
    for number, tokens in enumerate(own):
        ids = torch.from_numpy(tokens)
        drawn = uniform(_SEED, _PURPOSE, 0, torch.full_like(ids, number), ids)
        masked = drawn < FRACTION
        with torch.no_grad():
            logits = theirs(torch.where(masked, 1, ids)[None]).logits[0]
        total += float(
            torch.nn.functional.cross_entropy(logits[masked], ids[masked], reduction="sum")
        )
        n += int(masked.sum())
    assert n == n_masked and total / n == pytest.approx(loss, rel=1e-5)


def test_stirring_reaches_everything():
    """The parity tests prove nothing for a tensor that is zero or one everywhere."""
    model = stirred(transformers.BertForMaskedLM(bert_config(2)))
    assert all(p.unique().numel() > p.numel() // 2 for p in model.parameters())
