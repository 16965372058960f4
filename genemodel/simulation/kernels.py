"""Compiled inner loops of the generator: random streams, mixtures of cells, counts of genes.

Axes: C cells, G genes of one species, B batches, K components, T cell types, P gene programs, N
counts drawn.
"""

import math

import numba
import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_S32 = np.uint64(32)
_LOW_32 = np.uint64(0xFFFFFFFF)
_TO_UNIT = 1.0 / (1 << 53)


@numba.njit(inline="always")
def _mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@numba.njit(inline="always")
def _uniform(state):  # type: ignore[no-untyped-def]
    """Return the next double in (0, 1) of a SplitMix64 stream held in ``state[0]``."""
    state[0] += _GOLDEN
    return ((_mix(state[0]) >> _S11) + 0.5) * _TO_UNIT


@numba.njit
def _normal(state):  # type: ignore[no-untyped-def]
    return math.sqrt(-2.0 * math.log(_uniform(state))) * math.cos(2.0 * math.pi * _uniform(state))


@numba.njit
def _poisson(state, mean):  # type: ignore[no-untyped-def]
    """Draw an exact Poisson count (above 10 by Hörmann's transformed rejection, 1993)."""
    if mean <= 0.0:
        return 0
    if mean < 10.0:
        k = 0
        left = math.exp(-mean)
        product = _uniform(state)
        while product > left:
            k += 1
            product *= _uniform(state)
        return k
    root = math.sqrt(mean)
    b = 0.931 + 2.53 * root
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2.0)
    while True:
        u = _uniform(state) - 0.5
        v = _uniform(state)
        us = 0.5 - abs(u)
        k = int(math.floor((2.0 * a / us + b) * u + mean + 0.43))
        if us >= 0.07 and v <= v_r:
            return k
        if k < 0 or (us < 0.013 and v > us):
            continue
        bound = -mean + k * math.log(mean) - math.lgamma(k + 1.0)
        if math.log(v) + math.log(inverse_alpha) - math.log(a / (us * us) + b) <= bound:
            return k


@numba.njit
def _gamma(state, shape):  # type: ignore[no-untyped-def]
    """Draw a gamma variate of scale 1 (Marsaglia and Tsang 2000)."""
    boost = 1.0
    if shape < 1.0:
        boost = _uniform(state) ** (1.0 / shape)
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        x = _normal(state)
        v = (1.0 + c * x) ** 3
        if v > 0.0 and math.log(_uniform(state)) < 0.5 * x * x + d - d * v + d * math.log(v):
            return boost * d * v


@numba.njit(inline="always")
def _cluster(state, ratio, log1p_ratio):  # type: ignore[no-untyped-def]
    """Turn one Poisson point into the size of a negative binomial cluster, or refuse it (0).

    With ``ratio`` = mean / size, clusters come at rate size * log1p(ratio), a share
    log1p(ratio) / ratio of the Poisson points, and their sizes are logarithmic with parameter
    ratio / (1 + ratio).
    """
    u = _uniform(state) * ratio
    if u >= log1p_ratio:
        return 0
    u /= log1p_ratio
    q = ratio / (1.0 + ratio)
    p = q / log1p_ratio
    k = 1
    while u > p and k < 100_000:
        u -= p
        p *= q * k / (k + 1.0)
        k += 1
    return k


@numba.njit(nogil=True, cache=True)
def describe_cells(  # type: ignore[no-untyped-def]
    key, first, cell_type_C, batch_C, library_C, pseudotime_C, share_CK, state_C,
    cum_B, cum_BT, depth_B, spread_B, ambient_B, size_T, mito_T, active_TP, path_from, path_to,
):  # fmt: skip
    """Draw what a cell is: batch, type, library, mixture over the components."""
    n_types = cum_BT.shape[1]
    n_programs = active_TP.shape[1]
    state = np.empty(1, np.uint64)
    for i in range(len(batch_C)):
        state[0] = _mix(key + np.uint64(first + i + 1) * _MIX_1)
        u = _uniform(state)
        b = 0
        while b < len(cum_B) - 1 and u > cum_B[b]:
            b += 1
        u = _uniform(state)
        t = 0
        while t < n_types - 1 and u > cum_BT[b, t]:
            t += 1
        library_C[i] = depth_B[b] * size_T[t] * math.exp(spread_B[b] * _normal(state))
        share_CK[i, :] = 0.0
        rest = 1.0
        ambient = min(0.3, ambient_B[b] * math.exp(0.4 * _normal(state)))
        mito = min(0.35, mito_T[t] * math.exp(0.5 * _normal(state)))
        share_CK[i, 2 * n_types + n_programs + 1] = ambient
        rest -= ambient
        share_CK[i, 2 * n_types + n_programs] = rest * mito
        rest -= rest * mito
        for p in range(n_programs):
            if _uniform(state) < active_TP[t, p]:
                w = rest * (0.02 + 0.08 * _uniform(state))
                share_CK[i, 2 * n_types + p] = w
                rest -= w
        u = _uniform(state)
        pseudotime_C[i] = np.nan
        if path_from >= 0 and (t == path_from or t == path_to):
            # Each half of the path carries the label of the end that it is nearer to.
            x = 0.5 + 0.5 * u if t == path_to else 0.5 - 0.5 * u
            pseudotime_C[i] = x
            share_CK[i, path_from] = rest * (1.0 - x)
            share_CK[i, path_to] = rest * x
        else:
            u = 0.5 - 0.5 * math.cos(math.pi * u)
            share_CK[i, t] = rest * (1.0 - u)
            share_CK[i, n_types + t] = rest * u
        cell_type_C[i] = t
        batch_C[i] = b
        state_C[i] = state[0]


