import itertools
import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

from experiments import voc_cls
from experiments.data.images import ImageCache
from experiments.data.voc import CLASSES, read_split
from experiments.engine.initialization import once
from experiments.engine.losses import multilabel_loss
from experiments.engine.metrics import weighted_ap
from experiments.networks import CaffeNet

CONFIGS = Path(voc_cls.__file__).parents[1] / "configs"
INITS = sorted({path.stem for path in (CONFIGS / "init").glob("*.yaml")} - {"pretrained"})


BOTH = (False, True)


def config(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("voc_cls", list(overrides))


def record_of(process):
    """Path of the record that a command printed as its last line."""
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1]


def error_of(process):
    """The error message of a command that failed with one line of its own, no traceback."""
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    (line,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    return line


def weights(record):
    """The weights at the end of a run."""
    return torch.load(Path(record).parent / "checkpoint.pt")["model"]


# A run from beginning to end.


def test_a_run_learns_and_leaves_a_record(run, demo, tmp_path):
    done = run("voc_cls.py", "init=kmeans", "train.iterations=300", "model.dropout=0", "seed=3")
    path = Path(record_of(done))
    assert path.name == "record.json"
    assert path.parent.parent == tmp_path / "outputs" / "voc_cls"
    assert os.listdir(tmp_path) == ["outputs"]

    record = json.loads(path.read_text())
    assert [record[key] for key in ("experiment", "preset", "seed", "threads")] == ["voc_cls", "demo", 3, 1]
    assert record["config"]["train"]["iterations"] == 300
    assert record["config"]["init"]["filters"] == "kmeans"
    assert record["data"].startswith("demo, 600 + 300 images")
    assert {"python", "torch", "torchvision", "scikit-learn", "initializers"} <= record["versions"].keys()
    assert record["versions"]["torch"] == torch.__version__
    assert record["created"].endswith("+00:00")
    assert all(record["times"][part] > 0 for part in ("init", "train", "evaluate"))
    assert [layer["name"] for layer in record["init_report"]["layers"]] == list(record["change_rate"]["mean"])

    # Chance is the share of images that show a class.
    labels = read_split(demo / "set", "test").labels
    chance = ((labels > 0).sum(0) / (labels != 0).sum(0)).mean().item()
    assert record["metrics"]["map_step"] > 2.5 * chance
    assert list(record["per_class"]) == list(CLASSES)
    for kind in ("step", "voc11"):
        mean = np.mean([values[kind] for values in record["per_class"].values()])
        assert record["metrics"][f"map_{kind}"] == pytest.approx(mean)

    kept = {**np.load(path.parent / record["scores"])}
    assert kept["ids"].tolist() == read_split(demo / "set", "test").ids
    every = weighted_ap(kept, np.ones((1, 300), int))[0]
    assert every == pytest.approx([cell["step"] for cell in record["per_class"].values()], abs=1e-12)

    curve = pd.read_csv(path.parent / record["curve"])
    assert curve["step"].tolist() == list(range(5, 301, 5))
    assert curve["loss"].iloc[-10:].mean() < curve["loss"].iloc[:2].mean()

    assert "conv1" in done.stdout
    assert "spread" in done.stdout
    assert f"mean {100 * record['metrics']['map_step']:12.1f}" in done.stdout
    assert "300/300" in done.stderr

    again = run("voc_cls.py", "init=kmeans", "train.iterations=300", "model.dropout=0", "seed=3")
    assert record_of(again) == str(path)
    assert "this run is done" in again.stdout
    assert json.loads(path.read_text()) == record


def test_a_sweep_goes_on_after_an_error_and_skips_what_is_done(run, tmp_path):
    sweep = ("-m", "+sweep=table2", "init=torch,xavier", "seed=0", "train.iterations=5")
    failed = run("voc_cls.py", *sweep, "train.batch_size=1000,10")
    assert failed.returncode == 1
    assert failed.stderr.count("error: 600 images do not fill a batch of 1000") == 2
    records = sorted(tmp_path.glob("outputs/voc_cls/*/record.json"))
    assert [json.loads(path.read_text())["config"]["init"]["name"] for path in records] == ["torch", "xavier"]
    again = run("voc_cls.py", *sweep, "train.batch_size=10")
    assert again.returncode == 0
    assert again.stdout.count("this run is done") == 2
    assert record_of(again) == str(records[1])


def test_table1_runs_the_cells_that_the_paper_fills(run, tmp_path):
    overrides = ("+sweep=table1", "init=kmeans", "init.within=false", "optimizer=adam", "train.iterations=5")
    done = run("voc_cls.py", "-m", *overrides)
    assert done.returncode == 0, done.stderr
    skipped = "not run: table1 of the paper leaves this cell empty; published=null runs it too"
    assert done.stdout.count(skipped) == 1  # between-layer scaling without batch normalization; no scaling has both
    records = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/voc_cls/*/record.json")]
    cells = [(record["config"]["init"]["between"], record["config"]["model"]["batch_norm"]) for record in records]
    assert sorted(cells) == [(False, False), (False, True), (True, True)]


def test_24_of_the_32_cells_of_table1_are_published():
    found = Counter()
    for init, optimizer in itertools.product(("gaussian", "kmeans"), ("sgd", "adam")):
        cfg = config("published=table1", f"init={init}", f"optimizer={optimizer}")
        for cfg.init.within, cfg.init.between, cfg.model.batch_norm in itertools.product(BOTH, BOTH, BOTH):
            found[voc_cls.left_out(cfg) == ""] += 1
    assert found == {True: 24, False: 8}


def test_table3_names_the_files_that_are_not_there(run, tmp_path):
    done = run("voc_cls.py", "-m", "+sweep=table3")
    assert done.returncode == 0, done.stderr
    for name in ("agrawal2015", "wang2015", "doersch2015", "krizhevsky2012"):
        said = f"not run: data/weights/{name}.caffemodel is not there; its authors publish it at http"
        assert done.stdout.count(said) == 2
    assert run("voc_det.py", "-m", "+sweep=table3").stdout.count("not run: data/weights/") == 8
    assert not (tmp_path / "outputs" / "voc_cls").exists()


@pytest.mark.slow
def test_table3_runs_the_files_that_are_there(run, tmp_path):
    torch.save(CaffeNet(1000, input_size=67, width=0.25, fc=128).state_dict(), tmp_path / "a.pth")
    settings = ("weights=krizhevsky2012", "init.weights=a.pth", "train.iterations=5", "init.images=60")
    done = run("voc_cls.py", "-m", "+sweep=table3", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14 parameters loaded") == 2
    records = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/voc_cls/*/record.json")]
    assert sorted(record["config"]["init"]["rescale"] for record in records) == [False, True]


@pytest.mark.parametrize("model", ["vgg16", "googlenet"])
def test_other_networks_learn_too(run, model):
    done = run("voc_cls.py", f"model={model}", "init=gaussian", "init.images=40", "train.iterations=10")
    assert done.returncode == 0, done.stderr
    record = json.loads(Path(record_of(done)).read_text())
    assert record["config"]["model"]["input_size"] == 64
    assert record["init_report"]["spread_after"] < 4 < 100 < record["init_report"]["spread_before"]


def test_weights_from_a_file(run, tmp_path):
    settings = ("init=pretrained", "train.iterations=5")
    assert "pass init.weights=FILE" in error_of(run("voc_cls.py", *settings))
    assert "No such file" in error_of(run("voc_cls.py", *settings, "init.weights=absent.pth"))
    torch.manual_seed(0)
    source = CaffeNet(1000, input_size=67, width=0.25, fc=128)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    spreads = []
    for rescale in ("false", "true"):
        done = run("voc_cls.py", *settings, "init.weights=weights.pth", f"init.rescale={rescale}")
        assert done.returncode == 0, done.stderr
        assert "14 parameters loaded\nnot in the file: fc8.weight, fc8.bias" in done.stdout
        record = json.loads(Path(record_of(done)).read_text())
        spreads.append(record["change_rate"]["spread"])
        assert (record["init_report"] is None) == (rescale == "false")
    assert spreads[1] < spreads[0] / 2


# Killed and resumed.


@pytest.fixture
def kill(command, begin):
    """Start a run, and kill it (SIGKILL) once `reached()` is true."""

    def until(reached, *overrides):
        process = begin(command("voc_cls.py", *overrides))
        deadline = time.monotonic() + 120
        while not reached() and time.monotonic() < deadline:
            assert process.poll() is None, process.finish().stderr
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    return until


def rows(folder):
    curves = list(folder.glob("outputs/voc_cls/*/curve.csv"))
    return len(curves[0].read_text().splitlines()) - 1 if curves else 0


def test_a_run_killed_again_and_again_ends_with_the_same_weights(run, kill, tmp_path):
    # Long enough to be killed on the way, with a checkpoint after every row of the curve.
    long = ("init=pca", "train.iterations=120", "train.lr_every=40", "train.checkpoint_seconds=0")
    whole = record_of(run("voc_cls.py", *long, f"output={tmp_path / 'whole'}"))

    kill(lambda: list(tmp_path.glob("outputs/voc_cls/*/.lock")), *long)
    for reached in (1, 9):
        kill(lambda reached=reached: rows(tmp_path) >= reached, *long)
    parts = record_of(run("voc_cls.py", *long))
    assert Path(whole).parent.name == Path(parts).parent.name

    assert weights(whole).keys() == weights(parts).keys()
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())
    one, other = (json.loads(Path(path).read_text()) for path in (whole, parts))
    for key in ("metrics", "per_class", "change_rate"):
        assert one[key] == other[key]
    curves = [pd.read_csv(Path(path).parent / "curve.csv").drop(columns="seconds") for path in (whole, parts)]
    pd.testing.assert_frame_equal(*curves)


