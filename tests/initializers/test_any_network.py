"""Networks as people write them: right, noted, or one clear error. Statistics are measured with hooks of their own."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from initializers import InitializationError, change_rate, initialize, lsuv, rescale


@pytest.fixture
def images():
    """Of different brightness, from dark to bright."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(48, 3, 16, 16, generator=generator) * torch.linspace(0.2, 2, 48).view(-1, 1, 1, 1)


def state(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def statistics(model, images, names):
    """Name -> largest deviations, over its channels, from standard deviation 1 and from the bias as a mean."""
    found, modules = {}, dict(model.named_modules())

    def hook(name):
        def keep(module, _, output):
            axis = -1 if isinstance(module, nn.Linear) else 1
            channels = output.detach().double().movedim(axis, 0).flatten(1)
            std = (channels.std(1, correction=0) - 1).abs().max().item()
            found[name] = std, (channels.mean(1) - 0.1).abs().max().item()

        return keep

    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return found


def assert_normalised(model, images, names, tolerance=1e-3):
    for name, deviations in statistics(model, images, names).items():
        assert max(deviations) < tolerance, (name, deviations)


# Frozen parameters.


def backbone_and_head():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone, nn.Sequential(nn.Linear(1152, 16), nn.ReLU(), nn.Linear(16, 5)))
    backbone.requires_grad_(False)
    return model


@pytest.mark.parametrize("options", [{}, {"nonhomogeneous": "scale"}, {"filters": "gaussian", "between": False}])
def test_a_frozen_backbone_is_kept_and_listed(images, options):
    model = backbone_and_head()
    before = state(model[0])
    report = initialize(model, images, **options)
    assert_same(model[0], before)
    assert report.frozen == [f"0.{name}" for name in before]
    assert [row.name.split(".")[0] for row in report.layers] == ["1", "1"]
    assert "frozen, left as they are: 0.0.weight, 0.0.bias, 0.2.weight and 1 more" in str(report)
    if not options.get("between", True):
        assert_normalised(model, images, ["1.0", "1.2"])


@pytest.mark.parametrize("call", [rescale, lsuv])
def test_other_functions_keep_what_is_frozen(images, call):
    model = backbone_and_head()
    before = state(model[0])
    call(model, images)
    assert_same(model[0], before)


def test_a_frozen_bias_leaves_the_mean_and_the_next_layers_see_it(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 6), nn.ReLU(), nn.Linear(6, 4))
    for layer in (model[0], model[3]):
        nn.init.normal_(layer.bias, std=3)
        layer.bias.requires_grad_(False)
    biases = [layer.bias.clone() for layer in (model[0], model[3])]
    report = initialize(model, images, between=False)
    assert [torch.equal(layer.bias, bias) for layer, bias in zip((model[0], model[3]), biases, strict=True)] == [
        True
    ] * 2
    found = statistics(model, images, ["0", "3", "5"])
    assert all(std < 1e-3 for std, _ in found.values())
    assert found["5"][1] < 1e-3  # what comes to it is what the frozen biases give
    assert "its bias is computed or frozen" in report.layers[0].note


def test_a_frozen_normalisation_and_a_frozen_layer_in_the_middle_keep_the_function(images):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(1152, 5)).eval()
    for layer in (model[1], model[3]):
        layer.requires_grad_(False)
    before, expected = copy.deepcopy(model), model(images)
    report = rescale(model, images)
    for i in (1, 3):
        assert torch.equal(model[i].weight, before[i].weight)
        assert torch.equal(model[i].bias, before[i].bias)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert report.spread_after <= report.spread_before
    assert report.frozen == ["1.weight", "1.bias", "3.weight", "3.bias"]


def test_packed_projections_may_be_frozen_as_a_whole(images):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Linear(48, 16), nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = self.embed(x.flatten(2).transpose(1, 2).reshape(len(x), 16, 48))
            return self.head(x + self.attention(x, x, x)[0]).mean(1)

    torch.manual_seed(0)
    model = Attention()
    model.attention.in_proj_weight.requires_grad_(False)
    before = model.attention.in_proj_weight.clone()
    report = initialize(model, images)
    assert torch.equal(model.attention.in_proj_weight, before)
    assert report.frozen == ["attention.in_proj_weight"]
    assert [row.name for row in report.layers] == ["embed", "attention.out_proj", "head"]


def test_a_model_that_is_frozen_whole_is_an_error(images):
    model = backbone_and_head().requires_grad_(False)
    for call in (initialize, rescale, lsuv):
        with pytest.raises(InitializationError, match=r"no affine layer .* that runs and is not frozen"):
            call(model, images)
    assert len(change_rate(model, images).mean) == 4  # which changes nothing, and looks at all


# Branches that start at zero.


class Residual(nn.Module):
    """A block whose branch ends in what `zero` makes 0."""

    def __init__(self, zero):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.one, self.two, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.gate, self.scale = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(8, 1, 1))
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)
        nn.init.zeros_(self.get_parameter(zero))

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.norm(self.two(self.one(x).relu())) * self.scale
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((x + self.gate * y).relu().mean((2, 3)))


@pytest.mark.parametrize("zero", ["norm.weight", "gate", "scale"])
@pytest.mark.parametrize("options", [{}, {"nonhomogeneous": "scale"}, {"filters": None}])
def test_a_branch_that_starts_at_zero_waits(images, zero, options):
    torch.manual_seed(0)
    model = Residual(zero)
    report = initialize(model, images, **options)
    notes = {row.name: row.note for row in report.layers}
    assert "left out of the balance: no gradient reaches it" in notes["one"]
    assert "left out of the balance" not in notes["stem"] + notes["head"]
    rates = change_rate(model, images).mean
    assert rates["one"] == 0
    assert max(rates["stem"], rates["head"]) < 1.6 * min(rates["stem"], rates["head"])
    assert not model.get_parameter(zero).any()  # as it was meant
    names = ["stem", "head"] if zero == "norm.weight" else ["stem", "one", "two", "head"]
    if not options:
        model = Residual(zero)
        initialize(model, images, between=False)
        assert_normalised(model, images, names)


def test_resnet_with_zero_last_norms(images):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(zero_init_residual=True).eval()
    report = initialize(model, images[:16], "gaussian")
    assert report.spread_after < 1.05
    waiting = [row.name for row in report.layers if "left out of the balance" in row.note]
    assert waiting == [f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]


@pytest.mark.parametrize("call", [rescale, lambda model, images: initialize(model, images, None)])
def test_a_last_layer_that_is_zero_is_an_error_that_says_what_to_do(images, call):
    model = backbone_and_head().requires_grad_(True)
    nn.init.zeros_(model[1][2].weight)
    before = state(model)
    with pytest.raises(
        InitializationError, match=r"no layer learns: .*give a last layer that starts at 0 random weights"
    ):
        call(model, images)
    assert_same(model, before)
    nn.init.normal_(model[1][2].weight, std=0.01)  # the remedy
    call(model, images)


def test_a_convolution_that_is_zero_stays_so_without_filters(images):
    model = backbone_and_head().requires_grad_(True)
    model[0][2] = nn.Sequential(model[0][2], Skip(nn.Conv2d(8, 8, 1)))
    nn.init.zeros_(model[0][2][1].layer.weight)
    report = initialize(model, images, None)
    assert {row.name: row.note for row in report.layers}["0.2.1.layer"].startswith("its weights are all 0 and stay so")
    assert report.spread_after < 1.05
    assert change_rate(model, images).mean["0.2.1.layer"] == float("inf")


class Skip(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)


def test_a_head_that_is_computed_and_not_returned_is_noted(images):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.side, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = self.stem(x).relu().mean((2, 3))
            self.auxiliary = self.side(x)
            return self.head(x)

    torch.manual_seed(0)
    model = Auxiliary()
    report = initialize(model, images)
    assert "left out of the balance" in {row.name: row.note for row in report.layers}["side"]
    assert report.spread_after < 1.05
    assert change_rate(model, images).mean["side"] == 0


