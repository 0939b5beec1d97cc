"""Figures 3 and 4 are drawn from records, line for line as the paper's."""

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.engine.figures import LINES, style_of
from experiments.engine.records import find_records
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
    record |= {
        "seed": config.seed,
        "device": "a CPU",
        "versions": {"torch": "2"},
        "git_commit": None,
        "git_dirty": None,
    }
    record |= {"validation": "validation.csv", "config": OmegaConf.to_container(config, resolve=True)}
    (folder / "record.json").write_text(json.dumps(record))
    step = np.arange(1, steps + 1)
    pd.DataFrame({"step": step, "loss": value + (-1.0) ** step}).to_csv(folder / "curve.csv", index=False)
    step = step[9::10]
    pd.DataFrame({"step": step, "loss": 2 * value, "top1": 0.1, "top5": 0.5}).to_csv(
        folder / "validation.csv", index=False
    )


def make(folder):
    return make_figures.make_figures(find_records([folder]))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, kept open and not encoded."""
    found = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(plt, "close", found.append)
    yield found
    monkeypatch.undo()
    plt.close("all")


def test_figure_3_has_three_rows_and_the_papers_lines(tmp_path, drawn):
    for number, (line, overrides) in enumerate(SETTINGS.items()):
        write(tmp_path, line, *overrides, value=3.0 + number)
    assert [*SETTINGS] == [*LINES["figure3"].values()]
    make(tmp_path)
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
    figures = make(tmp_path)
    assert [*figures] == ["figure3-mini.png", "figure3-paper.png", "figure4-mini.png"]
    assert all(content.startswith(b"\x89PNG") for content in figures.values())
    assert make_figures.make_figures([]) == {}


def test_the_loss_of_guessing_is_drawn_where_the_classes_are_known(tmp_path, drawn):
    write(tmp_path, "a", "init=caffe")
    path = tmp_path / "imagenet/a/record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "imagenet, 1000 classes, 5 + 5 images"}))
    make(tmp_path)
    assert "chance" in [text.get_text() for text in drawn[0].legends[0].get_texts()]
    for axis in drawn[0].axes:
        (chance,) = (line for line in axis.get_lines() if line.get_label() == "chance")
        assert [*chance.get_ydata()] == pytest.approx([6.9078, 6.9078], abs=1e-4)
        assert axis.get_title()
        assert "(nats)" in axis.get_ylabel()


def test_losses_on_voc_have_a_figure_of_each_protocol(tmp_path, drawn):
    for name in ("mini-kmeans-seed1-27f2c65f", "mini-kmeans-seed2-a9b8d6ea", "mini-msra-seed0-6e533c43"):
        shutil.copytree(ROOT / "results/runs/voc_cls" / name, tmp_path / "voc_cls" / name)
    figures = make(tmp_path)
    assert sorted(name[:18] for name in figures) == ["voc_cls-mini-20000", "voc_cls-mini-80000"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["kmeans, n=2"]
    lines = drawn[0].axes[0].get_lines()
    assert len(lines) == 2
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 1


def test_lines_are_told_apart_without_colour_once_the_colours_are_used_up():
    styles = [(style_of(number)["color"], style_of(number)["linestyle"]) for number in range(28)]
    assert len({*styles}) == 28


def test_several_seeds_share_a_line(tmp_path, drawn):
    for seed in range(2):
        write(tmp_path, f"seed{seed}", "init=kmeans", "model=googlenet", f"seed={seed}")
    make(tmp_path)
    axis = drawn[0].axes[0]
    assert [line.get_label() for line in axis.get_lines()] == ["k-means, single loss (ours)"] * 2
    assert len({line.get_color() for line in axis.get_lines()}) == 1
    assert len(drawn[0].legends[0].get_texts()) == 1


def test_what_the_paper_does_not_show_is_a_line_of_its_own(tmp_path, drawn):
    write(tmp_path, "own", "init=pca", "init.name=_mine$|$")
    write(tmp_path, "reference", "init=caffe")
    write(tmp_path, "no-lrn", "init=pca", "model.lrn=false")
    write(tmp_path, "rate", "init=caffe", "optimizer.lr=0.5")
    write(tmp_path, "target", "init=kmeans", "init._target_=my_module.my_init")
    assert [*make(tmp_path)] == ["figure3-paper.png"]
    assert [line.get_label() for line in drawn[0].axes[0].get_lines()] == [
        "Reference, optimizer.lr=0.01",
        "Reference, optimizer.lr=0.5",
        "mine$|$",
        "kmeans init._target_=my_module.my_init",
        "pca, no LRN",
    ]
    assert len({line.get_color() for line in drawn[0].axes[0].get_lines()}) == 5


def test_networks_and_data_of_ones_own_have_figures_of_their_own(tmp_path, drawn):
    write(tmp_path, "a", "init=caffe")
    write(tmp_path, "b", "init=caffe", "model._target_=torchvision.models.resnet18")
    write(tmp_path, "c", "init=caffe", "model._target_=my.resnet18")
    write(tmp_path, "d", "init=caffe", "data.name=my/birds")
    names = ["figure3-paper.png", "figure3-paper-my-birds.png", "resnet18-paper.png", "resnet18-paper-2.png"]
    assert sorted(make(tmp_path)) == sorted(names)


def test_the_newest_record_of_a_seed_is_drawn(tmp_path, drawn, capsys):
    for name in ("a", "b"):
        write(tmp_path, name, "init=caffe", f"threads={len(name)}", f"data.root={name}")
    make(tmp_path)
    assert len(drawn[0].axes[0].get_lines()) == 1
    assert "the same run more than once" in capsys.readouterr().err


def test_a_run_that_ended_before_its_first_validation_is_drawn(tmp_path, drawn):
    write(tmp_path, "a", "init=pca", steps=5)
    write(tmp_path, "b", "init=kmeans", steps=5)
    make(tmp_path)
    training, validation = drawn[0].axes[-2:]
    assert [len(line.get_xdata()) for line in training.get_lines()] == [5, 5]
    assert [len(line.get_xdata()) for line in validation.get_lines()] == [0, 0]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("record.json", "{}"),
        ("record.json", ""),
        ("curve.csv", ""),
        ("curve.csv", "step,loss\n"),
        ("curve.csv", "step,loss\n1,a\n"),
        ("validation.csv", "step,loss\n2,1\n1,1\n"),
    ],
)
def test_a_damaged_record_or_curve_is_named_and_nothing_is_written(tmp_path, monkeypatch, file, content):
    write(tmp_path, "a", "init=pca")
    (tmp_path / "imagenet" / "a" / file).write_text(content)
    monkeypatch.setattr("sys.argv", ["make_figures.py", "--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=rf"error: .*{file}.* move it") as error:
        make_figures.main()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_run_of_depth_has_its_two_pictures(tmp_path, drawn):
    (source,) = (ROOT / "results" / "runs" / "depth").glob("paper-vgg-*")
    for name in ("a", "b"):
        shutil.copytree(source, tmp_path / name)
    record = json.loads((tmp_path / "b" / "record.json").read_text())
    depths = record["config"]["network"]["depths"]
    cells = [cell for cell in record["cells"] if cell["depth"] == depths[-1]]
    names = ["depth-vgg-relu-variance.png", "depth-vgg-relu-map.png"]
    assert [*make(tmp_path)] == names + [name.replace(".png", "-2.png") for name in names]
    line = drawn[0].axes[0].get_lines()[0]
    assert (line.get_label(), line.get_ydata()[0]) == (cells[0]["line"], cells[0]["layers"][0]["forward"])
    assert drawn[0].axes[0].get_yticklabels()[0].get_parse_math()  # of powers of ten
    record["cells"] = [{"depth": 4}]
    (tmp_path / "b" / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{tmp_path / 'b' / 'record.json'} is no result record .*line.*: repair it"):
        make(tmp_path)


def test_the_committed_figures_are_those_of_the_records(monkeypatch):
    monkeypatch.setattr(plt.Figure, "savefig", lambda *_, **__: None)  # of which the names count
    names = [*make(ROOT / "results" / "runs")]
    committed = [path.name for path in (ROOT / "results" / "figures").glob("*-*.png")]
    assert sorted(committed) == sorted(names), "run `python scripts/make_figures.py`"
