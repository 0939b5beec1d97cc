"""Boxes: overlaps and suppression that count both corners, and deltas there and back."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from detection.boxes import clip, decode, encode, iou, mirror, nms


def random_boxes(count, seed, size=60):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, size, (count, 2, 2), generator=generator)
    return torch.cat([corners.amin(1), corners.amax(1)], 1).double()


def slow_iou(a, b):
    """On the pixels."""
    grid = np.zeros((2, 64, 64), bool)
    for layer, (x1, y1, x2, y2) in zip(grid, (a.int().tolist(), b.int().tolist()), strict=True):
        layer[y1 : y2 + 1, x1 : x2 + 1] = True
    return (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()


@given(st.integers(0, 10**6))
def test_overlaps_count_both_corners(seed):
    one, other = random_boxes(4, seed), random_boxes(3, seed + 1)
    expected = [[slow_iou(a, b) for b in other] for a in one]
    torch.testing.assert_close(iou(one, other), torch.tensor(expected, dtype=torch.float64))


def test_torchvision_alone_counts_one_less():
    one, other = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[5.0, 0, 14, 9]])
    assert iou(one, other).item() == pytest.approx(50 / 150)
    assert torchvision.ops.box_iou(one, other).item() == pytest.approx(36 / 126)
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert iou(point, point).item() == 1
    assert torchvision.ops.box_iou(point, point).isnan()


def slow_nms(boxes, scores, classes, threshold):
    left, kept = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    while left:
        best, *left = left
        kept.append(best)
        left = [i for i in left if classes[i] != classes[best] or slow_iou(boxes[i], boxes[best]) <= threshold]
    return kept


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.5]))
def test_suppression(seed, threshold):
    boxes = random_boxes(20, seed, size=20)
    generator = torch.Generator().manual_seed(seed)
    scores, classes = torch.randperm(20, generator=generator).double(), torch.randint(3, (20,), generator=generator)
    kept = nms(boxes.float(), scores.float(), classes, threshold)
    assert kept.tolist() == slow_nms(boxes, scores.tolist(), classes.tolist(), threshold)


def test_suppression_of_many_boxes_keeps_classes_apart():
    """Where torchvision moves the classes apart by more than float32 can tell."""
    boxes = (4000 + random_boxes(2000, 0, size=8)).float()
    scores, classes = torch.randperm(2000).float(), torch.arange(2000) % 20
    kept = nms(boxes, scores, classes, 0.3)
    for number in range(20):
        own = (classes == number).nonzero().flatten()
        expected = own[nms(boxes[own], scores[own], torch.zeros(len(own)).long(), 0.3)]
        assert kept[classes[kept] == number].tolist() == expected.tolist()


@given(st.integers(0, 10**6))
def test_deltas_there_and_back(seed):
    rois, targets = random_boxes(8, seed), random_boxes(8, seed + 1)
    torch.testing.assert_close(decode(rois, encode(rois, targets)), targets)
    assert encode(rois, rois).abs().max() == 0


def test_deltas_by_hand():
    deltas = encode(torch.tensor([[0.0, 0, 9, 19]]), torch.tensor([[5.0, 5, 24, 14]]))
    # Centres (5, 10) and (15, 10); sizes 10 x 20 and 20 x 10.
    torch.testing.assert_close(deltas, torch.tensor([[1.0, 0, np.log(2), -np.log(2)]]).float())


def test_a_prediction_far_off_stays_finite():
    boxes = decode(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[0.0, 0, 1e4, 1e4]]))
    assert boxes.isfinite().all()
    assert clip(boxes, 30, 40).tolist() == [[0, 0, 39, 29]]


@given(st.integers(0, 10**6), st.integers(60, 90))
def test_mirrored_images(seed, width):
    boxes, targets = random_boxes(5, seed), random_boxes(5, seed + 1)
    assert torch.equal(mirror(mirror(boxes, width), width), boxes)
    expected = encode(boxes, targets) * torch.tensor([-1, 1, 1, 1])
    torch.testing.assert_close(encode(mirror(boxes, width), mirror(targets, width)), expected)
