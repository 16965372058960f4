"""Settings of ``genemodel finetune``: all tasks in one class, as the command line has them."""

from dataclasses import dataclass, field
from typing import Literal

from genemodel.batches.tokens import TokenSettings
from genemodel.cells.input_settings import InputSettings
from genemodel.command import config_files
from genemodel.errors import ConfigError
from genemodel.gene_tasks.training import GeneLabelSettings
from genemodel.imputation.network import DecoderSettings
from genemodel.inference.obs_keys import INTEGRATED, check_key_added, check_label_is_no_batch
from genemodel.integration.head import IntegrationSettings
from genemodel.model.tuning import TuningSettings
from genemodel.settings import ModelText, PathText, check_seed, nearest, renamed
from genemodel.train.settings import HoldoutSettings, LogSettings, OptimSettings, TrainerSettings


@renamed(data="input")
@dataclass(frozen=True)
class FinetuneSettings(InputSettings):
    """Fine-tune on a file, read as :class:`InputSettings` say, or on a corpus.

    Attributes
    ----------
    input
        File or folder with raw counts, or the folder of a corpus of one species.
    out
        Folder of the results. If it holds an unfinished run with the same settings, that goes on.
    task
        ``integrate``: an embedding free of the technical batch. ``impute``: denoised counts.
        ``both``: both on one backbone. ``classify``: the labels of ``label_key``, whose loss
        reaches whatever of the backbone learns. ``genes``: labels of genes, likewise.
    batch_key
        obs column of the technical batch; several for nested ones; only imputation can do without.
    label_key
        obs column of cell types, missing where unknown; empty for none.
    genes
        Table of labelled genes (columns gene and label), for ``task=genes``.
    model
        Bundle directory; empty for none.
    size
        Shape of new weights where ``backbone.tune`` is scratch and there is no ``model``: a choice
        of the group ``model`` of pre-training.
    key_added
        Key in obsm.
    device
        Where cells are embedded and decoded after a training: auto, cpu, cuda, cuda:1 … (trainings:
        ``trainer``).
    seed
        Of everything random.
    overwrite
        Throw away what is in the folder and start anew.
    backbone
        What of the backbone learns from the loss of the head. ``scratch``: new weights, which are
        trained alone first and then stay.
    warm_up
        Go on with the objectives of pre-training on these cells first.
    hold_out
        Hold groups of cells out of the embedding's training (``holdout``), look at them every
        ``trainer.validate_every`` steps, keep the best and stop early.
    tokens, optim, holdout
        Of a training of the backbone alone and of ``task=classify``, as in pre-training;
        ``tokens.context`` is the model's where there is one.
    trainer, log
        Of all trainings; the steps of a head are those of its recipe.
    integration, imputation, gene_labels
        Recipes of the heads.
    """

    input: PathText
    out: PathText
    task: Literal["integrate", "impute", "both", "classify", "genes"] = "integrate"
    batch_key: tuple[str, ...] = ()
    label_key: str = ""
    genes: PathText = ""
    model: ModelText = ""
    size: str = "tiny"
    key_added: str = INTEGRATED
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False
    warm_up: bool = False
    hold_out: bool = False
    backbone: TuningSettings = field(default_factory=lambda: TuningSettings(tune="frozen"))
    tokens: TokenSettings = field(default_factory=lambda: TokenSettings(512, 8192))
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=5e-4, warmup_steps=20))
    trainer: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(
            max_steps=300,
            validate_every=50,
            validation_batches=10,
            checkpoint_every=50,
            early_stopping=3,
        )
    )
    holdout: HoldoutSettings = field(default_factory=lambda: HoldoutSettings(by="auto"))
    log: LogSettings = field(default_factory=LogSettings)
    integration: IntegrationSettings = field(default_factory=IntegrationSettings)
    imputation: DecoderSettings = field(default_factory=DecoderSettings)
    gene_labels: GeneLabelSettings = field(default_factory=GeneLabelSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        check_key_added(self.key_added)
        tune = self.backbone.tune
        if self.integrates and not self.batch_key:
            raise ConfigError(
                f"task={self.task} needs batch_key, the obs column of the technical batch: it is "
                "what the embedding is freed of. Only task=impute can do without."
            )
        if tune in ("lora", "last", "full") and not self.model:
            raise ConfigError(
                f"backbone={tune} adapts a pre-trained model: give model=BUNDLE, or train new "
                "weights with backbone=scratch."
            )
        if self.classifies:
            self._check_classify()
        self._check_genes()
        if self.warm_up and tune == "frozen":
            raise ConfigError(
                "warm_up=true trains what of the backbone learns, and with backbone=frozen nothing "
                "does: set backbone=lora, last or full."
            )
        if self.warm_up and self.classifies:
            raise ConfigError(
                "warm_up=true says nothing to task=classify, whose one training is of the labels: "
                "leave it out."
            )
        if self.hold_out and not self.integrates:
            raise ConfigError(
                f"hold_out=true says nothing to task={self.task}: imputation looks at molecules "
                "set aside, classify holds out as holdout says, and genes hold out families of "
                "genes. Leave it out."
            )
        if self.label_key and not (self.integrates or self.classifies):
            raise ConfigError(
                f"label_key={self.label_key} says nothing to task={self.task}: leave it out"
                + (", or set task=both." if self.imputes else "; labels of genes are in genes.")
            )
        check_label_is_no_batch(self.batch_key, self.label_key)
        sizes = config_files.choices("model")
        if tune == "scratch" and not self.model and self.size not in sizes:
            near = nearest(self.size, sizes)
            raise ConfigError(
                f"size={self.size}: there are {', '.join(sizes)}"
                + (f". Did you mean size={near}?" if near else ".")
            )
        for head, asked in (
            ("integration", self.integrates and self.integration.gene_vectors),
            ("imputation", self.imputes and self.imputation.gene_vectors),
        ):
            if asked and not (self.model or tune == "scratch"):
                raise ConfigError(
                    f"{head}.gene_vectors=true needs a pre-trained model: give model=BUNDLE."
                )

    @property
    def trains_alone(self) -> bool:
        """Whether the backbone is trained before, or without, a head."""
        return self.warm_up or self.classifies or self.backbone.tune == "scratch"

    @property
    def integrates(self) -> bool:
        """Whether an embedding is asked for."""
        return self.task in ("integrate", "both")

    @property
    def imputes(self) -> bool:
        """Whether counts are to be denoised."""
        return self.task in ("impute", "both")

    @property
    def classifies(self) -> bool:
        """Whether labels are to be told apart."""
        return self.task == "classify"

    def _check_classify(self) -> None:
        if not self.label_key:
            raise ConfigError(
                "task=classify needs label_key, the obs column of what is to be told apart."
            )
        if self.batch_key:
            raise ConfigError(
                f"batch_key={list(self.batch_key)} says nothing to task=classify: leave it out, or "
                "set holdout.by to hold its groups out."
            )
        if self.backbone.tune == "frozen" and not self.model:
            raise ConfigError(
                "task=classify reads a backbone: give model=BUNDLE, or train new weights with "
                "backbone=scratch."
            )

    @property
    def labels_genes(self) -> bool:
        """Whether labels of genes are to be told apart."""
        return self.task == "genes"

    def _check_genes(self) -> None:
        if bool(self.genes) != self.labels_genes:
            raise ConfigError(
                "task=genes needs genes, a table of genes and their labels."
                if self.labels_genes
                else f"genes={self.genes} says nothing to task={self.task}: set task=genes, or "
                "leave it out."
            )
        if not self.labels_genes:
            return
        if self.batch_key:
            raise ConfigError(
                f"batch_key={list(self.batch_key)} says nothing to task=genes: leave it out."
            )
        if self.backbone.tune == "frozen" and not self.model:
            raise ConfigError(
                "task=genes reads a backbone: give model=BUNDLE, or train new weights with "
                "backbone=scratch."
            )
