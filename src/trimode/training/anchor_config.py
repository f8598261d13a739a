"""The `drafter.anchors` part of a training config: a frozen base's whole diffusion view.

Groups of masks behind chosen places of the model's own text (anchors) learn what the AR view says
there. Place, anchor, `block` and `skip` are those of `trimode.model.adapter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimode.model.adapter import DRAFT_FORMS, VIEWS, AdapterForm
from trimode.training.part_checks import check, check_finite


@dataclass(frozen=True, slots=True)
class AnchorPart:
    """Train from anchors, and not from a round in every block.

    Args:
        per_row: Most groups of a row.
        spacing: Fewest tokens from one anchor of a row to the next. Null: groups do not overlap.
        num_masks: m, masks of a whole group. They stand at places 2 .. m + 1.
        keep: A group has at least j masks with probability `keep ** (j - 1)`; 1 is always m.
        forms: `skip`, `block`, or both; decoding prefers the first.
        first_share: Share of the drafts that have the first of two forms.
        adapts_clean: Whether a group's clean tokens carry the adapter too, or its masks alone.
        views: `draft`, or `draft` and `denoise`.
        denoise_share: Share of the groups that are diffusion blocks, where `denoise` is a view: one
            clean token, the others masked with a probability drawn uniformly for each block.
        loss: `kl`: KL(AR view || draft) over the vocabulary at temperature 1. `ce`: cross-entropy
            at the AR view's likeliest token. `lk`: LK-hybrid of the part around this one.
            `kl_then_lk`: the first, and from `lk_from` on the third.
        lk_from: Share of the run at which `kl_then_lk` changes.
        weights: Of the places of a draft. `even`; `decay`: `decay_ratio ** (p - 2)`; `dpace`: the
            product of what the draft gives to the true tokens before (arXiv 2605.18810).
        decay_ratio: Of `decay`.
        replay_share: Share of the drafts that begin where a round from their anchor would have
            ended: at the first place that the draft gets wrong (arXiv 2605.29343).
        replay_from: Share of the run from which there are such.
        mask_places: Mask embeddings: 0: the mask token's own; 1: one; n: by place, the last for
            all beyond.
        corrector_rank: Rank of the corrector; 0: none.
        corrector_candidates: Tokens of a place that it scores.
        uncorrected_weight: Weight of the loss before the correction, beside the one after it.
    """

    per_row: int = 64
    spacing: int | None = None
    num_masks: int = 5
    keep: float = 1.0
    forms: tuple[Literal["block", "skip"], ...] = ("skip",)
    first_share: float = 0.5
    adapts_clean: bool = False
    views: tuple[Literal["draft", "denoise"], ...] = ("draft",)
    denoise_share: float = 0.25
    loss: Literal["kl", "ce", "lk", "kl_then_lk"] = "kl"
    lk_from: float = 0.7
    weights: Literal["decay", "dpace", "even"] = "decay"
    decay_ratio: float = 0.75
    replay_share: float = 0.0
    replay_from: float = 0.8
    mask_places: int = 1
    corrector_rank: int = 0
    corrector_candidates: int = 8
    uncorrected_weight: float = 0.5

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("per_row", "num_masks", "corrector_candidates"):
            value = getattr(self, name)
            check(value >= 1, f"{name} is {value}, but must be at least 1")
        for name in ("mask_places", "corrector_rank"):
            value = getattr(self, name)
            check(value >= 0, f"{name} is {value}, but must be at least 0")
        spacing = self.spacing
        check(
            spacing is None or spacing >= 1, f"spacing is {spacing}, but must be at least 1 or null"
        )
        for name in ("first_share", "denoise_share", "lk_from", "replay_share", "replay_from"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"{name} is {value}, but must lie between 0 and 1")
        for name in ("keep", "decay_ratio"):
            value = getattr(self, name)
            check(0 < value <= 1, f"{name} is {value}, but must be above 0 and at most 1")
        weight = self.uncorrected_weight
        check(weight >= 0, f"uncorrected_weight is {weight}, but must not be negative")
        for name, allowed in (("forms", DRAFT_FORMS), ("views", VIEWS)):
            found = getattr(self, name)
            is_good = bool(found) and len(set(found)) == len(found)
            what = f"{name} is {list(found)}, but must be some of {', '.join(allowed)}, each once"
            check(is_good, what)
        check("draft" in self.views, f"views is {list(self.views)}, but must hold draft")
        self._refuse_idle_keys()

    def _refuse_idle_keys(self) -> None:
        """Refuse values that nothing would read beside the others."""
        idle = {
            "first_share": len(self.forms) == 1,
            "denoise_share": "denoise" not in self.views,
            "lk_from": self.loss != "kl_then_lk",
            "decay_ratio": self.weights != "decay",
            "replay_from": not self.replay_share,
            "corrector_candidates": not self.corrector_rank,
            "uncorrected_weight": not self.corrector_rank,
            "adapts_clean": "block" not in self.forms and "denoise" not in self.views,
        }
        for name, is_idle in idle.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            check(
                not is_idle or value == default,
                f"{name} is {value}, but means nothing beside the other keys: remove it",
            )

    @property
    def adapter_form(self) -> AdapterForm:
        """What is written beside the adapter."""
        return AdapterForm(
            views=self.views,
            adapts_clean=self.adapts_clean,
            draft_forms=self.forms,
            num_masks=self.num_masks,
        )
