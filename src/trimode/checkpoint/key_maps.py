"""What other families' checkpoints call things, and which of them we can be. Data, and one message.

Source: the configuration classes and state dicts of transformers 5; facts 1.4 and 1.5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of transformers that our network can be.

    Attributes:
        architecture: The class that wrote such a checkpoint, head included.
        read: Configuration fields that exist in this family only, under the same name in ours.
        fixed: Fields of ours that this family does not write down, with its values.
    """

    architecture: str
    read: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", read=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM"),
    "ministral3": Family("Ministral3ForCausalLM"),
    "qwen2": Family(
        "Qwen2ForCausalLM", fixed={"attention_bias": True, "attention_output_bias": False}
    ),
    "qwen3": Family("Qwen3ForCausalLM", read=("attention_bias",), fixed={"use_qk_norm": True}),
}

WINDOWED_FAMILIES = ("mistral", "ministral3", "qwen2", "qwen3")
"""Those whose networks read `sliding_window`; Llama's does not, whatever its configuration says."""

VISION_FAMILIES: dict[str, Family] = {"mistral3": Family("Mistral3ForConditionalGeneration")}
"""Vision-language models whose text part is one of `FAMILIES`."""

AUTO_TEXT, AUTO_VISION = "AutoModelForCausalLM", "AutoModelForImageTextToText"
"""transformers' readers of the two."""

SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "bos_token_id",
    "pad_token_id",
)
"""Configuration fields that every family has, under the same name in ours."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a checkpoint keeps its text network; names within `encoder` are the same as ours."""

    encoder: str
    head: str

    @property
    def embedding(self) -> str:
        """The embedding's name."""
        return self.encoder + EMBEDDING.removeprefix("encoder.")


TEXT_LAYOUTS = (Layout("model.", "lm_head.weight"),)
VISION_LAYOUTS = (
    Layout("language_model.model.", "language_model.lm_head.weight"),
    Layout("model.language_model.", "lm_head.weight"),
)

ROTARY_CONSTANTS = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers of old Llama checkpoints; everyone computes them."""

VISION_TENSORS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""safetensors' names of the element types that a weight may have."""

EMBEDDING, HEAD = "encoder.embed_tokens.weight", "diffusion_head.weight"
"""The two tensors of ours that have a row per token."""

VOCABULARY_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("tekken.json",),
    ("vocab.json", "merges.txt"),
)
"""Files that hold a vocabulary, a group each. Given none, transformers makes up an empty one."""

TOKENIZER_FILES = {"tokenizer_config.json"}.union(*VOCABULARY_FILES)
"""A source with any of these has a tokenizer."""

SPECIAL_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
"""Roles of configurations, generation defaults and tokenizers that a mask token must not have."""

EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Configuration fields by which a mixture of experts is known."""

NEW_MASK_TOKEN = "<|mask|>"

RESERVED_TOKENS = tuple(
    re.compile(pattern)
    for pattern in (
        r"<\|mask\|>|<mask>|\[MASK\]|<MASK>|\|<MASK>\|",
        r"<SPECIAL_100>",  # the published mask token
        r"<SPECIAL_\d+>",
        r"<\|reserved_special_token_\d+\|>",
        r"<\|?reserved_?\d+\|?>|<\|?unused_?\d+\|?>|\[unused_?\d+\]",
    )
)
"""Vocabulary slots that wait for a use, the best first."""

UNTRAINED_MARKERS: dict[str, tuple[str, ...]] = {
    "SmolLM2": (
        *("<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
        *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>"),
        *("<jupyter_script>", "<empty_output>"),
    ),
}
"""Known model -> markers of its vocabulary that it never saw in training. The first one serves as
the mask token if the embedding rows of all are one and the same, as they are where nothing was
learned."""

SAME_ROW = 0.02
"""Distance of two such rows, as a share of their length: rounding to 8 bits stays below."""

PROOF_BOUNDS: dict[torch.dtype, float] = {
    torch.float64: 1e-4,  # transformers computes norms and angles in float32 even then
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2.5e-1,
}
"""By how much logits may differ, as a share of the largest: rounding of deep networks stays well
below, a wrong tensor, angle or epsilon well above. In 16 bits this tells a wrong tensor only."""

PROBE_TEXT = "def f(x):\n\treturn 'é'  # 12 + 34 = 46, Straße 東京 🙂\n\n  <b> </b> [x] <|x|>"
"""What a saved tokenizer must read as the source's does."""


def window_refusal(place: Path, window: int, context: int) -> str:
    """Say what to do about a sliding window that is shorter than the context."""
    cut = f"; `trimode convert --max-context {window}` cuts the context to it, which is exact"
    return (
        f"{place}: sliding_window is {window}, within the context of {context}; supported: none, or"
        f" one as long as the context{cut if window > 0 else ''}"
    )
