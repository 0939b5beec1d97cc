"""In networks narrower than the published ones, fixed standard deviations are those that keep the signal."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from detection import FastRCNN
from experiments.data.images import ImageCache, crop, whole
from experiments.data.voc import read_split
from experiments.engine.initialization import set_weights
from experiments.networks import VGG16, CaffeNet, FitNet4, GoogLeNet, MNISTFitNet, ResNet

MINI = {"input_size": 115, "width": 0.5, "fc": 512}
INITS = {
    "caffe": {"_target_": "initializers.caffe"},
    "gaussian_unscaled": {"_target_": "initializers.gaussian", "std": 0.01},
    "msra": {"_target_": "initializers.msra"},
}
FILTERS_ALONE = {"_target_": "initializers.initialize", "filters": "gaussian", "within": False, "between": False}


@pytest.mark.parametrize("network", [CaffeNet, VGG16, GoogLeNet])
def test_nothing_changes_at_the_published_width(network):
    with torch.device("meta"):
        for outputs in (20, 1000):
            factors = network(outputs).std_factors
            assert set(factors.values()) == {1.0}
            assert len(factors) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network(outputs).modules())
        assert set(CaffeNet(groups=False).std_factors.values()) == {1.0}
        assert set(GoogLeNet(auxiliary=True).std_factors.values()) == {1.0}


@pytest.mark.parametrize("network", [VGG16, FitNet4, MNISTFitNet, ResNet])
def test_grey_images_make_no_network_narrower(network):
    assert set(network(10, channels=1).std_factors.values()) == {1.0}


def test_the_factors_of_the_mini_network():
    factors = CaffeNet(20, **MINI).std_factors
    assert factors == pytest.approx(
        {"conv1": 1, **dict.fromkeys(("conv2", "conv3", "conv4", "conv5"), 2**0.5), "fc6": 8**0.5}
        | dict.fromkeys(("fc7", "fc8"), 8**0.5)
    )
    assert CaffeNet(20, groups=False, **MINI).std_factors == pytest.approx(factors)
    detector = FastRCNN(CaffeNet(20, width=0.5, fc=512))
    assert detector.std_factors["cls_score"] == detector.std_factors["bbox_pred"] == pytest.approx(8**0.5)
    assert detector.caffe_fillers["cls_score"] == (pytest.approx(0.01 * 8**0.5), 0.0)
    assert detector.caffe_fillers["fc6"] == (pytest.approx(0.005 * 2**0.5), 1.0)


@torch.no_grad()
def deviations(options, init, images):
    """Standard deviation of the output of each affine layer of CaffeNet, mean over three draws of the weights."""
    found = {}
    for seed in range(3):
        model = CaffeNet(20, **options).eval()
        set_weights(model, INITS[init], None, seed=seed)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                add = lambda _, __, y, name=name: found.update({name: found.get(name, 0) + y.std().item() / 3})  # noqa: E731
                layer.register_forward_hook(add)
        model(images)
    return found


@pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="needs real images: set VOC_ROOT")
@pytest.mark.parametrize("init", INITS)
def test_signals_are_as_strong_as_at_full_width(init, tmp_path):
    """On the same images at each network's resolution."""
    paths = read_split(os.environ["VOC_ROOT"], "train").image_paths[:32]
    cache = ImageCache.open(paths, Path(tmp_path))

    def images(size):
        return crop(cache, torch.arange(len(paths)), whole(cache.heights, cache.widths), size, (104, 117, 123))

    assert deviations(MINI, init, images(115)) == pytest.approx(deviations({}, init, images(227)), rel=0.2)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("network", [VGG16, GoogLeNet])
def test_other_networks(init, network):
    torch.manual_seed(0)
    model = network(20, input_size=64, width=0.25)
    if network is VGG16 and init == "caffe":
        with pytest.raises(ValueError, match="VGG16 states no reference initialization"):
            set_weights(model, INITS[init], None, seed=0)
        return
    set_weights(model, INITS[init], None, seed=0)
    head = model.get_submodule(model.last_layer).weight
    expected = {"caffe": (1 / head.shape[1]) ** 0.5}.get(init, 0.01 * model.std_factors[model.last_layer])
    assert head.std().item() == pytest.approx(expected, rel=0.05)


def test_gaussian_filters_that_nothing_scales_are_those_of_the_baseline():
    images = torch.randn(20, 3, 115, 115)
    alone, baseline = CaffeNet(20, **MINI), CaffeNet(20, **MINI)
    set_weights(alone, FILTERS_ALONE, images, seed=0)
    set_weights(baseline, INITS["gaussian_unscaled"], None, seed=0)
    for name, parameter in baseline.named_parameters():
        torch.testing.assert_close(alone.get_parameter(name), parameter)
    set_weights(alone, FILTERS_ALONE | {"filters": "kmeans"}, images, seed=0)
    for name in ("fc6", "fc7", "fc8"):
        assert alone.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.01 * 8**0.5, rel=0.03)
