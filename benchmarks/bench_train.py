"""Speed and memory of the joint training step beside a plain one, in one run on the same batches.

    OMP_WAIT_POLICY=passive python benchmarks/bench_train.py --output benchmarks/results/NAME

Every contestant lives in a process of its own, so that its peak memory is its own, and they take
turns step by step, so that a machine that slows down slows them all. Each step is forward, backward
and an AdamW update of the same weights on the same rows and noise, and its loss is compared. Beside
the time on the clock stands the processors' own (CPU s), which other programs disturb less.

* `plain`: attention over the whole [2S, 2S] under a dense mask by torch's own kernel, logits of all
  2S places, torch's cross-entropy, plain autograd.
* `trimode`: what `trimode train` runs.
* `trimode, selective`: the same with `activation_checkpointing: selective`.
* `trimode, checkpointed`: the same with `activation_checkpointing: true`.

Memory is the most that a process held minus what it held before the first step, when the weights
and the optimiser's state were there (CPU: resident bytes; CUDA: `max_memory_allocated`).

Model FLOPs of a step, whatever a contestant computes in fact (a multiplication and an addition are
two; forward once, backward twice; nothing recomputed counts):

    6 * (layer weights * 2S + head weights * targets) + 12 * layers * heads * head_dim * pairs

of every row: `targets` counts AR targets and masked ones, `pairs` the pairs of tokens that may
attend. Utilisation (MFU) is model FLOPs / s over the peak: `--peak-flops`, else the measured rate
of one large matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_decode import command_line, cpu_name, within
from torch import Tensor

import trimode
from trimode.model import DenseAttention, TriModeConfig, TriModeModel
from trimode.training.config import OptimizerPart
from trimode.training.corruption import corrupt
from trimode.training.dual_stream import dual_stream_mask
from trimode.training.objective import (
    LossSums,
    TrainingBatch,
    count_targets,
    is_ar_target,
    is_diffusion_target,
    loss_sums,
)
from trimode.training.optim import make_optimizer
from trimode.training.packing import PackedRows, pack_row

EOS, MASK = 1, 2
SPEED_TARGET, MEMORY_TARGET = 1.3, 0.5
LOSS_TOLERANCE = 1e-3


def make_batch(arguments: argparse.Namespace, step: int) -> TrainingBatch:
    """Random text in documents of equal length, half of it masked."""
    rng = np.random.default_rng(step)
    row_len, samples = arguments.sequence_length, range(arguments.rows)
    ends = np.arange(1, arguments.documents_per_row + 1) * row_len // arguments.documents_per_row
    packed = []
    for _ in samples:
        ids = rng.integers(3, arguments.vocab_size, row_len)
        packed.append(pack_row(ids, ends, block_length=arguments.block_length, eos_token_id=EOS))
    arrays = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    arrays |= {"is_maskable": np.ones_like(arrays["is_supervised"])}
    rows = PackedRows(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    noise = corrupt(rows, samples, seed=step, mask_token_id=MASK, ratios=[0.5] * arguments.rows)
    return TrainingBatch(rows, noise)


def plain_loss_sums(model: TriModeModel, batch: TrainingBatch) -> LossSums:
    """The objective as one would first write it."""
    rows, noise = batch.rows, batch.noise
    assert noise is not None
    hidden = model.encode(
        torch.cat((noise.noisy_ids, rows.clean_ids), dim=1),
        torch.cat((rows.position_ids, rows.position_ids), dim=1),
        attend=DenseAttention(dual_stream_mask(rows)),
    )
    noisy, clean = model.diffusion_head(hidden).chunk(2, dim=1)

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")

    ar = losses(clean[:, :-1], rows.clean_ids[:, 1:]) * is_ar_target(rows).flatten()
    is_target = is_diffusion_target(rows, noise) & noise.is_masked
    diffusion = losses(noisy, rows.clean_ids) * (is_target * noise.weight).flatten()
    return LossSums(ar=ar.sum(), diffusion=diffusion.sum())


CONTESTANTS: dict[str, Callable[[TriModeModel, TrainingBatch], LossSums]] = {
    "plain": plain_loss_sums,
    "trimode": loss_sums,
    "trimode, selective": partial(loss_sums, checkpointing="selective"),
    "trimode, checkpointed": partial(loss_sums, checkpointing=True),
}


def memory(device: torch.device, *, is_peak: bool) -> int:
    """Bytes that this process holds on the device, or the most it ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if is_peak else torch.cuda.memory_allocated()
    if is_peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def work(arguments: argparse.Namespace) -> None:
    """One contestant: a line of JSON when ready, one for every step asked for, one at the end."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    heads = arguments.hidden_size // 64
    config = TriModeConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=arguments.sequence_length,
        mask_token_id=MASK,
    )
    model = TriModeModel(config).to(device).train()
    is_bf16 = arguments.precision == "bf16"
    optimizer = make_optimizer(
        model, OptimizerPart(name="adamw", learning_rate=1e-3), has_fast_bf16=is_bf16
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0)  # makes its state and changes nothing
    sums_of = CONTESTANTS[arguments.worker]
    baseline = memory(device, is_peak=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        batch = make_batch(arguments, int(line)).to(device)
        counts = count_targets(batch)
        _synchronize(device)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, torch.bfloat16) if is_bf16 else nullcontext():
            sums = sums_of(model, batch)
        loss = sums.total(counts, diffusion_weight=0.3)
        loss.backward()
        optimizer.step(1.0)
        _synchronize(device)
        seconds = time.perf_counter() - started_s
        answer = {"seconds": seconds, "cpu_seconds": time.process_time() - started_cpu_s}
        print(json.dumps({**answer, "loss": float(loss.detach())}), flush=True)
    print(json.dumps({"bytes": memory(device, is_peak=True) - baseline}), flush=True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Contestant:
    """A process that takes a step when it is asked to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: list[dict[str, float]] = []
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._read()

    def step(self, number: int) -> None:
        """Forward, backward and update on the batch of that number."""
        self.steps.append(self._ask(str(number)))

    def end(self) -> int:
        """Bytes at the peak above the baseline."""
        found = self._ask("end")["bytes"]
        self._process.wait()
        return int(found)

    def _ask(self, line: str) -> dict[str, float]:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer


