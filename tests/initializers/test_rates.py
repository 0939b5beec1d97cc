import copy
import gc
import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initializers import Rates, _rates, change_rate, rescale
from initializers._layers import Layers
from initializers._rates import IMAGES_AT_A_TIME, measure

AFFINE = (nn.Linear, nn.modules.conv._ConvNd)


def affine_weights(model):
    """The weight of each affine layer and the rows of it: what the model states, or those of its modules."""
    if hasattr(model, "layers"):
        return model.layers
    return {name: (f"{name}.weight", ...) for name, module in model.named_modules() if isinstance(module, AFFINE)}


def slow_columns(model, images, eta):
    """C_k,j by equation 1, one image at a time by autograd in float64; for a convolution j counts within the group."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    weights = affine_weights(model)
    parameters = [model.get_parameter(parameter) for parameter, _ in weights.values()]
    squares = [0.0] * len(weights)
    for image, top in zip(images.double().split(1), eta.double().split(1), strict=True):
        gradients = torch.autograd.grad((model(image) * top).sum(), parameters)
        squares = [total + g.square() / len(images) for total, g in zip(squares, gradients, strict=True)]
    columns = {}
    for (name, (path, rows)), parameter, square in zip(weights.items(), parameters, squares, strict=True):
        module = model.get_submodule(path.rpartition(".")[0])
        if getattr(module, "transposed", False):  # (inputs, outputs of a group, kernel)
            mean = square.unflatten(0, (module.groups, -1)).movedim(1, 0).flatten(1).mean(1)
        else:
            mean = square[rows].movedim(1, 0).flatten(1).mean(1)
        columns[name] = (mean / parameter[rows].square().mean()).sqrt().detach()
    return columns


def conv(*args, make=nn.Conv2d, **options):
    """The convolution between two others, with in-place ReLUs."""
    middle = make(6, *args, **options)
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


def transposed(*args, **options):
    return conv(*args, make=nn.ConvTranspose2d, **options)


def in_dimensions(count, *layers):
    """Convolutions of one or three dimensions: along all pixels of a channel, or with the channels as a dimension."""
    shape = nn.Flatten(2) if count == 1 else nn.Unflatten(1, (1, 4))
    pool = (nn.AdaptiveAvgPool1d if count == 1 else nn.AdaptiveAvgPool3d)(1)
    with_relus = [part for layer in layers for part in (layer, nn.ReLU(inplace=True))]
    return nn.Sequential(shape, *with_relus, pool, nn.Flatten(), nn.Linear(layers[-1].out_channels, 3))


class Shared(nn.Module):
    """A convolution used on two sizes, a linear layer used on rows and on tokens: the gradients of the uses add up."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.linear = nn.Linear(6, 6)
        self.top = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.conv(F.relu(self.first(x))))
        x = F.relu(self.conv(F.max_pool2d(x, 2)))
        tokens = F.relu(self.linear(x.flatten(2).mT))
        return self.top(F.relu(self.linear(tokens.mean(1)) - tokens.amax(1)))


class Functional(nn.Module):
    """Parameters without modules, arguments by name, and a weight that two layers use."""

    layers = {"kernel": ("kernel", ...), "table": ("table", ...), "head.matrix": ("head.matrix", ...)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 2, 3, 2) / 4)
        self.table = nn.Parameter(torch.randn(6, 6) / 3)
        self.head = nn.ParameterDict({"matrix": torch.randn(3, 6)})

    def forward(self, x):
        x = F.conv2d(weight=self.kernel, input=x, padding="same", dilation=(1, 2), groups=2)
        x = x.relu_().mean((2, 3))
        x = F.linear(x, self.table).relu()
        return F.linear(F.linear(input=x, weight=self.table).relu_(), self.head["matrix"])


class Masked(nn.Module):
    """Weights times a mask, and times a number."""

    layers = {"kernel": ("kernel", ...), "tokens": ("tokens", ...), "head": ("head", ...)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        for name, shape in {"kernel": (6, 4, 3, 3), "tokens": (30, 40), "head": (3, 180)}.items():
            mask = torch.rand(shape) > 0.8
            self.register_buffer(f"mask_of_{name}", mask.float())
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * mask))

    def forward(self, x):
        x = F.conv2d(x, self.kernel * self.mask_of_kernel).flatten(2)[..., :40].relu()
        x = F.linear(x, 0.3 * self.tokens * self.mask_of_tokens).relu().flatten(1)
        return F.linear(x, torch.where(self.mask_of_head > 0, self.head, 0.0))


