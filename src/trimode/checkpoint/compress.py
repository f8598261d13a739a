"""A smaller adapter from a larger one: the best approximation of lower rank of every pair.

Works on the files alone: no network is needed, since an update `B A` is its two factors' business.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimode.checkpoint import whole_folder
from trimode.checkpoint.io import read_json
from trimode.errors import CheckpointError

_CONFIG, _WEIGHTS, _VIEW = (
    *("adapter_config.json", "adapter_model.safetensors"),
    "trimode_view.safetensors",
)

_PLAIN: dict[str, Any] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
"""What else could say how an update is scaled or how wide its pair is."""

_HALF = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / _CONFIG).is_file()


def compress_adapter(
    source: str | Path, destination: str | Path, *, rank: int, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write an adapter of lower rank: each update `B A` cut to its largest singular values.

    The scale stays; all other files are copied.

    Args:
        source: The folder of an adapter.
        destination: A folder, new or empty.
        rank: Of the new one, at most the old one's.
        dtype: Of all tensors on disk; None keeps theirs.

    Returns:
        `pairs`, `rank`, `source_rank`, `kept` (share of the Frobenius norm of all updates),
        `least_kept` and `least_kept_pair`, and `bytes` and `source_bytes` of the tensors.

    Raises:
        CheckpointError: Not an adapter, too high a rank, or a destination in use.
    """
    source, destination = Path(source), Path(destination)
    config = read_json(source / _CONFIG)
    old_rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(old_rank) is not int or not isinstance(alpha, int | float):
        raise CheckpointError(f"{source}: r is {old_rank!r} and lora_alpha {alpha!r}, not numbers")
    for name, plain in _PLAIN.items():
        if config.get(name) not in (None, plain):
            raise CheckpointError(f"{source}: {name} is {config[name]!r}; allowed: {plain!r}")
    if not 1 <= rank <= old_rank:
        raise CheckpointError(f"rank is {rank}; allowed: 1 to {old_rank}, the rank of {source}")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} is in use; give a new or empty folder")
    tensors, metadata = _read(source / _WEIGHTS)
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        match = _HALF.search(name)
        if match is None:
            raise CheckpointError(f"{source}: unexpected tensor {name}")
        halves = pairs[name[: match.start()]]
        if halves.setdefault(match[1], name) != name:
            raise CheckpointError(
                f"{source}: {_WEIGHTS} holds one tensor twice, as {halves[match[1]]} and as {name}"
            )
    if not pairs:
        raise CheckpointError(f"{source}: the adapter holds no tensors")
    new: dict[str, Tensor] = {}
    kept_of: dict[str, tuple[float, float]] = {}
    for stem, halves in pairs.items():
        if set(halves) != {"A", "B"}:
            raise CheckpointError(f"{source}: {stem} is no pair of lora_A and lora_B")
        down, up = (tensors[halves[half]] for half in "AB")
        if not (down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] == old_rank):
            shapes = f"A {list(down.shape)} and B {list(up.shape)}"
            raise CheckpointError(f"{source}: {stem} has {shapes}, which are not of r={old_rank}")
        cut_down, cut_up, kept, whole = truncated(down, up, rank=rank)
        kept_of[stem] = kept, whole
        for half, matrix, old in (("A", cut_down, down), ("B", cut_up, up)):
            new[halves[half]] = matrix.to(dtype or old.dtype).contiguous()
    _publish(
        source,
        destination,
        config=config | {"r": rank, "lora_alpha": _as_int(alpha * rank / old_rank)},
        tensors=new,
        metadata=metadata,
        dtype=dtype,
    )
    shares = {stem: _share(*norms) for stem, norms in kept_of.items()}
    least = min(shares, key=lambda stem: shares[stem])
    kept, whole = (sum(column) for column in zip(*kept_of.values(), strict=True))
    return {
        "pairs": len(pairs),
        "rank": rank,
        "source_rank": old_rank,
        "kept": _share(kept, whole),
        "least_kept": shares[least],
        "least_kept_pair": least,
        "bytes": _num_bytes(new),
        "source_bytes": _num_bytes(tensors),
    }


def truncated(down: Tensor, up: Tensor, *, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of `B A` of a rank, split evenly between its factors.

    The factors are reduced first, `B = Q R` and `A^T = Q' R'`, so that the decomposition is of an
    r x r matrix. In float64. Beyond the rank that a matrix can have, the factors are zero.

    Args:
        down: [r, in]. A.
        up: [out, r]. B.
        rank: k.

    Returns:
        A [k, in] and B [out, k], and the squared Frobenius norms of what is kept and of all.
    """
    out_basis, out_part = torch.linalg.qr(up.double())
    in_basis, in_part = torch.linalg.qr(down.double().mT)
    left, values, right = torch.linalg.svd(out_part @ in_part.mT)
    root = values[:rank].sqrt()
    cut_up = out_basis @ (left[:, :rank] * root)
    cut_down = (right[:rank] * root[:, None]) @ in_basis.mT
    squares, missing = values.square(), max(rank - len(root), 0)
    cut_down = torch.nn.functional.pad(cut_down, (0, 0, 0, missing))
    cut_up = torch.nn.functional.pad(cut_up, (0, missing))
    return cut_down, cut_up, float(squares[:rank].sum()), float(squares.sum())


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(file), dict(metadata)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def _publish(
    source: Path,
    destination: Path,
    *,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    dtype: torch.dtype | None,
) -> None:
    with whole_folder.writing(destination, what="adapter"):
        temporary = whole_folder.start(destination)
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in (_CONFIG, _WEIGHTS):
                shutil.copy(file, temporary / file.name)
        if dtype is not None and (source / _VIEW).is_file():
            beside, of_view = _read(source / _VIEW)
            save_file(
                {name: tensor.to(dtype) for name, tensor in beside.items()},
                temporary / _VIEW,
                metadata=of_view,
            )
        save_file(tensors, temporary / _WEIGHTS, metadata=metadata)
        text = json.dumps(config, indent=2) + "\n"
        (temporary / _CONFIG).write_text(text, encoding="utf-8")
        whole_folder.publish(destination)


def _share(kept: float, whole: float) -> float:
    """Of the norm, from its squares; all of it where there is nothing."""
    return (kept / whole) ** 0.5 if whole else 1.0


def _as_int(value: float) -> float:
    return int(value) if value % 1 == 0 else value


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
