"""The images, in any of the forms in which people have them, as the inputs of one forward pass."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from initializers._memory import is_lazy, without_memory
from initializers._model import InitializationError, forked_random
from initializers._outputs import outputs_of

MOST_BATCHES = 100_000  # or images of a dataset: more are a mistake, and loaders may never end
MOST_BYTES = 2**33
Given = tuple[tuple[Tensor, ...], tuple[str, ...]]  # inputs, and the names by which the model takes the last of them


def as_inputs(model: nn.Module, images) -> Given:
    """Check the model's weights, and give the images as the inputs of one forward pass.

    The inputs are on the model's device and in its precision.

    Args:
        images: a float tensor (N, ...), an iterable of batches (tensors, or tuples, lists or mappings whose first
            tensor is the input), a tuple of tensors for a model of several inputs, a mapping from the names of the
            model's arguments to tensors, one batch of images and labels, a `Dataset`, or a list of images (C, H, W).

    Returns:
        The inputs, and the names by which the model takes the last of them.

    Raises:
        InitializationError: no images, integers that the model does not take, images without any variance, NaN or Inf
            in images or weights.
    """
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if weight is None:
        kind = " of real numbers" if any(True for _ in model.parameters()) else ""
        raise InitializationError(f"the model has no parameters{kind}: there is nothing to initialize")
    inputs, names = _tensors(_Arguments(model), images)
    _check(inputs)
    dtypes = [weight.dtype if image.is_floating_point() else image.dtype for image in inputs]
    inputs = tuple(image.detach().to(weight.device, dtype) for image, dtype in zip(inputs, dtypes, strict=True))
    _check_integers(model, inputs, names)
    if any(map(is_lazy, model.parameters())):
        _run(model, inputs, names)  # which gives them a shape
    for name, parameter in model.named_parameters():
        if parameter.numel() and not _is_finite(parameter):
            raise InitializationError(f"parameter {name} holds NaN or Inf; initialize or load it again")
    return inputs, names


class _Arguments:
    """What the forward pass of a model takes.

    Attributes:
        names: of all its arguments. required: of those without a default, in order.
        any_name: whether it takes arguments by any name, and no other.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        try:
            given = [*inspect.signature(model.forward).parameters.values()]
        except (TypeError, ValueError):  # a scripted module
            given = []
        named = [argument for argument in given if argument.kind in kinds]
        self.names = [argument.name for argument in named]
        self.any_name = not named and any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in given)
        self.required = [argument.name for argument in named if argument.default is inspect.Parameter.empty]


def _tensors(arguments: _Arguments, images) -> Given:
    """The inputs and their names; arguments and errors of `as_inputs`."""
    if isinstance(images, Tensor):
        return (images,), ()
    if isinstance(images, tuple) and images and all(isinstance(image, Tensor) for image in images):
        return _several(arguments, images), ()
    if isinstance(images, Mapping) or (isinstance(images, list) and _is_batch(arguments, images)):
        return _of_batch(arguments, images)
    one_by_one = isinstance(images, torch.utils.data.Dataset) and hasattr(images, "__len__")
    if not isinstance(images, Iterable) and not one_by_one:
        raise InitializationError(f"images is a {type(images).__name__}: pass a float tensor or an iterable of batches")
    with torch.random.fork_rng(devices=[]):  # which a loader draws from
        given = (images[number] for number in range(len(images))) if one_by_one else images
        batches = _read(arguments, given)
    if len({(len(inputs), names) for inputs, names in batches}) > 1:
        raise InitializationError("the batches hold different inputs: yield the same in each")
    columns = [list(column) for column in zip(*(inputs for inputs, _ in batches), strict=True)]
    single = isinstance(images, list | torch.utils.data.Dataset) and all(map(_is_image, columns[0]))
    if one_by_one or single:
        columns = [[part.unsqueeze(0) for part in column] for column in columns]
    for column in columns:
        if len({part.shape[1:] for part in column}) > 1:
            shapes = sorted({tuple(part.shape[1:]) for part in column})
            remedy = "resize them to one" if len({*map(len, shapes)}) == 1 else "pass the images alone"
            raise InitializationError(f"the batches hold images of different shapes {shapes}: {remedy}")
    return tuple(map(torch.cat, columns)), batches[0][1]


def _read(arguments: _Arguments, given: Iterable) -> list[Given]:
    """What is in the batches, one after another, as they may never end.

    Raises:
        InitializationError: there are none, or too many.
    """
    batches: list[Given] = []
    size = 0
    for batch in given:
        inputs, names = _of_batch(arguments, batch)
        size += sum(part.nbytes for part in inputs)
        if size > MOST_BYTES or len(batches) == MOST_BATCHES:
            raise InitializationError(
                f"images yields more than {MOST_BATCHES:,} batches or {MOST_BYTES >> 30} GB, maybe without end: some "
                "hundred images are enough, as those of itertools.islice(loader, 5); pass a tensor if all are meant"
            )
        batches.append((inputs, names))
    if not batches:
        raise InitializationError("images is empty: pass at least a few dozen real images")
    return batches


