"""How a configuration of `configs/init` initializes a network, and on which images."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import initializers
from experiments import files
from experiments.data.draws import at_random
from experiments.data.images import ImageCache, squash
from experiments.engine import run
from experiments.networks import load_weights

LOOKS_AT_IMAGES = ("initialize", "lsuv", "pretrained")  # the methods that need images
FIXED_STD = ("gaussian", "msra", "initialize")  # the methods with a standard deviation for the published widths


def set_weights(
    model: nn.Module, init: Mapping, images: Tensor | tuple[Tensor, ...] | None, seed: int
) -> initializers.Report | None:
    """Initialize `model` by the method of `init`, a function of `initializers` or `pretrained`, with its options.

    Args:
        images: for the methods of `LOOKS_AT_IMAGES`, a tensor for each input of the model; the others ignore them.

    Returns:
        The report of the initialization; None if it looks at no images.
    """
    options = {key: value for key, value in init.items() if key not in ("name", "method", "images", "source")}
    if init["method"] in FIXED_STD:
        options["factors"] = getattr(model, "std_factors", None)  # networks from elsewhere have none
    method = pretrained if init["method"] == "pretrained" else getattr(initializers, init["method"])
    return method(model, *([images] if init["method"] in LOOKS_AT_IMAGES else []), seed=seed, **options)


def pretrained(
    model: nn.Module, images: Tensor | tuple[Tensor, ...], *, seed: int, weights: str | None, rescale: bool, **options
) -> initializers.Report | None:
    """The weights of a file, and with `rescale` equal change rates (section 4.3); the report of `rescale`.

    Args:
        options: of `initializers.rescale`.
    """
    if weights is None:
        raise ValueError("init=pretrained takes its weights from a file: pass init.weights=FILE")
    print(load_weights(model, weights, seed=seed))
    return initializers.rescale(model, images, seed=seed, **options) if rescale else None


def once(folder: Path, initialize: Callable[[], dict]) -> dict:
    """What `initialize` returns, kept in `init.json`, where a run that goes on reads it; it has its weights already."""
    path = folder / "init.json"
    if run.has_checkpoint(folder):
        return json.loads(path.read_text())
    start = initialize()
    files.write_json(path, start)
    return start


def absent_weights(init: Mapping) -> str:
    """Which file of weights is asked for and not there, and where its authors publish it; '' where none is."""
    if init["method"] != "pretrained" or init["weights"] is None or Path(init["weights"]).exists():
        return ""
    return f"{init['weights']} is not there; its authors publish it at {init['source']}"


def choose(cfg: DictConfig, part: str, cache: ImageCache, among: Sequence[int]) -> Tensor:
    """`cfg[part].images` of the images `among`, at random, each squashed to a square of the crop's size."""
    generator = torch.Generator().manual_seed(cfg.seed)
    index = at_random(cfg[part].images, torch.tensor(among), generator, f"{part}.images")
    return squash(cache, index, cfg.crop.size, cfg.data.mean)
