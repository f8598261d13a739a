"""How tokens are chosen: modes as generator functions, the law of a choice, reveal policies.

A mode is straight-line code for one sequence; the engine owns the loop and the network.
"""

from trimode.decoding.modes import MODES, life
from trimode.decoding.params import GenerationParams
from trimode.decoding.sequence import Event, Sequence
from trimode.decoding.stats import Stats
from trimode.decoding.step import Readout, Step

__all__ = [
    "MODES",
    "Event",
    "GenerationParams",
    "Readout",
    "Sequence",
    "Stats",
    "Step",
    "life",
]