# Values that do not depend on the image.


class Query(nn.Module):
    """A learned token asks the positions, after layers of its own."""

    def __init__(self, start):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(start(1, 1, 16))
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q = self.q(self.token.expand(len(x), -1, -1))
        k, v = self.kv(x).chunk(2, -1)
        return self.out(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v).flatten(1)


@pytest.mark.parametrize("start", [torch.randn, torch.zeros])
@pytest.mark.parametrize("filters", ["kmeans", "gaussian", "orthonormal", None])
def test_a_learned_query(images, filters, start):
    torch.manual_seed(0)
    model = Query(start)
    report = initialize(model, images, filters, between=False)
    assert "its input is the same for all images" in {row.name: row.note for row in report.layers}["q"]
    assert_normalised(model, images, ["embed", "kv", "out"])
    values = model.q(model.token).detach() - model.q.bias.detach()
    assert torch.equal(model.q.bias, torch.full((16,), 0.1))
    if start is torch.randn:
        assert values.square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    else:
        assert model.q.weight.square().sum(1).mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    whole = Query(start)
    assert initialize(whole, images, filters).output_change < 1e-5


class Recurrent(nn.Module):
    """An update of a state that starts at 0, twice, from the image and the state before."""

    def __init__(self):
        super().__init__()
        self.look, self.update = nn.Linear(768, 12), nn.Linear(12, 12)
        self.time, self.head = nn.Linear(4, 12), nn.Linear(12, 5)
        self.register_buffer("steps", torch.linspace(0, 1, 4))

    def forward(self, x):
        x = self.look(x.flatten(1))
        state = x.new_zeros(len(x), 12)
        for _ in range(2):
            state = (self.update(state) + x + self.time(self.steps.expand(len(x), -1))).tanh()
        return self.head(state)


@pytest.mark.parametrize("filters", ["pca", "gaussian"])
def test_a_state_that_starts_at_zero_and_an_embedding_of_time(images, filters):
    torch.manual_seed(0)
    model = Recurrent()
    report = initialize(model, images, filters, between=False)
    notes = {row.name: row.note for row in report.layers}
    assert all("its input is the same for all images" in notes[name] for name in ("update", "time"))
    assert_normalised(model, images, ["look", "head"])
    assert model.update.weight.square().sum(1).mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    assert (model.time(model.steps) - model.time.bias).square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    lsuv(copy.deepcopy(model), images)


def test_positions_without_images_vary_over_the_positions(images):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
            place = self.place(grid.expand(len(x), -1, -1, -1))
            return self.head((self.embed(x) + place).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Positions()
    initialize(model, images, between=False)
    assert_normalised(model, images, ["embed", "place", "head"])


def test_one_image_tells_no_variance(images):
    with pytest.raises(InitializationError, match=r"zero variance on 1 image.*; pass more"):
        initialize(Query(torch.randn), images[:1], "gaussian")


# Outputs.


@pytest.mark.parametrize("shape", [lambda y: y[:, 0], lambda y: {"score": y.squeeze(1)}, lambda y: (y[:, 0], y)])
def test_one_value_for_each_image(images, shape):
    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 1)

        def forward(self, x):
            return shape(self.head(self.stem(x).relu().mean((2, 3))))

    torch.manual_seed(0)
    model = Score()
    assert initialize(model, images).spread_after < 1.05
    assert initialize(Score(), images, nonhomogeneous="scale").spread_after < 1.05
    assert len(change_rate(model, images).mean) == 2
    lsuv(model, images)


# Forward passes that change the model.


class Grid:
    """A helper that is no module, with a memory of its own."""

    def __init__(self):
        self.rows, self.sizes, self.strength = None, [], torch.full((1,), 0.1)

    def fit(self, x):
        self.rows = torch.linspace(-1, 1, 16).square().expand(len(x), 1, 1, -1).clone()
        self.sizes.append(len(x))

    def __call__(self):
        self.strength.mul_(1.1)
        return self.rows * self.strength


class Fitted(nn.Module):
    """Fits its helper to the number of images where that is another than the last time."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.grid, self.last = Grid(), None

    def forward(self, x):
        if len(x) != self.last:
            self.last = len(x)
            self.grid.fit(x)
        return self.head(self.conv(x + self.grid()).relu().mean((2, 3)))


@pytest.mark.parametrize("call", [initialize, rescale, lsuv, change_rate])
def test_the_memory_of_a_helper(images, call):
    model = Fitted()
    model(images[:3])  # as when it is looked at
    before, grid = copy.deepcopy(vars(model.grid)), model.grid
    call(model, images)
    assert model.grid is grid
    assert model.last == 3
    assert {name: str(value) for name, value in vars(grid).items()} == {n: str(value) for n, value in before.items()}


class Memory(nn.Module):
    """Changes itself in every way that a forward pass does."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue", torch.zeros(4, 5))
        self.register_buffer("seen", torch.zeros(0))
        self.calls, self.history, self.cache, self.last = 0, [], {}, None
        self.scale = torch.ones(1)  # a tensor that is no buffer

    def forward(self, x):
        self.calls += 1
        self.count += len(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3), keepdim=True)[0])
            self.seen.resize_(len(x)).copy_(x.mean((1, 2, 3)))
            self.scale.mul_(1.5)
        if "grid" not in self.cache:
            self.cache["grid"] = torch.linspace(-1, 1, 16).square().mul(0.1)
        self.last = self.conv(x - self.mean + self.cache["grid"])
        self.history.append(self.last.mean())
        y = self.head(self.last.relu().mean((2, 3)))
        self.queue = torch.cat([y.detach()[:4], self.queue])[:4]
        self.register_buffer("fresh", y.detach())
        return y


def everything(model):
    """All that a model holds, to compare."""
    plain = {key: copy.deepcopy(value) for key, value in vars(model).items() if not key.startswith("_")}
    return plain, {name: (id(tensor), tensor.clone()) for name, tensor in model.named_buffers()}


def failing(call):
    """A call that raises, as a call that does not."""

    def expect(model, images):
        with pytest.raises(InitializationError):
            call(model, images)

    return expect


@pytest.mark.parametrize(
    "call",
    [
        initialize,
        rescale,
        lsuv,
        change_rate,
        lambda model, images: initialize(model, images, nonhomogeneous="scale"),
        failing(lambda model, images: rescale(model, images[:, :2])),
        failing(lambda model, images: initialize(model, images[:1], "gaussian", bias=float("nan"))),
    ],
)
def test_what_a_forward_pass_changes_is_as_it_was(images, call):
    torch.manual_seed(0)
    model = Memory()
    plain, buffers = everything(model)
    call(model, images)
    plain_after, after = everything(model)
    assert plain_after == plain
    assert {name for name in after if "parametrizations" not in name} == buffers.keys()
    for name, (identity, tensor) in buffers.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], tensor)
    assert torch.equal(model.scale, torch.ones(1))
    copy.deepcopy(model)


class Observed(nn.Module):
    """Activations that are quantized as in deployment: a kernel writes to buffers and resizes them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.quantize = torch.ao.quantization.default_fused_per_channel_wt_fake_quant()
        self.observe = torch.ao.quantization.MovingAverageMinMaxObserver()

    def forward(self, x):
        x = self.conv(self.observe(x)).relu()
        x = x + self.quantize(self.conv.weight).mean()
        return self.head(x.mean((2, 3)))


def test_a_buffer_without_values_is_left(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten())
    model.register_buffer("later", torch.empty(3, device="meta"))
    initialize(model, images)
    with pytest.raises(InitializationError):
        rescale(model, images[:, :2])
    assert model.later.is_meta


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated
@pytest.mark.parametrize("call", [initialize, failing(lambda model, images: rescale(model, images[:, :2]))])
def test_observers_of_quantization_are_as_they_were(images, call):
    model = Observed()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any(not buffer.numel() for buffer in before.values())
    call(model, images)
    for name, buffer in model.named_buffers():
        assert buffer.shape == before[name].shape, name
        assert torch.equal(buffer, before[name]), name
    assert Observed()(images).isfinite().all()


class Adapted(nn.Linear):
    """A layer with an adapter of low rank, which `train(False)` merges into the weight, as loralib does."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("training", [True, False])
