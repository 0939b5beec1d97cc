"""The wheel holds the library alone, and works where there is nothing but torch."""

import importlib.metadata
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FORWARD = """
import torch, initializers
model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
print(initializers.initialize(model, torch.randn(50, 8), "pca").spread_after < 1.01, initializers.__file__)
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    run("git", "clone", "-q", ROOT, clone)  # so that nothing is built in this checkout
    options = ("--no-deps", "--no-build-isolation", "-q")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, clone)
    (path,) = folder.glob("*.whl")
    return path


def test_what_it_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"initializers"}
    assert {"initializers/py.typed", "initializers/_within.py", "initializers/__main__.py"} <= {*names}
    about = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Typing :: Typed" in about
    assert "# Using `initializers` on your own network" in about


def test_twine_finds_nothing_wrong(wheel):
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel)


def closure(name, found):
    """The distributions that one needs, itself among them."""
    if name not in found:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform
            return found
        found[name] = distribution
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                closure(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Python of an environment with the wheel, torch and what torch needs."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    zipfile.ZipFile(wheel).extractall(site)
    here = Path(sysconfig.get_path("purelib"))
    names = {file.parts[0] for found in closure("torch", {}).values() for file in found.files or ()}
    for name in names - {"..", "__pycache__"}:
        if (here / name).exists():
            (site / name).symlink_to(here / name)
    return folder / "bin" / "python"


def test_it_works_with_torch_alone(python, tmp_path):
    printed = run(python, "-c", FORWARD, cwd=tmp_path)
    assert printed.startswith("True")
    assert str(python.parents[1]) in printed


def test_its_command_says_what_to_install(python, tmp_path):
    (tmp_path / "net.py").write_text("import torch\ndef make(): return torch.nn.Linear(3, 2)\n")
    command = (python, "-m", "initializers", "net:make", "--images", ".", "--out", "w.pt")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install pillow" in done.stderr
    assert "Traceback" not in done.stderr
