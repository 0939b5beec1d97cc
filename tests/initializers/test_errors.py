"""Every error names what is wrong and the remedy, and leaves the model exactly as it was."""

import copy
import math

import pytest
import torch
from torch import nn

from initializers import (
    InitializationError,
    caffe,
    change_rate,
    gaussian,
    initialize,
    lsuv,
    msra,
    rescale,
    torch_default,
    xavier,
)

WITH_IMAGES = (initialize, rescale, change_rate, lsuv)
WITHOUT_IMAGES = (caffe, gaussian, msra, torch_default, xavier)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture
def images():
    return torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    model[1].eval()
    return model


def check(message, call, model, *args, **options):
    """`call(model, ...)` fails with the message, and changes neither the model nor the random state."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags, random = [module.training for module in model.modules()], torch.get_rng_state()
    with pytest.raises(InitializationError, match=f"^{message}"):
        call(model, *args, **options)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0, equal_nan=True)
    assert flags == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def spoil(images, value):
    images[7, 1, 2, 3] = value
    return images


@pytest.mark.parametrize("call", WITH_IMAGES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda images: images.byte(), "images are torch.uint8: pass float images"),
        (lambda images: images[:0], r"images have shape \(0, 3, 9, 9\): expected .* at least one image"),
        (lambda images: images[:, 0, 0, 0], r"images have shape \(40,\): expected \(N, ...\)"),
        (lambda images: iter([]), "images is empty: pass"),
        (lambda images: 3.0, "images is a float: pass"),
        (lambda images: ["a.jpg"], r"a batch of type str holds no tensor: yield tensors or \(input, ...\)"),
        (lambda images: images.numpy(), "a batch of type ndarray holds no tensor"),
        (
            lambda images: [images, images[..., 1:]],
            r"the batches hold images of different shapes \[\(3, 9, 8\), \(3, 9, 9\)\]: resize",
        ),
        (lambda images: spoil(images, math.nan), "images hold NaN or Inf: check"),
        (lambda images: [images[:3], spoil(images, -math.inf)], "images hold NaN or Inf: check"),
        (lambda images: 0 * images, "images have no variance .*black.*: pass real images"),
        (
            lambda images: 0 * images - torch.tensor([104.00699, 116.66877, 122.67892]).view(3, 1, 1),
            "images have no variance",
        ),
        (lambda images: images[:, :2], r"the model rejects images of shape \(\d+, 2, 9, 9\): .*3"),
        (lambda images: images[..., :8], r"the model rejects images of shape \(\d+, 3, 9, 8\): .*shapes"),
    ],
)
def test_images(call, bad, message, model, images):
    check(message, call, model, bad(images))


@pytest.mark.parametrize("call", WITH_IMAGES)
@pytest.mark.parametrize(
    ("parameter", "value"), [("0.weight", math.nan), ("3.weight", math.inf), ("6.bias", -math.inf)]
)
def test_weights_that_are_not_finite(call, parameter, value, model, images):
    model.get_parameter(parameter).data[1] = value
    check(f"layer {parameter[0]}: its weights hold NaN or Inf; initialize or load", call, model, images)


@pytest.mark.parametrize("call", [*WITH_IMAGES, *WITHOUT_IMAGES])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ConvTranspose2d(3, 5, 3), "layer deep.0: ConvTranspose2d is not supported, only Conv2d and Linear"),
        (nn.Conv1d(3, 5, 3), "layer deep.0: Conv1d is not supported"),
        (nn.MultiheadAttention(4, 2), "layer deep.0: MultiheadAttention is not supported"),
    ],
)
def test_layers_that_are_not_supported(call, layer, message, model, images):
    model.add_module("deep", nn.Sequential(layer))
    model.caffe_fillers = {}
    check(message, call, model, *[images] * (call in WITH_IMAGES))


@pytest.mark.parametrize("call", [*WITH_IMAGES, *WITHOUT_IMAGES])
def test_nothing_to_initialize(call, images):
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    model.caffe_fillers = {}
    check(
        "the model has no affine layer .*: there is nothing to initialize",
        call,
        model,
        *[images] * (call in WITH_IMAGES),
    )


@pytest.mark.parametrize("call", WITH_IMAGES)
@pytest.mark.parametrize("head", [lambda x: (x, x), lambda x: x.mean(), lambda x: x.flatten()])
def test_models_without_one_row_an_image(call, head, model, images):
    model.append(Call(head))
    check("the model must return one tensor with a row per image; wrap", call, model, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": "k-means"}, "unknown filters 'k-means': choose one of gaussian, pca, zca, kmeans, patches, orth"),
        ({"method": "exact", "between": False}, "unknown method 'exact': choose one of balance, paper"),
    ],
)
def test_unknown_names(options, message, model, images):
    check(message, initialize, model, images, **options)


@pytest.mark.parametrize("between", [True, False])
def test_a_channel_that_never_varies(between, model, images):
    model[3].weight.data[2] = 0
    check(
        "layer 3: output channel 2 has zero variance on 40 image.*; pass",
        initialize,
        model,
        images,
        None,
        between=between,
    )


@pytest.mark.parametrize("filters", ["kmeans", "gaussian"])
def test_an_input_that_is_always_zero(filters, model, images):
    model[4] = Call(lambda x: x.clamp(max=-1e9) + 1e9)
    check("layer 6: output channel 0 has zero variance", initialize, model, images, filters)
    model[2] = Call(lambda x: 0 * x)
    message = "the layer's input has no variance: pass" if filters == "kmeans" else "output channel 0 has zero variance"
    check(f"layer 3: {message}", initialize, model, images, filters)


def test_one_image_cannot_vary(model, images):
    check(
        "layer 6: output channel 0 has zero variance on 1 image.*; pass more", initialize, model, images[:1], "gaussian"
    )


def test_values_that_overflow(model, images):
    model[1].running_var[3] = math.nan
    check("layer 3: its output holds NaN or Inf; check the weights before it", initialize, model, images)
    check("layer 3: its output has variance nan", lsuv, model, images)


@pytest.mark.parametrize("call", [change_rate, rescale])
def test_weights_that_are_all_zero(call, model, images):
    nn.init.zeros_(model[3].weight)
    check("layer 3: its weights are all zero, so it has no change rate; initialize it", call, model, images)


def test_layers_that_cannot_be_balanced(model, images):
    check("the output or its gradient overflows: normalise the images, or", rescale, model, 1e25 * images)
    check(
        "the output or its gradient overflows", rescale, nn.Sequential(Call(lambda x: 1e30 * x), model), 1e10 * images
    )
    nn.init.constant_(model[3].bias, -1e9)
    check("layer 0: no gradient reaches its weights on these images; initialize it", rescale, model, images)
    model.append(model[6])
    check("layer 6 is used twice.*pass between=False", rescale, model, images)


def test_a_layer_that_the_output_ignores(model, images):
    model[2] = Call(torch.ones_like)
    check("layer 0: the output of the model does not depend on it", change_rate, model, images)


@pytest.mark.parametrize(("call", "passes"), [(lsuv, 0), (initialize, 0), (initialize, 1), (rescale, 1)])
def test_an_interrupt(call, passes, model, images):
    """In the first pass, or in the one that measures the balanced network."""
    nn.init.uniform_(model[1].running_mean)
    before, images = copy.deepcopy(model.state_dict()), images[:16]
    calls = iter(range(passes))

    def interrupt(module, args):
        if next(calls, None) is None:
            raise KeyboardInterrupt

    model[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
