"""The between-layer step: which scales are free, that any of them keep the function, and that the best are taken."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align, roi_pool

from experiments.networks.caffenet import CaffeNet
from initializers import InitializationError, initialize, rescale
from initializers._layers import Layers
from initializers._propagate import propagate
from initializers._rates import usable_rates
from initializers._record import record
from initializers._scales import Norm, Scales, _least_squares, _scale_norm
from initializers._weight_norm import unnormalised


class Parts(nn.Module):
    """A first convolution, `function` of whatever parts it needs and of that convolution's output, a last layer."""

    def __init__(self, function, **more):
        super().__init__()
        self.function = function
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.no_bias = nn.Conv2d(4, 4, 1, bias=False)
        self.wide = nn.Conv2d(8, 4, 1)
        self.fc, self.fd = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn, self.bn8 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.square = nn.Parameter(torch.ones(4, 4))
        self.vector = nn.Parameter(torch.ones(4))
        self.position = nn.Parameter(torch.ones(4, 6, 6))
        self.register_buffer("shift", torch.ones(4, 1, 1))
        self.register_buffer("kernel", torch.ones(4, 1, 3, 3))
        self.register_buffer("mixing", torch.ones(4, 2, 2, 2))
        self.register_buffer("matrix", torch.ones(5, 4))
        self.register_buffer("turn", torch.ones(2, 3))
        for name, part in more.items():
            setattr(self, name, part)
        self.top = nn.LazyLinear(3)

    def forward(self, x):
        return self.top(self.function(self, self.stem(x)).flatten(1))