def test_a_truncated_checkpoint_gives_way_to_the_one_before(run):
    command = ("voc_cls.py", "init=xavier", "train.iterations=100", "train.checkpoint_seconds=0")
    record = Path(record_of(run(*command)))
    expected, newest, curve = weights(record), record.with_name("checkpoint.pt"), record.with_name("curve.csv")
    before = curve.read_text().splitlines()
    os.truncate(newest, newest.stat().st_size - 1000)
    record.unlink()  # as if it had been killed at the last checkpoint
    done = run(*command)
    assert f"{newest} is damaged" in done.stderr
    assert curve.read_text().splitlines()[:-1] == before[:-1]  # with their seconds: it did not begin again
    assert all(torch.equal(value, expected[name]) for name, value in weights(record_of(done)).items())


def test_two_processes_do_not_share_a_run(run, command, begin, tmp_path):
    long = ("init=xavier", "train.iterations=100000")
    process = begin(command("voc_cls.py", *long))
    try:
        while not rows(tmp_path):
            assert process.poll() is None
            time.sleep(0.02)
        assert "another process is at work in" in error_of(run("voc_cls.py", *long))
    finally:
        process.kill()
        process.wait()


# Bad input.


def test_an_unknown_initialization(run):
    failed = run("voc_cls.py", "init=kaiming")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "Could not find 'init/kaiming'" in failed.stderr
    for init in INITS:
        assert f" {init} " in failed.stderr


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("data=voc2007 data.root={tmp}/empty", ["no VOC 2007", "{tmp}/empty", "download_voc.py", "data.root"]),
        ("data=voc2007 data.root={tmp}/new", ["no mirror could deliver VOCtrainval_06-Nov-2007.tar", "data.root"]),
        ("init.images=700", ["init.images=700", "only 600", "lower it"]),
        ("rates.images=700", ["rates.images=700", "only 300"]),
        ("train.batch_size=700", ["600 images do not fill a batch of 700"]),
        ("output={tmp}/file", ["cannot write to {tmp}/file/voc_cls/demo-", "Not a directory", "set output"]),
        ("optimizer.lr=1e30", ["training diverged", "at step 5 with learning rate 1e+30", "lower optimizer.lr"]),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, override, messages):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    message = error_of(run("voc_cls.py", *override.format(tmp=tmp_path).split()))
    for part in messages:
        assert part.format(tmp=tmp_path) in message
    assert not list(tmp_path.glob("outputs/voc_cls/*/record.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run):
    assert "device=cuda, but torch finds no GPU" in error_of(run("voc_cls.py", "device=cuda"))


def test_the_traceback_of_an_error_on_demand(command, finish):
    failed = finish(command("voc_cls.py", "device=gpu"), HYDRA_FULL_ERROR="1")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "in check" in failed.stderr
    assert "device=gpu: it should be" in failed.stderr


@pytest.fixture
def damaged(demo, tmp_path):
    """A copy of the demo set, to be damaged, and the settings that use it."""
    shutil.copytree(demo / "set", tmp_path / "set")
    return tmp_path / "set", ("data=voc2007", f"data.root={tmp_path / 'set'}", f"data.cache={tmp_path / 'cache'}")


@pytest.mark.parametrize("init", ["kmeans", "xavier"])
def test_black_images(run, damaged, init):
    folder, settings = damaged
    for path in folder.glob("VOC2007/JPEGImages/*.jpg"):
        Image.new("RGB", (80, 60)).save(path)
    assert "black" in error_of(run("voc_cls.py", f"init={init}", *settings))


def test_a_devkit_unpacked_by_half(run, damaged):
    folder, settings = damaged
    (folder / "VOC2007/ImageSets/Main/sheep_test.txt").unlink()
    message = error_of(run("voc_cls.py", *settings))
    assert f"{folder / 'VOC2007'} is incomplete, ImageSets/Main/sheep_test.txt is missing" in message
    assert "add it, or set data.classes" in message


def test_a_corrupt_image(run, damaged):
    folder, settings = damaged
    path = folder / "VOC2007" / "JPEGImages" / f"{read_split(folder, 'test').ids[7]}.jpg"
    os.truncate(path, path.stat().st_size // 2)
    assert str(path) in error_of(run("voc_cls.py", *settings))


def test_a_full_disk_while_a_checkpoint_is_written(run, tmp_path):
    settings = ("init=xavier", "train.checkpoint_seconds=0")
    whole = weights(record_of(run("voc_cls.py", *settings, f"output={tmp_path / 'whole'}")))

    # The first checkpoint has weights only, the next one their momentum too: there the disk is full.
    size = sum(value.nbytes for value in whole.values())
    message = error_of(run("voc_cls.py", *settings, disk=int(1.5 * size)))
    assert "checkpoint.pt (File too large)" in message
    (folder,) = tmp_path.glob("outputs/voc_cls/*")
    assert sorted(os.listdir(folder)) == [".lock", "checkpoint.pt", "curve.csv", "init.json"]
    assert torch.load(folder / "checkpoint.pt")["step"] == 0

    found = weights(record_of(run("voc_cls.py", *settings)))
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_a_full_disk_while_the_results_are_written(run, tmp_path):
    record = Path(record_of(run("voc_cls.py", "init=xavier")))
    before = json.loads(record.read_text())
    record.unlink()
    assert "scores.npz (File too large)" in error_of(run("voc_cls.py", "init=xavier", disk=2000))
    assert not [*record.parent.glob("record*"), *record.parent.glob("*.tmp")]
    assert json.loads(Path(record_of(run("voc_cls.py", "init=xavier"))).read_text())["metrics"] == before["metrics"]


# The parts.


def test_the_loss_is_caffes():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(-1, 2, (5, 20), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    loss = multilabel_loss(logits, labels)
    p = logits.sigmoid()
    expected = -(p.log()[labels > 0].sum() + (1 - p).log()[labels < 0].sum()) / 5
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(logits.grad, ((p - (labels > 0).float()) * (labels != 0) / 5).detach())
    assert (logits.grad[labels == 0] == 0).all()


@pytest.fixture
def start(demo):
    """Initialize a small network with the given settings: the model, what `initialize` returns, and the images."""
    training = read_split(demo / "set", "trainval")
    cache = ImageCache.open(training.image_paths, demo / "cache")

    def build(*overrides):
        cfg = config("preset=demo", f"data.root={demo / 'set'}", "rates.images=10", *overrides)
        model = nn.Sequential(nn.Conv2d(3, 8, 9, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 20))
        model.caffe_fillers = {"0": (0.01, 0.0), "3": (0.005, 1.0)}
        for parameter in model.parameters():
            nn.init.constant_(parameter, 7.0)
        found = voc_cls.initialize(cfg, model, cache, training)
        images = voc_cls.choose(cfg, "init", cache, range(600)) if "images" in cfg.init else None
        return model, found, images

    return build


@pytest.mark.parametrize("init", INITS)
def test_every_initialization(start, init):
    model, found, images = start(f"init={init}")
    again, _, _ = start(f"init={init}")
    other, _, _ = start(f"init={init}", "seed=1")
    for name, parameter in model.named_parameters():
        assert not (parameter == 7).any(), name
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(model[3].weight, other[3].weight)
    assert (found["report"] is None) == (images is None)
    assert found["seconds"] > 0
    mean = found["change_rate"]["mean"]
    assert list(mean) == ["0", "3"]
    assert found["change_rate"]["spread"] == max(mean.values()) / min(mean.values())


@pytest.mark.parametrize("settings", ["init=gaussian_unscaled", "init=gaussian init.within=false init.between=false"])
def test_the_unscaled_gaussian(start, settings):
    model, _, _ = start(*settings.split())
    assert model[3].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model[0].bias.any()
    assert not model[3].bias.any()


def test_settings_reach_the_method(start):
    model, found, images = start("init=zca", "init.images=50", "init.bias=0.3", "init.between=false")
    assert images.shape == (50, 3, 67, 67)
    output = model[0](images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(output.mean(1), torch.full((8,), 0.3), atol=1e-3, rtol=0)
    torch.testing.assert_close(output.std(1, correction=0), torch.ones(8), atol=1e-3, rtol=0)
    assert found["report"]["images"] == 50
    assert found["report"]["layers"][0]["filters"] == "zca"


def test_both_steps_make_the_change_rates_equal_on_other_images(start):
    before = start("init=kmeans", "init.between=false", "rates.images=100")[1]["change_rate"]["spread"]
    after = start("init=kmeans", "rates.images=100")[1]["change_rate"]["spread"]
    assert before > 100
    assert after < 1.25


def test_a_run_that_goes_on_is_not_initialized_again(start, tmp_path):
    found = once(tmp_path, lambda: start("init=torch")[1])
    assert once(tmp_path, lambda: start("init=xavier")[1]) != found  # nothing was saved of it
    found = once(tmp_path, lambda: start("init=torch")[1])
    (tmp_path / "checkpoint.pt").touch()
    again = once(tmp_path, pytest.fail)
    assert again == found == json.loads((tmp_path / "init.json").read_text())


def test_images_are_chosen_at_random_from_those_allowed(demo):
    cache = ImageCache.open(read_split(demo / "set", "test").image_paths, demo / "cache")
    cfg = config("preset=demo", "rates.images=40")
    every = voc_cls.choose(config("preset=demo", "rates.images=300"), "rates", cache, range(300))
    number = {image.numpy().tobytes(): n for n, image in enumerate(every)}
    assert len(number) == 300

    def chosen(cfg, among):
        return [number[image.numpy().tobytes()] for image in voc_cls.choose(cfg, "rates", cache, among)]

    assert sorted(chosen(config("preset=demo", "rates.images=300"), range(300))) == list(range(300))
    first = chosen(cfg, range(0, 300, 2))
    assert len(set(first)) == 40
    assert first == chosen(cfg, range(0, 300, 2))
    assert set(first) != set(chosen(config("preset=demo", "rates.images=40", "seed=1"), range(0, 300, 2)))
    allowed = {n for n in chosen(config("preset=demo", "rates.images=150"), range(0, 300, 2))}
    assert set(first) <= allowed
    assert not allowed & set(chosen(config("preset=demo", "rates.images=150"), range(1, 300, 2)))


def test_images_are_squashed_whole(demo):
    """A column of every image's left half, and of its right half, on the left and right of the square."""
    picture = torch.zeros(60, 90, 3, dtype=torch.uint8)
    picture[:, :45] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    cache = ImageCache(picture.view(-1, 3), torch.tensor([0]), torch.tensor([60]), torch.tensor([90]))
    (image,) = voc_cls.choose(config("preset=demo", "rates.images=1", "model.input_size=40"), "rates", cache, range(1))
    blue_green_red = torch.tensor([50.0, 100.0, 200.0]) - torch.tensor([104.0, 117.0, 123.0])
    assert image.shape == (3, 40, 40)
    torch.testing.assert_close(image[:, :, :19], blue_green_red[:, None, None].expand(3, 40, 19))
    torch.testing.assert_close(image[:, :, 21:], -torch.tensor([104.0, 117.0, 123.0])[:, None, None].expand(3, 40, 19))
