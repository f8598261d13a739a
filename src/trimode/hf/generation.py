"""Translates the arguments of transformers' `generate` into ours. Nothing runs here.

Three layers say how to generate: the model's generation config, the one that is passed, and
keyword arguments; a later layer wins. A field that would change the text and is not built is
refused by its name. Fields that neither transformers nor this package knows are left alone, as
transformers leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from trimode.checkpoint.generation_defaults import NEUTRAL
from trimode.decoding import GenerationParams
from trimode.decoding.control import CONTROL_NAMES, Control
from trimode.errors import RequestError, UnsupportedError
from trimode.hf.prompts import as_ids
from trimode.model import TriModeConfig

DEFAULT_MODE = "linear"
DEFAULT_NEW_TOKENS = 20
DEFAULT_TOP_K = 50
"""The last two are transformers' own, for where no layer says anything; top-k when sampling."""

_TRANSLATED = {"max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"}
_UNSAID = {
    *("seed", "stop", "stop_token_ids", "ignore_eos", "control", "logprobs", "prompt_logprobs"),
    "min_tokens",
}
_ALL_NAMES = (*(field.name for field in fields(GenerationParams)), *CONTROL_NAMES)
OUR_NAMES = tuple(name for name in _ALL_NAMES if name not in _TRANSLATED | _UNSAID)
"""Our own arguments: `mode`, `block_length` and the others, under their names everywhere."""

HONOURED = {
    *_TRANSLATED,
    *OUR_NAMES,
    *("max_length", "max_time", "stop_strings", "do_sample", "num_return_sequences"),
    *("return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id"),
}
HAS_MIN_TOKENS = "min_tokens" in _ALL_NAMES
if HAS_MIN_TOKENS:
    HONOURED |= {"min_length", "min_new_tokens"}

