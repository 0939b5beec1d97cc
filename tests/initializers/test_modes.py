"""Whatever mode the caller is in, a network is initialized as it is without it."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from initializers import InitializationError, change_rate, initialize, lsuv, rescale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.top = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x)))) * torch.ones(1, dtype=x.dtype)
        return self.top(x.mean((2, 3)))


@contextlib.contextmanager
def default(setter, getter, value):
    before = getter()
    setter(value)
    try:
        yield
    finally:
        setter(before)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float64 by default": lambda: default(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "bfloat16 by default": lambda: default(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "autocast in inference mode": lambda: both(torch.autocast("cpu"), torch.inference_mode()),
}
METHODS = {
    "kmeans": lambda m, x: initialize(m, x, "kmeans"),
    "pca": lambda m, x: initialize(m, x, "pca"),
    "zca": lambda m, x: initialize(m, x, "zca"),
    "patches": lambda m, x: initialize(m, x, "patches"),
    "orthonormal": lambda m, x: initialize(m, x, "orthonormal"),
    "scale": lambda m, x: initialize(m, x, "gaussian", nonhomogeneous="scale"),
    "rescale": rescale,
    "lsuv": lsuv,
}


@contextlib.contextmanager
def both(one, other):
    with one, other:
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images():
    return torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_the_weights_are_the_same(mode, method, model, images):
    expected = copy.deepcopy(model)
    METHODS[method](expected, images)
    rates = change_rate(expected, images).mean
    with MODES[mode]():
        METHODS[method](model, images)
        assert change_rate(model, images).mean == rates
    assert_same(model, expected)


def assert_same(model, expected):
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        assert not tensor.is_inference()


class Wide(nn.Module):
    """More scales than half precision can number, local response normalisation, a gate, and a part that is set."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(300))
        self.norm, self.top = nn.LocalResponseNorm(3), nn.Linear(600, 5)

    def forward(self, x):
        x = self.norm(F.relu(torch.cat([branch(x) for branch in self.branches], 1)))
        x = x * x.mean((2, 3), keepdim=True)
        part = torch.zeros_like(x)
        part[:, :400] = x[:, :400]
        return self.top((x + part).mean((2, 3)))


def test_many_layers_where_half_precision_is_the_default(images):
    torch.manual_seed(0)
    model = Wide()
    expected = copy.deepcopy(model)
    initialize(expected, images, "gaussian", rate_images=4)
    with default(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16):
        initialize(model, images, "gaussian", rate_images=4)
    assert_same(model, expected)


def test_tensors_without_values(model, images):
    before = copy.deepcopy(model)
    with FakeTensorMode():
        for call in (initialize, rescale, lsuv, change_rate):
            with pytest.raises(InitializationError, match="FakeTensor is what torch makes here"):
                call(model, images)
    assert_same(model, before)


def test_images_of_inference_mode(model, images):
    expected = copy.deepcopy(model)
    initialize(expected, images)
    with torch.inference_mode():
        initialize(model, images.clone())
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


def test_a_model_of_inference_mode(images):
    with torch.inference_mode():
        model = Net()
    for method in (initialize, rescale, lsuv, change_rate):
        with pytest.raises(
            InitializationError, match=r"parameter a\.weight was made in inference mode: make the model"
        ):
            method(model, images)


@pytest.mark.parametrize("part", ["model", "submodule", "function", "wrapped"])
def test_compiled_models_run_as_they_are_written(part, model, images):
    expected = copy.deepcopy(model)
    initialize(expected, images)
    given = model
    if part == "model":
        model.compile(backend="eager")
    elif part == "submodule":
        model.b = torch.compile(model.b, backend="eager")
    elif part == "function":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        given = torch.compile(model, backend="eager")
    report = initialize(given, images)
    assert report.spread_after < 1.01
    assert_same(model, expected)
    assert given(images).shape == (40, 5)


class Gated(nn.Module):
    """A gate that is a function of its own, with a constant."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.top = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.function, self.shift = function, nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x):
        return self.top(self.function(self.b(self.function(self.a(x), self.shift)), self.shift).mean((2, 3)))


def gate(x, shift):
    return x * torch.sigmoid(x + shift)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_scripted_and_traced_functions_run_as_they_are_written(kind, images):
    example = torch.ones(2, 8, 4, 4), torch.ones(8, 1, 1)
    function = torch.jit.script(gate) if kind == "scripted" else torch.jit.trace(gate, example)
    torch.manual_seed(0)
    expected = Gated(gate)
    model = Gated(function)
    model.load_state_dict(expected.state_dict())
    call = torch.jit.ScriptFunction.__call__
    for options in ({}, {"nonhomogeneous": "scale"}):
        one, other = copy.deepcopy(expected), Gated(function)
        other.load_state_dict(model.state_dict())
        report = initialize(other, images, **options)
        initialize(one, images, **options)
        assert_same(other, one)
        assert report.output_change < 1e-5
    assert report.spread_after < 1.01
    with pytest.raises(InitializationError):
        initialize(model, images[:, :2])
    assert torch.jit.ScriptFunction.__call__ is call


class Branches(nn.Module):
    """What only training does: a block that is dropped, dropout as functions, an auxiliary classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.block = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.drop = torchvision.ops.StochasticDepth(0.5, "row")
        self.attention, self.head = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True), nn.Linear(8, 5)
        self.side = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.drop(self.block(x))
        x = F.dropout(x, 0.4, self.training).flatten(2).mT
        y = self.head((x + self.attention(x, x, x, need_weights=False)[0]).relu().mean(1))
        return (y, self.side(x.mean(1))) if self.training else y