def build(function, **more):
    """The model in float64, every parameter and statistic of it random, layers of different sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Parts(function, **{name: make() for name, make in more.items()}).double().eval()
        model(draw(0, 2))
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data.normal_().mul_(0.3 + torch.rand(()))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2)
    return model


def draw(seed, count=6):
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FRESH = draw(9, 5)  # images that no initialization sees


def distance(one, other):
    """Relative distance of outputs, or of lists of them."""
    one, other = (torch.cat([x.flatten() for x in ([y] if isinstance(y, torch.Tensor) else y)]) for y in (one, other))
    return ((one - other).norm() / other.norm()).item()


def scales_of(model, inputs, lrn="estimate"):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return propagate(record(Layers(model), inputs), lrn)


def free(model, inputs, lrn="estimate"):
    """Number of scales that can be chosen."""
    return scales_of(model, inputs, lrn).basis().shape[1]


@torch.no_grad()
def apply_any(model, inputs, lrn="estimate", seed=0):
    """Change all scales that can be chosen, at random."""
    with unnormalised(model):
        scales = scales_of(model, inputs, lrn)
        basis = scales.basis()
        generator = torch.Generator().manual_seed(seed)
        scales.apply(basis @ torch.randn(basis.shape[1], dtype=torch.float64, generator=generator))


@torch.no_grad()
def check(make, number, images=None, lrn="estimate", tolerance=1e-10):
    """Any choice of the free scales, and the best, leave the function as it is, on all images."""
    images = draw(1) if images is None else images
    model = make()
    expected = model(FRESH), model(images)
    assert free(model, images, lrn) == number
    apply_any(model, images, lrn)
    for output, target in zip((model(FRESH), model(images)), expected, strict=True):
        assert distance(output, target) < tolerance
    model = make()
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.enable_grad():
        report = rescale(model, images, lrn=lrn)
    assert not report.powers_of_two
    assert report.output_change < tolerance
    for output, target in zip((model(FRESH), model(images)), expected, strict=True):
        assert distance(output, target) < tolerance
    moved = any(not torch.allclose(new, old) for new, old in zip(model.parameters(), before, strict=True))
    assert moved == (number > 0)
    logs = [np.log([getattr(row, f"rate_{when}") for row in report.layers]) for when in ("before", "after")]
    assert logs[1].var() < logs[0].var() - 1e-6 if moved else report.spread_after == report.spread_before
    return report


def tokens(x):
    """(N, positions, channels)"""
    return x.flatten(2).mT


def regions(x):
    """A box on each image, (N, 5)"""
    number = torch.arange(len(x), dtype=x.dtype).unsqueeze(1)
    return torch.cat([number, torch.tensor([[0.0, 1, 4, 5]], dtype=x.dtype).expand(len(x), 4)], 1)


def pooled(x):
    """(N, channels)"""
    return x.mean((2, 3))


# What is between two layers, and whether the scale of the first is free.
CARRIES = {
    "nothing": lambda m, x: x,
    "F.relu": lambda m, x: F.relu(x),
    "in place": lambda m, x: F.relu_(x),
    "method relu": lambda m, x: torch.relu(x).relu(),
    "leaky": lambda m, x: F.leaky_relu(x, 0.2, inplace=True),
    "prelu": lambda m, x: F.prelu(x, m.vector),
    "abs, neg": lambda m, x: -x.abs(),
    "clamp": lambda m, x: x.clamp(min=0).clamp_min_(0.0),
    "max pool": lambda m, x: F.max_pool2d(x, 3, stride=2, ceil_mode=True),
    "avg pool": lambda m, x: F.avg_pool2d(x, 3, padding=1),
    "lp pool": lambda m, x: F.lp_pool2d(x, 2.0, 2),
    "pool over positions": lambda m, x: F.max_pool1d(x.flatten(2), 3),
    "dropout": lambda m, x: F.dropout2d(F.dropout(x, 0.5, training=False), training=False),
    "regions": lambda m, x: roi_pool(x, regions(x), 3) + roi_align(x, regions(x), 3),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(F.adaptive_max_pool2d(x, 5), 4),
    "flatten": lambda m, x: torch.flatten(x, 1),
    "view": lambda m, x: x.contiguous().view(x.size(0), -1),
    "reshape": lambda m, x: torch.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])),
    "mean": lambda m, x: torch.mean(x, (2, 3)),
    "method sum": lambda m, x: x.sum(dim=1, keepdim=True),
    "largest": lambda m, x: x.amax((-2, -1)),
    "difference to the mean": lambda m, x: x - x.mean(1, keepdim=True),
    "constant factors": lambda m, x: 2 * (x * m.shift) / 3,
    "zero added": lambda m, x: sum([x, x]) - 0.0,
    "upsampling": lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "pixel shuffle": lambda m, x: F.pixel_shuffle(x, 2),
    "unfold": lambda m, x: F.unfold(x, 3, padding=1),
    "windows": lambda m, x: x.unfold(2, 3, 1).unfold(3, 3, 2),
    "padding": lambda m, x: F.pad(x, (1, 2, 0, 1)),
    "padding for a maximum": lambda m, x: F.max_pool2d(F.pad(x, (1, 1, 0, 2), value=-torch.inf), 3),
    "reflection": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "iteration": lambda m, x: torch.stack([2 * channel for channel in x.transpose(0, 1)], 1),
    "modules": nn.Sequential(nn.ReLU(inplace=True), nn.LeakyReLU(0.3), nn.Dropout(), nn.Identity(), nn.MaxPool2d(2)),
    "checkpoint": lambda m, x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False),
    "rolled, flipped": lambda m, x: x.roll(1, 1).flip(3)[:, [2, 0, 1]],
    "matrix product": lambda m, x: turned(x) @ x,
    "square": lambda m, x: x * x,
    "powers": lambda m, x: (x.abs().sqrt() * x).square() * x.abs().rsqrt().reciprocal(),
    "exponents": lambda m, x: (
        ((x**2 + x.pow(2)).sum(1, keepdim=True) ** 0.5).pow(3) * (x.abs() ** 3) ** (-1 / 3) * x**-1
    ),
    "quotient": lambda m, x: x * x / F.relu(x).sum((1, 2, 3), keepdim=True),
    "unit length": lambda m, x: F.normalize(x, dim=1),
    "gating by a gate that is pinned": lambda m, x: x * torch.sigmoid(F.normalize(x, dim=1)),
    "a function of its own": lambda m, x: Square.apply(x),
    "a choice by sign": lambda m, x: torch.where(x > 0, x, 0.1 * x) + x.where(x >= 0, torch.zeros_like(x)),
    "a product with a mask": lambda m, x: x * (x >= 0) + x * torch.sign(x) + x * (x < torch.zeros(())).to(x.dtype),
    "a mask that is filled": lambda m, x: x.masked_fill(x < 0, 0.0) - x.clone().masked_fill_(x.gt(0), 0),
    "clip, threshold": lambda m, x: x.clip(min=0) + F.threshold(x, 0, 0),
    "larger of two": lambda m, x: torch.max(x, 0.2 * x) + torch.min(x, torch.zeros_like(x)),
    "maxout": lambda m, x: (
        x.unflatten(1, (2, 2)).max(2)[0] + x.unflatten(1, (2, 2)).min(dim=2, keepdim=True).values[:, :, 0]
    ),
    "over the largest": lambda m, x: x * x / x.max(),
    "deviation": lambda m, x: x - x.std((2, 3), keepdim=True),
    "norm": lambda m, x: x * x.norm(dim=1, keepdim=True) / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True),
    "blur": lambda m, x: F.conv2d(x, m.kernel, padding=1, groups=4),
    "turned by a constant": lambda m, x: F.linear(F.conv_transpose2d(x, m.mixing, groups=2).movedim(1, -1), m.matrix),
    "sampled": lambda m, x: F.grid_sample(
        x, F.affine_grid(m.turn.expand(len(x), 2, 3), x.shape, align_corners=False), align_corners=False
    ),
    "triangle": lambda m, x: x.tril().nan_to_num(),
    "into zeros": lambda m, x: written(torch.zeros_like(x), x),
    "into new zeros": lambda m, x: written(torch.zeros(len(x), 4, 6, 6, dtype=x.dtype), x),
    "into memory": lambda m, x: written(x.new_empty(x.shape), x),
    "gathered": lambda m, x: (
        x[:, :, :4].gather(1, order(x, 1)[:, :, :4]) + torch.take_along_dim(x, order(x, 2)[:, :, :4], 2)
    ),
    "the largest, by its place": lambda m, x: (
        x.flatten(1).gather(1, x.flatten(1).argmax(1, keepdim=True))
        + x.take_along_dim(x.argmin(2, True), 2).mean((2, 3))
    ),
    "ordered": lambda m, x: x.sort(1)[0] + torch.topk(x, 4, dim=1).values,
    "added up by an index": lambda m, x: (
        torch.zeros_like(x).index_add(2, torch.tensor([0, 0, 1, 5, 2, 2]), x)
        + x.new_zeros(x.shape).scatter_add_(3, order(x, 3), x)
        + torch.zeros_like(x).scatter_reduce(1, order(x, 1), x, "mean")
    ),
    "copied to an index": lambda m, x: (
        x.index_copy(1, torch.tensor([2, 0]), x[:, :2]) + x.scatter(1, order(x, 1)[:, :2, :3], x[:, 2:, :3])
    ),
    "running sum": lambda m, x: torch.cumsum(x, 2).diff(dim=3),
    "between two": lambda m, x: torch.lerp(x, x.flip(1), 0.3),
    "unpooled": lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "windows added up": lambda m, x: F.fold(F.unfold(x, (3, 2), (1, 2), (1, 0)), (6, 6), (3, 2), (1, 2), (1, 0)),
    "einsum": lambda m, x: torch.einsum("n c h w, h k -> n w c k", x, turned(x)),
    "einsum with an ellipsis": lambda m, x: torch.einsum("...hw,kh->...kw", [x, turned(x)]),
    "einsum of two": lambda m, x: torch.einsum("nchw,ndhw->ncd", x, x),
    "spectrum": lambda m, x: (
        torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho")[..., :3], s=x.shape[-2:])
        + torch.fft.ifft(torch.fft.fft(x, dim=1).conj() * 1j, 5, 1)[:, :4].real
    ),
    "numbers of two parts": lambda m, x: (
        torch.view_as_real(torch.fft.fftshift(torch.fft.fftn(x, dim=(1, 2)), dim=1)).mean(-1)
        + torch.view_as_complex(x.unflatten(3, (3, 2))).abs().sum(3, keepdim=True)
    ),
    "turned by its phase": lambda m, x: x * torch.fft.fft2(x).angle().cos(),
    "constants of a shape": lambda m, x: x * torch.ones_like(x) * torch.full_like(x, 3.0),
}
PINS = {
    "gelu": lambda m, x: F.gelu(x),
    "sigmoid": lambda m, x: torch.sigmoid(x),
    "method tanh": lambda m, x: x.tanh(),
    "in place": lambda m, x: x.sigmoid_(),
    "shift": lambda m, x: F.relu(x) + 1,
    "constant": lambda m, x: x - torch.ones(4, 1, 1),
    "buffer": lambda m, x: x - m.shift,
    "power": lambda m, x: (x**2 + 1).sqrt(),
    "exponent of no simple ratio": lambda m, x: x.abs() ** 0.123,
    "exponent 0": lambda m, x: x + x**0,
    "exponents of each": lambda m, x: x.abs() ** m.shift,
    "clamp": lambda m, x: F.relu(x).clamp(max=1.0),
    "softmax": lambda m, x: F.softmax(x, 1),
    "silu": nn.SiLU(),
    "softplus": nn.Sequential(nn.ReLU(), nn.Softplus(), nn.ReLU()),
    "relu6": nn.ReLU6(),
    "padding with ones": lambda m, x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "ramp added": lambda m, x: x + torch.arange(6),
    "batch statistics": nn.BatchNorm2d(4, track_running_stats=False, dtype=torch.float64),
    "gating by itself": lambda m, x: x * torch.sigmoid(x),
    "functional layer norm": lambda m, x: F.layer_norm(x, (6, 6)),
    "vector of constants": lambda m, x: torch.ones(6, dtype=x.dtype) @ x,
    "index of the largest": lambda m, x: x + F.max_pool2d(x, 3, 1, 1, return_indices=True)[1] / 36,
    "place in an order": lambda m, x: x + x.sort(1).indices / 6,
    "place of the largest": lambda m, x: x + x.argmax(1, keepdim=True),
    "added to ones": lambda m, x: torch.ones_like(x).index_add(2, torch.tensor([0, 0, 1, 5, 2, 2]), x),
    "products by an index": lambda m, x: torch.ones_like(x).scatter_reduce(1, order(x, 1) // 2, x, "prod"),
    "a number written to an index": lambda m, x: x.scatter(1, order(x, 1)[:, :1], -0.5),
    "a value written to an index": lambda m, x: x.scatter(1, order(x, 1)[:, :1], value=0.5),
    "taken from all that is flat": lambda m, x: x + torch.take_along_dim(x, order(x, 1).flatten()[:6]),
    "copied next to ones": lambda m, x: torch.ones_like(x).scatter(1, order(x, 1)[:, :2], x[:, 2:]),
    "lstm": lambda m, x: m.part(tokens(x))[0],
    "a choice by size": lambda m, x: torch.where(x > 0.1, x, 0.0),
    "a mask filled with ones": lambda m, x: x.masked_fill(x < 0, 1.0),
    "threshold": lambda m, x: F.threshold(x, 0.1, 0.0),
    "blur with a bias": lambda m, x: F.conv2d(x, m.kernel, m.shift[:, 0, 0], padding=1, groups=4),
    "deviation with a constant": lambda m, x: x / (x.std((2, 3), keepdim=True) + 1e-5),
    "number of what is not zero": lambda m, x: x + F.relu(x).norm(0, dim=1, keepdim=True),
    "written through a view": lambda m, x: through_a_view(torch.zeros_like(x), x),
}


def turned(x):
    return torch.eye(6, dtype=x.dtype).roll(1, 0)


def order(x, dimension):
    """For each value of x an index along a dimension, which the values decide."""
    return x.detach().argsort(dimension)


def written(target, x):
    """Channels moved, into memory that was there."""
    target[:, 1:] = x[:, :-1]
    target[:, :1] = x[:, -1:]
    return target


def through_a_view(target, x):
    target[:, :2].add_(x[:, 2:])
    return target


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("kind", [*(f"carries {name}" for name in CARRIES), *(f"pins {name}" for name in PINS)])
def test_only_what_is_homogeneous_carries_the_scale(kind):
    carries, name = kind.startswith("carries"), kind.partition(" ")[2]
    function = (CARRIES if carries else PINS)[name]
    part = {"part": lambda: nn.LSTM(4, 4, batch_first=True)} if name == "lstm" else {}
    if isinstance(function, nn.Module):
        module = function.eval()
        function = lambda m, x: module(x)  # noqa: E731
    report = check(lambda: build(function, **part), int(carries))
    if carries:  # a chain: all rates become equal
        assert report.spread_after < 1 + 1e-5


def test_an_infinite_exponent_pins():
    """Without a rate, as its gradient is not finite."""
    assert free(build(lambda m, x: (0.5 * x.abs()) ** torch.inf), draw(1)) == 0


def shuffled(x):
    """ShuffleNet's channel shuffle."""
    return x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def cat(*parts, dim=1):
    return torch.cat(parts, dim)


