"""Messages, tools and template variables of a caller, checked, and as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimode.errors import RequestError

Messages = Sequence[Mapping[str, Any]]

_MAX_DEPTH = 100
"""Of lists and objects in one another; templates, and JSON, are read by recursion."""

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call.

    Attributes:
        id: Nine signs, which every template takes.
        name: Of the tool.
        arguments: A JSON object, as text.
    """

    id: str
    name: str
    arguments: str

    def as_message(self) -> dict[str, Any]:
        """Return the call as `tool_calls` of a message have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def checked_messages(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages, the arguments of their tool calls as objects.

    Raises:
        RequestError: A message is not valid.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RequestError(f"messages is a {type(messages).__name__}; allowed: a list of mappings")
    if not messages:
        raise RequestError("messages is []; there is nothing to answer")
    return [_message(message, f"message {i}") for i, message in enumerate(messages, start=1)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{name} is a {type(message).__name__}; allowed: a mapping")
    found = {key: value for key, value in message.items() if value is not None or key == "content"}
    if found.get("tool_calls") == []:
        del found["tool_calls"]
    role, content = found.get("role"), found.get("content")
    has_calls = role == "assistant" and "tool_calls" in found
    if role not in _ROLES or not (isinstance(content, str) or (content is None and has_calls)):
        raise RequestError(
            f"{name} has role {role!r} and content of type {type(content).__name__}; allowed:"
            f" {', '.join(_ROLES)}, and a string, or None beside tool_calls"
        )
    for key in ("name", "tool_call_id"):
        if not isinstance(found.get(key, ""), str):
            raise RequestError(f"{name} has {key} {found[key]!r}; allowed: a string")
    for key, allowed in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if key in found and role != allowed:
            raise RequestError(f"{name} has {key} and role {role!r}; allowed: role {allowed!r}")
    if has_calls:
        found["content"] = content
        found["tool_calls"] = _calls(found["tool_calls"], name)
    _check_plain(found, name)
    return found


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str) or not calls:
        raise RequestError(f"{name} has tool_calls {calls!r}; allowed: a list of at least one")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"{name} has a tool call without function.name; allowed:"
                ' {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, Mapping):
            raise RequestError(
                f"{name} calls {function['name']!r} with arguments"
                f" {function['arguments']!r:.60}; allowed: a JSON object, or a string of one"
            )
        function = {**function, "arguments": dict(arguments)}
        found.append({"type": "function", **call, "function": function})
    return found


def offered_tools(tools: Any, tool_choice: Any) -> list[dict[str, Any]] | None:
    """Return the tools that a model may call; None without any.

    Raises:
        RequestError: The tools are not in OpenAI's shape, or a call is required.
    """
    if tool_choice not in (None, "none", "auto"):
        raise RequestError(
            f"tool_choice is {tool_choice!r}, which is not supported; allowed: 'none' or 'auto'"
        )
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RequestError(f"tools is a {type(tools).__name__}; allowed: a list of mappings")
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"tool {number} of tools has no function.name; allowed:"
                ' {"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
        if function.get("strict"):
            raise RequestError(
                f"tool {number} of tools has strict {function['strict']!r}, which is not"
                " supported; allowed: False"
            )
    _check_plain(tools, "tools")
    return [dict(tool) for tool in tools] if tools and tool_choice != "none" else None


def template_variables(kwargs: Any, enable_thinking: Any) -> dict[str, Any]:
    """Return the variables that a caller gives to the template.

    Raises:
        RequestError: They are not named, or contradict one another.
    """
    if not isinstance(kwargs, Mapping | None) or not all(isinstance(k, str) for k in kwargs or ()):
        raise RequestError(
            f"chat_template_kwargs is {kwargs!r}; allowed: a mapping of names to values"
        )
    if not isinstance(enable_thinking, bool | None):
        raise RequestError(f"enable_thinking is {enable_thinking!r}; allowed: True or False")
    found = dict(kwargs or {})
    _check_plain(found, "chat_template_kwargs")
    if enable_thinking is not None:
        if found.setdefault("enable_thinking", enable_thinking) is not enable_thinking:
            raise RequestError(
                f"enable_thinking is {enable_thinking}, and {found['enable_thinking']} in"
                " chat_template_kwargs; allowed: one of them"
            )
    return found


def _check_plain(value: Any, name: str) -> None:
    """Refuse what is nested too deep, or no valid Unicode."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for one in level for item in _items(one)]
    if level:
        raise RequestError(
            f"{name} is nested more than {_MAX_DEPTH} deep; allowed: at most {_MAX_DEPTH}"
        )
    if any("\ud800" <= sign <= "\udfff" for text in strings_in(value) for sign in text):
        raise RequestError(f"{name} is not valid Unicode; convert it first")


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string in plain JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings_in(item)
