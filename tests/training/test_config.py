"""Every refusal of a training config: one line that names the key, the value, what is allowed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.fake_stream import write_data
from tests.training.tiny_run import MODEL, STAGE
from trimode.errors import ConfigError
from trimode.training.checkpoints import CheckpointInfo, RunState
from trimode.training.config import (
    EvaluationPart,
    ExportPart,
    ModelPart,
    OptimizerPart,
    SchedulePart,
    TrainConfig,
)
from trimode.training.config_checks import check_against_data, data_folder, open_heldout
from trimode.training.parallel_config import ParallelPart
from trimode.training.resume import check_resumable
from trimode.training.shards import TokenShards
from trimode.training.trainer import _make_model, train

CONFIG = TrainConfig(data="data", output_dir="run", stages=(STAGE,), model=MODEL)
PARTS = {
    "model": MODEL,
    "stage": STAGE,
    "optimizer": OptimizerPart(),
    "schedule": SchedulePart(),
    "evaluation": EvaluationPart(),
    "export": ExportPart(),
    "parallel": ParallelPart(),
    "run": CONFIG,
}


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        *(
            ("model", {name: 0}, f"{name} is 0, but must be positive")
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "block_size",
            )
        ),
        ("model", {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ("model", {"head_dim": 15}, "head_dim is 15, but must be even"),
        ("model", {"block_size": 1}, "block_size is 1, but must be at least 2"),
        ("model", {"initializer_range": -1.0}, "initializer_range is -1.0"),
        ("model", {"init": "x"}, "beside init 'x', whose own shape"),
        *(
            ("stage", {name: 0}, f"{name} is 0, but must be positive")
            for name in ("tokens", "sequence_length", "batch_tokens", "micro_batch_sequences")
        ),
        ("stage", {"diffusion_weight": -0.1}, "diffusion_weight is -0.1"),
        ("stage", {"draft_share": 1.1}, "draft_share is 1.1, but must lie between 0 and 1"),
        ("stage", {"draft_share": -0.1}, "draft_share is -0.1"),
        ("stage", {"diffusion_ramp": 2.0}, "diffusion_ramp is 2.0"),
        ("stage", {"late_half_life": 0.0}, "late_half_life is 0.0, but must be positive or null"),
        ("stage", {"infill_share": 2.0}, "infill_share is 2.0, but must lie between 0 and 1"),
        (
            "stage",
            {"infill_share": 0.5, "infill_window": 33},
            r"infill_window is 33, but must have from 2 to sequence_length \(32\)",
        ),
        (
            "stage",
            {"infill_share": 0.5, "infill_window": 32, "is_complementary": True},
            "infill_share is 0.5 beside is_complementary",
        ),
        ("stage", {"block_lengths": ()}, "block_lengths is empty"),
        ("stage", {"block_lengths": (1,)}, "block_lengths holds 1"),
        ("stage", {"block_lengths": (33,)}, r"block_lengths holds 33.* sequence_length \(32\)"),
        ("stage", {"batch_tokens": 100}, "batch_tokens is 100, but must be a multiple"),
        ("stage", {"micro_batch_sequences": 3}, "micro_batch_sequences is 3, but must divide"),
        (
            "stage",
            {"is_complementary": True, "batch_tokens": 96, "micro_batch_sequences": 1},
            "3 sequences, which must be even",
        ),
        ("optimizer", {"learning_rate": 0.0}, "learning_rate is 0.0, but must be positive"),
        ("optimizer", {"embedding_learning_rate": -1.0}, "embedding_learning_rate is -1.0"),
        ("optimizer", {"adam_betas": (0.9, 1.0)}, "adam_betas holds 1.0"),
        ("optimizer", {"muon_momentum": 1.0}, "muon_momentum is 1.0"),
        ("optimizer", {"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ("optimizer", {"weight_decay": -1.0}, "weight_decay is -1.0"),
        ("optimizer", {"adam_eps": -1.0}, "adam_eps is -1.0"),
        ("schedule", {"warmup_share": 1.5}, "warmup_share is 1.5"),
        ("schedule", {"min_ratio": -0.1}, "min_ratio is -0.1"),
        ("schedule", {"warmup_share": 0.6, "decay_share": 0.6}, "warmup_share \\+ decay_share is"),
        ("evaluation", {"tokens": 0}, "tokens is 0"),
        ("evaluation", {"every_steps": -1}, "every_steps is -1"),
        ("export", {"max_shard_size": "lots"}, "max_shard_size is 'lots', but must be like 5GB"),
        ("parallel", {"tensor_parallel": 0}, "tensor_parallel is 0, but must be positive"),
        ("run", {"stages": ()}, "stages is empty"),
        ("run", {"stages": (STAGE, STAGE)}, "names must be different"),
        ("run", {"seed": -1}, "seed is -1"),
        ("run", {"seed": 10**24}, "seed is 1000000000000000000000000"),
        ("run", {"log_every_steps": 0}, "log_every_steps is 0"),
        ("run", {"max_seconds": -5.0}, "max_seconds is -5.0"),
        ("run", {"checkpoint_every_s": -1.0}, "checkpoint_every_s is -1.0"),
        ("run", {"stages": (replace(STAGE, sequence_length=64, batch_tokens=128),)}, None),
        (
            "run",
            {"model": replace(MODEL, max_position_embeddings=16)},
            r"sequence_length is 32, .*max_position_embeddings \(16\)",
        ),
        ("run", {"model": replace(MODEL, block_size=64)}, "model.block_size is 64"),
    ],
)
def test_refusals(part: str, changes: dict[str, Any], message: str | None) -> None:
    """A run of hours on a config that means something else, or fails at its end."""
    if message is None:
        assert replace(PARTS[part], **changes)
        return
    with pytest.raises(ConfigError, match=message):
        replace(PARTS[part], **changes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", sorted(PARTS))
def test_numbers_that_are_not_finite(part: str, value: float) -> None:
    """NaN, which passes every comparison, and infinity, which fails at the first step."""
    names = [f.name for f in fields(PARTS[part]) if f.type in ("float", "float | None")]
    for name in names:
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            replace(PARTS[part], **{name: value})


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (127, 1), (128, 1), (129, 2)])
def test_steps_are_rounded_up(tokens: int, steps: int) -> None:
    """Tokens of a stage silently not trained on."""
    config = replace(CONFIG, stages=(replace(STAGE, tokens=tokens), replace(STAGE, name="two")))
    assert (config.stages[0].num_steps, config.total_steps) == (steps, steps + 3)
    assert config.total_tokens == (steps + 3) * 128


class TestAgainstData:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write_data(tmp_path / "data")

    def edit(self, folder: Path, **changes: Any) -> TokenShards:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return TokenShards.open(folder, "train")

    @pytest.mark.parametrize("name", ["mask_token_id", "eos_token_id", "bos_token_id"])
    def test_special_ids(self, folder: Path, name: str) -> None:
        """An id outside the vocabulary, found at the first batch that has it."""
        data = self.edit(folder, **{name: 64})
        with pytest.raises(ConfigError, match=f"{name} of the data .* is 64"):
            check_against_data(CONFIG, data)

    def test_mask_that_is_eos(self, folder: Path) -> None:
        """A model that learns that text ends at every mask."""
        data = self.edit(folder, mask_token_id=1)
        with pytest.raises(ConfigError, match="which is its BOS or EOS too"):
            check_against_data(CONFIG, data)

    def test_too_little_text(self, folder: Path) -> None:
        """A row that cannot be filled."""
        long = replace(STAGE, sequence_length=65536, batch_tokens=65536, micro_batch_sequences=1)
        config = replace(
            CONFIG, stages=(long,), model=replace(MODEL, max_position_embeddings=65536)
        )
        data = TokenShards.open(folder, "train")
        with pytest.raises(ConfigError, match="one row of sequence_length needs 65536"):
            check_against_data(config, data)
        with pytest.raises(ConfigError, match="one row of the last stage needs 65536"):
            open_heldout(replace(config, data=str(folder)), _make_model(CONFIG, data))

    def test_before_the_first_step(self, folder: Path, tmp_path: Path) -> None:
        """A held-out split that fails the run when all steps are done."""
        (folder / "held_out-00000.bin").unlink()
        config = replace(CONFIG, data=str(folder), output_dir=str(tmp_path / "run"))
        with pytest.raises(ConfigError, match="held_out-00000.bin is missing"):
            train(config)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("device", ["meta", "mps", "gpu", "cuda:99"])
    def test_devices(self, folder: Path, device: str, tmp_path: Path) -> None:
        """Errors of torch that do not say what is allowed."""
        config = replace(CONFIG, data=str(folder), output_dir=str(tmp_path / "x"), device=device)
        with pytest.raises(ConfigError, match=f"device is '{device}'"):
            train(config)

    def test_folders(self, folder: Path, tmp_path: Path) -> None:
        """Tracebacks for a missing data folder, or a file where the output should go."""
        with pytest.raises(ConfigError, match="data folder 'nowhere' does not exist"):
            data_folder(replace(CONFIG, data="nowhere"))
        (tmp_path / "file").write_text("")
        config = replace(CONFIG, data=str(folder), output_dir=str(tmp_path / "file"))
        with pytest.raises(ConfigError, match="output_dir .*file.* cannot be used"):
            train(replace(config, device="cpu"))


def test_a_config_resumes_itself(tmp_path: Path) -> None:
    """Tuples that come back as lists from JSON taken for a change; a key of every part compared."""
    saved = json.loads(json.dumps(asdict(CONFIG)))
    checkpoint = CheckpointInfo(tmp_path, RunState(step=1, tokens=128), saved, {}, {})
    check_resumable(checkpoint, CONFIG)
    free = (
        replace(CONFIG, output_dir="elsewhere"),
        replace(CONFIG, evaluation=EvaluationPart(tokens=5)),
        replace(CONFIG, export=ExportPart(dtype="fp16")),
        replace(CONFIG, parallel=ParallelPart(tensor_parallel=2)),
    )
    for config in free:
        check_resumable(checkpoint, config)
    refused = {
        "seed": replace(CONFIG, seed=5),
        "data": replace(CONFIG, data="other"),
        "model.hidden_size": replace(CONFIG, model=replace(MODEL, hidden_size=128)),
        "stages.0.ratio_per": replace(CONFIG, stages=(replace(STAGE, ratio_per="block"),)),
        "optimizer.adam_eps": replace(CONFIG, optimizer=OptimizerPart(adam_eps=1e-5)),
        "schedule.warmup_share": replace(CONFIG, schedule=SchedulePart(warmup_share=0.5)),
    }
    for key, config in refused.items():
        with pytest.raises(ConfigError, match=f"{key} was"):
            check_resumable(checkpoint, config)


def test_init_takes_no_shape() -> None:
    """Shape keys beside a checkpoint that are read and ignored."""
    assert ModelPart(init="x") == ModelPart(init="x")
    with pytest.raises(ConfigError, match="hidden_size is 8 beside init"):
        ModelPart(init="x", hidden_size=8)
