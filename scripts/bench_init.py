"""Time and memory of the initializations, in ratios; all in one run.

    python scripts/bench_init.py                 # real images: set VOC_ROOT, or have data/VOCdevkit

Needs `pip install -e ".[experiments,bench]"`. Writes results/bench/init.json. Seconds are the median of three, and what
the lsuv package takes those of one call; what counts are the ratios.
"""

import itertools
import multiprocessing
import os
import statistics
import time
import unittest.mock
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torchvision.models import resnet50

import initializers
from experiments.data.images import ImageCache, crop, whole
from experiments.data.voc import read_split
from experiments.engine.run import device_name, versions
from experiments.files import write_json
from experiments.networks import CaffeNet
from initializers import _filters
from initializers._filters import MAX_PATCH_VALUES, draw_patches, spherical_kmeans, whitening_matrix
from initializers._layer import Call
from initializers._layers import Layers, forward

IMAGES = 160
DEPTHS = (8, 16, 32, 64)  # of stacks of equal convolutions
STACK_IMAGES, STACK_SIZE, STACK_CHANNELS = 64, 32, 64
LSUV_IMAGES = 64  # few, since the lsuv package runs the network twice for each of its layers
MEMORY_IMAGES = (80, 160)
OUT = Path(__file__).resolve().parents[1] / "results" / "bench" / "init.json"


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Median time of a call, after one call that does not count; of a single call where `repeats` is 1."""
    if repeats > 1:
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def load_images(count: int, size: int) -> Tensor:
    """The first images of VOC 2007's train split: (count, 3, size, size)."""
    split = read_split(os.environ.get("VOC_ROOT", "data/VOCdevkit"), "train")
    cache = ImageCache.open(split.image_paths[:IMAGES], "data/cache")
    heights, widths = cache.heights[:count], cache.widths[:count]
    return crop(cache, torch.arange(count), whole(heights, widths), size, (104, 117, 123))


