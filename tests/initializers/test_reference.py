"""Against the outputs of the authors' code (philkr/magic_init) on a small network: see magic_init_small.npz."""

from pathlib import Path

import numpy as np
import pytest
import torch

from initializers import change_rate, initialize, rescale
from initializers._layers import Layers
from initializers._rates import measure

LAYERS = ("conv1", "conv2", "conv3", "fc4", "fc5")


@pytest.fixture(scope="module")
def reference():
    arrays = np.load(Path(__file__).parents[1] / "reference" / "magic_init_small.npz")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(params=["within", "between"])
def stage(request):
    """After Algorithm 1 with the authors' bias, 0.1, or after their between-layer step as well."""
    return request.param


def load(model, reference, stage):
    model.load_state_dict({name: reference[f"{stage}.{name}"] for name in model.state_dict()})
    return model.eval()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_network_computes_what_caffe_does(stage, caffe_small, reference):
    model, blobs, hidden = load(caffe_small, reference, stage), {}, reference["images"][:4]
    with torch.no_grad():
        for name, layer in model.named_children():
            hidden = blobs[name] = layer(hidden)  # Caffe, too, overwrites what a ReLU has seen
        assert relative(model(reference["images"]), reference[f"{stage}.fc5"]) < 1e-5
    expected = {name.rpartition(".")[2]: blob for name, blob in reference.items() if f"{stage}.blob." in name}
    assert len(expected) == (10 if stage == "within" else 0)
    for name, blob in expected.items():
        assert relative(blobs[name], blob) < 1e-5, name


@pytest.mark.parametrize("disturb", [False, True])
def test_algorithm_1(disturb, caffe_small, reference):
    """Their result stays as it is, and comes out again whatever the scales and biases of the channels were."""
    model = load(caffe_small, reference, "within")
    if disturb:
        torch.manual_seed(0)
        for name in LAYERS:
            layer = model.get_submodule(name)
            factors = torch.rand(len(layer.weight)) + 0.1
            layer.weight.data *= factors.view(-1, *[1] * (layer.weight.ndim - 1))
            layer.bias.data.normal_()
    initialize(model, reference["images"], filters=None, between=False)
    for name, tensor in model.state_dict().items():
        assert relative(tensor, reference[f"within.{name}"]) < 1e-5, name


def test_change_rates(stage, caffe_small, reference):
    model = load(caffe_small, reference, stage)
    rates = measure(Layers(model), (reference["images"],), seed=0, eta=reference["rate.eta"]).rates
    assert rates.layers == list(LAYERS)
    for name, column in rates.columns.items():
        torch.testing.assert_close(column, reference[f"rate.{stage}.{name}"], rtol=1e-5, atol=0)


def test_the_between_layer_step_comes_as_close_to_equal_rates(caffe_small, reference):
    theirs = [reference[f"rate.between.{name}"].mean().item() for name in LAYERS]
    model = load(caffe_small, reference, "within")
    report = rescale(model, reference["images"])
    assert report.spread_before > 10_000
    assert report.spread_after < max(theirs) / min(theirs) < 1.1
    assert report.rounds <= 3  # they take ten
    # On other draws of eta: 16 images and 10 outputs leave some noise in what was made equal.
    assert change_rate(model, reference["images"], seed=1).spread < 1.5
