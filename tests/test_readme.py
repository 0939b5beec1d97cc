"""The examples of README and docs/ run, their numbers are those of the records, and their links lead somewhere."""

import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

import initializers
from experiments.engine.figures import line_of
from experiments.engine.run import init_key
from experiments.files import read_lines
from initializers.__main__ import make_parser
from scripts import reproduce
from scripts.bench_families import MOST

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
GUIDE, RESULTS = DOCS["initializers"], DOCS["results"]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "results" / "paper" / "README.md"]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [block for text in (README, *DOCS.values()) for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
COMMANDS = re.findall(r"^((?:make|python|torchrun) [^#\n]*)", "\n".join(SHELL), re.M)


def test_the_readme_is_a_screen_or_two():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_python_examples(capsys):
    torch.manual_seed(0)
    names = {"initializers": initializers}
    for block in PYTHON:
        exec(block, names)
    assert "kmeans" in capsys.readouterr().out


def test_the_examples_of_the_guide(capsys):
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(block, names)
    assert "left" in capsys.readouterr().out
    assert names["rates"].mean["0"] > 0


def test_the_commands_of_the_guide_are_understood():
    commands = re.findall(r"^python -m initializers (.*)$", GUIDE, re.M)
    assert len(commands) >= 2
    for command in commands:
        make_parser().parse_args(shlex.split(command))


def test_there_are_commands():
    assert sum("voc_cls.py" in command for command in COMMANDS) >= 3
    assert sum("reproduce.py" in command for command in COMMANDS) >= 3
    assert COMMANDS[0].strip() == "make demo"


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make")])
def test_commands_name_what_exists(command):
    words = [word for word in shlex.split(command)[1:] if not word.startswith("--nproc")]
    if words[0] == "-m":
        return  # of the library: test_the_commands_of_the_guide_are_understood
    assert (ROOT / words[0]).is_file()
    lines = [words] if words[0].startswith("experiments/") else []
    if words[0] == "scripts/reproduce.py":
        names, settings = reproduce.asked(words[1:])
        lines = [line[1:] for name in names for line in reproduce.commands_of(name, settings, Path("outputs"))]
    for line in lines:
        overrides = [word for word in line[1:] if word != "-m"]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            assert compose(Path(line[0]).stem, overrides=overrides, return_hydra_config=True)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


# The columns of classification in docs/results.md.
PROTOCOLS = (
    "paper, 40,000 iterations",
    "mini, 80,000 iterations, train.lr_every=10000",
    "mini, 20,000 iterations, train.lr_every=2500",
)


def test_classification_is_that_of_the_records():
    table = pd.read_csv(ROOT / "results" / "tables" / "table2.csv").query("n > 0")
    assert {*table["preset"]} == {*PROTOCOLS}
    expected = {}
    for init, rows in table.groupby("init"):
        cells = dict.fromkeys(PROTOCOLS, "")
        for _, row in rows.iterrows():
            several = f", n={row['n']:.0f}" * (row["n"] > 1)
            cells[row["preset"]] = one_decimal(row["map_step"], row["map_step_std"]) + several
        expected[init] = [one_decimal(rows["published"].iloc[0]), *cells.values()]
    assert rows_after("table2") == expected


@pytest.mark.parametrize(
    ("table", "columns"),
    [("section4.4", ("map_step", "map_voc11")), ("table2-detection", ("map_voc11", "map_area", "coco_ap"))],
)
def test_results_are_those_of_the_records(table, columns):
    records = pd.read_csv(ROOT / "results" / "tables" / f"{table}.csv")
    records = records[records["preset"].str.startswith("mini,") & (records["n"] > 0)]
    expected = {
        (record["network"] if "network" in records else "") + record["init"]: [
            one_decimal(record["published"]),
            *(one_decimal(record[column], record.get(f"{column}_std")) for column in columns),
            str(int(record["n"])),
        ]
        for _, record in records.iterrows()
    }
    assert rows_after(table) == expected


def rows_after(table: str) -> dict[str, list[str]]:
    """Key -> cells of the table in docs/results.md that follows the link to a table of the results."""
    block = re.search(r"(?:^\|.*\n)+|\Z", RESULTS.partition(f"(../results/tables/{table}.md)")[2], re.M)[0]
    rows = re.findall(r"^\| (?:(.*), )?`init=(.*?)`.*?((?: \| [\d.± n=,]*)+) \|$", block, re.M)
    return {network + init: [cell.strip() for cell in cells.split("|")[1:]] for network, init, cells in rows}


def one_decimal(value: float, deviation: float | None = None) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.1f}" + ("" if pd.isna(deviation) else f" ± {deviation:.1f}")


