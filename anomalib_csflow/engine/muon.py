"""Muon: steps along the whole of a weight matrix's gradient, and not only along its few largest directions.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon; the scale of the steps is that of J. Liu et al., "Muon is scalable for LLM
training", 2025, https://arxiv.org/abs/2502.16982, section 2.2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .precision import computes_bfloat16

UPDATE_RMS = 0.6
"""Root mean square of a weight's update in learning rates; with 0.2, as in Liu et al., flows learned more slowly."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors, whose singular values are near 1: between about 0.6 and 1.2.

    Args:
        matrix: ``(M, N)``, of any scale.

    Returns:
        ``(M, N)`` from five Newton-Schulz iterations, in bfloat16 if the device multiplies it, and else in float32.
        Singular values below 1/1000 of the matrix's norm remain smaller.

    Example:
        >>> torch.linalg.svdvals(orthogonalized(torch.diag(torch.tensor([1.0, 0.1]))).float()).round(decimals=1)
        tensor([0.7000, 0.7000])
    """
    first, second, third = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float().T if is_tall else matrix.float()
    x = x / x.norm().clamp(min=1e-30)
    x = x.to(torch.bfloat16 if computes_bfloat16(matrix.device) else torch.float32)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x.T if is_tall else x


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter is the weight of a convolution or of a linear layer, and not one number per channel."""
    return parameter.ndim > 1 and parameter.shape[0] > 1 and parameter[0].numel() > 1


class Muon(torch.optim.Adam):
    """Muon for the weights of convolutions and linear layers, Adam for all other parameters.

    torch's own ``Muon`` refuses all parameters but matrices. Adam's first beta is Muon's momentum. A convolution's
    weight ``(O, I, k, k)`` is a matrix of ``O`` rows. ``weight_decay`` shrinks matrices themselves, and not by
    way of the gradient.

    Args and what is raised are those of :class:`torch.optim.Adam`; ``maximize`` is not for matrices.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gradients of matrices are None afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and is_matrix(parameter):
                    self._step_matrix(parameter, parameter.grad, group)
                    parameter.grad = None  # nothing is left for Adam
        super().step()
        return loss

    def _step_matrix(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["betas"][0]
        if not state:  # Adam's names, by which it also restores them
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - momentum)
        update = torch.lerp(gradient, state["exp_avg"], momentum).flatten(1)  # Nesterov's
        scale = UPDATE_RMS * max(update.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalized(update).view(parameter.shape), alpha=-group["lr"] * scale)
