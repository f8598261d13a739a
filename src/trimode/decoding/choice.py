"""What was chosen for the wanted tokens of one forward. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from trimode.decoding.step import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Choice:
    """Choices for W wanted tokens.

    Attributes:
        token_ids: [W] chosen tokens.
        is_finite: [W] False where the logits held a NaN or an infinity, or a law left nothing to
            choose, so the choice means nothing.
        confidences: [W] probability of each at temperature 1 after the ban, unfiltered.
        runner_ups: [W] what would have been chosen without them.
        runner_up_confidences: [W] probability of each; 0 where the law allows no second token.
        entropies: [W] of the law at temperature 1 after the ban, unfiltered, in nats.
        log_probs: [W] of the token asked about, under the same law, in nats; of no meaning
            where none was.
        logprobs: [W] of each chosen token and the likeliest ones, likewise; None where not asked.

    All but the first two are empty if unwanted.
    """

    token_ids: list[int]
    is_finite: list[bool]
    confidences: list[float]
    runner_ups: list[int]
    runner_up_confidences: list[float]
    entropies: list[float]
    log_probs: list[float]
    logprobs: list[TokenLogprobs | None]
