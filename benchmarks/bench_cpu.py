"""Speed on a CPU against its limits: the memory, llama.cpp, transformers, and torch itself.

    python benchmarks/bench_cpu.py --output benchmarks/results/speed_cpu_202611 \\
        --llama-python LLAMA/bin/python

Batch 1, greedy unless said otherwise. LLAMA is an environment with `llama-cpp-python` and `gguf`
from PyPI; without it llama.cpp is left out. Every contestant of a precision is measured in turn,
several times over; the tables give medians. Models: SmolLM2-135M-Instruct, the default one, and
two of random weights (29M: 8 layers of 512; 348M: 24 layers of 1024). A step is everything between
two tokens: forward, head and choice, through the engine's runner. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import environment, transformers_twin

import trimode
from trimode.checkpoint.io import POCKET_MODEL
from trimode.checkpoint.names import KNOWN, find_source
from trimode.decoding import GenerationParams, Sequence
from trimode.decoding.step import Group, Step, causal_step, group_step
from trimode.engine.runner import Feed, Runner
from trimode.model import TriModeConfig, TriModeModel
from trimode.model.adapter import PUBLISHED_FORM, TARGETS, DrafterAdapter, new_adapter

LENGTHS = (1, 2, 4, 8, 12, 16, 32)
CONTEXT = 128
"""Committed tokens before a step that is timed."""

PROMPT_LEN = 16
"""Short, for its forward counts in every contestant's time."""

PREFILL = 512

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
MODELS = ("smollm2", "pocket", *SHAPES)
FORMS = ("float32", "bfloat16", "int8")
OWN_FILE = "llama.cpp, the file as it came"
"""What a model is made from, for those that come as a GGUF: SmolLM2's, of 4 bits."""

