import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.cells import matrices
from genemodel.cells.contract import find_counts
from genemodel.cells.diagnosis import diagnose
from genemodel.errors import DataError

N, G = 120, 300


def raw_counts(seed=0, mean=0.6):
    rng = np.random.default_rng(seed)
    return rng.poisson(mean * rng.gamma(1.0, 1.0, (N, G))).astype(np.float64) + np.eye(N, G)


def per_total(x, total):
    return x / x.sum(1, keepdims=True) * total


RAW = raw_counts()
LENGTHS = np.random.default_rng(1).gamma(2.0, 1.0, (1, G))
FRACTIONS = np.random.default_rng(2).uniform(0.1, 0.4, (N, G))
UNUSABLE = {
    "log1p of CP10k": (np.log1p(per_total(RAW, 1e4)), "log1p of normalised counts.*10,000"),
    "log1p of median": (np.log1p(per_total(RAW, 200)), "log1p of normalised counts.*200"),
    "log1p of counts": (np.log1p(RAW), "log1p of counts"),
    "log2 of CPM": (np.log2(per_total(RAW, 1e6) + 1), r"log2\(x \+ 1\).*1,000,000"),
    "log10 of CPM": (np.log10(per_total(RAW, 1e6) + 1), r"log10\(x \+ 1\).*1,000,000"),
    "log1p of selected genes": (np.log1p(per_total(RAW, 1e4))[:, ::4], "log1p of normalised"),
    "CPM": (per_total(RAW, 1e6), "CPM"),
    "CP10k": (per_total(RAW, 1e4), "CP10k"),
    "TPM": (per_total(RAW / LENGTHS, 1e6), "TPM"),
    "size factors": (
        RAW / RAW.sum(1, keepdims=True) * np.linspace(300, 500, N)[:, None],
        "divided by a size factor",
    ),
    "scaled": ((RAW - RAW.mean(0)) / (RAW.std(0) + 1), "negative values.*scaled"),
    "negative whole numbers": (RAW - 1, "negative values"),
    "NaN": (np.where(RAW == 3, np.nan, RAW), "NaN"),
    "infinite": (np.where(RAW == 3, np.inf, RAW), "infinite"),
    "zeros": (np.zeros((N, G)), "nothing but zeros"),
    "too large": (RAW * 1e10, "more than a cell can hold"),
}
ROUNDABLE = {
    "expected counts": (RAW + (RAW > 2) * FRACTIONS, "fractional values"),
    "floating-point noise": (RAW * (1 + 1e-6), "floating-point noise"),
}


def adata_of(x, **layers):
    var = pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])])
    return ad.AnnData(x, var=var, layers=layers)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix, np.float32])
@pytest.mark.parametrize("name", UNUSABLE)
def test_refuses_what_is_not_counts(name, layout):
    x, what = UNUSABLE[name]
    adata = adata_of(layout(x))
    with pytest.raises(DataError, match=what) as caught:
        find_counts(adata, where="cells.h5ad")
    text = str(caught.value)
    assert text.startswith("cells.h5ad, X: ")
    assert "use the file with raw counts" in text


@pytest.mark.parametrize("name", [*UNUSABLE, *ROUNDABLE])
def test_the_refusal_names_the_layers_that_would_do(name):
    x, what = (UNUSABLE | ROUNDABLE)[name]
    counts = RAW[:, : x.shape[1]]
    adata = adata_of(x, counts=sp.csr_matrix(counts), scaled=-counts)
    with pytest.raises(DataError, match=what) as caught:
        find_counts(adata)
    assert "layers['counts'] holds raw counts: set layer=counts" in str(caught.value)
    assert "set layer=scaled" not in str(caught.value)
    found = find_counts(adata, layer="counts")
    assert (found.read(0, N) != sp.csr_matrix(counts)).nnz == 0


def test_raw_is_named_and_read_with_its_own_genes():
    adata = adata_of(RAW)
    adata.raw = adata
    adata = adata[:, :50].copy()
    adata.X = np.log1p(adata.X)
    with pytest.raises(DataError, match="raw holds raw counts: set layer=raw"):
        find_counts(adata)
    found = find_counts(adata, layer="raw")
    assert found.shape == (N, G) and len(found.genes) == G


def test_no_other_matrix_is_taken_in_silence():
    adata = adata_of(RAW, normalised=np.log1p(per_total(RAW, 1e4)))
    with pytest.raises(DataError, match=r"layers\['normalised'\].*X holds raw counts: set layer=X"):
        find_counts(adata, layer="normalised")
    with pytest.raises(DataError, match="no layer 'spliced'; it has X, normalised"):
        find_counts(adata, layer="spliced")


@pytest.mark.parametrize("name", ROUNDABLE)
def test_expected_counts_are_rounded_on_request_only(name):
    x, what = ROUNDABLE[name]
    with pytest.raises(DataError, match=f"{what}.*allow_fractional=true rounds"):
        find_counts(adata_of(x))
    found = find_counts(adata_of(x), allow_fractional=True)
    np.testing.assert_array_equal(found.read(0, N).toarray(), np.rint(x))
    assert found.tally.rounded == (x != np.rint(x)).sum()


