import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import initializers
from experiments import files
from experiments.engine import run


def config(*overrides):
    with initialize_config_dir(str(run.Path(run.__file__).parents[2] / "configs"), version_base="1.3"):
        return compose("voc_cls", list(overrides))


@pytest.fixture
def full_disk(monkeypatch):
    """Nothing gets through to the disk any more."""

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


# The folder of a run.


def test_the_folder_says_what_runs():
    folder = run.run_folder(config("init=pca", "preset=mini", "seed=3", "output=there"))
    assert folder.parent == run.Path("there/voc_cls")
    assert folder.name.startswith("mini-pca-seed3-")


def test_where_and_how_fast_it_runs_does_not_tell_runs_apart():
    plain = run.run_folder(config())
    same = ("device=cuda", "threads=1", "data.cache=elsewhere", "train.checkpoint_seconds=1", "data.root=elsewhere")
    for setting in (*same, "evaluate.crops=1", "evaluate.batch_size=1", "data.test=val"):
        assert run.run_folder(config(setting)) == plain


def test_what_is_computed_does():
    settings = ["preset=mini", "init=pca", "init.bias=0", "seed=1", "tf32=true", "optimizer=adam", "optimizer.lr=1"]
    settings += ["train.iterations=1", "train.log_every=1", "model.width=2", "crop.mirror=false"]
    folders = {run.run_folder(config(*change)) for change in [[], *([setting] for setting in settings)]}
    assert len(folders) == 1 + len(settings)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ([], "kmeans"),
        (["init.filters=pca"], "kmeans init.filters=pca"),
        (["init.filters=null", "init.between=false"], "kmeans init.filters=null init.between=false"),
        (["init=gaussian", "init.within=false", "init.between=false"], "gaussian_unscaled"),
        (["init=pca", "init.name=mine"], "mine"),
    ],
)
def test_the_key_of_an_initialization(settings, key):
    assert run.init_key(config(*settings).init) == key


# The record of a run.


def record(folder, name="record.json", *overrides):
    folder.mkdir(exist_ok=True)
    files.write_json(folder / name, {"config": OmegaConf.to_container(config(*overrides), resolve=True)})
    return folder / name


def test_another_evaluation_has_a_record_of_its_own(tmp_path):
    folder = tmp_path / "run"
    assert run.record_of(folder, config()) == (folder / "record.json", False)
    first = record(folder)
    assert run.record_of(folder, config()) == (first, True)
    second, done = run.record_of(folder, config("evaluate.crops=1"))
    assert not done
    assert second.name.startswith("record-")
    record(folder, second.name, "evaluate.crops=1")
    assert run.record_of(folder, config("evaluate.crops=1")) == (second, True)
    assert run.record_of(folder, config()) == (first, True)
    third, done = run.record_of(folder, config("data.test=val"))
    assert not done
    assert third not in (first, second)


def test_a_record_of_images_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = record(tmp_path / "run", "record.json", "data.root=here")
    assert run.record_of(tmp_path / "run", config(f"data.root={tmp_path}/here")) == (path, True)
    message = r"record\.json is of data\.root=here, not of there: give data\.root=here if .* or else set output"
    with pytest.raises(ValueError, match=message):
        run.record_of(tmp_path / "run", config("data.root=there"))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"config": 3}', '"config"'])
def test_a_damaged_record_is_not_taken_for_a_result(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(ValueError, match=r"record\.json is damaged: delete it, and the same command evaluates"):
        run.record_of(tmp_path, config())


def test_a_run_that_another_commit_overtakes_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_git", lambda *_: "a" * 40)
    monkeypatch.setattr(run, "commit", cache(run.commit.__wrapped__))  # as when the code was just loaded

    def work(cfg, folder, device):
        monkeypatch.setattr(run, "_git", lambda *_: "b" * 40)  # as after `git pull`
        run.write_record(folder / "record.json", cfg, device)

    run.execute(config(f"output={tmp_path}", "device=cpu", "threads=1"), work)
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["git_commit"] == "a" * 40


def test_the_commit_is_that_of_this_code(tmp_path):
    known = run.commit()
    assert len(known["git_commit"]) == 40
    assert known["git_dirty"] in (True, False)
    # A copy of the code within a repository of something else: its commit says nothing of the code.
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    copy = tmp_path / "copy"
    shutil.copytree(
        run.Path(run.__file__).parents[1], copy / "experiments", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(run.Path(initializers.__file__).parent, copy / "initializers")
    code = "from experiments.engine import run; print(run.__file__, run.commit())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(copy)},
    )
    assert done.stdout == f"{copy}/experiments/engine/run.py {{'git_commit': None, 'git_dirty': None}}\n"


def test_only_one_process_works_in_a_folder(tmp_path):
    with run.open_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        with pytest.raises(OSError, match=r"another process is at work in .*a/b"), run.open_folder(tmp_path / "a/b"):
            pass
    with run.open_folder(tmp_path / "a" / "b"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/run \(Not a directory\): set output"):
        run.open_folder(tmp_path / "file" / "run").__enter__()


# Files are written whole or not at all.


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    for content in ({"a": [1, 2.5, None]}, {}):
        files.write_json(path, content)
        assert json.loads(path.read_text()) == content
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"a": number})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match=r"cannot write .*a.json \(No space left on device\): make room"):
        files.write_json(path, {})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_lines_are_appended(tmp_path):
    files.append_line(tmp_path / "a.csv", "1,2")
    files.append_line(tmp_path / "a.csv", "3,4")
    assert (tmp_path / "a.csv").read_text() == "1,2\n3,4\n"
    with pytest.raises(OSError, match=r"cannot write .* \(Is a directory\)"):
        files.append_line(tmp_path, "5,6")


