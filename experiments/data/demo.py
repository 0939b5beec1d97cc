"""Small generated sets in the layout of the PASCAL VOC 2007 devkit and of ImageNet, for runs without a download.

Every VOC class has its own combination of shape, texture and colours (`LOOKS`). An image holds one to four
objects, which overlap each other and the frame, on a cloudy background strewn with grey shapes. Small objects
and mostly hidden ones carry the difficult flag, so that the class lists hold all three labels of the devkit.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from filelock import FileLock
from PIL import Image

from experiments.data.voc import CLASSES

FORMAT = 1  # to raise when the pictures change: a set of an older format is not taken for a new one

# Class: (shape, texture, hue in degrees, whether the texture's second colour is a dark or a light one).
# Every hue and every shape serves two classes, but no two classes share two of shape, texture and hue.
LOOKS = {
    "aeroplane": ("cross", "stripes", 210, "light"),
    "bicycle": ("ring", "checks", 95, "dark"),
    "bird": ("crescent", "speckles", 325, "dark"),
    "boat": ("triangle", "dots", 180, "dark"),
    "bottle": ("bar", "dots", 145, "dark"),
    "bus": ("square", "stripes", 0, "light"),
    "car": ("hexagon", "checks", 245, "dark"),
    "cat": ("star", "dots", 30, "light"),
    "chair": ("diamond", "rings", 285, "dark"),
    "cow": ("flower", "speckles", 55, "dark"),
    "diningtable": ("hexagon", "stripes", 30, "dark"),
    "dog": ("crescent", "checks", 0, "dark"),
    "horse": ("star", "speckles", 285, "light"),
    "motorbike": ("ring", "dots", 245, "light"),
    "person": ("bar", "rings", 325, "light"),
    "pottedplant": ("flower", "stripes", 145, "light"),
    "sheep": ("diamond", "speckles", 180, "light"),
    "sofa": ("square", "rings", 95, "light"),
    "train": ("cross", "checks", 55, "light"),
    "tvmonitor": ("triangle", "rings", 210, "dark"),
}


class _Object(NamedTuple):
    name: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2: 1-based and inclusive, as the devkit counts
    truncated: bool
    difficult: bool


def make_demo(root: str | Path, num_train: int = 600, num_test: int = 300, size: int = 160, seed: int = 0) -> Path:
    """Generate the demo devkit `root/VOC2007` and return its path; a finished one is returned as it is.

    Args:
        root: folder for the devkit, created when missing.
        num_train: images of `trainval`, dealt in turn to `train` and `val`.
        num_test: images of `test`.
        size: longer side of every image in pixels; the shorter one is 0.7 to 0.95 of it.
        seed: same arguments, same pictures and annotations.

    Raises:
        ValueError: fewer than two training images, no test image, or a size below 48 pixels.
        FileExistsError: `root/VOC2007` is there and was not generated with these arguments. It is left alone.
        OSError: the folder cannot be written. Nothing half-written stays behind.
    """
    if num_train < 2 or num_test < 1 or size < 48:
        raise ValueError(
            "the demo set needs num_train >= 2, num_test >= 1 and size >= 48, "
            f"got num_train={num_train}, num_test={num_test}, size={size}"
        )
    settings = {"format": FORMAT, "num_train": num_train, "num_test": num_test, "size": size, "seed": seed}
    devkit = Path(root) / "VOC2007"
    return _generate(devkit, settings, lambda folder: _write_devkit(folder, num_train, num_test, size, seed))


def make_demo_folders(root: str | Path, num_train: int = 40, num_val: int = 10, size: int = 80, seed: int = 0) -> Path:
    """Generate a set with a folder per class, `root/train/<class>/` and `root/val/<class>/`, and return `root`.

    Args:
        num_train, num_val: images of each of the 20 classes, which show one object.
        size, seed: as in `make_demo`; errors, too.
    """
    if num_train < 1 or num_val < 1 or size < 48:
        raise ValueError(
            f"the demo set needs num_train >= 1, num_val >= 1 and size >= 48, got {num_train}, {num_val} and {size}"
        )
    settings = {"format": FORMAT, "num_train": num_train, "num_val": num_val, "size": size, "seed": seed}

    def write(folder: Path) -> None:
        for part, (split, count) in enumerate((("train", num_train), ("val", num_val))):
            for number, name in enumerate(CLASSES):
                (folder / split / name).mkdir(parents=True)
                for image in range(count):
                    pixels, _ = draw_image(np.random.default_rng((seed, part, number, image)), [name], size)
                    Image.fromarray(pixels).save(folder / split / name / f"{image:04d}.jpg", quality=90)

    return _generate(Path(root), settings, write)


def _generate(target: Path, settings: Mapping, write: Callable[[Path], None]) -> Path:
    """`write` the folder `target`, whole or not at all, unless it is there with the same settings."""
    if target.exists():
        return _check_settings(target, settings)
    unfinished = target.with_name(f".demo-{target.name}")
    lock = FileLock(f"{unfinished}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            try:
                if target.exists():  # another process was faster
                    return _check_settings(target, settings)
                if unfinished.exists():  # of a process that was killed
                    shutil.rmtree(unfinished)
                write(unfinished)
                (unfinished / "demo.json").write_text(json.dumps(settings))
                os.rename(unfinished, target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it sees that and takes a new one
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"cannot write the demo set to {target}: {error}") from error
    return target


def _check_settings(target: Path, settings: Mapping) -> Path:
    record = target / "demo.json"
    if not record.exists() or record.read_text() != json.dumps(settings):
        raise FileExistsError(
            f"{target} is there but is not the demo set {json.dumps(settings)}: remove it, or choose another data.root"
        )
    return target


# ---- the devkit's files


def _write_devkit(devkit: Path, num_train: int, num_test: int, size: int, seed: int) -> None:
    images, annotations, lists = devkit / "JPEGImages", devkit / "Annotations", devkit / "ImageSets" / "Main"
    for folder in (images, annotations, lists):
        folder.mkdir(parents=True)
    ids = [f"{number:06d}" for number in range(1, num_train + num_test + 1)]
    contents = {}
    for number, (image_id, names) in enumerate(zip(ids, _deal_classes(len(ids), seed), strict=True)):
        pixels, objects = draw_image(np.random.default_rng((seed, number)), names, size)
        Image.fromarray(pixels).save(images / f"{image_id}.jpg", quality=90)
        _write_annotation(annotations / f"{image_id}.xml", image_id, pixels.shape, objects)
        contents[image_id] = objects

    trainval = ids[:num_train]
    splits = {"train": trainval[0::2], "val": trainval[1::2], "trainval": trainval, "test": ids[num_train:]}
    for split, members in splits.items():
        (lists / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in members))
        for name in CLASSES:
            rows = (f"{image_id} {_label(contents[image_id], name):2d}\n" for image_id in members)
            (lists / f"{name}_{split}.txt").write_text("".join(rows))


def _deal_classes(count: int, seed: int) -> Iterator[list[str]]:
    """Class names of the one to four objects of each image, dealt from shuffled decks of the 20."""
    rng = np.random.default_rng(seed)
    deck: list[str] = []
    for _ in range(count):
        num_objects = rng.choice(4, p=(0.25, 0.35, 0.25, 0.15)) + 1
        if len(deck) < num_objects:
            deck += rng.permutation(CLASSES).tolist()
        yield [deck.pop(0) for _ in range(num_objects)]


def _label(objects: list[_Object], name: str) -> int:
    """1 present, -1 absent, 0 present only as difficult objects."""
    flags = [obj.difficult for obj in objects if obj.name == name]
    return -1 if not flags else 0 if all(flags) else 1


def _write_annotation(path: Path, image_id: str, shape: tuple[int, ...], objects: list[_Object]) -> None:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **fields: object) -> None:
        for tag, text in fields.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    add(root, folder="VOC2007", filename=f"{image_id}.jpg")
    add(ElementTree.SubElement(root, "source"), database="generated demo set")
    add(ElementTree.SubElement(root, "size"), width=shape[1], height=shape[0], depth=shape[2])
    add(root, segmented=0)
    for obj in objects:
        node = ElementTree.SubElement(root, "object")
        flags = {"truncated": int(obj.truncated), "difficult": int(obj.difficult)}
        add(node, name=obj.name, pose="Unspecified", **flags)
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), obj.box, strict=True))
        add(ElementTree.SubElement(node, "bndbox"), **box)
    ElementTree.indent(root, "\t")
    ElementTree.ElementTree(root).write(path)


# ---- the pictures


def draw_image(rng: np.random.Generator, names: list[str], size: int) -> tuple[np.ndarray, list[_Object]]:
    """Draw one object per class name, the last one in front.

    Returns:
        uint8 RGB (height, width, 3), and the objects from front to back. As in VOC, an object that cannot be
        made out (here: at most 15 % of it in view) is not annotated.
    """
    short = round(size * rng.uniform(0.7, 0.95))
    height, width = (size, short) if rng.random() < 0.3 else (short, size)
    margin = short // 2  # a border for the parts of the shapes that lie outside the image
    inside = np.s_[margin:-margin, margin:-margin]
    canvas = np.pad(_background(rng, height, width), ((margin, margin), (margin, margin), (0, 0)))

    for _ in range(rng.integers(2, 6)):  # grey clutter: a shape or a texture alone gives no class away
        shape, texture, _, tone = LOOKS[rng.choice(CLASSES)]
        colours = _colours(rng.uniform(0, 360), rng.uniform(0, 0.15), rng.uniform(0.3, 0.9), tone)
        _paint(canvas, margin, rng, shape, texture, colours, short * rng.uniform(0.06, 0.2))

    masks, small = [], []
    for name in names:
        shape, texture, hue, tone = LOOKS[name]
        colours = _colours(hue + rng.normal(0, 4), rng.uniform(0.75, 1), rng.uniform(0.75, 1), tone)
        small.append(rng.random() < 0.1)
        radius = short * (rng.uniform(0.05, 0.08) if small[-1] else rng.uniform(0.18, 0.4))
        masks.append(_paint(canvas, margin, rng, shape, texture, colours, radius))
    image = canvas[inside] + rng.normal(0, 5, (height, width, 1))  # film grain

    objects = []
    hidden = np.zeros((height, width), bool)  # behind the objects in front
    for name, mask, is_small in reversed(list(zip(names, masks, small, strict=True))):
        y, x = np.nonzero(mask[inside] & ~hidden)
        visible = len(y) / mask.sum()
        if visible > 0.15:
            box = (int(x.min()) + 1, int(y.min()) + 1, int(x.max()) + 1, int(y.max()) + 1)
            truncated = mask[inside].sum() < 0.95 * mask.sum()
            objects.append(_Object(name, box, bool(truncated), bool(is_small or visible < 0.4)))
        hidden |= mask[inside]
    return image.clip(0, 255).astype(np.uint8), objects


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Clouds between two muted colours, float32 (height, width, 3) in 0..255."""
    clouds = 0.7 * _noise(rng, height, width, 3) + 0.3 * _noise(rng, height, width, 16)
    first, second = (_colour(rng.uniform(0, 360), rng.uniform(0.05, 0.3), rng.uniform(0.25, 0.9)) for _ in "ab")
    return first + (second - first) * clouds[..., None]


