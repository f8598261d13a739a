"""Whole runs of a tiny model: resuming to the last bit, refusing what does not fit, stopping."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.fake_stream import write_data
from tests.training.tiny_run import MODEL, STAGE
from trimode.checkpoint import whole_folder
from trimode.errors import CheckpointError, ConfigError, TriModeError
from trimode.model import TriModeModel
from trimode.training import joint
from trimode.training.checkpoints import latest_checkpoint
from trimode.training.config import EvaluationPart, ExportPart, SchedulePart, TrainConfig
from trimode.training.objective import LossSums
from trimode.training.resume import locked
from trimode.training.trainer import TrainResult, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def config(data: Path, tmp_path: Path) -> TrainConfig:
    joint = replace(STAGE, name="joint", diffusion_weight=0.3, block_lengths=(4, 8))
    return TrainConfig(
        data=str(data),
        output_dir=str(tmp_path / "run"),
        stages=(STAGE, replace(joint, draft_share=0.25)),
        model=MODEL,
        schedule=SchedulePart(warmup_share=0.2, decay_share=0.5),
        evaluation=EvaluationPart(tokens=256, every_steps=0),
        precision="fp32",
        device="cpu",
        log_every_steps=1,
    )


def _weights(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.final_dir is not None
    return dict(TriModeModel.from_pretrained(result.final_dir, dtype=torch.float32).state_dict())


class _StopAfter:
    """Sends this process a signal when a step has been logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stop_after", [2, 4])
def test_stopped_and_resumed_run_has_the_same_weights_to_the_bit(
    config: TrainConfig, tmp_path: Path, stop_after: int
) -> None:
    """Optimiser state, data order, noise or schedule lost on resume (in either stage)."""
    straight = train(config)
    stopped_config = replace(config, output_dir=str(tmp_path / "stopped"))
    stopped = train(stopped_config, log=_StopAfter(stop_after))
    assert not stopped.is_finished
    assert stopped.state.step == stop_after
    resumed = train(stopped_config)
    assert resumed.is_finished
    assert resumed.state.step == straight.state.step == 6
    for name, weight in _weights(straight).items():
        assert torch.equal(weight, _weights(resumed)[name]), name


def test_signal_handlers_are_put_back(config: TrainConfig) -> None:
    """A program that can no longer be interrupted after it has trained something."""
    before = signal.getsignal(signal.SIGTERM)
    train(replace(config, max_seconds=0.0))
    assert signal.getsignal(signal.SIGTERM) is before


def test_changed_key_is_refused_by_name(config: TrainConfig) -> None:
    """A run that silently goes on as another run."""
    train(replace(config, max_seconds=0.0))
    changed = replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was 0\.003 and is now 0\.5"):
        train(changed)
    assert train(changed, is_resumed=False).is_finished


def test_stage_to_come_may_be_lengthened(config: TrainConfig) -> None:
    """A stable run that cannot be extended or brought down early without starting over."""
    config = replace(config, schedule=SchedulePart(warmup_share=0.0, decay_share=0.2))
    train(config, log=_StopAfter(4))
    longer = (config.stages[0], replace(config.stages[1], tokens=5 * 128))
    train(replace(config, stages=longer), log=_StopAfter(5))
    shorter = (config.stages[0], replace(config.stages[1], tokens=4 * 128))
    assert train(replace(config, stages=shorter)).state.step == 7


def test_a_decaying_run_may_not_be_lengthened(config: TrainConfig) -> None:
    """A learning rate that rises again in the middle of the decay, or warms up twice."""
    train(config, log=_StopAfter(4))
    longer = (config.stages[0], replace(config.stages[1], tokens=500 * 128))
    with pytest.raises(ConfigError, match=r"the learning rate would go from 0\.683"):
        train(replace(config, stages=longer))


def test_other_data_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    """A run that goes on with data prepared anew at the same path, and exports its tokenizer."""
    folder = write_data(tmp_path / "data")
    config = replace(config, data=str(folder))
    train(config, log=_StopAfter(2))
    shutil.rmtree(folder)
    write_data(folder, num_documents=41)
    with pytest.raises(ConfigError, match="the data was .* and is now"):
        train(config)


def test_another_precision_is_refused(config: TrainConfig) -> None:
    """`auto` meaning one thing at the start and another on the machine that goes on."""
    train(config, log=_StopAfter(2))
    with pytest.raises(ConfigError, match="the precision was fp32 and is now bf16"):
        train(replace(config, precision="bf16"))


def test_two_runs_in_one_folder_are_refused(config: TrainConfig) -> None:
    """Two runs that remove each other's checkpoints."""
    with locked(Path(config.output_dir)), pytest.raises(ConfigError, match="in use by another run"):
        train(config)


def test_log_of_an_interrupted_run_reads_as_one(config: TrainConfig) -> None:
    """Steps logged twice after a kill, and a finished run's last evaluation at every start."""
    undisturbed: list[dict[str, Any]] = []
    train(replace(config, output_dir=config.output_dir + "2"), log=undisturbed.append)
    train(config, log=_StopAfter(2))
    path = Path(config.output_dir) / "log.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with path.open("a") as file:  # steps that were logged and then lost with the process
        file.write(json.dumps({**last, "step": 3}) + "\n" + '{"kind": "st')
    train(config)
    train(config)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("kind", "step", "ar_loss", "diffusion_loss", "grad_norm", "rate_ratio", "report")

    def curve(found: list[dict[str, Any]]) -> list[list[Any]]:
        return [[record.get(name) for name in names] for record in found]

    assert curve(records) == curve(undisturbed)


