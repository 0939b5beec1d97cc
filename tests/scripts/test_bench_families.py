"""The study of all networks of timm goes on where it was killed, and leaves none out in silence."""

import json
import os
import signal
import sys

import pytest
import torch
from torch import nn

from scripts import bench_families


def small(name):
    torch.manual_seed(0)
    if torch.empty(0).is_meta and name != "timm/broken":  # where parameters are counted
        return nn.Linear(*SIZES[name.removeprefix("timm/")], bias=False)
    if name == "timm/broken":
        raise RuntimeError("no such\nweights")
    if name == "timm/endless":
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGXCPU)
    if name == "timm/large":
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
    layers = [nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(*layers).eval()


MODULES = [["three", "broken"], ["wide", "one"], ["two", "endless"], ["large"]]
SIZES = {"one": (5, 5), "two": (7, 7), "three": (9, 9), "wide": (8_000, 8_000), "endless": (3, 3), "large": (4, 4)}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The command, with networks and images that are made here; gives the lines of its file."""
    out = tmp_path / "bench" / "timm.jsonl"
    generator = torch.Generator().manual_seed(0)
    replaced = {
        "TIMM_OUT": out,
        "build": small,
        "networks_of_timm": lambda: [[f"timm/{name}" for name in module] for module in MODULES],
        "load_images": lambda count, size: torch.randn(count, 3, size, size, generator=generator),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(bench_families, name, value)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench_families.py", *arguments])
        bench_families.main()
        return out.read_text().splitlines()

    return run


def test_every_network_has_a_line_and_is_done_once(study):
    lines = study("--timm")
    records = {record["network"]: record for record in map(json.loads, lines)}
    order = ["broken", "one", "endless", "large", "three", "wide", "two"]  # the smallest of each module first
    assert [*records] == [f"timm/{name}" for name in order]
    for name in ("timm/one", "timm/two", "timm/three"):
        assert records[name]["images"] == 16
        ((kind, measured),) = records[name]["filters"].items()
        assert kind == "gaussian"
        assert measured["spread_after"] < 1.01
        assert measured["deviation"]["std"] < 1e-4
    assert records["timm/broken"]["failed"] == "RuntimeError: no such weights"
    assert records["timm/endless"]["failed"] == f"more than {bench_families.CPU_LIMIT} s"
    assert records["timm/large"]["failed"] == "its process ended with -9"
    assert records["timm/wide"]["skipped"] == "64,000,000 parameters"
    assert study("--timm") == lines
    assert len(study("--force", "timm/one")) == len(lines) + 1


def test_it_goes_on_where_it_was_killed(study):
    lines = study("timm/one", "timm/two")
    bench_families.TIMM_OUT.write_text(f"{lines[0]}\n{lines[1][:50]}")
    after = study("timm/one", "timm/two")
    assert after[0] == lines[0]
    assert json.loads(after[-1])["network"] == "timm/two"


@pytest.mark.parametrize(("sizes", "used"), [((64, 224), 64), ((96, 224), 96), ((224,), 224)])
@pytest.mark.parametrize("constructor_takes_size", [True, False])
def test_images_are_as_small_as_the_network_takes(monkeypatch, sizes, used, constructor_takes_size):
    class Fixed(nn.Module):
        """Takes images of one size, as a ViT does, or of some."""

        def __init__(self, sizes):
            super().__init__()
            self.sizes, self.default_cfg = sizes, {"input_size": (3, 224, 224)}

        def forward(self, x):
            if x.shape[-1] not in self.sizes:
                raise RuntimeError("size")
            return x.mean((-2, -1))

    def build(name, **options):
        if options and not constructor_takes_size:
            raise TypeError("img_size")
        return Fixed((options["img_size"],) if options else sizes)

    monkeypatch.setattr(bench_families, "build", build)
    model, size = bench_families.build_small("timm/any")
    made = constructor_takes_size and sizes == (224,)
    assert size == (96 if made else used)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)
