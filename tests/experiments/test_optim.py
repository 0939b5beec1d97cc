from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from experiments.engine.optim import lr_policy, make_optimizer, set_lr

REFERENCE = Path(__file__).parents[1] / "reference"
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "bias_lr_mult": 2, "bias_decay_mult": 1}
ADAM = {"name": "adam", "lr": 0.1, "betas": [0.9, 0.999], "weight_decay": 0.0, "bias_lr_mult": 2, "bias_decay_mult": 1}

RMSPROP = {"name": "rmsprop", "lr": 0.1, "rms_decay": 0.9, "weight_decay": 0.0, "bias_lr_mult": 2, "bias_decay_mult": 1}


def optimizer(model, base=SGD, **changes):
    return make_optimizer(model, OmegaConf.create(base | changes))


def errors_along_caffes_path(model, change_lr):
    """Largest relative error of any blob after each of Caffe's 12 iterations, and the relative errors of the loss."""
    truth = np.load(REFERENCE / "caffe_sgd.npz")
    weights = lambda n: {name: torch.from_numpy(truth[f"iter{n}.{name}"]) for name in model.state_dict()}  # noqa: E731
    model.load_state_dict(weights(0))
    images, labels = torch.from_numpy(truth["images"]), torch.from_numpy(truth["labels"])
    # caffe_small_solver.prototxt
    sgd = optimizer(model, lr=0.02, weight_decay=0.01, bias_decay_mult=0)
    lr_at = lr_policy(0.02, {"lr_gamma": 0.1, "lr_every": 5})
    errors, losses = [], []
    for iteration in range(12):
        change_lr(sgd, lr_at(iteration))
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        sgd.step()
        losses.append(loss.item())
        expected = weights(iteration + 1)
        state = model.state_dict()
        errors.append(max(((state[k] - v).norm() / v.norm()).item() for k, v in expected.items()))
    return np.array(errors), np.array(losses) / truth["loss"] - 1


def test_twelve_iterations_of_caffe_across_a_drop_of_the_learning_rate(caffe_small):
    weights, losses = errors_along_caffes_path(caffe_small, set_lr)
    assert weights.max() < 1e-4
    assert abs(losses).max() < 1e-4


def test_the_plain_way_to_change_the_learning_rate_is_not_caffes(caffe_small):
    def plain(sgd, lr):
        for group in sgd.param_groups:
            group["lr"] = lr * group["lr_mult"]

    weights, _ = errors_along_caffes_path(caffe_small, plain)
    assert weights[:5].max() < 1e-4
    assert weights[5:].min() > 1e-3


@pytest.mark.parametrize("change", [0.5, 3.0])
def test_the_velocity_survives_a_change_of_the_learning_rate(change):
    model = nn.Linear(4, 3)
    sgd = optimizer(model)
    model(torch.ones(2, 4)).square().sum().backward()
    sgd.step()
    velocity = lambda: [g["lr"] * sgd.state[p]["momentum_buffer"] for g in sgd.param_groups for p in g["params"]]  # noqa: E731
    before = velocity()
    set_lr(sgd, 0.1 * change)
    assert [group["lr"] for group in sgd.param_groups] == pytest.approx([0.1 * change, 0.2 * change])
    for old, new in zip(before, velocity(), strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("base", [SGD, ADAM, RMSPROP])
def test_biases_have_their_own_rate_and_decay(base):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[3].weight.requires_grad = False
    weights, biases = optimizer(model, base, weight_decay=0.01, bias_decay_mult=0.5).param_groups
    assert list(map(id, weights["params"])) == [id(model[0].weight), id(model[1].weight)]
    assert list(map(id, biases["params"])) == [id(model[0].bias), id(model[1].bias), id(model[3].bias)]
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.01)
    assert (biases["lr"], biases["weight_decay"]) == (0.2, 0.005)


def test_adam_takes_steps_of_the_learning_rate():
    model = nn.Linear(4, 3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adam = optimizer(model, ADAM)
    model(torch.ones(2, 4)).square().sum().backward()
    set_lr(adam, 0.01)
    adam.step()
    # The first step of Adam is lr * sign(gradient).
    torch.testing.assert_close((model.weight - before["weight"]).abs(), torch.full((3, 4), 0.01))
    torch.testing.assert_close((model.bias - before["bias"]).abs(), torch.full((3,), 0.02))


def test_rmsprop_is_caffes():
    """Against the update of rmsprop_solver.cpp, with a drop of the learning rate and decay of the weights alone."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    rmsprop = optimizer(model, RMSPROP, weight_decay=0.05, bias_decay_mult=0)
    blobs = [parameter.detach().clone() for parameter in model.parameters()]
    history = [torch.zeros_like(blob) for blob in blobs]
    for iteration in range(12):
        lr = 0.02 if iteration < 5 else 0.002
        inputs = torch.randn(5, 4, dtype=torch.double)
        set_lr(rmsprop, lr)
        rmsprop.zero_grad()
        model(inputs).square().mean().backward()
        for number, (blob, parameter) in enumerate(zip(blobs, model.parameters(), strict=True)):
            gradient = parameter.grad + (0.05 * blob if number == 0 else 0)
            history[number] = 0.9 * history[number] + 0.1 * gradient**2
            blob -= lr * (1, 2)[number] * gradient / (history[number].sqrt() + 1e-8)
        rmsprop.step()
        for blob, parameter in zip(blobs, model.parameters(), strict=True):
            torch.testing.assert_close(parameter.detach(), blob)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.name=lars: choose sgd, adam or rmsprop"):
        optimizer(nn.Linear(2, 2), name="lars")


def test_the_policies():
    step = {"lr_gamma": 0.5, "lr_every": 10_000}
    for settings in (step, step | {"lr_policy": "step"}):
        lr_at = lr_policy(0.001, settings)
        assert [lr_at(n) for n in (0, 9_999, 10_000, 79_999)] == [0.001, 0.001, 0.0005, 0.001 * 0.5**7]
    lr_at = lr_policy(0.1, {"lr_policy": "multistep", "lr_gamma": 0.1, "lr_steps": [40, 60]})
    assert [lr_at(n) for n in (0, 39, 40, 59, 60, 90)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    lr_at = lr_policy(0.01, {"lr_policy": "poly", "lr_power": 0.5, "iterations": 400})
    assert [lr_at(n) for n in (0, 300, 399)] == pytest.approx([0.01, 0.005, 0.0005])
    with pytest.raises(ValueError, match=r"train\.lr_policy=cosine: choose step, multistep or poly"):
        lr_policy(0.01, {"lr_policy": "cosine"})
