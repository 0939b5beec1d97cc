"""Weights of trained networks from files: Caffe's, PyTorch's and safetensors, matched by the names of layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from torch import Tensor, nn

from initializers import _weights_file

# What of caffe.proto (BVLC/caffe) holds weights: message -> field -> (number, type, repeated?). Packed numbers are
# bytes on the wire, and are read as such: as numbers they would become Python objects one by one.
SCHEMA = {
    "BlobShape": {"dim": (1, "int64", True)},
    "Blob": {
        **{name: (number, "int32", False) for number, name in enumerate(("num", "channels", "height", "width"), 1)},
        "data": (5, "bytes", True),
        "shape": (7, "BlobShape", False),
        "double_data": (8, "bytes", True),
    },
    "V1Layer": {"name": (4, "bytes", False), "blobs": (6, "Blob", True)},
    "BatchNorm": {"eps": (3, "float", False)},
    "Layer": {
        "name": (1, "bytes", False),
        "type": (2, "bytes", False),
        "bottom": (3, "bytes", True),
        "top": (4, "bytes", True),
        "blobs": (7, "Blob", True),
        "batch_norm_param": (139, "BatchNorm", False),
    },
    "Net": {"layers": (2, "V1Layer", True), "layer": (100, "Layer", True)},
}
PARAMETERS = ("weight", "bias")  # the blobs of an affine layer, in order
AFFINE = (b"Convolution", b"InnerProduct")  # the layers with outputs along the first dimension of their weights
BATCH_NORM_EPS = 1e-5  # of a BatchNorm layer of Caffe that states none
LUMA = (0.114, 0.587, 0.299)  # of B, G and R in the grey value of a pixel (ITU-R BT.601)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
HEAD_STD, HEAD_BIAS = 0.01, 0.1  # of a new last layer at full width (philkr/voc-classification)


@dataclass
class Loaded:
    """What became of the parameters of a model and of the tensors of a file, by name."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # of the model; a last layer of another size is one
    extra: list[str] = field(default_factory=list)  # of the file
    notes: list[str] = field(default_factory=list)  # what was not taken as it is

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} parameters loaded", *self.notes]
        lines += [f"not in the file: {', '.join(self.missing)}"] if self.missing else []
        lines += [f"not in the model: {', '.join(self.extra)}"] if self.extra else []
        return "\n".join(lines)


@dataclass
class _Norm:
    """A BatchNorm layer of Caffe with the Scale layer behind it, or a Scale layer alone (mean 0, variance 1, eps 0)."""

    name: str
    after: "_Value"  # what it normalises
    mean: Tensor
    var: Tensor
    eps: float
    gamma: Tensor
    beta: Tensor
    scaled: bool = False  # it has its Scale layer


