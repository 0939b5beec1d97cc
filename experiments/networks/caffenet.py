"""CaffeNet, the network of most experiments of the paper (BVLC/caffe, models/bvlc_reference_caffenet)."""

from collections import OrderedDict

import torch
from torch import nn

from experiments.networks.lrn import LocalResponseNorm
from experiments.networks.narrow import std_factors

# The hand-tuned reference initialization: standard deviation of the Gaussian weights, at full width, and constant bias.
REFERENCE_FILLERS = {
    "conv1": (0.01, 0.0),
    "conv2": (0.01, 1.0),
    "conv3": (0.01, 0.0),
    "conv4": (0.01, 1.0),
    "conv5": (0.01, 1.0),
    "fc6": (0.005, 1.0),
    "fc7": (0.005, 1.0),
    "fc8": (0.01, 0.0),
}


class CaffeNet(nn.Sequential):
    """AlexNet as Caffe trains it: pooling before normalization, two groups in conv2, conv4 and conv5.

    Input: float images (N, 3, input_size, input_size), BGR, 0..255 minus the mean. Output: logits (N, num_outputs).
    The layers carry Caffe's names (`conv1` ... `fc8`), so that its weights can be assigned by name.

    Args:
        num_outputs: rows of the last layer, fc8.
        input_size: side of the square input in pixels; fc6 adapts to the size that reaches it.
        width: multiplies the channels of the five convolutions (rounded to a multiple of 4).
        fc: outputs of fc6 and of fc7.
        groups: False removes the two groups, as Doersch et al. (2015) do.
        lrn: False leaves out the two local response normalizations.
        batch_norm: insert BatchNorm after every affine layer but the last (Table 1).
        dropout: probability after fc6 and fc7.
    """

    last_layer = "fc8"
    classifiers = ("fc8",)

    def __init__(
        self,
        num_outputs: int = 20,
        input_size: int = 227,
        width: float = 1.0,
        fc: int = 4096,
        groups: bool = True,
        lrn: bool = True,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ):
        c1, c2, c3, c4, c5 = (max(4, 4 * round(width * c / 4)) for c in (96, 256, 384, 384, 256))
        g = 2 if groups else 1
        layers: OrderedDict[str, nn.Module] = OrderedDict()

        def affine(name: str, layer: nn.Module) -> None:
            layers[name] = layer
            if batch_norm:
                norm = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
                layers[f"bn{name[-1]}"] = norm(layer.weight.shape[0])
            layers[f"relu{name[-1]}"] = nn.ReLU(inplace=True)

        def pool(number: int) -> None:
            # Caffe rounds the pooled size up (BVLC/caffe, pooling_layer.cpp): 55 -> 27 -> 13 -> 6.
            layers[f"pool{number}"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        def norm(number: int) -> None:
            if lrn:
                layers[f"norm{number}"] = LocalResponseNorm()

        affine("conv1", nn.Conv2d(3, c1, 11, stride=4))
        pool(1)
        norm(1)
        affine("conv2", nn.Conv2d(c1, c2, 5, padding=2, groups=g))
        pool(2)
        norm(2)
        affine("conv3", nn.Conv2d(c2, c3, 3, padding=1))
        affine("conv4", nn.Conv2d(c3, c4, 3, padding=1, groups=g))
        affine("conv5", nn.Conv2d(c4, c5, 3, padding=1, groups=g))
        pool(5)
        layers["flatten"] = nn.Flatten()
        side = _pooled_size(input_size)
        affine("fc6", nn.Linear(c5 * side * side, fc))
        layers["drop6"] = nn.Dropout(dropout)
        affine("fc7", nn.Linear(fc, fc))
        layers["drop7"] = nn.Dropout(dropout)
        layers["fc8"] = nn.Linear(fc, num_outputs)
        super().__init__(layers)
        self.input_size = input_size
        self.groups = groups

    @property
    def std_factors(self) -> dict[str, float]:
        """What fixed standard deviations are multiplied by, for each layer; see `narrow`."""
        with torch.device("meta"):
            return std_factors(self, CaffeNet(groups=self.groups))

    @property
    def caffe_fillers(self) -> dict[str, tuple[float, float]]:
        """Standard deviation and bias of the reference initialization, for each layer."""
        factors = self.std_factors
        return {name: (factors[name] * std, bias) for name, (std, bias) in REFERENCE_FILLERS.items()}


def _pooled_size(input_size: int) -> int:
    """Side of the feature map that pool5 hands to fc6."""
    if input_size < 39:
        raise ValueError(f"CaffeNet: input_size is {input_size}, but its three poolings need at least 39 pixels")
    size = (input_size - 11) // 4 + 1
    pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    features = torch.empty(1, 1, size, size, device="meta")
    for _ in range(3):
        features = pool(features)
    return features.shape[-1]
