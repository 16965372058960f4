"""Reading what knowledge is made from: families, edges, gene sets (GMT), vectors.

Axes: V vocabulary, G sets, R rows of a file.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.genes.match import tokens_of_names
from genemodel.genes.tables import first_column, plain_column, read_table, read_text
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.settings import did_you_mean, some

GENE = (
    "ensembl_id", "ensembl_gene_id", "gene_id", "gene_stable_id", "gene", "symbol", "gene_symbol",
    "gene_name", "approved_symbol", "hgnc_symbol",
)  # fmt: skip
_SYMBOL = ("symbol", "gene_symbol", "gene_name", "approved_symbol")
_GROUP = ("family_id", "gene_family_id", "gene_group_id", "group_id", "family", "gene_family",
          "gene_group", "group", "family_name", "group_name")  # fmt: skip
_SOURCE = ("source", "tf", "regulator", "from", "gene1", "gene_a", "protein1", "node1")
_TARGET = ("target", "target_gene", "to", "gene2", "gene_b", "protein2", "node2")
_WEIGHT = ("weight", "mor", "sign", "score", "combined_score", "importance")
# A gene of several families has them in one field in HGNC's own table.
_SEPARATORS = re.compile(r"[|;]")


@dataclass(frozen=True)
class Names:
    """The gene names of a file and their tokens; -1 where the vocabulary knows none."""

    token_R: np.ndarray
    said: str


@dataclass(frozen=True)
class Columns:
    """Which columns of a table to read, where its own names do not say so."""

    chosen: dict[str, str]

    def find(
        self, table: pd.DataFrame, role: str, usual: tuple[str, ...], path: str, *, needed: bool
    ) -> str | None:
        """Name of the column for a role (gene, group, source, target, weight)."""
        if role in self.chosen:
            wanted = self.chosen[role]
            if wanted in table.columns:
                return wanted
            there = list(map(str, table.columns))
            raise DataError(
                f"columns.{role}={wanted}: {path} has no such column{did_you_mean(wanted, there)} "
                f"It has {', '.join(there)}"
            )
        found = first_column(table, usual)
        if found is None and needed:
            raise DataError(
                f"{path} has no column for the {role}: its columns are "
                f"{', '.join(map(str, table.columns))}. Say which one it is "
                f"(knowledge build: 'columns={{{role}: NAME}}')"
            )
        return found


Matcher = Callable[[Sequence[str]], Names]


def matcher(vocabulary: GeneVocabulary, species: str, min_fraction: float) -> Matcher:
    """Return what finds the tokens of a file's gene names: ids, symbols, aliases, as everywhere."""
    index = vocabulary.index(species)

    def match(names: Sequence[str]) -> Names:
        given = list(dict.fromkeys(name for name in names if name))
        if not given:
            raise DataError("no gene is named: the column of the genes is empty")
        token_G = tokens_of_names(index, given)
        known = int((token_G >= 0).sum())
        unknown = [name for name, token in zip(given, token_G, strict=True) if token < 0]
        said = f"{known:,} of {len(given):,} gene names are known in {index.species}" + (
            f", not {some(unknown, 5)}" if unknown else ""
        )
        if known == 0 or known < min_fraction * len(given):
            raise DataError(
                f"{said}: too few (min_fraction={min_fraction}). Is species={species} right, and "
                "is this the column of the genes (columns)?"
            )
        token_of = dict(zip(given, token_G.tolist(), strict=True))
        return Names(np.array([token_of.get(name, -1) for name in names], np.int64), said)

    return match


