import copy
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments.engine import records
from experiments.engine.records import find_records
from experiments.engine.run import init_key
from scripts import make_tables

PAPER = make_tables.RESULTS / "paper"
CONFIGS = make_tables.RESULTS.parent / "configs"

# As printed in arXiv:1511.06856v3.
TABLE1 = """
    no scaling 50.8% 41.2% 51.6% 49.4% 50.9% 52.0% 55.7% 53.8%
    Within-layer (Ours) 47.6% 41.2% - - - - 53.2% 53.1%
    Between-layer (Ours) 52.7% 55.7% - - - - 54.5% 57.2%
    Both (Ours) 53.3% 56.6% 56.6% 60.0% 53.1% 56.9% 56.9% 59.8%
"""
TABLE2 = """
    Xavier Glorot & Bengio (2010) 51.1% 40.4%
    MSRA He et al. (2015) 43.3% 37.2%
    Random Gaussian (hand tuned) 53.4% 41.3%
    Ours (Random Gaussian) 53.3% 43.4%
    Ours (PCA) 52.8% 43.1%
    Ours (k-means) 56.6% 45.6%
"""
TABLE3 = """
    Agrawal et al. (2015) egomotion 10 hours 52.9% 41.8%
    Wang & Gupta (2015) motion 1 week 62.8% 47.4%
    Doersch et al. (2015) unsupervised 4 weeks 55.3% 46.6%
    Krizhevsky et al. (2012) 1000 class labels 3 days 78.2% 56.8%
    Ours (k-means) initialization 54 seconds 56.6% 45.6%
    Ours + Agrawal et al. (2015) egomotion 10 hours 54.2% 43.9%
    Ours + Wang & Gupta (2015) motion 1 week 63.1% 47.2%
    Ours + Doersch et al. (2015) unsupervised 4 weeks 65.3% 51.1%
"""
SECTION44 = """
    using our k-means and Gaussian initializations. [...] GoogLeNet achieves a 50.0% and 55.0% mAP for the
    two initializations respectively, while 16-layer VGG performs as 53.8% and 56.5%. [...] The training time
    was 4 and 12 times slower than CaffeNet
"""


def printed(table):
    """The percentages of each line, nan for a dash."""
    cells = [re.findall(r"([\d.]+)%| (-)(?= |$)", line) for line in table.strip().splitlines()]
    return [[float(number or "nan") for number, _ in line] for line in cells]


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def test_table1_is_the_papers():
    table = pd.read_csv(PAPER / "table1.csv")
    columns = [(o, b, f) for o in ("sgd", "adam") for b in (False, True) for f in ("gaussian", "kmeans")]
    cells = table.set_index(["scaling", "optimizer", "batch_norm", "filters"])["classification"]
    ours = [[cells[scaling, *column] for column in columns] for scaling in ("none", "within", "between", "both")]
    np.testing.assert_array_equal(ours, printed(TABLE1))
    assert len(table) == 32


@pytest.mark.parametrize(("name", "text"), [("table2", TABLE2), ("table3", TABLE3)])
def test_tables_2_and_3_are_the_papers(name, text):
    table = pd.read_csv(PAPER / f"{name}.csv")
    np.testing.assert_array_equal(table[["classification", "detection"]].to_numpy(), printed(text))
    labels = table[["method", *(["supervision", "pretraining_time"] if name == "table3" else [])]]
    for label, line in zip(labels.agg(" ".join, axis=1), text.strip().splitlines(), strict=True):
        assert words(label) == words(re.sub(r"[\d.]+%", "", line))


def test_section_44_is_the_papers():
    table = pd.read_csv(PAPER / "section4.4.csv")
    percent = [float(number) for number in re.findall(r"([\d.]+)%", SECTION44)]
    assert [*table["classification"]] == percent
    assert [*table["network"]] == ["GoogLeNet", "GoogLeNet", "VGG-16", "VGG-16"]
    assert [*table["init"]] == ["kmeans", "gaussian"] * 2
    assert [*table["training_time"]] == [4, 4, 12, 12]


def test_the_papers_tables_agree_where_they_overlap():
    table1, table2, table3 = (pd.read_csv(PAPER / f"table{number}.csv") for number in (1, 2, 3))
    sgd = table1.query("optimizer == 'sgd' and not batch_norm").set_index("init")["classification"]
    table2 = table2.set_index("init")
    assert [*sgd[["gaussian", "kmeans"]]] == [*table2.loc[["gaussian", "kmeans"], "classification"]]
    kmeans = table3.set_index("method").loc["Ours (k-means)", ["classification", "detection"]]
    assert [*kmeans] == [*table2.loc["kmeans", ["classification", "detection"]]]


