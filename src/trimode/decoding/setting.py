"""How one round is decoded, which mode `auto` picks anew for each. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Setting:
    """What a round of a mode needs to know.

    Attributes:
        mode: A mode of `trimode.decoding.modes.MODES`.
        block_length: K.
        num_groups: Groups that a forward carries behind a block or draft of its own, at most.
        has_guesses: Whether they may begin with a guess of the bonus token.
        num_masks: Masks of a group that skips the bonus, m; None where groups are blocks.
        min_gain: Tokens that a fed token must be expected to bring, or it is not fed. It may differ
            from round to round and is no part of what settings are told apart by.
        has_lookup: Whether the text's own repetitions may be drafts, if they may at all; nor is
            this.
    """

    mode: str
    block_length: int
    num_groups: int = 0
    has_guesses: bool = False
    num_masks: int | None = None
    min_gain: float = field(default=0.0, compare=False)
    has_lookup: bool = field(default=True, compare=False)

    @property
    def draft_len(self) -> int:
        """Tokens of one draft."""
        return self.block_length - 1 if self.num_masks is None else self.num_masks

    @property
    def group_len(self) -> int:
        """Tokens of its largest group."""
        return self.block_length if self.num_masks is None else self.num_masks + self.has_guesses

    @property
    def num_fed(self) -> int:
        """Tokens of its largest forward. Masks that skip the bonus have a group even where no
        outcome does, in the forward that opens a round."""
        if self.mode == "ar":
            return 1
        num_groups = self.num_groups if self.num_masks is None else max(self.num_groups, 1)
        return 1 + self.draft_len + num_groups * self.group_len


@dataclass(frozen=True, slots=True)
class Round:
    """How a round of speculation went.

    Attributes:
        setting: It was decoded with.
        num_checked: Drafted tokens that were verified.
        num_accepted: How many of them were right.
        has_next: Whether the next draft was made in the same forward.
        is_fresh: Whether the draft had a forward of its own.
        num_opened: Tokens that this forward gave beside it: 1 where its masks skipped the bonus.
        is_looked_up: Whether the draft came from the text itself.
        is_cut: Whether it was shorter than it could be by choice, not by the end of the text.
        unfed_confidence: Of the first token of the draft that was left out, by choice; None if
            there was none.
    """

    setting: Setting
    num_checked: int
    num_accepted: int
    has_next: bool
    is_fresh: bool
    num_opened: int = 0
    is_looked_up: bool = False
    is_cut: bool = False
    unfed_confidence: float | None = None
