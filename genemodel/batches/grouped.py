"""The table of cells in memory, asked for groups as a corpus is."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from genemodel.corpus.corpus import JOINT


class GroupedCells:
    """Columns of an obs table as codes.

    Parameters
    ----------
    obs
        One row a cell.
    where
        Name of the data in messages.
    """

    def __init__(self, obs: pd.DataFrame, where: str) -> None:
        self.obs, self.path = obs, where

    def __len__(self) -> int:
        return len(self.obs)

    @property
    def columns(self) -> list[str]:
        """Columns of names, not of numbers."""
        kinds = self.obs.dtypes
        return [str(c) for c in self.obs if not pd.api.types.is_numeric_dtype(kinds[c])]

    def codes(self, *columns: str) -> tuple[npt.NDArray[np.int32], list[str]]:
        """As :meth:`genemodel.corpus.corpus.Corpus.codes`; a column that is missing says nothing.

        The one data set that cells in memory are needs no name: ``dataset`` is left out of pairs
        where there is none.
        """
        known = [c for c in columns if c in self.obs]
        if len(columns) > 1 and "dataset" not in self.obs:
            columns = tuple(c for c in columns if c != "dataset")
        if columns == ("species",) and not known:
            return np.zeros(len(self.obs), np.int32), ["all"]
        if not known or set(known) != set(columns):
            return np.full(len(self.obs), -1, np.int32), []
        table = self.obs[known].astype(object)
        missing_C = table.isna().any(axis=1).to_numpy()
        joined = table.astype(str).agg(JOINT.join, axis=1).to_numpy()
        code_C, names = pd.factorize(joined[~missing_C], sort=True)
        out_C = np.full(len(self.obs), -1, np.int32)
        out_C[~missing_C] = code_C
        return out_C, [str(name) for name in names]
