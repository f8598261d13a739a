"""Our network against transformers' own, with the same random weights under other names.

float32 throughout: transformers computes norms and angles in float32 whatever the model's dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trimode.errors import UnsupportedError
from trimode.model import NemotronLabsDiffusionConfig, TriModeConfig, TriModeModel
from trimode.model.modeling import MODEL_CLASSES
from trimode.runtime import TriModeLM

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
"""Logits have a standard deviation of 1.7; rounding differs by 2e-5 at most, views by 10."""

ORIGINAL_CONTEXT = 32

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}

YARN: dict[str, Any] = {
    "max_position_embeddings": 16 * ORIGINAL_CONTEXT,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}

PLAIN: dict[str, Any] = {
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}

LLAMA3: dict[str, Any] = {
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    },
}

LINEAR: dict[str, Any] = {
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names in the published layout."""
    return {
        name.replace("lm_head.", "diffusion_head.").replace("model.", "encoder.", 1): tensor
        for name, tensor in weights.items()
    }


def twins(
    config_class: type,
    model_class: type[PreTrainedModel],
    theirs_only: dict[str, Any],
    ours_only: dict[str, Any],
    *,
    our_class: type[TriModeConfig] = TriModeConfig,
) -> tuple[PreTrainedModel, TriModeModel]:
    """transformers' network with random weights, and ours with the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = model_class(config_class(**SHAPE, **theirs_only, attn_implementation="eager"))
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a mistake
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    config = our_class(**SHAPE, **ours_only, mask_token_id=258)
    ours = MODEL_CLASSES[config.model_type](config)
    state = renamed(theirs.state_dict())
    if config.tie_word_embeddings:
        state.setdefault("diffusion_head.weight", state["encoder.embed_tokens.weight"])
    assert state.keys() == ours.state_dict().keys()
    ours.load_state_dict(state)
    return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ministral() -> tuple[PreTrainedModel, TriModeModel]:
    return twins(
        Ministral3Config, Ministral3ForCausalLM, YARN, YARN, our_class=NemotronLabsDiffusionConfig
    )


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """[3, 200]: six times the original context."""
    return torch.randint(256, (3, 200), generator=torch.Generator().manual_seed(0))


def four_dimensional(allowed: Tensor) -> Tensor:
    """[B or 1, 1, T, T] float32: the mask that transformers adds to its scores."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def test_causal_view_equals_ministral(
    ministral: tuple[PreTrainedModel, TriModeModel], ids: Tensor
) -> None:
    """YaRN, the query scale or a layer computed otherwise than in the model we continue from."""
    theirs, ours = ministral
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, **TOLERANCE)
    assert expected.std() > 1


def test_positions_far_beyond_the_original_context(
    ministral: tuple[PreTrainedModel, TriModeModel], ids: Tensor
) -> None:
    """Positions counted from the start of a call instead of taken as given."""
    theirs, ours = ministral
    positions = torch.arange(300, 500)[None].expand(3, -1)
    options = {"position_ids": positions}
    if "cache_position" in inspect.signature(theirs.forward).parameters:
        options["cache_position"] = positions[0]  # older transformers scale queries by these
    expected = theirs(ids, **options).logits
    torch.testing.assert_close(ours(ids, position_ids=positions).logits, expected, **TOLERANCE)
    assert not torch.allclose(expected, theirs(ids).logits, **TOLERANCE)


