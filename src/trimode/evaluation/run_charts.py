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
        *(_drafter_charts(run) if run.is_drafter else _model_charts(run)),
        _learning_rate(run),
        Chart("Tokens per second", speed_note, [_train(run, "tokens_per_second")]),
        Chart("Gradient norm", "Before clipping.", [_train(run, "grad_norm")]),
    ]


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
        _offsets(run, "with_adapter/agreement_by_offset", against="without_adapter"),
        Chart("Overlap", "Chance that the best coupling agrees.", [_train(run, "overlap")]),
    ]


def _offsets(run: RunFolder, name: str, *, against: str) -> Chart:
    """Agreement at each offset of a block, for evaluations from the first to the last."""
    rows = [row for row in run.evaluations if by_offset(row, name)]
    count = min(len(rows), NUM_EVALUATIONS_SHOWN)
    chosen = [rows[i * (len(rows) - 1) // max(count - 1, 1)] for i in range(count - 1)] + rows[-1:]
    lines = []
    for row, shade in zip(chosen, shades(count), strict=True):
        values = by_offset(row, name)
        offsets = range(1, len(values) + 1)
        lines.append(Line(f"step {row.step:,}", offsets, values, colour=shade, is_marked=True))
    if rows and against == "accuracy_by_offset":
        label, values = f"equal to the text, step {rows[-1].step:,}", by_offset(rows[-1], against)
    elif rows:
        label, values = "no adapter", by_offset(rows[-1], f"{against}/agreement_by_offset")
    else:
        label, values = "", []
    lines.append(Line(label, range(1, len(values) + 1), values, colour=BEFORE, is_dashed=True))
    return Chart(
        "Draft accuracy by offset",
        "Share of held-out drafts that equal the AR view's choice on the true text.",
        lines,
        x_label="offset in the block",
    )


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
