"""What every step needs of a model: its inputs, its outputs, its dropout, and a safe way to change it."""

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

CONSTANTS = ("eps", "alpha")  # of normalisation modules: the between-layer step may scale them
ARITHMETIC = (  # of a GPU
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cudnn, "benchmark", False),
    (getattr(torch.backends.cudnn, "conv"), "fp32_precision", "ieee"),  # noqa: B009 (its stub lacks it)
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
)


class InitializationError(ValueError):
    """The model or the images cannot be used; the message names the layer and the remedy. The model is unchanged."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what runs it on several devices or compiled."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.get_submodule("module" if isinstance(model, wrappers) else "_orig_mod")
    return model


def as_inputs(model: nn.Module, images) -> tuple[Tensor, ...]:
    """Check the model's weights, and give the images as the positional inputs of one forward pass.

    The inputs are on the model's device and in its precision.

    Args:
        images: a float tensor (N, ...), an iterable of batches (tensors, or tuples, lists or dicts whose first
            tensor is the input), a tuple of tensors for a model of several inputs, one batch of images and labels, a
            `Dataset`, or a list of images (C, H, W).

    Raises:
        InitializationError: no images, integers that the model does not take, images without any variance, NaN or Inf
            in images or weights.
    """
    weight = next(model.parameters(), None)
    if weight is None:
        raise InitializationError("the model has no parameters: there is nothing to initialize")
    for name, parameter in model.named_parameters():
        if parameter.numel() and not _is_finite(parameter):
            raise InitializationError(f"parameter {name} holds NaN or Inf; initialize or load it again")
    inputs = _tensors(images)
    for image in inputs:
        _check(image)
    if len({len(image) for image in inputs}) > 1:
        raise InitializationError(
            f"the inputs have {', '.join(str(len(image)) for image in inputs)} rows: pass as many"
        )
    dtypes = [weight.dtype if image.is_floating_point() else image.dtype for image in inputs]
    inputs = tuple(image.detach().to(weight.device, dtype) for image, dtype in zip(inputs, dtypes, strict=True))
    _check_integers(model, inputs)
    return inputs


@torch.no_grad()
def _check_integers(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raises InitializationError: the model does not take the integers that are among its inputs."""
    found = [image.dtype for image in inputs if not image.is_floating_point()]
    if not found:
        return
    try:
        with forked_random(inputs[0].device), without_memory(model):
            outputs_of(model, tuple(image[:2].clone() for image in inputs))
    except InitializationError as error:
        raise InitializationError(
            f"images are {found[0]}: pass float images, normalised exactly as in training (mean, scale, channels); "
            f"integers are for models that take them, and this one does not: {error}"
        ) from error


def _tensors(images) -> tuple[Tensor, ...]:
    """The images as one tensor for each input of the model; arguments and errors of `as_inputs`."""
    if isinstance(images, Tensor):
        return (images,)
    if isinstance(images, tuple) and images and all(isinstance(image, Tensor) for image in images):
        return _inputs_of(images)
    if isinstance(images, dict) or (isinstance(images, list) and _is_batch(images)):
        return (_input_of(images),)
    one_by_one = isinstance(images, torch.utils.data.Dataset) and hasattr(images, "__len__")
    if not isinstance(images, Iterable) and not one_by_one:
        raise InitializationError(f"images is a {type(images).__name__}: pass a float tensor or an iterable of batches")
    with torch.random.fork_rng(devices=[]):  # which a loader draws from
        given = [images[number] for number in range(len(images))] if one_by_one else [*images]
    if not given:
        raise InitializationError("images is empty: pass at least a few dozen real images")
    parts = [_input_of(part) for part in given]
    if one_by_one or (isinstance(images, list) and all(map(_is_image, parts))):
        parts = [part.unsqueeze(0) for part in parts]
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        raise InitializationError(f"the batches hold images of different shapes {shapes}: resize them to one")
    return (torch.cat(parts),)


def _is_batch(given: list) -> bool:
    """Whether a list is one batch of a loader, of images and of labels (of integers, or of less dimensions).

    Raises:
        InitializationError: it may be that, or two batches.
    """
    if len(given) < 2 or not all(isinstance(part, Tensor) and part.ndim for part in given):
        return False
    if len(given) == 2 and given[0].shape == given[1].shape and given[0].ndim > 1 and not _is_image(given[0]):
        raise InitializationError(
            "images is a list of two tensors of the same shape, which may be inputs and targets or two batches: pass "
            "the inputs alone, or torch.cat of the batches"
        )
    return len({(part.is_floating_point(), part.ndim) for part in given}) > 1 and len(set(map(len, given))) == 1


def _is_image(part: Tensor) -> bool:
    """Whether this is an image, (C, H, W), and no batch: of as many channels as images have, and a square."""
    return part.ndim == 3 and len(part) in (1, 3) and part.shape[1] == part.shape[2]