def test_the_papers_rows_are_initializations_that_the_command_offers():
    table1, table2 = pd.read_csv(PAPER / "table1.csv"), pd.read_csv(PAPER / "table2.csv")
    scalings = dict(zip(table1["init"], table1["scaling"], strict=True))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for init in {*table1["init"], *table2["init"], *make_tables.BASELINES}:
            config = compose("voc_cls", overrides=f"init={init}".split()).init
            assert init_key(config) == init
            if init in scalings:
                steps = {"none": (), "both": ("within", "between")}.get(scalings[init], (scalings[init],))
                assert [step for step in ("within", "between") if config.get(step)] == [*steps]


MINI = "mini, 20,000 iterations"  # the title of the block of `RECORD`
KMEANS = {"name": "kmeans", "method": "initialize", "within": True, "between": True, "bias": 0.1}
RECORD = {
    "experiment": "voc_cls",
    "preset": "mini",
    "seed": 0,
    "metrics": {"map_step": 0.25, "map_voc11": 0.27},
    "data": "voc2007, 5008 + 4952 images",
    "device": "a CPU",
    "versions": {"python": "3.12.1", "torch": "2.14.1"},
    "git_commit": "fedcba9876543210",
    "git_dirty": False,
    "config": {
        "preset": "mini",
        "seed": 0,
        "threads": None,
        "init": KMEANS,
        "model": {"_target_": make_tables.CAFFENET, "width": 0.5, "batch_norm": False},
        "optimizer": {"name": "sgd", "lr": 0.001},
        "train": {"iterations": 20_000},
        "data": {"name": "voc2007", "root": "data/VOCdevkit", "mean": [104, 117, 123]},
    },
}


