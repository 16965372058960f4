"""Which rows of a var table are genes: peaks, antibodies, guides and tags are none.

Multi-modal files of every kind (10x, scanpy with ``gex_only=False``, muon, Seurat, CELLxGENE) say
it in a column of var. Its name differs, what stands in it differs less, so the content decides.
Intervals (``chr1:1000-1500``) are peaks whatever is said of them.
"""

import logging
import re

import numpy as np
import numpy.typing as npt
import pandas as pd

from genemodel.errors import DataError

log = logging.getLogger(__name__)

# Names of such columns, in lower case and without what is neither letter nor digit.
_COLUMNS = re.compile(
    r"^(?:feature|gene|var|probe|library)?(?:type|types|class|classes|kind|kinds|category|categories"
    r"|modality|modalities|biotype|biotypes)$"
    r"|^(?:modality|modalities|assay|assays|omic|omics|mod)$"
)
_GENES = frozenset(
    {
        "geneexpression", "gene", "genes", "rna", "mrna", "gex", "transcript", "transcripts",
        "transcriptome", "transcriptomic", "transcriptomics", "rnaseq", "scrna", "scrnaseq",
        "expression", "endogenous", "endogenousgene",
    }
)  # fmt: skip
_OTHERS = frozenset(
    {
        "peak", "peaks", "atac", "atacseq", "scatac", "scatacseq", "chromatin", "tile", "tiles",
        "chromatinaccessibility", "accessibility", "region", "regions", "bin", "bins",
        "antibodycapture", "antibody", "antibodies", "ab", "abs", "adt", "adts", "protein",
        "proteins", "prot", "surfaceprotein", "cellsurfaceprotein", "citeseq", "abseq", "totalseq",
        "hto", "htos", "hashtag", "hashtags", "hashing", "multiplexing", "multiplexingcapture",
        "cmo", "cmos", "tag", "tags", "sampletag", "sampletags", "barcode", "barcodes", "lmo",
        "crisprguidecapture", "crispr", "guide", "guides", "guiderna", "grna", "grnas", "sgrna",
        "sgrnas", "guidecapture", "crisprguide", "custom", "antigencapture", "antigen", "antigens",
        "dextramer", "tcr", "bcr", "vdj", "vdjt", "vdjb", "airr", "tracrna",
        "featurebarcode", "featurebarcoding", "metabolite", "metabolites", "methylation",
        "spikein", "spikeins", "ercc", "control", "negativecontrol", "negativecontrolprobe",
        "negativecontrolcodeword", "unassignedcodeword", "deprecatedcodeword", "blankcodeword",
        "genomiccontrol", "motif", "motifs",
    }
)  # fmt: skip
# Nothing else is called so: no other word has to stand beside them.
_SURE = frozenset(
    {
        "antibodycapture", "crisprguidecapture", "multiplexingcapture", "antigencapture", "peaks",
        "atac", "adt", "hto", "cmo", "hashtag", "sgrna", "chromatinaccessibility",
    }
)  # fmt: skip
_INTERVAL = re.compile(
    r"^(?:[\w.]+?_{1,3})?(?:[\w.]+:\d+[-_:]\d+|chr[\w.]+?[-_]\d+[-_]\d+"
    r"|[\w.]+?[-_]\d{4,}[-_]\d{4,})$",
    re.IGNORECASE,
)
# More different entries than this are no types.
_MOST_TYPES = 60


def genes_among(
    var: pd.DataFrame, where: str
) -> tuple[npt.NDArray[np.bool_] | None, tuple[str, ...]]:
    """Tell the genes from other features.

    Parameters
    ----------
    var
        One row per feature, index = names.
    where
        The place, for messages.

    Returns
    -------
    tuple
        The genes, bool (G,), None where all are; and what a curator should know.

    Raises
    ------
    DataError
        No feature is a gene.
    """
    kept_G = np.ones(len(var), bool)
    left: dict[str, int] = {}
    for at, column in enumerate(var.columns):
        type_G = _types(var.iloc[:, at], str(column))
        if type_G is None:
            continue
        others_G = _others(type_G)
        for name, n in type_G[others_G & kept_G].astype(str).value_counts(sort=False).items():
            left[str(name)] = left.get(str(name), 0) + int(n)
        kept_G &= ~others_G
    if kept_G.any():
        intervals_G = np.zeros(len(var), bool)
        rest = np.flatnonzero(kept_G)
        names = var.index[rest]
        intervals_G[rest] = [bool(_INTERVAL.match(str(name))) for name in names]
        if intervals_G.any():
            left["named by a genomic interval"] = int(intervals_G.sum())
            kept_G &= ~intervals_G
    if not left:
        if "feature_type" in var.columns and _types(var["feature_type"], "feature_type") is None:
            # The third column of features.tsv: a biotype, a chromosome …
            some = ", ".join(map(str, var["feature_type"].dropna().unique()[:3]))
            log.info("%s: %s … are no feature types: all features are genes", where, some)
        return None, ()
    found = ", ".join(f"{name}: {n:,}" for name, n in left.items())
    if not kept_G.any():
        raise DataError(
            f"{where}: has no feature of type 'Gene Expression', only {found}: it holds no gene "
            "counts"
        )
    return kept_G, (f"{int((~kept_G).sum()):,} features are not genes and left out ({found})",)


def _plain(text: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(text).lower())


def _types(values: pd.Series, name: str) -> pd.Series | None:
    """Return the types that a column says, missing as missing; None where it says none."""
    if values.dtype.kind in "iufbcmM":
        return None
    try:
        unique = values.dropna().unique()
    except TypeError:  # lists and the like
        return None
    if not 0 < len(unique) <= _MOST_TYPES:
        return None
    plain = {_plain(u) for u in unique}
    if _COLUMNS.match(_plain(name)):
        # "protein" beside "kinase" are kinds of genes.
        return values if plain & (_GENES | _SURE) or plain <= _OTHERS else None
    # Of any other name it must say nothing else, and tell two kinds apart.
    certain = plain <= _GENES | _OTHERS and plain & _GENES and plain & _OTHERS
    return values if certain else None


def _others(types: pd.Series) -> npt.NDArray[np.bool_]:
    """Features that a column of types says are no genes."""
    told = types.map(_plain, na_action="ignore")
    missing_G = types.isna().to_numpy()
    others_G = told.isin(_OTHERS).to_numpy()
    if (told == "geneexpression").any():
        # 10x's own word: whatever is named otherwise is something else.
        others_G = ~(told.isin(_GENES).to_numpy() | missing_G)
    return others_G
