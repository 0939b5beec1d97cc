"""RoIs for training: which object each proposal is on, what it should become, and the draw of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detection.boxes import encode, iou
from detection.proposals import Proposals

FOREGROUND = 0.5  # least IoU with an object of a RoI that is on it; also of those that learn to regress
BACKGROUND = (0.1, 0.5)  # IoU of the RoIs on none, from and below; rarer cases teach more than empty sky
BACKGROUND_LABEL = 0
IGNORED = -1  # the label of what fills up a batch


@dataclass(frozen=True, eq=False)
class RoIs:
    """The RoIs of N images, one after the other: their objects first, then their proposals.

    - `boxes`: float32 (total, 4), x1 y1 x2 y2 in pixels from 0, both corners inside the box.
    - `labels`: int64 (total,), the class of the object that the RoI covers best, from 1; 0 for background.
    - `overlaps`: float32 (total,), the IoU with that object.
    - `targets`: float32 (total, 4), what moves the RoI onto it (see `encode`); 0 below an IoU of 0.5.
    - `offsets`: int64 (N + 1,), where each image's RoIs begin, and the end.
    """

    boxes: Tensor
    labels: Tensor
    overlaps: Tensor
    targets: Tensor
    offsets: Tensor

    def usable(self) -> Tensor:
        """Indices of the images that have RoIs to learn from: an image without objects has none."""
        useful = (self.overlaps >= BACKGROUND[0]).double().cumsum(0)
        counts = torch.cat([useful.new_zeros(1), useful])[self.offsets].diff()
        return counts.nonzero().flatten()

    def target_statistics(self, classes: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the targets of each class, float32 (1 + classes, 4), mirrored images included.

        0 and 1 for the background and for classes of which there are no RoIs.
        """
        rows = (self.overlaps >= FOREGROUND).nonzero().flatten()
        labels, targets = self.labels[rows], self.targets[rows].double()
        counts = torch.bincount(labels, minlength=1 + classes).view(-1, 1).clamp(min=1)
        sums, squares = (
            torch.zeros(1 + classes, 4, dtype=torch.float64).index_add_(0, labels, values) / counts
            for values in (targets, targets.square())
        )
        sums[:, 0] = 0  # dx of an image and of its mirror image cancel each other
        std = (squares - sums.square()).clamp(min=0).sqrt()
        return sums.float(), torch.where(std > 0, std, 1.0).float()


def make_rois(proposals: Proposals, objects: Sequence[tuple[Tensor, Tensor]]) -> RoIs:
    """The RoIs of images.

    Args:
        objects: of each image boxes (n, 4) in pixels from 0, and classes int64 (n,), from 0. Difficult ones included.
    """
    parts = []
    for image, (boxes, classes) in enumerate(objects):
        rois = torch.cat([boxes.float(), proposals[image].float()])
        if not len(boxes):
            parts.append((rois, torch.zeros(len(rois)).long(), torch.zeros(len(rois)), torch.zeros_like(rois)))
            continue
        overlaps, best = iou(rois, boxes).max(1)
        on = overlaps >= FOREGROUND
        targets = torch.where(on.unsqueeze(1), encode(rois, boxes[best].float()), 0.0)
        parts.append((rois, torch.where(on, classes[best] + 1, BACKGROUND_LABEL), overlaps, targets))
    sizes = torch.tensor([0, *(len(rois) for rois, *_ in parts)])
    return RoIs(*map(torch.cat, zip(*parts, strict=True)), sizes.cumsum(0))


def sample_rois(
    rois: RoIs, image: int, count: int, foreground: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw RoIs of one image without replacement, up to a share `foreground` of them on objects (Fast R-CNN, 2.3).

    Returns:
        Indices int64 (count,) into the tensors of `rois`, and labels int64 (count,). Where the image has too few RoIs
        the first is repeated with the label `IGNORED`.
    """
    first = int(rois.offsets[image])
    overlaps = rois.overlaps[first : int(rois.offsets[image + 1])]
    drawn: list[Tensor] = []
    limits = (round(count * foreground), count)
    for chosen, limit in zip(
        (overlaps >= FOREGROUND, (overlaps >= BACKGROUND[0]) & (overlaps < BACKGROUND[1])), limits, strict=True
    ):
        candidates = chosen.nonzero().flatten()
        order = torch.randperm(len(candidates), generator=generator)[: limit - sum(map(len, drawn))]
        drawn.append(candidates[order])
    index = torch.cat(drawn)
    missing = count - len(index)
    labels = torch.cat([rois.labels[first + index], torch.full((missing,), IGNORED)])
    return first + torch.cat([index, index[:1].expand(missing)]), labels
