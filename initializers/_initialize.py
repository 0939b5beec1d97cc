"""The two public functions of the method: Algorithms 1 and 2, or the second alone."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn

from initializers._auxiliary import insert_auxiliary
from initializers._between import equalise_between
from initializers._filters import Filters
from initializers._inputs import as_inputs
from initializers._layer import memory
from initializers._layers import Layers
from initializers._memory import constants
from initializers._model import InitializationError, scripted, unchanged_on_error, unwrapped
from initializers._propagate import Lrn, Outputs, propagate
from initializers._report import Report
from initializers._sweep import Recorded, inactive_dropout, recorded, with_masks
from initializers._within import Within, initialize_within, note_rounding

Method = Literal["balance", "paper"]
Nonhomogeneous = Literal["pin", "scale"]


def initialize(
    model: nn.Module,
    images,
    filters: Filters | None = "kmeans",
    within: bool = True,
    between: bool = True,
    seed: int = 0,
    *,
    bias: float = 0.1,
    factors: Mapping[str, float] | None = None,
    method: Method = "balance",
    alpha: float = 0.25,
    nonhomogeneous: Nonhomogeneous = "pin",
    lrn: Lrn | None = None,
    outputs: Outputs = "keep",
    rate_images: int = 16,
    training: bool = False,
) -> Report:
    """Initialize every affine layer of `model` from `images` (section 3).

    One forward pass sets the filters and normalises each layer on the outputs of those before it; a few more on some
    of the images balance the layers. Flags, gradients, hooks, global random state and BatchNorm statistics are left
    as they are (the statistics are scaled along with what they describe). On the same device the same seed gives
    the same weights, to the bit.

    Args:
        model: any network. Its affine layers are the convolutions (of one to three dimensions, transposed ones too)
            and linear maps that run in evaluation mode, as modules, as functions or within attention, as long as
            their weights are parameters. Frozen parameters (`requires_grad=False`) stay as they are. A layer used
            several times is normalised where it is used first.
        images: a float tensor (N, C, H, W), preprocessed as for training, or any iterable of batches (a tensor, or a
            tuple or dict whose first tensor is the input), or a tuple of tensors for a model of several inputs. One
            batch of images and labels, a `Dataset` and a list of images (C, H, W) will do, too. The paper uses 160
            images of the training set.
        filters: "gaussian", "pca", "zca", "kmeans", "patches", "orthonormal" or None, which keeps the weights that
            are there (section 3.3). Linear layers after a convolution become Gaussian where the kind is data-driven,
            since a few hundred images are too few for them.
        within: scale each output channel to unit variance and mean `bias` over images and positions (Algorithm 1).
        between: equalise the change rates of all layers (Algorithm 2).
        seed: of all that is random.
        bias: the mean of every output channel, beta of Algorithm 1. The authors' code uses 0.1.
        factors: what the standard deviation of Gaussian filters, .01, is multiplied by, by the name of the layer, as
            in `gaussian`; `within` makes it irrelevant.
        method: "balance" solves Algorithm 2 exactly in one step, and repeats it while LRN makes it inexact; "paper"
            takes ten steps damped by `alpha`.
        alpha: damping of the "paper" method.
        nonhomogeneous: what the between-layer step does about parts that are not homogeneous, such as GELU or a
            sigmoid. "pin" leaves the scale of their inputs and outputs as it is, so that rates may stay apart;
            "scale" gives every layer the paper's auxiliary scaling, a constant factor between the stored and the
            effective weights and biases (a parametrization whose buffer is in the state dict), and with it the same
            rate whatever the network.
        lrn: local response normalisation is only nearly homogeneous. "exact" scales its constant alpha along, so
            that the function stays; "estimate" leaves it, as the authors' code does, measures the scale that comes
            out and lets the next layer undo it, which changes the function. None is "exact" for modules whose
            state dict holds alpha, and "estimate" for others, `nn.LocalResponseNorm` among them.
        outputs: "keep" keeps the function of the model. "free" lets the between-layer step multiply each output by a
            constant, for outputs whose scale does not matter, such as those of classifiers that become 0 before the
            training: with several outputs the rates can be more equal then.
        rate_images: the between-layer step measures the rates on so many of the images, evenly spread; 16 as in the
            authors' code. More make the rates of other images more equal, at a cost that grows with their number.
        training: run the model as in training, but for BatchNorm, which keeps its running statistics. So take part what
            only training runs: auxiliary classifiers, stochastic depth, dropout as a function or inside attention.

    Returns:
        A `Report`; print it for a table.

    Raises:
        InitializationError: the model or the images cannot be used (no affine layer, NaN or Inf, a channel of no
            variance, images of a shape that the model rejects, ...). The model is then exactly as it was, as after any
            other error.
        torch.OutOfMemoryError: pass fewer or smaller images.
    """
    for name, value, choices in (
        ("filters", filters, (*get_args(Filters), None)),
        ("method", method, get_args(Method)),
        ("nonhomogeneous", nonhomogeneous, get_args(Nonhomogeneous)),
        ("lrn", lrn, (*get_args(Lrn), None)),
        ("outputs", outputs, get_args(Outputs)),
    ):
        if value not in choices:
            raise InitializationError(f"unknown {name} {value!r}: choose one of {', '.join(map(str, choices))}")
    if rate_images < 1:
        raise InitializationError(f"rate_images is {rate_images}: pass at least 1")
    start = time.perf_counter()
    model = unwrapped(model)
    with unchanged_on_error(model, seed, training):
        inputs, names = as_inputs(model, images)
        layers = Layers(model, names, trainable=True)
        follow = between and nonhomogeneous == "pin"
        known = _recorded(layers, inputs, follow)
        before = constants(model)
        report = Report([], images=len(inputs[0]))
        if filters is not None or within:
            rule = Within(filters, within, bias, factors or {}, seed)
            step = partial(initialize_within, layers, inputs, known, rule, report)
            note_rounding(layers, inputs, known, with_masks(layers, inputs, report, step), report)
            if follow and known.graph is None:  # other weights may choose other experts
                known = _recorded(layers, inputs, follow=True)
        if between and nonhomogeneous == "scale":
            layers = insert_auxiliary(layers, inputs, rate_images, seed, report)
        elif between and known.scales is not None:
            scales = propagate(known.scales, lrn, outputs)
            damping = None if method == "balance" else alpha
            equalise_between(layers, inputs, scales, report, damping=damping, rate_images=rate_images, seed=seed)
        _describe(layers, known, report)
        report.unsaved = [name for name, value in constants(model).items() if value != before[name]]
    report.seconds = time.perf_counter() - start
    return report


def rescale(
    model: nn.Module,
    images,
    *,
    seed: int = 0,
    method: Method = "balance",
    alpha: float = 0.25,
    nonhomogeneous: Nonhomogeneous = "pin",
    lrn: Lrn | None = None,
    outputs: Outputs = "keep",
    rate_images: int = 16,
    training: bool = False,
) -> Report:
    """The between-layer step alone, for pre-trained weights: the rates become equal, the function stays (section 4.3).

    Arguments, report and errors are those of `initialize`.
    """
    return initialize(
        model,
        images,
        filters=None,
        within=False,
        seed=seed,
        method=method,
        alpha=alpha,
        nonhomogeneous=nonhomogeneous,
        lrn=lrn,
        outputs=outputs,
        rate_images=rate_images,
        training=training,
    )


def _recorded(layers: Layers, inputs: tuple[Tensor, ...], follow: bool) -> Recorded:
    """The graph of the model.

    Raises:
        InitializationError: it does not tell how scales travel, which is to `follow` from it.
    """
    known = recorded(layers, inputs)
    if follow and known.scales is None:
        raise InitializationError(
            f"the between-layer step cannot follow {type(layers.model).__name__}: {known.problem}; pass between=False "
            'to set the filters and normalise each layer only, or nonhomogeneous="scale"'
        ) from known.problem
    return known


def _describe(layers: Layers, known: Recorded, report: Report) -> None:
    """What was not treated like the rest, and why."""
    seen = {layers.owner(tensor) for layer in layers.found.values() for tensor in (layer.weight, layer.bias)}
    sizes = {id(norm.g) for norm in layers.weight_norms.values() if layers.owner(norm.v) in seen}  # of what was set
    unseen = {memory(parameter) for module in scripted(layers.model) for parameter in module.parameters()}
    for name, parameter in layers.model.named_parameters():
        if parameter.ndim < 2 or not parameter.requires_grad or id(parameter) in sizes:
            continue
        parts = {name: parameter.detach()}
        if name in seen:  # as one of a stack of experts may be
            parts = {f"{name}[{rows.start}:{rows.stop}]": parameter.detach()[rows] for rows in layers.rows_left(name)}
        for part, values in parts.items():
            use = "a scripted module" if memory(parameter) in unseen else known.other_use(values)
            report.kept[part] = f"used by {use}" if use else "not used" if known.scales is not None else ""
    report.frozen = [name for name, parameter in layers.model.named_parameters() if not parameter.requires_grad]
    report.inactive_dropout = inactive_dropout(layers, known.seen)
    report.random = sorted(layers.random)
    repeated = {} if known.seen is None else known.seen.repeated
    for row in report.layers:
        layer = layers.found[row.name]
        if layer.fixed_bias is not None:
            row.add_note("its bias is computed or frozen, so that the mean is as it comes")
        if row.name in repeated:
            row.add_note(f"used {repeated[row.name]} times, normalised where it is used first")
        other = known.other_use(layer.weight)
        if other is not None and row.name not in known.tied:
            row.add_note(f"its weights are used by {other} as well, for which they are as they come")
