"""What forward passes change of a model, and how it is undone: parameters, buffers, attributes, generators."""

import copy
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CONSTANTS = ("eps", "alpha")  # of normalisation modules: the between-layer step may scale them
_values: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id: a tensor, its version, and its value then


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that gives parameters, buffers and constants of normalisations the values they have now."""
    constants = [(m, name, getattr(m, name)) for m in model.modules() for name in CONSTANTS if hasattr(m, name)]
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor)]
    lazy = _lazy_state(model)
    saved = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(tensors, saved, strict=True):
            if not same_bits(tensor, value):  # which may share memory with itself, so that nobody can set it
                _refill_tensor(tensor, value)
        for module, name, value in constants:
            setattr(module, name, value)
        lazy()

    return restore


def _lazy_state(model: nn.Module) -> Callable[[], None]:
    """A function that makes modules lazy again which are so now and have seen their first input since."""
    modules = [
        m for m in model.modules() if isinstance(m, nn.modules.lazy.LazyModuleMixin) and m.has_uninitialized_params()
    ]
    kinds = [(module, type(module)) for module in modules]
    tensors = [
        (t, type(t), t.dtype, t.device)
        for m in modules
        for t in (*m.parameters(False), *m.buffers(False))
        if is_lazy(t)
    ]
    containers, *_ = _held([vars(module) for module in modules])
    before = [(held, copy.copy(held)) for held in containers]

    def restore() -> None:
        for tensor, kind, dtype, device in tensors:
            tensor.data = torch.empty(0, dtype=dtype, device=device)
            tensor.__class__ = kind
        for module, lazy_kind in kinds:
            module.__class__ = lazy_kind
        for held, copied in before:
            _refill(held, copied)

    return restore


def constants(model: nn.Module) -> dict[str, float]:
    """The constants of normalisations that the state dict does not hold, by name."""
    found = {}
    for path, module in model.named_modules():
        for name in CONSTANTS:
            if isinstance(value := getattr(module, name, None), float):
                found[f"{path}.{name}".removeprefix(".")] = value
    return found


@contextmanager
def without_memory(model: nn.Module) -> Iterator[None]:
    """What a forward pass inside, with its backward pass, changes of buffers and attributes is afterwards as it was.

    Caches that the first pass fills, counters, running means, activations that are kept, generators of random numbers:
    every pass finds the same. Containers are restored in what they hold, and objects of other classes that modules hold
    in their attributes, but not what these objects hold in turn.
    """
    dicts, tensors, generators = _held([vars(module) for module in model.modules()])
    before = [(held, copy.copy(held)) for held in dicts]
    values = [(tensor, tensor._version, _value(tensor)) for tensor in tensors]
    rewinds = [*map(_rewind, generators)]
    try:
        yield
    finally:
        for rewind in rewinds:
            rewind()
        for held, copied in before:
            _refill(held, copied)
        for tensor, version, value in values:
            # Kernels that are given a buffer to write to, such as those of fake quantization, do not count it.
            if tensor._version != version or not same_bits(tensor, value):
                with torch.no_grad():
                    _refill_tensor(tensor.detach_(), value)


def _value(tensor: Tensor) -> Tensor:
    """A copy of a tensor; the same as long as nobody changes it, within one initialization."""
    _, version, value = _values.get(id(tensor), (tensor, -1, tensor))
    if version != tensor._version:
        value = tensor.detach().clone()
        _values[id(tensor)] = tensor, tensor._version, value
    return value


def forget() -> None:
    """Drop the copies that are kept of what did not change."""
    _values.clear()


def _rewind(generator: Any) -> Callable[[], Any]:
    """A function that gives a generator of random numbers its state of now."""
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if hasattr(generator, "bit_generator"):  # of numpy
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return partial(generator.set_state, generator.get_state())


def _held(roots: list[dict]) -> tuple[list, list[Tensor], list]:
    """What is below some dictionaries: containers, themselves among them, tensors that are no parameters, generators.

    These are generators of random numbers of torch, Python and numpy.
    """
    containers: list = []
    tensors: list[Tensor] = []
    generators: list = []
    numpy = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random)
    kinds += () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    seen: set[int] = set()
    waiting: deque[tuple[Any, bool]] = deque((root, False) for root in roots)  # and whether an object holds it
    while waiting:
        value, inside = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict | list | set | deque):
            containers.append(value)
            waiting += [(each, inside) for each in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, Tensor):
            if not (isinstance(value, nn.Parameter) or is_lazy(value) or value.is_inference()):
                tensors.append(value)
        elif isinstance(value, kinds):
            generators.append(value)
        elif not inside and not isinstance(value, types.ModuleType):
            waiting.append((getattr(value, "__dict__", None), True))
    return containers, tensors, generators


def _flat(held) -> list:
    return [*held, *held.values()] if isinstance(held, dict) else [*held]


def _refill(held, copied) -> None:
    """Give a container what a copy of it holds, where that is not the same."""
    pairs = zip(_flat(held), _flat(copied), strict=False)
    if len(held) == len(copied) and all(one is other for one, other in pairs):
        return
    held.clear()
    if isinstance(held, list | deque):
        held.extend(copied)
    else:
        held.update(copied)


def _refill_tensor(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape:
        tensor.resize_(value.shape)
    tensor.copy_(value)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and hold the same."""
    if one.shape != other.shape:
        return False
    if one.layout != torch.strided or one.is_meta:
        return all(map(same_bits, _parts(one), _parts(other)))
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _parts(tensor: Tensor) -> list[Tensor]:
    """What a sparse tensor consists of; nothing of a tensor without values."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def is_lazy(tensor: Tensor) -> bool:
    """Whether it has no shape until its module has seen an input."""
    return nn.parameter.is_lazy(tensor)
