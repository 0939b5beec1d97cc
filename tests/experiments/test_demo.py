import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.demo import LOOKS, draw_image, make_demo, make_demo_folders
from experiments.data.voc import CLASSES, find_devkit, read_objects, read_split

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo"), num_train=80, num_test=40)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_reader_of_the_real_devkit_reads_it(demo):
    assert find_devkit(demo.parent) == demo
    splits = {name: read_split(demo, name) for name in ("train", "val", "trainval", "test")}
    assert {name: len(split.ids) for name, split in splits.items()} == {
        "train": 40,
        "val": 40,
        "trainval": 80,
        "test": 40,
    }
    assert sorted(splits["train"].ids + splits["val"].ids) == splits["trainval"].ids
    assert not set(splits["trainval"].ids) & set(splits["test"].ids)


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_class_lists_agree_with_the_boxes(demo, split):
    data = read_split(demo, split)
    for image_id, labels in zip(data.ids, data.labels, strict=True):
        objects = read_objects(demo, image_id)
        expected = torch.full((20,), -1, dtype=torch.int8)
        expected[objects.classes[objects.difficult]] = 0
        expected[objects.classes[~objects.difficult]] = 1
        assert torch.equal(labels, expected), image_id


def test_boxes_lie_in_the_image(demo):
    data = read_split(demo, "trainval")
    for image_id, path in zip(data.ids, data.image_paths, strict=True):
        with Image.open(path) as image:
            width, height = image.size
        x1, y1, x2, y2 = read_objects(demo, image_id).boxes.T
        assert (x1 >= 1).all()
        assert (y1 >= 1).all()
        assert (x1 < x2).all()
        assert (y1 < y2).all()
        assert (x2 <= width).all()
        assert (y2 <= height).all()


def test_boxes_hold_the_objects():
    """All saturated pixels of an image with one object lie in its box, and they nearly fill it."""
    for seed in range(20):
        name = CLASSES[seed]
        image, (obj,) = draw_image(np.random.default_rng(seed), [name], 160)
        x1, y1, x2, y2 = (side - 1 for side in obj.box)  # to 0-based
        # The background and the clutter are muted and the grain is grey: what is saturated is the object.
        saturation = np.ptp(image.astype(float), axis=2)
        threshold = 0.5 * saturation[y1 : y2 + 1, x1 : x2 + 1].max()
        rows, columns = np.nonzero(saturation > threshold)
        assert columns.min() >= x1 - 1
        assert rows.min() >= y1 - 1
        assert columns.max() <= x2 + 1
        assert rows.max() <= y2 + 1
        # The pale colour of a texture may end the shape on some side, but not far from the saturated one.
        assert columns.max() - columns.min() > 0.5 * (x2 - x1)
        assert rows.max() - rows.min() > 0.5 * (y2 - y1)


def test_images_vary_as_photographs_do(demo):
    data = read_split(demo, "trainval")
    sizes, counts, difficult = set(), set(), 0
    for image_id, path in zip(data.ids, data.image_paths, strict=True):
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert image.format == "JPEG"
            sizes.add(image.size)
        objects = read_objects(demo, image_id)
        counts.add(len(objects.classes))
        difficult += int(objects.difficult.sum())
    assert all(max(size) == 160 and min(size) >= 110 for size in sizes)
    assert len(sizes) > 20
    assert {width > height for width, height in sizes} == {True, False}
    assert counts == {1, 2, 3, 4}
    assert difficult >= 5
    assert (data.labels == 0).any()  # the third label, only difficult objects, occurs


def test_classes_are_balanced(demo):
    positives = (read_split(demo, "trainval").labels == 1).sum(dim=0)
    assert positives.min() >= 4
    assert positives.max() <= 12


def test_no_two_classes_look_alike():
    assert set(LOOKS) == set(CLASSES)
    for (first, look), (second, other) in combinations(LOOKS.items(), 2):
        shared = sum(a == b for a, b in zip(look[:3], other[:3], strict=True))
        assert shared <= 1, f"{first} and {second} share two of shape, texture and hue"


def test_an_object_behind_another_is_difficult_or_left_out():
    kept = difficult = 0
    for seed in range(20):
        _, objects = draw_image(np.random.default_rng(seed), list(CLASSES[:12]), 160)
        assert objects[0].name == CLASSES[11]
        kept += len(objects)
        difficult += sum(obj.difficult for obj in objects)
    assert kept < 0.9 * 20 * 12
    assert difficult > 0.2 * kept


