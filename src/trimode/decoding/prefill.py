"""Prefill: known tokens fed causally, in as few forwards as the engine grants."""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Ids

from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Readout, Step, causal_step


def prefill(seq: Sequence, token_ids: Ids[int]) -> Generator[Step, Readout, Readout]:
    """Feed what is not committed yet of the tokens that the text begins with.

    The engine may cut a step of this kind short (`Step.head`), so what was fed is committed and the
    rest asked for again. Where the prompt is scored, every step brings its tokens' scores.

    Args:
        seq: Whose text it is.
        token_ids: All of them, those committed already included.

    Returns:
        The answer behind the last; an empty one where nothing was left to feed.
    """
    readout = Readout([])
    while seq.length < len(token_ids):
        rest = token_ids[seq.length :]
        scored = [] if seq.scores is None else seq.scores.wanted(seq.length, len(rest))
        readout = yield causal_step(
            "prefill", rest, start=seq.length, wanted=[len(rest) - 1], scored=scored
        )
        if seq.scores is not None:
            seq.scores.found += readout.scores
        seq.commit(seq.num_committable)
    return readout
