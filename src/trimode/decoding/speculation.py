"""Linear self-speculation: the diffusion view drafts, the AR view verifies, the text is the AR
view's."""

from __future__ import annotations

from collections.abc import Generator
from itertools import takewhile

from trimode.decoding.reveal import denoise
from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Readout, Step, causal_step


def linear(seq: Sequence) -> Generator[Step, Readout, None]:
    """One round: draft K - 1 tokens, verify them in one causal forward, keep the run that agrees
    (facts 3.3).

    Both views choose with the same noise (`trimode.decoding.choose`), so a draft token is right
    exactly when it equals the verifier's choice, and what is emitted is the verifier's at any
    temperature. The draft is always a whole block, as the drafter was trained on, and then cut to
    what may still be emitted; where that is one token there is nothing to draft.
    """
    block = [seq.last]
    if seq.num_remaining > 1:
        block += [seq.mask_token_id] * (seq.params.block_length - 1)
        threshold = seq.params.reveal_threshold("linear")
        yield from denoise(seq, block, kind="draft", is_drafter_on=True, threshold=threshold)
        del block[seq.num_remaining :]
    readout = yield causal_step("verify", block, start=seq.length, wanted=range(len(block)))
    draft, chosen = block[1:], readout.token_ids
    agreeing = takewhile(lambda pair: pair[0] == pair[1], zip(draft, chosen, strict=False))
    num_accepted = sum(1 for _ in agreeing)
    seq.event("verify", position=seq.length + 1, token_ids=draft, num_accepted=num_accepted)
    num_emitted = seq.emit(chosen[: num_accepted + 1])
    seq.stats.acceptance_lengths.append(num_emitted)
    seq.commit(num_emitted)
