"""Converted checkpoints compute what their sources compute, and nothing doubtful is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trimode.checkpoint import convert as convert_module
from trimode.checkpoint.convert import convert
from trimode.checkpoint.io import load_model, load_tokenizer
from trimode.errors import CheckpointError, ConfigError, UnsupportedError
from trimode.model import TriModeModel

Source = Callable[..., Path]

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral3": "Ministral3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "rms_norm_eps": 3e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """`source(family, *, tokenizer=None, dtype=torch.float32, **config)`: a random checkpoint."""

    def make(
        family: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **overrides: Any,
    ) -> Path:
        values = SHAPE | overrides
        if family == "mistral3":
            tied = values.get("tie_word_embeddings", False)
            config = transformers.Mistral3Config(
                text_config=values | {"model_type": "ministral3", "head_dim": 32},
                vision_config=VISION,
                tie_word_embeddings=tied,
            )
            model_class: Any = transformers.Mistral3ForConditionalGeneration
        else:
            config = getattr(transformers, f"{FAMILIES[family]}Config")(**values)
            model_class = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a mistake
                    torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        model.to(dtype).save_pretrained(tmp_path / "source", max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def their_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, V]: what transformers makes of the source, independent of the command's own proof."""
    is_vision = json.loads((folder / "config.json").read_text())["model_type"] == "mistral3"
    auto = "AutoModelForImageTextToText" if is_vision else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(folder, dtype=dtype).float()
    with torch.no_grad():
        return model(ids[None]).logits[0]


def opened(folder: Path) -> TriModeModel:
    return load_model(folder, device="cpu", dtype=torch.float32).requires_grad_(False)


def refused(folder: Path, message: str, *, error: type = CheckpointError, **options: Any) -> None:
    target = folder.parent / "target"
    before = sorted(folder.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert(folder, target, **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.iterdir()) == before


# Families


@pytest.mark.parametrize(
    ("family", "config", "published"),
    [
        pytest.param("llama", {"head_dim": 32}, True, id="llama"),
        pytest.param("llama", {"tie_word_embeddings": True}, True, id="llama-tied"),
        pytest.param("llama", {"rope_parameters": LLAMA3}, True, id="llama-3-rope"),
        pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, False, id="llama-biases"),
        pytest.param("mistral", {"sliding_window": None}, True, id="mistral"),
        pytest.param("mistral", {"sliding_window": 512}, True, id="mistral-idle-window"),
        pytest.param("ministral3", {"rope_parameters": YARN, "head_dim": 32}, True, id="ministral"),
        pytest.param("qwen2", {}, False, id="qwen2"),
        pytest.param("qwen2", {"tie_word_embeddings": True}, False, id="qwen2-tied"),
        pytest.param("qwen3", {"head_dim": 32}, False, id="qwen3"),
        pytest.param("qwen3", {"attention_bias": True}, False, id="qwen3-biases"),
        pytest.param("mistral3", {"rope_parameters": YARN}, True, id="vision"),
        pytest.param(
            "mistral3",
            {"rope_parameters": YARN, "tie_word_embeddings": True},
            True,
            id="vision-tied",
        ),
    ],
)
def test_every_family(
    source: Source, tmp_path: Path, family: str, config: dict[str, Any], published: bool
) -> None:
    """A family converted into a network that computes something else, or under the wrong type."""
    folder = source(family, **config)
    record = convert(folder, tmp_path / "target", mask_token="300", block_length=16)
    assert record == json.loads((tmp_path / "target" / "conversion.json").read_text())
    model = opened(tmp_path / "target")
    assert model.config.model_type == ("nemotron_labs_diffusion" if published else "trimode")
    assert type(model).__name__ in model.config.architectures
    assert (model.config.block_size, model.config.mask_token_id) == (16, 300)
    assert model.config.eos_token_ids == (257,)
    assert not model.config.tie_word_embeddings
    ids = torch.randint(320, (100,), generator=torch.Generator().manual_seed(1))
    expected = their_logits(folder, ids)
    assert expected.std() > 1
    torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=0, atol=1e-4)
    assert record["proof"]["max_difference"] < 1e-4 < record["proof"]["allowed_difference"]
    assert all("vision" in name or "multi_modal" in name for name in record["ignored"])
    assert bool(record["ignored"]) == (family == "mistral3")
    assert {tensor["name"] for tensor in record["tensors"]} == model.state_dict().keys()