def padded(x):
    """Four more channels, of zeros."""
    return F.pad(x, (0, 0, 0, 0, 0, 4))


def assigned(m, x):
    y = x.new_zeros(len(x), 8, 6, 6)
    y[:, :4] = x
    y[:, 4:] = m.a(x)
    return m.wide(y)


def overwritten(m, x):
    y = cat(m.a(x), m.b(x))
    y[:, 2:6] = m.c(x)
    return m.wide(y)


def in_place(m, x):
    y = m.a(x)
    y += m.b(x)
    y -= x
    y *= 2
    y /= 3
    y.add_(x, alpha=0.5).mul_(m.shift)
    return y


def squared(x):
    x *= x
    return x


def product_seen(m, x):
    """What changes in place is used by an earlier name, too."""
    y = m.a(x)
    half = y[:, :2]
    y.mul_(m.b(x))
    return m.wide(cat(y, half, half))


def slices_in_place(m, x):
    y = m.a(x)
    y[:, :2] += x[:, :2]
    y[:, 2:].mul_(2).neg_()
    y.unsqueeze_(1).squeeze_(1)
    return m.b(y)


def zeros_filled(m, x, first):
    """Zero channels, in which a value is written through a view that was taken first or after."""
    y = padded(x)
    if first:
        view = y[:, 4:]
        y[:, 4:].copy_(m.a(x))
        return m.wide(cat(view, m.b(x)) + cat(m.c(x), m.c(x)))
    y[:, 4:].add_(m.a(x))
    return m.wide(y + cat(m.b(x), m.c(x)))


def branches(m, x):
    """Inception in Inception: the scales of the branches are undone where a layer takes them."""
    inner = m.wide(cat(m.a(x), F.relu(m.b(x))))
    return cat(inner, x)


def cls(m, x):
    """A class token before the tokens, and a position embedding for all."""
    x = cat(m.vector.expand(len(x), 1, 4), tokens(x))
    return m.fc(x + m.square.repeat(10, 1)[:37])


def squeeze_and_excitation(m, x):
    gate = torch.sigmoid(m.fd(F.relu(m.fc(pooled(x)))))
    return m.a(x) * gate[..., None, None]


def attended(m, x):
    x = tokens(x)
    return F.scaled_dot_product_attention(m.fc(x), m.fd(x), F.linear(x, m.square))


# A network and the number of its free scales. One of them is the first layer's; the last layer's is pinned.
def chosen_places(m, x):
    """The positions of each image in an order of their own."""
    y = m.a(x).flatten(2).mT
    return y[torch.arange(len(y)).unsqueeze(1), y.mean(2).argsort(1)].mT.unflatten(2, (6, 6))


def assigned_to_places(m, x):
    """Half of the positions, which differ from image to image, are written into zeros."""
    y, rows = m.a(x).flatten(2).mT, torch.arange(len(x)).unsqueeze(1)
    places = y.mean(2).topk(18)[1]
    z = torch.zeros_like(y)
    z[rows, places] = y[rows, places]
    return (m.b(x).flatten(2).mT + z).mT.unflatten(2, (6, 6))


def assigned_by_mask(m, x):
    y = m.a(x).movedim(1, -1).contiguous()
    z = torch.zeros_like(y)
    z[...] = y
    z[y.mean(-1) > 0] = 0
    return m.b(x) + z.movedim(-1, 1)


