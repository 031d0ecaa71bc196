"""From latents to likelihoods, scores and maps: pure functions.

Latents are a tuple of maps ``(N, C, H, W)``, finest level first; the base distribution is a standard
normal. No function mixes samples of the batch.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Pyramid = tuple[Tensor, ...]
"""Maps ``(N, C, H, W)``, finest level first."""
MapMode = Literal["finest", "mean", "product", "soft_minimum"]
MAP_MODES: tuple[str, ...] = get_args(MapMode)
TEMPERATURE = 4.0
"""Default of the soft minimum; between 1 and 4, the mean image AUROC of seven data sets changes by 0.003."""


def num_dims(latents: Sequence[Tensor]) -> int:
    """Number of dimensions of one sample's latents, over all levels."""
    return sum(level[0].numel() for level in latents)


def energy(latents: Sequence[Tensor]) -> Tensor:
    """Half the squared norm of each sample's latents, over all levels: ``(N,)``."""
    return torch.stack([0.5 * level.square().flatten(1).sum(1) for level in latents]).sum(0)


def mean_energy(latents: Sequence[Tensor]) -> Tensor:
    """Energy per dimension ``(N,)``, the image score of CS-Flow (eq. 8); about 0.5 on training data."""
    return energy(latents) / num_dims(latents)


def nll(latents: Sequence[Tensor], log_det: Tensor) -> Tensor:
    """Exact negative log-likelihood of each sample in nats, ``(N,)``.

    ``-log p(x) = 1/2 ||z||^2 + D/2 log(2 pi) - log|det dz/dx|``
    """
    return energy(latents) + 0.5 * math.log(2 * math.pi) * num_dims(latents) - log_det


