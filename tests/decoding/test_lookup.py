"""Drafts from the text itself in the plain rounds of `auto`: only there, only what is worth it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.decoding import Event, GenerationParams, Sequence
from trimode.decoding.autoregressive import autoregressive
from trimode.decoding.lookup import MOST_INDEXED, Lookup
from trimode.decoding.setting import Setting
from trimode.runtime import TriModeLM

REPETITIVE = [1, 2, 3, 4, 5, 6] * 4

Make = Callable[..., Sequence]


@pytest.fixture
def make() -> Make:
    """`make(**options)`: a sequence that has emitted one token, in a plain round of its mode."""

    def sequence(*, mode: str = "auto", gain: float = 0.0, **options: Any) -> Sequence:
        given = {"mode": mode, "block_length": 8, "seed": 0, "max_new_tokens": 50} | options
        events: list[Event] = []
        params = GenerationParams(**given)
        seq = Sequence(REPETITIVE, params, mask_token_id=9, on_event=events.append)
        seq.length = len(REPETITIVE)
        seq.emit([1])
        events.clear()
        seq.events_seen = events  # type: ignore[attr-defined]
        seq.num_cells = 200
        seq.setting = Setting("ar", 8, min_gain=gain)
        return seq

    return sequence


def first_step(seq: Sequence) -> tuple[str, int]:
    step = next(autoregressive(seq))
    return step.kind, len(step.token_ids)


def test_what_repeats_is_checked(make: Make) -> None:
    """Prevents: a plain round that knows what comes and asks for one token."""
    assert first_step(make()) == ("verify", 8)


def test_only_in_auto(make: Make) -> None:
    """Prevents: `ar` that feeds more than one token, in a sequence made for something else."""
    for options in ({"mode": "ar"}, {"mode": "auto", "lookup": False}):
        assert first_step(make(**options)) == ("decode", 1)
    changed = make(mode="linear", lookup=True)
    changed.mode = "ar"
    assert first_step(changed) == ("decode", 1)


@pytest.mark.parametrize("options", [{"gain": 0.95}, {"draft_cutoff": 0.95}])
def test_what_is_not_worth_it_is_not_even_shown(make: Make, options: dict[str, Any]) -> None:
    """Prevents: a verify step of one token, or a draft on the screen that nobody checks."""
    seq = make(**options)
    assert first_step(seq) == ("decode", 1)
    assert seq.events_seen == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(("left", "fed"), [(1, 1), (2, 2), (3, 3)])
def test_no_more_is_fed_than_may_be_emitted(make: Make, left: int, fed: int) -> None:
    """Prevents: tokens verified that can never be shown."""
    assert first_step(make(max_new_tokens=1 + left))[1] == fed


def test_the_end_of_a_long_text_is_looked_at() -> None:
    """Prevents: seconds spent on the first round behind a long prompt."""
    text = [7, 8, 9, *range(10, 10 + MOST_INDEXED), 7, 8]
    assert Lookup().guess(text, [], most=2) is None
    guess = Lookup().guess([*text[3:], 8, 9, 1, 2, 3, 8], [9], most=2)
    assert guess is not None
    assert guess.token_ids[0] == 1


LAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"repetition_penalty": 1.3, "temperature": 0.5},
    {"min_tokens": 9, "stop": ["q"]},
    {"logprobs": 2},
    {"regex": "(ab|cd)*"},
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_text_is_that_of_ar(
    tiny_model: Callable[..., Any], byte_tokenizer: Any, law: dict[str, Any]
) -> None:
    """Prevents: rules that see the wrong prefix where several tokens are checked at once."""
    lm = TriModeLM(tiny_model(torch.float64, initializer_range=0.3), byte_tokenizer)
    lm.__dict__["planner"] = Plain()
    for seed in range(4):
        options = {"max_new_tokens": 40, "seed": seed, **law}
        expected = lm.generate("abcdabcdabcdab", mode="ar", **options)
        found = lm.generate("abcdabcdabcdab", mode="auto", **options)
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        for one, other in zip(found.logprobs or [], expected.logprobs or [], strict=True):
            assert one.logprob == pytest.approx(other.logprob)


class Plain:
    """Picks `ar` for every round."""

    def choose(self, seq: Sequence) -> Setting:
        return Setting("ar", seq.params.block_length)

    def note_forward(self, fed: Any, num_tokens: int, *, drafts: bool) -> None:
        pass

    def note_seconds(self, seconds: float) -> None:
        pass
