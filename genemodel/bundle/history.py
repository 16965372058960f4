"""The losses of a training as a table that goes with its model.

A history has the column ``step`` and one for each loss: ``model.history.plot(x="step")``.
"""

from pathlib import Path

import pandas as pd

from genemodel.cells.matrices import refuse_damage

HISTORY = "history.tsv"
STEP = "step"


def no_history() -> pd.DataFrame:
    """Return the history of a model of which none was kept."""
    return pd.DataFrame({STEP: pd.Series(dtype="int64")})


def write_history(folder: Path, history: pd.DataFrame) -> None:
    """Write a history into the folder of a model; nothing where none was kept."""
    if len(history):
        history.to_csv(folder / HISTORY, sep="\t", index=False)


def read_history(folder: Path) -> pd.DataFrame:
    """Read what :func:`write_history` wrote, to the last bit."""
    path = folder / HISTORY
    if not path.is_file():
        return no_history()
    with refuse_damage(str(path)):
        # By way of text, because not every version of pandas reads numbers to the last bit.
        table = pd.read_csv(path, sep="\t", dtype=str)
        return table.astype({name: "int64" if name == STEP else "float64" for name in table})
