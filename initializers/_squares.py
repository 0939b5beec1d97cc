"""Sums of squares of values whose squares float32 may not hold, as those of 1e-20 or 1e20."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LEAST = 1e-30  # float32 holds smaller sums with few digits or none


def in_range(squares: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What `squares` makes of the tensors, or of them in float64 where their own precision does not hold it."""
    found = squares(*tensors)
    if LEAST < found.max() < math.inf:
        return found
    return squares(*(tensor.to(torch.promote_types(tensor.dtype, torch.float64)) for tensor in tensors))


def squared_norms(tensor: Tensor, dim: int | list[int] | None = None) -> Tensor:
    """As `torch.linalg.vector_norm`, squared; float64, of norms in float32 if the tensor is of no more."""
    precise = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=dim, dtype=precise).double().square()


def norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm of all values, float64."""
    return in_range(squared_norms, tensor).sqrt()


def root_mean_square(tensor: Tensor) -> Tensor:
    """Of all values, float64."""
    return norm(tensor) / math.sqrt(tensor.numel())
