"""What each setting may be: one table for all commands, looked at before a run opens its folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Colour = Annotated[list[Annotated[float, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]

FILTERS = ("gaussian", "pca", "zca", "kmeans", "patches", "orthonormal")  # as of `initializers`

RULES: dict[str, Any] = {
    "experiment": Text,
    "preset": Text | None,
    "published": Text | None,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],  # other seeds would be those modulo 2^32
    "device": Literal["auto", "cpu", "cuda"],
    "threads": Annotated[int, Field(ge=1, le=1024)] | None,
    "tf32": bool,
    "dry": bool,
    "tensorboard": bool,
    "output": Text,
    "workers": Index | None,
    "data.name": Text,
    "data.root": Text,
    "data.classes": Annotated[list[Text], Field(min_length=1)] | None,
    "data.train": Text,
    "data.val": Text,
    "data.test": Text | None,
    "data.cache": Text | None,
    "data.short": Count,
    "data.size": Count,
    "data.normalize": Literal["contrast"] | Positive,
    "data.pad": Index,
    "data.mirror": bool,
    "data.images": Count | None,
    "data.held_out": Count | None,
    "data.mean": Colour,
    "data.scale": Positive,
    "mean": Colour,
    "proposals": Text | None,
    "new_layers": Literal["fast_rcnn", "initialized"],
    "zero_classifiers": bool,
    "loss": Literal["softmax", "hinge"],
    "model._target_": Text,
    "model.num_outputs": Count | None,
    "model.input_size": Count,
    "model.width": Positive,
    "model.fc": Count,
    "model.lrn": bool,
    "model.groups": bool,
    "model.batch_norm": bool,
    "model.activation": Literal["relu", "vlrelu", "tanh", "sigmoid", "maxout"],
    "model.depth": Count,
    "model.patch": Count,
    "model.auxiliary": bool,
    "model.dropout": Below1,
    "detector.pool": Text,
    "detector.pooled": Count,
    "init.name": Text,
    "init._target_": Text,
    "init.method": Literal["balance", "paper"],
    "init.images": Count,
    "init.filters": Literal[FILTERS] | None,
    "init.within": bool,
    "init.between": bool,
    "init.bias": Annotated[float, Field(allow_inf_nan=False)],
    "init.linear": bool,
    "init.std": NotNegative,
    "init.lrn": Literal["exact", "estimate"] | None,
    "init.tolerance": Positive,
    "init.max_iterations": Count,
    "init.weights": Text | None,
    "init.source": Text | None,
    "init.rescale": bool,
    "init.skip": list[Text],
    "init.alpha": Annotated[float, Field(gt=0, le=1)],
    "init.nonhomogeneous": Literal["pin", "scale"],
    "init.outputs": Literal["keep", "free"],
    "init.rate_images": Count,
    "init.training": bool,
    "optimizer.name": Literal["sgd", "adam", "rmsprop"],
    "optimizer.lr": Positive,
    "optimizer.momentum": Below1,
    "optimizer.rms_decay": Below1,
    "optimizer.betas": Annotated[list[Below1], Field(min_length=2, max_length=2)],
    "optimizer.weight_decay": NotNegative,
    "optimizer.bias_lr_mult": NotNegative,
    "optimizer.bias_decay_mult": NotNegative,
    "crop.size": Count,
    "crop.min_scale": Positive,
    "crop.max_scale": Positive,
    "crop.mirror": bool,
    "patches.gap": NotNegative,
    "patches.jitter": NotNegative,
    "patches.min_side": Annotated[float, Field(gt=0, le=1)],
    "batch.images": Count,
    "batch.per_batch": Count,
    "batch.foreground": Share,
    "batch.scales": Annotated[list[Count], Field(min_length=1)],
    "batch.longest": Count,
    "train.iterations": Index,
    "train.batch_size": Count,
    "train.accumulate": Count,
    "train.precision": Literal["float32", "bfloat16"],
    "train.graph": bool,
    "train.lr_policy": Literal["step", "multistep", "poly"],
    "train.lr_power": Positive,
    "train.lr_every": Count,
    "train.lr_steps": list[Count],
    "train.lr_gamma": Positive,
    "train.clip_norm": Positive | None,
    "train.log_every": Count,
    "train.validate_every": Count,
    "train.checkpoint_seconds": NotNegative,
    "rates.images": Count,
    "evaluate.crops": Count,
    "evaluate.batch_size": Count,
    "evaluate.pairs": Count,
    "evaluate.short": Count,
    "evaluate.longest": Count,
    "evaluate.nms_threshold": Share,
    "evaluate.limit": Count,
    "evaluate.pictures": Index,
    "network.kind": Literal["linear", "convolution", "vgg"],
    "network.depths": Annotated[list[Annotated[int, Field(ge=2)] | Literal[tuple("ABCDE")]], Field(min_length=1)],
    "network.width": Positive,
    "network.activation": Literal["relu", "tanh", "sigmoid"],
    "pool": Text,
    "layer": Text | None,
    "queries": Count,
    "neighbors": Count,
    "batch_size": Count,
}
OPEN = ("lines.", "detector.padding.")  # groups with keys of one's own
# Groups that name a function or class as `_target_`, whose arguments their keys are: where ours lie, and the keys that
# are not arguments.
TARGETS = {
    "model": ("experiments.networks.", ("input_size",)),
    "init": (("initializers.", "experiments."), ("name", "images")),
}


def check(cfg: DictConfig) -> None:
    """Raises ValueError: a setting has a value that makes no sense; one line with key, value and what is allowed."""
    settings = dict(flat(OmegaConf.to_container(cfg, resolve=True)))
    for key, value in settings.items():
        if key in RULES:
            _check_one(key, value)
        elif not is_open(f"{key}.", cfg):
            raise ValueError(unknown(key))
    for low, high in (("crop.min_scale", "crop.max_scale"), ("evaluate.short", "evaluate.longest")):
        if low in settings and settings[low] > settings[high]:
            raise ValueError(f"{low}={settings[low]}: it should be at most {high}={settings[high]}")


def unknown(key: str, groups: Sequence[str] = ()) -> str:
    """The error for a key that is no setting, with what is close to it; `groups` can be set too."""
    known = [*RULES, *groups]
    close = [name for name in known if name.rpartition(".")[2] == key] or get_close_matches(key, known, n=1)
    return f"{key}: there is no such setting here; {f'{close[0]} is close' if close else '--cfg job shows all'}"


def is_open(key: str, cfg: DictConfig) -> bool:
    """Whether the settings take `key` though no rule says what it may be: in groups with keys of one's own."""
    if key.startswith(OPEN):
        return True
    group = key.partition(".")[0]
    target = OmegaConf.select(cfg, f"{group}._target_")
    return group in TARGETS and target is not None and not str(target).startswith(TARGETS[group][0])


def _check_one(key: str, value: Any) -> None:
    try:
        _adapter(key).validate_python(value)
    except ValidationError as error:
        texts = (re.sub(r"^(Input|List|String|Value) | after validation", "", found["msg"]) for found in error.errors())
        reasons = dict.fromkeys(texts)
        raise ValueError(f"{key}={'null' if value is None else value}: it {' or '.join(reasons)}") from error


@cache
def _adapter(key: str) -> TypeAdapter:
    return TypeAdapter(RULES[key], config=ConfigDict(strict=True))


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and not f"{path}{name}.".startswith(OPEN):
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