def test_names_that_transformers_5_has_in_memory(source: Source, tmp_path: Path) -> None:
    """The text part not found under `model.language_model`, where newer files keep it."""
    folder = source("mistral3", rope_parameters=YARN)

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.replace("language_model.model.", "model.language_model.")
            .replace("language_model.lm_head.", "lm_head.")
            .replace("vision_tower.", "model.vision_tower.")
            .replace("multi_modal_projector.", "model.multi_modal_projector."): tensor
            for name, tensor in weights.items()
        }

    edit_weights(folder, rename)
    record = convert(folder, tmp_path / "target", mask_token="300")
    sources = {tensor["source"] for tensor in record["tensors"]}
    assert "model.language_model.layers.1.mlp.up_proj.weight" in sources
    assert "lm_head.weight" in sources
    assert any(name.startswith("model.vision_tower.") for name in record["ignored"])


def test_positions_beyond_the_original_context_are_proved(source: Source, tmp_path: Path) -> None:
    """A proof within the original context only, where YaRN's query scale does nothing."""
    record = convert(source("ministral3", rope_parameters=YARN), tmp_path / "target")
    probes = {probe["name"]: probe for probe in record["proof"]["probes"]}
    across, end = probes["end of the original context"], probes["end of the context"]
    assert across["first_position"] < 32 < across["first_position"] + len(across["ids"])
    assert end["first_position"] + len(end["ids"]) == 512


def test_old_buffers_are_left_behind(source: Source, tmp_path: Path) -> None:
    """A Llama 2 checkpoint refused for the rotary constants that old writers stored."""
    folder = source("llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda weights: weights | {name: torch.zeros(8)})
    assert convert(folder, tmp_path / "target")["ignored"] == [name]


# Element types and shards


def test_source_dtype_is_kept(source: Source, tmp_path: Path) -> None:
    """Weights rounded or blown up on the way, or a tensor of another type levelled."""
    folder = source("qwen3", dtype=torch.bfloat16, tie_word_embeddings=True)
    edit_weights(folder, lambda w: w | {"model.norm.weight": w["model.norm.weight"].float() * 1.01})
    convert(folder, tmp_path / "target", mask_token="300")
    theirs = load_file(folder / "model.safetensors")
    ours = load_file(tmp_path / "target" / "model.safetensors")
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in ours.items():
        key = name.replace("diffusion_head", "encoder.embed_tokens").replace("encoder.", "model.")
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key])


@pytest.mark.parametrize("proof_dtype", ["float32", "bfloat16"])
def test_asked_for_dtype(source: Source, tmp_path: Path, proof_dtype: str) -> None:
    """Rounding that was asked for taken for a wrong conversion."""
    folder = source("llama")
    record = convert(folder, tmp_path / "target", dtype="bfloat16", proof_dtype=proof_dtype)
    weights = load_file(tmp_path / "target" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert record["proof"]["dtype"] == proof_dtype
    ids = torch.arange(50)
    expected = their_logits(folder, ids, torch.bfloat16)
    logits = opened(tmp_path / "target")(ids[None]).logits[0, :, :320]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_shards(source: Source, tmp_path: Path) -> None:
    """Shards read or written as if there were one file."""
    folder = source("qwen2", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    convert(folder, tmp_path / "target", max_shard_size="150KB")
    files = list((tmp_path / "target").glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 160_000 for file in files)


# The mask token


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedTokenizerFast]:
    """`tokenizer(*reserved, **options)`: bytes, `<s>` 256, `</s>` 257, then the reserved slots."""

    def make(*reserved: str, **options: Any) -> PreTrainedTokenizerFast:
        content = json.loads(byte_tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []}
        raw = Tokenizer.from_str(json.dumps(content))
        raw.add_special_tokens(["<s>", "</s>", *reserved])
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token="<s>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
            **options,
        )

    return make


