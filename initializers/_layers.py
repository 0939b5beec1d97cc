"""The affine layers of a model: which parameter a convolution or linear map multiplies its input by.

Layers are found by the calls of `linear` and `conv*`, not by the classes of modules: a functional call, the packed
projection of an attention module and a layer inside another framework's class are seen like any `nn.Linear`.
"""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from initializers._calls import (
    METADATA,
    MODULE_FUNCTIONS,
    RANDOM,
    VIEWS,
    arguments_of,
    as_batch,
    attention,
    dropout_of,
    input_of,
    unbatched,
)
from initializers._layer import Call, Layer, check_memory, has_kernel, is_dense, memory, overlap
from initializers._model import InitializationError, scripted
from initializers._outputs import outputs_of
from initializers._scaled import COPIES, MASKING, PRODUCTS, AuxiliaryScaling, Scaled, source_of
from initializers._weight_norm import WeightNorm, multiplied, weight_norms

SCRIPTED = (
    "no layer of the model can be seen, as it is scripted: initialize it before torch.jit.script or torch.jit.trace"
)
EXPORTED = (
    "no layer of the model can be seen, as it computes by operators of torch.ops: initialize it before torch.export"
)
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


@dataclass
class Layers:
    """The affine layers of a model, found as calls to them are seen."""

    model: nn.Module
    names: tuple[str, ...] = ()  # by which the model takes the last of its inputs
    trainable: bool = False  # only those whose weights are not frozen
    found: dict[str, Layer] = field(default_factory=dict)  # in order of execution
    per_image: bool | None = None  # whether the rows of all inputs are the images; None where nothing ran yet
    elsewhere: set[int] = field(default_factory=set)  # memory of parameters whose values other functions took, too
    differentiates: bool = False  # whether the forward pass takes gradients
    unseen: set[str] | None = None  # names of those whose gradients do not all come by their outputs; as above
    functional_dropout: set[float] = field(default_factory=set)  # probabilities of dropout by functions, inactive
    random: set[str] = field(default_factory=set)  # names of functions that drew random numbers
    drawn: bool = False  # whether these, or dropout that is active, drew any
    computed: bool = False  # whether the weight of a use was computed of parameters
    operators: bool = False  # whether operators ran that functions of torch stand for, as in exported programs
    numbers: bool = False  # whether numbers are computed of weights, so that one that multiplies weights may change
    apart: set[str] = field(default_factory=set)  # of what is found, what computes weights of others, and is no layer

    def anew(self) -> "Layers":
        """The layers of the same model, of which nothing ran yet."""
        return Layers(self.model, self.names, self.trainable, numbers=self.numbers, apart=self.apart)

    @cached_property
    def _parameters(self) -> dict[int, list[tuple[str, Tensor]]]:
        found: dict[int, list[tuple[str, Tensor]]] = {}  # by storage, which parameters of one flat vector share
        for name, parameter in self.model.named_parameters():
            if parameter.numel():
                found.setdefault(memory(parameter), []).append((name, parameter))
        return found

    @property
    def memory_of_parameters(self) -> Set[int]:
        """Where the parameters of the model are, see `memory`."""
        return self._parameters.keys()

    def find(self, tensor: Tensor) -> tuple[str | None, Tensor | None]:
        """The parameter that a tensor is, or of which it is a view, and its name."""
        if isinstance(tensor, nn.Parameter) and memory(tensor) not in self._parameters:
            del self._parameters  # whose memory the model has exchanged
        candidates = self._parameters.get(memory(tensor), ())
        return next((found for found in candidates if overlap(found[1], tensor)), (None, None))

    def _is_buffer(self, tensor: Tensor) -> bool:
        return any(memory(buffer) == memory(tensor) for buffer in self.model.buffers())

    def _is_learned(self, tensor: Tensor) -> bool:
        _, parameter = self.find(tensor)
        return parameter is not None and parameter.requires_grad

    def _constants(self, shape: torch.Size) -> list[Tensor]:
        """Buffers and frozen parameters of a shape."""
        frozen = (parameter for parameter in self.model.parameters() if not parameter.requires_grad)
        return [tensor for tensor in (*self.model.buffers(), *frozen) if tensor.shape == shape]

    def _is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor has the values of a constant, in whatever precision."""
        return any(torch.equal(constant.to(tensor.dtype), tensor) for constant in self._constants(tensor.shape))

    def _is_mask(self, tensor: Tensor) -> bool:
        """Whether a tensor is not 0 where a constant is not, or where one is; or 0 everywhere."""
        mask = tensor != 0
        masks = [constant != 0 for constant in self._constants(tensor.shape)]
        return not mask.any() or any(torch.equal(mask, each) or torch.equal(mask, ~each) for each in masks)

    def _is_kept(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to a parameter that is frozen, where these are left alone."""
        _, parameter = self.find(tensor)  # views of it that are made without gradients look frozen themselves
        return self.trainable and parameter is not None and not parameter.requires_grad

    @cached_property
    def factors(self) -> dict[int, Tensor]:
        """What weights are multiplied by, of auxiliary scalings and of `unnormalised`, by id."""
        scalings = [module for module in self.model.modules() if isinstance(module, AuxiliaryScaling)]
        factors = [scaling.get_buffer("factor") for scaling in scalings]
        return {id(factor): factor for factor in (*factors, *(norm.g for norm in self.weight_norms.values()))}

    def owner(self, tensor: Tensor | None) -> str | None:
        """Name of the parameter that `tensor` is, or of which it is a view."""
        return None if tensor is None else self.find(tensor)[0]

    @cached_property
    def weight_norms(self) -> dict[int, WeightNorm]:
        """By the id of the direction v."""
        return {id(norm.v): norm for norm in weight_norms(self.model)}

    def unscalable(self, layer: Layer) -> str:
        """Why an `AuxiliaryScaling` cannot be inserted for a layer; empty where it can."""
        name, parameter = self.find(layer.weight)
        if id(parameter) in self.weight_norms:
            if self.rows(layer.weight) != (name, None):
                return "its weight is a part of what weight_norm normalises"
        elif any(not isinstance(part, AuxiliaryScaling) for part in self.parametrizations(name or "")):
            return "its weight has another parametrization"
        modules = [m for m in self.model.modules() if any(other is parameter for other in m.parameters(False))]
        return "its weight belongs to several modules" if len(modules) > 1 else ""

    def parametrizations(self, parameter: str) -> list[nn.Module]:
        """The parametrizations of a parameter."""
        module = self.model.get_submodule(parameter.rpartition(".")[0])
        return list(module) if isinstance(module, nn.utils.parametrize.ParametrizationList) else []

    @property
    def no_layer(self) -> str:
        """Why there is no layer."""
        if any(scripted(self.model)):
            return SCRIPTED
        return EXPORTED if self.operators else ALL_COMPUTED if self.computed else NO_LAYER

    def scaling(self, func: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The parameter, the factor and the mask where a function multiplies a parameter by a constant.

        That is what `AuxiliaryScaling` or weight normalisation has, a number, a buffer or a frozen parameter of one
        value, or one of zeros and ones for each weight; and 1 where it is copied, as to another precision.
        """
        name = getattr(func, "__name__", "")
        if name in COPIES and args and isinstance(args[0], Tensor) and self.find(args[0])[1] is not None:
            return args[0], args[0].new_ones(()), None
        found = self._multiplied(PRODUCTS[name], args) if name in PRODUCTS and len(args) == 2 else None
        return found or (self._masked(func, args, kwargs) if name in MASKING else None)

    def _multiplied(self, power: int, args: tuple) -> tuple[Tensor, Tensor, None] | None:
        """As `scaling`, for a product with one number, or with one for each row."""
        of_rows = id(args[1]) in self.factors
        turned = not of_rows and isinstance(args[1], Tensor) and self._is_learned(args[1])
        one, other = args[::-1] if turned else args
        if not isinstance(one, Tensor) or self.find(one)[1] is None or (one is args[1] and power < 0):
            return None
        if isinstance(other, Tensor):
            if not of_rows and (other.numel() != 1 or not self._is_constant(other)):
                return None
        elif not isinstance(other, int | float) or other <= 0 or (self.numbers and not isinstance(other, int)):
            return None
        factor = other.detach() if isinstance(other, Tensor) else one.new_tensor(other)
        return one, factor**power, None

    def _masked(self, func: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `scaling`, for a function that keeps some values of a parameter and sets the others to 0."""
        if not all(isinstance(value, int | float) for value in kwargs.values()):
            return None
        parameters = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and self.find(arg)[1] is not None]
        places = [i for i in parameters if self._is_learned(args[i])] or parameters
        if len(places) != 1 or any(arg is None for arg in args):  # a value that depends on the images
            return None
        one = args[places[0]]
        others = [arg for i, arg in enumerate(args) if i not in places and isinstance(arg, Tensor)]
        if torch.broadcast_shapes(one.shape, *(other.shape for other in others)) != one.shape:
            return None
        if not all(self._is_mask(other) for other in others):
            return None
        once, twice = (
            func(*(torch.full_like(one, value) if i in places else arg for i, arg in enumerate(args)), **kwargs)
            for value in (1, 2)
        )
        fits = once.shape == one.shape and ((once == 0) | (once == 1)).all() and torch.equal(twice, 2 * once)
        return (one, one.new_ones(()), once.contiguous()) if fits else None

    def call(self, function: str, given: dict[str, Any], sources: dict[int, Scaled]) -> Call | None:
        """The use of an affine layer that this call of an affine function is; None if it is none.

        Args:
            function: of the function.
            given: its arguments by name.
            sources: by memory, the products of parameters with constants.
        """
        weight, factor, mask = source_of(given["weight"], sources)
        bias, bias_factor, _ = (None,) * 3 if given.get("bias") is None else source_of(given["bias"], sources)
        if function not in MODULE_FUNCTIONS and self.owner(source_of(given["input"], sources)[0]) is not None:
            return None  # of two parameters some weight is computed, as of low rank
        name = self._name(weight)
        if name in self.apart:
            return None
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
            check_memory(layer)
            self.found[name] = layer
        elif (layer.groups, layer.transposed) != (given.get("groups", 1), transposed):
            return None  # a tied weight, which is a layer only as what it was first
        elif layer.weight.stride() != weight.stride():
            return None  # turned
        elif bias is not None and (layer.bias is None or not overlap(bias, layer.bias)) and layer.fixed_bias is None:
            return None
        elif not (_same(factor, layer.factor) and _same(mask, layer.mask)):
            self.elsewhere.add(memory(weight))  # what arrives here is of another multiple of it
        return Call.of(layer, given)

    def rows(self, tensor: Tensor) -> tuple[str, slice | None] | None:
        """The parameter of which a tensor is the whole (None) or the given rows.

        Rows are all that has one index in the first dimension: of a vector its values, of a stack of matrices, as for
        experts, a matrix. Rows that follow one another in memory may be a tensor of any shape.
        """
        name, parameter = self.find(tensor)
        if name is None or parameter is None:
            return None
        if tensor.shape == parameter.shape and tensor.stride() == parameter.stride():
            return name, None
        if tensor.numel() == parameter.numel() and is_dense(tensor) and is_dense(parameter):
            return (name, None) if has_kernel(tensor) else None  # of other dimensions, or of another order of them
        if not parameter.ndim or not parameter.stride(0):  # one number, or one row that stands for many
            return None
        first, step = int(tensor.storage_offset() - parameter.storage_offset()), parameter.stride(0)
        rows = slice(first // step, (first + tensor.numel()) // step)
        if parameter.is_contiguous() and is_dense(tensor) and has_kernel(tensor):
            return (name, rows) if first % step == tensor.numel() % step == 0 else None
        if tensor.shape[1:] != parameter.shape[1:] or tensor.stride() != parameter.stride():
            return None
        return name, slice(first // step, first // step + len(tensor))

    def rows_left(self, name: str) -> list[slice]:
        """The rows of a parameter that are part of no layer which was found."""
        left = torch.ones(len(self.model.get_parameter(name)), dtype=torch.bool)
        for layer in self.found.values():
            for part in (layer.weight, layer.bias):
                owner, rows = (None if part is None else self._weight_rows(part.detach())) or (None, None)
                if owner == name:
                    left[rows or slice(None)] = False
        edges = torch.cat([torch.tensor([False]), left, torch.tensor([False])]).int().diff().nonzero().flatten()
        return [slice(*pair) for pair in edges.view(-1, 2).tolist()]

    def _weight_rows(self, weight: Tensor) -> tuple[str, slice | None] | None:
        return self.rows(weight) or (self.rows(weight.t()) if weight.ndim == 2 else None)

    def _name(self, weight: Tensor) -> str | None:
        found = self._weight_rows(weight)
        if found is None:
            return None
        norm = self.weight_norms.get(id(self.find(weight)[1]))
        name, rows = layer_name(found[0] if norm is None else norm.name), found[1]
        return name if rows is None else f"{name}[{rows.start}:{rows.stop}]"


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


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
        if torch._C._functorch.maybe_current_level() is not None:
            return self.transformed(func, args, kwargs)
        func, args = multiplied(self.layers.weight_norms, func, args)
        if func is F.multi_head_attention_forward:
            with self:
                return attention(*args, **kwargs)
        self.layers.operators |= isinstance(func, OpOverload) and func.namespace == "aten"
        given = arguments_of(func, args, kwargs)
        if given is not None and unbatched(given):
            with self:
                return as_batch(func, args, kwargs)
        probability, active = dropout_of(func.__name__, args, kwargs)
        if probability and not active:
            self.layers.functional_dropout.add(probability)
        if func.__name__ in RANDOM:
            self.layers.random.add(func.__name__.removesuffix("_"))
        self.layers.drawn |= func.__name__ in RANDOM or (probability > 0 and active)
        call = None if given is None else self.layers.call(func.__name__, given, self.sources)
        output = self.operation(func, args, kwargs, call)
        if not self._note_scaled(func, args, kwargs, output) and call is None:
            self._note_other_use(func, (*args, *kwargs.values()))
        return output

    def _note_other_use(self, func: Callable, args: tuple) -> None:
        """Note what takes the values of parameters without being a layer, or takes gradients."""
        self.layers.differentiates |= func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        if func.__name__ not in VIEWS | METADATA | COPIES:
            parts = [part for arg in args for part in (arg if isinstance(arg, list | tuple) else [arg])]
            taken = {memory(part) for part in parts if isinstance(part, Tensor)}
            sources = {memory(self.sources[place].parameter) for place in taken & self.sources.keys()}
            self.layers.elsewhere |= (taken | sources) & self.layers.memory_of_parameters

    def _note_scaled(self, func: Callable, args: tuple, kwargs: dict, output) -> bool:
        """Note a product of a parameter, or of such a product, with a constant; whether it is one."""
        if func.__name__ not in PRODUCTS.keys() | MASKING | COPIES:
            return False
        args = args[:1] if func.__name__ in COPIES else args  # and not the tensor whose precision the copy has
        before = [self.sources.get(memory(arg)) if isinstance(arg, Tensor) else None for arg in args]
        before = [None if source is None or source.is_changed else source for source in before]
        known = [arg if source is None else source.parameter for arg, source in zip(args, before, strict=True)]
        found = self.layers.scaling(func, tuple(known), kwargs)
        if found is None or not isinstance(output, Tensor) or any(output is arg for arg in args):
            return False
        parameter, factor, mask = found
        for source in before:
            if source is not None:
                factor = factor * source.factor
                mask = source.mask if mask is None else mask if source.mask is None else mask * source.mask
        _, whole = self.layers.find(parameter)
        self.sources[memory(output)] = Scaled(output, parameter, whole, factor, mask)
        return True

    def transformed(self, func: Callable, args: tuple, kwargs: dict):
        """Compute inside torch.vmap or the like, where tensors have no memory to know them by: anything but a layer.

        Raises:
            InitializationError: it may be a layer.
        """
        if arguments_of(func, args, kwargs) is not None:
            raise InitializationError(TRANSFORMED)
        return func(*args, **kwargs)

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
        sources = [source for source in sources if not source.is_parameter and not source.is_changed]

        def compute():
            refresh()
            return func(*args, **kwargs)

        def refresh() -> None:
            if not torch.is_grad_enabled():  # where weights are set
                for source in sources:
                    source.refresh()

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