# Checkpoints.


def state(step):
    return {"step": step, "weights": torch.arange(1000.0) + step, "nested": [{"a": torch.tensor(1)}, None]}


def load_quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run.load_checkpoint(folder)


def test_no_checkpoint(tmp_path):
    assert load_quietly(tmp_path) is None
    assert not run.has_checkpoint(tmp_path)


def test_the_newest_checkpoint_is_loaded_and_the_one_before_kept(tmp_path):
    for step in range(3):
        run.save_checkpoint(tmp_path, state(step))
        loaded = load_quietly(tmp_path)
        assert loaded["step"] == step
        assert torch.equal(loaded["weights"], state(step)["weights"])
        assert run.has_checkpoint(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert torch.load(tmp_path / "checkpoint.previous.pt")["step"] == 1


def test_killed_between_the_two_renames(tmp_path):
    run.save_checkpoint(tmp_path, state(0))
    os.rename(tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt")
    assert run.has_checkpoint(tmp_path)
    assert load_quietly(tmp_path)["step"] == 0
    run.save_checkpoint(tmp_path, state(1))
    assert load_quietly(tmp_path)["step"] == 1


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run.save_checkpoint(tmp_path, {"settings": run.settings_of(config())})
    assert run.load_checkpoint(tmp_path, run.settings_of(config("evaluate.crops=1", "threads=1"))) is not None
    with pytest.raises(
        ValueError, match=r"is of another run, with optimizer\.lr=0\.001 and not 0\.1: delete that folder"
    ):
        run.load_checkpoint(tmp_path, run.settings_of(config("optimizer.lr=0.1")))
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of data\.root=.*, not of there: give data\.root="):
        run.load_checkpoint(tmp_path, run.settings_of(config("data.root=there")))


@pytest.mark.parametrize("content", [[1], {"model": {}}, {"settings": 3}, torch.ones(2)])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    run.save_checkpoint(tmp_path, content)
    with pytest.raises(ValueError, match="is no checkpoint of this program: delete that folder"):
        run.load_checkpoint(tmp_path, {})


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(500.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, damage):
    for step in range(2):
        run.save_checkpoint(tmp_path, state(step))
    damage(tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match=r"checkpoint\.pt is damaged"):
        assert run.load_checkpoint(tmp_path)["step"] == 0
    # From now on it is the newest, so that a good one stays whatever happens to the next.
    assert load_quietly(tmp_path)["step"] == 0
    run.save_checkpoint(tmp_path, state(2))
    truncate(tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match=r"checkpoint\.pt is damaged"):
        assert run.load_checkpoint(tmp_path)["step"] == 0


def test_every_checkpoint_damaged(tmp_path):
    for step in range(2):
        run.save_checkpoint(tmp_path, state(step))
    truncate(tmp_path / "checkpoint.pt")
    truncate(tmp_path / "checkpoint.previous.pt")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(OSError, match=r"every checkpoint in .* is damaged: delete that folder"),
    ):
        run.load_checkpoint(tmp_path)
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("examples", [50, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_damage_of_a_checkpoint_is_noticed(tmp_path, examples):
    path, valid = tmp_path / "checkpoint.pt", {"settings": {"seed": 0}, **state(1)}
    run.save_checkpoint(tmp_path, valid)
    whole = path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=examples, database=None, suppress_health_check=[*HealthCheck])
    @given(st.data())
    def damage(data):
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(whole)))] if data.draw(st.integers(0, 4)) == 0 else content
        path.write_bytes(data.draw(st.binary(max_size=300)) if data.draw(st.integers(0, 9)) == 0 else content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found, error = run.load_checkpoint(tmp_path, {"seed": 0}), ""
            except OSError as raised:
                found, error = None, str(raised)
        if error:
            assert re.search(f"every checkpoint in {tmp_path} is damaged", error)
        else:  # the damage is where nothing reads: times of files, comments
            assert found["step"] == valid["step"]
            assert torch.equal(found["weights"], valid["weights"])

    damage()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1 << 28


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path, request):
    for step in range(2):
        run.save_checkpoint(tmp_path, state(step))
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt \(No space left on device\)"):
        run.save_checkpoint(tmp_path, state(2))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert load_quietly(tmp_path)["step"] == 1


# The device.


@pytest.fixture
def as_before():
    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(before[0])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:]


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("tf32", [False, True])
def test_the_device_is_set_up(monkeypatch, tf32):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.set_up("auto", 1, tf32) == run.set_up("cpu", None, tf32) == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert run.set_up("auto", 1, tf32) == run.set_up("cuda", 1, tf32) == torch.device("cuda", 0)
    assert run.set_up("cpu", 1, tf32) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")  # of several processes each has a GPU
    assert run.set_up("auto", 1, tf32) == torch.device("cuda", 1)
    assert chosen == [0, 0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"3 processes or more, but 2 GPU\(s\): start one for each"):
        run.set_up("auto", 1, tf32)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda, but torch finds no GPU here: choose device=cpu"):
        run.set_up("cuda", None, False)
    with pytest.raises(ValueError, match="device=gpu: choose auto, cpu or cuda"):
        run.set_up("gpu", None, False)
    with pytest.raises(ValueError, match="threads=0: choose at least 1"):
        run.set_up("cpu", 0, False)
