"""What tests share: tiny random networks, a drafter that disagrees, a byte tokenizer, a checkpoint.

Fixtures hand out factories, so that a test says what it needs: `tiny_model(torch.float32)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tests.chat_templates import SPECIALS
from trimode.checkpoint.io import save_checkpoint
from trimode.model import DrafterAdapter, TriModeConfig, TriModeModel
from trimode.model.adapter import LoraPair
from trimode.model.modeling import MODEL_CLASSES
from trimode.vocabulary import Vocabulary

BOS, EOS, MASK = 256, 257, 258
"""Ids after the 256 bytes; token id b < 256 is the byte b."""

NUM_TOKENS = 259
ORIGINAL_CONTEXT = 32
"""Positions before YaRN and the query scale set in: short, so that ordinary tests go beyond it."""

torch.set_num_threads(1)  # tiny matrices: threads cost, 40 times over on a busy machine
transformers_logging.set_verbosity_error()  # its advice on our configs and classes is noise here


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of this machine goes to a folder of its own, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., TriModeConfig]:
    """`tiny_config(config_class=TriModeConfig, **overrides)`: 2 layers, 64 wide, GQA 4/2, YaRN."""
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., TriModeModel]:
    """`tiny_model(dtype=torch.float64, *, seed=0, **overrides)`: a random network, `.eval()`."""
    return _tiny_model


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., DrafterAdapter]:
    """`random_adapter(model, *, seed=1, strength=1.0)`: LoRA on every o_proj; it disagrees."""
    return _random_adapter


@pytest.fixture(scope="session")
def hf_model() -> Callable[..., Any]:
    """`hf_model(dtype=torch.float64, **overrides)`: `tiny_model` of the class that `trimode.hf`
    registers, with `random_adapter` as its drafter."""

    def make(dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
        from trimode import hf  # registers with transformers: only for the tests that ask

        plain = _tiny_model(dtype, **overrides)
        model = hf.TriModeModel(plain.config).to(dtype).eval()
        model.load_state_dict(plain.state_dict())
        object.__setattr__(model, "drafter", _random_adapter(plain))
        return model

    return make


@pytest.fixture(scope="session")
def causal_lm(hf_model: Callable[..., Any]) -> Callable[..., Any]:
    """`causal_lm(dtype=torch.float64, **overrides)`: as `hf_model`, with transformers' manners."""

    def make(dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
        from trimode import hf

        published = hf_model(dtype, **overrides)
        model = hf.TriModeForCausalLM(published.config).to(dtype).eval()
        model.load_state_dict(published.state_dict())
        object.__setattr__(model, "drafter", published.drafter)
        return model

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (id = byte), then `<|bos|>`, `<|eos|>`, `<|mask|>`; adds none itself."""
    return _byte_tokenizer()


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_checkpoint(dtype=torch.float32, **overrides)`: a folder, its tokenizer included."""

    def save(dtype: torch.dtype = torch.float32, *, name: str = "tiny", **overrides: Any) -> Path:
        folder = tmp_path / name
        save_checkpoint(_tiny_model(dtype, **overrides), folder, tokenizer=_byte_tokenizer())
        return folder

    return save


def _tiny_config(
    config_class: type[TriModeConfig] = TriModeConfig, **overrides: Any
) -> TriModeConfig:
    factor = 16.0
    values: dict[str, Any] = {
        "vocab_size": NUM_TOKENS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # on purpose not hidden_size / num_attention_heads
        "max_position_embeddings": int(factor) * ORIGINAL_CONTEXT,
        "initializer_range": 0.4,  # logits far apart, so that argmax and thresholds mean something
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": factor,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "mask_token_id": MASK,
        "block_size": 8,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return config_class(**(values | overrides))


def _tiny_model(
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    config_class: type[TriModeConfig] = TriModeConfig,
    **overrides: Any,
) -> TriModeModel:
    config = _tiny_config(config_class, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODEL_CLASSES[config.model_type](config)
    return model.to(dtype).eval().requires_grad_(False)


def _random_adapter(model: TriModeModel, *, seed: int = 1, strength: float = 1.0) -> DrafterAdapter:
    """Rank 4 on every o_proj; `strength` is the size of the update relative to the weight's own."""
    generator = torch.Generator().manual_seed(seed)
    rank, pairs = 4, {}
    for layer_index, layer in enumerate(model.encoder.layers):
        weight = layer.self_attn.o_proj.weight
        out_features, in_features = weight.shape
        down = torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
        up = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
        scale = strength * float(weight.std()) / rank**0.5
        pairs[layer_index, "o_proj"] = LoraPair(down, up, scale)
    weight = model.encoder.embed_tokens.weight
    adapter = DrafterAdapter(pairs).to(device=weight.device, dtype=weight.dtype)
    return adapter.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vocabulary_of() -> Callable[[str], Vocabulary]:
    """`vocabulary_of(template)`: bytes, and the control tokens of `tests.chat_templates`."""

    def make(template: str) -> Vocabulary:
        tokenizer = _byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
        tokenizer.chat_template = template
        return Vocabulary(tokenizer, mask_token_id=MASK)

    return make


@pytest.fixture(scope="session")
def piece_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece's of Llama 2: a space before a text, single bytes, `<s>` put before it; 320
    tokens, the mask token last."""
    return _piece_tokenizer()


def _piece_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [*"▁abcdefghijklmnopqrstuvwxyz[]/INST:.", "\n", "▁c", "at", "▁cat", "▁th", "▁the"]
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>"])}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: 259 + i for i, piece in enumerate(pieces)}
    merges = [("▁", "c"), ("a", "t"), ("▁c", "at"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocab["▁t"] = len(vocab)
    made = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    space = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<mask>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<|bos|>", "<|eos|>", "<|mask|>"]
    byte_level = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        bos_token=specials[0],
        eos_token=specials[1],
        mask_token=specials[2],
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> dict[str, int]:
    """The printable stand-in that byte-level BPE has for each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: chr(byte) for byte in printable}
    stand_ins |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {stand_ins[byte]: byte for byte in range(256)}
