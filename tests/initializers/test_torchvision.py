"""The method holds on the networks of torchvision: whatever is in them, at every affine layer.

Some of them amplify rounding, up to where float32 does not determine their outputs. The statistics of their layers, and
that their rates are equal, are therefore tested in float64, and the function in float32, relative to `rounding`: how
far the outputs in float32 are from those in float64.
"""

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms.v2 import functional as TF

import initializers
from initializers._layers import Layers, forward

FILTERS = ["gaussian", "kmeans"]
BIAS = 0.1  # the mean that `initialize` gives a channel which has a bias
EXACT = 1e-4  # change of the output up to which the between-layer step counts as exact
ALL = models.list_models(module=models)
VITS = ("vit_b_16", "vit_l_16", "vit_h_14")  # made for 112 px, which saves three quarters of their time
SIZES = dict.fromkeys(VITS, 112) | {"inception": 96, "vit": 224, "maxvit": 224}  # about the smallest; 64 for the others


def vgg11(num_classes):
    model = models.VGG(
        models.vgg.make_layers([16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 512, "M"]), init_weights=False
    )
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, num_classes))
    return model


def inception_v3(num_classes):
    first = models.inception.BasicConv2d(3, 32, kernel_size=3, stride=2), nn.MaxPool2d(3, 2)
    blocks = models.inception.InceptionC(32, 16), models.inception.InceptionC(768, 16)
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, num_classes))


def shufflenet_v2_x0_5(**options):
    return models.ShuffleNetV2([2, 3, 2], [24, 48, 96, 192, 256], **options)


def regnet_y_400mf(**options):
    shape = models.regnet.BlockParams.from_init_params(depth=8, w_0=48, w_a=56, w_m=2.09, group_width=8, se_ratio=0.25)
    return models.RegNet(shape, **options)


def efficientnet_b0(**options):
    stages = ((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 1), (6, 3, 2, 40, 80, 2))
    settings = [models.efficientnet.MBConvConfig(*stage) for stage in stages]
    return models.EfficientNet(settings, 0.2, **options)


def convnext_tiny(**options):
    settings = [models.convnext.CNBlockConfig(*widths, 1) for widths in ((24, 48), (48, 96), (96, None))]
    return models.ConvNeXt(settings, **options)


def swin_v2_t(**options):
    v2 = {"block": models.swin_transformer.SwinTransformerBlockV2}
    v2 |= {"downsample_layer": models.swin_transformer.PatchMergingV2}
    return models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], **v2, **options)


# Chosen for their differences; the larger ones as small as their classes allow, with all that is in them.
NETWORKS = {
    "vgg11": vgg11,  # a chain
    "resnet18": partial(models.ResNet, models.resnet.BasicBlock, [1, 2, 1, 1]),  # additions
    "densenet121": partial(models.DenseNet, 16, (2, 3, 2), 32),  # concatenations of concatenations
    "googlenet": partial(models.googlenet, init_weights=False),  # branches; some outputs in training mode only
    "inception_v3": inception_v3,  # kernels that are not square
    "squeezenet1_1": models.squeezenet1_1,  # concatenations without normalisation
    "mobilenet_v3_small": models.mobilenet_v3_small,  # depthwise; hard swish; gates
    "shufflenet_v2_x0_5": shufflenet_v2_x0_5,  # channels split and shuffled
    "regnet_y_400mf": regnet_y_400mf,  # groups; gates behind a sigmoid
    "efficientnet_b0": efficientnet_b0,  # SiLU
    "convnext_tiny": convnext_tiny,  # LayerNorm, GELU, layer scale
    "vit_b_32": partial(models.VisionTransformer, 64, 16, 3, 4, 48, 96),  # attention
    "swin_v2_t": swin_v2_t,  # attention in shifted windows, with biases that a network of its own computes
}
# Without parts that are not homogeneous, or with a normalisation on either side of them: every rate can be made equal.
EQUAL = ("alexnet", "convnext", "densenet", "googlenet", "inception", "mnasnet", "mobilenet_v2", "regnet_x", "resnet")
EQUAL += ("resnext", "shufflenet", "squeezenet", "vgg", "wide_resnet")


def image_size(name):
    return next((size for start, size in SIZES.items() if name.startswith(start)), 64)


def images(count, size):
    """Real images of VOC 2007 where there are some, others generated: noise with most of its power in large shapes."""
    devkit = os.environ.get("VOC_ROOT")
    if devkit:
        paths = sorted(Path(devkit, "VOC2007", "JPEGImages").glob("*.jpg"))[: 7 * count : 7]
        found = [TF.resize(Image.open(path).convert("RGB"), [size]) for path in paths]
        x = torch.stack([TF.to_image(TF.center_crop(image, [size, size])) for image in found]).float() / 255
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.full((count, 3, size, size), 0.5)
        for cells in (1, 2, 4, 8, 16, 32, size):
            noise = torch.randn(count, 3, cells, cells, generator=generator) / cells**0.5
            x += 0.2 * F.interpolate(noise, (size, size), mode="bicubic" if cells > 1 else "nearest")
        x = x.clamp(0, 1)
    return TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@torch.no_grad()
