"""One run on many ranks: the process group, the mesh, and what ranks tell each other.

Ranks form a mesh [data, tensor]. Ranks along `data` see different rows of a batch and share the
weights out among them (FSDP2); ranks along `tensor` see the same rows and share out the heads and
the inner dimension of every layer. How the weights lie on the mesh is `distribute`'s business.

A `Parallel` of one rank does nothing, without a process group, so a caller needs no second path.
Start many with `torchrun`: gloo on CPUs, nccl on CUDA devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from trimode.errors import ConfigError, TriModeError
from trimode.training.agreement import check_alike, check_same_config, common, together
from trimode.training.distribute import (
    DATA,
    TENSOR,
    clip_grad_norm,
    distribute_model,
    reduce_gradients,
)
from trimode.training.objective import TargetCounts
from trimode.training.parallel_config import ParallelPart


@dataclass(frozen=True, slots=True)
class Parallel:
    """This rank and its place among the others.

    Args:
        part: How ranks are used.
        rank: Of this process among all.
        device: Of this process.
        mesh: [data, tensor]; None if there is one rank.
    """

    part: ParallelPart
    rank: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        """Whether this rank logs, exports and names things."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.mesh is not None

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def data_parallel(self) -> int:
        """Ranks along `data`."""
        return 1 if self.mesh is None else self.mesh[DATA].size()

    @property
    def data_rank(self) -> int:
        """Place of this rank along `data`."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(DATA)

    # Rows -------------------------------------------------------------------------------------

    def check_batch(self, *, batch_sequences: int, micro_batch_sequences: int) -> None:
        """Refuse a batch that the ranks cannot share equally.

        Raises:
            ConfigError: Rows are not a multiple of ranks times rows per forward.
        """
        share = self.data_parallel * micro_batch_sequences
        if batch_sequences % share:
            raise ConfigError(
                f"a batch has {batch_sequences} sequences (batch_tokens / sequence_length), but "
                f"must be a multiple of {share}: {self.data_parallel} data-parallel ranks x "
                f"micro_batch_sequences {micro_batch_sequences}"
            )

    def local_samples(self, samples: range) -> range:
        """This rank's share of a batch's global sample indices; equal on tensor-parallel peers.

        Rows and noise are functions of these indices, so all ranks together see exactly what one
        rank would see.
        """
        if self.mesh is None:
            return samples
        share, rest = divmod(len(samples), self.data_parallel)
        assert rest == 0, "check_batch comes first"
        first = self.data_rank * share
        return samples[first : first + share]

    # Sums and agreements ----------------------------------------------------------------------

    def sum_over_data(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks along `data`; the same on every rank."""
        if self.mesh is None:
            return values
        total = values.detach().clone().to(self.device)
        dist.all_reduce(total, group=self.mesh.get_group(DATA))
        return total

    def sum_numbers(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the ranks along `data`; on one rank the numbers themselves."""
        if self.mesh is None:
            return list(values)
        return self.sum_over_data(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_counts(self, counts: TargetCounts) -> TargetCounts:
        """A step's counts over all ranks: what every loss sum of the step is divided by."""
        summed = self.sum_numbers([counts.num_ar_targets, counts.num_maskable])
        return TargetCounts(*map(int, summed))

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag: whether it is set on any rank. For what clocks and signals decide."""
        if self.mesh is None:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def wait(self) -> None:
        """Return when all ranks are here."""
        self.any_rank([False])

    def together(self) -> AbstractContextManager[None]:
        """A block without exchanges that fails on all ranks if it fails on one, told once."""
        return nullcontext() if self.mesh is None else together()

    def check_alike(self, what: str, value: Any) -> None:
        """Refuse to go on where ranks find different things; see `agreement.check_alike`."""
        if self.mesh is not None:
            check_alike(what, value)

    def common(self, error: TriModeError) -> TriModeError:
        """An error that all ranks are about to raise alike, so that it is told once."""
        return error if self.mesh is None else common(error)

    # Weights ----------------------------------------------------------------------------------

    def shard(
        self,
        model: nn.Module,
        *,
        gather_dtype: torch.dtype | None = None,
        has_adapter: bool = False,
    ) -> nn.Module:
        """Move `model` to the device and share it out in place; before the optimiser is made.

        Args:
            model: A `TriModeModel` in float32, the same on every rank, on any device.
            gather_dtype: Layers are gathered in this dtype (bfloat16 beside CUDA autocast: half
                the traffic, and no rank keeps a second copy of the layers); None: in float32.
            has_adapter: The base is frozen under an adapter; parameters of the model that are not
                frozen are the adapter's, which stays whole on every rank, where it is.

        Raises:
            ConfigError: Heads or inner size cannot be shared out.
            UnsupportedError: An adapter and tensor parallelism.
        """
        if self.mesh is None:
            return model.to(self.device)
        return distribute_model(
            model, self.mesh, gather_dtype=gather_dtype, has_adapter=has_adapter
        )

    def prepare_backward(self, model: nn.Module, *, is_last: bool) -> None:
        """Say before each micro-batch's forward whether it is the last one of the step."""
        reduce_gradients(model, is_last or self.part.is_reduced_each_micro_batch)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum over ranks the gradients of those parameters that every rank holds whole (an
        adapter's); those of shared-out weights are summed in the backward."""
        for parameter in parameters:
            is_whole = not isinstance(parameter, DTensor)
            if self.mesh is not None and is_whole and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.mesh.get_group(DATA))

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` together; returns their global norm before."""
        if self.mesh is None:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        return clip_grad_norm(parameters, max_norm)

    def close(self) -> None:
        """Leave the process group. Nothing of this object may be used afterwards."""
        if self.mesh is not None:
            dist.destroy_process_group()


def setup(part: ParallelPart, *, device: torch.device, config: Mapping[str, Any]) -> Parallel:
    """Join the other ranks, if torchrun started any, and make sure that all run the same config.

    Args:
        part: How ranks are used.
        device: `cpu` or `cuda`; of several CUDA devices a rank takes that of its local rank.
        config: The whole resolved config, of plain JSON types.

    Raises:
        ConfigError: The ranks do not form the mesh, a rank has no device, or ranks disagree.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        part.data_parallel_size(1)
        return Parallel(part, rank=0, device=device, mesh=None)
    if device.type == "cuda":
        device = _local_device(device)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        check_same_config(config)
        with together():
            shape = (part.data_parallel_size(world_size), part.tensor_parallel)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=(DATA, TENSOR))
    except BaseException:
        dist.destroy_process_group()
        raise
    return Parallel(part, rank=dist.get_rank(), device=device, mesh=mesh)


def _local_device(device: torch.device) -> torch.device:
    local_rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise ConfigError(
            f"device is '{device}', but with several ranks each takes the device of its local "
            f"rank: use cuda"
        )
    if local_rank >= num_devices:
        raise ConfigError(
            f"local rank {local_rank} has no CUDA device ({num_devices} here): launch torchrun "
            f"with --nproc-per-node of at most {num_devices}"
        )
    return torch.device("cuda", local_rank)
