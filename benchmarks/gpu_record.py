"""What a part of `gpu_check.py` is told and writes down: checks, figures, what it left out.

Nothing is skipped in silence: a part that runs out of time names what it did not do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Attributes:
        device: What is checked against the CPU.
        is_small: Tiny shapes, for a rehearsal without a GPU.
        until_s: Time by `time.monotonic` at which a part takes up nothing new.
    """

    device: torch.device
    is_small: bool
    until_s: float

    @property
    def left_s(self) -> float:
        """Seconds until then."""
        return self.until_s - time.monotonic()

    def pick(self, large: Any, small: Any) -> Any:
        """One of two sizes."""
        return small if self.is_small else large

    def wait(self) -> None:
        """Until the device has done all that it was asked to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Record:
    """What a part found.

    Attributes:
        checks: Each with its name, whether it holds, and its figures.
        figures: What was measured without a bound to meet.
        left_out: What was not done, and why.
        keep: Called after every check with all of it, so that it outlasts a crash; None: nobody is.
    """

    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    keep: Callable[[dict[str, Any]], None] | None = None

    def check(self, name: str, is_good: bool, **figures: Any) -> None:
        """Note whether something holds that must hold."""
        self.checks.append({"name": name, "is_good": bool(is_good), **figures})
        if self.keep is not None:
            self.keep(self.as_dict())

    def has_time(self, setting: Setting, what: str) -> bool:
        """Whether there is time for something; if not, the record says that it was left out."""
        if setting.left_s > 0:
            return True
        self.left_out.append(f"{what}: the time of this part was over")
        return False

    @property
    def status(self) -> str:
        """`fail` if a check does not hold, `skipped` if nothing was done, else `pass`."""
        if not all(check["is_good"] for check in self.checks):
            return "fail"
        return "pass" if self.checks or self.figures else "skipped"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = _as_json(
            {
                "status": self.status,
                "checks": self.checks,
                "figures": self.figures,
                "left_out": self.left_out,
            }
        )
        return found


def _as_json(value: Any) -> Any:
    """The same, with words for the numbers that JSON has not."""
    if isinstance(value, dict):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
