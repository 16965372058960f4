"""Generated counts that behave like real ones, for demonstrations, tests and benchmarks.

Gene ids are real and come from the vocabulary. Cell types are programs over *tokens*, so a type
looks alike in two species wherever they share orthologs, and every species adds genes of its own. A
batch sees its cells through a platform: depth, gene-wise efficiency, ambient RNA, dropout.

How one count comes about (every step is a known distribution, so the truth is known too)::

    share_CK   mixture weights of a cell over components: two sub-states of its type, gene programs
               (cell cycle, stress, interferon, metabolism), mitochondrial RNA, ambient RNA
    mean_CG    library_C * share_CK @ profile_BKG[batch]          profile rows sum to 1
    count_CG   negative binomial(mean_CG, size_G), then dropout that is likelier in shallow cells

Cell ``c`` of a species is a pure function of (seed, settings, species, c): neither the chunk size,
nor the number of threads, nor how many cells follow it can change it.

Sampling costs as much as there are transcripts, not as there are genes: Poisson points are thrown
onto the genes through alias tables, and every gene that was hit turns its points into a negative
binomial count by the compound form (a negative binomial is a Poisson number of logarithmic
clusters).

Axes: C cells, G genes of one species, B batches, K components, T cell types, V vocabulary tokens.
"""

import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from genemodel.errors import ConfigError
from genemodel.genes import GeneVocabulary
from genemodel.settings import either_seed
from genemodel.simulation.biology import HOUSEKEEPING, PLATFORMS, PROGRAMS, TISSUES, TYPES
from genemodel.simulation.kernels import alias_tables, describe_cells, draw_counts, scatter

__all__ = ["SyntheticWorld", "synthetic", "synthetic_chunks"]


@dataclass(frozen=True)
class _SpeciesWorld:
    """Everything that is fixed for one species before the first cell is drawn."""

    name: str
    key: np.uint64
    var: pd.DataFrame
    token_G: np.ndarray
    size_G: np.ndarray
    clean_KG: (
        np.ndarray
    )  # profiles without platform effects; the ambient row is that of an average batch
    profile_BKG: np.ndarray
    alias_BKG2: np.ndarray
    depth_B: np.ndarray
    spread_B: np.ndarray
    ambient_B: np.ndarray
    dropout_B: np.ndarray
    cum_B: np.ndarray
    cum_BT: np.ndarray
    batches: pd.DataFrame  # batch, donor, dataset, assay, tissue of every batch


