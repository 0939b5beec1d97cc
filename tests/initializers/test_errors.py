"""Every error names what is wrong and the remedy, and leaves the model exactly as it was."""

import copy
import math
import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

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
from initializers._filters import Filters
from initializers._layer import channel_statistics
from initializers._layers import ALL_COMPUTED, EXPORTED, NO_LAYER

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


def state(model):
    """All that an initialization may change, to be compared bit by bit."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    constants = [getattr(m, name) for m in model.modules() for name in ("eps", "alpha") if hasattr(m, name)]
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    return tensors, [id(parameter) for parameter in model.parameters()], constants, modules, torch.get_rng_state()


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        torch.testing.assert_close(tensor, after[0][name], rtol=0, atol=0, equal_nan=True)
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])


def check(message, call, model, *args, **options):
    """`call(model, ...)` fails with the message, and changes neither the model nor the random state."""
    before = state(model)
    with pytest.raises(InitializationError, match=f"^{message}"):
        call(model, *args, **options)
    assert_same(before, state(model))
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
        (lambda images: ["a.jpg"], r"a batch of type str holds no tensor: yield tensors, .* or \(input, ...\)"),
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
    check(f"parameter {parameter} holds NaN or Inf; initialize or load it again", call, model, images)


@pytest.mark.parametrize("call", WITH_IMAGES)
def test_inputs_of_different_lengths(call, model, images):
    check("the inputs have 40, 39 rows: pass as many", call, model, (images, images[1:]))


class Computed(nn.Module):
    """Its weight is no parameter but is computed from one."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(5, 3))

    def forward(self, x):
        return nn.functional.linear(x.mean((2, 3)), self.logits.softmax(1))


