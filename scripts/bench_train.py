"""Time a training step of the trainer against the bare forward, backward and SGD step on fixed tensors; in one run.

    python scripts/bench_train.py                 # real images: set VOC_ROOT, or have data/VOCdevkit

The network and the crops are those of preset=mini. Writes results/bench/train.json; what counts is the ratio.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.data.images import ImageCache
from experiments.data.voc import read_split
from experiments.engine.optim import make_optimizer, step_policy
from experiments.engine.run import device_name, versions, write_json
from experiments.engine.trainer import CropBatches, train
from experiments.voc_cls import multilabel_loss

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "bench" / "train.json"
STEPS = 1000


def main() -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("voc_cls", overrides=["preset=mini"])
    split = read_split(os.environ.get("VOC_ROOT", "data/VOCdevkit"), "train")
    cache = ImageCache.open(split.image_paths, "data/cache")
    batches = CropBatches(cache, split.labels, batch_size=cfg.train.batch_size, seed=0, mean=cfg.data.mean, **cfg.crop)
    model = instantiate(cfg.model).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, cfg.optimizer)
    inputs, labels = batches(0)

    def bare() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            multilabel_loss(model(inputs), labels).backward()
            optimizer.step()

    def trainer() -> None:
        with tempfile.TemporaryDirectory() as folder:
            train(
                model,
                multilabel_loss,
                batches,
                optimizer,
                iterations=STEPS,
                lr_at=step_policy(cfg.optimizer.lr, cfg.train.lr_gamma, cfg.train.lr_every),
                clip_norm=cfg.train.clip_norm,
                folder=Path(folder),
                log_every=cfg.train.log_every,
            )

    times: dict[str, list[float]] = {"bare": [], "trainer": [], "crops": []}
    for repeat in range(3):  # in turns, so that a change of the machine's speed touches all alike; the first warms up
        for name, part in (("bare", bare), ("trainer", trainer), ("crops", lambda: [*map(batches, range(STEPS))])):
            start = time.perf_counter()
            part()
            if repeat:
                times[name].append(time.perf_counter() - start)
    step = {name: 1000 * statistics.median(values) / STEPS for name, values in times.items()}
    ratio = step["trainer"] / step["bare"]
    for name, milliseconds in step.items():
        print(f"{name:8} {milliseconds:7.2f} ms a step")
    print(f"trainer / bare {ratio:.3f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    about = {"preset": "mini", "versions": versions()}
    about |= {"device": device_name(inputs.device), "threads": torch.get_num_threads()}
    write_json(OUT, about | {"milliseconds": step, "ratios": {"training step / bare step": ratio}})
    print(OUT)


if __name__ == "__main__":
    main()
