import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from experiments.data.images import Crops, ImageCache, crop, random_crops
from experiments.engine import run
from experiments.engine.optim import lr_policy, make_optimizer, set_lr
from experiments.engine.trainer import CropBatches, predict, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MEAN = (1.0, 2.0, 3.0)


def flat(count):
    """Images of one grey value each, 10 times their number, of different sizes."""
    return ImageCache.of([torch.full((20 + n, 30 - n, 3), 10 * n, dtype=torch.uint8) for n in range(count)])


def noise(count):
    generator = torch.Generator().manual_seed(0)
    return ImageCache.of(
        [torch.randint(256, (20 + n, 30 - n, 3), generator=generator, dtype=torch.uint8) for n in range(count)]
    )


# Batches.


def batches_of(cache, targets=None, **changes):
    targets = torch.arange(len(cache)) if targets is None else targets
    return CropBatches(cache, targets, **{"batch_size": 3, "seed": 0, "mean": MEAN, "size": 8} | changes)


def test_an_epoch_shows_each_image_once_with_its_target():
    batches = batches_of(flat(9))
    orders = []
    for epoch in range(2):
        inputs, targets = (
            torch.cat(parts) for parts in zip(*map(batches, range(3 * epoch, 3 * epoch + 3)), strict=True)
        )
        assert inputs.shape == (9, 3, 8, 8)
        assert sorted(targets.tolist()) == list(range(9))
        for channel, mean in enumerate(MEAN):
            expected = (10.0 * targets - mean)[:, None, None].expand(9, 8, 8)
            torch.testing.assert_close(inputs[:, channel], expected, atol=1e-3, rtol=0)
        orders.append(targets.tolist())
    assert orders[0] != orders[1]


def test_what_does_not_fill_a_batch_sits_out_the_epoch():
    batches = batches_of(flat(8), batch_size=5)
    shown = [set(batches(epoch)[1].tolist()) for epoch in range(30)]
    assert all(len(images) == 5 for images in shown)
    assert set.union(*shown) == set(range(8))


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    one, other = batches_of(noise(9)), batches_of(noise(9))
    in_order = [one(step) for step in range(7)]
    for step in (6, 0, 4, 3, 1, 5, 2):
        for a, b in zip(in_order[step], other(step), strict=True):
            assert torch.equal(a, b)
    reseeded = batches_of(noise(9), seed=1)
    assert all(not torch.equal(in_order[step][0], reseeded(step)[0]) for step in range(7))


def test_batches_that_are_cut_together_are_those_that_are_cut_alone():
    alone, together = batches_of(noise(17)), batches_of(noise(17))
    together.at_once = 2  # of five batches an epoch, so that its last block is not full
    for step in (*range(11), 3, 12, 4):
        for a, b in zip(alone(step), together(step), strict=True):
            assert torch.equal(a, b)


def test_crops_are_drawn_anew_every_epoch():
    batches = batches_of(noise(3))
    seen = [inputs[targets.argsort()] for inputs, targets in map(batches, range(20))]
    assert len({inputs.numpy().tobytes() for inputs in seen}) == 20


def test_batches_pass_on_the_options_of_the_crop():
    whole = batches_of(noise(3), mirror=False, min_scale=100, max_scale=100, size=20)  # the largest square
    inputs, targets = whole(0)
    assert not torch.equal(inputs, batches_of(noise(3), size=20)(0)[0])
    cache = noise(3)
    x = cache.widths[0].item() - 20
    assert x > 0
    alternatives = Crops(
        torch.zeros(x + 1), torch.arange(x + 1.0), *torch.full((2, x + 1), 20.0), torch.zeros(x + 1) > 0
    )
    shifted = crop(cache, torch.zeros(x + 1, dtype=torch.long), alternatives, 20, MEAN)
    image = inputs[targets == 0]
    assert (shifted.amin(0) - 1e-3 <= image).all()
    assert (image <= shifted.amax(0) + 1e-3).all()


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match=r"2 images do not fill a batch of 3: lower train\.batch_size"):
        batches_of(flat(2))


