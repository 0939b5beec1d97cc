"""Object proposals: boxes that may hold an object, found without a network (selective search)."""

import io
import multiprocessing
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from detection.boxes import iou
from detection.mat import RATIO, read_cells
from initializers._images import open_image

CORNERS = ("x1", "y1", "x2", "y2")
SMALL = 1 << 26  # bytes that a file of any size may unpack to
PART = 200  # images that are searched between two writes: at most as much work is lost by a kill


@dataclass(frozen=True, eq=False)
class Proposals:
    """The proposals of N images, one after the other.

    - `boxes`: int32 (total, 4), x1 y1 x2 y2 in pixels from 0, both corners inside the box.
    - `offsets`: int64 (N + 1,), where each image's boxes begin, and the end.
    """

    boxes: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, image: int) -> Tensor:
        """The boxes of one image, int32 (n, 4)."""
        return self.boxes[self.offsets[image] : self.offsets[image + 1]]


def read_proposals(path: str | Path, ids: Sequence[str], heights: Tensor, widths: Tensor) -> Proposals:
    """The proposals of the images `ids`, in that order, from a file.

    Args:
        path: an `.npz` with `ids` (M,), `offsets` (M + 1,), and `x1`, `y1`, `x2`, `y2`, as `compute_proposals` writes
            it; or one of Girshick's `.mat` files, with `images` and `boxes` (y1 x1 y2 x2, from 1). Images that are in
            the file and not in `ids` are ignored. An image may have no proposals.
        heights, widths: int (N,), of the images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of proposals, has none for an image, or a box that is empty or outside of its image.
            No more memory is taken than 100 times the size of the file, or 64 MiB, has room for.
    """
    path = Path(path)
    try:
        found = _read_mat(path) if path.suffix == ".mat" else _read_npz(path)
        _check_table(*found)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # damage shows as any kind of error of zip and numpy
        raise ValueError(f"{path} holds no proposals ({type(error).__name__}: {error})") from error
    known = {image_id: row for row, image_id in enumerate(found[0])}
    missing = [image_id for image_id in ids if image_id not in known]
    if missing:
        raise ValueError(
            f"{path} has no proposals for image {missing[0]} ({len(missing)} of {len(ids)} images are not in it): "
            "pass a file that was made for these images"
        )
    starts, boxes = found[1:]
    rows = [known[image_id] for image_id in ids]
    parts = [boxes[starts[row] : starts[row + 1]] for row in rows]
    proposals = Proposals(
        torch.from_numpy(np.concatenate(parts)), torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    )
    _check(path, ids, proposals, heights, widths)
    return proposals


