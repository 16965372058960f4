"""The gene vocabulary: which gene of which species is which token.

One row of the table is one gene; genes of different species share a token only when they are
one-to-one orthologs. The order of the table is part of its identity: species in the order in which
they were added (the position is the species code that the model sees), tokens ascending within a
species, new tokens numbered on from the last one. A species can therefore be added without moving
a token that a trained model already knows.
"""

import functools
import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from genemodel.errors import DataError
from genemodel.genes.species import species_name
from genemodel.genes.tables import COLUMNS, decoded
from genemodel.writing import write_text

if TYPE_CHECKING:
    from genemodel.genes.match import GeneMatch, SpeciesIndex
    from genemodel.genes.orthologs import SpeciesReport

log = logging.getLogger(__name__)

PAD = 0
MASK = 1
CELL = 2
N_SPECIAL = 3
# Where a published model closes its cells with a token: the first row of its vocabulary, a gene
# that no file has, because its name is "<eos>".
EOS = 3
SPECIAL_NAMES = ("<pad>", "<mask>", "<cell>")

_MAGIC = "# genemodel gene vocabulary 1"
_FIELD = re.compile(r"[\t\r\n]")

# Accepted fraction and number of matched genes, see GeneVocabulary.match.
MIN_FRACTION = 0.3
MIN_GENES = 50


