"""Turning an autoregressive checkpoint into a tri-mode one, proved before it is kept.

Open the source, choose a mask token, map every tensor, copy shard by shard, and prove the result:
`convert` is the whole story, and what the steps need is in `source`, `mask_token` and `proof`. What
families there are and what they call things is in `key_maps`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from trimode.checkpoint import gguf_file, io, key_maps, whole_folder
from trimode.checkpoint.generation_defaults import FILE_NAME as GENERATION_DEFAULTS
from trimode.checkpoint.mask_token import MaskToken, choose_mask_token
from trimode.checkpoint.names import KNOWN, find_source
from trimode.checkpoint.proof import prove, prove_tokenizer
from trimode.checkpoint.source import Source, open_source
from trimode.errors import CheckpointError, ConfigError, UnsupportedError
from trimode.model import NemotronLabsDiffusionConfig, TriModeConfig
from trimode.model.modeling import MODEL_CLASSES

VERSION = 1
"""Grows when the same source gives another result; the cache of named models goes by it."""

ROW_MULTIPLE = 64
UNPACKED = "unpacked"
"""Folder for what a GGUF file holds; gone when the result is complete."""

_LIBRARIES = (torch, transformers, safetensors)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    block_length: int = 32,
    mask_token: str | None = None,
    untie: bool = False,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    proof_dtype: str = "float32",
    max_context: int | None = None,
    on_plan: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Write a tri-mode checkpoint whose AR view computes what the source computes.

    Args:
        source: A folder or hub id of a Llama, Mistral, Ministral 3, Qwen2 or Qwen3 checkpoint; or a
            GGUF file, a folder with nothing but one, or a name of `names.KNOWN`.
        destination: A folder that does not exist or is empty; it appears complete or not at all.
        block_length: Default diffusion block length of the result.
        mask_token: A token or a token id of the vocabulary; None chooses one.
        untie: Write a copy of the embedding as the head where the source ties the two. The result
            may then have the published type, which has no tied head.
        dtype: Element type to write; None keeps that of each tensor, and is float32 for a GGUF
            file, whose dequantised weights are then exact.
        max_shard_size: Such as "5GB"; one shard at most is in memory while copying.
        proof_dtype: Element type of the proof, which holds one network of the source's size.
        max_context: Positions of the result, for a source with a sliding window shorter than its
            context; within the window the two agree. None keeps the source's.
        on_plan: Called with the record, all but its `proof`, before weights are read.

    Returns:
        The record that is also written to `conversion.json`.

    Raises:
        CapacityError: the disk is full.
        CheckpointError: the source is damaged, of another kind, or the proof failed.
        ConfigError: an argument is not valid.
        UnsupportedError: the source computes something that our network does not.
    """
    place, target = _find(source), Path(destination).resolve()
    if target == place.resolve():
        raise CheckpointError(f"{destination} is the source itself; give another folder")
    proved_in = io.as_dtype(proof_dtype)
    written_in = None if dtype is None else io.as_dtype(dtype)
    for name, number in (("block_length", block_length), ("max_context", max_context)):
        if not isinstance(number, int | None) or isinstance(number, bool):
            raise ConfigError(f"{name} is {number!r}; allowed: an integer")
    with (
        io.fresh_folder(target) as partial,
        _as_folder(place, partial, max_context=max_context) as folder,
    ):
        opened = open_source(folder, max_context=max_context)
        if max_context is not None and max_context < block_length:
            raise ConfigError(
                f"max_context is {max_context}; allowed: at least the block length, {block_length}"
            )
        mask = choose_mask_token(mask_token, opened)
        is_tied = opened.is_tied and not untie
        config = our_config(opened, mask, block_length=block_length, is_tied=is_tied)
        mapping = map_tensors(opened, config)
        record = {"source": str(source)} | make_record(opened, mask, config, mapping, written_in)
        if on_plan is not None:
            on_plan(record)
        with whole_folder.writing(target, what="checkpoint"):
            write_weights(opened, partial, record["tensors"], max_shard_size=max_shard_size)
            config.dtype = record["tensors"][0]["dtype"]
            config.save_pretrained(partial)
            if opened.tokenizer is not None:
                if max_context is not None:
                    length = min(opened.tokenizer.model_max_length, max_context)
                    opened.tokenizer.model_max_length = length
                opened.tokenizer.save_pretrained(partial)
        if opened.tokenizer is not None:
            prove_tokenizer(opened, partial, mask)
        record["proof"] = prove(opened, partial, written_in=written_in, proved_in=proved_in)
        with whole_folder.writing(target, what="checkpoint"):
            if (folder / GENERATION_DEFAULTS).exists():
                shutil.copyfile(folder / GENERATION_DEFAULTS, partial / GENERATION_DEFAULTS)
            (partial / "conversion.json").write_text(json.dumps(record, indent=2) + "\n")
            shutil.rmtree(partial / UNPACKED, ignore_errors=True)
            whole_folder.settle(partial)
    return record


