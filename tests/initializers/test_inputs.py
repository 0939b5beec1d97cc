"""Inputs and outputs of models in the forms that people have."""

import dataclasses
import itertools
import types
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from initializers import InitializationError, _inputs, change_rate, initialize, lsuv, msra, rescale, xavier


@pytest.fixture
def images():
    return torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained(make, *given, **options):
    """The state that an initialization of a new model gives."""
    torch.manual_seed(0)
    model = make()
    initialize(model, *given, **options)
    return state(model)


# Inputs.


class Words(nn.Module):
    """A text model whose arguments go by name, as those of transformers."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(40, 16), nn.Embedding(10, 16)
        self.first, self.head = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        x = self.first(self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))).relu()
        if attention_mask is not None:
            x = x * attention_mask[:, :, None]
        logits = self.head(x.mean(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def words():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, (32, 10), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 5}


@pytest.mark.parametrize("kind", [dict, UserDict, lambda given: [given], lambda given: [UserDict(given)] * 1])
def test_inputs_by_name(kind):
    given = words()
    torch.manual_seed(0)
    model = Words()
    report = initialize(model, kind(given))
    assert [row.name for row in report.layers] == ["first", "head"]
    assert report.spread_after < 1.05
    assert change_rate(model, kind(given)).spread < 1.5
    assert lsuv(model, kind(given)).images == 32
    assert rescale(model, kind(given)).output_change < 1e-5


def test_named_batches_of_a_loader_are_put_together():
    given = words()
    loader = torch.utils.data.DataLoader(
        [{name: value[i] for name, value in given.items()} for i in range(32)], batch_size=10
    )
    assert same(trained(Words, loader), trained(Words, given))


def test_a_mask_counts():
    given = words()
    half = given | {"attention_mask": (torch.arange(10) < 5).long().expand(32, 10)}
    assert not same(trained(Words, half), trained(Words, given))


def test_columns_of_integers_beside_floats(images):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.head = nn.Embedding(6, 4), nn.Linear(8, 12), nn.Linear(12, 1)

        def forward(self, numbers, *, category):
            return self.head(self.first(torch.cat([numbers, self.embed(category)], 1)).relu()).squeeze(1)

    given = {"numbers": images[:, 0, 0, :4], "category": torch.arange(40) % 6, "target": torch.zeros(40)}
    model = Table()
    report = initialize(model, given, "gaussian")
    assert report.spread_after < 1.05
    with pytest.raises(InitializationError, match="the model rejects images"):
        initialize(Table(), {"numbers": given["numbers"]})


def test_time_steps_are_no_labels(images):
    class Noised(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.time, self.head = nn.Conv2d(3, 8, 3), nn.Embedding(100, 8), nn.Linear(8, 5)

        def forward(self, x, t):
            return self.head((self.look(x) + self.time(t)[:, :, None, None]).relu().mean((2, 3)))

    steps = torch.arange(40) % 100
    expected = trained(Noised, (images, steps))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, steps), batch_size=16)
    for given in (loader, [images, steps], {"x": images, "t": steps}, torch.utils.data.TensorDataset(images, steps)):
        assert same(trained(Noised, given), expected)


def test_a_dictionary_with_the_name_of_the_argument(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, pixels, scale=None):
            return self.head(self.look(pixels).relu().mean((2, 3)))

    expected = trained(Net, images)
    labels = torch.arange(40)
    for given in ({"label": labels, "pixels": images}, {"pixels": images}, {"image": images, "label": labels}):
        assert same(trained(Net, given), expected)


class AnyNames(Words):
    """As a wrapper takes arguments: by whatever names."""

    def forward(self, **given):
        return super().forward(**given)


def test_a_model_that_takes_any_names():
    given = words()
    assert same(trained(AnyNames, given), trained(Words, given))
    assert not same(trained(AnyNames, given | {"attention_mask": given["input_ids"] % 2}), trained(Words, given))


class Distance(nn.Module):
    """Of two images."""

    def __init__(self):
        super().__init__()
        self.look = nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, one, other):
        return (self.look(one) - self.look(other)).square()


def test_inputs_in_a_container_before_the_targets(images):
    other, labels = images.flip(3), torch.arange(40) % 5
    expected = trained(Distance, (images, other))
    batches = [([images[:20], other[:20]], labels[:20]), ([images[20:], other[20:]], labels[20:])]
    data = torch.utils.data.StackDataset(torch.utils.data.TensorDataset(images, other), labels)
    for given in (batches, data, torch.utils.data.DataLoader(data, 16)):
        assert same(trained(Distance, given), expected)
    named = [({"input_ids": words()["input_ids"], "attention_mask": words()["attention_mask"]}, labels[:32])]
    assert same(trained(Words, named), trained(Words, named[0][0]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 5))
    for given in (batches, data):
        with pytest.raises(
            InitializationError, match=r"begins with 2 tensors \(views of an image\?\).* requires 1: yield"
        ):
            initialize(model, given)
    with pytest.raises(InitializationError, match=r"of different shapes .*: pass the images alone"):
        initialize(model, [[images, other], labels])
    initialize(model, [(["a.jpg"] * 40, images)])  # names of files, as some loaders yield them


class Stream(torch.utils.data.IterableDataset):
    """Of images, of images and labels, or of batches of them."""

    def __init__(self, parts):
        self.parts = parts

    def __iter__(self):
        return iter(self.parts)


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5))


def test_a_stream_of_images_or_of_batches(images):
    labels = [*range(40)]
    for parts in ([*images], [*zip(images, labels, strict=True)], images.split(16)):
        assert same(trained(plain, Stream(parts)), trained(plain, images))


def test_single_images_where_batches_are_meant(images):
    for given in (images[0], (image for image in images)):
        with pytest.raises(InitializationError, match=r"rejects .*; if these are single images, torch\.stack"):
            initialize(plain(), given)


@pytest.mark.parametrize(("limit", "most"), [("MOST_BATCHES", 3), ("MOST_BYTES", 4 * 3 * 12 * 12 * 48)])
def test_a_loader_that_may_never_end(images, limit, most, monkeypatch):
    """48 images in batches of 16 are the most here."""
    monkeypatch.setattr(_inputs, limit, most)
    assert same(trained(plain, [*images.split(16)]), trained(plain, images))
    endless = itertools.repeat(images[:16])
    with pytest.raises(InitializationError, match="maybe without end: some hundred images are enough"):
        initialize(plain(), endless)
    assert same(trained(plain, itertools.islice(endless, 2)), trained(plain, torch.cat([images[:16]] * 2)))
    with pytest.raises(InitializationError, match="maybe without end"):
        initialize(plain(), TensorDataset(torch.cat([images] * 2)))


MODELS = {
    "function": (lambda: torch.relu, "a builtin_function_or_method"),
    "class": (lambda: nn.Linear, "the class Linear"),
    "nothing": (lambda: None, "a NoneType"),
    "state": (lambda: nn.Linear(2, 2).state_dict(), "a OrderedDict"),
    "list": (lambda: [nn.Linear(2, 2)], "a list"),
}


@pytest.mark.parametrize("call", [initialize, rescale, change_rate, lsuv, lambda m, _: xavier(m), lambda m, _: msra(m)])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_module(images, kind, call):
    make, named = MODELS[kind]
    with pytest.raises(InitializationError, match=rf"the model is {named}: pass a torch\.nn\.Module"):
        call(make(), images)


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: x.to_sparse(), "torch.sparse_coo: pass dense"),
        (lambda x: x.to(torch.complex64), "torch.complex64.*: pass dense"),
        (lambda x: x.to("meta"), "on the meta device: pass dense"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8.*: pass dense"),
        (lambda x: ({"a": x[:8], "b": x[:4]}), "rejects|rows"),
        (lambda x: [{"x": x}, {"y": x, "input": x}], "different inputs"),
    ],
)
def test_tensors_that_are_no_images(images, given, message):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 3))
    before = state(model)
    if message == "rejects|rows":
        initialize(model, given(images))  # the first of them
        return
    if message == "different inputs":
        model.forward = lambda input=None, x=None: None
    with pytest.raises(InitializationError, match=message):
        initialize(model, given(images))
    assert same(state(model), before)


# Outputs.


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor
    hidden: tuple = ()


def features(model, x):
    return model.head(model.look(x).relu().mean((2, 3)))


FORMS = {
    "a loss beside logits": lambda y: (y.square().mean(), y),
    "a data class": lambda y: Output(y.square().mean(), y, (y * 2,)),
    "a namespace": lambda y: types.SimpleNamespace(sample=y),
    "a mapping": lambda y: UserDict(logits=y, temperature=torch.ones(())),
    "nested": lambda y: {"aux": [{"a": (y,)}], "n": len(y)},
    "a dictionary for each image": lambda y: [{"scores": row, "label": row.argmax()} for row in y],
    "a tensor for each image": lambda y: list(y.unbind()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"nonhomogeneous": "scale"}])
def test_outputs_in_many_forms(images, form, options):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return FORMS[form](features(self, x))

    class Plain(Net):
        def forward(self, x):
            return features(self, x)

    expected = trained(Plain, images, **options)
    found = trained(Net, images, **options)
    for name, tensor in found.items():  # the rates are measured with as many outputs as there are
        torch.testing.assert_close(tensor, expected[name], rtol=0.3, atol=1e-3)
    torch.manual_seed(0)
    assert initialize(Net(), images, **options).spread_after < 1.05


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y: y.mean(), r"returns a Tensor with \(\) for"),
        (lambda y: {"loss": y.mean(), "ids": y.argmax(1)}, r"returns a dict with \(\) for"),
        (lambda y: [{"boxes": y[i : i + 1, : 1 + i % 2]} for i in range(len(y))], "returns a list with"),
        (lambda y: object(), "returns a object with no tensor of floats"),
    ],
)
def test_nothing_with_a_row_per_image(images, form, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return form(features(self, x))

    model = Net()
    before = state(model)
    for call in (initialize, change_rate, lsuv):
        with pytest.raises(InitializationError, match=message + ".*wrap the model in a module"):
            call(model, images)
    assert same(state(model), before)

    class Wrapped(nn.Module):  # the remedy
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return features(self.model, x)

    assert initialize(Wrapped(), images).spread_after < 1.05
