"""The method: filters, within-layer normalisation (Algorithm 1) and between-layer normalisation (Algorithm 2)."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from initializers._filters import DATA_DRIVEN, KINDS, draw_filters
from initializers._graph import Graph, UngraphableError, record
from initializers._layers import NO_LAYER, Call, Layer, Layers, Scaled, channel_statistics, forward
from initializers._model import (
    InitializationError,
    as_inputs,
    constants,
    dropouts,
    other_dropout,
    outputs_of,
    snapshot,
    unchanged_on_error,
    unwrapped,
    without_dropout,
)
from initializers._rates import Measurement, measure
from initializers._report import LayerReport, Report
from initializers._scales import Scales
from initializers._trace import trace_scales

METHODS = ("balance", "paper")
NONHOMOGENEOUS = ("pin", "scale")
LRN = ("estimate", "exact")
OUTPUTS = ("keep", "free")
BATCH = 16  # images that go from one affine layer to the next at a time
RATE_DRAWS = 4  # top gradients for each of them, where the step is exact and need not be repeated
PAPER_STEPS = 10  # "roughly 10 iterations", Algorithm 2
MAX_ROUNDS = 10  # of the exact step, where LRN makes it inexact
CHECK_IMAGES = 32  # on which the output must not change
EXACT = 1e-4  # relative change of the output up to which the between-layer step counts as exact
SETTLED = 1.05  # spread at which the rounds end; less than the spread between two samples of images


def initialize(
    model: nn.Module,
    images,
    filters: str | None = "kmeans",
    within: bool = True,
    between: bool = True,
    seed: int = 0,
    *,
    bias: float = 0.1,
    factors: Mapping[str, float] | None = None,
    method: str = "balance",
    alpha: float = 0.25,
    nonhomogeneous: str = "pin",
    lrn: str | None = None,
    outputs: str = "keep",
    rate_images: int = 16,
) -> Report:
    """Initialize every affine layer of `model` from `images` (section 3).

    One forward pass sets the filters and normalises each layer on the outputs of those before it; a few more on some
    of the images balance the layers. Flags, gradients, hooks, global random state and BatchNorm statistics are left
    as they are (the statistics are scaled along with what they describe). On the same device the same seed gives
    the same weights, to the bit.

    Args:
        model: any network. Its affine layers are the convolutions (of one to three dimensions, transposed ones too)
            and linear maps that run in evaluation mode, as modules, as functions or within attention, as long as
            their weights are parameters. A layer used several times is normalised where it is used first.
        images: a float tensor (N, C, H, W), preprocessed as for training, or any iterable of batches (a tensor, or a
            tuple or dict whose first tensor is the input), or a tuple of tensors for a model of several inputs. The
            paper uses 160 images of the training set.
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

    Returns:
        A `Report`; print it for a table.

    Raises:
        InitializationError: the model or the images cannot be used (no affine layer, NaN or Inf, a channel of no
            variance, images of a shape that the model rejects, ...). The model is then exactly as it was.
    """
    if filters is not None and filters not in KINDS:
        raise InitializationError(f"unknown filters {filters!r}: choose one of {', '.join(KINDS)} or None")
    _check_choice("method", method, METHODS)
    _check_choice("nonhomogeneous", nonhomogeneous, NONHOMOGENEOUS)
    _check_choice("outputs", outputs, OUTPUTS)
    if lrn is not None:
        _check_choice("lrn", lrn, LRN)
    if rate_images < 1:
        raise InitializationError(f"rate_images is {rate_images}: pass at least 1")
    start = time.perf_counter()
    model = unwrapped(model)
    with unchanged_on_error(model, seed):
        inputs = as_inputs(model, images)
        layers = Layers(model)
        graph, problem = recorded(layers, inputs)
        before = constants(model)
        if between and nonhomogeneous == "pin" and graph is None:
            raise InitializationError(
                f"the between-layer step cannot follow {type(model).__name__}: {problem}; pass between=False to set "
                'the filters and normalise each layer only, or nonhomogeneous="scale"'
            ) from problem
        report = Report([], images=len(inputs[0]))
        if filters is not None or within:
            _sweep(layers, inputs, graph, filters, within, bias, factors or {}, seed, report)
        if between and nonhomogeneous == "scale":
            layers = _scale(layers, inputs, rate_images, seed, report)
        elif between:
            _equalise(layers, inputs, rate_images, trace_scales(graph, lrn, outputs), method, alpha, seed, report)
        _describe(layers, graph, report)
        report.unsaved = [name for name, value in constants(model).items() if value != before[name]]
    report.seconds = time.perf_counter() - start
    return report


def rescale(
    model: nn.Module,
    images,
    *,
    seed: int = 0,
    method: str = "balance",
    alpha: float = 0.25,
    nonhomogeneous: str = "pin",
    lrn: str | None = None,
    outputs: str = "keep",
    rate_images: int = 16,
) -> Report:
    """The between-layer step alone, for pre-trained weights: the rates become equal, the function stays (section 4.3).

    Arguments, report and errors are those of `initialize`.
    """
    options = {"method": method, "alpha": alpha, "nonhomogeneous": nonhomogeneous, "lrn": lrn, "outputs": outputs}
    return initialize(model, images, None, within=False, seed=seed, rate_images=rate_images, **options)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InitializationError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")


def recorded(layers: Layers, inputs: tuple[Tensor, ...]) -> tuple[Graph | None, InitializationError | None]:
    """The graph of the model, or why it has none."""
    try:
        graph = record(layers, inputs)
    except UngraphableError as problem:
        return None, problem
    return graph, None


def sweep(layers: Layers, inputs: tuple[Tensor, ...], graph: Graph | None, before, after) -> None:
    """All images through the network, stopping at the first use of each affine layer.

    `before(call, inputs)` may change the layer; `after(call, outputs)` may change the outputs in place, with which
    the pass goes on. Both get one tensor per batch. Without a graph all images are one batch.
    """
    if graph is not None:
        graph.run(inputs, BATCH, before, after)
        return
    seen = set()

    def visit(call: Call, x: Tensor, compute) -> Tensor:
        if call.layer in seen:
            return compute()
        seen.add(call.layer)
        before(call, [x])
        output = compute()
        after(call, [output])
        return output

    forward(layers, inputs, visit)


def _sweep(
    layers: Layers,
    inputs: tuple[Tensor, ...],
    graph: Graph | None,
    filters: str | None,
    within: bool,
    bias: float,
    factors: Mapping[str, float],
    seed: int,
    report: Report,
) -> None:
    """Filters and Algorithm 1 in one forward pass over all images, which goes on with the normalised outputs."""
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    row = LayerReport("", ())
    started = 0.0
    after_convolution = False

    def before(call: Call, inputs: list[Tensor]) -> None:
        nonlocal row, started, after_convolution
        started = time.perf_counter()
        layer = call.layer
        row = LayerReport(layer.name, tuple(layer.weight.shape))
        report.layers.append(row)
        if filters is None:
            return
        after_convolution |= not layer.linear
        kind = "gaussian" if after_convolution and layer.linear and filters in DATA_DRIVEN else filters
        try:
            centre = within and layer.bias is None and not layer.computed_bias
            weights, row.filters, note = draw_filters(kind, call, inputs, generator, centre)
        except InitializationError as error:
            raise InitializationError(f"layer {layer.name}: {error}") from error
        row.add_note(note)
        if row.filters == "gaussian" and not within:
            weights.mul_(factors.get(layer.name, 1.0))
        layer.set_weight(weights)

    def after(call: Call, outputs: list[Tensor]) -> None:
        layer = call.layer
        mean, std = _statistics(layer, outputs)
        row.mean_before, row.std_before = mean.mean().item(), std.mean().item()
        if within:
            row.add_note(_normalise(layer, outputs, mean, std, bias))
            mean, std = _statistics(layer, outputs)
            row.mean_after, row.std_after = mean.mean().item(), std.mean().item()
        row.seconds = time.perf_counter() - started

    with torch.no_grad():
        sweep(layers, inputs, graph, before, after)
    if not report.layers:
        raise InitializationError(NO_LAYER)


def _normalise(layer: Layer, outputs: list[Tensor], mean: Tensor, std: Tensor, bias: float) -> str:
    """W(i, :) / sigma(i), and the bias that makes the mean `bias`; the outputs follow, as they are linear in both.

    Returns:
        A note on groups of channels that do not vary on the images, because their few inputs are dead behind a ReLU:
        their weights stay as they are.

    Raises:
        InitializationError: a channel does not vary beyond rounding.
    """
    flat = std <= 1e-5 * mean.abs()
    dead = flat.view(layer.groups, -1).all(1)
    if not dead.all():
        excused = dead.repeat_interleave(len(flat) // layer.groups)
        std, flat = torch.where(excused, 1.0, std), flat & ~excused
    if flat.any():
        channel, images = flat.nonzero()[0].item(), sum(map(len, outputs))
        raise InitializationError(
            f"layer {layer.name}: output channel {channel} has zero variance on {images} image(s), so it cannot be "
            "scaled; pass more, or more varied, images, or check for inputs that are always zero"
        )
    shift = layer.normalise(mean, std, bias)
    scale, shift = layer.by_channel(1 / std), layer.by_channel(shift)
    for output in outputs:
        output.mul_(scale).add_(shift)
    return f"{int(dead.sum())} of {layer.groups} groups do not vary and keep their scale" if dead.any() else ""


def _statistics(layer: Layer, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel.

    Raises:
        InitializationError: a channel is not finite.
    """
    mean, std = channel_statistics(layer, outputs)
    if not (torch.isfinite(mean) & torch.isfinite(std)).all():
        raise InitializationError(f"layer {layer.name}: its output holds NaN or Inf; check the weights before it")
    return mean, std


