"""Shares and means that all decoders of counts end in, and that the three decoders agree."""

import numpy as np
import pytest
import torch
from torch import nn

from genemodel.corpus.statistics import GeneStatistics
from genemodel.expression.rates import at_library, log_shares, logits
from genemodel.heads.decode_counts import CountDecoder
from genemodel.imputation.network import DecoderSettings, ImputationHead
from genemodel.integration.head import IntegrationHead, IntegrationSettings

C, D, G = 5, 4, 12


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return torch.randn(C, D), torch.randn(G, D), torch.randn(G)


def test_a_library_is_shared_out_over_the_genes_that_were_measured(weights):
    vector_CD, gene_GD, bias_G = weights
    measured_CG = torch.rand(C, G) < 0.6
    library_C = torch.tensor([1.0, 10, 100, 1000, 5])
    logit_CG = logits(vector_CD, gene_GD, bias_G)
    mean_CG = at_library(log_shares(logit_CG, measured_CG), library_C).exp()
    weight = np.exp((vector_CD @ gene_GD.T + bias_G).double().numpy()) * measured_CG.numpy()
    expected = weight / weight.sum(1, keepdims=True) * library_C.numpy()[:, None]
    np.testing.assert_allclose(mean_CG.numpy(), expected, rtol=1e-5, atol=1e-12)


def test_what_was_not_measured_has_no_gradient_and_a_finite_one(weights):
    vector_CD, gene_GD, bias_G = weights
    bias_G.requires_grad_()
    measured_CG = torch.ones(C, G, dtype=torch.bool)
    measured_CG[:, 3] = False
    shares = log_shares(logits(vector_CD, gene_GD, bias_G), measured_CG)
    shares[:, :3].sum().backward()
    assert bias_G.grad[3] == 0 and torch.isfinite(bias_G.grad).all() and bias_G.grad[4] != 0


def test_half_precision_ends_before_the_genes_are_summed(weights):
    for given, found in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert logits(*(each.to(given) for each in weights)).dtype == found


class Gives(nn.Module):
    def __init__(self, vector_CD):
        super().__init__()
        self.vector_CD = vector_CD

    def forward(self, _):
        return self.vector_CD


@torch.no_grad()
def test_three_decoders_of_the_same_vectors_give_the_same_shares(weights):
    vector_CD, gene_GD, bias_G = weights
    expected = torch.softmax(vector_CD @ gene_GD.T + bias_G, 1)
    unknown_C = torch.full((C,), -1)

    imputation = ImputationHead(np.full(G, 1 / G), 1, DecoderSettings(latent=D))
    imputation.gene_GD.copy_(gene_GD)
    imputation.bias_G.copy_(bias_G)
    torch.testing.assert_close(imputation.log_fraction(vector_CD, unknown_C).exp(), expected)

    integration = IntegrationHead(G, 2, IntegrationSettings(latent=D, rank=D, hidden=8))
    integration.gene_GR.copy_(gene_GD)
    integration.intercept_G.copy_(bias_G)
    integration.decode_out = Gives(vector_CD)
    shares = integration.log_share(torch.zeros(C, D), unknown_C).exp()
    torch.testing.assert_close(shares, expected)

    measured_XV = torch.ones(1, G, dtype=torch.bool)
    pretraining = CountDecoder(D, GeneStatistics.empty(1, G), 2, measured_XV)
    pretraining.gene.weight.copy_(gene_GD)
    pretraining.base_SV[0] = bias_G
    pretraining.projection = nn.Identity()
    library_C, species_C = torch.arange(1.0, C + 1), torch.zeros(C, dtype=torch.long)
    rates = pretraining.log_rate(
        vector_CD, species_C, unknown_C, library_C, measured_XV[species_C]
    ).exp()
    torch.testing.assert_close(rates, expected * library_C[:, None])
