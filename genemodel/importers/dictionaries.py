"""The gene dictionaries of a published model: found beside it, read safely, made a vocabulary.

Axes: V tokens of our vocabulary, Q tokens of the published one, S species.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genemodel.batches.published import PublishedStyle
from genemodel.errors import DataError
from genemodel.genes import ForeignTokens, GeneVocabulary
from genemodel.genes.tables import COLUMNS, first_column, read_table, required_column
from genemodel.genes.vocabulary import CELL, EOS, MASK, N_SPECIAL, PAD
from genemodel.importers.known import recognised
from genemodel.importers.pickles import read_pickle
from genemodel.importers.pointers import refuse_pointer

logger = logging.getLogger(__name__)

# Where dictionaries lie: beside the weights, in a clone of Geneformer (models are folders of it),
# and in one of GeneCompass.
_PLACES = (
    "", "geneformer", "geneformer/gene_dictionaries_30m", "gene_dictionaries_30m",
    "prior_knowledge", "scdata/dict", "dict",
)  # fmt: skip
_ENDINGS = (".pkl", ".pickle", ".json")
# What a file of each kind is called, whatever else is in the name.
_TOKENS = ("token_dictionary", "mouse_tokens", "h&m_token", "token_dict")
_MEDIANS = ("median",)
_NAMES = ("gene_name_id",)
_ALIASES = ("ensembl_mapping",)
_TABLES = (".tsv", ".tsv.gz", ".csv", ".csv.gz")
_ROLES = ("pad", "mask", "cls", "eos")


@dataclass(frozen=True)
class Dictionaries:
    """What a published model calls its genes.

    Attributes
    ----------
    token
        Token of every gene id, upper case.
    specials
        Tokens of ``pad`` and ``mask`` and, where there are, ``cls`` and ``eos``.
    median
        Non-zero median of the genes that have one.
    symbols
        Symbols of gene ids, the first one first.
    aliases
        Other ids of a gene that the model sums under one.
    files
        Checksum of every file read, by name; published ones are named as published.
    """

    token: dict[str, int]
    specials: dict[str, int]
    median: dict[str, float]
    symbols: dict[str, list[str]] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Tokens of the published model (Q)."""
        return len(self.token) + len(self.specials)


@dataclass(frozen=True)
class PublishedVocabulary:
    """A published vocabulary as ours.

    Attributes
    ----------
    vocabulary
        Our table; its tokens 0, 1 and 2 are the special ones as everywhere.
    source_V
        Published token of each of ours; −1 for a cell token that the model has not.
    medians_V
        float64, NaN where there is none.
    """

    vocabulary: GeneVocabulary
    source_V: np.ndarray
    medians_V: np.ndarray


def find_dictionaries(
    folder: Path, size: int, given: Path | None = None, medians: Path | None = None
) -> Dictionaries:
    """Find and read the dictionaries of a model with so many tokens.

    Parameters
    ----------
    folder
        Of the weights; looked in, beside and above.
    size
        Rows of the word embeddings.
    given
        A folder to look in instead, or a table with columns gene_id, token, nonzero_median.
    medians
        A table, pickle or JSON with medians, instead of those that are found.

    Raises
    ------
    DataError
        There are none of this size, one is no dictionary, or medians are missing.
    """
    if given is not None and given.is_file() and given.name.lower().endswith(_TABLES):
        found = _of_table(given)
    else:
        found = _of_files(folder, size, given)
    if found.size != size:
        raise DataError(
            f"the token dictionary has {found.size:,} tokens and the weights have {size:,}: it is "
            "of another model. Name the right one with dictionaries=FOLDER."
        )
    highest = max(*found.token.values(), *found.specials.values())
    numbers = sorted([*found.token.values(), *found.specials.values()])
    if numbers != list(range(size)):
        raise DataError(
            f"the token dictionary does not number its {size:,} tokens from 0 to {size - 1:,}, "
            f"each once (its highest is {highest:,}): it is damaged, or of another model."
        )
    if medians is not None:
        table = _read_medians(medians)
        found = Dictionaries(
            found.token, found.specials, table, found.symbols, found.aliases,
            {**found.files, **_named(medians)},
        )  # fmt: skip
    if not found.median:
        raise DataError(
            "no medians of the genes were found beside the token dictionary, and without them "
            "cells cannot be ranked as the model knows them. Give dictionaries=FOLDER with the "
            "published median file, or medians=TABLE (columns gene_id, nonzero_median)."
        )
    return found


