"""Serving measured: throughput over concurrency per mode, and latencies under open-loop arrivals,
beside `transformers serve` with continuous batching and llama-cpp-python's server on the same
weights, in one run.

    python benchmarks/bench_serve.py --output benchmarks/results/serve_cpu_202611
    python benchmarks/bench_serve.py --model smollm2 \\
        --dtype bfloat16 --prompts benchmarks/chat_prompts.jsonl --llama-python LLAMA/bin/python \\
        --output benchmarks/results/serve_smollm2_202611

LLAMA is an environment with `llama-cpp-python[server]` and `gguf` from PyPI; it serves models that
came as a GGUF.

* Closed loop: so many requests at all times, each not streamed. Points are measured in turn, all of
  them in every repeat, so that a machine that slows down slows all; the tables give the mean and
  the range over the repeats.
* Open loop: requests arrive by a Poisson process whether or not earlier ones are done, each
  streamed. Latencies are from when a request was due, so a client that falls behind hides nothing.

The client shares the machine with the server it measures, and does so for every contestant. All
servers are up at the same time; those that are not measured wait for requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from bench_decode import POCKET_MODEL, environment, transformers_twin

import trimode
from trimode.checkpoint.names import KNOWN, find_source

CONCURRENCY = (1, 2, 4, 8, 16, 32)
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion": {"mode": "diffusion"},
    "linear": {"mode": "linear"},
    "branching": {"mode": "branching", "block_length": 2, "branches": 1},
    "auto": {"mode": "auto"},
}
DRAFTER_MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "linear": {"mode": "linear", "lookup": True, "min_gain": 0.1},
    "branching": {
        **{"mode": "branching", "block_length": 8, "skip_masks": 4, "branches": 1},
        **{"guesses": False, "lookup": True, "min_gain": 0.0},
    },
    "auto": {"mode": "auto"},
}
"""With a drafter adapter whose masks skip the bonus."""


def has_drafter(arguments: argparse.Namespace) -> bool:
    """Whether the model drafts with an adapter, its name's own or a given one."""
    known = KNOWN.get(arguments.model)
    return arguments.drafter is not None or (known is not None and known.drafter is not None)


LLAMA_KINDS = {"float32": "f32", "bfloat16": "bf16"}
PEERS = {"transformers": "transformers serve", "llama.cpp": "llama_cpp.server"}
LLAMA_FIELDS = {"repeat_penalty": 1.0, "logit_bias_type": "input_ids"}
"""Greedy as the others are, for by default it penalises repetitions."""

OURS_ONLY = {"ignore_eos": True}
LOADS = (0.3, 0.6)
"""Arrival rates over what `ar` did at the highest concurrency."""

REQUEST_TIMEOUT_S = 120.0
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Contestant:
    """A way of being served: where, and what its requests have beside the prompt."""

    name: str
    url: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """One request, in seconds from when it was due.

    Attributes:
        first_s: To the first text; None if it was not streamed.
        total_s: To the end.
        gaps_s: Between one chunk of text and the next.
        num_tokens: New ones.
        status: 200, or what went wrong.
    """

    total_s: float
    num_tokens: int
    status: int = 200
    first_s: float | None = None
    gaps_s: tuple[float, ...] = ()


@contextlib.contextmanager
def served(words: list[str], *, port: int, log: Path) -> Iterator[str]:
    """A server in a process of its own, until the block ends; yields its address."""
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as sink:
        process = subprocess.Popen(
            words,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "GOMP_SPINCOUNT": "3000", "HF_HUB_OFFLINE": "1"},
        )
        try:
            until = time.monotonic() + START_TIMEOUT_S
            while True:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{' '.join(words)} did not start; see {log}")
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(url + "/health", timeout=2)
                    break
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def ask(
    client: httpx.AsyncClient, contestant: Contestant, prompt: str, new_tokens: int
) -> Timing:
    """One request, not streamed."""
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, **contestant.fields}
    started = time.perf_counter()
    answer = await client.post(contestant.url + "/v1/completions", json=body)
    total = time.perf_counter() - started
    if answer.status_code != 200:
        return Timing(total, 0, answer.status_code)
    return Timing(total, answer.json()["usage"]["completion_tokens"])


