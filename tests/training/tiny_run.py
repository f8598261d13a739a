"""The network and the stage of the tiny runs that several files train."""

from __future__ import annotations

from trimode.training.config import ModelPart, StagePart

MODEL = ModelPart(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    block_size=4,
)
STAGE = StagePart(
    name="ar",
    tokens=3 * 128,
    diffusion_weight=0.0,
    sequence_length=32,
    batch_tokens=128,
    micro_batch_sequences=2,
    block_lengths=(4,),
)
