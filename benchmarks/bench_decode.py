"""Decoding speed of all modes beside transformers' own `generate`, in one run on the same weights.

    python benchmarks/bench_decode.py --output benchmarks/results/pocket_cpu_202611

Every prompt is decoded by every contestant in turn, so a machine that slows down slows them all;
the table compares totals and the JSON keeps every run. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Ministral3Config, Ministral3ForCausalLM

import trimode
from trimode.checkpoint.io import POCKET_MODEL

MODES = ("ar", "diffusion", "linear")


def transformers_twin(lm: trimode.TriModeLM) -> Ministral3ForCausalLM:
    """The AR view of the same weights as transformers' Ministral 3."""
    config = lm.model.config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim"
        " num_key_value_heads max_position_embeddings rms_norm_eps"
    ).split()
    rope = {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 2**30}  # beta 0: off
    twin = Ministral3ForCausalLM(
        Ministral3Config(
            **{name: getattr(config, name) for name in names},
            rope_parameters=rope | config.rope_parameters,
            bos_token_id=config.bos_token_id,
            eos_token_id=None,
            pad_token_id=config.bos_token_id,
        )
    )
    renamed = {
        name.replace("encoder.", "model.").replace("diffusion_head", "lm_head"): tensor
        for name, tensor in lm.model.state_dict().items()
    }
    twin.load_state_dict(renamed)
    return twin.eval()


@dataclass(frozen=True)
class Contestant:
    """A way of decoding that is measured."""

    name: str
    lm: trimode.TriModeLM
    mode: str


def measure(
    contestants: list[Contestant], twin: Any, prompt_ids: list[int], new_tokens: int
) -> dict[str, Any]:
    """One prompt through every contestant; seconds are those of the whole call."""
    runs: dict[str, Any] = {}
    started_s = time.perf_counter()
    input_ids = torch.tensor([prompt_ids])
    ids = twin.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        suppress_tokens=[contestants[0].lm.model.config.mask_token_id],
    )
    seconds = time.perf_counter() - started_s
    runs["transformers"] = {"seconds": seconds, "token_ids": ids[0, len(prompt_ids) :].tolist()}
    for one in contestants:
        started_s = time.perf_counter()
        result = one.lm.generate(
            prompt_ids, mode=one.mode, max_new_tokens=new_tokens, seed=0, ignore_eos=True
        )
        seconds = time.perf_counter() - started_s
        assert isinstance(result, trimode.Generation)
        stats = result.stats
        runs[one.name] = {
            "seconds": seconds,
            "token_ids": result.token_ids,
            "forwards": stats.forwards,
            "tokens_fed": stats.tokens_fed,
            "acceptance_lengths": stats.acceptance_lengths,
        }
    return runs


def margin(lm: trimode.TriModeLM, prompt_ids: list[int], one: list[int], two: list[int]) -> float:
    """Where two texts part: how far apart the AR view's two best choices are, in logits."""
    num_equal = next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
    ids = torch.tensor([prompt_ids + one[:num_equal]])
    with torch.inference_mode():
        logits = lm.model(ids).logits[0, -1]
    logits[lm.model.config.mask_token_id] = -torch.inf
    best, second = logits.topk(2).values.tolist()
    return best - second


def agreement(
    lm: trimode.TriModeLM, prompts: list[list[int]], runs: list[dict[str, Any]], pair: list[str]
) -> dict[str, Any]:
    """How many texts of two contestants are equal, and the margin where each other one parts."""
    texts = [[run[name]["token_ids"] for name in pair] for run in runs]
    margins = [
        margin(lm, prompt, one, two)
        for prompt, (one, two) in zip(prompts, texts, strict=True)
        if one != two
    ]
    return {"pair": pair, "equal": len(runs) - len(margins), "margins": margins}


def agreement_line(found: dict[str, Any], num_prompts: int) -> str:
    """One sentence about `agreement`."""
    one, two = found["pair"]
    line = f"Token-equal texts of {one} and {two}: {found['equal']}/{num_prompts}."
    if found["margins"]:
        line += (
            " Where the others part, the AR view's two best choices are at most"
            f" {max(found['margins']):.1e} apart."
        )
    return line


