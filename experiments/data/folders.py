"""Images in a folder per class (ImageNet, Tiny ImageNet, Caltech): their lists, and batches of crops of them.

training, validation = read_folders({"root": "data/ILSVRC2012", "train": "train", "val": "val"})
images = Images(training.paths, 256, cache=None, bad=Path("bad_images.txt"))
batches = FolderBatches(images, training.labels, batch_size=256, seed=0, size=227, ...)
inputs, labels = batches(step)
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from tqdm import tqdm

from experiments.data.draws import seeded
from experiments.data.images import ImageCache, read_scaled, squash
from experiments.files import append_line
from initializers._images import in_one_line

HELD_OUT = 5  # of images that come without a division into training and validation, every fifth of a class validates
BAD = -1  # label of an image that cannot be decoded
REMEDY = "set workers=0, or give a container more by docker run --ipc=host or --shm-size=8g"
ANNOTATIONS = "val_annotations.txt"  # how Tiny ImageNet tells the classes of its validation images


@dataclass(frozen=True, eq=False)
class Folders:
    """The images of one part of a data set.

    - `classes`: names, sorted.
    - `paths`: N image files, class after class.
    - `labels`: int64 (N,), indices into `classes`.
    """

    classes: list[str]
    paths: list[str]
    labels: Tensor


def read_folders(data: Mapping) -> tuple[Folders, Folders]:
    """The training and the validation images below `data.root`: `data.train` and `data.val`, with a folder per class.

    Validation images of Tiny ImageNet as it is published are sorted into classes by their list. Where there is neither
    of the two folders, those in `data.root` are the classes, and every fifth image of a class is kept for validation.

    Raises:
        FileNotFoundError: no such folder, no class, or a class without an image.
        ValueError: training and validation have other classes, or a list does not fit its images.
    """
    root = Path(data["root"])
    remedy = "set data.root to a folder that holds train and val, or one folder per class"
    if not root.is_dir():
        raise FileNotFoundError(f"no images in {root}, which is no folder: {remedy}")
    train, val = root / data["train"], root / data["val"]
    if not train.exists() and not val.exists():
        return _divided(_read(root, remedy))
    for folder in (train, val):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: {remedy}")
    training = _read(train, remedy)
    validation = _annotated(val, training.classes) if (val / ANNOTATIONS).exists() else _read(val, remedy)
    if validation.classes != training.classes:
        differ = sorted({*training.classes} ^ {*validation.classes})
        raise ValueError(
            f"{train} has {len(training.classes)} classes and {val} {len(validation.classes)}, of which {len(differ)} "
            f"are in one only, such as {', '.join(differ[:3])}: both need a folder of the same name for every class"
        )
    return training, validation


def _read(folder: Path, remedy: str) -> Folders:
    try:
        classes, index = find_classes(folder)
    except FileNotFoundError as error:
        lying = sum(name.lower().endswith(IMG_EXTENSIONS) for name in os.listdir(folder))
        found = f"{lying} images lie in it, sorted into no classes" if lying else "it has no folders"
        raise FileNotFoundError(f"{folder} has no classes, {found}: {remedy}") from error
    try:
        paths, labels = zip(*make_dataset(folder, index, IMG_EXTENSIONS), strict=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error} Add images to these classes, or remove their folders") from error
    return Folders(classes, list(paths), torch.tensor(labels))


def _annotated(folder: Path, classes: Sequence[str]) -> Folders:
    """The validation images of Tiny ImageNet: a line has the name of a file, its class and a box."""
    rows = [line.split("\t")[:2] for line in (folder / ANNOTATIONS).read_text().splitlines()]
    index = {name: number for number, name in enumerate(classes)}
    wrong = next((row for row in rows if len(row) < 2), None)
    missing = next((row[0] for row in rows if not (folder / "images" / row[0]).is_file()), None)
    if not rows or wrong or missing:
        what = f"the line {wrong}" if wrong else f"images/{missing}, which is missing" if missing else "no images"
        raise ValueError(f"{folder / ANNOTATIONS} lists {what}: unpack the data set again")
    rows = sorted((name, file) for file, name in rows if name in index)
    found = [name for name in classes if name in {name for name, _ in rows}]
    paths = [str(folder / "images" / file) for _, file in rows]
    return Folders(found, paths, torch.tensor([index[name] for name, _ in rows]))


def _divided(every: Folders) -> tuple[Folders, Folders]:
    """Training and validation, of the same classes."""
    first = torch.searchsorted(every.labels, every.labels)  # of the image's class
    held_out = (torch.arange(len(every.labels)) - first) % HELD_OUT == HELD_OUT - 1
    parts = (~held_out, held_out)
    lacking = [every.classes[label] for label in set(every.labels.tolist()) - set(every.labels[held_out].tolist())]
    if lacking:
        raise ValueError(
            f"class {min(lacking)} has less than {HELD_OUT} images, too few to keep one for validation: add some, or "
            "divide the images into the folders data.train and data.val"
        )
    return tuple(
        Folders(every.classes, [every.paths[i] for i in part.nonzero()[:, 0]], every.labels[part]) for part in parts
    )


class Images:
    """The images of a list as arrays: decoded when they are asked for, or once, into a file of pixels.

    Args:
        paths: image files.
        short: pixels of the short side, to which each image is scaled.
        cache: folder for the decoded images, as `ImageCache.open` keeps them; None decodes them every time.
        bad: file to which the names of images are appended that cannot be decoded, as they are met; one a line, those
            with line breaks or bytes that are no text quoted and escaped.
    """

    def __init__(self, paths: Sequence[str], short: int, cache: str | Path | None, bad: Path):
        self.paths, self.short, self.bad = paths, short, bad
        self.cache = None if cache is None else ImageCache.open([*map(Path, paths)], cache, short)
        self.named: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, index: int) -> Tensor:
        """uint8 (height, width, 3), RGB; a single black pixel for an image that cannot be decoded."""
        if self.cache is not None:
            self.cache.verify(index)
            return self.cache.image(index)
        return torch.from_numpy(read_scaled(self.paths[index], self.short))

    def load(
        self, index: Callable[[int], Tensor], numbers: Iterable[int], workers: int, device: torch.device
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Batches of images, one for each of `numbers`, in their order; decoded by so many processes.

        Args:
            index: number -> the images of a batch, int64 (B,).

        Yields:
            `index(number)`, and the images as of `pixels`, on `device`.

        Raises:
            ValueError: none of the images can be decoded, or their cache is damaged.
            OSError: a process that decodes has died, or there is no room to pass on what it has decoded.
        """
        on_gpu = device.type == "cuda"
        batches = DataLoader(
            _Batches(self, index),
            batch_size=None,
            collate_fn=tuple,  # of what is one already
            sampler=numbers,
            num_workers=workers,
            pin_memory=on_gpu,
            generator=torch.Generator(),  # else it draws from the global one, as dropout does
        )
        for chosen, pixels, shapes in _explained(batches):
            areas = [height * width for height, width, _ in shapes]
            parts = pixels.to(device, non_blocking=on_gpu).split(areas)
            found = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            self._name([i for i, image in zip(chosen.tolist(), found, strict=True) if is_bad(image)])
            yield chosen, found

    def _name(self, bad: list[int]) -> None:
        for index in sorted({*bad} - self.named):
            self.named.add(index)
            name = in_one_line(self.paths[index])
            tqdm.write(f"cannot decode the image {name}: left out", file=sys.stderr)
            append_line(self.bad, name)
        if len(self.named) == len(self):
            raise none_left(self.paths)


