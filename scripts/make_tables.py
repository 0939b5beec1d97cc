"""Make tables from the records of runs, beside the published numbers in results/paper/.

    python scripts/make_tables.py                               # results/runs -> results/tables
    python scripts/make_tables.py --runs outputs --out tables   # of one's own

Initializations of one's own are rows below the paper's; networks and data of one's own have blocks of their own,
without published numbers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiments.engine.convergence import FLAT, constant_loss, leaves_flat_part
from experiments.engine.metrics import welch
from experiments.engine.records import (
    CAFFENET,
    ITERATIONS,
    USUAL,
    assigned,
    by_initialization,
    by_protocol,
    classes_in,
    make_files,
    no_record,
    one_of_each_seed,
    read_curve,
    read_records,
    unusual,
)
from experiments.files import read_lines

RESULTS = Path(__file__).resolve().parents[1] / "results"

# Rows that Table 2 has here and not in the paper, below those of the paper.
BASELINES = {
    "gaussian_unscaled": "Random Gaussian, unscaled (published in Table 1)",
    "torch": "PyTorch default",
    "lsuv": "LSUV (Mishkin & Matas 2016)",
}
METRICS = {"map_step": "step AP", "map_voc11": "11-point AP"}
DETECTION_METRICS = {"map_voc11": "11-point AP", "map_area": "area AP", "coco_ap": "COCO AP"}
ORIGIN = ("data", "device", "versions", "commit")

NETWORKS = {"GoogLeNet": "experiments.networks.GoogLeNet", "VGG-16": "experiments.networks.VGG16"}  # of section 4.4
TARGET, OPTIMIZER, BATCH_NORM = "config.model._target_", "config.optimizer.name", "config.model.batch_norm"
RATE = "config.optimizer.lr"
MEASURED = ["map_step", "map_step_std", "n"]
SCALINGS = {"none": "no scaling", "within": "Within-layer", "between": "Between-layer", "both": "Both"}

NOISE = """\
Within noise: the initializations of the same block from which this one is not told apart, as the 95 % interval of
Welch's t over seeds holds a difference of 0; each pair is looked at by itself. One seed tells nothing apart.
"""

TABLE1 = """\
# Table 1: scaling, optimizer and batch normalization, PASCAL VOC 2007 classification

Written by `python scripts/make_tables.py` from the records in `results/runs/`: do not edit.

Mean average precision of CaffeNet on the test set in percent, step AP, ± the standard deviation over seeds and with
their number where there are several; in brackets what the paper publishes (Krähenbühl et al., 2016), at the scale of
the preset `paper`. It states neither the learning rate of Adam nor where the normalizations stand. A dash has not been
measured. An asterisk: below the best of its column beyond noise, as the 95 % interval of Welch's t over seeds does not
hold a difference of 0; one seed tells nothing apart.
"""

TABLE2 = (
    """\
# Table 2: initializations, PASCAL VOC 2007 classification

Written by `python scripts/make_tables.py` from the records in `results/runs/`: do not edit.

Mean average precision on the test set in percent, ± the standard deviation over seeds. Published:
Krähenbühl et al. (2016), at the scale of the preset `paper`; compare it with the step AP, which is how the
paper's authors compute it (scikit-learn). The VOC 2007 11-point AP of the same scores reads about two points
higher. An empty cell has not been measured, or was not published.

"""
    + NOISE
)

DETECTION2 = (
    """\
# Table 2: initializations, PASCAL VOC 2007 detection

Written by `python scripts/make_tables.py` from the records in `results/runs/`: do not edit.

Mean average precision of Fast R-CNN on the test set in percent, ± the standard deviation over seeds. Published:
Krähenbühl et al. (2016), 11-point AP at the scale of the preset `paper`, the best of three learning rates for each
initialization. Here too the learning rate of the best 11-point AP counts, of those that there are records of. Area AP
is that of VOC 2010 and later, COCO AP the mean over overlaps from .5 to .95. An empty cell has not been measured, or
was not published.

"""
    + NOISE
)

DETECTION3 = DETECTION2.replace("Table 2: initializations", "Table 3: pre-trained networks")

TABLE3 = (
    """\
# Table 3: pre-trained networks, PASCAL VOC 2007 classification

Written by `python scripts/make_tables.py` from the records in `results/runs/`: do not edit.

Mean average precision on the test set in percent, ± the standard deviation over seeds. Published: Krähenbühl et al.
(2016). "Ours +" are networks whose change rates were made equal before they were trained on (`init.rescale=true`).
Weights of our own, from `experiments/pretrain.py`, stand below those of the paper. An empty cell has not been measured.

"""
    + NOISE
)

FIRST_LOSSES = """\
# The first losses of the initializations of Table 2

Written by `python scripts/make_tables.py` from the records in `results/runs/`: do not edit.

Mean training loss (sigmoid cross-entropy, summed over the 20 classes) over the first 100 iterations and over iterations
401 to 500: CaffeNet at full width (preset `paper`, runs of 500 iterations) beside the narrower one of preset `mini`. An
empty cell has not been measured.
"""
SHORT = 1_000  # runs of fewer iterations show how training begins, and have no place among results

SECTION44 = (
    """\
