"""Filters: the weights of one affine layer before any scaling (section 3.3).

The data-driven kinds see the layer's real input as patches, one row per output position: exactly the vectors that
the layer multiplies by its weights, padding included. With groups, each group has its own patches and filters; all
groups are computed together as one batch.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from initializers._layer import Call, Layer

Filters = Literal["gaussian", "pca", "zca", "kmeans", "patches", "orthonormal"]
DATA_DRIVEN = ("pca", "zca", "kmeans", "patches")

GAUSSIAN_STD = 0.01  # of the unscaled Gaussian baseline (section 4.1); Algorithm 1 makes the scale irrelevant
MAX_PATCH_VALUES = 32_000_000  # patches are drawn until this many floats (128 MB): 88,000 at CaffeNet's conv1
LANCZOS_DIMENSION = 500  # below, an eigendecomposition takes no time
LANCZOS_BLOCK = 32  # vectors: more need a larger space for the same accuracy, fewer make products slow
LANCZOS_START = 3  # times as many dimensions as eigenvectors, before their errors are looked at
LANCZOS_MOST = 0.6  # of all dimensions; with more an eigendecomposition is faster
LANCZOS_ERROR = 1e-3  # norm of C v - l v, relative to l; of the least ones by eigh in float32 it is up to 2e-4
GRAM_COLUMNS = 256  # at a time: few leave out nearly half of a symmetric product, many make each part efficient
KMEANS_ITERATIONS = 10  # Coates & Ng (2012) find ten sufficient
FEW_PATCHES = 1_000  # show that patches vary
MEAN_PATCHES = 2_000  # show how much a group's patches vary apart from the direction of their mean
MIN_REST = 0.05
COMMON = 1e6  # size up to which values, and above the inverse of which the largest, are left as they are
MIN_NORM = 1e-4  # of a whitened patch relative to the others'; below, it is rounding noise
MIN_EIGENVALUE = 1e-6  # relative to the largest; below, a direction of the patches is rounding noise


@torch.no_grad()
def draw_filters(
    kind: str, call: Call, inputs: list[Tensor], generator: torch.Generator, centre: bool = False
) -> tuple[Tensor, str, str]:
    """New weights for the layer of `call`, whose input is `inputs`, one tensor per batch.

    - ``gaussian``: N(0, 0.01²).
    - ``orthonormal``: the rows are orthonormal, or the columns where there are more outputs than inputs.
    - ``pca``: the leading principal components of the patches, scaled so that the outputs are white.
    - ``zca``: the white outputs closest to those of random Gaussian filters, C^(-1/2) T with T Gaussian and C the
      covariance of the outputs of T.
    - ``kmeans``: the centres of spherical k-means on the whitened patches (Coates & Ng, 2012), taken back to the
      input space.
    - ``patches``: random whitened patches of unit length, taken back to the input space.

    Whitening keeps the leading `outputs` principal components of a group, as many as there are filters, but at most
    half as many as there are patches: nearly all of few patches would be whitened by variances that are far too small,
    so that deep networks amplify rounding without bound. Where the outputs exceed that, or the dimension of the
    patches (64 filters on 3x3x3), k-means and patches need no more; ``pca`` follows its components with random
    directions of the whitened space; ``zca`` uses the pseudo-inverse.

    Args:
        centre: leave the direction of the mean patch out of patches and filters, so that the outputs have mean 0: for
            a layer without a bias that could see to it. Behind BatchNorm with fresh running statistics, evaluation
            and training mode then agree. Groups whose patches hardly vary otherwise, such as a depthwise filter on
            maps of one position, keep it, and get the sign with which it is positive: a ReLU behind the layer would
            cut the others off, for all images.

    Returns:
        The weights (groups, outputs, inputs, kernel), the kind that was used, and a note: empty, or why it is another.
        Transposed convolutions, which see no patches, layers with fewer samples than outputs, and those whose input
        does not vary become Gaussian.
    """
    layer = call.layer
    if layer.transposed or not centre:
        return _draw(kind, call, inputs, generator, None)
    mean, apart = _mean_direction(call, inputs, generator)
    direction = mean * apart
    blocks, kind, note = _draw(kind, call, inputs, generator, direction)
    filters = blocks.transpose(2, 3).flatten(2).float()
    left = int((~apart).sum())
    if left:
        reason = f"{left} of {layer.groups} groups keep their mean, as their input hardly varies but along it"
        note = f"{note}; {reason}" if note else reason
        filters = torch.where(~apart & (filters @ mean < 0), -filters, filters)
    return _as_blocks(layer, filters - (filters @ direction) @ direction.mT), kind, note


def _draw(
    kind: str, call: Call, inputs: list[Tensor], generator: torch.Generator, direction: Tensor | None
) -> tuple[Tensor, str, str]:
    layer = call.layer
    groups, outputs, width, kernel = layer.blocks.shape
    if kind == "gaussian":
        return _gaussian(layer, generator), kind, ""
    if kind == "orthonormal":
        return orthonormal(layer, generator), kind, ""
    if layer.transposed:
        return _gaussian(layer, generator), "gaussian", "Gaussian filters, as a transposed convolution sees no patches"

    patches = draw_patches(call, inputs, MAX_PATCH_VALUES // (groups * width * kernel), generator)
    if patches.shape[1] < outputs:
        note = f"Gaussian filters, as there are {patches.shape[1]} samples for {outputs} outputs"
        return _gaussian(layer, generator), "gaussian", note
    still = _same(patches[:, :FEW_PATCHES])  # groups of few channels may be dead
    if still.any():
        still = _same(patches)
    if still.all():
        return _gaussian(layer, generator), "gaussian", "Gaussian filters, as its input does not vary"
    size = _at_common_size(patches)
    blocks = _as_blocks(layer, _from_patches(kind, patches, outputs, generator, direction) / size)
    if not still.any():
        return blocks, kind, ""
    note = f"Gaussian filters in {int(still.sum())} of {groups} groups, whose input does not vary"
    return torch.where(still.view(-1, 1, 1, 1), _gaussian(layer, generator), blocks), kind, note


def _mean_direction(call: Call, inputs: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit vectors (groups, patch, 1) along the mean patch of each group, and whether patches vary apart from it.

    The second is bool (groups, 1, 1).
    """
    groups, _, width, kernel = call.layer.blocks.shape
    positions = tuple(range(inputs[0].ndim - 1))
    mean = torch.as_tensor(sum(call.windows(x.detach()).sum(positions, dtype=torch.float32) for x in inputs))
    mean = mean.reshape(kernel, groups, width).transpose(0, 1).flatten(1)
    _at_common_size(mean)
    direction = F.normalize(mean, dim=1).unsqueeze(2)
    patches = draw_patches(call, inputs, MEAN_PATCHES, generator)
    _at_common_size(patches)
    patches -= patches.mean(1, keepdim=True)
    along, total = (patches @ direction).square().sum((1, 2)), patches.square().sum((1, 2))
    return direction, (total - along > MIN_REST * total).view(-1, 1, 1)


