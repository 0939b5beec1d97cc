"""Draw the records of runs: Figures 3 and 4 of the paper on ImageNet, loss curves on VOC 2007, and signals in depth.

    python scripts/make_figures.py                                 # results/runs -> results/figures
    python scripts/make_figures.py --runs outputs --out figures    # of one's own

Writes figure3-<preset>.png (CaffeNet) and figure4-<preset>.png (GoogLeNet) for the presets that there are records of,
and <network>-<preset>.png for other networks; names of other data follow. What the paper does not show is a line of its
own, below the paper's; each seed is a curve in the colour of its line. The training losses on VOC 2007 are
voc_cls-<preset>-<iterations>.png and voc_det-<preset>-<iterations>.png. A record of depth.py is drawn as its run does,
depth-<network>-<activation>-variance.png and -map.png. Figures 1 and 2 are drawn by experiments/change_rate.py and
experiments/neighbors.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments.engine.figures import LINES, MARKERS, draw_map, draw_variances, encoded, line_of, style_of
from experiments.engine.records import (
    assigned,
    by_initialization,
    by_protocol,
    classes_in,
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
SMOOTH = 40  # a curve on VOC 2007 is smoothed over such a part of it
START = 0.03  # part of the training whose losses may be cut off there
DATA = {"paper": "imagenet", "mini": "tiny_imagenet", "demo": "demo-folders"}  # of the presets
GROUP = ["config.model._target_", "preset", "config.data.name"]


@dataclass(frozen=True)
class Run:
    """A record: its line in a figure, its curves, and what is needed to draw them.

    - `classes`: their number, where the record states it.
    - `epoch`: iterations in which every image is seen once.
    - `curve`, `validation`: columns `step` and `loss`.
    """

    line: str
    classes: int | None
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
            "no record of imagenet.py, voc_cls.py, voc_det.py or depth.py under "
            f"{', '.join(map(str, folders))}: name its folder as --runs FOLDER"
        )
    return figures


@plt.rc_context({"text.parse_math": False})  # a "$" in a name begins no formula
def make_figures(paths: Sequence[Path]) -> dict[str, bytes]:
    """File name -> PNG of every figure, from the records among `paths`.

    Raises:
        ValueError: a record that cannot be read or drawn, by name.
    """
    records = read_records(paths, "imagenet", {})
    figures: dict[str, bytes] = {}
    for (target, preset, data), group in records.groupby(GROUP) if len(records) else ():
        figure = next((name for name, network in NETWORKS.items() if network == target), None)
        parts = [figure or target.rpartition(".")[2], preset, *([data] if data != DATA.get(preset, "imagenet") else [])]
        stem = re.sub(r"[^\w.-]+", "-", "-".join(parts))
        figures[unused(f"{stem}.png", figures)] = draw(figure, read_runs(group, figure))
    for experiment in ("voc_cls", "voc_det"):
        for protocol, block in by_protocol(read_records(paths, experiment, {})).items():
            if len(block):
                stem = re.sub(r"\W+", "-", f"{experiment} {protocol}".replace(",", "").replace(" iterations", ""))
                figures[f"{stem}.png"] = draw_voc(f"{experiment}, {protocol}", block)
    for _, row in read_records(paths, "depth", {}).iterrows():
        for name, picture in draw_depth(row).items():
            figures[unused(name, figures)] = picture
    return figures


def unused(name: str, figures: Mapping) -> str:
    """The name, or with a number where there is a figure of it: networks of two packages may share a name."""
    stem, dot, end = name.rpartition(".")
    numbered = (f"{stem}-{number}{dot}{end}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in figures)


@plt.rc_context({"text.parse_math": True})  # the powers of ten beside its axes
def draw_depth(row: pd.Series) -> dict[str, bytes]:
    """The pictures that a run of depth.py draws, from its record, by their names here."""
    try:
        cells, network = row["record"]["cells"], row["config"]["network"]
        stem = re.sub(r"[^\w.-]+", "-", f"depth-{network['kind']}-{network['activation']}")
        variances = draw_variances(cells, network["depths"][-1])
        return {f"{stem}-variance.png": variances, f"{stem}-map.png": draw_map(cells)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise no_record(row["path"], repr(error)) from error


def draw_voc(title: str, block: pd.DataFrame) -> bytes:
    """The training losses of a protocol on VOC 2007, a line for each initialization, a curve for each seed; as PNG."""
    block = one_of_each_seed(by_initialization(block), ["init"])
    lines, ends = sorted(set(block["init"])), []
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for _, row in block.iterrows():
        curve = read_curve(row)
        number = lines.index(row["init"])
        text = {"label": f"{row['init']}, n={(block['init'] == row['init']).sum()}".lstrip("_")}
        smooth = curve["loss"].rolling(max(1, len(curve) // SMOOTH), min_periods=1).mean()
        axis.plot(curve["step"], smooth, **style_of(number), **marks(number, curve), **text, linewidth=1)
        ends += [*smooth[curve["step"] > START * curve["step"].max()].agg(["min", "max"])]
    axis.set(title=title, xlabel="iteration", ylabel="training loss (nats), smoothed")
    axis.set_ylim(0.97 * min(ends), 1.03 * max(ends))  # larger first losses would press the others together
    axis.grid(alpha=0.3)
    handles, names = axis.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    names = sorted(once)
    figure.legend([once[name] for name in names], names, loc="outside right center", fontsize="small")
    return encoded(figure, "png", dpi=110)


def marks(number: int, curve: pd.DataFrame) -> dict:
    """Markers of the line of this number, at a tenth of a curve's length from each other, and not all at one place."""
    apart = max(1, len(curve) // 10)
    return {"marker": MARKERS[number % len(MARKERS)], "markevery": (number % apart, apart), "markersize": 4}


def read_runs(group: pd.DataFrame, figure: str | None) -> list[Run]:
    """The runs of a figure, one of each seed, in the order of their lines: the paper's first."""
    choice = CHOICES[figure][0] if figure else None
    group = by_initialization(group)
    group = group.assign(line=[line(row, figure) for _, row in group.iterrows()])
    for _, same in group.groupby("line"):  # settings are named where they tell lines of one name apart
        names = differing(same, [*GROUP, f"config.model.{choice}"])
        group.loc[same.index, "line"] = [", ".join([r["line"], *assigned(r, names)]) for _, r in same.iterrows()]
    group = one_of_each_seed(group, ["line"])
    paper = [*LINES[figure].values()] if figure else []
    place = {name: number for number, name in enumerate(paper)}
    runs = [read_run(row) for _, row in group.iterrows()]
    return sorted(runs, key=lambda run: (place.get(run.line, len(paper)), run.line))


def line(row: pd.Series, figure: str | None) -> str:
    """The line of a record: the paper's name for it, or its initialization."""
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
    return found


def read_run(row: pd.Series) -> Run:
    """The run of a record, with the curves beside it."""
    try:
        epoch = row["record"]["epoch"]
        if isinstance(epoch, bool) or not isinstance(epoch, int | float) or not 0 < epoch < float("inf"):
            raise ValueError(f"epoch={epoch} is no number of iterations")
    except (KeyError, ValueError) as error:
        raise no_record(row["path"], error if isinstance(error, ValueError) else repr(error)) from error
    curves = [read_curve(row, name) for name in ("curve", "validation")]
    return Run(row["line"], classes_in(row["data"]), row["config"]["train"]["iterations"], epoch, *curves)


def draw(figure: str | None, shown: list[Run]) -> bytes:
    """A figure in the paper's layout, as PNG: training loss on the left, validation loss on the right."""
    rows = ROWS.get(figure, ((1, True),))
    lines = [*dict.fromkeys([*LINES.get(figure, {}).values(), *(run.line for run in shown)])]
    longest, classes = max(run.iterations for run in shown), {run.classes for run in shown} - {None, 0, 1}
    picture, axes = plt.subplots(len(rows), 2, figsize=(11, 1 + 3.1 * len(rows)), layout="constrained", squeeze=False)
    for (part, smooth), pair in zip(rows, axes, strict=True):
        for run in shown:
            draw_run(run, lines.index(run.line), pair, part * run.iterations, smooth)
        for axis, title in zip(pair, ("training loss", "validation loss"), strict=True):
            axis.set_title(f"the first {part * longest:,.0f} iterations" if part < 1 else "all iterations", fontsize=10)
            axis.set_xlim(0, part * longest)
            axis.set_xlabel("iteration")
            axis.set_ylabel(title + " (nats)" + ", smoothed" * (smooth and axis is pair[0]))
            axis.grid(alpha=0.3)
            if len(classes) == 1:  # of a network that knows nothing: ln(classes), about 7 for the 1000 of ImageNet
                axis.axhline(math.log(*classes), color="black", linestyle=(0, (1, 3)), linewidth=1, label="chance")
    handles, names = axes[-1, -1].get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))  # of the seeds of a line
    picture.legend(once.values(), once.keys(), loc="outside lower center", ncols=min(len(once), 6))
    return encoded(picture, "png", dpi=110)


def draw_run(run: Run, number: int, pair: Sequence[plt.Axes], last: float, smooth: bool) -> None:
    """The curves of a run up to iteration `last`, in the style of line `number`."""
    training = run.curve["loss"]
    if smooth:
        spacing = run.curve["step"].diff().fillna(run.curve["step"]).median()
        rows_of_epoch = max(1, min(len(training), round(run.epoch / spacing)))
        training = training.rolling(rows_of_epoch, min_periods=1).mean()
    for axis, table, losses in zip(pair, (run.curve, run.validation), (training, run.validation["loss"]), strict=True):
        early = table["step"] <= last
        style = style_of(number) | marks(number, table[early]) | {"linewidth": 1}
        style["label"] = run.line.lstrip("_")  # behind which matplotlib would leave it out
        axis.plot(table["step"][early], losses[early], **style)


if __name__ == "__main__":
    main()
