import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.networks.caffenet import CaffeNet
from initializers import InitializationError
from initializers._chain import Chain, _scale_norm, trace_chain

CAFFENET = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def between(function):
    """Two convolutions, the tensor between them going through `function`."""
    middle = function if isinstance(function, nn.Module) else Call(function)
    return nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.Conv2d(4, 5, 3)).eval()


def test_the_scales_of_a_chain():
    chain = trace_chain(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    assert chain.layers == ["0", "2", "4"]
    assert chain.weight.tolist() == [[1, 0], [-1, 1], [0, -1]]
    assert chain.bias.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert (chain.norms, chain.measured, chain.exact) == ([], set(), True)


@pytest.mark.parametrize("options", [{}, {"lrn": False}, {"batch_norm": True}, {"batch_norm": True, "lrn": False}])
def test_caffenet(options):
    model = CaffeNet(10, input_size=67, width=0.1, fc=16, **options).eval()
    chain = trace_chain(model)
    assert chain.layers == CAFFENET
    lrn, norms = options.get("lrn", True), options.get("batch_norm", False)
    assert chain.measured == ({"conv2", "conv3"} if lrn else set())
    assert chain.exact == (not lrn)
    assert [name for name, module in model.named_modules() if any(module is norm for norm, _, _ in chain.norms)] == (
        [f"bn{i}" for i in range(1, 8)] if norms else []
    )
    assert chain.weight.shape == (8, 14 if norms else 7)
    assert torch.linalg.matrix_rank(chain.weight) == (8 if norms else 7)


HOMOGENEOUS = {
    "F.relu": F.relu,
    "in place": lambda x: F.relu_(x).relu_(),
    "method relu": lambda x: torch.relu(x).relu(),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "max pool": lambda x: F.max_pool2d(x, 3, stride=2),
    "avg pool": lambda x: F.avg_pool2d(x, 3, padding=1),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "adaptive": lambda x: F.adaptive_avg_pool2d(F.adaptive_max_pool2d(x, 5), 4),
    "flatten": lambda x: torch.flatten(x, 1),
    "method flatten": lambda x: x.contiguous().flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: torch.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])),
    "mean": lambda x: torch.mean(x, (2, 3)),
    "method mean": lambda x: x.mean((2, 3)),
    "module relu": nn.ReLU(inplace=True),
    "module leaky": nn.LeakyReLU(0.3),
    "module pool": nn.Sequential(nn.MaxPool2d(3, ceil_mode=True), nn.AvgPool2d(2, padding=1), nn.Identity()),
    "module adaptive": nn.Sequential(nn.AdaptiveMaxPool2d(5), nn.AdaptiveAvgPool2d(3), nn.Flatten()),
    "module dropout": nn.Sequential(nn.Dropout(), nn.Dropout2d()).eval(),
}
PINNED = {
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "method tanh": lambda x: x.tanh(),
    "shift": lambda x: F.relu(x) + 1,
    "constant": lambda x: x - torch.ones(4, 1, 1),
    "square": lambda x: x * x,
    "clamp": lambda x: F.relu(x).clamp(max=1.0),
    "softmax": lambda x: F.softmax(x, 1),
    "silu": nn.SiLU(),
    "softplus": nn.Sequential(nn.ReLU(), nn.Softplus(), nn.ReLU()),
    "relu6": nn.ReLU6(),
    "layer norm": nn.LayerNorm(9),
    "batch statistics": nn.BatchNorm2d(4, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("kind", [*HOMOGENEOUS, *PINNED])
def test_only_what_is_homogeneous_carries_the_scale(kind):
    function = (HOMOGENEOUS | PINNED)[kind]
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    scaled, expected = function(3 * x), 3 * function(x.clone())
    assert torch.allclose(scaled, expected, atol=1e-5) == (kind in HOMOGENEOUS)
    expected = [[1], [-1]] if kind in HOMOGENEOUS else [[], []]
    assert trace_chain(between(function)).weight.tolist() == expected


def test_batch_norm_takes_one_scale_and_emits_another():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    chain = trace_chain(model)
    assert chain.weight.tolist() == [[1, 0, 0, 0], [0, -1, 1, 0], [0, 0, 0, 1], [0, 0, 0, -1]]
    assert chain.bias.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert [(norm, into.tolist(), out.tolist()) for norm, into, out in chain.norms] == [
        (model[1], [1, 0, 0, 0], [0, 1, 0, 0]),
        (model[4], [0, 0, 1, 0], [0, 0, 0, 0]),  # without parameters it emits nothing
    ]


@pytest.mark.parametrize("variance", [0.0, 1e-7, 1.0, 1e4])
@pytest.mark.parametrize(("incoming", "outgoing"), [(1, 5), (0.01, 1), (0.3, 2), (1000, 0.1)])
def test_batch_norm_scales_exactly_in_spite_of_eps(variance, incoming, outgoing):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, eps=1e-5).eval()
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    norm.running_var.fill_(variance)
    x = torch.randn(20, 6)
    expected = outgoing * norm(x)
    with torch.no_grad():
        _scale_norm(norm, incoming, outgoing)
    assert (norm.running_var >= 0).all()
    torch.testing.assert_close(norm(incoming * x), expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_without_weights_cannot_make_up_for_eps():
    norm = nn.BatchNorm1d(6, affine=False).eval()
    _scale_norm(norm, 0.1, 1)
    with pytest.raises(InitializationError, match=r"eps 1e-05, too large for an input scaled by 1.0e-03"):
        _scale_norm(norm, 0.001, 1)


def test_a_buffer_in_between_is_a_constant():
    model = between(lambda x: x)
    model.register_buffer("shift", torch.ones(4, 1, 1))
    model[1].forward = lambda x: x - model.shift
    assert trace_chain(model).weight.shape == (2, 0)


def test_tracing_leaves_nothing_in_the_model():
    model = between(lambda x: x - torch.ones(4, 1, 1))
    before = set(vars(model))
    trace_chain(model)
    assert set(vars(model)) == before


LRN = nn.LocalResponseNorm(5)


@pytest.mark.parametrize(
    ("function", "measured", "scales"),
    [
        (LRN, {"2"}, 1),
        (nn.Sequential(nn.ReLU(), LRN, nn.MaxPool2d(2), LRN), {"2"}, 1),
        (nn.Sequential(nn.Tanh(), LRN), {"2"}, 0),
        (nn.Sequential(LRN, nn.Tanh()), set(), 0),
        (nn.Sequential(LRN, nn.BatchNorm2d(4)), set(), 0),
    ],
)
def test_what_comes_through_lrn_is_measured(function, measured, scales):
    """Where something that is not homogeneous follows, the scale before LRN stays and there is nothing to measure."""
    chain = trace_chain(between(function))
    assert chain.weight.shape == (2, scales)
    assert chain.measured == measured


def test_what_lrn_did_to_the_scale_is_left_to_the_caller():
    model = between(LRN)
    before = [parameter.clone() for parameter in model.parameters()]
    trace_chain(model).apply(model, torch.tensor([2.0]).log().double())
    for parameter, tensor, factor in zip(model.parameters(), before, (2, 2, 1, 1), strict=True):
        torch.testing.assert_close(parameter, factor * tensor)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda self, x: self.b(self.a(x) + x), "branches at add"),
        (lambda self, x: self.b(torch.cat([self.a(x), self.a.weight], 1)), "branches at a_weight"),
        (lambda self, x: self.b(F.relu(self.a(x))) + self.a(x), "branches at a_1"),
        (lambda self, x: self.b(self.a(self.a(x))), "layer a is used twice"),
        (lambda self, x: self.b(self.a(x) if x.sum() > 0 else x), "cannot trace Model .*control flow"),
        (lambda self, x: self.b(self.missing(x)), "cannot trace Model .*no attribute 'missing'"),
    ],
)
def test_what_is_no_chain(function, message):
    with pytest.raises(InitializationError, match=f"{message}.*; pass between=False"):
        trace_chain(Model(function))


