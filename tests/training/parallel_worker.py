"""What `test_parallel.py` runs on several ranks, and what it compares them with on one.

As a program it forks four ranks, which form worlds of two and of four one after the other, so that
Python and torch start once. `python -m tests.training.parallel_worker FOLDER`; under torchrun it
is one of the ranks of a single world and runs `steps` alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.free_ports import free_ports
from tests.training.fake_stream import MASK, FakeStream
from trimode.errors import TriModeError
from trimode.model import DenseAttention, DrafterAdapter, TriModeConfig, TriModeModel
from trimode.model.adapter import AdapterSwitch, LoraPair
from trimode.training.config import OptimizerPart
from trimode.training.corruption import corrupt
from trimode.training.dist_checkpoint import full_state_dict, load_distributed, save_distributed
from trimode.training.dual_stream import causal_mask
from trimode.training.objective import TargetCounts, TrainingBatch, count_targets, loss_sums
from trimode.training.optim import OptimizerSet, make_optimizer
from trimode.training.packing import RowSampler
from trimode.training.parallel import Parallel, ParallelPart, setup

ROWS, MICRO = 8, 2
STREAM = FakeStream([13, 4, 30, 21, 50, 9, 40, 90, 17, 33, 70, 25], seed=1)
NUM_STEPS, NUM_AR_STEPS = 3, 1
"""AR alone first, then the joint objective."""


def make_model(**overrides: Any) -> TriModeModel:
    """Biases, QK-norm and sizes that no number of ranks divides evenly along the data dimension."""
    shape: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 36,
        "intermediate_size": 54,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 128,
        "mask_token_id": MASK,
        "initializer_range": 0.2,
        "use_qk_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
    }
    torch.manual_seed(0)
    return TriModeModel(TriModeConfig(**(shape | overrides))).train()


class Run:
    """A training run in small: what a trainer does with a `Parallel`."""

    def __init__(self, parallel: Parallel, optimizer: str, **overrides: Any) -> None:
        self.parallel = parallel
        self.model: Any = parallel.shard(make_model(**overrides))
        part = OptimizerPart(name=optimizer, learning_rate=1e-2, max_grad_norm=0.5, adam_eps=1e-6)  # type: ignore[arg-type]
        self.optimizer: OptimizerSet = make_optimizer(self.model, part, has_fast_bf16=False)
        self.max_grad_norm = part.max_grad_norm
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, step: int) -> None:
        """One optimiser step."""
        parallel, batches = self.parallel, local_batches(self.parallel, step)
        counts = sum((count_targets(b) for b in batches), start=TargetCounts(0, 0))
        counts = parallel.sum_counts(counts)
        total = torch.zeros(())
        for number, batch in enumerate(batches, start=1):
            parallel.prepare_backward(self.model, is_last=number == len(batches))
            loss = loss_sums(self.model, batch).total(counts, diffusion_weight=0.3)
            loss.backward()
            total += loss.detach()
        norm = parallel.clip_grad_norm(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step(1.0)
        self.losses.append(float(parallel.sum_over_data(total)))
        self.norms.append(float(norm))

    def result(self) -> dict[str, Any]:
        """Losses, norms and whole weights."""
        weights = full_state_dict(self.model, parallel=self.parallel)
        return {"losses": self.losses, "norms": self.norms, "weights": weights}


def local_batches(parallel: Parallel, step: int) -> list[TrainingBatch]:
    """This rank's micro-batches."""
    samples = parallel.local_samples(range(step * ROWS, (step + 1) * ROWS))
    sampler = RowSampler(STREAM, 32, (4, 8), seed=0)
    made = []
    for start in range(0, len(samples), MICRO):
        some = samples[start : start + MICRO]
        rows, noise = sampler.rows(some), None
        if step >= NUM_AR_STEPS:
            noise = corrupt(rows, some, seed=0, mask_token_id=MASK)
        made.append(TrainingBatch(rows, noise))
    return made


