"""The forms in which the weights of a model may lie in memory, by name."""

from __future__ import annotations

from typing import Literal

from trimode.errors import ConfigError

Weights = Literal["plain", "native", "int8"]
"""How the weights of a model lie in memory; see `TriModeModel.pack`."""

WEIGHTS: tuple[Weights, ...] = ("plain", "native", "int8")


def as_weights(name: str) -> Weights:
    """A form of the weights by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    for known in WEIGHTS:
        if name == known:
            return known
    raise ConfigError(f"weights is {name!r}; allowed: {', '.join(WEIGHTS)}")
