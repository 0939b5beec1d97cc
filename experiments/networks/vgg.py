"""VGG-16 (Simonyan & Zisserman, 2015, configuration D) as its authors' Caffe definition has it."""

from collections import OrderedDict

import torch
from torch import nn

from experiments.networks.narrow import std_factors

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of each convolution


class VGG16(nn.Sequential):
    """Thirteen convolutions of 3x3 in five blocks, and three fully connected layers.

    Input: float images (N, 3, input_size, input_size), BGR, 0..255 minus the mean. Output: logits (N, num_outputs).
    The layers carry Caffe's names (`conv1_1` ... `fc8`).

    Args:
        num_outputs: rows of the last layer, fc8.
        input_size: side of the square input in pixels; fc6 adapts to the size that reaches it.
        width: multiplies the channels of the convolutions (rounded to a multiple of 4).
        fc: outputs of fc6 and of fc7.
        dropout: probability after fc6 and fc7.
    """

    last_layer = "fc8"
    classifiers = ("fc8",)

    def __init__(
        self, num_outputs: int = 20, input_size: int = 224, width: float = 1.0, fc: int = 4096, dropout: float = 0.5
    ):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, side = 3, input_size
        for block, outputs in enumerate(BLOCKS, 1):
            for number, full in enumerate(outputs, 1):
                count = max(4, 4 * round(width * full / 4))
                layers[f"conv{block}_{number}"] = nn.Conv2d(channels, count, 3, padding=1)
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
        self.input_size = input_size

    @property
    def std_factors(self) -> dict[str, float]:
        """What fixed standard deviations are multiplied by, for each layer; see `narrow`."""
        with torch.device("meta"):
            return std_factors(self, VGG16())