@numba.njit(nogil=True, cache=True)
def draw_counts(  # type: ignore[no-untyped-def]
    order_C, start, batch_C, library_C, share_CK, state_C, profile_BKG, alias_BKG2, size_G,
    dropout_B, reference_library, begin_C, length_C, gene_N, count_N,
):  # fmt: skip
    """Draw the counts of cells ``order_C[start:]``; return (where room ran out, counts written)."""
    n_genes = len(size_G)
    n_genes_64 = np.uint64(n_genes)
    n_components = share_CK.shape[1]
    points_G = np.zeros(n_genes, np.int32)
    slot_K = np.empty(n_components, np.int64)
    mean_K = np.empty(n_components, np.float64)
    state = np.empty(1, np.uint64)
    n = 0
    for at in range(start, len(order_C)):
        if n + n_genes > len(gene_N):
            return at, n
        i = order_C[at]
        begin_C[i] = n
        state[0] = state_C[i]
        b = batch_C[i]
        library = library_C[i]
        used = 0
        for k in range(n_components):
            if share_CK[i, k] > 0.0:
                slot_K[used] = k
                used += 1
        for j in range(used):
            k = slot_K[j]
            n_points = _poisson(state, library * share_CK[i, k])
            alias_G2 = alias_BKG2[b, k]
            stream = state[0]
            for _ in range(n_points):
                # The high half of one draw picks a gene, the low half decides between it and its
                # alias.
                stream += _GOLDEN
                bits = _mix(stream)
                g = ((bits >> _S32) * n_genes_64) >> _S32
                if (bits & _LOW_32) >= alias_G2[g, 0]:
                    g = np.uint64(alias_G2[g, 1])
                points_G[g] += 1
            state[0] = stream
            mean_K[j] = library * share_CK[i, k]
        strength = min(0.6, dropout_B[b] * math.sqrt(reference_library / library))
        for g in range(n_genes):
            points = points_G[g]
            if points == 0:
                continue
            points_G[g] = 0
            mean = 0.0
            for j in range(used):
                mean += mean_K[j] * profile_BKG[b, slot_K[j], g]
            if mean > 20.0:
                # Loud genes take the direct road: the chance that they had no point at all is
                # e**-20.
                count = _poisson(state, mean * _gamma(state, size_G[g]) / size_G[g])
            else:
                ratio = mean / size_G[g]
                if ratio < 0.05:
                    log1p_ratio = ratio * (
                        1.0 - ratio * (0.5 - ratio * (1 / 3 - ratio * (0.25 - 0.2 * ratio)))
                    )
                else:
                    log1p_ratio = math.log1p(ratio)
                count = 0
                for _ in range(points):
                    count += _cluster(state, ratio, log1p_ratio)
            if count > 0 and _uniform(state) * (1.0 + 2.0 * mean) >= strength:
                gene_N[n] = g
                count_N[n] = count
                n += 1
        length_C[i] = n - begin_C[i]
    return len(order_C), n


@numba.njit(nogil=True, cache=True)
def scatter(cells_C, begin_C, length_C, indptr_C1, gene_N, count_N, gene_out_N, count_out_N):  # type: ignore[no-untyped-def]
    """Copy what was drawn for some cells to their places in the CSR arrays."""
    for i in cells_C:
        for j in range(length_C[i]):
            gene_out_N[indptr_C1[i] + j] = gene_N[begin_C[i] + j]
            count_out_N[indptr_C1[i] + j] = count_N[begin_C[i] + j]


@numba.njit(cache=True)
def alias_tables(profile_KG, alias_KG2):  # type: ignore[no-untyped-def]
    """Fill Walker alias tables (Vose's construction) for rows that sum to one.

    ``alias_KG2[..., 0]`` is the chance of keeping the gene, in 2**-32; ``[..., 1]`` the other gene.
    """
    top = 2.0**32
    n_rows, n = profile_KG.shape
    scaled = np.empty(n, np.float64)
    small = np.empty(n, np.int32)
    large = np.empty(n, np.int32)
    for r in range(n_rows):
        n_small = 0
        n_large = 0
        for g in range(n):
            scaled[g] = profile_KG[r, g] * n
            alias_KG2[r, g, 0] = np.uint32(_LOW_32)
            alias_KG2[r, g, 1] = g
            if scaled[g] < 1.0:
                small[n_small] = g
                n_small += 1
            else:
                large[n_large] = g
                n_large += 1
        while n_small > 0 and n_large > 0:
            n_small -= 1
            s = small[n_small]
            large_g = large[n_large - 1]
            alias_KG2[r, s, 0] = np.uint32(min(scaled[s] * top, top - 1.0))
            alias_KG2[r, s, 1] = large_g
            scaled[large_g] -= 1.0 - scaled[s]
            if scaled[large_g] < 1.0:
                n_large -= 1
                small[n_small] = large_g
                n_small += 1
