"""What a chat request says of its conversation, as `TriModeLM.chat` takes it."""

from __future__ import annotations

from typing import Any

from trimode.serving.refusals import bad_request
from trimode.serving.schemas import (
    OURS_OF_CHAT,
    OURS_OF_TEMPLATE,
    ChatRequest,
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
    if request.tools:
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
    return options


def _plain(index: int, message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if content is None and message.tool_calls is None:
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
    if message.tool_calls is not None:
        calls = message.tool_calls
        plain["tool_calls"] = [call.model_dump(exclude={"index"}) for call in calls]
    return plain