class Product(torch.autograd.Function):
    """A linear map that takes its gradient itself, as torch's tutorial on extending it has one."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


class Products(nn.Module):
    """With one weight as it is, one that is used as the next with and without the function, and rows of a third."""

    def __init__(self):
        super().__init__()
        self.first, self.both, self.rows = nn.Linear(484, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 9, bias=False)
        self.head = nn.Linear(6, 3)
        self.layers = {
            "first": ("first.weight", ...),
            "both": ("both.weight", ...),
            "rows[3:9]": ("rows.weight", slice(3, 9)),
            "head": ("head.weight", ...),
        }

    def forward(self, x):
        x = Product.apply(x.flatten(1), self.first.weight).relu()
        x = Product.apply(self.both(x).relu(), self.both.weight).relu()
        return self.head(Product.apply(x, self.rows.weight[3:]).relu())


class Force(nn.Module):
    """An energy and its gradient: the weights have a gradient that does not come by the outputs of their layers."""

    def __init__(self):
        super().__init__()
        self.first, self.energy, self.head = nn.Linear(484, 8), nn.Linear(8, 1), nn.Linear(4, 3)

    def forward(self, x):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            energy = self.energy(F.softplus(self.first(x.flatten(1))))
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return self.head(force.mean((2, 3))) + energy


class Tied(nn.Module):
    """The output layer has the weights of the embedding, and another those that are a penalty, too."""

    def __init__(self):
        super().__init__()
        self.embed, self.next, self.head = nn.Embedding(122, 6), nn.Linear(6, 6), nn.Linear(122, 3)
        self.layers = {"next": ("next.weight", ...), "embed": ("embed.weight", ...), "head": ("head.weight", ...)}

    def forward(self, x):
        x = self.embed((x > 0).sum((2, 3))).mean(1)
        penalty = self.next.weight.square().sum()
        return self.head(F.linear(self.next(x).relu(), self.embed.weight).relu()) * penalty


class Autoencoder(nn.Module):
    """Decodes with the transpose of what encodes, or uses a row of it otherwise."""

    layers = {"weight": ("weight", ...), "head": ("head.weight", ...)}  # noqa: RUF012

    def __init__(self, decode):
        super().__init__()
        self.weight, self.head, self.decode = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 3), decode

    def forward(self, x):
        return self.head(self.decode(F.linear(x.mean((2, 3)), self.weight).relu(), self.weight))


class Hooked(nn.Sequential):
    """Gradients of some weights are multiplied by a mask, as where a part of a layer is fine-tuned."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(4 * 121, 7), nn.ReLU(), nn.Linear(7, 3))
        mask = torch.arange(7 * 4 * 121).view(7, -1) % 3 == 0
        self[1].weight.register_hook(lambda gradient: gradient * mask)

    def __deepcopy__(self, memo):  # which leaves hooks out
        copied = Hooked()
        copied.load_state_dict(self.state_dict())
        return copied


class Stack(nn.Module):
    """Three matrices in one parameter, as those of experts."""

    layers = {**{f"stack[{i}:{i + 1}]": ("stack", i) for i in range(3)}, "head": ("head.weight", ...)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.stack, self.head = nn.Parameter(torch.randn(3, 9, 4)), nn.Linear(9, 3)

    def forward(self, x):
        x = x.mean((2, 3))
        first, second, third = self.stack
        return self.head(F.linear(x, first).relu() + torch.sigmoid(F.linear(x, second)) * F.linear(x, third))


class Reversing(torch.autograd.Function):
    """Two residual steps whose inputs the backward pass computes again; it leaves the gradients at the weights."""

    @staticmethod
    def forward(ctx, x, one, other):
        a, b = x.chunk(2, 1)
        a = a + one(b)
        b = b + other(a)
        ctx.kept = a, b, one, other
        return torch.cat([a, b], 1)

    @staticmethod
    def backward(ctx, gradient):
        a, b, one, other = ctx.kept
        del ctx.kept  # another backward pass fails
        of_a, of_b = gradient.chunk(2, 1)
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            step = other(a)
            step.backward(of_b)
            before = (b - step).detach().requires_grad_()
            one(before).backward(of_a + a.grad)
        return torch.cat([of_a + a.grad, of_b + before.grad], 1), None, None


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.one, self.other = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 3)
        self.plain = False

    def forward(self, x):
        x = self.first(x)
        if self.plain:
            a, b = x.chunk(2, 1)
            a = a + self.one(b)
            x = torch.cat([a, b + self.other(a)], 1)
        else:
            x = Reversing.apply(x, self.one, self.other)
        return self.head(x.relu().mean((2, 3)))


