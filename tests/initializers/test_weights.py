"""Weights as people have them: turned, in products and einsums, normalised, computed, lazy, odd in memory, scripted."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from initializers import InitializationError, change_rate, initialize, lsuv, rescale
from initializers._scaled import AuxiliaryScaling


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(48, 3, 12, 12, generator=generator) * torch.linspace(0.2, 2, 48).view(-1, 1, 1, 1)


def state(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same(model, before):
    now = state(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in now.items())


def assert_normalised(values, mean=0.1):
    """Of a layer's output, channels last."""
    values = values.detach().double().flatten(0, -2)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1]).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(values.mean(0), torch.full((values.shape[1],), mean).double(), atol=1e-3, rtol=0)


# Products with a parameter.


class Turned(nn.Module):
    """A linear layer whose weight has the inputs first, as GPT-2's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(48, 16)
        self.up, self.down = Turned(16, 24), Turned(24, 16)
        self.matrix, self.shift = nn.Parameter(torch.randn(16, 20)), nn.Parameter(torch.zeros(20))
        self.rows, self.columns = nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(12, 14))
        self.turned = nn.Parameter(torch.randn(14, 8))
        self.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x, keep=None):
        keep = {} if keep is None else keep
        x = self.embed(x.reshape(len(x), 9, 48)).relu()
        keep["up"] = self.up(x)
        keep["down"] = self.down(keep["up"].relu())
        x = x + keep["down"]
        keep["matrix"] = x @ self.matrix
        keep["rows"] = torch.einsum("b t i, o i -> b t o", (keep["matrix"] + self.shift).relu(), self.rows)
        keep["columns"] = torch.einsum("ij,...i->...j", self.columns, keep["rows"].relu())
        keep["turned"] = F.linear(keep["columns"].relu(), self.turned.t())
        x = keep["turned"].mean(1).expand(4, -1, -1)
        return torch.bmm(x, self.experts).sum(0)


def test_products_with_a_parameter_are_layers(images):
    torch.manual_seed(0)
    model = Products()
    experts = model.experts.clone()
    report = initialize(model, images, between=False)
    assert [row.name for row in report.layers] == ["embed", "up", "down", "matrix", "rows", "columns", "turned"]
    outputs = {}
    model.eval()(images, outputs)
    for name, values in outputs.items():
        assert_normalised(values, 0.1 if name in ("up", "down") else 0.0)
    assert report.kept == {"experts": "used by bmm"}
    assert torch.equal(model.experts, experts)
    assert "not initialized: experts (used by bmm)" in str(report)


@pytest.mark.parametrize("options", [{}, {"nonhomogeneous": "scale"}])
def test_their_rates_become_equal_and_the_function_stays(images, options):
    torch.manual_seed(0)
    model = Products()
    initialize(model, images, between=False)
    expected = model.eval()(images)
    report = rescale(model, images, **options)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    # The image itself is added to what the first three give, and holds their scale.
    assert report.spread_after < (1.01 if options else 0.7 * report.spread_before)
    assert change_rate(model, images).spread < 2
    lsuv(Products(), images)


def test_a_rate_is_that_of_a_linear_layer(images):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Flatten(), nn.Linear(432, 12), nn.ReLU(), nn.Linear(12, 5))
    other = nn.Sequential(nn.Flatten(), Turned(432, 12), nn.ReLU(), Turned(12, 5))
    for i in (1, 3):
        other[i].weight.data.copy_(one[i].weight.data.t())
        other[i].bias.data.copy_(one[i].bias.data)
    torch.testing.assert_close(change_rate(other, images).mean, change_rate(one, images).mean)
    for model in (one, other):
        rescale(model, images)
    for i in (1, 3):
        torch.testing.assert_close(other[i].weight.t(), one[i].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: 2 * torch.addmm(w.new_zeros(8), x, w, beta=0.5),
        lambda x, w: torch.einsum("bi,ij->bi", x, w),
        lambda x, w: torch.einsum("bi,ij->ji", x, w).mT.sum(1, keepdim=True).expand(-1, 8)[:1].expand(len(x), 8) + x,
        lambda x, w: torch.einsum("ij,ij->ij", w, w).sum() * x,
        lambda x, w: (w @ x.mT).mT,
        lambda x, w: x * w.mean(0),
        lambda x, w: x @ torch.exp(w),
    ],
)
def test_what_is_no_linear_layer_is_kept_and_named(images, product):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w, self.b = nn.Linear(432, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 5)

        def forward(self, x):
            return self.b(product(self.a(x.flatten(1)).relu(), self.w).relu())

    torch.manual_seed(0)
    model = Net()
    before = model.w.clone()
    report = initialize(model, images)
    assert [*report.kept] == ["w"]
    assert report.kept["w"].startswith("used by ")
    assert torch.equal(model.w, before)
    assert report.output_change < 1e-4


class Mirror(nn.Module):
    """An autoencoder with one weight."""

    def __init__(self, first):
        super().__init__()
        self.first, self.layer, self.bias = first, nn.Linear(432, 16), nn.Parameter(torch.zeros(432))

    def forward(self, x):
        x = self.layer(x.flatten(1)).relu()
        return F.linear(x, self.layer.weight.t(), self.bias) if self.first == "linear" else x @ self.layer.weight


class Twins(nn.Module):
    """Two layers of one weight, with biases of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(*sizes) for sizes in ((432, 8), (8, 8), (8, 8), (8, 5)))
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x.flatten(1)).relu()).relu()).relu())


