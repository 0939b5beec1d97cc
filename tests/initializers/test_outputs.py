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


class Regularised(nn.Module):
    """Returns what penalties are made of beside its logits."""

    def __init__(self, returned):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 10), nn.Linear(10, 8), nn.Linear(8, 4)
        self.prototypes, self.returned = nn.Parameter(torch.randn(3, 8)), returned

    def forward(self, x):
        hidden = F.relu(self.first(x))
        features = F.relu(self.second(hidden))
        return {"penalty": self.returned(self, hidden), "logits": self.last(features)}


@pytest.mark.parametrize(
    "returned",
    [
        lambda model, hidden: hidden.abs().mean(),
        lambda model, hidden: hidden.T,
        lambda model, hidden: [hidden.square().sum(), torch.full((4, 4), -torch.inf), hidden[:0].mean()],
        lambda model, hidden: (model.prototypes, hidden.sum()),  # as many rows as some batches have images
        lambda model, hidden: (model.prototypes[:2], hidden.sum()),
    ],
)
@pytest.mark.parametrize("outputs", ["keep", "free"])
def test_what_is_returned_for_all_images_together_stays_too(returned, outputs):
    torch.manual_seed(0)
    model, images = Regularised(returned), torch.randn(40, 12)
    initialize(model, images, "gaussian", between=False)
    before = model(images)
    report = rescale(model, images, outputs=outputs)
    after = model(images)
    torch.testing.assert_close(after["penalty"], before["penalty"], rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(
        after["logits"] / (report.output_scales or [1])[0], before["logits"], rtol=1e-4, atol=1e-5
    )
    assert report.spread_after < report.spread_before


@pytest.mark.parametrize(
    "distribution",
    [
        lambda logits: torch.distributions.Categorical(logits=logits),
        lambda logits: torch.distributions.Independent(torch.distributions.Normal(logits, 1.0), 1),
    ],
)
def test_an_actor_returns_a_distribution(distribution):
    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.policy, self.value = nn.Linear(12, 10), nn.Linear(10, 4), nn.Linear(10, 1)

        def forward(self, x):
            hidden = F.relu(self.body(x))
            return distribution(self.policy(hidden)), self.value(hidden)[:, 0]

    torch.manual_seed(0)
    model, images = Actor(), torch.randn(40, 12)
    initialize(model, images, "gaussian", between=False)
    before = model(images)
    report = rescale(model, images)
    assert {row.name for row in report.layers if row.rate_after is not None} == {"body", "policy", "value"}
    after = model(images)
    torch.testing.assert_close(after[0].mean, before[0].mean, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(after[0].entropy(), before[0].entropy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-5)


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
