"""Images decoded once into one array of pixels, and the crops that networks are trained and tested on."""

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from filelock import FileLock
from PIL.Image import Resampling
from torch import Tensor
from tqdm import tqdm

from experiments.progress import pace
from initializers._images import open_image

CACHE_FORMAT = 2  # to raise when the file or the decoding changes: a file of an older format is not taken for a new one


@dataclass(frozen=True, eq=False)
class ImageCache:
    """N decoded images of any sizes, one after the other.

    - `pixels`: uint8 (total pixels, 3), RGB, row after row of image after image.
    - `offsets`: int64 (N,), the index in `pixels` of each image's first pixel.
    - `heights`, `widths`: int64 (N,), in pixels.
    - `file`, `sums`: where the images lie, and the CRC-32 of each; None for those in memory.
    """

    pixels: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor
    file: Path | None = None
    sums: list[int] | None = None

    @classmethod
    def open(cls, paths: Sequence[Path], folder: str | Path, short: int | None = None) -> Self:
        """Map the decoded images `paths` into memory, from a file in `folder` that the first call makes.

        With `short` each is scaled to a short side of so many pixels, and one that cannot be decoded becomes a single
        black pixel. The images of a file that was there are compared with their checksums: all of them here, but with
        `short`, where there may be a million, only when `verify` is called.

        The file belongs to the names, sizes and modification times of `paths` in their order; changed images
        are decoded anew. It appears when it is complete, and of several processes that need it at the same
        time one decodes and the others wait. Grey and CMYK images become RGB. A pixel takes 3 bytes, all of
        VOC 2007 about 6 GB.

        Raises ValueError for empty `paths`, for a damaged file and, without `short`, for an image that cannot be
        decoded, naming it, and OSError if the file cannot be written. Neither leaves a partial file.
        """
        if not paths:
            raise ValueError("there are no images to cache: `paths` is empty")
        key = hashlib.sha256(repr([_identity(path, missing=short is not None) for path in paths]).encode())
        key.update(f"format {CACHE_FORMAT}".encode())
        key.update(f"short side {short}".encode() if short else b"")
        file = Path(folder) / f"{key.hexdigest()[:16]}.pixels"
        try:
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{file}.lock"):
                    if not file.exists():  # no other process made it while this one waited
                        _decode_into(file, paths, _decode if short is None else partial(read_scaled, short=short))
        except OSError as error:
            raise OSError(
                f"cannot write the image cache {file} ({error}): make room, 3 bytes a pixel, "
                "or set data.cache to another folder"
            ) from error
        cache = cls._map(file, len(paths))
        if short is None:
            with ThreadPoolExecutor() as pool:
                list(pool.map(cache.verify, range(len(cache))))  # of a list, so that errors are raised here
        return cache

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> Self:
        """The cache of images that are in memory: uint8 (height, width, 3), RGB."""
        heights, widths = torch.tensor([image.shape[:2] for image in images]).unbind(1)
        areas = heights * widths
        return cls(torch.cat([image.reshape(-1, 3) for image in images]), areas.cumsum(0) - areas, heights, widths)

    @classmethod
    def _map(cls, file: Path, count: int) -> Self:
        """Map a file that `_decode_into` wrote for `count` images."""
        table, size = 12 * count, file.stat().st_size
        header = table + 4
        if size > header:
            data = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
            if zlib.crc32(data[:table].numpy()) == int.from_bytes(data[table:header].numpy().tobytes(), "little"):
                heights, widths, sums = (
                    torch.from_numpy(data[:table].numpy().view("<u4").astype(np.int64)).view(-1, 3).T
                )
                areas = heights * widths
                if size == header + 3 * areas.sum():
                    pixels, offsets = data[header:].view(-1, 3), areas.cumsum(0) - areas
                    return cls(pixels, offsets, heights, widths, file, sums.tolist())
        raise ValueError(_damaged(file))

    def verify(self, index: int) -> None:
        """Raises ValueError: the pixels of an image are not those that were written to its file."""
        if self.sums is not None and zlib.crc32(self.image(index).numpy()) != self.sums[index]:
            raise ValueError(_damaged(self.file))

    def to(self, device: torch.device | str) -> Self:
        """The cache with all of its tensors on `device` (on the CPU: the same mapped memory)."""
        tensors = (self.pixels, self.offsets, self.heights, self.widths)
        return type(self)(*(tensor.to(device) for tensor in tensors))

    def image(self, index: int) -> Tensor:
        """One image, uint8 (height, width, 3), RGB; the same memory."""
        start, height, width = (part[index].item() for part in (self.offsets, self.heights, self.widths))
        return self.pixels[start : start + height * width].view(height, width, 3)

    def __len__(self) -> int:
        return len(self.offsets)


