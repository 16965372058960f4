"""A transformer beneath a decoder of the data's own genes, of which it knows some as tokens.

Axes: C cells, G genes of the data, K genes with counts, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from genemodel.finetuning.backbone import Backbone


@dataclass(frozen=True)
class TokenBackbone:
    """A transformer beneath a decoder of the data's own genes.

    Attributes
    ----------
    backbone
        The transformer, and what of it learns.
    n_tokens
        Size of its vocabulary (V).
    token_G
        Token of every gene of the data, -1 where it knows none.
    species_C
        Species code of every cell.
    """

    backbone: Backbone
    n_tokens: int
    token_G: NDArray[np.integer]
    species_C: NDArray[np.integer]

    def over_tokens(
        self, counts_CK: sp.csr_matrix, kept_G: NDArray[np.integer]
    ) -> tuple[sp.csr_matrix, NDArray[np.integer]]:
        """Put some genes of the data in the places of their tokens, the others behind.

        Of several genes of one token the first has its place.

        Returns
        -------
        tuple
            Counts (C, V + others), and the column of every kept gene.
        """
        token_K = np.asarray(self.token_G)[kept_G]
        _, first = np.unique(token_K, return_index=True)
        own_K = np.zeros(len(token_K), bool)
        own_K[first] = True
        own_K &= token_K >= 0
        place_K = np.where(own_K, token_K, self.n_tokens + np.cumsum(~own_K) - 1)
        entries = counts_CK.tocoo()
        shape = (counts_CK.shape[0], self.n_tokens + int((~own_K).sum()))
        placed = sp.csr_matrix((entries.data, (entries.row, place_K[entries.col])), shape)
        placed.sort_indices()
        return placed, place_K
