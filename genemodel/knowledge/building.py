"""``genemodel knowledge build``: from tables, sequences or a corpus to a table of gene vectors."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

import genemodel
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.genes.knowledge import FOLDER, KnowledgeTable, file_digest
from genemodel.genes.orthologs import ortholog_means
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.knowledge import factors, sources
from genemodel.knowledge.coexpression import coexpression
from genemodel.knowledge.promoters import promoters, starts
from genemodel.settings import PathText, SpeciesText, check_seed, some, to_values
from genemodel.train.settings import HoldoutSettings

logger = logging.getLogger(__name__)

# Of a built table, unless told otherwise: as many as a tiny model is half as wide.
DIMENSIONS = 64
_FILES = ("family", "grn", "pathway", "interactome", "table")

type Kind = Literal["family", "grn", "coexpression", "pathway", "interactome", "promoter", "table"]


@dataclass(frozen=True)
class KnowledgeBuildSettings:
    """Settings of ``genemodel knowledge build``, see ``configs/knowledge_build.yaml``.

    Attributes
    ----------
    kind
        What the input is, and so how it becomes vectors.
    input
        Files; for ``coexpression`` the folder of a corpus, for ``promoter`` one FASTA file.
    name
        Of the table; ``model.knowledge`` knows it by this. Default: the kind.
    knowledge_dir
        Folder in which it is written, as ``NAME.tsv.gz``.
    vocabulary
        Whose genes are wanted: a file; default: the corpus's, or the built-in one.
    species
        Whose genes the input names.
    dimensions
        Numbers of a gene; default 64, or all columns of a table.
    method
        Of ``family`` and ``pathway``: ``svd``, ``random`` (signs), or ``auto``: signs for
        families, which hardly overlap, singular vectors for pathways.
    columns
        Column of each role where names do not say it: ``gene``, ``group``, ``source``, ``target``,
        ``weight``, ``chrom``, ``tss``, ``strand``.
    starts
        Of ``promoter``: table of where genes start.
    upstream, downstream, kmer
        Of ``promoter``: bases before and behind the start, and the length of a word.
    cells
        Of ``coexpression``: most cells looked at.
    holdout
        Of ``coexpression``: cells left out, as pre-training does; give both the same.
    orthologs, to
        Table of orthologs of ``to``: genes of other species that share no token with one get the
        mean of their orthologs' vectors.
    min_fraction
        Smallest share of the names that must be genes of the vocabulary.
    overwrite
        Replace a table that is there.
    seed
        Of draws and decompositions.
    """

    kind: Kind
    input: tuple[PathText, ...]
    name: str = ""
    knowledge_dir: PathText = FOLDER
    vocabulary: Path | None = None
    species: SpeciesText = "human"
    dimensions: int | None = None
    method: Literal["auto", "svd", "random"] = "auto"
    columns: dict[str, str] | None = None
    starts: Path | None = None
    upstream: int = 500
    downstream: int = 2000
    kmer: int = 5
    cells: int = 50_000
    holdout: HoldoutSettings = field(default_factory=HoldoutSettings)
    orthologs: Path | None = None
    to: SpeciesText = "human"
    min_fraction: float = 0.05
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not self.input:
            raise ConfigError("input is empty: name the files that the knowledge is made from")
        if self.kind in ("coexpression", "promoter", "table") and len(self.input) > 1:
            raise ConfigError(
                f"input names {len(self.input)} files, but kind={self.kind} is made from one"
            )
        if self.dimensions is not None and self.dimensions < 2:
            raise ConfigError(f"dimensions is {self.dimensions}: it must be at least 2")
        if (self.starts is not None) != (self.kind == "promoter"):
            raise ConfigError(
                "kind=promoter needs starts=TABLE, a table of where genes start"
                if self.kind == "promoter"
                else f"starts is read for kind=promoter only, not for kind={self.kind}"
            )
        if not 1 <= self.kmer <= 8:  # 4⁸ = 65,536 numbers a gene
            raise ConfigError(f"kmer is {self.kmer}: it must be from 1 to 8")
        if self.upstream < 0 or self.downstream < 0 or self.upstream + self.downstream < self.kmer:
            raise ConfigError(
                f"upstream={self.upstream} and downstream={self.downstream}: neither may be "
                f"negative, and together they must hold a word of {self.kmer} bases"
            )
        if self.cells < 1:
            raise ConfigError(f"cells is {self.cells}: it must be at least 1")
        if not 0 <= self.min_fraction <= 1:
            raise ConfigError(f"min_fraction is {self.min_fraction}: it is a share, from 0 to 1")
        if "/" in self.name or "." in self.name:
            raise ConfigError(
                f"name={self.name}: it is a word, without slash or dot; knowledge_dir says where"
            )

    @property
    def path(self) -> Path:
        """Where the table is written."""
        return Path(self.knowledge_dir) / f"{self.name or self.kind}.tsv.gz"


def run_build(settings: KnowledgeBuildSettings) -> str:
    """Build a table and say what is in it; the verb."""
    table = build_knowledge(settings)
    return (
        f"{settings.path}: {table.n_known:,} genes known, {table.table_VP.shape[1]} numbers each; "
        f"{table.provenance['made']}\n"
        f"Use it with: genemodel pretrain 'model.knowledge=[{settings.name or settings.kind}]' "
        f"knowledge_dir={settings.knowledge_dir} …"
    )


def build_knowledge(settings: KnowledgeBuildSettings) -> KnowledgeTable:
    """Build a table of gene vectors and write it.

    Parameters
    ----------
    settings
        See :class:`KnowledgeBuildSettings`.

    Returns
    -------
    The table, in the order of the vocabulary, with its mask and provenance.

    Raises
    ------
    DataError
        An input cannot be read, or names no gene of the vocabulary.
    ConfigError
        The table is there already, or a setting is impossible.
    """
    path = settings.path
    if path.exists() and not settings.overwrite:
        raise ConfigError(
            f"{path} exists: models may be trained with it. Choose another name=, or set "
            "overwrite=true"
        )
    corpus = Corpus.open(settings.input[0]) if settings.kind == "coexpression" else None
    vocabulary = _vocabulary(settings, corpus)
    if corpus is not None and not vocabulary.extends(corpus.vocabulary):
        raise DataError(
            f"vocabulary={settings.vocabulary} is not that of corpus {corpus.path}: leave it out"
        )
    table_VP, known_V, made, said = _vectors(settings, vocabulary, corpus)
    for line in said:
        logger.info("%s.", line)
    reached = ""
    if settings.orthologs is not None:
        before = int(known_V.sum())
        table_VP, known_V = _through_orthologs(settings, vocabulary, table_VP, known_V)
        reached = f"; {int(known_V.sum()) - before:,} more through orthologs of {settings.to}"
    about = _provenance(settings, vocabulary, made + reached, corpus)
    table = KnowledgeTable(np.asarray(table_VP, np.float32), known_V, about)
    table.write(path, vocabulary)
    return table


def _vocabulary(settings: KnowledgeBuildSettings, corpus: Corpus | None) -> GeneVocabulary:
    if settings.vocabulary is not None:
        return GeneVocabulary.read(settings.vocabulary)
    return GeneVocabulary.builtin() if corpus is None else corpus.vocabulary


def _vectors(
    settings: KnowledgeBuildSettings, vocabulary: GeneVocabulary, corpus: Corpus | None
) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
    """Vectors, mask, how they were made, and what was matched."""
    kind, n_tokens, seed = settings.kind, len(vocabulary), settings.seed
    dimensions = settings.dimensions or DIMENSIONS
    if corpus is not None:
        from genemodel.train.recipe import split  # brings what trains

        cells, _ = split(settings.holdout, corpus, str(corpus.path))
        table, known, made = coexpression(
            corpus, cells, dimensions, sample=settings.cells, seed=seed
        )
        wide = np.zeros((n_tokens, dimensions), np.float32)
        wide[: len(table)] = table
        known_V = np.zeros(n_tokens, bool)
        known_V[: len(known)] = known
        return wide, known_V, made, []
    match = sources.matcher(vocabulary, settings.species, settings.min_fraction)
    columns = sources.Columns(settings.columns or {})
    if kind in ("family", "pathway"):
        member, names, said = (
            sources.families(settings.input, match, columns, n_tokens)
            if kind == "family"
            else sources.gene_sets(settings.input, match, n_tokens)
        )
        method = settings.method
        if method == "auto":
            method = "random" if kind == "family" else "svd"
        table, known, made = factors.of_sets(member, names, dimensions, method, seed)
        return table, known, f"{len(names):,} sets, {made}", said
    if kind in ("grn", "interactome"):
        weight, said = sources.edges(settings.input, match, columns, n_tokens)
        table, known, made = factors.of_edges(weight, dimensions, directed=kind == "grn", seed=seed)
        return table, known, f"{weight.nnz:,} edges, {made}", said
    if kind == "table":
        table, known, said = sources.vectors(settings.input[0], match, columns, n_tokens)
        spread = table[known].std(0)
        table[known] = (table[known] - table[known].mean(0)) / np.where(spread > 0, spread, 1)
        made = f"{table.shape[1]} columns of a table"
        if settings.dimensions is not None and settings.dimensions < table.shape[1]:
            table, made = _components(table, known, settings.dimensions, seed, made)
        return table, known, made, said
    assert settings.starts is not None
    genes, share_NK = promoters(
        settings.input[0], starts(str(settings.starts), columns), k=settings.kmer,
        upstream=settings.upstream, downstream=settings.downstream,
    )  # fmt: skip
    found = match(genes)
    table = np.zeros((n_tokens, share_NK.shape[1]), np.float32)
    kept = found.token_R >= 0
    n_V = np.bincount(found.token_R[kept], minlength=n_tokens)
    np.add.at(table, found.token_R[kept], share_NK[kept])
    table /= np.maximum(n_V, 1)[:, None].astype(np.float32)
    made = (
        f"{settings.kmer}-mers from {settings.upstream:,} bases before to "
        f"{settings.downstream:,} behind the start"
    )
    table, made = _components(table, n_V > 0, dimensions, seed, made)
    return table, n_V > 0, made, [found.said]


def _components(
    table_VP: np.ndarray, known_V: np.ndarray, dimensions: int, seed: int, made: str
) -> tuple[np.ndarray, str]:
    """Principal components of the known genes."""
    from genemodel.expression.components import principal_components

    known_NP = table_VP[known_V]
    total = float(known_NP.var(0).sum())
    score_NK = principal_components(known_NP, dimensions, seed)
    wide = np.zeros((len(table_VP), dimensions), np.float32)
    wide[known_V, : score_NK.shape[1]] = score_NK
    kept = float(score_NK.var(0).sum()) / max(total, 1e-30)
    return wide, f"{made}, principal components with {kept:.1%} of the variance"


def _through_orthologs(
    settings: KnowledgeBuildSettings,
    vocabulary: GeneVocabulary,
    table_VP: np.ndarray,
    known_V: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Let genes of other species that are not known take the mean of their known orthologs."""
    assert settings.orthologs is not None
    to = vocabulary.species[vocabulary.species_code(settings.to)]
    refused: list[DataError] = []
    known = known_V.copy()
    others = [name for name in vocabulary.species if name != to]
    for name in others:
        try:
            weight_VV = ortholog_means(vocabulary, name, settings.orthologs, to)
        except DataError as error:  # the table may be of one species of several
            refused.append(error)
            continue
        share_V = weight_VV @ known_V.astype(np.float32)
        new = np.flatnonzero((share_V > 0) & ~known)
        table_VP[new] = (weight_VV[new] @ table_VP) / share_V[new, None]
        known[new] = True
    if others and len(refused) == len(others):
        raise refused[0]
    return table_VP, known


def _provenance(
    settings: KnowledgeBuildSettings,
    vocabulary: GeneVocabulary,
    made: str,
    corpus: Corpus | None,
) -> Mapping[str, str]:
    files = [*settings.input, settings.starts, settings.orthologs]
    lines = (
        [f"corpus {corpus.path.name} {corpus.fingerprint}"]
        if corpus is not None
        else [
            f"{Path(path).name} {Path(path).stat().st_size} bytes sha256 {file_digest(path)}"
            for path in files
            if path is not None
        ]
    )
    defaults = {
        f: v for f, v in to_values(settings).items()
        if f not in ("input", "knowledge_dir", "vocabulary", "starts", "orthologs", "overwrite")
    }  # fmt: skip
    return {
        "kind": settings.kind,
        "made": made,
        "input": "\n".join(lines),
        "settings": some([f"{k}={v}" for k, v in defaults.items() if v not in (None, "")], 30),
        "vocabulary": vocabulary.fingerprint,
        "genemodel": genemodel.__version__,
    }
