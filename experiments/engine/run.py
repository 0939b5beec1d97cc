"""What a run leaves on disk: folder, checkpoints, record. A file is written whole or not at all."""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import initializers
from experiments.engine import distributed
from experiments.files import write_json, write_whole
from experiments.settings import check

# Settings that change where and how fast a run computes, but not what: they do not tell runs apart.
NOT_IDENTITY = (
    "device",
    "threads",
    "output",
    "published",
    "data.cache",
    "train.checkpoint_seconds",
    "train.accumulate",
    "evaluate.batch_size",
    "workers",
)


def one_line_errors(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Decorator below `hydra.main`: bad input ends the command with its message alone and exit status 1.

    Bad input is what our own code and the operating system report: ValueError, ArithmeticError, OSError.
    Anything else is a bug and keeps its traceback; HYDRA_FULL_ERROR=1 shows that of every error.
    """

    @functools.wraps(main)
    def wrapper(cfg: DictConfig) -> None:
        try:
            main(cfg)
        except (ValueError, ArithmeticError, OSError) as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # Hydra goes on and in the end reports the first only
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise CompactHydraException(f"error: {error}") from error

    return wrapper


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
    result: str = "record.json",
    left_out: str = "",
) -> None:
    """Do the work of a run in its folder, and print the path of its result; unless that is there.

    Args:
        work: writes `result` into the folder, last of all.
        left_out: why the run is none of those asked for; empty if it is.

    Raises:
        ValueError: a setting makes no sense; the folder is not there then.
    """
    if left_out:
        print(f"not run: {left_out}")
        return
    check(cfg)
    device = set_up(cfg.device, cfg.threads, cfg.tf32)
    with distributed.processes(device):
        folder = run_folder(cfg)
        if not is_done(folder / result):
            with open_folder(folder) if distributed.rank() == 0 else contextlib.nullcontext():
                work(cfg, folder, device)
            print(folder / result)


def run_folder(cfg: DictConfig) -> Path:
    """Folder of the run that `cfg` describes: `<output>/<experiment>/<preset>-<init>-seed<seed>-<hash>`.

    The hash covers every setting that can change the result, so that the same command finds its run again and
    a changed one never continues it.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    for key in NOT_IDENTITY:
        *parents, leaf = key.split(".")
        functools.reduce(dict.__getitem__, parents, config).pop(leaf, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return Path(cfg.output) / cfg.experiment / f"{cfg.preset}-{cfg.init.name}-seed{cfg.seed}-{digest}"


def is_done(result: Path) -> bool:
    """Whether a run has left its `result`, the file that it writes last; says so."""
    if result.exists():
        print(f"this run is done; to run it again, delete its folder\n{result}")
    return result.exists()


def init_key(init: Mapping) -> str:
    """What follows `init=` on the command line to get this initialization; names its row in every table."""
    estimate = " init.lrn=estimate" * (init.get("lrn") == "estimate")
    if init["name"] == "pretrained":
        path = Path(init["weights"] or "")
        name = path.parent.name if path.stem == "weights" else path.stem  # of a run of experiments/pretrain.py: its own
        return f"pretrained {name}" + f" init.rescale=true{estimate}" * init["rescale"]
    off = [f" init.{step}=false" for step in ("within", "between") if not init.get(step, True)]
    if init["name"] == "gaussian" and len(off) == 2:
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


def load_checkpoint(folder: Path) -> dict | None:
    """The newest checkpoint of `folder`, on the CPU; None where there is none.

    When it is damaged, a warning names it and the one before is used, for good.

    Raises:
        OSError: no checkpoint can be read, though there are some.
    """
    newest, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    found = [path for path in (newest, previous) if path.exists()]
    for path in found:
        try:
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():  # torch.load does not look at the checksums
                    raise zipfile.BadZipFile(f"wrong checksum of {wrong}")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # damage shows as any kind of error, from the zip reader to the unpickler
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
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
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


def _git(*arguments: str) -> str | None:
    """What git says about this code; None where the code is in no repository or git is not installed."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
