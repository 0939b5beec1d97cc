"""Several processes, one for each GPU, started by torchrun. Where there is one process, nothing here does anything."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)  # the others wait while one decodes all images into a cache, or initializes


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Be one of the processes that torchrun started (NCCL on GPUs, gloo on CPUs); only the first prints.

    A process that fails ends without a word to the others, which torchrun then stops.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum over all processes, element by element."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in every process; the others do not call it."""
    found = [make() if rank() == 0 else None]
    if size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def gather(value: T) -> list[T]:
    """The values of all processes."""
    found = [value] * size()
    if size() > 1:
        dist.all_gather_object(found, value)
    return found