HARMLESS = {
    *("use_cache", "max_cache_len", "low_memory", "compile_config", "disable_compile"),
    *("prefill_chunk_size", "continuous_batching_config", "transformers_version"),
    *("early_stopping", "length_penalty", "renormalize_logits", "decoder_start_token_id"),
    *("max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
}
"""Fields that change no text here: how transformers' loop runs, or parts of what is refused."""

_NEUTRAL = {**NEUTRAL, "num_beam_groups": (1,), "diversity_penalty": (0,)}
_HINTS = {
    "prompt_lookup_num_tokens": "; lookup=True makes drafts of the text's own repetitions",
    "num_beams": "; do_sample=True with num_return_sequences gives several texts",
    "output_scores": "; forward gives the logits",
    "output_logits": "; forward gives the logits",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of `generate`, in our words.

    Attributes:
        options: Of `GenerationParams`, the same for all rows; without seed and stop tokens.
        is_sampled: Whether rows draw seeds.
        eos_token_ids: Tokens that end a row.
        pad_token_id: Fills rows that end early.
        num_return_sequences: Texts for each prompt.
        is_dict_wanted: Whether the result is transformers' output object.
        criteria: Called after every token.
        tokenizer: As given; None if none was.
    """

    options: dict[str, Any]
    is_sampled: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    num_return_sequences: int
    is_dict_wanted: bool
    criteria: StoppingCriteriaList
    tokenizer: PreTrainedTokenizerBase | None


def merged(
    own: GenerationConfig, given: GenerationConfig | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Every field in force, None where no layer says anything.

    Args:
        own: The model's.
        given: The argument `generation_config`.
        arguments: Keyword arguments; None among them unsets what the layers below say.

    Raises:
        RequestError: `generation_config` is something else, or an argument has no such field.
        UnsupportedError: a field that is not built has a value that changes the text.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise RequestError(
            f"generation_config is a {type(given).__name__}; allowed: None or a GenerationConfig"
        )
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in arguments:
        if name not in known and name not in HONOURED:
            raise RequestError(
                f"generate does not take {name}; beside transformers' arguments it takes"
                f" {', '.join(OUR_NAMES)}"
            )
    layers = [vars(own), {} if given is None else vars(given)]
    values = {
        name: next((v for layer in reversed(layers) if (v := layer.get(name)) is not None), None)
        for name in known | HONOURED
    }
    values |= arguments
    if values["top_k"] is None and "top_k" not in arguments:
        values["top_k"] = DEFAULT_TOP_K
    _settle_length(values, [*layers, arguments])
    for name in sorted(known - HONOURED - HARMLESS):
        _refuse_unbuilt(name, values[name])
    return values


def translated(
    values: Mapping[str, Any],
    *,
    config: TriModeConfig,
    num_prompt: int,
    criteria: list[StoppingCriteria] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    is_peft: bool,
) -> Request:
    """What was asked for, in our words.

    Args:
        values: See `merged`.
        config: The model's.
        num_prompt: Tokens of the prompt, padding included; `max_length` counts them.
        criteria: The caller's; one of a kind that a field stands for replaces that field.
        tokenizer: The caller's, for stop strings and grammars.
        is_peft: Whether PEFT has wrapped the network, which then decodes in mode `ar` only.

    Raises:
        RequestError: a value is not valid.
        UnsupportedError: a mode that a model wrapped by PEFT does not have.
    """
    criteria = StoppingCriteriaList(criteria or [])
    is_sampled = values["do_sample"] or False
    if not isinstance(is_sampled, bool):
        raise RequestError(f"do_sample is {is_sampled!r}; allowed: None, True or False")
    options = {
        name: values[name]
        for name in OUR_NAMES
        if values[name] is not None and values[name] not in _NEUTRAL.get(name, ())
    }
    control = {name: options.pop(name) for name in CONTROL_NAMES if name in options}
    if values["repetition_penalty"] is not None:
        control["repetition_penalty"] = float(values["repetition_penalty"])
    if HAS_MIN_TOKENS:
        min_tokens = _min_tokens(values, num_prompt)
        (control if "min_tokens" in CONTROL_NAMES else options)["min_tokens"] = min_tokens
    options["control"] = Control.of(control)
    options["mode"] = _mode(options.get("mode"), is_peft=is_peft)
    if options["mode"] == "ar" and "block_length" in options:
        raise RequestError(f"block_length is {options['block_length']}; mode 'ar' has no blocks")
    options.setdefault("block_length", config.block_size)
    options |= _sampling(values) if is_sampled else {"temperature": 0.0}
    options["max_new_tokens"] = _max_new_tokens(values, criteria, config, num_prompt)
    if values["stop_strings"] is not None and not _has(criteria, StopStringCriteria):
        if tokenizer is None:
            raise RequestError("tokenizer is None; stop_strings need it: generate(tokenizer=...)")
        criteria.append(StopStringCriteria(tokenizer, values["stop_strings"]))
    if values["max_time"] is not None and not _has(criteria, MaxTimeCriteria):
        criteria.append(MaxTimeCriteria(values["max_time"]))
    ends = as_ids(values["eos_token_id"]) or ()
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ends = as_ids(criterion.eos_token_id) or ()
    num_sequences = 1 if values["num_return_sequences"] is None else values["num_return_sequences"]
    is_count = type(num_sequences) is int and num_sequences >= 1
    if not is_count or (num_sequences > 1 and not is_sampled):
        allowed = "an integer of at least 1" if is_sampled else "1 without do_sample=True"
        raise RequestError(f"num_return_sequences is {num_sequences!r}; allowed: {allowed}")
    return Request(
        options=options,
        is_sampled=is_sampled,
        eos_token_ids=ends,
        pad_token_id=_pad_id(values["pad_token_id"], ends, config),
        num_return_sequences=num_sequences,
        is_dict_wanted=values["return_dict_in_generate"] is True,
        criteria=criteria,
        tokenizer=tokenizer,
    )


def _settle_length(values: dict[str, Any], layers: list[Mapping[str, Any]]) -> None:
    """The latest layer that has a length decides; in one layer new tokens win, as elsewhere."""
    for layer in reversed(layers):
        given = [name for name in ("max_new_tokens", "max_length") if layer.get(name) is not None]
        if given:
            values["max_new_tokens"] = values["max_length"] = None
            values[given[0]] = layer[given[0]]
            return


def _refuse_unbuilt(name: str, value: Any) -> None:
    neutral = _NEUTRAL.get(name, ())
    if value is None or value is False or value in neutral:
        return
    supported = " or ".join(map(repr, neutral)) or "None"
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise UnsupportedError(f"{name} is {shown}; supported: {supported}{_HINTS.get(name, '')}")


def _mode(mode: str | None, *, is_peft: bool) -> str:
    if not is_peft:
        return DEFAULT_MODE if mode is None else mode
    if mode not in (None, "ar"):
        raise UnsupportedError(
            f"mode is {mode!r}; supported for a model wrapped by PEFT: 'ar', since its adapter acts"
            " in every view; merge it, or attach a drafter with trimode.hf.load_drafter"
        )
    return "ar"


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    temperature = 1.0 if values["temperature"] is None else values["temperature"]
    if temperature == 0:
        raise RequestError(
            f"temperature is {temperature!r}; allowed with do_sample=True: more than 0;"
            " do_sample=False is greedy"
        )
    top_k, top_p = values["top_k"], values["top_p"]
    return {
        "temperature": temperature,
        "top_k": None if top_k == 0 else top_k,
        "top_p": None if top_p == 1 else top_p,
    }


def _max_new_tokens(
    values: Mapping[str, Any],
    criteria: StoppingCriteriaList,
    config: TriModeConfig,
    num_prompt: int,
) -> Any:
    max_length = values["max_length"]
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            max_length = criterion.max_length
    if max_length is None or (
        values["max_new_tokens"] is not None and not _has(criteria, MaxLengthCriteria)
    ):
        room = max(config.max_position_embeddings - num_prompt, 1)
        default = min(DEFAULT_NEW_TOKENS, room)
        return default if values["max_new_tokens"] is None else values["max_new_tokens"]
    if type(max_length) is not int or max_length <= num_prompt:
        raise RequestError(
            f"max_length is {max_length!r}; allowed: more than the {num_prompt} tokens of the"
            " prompt, which it counts; max_new_tokens does not"
        )
    return max_length - num_prompt


def _min_tokens(values: Mapping[str, Any], num_prompt: int) -> int:
    if values["min_new_tokens"] is not None:
        return values["min_new_tokens"]
    return max((values["min_length"] or 0) - num_prompt, 0)


def _pad_id(pad_token_id: Any, ends: tuple[int, ...], config: TriModeConfig) -> int:
    if pad_token_id is None or pad_token_id == config.mask_token_id:
        return ends[0] if ends else 0
    if type(pad_token_id) is not int or not 0 <= pad_token_id < config.vocab_size:
        raise RequestError(
            f"pad_token_id is {pad_token_id!r}; allowed: None, or 0 to {config.vocab_size - 1}"
        )
    return pad_token_id


def _has(criteria: StoppingCriteriaList, kind: type[StoppingCriteria]) -> bool:
    return any(type(criterion) is kind for criterion in criteria)
