"""Levels on one scale."""

import pytest
import torch

from anomalib_csflow.engine.levels import LevelScale
from anomalib_csflow.flows import ChannelWhitening
from anomalib_csflow.flows.running_statistics import RunningCovariance


def test_levels_have_mean_0_and_deviation_1() -> None:
    maps = [(torch.rand(5, 1, 8, 8) * 3 + 1, torch.rand(5, 1, 4, 4) * 0.01) for _ in range(3)]
    scale = LevelScale(2)
    for level, found in zip(maps[0], scale(maps[0]), strict=True):
        torch.testing.assert_close(found, level)  # nothing was measured yet
    scale.fit(iter(maps))
    for index in range(2):
        whole = torch.cat([scale(levels)[index] for levels in maps])
        found = torch.stack([whole.mean(), whole.std(correction=0)])
        torch.testing.assert_close(found, torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    other = LevelScale(2)
    other.load_state_dict(scale.state_dict())
    torch.testing.assert_close(other(maps[0]), scale(maps[0]))


def test_levels_of_several_processes() -> None:
    maps = [(torch.randn(4, 1, 3, 3),) for _ in range(2)]
    whole, first, second = LevelScale(1), LevelScale(1), LevelScale(1)
    whole.fit(maps)
    states: list[torch.Tensor] = []
    first.fit(maps[:1], gather=lambda state: states.append(state) or [state])
    second.fit(maps[1:], gather=lambda state: [*states, state])
    torch.testing.assert_close(second.mean, whole.mean)
    torch.testing.assert_close(second.std, whole.std)


def test_no_maps() -> None:
    with pytest.raises(ValueError, match="no good images to measure"):
        LevelScale(1).fit([])


def test_covariance_of_batches_and_of_processes_is_that_of_all() -> None:
    values = torch.randn(30, 4, 5, 5) @ torch.randn(5, 5)
    expected = torch.cov(values.transpose(0, 1).flatten(1).double(), correction=0)
    parts = [RunningCovariance(4), RunningCovariance(4), RunningCovariance(4)]
    parts[0].update(values[:7])
    parts[0].update(values[7:19])
    parts[1].update(values[19:])
    merged = RunningCovariance.merged(part.state for part in parts)  # the last has seen nothing
    torch.testing.assert_close(merged.covariance, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.mean, values.double().mean((0, 2, 3)), atol=1e-6, rtol=1e-6)
    assert merged.count == 30 * 25


@pytest.mark.parametrize(
    ("features", "message"),
    [([], "there are no features to measure"), ([(torch.ones(4, 3, 2, 2),)], "features do not vary: are the images")],
)
def test_whitening_of_nothing(features: list[tuple[torch.Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelWhitening([(3, 2, 2)]).fit(features)


def test_a_channel_that_never_varies_stays_finite() -> None:
    features = torch.randn(9, 3, 4, 4)
    features[:, 1] = 2.0
    layer = ChannelWhitening([(3, 4, 4)])
    layer.fit([(features,)])
    (white,), log_det = layer((features,))
    assert white.isfinite().all()
    assert log_det.isfinite().all()
