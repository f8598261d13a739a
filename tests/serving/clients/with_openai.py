"""The official Python package."""

from __future__ import annotations

import json

import openai
from checks import ASK, CALL, LOOK, TOOLS_URL, URL, Checks
from pydantic import BaseModel

checks = Checks("openai")
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
tools = openai.OpenAI(base_url=f"{TOOLS_URL}/v1", api_key="none", max_retries=0)


class Sum(BaseModel):
    """A shape to answer in."""

    a: int
    is_odd: bool


with checks("models") as show:
    show([client.models.retrieve(model.id).id for model in client.models.list()])

with checks("completion") as show:
    answer = client.completions.create(model="pocket", prompt="def add(a, b):\n", max_tokens=12)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    show(answer.choices[0].text)

with checks("completion, streamed, with usage") as show:
    stream = client.completions.create(
        model="pocket",
        prompt="def add(a, b):\n",
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    show("".join(choice.text for chunk in chunks for choice in chunk.choices))

with checks("chat") as show:
    chat = client.chat.completions.create(model="pocket", messages=ASK, max_tokens=32)
    assert chat.choices[0].finish_reason in ("stop", "length")
    show(chat.choices[0].message.content)

with checks("chat, `stream` helper"):
    with client.chat.completions.stream(
        model="pocket", messages=ASK, max_tokens=200, temperature=0, stop="\n"
    ) as events:
        kinds = [event.type for event in events]
        final = events.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content

with checks("chat, `parse` into a pydantic model") as show:
    parsed = client.chat.completions.parse(
        model="pocket", messages=ASK, response_format=Sum, max_tokens=60, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Sum)
    show(parsed.choices[0].message.parsed)

with checks("chat, logprobs") as show:
    chat = client.chat.completions.create(
        model="pocket", messages=ASK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    show(content[0])

with checks("chat, tools") as show:
    chat = tools.chat.completions.create(
        model="tools", messages=ASK, tools=[LOOK], max_tokens=60, extra_body={"regex": CALL}
    )
    (call,) = chat.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"at": "sky"}
    said = {"role": "tool", "tool_call_id": call.id, "content": "blue"}
    messages = [*ASK, chat.choices[0].message, said]
    assert tools.chat.completions.create(
        model="tools", messages=messages, tools=[LOOK], max_tokens=4
    ).choices
    show(call.function)

with checks("chat, `stream` helper, tools") as show:
    with tools.chat.completions.stream(
        model="tools", messages=ASK, tools=[LOOK], max_tokens=60, extra_body={"regex": CALL}
    ) as events:
        (call,) = events.get_final_completion().choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"at": "sky"}

with checks("a prompt beyond the context: BadRequestError, `context_length_exceeded`") as show:
    try:
        client.completions.create(model="pocket", prompt="x y " * 30_000)
    except openai.BadRequestError as error:
        found = error
    assert found.code == "context_length_exceeded"
    show(found)

with checks("another model: NotFoundError") as show:
    try:
        client.completions.create(model="gpt-4o", prompt="x")
    except openai.NotFoundError as error:
        show(error)
    else:
        raise AssertionError("it was taken")
