"""Local response normalisation whose constant stays as it is, so that it scales only nearly."""

import math

import torch
from torch import Tensor

from initializers._layer import Call
from initializers._scales import Scales


class MeasuredLRN:
    """Measures the scales that really come out of local response normalisations, and undoes them in the next layer.

    What a scale of its input does to its output can only be seen in a forward pass: `undo` is called in each, with the
    input of every layer, and `intend` in between, with the scales that were applied.
    """

    def __init__(self, scales: Scales) -> None:
        self.scales = scales
        self.uses = {use.layer: use for use in scales.uses}
        self.sizes: dict[tuple[str, int], Tensor] = {}  # mean magnitude of what comes to a layer with a label
        self.u = torch.zeros(1 + scales.variables, dtype=torch.float64)
        self.log_factors = dict.fromkeys((use.layer.name for use in scales.uses), 0.0)

    def intend(self, u: Tensor) -> None:
        """The log-scales that the next pass will see applied."""
        self.u = u

    def undo(self, call: Call, x: Tensor) -> None:
        """Divide the layer's weights by how much LRN changed its input since the pass before."""
        layer = call.layer
        if layer not in self.uses:
            return  # which is an error as soon as the rates are there
        incoming = self.uses[layer].incoming
        for label in self.scales.through_lrn.keys() & set(incoming.flatten().tolist()):
            channels = incoming == label
            inputs = x.movedim(-1 if layer.linear else 1, -1)[..., channels.flatten().to(x.device)]
            size, key = inputs.abs().mean(), (layer.name, label)
            if key in self.sizes:
                ratio = (self.sizes[key] / size).item()
                layer.scale_inputs(torch.ones_like(channels, dtype=torch.float64).masked_fill(channels, ratio))
                self.log_factors[layer.name] += math.log(ratio) * channels.double().mean().item()
                self._learn(label, ratio)
            self.sizes[key] = size

    def _learn(self, label: int, ratio: float) -> None:
        """The local degree of homogeneity, by which the next scales are chosen."""
        intended = self.u[self.scales.through_lrn[label]].item()
        if abs(intended) > 0.01:
            self.scales.degrees[label] = max(-1.0, min(1.0, -math.log(ratio) / intended))