def _of_table(path: Path) -> Dictionaries:
    foreign = ForeignTokens.read(path)
    has = "nonzero_median" in read_table(path, "token table").columns
    genes = foreign.ensembl_id_G.tolist()
    return Dictionaries(
        token=dict(zip(genes, foreign.token_G.tolist(), strict=True)),
        specials=foreign.specials,
        median=dict(zip(genes, foreign.median_G.tolist(), strict=True)) if has else {},
        files=_named(path),
    )


def _of_files(folder: Path, size: int, given: Path | None) -> Dictionaries:
    refused: list[str] = []
    sizes: list[str] = []
    folder = folder.resolve()
    above = (folder, folder.parent, folder.parent.parent)
    bases = above if given is None else (given,)
    for place in (base / part for base in bases for part in _PLACES):
        for path in _called(place, _TOKENS):
            try:
                token, specials = _tokens(path)
            except DataError as error:
                refused.append(str(error))
                continue
            if len(token) + len(specials) != size:
                sizes.append(f"{path} ({len(token) + len(specials):,} tokens)")
                continue
            return _beside(path, token, specials)
    if refused:
        raise DataError(refused[0])
    looked = f"in {given}" if given is not None else f"in, beside or above {folder}"
    raise DataError(
        f"no token dictionary of {size:,} tokens {looked}"
        + (f"; there is {sizes[0]}" if sizes else "")
        + ". Give dictionaries=FOLDER with the files published with the model "
        "(token_dictionary_….pkl and gene_median_dictionary_….pkl, or JSON)."
    )


def _beside(path: Path, token: dict[str, int], specials: dict[str, int]) -> Dictionaries:
    """Read the other dictionaries in the folder of the tokens: of different versions no two mix."""
    files = _named(path)
    wanted = _version(path)
    median: dict[str, float] = {}
    symbols: dict[str, list[str]] = {}
    aliases: dict[str, list[str]] = {}
    for kinds, into in ((_MEDIANS, "median"), (_NAMES, "names"), (_ALIASES, "aliases")):
        paths = _called(path.parent, kinds)
        # token_dictionary_gc30M.pkl goes with …_gc30M.pkl; in a clone of several versions lie both.
        own = [one for one in paths if _version(one) == wanted]
        paths = own or [one for one in paths if not _version(one)]
        for one in paths:
            values = _mapping(one)
            if into == "median":
                median |= _medians(values, one)
            elif into == "names":
                for name, gene in values.items():
                    symbols.setdefault(str(gene).upper(), []).append(str(name))
            else:
                for alias, gene in values.items():
                    if str(alias).upper() != str(gene).upper():
                        aliases.setdefault(str(gene).upper(), []).append(str(alias).upper())
            files |= _named(one)
    return Dictionaries(token, specials, median, symbols, aliases, files)


def _version(path: Path) -> str:
    """Take gc30M of token_dictionary_gc30M.pkl; nothing of other names."""
    last = path.stem.rpartition("_")[2]
    return last if last.startswith("gc") and last.endswith("M") else ""