def _read_npz(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, offsets (M + 1,) and boxes int32 (total, 4)."""
    with zipfile.ZipFile(path) as archive:
        members = [archive.getinfo(f"{name}.npy") for name in ("ids", "offsets", *CORNERS)]
        size = sum(member.file_size for member in members)
        if size > max(SMALL, RATIO * path.stat().st_size):
            raise ValueError(f"it grows to {size} bytes, which are more than {RATIO} times its size")
        ids, offsets, *corners = (_column(member.filename, archive.read(member)) for member in members)
    boxes = np.stack([_whole(corner, np.int32) for corner in corners], 1)
    return ids.tolist(), _whole(offsets, np.int64), boxes


def _column(name: str, content: bytes) -> np.ndarray:
    """The values (any,) of a `.npy`: text for the ids, or else numbers. NumPy makes room for all that it claims."""
    file = io.BytesIO(content)
    new = np.lib.format.read_magic(file) > (1, 0)
    read = np.lib.format.read_array_header_2_0 if new else np.lib.format.read_array_header_1_0
    shape, _, dtype = read(file)
    if len(shape) != 1 or shape[0] < 0 or not dtype.itemsize or dtype.kind not in ("U" if "ids" in name else "iuf"):
        raise ValueError(f"{name} holds {dtype} {shape}, no column of {'text' if 'ids' in name else 'numbers'}")
    return np.frombuffer(content, dtype, shape[0], file.tell())


def _read_mat(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """As `_read_npz`."""
    file = read_cells(path, ("images", "boxes"))
    ids, parts = file["images"], file["boxes"]
    if not all(isinstance(image_id, str) for image_id in ids) or any(isinstance(part, str) for part in parts):
        raise ValueError("images are not all text, or boxes not all numbers")
    if len(parts) != len(ids):
        raise ValueError(f"{len(ids)} images, but boxes of {len(parts)}")
    if odd := [part.shape for part in parts if part.size and part.shape[1:] != (4,)]:
        raise ValueError(f"boxes of the shape {odd[0]}, not (any, 4)")
    parts = [part.reshape(-1, 4) for part in parts]
    boxes = np.concatenate([np.empty((0, 4)), *parts])[:, [1, 0, 3, 2]] - 1
    return ids, np.cumsum([0, *map(len, parts)]), _whole(boxes, np.int32)


def _check_table(ids: list[str], offsets: np.ndarray, boxes: np.ndarray) -> None:
    if len(offsets) != len(ids) + 1 or offsets[0] != 0 or offsets[-1] != len(boxes) or (np.diff(offsets) < 0).any():
        raise ValueError("its offsets do not fit its boxes")
    if len({*ids}) < len(ids):
        raise ValueError(f"it has image {Counter(ids).most_common(1)[0][0]} more than once")


def _whole(values: np.ndarray, kind: type) -> np.ndarray:
    """`values` as integers of a `kind` that has them all."""
    limits = np.iinfo(kind)
    # Not by casting and comparing: what a cast makes of values that do not fit differs between machines.
    if values.size and not (limits.min <= values.min() and values.max() <= limits.max):
        raise ValueError(f"it has numbers that are not between {limits.min} and {limits.max}")
    if (found := values.astype(kind)).size and (found != values).any():
        raise ValueError("it has numbers that are not whole")
    return found


def _check(path: Path, ids: Sequence[str], proposals: Proposals, heights: Tensor, widths: Tensor) -> None:
    counts = proposals.offsets.diff()
    x1, y1, x2, y2 = proposals.boxes.unbind(1)
    height, width = (sizes.cpu().repeat_interleave(counts) for sizes in (heights, widths))
    outside = (x1 < 0) | (y1 < 0) | (x2 >= width) | (y2 >= height)
    for wrong, what in ((outside, "outside of the image"), ((x2 < x1) | (y2 < y1), "of no area")):
        if wrong.any():
            box = int(wrong.nonzero()[0])
            image = int(torch.searchsorted(proposals.offsets, box, right=True)) - 1
            raise ValueError(
                f"{path}: image {ids[image]}, which has {int(widths[image])} x {int(heights[image])} pixels, has the "
                f"proposal {proposals.boxes[box].tolist()}, {what}: pass a file that was made for these images"
            )


def compute_proposals(paths: Sequence[Path], file: str | Path) -> None:
    """Selective search (OpenCV, fast mode) on all cores; `file` (.npz) is written when it is complete.

    What was found before a kill is kept beside the file, and the search goes on from there. Of several processes one
    searches and the others wait.

    Args:
        paths: the images; a name without its extension is the id of the image.

    Raises:
        ImportError: OpenCV with its contributed modules is not installed.
        ValueError: an image cannot be read.
    """
    try:
        from cv2 import ximgproc  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "selective search needs OpenCV with its contributed modules: pip install opencv-contrib-python-headless, "
            "or pass a file of proposals"
        ) from error
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(paths), PART)
    parts = [file.with_name(f"{file.stem}.{start:06d}.npy") for start in starts]
    with FileLock(f"{file}.lock"):
        if file.exists():  # another process was faster
            return
        pace = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30}  # in a log file
        with (
            tqdm(total=len(paths), desc="selective search", unit=" images", **pace) as bar,
            # Spawned, not forked: OpenCV's threads do not survive a fork.
            multiprocessing.get_context("spawn").Pool() as pool,
        ):
            for start, part in zip(starts, parts, strict=True):
                images = paths[start : start + PART]
                if part.exists():
                    bar.update(len(images))
                    continue
                found = []
                for boxes in pool.imap(search, images):
                    found.append(boxes)
                    bar.update()
                rows = [np.insert(boxes, 0, start + row, axis=1) for row, boxes in enumerate(found)]
                _write(part, lambda out, rows=rows: np.save(out, np.concatenate(rows)))
        table = np.concatenate([np.load(part) for part in parts])
        offsets = np.searchsorted(table[:, 0], np.arange(len(paths) + 1))
        corners = dict(zip(CORNERS, table[:, 1:].T.astype(np.uint16), strict=True))
        ids = np.array([path.stem for path in paths])
        _write(file, lambda out: np.savez_compressed(out, ids=ids, offsets=offsets, **corners))
        for part in parts:
            part.unlink()


def search(path: Path) -> np.ndarray:
    """Proposals of one image, int32 (n, 4), sorted: OpenCV gives them in an order that is random."""
    import cv2

    cv2.setNumThreads(1)  # the processes are as many as the cores
    image = np.ascontiguousarray(np.asarray(open_image(path))[..., ::-1])  # BGR
    finder = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    finder.setBaseImage(image)
    finder.switchToSelectiveSearchFast()
    x, y, width, height = np.asarray(finder.process(), np.int32).reshape(-1, 4).T
    return np.unique(np.stack([x, y, x + width - 1, y + height - 1], 1), axis=0)


def _write(path: Path, write) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as out:
        write(out)
    temporary.replace(path)


def recall(proposals: Proposals, objects: Sequence[Tensor], threshold: float) -> float:
    """Share of the objects that a proposal covers with at least `threshold` IoU.

    Args:
        objects: the boxes of the objects of each image, (n, 4) as of `Proposals`; those that count.
    """
    found, total = 0, 0
    for image, boxes in enumerate(objects):
        total += len(boxes)
        if len(boxes) and len(proposals[image]):
            found += int((iou(boxes.double(), proposals[image]).amax(1) >= threshold).sum())
    return found / total if total else float("nan")
