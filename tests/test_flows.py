"""The flow contract: every layer, every shape, in float64, with random parameters."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from conftest import randomize
from FrEIA.framework import GraphINN, InputNode, Node, OutputNode
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from anomalib_csflow.flows import (
    ChannelStandardization,
    ChannelWhitening,
    CrossConvolution,
    CrossScaleCoupling,
    FiberFlow,
    FusionConditioner,
    GlowCoupling,
    MaskedCoupling,
    ParallelFlow,
    Perceptron,
    PyramidFlow,
    ResidualConvolutions,
    ScalePermutation,
)
from anomalib_csflow.flows.running_statistics import RunningStatistics

Dims = list[tuple[int, ...]]

PYRAMIDS: dict[str, Dims] = {
    "one scale": [(4, 3, 3)],
    "one scale, odd channels": [(5, 2, 3)],
    "two scales": [(4, 4, 4), (4, 2, 2)],
    "two scales, not square": [(3, 4, 6), (2, 2, 3)],
    "three scales, halves rounded up": [(2, 5, 7), (2, 3, 4), (2, 2, 2)],
    "three scales, halves rounded down": [(3, 5, 6), (4, 2, 3), (2, 1, 1)],
    "four scales": [(2, 8, 6), (2, 4, 3), (3, 2, 2), (2, 1, 1)],
}


class Pointwise(nn.Module):
    """A conditioner that is not the cross convolution: a 1x1 convolution per scale."""

    def __init__(self, in_channels: list[int], out_channels: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(in_channels, out_channels, strict=True))

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Map each scale by itself."""
        return tuple(layer(level) for layer, level in zip(self.layers, pyramid, strict=True))


def standardization(dims: Dims) -> ChannelStandardization:
    """With statistics that are not the identity's."""
    layer = ChannelStandardization(dims)
    generator = torch.Generator().manual_seed(3)
    layer.fit([tuple(2 * torch.randn(9, *shape, generator=generator) + 1 for shape in dims)])
    return layer


def whitening(dims: Dims) -> ChannelWhitening:
    """With correlated channels, so that its matrices are not diagonal."""
    layer = ChannelWhitening(dims)
    generator = torch.Generator().manual_seed(3)
    independent = tuple(torch.randn(9, *shape, generator=generator) for shape in dims)
    layer.fit([tuple(2 * level + level.roll(1, dims=1) + 1 for level in independent)])
    return layer


def chain(dims: Dims) -> PyramidFlow:
    """Two blocks, as CS-Flow has them."""
    return PyramidFlow(
        [
            standardization(dims),
            ScalePermutation(dims, seed=0),
            CrossScaleCoupling(dims, hidden_channels=3),
            ScalePermutation(dims, seed=1),
            CrossScaleCoupling(dims, hidden_channels=3, kernel_size=5),
        ]
    )


def convolutions(in_channels: int, out_channels: int) -> nn.Module:
    """A small subnet that sees a position's neighbours."""
    return nn.Sequential(nn.Conv2d(in_channels, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, out_channels, 1))


def parallel(dims: Dims, **options: int | bool) -> ParallelFlow:
    """Two blocks at each level."""
    return ParallelFlow(dims, subnets=[[convolutions] * 2] * len(dims), **options)


