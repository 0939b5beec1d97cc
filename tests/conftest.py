import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import hypothesis
import pytest
from torch import nn

from experiments.data.demo import make_demo

hypothesis.settings.register_profile("untimed", deadline=None)  # a first example pays for imports and caches
hypothesis.settings.load_profile("untimed")
ROOT = Path(__file__).resolve().parents[1]
# A command spends most of a short run on its imports. So its process is forked from one that has done these and nothing
# else: what the command sees is a process of its own, as from the command line.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [f"experiments.{name}" for name in ("voc_cls", "voc_det", "imagenet", "neighbors", "small_images", "depth")]
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder with a generated devkit in `set/`; the commands under test decode its images into `cache/`."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder / "set")
    return folder


@pytest.fixture
def command(demo, tmp_path):
    """The command line of an experiment on the demo set, in `tmp_path`: few iterations, one thread, one test crop."""

    def build(script, *overrides):
        flags = [override for override in overrides if override.startswith("-")]
        return [
            *(sys.executable, ROOT / "experiments" / script, *flags, "preset=demo"),
            *(f"data.root={demo / 'set'}", f"data.cache={demo / 'cache'}", f"output={tmp_path / 'outputs'}"),
            *("train.iterations=60", "train.log_every=5", "model.dropout=0.5"),
            *(() if script == "voc_det.py" else ("evaluate.crops=1", "rates.images=20")),
            *(override for override in overrides if override not in flags),
        ]

    return build


class Started:
    """A command at work, in a process of its own: what `subprocess.Popen` gives, with its output at the end."""

    def __init__(self, line, folder, environment, outputs, disk=None):
        self.line, self.outputs = line, [outputs / name for name in ("stdout", "stderr")]
        self.process = FORKS.Process(target=run_script, args=(line[1:], folder, environment, self.outputs, disk))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        """Its exit status, minus the signal that ended it; None while it is at work."""
        return self.process.exitcode

    def wait(self, timeout=None):
        """`poll()` at its end, or after so many seconds."""
        self.process.join(timeout)
        return self.poll()

    def finish(self):
        """-> subprocess.CompletedProcess, with text, at its end."""
        return subprocess.CompletedProcess(self.line, self.wait(), *(path.read_text() for path in self.outputs))


@pytest.fixture
def begin(tmp_path, tmp_path_factory):
    """Start a command line, `[sys.executable, script, ...]`, in `tmp_path` and without a network: -> Started.

    With `disk`, the disk is full for it once a file has that many bytes. Other options are environment variables.
    """

    def execute(line, *, disk=None, **variables):
        environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"} | variables
        environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        line = [str(word) for word in line]
        return Started(line, tmp_path, environment, tmp_path_factory.mktemp("printed"), disk)

    return execute


@pytest.fixture
def finish(begin):
    """Run a command line to its end: -> subprocess.CompletedProcess, with text. Options as for `begin`.

    Of several `processes`, which find each other as those that torchrun starts do, what the first gives.
    """

    def execute(line, *, processes=1, **options):
        if processes == 1:
            return begin(line, **options).finish()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        ranks = [begin(line, RANK=str(rank), LOCAL_RANK=str(rank), **group, **options) for rank in range(processes)]
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):  # one failed: torchrun ends the others, which wait for it
                for rank in ranks:
                    rank.kill()
            time.sleep(0.02)
        return next((rank for rank in ranks if rank.poll()), ranks[0]).finish()

    return execute


def run_script(words, folder, environment, outputs, disk):
    """What Python does for `python script.py ...`, in a process of its own."""
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if disk is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


@pytest.fixture
def run(command, finish):
    """Run an experiment to its end: `run("voc_cls.py", "init=pca")` -> subprocess.CompletedProcess, with text."""
    return lambda script, *overrides, **options: finish(command(script, *overrides), **options)


@pytest.fixture
def caffe_small():
    """The network of tests/reference/caffe_small.prototxt, which has every kind of layer that CaffeNet has."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, 7, stride=2),
            relu1=nn.ReLU(inplace=True),
            pool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),
            norm1=nn.LocalResponseNorm(5),
            conv2=nn.Conv2d(16, 32, 5, padding=2, groups=2),
            relu2=nn.ReLU(inplace=True),
            pool2=nn.MaxPool2d(3, stride=2, ceil_mode=True),
            norm2=nn.LocalResponseNorm(5),
            conv3=nn.Conv2d(32, 24, 3, padding=1),
            relu3=nn.ReLU(inplace=True),
            pool3=nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
            flatten=nn.Flatten(),
            fc4=nn.Linear(384, 40),
            relu4=nn.ReLU(inplace=True),
            fc5=nn.Linear(40, 10),
        )
    )
