"""Healing over HTTP: text, stream, log-probabilities, events and usage tell of what is new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import trimode
from tests.serving.conftest import WAIT_S, Served, serving
from trimode.runtime import TriModeLM

METHOD = "class A:\n    def __init__(self):\n        self.x = 1\n"
PROMPTS = [METHOD, "import nu", "for i in range(10):\n    pr", "s = '😀 caf", "x", ""]


@pytest.fixture(scope="module")
def lm() -> TriModeLM:
    return trimode.load("pocket")


@pytest.fixture(scope="module")
def server(lm: TriModeLM) -> Iterator[Served]:
    with serving(lm, name="pocket", num_rows=4, context_len=256) as running:
        yield running


def ask(server: Served, prompt: str, **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 10, "temperature": 0, **fields}
    response = server.post("completions", body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(server: Served, prompt: str, **fields: Any) -> list[Any]:
    body = {"prompt": prompt, "max_tokens": 10, "temperature": 0, "stream": True, **fields}
    found = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=WAIT_S) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
    return found


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion"])
def test_text_and_usage(server: Served, lm: TriModeLM, prompt: str, mode: str) -> None:
    """Prevents: a server that heals otherwise than the library, or counts what was typed."""
    wanted = lm.generate(prompt, mode=mode, max_new_tokens=10)
    answer = ask(server, prompt, mode=mode)
    assert answer["choices"][0]["text"] == wanted.text
    assert answer["usage"]["prompt_tokens"] == len(lm.encode(prompt))
    assert answer["usage"]["completion_tokens"] == wanted.stats.new_tokens
    assert "warnings" not in answer["usage"]["trimode"]
    streamed = chunks(server, prompt, mode=mode)
    assert "".join(c["choices"][0]["text"] for c in streamed if c["choices"]) == wanted.text
    plain = ask(server, prompt, mode=mode, heal=False)
    assert plain["choices"][0]["text"] == lm.generate(
        prompt, mode=mode, max_new_tokens=10, heal=False
    ).text  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logprobs_and_events_join_to_the_text(server: Served, prompt: str) -> None:
    """Prevents: a first token that says again what the prompt said."""
    answer = ask(server, prompt, logprobs=2)
    text, logprobs = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == text
    assert len(logprobs["tokens"]) == answer["usage"]["completion_tokens"]
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[start:].startswith(token)
    for mode in ("linear", "branching", "diffusion"):
        streamed = chunks(server, prompt, mode=mode, events=True)
        events = [chunk["trimode_event"] for chunk in streamed if "trimode_event" in chunk]
        emitted = [event for event in events if event["kind"] == "emit"]
        text = "".join(c["choices"][0]["text"] for c in streamed if c["choices"])
        assert "".join(part for event in emitted for part in event["texts"]) == text
        assert emitted[0]["position"] == 0
        assert all(event["position"] >= -1 for event in events)


def test_control_tokens_of_a_prompt(server: Served, lm: TriModeLM) -> None:
    """Prevents: an editor's template read as text without a word."""
    prompt = "<|im_start|>user\nhi<|im_end|>"
    plain = ask(server, prompt)["usage"]
    assert "parse_special" in plain["trimode"]["warnings"][0]
    parsed = ask(server, prompt, parse_special=True)["usage"]
    assert "warnings" not in parsed["trimode"]
    assert parsed["prompt_tokens"] < plain["prompt_tokens"]
    last = chunks(server, prompt, stream_options={"include_usage": True})[-1]
    assert last["usage"]["trimode"]["warnings"] == plain["trimode"]["warnings"]


def test_at_the_contexts_end(server: Served, lm: TriModeLM) -> None:
    """Prevents: a prompt that fits refused, since healing might make it longer."""
    prompt = "x = 1\n" * 48 + "import nu"
    num_tokens = len(lm.encode(prompt))
    room = 256 - num_tokens
    assert ask(server, prompt, max_tokens=room, ignore_eos=True)["usage"]["total_tokens"] == 256
    response = server.post("completions", {"prompt": prompt, "max_tokens": room + 1})
    assert response.status_code == 400
    assert f"prompt of {num_tokens} tokens" in response.json()["error"]["message"]


def test_gaps_and_messages_that_are_not_healed(lm: TriModeLM, server: Served) -> None:
    """Prevents: `heal` refused, or taken and not used, beside a gap or a message that goes on."""
    text = "import nu<FILL>\n    return x\n"
    answers = []
    for heal in (True, False):
        body = {"text": text, "lengths": [2, 4], "seed": 0, "heal": heal}
        response = server.post("infill", body)
        assert response.status_code == 200, response.text
        answers.append(response.json()["text"])
        assert answers[-1] == lm.infill(text, lengths=[2, 4], seed=0, heal=heal).text
    assert answers[0] != answers[1]
    refused = server.post("infill", {"text": text, "heal": 1})
    assert refused.json()["error"]["message"] == "heal is 1; allowed: true or false"
    chats = trimode.load("pocket", lora="instruct_lora")
    ask = [{"role": "user", "content": "Write a function: Add two numbers."}]
    with serving(chats, name="pocket", num_rows=2, context_len=256) as running:
        for begun in ("def ad", "import nu"):
            messages = [*ask, {"role": "assistant", "content": begun}]
            found = []
            for heal in (True, False):
                options = {"temperature": 0, "heal": heal}
                body = {"messages": messages, "max_tokens": 8, **options}
                response = running.post("chat/completions", body)
                assert response.status_code == 200, response.text
                found.append(response.json()["choices"][0]["message"]["content"])
                wanted = chats.chat(messages, max_new_tokens=8, **options)
                assert found[-1] == wanted.text
                assert bool(wanted.healed_bytes) is heal
            assert found[0] != found[1]
