"""PEFT's side of a LoRA folder: `adapter_config.json`, and the names of the tensors.

A LoRA that PEFT trained on the source of a converted model has the source's names. Both names of a
linear layer lead to the same place here. PEFT itself is not needed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.checkpoint import key_maps
from trimode.checkpoint.io import read_json
from trimode.errors import CheckpointError
from trimode.model.adapter import MLP_TARGETS, TARGETS

REMEDY = "merge it into its base with PEFT's merge_and_unload, and convert the merged model"
"""What to do with an adapter that is more than LoRA on the layers' projections."""

PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
}
"""LoRA variants that would change the arithmetic, and the values that leave them off."""

WRITTEN: dict[str, Any] = {
    **{name: allowed[0] for name, allowed in PLAIN.items()},
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "exclude_modules": None,
}
"""Fields of an adapter of ours beside its rank and scale."""

_ENCODERS = sorted(
    {"encoder.", "model.encoder.", ""}
    | {layout.encoder for layout in (*key_maps.TEXT_LAYOUTS, *key_maps.VISION_LAYOUTS)}
)
"""Where a base keeps its layers: ours, as `convert` finds them, or a base without its head."""

_NAME = re.compile(
    r"(?:base_model\.model\.)?"
    rf"(?P<module>(?:{'|'.join(map(re.escape, _ENCODERS))})"
    r"layers\.(?P<layer>\d+)\.(?P<part>self_attn|mlp)\.(?P<target>\w+))"
    r"\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)

_OTHERS = {
    r"\.lora_embedding_[AB]|\.embed_tokens\.(?:lora_|base_layer)": "LoRA of an embedding",
    r"\.(?:lm_head|diffusion_head)\.(?:lora_|base_layer)": "LoRA of the head",
    r"\.lora_magnitude_vector": "DoRA",
    r"\.token_adapter\.|trainable_tokens_": "trained tokens",
    r"\.(?:qkv_proj|gate_up_proj|query_key_value)\.": "a fused projection, which we split",
    r"\.(?:embed_tokens|lm_head|diffusion_head)\.": "whole rows, perhaps of a resized base",
    r"\.bias$": "a bias",
    r"vision_tower|multi_modal_projector": "of the vision part, which is not converted",
}
"""Tensors that are no LoRA of a projection, and what they are."""


@dataclass(frozen=True, slots=True)
class LoraName:
    """Where a tensor of an adapter belongs.

    Attributes:
        layer, target: The linear layer; target is from `TARGETS`.
        half: `A` or `B`.
        module: The layer's name in the base that PEFT had; patterns match it.
    """

    layer: int
    target: str
    half: str
    module: str


def parse_name(name: str) -> LoraName | None:
    """The place of a tensor, None if it is not LoRA on a projection of a layer."""
    match = _NAME.fullmatch(name)
    if match is None or match["target"] not in TARGETS:
        return None
    if (match["part"] == "mlp") != (match["target"] in MLP_TARGETS):
        return None
    return LoraName(int(match["layer"]), match["target"], match["half"], match["module"])


def describe(name: str) -> str:
    """What a tensor is that `parse_name` does not place; empty if nothing is known of it."""
    found = (what for pattern, what in _OTHERS.items() if re.search(pattern, name))
    what = next(found, "")
    return f" ({what})" if what else ""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What `adapter_config.json` says of ranks and scales.

    Attributes:
        folder: The adapter's.
        rank, alpha: r and lora_alpha, of every layer that no pattern matches.
        is_rank_stabilised: The scale is alpha / sqrt(r), not alpha / r (Kalajdzievski 2023, arXiv
            2312.03732).
        rank_pattern, alpha_pattern: Regular expression of module names -> rank or alpha there.
        target_modules: Names or ends of names; None where they are a regular expression.
    """

    folder: Path
    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str] | None

    def rank_of(self, module: str) -> int:
        """r of one linear layer."""
        rank: int = _by_pattern(self.rank_pattern, module, self.rank)
        return rank

    def scale_of(self, module: str) -> float:
        """What the update of one linear layer is multiplied with."""
        rank = self.rank_of(module)
        alpha: float = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_peft_config(folder: Path, *, remedy: str) -> PeftConfig:
    """Read `adapter_config.json`.

    Args:
        folder: The adapter's.
        remedy: What to do with an adapter of another kind, for the message.

    Raises:
        CheckpointError: It is not a plain LoRA, or its numbers are none.
    """
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder}: peft_type is {config.get('peft_type')!r}; allowed: 'LORA'{remedy}"
        )
    for name, allowed in PLAIN.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(
                f"{folder}: {name} is {config[name]!r}; allowed: {allowed[0]!r}{remedy}"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not _is_number(alpha):
        raise CheckpointError(f"{folder}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers")
    is_rank_stabilised = config.get("use_rslora") or False
    if not isinstance(is_rank_stabilised, bool):
        raise CheckpointError(
            f"{folder}: use_rslora is {is_rank_stabilised!r}; allowed: true, false"
        )
    named = config.get("target_modules")
    return PeftConfig(
        folder=folder,
        rank=rank,
        alpha=float(alpha or 0),
        is_rank_stabilised=is_rank_stabilised,
        rank_pattern=_read_pattern(config, "rank_pattern", folder),
        alpha_pattern=_read_pattern(config, "alpha_pattern", folder),
        target_modules=named if isinstance(named, list) else None,
    )


def _read_pattern(config: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    pattern = config.get(name) or {}
    is_rank = name == "rank_pattern"
    for key, value in pattern.items() if isinstance(pattern, dict) else [("", None)]:
        is_good = type(value) is int and value >= 1 if is_rank else _is_number(value)
        try:
            re.compile(_at_end(key))
        except re.error:
            is_good = False
        if not is_good:
            raise CheckpointError(
                f"{folder}: {name} is {pattern!r}; allowed: regular expressions of module names,"
                f" each with {'a rank of at least 1' if is_rank else 'a number'}"
            )
    return pattern


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _by_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT does."""
    for key, value in pattern.items():
        if re.match(_at_end(key), module):
            return value
    return default


def _at_end(key: str) -> str:
    return rf"(.*\.)?({key})$"