NETWORKS = {
    "residual": (lambda m, x: x + m.b(F.relu(m.a(x))), 2),
    "residual everywhere": (lambda m, x: m.c(m.b(m.a(x) + x) + x), 2),
    "projected shortcut": (lambda m, x: m.a(x) + m.no_bias(x), 2),
    "the larger of two": (lambda m, x: torch.maximum(m.a(x), m.b(x)), 2),
    "concatenation": (lambda m, x: cat(x, m.a(x)), 2),
    "nested concatenation": (branches, 4),
    "concatenation of features": (lambda m, x: cat(x.flatten(1), pooled(m.a(x))), 2),
    "concatenation in one scale": (lambda m, x: cat(x, m.a(x)) + cat(m.b(x), x), 1),
    "stack": (lambda m, x: torch.stack([x, m.a(x)], 1), 2),
    "concatenation, BatchNorm": (lambda m, x: F.relu(m.bn8(cat(x, m.a(x)))), 3),
    "concatenation, GroupNorm": (lambda m, x: m.part(cat(x, m.a(x))), 2, {"part": lambda: nn.GroupNorm(2, 8)}),
    "concatenation, depthwise": (
        lambda m, x: m.part(cat(x, m.a(x))), 3, {"part": lambda: nn.Conv2d(8, 8, 3, groups=8)}),
    "concatenation, groups": (
        lambda m, x: m.part(cat(x[:, :3], m.a(x), x[:, 3:])), 3, {"part": lambda: nn.Conv2d(8, 6, 3, groups=2)}),
    "concatenation, pooling": (lambda m, x: m.wide(F.max_pool2d(cat(x, m.a(x)), 3, padding=1)), 3),
    "concatenation, pooled": (lambda m, x: pooled(F.avg_pool2d(cat(x, m.a(x)), 2)), 2),
    "concatenation of rows, pooling": (lambda m, x: F.max_pool2d(cat(x, m.a(x), dim=2), 4), 1),
    "concatenation, sum of channels": (lambda m, x: cat(x, m.a(x)).sum(1), 1),
    "concatenation, softmax": (lambda m, x: F.softmax(cat(x, m.a(x)), 1), 0),
    "concatenation, part of it pinned": (lambda m, x: cat(m.a(x), torch.sigmoid(m.b(x)[:, :1])), 2),
    "channel shuffle": (lambda m, x: m.wide(shuffled(cat(x, m.a(x)))), 3),
    "channel_shuffle": (lambda m, x: m.wide(F.channel_shuffle(cat(x, m.a(x)), 4)), 3),
    "shuffle of two": (lambda m, x: cat(*[m.b(y) for y in shuffled(cat(x, m.a(x))).chunk(2, 1)]), 3),
    "chunks": (lambda m, x: cat(m.a(x).chunk(2, 1)[0], x.split([1, 3], 1)[1]), 2),
    "the other half": (lambda m, x: m.b(cat(m.a(x), x)[:, 4:] + m.c(m.a(x))), 3),
    "indices": (lambda m, x: m.wide(cat(x, m.a(x))[:, torch.tensor([7, 0, 6, 1, 5, 2, 4, 3])]), 3),
    "index_select": (lambda m, x: m.a(x.index_select(1, torch.tensor([1, 1, 3, 0]))), 2),
    "roll, flip": (lambda m, x: m.wide(cat(x, m.a(x)).roll(3, 1).flip(1)), 3),
    "zero channels": (lambda m, x: m.wide(F.pad(x, (0, 0, 0, 0, 2, 2)) + cat(m.a(x), m.b(x))), 2),
    "zero channels, kept": (lambda m, x: m.wide(F.relu(padded(x))), 2),
    "zero channels, filled": (lambda m, x: zeros_filled(m, x, first=False), 2),
    "zero channels, filled, first a view": (lambda m, x: zeros_filled(m, x, first=True), 2),
    "gate": (squeeze_and_excitation, 3),
    "layer scale": (lambda m, x: x + m.gain * m.a(x), 2),
    "layer scale in the chain": (lambda m, x: m.a(x * m.gain), 3),
    "layer scale in place": (lambda m, x: m.a(x.mul_(m.gain)), 3),
    "addcmul": (lambda m, x: m.c(torch.addcmul(m.a(x), x, m.b(x), value=0.5)), 3),
    "addcmul with a gain": (lambda m, x: m.b(torch.addcmul(x, m.gain, m.a(x))), 3),
    "addcdiv": (lambda m, x: m.c(torch.addcdiv(m.a(x), m.b(x), x.exp())), 2),
    "addcmul in place": (lambda m, x: m.c(m.a(x).addcmul_(x, m.b(x))), 3),
    "product in place": (lambda m, x: m.c(m.a(x).mul_(m.b(x))), 4),
    "square in place": (lambda m, x: m.b(squared(m.a(x))), 3),
    "gate in place": (lambda m, x: m.c(m.a(x).sigmoid().mul_(m.b(x))), 3),
    "product in place, seen through a view": (product_seen, 3),
    "layer scale of concatenation": (
        lambda m, x: m.wide(cat(x, m.a(x)) * m.part), 4, {"part": lambda: nn.Parameter(torch.ones(8, 1, 1))}),
    "layer scale, viewed": (lambda m, x: m.a(x * m.gain.view(4, 1, 1)), 3),
    "layer scale twice": (lambda m, x: m.gain * m.a(x * m.gain), 2),
    "layer scale, added too": (lambda m, x: m.a(x) * m.position + m.position, 1),
    "one factor": (lambda m, x: x * m.part, 2, {"part": lambda: nn.Parameter(torch.ones(()))}),
    "position embedding": (lambda m, x: m.a(x + m.position), 2),
    "a filter of the spectrum": (
        lambda m, x: m.a(torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.part), s=(6, 6))), 3,
        {"part": lambda: nn.Parameter(torch.ones(4, 6, 4, 2))}),
    "filters of a spectrum": (
        lambda m, x: F.gelu(m.a(x) + torch.fft.irfft2(torch.einsum("nihw,iohw->nohw", torch.fft.rfft2(x), m.part))), 1,
        {"part": lambda: nn.Parameter(torch.ones(4, 4, 6, 4, dtype=torch.cdouble))}),
    "position embedding, negative": (lambda m, x: F.relu(m.position - x), 1),
    "embedding table": (lambda m, x: tokens(x) + m.part(torch.arange(36)), 0, {"part": lambda: nn.Embedding(36, 4)}),
    "class token": (cls, 2),
    "in place": (in_place, 1),
    "slices in place": (slices_in_place, 2),
    "assignment": (assigned, 3),
    "overwritten": (overwritten, 3),
    "chosen places": (chosen_places, 2),
    "chosen rows and columns": (
        lambda m, x: m.a(x)[..., x.mean((0, 1, 2)).argsort(), None][:, :, x.mean((0, 1, 3)).argsort(), :, 0], 2),
    "index_select, by values": (lambda m, x: m.a(x).index_select(2, x.mean((0, 1, 3)).argsort()), 2),
    "index_select of channels": (lambda m, x: cat(m.a(x), x).index_select(1, x.mean((0, 2, 3)).argsort()), 1),
    "assigned to chosen places": (assigned_to_places, 2),
    "zeros assigned by a mask": (assigned_by_mask, 2),
    "constants assigned": (lambda m, x: [x.__setitem__(x < 0, 1), m.a(x)][1], 1),
    "zeros assigned": (lambda m, x: [x.__setitem__(x < 0, 0), m.a(x)][1], 2),
    "shared layer": (lambda m, x: m.a(F.relu(m.a(x))), 1),
    "shared layer without bias": (lambda m, x: m.no_bias(F.relu(m.no_bias(x))), 2),
    "shared layer, branches": (lambda m, x: cat(m.a(x), m.a(m.b(x))), 2),
    "shared layer, concatenations": (lambda m, x: m.wide(cat(x, m.wide(cat(x, m.a(x))))), 2),
    "shared layer, two resolutions": (
        lambda m, x: cat(*[pooled(m.no_bias(y)) for y in (x, F.max_pool2d(m.a(x), 2))]), 3),
    "BatchNorm": (lambda m, x: m.bn(x), 2),
    "shared BatchNorm": (lambda m, x: m.bn(m.a(m.bn(x))), 2),
    "LayerNorm": (lambda m, x: m.a(m.part(x)), 3, {"part": lambda: nn.LayerNorm([6, 6])}),
    "LayerNorm without weight": (
        lambda m, x: m.a(m.part(x)), 2, {"part": lambda: nn.LayerNorm(6, elementwise_affine=False)}),
    "shared LayerNorm": (lambda m, x: m.part(m.a(m.part(x))), 2, {"part": lambda: nn.LayerNorm(6)}),
    "LayerNorm as a function": (
        lambda m, x: F.layer_norm(x, (6,), m.part.weight, m.part.bias), 1, {"part": lambda: nn.LayerNorm(6)}),
    "GroupNorm": (lambda m, x: m.part(x), 2, {"part": lambda: nn.GroupNorm(2, 4)}),
    "RMSNorm": (lambda m, x: m.part(x), 2, {"part": lambda: nn.RMSNorm(6, eps=0.1)}),
    "RMSNorm without eps": (lambda m, x: m.part(x), 1, {"part": lambda: nn.RMSNorm(6)}),
    "InstanceNorm": (lambda m, x: m.part(x), 2, {"part": lambda: nn.InstanceNorm2d(4, affine=True)}),
    "InstanceNorm with statistics": (
        lambda m, x: m.part(x), 0, {"part": lambda: nn.InstanceNorm2d(4, track_running_stats=True)}),
    "self-attention": (
        lambda m, x: m.part(*[tokens(x)] * 3)[0], 2, {"part": lambda: nn.MultiheadAttention(4, 2)}),
    "cross-attention": (
        lambda m, x: m.part(tokens(x), *[tokens(m.a(x))] * 2, need_weights=False)[0], 4,
        {"part": lambda: nn.MultiheadAttention(4, 2, batch_first=True)}),
    "attention of three": (
        lambda m, x: m.part(tokens(x), tokens(m.a(x)), tokens(m.b(x)))[0], 6,
        {"part": lambda: nn.MultiheadAttention(4, 2, batch_first=True, kdim=4, vdim=4)}),
    "one attention, two ways": (
        lambda m, x: m.part(*[y := tokens(x)] * 3)[0] + m.part(y, *[tokens(m.a(x))] * 2)[0], 1,
        {"part": lambda: nn.MultiheadAttention(4, 2, batch_first=True)}),
    "attention with added bias": (
        lambda m, x: m.part(*[tokens(x)] * 3)[0], 2,
        {"part": lambda: nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)}),
    "transformer": (
        lambda m, x: m.part(tokens(x)), 4,
        {"part": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True, norm_first=True)}),
    "transformer, GELU": (
        lambda m, x: m.part(tokens(x)), 3,
        {"part": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True, activation="gelu")}),
    "scaled_dot_product_attention": (attended, 3),
    "attention by einsum": (
        lambda m, x: torch.einsum(
            "n...ij,n...jd->n...id",
            torch.einsum("n c i d, n c j d -> n c i j", m.a(x), m.b(x)).softmax(-1), m.c(x)), 3),
    "attention by products": (lambda m, x: (m.a(x) @ m.b(x).mT).softmax(-1) @ m.c(x), 3),
    "softmax weights": (lambda m, x: F.softmax(m.a(x), -1) @ m.b(x), 2),
    "softmax weights, from the right": (lambda m, x: torch.matmul(m.b(x), F.softmax(m.a(x), -1)), 2),
    "product": (lambda m, x: m.a(x) @ m.b(x).mT, 3),
    "product of two": (lambda m, x: m.a(x) * m.b(x), 3),
    "product, added": (lambda m, x: m.a(x) * m.b(x) + x, 2),
    "product with zeros": (lambda m, x: F.pad(m.a(x), (1, 1)) * F.pad(m.b(x), (1, 1)), 3),
    "product of channels": (lambda m, x: cat(m.a(x), x) * cat(m.b(x), m.a(x)), 3),
    "quotient of two": (lambda m, x: m.a(x) / (m.b(x).square().sum((1, 2, 3), keepdim=True)), 3),
    "linear attention": (lambda m, x: tokens(m.a(x)) @ (tokens(m.b(x)).mT @ tokens(x)), 3),
    "transposed convolution": (
        lambda m, x: m.part(F.relu(x)), 2, {"part": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1)}),
    "transposed convolution, concatenation": (
        lambda m, x: m.part(cat(x[:, :3], m.a(x), x[:, 3:])), 3,
        {"part": lambda: nn.ConvTranspose2d(8, 6, 3, groups=2)}),
    "Conv1d": (
        lambda m, x: m.part(cat(x, m.a(x)).flatten(2)), 3,
        {"part": lambda: nn.Conv1d(8, 4, 3, padding=1, padding_mode="circular")}),
    "Conv3d": (
        lambda m, x: m.part(torch.stack([x, m.a(x)], 2)), 2, {"part": lambda: nn.Conv3d(4, 3, 2)}),
    "Conv3d over channels": (
        lambda m, x: m.part(torch.stack([x, m.a(x)], 1)), 3, {"part": lambda: nn.Conv3d(2, 3, 2)}),
    "functional": (lambda m, x: F.relu(F.linear(pooled(x), m.square, bias=m.vector)), 2),
    "functional, parts of a parameter": (
        lambda m, x: F.linear(F.linear(pooled(x), m.square[:2]), m.part[1:3].T.mT), 3,
        {"part": lambda: nn.Parameter(torch.ones(4, 2))}),
    "weight_norm": (
        lambda m, x: m.part(F.relu(x)), 2, {"part": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))}),
    "spectral_norm": (
        lambda m, x: m.a(m.part(x)), 2,
        {"part": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1, bias=False))}),
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_scales_keep_the_function(network):
    function, number, *more = NETWORKS[network]
    check(lambda: build(function, **(more[0] if more else {})), number)


