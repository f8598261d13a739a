"""A conversation is that of `chat`, turn by turn, and what was fed is not fed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.chat_templates import THINKING
from trimode import dialogue as module
from trimode.errors import RequestError
from trimode.runtime import TriModeLM
from trimode.vocabulary import Vocabulary

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0}


@pytest.fixture
def lm(tiny_model: Callable[..., Any], vocabulary_of: Callable[[str], Vocabulary]) -> TriModeLM:
    vocabulary = vocabulary_of(THINKING)
    size = len(vocabulary.tokenizer)
    model = tiny_model(torch.float64, vocab_size=size, max_position_embeddings=400)
    return TriModeLM(model, vocabulary.tokenizer)


@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion"])
def test_every_answer_is_that_of_chat(lm: TriModeLM, mode: str) -> None:
    """Prevents: an answer to what was cut, reused or encoded otherwise; K/V fed anew each turn."""
    talk = lm.dialogue(system="Be brief.", mode=mode, **OPTIONS)
    messages = [{"role": "system", "content": "Be brief."}]
    for turn, said in enumerate(["One?", "Two?", "Three?"]):
        messages.append({"role": "user", "content": said})
        expected = lm.chat(messages, mode=mode, seed=turn, **OPTIONS)
        assert "".join(talk.say(said, seed=turn)) == expected.text
        assert talk.latest is not None
        assert talk.latest.token_ids == expected.token_ids
        messages.append({"role": "assistant", "content": expected.text})
        assert talk.messages == messages
        assert (talk.latest.stats.cached_tokens > 20) == (turn > 0)


def test_more_cells_where_they_are_needed(lm: TriModeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a long conversation refused, or cut, for the rows that the first turn had."""
    monkeypatch.setattr(module, "FIRST_CELLS", 8)
    talk = lm.dialogue(mode="ar", **OPTIONS)
    for turn in range(5):
        expected = lm.chat(
            [*talk.messages, {"role": "user", "content": "x" * 20}], mode="ar", seed=1, **OPTIONS
        )
        assert "".join(talk.say("x" * 20, seed=1)) == expected.text, turn


def test_an_answer_that_is_stopped_stays_as_it_is(lm: TriModeLM) -> None:
    """Prevents: a conversation that forgets what the reader saw, or a row that is never free."""
    talk = lm.dialogue(mode="ar", ignore_eos=True, seed=2, **(OPTIONS | {"max_new_tokens": 40}))
    pieces = talk.say("One?")
    seen = next(pieces) + next(pieces)
    pieces.close()
    assert talk.latest is not None
    assert talk.latest.finish_reason == "abort"
    assert talk.messages[-1]["content"] == talk.latest.text
    assert talk.latest.text.startswith(seen)
    assert "".join(talk.say("Two?"))


def test_what_is_refused_was_not_said(lm: TriModeLM) -> None:
    """Prevents: a message that no answer follows, after which the template refuses all."""
    talk = lm.dialogue(**OPTIONS)
    for said, options in (("x" * 500, {}), ("x", {"mode": "sideways"}), ("x", {"seed": -1})):
        with pytest.raises(RequestError):
            talk.say(said, **options)
    assert talk.messages == []
    with pytest.raises(RequestError, match="mode is 'sideways'"):
        talk.check(mode="sideways")
    talk.check(mode="ar")


def test_an_answer_has_room(lm: TriModeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a default length that a long conversation has no room for."""
    talk = lm.dialogue(mode="ar")
    for length in (1, 300):
        seq = talk._prepared([{"role": "user", "content": "x" * length}], {})
        assert seq.num_prompt + seq.params.max_new_tokens == 400
    monkeypatch.setattr(module, "MOST_NEW_TOKENS", 20)
    assert talk._prepared([{"role": "user", "content": "x"}], {}).params.max_new_tokens == 20


def test_auto_may_come_later(lm: TriModeLM) -> None:
    """Prevents: a conversation whose rows have no planner, in which `auto` is refused."""
    talk = lm.dialogue(mode="ar", seed=0, max_new_tokens=5)
    first = "".join(talk.say("One?"))
    second = "".join(talk.say("Two?", mode="auto"))
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": first}]
    messages.append({"role": "user", "content": "Two?"})
    assert second == lm.chat(messages, mode="ar", max_new_tokens=5).text


def test_one_answer_at_a_time(lm: TriModeLM) -> None:
    """Prevents: a turn lost without a word, where two answers are read in turn."""
    talk = lm.dialogue(mode="ar", ignore_eos=True, **OPTIONS)
    first, second = talk.say("One?"), talk.say("Two?")
    next(first)
    with pytest.raises(RequestError, match="an answer is under way"):
        next(second)
    "".join(first)
    assert [one["content"] for one in talk.messages][0] == "One?"
    assert len(talk.messages) == 2
    "".join(talk.say("Three?"))
    assert len(talk.messages) == 4


def test_a_full_conversation_may_change_its_options(lm: TriModeLM) -> None:
    """Prevents: a seed refused because the conversation has become too long."""
    talk = lm.dialogue(**OPTIONS)
    talk.messages = [{"role": "user", "content": "x" * 500}]
    talk.check(seed=3)