def steps(parallel: Parallel, optimizer: str, *, save_to: Path | None = None) -> dict[str, Any]:
    """A whole run; `save_to`: a checkpoint in its middle."""
    run = Run(parallel, optimizer)
    for step in range(NUM_STEPS):
        if save_to is not None and step == NUM_AR_STEPS:
            save(run, save_to)
        run.step(step)
    return run.result()


def save(run: Run, folder: Path) -> None:
    """A checkpoint."""
    save_distributed(
        folder,
        parallel=run.parallel,
        model=run.model,
        optimizer=run.optimizer,
        record={"state": {"step": NUM_AR_STEPS}},
    )


def resume(parallel: Parallel, optimizer: str, folder: Path) -> dict[str, Any]:
    """The second half of a run."""
    run = Run(parallel, optimizer)
    record = load_distributed(folder, parallel=parallel, model=run.model, optimizer=run.optimizer)
    for step in range(record["state"]["step"], NUM_STEPS):
        run.step(step)
    return run.result()


# Worlds ---------------------------------------------------------------------------------------


def two_data_ranks(parallel: Parallel, folder: Path) -> dict[str, Any]:
    """FSDP2: equality, checkpoints, other ways to accumulate, evaluation between steps."""
    results: dict[str, Any] = {}
    for optimizer in ("adamw", "muon"):
        checkpoint = folder / f"checkpoint_{optimizer}"
        results[optimizer] = steps(parallel, optimizer, save_to=checkpoint)
    results["resumed from one rank"] = resume(parallel, "muon", folder / "checkpoint_one")
    once = replace(parallel, part=replace(parallel.part, is_reduced_each_micro_batch=False))
    run = Run(once, "adamw")
    for step in range(NUM_STEPS):
        with torch.no_grad():  # an evaluation, which leaves embedding and head gathered
            loss_sums(run.model, local_batches(parallel, step)[0])
        run.step(step)
    results["reduced once"] = run.result()
    results["samples"] = list(parallel.local_samples(range(8)))
    results["flags"] = parallel.any_rank([parallel.rank == 1, False])
    results["bf16"] = _gathered_in_bf16(parallel)
    results["tied"] = tied(parallel)
    results["adapter"] = adapter_gradient(parallel)
    results["errors"] = [
        _error(lambda: parallel.check_batch(batch_sequences=6, micro_batch_sequences=2)),
        _error(lambda: resume(parallel, "muon", folder / "nowhere")),
    ]
    return results


def _gathered_in_bf16(parallel: Parallel) -> list[float]:
    """Loss and gradient norm with layers gathered in bf16 under autocast, then in float32."""
    values = []
    for gather_dtype in (torch.bfloat16, None):
        model: Any = parallel.shard(make_model(), gather_dtype=gather_dtype)
        batch = local_batches(parallel, NUM_AR_STEPS)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = loss_sums(model, batch)
        (sums.ar + sums.diffusion).backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        norm = parallel.clip_grad_norm(model.parameters(), 1.0)
        values += [float(sums.ar.detach()), float(norm)]
    return values


def tied(parallel: Parallel) -> dict[str, Any]:
    """Two steps of a network whose head is its embedding."""
    run = Run(parallel, "adamw", tie_word_embeddings=True)
    for step in (0, NUM_AR_STEPS):
        run.step(step)
    return run.result()


def adapter_gradient(parallel: Parallel) -> list[torch.Tensor]:
    """Gradients of an adapter on a frozen network, clipped, and their norm before."""
    model: Any = parallel.shard(make_model().requires_grad_(False), has_adapter=True)
    generator = torch.Generator().manual_seed(0)
    pairs = {
        (layer, "o_proj"): LoraPair(
            torch.randn(3, 24, generator=generator), torch.randn(36, 3, generator=generator), 0.5
        )
        for layer in range(2)
    }
    adapter = DrafterAdapter(pairs)
    rows = RowSampler(STREAM, 32, (4, 8), seed=0).rows(parallel.local_samples(range(ROWS)))
    hidden = model.encode(
        rows.clean_ids,
        rows.position_ids,
        attend=DenseAttention(causal_mask(rows)),
        adapter=AdapterSwitch(adapter, None),
    )
    hidden[..., 0].sum().backward()
    parallel.sum_gradients(adapter.parameters())
    norm = parallel.clip_grad_norm(adapter.parameters(), 0.5)
    return [norm, *(p.grad for p in adapter.parameters() if p.grad is not None)]