class Fixed(nn.Module):
    """Its weight is a buffer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("directions", torch.randn(5, 3))

    def forward(self, x):
        return nn.functional.linear(self.norm(x).mean((2, 3)), self.directions)


@pytest.mark.parametrize("call", WITH_IMAGES)
def test_nothing_to_initialize(call, images):
    check("the model has no parameters: there is nothing to init", call, nn.Sequential(nn.ReLU(), nn.Flatten()), images)
    unused = nn.Sequential(nn.BatchNorm2d(3))
    unused.hidden = nn.ModuleList([nn.Linear(3, 3)])
    unused.forward = lambda x: unused[0](x)
    for model in (nn.Sequential(nn.BatchNorm2d(3)), unused, Fixed()):
        check(re.escape(NO_LAYER), call, model, images)
    check(re.escape(ALL_COMPUTED), call, Computed(), images)


@pytest.mark.parametrize("call", WITH_IMAGES)
def test_an_exported_program(call, model, images):
    rows = torch.export.Dim("rows")
    program = torch.export.export(model.eval(), (images[:2],), dynamic_shapes=({0: rows},))
    with pytest.raises(InitializationError, match=re.escape(EXPORTED)):
        call(program.module(), images)


@pytest.mark.parametrize("call", WITHOUT_IMAGES)
def test_nothing_to_fill(call):
    for model in (nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Sequential(nn.BatchNorm2d(3)), Computed()):
        model.caffe_fillers = {}
        check(re.escape(NO_LAYER), call, model)


@pytest.mark.parametrize("call", WITH_IMAGES)
@pytest.mark.parametrize(
    "head",
    [
        lambda x: x.mean(),
        lambda x: x.flatten(),
        lambda x: x[1:],
        lambda x: x.T,
        lambda x: x.argmax(1),
        lambda x: None,
        lambda x: [],
    ],
    ids=["scalar", "flat", "fewer", "turned", "integers", "none", "empty"],
)
def test_models_without_one_row_an_image(call, head, model, images):
    model.append(Call(head))
    check(
        "the model returns a .* of which nothing has a row per image; wrap the model in a module", call, model, images
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": "k-means"}, "unknown filters 'k-means': choose one of gaussian, pca, zca, kmeans, patches, orth"),
        ({"method": "exact", "between": False}, "unknown method 'exact': choose one of balance, paper"),
        ({"nonhomogeneous": "keep"}, "unknown nonhomogeneous 'keep': choose one of pin, scale"),
        ({"lrn": "exactly"}, "unknown lrn 'exactly': choose one of estimate, exact"),
        ({"rate_images": 0}, "rate_images is 0: pass at least 1"),
    ],
)
def test_options_that_cannot_be(options, message, model, images):
    check(message, initialize, model, images, **options)
    if "filters" not in options and "between" not in options:
        check(message, rescale, model, images, **options)


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


@pytest.fixture
def grouped(model):
    """The second convolution in four groups of two inputs and three outputs."""
    model[3] = nn.Conv2d(8, 12, 3, groups=4)
    model[6] = nn.Linear(48, 5)
    return model


@pytest.mark.parametrize("filters", ["kmeans", "gaussian", None])
def test_groups_whose_inputs_are_dead(filters, grouped, images):
    """They are no error: one dead channel in thousands would be enough to stop a depthwise network."""
    alive = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0]).view(-1, 1, 1)
    grouped[2] = Call(lambda x: x.relu() * alive)
    before = grouped[3].weight.clone()
    row = initialize(grouped, images, filters).layers[1]
    note = "2 of 4 groups do not vary and keep their scale"
    if filters == "kmeans":
        note = f"Gaussian filters in 2 of 4 groups, whose input does not vary; {note}"
    assert (row.filters, row.note) == (filters, note)
    initialize(grouped, images, filters, between=False)
    outputs = grouped[:4](images).detach().transpose(0, 1).flatten(1)
    expected = torch.tensor([1.0, 0, 1, 0]).repeat_interleave(3)
    torch.testing.assert_close(outputs.std(1, correction=0), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.mean(1), torch.full((12,), 0.1), atol=1e-4, rtol=0)
    dead = grouped[3].weight.detach().unflatten(0, (4, 3))[[1, 3]]
    if filters is None:  # the between-layer step scaled all of them alike
        ratio = dead / before.unflatten(0, (4, 3))[[1, 3]]
        torch.testing.assert_close(ratio, ratio[0, 0, 0, 0, 0].expand_as(ratio))
    else:
        assert dead.std().item() == pytest.approx(0.01, rel=0.3)


def test_groups_that_are_not_excused(grouped, images):
    """A flat channel in a group that varies, and groups that are all flat, show that something is wrong."""
    grouped[3].weight.data[4] = 0
    message = "layer 3: output channel 4 has zero variance on 40 image.*; pass more"
    check(message, initialize, grouped, images, None)
    grouped[3].weight.data[6:9] = 0
    check(message, initialize, grouped, images, None)  # a whole group besides
    grouped[3].weight.data.zero_()
    report = initialize(grouped, images, None, between=False)
    assert [row.note for row in report.layers if row.name == "3"] == ["its weights are all 0 and stay so"]


def test_one_image_cannot_vary(model, images):
    check(
        "layer 6: output channel 0 has zero variance on 1 image.*; pass more", initialize, model, images[:1], "gaussian"
    )


def test_values_that_are_no_numbers(model, images):
    model[1].running_var[3] = math.nan
    message = r"layer 3: its input holds NaN or Inf; check what the model computes before it \(running"
    for call in WITH_IMAGES:
        check(message, call, model, images)
    for filters in (*get_args(Filters), None):
        check(message, initialize, model, images, filters, between=False)


def test_values_that_overflow_in_a_layer(model, images):
    with torch.no_grad():
        model[3].weight[2] = 3e38
        images *= 1e10
    message = "layer 3: its output overflows: normalise the images, or check its weights"
    check(message, initialize, model, images, None, between=False)


def test_images_that_are_too_small_for_what_comes_before_a_layer():
    """As a grid of coordinates from -1 to 1, of one pixel."""

    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)

        def forward(self, x):
            x = F.relu(self.conv(x))
            places = torch.arange(x.shape[-1]) / (x.shape[-1] - 1)
            return self.head((x * places).mean((2, 3)))

    images = torch.randn(16, 3, 4, 4)
    for call in WITH_IMAGES:
        check("layer head: its input holds NaN or Inf; .* the images have the size", call, Grid(), images)


def test_layers_that_cannot_be_balanced(model, images):
    overflow = 'the output or its gradient overflows: normalise the images, .*, use filters="kmeans", or float64'
    large = copy.deepcopy(model)
    large[6].weight.data *= 1e20
    check(overflow, rescale, large, 1e30 * images)
    before = nn.Sequential(Call(lambda x: 1e30 * x), model)
    check("layer 1.0: its input holds NaN or Inf", rescale, before, 1e10 * images)
    nn.init.constant_(model[3].bias, -1e9)
    nn.init.zeros_(model[6].weight)
    for options in ({}, {"nonhomogeneous": "scale"}):
        check("no layer learns: on these images no gradient reaches", rescale, model, images, **options)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize")
def test_a_head_that_is_quantized_keeps_gradients_out(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(InitializationError, match=r"no layer learns: .*, or pass between=False where a part has no"):
        initialize(model, images)
    assert initialize(model, images, between=False).layers[0].std_after == pytest.approx(1, abs=1e-3)


def test_a_layer_that_the_output_ignores(model, images):
    model[6] = Call(torch.ones_like)
    for call in (change_rate, rescale):
        check("the output of the model does not depend on the weights of its layers", call, model, images)


@pytest.mark.parametrize("cut", [torch.Tensor.detach, torch.no_grad()(lambda x: x * 2)], ids=["detached", "no_grad"])
def test_an_output_without_a_gradient(model, images, cut):
    """As of a model that quantizes, or of reversible blocks. Following the remedy works."""
    model.append(Call(cut))
    for call in (change_rate, rescale):
        check(".*or has no gradient .*: pass between=False, or training=True where", call, model, images)
    assert initialize(model, images, between=False).layers[-1].std_after == pytest.approx(1)
    model[-1] = Call(lambda x: x if model.training else x.detach())
    assert rescale(model, images, training=True).spread_after < 1.01


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("call", [*WITH_IMAGES, *(lambda model, _, fill=fill: fill(model) for fill in WITHOUT_IMAGES)])
def test_a_model_that_is_sharded(call, ran, one_process, model, images):
    """Once it has run its parameters look like any others, until the next pass replaces them."""
    model.caffe_fillers = dict.fromkeys("036", (0.01, 0.0))
    fully_shard(model)
    if ran:
        model.eval()(images)
    with pytest.raises(InitializationError, match=r"the model is sharded \(FSDPModule\): initialize it before"):
        call(model, images)


def test_a_model_with_a_layer_that_is_sharded(one_process, model, images):
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"6": ColwiseParallel()})
    with pytest.raises(InitializationError, match=r"the model is sharded \(DTensor\): initialize it before"):
        initialize(model, images)


class WrongSize(Exception):
    """Of the model's own."""


