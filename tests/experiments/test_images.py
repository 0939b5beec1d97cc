import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from experiments.data import images
from experiments.data.images import Crops, ImageCache, crop, random_crops, whole
from experiments.data.voc import read_split

MEAN = (104.0, 117.0, 123.0)


def noise(height, width, seed=0):
    """A random image, uint8 (height, width, 3), RGB."""
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def cache_of(*arrays):
    """The cache of RGB images given as arrays, made in memory."""
    sizes = torch.tensor([array.shape[:2] for array in arrays])
    areas = sizes.prod(1)
    pixels = torch.cat([torch.from_numpy(array).reshape(-1, 3) for array in arrays])
    return ImageCache(pixels, areas.cumsum(0) - areas, sizes[:, 0], sizes[:, 1])


def windows(*rows):
    """Crops from rows of y, x, height, width, flip."""
    table = torch.tensor(rows, dtype=torch.float64)
    return Crops(*table[:, :4].unbind(1), table[:, 4].bool())


def planes(array):
    """An RGB image as a network sees it, in its own size: float64 (1, 3, height, width), BGR minus mean."""
    return torch.from_numpy(array[..., ::-1] - np.array(MEAN)).permute(2, 0, 1)[None]


def stored(cache, n):
    """Image `n` of a cache, as an array."""
    height, width = int(cache.heights[n]), int(cache.widths[n])
    start = int(cache.offsets[n])
    return cache.pixels[start : start + height * width].view(height, width, 3).numpy()


def save(folder, *arrays, kind="png"):
    """Write the images to files and return their paths."""
    paths = [folder / f"{n:03d}.{kind}" for n in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return paths


# The geometry of a crop.


def gradient(height, width):
    """Red 2x + 1, green 3y, blue x + y at pixel (y, x): linear, which bilinear interpolation leaves exact."""
    y, x = np.mgrid[:height, :width]
    return np.stack([2 * x + 1, 3 * y, x + y], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [(5.25, 9.5, 31.5, 31.5), (1, 0.75, 62, 62), (30, 20, 6.5, 17), (7, 4, 16, 16)])
def test_crop_of_a_gradient_has_the_analytic_values(window, flip):
    size = 16
    y, x, height, width = window
    ys = y + (np.arange(size) + 0.5) * height / size - 0.5
    xs = x + (np.arange(size) + 0.5) * width / size - 0.5
    ys, xs = np.meshgrid(ys, xs[::-1] if flip else xs, indexing="ij")
    expected = np.stack([xs + ys - 104, 3 * ys - 117, 2 * xs + 1 - 123])

    result = crop(cache_of(gradient(80, 90)), torch.tensor([0]), windows((*window, flip)), size, MEAN)

    assert result.shape == (1, 3, size, size)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result[0].double(), expected, atol=2e-4)


def test_beyond_the_image_its_last_pixel_repeats():
    result = crop(cache_of(gradient(4, 4)), torch.tensor([0]), windows((0, 0, 4, 4, 0)), 16, (0, 0, 0))
    positions = ((torch.arange(16) + 0.5) / 4 - 0.5).clamp(0, 3)
    assert torch.allclose(result[0, 2], (2 * positions + 1).expand(16, 16), atol=1e-5)
    assert torch.allclose(result[0, 1], (3 * positions)[:, None].expand(16, 16), atol=1e-5)


@pytest.mark.parametrize("size", [7, 32, 50])
def test_crop_equals_grid_sample(size):
    """Random windows of any shape, up to the border, mirrored or not, against torch's own sampler."""
    array = noise(60, 45)
    generator = torch.Generator().manual_seed(size)
    y, x, height, width, flip = torch.rand(5, 30, dtype=torch.float64, generator=generator)
    height, width = 1 + 59 * height, 1 + 44 * width
    crops = Crops(y * (60 - height), x * (45 - width), height, width, flip < 0.5)

    steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    across = torch.where(crops.flip[:, None], steps.flip(0), steps)
    xs = (crops.x[:, None] + across * width[:, None]) / 45 * 2 - 1
    ys = (crops.y[:, None] + steps * height[:, None]) / 60 * 2 - 1
    grid = torch.stack([xs[:, None, :].expand(-1, size, -1), ys[:, :, None].expand(-1, -1, size)], dim=-1)
    source = planes(array).expand(30, -1, -1, -1)
    expected = F.grid_sample(source, grid, padding_mode="border", align_corners=False)

    result = crop(cache_of(array), torch.zeros(30, dtype=torch.int64), crops, size, MEAN)
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 60, 45), (3, 8, 50, 33), (10, 10, 30, 24)])
def test_crop_equals_interpolate_of_the_window(top, left, height, width):
    """Where the window is not enlarged, its samples lie within it, and it might as well be cut out first."""
    array = noise(60, 45)
    cut = planes(array[top : top + height, left : left + width])
    expected = F.interpolate(cut, size=(24, 24), mode="bilinear", align_corners=False)
    result = crop(cache_of(array), torch.tensor([0]), windows((top, left, height, width, 0)), 24, MEAN)
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)


