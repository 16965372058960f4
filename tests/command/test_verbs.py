"""The small verbs as a user types them, on generated cells."""

from collections.abc import Callable
from pathlib import Path

import pytest

from genemodel.command import cli

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one file of human and one of mouse cells."""
    from genemodel.simulation.cells import synthetic

    folder = tmp_path_factory.mktemp("cells")
    for name, adata in synthetic(60, n_genes=1000, seed=3).items():
        adata.obs["animal"] = adata.obs["donor"]
        adata.write_h5ad(folder / f"{name}.h5ad")
    return folder


@pytest.fixture
def typed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Typed:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_corpus_from_files_to_report(typed: Typed, cells: Path, tmp_path: Path) -> None:
    from genemodel.corpus.corpus import Corpus

    status, out, err = typed("corpus", "build", f"input={cells}/hum*.h5ad", "out=c")
    assert status == 0, err
    assert "genemodel corpus describe corpus=c" in out
    first = Corpus.open(tmp_path / "c")
    assert first.codes("species")[1] == ["human"]

    status, out, err = typed("corpus", "append", "corpus=c", f"input=[{cells}/mouse.h5ad]")
    assert status == 0, err
    grown = Corpus.open(tmp_path / "c")
    assert f"{len(grown) - len(first)} cells added" in out
    assert set(grown.codes("species")[1]) == {"human", "mouse"}

    status, out, _ = typed("corpus", "verify", "corpus=c")
    assert (status, out) == (0, "corpus c: every file is as it was written\n")
    status, out, _ = typed("corpus", "describe", "corpus=c", "output=report.html")
    assert status == 0
    assert "human" in out and "With plots: report.html" in out
    assert "<html" in (tmp_path / "report.html").read_text()
    assert typed("describe", "input=c")[0] == 0


def test_verify_names_the_damaged_file(typed: Typed, cells: Path, tmp_path: Path) -> None:
    typed("corpus", "build", f"input={cells}/human.h5ad", "out=c")
    victim = max((tmp_path / "c" / "cells.zarr").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0x10
    victim.write_bytes(bytes(data))
    status, out, err = typed("corpus", "verify", "corpus=c")
    assert (status, out) == (2, "")
    assert err.startswith("genemodel: error: corpus c is damaged:\n")
    assert str(victim.relative_to(tmp_path / "c")) in err
    assert "build the corpus again" in err


def test_a_sheet_gives_each_source_its_own_options(
    typed: Typed, cells: Path, tmp_path: Path
) -> None:
    from genemodel.corpus.corpus import Corpus

    sheet = cells / "samples.csv"
    sheet.write_text(
        "path,name,species,donor_key,licence,citation\n"
        "human.h5ad,first,human,animal,CC0,Doe 2024\nmouse.h5ad,second,,,,\n"
    )
    status, _, err = typed("corpus", "build", f"sheet={sheet}", "out=c", "keep=[batch]")
    assert status == 0, err
    corpus = Corpus.open(tmp_path / "c")
    assert [source.name for source in corpus.sources] == ["first", "second"]
    assert [source.licence for source in corpus.sources] == ["CC0", ""]
    assert corpus.sources[0].citation == "Doe 2024"
    assert set(corpus.codes("species")[1]) == {"human", "mouse"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("out=c", "give either input="),
        ("out=c input=a.h5ad sheet=b.tsv", "give either input="),
        ("out=c input=none/*.h5ad", "no file matches none/*.h5ad"),
        ("out=c input=none.h5ad", "none.h5ad: does not exist"),
        ("out=c sheet=none.tsv", "none.tsv"),
        ("out=c sheet={cells}/wrong.tsv", "unknown column 'spcies': did you mean 'species'?"),
        ("out=c sheet={cells}/pathless.tsv", "has no column 'path'"),
        ("out=c input={cells}/human.h5ad min_fraction=2", "min_fraction is 2"),
        ("out=c input={cells}/human.h5ad max_mitos=1", "did you mean 'max_mito'?"),
        ("out=c input={cells}/human.h5ad vocabulary=none.tsv.gz", "none.tsv.gz cannot be read"),
        ("out=c input={cells}/human.h5ad unknown_species=skip", "one of refuse, drop"),
        ("out=c input={cells}/human.h5ad donor_key=donr", "donr"),
    ],
)
def test_what_cannot_be_built_is_refused_before_work(
    typed: Typed, cells: Path, tmp_path: Path, words: str, expected: str
) -> None:
    (cells / "wrong.tsv").write_text("path\tspcies\nhuman.h5ad\thuman\n")
    (cells / "pathless.tsv").write_text("name\tspecies\na\thuman\n")
    status, out, err = typed("corpus", "build", *words.format(cells=cells).split())
    assert (status, out) == (2, "")
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("verb", ["verify", "describe"])
def test_what_is_no_corpus_is_refused(typed: Typed, verb: str) -> None:
    for folder in ("none", "."):
        status, _, err = typed("corpus", verb, f"corpus={folder}")
        assert status == 2
        assert "corpus" in err and "Traceback" not in err


def test_a_species_is_added_with_one_command(typed: Typed, tmp_path: Path) -> None:
    from genemodel.genes import GeneVocabulary

    known = GeneVocabulary.builtin()
    human = known.genes.query("species == 'human' and biotype == 'protein_coding'").iloc[:200]
    new = [f"ENSDARG{n:011d}" for n in range(300)]
    genes = "\n".join(f"{gene}\tzf{n}\tprotein_coding" for n, gene in enumerate(new))
    (tmp_path / "genes.tsv").write_text(f"ensembl_id\tsymbol\tbiotype\n{genes}\n")
    pairs = "\n".join(f"{a}\t{b}" for a, b in zip(human["ensembl_id"], new, strict=False))
    (tmp_path / "orthologs.tsv").write_text(f"human_ensembl\tzebrafish_ensembl\n{pairs}\n")
    command = ["species", "name=zebrafish", "genes=genes.tsv", "orthologs=orthologs.tsv"]
    status, out, err = typed(*command, "output=grown.tsv.gz")
    assert status == 0, err
    grown = GeneVocabulary.read(tmp_path / "grown.tsv.gz")
    assert grown.extends(known) and grown.species == (*known.species, "zebrafish")
    assert grown.tokens_of("zebrafish")[:200].tolist() == human["token"].tolist()
    assert len(grown) == len(known) + 100
    assert "grown.tsv.gz" in out
    assert "zebrafish" in typed("describe", "input=grown.tsv.gz")[1]
    before = (tmp_path / "grown.tsv.gz").read_bytes()
    status, _, err = typed(*command, "output=grown.tsv.gz")
    assert status == 2 and "output=grown.tsv.gz exists" in err
    assert (tmp_path / "grown.tsv.gz").read_bytes() == before


def test_describe_knows_what_fine_tuning_writes(typed: Typed, tmp_path: Path) -> None:
    from genemodel.simulation.cells import synthetic

    cells = synthetic(80, species=("human",), n_batches=2, n_genes=300, genes_per_cell=60, seed=1)
    cells["human"].write_h5ad(tmp_path / "cells.h5ad")
    small = "steps=2 passes=0 hidden=8 rank=4 latent=5".split()
    status, _, err = typed(
        *"finetune input=cells.h5ad batch_key=batch task=both out=run".split(),
        *(f"integration.{word}" for word in small),
        *"imputation.epochs=1 imputation.hidden=8 imputation.latent=4".split(),
    )
    assert status == 0, err
    status, out, _ = typed("describe", "input=run/model")
    assert status == 0 and out.startswith("integration model run/model\n")
    assert "in 5 dimensions" in out and "batches (batch): human_batch1, human_batch2" in out
    assert "seed: 0" in out and "cells: 80" in out and "labels: none" in out
    status, out, _ = typed("describe", "input=run/imputation_model")
    assert status == 0 and out.startswith("imputation model run/imputation_model\n")
    assert "predicts 300 genes" in out and "90 % intervals hold" in out
    status, _, err = typed("describe", "input=run")
    assert status == 2 and "the folder of a run: name run/model or run/imputation_model" in err
    weights = tmp_path / "run" / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    status, _, err = typed("describe", "input=run/model")
    assert status == 2 and "weights.safetensors is damaged" in err and "Traceback" not in err


def test_describe_refuses_what_it_does_not_know(typed: Typed, tmp_path: Path) -> None:
    assert "does not exist" in typed("describe", "input=none")[2]
    (tmp_path / "a.txt").write_text("x")
    status, _, err = typed("describe", "input=a.txt")
    assert status == 2
    assert "no corpus" in err and "no model" in err and "no vocabulary" in err
