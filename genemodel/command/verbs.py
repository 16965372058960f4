"""Settings and functions of the verbs that only carry library calls to the command line.

The bigger verbs (pre-training, embedding, evaluation) have theirs in their own rooms.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError, DataError
from genemodel.settings import ModelText, SpeciesText, did_you_mean, is_address

if TYPE_CHECKING:
    from genemodel.cells.sources import SourceFile


@dataclass(frozen=True, kw_only=True)
class SourceSettings(InputSettings):
    """How sources are read, the same for building and appending; see ``configs/corpus_*.yaml``."""

    input: tuple[str, ...] = ()
    sheet: Path | None = None
    batch_key: str | None = None
    donor_key: str | None = None
    label_key: str | None = None
    columns: dict[str, str] | None = None
    keep: tuple[str, ...] = ()
    min_genes: int = 0
    max_mito: float | None = None
    unknown_species: Literal["refuse", "drop"] = "refuse"
    chunk_cells: int = 8192
    group_cells: int = 65_536
    workers: int = 1
    engine: Literal["processes", "dask"] = "processes"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.input) == (self.sheet is not None):
            raise ConfigError(
                "give either input=[a.h5ad,b.h5ad] (patterns such as data/*.h5ad are expanded) "
                "or sheet=samples.tsv, a table with a row for each source"
            )


@dataclass(frozen=True, kw_only=True)
class CorpusBuildSettings(SourceSettings):
    """Settings of ``genemodel corpus build``, see ``configs/corpus_build.yaml``."""

    out: Path
    vocabulary: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class CorpusAppendSettings(SourceSettings):
    """Settings of ``genemodel corpus append``, see ``configs/corpus_append.yaml``."""

    corpus: Path


@dataclass(frozen=True)
class CorpusVerifySettings:
    """Settings of ``genemodel corpus verify``, see ``configs/corpus_verify.yaml``."""

    corpus: Path


@dataclass(frozen=True)
class CorpusDescribeSettings:
    """Settings of ``genemodel corpus describe``, see ``configs/corpus_describe.yaml``."""

    corpus: Path
    output: Path | None = None


# Columns of a sheet beside `path`; an empty field means what the settings say for all sources.
_SHEET_COLUMNS = (
    "name", "species", "layer", "column", "genome", "transpose", "allow_fractional",
    "batch_key", "donor_key", "label_key", "licence", "citation",
)  # fmt: skip
_YES_OR_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def build_corpus(settings: CorpusBuildSettings) -> str:
    """Build a corpus from files.

    Raises
    ------
    DataError
        A source cannot be read, is not raw counts or does not match; nothing is written.
    ConfigError
        The folder exists, or an option is impossible.
    """
    from genemodel.corpus.corpus import Corpus
    from genemodel.genes import GeneVocabulary

    corpus = Corpus.build(
        _sources(settings),
        settings.out,
        vocabulary=GeneVocabulary.read(settings.vocabulary) if settings.vocabulary else None,
        overwrite=settings.overwrite,
        **_options(settings),
    )
    return f"{corpus!r}\nLook at it with: genemodel corpus describe corpus={settings.out}"


def append_to_corpus(settings: CorpusAppendSettings) -> str:
    """Add files to a corpus; the cells that are there keep their numbers."""
    from genemodel.corpus.corpus import Corpus

    corpus = Corpus.open(settings.corpus)
    before = len(corpus)
    grown = corpus.append(_sources(settings), **_options(settings))
    return f"{len(grown) - before:,} cells added: {grown!r}"


def verify_corpus(settings: CorpusVerifySettings) -> str:
    """Check every file of a corpus.

    Raises
    ------
    DataError
        Something is broken; all of it is named.
    """
    from genemodel.corpus.corpus import verify_corpus as broken_in

    if broken := broken_in(settings.corpus):
        raise DataError(
            f"corpus {settings.corpus} is damaged:\n  "
            + "\n  ".join(broken)
            + "\nRestore these files from a copy, or build the corpus again."
        )
    return f"corpus {settings.corpus}: every file is as it was written"


def describe_corpus(settings: CorpusDescribeSettings) -> str:
    """Examine a corpus: sources, matched genes, depth, labels, what was dropped and why."""
    from genemodel.corpus.corpus import Corpus

    report = Corpus.open(settings.corpus).describe()
    if settings.output is None:
        return report.to_text()
    if not settings.output.resolve().parent.is_dir():
        raise ConfigError(f"output={settings.output}: its folder does not exist")
    report.to_html(settings.output)
    return f"{report.to_text()}\n\nWith plots: {settings.output}"


def _options(settings: SourceSettings) -> dict[str, Any]:
    """Give what Corpus.build and Corpus.append take under the same names."""
    given = {f.name: getattr(settings, f.name) for f in fields(SourceSettings)}
    return {name: value for name, value in given.items() if name not in ("input", "sheet")}


def _sources(settings: SourceSettings) -> "Sequence[str | SourceFile]":
    if settings.sheet is not None:
        return _sources_of_sheet(settings.sheet, settings)
    files: list[str] = []
    for pattern in settings.input:
        if is_address(pattern):
            files.append(pattern)
            continue
        # A file whose own name holds a bracket is not a pattern.
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not found and glob.has_magic(pattern):
            raise DataError(f"input: no file matches {pattern}")
        files += found or [pattern]
    return files


def _sources_of_sheet(sheet: Path, settings: SourceSettings) -> "list[SourceFile]":
    """Give the source of every row with the row's own options."""
    from genemodel.cells.obs_columns import SAID
    from genemodel.cells.sources import SourceFile
    from genemodel.genes.tables import read_table

    known = ("path", *_SHEET_COLUMNS, *SAID)
    table = read_table(sheet, "sheet of sources")
    for column in table.columns:
        if column not in known:
            raise DataError(
                f"sheet {sheet}: unknown column {column!r}{did_you_mean(column, known)} "
                f"It may have {', '.join(known)}"
            )
    if "path" not in table.columns:
        raise DataError(f"sheet {sheet}: has no column 'path'; it names the file of each source")
    found: list[SourceFile] = []
    for row in table.to_dict("records"):
        own: dict[str, Any] = {
            key: row.get(key) or getattr(settings, key, None) for key in _SHEET_COLUMNS
        }
        for key in ("transpose", "allow_fractional"):
            own[key] = _YES_OR_NO.get(str(own[key]).lower())
            if own[key] is None:
                raise DataError(f"sheet {sheet}: {key} is {row[key]!r}: write true or false")
        named = {"batch": "batch_key", "donor": "donor_key", "cell_type": "label_key"}
        columns = {column: own[key] for column, key in named.items() if own[key]}
        values = {column: str(row[column]) for column in SAID if row.get(column)}
        for column, key in named.items():
            if column in values and row.get(key):
                raise DataError(
                    f"sheet {sheet}: {row['path']} has {column} {values[column]!r}, for all its "
                    f"cells, and {key} {row[key]!r}, an obs column: leave one of them empty"
                )
        # Paths in a sheet are relative to the sheet, so that both can move together.
        path = row["path"]
        if not is_address(path):
            path = str(sheet.parent / Path(path).expanduser())
        found.append(
            SourceFile(
                path,
                layer=own["layer"],
                species=own["species"],
                columns={**(settings.columns or {}), **columns},
                keep=settings.keep,
                name=own["name"],
                allow_fractional=own["allow_fractional"],
                genome=own["genome"],
                transpose=own["transpose"],
                licence=own["licence"],
                citation=own["citation"],
                missing_labels=settings.missing_labels,
                column=own["column"],
                values=values,
            )
        )
    return found


