"""The loss curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import replacing

__all__ = ["draw_curve"]


def draw_curve(
    path: Path, train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], bits: float
) -> None:
    """Write a PNG of the training and held-out loss over the steps, atomically.

    Args:
        path: of the PNG.
        train, held_out: (step, nats per token).
        bits: bits per character of one nat per token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, values = [step for step, _ in train], [nats * bits for _, nats in train]
        axes.plot(steps, values, color="#9ecae1", linewidth=0.8, label="training batches")
        axes.plot(steps, _smooth(values), color="#2171b5", linewidth=1.6, label="training, smoothed")
    if held_out:
        steps, values = [step for step, _ in held_out], [nats * bits for _, nats in held_out]
        axes.plot(steps, values, color="#d94801", marker="o", markersize=3.5, linewidth=1.4, label="held-out text")
        best = min(range(len(values)), key=values.__getitem__)
        axes.annotate(
            f"best {values[best]:.3f}",
            (steps[best], values[best]),
            xytext=(-4, 14),
            textcoords="offset points",
            ha="right",
            color="#d94801",
            arrowprops={"arrowstyle": "-", "color": "#d94801", "linewidth": 0.6},
        )
    axes.set_xlabel("step")
    axes.set_ylabel("bits per character")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    FigureCanvasAgg(figure)  # draws without a window system, whatever backend is configured
    figure.savefig(content, format="png", dpi=120)
    with replacing(path) as file:
        file.write(content.getvalue())


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours on either side: few where the curve begins, because it is steep there."""
    smooth = []
    for place in range(len(values)):
        reach = min(len(values) // 20, place // 3, 50)
        near = values[place - reach : place + reach + 1]
        smooth.append(sum(near) / len(near))
    return smooth
