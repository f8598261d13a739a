"""What `TriModeLM.generate` returns."""

from __future__ import annotations

from dataclasses import dataclass

from trimode.decoding import Stats
from trimode.decoding.step import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished continuation.

    Attributes:
        text: The new text, without special tokens, cut before the stop string that ended it. It
            goes on where the prompt ended.
        token_ids: The chosen tokens, the stop token or the tokens of the stop string included.
        prompt_ids: The prompt as fed, without what was taken back of it.
        prompt_tokens: Of the prompt before that.
        finish_reason: `stop` (stop token or string), `length`, or `abort`.
        seed: The seed that reproduces it.
        stats: What it cost.
        logprobs: Of each of `token_ids`, if they were asked for; else None.
        prompt_logprobs: Of each of `prompt_ids`, None for the first, if they were asked for; else
            None.
        healed_bytes: What was taken back of the prompt and chosen anew; `prompt_ids` and
            `token_ids` together decode to prompt and text.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    seed: int
    stats: Stats
    logprobs: list[TokenLogprobs] | None = None
    healed_bytes: bytes = b""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
