"""Time the k-means initialization of CaffeNet against one forward pass and against scikit-learn; all in one run.

    python scripts/bench_init.py                 # real images: set VOC_ROOT, or have data/VOCdevkit

Writes results/bench/init.json. Seconds are the median of three; what counts are the ratios.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans

import initializers
from experiments.data.images import ImageCache, crop, whole
from experiments.data.voc import read_split
from experiments.engine.run import device_name, versions, write_json
from experiments.networks import CaffeNet
from initializers._filters import MAX_PATCH_VALUES, draw_patches, spherical_kmeans, whitening_matrix
from initializers._model import forward

IMAGES = 160
OUT = Path(__file__).resolve().parents[1] / "results" / "bench" / "init.json"


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Median time of a call, after one call that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    split = read_split(os.environ.get("VOC_ROOT", "data/VOCdevkit"), "train")
    cache = ImageCache.open(split.image_paths[:IMAGES], "data/cache")
    images = crop(cache, torch.arange(IMAGES), whole(cache.heights, cache.widths), 227, (104, 117, 123))
    model = CaffeNet(1000).eval()

    def forward_pass() -> None:
        with torch.no_grad():
            model(images)

    times = {
        "forward": seconds(forward_pass),
        "k-means": seconds(lambda: initializers.initialize(model, images, "kmeans")),
        "gaussian": seconds(lambda: initializers.initialize(model, images, "gaussian")),
        "pca": seconds(lambda: initializers.initialize(model, images, "pca")),
        "lsuv": seconds(lambda: initializers.lsuv(model, images)),
    }
    times |= arithmetic(model, images)
    times["k-means arithmetic"] = times["whiten"] + times["cluster"]
    around = times["k-means"] - times["k-means arithmetic"]
    ratios = {
        "k-means initialization without whitening and clustering / forward pass": around / times["forward"],
        "k-means initialization / forward pass": times["k-means"] / times["forward"],
        "Gaussian initialization / forward pass": times["gaussian"] / times["forward"],
        "LSUV / forward pass": times["lsuv"] / times["forward"],
        "scikit-learn's MiniBatchKMeans / our clustering": times["MiniBatchKMeans"] / times["cluster"],
    }
    for name, value in times.items():
        print(f"{name:20} {value:7.2f} s")
    for name, value in ratios.items():
        print(f"{name:70} {value:6.2f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    about = {"network": "CaffeNet, 1000 outputs, 227 px", "images": IMAGES, "versions": versions()}
    about |= {"device": device_name(images.device), "threads": torch.get_num_threads()}
    write_json(OUT, about | {"seconds": times, "ratios": ratios})
    print(OUT)


def arithmetic(model: torch.nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Seconds to whiten and to cluster the patches of all convolutions, and of scikit-learn on the same points."""
    times = {"whiten": 0.0, "cluster": 0.0, "MiniBatchKMeans": 0.0}
    generator = torch.Generator().manual_seed(0)

    def measure(_: str, layer: torch.nn.Module, x: torch.Tensor) -> None:
        if not isinstance(layer, torch.nn.Conv2d):
            return
        outputs = layer.out_channels // layer.groups
        patches = draw_patches(layer, x, MAX_PATCH_VALUES // (layer.groups * layer.weight[0].numel()), generator)

        def whiten() -> torch.Tensor:
            patches.sub_(patches.mean(1, keepdim=True))
            return F.normalize(patches @ whitening_matrix(patches, outputs), dim=2)

        points = whiten()
        start = torch.randperm(points.shape[1], generator=generator)[:outputs]
        times["whiten"] += seconds(whiten)
        times["cluster"] += seconds(lambda: spherical_kmeans(points, start, generator))
        for group in points.numpy():
            # As the authors' code calls it; n_init as scikit-learn had it then.
            kmeans = MiniBatchKMeans(outputs, batch_size=10 * outputs, n_init=3, random_state=0)
            times["MiniBatchKMeans"] += seconds(lambda group=group, kmeans=kmeans: kmeans.fit(group), repeats=1)

    with torch.no_grad():
        forward(model, (images,), before=measure)
    return times


if __name__ == "__main__":
    main()
