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
# What else people call them; the shorter Latin names are made from the long ones below.
_CALLED = {
    "human": ("humans", "man", "h sap"),
    "mouse": ("mice", "house mouse", "m mus"),
    "rat": ("rats", "norway rat", "brown rat"),
    "rhesus": ("rhesus macaque", "rhesus monkey"),
    "cynomolgus": ("cynomolgus monkey", "cynomolgus macaque", "crab eating macaque"),
    "chimpanzee": ("chimp",),
    "marmoset": ("common marmoset", "white tufted ear marmoset"),
    "mouse_lemur": ("gray mouse lemur", "grey mouse lemur"),
    "pig": ("swine", "sus scrofa domesticus"),
    "cow": ("cattle", "bovine"),
    "dog": ("canis familiaris",),
    "fly": ("fruit fly", "fruitfly", "drosophila"),
    "worm": ("nematode", "roundworm"),
    "yeast": ("baker's yeast", "budding yeast"),
}


def _names() -> dict[str, str]:
    """Lower-case names -> short names: Latin, ``h sapiens``, ``hsapiens``, what people say."""
    found: dict[str, str] = {}
    for species in SPECIES.values():
        genus, *further = species.scientific.lower().split() or [""]
        last = " ".join(further[-1:])
        # Ensembl and BioMart write clfamiliaris where others write cfamiliaris.
        initials = "".join(word[0] for word in (genus, *further[:-1]) if word)
        shorter = (f"{genus[:1]} {last}", f"{genus[:1]}{last}", f"{initials}{last}")
        for name in (" ".join((genus, *further)), *shorter, *_CALLED.get(species.name, ())):
            if name.strip():
                found.setdefault(name, species.name)
    return found


_BY_NAME = _names()
_BY_TAXON = {str(s.taxon): s.name for s in SPECIES.values()}
_TAXON = re.compile(r"^(?:(?:ncbi)?_?tax(?:on|id|onomy)?|txid)?[ :_]*(\d+)$")
_ASSEMBLY_OF = {a: s.name for s in SPECIES.values() for a in s.assemblies}
_ASSEMBLY = "(" + "|".join(sorted(map(re.escape, _ASSEMBLY_OF), key=len, reverse=True)) + ")"
ASSEMBLY_PREFIX = re.compile(rf"^{_ASSEMBLY}[_-]+(?=.)", re.IGNORECASE)
ASSEMBLY_NAME = re.compile(_ASSEMBLY, re.IGNORECASE)
# GRCh38, GRCh38.p14, GRCh38-2024-A, refdata-gex-mm10-2020-A; of GRCh38_and_mm10 both.
_ASSEMBLY_NAMED = re.compile(rf"(?:^|[-_ ]){_ASSEMBLY}(?=(?:\.p\d+)?(?:[-_ ]|$))")


def species_name(text: str) -> str:
    """Short name of a species, from any of the ways in which it is written.

    Known are the short name, the Latin one in full or shortened (``Homo sapiens``, ``H. sapiens``,
    ``hsapiens``), both together (``Homo sapiens (human)``), the NCBI taxon with or without its
    prefix (``NCBITaxon:9606``) and genome assemblies (``GRCh38``, ``mm10-2020-A``), in any case.
    An unknown name, and one of several (``GRCh38_and_mm10``), is returned in lower case: a
    vocabulary may hold species that are not listed in ``SPECIES``.
    """
    written = str(text).strip().lower()
    plain = " ".join(re.sub(r"[-_.\s]+", " ", written).split())
    both = re.fullmatch(r"(.+?) ?\((.+)\)", plain)
    for name in (plain, *(both.groups() if both else ())):
        short = name.replace(" ", "_")
        if short in SPECIES:
            return short
        if name in _BY_NAME:
            return _BY_NAME[name]
    if found := _TAXON.match(written):
        return _BY_TAXON.get(found[1], written)
    named = {_ASSEMBLY_OF[name] for name in _ASSEMBLY_NAMED.findall(written)}
    if len(named) == 1:
        return named.pop()
    return "_".join(written.replace("_", " ").split())


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
