"""Weights that a layer multiplies by constants before it computes with them."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from initializers._layer import memory

PRODUCTS = {"mul": 1, "multiply": 1, "div": -1, "divide": -1, "true_divide": -1}  # and the power of the second
COPIES = {"clone", "to", "type", "type_as", "float", "double", "half", "bfloat16"}  # the same in another precision
MASKING = {"mul", "multiply", "where", "masked_fill", "tril", "triu"}  # functions that may set some values to 0


class AuxiliaryScaling(nn.Module):
    """The paper's auxiliary scaling, as a parametrization: the layer computes with `factor` times its parameter.

    The factor has a value for each row, as the rows of a packed projection may be several layers.
    """

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, parameter: Tensor) -> Tensor:
        """The effective weight or bias."""
        return parameter * self.factor

    def right_inverse(self, value: Tensor) -> Tensor:
        """The parameter of which `value` is the effective one."""
        return value / self.factor


@dataclass
class Scaled:
    """A product of a parameter with constants: with a factor for each row, and with a mask of zeros and ones.

    Attributes:
        parameter: it, or a view of it, whose parameter is `whole`.
        version: of the output, which torch counts up with each change in place.
    """

    output: Tensor
    parameter: Tensor
    whole: Tensor | None
    factor: Tensor
    mask: Tensor | None
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.version = _version(self.output)

    @property
    def is_changed(self) -> bool:
        """Whether the model has changed the product in place, so that it is none."""
        return self.version != _version(self.output)

    @property
    def is_parameter(self) -> bool:
        """Whether the model has made the product the value of the parameter."""
        return self.whole is not None and memory(self.whole) == memory(self.output)

    def compute(self) -> Tensor:
        """The product as the parameter is now."""
        product = self.parameter * self.factor
        return product if self.mask is None else product * self.mask

    def refresh(self) -> None:
        """Make the output the product as the parameter is now."""
        self.output.copy_(self.compute())
        self.version = _version(self.output)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def source_of(tensor: Tensor, sources: dict[int, Scaled]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The parameter, or its rows, of which a tensor is the product with constants, and their factor and mask.

    A layer may use a part of what was computed (the rows of a packed projection): it is found by its offset in memory.
    """
    found = sources.get(memory(tensor))
    if found is None or found.is_parameter or found.is_changed or found.output.stride() != found.parameter.stride():
        return tensor, None, None
    offset = int(tensor.storage_offset() - found.output.storage_offset())
    row = offset // max(1, found.output.stride(0)) if found.output.ndim else 0
    factor = found.factor.flatten()[row if found.factor.numel() > 1 else 0]
    if tensor is found.output:
        return found.parameter, factor, found.mask
    shape, strides = tensor.shape, tensor.stride()
    mask = None if found.mask is None else found.mask.as_strided(shape, strides, offset)
    return found.parameter.as_strided(shape, strides, found.parameter.storage_offset() + offset), factor, mask
