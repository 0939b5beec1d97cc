"""The losses of the experiments."""

import torch.nn.functional as F
from torch import Tensor

from experiments.data.folders import BAD

AUXILIARY_WEIGHT = 0.3  # of each auxiliary loss; BVLC/caffe, models/bvlc_googlenet


def multilabel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid cross-entropy, summed over the classes, mean over the images (philkr/voc-classification).

    Args:
        logits: float (B, classes).
        labels: int (B, classes), 1 present, -1 absent, 0 ignored.
    """
    target, weight = (labels > 0).float(), (labels != 0).float()
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / len(logits)


def classification_loss(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy, mean over the images, with and without auxiliary losses; bad images count as 0."""
    output, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, ignore_index=BAD, reduction="sum") / len(labels)

    final = loss(output)
    return final + AUXILIARY_WEIGHT * sum(map(loss, auxiliary)), final
