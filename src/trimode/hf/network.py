"""What the classes for transformers users share: opening a checkpoint, the drafter, the engine."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimode.checkpoint.adapter import load_adapter
from trimode.checkpoint.io import check_weights, read_model_config
from trimode.decoding import GenerationParams, Sequence
from trimode.engine import Engine
from trimode.errors import CheckpointError, TriModeError, UnsupportedError
from trimode.model import DrafterAdapter, TriModeConfig, modeling
from trimode.runtime import TriModeLM


class Network(modeling.TriModeModel):
    """The network, opened strictly, with a place for a drafter.

    Attributes:
        drafter: The adapter that `load_drafter` attached, or None. Weights, not a switch: they
            act on what its form says, and never in the AR view. Not part of the state dict.
    """

    config_class = TriModeConfig
    drafter: DrafterAdapter | None

    def __init__(self, config: TriModeConfig) -> None:
        super().__init__(config)
        self.drafter = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but every tensor must be there, fit and be known.

        Raises:
            CheckpointError: tensors are missing, extra or misshapen; a local folder is checked
                before any weight is read.
        """
        path = pretrained_model_name_or_path
        if path is not None and not (kwargs.get("variant") or kwargs.get("gguf_file")):
            folder = Path(path) / kwargs.get("subfolder", "")
            if folder.is_dir():
                config = kwargs.get("config")
                if not isinstance(config, TriModeConfig):
                    config = read_model_config(folder)
                check_weights(folder, config)
        model, info = super().from_pretrained(
            path, *args, **{**kwargs, "output_loading_info": True}
        )
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                raise CheckpointError(
                    f"{path}: {len(info[kind])} {kind} ({sorted(info[kind])[:5]})"
                )
        return (model, info) if kwargs.get("output_loading_info") else model

    @property
    def placed_drafter(self) -> DrafterAdapter | None:
        """The attached adapter, following the network to wherever it was moved since."""
        if self.drafter is None:
            return None
        return self.drafter.to(device=self.device, dtype=self.dtype)

    @property
    def peft_part(self) -> str | None:
        """Name of a part that PEFT has wrapped; None if it has wrapped nothing."""
        for name, module in self.named_modules():
            if type(module).__module__.partition(".")[0] == "peft":
                return name
        return None


def load_drafter(model: Network, folder: str | Path | None) -> None:
    """Attach the drafter adapter of a PEFT LoRA folder to `model`; None detaches.

    It is on for drafts, or for what its files say it serves, which may be the passes of block
    diffusion. The network's weights and state dict stay as they are, so `save_pretrained` does not
    write it.

    Raises:
        CheckpointError: it is not a plain LoRA, or does not fit the network.
        UnsupportedError: `model` is not one of `trimode.hf`'s.
    """
    if not isinstance(model, Network):
        raise UnsupportedError(f"model is a {type(model).__name__}; supported: trimode.hf's own")
    adapter = None if folder is None else load_adapter(folder, model=model)
    object.__setattr__(model, "drafter", adapter)  # nn.Module would enter it into the state dict


def start(
    model: Network,
    prompts: Items[list[int]],
    *,
    seeds: Items[int],
    adapter: DrafterAdapter | None,
    stop_token_ids: tuple[int, ...] | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> tuple[Engine, list[Sequence]]:
    """Submit prompts to an engine of their own.

    Args:
        model: The network.
        prompts: Real tokens of each row.
        seeds: One for each row.
        adapter: The drafter, or None.
        stop_token_ids: Tokens that end a row, instead of the config's; None means the config's.
        tokenizer: For what needs one: a grammar.
        options: Of `GenerationParams`, the same for all rows.

    Raises:
        RequestError: an option is not valid, or a row does not fit the context.
    """
    lm = TriModeLM(model, tokenizer, adapter=adapter)
    sequences = [
        lm.sequence(
            prompt,
            GenerationParams(
                seed=seed,
                stop_token_ids=stop_token_ids or (),
                ignore_eos=stop_token_ids is not None,
                **options,
            ),
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return lm.engine(sequences), sequences


def refuse_aborted(sequences: Items[Sequence]) -> None:
    """Report a row that broke down.

    Raises:
        TriModeError: naming the row and why.
    """
    reasons = {
        "non_finite": "the network gave non-finite logits",
        "no_token": "what was asked for leaves no token to go on with",
    }
    for b, seq in enumerate(sequences):
        if seq.finish_reason == "abort" and seq.abort_reason in reasons:
            raise TriModeError(f"row {b} stopped: {reasons[seq.abort_reason]}")