class GeneVocabulary:
    """An ordered table of genes and tokens.

    Tokens 0, 1 and 2 are ``<pad>``, ``<mask>`` and ``<cell>``; genes begin at ``N_SPECIAL``.

    Parameters
    ----------
    rows
        Columns token, species, ensembl_id, symbol, biotype, aliases (``|``-separated), in table
        order. Row ``i`` is reported as line ``first_line + i`` when it is refused.
    provenance
        What the table was made from: single-line strings, kept in the file's header and not part
        of the fingerprint.
    where
        Begins every refusal; the path when the table was read from a file.
    first_line
        Line number of the first row in that file.

    Raises
    ------
    DataError
        The rows break the order (see the module's first lines), repeat an id, or leave a gap in the
        tokens.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        *,
        provenance: Mapping[str, str] | None = None,
        where: str = "gene vocabulary",
        first_line: int = 1,
    ) -> None:
        missing = [c for c in COLUMNS if c not in rows.columns]
        if missing:
            raise DataError(f"{where}: no column {', '.join(missing)}; need {', '.join(COLUMNS)}")
        if not len(rows):
            raise DataError(f"{where}: holds no gene")
        self._text: dict[str, list[str]] = {
            c: list(map(str, rows[c].tolist())) for c in COLUMNS if c != "token"
        }
        self._provenance = MappingProxyType(dict(provenance or {}))
        try:
            token = rows["token"].to_numpy().astype(np.int64)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: tokens must be whole numbers ({error})") from error
        code, names = pd.factorize(np.asarray(self._text["species"], dtype=object))
        self._species: tuple[str, ...] = tuple(map(str, names))
        self._code = code.astype(np.int16)
        _check_rows(token, self._code, self._text, where, first_line)
        self._token = token.astype(np.int32)
        self._size = int(self._token.max()) + 1
        self._indices: dict[str, SpeciesIndex] = {}

    # -- identity ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return V, the number of tokens including the special ones."""
        return self._size

    def __repr__(self) -> str:
        """Name size, species and the beginning of the fingerprint."""
        parts = ", ".join(f"{s} {len(self.tokens_of(s)):,} genes" for s in self._species)
        return f"GeneVocabulary({len(self):,} tokens; {parts}; {self.fingerprint[:12]})"

    def __eq__(self, other: object) -> bool:
        """Vocabularies are equal when their ordered tables are."""
        return isinstance(other, GeneVocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        """Hash of the fingerprint."""
        return hash(self.fingerprint)

    def __getstate__(self) -> dict[str, object]:
        """Leave the lookup tables behind: they are rebuilt where they are needed."""
        return {**self.__dict__, "_indices": {}, "_provenance": dict(self._provenance)}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore what ``__getstate__`` kept."""
        provenance = state.pop("_provenance")
        self.__dict__.update(state)
        if not isinstance(provenance, dict):
            raise DataError("gene vocabulary: the pickled provenance is not a mapping")
        self._provenance = MappingProxyType(provenance)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the ordered table."""
        return hashlib.sha256(self._body().encode()).hexdigest()

    @property
    def species(self) -> tuple[str, ...]:
        """Species in the order in which they were added: the position is the species code."""
        return self._species

    @property
    def provenance(self) -> Mapping[str, str]:
        """What the table was made from (read-only)."""
        return self._provenance

    def extends(self, other: "GeneVocabulary") -> bool:
        """Whether every gene of `other` has the same token and species code here.

        Symbols and aliases may differ: a model trained with `other` can use this vocabulary.
        """
        n = len(other._token)
        return (
            len(self._token) >= n
            and self._species[: len(other._species)] == other._species
            and bool(np.array_equal(self._token[:n], other._token))
            and bool(np.array_equal(self._code[:n], other._code))
            and self._text["ensembl_id"][:n] == other._text["ensembl_id"]
        )

    # -- contents ---------------------------------------------------------------------------------

    @property
    def genes(self) -> pd.DataFrame:
        """A copy of the table: token, species, ensembl_id, symbol, biotype, aliases."""
        return pd.DataFrame({"token": self._token, **self._text})[list(COLUMNS)]

    def species_code(self, species: str) -> int:
        """Position of a species (short or Latin name) in `species`; unknown ones are refused."""
        name = species_name(species)
        if name not in self._species:
            raise DataError(
                f"species {species!r} is not in this vocabulary, which holds "
                f"{', '.join(self._species)}. Add it from a gene table and an ortholog table with "
                f"`genemodel species name={name} genes=... orthologs=... to={self._species[0]} "
                "output=...` or GeneVocabulary.with_species"
            )
        return self._species.index(name)

    def tokens_of(self, species: str) -> npt.NDArray[np.int32]:
        """Tokens of one species, ascending, int32."""
        return self._token[self._code == self.species_code(species)].copy()

    def token_names(self) -> list[str]:
        """One name per token, length V: the symbol in the first species that has the gene."""
        names = [*SPECIAL_NAMES, *([""] * (len(self) - N_SPECIAL))]
        for token, symbol in zip(self._token.tolist(), self._text["symbol"], strict=True):
            names[token] = names[token] or symbol
        return names

    def token_ids(self) -> list[str]:
        """One Ensembl id per token, length V: that of the first species that has the gene."""
        names = [*SPECIAL_NAMES, *([""] * (len(self) - N_SPECIAL))]
        for token, gene in zip(self._token.tolist(), self._text["ensembl_id"], strict=True):
            names[token] = names[token] or gene
        return names

    def species_rows(self, species: str) -> dict[str, Sequence[str] | npt.NDArray[np.int32]]:
        """Columns of one species' genes as arrays and lists, in token order."""
        (at,) = np.nonzero(self._code == self.species_code(species))
        part = slice(int(at[0]), int(at[-1]) + 1)
        return {"token": self._token[part], **{k: v[part] for k, v in self._text.items()}}

    # -- matching ---------------------------------------------------------------------------------

    def index(self, species: str) -> "SpeciesIndex":
        """Lookup tables of one species, built on first use and kept."""
        from genemodel.genes.match import SpeciesIndex

        name = self._species[self.species_code(species)]
        if name not in self._indices:
            self._indices[name] = SpeciesIndex.build(name, self.species_rows(name))
        return self._indices[name]

    def match(
        self,
        names: pd.DataFrame | Iterable[str],
        *,
        species: str,
        column: str | None = None,
        min_fraction: float = MIN_FRACTION,
        min_genes: int = MIN_GENES,
        among: Sequence[str] = (),
    ) -> "GeneMatch":
        """Find the token of every gene of one file.

        Accepts Ensembl ids with or without version, symbols in any case, old ids and aliases, or a
        mixture. For each name the first that knows it decides: id, symbol as written, symbol
        ignoring case, alias. A name that fits two genes is reported as ambiguous, never guessed.
        In a reference of several species (``GRCh38_TP53``, ``mm10_Trp53``) only the genes of
        `species` are looked at.

        Parameters
        ----------
        names
            Gene names, or the ``var`` table of an AnnData.
        species
            Short or Latin name.
        column
            Column of the ``var`` table to use, ``"index"`` for its index. By default the index and
            the usual columns are tried and the one with most genes matched is used.
        min_fraction
            Smallest accepted share of the names that are genes of the vocabulary.
        min_genes
            Smallest accepted number of them (all names, where the file has fewer).
        among
            All species of the file, where it joins several. A name that is not found and that one
            of the others writes so is then a gene of that one, and does not count against the
            match.

        Returns
        -------
        GeneMatch

        Raises
        ------
        DataError
            The species or column is unknown, too few names match, or they are plainly the names of
            another species' genes.
        """
        from genemodel.genes.match import match

        return match(
            self,
            names,
            species=species,
            column=column,
            min_fraction=min_fraction,
            min_genes=min_genes,
            among=among,
        )

    # -- growing ----------------------------------------------------------------------------------

    def with_species(
        self, name: str, genes: str | Path, orthologs: str | Path, to: str = "human"
    ) -> "GeneVocabulary":
        """Vocabulary with one more species; no existing token moves.

        See :func:`add_species` for the two tables and for a report.
        """
        from genemodel.genes.orthologs import extend

        return extend(self, name, genes, orthologs, to)[0]

    # -- files ------------------------------------------------------------------------------------

    def _body(self) -> str:
        lines = ["\t".join(COLUMNS)]
        tokens = map(str, self._token.tolist())
        lines += map("\t".join, zip(tokens, *(self._text[c] for c in COLUMNS[1:]), strict=True))
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the table; gzipped when the name ends in ``.gz``. Same table, same bytes."""
        header = [_MAGIC, *(f"# {k}: {v}" for k, v in sorted(self._provenance.items()))]
        header.append(f"# sha256: {self.fingerprint}")
        write_text(Path(path), "\n".join(header) + "\n" + self._body())

    @classmethod
    def read(cls, path: str | Path) -> "GeneVocabulary":
        """Read a table written by :meth:`save`.

        Files of the same bytes give the same object: corpora and models that are opened together
        mostly have one vocabulary, and checking 60,000 rows takes longer than reading them.

        Raises
        ------
        DataError
            The file is missing, damaged, of another kind, or a row is out of order or duplicated;
            the message names the line.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"gene vocabulary {path} cannot be read: {error.strerror or error}"
            ) from error
        return _read(_Written(data, f"gene vocabulary {path}"))

    @classmethod
    def _parse(cls, data: bytes, where: str) -> Self:
        lines = decoded(data, where).split("\n")
        if lines[0].rstrip() != _MAGIC:
            raise DataError(
                f"{where}: is not a genemodel vocabulary (first line {lines[0][:60]!r}, expected "
                f"{_MAGIC!r}); make one with `genemodel species` or GeneVocabulary.save"
            )
        header: dict[str, str] = {}
        start = 1
        while start < len(lines) and lines[start].startswith("# "):
            key, _, value = lines[start][2:].partition(": ")
            header[key] = value
            start += 1
        declared = header.pop("sha256", None)
        if start >= len(lines) or tuple(lines[start].split("\t")) != COLUMNS:
            raise DataError(f"{where}: line {start + 1} must be the header {' '.join(COLUMNS)}")
        if lines[-1]:
            raise DataError(
                f"{where}: line {len(lines)} is cut off (no end of line): the file is incomplete"
            )
        rows = [line.split("\t") for line in lines[start + 1 : -1]]
        first_line = start + 2
        for offset, row in enumerate(rows):
            if len(row) != len(COLUMNS) or not row[0].isdecimal():
                raise DataError(
                    f"{where}: line {first_line + offset} is not a row of {len(COLUMNS)} "
                    f"tab-separated fields that begins with a token: {chr(9).join(row)[:80]!r}"
                )
        table = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)
        vocabulary = cls(table, provenance=header, where=where, first_line=first_line)
        if declared is not None and declared != vocabulary.fingerprint:
            raise DataError(
                f"{where}: its rows do not agree with the sha256 in its header: the file was "
                "changed after it was written; take it from its source again"
            )
        return vocabulary

    @classmethod
    def builtin(cls) -> "GeneVocabulary":
        """Return the human and mouse vocabulary shipped with genemodel (read once per process)."""
        return _builtin()


