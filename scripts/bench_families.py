"""Initialize every classification network of torchvision, or of timm, on real images, and record what became of it.

    python scripts/bench_families.py                        # all 80 of torchvision; hours on two CPU cores
    python scripts/bench_families.py resnet50 vit_b_16      # some
    python scripts/bench_families.py --timm                 # of timm all of up to 60 million parameters; needs timm
    python scripts/bench_families.py timm/levit_128s        # one of timm's

Needs VOC 2007: set VOC_ROOT, or have data/VOCdevkit. Writes results/bench/families.json after each network of
torchvision, and appends a line to results/bench/timm.jsonl after each of timm. Those that are there already are
skipped, unless --force is given: the same command goes on after it was killed. A network of torchvision that fails is
tried again the next time. One of timm runs in a process of its own, which may take CPU_LIMIT seconds; if it fails, its
line has the reason.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from functools import cache
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.transforms.v2 import functional as TF

import initializers
from experiments.data.voc import read_split
from experiments.engine.run import device_name, versions
from experiments.files import append_line, read_lines, write_json
from initializers._images import open_image
from initializers._layer import Call
from initializers._layers import Layers, forward

OUT = Path(__file__).resolve().parents[1] / "results" / "bench" / "families.json"
TIMM_OUT = OUT.with_name("timm.jsonl")
SEED = 0
CENTRED = 0.05  # a mean below this counts as one that was made 0
BIAS = 0.1  # mean of the outputs that `initialize` aims at
IMAGES = 32
FEW = 16  # images for networks of more than LARGE parameters, and for those that need large images
LARGE = 150_000_000
TIMM = "timm/"  # before the names of its networks
MOST = 60_000_000  # parameters of its networks
CPU_LIMIT = 1800  # seconds of processor time for one of its networks
LARGE_VITS = ("vit_l_16", "vit_h_14")  # take an hour each at 224 px; their constructors take a size
# Pixels; the smallest that the network takes, or about that.
SIZES = dict.fromkeys(LARGE_VITS, 112) | {"inception": 96, "vit": 224, "maxvit": 224}
SIZE = 64
FILTERS = ("gaussian", "kmeans")
FILTERS_OF_TIMM = ("gaussian",)  # so that all of them take days and not weeks
# A spread above this is one that parts which are not homogeneous keep up; nonhomogeneous="scale" is tried then.
PINNED_SPREAD = 1.5


def networks_of_timm() -> list[list[str]]:
    """Names of timm's architectures, by module."""
    import timm

    modules: dict[str, list[str]] = {}
    for name in timm.list_models():
        modules.setdefault(timm.models.model_entrypoint(name).__module__, []).append(f"{TIMM}{name}")
    return [*modules.values()]


def build(name: str, **options) -> nn.Module:
    """A network with random weights, as its constructor makes it, in evaluation mode and without dropout.

    Dropout is active while a network is initialized, and would hide in noise what is looked at here.

    Args:
        options: keyword arguments of the constructor of a network of timm.
    """
    torch.manual_seed(SEED)
    model = _made(name, **options).eval()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    return model


def _made(name: str, **options) -> nn.Module:
    if name.startswith(TIMM):
        import timm

        return timm.create_model(name.removeprefix(TIMM), **options)
    # Drawing truncated normals takes these two a minute, for weights that are replaced.
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name in LARGE_VITS:
        options["image_size"] = image_size(name)
    return torchvision.models.get_model(name, weights=None, **options)


@torch.no_grad()
def build_small(name: str) -> tuple[nn.Module, int]:
    """A network of timm, and the side in pixels of the images for it.

    The smallest of a few that it takes; where it takes its own size only, as a ViT does, the smallest of a few that it
    can be made for.
    """
    model = build(name)
    for size in (64, 96, 128):
        with contextlib.suppress(Exception):  # whatever it does not like
            model(torch.zeros(2, 3, size, size))
            return model, size
    for size in (96, 128, 160, 192):
        with contextlib.suppress(Exception):
            made = build(name, img_size=size)
            made(torch.zeros(2, 3, size, size))
            return made, size
    return model, model.default_cfg["input_size"][-1]


def image_size(name: str) -> int:
    """Pixels of the side of the images for a network of torchvision."""
    return next((size for start, size in SIZES.items() if name.startswith(start)), SIZE)


