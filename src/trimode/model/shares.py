"""Which part of a network each of several ranks holds, for inference (tensor parallelism).

Of every layer (Shoeybi et al. 2019, arXiv 1909.08053): q, k, v, gate and up are cut by outputs, o
and down by inputs, so that a rank has whole heads, with their K/V, and there are two sums over
ranks per layer. Norms and the embedding are whole on every rank. The head is on rank 0 alone: the
choice there needs every logit, and what a cut would save in reading weights it would pay in
gathering logits.

A weight that is cut is a DTensor, whose placement says along which dimension.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trimode.errors import ConfigError
from trimode.model.adapter import TARGETS, DrafterAdapter
from trimode.model.configuration import TriModeConfig

BY_INPUTS = ("o_proj", "down_proj")
"""Linear layers that are cut along their inputs; the other `TARGETS` along their outputs."""

_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_ranks(config: TriModeConfig, num_ranks: int) -> None:
    """Refuse a number of ranks that cannot share a network out evenly.

    Raises:
        ConfigError: names what it does not divide.
    """
    for name in _DIVIDED:
        value = getattr(config, name)
        if value % num_ranks:
            allowed = [str(n) for n in range(1, value + 1) if _divides(n, config)]
            raise ConfigError(
                f"{num_ranks} ranks cannot share out {name}, which is {value}; allowed for this"
                f" model: {', '.join(allowed)} ranks"
            )


def _divides(num_ranks: int, config: TriModeConfig) -> bool:
    return all(getattr(config, name) % num_ranks == 0 for name in _DIVIDED)


def placement_of(name: str) -> Shard | Replicate:
    """How the parameter of this name, as `state_dict` has it, lies on the ranks."""
    *_, module, kind = name.split(".")
    if module not in TARGETS:
        return Replicate()
    if module not in BY_INPUTS:
        return Shard(0)
    return Shard(1) if kind == "weight" else Replicate()


def part_slices(shape: tuple[int, ...], placement: Shard, mesh: DeviceMesh) -> tuple[slice, ...]:
    """What of a tensor of this shape is this rank's; the cut dimension is divided evenly."""
    size = shape[placement.dim] // mesh.size()
    start = mesh.get_local_rank() * size
    return tuple(
        slice(start, start + size) if dim == placement.dim else slice(None)
        for dim in range(len(shape))
    )


def as_share(part: Tensor, placement: Shard | Replicate, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's part of a parameter, as the parameter."""
    if not isinstance(placement, Shard):
        return nn.Parameter(part, requires_grad=False)
    share = DTensor.from_local(part, mesh, [placement], run_check=False)
    return nn.Parameter(share, requires_grad=False)


def share_adapter(adapter: DrafterAdapter, mesh: DeviceMesh) -> None:
    """Cut an adapter, whole on every rank, as the layers it sits on are; in place.

    Where a layer is cut along its inputs A is, and its r outputs are summed over ranks; where it is
    cut along its outputs B is.
    """
    for _, target, pair in adapter.items():
        name = "down" if target in BY_INPUTS else "up"
        placement = Shard(1) if target in BY_INPUTS else Shard(0)
        whole = getattr(pair, name).detach()
        share = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        setattr(pair, name, nn.Parameter(share, requires_grad=False))
