"""Token dictionaries of other models, for importing their checkpoints and matching their input."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from genemodel.errors import DataError
from genemodel.genes.tables import first_column, read_table, required_column

_ROLES = ("pad", "mask", "cls", "eos")


@dataclass(frozen=True)
class ForeignTokens:
    """Another model's genes, token ids and medians, in token order.

    Attributes
    ----------
    ensembl_id_G
        Gene ids, upper case, object array of str.
    token_G
        int64 token ids, ascending.
    median_G
        float64 non-zero medians that the counts are divided by; 1 where the table gives none.
    specials
        Token ids of ``pad`` and ``mask`` and, where the model has them, ``cls`` and ``eos``.
    """

    ensembl_id_G: npt.NDArray[np.object_]
    token_G: npt.NDArray[np.int64]
    median_G: npt.NDArray[np.float64]
    specials: dict[str, int]

    def __len__(self) -> int:
        """Return the size of the foreign vocabulary: highest token id + 1."""
        return max(int(self.token_G.max()), *self.specials.values()) + 1

    @classmethod
    def read(cls, path: str | Path, *, specials: dict[str, int] | None = None) -> Self:
        """Read a table with columns ensembl_id, token and, if possible, a median.

        Parameters
        ----------
        path
            tsv or csv, plain or gzipped. Rows whose id is ``<pad>``, ``<mask>``, ``<cls>`` or
            ``<eos>`` give the special tokens.
        specials
            Special tokens that the table does not list; by default ``pad`` 0 and ``mask`` 1.

        Raises
        ------
        DataError
            A column is missing; an id or token stands twice; a token or median is not a number; a
            median is not positive; two of the special and gene tokens are the same.
        """
        what = "foreign token table"
        table = read_table(path, what)
        id_column = required_column(table, ("ensembl_id", "gene_id", "gene"), what=what, path=path)
        token_column = required_column(table, ("token", "token_id", "id"), what=what, path=path)
        median_column = first_column(table, ("nonzero_median", "median", "gene_median"))
        names = table[id_column].str.strip()
        tokens = _numbers(table[token_column], token_column, what, path)
        if (tokens % 1 != 0).any() or (tokens < 0).any():
            raise DataError(f"{what}: {path} has a token that is not a whole number from 0 on")
        found = {"pad": 0, "mask": 1} if specials is None else dict(specials)
        special = names.isin([f"<{role}>" for role in _ROLES])
        for role, token in zip(names[special], tokens[special], strict=True):
            found[role.strip("<>")] = int(token)
        unknown = sorted(set(found) - set(_ROLES))
        if unknown:
            raise DataError(
                f"{what}: unknown special {unknown[0]!r}; known are {', '.join(_ROLES)}"
            )
        table, names, tokens = table[~special], names[~special].str.upper(), tokens[~special]
        if not len(table):
            raise DataError(f"{what}: {path} lists no gene")
        _refuse_repeated(names, f"{what}: {path} lists gene")
        _refuse_repeated(
            pd.Series([*tokens.astype(int), *found.values()]), f"{what}: {path} uses token"
        )
        medians = np.ones(len(table))
        if median_column is not None:
            medians = _numbers(table[median_column], median_column, what, path).to_numpy()
            if not (np.isfinite(medians) & (medians > 0)).all():
                at = int(np.argmin(np.isfinite(medians) & (medians > 0)))
                raise DataError(
                    f"{what}: {path} gives {names.iloc[at]} the median {medians[at]}; medians of "
                    "non-zero counts are positive"
                )
        order = np.argsort(tokens.to_numpy(), kind="stable")
        return cls(
            ensembl_id_G=names.to_numpy(dtype=object)[order],
            token_G=tokens.to_numpy().astype(np.int64)[order],
            median_G=medians[order],
            specials=found,
        )


def _numbers(column: pd.Series, name: str, what: str, path: str | Path) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.isna().any():
        raise DataError(
            f"{what}: {path} has {column[numbers.isna()].iloc[0]!r} in {name}, expected numbers"
        )
    return numbers.astype(np.float64)


def _refuse_repeated(values: pd.Series, message: str) -> None:
    repeated = values.duplicated()
    if repeated.any():
        raise DataError(f"{message} {values[repeated].iloc[0]} twice")
