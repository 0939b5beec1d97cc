"""Recording the graph of a model: every operation of a forward pass, noted while it runs.

It needs no symbolic tracing: it sees what really happens, functional calls and attention included. The model runs
twice, on two images and on three, so that whatever number grows with the batch is known to do so.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from initializers._calls import AFFINE, METADATA, MODULE_FUNCTIONS, VIEWS
from initializers._graph import IMAGES_AT_A_TIME, SIZES, Graph, Operation, Ref, Size, at_size, map_tree
from initializers._layer import Call
from initializers._layers import AffineMode, Layers
from initializers._memory import same_bits, without_memory
from initializers._model import InitializationError, dropouts, forked_random, scripted, seed_all, without_dropout
from initializers._outputs import in_parts, outputs_of, tensors_of
from initializers._squares import in_range, norm, squared_norms

# Their constants can be scaled; a function that such a module calls is attributed to it.
NORMS = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    *(nn.modules.instancenorm._InstanceNorm, nn.modules.batchnorm._BatchNorm),
)
INTERACTION = 1e-3  # a relative change that is more than rounding
_DIFFERENT = "what it does depends on the number of images, or a part of it cannot be seen"
# Functions whose result has as many elements as the values of an argument decide, and its place.
_SIZED_BY_VALUES = {
    **dict.fromkeys(("nonzero", "argwhere", "unique", "unique_consecutive", "nms"), 0),
    "masked_select": 1,
}


class UngraphableError(InitializationError):
    """A model that does not do the same for all images.

    Attributes:
        graph: what one pass did all the same, from which scales and other passes do not follow; or None.
    """

    def __init__(self, message: str, graph: Graph | None = None) -> None:
        super().__init__(message)
        self.graph = graph


def record(layers: Layers, inputs: tuple[Tensor, ...]) -> Graph:
    """Record the graph of a model, which runs on any number of images.

    It is compared with what the model does for the numbers of images of which it will run.

    Raises:
        UngraphableError: what the model does depends on the values of its activations or, other than in sizes, on
            the number of images.
    """
    few = _few(inputs)
    with in_parts(layers.model, inputs, layers.names):
        (first, results), (second, others) = (_record(layers, few, size) for size in SIZES)
        if first.routes or second.routes:
            raise UngraphableError("its values decide what goes where, as to one of several experts")
    both = [index for index in first.outputs if index in second.outputs]
    for graph in (first, second):  # what has as many rows for any number of images is no output
        graph.others += [index for index in graph.outputs if index not in both]
        graph.outputs = both
    _check_alike(first, second)
    per_image = all(
        {rows for _, rows in graph.uses} == {size} for graph, size in zip((first, second), SIZES, strict=True)
    )
    for one, other in zip(first.operations, second.operations, strict=True):
        one.args, one.kwargs = _generalise((one.args, one.kwargs), (other.args, other.kwargs))
    with forked_random(inputs[0].device):
        first.interact |= _interact(results, others) and _interact_in_full(layers, few)
        for part in _parts(first, inputs):
            size = len(part[0])
            graph, _ = _record(layers, part, size)
            _check_alike(first, graph)
            for one, other in zip(first.operations, graph.operations, strict=True):
                expected = map_tree((one.args, one.kwargs), lambda leaf, size=size: at_size(leaf, size))
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
    sizes = in_range(partial(squared_norms, dim=1), rows)
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
            seed_all(0)
            results.append(_record(layers.anew(), inputs, size)[1])
    return _interact(*results)


def _interact(one: dict[tuple, Tensor], other: dict[tuple, Tensor]) -> bool:
    """Whether what comes of the first images changes with one image more, as where a batch is normalised by itself."""
    both = [(one[key], other[key]) for key in one if key in other]
    pairs = [(a, b[: len(a)]) for a, b in both if (len(a), len(b)) == SIZES]
    return any(a.shape != b.shape or norm(a - b) > INTERACTION * norm(a) for a, b in pairs)


def _check_alike(one: Graph, other: Graph) -> None:
    """Raises UngraphableError: two recordings are not of the same operations on the same constants."""
    plans = [[(step.name, step.outputs) for step in graph.operations] for graph in (one, other)]
    same = plans[0] == plans[1] and one.outputs == other.outputs
    if not (same and all(_equal(tensor, other.constants.get(index)) for index, tensor in one.constants.items())):
        raise UngraphableError(_DIFFERENT, one)


def record_once(layers: Layers, inputs: tuple[Tensor, ...], size: int) -> Graph:
    """The graph of a model for so many images, which tells how scales travel.

    It is compared with that of other images, as a part of the model that cannot be seen gives other constants there;
    but not where images or values decide what the model does: there these images' tells.

    Raises:
        UngraphableError: what the model does depends on the values of its activations.
    """
    others = tuple(x.roll(1 + len(x) // 2, 0) for x in inputs)
    with forked_random(inputs[0].device):
        graph, _ = _record(layers, inputs, size)
        if not (graph.decides or graph.routes):
            _check_alike(graph, _record(layers, others, size)[0])
    return graph


def _record(layers: Layers, inputs: tuple[Tensor, ...], size: int) -> tuple[Graph, dict[tuple, Tensor]]:
    """The graph, and the outputs of affine layers and of the model, by number and by value."""
    inputs = tuple(torch.cat([x[:size]] * size)[:size] for x in inputs)
    recorder = _Recorder(layers, compares=size in SIZES)
    recorder.graph.inputs = [recorder.new(x, varying=True) for x in inputs]
    recorder.images.update(recorder.graph.inputs)
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
    if recorder.computing - layers.apart or (recorder.numbers and not layers.numbers):
        layers.apart |= recorder.computing
        layers.numbers |= recorder.numbers
        layers.found.clear()  # which knows less
        return _record(layers, inputs, size)
    graph = recorder.graph
    graph.outputs = [recorder.value(output) for output in outputs]
    graph.others = [recorder.value(other) for other in others]
    graph.fixed = {index: tensor for index, tensor in graph.fixed.items() if index not in graph.varying}
    if recorder.problem:
        raise UngraphableError(recorder.problem, graph)
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
        self.problem = ""  # why the graph does not tell what the model does
        self.weights: set[int] = set()  # parameters that may be weights of layers, and what is computed of them alone
        self.numbers = False  # whether numbers are computed of those
        self.images: set[int] = set()  # values that depend on the images
        self.uses: dict[int, set[str]] = {}  # names of the layers by which such values as weights may be were computed
        self.computing: set[str] = set()  # those that compute the weight or the bias of another

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

    def transformed(self, func: Any, args: tuple, kwargs: dict):
        """What is computed of constants, such as a mask of attention, is a constant; what of images, is not seen."""
        for tensor in tensors_of((args, kwargs)):
            while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                tensor = torch._C._functorch.get_unwrapped(tensor)
            _, index = self.memories.get(StorageWeakRef(tensor.untyped_storage()).cdata, (None, None))
            if index in self.graph.varying:
                self.problem = "it computes inside torch.vmap or another transform of torch.func"
        return super().transformed(func, args, kwargs)

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
            if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                self.weights.add(index)
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
        self.graph.routes |= any(self.value(tensor) in self.graph.learned for tensor in _deciding(name, args))
        if name == "__setitem__":
            changed = step.inputs[:1]
        elif tensors:
            known = [self.find(tensor) for tensor in tensors]
            pairs = zip(tensors, known, strict=True)
            changed = step.outputs = [self.new(tensor, varying) if i is None else i for tensor, i in pairs]
            self.graph.shapes.update((i, tensor.shape) for i, tensor in zip(changed, tensors, strict=True))  # resized
        else:
            if output is not None and name not in METADATA:
                self._leaves(step, output)
            return output
        in_place = {alias for index in changed if index in step.inputs for alias in self.graph.aliases(index)}
        self.graph.interact |= not in_place.isdisjoint(self.graph.constants)  # the next batch finds other values
        if varying:
            self.graph.varying.update(changed, in_place)
        elif not self.weights.isdisjoint(step.inputs):
            self.weights.update(changed)
        self._note_computed(step, changed, in_place)
        if learned:  # how many rows of a packed sequence are of one step depends on the lengths alone
            self.graph.learned.update(changed[:1] if name == "_pack_padded_sequence" else changed, in_place)
        self.graph.operations.append(step)
        if call is not None and self.compares:
            self.results += tensors
        return output

    def _note_computed(self, step: Operation, changed: list[int], in_place: set[int]) -> None:
        """Note which layers compute weights or biases of others.

        Of parameters alone, as in re-parametrized blocks, or of the images and no further, as where each image has a
        kernel of its own.
        """
        images = not self.images.isdisjoint(step.inputs)
        names = set() if step.call is None else {step.call.layer.name}
        if not images or step.name in VIEWS | {"contiguous"}:
            names = names.union(*(self.uses.get(index, ()) for index in step.inputs))
        if names:
            self.uses.update(dict.fromkeys([*changed, *in_place], names))
        if images:
            self.images.update(changed, in_place)
        if images and step.name in MODULE_FUNCTIONS:
            for part in step.given(AFFINE[step.name], ("weight", "bias")):
                if part is not None:
                    self.computing |= self.uses.get(part.index, set())

    def _leaves(self, step: Operation, output: Any) -> None:
        """Note that something that is no tensor is computed of tensors: what the model does next may depend on it."""
        if not self.graph.learned.isdisjoint(step.inputs):
            self.problem = self.problem or f"what {step.name} gives decides what the model does next, or leaves torch"
        elif not self.graph.varying.isdisjoint(step.inputs):
            self.graph.decides = True
        elif not self.weights.isdisjoint(step.inputs):
            self.graph.routes = True
            self.numbers |= not isinstance(output, bool)


def _deciding(name: str, args: tuple) -> list[Tensor]:
    """Arguments of a function whose values decide how many elements its result has."""
    if name == "__getitem__":
        return [index for index in tensors_of(args[1:]) if index.dtype == torch.bool]
    place = 0 if name == "where" and len(args) == 1 else _SIZED_BY_VALUES.get(name)
    return [] if place is None else tensors_of(args[place : place + 1])


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return one is other or (other is not None and same_bits(one, other))


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