LAYERS: dict[str, Callable[[Dims], nn.Module]] = {
    "coupling, kernel 1": lambda dims: CrossScaleCoupling(dims, hidden_channels=3, kernel_size=1),
    "coupling, kernel 2": lambda dims: CrossScaleCoupling(dims, hidden_channels=3, kernel_size=2),
    "coupling, kernel 3": lambda dims: CrossScaleCoupling(dims, hidden_channels=3, kernel_size=3, clamp=1.9),
    "coupling, kernel 4": lambda dims: CrossScaleCoupling(dims, hidden_channels=3, kernel_size=4),
    "coupling, kernel 5": lambda dims: CrossScaleCoupling(dims, hidden_channels=3, kernel_size=5),
    "coupling, kernels 3 and 1": lambda dims: CrossScaleCoupling(dims, hidden_channels=3, output_kernel_size=1),
    "coupling, kernels 3 and 5": lambda dims: CrossScaleCoupling(dims, hidden_channels=3, coarse_kernel_size=5),
    "coupling, bounded inputs": lambda dims: CrossScaleCoupling(dims, hidden_channels=3, conditioner_clamp=0.5),
    "coupling, other conditioner": lambda dims: CrossScaleCoupling(dims, conditioner=Pointwise),
    "coupling, fusion": lambda dims: CrossScaleCoupling(dims, conditioner=FusionConditioner, clamp=1.9),
    "permutation": lambda dims: ScalePermutation(dims, seed=7),
    "standardization": standardization,
    "whitening": whitening,
    "chain": chain,
    "parallel": parallel,
    "parallel, positions, rotations": lambda dims: parallel(dims, condition_channels=8, permute_soft=True),
    "fibers": lambda dims: FiberFlow(dims, num_blocks=2, condition_channels=4),
    "fibers, permuted": lambda dims: FiberFlow(dims, num_blocks=2, condition_channels=8, permute_soft=False),
}
VECTORS: dict[str, Dims] = {"a vector": [(6,)], "a vector, odd": [(5,)]}
VECTOR_LAYERS: dict[str, Callable[[Dims], nn.Module]] = {
    "masked coupling": lambda dims: PyramidFlow(
        [
            MaskedCoupling(dims, conditioner=partial(Perceptron, hidden_features=4, num_hidden=2), swap=swap)
            for swap in (False, True)
        ]
    ),
    "Glow coupling": lambda dims: GlowCoupling(dims, hidden_features=4, clamp=1.9),
    "permutation": lambda dims: ScalePermutation(dims, seed=7),
    "standardization": standardization,
    "chain": lambda dims: PyramidFlow(
        [standardization(dims), ScalePermutation(dims, seed=0), GlowCoupling(dims, hidden_features=4, num_hidden=1)]
    ),
}
MAP: dict[str, Dims] = {"a map": [(2, 4, 6)], "a map, odd": [(3, 3, 5)]}
MAP_LAYERS: dict[str, Callable[[Dims], nn.Module]] = {
    f"masked coupling, {mask}": lambda dims, mask=mask: PyramidFlow(
        [
            MaskedCoupling(
                dims,
                conditioner=partial(ResidualConvolutions, hidden_channels=3, num_blocks=1),
                mask=mask,
                swap=swap,
            )
            for swap in (False, True)
        ]
    )
    for mask in ("halves", "checkerboard")
}

