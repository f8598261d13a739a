"""Rounds of decoding, walked over a text that is known. Plain numbers; no network.

Position i of an answer is its i-th token, 0 the one that the prefill gives.
"""

from __future__ import annotations

from collections.abc import Sequence


def walk(runs: Sequence[int], *, num_tokens: int, num_exact: int) -> tuple[int, int]:
    """Tokens and rounds of an answer after its first token.

    A round begins at the last emitted token i, keeps `runs[i]` drafts, and adds the verifier's
    token: `runs[i] + 1`, never more than are left.

    Args:
        runs: Right drafts in a row of the group that is fed when token i is the last.
        num_tokens: Of the answer, its end token included.
        num_exact: Tokens that the opening forward gives for certain: 0 in `block`, 1 in `skip`.

    Returns:
        Tokens emitted by the rounds, and rounds.
    """
    at = num_rounds = 0
    while at < num_tokens - 1:
        at = min(at + num_exact + runs[at] + 1, num_tokens - 1)
        num_rounds += 1
    return max(num_tokens - 1, 0), num_rounds


def answers(is_supervised: Sequence[bool], document_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of supervised tokens of one document in a row: first place and end of each."""
    found: list[tuple[int, int]] = []
    start: int | None = None
    for place, is_one in enumerate(is_supervised):
        is_new = place > 0 and document_ids[place] != document_ids[place - 1]
        if start is not None and (not is_one or is_new):
            found.append((start, place))
            start = None
        if is_one and start is None:
            start = place
    if start is not None:
        found.append((start, len(is_supervised)))
    return found
