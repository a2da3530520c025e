"""Training, evaluating and sampling flows: what the command line calls, and a script can call as well."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import checkpoint
from .checkpoint import (
    CONFIG,
    FLOWS,
    WEIGHTS,
    SavedFlow,
    load_flow,
    make_config,
    model_class,
    model_hash,
    replacing,
    write_json,
    write_text,
)
from .engine import Job, Outcome, duration, train
from .errors import UserError, memory_for
from .flow_module import FlowData, seeded_losses
from .flow_plots import (
    draw_density,
    draw_image_temperatures,
    draw_marginals,
    draw_points,
    draw_round_trip,
    draw_temperatures,
)
from .grids import draw_samples
from .images import Images, load_images
from .measure import Measure, bits_per_dim
from .settings import (
    IMAGE_SETS,
    TABLE_SETS,
    FlowSettings,
    GlowSettings,
    MAFSettings,
    NSFSettings,
    RealNVPSettings,
)
from .tables import Table, is_table, load_table

__all__ = ["describe_flow", "evaluate_flow", "round_trip", "sample_flow", "score_flow", "train_flow"]

AT_ONCE = 500  # items scored between two moves of the progress bar
TRIPS = 1000  # test items that are inverted
FEWEST_SHOWN = 500  # rows of data in a picture
POINTS = 4000  # samples in a picture of points
TEMPERATURES = (0.25, 0.5, 0.7, 0.85, 1.0)
RESULTS, SAMPLES, SWEEP, DENSITY, ROUND_TRIP = (
    "results.json",
    "samples.png",
    "temperatures.png",
    "density.png",
    "roundtrip.png",
)


def train_flow(name: str, given: dict[str, Any], **options: Any) -> dict[str, Any] | None:
    """Train a flow, keep the one that does best on the validation data, and report how good it is on the test data.

    Args:
        name: ``"realnvp"``, ``"glow"``, ``"nsf"``, ``"maf"`` or ``"iaf"``.
        given: settings that differ from the defaults of `RealNVPSettings`, `GlowSettings`, `NSFSettings` or
            `MAFSettings`. With `resume`, the saved ones hold, and only epochs may be given another value.
        options: ``out``, ``resume``, ``accelerator``, ``devices``, ``nodes``, ``strategy``, ``precision``, ``say``,
            ``progress``: see `genfuse.train.engine.train`.

    Returns:
        What ``results.json`` holds; None in processes other than the first.

    Raises:
        UserError: data, settings, folder or devices will not do.
        Stopped: SIGINT or SIGTERM came; ``last.ckpt`` holds the last step.

    Example:
        >>> train_flow("nsf", {"epochs": 1}, out=Path("runs/tiny"))  # doctest: +SKIP
    """
    return train(next(job for job in JOBS if job.name == name), given, **options)


def twin_of(model: Any, arguments: dict[str, Any]) -> torch.nn.Module:
    """The same model in plain PyTorch, with the same weights; it stores what a reversible one recomputes."""
    twin: torch.nn.Module = checkpoint.twin_of(
        model, {name: value for name, value in arguments.items() if name != "reversible"}
    )
    return twin


def read_data(settings: FlowSettings) -> Images | Table:
    """The images or the table that `settings` name."""
    data = settings.data
    if data not in (*IMAGE_SETS, *TABLE_SETS) and not Path(data).exists():
        known = ", ".join((*TABLE_SETS, *IMAGE_SETS))
        raise UserError(f"cannot read {data}: there is no such file, nor a data set of that name ({known}).")
    if not is_table(data):
        return load_images(data, image_size=settings.image_size, grey=settings.grey)
    if settings.image_size is not None or settings.grey:
        raise UserError(f"--image-size and --grey are for images, and {data} is a table.")
    return load_table(data)


class FlowJob(Job):
    """A run of ``genfuse train`` for a flow."""

    format = FLOWS
    data_names = (*IMAGE_SETS, *TABLE_SETS)
    report = RESULTS
    settings_class: ClassVar[type[FlowSettings]]
    settings: Any

    @classmethod
    def read(cls, settings: FlowSettings) -> Images | Table:
        source = read_data(settings)
        there = "tables" if isinstance(source, Table) else "images"
        if there not in settings.takes:
            able = [job.name for job in JOBS if there in job.settings_class.takes]
            raise UserError(
                f"genfuse train {cls.name} learns {settings.takes[0]}, and {source.name} holds {there}: "
                f"they are for genfuse train {' or '.join(able)}."
            )
        return source

    def __init__(self, settings: FlowSettings, source: Images | Table) -> None:
        from .base_module import EpochPlan

        self.settings = settings
        self.data = FlowData(source, settings.held_out, settings.split_seed)
        levels = source.levels if isinstance(source, Images) else 0
        self.arguments = settings.model_arguments(self.data.shape, levels)
        self.check_model()
        run = {"settings": settings.to_json(), "data": source.name, "fingerprint": source.fingerprint}
        self.config = make_config(self.model, self.arguments, run, standardization=self.data.standardization)
        self.plan = self.batches = EpochPlan(len(self.data.train), settings)
        self.measures = [self._measure()]

    def _measure(self) -> Measure:
        images = self.data.items == "images"
        return Measure(
            unit="bits/dim" if images else "nats",
            key="bits_per_dim" if images else "nats",
            scale=bits_per_dim(self.data.shape) if images else 1.0,
            axis="bits per dimension" if images else "nats per row",
            held_out=self.data.items,
            items=self.data.items,
            items_per_step=self.settings.batch_size,
            part="validation",
        )

    def build(self) -> torch.nn.Module:
        model: torch.nn.Module = model_class(self.model)(**self.arguments)
        return model

    def training(self, model: Any) -> Any:
        from .flow_module import FlowModule, FlowRunData

        if self.settings.implementation == "torch":
            model = twin_of(model, self.arguments)
        module = FlowModule(model, self.settings, self.batches, self.data.log_volume)
        return module, FlowRunData(self.data, self.batches.order)

    def introduction(self) -> list[str]:
        data, settings, source = self.data, self.settings, self.data.source
        parts = f"{len(data.train):,} + {len(data.validation):,} + {len(data.test):,}"
        if isinstance(source, Table):
            columns = f"{len(source.columns)} column{'s' if len(source.columns) > 1 else ''}"
            what = f"{parts} rows of {columns}, standardised"
        else:
            size = " x ".join(map(str, source.shape if source.shape[0] > 1 else source.shape[1:]))
            files = f" ({source.files} files, {source.skipped} passed over)" if source.files > 1 else ""
            what = f"{parts} images of {size}, {source.levels} levels, dequantised afresh each time{files}"
        lines = [
            f"data      {source.name}: {what}",
            f"split     training + validation + test, {data.split}",
            f"model     {self.model}: {self.sizes()}",
            f"training  {settings.epochs} epochs, {self.plan.total_steps} steps of {settings.batch_size} {data.items}",
        ]
        if settings.implementation == "torch":
            lines[2] += ", the twin in plain PyTorch"
        if data.doubtful:
            names = ", ".join(map(repr, data.doubtful[:5])) + (", ..." if len(data.doubtful) > 5 else "")
            one = len(data.doubtful) == 1
            lines.append(
                f"warning   column{'' if one else 's'} {names} {'has' if one else 'have'} few distinct values: "
                "a density can grow without bound on them, and its nats then mean nothing."
            )
        return lines

    def sizes(self) -> str:
        """The model's, for people."""
        raise NotImplementedError

    def finish(self, outcome: Outcome) -> dict[str, Any]:
        folder, say, settings, data = outcome.folder, outcome.say, self.settings, self.data
        saved = load_flow(folder, str(outcome.device))
        say("")
        say(f"scoring {len(data.test):,} test {data.items} ...")
        with memory_for(f"scoring the test {data.items}"):
            figures = score_flow(saved, data.test, settings.seed, outcome.progress)
            errors = round_trip(saved.model, data.test[:TRIPS])
        items = self.plan.total_steps * settings.batch_size
        measure = self.measures[0]
        results = {
            **figures,
            f"validation_{measure.key}": outcome.best[1] * measure.scale,
            "round_trip_median": _number(errors["float32"], 0.5),
            "round_trip_largest": _number(errors["float32"], 1.0),
            "best_step": outcome.best[0],
            "steps": self.plan.total_steps,
            "data": data.source.name,
            "implementation": settings.implementation,
            "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
            "seconds": round(outcome.seconds, 1),
            f"{data.items}_per_second": round(items / max(outcome.seconds, 1e-9)),
        }
        pictures = draw_pictures(folder, saved, data, errors, settings.seed)
        write_json(folder / RESULTS, results)
        say(f"best model at step {outcome.best[0]}, chosen on the validation {data.items}; on the test {data.items}:")
        for line in figures_for_people(results):
            say(f"  {line}")
        say(f"  round trip data → noise → data: largest error {results['round_trip_largest']:.1e}")
        say(f"  {duration(outcome.seconds)} of training, {results[f'{data.items}_per_second']:,} {data.items}/s")
        say("")
        say(f"saved in {folder}: {WEIGHTS}, {CONFIG}, {RESULTS}, loss.png, {', '.join(pictures)}, tensorboard/")
        more = (
            "images: genfuse sample {} --out more.png"
            if data.items == "images"
            else "rows: genfuse sample {} --out more.csv"
        )
        say(f"more {more.format(folder)}")
        return results


