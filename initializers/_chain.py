"""How a change of scale travels through a network: the only part that knows the network's structure.

Every tensor t between two layers has a log-scale u_t: 0 at the inputs and the outputs of the network, free in
between. An affine layer multiplies its weights by exp(u_out - u_in) and its bias by exp(u_out); homogeneous layers
hand u on; BatchNorm absorbs it and emits one of its own; anything else pins it to 0. Whatever the u, the network
computes the same function. Here the network is a chain: each layer feeds the next and nothing else.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from initializers._model import AFFINE, InitializationError

# f(s x) = s f(x) for every s > 0, in evaluation mode.
_HOMOGENEOUS_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Identity,
)
_HOMOGENEOUS_FUNCTIONS = {
    torch.relu,
    torch.relu_,
    torch.flatten,
    torch.mean,
    torch.reshape,
    F.relu,
    F.relu_,
    F.leaky_relu,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.dropout,
    F.dropout2d,
}
_HOMOGENEOUS_METHODS = {"relu", "relu_", "flatten", "mean", "reshape", "view", "contiguous"}
_SHAPE_METHODS = {"size", "dim", "numel"}


@dataclass
class Chain:
    """The affine layers in order of execution, and the scales that may change between them.

    Attributes:
        layers: names of the affine layers.
        weight: (layers, scales) matrix; `weight @ u` is the log of what multiplies each layer's weights.
        bias: the same for the biases.
        norms: BatchNorm layers, each with the rows of its incoming and its outgoing scale.
        measured: layers whose input comes through LRN. LRN is only nearly homogeneous: the scale that reaches these
            layers is not known beforehand and has to be measured, and the function changes a little.
    """

    layers: list[str]
    weight: Tensor
    bias: Tensor
    norms: list[tuple[nn.BatchNorm2d, Tensor, Tensor]]
    measured: set[str]

    def equalising(self, rates: list[float]) -> Tensor:
        """The log-scales u that leave the logs of the change rates with the least variance, float64 (scales,).

        Scaling changes log C_k by -2 (u_out - u_in) plus a term common to all layers. Among equal solutions the
        smallest change is taken.
        """
        logs = torch.tensor(rates, dtype=torch.float64).log()
        centre = torch.eye(len(logs), dtype=torch.float64) - 1 / len(logs)
        return torch.linalg.lstsq(centre @ self.weight, 0.5 * centre @ logs, driver="gelsd").solution

    @property
    def exact(self) -> bool:
        """Whether scaling leaves the function of the network unchanged."""
        return not self.measured

    @torch.no_grad()
    def apply(self, model: nn.Module, u: Tensor) -> dict[str, float]:
        """Scale the parameters of `model` (and the running statistics of BatchNorm) by the log-scales u.

        For the layers in `measured`, dividing the weights by the scale of the input is left to the caller.

        Returns:
            What the weights of each layer were multiplied by.
        """
        factors = {}
        for name, weight, bias in zip(self.layers, self.weight @ u, self.bias @ u, strict=True):
            layer = model.get_submodule(name)
            factors[name] = (bias if name in self.measured else weight).exp().item()
            layer.weight.mul_(factors[name])
            if layer.bias is not None:
                layer.bias.mul_(bias.exp().item())
        for norm, incoming, outgoing in self.norms:
            _scale_norm(norm, (incoming @ u).exp().item(), (outgoing @ u).exp().item())
        return factors


def _scale_norm(norm: nn.BatchNorm2d, incoming: float, outgoing: float) -> None:
    """Let BatchNorm take inputs `incoming` times larger and give outputs `outgoing` times larger, exactly.

    With v the running variance, v' + eps = incoming² (v + eps) keeps the function in spite of eps. Where that
    would need a negative v', it is 0 and the weight takes up the rest.

    Raises:
        InitializationError: there is no weight to do so.
    """
    total = incoming**2 * (norm.running_var + norm.eps)
    if not norm.affine and (total < norm.eps).any():
        raise InitializationError(
            f"a BatchNorm without weights has eps {norm.eps}, too large for an input scaled by {incoming:.1e}; "
            "lower it, or pass affine=True"
        )
    norm.running_mean.mul_(incoming)
    norm.running_var.copy_((total - norm.eps).clamp_min(0))
    if norm.affine:
        norm.weight.mul_(outgoing * ((norm.running_var + norm.eps) / total).sqrt())
        norm.bias.mul_(outgoing)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, AFFINE) or super().is_leaf_module(module, name)


def trace_chain(model: nn.Module) -> Chain:
    """Read the chain of layers of `model`.

    Raises:
        InitializationError: the model branches, uses a layer twice, or cannot be traced at all.
    """
    remedy = "pass between=False to set the filters and normalise each layer only"
    try:
        attributes = set(vars(model))
        graph = _Tracer().trace(model)
        for name in set(vars(model)) - attributes:  # tensors made on the way, which the tracer keeps in the model
            delattr(model, name)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        message = f"the between-layer step cannot trace {type(model).__name__} ({error}); {remedy}"
        raise InitializationError(message) from error

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def is_constant(node: fx.Node) -> bool:
        """Whether a node is the same for all images and all scales: a size, a buffer, or what comes of those alone."""
        if node.op == "get_attr":
            return node.target not in parameters
        if node.op == "call_method" and node.target in _SHAPE_METHODS:
            return True
        if node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
            return True
        return node.op.startswith("call") and bool(node.all_input_nodes) and all(map(is_constant, node.all_input_nodes))

    layers: list[tuple[str, int | None, int]] = []  # name, scale before, scale after
    norms: list[tuple[nn.Module, int | None, int | None]] = []
    pinned: set[int | None] = {None}
    measured: set[str] = set()
    through_lrn = False
    node_before: fx.Node | None = None
    scale: int | None = None  # of the tensor that the last node gave; None is pinned to 0
    scales = 0
    for node in graph.nodes:
        if is_constant(node):
            continue
        sources = [source for source in node.all_input_nodes if not is_constant(source)]
        if sources != ([] if node_before is None else [node_before]):
            raise InitializationError(
                f"the between-layer step needs a chain of layers, but it branches at {node}; {remedy}"
            )
        node_before = node
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, AFFINE):
            if any(module is model.get_submodule(name) for name, _, _ in layers):
                raise InitializationError(
                    f"layer {node.target} is used twice, which the between-layer step cannot scale; {remedy}"
                )
            layers.append((node.target, scale, scales))
            if through_lrn:
                measured.add(node.target)
                through_lrn = False
            scale, scales = scales, scales + 1
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats and not through_lrn:
            emitted = scales if module.affine else None
            norms.append((module, scale, emitted))
            scale, scales = emitted, scales + module.affine
        elif isinstance(module, nn.LocalResponseNorm):
            through_lrn = True
        elif not _is_homogeneous(node, module):
            pinned.add(scale)
            scale, through_lrn = None, False

    free = {scale: column for column, scale in enumerate(s for s in range(scales) if s not in pinned)}
    rows = torch.eye(len(free), dtype=torch.float64)
    zero = torch.zeros(len(free), dtype=torch.float64)

    def row(scale: int | None) -> Tensor:
        return rows[free[scale]] if scale in free else zero

    return Chain(
        layers=[name for name, _, _ in layers],
        weight=torch.stack([row(after) - row(before) for _, before, after in layers]),
        bias=torch.stack([row(after) for _, _, after in layers]),
        norms=[(norm, row(before), row(after)) for norm, before, after in norms],
        measured=measured,
    )


def _is_homogeneous(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, _HOMOGENEOUS_MODULES)
    if node.op == "call_function":
        return node.target in _HOMOGENEOUS_FUNCTIONS
    return node.op == "call_method" and node.target in _HOMOGENEOUS_METHODS
