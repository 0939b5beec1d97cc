"""Train CaffeNet or GoogLeNet on ImageNet or another set of folders (Krähenbühl et al. 2016, Figures 3 and 4).

    python experiments/imagenet.py init=kmeans data.root=/path/to/ILSVRC2012
    torchrun --nproc-per-node=8 experiments/imagenet.py init=kmeans data.root=/path/to/ILSVRC2012

Every setting is in configs/imagenet.yaml and the groups beside it. A run that was killed goes on when the same
command is given again. The last line printed is the path of the result record.
"""

import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.data.draws import at_random
from experiments.data.folders import FolderBatches, Folders, Images, centres, read_folders, whole_images, workers_of
from experiments.data.prepare import prepare
from experiments.engine import distributed, run
from experiments.engine.command import command
from experiments.engine.figures import line_of
from experiments.engine.initialization import PRETRAINED, once, timed
from experiments.engine.losses import AUXILIARY_WEIGHT, classification_loss
from experiments.engine.trainer import train_as
from experiments.networks import make_network

# The lines of the paper's figures: initialization, and whether there is LRN (Figure 3) or auxiliary losses (Figure 4).


@command("imagenet")
def main(cfg: DictConfig) -> None:
    no_line = cfg.published and line_of(cfg, cfg.published) is None
    reason = f"{cfg.published} of the paper has no such line; published=null runs it too" if no_line else ""
    run.execute(cfg, train_and_validate, left_out=reason)


def train_and_validate(cfg: DictConfig, folder: Path, device: torch.device) -> None:
    """The run, or the part of it that is this process's."""
    distributed.from_first(lambda: prepare(cfg.data))  # and the folder is there
    training, validation = read_folders(cfg.data)
    bad = {part: folder / f"bad_{part}.txt" for part in ("train", "val")}
    images, others = (
        Images(found.paths, cfg.data.short, cfg.data.cache, bad[part])
        for part, found in (("train", training), ("val", validation))
    )
    model = make_network(cfg.model, len(training.classes)).to(device)
    crops = {"size": cfg.crop.size, "mean": tuple(cfg.data.mean), "scale": cfg.data.scale, "device": device}
    crops |= {"workers": workers_of(cfg), "rank": distributed.rank(), "world": distributed.size()}
    batches = FolderBatches(
        images,
        training.labels,
        **crops,
        batch_size=cfg.train.batch_size,
        parts=cfg.train.accumulate,
        mirror=cfg.crop.mirror,
        seed=cfg.seed,
    )
    start = distributed.from_first(lambda: once(folder, lambda: initialize(cfg, model, images)))
    torch.manual_seed(cfg.seed + distributed.rank())  # of dropout
    validate = partial(evaluate, model, others, validation, crops, cfg.evaluate.batch_size)
    options = {name: cfg.train[name] for name in ("accumulate", "precision", "validate_every")}
    train_seconds = train_as(cfg, model, classification_loss, batches, folder, **options, validate=validate)

    began = time.perf_counter()
    model.eval()
    metrics = dict(zip(("loss", "top1", "top5"), validate(), strict=True))
    times = {"init": start["seconds"], "train": train_seconds, "evaluate": time.perf_counter() - began}
    if distributed.rank() == 0:
        about = {
            "data": f"{cfg.data.name}, {len(training.classes)} classes, {len(images)} + {len(others)} images",
            "epoch": len(images) / cfg.train.batch_size,
            "init_report": start["report"],
        }
        report(cfg, folder, device, metrics, times, bad, about)


def report(
    cfg: DictConfig,
    folder: Path,
    device: torch.device,
    metrics: dict[str, float],
    times: dict[str, float],
    bad: dict[str, Path],
    about: dict,
) -> None:
    """Write the record and print what came out; `bad` are the lists of images that could not be decoded."""
    counts = {part: len({*path.read_text().splitlines()}) if path.exists() else 0 for part, path in bad.items()}
    curves = {"curve": "curve.csv", "validation": "validation.csv"}
    about |= {"processes": distributed.size(), "bad_images": counts, **curves}
    run.write_record(run.record_of(folder, cfg)[0], cfg, device, metrics=metrics, times=times, **about)
    top1, top5 = (100 * metrics[name] for name in ("top1", "top5"))
    print(f"\nvalidation: loss {metrics['loss']:.3f}, top-1 {top1:.1f} %, top-5 {top5:.1f} %")
    print(run.spent(times))
    for part, count in counts.items():
        if count:
            print(f"{count} images of {part} could not be decoded and were left out: {bad[part]}")


def initialize(cfg: DictConfig, model: nn.Module, images: Images) -> dict:
    """Initialize `model` with its auxiliary classifiers, in proportion to their losses, and print what came of it.

    With `zero_classifiers` the classifiers become 0, except after the reference's initialization (section 4.5) and
    where trained weights were loaded.

    Returns:
        `report` of the initialization (None if it looks at no images) and its `seconds`.
    """
    chosen = None
    if "images" in cfg.init:
        generator = torch.Generator().manual_seed(cfg.seed)
        index = at_random(cfg.init.images, torch.arange(len(images)), generator, "init.images")
        chosen = whole_images(images, index, cfg.crop.size, tuple(cfg.data.mean), cfg.data.scale)
        chosen = chosen.to(next(model.parameters()).device)
    # Not with weights from a file, which know the network by its own names.
    together = len(model.classifiers) > 1 and chosen is not None and cfg.init._target_ != PRETRAINED
    zero = cfg.zero_classifiers and cfg.init._target_ not in ("initializers.caffe", PRETRAINED)
    # The scale of the outputs is gone with the classifiers.
    init = {**cfg.init, "outputs": "free"} if zero and cfg.init._target_ == "initializers.initialize" else cfg.init
    start = timed(Classifiers(model) if together else model, init, chosen, cfg.seed)
    if zero:
        for name in model.classifiers:
            for parameter in model.get_submodule(name).parameters():
                nn.init.zeros_(parameter)
    return start


class Classifiers(nn.Module):
    """A network with auxiliary classifiers whose outputs are as large as their parts of the loss, in either mode.

    Those classifiers run in training mode only, and an initialization looks at a network in evaluation mode.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        output, *auxiliary = self.model(x, auxiliary=True)
        return output, *(AUXILIARY_WEIGHT * other for other in auxiliary)


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: Images, folders: Folders, crops: dict, batch_size: int
) -> tuple[float, float, float]:
    """Loss, top-1 and top-5 accuracy over the middles of all images that can be decoded; of all processes together."""
    sums = torch.zeros(4, dtype=torch.float64)
    for index, inputs, bad in centres(images, batch_size=batch_size, **crops):
        labels = folders.labels[index][~bad]
        logits = model(inputs).float().cpu()[~bad]
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), best[:, 0].sum(), best.sum(), torch.tensor(len(labels))])
    *found, count = distributed.total(sums).tolist()
    if not count:
        raise ValueError(f"none of the {len(images)} validation images can be decoded: mend data.root")
    return tuple(value / count for value in found)


if __name__ == "__main__":
    main()
