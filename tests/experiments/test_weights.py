"""Weights from files: written by Caffe itself, by hand, by PyTorch, and damaged."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from experiments.engine.initialization import pretrained
from experiments.networks import CaffeNet, GoogLeNet, load_weights, read_weights

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
SMALL = ["caffe_small.caffemodel", "caffe_small_v1.caffemodel"]  # the current format and the old one


def field(number, payload):
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value):
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def blob(array):
    shape = field(7, field(1, b"".join(map(varint, array.shape))))
    return field(7, shape + field(5, array.astype("<f4").tobytes()))


def caffemodel(layers):
    """A file of the current format: name -> arrays."""
    parts = [field(1, name.encode()) + b"".join(map(blob, arrays)) for name, arrays in layers.items()]
    return b"".join(field(100, part) for part in parts)


def arrays(model):
    found = {}
    for name, parameter in model.named_parameters():
        found.setdefault(name.rpartition(".")[0], []).append(parameter.detach().numpy())
    return found


@pytest.fixture
def small():
    return {"input_size": 67, "width": 0.125, "fc": 24}


@pytest.mark.parametrize("name", SMALL)
def test_a_file_that_caffe_wrote(name, caffe_small):
    caffe_small.last_layer = "fc5"
    report = load_weights(caffe_small, REFERENCE / name)
    assert report.loaded == list(caffe_small.state_dict())
    assert report.missing == report.extra == []
    reference = np.load(REFERENCE / "magic_init_small.npz")
    with torch.no_grad():
        output = caffe_small(torch.from_numpy(reference["images"]))
    expected = torch.from_numpy(reference["between.fc5"])
    assert ((output - expected).norm() / expected.norm()).item() < 1e-4
    for parameter, tensor in caffe_small.state_dict().items():
        torch.testing.assert_close(tensor, torch.from_numpy(reference[f"between.{parameter}"]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["caffemodel", "pth", "wrapped", "safetensors"])
def test_every_kind_of_file(kind, small, tmp_path):
    source, target = CaffeNet(7, **small), CaffeNet(7, **small)
    path = tmp_path / f"weights.{'pt' if kind == 'wrapped' else kind}"
    if kind == "caffemodel":
        path.write_bytes(caffemodel(arrays(source)))
    elif kind == "safetensors":
        save_file(source.state_dict(), path)
    elif kind == "pth":
        torch.save(source.state_dict(), path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    report = load_weights(target, path)
    assert (len(report.loaded), report.missing, report.extra) == (16, [], [])
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name
    note = "\ntaken from 'state_dict', prefix 'module.' removed" if kind == "wrapped" else ""
    assert str(report) == "16 parameters loaded" + note


def test_a_last_layer_of_another_size_is_new(small, tmp_path):
    source, target = CaffeNet(1000, **small), CaffeNet(20, **small)
    layers = arrays(source) | {"other/layer": [np.ones((2, 3))]}
    (tmp_path / "a.caffemodel").write_bytes(caffemodel(layers))
    report = load_weights(target, tmp_path / "a.caffemodel", seed=1)
    assert report.missing == ["fc8.weight", "fc8.bias"]
    assert report.extra == ["other.layer.weight"]
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert target.fc8.weight.std().item() == pytest.approx(0.01 * (4096 / 24) ** 0.5, rel=0.2)
    assert (target.fc8.bias == 0.1).all()
    first = target.fc8.weight.clone()
    load_weights(target, tmp_path / "a.caffemodel", seed=1)
    assert torch.equal(first, target.fc8.weight)


def test_missing_layers_keep_what_they_have(small, tmp_path):
    source, target = CaffeNet(7, **small), CaffeNet(7, **small)
    layers = {name: value for name, value in arrays(source).items() if name.startswith("conv")}
    (tmp_path / "a.caffemodel").write_bytes(caffemodel(layers))
    before = target.fc6.weight.clone()
    report = load_weights(target, tmp_path / "a.caffemodel")
    assert report.missing == [f"fc{n}.{part}" for n in (6, 7, 8) for part in ("weight", "bias")]
    assert "not in the file: fc6.weight" in str(report)
    assert torch.equal(before, target.fc6.weight)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.caffemodel", "holds no weights: a caffemodel does, a prototxt"),
        (b"layer { name: 'a' }", "a.caffemodel", "is no caffemodel, or it is damaged"),
        (caffemodel({"a": [np.ones((2, 3))]}), "a.caffemodel", "holds no layer of CaffeNet: its layers are a.weight"),
        (caffemodel({"a": [np.full(3, np.nan)]}), "a.caffemodel", "a.weight holds NaN or Inf"),
        (caffemodel({"a": [np.ones(3)]}) * 2, "a.caffemodel", "holds a.weight twice"),
        (
            field(100, field(1, b"a") + field(7, field(7, field(1, varint(9))) + field(5, struct.pack("<f", 1)))),
            "a.caffemodel",
            r"a.weight is to be of shape \(9,\), but has 1 values: the file is damaged",
        ),
        (b"x", "a.npz", r"weights are read from .caffemodel, .pth, .pt, .safetensors"),
        (b"x", "a.pth", "is no state dict of PyTorch, or it is damaged"),
        (b"x", "a.safetensors", "is no safetensors file, or it is damaged"),
    ],
)
def test_files_that_cannot_be_used(content, name, message, small, tmp_path):
    model = CaffeNet(7, **small)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / name)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("groups", "remedy"), [(True, "model.groups=true"), (False, "model.groups=false")])
def test_groups_that_do_not_fit(groups, remedy, small, tmp_path):
    source, target = CaffeNet(7, groups=groups, **small), CaffeNet(7, groups=not groups, **small)
    (tmp_path / "a.caffemodel").write_bytes(caffemodel(arrays(source)))
    before = target.conv1.weight.clone()
    with pytest.raises(ValueError, match=f"conv2.weight has shape .* pass {remedy}"):
        load_weights(target, tmp_path / "a.caffemodel")
    assert torch.equal(target.conv1.weight, before)


@pytest.mark.parametrize("kind", ["caffemodel", "pth", "safetensors"])
def test_a_file_that_is_not_there(kind, small, tmp_path):
    with pytest.raises(OSError, match="absent"):
        load_weights(CaffeNet(7, **small), tmp_path / f"absent.{kind}")


def test_a_state_that_is_none(small, tmp_path):
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no state dict: save"):
        load_weights(CaffeNet(7, **small), tmp_path / "a.pth")


VALID = (REFERENCE / SMALL[0]).read_bytes()


def read_or_refuse(content, path):
    path.write_bytes(content)
    try:
        tensors = read_weights(path)
    except ValueError:
        return
    assert sum(tensor.numel() for tensor in tensors.values()) <= len(content)  # nothing larger than the file


@settings(max_examples=300)
@given(content=st.binary(max_size=400))
def test_arbitrary_bytes(content, tmp_path_factory):
    read_or_refuse(content, tmp_path_factory.getbasetemp() / "fuzz.caffemodel")


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_files(data, tmp_path_factory):
    """A file of Caffe's, cut off, and with some of its first bytes or of any others changed."""
    content = bytearray(VALID[: data.draw(st.integers(0, len(VALID)))])
    for limit in (200, len(content)):
        for _ in range(data.draw(st.integers(0, 4))):
            if content:
                content[data.draw(st.integers(0, min(limit, len(content)) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(bytes(content), tmp_path_factory.getbasetemp() / "fuzz.caffemodel")


def typed(*layers):
    """A file of the current format: (name, type, bottom, top, arrays) of each layer."""
    parts = []
    for name, kind, bottom, top, arrays in layers:
        head = field(1, name.encode()) + field(2, kind.encode()) + field(3, bottom.encode()) + field(4, top.encode())
        parts.append(field(100, head + b"".join(map(blob, arrays))))
    return b"".join(parts)


def batch_normed(model, inplace):
    """What Caffe would write of a CaffeNet with BatchNorm: mean and variance times a factor, and a Scale layer."""
    layers, below = [], "data"
    for name, module in model.named_children():
        top = below if inplace and name.startswith(("bn", "relu")) else name
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            kind = "Convolution" if isinstance(module, torch.nn.Conv2d) else "InnerProduct"
            layers.append((name, kind, below, top, [p.detach().numpy() for p in module.parameters()]))
        elif name.startswith("bn"):
            mean, var = module.running_mean.numpy() * 999, module.running_var.numpy() * 999
            layers.append((f"{name}/norm", "BatchNorm", below, top, [mean, var, np.array([999.0])]))
            below, top = top, top if inplace else f"{name}s"
            layers.append((f"{name}/scale", "Scale", below, top, [p.detach().numpy() for p in module.parameters()]))
        else:
            layers.append((name, "Other", below, top, []))
        below = top
    return typed(*layers)


@pytest.fixture
def normed(small):
    torch.manual_seed(0)
    model = CaffeNet(7, batch_norm=True, **small).eval()
    for name, module in model.named_children():
        if name.startswith("bn"):
            for tensor in (module.running_mean, module.running_var, *module.parameters()):
                torch.nn.init.uniform_(tensor.detach(), 0.5, 2)
    return model


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_batch_norm_of_caffe(batch_norm, inplace, normed, small, tmp_path):
    (tmp_path / "a.caffemodel").write_bytes(batch_normed(normed, inplace))
    target = CaffeNet(7, batch_norm=batch_norm, **small).eval()
    report = load_weights(target, tmp_path / "a.caffemodel")
    assert report.missing == report.extra == []
    assert ("bn1.norm folded into conv1" in str(report)) is not batch_norm
    images = torch.randn(2, 3, 67, 67)
    torch.testing.assert_close(target(images), normed(images), rtol=1e-4, atol=1e-5)


def test_batch_norm_that_cannot_be_folded(normed, small, tmp_path):
    ones = np.ones(12)
    weights = [p.detach().numpy() for p in normed.conv1.parameters()]
    conv, relu = ("conv1", "Convolution", "data", "conv1", weights), ("relu1", "ReLU", "conv1", "conv1", [])
    (tmp_path / "a.caffemodel").write_bytes(
        typed(conv, relu, ("n", "BatchNorm", "conv1", "n", [ones, ones, np.ones(1)]))
    )
    model = CaffeNet(7, **small)
    before = model.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"n normalises what is not the output .* init.skip=\[n\]"):
        load_weights(model, tmp_path / "a.caffemodel")
    assert torch.equal(model.conv1.weight, before)
    load_weights(model, tmp_path / "a.caffemodel", skip=["n"])
    assert not torch.equal(model.conv1.weight, before)


def test_grey_filters_see_the_grey_values(small, tmp_path):
    source, target = CaffeNet(7, **small), CaffeNet(7, **small)
    state = source.state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1].contiguous()
    torch.save(state, tmp_path / "a.pth")
    assert "conv1.weight sees grey images" in str(load_weights(target, tmp_path / "a.pth"))
    images = torch.randn(2, 3, 67, 67)
    grey = 0.114 * images[:, :1] + 0.587 * images[:, 1:2] + 0.299 * images[:, 2:]
    expected = torch.nn.functional.conv2d(grey, state["conv1.weight"], state["conv1.bias"], stride=4)
    torch.testing.assert_close(target.conv1(images), expected, rtol=1e-4, atol=1e-5)


def test_layers_left_out_and_missing_are_initialized(small, tmp_path, capsys):
    source, target = CaffeNet(7, **small), CaffeNet(7, **small)
    state = {name: t for name, t in source.state_dict().items() if name.startswith("conv")}
    state["conv3.weight"] = torch.zeros(3, 3, 3, 3)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"conv3.weight has shape .* init.skip"):
        load_weights(target, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="there is no layer conv9 to leave out"):
        load_weights(target, tmp_path / "a.pth", skip=["conv9"])
    images = torch.randn(32, 3, 67, 67)
    pretrained(target, images, seed=0, weights=str(tmp_path / "a.pth"), rescale=False, skip=["conv3"], lrn="exact")
    assert "initialized by Algorithm 1: conv3, fc6, fc7\n" in capsys.readouterr().out
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert (target.fc8.bias == 0.1).all()
    first = [name for name, _ in target.named_children()].index("conv3") + 1
    outputs = torch.nn.Sequential(*list(target)[:first])(images)
    torch.testing.assert_close(outputs.std((0, 2, 3)), torch.ones(len(outputs[0])), rtol=1e-2, atol=0)
    assert all(parameter.requires_grad for parameter in target.parameters())
    report = pretrained(
        target, images, seed=0, weights=str(tmp_path / "a.pth"), rescale=True, skip=["conv3"], lrn="exact"
    )
    assert report.layers


def test_auxiliary_classifiers_that_are_missing_are_initialized(tmp_path, capsys):
    tiny = {"input_size": 64, "width": 0.125, "dropout": 0}
    source, target = GoogLeNet(7, **tiny), GoogLeNet(7, **tiny, auxiliary=True)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    images = torch.randn(32, 3, 64, 64)
    pretrained(target, images, seed=0, weights=str(tmp_path / "a.pth"), rescale=False)
    names = [f"{part}.{layer}" for part in ("loss1", "loss2") for layer in ("conv", "fc", "classifier")]
    assert f"initialized by Algorithm 1: {', '.join(names)}\n" in capsys.readouterr().out
    for name, parameter in target.named_parameters():
        assert name.startswith(("loss1", "loss2")) or torch.equal(parameter, source.get_parameter(name))
    for name in ("loss1.conv", "loss2.conv"):
        outputs = []
        layer = target.get_submodule(name)  # a ReLU changes its output in place
        hook = layer.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[2].clone()))
        target.train()(images)
        hook.remove()
        std = outputs[0].std((0, 2, 3), correction=0)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0.01, atol=0)
