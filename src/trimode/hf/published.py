"""The published methods: `ar_generate`, `generate` (block diffusion), `linear_spec_generate`.

Signatures are the published ones; only the published count `nfe` is made here. What the methods
share, beside what `trimode.hf` says:

* `max_new_tokens` need not be a multiple of `block_length`.
* The pad token is `config.pad_token_id`, else the stop token in force.
* `eos_token_id` replaces the config's; None means the config's.
* nfe of a batch is the largest of its rows'.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trimode.decoding import Sequence
from trimode.decoding.control import Control
from trimode.errors import RequestError, UnsupportedError
from trimode.hf.network import Network, refuse_aborted, start
from trimode.hf.prompts import as_ids, joined, one_of_two, real_tokens
from trimode.model import DrafterAdapter, NemotronLabsDiffusionConfig, modeling


class _Default(float):
    """A default that can be told apart from the same number given by the caller."""


class TriModeModel(Network):
    """The network with the published methods."""

    def ar_generate(
        self,
        prompt_ids: Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        eos_token_id: int | Iterable[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        *,
        input_ids: Tensor | None = None,
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
            input_ids: Another name of `prompt_ids`, for `**tokenizer(...)`.
            attention_mask: [B, T], nonzero where a token is real; None if all are.

        Returns:
            ids: [B, T + new] int64 on the device of `prompt_ids`, see `trimode.hf`.
            nfe: Generated tokens; the prefill is not counted (facts 3.1).

        Raises:
            RequestError: an argument is not valid, or a row does not fit the context.
            UnsupportedError: an argument asks for something that is not built.
        """
        _refuse(self.ar_generate, unknown)
        ids, sequences = self._decode(
            one_of_two("prompt_ids", prompt_ids, "input_ids", input_ids),
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
        prompt_ids: Tensor | None = None,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        threshold: float | None = _Default(0.9),  # noqa: B008  a number, nothing mutable
        causal_context: bool = True,
        temperature: float = 0.0,
        eos_token_id: int | Iterable[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        *,
        input_ids: Tensor | None = None,
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
            eos_token_id, max_thinking_tokens, end_think_token_id, input_ids, attention_mask: As in
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
            one_of_two("prompt_ids", prompt_ids, "input_ids", input_ids),
            attention_mask,
            eos_token_id=eos_token_id,
            adapter=self.placed_drafter,
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
        prompt_ids: Tensor | None = None,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        temperature: float = 0.0,
        mask_token_id: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        threshold: float = 0.0,
        *,
        input_ids: Tensor | None = None,
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
            eos_token_id, max_thinking_tokens, end_think_token_id, input_ids, attention_mask: As in
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
            one_of_two("prompt_ids", prompt_ids, "input_ids", input_ids),
            attention_mask,
            eos_token_id=eos_token_id,
            adapter=self.placed_drafter,
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
        prompt_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        eos_token_id: int | Iterable[int] | None,
        adapter: DrafterAdapter | None = None,
        temperature: float,
        block_length: int = 1,
        **options: Any,
    ) -> tuple[Tensor, list[Sequence]]:
        """Run the rows to their end: ids as the methods return them, and the finished sequences."""
        if (part := self.peft_part) is not None:
            raise UnsupportedError(
                f"{part} is wrapped by PEFT, which would colour the AR view too; attach the drafter"
                " with trimode.hf.load_drafter(model, folder) to an unwrapped model"
            )
        if prompt_ids is None:
            raise RequestError("prompt_ids is None; allowed: a non-empty integer tensor [B, T]")
        prompts = real_tokens(prompt_ids, attention_mask)
        stop_token_ids = as_ids(eos_token_id)
        seeds = [0] * len(prompts)
        if temperature:
            seeds = torch.randint(2**63 - 1, (len(prompts),), device="cpu").tolist()
        engine, sequences = start(
            self,
            prompts,
            seeds=seeds,
            adapter=adapter,
            stop_token_ids=stop_token_ids,
            temperature=temperature,
            block_length=block_length,
            **options,
        )
        engine.run()
        refuse_aborted(sequences)
        stops = self.config.eos_token_ids if stop_token_ids is None else stop_token_ids
        return joined(prompt_ids, sequences, pad_id=self._pad_id(stops)), sequences

    def _pad_id(self, stops: tuple[int, ...]) -> int:
        """What fills up rows that end early; where nothing stops a row, none does."""
        configured = getattr(self.config, "pad_token_id", None)
        if configured is not None and configured != self.config.mask_token_id:
            return configured
        return stops[0] if stops else 0


class NemotronLabsDiffusionModel(TriModeModel, modeling.NemotronLabsDiffusionModel):
    """The published name, so that what it saves names the right architecture."""

    config_class = NemotronLabsDiffusionConfig


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


def _linear_nfe(seq: Sequence) -> int:
    lengths, forwards = seq.stats.acceptance_lengths, seq.stats.forwards
    was_draft_skipped = bool(lengths) and lengths[-1] == 1 and seq.num_remaining == 0
    return 1 + forwards["draft"] + forwards["verify"] + was_draft_skipped
