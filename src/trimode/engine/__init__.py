"""Many requests at once: rows, packing what sequences yield into one forward, resuming each."""

from trimode.engine.engine import Engine

__all__ = ["Engine"]