SETTINGS = {  # learning rate, clipping, weight decay, smallest crop
    "as it is": (0.001, 10, 1e-6, 0.5),
    "learning rate .0003": (0.0003, 10, 1e-6, 0.5),
    "learning rate .003": (0.003, 10, 1e-6, 0.5),
    "no clipping": (0.001, None, 1e-6, 0.5),
    "learning rate .0003, no clipping": (0.0003, None, 1e-6, 0.5),
    "weight decay .0005": (0.001, 10, 0.0005, 0.5),
    "larger crops": (0.001, 10, 1e-6, 1.0),
    "losses averaged": (0.00005, 200, 2e-5, 0.5),
}


def of_the_mini_network():
    """The records of seed 0 at the scale of preset=mini, those of results/causes among them."""
    protocol = {"iterations": 20_000, "batch_size": 10}
    folders = [*(ROOT / "results/causes").glob("mini-*"), *(ROOT / "results/runs/voc_cls").glob("mini-*-seed0-*")]
    records = [json.loads((folder / "record.json").read_text()) for folder in folders]
    return [record for record in records if protocol.items() <= record["config"]["train"].items()]


def taken_apart() -> str:
    """What the page says of it."""
    return RESULTS.partition("**Taken apart.**")[2].partition("\n**")[0]


def cells_taken_apart() -> dict[str, dict[str, str]]:
    """Its table: by setting, and by initialization."""
    inits = re.findall(r"`init=(.+?)`", re.search(r"^\| \|(.*)\|$", taken_apart(), re.M)[1])
    rows = re.findall(r"^\| ([^`|]+?) \|(.*)\|$", taken_apart(), re.M)
    return {setting: dict(zip(inits, map(str.strip, cells.split("|")), strict=True)) for setting, cells in rows}


def test_what_was_taken_apart_is_that_of_the_records():
    table = cells_taken_apart()
    stated = {(init, *SETTINGS[name]): cell for name, row in table.items() for init, cell in row.items() if cell}
    expected = {}
    for record in of_the_mini_network():
        config = record["config"]
        setting = (config["optimizer"]["lr"], config["train"]["clip_norm"], config["optimizer"]["weight_decay"])
        key = (init_key(config["init"]), *setting, config["crop"]["min_scale"])
        if key[0] in table["as it is"]:
            expected[key] = one_decimal(100 * record["metrics"]["map_step"])
    assert stated == expected


def test_filters_of_two_kinds_are_those_of_the_records():
    block = " ".join(taken_apart().split())
    first, rest = re.search(r"([\d.]+) with PCA in the first layer alone, ([\d.]+) with PCA in all", block).groups()
    mixed = {
        record["config"]["init"]["first"]: one_decimal(100 * record["metrics"]["map_step"])
        for record in of_the_mini_network()
        if record["config"]["init"]["name"] == "layers"
    }
    assert mixed == {"pca": first, "gaussian": rest}
    (rates,) = (
        record["change_rate"]["mean"]
        for record in of_the_mini_network()
        if (init_key(record["config"]["init"]), record["config"]["optimizer"]["lr"])
        == ("gaussian init.between=false", 0.0003)
    )
    assert f"{round(rates['conv1'] / rates['conv2'], -2):,.0f} times" in block


def test_what_biases_do_is_that_of_the_records():
    block = " ".join(taken_apart().split())
    stated = re.search(
        r"ends at ([\d.]+) and ([\d.]+) \(two seeds\), MSRA at ([\d.]+) and ([\d.]+): Xavier is ([\d.]+)", block
    )
    found = {}
    for record in of_the_mini_network():
        if (init := record["config"]["init"])["name"] in ("biased", "average"):
            found[init.get("weights"), record["config"]["seed"]] = 100 * record["metrics"]["map_step"]
    average = found.pop((None, 0))
    assert f"mean of fan-in and fan-out ends at {average:.1f}" in block
    assert found.keys() == {(weights, seed) for weights in ("xavier", "msra") for seed in (0, 1)}
    each = [found[weights, seed] for weights in ("xavier", "msra") for seed in (0, 1)]
    assert [*stated.groups()] == [f"{value:.1f}" for value in (*each, (each[0] + each[1] - each[2] - each[3]) / 2)]


