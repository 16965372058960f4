"""Cross-species foundation models of single-cell expression, from raw counts to AnnData.

The public names are reached on first use, so that ``import genemodel`` stays light and pulls in
no training, plotting or configuration library.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> (module, attribute); an empty attribute means the module itself.
_PUBLIC: dict[str, tuple[str, str]] = {
    "Bundle": ("genemodel.bundle.bundle", "Bundle"),
    "Corpus": ("genemodel.cells.corpus", "Corpus"),
    "GeneVocabulary": ("genemodel.genes", "GeneVocabulary"),
    "ImputationModel": ("genemodel.adapt.imputation_model", "ImputationModel"),
    "IntegratedModel": ("genemodel.inference.integrated_model", "IntegratedModel"),
    "annotate": ("genemodel.inference.annotate", "annotate"),
    "embed": ("genemodel.inference.embed", "embed"),
    "evaluate": ("genemodel.evaluation.evaluate", "evaluate"),
    "impute": ("genemodel.inference.impute", "impute"),
    "integrate": ("genemodel.inference.integrate", "integrate"),
    "load": ("genemodel.inference.models", "load"),
    "pl": ("genemodel.evaluation.pl", ""),
    "rubin_pool": ("genemodel.adapt.posterior", "rubin_pool"),
    "synthetic": ("genemodel.cells.synthetic", "synthetic"),
}

__all__ = [
    "Bundle",
    "Corpus",
    "GeneVocabulary",
    "ImputationModel",
    "IntegratedModel",
    "__version__",
    "annotate",
    "embed",
    "evaluate",
    "impute",
    "integrate",
    "load",
    "pl",
    "rubin_pool",
    "synthetic",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'genemodel' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    found = importlib.import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
