"""Texts that may not end yet: tokens and strings that would end them, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import EOS
from trimode.runtime import Generation, TriModeLM

A, C = ord("a"), ord("c")
EAGER = {EOS: 9.0, C: 8.0}
SPECULATION: list[dict[str, Any]] = [
    {"mode": "linear", "block_length": 6},
    {"mode": "linear", "block_length": 4, "threshold": 0.3},
    {"mode": "branching", "block_length": 4, "branches": 5},
    {"mode": "quadratic", "block_length": 3},
    {"mode": "branching", "skip_masks": 2, "branches": 4, "block_length": 4, "lookup": True},
]
ALL_MODES = [{"mode": "ar"}, *SPECULATION, {"mode": "diffusion", "block_length": 4}]
MANY = list(range(24))
PROMPTS = ["ab", "x = ", "{", "c"]
SEEDS = [0, 1, 2**63, 5]


@pytest.fixture(scope="module")
def lm(
    tiny_model: Callable[..., Any], byte_tokenizer: Any, random_adapter: Callable[..., Any]
) -> TriModeLM:
    model = tiny_model(torch.float64, initializer_range=0.2)
    return TriModeLM(model, byte_tokenizer, adapter=random_adapter(model, strength=2.0))


def generate(lm: TriModeLM, prompts: Any = PROMPTS, **options: Any) -> list[Generation]:
    found = lm.generate(prompts, **({"max_new_tokens": 20, "seed": SEEDS} | options))
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("options", ALL_MODES, ids=str)
@pytest.mark.parametrize("min_tokens", [0, 1, 5, 19, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_ends_the_text_before(
    lm: TriModeLM, options: dict[str, Any], min_tokens: int, temperature: float
) -> None:
    """Prevents: a ban that is off by one, that forgets the stop token ids or the drafts, that a
    bias lifts, or that goes on for ever."""
    law = {"temperature": temperature, "logit_bias": EAGER, "stop_token_ids": [C]}
    ends = set()
    for found in generate(lm, min_tokens=min_tokens, **options, **law):
        at = [i for i, token_id in enumerate(found.token_ids) if token_id in (EOS, C)]
        if min_tokens < 20:
            assert at == [len(found.token_ids) - 1]
            assert at[0] >= min_tokens
            assert found.finish_reason == "stop"
            ends.add(at[0])
        else:
            assert (at, len(found.token_ids), found.finish_reason) == ([], 20, "length")
    assert min_tokens == 20 or min_tokens in ends


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 1.2, "min_p": 0.02}])
@pytest.mark.parametrize("min_tokens", [3, 7, 12])
def test_speculation_writes_what_ar_writes(
    lm: TriModeLM, law: dict[str, Any], min_tokens: int
) -> None:
    """Prevents: a ban in the verifier by the length of the committed text, the drafts left out."""
    more = {"logit_bias": {EOS: 6.0, C: 5.0}, "stop_token_ids": [C], "stop": ["a", "e"]}
    expected = generate(lm, PROMPTS * 6, mode="ar", min_tokens=min_tokens, **law, **more, seed=MANY)
    assert {one.finish_reason for one in expected} >= {"stop"}
    for options in SPECULATION:
        found = generate(
            lm, PROMPTS * 6, min_tokens=min_tokens, **options, **law, **more, seed=MANY
        )
        assert [one.token_ids for one in found] == [one.token_ids for one in expected], options
        assert [one.text for one in found] == [one.text for one in expected]


def test_with_ignore_eos_eos_is_a_token_as_any(lm: TriModeLM) -> None:
    """Prevents: a ban of what ends nothing."""
    [found] = generate(
        lm, "x", mode="ar", seed=0, min_tokens=9, ignore_eos=True, logit_bias={EOS: 90.0}
    )
    assert found.token_ids == [EOS] * 20


def written(lm: TriModeLM, text: str, **options: Any) -> Generation:
    """A text that the model has to begin with, in as many tokens as it has bytes."""
    pytest.importorskip("llguidance")
    regex = "".join(f"[{char}]" for char in text) + "[z]*"
    [found] = generate(lm, "x", seed=3, regex=regex, **options)
    return found


@pytest.mark.parametrize("mode", ["ar", "linear", "branching", "quadratic"])
@pytest.mark.parametrize(
    ("min_tokens", "stop", "expected"),
    [
        (0, ["aa"], ""),
        (1, ["aa"], ""),  # the second token completes it
        (2, ["aa"], "a"),
        (3, ["aa"], "aaab"),
        (3, ["ab", "ba"], "aa"),
        (4, ["ab", "aa"], "aaab"),
        (0, ["é"], "aaabaa"),
        (6, ["é"], "aaabaa"),
        (7, ["é"], "aaabaa"),  # of whose two bytes the second comes later
        (8, ["é", "y"], "aaabaaé"),
    ],
)
def test_stop_strings_count_where_a_later_token_completes_them(
    lm: TriModeLM, mode: str, min_tokens: int, stop: list[str], expected: str
) -> None:
    """Prevents: a string that ends the text too early, one that is found later where it came too
    early, or one lost that only began too early."""
    options = {"mode": mode, "stop": stop, "min_tokens": min_tokens}
    found = written(lm, "aaabaaéyz", **options)
    assert (found.text, found.finish_reason) == (expected, "stop")
    stream = lm.stream(
        "x", max_new_tokens=20, seed=3, regex="[a][a][a][b][a][a][é][y][z]+", **options
    )
    assert "".join(stream) == expected


def test_a_string_that_does_not_count_holds_no_text_back(lm: TriModeLM) -> None:
    """Prevents: a stream that waits for the end behind a stop string which came too early."""
    regex = "[a][b][c]{16}"
    stream = lm.stream(
        "x", mode="ar", max_new_tokens=18, seed=0, regex=regex, stop=["ab", "d"], min_tokens=4
    )
    assert list(stream)[:5] == ["ab", "c", "c", "c", "c"]


@pytest.mark.parametrize("mode", ["ar", "linear", "branching", "quadratic"])
def test_a_grammar_that_is_over_ends_the_text(lm: TriModeLM, mode: str) -> None:
    """Prevents: a text that is aborted, or goes on against its grammar, since EOS is banned where
    nothing else is left."""
    pytest.importorskip("llguidance")
    options = {"mode": mode, "logit_bias": {EOS: 50.0}, "min_tokens": 12}
    for over in generate(lm, regex="ab[cd]{2}", **options):
        assert (len(over.token_ids), over.token_ids[-1], over.finish_reason) == (5, EOS, "stop")
    for going_on in generate(lm, regex="ab[cd]*", **options):
        assert (len(going_on.token_ids), going_on.token_ids[-1]) == (13, EOS)


def test_an_end_of_thought_that_ends_the_text(lm: TriModeLM) -> None:
    """Prevents: an abort where two wishes meet in one token."""
    thinking = {"max_thinking_tokens": 3, "end_think_token_id": C, "stop_token_ids": [C]}
    for found in generate(lm, mode="linear", min_tokens=9, **thinking):
        assert (found.token_ids[3:], found.finish_reason) == ([C], "stop")