def test_leads_are_those_of_the_table():
    def leads(one, other):
        rows = [row for row in cells_taken_apart().values() if row[one] and row[other]]
        return [float(row[one]) - float(row[other]) for row in rows]

    words = " ".join(taken_apart().split())
    assert f"PCA is at least {min(leads('pca', 'gaussian')):.1f} ahead in each row" in words
    assert f"puts Xavier further ahead than {max(leads('xavier', 'msra')):.1f}" in words


def test_first_losses_are_those_of_the_records():
    records = pd.read_csv(ROOT / "results/tables/first_losses.csv").set_index("init")
    block = RESULTS.partition("(../results/tables/first_losses.md)")[2].partition("\n## ")[0]
    stated = {
        init: [*map(float, cells.split("|"))] for init, cells in re.findall(r"^\| `init=(.*?)` \|(.*)\|$", block, re.M)
    }
    assert stated.keys() == set(records.index)
    for init, (first, mini_first, last, mini_last) in stated.items():
        record = records.loc[init]
        assert [first, mini_first] == pytest.approx([record.paper_1_to_100, record.mini_1_to_100], abs=0.051)
        assert [last, mini_last] == pytest.approx([record.paper_401_to_500, record.mini_401_to_500], abs=0.0051)


@pytest.mark.parametrize("when", ["1_to_100", "401_to_500"])
def test_training_begins_at_full_width_as_it_does_in_the_narrow_network(when):
    records = pd.read_csv(ROOT / "results/tables/first_losses.csv")
    ratios = records[f"paper_{when}"] / records[f"mini_{when}"]
    assert ratios.between(0.5, 2).all()  # the same order of size


@pytest.mark.parametrize("name", ["init", "train", "data"])
def test_ratios_are_those_of_the_benchmarks(name):
    ratios = json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text())["ratios"]
    stated = dict(re.findall(rf"^\| (.*?) \| ([\d.]+) \| `scripts/bench_{name}.py` \|$", DOCS["speed"], re.M))
    assert stated
    for what, value in stated.items():
        assert value == f"{ratios[what]:.2f}"


def test_what_is_said_of_timm_is_that_of_its_networks():
    lines = read_lines(ROOT / "results/bench/timm.jsonl", "network").values()
    measured = [each for line in lines for each in line.get("filters", {}).values()]
    modules = {line["module"] for line in lines if "module" in line}
    scaled = [each["spread_after_scaling"] or each["spread_after"] for each in measured]
    page = " ".join(DOCS["families"].split())
    count = (
        f"All {len(measured)} networks of timm of up to {MOST // 10**6} million parameters, of {len(modules)} modules"
    )
    assert count in page
    assert not any("failed" in line for line in lines)
    assert all(line["parameters"] <= MOST for line in lines if "skipped" not in line)
    assert round(sum(each["seconds"] for each in measured) / 3600) == 6  # "six hours on a CPU core"
    assert max(each["output_change_all_images"] for each in measured) < 1e-4
    assert max(scaled) < 4
    assert f"{sum(each['spread_after'] > 10 for each in measured)} keep a spread of more than 10" in page
    found = {line["network"]: each for line in lines for each in line.get("filters", {}).values()}
    loose = {name: each for name, each in found.items() if each["deviation"]["std"] > 1e-3}
    assert f"{len(loose)} amplify rounding so far" in page
    assert all(each["powers_of_two"] for each in loose.values())  # as they amplify rounding
    module = {line["network"]: line.get("module") for line in lines}
    rounded = Counter(module[name] for name, each in loose.items() if each["rounding"] > 0.1)
    kinds = sorted(rounded.items(), key=lambda pair: (-pair[1], pair[0]))
    least = max(each["rounding"] for each in loose.values() if each["rounding"] <= 0.1)
    stated = (
        f"In {rounded.total()} of them ({', '.join(f'{count} of {kind}' for kind, count in kinds)}) the output differs "
        f"from that in float64 by more than a tenth of its norm, in the others by {least:.3f} at most"
    )
    assert stated.replace(" 0.", " .") in page


def test_families_are_those_of_the_table():
    torchvision, _, _ = (ROOT / "results/tables/families.md").read_text().partition("## timm")
    rows = [row for row in torchvision.splitlines() if row.startswith("| ")]
    assert len(rows) > 10
    assert all(row in DOCS["families"] for row in rows)


