"""Opening a checkpoint that is to be converted: everything but its weights.

What our network cannot be is refused here. Which families there are is in `key_maps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from trimode.checkpoint import io, key_maps
from trimode.errors import CheckpointError, ConfigError, UnsupportedError

_WINDOWED = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source.

    Attributes:
        folder, model_type: Where it is, and what it calls itself.
        config: transformers' configuration, of the text part if there is vision too.
        is_vision, is_tied: Whether it is a vision layout, and whether the head is the embedding.
        layout: Where the text network is among the tensors.
        stored: What the safetensors headers say.
        tokenizer: transformers' tokenizer, or None; choosing a mask token adds that to it.
        context: Positions of the result: of the source, or fewer where that was asked for.
        eos_token_id: The generation defaults' if they name any, else the configuration's.
        special_ids: BOS, EOS, PAD and UNK of all its files: never a mask token.
    """

    folder: Path
    model_type: str
    config: Any
    is_vision: bool
    is_tied: bool
    layout: key_maps.Layout
    stored: dict[str, io.StoredTensor]
    tokenizer: Any
    context: int
    eos_token_id: int | list[int] | None
    special_ids: frozenset[int]


def open_source(folder: Path, *, max_context: int | None = None) -> Source:
    """Read everything but weights, and refuse what our network cannot be.

    Args:
        folder: In the layout of transformers.
        max_context: Positions to keep; None keeps all.

    Raises:
        CheckpointError: The source is damaged, or of another kind.
        ConfigError: `max_context` is beyond the source's context.
        UnsupportedError: The source computes something that our network does not.
    """
    path = folder / io.CONFIG_NAME
    content = io.read_json(path)
    model_type = _known_type(content, path)
    stored = io.read_headers(folder)
    whole = io.read_with(transformers.AutoConfig, folder, "configuration")
    config = whole.get_text_config()
    if config.model_type not in key_maps.FAMILIES:
        raise CheckpointError(
            f"{path}: text_config is of type {config.model_type!r}; "
            f"allowed: {', '.join(key_maps.FAMILIES)}"
        )
    context = _context(config, path, max_context)
    _check_expressible(config, path, context=context)
    is_vision = model_type in key_maps.VISION_FAMILIES
    layout = _find_layout(stored, is_vision=is_vision)
    is_tied = whole.tie_word_embeddings or config.tie_word_embeddings
    tokenizer = _read_tokenizer(folder)
    has_defaults = (folder / "generation_config.json").exists()
    defaults = io.read_json(folder / "generation_config.json") if has_defaults else {}
    eos_token_id = defaults.get("eos_token_id")
    has_defaults_eos = eos_token_id not in (None, [])
    names = key_maps.SPECIAL_ID_FIELDS
    taken = [owner.get(name) for owner in (content, defaults) for name in names]
    taken += [getattr(owner, name, None) for owner in (config, tokenizer) for name in names]
    return Source(
        folder=folder,
        model_type=model_type,
        config=config,
        is_vision=is_vision,
        is_tied=is_tied and layout.head not in stored,
        layout=layout,
        stored=stored,
        tokenizer=tokenizer,
        context=context,
        eos_token_id=eos_token_id if has_defaults_eos else config.eos_token_id,
        special_ids=_ids(folder, taken),
    )


def _find_layout(stored: dict[str, io.StoredTensor], *, is_vision: bool) -> key_maps.Layout:
    layouts = key_maps.VISION_LAYOUTS if is_vision else key_maps.TEXT_LAYOUTS
    return next((it for it in layouts if it.embedding in stored), layouts[0])


def _known_type(content: dict[str, Any], path: Path) -> str:
    known = key_maps.FAMILIES | key_maps.VISION_FAMILIES
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        what = " (a mixture of experts)" if any(map(content.get, key_maps.EXPERT_FIELDS)) else ""
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}{what}; allowed: {', '.join(known)}"
        )
    architecture = known[model_type].architecture
    found = content.get("architectures")
    if found not in (None, [], [architecture]):
        raise CheckpointError(f"{path}: architectures is {found}; allowed: {architecture}")
    if content.get("quantization_config"):
        raise UnsupportedError(f"{path}: the weights are quantized; give an unquantized checkpoint")
    return model_type


def _context(config: Any, path: Path, max_context: int | None) -> int:
    """Positions of the result."""
    whole: int = config.max_position_embeddings
    if max_context is None:
        return whole
    if not 1 <= max_context <= whole:
        raise ConfigError(
            f"max_context is {max_context}; allowed: 1 to {whole}, the context of {path.parent}"
        )
    return max_context


def _check_expressible(config: Any, path: Path, *, context: int) -> None:
    rope = config.rope_parameters or {}
    rope_type, share = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
    if rope_type not in key_maps.ROPE_TYPES:
        allowed = ", ".join(key_maps.ROPE_TYPES)
        raise UnsupportedError(f"{path}: rope_type is {rope_type!r}; supported: {allowed}")
    if share != 1.0:
        raise UnsupportedError(f"{path}: partial_rotary_factor is {share}; supported: 1.0")
    layer_types = set(getattr(config, "layer_types", None) or [_WINDOWED])
    if other := layer_types - {"full_attention", _WINDOWED}:
        raise UnsupportedError(f"{path}: layer_types has {min(other)!r}; supported: full_attention")
    window = getattr(config, "sliding_window", None)
    if config.model_type not in key_maps.WINDOWED_FAMILIES or _WINDOWED not in layer_types:
        return  # nobody reads it
    if window is not None and window < context:
        raise UnsupportedError(key_maps.window_refusal(path, window, context))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer.

    Raises:
        CheckpointError: There are some, but no vocabulary; transformers would make one up.
    """
    found = {name for name in key_maps.TOKENIZER_FILES if (folder / name).exists()}
    if found and not any(found.issuperset(files) for files in key_maps.VOCABULARY_FILES):
        allowed = ", ".join(" with ".join(files) for files in key_maps.VOCABULARY_FILES)
        raise CheckpointError(
            f"{folder}: the tokenizer has no vocabulary beside {', '.join(sorted(found))}; one of"
            f" these is missing: {allowed}"
        )
    return bool(found)


def _read_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer, None if there is no file of one."""
    if not has_tokenizer(folder):
        return None
    return io.read_with(transformers.AutoTokenizer, folder, "tokenizer")


def _ids(folder: Path, values: list[Any]) -> frozenset[int]:
    """All token ids among values that are an id, several, or none (null or -1)."""
    flat = [i for value in values for i in (value if isinstance(value, list) else [value])]
    for token_id in flat:
        if not (token_id is None or type(token_id) is int):
            raise CheckpointError(
                f"{folder}: a special token has the id {token_id!r}; allowed: an integer, a list of"
                " them, or null"
            )
    return frozenset(i for i in flat if i is not None and i >= 0)