@pytest.fixture
def runs(tmp_path):
    """A folder of records, and a function which adds one to it: `RECORD` with changes at dotted names."""
    folder = tmp_path / "runs"

    def add(name, **changes):
        record = copy.deepcopy(RECORD)
        for dotted, value in changes.items():
            *parents, leaf = dotted.split("__")
            inner = record
            for parent in parents:
                inner = inner[parent]
            inner[leaf] = value
        path = folder / "voc_cls" / (f"{name}.json" if "/" in name else f"record-{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
        return path

    return folder, add


def make(folder):
    return make_tables.make_tables(find_records([folder]) if folder.exists() else [], PAPER)


def csv_rows(folder, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(make(folder)["table2.csv"])
    return pd.read_csv(path, dtype={"seeds": str}).set_index(["preset", "init"])


def test_rows_are_means_over_seeds_beside_the_published_number(runs, tmp_path):
    folder, add = runs
    for seed, step in enumerate((0.24, 0.25, 0.29)):
        add(f"k{seed}", seed=seed, config__seed=seed, metrics__map_step=step)
    add("lsuv", config__init={"name": "lsuv", "method": "lsuv"}, metrics={"map_step": 0.20449, "map_voc11": 0.22})
    rows = csv_rows(folder, tmp_path)

    kmeans = rows.loc[MINI, "kmeans"]
    assert kmeans[["published", "map_step", "map_voc11", "n"]].tolist() == [56.6, 26, 27, 3]
    assert kmeans["map_step_std"] == pytest.approx(np.std([24, 25, 29], ddof=1), rel=1e-5)
    assert kmeans["seeds"] == "0 1 2"
    origin = ["voc2007, 5008 + 4952 images", "a CPU", "python 3.12.1, torch 2.14.1", "fedcba9876"]
    assert kmeans[["data", "device", "versions", "commit"]].tolist() == origin
    assert rows.loc[MINI, "lsuv"][["map_step", "n"]].tolist() == [20.449, 1]  # to be rounded once
    assert np.isnan(rows.loc[MINI, "lsuv"]["map_step_std"])

    text = make(folder)["table2.md"]
    assert "| Ours (k-means) | `kmeans` | 56.6 | 26.0 ± 2.6 | 27.0 ± 0.0 | 3 | 0 1 2 |" in text
    assert "| LSUV (Mishkin & Matas 2016) | `lsuv` |  | 20.4 | 22.0 | 1 | 0 |" in text
    assert all(f": {value}\n" in text for value in origin)


@pytest.mark.filterwarnings("error")
def test_the_other_networks_have_a_block_each(runs, tmp_path):
    folder, add = runs
    vgg = {"_target_": make_tables.NETWORKS["VGG-16"], "width": 0.25}
    add("vgg", config__model=vgg, metrics__map_step=0.20449)
    add("adam", config__model=vgg, config__optimizer={"name": "adam", "lr": 1e-4})
    add("caffenet", metrics__map_step=0.3)
    tables = make(folder)
    (tmp_path / "section.csv").write_text(tables["section4.4.csv"])
    rows = pd.read_csv(tmp_path / "section.csv")
    adam = rows["preset"] == f"{MINI}, optimizer.name=adam"  # a block of its own, without published numbers
    assert [*rows[adam]["published"].isna()] == [True, True]
    rows = rows[~adam].set_index(["network", "init"])
    assert [*rows.index] == [(network, init) for network in ("GoogLeNet", "VGG-16") for init in ("kmeans", "gaussian")]
    assert rows.loc[("VGG-16", "kmeans"), ["published", "map_step", "n"]].tolist() == [53.8, 20.449, 1]
    assert rows["map_step"].count() == 1
    assert f"## VGG-16, preset {MINI}\n" in tables["section4.4.md"]
    assert "| VGG-16, kmeans | `kmeans` | 53.8 | 20.4 | 27.0 | 1 | 0 |" in tables["section4.4.md"]
    assert "| Ours (k-means) | `kmeans` | 56.6 | 30.0 | 27.0 | 1 | 0 |" in tables["table2.md"]


def test_detection_has_tables_of_its_own(runs):
    folder, add = runs
    metrics = {"map_voc11": 0.31, "map_area": 0.3, "coco_ap": 0.12, "coco_ap50": 0.3}
    for seed in range(2):
        add(f"d{seed}", experiment="voc_det", seed=seed, config__seed=seed, metrics=metrics)
    weights = {
        "name": "pretrained",
        "method": "pretrained",
        "weights": "runs/mine/weights.safetensors",
        "rescale": True,
    }
    add("mine", experiment="voc_det", config__init=weights, metrics=metrics)
    add("cls", metrics__map_step=0.25)
    tables = make(folder)
    assert (
        "| Ours (k-means) | `kmeans` | 45.6 | 31.0 ± 0.0 | 30.0 ± 0.0 | 12.0 ± 0.0 | 2 | 0 1 |"
        in (tables["table2-detection.md"])
    )
    mine = "| pretrained mine init.rescale=true | `pretrained mine init.rescale=true` |  | 31.0 | 30.0 | 12.0 | 1 | 0 |"
    assert mine in tables["table3-detection.md"]
    assert mine not in tables["table2-detection.md"]
    assert "| Doersch et al. (2015) | `pretrained doersch2015` | 46.6 |" in tables["table3-detection.md"]
    assert "| Ours (k-means) | `kmeans` | 56.6 | 25.0 |" in tables["table2.md"]


def test_a_detection_without_a_learning_rate_is_named(runs):
    folder, add = runs
    metrics = {"map_voc11": 0.4, "map_area": 0.3, "coco_ap": 0.12}
    add("a", experiment="voc_det", metrics=metrics, config__optimizer={"name": "sgd"})
    with pytest.raises(ValueError, match=r"record-a.json is no result record \(config.optimizer.lr is missing\)"):
        make(folder)


def test_detection_is_at_the_best_learning_rate_of_each_initialization(runs, tmp_path):
    folder, add = runs
    metrics = {"map_area": 0.3, "coco_ap": 0.12, "coco_ap50": 0.3}
    for init, values in {"kmeans": {0.001: 0.2, 0.002: 0.4, 0.01: 0.3}, "msra": {0.001: 0.1, 0.01: 0.05}}.items():
        for rate, value in values.items():
            for seed in range(2):
                changes = {"metrics": metrics | {"map_voc11": value}, "seed": seed, "config__seed": seed}
                changes |= {"config__optimizer": {"name": "sgd", "lr": rate}, "config__init": KMEANS | {"name": init}}
                add(f"{init}-{rate}-{seed}", experiment="voc_det", **changes)
    text = make(folder)["table2-detection.md"]
    assert text.count("## Preset") == 1
    assert (
        "| Ours (k-means) | `kmeans` | 45.6 | 40.0 ± 0.0 | 30.0 ± 0.0 | 12.0 ± 0.0 | 2 | 0 1 | 0.002, best of" in text
    )
    assert "0.002, best of 0.001, 0.002, 0.01 |" in text
    assert "| MSRA (He et al. 2015) | `msra` | 37.2 | 10.0 ± 0.0 | 30.0 ± 0.0 |" in text
    assert "0.001, best of 0.001, 0.01 |" in text


def test_what_seeds_do_not_tell_apart_is_marked(runs, tmp_path):
    folder, add = runs
    for init, values in {"kmeans": (0.3, 0.31, 0.32), "pca": (0.29, 0.31, 0.33), "msra": (0.2, 0.21, 0.19)}.items():
        for seed, value in enumerate(values):
            changes = {"config__init": KMEANS | {"name": init}, "config__seed": seed, "metrics__map_step": value}
            add(f"{init}{seed}", seed=seed, **changes)
    add("lsuv", config__init={"name": "lsuv", "method": "lsuv"})
    noise = csv_rows(folder, tmp_path).loc[MINI]["within_noise_of"].fillna("")
    assert noise[["kmeans", "pca", "msra", "lsuv"]].tolist() == ["`pca`", "`kmeans`", "", "one seed"]
    assert "| 31.0 ± 1.0 | 27.0 ± 0.0 | 3 | 0 1 2 | `pca` |" in make(folder)["table2.md"]


def test_networks_pretrained_here_are_named_after_their_records(runs):
    folder, add = runs
    weights = {"name": "pretrained", "method": "pretrained", "weights": "outputs/mine/weights.safetensors"}
    for rescale, step in ((False, 0.2), (True, 0.3)):
        add(f"{rescale}", config__init=weights | {"rescale": rescale}, metrics__map_step=step)
    add("other/record", experiment="pretrain", metrics={"accuracy": 0.16}, config__model={"_target_": "VGG16"})
    assert "| pretrained mine | `pretrained mine` |" in make(folder)["table3.md"]  # without a record of how
    add("mine/record", experiment="pretrain", metrics={"accuracy": 0.18}, config__model__batch_norm=True)
    tables = make(folder)
    name = "position of patches (18.0 % right), from kmeans with BatchNorm"
    rows = (
        f"| {name} | `pretrained mine` |  | 20.0 | 27.0 | 1 | 0 | one seed |\n"
        f"| Ours + {name} | `pretrained mine init.rescale=true` |  | 30.0 | 27.0 | 1 | 0 | one seed |\n"
    )
    assert rows in tables["table3.md"]
    assert "position of patches" not in tables["table3-detection.md"]
    assert "other" not in tables["table3.md"]


def test_table1_has_a_column_for_each_optimizer_and_kind_of_filters(runs, tmp_path):
    folder, add = runs
    adam = {"name": "adam", "lr": 1e-4}
    for seed, step in enumerate((0.24, 0.25, 0.29)):
        add(f"k{seed}", seed=seed, config__seed=seed, metrics__map_step=step)
    add("bn", config__model__batch_norm=True, metrics__map_step=0.3)
    add("adam", config__optimizer=adam, config__init__between=False, metrics__map_step=0.2)
    gaussian = {"name": "gaussian", "method": "initialize", "within": False, "between": False}
    add("none", config__init=gaussian, metrics__map_step=0.1)
    add("lsuv", config__init={"name": "lsuv", "method": "lsuv"})
    tables = make(folder)
    assert tables["table1.md"].partition("## Preset ")[2] == (
        f"{MINI}\n\n"
        "| scaling | SGD, gaussian | SGD, kmeans | SGD + BN, gaussian | SGD + BN, kmeans "
        "| ADAM, gaussian | ADAM, kmeans | ADAM + BN, gaussian | ADAM + BN, kmeans |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| no scaling | 10.0 (50.8) | - (41.2) | - (51.6) | - (49.4) | - (50.9) | - (52.0) | - (55.7) | - (53.8) |\n"
        "| Within-layer | - (47.6) | - (41.2) | - | - | - | 20.0 | - (53.2) | - (53.1) |\n"
        "| Between-layer | - (52.7) | - (55.7) | - | - | - | - | - (54.5) | - (57.2) |\n"
        "| Both | - (53.3) | 26.0 ± 2.6, n=3 (56.6) | - (56.6) | 30.0 (60.0) "
        "| - (53.1) | - (56.9) | - (56.9) | - (59.8) |\n"
    )
    (tmp_path / "table1.csv").write_text(tables["table1.csv"])
    rows = pd.read_csv(tmp_path / "table1.csv")
    assert len(rows) == 32
    assert rows["map_step"].count() == 4
    assert "| - |" in make(tmp_path / "nothing")["table1.md"]


def test_table1_marks_what_is_below_the_best_of_its_column_beyond_noise(runs):
    folder, add = runs
    between = {"name": "kmeans", "method": "initialize", "within": False, "between": True}
    within = between | {"within": True, "between": False}
    for seed, (best, close, far) in enumerate([(0.24, 0.23, 0.10), (0.25, 0.26, 0.11), (0.29, 0.27, 0.12)]):
        add(f"k{seed}", seed=seed, config__seed=seed, metrics__map_step=best)
        add(f"b{seed}", seed=seed, config__seed=seed, metrics__map_step=close, config__init=between)
        add(f"w{seed}", seed=seed, config__seed=seed, metrics__map_step=far, config__init=within)
    adam = {"name": "adam", "lr": 1e-4}
    add("adam", config__optimizer=adam, metrics__map_step=0.3)
    add("adam-within", config__optimizer=adam, config__init=within, metrics__map_step=0.1)
    text = make(folder)["table1.md"]
    assert "| 11.0 ± 1.0, n=3* (41.2) |" in text  # within alone
    assert "| 25.3 ± 2.1, n=3 (55.7) |" in text  # between alone
    assert text.count("*") == 1  # one seed tells nothing apart


def test_what_was_not_measured_is_an_empty_cell_in_the_papers_order(runs, tmp_path):
    folder, add = runs
    add("kmeans")
    text, rows = make(folder)["table2.md"], csv_rows(folder, tmp_path)
    assert "| Xavier (Glorot & Bengio 2010) | `xavier` | 51.1 |  |  |  |  |" in text
    assert "(published in Table 1) | `gaussian_unscaled` | 50.8 |  |  |  |  |" in text
    assert "| PyTorch default | `torch` |  |  |  |  |  |" in text
    paper = [*pd.read_csv(PAPER / "table2.csv")["init"]]
    assert [init for _, init in rows.index] == [*paper, "gaussian_unscaled", "torch", "lsuv"]
    assert rows.drop(index=(MINI, "kmeans"))[["map_step", "map_voc11", "n"]].isna().all(axis=None)


def test_without_records_the_published_numbers_are_left(tmp_path):
    rows = csv_rows(tmp_path / "none", tmp_path)
    assert {preset for preset, _ in rows.index} == {"paper"}
    assert rows.loc["paper", "kmeans"]["published"] == 56.6
    assert rows["map_step"].isna().all()


def test_other_initializations_get_rows_of_their_own(runs, tmp_path):
    folder, add = runs
    add("zca", config__init__name="zca", metrics__map_step=0.2)
    add("within", config__init__between=False, metrics__map_step=0.1)
    add("none", config__init__within=False, config__init__between=False, metrics__map_step=0.05)
    rows = csv_rows(folder, tmp_path)
    steps = {
        "zca": (np.nan, 20),
        "kmeans init.between=false": (41.2, 10),
        "kmeans init.within=false init.between=false": (41.2, 5),
    }
    for init, expected in steps.items():
        np.testing.assert_array_equal(rows.loc[MINI, init][["published", "map_step"]].astype(float), expected)
    assert np.isnan(rows.loc[MINI, "kmeans"]["map_step"])


def test_every_preset_and_every_changed_setting_is_a_block_of_its_own(runs):
    folder, add = runs
    add("a", config__threads=2, config__data__root="elsewhere")
    add("b", config__threads=1, seed=1, config__seed=1)  # none of these makes another protocol
    add("wide", config__model__width=1.0)
    add("long", config__train={"iterations": 80_000})
    add("paper", preset="paper", config__preset="paper")
    text = make(folder)["table2.md"]
    titles = re.findall("^## (.*)$", text, re.MULTILINE)
    assert titles == [
        f"Preset {MINI}, model.width=0.5",
        f"Preset {MINI}, model.width=1.0",
        "Preset mini, 80,000 iterations, model.width=0.5",
        "Preset paper, 20,000 iterations",
    ]
    blocks = text.split("## ")[1:]
    assert [re.search(r"`kmeans` .* (\d) \| ([\d ]+) \|", block).groups() for block in blocks] == [
        ("2", "0 1"),
        ("1", "0"),
        ("1", "0"),
        ("1", "0"),
    ]


def test_code_that_was_not_committed_is_marked(runs):
    folder, add = runs
    add("a", git_dirty=True)
    add("b", seed=1, git_commit=None)
    assert "- commit: fedcba9876 with changes; unknown\n" in make(folder)["table2.md"]


def test_other_tables_records_are_left_alone(runs, tmp_path):
    folder, add = runs
    add("adam", config__optimizer={"name": "adam"})
    add("bn", config__model__batch_norm=True)
    about = {"metrics": {"top1": 0.5, "top5": 0.8}, "data": "d, 9 classes", "epoch": 4.0, "curve": "curve.csv"}
    path = add("imagenet", experiment="imagenet", **about)
    path.with_name("curve.csv").write_text("step,loss\n1,2.0\n")
    assert csv_rows(folder, tmp_path)["map_step"].isna().all()


def test_the_order_of_the_files_does_not_matter_and_nothing_is_accumulated(runs, tmp_path):
    folder, add = runs
    add("a", seed=0)
    add("b", seed=1, metrics__map_step=0.5)
    first = make(folder)
    assert make(folder) == first
    (folder / "voc_cls" / "record-a.json").rename(folder / "record-z.json")
    assert make(folder) == first


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metrics": {"map_voc11": 0.3}}, "KeyError('map_step')"),
        ({"metrics__map_step": float("nan")}, "is not between 0 and 1"),
        ({"metrics__map_step": 56.6}, "is not between 0 and 1"),
        ({"metrics__map_step": None}, "is not between 0 and 1"),
        ({"config": {}}, "config.init: Field required"),
        ({"versions": "2.14"}, "versions: Input should be"),
    ],
)
def test_a_bad_record_is_an_error_that_names_the_file(runs, changes, reason):
    folder, add = runs
    add("good")
    path = add("bad", seed=1, **changes)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        make(folder)
    assert reason in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"experiment": "voc_cls", "pre', b"[]", b"\xff\xfe", b"3"])
