"""The transformers interface: registration, loading, the published signatures and refusals.

Text and counts: `tests/test_hf_text.py`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from trimode import hf
from trimode.errors import CheckpointError, RequestError, TriModeError, UnsupportedError
from trimode.model import DrafterAdapter

METHODS = ("ar_generate", "generate", "linear_spec_generate")
Models = Callable[..., hf.TriModeModel]


# Opening checkpoints


@pytest.mark.parametrize("has_auto_map", [True, False])
@pytest.mark.parametrize("model_type", ["trimode", "nemotron_labs_diffusion"])
def test_auto_classes_open_a_folder_without_remote_code(
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    has_auto_map: bool,
) -> None:
    """transformers asking to run the code that a published config.json points to."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for remote code"))
    classes = (hf.TriModeModel, hf.NemotronLabsDiffusionModel)
    expected = next(c for c in classes if c.config_class.model_type == model_type)
    folder = tiny_checkpoint(config_class=expected.config_class)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == model_type
    assert config["architectures"] == [expected.__name__]
    if has_auto_map:
        name = "nemotron_labs_diffusion"
        config["auto_map"] = {
            "AutoConfig": f"configuration_{name}.NemotronLabsDiffusionConfig",
            "AutoModel": f"modeling_{name}.NemotronLabsDiffusionModel",
        }
        (folder / "config.json").write_text(json.dumps(config))
    assert type(AutoConfig.from_pretrained(folder)) is expected.config_class
    model = AutoModel.from_pretrained(folder)
    assert type(model) is expected
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    for name in METHODS:
        out, nfe = getattr(model, name)(ids, max_new_tokens=3)
        assert out[:, : ids.shape[1]].equal(ids)
        assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 3
        assert nfe >= 1


def test_tokenizer_without_a_class_name(tiny_checkpoint: Callable[..., Path]) -> None:
    """A tokenizer_config.json that names no class finding no tokenizer for our model types."""
    folder = tiny_checkpoint()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["tokenizer_class"]
    path.write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [97, 98]


def test_published_keys_in_the_config(tiny_checkpoint: Callable[..., Path]) -> None:
    """A checkpoint in the published shape losing fields that other engines read."""
    folder = tiny_checkpoint(config_class=hf.NemotronLabsDiffusionConfig)
    config = json.loads((folder / "config.json").read_text())
    for key in ("dlm_paradigm", "mask_token_id", "block_size", "head_dim", "rope_parameters"):
        assert key in config
    assert config["rope_parameters"]["llama_4_scaling_beta"] == 0.1


def test_hf_round_trip_leaves_the_drafter_out(
    hf_model: Models, random_adapter: Callable[..., Any], tmp_path: Path
) -> None:
    """An attached drafter written as extra tensors, so that the saved folder no longer opens."""
    model = hf_model()
    assert model.drafter is not None
    model.save_pretrained(tmp_path / "out")
    again = AutoModel.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float64
    assert again.drafter is None
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in model.state_dict().items())


def test_wrong_tensors_are_one_checkpoint_error(tiny_checkpoint: Callable[..., Path]) -> None:
    """transformers filling missing tensors with random numbers behind a warning."""
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="9 missing tensors"):
        AutoModel.from_pretrained(folder)
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="9 extra tensors"):
        AutoModel.from_pretrained(folder)


def test_from_pretrained_options(tiny_checkpoint: Callable[..., Path]) -> None:
    """Options of transformers (subfolder, loading info, dtype) swallowed by our override."""
    folder = tiny_checkpoint()
    model, info = AutoModel.from_pretrained(
        folder.parent, subfolder=folder.name, output_loading_info=True, dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]


def test_presets_by_name() -> None:
    """The published sizes missing from the interface."""
    assert hf.preset("14b").head_dim == 128
    with pytest.raises(ValueError, match="allowed: 3b, 8b, 14b"):
        hf.preset("7b")


# The published signatures


def test_signatures_are_the_published_ones() -> None:
    """A script for the published models passing arguments by position and meaning others."""
    thinking = ["max_thinking_tokens", "end_think_token_id"]
    published = {
        "ar_generate": ["max_new_tokens", "temperature", "eos_token_id", *thinking],
        "generate": [
            *("max_new_tokens", "block_length", "threshold", "causal_context", "temperature"),
            *("eos_token_id", *thinking),
        ],
        "linear_spec_generate": [
            *("max_new_tokens", "block_length", "temperature", "mask_token_id", "eos_token_id"),
            *(*thinking, "threshold"),
        ],
    }
    for name, expected in published.items():
        parameters = inspect.signature(getattr(hf.TriModeModel, name)).parameters.values()
        by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert by_position == ["self", "prompt_ids", *expected]
        defaults = {p.name: p.default for p in parameters}
        assert defaults["max_new_tokens"] == 128
        assert defaults["temperature"] == 0.0
    assert inspect.signature(hf.TriModeModel.generate).parameters["threshold"].default == 0.9


