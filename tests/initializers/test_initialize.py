import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from initializers import InitializationError, change_rate, gaussian, initialize, rescale

FILTERS = ("gaussian", "pca", "zca", "kmeans", "patches", "orthonormal")


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def plain():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2, padding_mode="reflect"),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


def without_bias():
    return nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 12, (4, 3), padding="same", padding_mode="circular"),
        nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 7, bias=False),
    )


def batch_norm():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )
    for name, tensor in model.state_dict().items():
        if name.startswith(("1.", "4.", "9.")) and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    model[9].running_var.fill_(1e-9)  # eps, 1e-5, is nearly all of the denominator
    return model


def saturating():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.GELU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ReLU(),
        nn.Linear(10, 8),
        nn.Sigmoid(),
        nn.Linear(8, 5),
    )


NETWORKS = {make.__name__: make for make in (plain, without_bias, batch_norm, saturating)}
networks = pytest.mark.parametrize("network", NETWORKS)


def build(network, dtype=torch.float32):
    torch.manual_seed(0)
    return NETWORKS[network]().to(dtype)


@pytest.fixture
def images():
    """64 smooth images in the range of pixel values."""
    noise = torch.randn(64, 4, 13, 13, generator=torch.Generator().manual_seed(1))
    return 50 * nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)


def state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [module.training for module in model.modules()]


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name
    assert before[1] == after[1]


def affine_outputs(model, images):
    """Outputs of all affine layers, in float64 and evaluation mode, channels last."""
    model, outputs = copy.deepcopy(model).double().eval(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y.movedim(1, -1).clone()}))
    outputs["top"] = model(images.double())
    return {name: output.detach() for name, output in outputs.items()}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@networks
@pytest.mark.parametrize("filters", [*FILTERS, None])
def test_every_channel_has_unit_variance_and_the_given_mean(network, filters, images):
    model = build(network)
    before = state(model)
    initialize(model, images, filters, between=False, bias=0.3)
    for name, output in affine_outputs(model, images).items():
        if name != "top":
            std, mean = torch.std_mean(output.flatten(0, -2), 0, correction=0)
            torch.testing.assert_close(std, torch.ones_like(std), atol=1e-4, rtol=0)
            if model.get_submodule(name).bias is not None:
                torch.testing.assert_close(mean, torch.full_like(mean, 0.3), atol=1e-4, rtol=0)
    affine = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name]) != name.startswith(affine), name


def test_the_default_mean_is_a_tenth(images):
    model = build("plain")
    initialize(model, images)
    output = affine_outputs(model, images)["0"]
    assert (output.mean((0, 1, 2)) / output.std((0, 1, 2))).numpy() == pytest.approx(0.1, rel=1e-3)


