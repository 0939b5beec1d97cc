"""How a change of scale travels through a graph: the between-layer step on any network.

Every value has a log-scale u in each of its elements: 0 at the inputs and outputs of the network, free in between. An
affine layer multiplies the weights of input channel j by exp(u_out - u_in[j]) and its bias by exp(u_out), so that its
output has one scale whatever its input had. Homogeneous operations hand u on, operations that move elements (views,
concatenation, channel shuffles) move it along, additions force what they add to one u, normalisations absorb it and
emit one of their own, and everything else pins it to 0. Whatever the u, the network computes the same function.

An element's scale is written as a label: the number of a free variable, 0 where it is pinned, -1 where the element is
zero, which any scale fits. Labels are tensors shaped like the values (for two images), so that the operations which
move elements are applied to the labels as they are to the values. Equal scales are linear constraints between
variables.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from initializers._graph import SIZES, Graph, Operation, Ref, _map, _resolve
from initializers._layers import Layer, input_of, overlap
from initializers._model import InitializationError, tensors_of
from initializers._rates import Measurement

_PINNED, _ZERO = 0, -1
MAX_STEPS = 50  # of Newton's method; a chain needs one, GoogLeNet about six
MAX_HALVINGS = 30

# Operations by the name of their function; methods, operators and in-place variants share it.
_MOVING = {
    *("view", "reshape", "flatten", "unflatten", "ravel", "permute", "transpose", "swapaxes", "swapdims", "movedim"),
    *("moveaxis", "t", "T", "mT", "adjoint", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "repeat"),
    *("tile", "repeat_interleave", "view_as", "reshape_as", "chunk", "split", "split_with_sizes", "tensor_split"),
    *("unbind", "select", "narrow", "__getitem__", "index_select", "roll", "flip", "rot90", "cat", "concat"),
    *("concatenate", "stack", "hstack", "vstack", "dstack", "unfold", "pixel_shuffle", "pixel_unshuffle"),
    *("channel_shuffle", "native_channel_shuffle", "atleast_2d", "diagonal"),
}
_HOMOGENEOUS = {
    *("relu", "leaky_relu", "prelu", "abs", "neg", "positive", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("feature_dropout", "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type_as"),
    *("data", "cpu", "cuda", "requires_grad", "alias", "rrelu"),
}
_POOLING = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
_POOLING |= {"interpolate", "upsample", "lp_pool1d", "lp_pool2d"}
_REDUCING = {"mean", "sum", "amax", "amin"}
_ADDING = {"add", "sub", "subtract", "rsub", "maximum", "minimum", "fmax", "fmin"}
_MULTIPLYING = {"mul", "multiply", "div", "divide", "true_divide"}
_NORMALISING = {"layer_norm", "group_norm", "instance_norm", "rms_norm"}
_OPERATORS = {
    f"__{prefix}{operator}__": operator for operator in ("add", "sub", "mul", "matmul") for prefix in ("", "i", "r")
} | {"__truediv__": "div", "__itruediv__": "div", "__neg__": "neg"}


@dataclass
class Use:
    """A use of an affine layer: labels of its input channels, (groups, inputs), and of its output."""

    layer: Layer
    incoming: Tensor
    output: int


@dataclass
class Norm:
    """A normalisation: labels of its input's channels and of its output, and what to scale."""

    incoming: Tensor  # (channels,), or (1,) where the input has one scale
    output: int
    weight: Tensor | None
    bias: Tensor | None
    module: nn.Module | None = None  # whose eps is scaled along
    mean: Tensor | None = None  # running statistics
    variance: Tensor | None = None
    eps: float = 0.0