# Section 4.4: other networks, PASCAL VOC 2007 classification

Written by `python scripts/make_tables.py` from the records in `results/runs/`: do not edit.

Mean average precision on the test set in percent, ± the standard deviation over seeds. Published: Krähenbühl et al.
(2016), at the scale of the preset `paper`. An empty cell has not been measured.

"""
    + NOISE
)

SMALL_IMAGES = """\
# Small images: initializations, activations and BatchNorm

Written by `python scripts/make_tables.py` from the records in `results/runs/`: do not edit.

Top-1 accuracy on the test images in percent at the end of training, ± the standard deviation over seeds; behind the
slash the epochs after which the loss has left the flat part of its beginning. Both are means over the runs that
converge. Where training is on a number of images, each initialization has the learning rate that was chosen for it on
images held out (`scripts/when.py`), which follows. A dash has not been measured. In brackets what is published (Mishkin
& Matas, 2016), at the scale of the preset `paper`.
"""
FLAT_PART = f"""\
# How long the loss stays flat on ImageNet

Written by `python scripts/make_tables.py` from the records in `results/runs/` and the curves beside them: do not edit.

The rule: {FLAT}. Mishkin & Matas (2016) state .05 epochs for CaffeNet with LSUV and .5 for the reference, and that LSUV
ends 1.3 points lower; for GoogLeNet top-1 accuracies of 68.0 with LSUV and 67.2.
"""
DEPTH = f"""\
# Depth: which initializations let deep plain networks train

Written by `python scripts/make_tables.py` from the records in `results/runs/`: do not edit.

Iterations until the loss leaves the flat part of its beginning, for each depth; a dash where it does not within the
training, and what stopped it where something did. Then, of the deepest network before training, from the first hidden
layer to the last: the variance of the outputs, that of the gradient, and the share of outputs that are saturated. The
rule: {FLAT}.
"""
BATCH_NORM = "config.model.batch_norm"  # whose rows stand below those without
# Settings of small_images.py that are columns of a block.
VARIANTS = ("config.model.activation", "config.model.depth", "config.loss")
AT_THE_START = {"outputs": ("forward", ".1e"), "gradient": ("backward", ".1e"), "saturated": ("saturated", ".0%")}
NETWORK = ("config.network.kind", "config.network.activation")  # of depth.py
OF_DEPTH = [*NETWORK, "config.network.depths", "config.network.width", "config.data.train", "config.data.test"]
OF_SMALL = [*VARIANTS, BATCH_NORM, "config.data.train", "config.data.test"]  # that no title names
IMAGES, HELD_OUT = "config.data.images", "config.data.held_out"

FAMILIES = """\
# The networks of torchvision

Written by `python scripts/make_tables.py` from `results/bench/families.json`, which `python scripts/bench_families.py`
writes: do not edit.

