"""Cross-species foundation models of single-cell expression, from raw counts to AnnData.

The public names are reached on first use, so that ``import genemodel`` stays light and pulls in
no training, plotting or configuration library.
"""

import importlib
from typing import TYPE_CHECKING, Any

# What an editor or a type checker sees; what runs is the same table again, tests compare them.
if TYPE_CHECKING:
    from genemodel import settings as settings
    from genemodel.annotation.annotate import annotate as annotate
    from genemodel.attribution.attribute import attribute as attribute
    from genemodel.batches.tokens import TokenSettings as TokenSettings
    from genemodel.bundle.bundle import Bundle as Bundle
    from genemodel.command.finetune import FinetuneSettings as FinetuneSettings
    from genemodel.command.finetune import finetune as finetune
    from genemodel.corpus.corpus import Corpus as Corpus
    from genemodel.embedding.contamination import contamination as contamination
    from genemodel.embedding.embed import embed as embed
    from genemodel.evaluation.evaluate import evaluate as evaluate
    from genemodel.evaluation.gene_tasks import evaluate_genes as evaluate_genes
    from genemodel.evaluation.sizes import evaluate_sizes as evaluate_sizes
    from genemodel.gene_tasks.labels import classify_genes as classify_genes
    from genemodel.gene_tasks.training import GeneLabelSettings as GeneLabelSettings
    from genemodel.gene_tasks.vectors import gene_vectors as gene_vectors
    from genemodel.genes import GeneVocabulary as GeneVocabulary
    from genemodel.heads.pretraining import PretrainingSettings as PretrainingSettings
    from genemodel.hub.push import push as push
    from genemodel.importers.exporting import export_model as export_model
    from genemodel.importers.importing import import_model as import_model
    from genemodel.imputation.impute import impute as impute
    from genemodel.imputation.model import ImputationModel as ImputationModel
    from genemodel.imputation.network import DecoderSettings as DecoderSettings
    from genemodel.imputation.posterior import rubin_pool as rubin_pool
    from genemodel.integration.head import IntegrationSettings as IntegrationSettings
    from genemodel.integration.integrate import integrate as integrate
    from genemodel.integration.model import IntegratedModel as IntegratedModel
    from genemodel.knowledge.ablation import AblateSettings as AblateSettings
    from genemodel.knowledge.ablation import ablate as ablate
    from genemodel.knowledge.building import KnowledgeBuildSettings as KnowledgeBuildSettings
    from genemodel.knowledge.building import build_knowledge as build_knowledge
    from genemodel.loading import load as load
    from genemodel.model.settings import ModelSettings as ModelSettings
    from genemodel.model.tuning import TuningSettings as TuningSettings
    from genemodel.networks.attention import attention as attention
    from genemodel.networks.network import network as network
    from genemodel.perturbation.perturb import perturb as perturb
    from genemodel.reports import pl as pl
    from genemodel.response.respond import respond as respond
    from genemodel.simulation.cells import synthetic as synthetic
    from genemodel.train.recipe import pretrain as pretrain
    from genemodel.train.settings import HoldoutSettings as HoldoutSettings
    from genemodel.train.settings import LogSettings as LogSettings
    from genemodel.train.settings import NewGenesSettings as NewGenesSettings
    from genemodel.train.settings import OptimSettings as OptimSettings
    from genemodel.train.settings import PretrainSettings as PretrainSettings
    from genemodel.train.settings import TrainerSettings as TrainerSettings
    from genemodel.trajectories.trajectory import trajectory as trajectory

__version__ = "0.1.0"

# Public name -> (module, attribute); an empty attribute means the module itself.
_PUBLIC: dict[str, tuple[str, str]] = {
    "AblateSettings": ("genemodel.knowledge.ablation", "AblateSettings"),
    "Bundle": ("genemodel.bundle.bundle", "Bundle"),
    "Corpus": ("genemodel.corpus.corpus", "Corpus"),
    "DecoderSettings": ("genemodel.imputation.network", "DecoderSettings"),
    "FinetuneSettings": ("genemodel.command.finetune", "FinetuneSettings"),
    "GeneLabelSettings": ("genemodel.gene_tasks.training", "GeneLabelSettings"),
    "GeneVocabulary": ("genemodel.genes", "GeneVocabulary"),
    "HoldoutSettings": ("genemodel.train.settings", "HoldoutSettings"),
    "ImputationModel": ("genemodel.imputation.model", "ImputationModel"),
    "IntegratedModel": ("genemodel.integration.model", "IntegratedModel"),
    "IntegrationSettings": ("genemodel.integration.head", "IntegrationSettings"),
    "KnowledgeBuildSettings": ("genemodel.knowledge.building", "KnowledgeBuildSettings"),
    "LogSettings": ("genemodel.train.settings", "LogSettings"),
    "ModelSettings": ("genemodel.model.settings", "ModelSettings"),
    "NewGenesSettings": ("genemodel.train.settings", "NewGenesSettings"),
    "OptimSettings": ("genemodel.train.settings", "OptimSettings"),
    "PretrainSettings": ("genemodel.train.settings", "PretrainSettings"),
    "PretrainingSettings": ("genemodel.heads.pretraining", "PretrainingSettings"),
    "TokenSettings": ("genemodel.batches.tokens", "TokenSettings"),
    "TrainerSettings": ("genemodel.train.settings", "TrainerSettings"),
    "TuningSettings": ("genemodel.model.tuning", "TuningSettings"),
    "ablate": ("genemodel.knowledge.ablation", "ablate"),
    "annotate": ("genemodel.annotation.annotate", "annotate"),
    "attention": ("genemodel.networks.attention", "attention"),
    "attribute": ("genemodel.attribution.attribute", "attribute"),
    "build_knowledge": ("genemodel.knowledge.building", "build_knowledge"),
    "classify_genes": ("genemodel.gene_tasks.labels", "classify_genes"),
    "contamination": ("genemodel.embedding.contamination", "contamination"),
    "embed": ("genemodel.embedding.embed", "embed"),
    "evaluate": ("genemodel.evaluation.evaluate", "evaluate"),
    "evaluate_genes": ("genemodel.evaluation.gene_tasks", "evaluate_genes"),
    "evaluate_sizes": ("genemodel.evaluation.sizes", "evaluate_sizes"),
    "export_model": ("genemodel.importers.exporting", "export_model"),
    "finetune": ("genemodel.command.finetune", "finetune"),
    "gene_vectors": ("genemodel.gene_tasks.vectors", "gene_vectors"),
    "import_model": ("genemodel.importers.importing", "import_model"),
    "impute": ("genemodel.imputation.impute", "impute"),
    "integrate": ("genemodel.integration.integrate", "integrate"),
    "load": ("genemodel.loading", "load"),
    "network": ("genemodel.networks.network", "network"),
    "perturb": ("genemodel.perturbation.perturb", "perturb"),
    "pl": ("genemodel.reports.pl", ""),
    "pretrain": ("genemodel.train.recipe", "pretrain"),
    "push": ("genemodel.hub.push", "push"),
    "respond": ("genemodel.response.respond", "respond"),
    "rubin_pool": ("genemodel.imputation.posterior", "rubin_pool"),
    "settings": ("genemodel.settings", ""),
    "synthetic": ("genemodel.simulation.cells", "synthetic"),
    "trajectory": ("genemodel.trajectories.trajectory", "trajectory"),
}

__all__ = sorted(["__version__", *_PUBLIC])


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
