"""What the between-layer step and the whole initialization promise, on random networks."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from initializers import InitializationError, change_rate, initialize, rescale
from initializers._layers import Layers
from initializers._propagate import propagate
from initializers._record import record

SIZE = 5  # of the images


def few(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


class Random(nn.Module):
    """A network of steps, each (kind, first value, second value, bias); values are numbered as they come.

    What no step takes goes to the last layer.
    """

    def __init__(self, steps, seed, convolutional):
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.convolutional = steps, convolutional
        self.layers = nn.ModuleList()
        outputs = self.outputs(draw(seed, 2, convolutional), build=True)
        self.top = nn.Linear(outputs.shape[1], 3, dtype=torch.float64)
        self.eval()
        for parameter in self.parameters():
            parameter.data.normal_().mul_(0.2 + 2 * torch.rand(()))
        for norm in self.norms():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 3)

    def norms(self):
        return [module for module in self.layers if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]

    def make(self, kind, x, second, bias):
        """The layer of a step, for what comes in."""
        channels, dtype = x.shape[1], x.dtype
        if kind == "shared":  # a layer of before, where there is one that fits
            fits = [m for m in self.layers if isinstance(m, nn.Linear | nn.Conv2d) and in_channels(m) == channels]
            return fits[second % len(fits)] if fits else nn.Identity()
        if kind == "norm":
            return (nn.BatchNorm2d if self.convolutional else nn.BatchNorm1d)(channels, dtype=dtype)
        if kind not in ("layer", "groups"):
            return nn.Identity()
        if not self.convolutional:
            return nn.Linear(channels, 4, bias=bias, dtype=dtype)
        if kind == "groups":
            return nn.Conv2d(channels, channels, 1, bias=bias, groups=2, dtype=dtype)
        return nn.Conv2d(channels, 4, 3, padding=1, bias=bias, dtype=dtype)

    def outputs(self, x, build=False):
        """What the last layer takes; with `build` the layers are made as they come."""
        values, taken = [x], {0}
        for i, (kind, first, second, bias) in enumerate(self.steps):
            first, second = first % len(values), second % len(values)
            a, b = values[first], values[second]
            if build:
                self.layers.append(self.make(kind, a, second, bias))
            taken.add(first)
            if kind == "add" and a.shape == b.shape:
                y = a + b
                taken.add(second)
            elif kind == "cat" and a.shape[2:] == b.shape[2:] and a.shape[1] + b.shape[1] <= 16:
                y = torch.cat([a, b], 1)
                taken.add(second)
            elif kind == "pool" and self.convolutional:
                y = F.max_pool2d(a, 3, 1, 1)
            elif kind == "chunk" and a.shape[1] >= 4:
                y = a.chunk(2, 1)[second % 2]
            elif kind == "tanh":
                y = torch.tanh(a)
            elif kind == "shuffle":
                y = a.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            elif kind in ("layer", "groups", "shared", "norm"):
                y = self.layers[i](a)
            else:
                y = F.leaky_relu(a, 0.1)
            values.append(y)
        return torch.cat([value.flatten(1) for i, value in enumerate(values) if i not in taken], 1)

    def forward(self, x):
        return self.top(self.outputs(x))


def in_channels(layer):
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def draw(seed, count, convolutional=True):
    size = (count, 4, SIZE, SIZE) if convolutional else (count, 4)
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).float().double()


HOMOGENEOUS = ("layer", "layer", "groups", "shared", "norm", "add", "cat", "pool", "relu", "chunk", "shuffle")


@st.composite
def networks(draw_from, kinds=(*HOMOGENEOUS, "tanh")):
    """A random network and its images."""
    numbers = st.integers(0, 11)
    start = [("layer", 0, 0, draw_from(st.booleans()))]
    # Mostly of the last value, so that there are long paths.
    step = st.tuples(st.sampled_from(kinds), st.one_of(st.just(-1), numbers), numbers, st.booleans())
    steps = start + draw_from(st.lists(step, min_size=2, max_size=9))
    seed, convolutional = draw_from(st.integers(0, 1000)), draw_from(st.booleans())
    steps = [(kind, i if first < 0 else first, second, bias) for i, (kind, first, second, bias) in enumerate(steps)]
    return Random(steps, seed, convolutional), draw(seed + 1, 8, convolutional)


def learning(model, images):
    """Whether all layers learn; a random network may have dead ones, which is an error of its own."""
    try:
        return min(change_rate(model, images).mean.values()) > 0
    except InitializationError:
        return False


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def log_variance(report, when):
    return np.log([getattr(row, f"rate_{when}") for row in report.layers]).var()


def everything(model):
    """Values and flags of all that a model holds, hooks and constants too."""
    tensors = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    flags = [
        (
            id(m),
            m.training,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._backward_hooks),
            getattr(m, "eps", 0),
        )
        for m in model.modules()
    ]
    return tensors, flags, [(id(p), p.requires_grad, p.grad) for p in model.parameters()], torch.get_rng_state()


def assert_unchanged(before, after, values=True):
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert before[0].keys() == after[0].keys()
    if values:
        assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())


@few(40)
@given(networks(), st.integers(0, 3))
def test_any_scales_keep_the_function(network, seed):
    model, images = network
    fresh = draw(5, 4, model.convolutional)
    expected = model(fresh).detach()
    scales = propagate(record(Layers(model), (images,)), "estimate")
    basis = scales.basis()
    u = basis @ torch.randn(basis.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scales.apply(u)
    assert distance(model(fresh).detach(), expected) < 1e-9


@few(25)
@given(networks())
def test_rescaling_keeps_the_function_and_is_at_the_optimum(network):
    model, images = network
    assume(learning(model, images))
    fresh = draw(5, 4, model.convolutional)
    expected = model(fresh).detach()
    before = everything(model)
    report = rescale(model, images)
    after = everything(model)
    assert not report.powers_of_two
    assert distance(model(fresh).detach(), expected) < 1e-9
    assert_unchanged(before, after, values=False)
    layers = {row.name for row in report.layers}
    for name, tensor in before[0].items():
        module = name.rpartition(".")[0]
        if module not in layers and model.get_submodule(module) not in model.norms():
            assert torch.equal(tensor, after[0][name]), name
    assert log_variance(report, "after") <= log_variance(report, "before") + 1e-9
    again = rescale(model, images)
    assert [row.scale for row in again.layers] == pytest.approx([1] * len(again.layers), abs=1e-4)
    assert log_variance(again, "after") == pytest.approx(log_variance(report, "after"), abs=1e-6)


@few(15)
@given(networks(("layer", "groups", "norm", "relu", "pool", "shuffle")))
def test_all_rates_of_a_chain_become_equal(network):
    model, images = network
    steps = [(kind, i, second, bias) for i, (kind, _, second, bias) in enumerate(model.steps)]
    model = Random(steps, 0, model.convolutional)
    assume(learning(model, images))
    assert rescale(model, images).spread_after < 1 + 1e-6


@few(25)
@given(networks(), st.sampled_from(["gaussian", "kmeans", "orthonormal", None]))
def test_initialization(network, filters):
    """Determinism, and that balancing keeps the function of what the other steps made."""
    model, _ = network
    images, fresh = draw(3, 10, model.convolutional), draw(5, 4, model.convolutional)
    models = [copy.deepcopy(model) for _ in range(3)]
    before = everything(models[0])
    options = {"filters": filters, "seed": 4}
    try:
        initialize(models[0], images, between=False, **options)
    except InitializationError:  # a dead channel
        assert_unchanged(before, everything(models[0]))
        return
    assert_unchanged(before, everything(models[0]), values=False)
    expected = models[0](fresh).detach()
    for other in models[1:]:
        torch.rand(3)
        try:
            initialize(other, images, **options)
        except InitializationError:
            assert not learning(models[0], images)
            return
        assert distance(other(fresh).detach(), expected) < 1e-9
    one, two = (other.state_dict() for other in models[1:])
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@few(30)
@given(networks(), st.integers(1, 40), st.booleans())
def test_an_error_anywhere_leaves_the_model_as_it_was(network, calls, within):
    model, images = network
    model.train()
    model.layers[0].weight.requires_grad_(False)
    model.top.bias.grad = torch.ones(3, dtype=torch.float64)
    count = [0]

    def fail(*_):
        count[0] += 1
        if count[0] == calls:
            raise RuntimeError("on purpose")

    hooks = [module.register_forward_pre_hook(fail) for module in model.modules()]
    before = everything(model)
    try:
        initialize(model, images, None if within else "gaussian", within=within)
    except (InitializationError, RuntimeError):
        assert_unchanged(before, everything(model))
    else:
        assert count[0] < calls
        assert_unchanged(before, everything(model), values=False)
    for hook in hooks:
        hook.remove()
