"""The trainer: batches of random crops, a loop that can be killed at any moment, and test outputs.

batches = CropBatches(cache, labels, batch_size=10, seed=0, mean=(104, 117, 123), size=227)
train(model, loss, batches, optimizer, iterations=80_000, lr_at=lr_at, clip_norm=10, folder=folder)
scores = predict(model, test_cache, crops=10, seed=0, mean=(104, 117, 123), size=227)
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from experiments import files
from experiments.data.draws import seeded
from experiments.data.images import Crops, ImageCache, crop, random_crops
from experiments.engine import distributed, run
from experiments.engine.optim import lr_policy, make_optimizer, set_lr
from experiments.engine.step import PRECISIONS, Step, make_step
from experiments.progress import pace

CURVE_HEADER = "step,loss,lr,seconds"
VALIDATION_HEADER = "step,loss,top1,top5"
CUT_AT_ONCE = 16  # batches whose crops a GPU cuts together: a third of a small step is starting kernels


class CropBatches:
    """Endless batches of random crops: `batches(step)` depends on the arguments here and on `step` alone.

    So there is no state to save, and a resumed run just asks for the step it has come to. Each epoch has an
    order and crops of its own; images that do not fill a last batch sit out that epoch.

    Args:
        cache: the images, on the device that trains.
        targets: one row for each image, moved there.
        batch_size: images a batch.
        seed: of orders and crops.
        mean: as in `crop`.
        size, options: as in `random_crops`.

    Raises:
        ValueError: fewer images than one batch.
    """

    def __init__(
        self,
        cache: ImageCache,
        targets: Tensor,
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        size: int,
        **options,
    ):
        if len(cache) < batch_size:
            raise ValueError(f"{len(cache)} images do not fill a batch of {batch_size}: lower train.batch_size")
        self.cache, self.targets = cache, targets.to(cache.pixels.device)
        self.batch_size, self.seed, self.mean, self.size, self.options = batch_size, seed, mean, size, options
        self.at_once = CUT_AT_ONCE if cache.pixels.is_cuda else 1
        self.epoch = self.block = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (batch_size, 3, size, size) and targets (batch_size, ...) of iteration `step`, from 0."""
        epoch, batch = divmod(step, len(self.cache) // self.batch_size)
        block, position = divmod(batch, self.at_once)
        if epoch != self.epoch:
            self._start(epoch)
        if block != self.block:
            self._cut(block)
        part = slice(position * self.batch_size, (position + 1) * self.batch_size)
        return self.inputs[part], self.cut_targets[part]

    def _cut(self, block: int) -> None:
        """Inputs and targets of `at_once` batches."""
        images = self.at_once * self.batch_size
        part = slice(block * images, (block + 1) * images)
        index = self.order[part]
        self.inputs = crop(self.cache, index, _take(self.crops, part), self.size, self.mean)
        self.block, self.cut_targets = block, self.targets[index]

    def _start(self, epoch: int) -> None:
        generator = seeded(self.seed, epoch)
        order = torch.randperm(len(self.cache), generator=generator)
        crops = _draw(self.cache, order, self.size, generator, self.options)
        device = self.cache.pixels.device
        self.epoch, self.block, self.order, self.crops = epoch, -1, order.to(device), crops.to(device)


def train_as(
    cfg: DictConfig, model: nn.Module, loss: Callable, batches: Callable[[int], tuple], folder: Path, **options
) -> float:
    """`train` with the optimizer and the settings of a configuration, its `optimizer` and its `train`."""
    return train(
        model,
        loss,
        batches,
        make_optimizer(model, cfg.optimizer),
        iterations=cfg.train.iterations,
        lr_at=lr_policy(cfg.optimizer.lr, cfg.train),
        clip_norm=cfg.train.clip_norm,
        folder=folder,
        log_every=cfg.train.log_every,
        checkpoint_seconds=cfg.train.checkpoint_seconds,
        settings=run.settings_of(cfg),
        graph=cfg.train.graph,
        tensorboard=cfg.tensorboard,
        **options,
    )


def train(
    model: nn.Module,
    loss: Callable,
    batches: Callable[[int], tuple],
    optimizer: torch.optim.Optimizer,
    *,
    iterations: int,
    lr_at: Callable[[int], float],
    clip_norm: float | None,
    folder: Path,
    log_every: int = 100,
    checkpoint_seconds: float = 60,
    accumulate: int = 1,
    precision: str = "float32",
    graph: bool = False,
    validate: Callable[[], tuple[float, float, float]] | None = None,
    validate_every: int = 0,
    settings: Mapping = MappingProxyType({}),
    tensorboard: bool = False,
) -> float:
    """Train `model` in place, from the newest checkpoint in `folder` on when there is one.

    Writes a row of `curve.csv` every `log_every` iterations (mean loss since the row before, learning rate,
    seconds of training), and a checkpoint at the start, at the end and, after a row, every
    `checkpoint_seconds`. A run that was killed, and goes on, ends with the same weights bit for bit as one
    that was not, on the same device and with as many threads and processes.

    Of several processes (see `distributed`) each has its share of every batch. They start from the weights of the
    first, which writes all files, and take the same steps with the mean of their gradients.

    Args:
        model: on its device.
        loss: (output, targets) -> scalar, or a pair of it and another scalar, which the curve shows.
        batches: iteration, from 0, -> (inputs, targets), and the same for the same iteration. A tuple of inputs are
            several arguments of the model.
        optimizer: from `make_optimizer`.
        lr_at: iteration -> learning rate, before the groups' multipliers.
        folder: of the run; it exists.
        clip_norm: gradients of a larger global L2 norm are scaled down to it, before weight decay (Caffe); None: never.
        accumulate: iteration i takes the mean gradient of so many batches, `batches(i * accumulate)` and those after.
        precision: "float32", or "bfloat16" for what torch.autocast computes in it.
        graph: take steps as CUDA graphs, see `RecordedStep`.
        validate: -> loss, top-1 and top-5 accuracy, a row of `validation.csv`; in evaluation mode.
        validate_every: iterations.
        settings: of the run; its checkpoints name them, and those of other settings are refused.
        tensorboard: write the rows of the curve into `folder` for TensorBoard too.

    Returns:
        Seconds of training, those before an interruption included.

    Raises:
        FloatingPointError: the loss or a weight is NaN or infinite. No checkpoint is written of that.
        ValueError: an unknown precision, less than one batch to accumulate, or a checkpoint of another run.
        OSError: the curve or a checkpoint cannot be written, or no checkpoint can be read.
    """
    if precision not in PRECISIONS or accumulate < 1:
        raise ValueError(
            f"train.precision={precision}, train.accumulate={accumulate}: choose float32 or bfloat16, and at least 1"
        )
    device = next(parameter.device for parameter in model.parameters() if parameter.requires_grad)
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # the layout oneDNN computes in: a third faster
    start, seconds = _restore(folder, model, optimizer, dict(settings))
    began = time.perf_counter() - seconds
    journal = _Journal(folder, model, optimizer, dict(settings), iterations, checkpoint_seconds, began)
    journal.open(start, tensorboard)
    if distributed.rank() == 0:
        _cut(folder / "curve.csv", CURVE_HEADER, math.ceil(start / log_every))
        if validate is not None:
            _cut(folder / "validation.csv", VALIDATION_HEADER, start // validate_every)
    network = model
    if distributed.size() > 1:
        network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    step = Step(network, loss, optimizer, clip_norm=clip_norm, precision=precision)
    take = make_step(step, graph)
    model.train()
    with _bar("train", iterations, "step", start) as bar:
        for done in range(start + 1, iterations + 1):
            lr = lr_at(done - 1)
            set_lr(optimizer, lr)
            take([batches(number) for number in range((done - 1) * accumulate, done * accumulate)])
            bar.update()

            if validate is not None and done % validate_every == 0:
                _validate(model, validate, folder, done)
            if done % log_every == 0 or done == iterations:
                mean = _mean(step.total, (done - 1) % log_every + 1, done, lr)
                journal.row(done, mean, lr)
                bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.2g}", refresh=False)
    return time.perf_counter() - journal.began


@dataclass
class _Journal:
    """Rows of `curve.csv`, and after them checkpoints, where the last one is long ago or the training at its end."""

    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: dict
    iterations: int
    checkpoint_seconds: float
    began: float  # of the clock, with the seconds before an interruption
    writer: Any = None  # of TensorBoard

    def __post_init__(self) -> None:
        self.saved = time.perf_counter()

    def open(self, start: int, tensorboard: bool) -> None:
        """With `tensorboard`, write rows for TensorBoard too: those after step `start` anew."""
        if tensorboard and distributed.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # of a package that may be missing

            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=start + 1)

    def row(self, done: int, mean: float, lr: float) -> None:
        """Raises FloatingPointError where a weight is NaN or infinite."""
        now = time.perf_counter()
        if distributed.rank() == 0:
            files.append_line(self.folder / "curve.csv", f"{done},{mean:.6g},{lr:.6g},{now - self.began:.1f}")
            if self.writer is not None:
                for name, value in (("loss", mean), ("lr", lr)):
                    self.writer.add_scalar(name, value, done)
                self.writer.flush()
        due = done == self.iterations or now - self.saved >= self.checkpoint_seconds
        if distributed.from_first(lambda: due):
            if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
                raise _diverged("a weight is NaN or infinite", done, lr)
            _save(self.folder, self.model, self.optimizer, self.settings, done, now - self.began)
            self.saved = time.perf_counter()