SLOTS = ("<SPECIAL_99>", "<SPECIAL_100>")
LLAMA_SLOTS = tuple(f"<|reserved_special_token_{i}|>" for i in range(4))


@pytest.mark.parametrize(
    ("reserved", "options", "rows", "expected"),
    [
        pytest.param(SLOTS, {}, 260, ("<SPECIAL_100>", 259, "reserved slot", 260, None), id="100"),
        pytest.param(
            LLAMA_SLOTS,
            {"pad_token": LLAMA_SLOTS[0], "chat_template": f"a{LLAMA_SLOTS[1]}b"},
            262,
            (LLAMA_SLOTS[2], 260, "reserved slot", 262, None),
            id="slots-in-use",
        ),
        pytest.param(
            ("<mask>", "<x>"),
            {"mask_token": "<x>"},
            260,
            ("<x>", 259, "the tokenizer's own", 260, None),
            id="own",
        ),
        pytest.param((), {}, 300, ("<|mask|>", 258, "padded row", 300, 259), id="padded-row"),
        pytest.param((), {}, 258, ("<|mask|>", 258, "grown vocabulary", 320, 259), id="grown"),
    ],
)
def test_choice_of_the_mask_token(
    source: Source,
    tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path: Path,
    reserved: tuple[str, ...],
    options: dict[str, Any],
    rows: int,
    expected: tuple[Any, ...],
) -> None:
    """A mask token that has another use already, has no row, or that the tokenizer forgets."""
    before = tokenizer(*reserved, **options)
    folder = source("llama", tokenizer=before, vocab_size=rows)
    record = convert(folder, tmp_path / "target")
    model, after = opened(tmp_path / "target"), load_tokenizer(tmp_path / "target")
    mask, config = record["mask_token"], model.config
    assert (*mask.values(), config.vocab_size, config.num_valid_tokens) == expected
    assert config.mask_token_id == mask["token_id"]
    assert after is not None
    assert (after.mask_token, after.mask_token_id) == (mask["token"], mask["token_id"])
    text = f"a é</s>{''.join(reserved)}b"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template
    roles = before.special_tokens_map | {"mask_token": mask["token"]}
    assert after.special_tokens_map == roles


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean(source: Source, tmp_path: Path, tied: bool) -> None:
    """New rows of zeros or noise, or old rows that move; without a tokenizer too."""
    folder = source("llama", vocab_size=321, tie_word_embeddings=tied)
    record = convert(folder, tmp_path / "target")
    assert record["mask_token"] == {"token": None, "token_id": 321, "how": "grown vocabulary"}
    theirs = load_file(folder / "model.safetensors")
    ours = load_file(tmp_path / "target" / "model.safetensors")
    assert ("lm_head.weight" in theirs) == (not tied)
    embedding = theirs["model.embed_tokens.weight"]
    heads = {
        "encoder.embed_tokens.weight": embedding,
        "diffusion_head.weight": theirs.get("lm_head.weight", embedding),
    }
    for name, old in heads.items():
        assert ours[name].shape == (384, 64)
        assert torch.equal(ours[name][:321], old)
        torch.testing.assert_close(ours[name][321:], old.mean(0).expand(63, -1))
    assert opened(tmp_path / "target").config.num_valid_tokens == 322


