"""Reading a drafter adapter from a PEFT LoRA folder (`adapter_config.json`,
`adapter_model.safetensors`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trimode.checkpoint.io import read_json
from trimode.errors import CheckpointError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import TARGETS, LoraPair

_NAME = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight$")

_PLAIN: dict[str, tuple[Any, Any]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
}
"""LoRA variants that would change the arithmetic, and the values that leave them off."""


def load_adapter(folder: str | Path, *, model: TriModeModel) -> DrafterAdapter:
    """Read an adapter for `model`, on its device and in its dtype.

    Raises:
        CheckpointError: it is not a plain LoRA, or does not fit the network.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"drafter {folder}: no such folder")
    config = read_json(folder / "adapter_config.json")
    rank, scale = _rank_and_scale(config, folder)
    pairs: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in _read_tensors(folder / "adapter_model.safetensors").items():
        match = _NAME.search(name)
        if match is None or match[2] not in TARGETS:
            raise CheckpointError(f"{folder}: unexpected tensor {name}")
        pairs.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    if not pairs:
        raise CheckpointError(f"{folder}: the adapter holds no tensors")
    weight = model.encoder.embed_tokens.weight
    adapter = DrafterAdapter(
        {
            key: LoraPair(*_matrices(key, halves, rank, model, folder), scale)
            for key, halves in pairs.items()
        }
    )
    return adapter.to(device=weight.device, dtype=weight.dtype).eval().requires_grad_(False)


def _rank_and_scale(config: dict[str, Any], folder: Path) -> tuple[int, float]:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder}: peft_type is {config.get('peft_type')!r}; allowed: 'LORA'"
        )
    for name, allowed in _PLAIN.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(f"{folder}: {name} is {config[name]!r}; allowed: {allowed[0]!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{folder}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers")
    return rank, alpha / rank


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.exists():
        raise CheckpointError(f"{file.parent} has no {file.name}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def _matrices(
    key: tuple[int, str],
    halves: dict[str, torch.Tensor],
    rank: int,
    model: TriModeModel,
    folder: Path,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of one layer, of the shapes that the layer and `r` ask for."""
    layer_index, target = key
    name = f"layer {layer_index} {target}"
    if layer_index >= len(model.encoder.layers):
        raise CheckpointError(
            f"{folder}: {name}, but the model has {len(model.encoder.layers)} layers"
        )
    if set(halves) != {"A", "B"}:
        raise CheckpointError(f"{folder}: {name} has lora_{''.join(halves)} only; expected A and B")
    layer = model.encoder.layers[layer_index]
    linear = getattr(layer.self_attn, target, None) or getattr(layer.mlp, target)
    down, up = halves["A"], halves["B"]
    found = [list(down.shape), list(up.shape)]
    expected = [[rank, linear.in_features], [linear.out_features, rank]]
    if found != expected:
        raise CheckpointError(
            f"{folder}: {name} has A {found[0]} and B {found[1]}; expected {expected[0]} and"
            f" {expected[1]} at r={rank}"
        )
    return down, up
