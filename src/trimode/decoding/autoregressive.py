"""AR: one token a forward."""

from __future__ import annotations

from collections.abc import Generator

from trimode.decoding.sequence import Sequence
from trimode.decoding.speculation import verify_lookup
from trimode.decoding.step import Readout, Step, causal_step


def autoregressive(seq: Sequence) -> Generator[Step, Readout, None]:
    """One round: feed the last token, emit the next (facts 3.1). In a round of `auto`, what
    the text itself promises is verified beside it."""
    if seq.lookup is not None and (yield from verify_lookup(seq)):
        return
    readout = yield causal_step("decode", [seq.last], start=seq.length, wanted=[0])
    seq.commit(1)
    seq.emit(readout.token_ids, readout.logprobs)
