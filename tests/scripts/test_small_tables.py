"""The tables of small images, and of how long the loss stays flat."""

import json

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.engine.convergence import CONVERGES, FLAT
from experiments.engine.records import find_records
from scripts import make_tables

PAPER = make_tables.RESULTS / "paper"
CONFIGS = make_tables.RESULTS.parent / "configs"
MNIST = ("data=mnist", "model=mnist_fitnet", "optimizer=rmsprop")


@pytest.fixture
def add(tmp_path):
    """Write a record as a command writes it."""

    def write(name, *overrides, command="small_images", losses=(), **content):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose(command, list(overrides))
        record = {"experiment": command, "preset": config.preset, "seed": config.seed, "epoch": 100.0}
        record |= {"curve": "curve.csv"}
        record |= {"device": "a CPU", "versions": {"torch": "2"}, "git_commit": "f" * 40, "git_dirty": False}
        record |= {"config": OmegaConf.to_container(config, resolve=True), **content}
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record))
        lines = [f"{10 * number},{loss}" for number, loss in enumerate(losses, 1)]
        (folder / "curve.csv").write_text("\n".join(["step,loss", *lines]) + "\n")

    return write


def small(top1, iteration=50, holds=True):
    return {
        "metrics": {"loss": None if top1 is None else 1.0, "top1": top1, "top5": top1},
        "converges": {"rule": CONVERGES, "holds": holds},
        "leaves_flat_part": {"rule": FLAT, "iteration": iteration},
    }


def make(tmp_path):
    return make_tables.make_tables(find_records([tmp_path / "runs"]), PAPER)


def test_activations_are_columns_and_what_does_not_converge_is_shown(add, tmp_path):
    add("a", "init=lsuv", "model.activation=tanh", **small(0.5))
    add("b", "init=lsuv", "model.activation=tanh", "seed=1", **small(0.6, 150))
    add("c", "init=lsuv", "model.activation=sigmoid", **small(0.1, None, holds=False))
    add("d", "init=he", "model.activation=sigmoid", **small(None, None, holds=False))
    add("e", "init=orthonormal_unscaled", "model.activation=tanh", **small(None, None, holds=False))
    add("f", "init=orthonormal_unscaled", "model.activation=tanh", "seed=1", **small(0.4, None))
    found = make(tmp_path)
    rows = [line for line in found["small_images.md"].splitlines() if line.startswith("| ")]
    assert rows == [
        "| `init=` | model.activation=sigmoid | model.activation=tanh |",
        "| --- | ---: | ---: |",
        "| `he` | does not converge | - |",
        "| `lsuv` | does not converge | 55.00 ± 7.07 / 1.00, n=2 |",
        "| `orthonormal init.within=false init.between=false` | - | 40.00, n=2, 1 converge |",
    ]
    assert f"- rule: {CONVERGES}\n- data:" in found["small_images.md"]
    path = tmp_path / "small_images.csv"
    path.write_text(found["small_images.csv"])
    assert len(pd.read_csv(path)) == 6


def test_batch_norm_is_a_row_of_its_own(add, tmp_path):
    add("a", "model=resnet", "model.depth=20", "model.batch_norm=false", "init=lsuv", **small(0.5))
    add("b", "model=resnet", "model.depth=20", "model.batch_norm=true", "init=lsuv", **small(0.6))
    add("c", "model=resnet", "model.depth=56", "model.batch_norm=true", "init=lsuv", **small(0.7))
    add("d", *MNIST, "init=lsuv", **small(0.9))
    rows = [line for line in make(tmp_path)["small_images.md"].splitlines() if line.startswith("| ")]
    assert rows == [
        "| `init=` | top-1 / epochs |",
        "| --- | ---: |",
        "| `lsuv` | 90.00 / 0.50 |",
        "| `init=` | model.depth=20 | model.depth=56 |",
        "| --- | ---: | ---: |",
        "| `lsuv` | 50.00 / 0.50 | - |",
        "| `lsuv model.batch_norm=true` | 60.00 / 0.50 | 70.00 / 0.50 |",
    ]


def test_what_is_published_stands_in_brackets(add, tmp_path):
    add("a", *MNIST, "init=lsuv", "loss=hinge", **small(0.99612))
    add("b", *MNIST, "init=lsuv", **small(0.99512))
    add("c", "init=lsuv", "loss=hinge", **small(0.9))
    text = make(tmp_path)["small_images.md"]
    assert "| `lsuv` | 99.61 / 0.50 (99.6) | 99.51 / 0.50 |" in text
    assert "| `lsuv` | 90.00 / 0.50 |" in text
    assert "data.name=mnist, optimizer.name=rmsprop" in text


