"""Pre-train a network without labels, by the relative position of patches (Doersch et al., 2015).

    python experiments/pretrain.py

Every setting is in configs/pretrain.yaml. A run that was killed goes on when the same command is given again. The last
line printed is the file of the weights, for `voc_cls.py init=pretrained init.weights=...`.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from experiments import files
from experiments.data.draws import seeded
from experiments.data.images import Crops, ImageCache, crop
from experiments.data.prepare import prepare
from experiments.data.voc import classes_of, open_split
from experiments.engine import run
from experiments.engine.command import command
from experiments.engine.initialization import choose, set_weights
from experiments.engine.trainer import train_as
from experiments.networks import make_network

POSITIONS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]  # of the second patch: down, right


@command("pretrain")
def main(cfg: DictConfig) -> None:
    run.execute(cfg, train_and_test, result="weights.safetensors")


def train_and_test(cfg: DictConfig, folder: Path, device: torch.device) -> None:
    """The run: its record and the weights of the network."""
    prepare(cfg.data)
    training, test = (open_split(cfg.data, cfg.data[part], device)[1] for part in ("train", "test"))
    options = {"size": cfg.crop.size, "mean": tuple(cfg.data.mean), **cfg.patches}
    trunk = make_network(cfg.model, len(classes_of(cfg.data))).to(device)
    if not run.has_checkpoint(folder):
        images = choose(cfg, "init", training, range(len(training))) if "images" in cfg.init else None
        print(set_weights(trunk, cfg.init, images, cfg.seed) or "")
    torch.manual_seed(cfg.seed)  # of the last layer and of dropout
    model = Pairs(trunk).to(device)
    pairs = PatchPairs(training, batch_size=cfg.train.batch_size, seed=cfg.seed, **options)
    train_seconds = train_as(cfg, model, F.cross_entropy, pairs, folder)
    began = time.perf_counter()
    accuracy = evaluate(model, test, options, cfg.evaluate, cfg.seed)
    fold_batch_norm(trunk)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in trunk.state_dict().items()}
    files.write_bytes(folder / "weights.safetensors", save(tensors))
    run.write_record(
        run.record_of(folder, cfg)[0],
        cfg,
        device,
        data=f"{cfg.data.name}, {len(training)} + {len(test)} images",
        metrics={"accuracy": accuracy},
        times={"train": train_seconds, "evaluate": time.perf_counter() - began},
        curve="curve.csv",
    )
    print(f"{100 * accuracy:.1f} % of the positions are right, chance is {100 / len(POSITIONS):.1f} %")


class Pairs(nn.Module):
    """A network without its last layer over both patches of a pair, and a linear layer over what it gives of both.

    Input: float (N, 2, 3, size, size). Output: logits of the position of the second patch (N, 8).
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        features = trunk.get_submodule(trunk.last_layer).in_features
        std = trunk.std_factors[trunk.last_layer] * 0.01
        trunk.set_submodule(trunk.last_layer, nn.Identity())
        self.trunk = trunk
        self.position = nn.Linear(2 * features, len(POSITIONS))
        nn.init.normal_(self.position.weight, 0, std)
        nn.init.zeros_(self.position.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.position(self.trunk(x.flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1))


class PatchPairs:
    """Endless batches of pairs of patches: `pairs(step)` depends on the arguments here and on `step` alone.

    The first patch is the middle of a grid of 3 x 3, the second one of the other eight.

    Args:
        cache: the images.
        batch_size: pairs a batch, each of an image of its own draw.
        seed: of all draws.
        size: pixels of the side of a patch as the network sees it.
        mean: as in `crop`.
        gap, jitter: between patches, and how far each is moved, in sides of a patch.
        min_side: part of the image's short side that the grid fills at least.
    """

    def __init__(
        self,
        cache: ImageCache,
        *,
        batch_size: int,
        seed: int,
        size: int,
        mean: Sequence[float],
        gap: float,
        jitter: float,
        min_side: float,
    ):
        self.cache, self.batch_size, self.seed, self.size, self.mean = cache, batch_size, seed, size, mean
        self.gap, self.jitter, self.min_side = gap, jitter, min_side
        self.heights, self.widths = cache.heights.cpu(), cache.widths.cpu()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Pairs (batch_size, 2, 3, size, size) and positions int64 (batch_size,) of iteration `step`."""
        generator = seeded(self.seed, step)
        index = torch.randint(len(self.cache), (self.batch_size,), generator=generator)
        position = torch.randint(len(POSITIONS), (self.batch_size,), generator=generator)
        windows = self.windows(self.heights[index].double(), self.widths[index].double(), position, generator)
        patches = [crop(self.cache, index, window, self.size, self.mean) for window in windows]
        return torch.stack(patches, 1), position.to(patches[0].device)

    def windows(self, heights: Tensor, widths: Tensor, position: Tensor, generator: torch.Generator) -> list[Crops]:
        """The middle patches, and those at the positions; inside the images."""
        draws = torch.rand(7, len(position), dtype=torch.float64, generator=generator)
        grid = torch.minimum(heights, widths) * (self.min_side + (1 - self.min_side) * draws[0])
        side = grid / (3 + 2 * self.gap + 2 * self.jitter)
        top, left = (heights - grid) * draws[1], (widths - grid) * draws[2]
        steps = torch.tensor(POSITIONS, dtype=torch.float64)[position]
        found = []
        for down, right, moves in ((0, 0, draws[3:5]), (steps[:, 0], steps[:, 1], draws[5:7])):
            y = top + side * ((1 + down) * (1 + self.gap) + 2 * self.jitter * moves[0])
            x = left + side * ((1 + right) * (1 + self.gap) + 2 * self.jitter * moves[1])
            found.append(Crops(y, x, side, side, flip=torch.zeros(len(side), dtype=torch.bool)))
        return found


@torch.no_grad()
def evaluate(model: nn.Module, cache: ImageCache, options: Mapping, settings: DictConfig, seed: int) -> float:
    """Share of the positions that the model gets right, on pairs of other images."""
    model.eval()
    pairs = PatchPairs(cache, batch_size=1, seed=seed, **options)
    right = 0
    for first in range(0, settings.pairs, settings.batch_size):
        batch = [pairs(step) for step in range(first, min(first + settings.batch_size, settings.pairs))]
        inputs, position = (torch.cat(parts) for parts in zip(*batch, strict=True))
        right += (model(inputs).argmax(1) == position).sum().item()
    return right / settings.pairs


def fold_batch_norm(trunk: nn.Module) -> None:
    """Fold each BatchNorm into the layer before it, as in evaluation: the weights then fit a network without it.

    Doersch et al. pre-train with BatchNorm, too. Nothing then keeps the scales of the layers in proportion, so that
    the folded weights may be far from one change rate, for `init.rescale=true` to mend.
    """
    trunk.eval()
    for (name, layer), (norm_name, norm) in pairwise(list(trunk.named_children())):
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
            trunk.set_submodule(name, fuse(layer, norm))
            trunk.set_submodule(norm_name, nn.Identity())


if __name__ == "__main__":
    main()
