"""The fast convolutions are the plain ones: values, gradients, precision."""

from collections.abc import Callable

import pytest
import torch
from conftest import randomize
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_csflow.flows import CrossScaleCoupling, windows
from anomalib_csflow.flows.cross_convolution import SameConv2d

KERNELS = [1, 2, 3, 4, 5]
SIZES = [(8, 8), (7, 5), (2, 3), (1, 1)]


def values_and_gradients(function: Callable[[Tensor], Tensor], x: Tensor, conv: SameConv2d) -> list[Tensor]:
    """Of a function of x and the convolution's parameters."""
    x = x.clone().requires_grad_()
    output = function(x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [x, *conv.parameters()])]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_convolve_is_the_convolution(kernel_size: int, stride: int, size: tuple[int, int]) -> None:
    conv = randomize(windows.lay_out(SameConv2d(3, 4, kernel_size, stride))).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    fast = values_and_gradients(lambda x: windows.convolve(x, conv), x, conv)
    torch.testing.assert_close(fast, values_and_gradients(conv, x, conv))


@pytest.mark.parametrize("size", [(16, 16), (15, 9), (3, 5), (2, 1)])
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_convolve_resized_is_the_convolution_of_the_resized(
    kernel_size: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "MANY_CHANNELS", 1)
    conv = randomize(windows.lay_out(SameConv2d(3, 4, kernel_size), resized=True)).double()
    x = torch.randn(2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2, dtype=torch.float64)
    fast = values_and_gradients(lambda x: windows.convolve_resized(x, size, conv), x, conv)
    plain = values_and_gradients(lambda x: conv(F.interpolate(x, size=size, mode="bilinear")), x, conv)
    torch.testing.assert_close(fast, plain)


def test_the_order_in_memory_outlives_loading_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MANY_CHANNELS", 1)
    conv = windows.lay_out(SameConv2d(3, 4, 3), resized=True)
    strides = conv.weight.stride()
    conv.load_state_dict(SameConv2d(3, 4, 3).state_dict())
    windows.convolve_resized(torch.randn(1, 3, 2, 2), (4, 4), conv).sum().backward()
    assert conv.weight.stride() == strides == conv.weight.grad.stride()
    assert strides != SameConv2d(3, 4, 3).weight.stride()


@pytest.mark.parametrize("hidden_channels", [8, 256])
def test_bfloat16_convolutions_leave_the_log_det_in_float32(hidden_channels: int) -> None:
    dims = [(6, 8, 8), (6, 4, 4), (6, 2, 2)]
    coupling = randomize(CrossScaleCoupling(dims, hidden_channels=hidden_channels), scale=0.05)
    pyramid = tuple(torch.randn(3, *shape) for shape in dims)
    exact, exact_log_det = coupling(pyramid)
    with torch.autocast("cpu", torch.bfloat16):
        latents, log_det = coupling(pyramid)
    assert {t.dtype for t in (*latents, log_det)} == {torch.float32}
    torch.testing.assert_close(latents, exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(log_det, exact_log_det, atol=0.5, rtol=0.02)
    assert not torch.equal(latents[0], exact[0])  # it did compute in bfloat16


def test_bfloat16_gradients_are_near_those_of_float32() -> None:
    dims = [(6, 8, 8), (6, 4, 4)]
    coupling = randomize(CrossScaleCoupling(dims, hidden_channels=256), scale=0.05)
    pyramid = tuple(torch.randn(3, *shape) for shape in dims)

    def gradient() -> Tensor:
        latents, log_det = coupling(pyramid)
        loss = sum(level.square().sum() for level in latents) - log_det.sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(coupling.parameters()))])

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradient()
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).norm() / exact.norm()) < 0.02
