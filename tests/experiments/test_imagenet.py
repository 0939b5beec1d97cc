"""Training on folders of images: one process and several, end to end on the generated set."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import initializers
from experiments.data.demo import make_demo_folders
from experiments.data.folders import BAD, Folders, Images
from experiments.engine import run
from experiments.engine.figures import line_of
from experiments.engine.losses import classification_loss
from experiments.imagenet import Classifiers, evaluate
from experiments.networks import CaffeNet, GoogLeNet

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "imagenet.py"


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("imagenet", list(overrides))


# The parts.


def test_the_loss_counts_auxiliary_classifiers_and_leaves_bad_images_out():
    generator = torch.Generator().manual_seed(0)
    logits, first, second = torch.randn(3, 6, 4, generator=generator)
    labels = torch.tensor([0, 3, BAD, 1, 2, BAD])
    good = labels != BAD
    final, one, two = (
        nn.functional.cross_entropy(part[good], labels[good], reduction="sum") / 6 for part in (logits, first, second)
    )
    value, shown = classification_loss(logits, labels)
    assert value == shown == pytest.approx(final.item())
    value, shown = classification_loss((logits, first, second), labels)
    assert value == pytest.approx((final + 0.3 * (one + two)).item())
    assert shown == pytest.approx(final.item())
    assert classification_loss(logits, torch.full((6,), BAD))[0] == 0


@pytest.mark.slow
def test_auxiliary_classifiers_are_initialized_with_the_network():
    torch.manual_seed(0)
    model = GoogLeNet(10, input_size=64, width=0.125, lrn=False, auxiliary=True)
    images = 40 * torch.nn.functional.avg_pool2d(torch.randn(40, 3, 68, 68), 5, stride=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initializers.initialize(Classifiers(model), images, "gaussian", outputs="free")
    assert report.spread_after < 1.05
    assert len(report.output_scales) == 3
    report = initializers.initialize(Classifiers(model), images, "gaussian")
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(report.layers) == 64
    assert report.output_change < 1e-4
    assert report.spread_after < report.spread_before / 10
    outputs = Classifiers(model.eval())(images)
    model.training = True  # without dropout
    for weight, one, other in zip((1, 0.3, 0.3), outputs, model(images), strict=True):
        torch.testing.assert_close(one, weight * other)


def test_the_reference_of_googlenet_is_caffes():
    model = GoogLeNet(10, input_size=64, width=0.25, auxiliary=True)
    initializers.caffe(model, seed=3)
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert (layer.bias == (0 if name.endswith("classifier") else 0.2)).all(), name
            limit = (3 / layer.weight[0].numel()) ** 0.5
            assert 0.9 * limit < layer.weight.abs().max() <= limit, name


def test_lines_of_the_figures():
    assert line_of(config("init=caffe"), "figure3") == "Reference"
    assert line_of(config("init=kmeans", "model.lrn=false"), "figure3") == "k-means, no LRN (ours)"
    assert line_of(config("init=msra", "model.lrn=false"), "figure3") is None
    assert line_of(config("init=kmeans", "init.between=false"), "figure3") is None
    assert line_of(config("init=kmeans", "model=googlenet"), "figure4") == "k-means, single loss (ours)"
    assert line_of(config("model=googlenet", "model.auxiliary=true", "init=caffe"), "figure4") == "Reference"


def test_the_solvers_are_caffes():
    caffenet, googlenet = config(), config("model=googlenet")
    assert (caffenet.train.iterations, caffenet.train.batch_size, caffenet.train.validate_every) == (
        320_000,
        256,
        2_000,
    )
    assert (caffenet.optimizer.lr, caffenet.optimizer.momentum, caffenet.optimizer.weight_decay) == (0.01, 0.9, 5e-4)
    assert (caffenet.train.lr_policy, caffenet.train.lr_every, caffenet.train.lr_gamma) == ("step", 100_000, 0.1)
    assert (googlenet.train.iterations, googlenet.train.batch_size) == (2_400_000, 32)
    assert (googlenet.train.lr_policy, googlenet.train.lr_power, googlenet.train.validate_every) == ("poly", 0.5, 4_000)
    for cfg, size in ((caffenet, 227), (googlenet, 224)):
        assert cfg.optimizer.lr == 0.01
        assert (cfg.optimizer.bias_lr_mult, cfg.optimizer.bias_decay_mult) == (2, 0)
        assert (cfg.crop.size, cfg.data.short, cfg.train.clip_norm) == (size, 256, None)
    assert googlenet.optimizer.weight_decay == 2e-4


# End to end.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of a generated set, and one for its decoded images."""
    folder = tmp_path_factory.mktemp("imagenet")
    make_demo_folders(folder / "set")
    return folder


