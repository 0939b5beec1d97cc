"""Whether a training converges, and when its loss leaves the flat part of its beginning: the rules, stated once."""

import math
from collections.abc import Sequence

import pandas as pd
from torch import Tensor

TIMES_CHANCE = 2
CONVERGES = (
    f"a training converges if no loss and no weight becomes NaN or infinite, and its top-1 accuracy on the test images "
    f"is at least {TIMES_CHANCE} times the share of their most frequent class"
)
BELOW, ROWS = 0.97, 5
FLAT = (
    f"the loss leaves the flat part with the first row of curve.csv from which on {ROWS} rows in a row have a mean "
    f"loss below {BELOW} times that of the best constant output"
)


def converges(top1: float, labels: Tensor) -> bool:
    """The rule `CONVERGES`, for a training that has ended with finite weights.

    Args:
        top1: accuracy between 0 and 1 on images of these labels, int64 (N,).
    """
    return top1 >= TIMES_CHANCE * labels.bincount().max().item() / len(labels)


def constant_loss(loss: str, classes: int) -> float:
    """The least loss of an output that is the same for all images, of balanced classes: "softmax" or "hinge"."""
    return {"softmax": math.log(classes), "hinge": 2.0}[loss]  # the hinge loss of -1 for every class


def leaves_flat_part(curve: pd.DataFrame, constant: float) -> int | None:
    """The rule `FLAT`: the iteration at the end of that row; None where the loss stays flat.

    Args:
        curve: columns `step` and `loss`.
        constant: of `constant_loss`.
    """
    below: Sequence[bool] = [*(curve["loss"] < BELOW * constant)]
    for first in range(len(below) - ROWS + 1):
        if all(below[first : first + ROWS]):
            return int(curve["step"].iloc[first])
    return None
