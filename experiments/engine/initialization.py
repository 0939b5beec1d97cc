"""How a configuration of `configs/init` initializes a network, and on which images."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import initializers
from experiments import files
from experiments.data.draws import at_random
from experiments.data.images import ImageCache, squash
from experiments.engine import run
from experiments.networks import load_weights
from experiments.targets import call, named

PRETRAINED = f"{__name__}.pretrained"
# Functions that take no images, and those with a standard deviation for the published widths.
BLIND = tuple(f"initializers.{name}" for name in ("caffe", "gaussian", "msra", "torch_default", "xavier"))
FIXED_STD = tuple(f"initializers.{name}" for name in ("gaussian", "msra", "initialize"))
NOT_OPTIONS = ("name", "_target_", "images", "source")


def set_weights(
    model: nn.Module, init: Mapping, images: Tensor | tuple[Tensor, ...] | None, seed: int
) -> initializers.Report | None:
    """Initialize `model` by the function that `init` names as `_target_`, with its options.

    Args:
        init: the function is one of `initializers`, `pretrained`, or one of the user's: f(model, images, *, seed, ...).
        images: a tensor for each input of the model; the functions `BLIND` are not given them.

    Returns:
        The report of the initialization; None if it makes none.

    Raises:
        ValueError: there is no such function, or it does not take these options.
    """
    settings = OmegaConf.to_container(OmegaConf.create(dict(init)), resolve=True)
    target = settings["_target_"]
    options = {key: value for key, value in settings.items() if key not in NOT_OPTIONS}
    if target in FIXED_STD:
        options["factors"] = getattr(model, "std_factors", None)  # a detector of a network from elsewhere has none
    function = named("init._target_", target)
    arguments = [model, *([] if target in BLIND else [images])]
    found = call("init._target_", function, *arguments, seed=seed, **options)
    return found if isinstance(found, initializers.Report) else None


def timed(
    model: nn.Module, init: Mapping, images: Tensor | tuple[Tensor, ...] | None, seed: int
) -> dict[str, dict | float | None]:
    """`set_weights`, whose report is printed.

    Returns:
        The `report` of the initialization (None if it makes none), and its `seconds`.
    """
    began = time.perf_counter()
    report = set_weights(model, init, images, seed)
    seconds = time.perf_counter() - began
    if report is not None:
        print(report, flush=True)
    return {"report": None if report is None else report.to_dict(), "seconds": seconds}


def pretrained(
    model: nn.Module,
    images: Tensor | tuple[Tensor, ...],
    *,
    seed: int,
    weights: str | None,
    rescale: bool,
    skip: Sequence[str] = (),
    **options,
) -> initializers.Report | None:
    """The weights of a file, and with `rescale` equal change rates (section 4.3); the report of `rescale`.

    Layers that the file lacks are initialized by Algorithm 1, as in the authors' code; but for a new last layer.

    Args:
        skip: layers of the file that are left out.
        options: of `initializers.rescale`; without `rescale` they have no effect.
    """
    if weights is None:
        raise ValueError("init=pretrained takes its weights from a file: pass init.weights=FILE")
    loaded = load_weights(model, weights, seed=seed, skip=skip)
    print(loaded)
    absent = [name for name in loaded.missing if not name.startswith(f"{model.last_layer}.")]
    if any(model.get_parameter(name).ndim > 1 for name in absent):
        kept = [p for name, p in model.named_parameters() if p.requires_grad and name not in absent]
        try:
            for parameter in kept:
                parameter.requires_grad_(False)
            auxiliary = len(getattr(model, "classifiers", ())) > 1  # classifiers that run in training mode only
            report = initializers.initialize(model, images, "gaussian", between=False, seed=seed, training=auxiliary)
        finally:
            for parameter in kept:
                parameter.requires_grad_(True)
        print(f"initialized by Algorithm 1: {', '.join(row.name for row in report.layers)}")
    return initializers.rescale(model, images, seed=seed, **options) if rescale else None


def once(folder: Path, initialize: Callable[[], dict]) -> dict:
    """What `initialize` returns, kept in `init.json`, where a run that goes on reads it; it has its weights already."""
    path = folder / "init.json"
    if run.has_checkpoint(folder):
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise ValueError(f"{path} is gone or damaged: delete {folder} to start the run again") from error
    start = initialize()
    files.write_json(path, start)
    return start


def absent_weights(init: Mapping) -> str:
    """Which file of weights is asked for and not there, and where its authors publish it; '' where none is."""
    if init["_target_"] != PRETRAINED or init["weights"] is None or Path(init["weights"]).exists():
        return ""
    return f"{init['weights']} is not there; its authors publish it at {init['source']}"


def choose(cfg: DictConfig, part: str, cache: ImageCache, among: Sequence[int]) -> Tensor:
    """`cfg[part].images` of the images `among`, at random, each squashed to a square of the crop's size."""
    generator = torch.Generator().manual_seed(cfg.seed)
    index = at_random(cfg[part].images, torch.tensor(among), generator, f"{part}.images")
    return squash(cache, index, cfg.crop.size, cfg.data.mean)
