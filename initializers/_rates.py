"""Change rates: how fast each layer learns, relative to the size of its weights (equations 1 to 3)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from initializers._gradients import (
    IMAGES_AT_A_TIME,
    Gradients,
    Use,
    as_the_model_allows,
    noise_like,
    thawed,
    weight_gradient,
    with_graph,
)
from initializers._inputs import as_inputs
from initializers._layer import PIECE, Call, Layer
from initializers._layers import Layers, forward
from initializers._memory import without_memory
from initializers._model import InitializationError, seed_all, unchanged_on_error, unwrapped
from initializers._outputs import in_parts
from initializers._plot import plot_rates
from initializers._squares import in_range, norm

RATE_DRAWS = 4  # top gradients for each image, where a step is exact and need not be repeated
FAINT = 1e-5  # of the largest rate: one below may be of gradients that are rounding
LINEAR = 0.1  # relative difference up to which a gradient is linear in the top gradient


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
        """The fastest layer's average rate over the slowest's; 1 when all layers learn at the same rate.

        Infinite where a layer does not learn at all.
        """
        slowest, fastest = min(self.mean.values()), max(self.mean.values())
        return fastest / slowest if slowest else math.inf

    def plot(self, ax=None, label: str | None = None):
        """Draw Figure 1 (a) and (b): the average change rate and the coefficient of variation of each layer.

        Args:
            ax: a pair of matplotlib axes, e.g. what an earlier call returned; a new figure where None.
            label: for the legend.

        Returns:
            The pair of axes.
        """
        return plot_rates(self.mean, self.cv, ax, label=label)


def change_rate(model: nn.Module, images, *, seed: int = 0, training: bool = False) -> Rates:
    """Measure the change rates of `model` on `images`.

    C²_k,j = E[ mean over (i, kernel) of (d(eta·z_N) / dW_k(i, j))² ] / mean(W_k²), with z_N the output of the model,
    eta ~ N(0, I) drawn for each image, and E over the images (section 3). Evaluation mode; the model is unchanged.
    The gradient of a layer that is used several times is the sum over its uses.

    Args:
        images: as in `initialize`; the paper uses 100 images of the validation set.
        seed: of eta.
        training: as in `initialize`.

    Returns:
        The rates: 0 for a layer that no gradient reaches, infinite where all weights are 0.

    Raises:
        InitializationError: unusable model or images, or an output that depends on no layer.
    """
    model = unwrapped(model)
    with unchanged_on_error(model, seed, training):
        inputs, names = as_inputs(model, images)
        return measure(Layers(model, names), inputs, seed).rates


@dataclass
class Measurement:
    """Change rates, what they are made of, and the outputs of the model.

    Attributes:
        layers: by name, in order of execution.
        squares: per layer, the squared gradient of each input channel's weights: mean over outputs and kernel,
            expectation over images; float64 (tops, groups, inputs), for the top gradient of each output of the model
            apart, or (1, groups, inputs) for all together.
        weights: per layer, the mean square of each input channel's weights when measured; float64 (groups, inputs).
        outputs: of the model, all that depend on its weights, in one row per image: (N, values); with zeros behind
            those of a smaller batch, where each image has a value for each of its batch.
        left_out: layers of which `squares` and `weights` hold nothing, as they do not learn yet, and why.
    """

    layers: dict[str, Layer]
    squares: dict[str, Tensor]
    weights: dict[str, Tensor]
    outputs: Tensor
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def rates(self) -> Rates:
        """The change rates."""
        gradients = {name: squares.sum(0).mean(0) for name, squares in self.squares.items()}
        return Rates({name: _rate(gradient, self.weights[name].mean()) for name, gradient in gradients.items()})


@as_the_model_allows
def measure(
    layers: Layers,
    inputs: tuple[Tensor, ...],
    seed: int,
    eta: Tensor | None = None,
    before: Callable[[Call, Tensor], None] | None = None,
    draws: int = 1,
    apart: bool = False,
) -> Measurement:
    """Measure on prepared inputs.

    Args:
        eta: the top gradients of a model with one output, one row per image; drawn where None.
        before: called without gradients on the first use of each layer and its input in the first batch; may change
            the layer.
        draws: top gradients drawn for each image; several make up for few images.
        apart: measure the top gradient of each output of the model by itself.
    """
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    count = len(inputs[0])
    if layers.per_image is None:
        layers.per_image = _rows_are_images(layers, inputs)
    batch = IMAGES_AT_A_TIME if layers.per_image else 1
    seed_all(seed)  # for models that draw random numbers even in evaluation mode
    squares: dict[str, Tensor] = {}
    used: dict[str, Layer] = {}
    tops = []
    for first in range(0, count, batch):
        part = slice(first, first + batch)
        few = tuple(x[part] for x in inputs)
        square = partial(_column_squares, images=len(few[0]))
        with without_memory(layers.model), thawed(layers, layers.unseen or ()):
            for gradients, groups, number, more in _turns(layers, few, draws, apart, before if first == 0 else None):
                used |= gradients.layers
                top = groups[number]
                noise = [eta[part].to(top[0])] if eta is not None else [noise_like(each, generator) for each in top]
                found = gradients.take(top, noise, square, keep=more)
                found |= {name: _squares(used[name], own) for name, own in gradients.own.items()}
                for name, columns in found.items():
                    totals = squares.setdefault(name, columns.new_zeros(len(groups), *columns.shape))
                    totals[number] += columns / (count * draws)
            tops.append(_rows([output for group in groups for output in group]))
    weights = {name: _mean_squares(layer) for name, layer in used.items()}
    width = max(top.shape[1] for top in tops)
    for name, layer in used.items():
        none = torch.zeros(1, *layer.blocks.shape[::2], dtype=torch.float64)
        squares[name] = squares.pop(name, none)  # in the order of the layers; 0 where the output depends on none
    return Measurement(used, squares, weights, torch.cat([_padded(top, width) for top in tops]))


def _turns(
    layers: Layers,
    inputs: tuple[Tensor, ...],
    draws: int,
    apart: bool,
    before: Callable[[Call, Tensor], None] | None,
) -> Iterator[tuple[Gradients, list[list[Tensor]], int, bool]]:
    """For each draw and each group of outputs: gradients to take, all groups, the number of that one, are there more.

    Arguments as of `measure`, for one batch.
    """
    gradients, top = with_graph(layers, inputs, before)
    groups = _together(top, apart)
    turns = [(draw, number) for draw in range(draws) for number in range(len(groups))]
    for turn in turns:
        if layers.unseen and turn != turns[0]:  # the functions that take their gradients may do so once
            gradients, top = with_graph(layers, inputs)
            groups = _together(top, apart)
        yield gradients, groups, turn[1], turn != turns[-1]


def _together(top: list[Tensor], apart: bool) -> list[list[Tensor]]:
    """The outputs that depend on weights, in groups whose gradient is taken together."""
    groups = [[output] for output in top] if apart else [top]
    return [[output for output in group if output.requires_grad] for group in groups]


def usable_rates(
    layers: Layers,
    inputs: tuple[Tensor, ...],
    seed: int,
    *,
    draws: int,
    apart: bool = False,
    before: Callable[[Call, Tensor], None] | None = None,
) -> Measurement:
    """Change rates that can be equalised; arguments as of `measure`.

    Layers that do not learn yet, such as those of a branch that starts at 0, are left out of them.

    Raises:
        InitializationError: they overflow, or no layer learns.
    """
    measurement = measure(layers, inputs, seed, before=before, draws=draws, apart=apart)
    squares, weights = measurement.squares, measurement.weights
    if not all(torch.isfinite(values).all() for values in (measurement.outputs, *squares.values(), *weights.values())):
        raise InitializationError(
            "the output or its gradient overflows: normalise the images, or use within=True; where the network "
            'amplifies rounding, as deep ones with gates and Gaussian filters do, use filters="kmeans", or float64'
        )
    for name in measurement.layers:
        if not weights[name].any():
            measurement.left_out[name] = "its weights are all 0"
        elif not squares[name].any():
            measurement.left_out[name] = "no gradient reaches it on these images"
    for name in measurement.left_out:
        del squares[name], weights[name]
    rates = measurement.rates.mean
    faint = [name for name, rate in rates.items() if rate < FAINT * max(rates.values())]
    for name in _rounding(layers, inputs, faint, seed) if faint else ():
        measurement.left_out[name] = "no gradient but rounding reaches it on these images"
        del squares[name], weights[name]
    if not squares:
        raise InitializationError(
            "no layer learns: on these images no gradient reaches any weights that are not 0; initialize the model, or "
            "give a last layer that starts at 0 random weights for this call, or pass between=False where a part has "
            "no gradient, as those that are quantized"
        )
    return measurement


@as_the_model_allows
def _rounding(layers: Layers, inputs: tuple[Tensor, ...], names: list[str], seed: int) -> list[str]:
    """Of some layers those whose gradients are rounding of what cancels out, as before a softmax over equal values.

    Gradients are linear in the top gradient: where three times that gives other than three times them, nothing is left
    but rounding. Seen on the first images.
    """
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    seed_all(seed)
    batch = IMAGES_AT_A_TIME if layers.per_image else 1
    with without_memory(layers.model):
        gradients, top = with_graph(layers, tuple(x[:batch] for x in inputs))
        top = [output for output in top if output.requires_grad]
        noise = [noise_like(output, generator) for output in top]
        one, three = (
            gradients.take(
                top, [factor * each for each in noise], lambda _, uses: weight_gradient(uses), names, keep=factor == 1
            )
            for factor in (1, 3)
        )
    return [name for name in one if norm(one[name] - three[name] / 3) > LINEAR * norm(one[name])]


def _rate(gradient: Tensor, weight: Tensor) -> Tensor:
    """C_k,j from the mean squares of gradients (inputs,) and of weights; weights of 0 change infinitely fast."""
    return torch.full_like(gradient, math.inf) if weight == 0 else (gradient / weight).sqrt()


def _rows(top: list[Tensor]) -> Tensor:
    """Outputs in one row for each image: (N, values)."""
    if not top:
        raise InitializationError(
            "the output of the model does not depend on the weights of its layers, or has no gradient (as behind "
            "quantization, or of reversible blocks): pass between=False, or training=True where training has one"
        )
    return torch.cat([output.detach().reshape(len(output), -1) for output in top], 1)


def _padded(rows: Tensor, width: int) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]))


@torch.no_grad()
def _mean_squares(layer: Layer) -> Tensor:
    """Mean square of the weights of each input channel, float64 (groups, inputs)."""
    blocks = layer.blocks if layer.mask is None else layer.as_blocks(layer.weight.detach() * layer.mask)
    groups, _, width, kernel = blocks.shape
    total = torch.zeros(groups, width, dtype=torch.float64, device=layer.weight.device)
    for piece in blocks.split(max(1, PIECE // (groups * width * kernel)), 1):
        total += _sum_of_squares(piece.float())
    return _mean(layer, total)


@torch.no_grad()
def _rows_are_images(layers: Layers, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the inputs of all layers have a row per image; rows may be windows or tokens, or be of no image.

    Seen on two images, on three and on a batch: a number of rows that is of something else is not all of them. Some
    models take no batch of one, as they squeeze it.
    """
    rows: list[int] = []

    def record(_: Call, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        rows.append(len(x))
        return compute()

    for count in (2, 3, IMAGES_AT_A_TIME):
        rows.clear()
        with in_parts(layers.model, inputs, layers.names), without_memory(layers.model):
            forward(layers, tuple(x[:count] for x in inputs), record)
        if any(number != min(count, len(inputs[0])) for number in rows):
            return False
    return True


def _column_squares(layer: Layer, uses: list[Use], images: int) -> Tensor:
    """Squared gradient of the weights: mean over outputs and kernel, sum over images; float64 (groups, inputs).

    Args:
        uses: each use of the layer with its input and the gradient of its output. Their rows are the images, or all
            of them are of one image.
    """
    _, outputs, width, _ = layer.blocks.shape
    if layer.linear and len(uses) == 1 and layer.mask is None:
        _, *pair = uses[0]
        x, gradient = (part.float().reshape(images, -1, part.shape[-1]) for part in pair)
        if x.shape[1] * (outputs + width) < outputs * width:
            # At few positions the gradient of an image, a sum of outer products, has squares that need no product as
            # large as the weight: column j has the sum x_j' G G' x_j over the positions' inputs and gradients.
            factor = 1.0 if layer.factor is None else layer.factor.item()
            return in_range(_squares_by_positions, x, gradient).double().cpu()[None] * factor**2 / outputs
    total = torch.zeros(layer.blocks.shape[::2], dtype=torch.float64, device=layer.weight.device)
    for image in range(images):
        part = slice(None) if images == 1 else slice(image, image + 1)
        total += _sum_of_squares(layer.as_blocks(weight_gradient(uses, part)))
    return _mean(layer, total)


def _squares(layer: Layer, gradient: Tensor) -> Tensor:
    """As `_column_squares`, of the gradient of one image, shaped like the weights."""
    return _mean(layer, _sum_of_squares(layer.as_blocks(gradient)))


def _mean(layer: Layer, total: Tensor) -> Tensor:
    """The mean over outputs and kernel from the sum, on the CPU."""
    _, outputs, _, kernel = layer.blocks.shape
    return total.cpu() / (outputs * kernel)


def _sum_of_squares(blocks: Tensor) -> Tensor:
    """Of each input channel: (groups, outputs, inputs, kernel) -> float64 (groups, inputs)."""
    return in_range(_sum_over_outputs_and_kernel, blocks).double()


def _sum_over_outputs_and_kernel(blocks: Tensor) -> Tensor:
    return blocks.square().sum(1).sum(-1)  # ten times faster than over both dimensions at once


def _squares_by_positions(x: Tensor, gradient: Tensor) -> Tensor:
    return (x * ((gradient @ gradient.mT) @ x)).sum((0, 1)).clamp(min=0)
