"""Dropout is active while a network is initialized: in training, layers have the variance that was set."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.data.images import ImageCache, crop, whole
from experiments.data.voc import read_split
from experiments.networks import CaffeNet
from initializers import change_rate, initialize, lsuv, rescale
from initializers._inputs import as_inputs
from initializers._layers import Layers
from initializers._rates import measure

AFFINE = nn.Conv2d | nn.Linear


def draw(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def mlp(dropout=nn.Dropout, p=0.5):
    layers = [nn.Flatten(), nn.Linear(48, 96)]
    for _ in range(3):
        layers += [nn.ReLU(), dropout(p), nn.Linear(96, 96)]
    return nn.Sequential(*layers, nn.ReLU(), dropout(p), nn.Linear(96, 10))


def selu(dropout=nn.AlphaDropout):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 96), nn.SELU(), dropout(0.3), nn.Linear(96, 40), nn.Linear(40, 10))


def convolutions(dropout=nn.Dropout2d):
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), dropout(0.5), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


MODELS = {
    "MLP": mlp,
    "alpha dropout": selu,
    "feature alpha dropout": lambda: convolutions(nn.FeatureAlphaDropout),
    "2-d dropout": convolutions,
    "CaffeNet": lambda: CaffeNet(10, input_size=67, width=0.25, fc=128),
}


@torch.no_grad()
def deviations(model, images, passes=40, of=lambda y: y.transpose(0, 1).flatten(1).std(1, correction=0)):
    """Standard deviation of every layer's output channels in training mode, over many masks, by layer."""
    outputs = {name: [] for name, layer in model.named_modules() if isinstance(layer, AFFINE)}
    model = copy.deepcopy(model).train()
    for name in outputs:
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: outputs[name].append(y.clone()))
    for _ in range(passes):
        model(images)
    return {name: of(torch.cat(parts)) for name, parts in outputs.items()}


@pytest.mark.parametrize(("name", "filters"), [*((name, "gaussian") for name in MODELS), ("CaffeNet", "kmeans")])
def test_unit_variance_in_training(name, filters):
    """Of each layer on average to 2 %; a channel's own is measured on 160 images with eight masks each."""
    torch.manual_seed(0)
    model = MODELS[name]()
    images = 50 * draw(160, 3, 67, 67) if name == "CaffeNet" else draw(160, 3, 4, 4)
    initialize(model, images, filters, between=False)
    for layer, std in deviations(model, images, 10 if name == "CaffeNet" else 100).items():
        assert std.mean() == pytest.approx(1, abs=0.02), layer
        assert (std - 1).abs().max() < 0.15, layer


@pytest.mark.parametrize("name", ["MLP", "2-d dropout", pytest.param("CaffeNet", marks=pytest.mark.slow)])
def test_equal_rates_in_training(name):
    """On the same images with other masks and top gradients."""
    torch.manual_seed(0)
    model = MODELS[name]()
    images = 50 * draw(100, 3, 67, 67) if name == "CaffeNet" else draw(200, 3, 4, 4)
    initialize(model, images, "gaussian", rate_images=100)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.train()
    assert measure(Layers(model), as_inputs(model, images)[0], seed=1, draws=4).rates.spread < 1.1


def test_the_function_stays_in_evaluation():
    torch.manual_seed(0)
    model, images = mlp().eval(), draw(100, 3, 4, 4)
    before = model(images)
    report = rescale(model, images)
    assert report.output_change < 1e-5
    torch.testing.assert_close(model(images), before)
    assert report.spread_after < 1.01 < 1.5 < report.spread_before


def test_lsuv_sees_dropout():
    torch.manual_seed(0)
    model, images = mlp(), draw(400, 3, 4, 4)
    lsuv(model, images)
    for layer, std in deviations(model, images, of=lambda y: y.std(correction=0).item()).items():
        assert std == pytest.approx(1, abs=0.02), layer


def test_without_dropout_where_p_is_0():
    torch.manual_seed(0)
    model, images = mlp(p=0), draw(100, 3, 4, 4)
    plain = nn.Sequential(*(copy.deepcopy(layer) for layer in model if not isinstance(layer, nn.Dropout)))
    assert list(change_rate(model, images).mean.values()) == list(change_rate(plain, images).mean.values())
    initialize(model, images)
    initialize(plain, images)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", [initialize, rescale, lsuv])
