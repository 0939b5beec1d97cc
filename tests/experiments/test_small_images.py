"""Small images: the networks, the data, the rules, and runs end to end."""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

import initializers
from experiments.data import small
from experiments.data.demo import make_demo_folders
from experiments.data.small import Normalization, SmallBatches, SmallImages, read_small, shifted
from experiments.engine.convergence import constant_loss, converges, leaves_flat_part
from experiments.engine.losses import hinge_loss
from experiments.engine.run import load_checkpoint
from experiments.networks import FitNet4, MNISTFitNet, ResNet
from experiments.networks.activations import Maxout

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "small_images.py"


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("small_images", list(overrides))


# The networks.


def meta(network, **options):
    with torch.device("meta"):
        return network(**options).eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def sizes(model, channels):
    """Name -> size of the output of every module of a network."""
    found = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, y, name=name: found.update({name: tuple(y.shape[1:])}))
    model(torch.empty(2, channels, model.input_size, model.input_size, device="meta"))
    return found


@pytest.mark.parametrize("activation", ["relu", "vlrelu", "tanh", "sigmoid", "maxout"])
def test_fitnet4(activation):
    model = meta(FitNet4, activation=activation)
    pieces = {"conv": 2, "fc": 5} if activation == "maxout" else {"conv": 1, "fc": 1}
    convolutions = [3, 32, 32, 32, 48, 48, *[80] * 6, *[128] * 6]
    expected = sum(pieces["conv"] * (9 * a + 1) * b for a, b in pairwise(convolutions))
    expected += pieces["fc"] * (128 + 1) * 500 + (500 + 1) * 10
    assert parameters(model) == expected == (2_742_102 if activation == "maxout" else 1_276_806)
    found = sizes(model, 3)
    blocks = {"1": (5, 32), "2": (6, 16), "3": (6, 8)}
    widths = iter(convolutions[1:])
    for block, (count, side) in blocks.items():
        for number in range(1, count + 1):
            assert found[f"conv{block}_{number}"] == (next(widths), side, side)
    assert (found["pool1"], found["pool2"], found["pool3"]) == ((48, 16, 16), (80, 8, 8), (128, 1, 1))
    assert (found["fc4"], found["fc5"]) == ((500,), (10,))
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Dropout) == 5
    assert all(module.p == 0.2 for module in model.modules() if isinstance(module, nn.Dropout))
    assert kinds.count(nn.LeakyReLU) == 18 * (activation == "vlrelu")
    assert kinds.count(nn.ReLU) == 18 * (activation == "relu")


def test_the_fitnet_of_mnist():
    model = meta(MNISTFitNet, channels=1)
    assert parameters(model) == 21_426
    found = sizes(model, 1)
    assert [found[f"conv{name}"] for name in ("1_1", "1_2")] == [(16, 28, 28)] * 2
    assert [found[f"conv{name}"] for name in ("2_1", "2_2")] == [(16, 13, 13)] * 2
    assert [found[f"conv{name}"] for name in ("3_1", "3_2")] == [(12, 6, 6)] * 2
    assert (found["pool1"], found["pool2"], found["pool3"]) == ((16, 13, 13), (16, 6, 6), (12, 3, 3))
    assert (found["fc4"], model.drop3.p) == ((10,), 0.3)
    with pytest.raises(ValueError, match="input_size is 6, too small"):
        MNISTFitNet(input_size=6)


