"""The species that genemodel knows by name, and how their genes are written.

A species is known here by three things only: the taxon, how its gene ids begin, and which prefixes
a multi-species reference puts before its gene names. Whether a vocabulary holds a species is a
question for the vocabulary.
"""

import re
from dataclasses import dataclass

from genemodel.errors import DataError


@dataclass(frozen=True)
class Species:
    """One species.

    Attributes
    ----------
    name
        The short name used in settings, obs columns and vocabularies.
    taxon
        NCBI taxonomy id.
    ensembl_prefix
        What its Ensembl (WormBase, FlyBase) gene ids begin with.
    scientific
        The Latin name, accepted wherever a species is named.
    assemblies
        Names of genome assemblies, lower case. A reference of several species writes them before
        each gene name (``GRCh38_TP53``, ``mm10___Trp53``).
    """

    name: str
    taxon: int
    ensembl_prefix: str
    scientific: str = ""
    assemblies: tuple[str, ...] = ()


SPECIES: dict[str, Species] = {
    species.name: species
    for species in (
        Species(
            "human", 9606, "ENSG", "Homo sapiens", ("hg18", "hg19", "hg38", "grch37", "grch38")
        ),
        Species(
            "mouse", 10090, "ENSMUSG", "Mus musculus", ("mm9", "mm10", "mm39", "grcm38", "grcm39")
        ),
        Species("rat", 10116, "ENSRNOG", "Rattus norvegicus", ("rn5", "rn6", "rn7", "mratbn7.2")),
        Species("rhesus", 9544, "ENSMMUG", "Macaca mulatta", ("rhemac8", "rhemac10", "mmul10")),
        Species("cynomolgus", 9541, "ENSMFAG", "Macaca fascicularis", ("mfa1912rksv2",)),
        Species("chimpanzee", 9598, "ENSPTRG", "Pan troglodytes", ("pantro6",)),
        Species("gorilla", 9595, "ENSGGOG", "Gorilla gorilla", ("gorgor4",)),
        Species("marmoset", 9483, "ENSCJAG", "Callithrix jacchus", ("caljac4",)),
        Species("mouse_lemur", 30608, "ENSMICG", "Microcebus murinus", ("micmur3",)),
        Species("rabbit", 9986, "ENSOCUG", "Oryctolagus cuniculus", ("orycun2",)),
        Species("pig", 9823, "ENSSSCG", "Sus scrofa", ("susscr11", "sscrofa11.1")),
        Species("cow", 9913, "ENSBTAG", "Bos taurus", ("bostau9", "ars-ucd1.2")),
        Species("dog", 9615, "ENSCAFG", "Canis lupus familiaris", ("canfam3", "canfam3.1")),
        Species("horse", 9796, "ENSECAG", "Equus caballus", ("equcab3",)),
        Species("opossum", 13616, "ENSMODG", "Monodelphis domestica", ("mondom5",)),
        Species("platypus", 9258, "ENSOANG", "Ornithorhynchus anatinus", ("ornana2",)),
        Species("chicken", 9031, "ENSGALG", "Gallus gallus", ("galgal6", "grcg6a", "grcg7b")),
        Species("lizard", 28377, "ENSACAG", "Anolis carolinensis", ("anocar2",)),
        Species("frog", 8364, "ENSXETG", "Xenopus tropicalis", ("xentro10",)),
        Species(
            "zebrafish",
            7955,
            "ENSDARG",
            "Danio rerio",
            ("grcz10", "grcz11", "danrer10", "danrer11"),
        ),
        Species("fly", 7227, "FBgn", "Drosophila melanogaster", ("dm3", "dm6", "bdgp6")),
        Species("worm", 6239, "WBGene", "Caenorhabditis elegans", ("ce10", "ce11", "wbcel235")),
        Species("yeast", 4932, "Y", "Saccharomyces cerevisiae", ("saccer3", "r64-1-1")),
    )
}

_NAME = re.compile(r"^[a-z][a-z0-9_]*$")
_BY_SCIENTIFIC = {s.scientific.lower(): s.name for s in SPECIES.values() if s.scientific}
_ASSEMBLY_OF = {a: s.name for s in SPECIES.values() for a in s.assemblies}
ASSEMBLY_PREFIX = re.compile(
    r"^(" + "|".join(sorted(map(re.escape, _ASSEMBLY_OF), key=len, reverse=True)) + r")[_-]+(?=.)",
    re.IGNORECASE,
)


def species_name(text: str) -> str:
    """Short name of a species given by its short or Latin name, in any case.

    An unknown name is returned in lower case: a vocabulary may hold species that are not listed in
    ``SPECIES``.
    """
    lowered = " ".join(str(text).strip().lower().replace("_", " ").split())
    return _BY_SCIENTIFIC.get(lowered, lowered.replace(" ", "_"))


def assembly_species(assembly: str) -> str:
    """Species to which a genome assembly name (matched by ``ASSEMBLY_PREFIX``) belongs."""
    return _ASSEMBLY_OF[assembly.lower()]


def checked_species_name(text: str) -> str:
    """Return the short name, or raise when it cannot be the name of a species."""
    name = species_name(text)
    if not _NAME.match(name):
        raise DataError(
            f"{text!r} cannot be the name of a species: use lower-case letters, digits and "
            "underscores, as in 'zebrafish'"
        )
    return name
