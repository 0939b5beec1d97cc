"""Figures: the lines of the paper's, the pictures of depth, and the content of a file, which is written whole."""

import io
import math
from collections.abc import Mapping

import matplotlib.pyplot as plt

from experiments.engine import run

LINES = {
    "figure3": {
        ("caffe", True): "Reference",
        ("msra", True): "MSRA",
        ("gaussian", True): "Random (ours)",
        ("kmeans", True): "k-means (ours)",
        ("kmeans", False): "k-means, no LRN (ours)",
    },
    "figure4": {
        ("caffe", True): "Reference",
        ("kmeans", True): "k-means (ours)",
        ("kmeans", False): "k-means, single loss (ours)",
    },
}


# Colours that colour-blind people tell apart (Okabe & Ito, 2008), without yellow and black, which white or dark paper
# swallows. Lines beyond them have another dash and marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style_of(number: int) -> dict:
    """Colour and dash of the line of this number, as options of `Axes.plot`."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def line_of(cfg: Mapping, figure: str) -> str | None:
    """The line of a figure of the paper that a configuration draws; None if it has no such line.

    Raises:
        ValueError: an unknown figure.
    """
    if figure not in LINES:
        raise ValueError(f"published={figure}: choose figure3, figure4 or null")
    choice = {"figure3": "lrn", "figure4": "auxiliary"}[figure]
    return LINES[figure].get((run.init_key(cfg["init"]), cfg["model"].get(choice)))


def encoded(figure: plt.Figure, kind: str, dpi: int) -> bytes:
    """The figure as "png" or "jpg"; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, pil_kwargs={"quality": 85} if kind == "jpg" else None)
    plt.close(figure)
    return buffer.getvalue()


def draw_variances(cells: list[dict], depth: int | str) -> bytes:
    """The variances in the networks of one depth against the number of the layer, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    shown = [cell for cell in cells if cell["depth"] == depth and cell["layers"]]
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        for number, cell in enumerate(shown):
            values = [row[way] or math.nan for row in cell["layers"]]
            style = style_of(number) | {"marker": ".", "linewidth": 1, "label": cell["line"]}
            axis.plot(range(1, len(values) + 1), values, **style)
        axis.set_yscale("log")
        axis.set_xlabel("layer")
        axis.set_ylabel({"forward": "variance of the outputs", "backward": "variance of the gradient"}[way])
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"at the start, {depth} layers" if isinstance(depth, int) else f"at the start, VGG {depth}")
    return encoded(figure, "png", dpi=110)


def draw_map(cells: list[dict]) -> bytes:
    """Depth by initialization: the iteration at which the loss leaves its flat part, or nothing; as PNG."""
    depths, lines = [*dict.fromkeys(c["depth"] for c in cells)], [*dict.fromkeys(c["line"] for c in cells)]
    figure, axis = plt.subplots(figsize=(2.6 + 0.9 * len(depths), 1 + 0.4 * len(lines)), layout="constrained")
    taken = {(cell["line"], cell["depth"]): cell["takes_off"] for cell in cells}
    values = [
        [float("nan") if taken[line, depth] is None else taken[line, depth] for depth in depths] for line in lines
    ]
    axis.imshow(values, aspect="auto", cmap="viridis_r")
    for row, line in enumerate(lines):
        for column, depth in enumerate(depths):
            iteration = taken[line, depth]
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
            axis.text(column, row, "-" if iteration is None else iteration, ha="center", va="center", bbox=box)
    axis.set_xticks(range(len(depths)), depths)
    axis.set_yticks(range(len(lines)), lines)
    axis.set_xlabel("layers")
    axis.set_title("iterations until it takes off", fontsize=10)
    return encoded(figure, "png", dpi=110)
