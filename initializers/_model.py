"""What every step needs of a model: its outputs, its dropout, and a safe way to change it."""

import copy
import dataclasses
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from initializers._weight_norm import unnormalised

CONSTANTS = ("eps", "alpha")  # of normalisation modules: the between-layer step may scale them
ARITHMETIC = (  # of a GPU
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cudnn, "benchmark", False),
    (getattr(torch.backends.cudnn, "conv"), "fp32_precision", "ieee"),  # noqa: B009 (its stub lacks it)
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
)
SHARDED = {"DTensor", "FSDPModule", "FullyShardedDataParallel"}  # classes of torch.distributed
_ONE_AT_A_TIME = threading.RLock()  # modes of a model and torch's random state are one for all threads


class InitializationError(ValueError):
    """The model or the images cannot be used; the message names the layer and the remedy. The model is unchanged."""


class RejectedError(InitializationError):
    """The model does not take such inputs."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what runs it on several devices or compiled.

    Raises:
        InitializationError: it is no module.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InitializationError(f"the model is {kind}: pass a torch.nn.Module")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.get_submodule("module" if isinstance(model, wrappers) else "_orig_mod")
    return model


@contextmanager
def unchanged_on_error(model: nn.Module, seed: int, training: bool = False) -> Iterator[None]:
    """A mode to initialize in; afterwards flags and random state are as found, after an error weights too.

    Dropout modules are active, as in training and in the authors' code: what is measured is what is trained. Everything
    else is in evaluation mode, or with `training` in training mode, but for BatchNorm: it uses its running statistics,
    which are not updated. On a GPU convolutions and products are deterministic and of full precision: TF32 changes
    outputs by more than the between-layer step may. Other threads wait.
    """
    with _ONE_AT_A_TIME, _unchanged_on_error(model, seed, training):
        yield


@contextmanager
def _unchanged_on_error(model: nn.Module, seed: int, training: bool) -> Iterator[None]:
    if type(made := torch.empty(0)) is not Tensor:
        raise InitializationError(f"a {type(made).__name__} is what torch makes here, without values: leave that mode")
    _check_whole(model)
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)
    flags = [(module, module.training) for module in model.modules()]
    restore = snapshot(model)
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda}
    generators = [(generator, generator.getstate()) for generator in _other_generators().values()]
    for module in model.modules():  # by the flag alone: `train()` of some models merges adapters into weights
        normalises = getattr(module, "running_mean", None) is not None
        module.training = isinstance(module, nn.modules.dropout._DropoutNd) or (training and not normalises)
    try:
        with _plain_modes(model), torch.random.fork_rng(devices=list(devices)), unnormalised(model):
            seed_all(seed)  # of dropout, and of models that draw random numbers even in evaluation mode
            yield
    except BaseException:
        restore()
        raise
    finally:
        _values.clear()
        for module, flag in flags:
            module.training = flag
        for generator, state in generators:
            generator.setstate(state)


class _NumpyRandom:
    """numpy's global generator, with the methods of Python's."""

    def __init__(self, numpy: Any) -> None:
        self.seed, self._random = numpy.random.seed, numpy.random

    def getstate(self) -> tuple:
        name, keys, *rest = self._random.get_state()
        return name, tuple(keys.tolist()), *rest

    def setstate(self, state: tuple) -> None:
        self._random.set_state(state)


def _other_generators() -> dict[str, Any]:
    """The generators of random numbers, by name, which are not torch's and which a model may draw from."""
    numpy = sys.modules.get("numpy")
    return {"random": random} | ({} if numpy is None else {"numpy.random": _NumpyRandom(numpy)})


def seed_all(seed: int) -> None:
    """Seed all global generators of random numbers."""
    torch.manual_seed(seed)
    for generator in _other_generators().values():
        generator.seed(seed % 2**32)


@contextmanager
def noting_random(names: set[str]) -> Iterator[None]:
    """Add to `names` the generators, other than torch's, that are drawn from inside."""
    before = {name: generator.getstate() for name, generator in _other_generators().items()}
    try:
        yield
    finally:
        names |= {name for name, generator in _other_generators().items() if generator.getstate() != before.get(name)}


def _check_whole(model: nn.Module) -> None:
    """Raises InitializationError: processes hold a part of the model each, which replaces what is set in the whole."""
    for part in (*model.modules(), *model.parameters()):
        kinds = [kind.__name__ for kind in type(part).__mro__]  # as an import of torch.distributed.fsdp takes long
        if found := next((kind for kind in kinds if kind in SHARDED), None):
            raise InitializationError(
                f"the model is sharded ({found}): initialize it before fully_shard, FullyShardedDataParallel or "
                "parallelize_module"
            )