def too_small(x):
    raise WrongSize(f"{x.shape[-1]} pixels are too few")


def asserting(x):
    raise AssertionError


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (too_small, "4 pixels are too few"),
        (asserting, "AssertionError"),
        (lambda x: x[..., :: 3 // (x.shape[-1] // 8)], "integer .*by zero"),
    ],
)
def test_a_model_that_raises_what_it_likes(model, images, function, reason):
    model[2] = Call(function)
    for call in WITH_IMAGES:
        check(rf"the model rejects images of shape \(\d+, 3, 9, 9\): {reason}", call, model, images)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


class Unprepared(NoGradient):
    """As blocks that recompute in the backward pass what only training keeps."""

    @staticmethod
    def backward(ctx, gradient):
        torch.set_rng_state(None)


@pytest.mark.parametrize(("function", "reason"), [(NoGradient, "You must "), (Unprepared, "expected a torch.ByteT")])
def test_a_gradient_that_fails(model, images, function, reason):
    model[2] = Call(function.apply)
    message = f"change rates need the gradient of the model's output, which fails: {reason}.* pass between=False"
    for call in (change_rate, rescale):
        check(message, call, model, images)


class NoMemory(NoGradient):
    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")


def no_memory(x):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("function", [no_memory, NoMemory.apply])
def test_too_little_memory_is_not_the_fault_of_the_model(model, images, function):
    model[2] = Call(function)
    before = state(model)
    for call in (initialize, change_rate):
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):
            call(model, images)
        assert_same(before, state(model))


@pytest.fixture
def constants(model):
    """The model with normalisations whose constants may be scaled."""
    return nn.Sequential(*model[:3], nn.GroupNorm(2, 8), nn.LocalResponseNorm(3), *model[3:])


def interrupted(call, model, at, monkeypatch):
    """Run `call` with an interrupt at the given forward pass or statistics of a layer; whether it came to that."""
    count = 0

    def interrupt(*_):
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt

    def statistics(*args):
        interrupt()
        return channel_statistics(*args)

    hook = model[-2].register_forward_hook(interrupt)
    monkeypatch.setattr("initializers._within.channel_statistics", statistics)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        hook.remove()
        monkeypatch.undo()
    return False


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (lsuv, {}),
        (initialize, {"lrn": "exact"}),
        (initialize, {"nonhomogeneous": "scale"}),
        (rescale, {"lrn": "exact"}),
        (rescale, {"lrn": "estimate"}),
        (rescale, {"method": "paper", "lrn": "exact"}),
        (rescale, {"nonhomogeneous": "scale"}),
    ],
)
def test_an_interrupt(call, options, constants, images, monkeypatch):
    """Wherever it comes."""
    nn.init.uniform_(constants[1].running_mean)
    before, at = state(constants), 1
    while interrupted(lambda: call(constants, images[:6], **options), constants, at, monkeypatch):
        assert_same(before, state(constants))
        at += 1
    assert at > 2
    after = state(constants)[0]
    assert any(name not in after or not torch.equal(tensor, after[name]) for name, tensor in before[0].items())
