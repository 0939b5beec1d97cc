"""Affine layers as a forward pass uses them: which parameter a convolution or linear map multiplies its input by.

Layers are found by the calls of `linear` and `conv*`, not by the classes of modules: a functional call, the packed
projection of an attention module and a layer inside another framework's class are seen like any `nn.Linear`.
"""

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad
from torch.overrides import TorchFunctionMode

from initializers._model import InitializationError, outputs_of, scripted
from initializers._weight_norm import WeightNorm, computed, weight_norms

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
# Names of the functions and of their arguments in order.
AFFINE = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(("matmul", "__matmul__", "mm"), ("input", "weight")),
    "addmm": ("bias", "input", "weight"),
    "einsum": ("equation", "input", "weight"),
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
}
RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial"),
    *(
        "normal",
        "poisson",
        "rrelu_with_noise",
        "normal_",
        "uniform_",
        "bernoulli_",
        "exponential_",
        "cauchy_",
        "random_",
    ),
    *("log_normal_", "geometric_"),
}
SCRIPTED = (
    "no layer of the model can be seen, as it is scripted: initialize it before torch.jit.script or torch.jit.trace"
)
MODULE_FUNCTIONS = {"linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))}
PIECE = 500_000  # values of a large tensor that are worked on at a time: 2 MB, which fit the cache
# By the number of dimensions of the weight.
_WEIGHT_GRADIENTS = {3: grad.conv1d_weight, 4: grad.conv2d_weight, 5: grad.conv3d_weight}
NO_LAYER = "the model has no affine layer (convolution or linear) that runs and is not frozen: there is nothing to do"
ALL_COMPUTED = (
    "the model computes the weights of all its layers, as spectral_norm and other parametrizations and quantization "
    "do: initialize it before these are added, or remove them "
    "(torch.nn.utils.parametrize.remove_parametrizations), initialize, and register them again"
)
TRANSFORMED = (
    "the model computes inside torch.vmap or another transform of torch.func, where its layers cannot be seen: give "
    "them the whole batch"
)
MODULES = (nn.Linear, nn.modules.conv._ConvNd)
_PRODUCTS = {"mul": 1, "multiply": 1, "div": -1, "divide": -1, "true_divide": -1}  # and the power of the second

# `multi_head_attention_forward` hands itself to the active mode before anything else; this copy goes straight on, so
# that the mode sees the projections within.
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


class AuxiliaryScaling(nn.Module):
    """The paper's auxiliary scaling, as a parametrization: the layer computes with `factor` times its parameter.

    The factor has a value for each row, as the rows of a packed projection may be several layers.
    """

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, parameter: Tensor) -> Tensor:
        """The effective weight or bias."""
        return parameter * self.factor

    def right_inverse(self, value: Tensor) -> Tensor:
        """The parameter of which `value` is the effective one."""
        return value / self.factor


@dataclass
class Scaled:
    """A product of a parameter with constants: with a factor for each row, and with a mask of zeros and ones.

    Attributes:
        parameter: it, or a view of it, whose parameter is `whole`.
    """

    output: Tensor
    parameter: Tensor
    whole: Tensor | None
    factor: Tensor
    mask: Tensor | None

    @property
    def is_parameter(self) -> bool:
        """Whether the model has made the product the value of the parameter."""
        return self.whole is not None and memory(self.whole) == memory(self.output)

    def compute(self) -> Tensor:
        """The product as the parameter is now."""
        product = self.parameter * self.factor
        return product if self.mask is None else product * self.mask


