"""Tables of genes with labels: read, matched to a vocabulary, each gene once.

Axes: G genes of a task, L labels.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genemodel.errors import ConfigError, DataError
from genemodel.gene_tasks.families import GENE_COLUMNS, families_of, tokens_of
from genemodel.genes.tables import first_column, read_table, required_column
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.settings import did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneTask:
    """Genes with labels.

    Attributes
    ----------
    name
        Of the task.
    labels
        Names of the labels, in the order of their codes; the positive one of two is the last.
    gene_G, token_G, code_G
        Name, token and label of every gene.
    family_G
        Family of each.
    """

    name: str
    labels: tuple[str, ...]
    gene_G: list[str]
    token_G: np.ndarray
    code_G: np.ndarray
    family_G: list[str]

    def __len__(self) -> int:
        return len(self.gene_G)

    def only(self, keep_G: np.ndarray) -> "GeneTask":
        """Leave out genes."""
        at = np.flatnonzero(keep_G)
        return GeneTask(
            self.name, self.labels, [self.gene_G[i] for i in at], self.token_G[at],
            self.code_G[at], [self.family_G[i] for i in at],
        )  # fmt: skip

    def codes(self, n_tokens: int, without_G: np.ndarray | None = None) -> np.ndarray:
        """Label of every token, int64 (V,); -1 without, and for genes that are left out."""
        code_V = np.full(n_tokens, -1, np.int64)
        keep_G = slice(None) if without_G is None else ~without_G
        code_V[self.token_G[keep_G]] = self.code_G[keep_G]
        return code_V


def read_tasks(
    path: str | Path,
    vocabulary: GeneVocabulary,
    species: tuple[str, ...],
    *,
    task: str = "",
    groups: str | Path = "",
) -> list[GeneTask]:
    """Read the tasks of a table.

    Parameters
    ----------
    path
        Columns gene (symbol or Ensembl id) and label; of several tasks also task. With a column
        positive (1 or 0) the label that has it is the positive one.
    vocabulary, species
        Whose genes they are.
    task
        The one to take; empty for all.
    groups
        See :func:`~genemodel.gene_tasks.families.families_of`.

    Raises
    ------
    DataError
        A column is missing, a gene has two labels, or no gene is known.
    """
    what = "table of gene labels"
    table = read_table(path, what)
    gene = required_column(table, GENE_COLUMNS, what=what, path=path)
    label = required_column(table, ("label", "class"), what=what, path=path)
    positive = first_column(table, ("positive",))
    of = first_column(table, ("task",))
    names = [Path(path).name.split(".")[0]] if of is None else list(dict.fromkeys(table[of]))
    if task:
        if task not in names:
            raise DataError(
                f"{what}: {path} has no task {task!r}; it has {', '.join(names)}"
                f"{did_you_mean(task, names, '.')}"
            )
        names = [task]
    family_V = families_of(vocabulary, species, groups)
    found = []
    for name in names:
        rows = table if of is None else table[table[of] == name]
        rows = rows[rows[label] != ""]
        token_N = tokens_of(vocabulary, rows[gene].tolist(), species)
        known = rows[token_N >= 0].assign(token=token_N[token_N >= 0])
        if known.empty:
            raise DataError(
                f"{what}: {path}: of task {name} no gene is of the model's vocabulary "
                f"({', '.join(species)}); the first are {', '.join(rows[gene][:3])}."
            )
        once = known.drop_duplicates(["token", label])
        twice = once[once["token"].duplicated(keep=False)]
        if len(twice):
            raise DataError(
                f"{what}: {path}: task {name} gives {twice[gene].iloc[0]} two labels "
                f"({', '.join(twice[label][twice['token'] == twice['token'].iloc[0]])}): leave one "
                "of them out."
            )
        labels = sorted(set(once[label]))
        if positive is not None and len(labels) == 2:
            first = set(once[label][once[positive] == "1"])
            labels.sort(key=lambda one: one in first)
        if len(labels) < 2:
            raise DataError(f"{what}: {path}: task {name} has one label only, {labels[0]}.")
        if len(known) < len(rows):
            logger.info(
                "%s: %s of %s genes are of the vocabulary.",
                name,
                f"{len(known):,}",
                f"{len(rows):,}",
            )
        token_G = once["token"].to_numpy(np.int64)
        found.append(
            GeneTask(
                name, tuple(labels), once[gene].tolist(), token_G,
                np.array([labels.index(one) for one in once[label]], np.int64),
                [family_V[token] for token in token_G],
            )
        )  # fmt: skip
    return found


def one_task(tasks: list[GeneTask], path: str | Path, setting: str) -> GeneTask:
    """Return the only task, or refuse."""
    if len(tasks) > 1:
        raise ConfigError(
            f"{path} has several tasks: name one with {setting}, such as "
            f"{setting}={tasks[0].name}. It has {', '.join(one.name for one in tasks)}."
        )
    return tasks[0]
