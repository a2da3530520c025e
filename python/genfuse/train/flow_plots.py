"""Pictures of what a flow does: samples, temperatures, densities, and how well it can be inverted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .grids import grid
from .plot import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = [
    "draw_density",
    "draw_image_temperatures",
    "draw_marginals",
    "draw_points",
    "draw_round_trip",
    "draw_temperatures",
]

Rows = NDArray[np.float64]

DATA, MODEL = "#2171b5", "#d94801"
MOST_POINTS = 4000  # in a scatter plot
MOST_COLUMNS = 4  # in a picture of pairs
OUTER = 0.5  # per cent of the points on each side that a picture may leave out, so that no outlier decides its scale


def window(rows: Rows, margin: float = 0.08) -> list[tuple[float, float]]:
    """For each column, the interval that a picture shows of it."""
    low, high = np.percentile(rows, [OUTER, 100.0 - OUTER], axis=0)
    reach = np.maximum(high - low, 1e-9 * np.maximum(1.0, np.abs(low)))
    return list(zip((low - margin * reach).tolist(), (high + margin * reach).tolist(), strict=True))


def _figure(columns: float, rows: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(columns, rows), layout="constrained")


def _scatter(axes: Any, rows: Rows, colour: str) -> None:
    rows = rows[:MOST_POINTS]
    # About as much ink however many points there are.
    size, alpha = (3.0, 0.4) if len(rows) > 1000 else (8.0, 0.6) if len(rows) > 100 else (16.0, 0.8)
    axes.scatter(rows[:, 0], rows[:, 1], s=size, alpha=alpha, color=colour, linewidths=0)


def _frame(axes: Any, title: str, limits: Sequence[tuple[float, float]], names: Sequence[str] | None) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])
    if names is not None:
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
    axes.spines[["top", "right"]].set_visible(False)


def draw_points(path: Path, data: Rows | None, samples: Rows, names: Sequence[str]) -> None:
    """Data beside as many samples, as a PNG: points of two columns, or a histogram of one.

    Args:
        path: of the PNG.
        data: ``[N, D]``; None for samples alone.
        samples: ``[M, D]``; of more than two columns the first two are shown.
        names: of the columns.
    """
    number = len(samples) if data is None else min(len(data), len(samples))
    parts = [("samples", samples[:number], MODEL)]
    if data is not None:
        parts.insert(0, ("data", data[:number], DATA))
    limits = window(parts[0][1][:, :2])
    if samples.shape[1] == 1:
        figure = _figure(6.0, 4.0)
        axes = figure.subplots()
        _histograms(axes, [(title, rows[:, 0], colour) for title, rows, colour in parts], limits[0])
        axes.set_xlabel(names[0])
        axes.set_ylabel("density")
        axes.legend(frameon=False)
    else:
        figure = _figure(4.2 * len(parts), 4.2)
        panels = figure.subplots(1, len(parts), squeeze=False)[0]
        for axes, (title, rows, colour) in zip(panels, parts, strict=True):
            _scatter(axes, rows, colour)
            _frame(axes, title, limits, names)
    write_figure(path, figure)


def _histograms(axes: Any, parts: Sequence[tuple[str, Rows, str]], limits: tuple[float, float]) -> None:
    # About twenty points in a bin.
    edges = np.linspace(*limits, 1 + min(60, max(10, max(len(values) for _, values, _ in parts) // 20)))
    for label, values, colour in parts:
        # Of all points, so that what lies outside of the picture is not spread over what lies in it.
        heights = np.histogram(values, edges)[0] / (max(1, len(values)) * np.diff(edges))
        filled = colour == DATA
        axes.stairs(heights, edges, color=colour, label=label, fill=filled, alpha=0.45 if filled else 1.0)
    axes.set_xlim(limits)
    axes.spines[["top", "right"]].set_visible(False)


def draw_density(
    path: Path, data: Rows, log_density: Callable[[Rows], NDArray[np.float64]], names: Sequence[str], places: int = 200
) -> None:
    """Data of one or two columns beside the model's density on a grid, as a PNG.

    Args:
        path: of the PNG.
        data: ``[N, D]``, D 1 or 2.
        log_density: of rows ``[M, D]``, in nats, ``[M]``.
        names: of the columns.
        places: of the grid, along each side.
    """
    limits = window(data)
    if data.shape[1] == 1:
        figure = _figure(6.0, 4.0)
        axes = figure.subplots()
        _histograms(axes, [("data", data[:, 0], DATA)], limits[0])
        line = np.linspace(*limits[0], 4 * places)
        axes.plot(line, np.exp(log_density(line[:, None])), color=MODEL, label="model", linewidth=1.4)
        axes.set_xlabel(names[0])
        axes.set_ylabel("density")
        axes.legend(frameon=False)
        write_figure(path, figure)
        return
    across, up = (np.linspace(*limit, places) for limit in limits)
    points = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    density = np.exp(log_density(points)).reshape(places, places)
    figure = _figure(9.0, 4.2)
    left, right = figure.subplots(1, 2)
    _scatter(left, data, DATA)
    _frame(left, "data", limits, names)
    # The highest tenth of a per cent of the grid may be a spike beside which the rest would look empty.
    top = float(np.quantile(density[np.isfinite(density)], 0.999)) if np.isfinite(density).any() else 1.0
    drawn = right.pcolormesh(across, up, density, cmap="viridis", vmin=0.0, vmax=max(top, 1e-300), rasterized=True)
    _frame(right, "density of the model", limits, names)
    figure.colorbar(drawn, ax=right, label="density", extend="max" if density.max() > top else "neither")
    write_figure(path, figure)


def draw_marginals(path: Path, data: Rows, samples: Rows, names: Sequence[str]) -> None:
    """Data and samples of the first columns, as a PNG: each column by itself, and each pair of them.

    Args:
        path: of the PNG.
        data, samples: ``[N, D]``, D at least 2.
        names: of the columns.
    """
    number, shown = min(len(data), len(samples)), min(MOST_COLUMNS, data.shape[1])
    data, samples = data[:number], samples[:number]
    limits = window(data)
    figure = _figure(2.5 * shown, 2.5 * shown)
    panels = figure.subplots(shown, shown, squeeze=False)
    for down in range(shown):
        for across in range(shown):
            axes = panels[down, across]
            if down == across:
                both = [("data", data[:, down], DATA), ("samples", samples[:, down], MODEL)]
                _histograms(axes, both, limits[down])
                axes.set_yticks([])
            else:
                # Below the diagonal the data, above it what the model makes of them.
                pair = [across, down]
                _scatter(axes, (data if down > across else samples)[:, pair], DATA if down > across else MODEL)
                _frame(axes, "", [limits[column] for column in pair], None)
            axes.tick_params(labelsize=7)
            if down == shown - 1:
                axes.set_xlabel(names[across], fontsize=9)
            if across == 0:
                axes.set_ylabel(names[down], fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    write_figure(path, figure)


def draw_temperatures(path: Path, samples: Sequence[tuple[float, Rows]], data: Rows, names: Sequence[str]) -> None:
    """Samples at several temperatures side by side, as a PNG, on the data's scale.

    Args:
        path: of the PNG.
        samples: (temperature, ``[N, D]``); of more than two columns the first two are shown.
        data: ``[M, D]``.
        names: of the columns.
    """
    figure = _figure(2.6 * len(samples) + 0.4, 3.0)
    panels = figure.subplots(1, len(samples), squeeze=False, sharey=True)[0]
    limits = window(data[:, :2])
    for axes, (temperature, rows) in zip(panels, samples, strict=True):
        title = f"temperature {temperature:g}"
        if data.shape[1] == 1:
            _histograms(axes, [("", rows[:, 0], MODEL)], limits[0])
            axes.set_title(title, fontsize=10)
        else:
            _scatter(axes, rows, MODEL)
            _frame(axes, title, limits, None)
            panels[0].set_ylabel(names[1])
        axes.set_xlabel(names[0])
    write_figure(path, figure)


def draw_image_temperatures(path: Path, samples: Sequence[tuple[float, Tensor]]) -> None:
    """Images at several temperatures, as a PNG: a row for each, of the same noise.

    Args:
        path: of the PNG.
        samples: (temperature, ``[N, C, H, W]`` in [0, 1]).
    """
    rows = [(temperature, grid(images[None])) for temperature, images in samples]
    height, width = rows[0][1].shape[:2]
    figure = _figure(9.0, len(rows) * (9.0 * height / width + 0.05))
    for axes, (temperature, pixels) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_ylabel(f"T = {temperature:g}", rotation=0, ha="right", va="center")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    write_figure(path, figure)


def draw_round_trip(path: Path, errors: dict[str, NDArray[np.float64]], unit: str) -> None:
    """Histograms of the largest error of each item after data -> noise -> data, as a PNG, on a logarithmic scale.

    Args:
        path: of the PNG.
        errors: the arithmetic, as in ``"float32"``, and the errors in it, ``[N]``.
        unit: of the errors.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(6.4, 3.8)
    axes = figure.subplots()
    for (name, values), colour in zip(errors.items(), (DATA, MODEL, "#41ab5d"), strict=False):
        shown = values[np.isfinite(values)]
        lost = len(values) - len(shown)
        note = f", {lost} not finite" if lost else ""
        if len(shown) == 0:
            axes.plot([], [], color=colour, label=f"{name}{note}")
            continue
        # An error of nothing has no logarithm: it is drawn with the smallest that there is.
        least = shown[shown > 0.0].min(initial=np.inf)
        logs = np.log10(np.maximum(shown, least if np.isfinite(least) else np.finfo(name).eps))
        edges = np.arange(math.floor(10 * logs.min()), math.ceil(10 * logs.max()) + 2) / 10
        label = f"{name}: median {np.median(shown):.1e}, largest {shown.max():.1e}{note}"
        axes.hist(logs, bins=edges.tolist(), color=colour, alpha=0.7, label=label)
    axes.xaxis.set_major_formatter(lambda value, place: f"$10^{{{value:g}}}$")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"largest error after data → noise → data, {unit}")
    axes.set_ylabel("items")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    write_figure(path, figure)
