"""Finding the token of every gene of a file, and saying honestly what was not found."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.genes.species import ASSEMBLY_PREFIX, SPECIES, assembly_species

if TYPE_CHECKING:
    from genemodel.genes.vocabulary import GeneVocabulary

log = logging.getLogger(__name__)

# What scanpy ("-1"), pandas and R (".1") append to a name that was there before.
APPENDED = re.compile(r"^(.+)[-._](\d{1,3})$")
# Columns of `var` in which gene names are usually kept, besides its index.
USUAL_COLUMNS = (
    "gene_ids",
    "gene_id",
    "ensembl_id",
    "ensembl_ids",
    "ensembl",
    "feature_id",
    "gene_symbol",
    "gene_symbols",
    "feature_name",
    "gene_name",
    "gene_names",
    "symbol",
    "_index",
)
# What a name was recognised by, in order of precedence; position + 1 is its code in `how_G`.
KINDS = ("id", "symbol", "symbol (case ignored)", "alias")

_VERSIONED = re.compile(r"^((?:ens[a-z]*g|wbgene|fbgn)\d+)(?:\.\d+)?(?:_par_y)?$")
_EMBEDDED = re.compile(r"(?<![a-z0-9])(ens[a-z]*g\d{11})(?![0-9])")
_TRANSCRIPT = re.compile(r"^(?:ENS[A-Z]*[TP]\d{11}|[NX][MRP]_\d+)", re.IGNORECASE)
_AMBIGUOUS = -2
_UNKNOWN = -1
_MANY = 0.5
_CLEARLY_MORE = 0.02
_EXAMPLES = 5


@dataclass(frozen=True)
class SpeciesIndex:
    """Lookup tables of one species: lower-cased name -> row, ``-2`` where two genes share it."""

    species: str
    token_R: npt.NDArray[np.int32]
    ids: Sequence[str]
    symbols: Sequence[str]
    by_id: dict[str, int]
    by_symbol: dict[str, int]
    by_lowered: dict[str, int]
    by_alias: dict[str, int]
    by_lowered_alias: dict[str, int]

    @classmethod
    def build(cls, species: str, rows: dict[str, Any]) -> "SpeciesIndex":
        """Make the tables from :meth:`GeneVocabulary.species_rows`."""
        ids, symbols = rows["ensembl_id"], rows["symbol"]
        by_id = {gene.lower(): row for row, gene in enumerate(ids)}
        by_symbol: dict[str, int] = {}
        by_lowered: dict[str, int] = {}
        by_alias: dict[str, int] = {}
        by_lowered_alias: dict[str, int] = {}
        for row, symbol in enumerate(symbols):
            if symbol:
                _claim(by_symbol, symbol, row)
                _claim(by_lowered, symbol.lower(), row)
        for row, aliases in enumerate(rows["aliases"]):
            if aliases:
                for alias in aliases.split("|"):
                    lowered = alias.lower()
                    if _VERSIONED.match(lowered):
                        by_id.setdefault(lowered, row)
                    else:
                        _claim(by_alias, alias, row)
                        _claim(by_lowered_alias, lowered, row)
        return cls(
            species=species,
            token_R=rows["token"],
            ids=ids,
            symbols=symbols,
            by_id=by_id,
            by_symbol=by_symbol,
            by_lowered=by_lowered,
            by_alias=by_alias,
            by_lowered_alias=by_lowered_alias,
        )


def _claim(table: dict[str, int], name: str, row: int) -> None:
    """Give the name to a row, or mark it as shared by two."""
    if table.setdefault(name, row) != row:
        table[name] = _AMBIGUOUS


@dataclass(frozen=True)
class _Found:
    """Rows of one species' table for a list of names."""

    row_G: npt.NDArray[np.int32]  # row of the species' table; -1 unknown, -2 ambiguous
    how_G: npt.NDArray[np.int8]  # 1 + position in KINDS; 0 where unknown

    @property
    def n_matched(self) -> int:
        return int((self.row_G >= 0).sum())

    @property
    def n_by_id(self) -> int:
        return int(((self.row_G >= 0) & (self.how_G == 1)).sum())

    @property
    def n_exact(self) -> int:
        return int(((self.row_G >= 0) & ((self.how_G == 1) | (self.how_G == 2))).sum())


