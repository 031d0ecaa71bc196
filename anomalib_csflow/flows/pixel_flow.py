"""RealNVP on pixels: a density of images that does not find defects, to show why embeddings are needed.

Kirichenko, Izmailov, Wilson, "Why Normalizing Flows Fail to Detect Out-of-Distribution Data", NeurIPS 2020,
https://arxiv.org/abs/2006.08545; the flow is that of Dinh, Sohl-Dickstein, Bengio, "Density estimation
using Real NVP", ICLR 2017, https://arxiv.org/abs/1605.08803, section 3.

Differs from the published code:

- the conditioners have no batch norm, which would make an image's likelihood in training depend on the other
  images, and no weight norm; their last layer is initialized with zeros;
- without ``noise``, dequantization adds one half everywhere, so that the likelihood is a function of the image.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .masked_coupling import MaskedCoupling
from .pyramid import Pyramid

LEVELS = 256
"""Grey levels of a channel."""


class ResidualConvolutions(nn.Module):
    """The conditioner of couplings on pixels: a convolution, residual blocks of two convolutions, a 1x1 convolution.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output, which is zero before training.
        hidden_channels: number of channels of all hidden maps.
        num_blocks: number of residual blocks.

    Shape:
        maps ``(N, in_channels, H, W)`` to maps ``(N, out_channels, H, W)``.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int, num_blocks: int) -> None:
        super().__init__()

        def convolution(channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels, hidden_channels, 3, padding=1)

        self.enter = convolution(in_channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), convolution(hidden_channels), nn.ReLU(), convolution(hidden_channels))
            for _ in range(num_blocks)
        )
        self.leave = nn.Conv2d(hidden_channels, out_channels, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias if self.leave.bias is not None else torch.empty(0))

    def forward(self, maps: Tensor) -> Tensor:
        """Map a map to one of the same size."""
        hidden = self.enter(maps)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        output: Tensor = self.leave(F.relu(hidden))
        return output


