"""How many threads there are, and that the pool of them does each chunk once, whatever happens."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trimode.model.native import library
from trimode.model.native.compilation import SOURCE
from trimode.model.native.threads import num_allowed, num_cpus, num_threads

CHECK = Path(__file__).with_name("threads_check.cpp")
CHUNK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)

FORKED = """
import ctypes, os
from trimode.model.native import library
found = library.load()
chunk = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
def run():
    done = []
    call = chunk(lambda context, index: done.append(index))
    found.c.trimode_threads_run(found.threads, 40, ctypes.cast(call, ctypes.c_void_p), None)
    assert sorted(done) == list(range(40)), done
run()
child = os.fork()
run()
if child:
    assert os.waitpid(child, 0)[1] == 0
print("ended", flush=True)
"""


def _groups(root: Path, lines: str, files: dict[str, str]) -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("lines", "files", "granted"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 64),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/not/here\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/../../up\n", {"cpu.max": "400000 100000\n"}, 4),
        (
            "5:memory:/\n4:cpu,cpuacct:/job\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "150000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ("", {}, 64),
    ],
)
def test_control_groups_grant_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, files: dict[str, str], granted: int
) -> None:
    """Prevents: 64 threads in a container that gets two CPUs of a large machine."""
    monkeypatch.setattr("trimode.model.native.threads.num_allowed", lambda: 64)
    assert num_cpus(_groups(tmp_path, lines, files)) == granted


@pytest.mark.parametrize(
    ("word", "number"), [("1", 1), ("3,2", 3), (" 2 ", 2), ("999", 8), ("0", 5), ("x", 5), ("", 5)]
)
def test_the_variable_says_how_many(
    monkeypatch: pytest.MonkeyPatch, word: str, number: int
) -> None:
    """Prevents: a pool of another size than torch's, or one larger than the machine."""
    monkeypatch.setattr("trimode.model.native.threads.num_allowed", lambda: 8)
    monkeypatch.setattr("trimode.model.native.threads.num_cpus", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", word)
    assert num_threads() == number


def test_without_a_word_it_is_what_this_machine_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a reading of this machine's own files that fails."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= num_threads() == num_cpus() <= num_allowed()


def _run(found: library.Library, count: int, chunk: Callable[[int], None]) -> None:
    call = CHUNK(lambda context, index: chunk(index))
    found.c.trimode_threads_run(found.threads, count, ctypes.cast(call, ctypes.c_void_p), None)


def test_threads_of_python_share_a_pool() -> None:
    """Prevents: two engines of one process that take chunks from each other's runs."""
    found = library.load()
    if found is None:
        pytest.skip(library.status().why)
    before = found.c.trimode_threads_size(found.threads)
    found.c.trimode_threads_resize(found.threads, 3)
    faults = []

    def work() -> None:
        for count in range(1, 60):
            done: list[int] = []
            _run(found, count, done.append)
            if sorted(done) != list(range(count)):
                faults.append(done)

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    found.c.trimode_threads_resize(found.threads, before)
    assert not faults
    assert found.c.trimode_threads_size(found.threads) == before


@pytest.mark.process
def test_a_forked_child_computes_and_ends() -> None:
    """Prevents: a child that waits for threads which only its parent has."""
    if library.load() is None:
        pytest.skip(library.status().why)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (0, "ended\nended\n"), result.stderr


def _compiled(folder: Path, *flags: str) -> Path:
    cxx = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    program = folder / "check"
    command = [cxx, "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror", *flags, f"-I{SOURCE}"]
    result = subprocess.run(
        [*command, str(CHECK), str(SOURCE / "threads.cpp"), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if result.returncode and "-fsanitize=thread" in flags and "tsan" in result.stderr:
        pytest.skip("this compiler has no race detector")
    assert result.returncode == 0, result.stderr
    return program


def _checked(program: Path, *words: str, **environment: str) -> list[str]:
    # The sanitizers of `make sanitize` are for Python; these programs bring their own.
    kept = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(
        [str(program), *words],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[:4000]
    return result.stdout.split()


@pytest.mark.process
def test_every_chunk_is_done_once(tmp_path: Path) -> None:
    """Prevents: chunks lost or done twice by callers at once, nested runs, exceptions or a new
    size; a worker in the caller's floating-point mode; a forked child that hangs."""
    program = _compiled(tmp_path, "-O2")
    assert _checked(program, "work") == ["done"]
    assert _checked(program, "fork") == ["done"]


@pytest.mark.process
def test_no_races(tmp_path: Path) -> None:
    """Prevents: an access that only another machine, or another day, gets wrong."""
    program = _compiled(tmp_path, "-O1", "-g", "-fsanitize=thread")
    assert _checked(program, "work", TSAN_OPTIONS="halt_on_error=1") == ["done"]


@pytest.mark.process
def test_a_busy_machine_slows_it_and_does_not_stall_it(tmp_path: Path) -> None:
    """Prevents: threads that wait for others which have no core: 40 times slower with OpenMP."""
    program = _compiled(tmp_path, "-O2")
    num = num_allowed()
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * num)]
    try:
        alone_s, pool_s, *_ = map(float, _checked(program, "time", str(4 * num))[:4])
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert pool_s < 20 * alone_s