def test_when_it_helps_is_that_of_the_records():
    table = pd.read_csv(ROOT / "results" / "tables" / "small_images.csv")
    table = table[table["preset"].str.endswith(", 500 training images")]
    lines = [
        line.split("|")[2:-1] for line in DOCS["initializers"].splitlines() if re.match(r"\| .*, (Adam|SGD) \|", line)
    ]
    stated, inits = [[cell.strip() for cell in line] for line in lines], ("torch", "lsuv", "gaussian", "kmeans")
    mean, deviation = {}, {}
    for network, cells in zip(("convnext_atto", "resnet18 bn", "resnet18", "mobilenetv2"), stated, strict=True):
        name, _, normalised = network.partition(" ")
        for init, cell in zip(inits, cells, strict=True):
            variant = f"{init} model.batch_norm=true" if normalised else init
            runs = table[table["preset"].str.contains(name) & (table["init"] == variant)]
            assert sorted(runs["seed"]) == [0, 1, 2]
            (lr,), found = {*runs["config.optimizer.lr"]}, runs["top1"].dropna()
            diverging = {3: "", 2: ", one of three diverges"}[len(found)]
            assert cell == f"{found.mean():.1f} ± {found.std():.1f} / {lr:g}{diverging}"
            mean[network, init], deviation[network, init] = found.mean(), found.std()
        assert max(inits, key=lambda init, network=network: mean[network, init]) == "kmeans"

    def gain(network, init):
        """Over PyTorch's default, and as so many standard errors."""
        points = mean[network, init] - mean[network, "torch"]
        error = (deviation[network, init] ** 2 + deviation[network, "torch"] ** 2) ** 0.5 / 3**0.5
        return points, points / error

    text = " ".join(DOCS["initializers"].split())
    gains = [gain(network, "kmeans")[0] for network in ("mobilenetv2", "resnet18", "resnet18 bn", "convnext_atto")]
    said = (
        "by {:.1f} points in MobileNetV2, by {:.1f} points in the ResNet without BatchNorm, and by little more than "
        "two standard errors in that with BatchNorm ({:.1f} points) and in ConvNeXt, which has LayerNorm ({:.1f})"
    )
    assert said.format(*gains) in text
    assert all(2 < gain(network, "kmeans")[1] < 2.5 for network in ("convnext_atto", "resnet18 bn"))
    assert f"So is LSUV in MobileNetV2, by {gain('mobilenetv2', 'lsuv')[0]:.1f} points" in text
    assert gain("mobilenetv2", "lsuv")[1] > 4
    assert abs(gain("convnext_atto", "lsuv")[0]) < 0.5
    assert 0 < gain("mobilenetv2", "gaussian")[1] < 2
    assert all(gain(network, "gaussian")[0] < -1 for network in ("convnext_atto", "resnet18", "resnet18 bn"))
    assert all(gain(network, "lsuv")[0] < -1 for network in ("resnet18", "resnet18 bn"))


def test_the_spreads_of_figure_1_are_those_of_the_record():
    spreads = json.loads((ROOT / "results/figures/figure1.json").read_text())["spread"]
    text = " ".join(RESULTS.partition("## Change rates")[2].partition("\n## ")[0].split())
    stated = {
        "Gaussian (ours)": r"([\d.]+) for our Gaussian",
        "k-means (ours)": r"([\d.]+) for our k-means",
        "Gaussian .01": r"([\d.]+) for the Gaussian of std .01",
        "Gaussian (caffe)": r"([\d.]+) for Caffe's hand-tuned one",
        "k-means (unscaled)": r"([\d.]+) for unscaled k-means",
        "Xavier": r"([\d.]+) for Xavier",
        "MSRA": r"([\d.]+) for MSRA",
        "LSUV": r"([\d.]+) for LSUV",
    }
    assert stated.keys() == spreads.keys()
    for line, pattern in stated.items():
        (value,) = re.findall(pattern, text)
        assert value == f"{spreads[line]:.{1 if spreads[line] < 10 else 0}f}", line


def test_the_shares_of_figure_2_are_those_of_the_record():
    shares = json.loads((ROOT / "results/figures/figure2.json").read_text())["shares_a_class"]
    text = " ".join(RESULTS.partition("## Nearest neighbours")[2].partition("\n## ")[0].split())
    names = {
        "Gaussian (ours)": "our Gaussian",
        "k-means (ours)": "our k-means",
    }
    assert names.keys() == shares.keys()
    for line, name in names.items():
        (value,) = re.findall(rf"(\d+) %(?: of the cases)? for {name}", text)
        assert int(value) == round(100 * shares[line]), line


