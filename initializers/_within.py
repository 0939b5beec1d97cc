"""Algorithm 1: filters, and the within-layer normalisation of every channel.

For each affine layer k in the order of execution, with filters W_k (section 3.3) and biases b_k = 0, take the mean
mu(i) and the standard deviation sigma(i) of each output channel z_k(i) over the images and all positions. Then

    W_k(i, :) <- W_k(i, :) / sigma(i)        b_k(i) <- beta - mu(i) / sigma(i)

and go on to the next layer with the outputs that these give. The columns of a layer then learn at about one rate.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from initializers._filters import DATA_DRIVEN, draw_filters
from initializers._graph import Batches
from initializers._layer import Call, Layer, channel_statistics, check_input, memory, overlap
from initializers._layers import Layers, forward
from initializers._memory import without_memory
from initializers._model import InitializationError
from initializers._report import LayerReport, Report
from initializers._squares import in_range, root_mean_square, squared_norms
from initializers._sweep import Recorded, sweep

FLAT = 1e-5  # of the mean of a channel or of its input: a standard deviation below is rounding
ROUNDING = 1e-3  # of a unit standard deviation: what rounding may change of statistics without a note
FAINT = 1e-6  # of the input of a layer: a group of it below is rounding of what cancelled out before


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
) -> dict[str, tuple[Tensor, Tensor]]:
    """Filters and Algorithm 1 in one pass over all images; `report` gets a row for each layer.

    Returns:
        By name of the layers that were normalised, mean and standard deviation of each output channel in the first
        batch of images.
    """
    first: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator(inputs[0].device).manual_seed(rule.seed)

    def visit(call: Call, entering: Batches, compute: Batches) -> None:
        start = time.perf_counter()
        layer = call.layer
        row = LayerReport(layer.name, tuple(layer.weight.shape))
        report.layers.append(row)
        inputs = entering()
        check_input(layer, inputs)
        tied = known.tied.get(layer.name)
        if tied is not None:
            row.add_tied(tied)
        elif rule.filters is not None:
            after_convolution = any(len(earlier.shape) > 2 for earlier in report.layers)
            kind = "gaussian" if after_convolution and layer.linear and rule.filters in DATA_DRIVEN else rule.filters
            centre = rule.normalise and layer.bias is None and layer.fixed_bias is None and layer.mask is None
            _set_filters(row, call, inputs, kind, centre, generator)
            if row.filters == "gaussian" and not rule.normalise:
                layer.weight.mul_(rule.factors.get(layer.name, 1.0))

        seen = ~layer.hidden
        if layer.mask is not None:
            row.add_note(_mask_note(layer, seen))
        rounding = _rounding(layer, inputs)
        del inputs
        outputs = compute()
        mu, sigma = _statistics(layer, outputs)
        row.mean_before, row.std_before = mu[seen].mean().item(), sigma[seen].mean().item()
        if rule.normalise and tied is None:
            flat = sigma <= rounding.maximum(FLAT * mu.abs())
            if flat.all() and report.images > 1:
                row.add_note(_normalise_still(layer, outputs, mu, rule.beta))
            else:
                dead = _dead_groups(layer, flat & seen, report.images)
                sigma = torch.where(seen, sigma, 1.0)
                row.add_note(_normalise_channels(layer, outputs, mu, sigma, dead, rule.beta))
            mu, sigma = _statistics(layer, outputs)
            row.mean_after, row.std_after = mu[seen].mean().item(), sigma[seen].mean().item()
            first[layer.name] = (mu, sigma) if len(outputs) == 1 else channel_statistics(layer, outputs[:1])
        row.seconds = time.perf_counter() - start

    sweep(layers, inputs, known, visit)
    return first


@torch.no_grad()
def note_rounding(
    layers: Layers, inputs: tuple[Tensor, ...], known: Recorded, first: dict[str, tuple[Tensor, Tensor]], report: Report
) -> None:
    """Note the layers whose statistics another pass of the first batch changes, other than by random numbers.

    Behind dropout, and where functions draw random numbers, nothing is noted.

    Args:
        first: what `initialize_within` returns.
    """
    if layers.random:
        return
    batch = known.batch(len(inputs[0]))
    again = layers.anew()
    rows = {row.name: row for row in report.layers}

    def compare(call: Call, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        output = compute()
        before = first.pop(call.layer.name, None)
        if before is not None and not again.drawn:
            now = channel_statistics(call.layer, [output])
            change = max((a - b).abs().max().item() for a, b in zip(before, now, strict=True))
            if change > ROUNDING:
                cause = _shared_weights(layers) or "rounding before it"
                rows[call.layer.name].add_note(f"{cause} changes its mean or std by up to {change:.2g}")
        return output

    with without_memory(layers.model):
        forward(again, tuple(x[:batch] for x in inputs), compare)


def _shared_weights(layers: Layers) -> str:
    """What two layers share of which each sets the weights; empty where there is nothing."""
    by_memory: dict[int, list[Layer]] = {}
    for layer in layers.found.values():
        others = by_memory.setdefault(memory(layer.weight), [])
        shared = next((other for other in others if overlap(other.weight, layer.weight)), None)
        if shared is not None:
            return f"that {shared.name} and {layer.name} share weights"
        others.append(layer)
    return ""


def _set_filters(
    row: LayerReport, call: Call, inputs: list[Tensor], kind: str, centre: bool, generator: torch.Generator
) -> None:
    weights, row.filters, note = draw_filters(kind, call, inputs, generator, centre)
    row.add_note(note)
    call.layer.set_weight(weights)


def _mask_note(layer: Layer, seen: Tensor) -> str:
    """What the mask of a layer does; `seen` are the channels that have weights left, bool (out_channels,)."""
    note = "the model's forward pass sets some of its weights to 0"
    if not seen.all():
        note += f", and all of those of {int((~seen).sum())} of {len(seen)} channels"
    return f"{note} and its mean is as it comes" if layer.bias is None else note


def _rounding(layer: Layer, inputs: list[Tensor]) -> Tensor:
    """The standard deviation of each output channel below which it is rounding; (out_channels,).

    Parts of the norm of its weights times the root mean square of its group's input, and of the whole input.
    """
    squares = torch.zeros(layer.groups, dtype=torch.float64, device=layer.weight.device)
    for x in inputs:
        channel = x.ndim - layer.weight.ndim + 1
        others = None if layer.groups == 1 else [dimension for dimension in range(x.ndim) if dimension != channel]
        squares += in_range(partial(squared_norms, dim=others), x).view(layer.groups, -1).sum(1)
    each = squares * layer.groups / max(1, sum(x.numel() for x in inputs))
    each = (FLAT**2 * each).maximum(FAINT**2 * each.mean())
    norms = _squared_norms_of_filters(layer) * (1.0 if layer.factor is None else layer.factor) ** 2
    return (norms * each.unsqueeze(1)).sqrt().flatten()


def _squared_norms_of_filters(layer: Layer) -> Tensor:
    """Float64 (groups, outputs)."""
    precise = torch.promote_types(layer.weight.dtype, torch.float32)
    return in_range(lambda blocks: blocks.square().sum((2, 3)), layer.blocks.to(precise)).double()


def _normalise_channels(
    layer: Layer, outputs: list[Tensor], mu: Tensor, sigma: Tensor, dead: Tensor, beta: float
) -> str:
    """Algorithm 1 for one layer; the outputs follow in place, as they are linear in weights and biases.

    Args:
        mu, sigma: of each output channel, (out_channels,). dead: groups of channels that do not vary, (groups,).

    Returns:
        A note on the groups of channels that do not vary on the images, because their few inputs are dead behind a
        ReLU: their weights stay as they are, or get length 1 where they are longer.
    """
    norms = _squared_norms_of_filters(layer).sqrt().flatten().to(sigma)
    large = norms.clamp(min=1)  # filters of whitened rounding are
    sigma = torch.where(dead.repeat_interleave(len(sigma) // layer.groups), large, sigma)
    layer.blocks.div_(sigma.view(layer.groups, -1, 1, 1))
    shift = torch.zeros_like(mu)
    if layer.bias is not None:
        shift = beta - mu / sigma
        factor = 1 if layer.bias_factor is None else layer.bias_factor  # what is stored times it is what the layer adds
        layer.bias.copy_((layer.bias * factor - mu) / sigma / factor + beta / factor)
    elif layer.fixed_bias is not None:
        shift = layer.fixed_bias - layer.fixed_bias / sigma  # is not divided with the rest
    _follow(layer, outputs, 1 / sigma, shift)
    return f"{int(dead.sum())} of {layer.groups} groups do not vary and keep their scale" if dead.any() else ""


def _normalise_still(layer: Layer, outputs: list[Tensor], mu: Tensor, beta: float) -> str:
    """For a layer of which no channel varies: its mean square over the channels becomes 1, and the biases beta.

    So a token that is learned, a state that starts at 0 or an embedding of positions gives what other layers give.
    Arguments, and what is returned, as of `_normalise_channels`.
    """
    if not layer.blocks.any():
        return "its weights are all 0 and stay so"
    fixed = layer.bias if layer.bias is not None else layer.fixed_bias
    fixed = torch.zeros_like(mu) if fixed is None else fixed.detach().clone()
    if layer.bias is not None and layer.bias_factor is not None:
        fixed *= layer.bias_factor
    reached = any(map(len, outputs))
    size = root_mean_square(mu - fixed).to(mu)
    if not reached or size <= FLAT * root_mean_square(fixed):  # the input is 0
        size = root_mean_square(layer.blocks) * math.sqrt(layer.fan_in) * (layer.factor or 1)
    layer.blocks.div_(size)
    shift = fixed - fixed / size
    if layer.bias is not None:
        layer.bias.fill_(beta / (layer.bias_factor or 1))
        shift = beta - fixed / size
    _follow(layer, outputs, 1 / size, shift)
    if not reached:
        return "no image reaches it: its weights got a mean square of 1 / fan-in"
    return "its input is the same for all images, so that its size over the channels became 1, not that over the images"


def _follow(layer: Layer, outputs: list[Tensor], scale: Tensor, shift: Tensor) -> None:
    """Outputs times `scale` plus `shift`, by channel, in place."""
    by_channel = (-1, *[1] * (0 if layer.linear else layer.weight.ndim - 2))
    for output in outputs:
        output.mul_(scale if scale.ndim == 0 else scale.view(by_channel)).add_(shift.view(by_channel))


def _dead_groups(layer: Layer, flat: Tensor, images: int) -> Tensor:
    """Groups of which no channel varies, where others do; bool (groups,).

    Raises:
        InitializationError: another channel does not vary beyond rounding.
    """
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
        message = f"layer {layer.name}: its output overflows: normalise the images, or check its weights"
        raise InitializationError(message)
    return mean, std
