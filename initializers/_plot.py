"""The paper's Figure 1: how fast each layer learns, and how evenly its columns do. Needs matplotlib."""

import math

MAX_TICKS = 30  # names that fit below one axis


def plot_rates(mean: dict[str, float], cv: dict[str, float], ax=None, label: str | None = None):
    """Draw change rates: (a) the average of each layer, on a log scale, (b) their coefficient of variation.

    Layers are in order of execution. To compare initializations, draw them into the same pair of axes.

    Args:
        mean, cv: average change rate and coefficient of variation, by layer.
        ax: a pair of matplotlib Axes to draw into; None makes a figure.
        label: of the lines, for the legend.

    Returns:
        The pair of Axes; the figure is `axes[0].figure`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `ax` is not a pair of Axes.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install matplotlib") from error

    axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")[1] if ax is None else ax
    axes = tuple(axes) if hasattr(axes, "__iter__") else ()
    if len(axes) != 2 or not all(isinstance(axis, Axes) for axis in axes):
        raise ValueError(f"ax is {ax!r}: pass a pair of matplotlib Axes, such as plt.subplots(1, 2)[1], or None")

    step = math.ceil(len(mean) / MAX_TICKS)
    panels = (("(a) average change rate", mean), ("(b) coefficient of variation", cv))
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.plot(range(len(values)), list(values.values()), marker=".", label=label)
        axis.set_xticks(range(0, len(values), step), [*mean][::step], rotation=90, fontsize="small")
        axis.set_title(title)
        axis.set_xlabel("layer, in order of execution")
        axis.set_ylabel(title.removeprefix("(a) ").removeprefix("(b) "))
        axis.grid(alpha=0.3)
        if label is not None:
            axis.legend()
    axes[0].set_yscale("log")
    return axes