def summarise(name: str, runs: list[dict[str, Any]], base: float) -> dict[str, Any]:
    """Totals of one contestant over all prompts."""
    seconds = sum(run["seconds"] for run in runs)
    tokens = sum(len(run["token_ids"]) for run in runs)
    row: dict[str, Any] = {"name": name, "tokens_per_second": tokens / seconds}
    row["speed_over_transformers"] = row["tokens_per_second"] / base if base else 1.0
    if name != "transformers":
        kinds: Counter[str] = Counter()
        for run in runs:
            kinds.update(run["forwards"])
        row["forwards"] = {kind: count for kind, count in kinds.items() if count}
        total = sum(sum(run["forwards"].values()) for run in runs)
        prefill = sum(run["forwards"]["prefill"] for run in runs)
        lengths = [length for run in runs for length in run["acceptance_lengths"]]
        row["tpf_total"] = tokens / total
        row["tpf_decode"] = (tokens - prefill) / (total - prefill)
        row["acceptance_length"] = sum(lengths) / len(lengths) if lengths else None
        row["tokens_fed_per_new_token"] = (
            sum(sum(run["tokens_fed"].values()) for run in runs) / tokens
        )
    return row


def speed_limits(lm: trimode.TriModeLM) -> dict[str, float]:
    """What bounds a forward of one token here: its weights read once.

    Returns:
        weight_bytes: Bytes of all weights but the embedding, of which a forward reads one row.
        bytes_per_second: Measured: sums of 256 MiB of float32, read once each, the best of ten.
    """
    linears = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear)]
    weight_bytes = sum(m.weight.numel() * m.weight.element_size() for m in linears)
    big = torch.ones(1 << 26)

    def seconds() -> float:
        started_s = time.perf_counter()
        big.sum()
        return time.perf_counter() - started_s

    best_s = min(seconds() for _ in range(10))
    return {"weight_bytes": weight_bytes, "bytes_per_second": big.numel() * 4 / best_s}


def verdicts(rows: list[dict[str, Any]], *, block_length: int) -> list[str]:
    """The targets, by how much each is met or missed, and what bounds it."""
    by_name = {row["name"]: row for row in rows}
    ar, linear = by_name["ar"]["speed_over_transformers"], by_name["linear"]["tpf_total"]
    lines = [
        f"* AR at batch 1, target 1.5x transformers: {ar:.2f}x, {_verdict(ar, 1.5)}.",
        f"* linear, target TPF (total) 1.2 for a model trained on CPU: {linear:.2f},"
        f" {_verdict(linear, 1.2)}.",
    ]
    for mode in [name for name in by_name if name not in ("transformers", "ar")]:
        if by_name[mode]["tokens_per_second"] < by_name["ar"]["tokens_per_second"]:
            share = by_name[mode]["tokens_per_second"] / by_name["ar"]["tokens_per_second"]
            cost = by_name[mode]["tpf_total"] / by_name["ar"]["tpf_total"] / share
            lines.append(
                f"* `{mode}` is slower than `ar` on this hardware: {share:.2f} of its tokens/s. Its"
                f" forwards, of up to {block_length} tokens, cost {cost:.1f} times one of `ar`."
            )
    return lines


def _verdict(got: float, target: float) -> str:
    return "met" if got >= target else f"missed by {100 * (1 - got / target):.0f} %"