CASES = {
    f"{name}, {shape}": (build, dims)
    for layers, shapes in ((LAYERS, PYRAMIDS), (VECTOR_LAYERS, VECTORS), (MAP_LAYERS, MAP))
    for (name, build), (shape, dims) in product(layers.items(), shapes.items())
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> tuple[Callable[[Dims], nn.Module], Dims]:
    """A layer's constructor, and shapes that it takes."""
    return request.param


@pytest.fixture
def dims(case: tuple[Callable[[Dims], nn.Module], Dims]) -> Dims:
    """Shapes of a pyramid of maps or vectors."""
    return case[1]


@pytest.fixture
def layer(case: tuple[Callable[[Dims], nn.Module], Dims]) -> nn.Module:
    """A layer with random parameters, in float64."""
    build, dims = case
    layer = randomize(build(dims)).double()
    for module in layer.modules():
        if hasattr(module, "w_perm"):  # rotations are drawn in float32: make them orthogonal in float64 too
            matrix = torch.linalg.qr(module.w_perm.flatten(1)).Q.reshape(module.w_perm.shape)
            module.w_perm, module.w_perm_inv = matrix, matrix.transpose(0, 1).contiguous()
    return layer


@pytest.fixture
def pyramid(dims: Dims) -> tuple[Tensor, ...]:
    """A batch of three."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in dims)


def test_inverse(layer: nn.Module, pyramid: tuple[Tensor, ...]) -> None:
    latents, log_det = layer(pyramid)
    restored, log_det_back = layer(latents, rev=True)
    torch.testing.assert_close(restored, pyramid, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-9, rtol=1e-9)
    assert [latent.shape for latent in latents] == [level.shape for level in pyramid]


@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_log_det_is_that_of_the_jacobian(layer: nn.Module, pyramid: tuple[Tensor, ...], rev: bool) -> None:
    shapes = [level.shape[1:] for level in pyramid]
    sizes = [shape.numel() for shape in shapes]

    def flat(vector: Tensor) -> Tensor:
        parts = tuple(part.reshape(1, *shape) for part, shape in zip(vector.split(sizes), shapes, strict=True))
        return torch.cat([output.flatten() for output in layer(parts, rev=rev)[0]])

    _, log_det = layer(pyramid, rev=rev)
    assert log_det.shape == (3,)
    for sample in range(3):
        vector = torch.cat([level[sample].flatten() for level in pyramid])
        jacobian = torch.autograd.functional.jacobian(flat, vector)
        torch.testing.assert_close(log_det[sample], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-8, rtol=1e-8)


def test_samples_do_not_see_one_another(layer: nn.Module, pyramid: tuple[Tensor, ...]) -> None:
    latents, log_det = layer(pyramid)
    singles = [layer(tuple(level[n : n + 1] for level in pyramid)) for n in range(3)]
    joined = tuple(torch.cat(maps) for maps in zip(*(single[0] for single in singles), strict=True))
    torch.testing.assert_close(joined, latents, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.cat([single[1] for single in singles]), log_det, atol=1e-10, rtol=1e-12)


def test_jac_false_skips_the_log_det(layer: nn.Module, pyramid: tuple[Tensor, ...]) -> None:
    latents, log_det = layer(pyramid, jac=False)
    torch.testing.assert_close(latents, layer(pyramid)[0])
    assert log_det.shape == (3,)
    assert not log_det.any()
    assert not log_det.requires_grad


def test_every_parameter_gets_a_gradient(layer: nn.Module, pyramid: tuple[Tensor, ...]) -> None:
    latents, log_det = layer(pyramid)
    loss = sum(latent.square().sum() for latent in latents) - log_det.sum()
    parameters = dict(layer.named_parameters())
    if parameters:
        loss.backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("build", "dims"),
    [(build, PYRAMIDS["three scales, halves rounded up"]) for build in LAYERS.values()]
    + [(build, VECTORS["a vector"]) for build in VECTOR_LAYERS.values()]
    + [(build, MAP["a map"]) for build in MAP_LAYERS.values()],
    ids=[*LAYERS, *(f"{name}, a vector" for name in VECTOR_LAYERS), *MAP_LAYERS],
)
def test_state_dict_rebuilds_the_function(build: Callable[[Dims], nn.Module], dims: Dims) -> None:
    layer = randomize(build(dims)).double()
    for name, buffer in layer.named_buffers():  # as if drawn with another seed
        if "permutation" in name:
            buffer.copy_(buffer.flip(0))
    rebuilt = build(dims).double()
    rebuilt.load_state_dict(layer.state_dict())
    pyramid = tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in dims)
    torch.testing.assert_close(rebuilt(pyramid), layer(pyramid), atol=0, rtol=0)


def test_maps_of_other_sizes_than_built_for() -> None:
    coupling = randomize(CrossScaleCoupling([(4, 4, 4), (4, 2, 2)], hidden_channels=3)).double()
    pyramid = tuple(torch.randn(2, 4, *size, dtype=torch.float64) for size in [(9, 13), (5, 6)])
    latents, _ = coupling(pyramid)
    torch.testing.assert_close(coupling(latents, rev=True)[0], pyramid)


def test_conditions_enter_both_halves() -> None:
    dims, dims_c = [(4, 4, 4), (4, 2, 2)], [(3, 4, 4), (1, 2, 2)]
    coupling = randomize(CrossScaleCoupling(dims, dims_c, hidden_channels=3)).double()
    pyramid = tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in dims)
    conditions = tuple(torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in dims_c)
    latents, _ = coupling(pyramid, conditions)
    torch.testing.assert_close(coupling(latents, conditions, rev=True)[0], pyramid)
    for half in (slice(0, 2), slice(2, 4)):
        for gradient in torch.autograd.grad(latents[0][:, half].sum(), conditions, retain_graph=True):
            assert gradient.abs().sum() > 0


def test_untrained_coupling_is_the_identity() -> None:
    dims = [(4, 4, 4), (4, 2, 2)]
    pyramid = tuple(torch.randn(2, *shape) for shape in dims)
    latents, log_det = CrossScaleCoupling(dims, hidden_channels=8)(pyramid)
    torch.testing.assert_close(latents, pyramid)
    assert not log_det.any()


def test_log_scale_is_clamped() -> None:
    coupling = randomize(CrossScaleCoupling([(4, 3, 3)], hidden_channels=8, clamp=0.5), scale=100.0)
    for parameter in coupling.parameters():  # all positive, so that every log-scale is driven to its bound
        parameter.data.abs_()
    _, log_det = coupling((torch.rand(2, 4, 3, 3),))
    torch.testing.assert_close(log_det, torch.full((2,), 0.5 * 4 * 9), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dims", PYRAMIDS.values(), ids=PYRAMIDS.keys())
def test_log_scales_of_a_coupling_sum_to_its_log_det(dims: Dims) -> None:
    layer = randomize(CrossScaleCoupling(dims, hidden_channels=3))
    pyramid = tuple(torch.randn(2, *shape) for shape in dims)
    latents, log_scales = layer.with_log_scales(pyramid)
    expected, log_det = layer(pyramid)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(sum(scale.flatten(1).sum(1) for scale in log_scales), log_det)
    assert [scale.shape for scale in log_scales] == [level.shape for level in pyramid]


def test_a_coupling_moves_each_number_by_its_own_log_scale() -> None:
    layer = randomize(CrossScaleCoupling([(4, 1, 1)], hidden_channels=3))
    features = torch.randn(1, 4, 1, 1)
    (_,), (log_scales,) = layer.with_log_scales((features,))
    jacobian = torch.autograd.functional.jacobian(lambda x: layer((x,))[0][0].flatten(), features).view(4, 4)
    torch.testing.assert_close(jacobian[:2, :2].diagonal().log(), log_scales.flatten()[:2])  # of the first half


def test_permutations_differ_by_scale_and_seed() -> None:
    dims = [(16, 4, 4), (16, 2, 2)]
    first, second = ScalePermutation(dims, seed=0), ScalePermutation(dims, seed=1)
    assert not torch.equal(first.permutation_0, first.permutation_1)
    assert not torch.equal(first.permutation_0, second.permutation_0)
    assert torch.equal(first.permutation_0, ScalePermutation(dims, seed=0).permutation_0)


def test_rotations_are_seeded_buffers_and_leave_the_generator_alone() -> None:
    dims = [(6, 4, 4), (6, 2, 2)]
    before = np.random.get_state()[1].copy()
    first, second = FiberFlow(dims, num_blocks=2), FiberFlow(dims, num_blocks=2)
    assert (np.random.get_state()[1] == before).all()
    matrices = {name: buffer for name, buffer in first.named_buffers() if name.endswith("w_perm")}
    assert len(matrices) == 4
    for name, matrix in matrices.items():
        assert torch.equal(matrix, second.get_buffer(name))
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(6))
    for name, other in pairwise(matrices):
        assert not torch.equal(matrices[name], matrices[other])
    assert set(matrices) <= set(first.state_dict())


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (7, 4)])
def test_a_cells_latent_depends_on_its_own_vector_and_position(size: tuple[int, int]) -> None:
    flow = randomize(FiberFlow([(4, 8, 8)], num_blocks=2, condition_channels=8))
    features = torch.randn(2, 4, *size)
    (latents,), (log_dets,) = flow.positions([features])
    changed = features.clone()
    changed[1, :, -1, -1] += 1
    (other,), (other_log_dets,) = flow.positions([changed])
    differs = (latents != other).any(1)
    assert differs[1, -1, -1]
    assert differs.sum() == 1
    assert (log_dets != other_log_dets).sum() == 1
    if size != (1, 1):  # equal vectors at two positions are not equal
        (latents,), _ = flow.positions([torch.ones(1, 4, *size)])
        assert not torch.allclose(latents[..., 0, 0], latents[..., -1, -1])


def test_bad_chains() -> None:
    with pytest.raises(ValueError, match="a positive multiple of 4, got 6"):
        FiberFlow([(4, 2, 2)], condition_channels=6)
    with pytest.raises(ValueError, match="at least two channels and one block, got 1 channels and 2 blocks"):
        FiberFlow([(1, 2, 2)], num_blocks=2)
    with pytest.raises(ValueError, match="got 4 channels and 0 blocks"):
        ParallelFlow([(4, 2, 2)], subnets=[[]])


def test_no_link_joins_scales_that_are_not_neighbours() -> None:
    convolution = randomize(CrossConvolution([2, 2, 2], [2, 2, 2], hidden_channels=4))
    pyramid = tuple(torch.randn(1, 2, size, size, requires_grad=True) for size in (8, 4, 2))
    outputs = convolution(pyramid)
    reached = [
        [
            bool(g is not None and g.abs().sum() > 0)
            for g in torch.autograd.grad(o.sum(), pyramid, allow_unused=True, retain_graph=True)
        ]
        for o in outputs
    ]
    assert reached == [[True, True, False], [True, True, True], [False, True, True]]


@pytest.mark.parametrize(
    ("sizes", "enter", "leave", "up", "down"),
    [
        ({}, [3, 3, 3], [3, 3, 3], 3, 3),
        ({"coarse_kernel_size": 5}, [3, 5, 5], [3, 5, 5], 3, 3),
        ({"output_kernel_size": 1}, [3, 3, 3], [1, 1, 1], 1, 2),
        ({"coarse_kernel_size": 5, "output_kernel_size": 1}, [3, 5, 5], [1, 3, 3], 1, 2),
        ({"coarse_kernel_size": 1, "output_kernel_size": 2}, [3, 1, 1], [2, 1, 1], 2, 2),
    ],
)
def test_which_kernels_have_which_size(
    sizes: dict[str, int], enter: list[int], leave: list[int], up: int, down: int
) -> None:
    convolution = CrossConvolution([2, 2, 2], [2, 2, 2], hidden_channels=4, **sizes)
    expected = {"enter": enter, "leave": leave, "up": [up, up], "down": [down, down]}
    for name, kernels in expected.items():
        assert [conv.kernel_size for conv in getattr(convolution, name)] == [(k, k) for k in kernels], name


def test_bounded_conditioners_do_not_pass_on_how_unusual_a_position_is() -> None:
    dims = [(4, 8, 8), (4, 4, 4)]
    maps = tuple(torch.randn(1, *level) for level in dims)
    far, farther = (maps[0].clone(), maps[1]), (maps[0].clone(), maps[1])
    far[0][:, :, 4, 4], farther[0][:, :, 4, 4] = 5.0, 50.0

    def changed(coupling: CrossScaleCoupling) -> list[Tensor]:
        """Latents of the first halves that differ; a position's own one is shifted by its neighbours alone."""
        latents = [randomize(coupling)(pyramid)[0] for pyramid in (far, farther)]
        differences = [(a - b)[:, :2].abs().amax(dim=(0, 1)) for a, b in zip(*latents, strict=True)]
        differences[0][4, 4] = 0
        return differences

    assert all(level.any() for level in changed(CrossScaleCoupling(dims, hidden_channels=4)))
    bounded = CrossScaleCoupling(dims, hidden_channels=4, conditioner_clamp=2.0)
    assert not any(level.any() for level in changed(bounded))


def test_inside_a_freia_graph() -> None:
    dims = PYRAMIDS["three scales, halves rounded up"]
    inputs = [InputNode(*shape, name=f"in {scale}") for scale, shape in enumerate(dims)]
    permutation = Node([node.out0 for node in inputs], ScalePermutation, {"seed": 2}, name="permutation")
    ports = [(permutation, scale) for scale in range(3)]
    coupling = Node(ports, CrossScaleCoupling, {"hidden_channels": 3}, name="coupling")
    outputs = [OutputNode((coupling, scale), name=f"out {scale}") for scale in range(3)]
    graph = randomize(GraphINN([*inputs, permutation, coupling, *outputs])).double()

    alone = PyramidFlow([node.module for node in (permutation, coupling)])
    assert all(isinstance(layer, InvertibleModule) for layer in alone)
    pyramid = tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in dims)
    latents, log_det = graph(pyramid)
    expected, expected_log_det = alone(pyramid)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(log_det.double(), expected_log_det, atol=1e-5, rtol=1e-5)  # GraphINN sums from float32
    torch.testing.assert_close(graph(latents, rev=True)[0], pyramid)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([], "at least one level"),
        ([(1, 4, 4)], "two channels"),
        ([(4, 8, 8), (4, 3, 4)], "level 1 of the pyramid is 3x4, which is not half of level 0"),
    ],
)
def test_coupling_refuses_what_is_no_pyramid(dims: Dims, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossScaleCoupling(dims, hidden_channels=2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4, 4, 4)], "expected a pyramid of 2 levels, got 1"),
        ([(2, 4, 4, 4), (2, 3, 2, 2)], r"level 1 should be \(N, 4, H, W\), got \(2, 3, 2, 2\)"),
        ([(2, 4, 8, 8), (2, 4, 2, 2)], "not half of level 0"),
        ([(2, 4, 1, 1), (2, 4, 0, 1)], "level 1 of the pyramid is empty"),
    ],
)
def test_layers_refuse_other_inputs(shapes: list[tuple[int, ...]], message: str) -> None:
    coupling = CrossScaleCoupling([(4, 4, 4), (4, 2, 2)], hidden_channels=2)
    with pytest.raises(ValueError, match=message):
        coupling([torch.zeros(shape) for shape in shapes])