# Training.

ITERATIONS = 23


def problem(device="cpu"):
    """A model with everything that has a state (dropout, BatchNorm), its optimizer and its batches."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 2)
    ).to(device)
    cache = noise(9).to(device)
    targets = torch.arange(18.0).view(9, 2) / 18
    sgd = {"name": "sgd", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.01, "bias_lr_mult": 2, "bias_decay_mult": 1}
    return model, make_optimizer(model, OmegaConf.create(sgd)), batches_of(cache, targets)


LR_AT = lr_policy(0.001, {"lr_gamma": 0.5, "lr_every": 6})


def fit(folder, model, optimizer, batches, loss=nn.functional.mse_loss, **changes):
    folder.mkdir(exist_ok=True)
    settings = {"iterations": ITERATIONS, "lr_at": LR_AT, "clip_norm": 1.0, "log_every": 5, "checkpoint_seconds": 0}
    return train(model, loss, batches, optimizer, folder=folder, **settings | changes)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("device", DEVICES)
def test_training_is_the_bare_loop(tmp_path, device):
    model, optimizer, batches = problem(device)
    fit(tmp_path, model, optimizer, batches)

    bare, optimizer, batches = problem(device)
    bare.to(memory_format=torch.channels_last if device == "cpu" else torch.contiguous_format)
    losses = []
    for step in range(ITERATIONS):
        set_lr(optimizer, LR_AT(step))
        inputs, targets = batches(step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(bare(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert same(model.state_dict(), bare.state_dict())

    curve = pd.read_csv(tmp_path / "curve.csv")
    assert curve["step"].tolist() == [5, 10, 15, 20, 23]
    parts = np.split(np.array(losses), [5, 10, 15, 20])
    assert curve["loss"].tolist() == pytest.approx([part.mean() for part in parts], rel=1e-4)
    assert curve["lr"].tolist() == pytest.approx([LR_AT(step - 1) for step in curve["step"]], rel=1e-5)
    assert curve["seconds"].is_monotonic_increasing
    assert run.load_checkpoint(tmp_path)["step"] == ITERATIONS


class Stop(BaseException):
    """Nobody catches it: the process ends there."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stops", [[0], [4], [5], [17], [22], [3, 13, 14], [6, 12, 18]])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, device, stops):
    whole, *rest = problem(device)
    fit(tmp_path / "whole", whole, *rest)

    for stop in stops:
        model, optimizer, batches = problem(device)

        def stopping(step, stop=stop, batches=batches):
            if step == stop:
                raise Stop
            return batches(step)

        with pytest.raises(Stop):
            fit(tmp_path / "parts", model, optimizer, stopping)
        torch.rand(7)  # a new process would not find the random state of the old one
    model, *rest = problem(device)
    nn.init.zeros_(model[0].weight)  # the weights come from the checkpoint
    fit(tmp_path / "parts", model, *rest)

    assert same(model.state_dict(), whole.state_dict())
    curves = [pd.read_csv(tmp_path / name / "curve.csv").drop(columns="seconds") for name in ("whole", "parts")]
    pd.testing.assert_frame_equal(*curves)


def test_a_finished_training_is_not_trained_again(tmp_path):
    model, *rest = problem()
    seconds = fit(tmp_path, model, *rest)
    again, optimizer, _ = problem()
    assert fit(tmp_path, again, optimizer, None) == pytest.approx(seconds, abs=0.5)
    assert same(model.state_dict(), again.state_dict())
    assert len(pd.read_csv(tmp_path / "curve.csv")) == 5