The between-layer step after the within-layer step, on images of VOC 2007: the spread of the change rates, largest over
smallest, before and after, as the range over the networks of a family; 1 is equal. Where parts that are not homogeneous
hold layers fast, a spread is left, which `nonhomogeneous="scale"` removes. The change of the output is that of the
network of the family which changes most, in norm relative to the output, on all images; in brackets what rounding alone
does to its output (float32 against float64).
"""
TIMM = """\
A row per module of timm, of its networks of up to 60 million parameters that have been tried so far
(`results/bench/timm.jsonl`, written by `python scripts/bench_families.py --timm`). The note says what holds the rates
where a spread of more than 10 is left. Branches that start at 0, as in ResNets of timm, are not among these rates yet.
"""
UNEQUAL = 10  # a spread above which a row says what holds the rates
# Family -> the beginnings of its networks' names, and what is particular about it.
FAMILY_NAMES = {
    "AlexNet": (("alexnet",), ""),
    "VGG": (("vgg",), ""),
    "ResNet, ResNeXt, Wide ResNet": (("resnet", "resnext", "wide_resnet"), ""),
    "DenseNet": (("densenet",), "rates are equalised through concatenations, by blocks of channels"),
    "GoogLeNet": (("googlenet",), "auxiliary outputs run in training mode only: not initialized"),
    "Inception v3": (("inception",), "auxiliary output as in GoogLeNet"),
    "SqueezeNet": (("squeezenet",), ""),
    "MobileNetV2, MNASNet": (("mobilenet_v2", "mnasnet"), ""),
    "MobileNetV3": (("mobilenet_v3",), "gates and the hard swish of the classifier hold their layers"),
    "ShuffleNetV2": (("shufflenet",), ""),
    "RegNet X": (("regnet_x",), ""),
    "RegNet Y": (("regnet_y",), "amplifies rounding, so that scales may be powers of two"),
    "EfficientNet, V2": (("efficientnet",), "the SiLU and the sigmoid of a gate hold its layers"),
    "ConvNeXt": (("convnext",), "the layer scale takes up what GELU holds"),
    "ViT": (("vit",), "GELU; the residual stream has one scale"),
    "Swin, V2": (("swin",), "GELU; the residual stream has one scale; V2 computes some biases"),
    "MaxViT": (("maxvit",), "GELU, gates, and the residual stream"),
}
MEASURES = ("images", "size", "parameters", "layers", "spread_before", "spread_after", "log_variance_before")
MEASURES += ("log_variance_after", "output_change", "output_change_all_images", "rounding", "powers_of_two")
MEASURES += ("spread_after_scaling", "output_change_scaling", "noted_layers", "fallbacks", "seconds")


def main() -> None:
    make_files(__doc__, RESULTS / "runs", RESULTS / "tables", tables_of)


def tables_of(folders: list[Path], paths: list[Path]) -> dict[str, str]:
    """The tables of the records `paths` under `folders`; that of the networks of torchvision with our own records."""
    if folders == [RESULTS / "runs"]:
        return make_tables(paths, RESULTS / "paper", RESULTS / "bench" / "families.json")
    names = ", ".join(f"`{folder}`" for folder in folders)
    tables = make_tables(paths, RESULTS / "paper")
    return {name: text.replace("`results/runs/`", names) for name, text in tables.items()}


def make_tables(paths: Sequence[Path], paper: Path, families: Path | None = None) -> dict[str, str]:
    """File name -> text of every table, from records.

    The table of the networks of torchvision is made where `families` is there.

    Raises:
        ValueError: a file that is no result record, by name.
    """
    records = results(paths, "voc_cls", METRICS)
    names = own_weights(paths)
    beginnings = caffenet = others = records
    if not records.empty:
        shown = begins(records, paper)
        long = records[~shown | (records[ITERATIONS].astype(int) >= SHORT)]
        beginnings, caffenet, others = records[shown], long[long[TARGET] == CAFFENET], long[long[TARGET] != CAFFENET]
    scratch, trained = by_start(outside_table1(caffenet, paper))
    tables = table1(caffenet, paper) | table2(scratch, paper) | table3(trained, paper, names) | section44(others, paper)
    tables |= first_losses(beginnings, paper)
    tables |= detection(results(paths, "voc_det", DETECTION_METRICS, but=[RATE]), paper, names)
    tables |= small_images(paths, paper) | flat_part(paths) | depth(paths)
    if families is not None and families.exists():
        tables |= families_table(families)
    return tables


def results(
    paths: Sequence[Path], experiment: str, metrics: Mapping[str, str], but: Sequence[str] = ()
) -> pd.DataFrame:
    """The records of an experiment: `init` tells initializations apart, and each has one record of a seed.

    Those that differ in the settings `but` too are among them.
    """
    records = read_records(paths, experiment, metrics)
    if records.empty:
        return records
    for name in but:
        lacking = records["path"] if name not in records else records.loc[records[name].isna(), "path"]
        if len(lacking):
            raise no_record(lacking.iloc[0], f"{name} is missing")
    blocks = map(by_initialization, by_protocol(records, but).values())
    return pd.concat([one_of_each_seed(block, ["init", *but]) for block in blocks]).sort_index()


def at_best_rate(records: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Of each initialization the records of the learning rate whose mean is best; `rate` names it and those tried.

    As the paper does for detection, where it tries three.
    """
    kept = []
    for block in by_protocol(records, but=[RATE]).values() if len(records) else ():
        for _, runs in block.groupby("init"):
            means = runs.groupby(RATE)[metric].mean().sort_values(ascending=False)
            best = means.index[0] + (f", best of {', '.join(sorted(means.index, key=float))}" if len(means) > 1 else "")
            kept.append(runs[runs[RATE] == means.index[0]].assign(rate=best))
    return pd.concat(kept).sort_index() if kept else records


def begins(records: pd.DataFrame, paper: Path) -> pd.Series:
    """Which records are of what the paper trains, at a scale that `first_losses` shows."""
    methods = pd.read_csv(paper / "table2.csv")["init"]
    same = pd.concat([records[name] == value for name, value in USUAL.items()], axis=1).all(axis=1)
    return same & records["init"].isin(methods) & records["preset"].isin(["paper", "mini"])


def outside_table1(records: pd.DataFrame, paper: Path) -> pd.DataFrame:
    """The records that Tables 2 and 3 show: of plain networks by SGD, and others that Table 1 has no cell for."""
    if records.empty:
        return records
    cells = pd.read_csv(paper / "table1.csv").query("optimizer != 'sgd' or batch_norm")
    cells = {*zip(cells["optimizer"], cells["batch_norm"].astype(str), cells["init"], strict=True)}
    places = zip(records[OPTIMIZER], records[BATCH_NORM], records["init"], strict=True)
    return records[[place not in cells for place in places]]


def own_weights(paths: Sequence[Path]) -> dict[str, str]:
    """Key -> name of the initializations from what `experiments/pretrain.py` trained, by the folders of its records."""
    names = {}
    for _, row in read_records(paths, "pretrain", {"accuracy": ""}).iterrows():
        key = f"pretrained {Path(row['path']).parent.name}"
        name = f"position of patches ({row['accuracy']:.1f} % right), from {row['init']}"
        name += " with BatchNorm" * (row.get("config.model.batch_norm") == "True")  # an option of CaffeNet alone
        names |= {key: name, f"{key} init.rescale=true": f"Ours + {name}"}
    return names


