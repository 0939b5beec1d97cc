"""Weight normalisation (Salimans & Kingma, 2016): a layer computes with W = g v / |v|, with one g for each row of v.

Inside `unnormalised` it is W = c v, with one constant c in place of g: a weight that the layer multiplies by a
constant, like that of an `AuxiliaryScaling`. At the end g is set such that W stays.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils import parametrize

FUNCTION = "_weight_norm"  # of torch, which computes W of v and g
ROUNDING = 1e-5  # relative: torch starts with g = |v|, where c is 1


@dataclass(frozen=True)
class WeightNorm:
    """A parameter that is computed of a direction v and its size g; `dim` is the dimension of the rows."""

    name: str
    v: nn.Parameter
    g: nn.Parameter
    dim: int


def weight_norms(model: nn.Module) -> list[WeightNorm]:
    """The trainable weight normalisations of a model: torch's old kind is a hook, the new a parametrization."""
    found = []
    for path, module in model.named_modules():
        parts: list[WeightNorm] = []
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ == "WeightNorm":
                v, g = (module.get_parameter(f"{hook.name}_{part}") for part in "vg")
                parts.append(WeightNorm(hook.name, v, g, hook.dim))
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():
                if len(chain) == 1 and type(chain[0]).__name__ == "_WeightNorm":
                    parts.append(WeightNorm(name, chain.original1, chain.original0, chain[0].dim))
        parts = [part for part in parts if part.v.requires_grad and part.g.requires_grad]
        found += [replace(part, name=f"{path}.{part.name}".removeprefix(".")) for part in parts]
    return found


@contextmanager
def unnormalised(model: nn.Module) -> Iterator[None]:
    """Inside, W is c v, c the size of W over that of v; afterwards g v / |v| again. What nobody changed stays."""
    norms = weight_norms(model)
    with torch.no_grad():
        before = [(norm.v.clone(), norm.g.clone()) for norm in norms]
        for norm in norms:
            _multiply(norm)
        inside = [(norm.v.clone(), norm.g.clone()) for norm in norms]
    yield
    with torch.no_grad():
        for norm, (v, g), then in zip(norms, before, inside, strict=True):
            if torch.equal(norm.v, then[0]) and torch.equal(norm.g, then[1]):
                norm.v.copy_(v)
                norm.g.copy_(g)
            else:
                norm.g.mul_(torch.norm_except_dim(norm.v, 2, norm.dim))


def _multiply(norm: WeightNorm) -> None:
    """Make it W = c v, and all of g that c."""
    weight = torch._weight_norm(norm.v, norm.g, norm.dim)
    ratio = (weight.norm() / norm.v.norm()).item()
    if not math.isfinite(ratio) or ratio == 0 or math.isclose(ratio, 1, rel_tol=ROUNDING):
        ratio = 1.0
    norm.g.fill_(ratio)
    norm.v.copy_(weight / norm.g)


def multiplied(norms: dict[int, WeightNorm], func: Callable, args: tuple) -> tuple[Callable, tuple]:
    """A function and its arguments; where that computes a weight of v and g, what it is inside `unnormalised`."""
    norm = norms.get(id(args[0])) if func.__name__ == FUNCTION else None
    return (func, args) if norm is None else (torch.mul, (norm.v, norm.g))
