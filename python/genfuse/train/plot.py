"""The loss curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import replacing
from .measure import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .base_module import Plan

__all__ = ["draw_curves", "write_figure"]

Curve = Sequence[tuple[int, float]]


def draw_curves(path: Path, plan: Plan, measures: Sequence[Measure], train: Curve, held_out: Curve) -> None:
    """Write a PNG of the training and held-out loss over the steps, atomically: a panel for each stage of the plan.

    Args:
        path: of the PNG.
        plan: of the run.
        measures: of each stage.
        train, held_out: (step, loss).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.0 + 6.0 * len(measures), 4.2), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for stage, (axes, measure) in enumerate(zip(panels, measures, strict=True)):
        _draw(
            axes,
            measure,
            [point for point in train if plan.stage(point[0] - 1) == stage],
            [point for point in held_out if plan.stage(point[0] - 1) == stage],
        )
        if stage == 0:
            axes.set_xlim(left=0)
    write_figure(path, figure)


def write_figure(path: Path, figure: Figure) -> None:
    """Write a Matplotlib figure as a PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure)  # draws without a window system, whatever backend is configured
    figure.savefig(content, format="png", dpi=120)
    with replacing(path) as file:
        file.write(content.getvalue())


def _draw(axes: Any, measure: Measure, train: Curve, held_out: Curve) -> None:
    if train:
        steps, values = [step for step, _ in train], [loss * measure.scale for _, loss in train]
        axes.plot(steps, values, color="#9ecae1", linewidth=0.8, label="training batches")
        axes.plot(steps, _smooth(values), color="#2171b5", linewidth=1.6, label="training, smoothed")
    if held_out:
        steps, values = [step for step, _ in held_out], [loss * measure.scale for _, loss in held_out]
        label = f"{measure.part} {measure.held_out}"
        axes.plot(steps, values, color="#d94801", marker="o", markersize=3.5, linewidth=1.4, label=label)
        best = min(range(len(values)), key=values.__getitem__)
        early = steps[best] < 0.3 * steps[-1]  # no room to the left of it
        axes.annotate(
            f"best {values[best]:.3f}",
            (steps[best], values[best]),
            xytext=(4 if early else -4, 14),
            textcoords="offset points",
            ha="left" if early else "right",
            color="#d94801",
            arrowprops={"arrowstyle": "-", "color": "#d94801", "linewidth": 0.6},
        )
    axes.set_xlabel("step")
    axes.set_ylabel(measure.axis)
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours on either side: few where the curve begins, because it is steep there."""
    smooth = []
    for place in range(len(values)):
        reach = min(len(values) // 20, place // 3, 50)
        near = values[place - reach : place + reach + 1]
        smooth.append(sum(near) / len(near))
    return smooth
