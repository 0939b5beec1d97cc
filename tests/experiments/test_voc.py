import os
import shutil

import pytest
import torch
from PIL import Image

from experiments.data.voc import CLASSES, SPLITS, find_devkit, read_objects, read_split

IDS = {"train": ["000003", "000001"], "val": ["000002"], "test": ["000004", "000005", "000006"]}
IDS["trainval"] = ["000001", "000002", "000003"]
LABELS = {("000001", "train"): 1, ("000003", "train"): 0, ("000003", "cow"): 1, ("000005", "tvmonitor"): 1}

OBJECT = """
  <object>
    <name>{name}</name>
    <pose>Left</pose>
    <truncated>1</truncated>
    <difficult>{difficult}</difficult>
    <bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  </object>"""
DOG = {"name": "dog", "difficult": 0, "x1": 48, "y1": 240, "x2": 195, "y2": 371}


def annotation(*objects):
    return f"<annotation><folder>VOC2007</folder>{''.join(OBJECT.format(**o) for o in objects)}</annotation>"


@pytest.fixture
def devkit(tmp_path):
    """A devkit of six images with empty JPEG files, in the official layout."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, ids in IDS.items():
        (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for name in CLASSES:
            lines = [f"{i} {LABELS.get((i, name), -1):2d}\n" for i in ids]
            (root / f"ImageSets/Main/{name}_{split}.txt").write_text("".join(lines))
        for i in ids:
            (root / f"JPEGImages/{i}.jpg").touch()
            (root / f"Annotations/{i}.xml").write_text(annotation(DOG))
    return root


def test_classes_are_the_alphabetical_twenty():
    assert len(set(CLASSES)) == 20
    assert list(CLASSES) == sorted(CLASSES)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_find_devkit_at_above_and_two_above(devkit, levels):
    root = [devkit, devkit.parent, devkit.parent.parent][levels]
    assert find_devkit(root) == devkit
    assert find_devkit(str(root)) == devkit


@pytest.mark.parametrize("make", [True, False], ids=["empty", "missing"])
def test_no_devkit(tmp_path, make):
    root = tmp_path / "nowhere"
    if make:
        root.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no VOC 2007 .*nowhere: run `python scripts/download_voc\.py`"):
        find_devkit(root)


@pytest.mark.parametrize(
    "part",
    [
        "JPEGImages",
        "Annotations",
        "ImageSets/Main",
        "ImageSets/Main/test.txt",
        "ImageSets/Main/trainval.txt",
        "ImageSets/Main/cow_val.txt",
        "ImageSets/Main/train_train.txt",
    ],
)
def test_half_unpacked_devkit_names_what_is_missing(devkit, part):
    path = devkit / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for read in (
        find_devkit,
        lambda root: read_split(root, "val"),
        lambda root: read_objects(root, "000001"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"incomplete, {part} is missing: run `python scripts/d"):
            read(devkit.parent)


@pytest.mark.parametrize("split", SPLITS)
def test_read_split(devkit, split):
    result = read_split(devkit.parent.parent, split)
    assert result.ids == IDS[split]
    assert result.image_paths == [devkit / "JPEGImages" / f"{i}.jpg" for i in IDS[split]]
    assert result.labels.dtype == torch.int8
    assert result.labels.is_contiguous()
    assert result.labels.tolist() == [[LABELS.get((i, name), -1) for name in CLASSES] for i in IDS[split]]


def test_unknown_split_lists_the_choices(devkit):
    with pytest.raises(ValueError, match="unknown split 'training': choose one of train, val, trainval, test"):
        read_split(devkit, "training")


def test_list_names_a_missing_image(devkit):
    (devkit / "JPEGImages/000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainval\.txt names image 000002, .*000002\.jpg is missing") as e:
        read_split(devkit, "trainval")
    assert "1 of 3" in str(e.value)
    assert read_split(devkit, "train").ids == IDS["train"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.txt", b"", r"val\.txt is empty"),
        ("val.txt", b"000002 1\n", r"val\.txt:1: '000002 1' is not <image id>"),
        ("val.txt", b"000002\n\n", r"val\.txt:2: '' is not <image id>"),
        ("val.txt", b"\xff\xd8 \xff\n", r"val\.txt:1: .* is not <image id>"),
        ("cat_val.txt", b"000002\n", r"cat_val\.txt:1: '000002' is not <image id> <label>"),
        ("cat_val.txt", b"000002 2\n", r"cat_val\.txt:1: the label '2' is not 1, -1 or 0"),
        ("cat_val.txt", b"000002 yes\n", r"cat_val\.txt:1: the label 'yes' is not 1, -1 or 0"),
        ("cat_val.txt", b"000003 1\n", r"cat_val\.txt does not name the same images"),
        ("cat_val.txt", b"", r"cat_val\.txt does not name the same images"),
        ("cat_val.txt", b"000002 1\n000002 1\n", r"cat_val\.txt does not name the same images"),
    ],
)
def test_malformed_list_names_file_and_line(devkit, name, content, message):
    (devkit / "ImageSets/Main" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{message}.*download_voc"):
        read_split(devkit, "val")


def test_read_objects(devkit):
    person = {"name": "person", "difficult": 1, "x1": 8.5, "y1": 12, "x2": 352, "y2": 498}
    (devkit / "Annotations/000004.xml").write_text(annotation(DOG, person))
    objects = read_objects(devkit.parent, "000004")
    assert objects.boxes.dtype == torch.float32
    assert objects.boxes.tolist() == [[48, 240, 195, 371], [8.5, 12, 352, 498]]
    assert objects.classes.dtype == torch.int64
    assert [CLASSES[k] for k in objects.classes] == ["dog", "person"]
    assert objects.difficult.dtype == torch.bool
    assert objects.difficult.tolist() == [False, True]


def test_image_without_objects(devkit):
    (devkit / "Annotations/000004.xml").write_text(annotation())
    objects = read_objects(devkit, "000004")
    assert objects.boxes.shape == (0, 4)
    assert objects.classes.shape == objects.difficult.shape == (0,)
    assert (objects.boxes.dtype, objects.classes.dtype) == (torch.float32, torch.int64)


def test_missing_annotation(devkit):
    with pytest.raises(FileNotFoundError, match=r"image 000009 has no annotation, .*000009\.xml is missing"):
        read_objects(devkit, "000009")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no element found"),
        (annotation(DOG)[:-20], "no element found|unclosed"),
        (annotation(DOG | {"name": "unicorn"}), "unknown class 'unicorn'"),
        (annotation(DOG | {"x2": 47}), "corners of the box .* are swapped"),
        (annotation(DOG | {"y2": 239}), "corners of the box .* are swapped"),
        (annotation(DOG | {"x1": "nan"}), "corners of the box .* are swapped"),
        (annotation(DOG | {"y1": "top"}), "could not convert string to float: 'top'"),
        (annotation(DOG | {"difficult": ""}), "invalid literal"),
        (annotation(DOG).replace("ymin", "y"), "an object has no bndbox/ymin"),
        (annotation(DOG).replace("difficult", "hard"), "an object has no difficult"),
        (annotation(DOG).replace("<name>dog</name>", ""), "an object has no name"),
    ],
)
def test_malformed_annotation_names_the_file(devkit, content, message):
    (devkit / "Annotations/000004.xml").write_text(content)
    with pytest.raises(ValueError, match=rf"000004\.xml is not a VOC 2007 annotation \(.*({message})"):
        read_objects(devkit, "000004")


voc = pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="needs VOC_ROOT, an unpacked VOC 2007")


@voc
def test_real_splits_do_not_overlap():
    ids = {split: read_split(os.environ["VOC_ROOT"], split).ids for split in SPLITS}
    assert sorted(ids["train"] + ids["val"]) == ids["trainval"]
    assert len(set(ids["trainval"] + ids["test"])) == len(ids["trainval"]) + len(ids["test"])


@voc
@pytest.mark.parametrize("split", ["trainval", "test"])
def test_real_class_lists_agree_with_annotations(split):
    """1: an object that is not difficult, 0: only difficult ones, -1: none."""
    root = find_devkit(os.environ["VOC_ROOT"])
    images = read_split(root, split)
    assert (images.labels == 1).any(0).all()
    for n in range(0, len(images.ids), len(images.ids) // 300):
        objects = read_objects(root, images.ids[n])
        labels = torch.full((20,), -1, dtype=torch.int8)
        labels[objects.classes[objects.difficult]] = 0
        labels[objects.classes[~objects.difficult]] = 1
        assert torch.equal(images.labels[n], labels), images.ids[n]
        with Image.open(images.image_paths[n]) as image:
            assert objects.boxes.min() >= 1
            assert (objects.boxes[:, 2:] <= torch.tensor(image.size)).all(), images.ids[n]
