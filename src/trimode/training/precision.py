"""Which device and which precision to train in, and why."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from trimode.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Precision:
    """Weights are always float32; in bf16 the products run under autocast.

    Norms, softmax statistics, the residual stream and the losses stay in float32.

    Args:
        name: `fp32` or `bf16`.
        reason: Why this one, for the log.
        device: Where it runs.
    """

    name: Literal["fp32", "bf16"]
    reason: str
    device: torch.device

    @property
    def gather_dtype(self) -> torch.dtype | None:
        """In which ranks gather the layers they share out; None is float32, the weights' own."""
        is_half = self.name == "bf16" and self.device.type == "cuda"
        return torch.bfloat16 if is_half else None

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def choose_device(name: str) -> torch.device:
    """The device a name means; `auto` is CUDA if there is one.

    Raises:
        ConfigError: Not a device, or CUDA where there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}, but must be auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, but must be auto, cpu or cuda")
    if device.type == "cuda" and not has_cuda:
        raise ConfigError(f"device is {name!r}, but this machine has no CUDA device: use cpu")
    return device


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The precision a name means on a device; `auto` is bf16 where there are units for it."""
    if name != "auto":
        return Precision(name, "as the config says", device)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Precision("bf16", "auto: the GPU has bf16 units", device)
        return Precision("fp32", "auto: the GPU has no bf16 units", device)
    if _has_cpu_bf16_units():
        return Precision("bf16", "auto: the CPU has AVX512-BF16 or AMX", device)
    return Precision("fp32", "auto: no fast bf16 on this device", device)


def _has_cpu_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 in hardware (emulated bf16 is slower than fp32)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(torch.cpu, name, None) for name in names]
    return any(check is not None and bool(check()) for check in checks)
