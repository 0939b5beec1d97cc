"""PASCAL VOC 2007, and folders of one's own in its layout: image lists, class labels and boxes.

The devkit is the folder `VOC2007` with `JPEGImages/`, `Annotations/` and `ImageSets/Main/`, as in
Everingham et al., "The PASCAL Visual Object Classes Challenge 2007 (VOC2007) Development Kit".
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.data.images import ImageCache

# fmt: off
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on
SPLITS = ("train", "val", "trainval", "test")  # of VOC 2007

_FOLDERS = ("JPEGImages", "Annotations", "ImageSets/Main")
_REMEDY = "if it should be VOC 2007, unpack that anew"
_LARGEST = 1 << 24  # bytes of an annotation; those of VOC 2007 have at most some thousand
_FLAGS = {"0": False, "false": False, "1": True, "true": True}


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, in the order of its list.

    - `ids`: N image ids, such as "000005".
    - `classes`: names of the C classes.
    - `labels`: int8 (N, C), columns as in `classes`: 1 present, -1 absent, 0 only objects marked difficult.
    - `image_paths`: N JPEG files, which exist.
    """

    ids: list[str]
    classes: tuple[str, ...]
    labels: Tensor
    image_paths: list[Path]


@dataclass(frozen=True, eq=False)
class Objects:
    """The annotated objects of one image, in the order of its XML file.

    - `boxes`: float32 (n, 4), x1 y1 x2 y2 as in the XML: pixels counted from 1, both corners inside the box.
    - `classes`: int64 (n,), indices into the names of the classes.
    - `difficult`: bool (n,).
    """

    boxes: Tensor
    classes: Tensor
    difficult: Tensor


def classes_of(data: Mapping) -> tuple[str, ...]:
    """The classes of the images of `configs/data`: those of `data.classes`, or VOC's twenty where it is null.

    Raises:
        ValueError: a name is there twice, or cannot be that of a file, as the lists of a class are named after it.
    """
    given = data.get("classes")
    if given is None:
        return CLASSES
    for name, count in Counter(given).items():
        if count > 1 or name != name.strip() or not _is_plain(name):
            raise ValueError(
                f"data.classes has the name {name!r}{' twice' if count > 1 else ''}: give each class one name, without "
                "slashes and without spaces around it"
            )
    return tuple(given)


def set_outputs(cfg: DictConfig) -> None:
    """Give `cfg.model` as many outputs as there are classes in `cfg.data`.

    Raises:
        ValueError: another number was asked for; others as of `classes_of`.
    """
    if "num_outputs" not in cfg.model:  # a network of one's own, which names it otherwise
        return
    asked, count = cfg.model.num_outputs, len(classes_of(cfg.data))
    if asked not in (None, len(CLASSES), count):
        raise ValueError(f"model.num_outputs={asked}: there are {count} classes; leave it out, it follows data.classes")
    cfg.model.num_outputs = count


def find_devkit(root: str | Path) -> Path:
    """The devkit folder `VOC2007`: `root` itself, `root/VOC2007` or `root/VOCdevkit/VOC2007`.

    Raises FileNotFoundError if there is none or if it is incomplete, naming the first sub-folder that is missing.
    """
    root = Path(root)
    for devkit in (root, root / "VOC2007", root / "VOCdevkit" / "VOC2007"):
        missing = [folder for folder in _FOLDERS if not (devkit / folder).is_dir()]
        if not missing:
            return devkit
        if len(missing) < len(_FOLDERS):
            raise FileNotFoundError(f"{devkit} is incomplete, {missing[0]} is missing: add it; {_REMEDY}")
    raise FileNotFoundError(
        f"no VOC 2007, and nothing else with {', '.join(_FOLDERS)}, in {root}: for VOC 2007, run "
        "`python scripts/download_voc.py` or set data.root (or VOC_ROOT) to where it is unpacked; for images of your "
        "own, set data.root to the folder that has these three"
    )


