"""The records that runs left: found, read, told apart, and made into files."""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experiments.engine.run import EVALUATION, NOT_IDENTITY, has_checkpoint, init_key
from experiments.files import write_bytes
from experiments.settings import flat

INITS = Path(__file__).resolve().parents[2] / "configs" / "init"
OURS = ("initializers.", "experiments.")
LARGEST = 64 * 2**20  # bytes; a record has some thousand
# Settings in which records of one result may differ. Those of the evaluation do not tell trainings apart, but results.
FREE = {f"config.{name}" for name in {*NOT_IDENTITY, "seed", "preset", "experiment"} - {*EVALUATION}}
CAFFENET = "experiments.networks.CaffeNet"
# The network, data and training of the paper's tables. What a record does not state is as here.
USUAL = {
    "config.model._target_": CAFFENET,
    "config.model.batch_norm": "False",
    "config.data.name": "voc2007",
    "config.data.train": "trainval",
    "config.data.test": "test",
    "config.optimizer.name": "sgd",
}
ITERATIONS = "config.train.iterations"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Named(_Part):
    name: Annotated[str, Field(min_length=1)]


class _Model(_Part):
    target: Annotated[str, Field(alias="_target_", min_length=1)]


class _Train(_Part):
    iterations: Annotated[int, Field(ge=1, lt=2**63)]


class _Config(_Part):
    init: _Named
    data: _Named
    model: _Model | None = None  # depth.py makes its networks of other settings
    train: _Train


class _Record(_Part):
    """What tables and figures need of a record."""

    preset: str | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: str
    versions: dict[str, str]
    git_commit: str | None
    git_dirty: bool | None
    created: str = ""
    config: _Config


def find_records(folders: Sequence[Path]) -> list[Path]:
    """Every `record.json` and `record-*.json` anywhere under `folders`, each once.

    Raises:
        OSError: a folder that is not there.
    """
    found = {}
    for folder in folders:
        if not folder.is_dir():
            raise OSError(f"there is no folder {folder}: give the folder of the runs as --runs FOLDER")
        for pattern in ("record.json", "record-*.json"):
            found |= {path.resolve(): path for path in folder.rglob(pattern)}
    return sorted(found.values())


def unfinished(folders: Sequence[Path]) -> list[Path]:
    """Folders of runs that have a checkpoint and no record."""
    parents = {path.parent for folder in folders for path in folder.rglob("checkpoint*.pt")}
    return sorted(path for path in parents if has_checkpoint(path) and not find_records([path]))


def read_records(
    paths: Sequence[Path], experiment: str, metrics: Mapping[str, str], diverged: bool = False
) -> pd.DataFrame:
    """One row per record of `experiment`; `config` is its configuration, the columns `config.*` hold it as text.

    Args:
        metrics: names of shares between 0 and 1 that the records hold; they become percentages. With any, records of
            trainings that diverged are left out, which have none.
        diverged: keep these, with NaN.

    Raises:
        ValueError: a file that is no result record.
        OSError: one that cannot be read.
    """
    records = ((path, record) for path in paths if (record := _load(path))["experiment"] == experiment)
    rows = [
        _row(path, record, metrics) for path, record in records if diverged or not (metrics and record.get("diverged"))
    ]
    return pd.DataFrame(rows)


def no_record(path: Path, reason: object) -> ValueError:
    """The error for a file that cannot be used as a record."""
    text = " ".join(str(reason).split())[:300]
    return ValueError(f"{path} is no result record ({text}): repair it, or move it out of the folder of the runs")


def _load(path: Path) -> dict:
    """The content of a record, of which nothing is known but its experiment."""
    if not path.is_file():
        raise no_record(path, "not a file")
    if path.stat().st_size > LARGEST:
        raise no_record(path, f"more than {LARGEST:,} bytes")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(record, ensure_ascii=False).encode()  # text that cannot be written into a table is found here
    except (ValueError, RecursionError) as error:
        raise no_record(path, error) from error
    if not isinstance(record, dict) or not isinstance(record.get("experiment"), str):
        raise no_record(path, "it names no experiment")
    return record


