"""What is loaded, by which name, and what is said where nothing can be."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimode.errors import ConfigError
from trimode.model.native import library
from trimode.model.native.compilation import SOURCE, source_hash
from trimode.model.native.compiler import instruction_sets
from trimode.model.native.signatures import read_signatures


def _library() -> library.Library:
    found = library.load()
    if found is None:
        pytest.skip(library.status().why)
    return found


def test_every_function_is_declared() -> None:
    """Prevents: a pointer that ctypes cuts to 32 bits, since nobody declared its function."""
    found = _library()
    declared = set()
    for path in SOURCE.glob("*.cpp"):
        declared |= {name for name, _, _ in read_signatures(path.read_text("utf-8"))}
    assert {name.encode() for name in declared} == _exported(found.path)
    assert found.c.trimode_threads_new.restype is ctypes.c_void_p
    assert found.c.trimode_threads_new.argtypes == [ctypes.c_int]
    assert found.c.trimode_threads_free.restype is None


def _exported(path: Path) -> set[bytes]:
    """Names in the table of dynamic symbols of a library: those between its zero bytes."""
    table = next(
        part for part in path.read_bytes().split(b"\0\0") if b"\0trimode_kernels\0" in part
    )
    return {name for name in table.split(b"\0") if name.startswith(b"trimode_")}


@pytest.mark.parametrize(
    ("arguments", "types"),
    [
        ("", []),
        ("int num", [ctypes.c_int]),
        ("const Model* model, int64_t n", [ctypes.c_void_p, ctypes.c_int64]),
        (
            "const char *name, const float* x,\n    double y",
            [
                ctypes.c_char_p,
                ctypes.c_void_p,
                ctypes.c_double,
            ],
        ),
    ],
)
def test_signatures_are_read(arguments: str, types: list[type]) -> None:
    """Prevents: a spelling of the C++ that is read as another type."""
    function = f"const char* trimode_f({arguments}) {{ return 0; }}"
    text = f'extern "C" {{\n// comment (\n{function}\n}}  // extern "C"\n'
    assert list(read_signatures(text)) == [("trimode_f", ctypes.c_char_p, types)]


def test_an_unknown_type_is_refused() -> None:
    """Prevents: a struct by value, which ctypes would pass as an int."""
    text = 'extern "C" {\nvoid trimode_f(Shape shape) {\n}\n}  // extern "C"\n'
    with pytest.raises(AssertionError, match="'Shape ' is no type of the C interface"):
        list(read_signatures(text))


def test_instruction_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: tests and bug reports that run other kernels than they name."""
    best = _library()
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    has = [name for name in instruction_sets() if best.c.trimode_kernels(name.encode())]
    assert has[0] == "generic"
    for name in has:
        for found in (library.load(name), None):
            monkeypatch.setenv(library.ENVIRONMENT, name)
            found = found or library.load()
            assert found is not None
            assert found.name == name == found.c.trimode_kernels_name(found.kernels).decode()
            assert found.threads.value == best.threads.value
            assert found.why == "the caller asks for it" or library.ENVIRONMENT in found.why
    monkeypatch.setenv(library.ENVIRONMENT, "off")
    assert library.status() == library.Status(None, "TRIMODE_NATIVE is off")
    assert library.signature() is None
    monkeypatch.setenv(library.ENVIRONMENT, "avx3")
    with pytest.raises(ConfigError, match="^TRIMODE_NATIVE is 'avx3'; allowed: off, generic"):
        library.load()


def test_the_best_set_is_what_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: generic code where a compiler cannot say what the CPU has, as zig's cannot."""
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    found = _library()
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no list of what this CPU has")
    needs = {"generic": set(), "avx2": {"avx2", "fma", "f16c"}}
    needs["avx512"] = needs["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needs["avx512_bf16"] = needs["avx512"] | {"avx512_vnni", "avx512_bf16"}
    assert found.name == [name for name in instruction_sets() if needs[name] <= flags][-1]


def test_a_set_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: an illegal instruction in place of an error."""
    found = _library()
    known = {**instruction_sets(), "sse9": ()}
    monkeypatch.setattr(library, "instruction_sets", lambda: known)
    with pytest.raises(ConfigError, match="'sse9'; allowed on this CPU: off, generic") as error:
        library.load("sse9")
    assert found.name in str(error.value)


def test_signature_says_what_costs_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: costs measured with one build or instruction set used with another."""
    monkeypatch.delenv(library.ENVIRONMENT, raising=False)
    best = _library()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert library.signature() == [source_hash(), best.name, best.compiler, "1"]
    monkeypatch.setenv(library.ENVIRONMENT, "generic")
    assert library.signature() == [source_hash(), "generic", best.compiler, "1"]
    before = source_hash()
    monkeypatch.setenv("TRIMODE_NATIVE_FLAGS", "-O1")
    assert source_hash() != before


def test_without_a_compiler_one_line_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: a traceback, silence, or a line for every model, where there is no compiler."""
    monkeypatch.setenv("PATH", "/nowhere")
    line = (
        "no native step, running on torch alone: no C++ compiler; pip install 'trimode[native]',"
        " or install a C++ compiler"
    )
    for _ in range(3):
        assert library.status() == library.Status(None, line)
        assert library.load() is None
    assert caplog.messages == [line]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('case "$*" in *-c*) echo "disk: error: full" >&2; echo more; exit 1;; esac', "full"),
        ('case "$*" in *-shared*) exit 3;; esac', "exit status 3"),
        ("exit 1", "which does not run as a compiler"),
    ],
    ids=["compile", "link", "version"],
)
def test_a_broken_compiler_is_one_line(
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: Callable[..., str],
    script: str,
    says: str,
) -> None:
    """Prevents: pages of a compiler's output, or a process that dies of it."""
    cxx = compiler(script)
    monkeypatch.setenv("CXX", cxx)
    why = library.status().why
    assert caplog.messages[-1] == why
    assert why.startswith("no native step, running on torch alone: ")
    assert cxx in why
    assert says in why
    assert "\n" not in why
    assert not list(fresh.glob("*.so"))
    assert not list(fresh.glob("building_*"))


def test_the_next_compiler_is_tried(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: Callable[..., str]
) -> None:
    """Prevents: a broken compiler first in the path that hides one that works."""
    broken = compiler("exit 1")
    first = Path(broken).parent / "bin"
    first.mkdir()
    Path(broken).write_text('#!/bin/sh\necho "broken 1.0"\ncase "$*" in *-c*) exit 1;; esac\n')
    (first / "c++").symlink_to(broken)
    monkeypatch.setenv("PATH", f"{first}:{os.environ['PATH']}")
    found = library.load()
    assert found is not None
    assert found.compiler != "broken 1.0"


@pytest.mark.process
def test_every_file_compiles_without_a_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: Callable[..., str]
) -> None:
    """Prevents: an uninitialised value that only a warning speaks of."""
    monkeypatch.setenv("CXX", compiler())
    monkeypatch.setenv("TRIMODE_NATIVE_FLAGS", "-Werror")
    assert library.status().why == "the best that this CPU has"


@pytest.mark.process
def test_nothing_happens_at_import(fresh: Path) -> None:
    """Prevents: seconds of compiling for `trimode --help`."""
    code = (
        "import trimode.model.native.library as library, trimode.engine.costs, trimode.cli.main\n"
        "assert library._opened.cache_info().currsize == 0\n"
        "trimode.cli.main.main(['--help'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not fresh.exists()
