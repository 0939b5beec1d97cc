"""The networks are those of their Caffe definitions: parameters, names and sizes of every layer."""

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from experiments.networks import VGG16, CaffeNet, GoogLeNet
from experiments.networks.network import Network
from initializers import initialize

SIZES = {
    CaffeNet: {
        **{"conv1": (96, 55, 55), "pool1": (96, 27, 27), "conv2": (256, 27, 27), "pool2": (256, 13, 13)},
        **{"conv3": (384, 13, 13), "conv4": (384, 13, 13), "conv5": (256, 13, 13), "pool5": (256, 6, 6)},
        **{"fc6": (4096,), "fc7": (4096,), "fc8": (1000,)},
    },
    VGG16: {
        **{"conv1_1": (64, 224, 224), "conv1_2": (64, 224, 224), "pool1": (64, 112, 112)},
        **{"conv2_1": (128, 112, 112), "conv2_2": (128, 112, 112), "pool2": (128, 56, 56)},
        **{f"conv3_{number}": (256, 56, 56) for number in (1, 2, 3)},
        **{f"conv4_{number}": (512, 28, 28) for number in (1, 2, 3)},
        **{f"conv5_{number}": (512, 14, 14) for number in (1, 2, 3)},
        **{"pool5": (512, 7, 7), "fc6": (4096,), "fc7": (4096,), "fc8": (1000,)},
    },
    GoogLeNet: {
        **{"conv1.7x7_s2": (64, 112, 112), "conv2.3x3_reduce": (64, 56, 56), "conv2.3x3": (192, 56, 56)},
        **{"inception_3a": (256, 28, 28), "inception_3b": (480, 28, 28), "inception_4a": (512, 14, 14)},
        **{"inception_4b": (512, 14, 14), "inception_4c": (512, 14, 14), "inception_4d": (528, 14, 14)},
        **{"inception_4e": (832, 14, 14), "inception_5a": (832, 7, 7), "inception_5b": (1024, 7, 7)},
        **{"inception_3a.5x5_reduce": (16, 28, 28), "inception_5b.pool_proj": (128, 7, 7)},
        **{"loss3.classifier": (1000,)},
    },
}
PARAMETERS = {CaffeNet: 60_965_224, VGG16: 138_357_544, GoogLeNet: 6_998_552}


@pytest.mark.parametrize("network", SIZES)
def test_the_sizes_are_caffes(network):
    with torch.device("meta"):
        model = network(1000).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[network]
    found = {}
    for name in SIZES[network]:
        hook = lambda _, __, y, name=name: found.update({name: tuple(y.shape[1:])})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    output = model(torch.empty(2, 3, model.input_size, model.input_size, device="meta"))
    assert output.shape == (2, 1000)
    assert found == SIZES[network]
    assert model.get_submodule(model.last_layer).out_features == 1000


@pytest.mark.parametrize("input_size", [33, 64, 75])
def test_vgg_of_other_sizes(input_size):
    model = VGG16(7, input_size=input_size, width=0.125, fc=20)
    assert model(torch.randn(2, 3, input_size, input_size)).shape == (2, 7)
    affine = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(affine) == 16
    assert [layer.weight.shape[0] for layer in affine[:4]] == [8, 8, 16, 16]


def test_variants_of_caffenet():
    with torch.device("meta"):
        plain, ungrouped, normalised = CaffeNet(), CaffeNet(groups=False), CaffeNet(batch_norm=True, lrn=False)
    assert ungrouped.conv2.weight.shape[1] == 2 * plain.conv2.weight.shape[1] == 96
    norms = nn.BatchNorm1d | nn.BatchNorm2d
    names = [name for name, module in normalised.named_children() if isinstance(module, norms)]
    assert names == ["bn1", "bn2", "bn3", "bn4", "bn5", "bn6", "bn7"]
    assert not any(isinstance(module, nn.LocalResponseNorm) for module in normalised)


@pytest.mark.parametrize("filters", ["gaussian", "kmeans"])
def test_vgg_is_balanced_exactly(filters):
    torch.manual_seed(0)
    images = 40 * nn.functional.avg_pool2d(torch.randn(24, 3, 68, 68), 5, stride=1)
    model = VGG16(10, input_size=64, width=0.125, fc=64)
    report = initialize(model, images, filters)
    assert report.spread_after < 1.01 < 100 < report.spread_before
    assert report.output_change < 1e-4


ROOT = Path(__file__).resolve().parents[2]
NETWORKS = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
SMALL = ("fitnet4", "mnist_fitnet", "resnet", "resnet18", "convnext_atto", "vit_tiny", "mobilenetv2")
FEW = ["init=gaussian", "init.images=20", "train.iterations=1"]
COMMANDS = {
    "voc_cls.py": ["preset=demo", *FEW, "rates.images=10", "evaluate.crops=1"],
    "voc_det.py": ["preset=demo", *FEW, "batch.per_batch=16"],
    "imagenet.py": ["preset=demo", *FEW],
    "pretrain.py": ["preset=demo", *FEW, "evaluate.pairs=20"],
    "change_rate.py": ["data=demo", "model.width=0.125", "model.input_size=64", "init.images=20", "rates.images=10"],
    "neighbors.py": ["data=demo", "model.width=0.125", "model.input_size=64", "init.images=20", "queries=2"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_keeps_the_contract(name):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"), torch.device("meta"):
        model = instantiate(compose("voc_cls", [f"model={name}"]).model)
    assert isinstance(model, Network)
    assert model.last_layer in model.classifiers
    assert {*model.classifiers} <= {*model.std_factors}
    assert all(isinstance(model.get_submodule(head), nn.Linear) for head in model.classifiers)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*NETWORKS} - {"caffenet"}))  # with which all other tests run them
@pytest.mark.parametrize("script", COMMANDS)
def test_every_network_works_in_every_command(name, script, demo, finish, tmp_path):
    if script == "voc_det.py" and name in SMALL:
        pytest.skip("no detector is made of it")
    data = [f"data.root={demo / 'set'}", f"data.cache={demo / 'cache'}"] if script != "imagenet.py" else []
    if script == "imagenet.py":
        data = [f"data.root={demo / 'folders'}"]
    command = [sys.executable, ROOT / "experiments" / script, *COMMANDS[script], *data, f"model={name}", "threads=1"]
    done = finish([*command, f"output={tmp_path}"])
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).exists()
