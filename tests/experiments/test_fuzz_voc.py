"""Annotations, image lists, class lists and files of proposals of any content: one named error or a result."""

import io
import pickle
import resource
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from detection import read_proposals
from experiments.data.voc import find_devkit, read_objects, read_split

CLASSES = ("cat", "dog")
IDS = ["000001", "000002", "b"]
SIZES = torch.tensor([40, 50, 60]), torch.tensor([80, 70, 60])  # heights, widths
HEAD = b"<annotation><object>"
BOX = b"<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
XML = HEAD + b"<name>dog</name><difficult>0</difficult>" + BOX + b"</object></annotation>"
LIMIT = 1 << 28  # bytes by which the memory of this process may grow

# What breaks readers, to be put anywhere.
CRUMBS = (
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"<", b"&", b"&lt;", b"&x;", b"<!--", b"-->"),
    *(b"<![CDATA[", b"]]>", b"<?xml version='1.0' encoding='utf-7'?>", b"<!DOCTYPE a [<!ENTITY x 'y'>]>"),
    *(b"<?xml version='1.0' encoding='idna'?>", b"<?xml version='1.0' encoding='utf-16'?>", b"<object>", b"</object>"),
    *(b"nan", b"inf", b"-1", b"1e999", b"1e38", b"9" * 400, b"..", b"/", b"../x", b"\\", b" ", b"dog", b"1"),
    *(struct.pack("<I", value) for value in (0, 1, 6, 14, 15, 2**31 - 1, 2**32 - 1)),
    *(b"(99999999999,)", b"|O", b"<U0", b"<f8", b"'shape': (0, 9)", b"PK\3\4"),
)


def cases(numbers=(50, 10_000)):
    """A few examples always, many in the slow tests."""
    return pytest.mark.parametrize(
        "examples", [pytest.param(n, marks=[pytest.mark.slow] if n > 1000 else []) for n in numbers]
    )


@st.composite
def damaged(draw, bases):
    """Some bytes near to those of one of `bases`, or any."""
    content = draw(st.sampled_from(bases) | st.binary(max_size=300)) if draw(st.booleans()) else bases[0]
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        end = place + draw(st.sampled_from([0, 0, 1, 4, 8, 50]))
        content = content[:place] + draw(st.sampled_from(CRUMBS) | st.binary(max_size=8)) + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


def check(read, path, strategy, examples, content_of=lambda content: content):
    """`read` gives a result or an error that names `path`, for any content, and memory does not grow."""

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(content):
        path.write_bytes(content_of(content))
        try:
            read()
        except (ValueError, OSError) as error:
            if path.name not in str(error):
                raise AssertionError(f"{path.name} is not named") from error

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < LIMIT


@pytest.fixture
def devkit(tmp_path):
    root = tmp_path / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for image_id in IDS:
        (root / f"JPEGImages/{image_id}.jpg").touch()
        (root / f"Annotations/{image_id}.xml").write_bytes(XML)
    (root / "ImageSets/Main/val.txt").write_text("".join(f"{image_id}\n" for image_id in IDS))
    for name in CLASSES:
        (root / f"ImageSets/Main/{name}_val.txt").write_text("".join(f"{image_id} -1\n" for image_id in IDS))
    assert find_devkit(root) == root
    return root


@cases()
def test_annotations(devkit, examples):
    bases = [XML, XML.decode().encode("utf-16"), XML.replace(b"dog", b"cat").replace(b">", b">\r\n")]
    check(lambda: read_objects(devkit, "b", CLASSES), devkit / "Annotations/b.xml", damaged(bases), examples)


@cases()
def test_image_lists(devkit, examples):
    path = devkit / "ImageSets/Main/val.txt"

    def read():
        try:
            read_split(devkit, "val", CLASSES)
        except ValueError as error:
            if "cat_val.txt does not name the same images" not in str(error):  # the list itself is well-formed
                raise

    check(read, path, damaged([path.read_bytes(), b"\xef\xbb\xbfb\r\n\r\n"]), examples)


@cases()
def test_class_lists(devkit, examples):
    path = devkit / "ImageSets/Main/dog_val.txt"
    check(lambda: read_split(devkit, "val", CLASSES), path, damaged([path.read_bytes()]), examples)


def mat(**options):
    boxes, images = np.empty((1, 3), object), np.empty((3, 1), object)
    for row, (image_id, found) in enumerate(
        zip(IDS, ([[1, 1, 40, 80], [7, 6, 9, 8]], [], [[2, 2, 2, 2]]), strict=True)
    ):
        images[row, 0], boxes[0, row] = image_id, np.array(found, float).reshape(-1, 4)
    file = io.BytesIO()
    savemat(file, {"images": images, "boxes": boxes}, **options)
    return file.getvalue()


def packed(content):
    """Each variable of a `.mat` compressed, after it was damaged."""
    body = zlib.compress(content[128:])
    return content[:128] + struct.pack("<II", 15, len(body)) + body


