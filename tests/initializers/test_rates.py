import copy

import pytest
import torch
from torch import nn

from initializers import Rates, _rates, change_rate
from initializers._rates import BATCH, measure


def slow_columns(model, images, eta):
    """C_k,j by equation 1, one image at a time by autograd in float64; for a convolution j counts within the group."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    weights = [layer.weight for layer in layers.values()]
    squares = [0.0] * len(weights)
    for image, top in zip(images.double().split(1), eta.double().split(1), strict=True):
        gradients = torch.autograd.grad((model(image) * top).sum(), weights)
        squares = [total + g.square() / len(images) for total, g in zip(squares, gradients, strict=True)]
    columns = {}
    for name, weight, square in zip(layers, weights, squares, strict=True):
        mean = square.movedim(1, 0).flatten(1).mean(1)
        columns[name] = (mean / weight.square().mean()).sqrt().detach()
    return columns


def conv(*args, **options):
    """The convolution between two others, with in-place ReLUs."""
    middle = nn.Conv2d(6, *args, **options)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.ReLU(inplace=True),
        middle,
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(middle.out_channels, 4, 1),
        nn.LeakyReLU(0.1, inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 121, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)),
    "tokens": lambda: nn.Sequential(
        nn.Conv2d(4, 9, 7), nn.Flatten(2), nn.Linear(25, 8), nn.ReLU(), nn.Linear(8, 2), nn.Flatten(), nn.Linear(18, 3)
    ),
    "pointwise": lambda: conv(8, 1),
    "groups": lambda: conv(8, 3, padding=1, groups=2),
    "depthwise": lambda: conv(6, 3, groups=6, bias=False),
    "strides": lambda: conv(8, (3, 2), stride=(2, 1), padding=(0, 2)),
    "dilation": lambda: conv(8, (2, 3), dilation=2, padding=2),
    "same": lambda: conv(8, (2, 3), dilation=2, padding="same"),
    "reflect": lambda: conv(8, 3, padding=2, padding_mode="reflect", groups=2),
    "circular": lambda: conv(8, 3, padding=(1, 2), padding_mode="circular"),
    "dropout": lambda: nn.Sequential(conv(8, 3), nn.Dropout(), nn.Linear(3, 3)),
    "sigmoid": lambda: nn.Sequential(conv(8, 3), nn.Sigmoid(), nn.Linear(3, 3)),
}


def build(network):
    torch.manual_seed(0)
    return NETWORKS[network]()


@pytest.fixture
def images():
    return torch.randn(BATCH + 5, 4, 11, 11, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def eta():
    return torch.randn(BATCH + 5, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("limit", [_rates.MAX_COLUMN_VALUES, 1000])
def test_columns_equal_a_slow_computation(network, limit, images, eta, monkeypatch):
    model = build(network)
    monkeypatch.setattr(_rates, "MAX_COLUMN_VALUES", limit)  # the smaller unfolds one image at a time
    rates, top = measure(model.eval(), (images,), seed=0, eta=eta)
    slow = slow_columns(model, images, eta)
    assert rates.layers == list(slow)
    for name in slow:
        torch.testing.assert_close(rates.columns[name], slow[name], rtol=1e-4, atol=0)
    torch.testing.assert_close(top, model(images))


def test_eta_is_normal_and_drawn_for_every_image(images):
    """Its seed changes the rates by no more than the noise of a finite sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4 * 121, 3))
    images = images.repeat(100, 1, 1, 1)
    # Of a linear network, C² = E[x²] E[eta²] / mean(W²) for every input, whatever the outputs.
    expected = (images.flatten(1).square().mean(0) / model[1].weight.detach().square().mean()).sqrt().double()
    for seed in (0, 1):
        torch.testing.assert_close(change_rate(model, images, seed=seed).columns["1"], expected, rtol=0.1, atol=0)
    rates = [change_rate(model, images, seed=seed).mean["1"] for seed in (0, 0, 1)]
    assert rates[0] == rates[1] != rates[2]
    assert rates == pytest.approx([expected.mean().item()] * 3, rel=0.02)


def test_frozen_layers_are_measured_too(images):
    model = build("groups")
    rates = change_rate(model, images)
    for frozen in (model[:3], model):
        frozen.requires_grad_(False)
        for name, column in change_rate(model, images).columns.items():
            torch.testing.assert_close(column, rates.columns[name])


@pytest.mark.parametrize("factors", [(1, 1, 3), (5, 1, 1), (4, 0.25, 1), (2, 3, 0.1)])
def test_scaling_the_layers_of_a_homogeneous_network(factors, images):
    """W_k times r_k and b_k times r_1...r_k multiply C_k by R / r_k², R the product of all r."""
    model, product = build("groups")[2:], 1.0
    images = torch.rand(20, 6, 5, 5, generator=torch.Generator().manual_seed(3))
    before = change_rate(model, images).mean
    for name, factor in zip(before, factors, strict=True):
        layer, product = model.get_submodule(name), product * factor
        layer.weight.data *= factor
        layer.bias.data *= product
    after = change_rate(model, images).mean
    for name, factor in zip(before, factors, strict=True):
        assert after[name] == pytest.approx(before[name] * product / factor**2, rel=1e-4)


def test_the_summaries():
    columns = {"a": torch.tensor([1.0, 2.0, 6.0]), "b": torch.tensor([10.0, 14.0]), "c": torch.tensor([2.0])}
    rates = Rates(columns)
    assert rates.layers == ["a", "b", "c"]
    assert rates.mean == {"a": 3, "b": 12, "c": 2}
    assert rates.cv == pytest.approx({"a": (14 / 3) ** 0.5 / 3, "b": 1 / 6, "c": 0})
    assert rates.spread == 6
