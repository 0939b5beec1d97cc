"""Steps wait for no device, have shapes that do not depend on the values, and are the same when they are recorded."""

import contextlib
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from detection import FastRCNN, fast_rcnn_loss
from experiments.engine import step as steps
from experiments.engine.losses import LOSSES, classification_loss, hinge_loss, multilabel_loss
from experiments.engine.optim import make_optimizer, set_lr
from experiments.engine.step import WARM, RecordedStep, Step, make_step
from experiments.networks import CaffeNet, FitNet4, GoogLeNet, ResNet

SGD = {"name": "sgd", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.01, "bias_lr_mult": 2, "bias_decay_mult": 0}
ADAM = {"name": "adam", "betas": [0.9, 0.999]}
RMSPROP = {"name": "rmsprop", "rms_decay": 0.9}
# Operations whose result has a size that depends on values, or that bring a value to the CPU.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "is_nonzero", "equal")


class Watch(TorchDispatchMode):
    """Notes every operation with the shapes of its results; one that waits for the device is an error."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        boolean = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name.startswith(WAITING) or boolean:
            raise AssertionError(f"{function} waits for the device")
        found = function(*args, **kwargs or {})
        parts = found if isinstance(found, tuple | list) else [found]
        self.seen.append((name, [tuple(part.shape) for part in parts if isinstance(part, torch.Tensor)]))
        return found


def images(seed, count=4, size=64, labels=20):
    generator = torch.Generator().manual_seed(seed)
    return 50 * torch.randn(count, 3, size, size, generator=generator), torch.randint(
        labels, (count,), generator=generator
    )


def multilabel(seed, size=67):
    inputs, labels = images(seed, size=size)
    return inputs, torch.where(torch.rand(4, 20) < 0.3, 1, -1).scatter_(1, labels[:, None], 0)


def regions(seed):
    inputs, labels = images(seed, 2, 128, 21)
    generator = torch.Generator().manual_seed(seed)
    corners = 60 * torch.rand(2, 8, 2, generator=generator)
    boxes = torch.cat([corners, corners + 20 + 40 * torch.rand(2, 8, 2, generator=generator)], 2)
    labels = torch.randint(-1, 21, (2, 8), generator=generator)
    return (inputs, boxes), (labels, torch.randn(2, 8, 4, generator=generator))


KINDS = {
    "classification": (lambda: CaffeNet(20, input_size=67, width=0.25, fc=32), multilabel_loss, multilabel),
    "ImageNet": (lambda: GoogLeNet(20, input_size=64, width=0.25, auxiliary=True), classification_loss, images),
    "BatchNorm": (lambda: ResNet(20, depth=8), hinge_loss, partial(images, size=32)),
    "maxout": (lambda: FitNet4(20, width=0.25, activation="maxout"), LOSSES["softmax"], partial(images, size=32)),
    "detection": (
        lambda: FastRCNN(CaffeNet(20, input_size=131, width=0.25, fc=32)), fast_rcnn_loss, regions
    ),
}  # fmt: skip


def make(kind, optimizer=SGD, device="cpu", **options):
    """A step of a network, with batches as they come."""
    network, loss, batch = KINDS[kind]
    torch.manual_seed(0)
    model = network().to(device).train()
    solver = make_optimizer(model, OmegaConf.create(SGD | optimizer))
    return Step(model, loss, solver, **{"clip_norm": 1.0, "precision": "float32"} | options), batch


@pytest.mark.parametrize("optimizer", [SGD, ADAM, RMSPROP], ids=["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_no_device_and_its_shapes_are_static(kind, optimizer):
    step, batch = make(kind, optimizer)
    seen = []
    for seed in range(3):
        batches = [batch(seed)]
        step([batch(9)]) if seed == 0 else None  # the first makes the optimizer's state
        with Watch() as watch:
            step(batches)
        seen.append(watch.seen)
    assert len(seen[0]) > 50
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("wrong", [lambda y: y.sum().item() * y, lambda y: y[y > 0], lambda y: y[y.sum(1) > 0]])
def test_what_waits_is_noticed(wrong):
    with pytest.raises(AssertionError, match="waits for the device"), Watch():
        wrong(torch.randn(4, 5))


@pytest.fixture
def replayed(monkeypatch):
    """Recordings as if this were a GPU: what was recorded is done when it is replayed; how many there are of both."""
    counts = {"recorded": 0, "replayed": 0}

    def record(work):
        counts["recorded"] += 1

        def replay():
            counts["replayed"] += 1
            work()

        return replay

    monkeypatch.setattr(steps, "record", record)
    monkeypatch.setattr(steps, "beside", contextlib.nullcontext)
    return counts


def states(step):
    return [value.clone() for value in (*step.network.state_dict().values(), step.total)]


def run(take, step, batch, rates, parts=1, device="cpu"):
    for number, rate in enumerate(rates):
        set_lr(step.optimizer, rate)
        take([to(batch(parts * number + part), device) for part in range(parts)])
    return states(step)


def to(batch, device):
    return batch.to(device) if isinstance(batch, torch.Tensor) else tuple(to(part, device) for part in batch)


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_that_are_alike_are_replayed_with_the_same_result(replayed, parts):
    rates = [0.01] * 10 + [0.005] * 6 + [0.002, 0.001] + [0.0005] * 2
    step, batch = make("classification")
    expected = run(step, step, batch, rates, parts)
    step, batch = make("classification")
    found = run(RecordedStep(step), step, batch, rates, parts)
    assert all(map(torch.equal, found, expected))
    assert replayed["recorded"] == 3  # for .01, .005 and .0005
    assert replayed["replayed"] == 10 - WARM + 5 + 1


def test_batches_of_another_shape_are_not_put_into_a_recording(replayed):
    def batch(number):
        return multilabel(number, size=67 if number % 6 else 66)

    rates = [0.01] * 14
    step, _ = make("classification")
    expected = run(step, step, batch, rates)
    step, _ = make("classification")
    assert all(map(torch.equal, run(RecordedStep(step), step, batch, rates), expected))
    assert replayed == {"recorded": 1, "replayed": 14 - WARM - 2}


def test_a_recording_that_fails_is_said_and_nothing_is_lost(replayed, monkeypatch, capsys):
    def fail(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(steps, "record", fail)
    rates = [0.01] * 8
    step, batch = make("classification")
    expected = run(step, step, batch, rates)
    step, batch = make("classification")
    assert all(map(torch.equal, run(RecordedStep(step), step, batch, rates), expected))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "train.graph=true: steps are taken one operation at a time, as it cannot be recorded: operation not permitted "
        "when stream is capturing"
    )


def test_that_no_step_is_like_another_is_said_once(replayed, monkeypatch, capsys):
    monkeypatch.setattr(steps, "UNLIKE", 5)
    step, batch = make("BatchNorm")
    run(RecordedStep(step), step, batch, [0.01 / (1 + number) for number in range(12)])
    assert capsys.readouterr().err.count("of the last 5 none had the shapes and the learning rate") == 1
    assert not replayed["recorded"]


def test_without_a_gpu_the_reason_is_said(capsys):
    step, _ = make("BatchNorm")
    assert make_step(step, graph=False) is step
    assert not capsys.readouterr().err
    assert make_step(step, graph=True) is step
    assert "as they run on cpu, and graphs are of a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [SGD, ADAM, RMSPROP], ids=["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_replays_what_it_would_do(kind, optimizer):
    torch.backends.cudnn.deterministic = True
    rates = [0.001] * 60 + [0.0005] * 40
    step, batch = make(kind, optimizer, "cuda")
    expected = run(step, step, batch, rates, device="cuda")
    step, batch = make(kind, optimizer, "cuda")
    take = make_step(step, graph=True)
    found = run(take, step, batch, rates, device="cuda")
    assert take.replay is not None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_takes_a_small_step_without_waiting(tmp_path):
    step, batch = make("classification", device="cuda")
    batches = [to(batch(0), "cuda")]
    step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