def describe(name: str, training: ImageCache, test: ImageCache) -> str:
    """The images of a run; the short side tells the official release from a copy that is scaled down."""
    side = int(torch.minimum(test.heights, test.widths).median())
    return f"{name}, {len(training)} + {len(test)} images, short side {side} px"


def _damaged(file: Path | None) -> str:
    return f"the image cache {file} is damaged: delete it, and it is made anew"


def _identity(path: Path, missing: bool) -> tuple:
    """What tells an image from another, or from itself before a change; it may be `missing`."""
    try:
        status = path.stat()
    except OSError:
        if missing:
            return (path.name,)
        raise
    return path.name, status.st_size, status.st_mtime_ns


def _decode_into(file: Path, paths: Sequence[Path], decode: Callable[[Path], np.ndarray]) -> None:
    """Decode `paths` on all cores into `file`.

    It holds height, width and CRC-32 of each, uint32 (N, 3), the CRC-32 of this table, and the pixels.
    """
    part, rows = file.with_suffix(".part"), []
    try:
        with (
            part.open("wb") as out,
            ThreadPoolExecutor() as pool,
            tqdm(paths, "decoding images", unit=" images", **pace()) as bar,
        ):
            out.seek(12 * len(paths) + 4)
            # In blocks, so that little is ever decoded and not yet written.
            for start in range(0, len(paths), 64):
                for image in pool.map(decode, paths[start : start + 64]):
                    out.write(image)
                    rows.append((*image.shape[:2], zlib.crc32(image)))
                    bar.update()
            out.seek(0)
            table = np.array(rows, "<u4").tobytes()
            out.write(table + zlib.crc32(table).to_bytes(4, "little"))
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _decode(path: Path) -> np.ndarray:
    """One image, uint8 (height, width, 3), RGB."""
    try:
        return np.asarray(open_image(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}: replace it by an intact file") from error


def read_scaled(path: str | Path, short: int) -> np.ndarray:
    """One image at a short side of `short` pixels, uint8 (height, width, 3), RGB; a black pixel if it is bad.

    Bad is what `open_image` refuses.
    """
    try:
        image = open_image(path)
    except (OSError, ValueError):
        return np.zeros((1, 1, 3), np.uint8)
    scale = short / min(image.size)
    size = [max(short, round(scale * side)) for side in image.size]
    return np.array(image.resize(size, Resampling.BILINEAR))


@dataclass(frozen=True, eq=False)
class Crops:
    """B windows of images, each to be resized to a square.

    - `y`, `x`, `height`, `width`: float64 (B,), top left corner and size in source pixels, with fractions.
    - `flip`: bool (B,), whether the window is mirrored left to right.
    """

    y: Tensor
    x: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same windows on `device`."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


def random_crops(
    heights: Tensor,
    widths: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    mirror: bool = True,
    min_scale: float = 0.5,
    max_scale: float = 2.0,
) -> Crops:
    """Draw one random crop of `size` x `size` pixels for each of B images, as philkr/voc-classification does.

    The window is a square of s * `size` source pixels, s ~ U(min(`min_scale`, smax), smax) with
    smax = min(`max_scale`, height / `size`, width / `size`), at a uniform position inside the image, and
    mirrored with probability 1/2. An image with a side below `min_scale` * `size` yields its largest squares.

    `heights` and `widths` (B,), `generator` and the crops are on the CPU: a seed draws the same crops for
    every device.
    """
    draws = torch.rand(4, len(heights), dtype=torch.float64, generator=generator)
    side = torch.minimum(heights, widths).double()
    largest = (side / size).clamp(max=max_scale)
    smallest = largest.clamp(max=min_scale)
    scale = smallest + (largest - smallest) * draws[0]
    window = torch.minimum(size * scale, side)  # no further than the image by rounding either
    flip = (draws[3] < 0.5) & mirror
    return Crops((heights - window) * draws[1], (widths - window) * draws[2], window, window, flip)


def whole(heights: Tensor, widths: Tensor) -> Crops:
    """For each of B images the crop that is all of it: squashed to a square by `crop`."""
    origin = torch.zeros_like(heights, dtype=torch.float64)
    return Crops(origin, origin, heights.double(), widths.double(), flip=origin.bool())


def crop(cache: ImageCache, index: Tensor, crops: Crops, size: int, mean: Sequence[float]) -> Tensor:
    """Cut the windows `crops` out of the images `index` (int64 (B,)), resized to `size` x `size` pixels.

    Returns float32 (B, 3, size, size) on the cache's device: 0..255, BGR, minus `mean` (3 values, BGR), which
    is how BVLC/caffe feeds images to a network. The interpolation is bilinear, without antialiasing, with
    pixel centres at half-integers (`align_corners=False` in torch). Samples at the edge of a window may take
    in the pixel beyond it; beyond the image, its last pixel repeats.

    With `index` and `crops` on the cache's device nothing waits for it: a CUDA graph can capture the call.
    """
    device = cache.pixels.device
    index, crops = index.to(device), crops.to(device)
    top, bottom, down = _samples(crops.y, crops.height, cache.heights[index], size)
    left, right, across = _samples(crops.x, crops.width, cache.widths[index], size)
    left, right, across = (torch.where(crops.flip[:, None], a.flip(1), a) for a in (left, right, across))

    # Gathers single bytes into planes, at the same positions for every channel: faster than to gather whole
    # pixels and to separate their channels afterwards.
    rows = [(cache.offsets[index, None] + y * cache.widths[index, None])[:, :, None] for y in (top, bottom)]
    corners = [3 * row + 3 * x[:, None, :] for row in rows for x in (left, right)]
    across, down = across[:, None, :], down[:, :, None]
    planes = []
    for channel, value in zip((2, 1, 0), mean, strict=True):
        values = cache.pixels.view(-1)[channel:]
        a, b, c, d = (values.index_select(0, at.flatten()).view(at.shape).float() for at in corners)
        planes.append(torch.lerp(torch.lerp(a, b, across), torch.lerp(c, d, across), down) - value)
    return torch.stack(planes, dim=1)


def squash(cache: ImageCache, index: Tensor, size: int, mean: Sequence[float]) -> Tensor:
    """The whole images `index` (int64 (B,), on the CPU), each squashed to a square; see `crop`."""
    return crop(cache, index, whole(cache.heights.cpu()[index], cache.widths.cpu()[index]), size, mean)


def _samples(start: Tensor, length: Tensor, limit: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where `size` samples of each window lie along one axis, of `limit` pixels; all (B, size).

    Returns the two neighbouring pixels (int64) and the weight of the second (float32).
    """
    centres = torch.arange(size, dtype=torch.float64, device=start.device) + 0.5
    position = start[:, None] + centres * (length[:, None] / size) - 0.5
    first = position.floor()
    last_pixel = limit[:, None] - 1
    neighbours = (pixel.long().clamp(min=0).minimum(last_pixel) for pixel in (first, first + 1))
    return *neighbours, (position - first).float()
