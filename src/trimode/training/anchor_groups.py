"""Groups behind anchors: which are drawn for a row, and what each of them feeds.

Draws are functions of the seed and the row's global sample index. Group attention and losses are
made elsewhere: see `anchor_pass`, `anchor_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from trimode.training.anchor_config import AnchorPart
from trimode.training.packing import PackedRows

_ANCHORS = 5  # a random stream of its own beside those of packing, corruption and slots

SKIP, BLOCK, DENOISE = 0, 1, 2
"""Kinds of a group: drafts in either form, and a diffusion block, which looks like `block`."""

_KINDS = {"skip": SKIP, "block": BLOCK}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A groups of B rows, in the order of rows and anchors.

    Args:
        rows: [A] int64. Row of each.
        anchors: [A] int64. Place of its anchor in the row.
        kinds: [A] int64. `SKIP`, `BLOCK` or `DENOISE`.
        num_places: [A] int64. Places that it feeds from place 2 on.
        is_hidden: [A, W] bool. Which of places 2 .. W + 1 are masked, false beyond `num_places`.
        is_replayed: [A] bool. Whether it is to begin where a round from its anchor ends.
    """

    rows: Tensor
    anchors: Tensor
    kinds: Tensor
    num_places: Tensor
    is_hidden: Tensor
    is_replayed: Tensor

    def to(self, device: torch.device) -> Drawn:
        """The same groups on `device`."""
        return Drawn(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def num_groups(self) -> int:
        """A."""
        return len(self.rows)

    @property
    def num_drafts(self) -> int:
        """Groups that are drafts."""
        return int((self.kinds != DENOISE).sum())

    @property
    def num_masks(self) -> int:
        """Masks of all groups."""
        return int(self.is_hidden.sum())


@dataclass(frozen=True, slots=True)
class Groups:
    """What A groups feed, packed: P tokens, M of which are masks with a target.

    Args:
        drawn: The groups.
        lens: [A] int64. Tokens of each.
        token_ids: [P] int64.
        position_ids: [P] int64. In the document.
        group_ids: [P] int64. Index of the token's group.
        mask_places: [P] int64. Place of a masked token, 0 of a clean one.
        targets: [M] int64. Indices, in the P tokens, of the masks with a target.
        places: [M] int64. Place p of each of them.
        text_places: [M] int64. The text that each stands for, in the flattened rows.
    """

    drawn: Drawn
    lens: Tensor
    token_ids: Tensor
    position_ids: Tensor
    group_ids: Tensor
    mask_places: Tensor
    targets: Tensor
    places: Tensor
    text_places: Tensor

    @property
    def target_groups(self) -> Tensor:
        """[M] int64. Group of each target."""
        return self.group_ids[self.targets]


def draw_groups(
    rows: PackedRows,
    samples: Sequence[int],
    *,
    part: AnchorPart,
    block_length: int,
    seed: int,
    is_replaying: bool = False,
) -> Drawn:
    """Draw the groups of some rows.

    An anchor is followed by two supervised tokens of its document at least: the bonus at place 1,
    and the first that a mask stands for. What a group feeds may reach beyond the end of the text,
    as in decoding, so that its length says nothing about the end.

    Args:
        rows: B rows on the CPU.
        samples: Their B global sample indices.
        part: How many, of which kinds.
        block_length: K of a diffusion block.
        seed: Of the run.
        is_replaying: Whether some begin where a round ends (`replay_share`).
    """
    width = part.num_masks
    if "denoise" in part.views:
        width = max(width, block_length - 1)
    found: list[tuple[int, int, int, int, np.ndarray, bool]] = []
    for row, sample in enumerate(samples):
        rng = np.random.default_rng((seed, _ANCHORS, sample))
        order = rng.permutation(_candidates(rows, row))
        is_taken = np.zeros(rows.clean_ids.shape[1] + width + 2, dtype=bool)
        of_row = []
        for anchor in order.tolist():
            kind, is_hidden = _draw_group(rng, part, block_length=block_length, width=width)
            is_replayed = bool(rng.random() < part.replay_share)
            num_places = block_length - 1 if kind == DENOISE else int(is_hidden.sum())
            span = slice(anchor + 1, anchor + num_places + 2)
            if part.spacing is not None:
                span = slice(anchor, anchor + part.spacing)
            if is_taken[span].any():
                continue
            is_taken[span] = True
            is_replayed = is_replayed and is_replaying and kind != DENOISE
            of_row.append((row, anchor, kind, num_places, is_hidden, is_replayed))
            if len(of_row) == part.per_row:
                break
        found += sorted(of_row, key=lambda group: group[1])
    numbers = np.array([group[:4] for group in found], dtype=np.int64).reshape(-1, 4)
    row_ids, anchors, kinds, lens = torch.from_numpy(numbers).unbind(1)
    hidden = np.array([group[4] for group in found], dtype=bool).reshape(-1, width)
    replayed = np.array([group[5] for group in found], dtype=bool)
    of_places, of_replay = torch.from_numpy(hidden), torch.from_numpy(replayed)
    return Drawn(row_ids, anchors, kinds, lens, of_places, of_replay)


def all_anchors(rows: PackedRows, *, part: AnchorPart, form: str) -> Drawn:
    """A whole group of one form at every place that may be an anchor."""
    places = [(row, a) for row in range(len(rows.clean_ids)) for a in _candidates(rows, row)]
    row_ids, anchors = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).unbind(1)
    ones = torch.ones(len(row_ids), part.num_masks, dtype=torch.bool)
    kinds = torch.full_like(row_ids, _KINDS[form])
    lens = torch.full_like(row_ids, part.num_masks)
    return Drawn(row_ids, anchors, kinds, lens, ones, torch.zeros_like(ones[:, 0]))


