"""Gene knowledge tables (families, networks, co-expression, promoters, protein vectors …).

A table is a text file: a gene id and the same number of values in every row, separated by tabs.
Those that ``genemodel knowledge build`` writes begin with what they were made from::

    # genemodel knowledge table 1
    # kind: family
    # input: gene_families.tsv.gz 193040 bytes sha256 a6309f3a…
    gene	v1	v2	…
    ENSG00000121410	0.1204	-0.3311	…

Rows stand in the order of the vocabulary's tokens, and a gene is known where it has a row. Genes
are named and not numbered, so a table holds for every vocabulary that has them: what grows a
vocabulary, or shares its tokens with another species, loses no knowledge.

Axes: V vocabulary, P numbers of a gene, N rows.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from genemodel.errors import ConfigError, DataError
from genemodel.genes.tables import decoded
from genemodel.genes.vocabulary import N_SPECIAL, GeneVocabulary
from genemodel.settings import did_you_mean
from genemodel.writing import write_text

MAGIC = "# genemodel knowledge table 1"
# Where `knowledge build` writes and `model.knowledge` looks names up, unless told otherwise.
FOLDER = "knowledge"
SUFFIXES = (".tsv.gz", ".tsv")
_DIGITS = 6  # of a value: float32 has no more than seven


@dataclass(frozen=True)
class KnowledgeTable:
    """Vectors of genes in vocabulary order.

    Attributes
    ----------
    table_VP
        One row a token, zero where unknown, float32.
    present_V
        Which tokens have a vector.
    provenance
        What the file says it was made from; empty for a plain table.
    """

    table_VP: np.ndarray
    present_V: np.ndarray
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_known(self) -> int:
        """Tokens with a vector."""
        return int(self.present_V.sum())

    @classmethod
    def read(cls, path: str | Path, vocabulary: GeneVocabulary) -> "KnowledgeTable":
        """Read a table for a vocabulary, centred and scaled over its known genes.

        A token shared by orthologs takes the mean over its genes. The columns of a plain table are
        scaled to unit variance each; a table of ``genemodel knowledge build``, whose columns are
        on one scale already and not alike important, is scaled as a whole. Tables of different
        origin thus enter alike.

        Raises
        ------
        DataError
            If the file is absent, ragged, not numeric, or knows no gene of the vocabulary.
        """
        raw = cls.read_raw(path, vocabulary)
        table, present = raw.table_VP, raw.present_V
        known_NP = table[present] - table[present].mean(0)
        if raw.provenance:
            spread = np.sqrt(np.mean(known_NP**2))
        else:
            spread = known_NP.std(0)
        table[present] = known_NP / np.where(spread > 0, spread, 1)
        return cls(table, present, raw.provenance)

    @classmethod
    def read_raw(cls, path: str | Path, vocabulary: GeneVocabulary) -> "KnowledgeTable":
        """Read a table for a vocabulary, its numbers as they are written; see :meth:`read`."""
        path = Path(path)
        if not path.is_file():
            raise DataError(
                f"No knowledge table at {path}: model.knowledge names files with a gene id and "
                "numbers in every row, separated by tabs."
            )
        genes = vocabulary.genes
        token_of = dict(zip(genes["ensembl_id"], genes["token"], strict=True))
        lines = decoded(path.read_bytes(), f"knowledge table {path}").splitlines()
        rows: list[np.ndarray] = []
        tokens: list[int] = []
        for number, line in enumerate(lines, start=1):
            gene, *values = line.split("\t")
            if gene not in token_of:
                continue
            try:
                row = np.array(values, np.float32)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: {error}. Every row is a gene id and numbers."
                ) from error
            if rows and row.size != rows[0].size:
                raise DataError(
                    f"{path}, line {number}: {row.size} values where earlier rows have "
                    f"{rows[0].size}. Every row needs as many."
                )
            if not np.isfinite(row).all():
                raise DataError(
                    f"{path}, line {number}: {gene} has a value that is not finite. Leave out "
                    "genes of which nothing is known."
                )
            rows.append(row)
            tokens.append(int(token_of[gene]))
        if not rows or rows[0].size == 0:
            raise DataError(
                f"{path} has a vector for none of the vocabulary's {len(genes):,} genes: rows "
                "begin with Ensembl gene ids of the vocabulary's species. A table with other names "
                "becomes one with `genemodel knowledge build kind=table`."
            )
        table = np.zeros((len(vocabulary), rows[0].size), np.float32)
        n_V = np.zeros(len(vocabulary))
        np.add.at(table, tokens, np.stack(rows))
        np.add.at(n_V, tokens, 1)
        present = n_V > 0
        table[present] /= n_V[present, None].astype(np.float32)
        return cls(table, present, _provenance(lines))

    def write(self, path: Path, vocabulary: GeneVocabulary) -> None:
        """Write the known genes in the order of their tokens; the same table, the same bytes."""
        text = io.StringIO()
        text.write(MAGIC + "\n")
        for key, value in self.provenance.items():
            text.writelines(f"# {key}: {line}\n" for line in value.split("\n"))
        width = self.table_VP.shape[1]
        text.write("\t".join(["gene", *(f"v{i + 1}" for i in range(width))]) + "\n")
        ids = vocabulary.token_ids()
        for token in np.flatnonzero(self.present_V):
            row = (f"{x:.{_DIGITS}g}" for x in self.table_VP[token].tolist())
            text.write("\t".join([ids[token], *row]) + "\n")
        write_text(path, text.getvalue())

    def shuffled(self, seed: int) -> "KnowledgeTable":
        """Return the control: the same vectors, dealt to the known genes at random.

        What a model still gains from it is gained by the numbers as such, not by what they say.
        """
        table = self.table_VP.copy()
        known = np.flatnonzero(self.present_V)
        known = known[known >= N_SPECIAL]
        table[known] = table[np.random.default_rng(seed).permutation(known)]
        return KnowledgeTable(
            table, self.present_V, {**self.provenance, "shuffled": f"genes permuted, seed {seed}"}
        )


def _provenance(lines: Sequence[str]) -> dict[str, str]:
    """Read the ``# key: value`` lines of a built table; nothing for a plain one."""
    if not lines or lines[0].rstrip() != MAGIC:
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        if not line.startswith("# "):
            break
        key, _, value = line[2:].partition(": ")
        found[key] = f"{found[key]}\n{value}" if key in found else value
    # A table that says nothing of itself is still one of ours.
    return found or {"kind": "unknown"}


