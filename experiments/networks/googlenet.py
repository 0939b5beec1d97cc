"""GoogLeNet (Szegedy et al., 2015) as Caffe trains it (BVLC/caffe, models/bvlc_googlenet)."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.networks.lrn import LocalResponseNorm
from experiments.networks.narrow import std_factors

# Outputs of 1x1, 3x3_reduce, 3x3, 5x5_reduce, 5x5 and pool_proj.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
AUXILIARY = {"4a": "loss1", "4d": "loss2"}  # classifiers behind inceptions


class GoogLeNet(nn.Sequential):
    """Nine inception modules behind three convolutions, 22 layers deep.

    Input: float images (N, 3, input_size, input_size), BGR, 0..255 minus the mean. Output: logits (N, num_outputs); in
    training mode with auxiliary classifiers the tuple (logits, logits of the first, of the second). Names of layers
    are Caffe's, with a dot for the slash: `inception_3a.5x5_reduce`.

    Args:
        num_outputs: rows of the last layer.
        input_size: side of the square input in pixels, at least 64.
        width: multiplies the channels of all convolutions (rounded to a multiple of 4).
        lrn: False leaves out the two local response normalizations.
        auxiliary: add the two auxiliary classifiers behind inception 4a and 4d; at 224 px they see 4x4 positions.
        dropout: probability before the last layer; the auxiliary classifiers drop .7, as Caffe's do.
    """

    last_layer = "loss3.classifier"

    def __init__(
        self,
        num_outputs: int = 20,
        input_size: int = 224,
        width: float = 1.0,
        lrn: bool = True,
        auxiliary: bool = False,
        dropout: float = 0.4,
    ):
        super().__init__()
        if input_size < 64:
            raise ValueError(f"GoogLeNet: input_size is {input_size}, but its poolings need at least 64 pixels")

        def scaled(channels: int) -> int:
            return max(4, 4 * round(width * channels / 4))

        c1, c2, channels = scaled(64), scaled(64), scaled(192)
        self.conv1 = _named({"7x7_s2": nn.Conv2d(3, c1, 7, stride=2, padding=3), "relu": nn.ReLU(inplace=True)})
        self.pool1 = _pool()
        self.norm1 = LocalResponseNorm() if lrn else nn.Identity()
        self.conv2 = _named(
            {
                "3x3_reduce": nn.Conv2d(c1, c2, 1),
                "relu_reduce": nn.ReLU(inplace=True),
                "3x3": nn.Conv2d(c2, channels, 3, padding=1),
                "relu": nn.ReLU(inplace=True),
            }
        )
        self.norm2 = LocalResponseNorm() if lrn else nn.Identity()
        self.pool2 = _pool()
        side = _pooled(_pooled(_pooled((input_size + 1) // 2)))
        classifiers = {}
        for name, outputs in INCEPTIONS.items():
            inception = Inception(channels, *map(scaled, outputs))
            self.add_module(f"inception_{name}", inception)
            channels = inception.out_channels
            if name in ("3b", "4e"):
                self.add_module(f"pool{name[0]}", _pool())
            if auxiliary and name in AUXILIARY:
                classifiers[AUXILIARY[name]] = Auxiliary(channels, side, scaled(128), num_outputs)
        self.pool5 = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.loss3 = _named({"classifier": nn.Linear(channels, num_outputs)})
        for name, classifier in classifiers.items():
            self.add_module(name, classifier)
        self.input_size = input_size
        self.auxiliary = auxiliary
        self.classifiers = ["loss3.classifier", *(f"{name}.classifier" for name in classifiers)]
        layers = [name for name, layer in self.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        self.caffe_fillers = {name: ("xavier", 0.0 if name in self.classifiers else 0.2) for name in layers}

    @property
    def std_factors(self) -> dict[str, float]:
        """What fixed standard deviations are multiplied by, for each layer; see `narrow`."""
        with torch.device("meta"):
            return std_factors(self, GoogLeNet(auxiliary=self.auxiliary))

    def forward(self, x: Tensor, auxiliary: bool | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """With `auxiliary` the auxiliary outputs too; None: in training mode, where there are some."""
        seen = {}
        for name, module in self.named_children():
            if name in AUXILIARY.values():
                break
            x = seen[name] = module(x)
        if self.auxiliary and self.training if auxiliary is None else auxiliary:
            return x, *(self.get_submodule(name)(seen[f"inception_{where}"]) for where, name in AUXILIARY.items())
        return x


class Inception(nn.ModuleDict):
    """Four branches over the same input, concatenated."""

    def __init__(self, channels: int, c1: int, reduce3: int, c3: int, reduce5: int, c5: int, pool: int):
        super().__init__(
            {
                "1x1": nn.Conv2d(channels, c1, 1),
                "3x3_reduce": nn.Conv2d(channels, reduce3, 1),
                "3x3": nn.Conv2d(reduce3, c3, 3, padding=1),
                "5x5_reduce": nn.Conv2d(channels, reduce5, 1),
                "5x5": nn.Conv2d(reduce5, c5, 5, padding=2),
                "pool_proj": nn.Conv2d(channels, pool, 1),
            }
        )
        self.out_channels = c1 + c3 + c5 + pool

    def forward(self, x: Tensor) -> Tensor:
        branches = [
            self["1x1"](x),
            self["3x3"](F.relu(self["3x3_reduce"](x), inplace=True)),
            self["5x5"](F.relu(self["5x5_reduce"](x), inplace=True)),
            self["pool_proj"](F.max_pool2d(x, 3, stride=1, padding=1)),
        ]
        return F.relu(torch.cat(branches, 1), inplace=True)


class Auxiliary(nn.Module):
    """A classifier in the middle of the network."""

    def __init__(self, channels: int, side: int, outputs: int, num_outputs: int):
        super().__init__()
        side = max(1, -(-(side - 5) // 3) + 1)
        self.conv = nn.Conv2d(channels, outputs, 1)
        self.fc = nn.Linear(outputs * side * side, 8 * outputs)
        self.dropout = nn.Dropout(0.7)
        self.classifier = nn.Linear(8 * outputs, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, min(5, x.shape[-1]), stride=3, ceil_mode=True)
        x = F.relu(self.conv(x), inplace=True).flatten(1)
        return self.classifier(self.dropout(F.relu(self.fc(x), inplace=True)))


def _named(modules: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)  # Caffe rounds the pooled size up


def _pooled(size: int) -> int:
    """Side of a pooled map."""
    return -(-(size - 3) // 2) + 1
