"""Does trimode give on a GPU what it gives on the CPU, and how fast? One script of six minutes.

    PYTHONPATH=src python3 benchmarks/gpu_check.py --output gpu.json
    PYTHONPATH=src python3 benchmarks/gpu_check.py --device cpu --small --output rehearsal.json

`make gpu` runs the first line; the second one rehearses every part on the CPU at a tiny shape. It
needs torch, transformers, safetensors, tokenizers and numpy, and no network: the models are the one
in the package and random ones. The parts, in this order:

* noise: the same bits as on the CPU, and the same choices from the same logits;
* tokens: texts of every mode, float32 against the CPU, bfloat16 among the modes;
* adapters: on and off;
* serving: mixed modes under load;
* training: FlexAttention against dense attention, bfloat16 steps against float32 ones on the CPU;
* speed: the 8B shape with random weights, batch 1 and 32, and one joint training step.

Two texts may differ only where the reference itself all but wavers; see `gpu_tokens.py`. Each part
runs in a process of its own, with a time limit, so none stops the others. The exit status is 1 if a
check failed, 2 if the script cannot run here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

NEEDED = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "trimode")
TOTAL_S = 350.0
"""No part is begun after so long, and none may run longer."""
PATIENCE = 2.5
"""A rehearsal has so many times each part's time, for machines that are slow or busy."""


def missing(device: str) -> str | None:
    """What this machine lacks, in one line; None if nothing."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            reason = str(error).partition("\n")[0]
            return f"{name} cannot be imported by {sys.executable} ({reason})"
    if device == "cpu":
        return None
    found = in_own_process(_probe, limit_s=60.0)
    if "has_cuda" not in found:
        return f"CUDA cannot be asked for: {found.get('error', found)}"
    if not found["has_cuda"]:
        import torch

        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        return (
            f"torch {torch.__version__}, built for {built}, sees no CUDA device; name another"
            " Python with GPU_PYTHON=..., or rehearse with --device cpu --small"
        )
    return None


def _probe(write: Callable[[dict[str, Any]], None]) -> None:
    import torch

    write({"has_cuda": torch.cuda.is_available()})


def in_own_process(
    work: Callable[[Callable[[dict[str, Any]], None]], None], *, limit_s: float
) -> dict[str, Any]:
    """What `work` wrote last; with an `error` if it ended badly, or not within `limit_s`.

    The process is a fork, which is quick. This process itself must never touch CUDA.
    """
    context = get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, writer))
    process.start()
    writer.close()
    found: dict[str, Any] = {}
    end_s = time.monotonic() + limit_s
    while True:
        if not reader.poll(max(0.0, end_s - time.monotonic())):
            found["error"] = f"ended after {limit_s:.0f} s, its limit"
            process.kill()
            break
        try:
            found = reader.recv()
        except EOFError:
            break
    process.join(10)
    if process.exitcode and "error" not in found:
        found["error"] = f"ended with status {process.exitcode}"
    return found


def _work(work: Callable[[Callable[[dict[str, Any]], None]], None], writer: Connection) -> None:
    work(writer.send)
    writer.close()
    sys.stdout.flush()
    os._exit(0)  # a CUDA context is not worth taking down in order


def run_part(number: int, *, device: str, is_small: bool, limit_s: float) -> dict[str, Any]:
    """Run one part; whatever it does, a record comes back."""

    def work(write: Callable[[dict[str, Any]], None]) -> None:
        import torch

        part = parts()[number]
        budget_s = min(part.budget_s * (PATIENCE if is_small else 1), 0.85 * limit_s)
        setting = Setting(torch.device(device), is_small, time.monotonic() + budget_s)
        record = Record()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        try:
            part.run(setting, record)
        except Exception as error:
            record.check("ran to its end", False, error=traceback.format_exc())
            print(f"{part.name}: {type(error).__name__}: {error}", file=sys.stderr)
        write(record.as_dict())

    from gpu_record import Record, Setting

    started_s = time.perf_counter()
    found = in_own_process(work, limit_s=limit_s)
    if "error" in found or not found:
        error = found.pop("error", "nothing came back")
        empty: dict[str, Any] = {"checks": [], "figures": {}, "left_out": []}
        found = empty | found | {"status": "fail"}
        found["checks"].append({"name": "ran to its end", "is_good": False, "error": error})
    return found | {"seconds": round(time.perf_counter() - started_s, 1)}


def parts() -> list[Any]:
    """All of them, in order."""
    import gpu_engine
    import gpu_speed
    import gpu_tokens
    import gpu_training
    from gpu_record import Part

    return [
        Part("noise", gpu_tokens.noise, 15, 30),
        Part("tokens", gpu_tokens.tokens, 85, 110),
        Part("adapters", gpu_engine.adapters, 20, 35),
        Part("serving", gpu_engine.serving, 65, 90),
        Part("training", gpu_training.training, 60, 80),
        Part("speed", gpu_speed.speed, 60, 80),
    ]


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions, commit."""
    import torch
    import transformers
    from bench_decode import cpu_name

    import trimode

    def ask(write: Callable[[dict[str, Any]], None]) -> None:
        found = torch.cuda.get_device_properties(0)
        write(
            {
                "gpu": found.name,
                "gpu_memory_gib": round(found.total_memory / 2**30, 1),
                "capability": [found.major, found.minor],
            }
        )

    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "trimode": trimode.__version__,
        "commit": commit,
        **(in_own_process(ask, limit_s=60.0) if device == "cuda" else {}),
    }


