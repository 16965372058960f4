"""Likelihoods against scipy and torch, their gradients against autograd and differences."""

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from genemodel.expression.likelihood import (
    MultinomialLoss,
    negative_binomial_by_gene,
    negative_binomial_loss,
    poisson_losses,
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def stored(counts):
    entries = sparse.coo_matrix(counts)
    places = (torch.as_tensor(a.astype(np.int64)) for a in (entries.row, entries.col))
    return *places, torch.as_tensor(entries.data)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_negative_binomial_is_that_of_scipy(rng, scale):
    counts = rng.poisson(2.0 * scale, (4, 6)).astype(float)
    mean, theta = scale * rng.uniform(0.2, 5, (4, 6)), rng.uniform(0.3, 30, 6)
    exact = -stats.nbinom.logpmf(counts, theta, theta / (theta + mean))
    logs = torch.tensor(np.log(mean)), torch.tensor(np.log(theta))
    got = negative_binomial_loss(*logs, *stored(counts), complete=True).item()
    assert got == pytest.approx(exact.sum(), rel=1e-6)
    without = negative_binomial_loss(*logs, *stored(counts)).item()
    constant = torch.lgamma(torch.tensor(counts) + 1).sum().item()
    assert without + constant == pytest.approx(exact.sum(), rel=1e-6)
    measured = rng.random((4, 6)) < 0.6
    some = negative_binomial_loss(
        *logs, *stored(counts), measured_CG=torch.tensor(measured), complete=True
    ).item()
    assert some == pytest.approx(exact[measured].sum(), rel=1e-6)
    by_gene = negative_binomial_by_gene(sparse.csr_matrix(counts), mean, theta)
    np.testing.assert_allclose(by_gene, -exact.sum(0), rtol=1e-8)


def test_negative_binomial_has_the_right_gradient_and_stays_finite(rng):
    counts = rng.poisson(1.0, (3, 5)).astype(float)
    logs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,))]
    assert torch.autograd.gradcheck(
        lambda mean, theta: negative_binomial_loss(mean, theta, *stored(counts)), logs
    )
    extreme = torch.tensor([[-60.0, 60.0, 0.0]], requires_grad=True)
    theta = torch.tensor([40.0, -40.0, 40.0], requires_grad=True)
    entry = torch.tensor([0]), torch.tensor([2]), torch.tensor([3.0])
    loss = negative_binomial_loss(extreme, theta, *entry)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(extreme.grad).all()


def test_a_stored_zero_adds_nothing():
    mean, theta = torch.zeros(1, 2), torch.zeros(2)
    entry = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([2.0, 0.0])
    one = tuple(array[:1] for array in entry)
    torch.testing.assert_close(
        negative_binomial_loss(mean, theta, *entry), negative_binomial_loss(mean, theta, *one)
    )


def test_multinomial_gradient_matches_autograd(rng):
    x = rng.poisson(0.5, (6, 9)).astype(np.float64)
    torch.manual_seed(0)
    z, e, b = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 4), (9, 4), (9,))
    )
    library = torch.as_tensor(x.sum(1))
    fused = MultinomialLoss.apply(z, e, b, *stored(x), library)
    grads = torch.autograd.grad(fused, (z, e, b))
    plain = -(torch.as_tensor(x) * torch.log_softmax(z @ e.T + b, 1)).sum()
    assert torch.allclose(fused, plain)
    for ours, theirs in zip(grads, torch.autograd.grad(plain, (z, e, b)), strict=True):
        assert torch.allclose(ours, theirs)


def test_poisson_losses_are_those_of_scipy_and_scikit_learn(rng):
    from sklearn.metrics import mean_poisson_deviance

    rate = rng.gamma(1.0, 2.0, (30, 8)) + 0.01
    count = rng.poisson(rate).astype(float)
    loss, deviance = poisson_losses(count, rate, floor=0.0)
    factorials = torch.lgamma(torch.tensor(count) + 1).sum().item()
    assert loss + factorials == pytest.approx(-stats.poisson.logpmf(count, rate).sum())
    theirs = mean_poisson_deviance(count.ravel(), rate.ravel()) * count.size
    assert deviance == pytest.approx(theirs)
    nothing, _ = poisson_losses(np.ones((1, 1)), np.zeros((1, 1)), floor=1e-6)
    assert nothing == pytest.approx(-np.log(1e-6))
