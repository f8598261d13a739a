"""Tensors of transformers users as plain ids, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trimode.decoding import Sequence
from trimode.errors import RequestError


def as_ids(eos_token_id: int | Iterable[int] | None) -> tuple[int, ...] | None:
    """Tokens that end a row; None stays None.

    Raises:
        RequestError: there is something else among them.
    """
    if eos_token_id is None:
        return None
    ids = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    ids = tuple(ids) if isinstance(ids, (list, tuple, set)) else (ids,)
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise RequestError(f"eos_token_id is {eos_token_id!r}; allowed: None, an id, or ids")
    return ids


def one_of_two(name: str, value: Any, other_name: str, other: Any) -> Any:
    """An argument that has two names.

    Raises:
        RequestError: it was given by both.
    """
    if value is not None and other is not None:
        raise RequestError(f"{name} and {other_name} are both given; allowed: one of the two names")
    return other if value is None else value


def real_tokens(
    prompt_ids: Tensor, attention_mask: Tensor | None, *, name: str = "prompt_ids"
) -> list[list[int]]:
    """The prompts without their padding.

    Args:
        prompt_ids: [B, T] of integers.
        attention_mask: [B, T] of ones and zeros; None if all tokens are real.
        name: What messages call the prompt.

    Raises:
        RequestError: a shape, a dtype, or a row that is not one run of real tokens.
    """
    is_ids = isinstance(prompt_ids, Tensor) and not prompt_ids.is_floating_point()
    if not is_ids or prompt_ids.dim() != 2 or 0 in prompt_ids.shape:
        what = tuple(prompt_ids.shape) if is_ids else type(prompt_ids).__name__
        raise RequestError(f"{name} is {what}; allowed: a non-empty integer tensor [B, T]")
    if attention_mask is None:
        return prompt_ids.tolist()
    is_mask = isinstance(attention_mask, Tensor) and attention_mask.shape == prompt_ids.shape
    if not is_mask or not ((attention_mask == 0) | (attention_mask == 1)).all():
        what = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else "no tensor"
        raise RequestError(
            f"attention_mask is {what}; allowed: ones and zeros of the shape of {name},"
            f" {tuple(prompt_ids.shape)}"
        )
    prompts = []
    for b, (ids, is_real) in enumerate(
        zip(prompt_ids.tolist(), attention_mask.bool().tolist(), strict=True)
    ):
        where = [t for t, real in enumerate(is_real) if real]
        if not where or where[-1] - where[0] + 1 != len(where):
            raise RequestError(
                f"attention_mask row {b} is {[int(real) for real in is_real]}; allowed: one run of"
                " real tokens, padded left or right"
            )
        prompts.append(ids[where[0] : where[-1] + 1])
    return prompts


def joined(prompt_ids: Tensor, sequences: list[Sequence], *, pad_id: int) -> Tensor:
    """[B, T + new] int64: prompts as given, new tokens, pads."""
    longest = max(len(seq.new_ids) for seq in sequences)
    new = [seq.new_ids + [pad_id] * (longest - len(seq.new_ids)) for seq in sequences]
    return torch.cat((prompt_ids.long(), torch.tensor(new, device=prompt_ids.device)), dim=1)
