"""Charts of a run as self-contained SVG pictures. matplotlib is needed, and imported on use."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimode.errors import ConfigError
from trimode.evaluation.run_folder import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, HELD_OUT, BEFORE, OTHER = "#5b8fc7", "#c2410c", "#6b7280", "#0f766e"
"""Colours by what a line says: training, held out, what it started from, something else."""

_MAX_POINTS = 1500  # more than a chart has pixels
_SIZE = (5.6, 3.3)
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trimode",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart.

    Args:
        label: For the legend.
        x: Steps or offsets, ascending.
        y: As many values.
        colour: One of this module's, or a shade from `shades`.
        is_marked: Whether each point is marked, for few points.
        is_dashed: Whether it is dashed.
    """

    label: str
    x: Sequence[int]
    y: Sequence[float]
    colour: str = TRAIN
    is_marked: bool = False
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """What one picture shows.

    Args:
        title: Short.
        note: What is measured, in a sentence.
        lines: Empty ones are left out; a chart without points says so instead.
        x_label: `step` draws the stages as well.
    """

    title: str
    note: str
    lines: Sequence[Line]
    x_label: str = "step"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw yet."""
        return not any(line.x for line in self.lines)


def require_matplotlib() -> None:
    """Check that charts can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "charts need matplotlib, which is not installed: pip install 'trimode[report]'"
        ) from error


def data_uri(svg: bytes) -> str:
    """A picture as a `data:` address: pictures apart cannot share an id."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def draw(chart: Chart, *, stages: Sequence[Stage], num_steps: int) -> bytes:
    """The chart as SVG, the same bytes for the same numbers.

    Args:
        chart: Not an empty one.
        stages: Of the run.
        num_steps: Of the run so far: where every chart over steps ends.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for line in chart.lines:
            if line.x:
                _draw_line(axes, line)
        axes.set_xlabel(chart.x_label)
        if max(axes.get_ylim()) >= 1000:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if chart.x_label == "step":
            axes.set_xlim(0, num_steps)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            _draw_stages(axes, stages)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        if sum(bool(line.x) for line in chart.lines) > 1:
            axes.legend(fontsize=9, loc="best")
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def shades(count: int) -> list[str]:
    """Colours from light (early) to dark (late)."""
    ramp = ["#fdba74", "#fb923c", "#ea580c", "#9a3412"]
    return ramp[len(ramp) - count :]


def _draw_line(axes: Axes, line: Line) -> None:
    every = -(-len(line.x) // _MAX_POINTS)
    is_single = len(line.x) == 1
    axes.plot(
        [*line.x[:-1:every], line.x[-1]],
        [*line.y[:-1:every], line.y[-1]],
        color=line.colour,
        label=line.label,
        clip_on=False,  # half of a mark at the end is no mark
        linewidth=1.4,
        linestyle="--" if line.is_dashed else "-",
        marker="o" if line.is_marked or is_single else None,
        markersize=3.5,
    )


def _draw_stages(axes: Axes, stages: Sequence[Stage]) -> None:
    """Names the stages over the chart and draws where one ends and the next begins."""
    _, end = axes.get_xlim()
    for stage in stages:
        if stage.start >= end:
            continue
        if stage.start > 0:
            axes.axvline(stage.start, color="#9ca3af", linewidth=0.8, linestyle=":")
        axes.text(
            (stage.start + min(stage.stop, end)) / 2,
            1.01,
            stage.name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8.5,
            color="#6b7280",
        )
