import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from experiments.data.images import ImageCache
from experiments.data.proposals import objects_of
from experiments.data.voc import CLASSES, SPLITS, classes_of, find_devkit, read_objects, read_split, set_outputs

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
    with pytest.raises(
        FileNotFoundError, match=r"no VOC 2007.*nowhere: for VOC 2007, run `python scripts/download_voc\.py`.*own"
    ):
        find_devkit(root)


@pytest.mark.parametrize("part", ["JPEGImages", "Annotations", "ImageSets/Main"])
def test_half_unpacked_devkit_names_what_is_missing(devkit, part):
    shutil.rmtree(devkit / part)
    for read in (find_devkit, lambda root: read_split(root, "val"), lambda root: read_objects(root, "000001")):
        with pytest.raises(
            FileNotFoundError, match=rf"incomplete, {part} is missing: add it; if it should be VOC 2007"
        ):
            read(devkit.parent)


@pytest.mark.parametrize("name", ["val.txt", "cow_val.txt", "train_val.txt"])
def test_a_missing_list_is_named(devkit, name):
    (devkit / "ImageSets/Main" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"ImageSets/Main/{name} is missing: add it") as error:
        read_split(devkit, "val")
    assert "download" not in str(error.value)
    assert read_split(devkit, "train").ids == IDS["train"]


@pytest.mark.parametrize("split", SPLITS)
def test_read_split(devkit, split):
    result = read_split(devkit.parent.parent, split)
    assert result.ids == IDS[split]
    assert result.image_paths == [devkit / "JPEGImages" / f"{i}.jpg" for i in IDS[split]]
    assert result.labels.dtype == torch.int8
    assert result.labels.is_contiguous()
    assert result.labels.tolist() == [[LABELS.get((i, name), -1) for name in CLASSES] for i in IDS[split]]