def shown(name: str, found: dict[str, Any]) -> str:
    """A part in a few lines: its status, then what failed and what was left out."""
    checks = found["checks"]
    num_good = sum(check["is_good"] for check in checks)
    lines = [
        f"{name:<10} {found['status']:<8} {num_good:>4}/{len(checks):<4} checks"
        f" {found.get('seconds', 0.0):>7.1f} s"
    ]
    for check in checks:
        if not check["is_good"]:
            rest = {k: v for k, v in check.items() if k not in ("name", "is_good")}
            text = json.dumps(rest)
            lines.append(f"    FAILED {check['name']}: {text if len(text) < 400 else text[-400:]}")
    lines += [f"    left out: {what}" for what in found["left_out"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a rehearsal")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    arguments = parser.parse_args()
    lacking = missing(arguments.device)
    if lacking is not None:
        print(f"gpu_check: {lacking}", file=sys.stderr)
        return 2
    all_parts = parts()
    names = [part.name for part in all_parts]
    unknown = set(arguments.parts or ()) - set(names)
    if unknown:
        print(f"gpu_check: no part {sorted(unknown)}; allowed: {names}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started_s = time.monotonic()
    record: dict[str, Any] = {
        "arguments": {"device": arguments.device, "small": arguments.small},
        "environment": environment(arguments.device),
        "parts": {},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(all_parts):
        left_s = TOTAL_S - (time.monotonic() - started_s)
        if arguments.parts and part.name not in arguments.parts:
            continue
        if left_s < 5:
            found = {"status": "skipped", "checks": [], "figures": {}}
            found["left_out"] = [f"all of it: {TOTAL_S:.0f} s were over"]
        else:
            found = run_part(
                number,
                device=arguments.device,
                is_small=arguments.small,
                limit_s=min(part.limit_s * (PATIENCE if arguments.small else 1), left_s),
            )
        record["parts"][part.name] = found
        record["seconds"] = round(time.monotonic() - started_s, 1)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(shown(part.name, found), flush=True)
    statuses = [found["status"] for found in record["parts"].values()]
    verdict = "FAILED" if "fail" in statuses else "passed"
    print(f"{verdict} in {record['seconds']:.0f} s; figures in {arguments.output}")
    return int("fail" in statuses)


if __name__ == "__main__":
    sys.exit(main())
