"""The initializations that the paper compares with, as Caffe defines them; and PyTorch's own, and LSUV."""

import math
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from initializers._filters import orthonormal
from initializers._graph import Batches
from initializers._inputs import as_inputs
from initializers._layer import Call, Layer, check_input
from initializers._layers import MODULES, NO_LAYER, Layers, affine_modules
from initializers._model import InitializationError, unchanged_on_error, unwrapped
from initializers._report import LayerReport, Report
from initializers._squares import norm
from initializers._sweep import inactive_dropout, recorded, sweep, with_masks


def gaussian(model: nn.Module, std: float = 0.01, *, factors: Mapping[str, float] | None = None, seed: int = 0) -> None:
    """Weights N(0, std²), biases 0. The paper's unscaled Gaussian has std .01 (section 4.1).

    Args:
        factors: what the standard deviation is multiplied by, by the name of the layer; 1 where it is not named. A
            standard deviation tuned for a wide network, such as .01, lets the signal vanish in a narrow one:
            sqrt(fan-in of the wide layer / fan-in) keeps it.
    """
    factors = factors or {}

    def fill(layer: Layer, generator: torch.Generator) -> None:
        layer.weight.normal_(0, factors.get(layer.name, 1.0) * std, generator=generator)

    _fill(model, seed, fill)


def xavier(model: nn.Module, *, fan: str = "in", seed: int = 0) -> None:
    """Weights U(-a, a) with a = sqrt(3 / fan_in), biases 0: Glorot & Bengio (2010) as Caffe has it, fan_in alone.

    fan_in = in_channels / groups * positions of the kernel.

    Args:
        fan: "in"; "out" for fan_out, the outputs of a group * positions of the kernel; or "average" for the mean of the
            two, which is Glorot & Bengio's own.

    Raises:
        ValueError: another `fan`.
    """
    if fan not in ("in", "out", "average"):
        raise ValueError(f"fan={fan!r}: choose in, out or average")
    _fill(model, seed, lambda layer, generator: _xavier(layer, generator, fan))


def msra(model: nn.Module, *, factors: Mapping[str, float] | None = None, linear: bool = False, seed: int = 0) -> None:
    """Convolutions N(0, 2 / fan_in), linear layers N(0, .01²), biases 0: He et al. (2015).

    As the paper uses it (section 4.2): "only for the convolutional layers", a Gaussian for the fully connected ones.

    Args:
        factors: of the linear layers, as in `gaussian`.
        linear: the linear layers as the convolutions, N(0, 2 / fan_in): Caffe's filler in every layer. No `factors`.
    """
    factors = factors or {}

    def fill(layer: Layer, generator: torch.Generator) -> None:
        fixed = layer.linear and not linear
        std = factors.get(layer.name, 1.0) * 0.01 if fixed else math.sqrt(2 / layer.fan_in)
        layer.weight.normal_(0, std, generator=generator)

    _fill(model, seed, fill)


def caffe(model: nn.Module, *, seed: int = 0) -> None:
    """The initialization that a network's Caffe definition states: the kind of the weights and a bias per layer.

    Args:
        model: a network with an attribute `caffe_fillers`, a dict from layer name to (std, bias); std "xavier" stands
            for the weights of `xavier`.

    Raises:
        InitializationError: the model does not state it, or not for one of its layers.
    """
    fillers = getattr(unwrapped(model), "caffe_fillers", None)
    if fillers is None:
        raise InitializationError(
            f"{type(model).__name__} states no reference initialization: give it an attribute caffe_fillers, a dict "
            "from layer name to (std, bias), or choose another initialization"
        )
    missing = [layer.name for layer in affine_modules(unwrapped(model)) if layer.name not in fillers]
    if missing:
        raise InitializationError(f"caffe_fillers of {type(model).__name__} lacks {', '.join(missing)}")

    def fill(layer: Layer, generator: torch.Generator) -> None:
        std, bias = fillers[layer.name]
        if std == "xavier":
            _xavier(layer, generator)
        else:
            layer.weight.normal_(0, std, generator=generator)
        if layer.bias is not None:
            layer.bias.fill_(bias)

    _fill(model, seed, fill)


def torch_default(model: nn.Module, *, seed: int = 0) -> None:
    """PyTorch's default, `reset_parameters()` of each layer: weights and biases U(-a, a) with a = sqrt(1 / fan_in).

    Attention has a default of its own: Xavier's for the projections that go in, and biases 0.
    """
    modules = [module for module in model.modules() if isinstance(module, (*MODULES, nn.MultiheadAttention))]
    if not modules:
        raise InitializationError(NO_LAYER)
    with unchanged_on_error(model, seed):
        for module in modules:
            if not isinstance(module, nn.MultiheadAttention):
                module.reset_parameters()
        for module in modules:
            if isinstance(module, nn.MultiheadAttention):  # after the projection that it holds
                module._reset_parameters()


