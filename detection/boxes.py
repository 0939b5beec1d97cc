"""Boxes as Fast R-CNN and the VOC devkit count them: x1 y1 x2 y2 in pixels from 0, both corners inside the box.

A box is thus x2 - x1 + 1 pixels wide. torchvision counts x2 - x1: with 1 added to both of the lower right corner's
coordinates its functions compute the same.
"""

import torch
import torchvision
from torch import Tensor

BOTH_CORNERS = (0.0, 0.0, 1.0, 1.0)
MAX_LOG_SCALE = 10.0  # of a predicted width or height: keeps exp finite where a network has not learned yet


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of each of `one` (N, 4) with each of `other` (M, 4): (N, M)."""
    corner = one.new_tensor(BOTH_CORNERS)
    return torchvision.ops.box_iou(one + corner, other.to(one) + corner)


def nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression among the boxes of each class.

    Args:
        boxes: (N, 4). scores: (N,). classes: int64 (N,).
        threshold: IoU above which the box of the lower score goes.

    Returns:
        Indices of the boxes that stay, the highest score first.
    """
    # Double: torchvision moves the classes apart, which leaves float32 too few digits.
    corners = boxes.double() + boxes.new_tensor(BOTH_CORNERS)
    return torchvision.ops.batched_nms(corners, scores.double(), classes, threshold)


def encode(rois: Tensor, targets: Tensor) -> Tensor:
    """What moves `rois` (N, 4) onto `targets` (N, 4): dx, dy in sizes of the RoI, and log dw, log dh; (N, 4).

    Sizes are x2 - x1 + 1 as in overlaps. Girshick's first code has x2 - x1 here, of which a box of one pixel has none.
    """
    x, y, width, height = _centres(rois)
    to_x, to_y, to_width, to_height = _centres(targets)
    return torch.stack(
        [(to_x - x) / width, (to_y - y) / height, (to_width / width).log(), (to_height / height).log()], -1
    )


def decode(rois: Tensor, deltas: Tensor) -> Tensor:
    """The boxes that `deltas` (..., 4), as of `encode`, make of `rois` (..., 4)."""
    x, y, width, height = _centres(rois)
    dx, dy, dw, dh = deltas.unbind(-1)
    x, y = x + dx * width, y + dy * height
    half_width, half_height = (
        side * log.clamp(max=MAX_LOG_SCALE).exp() / 2 for side, log in ((width, dw), (height, dh))
    )
    return torch.stack([x - half_width, y - half_height, x + half_width - 1, y + half_height - 1], -1)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """The boxes (..., 4) with their corners inside the image."""
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width - 1, height - 1] * 2))


def mirror(boxes: Tensor, width: Tensor | float) -> Tensor:
    """The boxes (..., 4) in images of that width which are mirrored left to right."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - 1 - x2, y1, width - 1 - x1, y2], -1)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x and y, width and height."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1 + 1, y2 - y1 + 1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height
