"""Pre-training by the position of patches, its pairs and its weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import initializers
from experiments.data.images import ImageCache
from experiments.data.voc import read_split
from experiments.networks import CaffeNet
from experiments.pretrain import POSITIONS, Pairs, PatchPairs, evaluate, fold_batch_norm

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"size": 16, "mean": (104, 117, 123), "gap": 0.5, "jitter": 0.1, "min_side": 0.6}


@pytest.fixture
def pairs(demo):
    cache = ImageCache.open(read_split(demo / "set", "test").image_paths, demo / "cache")
    return lambda **options: PatchPairs(cache, **(OPTIONS | {"batch_size": 40, "seed": 0} | options))


def test_patches_lie_in_their_image_at_their_position(pairs):
    generator = torch.Generator().manual_seed(0)
    heights, widths = (torch.randint(60, 400, (500,), generator=generator).double() for _ in range(2))
    position = torch.randint(8, (500,), generator=generator)
    middle, other = pairs().windows(heights, widths, position, generator)
    for window in (middle, other):
        assert (window.y >= 0).all()
        assert (window.x >= 0).all()
        assert (window.y + window.height <= heights + 1e-9).all()
        assert (window.x + window.width <= widths + 1e-9).all()
        assert torch.equal(window.height, window.width)
    step = torch.tensor(POSITIONS).double()[position].T
    for (one, two), direction in zip(((middle.y, other.y), (middle.x, other.x)), step, strict=True):
        moved = (two - one) / middle.height
        assert ((moved - 1.5 * direction).abs() <= 0.2 + 1e-9).all()  # a patch and a gap, and both jitters
    assert len({*POSITIONS}) == 8
    share = torch.minimum(heights, widths) / (4.2 * middle.height)
    assert share.min() >= 1 - 1e-9
    assert 1.6 < share.max() <= 1 / 0.6 + 1e-9


def test_pairs_depend_on_seed_and_step_alone(pairs):
    x, position = pairs()(7)
    assert x.shape == (40, 2, 3, 16, 16)
    assert position.unique().numel() > 5
    again = pairs()(7)
    assert torch.equal(x, again[0])
    assert torch.equal(position, again[1])
    for other in (pairs()(8), pairs(seed=1)(7)):
        assert not torch.equal(x, other[0])


def test_both_patches_go_through_the_same_network():
    torch.manual_seed(0)
    trunk = CaffeNet(20, input_size=67, width=0.125, fc=24).eval()
    model, x = Pairs(trunk), torch.randn(3, 2, 3, 67, 67)
    assert isinstance(trunk.fc8, torch.nn.Identity)
    expected = torch.cat([trunk(x[:, 0]), trunk(x[:, 1])], 1) @ model.position.weight.T
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-6)


def test_positions_can_be_learned():
    """Where brightness tells how far down and how far right a patch lies."""
    torch.manual_seed(0)
    side = 100
    ramp = torch.linspace(0, 255, side)
    picture = torch.stack([ramp[:, None].expand(side, side), ramp.expand(side, side), torch.zeros(side, side)], 2)
    pixels = picture.to(torch.uint8).view(-1, 3)
    cache = ImageCache(pixels, torch.tensor([0]), torch.tensor([side]), torch.tensor([side]))
    options = OPTIONS | {"size": 39}
    model = Pairs(CaffeNet(20, input_size=39, width=0.125, fc=32, lrn=False, dropout=0))
    images = PatchPairs(cache, batch_size=64, seed=1, **options)(0)[0][:, 0]
    initializers.initialize(model.trunk, images, "gaussian")
    optimizer, pairs = torch.optim.Adam(model.parameters(), 1e-3), PatchPairs(cache, batch_size=32, seed=0, **options)
    for step in range(150):
        x, position = pairs(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), position).backward()
        optimizer.step()
    settings = OmegaConf.create({"pairs": 250, "batch_size": 100})
    assert evaluate(model, cache, options, settings, seed=5) > 0.7


def test_folding_batch_norm_keeps_the_function_and_leaves_no_trace():
    torch.manual_seed(0)
    options = {"input_size": 67, "width": 0.125, "fc": 24}
    trunk, plain = CaffeNet(20, batch_norm=True, **options), CaffeNet(20, **options).eval()
    for _ in range(20):  # means and variances, with scales and shifts that are not 1 and 0
        trunk(60 * torch.randn(8, 3, 67, 67))
    for layer in trunk:
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 2)
            torch.nn.init.normal_(layer.bias)
    x = 60 * torch.randn(4, 3, 67, 67)
    expected = trunk.eval()(x)
    fold_batch_norm(trunk)
    torch.testing.assert_close(trunk(x), expected, rtol=1e-4, atol=1e-5)
    plain.load_state_dict(trunk.state_dict())  # strict: the same names and shapes
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_a_run_leaves_weights_that_start_another(run, finish, demo, tmp_path):
    overrides = ["preset=demo", "data=demo", f"data.root={demo / 'set'}", f"data.cache={demo / 'cache'}"]
    overrides += ["output=outputs", "init.images=60", "train.iterations=60", "train.log_every=20"]
    overrides += ["evaluate.pairs=100", "train.batch_size=20"]
    overrides += ["model.batch_norm=true"]  # which is folded away: the weights start a network without it
    command = [sys.executable, ROOT / "experiments" / "pretrain.py", *overrides]
    done = finish(command)
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.splitlines()[-1]
    record = json.loads((path.parent / "record.json").read_text())
    assert record["experiment"] == "pretrain"
    assert 0 < record["metrics"]["accuracy"] < 1
    tensors = load_file(path)
    layers = [*(f"conv{number}" for number in range(1, 6)), "fc6", "fc7"]
    names = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert {*tensors} == names | {"norm1.alpha", "norm2.alpha"}

    again = finish(command)
    assert "this run is done" in again.stdout
    started = run("voc_cls.py", "init=pretrained", f"init.weights={path}", "train.iterations=5", "init.images=60")
    assert started.returncode == 0, started.stderr
    assert "14 parameters loaded\nnot in the file: fc8.weight, fc8.bias" in started.stdout
