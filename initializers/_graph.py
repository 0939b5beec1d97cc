"""The graph of a model: every operation of one forward pass, recorded while it runs, and a way to run it again.

Recording needs no symbolic tracing: it sees what really happens, functional calls and attention included. The model
runs twice, on two images and on three, so that whatever number grows with the batch is known to do so.
"""

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from initializers._layers import RANDOM, AffineMode, Call, Layers, dropout_of, input_of, memory, overlap
from initializers._model import (
    InitializationError,
    dropouts,
    forked_random,
    outputs_of,
    same_bits,
    scripted,
    tensors_of,
    without_dropout,
    without_memory,
)

SIZES = (2, 3)  # of the recorded batches
SAMPLES = 1280  # images times masks times positions behind dropout, at least: they give a variance to 4 %
# Their constants can be scaled; a function that such a module calls is attributed to it.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm, nn.LocalResponseNorm)
# What a model may ask of a tensor without its values steering what happens next; `__get__` reads a property.
_METADATA = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_same_size", "type", "data_ptr", "result_type"),
    *("__len__", "__hash__", "__repr__", "__format__", "__get__", "__set__"),
}


Batches = Callable[[], list[Tensor]]
# `visit(call, entering, compute)` is called at the first use of each affine layer: `entering()` gives its inputs and
# `compute()` its outputs, a tensor for each batch. Inputs are not held while it computes.
Visit = Callable[[Call, Batches, Batches], None]

INTERACTION = 1e-3  # a relative change that is more than rounding
IMAGES_AT_A_TIME = 16  # from one affine layer to the next
_DIFFERENT = "what it does depends on the number of images, or a part of it cannot be seen"


