"""Download PASCAL VOC 2007, the two archives with the trainval and test images, lists and annotations."""

import hashlib
import multiprocessing
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from experiments.data.voc import SPLITS, find_devkit, read_split
from experiments.progress import pace


class Archive(NamedTuple):
    """What is known of an archive: its bytes and its checksums."""

    size: int
    md5: str
    sha256: str


# md5: as in torchvision.datasets.VOCDetection. Size and sha256: as in tensorflow_datasets/url_checksums/voc.txt.
ARCHIVES = {
    "VOCtrainval_06-Nov-2007.tar": Archive(
        460032000,
        "c52e279531787c972589f7e41ab4ae64",
        "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
    ),
    "VOCtest_06-Nov-2007.tar": Archive(
        451020800,
        "b6e924de25625d8de591ea690078ad9f",
        "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
    ),
}
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/",  # Oxford, where VOC is at home
    "https://huggingface.co/datasets/JimmyUnleashed/Pascal_VOC/resolve/main/",
    "https://pjreddie.com/media/files/",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",  # Oxford again, where nothing lets https through
)
LOCK = ".download.lock"  # stays in a folder once a download has begun in it
TIMEOUT = 30  # seconds without an answer after which the next mirror is tried ...
WINDOW = 60  # ... as it is after as many seconds ...
LEAST = 600_000  # ... that brought fewer bytes than these, or a connection that is cut off before


