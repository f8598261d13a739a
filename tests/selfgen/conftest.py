"""Tiny models that end their turns now and then, with a template of ChatML's kind."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.conftest import EOS
from trimode.checkpoint.io import save_checkpoint
from trimode.loading import load
from trimode.model import TriModeModel
from trimode.runtime import TriModeLM

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|bos|>' + message['role'] + ':' + message['content'] + '<|eos|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def talker(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., TriModeModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., Path]:
    """`talker(eagerness, is_stuck=False)`: a checkpoint in float64, so that no rounding depends on
    the batch. It mostly writes ASCII and ends a turn the sooner the higher its eagerness; a stuck
    one repeats its last token for ever."""
    tokenizer = deepcopy(byte_tokenizer)
    tokenizer.chat_template = TEMPLATE

    def make(eagerness: float, *, is_stuck: bool = False) -> Path:
        path = tmp_path_factory.mktemp("selfgen") / "tiny"
        model = tiny_model(torch.float64)
        seen: list[torch.Tensor] = []
        head = model.diffusion_head
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        model(torch.arange(128).repeat(2)[None])
        hook.remove()
        hidden = torch.cat(seen)
        # A row of the head that gives about the logit 1 everywhere.
        level = torch.linalg.lstsq(hidden, hidden.new_ones(len(hidden), 1)).solution[:, 0]
        with torch.no_grad():
            head.weight.mul_(0.5)
            head.weight[128:EOS] = 0.2 * head.weight[128:EOS] - 6 * level  # no two rows are equal
            head.weight[EOS] = eagerness * level
            if is_stuck:
                head.weight.copy_(model.encoder.embed_tokens.weight)
                for layer in model.encoder.layers:
                    layer.self_attn.o_proj.weight.zero_()
                    layer.mlp.down_proj.weight.zero_()
        save_checkpoint(model, path, tokenizer=tokenizer)
        return path

    return make


@pytest.fixture(scope="session")
def folder(talker: Callable[..., Path]) -> Path:
    """One that ends most turns within 16 tokens, and repeats some prompts."""
    return talker(5.0)


@pytest.fixture(scope="session")
def lm(folder: Path) -> TriModeLM:
    return load(folder, dtype="float64")
