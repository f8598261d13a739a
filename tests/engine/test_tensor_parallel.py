"""Two ranks that share a network equal one that has all of it; a rank that goes ends the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import tensor_parallel_worker
from tests.engine.tensor_parallel_worker import (
    CASES,
    LEFT,
    TIMEOUT_S,
    everything,
    load,
    scrubbed_sequences,
)
from trimode.checkpoint.adapter import save_adapter, save_tensors
from trimode.checkpoint.io import save_checkpoint
from trimode.engine.ranks import _description
from trimode.errors import ConfigError
from trimode.model.adapter import TARGETS, AdapterForm, DrafterAdapter, LoraPair, linear_of
from trimode.model.corrector import Corrector

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


def make_adapter(
    model: Any, targets: tuple[str, ...], *, seed: int, scale: float
) -> DrafterAdapter:
    """Random, on these linear layers of every layer; it disagrees."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, layer in enumerate(model.encoder.layers):
        for target in targets:
            linear = linear_of(layer, target)
            down = torch.randn(3, linear.in_features, generator=generator, dtype=torch.float64)
            up = torch.randn(linear.out_features, 3, generator=generator, dtype=torch.float64)
            pairs[index, target] = LoraPair(down, up, scale)
    return DrafterAdapter(pairs)


def whole_view(adapter: DrafterAdapter, hidden_size: int) -> DrafterAdapter:
    """The same pairs, on in all passes, with mask embeddings and a corrector."""
    generator = torch.Generator().manual_seed(7)
    tensors = torch.randn(4, 3, hidden_size, generator=generator, dtype=torch.float64)
    return DrafterAdapter(
        {(index, target): pair for index, target, pair in adapter.items()},
        form=AdapterForm(("draft", "denoise"), False, ("skip",), 3),
        mask_embeddings=tensors[0],
        corrector=Corrector(*tensors[1:], num_candidates=5),
    )


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Any],
    byte_tokenizer: Any,
) -> Path:
    """The checkpoints of all worlds, and what two ranks found in each."""
    folder = tmp_path_factory.mktemp("ranks")
    tied = tiny_model(torch.float64, tie_word_embeddings=True, use_qk_norm=True)
    untied = tiny_model(torch.float64, seed=1, attention_bias=True, mlp_bias=True)
    odd = tiny_model(torch.float64, num_attention_heads=3, num_key_value_heads=1)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in untied.named_parameters():  # as made, biases are zero
        if name.endswith("bias"):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for name, model in (("tied", tied), ("untied", untied), ("odd", odd)):
        save_checkpoint(model, folder / name, tokenizer=byte_tokenizer)
    double = torch.float64
    drafter = make_adapter(tied, ("o_proj",), seed=2, scale=0.2)
    save_adapter(
        whole_view(drafter, tied.config.hidden_size), folder / "tied" / "drafter", dtype=double
    )
    for name, seed in (("wide", 3), ("lora", 4)):
        adapter = make_adapter(untied, TARGETS, seed=seed, scale=0.05)
        save_adapter(adapter, folder / "untied" / name, dtype=double)
    lora = folder / "untied" / "lora"
    save_tensors(load_file(lora / "adapter_model.safetensors"), lora, use="lora")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", tensor_parallel_worker.__name__, str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280, env=environment)
    return folder


