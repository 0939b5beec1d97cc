"""Signals in plain networks, and the command."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import initializers
from experiments.data.demo import make_demo_folders
from experiments.depth import signals
from experiments.networks import VGG, plain

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "depth.py"


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("depth", [4, 16])
def test_the_depth_is_the_number_of_layers_with_weights(kind, depth):
    model = plain(kind, depth, "tanh", 12, (1, 28, 28), 10)
    layers = [layer for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(layers) == depth
    assert sum(isinstance(layer, nn.Tanh) for layer in model) == depth - 1
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


# Simonyan & Zisserman (2015), table 2: 133, 133, 134, 138 and 144 million.
@pytest.mark.parametrize(
    ("name", "layers", "millions"), [("A", 11, 133), ("B", 13, 133), ("C", 16, 134), ("D", 16, 138), ("E", 19, 144)]
)
def test_the_configurations_of_vgg(name, layers, millions):
    with torch.device("meta"):
        model = VGG(1000, configuration=name)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in model) == layers
    assert sum(layer.kernel_size == (1, 1) for layer in model if isinstance(layer, nn.Conv2d)) == 3 * (name == "C")
    assert {*model.std_factors.values()} == {1.0}


def stack(width, activation, images=400):
    """Fully connected layers of 100 inputs and `width` outputs in turn, and images of variance 1."""
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in [(100, width), (width, 100)] * 4]
    model = nn.Sequential(*(module for layer in layers for module in (layer, activation())), nn.Linear(100, 10))
    return model, torch.randn(images, 100), torch.arange(images) % 10


@pytest.mark.parametrize(("fan", "way"), [("in", "forward"), ("out", "backward")])
def test_xavier_keeps_one_variance(fan, way):
    """n Var(W) = 1 keeps the signal where n is fan-in, m Var(W) = 1 the gradient where m is fan-out (linear layers)."""
    for width in (100, 300):
        model, images, labels = stack(width, nn.Identity)
        initializers.xavier(model, fan=fan)
        rows = signals(model, images, labels, "relu")[:-1]
        ratios = [later[way] / row[way] for row, later in pairwise(rows)]
        assert all(0.7 < ratio < 1.4 for ratio in ratios)
    other = [row["backward" if way == "forward" else "forward"] for row in rows]
    assert max(other) / min(other) > 2  # both at once only where fan-in and fan-out are equal


def test_relu_needs_twice_the_variance():
    model, images, labels = stack(100, nn.ReLU)
    initializers.msra(model, linear=True)
    he = [row["forward"] for row in signals(model, images, labels, "relu")]
    initializers.xavier(model)
    xavier = [row["forward"] for row in signals(model, images, labels, "relu")]
    assert 0.3 < he[-1] / he[0] < 3
    assert xavier[-1] / xavier[0] < 0.5**8 * 10


def test_signals_by_hand():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    images, labels = 5 * torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    first, second = signals(model, images, labels, "tanh")
    assert (first["layer"], second["layer"]) == ("0", "2")
    z = model[0](images)
    assert first["forward"] == pytest.approx(z.var(correction=0).item(), rel=1e-5)
    assert first["saturated"] == pytest.approx((z.abs() > 1.818446).float().mean().item())  # 1 - tanh² = .1
    assert second["saturated"] is None
    y = model[2](z.tanh())
    gradient = y.softmax(1) - nn.functional.one_hot(labels, 2)
    assert second["backward"] == pytest.approx(gradient.var(correction=0).item(), rel=1e-5)
    inner = gradient @ model[2].weight * (1 - z.tanh() ** 2)
    assert first["backward"] == pytest.approx(inner.var(correction=0).item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_relu_in_place_is_seen_before_it_acts():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    images = torch.randn(6, 3)
    first, _ = signals(model, images, torch.zeros(6, dtype=torch.long), "relu")
    assert first["forward"] == pytest.approx(model[0](images).var(correction=0).item(), rel=1e-5)


def test_another_fan_is_refused():
    with pytest.raises(ValueError, match="fan='both': choose in, out or average"):
        initializers.xavier(nn.Linear(2, 2), fan="both")


def test_the_average_of_both_fans():
    model = nn.Linear(100, 300)
    initializers.xavier(model, fan="average")
    limit = (3 / 200) ** 0.5
    assert 0.99 * limit < model.weight.abs().max() <= limit


def test_the_command_its_pictures_and_a_run_that_goes_on(finish, tmp_path):
    make_demo_folders(tmp_path / "set", num_train=4, num_val=1, size=48)
    command = [sys.executable, SCRIPT, "preset=demo", "data.name=small", f"data.root={tmp_path / 'set'}"]
    command += ["output=outputs", "network.depths=[3]", "train.iterations=30", "init.images=40", "device=cpu"]
    done = finish(command)
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.splitlines()[-1]
    record = json.loads(path.read_text())
    cells = {cell["line"]: cell for cell in record["cells"]}
    assert len(cells) == 10
    assert {cell["depth"] for cell in cells.values()} == {3}
    assert all(len(cell["layers"]) == 3 for cell in cells.values())
    assert all(abs(row["forward"] - 1) < 0.02 for row in cells["LSUV"]["layers"])
    assert cells["Gaussian .01"]["layers"][-1]["forward"] < 0.1 < cells["Gaussian .5"]["layers"][0]["saturated"]
    assert "the loss leaves the flat part with the first row" in record["rule"]
    assert sorted(file.name for file in path.parent.iterdir() if file.suffix == ".png") == ["map.png", "variance.png"]
    assert not [*path.parent.rglob("checkpoint*.pt")]
    assert "3 layers, LSUV: " in done.stdout

    path.unlink()
    (lost,) = path.parent.glob("cells/3-LSUV/cell.json")
    lost.unlink()
    kept = path.parent / "cells/3-He/cell.json"
    before = kept.stat().st_mtime_ns
    assert finish(command).returncode == 0
    assert json.loads(path.read_text())["cells"] == record["cells"]
    assert kept.stat().st_mtime_ns == before