def _row(path: Path, record: dict, metrics: Mapping[str, str]) -> dict[str, Any]:
    try:
        _Record.model_validate(record)
        if record.get("created"):
            datetime.fromisoformat(record["created"])
        config = record["config"]
        if config["init"]["name"] == "pretrained" and not isinstance(config["init"].get("rescale"), bool):
            raise ValueError("config.init.rescale should be true or false")
        row = {"preset": record["preset"] or "none", "seed": record["seed"], "created": record.get("created", "")}
        row |= {"path": str(path), "init": _key(config["init"]), "config": config, "record": record}
        row["data"] = str(record.get("data", ""))
        row["device"] = record["device"] + ", TF32" * (config.get("tf32") is True)
        row["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        row["commit"] = (record["git_commit"] or "unknown")[:10] + " with changes" * bool(record["git_dirty"])
        row |= {name: np.nan if record.get("diverged") else _percent(record, name) for name in metrics}
        return row | USUAL | {f"config.{name}": str(value) for name, value in flat(config)}
    except ValidationError as error:
        first = error.errors()[0]
        raise no_record(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise no_record(path, error if isinstance(error, ValueError) else repr(error)) from error


def is_own(init: Mapping) -> bool:
    """Whether an initialization is a function of the user's, not one of ours."""
    return not str(init.get("_target_", OURS[0])).startswith(OURS)


def _key(init: Mapping) -> str:
    """The key of an initialization; one of one's own that has the name of one of ours is not taken for it."""
    taken = is_own(init) and init["name"] in {path.stem for path in INITS.glob("*.yaml")}
    return init_key(init) + (f" init._target_={init['_target_']}" if taken else "")


def _percent(record: dict, name: str) -> float:
    value = record["metrics"][name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"metrics.{name}={value} is not between 0 and 1")
    return 100.0 * value


def unusual(records: pd.DataFrame) -> list[str]:
    """The columns of `USUAL` in which some record is not as the paper's tables."""
    return [name for name, value in USUAL.items() if len(records) and (records[name] != value).any()]


def differing(records: pd.DataFrame, but: Sequence[str] = ()) -> list[str]:
    """The settings in which records differ so that their results may too; not those of the initialization.

    `but` are more columns to leave out.
    """
    names = [name for name in records if name.startswith("config.") and not name.startswith("config.init.")]
    names = [name for name in names if name not in FREE and name not in but]
    return [name for name in (*names, "data") if records[name].nunique(dropna=False) > 1]


def assigned(row: Mapping, names: Sequence[str]) -> list[str]:
    """`key=value` of some columns, as on the command line; without what a record does not state."""
    return [f"{name.removeprefix('config.')}={row[name]}" for name in names if not pd.isna(row[name])]


def by_initialization(block: pd.DataFrame) -> pd.DataFrame:
    """The records with `init` telling all initializations apart: settings follow in which those of one key differ.

    The key stands alone where there is but one of it.
    """
    keys = block["init"].copy()
    for key, group in block.groupby("init"):
        names = [name for name in group if name.startswith("config.init.")]
        if key == "gaussian_unscaled":  # also `init=gaussian init.within=false init.between=false`, of the same std
            group = group.assign(**{"config.init.std": group.get("config.init.std", pd.Series()).reindex(group.index)})
            group["config.init.std"] = group["config.init.std"].fillna("0.01")
            names = ["config.init.std"]
        names = [name for name in names if group[name].nunique(dropna=False) > 1]
        for index, row in group.iterrows():
            keys[index] = " ".join([key, *assigned(row, names)])
    return block.assign(init=keys)


def by_protocol(records: pd.DataFrame, but: Sequence[str] = ()) -> dict[str, pd.DataFrame]:
    """The records by preset and iterations, and by the other settings that differ, but initialization and seed.

    Data, networks and training that are not the paper's are always named; the settings in `but` are not.
    """
    if records.empty:
        return {"paper": records}
    found: dict[str, pd.DataFrame] = {}
    for _, group in records.groupby(["preset", *(name for name in USUAL if name not in but)]):
        named = [name for name in unusual(group) if name not in but]
        names = [*named, *(name for name in differing(group, but) if name != ITERATIONS)]
        titles = [
            ", ".join([f"{row['preset']}, {int(row[ITERATIONS]):,} iterations", *assigned(row, names)])
            for _, row in group.iterrows()
        ]
        found |= dict(iter(group.groupby(pd.Series(titles, group.index))))
    return found


def one_of_each_seed(records: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The newest record of each seed where `keys` are the same; a line on stderr names it and what it stands for."""
    kept = []
    for _, group in records.groupby([*keys, "seed"], sort=False):
        group = group.sort_values(["created", "path"], key=_in_time, na_position="first")
        kept.append(group.index[-1])
        *older, newest = group["path"]
        if older:
            print(
                f"the same run more than once: {newest} is used, as the newest, not {', '.join(older)}", file=sys.stderr
            )
    return records.loc[sorted(kept)]


def _in_time(column: pd.Series) -> pd.Series:
    """Times as they can be sorted; records without one are the oldest."""
    return pd.to_datetime(column, utc=True, format="ISO8601", errors="coerce") if column.name == "created" else column


def read_curve(row: Mapping, name: str = "curve") -> pd.DataFrame:
    """The columns `step`, which grows, and `loss` of the file that the record of a row names so, beside it.

    That of the validation has no rows where the run was shorter than the time between two of them.

    Raises:
        ValueError: the record names none, or the file cannot be used.
    """
    path = Path(row["path"])
    try:
        path = path.with_name(row["record"][name])
        curve = pd.read_csv(path)[["step", "loss"]].astype(float)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise no_record(path, repr(error)) from error
    lacking = curve.empty and name == "curve"
    if lacking or not np.isfinite(curve["step"]).all() or (curve["step"].diff() <= 0).any():
        raise no_record(path, "steps should be numbers that grow")
    return curve


def classes_in(data: str) -> int | None:
    """How many classes the images have, as the `data` of a record states it; None where it does not."""
    stated = re.search(r"(\d+) classes", data)
    return int(stated[1]) if stated else None


def make_files(
    description: str,
    runs: Path,
    out: Path,
    make: Callable[[list[Path], list[Path]], Mapping[str, str | bytes]],
) -> None:
    """A script that makes files from records: reads its command line, and writes all of them or none.

    Args:
        description: for `--help`.
        runs, out: the folders that are read and written where the command line names no others.
        make: from the folders and their records, the content of each file by name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[runs], metavar="FOLDER", help=f"of records; else {runs}"
    )
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help=f"to write to; else {out}")
    parser.error = lambda message: sys.exit(f"error: {' '.join(message.split())}; --help shows what there is")
    arguments = parser.parse_args()
    try:
        paths = find_records(arguments.runs)
        if waiting := unfinished(arguments.runs):
            print(f"not finished, left out: {', '.join(map(str, waiting))}", file=sys.stderr)
        if not paths:
            raise ValueError(
                f"no records under {', '.join(map(str, arguments.runs))}: name their folder as --runs FOLDER"
            )
        write_all(arguments.out, make(arguments.runs, paths))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def write_all(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files into `folder`, which is made, and print their paths. Those that are there stay until all are written.

    Raises:
        OSError: a file could not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".new-")
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): give another folder as --out FOLDER") from error
    with temporary as name:
        for file, content in contents.items():
            write_bytes(Path(name) / file, content.encode() if isinstance(content, str) else content)
        for file in contents:
            (Path(name) / file).replace(folder / file)
            print(folder / file)
