"""A bundle beneath a head: as the head's training takes it, and what both have learnt from."""

import copy
from dataclasses import replace

import pandas as pd

import genemodel
from genemodel.batches.loader import rank_scale
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.finetuning.backbone import Backbone
from genemodel.inference.cell_vectors import cell_projection
from genemodel.model.gene_model import GeneModel
from genemodel.model.tuning import TuningSettings


def backbone_of(bundle: Bundle, tuning: TuningSettings) -> Backbone:
    """Copy what a training reads of a bundle, and may change."""
    gene_VF = bundle.heads.get("decode_counts.gene.weight")
    return Backbone(
        copy.deepcopy(bundle.model).cpu(), copy.deepcopy(cell_projection(bundle)).cpu(),
        replace(bundle.tokens, places=0), rank_scale(bundle.medians_V, bundle.tokens.style), tuning,
        None if gene_VF is None else gene_VF.detach().float().cpu(),
    )  # fmt: skip


def beneath_of(
    bundle: Bundle,
    model: GeneModel,
    how: str,
    history: pd.DataFrame,
    training: TrainingManifest | None,
) -> Bundle:
    """Make the bundle of a backbone that has learnt; of the heads what embeds cells still fits.

    ``training`` has the cells of the head besides those of the bundle.
    """
    kept = {k: v for k, v in bundle.heads.items() if k.startswith("decode_counts.projection.")}
    provenance = {
        "genemodel": genemodel.__version__, "start": bundle.fingerprint, "tuned": how,
    }  # fmt: skip
    device = bundle.device
    tuned = replace(
        bundle, model=model, heads=kept, provenance=provenance, history=history, training=training
    )
    return tuned.to(device)


def learnt_from(own: TrainingManifest, bundle: Bundle | None) -> TrainingManifest:
    """Put the cells of a head behind those of the bundle that it started from, if any."""
    return own if bundle is None else TrainingManifest.after(bundle.training, own)