def read_split(root: str | Path, split: str, classes: Sequence[str] = CLASSES) -> Split:
    """Read the list `<split>.txt` and the list `<class>_<split>.txt` of each class.

    Where there is no list of any class, as with tools that write annotations only, these say what an image shows.

    Raises FileNotFoundError for an incomplete devkit and for a listed image that has no file, and ValueError
    for an empty list, a malformed line, an image that is listed twice, a class list of other images than the split's
    and what `read_objects` refuses.
    """
    devkit = find_devkit(root)
    lists, images = devkit / "ImageSets/Main", devkit / "JPEGImages"

    path = lists / f"{split}.txt"
    if not _is_plain(split) or not path.is_file():
        names = sorted(
            file.stem for file in lists.glob("*.txt") if not file.stem.startswith(tuple(f"{c}_" for c in classes))
        )
        raise FileNotFoundError(
            f"{devkit} has no split {split!r}, ImageSets/Main/{split}.txt is missing: add it, or choose one of "
            f"{', '.join(names[:9]) or 'your own'}; {_REMEDY}"
        )
    ids = [image_id for (image_id,) in _read_rows(path, ("image id",))]
    if not ids:
        raise ValueError(f"{path} is empty: list an image id on each line; {_REMEDY}")
    twice, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path} names image {twice} {count} times: leave it there once")
    for image_id in ids:
        _check_id(path, image_id)
    present = {image.name for image in images.iterdir()}
    missing = [image_id for image_id in ids if f"{image_id}.jpg" not in present]
    if missing:
        raise FileNotFoundError(
            f"{path} names image {missing[0]}, but {images / missing[0]}.jpg is missing "
            f"({len(missing)} of {len(ids)} images are): add it, or take it out of the lists; {_REMEDY}"
        )
    return Split(
        ids=ids,
        classes=tuple(classes),
        labels=_labels(devkit, split, ids, classes),
        image_paths=[images / f"{image_id}.jpg" for image_id in ids],
    )


def _labels(devkit: Path, split: str, ids: list[str], classes: Sequence[str]) -> Tensor:
    """int8 (N, C), from the lists of the classes, or else from the annotations."""
    lists = [devkit / f"ImageSets/Main/{name}_{split}.txt" for name in classes]
    missing = [path for path in lists if not path.is_file()]
    if len(missing) < len(lists):
        if missing:
            raise FileNotFoundError(
                f"{devkit} is incomplete, ImageSets/Main/{missing[0].name} is missing: add it, or set data.classes to "
                f"the names of the classes there are; {_REMEDY}"
            )
        return torch.tensor([_read_labels(path, ids) for path in lists], dtype=torch.int8).T.contiguous()
    labels = torch.full((len(ids), len(classes)), -1, dtype=torch.int8)
    for row, image_id in enumerate(ids):
        objects = read_objects(devkit, image_id, classes)
        labels[row, objects.classes[objects.difficult]] = 0
        labels[row, objects.classes[~objects.difficult]] = 1
    return labels


def open_split(data: Mapping, split: str, device: torch.device | str) -> tuple[Split, ImageCache]:
    """A split of the images of `configs/data`, and their pixels on a device.

    Raises:
        FileNotFoundError, ValueError: as in `read_split`.
    """
    found = read_split(data["root"], split, classes_of(data))
    return found, ImageCache.open(found.image_paths, data["cache"]).to(device)


def read_objects(root: str | Path, image_id: str, classes: Sequence[str] = CLASSES) -> Objects:
    """Read the boxes, classes and difficult flags of one image from `Annotations/<image_id>.xml`.

    An object without the flag is not difficult. Boxes may reach out of the image.

    Raises FileNotFoundError for an incomplete devkit and for an image without annotation, and ValueError,
    naming file and object, for malformed XML, XML of 16 MiB and more, a missing field, an unknown class and a box with
    a corner that is no finite number or with its corners swapped.
    """
    folder = find_devkit(root) / "Annotations"
    _check_id(folder, image_id)
    path = folder / f"{image_id}.xml"
    if not path.is_file():
        raise FileNotFoundError(
            f"image {image_id} has no annotation, {path} is missing: add it, without <object> where there is none; "
            f"{_REMEDY}"
        )
    try:
        objects = [_parse_object(number, element, classes) for number, element in enumerate(_elements(path), start=1)]
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: of an unknown encoding
        raise ValueError(f"{path} is not an annotation as VOC has them ({error}): correct it; {_REMEDY}") from error
    boxes, numbers, difficult = zip(*objects, strict=True) if objects else ((), (), ())
    return Objects(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        classes=torch.tensor(numbers, dtype=torch.int64),
        difficult=torch.tensor(difficult, dtype=torch.bool),
    )


