"""Algorithm 1: filters, and the within-layer normalisation of every channel.

For each affine layer k in the order of execution, with filters W_k (section 3.3) and biases b_k = 0, take the mean
mu(i) and the standard deviation sigma(i) of each output channel z_k(i) over the images and all positions. Then

    W_k(i, :) <- W_k(i, :) / sigma(i)        b_k(i) <- beta - mu(i) / sigma(i)

and go on to the next layer with the outputs that these give. The columns of a layer then learn at about one rate.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from initializers._filters import DATA_DRIVEN, draw_filters
from initializers._graph import Batches
from initializers._layers import Call, Layer, Layers, channel_statistics
from initializers._model import InitializationError
from initializers._report import LayerReport, Report
from initializers._sweep import Recorded, sweep

FLAT = 1e-5  # of the mean of a channel: a standard deviation below is rounding


@dataclass(frozen=True)
class Within:
    """What layers get, as in `initialize`; `normalise` is its `within`, `beta` its `bias`."""

    filters: str | None
    normalise: bool
    beta: float
    factors: Mapping[str, float]
    seed: int


def initialize_within(
    layers: Layers, inputs: tuple[Tensor, ...], known: Recorded, rule: Within, report: Report
) -> None:
    """Filters and Algorithm 1 in one pass over all images; `report` gets a row for each layer."""
    generator = torch.Generator(inputs[0].device).manual_seed(rule.seed)

    def visit(call: Call, entering: Batches, compute: Batches) -> None:
        start = time.perf_counter()
        layer = call.layer
        row = LayerReport(layer.name, tuple(layer.weight.shape))
        report.layers.append(row)
        tied = known.tied.get(layer.name)
        if tied is not None:
            row.add_tied(tied)
        elif rule.filters is not None:
            after_convolution = any(len(earlier.shape) > 2 for earlier in report.layers)
            kind = "gaussian" if after_convolution and layer.linear and rule.filters in DATA_DRIVEN else rule.filters
            centre = rule.normalise and layer.bias is None and layer.fixed_bias is None
            _set_filters(row, call, entering(), kind, centre, generator)
            if row.filters == "gaussian" and not rule.normalise:
                layer.weight.mul_(rule.factors.get(layer.name, 1.0))

        outputs = compute()
        mu, sigma = _statistics(layer, outputs)
        row.mean_before, row.std_before = mu.mean().item(), sigma.mean().item()
        if rule.normalise and tied is None:
            images = sum(map(len, outputs))
            still = bool((sigma <= FLAT * mu.abs()).all()) and images > 1
            normalise = _normalise_still if still else _normalise_channels
            row.add_note(normalise(layer, outputs, mu, sigma, rule.beta))
            mu, sigma = _statistics(layer, outputs)
            row.mean_after, row.std_after = mu.mean().item(), sigma.mean().item()
        row.seconds = time.perf_counter() - start

    sweep(layers, inputs, known, visit)


def _set_filters(
    row: LayerReport, call: Call, inputs: list[Tensor], kind: str, centre: bool, generator: torch.Generator
) -> None:
    weights, row.filters, note = draw_filters(kind, call, inputs, generator, centre)
    row.add_note(note)
    call.layer.set_weight(weights)


def _normalise_channels(layer: Layer, outputs: list[Tensor], mu: Tensor, sigma: Tensor, beta: float) -> str:
    """Algorithm 1 for one layer; the outputs follow in place, as they are linear in weights and biases.

    Args:
        mu, sigma: of each output channel, (out_channels,).

    Returns:
        A note on groups of channels that do not vary on the images, because their few inputs are dead behind a ReLU:
        their weights stay as they are.

    Raises:
        InitializationError: a channel does not vary beyond rounding.
    """
    dead = _dead_groups(layer, mu, sigma, sum(map(len, outputs)))
    sigma = torch.where(dead.repeat_interleave(len(sigma) // layer.groups), 1.0, sigma)
    layer.blocks.div_(sigma.view(layer.groups, -1, 1, 1))
    shift = torch.zeros_like(mu)
    if layer.bias is not None:
        shift = beta - mu / sigma
        factor = 1 if layer.factor is None else layer.factor  # what is stored times it is what the layer adds
        layer.bias.copy_((layer.bias * factor - mu) / sigma / factor + beta / factor)
    elif layer.fixed_bias is not None:
        shift = layer.fixed_bias - layer.fixed_bias / sigma  # is not divided with the rest
    _follow(layer, outputs, 1 / sigma, shift)
    return f"{int(dead.sum())} of {layer.groups} groups do not vary and keep their scale" if dead.any() else ""


def _normalise_still(layer: Layer, outputs: list[Tensor], mu: Tensor, sigma: Tensor, beta: float) -> str:
    """For a layer of which no channel varies: its mean square over the channels becomes 1, and the biases beta.

    So a token that is learned, a state that starts at 0 or an embedding of positions gives what other layers give.
    Arguments, and what is returned, as of `_normalise_channels`.
    """
    if not layer.blocks.any():
        return "its weights are all 0 and stay so"
    fixed = layer.bias if layer.bias is not None else layer.fixed_bias
    fixed = torch.zeros_like(mu) if fixed is None else fixed.detach().clone()
    if layer.bias is not None and layer.factor is not None:
        fixed *= layer.factor
    size = (mu - fixed).square().mean().sqrt()
    if size <= FLAT * fixed.square().mean().sqrt():  # the input is 0
        size = layer.blocks.square().mean().sqrt() * math.sqrt(layer.fan_in) * (layer.factor or 1)
    layer.blocks.div_(size)
    shift = fixed - fixed / size
    if layer.bias is not None:
        layer.bias.fill_(beta / (layer.factor or 1))
        shift = beta - fixed / size
    _follow(layer, outputs, 1 / size, shift)
    return "its input is the same for all images, so that its size over the channels became 1, not that over the images"


def _follow(layer: Layer, outputs: list[Tensor], scale: Tensor, shift: Tensor) -> None:
    """Outputs times `scale` plus `shift`, by channel, in place."""
    by_channel = (-1, *[1] * (0 if layer.linear else layer.weight.ndim - 2))
    for output in outputs:
        output.mul_(scale if scale.ndim == 0 else scale.view(by_channel)).add_(shift.view(by_channel))


def _dead_groups(layer: Layer, mu: Tensor, sigma: Tensor, images: int) -> Tensor:
    """Groups of which no channel varies, where others do; bool (groups,).

    Raises:
        InitializationError: another channel does not vary beyond rounding.
    """
    flat = sigma <= FLAT * mu.abs()
    dead = flat.view(layer.groups, -1).all(1)
    if dead.all():
        dead = torch.zeros_like(dead)
    flat = flat & ~dead.repeat_interleave(len(flat) // layer.groups)
    if flat.any():
        raise InitializationError(
            f"layer {layer.name}: output channel {flat.nonzero()[0].item()} has zero variance on {images} image(s), so "
            "it cannot be scaled; pass more, or more varied, images, or check for inputs that are always zero"
        )
    return dead


def _statistics(layer: Layer, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel.

    Raises:
        InitializationError: a channel is not finite.
    """
    mean, std = channel_statistics(layer, outputs)
    if not (torch.isfinite(mean) & torch.isfinite(std)).all():
        raise InitializationError(f"layer {layer.name}: its output holds NaN or Inf; check the weights before it")
    return mean, std
