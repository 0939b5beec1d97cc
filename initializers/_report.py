"""What an initialization did: one row per affine layer, printed as a table."""

from dataclasses import asdict, dataclass, field

from initializers._rates import Measurement

HELD = 2  # spread of rates from which on the report says what holds them
COLUMNS = ("layer", "shape", "filters", "mean", "std", "mean'", "std'", "rate", "rate'", "scale", "seconds")


@dataclass
class LayerReport:
    """One affine layer, in order of execution.

    Attributes:
        name: of the module.
        shape: of its weight.
        filters: the kind of filters it got; None where its weights were kept.
        note: what is particular about it, such as why it got other filters than those asked for; empty otherwise.
        mean_before, std_before: of its output before the within-layer step, averaged over channels.
        mean_after, std_after: the same after the within-layer step.
        rate_before, rate_after: average change rate before and after the between-layer step; None where it does not
            learn yet.
        scale: what the between-layer step multiplied its weights by.
        seconds: time for the filters and the within-layer step.
    """

    name: str
    shape: tuple[int, ...]
    filters: str | None = None
    note: str = ""
    mean_before: float | None = None
    std_before: float | None = None
    mean_after: float | None = None
    std_after: float | None = None
    rate_before: float | None = None
    rate_after: float | None = None
    scale: float | None = None
    seconds: float = 0.0

    def add_tied(self, function: str) -> None:
        """A note that the weights stay."""
        self.add_note(
            f"its weights stay, as {function} uses them before it: others would change what layers before it saw"
        )

    def add_note(self, note: str) -> None:
        """Add to the note, if there is anything to add."""
        self.note = "; ".join(filter(None, (self.note, note)))