def test_the_networks_pretrained_here_are_those_of_the_records():
    table = pd.read_csv(ROOT / "results/tables/table3.csv").set_index("init")
    found = dict(re.findall(r"^\| `pretrain\.py (.*?)` \| ([\d.]+ \| .*) \|$", RESULTS, re.M))
    expected = {}
    for path in (ROOT / "results/runs/pretrain").glob("*/record.json"):
        record = json.loads(path.read_text())
        config = record["config"]
        name = f"init={init_key(config['init'])}" + " model.batch_norm=true" * config["model"]["batch_norm"]
        cells = [f"{100 * record['metrics']['accuracy']:.1f}"]
        for rescale in ("", " init.rescale=true"):
            row = table.loc[f"pretrained {path.parent.name}{rescale}"]
            cells.append(f"{row['map_step']:.1f}" + (f" ± {row['map_step_std']:.1f}" if row["n"] > 1 else ""))
        expected[name] = " | ".join(cells)
    assert found == expected


def test_the_losses_on_imagenet_are_those_of_the_records():
    text = RESULTS.partition("## ImageNet (Figures 3 and 4)")[2].partition("\n## ")[0]
    found = {tuple(row) for row in re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)}
    expected = set()
    for path in (ROOT / "results" / "runs" / "imagenet").glob("*/record.json"):
        record = json.loads(path.read_text())
        figure = "figure4" if "GoogLeNet" in record["config"]["model"]["_target_"] else "figure3"
        of_lsuv = "LSUV, inputs times .04" if record["config"]["data"].get("scale") == 0.04 else None
        name = "GoogLeNet, " * (figure == "figure4") + (line_of(record["config"], figure) or of_lsuv)
        metrics = record["metrics"]
        shares = (f"{100 * metrics[name]:.1f}" for name in ("top1", "top5"))
        expected.add((name, f"{metrics['loss']:.2f}", *shares))
    assert found == expected


def test_the_reference_at_one_learning_rate_is_that_of_the_record():
    (stated,) = re.findall(r"with \.01 to the end the reference has a loss of ([\d.]+)", " ".join(RESULTS.split()))
    (path,) = (ROOT / "results" / "causes").glob("mini-caffe-*/record.json")
    record = json.loads(path.read_text())
    assert record["config"]["train"]["lr_every"] == record["config"]["train"]["iterations"]
    assert stated == f"{record['metrics']['loss']:.2f}"


# The rows of the README: what is measured, and by which records.
ROWS = {
    "table2 preset=mini": ("table2", "map_step", "mini, 20,000 iterations"),
    "table2 train.iterations=40000 train.lr_every=5000 tf32=true": ("table2", "map_step", "paper, 40,000 iterations"),
    "detection preset=mini": ("table2-detection", "map_voc11", "mini, 15,000 iterations"),
}


def test_the_numbers_of_the_readme_are_those_of_the_records():
    pattern = r"^\| `(.*?)` \| `init=(\w+)` \| ([\d.]+) \| (.*?) \| (\d+) min on (an H200|a CPU core) \|$"
    stated = re.findall(pattern, README, re.M)
    assert {row[0] for row in stated} == ROWS.keys()
    for command, init, published, measured, minutes, hardware in stated:
        table, metric, preset = ROWS[command]
        rows = pd.read_csv(ROOT / f"results/tables/{table}.csv").query("n > 0 and init == @init")
        (row,) = rows[rows["preset"].str.startswith(preset)].to_dict("records")
        assert published == f"{row['published']:.1f}"
        assert measured == one_decimal(row[metric], row[f"{metric}_std"]) + f", n={row['n']:.0f}"
        assert ("H200" in row["device"]) == ("H200" in hardware)
        times = [sum(record["times"].values()) / 60 for record in records_of(table, init, preset)]
        assert min(times) - 1 < int(minutes) < max(times) + 1


def records_of(table, init, preset):
    name, _, rest = preset.partition(", ")
    for path in (ROOT / "results/runs" / ("voc_det" if "detection" in table else "voc_cls")).glob("*/record.json"):
        record = json.loads(path.read_text())
        config = record["config"]
        same = record["preset"] == name and f"{config['train']['iterations']:,} iterations" == rest
        if same and init_key(config["init"]) == init:
            yield record


def test_what_is_within_noise_is_said():
    table = pd.read_csv(ROOT / "results/tables/table2.csv").query("n > 1").set_index("init")
    pairs = {
        frozenset((init, *re.findall(r"`(.*?)`", str(row)))) for init, row in table["within_noise_of"].dropna().items()
    }
    assert pairs == {frozenset(("kmeans", "pca")), frozenset(("msra", "xavier"))}
    for text in (README, RESULTS):
        assert re.search(
            r"k-means and PCA( are not told apart)?, (nor are|and) MSRA and Xavier", " ".join(text.split())
        )


