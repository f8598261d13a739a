"""What a token gets does not depend on what is fed beside it, on chunks, rows or threads, in any
form of the weights; and what would break that is caught: mutants of the sources must differ.

`benchmarks/same_bits.py` proves the same of whole texts, in every mode.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimode.model import KVCache, TriModeModel
from trimode.model.attention import RowFeed
from trimode.model.masks import TRUNK
from trimode.model.native import compilation, library
from trimode.model.native.compiler import find_compilers
from trimode.model.native.modules import refusal
from trimode.model.native.step import NativeNetwork

FORMS = ("float32", "bfloat16", "int8")
NUM_TOKENS, NUM_ALONE = 1096, 136
IDS = [3 + (7 * i) % 90 for i in range(NUM_TOKENS)]
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 500,
    "head_dim": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
"""No size is a whole number of vectors on every CPU; down_proj is read in pieces in every form; of
three heads that read the same keys two go side by side. The last tokens see two spans of attention
and then three."""


@dataclass(frozen=True)
class Mutant:
    """An edit of the sources."""

    file: str
    old: str
    new: str


MUTANTS: dict[str, tuple[str, list[Mutant]]] = {
    "spans of attention by threads": (
        "float32",
        [
            Mutant(
                "attention.h",
                "constexpr int SPAN = 512;",
                "#define SPAN (threads_.size() == 1 ? 512 : 64)",
            )
        ],
    ),
    "K of the tokens in the forward is not rounded": (
        "bfloat16",
        [
            Mutant(
                "attention.h",
                "F a = q_a.dot(key, tail, zero());",
                "const long at = sight.cell(block + j0 + j); F a = at >= fresh_cell"
                " ? q_a.dot(fresh_keys + (at - fresh_cell) * fresh_stride, tail, zero())"
                " : q_a.dot(key, tail, zero());",
            ),
            Mutant(
                "attention.h",
                "constexpr int BLOCK = 64;",
                "constexpr int BLOCK = 64; static thread_local const float* fresh_keys;"
                " static thread_local long fresh_cell, fresh_stride;",
            ),
            Mutant(
                "forward.h",
                "        const bool is_whole = ",
                "        fresh_keys = k_ + g * D, fresh_cell = f_.cells[0], fresh_stride ="
                " kv_size();\n        const bool is_whole = ",
            ),
        ],
    ),
    "one scale of the activations for a tile": (
        "int8",
        [
            Mutant(
                "int8.h",
                "const float top = largest(most) + sum(odd);",
                "const float top = std::max(largest(most) + sum(odd), of_tile);",
            ),
            Mutant(
                "int8.h",
                "inline void quantize(",
                "static thread_local float of_tile;\ninline void quantize(",
            ),
            Mutant(
                "forward.h",
                "            quantize((const float*)x.data + t * x.stride, size,",
                "            of_tile = std::fabs(((const float*)x.data)[t / 4 * 4 * x.stride]);\n"
                "            quantize((const float*)x.data + t * x.stride, size,",
            ),
        ],
    ),
    "pieces of a panel are summed apart": (
        "float32",
        [
            Mutant(
                "products.h",
                "        a = goes_on ? load(y) : zero();",
                "        before = goes_on ? load(y) : zero();\n        a = zero();",
            ),
            Mutant("products.h", "    F a, b;", "    F a, b, before;"),
            Mutant("products.h", "        store(y, a);", "        store(y, before + a);"),
        ],
    ),
    "a tile in 8 bits forgets the piece before": (
        "int8",
        [Mutant("int8.h", "    sums.begin(y, first > 0);", "    sums.begin(y, false);")],
    ),
    "the last row of a tile rounds twice": (
        "float32",
        [
            Mutant(
                "products.h",
                "        a = fma(c, w0, a);",
                "        a = R == 1 ? a + c * w0 : fma(c, w0, a);",
            )
        ],
    ),
}


@pytest.fixture(scope="module")
def real() -> library.Library:
    found = library.load()
    if found is None:
        pytest.skip("no native step here")
    return found


def network(model: TriModeModel, form: str, of: library.Library) -> NativeNetwork:
    """The model packed for a library."""
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    one = copy.deepcopy(model).to(dtype)
    assert refusal(one) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load", lambda name=None: of)
        one.pack("int8" if form == "int8" else "native")
    assert one.native is not None
    return one.native


def feed(
    native: NativeNetwork, cache: KVCache, row: int, start: int, stop: int, *, beside: bool = False
) -> Tensor:
    """Logits of some tokens of the text, fed to a row, with others beside them in another."""
    num, others = stop - start, 5 if beside else 0
    ids = IDS[start:stop]
    feeds = [RowFeed(row, start, [TRUNK] * num, range(start, stop), range(start, stop))]
    positions = [*range(start, stop)]
    if beside:  # in packed order: few tokens first
        feeds = [RowFeed(1 - row, 0, [TRUNK] * others, range(others), range(others)), *feeds]
        ids, positions = [*range(40, 40 + others), *ids], [*range(others), *positions]
    wanted = range(others, others + num)
    logits = native.forward(
        ids, positions, cache=cache, feeds=feeds, wanted=wanted, wants_logits=True
    )[1]
    assert logits is not None
    return logits


def ways(
    native: NativeNetwork, of: library.Library, dtype: torch.dtype, *, has_two_rows: bool = True
) -> Iterator[Tensor]:
    """Logits of the last tokens of the text: one by one, then in other ways."""

    def new_cache() -> KVCache:
        return KVCache(native.config, num_rows=2, num_cells=1100, device="cpu", dtype=dtype)

    def threads(count: int) -> None:
        of.c.trimode_threads_resize(of.threads, count)

    before = int(of.c.trimode_threads_size(of.threads))
    first = NUM_TOKENS - NUM_ALONE
    try:
        threads(1)
        cache = new_cache()
        for i in range(first):
            feed(native, cache, 0, i, i + 1)
        alone = [feed(native, cache, 0, i, i + 1) for i in range(first, NUM_TOKENS)]
        yield torch.cat(alone)
        for count in (1, 2):
            threads(count)
            yield feed(native, new_cache(), 0, 0, NUM_TOKENS)[first:]
        cache = new_cache()
        chunks = [feed(native, cache, 0, i, i + 8) for i in range(0, NUM_TOKENS, 8)]
        yield torch.cat(chunks)[first:]
        if not has_two_rows:
            return
        cache = new_cache()
        feed(native, cache, 1, 0, first)
        rest = [feed(native, cache, 1, i, i + 8, beside=True) for i in range(first, NUM_TOKENS, 8)]
        yield torch.cat(rest)
    finally:
        threads(before)


def model_of(tiny_model: Callable[..., TriModeModel]) -> TriModeModel:
    """Whose logits say something."""
    model = tiny_model(torch.float32, **SHAPE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(4)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_a_token_gets_the_same_bits(
    tiny_model: Callable[..., TriModeModel], real: library.Library, form: str, name: str
) -> None:
    kernels = real.c.trimode_kernels(name.encode())
    if not kernels:
        pytest.skip(f"this CPU has no {name}")
    of = library.load(name)
    assert of is not None
    native = network(model_of(tiny_model), form, of)
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    alone, *others = ways(native, of, dtype)
    assert len({row.numpy().tobytes() for row in alone}) == NUM_ALONE
    for other in others:
        assert torch.equal(other, alone)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_heads_side_by_side_are_as_one_alone(
    tiny_model: Callable[..., TriModeModel], real: library.Library, form: str
) -> None:
    """Prevents: sums that depend on whether a head attends beside another. Of 3, one is alone."""
    size, found = SHAPE["head_dim"], []
    for head in range(3):  # which all ask alike, and of which one is heard
        model = model_of(tiny_model)
        attention = model.encoder.layers[-1].self_attn
        with torch.no_grad():
            queries = attention.q_proj.weight.view(-1, size, SHAPE["hidden_size"])
            queries[1:3] = queries[0]
            attention.o_proj.weight.zero_()
            attention.o_proj.weight[:size, head * size : (head + 1) * size] = torch.eye(size)
        native = network(model, form, real)
        dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
        cache = KVCache(native.config, num_rows=2, num_cells=700, device="cpu", dtype=dtype)
        found.append(feed(native, cache, 0, 0, 600))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.process
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(
    tiny_model: Callable[..., TriModeModel],
    real: library.Library,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    form, edits = MUTANTS[name]
    source = tmp_path / "source"
    shutil.copytree(compilation.SOURCE, source)
    for edit in edits:
        text = (source / edit.file).read_text()
        assert text.count(edit.old) == 1, f"{edit.file} has changed: {edit.old}"
        (source / edit.file).write_text(text.replace(edit.old, edit.new))
    sets = compilation.instruction_sets()
    monkeypatch.setenv("TRIMODE_NATIVE_FLAGS", "-O1")
    monkeypatch.setattr(compilation, "SOURCE", source)
    compiler = next(find_compilers())
    jobs = len(os.sched_getaffinity(0))
    path = compilation.compile_library(compiler, tmp_path, num_jobs=jobs, sets=sets)
    opened = library._open(path)
    kernels = library.ctypes.c_void_p(opened.c.trimode_kernels(real.name.encode()))
    of = replace(real, c=opened.c, kernels=kernels, threads=opened.threads, path=path)
    native = network(model_of(tiny_model), form, of)
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    alone, *others = ways(native, of, dtype, has_two_rows=False)  # one mutant knows one row only
    assert not all(torch.equal(other, alone) for other in others)
