"""The README's examples run."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import initializers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^((?:make|python) [^#\n]*)", "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)), re.M
)


def test_python_examples(capsys):
    torch.manual_seed(0)
    names = {"initializers": initializers}
    for block in PYTHON:
        exec(block, names)
    assert "kmeans" in capsys.readouterr().out
    assert names["rates"].mean["0"] > 0


def test_there_are_commands():
    assert sum("voc_cls.py" in command for command in COMMANDS) >= 3
    assert [command.strip() for command in COMMANDS[:2]] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python")])
def test_commands_name_what_exists(command):
    words = shlex.split(command)[1:]
    assert (ROOT / words[0]).is_file()
    if words[0] == "experiments/voc_cls.py":
        overrides = [word for word in words[1:] if word != "-m"]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            assert compose("voc_cls", overrides=overrides, return_hydra_config=True)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
