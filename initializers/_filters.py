"""Filters: the weights of one affine layer before any scaling (section 3.3).

The data-driven kinds see the layer's real input as patches, one row per output position: exactly the vectors that
the layer multiplies by its weights, padding included. With groups, each group has its own patches and filters; all
groups are computed together as one batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from initializers._model import InitializationError

KINDS = ("gaussian", "pca", "zca", "kmeans", "patches", "orthonormal")
DATA_DRIVEN = ("pca", "zca", "kmeans", "patches")

GAUSSIAN_STD = 0.01  # of the unscaled Gaussian baseline (section 4.1); Algorithm 1 makes the scale irrelevant
MAX_PATCH_VALUES = 32_000_000  # patches are drawn until this many floats (128 MB): 88,000 at CaffeNet's conv1
KMEANS_ITERATIONS = 10  # Coates & Ng (2012) find ten sufficient
MIN_EIGENVALUE = 1e-6  # relative to the largest; below, a direction of the patches is rounding noise


@torch.no_grad()
def draw_filters(kind: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
    """New weights for `layer`, whose input is `x`.

    - ``gaussian``: N(0, 0.01²).
    - ``orthonormal``: the rows are orthonormal, or the columns where there are more outputs than inputs.
    - ``pca``: the leading principal components of the patches, scaled so that the outputs are white.
    - ``zca``: the white outputs closest to those of random Gaussian filters, C^(-1/2) T with T Gaussian and C the
      covariance of the outputs of T.
    - ``kmeans``: the centres of spherical k-means on the whitened patches (Coates & Ng, 2012), taken back to the
      input space.
    - ``patches``: random whitened patches of unit length, taken back to the input space.

    Whitening keeps the leading `outputs` principal components of a group, as many as there are filters. Where the
    outputs exceed the dimension of the patches (64 filters on 3x3x3) all directions are kept: k-means and patches
    need no more; ``pca`` follows its components with random directions of the whitened space, since there is no
    further component; ``zca`` uses the pseudo-inverse.

    Returns:
        The weights, shaped as `layer.weight`, and a note: empty, or why another kind was used. Layers for which
        there are fewer samples than outputs become Gaussian.
    """
    weight = layer.weight
    groups = getattr(layer, "groups", 1)
    shape = (groups, weight.shape[0] // groups, weight[0].numel())
    if kind == "gaussian":
        return torch.empty_like(weight).normal_(0, GAUSSIAN_STD, generator=generator), ""
    if kind == "orthonormal":
        blocks = torch.empty(shape, device=weight.device)
        for block in blocks:
            nn.init.orthogonal_(block, generator=generator)
        return blocks.view(weight.shape), ""

    outputs = shape[1]
    patches = draw_patches(layer, x, MAX_PATCH_VALUES // (groups * shape[2]), generator)
    if patches.shape[1] < outputs:
        note = f"{patches.shape[1]} samples for {outputs} outputs"
        return torch.empty_like(weight).normal_(0, GAUSSIAN_STD, generator=generator), note
    patches -= patches.mean(1, keepdim=True)

    if kind == "zca":
        projection = _randn(shape, generator)
        responses = patches @ projection.mT
        values, vectors = _eigh(responses.mT @ responses / responses.shape[1])
        filters = (vectors * _inverse_sqrt(values).unsqueeze(1)) @ vectors.mT @ projection
        return _as_weight(layer, filters), ""

    whitening = whitening_matrix(patches, outputs)
    if kind == "pca":
        codes = _components(whitening, outputs, generator)
    else:
        points = F.normalize(patches @ whitening, dim=2)
        start = torch.randperm(points.shape[1], generator=generator, device=x.device)[:outputs]
        codes = points[:, start] if kind == "patches" else spherical_kmeans(points, start, generator)
    return _as_weight(layer, codes @ whitening.mT), ""


def draw_patches(layer: nn.Module, x: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Up to `limit` random patches of the layer's input, without replacement: float32 (groups, patches, patch).

    A patch is what one output position sees, padding included; for a convolution in the order (kernel height, kernel
    width, channel), the layout in which a patch is gathered as a few contiguous runs. Only the drawn ones ever are.
    """
    x = x.detach().float()
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        chosen = torch.randperm(len(rows), generator=generator, device=x.device)[:limit]
        return rows[chosen].unsqueeze(0)
    windows = _windows(layer, pad(layer, x).permute(0, 2, 3, 1).contiguous())
    images, rows, columns = windows.shape[:3]
    chosen = torch.randperm(images * rows * columns, generator=generator, device=x.device)[:limit]
    image, position = chosen // (rows * columns), chosen % (rows * columns)
    patches = windows[image, position // columns, position % columns]
    patches = patches.unflatten(3, (layer.groups, -1)).permute(3, 0, 1, 2, 4)
    return patches.flatten(2)


def _as_weight(layer: nn.Module, filters: Tensor) -> Tensor:
    """Filters (groups, outputs, patch), in the order of `draw_patches`, as the weights of the layer."""
    if isinstance(layer, nn.Linear):
        return filters[0]
    return filters.view(layer.out_channels, *layer.kernel_size, -1).permute(0, 3, 1, 2)


def pad(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the layer's padding, in the layer's padding mode."""
    if not any(layer._reversed_padding_repeated_twice):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A view of a padded input in NHWC layout: (images, rows, columns, kernel height, kernel width, channels)."""
    (kernel_h, kernel_w), (stride_h, stride_w), (step_h, step_w) = (
        layer.kernel_size,
        layer.stride,
        layer.dilation,
    )
    images, height, width, channels = x.shape
    rows = (height - step_h * (kernel_h - 1) - 1) // stride_h + 1
    columns = (width - step_w * (kernel_w - 1) - 1) // stride_w + 1
    image, row, column, channel = x.stride()
    return x.as_strided(
        (images, rows, columns, kernel_h, kernel_w, channels),
        (image, row * stride_h, column * stride_w, row * step_h, column * step_w, channel),
    )


def whitening_matrix(patches: Tensor, components: int) -> Tensor:
    """Principal directions of centred patches (groups, patches, patch), each divided by its standard deviation.

    Returns:
        (groups, patch, components), the leading first, at most as many as the patch has dimensions; columns are zero
        where the patches do not vary.
    """
    values, vectors = _eigh(patches.mT @ patches / patches.shape[1])
    return (vectors * _inverse_sqrt(values).unsqueeze(1))[:, :, :components]


def spherical_kmeans(points: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """Spherical k-means: centres of unit length that maximise the cosine to the points assigned to them.

    Args:
        points: unit vectors (groups, points, dimension).
        start: indices (clusters,) of the points that are the first centres.

    Returns:
        Centres (groups, clusters, dimension). One matrix product assigns all points of all groups and another sums
        them; a cluster that loses all its points starts again at a random point.
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
        # Sums as a product with the membership matrix: deterministic on a GPU, where scattered additions are not.
        members.zero_().scatter_(2, assigned.unsqueeze(2), 1.0)
        sums = members.mT @ points
        reseed = points[:, torch.randint(count, (clusters,), generator=generator, device=points.device)]
        empty = members.sum(1).unsqueeze(2) == 0
        centres = F.normalize(torch.where(empty, reseed, sums), dim=2)
    return centres


def _components(whitening: Tensor, outputs: int, generator: torch.Generator) -> Tensor:
    """Codes (groups, outputs, components): one component each; random directions once the components run out."""
    groups, _, components = whitening.shape
    present = whitening.abs().amax(1) > 0
    codes = F.normalize(_randn((groups, outputs, components), generator) * present.unsqueeze(1), dim=2)
    rows = torch.arange(components, device=whitening.device)
    identity = torch.eye(components, device=whitening.device)
    codes[:, rows] = torch.where(present.unsqueeze(2), identity, codes[:, rows])
    return codes


def _eigh(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (as columns), the largest first."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(-1), vectors.flip(-1)
    if (values[:, 0] <= 0).any():
        raise InitializationError("the layer's input has no variance: pass more, or more varied, images")
    return values, vectors


def _inverse_sqrt(values: Tensor) -> Tensor:
    """1 / sqrt of the eigenvalues (groups, components), largest first; 0 where they are rounding noise."""
    return torch.where(values > MIN_EIGENVALUE * values[:, :1], values, torch.inf).rsqrt()


def _randn(shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