def found(folder: Path, world: str, rank: int) -> Any:
    return json.loads((folder / f"{world}.{rank}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(folder: Path, case: str) -> None:
    """Prevents: heads, sums or biases shared out wrongly; K/V of the ranks out of step after rows
    change hands, prefixes are copied or a prompt is fed in parts; an adapter that is on for another
    share, or counted twice."""
    one, two = everything(load(folder, case)), found(folder, case, 0)
    assert two["tokens"] == one["tokens"]
    assert two["drafts"] == one["drafts"]
    assert two["streamed"] == one["streamed"]
    torch.testing.assert_close(two.pop("logits"), one["logits"], rtol=0, atol=1e-9)
    assert one["has_reused"]
    assert one["has_preempted"]
    assert two["has_reused"]
    assert two["has_preempted"]


@pytest.mark.parametrize("case", CASES)
def test_the_drafter_changes_drafts(folder: Path, case: str) -> None:
    """Prevents: an equality of two ranks that leave the adapter out."""
    lm = load(folder, case)
    lm.adapter = None
    assert everything(lm)["drafts"] != found(folder, case, 0)["drafts"]


def test_a_rank_holds_its_part_only(folder: Path) -> None:
    """Prevents: every rank with the whole model, which then needs no ranks."""
    sizes = found(folder, "untied", 1)["sizes"]
    assert {name.rpartition(".layers.0.")[2]: size for name, size in sizes.items()} == {
        "self_attn.q_proj.weight": [64, 64],
        "self_attn.q_proj.bias": [64],
        "self_attn.k_proj.weight": [32, 64],
        "self_attn.k_proj.bias": [32],
        "self_attn.v_proj.weight": [32, 64],
        "self_attn.v_proj.bias": [32],
        "self_attn.o_proj.weight": [64, 64],
        "self_attn.o_proj.bias": [64],
        "mlp.gate_proj.weight": [48, 64],
        "mlp.gate_proj.bias": [48],
        "mlp.up_proj.weight": [48, 64],
        "mlp.up_proj.bias": [48],
        "mlp.down_proj.weight": [64, 48],
        "mlp.down_proj.bias": [64],
        "input_layernorm.weight": [64],
        "post_attention_layernorm.weight": [64],
    }
    assert not found(folder, "untied", 1)["is_head_there"]
    assert found(folder, "tied", 1)["is_head_there"], "it is the embedding"


@pytest.mark.parametrize("case", CASES)
def test_rows_that_rank_0_has_freed_are_freed_on_all(folder: Path, case: str) -> None:
    """Prevents: memory of the other ranks that grows with every call of `generate`."""
    assert found(folder, case, 1)["num_caches"] <= 1


def test_a_row_that_was_not_finite_is_scrubbed_on_all_ranks(folder: Path) -> None:
    """Prevents: a NaN in a masked cell of another rank, which poisons the row's next owner."""
    lm = load(folder, "untied")
    first, _, third = sequences = scrubbed_sequences(lm)
    lm.engine(sequences).run()
    assert found(folder, "scrubbed", 0) == [
        ["length", first.new_ids],
        ["abort", []],
        ["length", third.new_ids],
    ]


def test_ranks_compare_mask_embeddings(tiny_model: Callable[..., Any]) -> None:
    """Prevents: a rank that embeds masks otherwise than rank 0, since its files are older."""
    model = tiny_model(torch.float64)
    plain = make_adapter(model, ("o_proj",), seed=2, scale=0.2)
    view = whole_view(plain, model.config.hidden_size)
    pairs = {(index, target): pair for index, target, pair in view.items()}
    bare = DrafterAdapter(pairs, form=view.form)
    narrow = DrafterAdapter(pairs, form=view.form, mask_embeddings=torch.zeros(2, 64))
    known = {_description(model, adapter) for adapter in (None, plain, view, bare, narrow)}
    assert len(known) == 5


def test_what_ranks_refuse(folder: Path) -> None:
    """Prevents: a stack trace, a hang or a wrong text where ranks cannot share a model."""
    heads, packed, alike = zip(*(found(folder, "refused", rank) for rank in range(2)), strict=True)
    assert set(heads) == {
        "ConfigError: 2 ranks cannot share out num_attention_heads, which is 3; allowed for this"
        " model: 1 ranks"
    }
    assert set(packed) == {"ConfigError: weights is 'native'; allowed with tensor_parallel: plain"}
    assert set(alike) == {
        "ConfigError: rank 1 has loaded another model, dtype or drafter than rank 0; start all"
        " ranks with the same command"
    }
    assert found(folder, "tied", 0)["errors"] == [
        "ConfigError: weights is 'native'; a model shared out over ranks is plain",
        "TriModeError: the model shared out over ranks is gone: it was closed",
    ]
    assert found(folder, "tied", 1)["error"] == (
        "ConfigError: this rank has a part of the model only and decides nothing; call"
        " `.ranks.follow()` here, and `generate` on rank 0"
    )


def test_without_torchrun_there_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: waiting for ranks that nobody has started."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK is not in the environment; start the same command"):
        load(folder, "tied", tensor_parallel=True)


@pytest.mark.parametrize("world", LEFT)
def test_a_rank_that_goes_ends_the_others(folder: Path, world: str) -> None:
    """Prevents: a rank that waits for ever for one that is gone."""
    who = 0 if world.startswith("leader") else 1
    assert not (folder / f"{world}.{who}.json").exists()
    left = found(folder, world, 1 - who)
    kind = "rank 1 ends: " if who == 0 else "the ranks of the model have lost one another: "
    assert left["error"][0].startswith("TriModeError: " + kind)
    assert left["seconds"] < 3 * TIMEOUT_S
    if world == "follower_killed":
        assert left["error"][1].startswith("TriModeError: the model shared out over ranks is gone")


def test_rank_0_that_fails_in_a_forward_ends_the_others(folder: Path) -> None:
    """Prevents: ranks out of step, the others in the midst of a forward that rank 0 gave up."""
    assert found(folder, "breaks", 0) == {"error": ["no memory"], "is_other_ended": True}
    assert found(folder, "breaks", 1)["error"][0].startswith("TriModeError: rank 1 ends: ")
    assert found(folder, "breaks", 1)["seconds"] < 3 * TIMEOUT_S


def test_ranks_outlive_a_pause(folder: Path) -> None:
    """Prevents: a server that nobody asks for a minute losing its ranks to their timeout."""
    generation = load(folder, "tied").generate([1, 2, 3], mode="ar", max_new_tokens=5, seed=0)
    assert found(folder, "idles", 0) == generation.token_ids
    assert found(folder, "idles", 1) == "none"
