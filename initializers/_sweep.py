"""One pass of all images through a network, layer by layer: what the method and the baselines stand on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from initializers._graph import IMAGES_AT_A_TIME, Batches, Graph, Visit
from initializers._layer import Call, Layer
from initializers._layers import Layers, forward
from initializers._memory import without_memory
from initializers._model import (
    InitializationError,
    dropouts,
    forked_random,
    noting_random,
    other_dropout,
    without_dropout,
)
from initializers._record import UngraphableError, record, record_once
from initializers._report import Report

Result = TypeVar("Result")


@dataclass
class Recorded:
    """What is known of a model's graph.

    Attributes:
        graph: None where what the model does depends on the number of images, or on values.
        scales: the graph, or that of one batch where what the model does depends on the number of images; None where it
            depends on values.
        problem: why `scales` is None.
    """

    graph: Graph | None
    scales: Graph | None
    problem: UngraphableError | None

    @property
    def seen(self) -> Graph | None:
        """What one pass did, whether scales follow from it or not."""
        return self.problem.graph if self.problem is not None else self.scales

    @property
    def tied(self) -> dict[str, str]:
        """See `Graph.tied`."""
        return {} if self.seen is None else self.seen.tied

    def batch(self, images: int) -> int:
        """How many of so many images go through the network at a time."""
        return images if self.graph is None or self.graph.interact else IMAGES_AT_A_TIME

    def other_use(self, parameter: Tensor) -> str | None:
        """See `Graph.other_use`."""
        return None if self.seen is None else self.seen.other_use(parameter)


def recorded(layers: Layers, inputs: tuple[Tensor, ...]) -> Recorded:
    """Record the graph of the model."""
    graph = scales = reason = None
    try:
        with noting_random(layers.random):
            graph = scales = record(layers, inputs)
    except UngraphableError:
        try:
            count = len(inputs[0])
            scales = record_once(layers, inputs, min(IMAGES_AT_A_TIME, count))
            if count > IMAGES_AT_A_TIME:
                reached = {layer for layer, (_, rows) in _running(layers, inputs).items() if any(rows)}
                if not reached <= scales.reached:  # some images go to other experts than these
                    scales = record_once(layers, inputs, count)
        except UngraphableError as problem:
            reason = problem
    return Recorded(graph, scales, reason)


@torch.no_grad()
def sweep(layers: Layers, inputs: tuple[Tensor, ...], known: Recorded, visit: Visit) -> None:
    """All images through the network, stopping at the first use of each affine layer.

    `visit(call, entering, compute)` is called there. `entering()` gives the layer's inputs and `compute()` its outputs,
    a tensor for each batch. Before it computes, the visitor may change the layer; afterwards it may change the outputs
    in place, with which the pass goes on. Without a graph, and where images interact, all images are one batch. A layer
    that sees only some of the images at a time, without a graph, is visited with all of its uses, by passes of its own.

    Raises:
        InitializationError: there is no affine layer.
    """
    seen: set[Layer] = set()

    def first_use(call: Call, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        if call.layer in seen:
            return compute()
        seen.add(call.layer)
        outputs: list[Tensor] = []

        def compute_batch() -> list[Tensor]:
            outputs.append(compute())
            return outputs

        visit(call, lambda: [x], compute_batch)
        return outputs[0]

    def note(call: Call, entering: Batches, compute: Batches) -> None:
        seen.add(call.layer)
        visit(call, entering, compute)

    with without_memory(layers.model):
        if known.graph is not None:
            known.graph.run(inputs, known.batch(len(inputs[0])), note)
        elif in_parts := _in_parts(layers, inputs):
            for call in in_parts:
                note(call, partial(_uses, layers, inputs, call.layer, 0), partial(_uses, layers, inputs, call.layer, 1))
        else:
            forward(layers, inputs, first_use)
    if not seen:
        raise InitializationError(layers.no_layer)


def _in_parts(layers: Layers, inputs: tuple[Tensor, ...]) -> list[Call]:
    """A use of each layer, in order, where one sees only some of the images at a time; else none."""
    uses = _running(layers, inputs).values()
    in_parts = any(len(rows) > 1 and rows[0] < len(inputs[0]) for _, rows in uses)
    return [call for call, _ in uses] if in_parts else []


@torch.no_grad()
def _running(layers: Layers, inputs: tuple[Tensor, ...]) -> dict[Layer, tuple[Call, list[int]]]:
    """The layers that run for these images, in order, with the first use of each and the rows of all uses."""
    uses: dict[Layer, tuple[Call, list[int]]] = {}

    def count(call: Call, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        uses.setdefault(call.layer, (call, []))[1].append(len(x))
        return compute()

    with without_memory(layers.model):
        forward(layers, inputs, count)
    return uses


def _uses(layers: Layers, inputs: tuple[Tensor, ...], layer: Layer, which: int) -> list[Tensor]:
    """Inputs (0) or outputs (1) of a layer: of all of its uses where one sees some of the images, else of its first."""
    found: list[Tensor] = []

    def keep(call: Call, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        output = compute()
        if call.layer is layer and (not found or len(found[0]) < len(inputs[0])):
            found.append((x, output)[which].clone())
        return output

    with without_memory(layers.model):
        forward(layers, inputs, keep)
    return found


def with_masks(layers: Layers, inputs: tuple[Tensor, ...], report: Report, set_weights: Callable[[], Result]) -> Result:
    """Set the weights; once more where the model's forward pass sets some of them to 0, as masked convolutions do.

    New weights are computed with as they are until that happens. What is 0 then is known as the `mask` of a layer.

    Returns:
        What `set_weights` returns.
    """
    result = set_weights()
    if _find_masks(layers, inputs):
        report.layers.clear()
        result = set_weights()
    return result


@torch.no_grad()
def _find_masks(layers: Layers, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a forward pass of the model sets weights to 0; the layers get their masks.

    Raises:
        InitializationError: it changes weights in another way.
    """

    def run() -> None:
        with forked_random(inputs[0].device), without_dropout(layers.model), without_memory(layers.model):
            few = tuple(x[:2] for x in inputs)
            forward(layers.anew(), few, lambda call, x, compute: compute())

    def sizes() -> dict[str, Tensor]:
        """The norm of each row of the weights of each layer."""
        weights = {name: layer.weight.detach().flatten(1) for name, layer in layers.found.items()}
        precise = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in weights.items()}
        return {name: torch.linalg.vector_norm(w, dim=1, dtype=precise[name]) for name, w in weights.items()}

    def ones_of(sign: int) -> list[Tensor]:
        """What is left of weights that are 1 or -1."""
        for layer in changed:
            layer.weight.fill_(sign)
        run()
        return [layer.weight * sign for layer in changed]

    before = sizes()
    run()
    changed = [layers.found[name] for name, size in sizes().items() if not torch.equal(size, before[name])]
    weights = [layer.weight.clone() for layer in changed]
    if changed:
        for layer, mask, other in zip(changed, ones_of(1), ones_of(-1), strict=True):
            layer.mask, layer.sets_to_zero = mask, True
            if not (((mask == 0) | (mask == 1)).all() and torch.equal(mask, other)):
                raise InitializationError(
                    f"layer {layer.name}: the forward pass of the model changes its weights (a maximal norm, or a "
                    "limit of their values?), so that they cannot be set; leave that out while it is initialized"
                )
    for layer, weight in zip(changed, weights, strict=True):
        layer.weight.copy_(weight)
    return bool(changed)


def inactive_dropout(layers: Layers, graph: Graph | None) -> list[str]:
    """What drops at random in training and did not here: modules by name, functions by their probability."""
    unused = [
        name
        for name, module in dropouts(layers.model).items()
        if graph is not None and module.p > 0 and module not in graph.dropouts
    ]
    functions = [f"functional dropout, p = {p:g}" for p in sorted(layers.functional_dropout)]
    return [*unused, *other_dropout(layers.model), *functions]
