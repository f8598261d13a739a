"""What the parts of a training config have in common when they check themselves. No torch."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

from trimode.errors import ConfigError


def check(is_good: bool, message: str) -> None:
    """Raise a `ConfigError` with `message` unless `is_good`."""
    if not is_good:
        raise ConfigError(message)


def check_finite(part: Any) -> None:
    """Refuse NaN and infinity in any field of a dataclass."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, float):
            check(math.isfinite(value), f"{field.name} is {value}, but must be finite")


def changed_fields(part: Any, *, beside: set[str]) -> dict[str, Any]:
    """Fields of a dataclass, those of `beside` left out, that do not have their default value."""
    changed = {}
    for field in fields(part):
        value = getattr(part, field.name)
        make = field.default_factory
        default = field.default if make is MISSING else make()
        if field.name not in beside and value != default:
            changed[field.name] = value
    return changed
