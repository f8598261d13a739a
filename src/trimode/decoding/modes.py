"""The modes by name, and the life of a sequence: prefill, then rounds of whatever mode it is in."""

from __future__ import annotations

from collections.abc import Callable, Generator

from trimode.decoding.autoregressive import autoregressive
from trimode.decoding.block_diffusion import block_diffusion
from trimode.decoding.infilling import infill
from trimode.decoding.sequence import Sequence
from trimode.decoding.speculation import speculate
from trimode.decoding.step import Readout, Step, causal_step

Steps = Generator[Step, Readout, None]

MODES: dict[str, Callable[[Sequence], Steps]] = {
    "ar": autoregressive,
    "diffusion": block_diffusion,
    "linear": speculate,
    "branching": speculate,
    "quadratic": speculate,
}
"""Each yields the steps of one round and returns in the common state, so modes may change between
rounds."""


def life(seq: Sequence) -> Steps:
    """All steps of one sequence. The prefill is causal with the adapter off and gives the first
    token; a sequence with a gap to fill has a life of its own."""
    if seq.gap is not None:
        yield from infill(seq, seq.gap)
        return
    last = len(seq.prompt_ids) - 1
    readout = yield causal_step("prefill", seq.prompt_ids, start=0, wanted=[last])
    seq.commit(len(seq.prompt_ids))
    seq.emit(readout.token_ids, readout.logprobs)
    while not seq.is_finished:
        yield from MODES[seq.mode](seq)
