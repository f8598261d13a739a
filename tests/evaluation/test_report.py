"""The HTML report: whole, true to the log, and there for runs in any state."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from tests.evaluation.recorded import (
    anchor_records,
    drafter_records,
    held_out,
    model_records,
    step,
    write_run,
)
from tests.training.fake_stream import write_data
from trimode.checkpoint.adapter import save_adapter
from trimode.cli.main import main
from trimode.evaluation import samples as samples_module
from trimode.evaluation.report import render
from trimode.evaluation.run_charts import run_charts
from trimode.evaluation.run_folder import read_run
from trimode.evaluation.samples import Continuation, Sample, make_samples
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import LoraPair
from trimode.runtime import TriModeLM

Capture = pytest.CaptureFixture[str]

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in its turn, nothing fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.images: dict[str, str] = {}
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        values = dict(attrs)
        assert "href" not in values
        if tag == "img":
            source, title = values["src"], values["alt"]
            assert source is not None
            assert title
            kind, _, data = source.partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.images[title] = base64.b64decode(data).decode()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return "".join(self.text)


def chart_lines(folder: Path) -> dict[str, list[tuple[list[int], list[float]]]]:
    charts = run_charts(read_run(folder))
    return {c.title: [(list(line.x), list(line.y)) for line in c.lines] for c in charts}


def test_all_parts_are_there_and_say_what_the_log_says(tmp_path: Path) -> None:
    """A part that is missing, a page that needs the network, numbers from anywhere else."""
    folder = write_run(tmp_path / "mine", model_records())
    page = Page(render(read_run(folder), samples=[], no_samples="None: a test."))
    assert list(page.images) == [
        *("AR loss", "Diffusion loss", "Acceptance length", "Draft accuracy by offset"),
        *("Learning rate", "Tokens per second", "Gradient norm"),
    ]
    for svg in page.images.values():
        ElementTree.fromstring(svg)
    assert all(name in page.images["AR loss"] for name in ("training", "held out", "ar", "joint"))
    for words in ("mine", "Finished after 8 steps.", "None: a test.", "learning_rate: 0.004"):
        assert words in page.words
    for words in ("torch: 9.8.7", "commit: c0ffee", "5.6789", "6.5432", "1.568", "1.234", "1,234"):
        assert words in page.words
    assert "1 min 20 s" in page.words
    lines = chart_lines(folder)
    assert lines["AR loss"] == [
        (list(range(1, 9)), [6.875, 6.75, 6.625, 6.5, 5.375, 5.25, 5.125, 5.0]),
        ([4, 8], [6.7891, 5.6789]),
    ]
    assert lines["Diffusion loss"][0] == ([5, 6, 7, 8], [4.875, 4.75, 4.625, 4.5])
    assert lines["Learning rate"] == [(list(range(1, 9)), [0.0005 * n for n in range(1, 9)])]
    assert lines["Acceptance length"][0] == ([4, 8], [1.5678, 1.5678])
    assert lines["Draft accuracy by offset"][1:] == [
        ([1, 2, 3], [0.61, 0.41, 0.21]),
        ([1, 2, 3], [0.31, 0.21, 0.11]),
    ]


def test_a_curve_in_the_picture_is_the_one_of_the_log(tmp_path: Path) -> None:
    """A chart drawn upside down, shifted, or with points left out."""
    folder = write_run(tmp_path / "run", model_records())
    svg = Page(render(read_run(folder), samples=[])).images["Gradient norm"]
    [path] = re.findall(r'<path d="([^"]+)"[^>]*stroke: #5b8fc7', svg)
    points = [tuple(map(float, p.split())) for p in re.findall(r"[ML] ([-\d.]+ [-\d.]+)", path)]
    assert len(points) == 8
    assert len({y for _, y in points}) == 1
    gaps = [after[0] - before[0] for before, after in zip(points, points[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 7, rel=1e-3)


def test_a_drafters_run(tmp_path: Path) -> None:
    """A report that knows only the records of a model's training."""
    folder = write_run(tmp_path / "run", drafter_records())
    page = Page(render(read_run(folder), samples=[]))
    assert "Training of a drafter." in page.words
    assert {"LK loss", "Cross-entropy", "Acceptance length", "Overlap"} < page.images.keys()
    for words in ("1.247", "1.864", "1.358", "2.2500"):
        assert words in page.words
    lines = chart_lines(folder)
    assert lines["Acceptance length"][1:] == [([8], [1.8642]), ([8], [1.2468])]
    assert lines["Draft accuracy by offset"] == [
        ([1, 2, 3], [0.7, 0.5, 0.3]),
        ([1, 2, 3], [0.5, 0.3, 0.1]),
    ]


def test_a_run_from_anchors(tmp_path: Path) -> None:
    """Prevents a report without the numbers that the run is for."""
    folder = write_run(tmp_path / "run", anchor_records(), drafter={"rank": 4, "anchors": {}})
    page = Page(render(read_run(folder), samples=[]))
    charts = {"Loss", "Tokens a round, skip", "Right if all before are, skip", "Overlap"}
    assert charts < page.images.keys()
    for words in ("2.789", "2.012", "2.046", "1.789", "5,600", "4.7500"):
        assert words in page.words
    lines = chart_lines(folder)
    assert lines["Tokens a round, skip"] == [([8], [2.7891]), ([8], [2.0456]), ([8], [2.0123])]
    assert lines["Right if all before are, skip"] == [
        ([1, 2], [0.5, 0.4]),
        ([1, 2], [0.05, 0.1]),
    ]


