"""Texts that stand for a missing value: one list for labels, batches, donors and species.

What a file says where it knows nothing ("nan" out of ``astype(str)``, "", "Unknown") is no cell
type, and no batch either. All readers of such columns ask here, so that a model learns none of
them; and each column is asked about once, where it comes in. What has been settled (the columns of
a corpus, what a comparison handed on) knows missing values only as None or NaN, so that a label
that was kept is not dropped behind the user's back.
"""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from genemodel.errors import ConfigError

log = logging.getLogger(__name__)

# What no program means but as "there is none": also missing in columns that a corpus merely keeps.
EMPTY = frozenset({"", "nan", "<na>", "nat", "#n/a"})
# Compared in lower case, without blanks around, with _ and - as blanks. Whole texts only:
# "unknown T cell" is a label.
PLACEHOLDERS = EMPTY | frozenset(
    {
        "na", "n/a", "n.a.", "none", "null", "nil", "missing", "?", ".",
        "unknown", "unknown cell", "unknown cells", "unknown type", "unknown cell type", "unk",
        "unassigned", "not assigned", "unannotated", "not annotated", "unlabelled", "unlabeled",
        "no label", "unclassified", "undefined", "undetermined", "not determined", "unspecified",
        "not specified", "not available", "not applicable", "not provided", "not given",
        "not collected", "not reported", "not recorded", "to be determined", "tbd",
    }
)  # fmt: skip
_SHOWN = 5


def plain(text: object) -> str:
    """Return the text as placeholders are compared."""
    lowered = str(text).strip().lower()
    if any(letter.isdigit() for letter in lowered):
        return lowered  # -1 is not 1
    return " ".join(lowered.replace("_", " ").replace("-", " ").split())


def placeholders(missing_labels: Iterable[str] = (), *, settled: bool = False) -> frozenset[str]:
    """Return the texts that mean "missing", the usual ones changed by a setting.

    Parameters
    ----------
    missing_labels
        Further texts, such as ``"doublet"``; with a minus before it (``"-unknown"``) one that is a
        label after all.
    settled
        The usual ones have been taken out of the column before, as the user wanted it then: of a
        corpus, when it was built. Only those that the setting adds are left.

    Raises
    ------
    ConfigError
        One is no text, or one is taken out that is not there.
    """
    if isinstance(missing_labels, str):
        raise ConfigError(
            f"missing_labels={missing_labels!r} is one text: give a list, [{missing_labels!r}]"
        )
    words = set(PLACEHOLDERS)
    for text in missing_labels:
        if not isinstance(text, str) or not text.strip("-").strip():
            raise ConfigError(
                f"missing_labels has {text!r}: give texts such as doublet, or -unknown for one "
                "that is a label"
            )
        if not text.startswith("-"):
            words.add(plain(text))
            continue
        if plain(text[1:]) not in words:
            raise ConfigError(
                f"missing_labels has {text!r}, but {text[1:]!r} does not stand for a missing "
                f"value. These do: {', '.join(sorted(filter(None, PLACEHOLDERS)))}"
            )
        words.discard(plain(text[1:]))
    if settled:
        return frozenset(plain(text) for text in missing_labels if not text.startswith("-"))
    return frozenset(words)


def is_missing(text: object, words: frozenset[str] = PLACEHOLDERS) -> bool:
    """Whether a text stands for a missing value."""
    return plain(text) in words


def found(column: str, counts: Sequence[tuple[str, int]]) -> str:
    """Say in one line which texts of a column were taken for missing values."""
    shown = ", ".join(f"{text!r} ({n:,} cells)" for text, n in counts[:_SHOWN])
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    meant = next((text for text, _ in counts if plain(text) in PLACEHOLDERS - EMPTY), None)
    return (
        f"obs[{column!r}]: {shown}{more} {'stands' if len(counts) == 1 else 'stand'} for a missing "
        "value" + (f"; missing_labels=[-{meant}] makes a label of it" if meant else "")
    )


def without_placeholders(
    values: pd.Series,
    missing_labels: Iterable[str] = (),
    *,
    column: str,
    where: str,
    settled: bool = False,
) -> pd.Series:
    """Return the column with NaN where a text stands for a missing value.

    Categories that are left keep their order. Says in one log line what was found. ``settled`` as
    in :func:`placeholders`.
    """
    words = placeholders(missing_labels, settled=settled)
    if isinstance(values.dtype, pd.CategoricalDtype):
        texts = list(values.cat.categories)
        counts = np.bincount(values.cat.codes[values.cat.codes >= 0], minlength=len(texts))
    else:
        if values.dtype.kind in "iufb":
            return values
        numbers = values.value_counts(sort=False)
        texts, counts = list(numbers.index), numbers.to_numpy()
    gone = {t: int(n) for t, n in zip(texts, counts, strict=True) if is_missing(t, words)}
    if not gone:
        return values
    seen = sorted(((str(t), n) for t, n in gone.items() if n), key=lambda pair: -pair[1])
    if seen:
        log.warning("%s: %s", where, found(column, seen))
    if isinstance(values.dtype, pd.CategoricalDtype):
        return values.cat.set_categories([text for text in texts if text not in gone])
    return values.where(~values.isin(list(gone)), np.nan)
