"""Outputs whose scale is free: the rates of networks with several outputs become equal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initializers import InitializationError, change_rate, initialize, rescale


class Outputs(nn.Module):
    """A trunk with outputs at several depths, as large as `weights`, and one that depends on no weights."""

    def __init__(self, weights=(1.0, 0.3, 0.3), branch=2):
        super().__init__()
        self.weights = weights
        self.trunk = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))
        self.branches = nn.ModuleList(
            nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(branch)), nn.Linear(12, 5))
            for _ in weights
        )

    def forward(self, x):
        outputs, image = {}, x
        for depth, layer in enumerate(self.trunk):
            x = F.relu(layer(x))
            if depth >= len(self.trunk) - len(self.weights):
                number = depth - len(self.trunk) + len(self.weights)
                outputs[f"{depth}"] = self.weights[number] * self.branches[number](x)
        return {"image": image.mean(1, keepdim=True), **outputs}


def network(**options):
    torch.manual_seed(0)
    model = Outputs(**options)
    images = torch.randn(200, 12) @ torch.randn(12, 12)
    initialize(model, images, "gaussian", between=False)
    return model, images


@pytest.mark.parametrize("method", ["balance", "paper"])
@pytest.mark.parametrize("options", [{}, {"branch": 0}, {"weights": (1.0,)}, {"weights": (1.0, 100.0, 0.01, 1.0)}])
def test_the_rates_become_equal_and_outputs_keep_their_direction(options, method):
    model, images = network(**options)
    before = model(images)
    report = rescale(model, images, outputs="free", rate_images=200, method=method)
    assert report.spread_after < (1.01 if method == "balance" else 1.8) < 2 < report.spread_before
    assert report.output_change < 1e-5
    after = model(images)
    assert len(report.output_scales) == len(after)
    for name, scale in zip(after, report.output_scales, strict=True):
        assert (after[name] / scale - before[name]).norm() < 1e-5 * before[name].norm()
    assert report.output_scales[0] == 1
    assert f"outputs multiplied by 1, {report.output_scales[1]:.3g}" in str(report)
    assert change_rate(model, images, seed=1).spread < 2 < report.spread_before


def test_kept_outputs_hold_the_rates_apart():
    model, images = network()
    before = model(images)
    report = rescale(model, images)
    assert report.spread_after > 1.3
    assert report.output_scales == []
    for name, output in model(images).items():
        torch.testing.assert_close(output, before[name], rtol=1e-4, atol=1e-5)


def test_an_output_that_is_no_homogeneous_function():
    """Behind a sigmoid there is no scale to set."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5), nn.Sigmoid())
    images = torch.randn(50, 12)
    before = initialize(model, images, "gaussian", between=False) and model(images)
    report = rescale(model, images, outputs="free")
    assert report.output_scales == [1.0]
    torch.testing.assert_close(model(images), before)


def test_an_unknown_choice():
    with pytest.raises(InitializationError, match="unknown outputs 'fixed': choose one of keep, free"):
        initialize(nn.Linear(3, 2), torch.randn(5, 3), outputs="fixed")
