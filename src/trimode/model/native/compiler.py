"""Which C++ compilers this machine has, and the flags that each is called with."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
    # Sums have one order and one rounding, whatever a compiler takes to be quicker.
    *("-fno-fast-math", "-ffp-contract=off", "-fno-math-errno"),
    # All vectors are inlined, so none is passed the way in which compilers disagree.
    *("-Wall", "-Wextra", "-Wno-psabi"),
)
"""Of every object."""

_AVX512 = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
X86_SETS: dict[str, tuple[str, ...]] = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
}
"""Instruction sets of the kernels on x86-64 and their flags, the least demanding first."""

OTHER_SETS: dict[str, tuple[str, ...]] = {"generic": ()}
"""The same on any other machine."""

SYSTEM_NAMES = ("c++", "g++", "clang++")
OLDEST_GLIBC = "2.28"
"""That torch runs on; what zig compiles needs no newer one."""

EXTRA_FLAGS = "TRIMODE_NATIVE_FLAGS"
"""Environment variable with further flags, such as those of a sanitizer."""

HINT = "pip install 'trimode[native]', or install a C++ compiler"

EXPORTS = "{ global: trimode_*; local: *; };"
"""Version script for the linker: nothing of the C++ library inside shows, so none is mixed up with
another one of the process."""

_EXPORTS = "-Wl,--version-script,{scratch}/exports"
_VERSION_TIMEOUT_S = 30.0


class BuildError(Exception):
    """The library cannot be built; the message says why in one line. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that answered when it was asked for its version.

    Attributes:
        command: Words that call it.
        identity: First line of its version, in which a build or an upgrade shows.
        compile_flags: Of its own, for every object.
        link_flags: Tried in turn until one links.
        environment: Variables that it needs.
        takes: How long a build takes, for a reader.

    In flags of the linker and in variables, `{scratch}` stands for the folder of a build, which is
    removed after it and has `EXPORTS` in the file `exports`.
    """

    command: tuple[str, ...]
    identity: str
    compile_flags: tuple[str, ...] = ()
    link_flags: tuple[tuple[str, ...], ...] = ((),)
    environment: tuple[tuple[str, str], ...] = ()
    takes: str = "about half a minute"


def machine() -> str:
    """The processor's architecture: `x86_64`, `aarch64`, ..."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Those that the library has on this machine, with their flags, the least demanding first."""
    return X86_SETS if machine() == "x86_64" else OTHER_SETS


def extra_flags() -> tuple[str, ...]:
    """Flags from the environment."""
    return tuple(shlex.split(os.environ.get(EXTRA_FLAGS, "")))


def find_compilers() -> Iterator[Compiler]:
    """`CXX` alone if that is set, else the system's, then zig from PyPI.

    Raises:
        BuildError: `CXX` names a program that does not run.
    """
    given = os.environ.get("CXX", "")
    if given:
        identity = _version(shlex.split(given))
        if identity is None:
            raise BuildError(f"CXX is {given!r}, which does not run as a compiler")
        yield _system(tuple(shlex.split(given)), identity)
        return
    known = set()
    for name in SYSTEM_NAMES:
        path = shutil.which(name)
        if path is None or os.path.realpath(path) in known:
            continue
        known.add(os.path.realpath(path))
        identity = _version([path])
        if identity is not None:
            yield _system((path,), identity)
    if find_spec("ziglang") is not None:
        yield zig(machine())


def zig(target: str) -> Compiler:
    """The compiler of the package `ziglang`.

    Args:
        target: Architecture that it compiles for; any, since zig has all of them.
    """
    version = metadata.version("ziglang")
    flags: tuple[str, ...] = ("-mcpu=baseline",)  # without it, the instructions of this very CPU
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        flags = ("-target", f"{target}-linux-gnu.{OLDEST_GLIBC}")
    caches = ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")
    return Compiler(
        command=(sys.executable, "-m", "ziglang", "c++", *flags),
        identity=f"zig {version}",
        takes="about a minute",  # most of it for the C++ library
        link_flags=((_EXPORTS,), ()),
        # 95 MB for a library that is built once; a user who has a cache says where.
        environment=tuple((n, "{scratch}/zig") for n in caches if n not in os.environ),
    )


def _system(command: tuple[str, ...], identity: str) -> Compiler:
    # With the C++ library inside, what is built runs beside any other, conda's older one included,
    # and survives an upgrade. Some systems package the static form apart: then link plainly.
    static = ("-static-libstdc++", "-static-libgcc")
    link_flags = ((*static, _EXPORTS), (_EXPORTS,)) if sys.platform == "linux" else ((),)
    return Compiler(command, identity, link_flags=link_flags)


def _version(command: list[str]) -> str | None:
    """First line of its version; None if it does not run."""
    try:
        result = subprocess.run(
            [*command, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        return None
    return lines[0]
