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
        A table cannot be read or does not fit, or another vocabulary stands at ``out``: corpora and
        models made with it would no longer agree with their vocabulary.
    """
    from genemodel.genes import GeneVocabulary, add_species

    known = (
        GeneVocabulary.builtin()
        if settings.vocabulary is None
        else GeneVocabulary.read(settings.vocabulary)
    )
    grown, report = add_species(
        known, settings.name, settings.genes, settings.orthologs, to=settings.to
    )
    if settings.out.exists() and GeneVocabulary.read(settings.out) != grown:
        raise DataError(
            f"out={settings.out} exists and holds another vocabulary, which corpora and models may "
            "rely on; choose another name"
        )
    grown.save(settings.out)
    return f"{report}\nWritten to {settings.out}; use it with vocabulary={settings.out}"
