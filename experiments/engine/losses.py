"""The losses of the experiments."""

import torch
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


def hinge_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """L1 hinge loss of Caffe, one class against the others: max(0, 1 - t s) summed over classes, mean over the images.

    Args:
        outputs: scores s, float (B, classes).
        labels: int64 (B,); t is 1 for the class of the label and -1 for the others.
    """
    classes = torch.arange(outputs.shape[1], device=outputs.device)
    target = 2.0 * (labels[:, None] == classes) - 1
    return (1 - target * outputs).clamp(min=0).sum() / len(outputs)


LOSSES = {"softmax": F.cross_entropy, "hinge": hinge_loss}