def _check_parameter(name: str, parameter: Tensor) -> None:
    """Raises InitializationError: a parameter that cannot be set."""
    if is_lazy(parameter):
        return
    if parameter.is_inference():  # torch lets nobody change it
        raise InitializationError(f"parameter {name} was made in inference mode: make the model outside of it")
    if parameter.is_meta:
        raise InitializationError(f"parameter {name} is on the meta device: give the model memory (to_empty) first")
    if parameter.layout != torch.strided:
        raise InitializationError(f"parameter {name} is {parameter.layout}: make it dense (to_dense)")


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


@contextmanager
def forked_random(device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside leave those that follow as they would have been."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _plain_modes(model: nn.Module) -> Iterator[None]:
    """None of the modes that a caller may be in: inference, autocast, a default device without memory, compilation.

    Functions that are scripted or traced run as they are written, as those that are compiled. Attention computes as in
    training: its faster way in evaluation is chosen by the values of a padding mask. Distributions do not look whether
    their parameters are valid, by which values would decide what happens next.
    """
    tensors = [*model.parameters(), *model.buffers()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", *(tensor.device.type for tensor in tensors)} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type == "meta" and tensors:
            stack.enter_context(tensors[0].device)
        stack.enter_context(_no_checkpoints())
        for owner, name, value in (
            *ARITHMETIC,
            (torch.distributions.Distribution, "_validate_args", False),
            (torch.jit.ScriptFunction, "__call__", _as_written(torch.jit.ScriptFunction.__call__)),
        ):
            stack.enter_context(_replaced(owner, name, value))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # which is slow to import, and nothing is compiled without it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints run what they hold: their gradient cannot be taken for a part of the graph."""
    function = torch.utils.checkpoint.CheckpointFunction
    function.apply = staticmethod(lambda run, _, *args: run(*args))
    try:
        yield
    finally:
        del function.apply


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _as_written(call: Callable) -> Callable:
    """How a scripted or traced function is called that runs what it was made from; `call` where that is not known."""

    def run(function, *args, **kwargs):
        written = getattr(function, "_torchdynamo_inline", None)  # none where it was loaded from a file
        return call(function, *args, **kwargs) if written is None else written(*args, **kwargs)

    return run


def scripted(model: nn.Module) -> Iterator[nn.Module]:
    """Scripted and traced modules, of which nothing inside can be seen."""
    return (module for module in model.modules() if isinstance(module, torch.jit.ScriptModule))


def dropouts(model: nn.Module) -> dict[str, nn.modules.dropout._DropoutNd]:
    """The dropout modules of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout modules are inactive inside, and active afterwards."""
    modules = dropouts(model).values()
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


def other_dropout(model: nn.Module) -> list[str]:
    """Names of modules that drop at random in training without being dropout modules of torch.

    Stochastic depth, dropout inside attention or between the steps of a recurrent layer; known by their class or by an
    attribute that is named after dropout and larger than 0.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.dropout._DropoutNd) and not module.training:
            rates = [key for key, value in vars(module).items() if isinstance(value, float) and value > 0]
            kind = type(module).__name__.lower()
            if any("drop" in key for key in rates) or (rates and ("drop" in kind or "stochasticdepth" in kind)):
                found.append(name or type(module).__name__)
    return found


def constants(model: nn.Module) -> dict[str, float]:
    """The constants of normalisations that the state dict does not hold, by name."""
    found = {}
    for path, module in model.named_modules():
        for name in CONSTANTS:
            if isinstance(value := getattr(module, name, None), float):
                found[f"{path}.{name}".removeprefix(".")] = value
    return found


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


def _rewind(generator: Any) -> Callable[[], Any]:
    """A function that gives a generator of random numbers its state of now."""
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if hasattr(generator, "bit_generator"):  # of numpy
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return partial(generator.set_state, generator.get_state())


_values: dict[int, tuple[Tensor, int, Tensor]] = {}  # by id: a tensor, its version, and its value then


def _value(tensor: Tensor) -> Tensor:
    """A copy of a tensor; the same as long as nobody changes it, within one initialization."""
    _, version, value = _values.get(id(tensor), (tensor, -1, tensor))
    if version != tensor._version:
        value = tensor.detach().clone()
        _values[id(tensor)] = tensor, tensor._version, value
    return value


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


def _flat(held) -> list:
    return [*held, *held.values()] if isinstance(held, dict) else [*held]


def outputs_of(
    model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...] = (), others: list[Tensor] | None = None
) -> list[Tensor]:
    """The tensors of floats that the model returns with a row per image, (N, ...) each.

    A list with an element for each image, of tensors of the same shapes, is stacked.

    Args:
        names: by which it takes the last of the inputs.
        others: gets what else it returns of floats, such as a loss.

    Raises:
        RejectedError: the model rejects inputs of this shape.
        InitializationError: it returns nothing with a row per image.
    """
    positional = len(inputs) - len(names)
    torch.clear_autocast_cache()  # which holds casts of weights that have changed since
    try:
        output = model(*inputs[:positional], **dict(zip(names, inputs[positional:], strict=True)))
    except (InitializationError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a forward pass may raise nearly anything, such as a division by a size of zero
        raise _rejected(inputs, positional, error) from error
    count = len(inputs[0])
    found = [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
    rows = [bool(tensor.ndim and len(tensor) == count) for tensor in found]
    squeezed = count == 1 and not any(rows)  # all dimensions of one element
    if squeezed:
        shaped = any(tensor.ndim for tensor in found)  # beside which a number is a loss
        rows = [bool(tensor.ndim) or not shaped for tensor in found]
    outputs = [tensor.unsqueeze(0) if squeezed else tensor for tensor, row in zip(found, rows, strict=True) if row]
    if others is not None:
        others += [tensor for tensor, row in zip(found, rows, strict=True) if not row]
    if not outputs and isinstance(output, list | tuple) and len(output) == count:
        parts = [[tensor for tensor in tensors_of(part) if tensor.is_floating_point()] for part in output]
        if parts[0] and len({tuple(tensor.shape for tensor in part) for part in parts}) == 1:
            outputs = [torch.stack(tensors) for tensors in zip(*parts, strict=True)]
    if not outputs:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found[:4]) or "no tensor of floats"
        raise InitializationError(
            f"the model returns a {type(output).__name__} with {shapes} for {count} images, of which nothing has a row "
            "per image; wrap the model in a module whose forward returns such a tensor, its logits or its features"
        )
    return outputs


def _rejected(inputs: tuple[Tensor, ...], positional: int, error: Exception) -> RejectedError:
    """What to say of an error that a forward pass raised; so many of the inputs have no name."""
    shapes = ", ".join(str(tuple(image.shape)) for image in inputs[:4]) + ", ..." * (len(inputs) > 4)
    hint = ""
    if positional > 1:
        hint = "; pass the images alone, if the rest are targets, and images of one length, if they are lengths"
    elif isinstance(error, LookupError | AttributeError):
        hint = "; where it takes a dict or another object, wrap it in a module whose forward makes that of tensors"
    elif inputs[0].ndim == 3:
        hint = "; if these are single images, torch.stack makes a batch of them"
    return RejectedError(f"the model rejects images of shape {shapes}: {str(error) or type(error).__name__}{hint}")


@contextmanager
def in_parts(model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> Iterator[None]:
    """While the model is run on some of the images: an error says what to do where it takes only all of them."""
    try:
        yield
    except RejectedError as error:
        if not _takes(model, inputs, names):
            raise
        raise InitializationError(
            f"the model takes all {len(inputs[0])} rows together and not some of them ({error}): where several are one "
            "thing, such as the nodes of a graph or the frames of a clip, they are one image: pass x[None], or "
            "x.unflatten(0, (-1, frames)), and a module whose forward is torch.stack([model(one) for one in x])"
        ) from error


def _takes(model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> bool:
    try:
        with torch.no_grad(), without_memory(model):
            outputs_of(model, inputs, names)
    except RejectedError:
        return False
    except InitializationError:
        pass  # nothing has a row per image, as there are fewer clips than frames
    return True


NAMESPACES = (types.SimpleNamespace, torch.distributions.Distribution)


def tensors_of(tree) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings, data classes and distributions."""
    if isinstance(tree, Tensor):
        return [tree]
    parts: Iterable = ()
    if isinstance(tree, Mapping):
        parts = tree.values()
    elif isinstance(tree, tuple | list):
        parts = tree
    elif (dataclasses.is_dataclass(tree) and not isinstance(tree, type)) or isinstance(tree, NAMESPACES):
        parts = {id(part): part for part in vars(tree).values()}.values()  # some keep a parameter under two names
    return [tensor for part in parts for tensor in tensors_of(part)]