def _some(inputs: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
    """That many of the images, evenly spread."""
    count = len(inputs[0])
    chosen = torch.linspace(0, count - 1, min(count, number)).round().long()
    return tuple(x[chosen.to(x.device)] for x in inputs)


@torch.no_grad()
def _outputs(layers: Layers, inputs: tuple[Tensor, ...], factors: Sequence[float] = ()) -> Tensor:
    """All outputs of the model in evaluation mode, one row per image; each divided by its factor, if there are any."""
    torch.manual_seed(0)  # for models that draw random numbers even in evaluation mode
    batches = zip(*(x.split(BATCH) for x in inputs), strict=True)
    rows = []
    with without_dropout(layers.model):
        for batch in batches:
            outputs = outputs_of(layers.model, tuple(x.clone() for x in batch))  # which a model may change in place
            factors = factors or [1.0] * len(outputs)
            rows.append(torch.cat([x.flatten(1) / factor for x, factor in zip(outputs, factors, strict=True)], 1))
    return torch.cat(rows)


def _measured(
    layers: Layers, inputs: tuple[Tensor, ...], seed: int, before=None, draws: int = RATE_DRAWS, apart: bool = False
) -> Measurement:
    """Change rates that can be equalised.

    Raises:
        InitializationError: they overflow, or a layer does not learn at all.
    """
    measurement = measure(layers, inputs, seed, before=before, draws=draws, apart=apart)
    mean = measurement.rates.mean
    if not torch.isfinite(measurement.outputs).all() or math.inf in mean.values():
        raise InitializationError("the output or its gradient overflows: normalise the images, or use within=True")
    still = next((name for name, rate in mean.items() if not rate > 0), None)
    if still is not None:
        raise InitializationError(f"layer {still}: no gradient reaches its weights on these images; initialize it")
    return measurement


def _equalise(
    layers: Layers,
    inputs: tuple[Tensor, ...],
    rate_images: int,
    scales: Scales,
    method: str,
    alpha: float,
    seed: int,
    report: Report,
) -> None:
    """Algorithm 2 on the scales of a graph."""
    checked = _some(inputs, CHECK_IMAGES)
    inputs = _some(inputs, rate_images)
    sizes: dict[tuple[Layer, int], Tensor] = {}  # mean magnitude of what comes to a layer through LRN
    factors: dict[str, float] = {}
    uses = {use.layer: use for use in scales.uses}

    def follow(call: Call, x: Tensor) -> None:
        """Divide out how much LRN really changed the layer's input, which only a forward pass can tell."""
        incoming = uses[call.layer].incoming
        for label in scales.measured.keys() & set(incoming.flatten().tolist()):
            channels = incoming == label
            key, name = (call.layer, label), call.layer.name
            size = x.movedim(-1 if call.layer.linear else 1, -1)[..., channels.flatten().to(x.device)].abs().mean()
            if key in sizes:
                ratio = (sizes[key] / size).item()
                call.layer.scale_inputs(torch.where(channels, ratio, 1.0))
                factors[name] *= ratio ** channels.double().mean().item()
                intended = u[scales.measured[label]].item()
                if abs(intended) > 0.01:
                    scales.degrees[label] = max(-1.0, min(1.0, -math.log(ratio) / intended))
            sizes[key] = size

    def apply(u: Tensor) -> None:
        for name, factor in scales.apply(u).items():
            factors[name] *= factor

    def measured() -> Measurement:
        return _measured(layers, inputs, seed, follow, RATE_DRAWS if exact else 1, apart=bool(scales.outputs))

    def change() -> float:
        report.output_scales = total[scales.outputs].exp().tolist()
        return _change(first_outputs, _outputs(layers, checked, report.output_scales))

    u = torch.zeros(1 + scales.variables)
    exact = not scales.measured
    first = last = measured()
    factors = dict.fromkeys(first.layers, 1.0)
    first_outputs, restore = _outputs(layers, checked), snapshot(layers.model) if exact else None
    total = torch.zeros(1 + scales.variables, dtype=torch.float64)
    for _ in range(MAX_ROUNDS if method == "balance" else PAPER_STEPS):
        u = scales.equalising(last) * (1 if method == "balance" else alpha)
        apply(u)
        report.rounds += 1
        total = total + u
        if method == "balance" and exact:
            break
        before, last = last.rates.spread, measured()
        if method == "balance" and (last.rates.spread < SETTLED or last.rates.spread > 0.99 * before):
            break
    if exact:
        report.output_change = change()
        if not report.output_change < _tolerance(inputs):
            # The network amplifies the rounding of its weights: powers of two leave every bit of a product as it is.
            restore()
            report.powers_of_two = True
            factors = dict.fromkeys(first.layers, 1.0)
            total = scales.powers_of_two(first, total)
            apply(total)
            report.output_change = change()
        _check_exact(report, inputs)
        last = measured()
    else:
        report.output_change = change()
    report.lrn = "estimate" if scales.measured else "exact" if scales.lrns else None
    _report_rates(report, first, last, factors)


def _tolerance(inputs: tuple[Tensor, ...]) -> float:
    return max(EXACT, 16 * torch.finfo(inputs[0].dtype).eps)


def _check_exact(report: Report, inputs: tuple[Tensor, ...]) -> None:
    if not report.output_change < _tolerance(inputs):
        raise InitializationError(
            f"the between-layer step changed the output by {report.output_change:.1e}, as a part of the model cannot "
            "be seen or is too sensitive to rounding; pass between=False"
        )


def _scale(layers: Layers, inputs: tuple[Tensor, ...], rate_images: int, seed: int, report: Report) -> Layers:
    """Equal rates by the paper's auxiliary scaling: rate C becomes C / r² where r times the parameter is stored.

    Returns:
        The layers, whose parameters are others now.
    """
    checked, inputs = _some(inputs, CHECK_IMAGES), _some(inputs, rate_images)
    first, outputs = _measured(layers, inputs, seed), _outputs(layers, checked)
    logs = {name: math.log(rate) for name, rate in first.rates.mean.items()}
    centre = sum(logs.values()) / len(logs)
    exponents = {name: (rate - centre) / 2 / math.log(2) for name, rate in logs.items()}
    model, restore, rows = layers.model, snapshot(layers.model), _layers_of_rows(layers, first)
    added: list[tuple[nn.Module, str]] = []

    def remove() -> None:
        for module, name in added:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        added.clear()

    try:
        for rounded in (False, True):
            if rounded:  # the network amplifies the rounding of its weights
                remove()
                restore()
                report.powers_of_two = True
                exponents = {name: round(exponent) for name, exponent in exponents.items()}
            factors = {name: 2.0**exponent for name, exponent in exponents.items()}
            for owner, names in rows.items():
                added += _insert_scaling(model, owner, torch.tensor([factors[name] for name in names]))
            report.output_change = _change(outputs, _outputs(layers, checked))
            if report.output_change < _tolerance(inputs):
                break
        _check_exact(report, inputs)
        scaled = Layers(model)
        last = _measured(scaled, inputs, seed)
        report.rounds = 1
        _report_rates(report, first, last, factors)
    except BaseException:
        remove()
        raise
    return scaled


def _layers_of_rows(layers: Layers, measurement: Measurement) -> dict[str, list[str]]:
    """The layer of each row of each parameter; several layers may be rows of one."""
    rows: dict[str, list[str]] = {}
    for name, layer in measurement.layers.items():
        for part in (layer.weight, layer.bias):
            if part is not None:
                owner, start = layers.rows(part)
                names = rows.setdefault(owner, [name] * len(layers.model.get_parameter(owner)))
                names[start or 0 : (start or 0) + len(part)] = [name] * len(part)
    return rows


@torch.no_grad()
def _insert_scaling(model: nn.Module, parameter: str, factor: Tensor) -> list[tuple[nn.Module, str]]:
    """Store `factor` (rows,) times a parameter and divide by it where the layer computes; what is parametrized anew."""
    path, _, name = parameter.rpartition(".")
    module, tensor = model.get_submodule(path), model.get_parameter(parameter)
    factor = factor.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
    if isinstance(module, parametrize.ParametrizationList):  # there is a scaling already
        module.original.mul_(factor)
        module[0].factor.div_(factor)
        return []
    parametrize.register_parametrization(module, name, Scaled(1 / factor))
    return [(module, name)]


def _report_rates(report: Report, first: Measurement, last: Measurement, factors: dict[str, float]) -> None:
    if not report.layers:
        report.layers = [LayerReport(name, tuple(layer.weight.shape)) for name, layer in first.layers.items()]
    before, after = first.rates.mean, last.rates.mean
    for row in report.layers:
        row.rate_before, row.rate_after = before.get(row.name), after.get(row.name)
        row.scale = factors.get(row.name)
    report.rate_images = len(first.outputs)


def _change(first: Tensor, last: Tensor) -> float:
    """Relative change of the outputs."""
    return ((last - first).norm() / first.norm()).item()


def _describe(layers: Layers, graph: Graph | None, report: Report) -> None:
    """What was not treated like the rest, and why."""
    seen = {layers.owner(tensor) for layer in layers.found.values() for tensor in (layer.weight, layer.bias)}
    parameters = layers.model.named_parameters()
    report.kept = [name for name, parameter in parameters if parameter.ndim > 1 and name not in seen]
    report.inactive_dropout = inactive_dropout(layers, graph)
    uses = Counter(operation.call.layer.name for operation in graph.operations if operation.call) if graph else {}
    for row in report.layers:
        layer = layers.found[row.name]
        if layer.computed_bias:
            row.add_note("the model computes its bias, so that the mean is as it comes")
        if uses.get(row.name, 1) > 1:
            row.add_note(f"used {uses[row.name]} times, normalised where it is used first")


def inactive_dropout(layers: Layers, graph: Graph | None) -> list[str]:
    """What drops at random in training and did not here: modules by name, functions by their probability."""
    unused = [
        name
        for name, module in dropouts(layers.model).items()
        if graph is not None and module.p > 0 and module not in graph.dropouts
    ]
    functions = [f"functional dropout, p = {p:g}" for p in sorted(layers.functional_dropout)]
    return [*unused, *other_dropout(layers.model), *functions]
