"""Prompts of the caller's: one a line of text, or JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimode.errors import ConfigError

Messages = list[dict[str, str]]


def read_prompts(file: Path) -> list[Messages]:
    """The conversations to answer, each ending with the user's message.

    Args:
        file: `.jsonl`, whose lines are `{"prompt": "..."}` or `{"messages": [...]}`, of which all
            up to the last message of the user is taken; or `.txt`, one prompt a line. Blank lines
            are passed over.

    Raises:
        ConfigError: It cannot be read, or a line is not of this form.
    """
    if file.suffix not in (".jsonl", ".txt"):
        raise ConfigError(f"prompts is {str(file)!r}; allowed: a file .jsonl or .txt")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"prompts: {file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts: {file} is not UTF-8 (byte {error.start})") from error
    found: list[Messages] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_of_json(line) if file.suffix == ".jsonl" else _of_text(line))
        except ValueError as error:
            raise ConfigError(f"prompts: line {number} of {file}: {error}") from error
    if not found:
        raise ConfigError(f"prompts: {file} has no prompts")
    return found


def _of_text(line: str) -> Messages:
    return [{"role": "user", "content": line.strip()}]


def _of_json(line: str) -> Messages:
    fields: Any = json.loads(line)
    if isinstance(fields, dict) and isinstance(fields.get("prompt"), str):
        return _of_text(fields["prompt"])
    messages = fields.get("messages") if isinstance(fields, dict) else None
    if not isinstance(messages, list):
        raise ValueError("allowed: an object with `prompt` (text) or `messages`")
    plain = []
    for message in messages:
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not is_message or not isinstance(message.get("content"), str):
            raise ValueError("a message needs `role` and `content`, both text")
        plain.append({"role": message["role"], "content": message["content"]})
    last = max((i for i, one in enumerate(plain) if one["role"] == "user"), default=None)
    if last is None:
        raise ValueError("no message of the user to answer")
    return plain[: last + 1]
