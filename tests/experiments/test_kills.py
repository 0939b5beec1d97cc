"""Twenty kills at random moments of every command: the result is that of a run which nobody killed."""

import json
import random
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

KILLS = 20
SHORT = ("train.checkpoint_seconds=0",)
COMMANDS = {
    "voc_cls": ("voc_cls.py", "init=pca", *SHORT),
    "voc_det": ("voc_det.py", "init=pca", *SHORT, "evaluate.pictures=1"),
    "imagenet": ("imagenet.py", "init=pca", *SHORT, "train.validate_every=20", "workers=0"),
    "pretrain": ("pretrain.py", "init=pca", *SHORT, "evaluate.pairs=50"),
    "change_rate": ("change_rate.py",),
    "neighbors": ("neighbors.py",),
    "sweep": ("voc_cls.py", "-m", "init=xavier,msra", *SHORT),
}
OTHERS = ("train.iterations=60", "train.log_every=5", "model.dropout=0.5", "evaluate.crops=1", "rates.images=20")


@pytest.fixture
def line(command, demo, tmp_path):
    """The command line of one of `COMMANDS`, which writes below a folder of `tmp_path`."""

    def build(name, folder):
        script, *settings = COMMANDS[name]
        left_out = {"change_rate.py": OTHERS[:2] + OTHERS[3:4], "neighbors.py": OTHERS}.get(script, ())
        left_out += OTHERS[3:] if script in ("imagenet.py", "pretrain.py") else ()
        left_out += OTHERS[4:] if script == "voc_det.py" else ()
        if script == "imagenet.py":
            left_out += (f"data.root={demo / 'set'}",)
            settings += [f"data.root={tmp_path / 'folders'}"]
        words = [str(word) for word in command(script, *settings)]
        return [word for word in words if word not in left_out] + [f"output={tmp_path / folder}"]

    return build


def content(folder: Path) -> dict:
    """What a run left, by name, without what differs from time to time: seconds, dates, and where it lies."""
    found = {}
    left_out = (".lock", "multirun.yaml")  # Hydra's copy of the settings, which name the folder
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in left_out):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found[name] = torch.load(path)["model"]
        elif path.suffix == ".csv":
            found[name] = pd.read_csv(path).drop(columns="seconds", errors="ignore").to_csv()
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def without_times(tree):
    if isinstance(tree, dict):
        gone = ("seconds", "times", "created", "output")
        return {key: without_times(value) for key, value in tree.items() if key not in gone}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_twenty_kills_at_random_moments(line, begin, finish, tmp_path, name):
    began = time.monotonic()
    done = finish(line(name, "whole"))
    assert done.returncode == 0, done.stderr
    longest = time.monotonic() - began

    moments = random.Random(name)
    for _ in range(KILLS):
        process = begin(line(name, "parts"))
        if process.wait(moments.uniform(0, longest)) is None:
            process.kill()
            process.wait()
        else:
            assert process.poll() == 0  # it came to its end before: what is done stays as it is
    done = finish(line(name, "parts"))
    assert done.returncode == 0, done.stderr

    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for file, value in whole.items():
        if not file.endswith("checkpoint.previous.pt"):  # the one before the last depends on where it went on
            assert same(value, parts[file]), file
