"""The report of a training run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from trimode.evaluation.charts import data_uri, draw
from trimode.evaluation.page import CSS, pre, safe, table
from trimode.evaluation.run_charts import run_charts
from trimode.evaluation.run_folder import LogRow, RunFolder, Series
from trimode.evaluation.samples import MAX_NEW_TOKENS, Sample

_NAMES = {
    "lk_loss": "LK loss",
    "ce_loss": "cross-entropy",
    "ar_loss": "AR loss",
    "diffusion_loss": "diffusion loss",
    "acceptance_length": "acceptance length",
    "text_acceptance_length": "acceptance length against the text",
    "without_adapter/round_acceptance_length": "acceptance length, no adapter",
    "with_adapter/round_acceptance_length": "acceptance length, adapter",
    "without_adapter/acceptance_length": "on the text's context, no adapter",
    "with_adapter/acceptance_length": "on the text's context, adapter",
    **{
        f"{who}/{form}/round_acceptance_length": f"tokens a round in {form}, {whose}"
        for form in ("skip", "block")
        for who, whose in (
            ("without_adapter", "no adapter"),
            ("untrained", "untrained"),
            ("with_adapter", "adapter"),
        )
    },
    "with_adapter/skip/fused_tokens": "tokens a fused forward, skip",
    "with_adapter/block/fused_tokens": "tokens a fused forward, block",
}
"""What a person is told, by its name in the log and in the order of the held-out table."""

_FIRST = (
    *("ar_loss", "diffusion_loss", "acceptance_length"),
    *("without_adapter/round_acceptance_length", "with_adapter/round_acceptance_length"),
    *("with_adapter/skip/round_acceptance_length", "with_adapter/block/round_acceptance_length"),
)
"""Those of them that stand at the top."""

_DIGITS = {"ar_loss": 4, "diffusion_loss": 4}


def write_report(run: RunFolder, *, samples: Sequence[Sample], no_samples: str = "") -> Path:
    """Write `report.html` into the run's folder, whole or not at all.

    Args:
        run: The run.
        samples: Shown at the end.
        no_samples: Why there are none.

    Returns:
        The path of the file.
    """
    path = run.folder / "report.html"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(render(run, samples=samples, no_samples=no_samples), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(run: RunFolder, *, samples: Sequence[Sample], no_samples: str = "") -> str:
    """The report as HTML."""
    name = safe(run.folder.resolve().name)
    what = "drafter" if run.is_drafter else "model"
    if run.is_finished:
        state = f"Finished after {run.num_steps:,} steps."
    else:
        state = f"Not finished: step {run.num_steps:,} of {run.total_steps:,} so far."
    torn = f" Unreadable lines of the log: {run.num_unreadable}." if run.num_unreadable else ""
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="lead">Training of a {what}. {state}{torn}</p>',
        _facts(run),
        "<h2>Curves</h2>",
        _figures(run),
        "<h2>Stages</h2>",
        _stage_table(run),
        "<h2>Held out</h2>",
        _evaluation_table(run),
        "<h2>Samples</h2>",
        _samples(samples, no_samples),
        "<h2>Config and versions</h2>",
        pre(_yaml(run.environment)),
        f"<details open><summary>The resolved config</summary>{pre(_yaml(run.config))}</details>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: training report</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


# Numbers -----------------------------------------------------------------------------------------


def _facts(run: RunFolder) -> str:
    """The handful of numbers to see first."""
    steps = [row.values for row in run.rows if row.kind == "step"]
    facts: list[tuple[str, str]] = []
    if steps:
        facts.append(("tokens trained on", f"{steps[-1].get('tokens', 0):,.0f}"))
        if run.has_anchors:
            facts.append(("drafted tokens", f"{steps[-1].get('drafted_tokens', 0):,.0f}"))
        facts.append(("training time", _duration(steps[-1].get("seconds", 0.0))))
        speed = median(values.get("tokens_per_second", 0.0) for values in steps)
        facts.append(("tokens/s, median", f"{speed:,.0f}"))
    if run.evaluations:
        last = run.evaluations[-1]
        drafts = f", K = {last.values['block_length']:.0f}" if _has_drafts(last) else ""
        for key in _FIRST:
            if key in last.values:
                label = _NAMES[key]
                where = drafts if "acceptance" in key else ""
                facts.append((f"held out: {label}{where}", _number(key, last.values[key])))
    items = "".join(f"<div><dt>{safe(k)}</dt><dd>{safe(v)}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{items}</dl>' if items else '<p class="note">Nothing logged yet.</p>'


def _stage_table(run: RunFolder) -> str:
    """How each stage began and ended."""
    losses: tuple[str, ...] = ("ar_loss", "diffusion_loss")
    if run.is_drafter:
        losses = ("loss",) if run.has_anchors else ("lk_loss", "ce_loss")
    names = [_NAMES.get(name, name.replace("_", " ")) for name in losses]
    header = ["stage", "steps", *(f"{name}, first" for name in names)]
    header += [*(f"{name}, last" for name in names), "tokens/s, median", "gradient norm, largest"]
    curves = {name: run.train(name) for name in losses}
    lines = []
    for stage in run.stages:
        rows = run.steps_of(stage.name)
        found = [_within(curves[name], stage.start, stage.stop) for name in losses]
        done = max(0, min(run.num_steps, stage.stop) - stage.start)
        cells = [stage.name, f"{done:,} of {stage.stop - stage.start:,}"]
        cells += [_number("ar_loss", values[0]) if values else "–" for values in found]
        cells += [_number("ar_loss", values[-1]) if values else "–" for values in found]
        speeds = [row.values.get("tokens_per_second", 0.0) for row in rows]
        norms = [row.values.get("grad_norm", 0.0) for row in rows]
        cells += [f"{median(speeds):,.0f}", f"{max(norms):.2f}"] if rows else ["–", "–"]
        lines.append(cells)
    return table(header, lines)


def _evaluation_table(run: RunFolder) -> str:
    """Every evaluation with its numbers."""
    rows = run.evaluations
    if not rows:
        return '<p class="note">No evaluation yet.</p>'
    keys = [key for key in _NAMES if key in rows[-1].values]
    keys += sorted(key for key in rows[-1].values if key.startswith("extra/"))
    header = ["step", *(_NAMES.get(key, key) for key in keys)]
    lines = [[f"{row.step:,}", *(_cell(row, key) for key in keys)] for row in rows]
    return (
        '<p class="note">Losses in nats per token; the acceptance length counts the accepted '
        f"drafts of a round and its bonus token.</p>{table(header, lines)}"
    )


def _figures(run: RunFolder) -> str:
    figures = []
    for chart in run_charts(run):
        if chart.is_empty:
            picture = '<p class="note">No numbers yet.</p>'
        else:
            svg = draw(chart, stages=run.stages, num_steps=run.num_steps)
            picture = f'<img alt="{safe(chart.title)}" src="{data_uri(svg)}">'
        caption = f"<strong>{safe(chart.title)}</strong><p>{safe(chart.note)}</p>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{picture}</figure>")
    return f'<div class="grid">{"".join(figures)}</div>'


# Text --------------------------------------------------------------------------------------------


def _samples(samples: Sequence[Sample], no_samples: str) -> str:
    if not samples:
        return f'<p class="note">{safe(no_samples or "None were made.")}</p>'
    parts = [
        f'<p class="note">Greedy, up to {MAX_NEW_TOKENS} new tokens, default block length '
        "and threshold. Forwards include the prefill; tokens per forward do not.</p>"
    ]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"<h3>Prompt {number}</h3>{pre(sample.prompt)}")
        if sample.true_text is not None:
            parts.append(f"<p>How the held-out text goes on</p>{pre(sample.true_text)}")
        shown: dict[str, str] = {}
        for made in sample.continuations:
            tpf = "" if made.tpf_decode is None else f", {made.tpf_decode:.2f} tokens per forward"
            parts.append(
                f"<p><strong>{safe(made.label)}</strong>: {made.num_forwards} forwards{tpf}</p>"
            )
            first = shown.setdefault(made.text, made.label)
            if first == made.label:
                parts.append(pre(made.text))
            else:
                parts.append(f'<p class="note">The same text as {safe(first)}.</p>')
    return "\n".join(parts)


def _yaml(saved: dict[str, Any]) -> str:
    return yaml.safe_dump(saved, sort_keys=False, allow_unicode=True)


def _number(key: str, value: float) -> str:
    return f"{value:.{_DIGITS.get(key, 3)}f}"


def _cell(row: LogRow, key: str) -> str:
    return _number(key, row.values[key]) if key in row.values else "–"


def _has_drafts(row: LogRow) -> bool:
    return "block_length" in row.values


def _within(series: Series, start: int, stop: int) -> list[float]:
    pairs = zip(series.steps, series.values, strict=True)
    return [value for step, value in pairs if start < step <= stop]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
