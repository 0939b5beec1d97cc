"""Local response normalisation against torch's."""

import pytest
import torch
from torch import nn

from experiments.networks.lrn import LocalResponseNorm
from initializers import initialize, rescale


@pytest.mark.parametrize("shape", [(10, 96, 27, 27), (10, 256, 13, 13), (4, 5, 3), (2, 1, 4, 4), (2, 2, 4, 4)])
@pytest.mark.parametrize("scale", [1, 100])
def test_it_is_torchs(shape, scale):
    torch.manual_seed(0)
    x, gradient = (scale * torch.randn(shape)).requires_grad_(), torch.randn(shape)
    ours, theirs = LocalResponseNorm(), nn.LocalResponseNorm(5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6 * scale)
    found, expected = (torch.autograd.grad(norm(x), x, gradient)[0] for norm in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_its_gradient(size):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    norm = LocalResponseNorm(size, alpha=0.7, k=2.0).double()
    assert torch.autograd.gradcheck(norm, x)


def test_in_bfloat16_it_rounds_only_what_comes_out():
    x = 100 * torch.randn(4, 8, 5, 5).bfloat16()
    expected = nn.LocalResponseNorm(5)(x.float()).bfloat16()
    torch.testing.assert_close(LocalResponseNorm()(x), expected)
    assert LocalResponseNorm()(x).dtype == torch.bfloat16


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), LocalResponseNorm(), nn.Conv2d(8, 8, 3), nn.ReLU(), LocalResponseNorm()),
        *(nn.Flatten(), nn.Linear(128, 5)),
    )


def test_a_balanced_network_is_the_same_after_its_state_dict_is_saved_and_loaded():
    model, images = network().eval(), 100 * torch.randn(20, 3, 8, 8)
    initialize(model, images, "gaussian", between=False)
    expected = model(images)
    report = rescale(model, images)
    assert report.lrn == "exact"
    assert report.spread_after < 1.001 < 2 < report.spread_before
    assert model[2].alpha != pytest.approx(1e-4, rel=0.1)
    loaded = network()
    loaded.load_state_dict(model.state_dict())
    for found in (model(images), loaded(images)):
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_the_authors_way_leaves_the_constant():
    model, images = network(), 100 * torch.randn(20, 3, 8, 8)
    report = initialize(model, images, "gaussian", lrn="estimate")
    assert report.lrn == "estimate"
    assert (model[2].alpha.item(), model[5].alpha.item()) == (pytest.approx(1e-4), pytest.approx(1e-4))
