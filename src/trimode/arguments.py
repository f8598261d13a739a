"""Arguments of Python callers as plain values: prompts, seeds, a device, numpy's numbers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any

import torch

from trimode.errors import ConfigError, RequestError
from trimode.heal import EncodedPrompt

Prompt = str | Items[int] | EncodedPrompt


def as_prompts(prompt: Prompt | Items[Prompt]) -> tuple[bool, list[Prompt]]:
    """Whether one prompt was given, and all prompts."""
    if isinstance(prompt, str | EncodedPrompt):
        return True, [prompt]
    items = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(items, Items) or isinstance(items, bytes):
        raise RequestError(
            f"prompt is a {type(prompt).__name__}; allowed: a string, token ids, or a list of these"
        )
    items = list(items)
    if not items:
        raise RequestError("prompt is an empty list; give '' for an empty prompt")
    is_prompt = [isinstance(i, str | EncodedPrompt) or hasattr(i, "__len__") for i in items]
    if all(is_prompt):
        return False, items
    if any(is_prompt):
        wrong = is_prompt.index(False)
        raise RequestError(
            f"prompt has {items[wrong]!r} at place {wrong} of a list of prompts; allowed there: a"
            " string or token ids"
        )
    return True, [items]


def as_seeds(seed: int | Items[int] | None, num_prompts: int) -> list[int]:
    if seed is None:
        return [secrets.randbits(32) for _ in range(num_prompts)]
    seed = seed.tolist() if hasattr(seed, "tolist") else seed
    if not isinstance(seed, Items):
        return [seed] * num_prompts
    if len(seed) != num_prompts:
        raise RequestError(f"seed has {len(seed)} entries for {num_prompts} prompts; give one each")
    return list(seed)


def check_unicode(name: str, text: str) -> None:
    """Refuse what cannot be encoded: half of a surrogate pair.

    Raises:
        RequestError: naming it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} is not valid Unicode: {text[error.start]!r} at character {error.start};"
            " allowed: whole characters, so convert it first"
        ) from None


def plain(value: Any) -> Any:
    """numpy and torch scalars as Python's, whose integers do not overflow, in mappings as well; all
    else as it is."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    is_scalar = hasattr(value, "item") and getattr(value, "ndim", 0) == 0
    return value.item() if is_scalar else value


def as_strings(name: str, value: str | Items[str] | None) -> tuple[Any, ...]:
    """One non-empty string, several or None as a tuple."""
    found = (value,) if isinstance(value, str) else value
    is_list = (
        found is None
        or hasattr(found, "tolist")
        or (isinstance(found, Items) and not isinstance(found, bytes))
    )
    if found == ("",) or not is_list:
        raise RequestError(f"{name} is {value!r}; allowed: a non-empty string or a list of these")
    return as_tuple(name, found)


def as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    """A sequence, an array or None as a tuple of plain values."""
    items = () if values is None else values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(items, Items):
        raise RequestError(f"{name} is {values!r}; allowed: a list")
    return tuple(map(plain, items))


def as_device(device: str | torch.device | None) -> torch.device:
    """A device that this machine has; None is CUDA where there is one, else the CPU."""
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        device = "cuda" if num_cuda else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {str(device)!r}; allowed: cpu, cuda, cuda:0, ...")
    if found.type == "cuda" and (found.index or 0) >= num_cuda:
        raise ConfigError(f"device is '{found}'; this machine has {num_cuda} usable CUDA devices")
    return found
