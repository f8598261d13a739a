"""The corrector of an adapter: what the token before a place makes of the place's candidates.

The places of a draft are answered all at once, blind to each other. The corrector walks them from
left to right and adds to each candidate's logit a term of low rank that sees the token chosen
before. Only a few candidates of a place are scored, so a vocabulary of any size costs the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Corrector(nn.Module):
    """Adds `<(A e_before) * (1 + C h), B e_candidate>` to a candidate's logit.

    `e` is the frozen base's input embedding, `h` the hidden state that answers for the place.

    Args:
        before: [r, H]. A.
        state: [r, H]. C; zero makes the term a bigram's.
        candidate: [r, H]. B; zero makes no difference at all.
        num_candidates: Likeliest tokens of a place that are scored; the others keep their logits.

    Source: the sequential head of DSpark (arXiv 2607.05147), on a frozen embedding.
    """

    def __init__(
        self, before: Tensor, state: Tensor, candidate: Tensor, *, num_candidates: int
    ) -> None:
        super().__init__()
        self.before = nn.Parameter(before)
        self.state = nn.Parameter(state)
        self.candidate = nn.Parameter(candidate)
        self.num_candidates = num_candidates

    def forward(self, before: Tensor, state: Tensor, candidates: Tensor) -> Tensor:
        """What to add to the candidates' logits.

        Args:
            before: [..., H]. Input embedding of the token before the place.
            state: [..., H]. Hidden state of the place.
            candidates: [..., C, H]. Input embeddings of the candidates.

        Returns:
            [..., C].
        """
        gate = 1 + nn.functional.linear(state, self.state)
        context = nn.functional.linear(before, self.before) * gate
        return (nn.functional.linear(candidates, self.candidate) @ context[..., None])[..., 0]


def new_corrector(hidden_size: int, *, rank: int, num_candidates: int, seed: int) -> Corrector:
    """A corrector that changes nothing yet: B and C are zero, A uniform within 1 / sqrt(H)."""
    generator = torch.Generator().manual_seed(seed)
    before = (torch.rand(rank, hidden_size, generator=generator) * 2 - 1) * hidden_size**-0.5
    none = torch.zeros(rank, hidden_size)
    return Corrector(before, none.clone(), none.clone(), num_candidates=num_candidates)
