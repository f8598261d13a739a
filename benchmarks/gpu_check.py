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
PARTS: dict[str, tuple[str, float, float]] = {
    "noise": ("gpu_tokens", 15, 30),
    "tokens": ("gpu_tokens", 85, 110),
    "adapters": ("gpu_engine", 20, 35),
    "serving": ("gpu_engine", 65, 90),
    "training": ("gpu_training", 60, 80),
    "speed": ("gpu_speed", 60, 80),
}
"""Name, which is also the function's, then its module, after how many seconds it takes up nothing
new, and after how many it is ended."""
TOTAL_S = 350.0
"""No part is begun after so long, and none may run longer."""
PATIENCE = 2.5
"""A rehearsal has so many times each part's time, for machines that are slow or busy."""


def missing(device: str) -> str | None:
    """What this machine lacks, in one line; None if nothing. Imports what the parts need."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            reason = str(error).partition("\n")[0]
            return f"{name} cannot be imported by {sys.executable} ({reason})"
    import torch

    if device == "cpu" or torch.cuda.is_available():
        return None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    return (
        f"torch {torch.__version__}, built for {built}, sees no CUDA device; name another Python"
        " with GPU_PYTHON=..., or rehearse with --device cpu --small"
    )


def in_own_process(
    work: Callable[[Callable[[dict[str, Any]], None]], None], *, limit_s: float
) -> dict[str, Any]:
    """What `work` wrote last; with an `error` if it ended badly, or not within `limit_s`.

    The process is a fork, and CUDA does not survive one. So where parts run on a GPU, this process
    imports nothing that could ask for one.
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


def run_part(name: str, *, device: str, is_small: bool, limit_s: float) -> dict[str, Any]:
    """Run one part; whatever it does, a record comes back."""
    module, budget_s, _ = PARTS[name]

    def work(write: Callable[[dict[str, Any]], None]) -> None:
        import torch
        from gpu_record import Record, Setting

        run = getattr(importlib.import_module(module), name)
        left_s = min(budget_s * (PATIENCE if is_small else 1), 0.85 * limit_s)
        setting = Setting(torch.device(device), is_small, time.monotonic() + left_s)
        record = Record(keep=write)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        try:
            run(setting, record)
        except Exception as error:
            record.check("ran to its end", False, error=traceback.format_exc())
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        write(record.as_dict())

    started_s = time.perf_counter()
    found = in_own_process(work, limit_s=limit_s)
    if "error" in found or not found:
        error = found.pop("error", "nothing came back")
        empty: dict[str, Any] = {"checks": [], "figures": {}, "left_out": []}
        found = empty | found | {"status": "fail"}
        found["checks"].append({"name": "ran to its end", "is_good": False, "error": error})
    return found | {"seconds": round(time.perf_counter() - started_s, 1)}


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions, commit."""
    import torch
    import transformers
    from bench_decode import cpu_name

    import trimode

    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "trimode": trimode.__version__,
        "commit": commit,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"], found["capability"] = gpu.name, [gpu.major, gpu.minor]
        found["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
    return found


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
    unknown = set(arguments.parts or ()) - set(PARTS)
    if unknown:
        print(f"gpu_check: no part {sorted(unknown)}; allowed: {list(PARTS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started_s = time.monotonic()
    if arguments.device == "cpu":
        for name in {module for module, _, _ in PARTS.values()} if missing("cpu") is None else ():
            importlib.import_module(name)  # once for all parts

    def look(write: Callable[[dict[str, Any]], None]) -> None:
        lacking = missing(arguments.device)
        write({"lacking": lacking} if lacking else environment(arguments.device))

    found = in_own_process(look, limit_s=90.0)
    lacking = found.get("lacking", found.get("error"))
    if lacking is not None:
        print(f"gpu_check: {lacking}", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "arguments": {"device": arguments.device, "small": arguments.small},
        "environment": found,
        "parts": {},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name, (_, _, limit_s) in PARTS.items():
        left_s = TOTAL_S - (time.monotonic() - started_s)
        if arguments.parts and name not in arguments.parts:
            continue
        if left_s < 5:
            found = {"status": "skipped", "checks": [], "figures": {}}
            found["left_out"] = [f"all of it: {TOTAL_S:.0f} s were over"]
        else:
            found = run_part(
                name,
                device=arguments.device,
                is_small=arguments.small,
                limit_s=min(limit_s * (PATIENCE if arguments.small else 1), left_s),
            )
        record["parts"][name] = found
        record["seconds"] = round(time.monotonic() - started_s, 1)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(shown(name, found), flush=True)
    statuses = [found["status"] for found in record["parts"].values()]
    verdict = "FAILED" if "fail" in statuses else "passed"
    num_left_out = sum(len(found["left_out"]) for found in record["parts"].values())
    verdict += f", {num_left_out} things left out," if num_left_out else ""
    print(f"{verdict} in {record['seconds']:.0f} s; figures in {arguments.output}")
    return int("fail" in statuses)


if __name__ == "__main__":
    sys.exit(main())
