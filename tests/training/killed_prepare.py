"""Prepares the same data again and again, cut off at another moment each time.

A program, since what it tests ends processes: `python -m tests.training.killed_prepare FOLDER`
forks a process for every run, so that the libraries are loaded once, and prints what became of the
runs as JSON.

A moment is a call that puts something on disk, renames or removes, or a report of progress.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasketch  # noqa: F401 - loaded before the forks

from tests.training.made_documents import make_code, make_config
from trimode.errors import CapacityError
from trimode.training import corpus
from trimode.training.prepare import prepare
from trimode.training.prepare_config import PrepareConfig

NEVER = 1 << 30
KILLED, DONE, DISK_FULL = -signal.SIGKILL, 0, 3
NUM_KILLS, NUM_LAST, NUM_FULL = 7, 40, 5


class Moments:
    """Counts moments, and ends the process, or fails, at one of them."""

    def __init__(self, *, kill_at: int, fail_at: int) -> None:
        self.kill_at, self.fail_at = kill_at, fail_at
        self.num_moments = self.num_writes = 0

    def reached(self, *_: object) -> None:
        """A moment."""
        self.num_moments += 1
        if self.num_moments == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_removal(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, a moment before."""
        return lambda *args, **kwargs: (self.reached(), call(*args, **kwargs))[1]

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, a moment and a write before."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reached()
            self.num_writes += 1
            if self.num_writes == self.fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return counted


def run(config: PrepareConfig, *, kill_at: int = NEVER, fail_at: int = NEVER) -> int:
    """Prepares in a process of its own; returns how it ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        moments = Moments(kill_at=kill_at, fail_at=fail_at)
        os.fsync, os.replace = moments.before(os.fsync), moments.before(os.replace)
        os.unlink, os.rmdir = map(moments.before_removal, (os.unlink, os.rmdir))
        prepare(config, progress=moments.reached)
        counts = (moments.num_moments, moments.num_writes)
        Path(config.output_dir).with_name("counts.json").write_text(json.dumps(counts))
        code = DONE
    except CapacityError as error:
        print(error, file=sys.stderr)
        code = DISK_FULL
    finally:
        os._exit(code)


def read_tree(folder: Path) -> dict[str, bytes] | None:
    """All files below a folder; None if there is no folder."""
    if not folder.exists():
        return None
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def hidden(folder: Path) -> list[str]:
    """What is left beside the output."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def main(folder: Path) -> None:
    corpus.KEEP_EVERY = 5
    lines = [json.dumps({"text": make_code(100 + i)}) for i in range(110)]
    (folder / "a.jsonl").write_text("\n".join([*lines[:60], "{", *lines[60:]]))
    config = make_config(
        folder,
        jsonl=(str(folder / "a.jsonl"),),
        held_out_share=0.1,
        shard_tokens=12_000,
        overwrite=True,
    )
    out = folder / "out"
    assert run(config) == DONE
    expected = read_tree(out)
    num_moments, num_writes = json.loads((folder / "counts.json").read_text())
    assert run(replace(config, seed=7)) == DONE
    old = read_tree(out)
    assert old is not None
    assert old != expected
    shutil.copytree(out, folder / "old")

    def put_old_back() -> None:
        shutil.rmtree(out)
        shutil.copytree(folder / "old", out)

    kills = [1 + i * (num_moments - NUM_LAST) // NUM_KILLS for i in range(NUM_KILLS)]
    kills += range(num_moments - NUM_LAST, num_moments + 1, 4)  # the move, and cleaning up
    results: dict[str, list[Any]] = {"killed": [], "full": [], "chain": []}
    for moment in kills:
        put_old_back()
        code, seen = run(config, kill_at=moment), read_tree(out)
        again = run(config)
        is_whole = seen in (None, old, expected)
        is_same = read_tree(out) == expected
        results["killed"].append([moment, code, is_whole, again, is_same, hidden(folder)])

    for number in range(1, num_writes + 1, -(-num_writes // NUM_FULL)):
        put_old_back()
        code, seen = run(config, fail_at=number), read_tree(out)
        again = run(config)
        is_same = read_tree(out) == expected
        results["full"].append([number, code, seen == old, again, is_same, hidden(folder)])

    put_old_back()
    codes = []
    while not codes or codes[-1] == KILLED:  # what no run puts on disk, the next must get through
        codes.append(run(config, kill_at=70 * (len(codes) + 1)))
    results["chain"] = [codes, read_tree(out) == expected, hidden(folder)]
    print(json.dumps({"moments": num_moments, "writes": num_writes, **results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
