"""A prompt sent back: `echo`, with and without log-probabilities, whole and in streams."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.conftest import BOS, EOS
from tests.serving.conftest import WAIT_S, Served
from trimode.runtime import TriModeLM

MODES = ("ar", "diffusion", "linear", "branching", "quadratic")
IDS = [BOS, *b"def f(x):"]
ASK = {"temperature": 0, "ignore_eos": True}


def choice_of(response: httpx.Response) -> dict[str, Any]:
    """The only one."""
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


def chunks_of(served: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stream has."""
    found = []
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json={**body, "stream": True}, timeout=WAIT_S
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
    return found


@pytest.mark.parametrize("prompt", [IDS, "def f(x):"], ids=["ids", "text"])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_prompts_tokens_come_before_the_new_ones(
    served: Served, tiny_lm: TriModeLM, prompt: Any, number: int
) -> None:
    """Prevents: a shift, a doubled or missing token, offsets of another text, and a likeliest
    token whose two numbers differ."""
    body = {"prompt": prompt, "max_tokens": 3, "logprobs": number, "echo": True, **ASK}
    options = {"max_new_tokens": 3, "logprobs": number, "ignore_eos": True}
    wanted = tiny_lm.generate(prompt, prompt_logprobs=number, **options)
    assert wanted.prompt_logprobs is not None
    assert wanted.logprobs is not None
    for _ in range(2):  # the second time the prompt lies in a row
        response = served.post("completions", body)
        choice = choice_of(response)
        assert choice["text"] == "def f(x):" + wanted.text
        found = choice["logprobs"]
        num_prompt, num_new = len(wanted.prompt_ids), 3
        assert {len(column) for column in found.values()} == {num_prompt + num_new}
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        all_scores = [*wanted.prompt_logprobs[1:], *wanted.logprobs]
        assert found["token_logprobs"][1:] == pytest.approx(
            [one.logprob for one in all_scores if one is not None]
        )
        names = ["<|bos|>"] * (prompt is IDS) + list("def f(x):")
        assert found["tokens"][:num_prompt] == names
        offsets = [0] * (prompt is IDS) + list(range(10))
        assert found["text_offset"][: num_prompt + 1] == offsets
        for token, own, top in zip(
            found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True
        ):
            assert len(top) == number
            assert token not in top or top[token] == own
            assert all(own <= best for best in top.values()) or token in top
        usage = response.json()["usage"]
        assert usage["prompt_tokens"] == num_prompt
        assert usage["completion_tokens"] == num_new
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_alone(served: Served, tiny_lm: TriModeLM, mode: str) -> None:
    """Prevents: a token that nobody asked for, or a mode that scores prompts in its own way."""
    body = {"prompt": IDS, "max_tokens": 0, "logprobs": 2, "echo": True, "mode": mode}
    response = served.post("completions", body)
    choice = choice_of(response)
    wanted = tiny_lm.generate(IDS, mode="ar", max_new_tokens=0, prompt_logprobs=2)
    assert wanted.prompt_logprobs is not None
    assert (choice["text"], choice["finish_reason"]) == ("def f(x):", "length")
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        [one.logprob for one in wanted.prompt_logprobs if one is not None]
    )
    assert response.json()["usage"]["completion_tokens"] == 0
    whole = {"prompt": [1] * 512, "max_tokens": 0, "logprobs": 0, "echo": True}
    assert len(choice_of(served.post("completions", whole))["logprobs"]["tokens"]) == 512
    plain = {"prompt": IDS, "max_tokens": 0, "echo": True, "mode": mode}
    choice = choice_of(served.post("completions", plain))
    assert (choice["text"], choice["logprobs"]) == ("def f(x):", None)


@pytest.mark.parametrize("mode", MODES)
def test_without_log_probabilities_it_is_the_text_in_front(served: Served, mode: str) -> None:
    """Prevents: another text than without `echo`, and offsets of a half."""
    body = {"prompt": "def f(x):\n  ", "max_tokens": 9, "mode": mode, **ASK}
    alone = choice_of(served.post("completions", body))
    echoed = choice_of(served.post("completions", {**body, "echo": True}))
    assert echoed == {**alone, "text": body["prompt"] + alone["text"]}


@pytest.mark.parametrize("number", [None, 1])
@pytest.mark.parametrize("num_new", [0, 1, 6])
def test_a_stream_begins_with_the_prompt(served: Served, number: int | None, num_new: int) -> None:
    """Prevents: a stream that joins to another text, or whose log-probabilities do."""
    body = {"prompt": IDS, "max_tokens": num_new, "echo": True, "logprobs": number, **ASK}
    whole = choice_of(served.post("completions", body))
    chunks = chunks_of(served, body)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["text"] == "def f(x):"
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    if number is None:
        assert all(choice["logprobs"] is None for choice in choices)
        return
    assert len(choices[0]["logprobs"]["tokens"]) == len(IDS)
    for name, column in whole["logprobs"].items():
        parts = [choice["logprobs"][name] for choice in choices if choice["logprobs"]]
        joined = [one for part in parts for one in part]
        assert joined == column