@dataclass(frozen=True)
class _Written:
    """The bytes of a table; equal to any other with the same, wherever it lies."""

    data: bytes
    where: str = field(compare=False)


# A model and a corpus, of before and after.
@functools.lru_cache(maxsize=2)
def _read(written: _Written) -> GeneVocabulary:
    return GeneVocabulary._parse(written.data, written.where)


@functools.lru_cache(maxsize=1)
def _builtin() -> GeneVocabulary:
    packaged = resources.files("genemodel.genes") / "data" / "human_mouse.tsv.gz"
    return GeneVocabulary._parse(packaged.read_bytes(), "built-in gene vocabulary")


def _check_rows(
    token: npt.NDArray[np.int64],
    code: npt.NDArray[np.int16],
    text: dict[str, list[str]],
    where: str,
    first_line: int,
) -> None:
    """Refuse rows that are out of order, repeated or leave a gap; name the line."""

    def refuse(at: int, why: str) -> None:
        raise DataError(
            f"{where}: line {first_line + at} "
            f"({text['species'][at]} {text['ensembl_id'][at] or '(no id)'}): {why}"
        )

    for column in ("species", "ensembl_id"):
        if "" in text[column]:
            refuse(text[column].index(""), f"empty {column}")
    for column, values in text.items():
        # One search through the joined column is far cheaper than one per field.
        if _FIELD.search("\x00".join(values)):
            at = next(i for i, value in enumerate(values) if _FIELD.search(value))
            refuse(at, f"{column} contains a tab or a line break")
    same_species = code[1:] == code[:-1]
    if (code[1:] < code[:-1]).any():
        refuse(
            int(np.argmax(code[1:] < code[:-1])) + 1,
            "the species does not follow on: all genes of a species must stand together",
        )
    bad = same_species & (token[1:] <= token[:-1])
    if bad.any():
        at = int(np.argmax(bad)) + 1
        refuse(at, f"token {token[at]} is not above the token {token[at - 1]} of the line before")
    if (token < N_SPECIAL).any():
        at = int(np.argmax(token < N_SPECIAL))
        refuse(at, f"token {token[at]} belongs to the special tokens; genes begin at {N_SPECIAL}")
    highest = np.maximum.accumulate(np.concatenate([[N_SPECIAL - 1], token[:-1]]))
    gap = token > highest + 1
    if gap.any():
        at = int(np.argmax(gap))
        refuse(at, f"token {token[at]} leaves a gap; the next new token is {highest[at] + 1}")
    ids = text["ensembl_id"]
    if len(set(ids)) != len(ids):
        seen: dict[str, int] = {}
        for at, gene in enumerate(ids):
            if gene in seen:
                refuse(at, f"the id stands already on line {first_line + seen[gene]}")
            seen[gene] = at


