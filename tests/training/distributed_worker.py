"""Runs `trimode train` on several ranks, again and again, for `test_distributed_run.py`.

A program, `python -m tests.training.distributed_worker FOLDER`: it reads `launches.json`, a list of
`[name, words of each rank]`, forks the ranks of one launch after the other, so that Python and
torch start once, and writes what each rank printed to `NAME.RANK.out` and `.err` and all exit codes
to `codes.json`.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from tests.free_ports import free_ports
from trimode.cli.main import main as trimode
from trimode.training import trainer  # noqa: F401 - loaded before the forks

with suppress(ImportError):
    from torch.utils import tensorboard  # noqa: F401


def launch(name: str, words: list[list[str]], folder: Path) -> list[int]:
    """Forks one rank for each list of words; returns their exit codes."""
    (port,) = free_ports(1)
    children = []
    for rank, line in enumerate(words):
        child = os.fork()
        if child == 0:
            _rank(line, rank=rank, size=len(words), port=port, stem=folder / f"{name}.{rank}")
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _rank(words: list[str], *, rank: int, size: int, port: int, stem: Path) -> None:
    """The life of one rank, as torchrun would have it."""
    code = 99
    try:
        for number, kind in ((1, "out"), (2, "err")):
            file = os.open(f"{stem}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in values.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        code = trimode([*words, "--no-report"])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    launches = json.loads((folder / "launches.json").read_text())
    codes = {name: launch(name, words, folder) for name, words in launches}
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
