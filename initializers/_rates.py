"""Change rates: how fast each layer learns, relative to the size of its weights (equations 1 to 3)."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce, wraps
from typing import TypeVar

import torch
from torch import Tensor, nn

from initializers._inputs import as_inputs
from initializers._layer import PIECE, Call, Layer, check_input, memory
from initializers._layers import Layers, forward
from initializers._memory import without_memory
from initializers._model import InitializationError, seed_all, unchanged_on_error, unwrapped
from initializers._outputs import in_parts
from initializers._plot import plot_rates
from initializers._squares import in_range, norm

RATE_DRAWS = 4  # top gradients for each image, where a step is exact and need not be repeated
IMAGES_AT_A_TIME = 16  # bounds the activations kept for the backward pass
FAINT = 1e-5  # of the largest rate: one below may be of gradients that are rounding
UNSEEN = 1e-4  # relative difference up to which the gradient of weights is what arrives at the outputs of their layer
LINEAR = 0.1  # relative difference up to which a gradient is linear in the top gradient

Result = TypeVar("Result")
Use = tuple[Call, Tensor, Tensor]  # of a layer, with its input and the gradient of its output


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


class _GradientFails(InitializationError):
    """The gradient of the output cannot be taken."""


class _OtherRows(InitializationError):
    """The rows of a layer's input are not the images."""


class _MayBeUnseen(InitializationError):
    """The gradients of layers may not all come by their outputs; the argument is the set of their names."""


