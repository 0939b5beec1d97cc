import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initializers import LayerReport, Report, change_rate, initialize, rescale


@pytest.fixture
def images():
    return 50 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 80), nn.ReLU(), nn.Linear(80, 5))


def test_rates_and_scales_are_those_of_the_model(model, images, monkeypatch):
    monkeypatch.setattr("initializers._between.RATE_DRAWS", 1)  # as many as change_rate draws
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
    assert (report.images, report.rate_images) == (64, 16)
    assert report.seconds > sum(row.seconds for row in report.layers) > 0
    assert [(row.name, row.shape, row.filters, row.note) for row in report.layers] == [
        ("1", (20, 192), "pca", ""),
        ("3", (80, 20), "gaussian", "Gaussian filters, as there are 64 samples for 80 outputs"),
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
    assert f"{report.spread_before:.4g} -> {report.spread_after:.4g} in 1 round on 16 images;" in lines[6]
    assert lines[7:] == ["3: Gaussian filters, as there are 64 samples for 80 outputs"]


def test_steps_that_were_left_out_leave_gaps(model, images):
    report = initialize(model, images, "orthonormal", within=False, between=False)
    assert (report.spread_before, report.spread_after, report.output_change) == (None, None, None)
    assert str(report).splitlines()[0].split() == ["layer", "shape", "filters", "mean", "std", "seconds"]
    assert "rates" not in str(report)
    assert "kept" in str(initialize(model, images, None, between=False))


class Particular(nn.Module):
    """What is treated in ways of its own: a weight used twice, computed weights and biases, a recurrent network."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 1)
        self.up = nn.ConvTranspose2d(6, 6, 2)
        self.twice = nn.Linear(6, 6)
        self.computed = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.shift = nn.Parameter(torch.zeros(6))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.unused = nn.Linear(6, 4)
        self.recurrent = nn.GRU(6, 6, batch_first=True)
        self.top = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.up(F.relu(self.embed(x)))).flatten(2).mT[:, :6]
        x = F.relu(self.twice(F.relu(self.twice(x))))
        x = F.linear(x, self.matrix, self.shift.tanh())
        x, _ = self.recurrent(self.computed(x))
        return self.top(x[:, -1])


@pytest.mark.parametrize("between", [False, True])
def test_what_was_treated_in_another_way(between, images):
    torch.manual_seed(0)
    report = initialize(Particular(), images, "kmeans", between=between)
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["embed", "up", "twice", "matrix", "top"]
    assert {name: row.note for name, row in rows.items() if row.note} == {
        "up": "Gaussian filters, as a transposed convolution sees no patches",
        "twice": "used 2 times, normalised where it is used first",
        "matrix": "its bias is computed or frozen, so that the mean is as it comes",
    }
    assert [row.filters for row in rows.values()] == ["kmeans"] + ["gaussian"] * 4
    assert rows["twice"].mean_after == pytest.approx(0.1, abs=1e-4)
    assert abs(rows["matrix"].mean_after - 0.1) > 0.01
    for row in rows.values():
        assert row.std_after == pytest.approx(1, abs=1e-4)
    weights = ["weight_ih_l0", "weight_hh_l0"]
    kept = {"computed.parametrizations.weight.original": "used by mv", "unused.weight": "not used"}
    assert report.kept == kept | {f"recurrent.{name}": "used by gru" for name in weights}
    lines = str(report).splitlines()
    assert lines[-4:] == [
        *(f"{name}: {row.note}" for name, row in rows.items() if row.note),
        f"not initialized: {', '.join(f'{name} ({reason})' for name, reason in report.kept.items())}",
    ]


def test_kept_parameters_with_auxiliary_scalings(model, images):
    """Their parameters have other names then, and are as before."""
    model.table = nn.Parameter(torch.zeros(3, 3))
    for _ in range(2):
        report = initialize(model, images, nonhomogeneous="scale")
        assert report.kept == {"table": "not used"}
        assert [row.name for row in report.layers] == ["1", "3", "5"]
        assert report.spread_after == pytest.approx(1, rel=1e-3)
        assert report.output_change < 1e-5


@pytest.mark.parametrize(
    ("lrn", "line"),
    [
        ("estimate", "local response normalisation is left as it is, so that the function of the network changes"),
        ("exact", "the constant of local response normalisation is scaled, so that the function stays"),
    ],
)
def test_local_response_normalisation(lrn, line, images):
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.LocalResponseNorm(5, alpha=0.5), nn.Conv2d(6, 4, 3), nn.Flatten()
    model = nn.Sequential(*parts, nn.Linear(64, 5))
    report = initialize(model, images, lrn=lrn)
    assert report.lrn == lrn
    assert line in str(report).splitlines()
    assert (model[2].alpha == 0.5) == (lrn == "estimate")
    assert report.unsaved == ([] if lrn == "estimate" else ["2.alpha"])
    assert (report.output_change < 1e-5) == (lrn == "exact")
    without = initialize(nn.Sequential(*parts[:2], *parts[3:], model[5]), images, lrn=lrn)
    assert without.lrn is None
    assert "local response" not in str(without)
    apart = initialize(model, images, lrn=lrn, between=False)
    assert apart.lrn is None
    assert "local response" not in str(apart)


def test_the_lines_after_the_table():
    row = LayerReport("1", (2, 3), "pca", rate_before=8.0, rate_after=1.0, scale=0.25)
    row.add_note("")
    assert row.note == ""
    row.add_note("one thing")
    row.add_note("another")
    report = Report([row, LayerReport("2", (4, 2), rate_before=2.0, rate_after=3.0, scale=4.0)], images=20)
    report.rate_images, report.rounds, report.output_change, report.seconds = 12, 3, 0.00123, 2.345
    assert str(report).splitlines()[4:] == [
        "20 images, 2.3 s",
        "spread of change rates 4 -> 3 in 3 rounds on 12 images; relative change of the output 1.2e-03",
        'the rates are held apart by shortcuts, nonhomogeneous="scale" makes them equal whatever holds them',
        "1: one thing; another",
    ]
    report.powers_of_two, report.lrn, report.kept = True, "exact", {"table": "not used", "rnn.weight": ""}
    report.unsaved, report.inactive_dropout = ["a.eps", "b.eps", "c.eps", "d.eps"], ["attention"]
    assert str(report).splitlines()[7:] == [
        "scales rounded to powers of two, as the network amplifies rounding: deep ones may, in another pass, "
        "have other statistics than those that were set",
        "the constant of local response normalisation is scaled, so that the function stays",
        "constants were scaled that the state dict does not hold, keep the module: a.eps, b.eps, c.eps and 1 more",
        "1: one thing; another",
        "not initialized: table (not used), rnn.weight",
        "inactive here, though random in training: attention; dropout modules are active",
    ]


def test_it_can_be_written_as_json(model, images):
    model.table = nn.Parameter(torch.zeros(3, 3))
    report = initialize(model, images, "pca")
    plain = json.loads(json.dumps(report.to_dict()))
    assert (plain["kept"], plain["lrn"], plain["powers_of_two"]) == ({"table": "not used"}, None, False)
    assert plain["spread_before"] == report.spread_before > plain["spread_after"]
    assert [row["shape"] for row in plain["layers"]] == [list(row.shape) for row in report.layers]
    assert [row["note"] for row in plain["layers"]] == [row.note for row in report.layers]