@pytest.mark.parametrize(
    ("make", "name", "use"),
    [
        (lambda: Mirror("linear"), "layer", "linear"),
        (lambda: Mirror("matmul"), "layer", "matmul"),
        (Twins, "b", "linear"),
    ],
)
def test_a_weight_of_two_uses_is_normalised_in_the_first_and_named(images, make, name, use):
    torch.manual_seed(0)
    model = make()
    report = initialize(model, images, between=False)
    row = next(row for row in report.layers if row.name == name)
    assert row.note.startswith(f"its weights are used by {use}")
    assert row.std_after == pytest.approx(1, abs=1e-4)
    untouched = copy.deepcopy(model)
    assert rescale(model, images).output_change < 1e-5
    report = rescale(untouched, images, nonhomogeneous="scale")
    notes = [row.note for row in report.layers if "not scaled, as its weight belongs to several modules" in row.note]
    assert len(notes) == (make is Twins)
    assert report.spread_after < (1.05 if make is not Twins else 0.7 * report.spread_before)


# Weights that are computed.


def normalised(kind, layer, **options):
    if kind == "parametrization":
        return parametrizations.weight_norm(layer, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, **options)


def network(kind=None):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 3)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 10), nn.ReLU())
    model.append(nn.Linear(10, 5))
    if kind is not None:
        for i in (0, 2, 4, 8):
            normalised(kind, model[i], **({"dim": None} if i == 4 else {}))
    return model


