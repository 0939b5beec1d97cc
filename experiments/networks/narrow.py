"""Networks narrower than the published ones, where a fixed standard deviation no longer fits."""

import math

from torch import nn


def std_factors(model: nn.Module, published: nn.Module) -> dict[str, float]:
    """What a published standard deviation is multiplied by in each layer of a narrower network.

    sqrt(fan-in of the published layer / fan-in), so that a signal passes the layer as strong as at full width: the .01
    and .005 of Gaussian initializations were tuned for thousands of inputs.

    Args:
        model: has the layers of `published`, of any width.
        published: the network at its published size; its weights may be on the meta device.
    """
    full = _fan_ins(published)
    return {name: math.sqrt(full[name] / fan_in) for name, fan_in in _fan_ins(model).items() if name in full}


def _fan_ins(model: nn.Module) -> dict[str, int]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return {name: layer.weight[0].numel() for name, layer in layers.items()}
