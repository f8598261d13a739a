"""One run on many ranks: the process group, the mesh, and what ranks tell each other.

Ranks form a mesh [data, tensor]. Ranks along `data` see different rows of a batch and share the
weights out among them (FSDP2); ranks along `tensor` see the same rows and share out the heads and
the inner dimension of every layer. How the weights lie on the mesh is `distribute`'s business.

A `Parallel` of one rank does nothing, without a process group, so a caller needs no second path.
Start many with `torchrun`: gloo on CPUs, nccl on CUDA devices.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trimode.errors import ConfigError
from trimode.training.distribute import (
    DATA,
    TENSOR,
    clip_grad_norm,
    distribute_model,
    reduce_gradients,
)
from trimode.training.objective import TargetCounts


@dataclass(frozen=True, slots=True)
class ParallelPart:
    """How the ranks of a run are used.

    Args:
        tensor_parallel: Ranks that share out each layer.
        data_parallel: Ranks (or groups of tensor-parallel ranks) with rows of their own; null is
            as many as there are.
        is_reduced_each_micro_batch: Sum the gradients over ranks after every micro-batch, so that
            each rank keeps only its share of them. False sums once per step, which moves less and
            keeps all gradients of the model on every rank.
    """

    tensor_parallel: int = 1
    data_parallel: int | None = None
    is_reduced_each_micro_batch: bool = True

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "data_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be positive")

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks along `data` when there are `world_size` in all.

        Raises:
            ConfigError: The ranks do not form this mesh.
        """
        data = self.data_parallel or max(1, world_size // self.tensor_parallel)
        wanted = data * self.tensor_parallel
        if wanted != world_size:
            raise ConfigError(
                f"data_parallel {data} x tensor_parallel {self.tensor_parallel} is {wanted} ranks, "
                f"but {world_size} were started: launch with torchrun, --nnodes times "
                f"--nproc-per-node equal to {wanted}"
            )
        return data


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
    def data_parallel(self) -> int:
        """Ranks along `data`."""
        return 1 if self.mesh is None else self.mesh[DATA].size()

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
        first = self.mesh.get_local_rank(DATA) * share
        return samples[first : first + share]

    # Sums and agreements ----------------------------------------------------------------------

    def sum_over_data(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks along `data`; the same on every rank."""
        if self.mesh is None:
            return values
        total = values.detach().clone().to(self.device)
        dist.all_reduce(total, group=self.mesh.get_group(DATA))
        return total

    def sum_counts(self, counts: TargetCounts) -> TargetCounts:
        """A step's counts over all ranks: what every loss sum of the step is divided by."""
        if self.mesh is None:
            return counts
        local = torch.tensor([counts.num_ar_targets, counts.num_maskable], dtype=torch.int64)
        num_ar_targets, num_maskable = self.sum_over_data(local).tolist()
        return TargetCounts(num_ar_targets, num_maskable)

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
            has_adapter: Whether a LoRA adapter will be given to its forwards.

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
        """Sum over ranks the gradients of parameters that every rank holds whole (an adapter)."""
        for parameter in parameters:
            if self.mesh is not None and parameter.grad is not None:
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
        check_agreement(config)
        shape = (part.data_parallel_size(world_size), part.tensor_parallel)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=(DATA, TENSOR))
    except BaseException:
        dist.destroy_process_group()
        raise
    return Parallel(part, rank=dist.get_rank(), device=device, mesh=mesh)


def check_agreement(config: Mapping[str, Any]) -> None:
    """Refuse to go on, on all ranks alike, where one was started with another config.

    Hashes are compared; only where they differ do the configs travel, to name the key.

    Raises:
        ConfigError: Names the rank that disagrees with most (with rank 0 in a tie) and the key.
    """
    text = json.dumps(config, sort_keys=True)
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    common = Counter(digests).most_common(1)[0][0]
    if digests.count(common) == len(digests):
        return
    texts: list[Any] = [None] * len(digests)
    dist.all_gather_object(texts, text)
    odd = [rank for rank, digest in enumerate(digests) if digest != common]
    good = digests.index(common)
    key, there, here = _first_difference(json.loads(texts[odd[0]]), json.loads(texts[good]))
    ranks = ("rank " if len(odd) == 1 else "ranks ") + ", ".join(map(str, odd))
    raise ConfigError(
        f"{ranks} started with another config: {key} is {there} on rank {odd[0]}, but {here} on "
        f"rank {good}; start all ranks with the same config"
    )


def _first_difference(one: Any, other: Any, prefix: str = "") -> tuple[str, str, str]:
    """Key path of the first difference between two unequal JSON values, and both values."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return prefix or "config", repr(one), repr(other)
    for key in [*one, *(key for key in other if key not in one)]:
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in one or key not in other:
            values = [repr(side[key]) if key in side else "absent" for side in (one, other)]
            return path, values[0], values[1]
        if one[key] != other[key]:
            return _first_difference(one[key], other[key], path)
    raise AssertionError("equal values")


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