class _Names:
    """Gene names of a file, cleaned once and looked up in any species."""

    def __init__(self, names: Sequence[str]) -> None:
        self.given = names
        self.plain = list(names)
        self.assembly: list[str | None] = [None] * len(self.plain)
        for i, name in enumerate(self.plain):
            # A cheap look before the regular expression: prefixes end in _ or -.
            if "_" in name or "-" in name:
                found = ASSEMBLY_PREFIX.match(name)
                if found:
                    self.assembly[i] = assembly_species(found[1])
                    self.plain[i] = name[found.end() :]
        self.lowered = [name.lower() for name in self.plain]
        self.prefixes = Counter(s for s in self.assembly if s is not None)

    def find(self, index: SpeciesIndex) -> _Found:
        """Rows of `index` for every name."""
        by_id, by_symbol = index.by_id, index.by_symbol
        by_lowered, by_alias = index.by_lowered, index.by_alias
        by_lowered_alias = index.by_lowered_alias
        rows: list[int] = []
        kinds: list[int] = []
        for plain, lowered, assembly in zip(self.plain, self.lowered, self.assembly, strict=True):
            kind = 1
            if assembly is not None and assembly != index.species:
                row, kind = _UNKNOWN, 0
            elif (row := by_id.get(lowered, _UNKNOWN)) != _UNKNOWN:
                pass
            elif (row := by_symbol.get(plain, _UNKNOWN)) != _UNKNOWN:
                kind = 2
            elif (row := by_lowered.get(lowered, _UNKNOWN)) != _UNKNOWN:
                kind = 3
            elif (row := by_alias.get(plain, _UNKNOWN)) != _UNKNOWN:
                kind = 4
            elif (row := by_lowered_alias.get(lowered, _UNKNOWN)) != _UNKNOWN:
                kind = 4
            else:
                row = _decorated_id(lowered, by_id)
                kind = 1 if row >= 0 else 0
            rows.append(row)
            kinds.append(kind)
        return _Found(np.array(rows, dtype=np.int32), np.array(kinds, dtype=np.int8))

    def others(self, species: str) -> npt.NDArray[np.bool_]:
        """Names whose assembly prefix says that they belong to another species."""
        if not self.prefixes:
            return np.zeros(len(self.plain), dtype=bool)
        return np.array([a is not None and a != species for a in self.assembly], dtype=bool)

    def written_as(
        self, others: Sequence[SpeciesIndex], own: SpeciesIndex
    ) -> npt.NDArray[np.bool_]:
        """Names that are ids or symbols of other species as these write them, and not of this."""
        written = np.zeros(len(self.plain), dtype=bool)
        if others:
            for i, (plain, lowered) in enumerate(zip(self.plain, self.lowered, strict=True)):
                if lowered not in own.by_id and plain not in own.by_symbol:
                    written[i] = any(lowered in o.by_id or plain in o.by_symbol for o in others)
        return written


def tokens_of_names(index: SpeciesIndex, names: Sequence[str]) -> npt.NDArray[np.int32]:
    """Token of every name by the rule of all matching, (G,); -1 where none or two fit.

    For names that are not the genes of a count matrix: edges, gene sets, families.
    """
    row_G = _Names(names).find(index).row_G
    return np.where(row_G >= 0, index.token_R[np.maximum(row_G, 0)], -1).astype(np.int32)


def _decorated_id(lowered: str, by_id: dict[str, int]) -> int:
    """Row of an id with a version, a PAR mark or a symbol attached to it."""
    found = _VERSIONED.match(lowered) or _EMBEDDED.search(lowered)
    return by_id.get(found[1], _UNKNOWN) if found else _UNKNOWN