def test_layers_of_vectors_refuse_other_inputs() -> None:
    with pytest.raises(ValueError, match="one vector of two features or more"):
        GlowCoupling([(1,)])
    with pytest.raises(ValueError, match="one vector of two features or more"):
        GlowCoupling([(4, 2, 2)])
    conditioner = partial(Perceptron, hidden_features=2, num_hidden=1)
    with pytest.raises(ValueError, match="the mask 'checkerboard' needs exactly one tensor that it can split"):
        MaskedCoupling([(4,)], conditioner=conditioner, mask="checkerboard")
    with pytest.raises(ValueError, match="the mask 'halves' needs exactly one tensor that it can split"):
        MaskedCoupling([(1,)], conditioner=conditioner)
    for layer in (GlowCoupling([(4,)], hidden_features=2), ScalePermutation([(4,)], seed=0)):
        with pytest.raises(ValueError, match=r"level 0 should be \(N, 4\), got \(2, 3\)"):
            layer([torch.zeros(2, 3)])
        with pytest.raises(ValueError, match=r"level 0 should be \(N, 4\), got \(2, 4, 1, 1\)"):
            layer([torch.zeros(2, 4, 1, 1)])


def test_conditions_are_counted() -> None:
    with pytest.raises(ValueError, match="2 levels, 1 conditions"):
        CrossScaleCoupling([(4, 4, 4), (4, 2, 2)], [(1, 4, 4)])
    with pytest.raises(ValueError, match="expected 0 conditions, got 1"):
        CrossScaleCoupling([(4, 4, 4)], hidden_channels=2)([torch.zeros(1, 4, 4, 4)], [torch.zeros(1, 1, 4, 4)])