@networks
@pytest.mark.parametrize("method", ["balance", "paper"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_balancing_keeps_the_function(network, method, dtype, tolerance, images):
    model, images = build(network, dtype), images.to(dtype)
    initialize(model, images, between=False)
    before = affine_outputs(model, images)["top"]
    report = rescale(model, images, method=method)
    assert relative(affine_outputs(model, images)["top"], before) < tolerance
    assert report.output_change < tolerance
    assert report.rounds == (1 if method == "balance" else 10)
    assert report.spread_before > 10
    if network != "saturating":
        assert report.spread_after < (1.001 if method == "balance" else 2)
    for row in report.layers:  # C_k becomes C_k / scale², as the function stays
        assert row.rate_after == pytest.approx(row.rate_before / row.scale**2, rel=1e-3)


def test_what_is_not_homogeneous_separates_the_layers_that_balance(images):
    model = build("saturating")
    initialize(model, images, between=False)
    rates = {row.name: row.rate_after for row in rescale(model, images).layers}
    for segment in (("0", "2"), ("4", "7", "9")):
        assert [rates[name] for name in segment] == pytest.approx([rates[segment[0]]] * len(segment), rel=1e-3)
    assert rates["0"] > 2 * rates["4"]


@pytest.mark.parametrize("within", [True, False])
def test_initialization_balances_what_it_made(within, images):
    separate, together = build("plain"), build("plain")
    initialize(separate, images, within=within, between=False)
    rescale(separate, images)
    report = initialize(together, images, within=within)
    assert report.spread_after < 1.001 < 100 < report.spread_before
    assert_same(state(separate), state(together))


@pytest.mark.parametrize(("options", "alpha"), [({}, 0.25), ({"alpha": 0.1}, 0.1)])
def test_the_method_of_the_paper_comes_closer_by_alpha_a_step(options, alpha, images):
    model = build("plain")
    report = rescale(model, images, method="paper", **options)
    assert report.rounds == 10
    expected = math.log(report.spread_before) * (1 - alpha) ** 10
    assert math.log(report.spread_after) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("filters", FILTERS)
def test_the_seed_fixes_every_bit(filters, images):
    models = [build("plain") for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        initialize(model, images, filters, seed=seed, between=seed == 3)
        torch.rand(5)  # the global random state plays no part
    first, again, other = models
    assert_same(state(first), state(again))
    initialize(first, images, filters, seed=3, between=False)
    if filters != "pca":  # which draws nothing where it needs no sample
        assert relative(first[0].weight, other[0].weight) > 0.1
    assert relative(first[8].weight, other[8].weight) > 0.1


@networks
def test_gaussian_filters_without_scaling_are_the_unscaled_baseline(network, images):
    model, baseline = build(network), build(network)
    initialize(model, images, "gaussian", within=False, between=False, seed=2)
    gaussian(baseline, std=0.01, seed=2)
    assert_same(state(model), state(baseline))


@pytest.mark.parametrize("between", [False, True])
def test_nothing_else_changes(between, images):
    model = build("batch_norm").train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model(images).sum().backward()
    model[3].register_forward_hook(lambda *_: None)
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags, hooks = state(model)[1], [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    originals, random, tensors = images.clone(), torch.get_rng_state(), list(map(id, model.parameters()))
    initialize(model, images, between=between)
    change_rate(model, images)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(images, originals)
    assert state(model)[1] == flags
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert tensors == list(map(id, model.parameters()))
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(tensors) - 1)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) if gradient is None else torch.equal(parameter.grad, gradient)


def dictionaries(images):
    return [{"name": ["a"] * 16, "image": part, "label": torch.zeros(16)} for part in images.split(16)]


@pytest.mark.parametrize(
    "form",
    [
        lambda images: (images,),
        lambda images: images.double(),
        lambda images: list(images.split(24)),
        lambda images: ((part, torch.zeros(len(part))) for part in images.split(24)),
        dictionaries,
        lambda images: DataLoader(TensorDataset(images, torch.arange(len(images))), batch_size=10),
    ],
    ids=["tuple", "float64", "batches", "pairs", "dictionaries", "loader"],
)
def test_images_may_come_in_any_form(form, images):
    expected, model = build("plain"), build("plain")
    initialize(expected, images)
    initialize(model, form(images))
    assert_same(state(expected), state(model))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.top = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x, y):
        return self.top(torch.relu(self.left(x) + self.right(y)))


class Growing(nn.Module):
    """Repeats its layer until the activations are large: nothing that a trace could know."""

    def __init__(self):
        super().__init__()
        self.first, self.top = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, *_):
        x = self.first(x)
        while x.norm() < 1000:
            x = 2 * x
        return self.top(x)


@pytest.mark.parametrize("make", [TwoInputs, Growing])
def test_what_is_no_chain_gets_the_other_steps(make):
    torch.manual_seed(0)
    model, inputs = make(), (torch.randn(50, 6), torch.randn(50, 3))
    before = state(model)
    with pytest.raises(InitializationError, match=f"(branches at|trace {make.__name__}).*between=False"):
        initialize(model, inputs)
    assert_same(before, state(model))
    report = initialize(model, inputs, between=False)
    assert {row.filters for row in report.layers} == {"kmeans"}
    top = model.eval()(*inputs)
    torch.testing.assert_close(top.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    assert len(change_rate(model, inputs).layers) == len(report.layers)
