"""Memory that runs out inside the library is one line for the caller, and the model still works."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trimode.model.native import library

SCRIPT = """
import resource
import torch
import trimode
from trimode.errors import CapacityError
from trimode.model import KVCache, RowAttention
from trimode.model.attention import RowFeed

model, count = trimode.load("pocket").model, 60_000
cache = KVCache(model.config, num_rows=1, num_cells=64, device="cpu", dtype=torch.float32)

def forward(count):
    feed = RowFeed(0, 0, [0] * count, range(count), range(count))
    # All positions, a cell for the first few: the forward must fail before it writes any.
    return model.native.forward([9] * count, [0] * count, cache=cache, feeds=[feed], wanted=[0])[0]

wanted = forward(5)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20), resource.RLIM_INFINITY))
try:
    forward(count)
except CapacityError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(torch.equal(wanted, forward(5)))
"""


@pytest.mark.process
@pytest.mark.skipif(library.load() is None, reason="no native step here")
def test_too_many_tokens_at_once() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    lines = found.stdout.splitlines()
    assert lines == ["a forward of 60000 tokens does not fit into memory", "True"], found.stderr
