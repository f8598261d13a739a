"""The compiled library: built at first use, kept in the user's cache, loaded by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "source"

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall")
SETS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "avx512_bf16": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx512vnni", "-mavx512bf16"),
    ),
}


def _digest() -> str:
    found = hashlib.sha256(repr((FLAGS, SETS)).encode())
    for path in sorted(SOURCE.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _build(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects, running = [], []
        for name, flags in SETS.items():
            objects.append(f"{scratch}/{name}.o")
            running.append(
                ["g++", *FLAGS, *flags, f"-DTRIMODE_ISA={name}", "-c", str(SOURCE / "kernels.cpp")]
                + ["-o", objects[-1]]
            )
        for name in ("api", "threads"):
            objects.append(f"{scratch}/{name}.o")
            running.append(["g++", *FLAGS, "-c", str(SOURCE / f"{name}.cpp"), "-o", objects[-1]])
        for process in [subprocess.Popen(command) for command in running]:
            if process.wait():
                raise RuntimeError("the native step does not compile")
        subprocess.run(
            ["g++", "-shared", "-pthread", *objects, "-o", f"{scratch}/lib.so"], check=True
        )
        Path(f"{scratch}/lib.so").rename(target)


ENVIRONMENT = "TRIMODE_NATIVE"


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library with the kernels of one instruction set."""

    c: ctypes.CDLL
    kernels: ctypes.c_void_p
    threads: ctypes.c_void_p
    name: str


def load(name: str | None = None) -> Library | None:
    """The library; None where it cannot be had. The first call may build it."""
    if name == "off":
        return None
    try:
        c, threads = _opened()
    except (OSError, RuntimeError):
        return None
    kernels = ctypes.c_void_p(c.trimode_kernels(name.encode() if name else None))
    return Library(c, kernels, threads, name or "") if kernels else None


@cache
def _opened() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    path = Path.home() / ".cache" / "trimode" / "native" / f"trimode_{_digest()}.so"
    if not path.exists():
        _build(path)
    found = ctypes.CDLL(str(path))
    for name in ("trimode_kernels", "trimode_threads_new", "trimode_embedding_new"):
        getattr(found, name).restype = ctypes.c_void_p
    found.trimode_kernels_name.restype = ctypes.c_char_p
    return found, ctypes.c_void_p(found.trimode_threads_new(torch.get_num_threads()))
