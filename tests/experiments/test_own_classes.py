"""A folder in VOC's layout with classes of one's own, in the commands."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from experiments.data.prepare import prepare
from experiments.settings import check

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["disc", "traffic light"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """16 images to train on and 8 to test on, of discs and boxes, without class lists; proposals beside them."""
    root = tmp_path_factory.mktemp("own") / "signs"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    rng, ids, parts = np.random.default_rng(0), [f"sign{number}" for number in range(24)], []
    for number, image_id in enumerate(ids):
        image = Image.fromarray(rng.integers(0, 120, (96, 96, 3), np.uint8))
        x, y = rng.integers(5, 45, 2).tolist()
        draw = ImageDraw.Draw(image)
        (draw.ellipse if number % 2 else draw.rectangle)((x, y, x + 40, y + 40), fill=(250, 200, 20 * (number % 3)))
        image.save(root / f"JPEGImages/{image_id}.jpg")
        box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 41}</xmax><ymax>{y + 41}</ymax>"
        (root / f"Annotations/{image_id}.xml").write_text(
            f"<annotation><object><name>{CLASSES[1 - number % 2]}</name><bndbox>{box}</bndbox></object></annotation>"
        )
        parts.append([(x, y, x + 40, y + 40), (x - 4, y, x + 36, y + 40), (0, 0, 30, 30), (50, 50, 95, 95)])
    (root / "ImageSets/Main/learn.txt").write_text("\r\n".join(ids[:16]) + "\r\n\r\n")
    (root / "ImageSets/Main/check.txt").write_text("\n".join(ids[16:]))
    corners = dict(zip(("x1", "y1", "x2", "y2"), np.clip(np.concatenate(parts), 0, 95).T, strict=True))
    np.savez(root / "proposals.npz", ids=ids, offsets=np.arange(0, 4 * 24 + 1, 4), **corners)
    return root


@pytest.fixture
def line(own, tmp_path):
    data = {"name": "signs", "root": own, "train": "learn", "val": "learn", "test": "check", "cache": own / "cache"}
    settings = [f"data.{key}={value}" for key, value in data.items()]
    settings += [f"data.classes=[{','.join(CLASSES)}]", f"output={tmp_path / 'out'}", "init.images=8", "threads=1"]
    return lambda script, *more: [sys.executable, ROOT / "experiments" / script, "data=voc2007", *settings, *more]


def result(done):
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def test_classification(line, finish):
    command = line("voc_cls.py", "preset=demo", "train.iterations=20", "rates.images=8", "evaluate.crops=1")
    path = result(finish(command))
    record = json.loads(path.read_text())
    assert [*record["per_class"]] == CLASSES
    assert record["config"]["model"]["num_outputs"] == 2
    assert torch.load(path.parent / "checkpoint.pt")["model"]["fc8.weight"].shape[0] == 2


def test_detection(line, own, finish):
    settings = ("preset=demo", f"proposals={own / 'proposals.npz'}", "train.iterations=4")
    path = result(finish(line("voc_det.py", *settings)))
    assert [*json.loads(path.read_text())["per_class"]] == CLASSES
    assert {file.name for file in path.parent.glob("comp4*")} == {f"comp4_det_check_{name}.txt" for name in CLASSES}


def test_neighbors(line, finish, tmp_path):
    size = ("model.input_size=67", "model.width=0.25", "model.fc=64")
    result(finish(line("neighbors.py", *size, "queries=4", "neighbors=2")))
    table = pd.read_csv(tmp_path / "out" / "figure2.csv")
    assert set(table["query"]) <= {f"sign{number}" for number in range(16, 24)}


def test_images_of_val_that_are_not_trained_on_are_one_line(line, finish):
    done = finish(line("voc_cls.py", "preset=demo", "train.iterations=20", "rates.images=8", "data.val=check"))
    assert done.returncode == 1
    (error,) = (found for found in done.stderr.splitlines() if found.startswith("error: "))
    assert "of data.val=check is not in data.train=learn" in error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("classes", ["[]", "disc", "[1, 2]", "['']", "{a: b}"])
def test_what_is_no_list_of_names_is_refused(classes):
    cfg = OmegaConf.create(f"data: {{classes: {classes}}}")
    with pytest.raises(ValueError, match=r"data\.classes"):
        check(cfg)


def test_nothing_is_downloaded_in_the_place_of_own_images(tmp_path):
    """A mistake in the name of the folder, with the default data.name."""
    prepare({"name": "voc2007", "classes": CLASSES, "root": str(tmp_path / "singns")})
    assert not any(tmp_path.iterdir())