def names_in(names: Mapping[str, str], records: pd.DataFrame) -> dict[str, str]:
    """The names of the initializations that have records."""
    return {init: names[init] for init in sorted({*records.get("init", ())} & {*names})}


def by_start(records: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Networks trained from scratch (Table 2), and pre-trained ones with our k-means for comparison (Table 3)."""
    if records.empty:
        return records, records
    trained = records["init"].str.startswith("pretrained ")
    return records[~trained], records[trained | (records["init"] == "kmeans")]


def table1(records: pd.DataFrame, paper: Path) -> dict[str, str]:
    """Table 1: scalings by optimizers, with and without batch normalization, for two kinds of filters."""
    published = pd.read_csv(paper / "table1.csv")
    columns = ["optimizer", "batch_norm", "filters"]
    blocks: dict[str, list[pd.DataFrame]] = {}  # by protocol
    elsewhere = set()  # the protocols that are not of the paper's data
    keys = [published["optimizer"], published["batch_norm"]]
    for (optimizer, batch_norm), cells in published.groupby(keys, sort=False):
        if records.empty:
            break
        own = (records[OPTIMIZER] == optimizer) & (records[BATCH_NORM] == str(batch_norm))
        chosen = records[own & records["init"].isin(cells["init"])]
        for protocol, block in by_protocol(chosen, [OPTIMIZER, BATCH_NORM]).items() if len(chosen) else ():
            ran = cells.join(average(block)[MEASURED], on="init", how="inner")
            below = [below_best(column, block) for _, column in ran.groupby("filters")]
            blocks.setdefault(protocol, []).append(ran.assign(below_best=pd.concat(below)))
            if [name for name in unusual(block) if name not in (OPTIMIZER, BATCH_NORM)]:
                elsewhere.add(protocol)
    texts, parts = [], []
    for protocol, found in (blocks or {"paper": []}).items():
        measured = pd.concat(found)[[*MEASURED, "below_best"]] if found else None
        table = published if measured is None else published.join(measured)
        if protocol in elsewhere:
            table = table.assign(classification=float("nan"))
        texts.append(f"## Preset {protocol}\n\n{table1_markdown(table, columns)}")
        parts.append(table.assign(preset=protocol))
    return files("table1", TABLE1, texts, pd.concat(parts).drop(columns="source"))


def below_best(cells: pd.DataFrame, block: pd.DataFrame) -> pd.Series:
    """Which cells of a column are below its best one beyond noise; `block` has their records."""
    values = {init: [*runs["map_step"]] for init, runs in block.groupby("init")}
    best = values[cells.loc[cells["map_step"].idxmax(), "init"]]
    intervals = [welch(best, values[init]) for init in cells["init"]]
    return pd.Series([bool(interval and interval[0] > 0) for interval in intervals], cells.index)


def table1_markdown(table: pd.DataFrame, columns: list[str]) -> str:
    """A row per scaling, as in the paper."""
    order = [*dict.fromkeys(table[columns].itertuples(index=False, name=None))]
    names = [f"{optimizer.upper()}{' + BN' * bn}, {filters}" for optimizer, bn, filters in order]
    lines = [["scaling", *names], ["---", *["---:"] * len(order)]]
    cells = table.set_index(["scaling", *columns])
    for scaling, name in SCALINGS.items():
        lines.append([name, *(table1_cell(cells.loc[(scaling, *column)]) for column in order)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table1_cell(cell: pd.Series) -> str:
    """What was measured, and what was published."""
    published = "" if pd.isna(cell["classification"]) else f" ({cell['classification']:.1f})"
    if pd.isna(cell.get("map_step")):
        return f"-{published}"
    several = f" ± {cell['map_step_std']:.1f}, n={cell['n']}" if cell["n"] > 1 else ""
    return f"{cell['map_step']:.1f}{several}{'*' * bool(cell['below_best'])}{published}"


def table2(records: pd.DataFrame, paper: Path) -> dict[str, str]:
    """Table 2, classification."""
    published = pd.read_csv(paper / "table2.csv")
    scalings = pd.read_csv(paper / "table1.csv").query("optimizer == 'sgd' and not batch_norm")
    numbers = pd.concat([published, scalings]).drop_duplicates("init").set_index("init")["classification"]
    methods = dict(zip(published["init"], published["method"], strict=True)) | BASELINES

    return comparison("table2", TABLE2, records, methods, numbers)


def first_losses(records: pd.DataFrame, paper: Path) -> dict[str, str]:
    """How training begins at full width and at preset `mini`, from the curves beside the records of seed 0.

    Of several runs the shortest counts.
    """
    if not records.empty:
        records = records.sort_values(ITERATIONS, key=lambda column: column.astype(int), ascending=False)
    methods = pd.read_csv(paper / "table2.csv").set_index("init")["method"]
    columns = pd.MultiIndex.from_product([["paper", "mini"], ["1 to 100", "401 to 500"]])
    table = pd.DataFrame(index=methods.index, columns=columns, dtype=float)
    for _, row in records.iterrows():
        path = Path(row["path"]).with_name("curve.csv")
        if row["seed"] == 0 and row["init"] in table.index and row["preset"] in ("paper", "mini") and path.exists():
            try:
                curve = pd.read_csv(path).set_index("step")["loss"].astype(float)
                table.loc[row["init"], row["preset"]] = curve.reindex([100, 500]).to_numpy()
            except (KeyError, TypeError, ValueError) as error:
                raise no_record(path, repr(error)) from error
    lines = [["initialization", *(f"{preset}, {steps}" for preset, steps in columns)]]
    lines.append(["---", *["---:"] * len(columns)])
    for init, row in table.iterrows():
        lines.append([methods[init], *("" if pd.isna(value) else f"{value:.2f}" for value in row)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    table.columns = [f"{preset}_{steps.replace(' ', '_')}" for preset, steps in columns]
    return files("first_losses", FIRST_LOSSES, [text], table.reset_index())


def table3(records: pd.DataFrame, paper: Path, names: Mapping[str, str]) -> dict[str, str]:
    """Table 3, classification: pre-trained networks, as they are and at equal change rates."""
    published = pd.read_csv(paper / "table3.csv").set_index("init")
    methods = published["method"].to_dict() | names_in(names, records)
    return comparison("table3", TABLE3, records, methods, published["classification"])


def detection(records: pd.DataFrame, paper: Path, names: Mapping[str, str]) -> dict[str, str]:
    """The detection columns of Tables 2 and 3."""
    scratch, trained = by_start(at_best_rate(records, "map_voc11"))
    tables = {}
    for name, text, own in (("table2", DETECTION2, scratch), ("table3", DETECTION3, trained)):
        published = pd.read_csv(paper / f"{name}.csv").set_index("init")
        methods = published["method"].to_dict() | (BASELINES if name == "table2" else names_in(names, own))
        own = (own, methods, published["detection"], DETECTION_METRICS)
        tables |= comparison(f"{name}-detection", text, *own, but=[RATE])
    return tables


def section44(records: pd.DataFrame, paper: Path) -> dict[str, str]:
    """Section 4.4: GoogLeNet and VGG-16, a block for each."""
    published = pd.read_csv(paper / "section4.4.csv")
    texts, parts = [], []
    for network, rows in published.groupby("network", sort=False):
        own = records if records.empty else records[records[TARGET] == NETWORKS[network]]
        methods = {init: f"{network}, {init}" for init in rows["init"]}
        numbers = rows.set_index("init")["classification"]
        found = blocks(f"{network}, preset", own, methods, numbers, but=[TARGET])
        texts += found[0]
        parts.append(found[1].assign(network=network))
    table2 = pd.read_csv(paper / "table2.csv")
    names = dict(zip(table2["init"], table2["method"], strict=True)) | BASELINES
    own = records if records.empty else records[~records[TARGET].isin(NETWORKS.values())]
    for target, found in own.groupby(TARGET) if len(own) else ():
        title = f"{target.rpartition('.')[2]} (`{target}`), preset"
        text, rows = blocks(title, found, names_in(names, found), pd.Series(dtype=float), but=[TARGET])
        texts += text
        parts.append(rows.assign(network=target))
    return files("section4.4", SECTION44, texts, pd.concat(parts))


def small_images(paths: Sequence[Path], paper: Path) -> dict[str, str]:
    """The table of the records of small_images.py: a block for each protocol; no table without records."""
    records = read_records(paths, "small_images", {})
    if records.empty:
        return {}
    records = pd.concat([records, pd.DataFrame([outcome(row) for _, row in records.iterrows()], records.index)], axis=1)
    records = records.reindex(columns=[*dict.fromkeys([*records, *VARIANTS, BATCH_NORM, RATE, IMAGES, HELD_OUT])])
    records = records[records[HELD_OUT].isna() | (records[HELD_OUT] == "None")]  # the others choose learning rates
    few = records[IMAGES].notna() & (records[IMAGES] != "None")
    found = by_protocol(records[~few], OF_SMALL) if not few.all() else {}
    for count, rows in records[few].groupby(IMAGES):
        blocks_of = by_protocol(rows, [*OF_SMALL, RATE, IMAGES])
        found |= {f"{title}, {count} training images": block for title, block in blocks_of.items()}
    published = pd.read_csv(paper / "lsuv.csv").set_index(["data", "model", "loss", "init"])["top1"]
    texts, parts = [], []
    for protocol, block in found.items():
        names = [name for name in VARIANTS if block[name].nunique(dropna=False) > 1]
        block = by_initialization(block)
        if block[BATCH_NORM].nunique(dropna=False) > 1:
            block.loc[block[BATCH_NORM] == "True", "init"] += " model.batch_norm=true"
        block = one_of_each_seed(block, ["init", *names])
        block["variant"] = [", ".join(assigned(row, names)) or "top-1 / epochs" for _, row in block.iterrows()]
        columns = [*dict.fromkeys(block.sort_values(names)["variant"])]
        lines = [["`init=`", *columns], ["---", *["---:"] * len(columns)]]
        for init, rows in block.groupby("init"):
            own = dict(iter(rows.groupby("variant")))
            lines.append([f"`{init}`", *(small_cell(own[name], published) if name in own else "-" for name in columns)])
        texts.append(f"## {plain(protocol)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
        texts.append(f"- rule: {'; '.join(sorted({*map(plain, block['rule'])}))}\n{origin(block).lstrip()}")
        parts.append(block[["init", "variant", "seed", RATE, "top1", "converges", "epochs"]].assign(preset=protocol))
    return files("small_images", SMALL_IMAGES, texts, pd.concat(parts)) if parts else {}


def outcome(row: pd.Series) -> dict:
    """What came of a run of small_images.py: accuracy in percent, and by which rules it converged and when it began."""
    record = row["record"]
    try:
        left = record["leaves_flat_part"]["iteration"]
        top1 = record["metrics"]["top1"]
        if not isinstance(record["converges"]["holds"], bool):
            raise ValueError("converges.holds should be true or false")
        return {
            "top1": float("nan") if top1 is None else 100 * float(top1),
            "converges": record["converges"]["holds"],
            "epochs": float("nan") if left is None else left / record["epoch"],
            "rule": str(record["converges"]["rule"]),
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise no_record(row["path"], repr(error)) from error


def small_cell(rows: pd.DataFrame, published: pd.Series) -> str:
    """The runs of an initialization in one column, with what is published of it."""
    good, first = rows[rows["converges"]], rows.iloc[0]
    text = "does not converge" if good.empty else f"{good['top1'].mean():.2f}"
    text += f" ± {good['top1'].std():.2f}" if len(good) > 1 else ""
    text += f" / {good['epochs'].mean():.2f}" if good["epochs"].notna().any() else ""
    text += f", n={len(rows)}" * (len(rows) > 1) + f", {len(good)} converge" * (0 < len(good) < len(rows))
    if pd.notna(first[IMAGES]) and first[IMAGES] != "None":
        text += f", lr {' '.join(sorted(set(rows[RATE])))}"
    key = (*(first.get(f"config.{name}") for name in ("data.name", "model._target_", "loss")), first["init"])
    return text + (f" ({published[key]:.1f})" if key in published.index else "")


def flat_part(paths: Sequence[Path]) -> dict[str, str]:
    """How long the loss of imagenet.py stays flat, from the curves beside its records; no table without records."""
    records = read_records(paths, "imagenet", {"top1": "", "top5": ""})
    if records.empty:
        return {}
    records["epochs"] = [flat_epochs(row) for _, row in records.iterrows()]
    texts, parts = [], []
    for protocol, block in by_protocol(records, OF_SMALL).items():
        block = one_of_each_seed(by_initialization(block), ["init"])
        lines = [["`init=`", "epochs until the loss leaves the flat part", "top-1", "top-5", "seed"]]
        lines.append(["---", "---:", "---:", "---:", "---:"])
        for _, row in block.iterrows():
            epochs = "never" if pd.isna(row["epochs"]) else f"{row['epochs']:.3f}"
            lines.append([f"`{row['init']}`", epochs, f"{row['top1']:.1f}", f"{row['top5']:.1f}", str(row["seed"])])
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        texts.append(f"## {plain(protocol)}\n\n{table}{origin(block)}")
        parts.append(block[["init", "seed", "epochs", "top1", "top5"]].assign(preset=protocol))
    return files("flat_part", FLAT_PART, texts, pd.concat(parts))


def flat_epochs(row: pd.Series) -> float:
    """Epochs after which the loss of a run of imagenet.py has left the flat part; NaN where it never does."""
    curve = read_curve(row)
    try:
        left = leaves_flat_part(curve, constant_loss("softmax", classes_in(row["data"])))
        return float("nan") if left is None else left / row["record"]["epoch"]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise no_record(row["path"], repr(error)) from error


def depth(paths: Sequence[Path]) -> dict[str, str]:
    """What trains in the networks of depth.py, and how signals pass the deepest; no table without records."""
    records = read_records(paths, "depth", {})
    if records.empty:
        return {}
    texts, parts = [], []
    for protocol, block in by_protocol(records, OF_DEPTH).items():
        block = one_of_each_seed(block, NETWORK)
        for _, row in block.sort_values([*NETWORK, "seed"]).iterrows():
            cells = networks_of(row)
            name = f"{row[NETWORK[0]]}, {row[NETWORK[1]]}" + f", seed {row['seed']}" * (row["seed"] != 0)
            shown = cells.pivot(index="line", columns="depth", values="trains")
            shown = shown.reindex(index=[*dict.fromkeys(cells["line"])], columns=[*dict.fromkeys(cells["depth"])])
            titles = ["", *map(str, shown), *AT_THE_START]
            lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
            deepest = cells[cells["depth"] == shown.columns[-1]].set_index("line")
            for line, trains in shown.iterrows():
                lines.append([str(line), *trains, *deepest.loc[line, [*AT_THE_START]]])
            table = "".join(f"| {' | '.join(map(plain, line))} |\n" for line in lines)
            texts.append(f"## {name} ({plain(protocol)})\n\n{table}{origin(block[block.index == row.name])}")
            parts.append(cells.assign(network=row[NETWORK[0]], activation=row[NETWORK[1]], seed=row["seed"]))
    return files("depth", DEPTH, texts, pd.concat(parts))


def networks_of(row: pd.Series) -> pd.DataFrame:
    """What came of each network of a run of depth.py, as text."""
    try:
        networks = pd.DataFrame([outcome_of(cell) for cell in row["record"]["cells"]])
        if networks.empty or networks.duplicated(["line", "depth"]).any():
            raise ValueError("cells should be one of each initialization and depth")
        return networks
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise no_record(row["path"], repr(error)) from error


def outcome_of(cell: dict) -> dict:
    """What came of one of them: whether it trains, and how its first and its last hidden layer are before training."""
    trains = "-" if cell["takes_off"] is None else f"{cell['takes_off']:d}"
    found = {"depth": cell["depth"], "line": str(cell["line"])}
    found["trains"] = "fails" if cell["failed"] else "diverges" if cell["diverged"] else trains
    hidden = cell["layers"][:-1]
    for name, (key, digits) in AT_THE_START.items():
        ends = [hidden[i][key] for i in (0, -1)] if hidden else []
        said = ["?" if end is None else format(float(end), digits) if end else "0" for end in ends]
        found[name] = "" if key == "saturated" and None in ends else " → ".join(said)
    return found


def comparison(
    name: str,
    text: str,
    records: pd.DataFrame,
    methods: dict[str, str],
    numbers: pd.Series,
    metrics: Mapping[str, str] = METRICS,
    but: Sequence[str] = (),
) -> dict[str, str]:
    """Markdown and CSV of a table with a row for each initialization; see `blocks`."""
    return files(name, text, *blocks("Preset", records, methods, numbers, metrics, but))


def blocks(
    title: str,
    records: pd.DataFrame,
    methods: dict[str, str],
    numbers: pd.Series,
    metrics: Mapping[str, str] = METRICS,
    but: Sequence[str] = (),
) -> tuple[list[str], pd.DataFrame]:
    """Markdown of each protocol, and all rows: one for each initialization, first those of `methods`, key -> name.

    Args:
        numbers: what is published, by key; it stands beside what was trained on the paper's data as the paper does.
        but: settings that the title or the caller names.
    """
    texts, parts = [], []
    for protocol, block in by_protocol(records, but).items():
        ours = not [name for name in unusual(block) if name not in but]
        rows = average(block, metrics)
        rows = rows.reindex([*methods, *rows.index.difference(list(methods))]).rename_axis("init")
        rows.insert(0, "method", [methods.get(init, init) for init in rows.index])
        rows.insert(1, "published", numbers.reindex(rows.index) if ours else float("nan"))
        texts.append(f"## {title} {plain(protocol)}\n\n{markdown(rows, metrics)}{origin(block)}")
        parts.append(rows.reset_index().assign(preset=protocol))
    return texts, pd.concat(parts)


def files(name: str, text: str, texts: list[str], rows: pd.DataFrame) -> dict[str, str]:
    """The Markdown and the CSV of a table."""
    csv = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return {f"{name}.md": "\n".join([text, *texts]), f"{name}.csv": csv}


def families_table(path: Path) -> dict[str, str]:
    """The networks of torchvision, a row per family, and as CSV a row per network and kind of filters.

    Those of timm, where `timm.jsonl` lies beside the file, follow with a row per module.

    Raises:
        ValueError: a file that `scripts/bench_families.py` did not write, or a network of no family.
    """
    try:
        record = json.loads(path.read_text())
        timm = read_lines(path.with_name("timm.jsonl"), "network")
        networks = record["networks"] | {name: line for name, line in timm.items() if "filters" in line}
        rows = [
            network
            | measured
            | measured["deviation"]
            | {"network": name, "family": network.get("module") or family(name), "filters": filters}
            for name, network in networks.items()
            for filters, measured in network["filters"].items()
        ]
        about = [f"data: {record['data']}", f"device: {record['device']}, {record['threads']} threads"]
        about.append("versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
        table = pd.DataFrame(rows).rename(columns={"std": "std_deviation", "mean": "mean_deviation"})
        columns = ["family", "network", "filters", *MEASURES, "std_deviation", "mean_deviation"]
        csv = table[columns].to_csv(index=False, float_format="%.4g", lineterminator="\n")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of networks ({error!r}): repair it or remove it") from error
    notes = {name: note for name, (_, note) in FAMILY_NAMES.items()}
    modules = sorted({row["family"] for row in rows} - {*notes})
    held = {name: what_holds([row for row in rows if row["family"] == name]) for name in modules}
    parts = [FAMILIES, family_rows(table, notes)]
    if timm:
        about.append(f"timm {', '.join(sorted({line['timm'] for line in timm.values()}))}")
        parts += [f"## timm\n\n{TIMM}", family_rows(table, held, "module")]
    failed = record.get("failed", {}) | {name: line["failed"] for name, line in timm.items() if "failed" in line}
    if failed:
        parts.append("Failed:\n\n" + "".join(f"- `{name}`: {reason}\n" for name, reason in failed.items()))
    text = "\n".join([*parts, "".join(f"- {line}\n" for line in about)])
    return {"families.md": text, "families.csv": csv}


def what_holds(rows: list[dict]) -> str:
    """The operations that hold the rates of networks whose spread stays above UNEQUAL."""
    names = {name for row in rows if row["spread_after"] > UNEQUAL for name in row["held_by"]}
    return f"held by {', '.join(sorted(names))}" if names else ""


def family_rows(table: pd.DataFrame, notes: Mapping[str, str], title: str = "family") -> str:
    """A Markdown table with a row for each family in `notes` that has networks."""
    table = table[table["family"].isin(notes)]
    filters = sorted(set(table["filters"]))
    scaled_columns = (f'{kind}, `"scale"`' for kind in filters)
    lines = [[title, "networks", *filters, *scaled_columns, "change of the output", "note"]]
    lines.append(["---", "---:", *["---:"] * (2 * len(filters)), "---:", "---"])
    for name, note in notes.items():
        rows = table[table["family"] == name]
        if len(rows):
            kinds = [rows[rows["filters"] == kind] for kind in filters]
            worst = rows.loc[rows["output_change_all_images"].idxmax()]
            change = f"{worst['output_change_all_images']:.0e} ({worst['rounding']:.0e})"
            steps = [f"{extent(kind['spread_before'])} → {extent(kind['spread_after'])}" for kind in kinds]
            scaled = [extent(kind["spread_after_scaling"].fillna(kind["spread_after"])) for kind in kinds]
            lines.append([name, str(rows["network"].nunique()), *steps, *scaled, change, note])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def family(network: str) -> str:
    """The family of a network of torchvision."""
    found = [name for name, (starts, _) in FAMILY_NAMES.items() if network.startswith(starts)]
    if len(found) != 1:
        raise ValueError(f"{network} is of no family, or of several")
    return found[0]


def extent(values: pd.Series) -> str:
    """The range of some numbers, to two digits."""
    ends = [
        f"{value:.1e}" if value >= 1e4 else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
        for value in (values.min(), values.max())
    ]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def average(block: pd.DataFrame, metrics: Mapping[str, str] = METRICS) -> pd.DataFrame:
    """One row per initialization: mean and standard deviation over seeds, and where the numbers come from."""
    rows = {}
    for init, runs in block.groupby("init") if len(block) else ():
        rows[init] = {name: runs[name].mean() for name in metrics}
        rows[init] |= {f"{name}_std": runs[name].std() for name in metrics}
        rows[init] |= {"n": len(runs), "seeds": " ".join(map(str, sorted(runs["seed"])))}
        rows[init] |= {name: "; ".join(sorted(set(runs[name]))) for name in ORIGIN}
        rows[init] |= {"rate": runs["rate"].iloc[0]} if "rate" in runs else {}
        rows[init] |= {"within_noise_of": within_noise(init, block, next(iter(metrics)))}
    numbers = [*metrics, *(f"{name}_std" for name in metrics)]
    columns = [*numbers, "n", "seeds", *(["rate"] if "rate" in block else []), "within_noise_of", *ORIGIN]
    table = pd.DataFrame(rows.values(), index=list(rows), columns=columns)
    return table.astype(dict.fromkeys(numbers, float) | {"n": "Int64"})  # without records, too


def within_noise(init: str, block: pd.DataFrame, metric: str) -> str:
    """The initializations of a block that this one is not told apart from; empty if it is from all of several seeds."""
    values = {name: [*runs[metric]] for name, runs in block.groupby("init")}
    if len(values[init]) == 1:
        return "one seed"
    intervals = {name: welch(values[init], other) for name, other in values.items() if name != init}
    return ", ".join(f"`{plain(name)}`" for name, found in intervals.items() if found and found[0] <= 0 <= found[1])


def markdown(rows: pd.DataFrame, metrics: Mapping[str, str]) -> str:
    def cell(row: pd.Series, name: str) -> str:
        spread = "" if pd.isna(row[f"{name}_std"]) else f" ± {row[f'{name}_std']:.1f}"
        return "" if pd.isna(row[name]) else f"{row[name]:.1f}{spread}"

    rest = {"n": "n", "seeds": "seeds", "rate": "learning rate", "within_noise_of": "within noise"}
    rest = {name: title for name, title in rest.items() if name in rows}
    lines = [["initialization", "`init=`", "published", *metrics.values(), *rest.values()]]
    lines.append(["---", "---", *["---:"] * (len(metrics) + 2), *["---"] * (len(rest) - 1)])
    for init, row in rows.iterrows():
        published = "" if pd.isna(row["published"]) else f"{row['published']:.1f}"
        counts = ["" if pd.isna(row[name]) else str(row[name]) for name in rest]
        lines.append(
            [plain(row["method"]), f"`{plain(init)}`", published, *(cell(row, name) for name in metrics), *counts]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plain(text: str) -> str:
    """Text that stays within its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def origin(block: pd.DataFrame) -> str:
    """Data, hardware, versions and commits behind a block, each a line."""
    if block.empty:
        return ""
    return "\n" + "".join(f"- {name}: {'; '.join(sorted(set(block[name])))}\n" for name in ORIGIN)


if __name__ == "__main__":
    main()