# Networks that use a parameter in two ways, of which one would be wrong if the other scaled it.
TWO_WAYS = {
    "the weight, transposed": (lambda m, x: F.linear(m.fc(pooled(x)), m.fc.weight.T), 1),
    "the weight, summed": (lambda m, x: m.a(x) + m.a.weight.sum(), 0),
    "the weight's averages": (lambda m, x: m.a(x) * m.a.weight.mean((1, 2, 3)).view(4, 1, 1), 1),
    "the weight, in a concatenation": (lambda m, x: cat(m.fc(tokens(x)), m.fc.weight.expand(len(x), 4, 4)), 1),
    "the weight, rectified": (lambda m, x: F.linear(m.fc(tokens(x)), m.fc.weight.relu()), 1),
    "the weight, copied": (lambda m, x: F.linear(m.fc(tokens(x)), m.fc.weight.clone()), 1),
    "some rows of the weight": (lambda m, x: cat(m.fc(tokens(x)), F.linear(tokens(m.a(x)), m.fc.weight[:2]), dim=2), 2),
    "the weight as a factor": (lambda m, x: F.linear(pooled(x), m.square).unsqueeze(1) * m.square, 1),
    "the weight, transposed convolution": (lambda m, x: F.conv_transpose2d(F.conv2d(x, m.a.weight), m.a.weight), 1),
    "the same, concatenation": (
        lambda m, x: F.conv_transpose2d(F.conv2d(cat(x, m.b(x)), m.wide.weight), m.wide.weight), 1),
    "the weight with another bias": (
        lambda m, x: F.linear(F.linear(pooled(x), m.square, m.vector), m.square, m.fc.bias), 1),
    "the weight with a bias only then": (lambda m, x: F.linear(F.linear(pooled(x), m.square), m.square, m.vector), 1),
    "the weight with a bias only first": (lambda m, x: F.linear(F.linear(pooled(x), m.square, m.vector), m.square), 1),
    "the bias, added": (lambda m, x: m.fc(pooled(x)) + m.fc.bias, 1),
    "the bias as a factor": (lambda m, x: m.fc(pooled(x)) * m.fc.bias, 1),
    "one bias for two layers": (
        lambda m, x: F.linear(F.linear(pooled(x), m.square, m.vector), m.fc.weight, m.vector), 1),
    "BatchNorm's weight, added": (lambda m, x: m.bn(x) + m.bn.weight.view(4, 1, 1), 0),
    "BatchNorm's bias, added": (lambda m, x: m.a(m.bn(x) + m.bn.bias.view(4, 1, 1)), 1),
    "one weight for two BatchNorms": (
        lambda m, x: cat(m.bn(x), F.batch_norm(m.a(x), m.mean, m.variance, m.bn.weight, m.bn.bias)), 0,
        {"mean": lambda: nn.Buffer(torch.ones(4)), "variance": lambda: nn.Buffer(torch.ones(4))}),
    "one variance for two BatchNorms": (
        lambda m, x: cat(m.bn(x), F.batch_norm(m.a(x), m.bn.running_mean, m.bn.running_var, m.vector)), 0),
    "BatchNorm's variance": (lambda m, x: m.bn(x) + m.bn.running_var.view(4, 1, 1), 0),
    "PReLU's slope, added": (lambda m, x: m.a(F.prelu(x, m.vector) + m.vector.view(4, 1, 1)), 1),
    "one weight for two LayerNorms": (
        lambda m, x: F.layer_norm(m.a(m.part(x)), (6,), m.part.weight, None), 0, {"part": lambda: nn.LayerNorm(6)}),
}  # fmt: skip


@pytest.mark.parametrize("network", TWO_WAYS)
def test_a_parameter_with_two_uses_is_left_alone(network):
    function, number, *more = TWO_WAYS[network]
    check(lambda: build(function, **(more[0] if more else {})), number)


def test_what_is_returned_keeps_what_was_written_through_a_view():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.top = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.top(F.relu(self.stem(x)))
            y = torch.zeros_like(x)
            y.flatten(1).add_(x.flatten(1))
            return y

    torch.manual_seed(0)
    model = Written().double()
    expected = model(FRESH)
    report = rescale(model, draw(1))
    assert distance(model(FRESH), expected) < 1e-10
    assert report.spread_after < 1.001


@pytest.mark.parametrize(
    ("options", "number", "measured"),
    [({}, 7, 2), ({"lrn": False}, 7, 0), ({"batch_norm": True}, 14, 0), ({"batch_norm": True, "lrn": False}, 14, 0)],
)
def test_caffenet(options, number, measured):
    """One scale after each of seven layers; of BatchNorm one before and one after, but LRN pins what is before it."""
    model = CaffeNet(10, input_size=67, width=0.1, fc=16, **options).eval()
    images = torch.randn(3, 3, 67, 67)
    scales = scales_of(model, images)
    norms = options.get("batch_norm", False)
    assert len(scales.uses) == 8
    assert len(scales.norms) == (7 if norms else 0)
    assert len(scales.through_lrn) == measured or norms
    assert free(model, images, lrn="exact") == number
    if not norms:
        assert free(model, images) == number


