"""Gene knowledge tables (promoters, co-expression, protein vectors …) aligned to a vocabulary."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genemodel.errors import DataError
from genemodel.genes.vocabulary import GeneVocabulary


@dataclass(frozen=True)
class KnowledgeTable:
    """Vectors of genes in vocabulary order.

    Attributes
    ----------
    table_VP
        One row a token, zero where unknown, float32.
    present_V
        Which tokens have a vector.
    """

    table_VP: np.ndarray
    present_V: np.ndarray

    @classmethod
    def read(cls, path: str | Path, vocabulary: GeneVocabulary) -> "KnowledgeTable":
        """Read a tab-separated file: gene id, then the same number of values in every row.

        A token shared by orthologs takes the mean over its genes. Columns are scaled to unit
        variance over the known genes, so that tables of different origin enter alike.

        Raises
        ------
        DataError
            If the file is absent, ragged, not numeric, or knows no gene of the vocabulary.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(
                f"No knowledge table at {path}: model.knowledge names files with a gene id and "
                "numbers in every row, separated by tabs."
            )
        genes = vocabulary.genes
        token_of = dict(zip(genes["ensembl_id"], genes["token"], strict=True))
        rows: list[np.ndarray] = []
        tokens: list[int] = []
        opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
        with opened as file:
            for number, line in enumerate(file, start=1):
                gene, *values = line.rstrip("\n").split("\t")
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
                rows.append(row)
                tokens.append(int(token_of[gene]))
        if not rows or rows[0].size == 0:
            raise DataError(
                f"{path} has a vector for none of the vocabulary's {len(genes):,} genes: rows "
                "begin with Ensembl gene ids of the vocabulary's species."
            )
        table = np.zeros((len(vocabulary), rows[0].size), np.float32)
        n_V = np.zeros(len(vocabulary))
        np.add.at(table, tokens, np.stack(rows))
        np.add.at(n_V, tokens, 1)
        present = n_V > 0
        table[present] /= n_V[present, None]
        spread = table[present].std(0)
        table[present] = (table[present] - table[present].mean(0)) / np.where(spread > 0, spread, 1)
        return cls(table, present)