def _validate(model: nn.Module, validate: Callable[[], tuple[float, float, float]], folder: Path, done: int) -> None:
    """A row of `validation.csv`, in evaluation mode."""
    model.eval()
    row = validate()
    model.train()
    if distributed.rank() == 0:
        files.append_line(folder / "validation.csv", f"{done}," + ",".join(f"{number:.6g}" for number in row))


def _mean(total: Tensor, steps: int, done: int, lr: float) -> float:
    """The mean loss of so many steps, over all processes; `total`, their sum, becomes 0.

    Raises:
        FloatingPointError: it is NaN or infinite.
    """
    mean = distributed.total(total).item() / distributed.size() / steps
    total.zero_()
    if not math.isfinite(mean):
        raise _diverged(f"the mean loss is {mean}", done, lr)
    return mean


@torch.inference_mode()
def predict(
    model: nn.Module,
    cache: ImageCache,
    *,
    crops: int,
    seed: int,
    mean: Sequence[float],
    size: int,
    batch_size: int = 100,
    **options,
) -> Tensor:
    """Outputs of `model`, in evaluation mode, for each image: the mean over random crops as in training.

    Args:
        crops: so many of each image.
        seed: of the crops, the same on every device.
        mean: as in `crop`.
        batch_size: crops a forward pass.
        size, options: as in `random_crops`.

    Returns:
        Float tensor (N, outputs), on the CPU.
    """
    model.eval()
    index = torch.arange(len(cache)).repeat_interleave(crops)
    drawn = _draw(cache, index, size, torch.Generator().manual_seed(seed), options)
    outputs = []
    with _bar("evaluate", len(index), "crop") as bar:
        for first in range(0, len(index), batch_size):
            part = slice(first, first + batch_size)
            inputs = crop(cache, index[part], _take(drawn, part), size, mean)
            outputs.append(model(inputs).float())
            bar.update(len(inputs))
    return torch.cat(outputs).unflatten(0, (-1, crops)).mean(1).cpu()


