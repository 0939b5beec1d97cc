"""What a run leaves on disk: folder, checkpoints, record. A file is written whole or not at all."""

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import subprocess
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

import initializers
from experiments.engine import distributed
from experiments.files import write_json, write_whole
from experiments.settings import FILTERS, flat

RECORD = "record.json"
# Where the images and proposals lie. A run goes on from one place only, but has the same name on every machine.
PLACES = ("data.root", "proposals")
# What only the evaluation reads: the same training may be evaluated in several ways.
EVALUATION = (
    "data.test",
    "evaluate.crops",
    "evaluate.pairs",
    "evaluate.longest",
    "evaluate.nms_threshold",
    "evaluate.limit",
    "evaluate.pictures",
)
# Settings that change where and how fast a run computes, but not what. None of all these tells runs apart.
NOT_IDENTITY = (
    *PLACES,
    *EVALUATION,
    "device",
    "threads",
    "dry",
    "tensorboard",
    "output",
    "published",
    "data.cache",
    "train.checkpoint_seconds",
    "train.accumulate",
    "train.graph",
    "evaluate.batch_size",
    "workers",
)


def set_up(device: str, threads: int | None, tf32: bool) -> torch.device:
    """Set torch's threads, precision and determinism, and return the device.

    Args:
        device: `cpu`, `cuda` or `auto`, the GPU when there is one.
        threads: of the CPU; None leaves torch's choice, all cores.
        tf32: allow TF32 in matrix products and convolutions on the GPU.

    Raises:
        ValueError: another device, `cuda` where torch finds no GPU, or fewer than one thread.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no GPU here: choose device=cpu or device=auto")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: choose at least 1, or null for all cores")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = True  # this and the next line: the same weights, bit for bit, each time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))  # of the processes on this machine, by torchrun
    if number >= torch.cuda.device_count():
        raise ValueError(f"{number + 1} processes or more, but {torch.cuda.device_count()} GPU(s): start one for each")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def execute(
    cfg: DictConfig,
    work: Callable[[DictConfig, Path, torch.device], None],
    result: str | None = None,
    left_out: str = "",
) -> None:
    """Do the work of a run in its folder, and print the path of its result; unless that is there.

    Args:
        work: writes the record into the folder, last of all.
        result: the file that it is about, if that is not the record.
        left_out: why the run is none of those asked for; empty if it is.

    Raises:
        ValueError: the folder holds something else than this run.
    """
    if left_out and not cfg.dry:
        print(f"not run: {left_out}")
        return
    folder = run_folder(cfg)
    if cfg.dry:
        record, done = record_of(folder, cfg)
        announce(cfg, record, done, left_out)
        return
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard=true needs the package tensorboard: pip install tensorboard, or leave it out")
    commit()  # of the code as it was loaded: its files may be others when the record is written
    device = set_up(cfg.device, cfg.threads, cfg.tf32)
    with distributed.processes(device):
        record, done = record_of(folder, cfg)
        if done and (result is None or (folder / result).exists()):
            print("this run is done; to run it again, delete its folder")
        else:
            with open_folder(folder) if distributed.rank() == 0 else contextlib.nullcontext():
                work(cfg, folder, device)
        print(folder / result if result else record)


def announce(cfg: DictConfig, record: Path, done: bool, left_out: str = "") -> None:
    """Print what `dry=true` asks for: a line of JSON about a run, for scripts/reproduce.py."""
    about = {"record": str(record), "done": done, "left_out": left_out}
    print(json.dumps(about | {"config": OmegaConf.to_container(cfg, resolve=True)}))


def is_of(record: Path, cfg: DictConfig) -> bool:
    """Whether `record` is there, and of these settings: those of the evaluation too."""
    if not record.exists():
        return False
    free = {*NOT_IDENTITY} - {*EVALUATION}
    asked = flat(OmegaConf.to_container(cfg, resolve=True))
    return {k: v for k, v in asked if k not in free} == {k: v for k, v in flat(_config_of(record)) if k not in free}


def run_folder(cfg: DictConfig) -> Path:
    """Folder of the run that `cfg` describes: `<output>/<experiment>/<preset>-<init>-seed<seed>-<hash>`.

    The hash covers every setting that can change what is trained, so that the same command finds its run again and
    a changed one never continues it.
    """
    return Path(cfg.output) / cfg.experiment / f"{cfg.preset}-{cfg.init.name}-seed{cfg.seed}-{_digest(identity(cfg))}"


def identity(cfg: DictConfig) -> dict:
    """The settings that tell the training of a run apart from that of others, by dotted key."""
    return {key: value for key, value in flat(OmegaConf.to_container(cfg, resolve=True)) if key not in NOT_IDENTITY}


def record_of(folder: Path, cfg: DictConfig) -> tuple[Path, bool]:
    """Where the record of `cfg` is, or is to be written, and whether it is there.

    It is `record.json`, or `record-<hash>.json` where the same training was evaluated in another way before.

    Raises:
        ValueError: a record of the folder is damaged, or of images in another place.
    """
    asked = dict(flat(OmegaConf.to_container(cfg, resolve=True)))
    names = sorted(folder.glob("record*.json"))
    for path in names:
        found = dict(flat(_config_of(path)))
        if all(found.get(key) == asked.get(key) for key in EVALUATION):
            same_places(path, found, asked)
            return path, True
    return folder / (f"record-{_digest({key: asked.get(key) for key in EVALUATION})}.json" if names else RECORD), False


def scores_of(record: Path) -> Path:
    """The file beside a record with the run's scores on the test images: `scores.npz`, or `scores-<hash>.npz`."""
    return record.with_name(record.stem.replace("record", "scores", 1) + ".npz")


