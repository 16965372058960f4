"""Which obs columns of a source become which columns of a corpus."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd

from genemodel.cells.genomes import only_species
from genemodel.cells.missing_labels import EMPTY, PLACEHOLDERS, found, is_missing, placeholders
from genemodel.errors import ConfigError, DataError
from genemodel.genes.species import species_name

log = logging.getLogger(__name__)

# obs columns every corpus knows; each is there, or missing, in every source.
COLUMNS = ("species", "dataset", "batch", "donor", "cell_type", "assay", "tissue")
# Those of which one text may hold for a whole source.
SAID = ("batch", "donor", "cell_type", "assay", "tissue")
# Keys of DataFrame.attrs: what a curator should know; columns that were not taken, since two obs
# columns have their name.
NOTES, TWICE = "notes", "twice"
# Where CELLxGENE and others name the species of their cells.
ORGANISM = ("organism", "organism_ontology_term_id")


@dataclass(frozen=True)
class ColumnPlan:
    """Which obs column of a source becomes which column of the corpus.

    ``wanted``: corpus column -> obs column, demanded; ``optional``: the same, absent is allowed.
    ``species``: a constant, or None where it comes from a column. ``words``: texts that mean
    "missing". ``every``: all columns as they are, and nothing is demanded. ``kept``: names that the
    caller asked for. ``values``: corpus column -> what holds for all cells, whatever the file says.
    """

    wanted: Mapping[str, str]
    optional: Mapping[str, str]
    species: str | None
    words: frozenset[str] = PLACEHOLDERS
    every: bool = False
    kept: frozenset[str] = frozenset()
    values: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        species: str | None,
        columns: Mapping[str, str] | None,
        keep: Iterable[str],
        missing_labels: Iterable[str] = (),
        values: Mapping[str, str] | None = None,
    ) -> Self:
        """Plan from what the caller said."""
        values = dict(values or {})
        for name, value in values.items():
            if name not in SAID or not isinstance(value, str) or not value:
                raise ConfigError(
                    f"values: {name!r} is {value!r}; give a text for {', '.join(SAID[:-1])} or "
                    f"{SAID[-1]}"
                )
        wanted = {name: key for name, key in (columns or {}).items() if name not in values}
        for name, column in wanted.items():
            if not isinstance(column, str) or not column:
                raise ConfigError(
                    f"columns: {name!r} is mapped to {column!r}; give the name of an obs column"
                )
        constant = None
        if species is not None:
            if species.startswith("obs:"):
                wanted["species"] = species.removeprefix("obs:")
            else:
                constant = species_name(species)
                wanted.pop("species", None)
        keep = tuple(keep)
        optional = {name: name for name in (*COLUMNS, *keep) if name not in wanted}
        if constant is not None:
            optional.pop("species", None)
        words = placeholders(missing_labels)
        return cls(wanted, optional, constant, words, kept=frozenset(keep), values=values)

    def names(self) -> list[str]:
        """Corpus columns in order: the usual ones, then the further ones."""
        further = [n for n in (*self.wanted, *self.optional) if n not in COLUMNS]
        return [*COLUMNS, *dict.fromkeys(further)]

    def apply(
        self,
        index: pd.Index,
        present: Sequence[str],
        read: Callable[[str], Any],
        where: str,
        name: str,
        *,
        genes: Callable[[], pd.DataFrame] | None = None,
        genome: str | None = None,
        sample: str | None = None,
    ) -> pd.DataFrame:
        """Make the obs table of a source from its columns.

        ``sample``: batch and donor of cells of which nothing is said, a folder of one library.
        ``genes`` reads the var table, whose genomes name the species where nothing else does (and
        must be of one); ``genome`` is the one that was chosen of them.
        """
        if self.every:
            columns = {column: pd.Series(read(column)).array for column in present}
            return pd.DataFrame(columns, index=pd.Index(index.astype(str), name=None))
        taken: dict[str, Any] = {}
        twice = {name for name in present if list(present).count(name) > 1}
        for column, key in self.wanted.items():
            if key in twice:
                raise DataError(_named_twice(where, key))
            if key not in present:
                raise DataError(
                    f"{where}: has no obs column {key!r} (wanted for {column}); it has "
                    f"{', '.join(map(str, present)) or 'none'}. Name one of these, or leave "
                    f"{column} out"
                )
            taken[column] = read(key)
        skipped: list[str] = []
        for column, key in self.optional.items():
            if key in twice:
                # The usual columns are of use to a corpus; other verbs never look at most of them.
                if column == "species" or column in self.kept:
                    raise DataError(_named_twice(where, key))
                skipped.append(key)
            elif key in present:
                taken[column] = read(key)
        if self.species is None and "species" not in taken:
            organism = next((key for key in ORGANISM if key in present and key not in twice), None)
            if organism is not None:
                log.info("%s: the species of its cells stands in obs[%r]", where, organism)
                taken["species"] = read(organism)
        constant = self.species
        notes: list[str] = []
        if genes is not None and "species" not in taken:
            found_species = only_species(genes(), genome, where)
            if constant is None and found_species is not None:
                log.info("%s: %s, as the genome of its genes says", where, found_species)
                constant = found_species
        obs = pd.DataFrame(index=pd.Index(index.astype(str), name=None))
        for column in self.names():
            values = taken.get(column)
            if values is not None and len(values) != len(obs):
                raise DataError(
                    f"{where}: obs column {column!r} has {len(values):,} values for "
                    f"{len(obs):,} cells. The file is damaged: make it again"
                )
            rename = species_name if column == "species" else str
            known = column in COLUMNS or column in self.wanted
            obs[column], gone = _texts(values, len(obs), rename, self.words if known else EMPTY)
            if gone:
                notes.append(found(self.wanted.get(column, column), gone))
                log.warning("%s: %s", where, notes[-1])
        if constant is not None:
            obs["species"] = pd.Categorical([constant] * len(obs))
        elif "species" not in taken:
            raise ConfigError(
                f"{where}: the species of its cells is not stated. Set species=human (or "
                f"another), or species=obs:COLUMN with one of its obs columns: "
                f"{', '.join(map(str, present)) or '(it has none)'}"
            )
        if obs["dataset"].isna().all():
            obs["dataset"] = pd.Categorical([name] * len(obs))
        for column, value in self.values.items():
            obs[column] = pd.Categorical([value] * len(obs))
        if sample is not None:
            notes += _as_one_sample(obs, sample)
        obs.attrs |= {NOTES: tuple(notes), TWICE: tuple(skipped)}
        return obs


def _as_one_sample(obs: pd.DataFrame, sample: str) -> list[str]:
    """Take a library for a batch and a donor, as far as neither is known; returns what was done.

    Programs that join libraries number their barcodes: ``…-1``, ``…-2``. These are batches then, of
    whose donors nothing is known.
    """
    suffix = obs.index.to_series().str.extract(r"-(\d+)$", expand=False)
    joined = suffix.nunique() > 1 and bool(suffix.notna().all())
    batch_C = (f"{sample}-" + suffix).to_numpy() if joined else [sample] * len(obs)
    filled = []
    for column, values in (("batch", batch_C), ("donor", None if joined else batch_C)):
        if values is not None and obs[column].isna().all():
            obs[column] = pd.Categorical(values)
            filled.append(column)
    if not filled:
        return []
    whose = "the libraries that its barcodes number" if joined else f"the sample {sample}"
    return [f"{' and '.join(filled)} {'are' if len(filled) > 1 else 'is'} {whose}: nothing else is "
            "said of them (a sheet may, in columns batch and donor)"]  # fmt: skip


def refuse_named_twice(obs: pd.DataFrame, where: str) -> None:
    """Refuse what :meth:`ColumnPlan.apply` left out, where all columns are wanted.

    Raises
    ------
    DataError
        Two obs columns of the source have one name.
    """
    for key in obs.attrs.get(TWICE, ()):
        raise DataError(_named_twice(where, key))


def _named_twice(where: str, key: str) -> str:
    return (
        f"{where}: has two obs columns of the name {key!r}, and nothing says which one is meant. "
        "Rename one of them"
    )


def _texts(
    values: Any, n: int, rename: Callable[[str], str], words: frozenset[str]
) -> tuple[pd.Categorical, list[tuple[str, int]]]:
    """Categories of text, codes −1 where the value is missing or one of ``words``.

    Also the words that were met, and in how many cells, but for those that say nothing at all.
    """
    if values is None:
        return pd.Categorical.from_codes(np.full(n, -1, np.int8), pd.Index([], dtype=str)), []
    array = values.array if isinstance(values, pd.Series) else values
    if isinstance(array, pd.Categorical):
        codes, categories = array.codes, array.categories
    else:
        try:
            codes, categories = pd.factorize(pd.Series(array))
        except TypeError:  # lists and the like
            codes, categories = pd.factorize(pd.Series(array).astype(str))
    texts = [_text(c) for c in categories]
    # Different values may be one text (1 and "1"), and texts may say "missing".
    missing = [is_missing(t, words) for t in texts]
    renamed = ["" if gone else rename(t) for t, gone in zip(texts, missing, strict=True)]
    kept = list(dict.fromkeys(t for t in renamed if t))
    place = {t: i for i, t in enumerate(kept)}
    table = np.array([place.get(t, -1) for t in renamed] + [-1], np.int64)
    counts = np.bincount(np.asarray(codes)[np.asarray(codes) >= 0], minlength=len(texts))
    met = [(t, int(counts[i])) for i, t in enumerate(texts) if missing[i] and counts[i] and t]
    column = pd.Categorical.from_codes(table[codes], pd.Index(kept, dtype=str))
    return column, sorted(met, key=lambda pair: -pair[1])


def _text(value: Any) -> str:
    """Text of a category; 3.0 becomes 3, because a missing value makes integers floats."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)