def test_a_file_that_is_no_record_is_an_error_that_names_it(runs, content):
    folder, add = runs
    path = add("good").with_name("record-bad.json")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        make(folder)


def test_the_newest_of_equal_records_counts_and_is_named(runs, capsys):
    folder, add = runs
    add("a", created="2026-01-02T00:00:00+00:00", metrics__map_step=0.3, device="another", config__data__root="there")
    add("b", created="2026-01-01T00:00:00+00:00", metrics__map_step=0.1, git_commit="0123456789")
    add("c", metrics__map_step=0.2)
    assert "| `kmeans` | 56.6 | 30.0 | 27.0 | 1 | 0 |" in make(folder)["table2.md"]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"record-a.json is used.*record-c.json, .*record-b.json", line)


def test_two_names_of_one_initialization_are_one_row(runs):
    folder, add = runs
    both = {"name": "gaussian", "method": "initialize", "within": False, "between": False, "images": 160}
    add("a", config__init=both, created="2026-01-02T00:00:00+00:00", metrics__map_step=0.3)
    add("b", config__init={"name": "gaussian_unscaled", "method": "gaussian", "std": 0.01})
    add("c", config__init={"name": "gaussian_unscaled", "method": "gaussian", "std": 0.02}, metrics__map_step=0.1)
    text = make(folder)["table2.md"]
    assert "| `gaussian_unscaled init.std=0.01` |  | 30.0 |" in text
    assert "| `gaussian_unscaled init.std=0.02` |  | 10.0 |" in text
    (folder / "voc_cls" / "record-c.json").unlink()
    assert "| `gaussian_unscaled` | 50.8 | 30.0 | 27.0 | 1 | 0 |" in make(folder)["table2.md"]


