"""Run all that a table or figure of the paper is made of, and make it.

    python scripts/reproduce.py table2 preset=mini
    python scripts/reproduce.py table1 table2 preset=mini threads=1 hydra/launcher=joblib hydra.launcher.n_jobs=2
    python scripts/reproduce.py figure3 data.root=/path/to/ILSVRC2012 hydra/launcher=submitit_slurm
    python scripts/reproduce.py all preset=demo

Words without `=` say what, all others are settings of the experiments, as for their own commands. It says what will
run, what is there already and about how long the rest takes; where a run fails it goes on, and says at the end which
and why. What was interrupted goes on with the same command. Then it writes tables, figures and a page from the records
in `output`, which is `outputs` if not set, into its folders `tables` and `figures` and its `report.html`.
"""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from experiments.engine.records import find_records
from experiments.engine.run import device_name
from experiments.settings import flat

ROOT = Path(__file__).resolve().parents[1]
# What there is to reproduce -> the experiment behind it, and the files of configs/sweep that name its runs; without
# them it is one run.
RESULTS = {
    "table1": ("voc_cls", "table1"),
    "table2": ("voc_cls", "table2"),
    "table3": ("voc_cls", "table3"),
    "architectures": ("voc_cls", "architectures"),
    "detection": ("voc_det", "detection", "table3"),
    "change_rate": ("change_rate",),
    "neighbors": ("neighbors",),
    "figure3": ("imagenet", "figure3"),
    "figure4": ("imagenet", "figure4"),
    "lsuv": ("small_images", "lsuv_mnist", "lsuv_activations", "lsuv_bn", "lsuv_resnet"),
    "lsuv_imagenet": ("imagenet", "lsuv_imagenet"),
    "depth": ("depth", "depth"),
}
# A run of preset=demo takes half a minute or more, and these are many. By experiment, or by sweep.
DEMO = {
    "voc_cls": ["train.iterations=50", "train.log_every=10", "evaluate.crops=1", "rates.images=20"],
    "voc_det": ["train.iterations=20", "train.log_every=10"],
    "detection": ["init=caffe,kmeans", "optimizer.lr=0.002"],
    "imagenet": ["train.iterations=40", "train.log_every=10", "train.validate_every=20"],
    "lsuv_imagenet": ["optimizer.lr=0.001"],  # with .01 so small a network diverges
    "small_images": ["train.iterations=20", "init=lsuv,he"],
    "lsuv_mnist": ["seed=0"],
    "depth": ["train.iterations=10", "network.activation=relu"],
}
FIGURES = {"change_rate", "neighbors"}  # write into the folder `output` itself
# Settings that the time of a step depends on, or that of the evaluation.
PACE = ("experiment", "data.name", "model.", "crop.size", "batch.", "train.batch_size", "train.precision")


@dataclass(frozen=True)
class Run:
    """A run to be done or done; `words` are those of the command that it is one run of."""

    words: tuple[str, ...]
    number: int
    record: Path
    done: bool
    left_out: str
    config: Mapping

    @property
    def name(self) -> str:
        return f"{self.config['experiment']}/{self.record.parent.name}"


@dataclass(frozen=True)
class Pace:
    """What the records tell of the time that runs take."""

    step: float  # seconds
    rest: float  # of initialization and evaluation
    device: str


def main() -> None:
    names, settings = asked(sys.argv[1:])
    output = next((word.partition("=")[2] for word in reversed(settings) if word.startswith("output=")), "outputs")
    settings = [word for word in settings if not word.startswith("output=")]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no command is left running behind it
    try:
        commands = [words for name in names for words in commands_of(name, settings, Path(output))]
        runs = [run for words in dict.fromkeys(commands) for run in planned(words)]
        failed = carry_out(runs, Path(output))
        made = make_all(Path(output))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from here")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    sys.exit(1 if failed or not made else 0)


