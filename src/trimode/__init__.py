"""trimode: one checkpoint decoded token by token, by block diffusion, or by self-speculation.

Importing this package loads neither torch nor transformers; the names below load what they need
when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimode._version import __version__
from trimode.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    RequestError,
    TriModeError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from trimode.loading import load
    from trimode.runtime import Generation, TriModeLM

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "Generation",
    "RequestError",
    "TriModeError",
    "TriModeLM",
    "UnsupportedError",
    "__version__",
    "load",
]

_LAZY = {"Generation": "runtime", "TriModeLM": "runtime", "load": "loading"}


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"trimode.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'trimode' has no attribute {name!r}")
