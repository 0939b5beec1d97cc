import sys
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from initializers import Rates
from initializers._plot import MAX_TICKS

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def make_rates(layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Rates({f"block{i}.conv": 10**i * torch.rand(5, generator=generator) for i in range(layers)})


def test_the_lines_are_the_rates():
    rates = make_rates(8)
    axes = rates.plot()
    for axis, values in zip(axes, (rates.mean, rates.cv), strict=True):
        (line,) = axis.lines
        assert line.get_xdata().tolist() == list(range(8))
        assert line.get_ydata().tolist() == list(values.values())
        assert axis.get_xticks().tolist() == list(range(8))
        assert [tick.get_text() for tick in axis.get_xticklabels()] == rates.layers
        assert axis.get_legend() is None
    assert [axis.get_title() for axis in axes] == ["(a) average change rate", "(b) coefficient of variation"]
    assert [axis.get_yscale() for axis in axes] == ["log", "linear"]


def test_several_in_one_pair_of_axes():
    _, pair = plt.subplots(2, 1)
    first, second = make_rates(3), make_rates(3, seed=1)
    for rates, label in ((first, "kmeans"), (second, "gaussian")):
        assert rates.plot(pair, label=label) == tuple(pair)
    for axis in pair:
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["kmeans", "gaussian"]
    assert [line.get_ydata().tolist() for line in pair[0].lines] == [[*first.mean.values()], [*second.mean.values()]]
    assert len(plt.get_fignums()) == 1


def test_names_do_not_overlap_with_many_layers():
    rates = Rates({f"layer{i}": torch.ones(2) for i in range(100)})
    axes = rates.plot()
    axes[0].figure.draw_without_rendering()
    for axis in axes:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        assert 10 < len(boxes) <= MAX_TICKS
        assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
        shown = [(int(at), text.get_text()) for at, text in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)]
        assert all(name == rates.layers[at] for at, name in shown)


@pytest.mark.parametrize("make", [lambda: 3, lambda: plt.subplots()[1], lambda: plt.subplots(1, 3)[1], lambda: "ab"])
def test_what_is_no_pair_of_axes(make):
    with pytest.raises(ValueError, match=r"^ax is .*: pass a pair of matplotlib Axes"):
        make_rates(2).plot(make())


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        make_rates(2).plot()