def test_window_of_the_crops_own_size_is_a_copy():
    array = noise(30, 40)
    result = crop(cache_of(array), torch.tensor([0]), windows((3, 11, 20, 20, 0)), 20, MEAN)
    assert torch.equal(result, planes(array[3:23, 11:31]).float())


@pytest.mark.parametrize("shape", [(30, 40), (100, 75), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("size", [20, 67])
def test_whole_image_is_squashed_as_by_interpolate(shape, size):
    array = noise(*shape)
    expected = F.interpolate(planes(array), size=(size, size), mode="bilinear", align_corners=False)
    cache = cache_of(array)
    result = crop(cache, torch.tensor([0]), whole(cache.heights, cache.widths), size, MEAN)
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)


def test_mirrored_crop_is_the_crop_mirrored():
    cache, index = cache_of(noise(50, 60)), torch.tensor([0])
    plain = crop(cache, index, windows((4.3, 7.7, 30.1, 30.1, 0)), 16, MEAN)
    mirrored = crop(cache, index, windows((4.3, 7.7, 30.1, 30.1, 1)), 16, MEAN)
    assert torch.equal(mirrored, plain.flip(3))
    assert not torch.equal(mirrored, plain)


def test_a_batch_is_its_crops_one_by_one():
    cache = cache_of(*(noise(20 + 5 * n, 50 - 4 * n, seed=n) for n in range(8)))
    index = torch.tensor([7, 0, 3, 3, 6, 1])
    crops = random_crops(cache.heights[index], cache.widths[index], 24, torch.Generator().manual_seed(0))
    together = crop(cache, index, crops, 24, MEAN)
    for n, image in enumerate(index):
        alone = Crops(*(value[n : n + 1] for value in vars(crops).values()))
        assert torch.equal(
            together[n : n + 1], crop(cache_of(stored(cache, image)), torch.tensor([0]), alone, 24, MEAN)
        )


def test_mean_must_have_three_values():
    cache = cache_of(noise(8, 8))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        crop(cache, torch.tensor([0]), whole(cache.heights, cache.widths), 4, (104, 117))


# The distribution of random crops.


def draw(height, width, size, count=20_000, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return random_crops(torch.full((count,), height), torch.full((count,), width), size, generator, **options)


def assert_uniform(values, low, high):
    """Quantiles of 20,000 draws; 0.02 of the range is more than five standard errors."""
    probabilities = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    quantiles = (torch.quantile(values, probabilities) - low) / (high - low)
    torch.testing.assert_close(quantiles, probabilities, atol=0.02, rtol=0)
    assert values.min() >= low
    assert values.max() <= high


@pytest.mark.parametrize(
    ("height", "width", "low", "high"),
    [
        (500, 600, 0.5, 2.0),  # large: the limits of the protocol
        (375, 500, 0.5, 375 / 227),  # VOC's usual size: its height limits the scale
        (500, 333, 0.5, 333 / 227),
        (150, 500, 0.5, 150 / 227),  # less than the crop's size: always enlarged
    ],
)
def test_scale_is_uniform_up_to_the_largest_that_fits(height, width, low, high):
    crops = draw(height, width, 227)
    assert_uniform(crops.height / 227, low, high)
    assert torch.equal(crops.height, crops.width)


def test_small_image_yields_its_largest_squares():
    crops = draw(100, 400, 227)
    assert torch.equal(crops.height, torch.full_like(crops.height, 100))
    assert torch.equal(crops.y, torch.zeros_like(crops.y))
    assert_uniform(crops.x, 0, 300)


def test_scale_limits_are_options():
    assert_uniform(draw(500, 500, 100, min_scale=1.0, max_scale=1.5).height / 100, 1.0, 1.5)


def test_position_is_uniform_and_independent():
    crops = draw(375, 500, 227)
    y, x = crops.y / (375 - crops.height), crops.x / (500 - crops.width)
    assert_uniform(y, 0, 1)
    assert_uniform(x, 0, 1)
    correlation = torch.corrcoef(torch.stack([y, x, crops.height, crops.flip.double()])) - torch.eye(4)
    assert correlation.abs().max() < 0.04


def test_half_of_the_crops_are_mirrored():
    crops, unmirrored = draw(375, 500, 227), draw(375, 500, 227, mirror=False)
    assert crops.flip.double().mean() == pytest.approx(0.5, abs=0.02)
    assert not unmirrored.flip.any()
    assert torch.equal(crops.x, unmirrored.x)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), min_size=1, max_size=20),
    size=st.integers(1, 600),
    seed=st.integers(0, 2**32),
)
def test_windows_lie_inside_their_images(sizes, size, seed):
    heights, widths = torch.tensor(sizes).unbind(1)
    crops = random_crops(heights, widths, size, torch.Generator().manual_seed(seed))
    assert (crops.height > 0).all()
    assert (crops.y >= 0).all()
    assert (crops.x >= 0).all()
    assert (crops.y + crops.height <= heights * (1 + 1e-12)).all()
    assert (crops.x + crops.width <= widths * (1 + 1e-12)).all()
    assert (crops.height <= 2 * size * (1 + 1e-12)).all()