@pytest.mark.parametrize("variance", [0.0, 1e-7, 1.0, 1e4])
@pytest.mark.parametrize(("incoming", "outgoing"), [(1, 5), (0.01, 1), (0.3, 2), (1000, 0.1)])
def test_batch_norm_scales_exactly_in_spite_of_eps(variance, incoming, outgoing):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, eps=1e-5).eval().double()
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    norm.running_var.fill_(variance)
    x = torch.randn(20, 6, dtype=torch.float64)
    expected = outgoing * norm(x)
    statistics = {"mean": norm.running_mean, "variance": norm.running_var, "eps": norm.eps}
    scales = torch.tensor([0, incoming, outgoing], dtype=torch.float64).log()
    with torch.no_grad():
        _scale_norm(Norm(torch.ones(6).long(), 2, norm.weight, norm.bias, **statistics), scales)
    assert (norm.running_var >= 0).all()
    torch.testing.assert_close(norm(incoming * x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factors", [[0.1, 0.1], [0.001, 0.001], [0.001, 5], [1e-7, 1]])
def test_batch_norm_without_weights_lowers_its_eps_where_it_must(factors):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2, affine=False).eval().double()
    nn.init.normal_(norm.running_mean)
    x = torch.randn(20, 2, dtype=torch.float64)
    expected, before = norm(x), copy.deepcopy(norm.state_dict())
    scaled = Norm(torch.tensor([1, 2]), 0, None, None, norm, norm.running_mean, norm.running_var, norm.eps)
    steps = torch.tensor([1, *factors], dtype=torch.float64).log() / 2
    for _ in range(2):  # as the method of the paper does it
        _scale_norm(scaled, steps)
    assert (norm.running_var >= 0).all()
    assert (norm.eps < 1e-5) == (min(factors) < 0.01)
    torch.testing.assert_close(norm(x.new_tensor(factors) * x), expected, rtol=1e-9, atol=1e-9)
    norm.eps = 1e-5  # as where a step is taken back, and another made
    norm.load_state_dict(before)
    _scale_norm(scaled, steps)
    torch.testing.assert_close(norm(x.new_tensor(factors).sqrt() * x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e8])
def test_batch_norm_with_extreme_statistics(variance):
    def make():
        model = build(lambda m, x: m.bn(m.a(m.bn8(cat(x, x))[:, 2:6])))
        for norm in (model.bn, model.bn8):
            norm.running_var.fill_(variance)
            norm.weight.data.mul_((variance + norm.eps) ** 0.5)
        return model

    check(make, 4)


def attributes(model):
    """All that modules hold, but for the values of tensors."""
    return [
        (id(module), {**vars(module), **module._buffers, **module._parameters}.keys()) for module in model.modules()
    ]


def test_tracing_leaves_nothing_in_the_model():
    model = build(NETWORKS["LayerNorm"][0], part=lambda: nn.LayerNorm([6, 6]))
    before, state = attributes(model), copy.deepcopy(model.state_dict())
    scales_of(model, draw(1))
    assert attributes(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# The scale is measured behind LRN where it can be chosen before it; the number of free scales without and with "exact".
LRN = {
    "LRN": (lambda m, x: m.lrn(x), True, 1, 1),
    "LRN twice": (lambda m, x: m.lrn2(F.max_pool2d(m.lrn(F.relu(x)), 2)), True, 1, 1),
    "shared LRN": (lambda m, x: m.lrn(m.a(m.lrn(x))), True, 2, 1),
    "LRN of what is pinned": (lambda m, x: m.lrn(x.tanh()), False, 0, 0),
    "LRN, tanh": (lambda m, x: m.lrn(x).tanh(), True, 0, 0),
    "LRN, BatchNorm": (lambda m, x: m.bn(m.lrn(x)), True, 1, 2),
    "LRN, residual": (lambda m, x: x + m.lrn(m.a(x)), True, 0, 1),
    "LRN, layer": (lambda m, x: m.a(F.relu(m.lrn(x))), True, 2, 2),
    "LRN, concatenation": (lambda m, x: m.wide(cat(m.lrn(x), m.a(x))), True, 3, 3),
    "LRN as a function": (lambda m, x: F.local_response_norm(x, 5, alpha=0.5), True, 1, 0),
}


def with_lrn(name):
    norm = lambda: nn.LocalResponseNorm(5, alpha=0.5)  # noqa: E731
    return build(LRN[name][0], lrn=norm, lrn2=norm)


@pytest.mark.parametrize("name", LRN)
def test_lrn_estimated(name):
    """What comes through is measured; where something that is not homogeneous follows, its scale stays."""
    _, measured, number, _ = LRN[name]
    model, images = with_lrn(name), draw(1, 12)
    scales = scales_of(model, images)
    assert bool(scales.through_lrn) == measured
    assert scales.basis().shape[1] == number
    expected = model(images).detach()
    report = rescale(model, images)
    assert report.lrn == ("estimate" if measured else None)
    assert distance(model(images).detach(), expected) == pytest.approx(report.output_change, abs=1e-9)
    assert report.output_change < (0.5 if number else 1e-12)
    assert model.lrn.alpha == 0.5


@pytest.mark.parametrize("name", LRN)
def test_lrn_exact(name):
    *_, number = LRN[name]
    report = check(lambda: with_lrn(name), number, lrn="exact")
    pinned = name in ("LRN of what is pinned", "LRN as a function")
    assert report.lrn == (None if pinned else "exact")


def test_what_lrn_did_to_the_scale_is_left_to_the_caller():
    model = with_lrn("LRN")
    before = [parameter.clone() for parameter in (model.stem.weight, model.stem.bias, model.top.weight)]
    apply_any(model, draw(1))
    first, bias, last = (
        a / b for a, b in zip((model.stem.weight, model.stem.bias, model.top.weight), before, strict=True)
    )
    torch.testing.assert_close(first, first.flatten()[0].expand_as(first))
    torch.testing.assert_close(bias, first.flatten()[0].expand_as(bias))
    assert abs(first.flatten()[0] - 1) > 0.1
    torch.testing.assert_close(last, torch.ones_like(last), rtol=0, atol=0)


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.left, self.right, self.hidden = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 8)
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x, y):
        x = F.relu(self.hidden(F.relu(self.left(x) + self.right(y))))
        return self.form(self.a(x), self.b(x))


FORMS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, [b]],
    "dictionary": lambda a, b: {"a": a, "more": {"b": b, "labels": a.argmax(1)}},
}


@pytest.mark.parametrize("form", FORMS)
def test_several_inputs_and_outputs(form):
    torch.manual_seed(0)
    model, inputs = Two(FORMS[form]).double(), (torch.randn(20, 6).double(), torch.randn(20, 3).double())
    plain = copy.deepcopy(model)
    plain.form = FORMS["tuple"]
    assert free(model, inputs) == 2
    report = rescale(model, inputs)
    assert report.spread_after < report.spread_before
    state, model.form = plain.state_dict(), plain.form
    assert not torch.equal(model.left.weight, state["left.weight"])
    fresh = torch.randn(7, 6).double(), torch.randn(7, 3).double()
    assert distance([x.detach() for x in model(*fresh)], [x.detach() for x in plain(*fresh)]) < 1e-12
    assert {row.name for row in report.layers} == {"left", "right", "hidden", "a", "b"}


def test_data_parallel():
    model = build(NETWORKS["residual"][0])
    expected = model(FRESH)
    report = rescale(nn.DataParallel(model), draw(1))
    assert [row.name for row in report.layers] == ["stem", "a", "b", "top"]
    assert distance(model(FRESH), expected) < 1e-12
    assert report.spread_after < report.spread_before


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float32, 1e-5), (torch.float64, 1e-12)],
)
def test_precisions(dtype, tolerance):
    model, images = build(NETWORKS["nested concatenation"][0]).to(dtype), draw(1).to(dtype)
    before = model(images).double()
    report = rescale(model, images)
    assert model.stem.weight.dtype == dtype
    assert distance(model(images).double(), before) < tolerance
    assert report.output_change < tolerance
    assert report.spread_after < 1.2 < report.spread_before


def test_parameters_of_one_flat_vector():
    """As `vector_to_parameters` leaves them."""

    def make():
        model = build(NETWORKS["residual"][0])
        vector = nn.utils.parameters_to_vector(model.parameters()).detach()
        nn.utils.vector_to_parameters(vector, model.parameters())
        return model

    assert len({parameter.untyped_storage().data_ptr() for parameter in make().parameters()}) == 1
    check(make, 2)
    assert [row.name for row in rescale(make(), draw(1)).layers] == ["stem", "a", "b", "top"]


def test_weight_norm_of_the_old_kind():
    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(lambda m, x: m.part(m.a(x)), part=lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 1)))

    check(make, 3)


def rates_of(model, images):
    """Change rates as `rescale` measures them."""
    return usable_rates(Layers(model), (images,), 0, draws=4).rates.mean


# What stays apart with "pin", and what shares parameters.
SCALED = (
    *("residual", "gate", "concatenation, softmax", "transformer, GELU", "self-attention", "BatchNorm", "functional"),
    *("shared layer", "shared layer without bias", "shared layer, branches", "transposed convolution", "Conv1d"),
    *("layer scale", "position embedding", "scaled_dot_product_attention", "class token", "RMSNorm without eps"),
)


@pytest.mark.parametrize("name", SCALED)
def test_auxiliary_scaling_gives_every_layer_the_same_rate(name):
    function, _, *more = NETWORKS[name]

    def make():
        return build(function, **(more[0] if more else {}))

    model, images = make(), draw(1)
    expected = model(FRESH).detach()
    report = rescale(model, images, nonhomogeneous="scale")
    assert report.spread_after < 1 + 1e-5 < 1.1 < report.spread_before
    assert list(rates_of(model, images).values()) == pytest.approx([row.rate_after for row in report.layers])
    assert distance(model(FRESH), expected) < 1e-12
    keys = model.state_dict().keys()
    other = make()  # another model, made ready likewise, takes the weights
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    rescale(other, images, nonhomogeneous="scale")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(FRESH), model(FRESH))
    for parameter in model.parameters():  # a second call updates what is there
        parameter.data.mul_(0.5 + torch.rand((), generator=torch.Generator().manual_seed(parameter.numel())))
    expected = model(FRESH).detach()
    second = rescale(model, images, nonhomogeneous="scale")
    assert model.state_dict().keys() == keys
    assert second.spread_after < 1 + 1e-5 < second.spread_before
    assert distance(model(FRESH), expected) < 1e-12
    rescale(model, images)  # and the other way scales the parameters beneath
    assert distance(model(FRESH), expected) < 1e-12


def test_auxiliary_scaling_of_weights_used_elsewhere():
    for name, (function, _, *more) in TWO_WAYS.items():
        model = build(function, **(more[0] if more else {}))
        expected = model(FRESH).detach()
        for options in ({"nonhomogeneous": "scale"}, {}):
            rescale(model, draw(1), **options)
            assert distance(model(FRESH).detach(), expected) < 1e-12, name


