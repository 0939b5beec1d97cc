"""How a change of scale travels through the operations of a graph.

Homogeneous operations hand the scale on, operations that move elements (views, concatenation, channel shuffles) move
it along, additions force what they add to one scale, normalisations absorb it and emit one of their own, and
everything else pins it. So there is a rule for each operation, which gives the labels of what comes out (see `_labels`)
from those of what goes in.
"""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from initializers._calls import AFFINE, BLANK, FILLED, MODULE_FUNCTIONS, VIEWS, input_of
from initializers._graph import SIZES, Graph, Operation, Ref, at_size, map_tree, resolve
from initializers._labels import ZERO, Labels, full
from initializers._layer import Layer, memory, overlap
from initializers._model import InitializationError
from initializers._outputs import tensors_of
from initializers._scaled import COPIES
from initializers._scales import PINNED, Norm, Scales, Use

Lrn = Literal["estimate", "exact"]
Outputs = Literal["keep", "free"]

# Operations by the name of their function; methods, operators and in-place variants share it.
_MOVING = VIEWS | {
    *("ravel", "swapaxes", "swapdims", "moveaxis", "adjoint", "expand_as", "broadcast_to", "repeat", "tile"),
    *("repeat_interleave", "split_with_sizes", "tensor_split", "select", "narrow", "index_select", "roll", "flip"),
    *("rot90", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "unfold", "pixel_shuffle"),
    *("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "atleast_2d", "diagonal"),
}
_HOMOGENEOUS = {
    *("relu", "leaky_relu", "prelu", "abs", "neg", "positive", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("feature_dropout", "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type_as"),
    *("data", "cpu", "cuda", "requires_grad", "alias", "rrelu", "nan_to_num", "tril", "triu", "real", "imag", "conj"),
    *("conj_physical", "resolve_conj"),
}
_POOLING = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
_POOLING |= {"interpolate", "upsample", "lp_pool1d", "lp_pool2d", "max_unpool1d", "max_unpool2d", "max_unpool3d"}
_POOLING |= {"fractional_max_pool2d", "fractional_max_pool3d"}
_POOLING |= {f"{name}_with_indices" for name in _POOLING if "max_pool" in name}
# They take, order or add up elements along a dimension. The last one where none is given.
_ALONG = {
    **dict.fromkeys(("sort", "cumsum"), ("input", "dim")),
    "topk": ("input", "k", "dim"),
    **{
        "gather": ("input", "dim", "index"),
        "take_along_dim": ("input", "indices", "dim"),
        "diff": ("input", "n", "dim"),
    },
    **dict.fromkeys(("index_add", "index_copy"), ("input", "dim", "index", "source")),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), ("input", "dim", "index", "src", "reduce")),
}
_ADDED = ("source", "src", "value", "prepend", "append")  # what else goes in there
_REDUCING = {"mean", "sum", "amax", "amin", "std"}
_NORMS = {"norm", "vector_norm", "linalg_norm", "linalg_vector_norm"}
_SIGNS = {"sign", "sgn", "signbit", "angle", "isnan", "isinf", "isfinite"}  # no scale changes them
_COMPARING = {"gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal"}
# Powers of what comes in: (of the scale that goes out, of that which comes in), which are equal.
_POWERS = {"square": (1, 2), "sqrt": (2, 1), "rsqrt": (2, -1), "reciprocal": (1, -1)}
_FOURIER = {f"fft_{kind}fft{n}" for kind in ("", "i", "r", "ir", "h", "ih") for n in ("", "2", "n")}
_FOURIER |= {"fft_fftshift", "fft_ifftshift"}
_ADDING = {"add", "sub", "subtract", "rsub", "maximum", "minimum", "fmax", "fmin"}
_MULTIPLYING = {"mul", "multiply", "div", "divide", "true_divide"}
_NORMALISING = {"layer_norm", "group_norm", "instance_norm", "rms_norm"}
_OPERATORS = {
    f"__{prefix}{operator}__": operator for operator in ("add", "sub", "mul", "matmul") for prefix in ("", "i", "r")
}
_OPERATORS |= {"__pow__": "pow", "__ipow__": "pow", "__truediv__": "div", "__itruediv__": "div", "__neg__": "neg"}
_OPERATORS |= {f"__{operator}__": operator for operator in ("gt", "ge", "lt", "le", "eq", "ne")}


