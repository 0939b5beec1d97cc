"""The trainer: batches of random crops, a loop that can be killed at any moment, and test outputs.

batches = CropBatches(cache, labels, batch_size=10, seed=0, mean=(104, 117, 123), size=227)
train(model, loss, batches, optimizer, iterations=80_000, lr_at=lr_at, clip_norm=10, folder=folder)
scores = predict(model, test_cache, crops=10, seed=0, mean=(104, 117, 123), size=227)
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from experiments.data.images import Crops, ImageCache, crop, random_crops, seeded
from experiments.engine import run
from experiments.engine.optim import make_optimizer, set_lr, step_policy

CURVE_HEADER = "step,loss,lr,seconds"


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
        self.epoch = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (batch_size, 3, size, size) and targets (batch_size, ...) of iteration `step`, from 0."""
        epoch, batch = divmod(step, len(self.cache) // self.batch_size)
        if epoch != self.epoch:
            self._start(epoch)
        part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        index = self.order[part]
        return crop(self.cache, index, _take(self.crops, part), self.size, self.mean), self.targets[index]

    def _start(self, epoch: int) -> None:
        generator = seeded(self.seed, epoch)
        order = torch.randperm(len(self.cache), generator=generator)
        crops = _draw(self.cache, order, self.size, generator, self.options)
        device = self.cache.pixels.device
        self.epoch, self.order, self.crops = epoch, order.to(device), crops.to(device)


def train_as(cfg: DictConfig, model: nn.Module, loss: Callable, batches: Callable[[int], tuple], folder: Path) -> float:
    """`train` with the optimizer and the settings of a configuration, its `optimizer` and its `train`."""
    return train(
        model,
        loss,
        batches,
        make_optimizer(model, cfg.optimizer),
        iterations=cfg.train.iterations,
        lr_at=step_policy(cfg.optimizer.lr, cfg.train.lr_gamma, cfg.train.lr_every),
        clip_norm=cfg.train.clip_norm,
        folder=folder,
        log_every=cfg.train.log_every,
        checkpoint_seconds=cfg.train.checkpoint_seconds,
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
) -> float:
    """Train `model` in place, from the newest checkpoint in `folder` on when there is one.

    Writes a row of `curve.csv` every `log_every` iterations (mean loss since the row before, learning rate,
    seconds of training), and a checkpoint at the start, at the end and, after a row, every
    `checkpoint_seconds`. A run that was killed, and goes on, ends with the same weights bit for bit as one
    that was not, on the same device and with as many threads.

    Args:
        model: on its device.
        loss: (output, targets) -> scalar.
        batches: iteration, from 0, -> (inputs, targets), and the same for the same iteration. A tuple of inputs are
            several arguments of the model.
        optimizer: from `make_optimizer`.
        lr_at: iteration -> learning rate, before the groups' multipliers.
        folder: of the run; it exists.
        clip_norm: gradients of a larger global L2 norm are scaled down to it, before weight decay (Caffe); None: never.

    Returns:
        Seconds of training, those before an interruption included.

    Raises:
        FloatingPointError: the loss or a weight is NaN or infinite. No checkpoint is written of that.
        OSError: the curve or a checkpoint cannot be written, or no checkpoint can be read.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # the layout oneDNN computes in: a third faster
    curve = folder / "curve.csv"
    start, seconds = _restore(folder, model, optimizer)
    _cut_curve(curve, math.ceil(start / log_every))
    began = time.perf_counter() - seconds
    saved = time.perf_counter()
    total = torch.zeros((), device=device)  # of the losses since the last row; read there, to let the GPU run on
    model.train()
    with _bar("train", iterations, "step", start) as bar:
        for step in range(start, iterations):
            lr = lr_at(step)
            set_lr(optimizer, lr)
            inputs, targets = batches(step)
            optimizer.zero_grad()
            value = loss(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets)
            value.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            total += value.detach()
            bar.update()

            done = step + 1
            if done % log_every and done < iterations:
                continue
            mean = total.item() / (step % log_every + 1)
            total.zero_()
            if not math.isfinite(mean):
                raise _diverged(f"the mean loss is {mean}", done, lr)
            now = time.perf_counter()
            run.append_line(curve, f"{done},{mean:.6g},{lr:.6g},{now - began:.1f}")
            bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.2g}", refresh=False)
            if now - saved >= checkpoint_seconds or done == iterations:
                if not all(parameter.isfinite().all() for parameter in parameters):
                    raise _diverged("a weight is NaN or infinite", done, lr)
                _save(folder, model, optimizer, done, now - began)
                saved = time.perf_counter()
    return time.perf_counter() - began


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


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load the newest checkpoint, or write the first; return iterations done and seconds spent so far."""
    state = run.load_checkpoint(folder)
    if state is None:
        _save(folder, model, optimizer, 0, 0.0)
        return 0, 0.0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["step"], state["seconds"]


def _save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    state = {
        "step": step,
        "seconds": seconds,
        "rng": torch.get_rng_state(),
    }  # dropout draws from the global RNG
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    run.save_checkpoint(folder, state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def _cut_curve(path: Path, rows: int) -> None:
    """Begin the curve, or keep `rows` rows: a killed run may have written more since its checkpoint."""
    lines = path.read_text().splitlines()[: 1 + rows] if rows else [CURVE_HEADER]
    run.write_text(path, "\n".join(lines) + "\n")


def _diverged(what: str, step: int, lr: float) -> FloatingPointError:
    return FloatingPointError(
        f"training diverged, {what} at step {step} with learning rate {lr:g}: lower optimizer.lr or train.clip_norm"
    )


def _bar(name: str, total: int, unit: str, initial: int = 0) -> tqdm:
    """A progress bar on a terminal; in a log file, a line every half minute."""
    return tqdm(desc=name, total=total, unit=unit, initial=initial, mininterval=0.2 if sys.stderr.isatty() else 30)