def main() -> None:
    images = load_images(IMAGES, 227)
    times, ratios = {}, {}
    for part in (caffenet(images), depth(), lsuv_package(images[:LSUV_IMAGES])):
        times |= part[0]
        ratios |= part[1]
    megabytes = {f"ResNet-50, {count} images": in_fresh_process(peak_memory, count) for count in MEMORY_IMAGES}
    few, many = megabytes.values()
    ratios["memory of the initialization of ResNet-50, {1} / {0} images".format(*MEMORY_IMAGES)] = many / few

    for name, value in times.items():
        print(f"{name:35} {value:7.2f} s")
    for name, value in megabytes.items():
        print(f"{name:35} {value:7.0f} MB")
    for name, value in ratios.items():
        print(f"{name:70} {value:6.2f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    about = {"network": "CaffeNet, 1000 outputs, 227 px", "images": IMAGES, "versions": versions()}
    about |= {"device": device_name(images.device), "threads": torch.get_num_threads()}
    write_json(OUT, about | {"seconds": times, "megabytes": megabytes, "ratios": ratios})
    print(OUT)


def caffenet(images: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and ratios of initializations of CaffeNet against one forward pass and against scikit-learn."""
    model = CaffeNet(1000).eval()

    def forward_pass() -> None:
        with torch.no_grad():
            model(images)

    times = {
        "forward": seconds(forward_pass),
        "gaussian": seconds(lambda: initializers.initialize(model, images, "gaussian")),
        "pca": seconds(lambda: initializers.initialize(model, images, "pca")),
        "lsuv": seconds(lambda: initializers.lsuv(model, images)),
    }
    times["k-means"], times["k-means arithmetic"] = kmeans(model, images)
    times |= clustering(model, images)
    around = times["k-means"] - times["k-means arithmetic"]
    ratios = {
        "k-means initialization without whitening and clustering / forward pass": around / times["forward"],
        "k-means initialization / forward pass": times["k-means"] / times["forward"],
        "Gaussian initialization / forward pass": times["gaussian"] / times["forward"],
        "LSUV / forward pass": times["lsuv"] / times["forward"],
        "scikit-learn's MiniBatchKMeans / our clustering": times["MiniBatchKMeans"] / times["cluster"],
    }
    return times, ratios


def clustering(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Seconds to cluster the whitened patches of all convolutions, here and in scikit-learn."""
    times = {"cluster": 0.0, "MiniBatchKMeans": 0.0}
    generator = torch.Generator().manual_seed(0)

    def measure(call: Call, x: Tensor) -> None:
        groups, outputs, width, kernel = call.layer.blocks.shape
        patches = draw_patches(call, [x], MAX_PATCH_VALUES // (groups * width * kernel), generator)
        patches.sub_(patches.mean(1, keepdim=True))
        points = F.normalize(patches @ whitening_matrix(patches, outputs), dim=2)
        start = torch.randperm(points.shape[1], generator=generator)[:outputs]
        times["cluster"] += seconds(lambda: spherical_kmeans(points, start, generator))
        for group in points.numpy():
            # As the authors' code calls it; n_init as scikit-learn had it then.
            kmeans = MiniBatchKMeans(outputs, batch_size=10 * outputs, n_init=3, random_state=0)
            times["MiniBatchKMeans"] += seconds(lambda group=group, kmeans=kmeans: kmeans.fit(group), repeats=1)

    def visit(call: Call, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        if not call.layer.linear:
            measure(call, x)
        return compute()

    with torch.no_grad():
        forward(Layers(model), (images,), visit)
    return times


def kmeans(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Seconds of a k-means initialization, and how many of them whiten and cluster; a call that is the median."""
    calls, compute = [], _filters._from_patches

    def timed(*arguments) -> Tensor:
        start = time.perf_counter()
        filters = compute(*arguments)
        calls[-1][1] += time.perf_counter() - start
        return filters

    with unittest.mock.patch.object(_filters, "_from_patches", timed):
        for _ in range(4):  # the first does not count
            calls.append([0.0, 0.0])
            start = time.perf_counter()
            initializers.initialize(model, images, "kmeans")
            calls[-1][0] = time.perf_counter() - start
    return tuple(sorted(calls[1:], key=lambda call: call[0] - call[1])[1])


def depth() -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the Gaussian initialization of stacks of equal convolutions, and how they grow."""
    images = load_images(STACK_IMAGES, STACK_SIZE)
    times = {}
    for count in DEPTHS:
        channels = [images.shape[1], *[STACK_CHANNELS] * count]
        pairs = [(nn.Conv2d(*c, 3, padding=1), nn.ReLU()) for c in itertools.pairwise(channels)]
        model = nn.Sequential(*(module for pair in pairs for module in pair))
        times[f"{count} convolutions"] = seconds(lambda model=model: initializers.initialize(model, images, "gaussian"))
    first, *others = times
    return times, {f"initialization of {name} / of {first}": times[name] / times[first] for name in others}


def lsuv_package(images: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of LSUV here and in the package of its first author, on the same images."""
    try:
        from lsuv import lsuv_with_singlebatch
    except ImportError as error:
        raise SystemExit('error: this compares with the package lsuv: pip install -e ".[bench]"') from error
    times, ratios = {}, {}
    for name, model in {"CaffeNet": CaffeNet(1000).eval(), "ResNet-50": resnet50(weights=None).eval()}.items():
        ours, theirs = f"lsuv, {name}, {len(images)} images", f"lsuv package, {name}, {len(images)} images"
        times[ours] = seconds(lambda model=model: initializers.lsuv(model, images))
        times[theirs] = seconds(lambda model=model: lsuv_with_singlebatch(model, images, verbose=False), repeats=1)
        ratios[f"the lsuv package / our LSUV, {name}"] = times[theirs] / times[ours]
    return times, ratios


def in_fresh_process(function: Callable[[int], float], argument: int) -> float:
    """What the function gives in a process that has done nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


def peak_memory(count: int) -> float:
    """Megabytes that the k-means initialization of ResNet-50 at 224 px needs beyond model and images (Linux only)."""
    model, images = resnet50(weights=None), load_images(count, 224)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = status("VmRSS")
    initializers.initialize(model, images, "kmeans")
    return status("VmHWM") - before


def status(name: str) -> float:
    """An entry of the status of this process, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
