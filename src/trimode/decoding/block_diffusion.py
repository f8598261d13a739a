"""Block diffusion: a block starts from the AR token and is denoised in a few passes."""

from __future__ import annotations

from collections.abc import Generator

from trimode.decoding.reveal import denoise
from trimode.decoding.revising import ar_doubt, joint_threshold, remdm
from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Readout, Step, causal_step


def block_diffusion(seq: Sequence) -> Generator[Step, Readout, None]:
    """One round: one block of K tokens, the last emitted one at its head (facts 3.2).

    The block is always denoised whole and then cut, so a shorter limit gives a prefix. The causal
    commit pass writes its K/V and gives the token that seeds the next block; it is skipped after
    the last block, unless the block's revision asks it for the AR view's doubts.
    """
    params = seq.params
    canvas = [seq.last] + [seq.mask_token_id] * (params.block_length - 1)
    if seq.rules is not None:
        seq.rules.write_fixed(seq, canvas)
    committed: Readout | None = None
    if params.revision == "ar_doubt":
        committed = yield from ar_doubt(seq, canvas)
    elif params.revision == "joint_threshold":
        yield from joint_threshold(seq, canvas)
    elif params.revision == "remdm":
        yield from remdm(seq, canvas)
    else:
        yield from denoise(
            *(seq, canvas),
            kind="denoise",
            threshold=params.reveal_threshold("diffusion"),
            policy=params.reveal_policy,
        )
    seq.emit(canvas[1:])
    if seq.is_finished:
        return
    if committed is None:
        last = len(canvas) - 1
        committed = yield causal_step("commit", canvas, start=seq.length, wanted=[last])
    seq.commit(len(canvas))
    seq.emit(committed.token_ids[-1:])
