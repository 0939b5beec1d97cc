"""Fast R-CNN: one pass over an image, RoI max pooling, and for each RoI a class and a box for each class."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_pool

from detection.boxes import clip, decode, nms
from detection.sampling import BACKGROUND_LABEL, IGNORED

STRIDE = 16  # pixels of the image to one position of the map that RoIs are pooled from
OUTPUT_STD = {"cls_score": 0.01, "bbox_pred": 0.001}  # of the new layers at full width, biases 0 (rbgirshick/fast-rcnn)


class FastRCNN(nn.Module):
    """A detector made of a classifier: RoI pooling takes the place of its last pooling, two layers that of its last.

    Input: float images (N, 3, H, W), and RoIs (N, R, 4), x1 y1 x2 y2 in pixels of those images, from 0. Output: class
    scores (N, R, 1 + classes), background first, and box deltas (N, R, 4 * (1 + classes)), see `boxes.encode`.
    All layers keep their names; the new ones are `cls_score` and `bbox_pred`.

    Args:
        network: the classifier, whose modules run one after the other, up to its last layer, `last_layer`; its modules
            become the detector's. Its `std_factors`, and `caffe_fillers` if it has them, say how the layers of a
            narrower one are initialized.
        classes: without the background.
        pool: name of the pooling that goes.
        padding: of convolutions and poolings, where the detector's are others than the classifier's.
        pooled: side of the map that a RoI becomes; None: what the first linear layer takes.

    Raises:
        ValueError: `network` has no such modules, or its first linear layer takes no square map.
    """

    last_layer = "cls_score"

    def __init__(
        self,
        network: nn.Sequential,
        classes: int = 20,
        pool: str = "pool5",
        padding: Mapping[str, int] | None = None,
        pooled: int | None = None,
    ):
        super().__init__()
        layers = dict(network.named_children())
        for name in (pool, *(padding or {})):
            if name not in layers:
                raise ValueError(f"{type(network).__name__} has no layer {name}: it has {', '.join(layers)}")
        names = list(layers)
        first, last = names.index(pool), names.index(network.last_layer.split(".")[0])
        self.trunk, self.top = names[:first], names[first + 1 : last]
        for name in (*self.trunk, *self.top):
            self.add_module(name, layers[name])
        for name, value in (padding or {}).items():
            layers[name].padding = (value, value) if isinstance(layers[name], nn.Conv2d) else value

        self.pooled = self._side() if pooled is None else pooled
        self.classes = classes
        features = network.get_submodule(network.last_layer).in_features
        self.cls_score = nn.Linear(features, 1 + classes)
        self.bbox_pred = nn.Linear(features, 4 * (1 + classes))
        factors = network.std_factors
        self.std_factors = {**factors, **dict.fromkeys(OUTPUT_STD, factors[network.last_layer])}
        self.reset_outputs(0)
        # Targets are normalised by these; `detect` undoes it.
        self.register_buffer("target_mean", torch.zeros(1 + classes, 4))
        self.register_buffer("target_std", torch.ones(1 + classes, 4))
        if fillers := getattr(network, "caffe_fillers", None):
            outputs = {name: (self.std_factors[name] * std, 0.0) for name, std in OUTPUT_STD.items()}
            self.caffe_fillers = {**fillers, **outputs}

    def _side(self) -> int:
        """Side of the map that the first linear layer takes."""
        trunk = [m for name in self.trunk if isinstance(m := self.get_submodule(name), nn.Conv2d)]
        linear = next(m for name in self.top if isinstance(m := self.get_submodule(name), nn.Linear))
        side = math.isqrt(linear.in_features // trunk[-1].out_channels)
        if side**2 * trunk[-1].out_channels != linear.in_features:
            raise ValueError(f"the first linear layer takes {linear.in_features} values, no square map")
        return side

    def forward(self, images: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        count, each = rois.shape[:2]
        for name in self.trunk:
            images = self.get_submodule(name)(images)
        number = torch.arange(count, device=rois.device, dtype=rois.dtype).view(-1, 1, 1).expand(count, each, 1)
        # torchvision rounds corners to the map and counts both of them, as Caffe's RoIPooling does.
        x = roi_pool(images, torch.cat([number, rois], 2).flatten(0, 1), self.pooled, 1 / STRIDE)
        for name in self.top:
            x = self.get_submodule(name)(x)
        return self.cls_score(x).unflatten(0, (count, each)), self.bbox_pred(x).unflatten(0, (count, each))

    @torch.no_grad()
    def reset_outputs(self, seed: int) -> None:
        """The two last layers as rbgirshick/fast-rcnn initializes them."""
        for number, (name, std) in enumerate(OUTPUT_STD.items()):
            layer = self.get_submodule(name)
            generator = torch.Generator().manual_seed(2 * seed + number)
            layer.weight.copy_(self.std_factors[name] * std * torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()


def fast_rcnn_loss(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Softmax cross-entropy plus smooth L1 of the box of the RoI's class, both the mean over the RoIs (section 2.3).

    Args:
        outputs: of `FastRCNN`.
        targets: labels int64 (N, R), `IGNORED` where a RoI does not count; and normalised box targets (N, R, 4).
    """
    scores, deltas = (output.flatten(0, 1) for output in outputs)
    labels, boxes = (target.flatten(0, 1) for target in targets)
    count = (labels != IGNORED).sum()
    on = labels > BACKGROUND_LABEL
    own = deltas.unflatten(1, (-1, 4))[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)]
    box_loss = (F.smooth_l1_loss(own, boxes, reduction="none").sum(1) * on).sum() / count
    return F.cross_entropy(scores, labels, ignore_index=IGNORED) + box_loss


@torch.inference_mode()
def detect(
    model: FastRCNN,
    image: Tensor,
    proposals: Tensor,
    scale: float,
    height: int,
    width: int,
    *,
    nms_threshold: float = 0.3,
    limit: int = 100,
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections in one image.

    Args:
        image: (3, H, W), as the network sees it, on its device.
        proposals: (n, 4), in pixels of the image before it was scaled; n may be 0.
        scale: from those to pixels of `image`.
        height, width: of the image before it was scaled, where boxes end.
        nms_threshold: IoU of two boxes of a class above which the one with the lower score goes.
        limit: boxes of each class that come to the suppression, those with the highest scores.

    Returns:
        Boxes float32 (m, 4) in pixels of the image before it was scaled, scores (m,) and classes int64 (m,) from 0;
        on the CPU.
    """
    if not len(proposals):
        return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    rois = proposals.float() * scale
    # RoIs that pool from the same cells have the same outputs: one of them is enough.
    _, cell = (rois / STRIDE).round().unique(dim=0, return_inverse=True)
    first = torch.full((int(cell.max()) + 1,), len(rois)).scatter_reduce_(0, cell, torch.arange(len(rois)), "amin")
    rois = rois[first].to(image)
    scores, deltas = (output[0].float() for output in model(image[None], rois[None]))
    deltas = deltas.unflatten(1, (-1, 4)) * model.target_std + model.target_mean
    scores, boxes = scores.softmax(1)[:, 1:], decode((rois / scale).unsqueeze(1), deltas[:, 1:])
    scores, best = scores.topk(min(limit, len(scores)), dim=0)
    classes = torch.arange(model.classes, device=scores.device).expand_as(best)
    boxes = clip(boxes[best, classes], height, width).flatten(0, 1)
    kept = nms(boxes, scores.flatten(), classes.flatten(), nms_threshold)
    return tuple(part[kept].cpu() for part in (boxes, scores.flatten(), classes.flatten()))
