import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from initializers import InitializationError, change_rate, gaussian, initialize, lsuv, rescale

FILTERS = ("gaussian", "pca", "zca", "kmeans", "patches", "orthonormal")
AFFINE = nn.Linear | nn.modules.conv._ConvNd


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
        nn.Dropout(0),  # what is set with dropout holds with dropout: see test_dropout.py
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


def transposed():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, (3, 2), stride=(2, 1), padding=1, output_padding=(1, 0), groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 10, 2, dilation=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    )


def sequence():
    return nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(4, 8, 5, stride=3, padding=2),
        nn.ReLU(),
        nn.Conv1d(8, 8, 3, dilation=2, groups=4, padding="same", bias=False),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 6, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(3),
        nn.Flatten(),
        nn.Linear(18, 5),
    )


def volume():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv3d(1, 6, (2, 3, 3), stride=(1, 2, 2), bias=False),
        nn.ReLU(),
        nn.Conv3d(6, 8, (1, 3, 2), padding=(0, 1, 1), groups=2),
        nn.ReLU(),
        nn.ConvTranspose3d(8, 5, 2, stride=(1, 2, 2)),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(5, 5),
    )


class Branches(nn.Module):
    """Two heads, a shortcut, concatenated parts, a depthwise convolution without bias and layers used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.narrow = nn.Conv2d(16, 6, 1)
        self.twice = nn.Linear(6, 6)
        self.head, self.other = nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(x + self.pointwise(F.relu(self.depthwise(x))))
        x = F.relu(self.narrow(torch.cat([x, y], 1))).mean((2, 3))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return {"head": self.head(x), "rest": [self.other(x)]}


def branches():
    return Branches()


MAKERS = (plain, without_bias, batch_norm, saturating, transposed, sequence, volume, branches)
NETWORKS = {make.__name__: make for make in MAKERS}
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


def joined(outputs):
    """What a model returns in one tensor."""
    if isinstance(outputs, dict):
        outputs = [outputs["head"], *outputs["rest"]]
    return torch.cat([output.flatten(1) for output in outputs], 1) if isinstance(outputs, list) else outputs


def affine_outputs(model, images):
    """First outputs of all affine layers, in float64 and evaluation mode, channels last."""
    model, outputs = copy.deepcopy(model).double().eval(), {}

    def keep(name):
        def hook(layer, _, y):
            outputs.setdefault(name, (y if isinstance(layer, nn.Linear) else y.movedim(1, -1)).clone())

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, AFFINE):
            layer.register_forward_hook(keep(name))
    outputs["top"] = joined(model(images.double()))
    return {name: output.detach() for name, output in outputs.items()}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def cosines(one, other):
    """Between the filters of two weights of a convolution or linear layer."""
    return F.cosine_similarity(one.detach().flatten(1), other.detach().flatten(1))


@networks
@pytest.mark.parametrize("filters", [*FILTERS, None])
def test_every_channel_has_unit_variance_and_the_given_mean(network, filters, images):
    """Without a bias the mean is 0, unless the filters were kept or see no patches."""
    model = build(network)
    before = state(model)
    report = initialize(model, images, filters, between=False, bias=0.3)
    outputs = affine_outputs(model, images)
    assert [row.name for row in report.layers] == [name for name in outputs if name != "top"]
    for name in [row.name for row in report.layers]:
        std, mean = torch.std_mean(outputs[name].flatten(0, -2), 0, correction=0)
        torch.testing.assert_close(std, torch.ones_like(std), atol=1e-4, rtol=0)
        layer = model.get_submodule(name)
        if layer.bias is not None:
            torch.testing.assert_close(mean, torch.full_like(mean, 0.3), atol=1e-4, rtol=0)
        elif filters is not None and not getattr(layer, "transposed", False):
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
        if filters is None and not getattr(layer, "transposed", False):
            parallel = cosines(layer.weight, before[0][f"{name}.weight"])
            torch.testing.assert_close(parallel, torch.ones_like(parallel), atol=1e-5, rtol=0)
    affine = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, AFFINE))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name]) != name.startswith(affine), name


@networks
@pytest.mark.parametrize("factor", [2.0**-66, 2.0**66])
@pytest.mark.parametrize("filters", FILTERS)
def test_images_whose_squares_float32_does_not_hold(network, filters, factor, images):
    """As those of a strain of 1e-20: what comes out is what comes of other units."""
    expected, model = build(network).eval(), build(network).eval()
    reports = initialize(expected, images, filters), initialize(model, factor * images, filters)
    with torch.no_grad():
        assert relative(joined(model(factor * images)), joined(expected(images))) < 1e-3
    for layer, other in zip(reports[1].layers, reports[0].layers, strict=True):
        assert (layer.filters, layer.note) == (other.filters, other.note)
        assert layer.std_after == pytest.approx(other.std_after, abs=1e-3)


@pytest.mark.parametrize("factor", [2.0**-66, 2.0**66])
def test_lsuv_on_images_whose_squares_float32_does_not_hold(factor, images):
    expected, model = build("plain").eval(), build("plain").eval()
    lsuv(expected, images)
    lsuv(model, factor * images)
    with torch.no_grad():
        assert relative(model(factor * images), expected(images)) < 1e-5


@pytest.mark.parametrize("filters", FILTERS)
def test_only_what_is_normalised_without_a_bias_leaves_the_mean_out(filters, images):
    """The filters of a layer with a bias, or that is not normalised, are those of the patches as they are."""
    weights = {}
    for bias, within in ((True, True), (False, False), (False, True)):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias))
        report = initialize(model, images + 20, filters, within=within, between=False)
        weights[bias, within] = model[0].weight
        mean = model(images + 20).mean((0, 2, 3))
        assert (mean.abs() < 1e-4).all() == ((bias, within) == (False, True))
        assert (report.layers[0].mean_after is None) == (not within)
    parallel = cosines(weights[True, True], weights[False, False])
    torch.testing.assert_close(parallel, torch.ones(8), atol=1e-5, rtol=0)
    assert cosines(weights[True, True], weights[False, True]).abs().min() < 0.99


@pytest.mark.parametrize("filters", FILTERS)
def test_a_depthwise_layer_on_one_position_keeps_its_mean(filters, images):
    """As in squeeze-and-excitation: there is no other direction to leave."""
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.Flatten(), nn.Linear(4, 3, bias=False)
    )
    initialize(model, images + 20, filters, between=False)
    outputs = affine_outputs(model, images + 20)
    for name, output in outputs.items():
        std, mean = torch.std_mean(output.flatten(0, -2), 0, correction=0)
        torch.testing.assert_close(std, torch.ones_like(std), atol=1e-4, rtol=0)
        assert (mean.abs() > 1).all() if name == "1" else (mean.abs() < 1e-4).all()


def test_the_default_mean_is_a_tenth(images):
    model = build("plain")
    initialize(model, images)
    output = affine_outputs(model, images)["0"]
    assert (output.mean((0, 1, 2)) / output.std((0, 1, 2))).numpy() == pytest.approx(0.1, rel=1e-3)


class Encoder(nn.Module):
    """A vision transformer of one block, whose fast path would hide the layers."""

    def __init__(self, batch_first, **options):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Conv2d(4, 8, 4, stride=4)
        self.position = nn.Parameter(torch.randn(9, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=batch_first, **options)
        self.top = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT + self.position
        x = self.block(x) if self.batch_first else self.block(x.transpose(0, 1)).transpose(0, 1)
        return self.top(x.mean(1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}])
def test_attention(batch_first, options, images):
    """Its packed projections are a layer like any other."""
    torch.manual_seed(0)
    model, inputs = Encoder(batch_first, **options), []
    report = initialize(model, images, between=False)
    names = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert [row.name for row in report.layers] == ["embed", *(f"block.{name}" for name in names), "top"]
    exact = copy.deepcopy(model).double().eval()
    exact.block.self_attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    exact(images.double())
    attention = exact.block.self_attn
    outputs = affine_outputs(model, images)
    outputs["in_proj"] = F.linear(inputs[0], attention.in_proj_weight, attention.in_proj_bias).detach()
    for name, output in outputs.items():
        if name != "block.self_attn.out_proj":  # which is no module that runs
            std, mean = torch.std_mean(output.flatten(0, -2), 0, correction=0)
            torch.testing.assert_close(std, torch.ones_like(std), atol=1e-4, rtol=0)
            value = 0.0 if "bias" in options and name not in ("embed", "top") and name != "in_proj" else 0.1
            if attention.in_proj_bias is None and name == "in_proj":
                value = 0.0
            expected = torch.full_like(mean, value)
            torch.testing.assert_close(mean, expected, atol=1e-4, rtol=0)
    row = report.layers[2]
    assert row.std_after == pytest.approx(1, abs=1e-4)
    before = outputs["top"]
    assert rescale(model, images).output_change < 1e-5
    assert relative(affine_outputs(model, images)["top"], before) < 1e-5
    assert initialize(model, images, nonhomogeneous="scale").spread_after == pytest.approx(1, rel=1e-3)


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
    assert report.spread_before > (10 if network not in ("transposed", "sequence", "volume") else 3)
    if network == "branches":
        assert report.spread_after < report.spread_before / 20  # what one scale on both sides of a sum leaves
    elif network != "saturating":
        assert report.spread_after < (1.001 if method == "balance" else 2)
    for row in report.layers if network != "branches" else ():  # C_k becomes C_k / scale², as the function stays
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


@pytest.fixture(params=[False, True])
def arithmetic(request):
    """Arithmetic of a GPU as a user may have set it; gives what tells how it is set."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision, products.fp32_precision

    before = cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = True, request.param, request.param
    yield settings
    cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = before


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_is_deterministic_and_precise_inside_and_as_before_outside(fails, arithmetic, images):
    before, inside = arithmetic(), set()

    def look(*_):
        inside.add(arithmetic())
        if fails:
            raise RuntimeError

    model = build("plain")
    model[0].register_forward_pre_hook(look)
    with pytest.raises(InitializationError) if fails else nullcontext():
        initialize(model, images)
    assert inside == {(True, False, "ieee", "ieee")}
    assert arithmetic() == before != (True, False, "ieee", "ieee")


