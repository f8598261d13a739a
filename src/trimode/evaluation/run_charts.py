"""Which charts a run gets: what is drawn of a model's training, and of a drafter's."""

from __future__ import annotations

from trimode.evaluation.charts import BEFORE, HELD_OUT, OTHER, TRAIN, Chart, Line, shades
from trimode.evaluation.run_folder import RunFolder, by_offset

NUM_EVALUATIONS_SHOWN = 4
"""By offset: the first, the last, and some between them."""


def run_charts(run: RunFolder) -> list[Chart]:
    """The charts of a run in the order of the report; some may be empty yet."""
    speed_note = "Of text; the noisy copy is not counted."
    return [
        *_charts_of(run),
        _learning_rate(run),
        Chart("Tokens per second", speed_note, [_train(run, "tokens_per_second")]),
        Chart("Gradient norm", "Before clipping.", [_train(run, "grad_norm")]),
    ]


def _charts_of(run: RunFolder) -> list[Chart]:
    if run.has_anchors:
        return _anchor_charts(run)
    return _drafter_charts(run) if run.is_drafter else _model_charts(run)


def _model_charts(run: RunFolder) -> list[Chart]:
    acceptance = [
        _held_out(run, "acceptance_length", "judged by the AR view", HELD_OUT),
        _held_out(run, "text_acceptance_length", "judged by the text", OTHER),
    ]
    return [
        Chart(
            "AR loss",
            "Nats per token.",
            [_train(run, "ar_loss", "training"), _held_out(run, "ar_loss", "held out", HELD_OUT)],
        ),
        Chart(
            "Diffusion loss",
            "Nats per maskable token. Held out under fixed noise; training under its stage's own, "
            "so the two lie apart.",
            [
                _train(run, "diffusion_loss", "training"),
                _held_out(run, "diffusion_loss", "held out", HELD_OUT),
            ],
        ),
        Chart(
            "Acceptance length",
            "Accepted drafts plus the bonus token of a round, on held-out text.",
            acceptance,
        ),
        _offsets(run, "agreement_by_offset", against="accuracy_by_offset"),
    ]


def _drafter_charts(run: RunFolder) -> list[Chart]:
    acceptance = [
        _train(run, "acceptance_length", "training"),
        _held_out(run, "with_adapter/round_acceptance_length", "held out", HELD_OUT),
        _held_out(
            run, "without_adapter/round_acceptance_length", "held out, no adapter", BEFORE, True
        ),
    ]
    return [
        Chart("LK loss", "Nats, mean over blocks.", [_train(run, "lk_loss")]),
        Chart("Cross-entropy", "Nats, at the verifier's choice.", [_train(run, "ce_loss")]),
        Chart(
            "Acceptance length",
            "Accepted drafts plus the bonus token of a round; training rounds are mostly sampled, "
            "held-out ones greedy.",
            acceptance,
        ),
        _offsets(
            run,
            "with_adapter/agreement_by_offset",
            against="without_adapter/agreement_by_offset",
        ),
        Chart("Overlap", "Chance that the best coupling agrees.", [_train(run, "overlap")]),
    ]


def _anchor_charts(run: RunFolder) -> list[Chart]:
    charts = [Chart("Loss", "Weighted over the places of a group.", [_train(run, "loss")])]
    for form in ("skip", "block"):
        if not run.held_out(f"with_adapter/{form}/round_acceptance_length").steps:
            continue
        lines = [
            _held_out(run, f"{who}/{form}/round_acceptance_length", label, colour, is_dashed)
            for who, label, colour, is_dashed in (
                ("with_adapter", "adapter", HELD_OUT, False),
                ("untrained", "untrained", OTHER, True),
                ("without_adapter", "no adapter", BEFORE, True),
            )
        ]
        note = "Greedy rounds over held-out answers, all tokens that a round emits."
        charts.append(Chart(f"Tokens a round, {form}", note, lines))
        charts.append(
            _offsets(
                run,
                f"with_adapter/{form}/conditional_by_offset",
                against=f"untrained/{form}/conditional_by_offset",
                title=f"Right if all before are, {form}",
                note="Share of held-out masks that equal the text, of groups right until there.",
                label="untrained",
            )
        )
    overlap = Chart("Overlap", "Chance that the best coupling agrees.", [_train(run, "overlap")])
    return [*charts, overlap]


def _offsets(
    run: RunFolder,
    name: str,
    *,
    against: str,
    title: str = "Draft accuracy by offset",
    note: str = "Share of held-out drafts that equal the AR view's choice on the true text.",
    label: str = "no adapter",
) -> Chart:
    """Shares at each offset of a block, for evaluations from the first to the last."""
    rows = [row for row in run.evaluations if by_offset(row, name)]
    count = min(len(rows), NUM_EVALUATIONS_SHOWN)
    chosen = [rows[i * (len(rows) - 1) // max(count - 1, 1)] for i in range(count - 1)] + rows[-1:]
    lines = []
    for row, shade in zip(chosen, shades(count), strict=True):
        values = by_offset(row, name)
        offsets = range(1, len(values) + 1)
        lines.append(Line(f"step {row.step:,}", offsets, values, colour=shade, is_marked=True))
    values = by_offset(rows[-1], against) if rows else []
    if rows and against == "accuracy_by_offset":
        label = f"equal to the text, step {rows[-1].step:,}"
    label = label if rows else ""
    lines.append(Line(label, range(1, len(values) + 1), values, colour=BEFORE, is_dashed=True))
    return Chart(title, note, lines, x_label="offset in the block")


def _learning_rate(run: RunFolder) -> Chart:
    peak = run.config.get("optimizer", {}).get("learning_rate", 1.0)
    ratio = run.train("rate_ratio")
    line = Line("", ratio.steps, [value * peak for value in ratio.values], colour=OTHER)
    return Chart("Learning rate", f"Its peak is {peak:g}.", [line])


def _train(run: RunFolder, name: str, label: str = "") -> Line:
    series = run.train(name)
    return Line(label, series.steps, series.values, colour=TRAIN)


def _held_out(run: RunFolder, name: str, label: str, colour: str, is_dashed: bool = False) -> Line:
    series = run.held_out(name)
    return Line(
        label, series.steps, series.values, colour=colour, is_marked=True, is_dashed=is_dashed
    )