class GeneMatch:
    """What the genes of one file are in a vocabulary.

    Attributes
    ----------
    token_G
        int32, one per gene of the file; -1 where the gene is not in the vocabulary.
    species
        The species that was matched.
    column
        Where the names were found: ``"index"``, a column of ``var``, or ``"names"``.
    n_genes
        G, genes in the file.
    n_matched
        Genes with a token.
    n_summed
        Matched genes whose counts are added to another gene's token (``n_matched`` less the
        distinct tokens).
    n_other_species
        Genes that are named as another species' of the same file, or carry the prefix of its
        genome.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        token_G: npt.NDArray[np.int32],
        how_G: npt.NDArray[np.int8],
        ambiguous_G: npt.NDArray[np.bool_],
        other_G: npt.NDArray[np.bool_],
        species: str,
        column: str,
        vocabulary_size: int,
        fingerprint: str,
        ids_G: Sequence[str],
        symbols_G: Sequence[str],
    ) -> None:
        self.names = list(names)
        self.token_G = token_G
        self.species = species
        self.column = column
        self.vocabulary_size = vocabulary_size
        self.vocabulary_fingerprint = fingerprint
        self._how_G = how_G
        self._ambiguous_G = ambiguous_G
        self._other_G = other_G
        self._ids_G = ids_G
        self._symbols_G = symbols_G
        self.n_genes = len(self.names)
        matched = token_G >= 0
        self.n_matched = int(matched.sum())
        self.n_tokens = len(np.unique(token_G[matched]))
        self.n_summed = self.n_matched - self.n_tokens
        self.n_other_species = int(other_G.sum())

    def __repr__(self) -> str:
        """Return the summary."""
        return f"GeneMatch({self.summary()})"

    @property
    def fraction(self) -> float:
        """Matched share of the genes that could belong to this species."""
        return self.n_matched / max(1, self.n_genes - self.n_other_species)

    @property
    def ambiguous(self) -> list[str]:
        """Names that fit two genes."""
        return [self.names[i] for i in np.flatnonzero(self._ambiguous_G)]

    @property
    def unmatched(self) -> list[str]:
        """Names without a token that are neither ambiguous nor another species'."""
        missing = (self.token_G < 0) & ~self._ambiguous_G & ~self._other_G
        return [self.names[i] for i in np.flatnonzero(missing)]

    @property
    def measured_V(self) -> npt.NDArray[np.bool_]:
        """Tokens that this file measures, bool (V,)."""
        measured = np.zeros(self.vocabulary_size, dtype=bool)
        measured[self.token_G[self.token_G >= 0]] = True
        return measured

    def report(self) -> pd.DataFrame:
        """One row per gene of the file.

        Columns: name, species, status (``matched``, ``summed``: a later gene of a token that an
        earlier one has already, ``unmatched``, ``ambiguous``, ``other species``), how, token (-1
        where none), ensembl_id, symbol.
        """
        status = np.full(self.n_genes, "unmatched", dtype=object)
        matched = self.token_G >= 0
        status[matched] = "matched"
        at = np.flatnonzero(matched)
        repeated = pd.Series(self.token_G[at]).duplicated().to_numpy()
        status[at[repeated]] = "summed"
        status[self._ambiguous_G] = "ambiguous"
        status[self._other_G] = "other species"
        how = np.array(["", *KINDS], dtype=object)[self._how_G]
        how[~matched] = ""
        return pd.DataFrame(
            {
                "name": self.names,
                "species": self.species,
                "status": status,
                "how": how,
                "token": self.token_G,
                "ensembl_id": self._ids_G,
                "symbol": self._symbols_G,
            }
        )

    def summary(self) -> str:
        """One line: how many matched, by what, how many summed, which did not."""
        counts = Counter(self._how_G[self.token_G >= 0].tolist())
        by = ", ".join(f"{counts[k + 1]:,} by {KINDS[k]}" for k in range(4) if counts[k + 1])
        text = (
            f"{self.species}: {self.n_matched:,} of {self.n_genes - self.n_other_species:,} genes "
            f"matched ({self.fraction:.1%}; {by or 'none'}), names from {self.column}"
        )
        if self.n_summed:
            text += f"; {self.n_summed:,} summed into another gene's token"
        unmatched, ambiguous = self.unmatched, self.ambiguous
        if unmatched:
            text += f"; {len(unmatched):,} not in the vocabulary ({_some(unmatched)})"
        if ambiguous:
            text += f"; {len(ambiguous):,} ambiguous and left out ({_some(ambiguous)})"
        if self.n_other_species:
            text += f"; {self.n_other_species:,} of another species"
        return text

    def project(self, X: sp.csr_matrix | sp.csr_array) -> sp.csr_matrix:
        """Turn counts of the file's genes into counts of the vocabulary's tokens.

        Parameters
        ----------
        X
            Counts (C, G), CSR (other layouts are converted). Integers become int32, floats float32.

        Returns
        -------
        scipy.sparse.csr_matrix
            (C, V), tokens ascending in each row, genes of one token summed, no explicit zeros.

        Raises
        ------
        DataError
            `X` has another number of genes, or a sum does not fit int32.
        """
        from genemodel.genes.kernels import check_columns, project

        if X.shape[1] != self.n_genes:
            raise DataError(
                f"the counts have {X.shape[1]:,} genes, this match was made for "
                f"{self.n_genes:,}: match the var table that belongs to these counts"
            )
        csr = X if isinstance(X, sp.csr_matrix | sp.csr_array) else sp.csr_matrix(X)
        check_columns(csr)
        dtype = np.float32 if np.issubdtype(csr.dtype, np.floating) else np.int32
        indptr, indices, data, fits = project(
            csr.indptr, csr.indices, csr.data, self.token_G, self.vocabulary_size, dtype
        )
        if not fits:
            raise DataError(
                f"counts of {self.species} genes exceed 2,147,483,647 in one cell: they are not "
                "counts of single cells"
            )
        return sp.csr_matrix((data, indices, indptr), shape=(X.shape[0], self.vocabulary_size))