def _at_common_size(values: Tensor) -> float:
    """Divide in place, by what is returned: 1, or where values are far from it their size, as a power of two.

    So float32 holds their squares.
    """
    largest = max(map(abs, map(Tensor.item, values.aminmax())))
    if largest == 0 or 1 / COMMON < largest < COMMON:
        return 1.0
    size = 2.0 ** math.floor(math.log2(largest))
    values /= size
    return size


def _same(patches: Tensor) -> Tensor:
    """Whether all patches of a group are the same, (groups,)."""
    return (patches.amax(1) == patches.amin(1)).all(1)


def _from_patches(
    kind: str, patches: Tensor, outputs: int, generator: torch.Generator, direction: Tensor | None
) -> Tensor:
    """Data-driven filters (groups, outputs, patch) from patches (groups, patches, patch), which are centred in place.

    Args:
        direction: taken out of the patches.
    """
    patches -= patches.mean(1, keepdim=True)
    if direction is not None:
        patches -= (patches @ direction) @ direction.mT
    components = min(outputs, patches.shape[1] // 2)  # of more, the patches do not tell the variance
    if kind == "zca":
        projection = _randn((len(patches), outputs, patches.shape[2]), generator)
        responses = patches @ projection.mT
        values, vectors = _eigh(_gram(responses) / responses.shape[1])
        vectors = vectors[:, :, :components]
        return (vectors * _inverse_sqrt(values)[:, None, :components]) @ vectors.mT @ projection

    whitening = whitening_matrix(patches, components, exact=kind == "pca")
    if kind == "pca":
        codes = _components(whitening, outputs, generator)
    else:
        points = _unit(patches @ whitening)
        start = torch.randperm(points.shape[1], generator=generator, device=points.device)[:outputs]
        codes = points[:, start] if kind == "patches" else spherical_kmeans(points, start, generator)
        zero = ~codes.any(2, keepdim=True)
        if zero.any():  # patches that are the mean of their group have no direction
            codes = torch.where(zero, _directions(whitening, outputs, generator), codes)
    return codes @ whitening.mT


def _unit(points: Tensor) -> Tensor:
    """The points (groups, points, dimension) at unit length, in place; those that are rounding noise become 0."""
    norms = torch.linalg.vector_norm(points, dim=2, keepdim=True)
    least = MIN_NORM * norms.square().mean(1, keepdim=True).sqrt()
    return points.mul_(torch.where(norms > least, norms, torch.inf).reciprocal_())


def _directions(whitening: Tensor, outputs: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors (groups, outputs, components) of the whitened space."""
    groups, _, components = whitening.shape
    present = whitening.abs().amax(1) > 0
    return F.normalize(_randn((groups, outputs, components), generator) * present.unsqueeze(1), dim=2)


def draw_patches(call: Call, inputs: list[Tensor], limit: int, generator: torch.Generator) -> Tensor:
    """Up to `limit` random patches of the layer's input, in order, without replacement: (groups, patches, patch).

    A patch is what one output position sees, padding included; for a convolution in the order (*kernel, channel), the
    layout in which a patch is gathered as a few contiguous runs. Only the drawn ones ever are, as float32.
    """
    groups, _, width, kernel = call.layer.blocks.shape
    # The images may be another dimension than the first, as in attention: there the last batch has other positions.
    sizes = [(len(x), *call.windows(x[:1]).shape[1 : x.ndim - 1]) for x in inputs]
    starts = torch.tensor([0, *map(math.prod, sizes)]).cumsum(0)
    chosen = torch.randperm(int(starts[-1]), generator=generator, device=generator.device)[:limit].sort().values
    ends = torch.searchsorted(chosen, starts.to(chosen.device)).tolist()
    patches = torch.empty(groups, len(chosen), kernel * width, device=chosen.device, dtype=torch.float32)
    for x, size, start, first, last in zip(inputs, sizes, starts[:-1].tolist(), ends[:-1], ends[1:], strict=True):
        index = torch.unravel_index(chosen[first:last] - start, size)
        drawn = call.windows(x.detach())[index].float()
        patches[:, first:last] = drawn.reshape(last - first, kernel, groups, width).movedim(2, 0).flatten(2)
    return patches


def orthonormal(layer: Layer, generator: torch.Generator) -> Tensor:
    """Weights (groups, outputs, inputs, kernel) with orthonormal rows, or columns where there are more outputs."""
    groups, outputs, width, kernel = layer.blocks.shape
    blocks = torch.empty(groups, outputs, width * kernel, device=layer.weight.device, dtype=torch.float32)
    for block in blocks:
        torch.nn.init.orthogonal_(block, generator=generator)
    return blocks.unflatten(2, (width, kernel))


def _gaussian(layer: Layer, generator: torch.Generator) -> Tensor:
    """Drawn into the weight itself, as a large one takes long to copy."""
    layer.weight.detach().normal_(0, GAUSSIAN_STD, generator=generator)
    return layer.blocks


def _as_blocks(layer: Layer, filters: Tensor) -> Tensor:
    """Filters (groups, outputs, patch) in the order of `draw_patches` as (groups, outputs, inputs, kernel)."""
    _, _, width, kernel = layer.blocks.shape
    return filters.unflatten(2, (kernel, width)).transpose(2, 3)


def whitening_matrix(patches: Tensor, components: int, exact: bool = True) -> Tensor:
    """Principal directions of centred patches (groups, patches, patch), each divided by its standard deviation.

    Args:
        exact: by an eigendecomposition; where only the space matters that they span, `_leading` may be faster.

    Returns:
        (groups, patch, components), the leading first, at most as many as the patch has dimensions; columns are zero
        where the patches do not vary.
    """
    few = patches.shape[1] < patches.shape[2]  # X X' is smaller than X' X then, and has the same eigenvalues
    covariance = _gram(patches.mT if few else patches) / patches.shape[1]
    leading = None if exact else _leading(covariance, components)
    values, vectors = (part[..., :components] for part in leading or _eigh(covariance))
    if few:
        vectors = F.normalize(patches.mT @ vectors, dim=1)
    return vectors * _inverse_sqrt(values).unsqueeze(1)


def _gram(points: Tensor) -> Tensor:
    """The products of all pairs of columns of points (groups, points, dimension), each pair once."""
    dimension = points.shape[2]
    products = points.new_empty(len(points), dimension, dimension)
    for first in range(0, dimension, GRAM_COLUMNS):
        block = slice(first, first + GRAM_COLUMNS)
        rows = points[:, :, block].mT @ points[:, :, first:]
        products[:, block, first:] = rows
        products[:, first:, block] = rows.mT
    return products


def spherical_kmeans(points: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """Spherical k-means: centres of unit length that maximise the cosine to the points assigned to them.

    Args:
        points: unit vectors (groups, points, dimension).
        start: indices (clusters,) of the points that are the first centres.

    Returns:
        Centres (groups, clusters, dimension). One matrix product assigns all points of all groups; a cluster that loses
        all its points, or whose points cancel each other, starts again at a random point.
    """
    groups, count, _ = points.shape
    clusters = len(start)
    centres = points[:, start]
    assigned = torch.full((groups, count), -1, device=points.device)
    members = points.new_empty(groups, count, clusters)
    for _ in range(KMEANS_ITERATIONS):
        nearest = torch.bmm(points, centres.mT, out=members).argmax(2)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        sums = _sums(points, assigned, members)
        reseed = points[:, torch.randint(count, (clusters,), generator=generator, device=points.device)]
        empty = ~sums.any(2, keepdim=True)  # without points, or with points that cancel each other
        centres = F.normalize(torch.where(empty, reseed, sums), dim=2)
    return centres


def _sums(points: Tensor, assigned: Tensor, members: Tensor) -> Tensor:
    """The sum of the points of each cluster, (groups, clusters, dimension); `members` is memory to work in."""
    groups, _, clusters = members.shape
    if points.is_cuda:  # where scattered additions are not deterministic, and a product with the membership matrix is
        return members.zero_().scatter_(2, assigned.unsqueeze(2), 1.0).mT @ points
    rows = assigned + clusters * torch.arange(groups).unsqueeze(1)
    sums = points.new_zeros(groups * clusters, points.shape[2])
    return sums.index_add_(0, rows.flatten(), points.flatten(0, 1)).unflatten(0, (groups, clusters))


def _components(whitening: Tensor, outputs: int, generator: torch.Generator) -> Tensor:
    """Codes (groups, outputs, components): one component each; random directions once the components run out."""
    components = whitening.shape[2]
    present = whitening.abs().amax(1) > 0
    codes = _directions(whitening, outputs, generator)
    rows = torch.arange(components, device=whitening.device)
    identity = torch.eye(components, device=whitening.device, dtype=whitening.dtype)
    codes[:, rows] = torch.where(present.unsqueeze(2), identity, codes[:, rows])
    return codes


def _eigh(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (as columns), the largest first."""
    try:
        values, vectors = torch.linalg.eigh(covariance)
        converged = bool(values.isfinite().all())  # LAPACK does not always tell
    except torch.linalg.LinAlgError:
        converged = False
    if not converged:  # ill-conditioned, or many equal eigenvalues: too much for single precision
        values, vectors = (part.to(covariance.dtype) for part in torch.linalg.eigh(covariance.double()))
    return values.flip(-1), vectors.flip(-1)


def _leading(covariance: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The leading eigenvalues and eigenvectors (as columns) by block Lanczos, the largest first.

    They are those of the covariance on the space of a few random vectors and of what powers of the covariance make of
    them. The vectors are kept orthogonal by projection, twice, as rounding asks for it (Golub & Van Loan, 10.3).

    Returns:
        As accurate as those of `_eigh` in single precision; None where that is not reached, or no faster.
    """
    groups, dimension, _ = covariance.shape
    size, most = LANCZOS_START * count, LANCZOS_MOST * dimension
    if dimension < LANCZOS_DIMENSION or size > most:
        return None
    generator = torch.Generator(covariance.device).manual_seed(0)
    block, _ = torch.linalg.qr(_randn((groups, dimension, LANCZOS_BLOCK), generator))
    basis = images = covariance.new_empty(groups, dimension, 0)
    while size <= most:
        while basis.shape[2] < size:
            image = covariance @ block
            basis, images = torch.cat([basis, block], 2), torch.cat([images, image], 2)
            block = image
            for _ in range(2):
                block, _ = torch.linalg.qr(block - basis @ (basis.mT @ block))
        values, codes = _eigh(basis.mT @ images)
        values, codes = values[:, :count], codes[:, :, :count]
        vectors = basis @ codes
        errors = torch.linalg.vector_norm(images @ codes - vectors * values.unsqueeze(1), dim=1)
        if (errors <= (LANCZOS_ERROR * values).maximum(MIN_EIGENVALUE * values[:, :1])).all():
            return values, vectors
        size += count
    return None


def _inverse_sqrt(values: Tensor) -> Tensor:
    """1 / sqrt of the eigenvalues (groups, components), largest first; 0 where they are rounding noise."""
    return torch.where(values > MIN_EIGENVALUE * values[:, :1].clamp_min(0), values, torch.inf).rsqrt()


def _randn(shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