def same_places(path: Path, found: Mapping, asked: Mapping) -> None:
    """Raises ValueError: `path`, of the settings `found`, is of images or proposals in another place than `asked`."""
    for key in PLACES:
        here, there = asked.get(key), found.get(key)
        if here != there and (here is None or there is None or Path(here).resolve() != Path(there).resolve()):
            raise ValueError(
                f"{path} is of {key}={there}, not of {here}: give {key}={there} if what is there is the same, or else "
                "set output to another folder"
            )


def _config_of(record: Path) -> dict:
    """The settings that a record states."""
    try:
        return dict(json.loads(record.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged: delete it, and the same command evaluates the run again") from error


def _digest(settings: Mapping) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def init_key(init: Mapping) -> str:
    """What follows `init=` on the command line to get this initialization; names its row in every table."""
    estimate = " init.lrn=estimate" * (init.get("lrn") == "estimate")
    if init["name"] == "pretrained":
        path = Path(init["weights"] or "")
        name = path.parent.name if path.stem == "weights" else path.stem  # of a run of experiments/pretrain.py: its own
        return f"pretrained {name}" + f" init.rescale=true{estimate}" * init["rescale"]
    off = [f" init.{step}=false" for step in ("within", "between") if not init.get(step, True)]
    filters = init.get("filters", init["name"])
    if init["name"] in FILTERS and filters != init["name"]:
        off.insert(0, f" init.filters={'null' if filters is None else filters}")
    if init["name"] == "gaussian" and off == [" init.within=false", " init.between=false"]:
        return "gaussian_unscaled"  # the same: N(0, .01²) and no biases
    return init["name"] + "".join(off) + estimate * (" init.between=false" not in off)


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and keep other processes out of it meanwhile.

    Raises:
        OSError: the folder cannot be created or written, or another process is at work in it.
    """
    lock = FileLock(folder / ".lock", blocking=False)  # released with the process, however that ends
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OSError(f"another process is at work in {folder}: wait until it ends, or stop it") from None
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): set output to another folder") from error
    try:
        yield
    finally:
        lock.release()


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, containers) to `checkpoint.pt`; the one before is kept beside it.

    Raises:
        OSError: it could not be written, for instance on a full disk; the older checkpoints are still intact.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(folder / "checkpoint.pt", buffer.getbuffer(), keep=folder / "checkpoint.previous.pt")


def settings_of(cfg: DictConfig) -> dict:
    """What a checkpoint says of its run: the settings that tell its training apart, and where the images lie."""
    return {key: value for key, value in flat(OmegaConf.to_container(cfg, resolve=True)) if key in PLACES} | identity(
        cfg
    )


def load_checkpoint(folder: Path, settings: Mapping | None = None) -> dict | None:
    """The newest checkpoint of `folder`, on the CPU; None where there is none.

    When it is damaged, a warning names it and the one before is used, for good.

    Args:
        settings: of the run, as `settings_of` gives them, which the checkpoint has to be of; None: whatever it is of.

    Raises:
        ValueError: it is of another run.
        OSError: no checkpoint can be read, though there are some.
    """
    state = _newest_checkpoint(folder)
    if state is not None and settings is not None:
        found = state.get("settings") if isinstance(state, dict) else None
        if not isinstance(found, dict):
            raise ValueError(
                f"{folder}/checkpoint.pt is no checkpoint of this program: delete that folder to start again"
            )
        same_places(folder / "checkpoint.pt", found, settings)
        for key in sorted(found.keys() | settings.keys()):
            if found.get(key) != settings.get(key):
                raise ValueError(
                    f"{folder}/checkpoint.pt is of another run, with {key}={found.get(key)} and not "
                    f"{settings.get(key)}: delete that folder to start the run again"
                )
    return state


def _newest_checkpoint(folder: Path) -> Any:
    """The newest checkpoint of `folder` that can be read, which becomes `checkpoint.pt`; None where there is none."""
    newest, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    found = [path for path in (newest, previous) if path.exists()]
    for path in found:
        try:
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():  # torch.load does not look at the checksums
                    raise zipfile.BadZipFile(f"wrong checksum of {wrong}")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damage shows as any kind of error, from the zip reader to the unpickler
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a seek to before the file gives
                raise
            reason = str(error).partition("\n")[0]
            warnings.warn(f"{path} is damaged and will not be used ({reason})", stacklevel=2)
        else:
            if path == previous:  # else the next save would keep the damaged one and drop this
                os.replace(previous, newest)
            return state
    if found:
        raise OSError(f"every checkpoint in {folder} is damaged: delete that folder to start the run again")
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, be it readable or not."""
    return any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt"))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on; of CUDA where there is a GPU."""
    found = {"python": platform.python_version(), "initializers": initializers.__version__}
    found |= {"torch": torch.__version__}  # with its build, such as +cu130
    found |= {name: importlib.metadata.version(name) for name in ("torchvision", "scikit-learn", "numpy")}
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def write_record(path: Path, cfg: DictConfig, device: torch.device, **results) -> None:
    """Write the record of a finished run: what it was, what came out, and where it was computed.

    Args:
        results: `data`, `metrics`, `per_class`, `times` and what else there is to say, ready for JSON.
    """
    record = {
        "experiment": cfg.experiment,
        "preset": cfg.get("preset"),
        "seed": cfg.seed,
        **results,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    write_json(path, record)


def spent(times: dict[str, float]) -> str:
    """The seconds of the parts of a run, as they are printed."""
    return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in times.items())


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU as Linux gives it or as Python does elsewhere."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def commit() -> dict[str, str | bool | None]:
    """The commit of this code, and whether files differ from it; None where git does not know this file."""
    known = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None  # else: of a repository around it
    changes = _git("status", "--porcelain", "--untracked-files=no") if known else None
    return {
        "git_commit": _git("rev-parse", "HEAD") if known else None,
        "git_dirty": None if changes is None else bool(changes),
    }


def _git(*arguments: str) -> str | None:
    """What git says about this code; None where it has nothing to say or is not installed."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
