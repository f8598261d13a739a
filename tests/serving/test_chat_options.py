"""Chats over HTTP: answers that are continued, tools and their calls, variables of the template."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.chat_templates import HERMES, SPECIALS, THINKING
from tests.conftest import NUM_TOKENS
from tests.serving.conftest import Served, serving
from trimode.runtime import TriModeLM

ASK: dict[str, Any] = {"role": "user", "content": "x"}
BEGUN: dict[str, Any] = {"role": "assistant", "content": "so it"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "parameters": {"default": None}},
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
TEXT = "I look. "
OPTIONS: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def lm(tiny_model: Any, byte_tokenizer: Any) -> TriModeLM:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = HERMES
    return TriModeLM(tiny_model(vocab_size=NUM_TOKENS + len(SPECIALS)), tokenizer)


@pytest.fixture(scope="module")
def served_tools(lm: TriModeLM) -> Iterator[Served]:
    with serving(lm) as running:
        yield running


@pytest.fixture(scope="module")
def client(served_tools: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served_tools.url}/v1", api_key="x", max_retries=0) as one:
        yield one


def test_an_answer_goes_on(client: openai.OpenAI, lm: TriModeLM) -> None:
    """Prevents: a prefill that HTTP closes, or sends back as if it were new."""
    options = {"temperature": 0.0, "max_new_tokens": 9, "mode": "ar"}
    wanted = lm.chat([ASK, BEGUN], **options)
    assert wanted.prompt_ids[-5:] == list(b"so it")
    for more in ({}, {"continue_final_message": True}, {"add_generation_prompt": False}):
        answer = client.chat.completions.create(
            messages=[ASK, BEGUN], **OPTIONS | {"max_tokens": 9}, extra_body={"mode": "ar", **more}
        )
        assert answer.choices[0].message.content == wanted.text
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(wanted.prompt_ids)
    opened = lm.chat([ASK, BEGUN], continue_final_message=False, **options)
    assert opened.prompt_ids != wanted.prompt_ids


def test_calls_are_parsed(client: openai.OpenAI, lm: TriModeLM) -> None:
    """Prevents: a call left in the text, and one that a client cannot read or send back."""
    ask: dict[str, Any] = {"messages": [ASK], "tools": [TOOL], **OPTIONS}
    for before in ("", TEXT):
        extra = {"regex": re.escape(before + CALL)}
        answer = client.chat.completions.create(**ask, extra_body=extra)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == (before or None)
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "sky"})
        generation = lm.chat([ASK], tools=[TOOL], max_new_tokens=200, temperature=0.0, **extra)
        assert generation.text == before + CALL
        content, (own,) = lm.tool_calls(generation, [TOOL])
        assert (content, own.name, own.arguments) == (before, "look", call.function.arguments)
    said = {"role": "tool", "tool_call_id": call.id, "content": "blue"}
    again = client.chat.completions.create(
        messages=[ASK, choice.message, said], tools=[TOOL], **OPTIONS | {"max_tokens": 4}
    )
    assert again.choices[0].finish_reason == "length"
    own_messages = [ASK, choice.message.model_dump(exclude_none=True), said]
    assert again.usage is not None
    wanted = lm.answering(own_messages, {"tools": [TOOL]})["prompt"]
    assert again.usage.prompt_tokens == wanted.num_tokens


@pytest.mark.parametrize("before", ["", TEXT])
def test_calls_in_a_stream(client: openai.OpenAI, before: str) -> None:
    """Prevents: half a call streamed as text; a stream whose last reason is another."""
    stream = client.chat.completions.create(
        messages=[ASK],
        tools=[TOOL],
        stream=True,
        n=2,
        **OPTIONS,
        extra_body={"regex": re.escape(before + CALL), "mode": "ar"},
    )
    texts, calls, reasons = ["", ""], [0, 0], ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            assert not calls[choice.index] or not choice.delta.content
            texts[choice.index] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                assert call.index == calls[choice.index]
                calls[choice.index] += 1
                assert call.function is not None
                assert call.function.name == "look"
                assert json.loads(call.function.arguments or "") == {"at": "sky"}
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert (texts, calls, reasons) == ([before] * 2, [1, 1], ["tool_calls"] * 2)


LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "strict": True,
        "parameters": {
            "$defs": {"Place": {"enum": ["sky", "sea"]}},
            "properties": {"at": {"$ref": "#/$defs/Place"}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("mode", ["ar", "linear", "branching"])
@pytest.mark.parametrize(
    "tool_choice", ["required", {"type": "function", "function": {"name": "look"}}]
)
def test_a_call_that_is_required(
    client: openai.OpenAI, lm: TriModeLM, tool_choice: Any, mode: str
) -> None:
    """Prevents: text where a call was required, and arguments beside their schema."""
    tools = [LOOK] if tool_choice == "required" else [TOOL | {"function": {"name": "go"}}, LOOK]
    ask: dict[str, Any] = {"messages": [ASK], "tools": tools, "tool_choice": tool_choice, **OPTIONS}
    ask["extra_body"] = {"mode": mode}
    answer = client.chat.completions.create(**ask)
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["at"] in ("sky", "sea")
    shown = [{**one, "function": {**one["function"]}} for one in tools]
    shown[-1]["function"].pop("strict")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == lm.answering([ASK], {"tools": shown})["prompt"].num_tokens
    texts, calls, reasons = [], [], []
    for chunk in client.chat.completions.create(**ask, stream=True):
        for one in chunk.choices:
            texts.append(one.delta.content or "")
            calls += one.delta.tool_calls or []
            reasons.append(one.finish_reason)
    assert ("".join(texts), reasons[-1]) == ("", "tool_calls")
    assert [one.function.arguments for one in calls] == [call.function.arguments]


def test_a_required_call_that_was_cut_is_text(client: openai.OpenAI) -> None:
    """Prevents: half of the arguments handed over as if they were all; tokens that nobody sees."""
    ask: dict[str, Any] = {"messages": [ASK], "tools": [LOOK], **OPTIONS | {"max_tokens": 4}}
    choice = client.chat.completions.create(**ask, tool_choice="required").choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert len(choice.message.content or "") == 4
    stream = client.chat.completions.create(**ask, tool_choice="required", stream=True)
    pieces = [one.delta.content or "" for chunk in stream for one in chunk.choices]
    assert "".join(pieces) == choice.message.content


def test_what_a_required_call_needs(client: openai.OpenAI) -> None:
    """Prevents: a choice that is dropped in silence."""
    ask: dict[str, Any] = {"messages": [ASK], **OPTIONS}
    named = {"type": "function", "function": {"name": "go"}}
    plain = {**LOOK, "function": {"name": "other"}}
    for more, message in (
        ({"tools": [LOOK, plain], "tool_choice": "required"}, "beside 2 tools"),
        ({"tools": [LOOK], "tool_choice": named}, "name is 'go'; allowed: look"),
        ({"tools": [LOOK]}, "tools.0.function.strict is true"),
        (
            {
                **{"tools": [LOOK], "tool_choice": "required"},
                "response_format": {"type": "json_object"},
            },
            "response_format is given beside a call",
        ),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(**ask, **more)


def test_what_is_asked_of_tools(client: openai.OpenAI) -> None:
    """Prevents: calls where none, or one, is wanted; a call that was cut taken for a whole one."""
    ask: dict[str, Any] = {"messages": [ASK], "tools": [TOOL], **OPTIONS}
    one = client.chat.completions.create(
        **ask, tool_choice="none", extra_body={"regex": re.escape(CALL)}
    ).choices[0]
    assert (one.message.content, one.message.tool_calls, one.finish_reason) == (CALL, None, "stop")
    two = {"regex": re.escape(f"{CALL}\n{CALL}")}
    calls = client.chat.completions.create(**ask, extra_body=two).choices[0].message.tool_calls
    assert calls is not None
    assert len(calls) == 2
    assert calls[0].id != calls[1].id
    first = client.chat.completions.create(**ask, parallel_tool_calls=False, extra_body=two)
    assert len(first.choices[0].message.tool_calls or ()) == 1
    cut = client.chat.completions.create(**ask | {"max_tokens": 30}, extra_body=two).choices[0]
    assert (cut.message.content, cut.finish_reason) == (CALL[:30], "length")


def test_tools_are_as_they_were_sent(lm: TriModeLM, served_tools: Served) -> None:
    """Prevents: a null inside of a tool's schema lost on the way to the template."""
    tool = {**TOOL, "function": {**TOOL["function"], "description": None, "strict": False}}
    body = {"messages": [ASK], "tools": [tool], "max_tokens": 1}
    usage = served_tools.post("chat/completions", body).json()["usage"]
    tool["function"] = {**TOOL["function"], "strict": False}
    prompt = lm.answering([ASK], {"tools": [tool]})["prompt"]
    assert usage["prompt_tokens"] == prompt.num_tokens