def outputs(model, x):
    return torch.cat([model(batch) for batch in x.split(8)])


def relative_change(before, after):
    return ((after - before).norm() / before.norm()).item()


@torch.no_grad()
def statistics(model, x):
    """Name -> layer, mean and standard deviation of its output channels, where it is used first."""
    found = {}

    def visit(call, _, compute):
        output, layer = compute(), call.layer
        if layer.name not in found:
            channel = -1 if layer.linear else 1 - layer.weight.ndim
            values = output.double().movedim(channel, 0).flatten(1)
            found[layer.name] = layer, values.mean(1), values.std(1, correction=0)
        return output

    forward(Layers(model), (x,), visit)
    return found


def log_variance(rates):
    return torch.tensor(rates).double().log().var(correction=0).item()


def rounding_of_rates(model, twin, x):
    """The spread of the change rates in float32 relative to those of the same network in float64."""
    rates, precise = (initializers.change_rate(*pair).mean for pair in ((model, x), (twin, x.double())))
    ratios = [rates[name] / precise[name] for name in rates]
    return max(ratios) / min(ratios)


def check(model, x, filters, equal):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what is set with dropout holds with dropout: see test_dropout.py
    model.double().eval()
    report = initializers.initialize(model, x.double(), filters, between=False)
    check_within(report, statistics(model, x.double()))

    precise = outputs(model, x.double())
    twin = copy.deepcopy(model) if equal else None
    before = outputs(model.float(), x)
    apart = rounding_of_rates(model, twin, x) if twin is not None else 1.0
    rounding = relative_change(precise, before)
    exact = max(EXACT, 10 * rounding)
    report = initializers.rescale(model, x)
    assert report.output_change < EXACT
    assert relative_change(before, outputs(model, x)) < exact
    rates = [(layer.rate_before, layer.rate_after) for layer in report.layers]
    assert log_variance([after for _, after in rates]) < log_variance([before for before, _ in rates])
    assert report.spread_after < 1.001 * report.spread_before  # the same, where the extreme layers cannot change
    if twin is not None:
        assert initializers.rescale(twin, x.double()).spread_after < 1.001
        assert report.powers_of_two or report.spread_after < 1.01 * apart
    elif not report.powers_of_two:  # what is left is what no scale can change that the network admits
        again = initializers.rescale(model, x)
        assert [layer.scale for layer in again.layers] == pytest.approx([1] * len(rates), rel=0.02)

    report = initializers.rescale(model, x, nonhomogeneous="scale")
    assert report.spread_after < (1.01 if rounding < 1e-5 else 4)  # gradients amplify rounding more than outputs
    assert relative_change(before, outputs(model, x)) < exact


def check_within(report, found):
    """Unit deviation and the mean that was asked for; a note in the report says where it cannot be."""
    assert [row.name for row in report.layers] == list(found)
    for row in report.layers:
        layer, mean, std = found[row.name]
        alive = (std > 0.5) | ("do not vary" not in row.note)
        assert alive.any()
        assert (std[alive] - 1).abs().max() < 1e-3, row.name
        if layer.fixed_bias is not None:
            assert "bias is computed" in row.note
        elif "keep their mean" in row.note:
            assert layer.bias is None
        else:
            target = 0.0 if layer.bias is None else BIAS
            assert (mean[alive] - target).abs().max() < 1e-3, row.name


LARGE = ("efficientnet_b0", "googlenet", "mobilenet_v3_small", "regnet_y_400mf", "swin_v2_t", "vit_b_32")
CASES = [
    pytest.param(name, filters, marks=pytest.mark.slow if filters == "kmeans" and name in LARGE else ())
    for name in NETWORKS
    for filters in FILTERS
]


@pytest.mark.parametrize(("name", "filters"), CASES)
def test_networks_of_all_kinds(name, filters):
    torch.manual_seed(0)
    x = images(16, 32 if name in ("googlenet", "inception_v3", "resnet18", "vgg11") else 64)
    check(NETWORKS[name](num_classes=10), x, filters, name.startswith(EQUAL))


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("name", ALL)
def test_all_networks(name, filters):
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"image_size": image_size(name)} if name in VITS else {}
    model = models.get_model(name, weights=None, **options)
    check(model, images(16, image_size(name)), filters, name.startswith(EQUAL))
