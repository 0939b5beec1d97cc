"""Make one page of all results, from the records of runs: report.html, which needs nothing beside it.

    python scripts/make_report.py                                # results/runs -> results/report.html
    python scripts/make_report.py --runs outputs --out outputs   # of one's own

It holds the paper's tables with published and measured numbers, average precision per class, learning curves, change
rates, figures, and of each run hardware, versions, commit and the command that repeats it.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.engine.figures import style_of
from experiments.engine.records import by_initialization, by_protocol, is_own, make_files, read_curve, read_records
from experiments.engine.run import NOT_IDENTITY
from experiments.settings import flat
from scripts.make_tables import make_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS, CONFIGS = ROOT / "results", ROOT / "configs"
TABLES = {
    "table2": "Table 2: initializations, classification",
    "table2-detection": "Table 2: initializations, detection",
    "table3": "Table 3: pre-trained networks, classification",
    "table3-detection": "Table 3: pre-trained networks, detection",
    "section4.4": "Section 4.4: other networks",
}
METRICS = {"voc_cls": "map_step", "voc_det": "map_voc11", "imagenet": "top1", "small_images": "top1"}
KINDS = {"voc_cls": "step", "voc_det": "voc11"}  # of average precision, per class
POINTS = 150  # of a curve, at most
INK = "#010203"  # stands for the colour of the page's text


def main() -> None:
    make_files(__doc__, RESULTS / "runs", RESULTS, report_of)


def report_of(folders: list[Path], paths: list[Path]) -> dict[str, str]:
    """The page of the records `paths` under `folders`."""
    blocks = [block for experiment in METRICS for block in blocks_of(experiment, paths)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pictures = [RESULTS / "figures"] if folders == [RESULTS / "runs"] else []
    pictures += [folder / name for folder in folders for name in ("figures", "change_rate", "neighbors")]
    text = environment.get_template("report.html.jinja").render(
        tables=[*tables_of(paths, blocks)],
        blocks=blocks,
        figures=[picture(path) for folder in pictures for path in sorted(folder.glob("figure*.*g"))],
        count=sum(len(block["runs"]) for block in blocks),
    )
    return {"report.html": text}


def blocks_of(experiment: str, paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """What the page shows of each protocol of an experiment: its runs, values per class, curves and change rates."""
    metric = METRICS[experiment]
    for protocol, records in by_protocol(read_records(paths, experiment, {metric: metric}, diverged=True)).items():
        if records.empty:
            continue
        block = by_initialization(records).sort_values(["init", "seed", "path"])
        runs = [about(row, metric) for _, row in block.iterrows()]
        block = block[block[metric].notna()]
        if block.empty:
            continue
        title = f"{experiment}, {protocol}"
        yield {
            "title": title,
            "metric": {"map_step": "step AP", "map_voc11": "11-point AP", "top1": "top-1 accuracy"}[metric],
            "runs": runs,
            "lines": sorted(set(block["init"])),
            "classes": per_class(block, KINDS[experiment]) if experiment in KINDS else None,
            "rates": rates(block),
            "curves": curves(block, title),
        }


def about(row: pd.Series, metric: str) -> dict[str, Any]:
    """What the page says of a run."""
    times = row["record"].get("times", {})
    return {
        "name": Path(row["path"]).parent.name,
        "init": row["init"],
        "seed": row["seed"],
        "value": None if pd.isna(row[metric]) else row[metric],  # of one that diverged
        "minutes": sum(times.values()) / 60,
        **{name: row[name] for name in ("device", "versions", "commit")},
        "command": command(row["config"]),
    }


def tables_of(paths: Sequence[Path], blocks: Sequence[Mapping]) -> Iterator[dict[str, Any]]:
    """The paper's tables, a block of each protocol: published and measured numbers, and the command of each row."""
    made = make_tables(paths, RESULTS / "paper")
    commands = {
        (block["title"].partition(", ")[2], run["init"]): run["command"] for block in blocks for run in block["runs"]
    }
    for name, title in TABLES.items():
        table = pd.read_csv(io.StringIO(made[f"{name}.csv"]), dtype={"within_noise_of": str, "seeds": str, "rate": str})
        metric = next(column for column in ("map_step", "map_voc11") if column in table)
        for protocol, rows in table.groupby("preset", sort=False):
            rows = rows[rows["published"].notna() | (rows["n"] > 0)]
            cells = [cells_of(row, metric, commands.get((protocol, row["init"]))) for _, row in rows.iterrows()]
            yield {"title": f"{title}, {protocol}", "rows": cells}


