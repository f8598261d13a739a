"""Speed of `gpu_check.py`: the plain path at the 8B shape, and one joint training step.

A step is timed on the host's clock from its feeds to its answers, as an engine sees it. Beside it
stand the time that the device was busy, the number of kernels, and the time of the same forward
replayed as a CUDA graph, which is what is left when the host costs nothing. The share of bandwidth
is of a copy's, read and written bytes counted: weights without the embedding's table, and all K/V
in view, once each. Model FLOPs are counted as `bench_train.py` counts them.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from bench_train import make_batch
from gpu_record import Record, Setting

from trimode.decoding import GenerationParams
from trimode.decoding import Sequence as Text
from trimode.decoding.step import Group, Step, causal_step, group_step
from trimode.engine.runner import Feed, Runner
from trimode.model import KVCache, NemotronLabsDiffusionConfig, RowAttention, TriModeModel
from trimode.model.adapter import PUBLISHED_FORM
from trimode.model.attention import RowFeed
from trimode.model.modeling import NemotronLabsDiffusionModel
from trimode.training.config import OptimizerPart
from trimode.training.dual_stream import dual_stream_mask
from trimode.training.objective import (
    count_targets,
    is_ar_target,
    is_diffusion_target,
    loss_sums,
)
from trimode.training.optim import make_optimizer

ASSUMED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""FLOP/s of dense bfloat16 products by the vendor's data sheets, by a part of the device's name."""
TRAINED_BYTES = 18
"""Of each parameter in training: float32 weights, gradients and two moments, and room for more."""
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
WIDE = 32