def _find(source: str | Path) -> Path:
    """The source's folder, or its GGUF file."""
    if isinstance(source, str) and source in KNOWN:
        return find_source(source)
    file = gguf_file.find_gguf(source)
    if file is not None:
        return file
    folder = io.resolve(source)
    return gguf_file.find_gguf(folder) or folder


@contextmanager
def _as_folder(place: Path, partial: Path, *, max_context: int | None) -> Iterator[Path]:
    """The source as a folder; a GGUF file is unpacked within, and errors name the file."""
    if not gguf_file.is_gguf(place):
        yield place
        return
    folder = partial / UNPACKED
    try:
        with whole_folder.writing(partial.with_suffix(""), what="checkpoint"):
            gguf_file.unpack(place, folder, max_context=max_context)
        yield folder
    except (CheckpointError, ConfigError, UnsupportedError) as error:
        raise type(error)(str(error).replace(str(folder), str(place))) from error


def our_config(
    source: Source, mask: MaskToken, *, block_length: int, is_tied: bool = False
) -> TriModeConfig:
    """The result's configuration, of the published type where that can express it.

    Rows beyond the last token are padding and never chosen; new rows fill up to a multiple of 64.
    """
    theirs, family = source.config, key_maps.FAMILIES[source.config.model_type]
    num_rows = theirs.vocab_size
    num_tokens = num_rows
    if source.tokenizer is not None:
        num_tokens = max({*source.tokenizer.get_vocab().values(), *source.special_ids}) + 1
    if mask.token_id >= num_rows:
        num_tokens = max(num_tokens, mask.token_id + 1)
        num_rows = -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    rope = {name: value for name, value in theirs.rope_parameters.items() if name != "type"}
    if rope["rope_type"] == "yarn" and rope["factor"] is None:  # follows from the whole context
        rope["factor"] = theirs.max_position_embeddings / rope["original_max_position_embeddings"]
    fields = {name: getattr(theirs, name) for name in (*key_maps.SHARED_FIELDS, *family.read)}
    fields |= family.fixed | {
        "vocab_size": num_rows,
        "max_position_embeddings": source.context,
        "num_valid_tokens": num_tokens if num_tokens < num_rows else None,
        "head_dim": getattr(theirs, "head_dim", None),
        "rope_parameters": rope,
        "eos_token_id": source.eos_token_id,
        "mask_token_id": mask.token_id,
        "block_size": block_length,
        "tie_word_embeddings": is_tied,
    }
    config = TriModeConfig(**fields)
    if config.is_published_shape:
        config = NemotronLabsDiffusionConfig(**fields)
    config.architectures = [MODEL_CLASSES[config.model_type].__name__]
    return config