def match(
    vocabulary: "GeneVocabulary",
    names: pd.DataFrame | Iterable[str],
    *,
    species: str,
    column: str | None,
    min_fraction: float,
    min_genes: int,
    among: Sequence[str] = (),
) -> GeneMatch:
    """Do the work of :meth:`GeneVocabulary.match`."""
    index = vocabulary.index(species)
    candidates = _candidates(names, column)
    last_usual = list(candidates)[-1] if candidates else ""
    if isinstance(names, pd.DataFrame) and column is None:
        candidates |= _further(names, candidates)
    best: tuple[str, _Names, _Found] | None = None
    for label, values in candidates.items():
        cleaned = _Names(values)
        found = cleaned.find(index)
        # Ids are the surer names: symbols must find clearly more to be preferred.
        by_id = best is not None and 2 * best[2].n_by_id > best[2].n_matched
        edge = _CLEARLY_MORE if by_id else 0.0
        if best is None or found.n_matched > best[2].n_matched + edge * len(values):
            best = (label, cleaned, found)
        if label == last_usual and best[2].n_matched >= _MANY * len(values):
            break
    if best is None or not best[1].given:
        raise DataError("there are no gene names: the file has no genes")
    label, cleaned, found = best
    found = _with_appended(cleaned, found)
    other_G = cleaned.others(index.species)
    rivals = [vocabulary.index(name) for name in among if name != index.species]
    written_G = cleaned.written_as(rivals, index)
    # Hardly a name of its own is no joined file but a wrong species, refused by its names.
    joined = found.n_exact >= min(min_genes, len(written_G)) if rivals else False
    if joined:
        # Names that fit ignoring case stay: cells of this species may have been counted there.
        other_G = other_G | (written_G & (found.row_G < 0))
    matched = found.row_G >= 0
    row_or_0 = np.where(matched, found.row_G, 0)
    result = GeneMatch(
        names=cleaned.given,
        token_G=np.where(matched, index.token_R[row_or_0], -1).astype(np.int32),
        how_G=found.how_G,
        ambiguous_G=found.row_G == _AMBIGUOUS,
        other_G=other_G,
        species=index.species,
        column=label,
        vocabulary_size=len(vocabulary),
        fingerprint=vocabulary.fingerprint,
        ids_G=[index.ids[r] if r >= 0 else "" for r in found.row_G.tolist()],
        symbols_G=[index.symbols[r] if r >= 0 else "" for r in found.row_G.tolist()],
    )
    if not joined:
        _refuse_other_species(vocabulary, cleaned, found, result)
    _refuse_too_few(vocabulary, cleaned, result, candidates, min_fraction, min_genes)
    return result


