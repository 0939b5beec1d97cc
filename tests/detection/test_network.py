"""Fast R-CNN: RoI pooling as Caffe's, its loss, what it detects, and its change rates."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torchvision.ops import roi_pool

import initializers
from detection import FastRCNN, detect, fast_rcnn_loss
from detection.boxes import clip, decode, iou
from experiments.networks import VGG16, CaffeNet, GoogLeNet

ROOT = Path(__file__).parents[2]
CAFFENET = {"padding": {"conv1": 5, "pool1": 1, "pool2": 1}}


def small(**options):
    torch.manual_seed(0)
    return FastRCNN(CaffeNet(20, width=0.125, fc=32, **options), **CAFFENET).eval()


def draw(images=3, rois=7, height=96, width=130):
    generator = torch.Generator().manual_seed(1)
    x = 60 * F.avg_pool2d(torch.randn(images, 3, height + 4, width + 4, generator=generator), 5, 1)
    corner = torch.rand(images, rois, 2, generator=generator) * 60
    return x, torch.cat([corner, corner + 10 + 25 * torch.rand(images, rois, 2, generator=generator)], 2)


def slow_roi_pool(maps, rois, size, scale):
    """BVLC/caffe's fast-rcnn branch, roi_pooling_layer.cpp."""
    pooled = torch.zeros(len(rois), maps.shape[1], size, size)
    for n, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (math.floor(value * scale + 0.5) for value in box)
        height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        for i in range(size):
            for j in range(size):
                cell = ((y1, i, height, maps.shape[2]), (x1, j, width, maps.shape[3]))
                top, left = (min(max(at + k * side // size, 0), limit) for at, k, side, limit in cell)
                bottom, right = (min(max(at - (-(k + 1) * side // size), 0), limit) for at, k, side, limit in cell)
                if bottom > top and right > left:
                    pooled[n, :, i, j] = maps[int(image), :, top:bottom, left:right].amax((1, 2))
    return pooled


def test_roi_pooling_is_caffes():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 12, 17, generator=generator)
    corner = torch.randint(-20, 250, (60, 2), generator=generator)
    boxes = torch.cat([corner, corner + torch.randint(0, 150, (60, 2), generator=generator)], 1).float()
    rois = torch.cat([torch.randint(2, (60, 1), generator=generator).float(), boxes], 1)
    expected = slow_roi_pool(maps, rois, 6, 1 / 16)
    torch.testing.assert_close(roi_pool(maps, rois, 6, 1 / 16), expected)
    assert (expected == 0).any()  # RoIs that leave the map


@pytest.mark.parametrize(
    ("network", "options", "pooled", "parameters"),
    [(CaffeNet, CAFFENET, 6, 57_298_409), (VGG16, {}, 7, 134_690_729)],
)
def test_shapes_and_parameters(network, options, pooled, parameters):
    with torch.device("meta"):
        classifier = network(20)
        model = FastRCNN(classifier, **options)
    assert model.pooled == pooled
    # The classifier's without its last layer of 20 outputs, and 21 + 84 outputs.
    assert sum(p.numel() for p in model.parameters()) == parameters
    expected = sum(p.numel() for p in classifier.parameters()) - 4097 * 20 + 4097 * 105
    assert parameters == expected
    assert "pool5" not in dict(model.named_modules())


def test_googlenet_from_the_fourth_pooling_on():
    options = yaml.safe_load((ROOT / "configs" / "detector" / "googlenet.yaml").read_text())
    torch.manual_seed(0)
    network = GoogLeNet(20, width=0.25, auxiliary=True, dropout=0).eval()
    classifier = copy.deepcopy(network)
    model = FastRCNN(network, **options).eval()
    assert not [name for name, _ in model.named_parameters() if name.startswith(("loss", "pool"))]
    assert model.trunk[-1] == "inception_4e"
    assert model.std_factors["cls_score"] == 2  # 1,024 inputs at full width
    x = torch.randn(2, 3, 208, 208, generator=torch.Generator().manual_seed(1))
    maps = x
    for name in model.trunk:
        maps = model.get_submodule(name)(maps)
    assert maps.shape[2:] == (14, 14)  # 208 / 16, and one more
    # A RoI of 14 cells is pooled as the classifier pools its map, but for the windows that overlap.
    rois = torch.tensor([0.0, 0, 207, 207]).expand(2, 1, 4)
    with torch.no_grad():
        scores, deltas = model(x, rois)
        pooled = nn.functional.max_pool2d(maps, 2)
        top = classifier.inception_5b(classifier.inception_5a(pooled)).mean((2, 3))
        torch.testing.assert_close(scores[:, 0], model.cls_score(top))
    assert (scores.shape, deltas.shape) == ((2, 1, 21), (2, 1, 84))


def test_outputs_of_each_image_and_roi():
    model, (x, rois) = small(), draw()
    scores, deltas = model(x, rois)
    assert scores.shape == (3, 7, 21)
    assert deltas.shape == (3, 7, 84)
    maps = x
    for name in model.trunk:
        maps = model.get_submodule(name)(maps)
    assert maps.shape[2:] == (7, 9)  # 96 x 130 at 1/16, and one more
    one, _ = model(x[1:2], rois[1:2, 4:5])
    torch.testing.assert_close(one[0, 0], scores[1, 4])
    assert tuple(model.conv1.padding) == (5, 5)


def test_a_network_that_cannot_be_a_detector():
    with pytest.raises(ValueError, match="CaffeNet has no layer pool7: it has conv1, "):
        FastRCNN(CaffeNet(20, width=0.125, fc=32), pool="pool7")
    other = nn.Sequential()
    for name, layer in (("conv", nn.Conv2d(3, 4, 3)), ("pool5", nn.MaxPool2d(2)), ("fc", nn.Linear(12, 3))):
        other.add_module(name, layer)
    other.add_module("last", nn.Linear(3, 2))
    other.last_layer = "last"
    with pytest.raises(ValueError, match="takes 12 values, no square map"):
        FastRCNN(other)


def test_the_loss_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores, deltas = torch.randn(2, 6, 4, generator=generator), 2 * torch.randn(2, 6, 16, generator=generator)
    labels = torch.tensor([[1, 2, 0, 0, -1, -1], [3, 3, 0, 1, 2, -1]])
    targets = 2 * torch.randn(2, 6, 4, generator=generator)
    total, count = 0.0, 0
    for i in range(2):
        for j in range(6):
            label = labels[i, j].item()
            if label < 0:
                continue
            count += 1
            total += math.log(scores[i, j].exp().sum()) - scores[i, j, label].item()
            for k in range(4 if label else 0):
                distance = abs(deltas[i, j, 4 * label + k] - targets[i, j, k]).item()
                total += distance**2 / 2 if distance < 1 else distance - 0.5
    assert fast_rcnn_loss((scores, deltas), (labels, targets)).item() == pytest.approx(total / count, rel=1e-5)


def test_the_rates_of_trunk_and_top_become_equal_and_the_function_stays():
    model, inputs = small(lrn=False), draw(images=20)
    initializers.initialize(model, inputs, "kmeans", between=False)
    before = [output.detach() for output in model(*inputs)]
    report = initializers.rescale(model, inputs)
    for output, expected in zip(model(*inputs), before, strict=True):
        assert (output - expected).norm() < 1e-4 * expected.norm()
    assert report.spread_after < 1.2 < 100 < report.spread_before  # two last layers of one scale
    assert len(report.layers) == 9


def test_the_new_layers_and_caffes_initialization():
    model = small()
    initializers.caffe(model)
    assert model.fc6.bias.eq(1).all()
    model.reset_outputs(3)
    for layer, std in ((model.cls_score, 0.01), (model.bbox_pred, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std * (4096 / 32) ** 0.5, rel=0.1)
        assert not layer.bias.any()
    other = copy.deepcopy(model)
    other.reset_outputs(4)
    assert not torch.equal(other.cls_score.weight, model.cls_score.weight)


def slow_detect(model, image, proposals, scale, height, width):
    scores, deltas = (output[0] for output in model(image[None], (proposals.float() * scale)[None]))
    scores, found = scores.softmax(1), []
    for number in range(20):
        own = deltas[:, 4 * number + 4 : 4 * number + 8] * model.target_std[number + 1] + model.target_mean[number + 1]
        boxes = clip(decode(proposals.float(), own), height, width)
        order = scores[:, number + 1].argsort(descending=True)[:10].tolist()
        kept = []
        for i in order:
            if all(iou(boxes[i : i + 1], boxes[j : j + 1]) <= 0.3 for j in kept):
                kept.append(i)
        found += [(scores[i, number + 1].item(), number, *boxes[i].tolist()) for i in kept]
    return sorted(found, reverse=True)


@torch.no_grad()
def test_detections_by_a_loop():
    model = small()
    initializers.initialize(model, draw(images=20), "gaussian")
    model.bbox_pred.weight.mul_(0.1)
    model.target_mean.normal_(0, 0.1)
    model.target_std.uniform_(0.1, 0.3)
    image = draw()[0][0]
    generator = torch.Generator().manual_seed(2)
    corner = torch.randint(0, 4, (40, 2), generator=generator).unique(dim=0) * 32
    proposals = torch.cat([corner, corner + 60], 1).int()  # so far apart that no two pool from the same cells
    found = detect(model, image, proposals, 0.5, 192, 260, limit=10)
    rows = [(s, c, *b) for s, c, b in zip(found[1].tolist(), found[2].tolist(), found[0].tolist(), strict=True)]
    expected = slow_detect(model, image, proposals, 0.5, 192, 260)
    assert len(rows) == len(expected) > 40
    torch.testing.assert_close(torch.tensor(sorted(rows, reverse=True)), torch.tensor(expected), atol=1e-3, rtol=1e-4)
    assert torch.equal(found[1], found[1].sort(descending=True).values)


@torch.no_grad()
def test_rois_of_the_same_cells_are_looked_at_once(monkeypatch):
    model, seen = small(), []
    forward = FastRCNN.forward
    monkeypatch.setattr(FastRCNN, "forward", lambda self, x, rois: seen.append(rois.shape) or forward(self, x, rois))
    proposals = torch.tensor([[0, 0, 42, 42], [1, 1, 44, 44], [0, 0, 80, 42], [0, 0, 42, 42]])
    boxes, scores, classes = detect(model, draw()[0][0], proposals, 1.0, 96, 130)
    assert seen == [(1, 2, 4)]
    assert classes.bincount(minlength=20).min() >= 1
    assert len(boxes) == len(scores) == len(classes)


def test_an_image_without_proposals():
    boxes, scores, classes = detect(small(), draw()[0][0], torch.zeros(0, 4).int(), 1.0, 96, 130)
    assert boxes.shape == (0, 4)
    assert len(scores) == len(classes) == 0
