"""Models that decide by the values of what they are given, or see more than one image: right, or one clear error."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initializers import InitializationError, change_rate, initialize, lsuv, rescale


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    light = torch.linspace(0.3, 2.0, 40).view(-1, 1, 1, 1)
    return torch.randn(40, 3, 8, 8, generator=generator) * light


def build(function, channels=8, **modules):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.next, self.head = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 8, 3), nn.Linear(8, 5)
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, *inputs, **named):
            return function(self, *inputs, **named)

    torch.manual_seed(0)
    return Net()


def plain(model, x):
    """What the layers make of the images."""
    return model.head(F.relu(model.next(F.relu(model.conv(x)))).mean((2, 3)))


@torch.no_grad()
def assert_normalised(model, report, *inputs):
    """Each layer has unit variance and mean .1 over all images, in all of its uses together."""
    seen: dict[str, list[torch.Tensor]] = {row.name: [] for row in report.layers if not row.note}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, x, y, found=found: found.append(y.flatten(2).mT))
        if isinstance(model.get_submodule(name), nn.Conv2d)
        else model.get_submodule(name).register_forward_hook(lambda m, x, y, found=found: found.append(y))
        for name, found in seen.items()
    ]
    model.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    assert seen
    for name, found in seen.items():
        values = torch.cat([part.flatten(0, -2) for part in found]).double()
        torch.testing.assert_close(
            values.std(0, correction=0), torch.ones(values.shape[1]).double(), rtol=0, atol=1e-4, msg=name
        )
        torch.testing.assert_close(values.mean(0), torch.full((values.shape[1],), 0.1).double(), rtol=0, atol=1e-4)


def checked(model, x):
    if not torch.isfinite(x).all() or 99.0 in x:
        raise ValueError("not finite")
    return plain(model, x / 2 if x.max() > 1.5 else x)


def brightest(model, x):  # other for dark images than for bright ones
    return plain(model, x / 2 if x.abs().max() > 3 else x)


def threshold(model, x):
    return plain(model, x / float(x.abs().mean()))


@pytest.mark.parametrize("decide", [checked, brightest, threshold])
def test_what_the_images_decide(images, decide):
    model = build(decide)
    report = initialize(model, images, between=False)
    assert_normalised(model, report, images)


@pytest.mark.parametrize("method", [initialize, rescale])
def test_the_function_stays_where_the_images_decide(images, method):
    model = build(checked)
    before = model(images) if method is rescale else None
    report = method(model, images)
    assert report.spread_after < 1.001
    assert report.output_change < 1e-5
    if before is not None:
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_what_activations_decide_has_no_graph(images):
    model = build(lambda m, x: m.head(m.next(m.conv(x) if m.conv(x).sum() > 0 else -m.conv(x)).mean((2, 3))))
    with pytest.raises(InitializationError, match="what __bool__ gives decides what the model does next"):
        rescale(model, images)


ASKED = {  # what tells nothing of values
    "a module that goes where an activation is": lambda x: nn.AvgPool2d(2).to(x)(x),
    "whether it is signed": lambda x: x if x.is_signed() else -x,
    "whether it is of inference": lambda x: x.clone() if x.is_inference() else x,
    "its dimensions": lambda x: x if x.dense_dim() == 4 else x[None],
}


@pytest.mark.parametrize("ask", ASKED)
def test_what_does_not_depend_on_values_decides_nothing(images, ask):
    model = build(lambda m, x: m.head(F.relu(m.next(F.relu(ASKED[ask](m.conv(x))))).mean((2, 3))))
    report = initialize(model, images)
    assert report.spread_after < 1.001
    assert report.output_change < 1e-5


@pytest.mark.parametrize("nonhomogeneous", ["pin", "scale"])
def test_a_model_that_takes_no_image_by_itself(images, nonhomogeneous):
    """As where all dimensions of size 1 are squeezed."""

    def squeezed(m, x):
        x = F.relu(m.next(F.relu(m.conv(x)))).mean((2, 3), keepdim=True).squeeze()
        return m.head(torch.cat([x], 1))

    report = initialize(build(squeezed), images, nonhomogeneous=nonhomogeneous)
    assert report.spread_after < 1.001
    assert report.output_change < 1e-5


@pytest.mark.parametrize("full", [0, 20, 40])
def test_a_mask_that_may_be_full(full):
    """As transformers do: a mask without padding counts as none; so may the first batches, and not the last."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, words, mask=None):
            if mask is not None and mask.all():
                mask = None
            words = F.relu(self.embed(words))
            if mask is None:
                return self.head(words.mean(1))
            return self.head((words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = Words()
    lengths = torch.cat([torch.full((full,), 7), torch.randint(1, 7, (40 - full,), generator=generator)])
    given = {"words": torch.randn(40, 7, 6, generator=generator), "mask": torch.arange(7) < lengths[:, None]}
    report = initialize(model, given, "gaussian", between=False)
    assert_normalised(model, report, given["words"], given["mask"])
    report = rescale(model, given)
    assert report.spread_after < 1.001
    assert report.output_change < 1e-5


def test_packed_sequences():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Linear(6, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, words, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(F.relu(self.embed(words)), lengths, True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][-1])

    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = Packed()
    given = {
        "words": torch.randn(40, 7, 6, generator=generator),
        "lengths": torch.randint(1, 8, (40,), generator=generator),
    }
    report = initialize(model, given)
    assert report.kept == {"rnn.weight_ih_l0": "used by gru", "rnn.weight_hh_l0": "used by gru"}
    assert report.output_change < 1e-5
    report = initialize(model, given, between=False)
    assert_normalised(model, report, given["words"], given["lengths"])


# Images that see each other.


def similarities(model, x):
    """As CLIP: a value for each pair of images."""
    one, other = F.normalize(plain(model, x), dim=1), F.normalize(plain(model, x.flip(3)), dim=1)
    return one @ other.T


@pytest.mark.parametrize("count", [40, 32, 16, 5])
def test_an_output_for_each_pair_of_images(images, count):
    images = images[40 - count :]
    model = build(similarities)
    report = initialize(model, images, "gaussian")
    assert report.output_change < 1e-5
    assert report.spread_after < 1.5
    assert change_rate(model, images).spread < 2
    assert initialize(model, images, "gaussian", nonhomogeneous="scale").spread_after < 1.01
    lsuv(build(similarities), images)


@pytest.mark.parametrize("change", ["mul_", "setitem", "counter"])
def test_a_buffer_that_one_batch_changes_for_the_next(images, change):
    def forward(model, x):
        y = F.relu(model.conv(x))
        if change == "mul_":
            model.mean.mul_(0.5).add_(0.5 * y.detach().mean((0, 2, 3)))
        elif change == "setitem":
            model.mean[:] = 0.5 * model.mean + 0.5 * y.detach().mean((0, 2, 3))
        else:
            model.mean += 0.1
        return model.head(F.relu(model.next(y * (1 + model.mean.view(-1, 1, 1)))).mean((2, 3)))

    model = build(forward)
    model.register_buffer("mean", torch.zeros(8))
    report = initialize(model, images, between=False)
    assert torch.equal(model.mean, torch.zeros(8))
    assert_normalised(model, report, images)


# Modes within the model.


def test_autocast_within_the_model(images):
    """Its casts of the weights are those of before a change, if nobody clears them."""

    def forward(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = F.relu(model.next(F.relu(model.conv(x)))).mean((2, 3))
        return model.head(y.float())

    model = build(forward)
    report = initialize(model, images)
    assert report.output_change < 1e-4
    assert report.powers_of_two
    assert "the rates are held apart by scales that are powers of two" in str(report)
    assert rescale(model, images, nonhomogeneous="scale").spread_after < 1.5


def test_vmap_is_an_error_that_says_what_to_do(images):
    model = build(lambda m, x: torch.vmap(lambda image: plain(m, image[None])[0])(x))
    for method in (initialize, rescale, lsuv, change_rate):
        with pytest.raises(InitializationError, match=r"inside torch\.vmap or .*: give them the whole batch"):
            method(model, images)
    initialize(build(plain), images)  # the remedy


def causal(size):
    """A mask of attention as people compute it from places, each pair by a function of its own."""

    def after(query, key):
        return query >= key

    places = torch.arange(size)
    return torch.vmap(torch.vmap(after, in_dims=(None, 0)), in_dims=(0, None))(places, places)


def test_vmap_of_constants_is_a_constant(images):
    def forward(model, x, mask):
        x = F.relu(model.next(F.relu(model.conv(x))))
        return model.head((x * mask).mean((2, 3)))

    sides = build(plain).next(build(plain).conv(images[:1])).shape[2:]
    expected = build(lambda m, x: forward(m, x, torch.ones(sides).tril().bool()))
    model = build(lambda m, x: forward(m, x, causal(sides[0])))
    report = initialize(model, images)
    initialize(expected, images)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))
    assert report.spread_after < 1.01


@pytest.mark.parametrize("transform", [lambda x: torch.vmap(torch.sin)(x), lambda x: torch.func.grad(total)(x)])
def test_vmap_of_what_comes_of_images_is_no_constant(images, transform):
    def forward(model, x):
        return model.head(F.relu(model.next(transform(model.conv(x)))).mean((2, 3)))

    with pytest.raises(InitializationError, match=r"cannot follow .*inside torch\.vmap .*; pass between=False"):
        initialize(build(forward), images)
    report = initialize(build(forward), images, between=False)
    assert all(row.std_after == pytest.approx(1, abs=1e-3) for row in report.layers)
    assert initialize(build(forward), images, nonhomogeneous="scale").spread_after < 1.01


def total(x):
    return x.sin().square().sum()


# Gradients that are rounding.


class Queries(nn.Module):
    """As the decoder of DETR: the first attention is among queries whose values are all the same."""

    def __init__(self):
        super().__init__()
        self.embed, self.queries = nn.Linear(12, 16), nn.Parameter(torch.randn(5, 16))
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.cross, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        memory = F.relu(self.embed(x.flatten(1).view(len(x), -1, 12)))
        start = torch.zeros(len(x), 5, 16)
        weights = (self.query(start + self.queries) @ self.key(start + self.queries).mT / 4).softmax(-1)
        y = self.out(weights @ self.value(start)) + self.queries
        weights = (y @ self.cross(memory).mT / 4).softmax(-1)
        return self.head(weights @ memory).mean(1)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("count", [8, 40])
def test_statistics_that_rounding_changes_are_noted(double, count):
    """Behind a large constant float32 keeps little of what varies."""
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drop = nn.Dropout(0.2)  # whose masks are others in each pass
    model = build(lambda m, x: m.head(drop(F.relu(m.next(1e-4 * F.relu(m.conv(x)) + 1)).mean((2, 3)))))
    if double:
        model, images = model.double(), images.double()
    report = initialize(model, images, "gaussian", between=False)
    notes = {row.name: row.note for row in report.layers if "rounding before it changes its mean or std" in row.note}
    assert [*notes] == ([] if double else ["next"])


def shifted(model, x, constant):
    y = model.next(1e-4 * F.relu(model.conv(x)) + constant)
    return model.head(F.relu(y if y.sum() > -1e9 else -y).mean((2, 3)))


@pytest.mark.parametrize("size", [40, 8])
@pytest.mark.parametrize("constant", [1, 0])
def test_statistics_that_rounding_changes_are_noted_without_a_graph(size, constant):
    """Also where the layers see some of the images at a time."""
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = build(lambda m, x: torch.cat([shifted(m, part, constant) for part in x.split(size)]))
    report = initialize(model, images, "gaussian", between=False)
    notes = {row.name: row.note for row in report.layers if "rounding before it changes its mean or std" in row.note}
    assert [*notes][:1] == ["next"] * constant


@pytest.mark.parametrize("nonhomogeneous", ["pin", "scale"])
def test_gradients_that_are_rounding_are_left_out_of_the_balance(images, nonhomogeneous):
    torch.manual_seed(0)
    report = initialize(Queries(), images, "gaussian", nonhomogeneous=nonhomogeneous)
    waiting = {row.name: row.note for row in report.layers if row.rate_after is None}
    assert waiting.keys() == {"query", "key", "value"}  # of which the last has an input of zeros
    for name in ("query", "key"):
        assert "left out of the balance: no gradient but rounding reaches it" in waiting[name]
    assert report.spread_after < (50 if nonhomogeneous == "pin" else 1.05)
    assert report.output_change < 1e-5


def test_a_gradient_that_is_small_is_not_rounding(images):
    model = build(lambda m, x: plain(m, x) + 1e-7 * m.small(x.flatten(1)), small=nn.Linear(192, 5))
    report = initialize(model, images, "gaussian", nonhomogeneous="scale")
    assert report.spread_before > 1e5
    assert report.spread_after < 1.05


# What the report says.


def test_an_embedding_that_a_layer_multiplies_is_named(images):
    model = build(lambda m, x: plain(m, x) + m.head(m.table).mean(0))
    model.table = nn.Parameter(torch.randn(4, 8))
    assert initialize(model, images, "gaussian").kept == {"table": "used by linear"}


def test_the_report_says_that_several_outputs_hold_the_rates(images):
    model = build(lambda m, x: (plain(m, x), m.aux(F.relu(m.conv(x)).mean((2, 3)))), aux=nn.Linear(8, 2))
    report = initialize(model, images, "gaussian")
    assert report.outputs_kept == 2
    assert report.spread_after > 1.1
    assert "the rates are held apart by 2 outputs that keep their scales, nonhomogeneous=" in str(report)
    free = initialize(model, images, "gaussian", outputs="free")
    assert free.outputs_kept == 0


def test_the_report_of_a_scaling_does_not_recommend_itself(images):
    def tied(m, x):
        return m.head(F.relu(m.other(F.gelu(m.next(F.relu(m.conv(x)))))).mean((2, 3)))

    model = build(tied, other=nn.Conv2d(8, 8, 3, padding=1))
    model.other.weight = model.next.weight
    with torch.no_grad():
        model.next.weight.mul_(1000)
    report = rescale(model, images, nonhomogeneous="scale")
    assert report.spread_after > 1.1
    assert "the rates are held apart by layers that cannot be scaled, their notes say why" in str(report)