def _of_batch(arguments: _Arguments, batch) -> Given:
    """The inputs in one batch of a loader, and their names.

    Of a mapping those that are named as arguments of the model, of a sequence as many as the model requires, if these
    are all there; or else one.
    """
    if isinstance(batch, Mapping):
        names = batch if arguments.any_name else arguments.names
        named = {name: batch[name] for name in names if isinstance(batch.get(name), Tensor)}
        if named and {*arguments.required} <= named.keys():
            return tuple(named.values()), tuple(named)
    if isinstance(batch, tuple | list) and batch:
        inner = batch[0]  # inputs in a container of their own, before the targets
        if isinstance(inner, Mapping):
            return _of_batch(arguments, inner)
        if isinstance(inner, tuple | list) and inner and all(isinstance(part, Tensor) for part in inner):
            if len(inner) != len(arguments.required):
                raise InitializationError(
                    f"a batch begins with {len(inner)} tensors (views of an image?), and the model requires "
                    f"{len(arguments.required)}: yield the images alone"
                )
            return _of_batch(arguments, inner)
        first = batch[: len(arguments.required)]
        if len(first) == len(arguments.required) > 1 and all(isinstance(part, Tensor) for part in first):
            return tuple(first), ()
    return (_input_of(batch),), ()


def _is_batch(arguments: _Arguments, given: list) -> bool:
    """Whether a list is one batch of a loader, of images and of labels (of integers, or of less dimensions).

    Raises:
        InitializationError: it may be that, or two batches.
    """
    if len(given) < 2 or not all(isinstance(part, Tensor) and part.ndim for part in given):
        return False
    if len(given) == len(arguments.required):
        return True
    if len(given) == 2 and given[0].shape == given[1].shape and given[0].ndim > 1 and not _is_image(given[0]):
        raise InitializationError(
            "images is a list of two tensors of the same shape, which may be inputs and targets or two batches: pass "
            "the inputs alone, or torch.cat of the batches"
        )
    return len({(part.is_floating_point(), part.ndim) for part in given}) > 1 and len(set(map(len, given))) == 1


def _is_image(part: Tensor) -> bool:
    """Whether this is an image, (C, H, W), and no batch: of as many channels as images have, and a square."""
    return part.ndim == 3 and len(part) in (1, 3) and part.shape[1] == part.shape[2]


def _several(arguments: _Arguments, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a model of several; of a batch, with labels of integers, the first.

    Raises:
        InitializationError: integers come first, and the model takes one input.
    """
    if len(images) == len(arguments.required):
        return images
    if not images[0].is_floating_point() and any(image.is_floating_point() for image in images):
        raise InitializationError(
            f"images is a tuple whose first tensor is {images[0].dtype}: pass the images alone, or a dict of inputs by "
            "the names of the model's arguments"
        )
    labels = len(images) == 2 and not images[1].is_floating_point() and images[1].ndim == 1
    return images[:1] if labels else images


def _input_of(batch) -> Tensor:
    """The images of a batch: its first tensor, or where labels of integers come first, its one tensor of floats.

    Raises:
        InitializationError: there is no tensor, or several of floats behind one of integers.
    """
    if isinstance(batch, Tensor):
        return batch
    values: Iterable = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        raise InitializationError(
            f"a batch of type {type(batch).__name__} holds no tensor: yield tensors, as torch.as_tensor makes them of "
            "arrays and a transform of images, or (input, ...)"
        )
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if tensors[0].is_floating_point() or not floats:
        return tensors[0]
    if len(floats) > 1:
        message = f"a batch begins with {tensors[0].dtype} and holds several tensors of floats: yield the images first"
        raise InitializationError(message)
    return floats[0]


def _check(inputs: tuple[Tensor, ...]) -> None:
    for image in inputs:
        if image.layout != torch.strided or image.is_quantized or image.is_complex() or image.is_meta:
            kind = "on the meta device" if image.is_meta else f"{image.dtype}, {image.layout}"
            raise InitializationError(f"images are {kind}: pass dense tensors of real numbers")
        if image.ndim < (2 if len(inputs) == 1 else 1) or len(image) == 0:
            shape = tuple(image.shape)
            raise InitializationError(f"images have shape {shape}: expected (N, ...) with at least one image")
        if not _is_finite(image):
            raise InitializationError("images hold NaN or Inf: check the decoding and the normalisation")
    if len({len(image) for image in inputs}) > 1:
        raise InitializationError(
            f"the inputs have {', '.join(str(len(image)) for image in inputs)} rows: pass as many"
        )
    if not any(map(_varies, inputs)):
        raise InitializationError("images have no variance (are they all black?): pass real images")


def _varies(image: Tensor) -> bool:
    others = [dimension for dimension in range(image.ndim) if dimension != 1]
    return not torch.equal(image.amin(others), image.amax(others))


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; in one pass, as NaN propagates."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor))


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> None:
    """A forward pass of two images."""
    with forked_random(inputs[0].device):
        outputs_of(model, tuple(image[:2].clone() for image in inputs), names)


def _check_integers(model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> None:
    """Raises InitializationError: the model does not take the integers that are among its inputs."""
    found = [image.dtype for image in inputs if not image.is_floating_point()]
    if not found:
        return
    try:
        with nullcontext() if any(map(is_lazy, model.parameters())) else without_memory(model):
            _run(model, inputs, names)
    except InitializationError as error:
        raise InitializationError(
            f"images are {found[0]}: pass float images, normalised exactly as in training (mean, scale, channels); "
            f"integers are for models that take them, and this one does not: {error}"
        ) from error
