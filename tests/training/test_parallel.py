"""Many ranks against one: equal losses, gradients, weights and checkpoints, whatever the split."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import parallel_worker as worker
from trimode.errors import CheckpointError, ConfigError
from trimode.training.dist_checkpoint import load_distributed
from trimode.training.parallel import Parallel, ParallelPart, setup

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def alone() -> Parallel:
    return setup(ParallelPart(), device=CPU, config={})


@pytest.fixture(scope="module")
def expected(alone: Parallel, folder: Path) -> dict[str, Any]:
    """Both runs on one rank; one leaves a checkpoint."""
    checkpoint = folder / "checkpoint_one"
    return {
        "adamw": worker.steps(alone, "adamw"),
        "muon": worker.steps(alone, "muon", save_to=checkpoint),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(expected: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What all worlds of ranks did, by world: one launch for the whole file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", worker.__name__, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("two_data_ranks", "two_tensor_ranks", "two_by_two_ranks", "four_data_ranks")
    found: dict[str, Any] = {name: torch.load(folder / f"{name}.pt") for name in names}
    found["refused"] = [torch.load(folder / f"errors_{rank}.pt") for rank in range(4)]
    return found


def _assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses and norms of the steps that were done, and the weights after them."""
    num_steps = len(result["losses"])
    for key in ("losses", "norms"):
        assert result[key] == pytest.approx(expected[key][-num_steps:], abs=1e-4)
    assert result["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("world", ["two_data_ranks", "two_tensor_ranks", "two_by_two_ranks"])
def test_any_split_trains_the_same_network(
    results: dict[str, Any], expected: dict[str, Any], world: str, optimizer: str
) -> None:
    """Averaged gradients, means of means, a head whose gradient is not summed, a norm counted
    twice, parts orthogonalised as if they were whole matrices."""
    _assert_same(results[world][optimizer], expected[optimizer])


def test_one_sum_per_step_and_evaluations_change_nothing(
    results: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Gradients of all but the last micro-batch lost, or summed once per micro-batch; weights
    left over from an evaluation trained on."""
    _assert_same(results["two_data_ranks"]["reduced once"], expected["adamw"])


@pytest.mark.parametrize("name", ["muon", "2x2_adamw"])
def test_checkpoint_moves_to_four_ranks_and_to_one(
    results: dict[str, Any], expected: dict[str, Any], alone: Parallel, folder: Path, name: str
) -> None:
    """A checkpoint that only the ranks that wrote it can read, or without the optimiser's state."""
    reference = expected[name.rpartition("_")[2]]
    _assert_same(results["four_data_ranks"][name], reference)
    resumed = worker.resume(alone, name.rpartition("_")[2], folder / f"checkpoint_{name}")
    _assert_same(resumed, reference)


def test_checkpoint_of_one_rank_moves_to_two(
    results: dict[str, Any], expected: dict[str, Any]
) -> None:
    """A run begun on a laptop that cannot go on on a machine with more."""
    _assert_same(results["two_data_ranks"]["resumed from one rank"], expected["muon"])


def test_no_half_checkpoint_is_left(results: dict[str, Any], folder: Path) -> None:
    """A temporary folder kept, or a checkpoint visible before it is whole."""
    assert not list(folder.glob(".*"))
    assert (folder / "checkpoint_muon" / "run.json").is_file()


def test_damaged_or_foreign_checkpoint_is_refused(
    results: dict[str, Any], alone: Parallel, folder: Path
) -> None:
    """Weights of another network poured into this one; a traceback of torch's for a lost file."""
    run = worker.Run(alone, "muon")
    foreign = worker.make_model(num_hidden_layers=1)
    where = folder / "checkpoint_muon"
    with pytest.raises(CheckpointError, match=r"another network: model\.encoder\.layers\.1"):
        load_distributed(where, parallel=alone, model=foreign, optimizer=run.optimizer)
    (where / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read: rank 0: .*__1_0\.distcp"):
        worker.resume(alone, "muon", where)


def test_ranks_see_their_own_rows_and_peers_the_same(results: dict[str, Any]) -> None:
    """Rows seen twice by data-parallel ranks, or different rows on tensor-parallel peers."""
    assert results["two_data_ranks"]["samples"] == [0, 1, 2, 3]  # of rank 0
    assert results["two_tensor_ranks"]["samples"] == list(range(8))


def test_ranks_agree_on_flags(results: dict[str, Any]) -> None:
    """A signal seen by one rank alone, which then leaves the others waiting for ever."""
    assert results["two_data_ranks"]["flags"] == [True, False]


def test_tied_head_trains_the_same(results: dict[str, Any], alone: Parallel) -> None:
    """Half of the gradient of a table that is both embedding and head lost."""
    result, expected = results["two_data_ranks"]["tied"], worker.tied(alone)
    _assert_same(result, expected)


def test_adapter_on_a_frozen_network(results: dict[str, Any], alone: Parallel) -> None:
    """An adapter that each rank trains for itself."""
    for value, reference in zip(
        results["two_data_ranks"]["adapter"], worker.adapter_gradient(alone), strict=True
    ):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("world", ["two_data_ranks", "two_tensor_ranks"])
def test_layers_gathered_in_bf16_train_as_under_autocast(
    results: dict[str, Any], world: str
) -> None:
    """A residual stream in bf16, or gradients kept in it."""
    loss, norm, autocast_loss, autocast_norm = results[world]["bf16"]
    assert loss == pytest.approx(autocast_loss, rel=1e-3)
    assert norm == pytest.approx(autocast_norm, rel=1e-2)


def test_ranks_that_disagree_are_named(results: dict[str, Any]) -> None:
    """Ranks that train with different configs, or all but one that hang."""
    line = (
        "ConfigError: rank 2 started with another config: seed is 7 on rank 2, but 0 on rank 0; "
        "start all ranks with the same config"
    )
    assert [errors[0] for errors in results["refused"]] == [line] * 4
    assert all("is 3 ranks, but 4 were started" in errors[1] for errors in results["refused"])


def test_what_cannot_be_split_is_refused(results: dict[str, Any]) -> None:
    """A shape error from the depths of a collective."""
    batch, lost = results["two_data_ranks"]["errors"]
    assert batch.startswith("ConfigError: a batch has 6 sequences")
    assert "must be a multiple of 4" in batch
    assert lost.startswith("CheckpointError: checkpoint")
    heads, adapter = results["two_tensor_ranks"]["errors"]
    assert heads.endswith("tensor_parallel is 2, but must divide num_attention_heads (3)")
    assert adapter.startswith("UnsupportedError")


def test_ranks_without_torchrun_are_refused() -> None:
    """A run for eight GPUs that quietly trains on one."""
    with pytest.raises(ConfigError, match="is 8 ranks, but 1 were started: launch with torchrun"):
        setup(ParallelPart(data_parallel=8), device=CPU, config={})
    with pytest.raises(ConfigError, match="tensor_parallel is 0"):
        ParallelPart(tensor_parallel=0)
