"""Whole images at the scales of Fast R-CNN with their RoIs: batches for training, and what is initialized on."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.boxes import mirror
from detection.sampling import RoIs, sample_rois
from experiments.data.draws import at_random, seeded
from experiments.data.images import ImageCache, squash


def scale_of(height: int, width: int, short: int, longest: int) -> float:
    """The factor that makes an image's short side `short` pixels long, or its long side `longest` if that is less."""
    scale = short / min(height, width)
    return longest / max(height, width) if round(scale * max(height, width)) > longest else scale


def scaled(cache: ImageCache, image: int, scale: float, mean: Sequence[float]) -> Tensor:
    """An image resized by a factor: float32 (3, height, width), 0..255, BGR, minus `mean`; see `images.crop`."""
    height, width, offset = (int(part[image]) for part in (cache.heights, cache.widths, cache.offsets))
    pixels = cache.pixels[offset : offset + height * width].view(height, width, 3).permute(2, 0, 1).flip(0).float()
    size = (round(height * scale), round(width * scale))
    resized = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
    return resized - torch.tensor(mean, device=resized.device).view(3, 1, 1)


class RoIBatches:
    """Endless batches of images with RoIs: `batches(step)` depends on the arguments here and on `step` alone.

    An epoch shows every image once as it is and once mirrored, each at a scale drawn for it. Images without RoIs to
    learn from are left out.

    Args:
        cache: the images, on the device that trains; `rois`, on the CPU, are theirs.
        images: a batch. `per_batch`: RoIs a batch, the same number from each image. `foreground`: part of them on
            objects, at most.
        scales: short sides in pixels to draw from. `longest`: the long side at most.
        statistics: mean and standard deviation that targets are normalised by, of `RoIs.target_statistics`.
        seed: of all draws.
        mean: of colours, as in `scaled`.

    Raises:
        ValueError: too few images have RoIs to learn from.
    """

    def __init__(
        self,
        cache: ImageCache,
        rois: RoIs,
        *,
        images: int,
        per_batch: int,
        foreground: float,
        scales: Sequence[int],
        longest: int,
        statistics: tuple[Tensor, Tensor],
        seed: int,
        mean: Sequence[float],
    ):
        self.device = cache.pixels.device
        # What says where an image lies is looked up on the CPU, so that a GPU need not wait.
        self.cache = ImageCache(cache.pixels, cache.offsets.cpu(), cache.heights.cpu(), cache.widths.cpu())
        self.rois, self.usable = rois, rois.usable()
        if 2 * len(self.usable) < images:
            raise ValueError(
                f"{len(self.usable)} of {len(cache)} images have proposals that overlap with an object by 0.1 or more: "
                "there is nothing to train a detector on"
            )
        self.images, self.each, self.foreground = images, per_batch // images, foreground
        self.scales, self.longest, self.statistics = list(scales), longest, statistics
        self.seed, self.mean = seed, mean
        self.epoch = -1

    def __call__(self, step: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Inputs of `FastRCNN` and targets of `fast_rcnn_loss` of iteration `step`, from 0."""
        epoch, batch = divmod(step, 2 * len(self.usable) // self.images)
        if epoch != self.epoch:
            self.order = torch.randperm(2 * len(self.usable), generator=seeded(self.seed, epoch, 0))
            self.epoch = epoch
        generator = seeded(self.seed, step, 1)
        drawn = self.order[batch * self.images : (batch + 1) * self.images].tolist()
        parts = [self._image(number, generator) for number in drawn]
        pictures, boxes, labels, targets = zip(*parts, strict=True)
        height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
        images = pictures[0].new_zeros(len(pictures), 3, height, width)
        for image, picture in zip(images, pictures, strict=True):
            image[:, : picture.shape[1], : picture.shape[2]] = picture
        boxes, labels, targets = (torch.stack(part).to(self.device) for part in (boxes, labels, targets))
        return (images, boxes), (labels, targets)

    def _image(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, mirrored = int(self.usable[number // 2]), bool(number % 2)
        height, width = int(self.cache.heights[image]), int(self.cache.widths[image])
        short = self.scales[int(torch.randint(len(self.scales), (), generator=generator))]
        scale = scale_of(height, width, short, self.longest)
        picture = scaled(self.cache, image, scale, self.mean)
        rows, labels = sample_rois(self.rois, image, self.each, self.foreground, generator)
        boxes, targets = self.rois.boxes[rows], self.rois.targets[rows]
        if mirrored:
            picture, boxes = picture.flip(2), mirror(boxes, width)
            targets = targets * torch.tensor([-1.0, 1, 1, 1])
        average, deviation = (part[labels.clamp(min=0)] for part in self.statistics)
        return picture, boxes * scale, labels, (targets - average) / deviation


def images_with_rois(
    cache: ImageCache,
    rois: RoIs,
    *,
    images: int,
    each: int,
    size: int,
    foreground: float,
    mean: Sequence[float],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Images at random that have RoIs, squashed to a square, with RoIs as for training: what is initialized on.

    Returns:
        Images (images, 3, size, size) on the cache's device, and RoIs (images, each, 4) in their pixels.

    Raises:
        ValueError: fewer images have RoIs.
    """
    usable, generator = rois.usable(), seeded(seed)
    index = at_random(images, usable, generator, "init.images")
    rows = torch.stack([sample_rois(rois, image, each, foreground, generator)[0] for image in index.tolist()])
    sides = torch.stack([cache.widths.cpu()[index], cache.heights.cpu()[index]], 1).repeat(1, 2).unsqueeze(1)
    return squash(cache, index, size, mean), (rois.boxes[rows] * size / sides).to(cache.pixels.device)
