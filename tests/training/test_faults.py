"""Training runs cut off by a kill, a full disk or a NaN go on as if nothing had happened.

Data preparation has its own: `test_prepare_faults.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training import killed_train
from tests.training.fake_stream import write_data
from tests.training.tiny_run import MODEL, STAGE
from trimode.training.config import EvaluationPart, SchedulePart, TrainConfig

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
KILLED, FAILED = -9, 1
NAN = "not finite"
KILLS = [n for n in killed_train.FAULTS if not n.startswith("no room") and n != NAN]
KILLS += killed_train.AGAIN
FULL = [name for name in killed_train.FAULTS if name.startswith("no room")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of the runs, see `killed_train`: six steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("killed")
    joint = replace(STAGE, name="joint", diffusion_weight=0.3, block_lengths=(4, 8))
    config = TrainConfig(
        data=str(write_data(folder / "data")),
        output_dir="given",
        stages=(STAGE, joint),
        model=MODEL,
        schedule=SchedulePart(warmup_share=0.2, decay_share=0.5),
        evaluation=EvaluationPart(tokens=128, every_steps=2),
        precision="fp32",
        device="cpu",
        log_every_steps=1,
        checkpoint_every_s=0.0,
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", killed_train.__name__, str(path), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    halves = [json.loads((folder / f"results_{half}.json").read_text()) for half in range(2)]
    return halves[0] | halves[1]


@pytest.mark.parametrize("name", KILLS)
def test_killed_run_goes_on_to_the_same_bits(runs: dict[str, Any], name: str) -> None:
    """A half-written checkpoint taken for a whole one, a step lost or done twice, a loss curve
    with a gap or with lines twice, an evaluation left out."""
    found = runs[name]
    assert found["code"] == KILLED
    assert (found["again"], found["is_same"]) == (0, True)
    assert found["left_again"] == ["step_00000005", "step_00000006"]


@pytest.mark.parametrize("name", FULL)
def test_full_disk_is_one_line_and_goes_on_once_there_is_room(
    runs: dict[str, Any], name: str
) -> None:
    """A good checkpoint lost for one that has no room, its rest left on the full disk, or a
    traceback."""
    found = runs[name]
    assert found["code"] == FAILED
    (line,) = found["told"]
    assert "the disk is full" in line
    assert "step_0" in line or "final" in line
    assert found["left"]
    assert all(folder.startswith("step_") for folder in found["left"])
    assert (found["again"], found["is_same"]) == (0, True)


def test_loss_that_is_not_finite(runs: dict[str, Any]) -> None:
    """NaN weights saved over the good ones, or a step left out once the fault is gone."""
    found = runs[NAN]
    assert found["code"] == FAILED
    (line,) = found["told"]
    assert "not finite at step 3" in line
    assert "samples 12 to 15" in line
    assert found["left"] == ["step_00000002", "step_00000003"]
    assert (found["again"], found["is_same"]) == (0, True)


def test_checkpoint_before_is_kept(runs: dict[str, Any]) -> None:
    """The only good checkpoint removed before the next one is whole."""
    assert runs["no room for weights"]["left"] == ["step_00000002", "step_00000003"]
    for name in ("after the weights", "before run.json", "before the rename", "at the rename"):
        assert runs[name]["left"] == [".step_00000004.new", "step_00000002", "step_00000003"]
    assert "step_00000003" in runs["after the rename"]["left"]
