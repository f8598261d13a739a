"""Rotary positions (Su et al. 2021, arXiv 2104.09864) as in transformers, and the query scale."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimode.model.configuration import TriModeConfig


class Rotary:
    """Angles of rotary positions and the query scale. Holds constants only, made from the
    config."""

    def __init__(self, config: TriModeConfig) -> None:
        parameters = config.rope_parameters
        self._config = config
        self._beta = float(parameters.get("llama_4_scaling_beta") or 0.0)
        self._original_len = parameters.get(
            "original_max_position_embeddings", config.max_position_embeddings
        )
        self._constants: dict[torch.device, tuple[Tensor, float]] = {}

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """[D/2] float32 inverse frequencies and the attention factor, made once per device."""
        if device not in self._constants:
            rope_type = self._config.rope_parameters["rope_type"]
            if rope_type == "default":
                theta, dim = self._config.rope_parameters["rope_theta"], self._config.head_dim
                inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
                factor = 1.0
            else:
                inverse, factor = ROPE_INIT_FUNCTIONS[rope_type](self._config, None)
            self._constants[device] = (inverse.to(device), float(factor))
        return self._constants[device]

    def table(self, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """[P] int64 -> cosines and sines [P, D/2] float32, and the query scale [P] or None.

        Each is rounded from float64, so that it does not depend on how many are made together.
        """
        inverse, factor = self._frequencies(position_ids.device)
        angles = (position_ids[:, None].float() * inverse).double()
        cos, sin = (angles.cos() * factor).float(), (angles.sin() * factor).float()
        if not self._beta:
            return cos, sin, None
        turns = torch.floor(position_ids.double() / self._original_len)
        return cos, sin, (1 + self._beta * torch.log(1 + turns)).float()

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> RotaryAngles:
        """position_ids: [...] int64 -> angles for tensors [..., heads, D] of `dtype`."""
        inverse, factor = self._frequencies(position_ids.device)
        angles = position_ids[..., None, None].float() * inverse
        cos, sin = angles.cos(), angles.sin()
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        query_scale = None
        if self._beta:
            query_scale = 1 + self._beta * torch.log(
                1 + torch.floor(position_ids / self._original_len)
            )
            query_scale = query_scale[..., None, None].to(dtype)
        return RotaryAngles(
            cos=torch.cat((cos, cos), dim=-1).to(dtype),
            signed_sin=torch.cat((-sin, sin), dim=-1).to(dtype),
            query_scale=query_scale,
        )


class RotaryAngles:
    """cos, signed_sin: [..., 1, D]; query_scale: [..., 1, 1] or None. Half-rotation ("neox")
    layout."""

    __slots__ = ("_half", "cos", "query_scale", "signed_sin")

    def __init__(self, *, cos: Tensor, signed_sin: Tensor, query_scale: Tensor | None) -> None:
        self.cos = cos
        self.signed_sin = signed_sin
        self.query_scale = query_scale
        self._half = cos.shape[-1] // 2

    def rotate(self, x: Tensor) -> Tensor:
        """x: [..., heads, D]. rotate_half(x) * sin is roll(x) * signed_sin."""
        return torch.addcmul(x * self.cos, x.roll(self._half, -1), self.signed_sin)