def test_going_to_evaluation_mode_may_change_weights(images, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Adapted(8, 5))
    model.train(training)
    before = state(model)
    with pytest.raises(InitializationError):
        rescale(model, images[:, :2])
    assert_same(model, before)
    outputs = model(images)
    report = rescale(model, images)
    assert model[4].training == training
    assert model[4].merged == (not training)
    assert report.spread_after < 0.5 * report.spread_before
    assert (model(images) - outputs).norm() < 1e-5 * outputs.norm()


def test_a_running_mean_in_the_gradient(images):
    class Tracked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            self.register_buffer("size", torch.ones(8))

        def forward(self, x):
            x = self.conv(x).relu().mean((2, 3))
            self.size.mul_(0.9).add_(0.1 * x.square().mean(0))  # with its gradient, as observers do by mistake
            return self.head(x / self.size.detach().sqrt())

    torch.manual_seed(0)
    model = Tracked()
    initialize(model, images, nonhomogeneous="scale")
    assert torch.equal(model.size, torch.ones(8))
    assert model.size.is_leaf


def test_biases_that_are_cached_by_shape(images):
    class Cached(nn.Module):
        """As LeViT: in evaluation mode a table of biases is looked up once for each device."""

        def __init__(self):
            super().__init__()
            self.embed, self.qkv, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 48), nn.Linear(16, 5)
            self.biases = nn.Parameter(torch.randn(16))
            self.register_buffer("index", (torch.arange(16)[:, None] - torch.arange(16)).abs(), persistent=False)
            self.cache = {}

        def forward(self, x):
            q, k, v = self.qkv(self.embed(x).flatten(2).transpose(1, 2)).chunk(3, -1)
            if str(x.device) not in self.cache:
                self.cache[str(x.device)] = self.biases[self.index]
            attention = (q @ k.transpose(1, 2) / 4 + self.cache[str(x.device)]).softmax(-1)
            return self.head((attention @ v).mean(1))

    torch.manual_seed(0)
    model = Cached()
    assert initialize(model, images).output_change < 1e-5
    assert model.cache == {}
    copy.deepcopy(model)
    assert_normalised(initialized(Cached(), images), images, ["embed", "qkv", "head"])


def initialized(model, images, **options):
    initialize(model, images, between=False, **options)
    return model


# The number of images, and images that interact.


class Parts(nn.Module):
    """A network through which the images go in parts."""

    def __init__(self, split):
        super().__init__()
        self.split = split
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(392, 16), nn.Linear(16, 5)

    def part(self, x):
        return self.head(self.hidden(self.norm(self.conv(x)).relu().flatten(1)).relu())

    def forward(self, x):
        return torch.cat([self.part(part) for part in self.split(x)])


PARTS = {
    "slices": lambda x: [x[i : i + 8] for i in range(0, len(x), 8)],
    "single images": lambda x: [x[i : i + 1] for i in range(len(x))],
    "split": lambda x: x.split(8),
    "uneven": lambda x: x.split(5),
    "chunks": lambda x: x.chunk(3),
    "iteration": lambda x: [image[None] for image in x],
}


@pytest.mark.parametrize("split", PARTS)
@pytest.mark.parametrize("filters", ["kmeans", "gaussian"])
def test_images_that_go_through_in_parts(images, split, filters):
    torch.manual_seed(0)
    model = Parts(PARTS[split])
    whole = copy.deepcopy(model)
    whole.split = lambda x: [x]
    initialize(model, images, filters, between=False)
    whole.load_state_dict(model.state_dict())
    assert_normalised(whole, images, ["conv", "hidden", "head"])
    again = Parts(PARTS[split])
    report = initialize(again, images, filters)
    assert report.output_change < 1e-5
    assert report.spread_after < 1.05
    assert not [row.note for row in report.layers if "used first" in row.note]  # as all uses count
    lsuv(again, images)
    whole.load_state_dict(again.state_dict())
    assert abs(whole.hidden(whole.norm(whole.conv(images)).relu().flatten(1)).std().item() - 1) < 0.03


class Repeated(nn.Module):
    """One layer several times, as often as values decide."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        for _ in range(3):
            x = self.hidden(x).relu()
            if x.max() == 0:
                break
        return self.head(x)


def test_a_layer_that_runs_as_often_as_values_decide_says_which_use_counts(images):
    model = Repeated()
    report = initialize(model, images, between=False)
    notes = {row.name: row.note for row in report.layers}
    assert "used 3 times, normalised where it is used first" in notes.pop("hidden")
    assert not any("used" in note for note in notes.values())
    assert_normalised(model, images, ["conv", "head"])
    first = model.hidden(model.conv(images).relu().mean((2, 3)))
    torch.testing.assert_close(first.std(0, correction=0), torch.ones(8), rtol=1e-4, atol=0)


class Singly(nn.Module):
    """Each image by itself, without a dimension for images."""

    def __init__(self, middle, one_by_one=True):
        super().__init__()
        self.one_by_one = one_by_one
        self.first, self.middle, self.head = nn.Conv2d(3, 8, 3), middle, nn.Linear(8, 5)

    def part(self, x):
        return self.head(self.middle(self.first(x).relu()).relu().mean((-2, -1)))

    def forward(self, x):
        return torch.stack([self.part(image) for image in x]) if self.one_by_one else self.part(x)


@pytest.mark.parametrize(
    "middle",
    [lambda: nn.Conv2d(8, 8, 3, padding=1), lambda: nn.Conv2d(8, 8, 3, groups=4), lambda: nn.ConvTranspose2d(8, 8, 2)],
)
@pytest.mark.parametrize("filters", ["kmeans", "orthonormal"])
def test_images_without_a_dimension_for_images(images, middle, filters):
    torch.manual_seed(0)
    model = Singly(middle())
    report = initialize(model, images, filters, between=False)
    if not model.middle.transposed:
        assert [row.filters for row in report.layers][:2] == [filters] * 2
    whole = Singly(middle(), one_by_one=False)
    whole.load_state_dict(model.state_dict())
    assert_normalised(whole, images, ["first", "middle", "head"])
    report = initialize(model, images, filters)
    assert report.spread_after < 1.05
    assert report.output_change < 1e-5


class Generated(nn.Module):
    """Factors, offsets and a map that layers make of a vector, a number and coordinates, without the images."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.randn(4))
        self.conv, self.factors = nn.Conv2d(3, 8, 3), nn.Linear(4, 8)
        self.offset, self.map, self.head = nn.Linear(1, 8), nn.Conv2d(1, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x) * self.factors(self.code)[:, None, None]
        grid = torch.linspace(-1, 1, 16).expand(1, 16, 16)
        x = x + self.offset(x.new_tensor([0.5]))[:, None, None] + self.map(grid)
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize("filters", ["kmeans", "pca", "gaussian", "orthonormal"])
def test_layers_of_what_has_no_dimension_for_images(images, filters):
    torch.manual_seed(0)
    model = Generated()
    report = initialize(model, images, filters, between=False)
    assert {row.name for row in report.layers if "same for all images" in row.note} == {"factors", "offset"}
    grid = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)
    assert (model.map(grid).std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    assert model.factors(model.code).sub(0.1).square().mean().item() == pytest.approx(1, abs=1e-3)
    assert_normalised(model, images, ["conv", "head"])
    assert initialize(model, images, filters).output_change < 1e-5


def test_products_of_vectors_are_no_layers(images):
    class Number(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.direction = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8))
            self.code, self.matrix = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            x = self.conv(x).relu().mean((2, 3))
            for equation in ("i,io->o", "...i,io->...o"):
                x = x + torch.einsum(equation, self.code, self.matrix)
            return nn.functional.linear(x, self.direction)

    torch.manual_seed(0)
    report = initialize(Number(), images)
    assert [row.name for row in report.layers] == ["conv"]
    assert report.kept == {"matrix": "used by einsum"}


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr])
def test_a_graph_of_pixels(images, layout):
    """Graph convolution; the adjacency matrix is a buffer, and sparse."""

    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            edges = (torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) < 0.05).float()
            self.register_buffer("edges", edges if layout == torch.strided else edges.to_sparse(layout=layout))
            self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.first(x.flatten(2).transpose(1, 2)).relu()  # (images, pixels, channels)
            columns = x.transpose(0, 1).flatten(1)
            found = torch.mm(self.edges, columns) if layout == torch.strided else torch.sparse.mm(self.edges, columns)
            x = self.second(found.view(256, len(x), 8).transpose(0, 1)).relu()
            return self.head(x.mean(1))

    torch.manual_seed(0)
    model = Pixels()
    edges = model.edges
    initialize(model, images, between=False)
    assert_normalised(model, images, ["first", "second", "head"])
    report = initialize(model, images)
    assert report.spread_after < 1.05
    assert report.output_change < 1e-5
    with pytest.raises(InitializationError, match="rejects"):
        initialize(model, images[:, :2])
    assert model.edges is edges