@pytest.mark.slow
def test_from_the_clone_to_ones_own_initialization_beside_the_table(finish, tmp_path):
    """The commands of the README behind `make demo`, where the clone would be."""
    (tmp_path / "my_init.py").write_text(PYTHON[-1])
    block = next(block for block in SHELL if "my_init" in block and "compare.py" in block)
    for line in block.splitlines():
        _, script, *words = shlex.split(line)
        done = finish([sys.executable, ROOT / script, *words])
        assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("init=orthogonal"))
    assert line.split()[3] == "3"
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("init=kmeans "))
    assert re.search(r" 3 +[+-][\d.]+ +[+-][\d.]+ to [+-][\d.]+  (with|bey)", line)
    assert "`orthogonal`" in (tmp_path / "outputs/tables/table2.md").read_text()


def test_what_is_said_of_depth_is_that_of_the_records():
    page = " ".join((ROOT / "docs" / "lsuv.md").read_text().split())
    table = pd.read_csv(ROOT / "results" / "tables" / "depth.csv", dtype=str, keep_default_na=False)
    cells = {(row["network"], row["activation"], row["line"], row["depth"]): row for _, row in table.iterrows()}

    def trains(kind, activation, line):
        """The depths that train, and after how many iterations."""
        own = {depth: row["trains"] for (*key, depth), row in cells.items() if key == [kind, activation, line]}
        return {depth: int(found) for depth, found in own.items() if found.isdigit()}

    def ends(line, name, activation="tanh"):
        return cells["linear", activation, line, "64"][name].split(" → ")

    xavier = [f"Xavier, {fan}" for fan in ("fan-in", "fan-out", "average")]
    first = [ends(line, "outputs")[0] for line in xavier]
    saturated = [ends(line, "saturated")[0] for line in xavier]
    he = trains("vgg", "relu", "He").values()
    for said in (
        "with a std of .01 the variance of the outputs falls from {} to {} as".format(*ends("Gaussian .01", "outputs")),
        "{} of the outputs of the first hidden layer and {} of those of".format(*ends("Gaussian .5", "saturated")),
        "a variance of {} by fan-in, {} by fan-out and {} by their average".format(*first),
        "{}, {} and {} saturated with tanh".format(*saturated),
        "64 layers: {} → {} from the first hidden layer".format(*ends("He", "outputs", "relu")),
        "where Xavier (fan-in) has {} → {};".format(*ends("Xavier, fan-in", "outputs", "relu")),
        f"He trains A to E after {min(he)} to {max(he)} iterations, and 64 fully connected layers after "
        f"{trains('linear', 'relu', 'He')['64']};",
    ):
        assert said in page
    assert trains("linear", "tanh", "Gaussian .01") == {}
    assert [*trains("linear", "tanh", "Gaussian .5")] == ["4", "8"]
    assert all(len(trains("linear", "tanh", line)) == 5 for line in xavier)
    assert all([*trains("linear", "relu", line)] == ["4", "8", "16"] for line in xavier)
    assert trains("vgg", "relu", "Gaussian .01") == {}
    assert [*trains("vgg", "relu", "Xavier, fan-in")] == ["A", "B"]
    assert len(he) == len(trains("linear", "relu", "He")) == 5
    for line in ("He", "LSUV", "k-means (ours)"):
        assert [*trains("convolution", "relu", line)] == ["4", "8", "16"]
    assert {*trains("vgg", "relu", "k-means (ours)").values()} == {10}
    beyond = {line: [*trains("linear", "sigmoid", line)][2:] for line in table["line"].unique()}
    assert {line: depths for line, depths in beyond.items() if depths} == {
        "Gaussian (ours)": ["16", "32"],
        "k-means (ours)": ["16"],
    }
    assert {cells["linear", "relu", line, "32"]["trains"] for line in ("Gaussian (ours)", "k-means (ours)")} == {
        "diverges"
    }


@pytest.mark.parametrize(
    ("folder", "line", "way", "said"),
    [
        ("results/causes/paper-linear-relu-seed0-cba4886a", "within", "backward", "to {} in 64 layers"),
        ("results/runs/depth/paper-linear-relu-seed0-c8353f63", "Gaussian (ours)", "forward", "reaches {} half way"),
    ],
)
def test_how_ours_passes_deep_networks(folder, line, way, said):
    record = json.loads((ROOT / folder / "record.json").read_text())
    (cell,) = (cell for cell in record["cells"] if (cell["depth"], cell["line"]) == (64, line))
    largest = max(layer[way] for layer in cell["layers"])
    assert said.format(f"{largest:.1e}") in " ".join((ROOT / "docs" / "lsuv.md").read_text().split())


