"""Scores and maps against their formulae."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from anomalib_csflow import scoring

LATENTS = (torch.randn(2, 3, 4, 6), torch.randn(2, 3, 2, 3))


def test_nll_is_that_of_a_standard_normal() -> None:
    log_det = torch.tensor([1.5, -2.0])
    expected = -sum(Normal(0, 1).log_prob(level).flatten(1).sum(1) for level in LATENTS) - log_det
    torch.testing.assert_close(scoring.nll(LATENTS, log_det), expected)


def test_mean_energy() -> None:
    flat = torch.cat([level.flatten(1) for level in LATENTS], dim=1)
    torch.testing.assert_close(scoring.mean_energy(LATENTS), flat.square().mean(1) / 2)
    assert scoring.num_dims(LATENTS) == flat.shape[1]


def test_bits_per_dim() -> None:
    assert scoring.bits_per_dim(torch.tensor([10 * math.log(2)]), 5).item() == pytest.approx(2)


def test_map_of_the_finest_level() -> None:
    levels = scoring.mean_squares(LATENTS)
    mapped = scoring.anomaly_map(levels, (4, 6))
    torch.testing.assert_close(mapped, LATENTS[0].square().mean(1, keepdim=True))
    assert scoring.anomaly_map(levels, (40, 61)).shape == (2, 1, 40, 61)


T = scoring.TEMPERATURE
SOFT = -T * math.log((math.exp(-4 / T) + math.exp(-9 / T)) / 2)


def test_score_test_is_the_derivative_by_more_variance() -> None:
    log_scales = tuple(torch.randn_like(level) for level in LATENTS)
    for latents, scales, test in zip(LATENTS, log_scales, scoring.score_tests(LATENTS, log_scales), strict=True):
        added = torch.zeros_like(latents, requires_grad=True)
        deviation = latents * (-scales).exp()  # of the feature from what the flow predicts
        log_density = Normal(0, ((-2 * scales).exp() + added).sqrt()).log_prob(deviation).sum()
        (derivative,) = torch.autograd.grad(log_density, added)
        torch.testing.assert_close(test, 2 * derivative.mean(1, keepdim=True))


@pytest.mark.parametrize(("mode", "expected"), [("mean", (4 + 9) / 2), ("product", 36.0), ("soft_minimum", SOFT)])
def test_maps_that_fuse_levels(mode: str, expected: float) -> None:
    constant = (torch.full((1, 1, 4, 4), 4.0), torch.full((1, 1, 2, 2), 9.0))
    torch.testing.assert_close(scoring.anomaly_map(constant, (8, 8), mode), torch.full((1, 1, 8, 8), expected))


class Resizing(nn.Module):
    """Resizes the maps of all levels."""

    def __init__(self, *, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Resize."""
        return scoring.upsampled(maps, (30, 44), align_corners=self.align_corners)


@pytest.mark.parametrize("align_corners", [True, False])
def test_exported_resizing_is_two_products_with_the_same_result(align_corners: bool) -> None:
    maps, resizing = [torch.randn(2, 1, 7, 11), torch.randn(2, 1, 3, 5)], Resizing(align_corners=align_corners)
    exported = torch.export.export(resizing, (maps,))
    assert sum("matmul" in str(node.target) for node in exported.graph.nodes) == 4
    torch.testing.assert_close(exported.module()(maps), resizing(maps))


def test_soft_minimum_is_between_minimum_and_mean_and_never_overflows() -> None:
    levels = torch.tensor([[1e30, 2.0, -5.0], [1e30, 8.0, 5.0]])
    found = scoring.soft_minimum(levels)
    assert (found >= levels.amin(0)).all()
    assert (found <= levels.mean(0)).all()
    torch.testing.assert_close(scoring.soft_minimum(levels[:, 1:], 1e-3), levels.amin(0)[1:], atol=0.01, rtol=0)
    infinite = torch.tensor([[torch.inf, -torch.inf, torch.inf], [torch.inf, 1.0, 1.0]])
    assert scoring.soft_minimum(infinite)[:2].tolist() == [torch.inf, -torch.inf]
    assert 1 < scoring.soft_minimum(infinite)[2] < 1 + scoring.TEMPERATURE
    torch.testing.assert_close(scoring.soft_minimum(levels[:, 1:], 1e4), levels.mean(0)[1:], atol=0.01, rtol=0)


def test_top_mean() -> None:
    maps = torch.arange(200.0).reshape(2, 1, 10, 10)
    torch.testing.assert_close(scoring.top_mean(maps, 0.03), torch.tensor([98.0, 198.0]))
    torch.testing.assert_close(scoring.top_mean(maps, 0.0), torch.tensor([99.0, 199.0]))


@pytest.mark.parametrize(("share", "positions"), [(0.0, 1), (0.01, 1), (0.25, 6), (1.0, 24)])
def test_score_of_the_least_likely_positions(share: float, positions: int) -> None:
    densities = torch.rand(2, 1, 4, 6)
    mean = densities.flatten(1).sort(1).values[:, :positions].mean(1)
    torch.testing.assert_close(scoring.least_likely(-densities.log(), share), -mean.log())
    far = 1e4 + torch.rand(2, 1, 4, 6)  # densities that are 0 in float64 too
    found = scoring.least_likely(far, share)
    assert ((found >= far.amin((1, 2, 3))) & (found <= far.amax((1, 2, 3)))).all()


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan")])
def test_share_of_positions(share: float) -> None:
    with pytest.raises(ValueError, match="a share of the map's positions, from 0"):
        scoring.check_top_share(share)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="unknown map mode 'max': choose one of finest, mean, product"):
        scoring.anomaly_map(scoring.mean_squares(LATENTS), (4, 4), "max")
