import hashlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from genemodel.errors import DataError
from genemodel.genes import CELL, MASK, N_SPECIAL, PAD, GeneVocabulary

ROWS = [
    (3, "human", "ENSG00000000001", "AAA", "protein_coding", "ALPHA|A1"),
    (4, "human", "ENSG00000000002", "BBB", "protein_coding", ""),
    (5, "human", "ENSG00000000003", "CCC", "lncRNA", ""),
    (3, "mouse", "ENSMUSG00000000001", "Aaa", "protein_coding", ""),
    (6, "mouse", "ENSMUSG00000000002", "Ddd", "protein_coding", "Delta"),
]
COLUMNS = ["token", "species", "ensembl_id", "symbol", "biotype", "aliases"]


def table(rows=ROWS):
    return pd.DataFrame(rows, columns=COLUMNS)


def test_builtin_shares_tokens_between_one_to_one_orthologs_only():
    vocabulary = GeneVocabulary.builtin()
    assert vocabulary.species == ("human", "mouse")
    assert 30_000 < len(vocabulary) < 50_000
    genes = vocabulary.genes
    per_token = genes.groupby(["token", "species"]).size()
    assert per_token.max() == 1
    shared = genes[genes["token"].duplicated(keep=False)]
    assert 16_000 < shared["token"].nunique() < 18_500
    tokens = genes.set_index(["species", "symbol"])["token"]
    for human, mouse in [
        ("GAPDH", "Gapdh"),
        ("TP53", "Trp53"),
        ("CD3D", "Cd3d"),
        ("MALAT1", "Malat1"),
        ("MT-ND1", "mt-Nd1"),
        ("MT-RNR2", "mt-Rnr2"),
    ]:
        assert tokens["human", human] == tokens["mouse", mouse]
    # One-to-many: two human haemoglobin alphas, two mouse ones; no token is shared.
    several = [tokens["human", s] for s in ("HBA1", "HBA2")]
    several += [tokens["mouse", s] for s in ("Hba-a1", "Hba-a2")]
    assert len(set(several)) == 4


def test_builtin_holds_the_genes_it_promises():
    genes = GeneVocabulary.builtin().genes
    human = genes[genes["species"] == "human"]
    mouse = genes[genes["species"] == "mouse"]
    assert (human["biotype"] == "protein_coding").sum() > 19_500
    assert (mouse["biotype"] == "protein_coding").sum() > 21_000
    assert set(human["symbol"]) >= {"XIST", "NEAT1", "IGHM", "TRAC", "MIR21", "LINC00115"}
    assert set(mouse["symbol"]) >= {"Xist", "Ighm", "Trac", "Mir21a", "Snhg1"}
    for part in (human, mouse):
        assert part["ensembl_id"].is_unique
        assert part["symbol"].is_unique
    lncrna = genes[genes["biotype"] == "lncRNA"]["symbol"]
    clone_like = lncrna.str.contains(r"^(?:RP\d+-|A[CLP]\d{6}|ENS|Gm\d+$)|Rik$")
    assert not clone_like.any()
    assert not genes["biotype"].str.contains("pseudogene").any()


