"""The function that a model computes, to see that a step keeps it."""

import torch
from torch import Tensor

from initializers._layers import Layers, forward
from initializers._memory import without_memory
from initializers._model import InitializationError, seed_all, without_dropout
from initializers._squares import norm

IMAGES = 32  # on which the function must not change
IMAGES_AT_A_TIME = 16
EXACT = 1e-4  # relative change of the output up to which it counts as the same


class Function:
    """What a model returns in evaluation mode for some images, as it was when this was made.

    Args:
        inputs: of which a few are taken, evenly spread.
    """

    def __init__(self, layers: Layers, inputs: tuple[Tensor, ...]) -> None:
        self.layers = layers.anew()  # which notes no dropout that is off here
        self.inputs = some(inputs, IMAGES)
        self.outputs, self.others = self._compute([])

    @property
    def tolerance(self) -> float:
        """Relative change that may be rounding."""
        return max(EXACT, 16 * torch.finfo(self.outputs.dtype).eps)

    def change(self, factors: list[float]) -> float:
        """How much the outputs have changed since, in norm relative to what they were; or what else is returned.

        Args:
            factors: by which the outputs are meant to have changed; empty where they are meant to stay.
        """
        pairs = zip(self._compute(factors), (self.outputs, self.others), strict=True)
        sizes = [(norm(after - before).item(), norm(before).item()) for after, before in pairs]
        tiny = torch.finfo(torch.float64).tiny  # a last layer that starts at 0 gives 0
        return max(change / max(size, tiny) for change, size in sizes)

    def check(self, change: float) -> None:
        """Raises InitializationError: the change is more than rounding."""
        if not change < self.tolerance:
            raise InitializationError(
                f"the between-layer step changed the output by {change:.1e}, as a part of the model cannot "
                "be seen or is too sensitive to rounding; pass between=False"
            )

    @torch.no_grad()
    def _compute(self, factors: list[float]) -> tuple[Tensor, Tensor]:
        """All outputs, each divided by its factor, as one vector, and all else that is returned, such as a loss."""
        seed_all(0)  # for models that draw random numbers even in evaluation mode
        parts: list[Tensor] = []
        others: list[Tensor] = []
        with without_dropout(self.layers.model):
            for batch in zip(*(x.split(IMAGES_AT_A_TIME) for x in self.inputs), strict=True):
                with without_memory(self.layers.model):
                    outputs = forward(self.layers, batch, lambda call, x, compute: compute(), others)
                each = zip(outputs, factors or [1.0] * len(outputs), strict=True)
                parts += [output.flatten() / factor for output, factor in each]
        rest = [other.flatten().to(parts[0]).nan_to_num(0.0, 0.0, 0.0) for other in others]
        return torch.cat(parts), torch.cat([parts[0].new_zeros(0), *rest])


def some(inputs: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
    """That many of the images, evenly spread."""
    count = len(inputs[0])
    chosen = torch.linspace(0, count - 1, min(count, number), dtype=torch.float32).round().long()
    return tuple(x[chosen.to(x.device)] for x in inputs)