def test_saving_a_step_again_keeps_a_whole_checkpoint_at_every_moment(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the removal of a good checkpoint and the arrival of the same one."""
    train(config, log=_StopAfter(2))
    root = Path(config.output_dir) / "checkpoints"

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_folder, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, max_seconds=0.0))
    monkeypatch.undo()
    checkpoint = latest_checkpoint(Path(config.output_dir))
    assert checkpoint is not None
    assert checkpoint.state.step == 2
    assert train(replace(config, max_seconds=0.0)).state.step == 2
    assert [path.name for path in root.iterdir()] == ["step_00000002"]


def test_tokens_of_a_finished_stage_may_not_change(config: TrainConfig) -> None:
    """Samples read twice or never because the place of the second stage moved."""
    train(config, log=_StopAfter(4))
    longer = (replace(config.stages[0], tokens=5 * 128), config.stages[1])
    with pytest.raises(ConfigError, match=r"stages\.0\.tokens"):
        train(replace(config, stages=longer))


def test_incomplete_checkpoints_are_passed_over(config: TrainConfig) -> None:
    """A crash while saving that makes the run unable to start again."""
    train(config, log=_StopAfter(2))
    root = Path(config.output_dir) / "checkpoints"
    (root / "step_00000009").mkdir()
    (root / ".step_00000010.123").mkdir()
    checkpoint = latest_checkpoint(Path(config.output_dir))
    assert checkpoint is not None
    assert checkpoint.state.step == 2


def test_truncated_checkpoint_is_passed_over(config: TrainConfig) -> None:
    """A run that cannot go on because its newest checkpoint lost a part, with a good one before."""
    train(replace(config, checkpoint_every_s=0.0), log=_StopAfter(2))
    root = Path(config.output_dir) / "checkpoints"
    path = root / "step_00000002" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    checkpoint = latest_checkpoint(Path(config.output_dir))
    assert checkpoint is not None
    assert checkpoint.state.step == 1
    assert train(config).is_finished


def test_damaged_checkpoint_is_one_clear_error(config: TrainConfig) -> None:
    """A traceback from deep inside a reader."""
    train(config, log=_StopAfter(2))
    path = Path(config.output_dir) / "checkpoints" / "step_00000002" / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(config)


def test_last_two_checkpoints_are_kept(config: TrainConfig) -> None:
    """A disk that fills up, or nothing to fall back to."""
    train(replace(config, checkpoint_every_s=0.0))
    folders = sorted(p.name for p in (Path(config.output_dir) / "checkpoints").iterdir())
    assert folders == ["step_00000005", "step_00000006"]


def test_non_finite_loss_names_step_and_samples(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trains on for hours with NaN weights, or saves them over the good ones."""
    train(config, log=_StopAfter(2))

    def broken(model: TriModeModel, batch: object, **switches: bool) -> LossSums:
        total = next(model.parameters()).sum() * float("nan")
        return LossSums(ar=total, diffusion=total)

    monkeypatch.setattr(joint, "loss_sums", broken)
    with pytest.raises(TriModeError, match=r"step 2 .*samples 8 to 11"):
        train(config)
    checkpoint = latest_checkpoint(Path(config.output_dir))
    assert checkpoint is not None
    assert checkpoint.state.step == 2


def test_log_and_export(config: TrainConfig) -> None:
    """Losses or the config missing from a finished run; a final folder that does not open."""
    seen: list[dict[str, Any]] = []
    config = replace(
        config,
        evaluation=EvaluationPart(tokens=256, every_steps=2),
        export=ExportPart(dtype="fp16", max_shard_size="50KB"),
    )
    result = train(config, evaluate=lambda model, step: {"at": step}, log=seen.append)
    lines = (Path(config.output_dir) / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records == seen
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    heldout = [r for r in records if r["kind"] == "held_out"]
    assert [r["extra"]["at"] for r in heldout] == [2, 4, 6]
    assert len(heldout[-1]["report"]["accuracy_by_offset"]) == 3
    assert 0 < heldout[-1]["report"]["ar_loss"] < 5
    assert "diffusion_loss" not in records[0]
    assert records[-2]["diffusion_loss"] > 0
    final = Path(config.output_dir) / "final"
    assert result.final_dir == final
    assert len(list(final.glob("*.safetensors"))) > 1
    model = TriModeModel.from_pretrained(final)
    assert model.dtype == torch.float16
    assert model.config.block_size == 4
    saved = json.loads((Path(config.output_dir) / "config.json").read_text())
    assert saved["config"]["optimizer"]["name"] == "muon"
    assert saved["environment"]["torch"] == torch.__version__


def test_training_learns(config: TrainConfig) -> None:
    """Gradients that do not reach the weights; both losses must fall on data with structure."""
    stages = (replace(config.stages[1], tokens=80 * 128, draft_share=0.0),)
    seen: list[dict[str, Any]] = []
    train(replace(config, stages=stages), log=seen.append)
    steps = [r for r in seen if r["kind"] == "step"]
    for name in ("ar_loss", "diffusion_loss"):
        first, last = (sum(r[name] for r in part) / 10 for part in (steps[:10], steps[-10:]))
        assert last < first - 0.02, name
