"""A new species begins at its orthologs and at what knowledge says, or at random where told so."""

import numpy as np
import pandas as pd
import pytest
import torch

from genemodel.bundle.bundle import Bundle
from genemodel.corpus.corpus import Corpus
from genemodel.corpus.statistics import mean_values
from genemodel.errors import ConfigError, DataError
from genemodel.expression.normalise import log_normalised
from genemodel.genes import GeneVocabulary, add_species
from genemodel.genes.knowledge import KnowledgeTable
from genemodel.settings import parse
from genemodel.simulation.cells import synthetic
from genemodel.train import recipe
from genemodel.train.new_genes import NewGenes
from genemodel.train.settings import NewGenesSettings, PretrainSettings
from genemodel.train.weights import build, open_start

N = 303  # human tokens, specials included


def settings(corpus, out, **change):
    values = {
        "corpus": str(corpus), "out": str(out), "tokens": {"context": 64, "budget": 512},
        "model": {"layers": 1, "width": 16, "heads": 2, "ffn": 16, "components": 3},
        "holdout": {"by": ""},
        "trainer": {
            "max_steps": 2, "accelerator": "cpu", "validate_every": 2, "validation_batches": 1,
        },
    }  # fmt: skip
    return parse(PretrainSettings, {**values, **change})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of human cells that reads a table, and a corpus of a fish it has never seen.

    Of 100 fish genes 30 share a token with theirs; 30 are two copies each of 15 human genes; 20
    have knowledge and no ortholog; of 20 nothing is known.
    """
    folder = tmp_path_factory.mktemp("fish")
    rows = GeneVocabulary.builtin().genes
    rows = rows[(rows["species"] == "human") & (rows["token"] < N)].reset_index(drop=True)
    human = GeneVocabulary(rows)
    ids = rows["ensembl_id"].tolist()
    rng = np.random.default_rng(0)
    table = KnowledgeTable(
        rng.normal(size=(len(human), 5)).astype(np.float32), np.arange(len(human)) % 2 == 0,
        {"kind": "family"},
    )  # fmt: skip
    table.write(folder / "family.tsv.gz", human)
    fish = [f"ENSDARG{i:011d}" for i in range(100)]
    genes = pd.DataFrame({"ensembl_id": fish, "symbol": [f"f{i}" for i in range(100)]})
    genes.to_csv(folder / "genes.tsv", sep="\t", index=False)
    pairs = [(ids[i], fish[i]) for i in range(30)]
    pairs += [(ids[40 + i // 2], fish[30 + i]) for i in range(30)]
    pd.DataFrame(pairs, columns=["human_ensembl", "target_ensembl"]).to_csv(
        folder / "orthologs.tsv", sep="\t", index=False
    )
    both, report = add_species(
        name="zebrafish", genes=folder / "genes.tsv", orthologs=folder / "orthologs.tsv",
        out=folder / "both.tsv.gz", vocabulary=human,
    )  # fmt: skip
    assert (report.shared, report.own) == (30, 70)
    cells = synthetic(
        120, species=("human",), n_genes=250, genes_per_cell=40, seed=3, vocabulary=human
    )["human"]
    Corpus.build([cells], folder / "human", vocabulary=human)
    import anndata as ad

    counts = rng.poisson(rng.gamma(0.6, 2, (1, 100)), (90, 100)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame({"species": "zebrafish"}, index=[f"c{i}" for i in range(90)])
    swim = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=fish))
    Corpus.build([swim], folder / "fish", vocabulary=both)
    run = settings(
        folder / "human", folder / "run",
        model={
            "layers": 1, "width": 16, "heads": 2, "ffn": 16, "components": 3,
            "knowledge": ["family"],
        },
        knowledge_dir=str(folder),
    )  # fmt: skip
    recipe.pretrain(run)
    return folder


def tokens(world, numbers):
    rows = Corpus.open(world / "fish").vocabulary.genes.set_index("ensembl_id")["token"]
    return rows[[f"ENSDARG{i:011d}" for i in numbers]].to_numpy()


def began(world, **new):
    """Backbone and objectives before the first step, and the bundle of before."""
    chosen = settings(world / "fish", world / "unused", start=str(world / "run" / "bundle"))
    corpus = Corpus.open(world / "fish")
    torch.manual_seed(0)
    start, _, before = open_start(chosen.start, corpus)
    found = NewGenes.read(parse(NewGenesSettings, new), str(world), before, start)
    from genemodel.train.weights import shaped_like

    chosen = shaped_like(start, chosen)
    model, objectives = build(chosen, corpus, np.arange(90), 0, start, None, found)
    return model, objectives, Bundle.load(world / "run" / "bundle", device="cpu"), corpus


def test_copies_of_a_gene_begin_as_that_gene(world):
    model, objectives, before, corpus = began(world, orthologs=str(world / "orthologs.tsv"))
    copies, human = tokens(world, range(30, 60)), np.arange(30) // 2 + 40 + 3
    assert (copies >= N).all()
    pairs = {
        "embedding.token.weight": before.model.embedding.token.weight,
        "embedding.components.loading.weight": before.model.embedding.components.loading.weight,
        "embedding.knowledge.family.table_VP": before.model.embedding.knowledge["family"].table_VP,
    }
    state = model.state_dict()
    for name, old in pairs.items():
        assert torch.equal(state[name][copies], old[human]), name
        assert torch.equal(state[name][:N], old), name
    present = state["embedding.knowledge.family.present_V"]
    assert torch.equal(present[copies], before.model.embedding.knowledge["family"].present_V[human])
    decoder = objectives.heads["decode_counts"].gene.weight
    assert torch.equal(decoder[copies], before.heads["decode_counts.gene.weight"][human])
    # Of the others nothing is known: apart from each other, and average for the decoder.
    rest = tokens(world, range(60, 100))
    assert state["embedding.token.weight"][rest].std() > 0.1
    assert not state["embedding.components.loading.weight"][rest].any()
    assert not decoder[rest].any() and not present[rest].any()
    # The species is as the known ones are, and its cells are centred.
    assert torch.equal(
        state["embedding.species.weight"][1], before.model.embedding.species.weight.mean(0)
    )
    X = corpus.read(0, 90).to_csr(len(corpus.vocabulary)).astype(np.float32)
    X = torch.from_numpy(log_normalised(X, corpus.library_C).toarray())
    score = X @ state["embedding.components.loading.weight"]
    centred = score + state["embedding.components.offset.weight"][1]
    assert centred.mean(0).abs().max() < 1e-4


def test_mean_values_are_means_with_zeros(world):
    corpus = Corpus.open(world / "fish")
    X = corpus.read(0, 90).to_csr(len(corpus.vocabulary)).astype(np.float32)
    exact = np.asarray(log_normalised(X, corpus.library_C).mean(0)).ravel()
    found = mean_values(corpus, np.arange(90))
    np.testing.assert_allclose(found[1], exact, rtol=1e-4, atol=1e-6)
    assert not found[0].any()


def test_at_random_is_what_it_was(world):
    model, objectives, before, _ = began(
        world, begin="random", orthologs=str(world / "orthologs.tsv")
    )
    copies, human = tokens(world, range(30, 60)), np.arange(30) // 2 + 40 + 3
    state = model.state_dict()
    new = state["embedding.token.weight"][N:]
    assert 0.15 < new.std() < 0.35  # 1 / √16
    assert torch.equal(state["embedding.token.weight"][:N], before.model.embedding.token.weight)
    cosine = torch.cosine_similarity(
        state["embedding.token.weight"][copies], before.model.embedding.token.weight[human]
    )
    assert cosine.abs().mean() < 0.4
    assert not state["embedding.knowledge.family.present_V"][N:].any()
    assert objectives.heads["decode_counts"].gene.weight[copies].std() > 0.1


def test_knowledge_says_where_genes_without_orthologs_begin(world, tmp_path):
    """A table from which learnt vectors follow exactly: so do those of the new genes."""
    corpus = Corpus.open(world / "fish")
    bundle = Bundle.load(world / "run" / "bundle", device="cpu")
    rng = np.random.default_rng(1)
    known = np.zeros(len(corpus.vocabulary), bool)
    known[3:N] = True
    wanted = tokens(world, range(60, 80))
    known[wanted] = True
    hidden = rng.normal(size=(len(known), 16)).astype(np.float32)
    hidden[:N] = bundle.model.embedding.token.weight.detach().numpy()
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    KnowledgeTable(hidden @ turn * known[:, None], known, {"kind": "table"}).write(
        tmp_path / "protein.tsv", corpus.vocabulary
    )
    ways = {"orthologs": str(world / "orthologs.tsv"), "knowledge": [str(tmp_path / "protein.tsv")]}
    model, objectives, _, _ = began(world, **ways)
    weight = model.embedding.token.weight.detach().numpy()
    assert np.corrcoef(weight[wanted].ravel(), hidden[wanted].ravel())[0, 1] > 0.99
    nothing = tokens(world, range(80, 100))
    assert abs(np.corrcoef(weight[nothing].ravel(), hidden[nothing].ravel())[0, 1]) < 0.3
    # Noise says nothing of the vectors: then the genes begin at random, and not at their mean.
    noise = rng.normal(size=(len(known), 4)).astype(np.float32) * known[:, None]
    KnowledgeTable(noise, known, {"kind": "table"}).write(tmp_path / "noise.tsv", corpus.vocabulary)
    model, _, _, _ = began(world, **{**ways, "knowledge": [str(tmp_path / "noise.tsv")]})
    assert model.embedding.token.weight[wanted].std() > 0.1


def test_a_run_takes_it_and_says_so(world, tmp_path, caplog):
    with caplog.at_level("INFO"):
        path = recipe.pretrain(
            settings(
                world / "fish", tmp_path / "run", start=str(world / "run" / "bundle"),
                new_genes={"orthologs": str(world / "orthologs.tsv")},
            )
        )  # fmt: skip
    assert "30 begin at their orthologs, 0 at what knowledge says, 40 at random" in caplog.text
    bundle = Bundle.load(path, device="cpu")
    assert bundle.species == ("human", "zebrafish")
    assert bundle.provenance["knowledge"]["family"]["kind"] == "family"
    assert pd.read_csv(tmp_path / "run" / "validation.csv")["step"].tolist() == [0, 2]


def test_tables_that_say_nothing_are_refused_before_work(world, tmp_path):
    (tmp_path / "o.tsv").write_text("human_ensembl\ttarget_ensembl\nA\tB\n")
    start = str(world / "run" / "bundle")
    for new, said, kind in (
        ({"orthologs": str(tmp_path / "o.tsv")}, "none of the 1 rows", DataError),
        ({"orthologs": str(world / "orthologs.tsv"), "to": "mouse"}, "'mouse' is not", DataError),
        ({"knowledge": ["nothing"]}, "no table 'nothing'", ConfigError),
    ):
        with pytest.raises(kind, match=said):
            recipe.pretrain(settings(world / "fish", tmp_path / "run", start=start, new_genes=new))
    assert not (tmp_path / "run").exists()


def test_a_table_that_changed_between_sessions_is_refused(world, tmp_path):
    corpus = Corpus.open(world / "human")
    table = KnowledgeTable.read_raw(world / "family.tsv.gz", corpus.vocabulary)
    table.write(tmp_path / "family.tsv", corpus.vocabulary)
    shape = {
        "layers": 1, "width": 16, "heads": 2, "ffn": 16, "components": 3, "knowledge": ["family"],
    }  # fmt: skip

    def run(**trainer):
        values = {
            "max_steps": 3, "accelerator": "cpu", "validate_every": 3, "validation_batches": 1,
            **trainer,
        }  # fmt: skip
        return settings(
            world / "human", tmp_path / "run", model=shape, knowledge_dir=str(tmp_path),
            trainer=values,
        )  # fmt: skip

    with pytest.raises(SystemExit):
        recipe.pretrain(run(max_minutes=1e-9))
    table.shuffled(0).write(tmp_path / "family.tsv", corpus.vocabulary)
    with pytest.raises(ConfigError, match="table family is not what the run started with"):
        recipe.pretrain(run())
    table.write(tmp_path / "family.tsv", corpus.vocabulary)
    recipe.pretrain(run())
