"""What every step needs of a model: a mode in which it may be changed, its dropout, and its random numbers."""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from initializers._memory import forget, is_lazy, snapshot
from initializers._weight_norm import unnormalised

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
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # functions of the model's own may leave gradients there
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
        forget()
        for module, flag in flags:
            module.training = flag
        for parameter, gradient in gradients:
            parameter.grad = gradient
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