class Nodes(nn.Module):
    """Messages along the edges of one graph, whose nodes are the rows."""

    def __init__(self, dense):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in ((5, 16), (16, 16), (16, 3)))
        edges = torch.randint(0, 60, (2, 200), generator=torch.Generator().manual_seed(1))
        self.register_buffer("edges", torch.eye(60)[edges[0]].T @ torch.eye(60)[edges[1]] if dense else edges)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if self.edges.is_floating_point():
                x = (x + self.edges @ x).relu()
            else:
                x = (x + torch.zeros_like(x).index_add(0, self.edges[1], x[self.edges[0]])).relu()
        return x


class Each(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.stack([self.model(one) for one in x])


@pytest.mark.parametrize("dense", [True, False])
def test_the_nodes_of_one_graph(dense):
    torch.manual_seed(0)
    model, x = Nodes(dense), torch.randn(60, 5)
    for call in (initialize, rescale, change_rate, lsuv):
        with pytest.raises(
            InitializationError, match=r"all 60 rows together .* pass x\[None\], or .* and a module whose"
        ):
            call(model, x)
    initialize(Each(model), x[None], between=False)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, _, output, name=name: found.update({name: output}))
    model(x)
    for output in found.values():
        torch.testing.assert_close(output.std(0, correction=0), torch.ones(output.shape[1]), rtol=0, atol=1e-4)
    report = initialize(Each(model), x[None])
    assert len(found) == 3
    assert report.spread_after < 1.001
    assert report.output_change < 1e-5


def test_the_frames_of_a_clip(images):
    class Shifted(nn.Module):
        """Half of the channels come from the frame before; a clip has four frames, which are rows of the batch."""

        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = self.first(x).relu().unflatten(0, (-1, 4))
            x = torch.cat([x[:, :, :4], F.pad(x[:, :-1, 4:], (0, 0) * 3 + (1, 0))], 2).flatten(0, 1)
            return self.head(self.second(x).relu().mean((2, 3))).unflatten(0, (-1, 4)).mean(1)

    torch.manual_seed(0)
    model = Shifted()
    before = state(model)
    for call in (initialize, rescale, change_rate, lsuv):
        with pytest.raises(InitializationError, match=r"all 48 rows .* x\.unflatten\(0, \(-1, frames\)\), and"):
            call(model, images)
        assert_same(model, before)
    initialize(Each(model), images.unflatten(0, (-1, 4)), between=False)
    assert_normalised(model, images, ["first", "second", "head"])
    assert initialize(Each(model), images.unflatten(0, (-1, 4))).spread_after < 1.001


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    "forward", [lambda m, x: m.head(x["image"].flatten(1)), lambda m, x: m.head(x.image.flatten(1))]
)
def test_a_model_that_takes_an_object(images, forward):
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(768, 5)

        def forward(self, x):
            return forward(self, x)

    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, image):
            return self.model(Batch(image=image))

    class Batch(dict):
        __getattr__ = dict.__getitem__

    for call in (initialize, rescale, change_rate, lsuv):
        with pytest.raises(InitializationError, match="where it takes a dict or another object, wrap it in a module"):
            call(Dict(), {"image": images})
    model = Dict()
    initialize(Wrapped(model), {"image": images})
    assert model.head(images.flatten(1)).std(0, correction=0).mean().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("sizes", [lambda n: n > 4, lambda n: n % 16 == 0, lambda n: n % 5 == 0])
def test_another_way_for_many_images(images, sizes):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.few, self.many = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x):
            layer = self.many if sizes(len(x)) else self.few
            return layer(self.conv(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Either()
    initialize(model, images, between=False)
    assert_normalised(model, images, ["conv"])
    model.many = model.few = model.many if sizes(16) else model.few
    assert_normalised(model, images, ["few"])


@pytest.mark.parametrize(
    "interact",
    [
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 8, 1)),
        lambda x: x / x.abs().amax(),
        lambda x: x - x.mean(0),
        lambda x: x + x.flatten(1).softmax(0).view(x.shape).cumsum(0).flip(0),
        lambda x: x * len(x) * x.mean((2, 3)).softmax(0)[:, :, None, None],
    ],
)
@pytest.mark.parametrize(
    "order", [lambda images: images, lambda images: images.flip(0), lambda images: images.roll(9, 0)]
)
def test_images_that_interact_are_one_batch(images, interact, order):
    class Interacting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.between = nn.Conv2d(3, 8, 3), interact
            self.next, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.next(self.between(self.conv(x)).relu()).relu().mean((2, 3)))

    torch.manual_seed(0)
    model, images = Interacting(), order(images)
    initialize(model, images, between=False)
    assert_normalised(model, images, ["conv", "next", "head"])


def test_attention_over_what_others_take_for_positions(images):
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(48, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=False)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.encoder(self.embed(x.reshape(len(x), 16, 48)))).mean(1)

    torch.manual_seed(0)
    model = Sequence()
    initialize(model, images, between=False)
    assert_normalised(model, images, ["embed", "encoder.layers.0.linear1", "encoder.layers.0.linear2", "head"])


# What people pass as images.


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number], number


LABELS = torch.arange(48)
GIVEN = {
    "batch of a loader": lambda x: next(iter(torch.utils.data.DataLoader(Images(x), batch_size=48))),
    "images and labels": lambda x: (x, LABELS),
    "images and vectors of labels": lambda x: [x, torch.ones(48, 5)],
    "labels first": lambda x: [LABELS, x],
    "batches with labels first": lambda x: [(LABELS[:20], x[:20]), (LABELS[20:], x[20:])],
    "one dictionary": lambda x: {"label": LABELS, "image": x},
    "dictionaries": lambda x: [{"image": x[:20], "label": LABELS[:20]}, {"image": x[20:], "label": LABELS[20:]}],
    "list of images": list,
    "data set": Images,
    "part of a data set": lambda x: torch.utils.data.Subset(Images(x), range(48)),
    "loader": lambda x: torch.utils.data.DataLoader(Images(x), batch_size=9),
    "batches": lambda x: [x[:16], x[16:32], x[32:]],
    "generator": lambda x: (part for part in x.split(24)),
}


