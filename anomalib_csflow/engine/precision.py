"""Whether training in bfloat16 is faster, rather than only smaller."""

from contextlib import AbstractContextManager, nullcontext

import torch

CPU_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")
"""Instructions that multiply bfloat16, by their names on Intel's, AMD's and Arm's processors."""


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware; otherwise it would be emulated, and slower than float32.

    Example:
        >>> computes_bfloat16(torch.device("meta"))
        False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(
            torch.cpu, "get_capabilities", dict
        )()  # newer than the oldest torch that we support
        return any(capabilities.get(name, False) for name in CPU_FEATURES)
    return False


def bfloat16(device: torch.device, *, wanted: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16 if it is wanted and the device supports it."""
    return torch.autocast(device.type, torch.bfloat16) if wanted and computes_bfloat16(device) else nullcontext()