def test_checkpoints_come_after_their_time(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(run, "save_checkpoint", lambda folder, state: steps.append(state["step"]))
    fit(tmp_path, *problem(), checkpoint_seconds=1000)
    assert steps == [0, ITERATIONS]
    steps.clear()
    fit(tmp_path, *problem(), checkpoint_seconds=0)
    assert steps == [0, 5, 10, 15, 20, ITERATIONS]


def test_seconds_add_up_over_interruptions(tmp_path):
    model, optimizer, batches = problem()
    run.save_checkpoint(
        tmp_path,
        {
            "settings": {},
            "step": 5,
            "seconds": 100.0,
            "random": [{"cpu": torch.get_rng_state()}],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
    )
    (tmp_path / "curve.csv").write_text("step,loss,lr,seconds\n5,1,0.001,100.0\n10,1,0.001,200.0\n15,1,0.0")
    assert 100 <= fit(tmp_path, model, optimizer, batches) < 200
    curve = pd.read_csv(tmp_path / "curve.csv")
    assert curve["step"].tolist() == [5, 10, 15, 20, 23]
    assert curve["seconds"].between(100, 200).all()


def test_a_loss_that_is_nan_stops_training_at_the_last_good_checkpoint(tmp_path):
    model, optimizer, batches = problem()

    def poisoned(step):
        inputs, targets = batches(step)
        return inputs, targets * float("nan") if step == 12 else targets

    message = r"training diverged, the mean loss is nan at step 15 with learning rate 0\.00025: lower optimizer\.lr"
    with pytest.raises(FloatingPointError, match=message):
        fit(tmp_path, model, optimizer, poisoned)
    state = run.load_checkpoint(tmp_path)
    assert state["step"] == 10
    assert all(value.isfinite().all() for value in state["model"].values())
    assert pd.read_csv(tmp_path / "curve.csv")["step"].tolist() == [5, 10]


def test_weights_that_are_nan_are_not_saved(tmp_path):
    model, optimizer, batches = problem()
    # The gradient is infinite at the last iteration before a checkpoint, the loss still finite.
    loss = lambda outputs, targets: outputs.sum() * 0 + (outputs - outputs.detach()).abs().sum().sqrt()  # noqa: E731
    with pytest.raises(FloatingPointError, match="a weight is NaN or infinite at step 1 "):
        fit(tmp_path, model, optimizer, batches, loss, log_every=1)
    assert run.load_checkpoint(tmp_path)["step"] == 0


def test_the_curve_shows_the_second_of_two_losses(tmp_path):
    losses = []

    def loss(outputs, targets):
        value = nn.functional.mse_loss(outputs, targets)
        losses.append(2 * value.item())
        return value, 2 * value

    model, *rest = problem()
    fit(tmp_path / "pair", model, *rest, loss)
    plain, *rest = problem()
    fit(tmp_path / "one", plain, *rest)
    assert same(model.state_dict(), plain.state_dict())
    curve = pd.read_csv(tmp_path / "pair" / "curve.csv")
    assert curve["loss"][0] == pytest.approx(np.mean(losses[:5]), rel=1e-4)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_add_up_to_it(tmp_path, parts):
    def without_dropout():
        model, optimizer, _ = problem()
        model[3].p = 0.0
        model[1].eval()  # its statistics are those of a part
        model[1].train = lambda mode: model[1]
        return model, optimizer

    batches = batches_of(noise(12), torch.arange(24.0).view(12, 2) / 24, batch_size=6)

    def divided(number):
        return tuple(part.chunk(parts)[number % parts] for part in batches(number // parts))

    whole, optimizer = without_dropout()
    fit(tmp_path / "whole", whole, optimizer, batches)
    model, optimizer = without_dropout()
    fit(tmp_path / "parts", model, optimizer, divided, accumulate=parts)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    curves = [pd.read_csv(tmp_path / name / "curve.csv")["loss"] for name in ("whole", "parts")]
    np.testing.assert_allclose(*curves, rtol=1e-4)


def test_validation_comes_in_time_and_goes_on_where_it_was(tmp_path):
    model, optimizer, batches = problem()

    def validate():
        assert not model.training
        return model[5].weight.sum().item(), 0.25, 1.0

    fit(tmp_path / "whole", model, optimizer, batches, validate=validate, validate_every=4)
    table = pd.read_csv(tmp_path / "whole" / "validation.csv")
    assert table["step"].tolist() == [4, 8, 12, 16, 20]
    assert table["top1"].tolist() == [0.25] * 5
    assert table["loss"].nunique() == 5
    plain, *rest = problem()
    fit(tmp_path / "plain", plain, *rest)
    assert same(model.state_dict(), plain.state_dict())  # to look at a model does not change its training

    model, optimizer, batches = problem()

    def stopping(step):
        if step == 14:
            raise Stop
        return batches(step)

    settings = {"validate": validate, "validate_every": 4}
    with pytest.raises(Stop):
        fit(tmp_path / "parts", model, optimizer, stopping, **settings)  # a row at 12, a checkpoint at 10
    assert len(pd.read_csv(tmp_path / "parts" / "validation.csv")) == 3
    model, optimizer, batches = problem()
    fit(tmp_path / "parts", model, optimizer, batches, **settings)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "parts" / "validation.csv"), table)


def test_half_precision_trains_nearly_the_same(tmp_path):
    whole, *rest = problem()
    fit(tmp_path / "whole", whole, *rest)
    model, *rest = problem()
    fit(tmp_path / "half", model, *rest, precision="bfloat16")
    assert not same(model.state_dict(), whole.state_dict())
    assert all(value.dtype == whole.state_dict()[name].dtype for name, value in model.state_dict().items())
    torch.testing.assert_close(model[0].weight, whole[0].weight, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("options", [{"precision": "float16"}, {"accumulate": 0}])
def test_settings_that_cannot_be(tmp_path, options):
    with pytest.raises(ValueError, match=r"choose float32 or bfloat16, and at least 1"):
        fit(tmp_path, *problem(), **options)


def test_frozen_parameters_stay(tmp_path):
    model, _, batches = problem()
    model[0].requires_grad_(False)
    before = model[0].weight.clone(), model[5].weight.clone()
    sgd = {"name": "sgd", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.01, "bias_lr_mult": 2, "bias_decay_mult": 1}
    fit(tmp_path, model, make_optimizer(model, OmegaConf.create(sgd)), batches)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[5].weight, before[1])


# Testing.


class MeanColour(nn.Module):
    def forward(self, images):
        assert not self.training
        return images.mean((2, 3))


def outputs(cache, **changes):
    return predict(MeanColour(), cache, **{"crops": 4, "seed": 0, "mean": MEAN, "size": 8} | changes)


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_are_averaged_over_the_crops_of_each_image(device):
    cache = noise(7)
    found = outputs(cache.to(device))
    assert found.device.type == "cpu"
    index = torch.arange(7).repeat_interleave(4)
    crops = random_crops(cache.heights[index], cache.widths[index], 8, torch.Generator().manual_seed(0))
    expected = torch.stack(
        [
            MeanColour().eval()(crop(cache, index[4 * n : 4 * n + 4], take(crops, 4 * n, 4), 8, MEAN)).mean(0)
            for n in range(7)
        ]
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def take(crops, first, count):
    fields = (crops.y, crops.x, crops.height, crops.width, crops.flip)
    return Crops(*(field[first : first + count] for field in fields))


def test_outputs_are_those_of_the_image_in_its_row():
    expected = 10.0 * torch.arange(7)[:, None] - torch.tensor(MEAN)
    torch.testing.assert_close(outputs(flat(7)), expected, atol=1e-3, rtol=0)


def test_outputs_do_not_depend_on_the_batch_size():
    reference = outputs(noise(7))
    for batch_size in (1, 3, 28):
        torch.testing.assert_close(outputs(noise(7), batch_size=batch_size), reference)


def test_outputs_depend_on_the_seed_alone():
    assert torch.equal(outputs(noise(7)), outputs(noise(7)))
    assert not torch.equal(outputs(noise(7)), outputs(noise(7), seed=1))


def test_a_model_in_training_mode_is_tested_in_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.9), MeanColour())
    kept = {"crops": 4, "seed": 0, "mean": MEAN, "size": 8}
    assert torch.equal(predict(model.train(), noise(7), **kept), outputs(noise(7)))
