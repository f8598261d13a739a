"""The `drafter` part of a training config, and what else a drafter run asks of its config."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any

from trimode.errors import ConfigError
from trimode.model.adapter import TARGETS

if TYPE_CHECKING:
    from trimode.training.config import TrainConfig

_USED = {
    "stages": {
        *("name", "tokens", "sequence_length", "batch_tokens", "micro_batch_sequences"),
        "block_lengths",
    },
    "optimizer": {
        *("name", "learning_rate", "adam_betas", "adam_eps", "weight_decay", "max_grad_norm"),
    },
    "model": {"init"},
    "export": {"dtype"},
}
"""Keys of the other parts that mean something to a drafter run; the rest must be left out."""


def _check(is_good: bool, message: str) -> None:
    if not is_good:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True)
class DrafterPart:
    """A LoRA drafter on a frozen base (`model.init`). Defaults are the published ones (facts 2.5).

    Args:
        rank: r of the adapter.
        alpha: The update is scaled by alpha / r.
        targets: Linear layers it sits on, in every layer.
        temperature: tau of the LK loss.
        top_k: K of the support; clipped to the vocabulary.
        eta: Of lambda = exp(-eta * alpha_acc).
        lk_weight: Of the LK loss.
        ce_weight: Of the cross-entropy.
        sampled_share: Share of the slots (blocks) whose draft is sampled at temperature 1; the rest
            draft greedily.
    """

    rank: int = 128
    alpha: float = 512.0
    targets: tuple[str, ...] = ("o_proj",)
    temperature: float = 3.0
    top_k: int = 200
    eta: float = 0.5
    lk_weight: float = 1.0
    ce_weight: float = 1.0
    sampled_share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "temperature", "top_k"):
            value = getattr(self, name)
            _check(value > 0, f"drafter.{name} is {value}, but must be positive")
        for name in ("eta", "lk_weight", "ce_weight"):
            value = getattr(self, name)
            _check(value >= 0, f"drafter.{name} is {value}, but must not be negative")
        _check(
            self.lk_weight + self.ce_weight > 0,
            "drafter.lk_weight and drafter.ce_weight are both 0, but one must be positive",
        )
        _check(
            0 <= self.sampled_share <= 1,
            f"drafter.sampled_share is {self.sampled_share}, but must lie between 0 and 1",
        )
        _check(bool(self.targets), "drafter.targets is empty, but must name at least one layer")
        for target in self.targets:
            _check(
                target in TARGETS,
                f"drafter.targets holds {target!r}, but allowed are {', '.join(TARGETS)}",
            )
        _check(
            len(set(self.targets)) == len(self.targets),
            f"drafter.targets is {list(self.targets)}, but must name each layer once",
        )


def check_drafter_run(config: TrainConfig) -> None:
    """Refuse a drafter run without a base, with Muon, or with keys that would be ignored.

    Raises:
        ConfigError: Names the key.
    """
    init, name = config.model.init, config.optimizer.name
    _check(init is not None, "model.init is null, but a drafter needs the model it drafts for")
    _check(
        name == "adamw",
        f"optimizer.name is {name!r}, but the low-rank factors of a drafter need adamw",
    )
    _check(
        not config.activation_checkpointing,
        "activation_checkpointing is true, but means nothing to a drafter run: remove it",
    )
    parts: list[tuple[str, Any, set[str]]] = [
        (f"stages.{index}", stage, _USED["stages"]) for index, stage in enumerate(config.stages)
    ]
    parts += [(key, getattr(config, key), _USED[key]) for key in ("optimizer", "model", "export")]
    for key, part, used in parts:
        for field in fields(part):
            value = getattr(part, field.name)
            _check(
                field.name in used or value == _default(field),
                f"{key}.{field.name} is {value!r}, but means nothing to a drafter run: remove it",
            )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