def test_small_images_are_those_of_the_records():
    table = pd.read_csv(ROOT / "results" / "tables" / "small_images.csv")
    page = " ".join((ROOT / "docs" / "lsuv.md").read_text().split())
    mnist = table[table["preset"].str.contains("data.name=mnist")].sort_values("seed")
    digits = mnist["top1"].map(lambda top1: f"{top1 / 100:.4f}".removeprefix("0"))
    lsuv = mnist["init"] == "lsuv"
    assert f"| {', '.join(digits[lsuv])} (seeds {', '.join(map(str, mnist['seed'][lsuv]))}) at full scale" in page
    others = dict(zip(mnist["init"][~lsuv], digits[~lsuv], strict=True))
    assert {*mnist["seed"][~lsuv]} == {0}
    assert "Xavier {xavier}, He {he}, our k-means {kmeans} with seed 0".format(**others) in page
    assert mnist["top1"][~lsuv].between(mnist["top1"][lsuv].min(), mnist["top1"][lsuv].max()).all()
    fitnet = table[table["preset"].str.contains("FitNet4")]
    fitnet = fitnet.assign(activation=fitnet["variant"].str.removeprefix("model.activation="))
    normalised = fitnet["init"].str.endswith(" model.batch_norm=true")
    with_norm, fitnet = fitnet[normalised], fitnet[~normalised]
    top1, converges, epochs = (
        fitnet.pivot(index="init", columns="activation", values=name) for name in ("top1", "converges", "epochs")
    )
    assert {*top1.columns} == {"relu", "tanh", "vlrelu", "sigmoid", "maxout"}
    diverging = top1.isna().stack()
    assert {*diverging.index[diverging]} == {("gaussian", "maxout"), ("he", "maxout")}
    block = (ROOT / "results" / "tables" / "small_images.md").read_text().partition("FitNet4")[2].partition("- rule")[0]
    rows = [row for row in block.splitlines() if row.startswith("| `")]
    assert len(rows) == 1 + len(top1) + with_norm["init"].nunique()
    assert all(row in DOCS["lsuv"] for row in rows)

    plain = next(name for name in top1.index if name.startswith("orthonormal"))
    assert not converges["sigmoid"].any()
    assert converges[["tanh", "vlrelu"]].all(axis=None)
    assert {*converges.index[~converges["relu"].astype(bool)]} == {plain, "xavier"}
    assert {*converges.index[~converges["maxout"].astype(bool)]} == {"gaussian", "he"}
    relu, vlrelu, tanh, maxout = (top1[name].to_dict() for name in ("relu", "vlrelu", "tanh", "maxout"))
    ahead = [  # what the page says of them
        *((relu, ours, other) for ours in ("gaussian", "kmeans") for other in ("lsuv", "he", "xavier", plain)),
        *((vlrelu, "gaussian", other) for other in ("lsuv", "he", "xavier", plain)),
        *((tanh, other, ours) for ours in ("gaussian", "kmeans") for other in ("lsuv", "he", "xavier", plain)),
        *((relu, "lsuv", "he"), (relu, "lsuv", "xavier"), (vlrelu, "lsuv", "xavier"), (tanh, "xavier", "lsuv")),
        *((maxout, "kmeans", other) for other in ("lsuv", "xavier", plain)),
        *((maxout, "lsuv", "xavier"), (maxout, plain, "xavier")),
        *((relu, "he", plain), (vlrelu, "he", plain), (relu, "lsuv", plain), (vlrelu, "lsuv", plain)),
    ]
    assert all(found[one] - found[other] >= 1.4 for found, one, other in ahead)
    level = [(vlrelu, "lsuv", "he"), (vlrelu, "kmeans", "lsuv"), (tanh, "lsuv", plain), (maxout, "lsuv", plain)]
    assert all(abs(found[one] - found[other]) < 1.4 for found, one, other in level)
    assert {epochs[name].idxmin() for name in ("relu", "vlrelu", "maxout")} == {"kmeans"}
    assert f"k-means comes to {top1['sigmoid']['kmeans']:.1f} % with sigmoid" in page

    assert with_norm["converges"].all()
    normal = with_norm.assign(init=with_norm["init"].str.removesuffix(" model.batch_norm=true"))
    normal = normal.pivot(index="init", columns="activation", values="top1")
    gains = {name: [f"{abs(gain):.1f}" for gain in (normal - top1)[name].dropna()] for name in normal}
    assert "He and LSUV gain {} and {} points with ReLU, and Xavier converges".format(*gains["relu"]) in page
    assert "with tanh He, LSUV and Xavier lose {}, {} and {};".format(*gains["tanh"]) in page
    assert "with maxout LSUV and Xavier gain {} and {}, and He trains".format(*gains["maxout"]) in page
    assert (normal[["relu", "maxout"]] > top1.loc[normal.index, ["relu", "maxout"]].fillna(0)).all(axis=None)
    assert (normal["tanh"] < top1.loc[normal.index, "tanh"]).all()
    tanh_bn, best = normal["tanh"].to_dict(), normal.max()
    assert abs(tanh["lsuv"] - tanh_bn["xavier"]) < 1.4 <= tanh["lsuv"] - tanh_bn["he"]
    assert (normal[["relu", "maxout"]].min() - top1.loc["lsuv", ["relu", "maxout"]] >= 1.4).all()
    assert (normal.loc["lsuv", ["relu", "maxout"]] - normal.loc["xavier", ["relu", "maxout"]]).abs().max() < 1.4
    assert tanh_bn["xavier"] - tanh_bn["lsuv"] >= 1.4
    assert (top1.loc["kmeans", ["relu", "maxout"]] - best[["relu", "maxout"]]).abs().max() < 1.4


