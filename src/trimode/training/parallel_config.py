"""The `parallel` part of a training config. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from trimode.errors import ConfigError


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
