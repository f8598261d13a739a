"""Flags for what single tokens are subject to (`trimode.decoding.control.Control`), read from words
and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimode.errors import RequestError

CONTROL_FLAGS: dict[str, dict[str, Any]] = {
    "logit_bias": {
        "action": "append",
        "metavar": "ID=X",
        "help": "add X to the logit of token ID; may be given several times",
    },
    "repetition_penalty": {
        "type": float,
        "metavar": "X",
        "help": "divide the scores of tokens already there by X, or multiply negative ones"
        " (default 1.0)",
    },
    "frequency_penalty": {
        "type": float,
        "metavar": "X",
        "help": "lower the scores of new tokens by X for each time they occur (default 0.0)",
    },
    "presence_penalty": {
        "type": float,
        "metavar": "X",
        "help": "lower the scores of all tokens that the new text has by X (default 0.0)",
    },
    "logprobs": {
        "type": int,
        "metavar": "K",
        "help": "--json: every token's log-probability, and the K likeliest; not in diffusion",
    },
    "prompt_logprobs": {
        "type": int,
        "metavar": "K",
        "help": "--json: the same of the prompt's tokens, in any mode; N may be 0, and no --heal",
    },
    "max_thinking_tokens": {
        "type": int,
        "metavar": "N",
        "help": "after N tokens without the end of thought, that is the next one",
    },
    "end_think_token_id": {
        "type": int,
        "metavar": "ID",
        "help": "the end of thought (default: the tokenizer's </think>)",
    },
    "json_schema": {
        "metavar": "SCHEMA",
        "help": "write JSON of this schema, given as such or as a file; not in diffusion",
    },
    "regex": {"metavar": "REGEX", "help": "write what matches all of it; not in diffusion"},
    "grammar": {"metavar": "FILE", "help": "write what is of this Lark grammar; not in diffusion"},
}
"""Arguments of `TriModeLM.generate`."""


def read_controls(options: dict[str, Any], *, is_json: bool) -> dict[str, Any]:
    """The options as `TriModeLM.generate` takes them.

    Args:
        options: As argparse gives them; others than those of `CONTROL_FLAGS` stay as they are.
        is_json: Whether one JSON object is printed.

    Raises:
        RequestError: a word or a file cannot be read.
    """
    read = dict(options)
    for name in ("logprobs", "prompt_logprobs"):
        if name in read and not is_json:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} is {read[name]}; allowed: only with --json")
    if "logit_bias" in read:
        read["logit_bias"] = _biases(read["logit_bias"])
    if "json_schema" in read and not read["json_schema"].lstrip().startswith("{"):
        read["json_schema"] = _content("--json-schema", read["json_schema"])
    if "grammar" in read:
        read["grammar"] = _content("--grammar", read["grammar"])
    return read


def _biases(words: list[str]) -> dict[int, float]:
    found: dict[int, float] = {}
    for word in words:
        token_id, _, value = word.partition("=")
        try:
            number, added = int(token_id), float(value)
        except ValueError:
            raise RequestError(f"--logit-bias is {word!r}; allowed: ID=X, such as 17=-5") from None
        if number in found:
            raise RequestError(f"--logit-bias is given twice for token {number}; allowed: once")
        found[number] = added
    return found


def _content(flag: str, name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RequestError(f"{flag} is {name!r}, which cannot be read: {reason}") from None
