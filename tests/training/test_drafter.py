"""Whole drafter runs: they learn, leave the AR view alone, resume to the last bit, and give a
folder that PEFT and `trimode.load` open."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trimode
from tests.training.fake_stream import write_data
from tests.training.tiny_run import MODEL
from trimode.checkpoint.adapter import load_adapter
from trimode.checkpoint.io import load_model, load_tokenizer, save_checkpoint
from trimode.errors import CheckpointError, ConfigError, TriModeError
from trimode.model import AdapterSwitch, DrafterAdapter
from trimode.model.adapter import TARGETS
from trimode.training.adapter_config import DrafterPart
from trimode.training.config import (
    EvaluationPart,
    ExportPart,
    ModelPart,
    OptimizerPart,
    SchedulePart,
    StagePart,
    TrainConfig,
)
from trimode.training.drafter import DrafterObjective, weights_checksum
from trimode.training.evaluate import DrafterReport
from trimode.training.trainer import TrainResult, train

STAGE = StagePart(
    name="ar",
    tokens=30 * 256,
    diffusion_weight=0.0,
    sequence_length=64,
    batch_tokens=256,
    micro_batch_sequences=4,
    block_lengths=(4,),
)
IDS = torch.arange(3, 33).reshape(2, 15)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The config of a finished run of the AR view alone, on documents that count in a circle; its
    diffusion view has learned nothing."""
    folder = tmp_path_factory.mktemp("base")
    config = TrainConfig(
        data=str(write_data(folder / "data", period=7)),
        output_dir=str(folder / "run"),
        stages=(STAGE,),
        model=MODEL,
        schedule=SchedulePart(warmup_share=0.1, decay_share=0.5),
        evaluation=EvaluationPart(tokens=512, every_steps=0),
        precision="fp32",
        device="cpu",
        log_every_steps=1,
    )
    train(config)
    return config