def test_other_settings_are_never_averaged(runs):
    folder, add = runs
    for seed in range(2):
        add(f"{seed}", seed=seed, config__seed=seed)
        add(f"bias{seed}", seed=seed, config__seed=seed, config__init__bias=0.0, metrics__map_step=0.1)
    add("crops", config__evaluate={"crops": 10}, metrics__map_step=0.4)
    text = make(folder)["table2.md"]
    assert "| `kmeans init.bias=0.1` |  | 25.0 ± 0.0 | 27.0 ± 0.0 | 2 | 0 1 |" in text
    assert "| `kmeans init.bias=0.0` |  | 10.0 ± 0.0 | 27.0 ± 0.0 | 2 | 0 1 |" in text
    assert f"## Preset {MINI}, evaluate.crops=10\n" in text


def test_what_is_ones_own_has_rows_and_blocks(runs):
    folder, add = runs
    mine = {"name": "mine", "_target_": "my_module.my_init", "gain": 2}
    add("mine", config__init=mine, metrics__map_step=0.4)
    add("adam", config__init=mine, config__optimizer={"name": "adam"}, metrics__map_step=0.41)
    add("named", config__init=mine | {"name": "kmeans"}, metrics__map_step=0.42)
    add("data", preset="own", config__data={"name": "birds"}, config__train={"iterations": 60}, metrics__map_step=0.43)
    add("net", config__model={"_target_": "torchvision.models.resnet18"}, metrics__map_step=0.44)
    add(
        "det",
        experiment="voc_det",
        config__model={"_target_": "my.Net"},
        metrics={"map_voc11": 0.3, "map_area": 0.3, "coco_ap": 0.1},
    )
    tables = make(folder)
    text = {title: block for title, _, block in (part.partition("\n") for part in tables["table2.md"].split("## ")[1:])}
    assert [*text] == [
        f"Preset {MINI}, optimizer.name=adam",
        f"Preset {MINI}",
        "Preset own, 60 iterations, data.name=birds",
    ]
    assert "| mine | `mine` |  | 40.0 |" in text[f"Preset {MINI}"]
    assert "| `kmeans init._target_=my_module.my_init` |  | 42.0 |" in text[f"Preset {MINI}"]
    assert text[f"Preset {MINI}"].index("`lsuv`") < text[f"Preset {MINI}"].index("`mine`")
    assert "| `mine` |  | 41.0 |" in text[f"Preset {MINI}, optimizer.name=adam"]
    assert "| `kmeans` |  | 43.0 |" in text["Preset own, 60 iterations, data.name=birds"]
    assert "56.6" not in text["Preset own, 60 iterations, data.name=birds"]
    assert "## resnet18 (`torchvision.models.resnet18`), preset mini" in tables["section4.4.md"]
    assert "| Ours (k-means) | `kmeans` |  | 44.0 |" in tables["section4.4.md"]
    assert "iterations, model._target_=my.Net" in tables["table2-detection.md"]
    assert "45.6" not in tables["table2-detection.md"]
    own = tables["table1.md"].partition("data.name=birds")[2]
    assert "43.0" in own
    assert "(" not in own