def test_a_logarithm_is_not_rounded():
    with pytest.raises(DataError, match="log1p"):
        find_counts(adata_of(np.log1p(per_total(RAW, 1e4))), allow_fractional=True)


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "NaN"), (-3.0, "negative"), (2.5, "fractional"), (np.inf, "inf")]
)
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_one_corrupt_value_beyond_the_first_look_is_found(value, what, layout):
    x = np.tile(RAW, (10, 1))
    x[300, 17] = value  # the first look sees the first, middle and last 64 cells
    counts = find_counts(adata_of(layout(x)), where="cells")
    counts.read(0, 256)
    with pytest.raises(DataError, match=what) as caught:
        counts.read(256, 512)
    assert "cell number 300" in str(caught.value) and "cells, X" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble, ">i4", ">f8", np.uint64, np.int8])
def test_whole_numbers_of_types_that_scipy_lacks_are_counts(dtype):
    counts = np.minimum(RAW, 100)
    adata = adata_of(RAW)
    for values in (counts.astype(dtype), np.asfortranarray(counts.astype(dtype))):
        adata.X = values
        np.testing.assert_array_equal(find_counts(adata).read(3, 40).toarray(), counts[3:40])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32, np.float64])
def test_whole_numbers_of_any_type_are_counts(dtype):
    found = find_counts(adata_of(sp.csr_matrix(RAW.astype(dtype))))
    block = found.read(3, 40)
    assert block.dtype == np.int32
    np.testing.assert_array_equal(block.toarray(), RAW[3:40])


def test_text_and_objects_are_refused():
    adata = adata_of(RAW)
    for values in (RAW.astype(str), RAW.astype(object)):
        with pytest.raises(DataError, match="holds text, not numbers.*layer="):
            matrices.rows_of(values, "cells, X")
    adata.X = None
    with pytest.raises(DataError, match=r"X: is empty \(None\)"):
        find_counts(adata)


def test_an_object_without_cells_is_refused():
    with pytest.raises(DataError, match="no cells or no genes"):
        find_counts(adata_of(np.zeros((0, 5))))


def test_detections_and_equal_sums_are_noted():
    binary = find_counts(adata_of(sp.csr_matrix((RAW > 0).astype(np.int32))))
    assert "detection, not counts" in binary.notes[0]
    rounded = np.rint(per_total(raw_counts(mean=30), 1e6))
    assert "every cell sums to about 1,000,000" in find_counts(adata_of(rounded)).notes[0]
    assert find_counts(adata_of(RAW)).notes == ()


def test_zeros_go_and_columns_are_sorted_without_touching_the_users_matrix():
    data = np.array([0.0, 2.0, 1.0, 4.0])
    indices = np.array([5, 3, 3, 1], np.int32)
    x = sp.csr_matrix((data, indices, np.array([0, 3, 3, 4], np.int32)), shape=(3, 8))
    kept = data.copy(), indices.copy()
    found = find_counts(adata_of(x))
    block = found.read(0, 3)
    np.testing.assert_array_equal(block.indices, [3, 1])
    np.testing.assert_array_equal(block.data, [3, 4])
    assert found.tally.explicit_zeros == 1
    np.testing.assert_array_equal(data, kept[0])
    np.testing.assert_array_equal(indices, kept[1])


@pytest.mark.parametrize("wrong", [-1, 999])
def test_a_column_outside_the_matrix_is_refused_before_scipy_sees_it(wrong):
    rows = matrices.SparseRows(
        np.ones(3), np.array([0, wrong, 2], np.int32), np.array([0, 1, 3]), (2, 5), "damaged, X"
    )
    with pytest.raises(DataError, match=f"damaged, X: a stored column number is {wrong}"):
        rows.read(0, 2)


@pytest.mark.parametrize("indptr", [[0, 3, 2], [1, 2, 3], [0, 1, 9], [0, 3]])
def test_row_pointers_are_checked(indptr):
    with pytest.raises(DataError, match="row pointers"):
        matrices.SparseRows(np.ones(3), np.zeros(3, np.int32), np.array(indptr), (2, 5), "X")


def test_columns_are_turned_into_rows_in_several_passes(monkeypatch):
    monkeypatch.setattr(matrices, "TRANSPOSED_VALUES", 900)
    monkeypatch.setattr(matrices, "BLOCK_VALUES", 500)
    csc = sp.csc_matrix(RAW)
    rows = matrices.ColumnRows(csc.data, csc.indices, csc.indptr, csc.shape, "X")
    assert rows.from_the_start  # more than one pass
    np.testing.assert_array_equal(rows.read(0, N).toarray(), RAW)
    np.testing.assert_array_equal(rows.read(37, 80).toarray(), RAW[37:80])


def test_every_bound_on_a_block_is_kept(monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK_VALUES", 400)
    csr = sp.csr_matrix(RAW)
    rows = matrices.SparseRows(csr.data, csr.indices, csr.indptr, csr.shape, "X")
    start, blocks = 0, []
    while start < N:
        stop = rows.stop_of(start, 50)
        blocks.append(rows.read(start, stop))
        assert stop - start == 1 or blocks[-1].nnz <= 400
        start = stop
    np.testing.assert_array_equal(sp.vstack(blocks).toarray(), RAW)


def test_diagnosis_of_counts_is_counts_for_shallow_and_deep_cells():
    for mean in (0.02, 0.5, 40, 3000):
        x = raw_counts(seed=3, mean=mean)
        assert diagnose(sp.csr_matrix(x)).is_counts