@pytest.fixture
def config(base: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Four steps of a drafter on `o_proj`."""
    return _drafter(base, tmp_path / "run", num_steps=4)


def _drafter(base: TrainConfig, output_dir: Path, *, num_steps: int) -> TrainConfig:
    tokens = num_steps * STAGE.batch_tokens
    return replace(
        base,
        output_dir=str(output_dir),
        model=ModelPart(init=base.output_dir + "/final"),
        stages=(replace(STAGE, name="drafter", tokens=tokens, diffusion_weight=0.3),),
        drafter=DrafterPart(rank=8, alpha=32.0),
        optimizer=OptimizerPart(name="adamw", learning_rate=1e-2, weight_decay=0.0),
    )


def _tensors(result: TrainResult) -> dict[str, Tensor]:
    assert result.final_dir is not None
    adapter = load_adapter(result.final_dir, model=_base_of(result))
    return dict(adapter.named_parameters())


def _base_of(result: TrainResult) -> Any:
    assert result.final_dir is not None
    init = json.loads((result.final_dir / "adapter_config.json").read_text())
    return load_model(Path(init["base_model_name_or_path"]), device="cpu", dtype=torch.float32)


@dataclass(frozen=True)
class Learned:
    """A finished drafter run: the base, the adapter, and what was reported."""

    base: Path
    lora: Path
    report: DrafterReport
    steps: list[dict[str, Any]]


@pytest.fixture(scope="module")
def learned(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """40 steps of a drafter with pairs on every layer; the base's weights compared on the way."""
    folder = Path(base.output_dir) / "final"
    before = load_model(folder, device="cpu", dtype=torch.float32).state_dict()
    config = _drafter(base, tmp_path_factory.mktemp("drafter") / "run", num_steps=40)
    seen: list[dict[str, Any]] = []
    models: list[dict[str, Tensor]] = []
    result = train(
        replace(config, drafter=DrafterPart(rank=8, alpha=32.0, targets=TARGETS)),
        evaluate=lambda model, step: models.append(dict(model.state_dict())) or {},
        log=seen.append,
    )
    assert all(weight.equal(models[-1][name]) for name, weight in before.items())
    assert result.final_dir == Path(config.output_dir) / "linear_spec_lora"
    assert isinstance(result.heldout, DrafterReport)
    steps = [record for record in seen if record["kind"] == "step"]
    return Learned(folder, result.final_dir, result.heldout, steps)


def test_learning_raises_acceptance(learned: Learned) -> None:
    """A loss that falls, but does not lead to accepted drafts."""
    before, after = learned.report.without_adapter, learned.report.with_adapter
    assert before.round_acceptance_length < 1.5
    assert after.round_acceptance_length > 2.5
    assert after.acceptance_length > before.acceptance_length + 1
    first, last = learned.steps[0], learned.steps[-1]
    for name in ("lk_loss", "ce_loss"):
        assert last[name] < 0.7 * first[name]
    assert last["acceptance_length"] > first["acceptance_length"] + 0.5


def test_ar_view_is_the_bases(learned: Learned) -> None:
    """An adapter that colours tokens it is off for, as one merged or left on would."""
    model = load_model(learned.base, device="cpu", dtype=torch.float32)
    adapter = load_adapter(learned.lora, model=model)
    is_on = torch.zeros(15, 1, dtype=torch.bool)
    plain = model(IDS).logits
    assert model(IDS, adapter=AdapterSwitch(adapter, is_on)).logits.equal(plain)
    is_on[7:] = True
    mixed = model(IDS, adapter=AdapterSwitch(adapter, is_on)).logits
    assert mixed[:, :7].equal(plain[:, :7])
    assert (mixed[:, 7:] - plain[:, 7:]).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of newer transformers
def test_peft_opens_the_folder(learned: Learned) -> None:
    """A folder that only we can read."""
    peft = pytest.importorskip("peft")
    model = load_model(learned.base, device="cpu", dtype=torch.float32)
    adapter = load_adapter(learned.lora, model=model)
    wanted = model(IDS, adapter=AdapterSwitch(adapter, None)).logits
    assert not wanted.equal(model(IDS).logits)
    wrapped = peft.PeftModel.from_pretrained(model, str(learned.lora))
    torch.testing.assert_close(wrapped(IDS).logits, wanted)


def test_decoding_takes_fewer_forwards_for_the_same_tokens(learned: Learned) -> None:
    """An acceptance that is only measured in training; a drafter that changes the text."""
    prompt = [3 + i % 7 for i in range(9)]
    options: dict[str, Any] = {"mode": "linear", "max_new_tokens": 16, "ignore_eos": True}
    plain = trimode.load(learned.base).generate(prompt, **options)
    fast = trimode.load(learned.base, drafter=learned.lora).generate(prompt, **options)
    assert fast.token_ids == plain.token_ids
    assert sum(fast.stats.forwards.values()) < 0.7 * sum(plain.stats.forwards.values())


class _StopAfter:
    """Sends this process a signal when a step has been logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_and_resumed_run_has_the_same_adapter_to_the_bit(
    config: TrainConfig, tmp_path: Path
) -> None:
    """Slots, noise, optimiser state or the best score lost on resume."""
    config = replace(config, evaluation=replace(config.evaluation, every_steps=1))
    straight = train(config)
    stopped_config = replace(config, output_dir=str(tmp_path / "stopped"))
    stopped = train(stopped_config, log=_StopAfter(2))
    assert not stopped.is_finished
    resumed = train(stopped_config)
    assert resumed.heldout == straight.heldout
    assert resumed.state.best_score == straight.state.best_score
    assert resumed.state.best_step == straight.state.best_step
    for name, weight in _tensors(straight).items():
        assert weight.equal(_tensors(resumed)[name]), name


def test_the_best_adapter_is_kept(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late, worse adapter written over the best one."""
    scores = iter([1.0, 1.1, 3.0, 2.0, 1.5])  # without the adapter, then after every step
    measure = DrafterObjective._measure

    def planned(self: DrafterObjective, adapter: DrafterAdapter | None) -> Any:
        return replace(measure(self, adapter), round_acceptance_length=next(scores))

    monkeypatch.setattr(DrafterObjective, "_measure", planned)
    kept: list[Tensor] = []

    def keep(record: dict[str, Any]) -> None:
        if record["kind"] == "held_out":
            path = Path(config.output_dir) / "linear_spec_lora" / "adapter_model.safetensors"
            kept.append(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))

    config = replace(config, evaluation=replace(config.evaluation, every_steps=1))
    result = train(config, log=keep)
    assert (result.state.best_score, result.state.best_step) == (3.0, 2)
    assert not kept[0].equal(kept[1])
    assert kept[1].equal(kept[2])
    assert kept[1].equal(kept[3])