def chain_of(weight):
    return Chain([str(i) for i in range(len(weight))], weight.double(), weight.double(), [], set())


def log_variance(chain, rates, u):
    return (np.log(rates) - 2 * chain.weight.numpy() @ u).var()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("columns", [0, 1, 3, 6])
def test_the_scales_minimise_the_variance_of_the_log_rates(columns, seed):
    """The least-squares solution of smallest norm, here by NumPy's pseudo-inverse."""
    rng = np.random.default_rng(seed)
    chain = chain_of(torch.from_numpy(rng.integers(-1, 2, (6, columns))))
    rates = rng.lognormal(0, 5, 6)
    u = chain.equalising(rates.tolist()).numpy()
    centre = np.eye(6) - 1 / 6
    np.testing.assert_allclose(u, np.linalg.pinv(centre @ chain.weight.numpy()) @ centre @ np.log(rates) / 2, atol=1e-9)
    for _ in range(20):
        assert log_variance(chain, rates, u) <= log_variance(chain, rates, u + 0.1 * rng.normal(size=columns)) + 1e-12


def test_a_chain_is_equalised_by_the_square_roots_of_the_rates():
    """r_k = sqrt(C_k / C) with C the geometric mean."""
    rates = [1e5, 3.0, 0.02, 40.0]
    chain = trace_chain(nn.Sequential(*(nn.Linear(3, 3) for _ in rates)))
    factors = (chain.weight @ chain.equalising(rates)).exp()
    expected = np.sqrt(np.array(rates) / np.exp(np.log(rates).mean()))
    np.testing.assert_allclose(factors, expected, rtol=1e-9)