def map_tensors(source: Source, config: TriModeConfig) -> dict[str, str]:
    """Our name -> the source's, for every tensor of the result that is stored.

    A tied head that is not to stay tied is the embedding.

    Raises:
        CheckpointError: tensors of the source are missing, extra or misshapen.
        UnsupportedError: a tensor is not of floats.
    """
    layout = source.layout
    ours = io.expected_shapes(config)
    mapping = {name: layout.encoder + name.removeprefix("encoder.") for name in ours}
    mapping[key_maps.HEAD] = layout.embedding if source.is_tied else layout.head
    if config.tie_word_embeddings:
        del mapping[key_maps.HEAD]
    expected = {theirs: ours[name] for name, theirs in mapping.items()}
    for name in expected.keys() & {layout.embedding, layout.head}:
        expected[name] = (source.config.vocab_size, config.hidden_size)
    found = {n: stored.shape for n, stored in source.stored.items() if not is_ignored(n, source)}
    io.compare_shapes(source.folder, found=found, expected=expected)
    for name in found:
        if source.stored[name].dtype not in key_maps.DTYPES:
            raise UnsupportedError(
                f"{source.folder}: {name} is of type {source.stored[name].dtype}; "
                f"allowed: {', '.join(key_maps.DTYPES)}"
            )
    return mapping


def is_ignored(name: str, source: Source) -> bool:
    """Whether a tensor of the source is rightly left behind."""
    is_vision = source.is_vision and key_maps.VISION_TENSORS.match(name)
    return bool(is_vision or key_maps.ROTARY_CONSTANTS.search(name))


def write_weights(
    source: Source, folder: Path, tensors: list[dict[str, Any]], *, max_shard_size: str
) -> None:
    """Copy the tensors of a record, one shard at a time; new rows are the mean of the old ones."""
    plan = {tensor["name"]: tensor for tensor in tensors}

    def load(name: str) -> Tensor:
        theirs, dtype = plan[name]["source"], getattr(torch, plan[name]["dtype"])
        with safe_open(source.stored[theirs].file, framework="pt") as stored:
            tensor = stored.get_tensor(theirs)
        if num_new := plan[name]["shape"][0] - tensor.shape[0]:
            mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
            tensor = torch.cat((tensor, mean.expand(num_new, -1)))
        return tensor.to(dtype, copy=True)  # a tied head must not share the embedding's memory

    sizes = {
        name: math.prod(tensor["shape"]) * getattr(torch, tensor["dtype"]).itemsize
        for name, tensor in plan.items()
    }
    io.save_tensors(folder, sizes, load=load, max_shard_size=max_shard_size)


def make_record(
    source: Source,
    mask: MaskToken,
    config: TriModeConfig,
    mapping: dict[str, str],
    written_in: torch.dtype | None,
) -> dict[str, Any]:
    """What `conversion.json` says, but for the proof and the source's path."""
    expected = io.expected_shapes(config)
    shapes = {name: list(expected[name]) for name in mapping}
    kept = {name: key_maps.DTYPES[source.stored[theirs].dtype] for name, theirs in mapping.items()}
    return {
        "source_model_type": source.model_type,
        "model_type": config.model_type,
        "parameters": sum(map(math.prod, shapes.values())),
        "vocab_size": config.vocab_size,
        "num_valid_tokens": config.num_valid_tokens,
        "num_new_rows": config.vocab_size - source.config.vocab_size,
        "block_size": config.block_size,
        "context": source.context,
        "source_context": source.config.max_position_embeddings,
        "head": _head(source, config),
        "has_tokenizer": source.tokenizer is not None,
        "mask_token": asdict(mask),
        "tensors": [
            {"source": theirs, "name": name, "shape": shapes[name]}
            | {"dtype": str(written_in or kept[name]).removeprefix("torch.")}
            for name, theirs in mapping.items()
        ],
        "ignored": sorted(name for name in source.stored if is_ignored(name, source)),
        "versions": {library.__name__: library.__version__ for library in _LIBRARIES},
    }


def _head(source: Source, config: TriModeConfig) -> str:
    """How the head came by its weights."""
    if config.tie_word_embeddings:
        return "tied to the embedding"
    return "a copy of the embedding" if source.is_tied else "its own"
