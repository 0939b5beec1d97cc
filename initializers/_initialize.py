"""The method: filters, within-layer normalisation (Algorithm 1) and between-layer normalisation (Algorithm 2)."""

import math
import time

import torch
from torch import Tensor, nn

from initializers._chain import Chain, trace_chain
from initializers._filters import DATA_DRIVEN, KINDS, draw_filters
from initializers._model import (
    InitializationError,
    as_inputs,
    channel_statistics,
    forward,
    per_channel,
    unchanged_on_error,
)
from initializers._rates import Rates, measure
from initializers._report import LayerReport, Report

METHODS = ("balance", "paper")
RATE_IMAGES = 12  # the between-layer step measures on this many of the images (the authors' code: 16); more gain little
PAPER_STEPS = 10  # "roughly 10 iterations", Algorithm 2
FEW_IMAGES = 4  # enough to correct what is off by a factor of ten, which the next round corrects again
MAX_ROUNDS = 10  # of the exact step, where LRN makes it inexact
SETTLED = 1.05  # spread at which the rounds end; less than the spread between two samples of images


def initialize(
    model: nn.Module,
    images,
    filters: str | None = "kmeans",
    within: bool = True,
    between: bool = True,
    seed: int = 0,
    *,
    bias: float = 0.1,
    method: str = "balance",
    alpha: float = 0.25,
) -> Report:
    """Initialize every affine layer of `model` from `images` (section 3).

    One forward pass sets the filters and normalises each layer on the outputs of those before it; a few more on some
    of the images balance the layers. Flags, gradients, hooks, global random state and BatchNorm statistics are left
    as they are (the statistics are scaled along with what they describe). On the same device the same seed gives
    the same weights, to the bit.

    Args:
        model: of Conv2d and Linear layers and anything between them. The between-layer step needs them to form a
            chain.
        images: a float tensor (N, C, H, W), preprocessed as for training, or any iterable of batches (a tensor, or a
            tuple or dict whose first tensor is the input), or a tuple of tensors for a model of several inputs. The
            paper uses 160 images of the training set.
        filters: "gaussian", "pca", "zca", "kmeans", "patches", "orthonormal" or None, which keeps the weights that
            are there (section 3.3). Linear layers after a convolution become Gaussian where the kind is data-driven,
            since a few hundred images are too few for them.
        within: scale each output channel to unit variance and mean `bias` over images and positions (Algorithm 1).
        between: equalise the change rates of all layers (Algorithm 2).
        seed: of all that is random.
        bias: the mean of every output channel, beta of Algorithm 1. The authors' code uses 0.1.
        method: "balance" solves Algorithm 2 exactly in one step, and repeats it while LRN makes it inexact; "paper"
            takes ten steps damped by `alpha`.
        alpha: damping of the "paper" method.

    Returns:
        A `Report`; print it for a table.

    Raises:
        InitializationError: the model or the images cannot be used (no affine layer, NaN or Inf, a channel of no
            variance, images of a shape that the model rejects, ...). The model is then exactly as it was.
    """
    if filters is not None and filters not in KINDS:
        raise InitializationError(f"unknown filters {filters!r}: choose one of {', '.join(KINDS)} or None")
    if method not in METHODS:
        raise InitializationError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    start = time.perf_counter()
    with unchanged_on_error(model, seed):
        inputs = as_inputs(model, images)
        chain = trace_chain(model) if between else None
        report = Report([], images=len(inputs[0]))
        if filters is not None or within:
            _sweep(model, inputs, filters, within, bias, seed, report)
        if chain is not None:
            _equalise(model, inputs, chain, method, alpha, seed, report)
    report.seconds = time.perf_counter() - start
    return report


def rescale(model: nn.Module, images, *, seed: int = 0, method: str = "balance", alpha: float = 0.25) -> Report:
    """The between-layer step alone, for pre-trained weights: the rates become equal, the function stays (section 4.3).

    Arguments, report and errors are those of `initialize`.
    """
    return initialize(model, images, None, within=False, between=True, seed=seed, method=method, alpha=alpha)