@pytest.mark.parametrize("split", ["training", "../val", "", "cow_", "a\0b"])
def test_unknown_split_lists_the_choices(devkit, split):
    with pytest.raises(FileNotFoundError, match=r"has no split .*choose one of test, train, trainval, val"):
        read_split(devkit, split)


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
        ("val.txt", b"\n \n", r"val\.txt is empty"),
        ("val.txt", b"000002\n000001\n000002\n", r"val\.txt names image 000002 2 times"),
        ("val.txt", b"../JPEGImages/000002\n", r"val\.txt has the image id '../JPEGImages/000002'"),
        ("val.txt", b"..\n", r"val\.txt has the image id '..'"),
        ("val.txt", b"a\\\\b\n", r"val\.txt has the image id"),
        ("val.txt", b"000002\0\n", r"val\.txt has the image id '000002.x00'"),
        ("val.txt", "000002\n".encode("utf-16"), r"val\.txt has the image id"),
        ("val.txt", b"\xff\xd8 \xff\n", r"val\.txt:1: .* is not <image id>"),
        ("cat_val.txt", b"000002\n", r"cat_val\.txt:1: '000002' is not <image id> <label>"),
        ("cat_val.txt", b"000002 2\n", r"cat_val\.txt: the label '2' of image 000002 is not 1, -1 or 0"),
        ("cat_val.txt", b"000002 yes\n", r"cat_val\.txt: the label 'yes' of image 000002 is not 1, -1 or 0"),
        ("cat_val.txt", b"000003 1\n", r"cat_val\.txt does not name the same images"),
        ("cat_val.txt", b"", r"cat_val\.txt does not name the same images"),
        ("cat_val.txt", b"000002 1\n000002 1\n", r"cat_val\.txt does not name the same images"),
    ],
)
def test_malformed_list_names_file_and_line(devkit, name, content, message):
    (devkit / "ImageSets/Main" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_split(devkit, "val")
    assert "download" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf%s\r\n", b"%s\n\n", b"\n  %s \t\n\n", b"%s"])
def test_lists_as_editors_leave_them(devkit, content):
    """A byte order mark, Windows' line ends, spaces, blank lines, no end of the last line."""
    lists = devkit / "ImageSets/Main"
    (lists / "val.txt").write_bytes(content % b"000002")
    (lists / "cat_val.txt").write_bytes(content % b"000002  0")
    found = read_split(devkit, "val")
    assert found.ids == ["000002"]
    assert found.labels[0, CLASSES.index("cat")] == 0


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
    with pytest.raises(ValueError, match=r"Annotations has the image id '../Annotations/000001'"):
        read_objects(devkit, "../Annotations/000001")


BOMB = (
    '<!DOCTYPE annotation [<!ENTITY a "dogdogdogdog">'
    + "".join(f'<!ENTITY {y} "{f"&{x};" * 10}">' for x, y in zip("abcdefghi", "bcdefghij", strict=True))
    + "]>"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no element found"),
        (annotation(DOG)[:-20], "no element found|unclosed"),
        (annotation(DOG, DOG | {"name": "unicorn"}), "object 2, 'unicorn', is of an unknown class, none of VOC's"),
        (annotation(DOG | {"x2": 47}), "corners of the box .* of object 1, 'dog', are swapped"),
        (annotation(DOG | {"y2": 239}), "corners of the box .* of object 1, 'dog', are swapped"),
        (annotation(DOG | {"x1": "nan"}), "object 1, 'dog', has the xmin 'nan', which is no finite number"),
        (annotation(DOG | {"x2": "1e999"}), "object 1, 'dog', has the xmax '1e999', which is no finite number"),
        (annotation(DOG | {"x1": "-inf"}), "has the xmin '-inf', which is no finite number"),
        (annotation(DOG | {"y1": "top"}), "has the ymin 'top', which is no finite number"),
        (annotation(DOG | {"y1": ""}), "has the ymin '', which is no finite number"),
        (annotation(DOG | {"difficult": ""}), "object 1, 'dog', has difficult='', neither 1 nor 0"),
        (annotation(DOG | {"difficult": "2"}), "object 1, 'dog', has difficult='2', neither 1 nor 0"),
        (annotation(DOG).replace("ymin", "y"), "object 1 has no bndbox/ymin"),
        (annotation(DOG).replace("<name>dog</name>", ""), "object 1 has no name"),
        (annotation(DOG).replace("annotation", "html"), "begins with <html>"),
        (annotation(DOG).replace("<annotation>", "<annotation xmlns='http://voc'>"), "begins with <{http://voc}annot"),
        ("<?xml version='1.0' encoding='base64'?>" + annotation(DOG), ""),
        ("<?xml version='1.0' encoding='nowhere'?>" + annotation(DOG), ""),
        (BOMB + annotation(DOG | {"name": "&j;"}), "declares entities"),
        ("<?xml version='1.0' encoding='utf-16'?>" + BOMB + annotation(DOG | {"name": "&j;"}), "amplification"),
        (annotation(DOG) + " " * (1 << 24), "more than the annotation of one image needs"),
    ],
)
def test_malformed_annotation_names_the_file(devkit, content, message):
    encoding = "utf-16" if "utf-16" in content else "utf-8"
    (devkit / "Annotations/000004.xml").write_bytes(content.encode(encoding))
    with pytest.raises(ValueError, match=rf"000004\.xml is not an annotation as VOC has them \(.*({message})") as error:
        read_objects(devkit, "000004")
    assert "download" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "expected"), [("true", True), (" TRUE ", True), ("1", True), ("false", False), (" 0\n", False)]
)
def test_annotations_as_tools_write_them(devkit, flag, expected):
    """A byte order mark, Windows' line ends, spaces around values, and flags that are words or not there."""
    content = annotation(DOG | {"name": " dog\n", "x1": " 48 ", "difficult": flag}, DOG).replace("\n", "\r\n")
    content = content[::-1].replace(">tluciffid/<0>tluciffid<", "", 1)[::-1]
    assert content.count("<difficult>") == 1
    (devkit / "Annotations/000004.xml").write_bytes(content.encode("utf-8-sig"))
    objects = read_objects(devkit, "000004")
    assert [CLASSES[k] for k in objects.classes] == ["dog", "dog"]
    assert objects.boxes[0].tolist() == [48, 240, 195, 371]
    assert objects.difficult.tolist() == [expected, False]


# Other classes than VOC's.


