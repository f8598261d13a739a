"""Adapters: LoRA weights beside the network, switched on per token by an argument, or merged.

A drafter's are never merged and never stored in the model, so a forward without them cannot be
coloured by them. A LoRA of the whole model is merged before the model is used. Files are
`trimode.checkpoint`'s business.

On a frozen base one adapter is the whole diffusion view: LoRA on the block's tokens, embeddings of
its own for the masks, and perhaps a corrector. `AdapterForm` says how it is meant to be used;
training and decoding read the same fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trimode.errors import ConfigError
from trimode.model.corrector import Corrector
from trimode.model.linear import times_share

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers an adapter may sit on; the published drafter uses `o_proj` only (facts 2.5)."""

MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""Those of `TARGETS` that are in the MLP; the others are in the attention."""


VIEWS = ("draft", "denoise")
"""What an adapter may serve: drafting (`linear`, `branching`), and the passes of `diffusion`,
`infill` and remasking. Never a commit, a verify or a prefill, which are the AR view's."""

DRAFT_FORMS = ("block", "skip")
"""How masks follow the anchor, the last trunk token that a group sees.

`block`: place 1 is in the group (the last emitted token, a guess of the bonus, or a mask in its
place) and masks follow from place 2. `skip`: the group is masks only, from place 2 on; place 1, the
bonus, is in no group, and the trunk answers it exactly. Place = position - anchor's position.
"""


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """How an adapter was trained, so how it is to be used.

    Attributes:
        views: From `VIEWS`, what it is on for.
        adapts_clean: Whether clean tokens of a group carry it too, or its masks only.
        draft_forms: From `DRAFT_FORMS`, those it was trained in, the one to prefer first.
        num_masks: Masks of a group it was trained with; None where nobody says.
        acceptance: For each of `draft_forms` the chances that the first, second, ... token of a
            draft is right if those before it are, on held-out answers; empty where nobody says.
    """

    views: tuple[str, ...] = ("draft",)
    adapts_clean: bool = True
    draft_forms: tuple[str, ...] = ("block",)
    num_masks: int | None = None
    acceptance: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("views", VIEWS), ("draft_forms", DRAFT_FORMS)):
            found = getattr(self, name)
            is_good = isinstance(found, tuple) and found and len(set(found)) == len(found)
            if not is_good or not set(found) <= set(allowed):
                raise ConfigError(
                    f"{name} is {found!r}; allowed: some of {', '.join(allowed)}, each once"
                )
        if not isinstance(self.adapts_clean, bool):
            raise ConfigError(f"adapts_clean is {self.adapts_clean!r}; allowed: true, false")
        num_masks = self.num_masks
        if num_masks is not None and (type(num_masks) is not int or num_masks < 1):
            raise ConfigError(f"num_masks is {num_masks!r}; allowed: null, or at least 1")
        found = self.acceptance
        is_good = isinstance(found, tuple) and len(found) in (0, len(self.draft_forms))
        if not is_good or not all(map(_are_chances, found)):
            raise ConfigError(
                f"acceptance is {found!r}; allowed: for each of draft_forms, some of 0 to 1"
            )

    def acceptance_of(self, form: str) -> tuple[float, ...]:
        """What `acceptance` says of one form; empty if nothing."""
        return dict(zip(self.draft_forms, self.acceptance, strict=False)).get(form, ())


def _are_chances(found: object) -> bool:
    return isinstance(found, tuple) and all(
        type(chance) in (int, float) and 0 <= chance <= 1 for chance in found
    )


PUBLISHED_FORM = AdapterForm()
"""Of the published drafter: for drafts, on for the whole block."""