PARTS = {  # the names of g and v
    "parametrization": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    "hook": ("weight_g", "weight_v"),
}
KINDS = [*PARTS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"between": False}, {}, {"filters": "gaussian"}, {"filters": None}])
def test_weight_norm_is_initialized_as_if_it_were_not_there(images, kind, options):
    plain, model = network(), network(kind)
    names = [name for name, _ in model.named_parameters()]
    expected, report = initialize(plain, images, **options), initialize(model, images, **options)
    assert [name for name, _ in model.named_parameters()] == names
    assert [row.name for row in report.layers] == [row.name for row in expected.layers]
    assert report.kept == {}
    torch.testing.assert_close(model(images), plain(images), rtol=1e-3, atol=1e-3)
    if options.get("between", True):
        assert report.spread_after == pytest.approx(expected.spread_after, rel=0.05)
        assert report.output_change < 1e-4
    size, direction = PARTS[kind]
    g, v = model[0].get_parameter(size), model[0].get_parameter(direction)
    torch.testing.assert_close(g, torch.norm_except_dim(v, 2, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_and_errors_leave_weight_norm_as_it_was(images, kind):
    model = network(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    before, output = state(model), model(images).detach()
    change_rate(model, images)
    assert_same(model, before)
    with pytest.raises(InitializationError):
        initialize(model, images[:1].expand(4, -1, -1, -1) * 0 + torch.nan)
    with pytest.raises(InitializationError, match="zero variance"):
        initialize(model, images[:1], between=False)
    assert_same(model, before)
    assert torch.equal(model(images), output)
    assert rescale(model, images).output_change < 1e-5
    torch.testing.assert_close(model(images), output, rtol=1e-3, atol=1e-3)
    lsuv(model, images)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_norm_takes_the_auxiliary_scaling_as_the_size_of_its_direction(images, kind):
    model = network(kind)
    for i in (1, 5):
        model[i] = nn.ELU()  # which pins
    report = initialize(model, images, nonhomogeneous="scale")
    assert report.spread_after < 1.0001 < report.spread_before
    assert report.output_change < 1e-5
    assert not any("not scaled" in row.note for row in report.layers)
    added = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryScaling)]
    assert [name for name in added if "weight" in name] == ["10.parametrizations.weight.0"]
    before, output = state(model), model(images).detach()
    again = rescale(model, images, nonhomogeneous="scale")
    assert again.spread_before == pytest.approx(1, abs=1e-4)
    assert list(state(model)) == list(before)
    torch.testing.assert_close(model(images), output, rtol=1e-4, atol=1e-4)
    plain = network()
    plain[1], plain[5] = nn.ELU(), nn.ELU()
    assert report.spread_before == pytest.approx(initialize(plain, images).spread_before, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_change_rates_of_weight_norm_are_those_of_its_direction(images, kind):
    model = network(kind)
    rates = change_rate(model, images).mean
    _, direction = PARTS[kind]
    with torch.no_grad():
        model[2].get_parameter(direction).mul_(3)
    larger = change_rate(model, images).mean
    assert larger == pytest.approx(rates | {"2": rates["2"] / 9}, rel=1e-4)


def test_a_part_of_what_weight_norm_normalises_is_not_scaled(images):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = normalised("parametrization", nn.Linear(12, 8, bias=False))
            self.last = nn.Linear(12, 5)

        def forward(self, x):
            x = x.mean(3).flatten(2)[:, :, :12]
            one, other = self.both.weight.chunk(2)
            return self.last(torch.cat([torch.tanh(F.linear(x, part)) for part in (one, other, one)], -1))

    model = Packed()
    report = initialize(model, images, nonhomogeneous="scale")
    notes = {row.name: row.note for row in report.layers}
    assert all("not scaled, as its weight is a part of what weight_norm" in notes[f"both[{i}:{i + 4}]"] for i in (0, 4))
    assert "not scaled" not in notes["last"]
    model.last = nn.Identity()
    with pytest.raises(InitializationError, match="finds nothing to scale: its weight is a part of what weight_norm"):
        rescale(model, images, nonhomogeneous="scale")


def test_a_frozen_weight_norm_stays(images):
    model = network("parametrization")
    model[0].requires_grad_(False)
    before = state(model[0])
    report = initialize(model, images)
    assert_same(model[0], before)
    assert "0" not in [row.name for row in report.layers]


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


COMPUTED = {
    "spectral_norm": lambda: (
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
        parametrizations.spectral_norm(nn.Linear(800, 5)),
    ),
    "orthogonal": lambda: (
        parametrizations.orthogonal(nn.Conv2d(3, 8, 1), "weight"),
        parametrizations.orthogonal(nn.Linear(1152, 5)),
    ),
    "standardised": lambda: (Standardised(3, 8, 3), Standardised(8, 5, 10)),
    "old spectral_norm": lambda: (
        nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)),
        nn.utils.spectral_norm(nn.Linear(800, 5)),
    ),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_kept_or_the_message_says_so(images, kind):
    torch.manual_seed(0)
    first, last = COMPUTED[kind]()
    parts = (
        [first, nn.ReLU(), nn.Flatten(), last]
        if isinstance(last, nn.Linear)
        else [first, nn.ReLU(), last, nn.Flatten()]
    )
    model = nn.Sequential(*parts)
    before = state(model)
    for call in (initialize, lsuv, rescale, change_rate):
        with pytest.raises(InitializationError, match=r"computes the weights of all its layers.*remove"):
            call(model, images)
    assert_same(model, before)
    model.append(nn.Linear(5, 4))
    report = initialize(model, images)
    assert [row.name for row in report.layers] == ["4"]
    assert len(report.kept) == 2
    assert all(reason.startswith("used by") for reason in report.kept.values())


def test_the_remedy_of_computed_weights(images):
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), nn.Flatten(), nn.Linear(800, 5))
    parametrize.remove_parametrizations(model[0], "weight")
    assert len(initialize(model, images).layers) == 2
    parametrizations.spectral_norm(model[0])


