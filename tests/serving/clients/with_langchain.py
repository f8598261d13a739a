"""LangChain's `ChatOpenAI` and `OpenAI`."""

from __future__ import annotations

from checks import CALL, TOOLS_URL, URL, Checks
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

checks = Checks("langchain-openai")
SAID = [SystemMessage("Be brief."), HumanMessage("Write a function: Add two numbers.")]
common = {"api_key": "none", "max_retries": 0}
chat = ChatOpenAI(base_url=f"{URL}/v1", model="pocket", max_tokens=32, **common)
calling = ChatOpenAI(
    base_url=f"{TOOLS_URL}/v1", model="tools", max_tokens=60, extra_body={"regex": CALL}, **common
)


class Sum(BaseModel):
    """A shape to answer in."""

    a: int
    is_odd: bool


@tool
def look(at: str) -> str:
    """Look at something."""
    return f"{at} is blue"


with checks("invoke") as show:
    answer = chat.invoke(SAID)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    show(answer.content)

with checks("stream") as show:
    pieces = list(chat.stream(SAID))
    assert len(pieces) > 2
    show("".join(piece.content for piece in pieces))

with checks("stream, with usage") as show:
    whole = None
    for piece in chat.stream(SAID, stream_usage=True):
        whole = piece if whole is None else whole + piece
    assert whole.usage_metadata["input_tokens"] > 0
    show(whole.usage_metadata)

with checks("batch"):
    assert len(chat.batch([SAID, SAID])) == 2

with checks("logprobs") as show:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(SAID)
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == answer.usage_metadata["output_tokens"]
    show(content[0])

with checks("bind_tools, invoke and answer back") as show:
    first = calling.bind_tools([look]).invoke(SAID)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("look", {"at": "sky"})
    back = ToolMessage(look.invoke(call["args"]), tool_call_id=call["id"])
    plain = ChatOpenAI(base_url=f"{TOOLS_URL}/v1", model="tools", max_tokens=4, **common)
    show(plain.bind_tools([look]).invoke([*SAID, first, back]).content)

with checks("bind_tools, stream"):
    whole = None
    for piece in calling.bind_tools([look]).stream(SAID):
        whole = piece if whole is None else whole + piece
    assert whole.tool_calls[0]["args"] == {"at": "sky"}

with checks("with_structured_output (json_schema)") as show:
    greedy = ChatOpenAI(
        base_url=f"{URL}/v1", model="pocket", max_tokens=60, temperature=0, **common
    )
    answer = greedy.with_structured_output(Sum).invoke(SAID)
    assert isinstance(answer, Sum)
    show(answer)

with checks("with_structured_output (json_schema, strict)"):
    assert isinstance(greedy.with_structured_output(Sum, strict=True).invoke(SAID), Sum)

with checks("a prompt beyond the context: ContextOverflowError") as show:
    try:
        chat.invoke("x y " * 30_000)
    except ContextOverflowError as error:
        show(error)
    else:
        raise AssertionError("it was taken")

with checks("with_structured_output (function_calling)") as show:
    forced = ChatOpenAI(
        base_url=f"{TOOLS_URL}/v1", model="tools", max_tokens=60, temperature=0, **common
    )
    answer = forced.with_structured_output(Sum, method="function_calling").invoke(SAID)
    assert isinstance(answer, Sum)
    show(answer)

with checks("OpenAI (completions), invoke and stream") as show:
    completing = OpenAI(base_url=f"{URL}/v1", model="pocket", max_tokens=12, **common)
    assert completing.invoke("def add(a, b):\n")
    show("".join(completing.stream("def add(a, b):\n")))
