"""Adapters on disk: PEFT LoRA folders (`adapter_config.json`, `adapter_model.safetensors`).

PEFT itself is not needed to read or write them. What PEFT has no word for lies in files of its own
beside these, so that it opens the LoRA part: how the adapter is to be used (`trimode_view.json`,
the fields of `AdapterForm`), its mask embeddings and corrector (`trimode_view.safetensors`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from trimode.checkpoint import whole_folder
from trimode.checkpoint.io import read_json
from trimode.checkpoint.peft_config import REMEDY, WRITTEN, describe, parse_name, read_peft_config
from trimode.errors import CheckpointError, ConfigError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import (
    MLP_TARGETS,
    PUBLISHED_FORM,
    AdapterForm,
    LoraPair,
    linear_of,
    merge,
)
from trimode.model.corrector import Corrector

_USE = "trimode_use"
"""Key of the tensors' metadata that says what an adapter is for; absent in those of others."""

_PUBLISHED_DRAFTER = "linear_spec_lora"

_VIEW_FORMAT = 1
"""Of `trimode_view.json`; raised when an older reader would misread it."""

_OTHER_FILES = ("adapter_model.bin", "adapter_model.safetensors.index.json")

_PLACE = "position - anchor"
"""What row p - 1 of the mask embeddings is for; the only meaning there is."""


def find_adapter(name: str | Path, *, checkpoint: Path) -> Path:
    """The folder of an adapter: a path, or the name of a folder inside the checkpoint's.

    Raises:
        CheckpointError: it is neither.
    """
    for folder in (Path(name), checkpoint / name):
        if folder.is_dir():
            return folder
    inside = sorted(file.parent.name for file in checkpoint.glob("*/adapter_config.json"))
    there = f"which has {', '.join(inside) or 'none'}"
    raise CheckpointError(f"adapter {name}: no such folder, here or in {checkpoint}, {there}")


