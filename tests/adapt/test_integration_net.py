"""Losses against their definitions; an encoder that cannot see depth or what was not measured."""

import torch

from genemodel.adapt.integration_head import (
    IntegrationNet,
    IntegrationSettings,
    gaussian_kl,
    label_loss,
)


def test_kl_and_label_loss_match_torch():
    mean, log_var = torch.randn(5, 3), torch.randn(5, 3)
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, log_var), exact.sum(1).mean())
    logits = torch.randn(4, 3)
    label = torch.tensor([0, -1, 2, -1])
    exact = torch.nn.functional.cross_entropy(logits, label, ignore_index=-1)
    torch.testing.assert_close(label_loss(logits, label), exact)
    assert label_loss(logits, torch.full((4,), -1)) == 0


def test_encoder_sees_neither_depth_nor_genes_that_were_not_measured():
    torch.manual_seed(0)
    net = IntegrationNet(20, 2, IntegrationSettings(hidden=8, latent=3, rank=4)).eval()
    counts = torch.poisson(torch.full((6, 20), 3.0))
    torch.testing.assert_close(net.encode(counts)[0], net.encode(counts * 7)[0])
    measured = torch.ones(20)
    measured[:5] = 0
    net.input_mean_G.fill_(1.0)
    without = counts.clone()
    without[:, :5] = 0
    expected = net.encode(without, None, measured)[0]
    net.input_mean_G[:5] = 9.0  # what is not measured must not matter
    torch.testing.assert_close(net.encode(without, None, measured)[0], expected)


def test_decoder_gives_the_library_back_and_knows_the_batch():
    torch.manual_seed(0)
    net = IntegrationNet(20, 3, IntegrationSettings(hidden=8, latent=3, rank=4)).eval()
    with torch.no_grad():
        net.batch_gene_BG.normal_()
    z, library = torch.randn(4, 3), torch.tensor([10.0, 100.0, 1000.0, 5.0])
    for batch in (None, torch.tensor([0, 1, 2, 0])):
        torch.testing.assert_close(net.decode(z, batch, library).exp().sum(1), library)
    first = net.decode(z, torch.zeros(4, dtype=torch.long), library)
    assert (first - net.decode(z, torch.ones(4, dtype=torch.long), library)).abs().max() > 0.1


def test_gene_vectors_are_where_the_genes_start():
    torch.manual_seed(0)
    vectors = torch.randn(20, 5)
    vectors[1] = vectors[0]
    net = IntegrationNet(20, 2, IntegrationSettings(hidden=8, rank=4), embedding_GE=vectors)
    torch.testing.assert_close(net.gene_GR[0], net.gene_GR[1])
    torch.testing.assert_close(net.genes_in.weight[:, 0], net.genes_in.weight[:, 1])
    assert (net.gene_GR[0] - net.gene_GR[2]).abs().max() > 0.01
