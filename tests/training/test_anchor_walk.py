"""Rounds walked over a known text, against the same done by hand and against decoding."""

import random

import pytest

from trimode.training.anchor_walk import answers, walk


def by_hand(runs: list[int], text: list[str], *, has_exact: bool) -> tuple[int, int]:
    """Emit a text round by round. Before a round its last token is the last one emitted."""
    emitted, rounds = text[:1], 0
    while len(emitted) < len(text):
        run = runs[len(emitted) - 1]
        rounds += 1
        if has_exact:  # the opening forward answers for the next token
            emitted.append(text[len(emitted)])
            if len(emitted) == len(text):
                break
        for _ in range(run):
            emitted.append(text[len(emitted)])
            if len(emitted) == len(text):
                break
        else:  # all drafts that were right are out; the verifier adds its token
            emitted.append(text[len(emitted)])
    assert emitted == text
    return len(text) - 1, rounds


@pytest.mark.parametrize("num_exact", [0, 1])
def test_walk_is_what_decoding_does(num_exact: int) -> None:
    """Prevents a walk that forgets the bonus token or the exact one, or goes past the end."""
    rng = random.Random(0)
    for num_tokens in range(1, 40):
        text = [f"t{i}" for i in range(num_tokens)]
        # a draft cannot be right beyond the end: at token i the first mask is i + 1 + num_exact
        most = [max(0, num_tokens - 1 - i - num_exact) for i in range(num_tokens)]
        runs = [rng.randint(0, min(4, m)) for m in most]
        found = walk(runs, num_tokens=num_tokens, num_exact=num_exact)
        assert found == by_hand(runs, text, has_exact=bool(num_exact))


def test_a_walk_counts_rounds() -> None:
    """Prevents a twin that is wrong in the same way: 0 -> 1+2+1 = 4 -> 6 -> 8, then the end."""
    assert walk([2, 9, 9, 9, 0, 9, 0, 9, 3, 9], num_tokens=10, num_exact=1) == (9, 4)
    assert walk([2, 9, 9, 1, 9, 4, 9, 9, 9, 9], num_tokens=10, num_exact=0) == (9, 3)
    assert walk([], num_tokens=0, num_exact=1) == (0, 0)


def test_answers_end_with_their_document() -> None:
    """Prevents two turns, or two documents without a prompt, from being walked as one."""
    flags = [False, True, True, False, True, True, True, True]
    documents = [0, 0, 0, 0, 0, 0, 1, 1]
    assert answers(flags, documents) == [(1, 3), (4, 6), (6, 8)]