@pytest.mark.parametrize(("wanted", "token_id"), [("<SPECIAL_99>", 258), ("259", 259)])
def test_named_mask_token(
    source: Source,
    tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path: Path,
    wanted: str,
    token_id: int,
) -> None:
    """The user's choice not taken, or an id read as text."""
    folder = source("llama", tokenizer=tokenizer(*SLOTS), vocab_size=260)
    mask = convert(folder, tmp_path / "target", mask_token=wanted)["mask_token"]
    assert mask == {"token": SLOTS[token_id - 258], "token_id": token_id, "how": "named"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("<nothing>", "mask token is '<nothing>'; allowed: a token of the vocabulary or its id"),
        ("270", "mask token is '270'; allowed: a token of the vocabulary or its id"),
        ("</s>", "'</s>', which ends, begins or pads texts already"),
        ("a", "'a'.* an ordinary token of texts"),
        ("97", "'97'.* an ordinary token of texts"),
    ],
)
def test_mask_tokens_that_cannot_be(
    source: Source,
    tokenizer: Callable[..., PreTrainedTokenizerFast],
    wanted: str,
    message: str,
) -> None:
    """Texts that can never end, or that lose the letter a."""
    folder = source("llama", tokenizer=tokenizer(*SLOTS), vocab_size=300)
    refused(folder, message, error=ConfigError, mask_token=wanted)


def test_mask_id_without_a_tokenizer(source: Source) -> None:
    """An id beyond the embedding, or the end-of-text id, taken for want of a vocabulary."""
    folder = source("llama")
    for wanted in ("320", "257", "<mask>"):
        refused(folder, "without a tokenizer allowed: an id", error=ConfigError, mask_token=wanted)


def test_eos_of_the_generation_defaults(source: Source, tmp_path: Path) -> None:
    """Chat models that run on, because only `generation_config.json` knows all their ends."""
    folder = source("llama")
    edit_json(folder / "generation_config.json", eos_token_id=[257, 259])
    convert(folder, tmp_path / "target")
    assert opened(tmp_path / "target").config.eos_token_ids == (257, 259)


# The proof


def swapped(mapping: dict[str, str]) -> dict[str, str]:
    return {
        name: theirs.replace("gate_proj", "up_proj") if "gate_proj" in theirs
        else theirs.replace("up_proj", "gate_proj")
        for name, theirs in mapping.items()
    }  # fmt: skip


def test_a_wrong_mapping_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that cannot fail: gate and up have one shape, and only logits tell them apart."""
    folder, right = source("qwen3"), convert_module.map_tensors
    monkeypatch.setattr(convert_module, "map_tensors", lambda *args: swapped(right(*args)))
    message = "does not compute what .* logits of 'random tokens' differ by .*; nothing was written"
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "value", "probe"),
    [("rope_theta", 1.01e4, "random tokens"), ("llama_4_scaling_beta", 0.0, "end of the context")],
)
def test_wrong_angles_are_refused(
    source: Source, monkeypatch: pytest.MonkeyPatch, name: str, value: float, probe: str
) -> None:
    """Weights in place but positions computed otherwise, perhaps only far from the start."""
    rope = YARN | {"factor": 4.0, "original_max_position_embeddings": 128}
    folder, right = source("ministral3", rope_parameters=rope), convert_module.our_config

    def wrong(*args: Any, **options: Any) -> Any:
        config = right(*args, **options)
        config.rope_parameters[name] = value
        return config

    monkeypatch.setattr(convert_module, "our_config", wrong)
    refused(folder, f"logits of '{probe}' differ")


def test_weights_that_are_not_finite(source: Source) -> None:
    """Two networks that agree on NaN taken for proved."""
    folder = source("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda w: w | {name: torch.full_like(w[name], torch.nan)})
    refused(folder, "differ by nan")


def test_a_tokenizer_that_does_not_survive(
    source: Source,
    tokenizer: Callable[..., PreTrainedTokenizerFast],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer that reads texts otherwise once it was saved."""
    folder, save = (
        source("llama", tokenizer=tokenizer(*SLOTS)),
        PreTrainedTokenizerFast.save_pretrained,
    )

    def spoil(self: PreTrainedTokenizerFast, path: Path) -> None:
        save(self, path)
        edit_json(path / "tokenizer.json", normalizer={"type": "Lowercase"})

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", spoil)
    refused(folder, "the tokenizer does not survive saving: text was")