@pytest.fixture
def command(data, tmp_path):
    """The command line of a short run."""

    def build(*overrides):
        return [
            *(sys.executable, SCRIPT, "preset=demo", f"data.root={data / 'set'}"),
            *(f"data.cache={data / 'cache'}", "output=outputs", "init=xavier", "train.iterations=20", "device=cpu"),
            *("train.log_every=5", "train.validate_every=10", *overrides),
        ]

    return build


@pytest.fixture
def execute(command, finish):
    """Run that to its end, as one process or as several."""
    return lambda *overrides, **options: finish(command(*overrides), **options)


def folder_of(done, tmp_path):
    assert done.returncode == 0, done.stderr
    return (tmp_path / done.stdout.splitlines()[-1]).parent


def test_weights_of_a_network_with_auxiliary_classifiers(execute, tmp_path):
    source = GoogLeNet(20, input_size=64, width=0.25, auxiliary=True)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overrides = ("model=googlenet", "model.auxiliary=true", "init=pretrained", "init.weights=weights.pth")
    for rescale in (False, True):
        done = execute(*overrides, f"init.rescale={rescale}".lower(), "train.iterations=1")
        folder = folder_of(done, tmp_path)
        assert f"{len([*source.parameters()])} parameters loaded\n" in done.stdout
        report = json.loads((folder / "record.json").read_text())["init_report"]
        assert (report is None) == (not rescale)


def error_of(failed):
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    (line,) = (line for line in failed.stderr.splitlines() if line.startswith("error: "))
    return line


def weights(folder):
    return run.load_checkpoint(folder)["model"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_from_the_images_to_the_record(execute, tmp_path, device):
    settings = ("init=kmeans", "train.iterations=60", "workers=2", "data.cache=null", f"device={device}")
    done = execute(*settings)
    folder = folder_of(done, tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["data"] == "demo-folders, 20 classes, 800 + 200 images"
    assert record["bad_images"] == {"train": 0, "val": 0}
    assert record["processes"] == 1
    assert record["epoch"] == 25
    curve, validation = pd.read_csv(folder / "curve.csv"), pd.read_csv(folder / "validation.csv")
    assert curve["step"].tolist() == list(range(5, 61, 5))
    assert validation["step"].tolist() == [10, 20, 30, 40, 50, 60]
    last = validation.iloc[-1]
    assert record["metrics"] == pytest.approx(
        {"loss": last["loss"], "top1": last["top1"], "top5": last["top5"]}, rel=1e-4
    )
    assert record["metrics"]["loss"] < 2.5 < curve["loss"][0]  # it learns: chance is log(20) = 3.0
    assert 0.2 < record["metrics"]["top1"] < record["metrics"]["top5"] <= 1
    assert f"top-1 {100 * last['top1']:.1f} %" in done.stdout
    assert record["init_report"]["spread_after"] < 1.3 < record["init_report"]["spread_before"]
    assert "this run is done" in execute(*settings).stdout


def test_classifiers_start_at_zero_except_after_the_initialization_of_the_reference(execute, tmp_path):
    pca = ("init=pca", "init.images=60")
    for override, zero in ((pca, True), ((*pca, "zero_classifiers=false"), False), (("init=msra",), True)):
        state = weights(folder_of(execute("train.iterations=0", *override), tmp_path))
        assert (state["fc8.weight"].abs().max() == 0) == zero
        assert state["fc7.weight"].abs().max() > 0
    state = weights(folder_of(execute("train.iterations=0", "init=caffe"), tmp_path))
    assert state["fc8.weight"].abs().max() > 0


def test_bad_images_are_counted_and_not_fatal(execute, data, tmp_path):
    root = tmp_path / "set"
    for part in ("train", "val"):
        for name in ("bus", "cat"):
            (root / part / name).mkdir(parents=True)
            for path in (data / "set" / part / name).iterdir():
                (root / part / name / path.name).write_bytes(path.read_bytes())
    bad = {root / "train" / "bus" / "0003.jpg", root / "train" / "cat" / "0007.jpg", root / "val" / "cat" / "0001.jpg"}
    for path in bad:
        os.truncate(path, 500)
    done = execute(
        "data.name=mine",
        f"data.root={root}",
        "data.cache=null",
        "workers=2",
        "train.batch_size=8",
        "optimizer.lr=0.001",
    )
    folder = folder_of(done, tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["bad_images"] == {"train": 2, "val": 1}
    assert "2 images of train could not be decoded and were left out: " in done.stdout
    assert all(f"cannot decode the image {path}: left out" in done.stderr for path in bad)
    assert set((folder / "bad_train.txt").read_text().split()) == {str(path) for path in bad if "train" in str(path)}
    for path in root.glob("val/*/*"):
        path.write_bytes(b"")
    failed = execute(
        "data.name=mine", f"data.root={root}", "data.cache=null", "workers=0", "train.batch_size=8", "seed=1"
    )
    assert error_of(failed).startswith("error: none of 20 images, such as ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=nowhere", "data.name=mine"], "error: no images in nowhere, which is no folder: set data.root"),
        (["train.batch_size=801"], "error: 800 images do not fill a batch of 801: lower train.batch_size"),
        (["train.accumulate=3"], "error: train.batch_size=32 cannot be divided by 1 process(es) times train.acc"),
        (["data.short=63"], "error: crops of 64 pixels do not fit images of 63: raise data.short"),
        (
            ["init=pca", "init.images=900"],
            "error: init.images=900, but there are only 800 images to choose from: lower it",
        ),
        (["published=figure5"], "error: published=figure5: choose figure3, figure4 or null"),
        (["train.lr_policy=cosine"], "error: train.lr_policy=cosine: it should be 'step', 'multistep' or 'poly'"),
        (["train.precision=half"], "error: train.precision=half: it should be 'float32' or 'bfloat16'"),
    ],
)
def test_bad_input_is_one_line(execute, tmp_path, overrides, message):
    failed = execute(*overrides)
    assert error_of(failed).startswith(message)
    assert not list(tmp_path.glob("outputs/*/*/record.json"))