def none_left(paths: Sequence[str]) -> ValueError:
    return ValueError(f"none of {len(paths)} images, such as {in_one_line(paths[0])}, can be decoded: mend data.root")


def _explained(batches: Iterable) -> Iterator:
    """The batches of a `DataLoader`; what ends one of its processes as one line."""
    try:
        yield from batches
    except (ValueError, OSError) as error:  # torch puts the traceback of the process before the message
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(str(error).splitlines()[-1].removeprefix(f"{type(error).__name__}: ")) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that decodes images has died, for lack of memory perhaps: {REMEDY}") from error


class _Batches(Dataset):
    """What a process of a `DataLoader` makes of the number of a batch: its images, one after the other."""

    def __init__(self, images: Images, index: Callable[[int], Tensor]):
        self.images, self.index = images, index

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[tuple[int, ...]]]:
        index = self.index(number)
        found = [self.images.pixels(i) for i in index.tolist()]
        pixels = torch.cat([image.reshape(-1, 3) for image in found])
        if get_worker_info() is not None:
            _share(index, pixels)
        return index, pixels, [tuple(image.shape) for image in found]


def _share(*tensors: Tensor) -> None:
    """Put tensors where the process that trains can see them.

    torch would do so later, in a thread whose error nobody hears of: the other process would wait for ever.
    """
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise OSError(f"no shared memory (/dev/shm) is left to pass decoded images on: {REMEDY}") from error


