"""FitNet-4 and the FitNet for MNIST (Romero et al., 2015), as Mishkin & Matas (2016) train them with LSUV."""

from collections import OrderedDict

import torch
from torch import nn

from experiments.networks.activations import activated
from experiments.networks.narrow import std_factors

BLOCKS = ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6)  # channels of each convolution
MNIST_BLOCKS = ((16, 16), (16, 16), (12, 12))
MNIST_POOLS = ((4, 2), (4, 2), (2, 2))  # size and stride


class FitNet4(nn.Sequential):
    """Seventeen convolutions of 3x3 in three blocks, and two fully connected layers.

    Input: float images (N, channels, input_size, input_size). Output: (N, num_outputs).

    Args:
        num_outputs: of the last layer, fc5.
        input_size: side of the input in pixels, 4 or more; no layer depends on it.
        channels: of the input.
        width: multiplies the channels of the convolutions (rounded to a multiple of 4).
        fc: outputs of fc4.
        activation: a key of `ACTIVATIONS`, or "maxout": of two layers, in fc4 of five.
        batch_norm: BatchNorm between a convolution and its activation, behind the maximum with maxout; fc4 too.
        dropout: probability on the input, behind each pooling and behind fc4.
    """

    last_layer = "fc5"
    classifiers = ("fc5",)

    def __init__(
        self,
        num_outputs: int = 10,
        input_size: int = 32,
        channels: int = 3,
        width: float = 1.0,
        fc: int = 500,
        activation: str = "relu",
        batch_norm: bool = False,
        dropout: float = 0.2,
    ):
        layers: OrderedDict[str, nn.Module] = OrderedDict(drop0=nn.Dropout(dropout))
        inputs = channels
        for block, outputs in enumerate(BLOCKS, 1):
            for number, full in enumerate(outputs, 1):
                count = max(4, 4 * round(width * full / 4))
                norm = nn.BatchNorm2d(count) if batch_norm else None
                layers |= _layer(f"conv{block}_{number}", nn.Conv2d, (inputs, count, 3, 1, 1), activation, 2, norm)
                inputs = count
            layers[f"pool{block}"] = nn.MaxPool2d(2) if block < len(BLOCKS) else nn.AdaptiveMaxPool2d(1)
            layers[f"drop{block}"] = nn.Dropout(dropout)
        layers["flatten"] = nn.Flatten()
        layers |= _layer("fc4", nn.Linear, (inputs, fc), activation, 5, nn.BatchNorm1d(fc) if batch_norm else None)
        layers["drop4"] = nn.Dropout(dropout)
        layers["fc5"] = nn.Linear(fc, num_outputs)
        super().__init__(layers)
        self.input_size, self.published = input_size, {"channels": channels, "activation": activation}

    @property
    def std_factors(self) -> dict[str, float]:
        """What fixed standard deviations are multiplied by, for each layer; see `narrow`."""
        with torch.device("meta"):
            return std_factors(self, FitNet4(**self.published))


class MNISTFitNet(nn.Sequential):
    """Six convolutions of 3x3 in three blocks, and a fully connected layer.

    Arguments as of `FitNet4`; the poolings are 4/2, 4/2 and 2/2, and there is one dropout, before the last layer.
    """

    last_layer = "fc4"
    classifiers = ("fc4",)

    def __init__(
        self,
        num_outputs: int = 10,
        input_size: int = 28,
        channels: int = 3,
        activation: str = "maxout",
        dropout: float = 0.3,
    ):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs, side = channels, input_size
        for block, (outputs, pool) in enumerate(zip(MNIST_BLOCKS, MNIST_POOLS, strict=True), 1):
            for number, count in enumerate(outputs, 1):
                layers |= _layer(f"conv{block}_{number}", nn.Conv2d, (inputs, count, 3, 1, 1), activation, 2)
                inputs = count
            layers[f"pool{block}"] = nn.MaxPool2d(*pool, ceil_mode=True)  # Caffe rounds the pooled size up
            side = -(-(side - pool[0]) // pool[1]) + 1
        if side < 1:
            raise ValueError(f"MNISTFitNet: input_size is {input_size}, too small for its three poolings")
        layers["flatten"] = nn.Flatten()
        layers["drop3"] = nn.Dropout(dropout)
        layers["fc4"] = nn.Linear(inputs * side * side, num_outputs)
        super().__init__(layers)
        self.input_size = input_size

    @property
    def std_factors(self) -> dict[str, float]:
        """1 for each layer, as there is one width; see `narrow`."""
        return std_factors(self, self)


def _layer(
    name: str,
    kind: type[nn.Module],
    shape: tuple[int, ...],
    activation: str,
    pieces: int,
    norm: nn.Module | None = None,
) -> dict[str, nn.Module]:
    """A layer with its activation, by the names that they have in the network."""
    parts = activated(lambda: kind(*shape), activation, pieces, norm)
    return {name + part: module for part, module in parts.items()}
