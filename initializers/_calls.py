"""What a call of a torch function is, by its name and arguments: an affine map, dropout, a draw of random numbers."""

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
# Names of the functions and of their arguments in order.
AFFINE = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(("matmul", "__matmul__", "mm"), ("input", "weight")),
    "addmm": ("bias", "input", "weight"),
    "einsum": ("equation", "input", "weight"),
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
}
# Of functions that draw random numbers, new tensors of them, and those that fill a tensor.
RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "poisson"}
RANDOM |= {"bernoulli", "multinomial", "rrelu_with_noise"}
RANDOM |= {f"{name}_" for name in ("normal", "uniform", "bernoulli", "exponential", "cauchy", "random")}
RANDOM |= {"log_normal_", "geometric_", "gumbel_softmax", "svd_lowrank", "pca_lowrank"}
RANDOM |= {f"fractional_max_pool{n}d{more}" for n in (2, 3) for more in ("", "_with_indices")}
# They give the elements of one tensor, in another shape, or some of them.
VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "permute", "transpose", "movedim", "t", "T"),
    *("mT", "squeeze", "unsqueeze", "chunk", "split", "unbind", "__getitem__", "expand"),
}
# They take none of the values that come in, at most a shape: to give zeros, or memory to be written to, or others.
BLANK = {"zeros", "empty", "zeros_like", "new_zeros", "empty_like", "new_empty"}
FILLED = {"ones_like", "new_ones", "full_like", "new_full", "rand_like", "randn_like", "randint_like"}
# What a model may ask of a tensor without its values steering what happens next; `__get__` reads a property.
METADATA = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_same_size", "type", "data_ptr", "result_type"),
    *("is_signed", "is_inference", "is_pinned", "is_shared", "is_set_to", "is_neg", "is_conj", "sparse_dim"),
    *("dense_dim", "_parse_to"),  # of `Module.to`
    *("__len__", "__hash__", "__repr__", "__format__", "__get__", "__set__"),
}
MODULE_FUNCTIONS = {"linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))}

# `multi_head_attention_forward` hands itself to the active mode before anything else; this copy goes straight on, so
# that the mode sees the projections within.
attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


def arguments_of(func: Callable, args: tuple, kwargs: dict) -> dict[str, Any] | None:
    """The arguments of an affine function by name, its weight with outputs first; None for another function."""
    names = AFFINE.get(func.__name__)
    if names is None:
        return None
    if func.__name__ == "einsum":
        found = _linear_einsum(args[0])
        if found is None:
            return None
        operands = _operands(args)
        if operands[found[0]].ndim < 2:
            return None
        weight = operands[1 - found[0]].detach()
        return {"input": operands[found[0]], "weight": weight if found[1] else weight.t()}
    given = dict(zip(names, args, strict=False)) | kwargs
    if func.__name__ in MODULE_FUNCTIONS:
        return given if given["weight"].ndim > 1 else None
    weight = next((given[key] for key in ("weight", "other", "mat2") if key in given), None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or {"beta", "alpha", "out"} & given.keys():
        return None
    return given | {"weight": weight.detach().t()}


def input_of(name: str, args: tuple, kwargs: dict):
    """The input among the arguments of an affine function."""
    if name == "einsum":
        found = _linear_einsum(args[0])
        return _operands(args)[0 if found is None else found[0]]
    given = dict(zip(AFFINE[name], args, strict=False)) | kwargs
    return next(given[key] for key in ("input", "mat1") if key in given)


def unbatched(given: dict[str, Any]) -> bool:
    """Whether these are the arguments of an affine function of one image, without a dimension of images."""
    return "input" in given and bool(given["input"].ndim == max(1, given["weight"].ndim - 1))


def as_batch(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """What an affine function makes of one image, by way of a batch of it."""
    if args:
        return func(args[0].unsqueeze(0), *args[1:], **kwargs).squeeze(0)
    return func(**kwargs | {"input": kwargs["input"].unsqueeze(0)}).squeeze(0)


def dropout_of(name: str, args: tuple, kwargs: dict) -> tuple[float, bool]:
    """Probability of a call of a dropout function, 0 where it is another function, and whether it is active."""
    if name == "scaled_dot_product_attention":
        probability = (dict(zip(("q", "k", "v", "mask", "dropout_p"), args, strict=False)) | kwargs).get(
            "dropout_p", 0.0
        )
        return probability, True
    if "dropout" not in name:
        return 0.0, False
    given = dict(zip(("input", "p", "train"), args, strict=False)) | kwargs
    return given.get("p", 0.5), bool(given.get("training", given.get("train", True)))


def _operands(args: tuple) -> tuple:
    return tuple(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]


@cache
def _linear_einsum(equation: Any) -> tuple[int, bool] | None:
    """Where an equation is a linear map of the last dimension of x by a matrix: which of two operands x is, and
    whether the outputs are the rows of the matrix."""
    if not isinstance(equation, str) or equation.count(",") != 1 or "->" not in equation:
        return None
    operands, result = equation.replace(" ", "").split("->")
    first, second = operands.split(",")
    for number, (x, matrix) in enumerate(((first, second), (second, first))):
        outputs = matrix.replace(x[-1:], "", 1)
        if len(matrix) == 2 and len(outputs) == 1 and outputs not in x and result == x[:-1] + outputs:
            return number, matrix[0] == outputs
    return None
