"""MATLAB's files (version 5, `.mat`) of cell arrays, read without trust: no more memory than the file has bytes for.

SciPy's reader takes the sizes that a file claims at their word. The format is MathWorks' "MAT-File Format", chapter 1.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

# Types of data elements, and classes of arrays, by their numbers in the format.
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, COMPRESSED = 14, 15
TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
CELL, CHAR, NUMERIC = 1, 4, range(6, 16)
COMPLEX = 0x800
HEADER = 128  # bytes
RATIO = 100  # a variable that grows by more when it is unpacked was made to fill the memory


def read_cells(path: Path, names: Sequence[str]) -> dict[str, list[str | np.ndarray]]:
    """The cells of some variables, each a text or an array of numbers, column by column.

    Raises:
        ValueError: it is no such file, lacks a variable, or holds what is no cell array of texts and numbers.
    """
    content = memoryview(path.read_bytes())
    if len(content) < HEADER or bytes(content[126:128]) != b"IM":
        raise ValueError("no MATLAB file of version 5, little-endian; save it by `save -v7`")
    found: dict[str, list[str | np.ndarray]] = {}
    for kind, data in _elements(content[HEADER:]):
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(data, RATIO * len(data) + 1024)
            if not unpacker.eof:
                raise ValueError(f"a variable is cut off, or grows to more than {RATIO} times its size")
            kind, data = next(_elements(memoryview(unpacked)), (0, data))
        if kind == MATRIX:
            name, value = _matrix(data, names)
            if name in names:
                if not isinstance(value, list):
                    raise ValueError(f"{name} is no cell array")
                found[name] = value
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"it has no variable {missing[0]}")
    return found


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The type and the bytes of one data element after the other."""
    while data:
        if len(data) < 8:
            raise ValueError("it is cut off")
        kind, size = np.frombuffer(data[:8], "<u4").tolist()
        start = 8
        if kind >> 16:  # a small element: both in four bytes, and the data in the next four
            kind, size, start = kind & 0xFFFF, kind >> 16, 4
        if start + size > len(data) or (start == 4 and size > 4):
            raise ValueError("it is cut off")
        yield kind, data[start : start + size]
        end = start + size
        data = data[end if kind == COMPRESSED else -(-end // 8) * 8 :]


def _matrix(data: memoryview, names: Sequence[str] | None = None) -> tuple[str, list | str | np.ndarray | None]:
    """Name and value of an array: a list for cells; None where it is empty, or is not one of `names`."""
    parts = _elements(data)
    head = [part for _, part in zip(range(3), parts, strict=False)]
    if not head:  # MATLAB's short form of []
        return "", np.empty((0, 0))
    if len(head) < 3 or len(head[0][1]) != 8 or len(head[1][1]) % 4:
        raise ValueError("an array has no flags, shape and name")
    flags = int(np.frombuffer(head[0][1][:4], "<u4")[0])
    shape = np.frombuffer(head[1][1], "<i4").tolist()
    name = bytes(head[2][1]).decode("latin-1")
    if names is not None and name not in names:
        return name, None
    if min(shape, default=-1) < 0:
        raise ValueError(f"an array has the shape {shape}")
    if flags & 0xFF == CELL:
        if names is None:
            raise ValueError("a cell array lies in another")
        cells = [_matrix(part)[1] for kind, part in parts if kind == MATRIX]
        if len(cells) != math.prod(shape):
            raise ValueError(f"{name} should have {math.prod(shape)} cells and has {len(cells)}")
        return name, cells
    kind, values = next(parts, (2, memoryview(b"")))
    if flags & 0xFF == CHAR and kind in TEXT:
        return name, bytes(values).decode(TEXT[kind])
    if flags & 0xFF not in NUMERIC or flags & COMPLEX or kind not in NUMBERS:
        raise ValueError("a cell holds neither text nor real numbers")
    return name, np.frombuffer(values, f"<{NUMBERS[kind]}").reshape(shape, order="F")
