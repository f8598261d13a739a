"""What a chat request says of its conversation, as `TriModeLM.chat` takes it."""

from __future__ import annotations

from typing import Any

from trimode.serving.refusals import bad_request
from trimode.serving.schemas import (
    OURS_OF_CHAT,
    OURS_OF_TEMPLATE,
    ChatRequest,
    ChosenTool,
    Message,
    TokenizeRequest,
)


def messages_of(request: ChatRequest | TokenizeRequest) -> list[dict[str, Any]]:
    """Return the messages without what they leave open.

    Raises:
        Refusal: 400, naming the message.
    """
    return [_plain(i, message) for i, message in enumerate(request.messages or ())]


def chat_options(request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """Return the options of the template that a request gives."""
    names = OURS_OF_CHAT if isinstance(request, ChatRequest) else OURS_OF_TEMPLATE
    options = {name: value for name in names if (value := getattr(request, name)) is not None}
    tools = [
        tool.model_dump(exclude_none=True, exclude={"cache_control"})
        for tool in request.tools or ()
    ]
    if isinstance(request, TokenizeRequest):  # a required call is written by no template
        if options.get("tool_choice") not in (None, "none", "auto"):
            del options["tool_choice"]
    elif (number := _forced(request)) is not None:
        function = tools[number]["function"]
        function.pop("strict", None)
        del options["tool_choice"]
        options["forced_call"] = function["name"]
        options["json_schema"] = {"type": "object", **function.get("parameters", {})}
    for i, tool in enumerate(tools):
        if tool["function"].get("strict"):
            raise bad_request(
                f"tools.{i}.function.strict is true; allowed: false or null, unless tool_choice has"
                " it called",
                param="tools",
            )
    return {**options, "tools": tools} if tools else options


def _forced(request: ChatRequest) -> int | None:
    """Which of the tools must be called, if one must."""
    choice, tools = request.tool_choice, request.tools or []
    if choice in (None, "none", "auto"):
        return None
    names = [tool.function.name for tool in tools]
    if choice == "required":
        if len(names) != 1:
            raise bad_request(
                f'tool_choice is "required" beside {len(names)} tools; allowed: beside one tool, or'
                " the name of one",
                param="tool_choice",
            )
        wanted = names[0]
    else:
        assert isinstance(choice, ChosenTool)
        wanted = choice.function.name
    if wanted not in names:
        allowed = ", ".join(names) or "none, for there are no tools"
        raise bad_request(
            f"tool_choice.function.name is {wanted[:60]!r}; allowed: {allowed}", param="tool_choice"
        )
    kinds = ("json_schema", "regex", "grammar", "response_format")
    for name in kinds:
        given = getattr(request, name)
        if given is not None and getattr(given, "type", None) != "text":
            raise bad_request(
                f"{name} is given beside a call that is required; allowed: one of them", param=name
            )
    return names.index(wanted)


def _plain(index: int, message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if content is None and not message.tool_calls:
        raise bad_request(
            f"messages.{index}.content is null or missing; allowed: a string, or a list of text"
            " parts; null beside tool_calls",
            param="messages",
        )
    if role == "tool" and message.tool_call_id is None:
        raise bad_request(f"messages.{index}.tool_call_id is missing", param="messages")
    if content is not None and not isinstance(content, str):
        content = "".join(part.text for part in content)
    plain: dict[str, Any] = {"role": role, "content": content}
    plain |= {
        name: value
        for name in ("name", "tool_call_id")
        if (value := getattr(message, name)) is not None
    }
    if calls := message.tool_calls:
        plain["tool_calls"] = [call.model_dump(exclude={"index"}) for call in calls]
    return plain
