"""Average precision of detections as the VOC 2007 devkit counts it, and as COCO does."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.boxes import BOTH_CORNERS, iou

LEAST_IOU = 0.5
COCO_LIMIT = 100  # detections of an image that COCO looks at


@dataclass(frozen=True, eq=False)
class Detections:
    """All detections in N images.

    - `images`: int64 (total,), from 0. `classes`: int64 (total,), from 0.
    - `boxes`: float32 (total, 4), x1 y1 x2 y2 in pixels from 0, both corners inside the box. `scores`: (total,).
    """

    images: Tensor
    classes: Tensor
    boxes: Tensor
    scores: Tensor

    @classmethod
    def of(cls, found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> "Detections":
        """From the boxes, scores and classes of each image, as `detect` gives them."""
        images = torch.arange(len(found)).repeat_interleave(torch.tensor([len(scores) for _, scores, _ in found]))
        boxes, scores, classes = map(torch.cat, zip(*found, strict=True))
        return cls(images, classes, boxes, scores)


@dataclass(frozen=True, eq=False)
class Truth:
    """The objects in one image: boxes (n, 4) as of `Detections`, classes int64 (n,) from 0, difficult bool (n,)."""

    boxes: Tensor
    classes: Tensor
    difficult: Tensor


def voc_ap(detections: Detections, truth: Sequence[Truth], classes: int = 20) -> dict:
    """Average precision by the rules of the VOC 2007 devkit.

    A detection is on the object of its class and image that it overlaps most, if by at least 0.5 IoU. The detection
    with the highest score on an object is right, others on it are wrong; those on a difficult object do not count.
    Detections of one score keep their order.

    Returns:
        `voc11` and `area`, float64 arrays (classes,): the mean of the highest precisions at recalls from 0, 0.1, ..., 1
        on, and the area under the curve of highest precisions (VOC 2010 and later); nan for a class without objects
        that count. `map_voc11` and `map_area`: their means over the other classes.

    Raises:
        ValueError: no object counts.
    """
    totals = positives(truth, classes).sum(0)
    if not totals.any():
        raise ValueError("no image has an object that counts: there is no average precision")
    voc11, area = np.full((2, classes), np.nan)
    for number, (_, right) in enumerate(rankings(detections, truth, classes)):
        if not totals[number]:
            continue
        hits, tried = right.cumsum(0).double().numpy(), np.arange(1, 1 + len(right))
        recall, precision = hits / totals[number], hits / tried
        voc11[number], area[number] = eleven_points(recall, precision), area_under(recall, precision)
    means = {f"map_{name}": float(np.nanmean(values)) for name, values in (("voc11", voc11), ("area", area))}
    return {"voc11": voc11, "area": area, **means}


def positives(truth: Sequence[Truth], classes: int = 20) -> np.ndarray:
    """How many objects that count each image has of each class: int64 (images, classes)."""
    counts = [np.bincount(found.classes[~found.difficult], minlength=classes) for found in truth]
    return np.stack(counts)


def rankings(detections: Detections, truth: Sequence[Truth], classes: int = 20) -> list[tuple[Tensor, Tensor]]:
    """For each class its detections that count, best first: their images, int64 (n,), and which are right, bool (n,).

    With `positives` this is all that the average precision depends on, that of a part of the images too.
    """
    on = assign(detections, truth)
    difficult = torch.cat([image.difficult for image in truth])
    found = []
    for number in range(classes):
        own = (detections.classes == number).nonzero().flatten()
        own = own[torch.argsort(detections.scores[own], descending=True, stable=True)]
        objects = on[own]
        right = torch.zeros(len(own), dtype=torch.bool)
        right[np.unique(objects.numpy(), return_index=True)[1]] = True  # the first on each object
        counts = (objects < 0) | ~difficult[objects]
        found.append((detections.images[own][counts], (right & (objects >= 0))[counts]))
    return found


def assign(detections: Detections, truth: Sequence[Truth]) -> Tensor:
    """The object that each detection is on, int64 (total,), counted over all images; -1 for none."""
    order = torch.argsort(detections.images, stable=True)
    bounds = torch.searchsorted(detections.images[order], torch.arange(len(truth) + 1)).tolist()
    on, first = torch.full((len(order),), -1), 0
    for image, found in enumerate(truth):
        rows = order[bounds[image] : bounds[image + 1]]
        if len(rows) and len(found.boxes):
            overlaps = iou(detections.boxes[rows].double(), found.boxes)
            overlaps[detections.classes[rows].unsqueeze(1) != found.classes] = -1
            overlap, best = overlaps.max(1)
            hit = overlap >= LEAST_IOU
            on[rows[hit]] = first + best[hit]
        first += len(found.boxes)
    return on


def eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of the highest precision at recalls of at least 0, 0.1, ..., 1; 0 where none is reached."""
    # k / 10, not k * 0.1: a recall of exactly 3/10 must count as 0.3.
    return float(np.mean([precision[recall >= k / 10].max(initial=0) for k in range(11)]))


