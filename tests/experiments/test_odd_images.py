"""Image files as people have them: odd modes, odd shapes, other formats, no files at all, and damaged ones."""

import io
import os
import random
import socket
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.data import folders
from experiments.data.folders import Images
from experiments.data.images import ImageCache, read_scaled
from initializers._images import PIXELS, in_one_line, open_image

CPU = torch.device("cpu")


def pixel(path):
    """The one colour of an image."""
    array = np.asarray(open_image(path)).reshape(-1, 3)
    assert (array == array[0]).all()
    return array[0].tolist()


# Modes.


@pytest.mark.parametrize(("name", "kind"), [("a.png", np.uint16), ("a.tif", np.uint16), ("a.pgm", np.uint16)])
@pytest.mark.parametrize(("value", "shown"), [(0, 0), (0x1234, 0x12), (128 * 257, 128), (65535, 255)])
def test_grey_of_16_bits_is_scaled(tmp_path, name, kind, value, shown):
    Image.fromarray(np.full((4, 5), value, kind)).save(tmp_path / name)
    assert pixel(tmp_path / name) == [shown] * 3


def test_values_without_a_range_are_refused(tmp_path):
    for kind in (np.float32, np.int32):
        Image.fromarray(np.full((4, 5), 1, kind)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif \(its values, of mode [IF], have no known range: convert it to"):
            open_image(tmp_path / "a.tif")


def test_what_is_transparent_shows_white(tmp_path):
    for mode, colour, shown in (
        ("RGBA", (200, 0, 0, 0), [255] * 3),
        ("RGBA", (200, 0, 0, 255), [200, 0, 0]),
        ("LA", (10, 0), [255] * 3),
    ):
        Image.new(mode, (4, 5), colour).save(tmp_path / "a.png")
        assert pixel(tmp_path / "a.png") == shown
    palette = Image.new("P", (4, 5), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "a.png", transparency=1)
    assert pixel(tmp_path / "a.png") == [255] * 3
    palette.save(tmp_path / "a.gif")
    assert pixel(tmp_path / "a.gif") == [9, 8, 7]


def test_images_are_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right is upright
    image.save(tmp_path / "a.jpg", exif=exif)
    found = open_image(tmp_path / "a.jpg")
    assert found.size == (20, 40)
    assert found.getpixel((10, 5)) == (255, 255, 255)
    assert read_scaled(tmp_path / "a.jpg", 10).shape == (20, 10, 3)


# What is refused.


def test_only_named_formats_are_opened(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.jpg \(it is none of JPEG, PNG"):
        open_image(tmp_path / "a.jpg")
    for kind in ("DDS", "AVIF", "ICO", "TGA"):
        Image.new("RGBA", (16, 16)).save(tmp_path / "b.jpg", kind)
        with pytest.raises(ValueError, match="it is none of"):
            open_image(tmp_path / "b.jpg")


def test_images_that_would_fill_the_memory_are_refused(tmp_path):
    Image.new("L", (1, 65_000)).save(tmp_path / "long.png")
    Image.new("1", (10_000, PIXELS // 10_000 + 1)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"long\.png \(of 1 x 65000 pixels one side is more than 100 times the other"):
        open_image(tmp_path / "long.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        with pytest.raises(ValueError, match=r"large\.png \(10000 x 8948 pixels are more than 89478485"):
            open_image(tmp_path / "large.png")
    assert read_scaled(tmp_path / "long.png", 256).shape == (1, 1, 3)


def odd_files(folder):
    """A pipe, a socket, a folder, a link to nothing and one to a device, all with names of images."""
    os.mkfifo(folder / "pipe.jpg")
    socket.socket(socket.AF_UNIX).bind(str(folder / "s.jpg"))
    (folder / "folder.jpg").mkdir()
    (folder / "nothing.jpg").symlink_to(folder / "none")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    return sorted(folder.glob("*.jpg"))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    paths = odd_files(tmp_path)
    assert len(paths) == 5
    for path in paths:
        with pytest.raises(OSError, match="cannot open the image"):
            open_image(path)


@pytest.mark.parametrize("cached", [False, True])
def test_odd_files_and_names_are_left_out_and_listed_one_a_line(tmp_path, cached, capsys):
    (tmp_path / "set").mkdir()
    paths = [*map(str, odd_files(tmp_path / "set"))]
    for name in (b"new\nline.jpg", b"latin\xe9.jpg", "separator\u2028.jpg".encode(), "grün.jpg".encode()):
        path = os.fsdecode(os.fsencode(tmp_path / "set") + b"/" + name)
        open(path, "w").close()
        paths.append(path)
    Image.new("RGB", (30, 20)).save(good := os.fsdecode(os.fsencode(tmp_path / "set") + b"/good\xff\n.jpg"))
    images = Images([*paths, good], 10, tmp_path / "cache" if cached else None, tmp_path / "bad.txt")
    ((_, found),) = images.load(lambda _: torch.arange(10), [0], 0, CPU)
    assert [folders.is_bad(image) for image in found] == [True] * 9 + [False]
    assert (tmp_path / "bad.txt").read_text().splitlines() == [in_one_line(path) for path in paths]
    assert "grün.jpg\n" in (tmp_path / "bad.txt").read_text()
    assert capsys.readouterr().err.count("\ncannot decode the image") == 9 - (not cached)


def test_all_images_bad_is_one_error(tmp_path):
    images = Images([str(path) for path in odd_files(tmp_path)], 10, None, tmp_path / "bad.txt")
    with pytest.raises(ValueError, match=r"none of 5 images, such as .*folder\.jpg, can be decoded: mend data\.root"):
        list(images.load(lambda _: torch.arange(5), [0], 0, CPU))


# The file of decoded images.


def decoded(folder, short):
    """A cache of three images, made, then half of it zeroed: -> how to open it."""
    paths = [folder / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(n).integers(1, 256, (20, 30, 3), np.uint8)).save(path)
    ImageCache.open(paths, folder / "cache", short)
    (file,) = (folder / "cache").glob("*.pixels")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    return lambda: ImageCache.open(paths, folder / "cache", short)


def test_a_half_zeroed_cache_is_not_used(tmp_path):
    with pytest.raises(ValueError, match=r"\.pixels is damaged: delete it, and it is made anew"):
        decoded(tmp_path, None)()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_half_zeroed_cache_of_folders_is_found_where_it_is_used(tmp_path, workers):
    decoded(tmp_path, 20)
    images = Images([f"{tmp_path}/{n}.png" for n in range(3)], 20, tmp_path / "cache", tmp_path / "bad.txt")
    assert len(list(images.load(lambda _: torch.tensor([0]), [0], workers, CPU))) == 1
    with pytest.raises(ValueError, match=r"^the image cache .*\.pixels is damaged: delete it, and it is made anew$"):
        list(images.load(lambda _: torch.tensor([2]), [0], workers, CPU))


@pytest.mark.parametrize("position", [0, 5, 8, 20, 36, 39])
def test_every_byte_before_the_pixels_counts(tmp_path, position):
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path in paths:
        Image.new("RGB", (30, 20)).save(path)
    ImageCache.open(paths, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.pixels")
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        ImageCache.open(paths, tmp_path / "cache")


# Processes that decode.


def some_images(folder):
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    return Images([str(folder / "a.png")] * 4, 10, None, folder / "bad.txt")


def test_no_shared_memory_is_one_error(tmp_path, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the processes are forks of this one
    with pytest.raises(OSError, match=r"^no shared memory \(/dev/shm\) is left .*: set workers=0, or .*--shm-size=8g$"):
        list(some_images(tmp_path).load(lambda _: torch.arange(4), range(3), 2, CPU))


def test_a_process_that_dies_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_share", lambda *_: os.kill(os.getpid(), 7))  # SIGBUS, of memory that is not there
    with pytest.raises(OSError, match=r"^a process that decodes images has died, .*: set workers=0"):
        list(some_images(tmp_path).load(lambda _: torch.arange(4), range(3), 2, CPU))


# Damaged files.


def encodings():
    """Small valid files, by kind."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(256, size=(24, 17, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    kinds = {
        "jpeg": [(colour, {"exif": exif}), (colour.convert("CMYK"), {}), (colour, {"progressive": True})],
        "png": [(colour, {"exif": exif}), (colour.convert("P"), {"transparency": 3}), (colour.convert("I;16"), {})],
        "bmp": [(colour, {}), (colour.convert("P"), {}), (colour.convert("1"), {})],
        "webp": [(colour, {"exif": exif}), (colour.convert("RGBA"), {"lossless": True})],
        "gif": [(colour.convert("P"), {}), (colour.convert("P"), {"save_all": True, "append_images": [colour]})],
        "tiff": [
            (colour, {"exif": exif}),
            (colour.convert("RGBA"), {"compression": "tiff_lzw"}),
            (colour.convert("I;16"), {"compression": "tiff_deflate"}),
            (colour.convert("1"), {"compression": "group4"}),
        ],
        "ppm": [(colour, {}), (colour.convert("L"), {})],
    }
    found = {}
    for kind, variants in kinds.items():
        for image, options in variants:
            image.save(buffer := io.BytesIO(), kind, **options)
            found.setdefault(kind, []).append(buffer.getvalue())
    return found


FILES = encodings()


def damaged(content, seed):
    """The bytes of a file with some changed, cut out, repeated or cut off."""
    rng, content = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(content) + 1), rng.randrange(1, 9)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(64))  # headers
        match rng.randrange(6):
            case 0:
                content = content[: max(1, at)]
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = content[at : at + length]
            case 3:
                content[at : at + length] = rng.choice((b"\xff", b"\x00", b"\x7f")) * length
            case _:
                content[at : at + 1] = rng.randbytes(1)
    return bytes(content)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of odd metadata and of large images
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("count", [50, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_damage_ends_in_an_unnamed_error(tmp_path_factory, kind, count):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{kind}"

    @settings(max_examples=count, database=None, suppress_health_check=[*HealthCheck])
    @given(content=st.sampled_from(FILES[kind]), seed=st.integers(0, 2**32))
    def check(content, seed):
        path.write_bytes(damaged(content, seed))
        began = time.monotonic()
        try:
            image = open_image(path)
        except ValueError as error:
            image, message = None, str(error)
        assert time.monotonic() - began < 20
        if image is None:
            assert str(path) in message
            assert "\n" not in message
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= PIXELS

    for content in FILES[kind]:
        path.write_bytes(content)
        assert open_image(path).mode == "RGB"
    check()
