"""llama.cpp as a contestant of `bench_cpu.py`, in a Python of its own (llama-cpp-python, gguf).

    python benchmarks/llama_cpp_worker.py convert WEIGHTS.npz SHAPE.json f32|bf16|q8_0 OUT.gguf
    python benchmarks/llama_cpp_worker.py rewrite MODEL.gguf f32|bf16|q8_0 OUT.gguf
    python benchmarks/llama_cpp_worker.py serve MODEL.gguf NUM_THREADS

`rewrite` gives a file its weights in another form, vocabulary and all else as they are.

`serve` answers one JSON object a line: {"ids": [...], "new_tokens": n} continues greedily,
{"length": L, "num_tokens": T, "repeats": n} times a forward of T tokens after L committed ones,
{"texts": [[...], ...]} gives their nats a token and the likeliest token at each place.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import gguf
import numpy as np

NAMES = {
    "encoder.embed_tokens.weight": "token_embd.weight",
    "encoder.norm.weight": "output_norm.weight",
    "diffusion_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(weights: str, shape: str, kind: str, output: str) -> None:
    """Write a GGUF of the llama architecture; its vocabulary is made up, for only ids are used."""
    with open(shape, encoding="utf-8") as file:
        config = json.load(file)
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<t{i}>" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    for name, tensor in np.load(weights).items():
        array = np.ascontiguousarray(tensor, dtype=np.float32)
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:  # llama.cpp rotates neighbours, not halves
                halves = array.reshape(config[heads], 2, config["head_dim"] // 2, -1)
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        _add(writer, _their_name(name), array, kind)
    _write(writer)


def rewrite(source: str, kind: str, output: str) -> None:
    """The same model with its matrices in another form."""
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if "." in name}
    writer = gguf.GGUFWriter(output, fields["general.architecture"].contents())
    skipped = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, field in fields.items():
        if not name.startswith(skipped):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        _add(writer, tensor.name, array, kind)
    _write(writer)


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    """A tensor, in the form asked for if it is a matrix."""
    kinds = gguf.GGMLQuantizationType
    quantized = {"q8_0": kinds.Q8_0, "bf16": kinds.BF16}.get(kind)
    if quantized is not None and array.ndim == 2:
        packed = gguf.quants.quantize(array, quantized)
        writer.add_tensor(name, packed, raw_dtype=quantized)
    else:
        writer.add_tensor(name, array)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _their_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, index, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{index}.{LAYER_NAMES[part]}.weight"


def serve(model: str, num_threads: int) -> None:
    """Answer requests from stdin until it ends."""
    from llama_cpp import Llama

    llama = Llama(
        model, n_ctx=1024, n_threads=num_threads, n_threads_batch=num_threads, verbose=False
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "ids" in request:
            found = _continue(llama, **request)
        elif "texts" in request:
            found = _score(llama, **request)
        else:
            found = _forward(llama, **request)
        print(json.dumps(found), flush=True)


def _best(llama: Any) -> int:
    logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
    return int(logits.argmax())


def _continue(llama: Any, ids: list[int], new_tokens: int) -> dict[str, Any]:
    llama.n_tokens = 0
    started_s = time.perf_counter()
    llama.eval(ids)
    new = [_best(llama)]
    while len(new) < new_tokens:
        llama.eval(new[-1:])
        new.append(_best(llama))
    return {"seconds": time.perf_counter() - started_s, "token_ids": new}


def _forward(llama: Any, length: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    llama.n_tokens = 0
    llama.eval(list(range(5, 5 + length)))
    seconds = []
    for _ in range(repeats):
        llama.n_tokens = length
        started_s = time.perf_counter()
        llama.eval(list(range(7, 7 + num_tokens)))
        _best(llama)
        seconds.append(time.perf_counter() - started_s)
    return {"seconds": statistics.median(seconds)}


def _score(llama: Any, texts: list[list[int]]) -> dict[str, Any]:
    nats, best = 0.0, []
    for ids in texts:
        llama.n_tokens = 0
        for place, token_id in enumerate(ids[:-1]):  # one by one: only the last has logits
            llama.eval([token_id])
            logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
            wide = logits.astype(np.float64)
            top = wide.max()
            nats += top + np.log(np.exp(wide - top).sum()) - wide[ids[place + 1]]
            best.append(int(wide.argmax()))
    return {"nats": nats / len(best), "best": best}


if __name__ == "__main__":
    if sys.argv[1] in ("convert", "rewrite"):
        {"convert": convert, "rewrite": rewrite}[sys.argv[1]](*sys.argv[2:])
    else:
        serve(sys.argv[2], int(sys.argv[3]))
