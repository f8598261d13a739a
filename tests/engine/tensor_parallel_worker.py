"""What ranks do for `test_tensor_parallel.py`, which compares it with what one process does.

A program, `python -m tests.engine.tensor_parallel_worker FOLDER`: forks two ranks, so that Python
and torch start once, for one world after the other. Each leaves what it found in `WORLD.RANK.json`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trimode
from tests.free_ports import free_ports
from trimode.checkpoint.share import load_share
from trimode.decoding import GenerationParams, Sequence
from trimode.engine import Engine
from trimode.engine.ranks import Ranks, join
from trimode.errors import TriModeError
from trimode.model import KVCache
from trimode.runtime import TriModeLM

CPU = torch.device("cpu")
TIMEOUT_S = 3.0
"""In the worlds where a rank goes away."""

REQUESTS: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "linear"},
    {"mode": "branching"},
    {"mode": "quadratic", "temperature": 0.8, "top_p": 0.9},
    {"mode": "diffusion", "threshold": 0.5},
    {"mode": "diffusion", "temperature": 1.0, "steps": 3},
    {"mode": "linear", "temperature": 1.0, "top_p": 0.8},
    {"mode": "ar", "temperature": 1.3, "top_k": 20},
]

CASES: dict[str, dict[str, Any]] = {
    "tied": {"drafter": "drafter"},
    "untied": {"drafter": "wide", "lora": "lora"},
}
"""Checkpoint -> how it is loaded."""


def load(folder: Path, case: str, **options: Any) -> TriModeLM:
    return trimode.load(folder / case, device="cpu", dtype="float64", **CASES[case], **options)


def mixed(lm: TriModeLM) -> dict[str, Any]:
    """All modes in one batch, with chunked prefill, shared prompts and rows that change hands."""
    engine = Engine(
        lm.model, num_rows=3, num_cells=128, adapter=lm.adapter, token_budget=48, time_slice=5
    )
    sequences: list[Sequence] = []
    for index, request in enumerate(REQUESTS):
        prompt = [*range(1, 70), *([index] if index % 2 else [])]
        values: dict[str, Any] = {"max_new_tokens": 13, "block_length": 4, "seed": index}
        params = GenerationParams(**(values | {"ignore_eos": True} | request))
        sequences.append(lm.sequence(prompt, params))
        engine.submit(sequences[-1])
    engine.run()
    counts = engine.counts
    return {
        "tokens": [seq.new_ids for seq in sequences],
        "has_reused": counts.reused_tokens > 0,
        "has_preempted": counts.preemptions > 0,
    }


def everything(lm: TriModeLM) -> dict[str, Any]:
    """What a user of one process does, and what was drafted."""
    found = mixed(lm)
    events: list[Any] = []
    options = {"max_new_tokens": 12, "seed": 1, "temperature": 0.5}
    lm.generate("abc", mode="linear", on_event=lambda _, event: events.append(event), **options)
    found["drafts"] = [list(event.token_ids) for event in events if event.kind == "draft"]
    found["streamed"] = list(lm.stream("abc", mode="diffusion", max_new_tokens=9, seed=1))
    logits = lm.model(torch.arange(20)[None], pattern="bidirectional").logits
    found["logits"] = logits[0, :, :4].tolist()
    return found


def equal(case: str) -> Callable[[Path], Any]:
    """Everything, on two ranks."""

    def run(folder: Path) -> Any:
        lm = load(folder, case, tensor_parallel=True)
        assert lm.ranks is not None
        if not lm.ranks.is_leader:
            head = lm.model.diffusion_head.weight
            sizes = {name: list(p.shape) for name, p in _local_parameters(lm.model).items()}
            error = _error(lambda: lm.generate([1], max_new_tokens=2))
            lm.ranks.follow()
            num_caches = sum(isinstance(thing, KVCache) for thing in gc.get_objects())
            found = {"sizes": sizes, "is_head_there": not head.is_meta, "error": error}
            return found | {"num_caches": num_caches}
        found = everything(lm)
        found["errors"] = [_error(lambda: lm.model.pack("native"))]
        lm.ranks.close()
        found["errors"].append(_error(lambda: lm.generate([1], max_new_tokens=2)))
        return found

    return run


def scrubbed(folder: Path) -> Any:
    """A row that was not finite, and then its next owner."""
    lm = load(folder, "untied", tensor_parallel=True)
    assert lm.ranks is not None
    if not lm.ranks.is_leader:
        lm.ranks.follow()
        return None
    weight = lm.model.encoder.embed_tokens.weight
    before = weight[7].clone()
    weight[7] = float("nan")  # on this rank only; the sum over ranks brings it to the others
    engine = Engine(lm.model, num_rows=2, num_cells=40)
    sequences = scrubbed_sequences(lm)
    for seq in sequences:
        engine.submit(seq)
    engine.step()
    weight[7] = before
    engine.run()
    lm.ranks.close()
    return [[seq.finish_reason, seq.new_ids] for seq in sequences]


def scrubbed_sequences(lm: TriModeLM) -> list[Sequence]:
    """The second is aborted; the third gets its row, beside the first, which looks further."""
    params = GenerationParams(mode="ar", max_new_tokens=9, block_length=4, seed=0, ignore_eos=True)
    prompts = list(range(20, 40)), [7, 8, 9, 10, 11, 12], [1, 2]
    return [lm.sequence(prompt, params) for prompt in prompts]


def refused(folder: Path) -> Any:
    """Two ranks cannot share out an odd number of heads, nor packed weights, nor two models."""
    rank = int(os.environ["RANK"])
    errors = [
        _error(lambda: trimode.load(folder / "odd", device="cpu", tensor_parallel=True)),
        _error(lambda: load(folder, "tied", tensor_parallel=True, weights="native")),
    ]
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    other = "tied" if rank == 0 else "untied"
    errors.append(_error(lambda: load(folder, other, tensor_parallel=True)))
    return errors


def goes_away(who: int, number: int, *, is_idle: bool) -> Callable[[Path], Any]:
    """A rank gets a signal, while others wait for it or in the midst of decoding."""

    def run(folder: Path) -> Any:
        lm = _connected(folder)
        ranks = lm.ranks
        assert ranks is not None
        started_s = time.perf_counter()

        def go(*_: Any) -> None:
            _note(folder, "gone", rank=who, value=os.getpid())
            os.kill(os.getpid(), number)

        if ranks.rank == who and who == 1:
            num_before = 0 if is_idle else 5
            lm.model.encoder.layers[0].register_forward_pre_hook(_after(num_before, go))
        if ranks.is_leader:
            if who == 0 and is_idle:
                go()
            on_event = _after(3, go) if who == 0 else None
            error = _error(lambda: lm.generate([1, 2], max_new_tokens=40, on_event=on_event))
            error = [error, _error(lambda: lm.generate([1, 2], max_new_tokens=4))]
            ranks.close()
        else:
            error = [_error(ranks.follow)]
        return {"error": error, "seconds": time.perf_counter() - started_s}

    return run


def breaks(folder: Path) -> Any:
    """Rank 0 fails in the midst of a forward and lives on: the other must not wait for it."""
    lm = _connected(folder)
    assert lm.ranks is not None
    started_s = time.perf_counter()
    if not lm.ranks.is_leader:
        error = _error(lm.ranks.follow)
        return {"error": [error], "seconds": time.perf_counter() - started_s}

    def fail(*_: Any) -> None:
        raise MemoryError("no memory")

    lm.model.encoder.layers[1].register_forward_pre_hook(_after(3, fail))
    try:
        lm.generate([1, 2], max_new_tokens=40)
    except MemoryError as error:
        found = str(error)
    deadline_s = time.perf_counter() + 20
    while not (folder / "breaks.1.json").exists() and time.perf_counter() < deadline_s:
        time.sleep(0.02)
    return {"error": [found], "is_other_ended": (folder / "breaks.1.json").exists()}


def idles(folder: Path) -> Any:
    """Nobody asks for anything for longer than the timeout; then somebody does."""
    lm = _connected(folder)
    assert lm.ranks is not None
    if not lm.ranks.is_leader:
        return _error(lm.ranks.follow)
    time.sleep(1.5 * TIMEOUT_S)
    generation = lm.generate([1, 2, 3], mode="ar", max_new_tokens=5, seed=0)
    lm.ranks.close()
    return generation.token_ids


WORLDS: dict[str, Callable[[Path], Any]] = {
    "tied": equal("tied"),
    "untied": equal("untied"),
    "scrubbed": scrubbed,
    "refused": refused,
    "breaks": breaks,
    "idles": idles,
    "follower_killed": goes_away(1, signal.SIGKILL, is_idle=False),
    "follower_hangs": goes_away(1, signal.SIGSTOP, is_idle=True),
    "leader_killed": goes_away(0, signal.SIGKILL, is_idle=False),
    "leader_hangs": goes_away(0, signal.SIGSTOP, is_idle=True),
}
LEFT = ("follower_killed", "follower_hangs", "leader_killed", "leader_hangs")
"""Worlds in which a rank goes away."""


def _connected(folder: Path) -> TriModeLM:
    ranks: Ranks = join(CPU, timeout_s=TIMEOUT_S)
    model = load_share(folder / "tied", mesh=ranks.mesh, device=CPU, dtype="float64")
    ranks.connect(model, None)
    return TriModeLM(model, None, ranks=ranks)


def _after(number: int, action: Callable[..., None]) -> Callable[..., None]:
    calls = [0]

    def count(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > number:
            action(*arguments)

    return count


def _local_parameters(model: Any) -> dict[str, Any]:
    parameters = {name: p for name, p in model.named_parameters() if ".0." in name}
    return {n: p.to_local() if hasattr(p, "to_local") else p for n, p in parameters.items()}


def _error(action: Callable[[], object]) -> str:
    try:
        action()
    except TriModeError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _note(folder: Path, world: str, *, rank: int, value: Any) -> None:
    file = folder / f"{world}.{rank}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.rename(file)


def _rank(world: str, folder: Path, *, rank: int, ports: list[int]) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": ports[0]}
    os.environ |= {name: str(value) for name, value in values.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "SECOND_PORT": str(ports[1])}
    _note(folder, world, rank=rank, value=WORLDS[world](folder))


def launch(world: str, folder: Path) -> None:
    """Forks the ranks of one world and waits for them; one that hangs on purpose is ended."""
    children = []
    ports = free_ports(2)
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _rank(world, folder, rank=rank, ports=ports)
                code = 0
            except BaseException as error:
                print(f"{world}, rank {rank}: {error!r}", file=sys.stderr)
                raise
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    deadline_s = time.perf_counter() + 60
    while children and time.perf_counter() < deadline_s:
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                continue
            if pid:
                children.remove(child)
        stopped = folder / "gone.0.json", folder / "gone.1.json"
        gone = [json.loads(file.read_text()) for file in stopped if file.exists()]
        if children and set(children) <= set(gone):
            break
        time.sleep(0.02)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for file in folder.glob("gone.*.json"):
        file.unlink()


def main(folder: Path, worlds: list[str]) -> None:
    torch.set_num_threads(1)
    for world in worlds or list(WORLDS):
        started_s = time.perf_counter()
        launch(world, folder)
        print(f"{world}: {time.perf_counter() - started_s:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
