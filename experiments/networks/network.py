"""What the experiments ask of a network."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Network(Protocol):
    """A `torch.nn.Module` that every command which takes `model=` can initialize, train and test.

    Its input is a batch of images, float (N, 3, input_size, input_size), BGR, 0..255 minus the mean, its output logits
    (N, num_outputs). Optional is `caffe_fillers`, from the name of a layer to (standard deviation, bias), for
    `init=caffe`.

    Attributes:
        head: name of the last layer, which is new where weights come from a network with other outputs.
        heads: names of all classifiers, `head` among them; several where auxiliary ones are trained.
        input_size: side of the square input in pixels.
        std_factors: what fixed standard deviations are multiplied by, for each layer; see `narrow`.
    """

    head: str
    heads: Sequence[str]
    input_size: int

    @property
    def std_factors(self) -> Mapping[str, float]: ...