def read_provenance(path: str | Path) -> dict[str, str]:
    """Say what a table was made from; nothing for a plain one."""
    return _provenance(decoded(Path(path).read_bytes(), f"knowledge table {path}").splitlines())


def file_digest(path: str | Path) -> str:
    """Sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(path: str | Path) -> str:
    """Name under which a model knows a table: its file's, without what follows the first dot."""
    return Path(path).name.split(".")[0]


def find_tables(names: Sequence[str], folder: str | Path = FOLDER) -> dict[str, Path]:
    """Find the file of every name: a path, or what ``folder`` calls so.

    Parameters
    ----------
    names
        Paths of files, or names of tables in ``folder`` (``family`` for ``family.tsv.gz``).
    folder
        Where names are looked up.

    Returns
    -------
    Key of the model -> file, in the order of ``names``.

    Raises
    ------
    ConfigError
        A name is unknown (the nearest one is said), or two tables have the same key.
    """
    folder = Path(folder)
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name).expanduser()
        if not path.is_file():
            there = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
            path = next((one for one in there if one.is_file()), path)
        if not path.is_file():
            known = tables_in(folder)
            listed = f"{folder} holds {', '.join(known)}" if known else f"{folder} holds none"
            raise ConfigError(
                f"model.knowledge: no table {name!r}{did_you_mean(name, known)}"
                f" It is neither a file nor the name of a table ({listed}). Make one with "
                "`genemodel knowledge build`, or set knowledge_dir."
            )
        key = key_of(path)
        if key in found:
            raise ConfigError(
                f"model.knowledge: {found[key]} and {path} would both be called {key!r} in the "
                "model: rename one of the files."
            )
        found[key] = path
    return found


def tables_in(folder: str | Path) -> list[str]:
    """Names of the tables of a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.name.endswith(SUFFIXES)]
    return sorted({name.removesuffix(".gz").removesuffix(".tsv") for name in names})