@dataclass
class Scales:
    """The scales of a graph that may change, and what they scale.

    Attributes:
        uses: the first of each affine layer.
        norms: normalisations.
        leaves: parameters that are values themselves, such as a position embedding, with their labels.
        gains: parameters that multiply a value element by element, with the labels that come in, shaped like them, and
            the label that goes out.
        lrns: local response normalisations and the label of their input; their constants take up the scale.
        measured: labels of what comes out of local response normalisations that are left as they are, with those of
            what comes in. They scale only nearly, so that the scale that comes out has to be measured.
        degrees: their local degree of homogeneity by the label that comes out, once measured; 1 until then.
        variables: number of free variables.
        constraints: rows of coefficients whose sums are 0.
    """

    uses: list[Use] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    leaves: list[tuple[Tensor, int]] = field(default_factory=list)
    gains: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    lrns: list[tuple[nn.Module, int]] = field(default_factory=list)
    measured: dict[int, int] = field(default_factory=dict)
    degrees: dict[int, float] = field(default_factory=dict)
    variables: int = 0
    constraints: set[tuple[tuple[int, int], ...]] = field(default_factory=set)

    def new(self) -> int:
        """The label of a new variable."""
        self.variables += 1
        return self.variables

    def is_measured(self, labels: Tensor) -> Tensor:
        """Which of the labels are in `measured`, bool."""
        return torch.isin(labels, torch.tensor(sorted(self.measured), dtype=labels.dtype))

    def constrain(self, *terms: tuple[int, int]) -> None:
        """Let a sum of (label, coefficient) be 0."""
        sums: dict[int, int] = {}
        for label, coefficient in terms:
            if label > 0:
                sums[label] = sums.get(label, 0) + coefficient
        row = tuple(sorted((label, coefficient) for label, coefficient in sums.items() if coefficient))
        if row:
            self.constraints.add(row)

    def basis(self) -> Tensor:
        """Orthonormal basis of the scales that keep the constraints, float64 (1 + variables, free)."""
        matrix = torch.zeros(1 + len(self.constraints), 1 + self.variables, dtype=torch.float64)
        matrix[0, 0] = 1  # the pinned scale
        for row, terms in zip(matrix[1:], self.constraints, strict=True):
            for label, coefficient in terms:
                row[label] = coefficient
        relations = torch.zeros(len(self.measured), 1 + self.variables, dtype=torch.float64)
        for row, (output, label) in zip(relations, self.measured.items(), strict=True):
            row[output] = 1
            row[label] -= self.degrees.get(output, 1.0)
        _, values, vectors = torch.linalg.svd(torch.cat([matrix, relations]))
        return vectors[int((values > 1e-9).sum()) :].T

    def equalising(self, measurement: Measurement) -> Tensor:
        """The log-scales u, float64 (1 + variables,), that leave the logs of the rates with the least variance.

        Newton's method for least squares. Between layers whose inputs have one scale, as in a chain, log C_k changes
        by exactly -2 (u_out - u_in), so that the first step ends it; where the blocks of a concatenation come at
        scales of their own, by the blocks' shares. Among equal solutions the smallest change is taken.
        """
        basis = self.basis()
        u = torch.zeros(1 + self.variables, dtype=torch.float64)
        if not basis.shape[1]:
            return u
        logs, slopes = self._log_rates(measurement, u)
        for _ in range(MAX_STEPS):
            centred = slopes - slopes.mean(0)
            step = basis @ torch.linalg.lstsq(centred @ basis, logs.mean() - logs, driver="gelsd").solution
            variance = logs.var(correction=0)
            for _ in range(MAX_HALVINGS):
                logs, slopes = self._log_rates(measurement, u + step)
                if logs.var(correction=0) <= variance:
                    break
                step = step / 2
            u = u + step
            if step.abs().max() < 1e-9 or logs.var(correction=0) > (1 - 1e-9) * variance:
                break
        return u

    def powers_of_two(self, measurement: Measurement, u: Tensor) -> Tensor:
        """Multiples of log 2 near the optimal log-scales u, changed one by one as long as the rates come closer."""
        classes = self._classes()
        sizes = classes.sum(1)
        logs, slopes = self._log_rates(measurement, u)
        slopes = slopes @ classes.T * math.log(2)
        exponents = classes @ u / sizes / math.log(2)
        logs = logs + slopes @ (exponents.round() - exponents)
        exponents = exponents.round()
        while len(classes):
            candidates = torch.cat([logs.unsqueeze(1) + slopes, logs.unsqueeze(1) - slopes], 1)
            variance, move = candidates.var(0, correction=0).min(0)
            if variance > (1 - 1e-9) * logs.var(correction=0):
                break
            exponents[move % len(classes)] += 1 if move < len(classes) else -1
            logs = candidates[:, move]
        return classes.T @ exponents * math.log(2)

    def _classes(self) -> Tensor:
        """Variables forced to be equal, float64 0 or 1 (classes, 1 + variables); without those that are pinned.

        Variables in longer constraints count as pinned.
        """
        equal = torch.eye(1 + self.variables, dtype=torch.bool)
        for row in self.constraints:
            labels = [label for label, _ in row]
            if [coefficient for _, coefficient in row] not in ([1, -1], [-1, 1]):
                labels.append(_PINNED)
            merged = equal[labels].any(0)
            equal[merged] = merged
        return equal[~equal[:, _PINNED]].unique(dim=0).double()

    def _log_rates(self, measurement: Measurement, u: Tensor) -> tuple[Tensor, Tensor]:
        """Logs of the average change rates at the scales u, and their derivatives by u; both float64.

        Multiplying the weights of an input channel by r divides their gradient by r, as the function stays.
        """
        logs, slopes = u.new_zeros(len(self.uses)), u.new_zeros(len(self.uses), len(u))
        for row, use in enumerate(self.uses):
            squares, weights = measurement.squares[use.layer.name], measurement.weights[use.layer.name]
            change = 2 * (u[use.output] - u[use.incoming])
            squares, weights = squares * (-change).exp(), weights * change.exp()
            columns = squares.mean(0).sqrt()
            logs[row] = columns.mean().log() - weights.mean().log() / 2
            # Shares of the layer's rate and of its weights.
            of_group = squares / squares.sum(0).clamp_min(torch.finfo(squares.dtype).tiny)
            shares = columns / columns.sum() * of_group + weights / weights.sum()
            slopes[row].index_add_(0, use.incoming.flatten(), shares.flatten())
            slopes[row, use.output] -= 2
        return logs, slopes

    @torch.no_grad()
    def apply(self, u: Tensor) -> dict[str, float]:
        """Scale the parameters, the running statistics and the constants by the log-scales u.

        Where the scale of a layer's input has to be measured, dividing by it is left to the caller.

        Returns:
            What the weights of each layer were multiplied by; the geometric mean over its input channels.
        """
        u = u.cpu()
        factors = {}
        for use in self.uses:
            layer = use.layer
            logs = u[use.output] - torch.where(self.is_measured(use.incoming), 0.0, u[use.incoming])
            layer.scale_inputs(logs.exp())
            if layer.bias is not None:
                layer.bias.mul_(u[use.output].exp().item())
            factors[layer.name] = logs.mean().exp().item()
        for norm in self.norms:
            _scale_norm(norm, u)
        for parameter, label in self.leaves:
            parameter.mul_(u[label].exp().item())
        for parameter, incoming, output in self.gains:
            parameter.mul_((u[output] - u[incoming.clamp_min(0)]).exp().to(parameter))
        for module, label in self.lrns:
            module.alpha *= (-2 * u[label]).exp().item()
        return factors