class SyntheticWorld:
    """The fixed part of a generated data set: genes, programs, batches.

    Parameters
    ----------
    species
        Names of species in the vocabulary.
    n_batches
        Batches per species. Each belongs to one donor; ``donors_per_dataset`` donors make a data
        set, and a data set has one platform.
    n_cell_types
        Cell types, shared by all species.
    n_genes
        Genes per species (real Ensembl ids).
    genes_per_cell
        Expected number of expressed genes in a cell, averaged over types and batches; sets the
        depth.
    batch_strength
        Multiplies the gene-wise platform, donor and batch effects; 0 leaves only differences in
        depth, ambient RNA, dropout and composition.
    missing
        Share of (batch, cell type) pairs that are absent.
    trajectory
        Let the first two types of one lineage be the ends of a continuous path
        (``obs["pseudotime"]``).
    batches_per_donor, donors_per_dataset
        How batches nest.
    seed
        All randomness comes from here.
    vocabulary
        Where gene ids come from; the built-in one by default.

    Raises
    ------
    ConfigError
        If a number is impossible or a species is not in the vocabulary.
    """

    def __init__(
        self,
        *,
        species: tuple[str, ...] = ("human", "mouse"),
        n_batches: int = 4,
        n_cell_types: int = 8,
        n_genes: int = 4000,
        genes_per_cell: int = 600,
        batch_strength: float = 1.0,
        missing: float = 0.1,
        trajectory: bool = False,
        batches_per_donor: int = 1,
        donors_per_dataset: int = 2,
        seed: int = 0,
        vocabulary: GeneVocabulary | None = None,
    ) -> None:
        species = tuple(species)
        for name, value, least in (
            ("n_batches", n_batches, 1),
            ("n_cell_types", n_cell_types, 1),
            ("n_genes", n_genes, 200),
            ("genes_per_cell", genes_per_cell, 10),
            ("batches_per_donor", batches_per_donor, 1),
            ("donors_per_dataset", donors_per_dataset, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"synthetic: {name}={value}; it must be at least {least}.")
        if genes_per_cell > 0.6 * n_genes:
            raise ConfigError(
                f"synthetic: genes_per_cell={genes_per_cell} with n_genes={n_genes}: no more than "
                "60 % of the genes can be expressed in an average cell. Raise n_genes to "
                f"{math.ceil(genes_per_cell / 0.6)}."
            )
        if not 0 <= missing < 1 or batch_strength < 0:
            raise ConfigError(
                f"synthetic: missing={missing} must lie in [0, 1) and "
                f"batch_strength={batch_strength} must not be negative."
            )
        if not species:
            raise ConfigError(
                "synthetic: species is empty; name at least one, for instance 'human'."
            )
        self.vocabulary = GeneVocabulary.builtin() if vocabulary is None else vocabulary
        for name in species:
            if name not in self.vocabulary.species:
                raise ConfigError(
                    f"synthetic: species {name!r} is not in the vocabulary, which has "
                    f"{', '.join(self.vocabulary.species)}."
                )
        if len(set(species)) < len(species):
            raise ConfigError(f"synthetic: species {species} names one species twice.")
        self.species = species
        self.n_cell_types = n_cell_types
        self.genes_per_cell = genes_per_cell
        self.trajectory = trajectory
        self.seed = seed
        self.settings: dict[str, object] = {
            "n_batches": n_batches,
            "n_cell_types": n_cell_types,
            "n_genes": n_genes,
            "genes_per_cell": genes_per_cell,
            "batch_strength": batch_strength,
            "missing": missing,
            "trajectory": trajectory,
            "batches_per_donor": batches_per_donor,
            "donors_per_dataset": donors_per_dataset,
            "seed": seed,
        }
        self._n_batches = n_batches
        self._n_genes = n_genes
        self._strength = batch_strength
        self._missing = missing
        self._nesting = (batches_per_donor, donors_per_dataset)
        self.cell_types = _type_names(n_cell_types)
        lineages = [TYPES[t % len(TYPES)][1] for t in range(n_cell_types)]
        self._lineage_T = np.unique(lineages, return_inverse=True)[1]
        self._path = self._choose_path() if trajectory else (-1, -1)
        table = self.vocabulary.genes
        self._table = table
        self._n_tokens = int(table["token"].max()) + 1
        symbols = table["symbol"].astype(str).str.upper()
        first = pd.Series(table["token"].to_numpy(), index=symbols.to_numpy())
        self._token_of_symbol = first[~first.index.duplicated()].to_dict()
        self._draw_programs()
        self._worlds = {name: self._build(name) for name in species}

    def _choose_path(self) -> tuple[int, int]:
        for lineage in self._lineage_T:
            members = np.flatnonzero(self._lineage_T == lineage)
            if len(members) > 1:
                return int(members[0]), int(members[1])
        if self.n_cell_types < 2:
            raise ConfigError("synthetic: a trajectory needs n_cell_types of at least 2.")
        return 0, 1

    def _tokens(self, symbols: tuple[str, ...]) -> np.ndarray:
        return np.array(
            [self._token_of_symbol[s] for s in symbols if s in self._token_of_symbol], np.int64
        )

    def _draw_programs(self) -> None:
        """Draw what species share: mean expression and programs per vocabulary token."""
        rng = np.random.default_rng([self.seed, 1])
        n_types = self.n_cell_types
        n = self._n_tokens
        symbol_of_token = pd.Series(
            self._table["symbol"].astype(str).to_numpy(), index=self._table["token"]
        )
        symbol_of_token = symbol_of_token[~symbol_of_token.index.duplicated()]
        symbol_V = symbol_of_token.reindex(range(n)).fillna("").str.upper()
        coding = self._table.loc[self._table["biotype"] == "protein_coding", "token"].to_numpy()
        self._coding_V = np.zeros(n, bool)
        self._coding_V[coding] = True
        self._mito_V = symbol_V.str.startswith("MT-").to_numpy() & self._coding_V
        ribosomal_V = symbol_V.str.fullmatch(r"RP[LS]\d+[AXYL]?\d*").to_numpy() & self._coding_V
        housekeeping_V = np.zeros(n, bool)
        housekeeping_V[self._tokens(HOUSEKEEPING)] = True
        self._priority_V = rng.random(n) + ~self._coding_V * (rng.random(n) > 0.05)
        self._log_mean_V = rng.normal(0.0, 1.7, n) - 1.0 * ~self._coding_V
        loud_V = ribosomal_V | housekeeping_V
        self._log_mean_V[loud_V] = rng.normal(4.6, 0.6, int(loud_V.sum()))
        self._size_V = np.exp(rng.normal(np.log(3.0), 0.6, n)) * np.where(loud_V, 3.0, 1.0)
        self._forced_V = loud_V | self._mito_V

        change_TV = rng.normal(0.0, 0.08, (n_types, n))
        for lineage in np.unique(self._lineage_T):
            members = np.flatnonzero(self._lineage_T == lineage)
            hit = rng.random(n) < 0.03
            change_TV[np.ix_(members, hit)] += rng.gamma(2.0, 0.5, int(hit.sum()))
        for t in range(n_types):
            hit = rng.random(n) < 0.02
            change_TV[t, hit] += rng.gamma(2.0, 0.4, int(hit.sum()))
            hit = rng.random(n) < 0.03
            change_TV[t, hit] -= rng.gamma(2.0, 0.4, int(hit.sum()))
        sub_TV = rng.normal(0.0, 1.2, (n_types, n)) * (rng.random((n_types, n)) < 0.04)
        change_TV[:, ribosomal_V] = rng.normal(0.0, 0.25, (n_types, 1)) + rng.normal(
            0.0, 0.1, (n_types, int(ribosomal_V.sum()))
        )
        for t in range(min(n_types, len(TYPES))):
            markers = self._tokens(TYPES[t][2])
            self._forced_V[markers] = True
            self._log_mean_V[markers] = np.minimum(self._log_mean_V[markers], -1.5)
            change_TV[t, markers] = rng.uniform(2.0, 4.0, len(markers))
        self._change_TV, self._sub_TV = change_TV, sub_TV

        self._program_PV = np.zeros((len(PROGRAMS), n))
        for p, (_, symbols) in enumerate(PROGRAMS):
            known = self._tokens(symbols)
            self._forced_V[known] = True
            self._program_PV[p] = (rng.random(n) < 0.01) * rng.gamma(1.0, 1.0, n)
            self._program_PV[p, known] = rng.gamma(4.0, 1.0, len(known))
        self._active_TP = rng.uniform(0.02, 0.35, (n_types, len(PROGRAMS)))
        self._mito_T = rng.uniform(0.02, 0.07, n_types)
        self._size_T = np.exp(rng.normal(0.0, 0.25, n_types))

    def _choose_genes(self, name: str) -> pd.DataFrame:
        table = self._table
        n_species = table.groupby("token")["species"].nunique()
        own = table[table["species"] == name].drop_duplicates("token").copy()
        if len(own) < self._n_genes:
            raise ConfigError(
                f"synthetic: n_genes={self._n_genes}, but the vocabulary has {len(own):,} genes of "
                f"{name}. Lower n_genes."
            )
        token = own["token"].to_numpy()
        own["shared"] = n_species.reindex(token).to_numpy() > 1
        own["rank"] = np.where(self._forced_V[token], -1.0, self._priority_V[token])
        own = own.sort_values("rank", kind="stable")
        shared, private = own[own["shared"]], own[~own["shared"]]
        n_private = min(len(private), round(0.15 * self._n_genes))
        n_shared = min(len(shared), self._n_genes - n_private)
        chosen = pd.concat([shared.head(n_shared), private.head(self._n_genes - n_shared)])
        # Files list their genes in an order of their own, never in that of the vocabulary.
        return chosen.sort_values("ensembl_id", kind="stable")

    def _batch_table(self, name: str) -> pd.DataFrame:
        per_donor, per_dataset = self._nesting
        rows = []
        for b in range(self._n_batches):
            donor = b // per_donor
            dataset = donor // per_dataset
            rows.append(
                {
                    "batch": f"{name}_batch{b + 1}",
                    "donor": f"{name}_donor{donor + 1}",
                    "dataset": f"synthetic_{name}_{dataset + 1}",
                    "assay": PLATFORMS[dataset % len(PLATFORMS)][0],
                    "tissue": TISSUES[dataset % len(TISSUES)],
                }
            )
        return pd.DataFrame(rows)

    def _build(self, name: str) -> _SpeciesWorld:
        rng = np.random.default_rng([self.seed, 2, zlib.crc32(name.encode())])
        genes = self._choose_genes(name)
        token_G = genes["token"].to_numpy(np.int64)
        shared_G = genes["shared"].to_numpy()
        n_genes, n_types = len(genes), self.n_cell_types

        # Orthologs keep most of a program; every species has drifted a little.
        kept_TG = rng.random((n_types, n_genes)) < np.where(shared_G, 0.88, 1.0)
        drift_TG = 1.0 + rng.normal(0.0, 0.15, (n_types, n_genes))
        change_TG = self._change_TV[:, token_G] * kept_TG * drift_TG
        log_mean_G = self._log_mean_V[token_G] + rng.normal(0.0, 0.35, n_genes)
        mito_G = self._mito_V[token_G]
        if not mito_G.any():
            mito_G = np.zeros(n_genes, bool)
            mito_G[:1] = True
        core_TG = np.exp(np.clip(log_mean_G + change_TG, -8.0, 7.0))
        core_TG[:, mito_G] = 0.0
        sub_TG = core_TG * np.exp(self._sub_TV[:, token_G])
        program_PG = self._program_PV[:, token_G].copy()
        program_PG[:, mito_G] = 0.0
        program_PG[program_PG.sum(axis=1) == 0] = 1.0
        mito = np.where(mito_G, rng.gamma(4.0, 1.0, n_genes), 0.0)
        clean_KG = _rows_to_one(
            np.vstack([core_TG, sub_TG, program_PG, mito[None], np.ones((1, n_genes))])
        )

        batches = self._batch_table(name)
        platform_of: dict[str, np.ndarray] = {}
        donor_of: dict[str, np.ndarray] = {}
        n_batches = len(batches)
        cum_BT = np.zeros((n_batches, n_types))
        profile_BKG = np.empty((n_batches, *clean_KG.shape))
        ambient_profile = np.zeros(n_genes)
        present_BT = self._present(rng, n_batches)
        depth_B, spread_B, ambient_B, dropout_B = (np.empty(n_batches) for _ in range(4))
        for b in range(n_batches):
            dataset, donor = batches["dataset"][b], batches["donor"][b]
            if dataset not in platform_of:
                platform_of[dataset] = rng.normal(0.0, 0.25, n_genes)
            if donor not in donor_of:
                donor_of[donor] = rng.normal(0.0, 0.1, n_genes)
            effect_G = platform_of[dataset] + donor_of[donor] + rng.normal(0.0, 0.08, n_genes)
            weight_T = rng.dirichlet(np.full(n_types, 4.0)) * present_BT[b]
            weight_T = weight_T / weight_T.sum()
            cum_BT[b] = np.cumsum(weight_T)
            cum_BT[b, np.flatnonzero(present_BT[b])[-1] :] = 1.0
            mean_G = 0.93 * weight_T @ clean_KG[:n_types] + 0.07 * clean_KG[-2]
            ambient_profile += mean_G / n_batches
            raw_KG = clean_KG.copy()
            raw_KG[-1] = mean_G
            profile_BKG[b] = _rows_to_one(raw_KG * np.exp(self._strength * effect_G))
            platform = next(p for p in PLATFORMS if p[0] == batches["assay"][b])
            depth_B[b] = platform[1] * np.exp(rng.normal(0.0, 0.15))
            spread_B[b], ambient_B[b], dropout_B[b] = platform[2:]
        clean_KG[-1] = ambient_profile
        alias_BKG2 = np.empty((*profile_BKG.shape, 2), np.uint32)
        for b in range(n_batches):
            alias_tables(profile_BKG[b], alias_BKG2[b])
        size_G = self._size_V[token_G]
        weight_B = rng.dirichlet(np.full(n_batches, 10.0))
        depth_B *= _scale_for(
            self.genes_per_cell,
            profile_BKG[:, :n_types],
            np.diff(cum_BT, axis=1, prepend=0.0) * weight_B[:, None],
            depth_B[:, None] * self._size_T,
            spread_B,
            size_G,
            dropout_B,
            mito=profile_BKG[:, -2],
        )
        var = pd.DataFrame(
            {"gene_symbol": genes["symbol"].astype(str).to_numpy()},
            index=pd.Index(genes["ensembl_id"].astype(str).to_numpy(), name=None),
        )
        return _SpeciesWorld(
            name=name,
            key=np.random.SeedSequence([self.seed, 3, zlib.crc32(name.encode())]).generate_state(
                1, np.uint64
            )[0],
            var=var,
            token_G=token_G,
            size_G=size_G,
            clean_KG=clean_KG.astype(np.float32),
            profile_BKG=profile_BKG.astype(np.float32),
            alias_BKG2=alias_BKG2,
            depth_B=depth_B,
            spread_B=spread_B,
            ambient_B=ambient_B,
            dropout_B=dropout_B,
            cum_B=np.cumsum(weight_B),
            cum_BT=cum_BT,
            batches=batches,
        )

    def _present(self, rng: np.random.Generator, n_batches: int) -> np.ndarray:
        """Choose which types a batch lacks; types and batches keep at least half of each other."""
        present_BT = np.ones((n_batches, self.n_cell_types), bool)
        pairs = rng.permutation(n_batches * self.n_cell_types)
        wanted = round(self._missing * len(pairs))
        for pair in pairs:
            if wanted <= 0:
                break
            b, t = divmod(int(pair), self.n_cell_types)
            if t in self._path or present_BT[:, t].sum() <= max(1, n_batches // 2):
                continue
            if present_BT[b].sum() - 1 < max(2, self.n_cell_types // 2):
                continue
            present_BT[b, t] = False
            wanted -= 1
        return present_BT

    def cells(
        self,
        species: str,
        start: int,
        stop: int,
        *,
        with_truth: bool = False,
        threads: int | None = None,
    ) -> ad.AnnData:
        """Return cells ``start`` to ``stop`` of one species.

        Parameters
        ----------
        species
            One of the species of this world.
        start, stop
            Numbers of the first cell and of the one after the last. Any range may be asked for, in
            any order: a cell depends only on its number.
        with_truth
            Add ``layers["true_rate"]`` (C, G) float32: the noise-free expression of the cell (no
            ambient RNA, platform effect or dropout), in counts at the library size drawn for the
            cell; and ``obs["true_library"]``.
        threads
            Threads to draw with; all cores (at most 4) by default. The result does not depend on
            it.

        Returns
        -------
        AnnData
            ``X`` CSR int32 (C, G), ``var_names`` Ensembl ids, obs columns cell_type, batch, donor,
            dataset, species, assay, tissue (and pseudotime where a trajectory was asked for).
        """
        world = self._worlds[species]
        n = stop - start
        n_components = world.clean_KG.shape[0]
        cell_type_C = np.empty(n, np.int32)
        batch_C = np.empty(n, np.int32)
        library_C = np.empty(n)
        pseudotime_C = np.empty(n)
        share_CK = np.empty((n, n_components), np.float32)
        state_C = np.empty(n, np.uint64)
        describe_cells(
            world.key, start, cell_type_C, batch_C, library_C, pseudotime_C, share_CK, state_C,
            world.cum_B, world.cum_BT, world.depth_B, world.spread_B, world.ambient_B, self._size_T,
            self._mito_T, self._active_TP, *self._path,
        )  # fmt: skip
        X = self._draw_counts(world, batch_C, library_C, share_CK, state_C, threads)
        obs = pd.DataFrame(index=pd.Index([f"{species}_{c:07d}" for c in range(start, stop)]))
        obs["cell_type"] = pd.Categorical.from_codes(
            cell_type_C, categories=pd.Index(self.cell_types)
        )
        for column in ("batch", "donor", "dataset"):
            obs[column] = pd.Categorical(
                world.batches[column].to_numpy()[batch_C], world.batches[column].unique()
            )
        obs["species"] = pd.Categorical([species] * n, categories=[species])
        for column in ("assay", "tissue"):
            obs[column] = pd.Categorical(
                world.batches[column].to_numpy()[batch_C], world.batches[column].unique()
            )
        if self.trajectory:
            obs["pseudotime"] = pseudotime_C.astype(np.float32)
        adata = ad.AnnData(X=X, obs=obs, var=world.var.copy())
        adata.uns["synthetic"] = dict(self.settings)
        if with_truth:
            share_CK[:, -1] = 0.0
            share_CK /= share_CK.sum(axis=1, keepdims=True)
            adata.layers["true_rate"] = (share_CK @ world.clean_KG) * library_C[:, None].astype(
                np.float32
            )
            adata.obs["true_library"] = library_C.astype(np.float32)
        return adata

    def _draw_counts(
        self,
        world: _SpeciesWorld,
        batch_C: np.ndarray,
        library_C: np.ndarray,
        share_CK: np.ndarray,
        state_C: np.ndarray,
        threads: int | None,
    ) -> sparse.csr_matrix:
        n = len(batch_C)
        n_threads = min(4, os.cpu_count() or 1) if threads is None else max(1, threads)
        reference = float(np.median(world.depth_B))
        # Room for about what is expected; a part that overflows goes on in a second buffer.
        room = max(4 * len(world.size_G), 1)

        begin_C, length_C = np.empty(n, np.int64), np.empty(n, np.int64)

        def part(order_C: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            found = []
            at = 0
            while at < len(order_C):
                capacity = room + round(1.3 * self.genes_per_cell * (len(order_C) - at))
                gene_N, count_N = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
                after, _ = draw_counts(
                    order_C, at, batch_C, library_C, share_CK, state_C, world.profile_BKG,
                    world.alias_BKG2, world.size_G, world.dropout_B, reference, begin_C, length_C,
                    gene_N, count_N,
                )  # fmt: skip
                found.append((order_C[at:after], gene_N, count_N))
                at = after
            return found

        # Cells of one batch and type read the same tables: drawing them together keeps the tables
        # in cache.
        order_C = np.lexsort((np.argmax(share_CK, axis=1), batch_C))
        spans = np.array_split(order_C, min(n_threads, max(1, n // 64)))
        if len(spans) == 1:
            parts = [part(spans[0])]
        else:
            with ThreadPoolExecutor(len(spans)) as pool:
                parts = list(pool.map(part, spans))
        indptr_C1 = np.concatenate([[0], np.cumsum(length_C)])
        gene_N, count_N = np.empty(indptr_C1[-1], np.int32), np.empty(indptr_C1[-1], np.int32)
        for found in parts:
            for cells_C, gene_part_N, count_part_N in found:
                scatter(
                    cells_C,
                    begin_C,
                    length_C,
                    indptr_C1,
                    gene_part_N,
                    count_part_N,
                    gene_N,
                    count_N,
                )
        if len(gene_N) < 2**31:
            indptr_C1 = indptr_C1.astype(np.int32)
        X = sparse.csr_matrix((count_N, gene_N, indptr_C1), shape=(n, len(world.size_G)))
        X.has_sorted_indices = True
        return X

    def split(self, n_cells: int) -> dict[str, int]:
        """Return how many of ``n_cells`` each species gets; the first ones take the rest."""
        each, rest = divmod(n_cells, len(self.species))
        return {name: each + (s < rest) for s, name in enumerate(self.species)}


def _type_names(n: int) -> tuple[str, ...]:
    names = [name for name, _, _ in TYPES[:n]]
    return tuple(names + [f"cell type {t + 1}" for t in range(len(names), n)])


def _rows_to_one(values_KG: np.ndarray) -> np.ndarray:
    return values_KG / values_KG.sum(axis=1, keepdims=True)


def _scale_for(
    genes_per_cell: float,
    profile_BTG: np.ndarray,
    weight_BT: np.ndarray,
    depth_BT: np.ndarray,
    spread_B: np.ndarray,
    size_G: np.ndarray,
    dropout_B: np.ndarray,
    *,
    mito: np.ndarray,
) -> float:
    """Return the factor on all depths at which a cell expresses ``genes_per_cell`` genes."""
    pairs = np.argwhere(weight_BT > 0)
    # 48 pairs are plenty for an average, and bound the work for many batches.
    pairs = pairs[:: max(1, len(pairs) // 48)]
    weights = weight_BT[pairs[:, 0], pairs[:, 1]]
    weights = weights / weights.sum()
    reference = np.median(depth_BT)
    # Three-point Gauss-Hermite rule over the log-normal library.
    nodes = ((-math.sqrt(3.0), 1 / 6), (0.0, 2 / 3), (math.sqrt(3.0), 1 / 6))

    def expected(scale: float) -> float:
        total = 0.0
        for (b, t), weight in zip(pairs, weights, strict=True):
            profile_G = 0.92 * profile_BTG[b, t] + 0.05 * mito[b]
            for z, share in nodes:
                depth = depth_BT[b, t] * math.exp(spread_B[b] * z)
                mean_G = scale * depth * profile_G
                seen_G = -np.expm1(-size_G * np.log1p(mean_G / size_G))
                strength = min(0.6, dropout_B[b] * math.sqrt(reference / depth))
                total += (
                    weight * share * float((seen_G * (1.0 - strength / (1.0 + 2.0 * mean_G))).sum())
                )
        return total

    low, high = math.log(genes_per_cell / 10), math.log(genes_per_cell * 1000)
    for _ in range(40):
        middle = 0.5 * (low + high)
        found = expected(math.exp(middle))
        if abs(found - genes_per_cell) < 0.003 * genes_per_cell:
            break
        low, high = (middle, high) if found < genes_per_cell else (low, middle)
    return math.exp(middle)


@either_seed
def synthetic(
    n_cells: int,
    *,
    species: tuple[str, ...] = ("human", "mouse"),
    n_batches: int = 4,
    n_cell_types: int = 8,
    n_genes: int = 4000,
    genes_per_cell: int = 600,
    batch_strength: float = 1.0,
    missing: float = 0.1,
    trajectory: bool = False,
    batches_per_donor: int = 1,
    donors_per_dataset: int = 2,
    seed: int = 0,
    vocabulary: GeneVocabulary | None = None,
    with_truth: bool = False,
) -> dict[str, ad.AnnData]:
    """Generate realistic counts, one AnnData per species.

    Parameters
    ----------
    n_cells
        Cells in all, split evenly over the species.
    species, n_batches, n_cell_types, n_genes, genes_per_cell, batch_strength
        See :class:`SyntheticWorld`.
    missing, trajectory, batches_per_donor, donors_per_dataset, seed, vocabulary
        See :class:`SyntheticWorld`.
    with_truth
        Add the noise-free expression as ``layers["true_rate"]`` (dense; see
        :meth:`SyntheticWorld.cells`).

    Returns
    -------
    dict of str to AnnData
        Raw counts (CSR, int32), Ensembl ids as ``var_names``, ``var["gene_symbol"]``, and the obs
        columns cell_type, batch, donor, dataset, species, assay, tissue.

    Raises
    ------
    ConfigError
        If a number is impossible, a species unknown, or the truth would not fit (over 4 GB).

    Examples
    --------
    >>> cells = synthetic(2000, seed=1)  # doctest: +SKIP
    >>> cells["human"].shape  # doctest: +SKIP
    (1000, 4000)
    """
    if n_cells < 1:
        raise ConfigError(f"synthetic: n_cells={n_cells}; it must be at least 1.")
    if with_truth and n_cells * n_genes * 4 > 4e9:
        raise ConfigError(
            f"synthetic: with_truth needs {n_cells * n_genes * 4 / 1e9:.1f} GB for {n_cells:,} "
            f"cells x {n_genes:,} genes; ask for fewer cells or genes, or use SyntheticWorld.cells "
            "in parts."
        )
    world = SyntheticWorld(
        species=species,
        n_batches=n_batches,
        n_cell_types=n_cell_types,
        n_genes=n_genes,
        genes_per_cell=genes_per_cell,
        batch_strength=batch_strength,
        missing=missing,
        trajectory=trajectory,
        batches_per_donor=batches_per_donor,
        donors_per_dataset=donors_per_dataset,
        seed=seed,
        vocabulary=vocabulary,
    )
    return {
        name: world.cells(name, 0, n, with_truth=with_truth)
        for name, n in world.split(n_cells).items()
    }


def synthetic_chunks(
    n_cells: int, chunk: int = 20_000, *, world: SyntheticWorld | None = None, **settings: object
) -> Iterator[ad.AnnData]:
    """Generate the same cells as :func:`synthetic`, one bounded part at a time.

    Parameters
    ----------
    n_cells
        Cells in all, split evenly over the species.
    chunk
        Cells per part.
    world
        A world made before; otherwise one is made from ``settings`` (see :class:`SyntheticWorld`).

    Yields
    ------
    AnnData
        At most ``chunk`` cells of one species (``obs["species"]``), first species first.
    """
    if n_cells < 1 or chunk < 1:
        raise ConfigError(f"synthetic: n_cells={n_cells}, chunk={chunk}; both must be at least 1.")
    if world is None:
        world = SyntheticWorld(**settings)  # type: ignore[arg-type]
    elif settings:
        raise ConfigError(f"synthetic: a world was given; {', '.join(settings)} would not be used.")
    for name, n in world.split(n_cells).items():
        for start in range(0, n, chunk):
            yield world.cells(name, start, min(n, start + chunk))
