"""What a training run is: `TrainConfig` and its parts, with every check that needs no data.

Reading it from YAML is the business of `trimode.cli.config_file`; the defaults live here, once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from trimode.training.adapter_config import (
    DrafterPart,
    LoraPart,
    check_drafter_run,
    check_lora_run,
)
from trimode.training.parallel_config import ParallelPart
from trimode.training.part_checks import changed_fields, check, check_finite

_MUON_MOMENTUM = 0.95


@dataclass(frozen=True, slots=True)
class ModelPart:
    """Either `init` (a checkpoint folder to go on from) or the shape of a new network.

    The vocabulary and its special ids come from the data's tokenizer.
    """

    init: str | None = None
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, int | float | str] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    tie_word_embeddings: bool = False
    use_qk_norm: bool = False
    initializer_range: float = 0.02
    block_size: int = 8

    def __post_init__(self) -> None:
        check_finite(self)
        if self.init is not None:
            for name, value in changed_fields(self, beside={"init"}).items():
                message = f"{name} is {value!r} beside init {self.init!r}, whose own shape is used"
                check(False, f"{message}: remove it")
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "block_size",
        ):
            value = getattr(self, name)
            check(value > 0, f"{name} is {value}, but must be positive")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        check(
            heads % kv_heads == 0,
            f"num_attention_heads is {heads}, but must be a multiple of num_key_value_heads "
            f"({kv_heads})",
        )
        check(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}, but must be even")
        check(self.block_size >= 2, f"block_size is {self.block_size}, but must be at least 2")
        check(
            self.initializer_range > 0,
            f"initializer_range is {self.initializer_range}, but must be positive",
        )


@dataclass(frozen=True, slots=True)
class StagePart:
    """A stretch of training with one objective and one batch shape.

    Args:
        name: Shown in the logs.
        tokens: Tokens of text the stage reads (clean tokens; the noisy copy is not counted).
        diffusion_weight: alpha of `L_AR + alpha * L_diff`; 0 trains the AR view alone.
        sequence_length: S, tokens of text in one row.
        batch_tokens: Tokens of text per optimiser step.
        micro_batch_sequences: Rows per forward; the rest of the batch is accumulated.
        block_lengths: K, drawn for each row with equal chance.
        block_schedule: `mixed`: as said; `curriculum`: the stage is cut into equal parts, one for
            each of `block_lengths` in their order.
        draft_share: Share of blocks that show the pattern of decoding: one clean token, K - 1
            masks.
        infill_share: Share of rows whose blocks are windows with one gap to fill, 1 token to half
            of the window, the text behind it in sight (`corruption.gaps`).
        infill_window: Tokens of such a window.
        ratio_per: Whether each `sequence` has a mask ratio of its own, or each `block`.
        late_half_life: Late-heavy masking (`corruption.late_heavy`), in tokens; null is off.
        is_complementary: Every row twice, masked in complementary places.
        diffusion_ramp: Share of the stage over which `diffusion_weight` rises from 0; 0 is off.
        loss_average: `global` over all targets of a step, or per `sequence` first.
    """

    name: str
    tokens: int
    diffusion_weight: float = 0.3
    sequence_length: int = 512
    batch_tokens: int = 16384
    micro_batch_sequences: int = 8
    block_lengths: tuple[int, ...] = (8,)
    block_schedule: Literal["mixed", "curriculum"] = "mixed"
    draft_share: float = 0.0
    infill_share: float = 0.0
    infill_window: int = 64
    ratio_per: Literal["sequence", "block"] = "sequence"
    late_half_life: float | None = None
    is_complementary: bool = False
    diffusion_ramp: float = 0.0
    loss_average: Literal["global", "sequence"] = "global"

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("tokens", "sequence_length", "batch_tokens", "micro_batch_sequences"):
            value = getattr(self, name)
            check(value > 0, f"{name} is {value}, but must be positive")
        check(
            self.diffusion_weight >= 0,
            f"diffusion_weight is {self.diffusion_weight}, but must not be negative",
        )
        for name in ("draft_share", "infill_share", "diffusion_ramp"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"{name} is {value}, but must lie between 0 and 1")
        check(
            self.late_half_life is None or self.late_half_life > 0,
            f"late_half_life is {self.late_half_life}, but must be positive or null",
        )
        check(bool(self.block_lengths), "block_lengths is empty, but must name at least one")
        for block_length in self.block_lengths:
            check(
                2 <= block_length <= self.sequence_length,
                f"block_lengths holds {block_length}, but a block must have from 2 to "
                f"sequence_length ({self.sequence_length}) tokens",
            )
        check(
            2 <= self.infill_window <= self.sequence_length or not self.infill_share,
            f"infill_window is {self.infill_window}, but must have from 2 to sequence_length "
            f"({self.sequence_length}) tokens",
        )
        check(
            not (self.is_complementary and self.infill_share),
            f"infill_share is {self.infill_share} beside is_complementary, but a gap that is masked"
            " whole has no complement: leave one out",
        )
        rows, rest = divmod(self.batch_tokens, self.sequence_length)
        check(
            rest == 0,
            f"batch_tokens is {self.batch_tokens}, but must be a multiple of sequence_length "
            f"({self.sequence_length})",
        )
        check(
            not self.is_complementary or rows % 2 == 0,
            f"is_complementary is true, but a batch has {rows} sequences, which must be even",
        )
        check(
            rows % self.micro_batch_sequences == 0,
            f"micro_batch_sequences is {self.micro_batch_sequences}, but must divide the {rows} "
            "sequences of a batch (batch_tokens / sequence_length)",
        )

    @property
    def batch_sequences(self) -> int:
        """Rows per optimiser step."""
        return self.batch_tokens // self.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimiser steps, rounded up."""
        return -(-self.tokens // self.batch_tokens)


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """Muon for the hidden matrices (or AdamW for everything) and AdamW for all other parameters."""

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3
    embedding_learning_rate: float | None = None
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    muon_momentum: float = _MUON_MOMENTUM
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("weight_decay", "adam_eps"):
            value = getattr(self, name)
            check(value >= 0, f"{name} is {value}, but must not be negative")
        check(
            self.learning_rate > 0,
            f"learning_rate is {self.learning_rate}, but must be positive",
        )
        rate = self.embedding_learning_rate
        check(
            rate is None or rate > 0,
            f"embedding_learning_rate is {rate}, but must be positive or null",
        )
        for beta in self.adam_betas:
            check(0 <= beta < 1, f"adam_betas holds {beta}, but must lie in [0, 1)")
        check(
            0 <= self.muon_momentum < 1,
            f"muon_momentum is {self.muon_momentum}, but must lie in [0, 1)",
        )
        check(
            self.name == "muon" or self.muon_momentum == _MUON_MOMENTUM,
            f"muon_momentum is {self.muon_momentum}, but means nothing to adamw: remove it",
        )
        check(
            self.max_grad_norm > 0,
            f"max_grad_norm is {self.max_grad_norm}, but must be positive",
        )


@dataclass(frozen=True, slots=True)
class SchedulePart:
    """Warm-up, stable, decay over the tokens of the whole run (all stages together)."""

    warmup_share: float = 0.01
    decay_share: float = 0.3
    min_ratio: float = 0.05

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("warmup_share", "decay_share", "min_ratio"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"{name} is {value}, but must lie between 0 and 1")
        total = self.warmup_share + self.decay_share
        check(total <= 1, f"warmup_share + decay_share is {total}, but must be at most 1")


@dataclass(frozen=True, slots=True)
class EvaluationPart:
    """Losses and draft accuracy on the held-out split."""

    split: Literal["train", "held_out"] = "held_out"
    tokens: int = 65536
    every_steps: int = 250

    def __post_init__(self) -> None:
        check(self.tokens > 0, f"tokens is {self.tokens}, but must be positive")
        check(
            self.every_steps >= 0,
            f"every_steps is {self.every_steps}, but must be 0 (only at the end) or more",
        )


@dataclass(frozen=True, slots=True)
class ExportPart:
    """What is written at the end: `output_dir/final`, a Hugging Face folder; of a LoRA or a drafter
    the adapter's folder, which has no shards."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        check(
            re.fullmatch(r"[1-9]\d*(?:\.\d+)?[KMG]i?B", self.max_shard_size) is not None,
            f"max_shard_size is {self.max_shard_size!r}, but must be like 5GB or 500MB",
        )


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run.

    Args:
        data: Folder written by `trimode prepare`.
        output_dir: Where checkpoints, `log.jsonl`, the resolved config and the result go.
        stages: Trained one after the other.
        lora: Train a LoRA for both views on the frozen `model.init`; null trains all weights.
        drafter: Train a drafter on the frozen `model.init` and nothing else; null trains the model.
        parallel: How ranks started by `torchrun` share the work; means nothing to a single one.
        precision: `auto` is bf16 where it is fast (CUDA, CPUs with bf16 units), else fp32.
        compile: Compile the encoder with torch.compile.
        activation_checkpointing: `selective` makes again in the backward what takes no matrix
            product; true keeps each layer's input alone and runs the layer again.
        device: `auto` is CUDA if there is one.
        max_seconds: Stop cleanly, with a checkpoint, after this long; null is no limit.
        checkpoint_every_s: Seconds between checkpoints, which are written at logged steps.
    """

    data: str
    output_dir: str
    stages: tuple[StagePart, ...]
    model: ModelPart = field(default_factory=ModelPart)
    lora: LoraPart | None = None
    drafter: DrafterPart | None = None
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    schedule: SchedulePart = field(default_factory=SchedulePart)
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)
    export: ExportPart = field(default_factory=ExportPart)
    parallel: ParallelPart = field(default_factory=ParallelPart)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    compile: bool = False
    activation_checkpointing: bool | Literal["selective"] = False
    seed: int = 0
    max_seconds: float | None = None
    checkpoint_every_s: float = 600.0
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        check(bool(self.stages), "stages is empty, but must hold at least one stage")
        names = [stage.name for stage in self.stages]
        check(
            len(set(names)) == len(names), f"stages are named {names}, but names must be different"
        )
        check_finite(self)
        check(0 <= self.seed < 2**63, f"seed is {self.seed}, but must lie in 0 .. 2^63 - 1")
        check(
            self.max_seconds is None or self.max_seconds >= 0,
            f"max_seconds is {self.max_seconds}, but must not be negative",
        )
        check(
            self.checkpoint_every_s >= 0,
            f"checkpoint_every_s is {self.checkpoint_every_s}, but must not be negative",
        )
        check(
            self.log_every_steps > 0,
            f"log_every_steps is {self.log_every_steps}, but must be positive",
        )
        if self.lora is not None:
            check_lora_run(self)
        if self.drafter is not None:
            check_drafter_run(self)
        if self.model.init is None:
            longest = max(stage.sequence_length for stage in self.stages)
            context = self.model.max_position_embeddings
            check(
                longest <= context,
                f"sequence_length is {longest}, but must be at most model.max_position_embeddings "
                f"({context})",
            )
            last, block_size = self.stages[-1].sequence_length, self.model.block_size
            check(
                block_size <= last,
                f"model.block_size is {block_size}, but must be at most the last stage's "
                f"sequence_length ({last})",
            )

    @property
    def total_tokens(self) -> int:
        """Tokens of all stages, each rounded up to whole steps."""
        return sum(stage.num_steps * stage.batch_tokens for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)