def test_auxiliary_scaling_of_parts_of_a_parameter():
    """They share its factor."""
    for name in ("cross-attention", "attention of three", "functional, parts of a parameter"):
        function, _, *more = NETWORKS[name]
        model = build(function, **more[0])
        expected = model(FRESH).detach()
        report = rescale(model, draw(1), nonhomogeneous="scale")
        assert distance(model(FRESH).detach(), expected) < 1e-12
        assert report.spread_after < report.spread_before
        rescale(model, draw(1))
        assert distance(model(FRESH).detach(), expected) < 1e-12


@pytest.mark.parametrize("nonhomogeneous", ["pin", "scale"])
def test_an_error_in_the_second_measurement_leaves_no_trace(nonhomogeneous):
    model = build(NETWORKS["LayerNorm"][0], part=lambda: nn.LayerNorm([6, 6])).train()
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    parameters, eps = [*map(id, model.parameters())], model.part.eps
    seen, epsilons = [], []

    def fail(model, _):
        with torch._C.DisableTorchFunction():  # or it would be a part of the graph
            seen.append({tuple(parameter.flatten().tolist()) for parameter in model.parameters()})
        epsilons.append(model.part.eps)
        if seen[-1] != seen[0]:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        rescale(model, draw(1), nonhomogeneous=nonhomogeneous)
    hook.remove()
    assert len(seen) > 3  # two passes are recorded
    assert [type(module) for module in model.modules()] == kinds
    assert [*map(id, model.parameters())] == parameters
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.part.eps == eps
    assert (epsilons[-1] != eps) == (nonhomogeneous == "pin")
    assert all(module.training for module in model.modules())


class Growing(nn.Module):
    def __init__(self, grow):
        super().__init__()
        self.grow = grow
        self.first, self.top = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.top(self.grow(self.first(x)))


def doubled(x):
    while x.norm() < 1000:
        x = 2 * x
    return x


CONTROL_FLOW = {
    "if": (lambda x: F.relu(x) if x.sum() > 0 else F.leaky_relu(x, 0.5), "__bool__"),
    "while": (doubled, "__bool__"),
    "item": (lambda x: x * (1 + (x.abs().max().item() > 1e9)), "item"),
    "float": (lambda x: x * (1 + (float(x.detach()[0, 0]) > 1e9)), "__float__"),
    "tolist": (lambda x: x * len(x.tolist()[0]), "tolist"),
    "numpy": (lambda x: x * len(x.detach().numpy().shape), "numpy"),
    "any": (lambda x: x if (x > 1e9).any() else F.relu(x), "__bool__"),
    "zeros, filled": (
        lambda x: [y := torch.zeros(len(x), 8), y[:, :8].copy_(x), x if y.sum() > 1e9 else F.relu(x)][-1],
        "__bool__",
    ),
}


@pytest.mark.parametrize("kind", CONTROL_FLOW)
def test_what_depends_on_the_values_of_activations(kind):
    grow, name = CONTROL_FLOW[kind]
    torch.manual_seed(0)
    model, images = Growing(grow), torch.randn(30, 6)
    state = copy.deepcopy(model.state_dict())
    message = (
        f"^the between-layer step cannot follow Growing: what {name} gives decides what the model does next, or leaves "
        'torch; pass between=False to set the filters and normalise each layer only, or nonhomogeneous="scale"$'
    )
    for call in (initialize, rescale):
        with pytest.raises(InitializationError, match=message):
            call(model, images)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    report = initialize(model, images, between=False)
    assert [row.filters for row in report.layers] == ["kmeans", "kmeans"]
    torch.testing.assert_close(model(images).std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    before = model(images)
    report = rescale(model, images, nonhomogeneous="scale")
    assert report.spread_after < 1 + 1e-5
    assert distance(model(images), before) < 1e-6


def invisible(x):
    """The tanh of x, in a way that no torch function shows."""
    x = x.clone()
    with torch._C.DisableTorchFunction():
        x.tanh_()
    return x


def invisible_result(x):
    with torch._C.DisableTorchFunction():
        return x.tanh()


@pytest.mark.parametrize(
    ("opaque", "message"),
    [
        (invisible, r"the between-layer step changed the output by \d.*, as a part of the model cannot be seen"),
        (invisible_result, "the between-layer step cannot follow Growing"),
    ],
)
def test_what_cannot_be_seen(opaque, message):
    torch.manual_seed(0)
    model, images = Growing(opaque), torch.randn(30, 6)
    model.first.weight.data.mul_(30)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InitializationError, match=message):
        rescale(model, images)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


class Chaos(nn.Module):
    """Amplifies a relative change of 1e-7 to more than 1e-4."""

    def __init__(self, depth=14, gain=10.0, width=8):
        super().__init__()
        self.gain = gain
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.a = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.b = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for norm, a, b in zip(self.norms, self.a, self.b, strict=True):
            x = torch.sin(self.gain * b(F.relu(a(norm(x)))))
        return x


def test_scales_are_powers_of_two_where_rounding_is_amplified():
    torch.manual_seed(0)
    model, images = Chaos(), torch.randn(20, 8)
    with torch.no_grad():
        before = model(images)
        assert distance(model(images * (1 + 1e-7)), before) > 1e-4
    weights = [layer.weight.clone() for layer in (*model.a, *model.b)]
    report = rescale(model, images)
    assert report.powers_of_two
    assert "powers of two" in str(report)
    assert report.output_change == 0
    assert torch.equal(model(images), before)
    ratios = torch.tensor([(a.weight / w).mean().item() for a, w in zip((*model.a, *model.b), weights, strict=True)])
    assert torch.equal(ratios.log2(), ratios.log2().round())
    assert len(ratios.unique()) > 2
    assert report.spread_after < 16 < 1000 < report.spread_before
    assert [row.scale for row in report.layers][::2] == pytest.approx(ratios[: len(model.a)].tolist())
    double = Chaos().double()
    double.load_state_dict(model.state_dict())
    assert not rescale(double, images.double()).powers_of_two


class ChaosOfProducts(Chaos):
    """The same, of queries, keys and values, or of a product of activations, whose scales hold by sums."""

    def __init__(self, kind):
        super().__init__(gain=20.0 if kind == "attention" else 10.0)
        self.kind = kind
        self.c = nn.ModuleList(nn.Linear(8, 8) for _ in self.a)
        with torch.no_grad():
            for number, layers in enumerate(zip(self.a, self.b, self.c, strict=True)):
                for layer, factor in zip(layers, (4.0, 0.1, 30.0), strict=True):
                    layer.weight *= factor ** (-1) ** number

    def forward(self, x):
        for norm, a, b, c in zip(self.norms, self.a, self.b, self.c, strict=True):
            x = norm(x)
            if self.kind == "attention":
                x = c((a(x) * b(x) / 8).softmax(-1) * x)
            elif self.kind == "product":
                x = c(F.relu(a(x)) * b(x))
            else:
                x = c(F.relu(a(x)).square() + F.relu(b(x)))
            x = torch.sin(self.gain * F.layer_norm(x, (8,)))
        return x


@pytest.mark.parametrize("kind", ["attention", "product", "square"])
def test_powers_of_two_where_scales_hold_by_sums(kind):
    torch.manual_seed(0)
    model, images = ChaosOfProducts(kind), torch.randn(20, 8)
    with torch.no_grad():
        before = model(images)
    exact = copy.deepcopy(model).double()
    report = rescale(model, images)
    assert report.powers_of_two
    assert torch.equal(model(images), before)
    least = rescale(exact, images.double()).spread_after
    assert report.spread_after < 16 * least < report.spread_before / 1000


def test_powers_of_two_are_exact_in_float64():
    torch.manual_seed(0)
    model, images = ChaosOfProducts("attention").double(), torch.randn(20, 8).double()
    model.gain = 70.0
    with torch.no_grad():
        before = model(images)
    report = rescale(model, images)
    assert report.powers_of_two
    assert torch.equal(model(images), before)


def test_moves_of_powers_of_two_are_whole_and_keep_the_constraints():
    generator = np.random.default_rng(0)
    for _ in range(200):
        scales, size = Scales(), 12
        for _ in range(size):
            scales.new()
        for terms in generator.choice([2, 2, 3, 4], generator.integers(1, 7)):
            labels = generator.choice(np.arange(1, size + 1), terms, replace=False)
            signs = [1, -1] if terms == 2 and generator.random() < 0.7 else generator.choice([1, -1, 2, -2], terms)
            scales.constrain(*zip(labels.tolist(), map(int, signs), strict=True))
        moves, basis = scales._moves(), scales.basis()
        assert torch.equal(moves, moves.round())
        assert torch.linalg.matrix_rank(moves) == len(moves)
        torch.testing.assert_close(moves @ basis @ basis.T, moves, rtol=0, atol=1e-9)
        units = all(abs(coefficient) == 1 for row in scales.constraints for _, coefficient in row)
        assert len(moves) <= basis.shape[1]
        assert len(moves) == basis.shape[1] or not units


