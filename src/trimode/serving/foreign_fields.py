"""Fields that clients of other servers send: what is taken where it asks for nothing, and what is
taken and not used.

`NEUTRAL` fields ask for something that is not done here, so they are refused by name but for the
values below, which are those servers' own for "nothing". Null is always one of them.
"""

from __future__ import annotations

from typing import Any

Neutral = dict[str, tuple[Any, ...]]
"""Field -> values that ask for nothing, beside null."""

NEUTRAL_OF_ALL: Neutral = {"cache_prompt": (True,), "cache_salt": ()}
"""Of every request. Prompts with the same beginning share it, whoever sends them: so a client
cannot have its own part of the cache, nor a prompt that is computed anew."""

NEUTRAL: Neutral = {
    **NEUTRAL_OF_ALL,
    # OpenAI
    "best_of": (1,),
    "store": (False,),
    # vLLM and SGLang
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "stop_regex": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # the text has no special tokens
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "logits_processors": (),
    "custom_logit_processor": (),
    "custom_params": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "structured_outputs": (),
    "ebnf": (),
    "lora_path": (),
    "session_params": (),
    "priority": (0,),
    "request_id": (),
    "rid": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_hidden_states": (False,),
    # llama.cpp
    "repeat_penalty": (1,),
    "repeat_last_n": (-1,),
    "typ_p": (1,),
    "backend_sampling": (False,),
    "penalize_nl": (False,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "samplers": (),
    "min_keep": (0,),
    "n_probs": (0,),
    "n_keep": (0,),
    "n_indent": (0,),
    "t_max_predict_ms": (0,),
    "id_slot": (-1,),
    "image_data": ([],),
    "lora": ([],),
    "response_fields": ([],),
    "return_tokens": (False,),
    "post_sampling_probs": (False,),
}
"""Of completions and chats."""

NEUTRAL_OF_COMPLETIONS: Neutral = {
    **NEUTRAL,
    "suffix": ("",),
    "add_special_tokens": (True,),
    "prompt_embeds": (),
}

NEUTRAL_OF_CHATS: Neutral = {
    **NEUTRAL,
    # OpenAI
    "echo": (False,),
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM, SGLang and llama.cpp
    "add_special_tokens": (False,),
    "chat_template": (),
    "documents": ([],),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "reasoning_format": ("none", "auto"),
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
}

WINDOWS = {"repeat_last_n": ("frequency_penalty", "presence_penalty")}
"""Fields of `NEUTRAL` that are taken with any value where these others are off: they say how much
of the text the others look at."""

NEUTRAL_OF_TOKENS: Neutral = {
    **NEUTRAL_OF_ALL,
    "with_pieces": (False,),
    "chat_template": (),
    "mm_processor_kwargs": ({},),
}
"""Of requests for a text's tokens."""

AS_NULL: Neutral = {"seed": (-1,), "logit_bias": ([],), "grammar": ("",)}
"""Fields of ours -> what others write where they mean null."""

AS_NULL_IN_CHATS: Neutral = {
    **AS_NULL,
    "max_tokens": (-1,),
    "max_completion_tokens": (-1,),
    "tools": ([],),
}
"""A chat without a number has what the context leaves; a completion has 16 tokens."""

IGNORED = (
    # Labels, and what is about the service rather than the text.
    *("metadata", "safety_identifier", "service_tier"),
    # Hints at what is worth caching, and how long; every prompt is cached while there is room.
    *("cache_control", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    # What only tunes a sampler of llama.cpp that must be off (`NEUTRAL`).
    *("dry_allowed_length", "dry_base", "dry_penalty_last_n", "dry_sequence_breakers"),
    *("dynatemp_exponent", "mirostat_eta", "mirostat_tau", "xtc_threshold"),
    # What asks llama.cpp to report beside the text; its web page always asks.
    *("return_progress", "timings_per_token"),
)
"""Taken with any value, and not used."""
