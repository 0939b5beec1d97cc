"""Labels: which scale each element of each value of a graph has.

An element's scale is written as a label: the number of a free variable, 0 where it is pinned, -1 where the element is
zero, which any scale fits. Labels are tensors shaped like the values (for two images), so that the operations which
move elements are applied to the labels as they are to the values. Equal scales are linear constraints between
variables.
"""

import torch
from torch import Tensor, nn

from initializers._graph import Graph, Operation, Ref
from initializers._scales import PINNED, Scales

ZERO = -1  # the label of what is zero


class Labels:
    """The labels of the values of a graph, and the constraints between their scales."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.scales = Scales()
        self.labels: dict[int, Tensor] = {}
        self.position = 0  # of the operation that is followed
        self.last_uses = {i: n for n, operation in enumerate(graph.operations) for i in operation.inputs}
        self.last_uses |= dict.fromkeys([*graph.outputs, *graph.others], len(graph.operations))
        found = graph.layers.found.values()
        self.affine = {graph.layers.owner(tensor) for layer in found for tensor in (layer.weight, layer.bias)} - {None}

    def _label(self, operation: Operation, found: list[Tensor]) -> None:
        """Give the outputs of an operation their labels."""
        for index, labels in zip(operation.outputs, found, strict=True):
            in_place = index in operation.inputs and labels.shape == self._of(Ref(index)).shape
            if in_place and self._seen_later(index):
                self._overwrite(index, labels)
            else:
                self.labels[index] = compact(labels)

    def _seen_later(self, index: int) -> list[int]:
        """Other values that change with one that is changed in place, and are used after that."""
        found = [other for other in self.graph.aliases(index) if other in self.labels and other != index]
        return [other for other in found if self.last_uses.get(other, -1) > self.position]

    def _shape(self, operation: Operation) -> torch.Size:
        return self.graph.shapes[operation.outputs[0]]

    def _of(self, leaf) -> Tensor:
        """Labels of an argument: of a value or of a number."""
        if not isinstance(leaf, Ref):
            return full(PINNED if leaf else ZERO, ())
        if leaf.index not in self.labels:
            label, parameter = PINNED, self._leaf(leaf.index)
            if parameter is not None:
                label = self.scales.new()
                self.scales.leaves.append((parameter, label))
            self.labels[leaf.index] = full(label, self.graph.shapes[leaf.index])
        return self.labels[leaf.index]

    def _leaf(self, index: int) -> Tensor | None:
        """The parameter that a value is, if it is one of its own, which may take any scale."""
        parameter = self._parameter(Ref(index))
        owned = parameter is None or self.graph.layers.owner(parameter) in self.affine
        return None if owned else parameter

    def _is_followed(self, index: int) -> bool:
        return index in self.graph.varying or index in self.labels or self._leaf(index) is not None

    def _varies(self, leaf) -> bool:
        return isinstance(leaf, Ref) and leaf.index in self.graph.varying

    def _parameter(self, leaf) -> Tensor | None:
        """The whole parameter that an argument is, where it is not frozen, or constant as long as weights are set."""
        tensor = self.graph.constants.get(leaf.index) if isinstance(leaf, Ref) else None
        learned = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        return tensor if learned and id(tensor) not in self.graph.layers.factors else None

    def _pin(self, labels: Tensor) -> None:
        for label in labels.unique().tolist():
            self.scales.constrain((int(label), 1))

    def _merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Force two values to the same scales, element by element; their common labels.

        Zero has any scale: there the other's label counts. Of all elements only the pairs that differ are looked at:
        each is one constraint.
        """
        one, other = torch.broadcast_tensors(one, other)
        merged = torch.where(one == ZERO, other, one)
        one, other = _without_repeats(one, other)
        differ = (one != other) & (one != ZERO) & (other != ZERO)
        for a, b in torch.stack([one[differ], other[differ]]).unique(dim=1).T.int().tolist():
            self.scales.constrain((a, 1), (b, -1))
            if self.scales.through_lrn.keys() & {a, b}:  # a measured scale is never exactly another
                self.scales.constrain((a, 1))
        return merged

    def _uniform(self, labels: Tensor, dimensions) -> Tensor:
        """Force a value to one scale along some dimensions, which are kept with size 1."""
        dimensions = tuple(dimension % labels.ndim for dimension in dimensions)
        if not dimensions:
            return labels
        if not labels.numel():  # of images that went elsewhere when the graph was recorded
            return full(PINNED, [1 if d in dimensions else size for d, size in enumerate(labels.shape)])
        first = labels.amax(dimensions, keepdim=True)
        self._merge(first, labels)
        return first

    def _by_channel(self, labels: Tensor, channel: int) -> Tensor:
        """Force each channel to one scale; their labels."""
        return self._uniform(labels, [d for d in range(labels.ndim) if d != channel]).flatten()

    def _overwrite(self, index: int, labels: Tensor) -> None:
        """Change a value in place; what was zero is so no longer, in all that shares its memory and is used later."""
        before = self._of(Ref(index))
        if ((before == ZERO) & (labels != ZERO)).any():
            later = self._seen_later(index)
            for alias in [index, *later] if later else []:
                self.labels[alias] = torch.where(self.labels[alias] == ZERO, PINNED, self.labels[alias])
                self.scales.pinned_by.add("memory that is written through a view")
        self.labels[index] = compact(self._merge(labels, self._of(Ref(index))))

    def _product(self, one: Tensor, other: Tensor, power: int = 1) -> Tensor:
        """Labels of a product, whose scale is the product of scales: of the first and of a power of the second."""
        one, other = torch.broadcast_tensors(compact(one), compact(other))
        shape = one.shape
        one, other = _without_repeats(one, other)
        pairs, where = torch.stack([one.flatten(), other.flatten()]).unique(dim=1, return_inverse=True)
        found = [self._of_product(int(a), int(b), power) for a, b in pairs.T.tolist()]
        return torch.tensor([float(label) for label in found], dtype=torch.float32)[where].view(one.shape).expand(shape)

    def _of_product(self, one: int, other: int, power: int) -> int:
        if ZERO in (one, other):
            return ZERO
        if other == PINNED or (one == PINNED and power == 1):
            return max(one, other)
        self._pin_through_lrn(torch.tensor([one, other]))
        output = self.scales.new()
        self.scales.constrain((output, 1), (one, -1), (other, -power))
        return output

    def _pin_through_lrn(self, labels: Tensor) -> None:
        self._pin(labels[self.scales.is_through_lrn(labels)])


def full(label: int, shape) -> Tensor:
    return torch.tensor(float(label), dtype=torch.float32).expand(shape)


def _without_repeats(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Of dimensions along which both are expanded the first element, which tells all."""
    for dimension in range(one.ndim):
        if one.stride(dimension) == other.stride(dimension) == 0 and one.shape[dimension]:
            one, other = one.narrow(dimension, 0, 1), other.narrow(dimension, 0, 1)
    return one, other


def compact(labels: Tensor) -> Tensor:
    """The same labels, without memory for dimensions along which they are the same."""
    shape = labels.shape
    for dimension in range(labels.ndim):
        head = labels.narrow(dimension, 0, min(1, labels.shape[dimension]))
        if labels.stride(dimension) == 0 or bool((labels == head).all()):
            labels = head
    return labels.expand(shape)