@pytest.mark.parametrize("given", GIVEN)
def test_images_as_they_come(images, given):
    def make():
        torch.manual_seed(0)
        return backbone_and_head().requires_grad_(True)

    model, expected = make(), make()
    initialize(expected, images)
    assert initialize(model, GIVEN[given](images)).images == 48
    assert_same(model, state(expected))


AMBIGUOUS = {
    "inputs and targets": (lambda x: [x, x + 1], r"list of two tensors of the same shape.*: pass the inputs alone"),
    "vectors and targets": (lambda x: [x.flatten(1), x.flatten(1)], "two tensors of the same shape"),
    "two batches": (lambda x: [x[:24], x[24:]], r"two batches: pass .*torch\.cat"),
    "integers, then floats": (lambda x: (LABELS, x), r"first tensor is torch\.int64: pass the images alone"),
    "several of floats": (
        lambda x: [(LABELS, x, x)],
        r"begins with .* several tensors of floats: yield the images first",
    ),
    "images of two sizes": (
        lambda x: [x[0], x[1, :, :8, :8]],
        r"images of different shapes \[.*\]: resize them to one",
    ),
    "targets of floats": (
        lambda x: (x, torch.rand(48, 4)),
        r"\(2, 3, 16, 16\), \(2, 4\): .*; pass the images alone, if",
    ),
    "a tuple of images": (lambda x: tuple(x), r"\(2, 16, 16\), \.\.\.: .*; pass the images alone"),
}


@pytest.mark.parametrize("given", AMBIGUOUS)
def test_images_that_may_be_meant_otherwise(images, given):
    make, message = AMBIGUOUS[given]
    model = backbone_and_head()
    before = state(model)
    with pytest.raises(InitializationError, match=message):
        initialize(model, make(images))
    assert_same(model, before)


# Integers.


class Tokens(nn.Module):
    """A small BERT, or a GPT where the output layer is none of the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 16), nn.Parameter(torch.randn(12, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 50)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.place))


class Columns(nn.Module):
    """Numbers beside a category."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(7, 8), nn.Linear(12, 16), nn.Linear(16, 2)

    def forward(self, numbers, category):
        return self.head(self.hidden(torch.cat([numbers, self.embed(category[:, 0])], 1)).relu())


class Bytes(nn.Module):
    """Normalises its images itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.conv(x.float() / 255 - 0.5).relu().mean((2, 3)))


def integers(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("make", "given", "names"),
    [
        (Tokens, lambda: integers(50, 40, 12), ["encoder.layers.0.linear1", "encoder.layers.1.linear2", "head"]),
        (Columns, lambda: (torch.randn(40, 4), integers(7, 40, 1)), ["hidden", "head"]),
        (Bytes, lambda: integers(256, 40, 3, 16, 16).byte(), ["conv", "head"]),
    ],
)
@pytest.mark.parametrize("filters", ["kmeans", "gaussian"])
def test_integers_that_the_model_takes(make, given, names, filters):
    torch.manual_seed(0)
    model, inputs = make(), given()
    initialize(model, inputs, filters, between=False)
    together = model if isinstance(inputs, torch.Tensor) else lambda pair: model(*pair)
    modules = {name: model.get_submodule(name) for name in names}
    found = {}
    hooks = [m.register_forward_hook(lambda m, _, y, n=n: found.update({n: y.detach()})) for n, m in modules.items()]
    model.eval()
    together(inputs)
    for hook in hooks:
        hook.remove()
    for output in found.values():
        channels = output.movedim(1 if output.ndim == 4 else -1, 0).flatten(1)
        torch.testing.assert_close(channels.std(1, correction=0), torch.ones(len(channels)), atol=1e-3, rtol=0)
    assert rescale(model, inputs).output_change < 1e-5
    lsuv(model, inputs)
    assert change_rate(model, inputs).spread > 0


def test_integers_that_the_model_does_not_take(images):
    model = backbone_and_head()
    before = state(model)
    with pytest.raises(InitializationError, match=r"images are torch\.uint8: pass float .* this one does not: "):
        initialize(model, images.byte())
    assert_same(model, before)


class Tied(nn.Module):
    """A language model whose output layer has the weights of its embedding."""

    def __init__(self, bias, use):
        super().__init__()
        self.embed, self.use = nn.Embedding(50, 16), use
        self.first, self.second, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.use(self, x)
        return self.head(self.norm(x + self.second(self.first(x).relu())))


USES = {
    "embedding": lambda m, x: m.embed(x),
    "rows": lambda m, x: m.embed.weight[x],
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("call", [lambda *given: initialize(*given, between=False), lsuv])
def test_an_output_layer_that_is_tied_to_the_embedding_stays(use, bias, call):
    torch.manual_seed(0)
    model, x = Tied(bias, USES[use]), integers(50, 40, 12)
    before = model.embed.weight.clone()
    report = call(model, x)
    notes = {row.name: row.note for row in report.layers}
    (tied,) = {*notes} - {"first", "second"}
    assert "its weights stay" in notes[tied]
    assert torch.equal(model.embed.weight, before)
    if call is not lsuv:
        assert_normalised(model, x, ["first", "second"])
    with torch.no_grad():
        outputs = model.first(USES[use](model, x))
    assert outputs.std().item() == pytest.approx(1, abs=0.03)
    assert rescale(model, x).output_change < 1e-5


def known_length(m, x):
    """Of the words of an image as many count as its values say."""
    x = m.embed(x)
    keep = [max(1, round(length)) for length in m.first(x).relu().mean((1, 2)).mul(8).clamp(max=12).tolist()]
    return x * torch.tensor([[[float(word < length)] for word in range(12)] for length in keep])


@pytest.mark.parametrize("call", [lambda *given: initialize(*given, between=False), lsuv])
def test_a_tied_output_layer_where_values_decide(call):
    torch.manual_seed(0)
    model, x = Tied(True, known_length), integers(50, 40, 12)
    before = model.embed.weight.clone()
    report = call(model, x)
    assert ["its weights stay" in row.note for row in report.layers] == [False, False, True]
    assert torch.equal(model.embed.weight, before)
    assert model.first(model.embed(x)).std().item() == pytest.approx(1, abs=0.03)


def test_what_is_scaled_already_is_initialized_again(images):
    model = backbone_and_head().requires_grad_(True)
    initialize(model, images, nonhomogeneous="scale")
    report = initialize(model, images, nonhomogeneous="scale")
    assert not [row.note for row in report.layers if "stay" in row.note]
    assert report.spread_after < 1.05


# Errors at any moment.


class Failing(Memory):
    """Fails in one of its forward passes, in the middle."""

    def __init__(self, left, error):
        super().__init__()
        self.fail = [left, error]  # what a pass changes of it is undone like all else, so that a counter lies outside

    def forward(self, x):
        COUNT[0] += 1
        y = self.conv(x)
        if COUNT[0] == self.fail[0]:
            raise self.fail[1]("on purpose")
        return super().forward(x) + 0 * y.mean((1, 2, 3))[:, None]


COUNT = [0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("options", [{}, {"nonhomogeneous": "scale"}, {"filters": "gaussian", "method": "paper"}])
def test_an_error_in_any_forward_pass_leaves_everything_as_it_was(images, options, error):
    images = images[::8]
    COUNT[0] = 0
    torch.manual_seed(0)
    initialize(Failing(None, error), images, **options)
    passes = COUNT[0]
    assert passes > 5
    for number in range(1, passes + 1):
        COUNT[0] = 0
        torch.manual_seed(0)
        model = Failing(number, error)
        model.conv.eval()
        before, (plain, buffers) = state(model), everything(model)
        random, hooks = torch.get_rng_state(), len(model._forward_hooks)
        with pytest.raises((InitializationError, error)):
            initialize(model, images, **options)
        assert_same(model, before)
        assert state(model).keys() == before.keys()
        assert everything(model)[0] == plain
        assert {name: identity for name, (identity, _) in everything(model)[1].items()} == {
            name: identity for name, (identity, _) in buffers.items()
        }
        assert torch.equal(torch.get_rng_state(), random)
        assert len(model._forward_hooks) == hooks
        assert [module.training for module in model.modules()] == [True, False, True]
        assert not any(parameter.grad is not None for parameter in model.parameters())
        copy.deepcopy(model)


# What is zero but for rounding.


@pytest.mark.parametrize("filters", ["gaussian", "kmeans", "orthonormal", None])
@pytest.mark.parametrize("double", [False, True])
def test_channels_that_cancel_out_do_not_vary(images, filters, double):
    class Cancelling(nn.Module):
        """Half of the channels that come to a depthwise convolution are 0 but for rounding."""

        def __init__(self):
            super().__init__()
            self.stem, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
            self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

        def forward(self, x):
            x = self.stem(x)
            x = torch.cat([x, 0.3 * x - 0.1 * x - 0.2 * x], 1)
            return self.head(self.norm(self.deep(x)).relu().mean((2, 3)))

    torch.manual_seed(0)
    model, images = Cancelling(), images.double() if double else images
    model = model.double() if double else model
    report = initialize(model, images, filters, between=False)
    assert "8 of 16 groups do not vary and keep their scale" in {row.name: row.note for row in report.layers}["deep"]
    assert model.deep.weight.abs().max() < 20
    assert_normalised(model, images, ["stem", "head"])
    with torch.no_grad():
        values = model.deep(torch.cat([model.stem(images), torch.zeros_like(model.stem(images))], 1))
    torch.testing.assert_close(values[:, :8].std((0, 2, 3), correction=0), torch.ones(8).to(values), atol=1e-3, rtol=0)


# Normalisations whose weights come from elsewhere, single queries, experts that hardly any image reaches.


class Conditional(nn.Module):
    """BatchNorm without weights, which come from the class: as in generators of images."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.gains = nn.BatchNorm2d(8, affine=False), nn.Embedding(4, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x, classes):
        x = self.norm(self.second(self.first(x).relu())) * self.gains(classes)[:, :, None, None]
        return self.head(x.relu().sum((2, 3)))


