"""`tensorboard=true` writes what curve.csv holds; nothing else does."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.engine import run as engine


def test_scalars_are_the_rows_of_the_curve(run, tmp_path):
    done = run("voc_cls.py", "init=torch", "train.iterations=15", "tensorboard=true")
    assert done.returncode == 0, done.stderr
    folder = Path(tmp_path / done.stdout.splitlines()[-1]).parent
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    curve = pd.read_csv(folder / "curve.csv")
    for name in ("loss", "lr"):
        assert [event.step for event in events.Scalars(name)] == [5, 10, 15]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([*curve[name]], rel=1e-5)

    other = run("voc_cls.py", "init=torch", "train.iterations=15", "seed=1")
    assert not [*(tmp_path / other.stdout.splitlines()[-1]).parent.glob("tensorboard*")]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = {"dry": False, "tensorboard": True, "output": str(tmp_path), "experiment": "x", "preset": "demo", "seed": 0}
    cfg = OmegaConf.create(cfg | {"init": {"name": "torch"}})
    with pytest.raises(ValueError, match="tensorboard=true needs the package tensorboard: pip install tensorboard"):
        engine.execute(cfg, None)
