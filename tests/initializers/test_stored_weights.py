"""Weights with which a layer computes other than as they are stored: masked, times a constant, in other dimensions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from initializers import InitializationError, change_rate, initialize, lsuv, rescale
from initializers._layers import Layers
from initializers._rates import measure

CLOSE = {"rtol": 0, "atol": 1e-3}


@pytest.fixture
def images():
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Masked(nn.Conv2d):
    """A convolution that sees what lies above and to the left, as that of PixelCNN."""

    def __init__(self, how, *args, **kwargs):
        super().__init__(*args, padding=1, **kwargs)
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 1:] = mask[:, :, 2] = 0
        self.how = how
        self.register_buffer("mask", mask)

    def forward(self, x):
        if self.how == "of its data":
            self.weight.data *= self.mask
        elif self.how == "other data":
            self.weight.data = self.weight.data * self.mask
        else:
            with torch.no_grad():
                self.weight.masked_fill_(self.mask == 0, 0.0)
        return super().forward(x)


def masked(how="of its data", bias=True):
    torch.manual_seed(0)
    layers = [Masked(how, 3, 8, 3), nn.ReLU(), Masked(how, 8, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(400, 5))


def outputs_of(model, images):
    found = []
    hooks = [
        model[i].register_forward_hook(lambda module, given, output: found.append(output.movedim(1, 0).flatten(1)))
        for i in (0, 2, 4, 6)
    ]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("how", ["of its data", "other data", "in place"])
@pytest.mark.parametrize("filters", ["gaussian", "kmeans", "orthonormal", None])
def test_masked_weights(images, how, filters):
    model = masked(how)
    report = initialize(model, images, filters, between=False)
    assert not model[2].weight[model[2].mask == 0].any()  # none that the next pass would change
    for values in outputs_of(model, images):
        torch.testing.assert_close(values.std(1, correction=0), torch.ones(len(values)), atol=1e-3, rtol=0)
        torch.testing.assert_close(values.mean(1), torch.full((len(values),), 0.1), atol=1e-3, rtol=0)
    assert [row.name for row in report.layers] == ["0", "2", "4", "6"]
    before = copy.deepcopy(model)(images)
    report = rescale(model, images)
    assert report.spread_after < report.spread_before
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["of its data", "other data", "in place"])
def test_the_rates_of_masked_weights_are_those_that_are_reported(images, how):
    model = masked(how)
    report = initialize(model, images[:16], nonhomogeneous="scale")
    assert change_rate(model, images[:16]).spread < 1.2  # of one draw of the top gradients where the report has four
    assert report.spread_after < 1.01


def test_without_a_bias_the_mean_is_as_it_comes(images):
    model = masked(bias=False)
    report = initialize(model, images, "kmeans", between=False)
    notes = {row.name: row.note for row in report.layers if row.note}
    assert notes["0"] == "the model's forward pass sets some of its weights to 0"
    assert notes["2"] == notes["0"] + " and its mean is as it comes"
    values = outputs_of(model, images)[1]
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(8), atol=1e-3, rtol=0)


def test_lsuv_of_masked_weights(images):
    model = masked()
    lsuv(model, images)
    assert all(abs(values.var().item() - 1) < 0.03 for values in outputs_of(model, images))


def limited(largest):
    class Limited(nn.Conv2d):
        """As EEGNet's: its filters have a norm of at most `largest`."""

        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, self.largest)
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Limited(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 5))
    model[0].largest = largest
    return model


class Positive(nn.Conv2d):
    def forward(self, x):
        self.weight.data.clamp_(min=0)
        return super().forward(x)