@pytest.mark.parametrize("options", [{}, {"method": "paper", "alpha": 0.9}])
def test_a_normalisation_without_weights_takes_any_scale(images, options):
    torch.manual_seed(0)
    model, classes = Conditional().double(), torch.arange(48) % 4
    initialize(model, (images, classes), "gaussian", between=False)
    expected = model.eval()(images.double(), classes)
    report = rescale(model, (images, classes), **options)
    assert report.spread_before > 100
    assert report.spread_after < (1.01 if not options else 2)
    torch.testing.assert_close(model(images.double(), classes), expected, rtol=1e-9, atol=1e-9)
    assert report.unsaved == ["norm.eps"]
    assert model.norm.eps < 1e-5


def test_statistics_without_a_module_hold_the_scale(images):
    class Functional(Conditional):
        def forward(self, x, classes):
            x = self.second(self.first(x).relu())
            x = nn.functional.batch_norm(x, self.norm.running_mean, self.norm.running_var)
            return self.head((x * self.gains(classes)[:, :, None, None]).relu().sum((2, 3)))

    torch.manual_seed(0)
    model, classes = Functional(), torch.arange(48) % 4
    report = initialize(model, (images, classes), "gaussian")
    assert report.output_change < 1e-6
    assert "batch_norm" in report.held_by
    assert report.unsaved == []


class Pooling(nn.Module):
    """Attention of one learned query, with positions first or images first; behind ReLU, so that channels are dead."""

    def __init__(self, batch_first, relu):
        super().__init__()
        self.embed, self.query = nn.Linear(48, 16), nn.Parameter(torch.randn(1, 1, 16))
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=batch_first), nn.Linear(16, 5)
        self.relu = relu

    def forward(self, x):
        x = self.embed(x.reshape(len(x), 16, 48))
        query = self.query.expand(len(x), -1, -1)
        query = query.relu() if self.relu else query
        if not self.attention.batch_first:
            x, query = x.transpose(0, 1), query.transpose(0, 1)
        x, _ = self.attention(query, x, x)
        return self.head(x.flatten(0, 1))