def test_same_seed_same_files(demo, tmp_path):
    again = make_demo(tmp_path / "again", num_train=80, num_test=40)
    other = make_demo(tmp_path / "other", num_train=80, num_test=40, seed=1)
    assert files(again) == files(demo)
    image = "JPEGImages/000001.jpg"
    assert (other / image).read_bytes() != (demo / image).read_bytes()


def test_a_finished_set_is_left_as_it_is(demo):
    image = demo / "JPEGImages" / "000001.jpg"
    before = image.stat().st_mtime_ns
    assert make_demo(demo.parent, num_train=80, num_test=40) == demo
    assert image.stat().st_mtime_ns == before


def test_other_data_are_not_overwritten(tmp_path):
    (tmp_path / "VOC2007").mkdir()
    (tmp_path / "VOC2007" / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="remove it, or choose another"):
        make_demo(tmp_path, num_train=4, num_test=2)
    assert (tmp_path / "VOC2007" / "mine.txt").read_text() == "keep me"


def test_a_set_of_other_settings_is_not_taken_for_it(tmp_path):
    devkit = make_demo(tmp_path, num_train=4, num_test=2)
    assert json.loads((devkit / "demo.json").read_text())["seed"] == 0
    with pytest.raises(FileExistsError, match='"seed": 1'):
        make_demo(tmp_path, num_train=4, num_test=2, seed=1)


def test_nothing_half_written_stays_behind(tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def full_disk(self, path, **options):
        if len(saved) == 3:
            raise OSError(28, "No space left on device", str(path))
        saved.append(path)
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match=r"cannot write the demo set to .*No space left on device"):
        make_demo(tmp_path, num_train=4, num_test=2)
    assert len(saved) == 3
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from experiments.data import demo
draw, drawn = demo.draw_image, []
def killed(*arguments):
    drawn.append(0)
    return draw(*arguments) if len(drawn) < 4 else os.kill(os.getpid(), 9)
demo.draw_image = killed
demo.{make}
"""


@pytest.mark.parametrize(
    ("make", "again"),
    [
        ("make_demo(sys.argv[1], num_train=4, num_test=2)", lambda root: make_demo(root, num_train=4, num_test=2)),
        ("make_demo_folders(sys.argv[1] + '/set', 1, 1, 48)", lambda root: make_demo_folders(root / "set", 1, 1, 48)),
    ],
)
def test_a_kill_leaves_nothing_over_the_next_time(tmp_path, make, again):
    root, whole = tmp_path / "killed", again(tmp_path / "whole")
    for _ in range(2):
        code = KILLED.format(make=make)
        assert subprocess.run([sys.executable, "-c", code, str(root)], cwd=ROOT, check=False).returncode == -9
        assert any(path.name.startswith(".demo-") for path in root.iterdir())
    found = again(root)
    assert [path.name for path in root.iterdir()] == [found.name]
    assert files(found) == files(whole)


def test_who_waited_takes_the_set_of_a_faster_process(tmp_path, monkeypatch):
    from experiments.data import demo as module

    write, written = module._write_devkit, []

    def slow(*arguments):
        written.append(0)
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(module, "_write_devkit", slow)
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(lambda _: make_demo(tmp_path, num_train=4, num_test=2), range(4))]
    assert found == [tmp_path / "VOC2007"] * 4
    assert len(written) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["VOC2007"]


@pytest.mark.parametrize("bad", [{"num_train": 1}, {"num_test": 0}, {"size": 10}])
def test_impossible_settings(tmp_path, bad):
    with pytest.raises(ValueError, match="the demo set needs"):
        make_demo(tmp_path, **bad)
    assert list(tmp_path.iterdir()) == []


# A folder per class.


def test_each_class_has_a_folder_of_images_of_its_own(tmp_path):
    root = make_demo_folders(tmp_path / "set", num_train=3, num_val=2, size=48)
    for split, count in (("train", 3), ("val", 2)):
        assert sorted(path.name for path in (root / split).iterdir()) == sorted(CLASSES)
        assert all(len(list((root / split / name).glob("*.jpg"))) == count for name in CLASSES)
    contents = files(root)
    assert len(set(contents.values())) == len(contents)
    assert make_demo_folders(root, num_train=3, num_val=2, size=48) == root
    assert files(make_demo_folders(tmp_path / "again", num_train=3, num_val=2, size=48)) == contents
    with pytest.raises(FileExistsError, match=r"is there but is not the demo set .*\"num_train\": 4"):
        make_demo_folders(root, num_train=4, num_val=2, size=48)
    with pytest.raises(ValueError, match="num_val >= 1"):
        make_demo_folders(tmp_path / "none", num_val=0)
    assert {path.name for path in tmp_path.iterdir()} == {"set", "again"}