def _noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise in 0..1, float32 (height, width), with `cells` random values along each side."""
    values = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(values.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """float32 RGB in 0..255 of a hue in degrees and a saturation and value in 0..1."""
    ramp = np.abs((hue / 60 + np.array([0, 4, 2], np.float32)) % 6 - 3) - 1
    return np.float32(255 * value) * (1 - np.float32(saturation) * (1 - ramp.clip(0, 1)))


def _colours(hue: float, saturation: float, value: float, tone: str) -> tuple[np.ndarray, np.ndarray]:
    """The two colours of a texture: the one given, and a dark shade or a light tint of it."""
    colour = _colour(hue, saturation, value)
    return colour, 0.3 * colour if tone == "dark" else 255 - 0.15 * (255 - colour)


def _paint(
    canvas: np.ndarray,
    margin: int,
    rng: np.random.Generator,
    shape: str,
    texture: str,
    colours: tuple[np.ndarray, np.ndarray],
    radius: float,
) -> np.ndarray:
    """Paint a turned and slightly squeezed shape with its centre inside the margin; return its mask, bool."""
    height, width = canvas.shape[:2]
    inset = margin + 0.5 * radius
    centre_y, centre_x = rng.uniform(inset, height - inset), rng.uniform(inset, width - inset)
    turn, squeeze = rng.uniform(-0.5, 0.5), rng.uniform(0.8, 1)
    reach = int(1.25 * radius) + 2  # the farthest corner of any shape, the square's, lies 1.2 radii out
    top, left = int(centre_y) - reach, int(centre_x) - reach
    window = np.s_[top : top + 2 * reach, left : left + 2 * reach]

    y = ((np.arange(2 * reach, dtype=np.float32) + np.float32(top - centre_y)) / np.float32(radius))[:, None]
    x = (np.arange(2 * reach, dtype=np.float32) + np.float32(left - centre_x)) / np.float32(radius)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = (cos * x + sin * y) / np.float32(squeeze), cos * y - sin * x  # the shape's own coordinates
    cover = (_inside(shape, u, v) * np.float32(radius) + 0.5).clip(0, 1)  # edges blend over one pixel
    paint = colours[1] + (colours[0] - colours[1]) * _pattern(rng, texture, u, v)[..., None]
    paint *= 1 - 0.15 * (u + v).clip(-1, 1)[..., None]  # lit from one side
    canvas[window] += cover[..., None] * (paint.clip(0, 255) - canvas[window])

    mask = np.zeros((height, width), bool)
    mask[window] = cover > 0.5
    return mask


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:  # noqa: C901 (a case for each shape)
    """About how far (u, v) lies inside the outline of a shape of radius 1; negative outside."""
    r = np.hypot(u, v)
    match shape:
        case "ring":
            return 0.25 - np.abs(r - 0.75)
        case "crescent":
            return np.minimum(1 - r, np.hypot(u - 0.5, v) - 0.75)
        case "square":
            return 0.85 - np.maximum(np.abs(u), np.abs(v))
        case "bar":
            return np.minimum(0.4 - np.abs(u), 1 - np.abs(v))
        case "diamond":
            return (1 - 1.4 * np.abs(u) - np.abs(v)) / 1.7
        case "cross":
            return np.minimum(1 - np.maximum(np.abs(u), np.abs(v)), 0.32 - np.minimum(np.abs(u), np.abs(v)))
        case "hexagon":
            return 0.87 - np.maximum(np.abs(v), 0.866 * np.abs(u) + 0.5 * np.abs(v))
        case "triangle":
            return np.minimum(0.6 - v, (v + 1) / 2.1 - 0.85 * np.abs(u))
        case "flower":
            return 0.76 + 0.22 * np.cos(5 * np.arctan2(u, v)) - r
        case "star":
            spike = np.abs((np.arctan2(u, -v) * np.float32(2.5 / np.pi)) % 1 - 0.5)  # 0.5 on a spike's axis
            return 0.4 + 1.2 * spike - r
    raise ValueError(f"unknown shape {shape!r}")


def _pattern(rng: np.random.Generator, texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Share of the first colour, 0..1, over the shape's own coordinates."""
    match texture:
        case "stripes":
            wave = np.sin(12 * v)
        case "checks":
            wave = 1.5 * np.sin(9 * u) * np.sin(9 * v)
        case "dots":
            wave = 0.8 - np.cos(10 * u) - np.cos(10 * v)
        case "rings":
            wave = np.sin(14 * np.hypot(u, v))
        case "speckles":
            wave = 6 * _noise(rng, *u.shape, 14) - 3
        case _:
            raise ValueError(f"unknown texture {texture!r}")
    return (0.5 + 1.5 * wave).clip(0, 1)
