"""Settings that make no sense are one line, before anything is done."""

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.settings import OPEN, RULES, check, flat

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
COMMANDS = ("voc_cls", "voc_det", "imagenet", "pretrain", "change_rate", "neighbors", "small_images", "depth")
GROUPS = [
    *(f"init={path.stem}" for path in sorted((CONFIGS / "init").glob("*.yaml"))),
    *(f"model={path.stem}" for path in sorted((CONFIGS / "model").glob("*.yaml"))),
    *(f"preset={path.stem}" for path in sorted((CONFIGS / "preset").glob("*.yaml"))),
    "optimizer=adam",
    "optimizer=rmsprop",
    *("network=linear", "network=convolution", "network=vgg"),
]

UNDETECTED = {f"model={name}" for name in ("fitnet4", "mnist_fitnet", "resnet")}  # no detector is made of these
UNDETECTED |= {f"model={name}" for name in ("resnet18", "convnext_atto", "vit_tiny", "mobilenetv2")}


def config(command, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(command, list(overrides))


def groups_of(command):
    """The choices that a command has."""
    text = (CONFIGS / f"{command}.yaml").read_text()
    groups = [choice for choice in GROUPS if f"- {choice.partition('=')[0]}:" in text]
    return [choice for choice in groups if command != "voc_det" or choice not in UNDETECTED]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_every_command_has_a_rule_and_keeps_it(command):
    for choice in ["seed=0", *groups_of(command)]:
        if command == "voc_det" and choice == "optimizer=adam":
            choice = "seed=1"
        cfg = config(command, choice)
        check(cfg)
        keys = {key for key, _ in flat(OmegaConf.to_container(cfg, resolve=True))}
        assert {key for key in keys if not f"{key}.".startswith(OPEN)} <= RULES.keys()


@pytest.mark.slow
def test_no_rule_is_of_a_setting_that_is_not_there():
    found = set()
    for command in COMMANDS:
        for choice in ["seed=0", *groups_of(command)]:
            found |= {key for key, _ in flat(OmegaConf.to_container(config(command, choice), resolve=True))}
    assert found >= RULES.keys()


INTEGERS = {
    "voc_cls": [
        *("init.images", "train.batch_size", "train.lr_every", "train.log_every", "evaluate.crops"),
        *("evaluate.batch_size", "rates.images", "model.input_size", "model.fc", "crop.size", "threads"),
    ],
    "voc_det": ["batch.images", "batch.per_batch", "batch.longest", "evaluate.limit", "evaluate.short"],
    "imagenet": ["train.accumulate", "train.validate_every", "data.short"],
    "neighbors": ["queries", "neighbors", "batch_size"],
    "pretrain": ["evaluate.pairs"],
}
NUMBERS = {
    "voc_cls": ["optimizer.lr", "train.clip_norm", "train.lr_gamma", "crop.min_scale", "crop.max_scale", "model.width"],
}
OTHERS = [
    *("optimizer.momentum=2", "optimizer.momentum=1", "optimizer.momentum=-0.1", "optimizer.weight_decay=-1e-4"),
    *("optimizer.bias_lr_mult=-1", "optimizer.bias_lr_mult=two", "seed=-1", "seed=4294967296", "seed=a", "seed=null"),
    *("seed=0.5", "seed=true", "threads=100000", "tf32=maybe", "device=gpu", "device=3", "output=''", "output=null"),
    *("data.mean=5", "data.mean=[1,2]", "data.mean=[1,2,a]", "data.mean=[1,2,300]", "data.root=null", "data.cache=''"),
    *("train.iterations=-1", "train.iterations=ten", "train.iterations=1.5"),
    *("crop.mirror=2", "crop.min_scale=3", "model.dropout=1", "model.dropout=-0.5", "model.dropout=half"),
    *("model.lrn=exact", "model.num_outputs=0", "init.within=1", "init.between=no_thanks", "init.bias=null"),
    *("init.filters=sift", "init.filters=3", "train.checkpoint_seconds=-1", "train.checkpoint_seconds=soon"),
    *("train.clip_norm=.inf", "optimizer.lr=.nan", "optimizer.name=lion", "optimizer.lr=[0.1,0.2]"),
]
BAD = [
    *(
        (command, f"{key}={value}")
        for command, keys in INTEGERS.items()
        for key in keys
        for value in (0, -1, "ten", 1.5)
    ),
    *((command, f"{key}={value}") for command, keys in NUMBERS.items() for key in keys for value in (0, -1, "abc")),
    *(("voc_cls", override) for override in OTHERS),
    *(
        ("voc_det", f"{key}={value}")
        for key in ("batch.foreground", "evaluate.nms_threshold")
        for value in (-0.1, 1.1, "x")
    ),
    *(
        ("voc_det", override)
        for override in ("batch.scales=[]", "batch.scales=600", "batch.scales=[0]", "new_layers=zero")
    ),
    *(("voc_det", override) for override in ("evaluate.pictures=-1", "evaluate.short=2000", "mean=[1]")),
    *(
        ("imagenet", override)
        for override in ("train.precision=float8", "train.lr_policy=cosine", "zero_classifiers=0")
    ),
    *(("imagenet", override) for override in ("workers=-1", "workers=many")),
    *(("imagenet model=googlenet", f"train.lr_power={value}") for value in (0, -1, "abc")),
    *(
        ("small_images", override)
        for override in (
            *("loss=square", "model.activation=gelu", "data.normalize=none", "data.normalize=0"),
            *("data.pad=-1", "data.mirror=2", "data.images=0", "data.held_out=0", "train.lr_steps=[0]"),
        )
    ),
    *(
        ("depth", override)
        for override in ("network.kind=rnn", "network.depths=[1]", "network.depths=[F]", "network.depths=[]")
    ),
    *(("depth", override) for override in ("network.width=0", "network.activation=gelu")),
    *(("small_images model=resnet", override) for override in ("model.depth=0", "model.depth=deep")),
    *(("small_images optimizer=rmsprop", override) for override in ("optimizer.rms_decay=1", "optimizer.rms_decay=-1")),
    *(("pretrain", override) for override in ("patches.gap=-1", "patches.min_side=0", "patches.min_side=2")),
]


def test_there_are_many():
    assert len(BAD) > 150


@pytest.mark.parametrize(("command", "override"), BAD)
def test_a_setting_that_makes_no_sense_is_one_line(command, override):
    (parsed,) = OverridesParser.create().parse_overrides([override])
    with pytest.raises(ValueError, match=r"^[a-z0-9_.]+=.*: it (should|is) ") as caught:
        check(config(*command.split(), override))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{parsed.key_or_group}=")


@pytest.mark.parametrize("override", ["train.iterations=-1", "optimizer.lr=abc", "evaluate.crops=0", "seed=4294967296"])
def test_the_commands_say_it_before_they_begin(run, tmp_path, override):
    done = run("voc_cls.py", "init=torch", override)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {override}: it should be ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("script", "override", "close"),
    [
        ("voc_cls.py", "optimizer.lrr=0.1", "optimizer.lr is close"),
        ("voc_cls.py", "lr=0.1", "optimizer.lr is close"),
        ("voc_cls.py", "inti=kmeans", "init is close"),
        ("voc_cls.py", "+train.iteration=5", "train.iterations is close"),
        ("voc_cls.py", "++train.iteration=5", "train.iterations is close"),
        ("voc_cls.py", "+queries=5", "queries is close"),  # of another command
        ("voc_cls.py", "zzzzzzzz=5", "--cfg job shows all"),
        ("change_rate.py", "rates.image=5", "rates.images is close"),
        ("neighbors.py", "querys=5", "queries is close"),
    ],
)
def test_a_misspelt_setting_says_what_is_close(finish, tmp_path, script, override, close):
    done = finish([sys.executable, ROOT / "experiments" / script, override])
    assert done.returncode == 1
    assert done.stderr == f"error: {override.lstrip('+').partition('=')[0]}: there is no such setting here; {close}\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "override", ["init=kmean", "optimizer.lr=[", "optimizer.lr", "data.root=${oc.env:NOT_THERE_AT_ALL}"]
)
def test_what_hydra_finds_wrong_is_one_line_too(finish, tmp_path, override):
    done = finish([sys.executable, ROOT / "experiments/voc_cls.py", override])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
