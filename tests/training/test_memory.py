"""What a training step keeps for its backward, and what it makes again instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.fake_stream import MASK, FakeStream
from trimode.model import Checkpointing, DenseAttention, TriModeConfig, TriModeModel
from trimode.training import chunked_attention, dual_stream
from trimode.training.chunked_attention import ChunkedAttention
from trimode.training.corruption import corrupt
from trimode.training.dual_stream import (
    causal_mask,
    causal_mod,
    dual_stream_attention,
    dual_stream_mask,
    dual_stream_mod,
)
from trimode.training.flex import FlexAttention, MaskMod, has_flex
from trimode.training.head_loss import chunk_rows, head_loss_sum
from trimode.training.objective import TrainingBatch, count_targets, loss_sums
from trimode.training.packing import PackedRows, RowSampler

STREAM = FakeStream([13, 4, 30, 21, 50, 9, 40], seed=1)


@pytest.fixture
def model() -> TriModeModel:
    torch.manual_seed(0)
    return TriModeModel(
        TriModeConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            mask_token_id=MASK,
        )
    )


def _batch() -> TrainingBatch:
    samples = range(3)
    rows = RowSampler(STREAM, 40, (4, 8), seed=0).rows(samples)
    return TrainingBatch(rows, corrupt(rows, samples, seed=0, mask_token_id=MASK))


def _step(
    model: TriModeModel, batch: TrainingBatch, *, checkpointing: Checkpointing
) -> tuple[float, list[Tensor], int]:
    """Loss, gradients and the bytes kept for the backward, each storage once."""
    model.zero_grad()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sums = loss_sums(model, batch, checkpointing=checkpointing)
        loss = sums.total(count_targets(batch), diffusion_weight=0.3)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), gradients, sum(kept.values())


@pytest.mark.parametrize("has_noise", [True, False])
@pytest.mark.parametrize("is_bf16", [True, False])
@pytest.mark.parametrize(("checkpointing", "share"), [("selective", 0.75), (True, 0.35)])
def test_checkpointing_changes_memory_and_nothing_else(
    *,
    model: TriModeModel,
    has_noise: bool,
    is_bf16: bool,
    checkpointing: Checkpointing,
    share: float,
) -> None:
    """A layer made again in another view or precision; a switch that keeps everything."""
    batch = _batch() if has_noise else TrainingBatch(_batch().rows, None)
    results = []
    for setting in (False, checkpointing):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            results.append(_step(model, batch, checkpointing=setting))
    (loss, gradients, kept), (again_loss, again_gradients, again_kept) = results
    assert again_loss == loss
    for one, other in zip(gradients, again_gradients, strict=True):
        assert torch.equal(one, other)
    weights = sum(p.nbytes for p in model.parameters())
    assert again_kept - weights < share * (kept - weights)


def test_decoding_keeps_its_view(model: TriModeModel) -> None:
    """A switch that outlives the training forward would be a view stored on the model."""
    state = dict(vars(model))
    _step(model, _batch(), checkpointing=True)
    assert vars(model).keys() == state.keys()
    assert not any("checkpoint" in name for module in model.modules() for name in vars(module))


def test_attention_weights_of_long_rows_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """[T, T'] weights of every layer, the largest thing a long row would keep."""
    monkeypatch.setattr(chunked_attention, "_MAX_KEPT_KEYS", 79)
    rows = _batch().rows
    shapes: list[torch.Size] = []
    query, key, value = (torch.randn(3, 80, n, 16, requires_grad=True) for n in (4, 2, 2))
    attend = dual_stream_attention(rows, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, id):
        attend(0, query, key, value)
    assert shapes
    assert sum(shape.numel() for shape in shapes) <= sum(x.numel() for x in (query, key, value))


@pytest.mark.parametrize("chunk_len", [7, 80])
@pytest.mark.parametrize("is_kept", [True, False])
def test_chunked_gradients_equal_dense(
    monkeypatch: pytest.MonkeyPatch, chunk_len: int, is_kept: bool
) -> None:
    """A key whose gradient misses a chunk, or gets one twice; the weights of another chunk."""
    monkeypatch.setattr(chunked_attention, "_MAX_KEPT_KEYS", 80 if is_kept else 79)
    torch.manual_seed(0)
    attn_mask = dual_stream_mask(_batch().rows)
    upstream = torch.randn(3, 80, 4, 16, dtype=torch.float64)
    gradients = []
    for attend in (
        ChunkedAttention(attn_mask, chunk_len=chunk_len, part_len=40, dtype=torch.float64),
        DenseAttention(attn_mask),
    ):
        torch.manual_seed(1)
        inputs = [
            torch.randn(3, 80, n, 16, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)
        ]
        attend(0, *inputs).backward(upstream)
        gradients.append([x.grad for x in inputs])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("make_mod", "make_mask"),
    [(causal_mod, causal_mask), (dual_stream_mod, dual_stream_mask)],
)
def test_mask_functions_equal_the_masks(
    make_mod: Callable[[PackedRows], MaskMod], make_mask: Callable[[PackedRows], Tensor]
) -> None:
    """FlexAttention seeing what the truth tables forbid, or another row's documents."""
    rows = _batch().rows
    expected = make_mask(rows)
    row, query, key = (torch.arange(n) for n in (3, *expected.shape[2:]))
    found = make_mod(rows)(
        row[:, None, None], torch.tensor(0), query[None, :, None], key[None, None, :]
    )
    assert torch.equal(found, expected[:, 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_dense() -> None:
    """Transposed heads, keys of the wrong group, blocks that straddle documents and halves."""
    torch.manual_seed(0)
    samples = range(2)
    rows = RowSampler(STREAM, 150, (8,), seed=0).rows(samples)
    query, key, value = (torch.randn(2, 300, n, 16) for n in (4, 2, 2))
    flex = FlexAttention(
        dual_stream_mod(rows),
        batch_size=2,
        num_queries=300,
        num_keys=300,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    dense = DenseAttention(dual_stream_mask(rows))
    torch.testing.assert_close(flex(0, query, key, value), dense(0, query, key, value))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_objective_with_flex_attention(
    model: TriModeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU never walked by a test: here uncompiled and forward only."""
    batch, only_text = _batch(), TrainingBatch(_batch().rows, None)
    with torch.no_grad():
        expected = [loss_sums(model, b) for b in (batch, only_text)]
        made: list[Any] = []
        monkeypatch.setattr(dual_stream, "has_flex", lambda device: made.append(device) or True)
        found = [loss_sums(model, b) for b in (batch, only_text)]
    assert len(made) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close((one.ar, one.diffusion), (other.ar, other.diffusion))


def test_flex_needs_cuda() -> None:
    """A CPU sent to a kernel that has no backward there."""
    assert not has_flex(torch.device("cpu"))


def test_chunks_of_logits() -> None:
    """A few rows a product at a large vocabulary, or all the logits of a small one at once."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_rows(4096, cpu) == 1024
    assert [chunk_rows(131072, device) for device in (cpu, cuda)] == [256, 512]


def test_gradients_of_the_head_are_given_once() -> None:
    """They are scaled in place, so that a second backward would return them scaled twice."""
    head = torch.nn.Linear(8, 17, bias=False)
    loss = head_loss_sum(head, torch.randn(5, 8), torch.arange(5), torch.ones(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already"):
        loss.backward()