class FolderBatches:
    """Endless batches of random crops: `batches(number)` depends on the arguments here and on `number` alone.

    Each epoch has an order, and each image a crop and a side of its own in it, whatever the number of processes: of
    every batch the process `rank` has the images rank, rank + world, ... Images that do not fill a last step sit out
    that epoch.

    Args:
        images: the training images.
        labels: int64 (N,).
        batch_size: images a step, of all processes and of all parts.
        parts: batches into which a step is divided, as `accumulate` of the trainer.
        rank, world: number of this process, and of all of them.
        seed: of orders and crops.
        size: pixels of the side of a crop; no source pixel is scaled.
        mirror: turn half of the crops left to right.
        mean, scale: as in `cut`.
        workers: processes that decode; 0: none but this.
        device: of the crops.

    Raises:
        ValueError: fewer images than one step, a step that cannot be divided, or crops larger than the images.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        *,
        batch_size: int,
        parts: int,
        rank: int,
        world: int,
        seed: int,
        size: int,
        mirror: bool,
        mean: Sequence[float],
        scale: float,
        workers: int,
        device: torch.device,
    ):
        if len(images) < batch_size:
            raise ValueError(f"{len(images)} images do not fill a batch of {batch_size}: lower train.batch_size")
        if batch_size % (parts * world):
            raise ValueError(
                f"train.batch_size={batch_size} cannot be divided by {world} process(es) times train.accumulate={parts}"
            )
        check_size(size, images)
        self.images, self.labels = images, labels
        self.size, self.mirror, self.mean, self.scale = size, mirror, mean, scale
        self.workers, self.device = workers, device
        self.draws = _Draws(len(images), batch_size, parts, rank, world, seed)
        self.next, self.stream = -1, iter(())

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, 3, size, size) and labels (B,), `BAD` for images that could not be decoded; on the device.

        Args:
            number: step * parts + part, from 0.
        """
        if number != self.next:
            self.stream = self.images.load(self.draws.index, itertools.count(number), self.workers, self.device)
        index, found = next(self.stream)
        self.next = number + 1
        y, x, turn = self.draws.crops(number)
        inputs = cut(found, self.size, y, x, (turn < 0.5) & self.mirror, self.mean, self.scale)
        bad = torch.tensor([is_bad(image) for image in found])
        return inputs, self.labels[index].masked_fill(bad, BAD).to(self.device)


class _Draws:
    """What `FolderBatches` draws, with its arguments; the processes that decode draw the same."""

    def __init__(self, count: int, batch_size: int, parts: int, rank: int, world: int, seed: int):
        self.count, self.part, self.rank, self.world, self.seed = count, batch_size // parts, rank, world, seed
        self.batches = count // batch_size * parts  # of an epoch
        self.epoch = -1

    def index(self, number: int) -> Tensor:
        """The images of this process in batch `number`: int64 (B,)."""
        epoch, position = divmod(number, self.batches)
        if epoch != self.epoch:
            generator = seeded(self.seed, epoch)
            self.order = torch.randperm(self.count, generator=generator)
            self.numbers = torch.rand(3, self.count, dtype=torch.float64, generator=generator)
            self.epoch = epoch
        return self.order[position * self.part : (position + 1) * self.part][self.rank :: self.world]

    def crops(self, number: int) -> Tensor:
        """Of each of these images how far down, how far right, and the side: three numbers in [0, 1), (3, B)."""
        index = self.index(number)
        return self.numbers[:, index]