def two_tensor_ranks(parallel: Parallel, folder: Path) -> dict[str, Any]:
    """Tensor parallelism: equality, refusals."""
    results: dict[str, Any] = {name: steps(parallel, name) for name in ("adamw", "muon")}
    results["samples"] = list(parallel.local_samples(range(8)))
    results["bf16"] = _gathered_in_bf16(parallel)
    odd_model = make_model(num_attention_heads=3, num_key_value_heads=1)
    results["errors"] = [
        _error(lambda: parallel.shard(odd_model)),
        _error(lambda: parallel.shard(make_model(), has_adapter=True)),
    ]
    return results


def two_by_two_ranks(parallel: Parallel, folder: Path) -> dict[str, Any]:
    """Both, with checkpoints."""
    results: dict[str, Any] = {}
    results["adamw"] = steps(parallel, "adamw", save_to=folder / "checkpoint_2x2_adamw")
    results["muon"] = steps(parallel, "muon")
    return results


def four_data_ranks(parallel: Parallel, folder: Path) -> dict[str, Any]:
    """Resharding from two ranks and from the 2 x 2 mesh."""
    return {
        name: resume(parallel, name.rpartition("_")[2], folder / f"checkpoint_{name}")
        for name in ("muon", "2x2_adamw")
    }


def _error(action: Callable[[], object]) -> str:
    try:
        action()
    except TriModeError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def run_world(
    world: Callable[[Parallel, Path], dict[str, Any]],
    *,
    rank: int,
    size: int,
    port: int,
    part: ParallelPart,
    folder: Path,
) -> None:
    """Join a world as torchrun would have it, run it, and leave rank 0's results in `folder`."""
    _set_environment(rank=rank, size=size, port=port)
    parallel = setup(part, device=torch.device("cpu"), config={"seed": 0})
    results = world(parallel, folder)
    if parallel.is_main:
        torch.save(results, folder / f"{world.__name__}.pt")
    parallel.close()


def _set_environment(*, rank: int, size: int, port: int) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in values.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def _refused(*, rank: int, ports: list[int], folder: Path) -> None:
    """Rank 2 of four has another seed; then the ranks do not form the mesh."""
    device = torch.device("cpu")
    config = {"model": {"size": 1}, "seed": 7 if rank == 2 else 0}
    _set_environment(rank=rank, size=4, port=ports[0])
    errors = [_error(lambda: setup(ParallelPart(), device=device, config=config))]
    _set_environment(rank=rank, size=4, port=ports[1])
    part = ParallelPart(tensor_parallel=3)
    errors.append(_error(lambda: setup(part, device=device, config={})))
    torch.save(errors, folder / f"errors_{rank}.pt")


def _rank(number: int, ports: list[int], folder: Path) -> None:
    """The life of one of the four processes."""
    pair, place = divmod(number, 2)
    world = (two_data_ranks, two_tensor_ranks)[pair]
    part = ParallelPart(tensor_parallel=1 + pair)
    run_world(world, rank=place, size=2, port=ports[pair], part=part, folder=folder)
    part = ParallelPart(tensor_parallel=2)
    run_world(two_by_two_ranks, rank=number, size=4, port=ports[2], part=part, folder=folder)
    part = ParallelPart()
    run_world(four_data_ranks, rank=number, size=4, port=ports[3], part=part, folder=folder)
    _refused(rank=number, ports=ports[4:], folder=folder)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if "WORLD_SIZE" in os.environ:
        parallel = setup(ParallelPart(), device=torch.device("cpu"), config={})
        results = steps(parallel, "muon")
        if parallel.is_main:
            torch.save(results, folder / "torchrun.pt")
        parallel.close()
        return
    ports = free_ports(6)
    torch.multiprocessing.start_processes(
        _rank, args=(ports, folder), nprocs=4, start_method="fork"
    )


if __name__ == "__main__":
    main()