class Windows(nn.Module):
    """As in Swin: windows of the map become rows of the linear layer's input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(4, 6, 2, stride=2)
        self.window = nn.Linear(6, 8)
        self.top = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.embed(x)[..., :4, :4]).permute(0, 2, 3, 1)
        x = x.unflatten(2, (2, 2)).unflatten(1, (2, 2)).transpose(2, 3)  # two by two windows of two by two
        x = F.relu(self.window(x.flatten(0, 2).flatten(1, 2)))
        return self.top(x.mean(1).unflatten(0, (-1, 4)).mean(1))


class WindowsOfAConvolution(nn.Module):
    """Rows of the images become images of a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, stride=2)
        self.top = nn.Linear(6, 3)

    def forward(self, x):
        rows = x.transpose(1, 2)
        return self.top(F.relu(self.conv(rows.flatten(0, 1))).mean(2).unflatten(0, rows.shape[:2]).amax(1))


class Attention(nn.Module):
    """Attention within the tokens, from one query to them, and with keys and values of other widths."""

    layers = {  # noqa: RUF012
        "embed": ("embed.weight", ...),
        "own.in_proj": ("own.in_proj_weight", ...),
        "own.out_proj": ("own.out_proj.weight", ...),
        "cross.in_proj[0:6]": ("cross.in_proj_weight", slice(0, 6)),
        "cross.in_proj[6:18]": ("cross.in_proj_weight", slice(6, 18)),
        "cross.out_proj": ("cross.out_proj.weight", ...),
        "wide.q_proj": ("wide.q_proj_weight", ...),
        "wide.k_proj": ("wide.k_proj_weight", ...),
        "wide.v_proj": ("wide.v_proj_weight", ...),
        "wide.out_proj": ("wide.out_proj.weight", ...),
        "top": ("top.weight", ...),
    }

    def __init__(self, batch_first, tokens=9):
        super().__init__()
        self.batch_first, self.tokens = batch_first, tokens
        self.embed = nn.Linear(4, 6)
        self.own = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(6, 3, batch_first=batch_first, add_bias_kv=True)
        self.wide = nn.MultiheadAttention(6, 1, batch_first=batch_first, kdim=4, vdim=6)
        self.top = nn.Linear(6, 3)

    def forward(self, x):
        inputs = x.flatten(2)[..., : self.tokens].mT
        inputs = inputs if self.batch_first else inputs.transpose(0, 1)
        x = self.embed(inputs)
        x = x + self.own(x, x, x)[0]
        first = 1 if self.batch_first else 0
        query = x.narrow(first, 0, 1)
        query = query + self.cross(query, x, x)[0]
        query = query + self.wide(query, inputs, x, need_weights=False)[0]
        return self.top(query.squeeze(first))


class Encoder(nn.Module):
    """Torch's own transformer, whose fast path would hide the layers."""

    layers = {  # noqa: RUF012
        "embed": ("embed.weight", ...),
        "block.self_attn.in_proj": ("block.self_attn.in_proj_weight", ...),
        "block.self_attn.out_proj": ("block.self_attn.out_proj.weight", ...),
        "block.linear1": ("block.linear1.weight", ...),
        "block.linear2": ("block.linear2.weight", ...),
        "top": ("top.weight", ...),
    }

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(4, 6)
        self.block = nn.TransformerEncoderLayer(6, 2, 10, batch_first=batch_first)
        self.top = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x.flatten(2).mT[:, :7])
        x = self.block(x) if self.batch_first else self.block(x.transpose(0, 1)).transpose(0, 1)
        return self.top(x.mean(1))


