"""Small images in memory: MNIST and CIFAR as torchvision reads them, or a folder per class; and batches of them.

training, test = read_small(cfg.data, seed=0, bad=Path("bad_images.txt"))
normalize = Normalization.of(training.pixels, "contrast")
batches = SmallBatches(training, normalize, batch_size=128, seed=0, pad=4, mirror=True, device=device)
inputs, labels = batches(step)
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

from experiments.data.draws import at_random, seeded
from experiments.data.folders import Folders, Images, is_bad, read_folders

# `data.name` -> the data set of torchvision, and the folder below data.root that it keeps it in.
TORCHVISION = {
    "mnist": (MNIST, "MNIST"),
    "cifar10": (CIFAR10, "cifar-10-batches-py"),
    "cifar100": (CIFAR100, "cifar-100-python"),
}
AT_ONCE = 1_000  # images that are normalised together


@dataclass(frozen=True, eq=False)
class SmallImages:
    """Labelled images of one size.

    - `classes`: names.
    - `pixels`: uint8 (N, channels, size, size), RGB or grey.
    - `labels`: int64 (N,), indices into `classes`.
    - `bad`: how many more could not be decoded.
    """

    classes: list[str]
    pixels: Tensor
    labels: Tensor
    bad: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Self:
        """The images `index`, in that order."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def to(self, device: torch.device) -> Self:
        """The same images on `device`."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))


def read_small(data: Mapping, seed: int, bad: Path) -> tuple[SmallImages, SmallImages]:
    """The images to train and to test on, as `configs/data` states them.

    Folders are read where `data.root` has the folder `data.train` or a data set is none of torchvision's, which are
    downloaded where they are not there.

    Args:
        data: with `images`, so many of the training images, drawn by `seed`; with `held_out`, so many others of them
            to test on instead of the test images.
        bad: file to which the names of images are appended that cannot be decoded.

    Raises:
        ValueError: images of another size, fewer images than asked for, or a damaged data set.
        OSError: no images, or no download.
    """
    own = Path(data["root"], data["train"]).is_dir() or data["name"] not in TORCHVISION
    training, test = _of_folders(data, bad) if own else _of_torchvision(data)
    if training.pixels.shape[-2:] != (data["size"], data["size"]):
        raise ValueError(f"data.size={data['size']}, but {data['name']} has {training.pixels.shape[-1]} pixels: set it")
    order = torch.randperm(len(training), generator=seeded(seed, len(training)))
    held_out = data["held_out"] or 0
    rest = order[: len(order) - held_out]
    if held_out:
        if held_out >= len(order):
            raise ValueError(f"data.held_out={held_out}, but there are {len(order)} training images: lower it")
        test = training[order[len(rest) :]]
    if data["images"] is not None:
        rest = at_random(data["images"], rest, seeded(seed, 1), "data.images")
    return (training[rest.sort().values] if len(rest) < len(training) else training), test


def _of_torchvision(data: Mapping) -> tuple[SmallImages, SmallImages]:
    dataset, folder = TORCHVISION[data["name"]]
    root = Path(data["root"])
    if not (root / folder).exists():
        _download(dataset, root, folder)
    try:
        parts = [dataset(root, train=train) for train in (True, False)]
    except (RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{root / folder} is damaged ({error}): delete it, and it is downloaded anew") from error
    found = []
    for part in parts:
        pixels = torch.as_tensor(part.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        found.append(SmallImages(list(part.classes), pixels, torch.as_tensor(part.targets)))
    return found[0], found[1]


def _download(dataset: type, root: Path, folder: str) -> None:
    """torchvision's download, which appears in one piece; of several processes one downloads while the others wait."""
    root.mkdir(parents=True, exist_ok=True)
    unfinished = root / f".download-{folder}"
    with FileLock(f"{unfinished}.lock"):
        if (root / folder).exists():
            return
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            dataset(unfinished, download=True)
            os.rename(unfinished / folder, root / folder)
        except (RuntimeError, OSError) as error:
            raise ConnectionError(
                f"cannot download {dataset.__name__} to {root} ({error}): run this again later, or set data.root to a "
                f"folder that has {folder}, or the folders train and test with a folder per class"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _of_folders(data: Mapping, bad: Path) -> tuple[SmallImages, SmallImages]:
    training, test = read_folders({**data, "val": data["test"]})
    return _squares(training, data, bad), _squares(test, data, bad)


def _squares(found: Folders, data: Mapping, bad: Path) -> SmallImages:
    """Images at a short side of `data.size`, and of each the square in the middle."""
    images, size = Images(found.paths, data["size"], data["cache"], bad), data["size"]
    ((_, decoded),) = images.load(lambda _: torch.arange(len(images)), [0], 0, torch.device("cpu"))
    good = [number for number, image in enumerate(decoded) if not is_bad(image)]
    pixels = torch.empty(len(good), 3, size, size, dtype=torch.uint8)
    for square, number in zip(pixels, good, strict=True):
        height, width, _ = decoded[number].shape
        top, left = (height - size) // 2, (width - size) // 2
        square.copy_(decoded[number][top : top + size, left : left + size].permute(2, 0, 1))
    return SmallImages(found.classes, pixels, found.labels[good], len(images) - len(good))


@dataclass(frozen=True, eq=False)
class Normalization:
    """What becomes of the values of images before a network sees them.

    - `factor`: values 0..255 are multiplied by it; None: contrast normalisation, each image minus its own mean, divided
      by its own standard deviation, and minus `mean`.
    - `mean`: of the training images, (channels, size, size); 0 with a factor.
    """

    factor: float | None
    mean: Tensor

    @classmethod
    def of(cls, pixels: Tensor, kind: str | float) -> Self:
        """Of training images, uint8 (N, channels, size, size); `kind` is "contrast" or a factor."""
        zero = torch.zeros(pixels.shape[1:], device=pixels.device)
        if kind != "contrast":
            return cls(kind, zero)
        plain = cls(None, zero)
        return cls(None, sum(plain(part).sum(0) for part in pixels.split(AT_ONCE)) / len(pixels))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 of the shape of `pixels`."""
        values = pixels.float()
        if self.factor is not None:
            return values * self.factor
        deviation, mean = torch.std_mean(values, (1, 2, 3), correction=0, keepdim=True)
        return (values - mean) / deviation.clamp(min=1) - self.mean  # an image of one colour becomes 0


class SmallBatches:
    """Endless batches: `batches(step)` depends on the arguments here and on `step` alone.

    Each epoch has an order, shifts and sides of its own; images that do not fill a last batch sit out that epoch.

    Args:
        images: on the device that trains.
        batch_size: images a batch.
        seed: of the draws.
        pad: pixels of 0 around a normalised image, out of which a crop of its size is cut at random.
        mirror: turn half of the images left to right.

    Raises:
        ValueError: fewer images than one batch.
    """

    def __init__(
        self, images: SmallImages, normalize: Normalization, *, batch_size: int, seed: int, pad: int, mirror: bool
    ):
        if len(images) < batch_size:
            raise ValueError(f"{len(images)} images do not fill a batch of {batch_size}: lower train.batch_size")
        self.images, self.normalize = images, normalize
        self.batch_size, self.seed, self.pad, self.mirror = batch_size, seed, pad, mirror
        self.epoch = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (batch_size, channels, size, size) and labels (batch_size,) of iteration `step`, from 0."""
        epoch, number = divmod(step, len(self.images) // self.batch_size)
        if epoch != self.epoch:
            generator = seeded(self.seed, epoch)
            self.order = torch.randperm(len(self.images), generator=generator)
            self.shifts = torch.randint(2 * self.pad + 1, (2, len(self.order)), generator=generator)
            self.turned = (torch.rand(len(self.order), generator=generator) < 0.5) & self.mirror
            self.epoch = epoch
        part = slice(number * self.batch_size, (number + 1) * self.batch_size)
        device = self.images.pixels.device
        index = self.order[part].to(device)
        inputs = self.normalize(self.images.pixels[index])
        if self.pad or self.mirror:
            inputs = shifted(inputs, self.pad, *self.shifts[:, part].to(device), self.turned[part].to(device))
        return inputs, self.images.labels[index]


def shifted(inputs: Tensor, pad: int, down: Tensor, right: Tensor, turned: Tensor) -> Tensor:
    """Crops of the size of `inputs` (B, channels, size, size), which are padded by `pad` on all sides.

    Args:
        down, right: where each crop begins, from 0 to 2 * pad; int64 (B,).
        turned: which are mirrored left to right; bool (B,).
    """
    size = torch.arange(inputs.shape[-1], device=inputs.device)
    rows, columns = down[:, None] + size, right[:, None] + torch.where(turned[:, None], size.flip(0), size)
    images = torch.arange(len(inputs), device=inputs.device)[:, None, None]
    return F.pad(inputs, [pad] * 4).permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
