"""The files that install and hold the project together say the same thing."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pinned():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}


def test_everything_is_pinned():
    assert len(pinned()) > 50
    for requirement in pinned().values():
        assert [pin.operator for pin in requirement.specifier] == ["=="], requirement


@pytest.mark.parametrize("wanted", [*PROJECT["dependencies"], *EXTRAS["experiments"], *EXTRAS["dev"]])
def test_the_pins_are_within_the_ranges(wanted):
    wanted = Requirement(wanted)
    (pin,) = pinned()[canonicalize_name(wanted.name)].specifier
    assert wanted.specifier.contains(pin.version)


def test_conda_users_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"] == [
        f"python{PROJECT['requires-python']}",
        "pip",
        {"pip": ["-r requirements.txt", "-e ."]},
    ]


def imported(folder):
    """Top-level packages that the sources of `folder` import."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_initializers_needs_nothing_but_torch():
    assert imported("initializers") == {"initializers", "torch"}
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


def test_every_import_of_the_experiments_is_declared():
    declared = {Requirement(line).name for line in [*PROJECT["dependencies"], *EXTRAS["experiments"]]}
    modules = {"scikit-learn": "sklearn", "hydra-core": "hydra", "pillow": "PIL"}
    allowed = {modules.get(name, name) for name in declared} | {"initializers", "experiments"}
    assert "torch" in imported("experiments")
    assert imported("experiments") | imported("scripts") <= allowed