def _with_appended(cleaned: _Names, found: _Found) -> _Found:
    """Give names that were made unique (``GENE-1``, ``GENE.1``) the row of GENE, where it is there.

    What a vocabulary knows by itself (``MIR1-1``) was found before.
    """
    place = {name: i for i, name in enumerate(cleaned.plain)}
    row_G, how_G = found.row_G.copy(), found.how_G.copy()
    undone = []
    for i in np.flatnonzero(row_G == _UNKNOWN).tolist():
        parts = APPENDED.match(cleaned.plain[i])
        first = place.get(parts[1], i) if parts else i
        if found.row_G[first] >= 0:
            row_G[i], how_G[i] = found.row_G[first], found.how_G[first]
            undone.append(cleaned.given[i])
    if undone:
        log.info("%s names had been made unique and are summed (%s)", len(undone), _some(undone))
    return _Found(row_G, how_G)


def written_as_others(
    vocabulary: "GeneVocabulary", names: Iterable[str], *, species: str, among: Iterable[str]
) -> npt.NDArray[np.bool_]:
    """Tell the names that are ids or symbols of others `among` as those write them, bool (G,).

    What `species` writes so too is not among them. A file that joins species has the genes of all,
    and zeros where a species was not measured.
    """
    others = [vocabulary.index(name) for name in among if name != species]
    return _Names(list(map(str, names))).written_as(others, vocabulary.index(species))


def _candidates(
    names: pd.DataFrame | Iterable[str], column: str | None
) -> dict[str, Sequence[str]]:
    """Return the lists of names to try, by where they stand; the index first."""
    if not isinstance(names, pd.DataFrame):
        if isinstance(names, str):
            raise DataError(f"gene names must be a list of names, not the one string {names!r}")
        if column is not None:
            raise DataError(
                f"column={column!r} was given with a plain list of names: pass the var table"
            )
        return {"names": list(map(str, names))}
    if column is not None and column != "index":
        if column not in names.columns:
            raise DataError(
                f"var has no column {column!r}; it has {_some(list(names.columns), 20)} "
                "(and 'index')"
            )
        at = list(names.columns).index(column)
        return {column: list(map(str, names.iloc[:, at].tolist()))}
    # Named after the column that it was taken from, where the file's own index held numbers.
    own = str(names.index.name) if names.index.name in names.columns else "index"
    found: dict[str, Sequence[str]] = {own: list(map(str, names.index.tolist()))}
    if column is None:
        lowered = {str(c).lower(): c for c in names.columns}
        for usual in USUAL_COLUMNS:
            if usual in lowered:
                at = list(names.columns).index(lowered[usual])
                values = list(map(str, names.iloc[:, at].tolist()))
                if values not in found.values():
                    found[str(lowered[usual])] = values
    return found