def test_on_few_images_each_initialization_has_its_own_learning_rate(add, tmp_path):
    few = ("model=resnet18", "data.images=500")
    add("a", *few, "init=lsuv", "optimizer.lr=0.03", **small(0.5))
    add("b", *few, "init=torch", "optimizer.lr=0.1", **small(0.4))
    add("c", *few, "init=torch", "optimizer.lr=0.01", "data.held_out=100", **small(0.9))
    text = make(tmp_path)["small_images.md"]
    assert text.count("## ") == 1
    assert ", 500 training images\n" in text
    assert "| `lsuv` | 50.00 / 0.50, lr 0.03 |\n| `torch` | 40.00 / 0.50, lr 0.1 |" in text
    assert "90.00" not in text


@pytest.mark.parametrize("change", [{"converges": {"holds": 1, "rule": ""}}, {"metrics": {}}, {"epoch": 0}])
def test_a_damaged_record_is_named(add, tmp_path, change):
    add("a", "init=lsuv", **small(0.5) | change)
    with pytest.raises(ValueError, match=r"a/record\.json is no result record"):
        make(tmp_path)


def test_how_long_imagenets_loss_stays_flat(add, tmp_path):
    about = {"data": "imagenet, 10 classes, 80 + 20 images", "metrics": {"top1": 0.4, "top5": 0.8}}
    add("a", "init=lsuv", command="imagenet", losses=[3, 2.2, *[2.0] * 9], **about)  # log(10) = 2.3
    add("b", "init=caffe", command="imagenet", losses=[2.3] * 20, **about)
    text = make(tmp_path)["flat_part.md"]
    assert FLAT in text
    assert "| `lsuv` | 0.200 | 40.0 | 80.0 | 0 |" in text
    assert "| `caffe` | never | 40.0 | 80.0 | 0 |" in text


def test_without_records_there_are_no_such_tables(add, tmp_path):
    (tmp_path / "runs").mkdir()
    assert not {"small_images.md", "flat_part.md"} & make(tmp_path).keys()


def cell(depth, line, takes_off, values=(1.0, 2.0), **more):
    layers = [
        {"layer": f"{i}", "forward": v, "backward": 1 / v if v else v, "saturated": 0.1} for i, v in enumerate(values)
    ]
    last = {"layer": "top", "forward": 9.0, "backward": 9.0, "saturated": None}
    found = {"takes_off": takes_off, "diverged": None, "failed": None} | more
    return {"depth": depth, "line": line, "layers": [*layers, last], **found}


def test_what_trains_at_which_depth(add, tmp_path):
    cells = [cell(4, "He", 20), cell(8, "He", None, (1.0, 4.0, 1e-30)), cell(4, "Xavier", 30, diverged="loss is nan")]
    cells.append(cell(8, "Xavier", None, (0.0, None)))
    cells += [{"depth": depth, "line": "ours", "layers": [], "takes_off": None} for depth in (4, 8)]
    cells[-2:] = [last | {"diverged": None, "failed": "no layer learns"} for last in cells[-2:]]
    add("a", "network.activation=tanh", "network.depths=[4,8]", command="depth", cells=cells)
    add("b", "network.activation=tanh", "network.depths=[4,8]", "seed=1", command="depth", cells=cells[:2])
    found = make(tmp_path)
    first, second = found["depth.md"].split("## ")[1:]
    assert first.startswith("linear, tanh (paper, 300 iterations")
    assert second.startswith("linear, tanh, seed 1 (")
    assert [line for line in first.splitlines() if line.startswith("| ")] == [
        "|  | 4 | 8 | outputs | gradient | saturated |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| He | 20 | - | 1.0e+00 → 1.0e-30 | 1.0e+00 → 1.0e+30 | 10% → 10% |",
        "| Xavier | diverges | - | 0 → ? | 0 → ? | 10% → 10% |",
        "| ours | fails | fails |  |  |  |",
    ]
    path = tmp_path / "depth.csv"
    path.write_text(found["depth.csv"])
    assert len(pd.read_csv(path)) == 8


@pytest.mark.parametrize("cells", [None, 5, [], [1], [{"depth": 4}], [cell(4, "He", "soon")], [cell(4, "He", 10)] * 2])
def test_a_record_of_depth_that_is_damaged_is_named(add, tmp_path, cells):
    add("a", command="depth", **({} if cells is None else {"cells": cells}))
    with pytest.raises(ValueError, match=r"record\.json is no result record .*: repair it, or move it"):
        make(tmp_path)