# Refusals


@pytest.mark.parametrize(
    ("family", "changes", "message", "error"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2'; allowed: llama, mistral", None),
        ("llama", {"model_type": ["llama"]}, "model_type is .*; allowed: llama", None),
        (
            "mistral",
            {"model_type": "mixtral", "num_local_experts": 8},
            r"model_type is 'mixtral' \(a mixture of experts\); allowed: llama",
            None,
        ),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures is .*; allowed: LlamaForCausalLM",
            None,
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized", UnsupportedError),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'", UnsupportedError),
        ("llama", {"hidden_size": "64"}, "the configuration cannot be read: .*hidden_size", None),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64, within the", UnsupportedError),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "sliding_window is 64, within the context of 512",
            UnsupportedError,
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'; supported: default, linear, llama3, yarn$",
            UnsupportedError,
        ),
        (
            "llama",
            {"rope_parameters": SHAPE["rope_parameters"] | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
            UnsupportedError,
        ),
    ],
)
def test_sources_that_cannot_be_converted(
    source: Source, family: str, changes: dict[str, Any], message: str, error: type | None
) -> None:
    """Another network taken for ours, or a traceback of transformers."""
    folder = source(family)
    edit_json(folder / "config.json", **changes)
    refused(folder, message, error=error or CheckpointError)


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "lm_head.weight"), r"1 missing tensors \(lm_head.weight\)$"),
        (lambda w: without(w, "model.embed_tokens.weight"), "1 missing tensors"),
        (
            lambda w: w | {"vision_tower.x": torch.zeros(2)},
            r"1 extra tensors \(vision_tower.x\)$",
        ),
        (lambda w: w | {"model.norm.weight": torch.zeros(65)}, r"\[65\] instead of \[64\]"),
        (lambda w: w | {"lm_head.weight": torch.zeros(319, 64)}, r"\[319, 64\] instead of"),
    ],
)
def test_wrong_tensors(source: Source, change: Callable[..., Any], message: str) -> None:
    """Missing tensors made up by transformers on both sides of the proof, or extra ones dropped."""
    folder = source("llama")
    edit_weights(folder, change)
    refused(folder, message)


def test_tensors_that_are_not_floats(source: Source) -> None:
    """Integer or 8-bit weights cast as if they were numbers of their own."""
    folder = source("llama")
    edit_weights(folder, lambda w: w | {"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    refused(folder, "model.norm.weight is of type I8; allowed: F64", error=UnsupportedError)


def test_damaged_files(source: Source) -> None:
    """A truncated download or a pickle opened as far as it goes."""
    folder = source("llama")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(folder, "model.safetensors is not a whole safetensors file")
    path.rename(folder / "pytorch_model.bin")
    refused(folder, "found only pytorch_model.bin, and pickles are not opened")


def test_destinations(source: Source, tmp_path: Path) -> None:
    """A folder overwritten, the source itself most of all."""
    folder = source("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "busy.partial").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for target, message in (
        (folder, "is the source itself"),
        (folder / ".." / "source", "is the source itself"),
        (tmp_path / "full", "full exists and is not an empty folder"),
        (tmp_path / "full" / "thesis.tex", "exists and is not an empty folder"),
        (tmp_path / "no" / "where", "no: no such folder"),
        (tmp_path / "busy", "busy.partial exists: another command writes it"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(folder, target)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    convert(folder, tmp_path / "empty")
    assert opened(tmp_path / "empty").config.mask_token_id == 320


def test_dtypes_that_cannot_be(source: Source) -> None:
    """A type that cannot hold weights, found out after minutes of copying."""
    folder = source("llama")
    for name in ("dtype", "proof_dtype"):
        options = {name: "float8_e4m3fn"}
        refused(folder, "dtype is 'float8_e4m3fn'; allowed: fl", error=ConfigError, **options)
