"""Download PASCAL VOC 2007, the two archives with the trainval and test images, lists and annotations."""

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from experiments.data.voc import find_devkit, read_split

# Archive: md5, as in torchvision.datasets.VOCDetection.
ARCHIVES = {
    "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
    "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
}
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/",  # Oxford, where VOC is at home
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    "https://huggingface.co/datasets/JimmyUnleashed/Pascal_VOC/resolve/main/",
    "https://pjreddie.com/media/files/",
)
LOCK = ".download.lock"  # stays in a folder once a download has begun in it
TIMEOUT = 30  # seconds without an answer after which the next mirror is tried


def download(root: str | Path, progress: bool = True) -> Path:
    """Download and unpack VOC 2007 to `root/VOC2007`, unless it is under `root` already; return the devkit.

    Each archive comes from the first mirror that has it with the right md5, and a download that was cut off
    goes on where it ended. The archives stay in `root`; ones put there by hand save the download. The devkit
    appears in one piece, after both are unpacked. Of several processes one downloads while the others wait.

    Raises:
        FileExistsError: there is an incomplete devkit under `root`. It is left alone.
        ValueError: an archive in `root` is damaged.
        ConnectionError: no mirror could deliver; the message says what to do.
        OSError: the folder cannot be written, or the disk is full.
    """
    root = Path(root)
    if devkit := _present(root):
        return devkit
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCK):
        if devkit := _present(root):  # another process was faster
            return devkit
        archives = [_fetch(root / name, md5, progress) for name, md5 in ARCHIVES.items()]
        return _unpack(archives, root / "VOC2007", progress)


def to_download(root: str | Path) -> bool:
    """Whether `root` is there for `download` to fill: it does not exist, or a download has begun in it.

    A folder that holds something else is rather a mistake in its name than a place for a gigabyte of images.
    """
    return not Path(root).exists() or (Path(root) / LOCK).exists()


def _present(root: Path) -> Path | None:
    """The complete devkit under `root`, None if there is none at all."""
    try:
        for split in ("trainval", "test"):
            read_split(root, split)
        return find_devkit(root)
    except (FileNotFoundError, ValueError) as error:
        if any((root / folder).exists() for folder in ("JPEGImages", "VOC2007", "VOCdevkit/VOC2007")):
            message = f"move the VOC 2007 in {root} away first, it is not complete: {error}"
            raise FileExistsError(message) from error
        return None


def _fetch(archive: Path, md5: str, progress: bool) -> Path:
    """Download an archive unless it is there; until its md5 is checked, its name ends in `.part`."""
    if archive.exists():
        if _md5(archive) != md5:
            raise ValueError(f"{archive} is damaged (its md5 is not {md5}): delete it and run this again")
        return archive

    part = archive.with_name(archive.name + ".part")
    part.touch()
    failures = []
    for url in (mirror + archive.name for mirror in MIRRORS):
        begun_elsewhere = part.stat().st_size > 0
        while True:
            size = part.stat().st_size
            try:
                _append(url, part, size, progress)
            except _MirrorError as error:
                if part.stat().st_size > size:
                    continue  # cut off, but it got on: ask the same mirror for the rest
                failures.append(f"{url}: {error}")
                break
            if _md5(part) == md5:
                os.replace(part, archive)
                return archive
            os.truncate(part, 0)
            if not begun_elsewhere:
                failures.append(f"{url}: wrong md5")
                break
            begun_elsewhere = False  # the fault may lie in the beginning: get all of it from this mirror
    if part.stat().st_size == 0:
        part.unlink()
    raise ConnectionError(
        f"no mirror could deliver {archive.name}. Run this again later to go on with the download, or bring "
        f"{' and '.join(ARCHIVES)} to {archive.parent} by other means and run this again, or set data.root "
        "(or VOC_ROOT) to an unpacked VOC 2007, or take preset=demo, which needs no download.\n  "
        + "\n  ".join(failures)
    )


class _MirrorError(Exception):
    """A mirror cannot be reached, lacks the file, or has hung up early."""


def _append(url: str, part: Path, size: int, progress: bool) -> None:
    """Append to `part`, which holds `size` bytes, what it lacks of `url`."""
    try:
        with (
            open(part, "ab") as file,
            tqdm(desc=part.stem, initial=size, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            for data, bar.total in _receive(url, size):
                file.write(data)
                bar.update(len(data))
    except OSError as error:
        raise OSError(f"cannot write {part}, what it holds is kept: {error}") from error


def _receive(url: str, start: int) -> Iterator[tuple[bytes, int | None]]:
    """Yield the bytes of `url` from position `start` on, with the whole size of the file if that is known."""
    headers = {"User-Agent": "data-dependent-init"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
            position = start if response.status == 206 else 0  # 200: it ignores Range and sends all of the file
            length = response.headers["Content-Length"]
            total = None if length is None else position + int(length)
            while data := response.read(1 << 16):
                position += len(data)
                if position > start:
                    yield data[start - position :], total
            if total is not None and position < total:
                raise _MirrorError(f"cut off after {position} of {total} bytes")
    except HTTPError as error:
        if error.code != 416:  # 416: there is nothing after `start`, the part is complete
            raise _MirrorError(error) from error
    except URLError as error:
        raise _MirrorError(error.reason) from error
    except (OSError, HTTPException) as error:
        raise _MirrorError(error or type(error).__name__) from error


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _unpack(archives: list[Path], devkit: Path, progress: bool) -> Path:
    """Unpack the archives' `VOCdevkit/VOC2007` to `devkit` through a temporary folder beside it."""
    folder = devkit.with_name(".unpacking")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        for archive in archives:
            with tarfile.open(archive) as tar:
                files = tqdm(tar, desc=f"unpacking {archive.name}", unit=" files", disable=not progress)
                tar.extractall(folder, members=files, filter="data")
        os.rename(folder / "VOCdevkit" / "VOC2007", devkit)
    except (OSError, tarfile.TarError) as error:
        raise OSError(f"cannot unpack VOC 2007 to {devkit}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return devkit