def can_be_anchor(rows: PackedRows) -> Tensor:
    """[B, S] bool. Whether the next two tokens are supervised and of the same document."""
    document, is_supervised = rows.document_ids, rows.is_supervised
    is_good = torch.zeros_like(is_supervised)
    is_good[:, :-2] = (
        (document[:, :-2] == document[:, 2:]) & is_supervised[:, 1:-1] & is_supervised[:, 2:]
    )
    return is_good


def lay_out(rows: PackedRows, drawn: Drawn, *, mask_token_id: int, eos_token_id: int) -> Groups:
    """What the groups feed.

    Masks beyond the end of the text have no target. A clean token there, of a diffusion block, is
    EOS.

    Args:
        rows: B rows.
        drawn: Their groups, on the same device.
        mask_token_id, eos_token_id: The two special tokens.
    """
    row_len, width = rows.clean_ids.shape[1], drawn.is_hidden.shape[1]
    places = torch.arange(1, width + 2, device=drawn.anchors.device).expand(drawn.num_groups, -1)
    is_fed = places <= drawn.num_places[:, None] + 1
    is_fed = is_fed & ((places > 1) | (drawn.kinds[:, None] != SKIP))
    is_hidden = torch.cat((torch.zeros_like(drawn.is_hidden[:, :1]), drawn.is_hidden), dim=1)
    in_row = drawn.anchors[:, None] + places
    flat = drawn.rows[:, None] * row_len + in_row.clamp(max=row_len - 1)
    anchors = drawn.rows * row_len + drawn.anchors
    document = rows.document_ids.flatten()
    is_text = (in_row < row_len) & (document[flat] == document[anchors][:, None])
    is_text = is_text & rows.is_supervised.flatten()[flat]
    is_text = is_text.long().cumprod(1).bool()
    token_ids = torch.where(is_text, rows.clean_ids.flatten()[flat], eos_token_id)
    token_ids = torch.where(is_hidden, mask_token_id, token_ids)
    position_ids = rows.position_ids.flatten()[anchors][:, None] + places
    group_ids = torch.arange(drawn.num_groups, device=places.device)[:, None].expand_as(places)
    is_target = (is_hidden & is_text)[is_fed]
    targets = is_target.nonzero()[:, 0]
    return Groups(
        drawn=drawn,
        lens=is_fed.sum(1),
        token_ids=token_ids[is_fed],
        position_ids=position_ids[is_fed],
        group_ids=group_ids[is_fed],
        mask_places=torch.where(is_hidden, places, 0)[is_fed],
        targets=targets,
        places=places[is_fed][targets],
        text_places=flat[is_fed][targets],
    )


def moved(rows: PackedRows, drawn: Drawn, runs: Tensor) -> Drawn:
    """The replayed groups at the anchors that a round from their old ones leads to.

    A round keeps the leading run of right masks and adds the verifier's token. In `skip` that token
    is the next anchor; in `block` it is the next group's place 1. Where too little text is left,
    the group stays.

    Args:
        rows: B rows.
        drawn: Their groups.
        runs: [A] int64. Leading run of each.
    """
    step = runs + 1 + (drawn.kinds == SKIP)
    anchors = torch.where(drawn.is_replayed, drawn.anchors + step, drawn.anchors)
    row_len = rows.clean_ids.shape[1]
    inside = anchors.clamp(max=row_len - 1)
    document = rows.document_ids
    is_good = can_be_anchor(rows)[drawn.rows, inside] & (anchors < row_len)
    is_good &= document[drawn.rows, inside] == document[drawn.rows, drawn.anchors]
    anchors = torch.where(is_good, anchors, drawn.anchors)
    order = torch.argsort(drawn.rows * row_len + anchors, stable=True)
    found = {f.name: getattr(drawn, f.name)[order] for f in fields(drawn)}
    return Drawn(**(found | {"anchors": anchors[order]}))


def _candidates(rows: PackedRows, row: int) -> np.ndarray:
    found: np.ndarray = can_be_anchor(rows)[row].nonzero()[:, 0].numpy()
    return found


def _draw_group(
    rng: np.random.Generator, part: AnchorPart, *, block_length: int, width: int
) -> tuple[int, np.ndarray]:
    """Kind of a group and which of its places are masked; always the same number of draws."""
    of_view, of_form, of_length, ratio = rng.random(4)
    noise = rng.random(width)
    of_places = np.arange(width)
    if "denoise" in part.views and of_view < part.denoise_share:
        is_block = of_places < block_length - 1
        is_hidden = (noise < ratio) & is_block
        if not is_hidden.any():
            is_hidden[int(of_length * (block_length - 1))] = True
        return DENOISE, is_hidden
    is_first = len(part.forms) == 1 or of_form < part.first_share
    num_masks = part.num_masks
    if part.keep < 1:  # at least j masks where of_length < keep^(j - 1)
        num_masks = min(num_masks, 1 + int(np.log1p(-of_length) / np.log(part.keep)))
    return _KINDS[part.forms[0 if is_first else 1]], of_places < num_masks