def test_variables_of_the_template(lm: TriModeLM) -> None:
    """Prevents: a switch of thinking that is taken and not used."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    assert tokenizer is not None
    tokenizer.chat_template = THINKING
    body = {"messages": [ASK], "max_tokens": 1}
    with serving(TriModeLM(lm.model, tokenizer)) as served:
        found = [
            served.post("chat/completions", body | more).json()["usage"]["prompt_tokens"]
            for more in (
                {},
                {"enable_thinking": False},
                {"chat_template_kwargs": {"enable_thinking": False}},
            )
        ]
    assert found[0] < found[1] == found[2]


def test_what_other_clients_leave_in_messages_and_tools(client: openai.OpenAI) -> None:
    """Prevents: a client that sends an empty list of calls, or marks tools, turned away."""
    plain: dict[str, Any] = {"max_tokens": 3, "extra_body": {"tools": [TOOL]}}
    marked = {"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]}
    said: dict[str, Any] = {"role": "assistant", "content": "yes"}
    wanted = client.chat.completions.create(messages=[ASK, said, ASK], **OPTIONS | plain)
    messages: Any = [ASK, {**said, "tool_calls": []}, ASK]
    answer = client.chat.completions.create(
        messages=messages, **OPTIONS | {**plain, "extra_body": marked}
    )
    assert answer.choices[0].message == wanted.choices[0].message
    assert answer.usage is not None
    assert wanted.usage is not None
    assert answer.usage.prompt_tokens == wanted.usage.prompt_tokens
    empty: Any = [{"role": "assistant", "content": None, "tool_calls": []}, ASK]
    with pytest.raises(openai.BadRequestError, match="content is null or missing"):
        client.chat.completions.create(messages=empty, **OPTIONS)