def test_generator_alone_decides_the_crops():
    before = torch.get_rng_state()
    first, again, other = draw(375, 500, 227), draw(375, 500, 227), draw(375, 500, 227, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in vars(first).items():
        assert torch.equal(value, vars(again)[name])
        assert not torch.equal(value, vars(other)[name])


# The cache.


def test_cache_holds_the_images(tmp_path):
    arrays = [noise(10 + n % 7, 20 - n % 11, seed=n) for n in range(150)]  # more than two blocks of decoding
    cache = ImageCache.open(save(tmp_path, *arrays), tmp_path / "deep" / "cache")
    assert len(cache) == 150
    assert cache.pixels.shape == (sum(array.shape[0] * array.shape[1] for array in arrays), 3)
    assert (cache.pixels.dtype, cache.offsets.dtype) == (torch.uint8, torch.int64)
    for n, array in enumerate(arrays):
        np.testing.assert_array_equal(stored(cache, n), array)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpeg_of_any_colours_becomes_rgb(tmp_path, mode):
    colour = Image.new("RGB", (24, 16), (200, 120, 40)).convert(mode)
    colour.save(tmp_path / "image.jpg", quality=95)
    cache = ImageCache.open([tmp_path / "image.jpg"], tmp_path)
    expected = np.broadcast_to(np.array(colour.convert("RGB"))[0, 0], (16, 24, 3))
    np.testing.assert_allclose(stored(cache, 0), expected, atol=3)


def test_cache_is_decoded_once(tmp_path, monkeypatch):
    paths = save(tmp_path, noise(8, 9), noise(9, 8))
    first = ImageCache.open(paths, tmp_path / "cache")
    monkeypatch.setattr(images, "_decode", None)
    again = ImageCache.open(paths, tmp_path / "cache")
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.offsets, again.offsets)


def test_changed_images_are_decoded_anew(tmp_path):
    paths = save(tmp_path, noise(8, 9, seed=0), noise(8, 9, seed=1))
    ImageCache.open(paths, tmp_path / "cache")
    np.testing.assert_array_equal(stored(ImageCache.open(paths[::-1], tmp_path / "cache"), 0), noise(8, 9, seed=1))
    status = paths[0].stat()
    paths[0].write_bytes(paths[1].read_bytes())
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    np.testing.assert_array_equal(stored(ImageCache.open(paths, tmp_path / "cache"), 0), noise(8, 9, seed=1))


def test_cache_stays_mapped_on_the_cpu(tmp_path):
    cache = ImageCache.open(save(tmp_path, noise(8, 9)), tmp_path)
    moved = cache.to("cpu")
    assert moved.pixels.data_ptr() == cache.pixels.data_ptr()
    assert len(moved) == 1


def test_writing_to_the_pixels_leaves_the_file_alone(tmp_path):
    paths = save(tmp_path, noise(8, 9))
    ImageCache.open(paths, tmp_path).pixels.zero_()
    np.testing.assert_array_equal(stored(ImageCache.open(paths, tmp_path), 0), noise(8, 9))