def cpu_name() -> str:
    """The processor as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, commit and settings."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "arguments": {k: within(v) for k, v in vars(arguments).items()},
        "machine": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trimode": trimode.__version__,
        "commit": commit.stdout.strip(),
        "batch_size": 1,
        "dtype": "float32",
    }


def command_line() -> str:
    """What was typed, without the folders of this machine."""
    return " ".join(["python", *map(within, sys.argv)])


def within(value: Any) -> str:
    """An argument as text; a path inside the repository without what lies before it, one outside
    by its last parts."""
    path = Path(str(value))
    if not path.is_absolute():
        return str(value)
    root = Path(__file__).resolve().parents[1]
    return str(path.relative_to(root) if path.is_relative_to(root) else Path(*path.parts[-3:]))


def table(
    rows: list[dict[str, Any]], about: str, limits: dict[str, float], *, block_length: int
) -> str:
    """The Markdown summary."""
    lines = [
        about,
        "",
        "| | tokens/s | over transformers | of the roofline | TPF decode | TPF total |"
        " acceptance length | fed/new | forwards |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], f"{row['tokens_per_second']:.0f}"]
        cells.append(f"{row['speed_over_transformers']:.2f}x")
        cells.append(f"{100 * row['roofline_share']:.0f} %")
        for key in ("tpf_decode", "tpf_total", "acceptance_length", "tokens_fed_per_new_token"):
            cells.append(f"{row[key]:.2f}" if row.get(key) is not None else "-")
        kinds = row.get("forwards", {})
        cells.append(", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "-")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Acceptance length: accepted drafts plus the bonus token of each round, the last round cut"
        " where the text ends. Roofline: the weights read once a forward at the measured"
        f" {limits['bytes_per_second'] / 1e9:.1f} GB/s; {limits['weight_bytes'] / 1e6:.1f} MB of"
        " weights partly stay in the cache, so a share is not bounded by 100 %.",
        "",
        "Targets:",
        "",
        *verdicts(rows, block_length=block_length),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--prompts", type=Path, default=POCKET_MODEL / "heldout_prompts.jsonl")
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--drafter", type=Path, default=None, help="measure linear with it too")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lm = trimode.load(arguments.model, dtype="float32")
    twin = transformers_twin(lm)
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.num_prompts]
    prompts = [lm.encode(json.loads(line)["prompt"]) for line in lines]
    contestants = [Contestant(mode, lm, mode) for mode in MODES]
    if arguments.drafter is not None:
        with_drafter = trimode.load(arguments.model, dtype="float32", drafter=arguments.drafter)
        contestants.append(Contestant("linear, drafter", with_drafter, "linear"))
    for prompt in prompts[:2]:  # warm up
        measure(contestants, twin, prompt, 16)
    runs = [measure(contestants, twin, prompt, arguments.new_tokens) for prompt in prompts]
    rows: list[dict[str, Any]] = []
    for name in ("transformers", *(one.name for one in contestants)):
        base = rows[0]["tokens_per_second"] if rows else 0.0
        rows.append(summarise(name, [run[name] for run in runs], base))
    limits = speed_limits(trimode.load(arguments.model, dtype="float32", weights="plain"))
    for row in rows:
        per_token_s = limits["weight_bytes"] / limits["bytes_per_second"]
        forwards = 1 / row.get("tpf_total", 1.0)
        row["roofline_share"] = row["tokens_per_second"] * forwards * per_token_s
    pairs = [["ar", "transformers"]]
    pairs += [[one.name, "ar"] for one in contestants if one.mode == "linear"]
    equal = [agreement(lm, prompts, runs, pair) for pair in pairs]
    env = environment(arguments)
    lens = [len(prompt) for prompt in prompts]
    about = (
        f"Greedy, batch 1, float32, {env['machine']}, {env['threads']} threads,"
        f" {len(prompts)} held-out prompts of"
        f" {min(lens)} to {max(lens)} tokens, {arguments.new_tokens} new tokens each, block length"
        f" {lm.model.config.block_size}, threshold 0.9 (diffusion). {env['date']}, torch"
        f" {env['torch']}, transformers {env['transformers']}, commit {env['commit']}.\n\n"
        + " ".join(agreement_line(found, len(runs)) for found in equal)
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": env,
        "limits": limits,
        "equal": equal,
        "summary": rows,
        "runs": runs,
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    text = table(rows, about, limits, block_length=lm.model.config.block_size)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
