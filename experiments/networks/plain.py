"""Plain networks of any depth: no shortcuts, no normalisation, no dropout; to see how signals travel through them."""

from collections import OrderedDict

from torch import nn

from experiments.networks.activations import ACTIVATIONS
from experiments.networks.vgg import VGG

STRIDES = (2, 2)  # of the first convolutions; then 7 x 7 positions are left of MNIST's 28 x 28


def plain(
    kind: str, depth: int | str, activation: str, width: float, shape: tuple[int, int, int], outputs: int
) -> nn.Sequential:
    """A network of `depth` layers with weights, an activation behind each but the last.

    Args:
        kind: "linear": fully connected; "convolution": of 3x3, and a linear layer over the mean of the positions;
            "vgg": VGG, with fully connected layers of 128 outputs.
        depth: of VGG its configuration, A to E.
        activation: a key of `ACTIVATIONS`; of VGG always ReLU.
        width: outputs of each hidden layer; what VGG's channels are multiplied by.
        shape: of an image, (channels, size, size).
    """
    channels, size, _ = shape
    if kind == "vgg":
        return VGG(outputs, size, width, fc=128, dropout=0, configuration=str(depth), channels=channels)
    inputs, count = channels * size * size if kind == "linear" else channels, round(width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten()) if kind == "linear" else OrderedDict()
    for number in range(1, int(depth)):
        stride = STRIDES[number - 1] if number <= len(STRIDES) else 1
        layers[f"layer{number}"] = (
            nn.Linear(inputs, count) if kind == "linear" else nn.Conv2d(inputs, count, 3, stride, padding=1)
        )
        layers[f"{activation}{number}"] = ACTIVATIONS[activation]()
        inputs = count
    if kind == "convolution":
        layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers[f"layer{depth}"] = nn.Linear(inputs, outputs)
    return nn.Sequential(layers)
