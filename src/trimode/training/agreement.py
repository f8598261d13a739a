"""What ranks must find alike, and how an error of one becomes an error of all, told once.

A rank that fails alone leaves the others waiting in their next exchange. So what may fail on some
ranks only is done under `together`: then all fail, with the error of the first rank that did.
Only that rank is to tell it; the others ask `is_told_elsewhere`. All ranks call these together.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from trimode import errors
from trimode.errors import ConfigError, TriModeError

E = TypeVar("E", bound=BaseException)

_TOLD = "another rank tells it"


def is_told_elsewhere(error: BaseException) -> bool:
    """Whether another rank raised the same error and tells the user."""
    return _TOLD in getattr(error, "__notes__", ())


def common(error: E, *, teller: int = 0) -> E:
    """An error that all ranks raise alike, marked so that only `teller` tells it."""
    if dist.get_rank() != teller:
        error.add_note(_TOLD)
    return error


@contextmanager
def together() -> Iterator[None]:
    """If the body, which must not exchange anything, fails on any rank, it fails on all.

    Raises:
        TriModeError: Of the class of the first rank's error, if this rank had none.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    found: list[Any] = [None] * dist.get_world_size()
    mine = None if failure is None else (type(failure).__name__, str(failure))
    dist.all_gather_object(found, mine)
    failed = [rank for rank, theirs in enumerate(found) if theirs is not None]
    if not failed:
        return
    if failure is None:
        name, message = found[failed[0]]
        kind = getattr(errors, name, TriModeError)
        failure = kind(message) if kind is not TriModeError else TriModeError(f"{name}: {message}")
    raise common(failure, teller=failed[0])


def check_alike(what: str, value: Any) -> None:
    """Refuse to go on where ranks find different things.

    Args:
        what: Of this run, e.g. "the data".
        value: What this rank found, of a plain JSON type.

    Raises:
        ConfigError: On all ranks; names one that differs from rank 0.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise common(
                ConfigError(
                    f"{what} is {theirs} on rank {rank}, but {found[0]} on rank 0; all ranks must "
                    "see the same files and run on machines of one kind"
                )
            )


def check_same_config(config: Mapping[str, Any]) -> None:
    """Refuse to go on, on all ranks alike, where one was started with another config.

    Hashes are compared; only where they differ do the configs travel, to name the key.

    Raises:
        ConfigError: Names the rank that disagrees with most (with rank 0 in a tie) and the key.
    """
    text = json.dumps(config, sort_keys=True)
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    usual = Counter(digests).most_common(1)[0][0]
    if digests.count(usual) == len(digests):
        return
    texts: list[Any] = [None] * len(digests)
    dist.all_gather_object(texts, text)
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    good = digests.index(usual)
    key, there, here = _first_difference(json.loads(texts[odd[0]]), json.loads(texts[good]))
    ranks = ("rank " if len(odd) == 1 else "ranks ") + ", ".join(map(str, odd))
    raise common(
        ConfigError(
            f"{ranks} started with another config: {key} is {there} on rank {odd[0]}, but {here} "
            f"on rank {good}; start all ranks with the same config"
        )
    )


def _first_difference(one: Any, other: Any, prefix: str = "") -> tuple[str, str, str]:
    """Key path of the first difference between two unequal JSON values, and both values."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return prefix or "config", repr(one), repr(other)
    for key in [*one, *(key for key in other if key not in one)]:
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in one or key not in other:
            values = [repr(side[key]) if key in side else "absent" for side in (one, other)]
            return path, values[0], values[1]
        if one[key] != other[key]:
            return _first_difference(one[key], other[key], path)
    raise AssertionError("equal values")
