"""Speed on a CPU against its limits: transformers, llama.cpp, the memory, and speculation's own.

    python benchmarks/bench_cpu.py --output benchmarks/results/speed_cpu_202611 \\
        --llama-python LLAMA/bin/python

float32, batch 1, greedy. Measured on 2 cores of an AMD EPYC (AVX-512). LLAMA is an environment with
`llama-cpp-python` and `gguf` from PyPI; without it llama.cpp is left out. Every contestant is
measured in turn, several times over; the table gives medians. Models: the default one, and two of
random weights (29M: 8 layers of 512; 348M: 24 layers of 1024). Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import environment, transformers_twin

import trimode
from trimode.checkpoint.io import DEFAULT_MODEL
from trimode.decoding.step import BLOCK
from trimode.model import KVCache, RowAttention, TriModeConfig, TriModeModel
from trimode.model.attention import RowFeed
from trimode.model.masks import TRUNK

LENGTHS = (1, 2, 4, 8, 16, 32)
CONTEXT = 128
"""Committed tokens before a forward that is timed."""

PROMPT_LEN = 16
"""Short, for its forward counts in every contestant's time."""

SHAPES: dict[str, dict[str, int]] = {
    "29M": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "348M": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 22528,
    },
}


def random_model(shape: dict[str, int]) -> TriModeModel:
    """A network of random weights; its head is not tied to its embedding."""
    torch.manual_seed(0)
    config = TriModeConfig(
        **shape,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        mask_token_id=2,
        block_size=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return TriModeModel(config).eval()


class Llama:
    """llama.cpp with the weights of a model, in a process of its own."""

    def __init__(self, python: Path, model: TriModeModel, kind: str, folder: Path) -> None:
        config = model.config
        names = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
            " num_key_value_heads head_dim max_position_embeddings rms_norm_eps"
        ).split()
        shape = {name: getattr(config, name) for name in names}
        shape["rope_theta"] = config.rope_parameters["rope_theta"]
        (folder / "shape.json").write_text(json.dumps(shape))
        weights, output = folder / "weights.npz", folder / f"{kind}.gguf"
        np.savez(weights, **{name: t.float().numpy() for name, t in model.state_dict().items()})
        worker = [str(python), str(Path(__file__).parent / "llama_cpp_worker.py")]
        arguments = [str(weights), str(folder / "shape.json"), kind, str(output)]
        subprocess.run([*worker, "convert", *arguments], check=True)
        weights.unlink()
        self._process = subprocess.Popen(
            [*worker, "serve", str(output), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Forwards:
    """Times forwards of one network at a context of `CONTEXT` tokens."""

    model: TriModeModel

    def seconds(self, num_tokens: int, *, group: int = TRUNK) -> float:
        """One forward with logits for all its tokens, K/V written."""
        cache, config = self._cache(), self.model.config
        groups, positions = [group] * num_tokens, range(CONTEXT, CONTEXT + num_tokens)
        ids = torch.arange(num_tokens) + config.vocab_size // 2
        with torch.inference_mode():
            started_s = time.perf_counter()
            anchors = positions if group == TRUNK else [CONTEXT - 1] * num_tokens
            feeds = [RowFeed(0, CONTEXT, groups, positions, anchors)]
            attend = RowAttention(cache, feeds)
            hidden = self.model.encode(ids, torch.tensor(positions), attend=attend)
            self.model.diffusion_head(hidden)
            return time.perf_counter() - started_s

    def _cache(self) -> KVCache:
        if not hasattr(self, "cache"):
            self.cache = KVCache(
                self.model.config, num_rows=1, num_cells=512, device="cpu", dtype=torch.float32
            )
        return self.cache


def read_bandwidth() -> float:
    """Bytes per second: sums of 256 MiB of float32, read once each, the best of ten."""
    big, seconds = torch.ones(1 << 26), []
    for _ in range(10):
        started_s = time.perf_counter()
        big.sum()
        seconds.append(time.perf_counter() - started_s)
    return big.numel() * 4 / min(seconds)


def measure(
    model: TriModeModel,
    prompts: list[list[int]],
    *,
    new_tokens: int,
    repeats: int,
    llama_python: Path | None,
) -> dict[str, Any]:
    """All contestants on one model, in turn, once for every prompt and repeat."""
    plain = trimode.TriModeLM(model, None)
    twin = transformers_twin(plain)
    packed = trimode.TriModeLM(copy.deepcopy(model).pack("packed"), None)
    int8 = trimode.TriModeLM(copy.deepcopy(model).pack("int8"), None)
    ours = {"plain": plain, "packed": packed, "int8": int8}
    forwards = {name: Forwards(lm.model) for name, lm in ours.items()}
    weight_bytes = 4 * sum(p.numel() for p in model.parameters())
    weight_bytes -= 4 * model.encoder.embed_tokens.weight.numel()  # one row of it is read
    seconds: dict[str, list[float]] = {}
    texts: dict[str, list[int]] = {}
    lengths: list[int] = []
    bandwidths = []

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as folder:
        llamas = {
            f"llama.cpp {kind}": Llama(llama_python, model, kind, Path(folder))
            for kind in (("f32", "q8_0") if llama_python else ())
        }
        for turn in range(-1, repeats):  # the first is for warming up
            if turn == 0:
                seconds.clear()
                lengths.clear()
                bandwidths.clear()
            ids = prompts[turn % len(prompts)]
            inputs = torch.tensor([ids])
            bandwidths.append(read_bandwidth())
            started_s = time.perf_counter()
            found = twin.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new_tokens,
                do_sample=False,
                suppress_tokens=[model.config.mask_token_id],
            )
            note("ar transformers", (time.perf_counter() - started_s) / new_tokens)
            texts["transformers"] = found[0, len(ids) :].tolist()
            for name, lm in ours.items():
                for mode in ("ar", "linear"):
                    started_s = time.perf_counter()
                    result = lm.generate(
                        ids, mode=mode, max_new_tokens=new_tokens, seed=0, ignore_eos=True
                    )
                    note(f"{mode} {name}", (time.perf_counter() - started_s) / new_tokens)
                    texts[f"{mode} {name}"] = result.token_ids
                    if (mode, name) == ("linear", "packed"):
                        lengths += result.stats.acceptance_lengths
            for name, llama in llamas.items():
                answer = llama.ask(ids=ids, new_tokens=new_tokens)
                note(f"ar {name}", answer["seconds"] / new_tokens)
                texts[name] = answer["token_ids"]
            for num_tokens in LENGTHS:
                for name, one in forwards.items():
                    for _ in range(3):
                        note(f"forward {name} {num_tokens}", one.seconds(num_tokens))
                for name, llama in llamas.items():
                    request = {"length": CONTEXT, "num_tokens": num_tokens, "repeats": 3}
                    note(f"forward {name} {num_tokens}", llama.ask(**request)["seconds"])
            for name in ("packed", "plain"):
                block = model.config.block_size
                for _ in range(3):
                    note(f"draft {name}", forwards[name].seconds(block, group=BLOCK))
        for llama in llamas.values():
            llama.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "weight_bytes": weight_bytes,
        "bytes_per_second": statistics.median(bandwidths),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "shape": {k: getattr(model.config, k) for k in SHAPES["29M"]},
        "new_tokens": new_tokens,
        "repeats": repeats,
        "acceptance_length": sum(lengths) / len(lengths),
        "seconds": medians,
        "all_seconds": seconds,
        "num_equal": {
            name: sum(a == b for a, b in zip(text, texts["ar plain"], strict=True))
            for name, text in texts.items()
        },
    }