def python(code, *arguments):
    """Start a Python process that runs `code`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


OPEN = """
import sys
from pathlib import Path
from experiments.data import images
paths = sorted(Path(sys.argv[1]).glob("*.png"))
"""


def test_concurrent_builders_make_one_cache(tmp_path):
    arrays = [noise(30, 40, seed=n) for n in range(200)]
    save(tmp_path, *arrays)
    code = OPEN + (
        "import time\n"
        "decode = images._decode\n"
        "images._decode = lambda path: time.sleep(0.05) or decode(path)  # long enough for all to start\n"
        "print(int(images.ImageCache.open(paths, sys.argv[2]).pixels.long().sum()))"
    )
    processes = [python(code, tmp_path, tmp_path / "cache") for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    total = sum(int(array.sum(dtype=np.int64)) for array in arrays)
    assert [out.strip() for out, _ in outputs] == [str(total)] * 3, outputs
    assert sum("decoding images" in error for _, error in outputs) == 1
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".pixels", ".lock"}


def test_build_goes_on_after_a_kill(tmp_path):
    paths = save(tmp_path, *(noise(30, 40, seed=n) for n in range(100)))
    code = OPEN + (
        "import os, signal\n"
        "decode = images._decode\n"
        "images._decode = lambda p: os.kill(os.getpid(), signal.SIGKILL) if '090' in p.name else decode(p)\n"
        "images.ImageCache.open(paths, sys.argv[2])"
    )
    process = python(code, tmp_path, tmp_path / "cache")
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert not list((tmp_path / "cache").glob("*.pixels"))
    assert list((tmp_path / "cache").glob("*.part"))

    cache = ImageCache.open(paths, tmp_path / "cache")
    np.testing.assert_array_equal(stored(cache, 99), noise(30, 40, seed=99))
    assert not list((tmp_path / "cache").glob("*.part"))


# Bad input.


def assert_nothing_left(folder):
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"<html>404</html>",
        lambda data: data[:3],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-2],
    ],
    ids=["empty", "not an image", "three bytes", "half", "without its end"],
)
def test_broken_jpeg_is_named(tmp_path, damage):
    paths = save(tmp_path, *(noise(40, 60, seed=n) for n in range(5)), kind="jpg")
    paths[3].write_bytes(damage(paths[3].read_bytes()))
    with pytest.raises(ValueError, match=r"cannot decode the image .*003\.jpg .*: replace it by an intact file"):
        ImageCache.open(paths, tmp_path / "cache")
    assert_nothing_left(tmp_path / "cache")


def test_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        ImageCache.open([*save(tmp_path, noise(8, 9)), tmp_path / "absent.jpg"], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match="there are no images to cache"):
        ImageCache.open([], tmp_path)


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the image cache .*file/cache.*set data\.cache"):
        ImageCache.open(save(tmp_path, noise(8, 9)), tmp_path / "file" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_folder_without_permission(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"cannot write the image cache .*Permission denied.*set data\.cache"):
        ImageCache.open(save(tmp_path, noise(8, 9)), tmp_path / "cache")


def test_full_disk(tmp_path):
    """A limit of the file size stands for the disk: the system refuses the same write with another number."""
    save(tmp_path, *(noise(30, 40, seed=n) for n in range(20)))
    code = OPEN + (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "images.ImageCache.open(paths, sys.argv[2])"
    )
    process = python(code, tmp_path, tmp_path / "cache")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "OSError: cannot write the image cache" in error.splitlines()[-1]
    assert "make room, 3 bytes a pixel, or set data.cache to another folder" in error.splitlines()[-1]
    assert_nothing_left(tmp_path / "cache")


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_damaged_cache_is_not_used(tmp_path, size):
    paths = save(tmp_path, noise(8, 9))
    ImageCache.open(paths, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.pixels")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: delete it"):
        ImageCache.open(paths, tmp_path / "cache")


# Real images, and a real device.


@pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="needs VOC_ROOT, an unpacked VOC 2007")
def test_real_images_squashed_as_by_interpolate(tmp_path):
    paths = read_split(os.environ["VOC_ROOT"], "val").image_paths[::250]
    cache = ImageCache.open(paths, tmp_path)
    result = crop(cache, torch.arange(len(cache)), whole(cache.heights, cache.widths), 115, MEAN)
    for n, path in enumerate(paths):
        source = planes(np.array(Image.open(path).convert("RGB")))
        expected = F.interpolate(source, size=(115, 115), mode="bilinear", align_corners=False)
        torch.testing.assert_close(result[n : n + 1].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_crops_of_a_cuda_graph_equal_those_of_the_cpu():
    cache = cache_of(*(noise(40 + n, 60 - n, seed=n) for n in range(8)))
    generator = torch.Generator().manual_seed(0)
    indices = [torch.tensor([7, 0, 3, 3]), torch.tensor([1, 2, 6, 4])]
    draws = [random_crops(cache.heights[index], cache.widths[index], 24, generator) for index in indices]

    on_gpu, index, crops = cache.to("cuda"), indices[0].cuda(), draws[0].to("cuda")
    graph = torch.cuda.CUDAGraph()
    crop(on_gpu, index, crops, 24, MEAN)
    with torch.cuda.graph(graph):
        result = crop(on_gpu, index, crops, 24, MEAN)
    index.copy_(indices[1])
    for target, value in zip(vars(crops).values(), vars(draws[1]).values(), strict=True):
        target.copy_(value)
    graph.replay()

    expected = crop(cache, indices[1], draws[1], 24, MEAN)
    torch.testing.assert_close(result.cpu(), expected, atol=1e-4, rtol=0)
