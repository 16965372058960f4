import numpy as np
import pandas as pd
import pytest

from genemodel.errors import DataError
from genemodel.genes import ForeignTokens


def test_reads_the_table_in_token_order(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text(
        "ensembl_id\ttoken\tnonzero_median\n"
        "<cls>\t2\t\nENSG00000000003\t5\t0.5\n<eos>\t3\t\nensg00000000001\t4\t2.25\n"
    )
    tokens = ForeignTokens.read(path)
    assert tokens.ensembl_id_G.tolist() == ["ENSG00000000001", "ENSG00000000003"]
    assert tokens.token_G.tolist() == [4, 5]
    assert tokens.token_G.dtype == np.int64
    assert tokens.median_G.tolist() == [2.25, 0.5]
    assert tokens.median_G.dtype == np.float64
    assert tokens.specials == {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
    assert len(tokens) == 6


def test_medians_are_one_where_there_are_none(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("gene_id,token\nENSG00000000003,2\n")
    tokens = ForeignTokens.read(path, specials={"pad": 0, "mask": 1, "cls": 7})
    assert tokens.median_G.tolist() == [1.0]
    assert len(tokens) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene\ttok\nA\t2\n", "no column token or token_id"),
        ("gene\ttoken\nA\t2\nA\t3\n", "lists gene A twice"),
        ("gene\ttoken\nA\t2\nB\t2\n", "uses token 2 twice"),
        ("gene\ttoken\nA\t1\n", "uses token 1 twice"),
        ("gene\ttoken\nA\tx\n", "'x' in token, expected numbers"),
        ("gene\ttoken\nA\t2.5\n", "not a whole number"),
        ("gene\ttoken\tmedian\nA\t2\t0\n", "gives A the median 0"),
        ("gene\ttoken\tmedian\nA\t2\tinf\n", "gives A the median inf"),
        ("gene\ttoken\n<pad>\t0\n", "lists no gene"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "t.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        ForeignTokens.read(path)


def test_unknown_specials_are_refused(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("gene\ttoken\nA\t9\n")
    with pytest.raises(DataError, match="unknown special 'sep'"):
        ForeignTokens.read(path, specials={"pad": 0, "sep": 1})


def test_real_table_agrees_with_pandas(shared_knowledge):
    path = shared_knowledge / "geneformer_v1_medians_tokens.tsv.gz"
    tokens = ForeignTokens.read(path)
    table = pd.read_csv(path, sep="\t").sort_values("token")
    assert len(tokens) == 25_426
    assert tokens.specials == {"pad": 0, "mask": 1}
    assert tokens.ensembl_id_G.tolist() == table["ensembl_id"].tolist()
    np.testing.assert_array_equal(tokens.token_G, table["token"])
    np.testing.assert_allclose(tokens.median_G, table["nonzero_median"], rtol=1e-15)
