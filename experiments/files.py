"""Files that are written whole or not at all."""

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all.

    Raises:
        OSError: it could not be written, for instance on a full disk; a file that was there is still intact.
    """
    write_whole(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`; errors as `write_text`."""
    write_whole(path, content)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write `arrays` to `path` as a compressed .npz; errors as `write_text`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getbuffer())


def write_json(path: Path, content: dict) -> None:
    """Write `content` to `path` as JSON; errors as `write_text`, ValueError for NaN or infinite numbers."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append `line` to `path`.

    Raises:
        OSError: it could not be written, for instance on a full disk; a part of it may have been.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _cannot_write(path, error) from error


def read_lines(path: Path, key: str) -> dict[str, dict]:
    """The records in a file of one JSON object a line, by their `key`; of several the last; no file is an empty one.

    What is no such line, as one that was cut off when its writer was killed, does not count.
    """
    found: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            found[record[key]] = record
    return found


def write_whole(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Put `content` in the place of `path` in one step; `keep` is a new name for the file that was there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot write {path} ({error.strerror}): make room or mend the folder, then give the same command again"
    )
