"""Time a training step of the trainer against the bare forward, backward and SGD step on fixed tensors; in one run.

    python scripts/bench_train.py                    # real images: set VOC_ROOT, or have data/VOCdevkit
    python scripts/bench_train.py proposals=FILE     # of detection, and other settings of the experiments

Networks and batches are those of preset=mini, and of classification those of preset=paper, too. Writes
results/bench/train.json; what counts is the ratio.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

import detection
from experiments.data.proposals import objects_of, proposals_of
from experiments.data.regions import RoIBatches
from experiments.data.voc import CLASSES, open_split
from experiments.engine.losses import multilabel_loss
from experiments.engine.optim import make_optimizer
from experiments.engine.run import device_name, versions
from experiments.engine.trainer import CropBatches, train_as
from experiments.files import write_json

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "bench" / "train.json"
STEPS = {"classification": 1_000, "detection": 300, "classification, preset=paper": 100}
FIXED = 50  # batches that the bare steps repeat


def main() -> None:
    words = sys.argv[1:]
    shared = [word for word in words if not word.startswith("proposals=")]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        classifications = {
            name: compose("voc_cls", overrides=[f"preset={preset}", *shared, f"train.iterations={STEPS[name]}"])
            for name, preset in (("classification", "mini"), ("classification, preset=paper", "paper"))
        }
        det = compose("voc_det", overrides=["preset=mini", *words, f"train.iterations={STEPS['detection']}"])
    split, cache = open_split(det.data, "train", "cpu")
    step = {}
    for name, cls in classifications.items():
        options = {"batch_size": cls.train.batch_size, "seed": 0, "mean": cls.data.mean, **cls.crop}
        batches = CropBatches(cache, split.labels, **options)
        step[name] = bench(name, cls, instantiate(cls.model), multilabel_loss, batches)

    objects = objects_of(det, split, cache)
    proposals, _ = proposals_of(det, "train", split, cache, objects)
    rois = detection.make_rois(proposals, [(found.boxes, found.classes) for found in objects])
    statistics_of = rois.target_statistics(len(CLASSES))
    regions = RoIBatches(cache, rois, **det.batch, statistics=statistics_of, seed=0, mean=det.mean)
    model = detection.FastRCNN(instantiate(det.model), len(CLASSES), **det.detector)
    step["detection"] = bench("detection", det, model, detection.fast_rcnn_loss, regions)

    ratios = {f"{name}: training step / bare step": times["trainer"] / times["bare"] for name, times in step.items()}
    for name, ratio in ratios.items():
        print(f"{name} {ratio:.3f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    about = {"preset": "mini", "versions": versions()}
    about |= {"device": device_name(cache.pixels.device), "threads": torch.get_num_threads()}
    write_json(OUT, about | {"milliseconds": step, "ratios": ratios})
    print(OUT)


def bench(name: str, cfg: DictConfig, model: nn.Module, loss: Callable, batches: Callable) -> dict[str, float]:
    """Milliseconds of a bare step, of one of the trainer, and of making a batch."""
    steps = cfg.train.iterations
    model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, cfg.optimizer)
    fixed = [batches(step) for step in range(FIXED)]

    def bare() -> None:
        for inputs, targets in itertools.islice(itertools.cycle(fixed), steps):
            optimizer.zero_grad()
            loss(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets).backward()
            optimizer.step()

    def trainer() -> float:
        return train_for(cfg, model, loss, lambda step: batches(step % FIXED))

    def data() -> None:
        for step in range(steps):
            batches(step % FIXED)

    times: dict[str, list[float]] = {"bare": [], "trainer": [], "batch": []}
    for repeat in range(3):  # in turns, so that a change of the machine's speed touches all alike; the first warms up
        for part, run in (
            ("bare", partial(seconds_of, bare)),
            ("trainer", trainer),
            ("batch", partial(seconds_of, data)),
        ):
            seconds = run()
            if repeat:
                times[part].append(seconds)
    step = {part: 1000 * statistics.median(values) / steps for part, values in times.items()}
    for part, milliseconds in step.items():
        print(f"{name}, {part:8} {milliseconds:7.2f} ms a step")
    return step


def seconds_of(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def train_for(cfg: DictConfig, model: nn.Module, loss: Callable, batches: Callable) -> float:
    """Seconds of the steps of a training.

    Without the checkpoints before the first step and after the last, of which a long training writes one a minute.
    """
    began = []

    def timed(step: int) -> tuple:
        began.append(time.perf_counter())
        return batches(step)

    with tempfile.TemporaryDirectory() as folder:
        train_as(cfg, model, loss, timed, Path(folder))
    return (began[-1] - began[0]) * len(began) / (len(began) - 1)


if __name__ == "__main__":
    main()
