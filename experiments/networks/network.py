"""What the experiments ask of a network."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.targets import call, named

OURS = "experiments.networks."
AFFINE = (nn.Linear, nn.Conv2d)


@runtime_checkable
class Network(Protocol):
    """A `torch.nn.Module` that every command which takes `model=` can initialize, train and test.

    Its input is a batch of images, float (N, 3, input_size, input_size), BGR, 0..255 minus the mean (small images are
    as `data/small.py` makes them), its output logits (N, num_outputs). Optional is `caffe_fillers`, from the name of a
    layer to (standard deviation, bias), for `init=caffe`.

    Attributes:
        last_layer: name of the last layer, which is new where weights come from a network with other outputs.
        classifiers: names of all classifiers, `last_layer` among them; several where auxiliary ones are trained.
        input_size: side of the square input in pixels.
        std_factors: what fixed standard deviations are multiplied by, for each layer; see `narrow`.
    """

    last_layer: str
    classifiers: Sequence[str]
    input_size: int

    @property
    def std_factors(self) -> Mapping[str, float]: ...


def make_network(settings: DictConfig, outputs: int, channels: int = 3) -> nn.Module:
    """The network that `settings` name as `_target_`, with so many outputs.

    It is given the number of `channels` where that is not three. One from elsewhere, which is no `Network`, becomes
    one: `num_classes=outputs` and all settings but `input_size` are its arguments, its last linear layer or convolution
    is `last_layer`, and no standard deviation is multiplied.

    Raises:
        ValueError: there is no such network, it does not take the settings, or has no layer.
    """
    options = OmegaConf.to_container(settings, resolve=True)
    target = options.pop("_target_")
    if channels != 3:
        options["channels"] = channels
    if target.startswith(OURS):
        return call("model._target_", named("model._target_", target), **{**options, "num_outputs": outputs})
    size = options.pop("input_size")
    options["num_outputs" if "num_outputs" in options else "num_classes"] = outputs
    model = call("model._target_", named("model._target_", target), **options)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model._target_={target} returns a {type(model).__name__}: it should return a torch.nn.Module"
        )
    if not any(isinstance(layer, AFFINE) for layer in model.modules()):
        raise ValueError(f"model._target_={target}: there is no convolution and no linear layer in what it returns")
    return model if isinstance(model, Network) else as_network(model, size)


def as_network(model: nn.Module, input_size: int) -> nn.Module:
    """A model from elsewhere as a `Network`: its last linear layer or convolution is `last_layer`."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, AFFINE)]
    model.last_layer, model.classifiers = layers[-1], layers[-1:]
    model.input_size, model.std_factors = input_size, dict.fromkeys(layers, 1.0)
    return model
