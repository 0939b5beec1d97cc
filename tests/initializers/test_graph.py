"""A recorded forward pass does on any images what the model does, and holds no more than it needs."""

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initializers import InitializationError, initialize, rescale
from initializers._graph import Graph
from initializers._layers import Layers
from initializers._record import UngraphableError, record
from initializers._sweep import IMAGES_AT_A_TIME, Recorded, sweep


class Net(nn.Module):
    """`function` of the layers and of the images, (N, 3, 6, 6); the last layer takes what it gives, flattened."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.ramp = torch.linspace(0, 1, 6)  # a plain attribute
        self.kept = None
        self.top = nn.LazyLinear(5)

    def forward(self, x):
        return self.top(self.function(self, x).flatten(1))


def build(function):
    torch.manual_seed(0)
    model = Net(function).eval()
    model(draw(2))
    return model


def draw(count):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))


def tokens(x):
    return x.flatten(2).mT


def remembered(m, x):
    m.kept = m.a(x)
    return m.b(m.kept) + m.kept


def windows(m, x):
    """Swin's: windows become rows, of which there are four an image."""
    x = m.a(x)
    n = x.shape[0]
    x = x.view(n, 4, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(n * 4, 9, 4)
    x = m.fc(x).reshape(-1, 2, 2, 3, 3, 4)
    assert len(x) == n
    return x


def in_place(m, x):
    x = m.a(x)
    view = x[:, :2]
    view.mul_(2).add_(1)
    x += m.b(x)
    x[:, 3] = x[:, 2] - 1
    x.view(len(x), -1)[:, 0].zero_()
    return F.relu_(x.transpose_(2, 3))


def filled(m, x):
    y = torch.zeros(x.shape[0], 8, 6, 6)
    y[:, :4] = m.a(x)
    y[:, 4:].copy_(m.b(y[:, :4]))
    return y


def branches(m, x):
    first, second = m.a(x).split(2, 1)
    return torch.cat([m.b(torch.cat([second, first], 1)).chunk(4, 1)[0], first], 1)


def by_image(m, x):
    return m.b(m.a(x) * torch.ones(x.size(0), device=x.device)[:, None, None, None])


def positions(m, x):
    """Made of arange and the number of images."""
    x = tokens(m.a(x))
    rows = torch.arange(len(x) * 36).view(len(x), 36) % 36
    return m.fc(x + rows[..., None] / 36 + torch.arange(0, x.size(1))[:, None] / 10)


def class_token(m, x):
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), tokens(m.a(x))], 1)
    return m.attention(m.fc(x), x, x)[0][:, 0]


def nested(m, x):
    """Outputs of modules and functions in tuples and dictionaries, keyword arguments, starred ones."""
    found = {"pooled": F.max_pool2d(input=m.a(x), kernel_size=2, return_indices=True), "size": [*x.shape]}
    y, indices = found["pooled"]
    y = F.max_unpool2d(y, indices, (2, 2), output_size=found["size"][2:])
    return m.b(torch.stack(tensors=[y, 2 * y]).sum(dim=0))


FUNCTIONS = {
    "chain": lambda m, x: F.relu(m.b(F.relu(m.a(x), inplace=True))),
    "view by the size": lambda m, x: m.fc(
        m.a(x).view(x.size(0), 4, -1).transpose(1, 2).reshape(x.size(0) * 36, 4)
    ).view(x.size(0), -1),
    "windows": windows,
    "tokens first": lambda m, x: m.fc(m.a(x).flatten(2).permute(2, 0, 1)).transpose(0, 1),
    "expand": lambda m, x: m.b(m.a(x) + m.ramp.expand(len(x), 4, 6, 6)),
    "zeros": filled,
    "ones for each image": by_image,
    "arange": positions,
    "class token, attention": class_token,
    "attribute": remembered,
    "in place": in_place,
    "branches": branches,
    "nested": nested,
    "iteration over channels": lambda m, x: m.b(torch.stack([c + i for i, c in enumerate(m.a(x).unbind(1))], 1)),
    "used twice": lambda m, x: m.b(F.relu(m.b(m.a(x)))),
    "a layer for nothing": lambda m, x: [m.b(y := m.a(x)), y][1],
    "number of images in a product": lambda m, x: m.b(m.a(x) * x.shape[0] / len(x)),
    "new tensor": lambda m, x: m.b(torch.maximum(m.a(x), x.new_full((x.size(0), 1, 1, 1), 0.1))),
    "slices by the size": lambda m, x: m.b(torch.cat([m.a(x), m.a(x)])[x.size(0) : 2 * x.size(0)]),
    "repeat": lambda m, x: m.b(m.a(x) + m.ramp.repeat(x.shape[0], 1, 6, 1)),
    "metadata": lambda m, x: m.b(m.a(x).to(x.device, x.dtype)) if x.ndim == 4 and x.dtype.is_floating_point else x,
}


