"""Proposals: files read and refused, selective search that goes on after a kill, recall."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from detection import Proposals, compute_proposals, proposals, read_proposals, recall

IDS = ["000001", "000003", "000004"]
SIZES = torch.tensor([40, 50, 60]), torch.tensor([80, 70, 60])  # heights, widths


def save(path, ids=IDS, offsets=(0, 2, 2, 3), boxes=((0, 0, 79, 39), (5, 6, 7, 8), (1, 1, 1, 1)), **more):
    columns = dict(zip(("x1", "y1", "x2", "y2"), np.array(boxes, np.uint16).T, strict=True))
    np.savez(path, ids=np.array(ids), offsets=np.array(offsets), **(columns | more))
    return path


def test_files_in_any_order_of_images(tmp_path):
    path = save(tmp_path / "a.npz", ids=["000004", "000009", "000001"])
    found = read_proposals(path, ["000001", "000009"], *(torch.tensor([90, 90]),) * 2)
    assert len(found) == 2
    assert found[0].tolist() == [[1, 1, 1, 1]]
    assert found[1].tolist() == []


def test_girshicks_files(tmp_path):
    """y1 x1 y2 x2 from 1, a cell for each image."""
    boxes, images = np.empty((1, 3), object), np.empty((3, 1), object)
    for row, (image_id, found) in enumerate(
        zip(IDS, ([[1, 1, 40, 80], [7, 6, 9, 8]], [], [[2, 2, 2, 2]]), strict=True)
    ):
        images[row, 0], boxes[0, row] = image_id, np.array(found, float).reshape(-1, 4)
    savemat(tmp_path / "a.mat", {"images": images, "boxes": boxes})
    one, other = (read_proposals(path, IDS, *SIZES) for path in (tmp_path / "a.mat", save(tmp_path / "a.npz")))
    assert torch.equal(one.boxes, other.boxes)
    assert torch.equal(one.offsets, other.offsets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["000001", "000003", "000005"]}, r"no proposals for image 000004 \(1 of 3 images are not in it\)"),
        ({"boxes": ((0, 0, 80, 39), (5, 6, 7, 8), (1, 1, 1, 1))}, r"image 000001, which has 80 x 40 pixels, has the "
         r"proposal \[0, 0, 80, 39\], outside of the image"),
        ({"boxes": ((0, 0, 79, 39), (5, 6, 7, 8), (3, 1, 2, 1))}, r"image 000004, .* \[3, 1, 2, 1\], of no area"),
        ({"offsets": (0, 2, 3)}, "its offsets do not fit"),
        ({"offsets": (0, 3, 2, 3)}, "its offsets do not fit"),
        ({"x1": np.array(["a", "b", "c"])}, "holds no proposals"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_proposals(save(tmp_path / "a.npz", **change), IDS, *SIZES)


@settings(max_examples=50)
@given(st.binary(max_size=200), st.sampled_from(["npz", "mat"]))
def test_files_of_anything(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"anything.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no proposals"):
        read_proposals(path, IDS, *SIZES)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_proposals(tmp_path / "absent.npz", IDS, *SIZES)


@pytest.fixture
def images(tmp_path):
    paths = []
    for number in range(5):
        pixels = np.full((60, 80, 3), 40, np.uint8)
        pixels[10:40, 5 + 5 * number : 40 + 5 * number] = (200, 30 * number, 90)
        paths.append(tmp_path / f"00000{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.mark.slow
def test_selective_search_goes_on_where_it_was_killed(images, tmp_path, monkeypatch):
    monkeypatch.setattr(proposals, "PART", 2)
    whole, parts = tmp_path / "whole.npz", tmp_path / "sub" / "parts.npz"
    compute_proposals(images, whole)
    found = read_proposals(whole, [path.stem for path in images], *(torch.full((5,), size) for size in (60, 80)))
    objects = [torch.tensor([[5.0 + 5 * number, 10, 39 + 5 * number, 39]]) for number in range(5)]
    assert recall(found, objects, 0.9) == 1
    assert all(torch.equal(found[i].unique(dim=0), found[i]) for i in range(5))

    broken = [*images[:4], tmp_path / "broken.png"]
    broken[4].write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot decode the image .*broken.png"):
        compute_proposals(broken, parts)
    assert sorted(path.name for path in parts.parent.glob("*.npy")) == ["parts.000000.npy", "parts.000002.npy"]
    searched = []
    monkeypatch.setattr(proposals.multiprocessing, "get_context", lambda _: Serial(searched))
    compute_proposals(images, parts)
    assert searched == images[4:]
    with np.load(whole) as one, np.load(parts) as other:
        assert all(np.array_equal(one[name], other[name]) for name in one.files)
    assert not list(parts.parent.glob("*.npy"))


class Serial:
    """In the place of multiprocessing: keeps a list of what is searched."""

    def __init__(self, searched):
        self.searched = searched

    def Pool(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def imap(self, function, items):
        self.searched += items
        return map(function, items)


def test_recall():
    found = Proposals(torch.tensor([[0, 0, 9, 9], [0, 0, 19, 9]]), torch.tensor([0, 2, 2]))
    objects = [torch.tensor([[0.0, 0, 11, 9], [50, 50, 59, 59]]), torch.tensor([[0.0, 0, 9, 9]])]
    assert recall(found, objects, 0.5) == pytest.approx(1 / 3)
    assert recall(found, objects, 10 / 12) == pytest.approx(1 / 3)
    assert recall(found, objects, 0.84) == 0