# Lazy modules, memory, kinds of numbers.


def lazy(last=10):
    parts = [nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(last, 5))


def test_lazy_modules_are_made_by_their_first_forward_pass(images):
    torch.manual_seed(0)
    model = lazy()
    report = initialize(model, images)
    assert [row.name for row in report.layers] == ["0", "4", "6"]
    assert type(model[0]) is nn.Conv2d
    assert report.spread_after < 1.05
    pickle.loads(pickle.dumps(model))
    torch.manual_seed(0)
    other = lazy()
    lsuv(other, images)
    assert not any(map(nn.parameter.is_lazy, other.parameters()))


def test_lazy_modules_stay_lazy_on_an_error(images):
    model = lazy(last=11)
    with pytest.raises(InitializationError, match="cannot be multiplied"):
        initialize(model, images)
    assert type(model[0]) is nn.LazyConv2d
    assert all(map(nn.parameter.is_lazy, model[:5].parameters()))
    model[6] = nn.Linear(10, 5)
    with pytest.raises(InitializationError, match="zero variance on 1 image"):
        initialize(model, images[:1], "gaussian")
    assert type(model[4]) is nn.LazyLinear
    assert initialize(model, images).spread_after < 1.05


def cut(weight):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 5))
    model[0].weight = nn.Parameter(weight)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: cut(torch.randn(1, 3, 3, 3).expand(8, -1, -1, -1)), "layer 0: its weight is expanded or cut out"),
        (lambda: cut(torch.randn(8, 3, 5, 5)[:, :, 1:4, 1:4]), "layer 0: its weight is expanded or cut out"),
        (lambda: cut(torch.randn(8, 3, 3, 3).to_sparse()), "parameter 0.weight is torch.sparse_coo: make it dense"),
        (lambda: cut(torch.randn(8, 3, 3, 3, device="meta")), "parameter 0.weight is on the meta device"),
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 5))), "scripted"),
        (
            lambda: torch.jit.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), torch.ones(2, 3, 12, 12)),
            "scripted",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 8, dtype=torch.complex64)),
            "no parameters of real numbers",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_weights_that_cannot_be_set(images, model, message):
    model = model()
    names = [*dict(model.named_parameters())]
    for call in (initialize, lsuv):
        with pytest.raises(InitializationError, match=message):
            call(model, images)
    assert [*dict(model.named_parameters())] == names
    assert model.training


def test_a_strided_weight_is_set(images):
    model = cut(torch.randn(8, 3, 3, 6)[..., ::2])
    assert initialize(model, images).spread_after < 1.05
    initialize(model, images, between=False)
    assert_normalised(model[0](images).movedim(1, -1))


