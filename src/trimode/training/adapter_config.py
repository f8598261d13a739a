"""The `lora` and `drafter` parts of a training config, and what else such runs ask of theirs.

Both train an adapter on a frozen base. A LoRA of the model is meant for both views and may be
merged into the weights; a drafter is on for draft tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimode.model.adapter import TARGETS
from trimode.training.anchor_config import AnchorPart
from trimode.training.part_checks import changed_fields, check

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


@dataclass(frozen=True, slots=True)
class LoraPart:
    """A LoRA on a frozen base (`model.init`), trained by the objective of the stages.

    Args:
        rank: r of the adapter.
        alpha: The update is scaled by alpha / r.
        targets: Linear layers it sits on, in every layer.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        _check_shape(self)


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
        anchors: Train from anchors of the model's own text instead; null plays the rounds. Then
            temperature, top_k and eta are those of its LK loss.
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
    anchors: AnchorPart | None = None

    def __post_init__(self) -> None:
        _check_shape(self)
        for name in ("temperature", "top_k"):
            value = getattr(self, name)
            check(value > 0, f"{name} is {value}, but must be positive")
        for name in ("eta", "lk_weight", "ce_weight"):
            value = getattr(self, name)
            check(value >= 0, f"{name} is {value}, but must not be negative")
        check(
            self.lk_weight + self.ce_weight > 0,
            "lk_weight and ce_weight are both 0, but one must be positive",
        )
        check(
            0 <= self.sampled_share <= 1,
            f"sampled_share is {self.sampled_share}, but must lie between 0 and 1",
        )
        if self.anchors is not None:
            has_lk = self.anchors.loss in ("lk", "kl_then_lk")
            used = {"rank", "alpha", "targets", "anchors"}
            used |= {"temperature", "top_k", "eta"} if has_lk else set()
            for name, value in changed_fields(self, beside=used).items():
                check(
                    False,
                    f"{name} is {value}, but means nothing beside anchors with loss "
                    f"{self.anchors.loss}: remove it",
                )


def check_drafter_run(config: TrainConfig) -> None:
    """Refuse a drafter run without a base, with Muon, or with keys that would be ignored.

    Raises:
        ConfigError: Names the key.
    """
    _check_adapter_run(config, "drafter")
    check(
        not config.activation_checkpointing,
        f"activation_checkpointing is {config.activation_checkpointing!r}, but means nothing to a "
        "drafter run: remove it",
    )
    parts: list[tuple[str, Any, set[str]]] = [
        (f"stages.{index}", stage, _USED["stages"]) for index, stage in enumerate(config.stages)
    ]
    parts += [(key, getattr(config, key), _USED[key]) for key in ("optimizer", "model", "export")]
    assert config.drafter is not None
    anchors = config.drafter.anchors
    has_embedding = anchors is not None and anchors.mask_places > 0
    for key, part, used in parts:
        if key == "optimizer" and has_embedding:
            used = used | {"embedding_learning_rate"}
        for name, value in changed_fields(part, beside=used).items():
            check(
                False, f"{key}.{name} is {value!r}, but means nothing to a drafter run: remove it"
            )


def check_lora_run(config: TrainConfig) -> None:
    """Refuse a LoRA run without a base, with Muon, or beside a drafter.

    Raises:
        ConfigError: Names the key.
    """
    check(
        config.drafter is None,
        "lora and drafter are both there, but a run trains one adapter: leave one out",
    )
    _check_adapter_run(config, "LoRA")
    rate = config.optimizer.embedding_learning_rate
    check(
        rate is None,
        f"optimizer.embedding_learning_rate is {rate}, but a LoRA run trains no embedding: "
        "remove it",
    )
    size = config.export.max_shard_size
    check(
        not changed_fields(config.export, beside={"dtype"}),
        f"export.max_shard_size is {size!r}, but an adapter is one file: remove it",
    )


def _check_adapter_run(config: TrainConfig, what: str) -> None:
    check(
        config.model.init is not None,
        f"model.init is null, but a {what} run needs the model that it is for",
    )
    check(
        config.optimizer.name == "adamw",
        f"optimizer.name is {config.optimizer.name!r} (the default), but the low-rank factors of a "
        f"{what} run need adamw: set optimizer.name to adamw",
    )


def _check_shape(part: LoraPart | DrafterPart) -> None:
    for name in ("rank", "alpha"):
        value = getattr(part, name)
        check(value > 0, f"{name} is {value}, but must be positive")
    check(bool(part.targets), "targets is empty, but must name at least one layer")
    for target in part.targets:
        check(
            target in TARGETS,
            f"targets holds {target!r}, but allowed are {', '.join(TARGETS)}",
        )
    check(
        len(set(part.targets)) == len(part.targets),
        f"targets is {list(part.targets)}, but must name each layer once",
    )