def cells_of(row: pd.Series, metric: str, repeat: str | None) -> dict[str, Any]:
    number = {name: None if pd.isna(row[name]) else row[name] for name in ("published", metric, f"{metric}_std", "n")}
    seeds = "" if pd.isna(row["seeds"]) else row["seeds"].replace(" ", ",")
    return {
        "method": row["method"],
        "init": row["init"],
        "published": number["published"],
        "value": number[metric],
        "std": number[f"{metric}_std"],
        "n": number["n"],
        "noise": "" if pd.isna(row["within_noise_of"]) else row["within_noise_of"].replace("`", ""),
        "rate": "" if pd.isna(row.get("rate")) else row["rate"],
        "command": repeat and f"{repeat.partition(' seed=')[0].replace('.py ', '.py -m ', 1)} seed={seeds}",
    }


def per_class(block: pd.DataFrame, kind: str) -> dict[str, list]:
    """Average precision of each class by initialization, in percent, the mean over seeds."""
    shares = [{name: cell[kind] for name, cell in record["per_class"].items()} for record in block["record"]]
    table = 100 * pd.DataFrame(shares, index=block.index, dtype=float).groupby(block["init"]).mean().T
    return {
        "names": [*table.columns],
        "rows": [(name, [*values]) for name, values in zip(table.index, table.to_numpy(), strict=True)],
    }


def rates(block: pd.DataFrame) -> list[dict]:
    """Change rates of each layer, of the first seed of each initialization."""
    found = []
    for init, runs in block.groupby("init"):
        rate = runs.iloc[0]["record"].get("change_rate")
        if rate:
            found.append({"init": init, "spread": rate["spread"], "mean": rate["mean"]})
    return found


def curves(block: pd.DataFrame, title: str) -> str:
    """The training loss of every run as SVG; the group of each line has the class `line-<number>`."""
    names = sorted(set(block["init"]))
    options = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    options |= {f"{name}.color": INK for name in ("text", "xtick", "ytick")}
    with mpl.rc_context(options | {"axes.edgecolor": INK, "axes.labelcolor": INK}):
        figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
        for number, (_, row) in enumerate(block.iterrows()):
            curve = read_curve(row)
            size = max(1, -(-len(curve) // POINTS))
            curve = curve.groupby(curve.index // size).agg({"step": "last", "loss": "mean"})
            line = names.index(row["init"])
            (drawn,) = axis.plot(curve["step"], curve["loss"], **style_of(line), linewidth=1.2)
            drawn.set_gid(f"run-{number}-line-{line}-")
        axis.set_xlabel("iteration")
        axis.set_ylabel("training loss (nats), on a log scale")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.25)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def picture(path: Path) -> dict[str, str]:
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    return {"name": path.stem, "source": f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"}


def command(config: Mapping) -> str:
    """The command line that repeats a run: the choices of its groups, and what differs from these."""
    preset, init = config.get("preset"), config["init"]
    named = [word for word in (f"preset={preset}" if preset else "", group_of("model", "_target_", config)) if word]
    named.append("init=kmeans" if is_own(init) else f"init={init['name']}")
    named.append(group_of("optimizer", "name", config))
    usual = settings_of(config["experiment"], tuple(word for word in named if word))
    skipped = {*NOT_IDENTITY, "seed", "preset", "experiment", "init.name"} - {"data.test", "evaluate.crops"}
    words = [
        f"{'' if key in usual else '+'}{key}={'null' if value is None else value}".replace(" ", "")
        .replace("=True", "=true")
        .replace("=False", "=false")
        for key, value in flat(config)
        if key not in skipped and (key not in usual or usual[key] != value)
    ]
    shown = [word for word in named if word and word not in ("model=caffenet", "optimizer=sgd", "preset=paper")]
    return " ".join([f"python experiments/{config['experiment']}.py", *shown, *words, f"seed={config['seed']}"])


def group_of(group: str, key: str, config: Mapping) -> str:
    """`group=choice` for the file of a group of `configs` that names the same; empty where there is none."""
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        if OmegaConf.load(path).get(key) == config.get(group, {}).get(key):
            return f"{group}={path.stem}"
    return ""


@cache
def settings_of(experiment: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The settings of an experiment with these words on its command line, by dotted key."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(experiment, [*words])
    return dict(flat(OmegaConf.to_container(cfg, resolve=True)))


if __name__ == "__main__":
    main()
