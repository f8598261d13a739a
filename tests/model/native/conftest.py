"""A machine made to order for the native step's tests: environment, caches, compilers."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from trimode.model.native import library
from trimode.model.native.compiler import EXTRA_FLAGS


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if in a new process of a user without caches, variables and zig; gives the folder that
    libraries will be in. Objects are compiled without optimisation, which is quick, and with which
    nothing built at set-up fits."""
    for name in ("CXX", library.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(EXTRA_FLAGS, "-O0")
    monkeypatch.setitem(sys.modules, "ziglang", None)
    forget(monkeypatch)
    return tmp_path / "cache" / "trimode" / "native"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library be found anew, as in a process that starts."""
    monkeypatch.setattr(library, "_opened", cache(library._opened.__wrapped__))


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[..., str]:
    """`compiler(script="")`: a value of CXX that notes each call in `calls`, runs some lines of
    shell, then the system's compiler."""
    real = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if real is None:
        pytest.skip("no C++ compiler")

    def write(script: str = "") -> str:
        path = tmp_path / "cxx"
        calls = shlex.quote(str(tmp_path / "calls"))
        path.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{script}\nexec {real} "$@"\n')
        path.chmod(0o755)
        return str(path)

    return write
