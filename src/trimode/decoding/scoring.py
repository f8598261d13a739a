"""How likely a prompt's own tokens are: what a prefill asks for beside the token behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimode.decoding.choose import likeliest, widened
from trimode.decoding.native_choice import choose_natively, is_native
from trimode.decoding.params import GenerationParams
from trimode.decoding.step import TokenLogprobs
from trimode.errors import RequestError
from trimode.model.native.choice import Readings

_GREEDY = GenerationParams(mode="ar", max_new_tokens=1, block_length=1, seed=0)


class PromptScores:
    """Log-probabilities of a prompt's tokens, as its prefill goes on.

    Args:
        prompt_ids: At least one.

    Attributes:
        found: Of the first tokens; None for the very first, which has nothing before it.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._prompt_ids = prompt_ids
        self.found: list[TokenLogprobs | None] = [None]

    @property
    def most_reused(self) -> int | None:
        """Cells that need not be fed again, since nothing is owed of their answers; None for all,
        once every token is scored."""
        num_found = len(self.found)
        return num_found - 1 if num_found < len(self._prompt_ids) else None

    def wanted(self, start: int, num_tokens: int) -> list[tuple[int, int]]:
        """Which answers are owed of fed tokens.

        Args:
            start: Position of the first.
            num_tokens: How many are fed.

        Returns:
            The index of each, and the prompt's token behind it.
        """
        stop = min(start + num_tokens, len(self._prompt_ids) - 1)
        first = max(len(self.found) - 1, start)
        return [(p - start, self._prompt_ids[p + 1]) for p in range(first, stop)]


def check_number(number: int | None, *, num_choosable: int) -> None:
    """Refuse more alternatives than there are tokens.

    Raises:
        RequestError: naming the number.
    """
    if number is not None and number > num_choosable:
        raise RequestError(
            f"prompt_logprobs is {number}; allowed: 0 to {num_choosable}, the tokens that can be"
            " chosen"
        )


def score(
    logits: Tensor, targets: Sequence[int], *, banned: Tensor, num_top: int
) -> list[TokenLogprobs]:
    """How likely given tokens are under the law at temperature 1, after the ban.

    Args:
        logits: [W, V]. Overwritten.
        targets: [W] ids.
        banned: [number banned] int64. Ids that are never chosen.
        num_top: How many of the likeliest tokens each has beside it.

    Returns:
        [W]; a token's number is that of its entry among the likeliest, to the last bit. None at all
        where some logits were not finite.
    """
    logits = widened(logits)
    num_rows = len(logits)
    numbers = [num_top] * num_rows
    if not is_native(logits):
        logits[:, banned] = -torch.inf
        if not bool(logits.amax(dim=-1).isfinite().all()):
            return []
        own = torch.tensor(targets, device=logits.device)
        return [one for one in likeliest(logits, own, numbers) if one is not None]
    choice = choose_natively(
        logits,
        params=[_GREEDY] * num_rows,
        positions=[0] * num_rows,
        banned=banned,
        readings=Readings(log_prob=True),
        targets=targets,
        laws=(),
        num_logprobs=numbers,
        none_id=None,
    )
    if not all(choice.is_finite):
        return []
    return [
        TokenLogprobs(log_prob, one.top)
        for log_prob, one in zip(choice.log_probs, choice.logprobs, strict=True)
        if one is not None
    ]
