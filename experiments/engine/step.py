"""One step of training: the gradients of some batches, clipped, and an update; on a GPU as a CUDA graph if wanted.

A CUDA graph is a recording of all that a GPU does in a step. Replaying it is one call, where the step itself is some
hundred, each of which costs more time than a small layer takes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.engine import distributed

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
WARM = 3  # steps before one is recorded, in which libraries set up what they keep
UNLIKE = 100  # steps of which none is like the one before it, after which that is said


class Step:
    """The mean gradient of some batches, of a norm of at most `clip_norm`, and a step of the optimizer.

    Processes exchange their gradients once, with those of the last batch. Nothing here waits for a GPU.

    Args:
        network: the model, or the model in `DistributedDataParallel`.
        loss, clip_norm, precision: as in `trainer.train`.

    Attributes:
        total: the sum of the losses of all steps, until someone sets it to 0.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None,
        precision: str,
    ):
        self.network, self.loss, self.optimizer, self.clip_norm = network, loss, optimizer, clip_norm
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        kind = PRECISIONS[precision]
        self.autocast = torch.autocast(self.device.type, kind, enabled=kind is not None)
        self.total = torch.zeros((), device=self.device)

    def __call__(self, batches: Sequence[tuple]) -> None:
        """Take a step; each batch is a pair of inputs and targets."""
        self.optimizer.zero_grad()
        for number, (inputs, targets) in enumerate(batches, 1):
            last = not isinstance(self.network, DistributedDataParallel) or number == len(batches)
            with contextlib.nullcontext() if last else self.network.no_sync():
                with self.autocast:
                    output = self.network(*inputs) if isinstance(inputs, tuple) else self.network(inputs)
                    value = self.loss(output, targets)
                value, shown = value if isinstance(value, tuple) else (value, value)
                (value / len(batches)).backward()
            self.total += shown.detach() / len(batches)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()


class RecordedStep:
    """A `Step` that is recorded as a CUDA graph, and replayed for every step that is like it.

    Two steps are alike if their batches have the same shapes and the optimizer the same learning rates. One that is
    like the step before it, after some to warm up, is recorded; steps that are not alike are taken one operation at a
    time, and all of them where a recording fails, as a line on stderr says. Replayed steps give the same weights, and
    draw the same random numbers.
    """

    def __init__(self, step: Step):
        self.step = step
        for group in step.optimizer.param_groups:
            if "capturable" in group:  # of Adam and RMSProp: the number of the step is on the GPU, too
                group["capturable"] = True
        for state in step.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].to(step.device)
        self.possible = True
        self.kind: tuple | None = None  # of the recording
        self.before: tuple | None = None  # the kind of the step before
        self.inputs: list[tuple] = []  # that the recording reads
        self.replay: Callable[[], None] | None = None
        self.taken = self.unlike = 0

    def __call__(self, batches: Sequence[tuple]) -> None:
        """Take a step, as `Step` does."""
        rates = tuple(group["lr"] for group in self.step.optimizer.param_groups)
        kind = (rates, tuple((part.shape, part.dtype) for part in tensors(batches)))
        alike, self.before = kind == self.before, kind
        if self.possible and kind != self.kind and alike and self.taken >= WARM:
            self._record(batches, kind)
        if kind == self.kind:
            for kept, new in zip(tensors(self.inputs), tensors(batches), strict=True):
                kept.copy_(new)
            self.replay()
        else:
            with beside():
                self.step(batches)
        self.taken += 1
        self._count(alike)

    def _record(self, batches: Sequence[tuple], kind: tuple) -> None:
        self.kind = self.replay = None  # frees the memory of the recording before
        self.inputs = copies(batches)
        try:
            self.replay = record(lambda: self.step(self.inputs))
            self.kind = kind
        except RuntimeError as error:  # an operation that waits for the GPU, or too little memory
            self.possible = False
            say(f"it cannot be recorded: {str(error).splitlines()[0]}")

    def _count(self, alike: bool) -> None:
        self.unlike = 0 if alike else self.unlike + 1
        if self.possible and self.unlike == UNLIKE:
            say(f"of the last {UNLIKE} none had the shapes and the learning rate of the one before it")


def make_step(step: Step, graph: bool) -> Step | RecordedStep:
    """The step, to be recorded where `graph` is true; where that is not possible, a line on stderr says why."""
    if graph and step.device.type != "cuda":
        say(f"they run on {step.device.type}, and graphs are of a CUDA device")
    elif graph and distributed.size() > 1:
        say("several processes exchange their gradients in between")
    elif graph:
        return RecordedStep(step)
    return step


def say(why: str) -> None:
    print(f"train.graph=true: steps are taken one operation at a time, as {why}", file=sys.stderr)


def record(work: Callable[[], None]) -> Callable[[], None]:
    """What `work` does on the GPU, recorded and not done; the function that does it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may copy batches meanwhile
        work()
    return graph.replay


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """On a stream of its own, as what precedes a recording should be, with the current one before and behind it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def tensors(batches) -> Iterator[Tensor]:
    """All tensors in nested tuples and lists, in order."""
    if isinstance(batches, Tensor):
        yield batches
    else:
        for part in batches:
            yield from tensors(part)


def copies(batches):
    """Nested tuples and lists with a copy of each tensor."""
    return batches.clone() if isinstance(batches, Tensor) else type(batches)(map(copies, batches))
