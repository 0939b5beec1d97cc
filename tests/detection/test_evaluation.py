"""Average precision against a slow implementation of the devkit's rules, and its text files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection import Detections, Truth, coco_ap, voc_ap, write_detections

CLASSES = 3


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (areas[0] + areas[1] - width * height)


def slow_curve(detections, truth, number):
    """Recall and precision after each detection that counts, by VOCevaldet.m."""
    total = sum(
        1 for image in truth for c, hard in zip(image.classes, image.difficult, strict=True) if c == number and not hard
    )
    rows = [i for i in range(len(detections.scores)) if detections.classes[i] == number]
    rows.sort(key=lambda i: -detections.scores[i].item())
    taken, right, wrong, curve = set(), 0, 0, []
    for row in rows:
        image = detections.images[row].item()
        best, where = -math.inf, None
        for j, box in enumerate(truth[image].boxes.tolist()):
            if truth[image].classes[j] == number and overlap(detections.boxes[row].tolist(), box) > best:
                best, where = overlap(detections.boxes[row].tolist(), box), j
        if best >= 0.5:
            if truth[image].difficult[where]:
                continue
            if (image, where) in taken:
                wrong += 1
            else:
                right += 1
                taken.add((image, where))
        else:
            wrong += 1
        curve.append((right / total if total else math.nan, right / (right + wrong)))
    return total, curve


def slow_ap(total, curve):
    if not total:
        return math.nan, math.nan
    highest = [max((p for r, p in curve if r >= k / 10), default=0) for k in range(11)]
    area, last = 0, 0
    for recall in sorted({r for r, _ in curve}):
        area += (recall - last) * max(p for r, p in curve if r >= recall)
        last = recall
    return sum(highest) / 11, area


def draw(seed, images=4):
    """Objects on a coarse grid, and detections near them and elsewhere: ties, duplicates, difficult objects."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner, size = rng.integers(0, 5, (count, 2)) * 6, rng.integers(1, 4, (count, 2)) * 6
        return torch.tensor(np.concatenate([corner, corner + size - 1], 1)).float()

    truth, found = [], []
    for _ in range(images):
        count = int(rng.integers(0, 4))
        truth.append(
            Truth(boxes(count), torch.tensor(rng.integers(0, 2, count)), torch.tensor(rng.random(count) < 0.3))
        )
        near = truth[-1].boxes[rng.integers(0, count, 3 * count)] if count else torch.zeros(0, 4)
        near = near + torch.tensor(rng.integers(-1, 2, near.shape))
        candidates = torch.cat([near, boxes(3), near[:1]])
        scores = torch.tensor(rng.integers(0, 5, len(candidates)) / 4).float()
        found.append((candidates, scores, torch.tensor(rng.integers(0, CLASSES, len(candidates)))))
    return Detections.of(found), truth


@settings(max_examples=300)
@given(st.integers(0, 10**9))
def test_average_precision_by_the_rules_of_the_devkit(seed):
    detections, truth = draw(seed)
    expected = [slow_ap(*slow_curve(detections, truth, number)) for number in range(CLASSES)]
    if all(math.isnan(value) for value, _ in expected):
        with pytest.raises(ValueError, match="no image has an object that counts"):
            voc_ap(detections, truth, CLASSES)
        return
    found = voc_ap(detections, truth, CLASSES)
    np.testing.assert_allclose(found["voc11"], [value for value, _ in expected], atol=1e-12)
    np.testing.assert_allclose(found["area"], [value for _, value in expected], atol=1e-12)
    assert found["map_voc11"] == pytest.approx(np.nanmean(found["voc11"]))
    assert math.isnan(found["voc11"][2])  # there are no objects of the last class


def test_detections_in_any_order():
    detections, truth = draw(3)
    shuffled = torch.randperm(len(detections.scores))
    ranks = detections.scores + torch.rand(len(shuffled)) / 100  # without ties, which keep their order
    fields = (detections.images, detections.classes, detections.boxes, ranks)
    one, other = (
        voc_ap(Detections(*(f[o] for f in fields)), truth, CLASSES) for o in (torch.arange(len(ranks)), shuffled)
    )
    np.testing.assert_array_equal(one["area"], other["area"])


def perfect(truth):
    return Detections.of([(image.boxes, torch.ones(len(image.boxes)), image.classes) for image in truth])


def test_perfect_detections():
    _, truth = draw(5)
    found = voc_ap(perfect(truth), truth, 2)
    assert found["map_voc11"] == found["map_area"] == 1
    assert coco_ap(perfect(truth), truth, 2) == pytest.approx({"coco_ap": 1, "coco_ap50": 1})
    nothing = Detections.of([(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()) for _ in truth])
    assert voc_ap(nothing, truth, 2)["map_area"] == 0
    assert coco_ap(nothing, truth, 2) == {"coco_ap": 0, "coco_ap50": 0}


def test_coco_agrees_about_an_overlap_of_a_half():
    """Its precision at 101 recalls, of many objects without difficult ones, is close to the area."""
    generator = torch.Generator().manual_seed(0)
    truth, found = [], []
    for _ in range(60):
        corner = torch.rand(6, 2, generator=generator) * 200
        boxes = torch.cat([corner, corner + 20 + 40 * torch.rand(6, 2, generator=generator)], 1)
        classes = torch.randint(0, CLASSES, (6,), generator=generator)
        truth.append(Truth(boxes, classes, torch.zeros(6, dtype=torch.bool)))
        moved = boxes + 8 * torch.randn(6, 4, generator=generator)
        found.append((moved, torch.rand(6, generator=generator), classes))
    detections = Detections.of(found)
    expected = voc_ap(detections, truth, CLASSES)["map_area"]
    assert 0.2 < expected < 0.9
    assert coco_ap(detections, truth, CLASSES)["coco_ap50"] == pytest.approx(expected, abs=0.02)


def test_text_files(tmp_path):
    boxes = torch.tensor([[0.0, 1, 10, 20], [2.25, 3, 4, 5], [5, 5, 6, 6]])
    detections = Detections(torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), boxes, torch.tensor([0.5, 0.25, 1]))
    paths = write_detections(tmp_path, "val", ["000001", "000007"], ["cat", "dog", "cow"], detections)
    assert [path.name for path in paths] == [f"comp4_det_val_{name}.txt" for name in ("cat", "dog", "cow")]
    assert paths[0].read_text() == "000007 0.500000 1.0 2.0 11.0 21.0\n000001 0.250000 3.2 4.0 5.0 6.0\n"
    assert paths[1].read_text() == "000007 1.000000 6.0 6.0 7.0 7.0\n"
    assert paths[2].read_text() == ""