def log_density(latents: Tensor, log_det: Tensor) -> Tensor:
    """Log-density in nats of the vector at each position, from its latent vector and its log-det.

    Args:
        latents: ``(N, C, ...)``: at each position, a vector of C channels.
        log_det: of each position, ``(N, ...)``.

    Returns:
        ``(N, ...)``.
    """
    return log_det - 0.5 * latents.square().sum(1) - 0.5 * math.log(2 * math.pi) * latents.shape[1]


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Convert nats per sample to bits per dimension.

    Example:
        >>> bits_per_dim(torch.tensor([math.log(2) * 6]), 6)
        tensor([1.])
    """
    return nats / (dims * math.log(2))


def mean_squares(latents: Sequence[Tensor]) -> Pyramid:
    """Mean squared latent over channels of each position: maps ``(N, 1, H_i, W_i)``, about 1 on training data."""
    return tuple(level.square().mean(1, keepdim=True) for level in latents)


def score_tests(latents: Sequence[Tensor], log_scales: Sequence[Tensor]) -> Pyramid:
    r"""Rao's score test of each position for more variance than the flow expects: maps ``(N, 1, H_i, W_i)``.

    The mean over channels of :math:`e^{2 s} (z^2 - 1)`, for latents :math:`z = e^s (x - \mu)`: twice the derivative, at
    0, of the log-density by the variance of noise that is added to :math:`x`. So a deviation counts the more, the more
    precisely the flow predicts :math:`x`. No test finds a little noise more often (C. R. Rao, "Large sample tests of
    statistical hypotheses concerning several parameters with applications to problems of estimation", 1948). On what
    the flow models well, it is 0 on average.

    Args:
        latents: ``(N, C_i, H_i, W_i)``, finest level first.
        log_scales: s, of the latents' shapes.

    Example:
        >>> latents, log_scales = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
        >>> score_tests([latents], [log_scales])
        (tensor([[[[1.5000]]]]),)
    """
    pairs = zip(latents, log_scales, strict=True)
    return tuple(((level.square() - 1) * (2 * scale).exp()).mean(1, keepdim=True) for level, scale in pairs)


def anomaly_map(levels: Sequence[Tensor], size: tuple[int, int], mode: MapMode = "finest") -> Tensor:
    """Fuse the maps of all levels, ``(N, 1, H, W)``.

    Args:
        levels: ``(N, 1, H_i, W_i)``, finest first: for CS-Flow, the mean squared latents (section 3.4).
        size: (height, width) of the map, that of the image.
        mode: ``finest`` is the paper's: only the finest level. ``mean`` averages the upsampled maps of all
            levels; ``product`` multiplies them, as anomalib's Csflow does;
            ``soft_minimum``: see :func:`soft_minimum`.

    Raises:
        ValueError: if the mode is unknown.
    """
    if mode not in MAP_MODES:
        msg = f"unknown map mode {mode!r}: choose one of {', '.join(MAP_MODES)}"
        raise ValueError(msg)
    if mode == "soft_minimum":
        return soft_minimum([upsampled([level], size)[0] for level in levels])
    maps = upsampled(levels[:1] if mode == "finest" else levels, size)
    return maps.prod(0) if mode == "product" else maps.mean(0)


def soft_minimum(levels: Sequence[Tensor], temperature: float = TEMPERATURE) -> Tensor:
    """Smooth minimum over levels, ``-T log mean_l exp(-z_l / T)``: high if all levels find a position unusual.

    Args:
        levels: of one shape and on one scale, such as standard deviations of good images.
        temperature: T; the limit at 0 is the minimum, at infinity the mean.

    Returns:
        Of the levels' shape.

    Example:
        >>> soft_minimum(torch.tensor([[5.0], [5.0]])), soft_minimum(torch.tensor([[0.0], [1000.0]])) < 3
        (tensor([5.]), tensor([True]))
    """
    least = reduce(torch.minimum, levels)
    # without a tensor of all levels, which are as large as the image each
    total = reduce(torch.add, (((least - level) / temperature).exp() for level in levels))
    return torch.where(least.isinf(), least, least - temperature * (total / len(levels)).log())


def top_mean(maps: Tensor, share: float) -> Tensor:
    """Mean of the highest values of each map, ``(N,)``.

    Args:
        maps: ``(N, 1, H, W)``.
        share: of the positions, in [0, 1]; 0 takes only the highest value.

    Example:
        >>> top_mean(torch.tensor([[[[4.0, 3.0], [2.0, 1.0]]]]), 0.5)
        tensor([3.5000])
    """
    return _top(maps, share).mean(1)


def _top(maps: Tensor, share: float) -> Tensor:
    """The highest values of each map, ``(N, k)``."""
    positions = maps.flatten(1)
    return positions.topk(max(int(positions.shape[1] * share), 1), dim=1).values


def likeness(latents: Tensor) -> Tensor:
    """``exp(-1/2 mean_c z^2)`` at each position: 1 at the mode of the base distribution, about 0.6 on training data.

    Args:
        latents: ``(N, C, H, W)``.

    Returns:
        ``(N, 1, H, W)`` in [0, 1].
    """
    return (-0.5 * latents.square().mean(1, keepdim=True)).exp()


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """Logarithm of the mean of exponentials over a dimension, which is removed, without overflow or underflow.

    Example:
        >>> log_mean_exp(torch.tensor([[-1000.0, -1000.0]]), 1)
        tensor([-1000.])
    """
    return values.logsumexp(dim) - math.log(values.shape[dim])


def surprise(densities: Tensor) -> Tensor:
    """Minus the logarithm of the mean density over levels, where densities are relative to some maximum.

    It ranks positions as the mean does, and still distinguishes densities that vanish in float32 when they are
    subtracted from the maximum.

    Args:
        densities: ``(levels, N, 1, H, W)``, 0 or more.

    Returns:
        ``(N, 1, H, W)``, finite: 0 where all are 1.
    """
    mean = densities.mean(0)
    return -mean.clamp(torch.finfo(mean.dtype).tiny, torch.finfo(mean.dtype).max).log()


def check_top_share(share: float) -> None:
    """Check a share of a map's positions.

    Raises:
        ValueError: if it is not in [0, 1].
    """
    if not 0 <= share <= 1:
        msg = f"top_share is a share of the map's positions, from 0 (only the highest) to 1 (all), got {share}"
        raise ValueError(msg)


def least_likely(surprises: Tensor, share: float) -> Tensor:
    """Minus the logarithm of the mean density of the least likely positions of each map.

    Args:
        surprises: ``(N, 1, H, W)``, minus logarithms of densities.
        share: of the positions, in [0, 1]; 0 takes only the least likely one, whose surprise is the map's maximum.

    Returns:
        ``(N,)``.

    Example:
        >>> least_likely(torch.tensor([[[[1000.0, 3.0], [2.0, 2.0]]]]), 0.0)
        tensor([1000.])
    """
    return -log_mean_exp(-_top(surprises, share), dim=1)


def upsampled(maps: Sequence[Tensor], size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize the maps of all levels bilinearly to one size, so that they can be combined.

    Args:
        maps: ``(N, 1, H_i, W_i)``.
        size: (height, width), that of the image.
        align_corners: True puts the corner positions on the corners of the image, False half a step inside.

    Returns:
        ``(levels, N, 1, height, width)``.
    """
    return torch.stack([_resized(level, size, align_corners=align_corners) for level in maps])


def _resized(maps: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """Resize ``(N, 1, H, W)`` bilinearly.

    An exported graph multiplies by two matrices instead, since OpenVINO's resizing of single channels takes several
    times as long. The engine resizes as torch does, which mixed precision leaves in float32.
    """
    if not torch.compiler.is_exporting():
        return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)
    rows, columns = (
        F.interpolate(torch.eye(old)[None, None], (new, old), mode="bilinear", align_corners=align_corners)
        for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    return rows.to(maps) @ maps @ columns.to(maps).mT