class ChaosBehindBatchNorm(nn.Module):
    """The same, where eps of a BatchNorm, which cannot be scaled, bounds how small its input may become."""

    def __init__(self, depth=14, gain=10.0, width=8):
        super().__init__()
        self.gain = gain
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, eps=1e-3) for _ in range(depth))

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.sin(self.gain * norm(layer(x)))
        return x


def test_powers_of_two_stop_where_eps_would_show():
    torch.manual_seed(0)
    model, images = ChaosBehindBatchNorm().eval(), torch.randn(20, 8)
    for norm in model.norms:
        norm.running_var.uniform_(0.5, 2)
        norm.running_mean.normal_()
    with torch.no_grad():
        before = model(images)
    scales = propagate(record(Layers(model), (images,)), "estimate")
    assert scales.equalising(usable_rates(Layers(model), (images,), 0, draws=4)).min() < math.log(2**-6)
    report = rescale(model, images)
    assert report.powers_of_two
    assert torch.equal(model(images), before)
    assert min(row.scale for row in report.layers) == pytest.approx(2**-3)  # at 2^-4, some v' + eps would be rounded
    assert all((norm.weight == 1).all() for norm in model.norms)
    assert report.spread_after < report.spread_before / 100


# The free scales by hand: for each layer the scale that goes out, and that which comes in (or of equal parts of its
# input channels), as rows of coefficients of the free scales.
one, two, three, four = np.eye(4)
BY_HAND = {
    "chain": (
        lambda m, x: F.relu(m.a(F.relu(x))),
        {"stem": (one, [0 * one]), "a": (two, [one]), "top": (0 * one, [two])},
    ),
    "residual": (
        lambda m, x: x + m.b(F.relu(m.a(x))),
        {"stem": (one, [0 * one]), "a": (two, [one]), "b": (one, [two]), "top": (0 * one, [one])},
    ),
    "two residuals": (
        lambda m, x: (y := x + m.b(F.relu(m.a(x)))) + m.fc(F.relu(m.c(y)).movedim(1, -1)).movedim(-1, 1),
        {
            **{"stem": (one, [0 * one]), "a": (two, [one]), "b": (one, [two]), "c": (three, [one])},
            **{"fc": (one, [three]), "top": (0 * one, [one])},
        },
    ),
    "concatenation": (
        lambda m, x: cat(x, m.a(x)),
        {"stem": (one, [0 * one]), "a": (two, [one]), "top": (0 * one, [one, two])},
    ),
    "concatenation in a residual": (
        lambda m, x: m.wide(cat(x, F.relu(m.a(x)))) + x,
        {"stem": (one, [0 * one]), "a": (two, [one]), "wide": (one, [one, two]), "top": (0 * one, [one])},
    ),
    "inception": (
        lambda m, x: cat(m.wide(cat(m.a(x), F.relu(m.b(x)))), x),
        {
            **{"stem": (one, [0 * one]), "a": (two, [one]), "b": (three, [one])},
            **{"wide": (four, [two, three]), "top": (0 * one, [four, one])},
        },
    ),
    "shared layer": (
        lambda m, x: F.relu(m.no_bias(F.relu(m.no_bias(x)))),
        {"stem": (one, [0 * one]), "no_bias": (one + two, [one]), "top": (0 * one, [one + 2 * two])},
    ),
    "shared layer with bias": (
        lambda m, x: F.relu(m.a(F.relu(m.a(m.b(x))))),
        {"stem": (two, [0 * one]), "b": (one, [two]), "a": (one, [one]), "top": (0 * one, [one])},
    ),
}  # fmt: skip


def scaled_by_hand(model, rows, u):
    """A copy of the model at these scales."""
    model = copy.deepcopy(model)
    for name, (output, incoming) in rows.items():
        layer = model.get_submodule(name)
        channels = layer.weight.shape[1] // len(incoming)
        for i, row in enumerate(incoming):
            layer.weight.data[:, i * channels : (i + 1) * channels] *= math.exp((output - row) @ u)
        if layer.bias is not None:
            layer.bias.data *= math.exp(output @ u)
    return model


def optimum(model, images, rows):
    """The scales of least variance of the log rates by Gauss-Newton on differences of measured rates, and its rates."""

    def logs(u):
        means = rates_of(scaled_by_hand(model, rows, u), images)
        return np.log([means[name] for name in rows])

    u, step = np.zeros(4), 1e-3
    for _ in range(8):
        slopes = np.stack([(logs(u + step * e) - logs(u - step * e)) / (2 * step) for e in np.eye(4)], 1)
        value = logs(u)
        u = u - np.linalg.pinv(slopes - slopes.mean(0), rcond=1e-5) @ (value - value.mean())
    return u, logs(u)


@pytest.mark.parametrize("network", BY_HAND)
def test_the_variance_of_the_log_rates_is_least(network):
    function, rows = BY_HAND[network]
    model, images = build(function), draw(1)
    expected = model(FRESH)
    u, logs = optimum(model, images, rows)
    assert distance(scaled_by_hand(model, rows, u)(FRESH), expected) < 1e-12  # the rows are right
    best = copy.deepcopy(model)
    report = rescale(best, images)
    rates = {row.name: row.rate_after for row in report.layers}
    found = np.log([rates[name] for name in rows])
    assert found.var() == pytest.approx(logs.var(), abs=1e-6)
    np.testing.assert_allclose(found - found.mean(), logs - logs.mean(), atol=1e-3)
    generator = np.random.default_rng(0)
    for size in (0.01, 0.1, 1):
        other = rates_of(scaled_by_hand(best, rows, size * generator.normal(size=4)), images)
        assert np.log([other[name] for name in rows]).var() > found.var() - 1e-7
    paper = copy.deepcopy(model)
    damped = rescale(paper, images, method="paper")
    assert damped.rounds == 10
    assert distance(paper(FRESH), expected) < 1e-12
    variance = np.log([row.rate_after for row in damped.layers]).var()
    assert found.var() < variance < 0.5 * np.log([row.rate_before for row in damped.layers]).var() + found.var()
    if network != "shared layer with bias":
        assert report.spread_after < damped.spread_after < damped.spread_before


@pytest.mark.parametrize("nonhomogeneous", ["pin", "scale"])
def test_rates_are_equal_on_as_many_images_as_are_asked_for(nonhomogeneous):
    spreads = {}
    for count in (2, 24, 99):
        model, images = build(lambda m, x: m.a(x).relu()), draw(3, 24)
        report = rescale(model, images, rate_images=count, nonhomogeneous=nonhomogeneous)
        assert report.rate_images == min(count, 24)
        assert report.spread_after < 1.001
        spreads[count] = usable_rates(Layers(model), (images,), 0, draws=4).rates.spread
    assert spreads[24] == spreads[99] < 1.001 < 1.01 < spreads[2]


def test_a_chain_is_equalised_by_the_square_roots_of_the_rates():
    """r_k = sqrt(C_k / C) with C the geometric mean."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(6))).double()
    for layer in model:
        layer.weight.data.mul_(100 ** torch.randn(()).double())
    report = rescale(model, torch.randn(12, 5).double())
    rates = np.array([row.rate_before for row in report.layers])
    assert rates.max() > 1e4 * rates.min()
    factors = np.sqrt(rates / np.exp(np.log(rates).mean()))
    np.testing.assert_allclose([row.scale for row in report.layers], factors, rtol=1e-5)
    np.testing.assert_allclose(factors.prod(), 1)
    assert report.spread_after < 1 + 1e-5


@pytest.mark.parametrize(("weak", "expected"), [(0.02, 25.0), (2e-3, 0.0), (1e-6, 0.0)])
def test_scales_stay_where_rates_hardly_change_with_them(weak, expected):
    """As in MambaOut: float32 could not hold what would make its rates a little more equal."""
    slopes = torch.diag(torch.tensor([2.0, 1.0, weak], dtype=torch.float64))
    changes = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(_least_squares(slopes, changes).tolist(), [0.5, 1.0, expected])
