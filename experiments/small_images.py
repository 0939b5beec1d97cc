"""Train and test a network on small images: MNIST, CIFAR, or a folder per class (Mishkin & Matas, 2016).

    python experiments/small_images.py data=mnist model=mnist_fitnet optimizer=rmsprop loss=hinge init=lsuv

Every setting is in configs/small_images.yaml and the groups beside it. A run that was killed goes on when the same
command is given again. The last line printed is the path of the result record.
"""

import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.data.draws import at_random
from experiments.data.prepare import prepare
from experiments.data.small import Normalization, SmallBatches, SmallImages, read_small
from experiments.engine import run
from experiments.engine.command import command
from experiments.engine.convergence import CONVERGES, FLAT, constant_loss, converges, leaves_flat_part
from experiments.engine.initialization import once, timed
from experiments.engine.losses import LOSSES
from experiments.engine.trainer import train_as
from experiments.networks import make_network


@command("small_images")
def main(cfg: DictConfig) -> None:
    run.execute(cfg, train_and_test)


def train_and_test(cfg: DictConfig, folder: Path, device: torch.device) -> None:
    """The run: its record, and what of it is printed. A training that diverges is a result, too."""
    prepare(cfg.data)
    training, test = (part.to(device) for part in read_small(cfg.data, cfg.seed, folder / "bad_images.txt"))
    normalize = Normalization.of(training.pixels, cfg.data.normalize)
    model = make_network(cfg.model, len(training.classes), training.pixels.shape[1]).to(device)
    start = once(folder, lambda: initialize(cfg, model, training.pixels, normalize))
    torch.manual_seed(cfg.seed)  # of dropout
    draws = {"batch_size": cfg.train.batch_size, "seed": cfg.seed, "pad": cfg.data.pad, "mirror": cfg.data.mirror}
    batches = SmallBatches(training, normalize, **draws)
    validate = partial(evaluate, model, test, normalize, cfg.loss, cfg.evaluate.batch_size)
    options = {"validate": validate, "validate_every": cfg.train.validate_every}
    metrics, diverged = dict.fromkeys(("loss", "top1", "top5")), None
    began = time.perf_counter()
    try:
        train_as(cfg, model, LOSSES[cfg.loss], batches, folder, **options)
        began = time.perf_counter()
        model.eval()
        metrics = dict(zip(metrics, validate(), strict=True))
    except FloatingPointError as error:
        diverged = str(error)
    curve = pd.read_csv(folder / "curve.csv")
    times = {"init": start["seconds"], "train": float(curve["seconds"].max()) if len(curve) else 0.0}
    times["evaluate"] = 0.0 if diverged else time.perf_counter() - began
    about = {
        "data": f"{cfg.data.name}, {len(training.classes)} classes, {len(training)} + {len(test)} images",
        "epoch": len(training) / cfg.train.batch_size,
        "bad_images": {"train": training.bad, "test": test.bad},
        "diverged": diverged,
        "converges": {"rule": CONVERGES, "holds": not diverged and converges(metrics["top1"], test.labels)},
        "leaves_flat_part": {
            "rule": FLAT,
            "iteration": leaves_flat_part(curve, constant_loss(cfg.loss, len(training.classes))),
        },
        "init_report": start["report"],
    }
    curves = {"curve": "curve.csv", "validation": "validation.csv"}
    run.write_record(run.record_of(folder, cfg)[0], cfg, device, metrics=metrics, times=times, **about, **curves)
    print(f"\n{diverged or 'test: loss {loss:.4f}, top-1 {top1:.2%}, top-5 {top5:.2%}'.format(**metrics)}")
    print(run.spent(times))


def initialize(cfg: DictConfig, model: nn.Module, pixels: Tensor, normalize: Normalization) -> dict:
    """Initialize `model` on whole training images, and print what came of it.

    Returns:
        `report` of the initialization (None if it looks at no images) and its `seconds`.
    """
    images = None
    if "images" in cfg.init:
        generator = torch.Generator().manual_seed(cfg.seed)
        index = at_random(cfg.init.images, torch.arange(len(pixels)), generator, "init.images")
        images = normalize(pixels[index.to(pixels.device)])
    return timed(model, cfg.init, images, cfg.seed)


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: SmallImages, normalize: Normalization, loss: str, batch_size: int
) -> tuple[float, float, float]:
    """Loss, top-1 and top-5 accuracy over all images, as they are.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        outputs = model(normalize(pixels)).float()
        best = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
        sums += torch.stack([LOSSES[loss](outputs, labels) * len(labels), best[:, 0].sum(), best.sum()]).cpu()
    if not sums.isfinite().all():
        raise FloatingPointError(f"training diverged, the loss on the test images is {sums[0].item()}")
    return tuple((sums / len(images)).tolist())


if __name__ == "__main__":
    main()