@dataclass(frozen=True)
class SpeciesSettings:
    """Settings of ``genemodel species``, see ``configs/species.yaml``."""

    name: SpeciesText
    genes: Path
    orthologs: Path
    output: Path
    to: SpeciesText = "human"
    vocabulary: Path | None = None


def species(settings: SpeciesSettings) -> str:
    """Add a species to a vocabulary and write the grown vocabulary.

    Raises
    ------
    DataError
        A table cannot be read or does not fit, or ``output`` exists: corpora and models made with
        it would no longer agree with their vocabulary.
    """
    from genemodel.genes import add_species

    if settings.output.exists():
        raise DataError(
            f"output={settings.output} exists: corpora and models may rely on the vocabulary in "
            "it. Choose another name"
        )
    vocabulary, _ = add_species(
        name=settings.name,
        genes=settings.genes,
        orthologs=settings.orthologs,
        out=settings.output,
        to=settings.to,
        vocabulary=settings.vocabulary,
    )
    return f"{vocabulary!r} is in {settings.output}"


@dataclass(frozen=True)
class DescribeSettings:
    """Settings of ``genemodel describe``, see ``configs/describe.yaml``."""

    input: ModelText


def describe(settings: DescribeSettings) -> str:
    """Say what something made by genemodel holds: a corpus, any model, a vocabulary, knowledge.

    Raises
    ------
    DataError
        It is none of those, or it is damaged.
    """
    from genemodel.bundle.directory import CORPUS, PLACES, kind_of, refusal
    from genemodel.bundle.hub import local_model

    path = local_model(settings.input)
    kind = kind_of(path)
    if kind == CORPUS:
        return describe_corpus(CorpusDescribeSettings(path))
    if kind is not None:
        from genemodel.loading import load

        model = load(path, device="cpu")
        return f"{model.KIND} {path}\n{model.describe()}"
    if path.is_file() and path.name.endswith((".tsv", ".tsv.gz")):
        from genemodel.genes import GeneVocabulary
        from genemodel.genes.knowledge import read_provenance

        if about := read_provenance(path):
            return "\n".join([f"knowledge table {path}", *(f"{k}: {v}" for k, v in about.items())])
        vocabulary = GeneVocabulary.read(path)
        lines = [f"vocabulary {path}", repr(vocabulary)]
        return "\n".join([*lines, *(f"{k}: {v}" for k, v in vocabulary.provenance.items())])
    if not path.exists():
        raise DataError(f"input={path} does not exist")
    if any(kind_of(path / place) for place in PLACES):
        raise refusal(path)
    raise DataError(
        f"input={path} is no corpus (a folder with manifest.json), no model (a folder with "
        "model.json, such as runs/NAME/bundle, or what `genemodel finetune` wrote to OUT/model or "
        "OUT/imputation_model), no vocabulary and no knowledge table (.tsv.gz)"
    )