@pytest.mark.parametrize("filters", ["kmeans", "gaussian"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_single_query_does_not_vary(images, batch_first, relu, filters):
    images = images[::3]  # one batch
    torch.manual_seed(0)
    model = Pooling(batch_first, relu)
    report = initialize(model, images, filters, between=False)
    noted = {row.name for row in report.layers if "the same for all images" in row.note}
    assert noted == {"attention.in_proj[0:16]"}
    assert_normalised(model, images, ["embed", "head"])
    assert rescale(model, images).output_change < 1e-5


@pytest.mark.parametrize("filters", ["pca", "gaussian"])
@pytest.mark.parametrize("reached", [0, 1, 2])
def test_an_expert_that_few_images_reach(images, reached, filters):
    class Experts(nn.Module):
        """The brightest images go to the second expert, which takes the mean of what it has."""

        def __init__(self):
            super().__init__()
            self.embed, self.one, self.other = nn.Linear(768, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            where = (x.flatten(1).std(1) > limit).nonzero().squeeze(1)
            x = self.embed(x.flatten(1))
            other = self.other(x[where])
            other = other - 0.5 * other.mean(-1, keepdim=True)
            return self.head(self.one(x).relu().index_add(0, where, other))

    limit = images.flatten(1).std(1).sort(descending=True).values[reached]
    torch.manual_seed(0)
    model = Experts()
    report = initialize(model, images, filters)
    notes = {row.name: row.note for row in report.layers}
    assert ("the same for all images" in notes["other"]) == (reached == 1)
    assert ("no image reaches it" in notes["other"]) == (reached == 0)
    assert report.output_change < 1e-5


def by_mask(model, x, chosen, share):
    y = torch.zeros_like(x)
    for number, expert in enumerate(model.experts):
        mask = chosen == number
        y[mask] = expert(x[mask]) * share[mask, None]
    return y


def by_rows(model, x, chosen, share):
    y = x
    for number, expert in enumerate(model.experts):
        rows = (chosen == number).nonzero().squeeze(1)
        if len(rows):
            y = y.index_add(0, rows, expert(x.index_select(0, rows)))
    return y


def by_order(model, x, chosen, share):
    order = chosen.argsort(stable=True)
    parts = x[order].split([int((chosen.detach() == number).sum().numpy()) for number in range(3)])
    y = torch.cat([expert(part) for expert, part in zip(model.experts, parts, strict=True)])
    return torch.empty_like(y).index_copy(0, order, y)


class Mixture(nn.Module):
    """A gate sends each image to one of three experts; before it is initialized, all to the first."""

    def __init__(self, route):
        super().__init__()
        self.route = route
        self.embed, self.gate, self.head = nn.Linear(768, 16), nn.Linear(16, 3), nn.Linear(16, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(3))
        self.gate.bias.data.copy_(torch.tensor([100.0, 0, 0]))

    def forward(self, x):
        x = self.embed(x.flatten(1)).relu()
        share, chosen = self.gate(x).softmax(1).max(1)
        return self.head(self.route(self, x, chosen, share))


@pytest.mark.parametrize("route", [by_mask, by_rows])
def test_a_gate_that_chooses_experts(images, route):
    def make():
        torch.manual_seed(0)
        return Mixture(route)

    model = make()
    initialize(model, images, between=False)
    chosen = model.gate(model.embed(images.flatten(1)).relu()).argmax(1)
    assert len(chosen.unique()) == 3
    layers = ["embed", "gate", "head", *(f"experts.{number}.{part}" for number in range(3) for part in (0, 2))]
    assert_normalised(model, images, layers)
    balanced = make()
    report = initialize(balanced, images)
    assert {row.name for row in report.layers} == {*layers}
    assert report.output_change < 1e-5
    torch.testing.assert_close(balanced(images), model(images), rtol=1e-4, atol=1e-5)
    assert report.spread_after < report.spread_before / 20
    assert initialize(make(), images, nonhomogeneous="scale").spread_after < 1.01


def test_experts_chosen_by_values_outside_of_torch(images):
    torch.manual_seed(0)
    model = Mixture(by_order)
    before = state(model)
    with pytest.raises(InitializationError, match=r"what numpy gives decides .* pass between=False"):
        initialize(model, images)
    assert_same(model, before)
    report = initialize(model, images, between=False)
    assert_normalised(model, images, [row.name for row in report.layers])


def test_a_layer_that_runs_with_gradients_only(images):
    class Auxiliary(Mixture):
        def forward(self, x):
            x = self.embed(x.flatten(1)).relu()
            return self.head(x + self.gate(x).mean(1, keepdim=True) if torch.is_grad_enabled() else x)

    torch.manual_seed(0)
    model = Auxiliary(None)
    before = state(model)
    with pytest.raises(InitializationError, match=r"layer gate runs only now and then .* pass between=False or"):
        initialize(model, images)
    assert_same(model, before)
    assert [row.name for row in initialize(model, images, between=False).layers] == ["embed", "head"]
    assert rescale(model, images, nonhomogeneous="scale").spread_after < 1.01


def test_rates_where_later_images_go_to_several_experts():
    torch.manual_seed(0)
    model = Mixture(by_rows)
    model.gate.weight.data.zero_()
    model.gate.weight.data[1] = 1
    model.gate.bias.data.copy_(torch.tensor([0.0, -9, -100]))
    dark, bright = 0.1 * torch.randn(24, 768), 9 * torch.randn(8, 768)
    rates = change_rate(model, torch.cat([dark[:16], torch.stack([dark[16:], bright], 1).flatten(0, 1)])).mean
    assert min(rates["experts.0.0"], rates["experts.1.0"]) > 0
    assert "experts.2.0" not in rates


class Numbers(nn.Module):
    """Numbers that are computed of weights, as `use` has it."""

    def __init__(self, use):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(768, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.use = use

    def forward(self, x):
        return self.head(self.use(self, self.first(x.flatten(1)).relu()).relu())


def divided(m, x):
    return m.second(x / float(m.first.weight.detach().norm())) * m.second.weight.abs().max().item()


def normalised(m, x):
    return F.linear(x, m.second.weight / m.second.weight.norm().item(), m.second.bias)


def checked(m, x):
    assert torch.isfinite(m.second.weight).all()
    return F.linear(x, 0.5 * m.second.weight, m.second.bias)


@pytest.mark.parametrize(("use", "layers"), [(divided, 3), (normalised, 2), (checked, 3)])
def test_numbers_that_are_computed_of_weights(images, use, layers):
    torch.manual_seed(0)
    model = Numbers(use)
    report = initialize(model, images, between=False)
    names = [row.name for row in report.layers]
    assert names == (["first", "second", "head"] if layers == 3 else ["first", "head"])
    assert [*report.kept] == ([] if layers == 3 else ["second.weight"])
    assert_normalised(model, images, [name for name in names if use is divided or name != "second"])
    assert rescale(model, images, nonhomogeneous="scale").spread_after < 1.01
    assert rescale(model, images).output_change < 1e-5


def test_a_weight_of_low_rank_is_computed(images):
    class LowRank(Numbers):
        def __init__(self):
            super().__init__(lambda m, x: F.linear(x, m.second.weight + m.out @ m.down, m.second.bias))
            self.out, self.down = nn.Parameter(torch.zeros(16, 4)), nn.Parameter(torch.randn(4, 16))

    torch.manual_seed(0)
    model = LowRank()
    before = state(model)
    report = initialize(model, images)
    assert [row.name for row in report.layers] == ["first", "head"]
    assert report.kept == {"out": "used by matmul", "down": "used by matmul", "second.weight": "used by add"}
    assert torch.equal(model.down, before["down"])
    assert torch.equal(model.second.weight, before["second.weight"])


class Merged(nn.Module):
    """A convolution whose weights two others compute, as re-parametrized blocks do when they are run."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.narrow, self.wide = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        kernel = F.conv2d(self.wide.weight, self.narrow.weight.transpose(0, 1))
        bias = F.conv2d(self.narrow.bias.view(1, -1, 1, 1).expand(-1, -1, 3, 3), self.wide.weight, self.wide.bias)
        return self.head(F.conv2d(x, kernel, bias.flatten()).relu().mean((2, 3)))


class Static(nn.Module):
    """The weights of a convolution come from a small network, which sees a vector and no image."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.randn(1, 6))
        self.hidden, self.out = nn.Linear(6, 16), nn.Linear(16, 8 * 3 * 9)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        weight = self.out(self.hidden(self.code).relu()).view(8, 3, 3, 3)
        return self.head(F.conv2d(x, weight).relu().mean((2, 3)))


class Routed(nn.Module):
    """Each image has a kernel of its own, a mixture of four (CondConv)."""

    def __init__(self):
        super().__init__()
        self.first, self.routing, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(6, 5)
        self.kernels, self.biases = nn.Parameter(0.1 * torch.randn(4, 6 * 8 * 9)), nn.Parameter(torch.zeros(4, 6))

    def forward(self, x):
        x = self.first(x).relu()
        share = self.routing(x.mean((2, 3))).sigmoid()
        kernels = torch.matmul(share, self.kernels).view(-1, 8, 3, 3)
        biases = torch.matmul(share, self.biases).view(-1)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, biases, groups=len(x))
        return self.head(y.view(len(x), 6, *y.shape[2:]).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "layers", "kept"),
    [
        (Routed, ["first", "routing", "head"], dict.fromkeys(["kernels", "biases"], "used by matmul")),
        (Merged, ["first", "head"], dict.fromkeys(["narrow.weight", "wide.weight"], "used by conv2d")),
        (Static, ["head"], dict.fromkeys(["code", "hidden.weight", "out.weight"], "used by linear")),
    ],
)
def test_layers_that_compute_the_weights_of_others(images, make, layers, kept):
    torch.manual_seed(0)
    model = make()
    before = state(model)
    report = initialize(model, images, between=False)
    assert [row.name for row in report.layers] == layers
    assert report.kept == kept
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in kept)
    assert_normalised(model, images, layers)
    assert rescale(model, images).output_change < 1e-5
    report = rescale(model, images, nonhomogeneous="scale")
    assert report.spread_after < 1.01
    assert report.output_change < 1e-5
    assert [row.name for row in lsuv(model, images).layers] == layers


def test_a_weight_that_another_layer_takes_for_its_input(images):
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.project, self.head = nn.Linear(768, 16), nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, x):
            x = self.embed(x.flatten(1)).relu()
            return self.head(x), x @ self.project(self.head.weight).T

    torch.manual_seed(0)
    model = Classes()
    initialize(model, images, between=False)
    before = model(images)
    assert rescale(model, images).output_change < 1e-5
    for output, target in zip(model(images), before, strict=True):
        torch.testing.assert_close(output, target, rtol=1e-4, atol=1e-5)


def turned(x):
    return torch.rot90(x, random.randint(0, 3), (2, 3))


def shaken(x):
    return x + torch.from_numpy(np.random.randn(*x.shape)).float()  # noqa: NPY002, the global one


