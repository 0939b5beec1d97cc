"""Images in a folder per class: how they are found, and the batches of crops of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.demo import make_demo_folders
from experiments.data.folders import BAD, FolderBatches, Images, centres, read_folders, whole_images
from experiments.data.images import ImageCache

NAMES = {"train": "train", "val": "val"}
MEAN = (1.0, 2.0, 3.0)
CPU = torch.device("cpu")


def make(folder, count, first=0):
    """`count` images of one grey value each, in steps of 4 from `first` on; of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        value = first + 4 * number
        Image.new("RGB", (30 + number, 24), (value, value, value)).save(folder / f"{number:03d}.PNG")


def read(root):
    return read_folders({"root": str(root), **NAMES})


def values(folders):
    """The grey value of each image and its class."""
    grey = [np.asarray(Image.open(path)).mean() for path in folders.paths]
    return [(value, folders.classes[label]) for value, label in zip(grey, folders.labels.tolist(), strict=True)]


# How they are found.


def test_a_folder_per_class(tmp_path):
    for part, first in (("train", 0), ("val", 100)):
        make(tmp_path / part / "b", 3, first)
        make(tmp_path / part / "a" / "images", 2, first + 50)  # as Tiny ImageNet nests them
        (tmp_path / part / "b" / "boxes.txt").write_text("no image")
    training, validation = read(tmp_path)
    assert training.classes == validation.classes == ["a", "b"]
    assert values(training) == [(50, "a"), (54, "a"), (0, "b"), (4, "b"), (8, "b")]
    assert values(validation) == [(150, "a"), (154, "a"), (100, "b"), (104, "b"), (108, "b")]


def test_tiny_imagenet_as_it_is_published(tmp_path):
    for name in ("n02", "n01"):
        make(tmp_path / "train" / name / "images", 2)
    make(tmp_path / "val" / "images", 3)
    rows = ["000.PNG\tn02\t0\t0\t9\t9", "001.PNG\tn01\t0\t0\t9\t9", "002.PNG\tn02\t0\t0\t9\t9"]
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("\n".join(rows) + "\n")
    _, validation = read(tmp_path)
    assert values(validation) == [(4, "n01"), (0, "n02"), (8, "n02")]

    for text, message in (
        ("", "lists no images"),
        ("000.PNG\n", r"lists the line \['000.PNG'\]"),
        ("004.PNG\tn01\n", "lists images/004.PNG, which is missing"),
    ):
        annotations.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
    annotations.write_text(rows[0])
    with pytest.raises(ValueError, match="of which 1 are in one only, such as n01"):
        read(tmp_path)


