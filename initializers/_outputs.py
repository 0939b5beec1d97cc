"""What a model returns for some images: its tensors with a row per image."""

import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from initializers._memory import without_memory
from initializers._model import InitializationError

_NAMESPACES = (types.SimpleNamespace, torch.distributions.Distribution)


class RejectedError(InitializationError):
    """The model does not take such inputs."""


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


def tensors_of(tree) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings, data classes and distributions."""
    if isinstance(tree, Tensor):
        return [tree]
    parts: Iterable = ()
    if isinstance(tree, Mapping):
        parts = tree.values()
    elif isinstance(tree, tuple | list):
        parts = tree
    elif (dataclasses.is_dataclass(tree) and not isinstance(tree, type)) or isinstance(tree, _NAMESPACES):
        parts = {id(part): part for part in vars(tree).values()}.values()  # some keep a parameter under two names
    return [tensor for part in parts for tensor in tensors_of(part)]