def workers_of(cfg: DictConfig) -> int:
    """Processes that decode images for this one."""
    if cfg.workers is not None:
        return cfg.workers
    if cfg.data.cache is not None:
        return 0  # nothing is left to decode
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_size(size: int, images: Images) -> None:
    """Raises ValueError for crops that are larger than the images."""
    if size > images.short:
        raise ValueError(f"crops of {size} pixels do not fit images of {images.short}: raise data.short")


def is_bad(image: Tensor) -> bool:
    """Whether an image is one that could not be decoded: a single pixel."""
    return image.numel() == 3


def cut(
    images: Sequence[Tensor], size: int, y: Tensor, x: Tensor, flip: Tensor, mean: Sequence[float], scale: float
) -> Tensor:
    """Squares of `size` pixels as they are, out of B images, as Caffe cuts them.

    Args:
        images: uint8 (height, width, 3), RGB, on one device.
        y, x: where each square lies, as a fraction of the way from the top and from the left; float64 (B,), on the CPU.
        flip: whether it is mirrored left to right; bool (B,).
        mean: three values, BGR.
        scale: multiplies what is left.

    Returns:
        float32 (B, 3, size, size) on that device: 0..255, BGR, minus `mean`, times `scale`; black for an image that is
        bad.
    """
    device = images[0].device
    squares = []
    for image, down, right in zip(images, y.tolist(), x.tolist(), strict=True):
        if is_bad(image):
            squares.append(image.expand(size, size, 3))
        else:
            top, left = int((image.shape[0] - size + 1) * down), int((image.shape[1] - size + 1) * right)
            squares.append(image[top : top + size, left : left + size])
    batch = torch.stack(squares)
    turned = flip.nonzero()[:, 0].to(device)
    batch[turned] = batch[turned].flip(2)
    planes = torch.empty(len(batch), 3, size, size, device=device)
    for plane, channel, value in zip(planes.unbind(1), (2, 1, 0), mean, strict=True):
        plane.copy_(batch[..., channel]).sub_(value).mul_(scale)
    return planes


def centres(
    images: Images,
    *,
    batch_size: int,
    rank: int,
    world: int,
    size: int,
    mean: Sequence[float],
    scale: float,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The middle of each image of this process, in batches: index (B,), inputs (B, 3, size, size), bad (B,).

    Arguments and errors are those of `FolderBatches`.
    """
    check_size(size, images)
    mine = torch.arange(rank, len(images), world).split(batch_size)
    for index, found in images.load(mine.__getitem__, range(len(mine)), workers, device):
        middle = torch.full((len(index),), 0.5 - 1e-9, dtype=torch.float64)  # 14 of 256 to 227 pixels, as in Caffe
        inputs = cut(found, size, middle, middle, torch.zeros(len(index), dtype=torch.bool), mean, scale)
        yield index, inputs, torch.tensor([is_bad(image) for image in found])


def whole_images(images: Images, index: Tensor, size: int, mean: Sequence[float], scale: float) -> Tensor:
    """The images `index`, each whole and squashed to a square, on the CPU; without those that cannot be decoded.

    `mean` and `scale` are those of `cut`.
    """
    ((_, found),) = images.load(lambda _: index, [0], 0, torch.device("cpu"))
    good = [image for image in found if not is_bad(image)]
    if not good:
        raise none_left([images.paths[i] for i in index.tolist()])
    return squash(ImageCache.of(good), torch.arange(len(good)), size, mean) * scale
