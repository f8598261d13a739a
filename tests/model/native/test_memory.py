"""Memory that runs out inside the library is one line for the caller, and the model still works."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trimode.model.native import library

SCRIPT = """
import resource
import torch
from trimode.errors import CapacityError
from trimode.model import KVCache, TriModeConfig, TriModeModel
from trimode.model.attention import RowFeed

config = TriModeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=8192, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=32, max_position_embeddings=8192,
    mask_token_id=2, block_size=8, bos_token_id=0, eos_token_id=1,
)
model, count = TriModeModel(config).eval().pack("native"), 2000
cache = KVCache(config, num_rows=1, num_cells=count, device="cpu", dtype=torch.float32)

def forward(count):
    feed = RowFeed(0, 0, [0] * count, range(count), range(count))
    ids = [9] * count
    return model.native.forward(ids, range(count), cache=cache, feeds=[feed], wanted=[0])[0]

wanted = forward(5)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    forward(count)
except CapacityError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(torch.equal(wanted, forward(5)), torch.equal(wanted, forward(count)))
"""


@pytest.mark.process
@pytest.mark.skipif(library.load() is None, reason="no native step here")
def test_too_many_tokens_at_once() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    lines = found.stdout.splitlines()
    assert lines == ["a forward of 2000 tokens does not fit into memory", "True True"], found.stderr