def lsuv(
    model: nn.Module,
    images,
    *,
    seed: int = 0,
    tolerance: float = 0.02,
    max_iterations: int = 21,
    training: bool = False,
) -> Report:
    """Layer-sequential unit variance (Mishkin & Matas, 2016): orthonormal weights, then unit variance layer by layer.

    W /= sqrt(var) while |1 - var| > tolerance, at most `max_iterations` times, where var is the variance of the whole
    output of the layer; biases 0. One forward pass: the output is linear in the weights, so that it need not be
    computed again after a division.

    Args:
        model, images, seed, training: as in `initialize`.
        tolerance, max_iterations: as in the authors' tool (ducha-aiki/LSUVinit).

    Returns:
        A `Report`, with the mean and standard deviation of each layer's whole output.

    Raises:
        InitializationError: as `initialize`; the model is then as it was.
    """
    start = time.perf_counter()
    model = unwrapped(model)
    with unchanged_on_error(model, seed, training):
        inputs, names = as_inputs(model, images)
        layers = Layers(model, names, trainable=True)
        generator = torch.Generator(inputs[0].device).manual_seed(seed)
        known = recorded(layers, inputs)
        report = Report([], images=len(inputs[0]))

        def visit(call: Call, entering: Batches, compute: Batches) -> None:
            started = time.perf_counter()
            layer = call.layer
            row = LayerReport(layer.name, tuple(layer.weight.shape), "orthonormal")
            report.layers.append(row)
            check_input(layer, entering())
            if layer.name in known.tied:
                row.filters = None
                row.add_tied(known.tied[layer.name])
                row.mean_after, variance = _moments(compute())
                row.std_after = math.sqrt(variance)
                return
            layer.set_weight(orthonormal(layer, generator))
            outputs = compute()
            if not any(map(len, outputs)):
                row.add_note("no image reaches it: its weights stay orthonormal")
                return
            mean, variance = _moments(outputs)
            row.mean_before, row.std_before = mean, math.sqrt(variance)
            for _ in range(max_iterations):
                if variance == 0 and len(inputs[0]) > 1 and not any(output.any() for output in outputs):
                    row.add_note("its input is 0, so that its weights stay orthonormal")
                    break
                if not math.isfinite(variance) or variance == 0:
                    message = f"layer {layer.name}: its output has variance {variance}; pass varied images"
                    raise InitializationError(message)
                if abs(1 - variance) <= tolerance:
                    break
                for values in (layer.weight, *outputs):
                    values.div_(math.sqrt(variance))
                mean, variance = _moments(outputs)
            row.mean_after, row.std_after = mean, math.sqrt(variance)
            row.seconds = time.perf_counter() - started

        with_masks(layers, inputs, report, partial(sweep, layers, inputs, known, visit))
        report.inactive_dropout = inactive_dropout(layers, known.seen)
    report.seconds = time.perf_counter() - start
    return report


def _moments(outputs: list[Tensor]) -> tuple[float, float]:
    """Mean and population variance of all values of a layer's output."""
    count = sum(output.numel() for output in outputs)
    mean = sum(output.sum(dtype=torch.float32).item() for output in outputs) / count
    squares = 0.0
    for output in outputs:
        for row in output:  # a copy that fits the cache
            squares += norm(row.float() - mean).item() ** 2
    return mean, squares / count


def _xavier(layer: Layer, generator: torch.Generator, fan: str = "in") -> None:
    _, outputs, inputs, kernel = layer.blocks.shape
    number = {"in": inputs, "out": outputs, "average": (inputs + outputs) / 2}[fan] * kernel
    limit = math.sqrt(3 / number)
    layer.weight.uniform_(-limit, limit, generator=generator)


def _fill(model: nn.Module, seed: int, fill) -> None:
    """Biases to 0 and `fill(layer, generator)` for each affine layer."""
    model = unwrapped(model)
    layers = list(affine_modules(model))
    if not layers:
        raise InitializationError(NO_LAYER)
    with unchanged_on_error(model, seed), torch.no_grad():
        generator = torch.Generator(layers[0].weight.device).manual_seed(seed)
        for layer in layers:
            if layer.bias is not None:
                layer.bias.zero_()
            fill(layer, generator)
