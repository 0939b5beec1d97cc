"""Show what a network finds alike before it is trained (Krähenbühl et al. 2016, Figure 2).

    python experiments/neighbors.py

Writes figure2.jpg, the neighbours as figure2.csv and what they were found with as figure2.json. Every setting is in
configs/neighbors.yaml.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from experiments import files
from experiments.data.images import ImageCache, squash
from experiments.data.prepare import prepare
from experiments.data.voc import Split, open_split, set_outputs
from experiments.engine import run
from experiments.engine.command import command
from experiments.engine.figures import COLOURS, encoded
from experiments.engine.initialization import choose, set_weights
from experiments.networks import make_network
from initializers._images import open_image

THUMBNAIL = 120  # pixels


@command("neighbors")
def main(cfg: DictConfig) -> None:
    set_outputs(cfg)
    record = Path(cfg.output) / "figure2.json"
    if cfg.dry:
        run.announce(cfg, record, run.is_of(record, cfg))
        return
    device = run.set_up(cfg.device, cfg.threads, cfg.tf32)
    prepare(cfg.data)
    training = open_split(cfg.data, cfg.data.train, device)[1]
    test, test_cache = open_split(cfg.data, cfg.data.test, device)
    pool, pool_cache = open_split(cfg.data, cfg.pool, device)
    if not 0 < cfg.queries <= len(test.ids):
        raise ValueError(f"queries={cfg.queries}: choose between 1 and the {len(test.ids)} images of {cfg.data.test}")
    if not 0 < cfg.neighbors < len(pool.ids):
        raise ValueError(f"neighbors={cfg.neighbors}: choose between 1 and {len(pool.ids) - 1}")
    queries = torch.randperm(len(test.ids), generator=torch.Generator().manual_seed(cfg.seed))[: cfg.queries].tolist()
    images = choose(cfg, "init", training, range(len(training)))
    same = torch.tensor([[test.ids[query] == image_id for image_id in pool.ids] for query in queries])

    folder, found = Path(cfg.output), {}
    with run.open_folder(folder):
        for line, init in cfg.lines.items():
            model = make_network(cfg.model, len(test.classes)).to(device)
            layer = init.get("layer", cfg.layer)
            set_weights(model, {key: value for key, value in init.items() if key != "layer"}, images, cfg.seed)
            path = folder / f"features-{digest(cfg, init)}.npy"
            if not path.exists():
                buffer = io.BytesIO()
                np.save(buffer, features(cfg, model, layer, pool_cache, range(len(pool_cache)), line).numpy())
                files.write_bytes(path, buffer.getvalue())
            known = F.normalize(torch.from_numpy(np.load(path)))
            similar = F.normalize(features(cfg, model, layer, test_cache, queries, f"{line}, queries")) @ known.T
            found[line] = similar.masked_fill(same, -1).topk(cfg.neighbors)
        table = pd.DataFrame([row for line in found for row in rows(line, test, queries, pool, *found[line])])
        share = table.groupby("line", sort=False)["shares_a_class"].mean().to_dict()
        shared = (test.labels[queries] > 0).float() @ (pool.labels > 0).float().T > 0
        chance = shared[~same].float().mean().item()
        files.write_bytes(folder / "figure2.jpg", draw(test, queries, pool, found, share, chance))
        files.write_text(folder / "figure2.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        run.write_record(record, cfg, device, data=cfg.data.name, shares_a_class=share, chance=chance)
    print("neighbours that show a class of the query: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in share.items()))
    print(f"images at random: {100 * chance:.0f} %; n={len(queries)} queries with {cfg.neighbors} neighbours each")
    print(folder / "figure2.jpg")


def digest(cfg: DictConfig, init: Mapping) -> str:
    """Of all that the features of the pool depend on, so that they are found again or else computed anew."""
    settings = {name: cfg[name] for name in ("model", "layer", "pool", "seed", "init", "crop")}
    settings |= {"images": cfg.data.root, "mean": cfg.data.mean, "train": cfg.data.train, "line": init}
    settings = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    if init.get("weights"):
        status = Path(init.weights).stat()
        settings["weights"] = [status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@torch.no_grad()
def features(
    cfg: DictConfig, model: nn.Module, layer: str | None, cache: ImageCache, index: Sequence[int], label: str
) -> Tensor:
    """What a layer gives, or what comes to the last one, for images squashed to a square: (images, values).

    What a layer gives is taken behind its ReLU if one follows, as in the blob of that name in Caffe, and before what
    follows works in place.
    """
    layers = dict(model.named_modules())
    names = [name for name, module in layers.items() if name and not [*module.children()]]
    if layer is not None and layer not in layers:
        raise ValueError(f"layer={layer}: the network has {', '.join(names)}")
    if layer in names[:-1] and isinstance(layers[after := names[names.index(layer) + 1]], nn.ReLU):
        layer = after
    batches: list[Tensor] = []
    kept: list[Tensor] = []

    def keep(values: Tensor) -> None:
        kept.append(values.flatten(1).cpu().clone())

    if layer is None:
        hook = layers[model.last_layer].register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
    else:
        hook = layers[layer].register_forward_hook(lambda _, __, output: keep(output))
    try:
        for part in tqdm(torch.tensor(index).split(cfg.batch_size), desc=label, disable=None):
            model.eval()(squash(cache, part, cfg.crop.size, cfg.data.mean))
            batches.append(kept.pop())
    finally:
        hook.remove()
    return torch.cat(batches).float()


def rows(line: str, test: Split, queries: list[int], pool: Split, similarity: Tensor, index: Tensor) -> list[dict]:
    """A row for each neighbour."""
    return [
        {
            "line": line,
            "query": test.ids[query],
            "rank": rank + 1,
            "neighbor": pool.ids[i],
            "similarity": similarity[number, rank].item(),
            "shares_a_class": bool(((test.labels[query] > 0) & (pool.labels[i] > 0)).any()),
        }
        for number, query in enumerate(queries)
        for rank, i in enumerate(index[number].tolist())
    ]


def draw(
    test: Split,
    queries: list[int],
    pool: Split,
    found: dict[str, tuple[Tensor, Tensor]],
    share: dict[str, float],
    chance: float,
) -> bytes:
    """A row for each query, with the neighbours that each line finds side by side; as JPEG.

    Below each image are its classes; those that show one of the query's are framed, and marked by a tick.
    """
    count = next(iter(found.values()))[1].shape[1]
    widths = [1, *([0.15] + [1] * count) * len(found)]
    size = (1.15 * sum(widths), 1.35 * len(queries) + 1)
    figure, axes = plt.subplots(len(queries), len(widths), figsize=size, width_ratios=widths, squeeze=False)
    figure.subplots_adjust(0.005, 0.2 / size[1], 0.995, 1 - 0.8 / size[1], 0.04, 0.2)
    for axis in axes.flat:
        axis.axis("off")
    for number, query in enumerate(queries):
        show(axes[number, 0], test, query)
        for group, (_, index) in enumerate(found.values()):
            for rank, i in enumerate(index[number].tolist()):
                same = bool(((test.labels[query] > 0) & (pool.labels[i] > 0)).any())
                show(axes[number, 2 + group * (count + 1) + rank], pool, i, same)
    axes[0, 0].set_title("query", fontsize=11, loc="left")
    for group, line in enumerate(found):
        title = f"{line}\n{100 * share[line]:.0f} % show a class of the query"
        axes[0, 2 + group * (count + 1)].set_title(title, fontsize=11, loc="left")
    text = f"{len(queries)} queries with {count} neighbours each; of images at random {100 * chance:.0f} %"
    figure.suptitle(text, fontsize=11, x=0.005, y=1 - 0.1 / size[1], ha="left", va="top")  # inches, for any height
    return encoded(figure, "jpg", dpi=100)


def show(axis: plt.Axes, split: Split, number: int, same: bool = False) -> None:
    """An image, squashed to a square as the network sees it, and the names of its classes."""
    axis.imshow(open_image(split.image_paths[number]).resize((THUMBNAIL, THUMBNAIL)))
    names = ", ".join(name for name, label in zip(split.classes, split.labels[number], strict=True) if label > 0)
    mark, colour = ("\u2713 ", COLOURS[0]) if same else ("", "black")
    axis.text(
        0, THUMBNAIL + 3, mark + (names if len(names) < 21 else f"{names[:19]}…"), fontsize=6.5, va="top", color=colour
    )
    if same:
        corner, side = (-0.5, -0.5), THUMBNAIL
        axis.add_patch(plt.Rectangle(corner, side, side, fill=False, edgecolor=COLOURS[0], linewidth=3))


if __name__ == "__main__":
    main()
