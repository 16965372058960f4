"""Cross-species foundation models of single-cell expression, from raw counts to AnnData.

The public names are reached on first use, so that ``import genemodel`` stays light and pulls in
no training, plotting or configuration library.
"""

import importlib
from typing import TYPE_CHECKING, Any

# What an editor or a type checker sees; what runs is the same table again, tests compare them.
if TYPE_CHECKING:
    from genemodel.adapt.imputation import DecoderSettings as DecoderSettings
    from genemodel.adapt.imputation_model import ImputationModel as ImputationModel
    from genemodel.adapt.integration_head import IntegrationSettings as IntegrationSettings
    from genemodel.adapt.posterior import rubin_pool as rubin_pool
    from genemodel.bundle.bundle import Bundle as Bundle
    from genemodel.cells.corpus import Corpus as Corpus
    from genemodel.cells.synthetic import synthetic as synthetic
    from genemodel.cells.tokens import TokenSettings as TokenSettings
    from genemodel.evaluation import pl as pl
    from genemodel.evaluation.evaluate import evaluate as evaluate
    from genemodel.evaluation.sizes import evaluate_sizes as evaluate_sizes
    from genemodel.finetuning import FinetuneSettings as FinetuneSettings
    from genemodel.finetuning import finetune as finetune
    from genemodel.genes import GeneVocabulary as GeneVocabulary
    from genemodel.inference.annotate import annotate as annotate
    from genemodel.inference.contamination import contamination as contamination
    from genemodel.inference.embed import embed as embed
    from genemodel.inference.impute import impute as impute
    from genemodel.inference.integrate import integrate as integrate
    from genemodel.inference.integrated_model import IntegratedModel as IntegratedModel
    from genemodel.inference.models import load as load
    from genemodel.model.settings import ModelSettings as ModelSettings
    from genemodel.model.tuning import TuningSettings as TuningSettings
    from genemodel.tasks.pretraining import PretrainingSettings as PretrainingSettings
    from genemodel.train.recipe import pretrain as pretrain
    from genemodel.train.settings import HoldoutSettings as HoldoutSettings
    from genemodel.train.settings import LogSettings as LogSettings
    from genemodel.train.settings import OptimSettings as OptimSettings
    from genemodel.train.settings import PretrainSettings as PretrainSettings
    from genemodel.train.settings import TrainerSettings as TrainerSettings

__version__ = "0.1.0"

# Public name -> (module, attribute); an empty attribute means the module itself.
_PUBLIC: dict[str, tuple[str, str]] = {
    "Bundle": ("genemodel.bundle.bundle", "Bundle"),
    "Corpus": ("genemodel.cells.corpus", "Corpus"),
    "DecoderSettings": ("genemodel.adapt.imputation", "DecoderSettings"),
    "FinetuneSettings": ("genemodel.finetuning", "FinetuneSettings"),
    "GeneVocabulary": ("genemodel.genes", "GeneVocabulary"),
    "HoldoutSettings": ("genemodel.train.settings", "HoldoutSettings"),
    "ImputationModel": ("genemodel.adapt.imputation_model", "ImputationModel"),
    "IntegratedModel": ("genemodel.inference.integrated_model", "IntegratedModel"),
    "IntegrationSettings": ("genemodel.adapt.integration_head", "IntegrationSettings"),
    "LogSettings": ("genemodel.train.settings", "LogSettings"),
    "ModelSettings": ("genemodel.model.settings", "ModelSettings"),
    "OptimSettings": ("genemodel.train.settings", "OptimSettings"),
    "PretrainSettings": ("genemodel.train.settings", "PretrainSettings"),
    "PretrainingSettings": ("genemodel.tasks.pretraining", "PretrainingSettings"),
    "TokenSettings": ("genemodel.cells.tokens", "TokenSettings"),
    "TrainerSettings": ("genemodel.train.settings", "TrainerSettings"),
    "TuningSettings": ("genemodel.model.tuning", "TuningSettings"),
    "annotate": ("genemodel.inference.annotate", "annotate"),
    "contamination": ("genemodel.inference.contamination", "contamination"),
    "embed": ("genemodel.inference.embed", "embed"),
    "evaluate": ("genemodel.evaluation.evaluate", "evaluate"),
    "evaluate_sizes": ("genemodel.evaluation.sizes", "evaluate_sizes"),
    "finetune": ("genemodel.finetuning", "finetune"),
    "impute": ("genemodel.inference.impute", "impute"),
    "integrate": ("genemodel.inference.integrate", "integrate"),
    "load": ("genemodel.inference.models", "load"),
    "pl": ("genemodel.evaluation.pl", ""),
    "pretrain": ("genemodel.train.recipe", "pretrain"),
    "rubin_pool": ("genemodel.adapt.posterior", "rubin_pool"),
    "synthetic": ("genemodel.cells.synthetic", "synthetic"),
}

__all__ = [
    "Bundle",
    "Corpus",
    "DecoderSettings",
    "FinetuneSettings",
    "GeneVocabulary",
    "HoldoutSettings",
    "ImputationModel",
    "IntegratedModel",
    "IntegrationSettings",
    "LogSettings",
    "ModelSettings",
    "OptimSettings",
    "PretrainSettings",
    "PretrainingSettings",
    "TokenSettings",
    "TrainerSettings",
    "TuningSettings",
    "__version__",
    "annotate",
    "contamination",
    "embed",
    "evaluate",
    "evaluate_sizes",
    "finetune",
    "impute",
    "integrate",
    "load",
    "pl",
    "pretrain",
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
