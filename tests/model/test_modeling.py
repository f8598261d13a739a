"""The network itself: published shapes, the query scale, and views that are arguments only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.errors import ConfigError, UnsupportedError
from trimode.model import (
    AdapterSwitch,
    DrafterAdapter,
    NemotronLabsDiffusionConfig,
    TriModeConfig,
    TriModeModel,
)
from trimode.model.modeling import MODEL_CLASSES, Rotary

Model = Callable[..., TriModeModel]


# The published shapes (facts 1.1, 1.4 and 7)


@pytest.mark.parametrize(
    ("name", "num_tensors", "billions", "hidden", "inner", "theta"),
    [
        ("3b", 237, 3.83, 3072, 9216, 1e6),
        ("8b", 309, 8.49, 4096, 14336, 1e6),
        ("14b", 363, 13.51, 5120, 16384, 1e9),
    ],
)
def test_presets_have_the_published_tensors(
    name: str, num_tensors: int, billions: float, hidden: int, inner: int, theta: float
) -> None:
    """A published checkpoint that would not load: another name, shape or number of tensors."""
    config = NemotronLabsDiffusionConfig.preset(name)
    assert config.rope_parameters["rope_theta"] == theta
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = {
        "encoder.embed_tokens.weight": (131072, hidden),
        "encoder.norm.weight": (hidden,),
        "diffusion_head.weight": (131072, hidden),
    }
    for i in range((num_tensors - 3) // 9):
        expected |= {
            f"encoder.layers.{i}.{key}.weight": shape
            for key, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (4096, hidden),
                "self_attn.k_proj": (1024, hidden),
                "self_attn.v_proj": (1024, hidden),
                "self_attn.o_proj": (hidden, 4096),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }
    assert len(shapes) == num_tensors
    assert shapes == expected
    total = sum(parameter.numel() for parameter in model.parameters())
    assert round(total / 1e9, 2) == billions


def test_preset_carries_the_published_fields() -> None:
    """A field of the published config.json with another value, or missing from what we write."""
    written = NemotronLabsDiffusionConfig.preset("8b").to_dict()
    published = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "max_position_embeddings": 262144,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 11,
        "mask_token_id": 100,
        "block_size": 32,
        "tie_word_embeddings": False,
        "dlm_paradigm": "bidirectional",
        "ar_loss_weight": 1.0,
        "dlm_loss_weight": None,
        "dp_varying_mask_ratio": False,
        "model_type": "nemotron_labs_diffusion",
    }
    assert {key: written[key] for key in published} == published


def test_published_names_of_the_attention_factor() -> None:
    """YaRN's 0.1 ln(factor) + 1 applied although mscale equals mscale_all_dim."""
    rotary = Rotary(NemotronLabsDiffusionConfig.preset("8b"))
    angles = rotary(torch.tensor([0]), torch.float64)
    assert angles.cos.equal(torch.ones(1, 1, 128, dtype=torch.float64))


@pytest.mark.parametrize(
    ("position", "scale"),
    [
        (0, 1.0),
        (16383, 1.0),
        (16384, 1.0693147180559945),  # 1 + 0.1 ln 2
        (32767, 1.0693147180559945),
        (32768, 1.1098612288668110),  # 1 + 0.1 ln 3
        (262143, 1.2772588722239780),  # 1 + 0.1 ln 16
    ],
)
def test_query_scale(position: int, scale: float) -> None:
    """A scale that sets in a token early, or grows within a span (facts 1.3 and 7)."""
    rotary = Rotary(NemotronLabsDiffusionConfig.preset("8b"))
    found = rotary(torch.tensor([position]), torch.float64).query_scale
    assert found is not None
    assert found.shape == (1, 1, 1)
    assert found.item() == (1.0 if scale == 1.0 else pytest.approx(scale, rel=1e-6))


def test_no_query_scale_without_beta(tiny_config: Callable[..., TriModeConfig]) -> None:
    """Llama and Qwen getting Ministral's query scale."""
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert Rotary(config)(torch.tensor([400]), torch.float64).query_scale is None


# Views are arguments


@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
def test_adapter_on_changes_logits_off_leaves_the_bits(
    tiny_model: Model, random_adapter: Callable[..., DrafterAdapter], pattern: str
) -> None:
    """A forward with the adapter leaving a trace in the next; a switch that does nothing."""
    model = tiny_model()
    adapter, ids = random_adapter(model), torch.arange(20)[None]
    before = model(ids, pattern=pattern).logits
    switched_on = model(ids, pattern=pattern, adapter=AdapterSwitch(adapter, None)).logits
    after = model(ids, pattern=pattern).logits
    assert after.equal(before)
    assert (switched_on - before).abs().max() > 0.1


def test_adapter_off_for_every_token_leaves_the_bits(
    tiny_model: Model, random_adapter: Callable[..., DrafterAdapter]
) -> None:
    """A mixed batch colouring the AR view of its own trunk tokens."""
    model = tiny_model()
    ids = torch.arange(20)[None]
    is_on = torch.zeros(1, 20, 1, dtype=torch.bool)
    switch = AdapterSwitch(random_adapter(model), is_on)
    assert model(ids, adapter=switch).logits.equal(model(ids).logits)


def test_adapter_per_token_equals_separate_runs(
    tiny_model: Model, random_adapter: Callable[..., DrafterAdapter]
) -> None:
    """Rows of one forward with the adapter on and off bleeding into each other."""
    model = tiny_model()
    adapter = random_adapter(model)
    ids = torch.arange(40).reshape(2, 20)
    is_on = torch.zeros(2, 20, 1, dtype=torch.bool)
    is_on[1] = True
    mixed = model(ids, adapter=AdapterSwitch(adapter, is_on)).logits
    off, on = model(ids[:1]).logits, model(ids[1:], adapter=AdapterSwitch(adapter, None)).logits
    torch.testing.assert_close(mixed, torch.cat((off, on)), rtol=0, atol=1e-11)


