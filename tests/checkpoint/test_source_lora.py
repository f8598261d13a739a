"""A LoRA that PEFT trained on the source of a converted model computes there what it did before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimode
from tests.checkpoint.made_sources import MakeTokenizer, Source, edit_json
from trimode.checkpoint.convert import convert
from trimode.errors import CheckpointError
from trimode.model.adapter import TARGETS

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of tied heads and pattern keys

IDS = torch.randint(250, (60,), generator=torch.Generator().manual_seed(1))

ATTENTION = TARGETS[:4]


def their_lora(source: Path, folder: Path, *, auto: str = "AutoModelForCausalLM", **o: Any) -> Any:
    """A random LoRA on the source, written by PEFT; returns PEFT's model in float64."""
    model = getattr(transformers, auto).from_pretrained(source, dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # in float32 otherwise, whatever the dtype
            module.forward = partial(normed, module)
    values = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**(values | o))).eval()
    wrapped.save_pretrained(folder)
    return wrapped


def normed(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def both_logits(wrapped: Any, target: Path, lora: Path) -> tuple[Tensor, Tensor]:
    """PEFT's and ours, [T, V] float64, after checking that the LoRA matters."""
    lm = trimode.load(target, device="cpu", dtype="float64", weights="plain", lora=lora)
    with torch.inference_mode():
        expected = wrapped(IDS[None]).logits[0]
        with wrapped.disable_adapter():
            assert (wrapped(IDS[None]).logits[0] - expected).abs().max() > 0.1
        return expected, lm.model(IDS[None]).logits[0, :, : expected.shape[1]]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"target_modules": ["q_proj", "v_proj"]}, id="q-v"),
        pytest.param({"target_modules": list(ATTENTION)}, id="attention"),
        pytest.param({}, id="all"),
        pytest.param({"target_modules": "all-linear"}, id="all-linear"),
        pytest.param({"target_modules": r".*layers\.1\.mlp\.\w+_proj"}, id="regex"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"layers_to_transform": [1]}, id="one-layer"),
        pytest.param({"exclude_modules": ["o_proj"]}, id="excluded"),
        pytest.param(
            {
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
                "alpha_pattern": {r"layers\.\d+\.self_attn\.\w+": 9, "model.layers.0.mlp.*": 3},
            },
            id="patterns",
        ),
        pytest.param({"use_rslora": True, "rank_pattern": {"o_proj": 9}}, id="rslora-pattern"),
    ],
)
@pytest.mark.parametrize(
    ("family", "is_tied"), [("llama", False), ("qwen3", True), ("qwen2", False)]
)
def test_logits(
    source: Source, tmp_path: Path, family: str, is_tied: bool, options: dict[str, Any]
) -> None:
    """Prevents: a LoRA refused for the source's names, or with another scale than in training."""
    folder = source(family, tie_word_embeddings=is_tied, dtype=torch.float64)
    wrapped = their_lora(folder, tmp_path / "lora", **options)
    convert(folder, tmp_path / "target", mask_token="300")
    expected, got = both_logits(wrapped, tmp_path / "target", tmp_path / "lora")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("untie", [False, True])
def test_a_tied_source_untied(source: Source, tmp_path: Path, untie: bool) -> None:
    """Prevents: an adapter that fits only one way of writing the head."""
    folder = source("llama", tie_word_embeddings=True, dtype=torch.float64)
    wrapped = their_lora(folder, tmp_path / "lora")
    convert(folder, tmp_path / "target", mask_token="300", untie=untie)
    expected, got = both_logits(wrapped, tmp_path / "target", tmp_path / "lora")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_a_lora_in_float64(source: Source, tmp_path: Path) -> None:
    """Prevents: factors rounded to float32 on their way into a float64 model."""
    folder = source("llama", dtype=torch.float64)
    wrapped = their_lora(folder, tmp_path / "lora").double()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1 + 1e-8)
    wrapped.save_pretrained(tmp_path / "lora")
    convert(folder, tmp_path / "target", mask_token="300")
    expected, got = both_logits(wrapped, tmp_path / "target", tmp_path / "lora")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prefix", ["layers.", "model.language_model.layers."])
def test_other_names_of_the_base(source: Source, tmp_path: Path, prefix: str) -> None:
    """Prevents: a LoRA of the headless model, or of a vision layout's text part, refused."""
    folder = source("llama", dtype=torch.float64)
    wrapped = their_lora(folder, tmp_path / "lora")
    edit_tensors(
        tmp_path / "lora", lambda w: {n.replace("model.layers.", prefix): t for n, t in w.items()}
    )
    convert(folder, tmp_path / "target", mask_token="300")
    expected, got = both_logits(wrapped, tmp_path / "target", tmp_path / "lora")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def edit_tensors(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], *, use: str = ""
) -> None:
    metadata = {"format": "pt"} | ({"trimode_use": use} if use else {})
    weights = change(load_file(folder / "adapter_model.safetensors"))
    save_file(weights, folder / "adapter_model.safetensors", metadata=metadata)


@pytest.fixture
def pair(source: Source, tmp_path: Path, tokenizer: MakeTokenizer) -> tuple[Path, Path, Path]:
    """A source with a tokenizer, what it became, and a LoRA of the source."""
    folder = source("llama", tokenizer=tokenizer("<reserved>"), vocab_size=280)
    their_lora(folder, tmp_path / "lora")
    convert(folder, tmp_path / "target")
    return folder, tmp_path / "target", tmp_path / "lora"