def quality(num_texts: int) -> dict[str, float]:
    """Mean negative log-likelihood in nats a token of the default model's held-out texts."""
    path = DEFAULT_MODEL / "heldout_prompts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:num_texts]
    found = {}
    for weights in ("plain", "packed", "int8"):
        lm, total, count = trimode.load(weights=weights), 0.0, 0
        for line in lines:
            ids = torch.tensor([lm.encode(json.loads(line)["prompt"])])
            with torch.inference_mode():
                logits = lm.model(ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
        found[weights] = total / count
    return found | {"num_tokens": count}


def section(name: str, found: dict[str, Any]) -> list[str]:
    """The tables of one model."""
    seconds, base = found["seconds"], found["seconds"]["ar transformers"]
    least_s = found["weight_bytes"] / found["bytes_per_second"]
    lines = [
        f"## {name}: {found['num_parameters'] / 1e6:.1f}M parameters, {found['shape']}",
        "",
        f"{found['weight_bytes'] / 1e6:.0f} MB read a forward at"
        f" {found['bytes_per_second'] / 1e9:.0f} GB/s (measured): {1e3 * least_s:.2f} ms."
        f" {found['new_tokens']} new tokens,"
        f" {found['repeats']} turns.",
        "",
        "| | AR tokens/s | over transformers | linear tokens/s | ms per forward of "
        + " | ".join(map(str, LENGTHS))
        + " tokens | 8 over 1 |",
        "|---|" + "---|" * (4 + len(LENGTHS)),
    ]
    contestants = [key[3:] for key in seconds if key.startswith("ar ")]
    for one in contestants:
        ar_s, linear_s = seconds[f"ar {one}"], seconds.get(f"linear {one}")
        forwards = [seconds.get(f"forward {one} {n}") for n in LENGTHS]
        cells = [one, f"{1 / ar_s:.1f}", f"{base / ar_s:.2f}x"]
        cells.append(f"{1 / linear_s:.1f}" if linear_s else "-")
        cells += [f"{1e3 * s:.2f}" if s else "-" for s in forwards]
        cells.append(f"{forwards[3] / forwards[0]:.2f}" if forwards[0] else "-")
        lines.append("| " + " | ".join(cells) + " |")
    ar_s, one_s = seconds["ar packed"], seconds["forward packed 1"]
    draft, verify = (
        seconds["draft packed"] / one_s,
        seconds["forward packed 8"] / one_s,
    )
    length = found["acceptance_length"]
    reached = ar_s / seconds["linear packed"]
    could = length / (draft + verify)
    lines += [
        "",
        f"* packed reads its weights at {100 * least_s / one_s:.0f} % of the measured bandwidth in"
        f" a forward of one token, at {100 * least_s / ar_s:.0f} % in a whole AR step"
        " (target 70 % at 348M).",
        f"* Speculation (linear, packed, block 8, no drafter): acceptance length A = {length:.2f},"
        f" c_draft {draft:.2f}, c_verify {verify:.2f} forwards of one token: A / (c_draft +"
        f" c_verify) = {could:.2f} of AR; measured {reached:.2f}, {100 * reached / could:.0f} % of"
        " it (target 90 %).",
    ]
    for kind in ("f32", "q8_0"):
        if f"ar llama.cpp {kind}" in seconds:
            mine = "packed" if kind == "f32" else "int8"
            ratio = seconds[f"ar {mine}"] / seconds[f"ar llama.cpp {kind}"]
            lines.append(f"* AR, {mine}: {ratio:.2f} times the time of llama.cpp {kind}.")
    equal = ", ".join(f"{who} {n}" for who, n in found["num_equal"].items())
    lines += [
        f"* Of the last turn's {found['new_tokens']} tokens, equal to our plain AR's at the same"
        f" place: {equal}.",
        "",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["default", *SHAPES])
    parser.add_argument("--llama-python", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    text = (DEFAULT_MODEL / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    default = trimode.load(weights="plain")
    prompts = [
        default.encode(json.loads(line)["prompt"])[:PROMPT_LEN]
        for line in text[: arguments.repeats]
    ]
    env, results = environment(arguments), {}
    losses = quality(20)
    lines = [
        f"float32, greedy, batch 1, {env['machine']}, {env['threads']} threads. {env['date']},"
        f" torch {env['torch']}, transformers {env['transformers']}, commit {env['commit']}."
        f" Medians of contestants measured in turn; forwards at a context of {CONTEXT} tokens,"
        " logits for all"
        f" their tokens (llama.cpp: for the last); prompts of {PROMPT_LEN} tokens, whose forward"
        " counts.",
        "",
        "Held-out texts of the default model, nats a token: "
        + ", ".join(f"{name} {losses[name]:.4f}" for name in ("plain", "packed", "int8"))
        + f" ({losses['num_tokens']} tokens).",
        "",
    ]
    for name in arguments.models:
        model = default.model if name == "default" else random_model(SHAPES[name])
        results[name] = measure(
            model,
            prompts,
            new_tokens=24 if name == "348M" else 64,
            repeats=min(arguments.repeats, 3) if name == "348M" else arguments.repeats,
            llama_python=arguments.llama_python,
        )
        lines += section(name, results[name])
        record = {"environment": env, "quality": losses, "models": results}
        arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
        arguments.output.with_suffix(".md").write_text("\n".join(lines))
        print("\n".join(lines[-12:]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
