"""From the C++ sources to a shared library: what it is made from, and the commands that make it."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from trimode.model.native.compiler import (
    EXPORTS,
    FLAGS,
    BuildError,
    Compiler,
    extra_flags,
    instruction_sets,
    machine,
)

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "source"
KERNELS = "kernels.cpp"
"""Compiled once for each instruction set; every other .cpp file once."""

_TIMEOUT_S = 600.0


def source_hash() -> str:
    """16 digits that change with the sources, the flags and the architecture.

    The CPU's model is no part of it: the library holds the kernels of all instruction sets and
    picks when it is loaded, so a home or an image shared by unequal machines needs one library.
    """
    return _source_hash(extra_flags())


@cache
def _source_hash(extra: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((FLAGS, extra, instruction_sets(), machine())).encode())
    for path in sorted([*SOURCE.glob("*.h"), *SOURCE.glob("*.cpp")]):
        content = path.read_bytes()
        digest.update(f"\0{path.name} {len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def compile_library(
    compiler: Compiler,
    scratch: Path,
    *,
    num_jobs: int,
    sets: dict[str, tuple[str, ...]] | None = None,
) -> Path:
    """Compile and link, all inside a folder.

    Args:
        compiler: Called once for each object, then to link.
        scratch: Folder for everything that is written.
        num_jobs: Commands at a time.
        sets: Instruction sets and their flags; None means this machine's.

    Returns:
        The library, inside `scratch`.

    Raises:
        BuildError: a command failed; names it and what it said last.
    """
    sets = instruction_sets() if sets is None else sets
    common = [*compiler.command, *FLAGS, *extra_flags(), *compiler.compile_flags]
    about = f'-DTRIMODE_COMPILER="{_quotable(compiler.identity)}"'
    jobs = [
        ([*common, *flags, f"-DTRIMODE_ISA={name}", "-c", str(SOURCE / KERNELS)], f"{name}.o")
        for name, flags in sets.items()
    ]
    others = [path for path in sorted(SOURCE.glob("*.cpp")) if path.name != KERNELS]
    jobs += [([*common, about, "-c", str(path)], f"plain_{path.stem}.o") for path in others]
    commands = [[*command, "-o", str(scratch / name)] for command, name in jobs]
    environment = {
        **os.environ,
        **{name: text.format(scratch=scratch) for name, text in compiler.environment},
        "LC_ALL": "C",
        "TMPDIR": str(scratch),
    }
    with ThreadPoolExecutor(num_jobs) as pool:
        said = list(pool.map(lambda command: _run(command, environment), commands))
    _check(commands, said)
    # The linker keeps the first of equal inline functions, whichever flags compiled it, so plain
    # objects come first and the most demanding last: none asks for more than its caller does.
    names = [f"plain_{path.stem}.o" for path in others] + [f"{name}.o" for name in sets]
    library = scratch / "library.so"
    objects = [str(scratch / name) for name in names]
    link = [*compiler.command, "-shared", "-pthread", *extra_flags(), *objects, "-o", str(library)]
    (scratch / "exports").write_text(EXPORTS)
    said = []
    for flags in compiler.link_flags:
        said = [_run([*link, *(flag.format(scratch=scratch) for flag in flags)], environment)]
        if said == [None]:
            break
    _check([link], said)
    return library


def _run(command: list[str], environment: dict[str, str]) -> str | None:
    """None if it did what it should, else what it said."""
    logger.debug("%s", shlex.join(command))
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            timeout=_TIMEOUT_S,
        )
    except OSError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"no end after {_TIMEOUT_S:.0f} s"
    return None if result.returncode == 0 else result.stdout or f"exit status {result.returncode}"


def _check(commands: list[list[str]], said: list[str | None]) -> None:
    for command, output in zip(commands, said, strict=True):
        if output is not None:
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            telling = [line for line in lines if "error" in line.lower()] or lines or ["nothing"]
            words = f"{command[0]} ... {' '.join(command[-4:])}"
            raise BuildError(f"`{words}` failed: {telling[-1]}")


def _quotable(text: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in text)