def test_bidirectional_view_equals_ministral(
    ministral: tuple[PreTrainedModel, TriModeModel], ids: Tensor
) -> None:
    """A diffusion view that still hides later tokens."""
    theirs, ours = ministral
    everything = torch.ones(1, 1, 200, 200, dtype=torch.bool)
    mask = four_dimensional(everything).expand(3, -1, -1, -1)
    expected = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours(ids, pattern="bidirectional").logits, expected, **TOLERANCE)
    assert not torch.allclose(expected, ours(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
def test_padded_batch_equals_ministral(
    ministral: tuple[PreTrainedModel, TriModeModel], ids: Tensor, pattern: str, side: str
) -> None:
    """Real tokens that see padding, or whose positions count it."""
    theirs, ours = ministral
    num_tokens = 30  # within the original context, see `test_greedy_text_of_a_padded_batch`
    ids = ids[:, :num_tokens]
    is_real = torch.ones_like(ids)
    for b, num_pads in enumerate((0, 4, 11)):
        is_real[b, slice(num_pads) if side == "left" else slice(num_tokens - num_pads, None)] = 0
    allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    allowed = allowed.tril() if pattern == "causal" else allowed
    allowed = (allowed & is_real.bool()[:, None, :]) | torch.eye(num_tokens, dtype=torch.bool)
    expected = theirs(
        ids,
        attention_mask=four_dimensional(allowed[:, None]),
        position_ids=(is_real.cumsum(-1) - 1).clamp(min=0),
    ).logits
    got = ours(ids, attention_mask=is_real, pattern=pattern).logits
    real = is_real.bool()
    torch.testing.assert_close(got[real], expected[real], **TOLERANCE)
    alone = ours(ids[2][real[2]][None], pattern=pattern).logits[0]
    torch.testing.assert_close(got[2][real[2]], alone, **TOLERANCE)


@pytest.mark.parametrize(
    ("config_class", "model_class", "theirs_only", "ours_only"),
    [
        pytest.param(LlamaConfig, LlamaForCausalLM, PLAIN, PLAIN, id="llama"),
        pytest.param(LlamaConfig, LlamaForCausalLM, LLAMA3, LLAMA3, id="llama-3-rope"),
        pytest.param(LlamaConfig, LlamaForCausalLM, LINEAR, LINEAR, id="llama-linear-rope"),
        pytest.param(
            LlamaConfig,
            LlamaForCausalLM,
            PLAIN | {"attention_bias": True, "mlp_bias": True},
            PLAIN | {"attention_bias": True, "mlp_bias": True},
            id="llama-biases",
        ),
        pytest.param(
            LlamaConfig,
            LlamaForCausalLM,
            PLAIN | {"tie_word_embeddings": True},
            PLAIN | {"tie_word_embeddings": True},
            id="llama-tied",
        ),
        pytest.param(
            MistralConfig,
            MistralForCausalLM,
            PLAIN | {"sliding_window": None},
            PLAIN,
            id="mistral",
        ),
        pytest.param(
            Qwen2Config,
            Qwen2ForCausalLM,
            PLAIN,
            PLAIN | {"attention_bias": True, "attention_output_bias": False},
            id="qwen2",
        ),
        pytest.param(
            Qwen3Config,
            Qwen3ForCausalLM,
            PLAIN,
            PLAIN | {"use_qk_norm": True},
            id="qwen3",
        ),
    ],
)
def test_other_families(
    config_class: type,
    model_class: type[PreTrainedModel],
    theirs_only: dict[str, Any],
    ours_only: dict[str, Any],
    ids: Tensor,
) -> None:
    """A family whose checkpoints could be converted but would compute something else."""
    theirs, ours = twins(config_class, model_class, theirs_only, ours_only)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **TOLERANCE)
    mask = four_dimensional(torch.ones(3, 1, 200, 200, dtype=torch.bool))
    expected = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours(ids, pattern="bidirectional").logits, expected, **TOLERANCE)


def test_greedy_text_equals_transformers_generate(
    ministral: tuple[PreTrainedModel, TriModeModel],
) -> None:
    """Text that drifts from the same network's under transformers, cache and positions included."""
    theirs, ours = ministral
    prompts = [
        torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (1, 5, 17, 31, 32, 40)
    ]
    found = TriModeLM(ours, None).generate(prompts, mode="ar", max_new_tokens=40)
    assert isinstance(found, list)
    for prompt, generation in zip(prompts, found, strict=True):
        expected = _greedy(theirs, torch.tensor([prompt]), max_new_tokens=40)
        assert generation.token_ids == expected[0, len(prompt) :].tolist()


def test_greedy_text_of_a_padded_batch(ministral: tuple[PreTrainedModel, TriModeModel]) -> None:
    """Our ragged batch and transformers' left-padded one disagreeing.

    Within the original context, for how padding moves the query scale there depends on its version.
    """
    theirs, ours = ministral
    prompts = [[1, 2, 3], [40, 41, 42, 43, 44, 45, 46], [7]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    is_real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    expected = _greedy(theirs, ids, attention_mask=is_real, max_new_tokens=20)[:, longest:]
    found = TriModeLM(ours, None).generate(prompts, mode="ar", max_new_tokens=20)
    assert isinstance(found, list)
    for row, generation in zip(expected.tolist(), found, strict=True):
        end = row.index(257) + 1 if 257 in row else len(row)
        assert generation.token_ids == row[:end]


def _greedy(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, do_sample=False, suppress_tokens=[258], eos_token_id=257, pad_token_id=0, **options
    )


def test_rope_types_we_do_not_have_are_refused(tiny_config: Callable[..., TriModeConfig]) -> None:
    """An unknown RoPE computed as the default one."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedError, match="rope_type is 'dynamic'; supported: default"):
        tiny_config(rope_parameters=rope)
