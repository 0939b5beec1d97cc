"""The function that a model computes, to see that a step keeps it."""

import torch
from torch import Tensor

from initializers._layers import Layers, forward
from initializers._model import InitializationError, without_dropout, without_memory

IMAGES = 32  # on which the function must not change
IMAGES_AT_A_TIME = 16
EXACT = 1e-4  # relative change of the output up to which it counts as the same


class Function:
    """The outputs of a model in evaluation mode on some images, as they were when this was made.

    Args:
        inputs: of which a few are taken, evenly spread.
    """

    def __init__(self, layers: Layers, inputs: tuple[Tensor, ...]) -> None:
        self.layers = Layers(layers.model, layers.names, layers.trainable)  # which notes no dropout that is off here
        self.inputs = some(inputs, IMAGES)
        self.outputs = self._compute([])

    @property
    def tolerance(self) -> float:
        """Relative change that may be rounding."""
        return max(EXACT, 16 * torch.finfo(self.outputs.dtype).eps)

    def change(self, factors: list[float]) -> float:
        """How much the outputs have changed since, in norm relative to what they were.

        Args:
            factors: by which the outputs are meant to have changed; empty where they are meant to stay.
        """
        change, size = (self._compute(factors) - self.outputs).norm().item(), self.outputs.norm().item()
        return change / max(size, torch.finfo(torch.float64).tiny)  # a last layer that starts at 0 gives 0

    def check(self, change: float) -> None:
        """Raises InitializationError: the change is more than rounding."""
        if not change < self.tolerance:
            raise InitializationError(
                f"the between-layer step changed the output by {change:.1e}, as a part of the model cannot "
                "be seen or is too sensitive to rounding; pass between=False"
            )

    @torch.no_grad()
    def _compute(self, factors: list[float]) -> Tensor:
        """All outputs, each divided by its factor, as one vector."""
        torch.manual_seed(0)  # for models that draw random numbers even in evaluation mode
        parts: list[Tensor] = []
        with without_dropout(self.layers.model):
            for batch in zip(*(x.split(IMAGES_AT_A_TIME) for x in self.inputs), strict=True):
                with without_memory(self.layers.model):
                    outputs = forward(self.layers, batch, lambda call, x, compute: compute())
                each = zip(outputs, factors or [1.0] * len(outputs), strict=True)
                parts += [output.flatten() / factor for output, factor in each]
        return torch.cat(parts)


def some(inputs: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
    """That many of the images, evenly spread."""
    count = len(inputs[0])
    chosen = torch.linspace(0, count - 1, min(count, number), dtype=torch.float32).round().long()
    return tuple(x[chosen.to(x.device)] for x in inputs)