# He et al. (2016), table 6: .27, .46, .66, .85 and 1.7 million, with BatchNorm.
@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_resnets(depth, count):
    model = meta(ResNet, depth=depth)
    assert parameters(model) == count
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    plain = meta(ResNet, depth=depth, batch_norm=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert parameters(plain) == count - sum(layer.out_channels for layer in layers[:-1])
    found = sizes(model, 3)
    last = (depth - 2) // 6
    assert [found[f"block{stage}_{last}"] for stage in (1, 2, 3)] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_shortcut_has_no_parameters():
    block = ResNet(depth=8, batch_norm=False).block2_1
    nn.init.zeros_(block.second.conv.weight)
    nn.init.zeros_(block.second.conv.bias)
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    torch.testing.assert_close(y[:, :16], x[:, :, ::2, ::2])
    assert (y[:, 16:] == 0).all()


@pytest.mark.parametrize("options", [{"depth": 21}, {"depth": 2}, {"activation": "maxout"}])
def test_resnets_that_are_none(options):
    with pytest.raises(ValueError, match=r"^model\.(depth|activation)="):
        ResNet(**options)


@pytest.mark.parametrize("activation", ["maxout", "relu"])
def test_what_lsuv_leaves_out_is_orthonormal(activation):
    """`init=orthonormal_unscaled` is the start of LSUV, before it divides by standard deviations."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 16, 16)
    models = [FitNet4(width=0.125, fc=20, input_size=16, activation=activation) for _ in range(2)]
    initializers.initialize(models[0], images, "orthonormal", within=False, between=False, seed=3)
    initializers.lsuv(models[1], images, max_iterations=0, seed=3)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        rows = ours.detach().flatten(1) if ours.ndim > 1 else None
        assert (ours == 0).all() if rows is None else rows.shape[0] > rows.shape[1] or _orthonormal(rows)


def _orthonormal(rows):
    return torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def test_he_is_caffes_filler_in_every_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 200, 3), nn.Flatten(), nn.Linear(200 * 4, 300))
    options = {key: value for key, value in config("init=he").init.items() if key not in ("name", "_target_")}
    initializers.msra(model, **options)
    for layer in (model[0], model[2]):
        assert layer.weight.std().item() == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.03)
        assert (layer.bias == 0).all()


def test_maxout_is_the_maximum():
    torch.manual_seed(0)
    maxout, x = Maxout(lambda: nn.Linear(6, 5), 3), torch.randn(40, 6)
    outputs = torch.stack([piece(x) for piece in maxout.pieces])
    torch.testing.assert_close(maxout(x), outputs.amax(0))
    maxout(x).sum().backward()
    wins = torch.stack([(outputs.argmax(0) == number).sum(0) for number in range(3)])
    for piece, count in zip(maxout.pieces, wins, strict=True):
        torch.testing.assert_close(piece.bias.grad, count.float())


# The data.


def images(count=40, channels=3, size=8, classes=4):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return SmallImages([*map(str, range(classes))], pixels, torch.arange(count) % classes)


def test_contrast_normalisation():
    pixels = torch.cat([images(1_100).pixels, torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)])
    normalize = Normalization.of(pixels, "contrast")
    values = normalize(pixels)
    assert values.mean(0).abs().max() < 1e-5
    own = values + normalize.mean
    assert own[-1].abs().max() == 0  # one colour
    torch.testing.assert_close(own[:-1].mean((1, 2, 3)), torch.zeros(1_100), atol=1e-5, rtol=0)
    torch.testing.assert_close(own[:-1].std((1, 2, 3), correction=0), torch.ones(1_100))
    brighter = (pixels[:1].float() * 0.5 + 20).to(torch.uint8)
    torch.testing.assert_close(normalize(brighter), values[:1], atol=0.02, rtol=0)


def test_a_factor():
    pixels = images(channels=1).pixels
    assert torch.equal(Normalization.of(pixels, 0.004)(pixels), pixels.float() * 0.004)


def test_shifted_and_mirrored():
    x = torch.randn(3, 2, 5, 5)
    down, right = torch.tensor([1, 0, 2]), torch.tensor([1, 2, 0])
    found = shifted(x, 1, down, right, torch.tensor([False, False, True]))
    assert torch.equal(found[0], x[0])
    expected = torch.zeros(2, 5, 5)
    expected[:, 1:, :4] = x[1, :, :4, 1:]
    assert torch.equal(found[1], expected)
    expected = torch.zeros(2, 5, 5)
    expected[:, :4, 1:] = x[2, :, 1:, :4]
    assert torch.equal(found[2], expected.flip(2))


def test_batches_depend_on_the_step_alone():
    options = {"batch_size": 6, "seed": 1, "pad": 2, "mirror": True}
    data = images()
    one, other = (SmallBatches(data, Normalization.of(data.pixels, "contrast"), **options) for _ in range(2))
    inputs = [one(step) for step in range(14)]
    for step in (13, 0, 7):
        for left, right in zip(inputs[step], other(step), strict=True):
            assert torch.equal(left, right)
    assert not torch.equal(inputs[0][0], inputs[6][0])
    with pytest.raises(ValueError, match=r"40 images do not fill a batch of 41: lower train\.batch_size"):
        SmallBatches(data, Normalization.of(data.pixels, 1.0), **options | {"batch_size": 41})


def test_an_epoch_has_every_image_once():
    data = images(count=36)
    plain = SmallBatches(data, Normalization.of(data.pixels, 1.0), batch_size=6, seed=0, pad=0, mirror=False)
    for epoch in range(2):
        seen = torch.cat([plain(6 * epoch + step)[0] for step in range(6)])
        for image in data.pixels.float():
            assert ((seen - image).abs().amax((1, 2, 3)) == 0).sum() == 1
    x, labels = plain(3)
    for image, label in zip(x, labels, strict=True):
        (index,) = ((data.pixels.float() - image).abs().amax((1, 2, 3)) == 0).nonzero()
        assert data.labels[index] == label


FOLDERS = {"name": "own", "train": "train", "test": "val", "cache": None, "size": 48, "images": None, "held_out": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_demo_folders(tmp_path_factory.mktemp("small") / "set", num_train=4, num_val=2, size=80)


def test_a_folder_per_class(folders, tmp_path):
    data = FOLDERS | {"root": folders}
    training, test = read_small(data, 0, tmp_path / "bad.txt")
    assert (training.pixels.shape, test.pixels.shape) == ((80, 3, 48, 48), (40, 3, 48, 48))
    assert training.labels.tolist() == [label for label in range(20) for _ in range(4)]
    assert (training.bad, len(training.classes)) == (0, 20)
    few, held_out = read_small(data | {"images": 30, "held_out": 50}, 3, tmp_path / "bad.txt")
    assert (len(few), len(held_out)) == (30, 50)
    names = [{image.numpy().tobytes() for image in part.pixels} for part in (few, held_out)]
    assert not names[0] & names[1]
    again, _ = read_small(data | {"images": 30}, 3, tmp_path / "bad.txt")
    assert len(again) == 30
    with pytest.raises(ValueError, match=r"data\.images=31, but there are only 30"):
        read_small(data | {"images": 31, "held_out": 50}, 3, tmp_path / "bad.txt")
    with pytest.raises(ValueError, match=r"data\.held_out=80, but there are 80 training images"):
        read_small(data | {"held_out": 80}, 3, tmp_path / "bad.txt")


def test_a_bad_image_is_named_and_left_out(tmp_path):
    for part, count in (("train", 3), ("val", 1)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (60, 48), (number, 0, 0)).save(tmp_path / part / name / f"{number}.png")
    (tmp_path / "train/b/1.png").write_bytes(b"no image")
    training, _ = read_small(FOLDERS | {"root": tmp_path}, 0, tmp_path / "bad.txt")
    assert (training.bad, training.labels.tolist()) == (1, [0, 0, 0, 1, 1])
    assert (tmp_path / "bad.txt").read_text() == f"{tmp_path / 'train/b/1.png'}\n"


def idx(path, array):
    """A file in MNIST's format."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    path.write_bytes(header + array.tobytes())


def test_mnist_as_published(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), np.uint8))
        idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    data = {**config("data=mnist").data, "root": str(tmp_path)}
    training, test = read_small(data, 0, tmp_path / "bad.txt")
    assert (training.pixels.shape, test.pixels.shape) == ((30, 1, 28, 28), (10, 1, 28, 28))
    assert training.pixels.dtype == torch.uint8
    assert training.labels.tolist() == [n % 10 for n in range(30)]
    with pytest.raises(ValueError, match=r"data\.size=32, but mnist has 28 pixels"):
        read_small(data | {"size": 32}, 0, tmp_path / "bad.txt")
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0\10\3")
    with pytest.raises(ValueError, match=r"MNIST is damaged .*: delete it, and it is downloaded anew"):
        read_small(data, 0, tmp_path / "bad.txt")