def test_changed_base_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    """A drafter that goes on training for a model which is no longer there."""
    folder = tmp_path / "base"
    shutil.copytree(config.model.init or "", folder)
    config = replace(config, model=ModelPart(init=str(folder)))
    train(config, log=_StopAfter(2))
    model = load_model(folder, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        model.encoder.norm.weight[0] += 1e-3
    save_checkpoint(model, folder, tokenizer=load_tokenizer(folder))
    with pytest.raises(ConfigError, match=r"the weights of model\.init .* are not those"):
        train(config)
    assert train(config, is_resumed=False).is_finished


def test_base_that_moved_in_memory_fails_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof of the frozen base that cannot fail."""
    loss = DrafterObjective.loss

    def nudge(self: DrafterObjective, *args: Any) -> Any:
        with torch.no_grad():
            self.model.encoder.norm.weight[0] += 1e-6
        return loss(self, *args)

    monkeypatch.setattr(DrafterObjective, "loss", nudge)
    with pytest.raises(TriModeError, match="changed in memory"):
        train(config)


def test_checksum_sees_one_bit(base: TrainConfig) -> None:
    """A change too small for a sum of floats."""
    model = load_model(Path(base.output_dir) / "final", device="cpu", dtype=torch.float32)
    before = weights_checksum(model)
    assert weights_checksum(model) == before
    bits = model.diffusion_head.weight.detach().view(torch.int32)
    bits[5, 7] ^= 1
    assert weights_checksum(model) != before


def test_export_dtype_and_evaluation_keys(config: TrainConfig) -> None:
    """`export.dtype` ignored; scores of different held-out rows compared after a resume."""
    config = replace(config, export=ExportPart(dtype="bf16"))
    train(config, log=_StopAfter(2))
    other = replace(config, evaluation=EvaluationPart(tokens=128, every_steps=0))
    with pytest.raises(ConfigError, match=r"evaluation\.tokens was 512 and is now 128"):
        train(other)
    result = train(config)
    assert result.final_dir is not None
    lora = json.loads((result.final_dir / "adapter_config.json").read_text())
    assert (lora["r"], lora["lora_alpha"], lora["target_modules"]) == (8, 32, ["o_proj"])
    stored = load_file(result.final_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


Change = Callable[[TrainConfig], TrainConfig]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, model=ModelPart()), "a drafter run needs the model that it is for"),
        (lambda c: replace(c, optimizer=OptimizerPart()), "optimizer.name is 'muon'"),
        (
            lambda c: replace(c, stages=(replace(c.stages[0], draft_share=0.5),)),
            "stages.0.draft_share is 0.5, but means nothing to a drafter run",
        ),
        (
            lambda c: replace(c, activation_checkpointing=True),
            "activation_checkpointing is True, but means nothing to a drafter run",
        ),
        (
            lambda c: replace(c, model=replace(c.model, hidden_size=8)),
            "hidden_size is 8 beside init",
        ),
        (
            lambda c: replace(c, drafter=DrafterPart(targets=("o_prj",))),
            "targets holds 'o_prj', but allowed are q_proj",
        ),
        (lambda c: replace(c, drafter=DrafterPart(targets=())), "targets is empty"),
        (lambda c: replace(c, drafter=DrafterPart(rank=0)), "rank is 0"),
        (lambda c: replace(c, drafter=DrafterPart(eta=-1.0)), "eta is -1.0"),
        (lambda c: replace(c, drafter=DrafterPart(sampled_share=1.5)), "sampled_share is 1.5"),
        (
            lambda c: replace(c, drafter=DrafterPart(lk_weight=0.0, ce_weight=0.0)),
            "are both 0",
        ),
    ],
)
def test_config_errors(config: TrainConfig, change: Change, message: str) -> None:
    """A run of hours that ignores what it was asked."""
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as caught:
        change(config)
    assert "\n" not in str(caught.value)


def test_base_that_does_not_fit(config: TrainConfig, tmp_path: Path) -> None:
    """A base that is missing, has another mask token, or too short a context."""
    with pytest.raises(CheckpointError, match="no such folder"):
        train(replace(config, model=ModelPart(init=str(tmp_path / "nothing"))))
    for key, value, message in (
        ("mask_token_id", 5, "mask_token_id of the data .* is 2, but that of model.init .* is 5"),
        ("max_position_embeddings", 32, "sequence_length is 64, but must be at most"),
    ):
        folder = tmp_path / key
        shutil.copytree(config.model.init or "", folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        with pytest.raises(ConfigError, match=message):
            train(replace(config, model=ModelPart(init=str(folder))))
