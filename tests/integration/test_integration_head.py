"""Losses against their definitions; an encoder that cannot see depth or what was not measured."""

import numpy as np
import torch

from genemodel.integration.head import (
    IntegrationHead,
    IntegrationSettings,
    gaussian_kl,
    label_loss,
    start_at_vectors,
)
from genemodel.model.count_encoder import CountEncoder

SETTINGS = IntegrationSettings(hidden=8, latent=3, rank=4)


def encoder(**options):
    return CountEncoder(np.arange(20), 20, hidden=8, dropout=0.1, **options).eval()


def test_kl_and_label_loss_match_torch():
    mean, log_var = torch.randn(5, 3), torch.randn(5, 3)
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, log_var), exact.sum())
    logits = torch.randn(4, 3)
    label = torch.tensor([0, -1, 2, -1])
    exact = torch.nn.functional.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(label_loss(logits, label), exact)
    assert label_loss(logits, torch.full((4,), -1)) == 0


def test_encoder_sees_neither_depth_nor_genes_that_were_not_measured():
    torch.manual_seed(0)
    net = encoder()
    counts = torch.poisson(torch.full((6, 20), 3.0))
    torch.testing.assert_close(net.read(counts), net.read(counts * 7))
    measured = torch.ones(20)
    measured[:5] = 0
    net.input_mean_G.fill_(1.0)
    without = counts.clone()
    without[:, :5] = 0
    expected = net.read(without, None, measured)
    net.input_mean_G[:5] = 9.0  # what is not measured must not matter
    torch.testing.assert_close(net.read(without, None, measured), expected)


def test_decoder_shares_out_everything_and_knows_the_batch():
    torch.manual_seed(0)
    head = IntegrationHead(20, 3, SETTINGS).eval()
    with torch.no_grad():
        head.batch_gene_BG.normal_()
    z = torch.randn(4, 3)
    for batch in ([-1, -1, -1, -1], [0, 1, 2, 0]):
        share = head.log_share(z, torch.tensor(batch)).exp()
        torch.testing.assert_close(share.sum(1), torch.ones(4))
    first = head.log_share(z, torch.zeros(4, dtype=torch.long))
    assert (first - head.log_share(z, torch.ones(4, dtype=torch.long))).abs().max() > 0.1


def test_an_unknown_batch_is_the_mean_of_all():
    torch.manual_seed(0)
    head = IntegrationHead(20, 2, SETTINGS).eval()
    with torch.no_grad():
        head.batch_gene_BG[0] = 1.0 * torch.arange(20)
        head.batch_gene_BG[1] = -head.batch_gene_BG[0]
        head.decode_in.weight[:, 3:] = 0  # only the offsets differ
    z = torch.randn(1, 3)
    middle = head.log_share(z, torch.tensor([-1]))
    head.batch_gene_BG.data.zero_()
    torch.testing.assert_close(middle, head.log_share(z, torch.tensor([0])))


def test_the_divergence_grows_to_its_weight():
    head = IntegrationHead(20, 2, IntegrationSettings(kl_weight=3.0, kl_ramp=0.5, hidden=8))
    assert [head.weights_at(share)["kl"] for share in (0.0, 0.25, 0.5, 1.0)] == [0, 1.5, 3, 3]
    assert head.weights == {"counts": 1.0, "kl": 3.0, "nats_per_count": 0.0}


def test_gene_vectors_are_where_the_genes_start():
    torch.manual_seed(0)
    vectors = torch.randn(20, 5)
    vectors[1] = vectors[0]
    net, head = encoder(), IntegrationHead(20, 2, SETTINGS)
    start_at_vectors(net, head, vectors)
    torch.testing.assert_close(head.gene_GR[0], head.gene_GR[1])
    torch.testing.assert_close(net.genes_in.weight[:, 0], net.genes_in.weight[:, 1])
    assert (head.gene_GR[0] - head.gene_GR[2]).abs().max() > 0.01
