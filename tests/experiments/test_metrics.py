import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from detection import Detections, Truth, voc_ap
from experiments.engine.metrics import average_precision, bootstrap, weighted_ap, welch
from experiments.voc_det import scores_of


def ranking(scores, labels):
    """Presence of the images that are not ignored, best score first, the absent ones first among equals."""
    known = [(score, label > 0) for score, label in zip(scores, labels, strict=True) if label != 0]
    return [present for _, present in sorted(known, key=lambda pair: (-pair[0], pair[1]))]


def slow_step(scores, labels):
    """Mean over the positives of the precision among the images that score at least as high."""
    precisions = []
    for score, label in zip(scores, labels, strict=True):
        if label > 0:
            above = [other for value, other in zip(scores, labels, strict=True) if other != 0 and value >= score]
            precisions.append(above.count(1) / len(above))
    return sum(precisions) / len(precisions)


def slow_voc11(scores, labels):
    """The devkit's VOCevalcls: walk down the ranking, then interpolate at eleven recalls."""
    ranked = ranking(scores, labels)
    points, found = [], 0
    for seen, present in enumerate(ranked, start=1):
        found += present
        points.append((found, found / seen))
    total = 0.0
    for tenth in range(11):
        total += max(precision for found, precision in points if 10 * found >= tenth * sum(ranked))
    return total / 11


def column(*values):
    return torch.tensor(values).unsqueeze(1)


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(
            arrays.arrays(np.float32, (n, 4), elements=st.integers(-6, 6).map(lambda value: value / 2)),
            arrays.arrays(np.int8, (n, 4), elements=st.sampled_from((1, -1, 0))),
        )
    )
)
def test_both_equal_a_slow_implementation(case):
    scores, labels = case
    assume((labels > 0).any())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    for name, slow in (("step", slow_step), ("voc11", slow_voc11)):
        expected = [slow(s, y) if (y > 0).any() else np.nan for s, y in zip(scores.T, labels.T, strict=True)]
        np.testing.assert_allclose(result[name], expected, rtol=1e-12)
        assert result[f"map_{name}"] == pytest.approx(np.nanmean(expected), rel=1e-12)


