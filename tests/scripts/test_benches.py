"""The benchmarks of training run: in seconds, on generated images, with numbers that mean nothing."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from detection.proposals import CORNERS
from experiments.data.demo import make_demo_folders
from experiments.data.voc import read_split
from scripts import bench_data, bench_init, bench_train


@pytest.fixture
def bench(tmp_path, monkeypatch, demo):
    """Run a benchmark with some of its numbers made small; gives the record that it writes."""

    def go(module, *words, **numbers):
        monkeypatch.setenv("VOC_ROOT", str(demo / "set"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        for name, value in {**numbers, "OUT": tmp_path / "out" / "bench.json"}.items():
            monkeypatch.setattr(module, name, value)
        module.main()
        return json.loads((tmp_path / "out" / "bench.json").read_text())

    return go


def test_training(bench, demo, tmp_path):
    ids = read_split(demo / "set", "train").ids
    corners = np.stack([np.arange(0, 40, 2), np.arange(0, 20), np.arange(50, 90, 2), np.arange(40, 60)])
    proposals = {name: np.tile(corner, len(ids)) for name, corner in zip(CORNERS, corners, strict=True)}
    offsets = 20 * np.arange(len(ids) + 1)
    np.savez(tmp_path / "proposals.npz", ids=np.array(ids), offsets=offsets, **proposals)
    words = (f"data.cache={demo / 'cache'}", f"proposals={tmp_path / 'proposals.npz'}")
    steps = {"classification": 2, "detection": 2, "classification, preset=paper": 2}
    record = bench(bench_train, *words, STEPS=steps, FIXED=2)
    assert record["ratios"].keys() == {f"{name}: training step / bare step" for name in steps}
    assert all(ratio > 0 for ratio in record["ratios"].values())


def small_network(*_, **__):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 7, stride=4), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)),
    )


@pytest.mark.slow  # ResNet-50 at its size in two processes
def test_initialization(bench):
    sizes = {"IMAGES": 8, "LSUV_IMAGES": 8, "MEMORY_IMAGES": (2, 4)}
    stacks = {"DEPTHS": (1, 2), "STACK_IMAGES": 4, "STACK_SIZE": 16, "STACK_CHANNELS": 4}
    record = bench(bench_init, **sizes, **stacks, CaffeNet=small_network, resnet50=small_network)
    committed = json.loads((Path(bench_init.__file__).parents[1] / "results" / "bench" / "init.json").read_text())
    of_size = ("initialization of", "memory")
    names = [{name for name in each["ratios"] if not name.startswith(of_size)} for each in (record, committed)]
    assert names[0] == names[1]
    assert len(record["ratios"]) == len(names[0]) + 2
    assert all(ratio > 0 for ratio in record["ratios"].values())
    assert record["megabytes"].keys() == {"ResNet-50, 2 images", "ResNet-50, 4 images"}


@pytest.mark.slow
def test_data(bench, tmp_path):
    make_demo_folders(tmp_path / "set")
    words = (f"data.root={tmp_path / 'set'}", "data.cache=cache", "workers=1", "train.batch_size=4")
    record = bench(bench_data, *words, BATCHES={"mini": 2, "paper": 1}, REPEATS=1, STEPS=2)
    assert len(record["ratios"]) == 4
    assert 0 < record["ratios"]["mini: share of the training time spent waiting for data"] < 1
