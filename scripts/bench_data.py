"""Time the batches of experiments/imagenet.py against a plain ImageFolder and DataLoader, and the wait for them.

    python scripts/bench_data.py                     # reads data/tiny-imagenet-200, and VOC 2007 (VOC_ROOT or data/)
    python scripts/bench_data.py data.root=FOLDER    # other small images

Small images are read as preset=mini does; the photographs of VOC 2007, whose folder is taken for a class, as
preset=paper does ImageNet's. Writes results/bench/data.json; what counts are the ratios, all of one run.
"""

import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from experiments.data.folders import FolderBatches, Images, read_folders, workers_of
from experiments.data.voc import find_devkit
from experiments.engine.losses import classification_loss
from experiments.engine.run import device_name, versions
from experiments.engine.trainer import train_as
from experiments.files import write_json

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "bench" / "data.json"
BATCHES = {"mini": 60, "paper": 8}  # that are timed, after half as many
REPEATS = 3
STEPS = 200  # of training


def main() -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        mini = compose("imagenet", overrides=["preset=mini", f"train.iterations={STEPS}", *sys.argv[1:]])
        paper = compose(
            "imagenet", overrides=[f"data.root={find_devkit(os.environ.get('VOC_ROOT', 'data/VOCdevkit'))}"]
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = workers_of(paper)
    rates: dict[str, dict[str, float]] = {}
    for cfg in (mini, paper):
        folder = Path(cfg.data.root)
        plain = ImageFolder(folder / "train" if cfg is mini else folder, recipe(cfg), allow_empty=cfg is not mini)
        paths = [path for path, _ in plain.samples]
        sources = {
            "ImageFolder and DataLoader": lambda cfg=cfg, plain=plain: plain_batches(cfg, plain, workers, device),
            "ours": lambda cfg=cfg, paths=paths: ours(cfg, paths, None, workers, device),
        }
        if cfg is mini:
            sources["ours, decoded before"] = lambda cfg=cfg, paths=paths: ours(cfg, paths, cfg.data.cache, 0, device)
        rates[cfg.preset] = compare(cfg, sources)
    share = waiting(mini, device)
    ratios = {
        f"{preset}: images/s of {name} / of ImageFolder and DataLoader": rate / found["ImageFolder and DataLoader"]
        for preset, found in rates.items()
        for name, rate in found.items()
        if name != "ImageFolder and DataLoader"
    }
    ratios["mini: share of the training time spent waiting for data"] = share
    for name, ratio in ratios.items():
        print(f"{name} {ratio:.3f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    about = {"versions": versions(), "device": device_name(device), "workers": workers}
    write_json(OUT, about | {"threads": torch.get_num_threads(), "images_per_second": rates, "ratios": ratios})
    print(OUT)


def recipe(cfg: DictConfig) -> v2.Compose:
    """What tutorials do to an image, with the sizes and the mean of a configuration."""
    mean = [value / 255 for value in reversed(cfg.data.mean)]
    steps = [v2.Resize(cfg.data.short), v2.RandomCrop(cfg.crop.size), v2.RandomHorizontalFlip(), v2.ToImage()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, [1 / 255] * 3)])


def plain_batches(cfg: DictConfig, images: ImageFolder, workers: int, device: torch.device) -> Iterator:
    """Batches on the device."""
    on_gpu = device.type == "cuda"
    sampler = RandomSampler(images, replacement=True, num_samples=10**9)  # endless, as ours are
    loader = DataLoader(images, cfg.train.batch_size, sampler=sampler, num_workers=workers, pin_memory=on_gpu)
    for inputs, labels in loader:
        yield inputs.to(device, non_blocking=on_gpu), labels.to(device, non_blocking=on_gpu)


def ours(cfg: DictConfig, paths: list[str], cache: str | None, workers: int, device: torch.device) -> Iterator:
    """The same of `FolderBatches`."""
    with tempfile.TemporaryDirectory() as folder:
        images = Images(paths, cfg.data.short, cache, Path(folder) / "bad.txt")
        batches = batches_of(cfg, images, torch.zeros(len(paths), dtype=torch.long), workers, device)
        yield from map(batches, itertools.count())


def batches_of(cfg: DictConfig, images: Images, labels: torch.Tensor, workers: int, device: torch.device):
    return FolderBatches(
        images,
        labels,
        batch_size=cfg.train.batch_size,
        parts=1,
        rank=0,
        world=1,
        seed=0,
        size=cfg.crop.size,
        mirror=True,
        mean=tuple(cfg.data.mean),
        scale=cfg.data.scale,
        workers=workers,
        device=device,
    )


def compare(cfg: DictConfig, sources: dict[str, Callable[[], Iterator]]) -> dict[str, float]:
    """Images per second of each, in turns, so that a change of the machine's speed touches all alike."""
    count = BATCHES[cfg.preset]
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _, (name, start) in itertools.product(range(REPEATS), sources.items()):
        batches = start()
        for _ in range(count // 2):  # workers start, caches fill
            next(batches)
        began = time.perf_counter()
        for _ in range(count):
            next(batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - began)
        batches.close()
        gc.collect()  # here, and not in the workers of the next
    rates = {name: count * cfg.train.batch_size / statistics.median(found) for name, found in seconds.items()}
    for name, rate in rates.items():
        print(f"{cfg.preset:6} {name:28} {rate:8.0f} images/s")
    return rates


def waiting(cfg: DictConfig, device: torch.device) -> float:
    """Share of the time of training steps in which the trainer waits for its batch."""
    training, _ = read_folders(cfg.data)
    model = instantiate(cfg.model, num_outputs=len(training.classes)).to(device)
    waited = 0.0
    with tempfile.TemporaryDirectory() as folder:
        images = Images(training.paths, cfg.data.short, cfg.data.cache, Path(folder) / "bad.txt")
        batches = batches_of(cfg, images, training.labels, workers_of(cfg), device)

        def timed(number: int) -> tuple:
            nonlocal waited
            began = time.perf_counter()
            batch = batches(number)
            waited += time.perf_counter() - began
            return batch

        seconds = train_as(cfg, model, classification_loss, timed, Path(folder))
    return waited / seconds


if __name__ == "__main__":
    main()
