"""A small GGUF file of a random Llama checkpoint, laid out as by llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.checkpoint.made_sources import SHAPE, make_source

MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<spare>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["def f(x):\n    return 'the 12 of the 345'  # and the rest\n\n\n", "the cat   and the hat"]

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits, as SmolLM2's does."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(marker, normalized=False) for marker in MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def make_gguf(
    folder: Path,
    *,
    kind: str = "F32",
    extra: dict[str, Any] | None = None,
    renamed: dict[str, str] | None = None,
    **overrides: Any,
) -> tuple[Path, Path]:
    """A checkpoint of transformers, and a GGUF file of the same network and tokenizer.

    Args:
        folder: Gets `source` and `source.gguf`.
        kind: Quantisation of matrices, by gguf's name.
        extra: More metadata; `None` as a value leaves a key out.
        renamed: Other names for some tensors of the file.
        overrides: Of the configuration.
    """
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = TEMPLATE
    vocab = tokenizer.get_vocab()
    values: dict[str, Any] = {
        "vocab_size": len(vocab),
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values |= overrides
    source = make_source(folder / "source", "llama", tokenizer=tokenizer, **values)
    values = SHAPE | values
    writer = gguf.GGUFWriter(folder / "source.gguf", "llama")
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    by_id = sorted(vocab, key=vocab.__getitem__)
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    metadata = {
        "general.name": "made",
        "llama.block_count": values["num_hidden_layers"],
        "llama.context_length": values["max_position_embeddings"],
        "llama.embedding_length": values["hidden_size"],
        "llama.feed_forward_length": values["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.rope.freq_base": values["rope_parameters"]["rope_theta"],
        "llama.rope.dimension_count": values["hidden_size"] // heads,
        "llama.attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
        "llama.vocab_size": len(by_id),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": by_id,
        "tokenizer.ggml.token_type": [3 if token in MARKERS else 1 for token in by_id],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    } | (extra or {})
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in load_file(source / "model.safetensors").items():
        array = tensor.float().numpy()
        num = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        if num is not None:  # llama.cpp pairs neighbours where transformers pairs halves
            halves = array.reshape(num, 2, array.shape[0] // num // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        stored = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(array), stored)
        of_file = _gguf_name(name)
        writer.add_tensor((renamed or {}).get(of_file, of_file), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source, folder / "source.gguf"


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"