def load_images(count: int, size: int) -> Tensor:
    """Images of VOC 2007's train split, evenly spread over it, normalised as for ImageNet: (count, 3, size, size)."""
    paths = read_split(os.environ.get("VOC_ROOT", "data/VOCdevkit"), "train").image_paths
    images = []
    for path in paths[:: len(paths) // count][:count]:
        image = TF.resize(open_image(path), [size])
        images.append(TF.to_image(TF.center_crop(image, [size, size])))
    return TF.normalize(torch.stack(images).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@torch.no_grad()
def channel_statistics(model: nn.Module, images: Tensor) -> dict[str, tuple[bool, Tensor, Tensor]]:
    """Of the first use of each layer: has it a bias to set, and mean and standard deviation of its output channels."""
    found = {}

    def visit(call: Call, _: Tensor, compute) -> Tensor:
        output = compute()
        layer = call.layer
        if layer.name not in found:
            values = output.movedim(-1 if layer.linear else -(layer.weight.ndim - 1), 0).flatten(1)
            pieces = [values[i].double() for i in range(len(values))]
            mean = torch.stack([piece.mean() for piece in pieces])
            std = torch.stack([piece.std(correction=0) for piece in pieces])
            found[layer.name] = layer.bias is not None, mean, std
        return output

    forward(Layers(model), (images,), visit)
    return found


def deviations(report: initializers.Report, measured: dict[str, tuple[bool, Tensor, Tensor]]) -> dict[str, float]:
    """How far the layers are from unit deviation and from the mean: BIAS, or 0 where there is no bias to set.

    Channels that do not vary, and layers whose input does not, which the report notes, are not counted. Without a
    bias, a layer whose input hardly varies but along its mean cannot be centred: such channels are counted, as
    `uncentred`.
    """
    notes = {layer.name: layer.note for layer in report.layers}
    dead = {name for name, note in notes.items() if "do not vary" in note}
    found = {"std": 0.0, "mean": 0.0, "mean_without_bias": 0.0, "uncentred": 0}
    for name, (biased, mean, std) in measured.items():
        if "the same for all images" in notes.get(name, ""):
            continue
        alive = (std > 0.5) | torch.tensor(name not in dead)
        mean, std = mean[alive], std[alive]
        found["std"] = max(found["std"], (std - 1).abs().max().item())
        if biased:
            found["mean"] = max(found["mean"], (mean - BIAS).abs().max().item())
        else:
            centred = mean.abs() < CENTRED
            found["uncentred"] += int((~centred).sum())
            found["mean_without_bias"] = max(found["mean_without_bias"], (mean * centred).abs().max().item())
    return found


def log_variance(rates: list[float]) -> float:
    """Variance of the logarithms."""
    return torch.tensor(rates).double().log().var(correction=0).item()


def measure(name: str, model: nn.Module, images: Tensor, filters: str) -> dict:
    """Initialize a network and give all that is recorded about it.

    In two calls, to look at the network between the steps: they are what one call of `initialize` does.
    """
    within = initializers.initialize(model, images, filters, between=False, seed=SEED)
    deviation = deviations(within, channel_statistics(model, images))
    before = outputs(model, images)
    exact = outputs(model.double(), images.double())
    model.float()  # which gives back the same bits
    between = initializers.rescale(model, images, seed=SEED)
    rates = [(layer.rate_before, layer.rate_after) for layer in between.layers if layer.rate_after is not None]
    row = {
        "layers": len(between.layers),
        "waiting": len(between.layers) - len(rates),  # which do not learn yet
        "spread_before": between.spread_before,
        "spread_after": between.spread_after,
        "held_by": between.held_by,
        "log_variance_before": log_variance([rate for rate, _ in rates]),
        "log_variance_after": log_variance([rate for _, rate in rates]),
        "output_change": between.output_change,
        "output_change_all_images": relative_change(before, outputs(model, images)),
        "rounding": relative_change(exact, before.double()),  # of the network itself: float32 against float64
        "powers_of_two": between.powers_of_two,
        "seconds": within.seconds + between.seconds,
        "deviation": deviation,
        "noted_layers": sum(bool(layer.note) for layer in within.layers),
        "fallbacks": sum(layer.note.startswith("Gaussian filters") for layer in within.layers),
        "kept": within.kept,
        "spread_after_scaling": None,
        "output_change_scaling": None,
    }
    if between.spread_after > PINNED_SPREAD:
        scaled = initializers.rescale(model, images, seed=SEED, nonhomogeneous="scale")
        row |= {"spread_after_scaling": scaled.spread_after, "output_change_scaling": scaled.output_change}
    return row


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Of all images, in batches."""
    found = [model(batch) for batch in images.split(16)]
    return torch.cat([output if isinstance(output, Tensor) else output[0] for output in found])


def relative_change(before: Tensor, after: Tensor) -> float:
    """In norm."""
    return ((after - before).norm() / before.norm()).item()


def summary(row: dict) -> str:
    """What is recorded, in a line."""
    deviation = row["deviation"]
    numbers = {
        "layers": f"{row['layers']}",
        "spread": f"{row['spread_before']:.4g} -> {row['spread_after']:.4g}",
        "log variance": f"{row['log_variance_before']:.3g} -> {row['log_variance_after']:.3g}",
        "change": f"{row['output_change']:.1e} (all {row['output_change_all_images']:.1e})",
        "rounding": f"{row['rounding']:.1e}" + ", powers of two" * row["powers_of_two"],
        "std": f"{deviation['std']:.1e}",
        "mean": f"{deviation['mean']:.1e} {deviation['mean_without_bias']:.1e} ({deviation['uncentred']} not)",
        "scaled": f"{row['spread_after_scaling']}",
    }
    return "; ".join(f"{name} {value}" for name, value in numbers.items()) + f"; {row['seconds']:.1f} s"


def bench(name: str) -> dict:
    """The record of one network."""
    record = {"filters": {}}
    for filters in FILTERS_OF_TIMM if name.startswith(TIMM) else FILTERS:
        if name.startswith(TIMM):
            model, record["size"] = build_small(name)
            record["module"] = type(model).__module__.rpartition(".")[2]
        else:
            model, record["size"] = build(name), image_size(name)
        record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        few = name.startswith(TIMM) or record["parameters"] > LARGE or record["size"] > 100
        record["images"] = FEW if few else IMAGES
        record["filters"][filters] = measure(name, model, load_images(record["images"], record["size"]), filters)
        print(f"{name:20} {filters:8} {summary(record['filters'][filters])}", flush=True)
        del model
        gc.collect()
    return record


def about() -> dict:
    """What the numbers are of."""
    found = {"versions": versions(), "device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    return found | {"data": "VOC 2007 train", "seed": SEED}


def bench_timm(modules: list[list[str]], force: bool) -> None:
    """A line of TIMM_OUT for each network of timm, with its measures or the reason why it has none.

    Networks of more than MOST parameters are skipped, and their lines say so.

    Args:
        modules: names of networks, by module: the smallest of each comes first, then the second.
        force: do those again that have a line.
    """
    TIMM_OUT.parent.mkdir(parents=True, exist_ok=True)
    if TIMM_OUT.exists() and not TIMM_OUT.read_bytes().endswith(b"\n"):
        append_line(TIMM_OUT, "")  # ends the line at which it was killed
    known = {} if force else read_lines(TIMM_OUT, "network")
    for turn in range(max(map(len, modules))):
        for names in modules:
            if turn == 0:  # and not for all of them at once, which takes minutes
                names.sort(key=parameters)
            if turn < len(names) and names[turn] not in known:
                _in_a_process(names[turn])
    print(TIMM_OUT)


@cache
def parameters(name: str) -> int:
    """How many a network has; 0 where it cannot be built, as its line will say."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return sum(parameter.numel() for parameter in build(name).parameters())
    return 0


def _in_a_process(name: str) -> None:
    """Measure a network of timm in a process of its own, as it may take this one down."""
    process = multiprocessing.get_context("fork").Process(target=_bench_one, args=(name,))
    process.start()
    process.join()
    if process.exitcode:
        too_long = process.exitcode == -signal.SIGXCPU
        reason = f"more than {CPU_LIMIT} s" if too_long else f"its process ended with {process.exitcode}"
        _append(name, {"failed": reason})


def _bench_one(name: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 10))
    try:
        count = parameters(name)
        _append(name, {"skipped": f"{count:,} parameters"} if count > MOST else bench(name))
    except Exception as error:
        traceback.print_exc()
        _append(name, {"failed": " ".join(f"{type(error).__name__}: {error}".split())})


def _append(name: str, record: dict) -> None:
    known = about() | {"timm": importlib.metadata.version("timm")}
    append_line(TIMM_OUT, json.dumps({"network": name} | record | known))


def main() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "networks",
        nargs="*",
        metavar="network",
        help="of torchvision.models, or timm/NAME; all of torchvision where none is given",
    )
    parser.add_argument("--timm", action="store_true", help=f"all of timm of up to {MOST:,} parameters")
    parser.add_argument("--force", action="store_true", help="do those again that are recorded already")
    arguments = parser.parse_args()
    if unknown := sorted({name for name in arguments.networks if not name.startswith(TIMM)} - {*names}):
        parser.error(f"no classification network of torchvision: {', '.join(unknown)}")
    timm = [name for name in arguments.networks if name.startswith(TIMM)]
    if arguments.timm or timm:
        bench_timm([timm] if timm else networks_of_timm(), arguments.force)
    given = [name for name in arguments.networks if name not in timm]
    if given or not (arguments.timm or timm):
        bench_torchvision(given or names, arguments.force)


def bench_torchvision(names: list[str], force: bool) -> None:
    """The record of each network of torchvision, in OUT."""
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    networks, failed = known.get("networks", {}), known.get("failed", {})
    if known and known["versions"] != versions() and not force:
        sys.exit(f"error: {OUT} is of other versions ({known['versions']}): pass --force, or move it away")
    tried = []
    for name in names:
        if name in networks and not force:
            continue
        try:
            networks[name] = bench(name)
            failed.pop(name, None)
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            tried.append(name)
        OUT.parent.mkdir(parents=True, exist_ok=True)
        write_json(OUT, about() | {"networks": dict(sorted(networks.items())), "failed": dict(sorted(failed.items()))})
    print(OUT)
    if tried:
        sys.exit(f"error: failed: {', '.join(tried)}")


if __name__ == "__main__":
    main()
