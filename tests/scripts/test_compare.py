"""Differences between initializations, from records as the commands write them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from scripts import compare

RUNS = Path(__file__).resolve().parents[2] / "results" / "runs"
MINI = "voc_cls, mini, 20,000 iterations, train.lr_every=2500"


@pytest.fixture
def say(monkeypatch, capsys):
    """What the command prints."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, words)])
        compare.main()
        return capsys.readouterr().out

    return call


def test_the_difference_over_seeds_per_class_and_the_losses(say):
    text = say("init=kmeans preset=mini train.iterations=20000", "init=pca", "--runs", RUNS)
    assert text.startswith(MINI)
    assert f"{MINI}: mean average precision (step AP) in percent" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["init=pca", "32.3", "1.0", "3", "+0.8", "-1.3", "to", "+3.0", "within", "noise"] in lines
    assert ["aeroplane", "59.2", "56.4", "+2.8", "-2.3", "to", "+7.8"] in lines
    assert ["20000", "3.878", "3.872", "+0.005"] in lines
    assert "seed 0: not known, no test scores are kept of mini-kmeans-seed0-752444e4 and of mini-pca-seed0-" in text


def test_one_seed_has_no_interval_and_one_name_is_compared_with_all_others(say):
    text = say("init=kmeans preset=mini train.iterations=20000", "--runs", RUNS)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["init=msra"].endswith("+13.2   +11.7 to +14.6  beyond noise")
    assert lines["init=kmeans init.within=false"].endswith("one seed: no interval")
    assert "per class" not in text


def test_runs_are_named_by_records_and_folders_too(say, tmp_path):
    for name in ("mini-kmeans-seed1-27f2c65f", "mini-kmeans-seed2-a9b8d6ea", "mini-xavier-seed1-6060f9c1"):
        shutil.copytree(RUNS / "voc_cls" / name, tmp_path / name[5:8] / name)
    record = next(tmp_path.glob("xav/*/record.json"))
    text = say(tmp_path / "kme", record, "--runs", tmp_path)
    assert f"{record}" in text
    assert text.count("one seed: no interval") == 1


def test_a_training_that_diverged_has_no_part_in_it(say, tmp_path):
    for name in ("mini-kmeans-seed1-27f2c65f", "mini-kmeans-seed2-a9b8d6ea", "mini-xavier-seed1-6060f9c1"):
        shutil.copytree(RUNS / "voc_cls" / name, tmp_path / name)
    path = tmp_path / "mini-kmeans-seed2-a9b8d6ea" / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"diverged": "a loss is nan", "metrics": {"map_step": None}}))
    assert say("init=kmeans", "init=xavier", "--runs", tmp_path).count("one seed: no interval") == 1


def test_scores_give_an_interval_over_test_images(say, tmp_path):
    generator = np.random.default_rng(0)
    labels = np.where(generator.random((200, 20)) < 0.2, 1, -1).astype(np.int8)
    for name, noise in (("mini-kmeans-seed1-27f2c65f", 1.0), ("mini-xavier-seed1-6060f9c1", 3.0)):
        shutil.copytree(RUNS / "voc_cls" / name, tmp_path / name)
        scores = (labels + noise * generator.standard_normal(labels.shape)).astype(np.float32)
        np.savez(tmp_path / name / "scores.npz", ids=np.arange(200), scores=scores, labels=labels)
    text = say("init=kmeans", "init=xavier", "--runs", tmp_path)
    (line,) = (line for line in text.splitlines() if line.startswith("  seed 1: "))
    assert line.endswith("(1,000 draws of the test images)")
    low, high = (float(line.split()[number]) for number in (3, 5))
    assert 10 < low < high < 60
    assert "over images, seed 1" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("init=foo",), "no experiment has records of init=foo that can be compared"),
        (("kmeans",), "kmeans is no file, no folder and no setting such as init=kmeans"),
        (("preset=mini", "init=msra"), "preset=mini has runs of caffe, gaussian, "),
        (("init=kmeans", "--runs", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_what_is_not_understood_is_one_line(say, words, message):
    with pytest.raises(SystemExit, match=message) as error:
        say(*words, *([] if "--runs" in words else ["--runs", RUNS]))
    assert "\n" not in str(error.value)


def test_per_class_values_may_be_missing(say, tmp_path):
    for name in ("mini-kmeans-seed1-27f2c65f", "mini-xavier-seed1-6060f9c1"):
        shutil.copytree(RUNS / "voc_cls" / name, tmp_path / name)
        path = tmp_path / name / "record.json"
        record = json.loads(path.read_text())
        record["per_class"]["cow"] = {"step": None, "voc11": None}
        path.write_text(json.dumps(record))
    (line,) = (line for line in say("init=kmeans", "init=xavier", "--runs", tmp_path).splitlines() if "cow" in line)
    assert line.split() == ["cow", "nan", "nan", "+nan"]
