"""What every step needs of a model: its affine layers, its inputs, one forward pass, and a safe way to change it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

AFFINE = (nn.Conv2d, nn.Linear)


class InitializationError(ValueError):
    """The model or the images cannot be used; the message names the layer and the remedy. The model is unchanged."""


def affine_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The affine layers by name, in order of definition.

    Raises:
        InitializationError: there is none, or one is of a kind not supported.
    """
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, AFFINE):
            layers[name] = module
        elif isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear | nn.MultiheadAttention):
            kind = type(module).__name__
            raise InitializationError(f"layer {name}: {kind} is not supported, only Conv2d and Linear are")
    if not layers:
        raise InitializationError("the model has no affine layer (Conv2d or Linear): there is nothing to initialize")
    return layers


def as_inputs(model: nn.Module, images) -> tuple[Tensor, ...]:
    """Check the model's weights, and give the images as the positional inputs of one forward pass.

    The inputs are on the model's device and in its precision.

    Args:
        images: a float tensor (N, ...), an iterable of batches (tensors, or tuples, lists or dicts whose first
            tensor is the input), or a tuple of tensors for a model of several inputs.

    Raises:
        InitializationError: no images, integer images, images without any variance, NaN or Inf in images or weights.
    """
    for name, layer in affine_layers(model).items():
        if not all(map(_is_finite, layer.parameters())):
            raise InitializationError(f"layer {name}: its weights hold NaN or Inf; initialize or load them again")
    if isinstance(images, Tensor):
        inputs = (images,)
    elif isinstance(images, tuple) and images and all(isinstance(image, Tensor) for image in images):
        inputs = images
    elif not isinstance(images, Iterable):
        raise InitializationError(f"images is a {type(images).__name__}: pass a float tensor or an iterable of batches")
    else:
        batches = [_first_tensor(batch) for batch in images]
        if not batches:
            raise InitializationError("images is empty: pass at least a few dozen real images")
        if len({batch.shape[1:] for batch in batches}) > 1:
            shapes = sorted({tuple(batch.shape[1:]) for batch in batches})
            raise InitializationError(f"the batches hold images of different shapes {shapes}: resize them to one")
        inputs = (torch.cat(batches),)
    weight = next(model.parameters())
    for image in inputs:
        _check(image)
    return tuple(image.detach().to(weight.device, weight.dtype) for image in inputs)


def _first_tensor(batch) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise InitializationError(f"a batch of type {type(batch).__name__} holds no tensor: yield tensors or (input, ...)")


def _check(image: Tensor) -> None:
    if not image.is_floating_point():
        raise InitializationError(
            f"images are {image.dtype}: pass float images, normalised exactly as in training (mean, scale, channels)"
        )
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
    """Evaluation mode inside; afterwards flags and global random state are as before, and on an error so are weights.

    Dropout is inactive and BatchNorm uses its running statistics, which are not updated.
    """
    training = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    devices = {tensor.device.index or 0 for tensor in tensors if tensor.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)  # for models that draw random numbers even in evaluation mode
            yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        raise
    finally:
        for module, flag in training:
            module.training = flag


def forward(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    before: Callable[[str, nn.Module, Tensor], None] | None = None,
    after: Callable[[str, nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """One forward pass with `before(name, layer, input)` and `after(name, layer, input, output)` at each affine layer.

    Both are called in order of execution, once per layer: where a layer is used again the second use passes
    untouched. `after` returns the output with which the pass goes on.

    Returns:
        The output of the model, (N, ...).

    Raises:
        InitializationError: the model rejects inputs of this shape, or does not return one tensor per image.
    """
    seen: set[str] = set()
    handles = []

    def hooks(name: str):
        def on_input(layer, args):
            if name not in seen and before is not None:
                with torch.no_grad():
                    before(name, layer, args[0])

        def on_output(layer, args, output):
            if name in seen:
                return output
            seen.add(name)
            return output if after is None else after(name, layer, args[0], output)

        return on_input, on_output

    try:
        for name, layer in affine_layers(model).items():
            on_input, on_output = hooks(name)
            handles.append(layer.register_forward_pre_hook(on_input))
            handles.append(layer.register_forward_hook(on_output))
        try:
            output = model(*inputs)
        except InitializationError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = ", ".join(str(tuple(image.shape)) for image in inputs)
            raise InitializationError(f"the model rejects images of shape {shapes}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != len(inputs[0]):
        raise InitializationError("the model must return one tensor with a row per image; wrap it so that it does")
    return output


def channel_statistics(layer: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each output channel over images and positions; two (out_channels,)."""
    output = output.detach().float()
    output = output.reshape(-1, output.shape[-1], 1) if isinstance(layer, nn.Linear) else output.flatten(2)
    # Positions first, as they are contiguous, then images: many times faster than torch.var_mean, and as exact.
    mean = output.mean(2).mean(0)
    parts = (part - mean.unsqueeze(1) for part in output.chunk(16))  # a copy of all of it would not fit the cache
    squares = sum(torch.linalg.vector_norm(part, dim=2).square().sum(0) for part in parts)
    return mean, squares.div(output.shape[0] * output.shape[2]).sqrt()


def per_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """`values` (out_channels,) shaped to broadcast over the layer's output."""
    return values if isinstance(layer, nn.Linear) else values.view(-1, 1, 1)
