"""When does an initialization help? Modern networks on few images, each at the learning rate that suits it.

    python scripts/when.py                                                # all of it, many hours
    python scripts/when.py threads=1 --networks resnet18 --sets cifar10-500 --inits torch kmeans

For each network, set of images and initialization: a run at each learning rate, with a fifth of the training images
held out, seed 0; the rate with the highest top-1 accuracy on those counts, of equals the smaller. Then a run with all
of the training images at that rate for each seed, tested on the test images. Runs that are done are skipped. What
stands before the options goes to experiments/small_images.py as it is. Prints a line for each initialization, and at
the end the folders of the records that count, which go to results/runs/.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SGD, ADAM = (0.1, 0.03, 0.01, 0.003), (3e-3, 1e-3, 3e-4, 1e-4)
# Network -> its settings and its learning rates: the optimizers with which these networks are trained.
NETWORKS = {
    "resnet18": (["model=resnet18", "optimizer=sgd"], SGD),
    "resnet18-no-bn": (["model=resnet18", "model.batch_norm=false", "optimizer=sgd"], SGD),
    "mobilenetv2": (["model=mobilenetv2", "optimizer=sgd"], SGD),
    "convnext_atto": (["model=convnext_atto", "optimizer=adam"], ADAM),
    "vit_tiny": (
        ["model=vit_tiny", "model.patch=8", "optimizer=adam"],
        ADAM,
    ),  # of 4 pixels it takes four times as long
}
TINY = ("data.name=tiny-imagenet-30", "data.root=data/tiny-imagenet-30", "data.test=val")  # scaled to 32 pixels
# Set of images -> how many there are to train on, and their settings; those of CIFAR-10 are drawn from all 50,000.
SETS = {
    "cifar10-500": (500, ["data=cifar10"]),
    "cifar10-2000": (2_000, ["data=cifar10"]),
    "cifar10-10000": (10_000, ["data=cifar10"]),
    "tiny-imagenet-30": (12_000, ["data=cifar10", *TINY]),
}
INITS = ("torch", "lsuv", "gaussian", "kmeans")
SEEDS = (0, 1, 2)
HELD_OUT = 5  # every so manyth training image, while a learning rate is chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in (("networks", NETWORKS), ("sets", SETS), ("inits", INITS)):
        parser.add_argument(f"--{name}", nargs="+", choices=[*choices], default=[*choices])
    parser.add_argument("settings", nargs="*", help="of experiments/small_images.py, as key=value")
    arguments = parser.parse_args()
    folders = []
    for network in arguments.networks:
        for images in arguments.sets:
            for init in arguments.inits:
                lr, found = study(network, images, init, arguments.settings)
                scores = [record["metrics"]["top1"] for _, record in found if record["metrics"]["top1"] is not None]
                mean = f"{statistics.mean(scores):.1%}" if scores else "diverges"
                print(f"{network}, {images}, {init}: {mean} at {lr:g}, {len(scores)} of {len(found)} runs", flush=True)
                folders += [path.parent for path, _ in found]
    print(*folders, sep="\n")


def study(network: str, images: str, init: str, settings: Sequence[str]) -> tuple[float, list[tuple[Path, dict]]]:
    """The learning rate that is chosen, and the records at it, one of each seed."""
    options, rates = NETWORKS[network]
    count, data = SETS[images]
    common = [*options, *data, "data.cache=data/cache", f"init={init}", *settings]
    held_out = count // HELD_OUT
    part = [f"data.images={count - held_out}", f"data.held_out={held_out}", "seed=0"]
    scores = {lr: top1(run([*common, *part, f"optimizer.lr={lr}"])[1]) for lr in sorted(rates)}
    lr = max(scores, key=scores.__getitem__)  # the first of equals
    return lr, [run([*common, f"data.images={count}", f"seed={seed}", f"optimizer.lr={lr}"]) for seed in SEEDS]


def top1(record: dict) -> float:
    """The accuracy of a run; of one that has diverged less than any."""
    return -1.0 if record["metrics"]["top1"] is None else record["metrics"]["top1"]


def run(overrides: Sequence[str]) -> tuple[Path, dict]:
    """A run of small_images.py: path and content of its record."""
    command = [sys.executable, str(ROOT / "experiments" / "small_images.py"), *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # what it said stands above
    path = Path(done.stdout.splitlines()[-1])
    return path, json.loads(path.read_text())


if __name__ == "__main__":
    main()