def _inputs_of(images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a model of several; of a batch, with labels of integers, the first.

    Raises:
        InitializationError: integers come first.
    """
    if not images[0].is_floating_point() and any(image.is_floating_point() for image in images):
        raise InitializationError(f"images is a tuple whose first tensor is {images[0].dtype}: pass the images alone")
    labels = len(images) == 2 and not images[1].is_floating_point() and images[1].ndim == 1
    return images[:1] if labels else images


def _input_of(batch) -> Tensor:
    """The images of a batch: its first tensor, or where labels of integers come first, its one tensor of floats.

    Raises:
        InitializationError: there is no tensor, or several of floats behind one of integers.
    """
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        message = f"a batch of type {type(batch).__name__} holds no tensor: yield tensors or (input, ...)"
        raise InitializationError(message)
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if tensors[0].is_floating_point() or not floats:
        return tensors[0]
    if len(floats) > 1:
        message = f"a batch begins with {tensors[0].dtype} and holds several tensors of floats: yield the images first"
        raise InitializationError(message)
    return floats[0]


def _check(image: Tensor) -> None:
    if image.ndim < 2 or len(image) == 0:
        raise InitializationError(f"images have shape {tuple(image.shape)}: expected (N, ...) with at least one image")
    if not _is_finite(image):
        raise InitializationError("images hold NaN or Inf: check the decoding and the normalisation")
    others = [dimension for dimension in range(image.ndim) if dimension != 1]
    if torch.equal(image.amin(others), image.amax(others)):
        raise InitializationError("images have no variance (are they all black?): pass real images")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; in one pass, as NaN propagates."""
    return all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor.detach()))


@contextmanager
def unchanged_on_error(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode with dropout inside; afterwards flags and random state are as found, after an error weights too.

    Dropout modules are active, as in training and in the authors' code: what is measured is what is trained. Everything
    else is in evaluation mode: BatchNorm uses its running statistics, which are not updated. On a GPU convolutions and
    products are deterministic and of full precision: TF32 changes outputs by more than the between-layer step may.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():  # torch lets nobody change it
            raise InitializationError(f"parameter {name} was made in inference mode: make the model outside of it")
    training = [(module, module.training) for module in model.modules()]
    restore = snapshot(model)
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda}
    arithmetic = [(backend, name, getattr(backend, name)) for backend, name, _ in ARITHMETIC]
    model.eval()
    for dropout in dropouts(model).values():
        dropout.train()
    try:
        for backend, name, value in ARITHMETIC:
            setattr(backend, name, value)
        with _plain_modes(model), torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)  # of dropout, and of models that draw random numbers even in evaluation mode
            yield
    except BaseException:
        restore()
        raise
    finally:
        for module, flag in training:
            module.training = flag
        for backend, name, value in arithmetic:
            setattr(backend, name, value)


@contextmanager
def forked_random(device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside leave those that follow as they would have been."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _plain_modes(model: nn.Module) -> Iterator[None]:
    """None of the modes that a caller may be in: inference, autocast, a default device without memory, compilation."""
    tensors = [*model.parameters(), *model.buffers()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", *(tensor.device.type for tensor in tensors)} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type == "meta" and tensors:
            stack.enter_context(tensors[0].device)
        if "torch._dynamo" in sys.modules:  # which is slow to import, and nothing is compiled without it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


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
        if not isinstance(module, nn.modules.dropout._DropoutNd):
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
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
        for module, name, value in constants:
            setattr(module, name, value)

    return restore


@contextmanager
def without_memory(model: nn.Module) -> Iterator[None]:
    """What a forward pass inside, with its backward pass, changes of buffers and attributes is afterwards as it was.

    Caches that the first pass fills, counters, running means, activations that are kept: every pass finds the same.
    Containers are restored in what they hold; objects of other classes are not looked into.
    """
    dicts, tensors = _held([vars(module) for module in model.modules()])
    before = [(held, copy.copy(held)) for held in dicts]
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for held, copied in before:
            _refill(held, copied)
        for tensor, version, value in values:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.detach_().resize_(value.shape).copy_(value)


def _held(roots: list[dict]) -> tuple[list, list[Tensor]]:
    """The containers below some dictionaries, themselves among them, and the tensors in them that are no parameters."""
    containers: list = []
    tensors: list[Tensor] = []
    seen: set[int] = set()
    waiting: list = [*roots]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict | list | set | deque):
            containers.append(value)
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference():
            tensors.append(value)
    return containers, tensors


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


def _flat(held) -> list:
    return [*held, *held.values()] if isinstance(held, dict) else [*held]


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors that the model returns, (N, ...) each.

    Raises:
        InitializationError: the model rejects inputs of this shape, or does not return a row per image.
    """
    try:
        output = model(*inputs)
    except InitializationError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        shapes = ", ".join(str(tuple(image.shape)) for image in inputs)
        raise InitializationError(f"the model rejects images of shape {shapes}: {error}") from error
    outputs = [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
    if not outputs or any(tensor.ndim == 0 or len(tensor) != len(inputs[0]) for tensor in outputs):
        raise InitializationError("the model must return tensors with a row per image; wrap it so that it does")
    return outputs


def tensors_of(tree) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