def _as_the_model_allows(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Try again where a gradient fails or is not seen, or where rows are not the images after all.

    Then with copies of what the gradient needs and the model overwrites, such as `torch.exp(x).add_(y)`: not done at
    once, as copies take time. Or with one image at a time: how many rows go to an expert depends on the images, and of
    weights whose gradient a function of the model's own takes only the whole is known.
    """

    @wraps(compute)
    def tried_again(layers: Layers, inputs: tuple[Tensor, ...], *args, **kwargs) -> Result:
        try:
            return compute(layers, inputs, *args, **kwargs)
        except _OtherRows:
            layers.per_image = False
            return tried_again(layers, inputs, *args, **kwargs)
        except _MayBeUnseen as candidates:
            layers.unseen = candidates.args[0]
            layers.unseen = _unseen(layers, inputs)
            layers.per_image = layers.per_image and not layers.unseen
            return tried_again(layers, inputs, *args, **kwargs)
        except _GradientFails:
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                return compute(layers, inputs, *args, **kwargs)

    return tried_again


@_as_the_model_allows
def _unseen(layers: Layers, inputs: tuple[Tensor, ...]) -> set[str]:
    """Of `layers.unseen` those whose weights have a gradient that does not all come by what arrives at their outputs.

    A function of the model's own takes it (for a linear map, of reversible blocks, of the adjoint of a differential
    equation), the model takes gradients itself (a force is one of an energy), or something else uses the weights (an
    embedding to which they are tied). Layers that run without gradients may have none, or that of other uses.
    """
    batch = IMAGES_AT_A_TIME if layers.per_image else 1
    generator = torch.Generator(inputs[0].device).manual_seed(0)
    with without_memory(layers.model), _thawed(layers):
        gradients, top = _with_graph(layers, tuple(x[:batch] for x in inputs))
        top = [output for output in top if output.requires_grad]
        noise = [_like(output, generator) for output in top]
        arrived = gradients.take(top, noise, _of_stored_weight, keep=False)
    unseen = set()
    for name, own in gradients.own.items():
        rounding = max(UNSEEN, 4 * torch.finfo(gradients.layers[name].weight.dtype).eps)
        if name not in arrived or norm(own - arrived[name]) > rounding * norm(own):
            unseen.add(name)
    return unseen


@contextmanager
def _thawed(layers: Layers) -> Iterator[None]:
    """The weights of `layers.unseen` have gradients inside, also those that are frozen."""
    found = [layers.find(layers.found[name].weight)[1] for name in layers.unseen or ()]
    frozen = [parameter for parameter in found if parameter is not None and not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _of_stored_weight(layer: Layer, uses: list[Use]) -> Tensor:
    """Gradient of the weights as they are stored, shaped like them, by the uses of a layer."""
    gradient = _weight_gradient(uses)
    for factor in (layer.factor, layer.mask):
        gradient = gradient if factor is None else gradient * factor
    return gradient


@_as_the_model_allows
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
        square = partial(_column_squares, images=len(inputs[0][part]))
        with without_memory(layers.model), _thawed(layers):
            run = partial(_with_graph, layers, tuple(x[part] for x in inputs))
            gradients, top = run(before if first == 0 else None)
            used |= gradients.layers
            together = _together(top, apart)
            turns = [(draw, number) for draw in range(draws) for number in range(len(together))]
            for turn in turns:
                if layers.unseen and turn != turns[0]:  # the functions that take their gradients may do so once
                    gradients, again = run()
                    together = _together(again, apart)
                group = together[turn[1]]
                noise = [eta[part].to(top[0])] if eta is not None else [_like(each, generator) for each in group]
                taken = gradients.take(group, noise, square, keep=turn != turns[-1])
                for name, found in (taken | gradients.own_squares).items():
                    totals = squares.setdefault(name, found.new_zeros(len(together), *found.shape))
                    totals[turn[1]] += found / (count * draws)
            tops.append(_rows(top))
    weights = {name: _mean_squares(layer) for name, layer in used.items()}
    width = max(top.shape[1] for top in tops)
    return Measurement(used, _of_stored(used, squares), weights, torch.cat([_padded(top, width) for top in tops]))


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


@_as_the_model_allows
def _rounding(layers: Layers, inputs: tuple[Tensor, ...], names: list[str], seed: int) -> list[str]:
    """Of some layers those whose gradients are rounding of what cancels out, as before a softmax over equal values.

    Gradients are linear in the top gradient: where three times that gives other than three times them, nothing is left
    but rounding. Seen on the first images.
    """
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    seed_all(seed)
    batch = IMAGES_AT_A_TIME if layers.per_image else 1
    with without_memory(layers.model):
        gradients, top = _with_graph(layers, tuple(x[:batch] for x in inputs))
        top = [output for output in top if output.requires_grad]
        noise = [_like(output, generator) for output in top]
        one, three = (
            gradients.take(
                top, [factor * each for each in noise], lambda _, uses: _weight_gradient(uses), names, keep=factor == 1
            )
            for factor in (1, 3)
        )
    return [name for name in one if norm(one[name] - three[name] / 3) > LINEAR * norm(one[name])]


def _weight_gradient(uses: list[Use], part: slice = slice(None)) -> Tensor:
    """Gradient of the weights, shaped like them: the sum over the uses of a layer, and over some rows of each."""
    return reduce(
        Tensor.add, (call.weight_gradient(x[part].float(), gradient[part].float()) for call, x, gradient in uses)
    )


def _with_graph(
    layers: Layers, inputs: tuple[Tensor, ...], before: Callable[[Call, Tensor], None] | None = None
) -> tuple["_Gradients", list[Tensor]]:
    """A forward pass whose gradients can be taken, and the model's outputs.

    Args:
        before: see `measure`.
    """
    gradients = _Gradients(torch.zeros((), device=inputs[0].device, requires_grad=True))
    without: set[str] = set()

    def visit(call: Call, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        name, x = call.layer.name, x.detach()
        if layers.per_image and len(x) != len(inputs[0]):
            raise _OtherRows
        check_input(call.layer, [x])
        if before is not None and name not in gradients.layers:
            with torch.no_grad():
                before(call, x)
        gradients.layers[name] = call.layer
        gradients.uses[name] += 1
        if not torch.is_grad_enabled():
            without.add(name)
        return _Tap.apply(compute(), gradients.start, lambda gradient: gradients.arrived((call, x, gradient)))

    with torch.enable_grad():
        top = forward(layers, inputs, visit)
    if not gradients.layers:
        raise InitializationError(layers.no_layer)
    used = gradients.layers
    without |= {name for name in used if layers.differentiates or memory(used[name].weight) in layers.elsewhere}
    if layers.unseen is None and without:
        raise _MayBeUnseen(without)
    for name in (layers.unseen or set()) & gradients.layers.keys():
        _, parameter = layers.find(gradients.layers[name].weight)
        if parameter is not None and parameter.requires_grad:
            gradients.parameters[name] = parameter
    return gradients, top


@dataclass
class _Gradients:
    """Gradients of the outputs of layers, on their way. It holds nothing of the graph, which holds it.

    Attributes:
        start: a number on which all outputs of layers depend, also of layers that are frozen.
        layers: by name, in order of execution.
        uses: how often each is used.
        arrived: what becomes of a gradient.
        parameters: by layer, those whose gradients are not seen on their way.
        own: the gradients of the weights among these, as they were taken last.
    """

    start: Tensor
    layers: dict[str, Layer] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    arrived: Callable[[Use], object] = id
    parameters: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)

    @property
    def own_squares(self) -> dict[str, Tensor]:
        """As `_column_squares`, of `own`; of one image."""
        found = {}
        for name, gradient in self.own.items():
            layer = self.layers[name]
            _, outputs, _, kernel = layer.blocks.shape
            factor = 1.0 if layer.factor is None else layer.factor.item()  # between the stored weights and the layer's
            found[name] = _sum_of_squares(layer.as_blocks(gradient / factor)).cpu() / (outputs * kernel)
        return found

    def take(
        self,
        top: list[Tensor],
        noise: list[Tensor],
        compute: Callable[[Layer, list[Use]], Tensor],
        names: Collection[str] | None = None,
        *,
        keep: bool,
    ) -> dict[str, Tensor]:
        """By layer that the outputs depend on, what `compute` makes of it and its uses, as soon as they have gradients.

        So the gradients of one layer are in memory, not those of all.

        Args:
            top, noise: outputs of the model and their gradients.
            names: of the layers that count; None for all.
            keep: the graph, for another backward pass.
        """
        waiting: dict[str, list[Use]] = {}
        found: dict[str, Tensor] = {}

        def arrived(use: Use) -> None:
            layer = use[0].layer
            if names is None or layer.name in names:
                waiting.setdefault(layer.name, []).insert(0, use)  # the last one comes first
                if len(waiting[layer.name]) == self.uses[layer.name]:
                    found[layer.name] = compute(layer, waiting.pop(layer.name))

        self.arrived = arrived
        try:
            if top:
                self._take(top, noise, keep)
        except (InitializationError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # functions with a gradient of their own raise nearly anything
            message = f"change rates need the gradient of the model's output, which fails: {error}; pass between=False"
            raise _GradientFails(message) from error
        finally:
            self.arrived = id  # which does nothing, and holds no tensor of the graph
        return found | {name: compute(uses[0][0].layer, uses) for name, uses in waiting.items()}

    def _take(self, top: list[Tensor], noise: list[Tensor], keep: bool) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None  # where functions leave gradients that run a backward pass of their own
        wanted = [self.start, *self.parameters.values()]
        _, *given = torch.autograd.grad(top, wanted, noise, allow_unused=True, retain_graph=keep)
        for (name, parameter), gradient in zip(self.parameters.items(), given, strict=True):
            parts = [part for part in (gradient, parameter.grad) if part is not None]
            if parts:
                same = torch.empty_like(parameter).copy_(
                    reduce(Tensor.add, parts)
                )  # with the memory layout of the parameter
                weight = self.layers[name].weight
                offset = weight.storage_offset() - parameter.storage_offset()
                self.own[name] = same.as_strided(weight.shape, weight.stride(), offset).float()


class _Tap(torch.autograd.Function):
    """A copy of the output of a layer, as what follows may work in place; its gradient goes on, and to a function."""

    @staticmethod
    def forward(ctx, output: Tensor, start: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.arrived = arrived
        return output.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor | None):
        if gradient is not None:
            ctx.arrived(gradient)
        return gradient, None, None


def _rate(gradient: Tensor, weight: Tensor) -> Tensor:
    """C_k,j from the mean squares of gradients (inputs,) and of weights; weights of 0 change infinitely fast."""
    return torch.full_like(gradient, math.inf) if weight == 0 else (gradient / weight).sqrt()


def _rows(top: list[Tensor]) -> Tensor:
    """The outputs that depend on the weights, in one row for each image: (N, values)."""
    learned = [output.detach().reshape(len(output), -1) for output in top if output.requires_grad]
    if not learned:
        raise InitializationError(
            "the output of the model does not depend on the weights of its layers, or has no gradient (as behind "
            "quantization, or of reversible blocks): pass between=False, or training=True where training has one"
        )
    return torch.cat(learned, 1)


def _padded(rows: Tensor, width: int) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]))


def _of_stored(used: dict[str, Layer], squares: dict[str, Tensor]) -> dict[str, Tensor]:
    """Squared gradients of what is stored, in the order of the layers; 0 where the output does not depend on one."""
    found = {}
    for name, layer in used.items():
        factor = 1.0 if layer.factor is None else layer.factor.item()
        none = torch.zeros(1, *layer.blocks.shape[::2], dtype=torch.float64)
        found[name] = squares.get(name, none) * factor**2
    return found


@torch.no_grad()
def _mean_squares(layer: Layer) -> Tensor:
    """Mean square of the weights of each input channel, float64 (groups, inputs)."""
    blocks = layer.blocks if layer.mask is None else layer.as_blocks(layer.weight.detach() * layer.mask)
    groups, outputs, width, kernel = blocks.shape
    total = torch.zeros(groups, width, dtype=torch.float64, device=layer.weight.device)
    for piece in blocks.split(max(1, PIECE // (groups * width * kernel)), 1):
        total += _sum_of_squares(piece.float())
    return total.cpu() / (outputs * kernel)


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


def _like(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def _column_squares(layer: Layer, uses: list[Use], images: int) -> Tensor:
    """Squared gradient of the weights: mean over outputs and kernel, sum over images; float64 (groups, inputs).

    Args:
        uses: each use of the layer with its input and the gradient of its output. Their rows are the images, or all
            of them are of one image.
    """
    _, outputs, width, kernel = layer.blocks.shape
    if layer.linear and len(uses) == 1:
        _, *pair = uses[0]
        x, gradient = (part.float().reshape(images, -1, part.shape[-1]) for part in pair)
        if x.shape[1] * (outputs + width) < outputs * width:
            # At few positions the gradient of an image, a sum of outer products, has squares that need no product as
            # large as the weight: column j has the sum x_j' G G' x_j over the positions' inputs and gradients.
            return in_range(_squares_by_positions, x, gradient).double().cpu()[None] / outputs
    total = torch.zeros(layer.blocks.shape[::2], dtype=torch.float64, device=layer.weight.device)
    for image in range(images):
        part = slice(None) if images == 1 else slice(image, image + 1)
        total += _sum_of_squares(layer.as_blocks(_weight_gradient(uses, part)))
    return total.cpu() / (outputs * kernel)


def _sum_of_squares(blocks: Tensor) -> Tensor:
    """Of each input channel: (groups, outputs, inputs, kernel) -> float64 (groups, inputs)."""
    return in_range(_sum_over_outputs_and_kernel, blocks).double()


def _sum_over_outputs_and_kernel(blocks: Tensor) -> Tensor:
    return blocks.square().sum(1).sum(-1)  # ten times faster than over both dimensions at once


def _squares_by_positions(x: Tensor, gradient: Tensor) -> Tensor:
    return (x * ((gradient @ gradient.mT) @ x)).sum((0, 1)).clamp(min=0)
