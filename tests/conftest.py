"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["small_cells"]
REPOSITORY = Path(__file__).resolve().parent.parent


# Files that begin first, the longest before the others, so that two processes end together.
FIRST = (
    "test_evaluate.py",
    "test_sources_in_verbs.py",
    "test_finetuning.py",
    "test_label_head.py",
    "test_units.py",
    "test_faults.py",
    "test_impute.py",
    "test_notebooks.py",
    "test_gpu_run.py",
    "test_memory.py",
    "test_resume.py",
    "test_corruption.py",
    "test_recipe.py",
)
# Files that search neighbours with pynndescent or draw with umap, which numba compiles anew in
# every process, for 40 s and 10 s: one process has all of them.
COMPILING = (
    "test_evaluate.py",
    "test_metrics.py",
    "test_neighbours.py",
    "test_plots.py",
    "test_pins.py",
    "test_demo.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    place = {name: n for n, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With ``--dist loadfile``: give the files that compile to one process, as if they were one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "compiling" if Path(file).name in COMPILING else file

    return Files(config, log)


def _real_data() -> Path:
    return Path(os.environ.get("GENEMODEL_TEST_DATA") or REPOSITORY.parent / "shared")


def _folder(name: str, pattern: str) -> Path:
    folder = _real_data() / name
    if not any(folder.glob(pattern)):
        pytest.skip(
            f"no real data: {folder} holds no {pattern}; point GENEMODEL_TEST_DATA to a folder "
            "with data/*.h5ad and knowledge/*.tsv.gz"
        )
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that these tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real h5ad files; skips where there is none."""
    return _folder("data", "*.h5ad")


@pytest.fixture(scope="session")
def shared_knowledge() -> Path:
    """Folder of gene and ortholog tables; skips where there is none."""
    return _folder("knowledge", "genes_*.tsv.gz")


@pytest.fixture(scope="session")
def pack_random():
    """Make a packed batch of random cells: ``pack_random(seed, lengths=...)``."""
    import numpy as np

    from genemodel.batches.loader import pack
    from genemodel.batches.tokens import TokenSettings
    from genemodel.batches.window import Window

    def make(
        seed=0, *, lengths=(40, 7, 90, 23), n_tokens=203, budget=256, context=128, cells=None,
        max_cells=8,
    ):  # fmt: skip
        """Cells ``cells`` (default all) of a fixed random set with ``n_tokens`` tokens."""
        rng = np.random.default_rng(seed)
        ends = np.cumsum(lengths)
        gene_N = np.concatenate(
            [np.sort(rng.choice(np.arange(3, n_tokens), n, replace=False)) for n in lengths]
        ).astype(np.int32)
        count_N = rng.geometric(0.3, gene_N.size).astype(np.float32)
        n_cells = len(lengths)
        window = Window(
            begin_C=ends - np.asarray(lengths),
            end_C=ends,
            gene_N=gene_N,
            count_N=count_N,
            library_C=np.add.reduceat(count_N, ends - np.asarray(lengths)),
            species_C=np.arange(n_cells) % 2,
            batch_C=np.arange(n_cells) % 3 - 1,
            panel_C=np.zeros(n_cells, np.int64),
            cell_C=np.arange(n_cells) + 1000,
        )
        chosen = np.arange(n_cells) if cells is None else np.asarray(cells)
        return pack(
            window,
            chosen,
            np.ones(n_tokens, np.float32),
            TokenSettings(context=context, budget=max(budget, context)),
            budget=budget,
            max_cells=max_cells,
        )

    return make


@pytest.fixture(scope="session")
def away():
    """``away(**shape)``: backbone and objectives for ``pack_random``, away from their starts."""

    import numpy as np
    import torch

    from genemodel.corpus.statistics import GeneStatistics
    from genemodel.genes.vocabulary import N_SPECIAL
    from genemodel.heads.pretraining import PretrainingObjectives, PretrainingSettings
    from genemodel.model.gene_model import GeneModel
    from genemodel.model.settings import ModelSettings

    n_tokens = 203

    def make(**shape):
        rng = np.random.default_rng(0)
        present = np.ones((2, n_tokens), bool)
        present[:, :N_SPECIAL] = False
        statistics = GeneStatistics(
            frequency_SV=rng.dirichlet(np.ones(n_tokens), 2),
            mean_value_SV=rng.uniform(1, 5, (2, n_tokens)),
            rate_SV=rng.dirichlet(np.ones(n_tokens), 2),
            dispersion_V=rng.uniform(0.5, 3, n_tokens),
            present_SV=present,
        )
        measured = torch.ones(1, n_tokens, dtype=torch.bool)
        measured[:, :N_SPECIAL] = False
        torch.manual_seed(0)
        task = PretrainingObjectives(
            PretrainingSettings(), width=32, statistics=statistics, n_batches=2,
            measured_XV=measured, seed=0,
        )  # fmt: skip
        shape = {"layers": 2, "width": 32, "heads": 2, "ffn": 48, "components": 6, **shape}
        model = GeneModel(ModelSettings(**shape), n_tokens=n_tokens, n_species=2, context=128)
        with torch.no_grad():
            for weight in (*task.parameters(), *model.parameters()):
                weight.add_(0.05 * torch.randn_like(weight))
        return model, task

    return make


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """Folder of a corpus of 600 generated cells of two species, four donors."""
    from genemodel.corpus.corpus import Corpus
    from genemodel.simulation.cells import synthetic

    folder = tmp_path_factory.mktemp("tiny")
    files = []
    for name, adata in synthetic(600, n_genes=600, genes_per_cell=80, seed=1).items():
        adata.write_h5ad(folder / f"{name}.h5ad")
        files.append(folder / f"{name}.h5ad")
    Corpus.build(files, folder / "corpus")
    return folder / "corpus"


@pytest.fixture(scope="session")
def random_bundle():
    """A bundle over the built-in vocabulary with random weights, shared: do not change it."""
    import numpy as np
    import torch

    from genemodel.batches.tokens import TokenSettings
    from genemodel.bundle.bundle import Bundle
    from genemodel.genes import GeneVocabulary
    from genemodel.model.gene_model import GeneModel
    from genemodel.model.settings import ModelSettings

    vocabulary = GeneVocabulary.builtin()
    torch.manual_seed(0)
    model = GeneModel(
        ModelSettings(layers=1, width=16, heads=2, ffn=16),
        n_tokens=len(vocabulary), n_species=2, context=128,
    )  # fmt: skip
    medians_V = np.full(len(vocabulary), np.nan, np.float32)
    medians_V[3:5000] = np.random.default_rng(0).uniform(0.5, 3, 4997)
    return Bundle(
        model=model.eval(),
        vocabulary=vocabulary,
        tokens=TokenSettings(context=128, budget=1024),
        medians_V=medians_V,
        heads={"some_head.weight": torch.arange(4.0)},
        settings={"some_head": {"n": 4}},
        provenance={"steps": 7},
    )


@pytest.fixture(scope="session")
def small_vocabulary():
    """The first thousand genes of the built-in vocabulary: training steps take milliseconds."""
    from genemodel.genes import GeneVocabulary

    rows = GeneVocabulary.builtin().genes
    return GeneVocabulary(rows[rows["token"] < 1003].reset_index(drop=True))


@pytest.fixture(scope="session")
def small_start(tmp_path_factory, small_vocabulary):
    """Corpus of 240 cells over a small vocabulary, and the bundle of a short run on it.

    Folders ``corpus`` and ``run/bundle`` below the one that is returned.
    """
    from genemodel.corpus.corpus import Corpus
    from genemodel.settings import parse
    from genemodel.simulation.cells import synthetic
    from genemodel.train.recipe import pretrain
    from genemodel.train.settings import PretrainSettings

    folder = tmp_path_factory.mktemp("small")
    cells = synthetic(
        240, species=("human",), n_genes=500, genes_per_cell=60, seed=1, vocabulary=small_vocabulary
    )["human"]
    Corpus.build([cells], folder / "corpus", vocabulary=small_vocabulary)
    pretrain(
        parse(
            PretrainSettings,
            {
                "corpus": str(folder / "corpus"),
                "out": str(folder / "run"),
                "tokens": {"context": 64, "budget": 512},
                "model": {"layers": 2, "width": 16, "heads": 2, "ffn": 16, "components": 4},
                "optim": {"lr": 3e-3, "warmup_steps": 1},
                "trainer": {
                    "max_steps": 4, "validate_every": 4, "validation_batches": 2,
                    "accelerator": "cpu",
                },
            },
        )
    )  # fmt: skip
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, mounted; skips where this is not allowed."""
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system cannot be mounted here: that takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def slurm(tmp_path):
    """Environment of a Slurm of one machine (``tests/slurm/bin``), whose notes lie in a folder.

    ``sbatch``, ``srun``, ``scontrol`` and ``scancel`` are on its ``PATH``; ``FAKE_SLURM`` is the
    folder with ``job.json``, ``calls.log`` and, while a step runs, ``tasks``.
    """
    folder = tmp_path / "slurm"
    folder.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    path = f"{REPOSITORY / 'tests' / 'slurm' / 'bin'}{os.pathsep}{clean['PATH']}"
    return clean | {"PATH": path, "FAKE_SLURM": str(folder)}


@pytest.fixture
def blank_report(monkeypatch):
    """Spare the drawing in tests that do not look at the page."""

    def blank(settings, *_):
        (Path(settings.out) / "report.html").touch()

    monkeypatch.setattr("genemodel.command.finetune._report", blank)
