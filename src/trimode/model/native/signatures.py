"""Types of the library's functions, read from the C++ that defines them.

ctypes passes an undeclared argument as an int of 32 bits, which cuts a pointer in half. So every
function is declared, and the sources are the one place that says how.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_EXPORTED = re.compile(r'^extern "C" \{(.*?)^\}  // extern "C"', re.DOTALL | re.MULTILINE)
_FUNCTION = re.compile(r"^([\w: ]+[ *&]+)(trimode_\w+)\(([^)]*)\) \{", re.MULTILINE)

_NUMBERS: dict[str, Any] = {
    "bool": ctypes.c_bool,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def declare(library: ctypes.CDLL, source: Path) -> None:
    """Give every function of the library its types.

    Args:
        library: Gets `argtypes` and `restype`, in place.
        source: Folder of its .cpp files.

    Raises:
        AttributeError: the library lacks a function that the sources define.
    """
    for path in sorted(source.glob("*.cpp")):
        for name, result, arguments in read_signatures(path.read_text("utf-8")):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments


def read_signatures(text: str) -> Iterator[tuple[str, Any, list[Any]]]:
    """Name, type of the result and types of the arguments of each exported function.

    Raises:
        AssertionError: a type that C callers cannot be given.
    """
    for block in _EXPORTED.findall(text):
        code = re.sub(r"//.*", "", block)
        for result, name, arguments in _FUNCTION.findall(code):
            parts = [part for part in arguments.split(",") if part.strip()]
            yield name, _type(result), [_type(re.sub(r"\w+\s*$", "", part)) for part in parts]


def _type(words: str) -> Any:
    """Of a result, or of an argument without its name; every pointer but text is `c_void_p`."""
    plain = " ".join(words.replace("*", " * ").split())
    if plain in ("const char *", "char const *"):
        return ctypes.c_char_p
    if plain.endswith("*"):
        return ctypes.c_void_p
    if plain == "void":
        return None
    kind = plain.removeprefix("const ").removeprefix("std::")
    assert kind in _NUMBERS, f"{words!r} is no type of the C interface"
    return _NUMBERS[kind]
