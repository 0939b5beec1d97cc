"""Files of weights that are damaged in any way end in one named error, and leave the model as it was."""

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from experiments.networks import load_weights

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
KINDS = ("caffe_small.caffemodel", "caffe_small_v1.caffemodel", "a.pth", "legacy.pth", "a.safetensors")
LIMIT_KB = 1_000_000  # beyond what the process holds before


@pytest.fixture(scope="module")
def valid(tmp_path_factory, caffe_small_state):
    folder = tmp_path_factory.mktemp("valid")
    torch.save(caffe_small_state, folder / "a.pth")
    torch.save(caffe_small_state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(caffe_small_state, folder / "a.safetensors")
    contents = {name: (folder / name).read_bytes() for name in KINDS[2:]}
    return contents | {name: (REFERENCE / name).read_bytes() for name in KINDS[:2]}


@pytest.fixture(scope="module")
def caffe_small_state():
    return {"conv1.weight": torch.ones(4, 3, 3, 3), "conv1.bias": torch.ones(4), "fc5.weight": torch.ones(2, 4)}


@pytest.mark.parametrize("examples", [50, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused(kind, examples, valid, tmp_path):
    model = nn.Sequential()
    model.conv1, model.fc5, model.last_layer = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), "fc5"
    model.std_factors = {"fc5": 1.0}
    path = tmp_path / kind
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def damage(data):
        whole = valid[kind]
        content = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
        for limit in (400, len(content)):  # heads of files matter most
            for _ in range(data.draw(st.integers(0, 4))):
                if content:
                    place = data.draw(st.integers(0, min(limit, len(content)) - 1))
                    content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(data.draw(st.binary(max_size=300)) if data.draw(st.integers(0, 9)) == 0 else bytes(content))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        message = ""
        try:
            load_weights(model, path)
        except (ValueError, OSError) as error:
            message = str(error)
        if message:
            assert len(message.splitlines()) == 1
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    damage()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < LIMIT_KB