class RealNVPJob(FlowJob):
    name: ClassVar[str] = "realnvp"
    model = "RealNVP"
    settings_class = RealNVPSettings
    model_sizes = ("flows", "hidden", "levels", "channels")
    step_sizes = ("batch_size", "hidden", "channels")

    def sizes(self) -> str:
        settings = self.settings
        how = ", reversible" if settings.reversible else ""
        if self.data.items == "images":
            return f"{settings.levels} scales, {settings.channels} channels{how}"
        return f"{settings.flows} affine couplings, hidden {_listed(settings.hidden)}{how}"


class GlowJob(FlowJob):
    name: ClassVar[str] = "glow"
    model = "Glow"
    settings_class = GlowSettings
    model_sizes = ("levels", "steps", "channels")
    step_sizes = ("batch_size", "channels")

    def sizes(self) -> str:
        settings = self.settings
        how = ", reversible" if settings.reversible else ""
        return f"{settings.levels} levels of {settings.steps} steps, {settings.channels} channels{how}"


class NSFJob(FlowJob):
    name: ClassVar[str] = "nsf"
    model = "NeuralSplineFlow"
    settings_class = NSFSettings
    model_sizes = ("flows", "hidden", "bins")
    step_sizes = ("batch_size", "hidden", "bins")

    def sizes(self) -> str:
        settings = self.settings
        kind = "autoregressive" if settings.autoregressive else "coupling"
        bound = f"{settings.bins} bins in [-{settings.tail_bound:g}, {settings.tail_bound:g}]"
        return f"{settings.flows} {kind} splines of {bound}, hidden {_listed(settings.hidden)}"