@dataclass
class Report:
    """What an initialization did; `print(report)` is a table, in which ' marks values after the step.

    Attributes:
        layers: one `LayerReport` per affine layer, in order of execution.
        images: number of images used.
        rate_images: number of them on which the between-layer step measured change rates.
        rounds: times the between-layer step was applied.
        kept: parameters of two or more dimensions that are no weights of an affine layer which ran: not initialized;
            by name, what uses them instead.
        frozen: parameters with `requires_grad=False`, which stay as they are.
        inactive_dropout: what drops at random in training, but did not here: dropout as a function or inside attention,
            stochastic depth. Dropout modules are active.
        random: names of functions that drew random numbers in evaluation mode, dropout apart: statistics are over the
            draws.
        lrn: what the between-layer step did about local response normalisation: "exact" scaled the constant, "estimate"
            left at least one and changed the function; None where there is none.
        unsaved: constants of normalisations that the between-layer step scaled and the state dict does not hold.
        powers_of_two: whether the scales were rounded to powers of two, because the network amplifies the rounding of
            its weights so much that its output would have changed otherwise; the rates are then less equal.
        held_by: names of the operations that are not homogeneous, and hold the scale of what they take and give.
        scaled: whether the between-layer step was the auxiliary scaling (`nonhomogeneous="scale"`).
        outputs_kept: number of the model's outputs whose scale the between-layer step could change, and does not.
        output_change: relative change of the model's output by the between-layer step, in norm.
        output_scales: what each output of the model was multiplied by, where they were free (`outputs="free"`); the
            change of the output is that beside it.
        seconds: time for everything.
    """

    layers: list[LayerReport]
    images: int
    rate_images: int = 0
    rounds: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    inactive_dropout: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    lrn: str | None = None
    unsaved: list[str] = field(default_factory=list)
    powers_of_two: bool = False
    held_by: list[str] = field(default_factory=list)
    scaled: bool = False
    outputs_kept: int = 0
    output_change: float | None = None
    output_scales: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def spread_before(self) -> float | None:
        """Largest over smallest average change rate before the between-layer step."""
        return _spread([layer.rate_before for layer in self.layers])

    @property
    def spread_after(self) -> float | None:
        """Largest over smallest average change rate after the between-layer step."""
        return _spread([layer.rate_after for layer in self.layers])

    def add_rates(self, first: Measurement, last: Measurement, factors: dict[str, float]) -> None:
        """Change rates before and after the between-layer step, and what it multiplied the weights by."""
        if not self.layers:
            self.layers = [LayerReport(name, tuple(layer.weight.shape)) for name, layer in first.layers.items()]
        before, after = first.rates.mean, last.rates.mean
        for row in self.layers:
            row.rate_before, row.rate_after = before.get(row.name), after.get(row.name)
            row.scale = factors.get(row.name)
            if row.name in last.left_out:
                row.add_note(f"left out of the balance: {last.left_out[row.name]}")
        self.rate_images = len(first.outputs)

    def to_dict(self) -> dict:
        """Plain values, ready for JSON."""
        return asdict(self) | {"spread_before": self.spread_before, "spread_after": self.spread_after}

    def __str__(self) -> str:
        rows = [COLUMNS, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        used = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows[1:])]
        text = [[row[c].ljust(widths[c]) if c < 3 else row[c].rjust(widths[c]) for c in used] for row in rows]
        lines = ["  ".join(cells).rstrip() for cells in text]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(f"{self.images} images, {self.seconds:.1f} s")
        if self.output_change is not None:
            rounds = f"{self.rounds} round{'s' * (self.rounds != 1)} on {self.rate_images} images"
            lines.append(
                f"spread of change rates {self.spread_before:.4g} -> {self.spread_after:.4g} in {rounds}; "
                f"relative change of the output {self.output_change:.1e}"
            )
        lines += self._about_the_function()
        lines += [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]
        lines += self._about_the_rest()
        return "\n".join(lines)

    def _about_the_function(self) -> list[str]:
        lines = []
        if self.output_change is not None and self.rounds and (self.spread_after or 1) > HELD:
            lines.append(f"the rates are held apart by {self._holding()}")
        if self.output_scales:
            lines.append(f"outputs multiplied by {', '.join(f'{scale:.3g}' for scale in self.output_scales)}")
        if self.powers_of_two:
            lines.append(
                "scales rounded to powers of two, as the network amplifies rounding: deep ones may, in another pass, "
                "have other statistics than those that were set"
            )
        if self.lrn == "estimate":
            lines.append("local response normalisation is left as it is, so that the function of the network changes")
        elif self.lrn == "exact":
            lines.append("the constant of local response normalisation is scaled, so that the function stays")
        if self.unsaved:
            names = _some(self.unsaved)
            lines.append(f"constants were scaled that the state dict does not hold, keep the module: {names}")
        return lines

    def _holding(self) -> str:
        """What keeps the rates from being equal, and what makes them so."""
        if self.scaled:
            return "layers that cannot be scaled, their notes say why"
        parts = [f"parts that are not homogeneous ({_some(self.held_by)})"] if self.held_by else []
        parts += ["scales that are powers of two"] if self.powers_of_two else []
        parts += [f"{self.outputs_kept} outputs that keep their scales"] if self.outputs_kept > 1 else []
        parts = parts or ["shortcuts"]
        return f"{' and by '.join(parts)}, " + 'nonhomogeneous="scale" makes them equal whatever holds them'

    def _about_the_rest(self) -> list[str]:
        lines = []
        if self.kept:
            kept = (f"{name} ({reason})" if reason else name for name, reason in self.kept.items())
            lines.append(f"not initialized: {', '.join(kept)}")
        if self.frozen:
            lines.append(f"frozen, left as they are: {_some(self.frozen)}")
        if self.inactive_dropout:
            names = ", ".join(self.inactive_dropout)
            lines.append(f"inactive here, though random in training: {names}; dropout modules are active")
        if self.random:
            names = ", ".join(self.random)
            lines.append(
                f"random even in evaluation mode ({names}): what comes behind has its statistics over many draws"
            )
        return lines


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _spread(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return max(known) / min(known) if known else None


def _row(layer: LayerReport) -> tuple[str, ...]:
    numbers = (layer.mean_before, layer.std_before, layer.mean_after, layer.std_after)
    rates = (layer.rate_before, layer.rate_after, layer.scale)
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        layer.filters or "kept",
        *("" if value is None else f"{value:.3g}" for value in numbers),
        *("" if value is None else f"{value:.4g}" for value in rates),
        f"{layer.seconds:.2f}" if layer.seconds else "",
    )