def area_under(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the curve of the highest precision at each recall or a higher one."""
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * highest))


def coco_ap(detections: Detections, truth: Sequence[Truth], classes: int = 20) -> dict[str, float]:
    """Average precision as COCO counts it, by pycocotools: `coco_ap` over IoUs .5 to .95, `coco_ap50`.

    The 100 detections of an image with the highest scores count. Difficult objects are its crowds, which are ignored.
    """
    if not len(detections.scores):  # which pycocotools cannot read
        return {"coco_ap": 0.0, "coco_ap50": 0.0}
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = []
    for image, found in enumerate(truth):
        for box, number, difficult in zip(_sized(found.boxes), found.classes.tolist(), found.difficult, strict=True):
            row = {"id": len(objects) + 1, "image_id": image, "category_id": number, "bbox": box.tolist()}
            objects.append(row | {"area": float(box[2] * box[3]), "iscrowd": int(difficult)})
    rank = torch.argsort(detections.scores, descending=True, stable=True)
    rank = rank[torch.argsort(detections.images[rank], stable=True)]
    images = detections.images[rank]
    starts = torch.searchsorted(images, torch.arange(len(truth)))
    rank = rank[torch.arange(len(rank)) - starts[images] < COCO_LIMIT]
    columns = (detections.images, _sized(detections.boxes), detections.scores, detections.classes)
    table = torch.cat([column[rank].double().view(len(rank), -1) for column in columns], 1).numpy()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(truth))],
            "categories": [{"id": number} for number in range(classes)],
            "annotations": objects,
            "info": {},
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(table), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"coco_ap": float(evaluation.stats[0]), "coco_ap50": float(evaluation.stats[1])}


def _sized(boxes: Tensor) -> Tensor:
    """x, y, width, height as COCO has them."""
    corners = boxes.double() + torch.tensor(BOTH_CORNERS, dtype=torch.float64)
    return torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)


def write_detections(
    folder: Path, split: str, ids: Sequence[str], names: Sequence[str], detections: Detections
) -> list[Path]:
    """The devkit's text files, one of each class: image, score, x1 y1 x2 y2 from 1.

    Args:
        split: of the images, such as "test". ids: of the images. names: of the classes.
    """
    paths = []
    for number, name in enumerate(names):
        rows = (detections.classes == number).nonzero().flatten()
        boxes = (detections.boxes[rows] + 1).tolist()
        lines = [
            f"{ids[image]} {score:.6f} {x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f}\n"
            for image, score, (x1, y1, x2, y2) in zip(
                detections.images[rows].tolist(), detections.scores[rows].tolist(), boxes, strict=True
            )
        ]
        paths.append(folder / f"comp4_det_{split}_{name}.txt")
        paths[-1].write_text("".join(lines))
    return paths