@pytest.mark.parametrize("num_records", [0, 1, 6])
def test_a_run_that_is_still_going(tmp_path: Path, num_records: int) -> None:
    """No report before the first numbers, or for a log whose last line is cut short."""
    records = model_records()[:num_records]
    folder = write_run(tmp_path / "run", records, torn='{"kind": "step", "sta')
    assert main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    done = max((record["step"] for record in records), default=0)
    assert f"Not finished: step {done} of 8 so far." in page.words
    assert "Unreadable lines of the log: 1." in page.words
    assert ("AR loss" in page.images) == (num_records > 0)
    assert "None yet: they are made once the run is finished." in page.words
    (folder / "log.jsonl").unlink()
    assert main(["report", str(folder)]) == 0


def test_older_logs(tmp_path: Path) -> None:
    """Held-out numbers beside the record's own ones; a mean over two stages taken for a loss."""
    flat = {**held_out(8)["report"], "ar_loss": 5.6, "acceptance_length": 1.25}
    records: list[dict[str, Any]] = [
        step(3, "ar", ar_loss=7.0, diffusion_loss=0.0),
        step(6, "joint", ar_loss=6.0, diffusion_loss=4.0),
        step(8, "joint", ar_loss=6.0, diffusion_loss=6.0),
        {"kind": "held_out", "step": 8, **flat},
    ]
    lines = chart_lines(write_run(tmp_path / "run", records))
    assert lines["Diffusion loss"][0] == ([8], [6.0])
    assert lines["AR loss"] == [([3, 6, 8], [7.0, 6.0, 6.0]), ([8], [5.6])]


def test_what_a_model_writes_cannot_break_the_page(tmp_path: Path) -> None:
    """Markup or control characters in generated text."""
    text = "\n<script>alert(1)</script>\x00\x1b[31m\ud800 & <pre>"
    made = (Continuation("ar", text, 9, 1.0), Continuation("linear", text, 5, 1.75))
    sample = Sample(prompt="<b>", true_text=None, continuations=made)
    html = render(read_run(write_run(tmp_path / "<i>", model_records())), samples=[sample])
    page = Page(html)
    assert html.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html)
    assert "\n<script>alert(1)</script>\ufffd\ufffd[31m\ufffd & <pre>" in page.words
    assert "linear: 5 forwards, 1.75 tokens per forward" in page.words
    assert "The same text as ar." in page.words


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MAX_NEW_TOKENS", 12)


def test_samples_of_a_finished_run(
    tmp_path: Path, few_tokens: None, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Samples of another model, or of one mode only; held-out text that is not the document's."""
    data = write_data(tmp_path / "data")
    folder = write_run(tmp_path, model_records(), data=str(data))
    tiny_checkpoint(name="final")
    samples = make_samples(read_run(folder), device="cpu")
    assert len(samples) == 3
    for sample in samples:
        assert [made.label for made in sample.continuations] == ["ar", "diffusion", "linear"]
        ar, _, linear = sample.continuations
        assert ar.text == linear.text
        assert ar.tpf_decode == 1.0
        assert sample.true_text is not None
    assert main(["report", str(folder), "--prompt", "def <f>", "--device", "cpu"]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "\ndef <f>" in page.words
    assert "How the held-out text goes on" not in page.words


def test_samples_of_a_drafter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    few_tokens: None,
    tiny_checkpoint: Callable[..., Path],
    tiny_model: Callable[..., TriModeModel],
    random_adapter: Callable[..., DrafterAdapter],
) -> None:
    """The base decoded without the adapter that the run is about."""
    base = tiny_checkpoint(name="base")
    pairs = random_adapter(tiny_model(torch.float32), strength=3.0).items()
    adapter = DrafterAdapter({(i, name): LoraPair(p.down, p.up, 0.5) for i, name, p in pairs})
    save_adapter(adapter, tmp_path / "linear_spec_lora", dtype=torch.float32)
    data = write_data(tmp_path / "data")
    folder = write_run(tmp_path, drafter_records(), data=str(data), model={"init": str(base)})
    used: list[tuple[str, bool]] = []
    generate = TriModeLM.generate

    def noted(lm: TriModeLM, prompt: Any, *, mode: str, **options: Any) -> Any:
        used.append((mode, lm.adapter is not None))
        return generate(lm, prompt, mode=mode, **options)

    monkeypatch.setattr(TriModeLM, "generate", noted)
    for sample in make_samples(read_run(folder), device="cpu"):
        labels = [made.label for made in sample.continuations]
        assert labels == ["ar", "diffusion", "linear, no drafter", "linear, drafter"]
        assert len({made.text for made in sample.continuations if made.label != "diffusion"}) == 1
    assert used == 3 * [("ar", True), ("diffusion", True), ("linear", False), ("linear", True)]


def test_no_samples_is_said_and_is_no_failure(tmp_path: Path, capsys: Capture) -> None:
    """A report lost because the export or the data has moved since."""
    folder = write_run(tmp_path / "run", model_records())
    assert main(["report", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"report": str(folder / "report.html"), "num_samples": 0}
    assert err.startswith("trimode: warning: the report has no samples: ")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert f"None could be made: {folder / 'final'}: no such folder" in page.words


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A traceback for a wrong folder or a missing package."""
    assert main(["report", str(tmp_path)]) == 2
    assert "expected the output_dir of a training run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[1]")
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the saved config of a training run" in capsys.readouterr().err
    folder = write_run(tmp_path / "run", model_records())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err == (
        "trimode: error: charts need matplotlib, which is not installed: "
        "pip install 'trimode[report]'\n"
    )
    assert not (folder / "report.html").exists()
