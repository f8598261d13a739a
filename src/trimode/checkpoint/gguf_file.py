"""A GGUF file as a folder of transformers: configuration, tokenizer and dequantised weights.

transformers reads the file. This module refuses what transformers would read wrongly in silence,
and restores what its reader loses. Converting the folder is the business of `convert`.
"""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from trimode.checkpoint import io, key_maps
from trimode.errors import CheckpointError, ConfigError, UnsupportedError

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Names of GGUF for the families that we read; Mistral's files call themselves llama."""

PACKAGES = ("gguf", "accelerate")

_OF_LAYER = (
    *("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
    *("ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),
)
_ALSO_OF_LAYER = {
    "llama": (),
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": ("attn_q_norm.weight", "attn_k_norm.weight"),
}
_OUTER, _HEAD = {"token_embd.weight", "output_norm.weight"}, "output.weight"

SAMPLING_FIELDS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Key of GGUF -> field of generation_config.json."""

EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")

_LETTERS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama-bpe": rf"{_LETTERS}|\p{{N}}{{1,3}}{_REST}", "qwen2": rf"{_LETTERS}|\p{{N}}{_REST}"}
"""`tokenizer.ggml.pre` -> the pattern by which Llama 3 and Qwen split a text into words."""

PRE_TOKENIZERS = ("gpt-2", "smollm", *SPLITS)
"""Values of `tokenizer.ggml.pre` whose tokenizer we can rebuild."""


def is_gguf(source: str | Path) -> bool:
    """Whether a source is meant as a GGUF file."""
    return str(source).lower().endswith(SUFFIX) and not Path(source).is_dir()


def find_gguf(source: str | Path) -> Path | None:
    """The GGUF file that a source is, or the only one of a folder without a configuration.

    Raises:
        CheckpointError: The file does not exist, or the folder has several.
    """
    place = Path(source)
    if is_gguf(source):
        if not place.is_file():
            raise CheckpointError(f"{source}: no such file")
        return place
    if not place.is_dir() or (place / io.CONFIG_NAME).exists():
        return None
    files = sorted(file for file in place.iterdir() if is_gguf(file))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{place} has several GGUF files; give one of them: {names}")
    return files[0] if files else None


def unpack(file: Path, folder: Path, *, max_context: int | None = None) -> None:
    """Write what a GGUF file holds as a checkpoint of transformers.

    Args:
        file: Of architecture `ARCHITECTURES`.
        folder: New; gets config.json, the tokenizer, float32 weights, and generation_config.json if
            the file has sampling defaults or a second end of text.

        max_context: Positions that will be kept, which a sliding window must not be shorter than;
            None for those of the file.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: A package that reads GGUF is not installed.
        UnsupportedError: The file holds a network or a tokenizer that we cannot rebuild.
    """
    fields = checked_fields(file, max_context=max_context)
    model, tokenizer = _read(file)
    _restore(tokenizer, fields)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if tokenizer.decode(tokenizer(key_maps.PROBE_TEXT)["input_ids"], skip_special_tokens=True) != (
        key_maps.PROBE_TEXT
    ):
        raise UnsupportedError(f"{file}: the tokenizer does not give back a text that it reads")
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    _write_model(model, folder)
    if defaults := _generation_defaults(fields):
        (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")


def checked_fields(file: Path, *, max_context: int | None = None) -> dict[str, Any]:
    """What a file's header says, once it is clear that we can read the file.

    Raises:
        CheckpointError, ConfigError, UnsupportedError: As of `unpack`.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{file}: reading GGUF needs {missing[0]}, not installed here;"
            " pip install 'trimode[gguf]'"
        )
    fields, tensors = _read_header(file)
    _check(file, fields, tensors, max_context=max_context)
    return fields


def _read_header(file: Path) -> tuple[dict[str, Any], set[str]]:
    """Metadata without the vocabulary, and the names of tensors."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types[:1] != [gguf.GGUFValueType.ARRAY]
        }
        names = [tensor.name for tensor in reader.tensors]
    except Exception as error:  # the reader raises anything on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{file} is not a whole GGUF file: {reason}") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):  # older readers allow it
        raise CheckpointError(f"{file} holds tensor {twice[0]} twice")
    return fields, set(names)


def _check(
    file: Path, fields: dict[str, Any], tensors: set[str], *, max_context: int | None
) -> None:
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: general.architecture is {architecture!r}; allowed: {', '.join(ARCHITECTURES)}"
        )
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or f"{architecture}.rope.scaling.factor" in fields:
        raise UnsupportedError(f"{file}: rope.scaling.type is {scaling!r}; supported: none")
    if "rope_freqs.weight" in tensors:  # transformers' reader would leave it out
        raise UnsupportedError(
            f"{file}: rope_freqs.weight scales RoPE as Llama 3.1 does, which is not read from GGUF;"
            " give the checkpoint in safetensors"
        )
    if any(name.endswith("_exps.weight") for name in tensors):
        raise UnsupportedError(f"{file}: the network is a mixture of experts; supported: dense")
    _check_tensors(file, fields, tensors)
    window = fields.get(f"{architecture}.attention.sliding_window")
    whole: int = fields.get(f"{architecture}.context_length", 0)
    context = whole if max_context is None else min(max_context, whole)
    if window and window < context:
        raise UnsupportedError(key_maps.window_refusal(file, window, context))
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{file}: tokenizer.ggml.model is {kind!r}; supported: gpt2 (bytes), llama"
        )
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{file}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}"
        )


def _check_tensors(file: Path, fields: dict[str, Any], tensors: set[str]) -> None:
    """Refuse what transformers' reader would fill with random numbers, or leave out."""
    architecture = fields["general.architecture"]
    num_parts, num_layers = fields.get("split.count", 1), fields.get(f"{architecture}.block_count")
    if num_parts > 1:
        raise UnsupportedError(
            f"{file}: split.count is {num_parts}; supported: one file (merge the parts with"
            " llama-gguf-split --merge)"
        )
    if not isinstance(num_layers, int):
        raise CheckpointError(f"{file}: {architecture}.block_count is {num_layers!r}")
    of_layer = (*_OF_LAYER, *_ALSO_OF_LAYER[architecture])
    expected = _OUTER | {f"blk.{i}.{name}" for i in range(num_layers) for name in of_layer}
    io.compare_shapes(
        file,
        found=dict.fromkeys(tensors - {_HEAD}, ()),
        expected=dict.fromkeys(expected, ()),
    )


def _read(file: Path) -> tuple[Any, Any]:
    """transformers' model in float32 and its tokenizer."""
    place = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with io.quiet(), redirect_stderr(StringIO()):  # its own progress bar heeds no setting
            auto = transformers.AutoModelForCausalLM
            model = auto.from_pretrained(file.parent, dtype=torch.float32, **place)
            return model, transformers.AutoTokenizer.from_pretrained(file.parent, **place)
    except Exception as error:  # as `io.read_with`
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{file}: transformers does not read it: {reason}") from error


def _restore(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Split texts as the original tokenizer does; transformers' reader knows some splits only."""
    tokenizer.clean_up_tokenization_spaces = False
    if fields["tokenizer.ggml.model"] != "gpt2":
        return
    backend: Tokenizer = tokenizer.backend_tokenizer
    pre = fields["tokenizer.ggml.pre"]
    if pre in SPLITS:
        parts = [
            pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        parts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if pre == "smollm":  # " 12" after a space is two spaces and two digits
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        backend.model.ignore_merges = True  # a word that is a token is that token


def _write_model(model: Any, folder: Path) -> None:
    """config.json and weights; `save_pretrained` refuses a dequantised model."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [key_maps.FAMILIES[config.model_type].architecture]
    config.dtype = "float32"
    config.save_pretrained(folder)
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / io.WEIGHTS_NAME, metadata={"format": "pt"})


def _generation_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """What the file says of sampling, and all ends of text where there are two."""
    defaults = {name: fields[key] for key, name in SAMPLING_FIELDS.items() if key in fields}
    if defaults:
        defaults["do_sample"] = defaults.get("temperature", 1.0) > 0
    ends = sorted({fields[key] for key in EOS_KEYS if key in fields})
    if len(ends) > 1:
        defaults["eos_token_id"] = ends
    return defaults
