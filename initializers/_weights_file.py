"""State dicts from files: what torch.save and safetensors write, in the layouts in which people share them."""

import argparse
import collections
import pathlib
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".pth", ".pt", ".safetensors")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")  # keys of checkpoints
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.")  # of names, from what wraps a network
HARMLESS = (argparse.Namespace, collections.defaultdict, collections.deque, dict, list, set, tuple)
PATHS = (pathlib.Path, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)


def read_state(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file, and the key under which it was ("" where the file is the state dict itself).

    No code of the file runs. Options, paths and numbers beside the state dict are allowed; of tensors, those that are
    dense and in memory. Nothing larger than the file is made.

    Raises:
        ValueError: a file of another kind, that is damaged, or holds something else.
        OSError: it cannot be opened.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: weights are read from {', '.join(SUFFIXES)}")
    with path.open("rb"):  # its own error, before those of a reader
        pass
    state, key = (_read_safetensors(path), "") if path.suffix == ".safetensors" else _unwrapped(path, _unpickled(path))
    for name, tensor in state.items():
        _check(f"{path}: {name}", tensor)
    return state, key


def without_prefixes(state: Mapping[str, Tensor], names: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict with those names that a model has, `names`, and the prefixes that were removed for it.

    A name that the model has stays. Others lose the `PREFIXES` at their start, one after the other, until the model has
    them; they are as in the file, where it has them never.

    Raises:
        ValueError: two tensors would have one name.
    """
    found = {name: tensor for name, tensor in state.items() if name in names}
    origin, removed = {name: name for name in found}, []
    for name, tensor in state.items():
        if name in names:
            continue
        short = name
        prefixes: list[str] = []
        while short not in names and (prefix := next((p for p in PREFIXES if short.startswith(p)), None)):
            short, prefixes = short.removeprefix(prefix), [*prefixes, prefix]
        if short not in names or origin.get(short) == short:
            short, prefixes = name, []
        if short in found:
            raise ValueError(
                f"{origin[short]} and {name} are both {short} without their prefixes: keep one in the file"
            )
        found[short], origin[short] = tensor, name
        removed += ["".join(prefixes)] if prefixes else []
    return found, list(dict.fromkeys(removed))


def taken(key: str, prefixes: list[str]) -> str:
    """What of a file was taken, as a text; "" where nothing has to be said."""
    texts = [f"taken from {key!r}"] if key else []
    texts += [f"prefix {' and '.join(map(repr, prefixes))} removed"] if prefixes else []
    return ", ".join(texts)


def _unpickled(path: Path) -> object:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if sum(part.file_size for part in file.infolist()) > path.stat().st_size:
                    raise ValueError("it unpacks to more than its size")
        with torch.serialization.safe_globals([*HARMLESS, *PATHS, *_numpy_classes()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error)
        if "Unsupported global: GLOBAL " in reason:  # what torch says of a class that it will not build
            wanted = reason.partition("Unsupported global: GLOBAL ")[2].split()[0]
            raise ValueError(f"{path} holds a {wanted}, which is not built: save model.state_dict() alone") from error
        reason = " ".join(reason.split())[:120]
        raise ValueError(f"{path} is no state dict of PyTorch, or it is damaged ({reason})") from error


def _numpy_classes() -> list:
    """Those of numpy's that numbers beside a state dict are made of; none where there is no numpy."""
    try:
        reconstruct = torch.tensor(0.0).numpy().__reduce__()[0]
        zero = torch.zeros(1).numpy()[0]
    except RuntimeError:
        return []
    kinds = ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")
    dtypes = [type(torch.zeros(1, dtype=getattr(torch, kind)).numpy().dtype) for kind in kinds]
    array = type(torch.zeros(1).numpy())
    return [zero.__reduce__()[0], reconstruct, array, type(zero.dtype).__mro__[1], *dtypes]


def _unwrapped(path: Path, held: object) -> tuple[dict[str, Tensor], str]:
    key = ""
    while isinstance(held, Mapping):
        inside = {str(name): value for name, value in held.items() if isinstance(value, Mapping)}
        states = [name for name, value in inside.items() if any(isinstance(part, Tensor) for part in value.values())]
        known = [name for name in WRAPPERS if name in inside]
        if not known and any(isinstance(value, Tensor) for value in held.values()):
            break
        if not known and len(states) != 1:
            keys = ", ".join(str(name)[:40] for name in list(held)[:6])
            raise ValueError(f"{path} holds no state dict: save model.state_dict() (its keys are {keys})")
        chosen = next((name for name in known if name in states), (known or states)[0])
        key, held = f"{key}.{chosen}".removeprefix("."), inside[chosen]
        if key.count(".") > 4:
            break
    tensors = isinstance(held, Mapping) and all(isinstance(value, Tensor) for value in held.values())
    if not isinstance(held, Mapping) or not held or not tensors:
        raise ValueError(f"{path} holds no state dict: save model.state_dict()")
    return {str(name): tensor for name, tensor in held.items()}, key


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # of a damaged header: those of safetensors, and of types that torch lacks
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is no safetensors file, or it is damaged ({reason})") from error


def _check(what: str, tensor: Tensor) -> None:
    """Raises ValueError: a tensor that is no plain array of numbers."""
    kinds = {
        "on the meta device, without values": tensor.is_meta,
        "sparse": tensor.layout != torch.strided,
        "nested": tensor.is_nested,
        "quantized": tensor.is_quantized,
        "complex": tensor.is_complex(),
    }
    for kind, found in kinds.items():
        if found:
            raise ValueError(f"{what} is {kind}: save dense tensors of real numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{what} claims {tensor.numel()} values, more than the file holds: save it with contiguous()")