def layer_values(run):
    """Inputs and outputs of the first use of each layer: one tensor per batch."""
    found = {}

    def visit(call, entering, compute):
        entered = [x.clone() for x in entering()]
        found[call.layer.name] = entered, [x.clone() for x in compute()]

    run(visit)
    return found


def plainly(model, images):
    """The same, in one forward pass of all images."""
    return layer_values(lambda visit: sweep(Layers(model), (images,), Recorded(None, None, None), visit))


def joined(parts, shape):
    """All images in one tensor of this shape; the images may be its second dimension."""
    fits = [dimension for dimension, size in enumerate(shape) if sum(p.shape[dimension] for p in parts) == size]
    return torch.cat(parts, fits[0])


@torch.no_grad()
def assert_replays(model, count, batch=IMAGES_AT_A_TIME):
    graph = record(Layers(model), (draw(5),))
    images = draw(count)
    original, expected = images.clone(), plainly(model, draw(count))
    found = layer_values(lambda visit: graph.run((images,), batch, visit))
    assert list(found) == list(expected)
    for name, values in found.items():
        for parts, (other,) in zip(values, expected[name], strict=True):
            assert len(parts) == math.ceil(count / batch)
            whole = joined(parts, other.shape)
            if name == "attention.out_proj":  # whose rows are all images' first tokens, then the second ones, ...
                whole, other = whole.flatten().sort().values, other.flatten().sort().values
            torch.testing.assert_close(whole, other, msg=name)
    assert torch.equal(images, original)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 17, 37])
def test_every_layer_sees_what_it_sees_in_a_plain_pass(function, count):
    assert_replays(build(FUNCTIONS[function]), count)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_the_batches_make_no_difference(batch):
    for function in ("windows", "in place", "arange", "zeros"):
        assert_replays(build(FUNCTIONS[function]), 7, batch)


def without_graph(model, *_):
    raise UngraphableError("not today")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_initialization_is_the_same_without_a_graph(function, monkeypatch):
    """Up to rounding: the parts of the images are sums of others."""
    model, other = build(FUNCTIONS[function]), build(FUNCTIONS[function])
    report = initialize(model, draw(40), "orthonormal", between=False)
    monkeypatch.setattr("initializers._sweep.record", without_graph)
    second = initialize(other, draw(40), "orthonormal", between=False)
    assert [row.name for row in report.layers] == [row.name for row in second.layers]
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-3, msg=name)


def test_images_stay_where_a_model_changes_them_in_place():
    model, images = build(lambda m, x: m.b(m.a(x.mul_(2).sub_(1)))), draw(20)
    assert_replays(model, 20)
    original = images.clone()
    initialize(model, images)
    assert torch.equal(images, original)


def alive(count):
    """Number of float tensors with at least that many values, each memory once."""
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() >= count and x.is_floating_point()]
    return len({x.untyped_storage().data_ptr() for x in found})


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))

    def forward(self, x):
        shortcut = x
        for layer in self.layers:
            x = torch.relu(2 * layer(x) + 1) * 3
        return x + shortcut


def test_values_are_freed_after_their_last_use():
    """At a layer, per batch: its input, the first tensor, which a shortcut needs, and the images themselves."""
    torch.manual_seed(0)
    model, images = Deep(12).eval(), torch.randn(24, 10, 16)
    held = []
    with torch.no_grad():
        graph = record(Layers(model), (images,))
        already = alive(1000)

        def count(call, entering, compute):
            for tensors in (entering, compute):
                assert tensors()
                if call.layer.name in ("layers.1", "layers.10"):
                    held.append(alive(1000) - already)

        graph.run((images,), 8, count)
    assert len(held) == 4
    assert max(held) <= 3 * 3
    assert held[:2] == held[2:]  # no more in deeper layers


