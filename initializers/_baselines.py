"""The initializations that the paper compares with, as Caffe defines them; and PyTorch's own, and LSUV."""

import math
import time

import torch
from torch import Tensor, nn

from initializers._filters import draw_filters
from initializers._model import InitializationError, affine_layers, as_inputs, forward, unchanged_on_error
from initializers._report import LayerReport, Report


def gaussian(model: nn.Module, std: float = 0.01, *, seed: int = 0) -> None:
    """Weights N(0, std²), biases 0. The paper's unscaled Gaussian has std .01 (section 4.1)."""
    _fill(model, seed, lambda _, layer, generator: layer.weight.normal_(0, std, generator=generator))


def xavier(model: nn.Module, *, seed: int = 0) -> None:
    """Weights U(-a, a) with a = sqrt(3 / fan_in), biases 0: Glorot & Bengio (2010) as Caffe has it, fan_in alone.

    fan_in = in_channels / groups * kernel height * kernel width.
    """

    def fill(_: str, layer: nn.Module, generator: torch.Generator) -> None:
        limit = math.sqrt(3 / layer.weight[0].numel())
        layer.weight.uniform_(-limit, limit, generator=generator)

    _fill(model, seed, fill)


def msra(model: nn.Module, *, seed: int = 0) -> None:
    """Convolutions N(0, 2 / fan_in), linear layers N(0, .01²), biases 0: He et al. (2015).

    As the paper uses it (section 4.2): "only for the convolutional layers", a Gaussian for the fully connected ones.
    """

    def fill(_: str, layer: nn.Module, generator: torch.Generator) -> None:
        std = math.sqrt(2 / layer.weight[0].numel()) if isinstance(layer, nn.Conv2d) else 0.01
        layer.weight.normal_(0, std, generator=generator)

    _fill(model, seed, fill)


def caffe(model: nn.Module, *, seed: int = 0) -> None:
    """The hand-tuned Gaussian that a network's Caffe definition states: a standard deviation and a bias per layer.

    Args:
        model: a network with an attribute `caffe_fillers`, a dict from layer name to (std, bias).

    Raises:
        InitializationError: the model does not state it, or not for one of its layers.
    """
    fillers = getattr(model, "caffe_fillers", None)
    if fillers is None:
        raise InitializationError(
            f"{type(model).__name__} states no reference initialization: give it an attribute caffe_fillers, a dict "
            "from layer name to (std, bias), or choose another initialization"
        )
    missing = [name for name in affine_layers(model) if name not in fillers]
    if missing:
        raise InitializationError(f"caffe_fillers of {type(model).__name__} lacks {', '.join(missing)}")

    def fill(name: str, layer: nn.Module, generator: torch.Generator) -> None:
        std, bias = fillers[name]
        layer.weight.normal_(0, std, generator=generator)
        if layer.bias is not None:
            layer.bias.fill_(bias)

    _fill(model, seed, fill)


def torch_default(model: nn.Module, *, seed: int = 0) -> None:
    """PyTorch's default, `reset_parameters()` of each layer: weights and biases U(-a, a) with a = sqrt(1 / fan_in)."""
    with unchanged_on_error(model, seed):
        for layer in affine_layers(model).values():
            layer.reset_parameters()


def lsuv(model: nn.Module, images, *, seed: int = 0, tolerance: float = 0.02, max_iterations: int = 21) -> Report:
    """Layer-sequential unit variance (Mishkin & Matas, 2016): orthonormal weights, then unit variance layer by layer.

    W /= sqrt(var) while |1 - var| > tolerance, at most `max_iterations` times, where var is the variance of the whole
    output of the layer; biases 0. One forward pass: the output is linear in the weights, so that it need not be
    computed again after a division.

    Args:
        model, images, seed: as in `initialize`.
        tolerance, max_iterations: as in the authors' tool (ducha-aiki/LSUVinit).

    Returns:
        A `Report`, with the mean and standard deviation of each layer's whole output.

    Raises:
        InitializationError: as `initialize`; the model is then as it was.
    """
    start = time.perf_counter()
    rows: dict[str, LayerReport] = {}
    started = 0.0

    def before(name: str, layer: nn.Module, x: Tensor) -> None:
        nonlocal started
        started = time.perf_counter()
        rows[name] = LayerReport(name, tuple(layer.weight.shape), "orthonormal")
        layer.weight.copy_(draw_filters("orthonormal", layer, x, generator)[0])
        if layer.bias is not None:
            layer.bias.zero_()

    def after(name: str, layer: nn.Module, _: Tensor, output: Tensor) -> Tensor:
        row = rows[name]
        variance, mean = torch.var_mean(output.float(), correction=0)
        row.mean_before, row.std_before = mean.item(), variance.sqrt().item()
        for _ in range(max_iterations):
            if not torch.isfinite(variance) or variance == 0:
                raise InitializationError(
                    f"layer {name}: its output has variance {variance.item()}; pass varied images"
                )
            if (1 - variance).abs() <= tolerance:
                break
            layer.weight.div_(variance.sqrt())
            output.div_(variance.sqrt())
            variance, mean = torch.var_mean(output.float(), correction=0)
        row.mean_after, row.std_after = mean.item(), variance.sqrt().item()
        row.seconds = time.perf_counter() - started
        return output

    with unchanged_on_error(model, seed), torch.no_grad():
        inputs = as_inputs(model, images)
        generator = torch.Generator(inputs[0].device).manual_seed(seed)
        forward(model, inputs, before, after)
    return Report(list(rows.values()), images=len(inputs[0]), seconds=time.perf_counter() - start)


def _fill(model: nn.Module, seed: int, fill) -> None:
    """Biases to 0 and `fill(name, layer, generator)` for each affine layer."""
    layers = affine_layers(model)
    with unchanged_on_error(model, seed), torch.no_grad():
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        for name, layer in layers.items():
            if layer.bias is not None:
                layer.bias.zero_()
            fill(name, layer, generator)
