"""Figures 3 and 4 are drawn from records, line for line as the paper's."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.engine.figures import LINES
from scripts import make_figures

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "Reference": ["init=caffe"],
    "MSRA": ["init=msra"],
    "Random (ours)": ["init=gaussian"],
    "k-means (ours)": ["init=kmeans"],
    "k-means, no LRN (ours)": ["init=kmeans", "model.lrn=false"],
}


def write(runs, name, *overrides, steps=320, value=1.0):
    """A record as experiments/imagenet.py writes it, of a loss that falls and goes up and down within an epoch."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("imagenet", [*overrides, f"train.iterations={steps}", "train.log_every=1"])
    folder = runs / "imagenet" / name
    folder.mkdir(parents=True)
    record = {"experiment": "imagenet", "preset": config.preset, "epoch": 8.0, "curve": "curve.csv"}
    record |= {"validation": "validation.csv", "config": OmegaConf.to_container(config, resolve=True)}
    (folder / "record.json").write_text(json.dumps(record))
    step = np.arange(1, steps + 1)
    pd.DataFrame({"step": step, "loss": value + (-1.0) ** step}).to_csv(folder / "curve.csv", index=False)
    step = step[9::10]
    pd.DataFrame({"step": step, "loss": 2 * value, "top1": 0.1, "top5": 0.5}).to_csv(
        folder / "validation.csv", index=False
    )


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, kept open."""
    found = []
    monkeypatch.setattr(plt, "close", found.append)
    yield found
    monkeypatch.undo()
    plt.close("all")


def test_figure_3_has_three_rows_and_the_papers_lines(tmp_path, drawn):
    for number, (line, overrides) in enumerate(SETTINGS.items()):
        write(tmp_path, line, *overrides, value=3.0 + number)
    assert [*SETTINGS] == [*LINES["figure3"].values()]
    (content,) = make_figures.make_figures(tmp_path).values()
    assert content.startswith(b"\x89PNG")
    (figure,) = drawn
    axes = np.array(figure.axes).reshape(3, 2)
    for row, end in zip(axes, (10, 100, 320), strict=True):
        for axis, points in zip(row, (end, end // 10), strict=True):
            lines = {line.get_label(): line for line in axis.get_lines()}
            assert [*lines] == [*SETTINGS]
            assert all(len(line.get_xdata()) == points for line in lines.values())
            assert len({line.get_color() for line in lines.values()}) == 5
    ours = 3.0 + [*SETTINGS].index("k-means (ours)")
    spread = [np.ptp(row[0].get_lines()[3].get_ydata()[8:]) for row in axes]
    assert spread == pytest.approx([2, 0, 0])  # smoothed over an epoch, but in the first row
    assert axes[2, 0].get_lines()[3].get_ydata()[-1] == pytest.approx(ours)
    assert axes[2, 1].get_lines()[3].get_ydata()[-1] == pytest.approx(2 * ours)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*SETTINGS]


def test_each_network_and_preset_has_a_figure(tmp_path):
    write(tmp_path, "a", "init=caffe")
    write(tmp_path, "b", "init=caffe", "preset=mini")
    write(tmp_path, "c", "init=kmeans", "model=googlenet", "preset=mini")
    assert [*make_figures.make_figures(tmp_path)] == ["figure3-mini.png", "figure3-paper.png", "figure4-mini.png"]
    assert make_figures.make_figures(tmp_path / "nothing") == {}


def test_several_seeds_share_a_line(tmp_path, drawn):
    for seed in range(2):
        write(tmp_path, f"seed{seed}", "init=kmeans", "model=googlenet", f"seed={seed}")
    make_figures.make_figures(tmp_path)
    axis = drawn[0].axes[0]
    assert [line.get_label() for line in axis.get_lines()] == ["k-means, single loss (ours)"] * 2
    assert len({line.get_color() for line in axis.get_lines()}) == 1
    assert len(drawn[0].legends[0].get_texts()) == 1


def test_a_record_that_no_figure_shows_is_named(tmp_path):
    write(tmp_path, "pca", "init=pca")
    with pytest.raises(ValueError, match=r"pca/record.json is no record that can be drawn .*figure3 has no line"):
        make_figures.make_figures(tmp_path)
    (tmp_path / "imagenet" / "pca" / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"KeyError\('config'\)"):
        make_figures.make_figures(tmp_path)


def test_the_committed_figures_are_those_of_the_records():
    names = [*make_figures.make_figures(ROOT / "results" / "runs")]
    assert sorted(path.name for path in (ROOT / "results" / "figures").glob("figure[34]-*.png")) == names