def test_recording_keeps_nothing_of_the_images():
    model, images = Deep(4).eval(), torch.randn(24, 10, 16)
    before = alive(100)
    graph = record(Layers(model), (images,))
    assert not [x for x in graph.fixed.values() if len(x) in (2, 3) and x.ndim == 3]
    del graph
    assert alive(100) == before


BY_NUMBER = {
    "loop over images": lambda m, x: m.b(torch.stack([2 * image for image in m.a(x)])),
    "branch": lambda m, x: m.b(m.a(x)) if len(x) > 2 else m.a(x),
    "other layers": lambda m, x: m.b(m.a(x)) if len(x) > 2 else F.relu(m.a(x)),
    "a float of it": lambda m, x: m.b(m.a(x) * (1.0 / len(x))),
    "its name": lambda m, x: F.interpolate(m.a(x), size=6, mode="nearest" if len(x) > 2 else "bilinear"),
    "constants": lambda m, x: m.a(x) * torch.tensor(range(len(x))).sum(),
    "in numpy": lambda m, x: m.a(x) + torch.from_numpy(torch.ones(len(x), 1, 1, 1).numpy()),
}


@pytest.mark.parametrize("function", BY_NUMBER)
def test_what_depends_on_the_number_of_images(function):
    model = build(BY_NUMBER[function])
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UngraphableError, match="what it does depends on the number of images"):
        record(Layers(model), (draw(5),))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert rescale(model, draw(40)).output_change < 1e-5  # the graph of one batch tells how scales travel
    report = initialize(model, draw(40), between=False)
    assert "top" in [row.name for row in report.layers]
    torch.testing.assert_close(model(draw(40)).std(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)


def test_hooks_and_modes_are_gone_after_an_error():
    def fail(m, x):
        raise RuntimeError("on purpose")

    model = build(FUNCTIONS["chain"])
    model.function = fail
    model.norm = nn.LayerNorm(3)
    with pytest.raises(InitializationError, match=r"the model rejects images of shape .*on purpose"):
        record(Layers(model), (draw(5),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode() is None


def test_random_operations():
    """A model that draws random numbers even in evaluation mode: they are drawn anew, not recorded."""
    model = build(lambda m, x: m.b(m.a(x) + 0.1 * torch.randn_like(m.a(x)) + torch.rand(len(x), 1, 1, 1)))
    graph = record(Layers(model), (draw(5),))
    found = []
    with torch.no_grad():
        for _ in range(2):
            graph.run((draw(20),), 16, lambda _, entering, compute: (found.append(torch.cat(entering())), compute()))
    assert [len(one) % 20 for one in found] == [0] * 6
    assert len(found[2]) == len(found[5]) == 1280  # behind the draws, one of which is one number for each image
    assert not torch.equal(found[1], found[4])
    models = [build(model.function) for _ in range(2)]
    for other in models:
        torch.rand(3)
        initialize(other, draw(30), between=False)
    assert all(torch.equal(a, b) for a, b in zip(*(other.parameters() for other in models), strict=True))


def test_outputs_may_be_nested():
    class Several(Net):
        def forward(self, x):
            y = self.a(x)
            return {"first": self.top(self.b(y).flatten(1)), "more": [self.fc(tokens(y)), (y.argmax(1), None, "text")]}

    model = Several(None).eval()
    model(draw(2))
    graph = record(Layers(model), (draw(5),))
    assert [graph.shapes[output] for output in graph.outputs] == [(2, 5), (2, 36, 4)]
    report = initialize(model, draw(30), between=False)
    assert [row.name for row in report.layers] == ["a", "b", "top", "fc"]


def test_fewer_images_than_are_recorded():
    model = build(FUNCTIONS["windows"])
    assert isinstance(record(Layers(model), (draw(1),)), Graph)
    expected = record(Layers(model), (draw(3),))
    assert [operation.name for operation in record(Layers(model), (draw(2),)).operations] == [
        operation.name for operation in expected.operations
    ]
