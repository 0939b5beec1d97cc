"""Batches of whole images with RoIs."""

import numpy as np
import pytest
import torch
from PIL import Image

from detection import Proposals, make_rois
from detection.boxes import mirror
from experiments.data.images import ImageCache
from experiments.data.regions import RoIBatches, images_with_rois, scale_of, scaled

MEAN = (10.0, 20.0, 30.0)
SIZES = [(60, 80), (90, 50), (64, 64), (70, 100), (50, 60)]


@pytest.fixture
def cache(tmp_path):
    rng, paths = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(paths[-1])
    return ImageCache.open(paths, tmp_path)


@pytest.fixture
def rois():
    """An object and proposals about it in all but the last image, which has no object."""
    objects = [(torch.tensor([[10.0, 10, 39, 39]]), torch.tensor([number])) for number in range(4)]
    objects.append((torch.zeros(0, 4), torch.zeros(0).long()))
    box = torch.tensor([[10, 10, 39, 39]])
    steps = torch.tensor([[x, y, x, y] for x in range(-8, 9, 2) for y in range(-8, 9, 2)])
    boxes = (box + steps).repeat(5, 1)
    return make_rois(Proposals(boxes.int(), torch.arange(6) * len(steps)), objects)


def batches(cache, rois, **options):
    options = {
        **{"images": 2, "per_batch": 16, "foreground": 0.25, "scales": [40, 60], "longest": 90, "seed": 0},
        **{"statistics": rois.target_statistics(20), "mean": MEAN, **options},
    }
    return RoIBatches(cache, rois, **options)


def test_scales():
    assert scale_of(300, 500, 600, 1000) == 2
    assert scale_of(500, 300, 600, 1000) == 2
    assert scale_of(300, 900, 600, 1000) == pytest.approx(1000 / 900)


def test_an_image_at_another_scale(cache):
    height, width = SIZES[1]
    whole = scaled(cache, 1, 1.0, MEAN)
    start = int(cache.offsets[1])
    expected = cache.pixels[start : start + height * width].view(height, width, 3).permute(2, 0, 1).flip(0).float()
    torch.testing.assert_close(whole, expected - torch.tensor(MEAN).view(3, 1, 1))  # BGR
    assert scaled(cache, 1, 1.5, MEAN).shape == (3, 135, 75)
    half = scaled(cache, 1, 0.5, MEAN)
    torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(whole, 2), atol=1e-3, rtol=0)


def test_a_batch(cache, rois):
    (images, boxes), (labels, targets) = batches(cache, rois)(3)
    assert images.shape[:2] == (2, 3)
    assert boxes.shape == targets.shape == (2, 8, 4)
    assert labels.shape == (2, 8)
    assert ((labels > 0).sum(1) == 2).all()
    for a, b in zip(batches(cache, rois)(3), batches(cache, rois)(3), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for other in (batches(cache, rois)(4), batches(cache, rois, seed=1)(3)):
        assert not torch.equal(other[0][1], boxes)


def test_an_epoch_shows_every_image_as_it_is_and_mirrored(cache, rois):
    every, seen = batches(cache, rois, scales=[50], per_batch=200), []
    mean, std = rois.target_statistics(20)
    for step in range(4):
        (images, boxes), (labels, targets) = every(step)
        for i in range(2):
            number = int(labels[i].max()) - 1  # image k has objects of class k alone
            height, width = SIZES[number]
            scale = 50 / min(height, width)
            picture = scaled(cache, number, scale, MEAN)
            shown = images[i, :, : picture.shape[1], : picture.shape[2]]
            mirrored = not torch.equal(shown, picture)
            torch.testing.assert_close(shown, picture.flip(2) if mirrored else picture)
            assert not images[i, :, picture.shape[1] :].any()
            assert not images[i, :, :, picture.shape[2] :].any()
            seen.append((number, mirrored))

            on = labels[i] > 0
            found = boxes[i][on] / scale
            moved = targets[i][on] * std[number + 1] + mean[number + 1]
            centre = (found[:, :2] + found[:, 2:] + 1) / 2 + moved[:, :2] * (found[:, 2:] - found[:, :2] + 1)
            target = torch.tensor([10.0, 10, 39, 39])
            target = mirror(target, width) if mirrored else target
            torch.testing.assert_close(centre, ((target[:2] + target[2:] + 1) / 2).expand_as(centre), atol=1e-3, rtol=0)
    assert sorted(seen) == [(number, mirrored) for number in range(4) for mirrored in (False, True)]
    assert every(4)[0][0].shape[:2] == (2, 3)  # the next epoch


def test_nothing_to_train_on(cache):
    empty = [(torch.zeros(0, 4), torch.zeros(0).long())] * 5
    rois = make_rois(Proposals(torch.zeros(0, 4).int(), torch.zeros(6).long()), empty)
    with pytest.raises(ValueError, match="0 of 5 images have proposals that overlap"):
        batches(cache, rois)


def test_what_is_initialized_on(cache, rois):
    options = {"each": 6, "size": 48, "foreground": 0.5, "mean": MEAN, "seed": 0}
    images, boxes = images_with_rois(cache, rois, images=4, **options)
    assert images.shape == (4, 3, 48, 48)
    assert boxes.shape == (4, 6, 4)
    assert boxes.min() >= 0
    assert boxes.max() < 48
    sizes = {(round(48 / w, 4), round(48 / h, 4)) for h, w in SIZES[:4]}
    for found in boxes:  # all proposals are squares of 30 pixels
        across, down = ((found[:, 2:] - found[:, :2]) / 29).unbind(1)
        assert any((across - a).abs().max() < 1e-3 and (down - d).abs().max() < 1e-3 for a, d in sizes)
    with pytest.raises(ValueError, match=r"init.images=5, but there are only 4 images to choose from"):
        images_with_rois(cache, rois, images=5, **options)
