"""What the GPU experiments set: enough cells a step, memory that there is, schedules that fit."""

import pytest

from genemodel.command.config_files import compose
from genemodel.settings import parse
from genemodel.train.settings import PretrainSettings

MEAN_TOKENS = 1276  # of cells as they are, cut at 2,048 genes
GENES = 36_287
# Memory of the card that each is meant for, GiB; and cells a step of the models it resembles.
MEANT_FOR = {"small": (16, 144), "base": (40, 320), "large": (40, 320)}


@pytest.fixture(params=MEANT_FOR)
def experiment(request):
    values = compose("pretrain", [f"experiment=pretrain_{request.param}", "corpus=a", "out=b"])
    return request.param, parse(PretrainSettings, values)


def cells_a_step(settings):
    trainer = settings.trainer
    return trainer.devices * trainer.accumulate * settings.tokens.budget / MEAN_TOKENS


def test_a_step_sees_no_fewer_cells_than_those_of_others(experiment):
    name, settings = experiment
    assert MEANT_FOR[name][1] <= cells_a_step(settings) <= 2048
    assert settings.trainer.compile and settings.trainer.precision == "bf16-mixed"
    assert settings.optim.warmup_steps == 0.02 * settings.trainer.max_steps


def test_a_micro_batch_fits_the_card_without_tricks(experiment):
    """36 bytes a token, layer and width kept for the backward pass; 16 bytes a parameter."""
    name, settings = experiment
    model, tokens = settings.model, settings.tokens
    kept = 36 * model.width * model.layers * tokens.budget
    weights = model.layers * (4 * model.width + 2 * model.ffn) * model.width
    weights += 2 * GENES * model.width  # the genes of the backbone, and those of the count decoder
    places = 2 * tokens.budget / MEAN_TOKENS
    decoder = 6 * 4 * places * GENES  # the count decoder's rows over all genes, and their gradients
    assert kept + 16 * weights + decoder < 0.8 * MEANT_FOR[name][0] * 2**30
    assert not settings.trainer.activation_checkpointing


@pytest.mark.parametrize("trainer", ["gpu", "ddp"])
def test_a_gpu_trainer_alone_has_no_step_of_a_dozen_cells(trainer):
    settings = parse(
        PretrainSettings, compose("pretrain", [f"trainer={trainer}", "corpus=a", "out=b"])
    )
    assert cells_a_step(settings) > 200