def _sweep(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    filters: str | None,
    within: bool,
    bias: float,
    seed: int,
    report: Report,
) -> None:
    """Filters and Algorithm 1 in one forward pass over all images, which goes on with the normalised outputs."""
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    row = LayerReport("", ())
    started = 0.0
    after_convolution = False

    def before(name: str, layer: nn.Module, x: Tensor) -> None:
        nonlocal row, started, after_convolution
        started = time.perf_counter()
        row = LayerReport(name, tuple(layer.weight.shape))
        report.layers.append(row)
        if filters is None:
            return
        after_convolution |= isinstance(layer, nn.Conv2d)
        linear = after_convolution and isinstance(layer, nn.Linear)
        kind = "gaussian" if linear and filters in DATA_DRIVEN else filters
        try:
            weight, row.note = draw_filters(kind, layer, x, generator)
        except InitializationError as error:
            raise InitializationError(f"layer {name}: {error}") from error
        row.filters = "gaussian" if row.note else kind
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.zero_()

    def after(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        mean, std = _statistics(name, layer, output)
        row.mean_before, row.std_before = mean.mean().item(), std.mean().item()
        if within:
            output = _normalise(name, layer, output, mean, std, bias)
            mean, std = _statistics(name, layer, output)
            row.mean_after, row.std_after = mean.mean().item(), std.mean().item()
        row.seconds = time.perf_counter() - started
        return output

    with torch.no_grad():
        forward(model, inputs, before, after)


def _normalise(name: str, layer: nn.Module, output: Tensor, mean: Tensor, std: Tensor, bias: float) -> Tensor:
    """W(i, :) / sigma(i), and the bias that makes the mean `bias`; the output follows, as it is linear in both.

    Raises:
        InitializationError: a channel does not vary beyond rounding.
    """
    flat = std <= 1e-5 * mean.abs()
    if flat.any():
        channel = flat.nonzero()[0].item()
        raise InitializationError(
            f"layer {name}: output channel {channel} has zero variance on {len(output)} image(s), so it cannot be "
            "scaled; pass more, or more varied, images, or check for inputs that are always zero"
        )
    layer.weight.div_(std.view(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is None:
        return output.div_(per_channel(layer, std))
    layer.bias.sub_(mean).div_(std).add_(bias)
    return output.mul_(per_channel(layer, 1 / std)).add_(per_channel(layer, bias - mean / std))


def _statistics(name: str, layer: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel.

    Raises:
        InitializationError: a channel is not finite.
    """
    mean, std = channel_statistics(layer, output)
    if not (torch.isfinite(mean) & torch.isfinite(std)).all():
        raise InitializationError(f"layer {name}: its output holds NaN or Inf; check the weights before it")
    return mean, std


def _equalise(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    chain: Chain,
    method: str,
    alpha: float,
    seed: int,
    report: Report,
) -> None:
    """Algorithm 2 on the scales of `chain`."""
    count = len(inputs[0])
    chosen = torch.linspace(0, count - 1, min(count, RATE_IMAGES)).round().long()
    inputs = tuple(x[chosen.to(x.device)] for x in inputs)
    sizes: dict[str, Tensor] = {}  # mean magnitude of each layer's input
    scales = dict.fromkeys(chain.layers, 1.0)

    def follow(name: str, layer: nn.Module, x: Tensor) -> None:
        """Divide out how much LRN really changed the layer's input, which only a forward pass can tell."""
        size = x.abs().mean()
        if name in chain.measured and name in sizes:
            ratio = (sizes[name] / size).item()
            layer.weight.mul_(ratio)
            scales[name] *= ratio
        sizes[name] = size

    def measured() -> tuple[Rates, Tensor]:
        rates, output = measure(model, inputs, seed, before=follow)
        if not torch.isfinite(output).all() or math.inf in rates.mean.values():
            raise InitializationError("the output or its gradient overflows: normalise the images, or use within=True")
        still = next((name for name, mean in rates.mean.items() if not mean > 0), None)
        if still is not None:
            raise InitializationError(f"layer {still}: no gradient reaches its weights on these images; initialize it")
        return rates, output

    rates, output = first_rates, first_output = measured()
    for _ in range(MAX_ROUNDS if method == "balance" else PAPER_STEPS):
        mean = rates.mean
        u = chain.equalising([mean[name] for name in chain.layers])
        for name, factor in chain.apply(model, u if method == "balance" else alpha * u).items():
            scales[name] *= factor
        report.rounds += 1
        last = rates.spread
        rates, output = measured()
        if method == "balance" and (chain.exact or rates.spread < SETTLED or rates.spread > 0.99 * last):
            break

    if not report.layers:
        report.layers = [LayerReport(name, tuple(model.get_submodule(name).weight.shape)) for name in chain.layers]
    first_mean, mean = first_rates.mean, rates.mean
    for row in report.layers:
        row.rate_before, row.rate_after = first_mean[row.name], mean[row.name]
        row.scale = scales[row.name]
    report.rate_images = len(chosen)
    report.output_change = ((output - first_output).norm() / first_output.norm()).item()