LLAMA_KINDS = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}


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

    def __init__(self, python: Path, gguf: Path) -> None:
        worker = [str(python), str(Path(__file__).parent / "llama_cpp_worker.py")]
        self._process = subprocess.Popen(
            [*worker, "serve", str(gguf), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    @classmethod
    def of(cls, python: Path, model: TriModeModel, kind: str, folder: Path) -> Llama:
        """The same weights, in one of llama.cpp's forms."""
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
        return cls(python, output)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **request: Any) -> dict[str, Any]:
        """The worker's answer to one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Steps:
    """Times steps of one network behind a text of `CONTEXT` tokens."""

    model: TriModeModel
    adapter: DrafterAdapter | None = None
    sampled: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cache = self.model.new_cache(num_rows=1, num_cells=CONTEXT + PREFILL)
        self._runner = Runner(self.model, self._cache, adapter=self.adapter)
        self.form = PUBLISHED_FORM if self.adapter is None else self.adapter.form

    def _sequence(self, length: int) -> Sequence:
        options = {"mode": "linear", "max_new_tokens": 1, "block_length": 32, "seed": 0}
        params = GenerationParams(**options, **self.sampled)
        mask = self.model.config.mask_token_id
        seq = Sequence([0], params, mask_token_id=mask, form=self.form)
        seq.length = length
        return seq

    def _run(self, seq: Sequence, step: Step) -> float:
        started_s = time.perf_counter()
        self._runner.run([Feed(seq, 0, step)])
        return time.perf_counter() - started_s

    def trunk(self, num_tokens: int) -> float:
        """Seconds of a step that feeds tokens of the AR view and wants an answer of each."""
        seq = self._sequence(CONTEXT)
        ids = [(7 + i) % self.model.config.vocab_size for i in range(num_tokens)]
        return self._run(seq, causal_step("verify", ids, start=CONTEXT, wanted=range(num_tokens)))

    def fused(self) -> float:
        """4 tokens of the AR view and 8 masks of the other."""
        seq = self._sequence(CONTEXT)
        trunk = causal_step("verify", [7, 8, 9, 10], start=CONTEXT, wanted=range(4))
        masks = [seq.mask_token_id] * 8
        group = Group(masks, [True] * 8, CONTEXT + 4, CONTEXT + 3, range(8))
        return self._run(seq, group_step("verify", [group], form=self.form, trunk=trunk))

    def prefill(self) -> float:
        """A prompt of `PREFILL` tokens, of which the last is answered."""
        ids = [(7 + i) % self.model.config.vocab_size for i in range(PREFILL)]
        return self._run(
            self._sequence(0), causal_step("prefill", ids, start=0, wanted=[-1 + PREFILL])
        )


class Bandwidth:
    """Reads 1 GiB, on all threads; built like the native step."""

    def __init__(self, folder: Path) -> None:
        source, library = Path(__file__).parent / "read_memory.cpp", folder / "read_memory.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        command = [os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        self._read = ctypes.CDLL(str(library)).read_once
        self._read.restype = ctypes.c_double
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._data = np.ones((1 << 27) + 8, dtype=np.uint64)  # pages that are there

    def once(self) -> float:
        """Bytes a second."""
        address = (self._data.ctypes.data + 63) // 64 * 64
        return float(1 << 30) / self._read(address, 1 << 27, torch.get_num_threads())

    def best(self) -> float:
        """Of ten."""
        return max(self.once() for _ in range(10))

    def share(self, step: Callable[[], float], num_bytes: int) -> float:
        """Of what the memory gives at this moment, what a step makes of it.

        Other machines share the memory, and what it gives may double or halve within seconds. So it
        is read before the step and after; NaN where the two differ by more than a tenth.
        """
        before = self.once()
        rate = num_bytes / step()
        after = self.once()
        is_calm = max(before, after) < 1.1 * min(before, after)
        return rate / max(before, after) if is_calm else math.nan


def models(names: list[str]) -> Iterator[tuple[str, TriModeModel]]:
    """Each in float32, as plain layers."""
    for name in names:
        if name in SHAPES:
            yield name, random_model(SHAPES[name])
        else:
            yield name, trimode.load(name, dtype=torch.float32, weights="plain").model


def rank_32(model: TriModeModel) -> DrafterAdapter:
    """Of random pairs on all linear layers."""
    adapter = new_adapter(model.encoder.layers, rank=32, alpha=32, targets=TARGETS, seed=0)
    with torch.no_grad():
        for _, _, pair in adapter.items():
            pair.up.normal_(std=0.01)
    return adapter.to(model.encoder.embed_tokens.weight.dtype).eval()


def weight_bytes(model: TriModeModel, form: str) -> int:
    """Read by a forward: each weight once, of the input embedding a row."""
    count = sum(p.numel() for p in model.parameters())
    if not model.config.tie_word_embeddings:
        count -= model.encoder.embed_tokens.weight.numel()
    # int8: 32 weights have a scale of 2 bytes
    return int(count * {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / 32}[form])


def measure(
    model: TriModeModel,
    form: str,
    prompts: list[list[int]],
    *,
    new_tokens: int,
    repeats: int,
    llamas: dict[str, Llama],
    has_torch: bool,
    bandwidth: Bandwidth,
) -> dict[str, Any]:
    """All contestants of one precision on one model, in turn, once for every prompt and repeat.

    Returns:
        Median seconds, all seconds, and the tokens of the last turn.
    """
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    plain = copy.deepcopy(model).to(dtype)
    adapter = rank_32(plain)
    native = copy.deepcopy(plain).pack("int8" if form == "int8" else "native")
    lm = trimode.TriModeLM(native, None)
    steps, drafting = Steps(native), Steps(native, adapter)
    sampling = Steps(native, None, {"temperature": 0.7, "top_p": 0.95})
    sampling_drafts = Steps(native, adapter, {"temperature": 0.7, "top_p": 0.95})
    torch_lm = trimode.TriModeLM(plain, None) if has_torch else None
    torch_steps = Steps(plain) if has_torch else None
    compiled = copy.copy(plain) if has_torch else None
    if compiled is not None:
        compiled.answer = torch.compile(plain.answer)  # type: ignore[method-assign]
    compiled_steps = Steps(compiled) if compiled is not None else None
    twin = transformers_twin(torch_lm).to(dtype) if torch_lm is not None else None
    num_bytes = weight_bytes(model, form)
    seconds: dict[str, list[float]] = {}
    texts: dict[str, list[int]] = {}

    def note(name: str, measured: Callable[[], float], times: int = 1) -> None:
        for _ in range(times):
            seconds.setdefault(name, []).append(measured())

    def ours(one: trimode.TriModeLM, name: str, ids: list[int]) -> float:
        started_s = time.perf_counter()
        found = one.generate(ids, mode="ar", max_new_tokens=new_tokens, seed=0, ignore_eos=True)
        texts[name] = found.token_ids
        return (time.perf_counter() - started_s) / new_tokens

    def theirs(ids: list[int]) -> float:
        assert twin is not None
        inputs = torch.tensor([ids])
        started_s = time.perf_counter()
        found = twin.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            suppress_tokens=[model.config.mask_token_id],
        )
        texts["transformers"] = found[0, len(ids) :].tolist()
        return (time.perf_counter() - started_s) / new_tokens

    def peers(who: str, ids: list[int]) -> float:
        answer = llamas[who].ask(ids=ids, new_tokens=new_tokens)
        texts[who] = answer["token_ids"]
        return float(answer["seconds"]) / new_tokens

    shares = []
    for turn in range(-1, repeats):  # the first is for warming up
        if turn == 0:
            seconds.clear()
            shares.clear()
        ids = prompts[turn % len(prompts)]
        note("ar native", lambda: ours(lm, "native", ids))  # noqa: B023
        shares += [bandwidth.share(lambda: steps.trunk(1), num_bytes) for _ in range(10)]
        for who in llamas:
            note(f"ar {who}", lambda: peers(who, ids))  # noqa: B023
        if torch_lm is not None:
            note("ar torch", lambda: ours(torch_lm, "torch", ids))  # noqa: B023
            note("ar transformers", lambda: theirs(ids))  # noqa: B023
        for n in LENGTHS:
            note(f"step native {n}", lambda: steps.trunk(n), 5)  # noqa: B023
            if n == 12:
                note("fused native", drafting.fused, 5)
                note("sampled native 12", lambda: sampling.trunk(12), 5)
                note("sampled native 1", lambda: sampling.trunk(1), 5)
                note("sampled fused native", sampling_drafts.fused, 5)
            for who, llama in llamas.items():
                request = {"length": CONTEXT, "num_tokens": n, "repeats": 5}
                note(f"step {who} {n}", lambda: llama.ask(**request)["seconds"])  # noqa: B023
            if torch_steps is not None and n in (1, 12):
                note(f"step torch {n}", lambda: torch_steps.trunk(n), 3)  # noqa: B023
            if compiled_steps is not None and n in (1, 12):
                note(f"step torch.compile {n}", lambda: compiled_steps.trunk(n), 3)  # noqa: B023
        note("prefill native", steps.prefill)
        for who, llama in llamas.items():
            request = {"length": 0, "num_tokens": PREFILL, "repeats": 1}
            note(f"prefill {who}", lambda: llama.ask(**request)["seconds"])  # noqa: B023
        if torch_steps is not None:
            note("prefill torch", torch_steps.prefill)
    return {
        "weight_bytes": num_bytes,
        "shares": [share for share in shares if not math.isnan(share)],
        "packed_bytes": native.native.num_bytes if native.native is not None else 0,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "texts": texts,
    }


def quality(model: TriModeModel, form: str, texts: list[list[int]]) -> dict[str, Any]:
    """Nats a token of texts, and the token that is likeliest at each place."""
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    packed = copy.deepcopy(model).to(dtype).pack("int8" if form == "int8" else "native")
    nats, best = 0.0, []
    with torch.inference_mode():
        for ids in texts:
            logits = packed(torch.tensor([ids])).logits[0, :-1].float()
            wanted = torch.tensor(ids[1:])
            nats += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            best += logits.argmax(-1).tolist()
    return {"nats": nats / len(best), "best": best}


LOADING = """
import sys, time, torch, resource, trimode
from pathlib import Path
def rss(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key): return int(line.split()[1]) * 1024
load = trimode.load  # imports what is behind it
before = rss("VmRSS")
started_s = time.perf_counter()
weights = {"int8": "int8"}.get(sys.argv[2])
dtype = torch.bfloat16 if sys.argv[2] == "bfloat16" else torch.float32
lm = load(sys.argv[1], dtype=dtype, weights=weights)
loaded_s = time.perf_counter() - started_s
lm.generate([5, 6, 7, 8], mode="ar", max_new_tokens=1, seed=0)
first_s = time.perf_counter() - started_s
print(loaded_s, first_s, rss("VmRSS") - before, rss("VmHWM") - before, lm.model.native.num_bytes)
"""


def loading(name: str, form: str) -> dict[str, float]:
    """Seconds from `load` to the first token without imports, and memory, in a new process."""
    found = []
    for _ in range(3):
        command = [sys.executable, "-c", LOADING, name, form]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append([float(part) for part in text.split()])
    names = ("load_s", "first_token_s", "resident_bytes", "peak_bytes", "packed_bytes")
    return dict(zip(names, map(statistics.median, zip(*found, strict=True)), strict=True))


def ratio(seconds: dict[str, float], over: str, under: str) -> str:
    """Of two medians, where both are there."""
    return f"{seconds[over] / seconds[under]:.2f}" if {over, under} <= set(seconds) else "-"


def section(name: str, forms: dict[str, Any], bytes_per_second: float) -> list[str]:
    """The table of one model."""
    head = [
        "ar tokens/s",
        "of the best bandwidth",
        "of that at the moment",
        *(f"ms, {n}" for n in LENGTHS),
    ]
    head += ["12 over 1", "4 + 8 masks over 1", "12 at 0.7 over 1", "4 + 8 at 0.7 over 1"]
    head += [f"prefill {PREFILL}, ms"]
    lines = [f"## {name}", "", "| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for form, found in forms.items():
        seconds = found["seconds"]
        for who in ("native", "llama.cpp", OWN_FILE, "torch", "torch.compile", "transformers"):
            ar_s = seconds.get(f"ar {who}")
            if ar_s is None and f"step {who} 1" not in seconds:
                continue
            least_s = found["weight_bytes"] / bytes_per_second
            has_share = ar_s and who != OWN_FILE  # whose weights are fewer bytes
            cells = [f"{1 / ar_s:.0f}" if ar_s else "-"]
            cells.append(f"{least_s / ar_s:.2f}" if has_share else "-")
            shares = found["shares"] if who == "native" else []
            cells.append(f"{statistics.median(shares):.2f}" if shares else "-")
            times = [seconds.get(f"step {who} {n}") for n in LENGTHS]
            cells += [f"{1e3 * s:.2f}" if s else "-" for s in times]
            one = f"step {who} 1"
            cells += [
                ratio(seconds, f"step {who} 12", one),
                ratio(seconds, f"fused {who}", one),
                ratio(seconds, f"sampled {who} 12", one),
                ratio(seconds, f"sampled fused {who}", one),
            ]
            prefill_s = seconds.get(f"prefill {who}")
            cells.append(f"{1e3 * prefill_s:.0f}" if prefill_s else "-")
            label = who if who == OWN_FILE else f"{form}, {who}"
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", *(f"* {line}" for line in verdicts(forms)), ""]
    return lines


def verdicts(forms: dict[str, Any]) -> Iterator[str]:
    """Ratios that there are aims for."""
    for form, found in forms.items():
        seconds, parts = found["seconds"], []
        for other in ("llama.cpp", OWN_FILE, "transformers", "torch"):
            if f"ar {other}" in seconds:
                parts.append(f"AR {seconds[f'ar {other}'] / seconds['ar native']:.2f} of {other}'s")
        if "prefill llama.cpp" in seconds:
            found_ratio = seconds["prefill llama.cpp"] / seconds["prefill native"]
            parts.append(f"prefill {found_ratio:.2f} of llama.cpp's speed")
        texts = found["texts"]
        for other in set(texts) - {"native"}:
            equal = sum(a == b for a, b in zip(texts["native"], texts[other], strict=True))
            parts.append(f"{equal} of {found['new_tokens']} tokens equal to {other}'s")
        yield f"{form}: " + "; ".join(parts) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--llama-python", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    heldout = (POCKET_MODEL / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    chat = (Path(__file__).parent / "chat_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    record: dict[str, Any] = {"environment": environment(arguments), "models": {}, "quality": {}}
    record |= {"loading": {}, "load_average": [os.getloadavg()]}
    with tempfile.TemporaryDirectory() as folder:
        bandwidth = Bandwidth(Path(folder))
        record["bytes_per_second"] = [bandwidth.best()]
        for name, model in models(arguments.models):
            if name in SHAPES:
                rng = np.random.default_rng(0)
                prompts = rng.integers(3, 4000, (arguments.repeats, PROMPT_LEN)).tolist()
                texts: list[list[int]] = []
            else:
                lm = trimode.load(name, weights="plain")
                texts = [lm.encode(json.loads(line)["prompt"]) for line in heldout]
                source = chat if name == "smollm2" else heldout
                prompts = [lm.encode(json.loads(line)["prompt"])[:PROMPT_LEN] for line in source]
                del lm
            found = record["models"].setdefault(name, {})
            for form in arguments.forms:
                llamas = {}
                if arguments.llama_python is not None:
                    kind = LLAMA_KINDS[form]
                    llamas["llama.cpp"] = Llama.of(
                        arguments.llama_python, model, kind, Path(folder)
                    )
                    if name in KNOWN and form == "int8" and find_source(name).is_file():
                        llamas[OWN_FILE] = Llama(arguments.llama_python, find_source(name))
                found[form] = measure(
                    model,
                    form,
                    prompts[: arguments.repeats],
                    new_tokens=24 if name == "348M" else 64,
                    repeats=min(arguments.repeats, 3) if name == "348M" else arguments.repeats,
                    llamas=llamas,
                    has_torch=form != "int8",
                    bandwidth=bandwidth,
                )
                if texts:
                    qualities = record["quality"].setdefault(name, {})
                    qualities[f"native {form}"] = quality(model, form, texts)
                    for who, llama in llamas.items():
                        kind = who if who == OWN_FILE else f"{who} {LLAMA_KINDS[form]}"
                        qualities[kind] = llama.ask(texts=texts)
                for llama in llamas.values():
                    llama.close()
                gc.collect()
                record["bytes_per_second"].append(bandwidth.best())
                record["load_average"].append(os.getloadavg())
                if name not in SHAPES:
                    record["loading"].setdefault(name, {})[form] = loading(name, form)
                _write(arguments.output, record)


def _write(output: Path, record: dict[str, Any]) -> None:
    env, speed = record["environment"], max(record["bytes_per_second"])
    lines = [
        f"Batch 1, {env['machine']}, {env['threads']} threads. {env['date']}, torch {env['torch']},"
        f" transformers {env['transformers']}, commit {env['commit']}. Medians of contestants"
        f" measured in turn; steps behind {CONTEXT} tokens, with an answer for each token fed"
        f" (llama.cpp: for the last alone); prompts of {PROMPT_LEN} tokens, whose forward counts in"
        f" AR. Memory is read at {speed / 1e9:.1f} GB/s (best of ten reads of 1 GiB, and of all"
        f" moments; worst {min(record['bytes_per_second']) / 1e9:.1f}); what it gives changes from"
        " moment to moment, so a step of one token is also compared with a read right before and"
        " after it. Load averages (1 min)"
        f" {', '.join(f'{one[0]:.1f}' for one in record['load_average'])}.",
        "",
    ]
    for name, forms in record["models"].items():
        lines += section(name, forms, speed)
    for name, found in record["quality"].items():
        base = found.get("native float32")
        lines += [f"## Quality of {name}, held-out texts", ""]
        lines += ["| | nats a token | likeliest token as float32's |", "|---|---|---|"]
        for who, one in found.items():
            equal = "-"
            if base is not None:
                pairs = list(zip(one["best"], base["best"], strict=True))
                equal = f"{100 * sum(a == b for a, b in pairs) / len(pairs):.2f} %"
            lines.append(f"| {who} | {one['nats']:.4f} | {equal} |")
        lines.append("")
    lines += ["## Loading, in a process of its own", ""]
    lines += ["| | s to loaded | s to the first token | packed MB | resident MB | peak MB |"]
    lines += ["|---" * 6 + "|"]
    for name, by_form in record["loading"].items():
        for form, one in by_form.items():
            sizes = [one["packed_bytes"], one["resident_bytes"], one["peak_bytes"]]
            cells = [f"{one['load_s']:.2f}", f"{one['first_token_s']:.2f}"]
            cells += [f"{size / 1e6:.0f}" for size in sizes]
            lines.append(f"| {name}, {form} | " + " | ".join(cells) + " |")
    output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
