"""Trains the same run again and again, cut off at another place each time, for `test_faults.py`.

A program, since what it tests ends processes: `python -m tests.training.killed_train CONFIG.yaml
FOLDER` forks a process for every `trimode train`, so that torch is loaded once, and writes what
became of the runs to `results_0.json` and `results_1.json`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trimode.checkpoint import whole_folder  # noqa: F401
from trimode.cli.main import main as trimode
from trimode.training import checkpoints, dist_checkpoint, trainer  # noqa: F401
from trimode.training.batches import LossTerms
from trimode.training.joint import JointObjective
from trimode.training.run_log import RunLog

with suppress(ImportError):  # loaded before the forks
    from torch.utils import tensorboard  # noqa: F401

Fault = Callable[[], None]


def die() -> None:
    """As `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    """As a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def plant(owner: Any, name: str, fault: Fault, *, call: int, is_after: bool = False) -> None:
    """Make the n-th call of `owner.name` end in a fault, before or after it has done its work."""
    original, seen = getattr(owner, name), 0

    def planted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == call and not is_after:
            fault()
        result = original(*args, **kwargs)
        if seen == call and is_after:
            fault()
        return result

    setattr(owner, name, planted)


def plant_nan(*, call: int) -> None:
    """Make the n-th loss not finite."""
    original, seen = JointObjective.loss, 0

    def planted(self: JointObjective, *args: Any) -> LossTerms:
        nonlocal seen
        seen += 1
        terms = original(self, *args)
        return replace(terms, loss=terms.loss * float("nan")) if seen == call else terms

    JointObjective.loss = planted  # type: ignore[method-assign]


def plant_rename(fault: Fault, *, ending: str, call: int) -> None:
    """A fault before the n-th renaming to a name with this ending."""
    original, seen = Path.rename, 0

    def planted(path: Path, target: Path) -> Path:
        nonlocal seen
        seen += Path(target).name.endswith(ending)
        if seen == call and Path(target).name.endswith(ending):
            fault()
        return original(path, target)

    Path.rename = planted  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "in a step": lambda: plant(JointObjective, "loss", die, call=8),
    "in an update": lambda: plant(torch.optim.AdamW, "step", die, call=4),
    "before the first checkpoint": lambda: plant(checkpoints, "save_file", die, call=1),
    "in the weights": lambda: plant(checkpoints, "save_file", die, call=4),
    "after the weights": lambda: plant(checkpoints, "save_file", die, call=4, is_after=True),
    "before run.json": lambda: plant(torch, "save", die, call=4, is_after=True),
    "before the rename": lambda: plant(whole_folder, "publish", die, call=4),
    "at the rename": lambda: plant_rename(die, ending="step_00000004", call=1),
    "after the rename": lambda: plant(whole_folder, "publish", die, call=4, is_after=True),
    "after an evaluation": lambda: plant(JointObjective, "evaluate", die, call=1, is_after=True),
    "after a record": lambda: plant(RunLog, "write", die, call=4, is_after=True),
    "before the export": lambda: plant(JointObjective, "finish", die, call=1),
    "not finite": lambda: plant_nan(call=8),
    "no room for weights": lambda: plant(checkpoints, "save_file", no_room, call=4),
    "no room at the end": lambda: plant(whole_folder, "flush", no_room, call=14),
    "no room for the export": lambda: plant_rename(no_room, ending="final", call=1),
}
"""What a run is cut off by. A step has two micro-batches; every step is followed by a checkpoint,
so that the fourth call of what saves is that of step 4."""

AGAIN: dict[str, Callable[[], None]] = {
    "at the rename aside": lambda: plant_rename(die, ending=".old", call=1),
    "between the renames": lambda: plant_rename(die, ending="step_00000002", call=1),
}
"""What a run is cut off by that saves step 2, where it was stopped, once more."""


def run(words: list[str], told: Path, fault: Callable[[], None] | None = None) -> int:
    """`trimode train` in a process of its own, which tells its troubles to a file; returns how it
    ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        if fault is not None:
            fault()
        with told.open("w") as file, redirect_stderr(file):
            sys.stdout = file
            code = trimode(["train", *words, "--no-report"])
    finally:
        os._exit(code)


def outcome(run_dir: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The log without its clocks, and the exported weights."""
    clocks = ("tokens_per_second", "seconds", "eta_s")
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in record.items() if k not in clocks} for record in records]
    return curve, load_file(run_dir / "final" / "model.safetensors")


def is_same(run_dir: Path, expected: tuple[list[Any], dict[str, torch.Tensor]]) -> bool:
    """To the last bit."""
    curve, weights = outcome(run_dir)
    return curve == expected[0] and all(
        torch.equal(weights[name], weight) for name, weight in expected[1].items()
    )


def saved(run_dir: Path) -> list[str]:
    """Checkpoints that a run would find, and what else lies there."""
    root = run_dir / "checkpoints"
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


def cut_off(name: str, config: str, run_dir: Path) -> dict[str, Any]:
    """A run that is cut off, and what becomes of it when it is started again."""
    words, told = [config, f"output_dir={run_dir}"], run_dir.with_suffix(".err")
    if name in AGAIN:
        run(words, told, lambda: plant(trainer._Run, "decide", die, call=4))
        words_again = [*words, "max_seconds=0"]
        code = run(words_again, told, AGAIN[name])
    else:
        code = run(words, told, FAULTS[name])
    lines, left = told.read_text().splitlines(), saved(run_dir)
    again = run(words, told)
    return {
        "code": code,
        "told": [line for line in lines if "error" in line],
        "left": left,
        "again": again,
        "is_same": again == 0 and is_same(run_dir, outcome(run_dir.parent / "whole")),
        "left_again": saved(run_dir),
    }


def main(config: str, folder: Path) -> None:
    assert run([config, f"output_dir={folder / 'whole'}"], folder / "whole.err") == 0
    names = [*FAULTS, *AGAIN]
    children = []
    for half in range(2):  # on two cores
        child = os.fork()
        if child == 0:
            found = {n: cut_off(n, config, folder / n.replace(" ", "_")) for n in names[half::2]}
            (folder / f"results_{half}.json").write_text(json.dumps(found))
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