def load_adapter(
    folder: str | Path, *, model: TriModeModel, dtype: torch.dtype | None = None
) -> DrafterAdapter:
    """Read an adapter for `model`, on its device and in its dtype, or in `dtype`.

    Raises:
        CheckpointError: it is not a plain LoRA, or does not fit the network.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"adapter {folder}: no such folder")
    config = read_peft_config(folder, remedy=_remedy(folder))
    pairs, modules = _read_pairs(folder)
    named, found = config.target_modules, {target for _, target in pairs}
    if named is not None and not found <= set(named) | {name.split(".")[-1] for name in named}:
        raise CheckpointError(
            f"{folder}: target_modules is {named}, but there are tensors of {sorted(found)}"
        )
    _check_width(folder, _widths(pairs), model)
    form, num_candidates = _read_view(folder)
    tensors = _read_view_tensors(folder, model=model, has_corrector=num_candidates is not None)
    corrector = None
    if num_candidates is not None:
        parts = (tensors[f"corrector.{name}"] for name in _CORRECTOR)
        corrector = Corrector(*parts, num_candidates=num_candidates)
    adapter = DrafterAdapter(
        {
            key: LoraPair(
                *_matrices(key, halves, config.rank_of(modules[key]), model, folder),
                config.scale_of(modules[key]),
            )
            for key, halves in pairs.items()
        },
        form=form,
        mask_embeddings=tensors.get("mask_embeddings"),
        corrector=corrector,
    )
    adapter = adapter.to(device=model.device, dtype=dtype or model.dtype)
    return adapter.eval().requires_grad_(False)


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, *, use: str) -> None:
    """Write `adapter_model.safetensors`, with what it is for (`lora` or `drafter`) beside it."""
    metadata = {"format": "pt", _USE: use}
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)


def read_use(folder: Path) -> str | None:
    """What an adapter is for, `lora` or `drafter`; None where nothing tells."""
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
            found: str | None = (tensors.metadata() or {}).get(_USE)
    except (SafetensorError, OSError):
        return None  # whoever reads the tensors says what is wrong
    return "drafter" if found is None and folder.name == _PUBLISHED_DRAFTER else found


def read_form(folder: Path) -> AdapterForm:
    """How a drafter is to be used.

    Raises:
        CheckpointError: its `trimode_view.json` is not as this version writes it.
    """
    return _read_view(folder)[0]


def check_use(folder: Path, use: str) -> None:
    """Refuse a drafter as `lora`, which would colour the AR view, and a LoRA as `drafter`.

    Raises:
        CheckpointError: it is for the other use, as far as can be told.
    """
    found = read_use(folder)
    if found not in (None, use):
        raise CheckpointError(f"{folder} is a {found}, and was given as {use}; give it as {found}")


def merge_lora(folder: str | Path, *, model: TriModeModel) -> None:
    """Add the LoRA of a folder into the weights of `model`, for every view.

    Raises:
        CheckpointError: it is a drafter, is not a plain LoRA, or does not fit the network.
    """
    check_use(Path(folder), "lora")
    dtype = torch.promote_types(model.dtype, torch.float32)
    merge(load_adapter(folder, model=model, dtype=dtype), model.encoder.layers)


def save_adapter(
    adapter: DrafterAdapter, folder: str | Path, *, dtype: torch.dtype, base: str | None = None
) -> None:
    """Write `folder` anew; an older one is replaced only once the new one is complete.

    Args:
        adapter: All its pairs have one rank and one scale. It is not changed.
        folder: Where to, e.g. `<run>/linear_spec_lora`.
        dtype: Of the tensors on disk; the published adapters have float32.
        base: The checkpoint it is for, as PEFT's `base_model_name_or_path`.
    """
    folder = Path(folder)
    tensors: dict[str, torch.Tensor] = {}
    for layer_index, target, pair in adapter.items():
        part = "mlp" if target in MLP_TARGETS else "self_attn"
        stem = f"base_model.model.encoder.layers.{layer_index}.{part}.{target}"
        for half, matrix in (("A", pair.down), ("B", pair.up)):
            on_disk = matrix.detach().to("cpu", dtype, copy=True).contiguous()
            tensors[f"{stem}.lora_{half}.weight"] = on_disk
    shapes = {(pair.down.shape[0], pair.scale) for _, _, pair in adapter.items()}
    assert len(shapes) == 1, f"pairs of different rank or scale: {shapes}"
    rank, scale = shapes.pop()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(rank * scale) if rank * scale % 1 == 0 else rank * scale,
        "target_modules": sorted({target for _, target, _ in adapter.items()}),
        "lora_dropout": 0.0,
        "inference_mode": True,
        **WRITTEN,
    }
    temporary = whole_folder.start(folder)
    save_tensors(tensors, temporary, use="drafter")
    text = json.dumps(config, indent=2) + "\n"
    (temporary / "adapter_config.json").write_text(text, encoding="utf-8")
    _write_view(adapter, temporary, dtype=dtype)
    whole_folder.publish(folder)


_CORRECTOR = ("before", "state", "candidate")
"""Tensors of a corrector, `corrector.<name>` on disk, [r, H] each."""


def _write_view(adapter: DrafterAdapter, folder: Path, *, dtype: torch.dtype) -> None:
    """What PEFT has no word for; nothing for an adapter as the published one is."""
    tensors: dict[str, torch.Tensor] = {}
    if adapter.mask_embeddings is not None:
        tensors["mask_embeddings"] = adapter.mask_embeddings
    corrector = adapter.corrector
    if corrector is not None:
        tensors |= {f"corrector.{name}": getattr(corrector, name) for name in _CORRECTOR}
    if tensors:
        on_disk = {
            name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(on_disk, folder / "trimode_view.safetensors", metadata={"format": "pt"})
    if tensors or adapter.form != PUBLISHED_FORM:
        view = {
            "format": _VIEW_FORMAT,
            **asdict(adapter.form),
            "place": _PLACE,
            "corrector_candidates": None if corrector is None else corrector.num_candidates,
        }
        text = json.dumps(view, indent=2) + "\n"
        (folder / "trimode_view.json").write_text(text, encoding="utf-8")


def _read_view(folder: Path) -> tuple[AdapterForm, int | None]:
    """The form of an adapter, and the candidates of its corrector if it has one."""
    file = folder / "trimode_view.json"
    if not file.exists():
        return PUBLISHED_FORM, None
    view = read_json(file)
    names = {field.name for field in fields(AdapterForm)}
    unknown = set(view) - names - {"format", "place", "corrector_candidates"}
    if view.get("format") != _VIEW_FORMAT or unknown:
        raise CheckpointError(
            f"{file}: format is {view.get('format')!r} with keys {sorted(unknown)} that are not"
            f" known; allowed: format {_VIEW_FORMAT}, as this version writes it"
        )
    if view.get("place", _PLACE) != _PLACE:
        raise CheckpointError(f"{file}: place is {view['place']!r}; allowed: {_PLACE!r}")
    num_candidates = view.get("corrector_candidates")
    if num_candidates is not None and (type(num_candidates) is not int or num_candidates < 1):
        raise CheckpointError(
            f"{file}: corrector_candidates is {num_candidates!r}; allowed: null, or at least 1"
        )
    given: dict[str, Any] = {name: view[name] for name in names if name in view}
    for name in ("views", "draft_forms"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    if isinstance(given.get("acceptance"), list):
        given["acceptance"] = tuple(
            tuple(one) if isinstance(one, list) else one for one in given["acceptance"]
        )
    try:
        return AdapterForm(**given), num_candidates
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _read_view_tensors(
    folder: Path, *, model: TriModeModel, has_corrector: bool
) -> dict[str, torch.Tensor]:
    """Mask embeddings and corrector, of the shapes that the network asks for."""
    file = folder / "trimode_view.safetensors"
    expected = {f"corrector.{name}" for name in _CORRECTOR} if has_corrector else set()
    tensors = _read_tensors(file) if file.exists() else {}
    if not expected <= set(tensors) or not set(tensors) <= expected | {"mask_embeddings"}:
        raise CheckpointError(
            f"{file} holds {sorted(tensors) or 'nothing'}; expected {sorted(expected)}, and perhaps"
            " mask_embeddings"
        )
    hidden = model.config.hidden_size
    _check_width(
        folder, {tensor.shape[1] for tensor in tensors.values() if tensor.ndim == 2}, model
    )
    ranks = {tensors[name].shape[0] for name in expected if tensors[name].ndim == 2}
    for name, tensor in tensors.items():
        is_good = tensor.ndim == 2 and len(tensor) > 0 and tensor.shape[1] == hidden
        if not (is_good and tensor.is_floating_point()) or len(ranks) > 1:
            raise CheckpointError(
                f"{file}: {name} is {list(tensor.shape)} of {tensor.dtype}; expected floats,"
                f" [any, {hidden}], of one rank in a corrector"
            )
    return tensors


Pairs = dict[tuple[int, str], dict[str, torch.Tensor]]
"""Layer index and target -> the halves `A` and `B`."""


def _read_pairs(folder: Path) -> tuple[Pairs, dict[tuple[int, str], str]]:
    """The tensors by layer and target, and the module's name in PEFT's base for each."""
    pairs: Pairs = {}
    modules: dict[tuple[int, str], str] = {}
    names: dict[tuple[int, str, str], str] = {}
    for name, tensor in _read_tensors(folder / "adapter_model.safetensors").items():
        place = parse_name(name)
        if place is None:
            raise CheckpointError(
                f"{folder}: unexpected tensor {name}{describe(name)}{_remedy(folder)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{folder}: tensor {name} is of {tensor.dtype}; allowed: a floating-point type"
            )
        key = place.layer, place.target
        other = names.setdefault((*key, place.half), name)
        if other != name:
            raise CheckpointError(
                f"{folder}: adapter_model.safetensors holds one tensor twice, as {other} and as"
                f" {name}"
            )
        pairs.setdefault(key, {})[place.half] = tensor
        modules[key] = place.module
    if not pairs:
        raise CheckpointError(f"{folder}: the adapter holds no tensors")
    return pairs, modules


def _remedy(folder: Path) -> str:
    """What to do with a folder that is not plain LoRA; a drafter has no base to merge it into."""
    return "" if read_use(folder) == "drafter" else f"; {REMEDY}"


def _widths(pairs: Pairs) -> set[int]:
    """Hidden sizes that the tensors ask for."""
    widths = set()
    for (_, target), halves in pairs.items():
        half, axis = ("B", 0) if target in ("o_proj", "down_proj") else ("A", 1)
        if half in halves and halves[half].ndim == 2:
            widths.add(halves[half].shape[axis])
    return widths


def _check_width(folder: Path, widths: set[int], model: TriModeModel) -> None:
    """Refuse an adapter all of whose tensors are of one other width."""
    hidden = model.config.hidden_size
    if len(widths) == 1 and widths != {hidden}:
        raise CheckpointError(
            f"{folder} is made for another model: width {widths.pop()}, this one {hidden}"
        )


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.exists():
        others = [name for name in _OTHER_FILES if (file.parent / name).exists()]
        found = f", only {others[0]}, which is not opened" if others else ""
        raise CheckpointError(f"{file.parent} has no {file.name}{found}")
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
            f"{folder} is made for another model: it has {name}, but the model has"
            f" {len(model.encoder.layers)} layers"
        )
    if set(halves) != {"A", "B"}:
        raise CheckpointError(f"{folder}: {name} has lora_{''.join(halves)} only; expected A and B")
    linear = linear_of(model.encoder.layers[layer_index], target)
    down, up = halves["A"], halves["B"]
    found = [list(down.shape), list(up.shape)]
    expected = [[rank, linear.in_features], [linear.out_features, rank]]
    if found != expected:
        raise CheckpointError(
            f"{folder}: {name} has A {found[0]} and B {found[1]}; expected {expected[0]} and"
            f" {expected[1]} at r={rank}"
        )
    return down, up
