"""One command per table: what it runs, what it finds done, what it says of failures, and the tables it makes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import reproduce

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("preset=demo", "train.iterations=5", "seed=0")


@pytest.fixture
def call(finish, demo):
    """Run the script on the demo set: -> subprocess.CompletedProcess, with text."""

    def execute(*words):
        data = [f"data.root={demo / 'set'}", f"data.cache={demo / 'cache'}"] if "all" not in words else []
        return finish([sys.executable, ROOT / "scripts" / "reproduce.py", *words, *data])

    return execute


def records(tmp_path):
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("outputs/*/*/record.json"))]


@pytest.mark.slow
def test_it_goes_on_where_a_run_fails_and_says_which_and_why(call, tmp_path):
    done = call("table2", *SHORT, "init=torch", "train.batch_size=1000,10")
    assert done.returncode == 1
    assert "2 runs, 0 there already, 2 to do; " in done.stdout
    reasons = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(reasons) == 1
    assert re.match(r"failed: voc_cls/demo-torch-seed0-\w+: 600 images do not fill a batch of 1000", reasons[0])
    assert re.search(r"^failed voc_cls/demo-torch-seed0-\w+: 1 of 2, 1 failed", done.stdout, re.M)
    assert re.search(r"^done voc_cls/demo-torch-seed0-\w+: 2 of 2, 1 failed", done.stdout, re.M)
    assert [record["config"]["train"]["batch_size"] for record in records(tmp_path)] == [10]
    assert "`torch`" in (tmp_path / "outputs/tables/table2.md").read_text()
    assert not [*tmp_path.glob("outputs/*/.reproduce-*")]


@pytest.mark.slow
def test_what_is_there_is_not_run_again(call):
    assert call("table2", *SHORT, "init=torch").returncode == 0
    again = call("table2", *SHORT, "init=torch")
    assert again.returncode == 0, again.stderr
    assert "1 runs, 1 there already, 0 to do; nothing is left to do" in again.stdout
    assert "train:" not in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tabel2", "preset=demo"), "error: there is no tabel2: choose table1, table2, "),
        (("preset=demo",), "error: nothing to reproduce is named: choose table1, "),
        (("table2", "preset=demo", "seed=-1"), "error: seed=-1: "),
    ],
)
def test_what_is_not_understood_is_one_line_before_anything_runs(call, tmp_path, words, message):
    done = call(*words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


def test_every_sweep_is_part_of_a_result():
    named = {sweep for _, *sweeps in reproduce.RESULTS.values() for sweep in sweeps}
    assert named == {path.stem for path in (ROOT / "configs" / "sweep").glob("*.yaml")}
    assert all((ROOT / "experiments" / f"{command}.py").is_file() for command, *_ in reproduce.RESULTS.values())


def test_the_time_left_is_that_of_runs_like_them(tmp_path, monkeypatch):
    config = {"experiment": "voc_cls", "model": {"width": 1}, "train": {"iterations": 10, "batch_size": 10}}
    for number, (device, seconds) in enumerate((("this", 20.0), ("this", 40.0), ("this", 30.0), ("other", 1.0))):
        record = {"experiment": "voc_cls", "device": device, "config": config}
        record["times"] = {"train": seconds, "init": 1.0, "evaluate": 4.0}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(reproduce, "device_name", lambda _: "this")
    longer = {**config, "train": {"iterations": 1000, "batch_size": 10}}
    others = {**config, "model": {"width": 2}}
    runs = [reproduce.Run((), 0, Path("r/record.json"), False, "", config) for config in (longer, longer, others)]
    text = reproduce.remaining(runs, tmp_path)
    assert text == "about 1:40:10 one after the other, as measured on this; no run like 1 of them has been timed yet"
    monkeypatch.setattr(reproduce, "device_name", lambda _: "a third")
    assert "measured on other and this" in reproduce.remaining(runs, tmp_path)


def test_figures_are_there_once_they_are_of_the_same_settings(finish, demo, tmp_path):
    words = [f"data.root={demo / 'set'}", f"data.cache={demo / 'cache'}", "output=out", "preset=demo", "init.images=20"]
    line = [sys.executable, ROOT / "experiments" / "change_rate.py", *words, "rates.images=20"]
    line += ["lines={Xavier:{_target_:initializers.xavier}}"]
    plan = [json.loads(finish([*line, "dry=true"]).stdout.splitlines()[-1])]
    assert finish(line).returncode == 0
    for more in ((), ("threads=2",), ("rates.images=21",), ("data.val=train",)):
        plan.append(json.loads(finish([*line, "dry=true", *more]).stdout.splitlines()[-1]))
    assert [found["done"] for found in plan] == [False, True, True, False, False]
    assert plan[0]["record"] == "out/figure1.json"


def test_dry_runs_nothing(run, tmp_path):
    done = run("voc_cls.py", "-m", "init=torch,xavier", "dry=true")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [plan["config"]["init"]["name"] for plan in found] == ["torch", "xavier"]
    assert not any(plan["done"] for plan in found)
    assert not [*tmp_path.glob("outputs/voc_cls")]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_run_the_same(call, tmp_path, launcher):
    words = ("init=torch", "train.batch_size=1000,10,20", f"hydra/launcher={launcher}")
    done = call("table2", *SHORT, *words)
    assert done.returncode == 1
    assert "3 of 3, 1 failed" in done.stdout
    assert "600 images do not fill a batch of 1000" in done.stderr.splitlines()[-1]
    assert sorted(record["config"]["train"]["batch_size"] for record in records(tmp_path)) == [10, 20]


@pytest.mark.slow
def test_an_interrupted_one_goes_on(tmp_path, demo):
    line = [sys.executable, ROOT / "scripts/reproduce.py", "table2", "preset=demo", "init=torch,xavier", "seed=0"]
    line += [f"data.root={demo / 'set'}", f"data.cache={demo / 'cache'}", "train.iterations=2000"]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not [*tmp_path.glob("outputs/voc_cls/demo-torch-*/record.json")]:
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        text = process.stdout.read()
    assert process.returncode == 1
    assert "interrupted: the same command goes on from here" in text
    assert "Traceback" not in text.partition("interrupted")[2]
    folders = sorted(tmp_path.glob("outputs/voc_cls/demo-*"))
    again = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "2 runs, 1 there already, 1 to do" in again.stdout
    assert {*folders} <= {*tmp_path.glob("outputs/voc_cls/demo-*")}
    assert len(records(tmp_path)) == 2


@pytest.mark.slow
def test_all_of_it_at_demo_scale(call, tmp_path):
    began = time.monotonic()
    done = call("all", "preset=demo")
    assert done.returncode == 0, done.stderr[-3000:]
    made = {record["experiment"] for record in records(tmp_path)}
    assert made == {"voc_cls", "voc_det", "imagenet", "small_images", "depth"}
    for name in ("change_rate/figure1.png", "neighbors/figure2.jpg", "figures/figure3-demo.png", "tables/table1.md"):
        assert (tmp_path / "outputs" / name).is_file(), name
    print(f"{time.monotonic() - began:.0f} s")
