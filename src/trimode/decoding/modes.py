"""The modes by name, and the life of a sequence: prefill, then rounds of whatever mode it is in."""

from __future__ import annotations

from collections.abc import Callable, Generator

from trimode.decoding.autoregressive import autoregressive
from trimode.decoding.block_diffusion import block_diffusion
from trimode.decoding.infilling import infill
from trimode.decoding.prefill import prefill
from trimode.decoding.sequence import Sequence
from trimode.decoding.speculation import speculate
from trimode.decoding.step import Readout, Step

Steps = Generator[Step, Readout, None]

MODES: dict[str, Callable[[Sequence], Steps]] = {
    "ar": autoregressive,
    "diffusion": block_diffusion,
    "linear": speculate,
    "branching": speculate,
    "quadratic": speculate,
}
"""Each yields the steps of one round and returns in the common state, so modes may change between
rounds. `auto` is none of its own: it picks one for every round."""


def life(seq: Sequence) -> Steps:
    """All steps of one sequence, from the cells it has on. The prefill gives the first token,
    unless the sequence had emitted some before it lost its row; where the prompt is healed, it
    first gives what was taken back. Where no token is asked for, the prefill is all. One with a gap
    to fill has a life of its own."""
    if seq.gap is not None:
        yield from infill(seq, seq.gap)
        return
    if seq.num_new:
        yield from prefill(seq, [*seq.prompt_ids, *seq.new_ids[:-1]])
    while not (seq.num_new or seq.is_finished):
        readout = yield from prefill(seq, [*seq.prompt_ids, *seq.new_ids])
        if not seq.params.max_new_tokens:
            seq.finish("length")
            return
        seq.emit(readout.token_ids, readout.logprobs)
    while not seq.is_finished:
        yield from MODES[seq.begin_round().mode](seq)
