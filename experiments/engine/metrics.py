"""Average precision on PASCAL VOC 2007, its spread over test images, and differences over seeds."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.stats import ttest_ind
from sklearn.metrics import average_precision_score, precision_recall_curve

from detection.evaluation import eleven_points


def average_precision(scores: torch.Tensor, labels: torch.Tensor) -> dict:
    """Average precision per class and its mean, by two definitions that differ by about two points.

    `step` is the area under the stepwise precision-recall curve, scikit-learn's `average_precision_score`, as
    the paper's authors compute it (philkr/voc-classification): pessimistic about ties, for a positive that
    leads by less than 1e-5 ranks behind. `voc11` is the VOC 2007 devkit's definition on the same scores: the
    mean, over the recalls 0, 0.1, ..., 1, of the highest precision reached at that recall or a higher one.

    Args:
        scores: (N, C) float, of N images for C classes; a higher one says more likely present. Logits do.
        labels: (N, C) int: 1 present, -1 absent, 0 ignored (in VOC: only difficult objects).

    Returns:
        `step` and `voc11`, float64 arrays (C,) of fractions, and `map_step` and `map_voc11`, their means over
        the classes. A class without a positive has no average precision: it is nan, left out of the mean, and
        named in a warning.

    Raises:
        ValueError: shapes that differ, labels other than 1, -1 and 0, scores that are NaN or infinite, or no
            positive in any class.
    """
    scores = scores.detach().double().cpu().numpy()
    labels = labels.cpu().numpy()
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must both be (images, classes)")
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError(f"labels must be 1, -1 or 0, found {np.setdiff1d(labels, (-1, 0, 1))[:5].tolist()}")
    if not np.isfinite(scores).all():
        image, column = np.argwhere(~np.isfinite(scores))[0].tolist()
        value = scores[image, column]
        raise ValueError(f"the score of image {image} for class {column} is {value}: the model has diverged")
    empty = np.flatnonzero(~(labels > 0).any(axis=0)).tolist()
    if len(empty) == labels.shape[1]:
        raise ValueError("no class has a positive label: there is no average precision")
    if empty:
        warnings.warn(f"no positive label for class {empty}: left out of the mean", stacklevel=2)

    step, voc11 = np.full((2, labels.shape[1]), np.nan)
    for column in set(range(labels.shape[1])).difference(empty):
        known = labels[:, column] != 0
        present = labels[known, column] > 0
        score = scores[known, column] - 1e-5 * present
        step[column] = average_precision_score(present, score)
        voc11[column] = _eleven_point(present, score)
    return {
        "step": step,
        "voc11": voc11,
        "map_step": float(np.nanmean(step)),
        "map_voc11": float(np.nanmean(voc11)),
    }


def _eleven_point(present: np.ndarray, score: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(present, score)
    # scikit-learn ends the curve with a point that no ranking reaches, precision 1 at recall 0.
    precision, recall = precision[:-1], recall[:-1]
    return eleven_points(recall, precision)


CONFIDENCE = 0.95  # of all intervals
RESAMPLES = 1000
AT_ONCE = 100  # resamples, for the memory that they take


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """The interval of Welch's t that holds the difference of two means with 95 % confidence; None for a single value.

    Welch (1947): the values of each are normal, with a variance of their own.
    """
    if min(len(first), len(second)) < 2:
        return None
    difference = float(np.mean(first) - np.mean(second))
    if np.ptp(first) == np.ptp(second) == 0:  # where the statistic is not defined
        return difference, difference
    interval = ttest_ind(first, second, equal_var=False).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def bootstrap(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> np.ndarray:
    """Differences of average precision, per class, of two runs on the same test images drawn with replacement.

    Args:
        first, second: the arrays of a run's `scores.npz`.

    Returns:
        (1 + 1000, classes): first of all images as they are, then of the draws (Efron & Tibshirani, 1993). A class of
        which a draw has no image is nan.

    Raises:
        ValueError: they are not of the same images.
    """
    if not np.array_equal(first["ids"], second["ids"]):
        raise ValueError("they are not of the same test images")
    count = len(first["ids"])
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = np.concatenate([np.ones((1, count), np.int64), draws])
    parts = np.array_split(weights, -(-len(weights) // AT_ONCE))
    return np.concatenate([weighted_ap(first, part) - weighted_ap(second, part) for part in parts])


def weighted_ap(run: Mapping[str, np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Average precision (draws, classes) with each image as often as `weights`, int (draws, images), says.

    It is the step AP of a classification and the 11-point AP of a detection, as of `average_precision` and of
    `detection.voc_ap`.

    Args:
        run: the arrays of a run's `scores.npz`.
    """
    if "scores" in run:
        columns = zip(run["scores"].T, run["labels"].T, strict=True)
        return np.stack([_step(scores, labels, weights) for scores, labels in columns], 1)
    ends = np.cumsum(run["lengths"])[:-1]
    ranked = zip(np.split(run["images"], ends), np.split(run["right"], ends), run["positives"].T, strict=True)
    return np.stack([_voc11(images, right, totals, weights) for images, right, totals in ranked], 1)


def _step(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    present = labels[labels != 0] > 0
    values = scores[labels != 0].astype(float) - 1e-5 * present
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order], append=-np.inf))  # equal scores are one threshold
    drawn = weights[:, labels != 0][:, order]
    hits = (drawn * present[order]).cumsum(1)[:, ends]
    precision = hits / drawn.cumsum(1)[:, ends].clip(min=1)
    gains = np.diff(hits, axis=1, prepend=0)
    return _share((gains * precision).sum(1), hits[:, -1])


def _voc11(images: np.ndarray, right: np.ndarray, totals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights @ totals.astype(np.int64)
    if not right.any():
        return _share(np.zeros(len(weights)), total)
    before = np.cumsum(right) - right  # right ones above: the column of `tried` in which a detection counts first
    shape = (weights.shape[1], int(right.sum()))
    tried = csr_array((np.ones(len(images), np.int64), (images.astype(np.int64), before)), shape)
    hits = weights[:, images[right]].cumsum(1)
    precision = hits / (weights @ tried).cumsum(1).clip(min=1)
    highest = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    highest = np.concatenate([highest, np.zeros((len(weights), 1))], 1)  # of a recall that none reaches
    recall = _share(hits, total[:, None])
    first = [(recall < k / 10).sum(1) for k in range(11)]  # k / 10: as in detection.evaluation
    points = [np.take_along_axis(highest, column[:, None], 1)[:, 0] for column in first]
    return np.where(total > 0, np.mean(points, 0), np.nan)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, nan where that is 0."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)
