"""`trimode train` on several ranks: the same run as on one, resumed on any number, told once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training import distributed_worker
from tests.training.fake_stream import write_data
from tests.training.tiny_run import MODEL, STAGE
from trimode.training.adapter_config import DrafterPart, LoraPart
from trimode.training.anchor_config import AnchorPart
from trimode.training.config import (
    EvaluationPart,
    ModelPart,
    OptimizerPart,
    SchedulePart,
    TrainConfig,
)
from trimode.training.trainer import train

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
JOINT = replace(STAGE, name="joint", diffusion_weight=0.3, block_lengths=(4, 8), draft_share=0.25)
LAST = "checkpoints/step_00000005"


def make_config(data: Path, output_dir: Path) -> TrainConfig:
    """Six steps; the last two checkpoints are kept. The head is tied, with QK-norm."""
    stages = tuple(replace(stage, micro_batch_sequences=1) for stage in (STAGE, JOINT))
    return TrainConfig(
        data=str(data),
        output_dir=str(output_dir),
        stages=stages,
        model=replace(MODEL, tie_word_embeddings=True, use_qk_norm=True),
        optimizer=OptimizerPart(learning_rate=1e-2, adam_eps=1e-6),
        schedule=SchedulePart(warmup_share=0.2, decay_share=0.5),
        evaluation=EvaluationPart(tokens=5 * 32, every_steps=4),
        precision="fp32",
        device="cpu",
        log_every_steps=1,
        checkpoint_every_s=0.0,
    )


def drafter_config(config: TrainConfig, output_dir: Path) -> TrainConfig:
    """Two steps of a drafter for what `config` leaves behind."""
    stage = replace(
        STAGE, name="drafter", tokens=2 * 128, diffusion_weight=0.3, micro_batch_sequences=1
    )
    return replace(
        config,
        output_dir=str(output_dir),
        stages=(stage,),
        model=ModelPart(init=config.output_dir + "/final"),
        drafter=DrafterPart(rank=4, alpha=16.0),
        optimizer=OptimizerPart(name="adamw", learning_rate=1e-2, adam_eps=1e-6),
        evaluation=EvaluationPart(tokens=5 * 32, every_steps=1),
    )


def anchors_config(config: TrainConfig, output_dir: Path) -> TrainConfig:
    """The same from anchors, with a corrector and a replay."""
    anchors = AnchorPart(per_row=6, num_masks=2, replay_share=0.5, replay_from=0, corrector_rank=2)
    config = drafter_config(config, output_dir)
    return replace(config, drafter=DrafterPart(rank=4, alpha=16.0, anchors=anchors))


def lora_config(config: TrainConfig, output_dir: Path) -> TrainConfig:
    """Two joint steps of a LoRA for what `config` leaves behind."""
    stage = replace(JOINT, name="sft", tokens=2 * 128, micro_batch_sequences=1)
    config = drafter_config(config, output_dir)
    return replace(config, stages=(stage,), drafter=None, lora=LoraPart(rank=4, alpha=16.0))


def write_config(config: TrainConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    return str(path)


def interrupted(run: Path, copy: Path) -> Path:
    """A copy of a finished run as it was after its fifth step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    shutil.rmtree(copy / "final")
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    """The run on one rank, done."""
    config = make_config(write_data(folder / "data"), folder / "one")
    train(config)
    train(drafter_config(config, folder / "drafter_one"))
    train(anchors_config(config, folder / "anchors_one"))
    train(lora_config(config, folder / "lora_one"))
    return config


@pytest.fixture(scope="module")
def torchrun(config: TrainConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    """The run on two ranks, through torchrun and the command line."""
    path = write_config(config, folder / "run.yaml")
    words = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    words += [
        *("-m", "trimode", "train", path, f"output_dir={folder / 'two'}", "--json", "--no-report")
    ]
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
    )


@pytest.fixture(scope="module")
def codes(
    torchrun: subprocess.CompletedProcess[str], config: TrainConfig, folder: Path
) -> dict[str, list[int]]:
    """Exit codes of all other launches, see `distributed_worker`."""
    assert torchrun.returncode == 0, torchrun.stderr[-3000:]
    path = write_config(config, folder / "run.yaml")
    drafter = write_config(drafter_config(config, folder / "drafter_two"), folder / "drafter.yaml")
    anchors = write_config(anchors_config(config, folder / "anchors_two"), folder / "anchors.yaml")
    lora = write_config(lora_config(config, folder / "lora_two"), folder / "lora.yaml")
    interrupted(folder / "one", folder / "one_to_two_by_two")
    interrupted(folder / "two", folder / "two_to_four")

    def words(path: str, output_dir: str, *more: str) -> list[str]:
        return ["train", path, f"output_dir={folder / output_dir}", *more]

    tensor = "parallel.tensor_parallel=2"
    launches = [
        ("tensor", [words(path, "tensor", tensor)] * 2),
        ("one_to_two_by_two", [words(path, "one_to_two_by_two", tensor)] * 4),
        ("two_to_four", [words(path, "two_to_four")] * 4),
        ("drafter", [words(drafter, "drafter_two")] * 2),
        ("anchors", [words(anchors, "anchors_two")] * 2),
        ("anchors_tensor", [words(anchors, "anchors_tensor", tensor)] * 2),
        ("lora", [words(lora, "lora_two")] * 2),
        ("lora_tensor", [words(lora, "lora_tensor", tensor)] * 2),
        ("seeds", [words(path, "seeds", f"seed={rank}") for rank in (0, 0, 7)]),
        ("shares", [words(path, "shares", "stages.0.micro_batch_sequences=4")] * 2),
        ("no_data", [words(path, "no_data", f"data={folder}/nowhere")] * 2),
        ("changed", [words(path, "two_to_four", "optimizer.weight_decay=0.3")] * 2),
    ]
    (folder / "launches.json").write_text(json.dumps(launches))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", distributed_worker.__name__, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "codes.json").read_text())