def _scale_norm(norm: Norm, u: Tensor) -> None:
    """Let a normalisation take inputs exp(u_in) times larger and give outputs exp(u_out) times larger, exactly.

    With v the running variance of BatchNorm and s the scale, v' + eps = s² (v + eps) keeps the function in spite of
    eps. Where that would need a negative v', it is 0 and the weight takes up the rest. Other normalisations take
    their variance from the input, so that eps itself is scaled.

    Raises:
        InitializationError: there is no weight to do so.
    """
    incoming, outgoing = u[norm.incoming].exp(), u[norm.output].exp().item()
    correction = 1.0
    if norm.variance is not None:
        factor = incoming.to(norm.variance.device, torch.promote_types(norm.variance.dtype, torch.float32))
        total = factor**2 * (norm.variance.to(factor.dtype) + norm.eps)
        norm.mean.copy_(norm.mean * factor)
        norm.variance.copy_((total - norm.eps).clamp_min(0))
        # One step of refinement: rounding would otherwise show in networks that amplify it.
        norm.variance.add_(total - (norm.variance + norm.eps)).clamp_(min=0)
        correction = ((norm.variance + norm.eps) / total).sqrt()
        if norm.weight is None and (total < norm.eps).any():
            raise InitializationError(
                f"a BatchNorm without weights has eps {norm.eps}, too large for an input scaled by "
                f"{incoming.min():.1e}; lower it, or pass affine=True"
            )
    elif norm.module is not None:
        norm.module.eps *= (2 * u[norm.incoming[0]]).exp().item()
    if norm.weight is not None:
        norm.weight.copy_(norm.weight * (outgoing * correction))
    if norm.bias is not None:
        norm.bias.mul_(outgoing)


