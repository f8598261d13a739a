"""One line of JSON for each thing that a client was asked; runs in the client's own environment."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

URL = os.environ.get("TRIMODE_URL", "")
"""Of the default model with its chat template, up to and without `/v1`."""

TOOLS_URL = os.environ.get("TRIMODE_TOOLS_URL", "")
"""Of the same model with a chat template that has tools."""

CALL = r'<tool_call>\n\{"name": "look", "arguments": \{"at": "sky"\}\}\n</tool_call>'
"""A regular expression that has the model write this one call."""

LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at something.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string"}},
            "required": ["at"],
        },
    },
}

ASK = [{"role": "user", "content": "Write a function: Add two numbers."}]


class Checks:
    """Prints what became of each check.

    Args:
        package: The client, by the name of its distribution.
    """

    def __init__(self, package: str) -> None:
        self._client = {"client": package, "version": version(package)}

    @contextmanager
    def __call__(self, asked: str) -> Iterator[Callable[[object], None]]:
        """Run a check; its body hands over what is worth a look."""
        shown: list[str] = []
        result = {**self._client, "asked": asked, "is_ok": True}
        try:
            yield lambda thing: shown.append(str(thing))
        except Exception as error:
            lines = traceback.format_exception_only(error)
            result |= {"is_ok": False, "error": "".join(lines).strip()[:600]}
            if os.environ.get("TRIMODE_TRACE"):
                traceback.print_exc()
        print(json.dumps({**result, "shown": " | ".join(shown)[:300]}), flush=True)
