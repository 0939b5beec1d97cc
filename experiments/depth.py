"""How signals and gradients pass deep plain networks, and which initialization lets them train.

    python experiments/depth.py network=linear network.activation=tanh

For each depth and each initialization of configs/depth.yaml: the variance of the outputs of every layer and of their
gradients at the start, and whether the loss leaves its flat part within some hundred iterations. Writes variance.png,
map.png and the record; what is done of a run that was killed is not done again.
"""

import json
import math
import re
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import initializers
from experiments import files
from experiments.data.draws import at_random
from experiments.data.prepare import prepare
from experiments.data.small import Normalization, SmallBatches, read_small
from experiments.engine import run
from experiments.engine.command import command
from experiments.engine.convergence import FLAT, constant_loss, leaves_flat_part
from experiments.engine.figures import draw_map, draw_variances
from experiments.engine.initialization import set_weights
from experiments.engine.trainer import train_as
from experiments.networks import plain

SATURATED = 0.1  # an activation is saturated where its derivative is below this part of its largest
DERIVATIVES = {"tanh": lambda z: 1 - z.tanh() ** 2, "sigmoid": lambda z: 4 * z.sigmoid() * (1 - z.sigmoid())}


@command("depth")
def main(cfg: DictConfig) -> None:
    run.execute(cfg, measure_all)


def measure_all(cfg: DictConfig, folder: Path, device: torch.device) -> None:
    """All depths and initializations: the record and the pictures."""
    prepare(cfg.data)
    training = read_small(cfg.data, cfg.seed, folder / "bad_images.txt")[0].to(device)
    normalize = Normalization.of(training.pixels, cfg.data.normalize)
    draws = {"batch_size": cfg.train.batch_size, "seed": cfg.seed, "pad": cfg.data.pad, "mirror": cfg.data.mirror}
    batches = SmallBatches(training, normalize, **draws)
    generator = torch.Generator().manual_seed(cfg.seed)
    chosen = training[at_random(cfg.init.images, torch.arange(len(training)), generator, "init.images").to(device)]
    cells = []
    for depth in cfg.network.depths:
        for line, init in cfg.lines.items():
            torch.manual_seed(cfg.seed)
            shape, classes = tuple(training.pixels.shape[1:]), len(training.classes)
            network = cfg.network
            model = plain(network.kind, depth, network.activation, network.width, shape, classes).to(device)
            part = folder / "cells" / re.sub(r"\W+", "-", f"{depth} {line}")
            found = measure(cfg, init, model, normalize(chosen.pixels), chosen.labels, batches, part)
            cells.append({"depth": depth, "line": line, **found})
            print(f"{depth} layers, {line}: {said(found)}", flush=True)
    data = f"{cfg.data.name}, {len(training.classes)} classes, {len(training)} images"
    files.write_bytes(folder / "variance.png", draw_variances(cells, cfg.network.depths[-1]))
    files.write_bytes(folder / "map.png", draw_map(cells))
    about = {"data": data, "epoch": len(training) / cfg.train.batch_size, "rule": FLAT, "cells": cells}
    run.write_record(run.record_of(folder, cfg)[0], cfg, device, **about)


def measure(
    cfg: DictConfig,
    init: DictConfig,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batches: SmallBatches,
    folder: Path,
) -> dict:
    """One network: what `signals` gives at the start, and the iteration at which the loss leaves its flat part.

    Returns:
        With `takes_off` (None: not within the training), `diverged` and `failed`, messages or None; `folder` keeps it
        for a run that goes on.
    """
    path = folder / "cell.json"
    if path.exists():
        return json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    found: dict = {"layers": [], "takes_off": None, "diverged": None, "failed": None}
    try:
        set_weights(model, init, images, cfg.seed)
        found["layers"] = signals(model, images, labels, cfg.network.activation)
        train_as(cfg, model, F.cross_entropy, batches, folder)
        constant = constant_loss("softmax", len(batches.images.classes))
        found["takes_off"] = leaves_flat_part(pd.read_csv(folder / "curve.csv"), constant)
    except initializers.InitializationError as error:
        found["failed"] = str(error)
    except FloatingPointError as error:
        found["diverged"] = str(error)
    files.write_json(path, found)
    for checkpoint in folder.glob("checkpoint*.pt"):
        checkpoint.unlink()
    return found


def said(found: dict) -> str:
    """What came of a network, as it is printed."""
    if found["failed"] or found["diverged"]:
        return found["failed"] or found["diverged"]
    taken = found["takes_off"]
    return "does not take off" if taken is None else f"takes off after {taken} iterations"


def signals(model: nn.Module, images: Tensor, labels: Tensor, activation: str) -> list[dict]:
    """For each layer with weights, in order, over all values and images.

    Returns:
        `layer`, `forward`, the variance of its outputs, before the activation; `backward`, that of the gradient of the
        loss of an image (softmax cross-entropy) in them; `saturated`, the share of outputs where the derivative of tanh
        or sigmoid is below `SATURATED` of its largest (None for ReLU). None for what is not finite.
    """
    rows: list[dict] = []

    def look(name: str, z: Tensor) -> None:
        row = {"layer": name, "forward": _variance(z), "saturated": None, "backward": None}
        if activation in DERIVATIVES and name != last:
            row["saturated"] = (DERIVATIVES[activation](z.detach()) < SATURATED).float().mean().item()
        rows.append(row)
        z.register_hook(lambda gradient: row.update(backward=_variance(gradient)))

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    last = [*layers][-1]
    hooks = [layer.register_forward_hook(lambda _, __, z, name=name: look(name, z)) for name, layer in layers.items()]
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return rows


def _variance(values: Tensor) -> float | None:
    variance = values.detach().double().var(correction=0).item()
    return variance if math.isfinite(variance) else None


if __name__ == "__main__":
    main()