class Table(nn.Module):
    """A layer whose input is the same for all images; it may have as many rows as there are images in a batch."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, 5))
        self.keys = nn.Linear(5, 4)
        self.top = nn.Linear(rows, 3)

    def forward(self, x):
        return self.top(F.relu(x.mean((2, 3)) @ F.relu(self.keys(self.table)).T))


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 121, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)),
    "tokens": lambda: nn.Sequential(
        nn.Conv2d(4, 9, 7), nn.Flatten(2), nn.Linear(25, 8), nn.ReLU(), nn.Linear(8, 2), nn.Flatten(), nn.Linear(18, 3)
    ),
    "as many tokens as images": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Linear(121, 4 * IMAGES_AT_A_TIME),
        nn.Unflatten(2, (IMAGES_AT_A_TIME, 4)),
        nn.Flatten(1, 2),
        nn.ReLU(),
        nn.Linear(4, 2),
        nn.Flatten(),
        nn.Linear(8 * IMAGES_AT_A_TIME, 3),
    ),
    "pointwise": lambda: conv(8, 1),
    "groups": lambda: conv(8, 3, padding=1, groups=2),
    "depthwise": lambda: conv(6, 3, groups=6, bias=False),
    "strides": lambda: conv(8, (3, 2), stride=(2, 1), padding=(0, 2)),
    "dilation": lambda: conv(8, (2, 3), dilation=2, padding=2),
    "same": lambda: conv(8, (2, 3), dilation=2, padding="same"),
    "even same": lambda: conv(8, (4, 2), padding="same"),
    "reflect": lambda: conv(8, 3, padding=2, padding_mode="reflect", groups=2),
    "circular": lambda: conv(8, 3, padding=(1, 2), padding_mode="circular"),
    "leftover pixels": lambda: conv(8, 2, stride=(3, 2)),
    "dropout": lambda: nn.Sequential(conv(8, 3), nn.Dropout(), nn.Linear(3, 3)),
    "sigmoid": lambda: nn.Sequential(conv(8, 3), nn.Sigmoid(), nn.Linear(3, 3)),
    "1d": lambda: in_dimensions(
        1, nn.Conv1d(4, 6, 5, stride=3, padding=3, dilation=2, groups=2), nn.Conv1d(6, 8, 3, padding="same")
    ),
    "3d": lambda: in_dimensions(
        3, nn.Conv3d(1, 4, (2, 3, 3), padding=(0, 2, 1)), nn.Conv3d(4, 6, (2, 1, 3), stride=(1, 2, 3), groups=2)
    ),
    "transposed": lambda: transposed(8, 3),
    "transposed strides": lambda: transposed(8, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
    "transposed dilation": lambda: transposed(8, 3, stride=2, padding=2, dilation=(2, 1), bias=False),
    "transposed groups": lambda: transposed(9, (2, 3), stride=2, padding=1, output_padding=1, groups=3),
    "transposed depthwise": lambda: transposed(6, 2, stride=2, groups=6),
    "transposed 1d": lambda: in_dimensions(
        1, nn.Conv1d(4, 6, 7, stride=4), nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
    ),
    "transposed 3d": lambda: in_dimensions(
        3,
        nn.ConvTranspose3d(1, 4, (1, 2, 3), dilation=(1, 2, 1)),
        nn.ConvTranspose3d(4, 6, 2, stride=(2, 1, 1), groups=2),
    ),
    "linear at few positions": lambda: nn.Sequential(
        *(nn.Flatten(2), nn.Linear(121, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    ),
    "shared": Shared,
    "functional": Functional,
    "masked": Masked,
    "functions of the model's own": Products,
    "force": Force,
    "tied": Tied,
    "stack": Stack,
    "hooks on weights": Hooked,
    "transposed weights of another layer": lambda: Autoencoder(lambda x, weight: F.linear(x, weight.T)),
    "by keyword": lambda: Autoencoder(lambda x, weight: F.linear(input=x, weight=weight.t())),
    "a multiple of the weights of another layer": lambda: Autoencoder(lambda x, weight: x[:, :4] + (2 * weight).mean()),
    "a cast of the weights of another layer": lambda: Autoencoder(
        lambda x, weight: x[:, :4] + weight.double()[2].float()
    ),
    "a multiple beside the weights": lambda: Autoencoder(
        lambda x, weight: F.linear(x[:, 4:8], weight)[:, :4] + F.linear(x[:, :4], 3 * weight)[:, 5:]
    ),
    "a row of the weights of another layer": lambda: Autoencoder(lambda x, weight: x[:, :4] + weight[2]),
    "windows": Windows,
    "windows of a convolution": WindowsOfAConvolution,
    "attention, images first": lambda: Attention(batch_first=True),
    "attention, tokens first": lambda: Attention(batch_first=False),
    "attention, as many tokens as images": lambda: Attention(batch_first=False, tokens=IMAGES_AT_A_TIME),
    "attention, two tokens": lambda: Attention(batch_first=False, tokens=2),
    "encoder, images first": lambda: Encoder(batch_first=True),
    "encoder, tokens first": lambda: Encoder(batch_first=False),
    "table": lambda: Table(7),
    "table of as many rows as images": lambda: Table(IMAGES_AT_A_TIME),
    "table of two rows": lambda: Table(2),
}


def build(network):
    torch.manual_seed(0)
    return NETWORKS[network]()


@pytest.fixture
def images():
    return torch.randn(IMAGES_AT_A_TIME + 5, 4, 11, 11, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def eta():
    return torch.randn(IMAGES_AT_A_TIME + 5, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("piece", [_rates.PIECE, 10])
def test_columns_equal_a_slow_computation(network, piece, images, eta, monkeypatch):
    model = build(network)
    monkeypatch.setattr(_rates, "PIECE", piece)  # the smaller squares the weights one output at a time
    measurement = measure(Layers(model.eval()), (images,), seed=0, eta=eta)
    slow = slow_columns(model, images, eta)
    assert measurement.rates.layers == list(slow)
    for name in slow:
        torch.testing.assert_close(measurement.rates.columns[name], slow[name], rtol=1e-4, atol=0)
    torch.testing.assert_close(measurement.outputs, model(images).detach())


def test_columns_of_reversible_blocks(images, eta):
    torch.manual_seed(0)
    model = Reversible().eval()
    columns = measure(Layers(model), (images,), seed=0, eta=eta).rates.columns
    model.plain = True
    for name, slow in slow_columns(model, images, eta).items():
        torch.testing.assert_close(columns[name], slow, rtol=1e-4, atol=0)
    model.plain = False
    for method in (rescale, partial(rescale, nonhomogeneous="scale")):
        report = method(model, images)
        assert not any(row.note for row in report.layers)
        assert report.output_change < 1e-5
    assert report.spread_after < 1.01
    model = Reversible()
    model.one.weight.grad = kept = torch.ones_like(model.one.weight)
    change_rate(model, images)
    assert model.one.weight.grad is kept
    assert (kept == 1).all()
    assert model.other.weight.grad is None


def test_steps_without_a_gradient_towards_a_fixed_point(images, eta):
    """The layers have the gradient of the last step, and a teacher has none: all images are measured together."""

    class FixedPoint(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.step, self.head = nn.Linear(484, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.teacher = nn.Linear(484, 3)

        def forward(self, x):
            given = x.flatten(1)
            x = y = self.first(given)
            with torch.no_grad():
                target = self.teacher(given)
                for _ in range(3):
                    y = (self.step(y) + x).relu()
            return self.head((self.step(y) + x).relu()) - target

    torch.manual_seed(0)
    model = FixedPoint().eval()
    layers = Layers(model)
    columns = measure(layers, (images,), seed=0, eta=eta).rates.columns
    assert layers.per_image
    assert not layers.unseen
    assert not columns.pop("teacher").any()
    model.layers = {name: (f"{name}.weight", ...) for name in columns}
    for name, slow in slow_columns(model, images, eta).items():
        torch.testing.assert_close(columns[name], slow, rtol=1e-4, atol=0)


def test_a_teacher_beside_what_is_overwritten(images):
    class Taught(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head, self.teacher = nn.Linear(484, 8), nn.Linear(8, 3), nn.Linear(484, 3)

        def forward(self, x):
            x = x.flatten(1)
            with torch.no_grad():
                target = self.teacher(x)
            x = self.first(x)
            return self.head(torch.exp(-x).add_(x)) - target

    torch.manual_seed(0)
    rates = change_rate(Taught(), images).mean
    assert rates["teacher"] == 0
    assert 0 < rates["first"] < math.inf


def test_gradients_of_one_layer_at_a_time_are_in_memory(images, monkeypatch):
    alive, most = weakref.WeakSet(), 0

    def square(layer, uses, images, right=_rates._column_squares):
        nonlocal most
        alive.update(gradient for *_, gradient in uses)
        most = max(most, len(alive))
        return right(layer, uses, images)

    monkeypatch.setattr(_rates, "_column_squares", square)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(12)))
    measure(Layers(model.eval()), (images,), seed=0, draws=2)
    assert most <= 2
    assert len(alive) == 0


def test_nothing_is_kept_of_what_was_measured(images):
    """Functions that autograd holds know what holds the graph: a circle that no collector sees."""
    model = build(next(iter(NETWORKS)))
    for _ in range(2):
        before = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
        change_rate(model, images)
        gc.collect()
    assert sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()) == before


class Heads(nn.Module):
    """Nested outputs, of which one does not depend on any weight."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = nn.Conv2d(4, 6, 3), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        hidden = F.relu(self.body(x))
        pooled = hidden.mean((2, 3))
        return {"scores": [self.one(pooled), (self.other(hidden.permute(0, 2, 3, 1)),)], "inputs": x, "none": None}