def download(root: str | Path, progress: bool = True) -> Path:
    """Download and unpack VOC 2007 to `root/VOC2007`, unless it is under `root` already; return the devkit.

    Each archive comes from the first mirror that delivers it, with the right size and checksums and at 10 kB/s or
    more. A download that was cut off goes on where it ended. The archives stay in `root`; ones put there by hand save
    the download. The devkit appears in one piece, after both are unpacked. Of several processes one downloads while the
    others wait.

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
        archives = [_fetch(root / name, known, progress) for name, known in ARCHIVES.items()]
        return _unpack(archives, root / "VOC2007", progress)


def to_download(root: str | Path) -> bool:
    """Whether `root` is there for `download` to fill: it does not exist, or a download has begun in it.

    A folder that holds something else is rather a mistake in its name than a place for a gigabyte of images.
    """
    return not Path(root).exists() or (Path(root) / LOCK).exists()


def _present(root: Path) -> Path | None:
    """The complete devkit under `root`, None if there is none at all."""
    try:
        for split in SPLITS:
            read_split(root, split)
        return find_devkit(root)
    except (FileNotFoundError, ValueError) as error:
        if any((root / folder).exists() for folder in ("JPEGImages", "VOC2007", "VOCdevkit/VOC2007")):
            message = f"move the VOC 2007 in {root} away first, it is not complete: {error}"
            raise FileExistsError(message) from error
        return None


def _fetch(archive: Path, known: Archive, progress: bool) -> Path:
    """Download an archive unless it is there; until its checksums are checked, its name ends in `.part`."""
    if archive.exists():
        if not _is_intact(archive, known):
            raise ValueError(f"{archive} is damaged (its sha256 is not {known.sha256}): delete it and run this again")
        return archive

    part = archive.with_name(archive.name + ".part")
    part.touch()
    failures = []
    for url in (mirror + archive.name for mirror in MIRRORS):
        try:
            _complete(url, part, known, progress)
        except _MirrorError as error:
            failures.append(f"{url}: {error}")
        else:
            os.replace(part, archive)
            return archive
    if part.stat().st_size == 0:
        part.unlink()
    raise ConnectionError(
        f"no mirror could deliver {archive.name}. Run this again later to go on with the download, or bring "
        f"{' and '.join(ARCHIVES)} to {archive.parent} by other means and run this again, or set data.root "
        "(or VOC_ROOT) to an unpacked VOC 2007, or take preset=demo, which needs no download.\n  "
        + "\n  ".join(failures)
    )


class _MirrorError(Exception):
    """A mirror cannot be reached, lacks the file, sends something else, is too slow or has hung up early."""


def _complete(url: str, part: Path, known: Archive, progress: bool) -> None:
    """Get what `part` lacks of `url`, all of it anew if what was there does not belong to it.

    Raises:
        _MirrorError: the mirror does not deliver; what it sent before it was cut off is kept.
    """
    begun_elsewhere = part.stat().st_size > 0
    while True:
        size = part.stat().st_size
        if size < known.size:
            try:
                _append(url, part, known.size, progress)
            except _MirrorError:
                if part.stat().st_size - size < LEAST:
                    raise
            continue  # the same mirror is asked for the rest, if it was cut off
        if _is_intact(part, known):
            return
        os.truncate(part, 0)
        if not begun_elsewhere:
            raise _MirrorError("wrong checksum")
        begun_elsewhere = False  # the fault may lie in the beginning: get all of it from this mirror


def _append(url: str, part: Path, total: int, progress: bool) -> None:
    """Append to `part` what it lacks of the `total` bytes of `url`."""
    start = part.stat().st_size
    label = {"desc": part.stem, "initial": start, "total": total, "unit": "B", "unit_scale": True}
    try:
        with open(part, "ab") as file, tqdm(**label, disable=not progress, **pace()) as bar:
            for data in _fast_enough(_receive(url, start, total)):
                file.write(data)
                bar.update(len(data))
    except OSError as error:
        raise OSError(f"cannot write {part}, what it holds is kept: {error}") from error


def _fast_enough(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Pass `parts` on while each `WINDOW` of seconds brings `LEAST` bytes, be it names, headers or data that linger."""
    pool = ThreadPool(1)  # its thread ends with the process, whatever it waits for
    try:
        brought, end = 0, time.monotonic() + WINDOW
        found = pool.apply_async(next, (parts, b""))
        while True:
            try:
                data = found.get(max(0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                if brought < LEAST:
                    raise _MirrorError(f"fewer than {LEAST} bytes in {WINDOW} seconds") from None
                brought, end = 0, time.monotonic() + WINDOW
                continue
            if not data:
                return
            yield data
            brought += len(data)
            found = pool.apply_async(next, (parts, b""))
    finally:
        pool.terminate()


def _receive(url: str, start: int, total: int) -> Iterator[bytes]:
    """Yield the bytes of `url`, which are `total`, from position `start` on."""
    headers = {"User-Agent": "data-dependent-init"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
            position = _position(response, start, total)
            while data := response.read1(1 << 16):
                position += len(data)
                if position > total:
                    raise _MirrorError(f"sends more than the {total} bytes of the archive")
                if position > start:
                    yield data[max(0, start - position + len(data)) :]
            if position < total:
                raise _MirrorError(f"cut off after {position} of {total} bytes")
    except HTTPError as error:
        with error:
            raise _MirrorError(error) from error
    except URLError as error:
        raise _MirrorError(error.reason) from error
    except (OSError, HTTPException, ValueError) as error:  # ValueError: it leads on to what is no address
        raise _MirrorError(str(error) or type(error).__name__) from error


def _position(response: HTTPResponse, start: int, total: int) -> int:
    """Where in the archive a response begins: at `start` as asked for, or at 0 if the server ignores that."""
    headers = response.headers
    if headers.get_content_type() == "text/html":
        raise _MirrorError("sends a page, no archive")
    if response.status == 206:
        expected, found = f"bytes {start}-{total - 1}/{total}", headers["Content-Range"]
        if found != expected:
            raise _MirrorError(f"sends the range {found!r}, not {expected!r}")
        return start
    length = headers["Content-Length"]
    if length is not None and length != str(total):
        raise _MirrorError(f"sends {length!r} bytes, not {total}")
    return 0


def _is_intact(path: Path, known: Archive) -> bool:
    """Whether size, md5 and sha256 of a file are those that are known."""
    if path.stat().st_size != known.size:
        return False
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            md5.update(data)
            sha256.update(data)
    return (md5.hexdigest(), sha256.hexdigest()) == (known.md5, known.sha256)


def _unpack(archives: list[Path], devkit: Path, progress: bool) -> Path:
    """Unpack the archives' `VOCdevkit/VOC2007` to `devkit` through a temporary folder beside it."""
    folder = devkit.with_name(".unpacking")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        for archive in archives:
            with tarfile.open(archive) as tar:
                files = tqdm(tar, desc=f"unpacking {archive.name}", unit=" files", disable=not progress, **pace())
                tar.extractall(folder, members=files, filter="data")
        os.rename(folder / "VOCdevkit" / "VOC2007", devkit)
    except (OSError, tarfile.TarError) as error:
        raise OSError(f"cannot unpack VOC 2007 to {devkit}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return devkit