def test_a_complex_parameter_is_kept(images):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(8, 3, 12, 7, dtype=torch.cfloat))
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            x = torch.fft.irfft2(torch.einsum("bihw,oihw->bohw", torch.fft.rfft2(x), self.first))
            return self.b(self.a(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    report = initialize(Spectral(), images)
    assert report.kept == {"first": "used by einsum"}
    assert report.spread_after < 1.05


# Scripted blocks, checkpoints, random draws.


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_block_is_one_operation(images):
    torch.manual_seed(0)
    block = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.Flatten(), nn.Linear(800, 5))
    before = state(block)
    report = initialize(model, images, between=False)
    assert_normalised(model[0](images).movedim(1, -1))
    assert_same(block, before)
    assert report.kept == {"1.0.weight": "used by a scripted module"}
    assert_normalised(model(images))
    assert rescale(model, images).output_change < 1e-5
    assert rescale(model, images, nonhomogeneous="scale").spread_after < 1.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(images, reentrant):
    class Net(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.a, self.b, self.c, self.kind = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5), kind

        def block(self, x):
            return self.b(x).relu()

        def forward(self, x):
            x = self.a(x).relu()
            x = self.block(x) if self.kind is None else checkpoint(self.block, x, use_reentrant=self.kind)
            return self.c(x.mean((2, 3)))

    states = []
    for kind in (reentrant, None):
        torch.manual_seed(0)
        model = Net(kind)
        assert initialize(model, images).spread_after < 1.05
        states.append(state(model))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    x = images.clone().requires_grad_()
    checkpoint(lambda x: x * 2, x, use_reentrant=True).sum().backward()  # works as before
    assert x.grad is not None


DRAWS = {
    "randn_like": lambda mean, scale: mean + scale * torch.randn_like(mean),
    "randn": lambda mean, scale: mean + scale * torch.randn(mean.shape),
    "normal_": lambda mean, scale: mean + scale * torch.empty_like(mean).normal_(),
    "rsample": lambda mean, scale: torch.distributions.Normal(mean, scale).rsample(),
    "rand": lambda mean, scale: mean + scale * torch.rand(len(mean), 1),
    "gumbel_softmax": lambda mean, scale: F.gumbel_softmax(mean, hard=True) * scale,
    "fractional_max_pool": lambda mean, scale: F.fractional_max_pool2d(
        mean[:, :, None, None] * torch.linspace(-2, 2, 16).view(4, 4), 2, (1, 1)
    ).flatten(1),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_draws_are_averaged_and_named(images, draw):
    class Variational(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.mean, self.scale = nn.Linear(432, 16), nn.Linear(16, 6), nn.Linear(16, 6)
            self.back, self.out = nn.Linear(6, 16), nn.Linear(16, 20)

        def forward(self, x):
            x = self.look(x.flatten(1)).relu()
            x = DRAWS[draw](self.mean(x), F.softplus(self.scale(x)))
            return self.out(self.back(x).relu())

    torch.manual_seed(0)
    validates = torch.distributions.Distribution._validate_args
    model = Variational()
    report = initialize(model, images, between=False)
    values = {"back": [], "out": []}
    for name, outputs in values.items():
        model.get_submodule(name).register_forward_hook(lambda _, x, y, outputs=outputs: outputs.append(y.detach()))
    model.eval()
    for _ in range(200):
        model(images)
    for outputs in values.values():
        std = torch.cat(outputs).std(0)
        assert std.mean().item() == pytest.approx(1, abs=0.05)
        torch.testing.assert_close(std, torch.ones_like(std), atol=0.2, rtol=0)
    assert report.random
    assert "random even in evaluation mode (" in str(report)
    whole = Variational()
    report = initialize(whole, images)
    assert report.output_change < 1e-5
    copy.deepcopy(whole)
    assert torch.distributions.Distribution._validate_args == validates  # as ever


def test_two_threads_on_one_model(images):
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    model = network()
    expected = copy.deepcopy(model)
    initialize(expected, images)
    initialize(expected, images)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: initialize(model, images), range(2)))
    assert model.training
    assert_same(model, state(expected))
