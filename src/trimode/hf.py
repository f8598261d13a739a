"""For transformers users: registration of our model types, and the published methods.

After `import trimode.hf`, `AutoConfig`, `AutoModel` and `AutoTokenizer` open a published
(`nemotron_labs_diffusion`) or an exported (`trimode`) checkpoint without `trust_remote_code`, and
the model has `ar_generate`, `generate` (block diffusion) and `linear_spec_generate` with the
published signatures. They are thin over the engine; only the published count `nfe` is made here.

What the three methods share:

* Rows of a batch may end at different times. Row b of the result is `prompt_ids[b]` as given,
  padding included, then its new tokens, then the pad token (`config.pad_token_id`, else the stop
  token in force) up to the longest row. The mask token is never emitted. No row has more than
  `max_new_tokens` new tokens, which need not be a multiple of `block_length`.
* `attention_mask` says which tokens of the prompt are real; padding on either side changes nothing.
* Every row draws a seed from torch's global generator when `temperature` is above 0, so
  `torch.manual_seed` reproduces a call; greedy decoding draws nothing.
* `eos_token_id` replaces the config's; None means the config's.
* nfe of a batch is the largest of its rows'.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from trimode.checkpoint.adapter import load_adapter
from trimode.checkpoint.io import check_weights, read_model_config
from trimode.decoding import GenerationParams, Sequence
from trimode.decoding.control import Control
from trimode.errors import CheckpointError, RequestError, TriModeError, UnsupportedError
from trimode.model import DrafterAdapter, NemotronLabsDiffusionConfig, TriModeConfig, modeling
from trimode.runtime import TriModeLM

__all__ = [
    "NemotronLabsDiffusionConfig",
    "NemotronLabsDiffusionModel",
    "TriModeConfig",
    "TriModeModel",
    "load_drafter",
    "preset",
]

preset = NemotronLabsDiffusionConfig.preset
"""`preset("3b")`, `"8b"`, `"14b"`: configuration of the published text models."""


class _Default(float):
    """A default that can be told apart from the same number given by the caller."""


class TriModeModel(modeling.TriModeModel):
    """The network with the published methods.

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

    def ar_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        eos_token_id: int | Iterable[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        **unknown: Any,
    ) -> tuple[Tensor, int]:
        """Continue prompts token by token.

        Args:
            prompt_ids: [B, T] int64.
            max_new_tokens: At most so many tokens a row.
            temperature: 0 is greedy.
            eos_token_id: Token or tokens that end a row.
            max_thinking_tokens: After so many new tokens without the end of thought, that is the
                next one (facts 3.6), part of the result and of what follows. None: no budget.
            end_think_token_id: The end of thought, to be given with a budget and only then.
            attention_mask: [B, T], nonzero where a token is real; None if all are.

        Returns:
            ids: [B, T + new] int64 on the device of `prompt_ids`, see the module's docstring.
            nfe: Generated tokens; the prefill is not counted (facts 3.1).

        Raises:
            RequestError: an argument is not valid, or a row does not fit the context.
            UnsupportedError: an argument asks for something that is not built.
        """
        _refuse(self.ar_generate, unknown)
        ids, sequences = self._decode(
            prompt_ids,
            attention_mask,
            eos_token_id=eos_token_id,
            control=_thinking(max_thinking_tokens, end_think_token_id),
            mode="ar",
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        return ids, max(len(seq.new_ids) for seq in sequences)

    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        threshold: float | None = _Default(0.9),  # noqa: B008  a number, nothing mutable
        causal_context: bool = True,
        temperature: float = 0.0,
        eos_token_id: int | Iterable[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        steps: int | None = None,
        **unknown: Any,
    ) -> tuple[Tensor, int]:
        """Continue prompts by block diffusion.

        Args:
            prompt_ids, max_new_tokens, temperature: As in `ar_generate`.
            block_length: None means the config's `block_size`, 32 in the published models.
            threshold: A pass reveals every position at least this confident, and always the best.
                None: the even schedule of `steps` alone.
            causal_context: Only True is built.
            eos_token_id, max_thinking_tokens, end_think_token_id, attention_mask: As in
                `ar_generate`.
            steps: Passes per block, spread evenly. Given alone it turns the threshold off; given
                with a threshold it is the floor of what each pass reveals. With `threshold=None`
                it is `block_length` unless given: one token a pass.

        Returns:
            ids: [B, T + new] int64, as in `ar_generate`.
            nfe: Denoising forwards, plus one commit for every block begun, the last one's included
                although the engine skips it; the prefill is not counted (facts 3.2).

        Raises:
            RequestError, UnsupportedError: As in `ar_generate`.
        """
        _refuse(self.generate, unknown)
        if causal_context is not True:
            raise UnsupportedError(f"causal_context is {causal_context!r}; supported: True")
        block_length = self.config.block_size if block_length is None else block_length
        if isinstance(threshold, _Default):
            threshold = None if steps is not None else float(threshold)
        elif threshold is None and steps is None:
            steps = block_length
        ids, sequences = self._decode(
            prompt_ids,
            attention_mask,
            eos_token_id=eos_token_id,
            adapter=self._placed_drafter(),
            control=_thinking(max_thinking_tokens, end_think_token_id),
            mode="diffusion",
            max_new_tokens=max_new_tokens,
            block_length=block_length,
            threshold=threshold,
            steps=steps,
            temperature=temperature,
        )
        # Every block begins with a token already emitted, so the tokens tell how many were begun.
        return ids, max(
            seq.stats.forwards["denoise"] + -(-len(seq.new_ids) // block_length)
            for seq in sequences
        )

    def linear_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        temperature: float = 0.0,
        mask_token_id: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        threshold: float = 0.0,
        *,
        attention_mask: Tensor | None = None,
        **unknown: Any,
    ) -> tuple[Tensor, int]:
        """Continue prompts by linear self-speculation: for one seed, the tokens of `ar_generate`.

        Drafts are blocks, as published, also by an adapter that was trained for masks that skip
        the bonus.

        Args:
            prompt_ids, max_new_tokens, temperature: As in `ar_generate`.
            block_length: As in `generate`; `block_length - 1` tokens are drafted a round.
            mask_token_id: None or the config's.
            eos_token_id, max_thinking_tokens, end_think_token_id, attention_mask: As in
                `ar_generate`.
            threshold: 0 drafts in one pass; above, each pass keeps what is at least this
                confident, and always the best.

        Returns:
            ids: [B, T + new] int64, as in `ar_generate`.
            nfe: 1 for the prefill, plus drafts, plus verifies (facts 3.3). Where one token remains
                the engine has nothing to draft; the published code drafts all the same, and so it
                counts.

        Raises:
            RequestError, UnsupportedError: As in `ar_generate`.
        """
        _refuse(self.linear_spec_generate, unknown)
        if mask_token_id not in (None, self.config.mask_token_id):
            raise UnsupportedError(
                f"mask_token_id is {mask_token_id!r}; supported: None or the model's own,"
                f" {self.config.mask_token_id}"
            )
        ids, sequences = self._decode(
            prompt_ids,
            attention_mask,
            eos_token_id=eos_token_id,
            adapter=self._placed_drafter(),
            control=_thinking(max_thinking_tokens, end_think_token_id),
            mode="linear",
            draft_form="block",
            max_new_tokens=max_new_tokens,
            block_length=self.config.block_size if block_length is None else block_length,
            threshold=threshold,
            temperature=temperature,
        )
        return ids, max(map(_linear_nfe, sequences))

    def _decode(
        self,
        prompt_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        eos_token_id: int | Iterable[int] | None,
        adapter: DrafterAdapter | None = None,
        temperature: float,
        block_length: int = 1,
        **options: Any,
    ) -> tuple[Tensor, list[Sequence]]:
        """Run the rows to their end: ids as the methods return them, and the finished sequences."""
        _refuse_peft(self)
        prompts = _real_tokens(prompt_ids, attention_mask)
        stop_token_ids = _as_ids(eos_token_id)
        seeds = [0] * len(prompts)
        if temperature:
            seeds = torch.randint(2**63 - 1, (len(prompts),), device="cpu").tolist()
        lm = TriModeLM(self, None, adapter=adapter)
        sequences = [
            lm.sequence(
                prompt,
                GenerationParams(
                    seed=seed,
                    temperature=temperature,
                    block_length=block_length,
                    stop_token_ids=stop_token_ids or (),
                    ignore_eos=stop_token_ids is not None,
                    **options,
                ),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        engine = lm.engine(sequences)
        engine.run()
        aborted = [b for b, seq in enumerate(sequences) if seq.finish_reason == "abort"]
        if aborted:
            raise TriModeError(f"row {aborted[0]} stopped: the network gave non-finite logits")
        stops = self.config.eos_token_ids if stop_token_ids is None else stop_token_ids
        return _joined(prompt_ids, sequences, pad_id=self._pad_id(stops)), sequences

    def _pad_id(self, stops: tuple[int, ...]) -> int:
        """What fills up rows that end early; where nothing stops a row, none does."""
        configured = getattr(self.config, "pad_token_id", None)
        if configured is not None and configured != self.config.mask_token_id:
            return configured
        return stops[0] if stops else 0

    def _placed_drafter(self) -> DrafterAdapter | None:
        """The attached adapter, following the network to wherever it was moved since."""
        if self.drafter is None:
            return None
        return self.drafter.to(device=self.device, dtype=self.dtype)


class NemotronLabsDiffusionModel(TriModeModel, modeling.NemotronLabsDiffusionModel):
    """The published name, so that what it saves names the right architecture."""

    config_class = NemotronLabsDiffusionConfig


def load_drafter(model: TriModeModel, folder: str | Path | None) -> None:
    """Attach the drafter adapter of a PEFT LoRA folder to `model`; None detaches.

    It is on for the drafts of `linear_spec_generate`, or for what its files say it serves, which
    may be the passes of `generate`. The network's weights and state dict stay as they are, so
    `save_pretrained` does not write it.

    Raises:
        CheckpointError: it is not a plain LoRA, or does not fit the network.
        UnsupportedError: `model` is not one of this module's.
    """
    if not isinstance(model, TriModeModel):
        raise UnsupportedError(f"model is a {type(model).__name__}; supported: trimode.hf's own")
    adapter = None if folder is None else load_adapter(folder, model=model)
    object.__setattr__(model, "drafter", adapter)  # nn.Module would enter it into the state dict


def _refuse(method: Any, unknown: dict[str, Any]) -> None:
    """Refuse arguments that the method does not know."""
    if unknown:
        allowed = [name for name in inspect.signature(method).parameters if name != "unknown"]
        raise RequestError(
            f"{method.__name__} does not take {', '.join(unknown)}; it takes {', '.join(allowed)}"
        )


def _thinking(budget: int | None, end: int | None) -> Control:
    """As published, with the checks of `Control`."""
    return Control(max_thinking_tokens=budget, end_think_token_id=end)


def _refuse_peft(model: TriModeModel) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UnsupportedError(
                f"{name} is wrapped by PEFT, which would colour the AR view too; attach the drafter"
                " with trimode.hf.load_drafter(model, folder) to an unwrapped model"
            )


def _as_ids(eos_token_id: int | Iterable[int] | None) -> tuple[int, ...] | None:
    if eos_token_id is None:
        return None
    ids = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    ids = tuple(ids) if isinstance(ids, (list, tuple, set)) else (ids,)
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise RequestError(f"eos_token_id is {eos_token_id!r}; allowed: None, an id, or ids")
    return ids


def _real_tokens(prompt_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding."""
    is_ids = isinstance(prompt_ids, Tensor) and not prompt_ids.is_floating_point()
    if not is_ids or prompt_ids.dim() != 2 or 0 in prompt_ids.shape:
        what = tuple(prompt_ids.shape) if is_ids else type(prompt_ids).__name__
        raise RequestError(f"prompt_ids is {what}; allowed: a non-empty integer tensor [B, T]")
    if attention_mask is None:
        return prompt_ids.tolist()
    is_mask = isinstance(attention_mask, Tensor) and attention_mask.shape == prompt_ids.shape
    if not is_mask or not ((attention_mask == 0) | (attention_mask == 1)).all():
        what = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else "no tensor"
        raise RequestError(
            f"attention_mask is {what}; allowed: ones and zeros of the shape of prompt_ids,"
            f" {tuple(prompt_ids.shape)}"
        )
    prompts = []
    for b, (ids, is_real) in enumerate(
        zip(prompt_ids.tolist(), attention_mask.bool().tolist(), strict=True)
    ):
        where = [t for t, real in enumerate(is_real) if real]
        if not where or where[-1] - where[0] + 1 != len(where):
            raise RequestError(
                f"attention_mask row {b} is {[int(real) for real in is_real]}; allowed: one run of"
                " real tokens, padded left or right"
            )
        prompts.append(ids[where[0] : where[-1] + 1])
    return prompts


def _joined(prompt_ids: Tensor, sequences: list[Sequence], *, pad_id: int) -> Tensor:
    """[B, T + new] int64: prompts as given, new tokens, pads."""
    longest = max(len(seq.new_ids) for seq in sequences)
    new = [seq.new_ids + [pad_id] * (longest - len(seq.new_ids)) for seq in sequences]
    return torch.cat((prompt_ids.long(), torch.tensor(new, device=prompt_ids.device)), dim=1)


def _linear_nfe(seq: Sequence) -> int:
    lengths, forwards = seq.stats.acceptance_lengths, seq.stats.forwards
    was_draft_skipped = bool(lengths) and lengths[-1] == 1 and seq.num_remaining == 0
    return 1 + forwards["draft"] + forwards["verify"] + was_draft_skipped


def _register(config_class: type[TriModeConfig], model_class: type[TriModeModel]) -> None:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoTokenizer.register(
        config_class, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True
    )


_register(TriModeConfig, TriModeModel)
_register(NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel)