def test_how_ours_trains_with_maxout():
    page = " ".join((ROOT / "docs" / "lsuv.md").read_text().split())
    found = {}
    for path in (ROOT / "results" / "runs" / "small_images").glob("mini-*/record.json"):
        record = json.loads(path.read_text())
        if record["init_report"] is not None:
            rates = [layer["rate_after"] for layer in record["init_report"]["layers"]]
            found[record["config"]["model"]["activation"], record["config"]["init"].get("filters")] = rates, record
    kinds = ("maxout", "gaussian"), ("maxout", "kmeans"), ("relu", "gaussian")
    (gaussian, record), (kmeans, _), (relu, trained) = (found[kind] for kind in kinds)
    assert "nan at step 50 " in record["diverged"]
    assert trained["converges"]["holds"]
    spans = [f"{min(rates):.1f} to {max(rates):.1f}" for rates in (gaussian, kmeans)]
    assert "with maxout they are {}, those of k-means {}, but".format(*spans) in page
    assert {f"{rate:.1f}" for rate in relu} == {"14.0"}
    assert "but with ReLU, where it trains, 14.0 as well" in page
    folder = "results/causes/fitnet-maxout-gaussian-seed0-bd464014"
    slower = json.loads((ROOT / folder / "record.json").read_text())
    assert slower["converges"]["holds"]
    assert slower["config"]["optimizer"]["lr"] == 0.003
    assert slower["config"]["train"]["iterations"] * 3 == record["config"]["train"]["iterations"]
    assert f"it trains, to {100 * slower['metrics']['top1']:.1f} % after a third of the iterations (`{folder}`)" in page


def test_lsuv_on_imagenet_is_that_of_the_records():
    table = pd.read_csv(ROOT / "results" / "tables" / "flat_part.csv").set_index("init")
    page = " ".join((ROOT / "docs" / "lsuv.md").read_text().split())
    googlenet = table["preset"].str.contains("GoogLeNet")
    ours, theirs = (table[googlenet].loc[name] for name in ("lsuv", "caffe"))
    assert f"top-1 of {ours['top1']:.1f} % for {theirs['top1']:.1f} %" in page
    assert f"after {ours['epochs']:.3f} epochs for {theirs['epochs']:.3f}" in page
    table = table[~googlenet]
    rows = {name: table.loc[[name]].iloc[-1] for name in ("lsuv", "gaussian", "kmeans", "caffe")}
    epochs = {name: f"{row['epochs']:.3f}".removeprefix("0") for name, row in rows.items()}
    assert rows["caffe"].isna()["epochs"]
    assert (
        f"LSUV leaves it after {epochs['lsuv']} epochs of a small set, the reference never; "
        f"our Gaussian after {epochs['gaussian']}, k-means after {epochs['kmeans']}"
    ) in page
    assert (
        f"top-1 of {rows['lsuv']['top1']:.1f} % with LSUV and {rows['caffe']['top1']:.1f} % with the reference; "
        f"our Gaussian {rows['gaussian']['top1']:.1f} %, k-means {rows['kmeans']['top1']:.1f} %"
    ) in page
