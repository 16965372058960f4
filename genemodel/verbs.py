"""Settings and functions of the verbs that only carry library calls to the command line.

The bigger verbs (pre-training, embedding, evaluation) have theirs in their own rooms.
"""

from dataclasses import dataclass
from pathlib import Path

from genemodel.errors import DataError


@dataclass(frozen=True)
class SpeciesSettings:
    """Settings of ``genemodel species``, see ``configs/species.yaml``."""

    name: str
    genes: Path
    orthologs: Path
    out: Path
    to: str = "human"
    vocabulary: Path | None = None


def species(settings: SpeciesSettings) -> str:
    """Add a species to a vocabulary and write the grown vocabulary.

    Raises
    ------
    DataError
        A table cannot be read or does not fit, or ``out`` exists: corpora and models made with it
        would no longer agree with their vocabulary.
    """
    from genemodel.genes import add_species

    if settings.out.exists():
        raise DataError(
            f"out={settings.out} exists: corpora and models may rely on the vocabulary in it. "
            "Choose another name"
        )
    vocabulary, _ = add_species(
        name=settings.name,
        genes=settings.genes,
        orthologs=settings.orthologs,
        out=settings.out,
        to=settings.to,
        vocabulary=settings.vocabulary,
    )
    return f"{vocabulary!r} is in {settings.out}"


@dataclass(frozen=True)
class DescribeSettings:
    """Settings of ``genemodel describe``, see ``configs/describe.yaml``."""

    path: Path


def describe(settings: DescribeSettings) -> str:
    """Say what a folder made by genemodel holds.

    Raises
    ------
    DataError
        It is neither a bundle nor a vocabulary, or it is damaged.
    """
    path = settings.path
    if (path / "bundle.json").is_file():
        from genemodel.bundle.bundle import Bundle

        return f"model {path}\n{Bundle.load(path, device='cpu').describe()}"
    if path.is_file() and path.name.endswith((".tsv", ".tsv.gz")):
        from genemodel.genes import GeneVocabulary

        vocabulary = GeneVocabulary.read(path)
        lines = [f"vocabulary {path}", repr(vocabulary)]
        return "\n".join([*lines, *(f"{k}: {v}" for k, v in vocabulary.provenance.items())])
    if not path.exists():
        raise DataError(f"path={path} does not exist")
    raise DataError(
        f"path={path} is neither a model (a folder with bundle.json, such as runs/NAME/bundle) nor "
        "a vocabulary (.tsv.gz)"
    )