def test_adapter_within_one_sequence(
    tiny_model: Model, random_adapter: Callable[..., DrafterAdapter]
) -> None:
    """Causal tokens before the first one that is on seeing anything of the adapter."""
    model = tiny_model()
    ids = torch.arange(20)[None]
    is_on = (torch.arange(20) >= 12)[None, :, None]
    mixed = model(ids, adapter=AdapterSwitch(random_adapter(model), is_on)).logits
    plain = model(ids).logits
    torch.testing.assert_close(mixed[:, :12], plain[:, :12], rtol=0, atol=1e-11)
    assert ((mixed - plain)[:, 12:].abs().amax(-1) > 0.01).all()


def test_views_do_not_disturb_each_other(
    tiny_model: Model, random_adapter: Callable[..., DrafterAdapter]
) -> None:
    """A pattern, adapter or position left on the model by an earlier call."""
    model = tiny_model()
    ids = torch.arange(20)[None]
    first = model(ids).logits
    names = {name: sorted(vars(module)) for name, module in model.named_modules()}
    model(ids, pattern="bidirectional", adapter=AdapterSwitch(random_adapter(model), None))
    model(ids, position_ids=torch.arange(100, 120)[None])
    assert model(ids).logits.equal(first)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == names


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_positions(tiny_model: Model, side: str) -> None:
    """Positions that count padding: RoPE would hide it, the query scale does not."""
    model = tiny_model()
    ids, pads = torch.arange(60)[None], torch.zeros(1, 10, dtype=torch.long)
    parts = (pads, ids) if side == "left" else (ids, pads)
    is_real = torch.cat([torch.full_like(part, int(part is ids)) for part in parts], dim=1)
    logits = model(torch.cat(parts, dim=1), attention_mask=is_real).logits[is_real.bool()]
    torch.testing.assert_close(logits, model(ids).logits[0], rtol=0, atol=1e-10)


def test_deepcopy_gives_the_same_network(tiny_model: Model) -> None:
    """Rotary constants shared with, or lost by, a copy."""
    model = tiny_model()
    ids = torch.arange(20)[None]
    assert copy.deepcopy(model)(ids).logits.equal(model(ids).logits)


# Refusals


def test_forward_refuses_what_it_does_not_do(tiny_model: Model) -> None:
    """`past_key_values`, `labels` or `use_cache` accepted and ignored."""
    model, ids = tiny_model(), torch.arange(4)[None]
    with pytest.raises(ConfigError, match="does not take use_cache"):
        model(ids, use_cache=True)
    with pytest.raises(ConfigError, match="does not take labels"):
        model(ids, labels=ids)
    with pytest.raises(ConfigError, match="does not take output_hidden_states"):
        model(ids, output_hidden_states=True)
    with pytest.raises(ConfigError, match="does not take return_dict"):
        model(ids, return_dict=False)
    with pytest.raises(ConfigError, match="allowed: causal, bidirectional"):
        model(ids, pattern="diffusion")
    assert model(ids, use_cache=False, return_dict=True).logits.shape == (1, 4, 259)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"num_key_value_heads": 3}, ConfigError, "num_key_value_heads is 3; .* divisor of 4"),
        ({"head_dim": 31}, ConfigError, "head_dim is 31; allowed: an even number"),
        ({"mask_token_id": 259}, ConfigError, "mask_token_id is 259; allowed: 0 to 258"),
        ({"mask_token_id": None}, ConfigError, "mask_token_id is None"),
        ({"num_valid_tokens": 300}, ConfigError, "num_valid_tokens is 300"),
        ({"hidden_size": 0}, ConfigError, "hidden_size is 0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, ConfigError, "[Mm]issing required keys"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"sliding_window": 128}, UnsupportedError, "sliding_window is 128"),
        ({"attention_dropout": 0.1}, UnsupportedError, "attention_dropout is 0.1"),
        ({"block_size": 1}, ConfigError, "block_size is 1; allowed: an integer of at least 2"),
        ({"num_valid_tokens": True}, ConfigError, "num_valid_tokens is True"),
        ({"bos_token_id": -3}, ConfigError, "bos_token_id is -3; allowed: 0 to 258, or null"),
        ({"eos_token_id": [1, 999]}, ConfigError, "eos_token_id is .*999.*; allowed: 0 to 258"),
        ({"rms_norm_eps": "x"}, ConfigError, "rms_norm_eps is 'x'"),
        ({"rope_theta": 5e5}, ConfigError, "rope_theta is 500000.0 beside"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor is 0.5"),
        ({"num_experts": 8}, UnsupportedError, "num_experts is 8; supported: None"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}},
            ConfigError,
            "rope_parameters.rope_theta is 'big'; allowed: a number",
        ),
    ],
)
def test_impossible_shapes_are_refused(
    tiny_config: Callable[..., Any], overrides: dict[str, Any], error: type, message: str
) -> None:
    """A config that loads and then computes something else than it says."""
    with pytest.raises(error, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"use_qk_norm": True},
        {"tie_word_embeddings": True},
        {"num_valid_tokens": 100},
    ],
)
def test_published_type_holds_published_shapes_only(
    tiny_config: Callable[..., Any], overrides: dict[str, Any]
) -> None:
    """A network that other engines would misread, written under the published model type."""
    with pytest.raises(ConfigError, match="use model_type 'trimode'"):
        tiny_config(NemotronLabsDiffusionConfig, **overrides)
    assert not tiny_config(**overrides).is_published_shape
