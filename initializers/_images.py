"""Opening the image files that people have: by what they hold, not by their names, and within stated limits."""

import os
from pathlib import Path
from typing import Any

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # no other decoder is started, whatever a file is called
PIXELS = 89_478_485  # at most, Pillow's own limit: a quarter of a GiB at three bytes a pixel
RATIO = 100  # the long side over the short side at most, so that scaling up the short side cannot fill the memory
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262


def open_image(path: str | os.PathLike[str]) -> Any:
    """The first picture of an image file, decoded: a PIL.Image in mode RGB with 8 bits a channel.

    It is turned upright, where EXIF says how. Boxes of VOC count the pixels as they are stored; its images are stored
    upright. What is transparent shows white. Grey of 16 bits is scaled to 8.

    Raises:
        ValueError: naming the file: it is damaged, of another format, larger than `PIXELS`, longer than `RATIO` times
            its short side, or of values without a known range (float, 32-bit integers).
        OSError: naming the file: it is not there, cannot be read, or is no file but a pipe, a socket or a folder.
    """
    from PIL import Image

    if not Path(path).is_file():  # opening a pipe would wait for ever
        raise OSError(f"cannot open the image {in_one_line(path)}: there is no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _rgb(image)
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:  # of the operating system
            raise OSError(f"cannot read the image {in_one_line(path)}: {error.strerror}") from error
        raise ValueError(_reason(path, error)) from error
    except Exception as error:  # Pillow's decoders raise nearly anything, depending on where a file is broken
        raise ValueError(_reason(path, error)) from error


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    from PIL import UnidentifiedImageError

    what = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else str(error)
    return f"cannot decode the image {in_one_line(path)} ({' '.join(what.split()) or type(error).__name__})"


def in_one_line(path: str | os.PathLike[str]) -> str:
    """A file name to print or to list; quoted and escaped where it holds line breaks or what is no text."""
    name = os.fspath(path)
    return name if name.isprintable() else ascii(name)


def _rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    short, long = sorted(image.size)
    if short * long > PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {PIXELS}: scale it down")
    if long > RATIO * short:
        raise ValueError(f"of {image.width} x {image.height} pixels one side is more than {RATIO} times the other")
    deep = _range(image)  # before loading, which may close the file
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if deep:
        return image.convert("I").point(lambda value: value * (255 / deep) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _range(image: Any) -> int | None:
    """The value of white in an image of more than 8 bits; None for one of 8 bits."""
    if not image.mode.startswith(("I", "F")):
        return None
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TIFF_BITS, (16,))[0]
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")) or bits > 16:
        raise ValueError(f"its values, of mode {image.mode}, have no known range: convert it to 8 bits a channel")
    if tags.get(TIFF_PHOTOMETRIC, 1) == 0:
        raise ValueError("it is a negative of more than 8 bits, with white as 0: convert it to 8 bits a channel")
    return 2**bits - 1
