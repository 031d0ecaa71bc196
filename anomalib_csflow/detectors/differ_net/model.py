"""The network of DifferNet, and its maps; see :mod:`anomalib_csflow.detectors.differ_net`."""

from collections.abc import Sequence

import torch
from anomalib.data import InferenceBatch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from anomalib_csflow import scoring
from anomalib_csflow.engine.model import FlowModel
from anomalib_csflow.features import PooledPyramid
from anomalib_csflow.flows import ChannelStandardization, GlowCoupling, PyramidFlow, ScalePermutation

from .rotations import fixed_angles, rotate_all


class DifferNetModel(FlowModel):
    """The network of DifferNet: pooled features of an image pyramid, Glow couplings, the mean over rotated views.

    Args:
        features: images to one vector.
        num_blocks: permutations and couplings.
        hidden_channels: width of the couplings' perceptrons.
        clamp: bound of the couplings' log-scales.
        standardize: begin with a layer that standardizes each feature.
        num_test_rotations: number of views per image; the score is their mean.
        black: ``(3,)``, the normalized colour of pixels that a rotated image leaves empty.
    """

    def __init__(
        self,
        features: PooledPyramid,
        num_blocks: int,
        hidden_channels: int,
        clamp: float,
        standardize: bool,
        num_test_rotations: int,
        black: Sequence[float],
    ) -> None:
        dims = [(features.num_features,)]
        layers = [ChannelStandardization(dims)] if standardize else []
        for block in range(num_blocks):
            layers.append(ScalePermutation(dims, seed=block))
            layers.append(GlowCoupling(dims, hidden_features=hidden_channels, clamp=clamp))
        super().__init__(features, PyramidFlow(layers))
        # not in state_dict, since they follow from the arguments
        self.register_buffer("angles", torch.tensor(fixed_angles(num_test_rotations)), persistent=False)
        self.register_buffer("black", torch.tensor(black), persistent=False)

    def views(self, images: Tensor) -> Tensor:
        """Each image rotated by every fixed angle, one image's views after the other's: ``(N * V, 3, H, W)``."""
        return rotate_all(images, self.get_buffer("angles"), self.get_buffer("black"))

    def per_image(self, values: Tensor) -> Tensor:
        """Mean over each image's views, ``(N * V,)`` to ``(N,)``."""
        return values.unflatten(0, (-1, len(self.get_buffer("angles")))).mean(1)

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """Mean squared latent of all views; no map, because it needs a gradient: see :meth:`localize`."""
        del size
        return InferenceBatch(pred_score=self.per_image(2 * scoring.mean_energy(latents)))

    def localize(self, images: Tensor, sigma: float = 3.0) -> InferenceBatch:
        """Score images, and trace each score back to its pixels (section 3.5).

        The gradient of each view's negative log-likelihood with respect to its pixels is rotated back
        and blurred. The map is the squared mean, over views and channels, of its absolute value.

        Args:
            images: ``(N, 3, H, W)``, normalized.
            sigma: of the Gaussian, in pixels.

        Returns:
            ``pred_score (N,)`` as by :meth:`forward`, and ``anomaly_map (N, 1, H, W)``.
        """
        angles, black = self.get_buffer("angles"), self.get_buffer("black")
        side = 2 * min(round(4 * sigma), min(images.shape[2:]) - 1) + 1
        scores, saliency = [], images.new_zeros(len(images), 1, *images.shape[2:])
        with torch.inference_mode(mode=False), torch.enable_grad():  # the engine infers without gradients
            for angle in angles.clone().split(1):
                view = rotate_all(images.clone(), angle, black).requires_grad_()
                latents, log_det = self.transform(self.features(view))
                (gradient,) = torch.autograd.grad((scoring.energy(latents) - log_det).sum(), view)
                back = rotate_all(gradient, -angle, torch.zeros_like(black))
                blurred = gaussian_blur(back, [side, side], [sigma, sigma])
                saliency = saliency + blurred.abs().mean(1, keepdim=True)
                scores.append(2 * scoring.mean_energy(latents).detach())
        return InferenceBatch(
            pred_score=torch.stack(scores).mean(0), anomaly_map=(saliency / len(angles)).square().detach()
        )
