import copy
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import initializers
from experiments.networks.caffenet import CaffeNet
from initializers import InitializationError

FILLERS = ("xavier", "msra", "gaussian", "caffe", "torch_default")


def build():
    """A grouped convolution and linear layers with enough weights for statistics, biases that are not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(20, 100, (5, 3), groups=2),
        nn.BatchNorm2d(100),
        nn.ReLU(),
        nn.Conv2d(100, 40, 3, bias=False),
        nn.Flatten(),
        nn.Linear(40 * 12, 60),
        nn.ReLU(),
        nn.Linear(60, 80),
    )
    model.caffe_fillers = {"0": (0.5, 0.1), "3": (0.2, 7.0), "5": (0.005, 1.0), "7": (0.03, 0.0)}
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 3, 4)
    return model


@pytest.fixture
def model():
    return build()


@pytest.fixture
def images():
    return 50 * torch.randn(70, 20, 9, 8, generator=torch.Generator().manual_seed(1))


def normal(std):
    """Moments of N(0, std²): standard deviation, mean of |w|, 4th root of the mean of w⁴."""
    return std, std * math.sqrt(2 / math.pi), std * 3**0.25


def uniform(limit):
    return limit / math.sqrt(3), limit / 2, limit / 5**0.25


def moments(weight):
    weight = weight.detach().double()
    return [w.item() for w in (weight.std(), weight.abs().mean(), weight.pow(4).mean() ** 0.25)]


DISTRIBUTIONS = {  # of the layers of `build`, whose fan-in is 150, 900, 480 and 60
    "xavier": [uniform(math.sqrt(3 / fan_in)) for fan_in in (150, 900, 480, 60)],
    "msra": [normal(math.sqrt(2 / 150)), normal(math.sqrt(2 / 900)), normal(0.01), normal(0.01)],
    "gaussian": [normal(0.01)] * 4,
    "caffe": [normal(0.5), normal(0.2), normal(0.005), normal(0.03)],
    "torch_default": [uniform(math.sqrt(1 / fan_in)) for fan_in in (150, 900, 480, 60)],
}


@pytest.mark.parametrize("name", FILLERS)
def test_the_distribution_of_the_weights(name, model):
    norm = copy.deepcopy(model[1])
    getattr(initializers, name)(model)
    for index, expected in zip((0, 3, 5, 7), DISTRIBUTIONS[name], strict=True):
        weight = model[index].weight
        assert moments(weight) == pytest.approx(expected, rel=0.04)
        assert abs(weight.mean()) < 4 * weight.std() / math.sqrt(weight.numel())
        assert weight[0].norm().item() == pytest.approx(weight[-1].norm().item(), rel=0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(model[1].state_dict().values(), norm.state_dict().values(), strict=True)
    )


class Attention(nn.Module):
    """Attention whose projections are packed, or of different widths."""

    def __init__(self, **options):
        super().__init__()
        self.own = nn.MultiheadAttention(40, 4, batch_first=True, **options)

    def forward(self, x):
        keys = [x[..., : width or 40] for width in (self.own.kdim, self.own.vdim)]
        return self.own(x, *keys)[0]


# Layer, parameter that is its weight, and fan-in.
OTHERS = {
    "conv1d": (lambda: nn.Conv1d(40, 60, 5, groups=2), {"weight": 100}),
    "conv3d": (lambda: nn.Conv3d(20, 30, (2, 1, 3)), {"weight": 120}),
    "transposed1d": (lambda: nn.ConvTranspose1d(40, 60, 5), {"weight": 200}),
    "transposed2d": (lambda: nn.ConvTranspose2d(40, 80, (2, 3), groups=2), {"weight": 120}),
    "transposed3d": (lambda: nn.ConvTranspose3d(20, 30, 2), {"weight": 160}),
    "attention": (Attention, {"own.in_proj_weight": 40, "own.out_proj.weight": 40}),
    "wide attention": (
        lambda: Attention(kdim=30, vdim=20),
        {"own.q_proj_weight": 40, "own.k_proj_weight": 30, "own.v_proj_weight": 20, "own.out_proj.weight": 40},
    ),
}


@pytest.mark.parametrize("name", ["xavier", "msra", "gaussian", "caffe"])
@pytest.mark.parametrize("layer", OTHERS)
def test_every_kind_of_affine_layer(layer, name):
    make, weights = OTHERS[layer]
    model = make()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 3, 4)
    names = [weight.removesuffix("weight").rstrip("._") for weight in weights]
    model.caffe_fillers = {name or "weight": (0.3, 0.7) for name in names}
    getattr(initializers, name)(model)
    for weight, fan_in in weights.items():
        expected = {
            "xavier": uniform(math.sqrt(3 / fan_in)),
            "msra": normal(math.sqrt(2 / fan_in) if isinstance(model, nn.modules.conv._ConvNd) else 0.01),
            "gaussian": normal(0.01),
            "caffe": normal(0.3),
        }[name]
        parameter = model.get_parameter(weight)
        assert moments(parameter) == pytest.approx(expected, rel=0.06), weight
        assert abs(parameter.mean()) < 4 * parameter.std() / math.sqrt(parameter.numel())
    bias = torch.tensor(0.7 if name == "caffe" else 0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, bias.expand_as(parameter)), name


@pytest.mark.parametrize("layer", OTHERS)
def test_torchs_default_is_that_of_a_new_layer(layer):
    make, _ = OTHERS[layer]
    torch.manual_seed(0)
    new, model = make(), make()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 3, 4)
    initializers.torch_default(model)
    for (name, expected), parameter in zip(new.named_parameters(), model.parameters(), strict=True):
        if parameter.ndim > 1:
            assert moments(parameter) == pytest.approx(moments(expected), rel=0.06), name
        assert (expected == 0).all() == (parameter == 0).all(), name
        assert parameter.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.3), name


@pytest.mark.parametrize("layer", OTHERS)
def test_lsuv_on_every_kind_of_affine_layer(layer):
    model = OTHERS[layer][0]()
    shape = {"conv3d": (20, 4, 4, 4), "transposed3d": (20, 3, 3, 3), "transposed2d": (40, 5, 5)}.get(layer, (40, 7))
    images = 9 * torch.randn(50, *shape, generator=torch.Generator().manual_seed(1))
    if isinstance(model, Attention):
        images = images.mT
    report = initializers.lsuv(model, images, tolerance=1e-4)
    assert all(row.std_after == pytest.approx(1, abs=1e-4) for row in report.layers)
    assert model(images).std(correction=0).item() == pytest.approx(1, abs=1e-3)
    if not isinstance(model, Attention):
        blocks = model.weight.detach()
        if model.transposed:
            blocks = torch.cat([block.transpose(0, 1) for block in blocks.chunk(model.groups)])
        for block in blocks.flatten(1).chunk(model.groups):
            gram = block @ block.T if len(block) <= block.shape[1] else block.T @ block
            torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-4 * gram[0, 0].item(), rtol=0)
    names = [row.name for row in report.layers]
    if layer == "attention":  # of three tensors, though they are equal
        assert names == ["own.in_proj[0:40]", "own.in_proj[40:80]", "own.in_proj[80:120]", "own.out_proj"]
    elif layer == "wide attention":
        assert names == ["own.q_proj", "own.k_proj", "own.v_proj", "own.out_proj"]


def test_biases(model):
    for name in ("xavier", "msra", "gaussian"):
        getattr(initializers, name)(model)
        assert not any(model[index].bias.any() for index in (0, 5, 7))
    initializers.caffe(model)
    for index, bias in ((0, 0.1), (5, 1.0), (7, 0.0)):
        assert torch.equal(model[index].bias, torch.full_like(model[index].bias, bias))
    initializers.torch_default(model)
    for index, fan_in in ((0, 150), (5, 480), (7, 60)):
        bound, bias = math.sqrt(1 / fan_in), model[index].bias
        assert 0.9 * bound < bias.abs().max() <= bound
        assert bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_the_gaussian_may_have_another_standard_deviation(model):
    initializers.gaussian(model, std=2)
    assert moments(model[3].weight) == pytest.approx(normal(2), rel=0.04)


@pytest.mark.parametrize("name", [*FILLERS, "lsuv"])
def test_the_seed_fixes_every_bit(name, images):
    models, random = [build() for _ in range(3)], torch.get_rng_state()
    for model, seed in zip(models, (3, 3, 4), strict=True):
        getattr(initializers, name)(model, *[images] * (name == "lsuv"), seed=seed)
        assert torch.equal(torch.get_rng_state(), random)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], again[key]) for key in first)
    for layer in (0, 3, 5, 7):
        assert not torch.equal(first[f"{layer}.weight"], other[f"{layer}.weight"])


def test_caffenet_states_its_reference_initialization():
    """BVLC/caffe, models/bvlc_reference_caffenet/train_val.prototxt."""
    model = CaffeNet(1000)
    initializers.caffe(model)
    for name, std, bias in [
        ("conv1", 0.01, 0),
        ("conv2", 0.01, 1),
        ("conv3", 0.01, 0),
        ("conv4", 0.01, 1),
        ("conv5", 0.01, 1),
        ("fc6", 0.005, 1),
        ("fc7", 0.005, 1),
        ("fc8", 0.01, 0),
    ]:
        layer = model.get_submodule(name)
        assert moments(layer.weight) == pytest.approx(normal(std), rel=0.03), name
        assert set(layer.bias.tolist()) == {bias}, name


def test_networks_without_a_reference_initialization(model):
    before = copy.deepcopy(model.state_dict())
    for fillers, message in [
        ({"0": (0.01, 0), "5": (0.01, 0)}, "caffe_fillers of Sequential lacks 3, 7"),
        (None, "Sequential states no reference initialization: give it an attribute caffe_fillers"),
    ]:
        model.caffe_fillers = fillers
        with pytest.raises(InitializationError, match=message):
            initializers.caffe(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_error_in_the_middle_leaves_the_model_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="std"):
        initializers.gaussian(model, std=-1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def outputs(model, images):
    """Outputs of the affine layers by name, in float64."""
    model, found = copy.deepcopy(model).double().eval(), {}
    for name in ("0", "3", "5", "7"):
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: found.update({name: y.clone()}))
    model(images.double())
    return found


def test_lsuv_gives_every_layer_unit_variance(model, images):
    running = copy.deepcopy(model[1].state_dict())
    report = initializers.lsuv(model.train(), images, tolerance=1e-3)
    assert [(row.name, row.filters) for row in report.layers] == [
        (name, "orthonormal") for name in ("0", "3", "5", "7")
    ]
    for row, output in zip(report.layers, outputs(model, images).values(), strict=True):
        assert output.var(correction=0).item() == pytest.approx(1, abs=1e-3)
        assert (row.mean_after, row.std_after) == pytest.approx((output.mean().item(), output.std().item()), abs=1e-3)
        assert abs(row.std_before**2 - 1) > 1e-3
    assert report.images == 70
    assert "orthonormal" in str(report)
    assert model.training
    assert all(torch.equal(tensor, running[name]) for name, tensor in model[1].state_dict().items())


def test_lsuv_filters_are_orthonormal_up_to_one_scale(model, images):
    initializers.lsuv(model, images)
    for index, blocks in ((0, 2), (3, 1), (5, 1), (7, 1)):
        for block in model[index].weight.detach().flatten(1).chunk(blocks):
            gram = block @ block.T if len(block) <= block.shape[1] else block.T @ block
            torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-4 * gram[0, 0].item(), rtol=0)
        assert model[index].bias is None or not model[index].bias.any()


def test_lsuv_leaves_what_is_within_the_tolerance(model, images):
    """The variance of an orthonormal layer of white inputs is their variance, before any division."""
    report = initializers.lsuv(model, images, tolerance=1e9)
    torch.testing.assert_close(model[5].weight @ model[5].weight.T, torch.eye(60), atol=1e-4, rtol=0)
    assert all(row.std_before == row.std_after for row in report.layers)


class Rows(TorchFunctionMode):
    """Counts the rows that affine functions compute."""

    def __init__(self):
        super().__init__()
        self.counts = {"conv2d": 0, "linear": 0}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.counts:
            self.counts[func.__name__] += len(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("call", "again"),
    [
        (lambda model, images: initializers.lsuv(model, images, tolerance=1e-6), 0),
        (lambda model, images: initializers.initialize(model, images, between=False), 16),
    ],
)
def test_the_within_layer_step_takes_one_forward_pass(call, again, model, images):
    """Two convolutions and two linear layers see each image once, and a few more to record the graph.

    Two and three, and as many as run together: 16, and the 6 that are left of 70. Then two tell whether a forward pass
    changes the weights, and the first of ours what rounding does.
    """
    with Rows() as rows:
        call(model, images)
    assert rows.counts == dict.fromkeys(("conv2d", "linear"), 2 * (70 + 2 + 3 + 16 + 6 + 2 + again))
