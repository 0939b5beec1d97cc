import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from experiments.engine.metrics import average_precision


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
