"""Figure 2, through the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments.data.voc import read_split

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def find(demo, finish, tmp_path):
    """Run the command with some settings."""

    def execute(*settings):
        size = {"num_outputs": 20, "input_size": 67, "width": 0.25, "fc": 64}
        overrides = [f"model.{name}={value}" for name, value in size.items()]
        overrides += ["data=demo", f"data.root={demo / 'set'}", f"data.cache={demo / 'cache'}"]
        overrides += [f"output={tmp_path / 'out'}", "init.images=100", "threads=1", "queries=5", "neighbors=3"]
        command = [sys.executable, ROOT / "experiments" / "neighbors.py", *overrides, *settings]
        return finish(command)

    return execute


def test_the_figure_the_neighbours_and_the_record(find, demo, tmp_path):
    done = find()
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert done.stdout.splitlines()[-1] == str(out / "figure2.jpg")
    table = pd.read_csv(out / "figure2.csv", dtype={"query": str, "neighbor": str})
    assert len(table) == 2 * 5 * 3
    test, pool = read_split(demo / "set", "test"), read_split(demo / "set", "trainval")
    for _, group in table.groupby(["line", "query"]):
        assert [*group["rank"]] == [1, 2, 3]
        assert group["similarity"].is_monotonic_decreasing
        for _, row in group.iterrows():
            labels = [split.labels[split.ids.index(row[name])] for split, name in ((test, "query"), (pool, "neighbor"))]
            assert row["shares_a_class"] == bool(((labels[0] > 0) & (labels[1] > 0)).any())
    record = json.loads((out / "figure2.json").read_text())
    assert record["shares_a_class"] == pytest.approx(table.groupby("line")["shares_a_class"].mean().to_dict())
    with Image.open(out / "figure2.jpg") as image:
        assert image.width > image.height > 400

    kept = {path: path.stat().st_mtime_ns for path in out.glob("features-*.npy")}
    assert len(kept) == 2
    assert all(np.load(path).shape == (600, 64) for path in kept)
    assert find().returncode == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("features-*.npy")} == kept
    assert pd.read_csv(out / "figure2.csv", dtype={"query": str, "neighbor": str}).equals(table)
    assert 0 < record["chance"] < 1
    more = "+lines.Late={_target_:initializers.xavier,layer:fc6}"
    assert find("layer=conv5", "queries=1", more).returncode == 0  # others
    others = [np.load(path) for path in out.glob("features-*.npy") if path not in kept]
    assert sorted(found.shape[1] == 64 for found in others) == [False, False, True]
    assert all(found.min() == 0 for found in others)  # behind the ReLU, as Caffe's blobs of these names


def test_an_image_is_no_neighbour_of_its_own(find, tmp_path):
    done = find("pool=test")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out" / "figure2.csv")
    assert len(table) == 30
    assert (table["query"] != table["neighbor"]).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("layer=fc9", "layer=fc9: the network has conv1, relu1, pool1,"),
        ("queries=301", "queries=301: choose between 1 and the 300 images of test"),
        ("neighbors=600", "neighbors=600: choose between 1 and 599"),
    ],
)
def test_bad_settings(find, setting, message, tmp_path):
    done = find(setting)
    assert done.returncode == 1
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.glob("out/figure2*")]
