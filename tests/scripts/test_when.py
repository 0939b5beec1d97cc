"""The study of when an initialization helps: how it chooses a learning rate, and what it runs."""

import json
import re
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from experiments.data.demo import make_demo_folders
from experiments.settings import check
from scripts import when

CONFIGS = when.ROOT / "configs"


def settings(overrides):
    return dict(override.split("=", 1) for override in overrides)


def fake(monkeypatch, held_out):
    """Replace the runs by their accuracies at each learning rate on the images held out: -> the overrides of all."""
    calls = []

    def run(overrides):
        calls.append(overrides)
        found = settings(overrides)
        score = held_out[float(found["optimizer.lr"])] if "data.held_out" in found else 0.7
        return when.ROOT / f"run{len(calls)}" / "record.json", {"metrics": {"top1": score}}

    monkeypatch.setattr(when, "run", run)
    return calls


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.1, 0.4, 0.3, 0.2), 0.03), ((0.1, 0.4, 0.4, 0.2), 0.01), ((None, None, 0.0, 0.0), 0.003), ((None,) * 4, 0.003)],
)
def test_the_rate_is_chosen_on_what_is_held_out(monkeypatch, scores, best):
    calls = fake(monkeypatch, dict(zip(when.SGD, scores, strict=True)))
    lr, found = when.study("resnet18", "cifar10-500", "kmeans", ["threads=1"])
    assert (lr, len(found)) == (best, 3)
    choosing, counting = calls[:4], calls[4:]
    assert {float(settings(call)["optimizer.lr"]) for call in choosing} == {*when.SGD}
    for call in choosing:
        named = settings(call)
        assert (named["data.images"], named["data.held_out"], named["seed"]) == ("400", "100", "0")
    assert [settings(call)["seed"] for call in counting] == ["0", "1", "2"]
    for call in counting:
        named = settings(call)
        assert (named["data.images"], float(named["optimizer.lr"])) == ("500", best)
        assert "data.held_out" not in named
    assert all("threads=1" in call for call in calls)


@pytest.mark.parametrize("network", when.NETWORKS)
def test_the_commands_are_understood(monkeypatch, network):
    calls = fake(monkeypatch, dict.fromkeys(when.NETWORKS[network][1], 0.5))
    for images in when.SETS:
        when.study(network, images, "lsuv", [])
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for call in calls[3::7]:
            check(compose("small_images", call))


@pytest.mark.slow
def test_the_study_of_one_initialization(tmp_path):
    make_demo_folders(tmp_path / "set", num_train=25, num_val=2, size=48)
    command = [sys.executable, when.ROOT / "scripts/when.py", f"data.root={tmp_path / 'set'}", "data.name=small"]
    command += [
        "data.test=val",
        "train.iterations=5",
        "train.batch_size=8",
        "init.images=20",
        "device=cpu",
        "threads=1",
    ]
    command += ["--networks", "convnext_atto", "--sets", "cifar10-500", "--inits", "gaussian"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, *folders = done.stdout.splitlines()
    assert re.fullmatch(r"convnext_atto, cifar10-500, gaussian: [\d.]+% at [\d.]+, 3 of 3 runs", said)
    records = [json.loads((tmp_path / folder / "record.json").read_text()) for folder in folders]
    assert [record["seed"] for record in records] == [0, 1, 2]
    assert all(record["data"] == "small, 20 classes, 500 + 40 images" for record in records)
