"""Built once, whole, by whoever comes first, and taken only from where nobody else can write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.native.conftest import forget
from trimode.model.native import library, storage

LOAD = """
import logging
logging.basicConfig(format="%(message)s")
from trimode.model.native import library
found = library.load()
print(found and found.path)
"""

Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch


def _load(monkeypatch: Patch) -> Path | None:
    """Path of the library that a process would load that starts now."""
    forget(monkeypatch)
    found = library.load()
    return None if found is None else found.path


@pytest.mark.process
def test_two_processes_build_once(
    fresh: Path, tmp_path: Path, compiler: Callable[..., str]
) -> None:
    """Prevents: every worker of a server compiling the same library, or loading half of one."""
    environment = {**os.environ, "CXX": compiler('case "$*" in *-c*) sleep 0.3;; esac')}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240) for process in both]
    (path,) = fresh.glob("*.so")
    assert [out for out, _ in said] == [f"{path}\n"] * 2
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum(" -shared " in f" {call} " for call in calls) == 1
    assert sum("compiling the native step with " in err for _, err in said) == 1
    assert not list(fresh.glob("building_*"))


@pytest.mark.process
def test_a_killed_build_breaks_nothing(
    fresh: Path, monkeypatch: Patch, compiler: Callable[..., str]
) -> None:
    """Prevents: a lock that a dead process holds, or its half-written library, in the next one."""
    environment = {**os.environ, "CXX": compiler('case "$*" in *kernels*) sleep 2;; esac')}
    killed = subprocess.Popen([sys.executable, "-c", LOAD], env=environment, stderr=subprocess.PIPE)
    assert killed.stderr is not None
    killed.stderr.readline()  # it has the lock
    while not list(fresh.glob("building_*")) and killed.poll() is None:  # and compiles
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert len(list(fresh.glob("building_*"))) == 1
    monkeypatch.setenv("CXX", compiler())
    path = _load(monkeypatch)
    assert path is not None
    assert [*fresh.glob("*.so")] == [path]


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    """Prevents: a cache that grows with every interrupted build, or a build under way undone."""
    for name in ("building_old", "building_new", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "object.o").write_bytes(b"")
    long_ago_s = time.time() - 2 * storage._STALE_S
    for name in ("building_old", "other"):
        os.utime(tmp_path / name, (long_ago_s, long_ago_s))
    storage._sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["building_new", "other"]


def test_a_lock_that_is_never_released_is_waited_for_in_vain(
    tmp_path: Path, monkeypatch: Patch, caplog: Log
) -> None:
    """Prevents: a stopped process that keeps all others from starting."""
    monkeypatch.setattr(storage, "_WAIT_S", 0.2)
    with storage._locked(tmp_path), storage._locked(tmp_path):
        pass
    assert caplog.messages == ["another process compiles the native step; waiting for it"]


def test_a_damaged_library_is_built_anew(
    fresh: Path, monkeypatch: Patch, compiler: Callable[..., str]
) -> None:
    """Prevents: a file cut short by a full disk that keeps the native step off for good."""
    fresh.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("CXX", compiler())
    (found,) = library.find_compilers()
    path = fresh / storage._name(found)
    path.write_bytes(b"not a library")
    path.chmod(0o755)
    assert storage.find_cached(found) == path
    assert _load(monkeypatch) == path
    assert path.stat().st_size > 1000


def test_what_others_can_write_is_not_loaded(
    fresh: Path, tmp_path: Path, monkeypatch: Patch, caplog: Log, compiler: Callable[..., str]
) -> None:
    """Prevents: running code that another user of the machine has put there."""
    monkeypatch.setenv("CXX", compiler())
    path = _load(monkeypatch)
    assert path is not None
    assert path.parent == fresh
    (found,) = library.find_compilers()
    assert storage.find_cached(found) == path
    path.chmod(0o775)
    assert storage.find_cached(found) is None
    path.chmod(0o755)
    fresh.chmod(0o777)
    assert storage.find_cached(found) is None
    other = tmp_path / "tmp" / f"trimode_native_{os.geteuid()}"
    assert storage._writable_folder() == other
    assert other.stat().st_mode & 0o777 == 0o700
    other.chmod(0o770)
    caplog.clear()
    assert _load(monkeypatch) is None
    (line,) = caplog.messages
    assert line.count("belongs to others, or others can write it") == 2


def test_only_the_owner_counts(tmp_path: Path) -> None:
    """Prevents: trusting a file for its mode alone, or one that a link leads to."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    file.chmod(0o755)
    (tmp_path / "link").symlink_to(file)
    me = os.geteuid()
    assert storage._is_safe(file, {me})
    assert not storage._is_safe(file, {me + 1})
    assert not storage._is_safe(tmp_path / "link", {me})
    assert not storage._is_safe(tmp_path / "missing", {me})


def test_without_a_cache_it_goes_into_a_private_folder(
    fresh: Path, tmp_path: Path, monkeypatch: Patch, caplog: Log, compiler: Callable[..., str]
) -> None:
    """Prevents: a read-only home that keeps the native step off, or rebuilds at every start."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", compiler())
    path = _load(monkeypatch)
    assert path is not None
    assert path.parent == tmp_path / "tmp" / f"trimode_native_{os.geteuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    caplog.clear()
    assert _load(monkeypatch) == path
    assert caplog.messages == []


def test_built_at_set_up_it_needs_no_compiler(
    fresh: Path, tmp_path: Path, monkeypatch: Patch, caplog: Log, compiler: Callable[..., str]
) -> None:
    """Prevents: an image whose compiler was removed after set-up, and which is slow for it."""
    monkeypatch.setattr(storage, "BESIDE_SOURCE", tmp_path / "build")
    monkeypatch.setenv("CXX", compiler())
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "0123456789abcdef.so").write_bytes(b"of older sources")
    path = library.build_beside_source()
    assert path is not None
    assert [*(tmp_path / "build").glob("*.so")] == [path]
    caplog.clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert library.build_beside_source() == path
    assert _load(monkeypatch) == path
    assert caplog.messages == []
    assert not fresh.exists()


def test_a_cache_outlives_its_compiler(
    fresh: Path, monkeypatch: Patch, caplog: Log, compiler: Callable[..., str]
) -> None:
    """Prevents: falling back to torch beside a library that a compiler since removed built."""
    monkeypatch.setenv("CXX", compiler())
    path = _load(monkeypatch)
    assert path is not None
    caplog.clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert _load(monkeypatch) == path
    assert caplog.messages == []
