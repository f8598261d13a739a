"""What others build on `AutoModelForCausalLM`: pipelines, PEFT, TRL, lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers import pipeline as make_pipeline

from trimode import hf
from trimode.errors import UnsupportedError

Models = Callable[..., hf.TriModeForCausalLM]

ignore_renamed = pytest.mark.filterwarnings("ignore::FutureWarning")
"""Arguments that newer transformers calls something else, PEFT's among them."""


@pytest.fixture
def padder(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a pad token and what else training tools ask for."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer.backend_tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
        padding_side="left",
    )
    tokenizer.model_max_length = 512
    return tokenizer


# Pipelines


def test_pipeline_over_a_model(
    causal_lm: Models,
    padder: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents: a pipeline that calls the model unsupported, or gives other text than it."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    model = causal_lm(torch.float32)
    with caplog.at_level(logging.WARNING):
        pipe = make_pipeline("text-generation", model=model, tokenizer=padder)
    assert "not supported" not in caplog.text
    options = {"max_new_tokens": 8, "do_sample": False}
    texts = pipe(["def f", "class Stack"], **options, return_full_text=False)
    for prompt, got in zip(["def f", "class Stack"], texts, strict=True):
        encoded = padder(prompt, return_tensors="pt")
        out = model.generate(**encoded, **options)[0, encoded["input_ids"].shape[1] :]
        assert got == [{"generated_text": padder.decode(out, skip_special_tokens=True)}]
    batched = pipe(["def f", "class Stack"], **options, return_full_text=False, batch_size=2)
    assert batched == texts
    by_mode = pipe("def f", **options, return_full_text=False, mode="ar")
    assert by_mode == texts[0]
    torch.manual_seed(0)
    first = pipe("def f", max_new_tokens=8, do_sample=True, temperature=0.9)
    torch.manual_seed(0)
    assert pipe("def f", max_new_tokens=8, do_sample=True, temperature=0.9) == first
    text = texts[0][0]["generated_text"]
    stop = next(character for character in text[1:] if character.isascii())
    cut = pipe("def f", **options, return_full_text=False, stop_sequence=stop)
    assert cut == [{"generated_text": text[: text.index(stop) + 1]}]


def test_pipeline_over_a_folder(tiny_checkpoint: Callable[..., Path]) -> None:
    """Prevents: a folder path that finds no class for the task."""
    pipe = make_pipeline("text-generation", model=str(tiny_checkpoint()))
    assert type(pipe.model) is hf.TriModeForCausalLM
    (got,) = pipe("def f", max_new_tokens=4, do_sample=False)
    assert got["generated_text"].startswith("def f")


# Training


def batch(num_rows: int = 2, num_tokens: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_rows, num_tokens), generator=generator)


@ignore_renamed
def test_peft_trains_the_adapter_alone(causal_lm: Models, tmp_path: Path) -> None:
    """Prevents: frozen weights with gradients, a step without effect, a lost adapter."""
    peft = pytest.importorskip("peft")
    base = causal_lm(torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]
    )
    model = peft.get_peft_model(base, config)
    ids = batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    with_grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grads
    assert all("lora_" in name for name in with_grads)
    out = model.generate(input_ids=ids[:, :4], max_new_tokens=6)
    with model.disable_adapter():
        plain = model.generate(input_ids=ids[:, :4], max_new_tokens=6)
    assert not out.equal(plain)
    assert out.equal(model.generate(input_ids=ids[:, :4], max_new_tokens=6, mode="ar"))
    for mode in ("linear", "diffusion"):
        with pytest.raises(UnsupportedError, match=f"mode is '{mode}'; .* PEFT: 'ar'"):
            model.generate(input_ids=ids[:, :4], max_new_tokens=6, mode=mode)
    model.save_pretrained(tmp_path / "lora")
    fresh = peft.PeftModel.from_pretrained(causal_lm(torch.float32), tmp_path / "lora")
    assert fresh.generate(input_ids=ids[:, :4], max_new_tokens=6).equal(out)
    merged = model.merge_and_unload()
    assert type(merged) is hf.TriModeForCausalLM
    for mode in ("ar", "linear"):
        assert merged.generate(ids[:, :4], max_new_tokens=6, mode=mode).equal(out)


@ignore_renamed
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_trainer_takes_a_step(causal_lm: Models, tmp_path: Path, is_checkpointed: bool) -> None:
    """Prevents: a loss averaged over other tokens than the Trainer counted; a folder of a Trainer
    that does not open."""
    rows = [{"input_ids": row, "labels": row} for row in batch(4)]
    first = causal_lm(torch.float32, initializer_range=0.1).requires_grad_(True)
    expected = first(batch(4), labels=batch(4)).loss.item()
    trainer = Trainer(
        model=first,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=is_checkpointed,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-3)
    assert losses[1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again(batch(4), labels=batch(4)).loss.item() < expected


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("has_peft", [False, True])
def test_trl_takes_a_step(
    causal_lm: Models, padder: PreTrainedTokenizerFast, tmp_path: Path, has_peft: bool
) -> None:
    """Prevents: a trainer that applies the head itself finding no network below the head."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    texts = ["def f(x):\n    return x\n", "class A:\n    pass\n"] * 2
    model = causal_lm(torch.float32, initializer_range=0.1).requires_grad_(True)
    ids = padder(
        [text + padder.eos_token for text in texts],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    expected = model(**{**ids, "labels": labels}).loss.item()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=padder,
        peft_config=lora if has_peft else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-3)
    assert losses[1] < losses[0]


# lm-evaluation-harness


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_lm_evaluation_harness(causal_lm: Models, padder: PreTrainedTokenizerFast) -> None:
    """Prevents: log-likelihoods of other tokens, or answers that run past their stop string."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = causal_lm(torch.float32)
    lm = HFLM(pretrained=model, tokenizer=padder, batch_size=2)
    assert lm.backend == "causal"
    pairs = [("def f", "(x):"), ("class", " A"), ("import", " os\n")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    for (context, target), (got, is_greedy) in zip(
        pairs, lm.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        ids = padder(context + target, return_tensors="pt")["input_ids"]
        num = len(padder(target)["input_ids"])
        laws = model(ids).logits[0, -num - 1 : -1].log_softmax(-1)
        assert got == pytest.approx(laws.gather(1, ids[0, -num:, None]).sum().item(), abs=1e-3)
        assert is_greedy == laws.argmax(-1).equal(ids[0, -num:])
    contexts = ["def f", "class Stack"]
    free = []
    for context in contexts:
        encoded = padder(context, return_tensors="pt")
        out = model.generate(**encoded, max_new_tokens=12)[0, encoded["input_ids"].shape[1] :]
        free.append(padder.decode(out, skip_special_tokens=True))
    until = free[0][4:6]
    arguments = {"until": [until], "max_gen_toks": 12, "do_sample": False}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(context, arguments), idx=i)
        for i, context in enumerate(contexts)
    ]
    got = lm.generate_until(requests, disable_tqdm=True)
    assert got == [text.split(until)[0] for text in free]


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_local_task_of_the_harness(
    causal_lm: Models, padder: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Prevents: a whole evaluation that fails where single requests work."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text(
        '{"question": "def f", "choices": ["(x):", "zzz"], "label": 0}\n'
        '{"question": "class ", "choices": ["A:", "9"], "label": 0}\n'
    )
    (tmp_path / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=causal_lm(torch.float32), tokenizer=padder, batch_size=2),
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert 0 <= results["results"]["tiny"]["acc,none"] <= 1
    assert results["n-samples"]["tiny"]["effective"] == 2