def test_statistics_of_shares_are_those_of_the_whole() -> None:
    """As several processes have them, one of them without any values."""
    values = 3 * torch.randn(10, 4, 5, 5) + torch.arange(4.0).view(4, 1, 1)
    whole, *shares = (RunningStatistics(4) for _ in range(4))
    whole.update(values)
    shares[0].update(values[:3])
    shares[2].update(values[3:4])
    shares[2].update(values[4:])
    merged = RunningStatistics.merged(torch.stack([share.state for share in shares]))
    assert merged.count == whole.count == 250
    torch.testing.assert_close(merged.state, whole.state)
    layers = ChannelStandardization([(4, 5, 5)]), ChannelStandardization([(4, 5, 5)])
    layers[0].fit([(values,)])
    layers[1].fit([(values[:3],)], gather=lambda state: torch.stack([state, shares[2].state]))
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


def test_standardization_of_features() -> None:
    features = torch.randn(64, 3, 5, 5) * torch.tensor([0.1, 1.0, 10.0])[:, None, None] + 4
    features = torch.cat([features, torch.full((64, 1, 5, 5), 7.0)], dim=1)  # a channel that never moves
    layer = ChannelStandardization([(4, 5, 5)])
    assert not layer.is_fitted
    layer.fit([(features[:40],), (features[40:],)])
    (output,), _ = layer((features,))
    assert layer.is_fitted
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(output.std((0, 2, 3))[:3], torch.ones(3), atol=1e-3, rtol=0)
    assert torch.isfinite(output).all()
    with pytest.raises(ValueError, match="training set is empty"):
        layer.fit([])
