"""Every way in which people write a species means the same."""

import pytest

from genemodel.genes.species import SPECIES, species_name


@pytest.mark.parametrize(
    "text",
    [
        "human", "HUMAN", " Homo sapiens ", "homo_sapiens", "Homo-sapiens", "H. sapiens",
        "h.sapiens", "hsapiens", "Homo sapiens (human)", "human (Homo sapiens)", "NCBITaxon:9606",
        "NCBITaxon_9606", "taxid:9606", "txid9606", "9606", "GRCh38", "grch38.p14", "hg19",
        "GRCh38-2020-A", "refdata-gex-GRCh38-2024-A",
    ],
)  # fmt: skip
def test_all_of_these_are_human(text):
    assert species_name(text) == "human"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Mus musculus (house mouse)", "mouse"), ("mm10", "mouse"), ("NCBITaxon:10116", "rat"),
        ("clfamiliaris", "dog"), ("cfamiliaris", "dog"), ("Canis familiaris", "dog"),
        ("D. melanogaster", "fly"), ("GRCz11", "zebrafish"), ("Mouse lemur", "mouse_lemur"),
        ("crab-eating macaque", "cynomolgus"), ("NCBITaxon:8296", "ncbitaxon:8296"),
        ("axolotl", "axolotl"), ("Ambystoma mexicanum", "ambystoma_mexicanum"),
        ("sapiens", "sapiens"), ("mm", "mm"), ("96", "96"),
    ],
)  # fmt: skip
def test_others_and_unknown_ones(text, name):
    assert species_name(text) == name


def test_no_two_species_share_a_name_or_a_taxon():
    assert len({s.taxon for s in SPECIES.values()}) == len(SPECIES)
    for species in SPECIES.values():
        for text in (species.name, species.scientific, f"NCBITaxon:{species.taxon}"):
            assert species_name(text) == species.name
        for assembly in species.assemblies:
            assert species_name(assembly) == species.name
