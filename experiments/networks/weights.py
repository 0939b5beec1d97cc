"""Weights of trained networks from files: Caffe's, PyTorch's and safetensors, matched by the names of layers."""

import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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
    "Layer": {"name": (1, "bytes", False), "blobs": (7, "Blob", True)},
    "Net": {"layers": (2, "V1Layer", True), "layer": (100, "Layer", True)},
}
PARAMETERS = ("weight", "bias")  # the blobs of an affine layer, in order
HEAD_STD, HEAD_BIAS = 0.01, 0.1  # of a new last layer at full width (philkr/voc-classification)


@dataclass
class Loaded:
    """What became of the parameters of a model and of the tensors of a file, by name."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # of the model; a last layer of another size is one
    extra: list[str] = field(default_factory=list)  # of the file

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} parameters loaded"]
        lines += [f"not in the file: {', '.join(self.missing)}"] if self.missing else []
        lines += [f"not in the model: {', '.join(self.extra)}"] if self.extra else []
        return "\n".join(lines)


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path, *, seed: int = 0) -> Loaded:
    """Set the parameters of `model` that the file holds, by name.

    A new last layer is N(0, .01²) with biases .1, its standard deviation multiplied as in `narrow`.

    Args:
        model: its attribute `head` names the last layer, which may be of another size in the file; `std_factors`
            has its factor.
        path: a `.caffemodel` (channels stay BGR), `.pth`, `.pt` or `.safetensors`.
        seed: of a new last layer.

    Raises:
        ValueError: a file that cannot be read, that holds nothing for the model, or another shape for a layer. The
            model is then as it was.
        OSError: no such file.
    """
    tensors = read_weights(path)
    report, found = Loaded(), {}
    for name, parameter in model.named_parameters():
        tensor = tensors.pop(name, None)
        if tensor is None or (_core(tensor) != _core(parameter) and name.startswith(f"{model.head}.")):
            report.missing.append(name)
        elif _core(tensor) != _core(parameter):
            raise ValueError(f"{path}: {_mismatch(name, tensor, parameter)}")
        else:
            found[parameter] = tensor.view(parameter.shape)
            report.loaded.append(name)
    for name, buffer in model.named_buffers():
        tensor = tensors.pop(name, None)
        if tensor is not None and tensor.shape == buffer.shape:
            found[buffer] = tensor
    report.extra = list(tensors)
    if not report.loaded:
        raise ValueError(
            f"{path} holds no layer of {type(model).__name__}: its layers are {', '.join(list(tensors)[:4])}, ..."
        )
    for target, tensor in found.items():
        target.copy_(tensor)
    head = model.get_submodule(model.head)
    if f"{model.head}.weight" in report.missing:
        generator = torch.Generator(head.weight.device).manual_seed(seed)
        head.weight.normal_(0, model.std_factors[model.head] * HEAD_STD, generator=generator)
        head.bias.fill_(HEAD_BIAS)
    return report


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Name (`layer.weight`, `layer.bias`) -> tensor, float32 on the CPU.

    Raises:
        ValueError: a file of another kind, that is damaged, or with values that are NaN or infinite.
        OSError: no such file.
    """
    path = Path(path)
    readers = {".caffemodel": _read_caffe, ".pth": _read_torch, ".pt": _read_torch, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise ValueError(f"{path}: weights are read from {', '.join(readers)}")
    tensors = readers[path.suffix](path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or Inf")
    return tensors


def _read_caffe(path: Path) -> dict[str, Tensor]:
    net = _MESSAGES["Net"]()
    try:
        net.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is no caffemodel, or it is damaged ({error})") from error
    tensors: dict[str, Tensor] = {}
    for layer in [*net.layers, *net.layer]:
        layer_name = layer.name.decode(errors="replace").replace("/", ".")
        for number, blob in enumerate(layer.blobs):
            name = f"{layer_name}.{PARAMETERS[number] if number < len(PARAMETERS) else f'blob{number}'}"
            if name in tensors:
                raise ValueError(f"{path} holds {name} twice")
            tensors[name] = _tensor(f"{path}: {name}", blob)
    if not tensors:
        raise ValueError(f"{path} holds no weights: a caffemodel does, a prototxt or a solverstate does not")
    return tensors


def _tensor(name: str, blob) -> Tensor:
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    parts, kind = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
    data = b"".join(parts)
    size = np.dtype(kind).itemsize
    if min(shape, default=1) < 0 or len(data) != size * math.prod(shape):
        raise ValueError(f"{name} is to be of shape {shape}, but has {len(data) / size:g} values: the file is damaged")
    return torch.from_numpy(np.frombuffer(data, kind).astype(np.float32)).view(shape)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no state dict of PyTorch, or it is damaged ({reason})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: save model.state_dict()")
    return {str(name).removeprefix("module."): tensor.float() for name, tensor in state.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or it is damaged ({error})") from error


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
