"""The scales of a graph that may change: the between-layer step as a least-squares problem.

Every value has a log-scale u: 0 at the inputs and outputs of the network, free in between. An affine layer multiplies
the weights of input channel j by exp(u_out - u_in[j]) and its bias by exp(u_out), so that its output has one scale
whatever its input had. Whatever the u, the network computes the same function. Which scales are which is found in
`initializers._propagate`; here they are chosen and applied.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from initializers._layer import Layer
from initializers._rates import Measurement

PINNED = 0  # the label of scales that may not change
MAX_STEPS = 50  # of Newton's method; a chain needs one, GoogLeNet about six
MAX_HALVINGS = 30
MAX_CHANGE = 40.0  # of a log-scale in a step: float32 ends at 88
MAX_EXPONENT = 60  # of two, for a scale


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
    module: Any = None  # whose eps is scaled along, or lowered
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
        through_lrn: labels of what comes out of local response normalisations that are left as they are, with those of
            what comes in. They scale only nearly, so that the scale that comes out has to be measured.
        outputs: labels of the outputs of the model, where these are free; their factor scales the gradients that they
            hand down.
        outputs_kept: number of outputs that are not free and depend on a scale that is.
        degrees: their local degree of homogeneity by the label that comes out, once measured; 1 until then.
        pinned_by: names of operations that are not homogeneous, with free scales beside them.
        variables: number of free variables.
        constraints: rows of coefficients whose sums are 0.
    """

    uses: list[Use] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    leaves: list[tuple[Tensor, int]] = field(default_factory=list)
    gains: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    lrns: list[tuple[Any, int]] = field(default_factory=list)
    through_lrn: dict[int, int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    outputs_kept: int = 0
    degrees: dict[int, float] = field(default_factory=dict)
    pinned_by: set[str] = field(default_factory=set)
    variables: int = 0
    constraints: set[tuple[tuple[int, int], ...]] = field(default_factory=set)

    def new(self) -> int:
        """The label of a new variable."""
        self.variables += 1
        return self.variables

    def is_through_lrn(self, labels: Tensor) -> Tensor:
        """Which of the labels are in `through_lrn`, bool."""
        return torch.isin(labels, torch.tensor(sorted(self.through_lrn), dtype=labels.dtype))

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
        relations = torch.zeros(len(self.through_lrn), 1 + self.variables, dtype=torch.float64)
        for row, (output, label) in zip(relations, self.through_lrn.items(), strict=True):
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
            step = basis @ _least_squares(centred @ basis, logs.mean() - logs)
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
        """Multiples of log 2 near the optimal log-scales u, changed one by one as long as the rates come closer.

        Again and again the one of `_moves`, up or down, is made that lowers the variance of the logs of the rates most.
        """
        moves, floors = self._moves(), self._floors()
        logs, slopes = self._log_rates(measurement, u)
        exact = u / math.log(2)
        exponents = torch.linalg.lstsq(moves.T, exact.unsqueeze(1)).solution.squeeze(1).round() @ moves
        exponents = _at_least(floors, exponents, moves)
        logs = logs + slopes @ (exponents - exact) * math.log(2)
        steps = torch.cat([moves, -moves])
        changes = slopes @ steps.T * math.log(2)
        while len(steps):
            candidates = logs.unsqueeze(1) + changes
            variances = candidates.var(0, correction=0)
            variances[(exponents + steps < floors).any(1)] = math.inf
            variance, step = variances.min(0)
            if variance > (1 - 1e-9) * logs.var(correction=0):
                break
            exponents = exponents + steps[step]
            logs = candidates[:, step]
        return exponents * math.log(2)

    def _floors(self) -> Tensor:
        """The least exponent of two of each variable that a BatchNorm behind it takes without rounding anything.

        Its eps cannot be scaled: sooner or later no v' makes v' + eps what it ought to be. Float64 (1 + variables,).
        Tried for one power after the other: as many are fine as come before the first that is not.
        """
        floors = torch.full((1 + self.variables,), -math.inf, dtype=torch.float64)
        factors = torch.arange(0, -MAX_EXPONENT, -1, dtype=torch.float64).exp2().unsqueeze(1)
        for norm in self.norms:
            if norm.variance is not None:
                total = _scaled_total(norm.variance, norm.eps, factors)
                variance = _without(total, norm.eps, norm.variance.dtype)
                exact = (variance + norm.eps == total).cumprod(0).sum(0).cpu()
                least = (1.0 - exact).clamp_max(0).to(floors)
                floors.scatter_reduce_(0, norm.incoming.expand_as(least), least, "amax")
        return floors

    def _moves(self) -> Tensor:
        """Whole numbers by which exponents of two may change, float64 (moves, 1 + variables): sums of these may, too.

        Variables forced to be equal move together. Of longer constraints, as of queries and keys whose scales cancel
        out, one variable follows from the others; where it would not be whole, all of them are pinned.
        """
        equal = torch.eye(1 + self.variables, dtype=torch.bool)
        longer = []
        for row in self.constraints:
            labels, coefficients = zip(*row, strict=True)
            if len(row) == 1 or coefficients in ((1, -1), (-1, 1)):
                merged = equal[[*labels, PINNED] if len(row) == 1 else [*labels]].any(0)
                equal[merged] = merged
            else:
                longer.append(row)
        moves = equal[~equal[:, PINNED]].unique(dim=0).double()
        for row in sorted(longer):
            labels, coefficients = zip(*row, strict=True)
            sums = moves[:, list(labels)] @ moves.new_tensor(coefficients)
            sums /= max(1, math.gcd(*(int(each) for each in sums)))
            follows = (sums.abs() == 1).nonzero()[:1, 0]
            if len(follows):
                moves = moves - (sums * sums[follows]).unsqueeze(1) * moves[follows]
                moves = moves[torch.arange(len(moves)) != follows]
            else:
                moves = moves[sums == 0]
        return moves

    def _log_rates(self, measurement: Measurement, u: Tensor) -> tuple[Tensor, Tensor]:
        """Logs of the average change rates at the scales u, and their derivatives by u; both float64.

        Multiplying the weights of an input channel by r divides their gradient by r, as the function stays; multiplying
        a free output by s multiplies what its top gradient contributes by s.
        """
        uses = [use for use in self.uses if use.layer.name in measurement.squares]  # those that learn
        logs, slopes = u.new_zeros(len(uses)), u.new_zeros(len(uses), len(u))
        outputs = torch.tensor(self.outputs or [PINNED])
        for row, use in enumerate(uses):
            apart, weights = measurement.squares[use.layer.name], measurement.weights[use.layer.name]
            change = 2 * (u[use.output] - u[use.incoming])
            apart = apart * (2 * u[outputs]).exp().view(-1, 1, 1) * (-change).exp()
            squares, weights = apart.sum(0), weights * change.exp()
            columns = squares.mean(0).sqrt()
            logs[row] = columns.mean().log() - weights.mean().log() / 2
            # Shares of the layer's rate and of its weights.
            of_group = squares / squares.sum(0).clamp_min(torch.finfo(squares.dtype).tiny)
            shares = columns / columns.sum() * of_group + weights / weights.sum()
            slopes[row].index_add_(0, use.incoming.flatten(), shares.flatten())
            slopes[row, use.output] -= 2
            of_output = apart.sum(1) / squares.sum(0).clamp_min(torch.finfo(squares.dtype).tiny)
            slopes[row].index_add_(0, outputs, of_output @ (columns / columns.sum()))
        return logs, slopes

    def of_outputs(self, u: Tensor) -> list[float]:
        """What the log-scales u multiply each output of the model by; empty where these are kept."""
        return u[self.outputs].exp().tolist()

    def factors(self, u: Tensor, more: Mapping[str, float]) -> dict[str, float]:
        """What the log-scales u multiply the weights of each layer by; the geometric mean over its input channels.

        Args:
            more: log-factors by layer, for what else they were multiplied by.
        """
        return {use.layer.name: _exp(self._changes(use, u).mean() + more[use.layer.name]).item() for use in self.uses}

    def _changes(self, use: Use, u: Tensor) -> Tensor:
        """Logs of what the weights of each input channel are multiplied by, (groups, inputs)."""
        return u[use.output] - torch.where(self.is_through_lrn(use.incoming), 0.0, u[use.incoming])

    @torch.no_grad()
    def apply(self, u: Tensor) -> None:
        """Scale the parameters, the running statistics and the constants by the log-scales u.

        Where the scale of a layer's input has to be measured, dividing by it is left to the caller.
        """
        u = u.cpu()
        for use in self.uses:
            use.layer.scale_inputs(_exp(self._changes(use, u)))
            if use.layer.bias is not None:
                use.layer.bias.mul_(_exp(u[use.output]).item())
        for norm in self.norms:
            _scale_norm(norm, u)
        for parameter, label in self.leaves:
            parameter.mul_(_exp(u[label]).item())
        for parameter, incoming, output in self.gains:
            parameter.mul_(_exp(u[output] - u[incoming]).to(parameter))
        for module, label in self.lrns:
            module.alpha *= _exp(-2 * u[label]).item()


def _least_squares(slopes: Tensor, changes: Tensor) -> Tensor:
    """The step, no larger than MAX_CHANGE, whose product with the slopes comes nearest to the changes.

    Directions in which all slopes are small are left out, the smallest first, where that takes scales too large: all of
    them where the slopes are rounding, as no rate depends on a scale.
    """
    for least in (None, 1e-3, 1e-2, 1e-1):  # singular value, relative to the largest; None is that of rounding
        step = torch.linalg.lstsq(slopes, changes, rcond=least, driver="gelsd").solution
        if step.abs().max() <= MAX_CHANGE:
            return step
    return torch.zeros_like(step)


def _exp(u: Tensor) -> Tensor:
    """exp(u), and a power of two to the bit where u is a multiple of log 2."""
    whole = (u / math.log(2)).round()
    return torch.where((u - whole * math.log(2)).abs() < 1e-13, whole.exp2(), u.exp())


def _at_least(floors: Tensor, exponents: Tensor, moves: Tensor) -> Tensor:
    """The exponents, moved up where they are below their floors; 0, which is not, where that does not end."""
    for _ in range(1 + len(moves)):
        short, variable = (floors - exponents).max(0)
        if short <= 0:
            return exponents
        move = moves[moves[:, variable] != 0][0]
        exponents = exponents + move * move[variable].sign() * (short / move[variable].abs()).ceil()
    return torch.zeros_like(exponents)


def _scale_norm(norm: Norm, u: Tensor) -> None:
    """Let a normalisation take inputs exp(u_in) times larger and give outputs exp(u_out) times larger, exactly.

    With v the running variance of BatchNorm and s the scale, v' + eps = s² (v + eps) keeps the function in spite of
    eps. Where that would need a negative v', it is 0 and the weight takes up the rest; without a weight eps becomes
    smaller. Other normalisations take their variance from the input, so that eps itself is scaled.
    """
    incoming, outgoing = _exp(u[norm.incoming]), _exp(u[norm.output]).item()
    correction: float | Tensor = 1.0
    if norm.mean is not None and norm.variance is not None:
        eps = norm.eps if norm.weight is not None else norm.module.eps
        total = _scaled_total(norm.variance, eps, incoming)
        if norm.weight is None and (total < eps).any():
            eps = norm.module.eps = eps * incoming.min().square().item()
        variance = _without(total, eps, norm.variance.dtype)
        norm.mean.copy_(norm.mean * incoming.to(total))
        norm.variance.copy_(variance)
        correction = ((variance + eps) / total).sqrt()
    elif norm.module is not None:
        norm.module.eps *= _exp(2 * u[norm.incoming[0]]).item()
    if norm.weight is not None:
        norm.weight.copy_(norm.weight * (outgoing * correction))
    if norm.bias is not None:
        norm.bias.mul_(outgoing)


def _scaled_total(variance: Tensor, eps: float, factor: Tensor) -> Tensor:
    """What the running variance and eps of a BatchNorm ought to be together for an input `factor` times larger.

    In the shape that the factor and the running variance have together.
    """
    factor = factor.to(variance.device, torch.promote_types(variance.dtype, torch.float32))
    return factor**2 * (variance.to(factor.dtype) + eps)


def _without(total: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The running variance v, not negative, for which v + eps is the nearest to the total."""
    variance = (total - eps).clamp_min(0).to(dtype)
    # One step of refinement: rounding would otherwise show in networks that amplify it.
    return variance.add_(total - (variance + eps)).clamp_(min=0)