def _called(folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Give the files of these names; in a folder of several versions the newest come first."""
    if not folder.is_dir():
        return []
    return sorted(
        (
            path
            for path in folder.iterdir()
            if path.name.lower().endswith(_ENDINGS)
            and any(kind in path.name.lower() for kind in kinds)
        ),
        key=lambda path: path.name,
    )


def _named(path: Path) -> dict[str, str]:
    digest, known = recognised(path)
    return {f"{path.name} ({known.path})" if known else path.name: digest}


def _mapping(path: Path) -> dict[Any, Any]:
    refuse_pointer(path)
    if path.suffix.lower() == ".json":
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}).") from error
    else:
        values = read_pickle(path)
    if not isinstance(values, dict) or not values:
        raise DataError(
            f"{path} holds a {type(values).__name__}, not a dictionary of genes: take it from its "
            "publisher again."
        )
    return values


def _tokens(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    token: dict[str, int] = {}
    specials: dict[str, int] = {}
    for name, number in _mapping(path).items():
        if not isinstance(name, str) or isinstance(number, bool) or not isinstance(number, int):
            raise DataError(
                f"{path} gives {str(name)[:40]!r} the token {str(number)[:40]!r}: a token "
                "dictionary maps gene ids to whole numbers."
            )
        role = name.strip("<>").lower()
        if name.startswith("<"):
            if role not in _ROLES:
                raise DataError(
                    f"{path} has the special token {name[:40]!r}, which Geneformer and GeneCompass "
                    f"have not: it is of another model{_whose(name)}."
                )
            specials[role] = number
        else:
            token[name.upper()] = number
    for role in ("pad", "mask"):
        if role not in specials:
            raise DataError(f"{path} has no token <{role}>: it is no token dictionary.")
    if ("cls" in specials) != ("eos" in specials):
        raise DataError(f"{path} has only one of <cls> and <eos>: it is damaged.")
    if not token:
        raise DataError(f"{path} lists no gene.")
    return token, specials


def _whose(name: str) -> str:
    return " (MaxToki)" if name in ("<bos>", "<boq>", "<eoq>") else ""


def _medians(values: Mapping[Any, Any], path: Path) -> dict[str, float]:
    found = {}
    for gene, median in values.items():
        if isinstance(median, bool) or not isinstance(median, int | float):
            raise DataError(f"{path} gives {str(gene)[:40]!r} the median {str(median)[:40]!r}.")
        if not 0 < median < float("inf"):
            raise DataError(
                f"{path} gives {str(gene)[:40]!r} the median {median}: medians of non-zero counts "
                "are positive."
            )
        found[str(gene).upper()] = float(median)
    return found


def _read_medians(path: Path) -> dict[str, float]:
    if not path.name.lower().endswith(_TABLES):
        return _medians(_mapping(path), path)
    table = read_table(path, "medians")
    gene = required_column(table, ("gene_id", "ensembl_id", "gene"), what="medians", path=path)
    column = first_column(table, ("nonzero_median", "median", "gene_median"))
    if column is None:
        raise DataError(f"medians: {path} has no column nonzero_median.")
    kept = table[table[column].str.strip() != ""]
    try:
        numbers = kept[column].astype(float).tolist()
    except ValueError as error:
        raise DataError(f"medians: {path}: {error}") from error
    return _medians(dict(zip(kept[gene].tolist(), numbers, strict=True)), path)


# -- vocabularies -----------------------------------------------------------------------------


def geneformer_vocabulary(found: Dictionaries) -> tuple[PublishedVocabulary, PublishedStyle]:
    """Make a vocabulary of Geneformer's dictionaries; its version shows in the special tokens.

    Raises
    ------
    DataError
        A gene has no median.
    """
    without = [gene for gene in found.token if gene not in found.median]
    if without:
        raise DataError(
            f"{len(without):,} of the {len(found.token):,} genes of the token dictionary have no "
            f"median ({', '.join(without[:3])} …): the medians are of another version. Name the "
            "folder of the right ones with dictionaries=FOLDER."
        )
    style: PublishedStyle = "geneformer_v2" if "cls" in found.specials else "geneformer_v1"
    rows, source = _opening(found, style)
    for gene in sorted(found.token, key=found.token.__getitem__):
        rows.append(_row(len(source), "human", gene, found))
        source.append(found.token[gene])
    return _made(rows, source, found, style), style


def genecompass_vocabulary(found: Dictionaries, homolog_Q: np.ndarray) -> PublishedVocabulary:
    """Make a vocabulary of GeneCompass's: mouse genes share the token of their human homolog.

    Parameters
    ----------
    found
        Its dictionaries.
    homolog_Q
        For a human token that of its mouse homolog, itself for all others.
    """
    rows, source = _opening(found, "genecompass")
    ordered = sorted(found.token, key=found.token.__getitem__)
    unknown = [gene for gene in ordered if not gene.startswith(("ENSG", "ENSMUSG"))]
    if unknown:
        raise DataError(
            f"the token dictionary lists {unknown[0]}: GeneCompass knows human (ENSG…) and mouse "
            "(ENSMUSG…) genes alone."
        )
    human_of = {
        int(mouse): human for human, mouse in enumerate(homolog_Q.tolist()) if mouse != human
    }
    ours: dict[int, int] = {}
    mouse: list[tuple[int, str]] = []
    for gene in ordered:
        token = found.token[gene]
        if not gene.startswith("ENSMUSG"):
            ours[token] = len(source)
            rows.append(_row(len(source), "human", gene, found))
            source.append(token)
    for gene in ordered:
        token = found.token[gene]
        if gene.startswith("ENSMUSG"):
            shared = ours.get(human_of.get(token, -1))
            if shared is None:
                shared = len(source)
                source.append(token)
            mouse.append((shared, gene))
    rows += [_row(token, "mouse", gene, found) for token, gene in sorted(mouse)]
    return _made(rows, source, found, "genecompass")


def _opening(found: Dictionaries, style: PublishedStyle) -> tuple[list[dict[str, Any]], list[int]]:
    source = [-1] * N_SPECIAL
    source[PAD], source[MASK] = found.specials["pad"], found.specials["mask"]
    rows: list[dict[str, Any]] = []
    if style == "geneformer_v2":
        source[CELL] = found.specials["cls"]
        assert len(source) == EOS
        source.append(found.specials["eos"])
        row = {"token": EOS, "species": "human", "ensembl_id": "<eos>", "symbol": "<eos>"}
        rows.append({**row, "biotype": "special", "aliases": ""})
    return rows, source


def _row(token: int, species: str, gene: str, found: Dictionaries) -> dict[str, Any]:
    symbol, more = _symbols(species).get(gene, ("", ()))
    own = found.symbols.get(gene, [])
    names = [*own, *([symbol] if symbol else []), *more, *found.aliases.get(gene, ())]
    first = names[0] if own or symbol else ""
    others = [name for name in dict.fromkeys(names) if name != first]
    return {
        "token": token, "species": species, "ensembl_id": gene, "symbol": first, "biotype": "",
        "aliases": "|".join(_clean(others)),
    }  # fmt: skip


def _clean(names: Sequence[str]) -> Iterator[str]:
    return (name for name in names if name and not set(name) & set("|\t\r\n"))


_KNOWN: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {}


def _symbols(species: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Symbol and other symbols of genes by id, of the vocabulary that comes with genemodel.

    Its retired ids are left out: which ids a published model sums is said by its own mapping.
    """
    if species not in _KNOWN:
        genes = GeneVocabulary.builtin().genes
        own = genes[genes["species"] == species]
        columns = (own["ensembl_id"], own["symbol"], own["aliases"])
        _KNOWN[species] = {
            gene.upper(): (
                symbol,
                tuple(n for n in aliases.split("|") if n and not n.upper().startswith("ENS")),
            )
            for gene, symbol, aliases in zip(*columns, strict=True)
        }
    return _KNOWN[species]


def _made(
    rows: list[dict[str, Any]], source: list[int], found: Dictionaries, style: PublishedStyle
) -> PublishedVocabulary:
    specials = " ".join(f"{role}={token}" for role, token in sorted(found.specials.items()))
    vocabulary = GeneVocabulary(
        pd.DataFrame(rows, columns=list(COLUMNS)),
        provenance={"published": style, "published_tokens": specials},
        where="the token dictionary",
    )
    source_V = np.array(source, np.int64)
    gene_of = {token: gene for gene, token in found.token.items()}
    medians_V = np.array(
        [found.median.get(gene_of.get(token, ""), np.nan) for token in source], np.float64
    )
    return PublishedVocabulary(vocabulary, source_V, medians_V)
