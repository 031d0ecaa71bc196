"""The coupling layer beside that of anomalib's Csflow: forward, and forward with backward.

Also the share of the machine's matrix-product rate that the forward pass reaches, counting the products of the plain
convolutions.
"""

from typing import Any

import torch
from anomalib.models.image.csflow.torch_model import ParallelGlowCouplingLayer
from side_by_side import alternating, begin, parser, row, write
from torch import Tensor, nn

from anomalib_csflow.flows import CrossScaleCoupling

SIZES = {
    # channels, hidden channels, side of the finest map, images
    "small (208 channels, hidden 128, 8 x 8, 16 images)": (208, 128, 8, 16),
    "paper (304 channels, hidden 1024, 24 x 24, 4 images)": (304, 1024, 24, 4),
}
TINY = {"tiny (16 channels, hidden 8, 8 x 8, 2 images)": (16, 8, 8, 2)}
TARGETS = {torch.float32: 1 / 1.5, torch.bfloat16: 1 / 3}
KERNEL_SIZE = 3


def products(channels: int, hidden: int, side: int, images: int) -> int:
    """Multiplications and additions of the plain convolutions of both conditioners."""
    positions = [images * (side >> s) ** 2 for s in range(3)]
    half = channels // 2
    enter = half * hidden * sum(positions)
    leave = hidden * channels * (sum(positions) + positions[0] + positions[1] + positions[1] + positions[2])
    return 2 * 2 * KERNEL_SIZE**2 * (enter + leave)


def step(layer: nn.Module, pyramid: list[Tensor], dtype: torch.dtype) -> None:
    """Forward and backward."""
    layer.zero_grad()
    for level in pyramid:
        level.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        latents, log_det = layer(pyramid)
        loss = sum(level.float().square().sum() for level in latents) - log_det.sum()
    loss.backward()


@torch.no_grad()
def forward(layer: nn.Module, pyramid: list[Tensor], dtype: torch.dtype) -> None:
    """Only forward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        layer(pyramid)


def main() -> None:
    """Measure all sizes and dtypes."""
    arguments = parser(__doc__).parse_args()
    begin(arguments)
    rows = []
    width = 64 if arguments.quick else 2048
    for name, (channels, hidden, side, images) in (TINY if arguments.quick else SIZES).items():
        torch.manual_seed(0)
        dims: list[Any] = [(channels, side >> s, side >> s) for s in range(3)]
        pyramid = [torch.randn(images, *shape, requires_grad=True) for shape in dims]
        ours = CrossScaleCoupling(dims, hidden_channels=hidden, kernel_size=KERNEL_SIZE)
        theirs = ParallelGlowCouplingLayer(
            dims_in=dims, subnet_args={"channels_hidden": hidden, "kernel_size": KERNEL_SIZE}, clamp=3.0
        )
        for layer in (ours, theirs):
            for parameter in layer.parameters():
                if parameter.numel() <= 3:  # gamma: if it were 0, there would be nothing to compute
                    nn.init.constant_(parameter, 0.5)
        for dtype, target in TARGETS.items():
            square = torch.randn(width, width, dtype=dtype)
            times = alternating(
                {
                    "ours": lambda: step(ours, pyramid, dtype),  # noqa: B023 (called at once)
                    "theirs": lambda: step(theirs, pyramid, torch.float32),  # noqa: B023
                    "theirs alike": lambda: step(theirs, pyramid, dtype),  # noqa: B023
                    "forward": lambda: forward(ours, pyramid, dtype),  # noqa: B023
                    "matmul": lambda: square @ square,  # noqa: B023
                },
                arguments.repeats,
            )
            short = str(dtype).removeprefix("torch.")
            rows.append(
                row(f"{name}: step in {short}, theirs in float32", 1e3 * times["ours"], 1e3 * times["theirs"], target)
            )
            if dtype != torch.float32:
                rows.append(
                    row(f"{name}: step, both in {short}", 1e3 * times["ours"], 1e3 * times["theirs alike"], None)
                )
            rate = products(channels, hidden, side, images) / times["forward"] / 1e9
            peak = 2 * width**3 / times["matmul"] / 1e9
            share = rate / peak
            rows.append(
                {
                    "what": f"{name}: forward in {short}, share of the rate of matrix products",
                    "ours": f"{rate:.0f} GFLOP/s",
                    "theirs": f"{peak:.0f} GFLOP/s (matmul)",
                    "ratio": f"{share:.3f}",
                    "target": "at least 0.600",
                    "met": "yes" if share >= 0.6 else "NO",
                }
            )
    write("coupling", rows, arguments)


if __name__ == "__main__":
    main()
