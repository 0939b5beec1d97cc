"""The files that install and hold the project together say the same thing."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import initializers

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


def imports(folder):
    """(file, top-level package, whether inside a function) of every import in the sources of `folder`."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                names = [node.module]
            found |= {(path.name, name.partition(".")[0], node in inside) for name in names}
    return {row for row in found if row[1] not in sys.stdlib_module_names}


def imported(folder):
    return {package for _, package, _ in imports(folder)}


def test_initializers_needs_nothing_but_torch():
    found = imports("initializers")
    assert {package for _, package, inside in found if not inside} == {"initializers", "torch"}
    assert {(file, package) for file, package, _ in found if package not in {"initializers", "torch"}} == {
        ("__main__.py", "PIL"),
        ("__main__.py", "matplotlib"),
        ("__main__.py", "safetensors"),
        ("_weights_file.py", "safetensors"),
        ("_images.py", "PIL"),
        ("_plot.py", "matplotlib"),
    }
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


def test_import_initializers_loads_no_optional_package():
    code = "import sys, initializers; print(sorted({'PIL', 'matplotlib', 'safetensors'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_every_import_of_the_experiments_is_declared():
    declared = {Requirement(line).name for line in [*PROJECT["dependencies"], *EXTRAS["experiments"]]}
    modules = {"scikit-learn": "sklearn", "hydra-core": "hydra", "pillow": "PIL", "protobuf": "google"}
    modules["opencv-contrib-python-headless"] = "cv2"
    allowed = {modules.get(name, name) for name in declared} | {"initializers", "detection", "experiments"}
    assert "torch" in imported("experiments")
    assert imported("detection") <= allowed - {"experiments"}  # dependencies point one way
    bench = {(Requirement(line).name, True) for line in EXTRAS["bench"]}  # not pinned, as no test runs what needs it
    inside = {(package, inside) for _, package, inside in imports("scripts")}
    assert imported("experiments") | {package for package, _ in inside - bench} <= allowed | {"scripts"}


def modules_imported(folder):
    """Full names of the modules that each file of a folder imports, by file."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{part.name}" for part in node.names)}
            elif isinstance(node, ast.Import):
                names |= {part.name for part in node.names}
        found[path] = names
    return found


COMMANDS = {f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("*.py")} - {
    "experiments.__init__",
    "experiments.files",
    "experiments.progress",
    "experiments.settings",
    "experiments.targets",
}


def test_arrows_point_one_way():
    for folder in ("experiments/data", "experiments/networks"):
        for path, names in modules_imported(folder).items():
            assert not [name for name in names if name.startswith("experiments.engine")], path
    for folder in ("experiments", "scripts"):
        for path, names in modules_imported(folder).items():
            assert not names & COMMANDS, path


def private(path):
    return f"initializers.{path.stem}"


def test_no_circle_in_the_library():
    graph = {private(path): names for path, names in modules_imported("initializers").items()}
    del graph["initializers.__main__"], graph["initializers.__init__"]
    left = {name: {other for other in names if other in graph} for name, names in graph.items()}
    while left:
        free = [name for name, names in left.items() if not names & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        left = {name: names for name, names in left.items() if name not in free}
    assert (
        not {"initializers._within", "initializers._between", "initializers._initialize"}
        & graph["initializers._baselines"]
    )


@pytest.mark.parametrize("folder", ["initializers", "experiments", "detection"])
def test_no_function_is_longer_than_a_screen(folder):
    """45 lines of code, docstring and comments not counted."""
    for path in (ROOT / folder).rglob("*.py"):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                first = body[0].lineno - 1 if body else node.end_lineno
                code = [line for line in lines[first : node.end_lineno] if line.strip() and line.strip()[0] != "#"]
                assert len(code) <= 45, f"{path}: {node.name}"


def test_github_runs_what_ci_runs_on_every_python_that_is_supported():
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert ci["steps"][-1]["run"] == "bash .ci/run"
    stated = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert ci["strategy"]["matrix"]["python"] == stated
    release = (ROOT / ".github/workflows/release.yml").read_text()
    yaml.safe_load(release)
    assert all(command in release for command in ("python -m build", "twine check --strict", "__version__"))


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == initializers.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
