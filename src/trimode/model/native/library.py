"""The compiled library: found or built at first use, loaded by ctypes, and what is in use and why.

Where it cannot be had, one line says so once, and networks run on torch alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trimode.errors import ConfigError
from trimode.model.native import storage
from trimode.model.native.compilation import SOURCE, source_hash
from trimode.model.native.compiler import HINT, BuildError, find_compilers, instruction_sets
from trimode.model.native.signatures import declare
from trimode.model.native.threads import num_threads

logger = logging.getLogger(__name__)

ENVIRONMENT = "TRIMODE_NATIVE"
"""`off`, or the name of an instruction set to use in place of the best one."""

OFF = "off"

_lock = threading.Lock()


def _forked() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may hold the other


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library with the kernels of one instruction set.

    Attributes:
        c: Its functions, all declared (`signatures`).
        kernels: Handle of the kernels, for functions that take `Kernels*`.
        threads: Handle of the pool that all networks of this process share. It works in a forked
            child too, and is never freed.
        name: Of the instruction set.
        compiler: That made it, as it calls itself.
        path: Of its file.
        why: Why this instruction set, for a reader.
    """

    c: ctypes.CDLL
    kernels: ctypes.c_void_p
    threads: ctypes.c_void_p
    name: str
    compiler: str
    path: Path
    why: str


@dataclass(frozen=True, slots=True)
class Status:
    """What a process has.

    Attributes:
        library: None where networks run on torch alone.
        why: Why that is so, for a reader.
    """

    library: Library | None
    why: str


def load(name: str | None = None) -> Library | None:
    """The library; None where it is off or cannot be had. The first call may build it.

    Args:
        name: Instruction set; None means what `TRIMODE_NATIVE` says, else the best one.

    Raises:
        ConfigError: this CPU lacks the instruction set, or there is none of the name.
    """
    return status(name).library


def status(name: str | None = None) -> Status:
    """The same, and why.

    Raises:
        ConfigError: as `load`.
    """
    asked = os.environ.get(ENVIRONMENT, "") if name is None else name
    if asked == OFF:
        return Status(None, f"{ENVIRONMENT} is {OFF}")
    if asked and asked not in instruction_sets():
        raise ConfigError(f"{ENVIRONMENT} is {asked!r}; allowed: {_listed([*instruction_sets()])}")
    with _lock:  # two threads would build it twice and say so twice
        opened = _opened()
    if isinstance(opened, str):
        return Status(None, opened)
    has = [known for known in instruction_sets() if opened.c.trimode_kernels(known.encode())]
    if asked and asked not in has:
        raise ConfigError(f"{ENVIRONMENT} is {asked!r}; allowed on this CPU: {_listed(has)}")
    best = has[-1]
    why = f"{ENVIRONMENT} asks for it" if name is None else "the caller asks for it"
    if not asked:
        why = "the best that this CPU has"
    kernels = ctypes.c_void_p(opened.c.trimode_kernels((asked or best).encode()))
    library = Library(
        opened.c, kernels, opened.threads, asked or best, opened.compiler, opened.path, why
    )
    return Status(library, why)


def signature() -> list[str] | None:
    """What the speed of the native step depends on beside the CPU; None where it is not in use."""
    library = load()
    if library is None:
        return None
    return [source_hash(), library.name, library.compiler, str(num_threads())]


def build_beside_source() -> Path | None:
    """Build the library into the package, at set-up; None, and one line, if that cannot be."""
    there = storage.find_prebuilt()
    if there is not None:
        return there
    reasons: list[str] = []
    try:
        for compiler in find_compilers():
            try:
                return storage.build_beside_source(compiler)
            except BuildError as error:
                reasons.append(str(error))
    except BuildError as error:
        reasons.append(str(error))
    logger.warning("%s", _fallback_line(reasons))
    return None


@dataclass(frozen=True, slots=True)
class _Opened:
    c: ctypes.CDLL
    threads: ctypes.c_void_p
    compiler: str
    path: Path


@cache
def _opened() -> _Opened | str:
    """The library of any instruction set; or why there is none, which is logged, once."""
    reasons: list[str] = []
    try:
        for path in _paths(reasons):
            try:
                return _open(path)
            except (OSError, AttributeError) as error:
                reasons.append(f"{path} cannot be loaded: {error}")
    except BuildError as error:
        reasons.append(str(error))
    line = _fallback_line(reasons)
    logger.warning("%s", line)
    return line


def _paths(reasons: list[str]) -> Iterator[Path]:
    """Libraries, the best first. One that cannot be loaded is asked for no further; then the next
    is found or built.

    Args:
        reasons: Gets why others could not be built.

    Raises:
        BuildError: `CXX` names no compiler.
    """
    prebuilt = storage.find_prebuilt()
    if prebuilt is not None:
        yield prebuilt
    compilers = []
    for compiler in find_compilers():
        compilers.append(compiler)
        cached = storage.find_cached(compiler)
        if cached is not None:
            yield cached
            with suppress(OSError):
                cached.unlink()  # damaged, or of another system that shares this home
    for compiler in compilers:
        try:
            yield storage.build(compiler)
        except BuildError as error:
            reasons.append(str(error))
    if not compilers:
        cached = storage.find_cached(None)
        if cached is not None:
            yield cached


def _open(path: Path) -> _Opened:
    c = ctypes.CDLL(str(path))
    declare(c, SOURCE)
    threads = ctypes.c_void_p(c.trimode_threads_new(num_threads()))
    return _Opened(c, threads, c.trimode_compiler().decode(), path)


def _fallback_line(reasons: list[str]) -> str:
    """One line that says what is missing and what to do."""
    reason = " ".join("; ".join(reasons).split()) or "no C++ compiler"
    return f"no native step, running on torch alone: {reason}; {HINT}"


def _listed(names: list[str]) -> str:
    return ", ".join([OFF, *names])