def _further(names: pd.DataFrame, found: dict[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Return the other columns of texts: one may hold the names under a name of its own."""
    further: dict[str, Sequence[str]] = {}
    for at, column in enumerate(names.columns):
        values = names.iloc[:, at]
        if str(column) in found or values.dtype.kind in "iufbcmM":
            continue
        texts = list(map(str, values.tolist()))
        if texts not in found.values():
            further[str(column)] = texts
    return further


def _refuse_other_species(
    vocabulary: "GeneVocabulary", cleaned: _Names, found: _Found, result: GeneMatch
) -> None:
    """Refuse names that are plainly another species' genes, however many match by accident.

    Ignoring case, three quarters of mouse symbols are human symbols too. Names written as another
    species writes them are only accepted when they fit that species no better.
    """
    n = result.n_genes - result.n_other_species
    if 2 * found.n_exact >= n:
        return
    for name in vocabulary.species:
        if name == result.species:
            continue
        rival = cleaned.find(vocabulary.index(name))
        if 2 * rival.n_exact <= n:
            continue
        if rival.n_matched > found.n_matched:
            raise DataError(
                f"{rival.n_matched / n:.0%} of these names are {name} genes as {name} genes are "
                f"written; {result.fraction:.0%} fit {result.species} genes (found in "
                f"{result.column}: {_some(cleaned.given)}): set species={name}"
            )
        log.warning(
            "the gene names are written as %s genes are (%s); they were matched to %s genes "
            "ignoring case, as species=%s says",
            name,
            _some(cleaned.given),
            result.species,
            result.species,
        )


def _refuse_too_few(
    vocabulary: "GeneVocabulary",
    cleaned: _Names,
    result: GeneMatch,
    candidates: dict[str, Sequence[str]],
    min_fraction: float,
    min_genes: int,
) -> None:
    """Refuse a match below the thresholds, with what would do better."""
    possible = result.n_genes - result.n_other_species
    enough = min(min_genes, possible)
    if result.fraction >= min_fraction and result.n_matched >= enough:
        return
    message = (
        f"only {result.n_matched:,} of {possible:,} gene names are {result.species} genes of the "
        f"vocabulary ({result.fraction:.1%}; accepted are {min_fraction:.0%} and {enough:,} genes)."
        f" Found in {' and '.join(candidates)}: {_some(cleaned.given)}."
    )
    if not possible:
        raise DataError(f"{message} {_prefix_advice(cleaned)}")
    better = []
    for name in vocabulary.species:
        share = cleaned.find(vocabulary.index(name)).n_matched / result.n_genes
        if name != result.species and share > max(result.fraction, 0.05):
            better.append((share, name))
    if better:
        share, name = max(better)
        message += f" {share:.0%} of these names are {name} genes: set species={name}."
    advice = _kind_of_names(cleaned.given, vocabulary)
    if not advice and result.fraction >= min_fraction:
        advice = (
            f"Fewer than {enough:,} genes say too little of a cell: give a file with more genes; "
            "or, of a small panel, leave out of adata.var what is no gene."
        )
    if not advice:
        advice = (
            "Use Ensembl ids or gene symbols; say which column of var holds them (setting column), "
            "or accept fewer with min_fraction=."
        )
    raise DataError(f"{message} {advice}")


def _prefix_advice(cleaned: _Names) -> str:
    found = ", ".join(f"{n:,} of {name}" for name, n in cleaned.prefixes.most_common())
    return f"All carry the prefix of another species' genome ({found}): set the species to match."


def _kind_of_names(names: Sequence[str], vocabulary: "GeneVocabulary") -> str:
    """Say what names that are no genes of the vocabulary are, and the way out; else nothing."""
    some = list(names[:: max(1, len(names) // 200)])
    if sum(name.isdigit() for name in some) > _MANY * len(some):
        return (
            "These are numbers, not gene names: say which column of var holds the names (setting "
            "column), or put Ensembl ids or symbols into adata.var_names."
        )
    if sum(bool(_TRANSCRIPT.match(name)) for name in some) > _MANY * len(some):
        return "These are transcript or protein ids: sum their counts to genes first."
    known = set(vocabulary.species)
    for species in SPECIES.values():
        prefixed = sum(name.startswith(species.ensembl_prefix) for name in some)
        if len(species.ensembl_prefix) > 1 and prefixed > _MANY * len(some):
            if species.name not in known:
                return (
                    f"These are {species.name} ids and the vocabulary holds "
                    f"{', '.join(vocabulary.species)}: add the species with "
                    f"`genemodel species name={species.name} genes=... orthologs=... output=...`."
                )
    return ""


def _some(names: Sequence[Any], n: int = _EXAMPLES) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(map(str, names[:n]))
    return shown + (f", … {len(names) - n:,} more" if len(names) > n else "")
