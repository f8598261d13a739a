"""benchmarks/bench_reveal.py: what counts as Python so far, and what a text costs the AR view."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.reference import next_logits
from trimode.runtime import TriModeLM

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_reveal", BENCHMARKS / "bench_reveal.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbour
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n", "complete"),
        ("if 1:\n    return 3\n", "complete"),
        ("def f():\n", "incomplete"),
        ("class A:\n    def f(self):\n        try:\n            x\n", "incomplete"),
        ("x = (1,\n", "incomplete"),
        ("x = '''a\n b = = c\n", "incomplete"),
        ("@dec\n", "incomplete"),
        ("x = = 3\n", "invalid"),
        ("x = (1,\n  'b' 2\n", "invalid"),
        ("x = 'abc\n", "invalid"),
        ("x = 1 +\n", "invalid"),
        ("for x in y:\n    pass\n  z\n", "invalid"),
        ("x = '\0'\n", "invalid"),
    ],
)
def test_syntax_of(bench: ModuleType, source: str, expected: str) -> None:
    """Prevents: an open block counted as a fault, and a fault as something open."""
    assert bench.syntax_of(source) == expected


@pytest.mark.parametrize(
    ("prompt", "num_left"),
    [
        ("x = 1\ny = 2\n", 2),
        ("        a = 1\n    b = 2\nc = 3\n", 3),
        ("\n    of a sentence.\n    x = 1\n", 1),
        ("    else:\n        x\n    y\n", 2),
        ("    rest of a docstring.\n    '''\n    x = 1\n    y = 2\n", 2),
        ("    prose that goes on\n    and on, and\n", None),
        ("\n", None),
    ],
)
def test_context_of(bench: ModuleType, prompt: str, num_left: int | None) -> None:
    """Prevents: a prompt cut inside a docstring whose closing quotes are taken for opening ones."""
    found = bench.context_of(prompt)
    assert (None if found is None else len(found)) == num_left


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("        x = 1\n", True),
        ("        x = 1\n    def g():\n        pass\n", True),
        ("        x = (\n            1,\n", True),
        ("        x = 1\n    y = = 2", True),  # the last line is not yet complete
        ("        x = 1\n    y = = 2\n", False),
        ("    x = 1\n", False),  # nothing inside f
        ("", True),
    ],
)
def test_is_valid(bench: ModuleType, text: str, expected: bool) -> None:
    """Prevents: a continuation judged without its prompt, or by a line it has not finished."""
    assert bench.is_valid(["    def f():"], text) is expected


def test_nats(bench: ModuleType, tiny_model: Callable[..., Any]) -> None:
    """Prevents: answers read one position off, or a law with the mask token in it."""
    lm = TriModeLM(tiny_model(torch.float64, initializer_range=0.2), None)
    ids = [1, 2, 3, 4, 5]
    law = next_logits(lm.model, ids).log_softmax(-1)
    expected = -float(law[1, 3] + law[2, 4] + law[3, 5])
    assert math.isclose(bench.nats(lm, ids[:2], ids[2:]), expected, rel_tol=1e-9)


def test_settings_are_requests(bench: ModuleType, tiny_model: Callable[..., Any]) -> None:
    """Prevents: a setting that is refused only after minutes."""
    lm = TriModeLM(tiny_model(torch.float32), None)
    for _, options in bench.settings().values():
        lm.generate([[1]], max_new_tokens=1, **options)