def test_evaluation_is_over_all_images(data, tmp_path):
    paths = sorted(map(str, (data / "set" / "val").glob("*/*.jpg")))[:30]
    labels = torch.arange(30) % 7
    images = Images(paths, 72, None, tmp_path / "bad.txt")
    torch.manual_seed(0)
    model = CaffeNet(7, input_size=64, width=0.125, fc=16).eval()
    crops = {"size": 64, "mean": (1, 2, 3), "scale": 1, "device": torch.device("cpu")}
    crops |= {"workers": 0, "rank": 0, "world": 1}
    found = [evaluate(model, images, Folders([], paths, labels), crops, size) for size in (7, 30)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    loss, top1, top5 = found[0]
    assert 0 <= top1 < top5 < 1
    constant = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 7))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.tensor([0.0, 5, 4, 3, 2, 1, -9])
    loss, top1, top5 = evaluate(constant, images, Folders([], paths, labels), crops, 8)
    share = [(labels == label).float().mean().item() for label in range(7)]
    assert top1 == pytest.approx(share[1])
    assert top5 == pytest.approx(sum(share[1:6]))
    expected = nn.functional.cross_entropy(constant[1].bias.detach().expand(30, 7), labels)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


# Several processes, and what remains when one is killed.


def close(one, other):
    return all((value - other[name]).norm() <= 1e-3 * other[name].norm() + 1e-7 for name, value in one.items())


def test_however_many_processes_the_training_is_the_same(execute, tmp_path):
    settings = ("train.iterations=15", "train.validate_every=15", "init=kmeans", "init.images=60")
    whole = folder_of(execute(*settings, "output=one"), tmp_path)
    start = weights(folder_of(execute(*settings, "train.iterations=0", "output=start"), tmp_path))
    assert not close(weights(whole), start)
    variants = {2: "train.accumulate=1", 4: "train.accumulate=2", 1: "train.accumulate=4"}
    for processes, accumulate in variants.items():
        done = execute(*settings, f"output=of{processes}", accumulate, processes=processes)
        folder = folder_of(done, tmp_path)
        assert folder.name == whole.name
        assert close(weights(folder), weights(whole))
        assert json.loads((folder / "record.json").read_text())["processes"] == processes
        assert done.stdout.count("validation: loss") == 1  # one of them prints
        for name in ("curve.csv", "validation.csv"):
            one, other = (pd.read_csv(path / name).drop(columns="seconds", errors="ignore") for path in (folder, whole))
            pd.testing.assert_frame_equal(one, other, rtol=1e-3)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rows(folder):
    curves = list(folder.glob("outputs/imagenet/*/curve.csv"))
    return len(curves[0].read_text().splitlines()) - 1 if curves else 0


def torchrun(line, folder):
    start = [line[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*start, *line[1:]], cwd=folder, env=environment, text=True, **pipes)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_process_ends_the_job_and_the_same_command_goes_on(command, begin, execute, tmp_path, processes):
    # An epoch has 25 steps; dropout draws from a generator of each process.
    long = ("train.iterations=180", "train.checkpoint_seconds=0", "model.dropout=0.5", "train.validate_every=30")
    whole = folder_of(execute(*long, "output=whole", processes=processes), tmp_path)
    line = command(*long)
    process = begin(line) if processes == 1 else torchrun(line, tmp_path)
    try:
        while rows(tmp_path) < 9:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid if processes == 1 else children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    if processes > 1:
        assert "Signal 9 (SIGKILL) received" in process.stderr.read()
    assert not list(tmp_path.glob("outputs/imagenet/*/record.json"))

    done = execute(*long, processes=processes)
    parts = folder_of(done, tmp_path)
    assert weights(parts).keys() == weights(whole).keys()
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(parts).items())
    for name in ("curve.csv", "validation.csv"):
        one, other = (pd.read_csv(path / name).drop(columns="seconds", errors="ignore") for path in (parts, whole))
        pd.testing.assert_frame_equal(one, other)