def _best_names(table: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Name of the gene of each row: the first of the columns that is not empty."""
    names = table[columns[0]].str.strip()
    for column in columns[1:]:
        names = names.where(names != "", table[column].str.strip())
    return [str(name) for name in names]


def _side(table: pd.DataFrame, column: str) -> list[str]:
    """One end of the edges: its ids, where the table has them beside the names."""
    by = {plain_column(str(c)): str(c) for c in table.columns}
    ids = [by[f"{plain_column(column)}_{end}"] for end in ("ensembl", "ensembl_id")
           if f"{plain_column(column)}_{end}" in by]  # fmt: skip
    return _best_names(table, [*ids, column])


def families(
    paths: Sequence[str], match: Matcher, columns: Columns, n_tokens: int
) -> tuple[sp.csr_matrix, list[str], list[str]]:
    """Membership token × family (V, G), names of the families, and what was matched."""
    rows, groups, said = [], [], []
    for path in paths:
        table = read_table(path, "families table")
        gene = columns.find(table, "gene", GENE, path, needed=True)
        group = columns.find(table, "group", _GROUP, path, needed=True)
        assert gene is not None and group is not None
        symbol = None if "gene" in columns.chosen else first_column(table, _SYMBOL)
        names = _best_names(table, [gene] if symbol in (None, gene) else [gene, str(symbol)])
        found = match(names)
        said.append(f"{path}: {found.said}")
        for token, listed in zip(found.token_R.tolist(), table[group], strict=True):
            for one in _SEPARATORS.split(listed):
                if token >= 0 and one.strip():
                    rows.append(token)
                    groups.append(one.strip())
    return *_membership(rows, groups, n_tokens, paths), said


def gene_sets(
    paths: Sequence[str], match: Matcher, n_tokens: int
) -> tuple[sp.csr_matrix, list[str], list[str]]:
    """Membership token × set (V, G) of GMT files: name, description, then genes, in every line."""
    rows, groups, said = [], [], []
    for path in paths:
        lines = [line.split("\t") for line in read_text(path, "gene sets").splitlines() if line]
        short = [number for number, line in enumerate(lines, 1) if len(line) < 3]
        if not lines or short:
            raise DataError(
                f"gene sets: {path} is no GMT file"
                + (f" (line {short[0]} has {len(lines[short[0] - 1])} fields)" if short else "")
                + ": every line is a name, a description and genes, separated by tabs"
            )
        names = [gene.strip() for line in lines for gene in line[2:]]
        of_set = [line[0].strip() for line in lines for _ in line[2:]]
        found = match(names)
        said.append(f"{path}: {found.said}")
        kept = [i for i, token in enumerate(found.token_R.tolist()) if token >= 0]
        rows += [int(found.token_R[i]) for i in kept]
        groups += [of_set[i] for i in kept]
    return *_membership(rows, groups, n_tokens, paths), said


def _membership(
    rows: list[int], groups: list[str], n_tokens: int, paths: Sequence[str]
) -> tuple[sp.csr_matrix, list[str]]:
    """Token × set, for sets of two genes at least: one gene alone is near nobody."""
    names, code = np.unique(np.array(groups, dtype=object), return_inverse=True)
    member = sp.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, code)), shape=(n_tokens, len(names))
    )
    member.data[:] = 1  # a gene listed twice is in the set once
    kept = np.flatnonzero(np.asarray(member.sum(0)).ravel() >= 2)
    if kept.size == 0:
        raise DataError(
            f"{', '.join(paths)}: no set has two genes of the vocabulary, so nothing is near "
            "anything. Is species right, and is this the column of the sets?"
        )
    return sp.csr_matrix(member[:, kept]), [str(names[i]) for i in kept]


def edges(
    paths: Sequence[str], match: Matcher, columns: Columns, n_tokens: int
) -> tuple[sp.csr_matrix, list[str]]:
    """Weights source × target (V, V) of edge lists, and what was matched.

    Edges that several rows name have the mean of their weights; one of weight 0 (a sign that
    nobody knows) counts as 1. A gene's edge to itself is left out.
    """
    parts, said = [], []
    for path in paths:
        table = read_table(path, "edges table")
        source = columns.find(table, "source", _SOURCE, path, needed=table.shape[1] != 2)
        target = columns.find(table, "target", _TARGET, path, needed=table.shape[1] != 2)
        if source is None or target is None:
            source, target = map(str, table.columns)
        weight = columns.find(table, "weight", _WEIGHT, path, needed=False)
        names = _side(table, source), _side(table, target)
        found = match([*names[0], *names[1]])
        said.append(f"{path}: {found.said}")
        values = np.ones(len(table))
        if weight is not None:
            values = pd.to_numeric(table[weight], errors="coerce").to_numpy(np.float64)
            if np.isnan(values).any():
                bad = table[weight].iloc[int(np.argmax(np.isnan(values)))]
                raise DataError(f"{path} has {bad!r} in column {weight}, expected numbers")
        token = found.token_R.reshape(2, -1)
        kept = (token >= 0).all(0) & (token[0] != token[1])
        parts.append((*token[:, kept], np.where(values == 0, 1.0, values)[kept]))
    source_R, target_R, value_R = map(np.concatenate, zip(*parts, strict=True))
    if source_R.size == 0:
        raise DataError(
            f"{', '.join(paths)}: no edge has both ends in the vocabulary. Is species right?"
        )
    shape = (n_tokens, n_tokens)
    total = sp.csr_matrix((value_R, (source_R, target_R)), shape=shape)
    times = sp.csr_matrix((np.ones(value_R.size), (source_R, target_R)), shape=shape)
    total.data /= times.data
    total.eliminate_zeros()
    return total.astype(np.float32), said


def vectors(
    path: str, match: Matcher, columns: Columns, n_tokens: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Vectors of a user's table, (V, P); genes of one token are averaged.

    The first column names the genes, unless ``columns.gene`` says otherwise; all others are
    numbers. A table whose first line holds numbers already has no header.
    """
    lines = read_text(path, "vectors").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise DataError(f"vectors: {path} is empty")
    cut = "\t" if "\t" in lines[0] else "," if "," in lines[0] else None
    first = lines[0].split(cut)
    headless = len(first) > 1 and all(map(_is_number, first[1:]))
    at = 0
    if "gene" in columns.chosen:
        if headless or columns.chosen["gene"] not in first:
            raise DataError(
                f"columns.gene={columns.chosen['gene']}: {path} has no such column in its first "
                f"line ({', '.join(first[:8])})"
            )
        at = first.index(columns.chosen["gene"])
    names, rows = [], []
    for number, line in enumerate(lines if headless else lines[1:], 1 if headless else 2):
        fields = line.split(cut)
        names.append(fields.pop(at).strip().strip('"'))
        try:
            rows.append(np.array(fields, np.float32))
        except ValueError as error:
            raise DataError(
                f"vectors: {path}, row {number} ({names[-1]}): {error}. All columns but that of "
                "the gene are numbers"
            ) from error
        if rows[-1].size != rows[0].size or not np.isfinite(rows[-1]).all():
            raise DataError(
                f"vectors: {path}, row {number} ({names[-1]}): {rows[-1].size} values where the "
                f"first row has {rows[0].size}, or one that is not finite"
            )
    if not rows or rows[0].size == 0:
        raise DataError(f"vectors: {path} has no numbers beside the genes")
    found = match(names)
    kept = found.token_R >= 0
    table = np.zeros((n_tokens, rows[0].size), np.float32)
    n_V = np.bincount(found.token_R[kept], minlength=n_tokens)
    np.add.at(table, found.token_R[kept], np.stack(rows)[kept])
    table /= np.maximum(n_V, 1)[:, None].astype(np.float32)
    return table, n_V > 0, [f"{path}: {found.said}"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