class MAFJob(FlowJob):
    name: ClassVar[str] = "maf"
    model = "MAF"
    settings_class = MAFSettings
    model_sizes = ("flows", "hidden")
    step_sizes = ("batch_size", "hidden")

    def sizes(self) -> str:
        return f"{self.settings.flows} autoregressive layers, hidden {_listed(self.settings.hidden)}"


class IAFJob(MAFJob):
    name: ClassVar[str] = "iaf"
    model = "IAF"


JOBS: tuple[type[FlowJob], ...] = (RealNVPJob, GlowJob, NSFJob, MAFJob, IAFJob)


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _number(values: NDArray[np.float64], quantile: float) -> float:
    return float(np.quantile(values, quantile)) if np.isfinite(values).all() else math.inf


# Scoring and sampling.


def score_flow(saved: SavedFlow, items: Tensor, seed: int, progress: bool = False) -> dict[str, Any]:
    """How likely images or rows are under a flow.

    Args:
        saved: the flow.
        items: as it sees them: uint8 ``[N, C, H, W]`` or standardised float32 ``[N, D]``.
        seed: of the dequantisation noise of images.
        progress: show a bar.

    Returns:
        ``nll_nats``, the mean of ``-log p(x)`` (of a table in the data's units, and ``nll_nats_standardized`` of the
        rows as the model sees them; of images a bound, Theis et al. 2016, arXiv 1511.01844, eq. 11), its standard error
        over items ``nll_standard_error_nats``, of images the same in ``bits_per_dim`` and
        ``bits_per_dim_standard_error``, and how many ``images`` or ``rows``.
    """
    device = next(saved.model.parameters()).device
    parts = torch.split(items, AT_ONCE)
    if progress:
        from rich.progress import track

        parts = track(parts, description="scoring ", transient=True)  # type: ignore[assignment]
    losses = [seeded_losses(saved.model, part.to(device), seed + place) for place, part in enumerate(parts)]
    nll = torch.cat(losses).double().cpu()
    mean, error = float(nll.mean()), float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else None
    if saved.standardization is not None:
        figures = {
            "nll_nats": mean + saved.standardization.log_volume,
            "nll_nats_standardized": mean,
            "nll_standard_error_nats": error,
        }
        return {**figures, "rows": len(nll)}
    scale = bits_per_dim(items.shape[1:])
    figures = {
        "nll_nats": mean,
        "nll_standard_error_nats": error,
        "bits_per_dim": mean * scale,
        "bits_per_dim_standard_error": None if error is None else error * scale,
    }
    return {**figures, "images": len(nll)}