def run_script(*arguments):
    command = [sys.executable, "-m", "scripts.make_tables", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=make_tables.RESULTS.parent)


def test_a_run_folder_copied_whole_is_read(runs, tmp_path):
    folder, add = runs
    path = add("cell/record", config__init={"name": "mine", "_target_": "my.init"})
    for name in ("init.json", "other.json", "recording.json"):
        path.with_name(name).write_text("junk")
    path.with_name("checkpoint.pt").write_bytes(b"junk")
    (folder / "waiting").mkdir()
    (folder / "waiting" / "checkpoint.pt").write_bytes(b"junk")
    done = run_script("--runs", folder, folder / "voc_cls", "--out", tmp_path / "out" / "tables")
    assert (done.returncode, done.stderr) == (0, f"not finished, left out: {folder / 'waiting'}\n")
    text = (tmp_path / "out" / "tables" / "table2.md").read_text()
    assert "| mine | `mine` |  | 25.0 | 27.0 | 1 | 0 |" in text
    assert str(folder) in text
    assert "results/runs" not in text


@pytest.mark.parametrize("arguments", [["--rus", "a"], ["stray"], ["--runs"], ["--runs", "none"], ["--runs", "."]])
def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["make_tables.py", *arguments])
    with pytest.raises(SystemExit, match=r"^error: .*--") as error:
        make_tables.main()
    assert "\n" not in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_help_is_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_tables.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        make_tables.main()
    assert "--runs FOLDER" in capsys.readouterr().out


