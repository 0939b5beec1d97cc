"""RoIs: what they are to become, and the draw of a batch."""

import pytest
import torch

from detection import Proposals, make_rois, sample_rois
from detection.boxes import decode, iou, mirror
from detection.sampling import IGNORED


def world(images=6, seed=0):
    """Proposals around one to three objects, and elsewhere; the last image has no objects."""
    generator = torch.Generator().manual_seed(seed)
    objects, parts = [], []
    for image in range(images):
        count = 0 if image == images - 1 else int(torch.randint(1, 4, (), generator=generator))
        corner = torch.randint(0, 60, (count, 2), generator=generator)
        boxes = torch.cat([corner, corner + torch.randint(10, 40, (count, 2), generator=generator)], 1).float()
        objects.append((boxes, torch.randint(0, 3, (count,), generator=generator)))
        near = boxes.repeat(30, 1).int() + torch.randint(-8, 9, (30 * count, 4), generator=generator)
        corner = torch.randint(0, 90, (40, 2), generator=generator)
        parts.append(torch.cat([near, torch.cat([corner, corner + 9], 1)]))
    offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
    return make_rois(Proposals(torch.cat(parts).int(), offsets), objects), objects


def test_rois_by_a_loop():
    rois, objects = world()
    for image, (boxes, classes) in enumerate(objects):
        first, last = rois.offsets[image], rois.offsets[image + 1]
        torch.testing.assert_close(rois.boxes[first : first + len(boxes)], boxes)  # objects join the proposals
        assert torch.equal(rois.labels[first : first + len(boxes)], classes + 1)
        for row in range(first, last):
            overlaps = iou(rois.boxes[row : row + 1], boxes)[0].tolist()
            best = max(overlaps, default=0)
            assert rois.overlaps[row] == pytest.approx(best)
            if best < 0.5:
                assert rois.labels[row] == 0
                assert not rois.targets[row].any()
            else:
                which = overlaps.index(best)
                assert rois.labels[row] == classes[which] + 1
                torch.testing.assert_close(decode(rois.boxes[row], rois.targets[row]), boxes[which])
    assert rois.usable().tolist() == list(range(len(objects) - 1))


def test_statistics_by_a_loop():
    rois, _ = world()
    mean, std = rois.target_statistics(4)
    for label in range(1, 4):
        targets = rois.targets[(rois.labels == label) & (rois.overlaps >= 0.5)]
        both = torch.cat([targets, targets * torch.tensor([-1, 1, 1, 1])])  # mirrored images too
        torch.testing.assert_close(mean[label], both.mean(0), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(std[label], both.std(0, correction=0), atol=1e-6, rtol=1e-4)
    assert mean[[0, 4]].eq(0).all()
    assert std[[0, 4]].eq(1).all()


@pytest.mark.parametrize("count", [16, 64, 400])
def test_a_quarter_are_on_objects_and_none_comes_twice(count):
    rois, _ = world()
    generator = torch.Generator().manual_seed(0)
    for image in rois.usable().tolist():
        overlaps = rois.overlaps[rois.offsets[image] : rois.offsets[image + 1]]
        on, off = (overlaps >= 0.5).sum(), ((overlaps >= 0.1) & (overlaps < 0.5)).sum()
        index, labels = sample_rois(rois, image, count, 0.25, generator)
        assert index.shape == labels.shape == (count,)
        valid = labels != IGNORED
        assert (labels > 0).sum() == min(count // 4, on)
        assert (labels == 0).sum() == min(count - min(count // 4, on), off)
        drawn = index[valid]
        assert len(drawn.unique()) == len(drawn)
        assert ((drawn >= rois.offsets[image]) & (drawn < rois.offsets[image + 1])).all()
        assert torch.equal(rois.labels[drawn], labels[valid])
        assert (rois.overlaps[drawn] >= 0.1).all()
        assert (index[~valid] == index[0]).all()


def test_every_roi_is_drawn_as_often():
    rois, _ = world()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(rois.boxes))
    for _ in range(2000):
        counts[sample_rois(rois, 0, 8, 0.25, generator)[0]] += 1
    overlaps = rois.overlaps[: rois.offsets[1]]
    for chosen, share in ((overlaps >= 0.5, 2), ((overlaps >= 0.1) & (overlaps < 0.5), 6)):
        expected = 2000 * share / int(chosen.sum())
        found = counts[: rois.offsets[1]][chosen]
        assert (found - expected).abs().max() < 6 * expected**0.5
    assert counts[: rois.offsets[1]][overlaps < 0.1].sum() == 0


def test_mirrored_targets_are_those_of_mirrored_boxes():
    rois, objects = world()
    flipped = [(mirror(boxes, 120), classes) for boxes, classes in objects]
    parts = [
        mirror(rois.boxes[a + len(o[0]) : b], 120)
        for a, b, o in zip(rois.offsets, rois.offsets[1:], objects, strict=False)
    ]
    offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
    other = make_rois(Proposals(torch.cat(parts).int(), offsets), flipped)
    torch.testing.assert_close(other.targets, rois.targets * torch.tensor([-1, 1, 1, 1]), atol=1e-5, rtol=1e-5)