def _draw(cache: ImageCache, index: Tensor, size: int, generator: torch.Generator, options: dict) -> Crops:
    return random_crops(cache.heights.cpu()[index], cache.widths.cpu()[index], size, generator, **options)


def _take(crops: Crops, part: slice) -> Crops:
    return Crops(*(getattr(crops, field.name)[part] for field in fields(crops)))


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict) -> tuple[int, float]:
    """Load the newest checkpoint, or write the first; return iterations done and seconds spent so far."""
    state = distributed.from_first(lambda: run.load_checkpoint(folder, settings))
    if state is None:
        _save(folder, model, optimizer, settings, 0, 0.0)
        return 0, 0.0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    random = state["random"][distributed.rank() % len(state["random"])]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return state["step"], state["seconds"]


def _save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict, step: int, seconds: float
) -> None:
    random = {"cpu": torch.get_rng_state()}  # dropout draws from the global generators
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    state = {"settings": settings, "step": step, "seconds": seconds, "random": distributed.gather(random)}
    if distributed.rank() == 0:
        run.save_checkpoint(folder, state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def _cut(path: Path, header: str, rows: int) -> None:
    """Begin a table, or keep `rows` rows: a killed run may have written more since its checkpoint."""
    lines = [header]
    if rows:
        lines = path.read_text().splitlines()[: 1 + rows] if path.exists() else []
        if len(lines) <= rows or lines[0] != header:
            raise ValueError(
                f"{path} lacks rows that the checkpoint beside it had: put it back as it was, or delete "
                f"{path.parent} to start the run again"
            )
    files.write_text(path, "\n".join(lines) + "\n")


def _diverged(what: str, step: int, lr: float) -> FloatingPointError:
    return FloatingPointError(
        f"training diverged, {what} at step {step} with learning rate {lr:g}: lower optimizer.lr or train.clip_norm"
    )


def _bar(name: str, total: int, unit: str, initial: int = 0) -> tqdm:
    return tqdm(desc=name, total=total, unit=unit, initial=initial, disable=distributed.rank() > 0, **pace())
