"""The shape of the network, in Hugging Face's names, and the published presets. No tensors here."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from trimode.errors import ConfigError, UnsupportedError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those that depend on the position alone; the others change with the length of the text."""

UNREAD: dict[str, Any] = {
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "num_experts": None,
    "num_local_experts": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logit_scale": None,
    "quantization_config": None,
}
"""Keys of other families that would change the arithmetic, and the value that leaves them off."""


class TriModeConfig(PreTrainedConfig):
    """Configuration of a tri-mode decoder: Llama-style, with what Qwen2/3, Mistral and Ministral 3
    need.

    Args:
        vocab_size: Rows of the embedding and of the head, padding rows included.
        num_valid_tokens: Rows that stand for a token; rows from here on are padding and never
            chosen. None means all of `vocab_size`.
        head_dim: Size of one attention head; independent of `hidden_size / num_attention_heads`.
            None means that quotient.
        rope_parameters: transformers' RoPE dictionary. `llama_4_scaling_beta` in it turns on the
            query scale `1 + beta * ln(1 + floor(position / original_max_position_embeddings))`.
        attention_bias: Bias of q, k and v; `attention_output_bias` (None: the same) that of o.
        use_qk_norm: RMSNorm over each head of q and k before RoPE (Qwen3).
        mask_token_id: Id of the mask token; never emitted.
        block_size: Default diffusion block length.

    Raises:
        ConfigError: a value is impossible, e.g. a mask id outside the vocabulary.
        UnsupportedError: a value this network does not implement (activation, sliding window).
    """

    model_type = "trimode"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    ignore_keys_at_rope_validation = {"llama_4_scaling_beta", "max_position_embeddings"}  # noqa: RUF012

    def __init__(
        self,
        *,
        vocab_size: int = 4096,
        num_valid_tokens: int | None = None,
        hidden_size: int = 256,
        intermediate_size: int = 768,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_output_bias: bool | None = None,
        mlp_bias: bool = False,
        use_qk_norm: bool = False,
        sliding_window: int | None = None,
        attention_dropout: float = 0.0,
        tie_word_embeddings: bool = False,
        mask_token_id: int = 2,
        block_size: int = 8,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 1,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_valid_tokens = num_valid_tokens
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = (
            num_attention_heads if num_key_value_heads is None else num_key_value_heads
        )
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = dict(rope_parameters or {"rope_type": "default", "rope_theta": 1e4})
        self.attention_bias = attention_bias
        self.attention_output_bias = attention_output_bias
        self.mlp_bias = mlp_bias
        self.use_qk_norm = use_qk_norm
        self.sliding_window = sliding_window
        self.attention_dropout = attention_dropout
        self.mask_token_id = mask_token_id
        self.block_size = block_size
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self._check()
        if self.rope_parameters["rope_type"] in ("default", "linear"):  # where it would warn
            self.ignore_keys_at_rope_validation = {
                *type(self).ignore_keys_at_rope_validation,
                "original_max_position_embeddings",
            }
        _refuse_unread(kwargs, self.rope_parameters)
        try:
            super().__init__(
                bos_token_id=bos_token_id,
                eos_token_id=eos_token_id,
                tie_word_embeddings=tie_word_embeddings,
                **kwargs,
            )
        except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(" ".join(str(error.__cause__ or error).split())) from error
        # transformers >= 5.17 keeps these three as dataclass fields, older ones set them in
        # __init__.
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings

    def _check(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "block_size",
        ):
            value = getattr(self, name)
            least = 2 if name == "block_size" else 1
            if not _is_int(value) or value < least:
                refuse(name, f"an integer of at least {least}")
        if self.num_attention_heads % self.num_key_value_heads:
            refuse("num_key_value_heads", f"a divisor of {self.num_attention_heads}")
        if self.head_dim % 2:
            refuse("head_dim", "an even number")
        num_valid = self.num_valid_tokens
        if num_valid is not None and not (_is_int(num_valid) and 2 <= num_valid <= self.vocab_size):
            refuse("num_valid_tokens", f"2 to vocab_size={self.vocab_size}, or null")
        if not self._is_token(self.mask_token_id):
            refuse("mask_token_id", f"0 to {self.vocab_size - 1}")
        if self.bos_token_id is not None and not self._is_token(self.bos_token_id):
            refuse("bos_token_id", f"0 to {self.vocab_size - 1}, or null")
        if not all(map(self._is_token, self.eos_token_ids)):
            refuse("eos_token_id", f"0 to {self.vocab_size - 1}, a list of them, or null")
        if not _is_number(self.rms_norm_eps) or self.rms_norm_eps <= 0:
            refuse("rms_norm_eps", "a positive number")
        if self.rope_parameters.get("rope_type") not in ROPE_TYPES:
            raise UnsupportedError(
                f"rope_parameters.rope_type is {self.rope_parameters.get('rope_type')!r};"
                f" supported: {', '.join(ROPE_TYPES)}"
            )
        for name, value in self.rope_parameters.items():
            if name not in ("rope_type", "type") and not (value is None or _is_number(value)):
                raise ConfigError(f"rope_parameters.{name} is {value!r}; allowed: a number")
        if self.hidden_act != "silu":
            raise UnsupportedError(f"hidden_act is {self.hidden_act!r}; supported: 'silu'")
        if self.sliding_window is not None:
            raise UnsupportedError(f"sliding_window is {self.sliding_window!r}; supported: null")
        if self.attention_dropout:
            raise UnsupportedError(f"attention_dropout is {self.attention_dropout}; supported: 0.0")

    def _is_token(self, token_id: Any) -> bool:
        return _is_int(token_id) and 0 <= token_id < self.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a text, possibly none."""
        eos = self.eos_token_id
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)

    @property
    def banned_token_ids(self) -> list[int]:
        """Tokens never chosen: the mask token and padded rows of the vocabulary."""
        return sorted({self.mask_token_id, *range(self.num_real_tokens, self.vocab_size)})

    @property
    def num_real_tokens(self) -> int:
        """The vocabulary without padded rows: no text has an id from here on."""
        return self.num_valid_tokens or self.vocab_size

    @property
    def has_output_bias(self) -> bool:
        """Whether o_proj has a bias."""
        if self.attention_output_bias is None:
            return self.attention_bias
        return self.attention_output_bias

    @property
    def is_published_shape(self) -> bool:
        """Whether `nemotron_labs_diffusion` can express this network."""
        return not (
            self.attention_bias
            or self.has_output_bias
            or self.mlp_bias
            or self.use_qk_norm
            or self.tie_word_embeddings
            or self.num_valid_tokens not in (None, self.vocab_size)
        )


def _refuse_unread(kwargs: dict[str, Any], rope_parameters: dict[str, Any]) -> None:
    """Refuse values of other families that would change the network and that nothing here reads."""
    theta = kwargs.get("rope_theta")
    if theta is not None and theta != rope_parameters.get("rope_theta"):
        raise ConfigError(
            f"rope_theta is {theta!r} beside rope_parameters.rope_theta"
            f" {rope_parameters.get('rope_theta')!r}; give it in rope_parameters only"
        )
    for name, off in UNREAD.items():
        if kwargs.get(name, off) not in (None, off):
            raise UnsupportedError(f"{name} is {kwargs[name]!r}; supported: {off!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class NemotronLabsDiffusionConfig(TriModeConfig):
    """The published configuration (facts 1.1 and 1.2): the same network under NVIDIA's model type.

    The fields below are carried so that a written `config.json` opens in every engine that reads
    this model type; the network does not use them. For the same reason `rope_parameters` always
    has the two keys of the query scale, which Ministral 3 reads without a default; a beta of 0 is a
    scale of 1.
    """

    model_type = "nemotron_labs_diffusion"

    def __init__(
        self,
        *,
        vocab_size: int = 131072,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 34,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int | None = 128,
        max_position_embeddings: int = 262144,
        rope_parameters: dict[str, Any] | None = None,
        mask_token_id: int = 100,
        block_size: int = 32,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 11,
        dlm_paradigm: str = "bidirectional",
        ar_loss_weight: float = 1.0,
        dlm_loss_weight: float | None = None,
        dp_varying_mask_ratio: bool = False,
        **kwargs: Any,
    ) -> None:
        rope = dict(rope_parameters or published_rope(1e6))
        for key, neutral in (
            ("llama_4_scaling_beta", 0.0),
            ("original_max_position_embeddings", max_position_embeddings),
        ):
            if rope.get(key) is None:
                rope[key] = neutral
        self.dlm_paradigm = dlm_paradigm
        self.ar_loss_weight = ar_loss_weight
        self.dlm_loss_weight = dlm_loss_weight
        self.dp_varying_mask_ratio = dp_varying_mask_ratio
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rope_parameters=rope,
            mask_token_id=mask_token_id,
            block_size=block_size,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
        if not self.is_published_shape:
            raise ConfigError(
                "model_type 'nemotron_labs_diffusion' has no biases, no QK-norm, no tied head "
                "and no"
                " padded vocabulary; use model_type 'trimode' for such a network"
            )

    @classmethod
    def preset(cls, name: str) -> NemotronLabsDiffusionConfig:
        """The published text model `3b`, `8b` or `14b` (facts 1.1)."""
        if name not in PRESETS:
            raise ConfigError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


def published_rope(rope_theta: float) -> dict[str, Any]:
    """The YaRN parameters of the published text models (facts 1.2)."""
    return {
        "rope_type": "yarn",
        "rope_theta": rope_theta,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "3b": {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34},
    "14b": {
        "hidden_size": 5120,
        "intermediate_size": 16384,
        "num_hidden_layers": 40,
        "rope_parameters": published_rope(1e9),
    },
}