# The drafter


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT beside newer transformers
def test_load_drafter(hf_model: Models, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """`load_drafter` entering the adapter into the state dict, or not following a cast."""
    peft = pytest.importorskip("peft")
    folder = tmp_path / "lora"
    base = tiny_model(torch.float32)
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["o_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(folder)
    model = hf_model(torch.float32)
    names = set(model.state_dict())
    hf.load_drafter(model, folder)
    assert isinstance(model.drafter, DrafterAdapter)
    assert set(model.state_dict()) == names
    assert model.double().linear_spec_generate(torch.tensor([[1, 2]]), 4)[0].shape == (1, 6)
    hf.load_drafter(model, None)
    assert model.drafter is None
    with pytest.raises(CheckpointError, match="no such folder"):
        hf.load_drafter(model, tmp_path / "nothing")
    with pytest.raises(UnsupportedError, match=r"trimode\.hf"):
        hf.load_drafter(wrapped, folder)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT beside newer transformers
def test_model_wrapped_by_peft_is_refused(hf_model: Models) -> None:
    """The published snippet, whose adapter would colour the AR view here."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["o_proj"])
    wrapped = peft.get_peft_model(hf_model(torch.float32), config)
    for model in (wrapped, wrapped.base_model, wrapped.base_model.model):
        for name in METHODS:
            with pytest.raises(UnsupportedError, match="load_drafter"):
                getattr(model, name)(torch.tensor([[1, 2]]), max_new_tokens=2)


# Refusals


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("generate", {"causal_context": False}, UnsupportedError, "causal_context is False"),
        ("generate", {"max_thinking_tokens": 9}, RequestError, "end_think_token_id is None"),
        ("ar_generate", {"end_think_token_id": 13}, RequestError, "end_think_token_id is 13"),
        ("linear_spec_generate", {"max_thinking_tokens": -1}, RequestError, "tokens is -1"),
        ("linear_spec_generate", {"mask_token_id": 100}, UnsupportedError, "own, 258"),
        ("generate", {"shift_logits": True}, RequestError, "does not take shift_logits"),
        ("ar_generate", {"top_p": 0.9}, RequestError, "it takes prompt_ids, max_new_tokens"),
        ("linear_spec_generate", {"do_sample": True}, RequestError, "does not take do_sample"),
        ("ar_generate", {"max_new_tokens": 0}, RequestError, "max_new_tokens is 0"),
        ("ar_generate", {"max_new_tokens": 600}, RequestError, "2 tokens .* context of 512"),
        ("ar_generate", {"temperature": -1.0}, RequestError, "temperature is -1.0"),
        ("generate", {"block_length": 0}, RequestError, "block_length is 0"),
        ("generate", {"threshold": 1.5}, RequestError, "threshold is 1.5"),
        ("generate", {"steps": 9, "block_length": 8}, RequestError, "1 to block_length=8"),
        ("linear_spec_generate", {"block_length": 1}, RequestError, "at least 2"),
    ],
)
def test_refusals(
    hf_model: Models, name: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """An argument that is not built, or impossible, ignored in silence."""
    with pytest.raises(error, match=message):
        getattr(hf_model(), name)(torch.tensor([[1, 2]]), **arguments)


@pytest.mark.parametrize(
    ("ids", "attention_mask", "message"),
    [
        (torch.tensor([1, 2]), None, r"prompt_ids is \(2,\)"),
        (torch.tensor([[1.0, 2.0]]), None, "prompt_ids is Tensor"),
        ([[1, 2]], None, "prompt_ids is list"),
        (torch.zeros(1, 0, dtype=torch.long), None, r"prompt_ids is \(1, 0\)"),
        (torch.tensor([[1, 999]]), None, "token id 999"),
        (torch.tensor([[1, 2]]), torch.ones(1, 3), r"attention_mask is \(1, 3\)"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]), r"row 0 is \[1, 0, 1\]"),
        (torch.tensor([[1, 2]]), torch.tensor([[0, 0]]), r"row 0 is \[0, 0\]"),
    ],
)
def test_wrong_prompts(
    hf_model: Models, ids: Any, attention_mask: Tensor | None, message: str
) -> None:
    """Shapes, ids or masks that would be decoded as something else than was meant."""
    with pytest.raises(RequestError, match=message):
        hf_model().generate(ids, 4, attention_mask=attention_mask)


def test_mask_token_that_equals_the_configs_is_allowed(hf_model: Models) -> None:
    """The card's snippet, which passes the model's own mask id, refused."""
    model, prompt = hf_model(), torch.tensor([[1, 2]])
    ids, _ = model.linear_spec_generate(prompt, 4, mask_token_id=258)
    assert ids.equal(model.linear_spec_generate(prompt, 4)[0])


def test_non_finite_weights_are_reported(hf_model: Models) -> None:
    """A broken network returning a short text as if it had ended."""
    model = hf_model()
    with torch.no_grad():
        model.encoder.norm.weight[0] = torch.nan
    with pytest.raises(TriModeError, match="row 0 stopped: the network gave non-finite logits"):
        model.ar_generate(torch.tensor([[1, 2]]), 4)
