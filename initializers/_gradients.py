"""The gradients of the weights of all layers.

They are computed of what arrives at the outputs of the layers in a backward pass, layer by layer, so that those of one
are in memory and not those of all. Where functions of the model's own take the gradients of weights, which nothing then
brings by an output, these are taken of the parameters.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce, wraps
from typing import TypeVar

import torch
from torch import Tensor

from initializers._layer import Call, Layer, check_input, memory
from initializers._layers import Layers, forward
from initializers._memory import without_memory
from initializers._model import InitializationError
from initializers._squares import norm

IMAGES_AT_A_TIME = 16  # bounds the activations kept for the backward pass
UNSEEN = 1e-4  # relative difference up to which the gradient of weights is what arrives at the outputs of their layer

Result = TypeVar("Result")
Use = tuple[Call, Tensor, Tensor]  # of a layer, with its input and the gradient of its output


class _GradientFails(InitializationError):
    """The gradient of the output cannot be taken."""


class _OtherRows(InitializationError):
    """The rows of a layer's input are not the images."""


class _MayBeUnseen(InitializationError):
    """The gradients of layers may not all come by their outputs; the argument is the set of their names."""


def as_the_model_allows(compute: Callable[..., Result]) -> Callable[..., Result]:
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
            layers.unseen = _unseen(layers, inputs, candidates.args[0])
            layers.per_image = layers.per_image and not layers.unseen
            return tried_again(layers, inputs, *args, **kwargs)
        except _GradientFails:
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                return compute(layers, inputs, *args, **kwargs)

    return tried_again


@as_the_model_allows
def _unseen(layers: Layers, inputs: tuple[Tensor, ...], candidates: set[str]) -> set[str]:
    """Of some layers those whose weights have a gradient that does not all come by what arrives at their outputs.

    A function of the model's own takes it (for a linear map, of reversible blocks, of the adjoint of a differential
    equation), the model takes gradients itself (a force is one of an energy), something else uses the weights (an
    embedding to which they are tied), or a hook changes it. Layers that run without gradients may have none, or that of
    other uses.
    """
    batch = IMAGES_AT_A_TIME if layers.per_image else 1
    generator = torch.Generator(inputs[0].device).manual_seed(0)
    with without_memory(layers.model), thawed(layers, candidates):
        gradients, top = with_graph(layers, tuple(x[:batch] for x in inputs), taken=candidates)
        top = [output for output in top if output.requires_grad]
        noise = [noise_like(output, generator) for output in top]
        arrived = gradients.take(top, noise, lambda _, uses: weight_gradient(uses), keep=False)
    unseen = set()
    for name, own in gradients.own.items():
        rounding = max(UNSEEN, 4 * torch.finfo(gradients.layers[name].weight.dtype).eps)
        if name not in arrived or norm(own - arrived[name]) > rounding * norm(own):
            unseen.add(name)
    return unseen


@contextmanager
def thawed(layers: Layers, names: Collection[str]) -> Iterator[None]:
    """The weights of some layers have gradients inside, also those that are frozen."""
    found = [layers.find(layers.found[name].weight)[1] for name in names]
    frozen = [parameter for parameter in found if parameter is not None and not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def with_graph(
    layers: Layers,
    inputs: tuple[Tensor, ...],
    before: Callable[[Call, Tensor], None] | None = None,
    taken: set[str] | None = None,
) -> tuple["Gradients", list[Tensor]]:
    """A forward pass whose gradients can be taken, and the model's outputs.

    Args:
        before: called without gradients on the first use of each layer and its input; may change the layer.
        taken: names of the layers whose gradients are taken of their parameters; None for `layers.unseen`.
    """
    taken = layers.unseen if taken is None else taken
    gradients = Gradients(torch.zeros((), device=inputs[0].device, requires_grad=True))
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
    without |= {name for name, layer in gradients.layers.items() if _may_be_unseen(layers, layer)}
    if taken is None and without:
        raise _MayBeUnseen(without)
    for name in (taken or set()) & gradients.layers.keys():
        _, parameter = layers.find(gradients.layers[name].weight)
        if parameter is not None and parameter.requires_grad:
            gradients.parameters[name] = parameter
    return gradients, top


def _may_be_unseen(layers: Layers, layer: Layer) -> bool:
    """Whether the gradient of the weights of a layer that ran may not all come by its output; see `_unseen`."""
    _, parameter = layers.find(layer.weight)
    hooks = parameter is not None and bool(parameter._backward_hooks)
    return layers.differentiates or memory(layer.weight) in layers.elsewhere or hooks


@dataclass
class Gradients:
    """Gradients of the outputs of layers, on their way. It holds nothing of the graph, which holds it.

    Attributes:
        start: a number on which all outputs of layers depend, also of layers that are frozen.
        layers: by name, in order of execution.
        uses: how often each is used.
        arrived: what becomes of a gradient.
        parameters: by layer, those whose gradients are not seen on their way.
        own: the gradients of the weights among these, as they were taken last, by layer and shaped like its weight.
    """

    start: Tensor
    layers: dict[str, Layer] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    arrived: Callable[[Use], object] = id
    parameters: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)

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


def weight_gradient(uses: list[Use], part: slice = slice(None)) -> Tensor:
    """Gradient of the weights as they are stored, shaped like them, by the uses of a layer, or some rows of each."""
    layer = uses[0][0].layer
    gradient = reduce(Tensor.add, (call.weight_gradient(x[part].float(), top[part].float()) for call, x, top in uses))
    for factor in (layer.factor, None if layer.sets_to_zero else layer.mask):
        gradient = gradient if factor is None else gradient * factor
    return gradient


def noise_like(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