def test_by_hand():
    # Ranking + - +: precision 1 up to recall 1/2, then 2/3.
    result = average_precision(column(3.0, 2.0, 1.0), column(1, -1, 1))
    assert result["map_step"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["map_voc11"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_recall_of_three_tenths_reaches_the_fourth_point():
    # Ten positives: three, then ninety negatives, then seven. 3 * 0.1 > 3 / 10 in floating point.
    labels = [1] * 3 + [-1] * 90 + [1] * 7
    result = average_precision(-torch.arange(100.0).unsqueeze(1), column(*labels))
    assert result["map_voc11"] == pytest.approx((4 * 1 + 7 * 10 / 100) / 11)


@pytest.mark.parametrize("score", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize("labels", [(1, -1, -1, -1), (-1, -1, -1, 1)])
def test_ties_are_pessimistic_at_any_scale_and_in_any_order(score, labels):
    result = average_precision(torch.full((4, 1), score), column(*labels))
    assert result["map_step"] == pytest.approx(1 / 4)
    assert result["map_voc11"] == pytest.approx(1 / 4)


def test_a_lead_below_1e_5_is_a_tie():
    labels = column(1, -1)
    assert average_precision(column(0.5e-5, 0.0), labels)["map_step"] == pytest.approx(1 / 2)
    assert average_precision(column(2e-5, 0.0), labels)["map_step"] == pytest.approx(1)


def test_ignored_labels_change_nothing():
    scores, labels = column(3.0, 2.0, 1.0), column(1, -1, 1)
    more_scores, more_labels = torch.cat([scores, column(2.5, 9.0)]), torch.cat([labels, column(0, 0)])
    for name in ("map_step", "map_voc11"):
        assert average_precision(more_scores, more_labels)[name] == average_precision(scores, labels)[name]


def test_a_class_without_positives_is_left_out_of_the_mean():
    scores = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])
    labels = torch.tensor([[1, -1], [-1, 0], [1, -1]])
    with pytest.warns(UserWarning, match=r"class \[1\]"):
        result = average_precision(scores, labels)
    assert np.isnan(result["step"][1])
    assert np.isnan(result["voc11"][1])
    assert result["map_step"] == result["step"][0]
    assert result["map_voc11"] == result["voc11"][0]


def test_a_perfect_ranking_is_one_whatever_the_dtype():
    labels = torch.tensor([[1, -1], [-1, 1], [-1, 1]], dtype=torch.int8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        result = average_precision(labels.to(dtype), labels)
        assert result["map_step"] == result["map_voc11"] == 1


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (column(1.0, float("nan")), column(1, -1), "score of image 1 for class 0 is nan"),
        (column(float("inf"), 1.0), column(1, -1), "score of image 0 for class 0 is inf"),
        (column(1.0, 2.0), column(-1, 0), "no class has a positive label"),
        (column(1.0, 2.0), column(1, 255), r"labels must be 1, -1 or 0, found \[255\]"),
        (column(1.0, 2.0), column(1), r"scores \(2, 1\) and labels \(1, 1\)"),
        (torch.ones(2), torch.ones(2, dtype=torch.int8), r"must both be \(images, classes\)"),
    ],
)
def test_bad_input_is_one_clear_error(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        average_precision(scores, labels)


# Differences, and what of them is noise.


@given(st.integers(0, 10_000))
def test_a_weighted_image_counts_as_so_many(seed):
    """As often as its weight says, in a test set of its own; with ties and with ignored images."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 12, (30, 2)).astype(np.float32)
    labels = generator.choice([-1, -1, 0, 1], (30, 2)).astype(np.int8)
    weights = generator.integers(0, 3, (3, 30))
    weights[0] = 1
    run = {"scores": scores, "labels": labels}
    for found, times in zip(weighted_ap(run, weights), weights, strict=True):
        drawn = [torch.from_numpy(part.repeat(times, axis=0)) for part in (scores, labels)]
        assume((drawn[1] > 0).any(0).all())
        assert found == pytest.approx(average_precision(*drawn)["step"], abs=1e-12)


def random_detections(seed, images=20, classes=3):
    generator = torch.Generator().manual_seed(seed)
    truth, found = [], []
    for _ in range(images):
        count = int(torch.randint(0, 4, (1,), generator=generator))
        corner = torch.rand(count, 2, generator=generator) * 200
        boxes = torch.cat([corner, corner + 20 + 40 * torch.rand(count, 2, generator=generator)], 1)
        own = torch.randint(0, classes, (count,), generator=generator)
        truth.append(Truth(boxes, own, torch.rand(count, generator=generator) < 0.2))
        moved = torch.cat([boxes, boxes]) + 12 * torch.randn(2 * count, 4, generator=generator)
        found.append((moved, torch.rand(2 * count, generator=generator), own.repeat(2)))
    return truth, found


@pytest.mark.parametrize("seed", range(5))
def test_a_weighted_image_counts_as_so_many_in_detection(seed):
    truth, found = random_detections(seed)
    split = SimpleNamespace(ids=[*map(str, range(20))], classes="abc")
    run = scores_of(Detections.of(found), truth, split)
    weights = np.random.default_rng(seed).integers(0, 3, (4, 20))
    weights[0] = 1
    for values, times in zip(weighted_ap(run, weights), weights, strict=True):
        index = np.arange(20).repeat(times)
        expected = voc_ap(Detections.of([found[i] for i in index]), [truth[i] for i in index], 3)["voc11"]
        assert values == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_bootstrap_knows_what_is_paired():
    """Two runs whose scores differ by little on the same images: far less noise than of each for itself."""
    generator = np.random.default_rng(0)
    labels = np.where(generator.random((400, 2)) < 0.2, 1, -1).astype(np.int8)
    scores = (labels + 1.5 * generator.standard_normal((400, 2))).astype(np.float32)
    first = {"ids": np.arange(400), "scores": scores, "labels": labels}
    second = first | {"scores": scores + 0.05 * generator.standard_normal((400, 2)).astype(np.float32)}
    drawn = bootstrap(first, second)
    assert drawn.shape == (1001, 2)
    step = [
        average_precision(*(torch.from_numpy(run[key]) for key in ("scores", "labels")))["step"]
        for run in (first, second)
    ]
    assert drawn[0] == pytest.approx(step[0] - step[1], abs=1e-12)
    alone = bootstrap(first, first | {"scores": np.zeros_like(scores)})
    assert drawn[1:].std(0).max() < 0.3 * alone[1:].std(0).min()
    assert np.abs(bootstrap(first, first)).max() == 0
    with pytest.raises(ValueError, match="not of the same test images"):
        bootstrap(first, second | {"ids": np.arange(1, 401)})


def test_the_interval_of_welch_holds_the_difference_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        low, high = welch(generator.normal(3, 1, 3), generator.normal(1, 2, 4))
        held += low < 2 < high
    assert 930 <= held <= 980
    assert welch([1.0], [2.0, 3.0]) is None
    assert welch([1.0, 1.0], [3.0, 3.0]) == (-2, -2)