@pytest.mark.parametrize(("draw", "name"), [(turned, "random"), (shaken, "numpy.random")])
def test_numbers_that_are_drawn_outside_of_torch(images, draw, name):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.conv(draw(x)).relu().mean((2, 3)))

    def states():
        return random.getstate(), [*map(str, np.random.get_state())], torch.get_rng_state().tolist()  # noqa: NPY002

    weights = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(0)
        model = Drawing()
        before = states()
        report = initialize(model, images, nonhomogeneous="scale")
        assert states() == before
        assert report.random == [name]
        assert report.spread_after < 1.01
        change_rate(model, images)
        with pytest.raises(InitializationError):
            initialize(model, images * torch.nan)
        assert states() == before
        weights.append(state(model))
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


OWN_GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g, x: torch.randn(x.shape, generator=g)),
    "python": (lambda: random.Random(1), lambda g, x: torch.tensor([g.gauss() for _ in x]).view(-1, 1, 1, 1)),
    "numpy": (lambda: np.random.default_rng(1), lambda g, x: torch.from_numpy(g.normal(size=x.shape)).float()),
    "old numpy": (lambda: np.random.RandomState(1), lambda g, x: torch.from_numpy(g.normal(size=x.shape)).float()),
}


@pytest.mark.parametrize("kind", OWN_GENERATORS)
def test_a_generator_of_the_model_s_own_is_wound_back(images, kind):
    make, draw = OWN_GENERATORS[kind]

    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.held = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), {"generator": make()}

        def forward(self, x):
            return self.head(self.conv(x + 0.1 * draw(self.held["generator"], x)).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Noise()
    expected = draw(make(), images)
    report = initialize(model, images, "gaussian")
    assert report.spread_after < 1.01
    assert report.output_change < 1e-5
    assert torch.equal(draw(model.held["generator"], images), expected)


@pytest.mark.parametrize("squeeze", [torch.squeeze, lambda x: x.view(-1, 5).squeeze()])
def test_one_image_whose_output_is_squeezed(images, squeeze):
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1 if squeeze is torch.squeeze else 5, 14)

        def forward(self, x):
            return squeeze(self.head(self.conv(x).relu()))

    torch.manual_seed(0)
    model = Squeezed()
    initialize(model, images, between=False)
    before = model(images)
    for options in ({}, {"nonhomogeneous": "scale"}):
        assert rescale(model, images, **options).spread_after < 1.01
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    assert change_rate(model, images).spread < 1.5
    assert [*change_rate(model, images[:1]).columns] == ["conv", "head"]


CONSTANTS = {
    "add of a constant": lambda x: 1 + x,
    "masked_fill of a constant": lambda x: x.masked_fill(x > 0, 1.0),
    "where of a constant": lambda x: torch.where(x > 0, x, torch.ones(8)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_report_names_constants_that_hold_the_rates(images, name):
    class Modulated(nn.Module):
        """Its factors are constants and what a layer adds."""

        def __init__(self):
            super().__init__()
            self.conv, self.factors, self.head = nn.Conv2d(3, 8, 3), nn.Linear(3, 8), nn.Linear(8, 500)

        def forward(self, x):
            factors = CONSTANTS[name](self.factors(x.mean((2, 3))))
            return self.head((self.conv(x) * factors[:, :, None, None]).relu().sum((2, 3)))

    torch.manual_seed(0)
    report = initialize(Modulated(), images, "gaussian")
    assert report.spread_after > 2
    assert report.held_by == [name]


WITHOUT_WEIGHTS = {
    "batch_norm without weights": nn.BatchNorm2d(8, affine=False),
    "group_norm without weights": nn.GroupNorm(2, 8, affine=False),
    "instance_norm without weights": nn.InstanceNorm2d(8),
    "layer_norm without weights": nn.LayerNorm((14, 14), elementwise_affine=False),
    "normalize": nn.functional.normalize,
}


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_the_report_names_what_gives_one_scale_whatever_it_takes(images, name):
    class Residual(nn.Module):
        """A shortcut holds the scale of its layer, as what it is added to has one scale."""

        def __init__(self):
            super().__init__()
            self.conv, self.shortcut = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
            self.norm, self.head = WITHOUT_WEIGHTS[name], nn.Linear(8, 500)

        def forward(self, x):
            return self.head((self.norm(self.conv(x)) + self.shortcut(x)).relu().sum((2, 3)))

    torch.manual_seed(0)
    report = initialize(Residual(), images, "gaussian")
    assert report.spread_after > 2
    assert report.held_by == [name]
    assert f"parts that are not homogeneous ({name})" in str(report)


def test_the_report_names_attention_that_holds_the_rates():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.qkv, self.out, self.head = (
                nn.Linear(*size) for size in ((6, 8), (8, 24), (8, 8), (8, 300))
            )

        def forward(self, x):
            x = self.embed(x)
            x = x + self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))
            return self.head(x.mean(1))

    torch.manual_seed(0)
    report = initialize(Block(), torch.randn(20, 5, 6), "gaussian")
    assert report.spread_after > 2
    assert report.held_by == ["scaled_dot_product_attention"]


@pytest.mark.parametrize(
    "bounded",
    [torch.tanh, lambda x: x / (1 + x.square()).sqrt(), lambda x: x / (1 + x.abs())],
    ids=["tanh", "over a root", "softsign"],
)
def test_only_what_does_not_learn_could_be_scaled(bounded):
    """As in a compression network: behind `round` nothing is free, and no gradient comes before it."""

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.code = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 20)

        def forward(self, x):
            return self.other(bounded(self.one(self.code(x).round())))

    torch.manual_seed(0)
    model, images = Rounded(), torch.randn(64, 12)
    report = initialize(model, images, "gaussian")
    assert report.spread_before == pytest.approx(report.spread_after, rel=1e-6)
    assert report.output_change < 1e-6
    assert [row.rate_after is None for row in report.layers] == [True] * 3 + [False] * 2
    assert all(row.scale == pytest.approx(1) for row in report.layers if row.rate_after is not None)


def test_masks_as_long_as_the_longest():
    class Masked(nn.Module):
        """Cuts its mask to the longest of the batch, and has no use for images that are longer."""

        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x, lengths):
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            return self.head((self.one(x).relu() * mask[:, :, None]).sum(1))

    torch.manual_seed(0)
    images, lengths = torch.randn(20, 5, 6), torch.tensor([5, 3, 2, 4] + [3] * 16)
    for call in (initialize, rescale, change_rate):
        with pytest.raises(InitializationError, match=r"size of tensor .* and images of one length, if they"):
            call(Masked(), (images, lengths))
    assert initialize(Masked(), (images, torch.full((20,), 5))).spread_after < 1.01


@pytest.mark.parametrize(
    ("overwriting", "plain"),
    [
        (lambda x, y: (0.5 * x).exp().add_(y), lambda x, y: (0.5 * x).exp() + y),
        (lambda x, y: x.sigmoid().mul_(y), lambda x, y: x.sigmoid() * y),
        (lambda x, y: (x * y).add_(x.mul_(2)), lambda x, y: x * y + 2 * x),
    ],
    ids=["exp", "sigmoid", "product"],
)
def test_values_that_are_overwritten_though_gradients_need_them(overwriting, plain):
    class Two(nn.Module):
        def __init__(self, join):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other, self.head, self.join = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 20), join

        def forward(self, x):
            return self.head(self.join(self.one(x), self.other(x)))

    images = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
    models, measured = [Two(overwriting), Two(plain)], []
    with pytest.raises(RuntimeError, match="inplace operation"):
        models[0](images).sum().backward()
    for model in models:
        reports = initialize(model, images), initialize(model, images, nonhomogeneous="scale")
        assert reports[0].output_change < 1e-5
        assert reports[1].spread_after < 1.01
        rates = [row.rate_after for row in reports[0].layers]
        measured.append([*rates, *change_rate(model, images).mean.values()])
    torch.testing.assert_close(*map(torch.tensor, measured))