def figures_for_people(figures: dict[str, Any]) -> list[str]:
    """The figures of `score_flow`, as lines."""
    if "bits_per_dim" in figures:
        error = figures["bits_per_dim_standard_error"]
        spread = "" if error is None else f", standard error over images {error:.4f}"
        return [f"NLL   {figures['bits_per_dim']:.4f} bits/dim ({figures['nll_nats']:.3f} nats){spread}"]
    error = figures["nll_standard_error_nats"]
    spread = "" if error is None else f", standard error over rows {error:.4f}"
    return [
        f"NLL   {figures['nll_nats']:.4f} nats, as a density in the data's units{spread}",
        f"      {figures['nll_nats_standardized']:.4f} nats of the standardised rows",
    ]


@torch.no_grad()
def round_trip(model: Any, items: Tensor, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """The largest error of each item after data -> noise -> data.

    Args:
        model: the flow.
        items: as it sees them.
        seed: of the dequantisation noise.

    Returns:
        By the arithmetic, ``"float32"`` and ``"float64"``: the errors, ``[N]``, of images in levels of a pixel, of
        rows in standard deviations.
    """
    device = next(model.parameters()).device
    noise = torch.rand(items.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = {}
    for dtype in (torch.float32, torch.float64):
        exact = copy.deepcopy(model).to(dtype)
        errors = []
        for part, u in zip(torch.split(items, AT_ONCE), torch.split(noise, AT_ONCE), strict=True):
            x, u = part.to(device, dtype), u.to(device, dtype)
            if exact.dequantize is not None:
                x = exact.dequantize(x, u=u)[0]
            x = x.flatten(1) if exact.flatten else x
            back = exact.flow.inverse(exact.flow(x)[0])[0]
            if exact.dequantize is not None:
                x, back = (exact.dequantize.continuous(y)[0] for y in (x, back))
            errors.append((back - x).abs().flatten(1).amax(1))
        found[str(dtype).removeprefix("torch.")] = torch.cat(errors).double().cpu().numpy()
    return found


def draw_samples_of(saved: SavedFlow, count: int, temperature: float, seed: int) -> Any:
    """Samples: images ``[N, C, H, W]`` in [0, 1], or float64 rows ``[N, D]`` in the data's units."""
    device = next(saved.model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        drawn = saved.model.sample(count, temperature=temperature, generator=generator)
    if saved.standardization is None:
        return drawn.float() / (saved.model.dequantize.levels - 1)
    return saved.standardization.undo(drawn)


def draw_pictures(
    folder: Path, saved: SavedFlow, data: FlowData, errors: dict[str, NDArray[np.float64]], seed: int
) -> list[str]:
    """Write the PNG files of a run; returns their names."""
    standardization = saved.standardization
    if standardization is None:
        draw_samples(folder / SAMPLES, draw_samples_of(saved, 100, 1.0, seed))
        sweep = [(heat, draw_samples_of(saved, 10, heat, seed)) for heat in TEMPERATURES]
        draw_image_temperatures(folder / SWEEP, sweep)
        draw_round_trip(folder / ROUND_TRIP, errors, "in levels of a pixel")
        return [SAMPLES, SWEEP, ROUND_TRIP]
    # Some test rows are no picture of a density: then all rows are shown.
    shown = data.test if len(data.test) >= FEWEST_SHOWN else torch.cat([data.train, data.validation, data.test])
    names, rows = standardization.columns, standardization.undo(shown)
    samples = draw_samples_of(saved, POINTS, 1.0, seed)
    draw_points(folder / SAMPLES, rows, samples, names)
    draw_temperatures(
        folder / SWEEP, [(heat, draw_samples_of(saved, POINTS // 2, heat, seed)) for heat in TEMPERATURES], rows, names
    )
    if len(names) <= 2:

        def log_density(points: NDArray[np.float64]) -> NDArray[np.float64]:
            device = next(saved.model.parameters()).device
            parts = torch.split(standardization.apply(points), 10_000)
            losses = torch.cat([seeded_losses(saved.model, part.to(device), seed) for part in parts])
            found: NDArray[np.float64] = -losses.double().cpu().numpy() - standardization.log_volume
            return found

        draw_density(folder / DENSITY, rows, log_density, names)
    else:
        draw_marginals(folder / DENSITY, rows, samples, names)
    draw_round_trip(folder / ROUND_TRIP, errors, "in standard deviations")
    return [SAMPLES, SWEEP, DENSITY, ROUND_TRIP]


def sample_flow(
    saved: SavedFlow, out: Path, *, count: int = 100, temperature: float = 1.0, seed: int | None = None
) -> None:
    """Write images of a flow's own as a PNG, or rows as CSV, as a NumPy file, or as a PNG of points.

    Args:
        saved: the flow.
        out: the file; its suffix decides.
        count: how many images or rows.
        temperature: of the noise, by which its standard deviation is multiplied.
        seed: None draws others each time.

    Raises:
        UserError: an option is out of its range, or the file cannot be written.
    """
    if count < 1:
        raise UserError(f"--count must be at least 1, not {count}.")
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise UserError(f"--temperature must not be negative, and was {temperature}.")
    if seed is not None and not -(2**63) <= seed < 2**64:  # what torch takes
        raise UserError(f"--seed must be a number of 64 bits, not {seed}.")
    suffix = out.suffix.lower()
    if saved.standardization is None:
        if suffix != ".png":
            raise UserError(f"--out {out} must be a .png file.")
    elif suffix not in (".png", ".csv", ".npy"):
        raise UserError(f"--out {out} must be a .csv, .npy or .png file.")
    seed = torch.Generator().seed() if seed is None else seed
    with memory_for(f"--count {count}"):
        drawn = draw_samples_of(saved, count, temperature, seed)
        try:
            if saved.standardization is None:
                draw_samples(out, drawn)
            elif suffix == ".png":
                draw_points(out, None, drawn, saved.standardization.columns)
            elif suffix == ".npy":
                content = io.BytesIO()
                np.save(content, drawn)
                with replacing(out) as file:
                    file.write(content.getvalue())
            else:
                text = io.StringIO()
                writer = csv.writer(text, lineterminator="\n")
                writer.writerow(saved.standardization.columns)
                writer.writerows([repr(value) for value in row] for row in drawn.tolist())
                write_text(out, text.getvalue())
        except OSError as error:
            raise UserError(f"cannot write {out}: {(error.strerror or str(error)).lower()}.") from None


def evaluate_flow(
    saved: SavedFlow, data: str | None = None, *, limit: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Score a saved flow on the test part of its own data, or on others: their test set, or all of them.

    Args:
        saved: the flow.
        data: other images, or another table with the same columns.
        limit: score this many only, the first ones.
        progress: show a bar.

    Returns:
        The figures of `score_flow`, and ``data``: what was scored.

    Raises:
        UserError: the data cannot be read, are of another size, or the run's own data have changed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}.")
    run = saved.config["run"]
    job = next(job for job in JOBS if job.model == saved.config["model"])
    settings: Any = job.settings_class.from_json(run["settings"])
    if data is None:
        source = job.read(settings)
        if source.fingerprint != run["fingerprint"]:
            raise UserError(f"{source.name} has changed since the model was trained: name other data with --data.")
        items = FlowData(source, settings.held_out, settings.split_seed).test
        name = f"test part of {source.name}"
    else:
        table = is_table(data)
        if table != (saved.standardization is not None):
            kinds = ("a table", "images") if table else ("images", "a table")
            raise UserError(f"{data} holds {kinds[0]}, and the model is of {kinds[1]}.")
        items, name = _other_table(saved, data) if table else _other_images(saved, settings, data)
    with memory_for("scoring"):
        figures = score_flow(saved, items[:limit], settings.seed, progress)
    return {**figures, "data": name}


def _other_table(saved: SavedFlow, data: str) -> tuple[Tensor, str]:
    standardization = saved.standardization
    assert standardization is not None
    source = load_table(data)
    if len(source.columns) != len(standardization.columns):
        counts = (len(source.columns), len(standardization.columns))
        raise UserError(f"{source.name} has {counts[0]} columns, and the model is of {counts[1]}.")
    if source.test is None:
        return standardization.apply(source.rows), source.name
    return standardization.apply(source.test), f"test set of {source.name}"


def _other_images(saved: SavedFlow, settings: Any, data: str) -> tuple[Tensor, str]:
    resized = settings.image_size if Path(data).is_dir() else None
    source = load_images(data, image_size=resized, grey=settings.grey)
    shape, levels = tuple(saved.model.event_shape), saved.model.dequantize.levels
    if source.shape != shape:
        sizes = [" x ".join(map(str, size)) for size in (source.shape, shape)]
        raise UserError(f"{source.name} holds images of {sizes[0]}, and the model is of images of {sizes[1]}.")
    if source.levels != levels:
        raise UserError(
            f"{source.name} has pixels of {source.levels} values, and the model is of {levels}: "
            "their likelihoods cannot be compared."
        )
    pixels, name = (source.pixels, source.name) if source.test is None else (source.test, f"test set of {source.name}")
    return torch.from_numpy(np.ascontiguousarray(pixels)), name


def describe_flow(saved: SavedFlow) -> dict[str, Any]:
    """What ``genfuse info CHECKPOINT`` says."""
    run = saved.config.get("run", {})
    described = {
        "model": saved.config["model"],
        "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
        **saved.config["arguments"],
        "data": run.get("data"),
        "step": saved.metadata.get("step"),
    }
    if saved.standardization is not None:
        described["columns"] = saved.standardization.columns
    try:
        results = json.loads((saved.folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        results = {}
    if "bits_per_dim" in results:
        described["test bits/dim"] = f"{results['bits_per_dim']:.4f}"
    elif "nll_nats" in results:
        described["test NLL"] = f"{results['nll_nats']:.4f} nats"
    return {**described, "model hash": model_hash(saved.config)[:16]}