def asked(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What to reproduce, and the settings."""
    if not words or {"-h", "--help"} & {*words}:
        print(f"{__doc__}\nThere is: {', '.join([*RESULTS, 'all'])}.")
        sys.exit(0 if words else 1)
    names = [word for word in words if "=" not in word]
    for name in names:
        if name not in (*RESULTS, "all"):
            sys.exit(f"error: there is no {name}: choose {', '.join([*RESULTS, 'all'])}")
    if not names:
        sys.exit(f"error: nothing to reproduce is named: choose {', '.join([*RESULTS, 'all'])}")
    return [*RESULTS] if "all" in names else names, [word for word in words if "=" in word]


def commands_of(name: str, settings: Sequence[str], output: Path) -> Iterator[tuple[str, ...]]:
    """The command lines behind a result."""
    experiment, *sweeps = RESULTS[name]
    place = f"output={output / experiment if experiment in FIGURES else output}"
    script = str(ROOT / "experiments" / f"{experiment}.py")
    for sweep in sweeps or [""]:
        shorter = DEMO.get(experiment, []) + DEMO.get(sweep, []) if "preset=demo" in settings else []
        yield (sys.executable, script, "-m", *([f"+sweep={sweep}"] if sweep else []), *shorter, *settings, place)


def planned(words: tuple[str, ...]) -> list[Run]:
    """The runs of a command, asked of itself.

    Ends with the command's own error where it does not understand its settings.
    """
    with tempfile.TemporaryDirectory() as folder:
        line = [*words, "dry=true", "hydra/launcher=basic", f"hydra.sweep.dir={folder}"]
        line = [word for word in line if not word.startswith("hydra.launcher.")]  # of another launcher
        done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        sys.exit(errors[0] if errors else f"error: {words[1]} cannot be run: {done.stderr}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [
        Run(words, number, Path(run["record"]), run["done"], run["left_out"], run["config"])
        for number, run in enumerate(found)
    ]


def carry_out(runs: list[Run], output: Path) -> dict[str, str]:
    """Do the runs that are not done, command by command; the names of those that failed, and why."""
    for run in runs:
        state = "done" if run.done else f"left out: {run.left_out}" if run.left_out else "to do"
        print(f"{state:8} {run.name}")
    waiting = [run for run in runs if not run.done and not run.left_out]
    there = sum(run.done for run in runs)
    print(f"{len(runs)} runs, {there} there already, {len(waiting)} to do; {remaining(waiting, output)}", flush=True)
    failed: dict[str, str] = {}
    began = time.monotonic()
    for words in dict.fromkeys(run.words for run in waiting):
        print(f"\n$ {' '.join(words)}", flush=True)
        own = [run for run in waiting if run.words == words]
        for run, error in sweep(own):
            if error:
                failed[run.name] = error
            left = [other for other in waiting if not other.record.exists() and other.name not in failed]
            so_far = timedelta(seconds=round(time.monotonic() - began))
            print(
                f"{'failed' if error else 'done'} {run.name}: {len(waiting) - len(left)} of {len(waiting)}, "
                f"{len(failed)} failed, {so_far} so far; {remaining(left, output)}",
                flush=True,
            )
    return failed


def sweep(runs: list[Run]) -> Iterator[tuple[Run, str]]:
    """Do the runs of one command; each as soon as it has ended, with its error, empty if it has none."""
    waiting = {run.number: run for run in runs}
    with tempfile.TemporaryDirectory(prefix=".reproduce-", dir=mine(runs[0].record)) as folder:
        callback = "+hydra.callbacks.outcomes._target_=experiments.engine.command.Outcomes"
        line = [*runs[0].words, callback, f"+hydra.callbacks.outcomes.folder={Path(folder).resolve()}"]
        process = subprocess.Popen(line)
        try:
            ended = False
            while waiting and not ended:
                ended = process.poll() is not None
                for path in sorted(Path(folder).glob("*.json")):
                    if (run := waiting.pop(int(path.stem), None)) is not None:
                        yield run, json.loads(path.read_text())["error"]
                time.sleep(0 if ended else 0.5)
            process.wait()
        finally:
            process.terminate()  # only where this was interrupted
            process.wait()
    for run in waiting.values():
        yield run, f"its process ended with exit status {process.returncode} before the run did"


def mine(record: Path) -> Path:
    """The folder of all runs, which every machine of a cluster sees."""
    folder = record.parent.parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remaining(runs: list[Run], output: Path) -> str:
    """About how long the runs take, one after the other, from the times in records of runs like them."""
    paces = measured([ROOT / "results" / "runs", output])
    known = [(run, paces[key]) for run in runs if (key := key_of(run.config)) in paces]
    seconds = sum(pace.step * run.config["train"]["iterations"] + pace.rest for run, pace in known)
    parts = []
    if known:
        hardware = ", ".join(sorted({pace.device for _, pace in known}))
        parts.append(f"about {timedelta(seconds=round(seconds))} one after the other, as measured on {hardware}")
    if len(known) < len(runs):
        parts.append(f"no run like {len(runs) - len(known)} of them has been timed yet")
    return "; ".join(parts) or "nothing is left to do"


def measured(folders: Sequence[Path]) -> dict[str, Pace]:
    """Pace by `key_of`: the median over the records of this machine's hardware, or over all where it has none."""
    found: dict[str, list[Pace]] = {}
    for path in find_records([folder for folder in folders if folder.is_dir()]):
        record = json.loads(path.read_text())
        steps, times = record["config"].get("train", {}).get("iterations"), record.get("times")
        if steps and times:
            rest = sum(seconds for part, seconds in times.items() if part != "train")
            found.setdefault(key_of(record["config"]), []).append(Pace(times["train"] / steps, rest, record["device"]))
    here = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    paces = {}
    for key, all_of_it in found.items():
        own = [pace for pace in all_of_it if pace.device == here] or all_of_it
        step, rest = (statistics.median(getattr(pace, part) for pace in own) for part in ("step", "rest"))
        paces[key] = Pace(step, rest, " and ".join(sorted({pace.device for pace in own})))
    return paces


def key_of(config: Mapping) -> str:
    """The settings that the time of a run depends on, but for its length."""
    return json.dumps({key: value for key, value in flat(config) if key.startswith(PACE)}, sort_keys=True)


def make_all(output: Path) -> bool:
    """Make tables, figures and the page from the records there are; whether that succeeded."""
    records = [json.loads(path.read_text())["experiment"] for path in find_records([output])] if output.is_dir() else []
    if not records:
        print("no run has left a record: there are no tables to make", file=sys.stderr)
        return True
    lines = [["make_tables.py", output / "tables"]]
    if {"imagenet", "voc_cls", "voc_det", "depth"} & {*records}:
        lines.append(["make_figures.py", output / "figures"])
    lines.append(["make_report.py", output])
    done = [
        subprocess.run([sys.executable, ROOT / "scripts" / script, "--runs", output, "--out", out])
        for script, out in lines
    ]
    return not any(process.returncode for process in done)


if __name__ == "__main__":
    main()