def dictionaries(images):
    return [{"name": ["a"] * 16, "image": part, "label": torch.zeros(16)} for part in images.split(16)]


@pytest.mark.parametrize(
    "form",
    [
        lambda images: (images,),
        lambda images: images.double(),
        lambda images: list(images.split(24)),
        lambda images: iter(images.split([7, 1, 30, 26])),
        lambda images: ((part, torch.zeros(len(part))) for part in images.split(24)),
        dictionaries,
        lambda images: DataLoader(TensorDataset(images, torch.arange(len(images))), batch_size=10),
    ],
    ids=["tuple", "float64", "batches", "uneven", "pairs", "dictionaries", "loader"],
)
def test_images_may_come_in_any_form(form, images):
    expected, model = build("plain").eval(), build("plain").eval()
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


def inputs_of(make):
    torch.manual_seed(0)
    return make(), (torch.randn(50, 6), torch.randn(50, 3))


def test_a_model_of_two_inputs():
    model, inputs = inputs_of(TwoInputs)
    report = initialize(model, inputs, bias=0.2)
    assert [(row.name, row.filters) for row in report.layers] == [(name, "kmeans") for name in ("left", "right", "top")]
    assert all((row.mean_after, row.std_after) == pytest.approx((0.2, 1), abs=1e-4) for row in report.layers)
    assert report.output_change < 1e-5
    assert report.spread_after < report.spread_before
    assert change_rate(model, inputs).layers == ["left", "right", "top"]
    top = model(*inputs).detach()
    torch.testing.assert_close(top.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(top.mean(0), torch.full((4,), 0.2), atol=1e-4, rtol=0)


def test_a_model_that_does_not_do_the_same_for_all_images():
    model, inputs = inputs_of(Growing)
    before = state(model)
    for call in (initialize, rescale):
        with pytest.raises(
            InitializationError, match=r"^the between-layer step cannot follow Growing: .*between=False"
        ):
            call(model, inputs)
        assert_same(before, state(model))
    report = initialize(model, inputs, between=False)
    assert {row.filters for row in report.layers} == {"kmeans"}
    top = model.eval()(*inputs)
    torch.testing.assert_close(top.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    assert len(change_rate(model, inputs).layers) == len(report.layers) == len(lsuv(model, inputs).layers)
    report = initialize(model, inputs, nonhomogeneous="scale")
    assert report.output_change < 1e-5
    assert report.spread_after == pytest.approx(1, rel=1e-4)


def assert_close(one, other, tolerance=1e-4):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert relative(a, b) < tolerance, name


@networks
@pytest.mark.parametrize("filters", ["gaussian", "zca", None])
def test_the_batches_of_the_sweep_do_not_matter(network, filters, images, monkeypatch):
    models, reports = [build(network) for _ in range(3)], []
    for model, batch in zip(models, (64, 5, 1), strict=True):
        monkeypatch.setattr("initializers._sweep.IMAGES_AT_A_TIME", batch)
        reports.append(initialize(model, images, filters).to_dict())
    for model, report in zip(models[1:], reports[1:], strict=True):
        assert_close(model, models[0])
        for row, expected in zip(report["layers"], reports[0]["layers"], strict=True):
            assert row.keys() == expected.keys()
            for key in row.keys() - {"seconds"}:
                assert row[key] == (
                    pytest.approx(expected[key], rel=1e-3, abs=1e-4) if isinstance(row[key], float) else expected[key]
                ), key


def assert_normalised(model, images, tolerance):
    """Means to 1.5 times the tolerance, or to that of the bias that makes them."""
    for name, output in affine_outputs(model, images).items():
        if name != "top":
            std, mean = torch.std_mean(output.flatten(0, -2), 0, correction=0)
            torch.testing.assert_close(std, torch.ones_like(std), atol=tolerance, rtol=0)
            layer = model.get_submodule(name)
            if layer.bias is not None or not getattr(layer, "transposed", False):
                error = mean.abs() if layer.bias is None else (mean - 0.1).abs() / layer.bias.abs().clamp(min=1)
                assert error.max() < 2 * tolerance, name


@pytest.mark.parametrize("network", ["plain", "without_bias", "batch_norm", "volume", "branches"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 2e-2)])
def test_other_precisions(network, dtype, tolerance, images):
    model, images = build(network, dtype), images.to(dtype)
    if network == "batch_norm":
        model[9].running_var.fill_(1)
    report = initialize(model, images, between=False)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for row in report.layers:
        assert row.std_after == pytest.approx(1, abs=tolerance)
    assert_normalised(model, images, tolerance)
    before = affine_outputs(model, images)["top"]
    report = rescale(model, images)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert report.spread_after < (1.05 if network != "branches" else report.spread_before / 20)
    assert report.output_change < 4 * tolerance
    assert relative(affine_outputs(model, images)["top"], before) < 4 * tolerance
    assert all(map(math.isfinite, change_rate(model, images).mean.values()))


@pytest.mark.parametrize("network", ["plain", "without_bias", "batch_norm", "transposed", "branches"])
@pytest.mark.parametrize("filters", FILTERS)
def test_models_in_channels_last_layout(network, filters, images):
    model, images = build(network), images.contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    initialize(model, images, filters, between=False)
    assert_normalised(model, images, 1e-4)
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    kept, expected = copy.deepcopy(model), copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    reports = initialize(kept, images, None), initialize(expected, images.contiguous(), None)
    assert_close(kept, expected)
    for row, other in zip(*(report.layers for report in reports), strict=True):
        assert row.rate_before == pytest.approx(other.rate_before, rel=1e-3)
        assert row.rate_after == pytest.approx(other.rate_after, rel=1e-3)
    assert relative(affine_outputs(kept, images)["top"], affine_outputs(model, images)["top"]) < 1e-5


class Preprocessing(nn.Module):
    """Normalises its input in place."""

    def __init__(self):
        super().__init__()
        self.body = build("plain")

    def forward(self, x):
        return self.body(x.sub_(3).div_(50))


def test_a_model_may_change_its_input_in_place(images):
    originals, expected, model = images.clone(), build("plain"), Preprocessing()
    initialize(expected, (images - 3) / 50)
    report = initialize(model, images)
    assert_close(model.body, expected)
    assert report.output_change < 1e-5
    rates = change_rate(model, images)
    assert torch.equal(images, originals)
    assert list(rates.mean.values()) == pytest.approx(list(change_rate(expected, (images - 3) / 50).mean.values()))
    lsuv(model, images)
    assert torch.equal(images, originals)


def test_models_that_run_on_several_devices_or_compiled(images):
    expected, model, compiled = build("plain"), build("plain"), build("plain")
    initialize(expected, images)
    report = initialize(nn.DataParallel(model), images)
    assert [row.name for row in report.layers] == ["0", "3", "8", "10"]
    assert_same(state(expected), state(model))
    initialize(torch.compile(compiled), images)  # which compiles nothing
    assert_same(state(expected), state(compiled))


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode as well."""

    def forward(self, x):
        return x * (1 + 0.3 * torch.rand(x.shape[1], 1, 1))


def test_a_model_may_draw_random_numbers(images):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), Noisy(), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.LazyLinear(5))
    torch.manual_seed(0)
    model(images)
    report = initialize(model, images)
    assert report.spread_after < 1.001
    assert report.output_change < 1e-5