@pytest.mark.parametrize("call", [initialize, rescale, lsuv])
def test_training_mode_is_an_option(call):
    images = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    model = Branches().eval()
    statistics = model.norm.running_mean.clone()
    report = call(model, images)
    assert "side" not in [row.name for row in report.layers]
    if call is not rescale:
        assert {"drop", "attention", "functional dropout, p = 0.4"} <= {*report.inactive_dropout}
    report = call(model, images, training=True)
    assert "side" in [row.name for row in report.layers]
    assert report.inactive_dropout == []
    assert torch.equal(model.norm.running_mean, statistics)
    assert not any(module.training for module in model.modules())
    if call is initialize:
        assert report.output_change < 1e-5
        rates = change_rate(model, images, training=True)
        assert [*rates.mean] == [row.name for row in report.layers]
        initialize(model, images, between=False, training=True)
        outputs = []
        model.head.register_forward_hook(lambda _, x, y: outputs.append(y.detach()))
        model.train()
        model.norm.eval()
        for _ in range(100):
            model(images)
        assert torch.cat(outputs).std(0).mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_auxiliary_classifiers_of_torchvision():
    torch.manual_seed(0)
    model = torchvision.models.segmentation.fcn_resnet50(
        aux_loss=True, weights=None, weights_backbone=None, num_classes=4
    )
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    report = initialize(model, images, "gaussian", training=True)
    assert "aux_classifier.4" in [row.name for row in report.layers]
    assert report.output_change < 1e-4


def test_the_report_says_what_holds_the_rates():
    torch.manual_seed(0)
    images = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.GELU(), nn.Conv2d(64, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 500)
    )
    report = initialize(model, images, "gaussian")
    assert report.spread_after > 2
    assert report.held_by == ["gelu", "silu"]
    assert "the rates are held apart by parts that are not homogeneous (gelu, silu), nonhomogeneous=" in str(report)
    assert "held apart" not in str(initialize(model, images, "gaussian", nonhomogeneous="scale"))


class Encoder(nn.Module):
    """Words of a length each, as attention takes them: what is behind the last one is masked."""

    def __init__(self, decoder=False):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        sizes = {"d_model": 16, "nhead": 4, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 1) if decoder else None

    def forward(self, x, masked):
        x = self.embed(x)
        seen = self.encoder(x, src_key_padding_mask=masked)
        if self.decoder is not None:
            seen = self.decoder(x, seen, tgt_key_padding_mask=masked, memory_key_padding_mask=masked)
        return self.head((seen * ~masked[..., None]).sum(1) / (~masked).sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("lengths", "decoder", "fast"),
    [("at the end", True, True), ("at the beginning", False, True), ("none", False, True), ("equal", False, False)],
)
def test_padding_masks_of_attention(lengths, decoder, fast):
    """Torch's faster way in evaluation mode, with nested tensors, is taken where a mask is at the end."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 8, 6, generator=generator)
    ends = torch.randint(3, 9, (24, 1), generator=generator)
    masked = {
        "at the end": torch.arange(8) >= ends,
        "at the beginning": torch.arange(8) < 8 - ends,
        "none": torch.zeros(24, 8, dtype=torch.bool),
        "equal": (torch.arange(8) >= 5).expand(24, 8),
    }[lengths]
    torch.manual_seed(0)
    model = Encoder(decoder)
    with default(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled, fast):
        report = initialize(model, (x, masked), "gaussian")
        assert torch.backends.mha.get_fastpath_enabled() == fast
    assert len(report.layers) == (17 if decoder else 10)
    assert all(row.std_after == pytest.approx(1, abs=1e-3) for row in report.layers)
    assert report.output_change < 1e-5
    assert report.spread_after < report.spread_before
    before = model.embed.weight.clone()
    with pytest.raises(InitializationError):
        initialize(model, (x[:, :, :5], masked))
    assert torch.equal(model.embed.weight, before)
    assert torch.backends.mha.get_fastpath_enabled()
