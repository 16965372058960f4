"""Rebuild genemodel/genes/data/human_mouse.tsv.gz from a folder of public gene tables.

    python scripts/build_gene_table.py KNOWLEDGE_FOLDER [OUT.tsv.gz]

The folder holds genes_{human,mouse}.tsv.gz (GENCODE), symbol_to_ensembl_{human,mouse}.tsv.gz,
hgnc_complete_set_2018.tsv.gz, geneformer_v1_medians_tokens.tsv.gz,
orthologs_human_mouse_{one2one,hcop}.tsv.gz. The rules are stated in docs/genes.md.
"""

import hashlib
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.genes.orthologs import RIVAL_SHARE, one_to_one
from genemodel.genes.tables import kept_biotype, read_table
from genemodel.genes.vocabulary import N_SPECIAL, GeneVocabulary

log = logging.getLogger("build_gene_table")

VERSION = "2026.1"
HCOP_SUPPORT = 6
TABLES = (
    "genes_human",
    "genes_mouse",
    "symbol_to_ensembl_human",
    "symbol_to_ensembl_mouse",
    "hgnc_complete_set_2018",
    "geneformer_v1_medians_tokens",
    "orthologs_human_mouse_one2one",
    "orthologs_human_mouse_hcop",
)

# Names that only say which clone or cDNA a transcript was first seen in.
CLONE_LIKE = re.compile(
    r"^(?:ENS[A-Z]*G\d{11}"
    r"|[A-Z]{1,2}\d{5,8}(?:\.\d+)?"  # GenBank accessions: AC012345.1, BC016548
    r"|[A-Z0-9]+-[0-9A-Z]+\.\d+"  # BAC clones: RP11-34P13.3, GS1-279B7.1
    r"|(?:FLJ|MGC|LOC|KIAA|DKFZ)[A-Zp]?\d.*"
    r"|Gm\d+|.*Rik|D\d+[A-Za-z]+\d+e?|mmu-.*|hsa-.*)$"
)


def kept(genes: pd.DataFrame) -> pd.Series:
    """Genes that enter the vocabulary (see docs/genes.md)."""
    named = ~genes["symbol"].str.match(CLONE_LIKE)
    mitochondrial = genes["chrom"].isin(["chrM", "MT"])
    return (
        mitochondrial
        | genes["biotype"].map(kept_biotype)
        | ((genes["biotype"] == "lncRNA") & named)
    )


