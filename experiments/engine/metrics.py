"""Average precision of image classification on PASCAL VOC 2007."""

import warnings

import numpy as np
import torch
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