@dataclass
class _Value:
    """An output of a layer of Caffe: of an affine layer, of a BatchNorm, or of any other."""

    affine: str | None = None
    norm: _Norm | None = None
    users: int = 0  # layers that read it


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path, *, seed: int = 0, skip: Sequence[str] = ()) -> Loaded:
    """Set the parameters of `model` that the file holds, by name.

    A new last layer is N(0, .01²) with biases .1, its standard deviation multiplied as in `narrow`. Where the file has
    the weights of a layer and no biases, they become 0. Filters of a network that sees grey images (one input channel)
    are spread over B, G and R with the weights .114, .587 and .299: the layer sees the grey values of the image.
    BatchNorm and Scale layers of Caffe become the BatchNorm of the model that has their name, or else the one that
    comes right after the same layer; where the model has none, they are folded into that layer, whose function in
    evaluation mode is that of all of them.

    Args:
        model: its attribute `last_layer` names the last layer, which may be of another size in the file; `std_factors`
            has its factor.
        path: a `.caffemodel` (channels stay BGR), `.pth`, `.pt` or `.safetensors`.
        seed: of a new last layer.
        skip: names of layers that are left out of the file, such as those of another shape.

    Raises:
        ValueError: a file that cannot be read, that holds nothing for the model, or another shape for a layer. The
            model is then as it was.
        OSError: no such file.
    """
    report, found = Loaded(), {}
    tensors = _without(skip, _read_for(model, Path(path), report, skip), model, path)
    for name, parameter in model.named_parameters():
        tensor = tensors.pop(name, None)
        layer, _, kind = name.rpartition(".")
        if tensor is None and kind == "bias" and f"{layer}.weight" in report.loaded:
            found[parameter] = torch.zeros_like(parameter)
            report.notes.append(f"not in the file, so 0: {name}")
        elif tensor is None or (_core(tensor) != _core(parameter) and name.startswith(f"{model.last_layer}.")):
            report.missing.append(name)
        else:
            found[parameter] = _fitted(f"{path}: ", name, tensor, parameter, report)
            report.loaded.append(name)
    for name, buffer in model.named_buffers():
        tensor = tensors.pop(name, None)
        if tensor is not None and tensor.shape != buffer.shape:
            raise ValueError(f"{path}: {_mismatch(name, tensor, buffer)}")
        if tensor is not None:
            found[buffer] = tensor
    report.extra = list(tensors)
    if not report.loaded:
        names = _printable(", ".join(list(tensors)[:4]))
        raise ValueError(f"{path} holds no layer of {type(model).__name__}: its layers are {names}, ...")
    for target, tensor in found.items():
        target.copy_(tensor)
    if f"{model.last_layer}.weight" in report.missing:
        _renew_last_layer(model, seed)
    return report


def _renew_last_layer(model: nn.Module, seed: int) -> None:
    layer = model.get_submodule(model.last_layer)
    generator = torch.Generator(layer.weight.device).manual_seed(seed)
    layer.weight.normal_(0, model.std_factors[model.last_layer] * HEAD_STD, generator=generator)
    if layer.bias is not None:
        layer.bias.fill_(HEAD_BIAS)