@cases()
@pytest.mark.parametrize("compressed", [False, True])
def test_mat(tmp_path, examples, compressed):
    path = tmp_path / "p.mat"
    path.write_bytes(mat(do_compression=compressed))
    assert read_proposals(path, IDS, *SIZES)[0].tolist() == [[0, 0, 79, 39], [5, 6, 7, 8]]
    content_of = packed if compressed else bytes
    check(lambda: read_proposals(path, IDS, *SIZES), path, damaged([mat()]), examples, content_of)


def columns(**changes):
    """The members of an `.npz` of proposals, as bytes."""
    corners = np.array([(0, 0, 79, 39), (5, 6, 7, 8), (1, 1, 1, 1)], np.uint16).T
    arrays = {"ids": np.array(IDS), "offsets": np.array([0, 2, 2, 3])}
    arrays |= dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True)) | changes
    found = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array)
        found[name] = file.getvalue()
    return found


def archive(members, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for name, content in members.items():
            out.writestr(f"{name}.npy", content)
    return file.getvalue()


@cases()
def test_npz_with_damaged_members(tmp_path, examples):
    path, whole = tmp_path / "p.npz", columns()
    path.write_bytes(archive(whole))
    assert read_proposals(path, IDS, *SIZES)[0].tolist() == [[0, 0, 79, 39], [5, 6, 7, 8]]
    members = st.sampled_from(sorted(whole)).flatmap(
        lambda name: damaged([whole[name]]).map(lambda content: whole | {name: content})
    )
    check(lambda: read_proposals(path, IDS, *SIZES), path, members, examples, archive)


@cases()
def test_damaged_npz(tmp_path, examples):
    path = tmp_path / "p.npz"
    bases = [archive(columns()), archive(columns(), zipfile.ZIP_STORED)]
    check(lambda: read_proposals(path, IDS, *SIZES), path, damaged(bases), examples)


def header(dtype, shape):
    """A member that claims an array, and has none of its values."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


class Evil:
    """Raises KeyboardInterrupt, which nothing catches, where it is unpickled."""

    def __reduce__(self):
        return exec, ("raise KeyboardInterrupt",)


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def claims(kind, shape, values=b""):
    """A `.mat` whose first cell claims an array of a class and shape."""

    def matrix(flags, dims, name, *parts):
        head = element(6, struct.pack("<II", flags, 0)), element(5, struct.pack(f"<{len(dims)}i", *dims))
        return element(14, b"".join([*head, element(1, name), *parts]))

    cell = matrix(kind, shape, b"", values)
    cells = matrix(1, (1, 1), b"images", cell) + matrix(1, (1, 1), b"boxes", cell)
    return mat()[:128] + cells


GIANT = 10**12
BOMB = np.zeros(1 << 27, np.uint8)
FILES = {
    "giant ids.npz": lambda: archive(columns() | {"ids": header("<U6", (GIANT,))}),
    "ids of no bytes.npz": lambda: archive(columns() | {"ids": header("<U0", (GIANT,))}),
    "giant corners.npz": lambda: archive(columns() | {"x1": header("<u2", (GIANT,))}),
    "many axes.npz": lambda: archive(columns() | {"x1": header("<u2", (0, GIANT))}),
    "negative.npz": lambda: archive(columns() | {"x1": header("<u2", (-1,))}),
    "zip bomb.npz": lambda: archive(columns(x1=BOMB)),
    "objects.npz": lambda: archive(columns(ids=np.array([Evil()], object))),
    "pickle.npz": lambda: pickle.dumps(Evil()),
    "twice.npz": lambda: archive(columns(ids=np.array(["b", "000001", "b"]))),
    "wraps.npz": lambda: archive(columns(x1=np.array([2**32, 5, 1], np.uint64))),
    "offsets wrap.npz": lambda: archive(columns(offsets=np.array([0, 3, 2, 3], np.uint64))),
    "not whole.npz": lambda: archive(columns(x1=np.array([0, 0.5, 1]))),
    "nan.npz": lambda: archive(columns(x1=np.array([0, np.nan, 1]))),
    "complex.npz": lambda: archive(columns(x1=np.array([0, 1j, 1]))),
    "no cells.mat": lambda: claims(1, (1, 1)),
    "giant cells.mat": lambda: claims(1, (2**31 - 1, 2**31 - 1)),
    "giant text.mat": lambda: claims(4, (2**31 - 1, 2**31 - 1)),
    "giant numbers.mat": lambda: claims(6, (2**31 - 1, 2**31 - 1)),
    "giant struct.mat": lambda: claims(2, (2**31 - 1, 1)),
    "opaque.mat": lambda: claims(17, (1, 1), element(1, b"java")),
    "zlib bomb.mat": lambda: packed(mat() + element(14, b"\0" * (1 << 27))),
    "half.mat": lambda: packed(mat())[:-9],
    "hdf5.mat": lambda: b"\x89HDF" + bytes(400),
    "big-endian.mat": lambda: mat()[:126] + b"MI" + mat()[128:],
}


@pytest.mark.parametrize("name", FILES)
def test_giants_pickles_and_bombs_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name]())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"{name} holds no proposals \(") as error:
            read_proposals(path, IDS, *SIZES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
