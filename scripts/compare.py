"""Compare initializations, over seeds and over test images.

    python scripts/compare.py init=kmeans init=msra
    python scripts/compare.py "init=kmeans preset=mini" "init=kmeans init.within=false"
    python scripts/compare.py init=mine                        # with every other one of the same experiment
    python scripts/compare.py outputs/voc_cls/demo-kmeans-*    # records, or folders of them

Each argument names runs: by the `init=` of the tables and other settings of the records, by a record, or by a folder.
Runs of other settings than the initialization are compared separately. A difference is the first minus the second, in
points of percent: over seeds with the interval of Welch's t, and within a seed with a paired bootstrap over the test
images, both of 95 %. It is beyond noise where the interval over seeds does not hold 0. Of two, average precision per
class and the training losses stand side by side.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.engine.metrics import RESAMPLES, bootstrap, welch
from experiments.engine.records import (
    by_initialization,
    by_protocol,
    find_records,
    one_of_each_seed,
    read_curve,
    read_records,
)

RUNS = [Path(__file__).resolve().parents[1] / "results" / "runs", Path("outputs")]
METRICS = {  # of each experiment: name in the record, what it is, and the name per class
    "voc_cls": ("map_step", "mean average precision (step AP)", "step"),
    "voc_det": ("map_voc11", "mean average precision (11-point AP)", "voc11"),
    "imagenet": ("top1", "top-1 accuracy", None),
    "small_images": ("top1", "top-1 accuracy", None),
}
POINTS = 10  # rows of the losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="init=NAME and other settings in quotes, a record, or a folder")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="FOLDER", help="of records; else results/runs, outputs")
    parser.error = lambda message: sys.exit(f"error: {' '.join(message.split())}; --help shows what there is")
    arguments = parser.parse_args()
    try:
        folders = arguments.runs or [folder for folder in RUNS if folder.is_dir()]
        texts = [text for name in METRICS for text in compare(name, arguments.what, find_records(folders))]
        if not texts:
            raise ValueError(f"no experiment has records of {' and of '.join(arguments.what)} that can be compared")
        print("\n\n".join(texts))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def compare(experiment: str, what: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """The comparisons among the records of one experiment, one for each protocol that has what is asked for."""
    metric, name, _ = METRICS[experiment]
    named = {word: files(word) for word in what}
    every = sorted({path.resolve(): path for path in [*paths, *chain(*named.values())]}.values())
    records = read_records(every, experiment, {metric: name})
    texts = []
    for protocol, block in by_protocol(records).items() if len(records) else ():
        block = one_of_each_seed(by_initialization(block), ["init"])
        groups = {word: selected(block, word, named[word]) for word in what}
        groups = {word: rows for word, rows in groups.items() if len(rows)}
        if what[0] not in groups:
            continue
        first = groups.pop(what[0])
        if len(what) == 1:
            rest = block[~block.index.isin(first.index)]
            groups = {f"init={init}": rows for init, rows in rest.groupby("init")}
        title = f"{experiment}, {protocol}: {name} in percent\n"
        if groups:
            texts.append(title + summary(metric, what[0], first, groups))
        if len(groups) == len(what) - 1 == 1:
            texts[-1] += "\n" + in_detail(experiment, first, *groups.values())
    return texts


def files(word: str) -> list[Path]:
    """The records that a path names; none where the word is no path."""
    path = Path(word)
    if path.is_dir():
        return find_records([path])
    return [path] if path.is_file() else []


def selected(block: pd.DataFrame, word: str, paths: Sequence[Path]) -> pd.DataFrame:
    """The rows of a block that `word` names, which are of one initialization.

    Raises:
        ValueError: `word` is neither a path nor made of settings, or its runs are of several initializations.
    """
    if paths:
        names = {path.resolve() for path in paths}
        rows = block[[Path(path).resolve() in names for path in block["path"]]]
        if rows["init"].nunique() > 1:
            raise ValueError(f"{word} has runs of {', '.join(sorted(set(rows['init'])))}: name those of one of them")
        return rows
    words = shlex.split(word)
    if not words or not all("=" in part for part in words):
        raise ValueError(f"{word} is no file, no folder and no setting such as init=kmeans: name runs by one of them")
    key = " ".join(part.removeprefix("init=") for part in words if part.startswith(("init=", "init.")))
    rows = block[block["init"] == key] if key else block
    for setting in words:
        name, _, value = setting.partition("=")
        if not name.startswith("init") or name.partition(".")[0] != "init":
            column = name if name in ("preset", "seed") else f"config.{name}"
            rows = rows[rows.get(column, pd.Series(index=rows.index, dtype=str)).astype(str) == value]
    if rows["init"].nunique() > 1:
        raise ValueError(f"{word} has runs of {', '.join(sorted(set(rows['init'])))}: add init=NAME")
    return rows


def summary(metric: str, word: str, first: pd.DataFrame, groups: dict[str, pd.DataFrame]) -> str:
    """A line for the first, and one for each of the others with the difference from it."""
    lines = [["", "mean", "±", "n", "difference", "95 % over seeds", ""], row(word, first[metric])]
    for name, rows in groups.items():
        interval = welch([*first[metric]], [*rows[metric]])
        difference = f"{first[metric].mean() - rows[metric].mean():+.1f}"
        verdict = "one seed: no interval"
        if interval is not None:
            verdict = "within noise" if interval[0] <= 0 <= interval[1] else "beyond noise"
        lines.append([*row(name, rows[metric])[:4], difference, span(interval), verdict])
    return columns(lines)


def row(name: str, values: pd.Series) -> list[str]:
    spread = f"{values.std():.1f}" if len(values) > 1 else ""
    return [name, f"{values.mean():.1f}", spread, str(len(values)), "", "", ""]


def span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Text of lines with cells below each other, the first and the last ones left-aligned."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = ""
    for line in lines:
        last = len(line) - 1
        cells = [
            cell.ljust(width) if number in (0, last) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text += "  ".join(cells).rstrip() + "\n"
    return text


def in_detail(experiment: str, first: pd.DataFrame, second: pd.DataFrame) -> str:
    """Two initializations: a bootstrap within each seed that both have, values per class, and losses."""
    lines, intervals = over_images(first, second)
    text = "over test images, within a seed (paired bootstrap):\n" + "".join(f"  {line}\n" for line in lines)
    kind = METRICS[experiment][2]
    if kind is not None:
        text += "\n" + per_class(kind, first, second, intervals)
    return text + "\n" + losses(first, second)


def over_images(first: pd.DataFrame, second: pd.DataFrame) -> tuple[list[str], tuple[int, np.ndarray] | None]:
    """What the bootstrap says of each seed; and the first with scores, with its intervals per class (classes, 2)."""
    lines, intervals = [], None
    seeds = sorted({*first["seed"]} & {*second["seed"]})
    for seed in seeds:
        rows = [side[side["seed"] == seed].iloc[0] for side in (first, second)]
        paths = [Path(side["path"]).with_name(side["record"].get("scores") or "scores.npz") for side in rows]
        if missing := [path.parent.name for path in paths if not path.is_file()]:
            lines.append(f"seed {seed}: not known, no test scores are kept of {' and of '.join(missing)}")
            continue
        drawn = 100 * bootstrap(*({**np.load(path)} for path in paths))
        means = np.nanmean(drawn, 1)
        interval = np.percentile(means[1:], [2.5, 97.5])
        lines.append(f"seed {seed}: {means[0]:+.1f}, {span(interval)} ({RESAMPLES:,} draws of the test images)")
        intervals = intervals or (seed, np.nanpercentile(drawn[1:], [2.5, 97.5], axis=0).T)
    return lines or ["no seed that both have"], intervals


def per_class(kind: str, first: pd.DataFrame, second: pd.DataFrame, intervals: tuple[int, np.ndarray] | None) -> str:
    """Average precision of each class, with the difference and its intervals."""
    sides = [
        pd.DataFrame([{name: percent(cell[kind]) for name, cell in record["per_class"].items()} for record in side])
        for side in (first["record"], second["record"])
    ]
    over = "" if intervals is None else f"over images, seed {intervals[0]}"
    lines = [["class", "first", "second", "difference", "over seeds", over, ""]]
    for number, name in enumerate(sides[0]):
        values = [side[name] for side in sides]
        means = [side.mean() for side in values]
        images = span(None if intervals is None else intervals[1][number])
        seeds = span(welch(*([*side] for side in values)))
        lines.append([name, *(f"{mean:.1f}" for mean in means), f"{means[0] - means[1]:+.1f}", seeds, images, ""])
    return columns(lines)


def percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def losses(first: pd.DataFrame, second: pd.DataFrame) -> str:
    """The training loss of both at steps that both have, the mean over seeds."""
    curves = []
    for side in (first, second):
        found = [read_curve(row) for _, row in side.iterrows()]
        curves.append(pd.concat([curve.set_index("step")["loss"] for curve in found], axis=1).mean(axis=1))
    both = pd.concat(curves, axis=1, join="inner")
    if both.empty:
        return "training losses: the runs have no steps in common"
    chosen = both.iloc[np.unique(np.linspace(0, len(both) - 1, POINTS).round().astype(int))]
    lines = [["training loss at step", "first", "second", "difference", ""]]
    lines += [[f"{step:.0f}", f"{a:.3f}", f"{b:.3f}", f"{a - b:+.3f}", ""] for step, (a, b) in chosen.iterrows()]
    return columns(lines)


if __name__ == "__main__":
    main()
