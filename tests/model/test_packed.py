"""The packed network against the plain one, its slow twin: every view, dtype and way of asking."""

from __future__ import annotations

import copy
import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimode
from trimode.checkpoint.io import load_model, save_checkpoint
from trimode.decoding import GenerationParams, Sequence
from trimode.engine import Engine
from trimode.errors import ConfigError
from trimode.model import AdapterSwitch, DrafterAdapter, KVCache, RowAttention, TriModeModel
from trimode.model.adapter import MLP_TARGETS, TARGETS, LoraPair, merge, new_adapter
from trimode.model.attention import RowFeed
from trimode.model.masks import TRUNK

SHAPES: list[dict[str, Any]] = [
    {},
    {"use_qk_norm": True, "attention_bias": True, "mlp_bias": True},
    {"tie_word_embeddings": True},
]


def disagreeing_adapter(model: TriModeModel) -> DrafterAdapter:
    """A random pair on every target of every layer."""
    adapter = new_adapter(model.encoder.layers, rank=2, alpha=4, targets=TARGETS, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for _, _, pair in adapter.items():
            pair.up.copy_(torch.randn(pair.up.shape, generator=generator) * 0.2)
    return adapter.to(model.encoder.embed_tokens.weight.dtype)


def uneven_adapter(model: TriModeModel) -> DrafterAdapter:
    """Pairs of ranks from 1 to 40, some targets without one."""
    generator = torch.Generator().manual_seed(8)
    pairs = {}
    for index, layer in enumerate(model.encoder.layers):
        for number, target in enumerate(TARGETS):
            if (index + number) % 3 == 2:
                continue
            part = layer.mlp if target in MLP_TARGETS else layer.self_attn
            out_features, in_features = getattr(part, target).weight.shape
            rank = (1, 17, 40, 16, 5)[(index + 2 * number) % 5]
            down = torch.randn(rank, in_features, generator=generator) * 0.2
            up = torch.randn(out_features, rank, generator=generator) * 0.2
            pairs[index, target] = LoraPair(down, up, 0.5 + number)
    adapter = DrafterAdapter(pairs)
    return adapter.to(model.encoder.embed_tokens.weight.dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("which", ["tail", "scattered", "all"])
def test_an_uneven_adapter_on_many_rows(
    tiny_model: Callable[..., TriModeModel], which: str
) -> None:
    """Prevents: one target's first half read as another's; rows of a second band left out."""
    model, dtype = distinct_norms(tiny_model(torch.float32)), torch.float32
    adapter = uneven_adapter(model)
    packed = copy.deepcopy(model).pack("native")
    num_tokens = 70
    on = torch.zeros(num_tokens, 1, dtype=torch.bool)
    on[{"tail": slice(50, None), "scattered": slice(1, None, 3), "all": slice(None)}[which]] = True
    ids = positions = torch.arange(num_tokens)

    def logits(network: TriModeModel, adapter: AdapterSwitch | None) -> Tensor:
        cache = KVCache(network.config, num_rows=1, num_cells=80, device="cpu", dtype=dtype)
        feed = RowFeed(0, 0, [TRUNK] * num_tokens, positions.tolist(), positions.tolist())
        attend = RowAttention(cache, [feed])
        wanted = positions.tolist()
        with torch.inference_mode():
            found = network.answer(ids, positions, attend=attend, adapter=adapter, wanted=wanted)
        return found[1].float()

    switch = AdapterSwitch(adapter, on)
    expected, found = logits(model, switch), logits(packed, switch)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert (logits(packed, None) - found).abs().max() > 0.1


def distinct_norms(model: TriModeModel) -> TriModeModel:
    """Norms are all ones in a new network: mixed up, they would not show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def answers(model: TriModeModel, *, num_tokens: int, adapter: AdapterSwitch | None) -> Tensor:
    """Logits of tokens fed to two rows after unequal prompts, over K/V rows."""
    dtype = model.dtype
    cache = KVCache(model.config, num_rows=2, num_cells=64, device="cpu", dtype=dtype)
    lengths = (40, 37)  # beyond the original context, where queries are scaled
    found = []
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            feeds = [RowFeed(row, 0, [0] * length, range(length), range(length))]
            ids = torch.arange(length) % 250
            model.encode(ids, torch.arange(length), attend=RowAttention(cache, feeds))
        for rows in ((0,), (0, 1)):
            feeds = []
            for r in rows:
                own = range(lengths[r], lengths[r] + num_tokens)
                feeds.append(RowFeed(r, lengths[r], [0] * num_tokens, own, own))
            positions = torch.cat([torch.tensor(list(feed.positions)) for feed in feeds])
            switch = adapter
            if adapter is not None and adapter.is_on is not None:
                switch = AdapterSwitch(adapter.adapter, adapter.is_on[: len(positions)])
            ids = positions * 3 % 250
            attend = RowAttention(cache, feeds)
            hidden = model.encode(ids, positions, attend=attend, adapter=switch)
            found.append(model.diffusion_head(hidden))
    return torch.cat(found)


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "norms-biases", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 9, 14])
def test_packed_is_the_same_network(
    tiny_model: Callable[..., TriModeModel],
    num_tokens: int,
    dtype: torch.dtype,
    shape: dict[str, Any],
) -> None:
    """Prevents: parts fused in the wrong order, a forgotten bias, norm, residual or query scale,
    an adapter that is dropped or on for the wrong tokens, copies of few tokens left in."""
    model = distinct_norms(tiny_model(dtype, **shape))
    adapter = disagreeing_adapter(model)
    is_on = (torch.arange(2 * num_tokens) % 2 == 0)[:, None]
    switches = [None, AdapterSwitch(adapter, None), AdapterSwitch(adapter, is_on)]
    wanted = [answers(model, num_tokens=num_tokens, adapter=one) for one in switches]
    assert not wanted[0].allclose(wanted[1], atol=0.1)
    exact_model = copy.deepcopy(model).double()
    model.pack()
    for one, expected in zip(switches, wanted, strict=True):
        found = answers(model, num_tokens=num_tokens, adapter=one)
        if dtype is torch.float32:
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
        else:  # rounded less often than torch's, so nearer to the exact network
            exact = answers(exact_model, num_tokens=num_tokens, adapter=_doubled(one))
            assert (found - exact).norm() < 1.1 * (expected - exact).norm()


def _doubled(switch: AdapterSwitch | None) -> AdapterSwitch | None:
    if switch is None:
        return None
    return AdapterSwitch(copy.deepcopy(switch.adapter).double(), switch.is_on)


@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
def test_whole_sequences_too(tiny_model: Callable[..., TriModeModel], pattern: str) -> None:
    """Prevents: scoring with a loaded model failing, or keeping a graph that has no gradients."""
    model = distinct_norms(tiny_model(torch.float32))
    ids = torch.arange(24).view(2, 12)
    expected = model(ids, pattern=pattern).logits
    found = model.pack()(ids, pattern=pattern).logits
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("mode", ["linear", "branching", "quadratic"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("use_adapter", [False, True])
def test_speculation_is_exact_when_packed(
    tiny_model: Callable[..., TriModeModel],
    random_adapter: Callable[..., DrafterAdapter],
    mode: str,
    temperature: float,
    use_adapter: bool,
) -> None:
    """Prevents: fused parts that answer a token by how many are fed, or colour the AR view."""
    model = tiny_model(torch.float32)
    adapter = random_adapter(model) if use_adapter else None
    model.pack()
    expected = _texts(model, "ar", temperature=temperature, adapter=None)
    assert _texts(model, "ar", temperature=temperature, adapter=adapter) == expected
    assert _texts(model, mode, temperature=temperature, adapter=adapter) == expected


def _texts(
    model: TriModeModel, mode: str, *, temperature: float, adapter: DrafterAdapter | None
) -> list[list[int]]:
    """Two sequences of unequal prompts, decoded together."""
    engine = Engine(model, num_rows=2, num_cells=256, adapter=adapter)
    params = GenerationParams(
        mode=mode, max_new_tokens=24, block_length=6, temperature=temperature, seed=3
    )
    mask_token_id = model.config.mask_token_id
    sequences = [Sequence(ids, params, mask_token_id=mask_token_id) for ids in ([1, 2, 3], [7] * 9)]
    for seq in sequences:
        engine.submit(seq)
    while not engine.is_idle:
        engine.step()
    return [seq.new_ids for seq in sequences]


def test_packing_is_undone_bit_for_bit(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: weights that come back rounded, swapped or frozen when training goes on."""
    model = distinct_norms(tiny_model(torch.float32, use_qk_norm=True, attention_bias=True))
    model.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.pack()
    while_packed = model.state_dict()
    model.train()
    after = model.state_dict()
    assert before.keys() == while_packed.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.equal(while_packed[name])
        assert tensor.equal(after[name])
    ids = torch.arange(12)[None]
    model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_packed_weights_are_saved(tiny_model: Callable[..., TriModeModel], tmp_path: Path) -> None:
    """Prevents: a checkpoint without the packed layers, or refused for memory that is shared."""
    model = tiny_model(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_checkpoint(model.pack(), tmp_path / "saved")
    after = load_model(tmp_path / "saved", device="cpu", dtype="float32").state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_a_packed_model_can_be_copied_and_converted(
    tiny_model: Callable[..., TriModeModel],
) -> None:
    """Prevents: opaque tensors that `deepcopy` or `to` fail on."""
    model = tiny_model(torch.float32)
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    twin = copy.deepcopy(model.pack())
    torch.testing.assert_close(twin(ids).logits, expected, rtol=0, atol=2e-3)
    assert twin.to(torch.float64).weights == "plain"
    assert model.weights == "native"


def test_packed_weights_are_not_held_twice(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: plain layers kept beside the packed ones."""
    model = tiny_model(torch.float32).pack()
    left = {name for name, _ in model.named_parameters()}
    assert left == {"encoder.embed_tokens.weight", "encoder.norm.weight"}


def test_what_is_packed_takes_no_new_weights(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: weights loaded into a packed model and dropped in silence."""
    state = tiny_model(torch.float32, seed=1).state_dict()
    with pytest.raises(ConfigError, match=r"pack\('plain'\)"):
        tiny_model(torch.float32).pack().load_state_dict(state)


@pytest.mark.parametrize("num_tokens", [1, 7, 14])
def test_int8_is_near(tiny_model: Callable[..., TriModeModel], num_tokens: int) -> None:
    """Prevents: int8 with a scale of the wrong group, an offset left in, a token coloured by its
    neighbours, an adapter that is dropped."""
    model = distinct_norms(tiny_model(torch.float32, tie_word_embeddings=True))
    adapter = disagreeing_adapter(model)
    switches = [None, AdapterSwitch(adapter, None)]
    wanted = [answers(model, num_tokens=num_tokens, adapter=one) for one in switches]
    assert (wanted[0] - wanted[1]).norm() > 0.4 * wanted[0].norm()
    model.pack("int8")
    for one, expected in zip(switches, wanted, strict=True):
        found = answers(model, num_tokens=num_tokens, adapter=one)
        assert (found - expected).norm() < 0.2 * expected.norm()  # random weights: ill-conditioned
        assert found[:num_tokens].equal(found[num_tokens : 2 * num_tokens])  # alone, and beside


def test_int8_says_what_it_cannot(tiny_model: Callable[..., TriModeModel], tmp_path: Path) -> None:
    """Prevents: rounded weights saved as if they were the model's."""
    model = tiny_model(torch.float32).pack("int8")
    for undo in (model.state_dict, model.train, lambda: model.pack("native")):
        with pytest.raises(ConfigError, match="int8"):
            undo()
    assert model.weights == "int8"
    with pytest.raises(ConfigError, match="float64"):
        tiny_model(torch.float64).pack("int8")


def test_int8_passes_on_what_is_not_finite(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: a NaN that is rounded to a number, and so a broken sequence that goes on."""
    model = tiny_model(torch.float32)
    with torch.no_grad():
        model.encoder.embed_tokens.weight[5] = torch.nan
    model.pack("int8")
    assert model(torch.tensor([[5]])).logits.isnan().all()


def test_int8_passes_on_one_value_that_is_not_finite(
    tiny_model: Callable[..., TriModeModel],
) -> None:
    """Prevents: a NaN beside numbers, which the maximum of a group does not see."""
    model = tiny_model(torch.float32)
    with torch.no_grad():
        model.encoder.layers[0].self_attn.v_proj.weight[1] = torch.nan
    model.pack("int8")
    assert model(torch.tensor([[5, 6]])).logits.isnan().all()


def test_pack_knows_its_forms(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: whatever is not `native` taken for `plain`; a reason that names no way out."""
    with pytest.raises(
        ConfigError, match="'native'; .* the model is torch.float64; allowed: plain"
    ):
        tiny_model(torch.float64).pack()
    with pytest.raises(ConfigError, match="'fp8'; allowed: plain, native, int8"):
        tiny_model(torch.float32).pack("fp8")  # type: ignore[arg-type]


def test_what_a_copy_becomes_is_its_own(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: training a copy of a packed model changing the head of the first."""
    model, ids = tiny_model(torch.float32).pack(), torch.arange(12)[None]
    expected = model(ids).logits
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert model(ids).logits.equal(expected)


def test_foreign_parts_are_refused(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: what PEFT or a parametrization adds to a linear layer lost in silence."""
    model = tiny_model(torch.float32)
    torch.nn.utils.parametrizations.weight_norm(model.encoder.layers[1].mlp.up_proj)
    with pytest.raises(ConfigError, match="1.mlp.up_proj is a .*Parametrized"):
        model.pack()
    assert model(torch.arange(12)[None]).logits.isfinite().all()


def test_adapters_ask_for_plain_weights(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: an error about attributes for who loads or merges an adapter too late."""
    model = tiny_model(torch.float32)
    adapter = disagreeing_adapter(model)
    with pytest.raises(ConfigError, match=r"pack\('plain'\)"):
        merge(adapter, model.pack().encoder.layers)


def test_packed_weights_are_pickled(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: `torch.save` or a process of its own failing on opaque tensors."""
    model, ids, file = tiny_model(torch.float32).pack(), torch.arange(12)[None], io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(ids).logits.equal(model(ids).logits)


def test_autocast_is_refused(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: float32 where bfloat16 was asked for, or an error from inside a product."""
    model = tiny_model(torch.float32).pack()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        model(torch.arange(12)[None])


@pytest.mark.parametrize("use_qk_norm", [False, True])
def test_half_precision_is_rounded_as_often(
    tiny_model: Callable[..., TriModeModel], use_qk_norm: bool
) -> None:
    """Prevents: norms rounded twice, before and after their weight, and eps rounded to nothing."""
    model = tiny_model(torch.bfloat16, use_qk_norm=use_qk_norm)
    for weight in distinct_norms(model).parameters():
        weight.requires_grad_(False)
    ids = torch.arange(120).view(4, 30)
    exact = copy.deepcopy(model).double()(ids).logits
    plain_error = (model(ids).logits - exact).norm()
    assert (model.pack()(ids).logits - exact).norm() < 1.1 * plain_error


def test_parameters_are_counted_as_before(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prevents: a loaded model said to be a tenth of its size."""
    model = tiny_model(torch.float32)
    expected = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    model.pack()
    assert (model.num_parameters(), model.num_parameters(exclude_embeddings=True)) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_file_is_let_go_of(tiny_checkpoint: Callable[..., Path]) -> None:
    """Prevents: the checkpoint kept mapped beside packed weights, so that they are there twice."""
    folder = tiny_checkpoint(torch.float32, name="let_go")
    lm = trimode.load(folder, device="cpu", weights="native")
    assert lm.model.weights == "native"
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(folder) not in maps


def test_what_is_no_token_is_refused(tiny_model: Callable[..., TriModeModel]) -> None:
    model = tiny_model(torch.float32).pack("native")
    size = model.config.vocab_size
    with pytest.raises(IndexError, match=f"token id {size}; allowed: 0 to {size - 1}"):
        model(torch.tensor([[1, size]]))
    with pytest.raises(IndexError, match="token id -100"):
        model(torch.tensor([[-100, 1]]))
    assert model.native is not None
    cache = KVCache(model.config, num_rows=1, num_cells=8, device="cpu", dtype=torch.float32)
    feeds = [RowFeed(0, 6, [0] * 4, range(6, 10), range(6, 10))]
    with pytest.raises(IndexError, match="cell 9; allowed: 0 to 7"):
        model.native.forward([1] * 4, range(6, 10), cache=cache, feeds=feeds)
    assert not cache.keys.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_does_not_matter(
    tiny_model: Callable[..., TriModeModel], dtype: torch.dtype
) -> None:
    model = tiny_model(torch.float32)
    adapter = disagreeing_adapter(model)
    switch = AdapterSwitch(adapter, None)
    other = copy.deepcopy(model)
    wanted = answers(model.pack("native"), num_tokens=9, adapter=switch)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = answers(other.pack("native"), num_tokens=9, adapter=switch)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, wanted)


def test_a_foreign_adapter_is_refused(tiny_model: Callable[..., TriModeModel]) -> None:
    model = tiny_model(torch.float32).pack("native")
    foreign = disagreeing_adapter(tiny_model(torch.float32, intermediate_size=48))
    with pytest.raises(ConfigError, match=r"pair of layer 0, gate_proj is for a weight of \(48,"):
        answers(model, num_tokens=3, adapter=AdapterSwitch(foreign, None))


def test_training_the_original_leaves_a_copy_alone(
    tiny_model: Callable[..., TriModeModel],
) -> None:
    model = tiny_model(torch.float32, tie_word_embeddings=False).pack("native")
    twin = copy.deepcopy(model)
    ids = torch.arange(5)[None]
    wanted = twin(ids).logits
    model.pack("plain")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(twin(ids).logits, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_keeps_what_is_no_number(
    tiny_model: Callable[..., TriModeModel], value: float
) -> None:
    model = tiny_model(torch.float32)
    weight = model.encoder.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 3] = value
    logits = model.pack("int8")(torch.arange(5)[None]).logits
    assert not logits.isfinite().any()


def test_two_threads_of_one_model(tiny_model: Callable[..., TriModeModel]) -> None:
    model = tiny_model(torch.float32, max_position_embeddings=8192).pack("native")
    assert model.native is not None
    network = model.native
    found: dict[int, Tensor] = {}

    def forward(position: int) -> None:
        cache = KVCache(model.config, num_rows=1, num_cells=4, device="cpu", dtype=torch.float32)
        feeds = [RowFeed(0, 0, [0], [position], [position])]
        for _ in range(50):
            found[position] = network.forward([7], [position], cache=cache, feeds=feeds)[0]

    threads = [threading.Thread(target=forward, args=(at,)) for at in (1500, 5000, 3, 8000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for position, states in found.items():
        forward(position)
        assert torch.equal(found[position], states)