def add_species(
    *,
    name: str,
    genes: str | Path,
    orthologs: str | Path,
    out: str | Path,
    to: str = "human",
    vocabulary: "str | Path | GeneVocabulary | None" = None,
) -> "tuple[GeneVocabulary, SpeciesReport]":
    """Add a species to a vocabulary and write the result.

    Parameters
    ----------
    name
        Short or Latin name of the new species.
    genes
        Table (tsv or csv, plain or gzipped) with columns ``ensembl_id``, ``symbol`` and, if
        possible, ``biotype``. Protein-coding, IG/TR, miRNA and mitochondrial genes are kept; all
        genes, where no biotype is given.
    orthologs
        Table of pairs: ids or symbols of `to` (``human_ensembl``, ``human_symbol``) and of the new
        species (``target_ensembl``, ``target_symbol``, or ``<name>_...``); a table of two columns
        needs no such names. A column ``species`` selects rows, ``n_support`` weighs rival
        predictions, ``orthology_type`` restricts sharing to ``ortholog_one2one``. The HCOP and
        Ensembl downloads fit.
    out
        Vocabulary to write (``.tsv`` or ``.tsv.gz``).
    to
        The species of the vocabulary that the orthologs are given for.
    vocabulary
        Vocabulary to extend; the built-in one by default.

    Returns
    -------
    tuple
        The new vocabulary, which ``extends`` the old one, and the :class:`SpeciesReport`.

    Raises
    ------
    DataError
        A table is missing, damaged, lacks a column or names no known gene; the species is there
        already; `to` is not.
    """
    from genemodel.genes.orthologs import extend

    if vocabulary is None:
        vocabulary = GeneVocabulary.builtin()
    elif not isinstance(vocabulary, GeneVocabulary):
        vocabulary = GeneVocabulary.read(vocabulary)
    extended, report = extend(vocabulary, name, genes, orthologs, to)
    extended.save(out)
    return extended, report
