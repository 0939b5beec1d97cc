"""One pass of all images through a network, layer by layer: what the method and the baselines stand on."""

from collections.abc import Callable

import torch
from torch import Tensor

from initializers._graph import Batches, Graph, UngraphableError, Visit, record
from initializers._layers import NO_LAYER, Call, Layer, Layers, forward
from initializers._model import InitializationError, dropouts, other_dropout, without_memory

IMAGES_AT_A_TIME = 16  # from one affine layer to the next


def recorded(layers: Layers, inputs: tuple[Tensor, ...]) -> tuple[Graph | None, InitializationError | None]:
    """The graph of the model, or why it has none."""
    try:
        graph = record(layers, inputs)
    except UngraphableError as problem:
        return None, problem
    return graph, None


@torch.no_grad()
def sweep(layers: Layers, inputs: tuple[Tensor, ...], graph: Graph | None, visit: Visit) -> None:
    """All images through the network, stopping at the first use of each affine layer.

    `visit(call, entering, compute)` is called there. `entering()` gives the layer's inputs and `compute()` its outputs,
    a tensor for each batch. Before it computes, the visitor may change the layer; afterwards it may change the outputs
    in place, with which the pass goes on. Without a graph all images are one batch.

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
        if graph is None:
            forward(layers, inputs, first_use)
        else:
            graph.run(inputs, IMAGES_AT_A_TIME, note)
    if not seen:
        raise InitializationError(NO_LAYER)


def inactive_dropout(layers: Layers, graph: Graph | None) -> list[str]:
    """What drops at random in training and did not here: modules by name, functions by their probability."""
    unused = [
        name
        for name, module in dropouts(layers.model).items()
        if graph is not None and module.p > 0 and module not in graph.dropouts
    ]
    functions = [f"functional dropout, p = {p:g}" for p in sorted(layers.functional_dropout)]
    return [*unused, *other_dropout(layers.model), *functions]
