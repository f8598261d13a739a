"""How one round is decoded, which mode `auto` picks anew for each. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setting:
    """What a round of a mode needs to know.

    Attributes:
        mode: A mode of `trimode.decoding.modes.MODES`.
        block_length: K.
        num_groups: Groups that a forward carries behind a block or draft of its own, at most.
        has_guesses: Whether they may begin with a guess of the bonus token.
    """

    mode: str
    block_length: int
    num_groups: int = 0
    has_guesses: bool = False

    @property
    def num_fed(self) -> int:
        """Tokens of its largest forward."""
        return 1 if self.mode == "ar" else self.block_length * (1 + self.num_groups)


@dataclass(frozen=True, slots=True)
class Round:
    """How a round of speculation went.

    Attributes:
        setting: It was decoded with.
        num_checked: Drafted tokens that were verified.
        num_accepted: How many of them were right.
        has_next: Whether the next draft was made in the same forward.
        is_fresh: Whether the draft had a forward of its own.
    """

    setting: Setting
    num_checked: int
    num_accepted: int
    has_next: bool
    is_fresh: bool