@dataclass(eq=False)
class Layer:
    """An affine layer.

    Attributes:
        name: of the module, or of the parameter where it is no module's `weight`.
        weight: the parameter, or a view of some of its rows.
        bias: likewise; None where there is none that can be set.
        groups, transposed: of a convolution.
        factor, bias_factor: what the layer multiplies its weight and its bias by before it computes, as those of
            `AuxiliaryScaling`, or of an "equalized learning rate".
        fixed_bias: what it adds where that cannot be set, as the model computes it or it is frozen.
        mask: 0 for weights that the model multiplies by 0 (pruned ones), or that its own forward pass sets to 0, see
            `with_masks`; shaped like the weight.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    transposed: bool = False
    factor: Tensor | None = None
    fixed_bias: Tensor | None = None
    bias_factor: Tensor | None = None
    mask: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer and no convolution."""
        return self.weight.ndim == 2

    def as_blocks(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight as a view (groups, outputs, inputs, kernel) of each group's matrix."""
        blocks = weight.view(self.groups, len(weight) // self.groups, weight.shape[1], -1)
        return blocks.transpose(1, 2) if self.transposed else blocks

    @property
    def blocks(self) -> Tensor:
        """The weight as a view (groups, outputs, inputs, kernel)."""
        return self.as_blocks(self.weight.detach())

    @property
    def out_channels(self) -> int:
        """Output channels or features."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def fan_in(self) -> int:
        """Number of inputs of each output, of one group."""
        return self.blocks.shape[2] * self.blocks.shape[3]

    def set_weight(self, blocks: Tensor) -> None:
        """Compute with these weights (groups, outputs, inputs, kernel) from now on, and with no bias."""
        if self.factor is not None:
            blocks = blocks / self.factor
        if memory(blocks) != memory(self.weight):
            self.blocks.copy_(blocks)
        if self.mask is not None:
            self.weight.mul_(self.mask)
        if self.bias is not None:
            self.bias.zero_()

    def scale_inputs(self, factors: Tensor) -> None:
        """Multiply the weights of each input channel by `factors` (groups, inputs)."""
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        self.blocks.mul_(factors.to(self.weight.device, precise).unsqueeze(1).unsqueeze(3))


@dataclass
class Call:
    """One use of a layer, with the geometry of a convolution (one number per spatial dimension)."""

    layer: Layer
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()  # before and after
    dilation: tuple[int, ...] = ()

    def windows(self, x: Tensor) -> Tensor:
        """What the layer multiplies by its weights: (images, *positions, *kernel, channels), a view.

        For a convolution, of the padded input in channels-last layout, which is a copy; the kernel of a linear layer
        has no dimensions, and its positions are all dimensions of the input but the first and the last.
        """
        if self.layer.linear:
            return x
        x = self._pad(x).movedim(1, -1).contiguous()
        first, *strides, last = x.stride()
        kernel = self.layer.weight.shape[2:]
        each = zip(x.shape[1:-1], kernel, self.stride, self.dilation, strict=True)
        positions = [(size - step * (extent - 1) - 1) // stride + 1 for size, extent, stride, step in each]
        moves = [stride * step for stride, step in zip(strides, self.stride, strict=True)]
        steps = [stride * step for stride, step in zip(strides, self.dilation, strict=True)]
        return x.as_strided((len(x), *positions, *kernel, x.shape[-1]), (first, *moves, *steps, last))

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient of the weight, shaped like it, for an input and the gradient of the output; over all rows."""
        layer = self.layer
        if layer.linear:
            return gradient.flatten(0, -2).T @ x.flatten(0, -2)
        convolution_weight = _WEIGHT_GRADIENTS[layer.weight.ndim]
        geometry = {"stride": self.stride, "dilation": self.dilation, "groups": layer.groups}
        if layer.transposed:  # the convolution whose input is the gradient and whose output is x
            x, gradient = gradient, x
        return convolution_weight(self._pad(x), layer.weight.shape, gradient, **geometry)

    def _pad(self, x: Tensor) -> Tensor:
        sides = [side for pair in reversed(self.padding) for side in pair]
        return F.pad(x, sides) if any(sides) else x


@dataclass
class Layers:
    """The affine layers of a model, found as calls to them are seen."""

    model: nn.Module
    names: tuple[str, ...] = ()  # by which the model takes the last of its inputs
    trainable: bool = False  # only those whose weights are not frozen
    found: dict[str, Layer] = field(default_factory=dict)  # in order of execution
    per_image: bool | None = None  # whether the rows of all inputs are the images; None where nothing ran yet
    functional_dropout: set[float] = field(default_factory=set)  # probabilities of dropout by functions, inactive
    random: set[str] = field(default_factory=set)  # names of functions that drew random numbers
    computed: bool = False  # whether the weight of a use was computed of parameters

    @cached_property
    def _parameters(self) -> dict[int, list[tuple[str, Tensor]]]:
        found: dict[int, list[tuple[str, Tensor]]] = {}  # by storage, which parameters of one flat vector share
        for name, parameter in self.model.named_parameters():
            if parameter.numel():
                found.setdefault(memory(parameter), []).append((name, parameter))
        return found

    def find(self, tensor: Tensor) -> tuple[str | None, Tensor | None]:
        """The parameter that a tensor is, or of which it is a view, and its name."""
        if isinstance(tensor, nn.Parameter) and memory(tensor) not in self._parameters:
            del self._parameters  # whose memory the model has exchanged
        candidates = self._parameters.get(memory(tensor), ())
        return next((found for found in candidates if overlap(found[1], tensor)), (None, None))

    def _is_buffer(self, tensor: Tensor) -> bool:
        return any(memory(buffer) == memory(tensor) for buffer in self.model.buffers())

    def _is_kept(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to a parameter that is frozen, where these are left alone."""
        _, parameter = self.find(tensor)  # views of it that are made without gradients look frozen themselves
        return self.trainable and parameter is not None and not parameter.requires_grad

    @cached_property
    def _factors(self) -> dict[int, Tensor]:
        scalings = [module for module in self.model.modules() if isinstance(module, AuxiliaryScaling)]
        factors = [scaling.get_buffer("factor") for scaling in scalings]
        return {id(factor): factor for factor in factors}

    def owner(self, tensor: Tensor | None) -> str | None:
        """Name of the parameter that `tensor` is, or of which it is a view."""
        return None if tensor is None else self.find(tensor)[0]

    @cached_property
    def weight_norms(self) -> dict[int, WeightNorm]:
        """By the id of the direction v."""
        return {id(norm.v): norm for norm in weight_norms(self.model)}

    def unscalable(self, layer: Layer) -> str:
        """Why an `AuxiliaryScaling` cannot be inserted for a layer; empty where it can."""
        _, parameter = self.find(layer.weight)
        if id(parameter) in self.weight_norms:
            return "weight_norm has a scale of its own"
        path = (self.owner(layer.weight) or "").rpartition(".")[0]
        if any(not isinstance(part, AuxiliaryScaling) for part in _parametrizations(self.model.get_submodule(path))):
            return "its weight has another parametrization"
        modules = [m for m in self.model.modules() if any(other is parameter for other in m.parameters(False))]
        return "its weight belongs to several modules" if len(modules) > 1 else ""

    @property
    def no_layer(self) -> str:
        """Why there is no layer."""
        return SCRIPTED if any(scripted(self.model)) else ALL_COMPUTED if self.computed else NO_LAYER

    def scaling(self, func: Callable, args: tuple) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The parameter, the factor and the mask where a function multiplies a parameter by a constant.

        That is what `AuxiliaryScaling` has, a number, a buffer of one value, or one of zeros and ones for each weight.
        """
        name = getattr(func, "__name__", "")
        if name not in _PRODUCTS or len(args) != 2:
            return None
        one, other = args[::-1] if isinstance(args[1], Tensor) and self.find(args[1])[1] is not None else args
        if not isinstance(one, Tensor) or self.find(one)[1] is None or (one is args[1] and _PRODUCTS[name] < 0):
            return None
        if isinstance(other, Tensor):
            of_rows = id(other) in self._factors
            buffers = [buffer for buffer in self.model.buffers() if buffer.shape == other.shape]
            if not of_rows and not any(torch.equal(buffer.to(other.dtype), other) for buffer in buffers):
                return None
            if not of_rows and other.numel() != 1:
                fits = other.shape == one.shape and bool(((other == 0) | (other == 1)).all())
                return (one, one.new_ones(()), other.to(one).contiguous()) if fits and _PRODUCTS[name] > 0 else None
        elif not isinstance(other, int | float) or other <= 0:
            return None
        factor = other.detach() if isinstance(other, Tensor) else one.new_tensor(other)
        return one, factor ** _PRODUCTS[name], None

    def call(self, function: str, given: dict[str, Any], sources: dict[int, Scaled]) -> Call | None:
        """The use of an affine layer that this call of an affine function is; None if it is none.

        Args:
            function: of the function.
            given: its arguments by name.
            sources: by memory, the products of parameters with constants.
        """
        weight, factor, mask = _source(given["weight"], sources)
        bias, bias_factor, _ = (None,) * 3 if given.get("bias") is None else _source(given["bias"], sources)
        name = self._name(weight)
        if name is None or self._is_kept(weight) or weight.is_complex():
            self.computed |= name is None and function in MODULE_FUNCTIONS and not self._is_buffer(weight)
            return None
        transposed = function.startswith("conv_transpose")
        layer = self.found.get(name)
        if layer is None:
            fixed = bias if bias is not None and (self.rows(bias) is None or self._is_kept(bias)) else None
            bias = bias if fixed is None else None
            groups = given.get("groups", 1)
            layer = Layer(name, weight, bias, groups, transposed, factor, fixed, bias_factor, mask)
            _check_memory(layer)
            self.found[name] = layer
        elif (layer.groups, layer.transposed) != (given.get("groups", 1), transposed):
            return None  # a tied weight, which is a layer only as what it was first
        elif layer.weight.stride() != weight.stride():
            return None  # turned
        elif bias is not None and (layer.bias is None or not overlap(bias, layer.bias)) and layer.fixed_bias is None:
            return None
        if layer.linear:
            return Call(layer)
        kernel = weight.shape[2:]
        dilation = _each(given.get("dilation", 1), kernel)
        padding = given.get("padding", 0)
        if padding == "same":
            totals = [step * (extent - 1) for step, extent in zip(dilation, kernel, strict=True)]
            pairs = tuple((total // 2, total - total // 2) for total in totals)
        else:
            pairs = tuple((side, side) for side in _each(0 if padding == "valid" else padding, kernel))
        return Call(layer, _each(given.get("stride", 1), kernel), pairs, dilation)

    def rows(self, tensor: Tensor) -> tuple[str, int | None] | None:
        """The parameter of which a tensor is the whole (None) or the rows from the given number on."""
        name, parameter = self.find(tensor)
        if name is None or parameter is None:
            return None
        if tensor.shape == parameter.shape and tensor.stride() == parameter.stride():
            return name, None
        if tensor.numel() == parameter.numel() and _is_dense(tensor) and _is_dense(parameter):
            return (name, None) if _has_kernel(tensor) else None  # of other dimensions, or of another order of them
        if tensor.shape[1:] != parameter.shape[1:] or tensor.stride() != parameter.stride():
            return None
        return name, int(tensor.storage_offset() - parameter.storage_offset()) // parameter.stride(0)

    def _name(self, weight: Tensor) -> str | None:
        found = self.rows(weight) or (self.rows(weight.t()) if weight.ndim == 2 else None)
        if found is None:
            return None
        norm = self.weight_norms.get(id(self.find(weight)[1]))
        name, first = layer_name(found[0] if norm is None else norm.name), found[1]
        return name if first is None else f"{name}[{first}:{first + len(weight)}]"


def memory(tensor: Tensor) -> int:
    """Address of a tensor's memory, which its views share; a sparse tensor has no memory of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _parametrizations(module: nn.Module) -> list[nn.Module]:
    """The parametrizations of the parameter that a module holds, where it is there for these."""
    return list(module) if isinstance(module, nn.utils.parametrize.ParametrizationList) else []


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has each value of its stretch of memory once, in whatever order."""
    needed = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and step != needed:
            return False
        needed *= size
    return True


def _has_kernel(tensor: Tensor) -> bool:
    """Whether the dimensions behind the first two can be seen as one."""
    try:
        tensor.view(*tensor.shape[:2], -1)
    except RuntimeError:
        return False
    return True


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    if memory(one) != memory(other):
        return False
    ends = []
    for tensor in (one, other):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        ends.append((tensor.storage_offset(), tensor.storage_offset() + last))
    return bool(ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1])


def layer_name(parameter: str) -> str:
    """Name of the layer that a parameter, by its full name, is the weight of."""
    name = parameter.replace("parametrizations.", "").removesuffix(".original")
    return name.removesuffix("weight").rstrip("._") or name


def affine_modules(model: nn.Module) -> Iterator[Layer]:
    """The affine layers that modules of torch's own classes hold, in order of definition, whether they run or not."""
    names = {id(parameter): layer_name(name) for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, MODULES):
            pairs = [(module.weight, module.bias)]
        elif isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None:
                pairs = [(module.in_proj_weight, module.in_proj_bias)]
            else:
                weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
                biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.detach().chunk(3)
                pairs = list(zip(weights, biases, strict=True))
        else:
            continue
        for weight, bias in pairs:
            if id(weight) in names:  # not where a parametrization computes it
                transposed = getattr(module, "transposed", False)
                yield Layer(names[id(weight)], weight, bias, getattr(module, "groups", 1), transposed)


class AffineMode(TorchFunctionMode):
    """Sees every torch function that runs inside it; `visit` decides what a use of an affine layer gives."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.sources: dict[int, Scaled] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._functorch.maybe_current_level() is not None:  # where tensors have no memory to know them by
            raise InitializationError(TRANSFORMED)
        weight = computed(self.layers.weight_norms, func, args)
        if weight is not None:
            return weight
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        given = _arguments(func, args, kwargs)
        if given is not None and _unbatched(given):
            with self:
                return _as_batch(func, args, kwargs)
        probability, active = dropout_of(func.__name__, args, kwargs)
        if probability and not active:
            self.layers.functional_dropout.add(probability)
        if func.__name__ in RANDOM:
            self.layers.random.add(func.__name__.removesuffix("_"))
        call = None if given is None else self.layers.call(func.__name__, given, self.sources)
        output = self.operation(func, args, kwargs, call)
        self._note_scaled(func, args, output)
        return output

    def _note_scaled(self, func: Callable, args: tuple, output) -> None:
        """Note a product of a parameter, or of such a product, with a constant."""
        if func.__name__ not in _PRODUCTS:
            return
        before = [self.sources.get(memory(arg)) if isinstance(arg, Tensor) else None for arg in args[:2]]
        known = [arg if source is None else source.parameter for arg, source in zip(args, before, strict=False)]
        found = self.layers.scaling(func, (*known, *args[2:]))
        if found is None or not isinstance(output, Tensor):
            return
        parameter, factor, mask = found
        for source in before:
            if source is not None:
                factor = factor * source.factor
                mask = source.mask if mask is None else mask if source.mask is None else mask * source.mask
        _, whole = self.layers.find(parameter)
        self.sources[memory(output)] = Scaled(output, parameter, whole, factor, mask)

    def operation(self, func: Callable, args: tuple, kwargs: dict, call: Call | None):
        """Compute `func(*args, **kwargs)`, which is the given use of an affine layer or none."""
        raise NotImplementedError


class _Visitor(AffineMode):
    def __init__(self, layers: Layers, visit: Callable[[Call, Tensor, Callable[[], Tensor]], Tensor]) -> None:
        super().__init__(layers)
        self.visit = visit

    def operation(self, func: Callable, args: tuple, kwargs: dict, call: Call | None):
        if call is None:
            return func(*args, **kwargs)
        used = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
        sources = [self.sources[memory(tensor)] for tensor in used if memory(tensor) in self.sources]
        sources = [source for source in sources if not source.is_parameter]

        def compute():
            refresh()
            return func(*args, **kwargs)

        def refresh() -> None:
            if not torch.is_grad_enabled():  # where weights are set
                for source in sources:
                    source.output.copy_(source.compute())

        output = self.visit(call, input_of(func.__name__, args, kwargs), compute)
        refresh()
        return output


def forward(
    layers: Layers,
    inputs: tuple[Tensor, ...],
    visit: Callable[[Call, Tensor, Callable[[], Tensor]], Tensor],
    others: list[Tensor] | None = None,
) -> list[Tensor]:
    """One forward pass in which `visit(call, input, compute)` gives the output of each use of an affine layer.

    Returns:
        What the model returns; see `outputs_of`, and for `others`, too.
    """
    copies = tuple(x.clone() for x in inputs)  # which it may change in place
    with _Visitor(layers, visit):
        return outputs_of(layers.model, copies, layers.names, others)


def dropout_of(name: str, args: tuple, kwargs: dict) -> tuple[float, bool]:
    """Probability of a call of a dropout function, 0 where it is another function, and whether it is active."""
    if name == "scaled_dot_product_attention":
        probability = (dict(zip(("q", "k", "v", "mask", "dropout_p"), args, strict=False)) | kwargs).get(
            "dropout_p", 0.0
        )
        return probability, True
    if "dropout" not in name:
        return 0.0, False
    given = dict(zip(("input", "p", "train"), args, strict=False)) | kwargs
    return given.get("p", 0.5), bool(given.get("training", given.get("train", True)))


def input_of(name: str, args: tuple, kwargs: dict):
    """The input among the arguments of an affine function."""
    if name == "einsum":
        found = _linear_einsum(args[0])
        return _operands(args)[0 if found is None else found[0]]
    given = dict(zip(AFFINE[name], args, strict=False)) | kwargs
    return next(given[key] for key in ("input", "mat1") if key in given)


def _arguments(func: Callable, args: tuple, kwargs: dict) -> dict[str, Any] | None:
    """The arguments of an affine function by name, its weight with outputs first; None for another function."""
    names = AFFINE.get(func.__name__)
    if names is None:
        return None
    if func.__name__ == "einsum":
        found = _linear_einsum(args[0])
        if found is None:
            return None
        operands = _operands(args)
        if operands[found[0]].ndim < 2:
            return None
        weight = operands[1 - found[0]].detach()
        return {"input": operands[found[0]], "weight": weight if found[1] else weight.t()}
    given = dict(zip(names, args, strict=False)) | kwargs
    if func.__name__ in MODULE_FUNCTIONS:
        return given if given["weight"].ndim > 1 else None
    weight = next((given[key] for key in ("weight", "other", "mat2") if key in given), None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or {"beta", "alpha", "out"} & given.keys():
        return None
    return given | {"weight": weight.detach().t()}


def _unbatched(given: dict[str, Any]) -> bool:
    """Whether these are the arguments of an affine function of one image, without a dimension of images."""
    return "input" in given and bool(given["input"].ndim == max(1, given["weight"].ndim - 1))


def _as_batch(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """What an affine function makes of one image, by way of a batch of it."""
    if args:
        return func(args[0].unsqueeze(0), *args[1:], **kwargs).squeeze(0)
    return func(**kwargs | {"input": kwargs["input"].unsqueeze(0)}).squeeze(0)


def _operands(args: tuple) -> tuple:
    return tuple(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]


@cache
def _linear_einsum(equation: Any) -> tuple[int, bool] | None:
    """Where an equation is a linear map of the last dimension of x by a matrix: which of two operands x is, and
    whether the outputs are the rows of the matrix."""
    if not isinstance(equation, str) or equation.count(",") != 1 or "->" not in equation:
        return None
    operands, result = equation.replace(" ", "").split("->")
    first, second = operands.split(",")
    for number, (x, matrix) in enumerate(((first, second), (second, first))):
        outputs = matrix.replace(x[-1:], "", 1)
        if len(matrix) == 2 and len(outputs) == 1 and outputs not in x and result == x[:-1] + outputs:
            return number, matrix[0] == outputs
    return None


def _check_memory(layer: Layer) -> None:
    """Raises InitializationError: the weight shares memory with itself, or is cut out of a larger tensor."""
    shared = any(step == 0 and size > 1 for step, size in zip(layer.weight.stride(), layer.weight.shape, strict=True))
    try:
        layer.as_blocks(layer.weight)
    except RuntimeError:
        shared = True
    if shared:
        raise InitializationError(
            f"layer {layer.name}: its weight is expanded or cut out of a larger tensor, so that it cannot be set; give "
            "it memory of its own (nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format)))"
        )


def channel_statistics(layer: Layer, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each output channel over images and positions; two (out_channels,).

    Both are 0 where no image reaches the layer, as where each goes to one of several experts.
    """
    positions = 1 if layer.linear else outputs[0][0, 0].numel()
    parts = [output.detach().reshape(-1, layer.out_channels, positions) for output in outputs if len(output)]
    if not parts:
        return layer.weight.new_zeros(layer.out_channels), layer.weight.new_zeros(layer.out_channels)
    count = sum(part.shape[0] * part.shape[2] for part in parts)
    # Positions first, as they are contiguous, then images: many times faster than torch.var_mean, and as exact.
    precise = torch.promote_types(parts[0].dtype, torch.float32)
    mean = torch.as_tensor(sum(part.to(precise).sum(2).sum(0) for part in parts)) / count
    squares = torch.zeros_like(mean)
    for part in parts:
        for piece in part.split(max(1, PIECE // part[0].numel())):  # a copy that fits the cache
            squares += torch.linalg.vector_norm(piece.to(precise) - mean.unsqueeze(1), dim=2).square().sum(0)
    return mean, squares.div(count).sqrt()


def _source(tensor: Tensor, sources: dict[int, Scaled]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The parameter, or its rows, of which a tensor is the product with constants, and their factor and mask.

    A layer may use a part of what was computed (the rows of a packed projection): it is found by its offset in memory.
    """
    found = sources.get(memory(tensor))
    if found is None or found.is_parameter or found.output.stride() != found.parameter.stride():
        return tensor, None, None
    offset = int(tensor.storage_offset() - found.output.storage_offset())
    row = offset // max(1, found.output.stride(0)) if found.output.ndim else 0
    factor = found.factor.flatten()[row if found.factor.numel() > 1 else 0]
    if tensor is found.output:
        return found.parameter, factor, found.mask
    shape, strides = tensor.shape, tensor.stride()
    mask = None if found.mask is None else found.mask.as_strided(shape, strides, offset)
    return found.parameter.as_strided(shape, strides, found.parameter.storage_offset() + offset), factor, mask


def _each(value: int | tuple[int, ...], kernel: torch.Size) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)
    return values * len(kernel) if len(values) == 1 else values