def propagate(graph: Graph, lrn: Lrn | None, outputs: Outputs = "keep") -> Scales:
    """The scales of a graph.

    Args:
        outputs: "keep" pins the outputs of the model, "free" gives each of them a scale.
        lrn: "estimate" leaves local response normalisations as they are, "exact" scales their constants, None those
            that the state dict holds.
    """
    return _Propagation(graph, lrn).run(outputs)


class _Propagation(Labels):
    """Follows the labels through the operations of a graph."""

    def __init__(self, graph: Graph, lrn: Lrn | None) -> None:
        super().__init__(graph)
        self.lrn = lrn
        self.uses: dict[str, Use] = {}
        self.norms: dict[tuple[int, ...], Norm] = {}  # by what they scale
        self.lrns: dict[int, int] = {}
        self.computed: dict[int, Tensor] = {}  # parameters by the memory of what `AuxiliaryScaling` computes of them
        self.others: dict[int, list[Tensor]] = {}  # by memory, what is used in a way that no rule scales
        self.rules = {
            **dict.fromkeys(_MOVING | {"pad"}, self._move),
            **dict.fromkeys(_HOMOGENEOUS, self._carry),
            **dict.fromkeys(_POOLING, self._pool),
            **dict.fromkeys(("roi_pool", "roi_align"), self._roi_pool),
            **dict.fromkeys(_ALONG, self._along),
            **dict.fromkeys(("argmax", "argmin", "argsort"), self._rank),
            **dict.fromkeys(_REDUCING, self._reduce),
            **dict.fromkeys(("max", "min", "median"), self._largest),
            **dict.fromkeys(_NORMS, self._norm),
            **dict.fromkeys(_SIGNS, lambda operation: [full(PINNED, self._shape(operation))]),
            **dict.fromkeys(_COMPARING, self._compare),
            "where": self._where,
            "masked_fill": self._masked_fill,
            "_threshold": self._threshold,
            "lerp": self._lerp,
            "grid_sample": self._grid_sample,
            "fold": self._fold,
            **dict.fromkeys(_FOURIER, self._fourier),
            **dict.fromkeys(("view_as_real", "view_as_complex"), self._view_parts),
            **dict.fromkeys(MODULE_FUNCTIONS, self._unscaled),
            **dict.fromkeys(_ADDING, self._add),
            **dict.fromkeys(_MULTIPLYING, self._multiply),
            **dict.fromkeys([*_POWERS, "pow"], self._power),
            **dict.fromkeys(BLANK | FILLED, self._make),
            "normalize": self._normalize,
            **dict.fromkeys(("matmul", "bmm", "mm", "spmm", "_sparse_mm"), self._matmul),
            **dict.fromkeys(("addcmul", "addcdiv"), self._add_product),
            "einsum": self._einsum,
            **dict.fromkeys(_NORMALISING, self._own_statistics),
            **dict.fromkeys(("clamp", "clamp_min", "clip"), self._clamp),
            "copy": lambda operation: [self._of(operation.args[1]).expand(self._shape(operation))],
            "scaled_dot_product_attention": self._attention,
            "batch_norm": self._batch_norm,
            "local_response_norm": self._lrn,
            "__setitem__": self._set,
        }

    def run(self, outputs: Outputs) -> Scales:
        for position, operation in enumerate(self.graph.operations):
            self.position, name = position, _canonical(operation.name)
            self._note_others(operation, name)
            if operation.call is None and name not in BLANK and not any(map(self._is_followed, operation.inputs)):
                continue
            try:
                self._label(operation, self._apply(operation, name))
            except (RuntimeError, TypeError, IndexError, ValueError) as error:
                message = f"the between-layer step cannot follow {operation.name} ({error}); pass between=False"
                raise InitializationError(message) from error
        if outputs == "keep":
            kept = [index for index in {*self.graph.outputs} if (self._of(Ref(index)) > PINNED).any()]
            self.scales.outputs_kept = len(kept)
        for index in self.graph.others:
            self._pin(self._of(Ref(index)))
        for index in self.graph.outputs:
            labels = self._of(Ref(index))
            if outputs == "keep":
                self._pin(labels)
            else:
                self.scales.outputs.append(max(PINNED, int(self._uniform(labels, range(labels.ndim)).item())))
        self._respect_other_uses()
        return self.scales

    def _apply(self, operation: Operation, name: str) -> list[Tensor]:
        """Labels of the outputs."""
        if operation.call is not None:
            return self._affine(operation, operation.call.layer)
        rule = self.rules.get(name)
        outputs = None if rule is None or not operation.args else rule(operation)
        return self._unknown(operation) if outputs is None else outputs

    # Rules: the labels of an operation's outputs, or None where they do not apply.

    def _unknown(self, operation: Operation) -> list[Tensor]:
        for index in operation.inputs:
            labels = self._of(Ref(index))
            self._hold(labels, operation)
            self._pin(labels)
        return [full(PINNED, self.graph.shapes[index]) for index in operation.outputs]

    def _hold(self, labels: Tensor, operation: Operation, how: str = "") -> None:
        """Name an operation that gives one scale whatever it takes, where it takes what could have another."""
        if (labels > PINNED).any():
            self.scales.pinned_by.add(_canonical(operation.name).strip("_") + how)

    def _make(self, operation: Operation) -> list[Tensor]:
        return [full(ZERO if _canonical(operation.name) in BLANK else PINNED, self._shape(operation))]

    def _carry(self, operation: Operation) -> list[Tensor] | None:
        if not isinstance(operation.args[0], Ref):
            return None
        if _canonical(operation.name) not in COPIES:  # which take the precision of another tensor alone
            for index in operation.inputs[1:]:  # the slopes of PReLU
                self._pin(self._of(Ref(index)))
        return [self._of(operation.args[0])]

    def _move(self, operation: Operation) -> list[Tensor] | None:
        """The operation itself, on the labels.

        They are shifted by one: what an operation fills in are zeros (padding, for instance), which become the label
        `ZERO` = -1 when the shift is undone.
        """
        data = {operation.args[0].index} if isinstance(operation.args[0], Ref) else set(operation.inputs)
        if operation.name == "pad" and not self._pads_with_any_scale(operation):
            return None
        indices = [index for index in operation.inputs if index not in data]
        shapes_only = operation.name in ("expand_as", "view_as", "reshape_as")
        if not shapes_only and any(index in self.graph.varying for index in indices):
            return self._pick(operation)

        def labels(leaf):
            if not isinstance(leaf, Ref):
                return resolve(leaf, {}, SIZES[0])
            if leaf.index in data or shapes_only:
                return self._of(leaf) + 1
            return self.graph.fixed[leaf.index].cpu()

        args, kwargs = map_tree((operation.args, operation.kwargs), labels)
        # Labels that are expanded have other strides than the values, so that a view of them may need a copy.
        copying: dict[str, Any] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
        func = copying.get(operation.name, operation.func)
        moved = tensors_of(func(*args, **kwargs))
        return [(labels - 1).nan_to_num_(posinf=ZERO, neginf=ZERO) for labels in moved]

    def _pick(self, operation: Operation) -> list[Tensor] | None:
        """Elements at places that depend on the images, of one scale along the dimensions in which they are chosen."""
        labels, shape = self._of(operation.args[0]), self._shape(operation)
        if operation.name == "index_select":
            dimension, index = operation.given(("input", "dim", "index"), ("dim", "index"))
            where = [slice(None)] * (dimension % labels.ndim) + [index]
        elif operation.name == "__getitem__":
            where = [*operation.args[1]] if isinstance(operation.args[1], tuple) else [operation.args[1]]
        else:
            return None
        if not (labels.numel() and math.prod(shape)) or any(isinstance(part, bool | list) for part in where):
            return None  # of what no image chose is not known what becomes of it
        for part in where:
            if isinstance(part, Ref):
                self._pin(self._of(part))
        masked = self._mask_dimensions(where, labels.ndim - len(shape))
        if masked:
            return [self._uniform(labels, range(masked)).squeeze(tuple(range(1, masked))).expand(shape)]
        if ... in where:
            whole = [slice(None)] * (labels.ndim - sum(part not in (None, ...) for part in where))
            where[where.index(...) : where.index(...) + 1] = whole
        parts = [part for part in where if part is not None]  # one of each dimension
        labels = self._uniform(labels, [d for d, part in enumerate(parts) if isinstance(part, Ref)])
        found = labels[tuple(map_tree(part, self._anywhere) for part in where)]
        if found.ndim == len(shape):
            found = found[tuple(map(slice, shape))]  # a mask chooses at most as many as there are
        return [found] if found.shape == shape else None

    def _anywhere(self, leaf):
        """A part of an index, with the first place for each that it chooses."""
        if isinstance(leaf, Ref):
            return torch.zeros(self.graph.shapes[leaf.index], dtype=torch.long)
        return at_size(leaf, SIZES[0])

    def _mask_dimensions(self, where: list, fewer: int) -> int:
        """Of how many dimensions a mask chooses, where it is all that chooses, and gives so many dimensions fewer.

        Places, which as many dimensions have as a mask, give more than there were.
        """
        size = len(self.graph.shapes[where[0].index]) if len(where) == 1 and isinstance(where[0], Ref) else 0
        return size if size > 1 and fewer == size - 1 else 0

    def _pads_with_any_scale(self, operation: Operation) -> bool:
        """With values of the image, with zeros, or with -inf, as before max pooling."""
        mode, value = operation.given(("input", "pad", "mode", "value"), ("mode", "value"))
        return mode not in (None, "constant") or not value or (isinstance(value, float) and math.isinf(value))

    def _pool(self, operation: Operation) -> list[Tensor]:
        labels = self._of(operation.args[0])
        digits = [int(letter) for letter in operation.name if letter.isdigit()]
        spatial = range(labels.ndim - digits[0] if digits else 2, labels.ndim)
        pooled = self._uniform(labels, spatial).expand(self._shape(operation))
        return [pooled, *self._indices(operation)]

    def _roi_pool(self, operation: Operation) -> list[Tensor]:
        """torchvision's: a region of some image and position, the channels stay. What else comes out is indices."""
        maps, *regions = operation.inputs
        for index in regions:
            self._pin(self._of(Ref(index)))
        pooled = self._uniform(self._of(Ref(maps)), (0, 2, 3)).expand(self._shape(operation))
        return [pooled, *self._indices(operation)]

    def _indices(self, operation: Operation) -> list[Tensor]:
        """Of what else comes out: no scale changes it."""
        return [full(PINNED, self.graph.shapes[index]) for index in operation.outputs[1:]]

    def _along(self, operation: Operation) -> list[Tensor] | None:
        """What comes out has the scale of all along the dimension; what else comes out is indices."""
        name, shape = _canonical(operation.name), self._shape(operation)
        given = dict(zip(_ALONG[name], operation.args, strict=False)) | operation.kwargs
        dimension = given.get("dim", None if name == "take_along_dim" else -1)
        if dimension is None or not shape or given.get("reduce") in ("prod", "multiply"):
            return None
        values = [given[key] for key in ("input", *_ADDED) if given.get(key) is not None]
        for index in {*operation.inputs} - {leaf.index for leaf in values if isinstance(leaf, Ref)}:
            self._pin(self._of(Ref(index)))
        found, along = full(ZERO, shape), dimension % len(shape)
        for labels in map(self._of, values):
            if labels.ndim == len(shape):  # and no number
                # `gather` may leave out what is last of the other dimensions, `scatter` write to what is first.
                sizes = [labels.shape[d] if d == along else min(size, labels.shape[d]) for d, size in enumerate(shape)]
                labels = labels[tuple(map(slice, sizes))]
                labels = self._uniform(labels, {along, *(d for d, size in enumerate(shape) if sizes[d] < size)})
            found = self._merge(labels, found)
        return [found, *self._indices(operation)]

    def _rank(self, operation: Operation) -> list[Tensor]:
        """Places in an order, which no scale of all that is ordered changes."""
        labels = self._of(operation.args[0])
        (dimension,) = operation.given(("input", "dim"), ("dim",))
        if dimension is None and operation.name == "argsort":
            dimension = -1
        self._uniform(labels, range(labels.ndim) if dimension is None else [dimension])
        return [full(PINNED, self._shape(operation))]

    def _reduce(self, operation: Operation, names: tuple[str, ...] = ("input", "dim")) -> list[Tensor] | None:
        labels, shape = self._of(operation.args[0]), self._shape(operation)
        (dimensions,) = operation.given(names, ("dim",))
        if isinstance(dimensions, bool):  # of `std`, whether it is unbiased
            return None
        if dimensions is None:
            dimensions = range(labels.ndim)
        dimensions = [dimensions] if isinstance(dimensions, int) else list(dimensions)
        labels = self._uniform(labels, dimensions)
        return [(labels if labels.ndim == len(shape) else labels.squeeze(tuple(dimensions))).expand(shape)]

    def _largest(self, operation: Operation) -> list[Tensor] | None:
        """Of two values, of all, or along a dimension: there indices come out, too."""
        (other,) = operation.given(("input", "other"), ("other",))
        if isinstance(other, Ref):
            return self._add(operation)
        return [*(self._reduce(operation) or []), *self._indices(operation)]

    def _norm(self, operation: Operation) -> list[Tensor] | None:
        names = ("input", "p", "dim")
        if 0 in operation.given(names, ("p", "ord")):  # which counts
            return None
        return self._reduce(operation, names)

    def _compare(self, operation: Operation) -> list[Tensor] | None:
        """With 0, which no scale changes."""
        sides = (self._of(leaf) for leaf in operation.given(("input", "other"), ("input", "other")))
        return [full(PINNED, self._shape(operation))] if any(bool((side == ZERO).all()) for side in sides) else None

    def _where(self, operation: Operation) -> list[Tensor] | None:
        if len(operation.args) != 3:
            return None
        condition, one, other = operation.args
        if operation.func is Tensor.where:
            condition, one = one, condition
        return self._choose(operation, condition, one, other)

    def _masked_fill(self, operation: Operation) -> list[Tensor]:
        names = ("input", "mask", "value")
        one, mask, other = operation.given(names, names)
        return self._choose(operation, mask, one, other)

    def _choose(self, operation: Operation, condition, one, other) -> list[Tensor]:
        self._pin(self._of(condition))
        return self._join(operation, one, other)

    def _lerp(self, operation: Operation) -> list[Tensor]:
        names = ("input", "end", "weight")
        one, other, weight = operation.given(names, names)
        return self._choose(operation, weight, one, other)

    def _threshold(self, operation: Operation) -> list[Tensor] | None:
        limits = operation.given(("input", "threshold", "value"), ("threshold", "value"))
        return [self._of(operation.args[0])] if limits == [0, 0] else None

    def _grid_sample(self, operation: Operation) -> list[Tensor]:
        maps, grid = operation.given(("input", "grid"), ("input", "grid"))
        self._pin(self._of(grid))
        labels = self._of(maps)
        return [self._uniform(labels, range(2, labels.ndim)).expand(self._shape(operation))]

    def _fold(self, operation: Operation) -> list[Tensor]:
        """Adds up what overlaps: (..., channels * kernel, windows) -> (..., channels, height, width)."""
        shape = self._shape(operation)
        windows = self._of(operation.args[0]).unflatten(-2, (shape[-3], -1))
        return [self._uniform(windows, (windows.ndim - 2, windows.ndim - 1)).expand(shape)]

    def _fourier(self, operation: Operation) -> list[Tensor]:
        """One scale along the dimensions that are transformed, or shifted."""
        labels, name = self._of(operation.args[0]), operation.name
        shifts = name.endswith("shift")
        (dimensions,) = operation.given(("input", "dim") if shifts else ("input", "n", "dim"), ("dim",))
        if dimensions is None:
            dimensions = range(labels.ndim) if shifts or name.endswith("n") else (-2, -1) if name.endswith("2") else -1
        dimensions = [dimensions] if isinstance(dimensions, int) else dimensions
        return [self._uniform(labels, dimensions).expand(self._shape(operation))]

    def _view_parts(self, operation: Operation) -> list[Tensor]:
        """A complex number and its two parts, along a last dimension of their own, have one scale."""
        labels, shape = self._of(operation.args[0]), self._shape(operation)
        if labels.ndim < len(shape):
            return [labels.unsqueeze(-1).expand(shape)]
        return [self._uniform(labels, (-1,)).squeeze(-1)]

    def _unscaled(self, operation: Operation) -> list[Tensor] | None:
        """A convolution or linear map whose weights no scale multiplies: frozen, computed, or a fixed blur."""
        given = dict(zip(AFFINE[operation.name], operation.args, strict=False)) | operation.kwargs
        if self._varies(given["weight"]) or not self._varies(given["input"]):
            return None
        labels, shape, groups = self._of(given["input"]), self._shape(operation), given.get("groups", 1)
        channel = labels.ndim - 1 if operation.name == "linear" else 1
        if len(shape) <= channel:  # of a product with a vector
            return None
        rows = self._by_channel(labels, channel).view(groups, -1)
        each = self._uniform(rows, (1,)).expand(groups, shape[channel] // groups).flatten()
        if given.get("bias") is not None:
            each = self._merge(each, self._of(given["bias"]))
        return [each.view(-1, *[1] * (len(shape) - 1 - channel)).expand(shape)]

    def _add(self, operation: Operation) -> list[Tensor]:
        one, other = operation.given(("input", "other"), ("input", "other"))
        return self._join(operation, one, other)

    def _join(self, operation: Operation, one, other) -> list[Tensor]:
        """What two values that come together give: they have one scale."""
        labels = self._of(one), self._of(other)
        for leaf, (constant, x) in ((one, labels), (other, labels[::-1])):
            if not self._varies(leaf) and bool((constant == PINNED).any()):
                self._hold(x, operation, " of a constant")
        return [self._merge(*labels).expand(self._shape(operation))]

    def _add_product(self, operation: Operation) -> list[Tensor]:
        names = ("input", "tensor1", "tensor2")
        one, left, right = (self._of(leaf) for leaf in operation.given(names, names))
        product = self._product(left, right, -1 if _canonical(operation.name) == "addcdiv" else 1)
        return [self._merge(one, product).expand(self._shape(operation))]

    def _multiply(self, operation: Operation) -> list[Tensor] | None:
        one, other = operation.given(("input", "other"), ("input", "other"))
        divides = _canonical(operation.name).startswith(("div", "true"))
        if "rounding_mode" in operation.kwargs:
            return None
        for x, gain in ((one, other), (other, one)):
            parameter = self._parameter(gain)
            if parameter is not None and self._varies(x) and not divides:
                return self._gain(operation, x, parameter)
        return [self._product(self._of(one), self._of(other), -1 if divides else 1).expand(self._shape(operation))]

    def _power(self, operation: Operation) -> list[Tensor] | None:
        labels, name = self._of(operation.args[0]), _canonical(operation.name)
        if name == "pow":
            (exponent,) = operation.given(("input", "exponent"), ("exponent",))
            if not isinstance(exponent, int | float) or not exponent or not math.isfinite(exponent):
                return None
            power = Fraction(exponent).limit_denominator(8)
            if float(power) != exponent:
                return None
            going, coming = power.denominator, power.numerator
        else:
            going, coming = _POWERS[name]
        powers = {ZERO: ZERO, PINNED: PINNED}
        for label in {*labels.unique().int().tolist()} - {ZERO, PINNED}:
            self._pin_through_lrn(torch.tensor([label]))
            powers[label] = self.scales.new()
            self.scales.constrain((powers[label], going), (label, -coming))
        return [torch.stack([(labels == label) * powers[label] for label in powers]).sum(0).float()]

    def _normalize(self, operation: Operation) -> list[Tensor]:
        """Divided by its norm, so that no scale goes out."""
        labels = self._of(operation.args[0])
        self._uniform(labels, range(labels.ndim))
        self._hold(labels, operation)
        return [full(PINNED, self._shape(operation))]

    def _gain(self, operation: Operation, x, parameter: Tensor) -> list[Tensor]:
        """A parameter that multiplies a value element by element absorbs one scale and emits another."""
        labels, shape = self._of(x), self._shape(operation)
        labels = labels.expand(shape)
        sizes = [1] * (len(shape) - parameter.ndim) + list(parameter.shape)
        incoming = self._uniform(labels, [d for d, size in enumerate(sizes) if size == 1 and shape[d] > 1])
        output = self.scales.new()
        self._pin_through_lrn(incoming)
        incoming = incoming.expand(sizes).reshape(parameter.shape).long().clamp_min(0)
        self.scales.gains.append((parameter, incoming, output))
        return [full(output, shape)]

    def _matmul(self, operation: Operation) -> list[Tensor] | None:
        one, other = (self._of(leaf) for leaf in operation.args[:2])
        if min(one.ndim, other.ndim) < 2:
            return None
        return [self._product(self._uniform(one, (-1,)), self._uniform(other, (-2,))).expand(self._shape(operation))]

    def _einsum(self, operation: Operation) -> list[Tensor] | None:
        """A sum of products, over the letters that do not come out."""
        equation, *operands = operation.args
        if not isinstance(equation, str) or "->" not in equation:
            return None
        if isinstance(operands[0], list | tuple):
            (operands,) = operands
        inputs, output = equation.replace(" ", "").split("->")
        output = _letters(output, len(self._shape(operation)))
        factors = []
        for leaf, term in zip(operands, inputs.split(","), strict=True):
            labels = self._of(leaf)
            letters = _letters(term, labels.ndim)
            if len({*letters}) < len(letters):  # a diagonal
                return None
            summed = tuple(dimension for dimension, letter in enumerate(letters) if letter not in output)
            kept = [letter for letter in letters if letter in output]
            labels = self._uniform(labels, summed).squeeze(summed)
            labels = labels.permute([kept.index(letter) for letter in output if letter in kept])
            factors.append(labels[tuple(slice(None) if letter in kept else None for letter in output)])
        return [reduce(self._product, factors).expand(self._shape(operation))]

    def _attention(self, operation: Operation) -> list[Tensor] | None:
        names = ("query", "key", "value", "attn_mask")
        query, key, value, mask = operation.given(names, names)
        if self.graph.shapes[value.index][:-2] != self._shape(operation)[:-2]:
            return None
        products = [self._of(leaf) for leaf in (query, key)]
        if products[0].shape[:-2] == products[1].shape[:-2]:  # what one grows by the other may shrink by
            one, other = (self._uniform(labels, (-2, -1)) for labels in products)
            products = [self._product(one, other)]
        for labels in (*products, *([self._of(mask)] if isinstance(mask, Ref) else [])):
            self._hold(labels, operation)
            self._pin(labels)
        return [self._uniform(self._of(value), (-2,)).expand(self._shape(operation))]

    def _clamp(self, operation: Operation) -> list[Tensor] | None:
        low, high = operation.given(("input", "min", "max"), ("min", "max"))
        return [self._of(operation.args[0])] if low == 0 and type(low) in (int, float) and high is None else None

    def _set(self, operation: Operation) -> list[Tensor]:
        target, where, value = operation.args
        shape, given = self.graph.shapes[target.index], self._of(value)
        chosen = []
        map_tree(where, lambda leaf: chosen.append(leaf) if self._varies(leaf) else None)
        if chosen:  # any place may be among them
            for index in chosen:
                self._pin(self._of(index))
            labels = full(int(self._uniform(given, range(given.ndim)).item()), shape)
        else:
            labels = full(ZERO, shape).clone()
            labels[map_tree(where, lambda leaf: resolve(leaf, self.graph.fixed, SIZES[0]))] = given
        self._overwrite(target.index, labels)
        return []

    def _affine(self, operation: Operation, layer: Layer) -> list[Tensor]:
        labels = self._of(input_of(operation.name, operation.args, operation.kwargs))
        vector = self._by_channel(labels, labels.ndim - 1 if layer.linear else 1).long().clamp_min(0)
        output = self.scales.new() if layer.fixed_bias is None and labels.numel() else PINNED
        use = Use(layer, vector.view(layer.groups, -1), output)
        first = self.uses.setdefault(layer.name, use)
        if first is use:
            self.scales.uses.append(use)
        else:  # the same weights and bias: the same factors
            if layer.bias is not None:
                self.scales.constrain((first.output, 1), (output, -1))
            pairs = torch.stack([vector, first.incoming.flatten()])
            self._pin_through_lrn(pairs)
            for label, other in pairs.unique(dim=1).T.tolist():
                self.scales.constrain((output, 1), (label, -1), (first.output, -1), (other, 1))
        return [full(output, self._shape(operation))]

    def _batch_norm(self, operation: Operation) -> list[Tensor] | None:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        x, mean, variance, weight, bias, training, eps = operation.given(names, (*names[:6], names[7]))
        statistics = [self.graph.constants.get(leaf.index) for leaf in (mean, variance) if isinstance(leaf, Ref)]
        if operation.func is not F.batch_norm or training or len(statistics) < 2 or None in statistics:
            return None
        labels = self._of(x)
        incoming = self._by_channel(labels, 1).long().clamp_min(0)
        self._pin_through_lrn(incoming)
        parameters = self._parameters(weight, bias)
        if parameters is None:
            return None
        eps = 1e-5 if eps is None else eps  # the default of the function
        module = operation.module
        own = (getattr(module, "running_var", None), getattr(module, "eps", None))
        if parameters[0] is None and (own[0] is not statistics[1] or own[1] != eps):
            return None  # nothing could take up what eps cannot
        norm = Norm(incoming, 0, *parameters, module=module, mean=statistics[0], variance=statistics[1], eps=eps)
        return self._emit(operation, norm)

    def _own_statistics(self, operation: Operation) -> list[Tensor] | None:
        """Normalisation by the input's own statistics, of which eps is one constant for the whole module."""
        weight, bias, running = operation.given(_NORM_ARGUMENTS[operation.name], ("weight", "bias", "running_mean"))
        parameters = self._parameters(weight, bias)
        if parameters is None or running is not None:
            return None
        labels = self._of(operation.args[0])
        incoming = self._uniform(labels, range(labels.ndim)).flatten().long().clamp_min(0)
        self._pin_through_lrn(incoming)
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
            norm.output = self.scales.new() if norm.weight is not None else PINNED
            if norm.weight is None:
                self._hold(norm.incoming, operation, " without weights")
            self.scales.norms.append(norm)
        else:  # the same parameters: the same scales
            self._merge(norm.incoming.float(), known.incoming.float())
            norm = known
        return [full(norm.output, self._shape(operation))]

    def _lrn(self, operation: Operation) -> list[Tensor] | None:
        labels = self._of(operation.args[0])
        label = int(self._uniform(labels, range(labels.ndim)).item())
        if label <= 0:
            return None
        module = operation.module if isinstance(operation.module, nn.LocalResponseNorm) else None
        if self.lrn == "estimate" or (self.lrn is None and (module is None or "alpha" not in module.state_dict())):
            output = self.scales.new()
            self.scales.through_lrn[output] = label
            return [full(output, self._shape(operation))]
        if module is None:
            return None
        first = self.lrns.setdefault(id(module), label)
        if first == label:
            self.scales.lrns.append((module, label))
        self.scales.constrain((first, 1), (label, -1))
        return [labels]

    # Parameters that something else uses as well.

    def _note_others(self, operation: Operation, name: str) -> None:
        """Note uses of parameters of affine layers, and of buffers, other than as what they are."""
        if name in BLANK | FILLED:
            return
        fixed, owner = self.graph.fixed, self.graph.layers.owner
        inputs = operation.inputs
        if operation.call is not None:
            inputs = [input_of(operation.name, operation.args, operation.kwargs).index]
        tensors = [fixed[index] for index in inputs if index in fixed]
        given = self.graph.fixed_args(operation)
        known = tuple(self.computed.get(memory(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in given)
        scaled = self.graph.layers.scaling(operation.func, known, operation.kwargs)
        if scaled is not None and operation.outputs[0] in fixed:
            self.computed[memory(fixed[operation.outputs[0]])] = scaled[0]
            return
        outputs = {memory(fixed[index]) if index in fixed else None for index in operation.outputs}
        normalises = name in _NORMALISING | {"batch_norm"}
        for tensor in tensors:
            view, tensor = outputs == {memory(tensor)}, self.computed.get(memory(tensor), tensor)
            parameter = owner(tensor)
            if not view and (parameter in self.affine or (parameter is None and not normalises)):
                self.others.setdefault(memory(tensor), []).append(tensor)

    def _respect_other_uses(self) -> None:
        """Leave alone what two would scale, and what is used in a way that scales nothing.

        A part of memory that several would scale (tied weights, rows of one parameter), or that `others` use, keeps its
        values: whatever goes out of it has the scale of what comes in.
        """
        by_memory: dict[int, list[tuple[Tensor, set[tuple[int, int]]]]] = {}
        for tensor, pairs in self._scaled():
            by_memory.setdefault(memory(tensor), []).append((tensor, pairs))
        for address, group in by_memory.items():
            users = [*self.others.get(address, []), *(tensor for tensor, _ in group)]  # each tensor is one of its own
            for tensor, pairs in group:
                if sum(overlap(tensor, user) for user in users) > 1:
                    for output, label in pairs:
                        self.scales.constrain((output, 1), (label, -1))

    def _scaled(self) -> Iterator[tuple[Tensor, set[tuple[int, int]]]]:
        """What the scales would multiply, with the labels that go out of it and come in."""
        found: list[tuple[Tensor | None, int, Iterable[int]]] = []
        for use in self.scales.uses:
            found.append((use.layer.weight, use.output, use.incoming.flatten().tolist()))
            found.append((use.layer.bias, use.output, [PINNED]))
        for norm in self.scales.norms:
            parts = (norm.weight, norm.bias, norm.mean, norm.variance)
            found += [(part, norm.output, [PINNED, *norm.incoming.tolist()]) for part in parts]
        found += [(parameter, label, [PINNED]) for parameter, label in self.scales.leaves]
        found += [(gain, output, incoming.flatten().tolist()) for gain, incoming, output in self.scales.gains]
        for tensor, output, labels in found:
            if tensor is not None:
                yield tensor, {(output, label) for label in labels}


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


def _letters(term: str, ndim: int) -> str:
    """A letter for each dimension of a term of an einsum; digits for those of an ellipsis, which meet at its end."""
    return term.replace("...", "9876543210"[10 - (ndim - len(term) + 3) :])
