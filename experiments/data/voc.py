"""PASCAL VOC 2007: the image lists, class labels and boxes of the official devkit.

The devkit is the folder `VOC2007` with `JPEGImages/`, `Annotations/` and `ImageSets/Main/`, as in
Everingham et al., "The PASCAL Visual Object Classes Challenge 2007 (VOC2007) Development Kit".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from experiments.data.images import ImageCache

# fmt: off
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on
SPLITS = ("train", "val", "trainval", "test")

_FOLDERS = ("JPEGImages", "Annotations", "ImageSets/Main")
_LISTS = tuple(f"{name}.txt" for split in SPLITS for name in (split, *(f"{c}_{split}" for c in CLASSES)))
_REMEDY = "run `python scripts/download_voc.py`, or set data.root (or VOC_ROOT) to an unpacked VOC 2007"


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, in the order of its list.

    - `ids`: N image ids, such as "000005".
    - `labels`: int8 (N, 20), columns as in `CLASSES`: 1 present, -1 absent, 0 only objects marked difficult.
    - `image_paths`: N JPEG files, which exist.
    """

    ids: list[str]
    labels: Tensor
    image_paths: list[Path]


@dataclass(frozen=True, eq=False)
class Objects:
    """The annotated objects of one image, in the order of its XML file.

    - `boxes`: float32 (n, 4), x1 y1 x2 y2 as in the XML: pixels counted from 1, both corners inside the box.
    - `classes`: int64 (n,), indices into `CLASSES`.
    - `difficult`: bool (n,).
    """

    boxes: Tensor
    classes: Tensor
    difficult: Tensor


def find_devkit(root: str | Path) -> Path:
    """The devkit folder `VOC2007`: `root` itself, `root/VOC2007` or `root/VOCdevkit/VOC2007`.

    Raises FileNotFoundError if there is none or if it is incomplete, naming the first sub-folder or list that
    is missing (the test split comes in an archive of its own).
    """
    root = Path(root)
    for devkit in (root, root / "VOC2007", root / "VOCdevkit" / "VOC2007"):
        missing = [folder for folder in _FOLDERS if not (devkit / folder).is_dir()]
        if len(missing) == len(_FOLDERS):
            continue
        if not missing:
            present = {path.name for path in (devkit / "ImageSets/Main").iterdir()}
            missing = [f"ImageSets/Main/{name}" for name in _LISTS if name not in present]
        if missing:
            raise FileNotFoundError(f"VOC 2007 in {devkit} is incomplete, {missing[0]} is missing: {_REMEDY}")
        return devkit
    raise FileNotFoundError(f"no VOC 2007 (a folder VOC2007 with {', '.join(_FOLDERS)}) in {root}: {_REMEDY}")


def read_split(root: str | Path, split: str) -> Split:
    """Read the list of `split` ("train", "val", "trainval" or "test") and its 20 class lists.

    Raises FileNotFoundError for an incomplete devkit and for a listed image that has no file, and ValueError
    for an unknown split, an empty list, a malformed line and a class list of other images than the split's.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    devkit = find_devkit(root)
    lists, images = devkit / "ImageSets/Main", devkit / "JPEGImages"

    path = lists / f"{split}.txt"
    ids = [image_id for (image_id,) in _read_rows(path, ("image id",))]
    if not ids:
        raise ValueError(f"{path} is empty: {_REMEDY}")
    present = {image.name for image in images.iterdir()}
    missing = [image_id for image_id in ids if f"{image_id}.jpg" not in present]
    if missing:
        raise FileNotFoundError(
            f"{path} names image {missing[0]}, but {images / missing[0]}.jpg is missing "
            f"({len(missing)} of {len(ids)} images are): {_REMEDY}"
        )

    labels = [_read_labels(lists / f"{name}_{split}.txt", ids) for name in CLASSES]
    return Split(
        ids=ids,
        labels=torch.tensor(labels, dtype=torch.int8).T.contiguous(),
        image_paths=[images / f"{image_id}.jpg" for image_id in ids],
    )


def open_split(data: Mapping, split: str, device: torch.device | str) -> tuple[Split, ImageCache]:
    """A split of the images of `configs/data`, and their pixels on a device.

    Raises:
        FileNotFoundError, ValueError: as in `read_split`.
    """
    found = read_split(data["root"], split)
    return found, ImageCache.open(found.image_paths, data["cache"]).to(device)


def read_objects(root: str | Path, image_id: str) -> Objects:
    """Read the boxes, classes and difficult flags of one image from `Annotations/<image_id>.xml`.

    Raises FileNotFoundError for an incomplete devkit and for an image without annotation, and ValueError,
    naming the file, for malformed XML, a missing field, an unknown class and a box with its corners swapped.
    """
    path = find_devkit(root) / "Annotations" / f"{image_id}.xml"
    if not path.is_file():
        raise FileNotFoundError(f"image {image_id} has no annotation, {path} is missing: {_REMEDY}")
    try:
        objects = [_parse_object(element) for element in ElementTree.parse(path).getroot().iterfind("object")]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is not a VOC 2007 annotation ({error}): {_REMEDY}") from error
    boxes, classes, difficult = zip(*objects, strict=True) if objects else ((), (), ())
    return Objects(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        classes=torch.tensor(classes, dtype=torch.int64),
        difficult=torch.tensor(difficult, dtype=torch.bool),
    )


def _parse_object(element: ElementTree.Element) -> tuple[list[float], int, bool]:
    """The box (x1 y1 x2 y2), class index and difficult flag of one <object> element."""

    def text(field: str) -> str:
        value = element.findtext(field)
        if value is None:
            raise ValueError(f"an object has no {field}")
        return value

    if text("name") not in CLASSES:
        raise ValueError(f"unknown class {text('name')!r}")
    x1, y1, x2, y2 = box = [float(text(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    if not (x1 <= x2 and y1 <= y2):
        raise ValueError(f"the corners of the box {box} are swapped")
    return box, CLASSES.index(text("name")), bool(int(text("difficult")))


def _read_labels(path: Path, ids: list[str]) -> list[int]:
    """The labels of one class list, which must name the images `ids` in their order."""
    rows = _read_rows(path, ("image id", "label"))
    if [image_id for image_id, _ in rows] != ids:
        raise ValueError(f"{path} does not name the same images as the list of its split: {_REMEDY}")
    for number, (_, label) in enumerate(rows, start=1):
        if label not in ("1", "-1", "0"):
            raise ValueError(f"{path}:{number}: the label {label!r} is not 1, -1 or 0: {_REMEDY}")
    return [int(label) for _, label in rows]


def _read_rows(path: Path, fields: tuple[str, ...]) -> list[list[str]]:
    """The lines of a list, each split at white space into `fields`."""
    # Bytes that are not text end up in the message below, beside the name of their file.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split() for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(fields):
            expected = " ".join(f"<{field}>" for field in fields)
            raise ValueError(f"{path}:{number}: {lines[number - 1]!r} is not {expected}: {_REMEDY}")
    return rows
