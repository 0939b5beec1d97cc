"""The examples of docs/extending.md work as they stand there."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/extending.md").read_text()
SHORT = ("train.iterations=5", "train.log_every=5", "data.cache=cache")
FEW = ("evaluate.crops=1", "rates.images=10")


def commands(section):
    block = TEXT.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [shlex.split(line) for code in re.findall(r"```bash\n(.*?)```", block, re.S) for line in code.splitlines()]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 255, (80, 80, 3), np.uint8)).save(path)


@pytest.fixture
def run(demo, finish, tmp_path):
    """Run an example for a few iterations, on the demo set where it names no other: -> its record."""

    def execute(words, *more):
        assert words[0] == "python"
        root = [] if any(word.startswith("data.root=") for word in words) else [f"data.root={demo / 'set'}"]
        done = finish([sys.executable, ROOT / words[1], *words[2:], *root, *SHORT, *more])
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / done.stdout.splitlines()[-1]).read_text())

    return execute


def test_an_initialization(run, finish, tmp_path):
    (code,) = re.findall(r"```python\n(# my_init.py\n.*?)```", TEXT, re.S)
    (tmp_path / "my_init.py").write_text(code)
    command, tables = commands("An initialization")
    settings = run(command, *FEW)["config"]["init"]
    assert settings == {"name": "orthogonal", "_target_": "my_init.orthogonal", "images": 160, "gain": 1.4}
    done = finish([sys.executable, ROOT / tables[1], *tables[2:]])
    assert done.returncode == 0, done.stderr
    assert any("| `orthogonal` |" in path.read_text() for path in (tmp_path / "tables").glob("table*.md"))


def test_a_network(run):
    (command,) = commands("A network")
    record = run(command, *FEW)
    assert record["config"]["model"] == {"_target_": "torchvision.models.squeezenet1_1", "input_size": 64}
    assert record["change_rate"]["spread"] < 10


def test_a_folder_per_class(run, tmp_path):
    command, _ = commands("Images")
    for part, count in (("train", 40), ("val", 5)):
        for name in ("cat", "dog"):
            for number in range(count):
                picture(tmp_path / f"photos/{part}/{name}/{number}.jpg")
    record = run(command, "init.images=20", "train.batch_size=8", "workers=0")
    assert record["data"] == "photos, 2 classes, 80 + 10 images"


def test_a_folder_in_vocs_layout(run, tmp_path):
    _, command = commands("Images")
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    for number in range(40):
        picture(tmp_path / f"signs/JPEGImages/{number}.jpg")
        annotation = tmp_path / f"signs/Annotations/{number}.xml"
        annotation.parent.mkdir(exist_ok=True)
        name = ("stop", "yield")[number % 2]
        annotation.write_text(f"<annotation><object><name>{name}</name>{box}</object></annotation>")
    lists = tmp_path / "signs/ImageSets/Main"
    lists.mkdir(parents=True)
    for split, numbers in (("trainval", range(30)), ("val", range(20, 30)), ("test", range(30, 40))):
        (lists / f"{split}.txt").write_text("\n".join(map(str, numbers)))
    record = run(command, FEW[0])
    assert record["per_class"].keys() == {"stop", "yield"}