def test_several_prompts_and_choices(served: Served) -> None:
    """Prevents: the prompt of one choice before the text of another."""
    prompts = [[BOS, *text.encode()] for text in ("one", "twothree", "4")]
    body = {"prompt": prompts, "max_tokens": 2, "n": 2, "echo": True, "logprobs": 1, **ASK}
    choices = served.post("completions", body).json()["choices"]
    assert [choice["text"][:3] for choice in choices[:4]] == ["one", "one", "two", "two"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [6, 6, 11, 11, 4, 4]


def test_half_a_character_at_the_end_of_a_prompt(served: Served) -> None:
    """Prevents: U+FFFD in the text where the new tokens complete the character."""
    body = {"prompt": [BOS, *b"a\xc3"], "max_tokens": 2, "echo": True, "logprobs": 0}
    body |= {"logit_bias": {"169": 100.0}, "temperature": 0}
    choice = choice_of(served.post("completions", body))
    assert choice["text"].startswith("aé")
    assert choice["logprobs"]["tokens"][:4] == ["<|bos|>", "a", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"][:4] == [0, 0, 1, 1]


def test_an_end_of_text_is_a_token_like_others(served: Served) -> None:
    """Prevents: an answer that lacks the last token, which readers of log-likelihoods cut off."""
    body = {"prompt": IDS, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    body["logit_bias"] = {str(EOS): 100.0}
    choice = choice_of(served.post("completions", body))
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"][-1] == "<|eos|>"
    assert len(choice["logprobs"]["tokens"]) == len(IDS) + 1


def test_a_tokenizer_that_puts_a_space_before_a_text(pieces: Served) -> None:
    """Prevents: tokens that do not join to the text, and offsets that are one off."""
    for prompt in ("the cat", "at é the"):
        body = {"prompt": prompt, "max_tokens": 0, "logprobs": 2, "echo": True}
        choice = choice_of(pieces.post("completions", body))
        found = choice["logprobs"]
        assert choice["text"] == prompt
        assert found["tokens"][0] == "<s>"
        names = [name for name in found["tokens"][1:] if not name.startswith("bytes:")]
        assert "".join(names) == prompt.replace("é", "")
        for name, start in zip(found["tokens"][1:], found["text_offset"][1:], strict=True):
            assert name.startswith("bytes:") or prompt[start:].startswith(name)


def test_halves_of_characters_do_not_merge(pieces: Served, served: Served) -> None:
    """Prevents: two tokens that are halves of different characters under one name, so that one of
    two log-probabilities is lost."""
    for server, first in ((served, 0xC0), (pieces, 3 + 0xC0)):
        bias = {str(first + i): 1000.0 - 90 * i for i in range(8)}
        body = {"prompt": "ab", "max_tokens": 1, "logprobs": 20, "temperature": 0}
        found = choice_of(server.post("completions", {**body, "logit_bias": bias}))["logprobs"]
        (top,) = found["top_logprobs"]
        assert len(top) == 20
        assert found["tokens"] == ["bytes:\\xc0"]
        ask = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "temperature": 0}
        ask |= {"logprobs": True, "top_logprobs": 20, "logit_bias": bias}
        if server is served:
            answer = choice_of(server.post("chat/completions", ask))
            (one,) = answer["logprobs"]["content"]
            assert one["bytes"] == [0xC0]
            assert len({tuple(other["bytes"]) for other in one["top_logprobs"]}) == 20


def test_a_token_that_cannot_be_is_a_number(served: Served) -> None:
    """Prevents: an infinity in JSON, which is none."""
    lm = served.backend._lm
    banned = set(lm.model.config.banned_token_ids)
    allowed = [i for i in banned if i < lm.model.config.num_real_tokens]
    for token_id in allowed:
        body = {"prompt": [BOS, token_id, 65], "max_tokens": 0, "logprobs": 1, "echo": True}
        response = served.post("completions", body)
        assert choice_of(response)["logprobs"]["token_logprobs"][1] == -9999.0


def test_what_lay_in_a_row_is_told(served: Served) -> None:
    """Prevents: a count of cached tokens that is always 0, or that is missing in streams."""
    prompt = "a prompt that nobody else has: " * 3
    body = {"prompt": prompt, "max_tokens": 2, "stream_options": {"include_usage": True}, **ASK}
    seen = [chunks_of(served, body)[-1]["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert seen == [{"cached_tokens": 0}, {"cached_tokens": len(prompt) - 1}]
    ask = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 2, **ASK}
    for least in (0, len(prompt)):
        usage = served.post("chat/completions", ask).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= least
        assert usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