def curve(run: Path) -> list[dict[str, Any]]:
    """The log without its clocks."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    clocks = ("tokens_per_second", "seconds", "eta_s")
    return [{k: v for k, v in record.items() if k not in clocks} for record in records]


def assert_close(found: Any, expected: Any) -> None:
    """Numbers within 1e-4, all else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-4) if expected is not None else None)


def assert_same_run(found: Path, expected: Path) -> None:
    """Log and exported weights."""
    assert_close(curve(found), curve(expected))
    texts = [(run / "final" / "config.json").read_text() for run in (found, expected)]
    assert texts[0] == texts[1]
    assert_same_tensors(found, expected, "final/model.safetensors")


def assert_same_tensors(found: Path, expected: Path, name: str) -> None:
    """Of two files of weights."""
    tensors, reference = load_file(found / name), load_file(expected / name)
    assert tensors.keys() == reference.keys()
    for key, tensor in reference.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-4)


def read(folder: Path, name: str, kind: str) -> list[str]:
    """What each rank of a launch printed."""
    paths = sorted(folder.glob(f"{name}.*.{kind}"))
    return [path.read_text() for path in paths]


def test_torchrun_trains_the_same_network(
    torchrun: subprocess.CompletedProcess[str], folder: Path
) -> None:
    """Batches, counts, gradients, evaluations or clipping that differ from one rank's; results
    told, logged or exported once per rank."""
    assert torchrun.returncode == 0, torchrun.stderr[-3000:]
    (line,) = torchrun.stdout.splitlines()
    assert json.loads(line)["final_dir"] == str(folder / "two" / "final")
    assert_same_run(folder / "two", folder / "one")
    assert torchrun.stderr.count("exported") == 1
    assert {path.name for path in (folder / "two" / "checkpoints").iterdir()} == {
        "step_00000005",
        "step_00000006",
    }
    assert (folder / "two" / LAST / ".metadata").exists()


@pytest.mark.parametrize("name", ["tensor", "one_to_two_by_two", "two_to_four"])
def test_meshes_and_resumes_on_other_ranks(
    codes: dict[str, list[int]], folder: Path, name: str
) -> None:
    """A checkpoint that only as many ranks can read as wrote it, or with its optimiser's state
    given to other weights."""
    assert set(codes[name]) == {0}, read(folder, name, "err")
    assert_same_run(folder / name, folder / "one")


def test_two_ranks_resume_on_one(codes: dict[str, list[int]], folder: Path) -> None:
    """A run that cannot come back from the cluster."""
    run = interrupted(folder / "two", folder / "two_to_one")
    config = make_config(folder / "data", run)
    train(config)
    assert_same_run(run, folder / "one")


def test_drafter_on_two_ranks(codes: dict[str, list[int]], folder: Path) -> None:
    """An adapter that each rank trains for itself, blocks counted per rank."""
    assert codes["drafter"] == [0, 0], read(folder, "drafter", "err")
    one, two = folder / "drafter_one", folder / "drafter_two"
    assert_close(curve(two), curve(one))
    assert_same_tensors(two, one, "linear_spec_lora/adapter_model.safetensors")


def test_anchors_on_two_ranks(codes: dict[str, list[int]], folder: Path) -> None:
    """Prevents groups that are counted, or walks that are summed, per rank."""
    assert codes["anchors"] == [0, 0], read(folder, "anchors", "err")
    one, two = folder / "anchors_one", folder / "anchors_two"
    assert_close(curve(two), curve(one))
    for name in ("adapter_model", "trimode_view"):
        assert_same_tensors(two, one, f"drafter/{name}.safetensors")


def test_lora_on_two_ranks(codes: dict[str, list[int]], folder: Path) -> None:
    """Factors that differ between ranks, or whose gradients are not summed."""
    assert codes["lora"] == [0, 0], read(folder, "lora", "err")
    one, two = folder / "lora_one", folder / "lora_two"
    assert_close(curve(two), curve(one))
    assert_same_tensors(two, one, "lora/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("anchors_tensor", "tensor_parallel is 2, but anchors train on whole layers only"),
        ("lora_tensor", "tensor_parallel is 2, but an adapter trains on whole layers only"),
        ("seeds", "rank 2 started with another config: seed is 7 on rank 2, but 0 on rank 0"),
        ("shares", "a batch has 4 sequences"),
        ("no_data", "data folder"),
        ("changed", "optimizer.weight_decay was 0.1 and is now 0.3"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    codes: dict[str, list[int]], folder: Path, name: str, message: str
) -> None:
    """Ranks that hang, or each tell the same; a folder made for a run that never began."""
    assert set(codes[name]) == {2}
    first, *others = read(folder, name, "err")
    assert message in first
    assert len(first.splitlines()) == 1
    assert not any(others)
    assert not (folder / name).exists()