def random_model(
    config: NemotronLabsDiffusionConfig, setting: Setting, dtype: torch.dtype
) -> TriModeModel:
    """Made where it runs, since the CPU would take minutes."""
    with torch.device("meta"):
        model = NemotronLabsDiffusionModel(config)
    model = model.to(dtype).to_empty(device=setting.device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            _ = weight.normal_(0, 0.02) if weight.ndim > 1 else weight.fill_(1)
    return model


def median_s(setting: Setting, work: Callable[[], Any], *, num: int, num_warm: int = 2) -> float:
    """Seconds of some work, the device's included."""
    times = []
    for number in range(num_warm + num):
        setting.wait()
        started_s = time.perf_counter()
        work()
        setting.wait()
        if number >= num_warm:
            times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def ceilings(setting: Setting, record: Record) -> tuple[float, float]:
    """Bytes/s of a copy and FLOP/s of one large bfloat16 product, both measured."""
    size = setting.pick(2**30, 2**20)
    one = torch.ones(size, device=setting.device, dtype=torch.bfloat16)
    other = torch.empty_like(one)
    copy_s = median_s(setting, lambda: other.copy_(one), num=10)
    side = setting.pick(8192, 128)
    left, right = (
        torch.randn(side, side, device=setting.device, dtype=torch.bfloat16) for _ in range(2)
    )
    product_s = median_s(setting, lambda: left @ right, num=10)
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else "a CPU"
    assumed = next((peak for part, peak in ASSUMED_PEAKS.items() if part in name), None)
    bandwidth, rate = 4 * size / copy_s, 2 * side**3 / product_s
    record.figures["ceilings"] = {
        "device": name,
        "copy_bytes_per_s": bandwidth,
        "bfloat16_product_flops": rate,
        "assumed_peak_flops": assumed,
    }
    return bandwidth, rate


class Bench:
    """A network with rows of random K/V behind which steps can be timed.

    Args:
        model: The network.
        num_rows: Sequences of a step.
        length: Tokens before it.
        setting: Where it runs.
    """

    def __init__(
        self, model: TriModeModel, *, num_rows: int, length: int, setting: Setting
    ) -> None:
        self.model, self.setting, self.num_rows, self.length = model, setting, num_rows, length
        self.cache: KVCache = model.new_cache(num_rows=num_rows, num_cells=length + 8 * WIDE)
        self.cache.keys.normal_()
        self.cache.values.normal_()
        self.runner = Runner(model, self.cache)

    def texts(self, law: dict[str, Any], num_lengths: int) -> list[Text]:
        """Sequences of that length, or of so many lengths up to it."""
        params = GenerationParams(mode="linear", max_new_tokens=1, block_length=WIDE, seed=0, **law)
        mask_token_id = self.model.config.mask_token_id
        found = [Text([0], params, mask_token_id=mask_token_id) for _ in range(self.num_rows)]
        for row, text in enumerate(found):
            text.length = self.length - row % num_lengths
        return found

    def step_s(
        self,
        make: Callable[[Text], Step],
        *,
        num: int,
        law: dict[str, Any],
        grows: bool,
        num_lengths: int = 1,
    ) -> list[float]:
        """Seconds of each of some steps; the texts grow by a token a step, or do not."""
        texts, times = self.texts(law, num_lengths), []
        for _ in range(num):
            feeds = [Feed(text, row, make(text)) for row, text in enumerate(texts)]
            self.setting.wait()
            started_s = time.perf_counter()
            found = self.runner.run(feeds)
            times.append(time.perf_counter() - started_s)
            assert None not in found, "the network gave non-finite numbers"
            for text in texts:
                text.length += grows
        return times

    def busy(
        self, make: Callable[[Text], Step], law: dict[str, Any], num_lengths: int
    ) -> dict[str, Any]:
        """Seconds that the device works in a step, its kernels, and where most of the time goes."""
        from torch.profiler import ProfilerActivity, profile

        feeds = [
            Feed(text, row, make(text)) for row, text in enumerate(self.texts(law, num_lengths))
        ]
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            self.runner.run(feeds)
            self.setting.wait()
        on_device = [
            event
            for event in found.key_averages()
            if str(event.device_type).endswith("CUDA") and event.self_device_time_total
        ]
        on_device.sort(key=lambda event: -event.self_device_time_total)
        return {
            "busy_ms": sum(event.self_device_time_total for event in on_device) / 1e3,
            "kernels": sum(event.count for event in on_device),
            "longest": [
                [event.key[:80], event.count, event.self_device_time_total / 1e3]
                for event in on_device[:6]
            ],
        }

    @torch.inference_mode()
    def graph_s(self, make: Callable[[Text], Step], num_lengths: int) -> float:
        """Seconds of the same forward, head included and choice not, as a CUDA graph."""
        texts = self.texts({}, num_lengths)
        steps = [make(text) for text in texts]
        device = self.setting.device
        ids = torch.tensor([i for step in steps for i in step.token_ids], device=device)
        positions = torch.tensor([p for step in steps for p in step.positions], device=device)
        attend = RowAttention(
            self.cache,
            [
                RowFeed(
                    *(row, texts[row].length),
                    groups=step.groups,
                    positions=step.positions,
                    anchors=step.anchors,
                )
                for row, step in enumerate(steps)
            ],
        )

        def forward() -> torch.Tensor:
            hidden = self.model.encode(ids, positions, attend=attend)
            logits: torch.Tensor = self.model.diffusion_head(hidden)
            return logits

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        return median_s(self.setting, graph.replay, num=10)


def one_token(text: Text) -> Step:
    """What AR decoding feeds."""
    return causal_step("decode", [5], start=text.length, wanted=[0])


def many_tokens(text: Text) -> Step:
    """Half of it verified, half of it drafted, every answer wanted."""
    half = WIDE // 2
    trunk = causal_step("verify", [5] * half, start=text.length, wanted=range(half))
    start = text.length + half
    group = Group([text.mask_token_id] * half, [True] * half, start, start - 1, range(half))
    return group_step("verify", [group], form=PUBLISHED_FORM, trunk=trunk)


SAMPLED = {"temperature": 0.7, "top_p": 0.95}
KINDS: tuple[tuple[str, Callable[[Text], Step], dict[str, Any], int], ...] = (
    ("ar", one_token, {}, 1),
    ("ar, sampled", one_token, SAMPLED, 1),
    ("ar, uneven", one_token, {}, 16),
    (f"{WIDE} tokens", many_tokens, {}, 1),
    (f"{WIDE} tokens, uneven", many_tokens, {}, 16),
)
"""Name, step, law, and how many different lengths there are: uneven ones need a mask."""


def decode_speed(setting: Setting, record: Record, *, bandwidth: float) -> None:
    """Steps of 1 and 32 tokens at batch 1 and 32."""
    config = (
        NemotronLabsDiffusionConfig(**SMALL)
        if setting.is_small
        else NemotronLabsDiffusionConfig.preset("8b")
    )
    model = random_model(config, setting, torch.bfloat16)
    length, num = setting.pick(1024, 48), setting.pick(24, 3)
    table = model.encoder.embed_tokens.weight.numel()
    weight_bytes = 2 * (sum(weight.numel() for weight in model.parameters()) - table)
    record.figures["shape"] = {
        "parameters": weight_bytes // 2 + table,
        "weights_read_bytes": weight_bytes,
        "context": length,
        "dtype": "bfloat16",
    }
    for num_rows in setting.pick((1, 32), (1, 4)):
        bench = Bench(model, num_rows=num_rows, length=length, setting=setting)
        of_kinds: dict[str, Any] = {}
        for kind, make, law, num_lengths in KINDS:
            if num_rows == 1 and num_lengths > 1:
                continue  # one row is always even
            what = f"batch {num_rows}, {kind}"
            if not record.has_time(setting, what):
                continue
            grows = make is one_token
            options: dict[str, Any] = {"law": law, "grows": grows, "num_lengths": num_lengths}
            bench.step_s(make, num=3, **options)
            times = bench.step_s(make, num=num, **options)
            seconds = statistics.median(times)
            cells = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            moved = weight_bytes + 2 * cells * num_rows * length
            found = {
                "step_ms": 1e3 * seconds,
                "least_ms": 1e3 * min(times),
                "moved_bytes": moved,
                "share_of_copy_bandwidth": moved / seconds / bandwidth,
            }
            if make is one_token:
                found["tokens_per_second"] = num_rows / seconds
            elif "ar" in of_kinds:
                found["over_one_token"] = 1e3 * seconds / of_kinds["ar"]["step_ms"]
            if setting.device.type == "cuda":
                found |= _on_device(bench, make, law, num_lengths) | {
                    "floor_ms": 1e3 * moved / bandwidth
                }
            of_kinds[kind] = found
        record.figures[f"batch {num_rows}"] = of_kinds
        record.check(f"batch {num_rows}: every step is finite", bool(of_kinds))
        if num_rows == 1 and setting.device.type == "cuda":
            record.figures["new lengths"] = new_lengths(bench)


def _on_device(
    bench: Bench, make: Callable[[Text], Step], law: dict[str, Any], num_lengths: int
) -> dict[str, Any]:
    """Figures that only a GPU has; what cannot be had says why."""
    found: dict[str, Any] = {}
    try:
        found |= bench.busy(make, law, num_lengths)
    except (RuntimeError, AttributeError) as error:
        found["busy_ms"] = f"not measured: {error}"
    try:
        found["graph_ms"] = 1e3 * bench.graph_s(make, num_lengths)
    except RuntimeError as error:
        found["graph_ms"] = f"not measured: {error}"
    return found


def new_lengths(bench: Bench) -> dict[str, Any]:
    """Whether attention is slow at a length that it has not seen: some kernels are planned anew."""
    found: dict[str, Any] = {}
    for name, is_enabled in (("as torch picks", True), ("without cuDNN", False)):
        was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(was_enabled and is_enabled)
        bench.length += 40
        first, again = (bench.step_s(one_token, num=16, law={}, grows=True) for _ in range(2))
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
        bench.length -= 40
        found[name] = {
            "first_ms": 1e3 * statistics.median(first),
            "again_ms": 1e3 * statistics.median(again),
        }
    return found


def train_speed(setting: Setting, record: Record, *, rate: float) -> None:
    """One joint step of the largest shape that fits, float32 weights, products in bfloat16."""
    name, config = "small", NemotronLabsDiffusionConfig(**SMALL)
    if not setting.is_small:
        free_bytes = torch.cuda.mem_get_info(setting.device)[0]
        for preset in ("8b", "3b"):
            bigger = NemotronLabsDiffusionConfig.preset(preset)
            with torch.device("meta"):
                size = sum(w.numel() for w in NemotronLabsDiffusionModel(bigger).parameters())
            if TRAINED_BYTES * size < 0.7 * free_bytes:
                name, config = preset, bigger
                break
            record.left_out.append(f"a training step of {preset}: {free_bytes / 2**30:.0f} GiB")
    model = random_model(config, setting, torch.float32).train()
    optimizer = make_optimizer(
        model, OptimizerPart(name="adamw", learning_rate=1e-4), has_fast_bf16=True
    )
    options = Namespace(
        sequence_length=setting.pick(2048, 64),
        rows=setting.pick(2, 1),
        documents_per_row=2,
        vocab_size=config.vocab_size,
        block_length=setting.pick(32, 8),
    )
    losses: list[float] = []
    times: list[float] = []
    flops = 0.0
    for number in range(4):
        if number > 1 and not record.has_time(setting, f"training steps from {number}"):
            break
        batch = make_batch(options, number)
        flops = model_flops(config, batch)
        counts, batch = count_targets(batch), batch.to(setting.device)
        setting.wait()
        started_s = time.perf_counter()
        with torch.autocast(setting.device.type, torch.bfloat16):
            sums = loss_sums(model, batch, checkpointing="selective")
        loss = sums.total(counts, diffusion_weight=0.3)
        loss.backward()
        optimizer.step(1.0)
        setting.wait()
        times.append(time.perf_counter() - started_s)
        losses.append(float(loss.detach()))
    seconds = statistics.median(times[1:])
    assumed = record.figures["ceilings"]["assumed_peak_flops"]
    record.figures["training"] = {
        "shape": name,
        "rows": options.rows,
        "sequence_length": options.sequence_length,
        "first_step_s": times[0],
        "step_s": seconds,
        "tokens_per_second": options.rows * options.sequence_length / seconds,
        "model_flops": flops,
        "mfu_of_measured_product": flops / seconds / rate,
        "mfu_of_assumed_peak": None if assumed is None else flops / seconds / assumed,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "losses": losses,
    }
    is_finite = all(loss == loss and abs(loss) < 1e6 for loss in losses)
    record.check("losses of the training step are finite", is_finite, losses=losses)


def model_flops(config: NemotronLabsDiffusionConfig, batch: Any) -> float:
    """Of one step; the formula is in `bench_train.py`."""
    rows, noise = batch.rows, batch.noise
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * heads + 2 * kv_heads) + 3 * hidden * config.intermediate_size
    targets = int(is_ar_target(rows).sum())
    targets += int((is_diffusion_target(rows, noise) & noise.is_masked).sum())
    pairs = int(dual_stream_mask(rows).sum())
    layers = config.num_hidden_layers
    return float(
        6 * layers * layer * 2 * rows.clean_ids.numel()
        + 6 * hidden * config.vocab_size * targets
        + 12 * layers * heads * pairs
    )


def speed(setting: Setting, record: Record) -> None:
    """Ceilings, decoding, training."""
    bandwidth, rate = ceilings(setting, record)
    decode_speed(setting, record, bandwidth=bandwidth)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    if record.has_time(setting, "a joint training step"):
        train_speed(setting, record, rate=rate)
