"""The graph of a model: the operations of a forward pass, and a way to run them again, on any images.

It is recorded in `_record`.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from initializers._calls import BLANK, FILLED, RANDOM, dropout_of, input_of
from initializers._layer import Call, Layer, memory, overlap
from initializers._layers import Layers
from initializers._outputs import tensors_of

SIZES = (2, 3)  # of the recorded batches
IMAGES_AT_A_TIME = 16  # from one affine layer to the next
SAMPLES = 1280  # images times masks times positions behind dropout, at least: they give a variance to 4 %

Batches = Callable[[], list[Tensor]]
# `visit(call, entering, compute)` is called at the first use of each affine layer: `entering()` gives its inputs and
# `compute()` its outputs, a tensor for each batch. Inputs are not held while it computes.
Visit = Callable[[Call, Batches, Batches], None]


@dataclass(frozen=True)
class Ref:
    """A value of the graph, in place of a tensor among the arguments of an operation."""

    index: int


@dataclass(frozen=True)
class Size:
    """A number that grows with the batch: `base` for none, and `step` more for each image."""

    base: int
    step: int


@dataclass
class Operation:
    """One call of a torch function.

    Attributes:
        name: of the function; of the property for the getter of one.
        args, kwargs: with a `Ref` for each tensor and a `Size` for each number that depends on the batch.
        outputs: values of the tensors that it gives, in order; one of its arguments where it works in place.
        call: the use of an affine layer that it is.
        module: the normalisation module which called it.
    """

    name: str
    func: Any  # of the methods of tensors some have no type of their own
    args: tuple
    kwargs: dict
    outputs: list[int]
    call: Call | None
    module: nn.Module | None

    def given(self, names: tuple[str, ...], wanted: tuple[str, ...]) -> list:
        """Arguments by name, of which `names` are all in order; None where they are not given."""
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        return [given.get(name) for name in wanted]

    @cached_property
    def inputs(self) -> list[int]:
        """Values among the arguments."""
        found = []
        map_tree((self.args, self.kwargs), lambda leaf: found.append(leaf.index) if isinstance(leaf, Ref) else None)
        return found


@dataclass
class Graph:
    """What one forward pass did.

    Attributes:
        layers: the affine layers, by name, in order of execution.
        operations: in order.
        constants: tensors that were there before the pass: parameters, buffers, attributes.
        fixed: tensors of the values that do not depend on the images, the constants among them.
        shapes: of each value, for `SIZES[0]` images.
        storages: number of the memory of each value, which views of one tensor share.
        varying: values that depend on the images.
        learned: values that depend on an affine layer.
        inputs, outputs: values of the model's inputs and of the tensors it returns with a row per image.
        others: values of what else it returns.
        dropouts: modules that ran.
        interact: whether what comes of an image depends on the others of its batch, or of earlier ones, as where a
            running mean is a part of it.
        decides: whether values that depend on the images, but on no layer, decided what the model did.
        routes: whether values that depend on an affine layer decided what goes where, as to one of several experts, or
            numbers that are computed of weights what is done.
    """

    layers: Layers
    operations: list[Operation]
    constants: dict[int, Tensor]
    fixed: dict[int, Tensor]
    shapes: dict[int, torch.Size]
    storages: dict[int, int]
    varying: set[int]
    inputs: list[int]
    outputs: list[int]
    others: list[int] = field(default_factory=list)
    dropouts: set[nn.Module] = field(default_factory=set)
    learned: set[int] = field(default_factory=set)
    interact: bool = False
    decides: bool = False
    routes: bool = False

    @property
    def reached(self) -> set[Layer]:
        """The affine layers that saw an image, or a part of one."""
        steps = [step for step in self.operations if step.call and self.shapes[step.outputs[0]].numel()]
        return {step.call.layer for step in steps if step.call}

    @property
    def uses(self) -> list[tuple[str, int]]:
        """The uses of affine layers, in order: the name of the layer, and the rows of its input."""
        return [
            (step.call.layer.name, self.shapes[input_of(step.name, step.args, step.kwargs).index][0])
            for step in self.operations
            if step.call is not None
        ]

    @property
    def repeated(self) -> dict[str, int]:
        """Layers that are used several times, the first time with all images, and how often."""
        rows: dict[str, list[int]] = {}
        for name, count in self.uses:
            rows.setdefault(name, []).append(count)
        images = self.shapes[self.inputs[0]][0]
        return {name: len(each) for name, each in rows.items() if len(each) > 1 and each[0] >= images}

    def aliases(self, value: int) -> list[int]:
        """Values that change where this one is changed in place, itself among them."""
        return [other for other, known in self.storages.items() if known == self.storages[value]]

    @cached_property
    def dead(self) -> list[list[int]]:
        """Values that nothing needs after each operation."""
        last: dict[int, int] = {}
        for position, operation in enumerate(self.operations):
            last |= dict.fromkeys(operation.inputs, position)
            last |= dict.fromkeys(operation.outputs, position + (operation.call is not None))  # `visit` sees them
        dead: list[list[int]] = [[] for _ in range(len(self.operations) + 1)]
        for value, position in last.items():
            if value not in self.constants and value not in self.outputs:
                dead[position].append(value)
        return dead

    @cached_property
    def tied(self) -> dict[str, str]:
        """Layers whose weights something else uses before them, such as an embedding, and the name of that function."""
        used: list[tuple[Tensor, str]] = []
        found: dict[str, str] = {}
        for operation in self.operations:
            used += self._used(operation)
            if operation.call is not None:
                weight = operation.call.layer.weight
                name = next((name for tensor, name in used if overlap(tensor, weight)), None)
                if name is not None:
                    found.setdefault(operation.call.layer.name, name)
        return found

    def _used(self, operation: Operation) -> list[tuple[Tensor, str]]:
        """What an operation computes with and what does not depend on the images, and its name.

        Not that of which it only gives a view or takes the shape, and not the weight and bias of a layer.
        """
        if operation.name in BLANK | FILLED:
            return []
        results = {self.storages[index] for index in operation.outputs}  # of a view: the parameter's own
        inputs = operation.inputs
        if operation.call is not None:
            entering = input_of(operation.name, operation.args, operation.kwargs)
            inputs = [entering.index] if isinstance(entering, Ref) else []
        inputs = [index for index in inputs if index in self.fixed]
        scaled = self.layers.scaling(operation.func, self.fixed_args(operation), operation.kwargs)
        if scaled is not None and self.layers.owner(scaled[0]) in self._of_layers:
            return []
        return [(self.fixed[index], operation.name) for index in inputs if self.storages[index] not in results]

    @cached_property
    def _of_layers(self) -> set[str | None]:
        """Names of the parameters of affine layers."""
        layers = self.layers.found.values()
        return {self.layers.owner(part) for layer in layers for part in (layer.weight, layer.bias) if part is not None}

    def fixed_args(self, operation: Operation) -> tuple:
        """Its arguments; None for those that depend on the images."""
        return tuple(self.fixed.get(leaf.index) if isinstance(leaf, Ref) else leaf for leaf in operation.args)

    def products(self, operation: Operation) -> list[int]:
        """Where the weight and bias of a use of a layer are computed, as products of parameters with constants."""
        layer = operation.call.layer if operation.call is not None else None
        if layer is None or (layer.factor is None and layer.bias_factor is None and layer.mask is None):
            return []
        entering = input_of(operation.name, operation.args, operation.kwargs)
        wanted = {index for index in operation.inputs if index != entering.index and index in self.fixed}
        found: list[int] = []
        for position in reversed(range(len(self.operations))):
            earlier = self.operations[position]
            if wanted.intersection(earlier.outputs):
                wanted |= {index for index in earlier.inputs if index in self.fixed}
                found.insert(0, position)
        return found

    @cached_property
    def _other_uses(self) -> dict[int, list[tuple[Tensor, str]]]:
        """By memory, what is used other than as a layer, and the names of the functions."""
        found: dict[int, list[tuple[Tensor, str]]] = {}
        for operation in self.operations:
            for tensor, name in self._used(operation):
                found.setdefault(memory(tensor), []).append((tensor, name))
        return found

    def other_use(self, tensor: Tensor) -> str | None:
        """Name of the first function that computes with a parameter, or with a view of it, other than as its weight."""
        others = self._other_uses.get(memory(tensor), [])
        return next((name for used, name in others if overlap(used, tensor)), None)

    def run(self, inputs: tuple[Tensor, ...], batch: int, visit: Visit) -> None:
        """Run the graph on all images, batch by batch between one affine layer and the next.

        Every value is computed once and kept until its last use, so that what is held is what the network needs at
        one point, of all images, and the rest of one batch. Behind dropout and other random draws a layer with few
        samples sees each image several times, as its variance would else be that of what happened to be drawn.

        Args:
            visit: as in `sweep`.
        """
        batches = [
            _Batch(self, self.constants | dict(zip(self.inputs, (x.clone() for x in part), strict=True)), len(part[0]))
            for part in zip(*(x.split(batch) for x in inputs), strict=True)
        ]
        seen = set()
        start = 0
        for position, operation in enumerate(self.operations):
            call = operation.call
            if call is None or call.layer.name in seen:
                continue
            seen.add(call.layer.name)
            draws = [earlier for earlier in self.operations[start:position] if _is_random(earlier)]
            if draws:
                masks = self._masks(operation, draws, sum(one.size for one in batches))
                batches = [one.copy() for one in batches for _ in range(masks)]
            for one in batches:
                one.execute(range(start, position))
            products = self.products(operation)
            visit(call, partial(_entering, operation, batches), partial(_compute, position, products, batches))
            for one in batches:
                one.refresh(products)  # for other uses
            start = position + 1

    def _masks(self, operation: Operation, draws: list[Operation], images: int) -> int:
        """Under how many masks an affine layer behind dropout, or other random draws, sees each of so many images.

        A draw for an image, such as that of stochastic depth, is one sample, at however many positions the layer is.
        """
        assert operation.call is not None
        positions = self.shapes[operation.outputs[0]].numel() / SIZES[0] / operation.call.layer.out_channels
        drawn = [math.prod(self.shapes[draw.outputs[0]][2:]) for draw in draws if draw.name in RANDOM]
        return math.ceil(SAMPLES / images / min([positions, *drawn]))


@dataclass
class _Batch:
    """A few images on their way through a graph: the values that are still needed, and the number of images."""

    graph: Graph
    values: dict[int, Tensor]
    size: int

    def copy(self) -> "_Batch":
        """The same values in memory of their own, as operations may work in place; views stay views of each other."""
        known = {id(constant): constant for constant in self.graph.constants.values()}
        return _Batch(self.graph, copy.deepcopy(self.values, known), self.size)

    def execute(self, positions: range) -> None:
        """Run some operations."""
        for position in positions:
            self._run(self.graph.operations[position], self.values)
            for value in self.graph.dead[position]:
                self.values.pop(value, None)

    def refresh(self, positions: list[int]) -> None:
        """Compute again what is still needed of what some operations gave, as parameters have changed."""
        known = dict(self.values)
        for position in positions:
            self._run(self.graph.operations[position], known)
        self.values.update((index, known[index]) for index in self.values)

    def _run(self, operation: Operation, values: dict[int, Tensor]) -> None:
        """Add to `values` what an operation gives of them."""
        arguments = (operation.args, operation.kwargs)
        args, kwargs = map_tree(arguments, lambda leaf: resolve(leaf, values, self.size))
        values.update(zip(operation.outputs, tensors_of(operation.func(*args, **kwargs)), strict=True))


def _entering(operation: Operation, batches: list[_Batch]) -> list[Tensor]:
    """What comes to an affine layer."""
    return [
        resolve(input_of(operation.name, operation.args, operation.kwargs), batch.values, batch.size)
        for batch in batches
    ]


def _compute(position: int, products: list[int], batches: list[_Batch]) -> list[Tensor]:
    """Run an affine layer, with weights that are computed anew where they are products; its outputs."""
    for batch in batches:
        batch.refresh(products)
        batch.execute(range(position, position + 1))
    return [batch.values[batch.graph.operations[position].outputs[0]] for batch in batches]


def at_size(leaf, size: int):
    """A number for so many images."""
    return leaf.base + size * leaf.step if isinstance(leaf, Size) else leaf


def _is_random(operation: Operation) -> bool:
    """Whether it is active dropout, or draws random numbers."""
    probability, active = dropout_of(operation.name, operation.args, operation.kwargs)
    return (probability > 0 and active) or operation.name in RANDOM


def map_tree(tree, function):
    """Apply a function to the leaves of nested tuples, lists, dictionaries, slices and sizes."""
    if isinstance(tree, slice):
        return slice(*(map_tree(part, function) for part in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, dict):
        return {key: map_tree(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [map_tree(part, function) for part in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    return function(tree)


def resolve(leaf, environment: dict[int, Tensor], size: int):
    """An argument of an operation for so many images: the tensor of a `Ref`, the number of a `Size`, or itself."""
    if isinstance(leaf, Ref):
        return environment[leaf.index]
    return at_size(leaf, size)