class Joined(nn.Module):
    """What it returns in one row per image."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, x):
        one, (other,) = self.heads(x)["scores"]
        return torch.cat([one, other.flatten(1)], 1)


def test_all_outputs_of_a_model_count(images):
    torch.manual_seed(0)
    model, images, generator = Heads(), images[:IMAGES_AT_A_TIME], torch.Generator().manual_seed(5)
    eta = [
        torch.randn(IMAGES_AT_A_TIME, 3, generator=generator),
        torch.randn(IMAGES_AT_A_TIME, 9, 9, 2, generator=generator).flatten(1),
    ]
    slow = slow_columns(Joined(model), images, torch.cat(eta, 1))
    rates = change_rate(model, images, seed=5)
    assert [f"heads.{name}" for name in rates.layers] == list(slow)
    for name in rates.layers:
        torch.testing.assert_close(rates.columns[name], slow[f"heads.{name}"], rtol=1e-4, atol=0)


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


@pytest.mark.parametrize("network", ["groups", "tied", "force", "functions of the model's own"])
def test_frozen_layers_are_measured_too(network, images):
    model = build(network)
    rates = change_rate(model, images)
    children = [*model.children()]
    for frozen in (nn.ModuleList(children[: len(children) // 2]), model):
        frozen.requires_grad_(False)
        for name, column in change_rate(model, images).columns.items():
            torch.testing.assert_close(column, rates.columns[name])
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


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


@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("network", ["linear", "tokens", "groups", "tied", "force"])
def test_gradients_whose_squares_float32_does_not_hold(network, factor, images):
    class Multiplied(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return factor * self.model(x)

    model = build(network)
    expected = {f"model.{name}": factor * rate for name, rate in change_rate(model, images).mean.items()}
    assert change_rate(Multiplied(model), images).mean == pytest.approx(expected, rel=1e-3, abs=0)


def test_the_summaries():
    columns = {"a": torch.tensor([1.0, 2.0, 6.0]), "b": torch.tensor([10.0, 14.0]), "c": torch.tensor([2.0])}
    rates = Rates(columns)
    assert rates.layers == ["a", "b", "c"]
    assert rates.mean == {"a": 3, "b": 12, "c": 2}
    assert rates.cv == pytest.approx({"a": (14 / 3) ** 0.5 / 3, "b": 1 / 6, "c": 0})
    assert rates.spread == 6


def test_the_spread_is_infinite_where_a_layer_does_not_learn():
    assert Rates({"still": torch.zeros(3), "other": torch.ones(2)}).spread == math.inf