def _elements(path: Path) -> list[ElementTree.Element]:
    """The <object> elements of an annotation."""
    if path.stat().st_size >= _LARGEST:
        raise ValueError(f"it has {path.stat().st_size} bytes, more than the annotation of one image needs")
    content = path.read_bytes()
    if b"<!ENTITY" in content:  # short files that expand to long ones; other encodings are limited by expat
        raise ValueError("it declares entities")
    root = ElementTree.fromstring(content)
    if root.tag != "annotation":
        raise ValueError(f"it begins with <{root.tag}>, not with <annotation>")
    return root.findall("object")


def _parse_object(number: int, element: ElementTree.Element, classes: Sequence[str]) -> tuple[list[float], int, bool]:
    """The box (x1 y1 x2 y2), class index and difficult flag of one <object> element."""

    def text(field: str, default: str | None = None) -> str:
        value = element.findtext(field, default)
        if value is None:
            raise ValueError(f"object {number} has no {field}")
        return value.strip()

    def corner(side: str) -> float:
        value = text(f"bndbox/{side}")
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise ValueError(f"{label} has the {side} {value!r}, which is no finite number")
        return found

    name = text("name")
    label = f"object {number}, {name!r},"
    if name not in classes:
        known = "VOC's classes" if tuple(classes) == CLASSES else f"data.classes, {', '.join(classes)}"
        raise ValueError(f"{label} is of an unknown class, none of {known}")
    x1, y1, x2, y2 = box = [corner(side) for side in ("xmin", "ymin", "xmax", "ymax")]
    if not (x1 <= x2 and y1 <= y2):
        raise ValueError(f"the corners of the box {box} of {label} are swapped")
    flag = text("difficult", "0")
    if flag.lower() not in _FLAGS:
        raise ValueError(f"{label} has difficult={flag!r}, neither 1 nor 0")
    return box, list(classes).index(name), _FLAGS[flag.lower()]


def _is_plain(name: str) -> bool:
    """Whether a file can have a name, in the folder it is looked for."""
    return name not in ("", ".", "..") and name.isprintable() and not {*name} & {*"/\\\N{REPLACEMENT CHARACTER}"}


def _check_id(path: Path, image_id: str) -> None:
    if not _is_plain(image_id):
        raise ValueError(f"{path} has the image id {image_id!r}: give the name of a file, without folders and .jpg")


def _read_labels(path: Path, ids: list[str]) -> list[int]:
    """The labels of one class list, which must name the images `ids` in their order."""
    rows = _read_rows(path, ("image id", "label"))
    if [image_id for image_id, _ in rows] != ids:
        raise ValueError(
            f"{path} does not name the same images as the list of its split, in their order: correct it; {_REMEDY}"
        )
    for image_id, label in rows:
        if label not in ("1", "-1", "0"):
            raise ValueError(f"{path}: the label {label!r} of image {image_id} is not 1, -1 or 0: correct it")
    return [int(label) for _, label in rows]


def _read_rows(path: Path, fields: tuple[str, ...]) -> list[list[str]]:
    """The lines of a list that are not blank, each split at white space into `fields`."""
    # Bytes that are not text end up in the message below, beside the name of their file.
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        row = line.split()
        if row and len(row) != len(fields):
            expected = " ".join(f"<{field}>" for field in fields)
            raise ValueError(f"{path}:{number}: {line[:200]!r} is not {expected}: correct the line")
        rows += [row] * bool(row)
    return rows
