"""Whatever mode the caller is in, a network is initialized as it is without it."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    "meta by default": lambda: torch.device("meta"),
    "autocast in inference mode": lambda: both(torch.autocast("cpu"), torch.inference_mode()),
}
METHODS = {
    "kmeans": lambda m, x: initialize(m, x, "kmeans"),
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
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        assert not tensor.is_inference()


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
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert given(images).shape == (40, 5)
