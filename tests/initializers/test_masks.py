"""Models whose own forward pass changes weights, as masked convolutions do: right, or one clear error."""

import copy

import pytest
import torch
from torch import nn

from initializers import InitializationError, initialize, lsuv, rescale


@pytest.fixture
def images():
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Masked(nn.Conv2d):
    """A convolution that sees what lies above and to the left, as that of PixelCNN."""

    def __init__(self, how, *args, **kwargs):
        super().__init__(*args, padding=1, **kwargs)
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 1:] = mask[:, :, 2] = 0
        self.how = how
        self.register_buffer("mask", mask)

    def forward(self, x):
        if self.how == "of its data":
            self.weight.data *= self.mask
        elif self.how == "other data":
            self.weight.data = self.weight.data * self.mask
        else:
            with torch.no_grad():
                self.weight.masked_fill_(self.mask == 0, 0.0)
        return super().forward(x)


def masked(how="of its data", bias=True):
    torch.manual_seed(0)
    layers = [Masked(how, 3, 8, 3), nn.ReLU(), Masked(how, 8, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(400, 5))


def outputs_of(model, images):
    found = []
    hooks = [
        model[i].register_forward_hook(lambda module, given, output: found.append(output.movedim(1, 0).flatten(1)))
        for i in (0, 2, 4, 6)
    ]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("how", ["of its data", "other data", "in place"])
@pytest.mark.parametrize("filters", ["gaussian", "kmeans", "orthonormal", None])
def test_masked_weights(images, how, filters):
    model = masked(how)
    report = initialize(model, images, filters, between=False)
    assert not model[2].weight[model[2].mask == 0].any()  # none that the next pass would change
    for values in outputs_of(model, images):
        torch.testing.assert_close(values.std(1, correction=0), torch.ones(len(values)), atol=1e-3, rtol=0)
        torch.testing.assert_close(values.mean(1), torch.full((len(values),), 0.1), atol=1e-3, rtol=0)
    assert [row.name for row in report.layers] == ["0", "2", "4", "6"]
    before = copy.deepcopy(model)(images)
    report = rescale(model, images)
    assert report.spread_after < report.spread_before
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_without_a_bias_the_mean_is_as_it_comes(images):
    model = masked(bias=False)
    report = initialize(model, images, "kmeans", between=False)
    notes = {row.name: row.note for row in report.layers if row.note}
    assert notes["0"] == "the model's forward pass sets some of its weights to 0"
    assert notes["2"] == notes["0"] + " and its mean is as it comes"
    values = outputs_of(model, images)[1]
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(8), atol=1e-3, rtol=0)


def test_lsuv_of_masked_weights(images):
    model = masked()
    lsuv(model, images)
    assert all(abs(values.var().item() - 1) < 0.03 for values in outputs_of(model, images))


def limited(largest):
    class Limited(nn.Conv2d):
        """As EEGNet's: its filters have a norm of at most `largest`."""

        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, self.largest)
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Limited(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 5))
    model[0].largest = largest
    return model


class Positive(nn.Conv2d):
    def forward(self, x):
        self.weight.data.clamp_(min=0)
        return super().forward(x)


@pytest.mark.parametrize("call", [initialize, lsuv])
@pytest.mark.parametrize("make", [lambda: limited(0.05), lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Positive(4, 5, 3))])
def test_other_changes_are_an_error(images, call, make):
    model = make()
    model(images)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InitializationError, match=r"layer [01]: the forward pass .* changes its weights"):
        call(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_remedy_holds(images):
    model = limited(0.05)
    model[0].largest = 1e9
    initialize(model, images)
