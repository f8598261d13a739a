"""Muon for the hidden matrices, AdamW for everything else, and the learning-rate schedule.

`torch.optim.Muon` orthogonalises in bf16, which is a hundred times slower on CPUs without bf16
units; ours works in float32 unless told otherwise, and on all matrices of one shape at once.
Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982 (update size and weight decay).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trimode.training.config import OptimizerPart, SchedulePart
from trimode.training.distribute import gather_whole, keep_part, part_of

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ADAM_RMS = 0.2  # typical root mean square of an AdamW update; Muon's is scaled to it


def orthogonalize(matrices: Tensor, *, num_steps: int = 5) -> Tensor:
    """Roughly the nearest (semi-)orthogonal matrices, by a quintic Newton-Schulz iteration.

    Singular values end between about 0.7 and 1.2, which Muon is content with.

    Args:
        matrices: [M, R, C], float32 or bfloat16; the work is done in that dtype.
        num_steps: Steps of the iteration.

    Returns:
        [M, R, C].
    """
    a, b, c = _QUINTIC
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the update's size matches AdamW's, so one rate serves
    both.

    Of matrices shared out over ranks, every rank gathers each update's direction and
    orthogonalises it whole, one matrix at a time, then keeps its own part: exact, at the price of
    one gathering of all hidden matrices per step and of no rank saving another that work. The
    momentum stays shared out.

    Args:
        params: 2-D matrices.
        lr: Learning rate.
        momentum: Of the gradient's running mean.
        weight_decay: Decoupled, times the learning rate.
        work_dtype: Of the orthogonalisation.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        work_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._work_dtype = work_dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
        updates = self._orthogonal(directions)
        scale = _ADAM_RMS * max(parameters[0].shape) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _orthogonal(self, directions: list[Tensor]) -> Iterable[Tensor]:
        """The orthogonalised directions, whole or shared out as they came."""
        if not isinstance(directions[0], DTensor):
            return orthogonalize(torch.stack(directions).to(self._work_dtype)).unbind()
        return (self._orthogonal_part(d) for d in directions if isinstance(d, DTensor))

    def _orthogonal_part(self, direction: DTensor) -> Tensor:
        whole = gather_whole(direction).to(self._work_dtype)
        return keep_part(orthogonalize(whole[None])[0], like=direction)


class OptimizerSet:
    """The optimisers of a model, stepped together at one share of their base learning rates.

    Args:
        optimizers: Each parameter is in one group of one of them.
        order: Of the parameters of each, as they would stand on one rank: that of `state_dict`
            there.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], order: list[list[Tensor]]) -> None:
        self._optimizers = optimizers
        self._order = order
        self._base_rates = [[g["lr"] for g in o.param_groups] for o in optimizers]

    def step(self, rate_ratio: float) -> None:
        """Update all parameters at `rate_ratio` times the base rates, then drop the gradients."""
        for optimizer, rates in zip(self._optimizers, self._base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_ratio
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def parameter_states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Every parameter with its optimiser's state for it: the dictionary itself, not a copy."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter, optimizer.state[parameter]

    def state_dict(self) -> dict[str, Any]:
        """All states, for a checkpoint of one rank."""
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self._optimizers)}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """The inverse of `state_dict`, on any number of ranks: each keeps its part."""
        for i, optimizer in enumerate(self._optimizers):
            if not any(isinstance(parameter, DTensor) for parameter in self._order[i]):
                optimizer.load_state_dict(states[str(i)])
                continue
            found = states[str(i)]["state"]
            for place, parameter in enumerate(self._order[i]):
                state = optimizer.state[parameter]
                state.clear()
                for key, value in found.get(place, {}).items():
                    if value.shape == parameter.shape:
                        state[key] = part_of(value, like=parameter).clone()
                    else:
                        state[key] = value.to(parameter.device, copy=True)


def make_optimizer(model: nn.Module, part: OptimizerPart, *, has_fast_bf16: bool) -> OptimizerSet:
    """Optimisers for every trainable parameter of `model`, each parameter in exactly one.

    Args:
        model: The network, after it was shared out over ranks, if it is.
        part: What to use.
        has_fast_bf16: Orthogonalise in bf16.
    """
    outer = _outer_matrices(model)
    hidden, embedding, vectors = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2:
            vectors.append(parameter)
        elif id(parameter) in outer:
            embedding.append(parameter)
        else:
            hidden.append(parameter)
    embedding_rate = part.embedding_learning_rate or part.learning_rate
    adam_groups: list[dict[str, Any]] = [
        {"params": embedding, "lr": embedding_rate, "weight_decay": 0.0},
        {"params": vectors, "lr": part.learning_rate, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if part.name == "muon" and hidden:
        optimizers.append(
            Muon(
                hidden,
                lr=part.learning_rate,
                momentum=part.muon_momentum,
                weight_decay=part.weight_decay,
                work_dtype=torch.bfloat16 if has_fast_bf16 else torch.float32,
            )
        )
    else:
        adam_groups.append(
            {"params": hidden, "lr": part.learning_rate, "weight_decay": part.weight_decay}
        )
    order: list[list[Tensor]] = [[*hidden]] if optimizers else []
    order.append([p for group in adam_groups for p in group["params"]])
    adam_groups = [same for group in adam_groups for same in _by_mesh(group)]
    optimizers.append(
        torch.optim.AdamW(adam_groups, betas=part.adam_betas, eps=part.adam_eps, fused=True)
    )
    return OptimizerSet(optimizers, order)


def wsd_ratio(progress: float, schedule: SchedulePart) -> float:
    """Share of the base learning rate at `progress` (0 to 1) of the run.

    Warm-up from 0, stable at 1, then a straight line down to `min_ratio`.
    """
    if progress < schedule.warmup_share:
        return progress / schedule.warmup_share
    left = 1.0 - progress
    if left >= schedule.decay_share:
        return 1.0
    return schedule.min_ratio + (1 - schedule.min_ratio) * max(left, 0.0) / schedule.decay_share


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """One group per mesh that its parameters lie on: a fused update takes no two at once."""
    parts: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in group["params"]:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        parts[mesh].append(parameter)
    return [{**group, "params": parameters} for parameters in parts.values()]


def _outer_matrices(model: nn.Module) -> set[int]:
    """Ids of the embedding and head matrices, which are tables and not maps between hidden
    states."""
    modules = (module for module in model.modules() if isinstance(module, nn.Embedding))
    outer = {id(module.weight) for module in modules}
    outer |= {id(p) for name, p in model.named_parameters() if name == "mask_embeddings"}
    head = getattr(model, "diffusion_head", None)
    if isinstance(head, nn.Linear):
        outer.add(id(head.weight))
    return outer
