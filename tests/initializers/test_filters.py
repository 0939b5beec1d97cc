from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn

from initializers import _filters, initialize
from initializers._filters import (
    DATA_DRIVEN,
    Filters,
    _as_blocks,
    _gram,
    _leading,
    _sums,
    draw_filters,
    draw_patches,
    spherical_kmeans,
    whitening_matrix,
)
from initializers._layer import Call, Layer
from initializers._layers import Layers, forward

LAYERS = {
    "plain": lambda: nn.Conv2d(6, 12, 3, bias=False),
    "strides": lambda: nn.Conv2d(6, 12, (3, 2), stride=(2, 3), padding=(0, 1), bias=False),
    "dilation": lambda: nn.Conv2d(6, 12, 3, padding=2, dilation=(2, 1), bias=False),
    "groups": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=3, bias=False),
    "same": lambda: nn.Conv2d(6, 12, (4, 3), padding="same", padding_mode="reflect", groups=2, bias=False),
    "circular": lambda: nn.Conv2d(6, 12, 5, padding=1, padding_mode="circular", bias=False),
    "pointwise": lambda: nn.Conv2d(6, 5, 1, bias=False),
    "1d": lambda: nn.Conv1d(6, 12, 5, stride=2, padding=3, dilation=2, groups=2, bias=False),
    "3d": lambda: nn.Conv3d(6, 8, (2, 3, 1), stride=(1, 2, 2), padding=(1, 0, 0), groups=2, bias=False),
    "linear": lambda: nn.Linear(20, 12, bias=False),
    "tokens": lambda: nn.Linear(20, 12, bias=False),
}
TRANSPOSED = {
    "1d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
    "2d": lambda: nn.ConvTranspose2d(20, 60, (2, 3), bias=False),
    "3d": lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(name, samples=200):
    """A layer and an input with a mean and correlations, so that whitening has something to do."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    if isinstance(layer, nn.Linear):
        shape = (samples,) if name == "linear" else (samples, 5)
        return layer, 3 + torch.randn(*shape, 20) @ torch.randn(20, 20)
    if name == "3d":
        x = F.avg_pool3d(torch.randn(samples, 6, 5, 7, 6), 2, stride=1)
    elif name == "1d":
        x = F.avg_pool1d(torch.randn(samples, 6, 23), 3, stride=1)
    else:
        x = F.avg_pool2d(torch.randn(samples, 6, 13, 13), 3, stride=1)
    return layer, 3 + torch.einsum("nc...,cd->nd...", x, torch.randn(6, 6))


def seen(layer, x):
    """The use of a layer in a forward pass and the input it sees there, in several batches."""
    found = []

    def visit(call, x, compute):
        found.append((call, list(x.split([1, 2, len(x) - 3]))))
        return compute()

    model = nn.Sequential(layer)
    with torch.no_grad():
        forward(Layers(model), (x,), visit)
    ((call, inputs),) = found
    assert call.layer.weight is layer.weight
    return call, inputs


def weight_of(layer, blocks):
    """Blocks (groups, outputs, inputs, kernel) as the weight of a layer."""
    return blocks.reshape(layer.weight.shape).contiguous()


def filters_for(kind, layer, x, seed=0, **options):
    """As a weight, and the note."""
    blocks, used, note = draw_filters(kind, *seen(layer, x), generator(seed), **options)
    assert used == ("gaussian" if note.startswith("Gaussian filters, ") else kind)
    assert blocks.dtype == torch.float32
    return weight_of(layer, blocks), note


def rows(layer, outputs):
    """The outputs of a layer, one row per sample, in float64."""
    outputs = outputs.double() if isinstance(layer, nn.Linear) else outputs.double().movedim(1, -1)
    return outputs.flatten(0, -2)


def grouped_covariance(layer, x):
    """Covariance of the outputs within each group (groups, outputs, outputs)."""
    outputs = rows(layer, layer(x)).detach().unflatten(1, (getattr(layer, "groups", 1), -1)).movedim(1, 0)
    centred = outputs - outputs.mean(1, keepdim=True)
    return centred.mT @ centred / centred.shape[1]


def with_filters(kind, layer, x, seed=0):
    layer.weight.data, note = filters_for(kind, layer, x, seed)
    assert note == ""
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_patches_are_what_the_layer_multiplies(name):
    """Filters times patches are the outputs of the layer, each sample once."""
    layer, x = build(name, samples=6)
    call, inputs = seen(layer, x)
    patches = draw_patches(call, inputs, 10**6, generator())
    filters = torch.randn(len(patches), layer.weight.shape[0] // len(patches), patches.shape[2])
    layer.weight.data = weight_of(layer, _as_blocks(call.layer, filters))
    products = (patches @ filters.mT).movedim(0, 1).flatten(1).double()
    outputs = rows(layer, layer(x)).detach()
    assert products.shape == outputs.shape
    torch.testing.assert_close(
        products[products[:, 0].argsort()], outputs[outputs[:, 0].argsort()], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["groups", "linear", "tokens", "3d"])
def test_patches_are_drawn_without_replacement(name):
    call, inputs = seen(*build(name))
    every, some = (draw_patches(call, inputs, limit, generator()) for limit in (10**6, 150))
    assert some.shape == (len(every), 150, every.shape[2])
    known = {tuple(row) for row in every[0].tolist()}
    drawn = [tuple(row) for row in some[0].tolist()]
    assert len(set(drawn)) == 150
    assert set(drawn) <= known
    assert not torch.equal(some, draw_patches(call, inputs, 150, generator(1)))
    assert torch.equal(some, draw_patches(call, [torch.cat(inputs)], 150, generator()))  # whatever the batches


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_pca_and_zca_give_white_outputs(kind, name):
    layer, x = build(name)
    covariance = grouped_covariance(with_filters(kind, layer, x), x)
    torch.testing.assert_close(
        covariance, torch.eye(covariance.shape[1]).double().expand_as(covariance), atol=2e-3, rtol=0
    )


def decompose(layer, x, group=0):
    """Centred patches of a group, in the order of the weight, and their principal variances and directions, float64."""
    if isinstance(layer, nn.Linear):
        patches = x.double().flatten(0, -2)
    else:  # the outputs of filters that are 1 at one place
        units = torch.eye(layer.weight[0].numel()).view(-1, *layer.weight.shape[1:])
        units = units.repeat(layer.groups, *[1] * (layer.weight.ndim - 1))
        patches = rows(layer, layer._conv_forward(x, units, None)).chunk(layer.groups, dim=1)[group]
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    return patches, values.flip(0), vectors.flip(1)


@pytest.mark.parametrize("name", LAYERS)
def test_pca_filters_are_the_leading_principal_components(name):
    layer, x = build(name)
    filters = with_filters("pca", layer, x).weight.detach().double().flatten(1)
    blocks = filters.chunk(getattr(layer, "groups", 1))
    for group, block in enumerate(blocks):
        _, values, vectors = decompose(layer, x, group)
        components = vectors.T[: len(block)] / values[: len(block), None].sqrt()
        cosine = F.cosine_similarity(block, components).abs()
        torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-3, rtol=0)
        torch.testing.assert_close(block.norm(dim=1), components.norm(dim=1), atol=0, rtol=1e-2)


@pytest.mark.parametrize("name", ["plain", "linear"])
def test_zca_outputs_are_the_closest_white_ones_to_those_of_random_filters(name):
    """Which they are if the covariance of the two is symmetric and positive (the orthogonal Procrustes problem)."""
    layer, x = build(name)
    drawn, (call, inputs) = generator(), seen(layer, x)
    draw_patches(call, inputs, 10**6, drawn)
    random = torch.randn(1, *layer.weight.flatten(1).shape, generator=drawn)
    white = rows(layer, with_filters("zca", layer, x)(x)).detach()
    layer.weight.data = weight_of(layer, _as_blocks(call.layer, random))
    covariance = torch.cat([white, rows(layer, layer(x)).detach()], 1).T.cov(correction=0)[:12, 12:]
    torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=1e-3 * covariance.abs().max().item())
    assert torch.linalg.eigvalsh(covariance).min() > 0


@pytest.mark.parametrize("name", ["strides", "groups", "linear"])
@pytest.mark.parametrize("kind", ["patches", "kmeans"])
def test_codes_are_unit_vectors_of_the_whitened_space(kind, name):
    """`patches` are some of the whitened patches, `kmeans` are centres; both are taken back to the input space."""
    layer, x = build(name)
    filters = with_filters(kind, layer, x).weight.detach().double().flatten(1)
    for group, block in enumerate(filters.chunk(getattr(layer, "groups", 1))):
        patches, values, vectors = decompose(layer, x, group)
        std, vectors = values[: len(block)].sqrt(), vectors[:, : len(block)]
        codes = block @ vectors * std  # undoes whitening = vectors / std
        torch.testing.assert_close(codes / std @ vectors.T, block, rtol=0, atol=1e-3 * block.abs().max().item())
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(len(block)).double(), rtol=0, atol=1e-3)
        points = F.normalize(patches @ vectors / std, dim=1)
        cosine = codes @ points.T
        if kind == "patches":
            assert cosine.max(1).values.min() > 0.999
            assert len(set(cosine.argmax(1).tolist())) == len(block)
        else:  # closer to the points than as many of the points are
            assert cosine.max(0).values.mean() > 1.05 * (points[: len(block)] @ points.T).max(0).values.mean()


def directions(*shape):
    return F.normalize(torch.randn(*shape, generator=generator(7)), dim=-1)


def test_kmeans_finds_planted_clusters():
    planted = directions(2, 8, 20)
    points = F.normalize(planted.repeat(1, 50, 1) + 0.05 * torch.randn(2, 400, 20, generator=generator()), dim=2)
    centres = spherical_kmeans(points, torch.arange(16, 24), generator())  # one first centre in each cluster
    torch.testing.assert_close(centres.norm(dim=2), torch.ones(2, 8))
    assert (centres * planted).sum(2).min() > 0.99


def test_kmeans_is_as_good_as_scikit_learn():
    """Mean cosine of the points to their centres, against Lloyd's algorithm run to its end from as many points."""
    layer, x = build("plain")
    patches, values, vectors = decompose(layer, x)
    points = F.normalize((patches @ vectors / values.sqrt())[:, :20], dim=1).float()[:5000]
    centres = spherical_kmeans(points.unsqueeze(0), torch.arange(32), generator())[0]
    baseline = KMeans(32, init="random", n_init=1, max_iter=300, random_state=0).fit(points.numpy()).cluster_centers_
    ours, theirs = (
        (points @ F.normalize(c, dim=1).T).max(1).values.mean() for c in (centres, torch.from_numpy(baseline))
    )
    assert ours > 0.975 * theirs


@pytest.mark.parametrize("dimension", [1, 40, 256, 257, 700])
def test_products_of_columns_are_those_of_all_pairs(dimension):
    points = torch.randn(2, 50, dimension, generator=generator())
    products = _gram(points)
    torch.testing.assert_close(products, points.mT @ points)
    assert torch.equal(products, products.mT)


def covariance_of(values):
    """Two covariances with the given eigenvalues."""
    basis, _ = torch.linalg.qr(torch.randn(2, len(values), len(values), generator=generator()))
    return (basis * values) @ basis.mT


def test_leading_eigenvectors_are_those_of_an_eigendecomposition():
    """Eigenvalues that fall as those of image patches do, the variances of the last components 600 times smaller."""
    covariance = covariance_of(torch.arange(1.0, 801).pow(-1.4))
    values, vectors = _leading(covariance, 100)
    exact = torch.linalg.eigh(covariance.double())
    torch.testing.assert_close(values, exact.eigenvalues.flip(-1)[:, :100].float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(100).expand(2, -1, -1), atol=1e-5, rtol=0)
    space = exact.eigenvectors.flip(-1)[:, :, :100]
    assert torch.linalg.matrix_norm(vectors - space @ (space.mT @ vectors.double()), 2).max() < 0.05


def test_leading_eigenvectors_of_few_dimensions():
    """What varies in fewer directions than are asked for: the others have no variance."""
    covariance = covariance_of(torch.cat([torch.ones(40), torch.zeros(760)]))
    values, _ = _leading(covariance, 60)
    torch.testing.assert_close(values, torch.cat([torch.ones(40), torch.zeros(20)]).expand(2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("values", [torch.linspace(1, 0.9, 800), torch.full((800,), torch.nan), torch.ones(60)])
def test_no_leading_eigenvectors_where_they_are_not_found(values):
    """Eigenvalues that hardly differ, NaN, and a matrix so small that an eigendecomposition is as fast."""
    assert _leading(torch.diag(values).unsqueeze(0), len(values) // 8) is None


def test_kmeans_is_as_good_on_leading_eigenvectors(monkeypatch):
    layer = nn.Conv2d(64, 64, 3)
    images, filters = (
        torch.randn(20, 3, 40, 40, generator=generator()),
        torch.randn(64, 3, 5, 5, generator=generator(1)),
    )
    x = F.avg_pool2d(F.conv2d(images, filters).relu(), 2)
    patches = draw_patches(*seen(layer, x), 10_000, generator())[0]
    patches -= patches.mean(0)
    whitening = whitening_matrix(patches.unsqueeze(0), 64)[0]
    points = F.normalize(patches @ whitening, dim=1)
    found, cosines = [], []
    for least in (_filters.LANCZOS_DIMENSION, 10_000):
        monkeypatch.setattr(_filters, "LANCZOS_DIMENSION", least)
        blocks = draw_filters("kmeans", *seen(layer, x), generator())[0]
        centres = blocks.transpose(2, 3).flatten(2)[0] @ torch.linalg.pinv(whitening.T)
        cosines.append((points @ F.normalize(centres, dim=1).T).max(1).values.mean().item())
        found.append(blocks)
    assert not torch.equal(*found)  # two ways
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-3)


def test_sums_of_clusters_are_those_of_their_points():
    points = torch.randn(3, 200, 7, generator=generator())
    assigned = torch.randint(5, (3, 200), generator=generator())
    sums = _sums(points, assigned, points.new_empty(3, 200, 6))  # nothing is in the last cluster
    for group in range(3):
        for cluster in range(6):
            torch.testing.assert_close(sums[group, cluster], points[group, assigned[group] == cluster].sum(0))


@pytest.mark.gpu
def test_kmeans_on_a_gpu_repeats_itself_to_the_bit():
    points = F.normalize(torch.randn(2, 5_000, 30, generator=generator()), dim=2).cuda()
    found = [spherical_kmeans(points, torch.arange(40), torch.Generator("cuda").manual_seed(0)) for _ in range(3)]
    assert all(torch.equal(found[0], other) for other in found)


def test_an_empty_cluster_starts_again():
    points = directions(1, 6, 10).repeat(1, 40, 1)
    start = torch.arange(0, 24, 6)  # four times the same point
    centres = spherical_kmeans(points, start, generator())[0]
    assert torch.equal(centres, spherical_kmeans(points, start, generator())[0])
    assert (centres @ centres.T).fill_diagonal_(0).max() < 0.99
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(4))


def test_a_cluster_whose_points_cancel_starts_again():
    """In one dimension, as for a depthwise filter, half of the points are often just opposite to the others."""
    points = torch.tensor([[1.0], [-1.0]]).repeat(20, 1).expand(3, 40, 1)
    centres = spherical_kmeans(points, torch.tensor([0]), generator())
    assert torch.equal(centres.abs(), torch.ones(3, 1, 1))


@pytest.mark.parametrize("kind", get_args(Filters))
def test_more_outputs_than_inputs(kind):
    """64 filters on 3x3x3."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 64, 3), F.avg_pool2d(torch.randn(30, 3, 14, 14), 3, stride=1)
    layer = with_filters(kind, layer, x)
    assert torch.isfinite(layer.weight).all()
    assert F.normalize(layer.weight.detach().flatten(1), dim=1).unique(dim=0).shape[0] == 64
    if kind == "pca":  # the components, then random directions among them
        covariance = grouped_covariance(layer, x)[0]
        torch.testing.assert_close(covariance[:27, :27], torch.eye(27).double(), atol=2e-3, rtol=0)
        torch.testing.assert_close(covariance.diagonal(), torch.ones(64).double(), atol=2e-3, rtol=0)
        assert torch.linalg.matrix_rank(layer.weight[27:].flatten(1)) == 27
    model = nn.Sequential(layer)
    initialize(model, x, kind, between=False)
    std, mean = torch.std_mean(layer(x).detach(), (0, 2, 3), correction=0)
    torch.testing.assert_close(std, torch.ones(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean, torch.full((64,), 0.1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["pca", "kmeans", "patches"])
def test_directions_without_variance_get_no_weight(kind):
    """The first channels are the same but for rounding, of which the covariance makes eigenvalues of either sign."""
    layer, x = nn.Conv2d(6, 9, 1, bias=False), build("pointwise")[1]
    x[:, 1:4] = x[:, :1] + 1e-4 * torch.randn(len(x), 3, 11, 11)
    layer = with_filters(kind, layer, x)
    weight = layer.weight.detach().flatten(1)
    assert (weight[:, 1:4] - weight[:, :1]).abs().max() < 1e-3 * weight.abs().max()
    if kind == "pca":
        variances = grouped_covariance(layer, x)[0].diagonal()
        torch.testing.assert_close(variances, torch.ones(9).double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", DATA_DRIVEN)
def test_fewer_samples_than_outputs(kind, monkeypatch):
    layer, x = build("linear", samples=11)
    weight, note = filters_for(kind, layer, x)
    assert note == "Gaussian filters, as there are 11 samples for 12 outputs"
    assert weight.std() == pytest.approx(0.01, rel=0.2)
    assert filters_for(kind, layer, torch.randn(12, 20))[1] == ""
    monkeypatch.setattr("initializers._filters.MAX_PATCH_VALUES", 10 * 20)
    note = "Gaussian filters, as there are 10 samples for 12 outputs"
    assert filters_for(kind, layer, torch.randn(12, 20))[1] == note


@pytest.mark.parametrize("kind", DATA_DRIVEN)
@pytest.mark.parametrize("name", ["groups", "1d", "3d"])
def test_groups_see_their_own_channels_only(kind, name):
    layer, x = build(name)
    before, _ = filters_for(kind, layer, x)
    second = slice(6 // layer.groups, 2 * 6 // layer.groups)
    x[:, second] = x[:, second].flip(2) ** 2
    after, _ = filters_for(kind, layer, x)
    pairs = zip(before.chunk(layer.groups), after.chunk(layer.groups), strict=True)
    assert [torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs] == [True, False, True][: layer.groups]


@pytest.mark.parametrize("kind", DATA_DRIVEN)
def test_groups_whose_input_is_dead(kind):
    layer, x = build("groups")
    x -= x.amin((0, 2, 3), keepdim=True)
    before, _ = filters_for(kind, layer, x)
    x[:, 2:4] = 0  # the padding is as dead
    after, note = filters_for(kind, layer, x)
    assert note == "Gaussian filters in 1 of 3 groups, whose input does not vary"
    before, after = before.chunk(3), after.chunk(3)
    for group in (0, 2):
        torch.testing.assert_close(after[group], before[group], rtol=1e-3, atol=1e-5)
    assert after[1].std() == pytest.approx(0.01, rel=0.2)
    after, note = filters_for(kind, layer, 0 * x)
    assert note == "Gaussian filters, as its input does not vary"
    assert after.std() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("kind", get_args(Filters))
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_see_no_patches(kind, name):
    layer = TRANSPOSED[name]()
    x = torch.randn(9, layer.in_channels, *[5] * len(layer.kernel_size))
    blocks, _, note = draw_filters(kind, *seen(layer, x), generator(), centre=layer.bias is None)
    groups = layer.groups
    assert blocks.shape == (
        groups,
        layer.out_channels // groups,
        layer.in_channels // groups,
        layer.weight[0, 0].numel(),
    )
    if kind == "orthonormal":
        rows = blocks.flatten(2)
        gram = rows @ rows.mT if rows.shape[1] <= rows.shape[2] else rows.mT @ rows
        torch.testing.assert_close(gram, torch.eye(gram.shape[1]).expand_as(gram), atol=1e-5, rtol=0)
    else:
        assert blocks.std().item() == pytest.approx(0.01, rel=4 / (2 * blocks.numel()) ** 0.5)
    expected = "Gaussian filters, as a transposed convolution sees no patches" if kind in DATA_DRIVEN else ""
    assert note == expected


@pytest.mark.parametrize("kind", get_args(Filters))
@pytest.mark.parametrize("name", LAYERS)
def test_centred_filters_leave_the_mean_out(kind, name):
    """They are orthogonal to the mean patch of their group, and otherwise what they would be."""
    layer, x = build(name)
    plain = rows(layer, layer_with(layer, filters_for(kind, layer, x)[0])(x)).detach()
    weight, note = filters_for(kind, layer, x, centre=True)
    assert note == ""
    outputs = rows(layer, layer_with(layer, weight)(x)).detach()
    std, mean = torch.std_mean(outputs, 0, correction=0)
    assert (mean / std).abs().max() < 1e-4
    assert (plain.mean(0) / plain.std(0)).abs().max() > 0.1
    assert std.min() > 1e-3 * std.max()


def layer_with(layer, weight):
    layer.weight.data = weight
    return layer


@pytest.mark.parametrize("kind", DATA_DRIVEN)
def test_centred_filters_are_those_of_the_patches_without_their_mean(kind):
    """Of patches whose mean varies as nothing else, and of the others what is left is what they were."""
    torch.manual_seed(0)
    x = torch.randn(500, 5) * torch.tensor([3.0, 0.5, 1.0, 2.0, 4.0])
    x = x - x.mean(0)
    x[:, 0] += 20  # the direction of the mean patch is the first input
    layer = nn.Linear(5, 4, bias=False)
    weight, _ = filters_for(kind, layer, x, centre=True)
    assert weight[:, 0].abs().max() < 1e-4 * weight.abs().max()
    outputs = (x @ weight.T).double()
    covariance = outputs.T.cov(correction=0)
    if kind in ("pca", "zca"):
        torch.testing.assert_close(covariance, torch.eye(4).double(), atol=2e-3, rtol=0)
    else:  # codes are of unit length in the whitened space of the other four inputs
        codes = weight[:, 1:] * x[:, 1:].std(0, correction=0)
        assert torch.linalg.matrix_rank(codes) == 4
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(4), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", get_args(Filters))
def test_groups_that_only_vary_along_their_mean_keep_it(kind):
    """A depthwise filter on one position: its only weight is along the mean."""
    layer = nn.Conv2d(6, 6, 1, groups=6, bias=False)
    x = 3 + torch.randn(200, 6, 4, 4, generator=generator())
    weight, _ = filters_for(kind, layer, x, centre=True)
    assert weight.abs().min() > 1e-4
    mixed = nn.Conv2d(4, 4, (1, 2), groups=2, bias=False)
    x = 3 + torch.randn(200, 4, 1, 6, generator=generator())
    x[:, :2] = x[:, :2].mean((1, 3), keepdim=True)  # in the first group all inputs are the same
    means = layer_with(mixed, filters_for(kind, mixed, x, centre=True)[0])(x).mean((0, 2, 3)).abs()
    stds = mixed(x).std((0, 2, 3))
    assert (means / stds)[:2].min() > 1
    assert (means / stds)[2:].max() < 1e-4


def test_gaussian_is_that_of_the_paper():
    weight, _ = filters_for("gaussian", nn.Conv2d(30, 40, 5, groups=2), torch.zeros(9, 30, 5, 5))
    assert weight.shape == (40, 15, 5, 5)
    assert weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert abs(weight.mean().item()) < 3e-4
    assert (weight.abs() < 0.01).float().mean().item() == pytest.approx(0.6827, abs=0.02)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(8, 12, 3, groups=2), nn.Linear(20, 20), nn.Conv2d(3, 64, 3), nn.Linear(5, 9), nn.Conv1d(4, 9, 2)],
)
def test_orthonormal_rows_or_columns(layer):
    x = torch.zeros(9, layer.weight.shape[1] * getattr(layer, "groups", 1), *[3] * (layer.weight.ndim - 2))
    weight, _ = filters_for("orthonormal", layer, x)
    for block in weight.flatten(1).chunk(getattr(layer, "groups", 1)):
        gram = block @ block.T if len(block) <= block.shape[1] else block.T @ block
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("asked", "convolution", "linear"), [(kind, kind, "gaussian") for kind in DATA_DRIVEN] + [("orthonormal",) * 3]
)
def test_linear_layers_after_convolutions_are_gaussian(asked, convolution, linear):
    torch.manual_seed(0)
    images = torch.randn(50, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 5))
    assert [row.filters for row in initialize(model, images, asked).layers] == [convolution, linear, linear]
    report = initialize(nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.ReLU(), nn.Linear(6, 5)), images, asked)
    assert [row.filters for row in report.layers] == [asked, asked]


@pytest.mark.parametrize("kind", ["kmeans", "patches"])
def test_patches_that_are_the_mean_make_no_filters(kind):
    """As behind a ReLU, where most positions may be dead: such a patch has no direction, and a filter of it none."""
    some = torch.randint(-8, 9, (10, 4), generator=generator()).float()
    x = torch.cat([some, -some, torch.zeros(400, 4)])  # of which the mean is 0 exactly
    layer = nn.Linear(4, 6)
    blocks, _, note = draw_filters(kind, Call(Layer("layer", layer.weight, layer.bias)), [x], generator())
    assert note == ""
    std = (x @ blocks[0, :, :, 0].T).std(0)
    assert (std > 0.1 * std.max()).all()


@pytest.mark.parametrize("failure", ["raises", "returns NaN"])
def test_an_eigendecomposition_that_fails_is_done_in_double_precision(failure, monkeypatch):
    """LAPACK's in single precision may give up where many eigenvalues are equal, and does not always tell."""
    points = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    points -= points.mean(1, keepdim=True)
    expected = whitening_matrix(points.double(), 6).float()
    right = torch.linalg.eigh

    def eigh(matrix):
        if matrix.dtype == torch.float64:
            return right(matrix)
        if failure == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        values, vectors = right(matrix)
        values[:, 0] = vectors[..., 0] = float("nan")
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    found = whitening_matrix(points, 6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pca", "zca", "kmeans", "patches"])
def test_few_patches_whiten_others_like_them_too(kind):
    """Hardly more samples than outputs: the least of their variances are far below those of the distribution."""
    layer = nn.Linear(48, 32)
    x, others = torch.randn(2, 400, 48, generator=generator())
    blocks, _, note = draw_filters(kind, *seen(layer, x[:33]), generator())
    assert not note
    filters = blocks.flatten(2)[0]
    known, unknown = ((y @ filters.T).std(0) for y in (x[:33], others))
    assert (unknown / known).max() < 1.5


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("count", "dimension"), [(40, 100), (99, 100), (100, 100), (300, 700), (1200, 1300)])
def test_fewer_patches_than_dimensions(count, dimension, exact):
    """The leading directions of their covariance, found from their products with one another."""
    groups, components = 2, count // 4
    points = torch.randn(groups, count, dimension, generator=generator(), dtype=torch.float64)
    points *= torch.linspace(1, 0.1, dimension, dtype=torch.float64)
    points -= points.mean(1, keepdim=True)
    values, vectors = (part.flip(-1)[..., :components] for part in torch.linalg.eigh(points.mT @ points / count))
    found = whitening_matrix(points.float(), components, exact).double()
    torch.testing.assert_close(found @ found.mT, (vectors / values.unsqueeze(1)) @ vectors.mT, atol=1e-3, rtol=1e-3)
    lengths = torch.linalg.vector_norm(found, dim=1)
    torch.testing.assert_close(lengths, values.rsqrt(), atol=0, rtol=1e-3)


def test_patches_in_a_few_directions_are_whitened_in_these_alone():
    points = torch.randn(1, 50, 4, generator=generator()) @ torch.randn(4, 200, generator=generator())
    points -= points.mean(1, keepdim=True)
    whitening = whitening_matrix(points, 10)
    assert whitening.shape == (1, 200, 10)
    assert not whitening[:, :, 4:].any()
    torch.testing.assert_close((points @ whitening)[0].std(0, correction=0)[:4], torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("filters", get_args(Filters))
def test_a_depthwise_filter_on_one_position_is_not_cut_off(filters):
    """As in MobileNetV2 on small images: without a bias it keeps its mean, which is positive for the ReLU behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 8, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()
    images = torch.randn(160, 3, 8, 8)
    report = initialize(model, images, filters)
    notes = {row.name: row.note for row in report.layers}
    assert notes.pop("3") == "16 of 16 groups keep their mean, as their input hardly varies but along it"
    assert not any(notes.values())
    assert all(row.std_after == pytest.approx(1, abs=1e-4) for row in report.layers)
    assert report.spread_after < 1.01
    assert (model[:6](images).flatten(1).std(0) > 0).all()