def test_builtin_is_read_once_and_needs_no_torch():
    assert GeneVocabulary.builtin() is GeneVocabulary.builtin()
    code = (
        "import sys\n"
        "import genemodel.genes.vocabulary as v\n"
        "v.GeneVocabulary.builtin()\n"
        "print([m for m in ('torch','lightning','scanpy','hydra','anndata') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_special_tokens_and_names():
    vocabulary = GeneVocabulary(table())
    assert (PAD, MASK, CELL, N_SPECIAL) == (0, 1, 2, 3)
    assert len(vocabulary) == 7
    assert vocabulary.token_names() == ["<pad>", "<mask>", "<cell>", "AAA", "BBB", "CCC", "Ddd"]
    assert vocabulary.token_ids()[3:] == [r[2] for r in (*ROWS[:3], ROWS[4])]
    assert vocabulary.tokens_of("mouse").tolist() == [3, 6]
    assert vocabulary.tokens_of("Mus musculus").tolist() == [3, 6]
    pd.testing.assert_frame_equal(vocabulary.genes, table(), check_dtype=False)


@pytest.mark.parametrize("name", ["v.tsv", "v.tsv.gz"])
def test_save_and_read_are_inverse_and_deterministic(tmp_path, name):
    vocabulary = GeneVocabulary(table(), provenance={"table": "made here"})
    vocabulary.save(tmp_path / name)
    first = (tmp_path / name).read_bytes()
    again = GeneVocabulary.read(tmp_path / name)
    assert again == vocabulary
    assert again.provenance == {"table": "made here"}
    again.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_files_of_the_same_bytes_are_read_once_and_each_other_under_its_name(tmp_path):
    for name in ("one.tsv", "two.tsv", "cut.tsv"):
        GeneVocabulary(table()).save(tmp_path / name)
    vocabulary = GeneVocabulary.read(tmp_path / "one.tsv")
    assert GeneVocabulary.read(tmp_path / "two.tsv") is vocabulary
    (tmp_path / "cut.tsv").write_bytes((tmp_path / "one.tsv").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"cut\.tsv.*incomplete"):
        GeneVocabulary.read(tmp_path / "cut.tsv")
    GeneVocabulary(table(ROWS[:3])).save(tmp_path / "two.tsv")
    assert GeneVocabulary.read(tmp_path / "two.tsv").species == ("human",)


def test_fingerprint_is_the_sha256_of_the_table():
    body = "\t".join(COLUMNS) + "\n" + "".join("\t".join(map(str, r)) + "\n" for r in ROWS)
    fingerprint = GeneVocabulary(table()).fingerprint
    assert fingerprint == hashlib.sha256(body.encode()).hexdigest()
    changed = [*ROWS[:4], (6, "mouse", "ENSMUSG00000000002", "Ddd", "protein_coding", "")]
    assert GeneVocabulary(table(changed)).fingerprint != fingerprint


def test_extends_compares_tokens_not_names():
    small, large = GeneVocabulary(table(ROWS[:3])), GeneVocabulary(table())
    renamed = [(r[0], r[1], r[2], r[3] + "X", r[4], "") for r in ROWS]
    assert large.extends(small)
    assert not small.extends(large)
    assert GeneVocabulary(table(renamed)).extends(large)
    moved = [(3, *ROWS[1][1:]), (4, *ROWS[0][1:]), *ROWS[2:]]
    assert not GeneVocabulary(table(moved)).extends(small)


def test_pickle_keeps_the_vocabulary():
    vocabulary = GeneVocabulary(table(), provenance={"a": "b"})
    vocabulary.index("human")
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again == vocabulary
    assert again.provenance == {"a": "b"}
    assert again.match(["AAA"], species="human").token_G.tolist() == [3]


def swapped(rows, i, j):
    rows = list(rows)
    rows[i], rows[j] = rows[j], rows[i]
    return rows


@pytest.mark.parametrize(
    ("rows", "line", "why"),
    [
        (swapped(ROWS, 0, 1), 2, "token 3 is not above the token 4"),
        (swapped(ROWS, 2, 3), 4, "must stand together"),
        ([*ROWS, ROWS[4]], 6, "token 6 is not above"),
        ([*ROWS, (7, *ROWS[4][1:])], 6, "stands already on line 5"),
        ([*ROWS, (8, "mouse", "ENSMUSG00000000009", "E", "", "")], 6, "leaves a gap"),
        ([(2, *ROWS[0][1:]), *ROWS[1:]], 1, "belongs to the special tokens"),
        ([*ROWS[:2], (5, "human", "", "CCC", "", ""), *ROWS[3:]], 3, "empty ensembl_id"),
        ([(3, "human", "ENSG1", "A\tB", "", "")], 1, "symbol contains a tab"),
    ],
)
def test_broken_tables_are_refused_with_the_line(rows, line, why):
    with pytest.raises(DataError, match=rf"line {line} .*{re.escape(why)}"):
        GeneVocabulary(table(rows))


def test_line_numbers_are_those_of_the_file(tmp_path):
    path = tmp_path / "v.tsv"
    GeneVocabulary(table()).save(path)
    lines = path.read_text().split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("5\t"))
    lines[at] = lines[at].replace("5\t", "4\t", 1)
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"v.tsv: line {at + 1} .*token 4 is not above"):
        GeneVocabulary.read(path)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "v.tsv.gz"
    GeneVocabulary(table()).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(DataError, match="damaged or cut-off gzip"):
        GeneVocabulary.read(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        GeneVocabulary.read(tmp_path / "absent.tsv")
    plain = tmp_path / "v.tsv"
    GeneVocabulary(table()).save(plain)
    text = plain.read_text()
    for broken, message in [
        (text.replace("BBB", "BXB"), "do not agree with the sha256"),
        (text[:-8], "is cut off"),
        (text.replace("\tBBB", ""), "is not a row of 6 tab-separated fields"),
        (text.replace("\n4\t", "\nfour\t"), "begins with a token"),
        (text.replace("biotype", "kind"), "must be the header"),
        ("gene,token\nA,1\n", "is not a genemodel vocabulary"),
    ]:
        plain.write_text(broken)
        with pytest.raises(DataError, match=message):
            GeneVocabulary.read(plain)
    plain.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a UTF-8 text"):
        GeneVocabulary.read(plain)


def test_every_flipped_byte_of_the_table_is_noticed(tmp_path):
    path = tmp_path / "v.tsv"
    vocabulary = GeneVocabulary(table())
    vocabulary.save(path)
    data = path.read_bytes()
    start = data.index(b"\ntoken\t")
    for at in np.random.default_rng(0).choice(np.arange(start, len(data)), 60, replace=False):
        flipped = bytearray(data)
        flipped[at] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(DataError):
            GeneVocabulary.read(path)


def test_unknown_species_names_the_known_ones_and_the_command():
    with pytest.raises(DataError, match=r"human, mouse.*genemodel species name=zebrafish"):
        GeneVocabulary.builtin().tokens_of("zebrafish")
