"""The detection command on generated images: records, resuming, bad input; and a detector that learns some by heart."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import detection
import initializers
from detection import FastRCNN, Proposals, Truth
from experiments.data.demo import make_demo
from experiments.data.images import ImageCache
from experiments.data.regions import RoIBatches, images_with_rois, scaled
from experiments.data.voc import CLASSES, find_devkit, read_objects, read_split
from experiments.engine.metrics import weighted_ap
from experiments.engine.optim import make_optimizer
from experiments.engine.trainer import train
from experiments.networks import CaffeNet

MEAN = (104, 117, 123)


def windows(height, width):
    """Boxes of many sizes and shapes all over an image, int (n, 4)."""
    found = []
    for side in (24, 36, 54, 80):
        for aspect in (0.67, 1.0, 1.5):
            h, w = min(height, round(side * aspect**0.5)), min(width, round(side / aspect**0.5))
            for y in range(0, height - h + 1, max(1, h // 3)):
                found += [(x, y, x + w - 1, y + h - 1) for x in range(0, width - w + 1, max(1, w // 3))]
    return np.array(found)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """As everywhere, but with fewer images."""
    folder = tmp_path_factory.mktemp("few")
    make_demo(folder / "set", num_train=120, num_test=40)
    return folder


@pytest.fixture(scope="session")
def grid(demo):
    """A file of proposals for the generated set."""
    ids, parts = [], []
    for path in sorted(find_devkit(demo / "set").glob("JPEGImages/*.jpg")):
        with Image.open(path) as image:
            parts.append(windows(image.height, image.width))
        ids.append(path.stem)
    boxes = dict(zip(("x1", "y1", "x2", "y2"), np.concatenate(parts).T.astype(np.uint16), strict=True))
    np.savez(demo / "grid.npz", ids=ids, offsets=np.cumsum([0, *map(len, parts)]), **boxes)
    return demo / "grid.npz"


@pytest.fixture
def settings(grid):
    return (f"proposals={grid}", "data=voc2007", "init.images=20")


def record_of(done):
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


def error_of(done):
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_run_leaves_a_record(run, settings, tmp_path):
    command = ("voc_det.py", "init=kmeans", *settings, "train.iterations=150", "model.dropout=0")
    done = run(*command)
    path = record_of(done)
    record = json.loads(path.read_text())
    assert record["experiment"] == "voc_det"
    assert set(record["metrics"]) == {"map_voc11", "map_area", "coco_ap", "coco_ap50"}
    assert record["metrics"]["map_voc11"] > 0.05  # chance is near 0
    assert record["metrics"]["coco_ap50"] == pytest.approx(record["metrics"]["map_area"], abs=0.05)
    assert set(record["per_class"]) == set(CLASSES)
    assert record["proposals"]["test"]["recall_0.5"] > 0.8
    assert record["init_report"]["spread_after"] < 1.5
    assert record["data"] == "voc2007, 120 + 40 images, short side 128 px"
    assert [layer["name"] for layer in record["init_report"]["layers"]][-2:] == ["cls_score", "bbox_pred"]
    assert Image.open(path.parent / "detections.jpg").size[0] > 500
    kept = {**np.load(path.parent / record["scores"])}
    every = weighted_ap(kept, np.ones((1, len(kept["ids"])), int))[0]
    stated = [cell["voc11"] for cell in record["per_class"].values()]
    assert every == pytest.approx([np.nan if value is None else value for value in stated], abs=1e-12, nan_ok=True)
    lines = (path.parent / "comp4_det_test_cat.txt").read_text().splitlines()
    assert len(lines) > 40
    image_id, score, *box = lines[0].split()
    assert 0 < float(score) < 1
    assert image_id in read_split(find_devkit(Path(record["config"]["data"]["root"])), "test").ids
    assert 1 <= float(box[0]) <= float(box[2]) <= 160
    assert "this run is done" in run(*command).stdout
    assert json.loads(path.read_text()) == record


def test_initializations_and_last_layers(run, settings, tmp_path):
    for init, new, std in (
        ("gaussian_unscaled", "fast_rcnn", 0.01),
        ("caffe", "fast_rcnn", 0.01),
        ("gaussian", "initialized", None),
    ):
        overrides = (f"init={init}", f"new_layers={new}", "train.iterations=1", "optimizer.lr=1e-20")
        done = run("voc_det.py", *overrides, *(settings if init == "gaussian" else settings[:2]))
        state = torch.load(record_of(done).parent / "checkpoint.pt")["model"]
        found = state["cls_score.weight"].std().item()
        fixed = pytest.approx((std or 0.01) * (4096 / 128) ** 0.5, rel=0.1)
        assert (found == fixed) == (std is not None)
        assert state["target_std"][1:].min() > 0.01
    assert "new_layers=zero: it should be 'fast_rcnn' or 'initialized'" in error_of(
        run("voc_det.py", *settings, "new_layers=zero")
    )


def test_another_network_and_weights_from_a_file(run, settings, tmp_path):
    done = run("voc_det.py", "model=vgg16", "init=gaussian", *settings, "model.fc=32", "model.width=0.0625",
               "train.iterations=2")  # fmt: skip
    assert json.loads(record_of(done).read_text())["config"]["detector"] == {"pool": "pool5"}
    source = CaffeNet(1000, width=0.25, fc=128)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overrides = ("init=pretrained", "init.weights=weights.pth", *settings, "train.iterations=1", "optimizer.lr=1e-20")
    done = run("voc_det.py", *overrides)
    assert "14 parameters loaded" in done.stdout
    state = torch.load(record_of(done).parent / "checkpoint.pt")["model"]
    torch.testing.assert_close(state["fc7.weight"], source.fc7.weight.detach())


@pytest.mark.slow  # as are twenty kills of each command, in test_kills.py; that of voc_cls.py is run always
def test_a_run_killed_on_the_way_ends_with_the_same_weights(run, command, begin, settings, tmp_path):
    long = ("init=pca", *settings, "train.iterations=80", "train.checkpoint_seconds=0")
    whole = record_of(run("voc_det.py", *long, f"output={tmp_path / 'whole'}"))
    for rows in (2, 9):
        process = begin(command("voc_det.py", *long))
        while not (curve := list(tmp_path.glob("outputs/voc_det/*/curve.csv"))) or (
            len(curve[0].read_text().splitlines()) <= rows
        ):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    parts = record_of(run("voc_det.py", *long))
    one, other = (torch.load(path.parent / "checkpoint.pt")["model"] for path in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert json.loads(whole.read_text())["metrics"] == json.loads(parts.read_text())["metrics"]


def test_bad_input_is_one_line(run, grid, tmp_path):
    with np.load(grid) as file:
        columns = dict(file)
    few = {"ids": columns["ids"][:5], "offsets": columns["offsets"][[*range(5), -1]]}
    np.savez(tmp_path / "few.npz", **columns | few)
    np.savez(tmp_path / "large.npz", **columns | {"x2": columns["x2"] + 300})
    for name, message in (("few", "has no proposals for image"), ("large", "outside of the image: pass a file that")):
        assert message in error_of(run("voc_det.py", f"proposals={tmp_path / name}.npz", "data=voc2007", "init=xavier"))
    assert "No such file" in error_of(run("voc_det.py", "data=voc2007", "proposals=absent.npz"))
    (tmp_path / "folder").mkdir()
    assert "folder/voc_2007_trainval.mat" in error_of(run("voc_det.py", "data=voc2007", "proposals=folder"))
    assert "init.images=700" in error_of(run("voc_det.py", "data=voc2007", f"proposals={grid}", "init.images=700"))
    assert not list(tmp_path.glob("outputs/voc_det/*/record.json"))


def test_an_annotation_that_names_an_unknown_class(run, demo, grid, tmp_path):
    shutil.copytree(demo / "set", tmp_path / "set")
    path = next((tmp_path / "set").glob("VOC2007/Annotations/*.xml"))
    path.write_text(path.read_text().replace("<name>", "<name>un", 1))
    settings = ("data=voc2007", f"data.root={tmp_path / 'set'}", f"proposals={grid}", "init=xavier")
    assert f"{path} is not an annotation as VOC has them (object 1, 'un" in error_of(run("voc_det.py", *settings))


@pytest.mark.skipif(os.environ.get("VOC_ROOT") is None, reason="needs real images: set VOC_ROOT")
def test_selective_search_covers_the_objects_of_real_images(tmp_path):
    split = read_split(os.environ["VOC_ROOT"], "test")
    detection.compute_proposals(split.image_paths[:6], tmp_path / "found.npz")
    cache = ImageCache.open(split.image_paths[:6], tmp_path)
    found = detection.read_proposals(tmp_path / "found.npz", split.ids[:6], cache.heights, cache.widths)
    objects = [read_objects(os.environ["VOC_ROOT"], image_id).boxes - 1 for image_id in split.ids[:6]]
    assert len(found.boxes) > 6 * 300
    assert detection.recall(found, objects, 0.5) > 0.8


def test_a_handful_of_images_is_learnt_by_heart(demo, tmp_path):
    torch.manual_seed(0)
    split = read_split(demo / "set", "trainval")
    cache = ImageCache.open(split.image_paths[:6], tmp_path)
    objects = [read_objects(demo / "set", image_id) for image_id in split.ids[:6]]
    truth = [Truth(found.boxes - 1, found.classes, found.difficult) for found in objects]
    parts = [torch.tensor(windows(int(h), int(w))).int() for h, w in zip(cache.heights, cache.widths, strict=True)]
    proposals = Proposals(torch.cat(parts), torch.tensor([0, *map(len, parts)]).cumsum(0))
    rois = detection.make_rois(proposals, [(found.boxes, found.classes) for found in truth])
    model = FastRCNN(CaffeNet(20, width=0.25, fc=64, dropout=0), padding={"conv1": 5, "pool1": 1, "pool2": 1})
    statistics = rois.target_statistics(len(CLASSES))
    model.target_mean.copy_(statistics[0])
    model.target_std.copy_(statistics[1])
    options = {"foreground": 0.25, "mean": MEAN, "seed": 0}
    initializers.initialize(model, images_with_rois(cache, rois, images=6, each=32, size=160, **options), "gaussian")
    model.reset_outputs(0)
    batches = RoIBatches(
        cache, rois, images=2, per_batch=64, scales=[160], longest=300, statistics=statistics, **options
    )
    optimizer = make_optimizer(
        model,
        OmegaConf.create(
            {"name": "sgd", "lr": 0.003, "momentum": 0.9, "weight_decay": 0, "bias_lr_mult": 2, "bias_decay_mult": 0}
        ),
    )
    train(
        model,
        detection.fast_rcnn_loss,
        batches,
        optimizer,
        iterations=300,
        lr_at=lambda step: 0.003 if step < 220 else 0.0003,
        clip_norm=10,
        folder=tmp_path,
    )
    model.eval()
    found = []
    for image in range(6):
        height, width = int(cache.heights[image]), int(cache.widths[image])
        scale = 160 / min(height, width)
        found.append(detection.detect(model, scaled(cache, image, scale, MEAN), proposals[image], scale, height, width))
    precision = detection.voc_ap(detection.Detections.of(found), truth, len(CLASSES))
    assert precision["map_area"] > 0.9