class UngraphableError(InitializationError):
    """A model that does not do the same for all images."""


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

        Not that of which it only gives a view, and not the weight and bias of a layer.
        """
        results = {self.storages[index] for index in operation.outputs}  # of a view: the parameter's own
        inputs = operation.inputs
        if operation.call is not None:
            entering = input_of(operation.name, operation.args, operation.kwargs)
            inputs = [entering.index] if isinstance(entering, Ref) else []
        inputs = [index for index in inputs if index in self.fixed]
        scaled = self.layers.scaling(operation.func, self.fixed_args(operation))
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


def record(layers: Layers, inputs: tuple[Tensor, ...]) -> Graph:
    """Record the graph of a model, which runs on any number of images.

    It is compared with what the model does for the numbers of images of which it will run.

    Raises:
        UngraphableError: what the model does depends on the values of its activations or, other than in sizes, on
            the number of images.
    """
    few = _few(inputs)
    (first, results), (second, others) = (_record(layers, few, size) for size in SIZES)
    both = [index for index in first.outputs if index in second.outputs]
    for graph in (first, second):  # what has as many rows for any number of images is no output
        graph.others += [index for index in graph.outputs if index not in both]
        graph.outputs = both
    _check_alike(first, second)
    per_image = all(set(_rows(graph)) == {size} for graph, size in zip((first, second), SIZES, strict=True))
    for one, other in zip(first.operations, second.operations, strict=True):
        one.args, one.kwargs = _generalise((one.args, one.kwargs), (other.args, other.kwargs))
    with forked_random(inputs[0].device):
        first.interact |= _interact(results, others) and _interact_in_full(layers, few)
        for part in _parts(first, inputs):
            size = len(part[0])
            graph, _ = _record(layers, part, size)
            _check_alike(first, graph)
            for one, other in zip(first.operations, graph.operations, strict=True):
                expected = map_tree((one.args, one.kwargs), lambda leaf, size=size: _at(leaf, size))
                _generalise(expected, (other.args, other.kwargs), sizes=False)
    layers.per_image = per_image
    return first


def _few(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The images that are recorded: the faintest, one in the middle, and the strongest, each where there are three.

    What a batch of two does, and one with the third does not, is seen where the third differs from the others: a
    division by the largest value of a batch, by the strongest.
    """
    rows = inputs[0].reshape(len(inputs[0]), -1)
    rows = rows if rows.is_floating_point() else rows.float()
    sizes = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    order = sizes.argsort(stable=True)
    return tuple(x[order[[0, len(order) // 2, -1]]] for x in inputs)


def _parts(graph: Graph, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Batches to compare the graph with: one of each size that will run, or all, where their values decide."""
    batch = len(inputs[0]) if graph.interact else IMAGES_AT_A_TIME
    parts = [*zip(*(x.split(batch) for x in inputs), strict=True)]
    if graph.decides:
        return parts
    by_size = {len(part[0]): part for part in reversed(parts)}
    return [part for size, part in by_size.items() if size not in SIZES]


def _interact_in_full(layers: Layers, inputs: tuple[Tensor, ...]) -> bool:
    """As `_interact`, without dropout and with the same random numbers each time."""
    results = []
    with without_dropout(layers.model):
        for size in SIZES:
            torch.manual_seed(0)
            results.append(_record(Layers(layers.model, layers.names), inputs, size)[1])
    return _interact(*results)


def _interact(one: dict[tuple, Tensor], other: dict[tuple, Tensor]) -> bool:
    """Whether what comes of the first images changes with one image more, as where a batch is normalised by itself."""
    both = [(one[key], other[key]) for key in one if key in other]
    pairs = [(a, b[: len(a)]) for a, b in both if (len(a), len(b)) == SIZES]
    return any(a.shape != b.shape or (a - b).norm() > INTERACTION * a.norm() for a, b in pairs)


def _at(leaf, size: int):
    """A number for so many images."""
    return leaf.base + size * leaf.step if isinstance(leaf, Size) else leaf


def _check_alike(one: Graph, other: Graph) -> None:
    """Raises UngraphableError: two recordings are not of the same operations on the same constants."""
    plans = [[(step.name, step.outputs) for step in graph.operations] for graph in (one, other)]
    same = plans[0] == plans[1] and one.outputs == other.outputs
    if not (same and all(_equal(tensor, other.constants.get(index)) for index, tensor in one.constants.items())):
        raise UngraphableError(_DIFFERENT)


def _rows(graph: Graph) -> list[int]:
    """Rows of the inputs of all affine layers."""
    calls = [operation for operation in graph.operations if operation.call is not None]
    return [graph.shapes[input_of(call.name, call.args, call.kwargs).index][0] for call in calls]


def record_once(layers: Layers, inputs: tuple[Tensor, ...], size: int) -> Graph:
    """The graph of a model for so many images, which tells how scales travel.

    It is compared with that of other images, as a part of the model that cannot be seen gives other constants there;
    but not where images decide what the model does: there these images' tells.

    Raises:
        UngraphableError: what the model does depends on the values of its activations.
    """
    others = tuple(x.roll(1 + len(x) // 2, 0) for x in inputs)
    with forked_random(inputs[0].device):
        graph, _ = _record(layers, inputs, size)
        if not graph.decides:
            _check_alike(graph, _record(layers, others, size)[0])
    return graph


def _record(layers: Layers, inputs: tuple[Tensor, ...], size: int) -> tuple[Graph, dict[tuple, Tensor]]:
    """The graph, and the outputs of affine layers and of the model, by number and by value."""
    inputs = tuple(torch.cat([x[:size]] * size)[:size] for x in inputs)
    recorder = _Recorder(layers, compares=size in SIZES)
    recorder.graph.inputs = [recorder.new(x, varying=True) for x in inputs]
    norms = [m for m in layers.model.modules() if isinstance(m, NORMS)]
    hooks = [norm.register_forward_pre_hook(recorder.enter) for norm in norms]
    hooks += [m.register_forward_pre_hook(recorder.drops) for m in dropouts(layers.model).values()]
    hooks += [norm.register_forward_hook(recorder.leave, always_call=True) for norm in norms]
    if any(scripted(layers.model)):  # which take no other hooks
        hooks.append(nn.modules.module.register_module_forward_hook(recorder.scripted))
    others: list[Tensor] = []
    try:
        with torch.no_grad(), without_memory(layers.model), recorder:
            outputs = outputs_of(layers.model, inputs, layers.names, others)
    finally:
        for hook in hooks:
            hook.remove()
    graph = recorder.graph
    graph.outputs = [recorder.value(output) for output in outputs]
    graph.others = [recorder.value(other) for other in others]
    graph.fixed = {index: tensor for index, tensor in graph.fixed.items() if index not in graph.varying}
    results = {("layer", number): result for number, result in enumerate(recorder.results)}
    return graph, results | {("output", index): o for index, o in zip(graph.outputs, outputs, strict=True)}


class _Recorder(AffineMode):
    def __init__(self, layers: Layers, compares: bool) -> None:
        super().__init__(layers)
        self.compares = compares
        self.graph = Graph(layers, [], {}, {}, {}, {}, set(), [], [])
        # What varies is not kept, so that a recording needs no more memory than a forward pass.
        self.known: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id, which another tensor may have later
        self.memories: dict[int, tuple[StorageWeakRef, int]] = {}
        self.results: list[Tensor] = []  # of affine layers
        self.modules: list[nn.Module] = []

    def enter(self, module: nn.Module, _) -> None:
        self.modules.append(module)

    def leave(self, *_) -> None:
        self.modules.pop()

    def drops(self, module: nn.Module, _) -> None:
        self.graph.dropouts.add(module)

    def scripted(self, module: nn.Module, args: tuple, output) -> None:
        """A scripted module, of which nothing inside can be seen, is one operation."""
        if isinstance(module, torch.jit.ScriptModule):
            self.add("a scripted module", module, args, {}, None, output)

    def new(self, tensor: Tensor, varying: bool) -> int:
        index = len(self.graph.shapes)
        self.known[id(tensor)] = weakref.ref(tensor), index
        self.graph.shapes[index] = tensor.shape
        self.graph.storages[index] = index
        if tensor.layout == torch.strided:
            storage = StorageWeakRef(tensor.untyped_storage())
            self.graph.storages[index] = self.memories.setdefault(storage.cdata, (storage, index))[1]
        if varying:
            self.graph.varying.add(index)
        else:
            self.graph.fixed[index] = tensor
        return index

    def find(self, tensor: Tensor) -> int | None:
        """The value that a tensor is known as."""
        known, index = self.known.get(id(tensor), (None, None))
        return index if known is not None and known() is tensor else None

    def value(self, tensor: Tensor) -> int:
        """The value that a tensor is; a constant where nothing recorded made it."""
        index = self.find(tensor)
        if index is None:
            index = self.new(tensor, varying=False)
            self.graph.constants[index] = tensor
        return index

    def operation(self, func: Any, args: tuple, kwargs: dict, call: Call | None):
        name = func.__name__
        if name == "__iter__":
            return iter(self.operation(Tensor.unbind, args, kwargs, None))
        output = func(*args, **kwargs)
        if name == "__get__":  # what a property gives
            return (
                output if not tensors_of(output) else self.add(func.__self__.__name__, func, args, kwargs, call, output)
            )
        return self.add(name, func, args, kwargs, call, output)

    def add(self, name: str, func: Any, args: tuple, kwargs: dict, call: Call | None, output: Any):
        """Note an operation that gave an output."""
        args_of, kwargs_of = map_tree(
            (args, kwargs), lambda leaf: Ref(self.value(leaf)) if isinstance(leaf, Tensor) else leaf
        )
        step = Operation(name, func, args_of, kwargs_of, [], call, self.modules[-1] if self.modules else None)
        varying = call is not None or any(index in self.graph.varying for index in step.inputs)
        scripted = isinstance(func, torch.jit.ScriptModule)  # which may hold layers
        learned = call is not None or scripted or any(index in self.graph.learned for index in step.inputs)
        tensors = tensors_of(output)
        if name == "__setitem__":
            changed = step.inputs[:1]
        elif tensors:
            known = [self.find(tensor) for tensor in tensors]
            pairs = zip(tensors, known, strict=True)
            changed = step.outputs = [self.new(tensor, varying) if i is None else i for tensor, i in pairs]
            self.graph.shapes.update((i, tensor.shape) for i, tensor in zip(changed, tensors, strict=True))  # resized
        elif output is None or not varying or name in _METADATA:
            return output
        elif not learned:
            self.graph.decides = True
            return output
        else:
            raise UngraphableError(f"what {name} gives decides what the model does next, or leaves torch")
        in_place = {alias for index in changed if index in step.inputs for alias in self.graph.aliases(index)}
        self.graph.interact |= not in_place.isdisjoint(self.graph.constants)  # the next batch finds other values
        if varying:
            self.graph.varying.update(changed, in_place)
        if learned:  # how many rows of a packed sequence are of one step depends on the lengths alone
            self.graph.learned.update(changed[:1] if name == "_pack_padded_sequence" else changed, in_place)
        self.graph.operations.append(step)
        if call is not None and self.compares:
            self.results += tensors
        return output


def _is_random(operation: Operation) -> bool:
    """Whether it is active dropout, or draws random numbers."""
    probability, active = dropout_of(operation.name, operation.args, operation.kwargs)
    return (probability > 0 and active) or operation.name in RANDOM


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return one is other or (other is not None and same_bits(one, other))


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
    if isinstance(leaf, Ref):
        return environment[leaf.index]
    return _at(leaf, size)


def _generalise(one, other, sizes: bool = True):
    """What both recordings have in common, with a `Size` for a number that differs.

    Args:
        sizes: whether numbers may differ.

    Raises:
        UngraphableError: they differ in more than that.
    """
    if isinstance(one, slice) and isinstance(other, slice):
        ends = zip((one.start, one.stop, one.step), (other.start, other.stop, other.step), strict=True)
        return slice(*(_generalise(a, b, sizes) for a, b in ends))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return {key: _generalise(value, other[key], sizes) for key, value in one.items()}
    if isinstance(one, tuple | list) and isinstance(other, tuple | list) and len(one) == len(other):
        parts = [_generalise(a, b, sizes) for a, b in zip(one, other, strict=True)]
        return parts if isinstance(one, list) else tuple(parts)
    if sizes and type(one) is int and type(other) is int and one != other:
        step, rest = divmod(other - one, SIZES[1] - SIZES[0])
        if rest == 0:
            return Size(one - step * SIZES[0], step)
    if one is other or one == other or (one != one and other != other):
        return one
    raise UngraphableError(_DIFFERENT)
