"""Figure 1, through the command."""

import json
import sys
from pathlib import Path

import pandas as pd
from PIL import Image

from experiments.networks import CaffeNet

ROOT = Path(__file__).resolve().parents[2]
OURS = ["Gaussian (ours)", "k-means (ours)"]
FAR = ["Gaussian .01", "k-means (unscaled)"]


def test_the_figure_its_values_and_its_record(demo, finish, tmp_path):
    size = {"num_outputs": 20, "input_size": 67, "width": 0.25, "fc": 64}
    overrides = [f"model.{name}={value}" for name, value in size.items()]
    overrides += [
        "data=demo",
        f"data.root={demo / 'set'}",
        f"data.cache={demo / 'cache'}",
        f"output={tmp_path / 'out'}",
    ]
    overrides += ["init.images=100", "rates.images=30", "threads=1", "seed=3"]
    command = [sys.executable, ROOT / "experiments" / "change_rate.py", *overrides]
    done = finish(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "figure1.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    table = pd.read_csv(tmp_path / "out" / "figure1.csv")
    layers = [name for name, module in CaffeNet(**size).named_children() if hasattr(module, "weight")]
    lines = list(dict.fromkeys(table["line"]))
    assert lines[:5] == ["Gaussian .01", "Gaussian (caffe)", OURS[0], "k-means (unscaled)", OURS[1]]
    assert {*lines[5:]} == {"Xavier", "MSRA", "LSUV"}
    for line in lines:
        rows = table[table["line"] == line]
        assert [*rows["layer"]] == layers
        spread = rows["mean"].max() / rows["mean"].min()
        assert abs(spread / rows["spread"].iloc[0] - 1) < 1e-3
        assert line not in OURS or spread < 2.5, line
        assert line not in FAR or spread > 4, line
        assert (rows["cv"] > 0).all()
    record = json.loads((tmp_path / "out" / "figure1.json").read_text())
    assert list(record["spread"]) == lines
    assert (record["seed"], record["config"]["rates"]["images"], record["data"]) == (3, 30, "demo")
    assert "torch" in record["versions"]
    with Image.open(tmp_path / "out" / "figure1.png") as image:
        assert image.width > 1.5 * image.height > 500
