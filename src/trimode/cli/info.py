"""`trimode info`: what a checkpoint is, from its headers alone, and what it would run on."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimode.model import TriModeConfig

NAME = "info"
HELP = "describe a checkpoint and this installation"

_MODEL_CARD = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a name, folder, GGUF file or hub id (default: as of all commands, smollm2 or pocket)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Describe it; weights are not loaded."""
    from trimode.checkpoint.model_cache import default_name, resolve
    from trimode.checkpoint.names import KNOWN

    path = args.path or default_name()
    known = KNOWN.get(path)
    record = describe(resolve(path))
    record["drafter"] = None if known is None or known.drafter is None else str(known.drafter)
    print(json.dumps(record) if args.json else as_text(record))
    return 0


def describe(folder: Path) -> dict[str, Any]:
    """Everything `trimode info` knows about a checkpoint folder, ready for JSON.

    Raises:
        CheckpointError: the folder is not a checkpoint that could be loaded.
    """
    from trimode.checkpoint.generation_defaults import read_generation_defaults
    from trimode.checkpoint.io import check_weights, read_model_config

    config = read_model_config(folder)
    check_weights(folder, config)
    return {
        "path": str(folder),
        "model_type": config.model_type,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "weights": _weights(folder),
        "tokenizer": _tokenizer(folder),
        "special_token_ids": {
            "bos": config.bos_token_id,
            "eos": list(config.eos_token_ids),
            "mask": config.mask_token_id,
        },
        "generation_defaults": read_generation_defaults(folder, config).as_record(),
        "modes": _modes(config),
        "adapters": _adapters(folder),
        "has_model_card": (folder / _MODEL_CARD).is_file(),
        "environment": _environment(),
    }


def as_text(record: dict[str, Any]) -> str:
    """The same for a reader."""
    config, weights, here = record["config"], record["weights"], record["environment"]
    rows = {
        "checkpoint": record["path"],
        "model": f"{record['model_type']}, {config['num_hidden_layers']} layers of"
        f" {config['hidden_size']}, {config['num_attention_heads']} heads"
        f" ({config['num_key_value_heads']} for keys and values) of {config['head_dim']}",
        "context": f"{config['max_position_embeddings']:,} tokens",
        "parameters": f"{weights['parameters']:,}, of them {weights['embedding_parameters']:,} in"
        " embedding and head",
        "on disk": f"{weights['tensors']} tensors in {weights['files']} files,"
        f" {weights['bytes'] / 1e6:,.1f} MB, {' and '.join(weights['dtypes'])}",
        "tokenizer": "none"
        if record["tokenizer"] is None
        else f"{record['tokenizer']['size']:,} tokens ({config['vocab_size']:,} rows)",
        "special ids": ", ".join(f"{k} {v}" for k, v in record["special_token_ids"].items()),
        "chat, serve": _as_defaults(record["generation_defaults"]),
        **{f"mode {name}": _as_words(name, knobs) for name, knobs in record["modes"].items()},
        "drafter": record["drafter"] or "none of its own",
        "adapters": "; ".join(map(_as_use, record["adapters"])) or "none",
        "model card": "yes" if record["has_model_card"] else "none",
        "native step": _as_native(here["native"]),
        "here": f"trimode {here['trimode']}, torch {here['torch']}, transformers"
        f" {here['transformers']}, Python {here['python']}, {here['device']},"
        f" {here['threads']} threads",
    }
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def _adapters(folder: Path) -> list[dict[str, Any]]:
    """Those inside a checkpoint: name, what it is for, and of a drafter how it is used."""
    from trimode.checkpoint.adapter import read_form, read_use

    found = []
    for file in sorted(folder.glob("*/adapter_config.json")):
        use = read_use(file.parent)
        form = asdict(read_form(file.parent)) if use == "drafter" else {}
        found.append({"name": file.parent.name, "use": use, **form})
    return found


def _as_use(adapter: dict[str, Any]) -> str:
    words = [adapter["use"] or "no word of its use"]
    if adapter["use"] == "drafter":
        words = [f"serves {' and '.join(adapter['views'])}"]
        words.append(f"drafts as {', then '.join(adapter['draft_forms'])}")
    return f"{adapter['name']} ({', '.join(words)})"


def _weights(folder: Path) -> dict[str, Any]:
    """Counts from the safetensors headers."""
    from trimode.checkpoint.io import read_headers

    stored = read_headers(folder)
    files = {tensor.file for tensor in stored.values()}
    sizes = {name: math.prod(tensor.shape) for name, tensor in stored.items()}
    dtypes: Counter[str] = Counter()
    for name, tensor in stored.items():
        dtypes[tensor.dtype] += sizes[name]
    outer = ("encoder.embed_tokens.weight", "diffusion_head.weight")
    return {
        "parameters": sum(sizes.values()),
        "embedding_parameters": sum(sizes.get(name, 0) for name in outer),
        "tensors": len(sizes),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "dtypes": [dtype for dtype, _ in dtypes.most_common()],
    }


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    from trimode.checkpoint.io import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    return {"size": len(tokenizer), "class": type(tokenizer).__name__}


def _modes(config: TriModeConfig) -> dict[str, dict[str, Any]]:
    """What each mode does when nothing is asked for; a null threshold in `linear`: one pass. Of
    `auto` the longest block and the most branches that it picks."""
    from trimode.decoding.params import MODE_NAMES, GenerationParams

    knobs = {}
    for mode in MODE_NAMES:
        size = config.block_size
        params = GenerationParams(mode=mode, max_new_tokens=1, block_length=size, seed=0)
        knobs[mode] = {
            "block_length": None if mode == "ar" else size,
            "threshold": params.reveal_threshold(mode) if mode == "diffusion" else params.threshold,
            "branches": params.setting(mode).num_groups or None,
            "temperature": params.temperature,
        }
    return knobs


def _as_words(mode: str, knobs: dict[str, Any]) -> str:
    given = {k: v for k, v in knobs.items() if v is not None}
    if mode == "auto":
        given |= {k: f"up to {given[k]}" for k in ("block_length", "branches")}
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in given.items())


def _as_defaults(defaults: dict[str, Any]) -> str:
    """What `generation_config.json` says, for a reader."""
    named = {name.replace("_", " "): value for name, value in defaults.items()}
    unread = named.pop("unread", [])
    words = [f"{name} {value}" for name, value in named.items()]
    if unread:
        words.append(f"not used: {', '.join(unread)}")
    return ", ".join(words) or "no generation_config.json, or nothing in it"


def _native() -> dict[str, Any]:
    """What networks on the CPU run on; compiles it if that was not done yet."""
    from trimode.model.native import library
    from trimode.model.native.threads import num_threads

    status = library.status()
    found = status.library
    return {
        "instruction_set": None if found is None else found.name,
        "compiler": None if found is None else found.compiler,
        "path": None if found is None else str(found.path),
        "source_hash": library.source_hash(),
        "why": status.why,
        "threads": num_threads(),
    }


def _as_native(native: dict[str, Any]) -> str:
    if native["instruction_set"] is None:
        return f"not in use: {native['why']}"
    return (
        f"{native['instruction_set']}, {native['why']}; {native['threads']} threads;"
        f" {native['compiler']}; {native['path']}"
    )


def _environment() -> dict[str, Any]:
    import platform

    import torch
    import transformers

    from trimode._version import __version__

    has_cuda = torch.cuda.is_available()
    return {
        "native": _native(),
        "trimode": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if has_cuda else "cpu",
        "threads": torch.get_num_threads(),
    }
