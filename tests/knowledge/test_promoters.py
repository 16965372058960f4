import gzip

import numpy as np
import pytest

from genemodel.errors import DataError
from genemodel.knowledge.promoters import _CODE, kmers, promoters, sequences, starts, window
from genemodel.knowledge.sources import Columns


def codes(text):
    return _CODE[np.frombuffer(text.encode(), np.uint8)]


def text(these):
    return "".join("ACGTN"[i] for i in these)


def test_kmers_are_counted_as_by_hand():
    sequence = "ACGTNacgta"
    count = kmers(codes(sequence), 2)
    by_hand = {}
    for i in range(len(sequence) - 1):
        word = sequence[i : i + 2].upper()
        if "N" not in word:
            by_hand[word] = by_hand.get(word, 0) + 1
    index = {a + b: 4 * i + j for i, a in enumerate("ACGT") for j, b in enumerate("ACGT")}
    expected = np.zeros(16)
    for word, n in by_hand.items():
        expected[index[word]] = n
    np.testing.assert_array_equal(count, expected)
    assert kmers(codes("AC"), 3).sum() == 0


def test_a_window_is_read_in_the_direction_of_the_gene():
    sequence = codes("AAACCGTTTG")  # position 5 is the second C
    assert text(window(sequence, 5, forward=True, upstream=2, downstream=3)) == "ACCGT"
    # On the other strand the gene runs to the left, and its bases are the complement.
    assert text(window(sequence, 5, forward=False, upstream=2, downstream=3)) == "ACGGT"
    assert text(window(sequence, 1, forward=True, upstream=5, downstream=2)) == "AA"
    assert text(window(codes("ANG"), 2, forward=False, upstream=1, downstream=2)) == "CNT"


def reverse_complement(sequence):
    return sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_gene_and_the_same_gene_on_the_other_strand_are_alike(tmp_path, packed):
    rng = np.random.default_rng(0)
    sequence = "".join(rng.choice(list("ACGT"), 400))
    lines = "\n".join(sequence[i : i + 60] for i in range(0, 400, 60))
    other = reverse_complement(sequence)
    fasta = f">chr1 primary\n{lines}\n>chrUn\nACGT\n>2\n{other}\n"
    path = tmp_path / ("a.fa.gz" if packed else "a.fa")
    path.write_bytes(gzip.compress(fasta.encode()) if packed else fasta.encode())
    assert [name for name, _ in sequences(str(path))] == ["chr1", "chrUn", "2"]
    table = "gene,chrom,start,end,strand\nG1,1,100,300,+\nG2,2,101,301,-\nG3,1,1,9,-\nG4,9,5,9,+\n"
    (tmp_path / "tss.csv").write_text(table)
    where = starts(str(tmp_path / "tss.csv"), Columns({}))
    assert where["tss"].tolist() == [100, 301, 9, 5]
    genes, share = promoters(str(path), where, k=3, upstream=40, downstream=60)
    assert genes == ["G1", "G2"]  # G3's window is cut off by the end, G4's sequence is not there
    np.testing.assert_allclose(share[0], share[1])
    np.testing.assert_allclose((share**2).sum(1), 1, rtol=1e-5)
    where["forward"] = True
    turned = promoters(str(path), where, k=3, upstream=40, downstream=60)[1]
    assert abs(turned[0] - turned[1]).max() > 0.01


@pytest.mark.parametrize(
    ("content", "said"),
    [("ACGT\n", "is no FASTA file"), ("", "holds no sequence"), (">x\nACGT\n", "no start lies in")],
)
def test_bad_sequences_are_refused(tmp_path, content, said):
    (tmp_path / "a.fa").write_text(content)
    (tmp_path / "t.tsv").write_text("gene\tchrom\ttss\tstrand\nG\t1\t5\t+\n")
    where = starts(str(tmp_path / "t.tsv"), Columns({}))
    with pytest.raises(DataError, match=said):
        promoters(str(tmp_path / "a.fa"), where, k=2, upstream=2, downstream=2)


def test_a_starts_table_without_a_strand_is_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("gene\tchrom\ttss\nG\t1\t5\n")
    with pytest.raises(DataError, match="no column for the strand"):
        starts(str(tmp_path / "t.tsv"), Columns({}))