def model_flops(arguments: argparse.Namespace, steps: range) -> float:
    """Mean model FLOPs of some steps; the formula is at the top."""
    hidden, layers = arguments.hidden_size, arguments.num_layers
    heads = hidden // 64
    projections = hidden * 64 * (2 * heads + 2 * max(1, heads // 2))
    layer_weights = layers * (projections + 3 * hidden * 3 * hidden)
    total = 0
    for step in steps:
        batch = make_batch(arguments, step)
        rows, noise = batch.rows, batch.noise
        assert noise is not None
        targets = int(is_ar_target(rows).sum())
        targets += int((is_diffusion_target(rows, noise) & noise.is_masked).sum())
        pairs = int(dual_stream_mask(rows).sum())
        total += 6 * layer_weights * 2 * rows.clean_ids.numel()
        total += 6 * hidden * arguments.vocab_size * targets
        total += 12 * layers * heads * 64 * pairs
    return total / len(steps)


def product_rate(device: torch.device, *, is_bf16: bool) -> float:
    """FLOPs / s of one large matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(10):
        _synchronize(device)
        started_s = time.perf_counter()
        one @ other
        _synchronize(device)
        rates.append(2 * size**3 / (time.perf_counter() - started_s))
    return max(rates)


def summarise(
    contestants: list[Contestant], *, tokens: int, flops: float, peak: float
) -> list[dict[str, Any]]:
    """One row for each, compared with the first; ratios are medians over steps taken in turn."""
    plain, rows = contestants[0], []
    plain_bytes = 0
    for contestant in contestants:
        times = [step["seconds"] for step in contestant.steps]
        pairs = list(zip(plain.steps, contestant.steps, strict=True))
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
        cpu_ratios = [theirs["cpu_seconds"] / ours["cpu_seconds"] for theirs, ours in pairs]
        peak_bytes = contestant.end()
        plain_bytes = plain_bytes or peak_bytes
        seconds = statistics.median(times)
        rows.append(
            {
                "name": contestant.name,
                "tokens_per_second": tokens / seconds,
                "speed_over_plain": statistics.median(ratios),
                "speed_over_plain_range": [min(ratios), max(ratios)],
                "cpu_seconds": statistics.median(s["cpu_seconds"] for s in contestant.steps),
                "cpu_seconds_under_plain": statistics.median(cpu_ratios),
                "peak_bytes": peak_bytes,
                "memory_over_plain": peak_bytes / plain_bytes,
                "utilisation": flops / seconds / peak,
                "loss_difference": max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs),
                "steps": contestant.steps,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], about: str) -> str:
    """The Markdown summary."""
    lines = [
        about,
        "",
        "| | tokens/s | over plain | range | CPU s | plain's over it | peak memory | of plain |"
        " MFU | loss differs by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["speed_over_plain_range"]
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:.0f} | {row['speed_over_plain']:.2f}x |"
            f" {low:.2f}-{high:.2f} | {row['cpu_seconds']:.1f} |"
            f" {row['cpu_seconds_under_plain']:.2f}x | {row['peak_bytes'] / 1e6:.0f} MB |"
            f" {row['memory_over_plain']:.2f} | {100 * row['utilisation']:.0f} % |"
            f" {row['loss_difference']:.0e} |"
        )
    lines += ["", "Targets:", ""]
    for row in rows[1:]:
        speed, share = row["speed_over_plain"], row["memory_over_plain"]
        is_fast, is_small = speed >= SPEED_TARGET, share < MEMORY_TARGET
        lines.append(
            f"* {row['name']}: at least {SPEED_TARGET}x tokens/s {'met' if is_fast else 'missed'}"
            f" ({speed:.2f}x); under half the peak memory {'met' if is_small else 'missed'}"
            f" ({share:.2f})."
        )
    return "\n".join(lines) + "\n"


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, commit and settings."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    is_cuda = arguments.device == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "arguments": {k: within(v) for k, v in vars(arguments).items()},
        "machine": torch.cuda.get_device_name() if is_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "trimode": trimode.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {
        "hidden-size": 512,
        "num-layers": 8,
        "sequence-length": 1024,
        "vocab-size": 32000,
        "rows": 1,
        "documents-per-row": 1,
        "block-length": 8,
        "steps": 10,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--peak-flops", type=float, help="of the device, for MFU")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    env = environment(arguments)
    device, is_bf16 = torch.device(arguments.device), arguments.precision == "bf16"
    peak = arguments.peak_flops or product_rate(device, is_bf16=is_bf16)
    contestants = [Contestant(name) for name in CONTESTANTS]
    for number in range(arguments.steps + 1):
        for contestant in contestants:
            contestant.step(number)
    for contestant in contestants:
        contestant.steps.pop(0)  # warm-up
    peak = max(peak, arguments.peak_flops or product_rate(device, is_bf16=is_bf16))
    tokens = arguments.rows * arguments.sequence_length
    flops = model_flops(arguments, range(1, arguments.steps + 1))
    rows = summarise(contestants, tokens=tokens, flops=flops, peak=peak)
    worst = max(row["loss_difference"] for row in rows)
    if worst > LOSS_TOLERANCE:
        raise SystemExit(f"the contestants' losses differ by {worst:.1e}: not the same step")
    about = (
        f"One joint training step, {arguments.precision}, H = {arguments.hidden_size},"
        f" {arguments.num_layers} layers, {arguments.rows} x S = {arguments.sequence_length},"
        f" V = {arguments.vocab_size}, {arguments.documents_per_row} document(s) a row, half the"
        f" tokens masked, AdamW; medians of {arguments.steps} steps taken in turn."
        f" {env['machine']}, {env['threads']} threads, load average {env['load_average']:.1f}."
        f" {env['date']}, torch {env['torch']}, commit {env['commit']}.\n\n"
        f"`{env['command']}`\n\n"
        f"{flops / 1e9:.0f} GFLOP of model a step; MFU is of {peak / 1e9:.0f} GFLOP/s,"
        f" {'as given' if arguments.peak_flops else 'measured on one large matrix product'}."
        " Peak memory is above weights and optimiser state; gradients are in it."
    )
    record = {"environment": env, "model_flops": flops, "peak_flops": peak, "summary": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(rows, about)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
