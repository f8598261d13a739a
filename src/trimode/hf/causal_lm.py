"""The network with transformers' own manners: `generate` returns ids, `forward` takes labels.

`AutoModelForCausalLM` opens it. Training sees the AR view alone; generating has every mode. For one
seed every mode but `diffusion` writes the same text in float32, and in the native step. Through
torch in float16 or bfloat16 tokens of nearly the same probability may change places between modes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from trimode.errors import RequestError, UnsupportedError
from trimode.hf.backbone import CACHE_FIELD, Backbone, causal_mask, checked_inputs
from trimode.hf.columns import run_columns
from trimode.hf.generation import merged, translated
from trimode.hf.network import Network, refuse_aborted, start
from trimode.hf.prompts import joined, one_of_two, real_tokens
from trimode.model import NemotronLabsDiffusionConfig

_LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")


class TriModeForCausalLM(Network, GenerationMixin):
    """The network as a causal language model of transformers.

    Attributes:
        gradient_checkpointing: Whether the backward recomputes layers; set by
            `gradient_checkpointing_enable()`.
        architecture: What `config.json` names, which is what other engines know.
    """

    architecture = "TriModeModel"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    @property
    def base_model(self) -> Backbone:
        """The network up to its head, for trainers that apply the head in chunks."""
        return Backbone(self, checkpointing=self.gradient_checkpointing and self.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache: Cache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the AR view, and its loss.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], or [B, cached + T] with a cache; nonzero where a token is real.
            position_ids: [B, T] int64. By default counted over the real tokens. Without a mask,
                several texts in one row, each with its own positions, do not see each other.
            past_key_values, cache: A `DynamicCache`, which is extended; two names of one argument.
            inputs_embeds: Not built.
            labels: [B, T] int64, not shifted; -100 is left out.
            use_cache: Whether to return a cache; None means only if one is given.
            logits_to_keep: So many last positions, or their indices; 0 keeps all.
            options: `num_items_in_batch`, `shift_labels` and `ignore_index` of transformers' loss.
                Others only where they change nothing.

        Returns:
            `logits` [B, kept, V], `loss` with labels; the cache, if there is one.

        Raises:
            RequestError: no tokens, or an argument that it does not take.
            UnsupportedError: embeddings, or a cache with packed weights or of another kind.
        """
        loss_arguments = {name: options.pop(name) for name in _LOSS_ARGUMENTS if name in options}
        kept: slice | Tensor
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        else:
            kept = logits_to_keep
        cache = one_of_two("past_key_values", past_key_values, "cache", cache)
        if self.native is None:
            body = self.base_model(
                input_ids,
                attention_mask,
                position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **options,
            )
            cache = body.get(CACHE_FIELD)
            logits = self.diffusion_head(body.last_hidden_state[:, kept])
        else:
            ids = checked_inputs(input_ids, attention_mask, inputs_embeds, options)
            is_whole = attention_mask is not None or causal_mask(ids, None, position_ids) is None
            if cache is not None or use_cache or not is_whole:
                what = "past_key_values" if is_whole else "several texts in a row"
                raise UnsupportedError(
                    f"{what} with packed weights; supported: plain weights, model.pack('plain')"
                )
            logits = super().forward(ids, attention_mask, position_ids).logits[:, kept]
        loss = None
        if labels is not None or loss_arguments.get("shift_labels") is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: cache})

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: Callable[..., Any] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        **arguments: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue prompts, in any mode; arguments and defaults are transformers'.

        Args:
            inputs, input_ids: [B, T] int64, one of the two; without either, BOS alone.
            generation_config: Over the model's own.
            stopping_criteria: Called after every token, with ids so far and no scores. The text
                ends where one says so, in every mode.
            streamer: Gets the prompt, then new tokens [B], then `end()`.
            attention_mask: [B, T], nonzero where a token is real. None: all but pad tokens, where
                there is a pad token that ends no text.
            tokenizer: For `stop_strings` and grammars.
            arguments: Fields of a generation config, and ours: `mode` (default `linear`; `ar` for a
                model wrapped by PEFT, which has no other), `block_length` and so on, see
                `trimode.generate`. Without a length, 20 new tokens.
            logits_processor, prefix_allowed_tokens_fn, synced_gpus, assistant_model,
            negative_prompt_ids, negative_prompt_attention_mask, custom_generate: Not built.

        Returns:
            [B * num_return_sequences, T + new] int64: prompts as given, new tokens, pads. With
            `return_dict_in_generate`, transformers' output object, of which only `sequences` is
            there.

        Raises:
            RequestError: an argument is not valid, or a row does not fit the context.
            UnsupportedError: an argument asks for something that is not built.
        """
        _refuse_parts(
            logits_processor=logits_processor,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            custom_generate=custom_generate,
            **{name: arguments.pop(name) for name in _PARTS if name in arguments},
        )
        token_type_ids = arguments.pop("token_type_ids", None)
        if token_type_ids is not None and bool((token_type_ids != 0).any()):
            raise UnsupportedError("token_type_ids has other ids than 0; supported: None, or zeros")
        values = merged(self.generation_config, generation_config, arguments)
        ids = one_of_two("inputs", inputs, "input_ids", input_ids)
        if ids is None:
            ids = self._bos(values["bos_token_id"])
        if attention_mask is None:
            attention_mask = _mask_of(ids, values["pad_token_id"], values["eos_token_id"])
        prompts = real_tokens(ids, attention_mask, name="input_ids")
        request = translated(
            values,
            config=self.config,
            num_prompt=ids.shape[1],
            criteria=stopping_criteria,
            tokenizer=tokenizer,
            is_peft=self.peft_part is not None,
        )
        num_rows = len(prompts) * request.num_return_sequences
        prompts = [ids for ids in prompts for _ in range(request.num_return_sequences)]
        ids = ids.long().repeat_interleave(request.num_return_sequences, dim=0)
        seeds = [0] * num_rows
        if request.is_sampled:
            seeds = torch.randint(2**63 - 1, (num_rows,), device="cpu").tolist()
        is_own_end = set(request.eos_token_ids) == set(self.config.eos_token_ids)
        control = request.options["control"]
        wants_text = control.source is not None or control.max_thinking_tokens is not None
        engine, sequences = start(
            self,
            prompts,
            seeds=seeds,
            adapter=self.placed_drafter,
            stop_token_ids=None if is_own_end else request.eos_token_ids,
            tokenizer=tokenizer if wants_text else None,
            **request.options,
        )
        if request.criteria or streamer is not None:
            ids = run_columns(
                engine,
                sequences,
                ids,
                pad_id=request.pad_token_id,
                criteria=request.criteria,
                streamer=streamer,
            )
        else:
            engine.run()
            refuse_aborted(sequences)
            ids = joined(ids, sequences, pad_id=request.pad_token_id)
        return GenerateDecoderOnlyOutput(sequences=ids) if request.is_dict_wanted else ids

    def _bos(self, bos_token_id: int | None) -> Tensor:
        """[1, 1]: the prompt where none is given."""
        if bos_token_id is None:
            raise RequestError("input_ids is None; allowed: a tensor, since there is no BOS token")
        return torch.tensor([[bos_token_id]], device=self.device)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, but `config.json` names the published architecture.

        Raises:
            UnsupportedError: `push_to_hub` is set; the method of that name does it.
        """
        if kwargs.pop("push_to_hub", False):
            raise UnsupportedError(
                "push_to_hub is True; supported: False; model.push_to_hub(repo_id) uploads"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.architectures = [self.architecture]
        if kwargs.get("is_main_process", True):
            self.config.save_pretrained(save_directory)


class NemotronLabsDiffusionForCausalLM(TriModeForCausalLM):
    """The same under the published model type."""

    config_class = NemotronLabsDiffusionConfig
    architecture = "NemotronLabsDiffusionModel"


_PARTS = (
    *("past_key_values", "cache", "inputs_embeds", "position_ids", "assistant_tokenizer"),
    *("encoder_outputs", "trust_remote_code", "use_model_defaults"),
)
"""Keyword arguments of transformers' `generate` that are no fields of a generation config."""


def _refuse_parts(**parts: Any) -> None:
    """Refuse what replaces parts of transformers' loop, which is not ours."""
    for name, value in parts.items():
        is_empty = isinstance(value, (list, tuple)) and not value
        if not (value is None or value is False or is_empty):
            what = value if isinstance(value, (bool, str)) else f"a {type(value).__name__}"
            raise UnsupportedError(f"{name} is {what}; supported: None")


def _mask_of(ids: Tensor, pad_token_id: Any, eos_token_id: Any) -> Tensor | None:
    """[B, T]: all but pad tokens; None where the pad token may be text."""
    ends = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    if type(pad_token_id) is not int or pad_token_id in ends or not isinstance(ids, Tensor):
        return None
    return None if bool((ids == pad_token_id).all()) else (ids != pad_token_id).long()