@pytest.mark.parametrize("training", [True, False])
def test_the_masks_are_of_the_seed(method, training):
    torch.manual_seed(0)
    start, images, results = mlp(), draw(60, 3, 4, 4), []
    for seed, state in ((3, 1), (3, 2), (4, 1)):
        model = copy.deepcopy(start).train(training)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        method(model, images, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(module.training == training for module in model.modules())
        results.append([parameter.clone() for parameter in model.parameters()])
    one, same, other = results
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[-2], other[-2])


def test_every_image_has_a_mask_of_its_own():
    """Equal images differ behind dropout, so that a layer there has a variance."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 5))
    images = draw(1, 3, 4, 4).repeat(60, 1, 1, 1)
    report = initialize(model, images, "gaussian", between=False)
    assert report.layers[0].std_after == pytest.approx(1, abs=1e-3)


class Attention(nn.Module):
    """As many write it: dropout of the attention itself only where the module trains."""

    def __init__(self):
        super().__init__()
        self.qkv, self.dropout, self.out_dropout = nn.Linear(8, 24), nn.Dropout(0.2), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        p = self.dropout.p if self.training else 0.0
        return x + self.out_dropout(F.scaled_dot_product_attention(q, k, v, dropout_p=p))


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x if not self.training else x * (torch.rand(len(x), 1, 1) > self.drop_prob)


class StochasticDepth(DropPath):
    def __init__(self, p):
        super().__init__(p)
        self.p = p
        del self.drop_prob


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.attention = Attention()
        self.multihead = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.path, self.depth, self.none = DropPath(0.1), StochasticDepth(0.2), DropPath(0.0)
        self.top = nn.Linear(8, 5)

    def forward(self, x):
        x = self.attention(F.dropout(self.embed(x), 0.25, self.training))
        x = x + self.path(self.multihead(x, x, x)[0])
        return self.top(self.none(self.depth(x)).mean(1))


@pytest.mark.parametrize("method", [lambda *a: initialize(*a, "gaussian"), rescale, lsuv])
def test_what_stays_inactive_is_listed(method):
    torch.manual_seed(0)
    report = method(Tokens(), draw(60, 7, 8))
    expected = ["attention.dropout", "multihead", "path", "depth", "functional dropout, p = 0.25"]
    assert report.inactive_dropout == expected
    assert f"inactive here, though random in training: {', '.join(expected)}" in str(report)
    report = method(mlp(), draw(60, 3, 4, 4))
    assert report.inactive_dropout == []
    assert "inactive" not in str(report)


@pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="needs real images: set VOC_ROOT")
@pytest.mark.parametrize("width", [0.25, pytest.param(1, marks=pytest.mark.slow)])
def test_rates_of_caffenet_with_dropout_are_those_of_the_authors_code(width, tmp_path):
    """From conv1 to fc6, after the within-layer step: the weights that see dropout learn at .4 of the rate without.

    Both measured without masks. Those of two dropouts in the backward pass double every gradient's square twice.
    """
    paths = read_split(os.environ["VOC_ROOT"], "train").image_paths[:160]
    cache = ImageCache.open(paths, Path(tmp_path))
    images = crop(cache, torch.arange(160), whole(cache.heights, cache.widths), 227, (104, 117, 123))
    torch.manual_seed(0)
    without, model = (CaffeNet(1000, width=width, fc=int(4096 * width), dropout=dropout) for dropout in (0, 0.5))
    for network in (without, model):
        initialize(network, images, "gaussian", between=False)
    expected, masked = (change_rate(network, images[:60]) for network in (without, model))
    model.drop6.p = model.drop7.p = 0
    rates = change_rate(model, images[:60])
    for layer in rates.layers[:6]:
        assert rates.mean[layer] / expected.mean[layer] == pytest.approx(0.4, abs=0.02), layer
        assert masked.mean[layer] / rates.mean[layer] == pytest.approx(2, abs=0.1), layer
