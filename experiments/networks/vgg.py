"""VGG (Simonyan & Zisserman, 2015), layer for layer as its authors' Caffe definition of VGG-16 has them."""

from collections import OrderedDict

import torch
from torch import nn

from experiments.networks.narrow import std_factors

CHANNELS = (64, 128, 256, 512, 512)  # of the convolutions of the five blocks
# How many convolutions each block has; the third of a block of C is of 1x1.
CONFIGURATIONS = {
    "A": (1, 1, 2, 2, 2),
    "B": (2, 2, 2, 2, 2),
    "C": (2, 2, 3, 3, 3),
    "D": (2, 2, 3, 3, 3),
    "E": (2, 2, 4, 4, 4),
}


class VGG(nn.Sequential):
    """Convolutions of 3x3 in five blocks, and three fully connected layers.

    Input: float images (N, channels, input_size, input_size). Output: logits (N, num_outputs).
    The layers carry Caffe's names (`conv1_1` ... `fc8`).

    Args:
        num_outputs: rows of the last layer, fc8.
        input_size: side of the square input in pixels; fc6 adapts to the size that reaches it.
        width: multiplies the channels of the convolutions (rounded to a multiple of 4).
        fc: outputs of fc6 and of fc7.
        dropout: probability after fc6 and fc7.
        configuration: A to E of their table 1, of 11, 13, 16, 16 and 19 layers.
        channels: of the input.
    """

    last_layer = "fc8"
    classifiers = ("fc8",)

    def __init__(
        self,
        num_outputs: int = 20,
        input_size: int = 224,
        width: float = 1.0,
        fc: int = 4096,
        dropout: float = 0.5,
        configuration: str = "D",
        channels: int = 3,
    ):
        published = {"configuration": configuration, "channels": channels}
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        side = input_size
        for block, (full, convolutions) in enumerate(zip(CHANNELS, CONFIGURATIONS[configuration], strict=True), 1):
            count = max(4, 4 * round(width * full / 4))
            for number in range(1, convolutions + 1):
                size = 1 if configuration == "C" and number == 3 else 3
                layers[f"conv{block}_{number}"] = nn.Conv2d(channels, count, size, padding=size // 2)
                layers[f"relu{block}_{number}"] = nn.ReLU(inplace=True)
                channels = count
            layers[f"pool{block}"] = nn.MaxPool2d(2, ceil_mode=True)  # Caffe rounds the pooled size up
            side = -(-side // 2)
        layers["flatten"] = nn.Flatten()
        inputs = channels * side * side
        for number in (6, 7):
            layers[f"fc{number}"] = nn.Linear(inputs, fc)
            layers[f"relu{number}"] = nn.ReLU(inplace=True)
            layers[f"drop{number}"] = nn.Dropout(dropout)
            inputs = fc
        layers["fc8"] = nn.Linear(fc, num_outputs)
        super().__init__(layers)
        self.input_size, self.published = input_size, published

    @property
    def std_factors(self) -> dict[str, float]:
        """What fixed standard deviations are multiplied by, for each layer; see `narrow`."""
        with torch.device("meta"):
            return std_factors(self, VGG(**self.published))


class VGG16(VGG):
    """Configuration D."""
