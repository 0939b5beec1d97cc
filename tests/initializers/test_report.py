import json

import pytest
import torch
from torch import nn

from initializers import change_rate, initialize, rescale


@pytest.fixture
def images():
    return 50 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 80), nn.ReLU(), nn.Linear(80, 5))


def test_rates_and_scales_are_those_of_the_model(model, images):
    images = images[:12]
    before, rates = [model[i].weight.clone() for i in (1, 3, 5)], change_rate(model, images, seed=5)
    report = rescale(model, images, seed=5)
    after, rates_after = [model[i].weight.clone() for i in (1, 3, 5)], change_rate(model, images, seed=5)
    for row, w0, w1 in zip(report.layers, before, after, strict=True):
        assert row.filters is None
        assert row.rate_before == pytest.approx(rates.mean[row.name], rel=1e-5)
        assert row.rate_after == pytest.approx(rates_after.mean[row.name], rel=1e-4)
        torch.testing.assert_close(row.scale * w0, w1)
    assert report.spread_before == pytest.approx(rates.spread, rel=1e-5)
    assert report.spread_after == pytest.approx(rates_after.spread, rel=1e-4)
    assert (report.images, report.rate_images, report.rounds) == (12, 12, 1)


def test_a_row_a_layer_and_every_fallback(model, images):
    report = initialize(model, images, "pca", bias=0.2)
    assert (report.images, report.rate_images) == (64, 12)
    assert report.seconds > sum(row.seconds for row in report.layers) > 0
    assert [(row.name, row.shape, row.filters, row.note) for row in report.layers] == [
        ("1", (20, 192), "pca", ""),
        ("3", (80, 20), "gaussian", "64 samples for 80 outputs"),
        ("5", (5, 80), "pca", ""),
    ]
    for row in report.layers:
        assert (row.mean_after, row.std_after) == pytest.approx((0.2, 1), abs=1e-4)
    first, second, _ = report.layers
    assert first.std_before == pytest.approx(1, rel=1e-3)  # pca gives white outputs
    assert second.std_before < 0.1  # the fallback N(0, 0.01²) on 20 inputs near 1

    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer",
        "shape",
        "filters",
        "mean",
        "std",
        "mean'",
        "std'",
        "rate",
        "rate'",
        "scale",
        "seconds",
    ]
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["1", "20x192", "pca"],
        ["3", "80x20", "gaussian"],
        ["5", "5x80", "pca"],
    ]
    for value in (second.mean_before, second.std_after):
        assert f"{value:.3g}" in lines[3].split()
    for value in (second.rate_before, second.rate_after, second.scale):
        assert f"{value:.4g}" in lines[3].split()
    assert f"{report.spread_before:.4g} -> {report.spread_after:.4g} in 1 round on 12 images;" in lines[6]
    assert lines[7:] == ["3: gaussian filters (64 samples for 80 outputs)"]


def test_steps_that_were_left_out_leave_gaps(model, images):
    report = initialize(model, images, "orthonormal", within=False, between=False)
    assert (report.spread_before, report.spread_after, report.output_change) == (None, None, None)
    assert str(report).splitlines()[0].split() == ["layer", "shape", "filters", "mean", "std", "seconds"]
    assert "rates" not in str(report)
    assert "kept" in str(initialize(model, images, None, between=False))


def test_it_can_be_written_as_json(model, images):
    report = initialize(model, images, "pca")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["spread_before"] == report.spread_before > plain["spread_after"]
    assert [row["shape"] for row in plain["layers"]] == [list(row.shape) for row in report.layers]
    assert [row["note"] for row in plain["layers"]] == [row.note for row in report.layers]
