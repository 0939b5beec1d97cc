"""Weight normalisation (Salimans & Kingma, 2016): a layer computes with W = g v / |v|, with one g for each row of v.

Inside `unnormalised` v is the weight itself, like that of any other layer, and g waits; it is set at the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

FUNCTION = "_weight_norm"  # of torch, which computes W of v and g


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
    """Inside, each v is W; afterwards each g is the size of its v, and W what v was. What nobody changed stays."""
    norms = weight_norms(model)
    before = [norm.v.detach().clone() for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.v.copy_(torch._weight_norm(norm.v, norm.g, norm.dim))
    weights = [norm.v.detach().clone() for norm in norms]
    yield
    with torch.no_grad():
        for norm, v, weight in zip(norms, before, weights, strict=True):
            if torch.equal(norm.v, weight):
                norm.v.copy_(v)
            else:
                norm.g.copy_(torch.norm_except_dim(norm.v, 2, norm.dim))


def computed(norms: dict[int, WeightNorm], func, args: tuple) -> Tensor | None:
    """What a call of a function gives inside `unnormalised`: a view of v where that computes a weight of v and g."""
    if func.__name__ != FUNCTION or id(args[0]) not in norms:
        return None
    v = args[0]
    return v.view_as(v)
