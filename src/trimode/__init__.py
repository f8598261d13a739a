"""trimode: one checkpoint decoded token by token, by block diffusion, or by self-speculation.

Importing this package loads neither torch nor transformers; the names below load what they need
when used.
"""

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
    from trimode.runtime import Generation, TriModeLM, load

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

_FROM_RUNTIME = ("Generation", "TriModeLM", "load")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM_RUNTIME})


def __getattr__(name: str) -> Any:
    if name in _FROM_RUNTIME:
        from trimode import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'trimode' has no attribute {name!r}")
