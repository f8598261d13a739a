"""What a run of self-generation may ask for, checked once, and the seeds it deals out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimode.decoding.params import MAX_SEED
from trimode.errors import ConfigError

_SEED_BYTES = 6
"""Seeds of conversations stay below 2**48, so that every JSON reader has them exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfgenOptions:
    """How conversations are written. One is a function of these and of its index.

    Attributes:
        num: Conversations to keep; None with prompts of the caller's keeps all.
        prompt_temperature, prompt_top_p: Of the prompts that the model writes.
        temperatures: Of the answers, dealt out by index. What else samples them, and what ends
            them, is as in `TriModeLM.chat`.
        max_prompt_tokens: A longer prompt is dropped, written or given.
        max_answer_tokens: An answer is cut there.
        seed: Fixes all conversations.
        system: The system message; None leaves it to the chat template.
        top_logprobs: Keep so many of the likeliest tokens per answer token; 0 keeps none.
        held_out: Share of the conversations marked as held out, drawn by index.
        near_duplicates: A prompt at least so similar to an earlier one is dropped; 1 drops only
            equal ones, case and white space aside.
        keeps_loops: Keep answers that run in a loop, instead of giving them up.
        keeps_cut: Keep answers that were cut at the limit.

    Raises:
        ConfigError: naming the option, its value and what is allowed.
    """

    num: int | None = None
    prompt_temperature: float = 1.0
    prompt_top_p: float = 0.97
    temperatures: tuple[float, ...] = (0.0, 0.7)
    max_prompt_tokens: int = 128
    max_answer_tokens: int = 512
    seed: int = 0
    system: str | None = None
    top_logprobs: int = 0
    held_out: float = 0.0
    near_duplicates: float = 0.8
    keeps_loops: bool = False
    keeps_cut: bool = True

    def __post_init__(self) -> None:
        def check(name: str, is_valid: Callable[[Any], bool], allowed: str) -> None:
            value = getattr(self, name)
            if not is_valid(value):
                raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")

        check("num", lambda n: n is None or n >= 1, "at least 1")
        check("prompt_temperature", lambda t: _is_temperature(t) and t > 0, "1e-5 to 1e5")
        check("prompt_top_p", lambda p: 0 < p <= 1, "above 0, at most 1")
        check(
            "temperatures",
            lambda ts: bool(ts) and all(map(_is_temperature, ts)),
            "at least one, each 0 (greedy) or 1e-5 to 1e5",
        )
        check("max_prompt_tokens", lambda n: n >= 1, "at least 1")
        check("max_answer_tokens", lambda n: n >= 1, "at least 1")
        check("seed", lambda n: 0 <= n <= MAX_SEED, f"0 to {MAX_SEED}")
        check("top_logprobs", lambda n: n >= 0, "at least 0")
        check("held_out", lambda x: 0 <= x < 1, "0 to below 1")
        check("near_duplicates", lambda x: 0 < x <= 1, "above 0, at most 1")

    def temperature(self, index: int) -> float:
        """Of the answer of one conversation."""
        return self.temperatures[index % len(self.temperatures)]

    def seed_of(self, index: int, what: str) -> int:
        """The seed of the `prompt` or of the `answer` of one conversation."""
        return int.from_bytes(self._hash(index, what)[:_SEED_BYTES], "big")

    def split(self, index: int) -> str:
        """`train` or `held_out`."""
        drawn = int.from_bytes(self._hash(index, "split"), "big") / 256.0**8
        return "held_out" if drawn < self.held_out else "train"

    def _hash(self, index: int, what: str) -> bytes:
        return hashlib.blake2b(f"{self.seed} {index} {what}".encode(), digest_size=8).digest()


def _is_temperature(value: float) -> bool:
    return value == 0 or (math.isfinite(value) and 1e-5 <= value <= 1e5)
