"""LoRA through PEFT: it learns and nothing else moves, both views see it, and the folder it leaves
is PEFT's and ours."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimode
from tests.training.fake_stream import write_data
from trimode.checkpoint.adapter import merge_lora, save_adapter
from trimode.checkpoint.io import load_model, load_tokenizer, save_checkpoint
from trimode.errors import CapacityError, CheckpointError, ConfigError
from trimode.model import NemotronLabsDiffusionConfig
from trimode.model.adapter import TARGETS, new_adapter
from trimode.model.modeling import NemotronLabsDiffusionModel
from trimode.training.adapter_config import DrafterPart, LoraPart
from trimode.training.config import (
    EvaluationPart,
    ExportPart,
    ModelPart,
    OptimizerPart,
    SchedulePart,
    StagePart,
    TrainConfig,
)
from trimode.training.evaluate import HeldOutReport
from trimode.training.trainer import TrainResult, train

STAGE = StagePart(
    name="sft",
    tokens=30 * 256,
    sequence_length=64,
    batch_tokens=256,
    micro_batch_sequences=4,
    block_lengths=(4,),
)
IDS = torch.arange(3, 33).reshape(2, 15) % 61 + 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of the test data's vocabulary, with a head large enough to work with."""
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    config = NemotronLabsDiffusionConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        block_size=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        mask_token_id=2,
    )
    save_checkpoint(NemotronLabsDiffusionModel(config), folder)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """30 steps on documents that count in a circle."""
    folder = tmp_path_factory.mktemp("run")
    return TrainConfig(
        data=str(write_data(folder / "data", period=7)),
        output_dir=str(folder / "run"),
        stages=(STAGE,),
        model=ModelPart(init=str(base)),
        lora=LoraPart(rank=8, alpha=32.0),
        optimizer=OptimizerPart(name="adamw", learning_rate=1e-2, weight_decay=0.0),
        schedule=SchedulePart(warmup_share=0.1, decay_share=0.5),
        evaluation=EvaluationPart(tokens=512, every_steps=0),
        precision="fp32",
        device="cpu",
        log_every_steps=1,
    )


@pytest.fixture(scope="module")
def learned(run: TrainConfig) -> tuple[TrainResult, list[dict[str, Any]]]:
    """The finished run, and its log; the base's weights are compared on the way."""
    seen: list[dict[str, Any]] = []
    models: list[dict[str, Tensor]] = []
    result = train(
        run,
        evaluate=lambda model, step: models.append(dict(model.state_dict())) or {},
        log=seen.append,
    )
    before = model_of(run).state_dict()
    after = {name.replace(".base_layer", ""): weight for name, weight in models[-1].items()}
    assert all(weight.equal(after[name]) for name, weight in before.items())
    return result, seen


def model_of(run: TrainConfig, dtype: torch.dtype = torch.float32) -> Any:
    assert run.model.init is not None
    return load_model(Path(run.model.init), device="cpu", dtype=dtype)