def test_a_download_appears_in_one_piece_or_not_at_all(tmp_path, monkeypatch):
    class Fails:
        def __init__(self, root, download=False, train=True):
            Path(root, "MNIST/raw").mkdir(parents=True)
            raise RuntimeError("Error downloading")

    class Works(Fails):
        def __init__(self, root, download=False, train=True):
            self.data, self.classes, self.targets = torch.zeros(4, 28, 28, dtype=torch.uint8), ["a"], [0] * 4
            if download:
                assert not Path(root).exists()
                Path(root, "MNIST/raw").mkdir(parents=True)

    data = {**config("data=mnist").data, "root": str(tmp_path / "new")}
    monkeypatch.setitem(small.TORCHVISION, "mnist", (Fails, "MNIST"))
    with pytest.raises(ConnectionError, match=r"cannot download Fails to .*new .*set data.root"):
        read_small(data, 0, tmp_path / "bad.txt")
    left = [path.name for path in (tmp_path / "new").iterdir()]
    assert left in ([], [".download-MNIST.lock"])
    monkeypatch.setitem(small.TORCHVISION, "mnist", (Works, "MNIST"))
    assert len(read_small(data, 0, tmp_path / "bad.txt")[0]) == 4
    assert (tmp_path / "new/MNIST/raw").is_dir()


