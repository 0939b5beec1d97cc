"""What Mishkin & Matas (2016) promise of LSUV, on their networks, and agreement with its first author's package."""

import copy

import pytest
import torch
from torch import nn

import initializers
from experiments.networks import FitNet4, MNISTFitNet, ResNet

NETWORKS = {
    **{
        f"FitNet-4, {activation}": lambda activation=activation: FitNet4(
            input_size=16, width=0.125, fc=40, activation=activation, dropout=0
        )
        for activation in ("relu", "vlrelu", "tanh", "sigmoid", "maxout")
    },
    "MNIST": lambda: MNISTFitNet(channels=3, input_size=20, dropout=0),
    "ResNet": lambda: ResNet(depth=14, width=0.5, batch_norm=False),
}


def smooth(count, seed=0):
    """Images whose neighbouring pixels are alike, with a variance of about 1."""
    noise = torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(seed))
    return 3 * nn.functional.avg_pool2d(noise, 3, 1, 1)


def variances(model, images):
    """Of the whole output of each layer with weights, by its name; measured by hooks, in evaluation mode."""
    found, hooks = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            look = lambda _, __, y, name=name: found.update({name: y.double().var(correction=0).item()})  # noqa: E731
            hooks.append(layer.register_forward_hook(look))
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_unit_variance_within_the_tolerance(name):
    model, images = NETWORKS[name](), smooth(32)
    initializers.lsuv(model, images)
    found = variances(model, images)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(found) == len(layers)
    assert all(abs(1 - value) <= 0.02 + 1e-4 for value in found.values()), found
    assert all((layer.bias == 0).all() for layer in layers)


def test_it_takes_no_more_iterations_than_are_allowed():
    """21 at most, and one is enough, as the output is linear in the weights."""
    one, all_of_them, none = (NETWORKS["FitNet-4, maxout"]() for _ in range(3))
    images = smooth(32)
    initializers.lsuv(one, images, max_iterations=1)
    initializers.lsuv(all_of_them, images, max_iterations=21)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), all_of_them.parameters(), strict=True))
    initializers.lsuv(none, images, max_iterations=0)
    assert max(abs(1 - value) for value in variances(none, images).values()) > 0.1


@pytest.mark.parametrize("name", ["FitNet-4, relu", "FitNet-4, tanh", "MNIST"])
def test_batches_of_16_suffice(name):
    """On other images the variances are near 1 in every layer; without LSUV they are not."""
    model, others = NETWORKS[name](), smooth(512, seed=1)
    initializers.lsuv(model, smooth(16))
    found = variances(model, others)
    assert all(0.6 < value < 1.6 for value in found.values()), found
    initializers.lsuv(model, smooth(16), max_iterations=0)
    assert not all(0.6 < value < 1.6 for value in variances(model, others).values())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_the_package_of_its_first_author_gives_the_same_weights(activation):
    """From one orthonormal start, to 1e-4. It divides by n - 1 in a variance, so that there have to be many values."""
    from lsuv import lsuv_with_singlebatch

    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 12, 3), nn.Linear(48, 20)]
    modules = [module for layer in layers for module in (layer, activation())]
    ours = nn.Sequential(*modules[:6], nn.Flatten(), *modules[6:], nn.Linear(20, 10))
    images = smooth(1_500)[:, :, :9, :9]
    initializers.lsuv(ours, images, seed=5, max_iterations=0)
    theirs = copy.deepcopy(ours)
    lsuv_with_singlebatch(theirs, images, std_tol=1e-6, do_orthonorm=False, verbose=False)
    assert (ours[0].weight - theirs[0].weight).norm() > 0.01 * ours[0].weight.norm()
    initializers.lsuv(ours, images, seed=5, tolerance=1e-6)
    for (name, one), other in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert ((one - other[1]).norm() <= 1e-4 * one.norm()).item(), name
