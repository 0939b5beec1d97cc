"""Residual networks for small images (He et al., 2016, section 4.2): 6n + 2 layers, shortcuts without parameters."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.networks.activations import ACTIVATIONS
from experiments.networks.narrow import std_factors

CHANNELS = (16, 32, 64)  # of the three stages, n blocks each


class ResNet(nn.Sequential):
    """A convolution, three stages of residual blocks, and a linear layer over the mean of the positions.

    Input: float images (N, channels, input_size, input_size). Output: (N, num_outputs).

    Args:
        num_outputs: of the last layer, fc.
        input_size: side of the input in pixels; no layer depends on it.
        channels: of the input.
        depth: layers with weights, 6n + 2: 20, 32, 44, 56, 110.
        width: multiplies the channels (rounded to a multiple of 4).
        activation: a key of `ACTIVATIONS`.
        batch_norm: BatchNorm behind each convolution, which has no bias then.

    Raises:
        ValueError: another depth, or maxout.
    """

    last_layer = "fc"
    classifiers = ("fc",)

    def __init__(
        self,
        num_outputs: int = 10,
        input_size: int = 32,
        channels: int = 3,
        depth: int = 20,
        width: float = 1.0,
        activation: str = "relu",
        batch_norm: bool = True,
    ):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"model.depth={depth}: a ResNet for small images has 6n + 2 layers, such as 20, 56 or 110")
        if activation not in ACTIVATIONS:
            raise ValueError(f"model.activation={activation}: choose {', '.join(ACTIVATIONS)} for a ResNet")
        counts = [max(4, 4 * round(width * full / 4)) for full in CHANNELS]
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=_convolution(channels, counts[0], 1, batch_norm))
        layers["activation"] = ACTIVATIONS[activation]()
        inputs = counts[0]
        for stage, count in enumerate(counts, 1):
            for number in range(1, (depth - 2) // 6 + 1):
                stride = 2 if stage > 1 and number == 1 else 1
                layers[f"block{stage}_{number}"] = Block(inputs, count, stride, activation, batch_norm)
                inputs = count
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(inputs, num_outputs)
        super().__init__(layers)
        self.input_size = input_size
        self.published = {"channels": channels, "depth": depth, "batch_norm": batch_norm}

    @property
    def std_factors(self) -> dict[str, float]:
        """What fixed standard deviations are multiplied by, for each layer; see `narrow`."""
        with torch.device("meta"):
            return std_factors(self, ResNet(**self.published))


class Block(nn.Module):
    """Two convolutions and a shortcut: positions are left out and channels of 0 added where the sizes differ (A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str, batch_norm: bool):
        super().__init__()
        self.first = _convolution(inputs, outputs, stride, batch_norm)
        self.inner = ACTIVATIONS[activation]()
        self.second = _convolution(outputs, outputs, 1, batch_norm)
        self.outer = ACTIVATIONS[activation]()
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.inner(self.first(x)))
        if self.stride > 1 or self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return self.outer(x + y)


def _convolution(inputs: int, outputs: int, stride: int, batch_norm: bool) -> nn.Sequential:
    layers = OrderedDict(conv=nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not batch_norm))
    if batch_norm:
        layers["bn"] = nn.BatchNorm2d(outputs)
    return nn.Sequential(layers)