def merged_by_symbol(genes: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Keep one id of each symbol, protein-coding and old (low) ones first; the others become
    further ids of that gene: copies on the Y chromosome, and second annotations of one locus.
    """
    coding = genes["biotype"] == "protein_coding"
    genes = genes.assign(noncoding=~coding).sort_values(["noncoding", "ensembl_id"])
    first = genes.drop_duplicates("symbol").sort_values("ensembl_id").reset_index(drop=True)
    canonical = dict(zip(first["symbol"], first["ensembl_id"], strict=True))
    further: dict[str, list[str]] = defaultdict(list)
    for gene, symbol in zip(genes["ensembl_id"], genes["symbol"], strict=True):
        if canonical[symbol] != gene:
            further[canonical[symbol]].append(gene)
    return first, further


def usable_alias(name: str) -> bool:
    """Aliases that can occur as a gene name in a count matrix."""
    return 1 < len(name) <= 24 and not re.search(r"[\s|,;\"'#]", name) and not name.isdigit()


def alias_pairs(knowledge: dict[str, pd.DataFrame], species: str) -> Iterable[tuple[str, str]]:
    """All (alias, Ensembl id) statements of the tables."""
    table = knowledge[f"symbol_to_ensembl_{species}"]
    for name, gene in zip(table["symbol"], table["ensembl_id"], strict=True):
        for part in name.split(","):
            yield part, gene
    if species == "human":
        hgnc = knowledge["hgnc_complete_set_2018"]
        columns = ("ensembl_gene_id", "symbol", "alias_symbol", "prev_symbol")
        for gene, symbol, alias, previous in zip(*(hgnc[c] for c in columns), strict=True):
            for name in (symbol, *alias.split("|"), *previous.split("|")):
                if gene:
                    yield name, gene


def old_ids(knowledge: dict[str, pd.DataFrame], known: set[str]) -> dict[str, str]:
    """Retired human ids -> symbol, from tables that still use them."""
    found: dict[str, str] = {}
    hgnc = knowledge["hgnc_complete_set_2018"]
    geneformer = knowledge["geneformer_v1_medians_tokens"]
    for ids, symbols in (
        (hgnc["ensembl_gene_id"], hgnc["symbol"]),
        (geneformer["ensembl_id"], geneformer["symbol"]),
    ):
        for gene, symbol in zip(ids, symbols, strict=True):
            if gene and gene not in known and re.match(r"^ENSG\d{11}$", gene):
                found.setdefault(gene, symbol)
    return found


def former_symbols(knowledge: dict[str, pd.DataFrame]) -> dict[str, str]:
    """Symbols (lower case) that were official in 2018 -> id: these beat another gene's nickname."""
    hgnc = knowledge["hgnc_complete_set_2018"]
    return {
        symbol.lower(): gene
        for symbol, gene in zip(hgnc["symbol"], hgnc["ensembl_gene_id"], strict=True)
        if gene
    }


def aliases_of(
    knowledge: dict[str, pd.DataFrame],
    species: str,
    genes: pd.DataFrame,
    further: dict[str, list[str]],
) -> dict[str, list[str]]:
    """Aliases of each kept gene: further ids first, then names, one spelling each, sorted."""
    everything = knowledge[f"genes_{species}"]
    known = set(everything["ensembl_id"])
    current = {s.lower() for s in everything["symbol"]} | {g.lower() for g in known}
    canonical = {g: g for g in genes["ensembl_id"]}
    canonical |= {other: gene for gene, others in further.items() for other in others}
    by_symbol = {s.lower(): g for s, g in zip(genes["symbol"], genes["ensembl_id"], strict=True)}
    retired = old_ids(knowledge, known) if species == "human" else {}

    official = former_symbols(knowledge) if species == "human" else {}

    owners: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, gene in alias_pairs(knowledge, species):
        lowered = name.lower()
        if lowered in current or not usable_alias(name):
            continue
        if gene in retired:
            gene = by_symbol.get(retired[gene].lower(), gene)
        gene = canonical.get(gene, gene)
        if gene in known and canonical.get(official.get(lowered, gene)) in (gene, None):
            owners[lowered][gene].add(name)

    result: dict[str, list[str]] = {g: list(further.get(g, ())) for g in genes["ensembl_id"]}
    for gene, symbol in sorted(retired.items()):
        if symbol.lower() in by_symbol:
            result[by_symbol[symbol.lower()]].append(gene)
    for lowered in sorted(owners):
        # A name shared with a gene outside the vocabulary is as ambiguous as one shared inside,
        # but could not be reported as such: it is left out.
        if all(gene in result for gene in owners[lowered]):
            for gene, spellings in sorted(owners[lowered].items()):
                # Spellings matter only where they tell two genes apart.
                several = len(owners[lowered]) > 1
                result[gene] += sorted(spellings)[: None if several else 1]
    return result


def orthologs(
    knowledge: dict[str, pd.DataFrame],
    human: dict[str, str],
    mouse: dict[str, str],
    coding: set[str],
) -> dict[str, str]:
    """Mouse id -> human id for the genes that share a token.

    `human` and `mouse` map every accepted id to the canonical one; `coding` holds the
    protein-coding ids of both.
    """
    hcop = knowledge["orthologs_human_mouse_hcop"]
    predicted = pd.DataFrame(
        {
            "known": hcop["human_ensembl"].map(human),
            "new": hcop["mouse_ensembl"].map(mouse),
            "support": hcop["n_support"].astype(float),
            "curated": hcop["support"].str.split(",").map(lambda names: "HGNC" in names),
        }
    ).dropna()
    curated = set(
        predicted.loc[predicted["curated"], ["known", "new"]].itertuples(index=False, name=None)
    )
    support = predicted.groupby(["known", "new"])["support"].max().to_dict()
    strong = one_to_one(predicted)
    # Most prediction databases know proteins only: for RNA genes the curators' word decides.
    by_curators = [
        (k, n) in curated and k not in coding and n not in coding
        for k, n in zip(strong["known"], strong["new"], strict=True)
    ]
    strong = strong[(strong["support"] >= HCOP_SUPPORT) | np.array(by_curators)]
    by_human = {k: (n, s) for k, n, s in strong.itertuples(index=False)}
    by_mouse = {n: (k, s) for k, n, s in strong.itertuples(index=False)}

    pairs: dict[str, str] = {}
    taken: set[str] = set()
    ensembl = knowledge["orthologs_human_mouse_one2one"]
    contradicted = 0
    for h, m in zip(
        ensembl["human_ensembl"].map(human), ensembl["mouse_ensembl"].map(mouse), strict=True
    ):
        if pd.isna(h) or pd.isna(m) or m in pairs or h in taken:
            continue
        own = support.get((h, m), 0.0)
        rivals = [s for partner, s in (by_human.get(h, (m, 0)),) if partner != m]
        rivals += [s for partner, s in (by_mouse.get(m, (h, 0)),) if partner != h]
        if any(own < RIVAL_SHARE * s for s in rivals):
            contradicted += 1
            continue
        pairs[m] = h
        taken.add(h)
    from_ensembl = len(pairs)
    for h, m, _ in strong.itertuples(index=False):
        if m not in pairs and h not in taken:
            pairs[m] = h
            taken.add(h)
    log.info(
        "orthologs: %d from Ensembl (%d contradicted by HCOP and left out), %d more from HCOP",
        from_ensembl,
        contradicted,
        len(pairs) - from_ensembl,
    )
    return pairs


def build(folder: Path) -> GeneVocabulary:
    """Apply the rules to the tables of `folder`."""
    knowledge = {name: read_table(folder / f"{name}.tsv.gz", name) for name in TABLES}
    genes: dict[str, pd.DataFrame] = {}
    canonical: dict[str, dict[str, str]] = {}
    for species in ("human", "mouse"):
        table = knowledge[f"genes_{species}"]
        genes[species], further = merged_by_symbol(table[kept(table)])
        aliases = aliases_of(knowledge, species, genes[species], further)
        genes[species]["aliases"] = [
            "|".join(aliases[gene]) for gene in genes[species]["ensembl_id"]
        ]
        canonical[species] = {g: g for g in genes[species]["ensembl_id"]}
        canonical[species] |= {
            name: gene
            for gene, names in aliases.items()
            for name in names
            if re.match(r"^ENS[A-Z]*G\d{11}$", name) and name not in canonical[species]
        }
    human, mouse = genes["human"], genes["mouse"]
    human["token"] = range(N_SPECIAL, N_SPECIAL + len(human))
    token_of = dict(zip(human["ensembl_id"], human["token"], strict=True))
    both = pd.concat([human, mouse])
    coding = set(both["ensembl_id"][both["biotype"] == "protein_coding"])
    shared = orthologs(knowledge, canonical["human"], canonical["mouse"], coding)
    mouse["token"] = [token_of[shared[g]] if g in shared else -1 for g in mouse["ensembl_id"]]
    own = mouse["token"] < 0
    first = N_SPECIAL + len(human)
    mouse.loc[own, "token"] = range(first, first + int(own.sum()))
    mouse = mouse.sort_values("token")
    columns = ["token", "species", "ensembl_id", "symbol", "biotype", "aliases"]
    rows = pd.concat([human.assign(species="human"), mouse.assign(species="mouse")])[columns]
    digests = {
        name: hashlib.sha256((folder / f"{name}.tsv.gz").read_bytes()).hexdigest()[:16]
        for name in TABLES
    }
    return GeneVocabulary(
        rows,
        provenance={
            "table": f"human_mouse {VERSION}",
            "sources": " ".join(f"{name}:{digest}" for name, digest in digests.items()),
        },
    )


def main(arguments: list[str]) -> int:
    """Build the table and say what it holds."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not 1 <= len(arguments) <= 2:
        log.error("usage: build_gene_table.py KNOWLEDGE_FOLDER [OUT.tsv.gz]")
        return 2
    out = Path(__file__).resolve().parents[1] / "genemodel/genes/data/human_mouse.tsv.gz"
    if len(arguments) == 2:
        out = Path(arguments[1])
    try:
        vocabulary = build(Path(arguments[0]))
        vocabulary.save(out)
    except DataError as error:
        log.error("build_gene_table: %s", error)
        return 2
    log.info("%s\n%s, %d bytes", vocabulary, out, out.stat().st_size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
