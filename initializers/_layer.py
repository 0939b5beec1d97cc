"""An affine layer, and one use of it: its matrix, the windows of its input, the gradient of its weight."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from initializers._model import InitializationError
from initializers._squares import in_range

PIECE = 500_000  # values of a large tensor that are worked on at a time: 2 MB, which fit the cache
# By the number of dimensions of the weight.
_WEIGHT_GRADIENTS = {3: grad.conv1d_weight, 4: grad.conv2d_weight, 5: grad.conv3d_weight}


@dataclass(eq=False)
class Layer:
    """An affine layer.

    Attributes:
        name: of the module, or of the parameter where it is no module's `weight`.
        weight: the parameter, or a view of some of its rows.
        bias: likewise; None where there is none that can be set.
        groups, transposed: of a convolution.
        factor, bias_factor: what the layer multiplies its weight and its bias by before it computes, as those of
            `AuxiliaryScaling`, or of an "equalized learning rate".
        fixed_bias: what it adds where that cannot be set, as the model computes it or it is frozen.
        mask: 0 for weights that the model multiplies by 0 (pruned ones), or that its own forward pass sets to 0, see
            `with_masks`; shaped like the weight.
        sets_to_zero: whether the forward pass does that, of which the gradients know nothing.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    transposed: bool = False
    factor: Tensor | None = None
    fixed_bias: Tensor | None = None
    bias_factor: Tensor | None = None
    mask: Tensor | None = None
    sets_to_zero: bool = False

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer and no convolution."""
        return self.weight.ndim == 2

    def as_blocks(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight as a view (groups, outputs, inputs, kernel) of each group's matrix."""
        blocks = weight.view(self.groups, len(weight) // self.groups, weight.shape[1], -1)
        return blocks.transpose(1, 2) if self.transposed else blocks

    @property
    def blocks(self) -> Tensor:
        """The weight as a view (groups, outputs, inputs, kernel)."""
        return self.as_blocks(self.weight.detach())

    @property
    def out_channels(self) -> int:
        """Output channels or features."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def fan_in(self) -> int:
        """Number of inputs of each output, of one group."""
        return self.blocks.shape[2] * self.blocks.shape[3]

    @property
    def hidden(self) -> Tensor:
        """Output channels of which the mask hides all weights; bool (out_channels,)."""
        if self.mask is None:
            return torch.zeros(self.out_channels, dtype=torch.bool, device=self.weight.device)
        return ~self.as_blocks(self.mask.detach()).any(3).any(2).flatten()

    def set_weight(self, blocks: Tensor) -> None:
        """Compute with these weights (groups, outputs, inputs, kernel) from now on, and with no bias."""
        if self.factor is not None:
            blocks = blocks / self.factor
        if memory(blocks) != memory(self.weight):
            self.blocks.copy_(blocks)
        if self.mask is not None:
            self.weight.mul_(self.mask)
        if self.bias is not None:
            self.bias.zero_()

    def scale_inputs(self, factors: Tensor) -> None:
        """Multiply the weights of each input channel by `factors` (groups, inputs)."""
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        self.blocks.mul_(factors.to(self.weight.device, precise).unsqueeze(1).unsqueeze(3))


@dataclass
class Call:
    """One use of a layer, with the geometry of a convolution (one number per spatial dimension)."""

    layer: Layer
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()  # before and after
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: Layer, given: dict[str, Any]) -> "Call":
        """The use of a layer by a call of an affine function with the given arguments, by name."""
        if layer.linear:
            return cls(layer)
        kernel = layer.weight.shape[2:]
        dilation = _each(given.get("dilation", 1), kernel)
        padding = given.get("padding", 0)
        if padding == "same":
            totals = [step * (extent - 1) for step, extent in zip(dilation, kernel, strict=True)]
            pairs = tuple((total // 2, total - total // 2) for total in totals)
        else:
            pairs = tuple((side, side) for side in _each(0 if padding == "valid" else padding, kernel))
        return cls(layer, _each(given.get("stride", 1), kernel), pairs, dilation)

    def windows(self, x: Tensor) -> Tensor:
        """What the layer multiplies by its weights: (images, *positions, *kernel, channels), a view.

        For a convolution, of the padded input in channels-last layout, which is a copy; the kernel of a linear layer
        has no dimensions, and its positions are all dimensions of the input but the first and the last.
        """
        if self.layer.linear:
            return x
        x = self._pad(x).movedim(1, -1).contiguous()
        first, *strides, last = x.stride()
        kernel = self.layer.weight.shape[2:]
        each = zip(x.shape[1:-1], kernel, self.stride, self.dilation, strict=True)
        positions = [(size - step * (extent - 1) - 1) // stride + 1 for size, extent, stride, step in each]
        moves = [stride * step for stride, step in zip(strides, self.stride, strict=True)]
        steps = [stride * step for stride, step in zip(strides, self.dilation, strict=True)]
        return x.as_strided((len(x), *positions, *kernel, x.shape[-1]), (first, *moves, *steps, last))

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient of the weight, shaped like it, for an input and the gradient of the output; over all rows."""
        layer = self.layer
        if layer.linear:
            return gradient.flatten(0, -2).T @ x.flatten(0, -2)
        convolution_weight = _WEIGHT_GRADIENTS[layer.weight.ndim]
        geometry = {"stride": self.stride, "dilation": self.dilation, "groups": layer.groups}
        if layer.transposed:  # the convolution whose input is the gradient and whose output is x
            x, gradient = gradient, x
        return convolution_weight(self._pad(x), layer.weight.shape, gradient, **geometry)

    def _pad(self, x: Tensor) -> Tensor:
        sides = [side for pair in reversed(self.padding) for side in pair]
        return F.pad(x, sides) if any(sides) else x


def channel_statistics(layer: Layer, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each output channel over images and positions; two (out_channels,).

    Both are 0 where no image reaches the layer, as where each goes to one of several experts.
    """
    positions = 1 if layer.linear else outputs[0][0, 0].numel()
    parts = [output.detach().reshape(-1, layer.out_channels, positions) for output in outputs if len(output)]
    if not parts:
        return layer.weight.new_zeros(layer.out_channels), layer.weight.new_zeros(layer.out_channels)
    count = sum(part.shape[0] * part.shape[2] for part in parts)
    # Positions first, as they are contiguous, then images: many times faster than torch.var_mean, and as exact.
    precise = torch.promote_types(parts[0].dtype, torch.float32)
    mean = torch.as_tensor(sum(part.to(precise).sum(2).sum(0) for part in parts)) / count

    def squares(*parts: Tensor) -> Tensor:
        total = torch.zeros_like(mean, dtype=torch.promote_types(precise, parts[0].dtype))
        for part in parts:
            for piece in part.split(max(1, PIECE // part[0].numel())):  # a copy that fits the cache
                total += torch.linalg.vector_norm(piece.to(total.dtype) - mean.unsqueeze(1), dim=2).square().sum(0)
        return total

    return mean, in_range(squares, *parts).div(count).sqrt().to(precise)


def check_input(layer: Layer, inputs: Iterable[Tensor]) -> None:
    """Raises InitializationError: the input of a layer is not finite, though the images and the parameters are."""
    for x in inputs:
        total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))  # faster than to look at each value
        if not torch.isfinite(total) and not torch.isfinite(x).all():
            raise InitializationError(
                f"layer {layer.name}: its input holds NaN or Inf; check what the model computes before it (running "
                "statistics, weights that overflow), and that the images have the size and the range that it expects"
            )


def check_memory(layer: Layer) -> None:
    """Raises InitializationError: the weight shares memory with itself, or is cut out of a larger tensor."""
    shared = any(step == 0 and size > 1 for step, size in zip(layer.weight.stride(), layer.weight.shape, strict=True))
    try:
        layer.as_blocks(layer.weight)
    except RuntimeError:
        shared = True
    if shared:
        raise InitializationError(
            f"layer {layer.name}: its weight is expanded or cut out of a larger tensor, so that it cannot be set; give "
            "it memory of its own (nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format)))"
        )


def memory(tensor: Tensor) -> int:
    """Address of a tensor's memory, which its views share; a sparse tensor has no memory of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    if memory(one) != memory(other):
        return False
    ends = []
    for tensor in (one, other):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        ends.append((tensor.storage_offset(), tensor.storage_offset() + last))
    return bool(ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1])


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has each value of its stretch of memory once, in whatever order."""
    needed = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and step != needed:
            return False
        needed *= size
    return True


def has_kernel(tensor: Tensor) -> bool:
    """Whether the dimensions behind the first two can be seen as one."""
    try:
        tensor.view(*tensor.shape[:2], -1)
    except RuntimeError:
        return False
    return True


def _each(value: int | tuple[int, ...], kernel: torch.Size) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)
    return values * len(kernel) if len(values) == 1 else values