def test_all_tables_are_written_or_none(runs, tmp_path, monkeypatch):
    folder, add = runs
    add("kmeans")
    out = tmp_path / "out"
    out.mkdir()
    (out / "table1.md").write_text("older")

    def full(path, content):
        if path.name == "table3.md":
            raise OSError("cannot write table3.md (No space left on device)")
        path.write_bytes(content)

    monkeypatch.setattr(records, "write_bytes", full)
    monkeypatch.setattr("sys.argv", ["make_tables.py", "--runs", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit, match="No space left"):
        make_tables.main()
    assert {path.name: path.read_text() for path in out.iterdir()} == {"table1.md": "older"}


@pytest.mark.slow
def test_from_a_demo_run_to_the_table(tmp_path):
    overrides = ["preset=demo", "init=kmeans", "train.iterations=4", f"output={tmp_path}/outputs"]
    subprocess.run([sys.executable, "experiments/voc_cls.py", *overrides], check=True, cwd=make_tables.RESULTS.parent)
    done = run_script("--runs", tmp_path / "outputs", "--out", tmp_path / "tables")
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "tables" / "table2.md").read_text()
    assert re.search(r"## Preset demo, 4 iterations, data.name=demo\n(.*\n)*.*`kmeans` \|  \| \d", text)


def test_the_command_writes_the_tables_or_says_what_is_wrong(runs, monkeypatch, capsys):
    folder, add = runs
    add("kmeans")
    results = folder.parent
    (results / "paper").symlink_to(PAPER)
    monkeypatch.setattr(make_tables, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["make_tables.py"])
    make_tables.main()
    written = {path.name: path.read_text() for path in (results / "tables").iterdir()}
    assert written == make(folder)
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(str(results / "tables" / name) for name in written)

    (folder / "record-bad.json").write_text("{")
    with pytest.raises(SystemExit, match=r"error: .*record-bad\.json"):
        make_tables.main()
    assert {path.name: path.read_text() for path in (results / "tables").iterdir()} == written


def test_the_committed_tables_are_made_from_the_committed_records():
    results: Path = make_tables.RESULTS
    committed = {path.name: path.read_text() for path in (results / "tables").iterdir()}
    tables = make_tables.make_tables(find_records([results / "runs"]), PAPER, results / "bench" / "families.json")
    assert committed == tables, "run `python scripts/make_tables.py`"


MEASURED = {
    **dict.fromkeys(make_tables.MEASURES, 1),
    "deviation": {"std": 1e-6, "mean": 2e-6, "mean_without_bias": 0.0, "uncentred": 0},
    "spread_after_scaling": None,
    "output_change_scaling": None,
}


@pytest.fixture
def families(tmp_path):
    """A file of networks, and a function which adds one with its measures by kind of filters."""
    record = {
        "versions": {"torch": "2.14.1"},
        "device": "a CPU",
        "threads": 2,
        "data": "VOC 2007 train",
        "networks": {},
    }
    path = tmp_path / "families.json"

    def add(name, **filters):
        kinds = {kind: MEASURED | changes for kind, changes in filters.items()}
        record["networks"][name] = {"size": 64, "parameters": 10, "images": 32, "filters": kinds}
        path.write_text(json.dumps(record))

    return path, add