class LoraPair(nn.Module):
    """One low-rank update `scale * B A x` (Hu et al. 2021, arXiv 2106.09685).

    Args:
        down: [r, in]. A in the paper.
        up: [out, r]. B in the paper.
        scale: alpha / r.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        return _times(_times(x, self.down) * self.scale, self.up)  # r numbers to scale, not out


def _times(x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(weight, DTensor):
        return times_share(x, weight)
    return nn.functional.linear(x, weight)


class DrafterAdapter(nn.Module):
    """One adapter: its pairs, found by layer index and target name, and what stands beside them.

    Args:
        pairs: By layer index and target name.
        form: How it is to be used.
        mask_embeddings: [places, H]. Input of a masked token in place of the mask token's own
            embedding: row p - 1 at place p of its group, the last row for all places beyond. None:
            the mask token's own, at every place.
        corrector: Chooses among each place's candidates with the token before in view; None for
            none.
    """

    def __init__(
        self,
        pairs: dict[tuple[int, str], LoraPair],
        *,
        form: AdapterForm = PUBLISHED_FORM,
        mask_embeddings: Tensor | None = None,
        corrector: Corrector | None = None,
    ) -> None:
        super().__init__()
        self.pairs = nn.ModuleDict({f"{layer}_{target}": p for (layer, target), p in pairs.items()})
        self.form = form
        self.mask_embeddings = None if mask_embeddings is None else nn.Parameter(mask_embeddings)
        self.corrector = corrector

    def items(self) -> Iterator[tuple[int, str, LoraPair]]:
        """Layer index, target name and pair, one after the other."""
        for name, pair in self.pairs.items():
            layer_index, _, target = name.partition("_")
            yield int(layer_index), target, pair  # type: ignore[misc]

    def find(self, layer_index: int, target: str) -> LoraPair | None:
        """The pair on `target` of layer `layer_index`, or None."""
        name = f"{layer_index}_{target}"
        return self.pairs[name] if name in self.pairs else None  # type: ignore[return-value]


def linear_of(layer: nn.Module, target: str) -> nn.Linear:
    """The linear layer of a transformer layer that a target name means.

    Raises:
        ConfigError: the layer is packed.
    """
    parent = getattr(layer, "mlp" if target in MLP_TARGETS else "self_attn", None)
    if parent is None:
        raise ConfigError(
            "the weights are packed for decoding and have no linear layers to put an adapter on;"
            " call model.pack('plain') first"
        )
    linear: nn.Linear = getattr(parent, target)
    return linear


def new_adapter(
    layers: nn.ModuleList,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    form: AdapterForm = PUBLISHED_FORM,
    mask_embeddings: Tensor | None = None,
    corrector: Corrector | None = None,
) -> DrafterAdapter:
    """An adapter that changes nothing yet: A uniform within 1 / sqrt(in), B zero, in float32.

    Args:
        layers: The transformer layers of the network it is for.
        rank: r.
        alpha: The scale is alpha / r.
        targets: From `TARGETS`; every layer gets a pair on each.
        seed: Of A.
        form: See `DrafterAdapter`.
        mask_embeddings: See `DrafterAdapter`.
        corrector: See `DrafterAdapter`.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, layer in enumerate(layers):
        for target in targets:
            linear = linear_of(layer, target)
            down = torch.rand(rank, linear.in_features, generator=generator) * 2 - 1
            up = torch.zeros(linear.out_features, rank)
            pairs[index, target] = LoraPair(down * linear.in_features**-0.5, up, alpha / rank)
    return DrafterAdapter(pairs, form=form, mask_embeddings=mask_embeddings, corrector=corrector)


@torch.no_grad()
def merge(adapter: DrafterAdapter, layers: nn.ModuleList) -> None:
    """Add an adapter into the weights of `layers`, for every view: `W += scale B A`, in float32.

    Not for a drafter, which must not colour the AR view.
    """
    for layer_index, target, pair in adapter.items():
        weight = linear_of(layers[layer_index], target).weight
        work = torch.promote_types(weight.dtype, torch.float32)
        update = pair.up.to(work) @ pair.down.to(work) * pair.scale
        if isinstance(weight, DTensor):  # every rank has the whole update and needs its part
            mesh, placements = weight.device_mesh, weight.placements
            update = distribute_tensor(update, mesh, placements, src_data_rank=None)
        weight.copy_(weight.to(work) + update)


@dataclass(frozen=True, slots=True)
class AdapterSwitch:
    """An adapter and the tokens it is on for, in one forward.

    Attributes:
        adapter: The weights.
        is_on: [..., 1] bool, True where the adapter is on; None for all tokens.
        mask_places: [...] int64. Place of each masked token that the adapter is on for, 0 for any
            other token. None: no token is masked.
    """

    adapter: DrafterAdapter
    is_on: Tensor | None
    mask_places: Tensor | None = None

    @classmethod
    def of(
        cls,
        adapter: DrafterAdapter | None,
        is_on: Sequence[bool] | Sequence[Sequence[bool]],
        mask_places: Sequence[int] | Sequence[Sequence[int]],
        *,
        device: torch.device,
    ) -> AdapterSwitch | None:
        """The switch of a forward; None where there is no adapter, or it is on for no token.

        Args:
            adapter: The weights.
            is_on: Whether it is on, for each token.
            mask_places: Place of each masked token, 0 for any other.
            device: Of the forward.
        """
        if adapter is None:
            return None
        on = torch.tensor(is_on)
        if not on.any():
            return None
        places = None
        if adapter.mask_embeddings is not None:
            places = (torch.tensor(mask_places) * on).to(device)
        return cls(adapter, None if on.all() else on[..., None].to(device), places)

    def batched(self) -> AdapterSwitch:
        """The switch [1, T, ...] of tokens [T]."""
        is_on = None if self.is_on is None else self.is_on[None]
        places = None if self.mask_places is None else self.mask_places[None]
        return AdapterSwitch(self.adapter, is_on, places)

    def of_tokens(self, is_real: Tensor) -> AdapterSwitch:
        """The switch of the tokens [P] of a batch [B, T] that are real."""
        is_on = None if self.is_on is None else self.is_on.expand(*is_real.shape, 1)[is_real]
        places = self.mask_places
        places = None if places is None else places.expand_as(is_real)[is_real]
        return AdapterSwitch(self.adapter, is_on, places)

    def embed(self, embeddings: Tensor) -> Tensor:
        """Input embeddings [..., H], with the adapter's own where a token is masked."""
        own = self.adapter.mask_embeddings
        if own is None or self.mask_places is None:
            return embeddings
        rows = own[(self.mask_places - 1).clamp(0, len(own) - 1)].to(embeddings.dtype)
        return torch.where((self.mask_places > 0)[..., None], rows, embeddings)

    def add(self, layer_index: int, target: str, x: Tensor, output: Tensor) -> Tensor:
        """`output` of a linear layer plus the adapter's share of it, where on."""
        pair = self.adapter.find(layer_index, target)
        if pair is None:
            return output
        update = pair(x)
        if self.is_on is not None:  # a choice, not a product: what is off may hold a NaN
            update = torch.where(self.is_on, update, 0)
        return output + update
