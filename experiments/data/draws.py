"""Random draws that depend on what they are asked for, and on nothing before."""

import numpy as np
import torch
from torch import Tensor


def seeded(*numbers: int) -> torch.Generator:
    """A generator of random numbers that depends on all the numbers."""
    # Mixed into 32 bits, which is all that torch's generator looks at.
    return torch.Generator().manual_seed(np.random.SeedSequence(numbers).generate_state(1).item())


def at_random(count: int, among: Tensor, generator: torch.Generator, setting: str) -> Tensor:
    """`count` of the images `among`, int64 (N,), in random order.

    Raises:
        ValueError: there are fewer; names `setting`, which says how many.
    """
    if count > len(among):
        raise ValueError(f"{setting}={count}, but there are only {len(among)} images to choose from: lower it")
    return among[torch.randperm(len(among), generator=generator)[:count]]