# Losses and rules.


def test_the_hinge_loss_is_caffes():
    scores = torch.tensor([[0.5, -2.0, 0.2], [3.0, 1.0, -0.5]])
    # max(0, 1 - t s): .5 + 0 + 1.2, and 4 + 0 + .5
    assert hinge_loss(scores, torch.tensor([0, 1])).item() == pytest.approx((1.7 + 4.5) / 2)


@pytest.mark.parametrize(("name", "loss"), [("softmax", F.cross_entropy), ("hinge", hinge_loss)])
def test_no_constant_output_has_less_loss(name, loss):
    labels = torch.arange(10)
    torch.manual_seed(0)
    constants = torch.cat([3 * torch.randn(200, 10), torch.zeros(1, 10), -torch.ones(1, 10)])
    losses = [loss(constant.expand(10, -1), labels).item() for constant in constants]
    assert min(losses) == pytest.approx(constant_loss(name, 10))


def test_what_converges():
    labels = torch.tensor([0] * 30 + [1] * 10 + [2] * 60)  # most frequent: .6
    assert not converges(1.0, labels)
    labels = torch.arange(10).repeat(5)
    assert [converges(top1, labels) for top1 in (0.1, 0.199, 0.2, 0.9)] == [False, False, True, True]


def test_when_the_loss_leaves_the_flat_part():
    def found(losses):
        return leaves_flat_part(pd.DataFrame({"step": range(10, 10 * len(losses) + 10, 10), "loss": losses}), 1.0)

    assert found([2, 1, 1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]) == 40
    assert found([0.9, 0.9, 0.98, 0.9, 0.9, 0.9, 0.9, 0.9]) == 40  # not for good before
    assert found([0.9] * 4) is None
    assert found([0.98] * 20) is None


def test_the_protocols():
    mnist, cifar, resnet = (
        config("data=mnist", "model=mnist_fitnet", "optimizer=rmsprop"),
        config(),
        config("model=resnet"),
    )
    assert (mnist.optimizer.name, mnist.optimizer.lr, mnist.optimizer.rms_decay) == ("rmsprop", 0.002, 0.99)
    assert (mnist.train.iterations, mnist.train.batch_size, mnist.train.lr_every) == (50_000, 64, 15_000)
    assert (mnist.optimizer.weight_decay, mnist.data.normalize, mnist.data.mirror) == (5e-4, 0.004, False)
    assert (cifar.optimizer.name, cifar.optimizer.lr, cifar.optimizer.momentum) == ("sgd", 0.01, 0.9)
    assert (cifar.train.iterations, cifar.train.batch_size) == (90_000, 128)
    assert [*cifar.train.lr_steps] == [40_000, 60_000, 80_000]
    assert (cifar.optimizer.weight_decay, cifar.optimizer.bias_lr_mult, cifar.optimizer.bias_decay_mult) == (5e-4, 1, 0)
    assert (cifar.data.normalize, cifar.data.pad, cifar.data.mirror) == ("contrast", 4, True)
    assert (resnet.optimizer.lr, resnet.train.iterations, [*resnet.train.lr_steps]) == (0.1, 64_000, [32_000, 48_000])
    for cfg in (mnist, cifar, resnet):
        assert (cfg.train.lr_gamma, cfg.train.clip_norm) == (0.1, None)