class PixelFlow(nn.Module):
    r"""The multi-scale RealNVP on images: a logit, then couplings at each scale, which split off half the channels.

    Every scale except the last has three couplings with checkerboard masks, a squeeze of 2x2 pixels into
    channels, and three couplings with masks over channels; half of its channels then become latents. The last
    scale has four couplings with checkerboard masks. Before all this, pixels in [0, 1] are dequantized and mapped by

    .. math::
        y = \mathrm{logit}\left(\tfrac{1 - a}{2} + a\,p\right), \quad p = (255 x + u) / 256, \quad a = 0.9

    Args:
        channels: number of channels of the images.
        num_scales: 1 or more; the paper has 3 on CIFAR-10 and CelebA, 2 on MNIST.
        hidden_channels: of the conditioners at the finest scale; doubled at each further scale.
        num_blocks: number of residual blocks of each conditioner.
        constraint: :math:`a`.

    Shape:
        images ``(N, channels, H, W)`` in [0, 1] to latents, finest first, and a log-det ``(N,)`` in nats.

    Raises:
        ValueError: if an image cannot be halved at every scale except the last.

    Example:
        >>> flow = PixelFlow(1, num_scales=2, hidden_channels=4, num_blocks=1)
        >>> [tuple(latent.shape) for latent in flow(torch.rand(2, 1, 8, 12))[0]]
        [(2, 2, 4, 6), (2, 2, 4, 6)]
        >>> flow.nll(torch.rand(2, 1, 8, 12)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        channels: int = 3,
        num_scales: int = 3,
        hidden_channels: int = 64,
        num_blocks: int = 8,
        constraint: float = 0.9,
    ) -> None:
        super().__init__()
        self.num_scales = num_scales
        self.constraint = constraint
        self.before = nn.ModuleList()  # for each scale: its couplings before the squeeze, and after it
        self.after = nn.ModuleList()
        for scale in range(num_scales):
            last = scale == num_scales - 1
            conditioner = partial(
                ResidualConvolutions, hidden_channels=hidden_channels * 2**scale, num_blocks=num_blocks
            )
            checkerboards = [
                MaskedCoupling([(channels, 2, 2)], conditioner=conditioner, mask="checkerboard", swap=k % 2 == 1)
                for k in range(4 if last else 3)
            ]
            halves = [
                MaskedCoupling([(4 * channels, 1, 1)], conditioner=conditioner, mask="halves", swap=k % 2 == 1)
                for k in range(0 if last else 3)
            ]
            self.before.append(nn.ModuleList(checkerboards))
            self.after.append(nn.ModuleList(halves))
            channels *= 2

    def forward(self, images: Tensor, noise: Tensor | None = None, jac: bool = True) -> tuple[Pyramid, Tensor]:
        """Latents, and the log-det with respect to pixels in [0, 1] (zeros if not ``jac``).

        Args:
            images: ``(N, C, H, W)`` in [0, 1].
            noise: ``u`` in [0, 1), of the images' shape; one half if not given.
            jac: whether to compute the log-det.
        """
        self._check(images)
        share = ((LEVELS - 1) * images + (0.5 if noise is None else noise)) / LEVELS
        x = torch.logit((1 - self.constraint) / 2 + self.constraint * share)
        log_det = images.new_zeros(len(images))
        if jac:  # of the logit, 1 / (p (1 - p)), written in terms of its output; and of the two scalings before it
            scalings = math.log(self.constraint * (LEVELS - 1) / LEVELS)
            log_det = (F.softplus(x) + F.softplus(-x) + scalings).flatten(1).sum(1)
        latents = []
        for scale in range(self.num_scales):
            x, log_det = self._couple(self.before[scale], x, log_det, jac)
            if scale < self.num_scales - 1:
                x, log_det = self._couple(self.after[scale], F.pixel_unshuffle(x, 2), log_det, jac)
                x, latent = x.chunk(2, dim=1)
                latents.append(latent)
        return (*latents, x), log_det

    def inverse(self, latents: Pyramid) -> Tensor:
        """Images ``(N, C, H, W)`` from latents, assuming that one half was added in the dequantization."""
        *factored, x = latents
        for scale in reversed(range(self.num_scales)):
            if scale < self.num_scales - 1:
                x = torch.cat([x, factored[scale]], dim=1)
                for layer in reversed(list(self.after[scale].children())):
                    (x,), _ = layer((x,), rev=True, jac=False)
                x = F.pixel_shuffle(x, 2)
            for layer in reversed(list(self.before[scale].children())):
                (x,), _ = layer((x,), rev=True, jac=False)
        share = (torch.sigmoid(x) - (1 - self.constraint) / 2) / self.constraint
        return (LEVELS * share - 0.5) / (LEVELS - 1)

    def nll(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Negative log-likelihood in nats, ``(N,)``, of dequantized pixels in steps of 1, as in the literature.

        Args:
            images: ``(N, C, H, W)`` in [0, 1].
            noise: in [0, 1), of the images' shape; one half if not given. With random noise this is the bound
                on the discrete likelihood that the flow is trained with.
        """
        latents, log_det = self(images, noise)
        dims = images[0].numel()
        energy = torch.stack([0.5 * latent.square().flatten(1).sum(1) for latent in latents]).sum(0)
        return energy + dims * (0.5 * math.log(2 * math.pi) + math.log(LEVELS - 1)) - log_det

    @staticmethod
    def _couple(layers: nn.Module, x: Tensor, log_det: Tensor, jac: bool) -> tuple[Tensor, Tensor]:
        for layer in layers.children():
            (x,), added = layer((x,), jac=jac)
            log_det = log_det + added
        return x, log_det

    def _check(self, images: Tensor) -> None:
        factor = 2 ** (self.num_scales - 1)
        height, width = images.shape[2:]
        if height % factor or width % factor:
            msg = (
                f"images of {height}x{width} pixels cannot be halved {self.num_scales - 1} times: a pixel flow of "
                f"{self.num_scales} scales needs sides that are multiples of {factor}; resize or crop them"
            )
            raise ValueError(msg)
