"""A text that is made twice reaches its reader once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trimode.decoding import Stats
from trimode.serving.jobs import Done, Happening, Piece, TextLogprobs, TokenText, Update
from trimode.serving.sent import AnotherText, Sent

LOGPROBS = tuple(
    TextLogprobs(TokenText.of(text.encode()), i, -1.0, ()) for i, text in enumerate("abcd")
)
DONE = Done(
    text="abcd",
    token_ids=(1, 2, 3, 4),
    prompt_tokens=1,
    finish_reason="length",
    seed=0,
    mode="ar",
    stats=Stats(),
)


def _pieces(*cuts: int) -> list[Piece]:
    """The text abcd, cut there; a piece's text lags one token behind."""
    ends = [*cuts, 4]
    pieces = []
    for start, end in zip([0, *cuts], ends, strict=True):
        text = "abcd"[max(start - 1, 0) : 4 if end == 4 else end - 1]
        pieces.append(Piece(text, DONE.token_ids[start:end], LOGPROBS[start:end]))
    return pieces


@pytest.mark.parametrize("first", [(), (1,), (1, 3), (2,), (1, 2, 3)])
@pytest.mark.parametrize("again", [(), (1,), (2, 3), (3,), (1, 2, 3)])
@pytest.mark.parametrize("num_sent", [0, 1, 2, 3])
def test_the_second_making_goes_on_behind_the_first(
    first: tuple[int, ...], again: tuple[int, ...], num_sent: int
) -> None:
    """Prevents tokens, text or log-probabilities that are missing or come twice, however the two
    makings are cut."""
    sent, got = Sent(), list[Update | None]()
    got += [sent.beyond(piece) for piece in _pieces(*first)[:num_sent]]
    assert sent.begin_again()
    got += [sent.beyond(update) for update in [*_pieces(*again), DONE]]
    assert got.pop() == DONE
    pieces = [piece for piece in got if isinstance(piece, Piece)]
    assert len(pieces) == len([piece for piece in got if piece is not None])
    assert "".join(piece.text for piece in pieces) == "abcd"
    assert [i for piece in pieces for i in piece.token_ids] == [1, 2, 3, 4]
    assert [one.token.text for piece in pieces for one in piece.logprobs] == list("abcd")


@pytest.mark.parametrize(
    "other",
    [
        Piece("ab", (1, 9)),
        Piece("ax", (1, 2)),
        replace(DONE, token_ids=(1,)),
        replace(DONE, token_ids=(1, 9, 3)),
    ],
)
def test_another_text_is_not_taken_for_the_same(other: Update) -> None:
    """Prevents an answer glued together from two texts."""
    sent = Sent()
    sent.beyond(Piece("ab", (1, 2)))
    sent.begin_again()
    with pytest.raises(AnotherText):
        sent.beyond(other)


def test_what_was_watched_is_not_shown_again() -> None:
    """Prevents a canvas on which drafts happen twice."""
    sent = Sent()
    happening = Happening(kind="draft", position=0, token_ids=(1,), texts=("a",))
    assert sent.beyond(happening) == happening
    assert not sent.begin_again()


@pytest.mark.parametrize("prompt", ["ab", ""])
def test_a_prompt_is_sent_once(prompt: str) -> None:
    """Prevents: a prompt's log-probabilities twice, or none where it has no text."""
    sent = Sent()
    echo = Piece(prompt, (), LOGPROBS[:2])
    assert sent.beyond(echo) == echo
    sent.begin_again()
    assert sent.beyond(echo) is None
    assert sent.beyond(Piece("c", (3,), LOGPROBS[2:3])) == Piece("c", (3,), LOGPROBS[2:3])
