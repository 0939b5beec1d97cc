"""Object proposals: boxes that may hold an object, found without a network (selective search)."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from detection.boxes import iou

CORNERS = ("x1", "y1", "x2", "y2")
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
    """
    path = Path(path)
    try:
        found = _read_mat(path) if path.suffix == ".mat" else _read_npz(path)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # damage shows as any kind of error of zip, numpy and scipy
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
    with np.load(path, allow_pickle=False) as file:
        ids, offsets = [str(image_id) for image_id in file["ids"]], file["offsets"]
        boxes = np.stack([file[corner].astype(np.int32) for corner in CORNERS], 1)
    if len(offsets) != len(ids) + 1 or offsets[0] != 0 or offsets[-1] != len(boxes) or (np.diff(offsets) < 0).any():
        raise ValueError("its offsets do not fit its boxes")
    return ids, offsets, boxes


def _read_mat(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    from scipy.io import loadmat

    file = loadmat(path)
    ids = [str(image_id.item()) for image_id in file["images"].ravel()]
    parts = [part.reshape(-1, 4) for part in file["boxes"].ravel()]
    if len(parts) != len(ids):
        raise ValueError(f"{len(ids)} images, but boxes of {len(parts)}")
    boxes = np.concatenate(parts).astype(np.int32)[:, [1, 0, 3, 2]] - 1
    return ids, np.cumsum([0, *map(len, parts)]), boxes


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
        with (
            tqdm(total=len(paths), desc="selective search", unit=" images") as bar,
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
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f"cannot decode the image {path}: replace it by an intact file")
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
