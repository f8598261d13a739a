"""Training of `gpu_check.py`: FlexAttention against dense attention, steps against the CPU's.

Tolerances are relative. Attention: norm of the difference over that of dense float32 attention,
1e-4 in float32 and 2e-2 in bfloat16, for outputs and gradients. Steps: losses and the norm of the
first gradient, 1e-3 in float32 and 3e-2 in bfloat16, against float32 on the CPU.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch._dynamo.utils
from bench_train import MASK, make_batch, plain_loss_sums
from gpu_record import Record, Setting
from torch import Tensor

from trimode.model import DenseAttention, TriModeConfig, TriModeModel
from trimode.training.config import OptimizerPart
from trimode.training.dual_stream import dual_stream_mask, dual_stream_mod
from trimode.training.flex import FlexAttention, has_flex
from trimode.training.objective import LossSums, TrainingBatch, count_targets, loss_sums
from trimode.training.optim import make_optimizer

CLOSE_ATTENTION = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CLOSE_STEPS = {"fp32": 1e-3, "bf16": 3e-2}
HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 32, 512

LossOf = Callable[[TriModeModel, TrainingBatch], LossSums]


def batch_of(step: int, row_len: int) -> TrainingBatch:
    """Two rows of three documents each."""
    options = Namespace(
        sequence_length=row_len, rows=2, documents_per_row=3, vocab_size=VOCAB, block_length=8
    )
    return make_batch(options, step)


def attention(setting: Setting, record: Record, row_len: int, dtype: torch.dtype) -> None:
    """The dual stream's attention, by both kernels."""
    device, has_backward = setting.device, has_flex(setting.device)
    if device.type == "cuda" and not has_backward:
        record.left_out.append(f"FlexAttention, S {row_len}: needs Triton and Ampere or later")
        return
    rows = batch_of(0, row_len).rows.to(device)
    generator = torch.Generator().manual_seed(row_len)

    def draw(num_heads: int) -> Tensor:
        drawn = torch.randn(2, 2 * row_len, num_heads, HEAD_DIM, generator=generator)
        return drawn.to(device, dtype).float()

    inputs = [draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)]
    upstream = draw(HEADS)
    flex = FlexAttention(
        dual_stream_mod(rows),
        batch_size=2,
        num_queries=2 * row_len,
        num_keys=2 * row_len,
        dtype=dtype,
        device=device,
    )

    def run(attend: Any, *, learns: bool) -> list[Tensor]:
        given = [x.clone().requires_grad_(learns) for x in inputs]
        out = attend(0, *given).float()
        return [out.detach(), *(torch.autograd.grad(out, given, upstream) if learns else ())]

    found = run(flex, learns=has_backward)
    expected = run(DenseAttention(dual_stream_mask(rows)), learns=has_backward)
    short, bound = str(dtype).removeprefix("torch."), CLOSE_ATTENTION[dtype]
    for name, mine, theirs in zip(
        ("output", "of queries", "of keys", "of values"), found, expected, strict=False
    ):
        off_by = float((mine - theirs).norm() / theirs.norm())
        what = f"FlexAttention, S {row_len}, {short}: {name}"
        record.check(what, off_by <= bound, off_by=off_by, bound=bound)
    if not has_backward:
        record.left_out.append(
            f"gradients of FlexAttention, S {row_len}, {short}: it is not compiled on this device"
        )


def steps(
    device: torch.device, sums_of: LossOf, *, num: int, row_len: int, precision: str, name: Any
) -> tuple[list[float], float]:
    """Losses of some steps from the same weights, and the norm of the first gradient."""
    torch.manual_seed(0)
    config = TriModeConfig(
        vocab_size=VOCAB,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=3 * HEADS * HEAD_DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=row_len,
        mask_token_id=MASK,
    )
    model = TriModeModel(config).to(device).train()
    part = OptimizerPart(name=name, learning_rate=1e-3)
    optimizer = make_optimizer(model, part, has_fast_bf16=False)
    losses: list[float] = []
    grad_norm = 0.0
    for step in range(num):
        batch = batch_of(step, row_len)
        counts, batch = count_targets(batch), batch.to(device)
        is_bf16 = precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if is_bf16 else nullcontext():
            sums = sums_of(model, batch)
        loss = sums.total(counts, diffusion_weight=0.3)
        loss.backward()
        if step == 0:
            grads = [w.grad.float().norm() for w in model.parameters() if w.grad is not None]
            grad_norm = float(torch.stack(grads).norm())
        optimizer.step(1.0)
        losses.append(float(loss.detach()))
    return losses, grad_norm


def training(setting: Setting, record: Record) -> None:
    """All of it; on a GPU every FlexAttention must be a compiled one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _training(setting, record)
    if has_flex(setting.device):
        said = [str(one.message)[:300] for one in caught if "flex_attention" in str(one.message)]
        record.check("FlexAttention is never left uncompiled", not said, warnings=said[:3])
        counts = torch._dynamo.utils.counters["stats"]
        record.figures["compiled graphs"] = int(counts["unique_graphs"])


def _training(setting: Setting, record: Record) -> None:
    """Attention at one shape, then the steps, then attention at a shape that fills no whole
    block."""
    row_len, num = setting.pick(256, 64), setting.pick(5, 2)
    for dtype in CLOSE_ATTENTION:
        if record.has_time(setting, f"FlexAttention in {dtype}"):
            attention(setting, record, row_len, dtype)
    kernel = "FlexAttention" if has_flex(setting.device) else "no FlexAttention"
    record.figures["kernel of the steps"] = kernel
    contestants: tuple[tuple[str, LossOf, str, str], ...] = (
        ("trimode, adamw", loss_sums, "fp32", "adamw"),
        ("dense, adamw", plain_loss_sums, "fp32", "adamw"),
        ("trimode, adamw", loss_sums, "bf16", "adamw"),
        ("trimode, muon", loss_sums, "fp32", "muon"),
        ("selective", partial(loss_sums, checkpointing="selective"), "fp32", "adamw"),
        ("checkpointed", partial(loss_sums, checkpointing=True), "bf16", "adamw"),
    )
    cpu = torch.device("cpu")
    expected = {
        name: steps(cpu, loss_sums, num=num, row_len=row_len, precision="fp32", name=name)
        for name in ("adamw", "muon")
    }
    for title, sums_of, precision, name in contestants:
        what = f"{title}, {precision}"
        if not record.has_time(setting, what):
            continue
        losses, norm = steps(
            setting.device, sums_of, num=num, row_len=row_len, precision=precision, name=name
        )
        theirs, their_norm = expected[name]
        worst = max(abs(a / b - 1) for a, b in zip(losses, theirs, strict=True))
        norm_off, bound = abs(norm / their_norm - 1), CLOSE_STEPS[precision]
        record.check(
            f"{what}: steps as on the CPU in float32",
            worst <= bound and norm_off <= bound and losses[-1] < losses[0],
            losses=losses,
            cpu=theirs,
            losses_off_by=worst,
            gradient_norm_off_by=norm_off,
            bound=bound,
        )
    for dtype in CLOSE_ATTENTION:
        if record.has_time(setting, f"FlexAttention at an odd length in {dtype}"):
            attention(setting, record, setting.pick(200, 40), dtype)
