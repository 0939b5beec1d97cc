"""The paper's auxiliary scaling (section 3.2): a constant factor between the weights stored and those that compute.

It equalises the change rates whatever the network: storing r times the weights of layer k, and dividing by r where they
are used, keeps the function and divides C_k by r², so that r_k = (C_k / C)^(1/2) for the geometric mean C.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from initializers._function import Function, some
from initializers._layer import Layer
from initializers._layers import Layers
from initializers._memory import snapshot
from initializers._model import InitializationError
from initializers._rates import RATE_DRAWS, usable_rates
from initializers._report import Report
from initializers._scaled import AuxiliaryScaling


def insert_auxiliary(layers: Layers, inputs: tuple[Tensor, ...], rate_images: int, seed: int, report: Report) -> Layers:
    """Equal rates by auxiliary scalings; the factors are rounded to powers of two where the function would change.

    Returns:
        The layers, whose parameters are others now.
    """
    function, images = Function(layers, inputs), some(inputs, rate_images)
    first = usable_rates(layers, images, seed, draws=RATE_DRAWS)
    problems = {name: layers.unscalable(layer) for name, layer in first.layers.items()}
    scaled = {name: layer for name, layer in first.layers.items() if not problems[name]}
    logs = {name: math.log(rate) for name, rate in first.rates.mean.items() if name in scaled}
    if not logs:
        problem = "; ".join({*problems.values()} - {""})
        raise InitializationError(f'nonhomogeneous="scale" finds nothing to scale: {problem}')
    centre = sum(logs.values()) / len(logs)
    exponents: dict[str, float] = {name: (rate - centre) / 2 / math.log(2) for name, rate in logs.items()}
    restore, rows = snapshot(layers.model), _layers_of_rows(layers, scaled)
    added: list[tuple[nn.Module, str]] = []

    def insert(exponents: dict[str, float]) -> float:
        factors = {name: 2.0**exponent for name, exponent in exponents.items()}
        for owner, names in rows.items():
            each = [factors.get(name, 1.0) for name in names]
            added.extend(_insert(layers, owner, torch.tensor(each, dtype=torch.float64)))
        return function.change([])

    def remove() -> None:
        for module, name in added:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        added.clear()

    try:
        change = insert(exponents)
        if not change < function.tolerance:  # the network amplifies the rounding of its weights
            remove()
            restore()
            report.powers_of_two = True
            exponents = {name: round(exponent) for name, exponent in exponents.items()}
            change = insert(exponents)
        function.check(change)
        after = layers.anew()
        after.random |= layers.random
        last = usable_rates(after, images, seed, draws=RATE_DRAWS)
    except BaseException:
        remove()
        raise
    report.rounds, report.output_change, report.scaled = 1, change, True
    report.add_rates(first, last, {name: 2.0**exponent for name, exponent in exponents.items()})
    for row in report.layers:
        if problems.get(row.name):
            row.add_note(f"not scaled, as {problems[row.name]}")
    return after


def _layers_of_rows(layers: Layers, scaled: dict[str, Layer]) -> dict[str, list[str]]:
    """The layer of each row of each parameter; several layers may be rows of one."""
    rows: dict[str, list[str]] = {}
    for name, layer in scaled.items():
        for part in (layer.weight, layer.bias):
            whole = None if part is None else layers.owner(part)
            if part is None or whole is None:
                continue
            names = rows.setdefault(whole, [name] * len(layers.model.get_parameter(whole)))
            found = layers.rows(part)
            if found is not None and found[1] is not None:
                names[found[1]] = [name] * len(names[found[1]])
    return rows


@torch.no_grad()
def _insert(layers: Layers, parameter: str, factor: Tensor) -> list[tuple[nn.Module, str]]:
    """Store `factor` (rows,) times a parameter and divide by it where the layer computes; what is parametrized anew."""
    path, _, name = parameter.rpartition(".")
    module, tensor = layers.model.get_submodule(path), layers.model.get_parameter(parameter)
    factor = factor.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
    norm, scalings = layers.weight_norms.get(id(tensor)), layers.parametrizations(parameter)
    if norm is None and not scalings:
        parametrize.register_parametrization(module, name, AuxiliaryScaling(1 / factor))
        return [(module, name)]
    tensor.mul_(factor)
    if norm is not None:  # which has a constant of its own, see `unnormalised`
        norm.g.div_(factor.flatten()[0])
    else:  # of an earlier call
        scalings[0].get_buffer("factor").div_(factor)
    return []