# End to end.


@pytest.fixture
def execute(folders, finish, tmp_path):
    """A short run on the generated set: -> its folder and what it printed."""

    def run(*overrides):
        short = ("train.iterations=20", "train.log_every=5", "train.validate_every=10")
        done = finish(
            [
                *(sys.executable, SCRIPT, "preset=demo", f"data.root={folders}", "output=outputs", "device=cpu"),
                *("data.name=small", "data.size=16", *short, *overrides),
            ]
        )
        assert done.returncode == 0, done.stderr
        return (tmp_path / done.stdout.splitlines()[-1]).parent, done.stdout

    return run


def test_a_run_from_the_images_to_the_record_and_on_after_a_kill(execute):
    settings = ("init=lsuv", "init.images=40", "train.checkpoint_seconds=0")
    folder, printed = execute(*settings)
    record = json.loads((folder / "record.json").read_text())
    assert record["data"] == "small, 20 classes, 80 + 40 images"
    assert (record["epoch"], record["diverged"]) == (80 / 32, None)
    assert pd.read_csv(folder / "curve.csv")["step"].tolist() == [5, 10, 15, 20]
    validation = pd.read_csv(folder / "validation.csv")
    assert validation["step"].tolist() == [10, 20]
    last = validation.iloc[-1]
    assert record["metrics"] == pytest.approx({name: last[name] for name in ("loss", "top1", "top5")}, rel=1e-4)
    assert record["converges"]["holds"] == (last["top1"] >= 0.1)
    assert "2 times the share of their most frequent class" in record["converges"]["rule"]
    assert f"top-1 {last['top1']:.2%}" in printed
    assert all(abs(layer["std_after"] ** 2 - 1) <= 0.02 for layer in record["init_report"]["layers"])
    assert "this run is done" in execute(*settings)[1]

    weights = load_checkpoint(folder)["model"]
    (folder / "record.json").unlink()
    os.replace(folder / "checkpoint.previous.pt", folder / "checkpoint.pt")
    assert load_checkpoint(folder)["step"] == 15
    execute(*settings)
    again = load_checkpoint(folder)
    assert again["step"] == 20
    assert all(torch.equal(value, again["model"][name]) for name, value in weights.items())


def test_a_training_that_diverges_is_a_result(execute):
    folder, printed = execute("init=he", "loss=hinge", "optimizer.lr=1e12")
    record = json.loads((folder / "record.json").read_text())
    assert record["metrics"] == {"loss": None, "top1": None, "top5": None}
    assert record["converges"]["holds"] is False
    assert "diverged" in record["diverged"]
    assert record["diverged"] in printed


@pytest.mark.slow
@pytest.mark.parametrize("init", sorted(path.stem for path in (ROOT / "configs/init").glob("*.yaml")))
@pytest.mark.parametrize(
    "model", ["fitnet4", "fitnet4 model.activation=maxout", "mnist_fitnet", "resnet", "resnet model.batch_norm=false"]
)
def test_every_initialization_of_every_network(execute, init, model):
    if init in ("caffe", "pretrained"):
        pytest.skip("these ask for a network that states it, and for a file")
    first, *more = model.split()
    few = ["init.images=40"] * ("images" in config(f"init={init}").init)
    folder, _ = execute(f"init={init}", f"model={first}", *more, *few, "data.size=32", "optimizer.lr=1e-4")
    record = json.loads((folder / "record.json").read_text())
    assert (record["diverged"] is not None) == ((init, *more) == ("he", "model.activation=maxout"))  # 2^18 at the end


@pytest.mark.slow
def test_the_demo_learns(finish, tmp_path):
    done = finish([sys.executable, SCRIPT, "preset=demo", f"data.root={tmp_path / 'set'}", "output=outputs"])
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / done.stdout.splitlines()[-1]).read_text())
    assert record["converges"]["holds"]
    assert record["leaves_flat_part"]["iteration"] is not None
