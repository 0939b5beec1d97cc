"""Draw loss curves on ImageNet from the records of imagenet.py: Figures 3 and 4 of the paper, and those of one's own.

    python scripts/make_figures.py                                 # results/runs -> results/figures
    python scripts/make_figures.py --runs outputs --out figures    # of one's own

Writes figure3-<preset>.png (CaffeNet) and figure4-<preset>.png (GoogLeNet) for the presets that there are records of,
and <network>-<preset>.png for other networks; names of other data follow. What the paper does not show is a line of its
own, below the paper's; each seed is a curve in the colour of its line. Figures 1 and 2 are drawn by
experiments/change_rate.py and experiments/neighbors.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments.engine.figures import LINES, encoded, line_of
from experiments.engine.records import (
    assigned,
    by_initialization,
    differing,
    is_own,
    make_files,
    no_record,
    one_of_each_seed,
    read_curve,
    read_records,
)

RESULTS = Path(__file__).resolve().parents[1] / "results"
NETWORKS = {"figure3": "experiments.networks.CaffeNet", "figure4": "experiments.networks.GoogLeNet"}
# Rows of a figure: the part of the iterations that is shown, and whether the training loss is smoothed over an epoch.
# Those of Figure 3 are the first 10,000, the first 100,000 and all 320,000.
ROWS = {"figure3": ((1 / 32, False), (10 / 32, True), (1, True)), "figure4": ((1, True),)}


CHOICES = {"figure3": ("lrn", "no LRN"), "figure4": ("auxiliary", "single loss")}  # that tell lines of a figure apart
DATA = {"paper": "imagenet", "mini": "tiny_imagenet", "demo": "demo-folders"}  # of the presets
STYLES = ("-", "--", ":", "-.")  # of ten colours each
GROUP = ["config.model._target_", "preset", "config.data.name"]


@dataclass(frozen=True)
class Run:
    """A record: its line in a figure, its curves, and what is needed to draw them.

    - `epoch`: iterations in which every image is seen once.
    - `curve`, `validation`: columns `step` and `loss`.
    """

    line: str
    iterations: int
    epoch: float
    curve: pd.DataFrame
    validation: pd.DataFrame


def main() -> None:
    make_files(__doc__, RESULTS / "runs", RESULTS / "figures", figures_of)


def figures_of(folders: list[Path], paths: list[Path]) -> dict[str, bytes]:
    """The figures of the records `paths` under `folders`."""
    figures = make_figures(paths)
    if not figures:
        raise ValueError(
            f"no record of imagenet.py under {', '.join(map(str, folders))}: name its folder as --runs FOLDER"
        )
    return figures


def make_figures(paths: Sequence[Path]) -> dict[str, bytes]:
    """File name -> PNG of every figure, from the records of imagenet.py among `paths`.

    Raises:
        ValueError: a record that cannot be read or drawn, by name.
    """
    records = read_records(paths, "imagenet", {})
    figures: dict[str, bytes] = {}
    for (target, preset, data), group in records.groupby(GROUP) if len(records) else ():
        figure = next((name for name, network in NETWORKS.items() if network == target), None)
        parts = [figure or target.rpartition(".")[2], preset, *([data] if data != DATA.get(preset, "imagenet") else [])]
        stem = re.sub(r"[^\w.-]+", "-", "-".join(parts))
        numbered = (f"{stem}{'' if number == 1 else f'-{number}'}.png" for number in count(1))
        name = next(name for name in numbered if name not in figures)  # networks of two packages may share a name
        figures[name] = draw(figure, read_runs(group, figure))
    return figures


def read_runs(group: pd.DataFrame, figure: str | None) -> list[Run]:
    """The runs of a figure, one of each seed, in the order of their lines: the paper's first."""
    choice = CHOICES[figure][0] if figure else None
    names = differing(group, [*GROUP, f"config.model.{choice}"])
    group = by_initialization(group)
    group = group.assign(line=[line(row, figure, names) for _, row in group.iterrows()])
    group = one_of_each_seed(group, ["line"])
    paper = [*LINES[figure].values()] if figure else []
    place = {name: number for number, name in enumerate(paper)}
    runs = [read_run(row) for _, row in group.iterrows()]
    return sorted(runs, key=lambda run: (place.get(run.line, len(paper)), run.line))


def line(row: pd.Series, figure: str | None, names: Sequence[str]) -> str:
    """The line of a record: the paper's name for it, or its initialization; and the settings that differ."""
    try:
        found = line_of(row["config"], figure) if figure and not is_own(row["config"]["init"]) else None
        choice, without = CHOICES.get(figure, (None, ""))
        off = figure and row["config"]["model"].get(choice) is False
    except TypeError as error:
        raise no_record(row["path"], repr(error)) from error
    if found is None:
        found = row["init"] + f", {without}" * bool(off)
    else:
        found += row["init"].removeprefix(row["config"]["init"]["name"])
    return ", ".join([found, *assigned(row, names)])


def read_run(row: pd.Series) -> Run:
    """The run of a record, with the curves beside it."""
    path, record = Path(row["path"]), row["record"]
    try:
        epoch = record["epoch"]
        if isinstance(epoch, bool) or not isinstance(epoch, int | float) or not 0 < epoch < float("inf"):
            raise ValueError(f"epoch={epoch} is no number of iterations")
        curves = [read_curve(path.with_name(record[name])) for name in ("curve", "validation")]
        return Run(row["line"], row["config"]["train"]["iterations"], epoch, *curves)
    except (KeyError, TypeError, ValueError) as error:
        raise no_record(path, error if isinstance(error, ValueError) else repr(error)) from error


def draw(figure: str | None, shown: list[Run]) -> bytes:
    """A figure in the paper's layout, as PNG: training loss on the left, validation loss on the right."""
    rows = ROWS.get(figure, ((1, True),))
    lines = [*dict.fromkeys([*LINES.get(figure, {}).values(), *(run.line for run in shown)])]
    picture, axes = plt.subplots(len(rows), 2, figsize=(11, 1 + 2.9 * len(rows)), layout="constrained", squeeze=False)
    for (part, smooth), pair in zip(rows, axes, strict=True):
        for run in shown:
            training = run.curve["loss"]
            if smooth:
                spacing = run.curve["step"].diff().fillna(run.curve["step"]).median()
                rows_of_epoch = max(1, min(len(training), round(run.epoch / spacing)))
                training = training.rolling(rows_of_epoch, min_periods=1).mean()
            curves = ((run.curve["step"], training), (run.validation["step"], run.validation["loss"]))
            for axis, (steps, losses) in zip(pair, curves, strict=True):
                early = steps <= part * run.iterations
                number = lines.index(run.line)
                style = {"color": f"C{number}", "linestyle": STYLES[number // 10 % len(STYLES)], "linewidth": 1}
                style["label"] = run.line.lstrip("_").replace("$", r"\$")  # as text: no formula, and not left out
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