def _without(skip: Sequence[str], tensors: dict[str, Tensor], model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The tensors of the file but for those of the layers `skip`."""
    for layer in skip:
        if not any(name.startswith(f"{layer}.") for name in (*tensors, *model.state_dict())):
            raise ValueError(f"{path}: there is no layer {layer} to leave out (init.skip)")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(f"{s}." for s in skip))}


def _fitted(where: str, name: str, tensor: Tensor, parameter: Tensor, report: Loaded) -> Tensor:
    """The tensor in the shape of the parameter; a grey filter is spread over the colours."""
    if not tensor.is_floating_point():
        raise ValueError(f"{where}{name} holds {tensor.dtype}: save weights as floats")
    if tensor.ndim == 4 and tensor.shape[1] == 1 and parameter.shape == (len(tensor), 3, *tensor.shape[2:]):
        report.notes.append(
            f"{name} sees grey images: spread over B, G, R with the weights {', '.join(map(str, LUMA))}"
        )
        return tensor * torch.tensor(LUMA).view(1, 3, 1, 1)
    if _core(tensor) != _core(parameter):
        raise ValueError(f"{where}{_mismatch(name, tensor, parameter)}, or leave the layer out by init.skip=[NAME]")
    return tensor.view(parameter.shape)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Name (`layer.weight`, `layer.bias`) -> tensor on the CPU, float32 but for integers.

    Raises:
        ValueError: a file of another kind, that is damaged, or with values that are NaN or infinite.
        OSError: no such file.
    """
    path = Path(path)
    if path.suffix == ".caffemodel":
        tensors, norms = _read_caffe(path)
        for norm in norms:
            tensors |= _as_module(norm, norm.name, BATCH_NORM_EPS)
        return _finite(path, tensors)
    return _finite(path, _read_state(path)[0])


def _read_state(path: Path) -> tuple[dict[str, Tensor], str]:
    if path.suffix not in _weights_file.SUFFIXES:
        raise ValueError(f"{path}: weights are read from .caffemodel, {', '.join(_weights_file.SUFFIXES)}")
    return _weights_file.read_state(path)


def _read_for(model: nn.Module, path: Path, report: Loaded, skip: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a file by the names that the model has for them; `report` notes what was changed for it."""
    if path.suffix == ".caffemodel":
        tensors, norms = _read_caffe(path)
        _finite(path, tensors)
        for norm in norms:
            skipped = norm.name in skip
            tensors |= _as_module(norm, norm.name, 0) if skipped else _placed(path, model, tensors, norm, report)
        return _finite(path, tensors)
    state, key = _read_state(path)
    try:
        state, prefixes = _weights_file.without_prefixes(state, model.state_dict())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    report.notes += [text] if (text := _weights_file.taken(key, prefixes)) else []
    return _finite(path, state)


def _finite(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or Inf")
    return tensors


def _placed(path: Path, model: nn.Module, tensors: dict[str, Tensor], norm: _Norm, report: Loaded) -> dict[str, Tensor]:
    """What a BatchNorm of the file sets: a BatchNorm of the model, or the layer that it is folded into."""
    modules, layer = dict(model.named_modules()), norm.after.affine
    following = next((b for a, b in zip(modules, list(modules)[1:], strict=False) if a == layer), "")
    for name in (norm.name, following):
        if isinstance(modules.get(name), BATCH_NORMS):
            if f"{name}.running_mean" in tensors:
                raise ValueError(f"{path}: two BatchNorm layers are {name} of the model: leave one out by init.skip")
            return _as_module(norm, name, modules[name].eps)
    if layer is not None and layer not in modules:
        return _as_module(norm, norm.name, BATCH_NORM_EPS)  # of a layer that the model lacks too
    weight = tensors.get(f"{layer}.weight")
    outputs = None if weight is None else weight.shape[-2] if weight.shape[:2] == (1, 1) else len(weight)
    if (
        layer is None
        or norm.after.users != 1
        or outputs != len(norm.mean)
        or getattr(modules[layer], "bias", None) is None
    ):
        raise ValueError(
            f"{path}: {norm.name} normalises what is not the output of one layer with biases, and the model has no "
            f"BatchNorm for it: choose a network with BatchNorm, or leave it out by init.skip=[{norm.name}]"
        )
    factor = norm.gamma * (norm.var + norm.eps).rsqrt()
    bias = tensors.get(f"{layer}.bias", torch.zeros(outputs)).flatten()
    report.notes.append(f"{norm.name} folded into {layer}")
    rows = (weight.reshape(outputs, -1) * factor[:, None]).view(weight.shape)
    return {f"{layer}.weight": rows, f"{layer}.bias": (bias - norm.mean) * factor + norm.beta}


def _as_module(norm: _Norm, name: str, eps: float) -> dict[str, Tensor]:
    """The parameters and buffers of the module `name`, a BatchNorm with a constant `eps`."""
    values = {"running_mean": norm.mean, "running_var": norm.var + (norm.eps - eps)}
    return {f"{name}.{part}": value for part, value in (values | {"weight": norm.gamma, "bias": norm.beta}).items()}


def _read_caffe(path: Path) -> tuple[dict[str, Tensor], list[_Norm]]:
    """The blobs of a file by the names of parameters, and its BatchNorm and Scale layers."""
    net = _MESSAGES["Net"]()
    try:
        net.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is no caffemodel, or it is damaged ({error})") from error
    tensors: dict[str, Tensor] = {}
    norms: list[_Norm] = []
    values: dict[bytes, _Value] = {}
    layers = [*((layer, b"", (), ()) for layer in net.layers), *((x, x.type, x.bottom, x.top) for x in net.layer)]
    for layer, kind, bottoms, tops in layers:
        name = _printable(layer.name.decode(errors="replace")).replace("/", ".")
        blobs = [_tensor(f"{path}: {name}.{_part(number)}", blob) for number, blob in enumerate(layer.blobs)]
        inputs = [values.setdefault(bottom, _Value()) for bottom in bottoms]
        for value in inputs:
            value.users += 1
        output = _Value(affine=name if kind in AFFINE else None)
        if kind in (b"BatchNorm", b"Scale") and blobs:
            output.norm = _norm(path, name, layer, blobs, inputs)
            norms += [output.norm] if output.norm.name == name else []
        else:
            for number, tensor in enumerate(blobs):
                if f"{name}.{_part(number)}" in tensors:
                    raise ValueError(f"{path} holds {name}.{_part(number)} twice")
                tensors[f"{name}.{_part(number)}"] = tensor
        values |= dict.fromkeys(tops, output)
    if not tensors:
        raise ValueError(f"{path} holds no weights: a caffemodel does, a prototxt or a solverstate does not")
    return tensors, norms


def _norm(path: Path, name: str, layer, blobs: list[Tensor], inputs: list[_Value]) -> _Norm:
    """The BatchNorm that a layer is, or that it completes: Caffe divides mean and variance by the third blob."""
    blobs = [blob.flatten() for blob in blobs]
    after, count = inputs[0] if inputs else _Value(), len(blobs[0])
    zeros, ones = torch.zeros(count), torch.ones(count)
    if layer.type == b"Scale":
        if len(blobs) > 2 or len(inputs) > 1 or len(blobs[-1]) != count:
            raise ValueError(f"{path}: the Scale layer {name} has no factor and bias per channel: it is not read")
        beta = blobs[1] if len(blobs) == 2 else zeros
        norm = after.norm
        if norm is None or norm.scaled or after.users != 1 or len(norm.mean) != count:
            return _Norm(name, after, zeros, ones, 0.0, blobs[0], beta, scaled=True)
        norm.gamma, norm.beta, norm.scaled = blobs[0], beta, True
        return norm
    if len(blobs) != 3 or len(blobs[1]) != count or len(blobs[2]) != 1:
        raise ValueError(f"{path}: the BatchNorm layer {name} should hold mean, variance and their factor: it does not")
    factor = 0.0 if blobs[2].item() == 0 else 1 / blobs[2].item()
    eps = layer.batch_norm_param.eps if layer.batch_norm_param.HasField("eps") else BATCH_NORM_EPS
    return _Norm(name, after, blobs[0] * factor, blobs[1] * factor, eps, ones, zeros)


def _printable(text: str) -> str:
    """The text with a mark for what would break the line of a message."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _part(number: int) -> str:
    return PARAMETERS[number] if number < len(PARAMETERS) else f"blob{number}"


def _tensor(name: str, blob) -> Tensor:
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    parts, kind = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
    data = b"".join(parts)
    size = np.dtype(kind).itemsize
    if min(shape, default=1) < 0 or len(data) != size * math.prod(shape):
        raise ValueError(f"{name} is to be of shape {shape}, but has {len(data) / size:g} values: the file is damaged")
    return torch.from_numpy(np.frombuffer(data, kind).astype(np.float32)).view(shape)


def _core(tensor: Tensor) -> list[int]:
    """The shape without dimensions of size 1, which Caffe's old format adds to that of every blob."""
    return [size for size in tensor.shape if size != 1]


def _mismatch(name: str, tensor: Tensor, parameter: Tensor) -> str:
    message = f"{name} has shape {tuple(tensor.shape)}, in the model it is {tuple(parameter.shape)}"
    if tensor.ndim == 4 and len(tensor) == len(parameter) and tensor.shape[1] == 2 * parameter.shape[1]:
        return f"{message}: the network of the file has no groups; pass model.groups=false"
    if tensor.ndim == 4 and len(tensor) == len(parameter) and 2 * tensor.shape[1] == parameter.shape[1]:
        return f"{message}: the network of the file has groups; pass model.groups=true"
    return f"{message}: choose the network, its width and its input size as they were when the file was made"


def _messages() -> dict[str, type]:
    """Classes of the messages of `SCHEMA`."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe_weights.proto", package="caffe_weights")
    for message, fields in SCHEMA.items():
        descriptor = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            entry = descriptor.field.add(name=name, number=number, label=label)
            if kind in SCHEMA:
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, f".{file.package}.{kind}"
            else:
                entry.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = {name: pool.FindMessageTypeByName(f"{file.package}.{name}") for name in SCHEMA}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


_MESSAGES = _messages()
