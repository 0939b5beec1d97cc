"""Change rates: how fast each layer learns, relative to the size of its weights (equations 1 to 3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from initializers._filters import pad
from initializers._model import InitializationError, as_inputs, forward, unchanged_on_error

BATCH = 16  # images a pass: bounds the activations kept for the backward pass
MAX_COLUMN_VALUES = 4_000_000  # floats of unfolded input (16 MB) held at a time: little memory, and faster


@dataclass(frozen=True)
class Rates:
    """Change rates of the affine layers, in order of execution.

    Attributes:
        columns: per layer, C_k,j for each input channel j of the weight (with groups: the channel within its group).
    """

    columns: dict[str, Tensor]

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(self.columns)

    @property
    def mean(self) -> dict[str, float]:
        """Average change rate C_k of each layer, the mean of C_k,j over j (Figure 1a)."""
        return {name: column.mean().item() for name, column in self.columns.items()}

    @property
    def cv(self) -> dict[str, float]:
        """Coefficient of variation of each layer, standard deviation over j divided by the mean (Figure 1b)."""
        return {name: (column.std(correction=0) / column.mean()).item() for name, column in self.columns.items()}

    @property
    def spread(self) -> float:
        """The fastest layer's average rate over the slowest's; 1 when all layers learn at the same rate."""
        mean = self.mean.values()
        return max(mean) / min(mean)


def change_rate(model: nn.Module, images, *, seed: int = 0) -> Rates:
    """Measure the change rates of `model` on `images`.

    C²_k,j = E[ mean over (i, kernel) of (d(eta·z_N) / dW_k(i, j))² ] / mean(W_k²), with z_N the output of the model,
    eta ~ N(0, I) drawn for each image, and E over the images (section 3). Evaluation mode; the model is unchanged.

    Args:
        images: as in `initialize`; the paper uses 100 images of the validation set.
        seed: of eta.

    Raises:
        InitializationError: unusable model or images, or a layer whose weights are all zero.
    """
    with unchanged_on_error(model, seed):
        return measure(model, as_inputs(model, images), seed)[0]


def measure(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    seed: int,
    eta: Tensor | None = None,
    before: Callable[[str, nn.Module, Tensor], None] | None = None,
) -> tuple[Rates, Tensor]:
    """`change_rate` on prepared inputs, and the outputs of the model.

    Args:
        eta: the top gradients, one row per image; drawn where None.
        before: called without gradients on each layer and its input in the first batch; may change the layer.
    """
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    layers: dict[str, nn.Module] = {}
    squares: dict[str, Tensor] = {}
    tops = []
    for first in range(0, len(inputs[0]), BATCH):
        part = slice(first, first + BATCH)
        seen: list[tuple[str, nn.Module, Tensor]] = []
        outputs: list[Tensor] = []

        def record(name, layer, x, output, seen=seen, outputs=outputs):
            if not output.requires_grad:  # frozen so far: start the graph here
                output = output.detach().requires_grad_()
            seen.append((name, layer, x.detach()))
            outputs.append(output)
            return output.clone()  # what follows may work in place

        with torch.enable_grad():
            top = forward(model, tuple(x[part] for x in inputs), before if first == 0 else None, record)
            noise = _like(top, generator) if eta is None else eta[part].to(top)
            gradients = torch.autograd.grad(top, outputs, noise, allow_unused=True)
        tops.append(top.detach())
        for (name, layer, x), gradient in zip(seen, gradients, strict=True):
            if gradient is None:
                raise InitializationError(f"layer {name}: the output of the model does not depend on it")
            layers[name] = layer
            square = _column_squares(layer, x, gradient)
            squares[name] = squares[name] + square if name in squares else square
    columns = {name: _rate(name, layers[name], squares[name] / len(inputs[0])) for name in squares}
    return Rates(columns), torch.cat(tops)


def _like(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def _rate(name: str, layer: nn.Module, squares: Tensor) -> Tensor:
    weight = layer.weight.detach().float().norm().double().cpu().square() / layer.weight.numel()
    if weight == 0:
        raise InitializationError(f"layer {name}: its weights are all zero, so it has no change rate; initialize it")
    return (squares / weight).sqrt()


def _column_squares(layer: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Squared gradient of the weights, per image: mean over outputs and kernel, sum over images; float64 (in,)."""
    x, gradient = x.float(), gradient.float()
    if isinstance(layer, nn.Linear):
        if x.ndim == 2:  # the gradient of one image is an outer product: its squares need no product
            rows = x.square().T @ gradient.square().sum(1)
        else:
            rows = (gradient.flatten(1, -2).mT @ x.flatten(1, -2)).square().sum((0, 1))
        return rows.double().cpu() / layer.out_features
    x = pad(layer, x)
    columns = layer.in_channels // layer.groups
    kernel = layer.weight[0, 0].numel()
    positions = gradient[0, 0].numel()
    chunk = max(1, MAX_COLUMN_VALUES // (layer.in_channels * kernel * positions))
    total = x.new_zeros(columns, dtype=torch.float64)
    for x_part, gradient_part in zip(x.split(chunk), gradient.split(chunk), strict=True):
        unfolded = F.unfold(x_part, layer.kernel_size, layer.dilation, stride=layer.stride)
        unfolded = unfolded.view(-1, columns * kernel, positions)  # (images * groups, patch, positions)
        weights = gradient_part.reshape(len(unfolded), -1, positions) @ unfolded.mT
        norms = torch.linalg.vector_norm(weights.flatten(0, 1), dim=0)
        total += norms.square().view(columns, kernel).sum(1).double()
    return total.cpu() / (layer.out_channels * kernel)