def trace_scales(graph: Graph, lrn: str) -> Scales:
    """The scales of a graph.

    Args:
        lrn: "estimate" leaves local response normalisations as they are, "exact" scales their constants.
    """
    return _Tracer(graph, lrn).trace()


class _Tracer:
    """Follows the labels through the operations of a graph."""

    def __init__(self, graph: Graph, lrn: str) -> None:
        self.graph = graph
        self.exact_lrn = lrn == "exact"
        self.scales = Scales()
        self.labels: dict[int, Tensor] = {}
        self.uses: dict[str, Use] = {}
        self.norms: dict[tuple[int, ...], Norm] = {}  # by what they scale
        found = graph.layers.found.values()
        self.affine = {graph.layers.owner(tensor) for layer in found for tensor in (layer.weight, layer.bias)} - {None}
        self.lrns: dict[int, int] = {}
        self.computed: dict[int, Tensor] = {}  # parameters by the memory of what `Scaled` computes of them
        self.others: dict[int, list[Tensor]] = {}  # by memory, what is used in a way that no rule scales
        self.rules = {
            **dict.fromkeys(_MOVING | {"pad"}, self._move),
            **dict.fromkeys(_HOMOGENEOUS, self._carry),
            **dict.fromkeys(_POOLING, self._pool),
            **dict.fromkeys(_REDUCING, self._reduce),
            **dict.fromkeys(_ADDING, self._add),
            **dict.fromkeys(_MULTIPLYING, self._multiply),
            **dict.fromkeys(("matmul", "bmm"), self._matmul),
            **dict.fromkeys(_NORMALISING, self._normalise),
            **dict.fromkeys(("clamp", "clamp_min"), self._clamp),
            "copy": lambda operation: [self._of(operation.args[1]).expand(self._shape(operation))],
            "scaled_dot_product_attention": self._attention,
            "batch_norm": self._batch_norm,
            "local_response_norm": self._lrn,
            "__setitem__": self._set,
        }

    def trace(self) -> Scales:
        for operation in self.graph.operations:
            name = _canonical(operation.name)
            self._note_others(operation, name)
            if operation.call is None and not any(map(self._is_followed, operation.inputs)):
                continue
            try:
                outputs = self._apply(operation, name)
            except (RuntimeError, TypeError, IndexError, ValueError) as error:
                message = f"the between-layer step cannot follow {operation.name} ({error}); pass between=False"
                raise InitializationError(message) from error
            for index, labels in zip(operation.outputs, outputs, strict=True):
                if index in operation.inputs and labels.shape == self._of(Ref(index)).shape:  # in place
                    self._overwrite(index, labels)
                else:
                    self.labels[index] = _compact(labels)
        for index in self.graph.outputs:
            self._pin(self._of(Ref(index)))
        self._respect_other_uses()
        return self.scales

    def _apply(self, operation: Operation, name: str) -> list[Tensor]:
        """Labels of the outputs."""
        if operation.call is not None:
            return self._affine(operation)
        rule = self.rules.get(name)
        outputs = None if rule is None or not operation.args else rule(operation)
        return self._unknown(operation) if outputs is None else outputs

    # What rules are made of.

    def _shape(self, operation: Operation) -> torch.Size:
        return self.graph.shapes[operation.outputs[0]]

    def _of(self, leaf) -> Tensor:
        """Labels of an argument: of a value or of a number."""
        if not isinstance(leaf, Ref):
            return _full(_PINNED if leaf else _ZERO, ())
        if leaf.index not in self.labels:
            label = _PINNED
            if self._is_leaf(leaf.index):
                label = self.scales.new()
                self.scales.leaves.append((self._parameter(leaf), label))
            self.labels[leaf.index] = _full(label, self.graph.shapes[leaf.index])
        return self.labels[leaf.index]

    def _is_leaf(self, index: int) -> bool:
        """Whether a value is a parameter of its own, which may take any scale."""
        parameter = self._parameter(Ref(index))
        return parameter is not None and self.graph.layers.owner(parameter) not in self.affine

    def _is_followed(self, index: int) -> bool:
        return index in self.graph.varying or index in self.labels or self._is_leaf(index)

    def _varies(self, leaf) -> bool:
        return isinstance(leaf, Ref) and leaf.index in self.graph.varying

    def _parameter(self, leaf) -> Tensor | None:
        """The whole parameter that an argument is."""
        tensor = self.graph.constants.get(leaf.index) if isinstance(leaf, Ref) else None
        return tensor if isinstance(tensor, nn.Parameter) else None

    def _pin(self, labels: Tensor) -> None:
        for label in labels.unique().tolist():
            self.scales.constrain((int(label), 1))

    def _merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Force two values to the same scales, element by element; their common labels."""
        one, other = torch.broadcast_tensors(one, other)
        merged = torch.where(one == _ZERO, other, one)
        for dimension in range(one.ndim):
            if one.stride(dimension) == other.stride(dimension) == 0:
                one, other = one.narrow(dimension, 0, 1), other.narrow(dimension, 0, 1)
        differ = (one != other) & (one != _ZERO) & (other != _ZERO)
        for a, b in torch.stack([one[differ], other[differ]]).unique(dim=1).T.int().tolist():
            self.scales.constrain((a, 1), (b, -1))
            if self.scales.measured.keys() & {a, b}:  # a measured scale is never exactly another
                self.scales.constrain((a, 1))
        return merged

    def _uniform(self, labels: Tensor, dimensions) -> Tensor:
        """Force a value to one scale along some dimensions, which are kept with size 1."""
        dimensions = tuple(dimensions)
        if not dimensions:
            return labels
        first = labels.amax(dimensions, keepdim=True)
        self._merge(first, labels)
        return first

    def _overwrite(self, index: int, labels: Tensor) -> None:
        """Change a value in place; what was zero is so no longer, in all that shares its memory."""
        if ((self._of(Ref(index)) == _ZERO) & (labels != _ZERO)).any():
            for alias in self.graph.aliases(index):
                if alias in self.labels:
                    self.labels[alias] = torch.where(self.labels[alias] == _ZERO, _PINNED, self.labels[alias])
        self.labels[index] = _compact(self._merge(labels, self._of(Ref(index))))

    # Rules: the labels of an operation's outputs, or None where they do not apply.

    def _unknown(self, operation: Operation) -> list[Tensor]:
        for index in operation.inputs:
            self._pin(self._of(Ref(index)))
        return [_full(_PINNED, self.graph.shapes[index]) for index in operation.outputs]

    def _carry(self, operation: Operation) -> list[Tensor] | None:
        if not isinstance(operation.args[0], Ref):
            return None
        for index in operation.inputs[1:]:  # the slopes of PReLU
            self._pin(self._of(Ref(index)))
        return [self._of(operation.args[0])]

    def _move(self, operation: Operation) -> list[Tensor] | None:
        """The operation itself, on the labels; shifted, so that zeros which it fills in are the label of zero."""
        data = {operation.args[0].index} if isinstance(operation.args[0], Ref) else set(operation.inputs)
        if operation.name == "pad" and not self._pads_with_zeros(operation):
            return None
        indices = [index for index in operation.inputs if index not in data]
        shapes_only = operation.name in ("expand_as", "view_as", "reshape_as")
        if not shapes_only and any(index in self.graph.varying for index in indices):
            return None

        def labels(leaf):
            if not isinstance(leaf, Ref):
                return _resolve(leaf, {}, SIZES[0])
            if leaf.index in data or shapes_only:
                return self._of(leaf) + 1
            return self.graph.fixed[leaf.index].cpu()

        args, kwargs = _map((operation.args, operation.kwargs), labels)
        # Labels that are expanded have other strides than the values, so that a view of them may need a copy.
        func = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}.get(operation.name, operation.func)
        return [moved - 1 for moved in tensors_of(func(*args, **kwargs))]

    def _pads_with_zeros(self, operation: Operation) -> bool:
        mode, value = _given(operation, ("input", "pad", "mode", "value"), ("mode", "value"))
        return mode not in (None, "constant") or not value

    def _pool(self, operation: Operation) -> list[Tensor]:
        labels = self._of(operation.args[0])
        digits = [int(letter) for letter in operation.name if letter.isdigit()]
        spatial = range(labels.ndim - digits[0] if digits else 2, labels.ndim)
        return [self._uniform(labels, spatial).expand(self._shape(operation))]

    def _reduce(self, operation: Operation) -> list[Tensor]:
        labels, shape = self._of(operation.args[0]), self._shape(operation)
        (dimensions,) = _given(operation, ("input", "dim"), ("dim",))
        if dimensions is None:
            dimensions = range(labels.ndim)
        dimensions = [dimensions] if isinstance(dimensions, int) else list(dimensions)
        labels = self._uniform(labels, dimensions)
        return [(labels if labels.ndim == len(shape) else labels.squeeze(tuple(dimensions))).expand(shape)]

    def _add(self, operation: Operation) -> list[Tensor]:
        one, other = _given(operation, ("input", "other"), ("input", "other"))
        return [self._merge(self._of(one), self._of(other)).expand(self._shape(operation))]

    def _multiply(self, operation: Operation) -> list[Tensor] | None:
        one, other = _given(operation, ("input", "other"), ("input", "other"))
        divides = _canonical(operation.name).startswith(("div", "true"))
        if "rounding_mode" in operation.kwargs or (divides and self._varies(other)):
            return None
        for x, gain in ((one, other), (other, one)):
            parameter = self._parameter(gain)
            if parameter is not None and self._varies(x) and not divides:
                return self._gain(operation, x, parameter)
        labels, factor = self._of(one), self._of(other)
        if not (factor == _PINNED).all():
            labels, factor = factor, labels
        if not (factor == _PINNED).all() and isinstance(one, Ref) and isinstance(other, Ref):
            return None
        return [labels.expand(self._shape(operation))]

    def _gain(self, operation: Operation, x, parameter: Tensor) -> list[Tensor]:
        """A parameter that multiplies a value element by element absorbs one scale and emits another."""
        labels, shape = self._of(x), self._shape(operation)
        labels = labels.expand(shape)
        sizes = [1] * (len(shape) - parameter.ndim) + list(parameter.shape)
        incoming = self._uniform(labels, [d for d, size in enumerate(sizes) if size == 1 and shape[d] > 1])
        output = self.scales.new()
        self._pin_measured(incoming)
        self.scales.gains.append((parameter, incoming.expand(sizes).reshape(parameter.shape).long(), output))
        return [_full(output, shape)]

    def _pin_measured(self, labels: Tensor) -> None:
        for label in labels.unique().int().tolist():
            if label in self.scales.measured:
                self.scales.constrain((label, 1))

    def _matmul(self, operation: Operation) -> list[Tensor] | None:
        one, other = (self._of(leaf) for leaf in operation.args[:2])
        if (one == _PINNED).all() and one.ndim > 1 and other.ndim > 1:
            return [self._uniform(other, (-2,)).expand(self._shape(operation))]
        if (other == _PINNED).all() and one.ndim > 1 and other.ndim > 1:
            return [self._uniform(one, (-1,)).expand(self._shape(operation))]
        return None

    def _attention(self, operation: Operation) -> list[Tensor] | None:
        names = ("query", "key", "value", "attn_mask")
        query, key, value, mask = _given(operation, names, names)
        if self.graph.shapes[value.index][:-2] != self._shape(operation)[:-2]:
            return None
        for leaf in (query, key, mask):
            if isinstance(leaf, Ref):
                self._pin(self._of(leaf))
        return [self._uniform(self._of(value), (-2,)).expand(self._shape(operation))]

    def _clamp(self, operation: Operation) -> list[Tensor] | None:
        low, high = _given(operation, ("input", "min", "max"), ("min", "max"))
        return [self._of(operation.args[0])] if low == 0 and type(low) in (int, float) and high is None else None

    def _set(self, operation: Operation) -> list[Tensor] | None:
        target, where, value = operation.args
        found = []
        _map(where, lambda leaf: found.append(leaf) if isinstance(leaf, Ref) else None)
        if any(map(self._varies, found)):
            return None
        index = _map(where, lambda leaf: _resolve(leaf, self.graph.fixed, SIZES[0]))
        labels = torch.zeros(self.graph.shapes[target.index]) + _ZERO
        labels[index] = self._of(value)
        self._overwrite(target.index, labels)
        return []

    def _affine(self, operation: Operation) -> list[Tensor]:
        layer = operation.call.layer
        labels = self._of(input_of(operation.args, operation.kwargs))
        channel = labels.ndim - 1 if layer.linear else labels.ndim - layer.weight.ndim + 1
        vector = self._uniform(labels, [d for d in range(labels.ndim) if d != channel]).flatten().long().clamp_min(0)
        output = _PINNED if layer.computed_bias else self.scales.new()
        use = Use(layer, vector.view(layer.groups, -1), output)
        first = self.uses.setdefault(layer.name, use)
        if first is use:
            self.scales.uses.append(use)
        else:  # the same weights and bias: the same factors
            if layer.bias is not None:
                self.scales.constrain((first.output, 1), (output, -1))
            pairs = torch.stack([vector, first.incoming.flatten()])
            self._pin_measured(pairs)
            for label, other in pairs.unique(dim=1).T.tolist():
                self.scales.constrain((output, 1), (label, -1), (first.output, -1), (other, 1))
        return [_full(output, self._shape(operation))]

    def _batch_norm(self, operation: Operation) -> list[Tensor] | None:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        x, mean, variance, weight, bias, training, eps = _given(operation, names, (*names[:6], names[7]))
        statistics = [self.graph.constants.get(leaf.index) for leaf in (mean, variance) if isinstance(leaf, Ref)]
        if operation.func is not F.batch_norm or training or len(statistics) < 2 or None in statistics:
            return None
        labels = self._of(x)
        incoming = self._uniform(labels, [d for d in range(labels.ndim) if d != 1]).flatten().long().clamp_min(0)
        self._pin_measured(incoming)
        parameters = self._parameters(weight, bias)
        if parameters is None:
            return None
        eps = 1e-5 if eps is None else eps  # the default of the function
        norm = Norm(incoming, 0, *parameters, mean=statistics[0], variance=statistics[1], eps=eps)
        return self._emit(operation, norm)

    def _normalise(self, operation: Operation) -> list[Tensor] | None:
        """Normalisation by the input's own statistics, of which eps is one constant for the whole module."""
        weight, bias, running = _given(operation, _NORM_ARGUMENTS[operation.name], ("weight", "bias", "running_mean"))
        parameters = self._parameters(weight, bias)
        if parameters is None or running is not None:
            return None
        labels = self._of(operation.args[0])
        incoming = self._uniform(labels, range(labels.ndim)).flatten().long().clamp_min(0)
        self._pin_measured(incoming)
        module = operation.module
        if module is None or getattr(module, "weight", None) is not parameters[0] or module.eps is None:
            self._pin(incoming)
            module = None
        return self._emit(operation, Norm(incoming, 0, *parameters, module=module))

    def _parameters(self, weight, bias) -> tuple[Tensor | None, Tensor | None] | None:
        """Weight and bias of a normalisation; None where they are not parameters."""
        found = self._parameter(weight), self._parameter(bias)
        return None if (weight is not None and found[0] is None) or (bias is not None and found[1] is None) else found

    def _emit(self, operation: Operation, norm: Norm) -> list[Tensor]:
        parts = (norm.weight, norm.bias, norm.module, norm.mean, norm.variance)
        known = self.norms.setdefault(tuple(map(id, parts)), norm)
        if known is norm:
            norm.output = self.scales.new() if norm.weight is not None else _PINNED
            self.scales.norms.append(norm)
        else:  # the same parameters: the same scales
            self._merge(norm.incoming.float(), known.incoming.float())
            norm = known
        return [_full(norm.output, self._shape(operation))]

    def _lrn(self, operation: Operation) -> list[Tensor] | None:
        labels = self._of(operation.args[0])
        label = int(self._uniform(labels, range(labels.ndim)).item())
        if label <= 0:
            return None
        if not self.exact_lrn:
            output = self.scales.new()
            self.scales.measured[output] = label
            return [_full(output, self._shape(operation))]
        module = operation.module
        if not isinstance(module, nn.LocalResponseNorm):
            return None
        first = self.lrns.setdefault(id(module), label)
        if first == label:
            self.scales.lrns.append((module, label))
        self.scales.constrain((first, 1), (label, -1))
        return [labels]

    # Parameters that something else uses as well.

    def _note_others(self, operation: Operation, name: str) -> None:
        """Note uses of parameters of affine layers, and of buffers, other than as what they are."""
        if operation.call is not None:
            return
        fixed, owner = self.graph.fixed, self.graph.layers.owner
        tensors = [fixed[index] for index in operation.inputs if index in fixed]
        if self.graph.layers.is_scaling(operation.func, tuple(tensors)):
            self.computed[_memory(fixed[operation.outputs[0]])] = tensors[0]
            return
        outputs = {_memory(fixed[index]) if index in fixed else None for index in operation.outputs}
        normalises = name in _NORMALISING | {"batch_norm"}
        for tensor in tensors:
            view, tensor = outputs == {_memory(tensor)}, self.computed.get(_memory(tensor), tensor)
            parameter = owner(tensor)
            if not view and (parameter in self.affine or (parameter is None and not normalises)):
                self.others.setdefault(_memory(tensor), []).append(tensor)

    def _respect_other_uses(self) -> None:
        """Leave alone what two would scale, and what is used in a way that scales nothing."""
        scaled: dict[int, list[tuple[Tensor, set[tuple[int, int]]]]] = {}  # by memory; with labels that go out and in

        def scales(tensor: Tensor | None, output: int, *incoming: int) -> None:
            if tensor is not None:
                pairs = {(output, label) for label in incoming or (_PINNED,)}
                scaled.setdefault(_memory(tensor), []).append((tensor, pairs))

        for use in self.scales.uses:
            scales(use.layer.weight, use.output, *use.incoming.flatten().tolist())
            scales(use.layer.bias, use.output)
        for norm in self.scales.norms:
            for tensor in (norm.weight, norm.bias, norm.mean, norm.variance):
                scales(tensor, norm.output, _PINNED, *norm.incoming.tolist())
        for parameter, label in self.scales.leaves:
            scales(parameter, label)
        for parameter, incoming, output in self.scales.gains:
            scales(parameter, output, *incoming.flatten().tolist())
        for memory, group in scaled.items():
            others = self.others.get(memory, [])
            for tensor, pairs in group:
                if sum(overlap(tensor, other) for other in [*others, *(other for other, _ in group)]) > 1:
                    for output, label in pairs:
                        self.scales.constrain((output, 1), (label, -1))


_NORM_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


def _canonical(name: str) -> str:
    """The operation that a function, a method, an operator and its in-place variant have in common."""
    name = _OPERATORS.get(name, name)
    return name if name.startswith("_") else name.removesuffix("_")


def _given(operation: Operation, names: tuple[str, ...], wanted: tuple[str, ...]) -> list:
    """Arguments by name; None where they are not given."""
    given = dict(zip(names, operation.args, strict=False)) | operation.kwargs
    return [given.get(name) for name in wanted]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _full(label: int, shape) -> Tensor:
    return torch.tensor(float(label)).expand(shape)


def _compact(labels: Tensor) -> Tensor:
    """The same labels, without memory for dimensions along which they are the same."""
    shape = labels.shape
    for dimension in range(labels.ndim):
        head = labels.narrow(dimension, 0, min(1, labels.shape[dimension]))
        if labels.stride(dimension) == 0 or bool((labels == head).all()):
            labels = head
    return labels.expand(shape)