def test_a_row_of_a_family_is_the_range_over_its_networks(families):
    path, add = families
    change = {"output_change_all_images": 3e-5, "rounding": 2e-5}
    add("vit_b_16", kmeans={"spread_before": 61.2, "spread_after": 5.14, "spread_after_scaling": 1.0004} | change)
    add("vit_l_32", kmeans={"spread_before": 123456, "spread_after": 2.0, "spread_after_scaling": 1.04})
    add("vgg11", kmeans={"spread_before": 12.0, "spread_after": 1.001})
    tables = make_tables.families_table(path)
    row = next(line for line in tables["families.md"].splitlines() if line.startswith("| ViT"))
    assert row.startswith("| ViT | 2 | 61 to 1.2e+05 → 2.0 to 5.1 | 1.0 | 1e+00 (1e+00) |")
    assert "| VGG | 1 | 12 → 1.0 | 1.0 |" in tables["families.md"]
    assert "- device: a CPU, 2 threads\n" in tables["families.md"]
    (tables_path := path.with_suffix(".csv")).write_text(tables["families.csv"])
    rows = pd.read_csv(tables_path).set_index(["network", "filters"])
    assert rows.loc[("vit_b_16", "kmeans"), ["family", "spread_before", "std_deviation"]].tolist() == [
        "ViT",
        61.2,
        1e-6,
    ]


def test_the_change_of_a_family_is_that_of_the_network_which_changes_most(families):
    path, add = families
    for name, change in {"resnet18": 1e-6, "resnext50_32x4d": 3e-5, "wide_resnet50_2": 2e-5}.items():
        add(name, gaussian={"output_change_all_images": change, "rounding": change / 2})
    text = make_tables.families_table(path)["families.md"]
    assert "| ResNet, ResNeXt, Wide ResNet | 3 | 1.0 → 1.0 | 1.0 | 3e-05 (2e-05) |" in text


def test_networks_of_timm_have_rows_of_their_own_and_failures_are_named(families):
    path, add = families
    add("vgg11", kmeans={"spread_before": 12.0, "spread_after": 1.001})
    measured = MEASURED | {"spread_before": 34.0, "spread_after": 1.2, "held_by": ["softmax"]}
    held = measured | {"spread_after": 12.0, "spread_after_scaling": 1.0, "held_by": ["gelu"]}
    lines = [
        {"network": "timm/levit_128s", "failed": "more than 1800 s"},
        {"network": "timm/levit_128s", "module": "levit", "size": 64, "parameters": 10, "images": 16}
        | {"filters": {"kmeans": measured}},  # tried again
        {"network": "timm/vit_tiny", "module": "vit", "size": 64, "parameters": 10, "images": 16}
        | {"filters": {"kmeans": held}},
        {"network": "timm/coat_tiny", "failed": "InitializationError: no layer learns"},
    ]
    lines.append({"network": "timm/vit_giant", "skipped": "1,000,000,000 parameters"})
    text = "".join(json.dumps(line | {"timm": "1.0.31"}) + "\n" for line in lines)
    path.with_name("timm.jsonl").write_text(text + '{"network": "timm/resnet')  # killed while it wrote
    torchvision, _, timm = make_tables.families_table(path)["families.md"].partition("## timm\n")
    assert "| VGG | 1 | 12 → 1.0 | 1.0 |" in torchvision
    assert "| levit | 1 | 34 → 1.2 | 1.2 | 1e+00 (1e+00) |  |\n" in timm
    assert "| vit | 1 | 34 → 12 | 1.0 | 1e+00 (1e+00) | held by gelu |\n" in timm
    assert "- `timm/coat_tiny`: InitializationError: no layer learns\n" in timm
    assert "1800 s" not in timm
    assert "giant" not in timm
    assert "- timm 1.0.31\n" in timm


def test_every_network_of_torchvision_has_one_family():
    models = pytest.importorskip("torchvision.models")
    assert {make_tables.family(name) for name in models.list_models(module=models)} == {*make_tables.FAMILY_NAMES}


@pytest.mark.parametrize("content", ["{", "[]", '{"networks": {"vgg11": {}}}', '{"networks": {}}'])
def test_a_file_that_is_no_record_of_networks_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "families.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        make_tables.families_table(path)


def test_how_training_begins_has_a_table_of_its_own(runs):
    folder, add = runs
    runs_of = [("whole", "paper", 40_000, 8.5), ("short", "paper", 500, 7.5), ("whole", "mini", 20_000, 6.25)]
    for name, preset, iterations, first in runs_of:
        path = add(
            f"{preset}/{name}/record", preset=preset, config__preset=preset, config__train={"iterations": iterations}
        )
        path.with_name("curve.csv").write_text(f"step,loss,lr,seconds\n100,{first},0.001,1\n500,4.5,0.001,5\n")
        path.with_name("init.json").write_text("{}")
    tables = make(folder)
    assert "| Ours (k-means) | 7.50 | 4.50 | 6.25 | 4.50 |" in tables["first_losses.md"]
    assert "| MSRA (He et al. 2015) |  |  |  |  |" in tables["first_losses.md"]
    rows = pd.read_csv(io.StringIO(tables["table2.csv"])).query("n > 0")
    assert [*rows["preset"]] == [MINI, "paper, 40,000 iterations"]
