"""What all commands share: Hydra, settings that are looked at first, and errors of one line."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments.files import write_json
from experiments.settings import RULES, TARGETS, check, is_open, unknown

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BAD_INPUT = (ValueError, ArithmeticError, OSError, HydraException, OmegaConfBaseException)
FULL_ERROR = "HYDRA_FULL_ERROR"


_WORK: dict[str, Callable[[DictConfig], None]] = {}  # what each command does


def command(config: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorator: the function becomes the command of `configs/<config>.yaml`.

    Bad input ends it with one line and exit status 1: what our own code, Hydra and the operating system report as
    ValueError, ArithmeticError, OSError or an error of theirs. Anything else is a bug and keeps its traceback;
    HYDRA_FULL_ERROR=1 shows that of every error. Ctrl-C is one line and exit status 130.
    """

    def decorate(work: Callable[[DictConfig], None]) -> Callable[[], None]:
        errors = () if FULL_ERROR in os.environ else BAD_INPUT
        _WORK[config] = work

        @functools.wraps(work)
        def job(cfg: DictConfig) -> None:
            try:
                take_over(cfg, overrides())
                _check_added(cfg)
                check(cfg)
                _work_of(config)(cfg)
            except errors as error:
                _end_job(error)

        del job.__wrapped__  # launchers send `job` to other processes, which a command's own module cannot be
        entry = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config)(job)

        @functools.wraps(work)
        def main() -> None:
            os.environ[FULL_ERROR] = "1"  # Hydra then raises its errors instead of printing them over many lines
            try:
                entry()
            except KeyboardInterrupt:
                print("\ninterrupted: the same command goes on from the last checkpoint", file=sys.stderr)
                sys.exit(130)
            except errors as error:
                said = isinstance(error, CompactHydraException) and str(error).startswith("error: ")  # by a sweep
                sys.exit(1 if said else _misspelt() or f"error: {_one_line(error)}")

        return main

    return decorate


def _work_of(config: str) -> Callable[[DictConfig], None]:
    """What a command does, in a process that a launcher began too."""
    if config not in _WORK:
        importlib.import_module(f"experiments.{config}")
    return _WORK[config]


def _end_job(error: Exception) -> NoReturn:
    """End a run with one line. A sweep goes on with the next; it would say itself what the first error was only."""
    message = f"error: {_one_line(error)}"
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    raise CompactHydraException(message) from error


class Outcomes(Callback):
    """A callback of Hydra's that leaves `<number of the run>.json` in `folder` when a run of a sweep has ended.

    It says what the error was, if there was one, wherever a launcher has run it.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **options) -> None:
        failed = job_return.status == JobStatus.FAILED
        error = job_return._return_value if failed else ""
        text = _one_line(error) if isinstance(error, CompactHydraException) or not failed else repr(error)
        write_json(self.folder / f"{config.hydra.job.num}.json", {"error": text.removeprefix("error: ")})


def overrides() -> list[Override]:
    """What the command line of this run sets."""
    return OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))


def take_over(cfg: DictConfig, given: Sequence[Override]) -> None:
    """Where the command line names a `_target_` of the user's own, drop what the group's file states for another one.

    What stays is what every initialization or network has, and what the command line sets itself.
    """
    keys = {override.key_or_group for override in given}
    for group, (ours, kept) in TARGETS.items():
        if f"{group}._target_" not in keys or str(cfg[group]._target_).startswith(ours):
            continue
        with open_dict(cfg):
            for key in [*cfg[group]]:
                if key not in ("_target_", *kept) and f"{group}.{key}" not in keys:
                    del cfg[group][key]
            if group == "init":
                cfg.init.setdefault("images", 160)
                if "init.name" not in keys:
                    cfg.init.name = cfg.init._target_.rpartition(".")[2]


def _check_added(cfg: DictConfig) -> None:
    """Raises ValueError: `+key=value` for a key that nothing reads."""
    for override in overrides():
        key = override.key_or_group
        if override.is_add() and key not in _groups() and not is_open(key, cfg):
            raise ValueError(unknown(key, _groups()))


def _misspelt() -> str | None:
    """The error for the first key of the command line that is no setting; None where all are."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        keys = [override.key_or_group for override in OverridesParser.create().parse_overrides(arguments)]
    except HydraException:  # not of the form key=value: Hydra's message says so
        return None
    for key in keys:
        if key not in RULES and key not in _groups() and not key.startswith("hydra"):
            return f"error: {unknown(key, _groups())}"
    return None


def _groups() -> list[str]:
    """Names of the folders of `configs`, from which `name=choice` takes a file."""
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
