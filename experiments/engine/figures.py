"""Figures: the lines of the paper's, and the content of a file, to be written whole or not at all."""

import io
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