def refused(target: Path, lora: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        trimode.load(target, device="cpu", lora=lora)
    assert "\n" not in str(caught.value)


MERGE = "; merge it into its base with PEFT's merge_and_unload, and convert the merged model$"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True; allowed: False"),
        ({"bias": "all"}, "bias is 'all'; allowed: 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; allowed: None"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is .*; allowed: None"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head\S* \(LoRA of the head\)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens\S* \(LoRA of an embed"),
    ],
)
def test_variants_that_need_merging(
    source: Source, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Prevents: rows, norms or magnitudes left out, or a refusal without a way on."""
    folder = source("llama")
    their_lora(folder, tmp_path / "lora", **options)
    convert(folder, tmp_path / "target")
    refused(tmp_path / "target", tmp_path / "lora", f"{message}.*{MERGE}")


def test_a_fused_projection(pair: tuple[Path, Path, Path]) -> None:
    """Prevents: an unknown tensor without a word of what it is."""
    _, target, lora = pair
    edit_json(lora / "adapter_config.json", target_modules=["qkv_proj"])
    edit_tensors(lora, lambda w: {n.replace("q_proj", "qkv_proj"): t for n, t in w.items()})
    refused(target, lora, r"qkv_proj\S* \(a fused projection.*" + MERGE)


def test_a_resized_base(pair: tuple[Path, Path, Path], tokenizer: MakeTokenizer) -> None:
    """Prevents: new rows left out, so that the markers of the template mean nothing."""
    folder, target, lora = pair
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(300)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(lora, save_embedding_layers=True)
    refused(target, lora, r"\(whole rows, perhaps of a resized base\).*" + MERGE)


def test_another_width_and_depth(source: Source, tmp_path: Path) -> None:
    """Prevents: shapes and types of tensors in the place of what is wrong."""
    their_lora(source("llama"), tmp_path / "lora")
    shutil.rmtree(tmp_path / "source")
    convert(source("llama", hidden_size=32), tmp_path / "narrow")
    refused(tmp_path / "narrow", tmp_path / "lora", "made for another model: width 64, this one 32")
    shutil.rmtree(tmp_path / "source")
    convert(source("llama", num_hidden_layers=1), tmp_path / "low")
    refused(tmp_path / "low", tmp_path / "lora", "another model: it has layer 1 .* has 1 layers")


# The tokenizer beside it

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_a_tokenizer_with_a_template(
    pair: tuple[Path, Path, Path], tokenizer: MakeTokenizer
) -> None:
    """Prevents: the template of training left behind, or the mask token lost to its tokenizer."""
    _, target, lora = pair
    theirs = tokenizer("<turn>")  # a name of its own for the reserved slot
    theirs.chat_template = TEMPLATE
    theirs.eos_token = "<turn>"
    theirs.save_pretrained(lora)
    lm = trimode.load(target, device="cpu", lora=lora)
    assert lm.tokenizer.chat_template == TEMPLATE
    assert lm.tokenizer.convert_tokens_to_ids("<turn>") == 258
    assert lm.generation_defaults.stop_token_ids == (258,)
    mask_id = lm.model.config.mask_token_id
    assert lm.tokenizer.mask_token_id == mask_id
    assert trimode.load(target, device="cpu").tokenizer.mask_token_id == mask_id


def test_a_template_alone(pair: tuple[Path, Path, Path]) -> None:
    """Prevents: a template that is not read because no vocabulary lies beside it."""
    _, target, lora = pair
    (lora / "chat_template.jinja").write_text(TEMPLATE)
    assert trimode.load(target, device="cpu", lora=lora).tokenizer.chat_template == TEMPLATE


def test_a_tokenizer_without_a_template(
    pair: tuple[Path, Path, Path], tokenizer: MakeTokenizer
) -> None:
    """Prevents: a chat model that forgets how to chat because PEFT saved the bare tokenizer."""
    _, target, lora = pair
    (target / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer("<reserved>").save_pretrained(lora)
    assert trimode.load(target, device="cpu", lora=lora).tokenizer.chat_template == TEMPLATE


def test_tokenizers_of_other_rows(pair: tuple[Path, Path, Path], tokenizer: MakeTokenizer) -> None:
    """Prevents: a new marker read as the mask token, or texts read by another model's ids."""
    _, target, lora = pair
    content = json.loads((target / "config.json").read_text())
    assert (content["mask_token_id"], content["num_valid_tokens"]) == (259, 260)
    remedy = "a base with more rows was trained: merge it .*; or remove the tokenizer's files"
    tokenizer("<reserved>", "<new>").save_pretrained(lora)
    refused(target, lora, f"has 1 tokens that .* no rows for, first '<new>', id 259; {remedy}")
    tokenizer("<reserved>", "<|mask|>", "<a>", "<b>").save_pretrained(lora)
    refused(target, lora, "has 2 tokens that the model has no rows for, first '<a>', id 260; ")
    tokenizer("<reserved>").save_pretrained(lora)
    raw = json.loads((lora / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    by_id = sorted(vocab, key=vocab.__getitem__)
    vocab[by_id[65]], vocab[by_id[66]] = 66, 65
    (lora / "tokenizer.json").write_text(json.dumps(raw))
    refused(target, lora, "the tokenizer is another model's: token 65 is 'B', in this model 'A'")


def test_a_damaged_tokenizer(pair: tuple[Path, Path, Path], tokenizer: MakeTokenizer) -> None:
    """Prevents: an empty vocabulary that transformers makes up."""
    _, target, lora = pair
    tokenizer("<reserved>").save_pretrained(lora)
    (lora / "tokenizer.json").unlink()
    refused(target, lora, "the tokenizer has no vocabulary beside tokenizer_config.json")
