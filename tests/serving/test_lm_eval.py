"""lm-evaluation-harness over HTTP: its `local-completions` against a running server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimode
from tests.conftest import MASK, _byte_tokenizer
from tests.serving.conftest import Served, serving
from trimode import hf
from trimode.checkpoint.io import save_checkpoint
from trimode.model import TriModeModel

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

ROWS = [
    {"question": "def f", "choices": ["(x):", "zzz", " = 1"], "label": 0},
    {"question": "class ", "choices": ["A:", "9", "é("], "label": 2},
    {"question": "for i in ", "choices": ["range(3):", "x:", "\n"], "label": 1},
    {"question": "import ", "choices": ["os", "sys\n", "numpy as np"], "label": 0},
    {"question": "", "choices": ["a", "b", "cd"], "label": 1},
]
TASK = """task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


@dataclass(frozen=True, slots=True)
class Both:
    """One checkpoint, behind HTTP and in transformers.

    Attributes:
        folder: Of the checkpoint.
        served: Its server.
        theirs: The harness's own wrapper of transformers' model.
    """

    folder: Path
    served: Served
    theirs: Any

    def ours(self, **options: Any) -> Any:
        """The harness's client of the server."""
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        return LocalCompletionsAPI(
            model="tiny",
            base_url=f"{self.served.url}/v1/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(self.folder),
            max_length=500,
            **options,
        )


@pytest.fixture(scope="module")
def both(tiny_model: Callable[..., TriModeModel], tmp_path_factory: Any) -> Iterator[Both]:
    """Float64, so that both say the same but for rounding."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_checkpoint(tiny_model(), folder, tokenizer=_byte_tokenizer())
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert isinstance(plain, hf.TriModeForCausalLM)
    plain.register_forward_hook(_ban_mask)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    theirs = HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=2)
    with serving(trimode.load(folder, dtype="float64"), token_budget=32) as served:
        yield Both(folder, served, theirs)


def _ban_mask(model: Any, args: Any, output: Any) -> None:
    """A random model likes the mask token, which is no text; a trained one never writes it."""
    output.logits[..., MASK] = -torch.inf


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """As the harness makes them."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"batch_size": 4}, {"num_concurrent": 3}, {"tokenized_requests": False}),
    ],
    ids=str,
)
def test_log_likelihoods_are_transformers(both: Both, options: dict[str, Any]) -> None:
    """Prevents: log-likelihoods of other tokens, by a shift, by a healed end, by a missing first
    token, or of what a stale prefix left out; and greedy answers that are not seen to be."""
    pairs = [(row["question"], choice) for row in ROWS for choice in row["choices"]]
    long = "x = 1\n" * 40
    pairs += [(long, "y"), (long + "z", " = 2")]
    if options.get("tokenized_requests") is False:  # then BOS is text, and text is no BOS
        pairs = [pair for pair in pairs if pair[0]]
    greedy = both.theirs.generate_until(
        requests_of("generate_until", [("ab", {"until": ["\0"], "max_gen_toks": 1})])
    )[0]
    assert greedy.isascii()
    pairs.append(("ab", greedy))
    wanted = both.theirs.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in wanted].count(True) >= 1
    for _ in range(2):  # the second time its prompts lie in rows
        found = both.ours(**options).loglikelihood(
            requests_of("loglikelihood", pairs), disable_tqdm=True
        )
        for (ours, is_greedy), (theirs, is_theirs) in zip(found, wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
            assert is_greedy == is_theirs


def test_rolling_log_likelihoods_are_transformers(both: Both) -> None:
    """Prevents: perplexities of another text."""
    texts = [("def f(x):\n    return x\n",), ("class A:\n" * 9,)]
    wanted = both.theirs.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts))
    found = both.ours().loglikelihood_rolling(requests_of("loglikelihood_rolling", texts))
    assert found == pytest.approx(wanted, abs=1e-3)


def test_texts_are_transformers(both: Both) -> None:
    """Prevents: an answer that begins with the prompt, or runs past its stop string."""
    arguments = {"until": ["\n", "q"], "max_gen_toks": 12, "do_sample": False}
    contexts = [(context, arguments) for context in ("def f", "class Stack", "x" * 40)]
    requests = requests_of("generate_until", contexts)
    wanted = both.theirs.generate_until(requests, disable_tqdm=True)
    assert both.ours().generate_until(requests, disable_tqdm=True) == wanted


def test_a_task_has_the_same_accuracy(both: Both, tmp_path: Path) -> None:
    """Prevents: a whole evaluation that fails where single requests work."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(TASK.format(rows=rows))
    results = [
        lm_eval.simple_evaluate(
            model=model,
            tasks=["tiny"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
        for model in (both.ours(), both.theirs)
    ]
    ours, theirs = (found["results"]["tiny"]["acc,none"] for found in results)
    assert ours == theirs
    assert [found["n-samples"]["tiny"]["effective"] for found in results] == [5, 5]
    for mine, its in zip(*(found["samples"]["tiny"] for found in results), strict=True):
        for (ours, is_greedy), (theirs, is_theirs) in zip(
            mine["filtered_resps"], its["filtered_resps"], strict=True
        ):
            assert ours == pytest.approx(theirs, abs=1e-4)
            assert is_greedy == is_theirs
