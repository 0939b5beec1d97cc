"""Draw Figures 3 and 4 of the paper from the records in results/runs/: loss curves on ImageNet.

    python scripts/make_figures.py

Writes results/figures/figure3-<preset>.png and figure4-<preset>.png for the presets that there are records of. Figures
1 and 2 are drawn by experiments/change_rate.py and experiments/neighbors.py.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments.engine.figures import LINES, encoded, line_of
from experiments.files import write_bytes

RESULTS = Path(__file__).resolve().parents[1] / "results"
NETWORKS = {"figure3": "experiments.networks.CaffeNet", "figure4": "experiments.networks.GoogLeNet"}
# Rows of a figure: the part of the iterations that is shown, and whether the training loss is smoothed over an epoch.
# Those of Figure 3 are the first 10,000, the first 100,000 and all 320,000.
ROWS = {"figure3": ((1 / 32, False), (10 / 32, True), (1, True)), "figure4": ((1, True),)}


@dataclass(frozen=True)
class Run:
    """A record: its line in a figure, its curves, and what is needed to draw them.

    - `epoch`: iterations in which every image is seen once.
    - `curve`, `validation`: columns `step` and `loss` among others.
    """

    figure: str
    line: str
    preset: str
    iterations: int
    epoch: float
    curve: pd.DataFrame
    validation: pd.DataFrame


def main() -> None:
    try:
        figures = make_figures(RESULTS / "runs")
        for name, content in figures.items():
            write_bytes(RESULTS / "figures" / name, content)
            print(RESULTS / "figures" / name)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def make_figures(runs: Path) -> dict[str, bytes]:
    """File name -> PNG of every figure, from the records of imagenet.py anywhere under `runs`.

    Raises:
        ValueError: a record that cannot be read or that no figure has a line for.
    """
    found = [read_run(path) for path in sorted(runs.rglob("imagenet/*/record.json"))]
    groups = sorted({(run.figure, run.preset) for run in found})
    return {f"{figure}-{preset}.png": draw(figure, preset, found) for figure, preset in groups}


def read_run(path: Path) -> Run:
    """The run of a record."""
    try:
        record = json.loads(path.read_text())
        config = record["config"]
        figure = next(name for name, target in NETWORKS.items() if target == config["model"]["_target_"])
        line = line_of(config, figure)
        if line is None:
            raise ValueError(f"{figure} has no line for it")
        curves = (pd.read_csv(path.with_name(record[name])) for name in ("curve", "validation"))
        return Run(figure, line, record["preset"], config["train"]["iterations"], record["epoch"], *curves)
    except (KeyError, TypeError, ValueError, StopIteration, OSError) as error:
        raise ValueError(f"{path} is no record that can be drawn ({error!r}): repair it or remove it") from error


def draw(figure: str, preset: str, found: list[Run]) -> bytes:
    """A figure in the paper's layout, as PNG: training loss on the left, validation loss on the right."""
    rows, lines = ROWS[figure], list(LINES[figure].values())
    shown = [run for run in found if (run.figure, run.preset) == (figure, preset)]
    shown.sort(key=lambda run: lines.index(run.line))
    picture, axes = plt.subplots(len(rows), 2, figsize=(11, 1 + 2.9 * len(rows)), layout="constrained", squeeze=False)
    for (part, smooth), pair in zip(rows, axes, strict=True):
        for run in shown:
            training = run.curve["loss"]
            if smooth:
                rows_of_epoch = max(1, round(run.epoch / run.curve["step"].diff().median()))
                training = training.rolling(rows_of_epoch, min_periods=1).mean()
            curves = ((run.curve["step"], training), (run.validation["step"], run.validation["loss"]))
            for axis, (steps, losses) in zip(pair, curves, strict=True):
                early = steps <= part * run.iterations
                style = {"color": f"C{lines.index(run.line)}", "label": run.line, "linewidth": 1}
                axis.plot(steps[early], losses[early], **style)
        for axis, title in zip(pair, ("training loss", "validation loss"), strict=True):
            axis.set_xlim(0, part * max(run.iterations for run in shown))
            axis.set_xlabel("iteration")
            axis.set_ylabel(title + ", smoothed" * (smooth and axis is pair[0]))
            axis.grid(alpha=0.3)
    handles, names = axes[-1, -1].get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))  # of the seeds of a line
    picture.legend(once.values(), once.keys(), loc="outside lower center", ncols=len(once))
    return encoded(picture, "png", dpi=110)


if __name__ == "__main__":
    main()