@pytest.mark.parametrize("call", [initialize, lsuv])
@pytest.mark.parametrize("make", [lambda: limited(0.05), lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Positive(4, 5, 3))])
def test_other_changes_are_an_error(images, call, make):
    model = make()
    model(images)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InitializationError, match=r"layer [01]: the forward pass .* changes its weights"):
        call(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_remedy_holds(images):
    model = limited(0.05)
    model[0].largest = 1e9
    initialize(model, images)


class Statistics(TorchFunctionMode):
    """Standard deviations and means of the channels of what convolutions and linear maps give."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        if func.__name__ in ("conv2d", "linear", "matmul"):
            channels = output.movedim(1 if output.ndim == 4 else -1, 0).flatten(1)
            self.found.append((channels.std(1, correction=0), channels.mean(1)))
        return output


def assert_normalised(model, images, mean=0.1):
    with torch.no_grad(), Statistics() as statistics:
        model.eval()(images)
    for std, found in statistics.found:
        torch.testing.assert_close(std, torch.ones_like(std), atol=1e-3, rtol=0)
        if mean is not None:
            torch.testing.assert_close(found, torch.full_like(found, mean), atol=1e-3, rtol=0)


class Net(nn.Module):
    """A convolution, one whose weights `compute` gives, and a linear layer."""

    def __init__(self, compute, shape=(8, 8, 3, 3), bias=(8,), of_bias=lambda model: model.bias):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(bias))
        self.compute, self.of_bias = compute, of_bias
        self.register_buffer("small", torch.tensor(0.2))
        self.register_buffer("mask", torch.rand(8, 8, 3, 3) > 0.4)
        self.frozen = nn.Parameter(self.mask.float(), requires_grad=False)
        self.register_buffer("kernel", torch.tensor([1.0, 0.0, 1.0]))
        self.strength = nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, x):
        x = F.conv2d(self.first(x).relu(), self.compute(self), self.of_bias(self), padding=1)
        return self.last(x.relu().mean((2, 3)))


COMPUTED = {
    "times a number": {"compute": lambda model: model.weight * 0.1},
    "a copy": {"compute": lambda model: model.weight.clone()},
    "in a precision that it has": {"compute": lambda model: model.weight.to(torch.float32)},
    "in the precision of another": {"compute": lambda model: model.weight.double().type_as(model.bias)},
    "in another precision, and times a number": {"compute": lambda model: (0.1 * model.weight.double()).to(model.bias)},
    "a number times it": {"compute": lambda model: 3 * model.weight},
    "divided": {"compute": lambda model: model.weight / 7.0},
    "by a function": {"compute": lambda model: torch.mul(model.weight, 0.1)},
    "a buffer": {"compute": lambda model: model.weight * model.small},
    "twice": {"compute": lambda model: (model.weight * 0.3) * model.small},
    "and the bias": {"compute": lambda model: model.weight * 0.1, "of_bias": lambda model: model.bias * 0.01},
    "the bias alone": {"compute": lambda model: model.weight, "of_bias": lambda model: 2.0 * model.bias},
    "a mask": {"compute": lambda model: model.weight * model.mask},
    "a mask first": {"compute": lambda model: model.mask.float() * model.weight},
    "a mask and a number": {"compute": lambda model: model.weight * model.mask * 0.1},
    "a frozen mask": {"compute": lambda model: model.weight * model.frozen},
    "a frozen mask first": {"compute": lambda model: model.frozen * model.weight},
    "where a mask is": {"compute": lambda model: torch.where(model.mask, model.weight, 0.0)},
    "where a frozen mask is not": {
        "compute": lambda model: torch.where(model.frozen == 0, torch.zeros_like(model.weight), model.weight)
    },
    "filled": {"compute": lambda model: model.weight.masked_fill(~model.mask, value=0)},
    "what a mask leaves out": {"compute": lambda model: model.weight * ~model.mask},
    "a mask of the kernel": {"compute": lambda model: 0.5 * (model.kernel * model.weight)},
    "a triangle of the kernel": {"compute": lambda model: torch.tril(model.weight, diagonal=1)},
    "a frozen number": {"compute": lambda model: model.weight * model.strength},
    "by a frozen number": {"compute": lambda model: model.weight / model.strength},
    "flat": {"compute": lambda model: model.weight.view(8, 8, 3, 3), "shape": (8, 72)},
    "flat, times a number": {"compute": lambda model: (model.weight * 0.1).view(8, 8, 3, 3), "shape": (8, 72)},
    "channels last": {"compute": lambda model: model.weight.permute(0, 3, 1, 2), "shape": (8, 3, 3, 8)},
    "as TensorFlow": {"compute": lambda model: model.weight.permute(3, 2, 0, 1), "shape": (3, 3, 8, 8)},
    "the bias in four dimensions": {
        "compute": lambda model: model.weight,
        "bias": (1, 8, 1, 1),
        "of_bias": lambda model: model.bias.flatten(),
    },
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("filters", ["gaussian", "kmeans", None])
def test_weights_that_are_computed_of_one_parameter_and_constants(images, kind, filters):
    model = Net(**COMPUTED[kind])
    report = initialize(model, images, filters, between=False)
    assert [row.name for row in report.layers] == ["first", "weight", "last"]
    assert not report.kept
    assert_normalised(model, images)
    before = model(images)
    assert change_rate(model, images).spread > 1.01
    for options in ({}, {"nonhomogeneous": "scale"}):
        assert rescale(model, images, **options).spread_after < 1.01
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    report = initialize(model, images, "gaussian", between=False, seed=1)  # with the auxiliary scalings
    assert [row.filters for row in report.layers] == ["gaussian"] * 3
    assert_normalised(model, images)


def in_place(change, factor=None):
    """Compute with what `change` makes of a copy of the weights, or of a multiple of them."""

    def compute(model):
        weight = model.weight.clone() if factor is None else model.weight * factor
        change(weight)
        return weight

    return compute


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("filters", ["gaussian", None])
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.add_(0.1),
        lambda weight: weight[0].zero_(),
        lambda weight: weight.clamp_(-0.3, 0.3),
        lambda weight: weight.__setitem__((slice(None), 0), 1.0),
        lambda weight: weight.view(-1)[3].mul_(2),
    ],
)
def test_copies_that_are_changed_in_place_are_computed(images, change, filters, factor):
    """The changes would be lost where the weights are set."""
    model = Net(in_place(change, factor))
    before = model.weight.detach().clone()
    report = initialize(model, images, filters, between=False)
    assert [row.name for row in report.layers] == ["first", "last"]
    assert report.kept == {"weight": f"used by {'clone' if factor is None else 'mul'}"}
    assert torch.equal(model.weight, before)


class Experts(nn.Module):
    """Matrices of all experts in one parameter, as in mixtures of experts of transformers."""

    def __init__(self, experts=4, product=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, experts), nn.Linear(8, 5)
        shape = (experts, 8, 12) if product else (experts, 12, 8)
        self.up, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(experts, 12))
        self.down, self.product = nn.Parameter(torch.randn(experts, 8, 12)), product

    def expert(self, x, number):
        up = x @ self.up[number] if self.product else F.linear(x, self.up[number], self.bias[number])
        return F.linear(up.relu(), self.down[number])

    def forward(self, x):
        x = self.first(x).relu().mean((2, 3))
        chosen = self.gate(x).argmax(1)
        mixed = torch.zeros_like(x)
        for number in range(len(self.up)):
            (rows,) = torch.where(chosen == number)
            mixed.index_add_(0, rows, self.expert(x[rows], number))
        return self.last(mixed)


@pytest.mark.parametrize("filters", ["gaussian", "pca", None])
@pytest.mark.parametrize("product", [False, True])
def test_experts_in_one_parameter(images, filters, product):
    images = torch.cat([images, images.flip(3), images.flip(2)]) * torch.linspace(0.1, 3, 144).view(-1, 1, 1, 1)
    model = Experts(product=product).eval()
    report = initialize(model, images, filters, between=False)
    rows = [f"{name}[{number}:{number + 1}]" for number in range(4) for name in ("up", "down")]
    assert {row.name for row in report.layers} == {"first", "gate", "last", *rows}
    assert not {*report.kept} - {"bias"}
    with torch.no_grad():
        x = model.first(images).relu().mean((2, 3))
        chosen = model.gate(x).argmax(1)
        reached = [number for number in range(4) if (chosen == number).sum() > 12]
        for number in reached:
            up = model.expert(x[chosen == number], number)
            torch.testing.assert_close(up.std(0, correction=0), torch.ones(8), **CLOSE)
    assert len(reached) > 1
    before = model(images).detach()
    for options in ({}, {"nonhomogeneous": "scale"}):
        report = rescale(model, images, **options)
        assert report.spread_after < (1.01 if options else report.spread_before)
        torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-4)


def test_a_bias_that_is_one_number(images):
    model = Net(lambda model: model.weight, bias=(), of_bias=lambda model: model.bias.expand(8))
    report = initialize(model, images, "gaussian")
    assert {row.name: row.note for row in report.layers}["weight"].startswith("its bias is computed or frozen")
    assert report.output_change < 1e-5


class TwoWidths(Net):
    """The second convolution runs narrow, and then wide."""

    def __init__(self):
        super().__init__(compute=None)

    def forward(self, x):
        x = self.first(x).relu()
        x = torch.cat([F.conv2d(x, self.weight[:4], padding=1).relu(), x[:, :4]], 1)
        return self.last(F.conv2d(x, self.weight, padding=1).relu().mean((2, 3)))


def test_layers_that_share_rows(images):
    """The wide one sets the weights anew, which is no rounding."""
    report = initialize(TwoWidths(), images, "gaussian", between=False)
    notes = {row.name: row.note for row in report.layers}
    assert notes.keys() == {"first", "weight[0:4]", "weight", "last"}
    assert not notes["first"]
    for name in ("weight[0:4]", "weight", "last"):
        assert notes[name].startswith("that weight[0:4] and weight share weights changes its mean or std by up to")


def test_rows_that_no_layer_uses_are_listed(images):
    """As experts that no image reaches where the model skips these."""

    class Some(Experts):
        def forward(self, x):
            x = self.first(x).relu().mean((2, 3))
            return self.last(self.expert(x, 1) + self.expert(x, 3) * self.down[0, 0, 0])

    model = Some(experts=6)
    before = copy.deepcopy(model)
    report = initialize(model, images, "gaussian")
    uses = {"up[0:1]": "not used", "up[2:3]": "not used", "up[4:6]": "not used", "down[0:1]": "used by mul"}
    assert {name: use for name, use in report.kept.items() if name in uses} == uses
    assert {"down[2:3]", "down[4:6]"} < report.kept.keys()
    assert {row.name for row in report.layers} == {"first", "up[1:2]", "up[3:4]", "down[1:2]", "down[3:4]", "last"}
    for rows in (slice(0, 1), slice(2, 3), slice(4, 6)):
        assert torch.equal(model.up[rows], before.up[rows])


class OneVector(nn.Module):
    """All of its weights and biases are parts of one vector, as where a network is a point in a space."""

    SHAPES = ((8, 3, 3, 3), (8,), (8, 8, 3, 3), (8,), (5, 8), (5,))

    def __init__(self):
        super().__init__()
        self.sizes = [torch.Size(shape).numel() for shape in self.SHAPES]
        self.vector = nn.Parameter(0.1 * torch.randn(sum(self.sizes), generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        split = zip(self.vector.split(self.sizes), self.SHAPES, strict=True)
        first, first_bias, second, second_bias, last, last_bias = (part.view(shape) for part, shape in split)
        x = F.conv2d(F.conv2d(x, first, first_bias).relu(), second, second_bias)
        return F.linear(x.relu().mean((2, 3)), last, last_bias)


@pytest.mark.parametrize("filters", ["gaussian", "kmeans", None])
@pytest.mark.parametrize("nonhomogeneous", ["pin", "scale"])
def test_weights_that_are_parts_of_one_vector(images, filters, nonhomogeneous):
    model = OneVector()
    report = initialize(model, images, filters, between=False)
    assert [row.name for row in report.layers] == ["vector[0:216]", "vector[224:800]", "vector[808:848]"]
    assert not report.kept
    assert_normalised(model, images)
    before = model(images)
    for _ in range(2):  # with the auxiliary scaling that the first leaves
        report = rescale(model, images, nonhomogeneous=nonhomogeneous)
        assert report.spread_after < 1.001
        assert report.output_change < 1e-5
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    initialize(model, images, filters, between=False)
    assert_normalised(model, images)
    lsuv(model, images)


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_those_of_what_is_stored(images, kind, scaled):
    """Against those of autograd, image by image; also with auxiliary scalings."""
    model = Net(**COMPUTED[kind]).eval()
    if scaled:
        initialize(model, images, nonhomogeneous="scale")
    parameters = {
        name: next(p for path, p in model.named_parameters() if path.startswith(start) and "bias" not in path)
        for name, start in {"first": "first", "weight": ("weight", "parametrizations"), "last": "last"}.items()
    }
    eta = torch.randn(len(images), 5, generator=torch.Generator().manual_seed(0))
    squares = dict.fromkeys(parameters, 0.0)
    for image, top in zip(images.split(1), eta.split(1), strict=True):
        gradients = torch.autograd.grad((model(image) * top).sum(), [*parameters.values()])
        for name, gradient in zip(parameters, gradients, strict=True):
            squares[name] += gradient.square().mean().item() / len(images)
    found = measure(Layers(model), (images,), seed=0, eta=eta).squares
    assert {name: columns.mean().item() for name, columns in found.items()} == pytest.approx(squares, rel=1e-4)


def test_a_rate_is_that_of_what_is_stored(images):
    """A layer that computes with a tenth of what it stores learns a hundredth as fast."""
    rates = []
    for factor in (1.0, 0.1):
        model = Net(lambda model, factor=factor: model.weight * factor)
        with torch.no_grad():
            model.weight.copy_(torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)) / factor)
        rates.append(change_rate(model, images).mean)
    assert rates[1]["weight"] == pytest.approx(0.01 * rates[0]["weight"], rel=1e-4)
    assert rates[1]["first"] == pytest.approx(rates[0]["first"], rel=1e-4)


def test_what_masks_hide_does_not_count(images):
    model = Net(COMPUTED["a mask"]["compute"])
    rates = change_rate(model, images).mean
    with torch.no_grad():
        model.weight[~model.mask] = 1e3
    assert change_rate(model, images).mean == pytest.approx(rates)


def test_pruned_layers(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    prune.random_unstructured(model[2], "weight", 0.4)
    prune.l1_unstructured(model[5], "weight", 0.2)
    mask = model[2].weight_mask.clone()
    report = initialize(model, images, between=False)
    assert [row.name for row in report.layers] == ["0", "2.weight_orig", "5.weight_orig"]
    assert_normalised(model, images)
    assert torch.equal(model[2].weight_mask, mask)
    prune.remove(model[2], "weight")
    assert torch.equal(model[2].weight == 0, mask == 0)


@pytest.mark.parametrize("filters", ["kmeans", "gaussian"])
def test_channels_that_are_pruned_whole(images, filters):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    prune.ln_structured(model[0], "weight", 0.25, n=2, dim=0)
    prune.random_structured(model[2], "weight", 0.5, dim=0)
    report = initialize(model, images, filters)
    notes = {row.name: row.note for row in report.layers}
    assert notes["0.weight_orig"].endswith("sets some of its weights to 0, and all of those of 2 of 8 channels")
    assert all(row.std_after == pytest.approx(1, abs=1e-3) for row in report.layers)
    assert report.output_change < 1e-5
    initialize(model, images, filters, between=False)
    x = images
    for layer in model:
        x = layer(x)
        if hasattr(layer, "weight_mask"):
            left = layer.weight_mask.flatten(1).any(1)
            torch.testing.assert_close(x[:, left].std((0, 2, 3), correction=0), torch.ones(int(left.sum())), **CLOSE)
            torch.testing.assert_close(x.mean((0, 2, 3)), torch.full((8,), 0.1), **CLOSE)
            assert (x[:, ~left] == 0.1).all()


def test_an_autoregressive_network(images):
    """Its first output sees no input, as a mask hides them all."""

    class MaskedLinear(nn.Linear):
        def __init__(self, inputs, outputs, strict):
            super().__init__(inputs, outputs)
            degrees = [torch.arange(size) % (5 if size == 16 else 6) for size in (outputs, inputs)]
            mask = degrees[0].unsqueeze(1) > degrees[1] if strict else degrees[0].unsqueeze(1) >= degrees[1]
            self.register_buffer("mask", mask.float())

        def forward(self, x):
            return F.linear(x, self.weight * self.mask, self.bias)

    torch.manual_seed(0)
    model, x = nn.Sequential(MaskedLinear(6, 16, False), nn.ReLU(), MaskedLinear(16, 6, True)), images.flatten(1)[:, :6]
    initialize(model, x, between=False)
    output = model(x)
    assert (output[:, 0] == 0.1).all()
    torch.testing.assert_close(output[:, 1:].std(0, correction=0), torch.ones(5), **CLOSE)
    before = model(x)
    assert rescale(model, x).spread_after < 1.01
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_parametrizations_and_hooks_that_multiply(images):
    class Scale(nn.Module):
        def forward(self, weight):
            return weight * 0.2

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    parametrize.register_parametrization(model[2], "weight", Scale())
    initialize(model, images, between=False)
    assert_normalised(model, images)
    report = rescale(model, images, nonhomogeneous="scale")
    notes = {row.name: row.note for row in report.layers}
    assert notes["2"] == "not scaled, as its weight has another parametrization"


def test_random_masks_are_no_masks(images):
    """DropConnect draws another one in every pass."""
    model = Net(lambda model: model.weight * (torch.rand(8, 8, 3, 3) > 0.5).float())
    report = initialize(model, images, between=False)
    assert report.kept == {"weight": "used by mul"}
