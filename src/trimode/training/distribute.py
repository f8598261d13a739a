"""How the weights of a model lie on the mesh [data, tensor], and how their gradients are summed.

Along `tensor` (Shoeybi et al. 2019, arXiv 1909.08053): q, k, v, gate and up by columns, o and down
by rows; one sum over ranks after attention and one after the MLP, in each direction. Norms,
embedding and head are whole on every tensor-parallel rank, which all compute the same with them.
Along `data` FSDP2 cuts every weight, those shares included, along its first dimension: one group
per layer, and one of embedding, final norm and head, which stays gathered from the forward to the
end of the backward, since the head is read between the two.

Losses are divided by global counts, so gradients are summed over ranks and never averaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trimode.errors import ConfigError, UnsupportedError
from trimode.model import TriModeModel

DATA, TENSOR = "data", "tensor"
"""Names of the dimensions of the mesh."""


def distribute_model(
    model: nn.Module, mesh: DeviceMesh, *, gather_dtype: torch.dtype | None, has_adapter: bool
) -> nn.Module:
    """Share `model` out over `mesh`, in place; see `Parallel.shard` for arguments and errors."""
    assert isinstance(model, TriModeModel)
    tensor_parallel = mesh[TENSOR].size()
    if tensor_parallel > 1:
        _check_tensor_parallel(model, tensor_parallel, has_adapter=has_adapter)
        for layer in model.encoder.layers:
            parallelize_module(
                layer,
                mesh[TENSOR],
                _layer_plan(has_qk_norm=model.config.use_qk_norm),
                src_data_rank=None,  # every rank holds the whole weights: nothing to send
            )
    # Products of a layer run in the gathered dtype under autocast; the residual stream, and so the
    # embedding, stays in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Beside an adapter the base is frozen, and what is not is the adapter: whole on every rank.
    whole = {p for p in model.parameters() if p.requires_grad} if has_adapter else set()
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh[DATA], mp_policy=policy, ignored_params=whole)
    fully_shard(model, mesh=mesh[DATA], reshard_after_forward=False, ignored_params=whole)
    register_fsdp_forward_method(model, "encode")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    return model


def reduce_gradients(model: nn.Module, is_reduced: bool) -> None:
    """Whether the next backward sums its gradients over ranks or only adds to the local ones."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_reduced)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for gradients that lie on different meshes.

    Torch's own refuses them: layers lie on [data, tensor], embedding and head on [data].

    Returns:
        The norm of all gradients together, the same on every rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_groups[_sharing_groups(gradient)].append(_local(gradient))
    total: Tensor | None = None
    for groups, locals_ in by_groups.items():
        norms = torch.stack(torch._foreach_norm(locals_))
        squared = norms.square().sum()
        for group in groups:
            dist.all_reduce(squared, group=group)
        total = squared if total is None else total + squared
    if total is None:
        return torch.zeros(())
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        _local(gradient).mul_(scale)
    return norm


def gather_whole(tensor: DTensor) -> Tensor:
    """The whole of a tensor that is shared out, on every rank; one mesh dimension at a time.

    `DTensor.full_tensor` warns about what FSDP2 over tensor parallelism always is: cut twice.
    """
    mesh, part = tensor.device_mesh, tensor.to_local()
    whole = torch.empty(tensor.shape, device="meta")
    steps = []
    for mesh_dim, dim in _cuts(tensor):
        steps.append((mesh_dim, dim, whole))
        whole = _cut(whole, mesh, mesh_dim=mesh_dim, dim=dim)
    for mesh_dim, dim, whole in reversed(steps):
        assert mesh.mesh_dim_names is not None
        part = DTensor.from_local(
            part,
            mesh[mesh.mesh_dim_names[mesh_dim]],
            [Shard(dim)],
            run_check=False,
            shape=whole.shape,
            stride=torch.empty(whole.shape, device="meta").stride(),
        ).full_tensor()
    return part


def keep_part(whole: Tensor, *, like: DTensor) -> DTensor:
    """The opposite of `gather_whole`, without any exchange: shared out as `like` is."""
    part = whole
    for mesh_dim, dim in _cuts(like):
        part = _cut(part, like.device_mesh, mesh_dim=mesh_dim, dim=dim)
    return DTensor.from_local(
        part.contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def part_of(whole: Tensor, *, like: Tensor) -> Tensor:
    """`whole` as it lies where `like` does: shared out if `like` is, on its device."""
    whole = whole.to(like.device)
    return keep_part(whole, like=like) if isinstance(like, DTensor) else whole


def whole_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter of a model, gathered on all ranks if it is shared out, one at a time."""
    if isinstance(model, FSDPModule):
        model.reshard()
    for parameter in model.parameters():
        yield gather_whole(parameter) if isinstance(parameter, DTensor) else parameter


def _cuts(tensor: DTensor) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) of each cut, in the order in which they were made.

    FSDP2 cuts what tensor parallelism has cut before: the last mesh dimension comes first.
    """
    return [
        (mesh_dim, placement.dim)  # type: ignore[attr-defined]
        for mesh_dim, placement in reversed(list(enumerate(tensor.placements)))
        if not placement.is_replicate()
    ]


def _cut(whole: Tensor, mesh: DeviceMesh, *, mesh_dim: int, dim: int) -> Tensor:
    """This rank's part: all are equally long, but the last ones may be shorter or empty."""
    parts = whole.chunk(mesh.size(mesh_dim), dim)
    rank = mesh.get_local_rank(mesh_dim)
    return parts[rank] if rank < len(parts) else whole.narrow(dim, 0, 0)


def _sharing_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Groups of ranks that hold different parts of a tensor."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layer_plan(*, has_qk_norm: bool) -> dict[str, ParallelStyle]:
    """Module of a layer -> how it is shared out.

    Inputs of attention and MLP are marked as whole once, so that the gradients which come back from
    q, k and v (gate and up) are summed over ranks once and not one by one.
    """
    plan: dict[str, ParallelStyle] = {
        "self_attn": PrepareModuleInput(
            input_layouts=(Replicate(), None), desired_input_layouts=(Replicate(), None)
        ),
        "mlp": PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
        ),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        plan[name] = ColwiseParallel()
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        plan[name] = ColwiseParallel()
    if has_qk_norm:  # each rank norms its own heads, dimension 2 of [B, T, N, D], by one weight
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            plan[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return plan


def _check_tensor_parallel(model: TriModeModel, size: int, *, has_adapter: bool) -> None:
    if has_adapter:
        raise UnsupportedError(
            f"tensor_parallel is {size}, but an adapter trains on whole layers only: use 1"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(model.config, name)
        if value % size:
            raise ConfigError(f"tensor_parallel is {size}, but must divide {name} ({value})")