async def ask_streamed(
    client: httpx.AsyncClient, contestant: Contestant, prompt: str, new_tokens: int, *, due: float
) -> Timing:
    """One request, streamed; times are from `due`."""
    body = {
        **{"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True},
        "stream_options": {"include_usage": True},
        **contestant.fields,
    }
    stamps: list[float] = []
    num_tokens = 0
    url = contestant.url + "/v1/completions"
    async with client.stream("POST", url, json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return Timing(time.perf_counter() - due, 0, answer.status_code)
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return Timing(time.perf_counter() - due, 0, 500)
            if any(choice.get("text") for choice in chunk["choices"]):
                stamps.append(time.perf_counter())
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    total = time.perf_counter() - due
    num_tokens = num_tokens or len(stamps)  # where no usage comes, a chunk is a token
    if not stamps:
        return Timing(total, num_tokens)
    gaps = tuple(b - a for a, b in zip(stamps, stamps[1:], strict=False))
    return Timing(total, num_tokens, 200, stamps[0] - due, gaps)


async def closed_loop(
    contestant: Contestant, prompts: list[str], *, concurrency: int, num: int, new_tokens: int
) -> dict[str, float]:
    """So many requests at all times, `num` in all."""
    left = iter(range(num))
    found: list[Timing] = []
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:

        async def worker() -> None:
            for number in left:
                prompt = prompts[number % len(prompts)]
                found.append(await ask(client, contestant, prompt, new_tokens))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    failed = [one.status for one in found if one.status != 200]
    if failed:
        raise RuntimeError(f"{contestant.name}: {len(failed)} of {num} failed, first {failed[0]}")
    tokens = sum(one.num_tokens for one in found)
    num_short = sum(one.num_tokens != new_tokens for one in found)
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "texts_that_ended_early": num_short,
    }


async def open_loop(
    contestant: Contestant,
    prompts: list[str],
    *,
    rate: float,
    seconds: float,
    new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Arrivals at `rate` a second for so long; all are waited for."""
    chance = random.Random(seed)
    due_s, arrivals = 0.0, []
    while (due_s := due_s + chance.expovariate(rate)) < seconds:
        arrivals.append(due_s)
    async with httpx.AsyncClient(
        timeout=REQUEST_TIMEOUT_S, limits=httpx.Limits(max_connections=None)
    ) as client:
        start = time.perf_counter()

        async def one(number: int, at: float) -> Timing:
            await asyncio.sleep(max(start + at - time.perf_counter(), 0))
            prompt, due = prompts[number % len(prompts)], start + at
            try:
                return await ask_streamed(client, contestant, prompt, new_tokens, due=due)
            except httpx.TimeoutException:
                return Timing(time.perf_counter() - due, 0, 408)

        found = await asyncio.gather(*(one(i, at) for i, at in enumerate(arrivals)))
        took = time.perf_counter() - start
    good = [one for one in found if one.status == 200 and one.first_s is not None]
    between = [
        (one.total_s - one.first_s) / (one.num_tokens - 1)
        for one in good
        if one.first_s is not None and one.num_tokens > 1
    ]
    return {
        "arrivals": len(arrivals),
        "failed": len(found) - len(good),
        "tokens_per_second": sum(one.num_tokens for one in good) / took,
        "first_s": quantiles([one.first_s for one in good if one.first_s is not None]),
        "between_tokens_s": quantiles(between),
        "between_chunks_s": quantiles([gap for one in good for gap in one.gaps_s]),
        "total_s": quantiles([one.total_s for one in good]),
    }


def quantiles(values: list[float]) -> dict[str, float | None]:
    ranked = sorted(values)

    def at(share: float) -> float | None:
        return ranked[min(int(share * len(ranked)), len(ranked) - 1)] if ranked else None

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99)}


async def measure(
    contestants: list[Contestant], prompts: list[str], arguments: argparse.Namespace
) -> None:
    """All points; what there is, is written after each part."""
    closed: dict[str, dict[int, list[dict[str, float]]]] = {}
    for contestant in contestants:  # the first requests pay for what is made once
        await closed_loop(contestant, prompts, concurrency=4, num=4, new_tokens=8)
    for repeat in range(arguments.repeats):
        for concurrency in CONCURRENCY:
            first = repeat % len(contestants)
            order = contestants[first:] + contestants[:first]
            for contestant in order:
                point = await closed_loop(
                    *(contestant, prompts),
                    concurrency=concurrency,
                    num=max(arguments.least_requests, 2 * concurrency),
                    new_tokens=arguments.new_tokens,
                )
                closed.setdefault(contestant.name, {}).setdefault(concurrency, []).append(point)
            print(f"repeat {repeat + 1}, concurrency {concurrency}", file=sys.stderr)
    best = statistics.mean(point["tokens_per_second"] for point in closed["ar"][max(CONCURRENCY)])
    loaded: dict[str, list[dict[str, Any]]] = {name: [] for name in closed}
    write(arguments, closed, loaded, num_prompts=len(prompts))
    for load in LOADS:
        rate = load * best / arguments.new_tokens
        for contestant in contestants:
            point = await open_loop(
                *(contestant, prompts),
                rate=rate,
                seconds=arguments.open_seconds,
                new_tokens=arguments.new_tokens,
                seed=1,
            )
            loaded[contestant.name].append({"load": load, "rate": rate, **point})
            print(f"load {load}, {contestant.name}", file=sys.stderr)
        write(arguments, closed, loaded, num_prompts=len(prompts))


def closed_table(closed: dict[str, dict[int, list[dict[str, float]]]]) -> list[str]:
    lines = [
        "| tokens/s at concurrency | " + " | ".join(map(str, CONCURRENCY)) + " |",
        "|---" * (len(CONCURRENCY) + 1) + "|",
    ]
    for name, points in closed.items():
        cells = []
        for concurrency in CONCURRENCY:
            speeds = [point["tokens_per_second"] for point in points[concurrency]]
            cells.append(f"{statistics.mean(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    head = [lines[0].replace("tokens/s at", "times at"), lines[1]]
    for peer in (name for name in PEERS if name in closed):
        lines += ["", f"Over `{PEERS[peer]}`, the median of the ratios within each repeat:", ""]
        lines += head
        for name, points in closed.items():
            cells = []
            for concurrency in CONCURRENCY:
                pairs = zip(points[concurrency], closed[peer][concurrency], strict=True)
                ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
                cells.append(f"{statistics.median(ratios):.2f}x")
            if name not in PEERS:
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def open_table(loaded: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| load | requests/s | | first token, ms | between tokens, ms | whole text, s | tokens/s |"
        " failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number in range(min(map(len, loaded.values()))):
        for name, points in loaded.items():
            point = points[number]
            load = point["load"]
            cells = [f"{load:g}", f"{point['rate']:.2f}", name]
            cells.append(_three(point["first_s"], 1e3, ".0f"))
            cells.append(_three(point["between_tokens_s"], 1e3, ".1f"))
            cells.append(_three(point["total_s"], 1, ".2f"))
            cells += [f"{point['tokens_per_second']:.0f}", f"{point['failed']}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _three(found: dict[str, float | None], scale: float, form: str) -> str:
    values = [found["p50"], found["p95"], found["p99"]]
    return " / ".join("-" if v is None else format(scale * v, form) for v in values)


def write(
    arguments: argparse.Namespace,
    closed: dict[str, dict[int, list[dict[str, float]]]],
    loaded: dict[str, list[dict[str, Any]]],
    *,
    num_prompts: int,
) -> None:
    """OUTPUT.md and OUTPUT.json."""
    env = environment(arguments) | {"batch_size": f"up to {max(CONCURRENCY)}"}
    llama = ""
    if "llama.cpp" in closed:
        llama = (
            " llama-cpp-python's server (`llama_cpp.server`), which answers one request at a time,"
            " on the same weights."
        )
    modes = DRAFTER_MODES if has_drafter(arguments) else MODES
    shapes = "; ".join(f"`{name}`: {json.dumps(fields)}" for name, fields in modes.items())
    text = [
        f"Served over HTTP on loopback, client on the same machine: {arguments.model}, drafter"
        f" {arguments.drafter or 'its own'}, {env['machine']}, {env['threads']} threads,"
        f" {arguments.dtype}, greedy, {arguments.new_tokens} new tokens, {num_prompts} held-out"
        f" prompts in turn, {arguments.repeats} repeats. `transformers serve` {env['transformers']}"
        f" with --continuous-batching and sdpa on the same weights.{llama} {shapes}."
        f" {env['date']}, torch"
        f" {env['torch']}, commit {env['commit']}. `{env['command']}`",
        "",
        "Closed loop, mean and range over the repeats:",
        "",
        *closed_table(closed),
        "",
        "Open loop, Poisson arrivals at a share of what `ar` did at the highest concurrency;"
        " p50 / p95 / p99:",
        "",
        *open_table(loaded),
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    record = json.dumps({"environment": env, "closed": closed, "open": loaded}, indent=1)
    arguments.output.with_suffix(".json").write_text(record + "\n", encoding="utf-8")


def _llama_server(arguments: argparse.Namespace, port: int, path: Path) -> list[str]:
    """Its command, for the model's own file with the weights in the form that is measured."""
    python, worker = str(arguments.llama_python), Path(__file__).parent / "llama_cpp_worker.py"
    source, kind = str(find_source(arguments.model)), LLAMA_KINDS[arguments.dtype]
    subprocess.run([python, str(worker), "rewrite", source, kind, str(path)], check=True)
    threads = str(torch.get_num_threads())
    words = [python, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port)]
    words += ["--n_ctx", "1024", "--n_threads", threads, "--n_threads_batch", threads]
    return [*words, "--interrupt_requests", "false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--drafter", default=None)
    parser.add_argument("--dtype", default="float32", choices=LLAMA_KINDS)
    parser.add_argument("--llama-python", type=Path, default=None)
    parser.add_argument("--prompts", type=Path, default=POCKET_MODEL / "heldout_prompts.jsonl")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--least-requests", type=int, default=8, help="of a point")
    parser.add_argument("--open-seconds", type=float, default=20.0, help="of arrivals, each point")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    scripts = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        lm = trimode.load(arguments.model, weights="plain", dtype=getattr(torch, arguments.dtype))
        twin = work / "twin"
        transformers_twin(lm).to(lm.model.dtype).save_pretrained(twin)
        assert lm.tokenizer is not None
        lm.tokenizer.save_pretrained(twin)
        eos_ids = lm.model.config.eos_token_ids
        del lm
        port = free_port()
        ours = [str(scripts / "trimode"), "serve", arguments.model, "--port", str(port)]
        ours += ["--max-context", "1024", "--dtype", arguments.dtype]
        if arguments.drafter is not None:
            ours += ["--drafter", arguments.drafter]
        own = stack.enter_context(served(ours, port=port, log=work / "ours.log"))
        port = free_port()
        theirs = [str(scripts / "transformers"), "serve", str(twin), "--port", str(port)]
        theirs += ["--continuous-batching", "--device", "cpu", "--dtype", arguments.dtype]
        theirs += ["--attn-implementation", "sdpa"]
        other = stack.enter_context(served(theirs, port=port, log=work / "theirs.log"))
        modes = DRAFTER_MODES if has_drafter(arguments) else MODES
        contestants = [Contestant(name, own, {**f, **OURS_ONLY}) for name, f in modes.items()]
        contestants.append(Contestant("transformers", other, {"model": str(twin)}))
        if arguments.llama_python is not None:
            port = free_port()
            words = _llama_server(arguments, port, work / "model.gguf")
            third = stack.enter_context(served(words, port=port, log=work / "llama.log"))
            never = {str(i): -100.0 for i in eos_ids}
            contestants.append(Contestant("llama.cpp", third, LLAMA_FIELDS | {"logit_bias": never}))
        asyncio.run(measure(contestants, prompts, arguments))


if __name__ == "__main__":
    main()
