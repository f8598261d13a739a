"""What a training run is: `TrainConfig` and its parts, with every check that needs no data.

Reading it from YAML is the business of `trimode.cli.config_file`; the defaults live here, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trimode.errors import ConfigError


def _check(is_good: bool, message: str) -> None:
    if not is_good:
        raise ConfigError(message)


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
    rope_parameters: dict[str, float | str] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    tie_word_embeddings: bool = False
    use_qk_norm: bool = False
    initializer_range: float = 0.02
    block_size: int = 8

    def __post_init__(self) -> None:
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
            _check(value > 0, f"{name} is {value}, but must be positive")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _check(
            heads % kv_heads == 0,
            f"num_attention_heads is {heads}, but must be a multiple of num_key_value_heads "
            f"({kv_heads})",
        )
        _check(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}, but must be even")


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
        draft_share: Share of blocks that show the pattern of decoding: one clean token, K - 1
            masks.
    """

    name: str
    tokens: int
    diffusion_weight: float = 0.3
    sequence_length: int = 512
    batch_tokens: int = 16384
    micro_batch_sequences: int = 8
    block_lengths: tuple[int, ...] = (8,)
    draft_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence_length", "batch_tokens", "micro_batch_sequences"):
            value = getattr(self, name)
            _check(value > 0, f"{name} is {value}, but must be positive")
        _check(
            self.diffusion_weight >= 0,
            f"diffusion_weight is {self.diffusion_weight}, but must not be negative",
        )
        _check(
            0 <= self.draft_share <= 1,
            f"draft_share is {self.draft_share}, but must lie between 0 and 1",
        )
        _check(bool(self.block_lengths), "block_lengths is empty, but must name at least one")
        for block_length in self.block_lengths:
            _check(
                2 <= block_length <= self.sequence_length,
                f"block_lengths holds {block_length}, but a block must have from 2 to "
                f"sequence_length ({self.sequence_length}) tokens",
            )
        rows, rest = divmod(self.batch_tokens, self.sequence_length)
        _check(
            rest == 0,
            f"batch_tokens is {self.batch_tokens}, but must be a multiple of sequence_length "
            f"({self.sequence_length})",
        )
        _check(
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
    muon_momentum: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _check(
            self.learning_rate > 0,
            f"learning_rate is {self.learning_rate}, but must be positive",
        )
        rate = self.embedding_learning_rate
        _check(
            rate is None or rate > 0,
            f"embedding_learning_rate is {rate}, but must be positive or null",
        )
        for beta in self.adam_betas:
            _check(0 <= beta < 1, f"adam_betas holds {beta}, but must lie in [0, 1)")
        _check(
            0 <= self.muon_momentum < 1,
            f"muon_momentum is {self.muon_momentum}, but must lie in [0, 1)",
        )
        _check(
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
        for name in ("warmup_share", "decay_share", "min_ratio"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"{name} is {value}, but must lie between 0 and 1")
        total = self.warmup_share + self.decay_share
        _check(total <= 1, f"warmup_share + decay_share is {total}, but must be at most 1")


@dataclass(frozen=True, slots=True)
class EvaluationPart:
    """Losses and draft accuracy on the held-out split."""

    split: str = "held_out"
    tokens: int = 65536
    every_steps: int = 250

    def __post_init__(self) -> None:
        _check(self.tokens > 0, f"tokens is {self.tokens}, but must be positive")
        _check(
            self.every_steps >= 0,
            f"every_steps is {self.every_steps}, but must be 0 (only at the end) or more",
        )


@dataclass(frozen=True, slots=True)
class ExportPart:
    """The Hugging Face folder written at the end, `output_dir/final`."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    max_shard_size: str = "5GB"


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run.

    Args:
        data: Folder written by `trimode prepare`.
        output_dir: Where checkpoints, `log.jsonl`, the resolved config and `final/` go.
        stages: Trained one after the other.
        precision: `auto` is bf16 where it is fast (CUDA, CPUs with bf16 units), else fp32.
        compile: Compile the encoder with torch.compile.
        device: `auto` is CUDA if there is one.
        max_seconds: Stop cleanly, with a checkpoint, after this long; null is no limit.
        checkpoint_every_s: Seconds between checkpoints.
    """

    data: str
    output_dir: str
    stages: tuple[StagePart, ...]
    model: ModelPart = field(default_factory=ModelPart)
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    schedule: SchedulePart = field(default_factory=SchedulePart)
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)
    export: ExportPart = field(default_factory=ExportPart)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    compile: bool = False
    seed: int = 0
    max_seconds: float | None = None
    checkpoint_every_s: float = 600.0
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        _check(bool(self.stages), "stages is empty, but must hold at least one stage")
        names = [stage.name for stage in self.stages]
        _check(
            len(set(names)) == len(names), f"stages are named {names}, but names must be different"
        )
        _check(self.seed >= 0, f"seed is {self.seed}, but must not be negative")
        _check(
            self.log_every_steps > 0,
            f"log_every_steps is {self.log_every_steps}, but must be positive",
        )
        if self.model.init is None:
            longest = max(stage.sequence_length for stage in self.stages)
            context = self.model.max_position_embeddings
            _check(
                longest <= context,
                f"sequence_length is {longest}, but must be at most model.max_position_embeddings "
                f"({context})",
            )

    @property
    def total_tokens(self) -> int:
        """Tokens of all stages, each rounded up to whole steps."""
        return sum(stage.num_steps * stage.batch_tokens for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)


def check_against_data(config: TrainConfig, data: Any) -> None:
    """Refuse a run whose data cannot serve it.

    Args:
        config: The run.
        data: The training split (a `TokenShards`).

    Raises:
        ConfigError: A special id outside the vocabulary, or fewer tokens than one row.
    """
    for name in ("mask_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(data, name)
        if not 0 <= value < data.vocab_size:
            raise ConfigError(
                f"{name} of the data {config.data!r} is {value}, but must lie inside its "
                f"vocabulary of {data.vocab_size} tokens"
            )
    longest = max(stage.sequence_length for stage in config.stages)
    if data.num_tokens < longest:
        raise ConfigError(
            f"the data {config.data!r} has {data.num_tokens} tokens, but one row of "
            f"sequence_length needs {longest}"
        )


def data_folder(config: TrainConfig) -> Path:
    """The data folder, checked to exist.

    Raises:
        ConfigError: No such folder.
    """
    folder = Path(config.data)
    if not folder.is_dir():
        raise ConfigError(
            f"data folder {config.data!r} does not exist: write it with trimode prepare"
        )
    return folder
