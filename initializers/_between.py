"""Algorithm 2: the between-layer step, after which all layers learn at one rate and the function is the same.

With C_k the change rate of layer k (equation 3) and C the geometric mean of all of them,

    r_k = (C_k / C)^(alpha / 2)        W_k <- r_k W_k        b_k <- r_k b_k        undo r_k in the layer above

is repeated ten times (section 3.2). Where scales may travel is found in `_propagate`; which ones make the rates equal
in one step, without damping, in `_scales`.
"""

import torch
from torch import Tensor

from initializers._function import Function, some
from initializers._layers import Layers
from initializers._lrn import MeasuredLRN
from initializers._memory import snapshot
from initializers._model import InitializationError
from initializers._rates import RATE_DRAWS, Measurement, usable_rates
from initializers._report import Report
from initializers._scales import Scales

PAPER_STEPS = 10  # "roughly 10 iterations", Algorithm 2
MAX_STEPS = 10  # of the undamped step, where LRN makes it inexact
SETTLED = 1.05  # spread at which these end; less than the spread between two samples of images


def equalise_between(
    layers: Layers,
    inputs: tuple[Tensor, ...],
    scales: Scales,
    report: Report,
    *,
    damping: float | None,
    rate_images: int,
    seed: int,
) -> None:
    """Algorithm 2 on the scales of a graph.

    Args:
        damping: the paper's alpha, for ten damped steps; None solves it in one, repeated while LRN makes it inexact.
        rate_images, seed: as in `initialize`.

    Raises:
        InitializationError: rates that cannot be equalised, or a function that does not stay.
    """
    function, images, lrn = Function(layers, inputs), some(inputs, rate_images), MeasuredLRN(scales)
    exact = not scales.through_lrn
    restore = snapshot(layers.model) if exact else None

    def rates() -> Measurement:
        draws = RATE_DRAWS if exact else 1
        found = usable_rates(layers, images, seed, draws=draws, apart=bool(scales.outputs), before=lrn.undo)
        for name, layer in found.layers.items():
            if layer not in lrn.uses:
                raise InitializationError(
                    f"layer {name} runs only now and then (for some images, or with gradients), so that the "
                    'between-layer step cannot follow it; pass between=False or nonhomogeneous="scale"'
                )
        return found

    first = last = rates()
    total = torch.zeros(1 + scales.variables, dtype=torch.float64)  # log-scales
    steps = PAPER_STEPS if damping is not None else 1 if exact else MAX_STEPS
    for _ in range(steps):
        u = scales.equalising(last) * (1 if damping is None else damping)
        scales.apply(u)
        lrn.intend(u)
        total += u
        report.rounds += 1
        if report.rounds < steps or not exact:
            before, last = last.rates.spread, rates()
            if damping is None and (last.rates.spread < SETTLED or last.rates.spread > 0.99 * before):
                break

    change = function.change(scales.of_outputs(total))
    if restore is not None:
        if not change < function.tolerance:
            # The network amplifies the rounding of its weights: powers of two leave every bit of a product as it is.
            restore()
            report.powers_of_two = True
            total = scales.powers_of_two(first, total)
            scales.apply(total)
            change = function.change(scales.of_outputs(total))
        function.check(change)
        last = rates()
    report.output_change, report.output_scales = change, scales.of_outputs(total)
    report.lrn = "estimate" if scales.through_lrn else "exact" if scales.lrns else None
    report.held_by = sorted(scales.pinned_by)
    report.outputs_kept = scales.outputs_kept
    report.add_rates(first, last, scales.factors(total, lrn.log_factors))