def test_it_learns(learned: tuple[TrainResult, list[dict[str, Any]]]) -> None:
    """Factors without gradients, or a loss of one view alone."""
    result, seen = learned
    steps = [record for record in seen if record["kind"] == "step"]
    assert steps[-1]["ar_loss"] < 0.5 * steps[0]["ar_loss"]
    assert steps[-1]["diffusion_loss"] < 0.8 * steps[0]["diffusion_loss"]
    assert isinstance(result.heldout, HeldOutReport)
    assert result.heldout.ar_loss < 0.5 * steps[0]["ar_loss"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of newer transformers
def test_the_folder_is_pefts_and_ours(
    run: TrainConfig, learned: tuple[TrainResult, list[dict[str, Any]]]
) -> None:
    """A scale, a layer or a transpose lost on the way to the file, or in merging."""
    folder = learned[0].final_dir
    assert folder == Path(run.output_dir) / "lora"
    ours = model_of(run, torch.float64)
    plain = ours(IDS).logits
    merge_lora(folder, model=ours)
    wrapped = peft.PeftModel.from_pretrained(model_of(run, torch.float64), str(folder))
    for pattern in ("causal", "bidirectional"):
        merged = ours(IDS, pattern=pattern).logits
        torch.testing.assert_close(merged, wrapped(IDS, pattern=pattern).logits)
    assert (ours(IDS).logits - plain).abs().max() > 1
    unloaded = wrapped.merge_and_unload()
    torch.testing.assert_close(unloaded(IDS).logits, ours(IDS).logits)


def test_merged_model_decodes_what_was_learned(
    run: TrainConfig, learned: tuple[TrainResult, list[dict[str, Any]]]
) -> None:
    """An adapter that only some tokens see: `linear` would part from `ar`."""
    options: dict[str, Any] = {"max_new_tokens": 21, "ignore_eos": True}
    prompt = [3 + i % 7 for i in range(9)]
    lm = trimode.load(run.model.init, lora=learned[0].final_dir)
    ar = lm.generate(prompt, mode="ar", **options)
    assert ar.token_ids == [3 + i % 7 for i in range(9, 30)]
    linear = lm.generate(prompt, mode="linear", **options)
    assert linear.token_ids == ar.token_ids
    assert linear.stats.tpf_decode > 1.3
    bare = trimode.load(run.model.init).generate(prompt, mode="ar", **options)
    assert bare.token_ids != ar.token_ids


class _StopAfter:
    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def tensors(result: TrainResult) -> dict[str, Tensor]:
    assert result.final_dir is not None
    return load_file(result.final_dir / "adapter_model.safetensors")


def test_resume_and_checkpointed_activations_give_the_same_bits(
    run: TrainConfig, tmp_path: Path
) -> None:
    """Factors drawn anew on resume, or without gradients where activations are made again."""
    run = replace(run, stages=(replace(STAGE, tokens=4 * 256),))
    straight = train(replace(run, output_dir=str(tmp_path / "straight")))
    stopped = replace(run, output_dir=str(tmp_path / "stopped"), activation_checkpointing=True)
    assert not train(stopped, log=_StopAfter(2)).is_finished
    resumed = train(stopped)
    assert resumed.heldout == straight.heldout
    assert tensors(resumed).keys() == tensors(straight).keys()
    for name, weight in tensors(straight).items():
        assert weight.equal(tensors(resumed)[name]), name


def test_changed_base_is_refused(run: TrainConfig, tmp_path: Path) -> None:
    """Factors that go on for a model which is no longer there."""
    folder = tmp_path / "base"
    save_checkpoint(model_of(run), folder)
    run = replace(run, model=ModelPart(init=str(folder)), output_dir=str(tmp_path / "run"))
    train(run, log=_StopAfter(2))
    model = model_of(run)
    with torch.no_grad():
        model.encoder.norm.weight[0] += 1e-3
    save_checkpoint(model, folder, tokenizer=load_tokenizer(folder))
    with pytest.raises(ConfigError, match=r"the weights of model\.init .* are not those"):
        train(run)


def test_export_dtype_targets_and_tokenizer(run: TrainConfig, tmp_path: Path) -> None:
    """What was asked of the folder, ignored."""
    data = tmp_path / "data"
    write_data(data)
    (data / "tokenizer").mkdir()
    (data / "tokenizer" / "tokenizer_config.json").write_text("{}")
    result = train(
        replace(
            run,
            data=str(data),
            output_dir=str(tmp_path / "run"),
            stages=(replace(STAGE, tokens=256),),
            lora=LoraPart(rank=4, alpha=6.0, targets=("v_proj", "up_proj")),
            export=ExportPart(dtype="fp16"),
        )
    )
    assert result.final_dir is not None
    stored = tensors(result)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {name.split(".")[-3] for name in stored} == {"v_proj", "up_proj"}
    settings = json.loads((result.final_dir / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 6.0)
    assert settings["base_model_name_or_path"] == run.model.init
    assert (result.final_dir / "tokenizer_config.json").read_text() == "{}"
    assert not (result.final_dir / "README.md").exists()


def test_full_disk_keeps_the_folder_before(
    run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that was there, lost to one that could not be written."""
    run = replace(run, output_dir=str(tmp_path / "run"), stages=(replace(STAGE, tokens=256),))
    before = tensors(train(run))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trimode.training.lora.save_tensors", full)
    with pytest.raises(CapacityError, match="the disk is full; what was there is kept"):
        train(replace(run, seed=1), is_resumed=False)
    left = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    assert all(weight.equal(left[name]) for name, weight in before.items())
    monkeypatch.undo()
    other = tensors(train(replace(run, seed=1), is_resumed=False))
    assert not any(weight.equal(other[name]) for name, weight in before.items())


def test_merging_is_exact_in_a_narrow_dtype(
    run: TrainConfig, learned: tuple[TrainResult, list[dict[str, Any]]]
) -> None:
    """Factors or their product rounded before the sum is."""
    assert learned[0].final_dir is not None
    wide, narrow = model_of(run, torch.float64), model_of(run, torch.bfloat16)
    start = {name: weight.double() for name, weight in narrow.state_dict().items()}
    before = {name: weight.clone() for name, weight in wide.state_dict().items()}
    for model in (wide, narrow):
        merge_lora(learned[0].final_dir, model=model)
    moved = 0
    for name, weight in wide.state_dict().items():
        exact = start[name] + (weight - before[name])
        is_off = narrow.state_dict()[name] != exact.bfloat16()  # at halves, float32 may tip over
        assert is_off.double().mean() < 1e-3, name
        moved += not weight.equal(before[name])
    assert moved == 2 * 7


def test_an_adapter_has_one_use(
    run: TrainConfig, learned: tuple[TrainResult, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """A drafter merged into the AR view, which it must never colour."""
    lora = learned[0].final_dir
    with pytest.raises(CheckpointError, match="is a lora, and was given as drafter"):
        trimode.load(run.model.init, drafter=lora)
    adapter = new_adapter(model_of(run).encoder.layers, rank=2, alpha=4.0, targets=TARGETS, seed=0)
    save_adapter(adapter, tmp_path / "mine", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="is a drafter, and was given as lora"):
        trimode.load(run.model.init, lora=tmp_path / "mine")
    assert trimode.load(run.model.init, drafter=tmp_path / "mine").adapter is not None
    save_file(load_file(tmp_path / "mine" / "adapter_model.safetensors"), tmp_path / "plain")
    published = tmp_path / "linear_spec_lora"
    (tmp_path / "mine").rename(published)
    (tmp_path / "plain").rename(published / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is a drafter, and was given as lora"):
        trimode.load(run.model.init, lora=published)


Change = Callable[[TrainConfig], TrainConfig]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, model=ModelPart()), "a LoRA run needs the model that it is for"),
        (lambda c: replace(c, optimizer=OptimizerPart()), "optimizer.name is 'muon'"),
        (
            lambda c: replace(c, optimizer=replace(c.optimizer, muon_momentum=0.5)),
            "muon_momentum is 0.5, but means nothing to adamw",
        ),
        (lambda c: replace(c, drafter=DrafterPart()), "lora and drafter are both there"),
        (lambda c: replace(c, lora=LoraPart(rank=0)), "rank is 0"),
        (lambda c: replace(c, lora=LoraPart(targets=())), "targets is empty"),
        (
            lambda c: replace(c, lora=LoraPart(targets=("lm_head",))),
            "targets holds 'lm_head', but allowed are q_proj",
        ),
        (
            lambda c: replace(c, export=ExportPart(max_shard_size="1MB")),
            "export.max_shard_size is '1MB', but an adapter is one file",
        ),
        (
            lambda c: replace(c, optimizer=replace(c.optimizer, embedding_learning_rate=1.0)),
            "embedding_learning_rate is 1.0, but a LoRA run trains no embedding",
        ),
    ],
)
def test_config_errors(run: TrainConfig, change: Change, message: str) -> None:
    """A run of hours that ignores what it was asked."""
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as caught:
        change(run)
    assert "\n" not in str(caught.value)