def test_without_a_division_every_fifth_of_a_class_validates(tmp_path):
    make(tmp_path / "a", 7)
    make(tmp_path / "b", 11, 100)
    training, validation = read(tmp_path)
    assert values(validation) == [(16, "a"), (116, "b"), (136, "b")]
    assert sorted(values(training) + values(validation)) == sorted(
        [(4 * n, "a") for n in range(7)] + [(100 + 4 * n, "b") for n in range(11)]
    )
    make(tmp_path / "c", 4)
    with pytest.raises(ValueError, match="class c has less than 5 images"):
        read(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images in .*/none, which is no folder: set data\.root"):
        read(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no classes, it has no folders: set data\.root"):
        read(tmp_path)
    make(tmp_path / "train" / "a", 2)
    with pytest.raises(FileNotFoundError, match="/val is missing"):
        read(tmp_path)
    make(tmp_path / "val", 3)
    with pytest.raises(FileNotFoundError, match="/val has no classes, 3 images lie in it, sorted into no classes"):
        read(tmp_path)
    make(tmp_path / "val" / "b", 2)
    with pytest.raises(
        ValueError, match=r"has 1 classes and .* 1, of which 2 are in one only, such as a, b: both need"
    ):
        read(tmp_path)
    make(tmp_path / "val" / "a", 2)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"/train: .*no valid file for the classes b.* Add images"):
        read(tmp_path)


# Batches.


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A generated set: 20 classes, 40 training and 10 validation images each."""
    return read(make_demo_folders(tmp_path_factory.mktemp("folders") / "set"))


@pytest.fixture
def images(some, tmp_path):
    """The first `count` training images."""

    def build(count=60, short=40, cache=tmp_path / "cache"):
        return Images(some[0].paths[:count], short, cache, tmp_path / "bad.txt")

    return build


PIXELS = {"mean": MEAN, "scale": 1}
OPTIONS = {"parts": 1, "rank": 0, "world": 1, "seed": 0, "size": 32, "mirror": True, "workers": 0} | PIXELS


def batches_of(images, labels=None, **changes):
    labels = torch.arange(len(images)) if labels is None else labels
    return FolderBatches(images, labels, **{"batch_size": 12, "device": CPU} | OPTIONS | changes)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_epoch_shows_every_image_once(images):
    batches = batches_of(images(65))
    orders = [torch.cat([batches(5 * epoch + step)[1] for step in range(5)]).tolist() for epoch in range(3)]
    assert all(len({*order}) == 60 for order in orders)  # five sit out
    assert len({tuple(order) for order in orders}) == 3
    assert batches(0)[0].shape == (12, 3, 32, 32)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_crops_are_pixels_of_the_image_as_they_are(images, device):
    some = images()
    seen = {False: 0, True: 0}
    for number in range(3):
        inputs, labels = batches_of(some, device=torch.device(device))(number)
        assert inputs.device.type == labels.device.type == device
        for crop, label in zip(inputs.cpu(), labels, strict=True):
            pixels = some.pixels(label.item()).flip(2).permute(2, 0, 1).float() - torch.tensor(MEAN)[:, None, None]
            windows = pixels.unfold(1, 32, 1).unfold(2, 32, 1)
            plain, turned = (
                (windows == other[:, None, None]).all(-1).all(-1).all(0).any() for other in (crop, crop.flip(2))
            )
            assert plain or turned
            seen[bool(turned)] += 1
    assert min(seen.values()) > 5
    positions = batches_of(some, mirror=False)
    assert not same(positions(0), positions(5))


def test_mirroring_is_an_option(images):
    one, other = batches_of(images()), batches_of(images(), mirror=False)
    equal = torch.tensor([torch.equal(a, b) for a, b in zip(one(0)[0], other(0)[0], strict=True)])
    turned = torch.tensor([torch.equal(a.flip(2), b) for a, b in zip(one(0)[0], other(0)[0], strict=True)])
    assert (equal ^ turned).all()
    assert 0 < turned.sum() < 12


def test_a_batch_depends_on_seed_and_number_alone(images):
    one, other = batches_of(images()), batches_of(images())
    in_order = [one(number) for number in range(7)]
    for number in (6, 0, 4, 3, 5):
        assert same(in_order[number], other(number))
    reseeded = batches_of(images(), seed=1)
    assert not any(same(in_order[number], reseeded(number)) for number in range(7))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_how_images_are_read_makes_no_difference(images, workers, cached):
    found = images() if cached else images(cache=None)
    assert (found.cache is None) != cached
    batches, expected = batches_of(found, workers=workers), batches_of(images())
    assert all(same(batches(number), expected(number)) for number in (0, 1, 2, 9, 10))


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_however_a_step_is_divided_it_is_the_same(images, world, parts):
    whole = batches_of(images(65))
    divided = [batches_of(images(65), world=world, rank=rank, parts=parts) for rank in range(world)]
    for step in range(7):
        pieces = [batches(step * parts + part) for part in range(parts) for batches in divided]
        inputs, labels = (torch.cat(found) for found in zip(*pieces, strict=True))
        order, expected = labels.argsort(), whole(step)[1].argsort()
        assert same((inputs[order], labels[order]), tuple(found[expected] for found in whole(step)))


def test_what_cannot_be_divided_is_refused(images):
    with pytest.raises(ValueError, match=r"60 images do not fill a batch of 64: lower train\.batch_size"):
        batches_of(images(), batch_size=64)
    with pytest.raises(ValueError, match=r"train\.batch_size=12 cannot be divided by 4 process\(es\) times .*=2"):
        batches_of(images(), world=4, parts=2)
    with pytest.raises(ValueError, match=r"crops of 41 pixels do not fit images of 40: raise data\.short"):
        batches_of(images(), size=41)


def test_the_middles_of_all_images_are_tested(images):
    some = images(25)
    expected = list(centres(some, batch_size=10, size=32, **PIXELS, workers=0, device=CPU, rank=0, world=1))
    assert torch.cat([index for index, *_ in expected]).tolist() == list(range(25))
    for index, inputs, _ in expected:
        for i, crop in zip(index.tolist(), inputs, strict=True):
            pixels = some.pixels(i).flip(2).permute(2, 0, 1)
            top, left = ((side - 32) // 2 for side in pixels.shape[1:])
            assert torch.equal(
                crop, pixels[:, top : top + 32, left : left + 32].float() - torch.tensor(MEAN)[:, None, None]
            )
    parts = [
        list(centres(some, batch_size=4, size=32, **PIXELS, workers=2, device=CPU, rank=rank, world=3))
        for rank in range(3)
    ]
    found = {
        i: crop for part in parts for index, inputs, _ in part for i, crop in zip(index.tolist(), inputs, strict=True)
    }
    assert sorted(found) == list(range(25))
    assert all(torch.equal(found[i], crop) for i, crop in enumerate(torch.cat([inputs for _, inputs, _ in expected])))


def test_whole_images_are_squashed(images):
    some = images(5)
    found = whole_images(some, torch.tensor([3, 1]), 16, **PIXELS)
    assert found.shape == (2, 3, 16, 16)
    mean = some.pixels(3).float().mean((0, 1)).flip(0) - torch.tensor(MEAN)
    torch.testing.assert_close(found[0].mean((1, 2)), mean, atol=5, rtol=0)


def test_inputs_of_every_kind_are_multiplied_by_the_scale(images):
    some, scaled = images(25), PIXELS | {"scale": 0.04}
    parts = {"batch_size": 25, "size": 32, "workers": 0, "device": CPU, "rank": 0, "world": 1}
    one, other = (torch.cat([inputs for _, inputs, _ in centres(some, **parts, **p)]) for p in (PIXELS, scaled))
    torch.testing.assert_close(other, 0.04 * one)
    one, other = (batches_of(some, **p)(3)[0] for p in (PIXELS, scaled))
    torch.testing.assert_close(other, 0.04 * one)
    one, other = (whole_images(some, torch.arange(9), 16, **p) for p in (PIXELS, scaled))
    torch.testing.assert_close(other, 0.04 * one)


# Images that cannot be decoded.


@pytest.fixture
def damaged(some, tmp_path):
    """Twenty images, the third cut off, the eighth no image and the twelfth gone."""
    paths = []
    for number, path in enumerate(some[0].paths[:20]):
        content = Path(path).read_bytes()
        content = content[: len(content) // 2] if number == 2 else b"no image" if number == 7 else content
        paths.append(str(tmp_path / f"{number}.jpg"))
        if number != 11:
            (tmp_path / f"{number}.jpg").write_bytes(content)
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_once_and_left_out(damaged, tmp_path, workers, capsys):
    some = Images(damaged, 40, None, tmp_path / "bad.txt")
    batches = batches_of(some, batch_size=10, workers=workers)
    labels = torch.cat([batches(step)[1] for step in range(8)])
    assert (labels == BAD).sum() == 3 * 4
    assert {*labels.tolist()} == {*range(20)} - {2, 7, 11} | {BAD}
    bad = [damaged[n] for n in (2, 7, 11)]
    assert sorted((tmp_path / "bad.txt").read_text().splitlines()) == sorted(bad)
    errors = capsys.readouterr().err
    assert all(errors.count(f"cannot decode the image {path}: left out") == 1 for path in bad)
    for inputs, found in map(batches, range(2)):
        assert inputs.isfinite().all()
        assert inputs[found == BAD].flatten(2).std(2).max() == 0  # nothing is in them
    assert len(whole_images(some, torch.arange(20), 16, **PIXELS)) == 17
    assert torch.cat(
        [b for *_, b in centres(some, batch_size=4, size=32, **PIXELS, workers=0, device=CPU, rank=0, world=1)]
    ).nonzero()[:, 0].tolist() == [2, 7, 11]


def test_bad_images_are_kept_out_of_a_cache_too(damaged, tmp_path, capsys):
    Path(damaged[11]).touch()
    for _ in range(2):  # the second time the cache is there
        some = Images(damaged, 40, tmp_path / "cache", tmp_path / "bad.txt")
        batches = batches_of(some, batch_size=10)
        labels = torch.cat([batches(step)[1] for step in range(2)])
        assert {*labels.tolist()} == {*range(20)} - {2, 7, 11} | {BAD}
        assert capsys.readouterr().err.count("cannot decode the image") == 3


def test_a_cache_belongs_to_its_size(some, tmp_path):
    paths = [*map(Path, some[0].paths[:5])]
    small, large = (ImageCache.open(paths, tmp_path, short) for short in (40, 48))
    assert torch.minimum(small.heights, small.widths).tolist() == [40] * 5
    assert torch.minimum(large.heights, large.widths).tolist() == [48] * 5
    assert ImageCache.open(paths, tmp_path).heights.max() > 48
    shape = np.asarray(Image.open(paths[0])).shape[:2]
    scale = 40 / min(shape)
    assert small.image(0).shape[:2] == tuple(round(scale * side) for side in shape)