def test_other_classes(devkit):
    (devkit / "Annotations/000001.xml").write_text(annotation(DOG | {"name": "traffic light"}))
    for name, label in (("traffic light", 1), ("axolotl", -1)):
        (devkit / f"ImageSets/Main/{name}_mine.txt").write_text(f"000001 {label}\n")
    (devkit / "ImageSets/Main/mine.txt").write_text("000001\n")
    classes = classes_of({"classes": ["axolotl", "traffic light"]})
    found = read_split(devkit, "mine", classes)
    assert found.classes == ("axolotl", "traffic light")
    assert found.labels.tolist() == [[-1, 1]]
    assert read_objects(devkit, "000001", classes).classes.tolist() == [1]
    with pytest.raises(
        ValueError, match=r"'dog', is of an unknown class, none of data.classes, axolotl, traffic light"
    ):
        read_objects(devkit, "000002", classes)


def test_labels_come_from_the_annotations_where_no_class_has_a_list(devkit):
    """With labels as the devkit's: 1 present, -1 absent, 0 only difficult objects."""
    for path in (devkit / "ImageSets/Main").glob("*_test.txt"):
        path.unlink()
    cat = DOG | {"name": "cat"}
    (devkit / "Annotations/000005.xml").write_text(annotation(cat | {"difficult": 1}, DOG | {"difficult": 1}, DOG))
    (devkit / "Annotations/000006.xml").write_text(annotation())
    assert read_split(devkit, "test", ("cat", "dog")).labels.tolist() == [[-1, 1], [0, 1], [-1, -1]]
    with pytest.raises(ValueError, match=r"000004\.xml .* 'dog', is of an unknown class"):
        read_split(devkit, "test", ("cat", "cow"))


def test_classes_of_the_settings():
    assert classes_of({}) == classes_of({"classes": None}) == CLASSES
    for bad in (["cat", "cat"], ["a/b"], [".."], [" cat"], ["a\nb"], [""]):
        with pytest.raises(ValueError, match=r"data\.classes has the name .*: give each class one name"):
            classes_of({"classes": bad})


@pytest.mark.parametrize(("asked", "ok"), [(20, True), (None, True), (2, True), (7, False)])
def test_the_outputs_follow_the_classes(asked, ok):
    cfg = OmegaConf.create({"model": {"num_outputs": asked}, "data": {"classes": ["cat", "dog"]}})
    if not ok:
        with pytest.raises(ValueError, match=r"model.num_outputs=7: there are 2 classes"):
            set_outputs(cfg)
        return
    set_outputs(cfg)
    assert cfg.model.num_outputs == 2


CACHE = ImageCache.of([torch.zeros(100, 200, 3, dtype=torch.uint8)])  # 200 x 100 pixels
DATA = OmegaConf.create({"data": {"root": None}})


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((1, 1, 200, 100), (0, 0, 199, 99)),
        ((0, -5, 201, 1e30), (0, 0, 199, 99)),
        ((200, 100, 1e39, 101), (199, 99, 199, 99)),
        ((10, 20, 30, 40), (9, 19, 29, 39)),
    ],
)
def test_boxes_that_reach_out_are_cut_and_counted(devkit, capsys, box, expected):
    sides = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
    (devkit / "Annotations/000002.xml").write_text(annotation(DOG | sides, DOG | {"x1": 1, "x2": 9, "y1": 1, "y2": 9}))
    split = read_split(devkit, "val")
    DATA.data.root = str(devkit)
    found = objects_of(DATA, split, CACHE)
    assert found[0].boxes.tolist() == [[*expected], [0, 0, 8, 8]]
    reaches_out = tuple(x - 1 for x in box) != expected
    assert ("1 boxes of objects reach out" in capsys.readouterr().out) == reaches_out


@pytest.mark.parametrize("box", [(201, 1, 300, 50), (1, 101, 20, 150), (-9, 1, 0, 50), (1, -9, 20, 0)])
def test_boxes_outside_are_refused(devkit, box):
    (devkit / "Annotations/000002.xml").write_text(
        annotation(DOG | dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)))
    )
    DATA.data.root = str(devkit)
    with pytest.raises(ValueError, match=r"image 000002 in .*: object 1 has the box .* 200 x 100 pixels: correct it"):
        objects_of(DATA, read_split(devkit, "val"), CACHE)


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
