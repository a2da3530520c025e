"""Training, evaluating and sampling autoregressive models of images: what the command line calls, and a script can."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checkpoint import (
    CONFIG,
    PIXELS,
    WEIGHTS,
    SavedPixelModel,
    load_pixel_model,
    make_config,
    model_class,
    model_hash,
    twin_of,
    write_json,
)
from .engine import Job, Outcome, duration, train
from .errors import UserError, memory_for
from .grids import draw_completions, draw_samples
from .image_run import check_sampling
from .images import Images, load_images
from .measure import Measure, bits_per_dim
from .pixelcnn_module import PixelData, as_levels
from .settings import (
    IMAGE_SETS,
    GatedPixelCNNSettings,
    PixelCNNPlusPlusSettings,
    PixelCNNSettings,
    PixelSettings,
    PixelSNAILSettings,
)

__all__ = [
    "describe_pixel_model",
    "evaluate_pixel_model",
    "sample_pixel_model",
    "score_pixel_model",
    "time_sampling",
    "train_pixel_model",
]

AT_ONCE = 100  # images scored between two moves of the progress bar
DRAWN, COMPLETED, COMPLETIONS = 100, 10, 4  # images in the pictures of a run
LONGEST = 20.0  # seconds that a naive sample may take; of a longer one some passes are timed
RESULTS, SAMPLES, COMPLETION = "results.json", "samples.png", "completions.png"


def train_pixel_model(name: str, given: dict[str, Any], **options: Any) -> dict[str, Any] | None:
    """Train a model, keep the one that does best on the validation images, and report how it does on the test images.

    Args:
        name: ``"pixelcnn"``, ``"gated-pixelcnn"``, ``"pixelcnn++"`` or ``"pixelsnail"``.
        given: settings that differ from the defaults of `PixelCNNSettings`, `GatedPixelCNNSettings`,
            `PixelCNNPlusPlusSettings` or `PixelSNAILSettings`. With `resume`, the saved ones hold, and only epochs may
            be given another value.
        options: ``out``, ``resume``, ``accelerator``, ``devices``, ``nodes``, ``strategy``, ``precision``, ``say``,
            ``progress``: see `genfuse.train.engine.train`.

    Returns:
        What ``results.json`` holds; None in processes other than the first.

    Raises:
        UserError: data, settings, folder or devices will not do.
        Stopped: SIGINT or SIGTERM came; ``last.ckpt`` holds the last step.

    Example:
        >>> train_pixel_model("gated-pixelcnn", {"epochs": 1}, out=Path("runs/tiny"))  # doctest: +SKIP
    """
    return train(next(job for job in JOBS if job.name == name), given, **options)


class PixelJob(Job):
    """A run of ``genfuse train`` for an autoregressive model of images."""

    format = PIXELS
    data_names = IMAGE_SETS
    report = RESULTS
    settings: Any

    @classmethod
    def read(cls, settings: PixelSettings) -> Images:
        return load_images(
            settings.data, image_size=settings.image_size, grey=settings.grey, labels=settings.conditional
        )

    def __init__(self, settings: PixelSettings, source: Images) -> None:
        from .base_module import EpochPlan

        self.settings = settings
        self.data = PixelData(source, settings)
        self.arguments = settings.model_arguments(source.shape, self.data.seen, self.data.classes)
        self.check_model()
        run = {"settings": settings.to_json(), "data": source.name, "fingerprint": source.fingerprint}
        self.config = make_config(self.model, self.arguments, run)
        self.plan = self.batches = EpochPlan(len(self.data.train), settings)
        self.measures = [self._measure()]

    def _measure(self) -> Measure:
        nats = self.data.seen == 2  # as the field reports black and white images
        return Measure(
            unit="nats" if nats else "bits/dim",
            key="nats" if nats else "bits_per_dim",
            scale=1.0 if nats else bits_per_dim(self.data.shape),
            axis="nats per image" if nats else "bits per dimension",
            held_out="images",
            items="images",
            items_per_step=self.settings.batch_size,
            part="validation",
        )

    def build(self) -> torch.nn.Module:
        model: torch.nn.Module = model_class(self.model)(**self.arguments)
        return model

    def training(self, model: Any) -> Any:
        from .pixelcnn_module import PixelModule, PixelRunData

        data = PixelRunData(self.data, self.batches.order)
        if hasattr(model, "initialize"):
            # By all of the first batch, before the training, so that every process and the twin begin with the same.
            images = data.read(0, slice(0, self.settings.batch_size))
            with memory_for("the first batch"):
                model.initialize(*(images if isinstance(images, tuple) else (images,)))
        if self.settings.implementation == "torch":
            model = twin_of(model, self.arguments)
        return PixelModule(model, self.settings, self.batches), data

    def introduction(self) -> list[str]:
        data, settings, source = self.data, self.settings, self.data.source
        parts = f"{len(data.train):,} + {len(data.validation):,} + {len(data.test):,}"
        size = " x ".join(map(str, source.shape if source.shape[0] > 1 else source.shape[1:]))
        files = f" ({source.files} files, {source.skipped} passed over)" if source.files > 1 else ""
        if data.binary and source.levels > 2:
            seen = "binarised afresh each time they are read"
        else:
            seen = f"{data.seen} levels" + (f" of {source.levels}" if data.seen < source.levels else "")
        classes = "" if data.classes is None else f", {data.classes} classes"
        lines = [
            f"data      {source.name}{files}: {parts} images of {size}, {seen}{classes}",
            f"split     training + validation + test, {data.split}",
            f"model     {self.model}: {self.sizes()}",
            f"training  {settings.epochs} epochs, {self.plan.total_steps} steps of {settings.batch_size} images",
        ]
        if settings.implementation == "torch":
            lines[2] += ", the twin in plain PyTorch"
        return lines

    def sizes(self) -> str:
        """The model's, for people."""
        raise NotImplementedError

    def finish(self, outcome: Outcome) -> dict[str, Any]:
        folder, say, settings, data = outcome.folder, outcome.say, self.settings, self.data
        saved = load_pixel_model(folder, str(outcome.device))
        labels = None if data.labels is None else data.labels[2]
        say("")
        say(f"scoring {len(data.test):,} test images ...")
        with memory_for("scoring the test images"):
            figures = score_pixel_model(saved, data.test, labels, outcome.progress)
        measure = self.measures[0]
        images = self.plan.total_steps * settings.batch_size
        results = {
            **figures,
            f"validation_{measure.key}": outcome.best[1] * measure.scale,
            "best_step": outcome.best[0],
            "steps": self.plan.total_steps,
            "levels": data.seen,
            "binarized": data.binary,
            "classes": data.classes,
            "data": data.source.name,
            "implementation": settings.implementation,
            "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
            "seconds": round(outcome.seconds, 1),
            "images_per_second": round(images / max(outcome.seconds, 1e-9)),
        }
        say("drawing ...")
        draw_pictures(folder, saved, data.test, labels, settings.seed)
        results["sampling"] = time_sampling(saved.model, settings.seed)
        write_json(folder / RESULTS, results)
        say(f"best model at step {outcome.best[0]}, chosen on the validation images; on the test images:")
        for line in figures_for_people(results, data.seen):
            say(f"  {line}")
        say(f"  {sampling_for_people(results['sampling'])}")
        say(f"  {duration(outcome.seconds)} of training, {results['images_per_second']:,} images/s")
        say("")
        say(f"saved in {folder}: {WEIGHTS}, {CONFIG}, {RESULTS}, loss.png, {SAMPLES}, {COMPLETION}, tensorboard/")
        say(f"more images: genfuse sample {folder} --out more.png")
        return results


class PixelCNNJob(PixelJob):
    name: ClassVar[str] = "pixelcnn"
    model = "PixelCNN"
    settings_class: ClassVar[type[PixelSettings]] = PixelCNNSettings
    model_sizes = ("channels", "num_layers", "kernel_size")
    step_sizes = ("batch_size", "channels", "num_layers")

    def sizes(self) -> str:
        settings = self.settings
        side = settings.kernel_size
        return f"{settings.num_layers} masked layers of {side} x {side} and {settings.channels} channels"


class GatedPixelCNNJob(PixelCNNJob):
    name: ClassVar[str] = "gated-pixelcnn"
    model = "GatedPixelCNN"
    settings_class = GatedPixelCNNSettings

    def sizes(self) -> str:
        settings = self.settings
        side = settings.kernel_size
        return f"{settings.num_layers} gated layers of {side} x {side} and {settings.channels} channels"


class PixelCNNPlusPlusJob(PixelJob):
    name: ClassVar[str] = "pixelcnn++"
    model = "PixelCNNPlusPlus"
    settings_class: ClassVar[type[PixelSettings]] = PixelCNNPlusPlusSettings
    model_sizes = ("nr_resnet", "nr_filters", "scales")
    step_sizes = ("batch_size", "nr_resnet", "nr_filters")

    def sizes(self) -> str:
        settings = self.settings
        blocks = f"{_number(settings.nr_resnet, 'block')} at {_number(settings.scales, 'scale')}"
        return f"{blocks}, {settings.nr_filters} filters, {self.pixels()}"

    def pixels(self) -> str:
        number = self.settings.nr_logistic_mix
        if self.data.seen == 2:
            return "Bernoulli pixels"
        return f"mixtures of {_number(number, 'logistic')}" if number else "a probability for each level"


class PixelSNAILJob(PixelCNNPlusPlusJob):
    name: ClassVar[str] = "pixelsnail"
    model = "PixelSNAIL"
    settings_class = PixelSNAILSettings
    model_sizes = ("nr_blocks", "nr_resnet", "nr_filters")

    def sizes(self) -> str:
        settings = self.settings
        blocks = f"{_number(settings.nr_resnet, 'block')} before each of {_number(settings.nr_blocks, 'attention')}"
        return f"{blocks}, {settings.nr_filters} filters, {self.pixels()}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


JOBS: tuple[type[PixelJob], ...] = (PixelCNNJob, GatedPixelCNNJob, PixelCNNPlusPlusJob, PixelSNAILJob)


# Scoring.


@torch.no_grad()
def score_pixel_model(
    saved: SavedPixelModel, images: Tensor, labels: Tensor | None = None, progress: bool = False
) -> dict[str, Any]:
    """How likely images are under a model: exactly, since it is a product of the probabilities of their pixels.

    Args:
        saved: the model.
        images: uint8 ``[N, C, H, W]``, its levels.
        labels: int64 ``[N]``, of a model of classes.
        progress: show a bar.

    Returns:
        ``nll_nats``, the mean of ``-log p(x)`` (given the class, of a model of classes), its standard error over images
        ``nll_standard_error_nats``, the same in ``bits_per_dim`` and ``bits_per_dim_standard_error``, and how many
        ``images``.
    """
    device = next(saved.model.parameters()).device
    places = torch.split(torch.arange(len(images)), AT_ONCE)
    if progress:
        from rich.progress import track

        places = track(places, description="scoring ", transient=True)  # type: ignore[assignment]
    losses = [
        -saved.model.log_prob(images[rows].to(device), None if labels is None else labels[rows].to(device))
        for rows in places
    ]
    nll, scale = torch.cat(losses).double().cpu(), bits_per_dim(images.shape[1:])
    mean, error = float(nll.mean()), float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else None
    return {
        "nll_nats": mean,
        "nll_standard_error_nats": error,
        "bits_per_dim": mean * scale,
        "bits_per_dim_standard_error": None if error is None else error * scale,
        "images": len(nll),
    }


def figures_for_people(figures: dict[str, Any], levels: int) -> list[str]:
    """The figures of `score_pixel_model`, as lines: nats of black and white images, bits per dimension of others."""
    name, unit, digits = ("nll_nats", "nats", 3) if levels == 2 else ("bits_per_dim", "bits/dim", 4)
    error = figures["nll_standard_error_nats" if levels == 2 else "bits_per_dim_standard_error"]
    nats = "" if levels == 2 else f" ({figures['nll_nats']:.3f} nats)"
    spread = "" if error is None else f", standard error over images {error:.{digits}f}"
    return [f"NLL   {figures[name]:.{digits}f} {unit}{nats}{spread}"]


def evaluate_pixel_model(
    saved: SavedPixelModel, data: str | None = None, *, limit: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Score a saved model on the test part of its own data, or on others: their test set, or all of them.

    Args:
        saved: the model.
        data: other images, as `load_images` takes them.
        limit: score this many only, the first ones.
        progress: show a bar.

    Returns:
        The figures of `score_pixel_model`, ``data`` (what was scored) and ``levels``.

    Raises:
        UserError: the images cannot be read, are of another size, or the run's own data have changed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}.")
    images, labels, name = _images_for(saved, data)
    with memory_for("scoring"):
        labels = None if labels is None else labels[:limit]
        figures = score_pixel_model(saved, images[:limit], labels, progress)
    return {**figures, "data": name, "levels": saved.config["arguments"]["levels"]}


def _images_for(
    saved: SavedPixelModel, data: str | None, *, completed: bool = False, label: int | None = None
) -> tuple[Tensor, Tensor | None, str]:
    """Images as a model scores and completes them, their labels, and what they are: the test part of its own data, or
    others, whose labels are not read where `label` is that of all."""
    run, arguments = saved.config["run"], saved.config["arguments"]
    job = next(job for job in JOBS if job.model == saved.config["model"])
    settings: Any = job.settings_class.from_json(run["settings"])
    if data is None:
        source = job.read(settings)
        if source.fingerprint != run["fingerprint"]:
            raise UserError(f"{source.name} has changed since the model was trained: name other data with --data.")
        parts = PixelData(source, settings)
        return parts.test, None if parts.labels is None else parts.labels[2], f"test part of {source.name}"
    resized = settings.image_size if os.path.isdir(data) else None
    classes = arguments["num_classes"]
    source = load_images(data, image_size=resized, grey=settings.grey, labels=classes is not None and label is None)
    shape = (arguments["in_channels"], *arguments["image_size"])
    if source.shape != shape:
        sizes = [" x ".join(map(str, size)) for size in (source.shape, shape)]
        raise UserError(f"{source.name} holds images of {sizes[0]}, and the model is of images of {sizes[1]}.")
    if source.levels < arguments["levels"] or settings.levels_of(source.levels) != arguments["levels"]:
        why = "it cannot complete them" if completed else "their likelihoods cannot be compared"
        raise UserError(
            f"{source.name} has pixels of {source.levels} values, and the model is of {arguments['levels']}: {why}."
        )
    own = source.test is None
    pixels, labels = (source.pixels, source.labels) if source.test is None else (source.test, source.test_labels)
    if labels is not None and labels.max() >= classes:
        raise UserError(f"{source.name} has the label {labels.max()}, and the model is of {classes} classes.")
    name = source.name if own else f"test set of {source.name}"
    return as_levels(source, pixels, settings), None if labels is None else torch.from_numpy(labels), name


# Sampling.


def classes_of(model: Any, count: int, label: int | None = None) -> dict[str, Tensor]:
    """The classes of `count` images, as an argument of a model: of this label, or of each in turn."""
    if model.num_classes is None:
        return {}
    labels = torch.arange(count) % model.num_classes if label is None else torch.full((count,), label)
    return {"labels": labels.to(next(model.parameters()).device)}


def _spread(number: int, count: int) -> Tensor:
    """Places of `count` of `number` images, from the first to the last: data are often sorted by their classes."""
    return torch.linspace(0, number - 1, min(count, number)).long()


def draw_pictures(folder: Path, saved: SavedPixelModel, images: Tensor, labels: Tensor | None, seed: int) -> None:
    """Write the PNG files of a run: samples, and completions of test images of which the upper half is given."""
    model = saved.model
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    draw_samples(folder / SAMPLES, model.sample(DRAWN, generator=generator, **classes_of(model, DRAWN)))
    rows = _spread(len(images), COMPLETED)
    some = images[rows].to(device)
    given = {} if labels is None else {"labels": labels[rows].to(device).repeat(COMPLETIONS)}
    completions = model.complete(some.repeat(COMPLETIONS, 1, 1, 1), generator=generator, **given)
    _draw_completions(folder / COMPLETION, model, some, completions.split(len(some)), some.size(2) // 2)


def _draw_completions(path: Path, model: Any, images: Tensor, completions: Sequence[Tensor], rows: int) -> None:
    scaled = images.float() / (model.levels - 1)
    draw_completions(path, scaled, [one.float() for one in completions], rows)


def sample_pixel_model(
    saved: SavedPixelModel,
    out: Path,
    *,
    count: int = 100,
    seed: int | None = None,
    label: int | None = None,
    complete: bool = False,
    data: str | None = None,
    rows: int | None = None,
) -> int:
    """Write images of a model's own as a PNG, or images that it has completed.

    Args:
        saved: the model.
        out: the file.
        count: how many images.
        seed: None draws other images each time.
        label: the class of all images, of a model of classes; each in turn by default.
        complete: complete images of `data`, from its first to its last, of which the first rows are given.
        data: other images than the test part of the run's own.
        rows: how many rows are given; the upper half by default.

    Returns:
        How many images were drawn: fewer than `count` where there are no more to be completed.

    Raises:
        UserError: an option is out of its range, the images cannot be read, or the file cannot be written.
    """
    model = saved.model
    generator = check_sampling(count, seed, next(model.parameters()).device)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must be a .png file.")
    if not complete and (data is not None or rows is not None):
        raise UserError("--data and --rows are of images to be completed: add --complete.")
    if label is not None and model.num_classes is None:
        raise UserError("--label is for models of classes: this one was trained without --conditional.")
    if label is not None and not 0 <= label < model.num_classes:
        raise UserError(f"--label must be from 0 to {model.num_classes - 1}, not {label}.")
    height = model.image_size[0]
    if rows is not None and not 0 <= rows <= height:
        raise UserError(f"--rows must be from 0 to {height}, not {rows}.")
    images, labels = torch.empty(0), None
    if complete:
        images, labels, _ = _images_for(saved, data, completed=True, label=label)
    with memory_for(f"a picture of --count {count}"):
        if complete:
            device = next(model.parameters()).device
            some = _spread(len(images), count)
            images = images[some].to(device)
            given = classes_of(model, len(images), label)
            if labels is not None and label is None:
                given = {"labels": labels[some].to(device)}
            kept = height // 2 if rows is None else rows
            completed = model.complete(images, kept, generator=generator, **given)
        else:
            drawn = model.sample(count, generator=generator, **classes_of(model, count, label))
        try:
            if complete:
                _draw_completions(out, model, images, [completed], kept)
            else:
                draw_samples(out, drawn)
        except OSError as error:
            raise UserError(f"cannot write {out}: {(error.strerror or str(error)).lower()}.") from None
    return len(images) if complete else count


@torch.no_grad()
def time_sampling(model: Any, seed: int = 0, longest: float = LONGEST) -> dict[str, Any]:
    """How long one image takes, cached and by the naive loop, with the same uniform numbers.

    Args:
        model: in eval mode.
        seed: of the image.
        longest: seconds that the naive loop may take. Of a longer one as many passes are timed as fit in.

    Returns:
        ``seconds_cached``: the median of three images; ``seconds_naive``: of one image, or the mean time of a pass
        times their number; ``passes`` that the naive loop makes, and ``passes_timed``; ``same_pixels``, the share of
        the numbers of the image in which both agree, None where the naive loop was not run to its end.
    """
    device = next(model.parameters()).device
    given = classes_of(model, 1)

    def image(cached: bool) -> tuple[Tensor, float]:
        generator = torch.Generator(device).manual_seed(seed)
        began = time.perf_counter()
        drawn = model.sample(1, cached=cached, generator=generator, **given).cpu()  # a GPU has then finished
        return drawn, time.perf_counter() - began

    drawn, _ = image(cached=True)
    cached = statistics.median(image(cached=True)[1] for _ in range(3))
    passes = math.prod(model.image_size) * (1 if model.likelihood == "mixture" else model.in_channels)
    levels, labels = (drawn * (model.levels - 1)).round().long().to(device), given.get("labels")

    def some_passes(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            model(levels, labels).flatten()[-1:].cpu()
        return time.perf_counter() - began

    some_passes(1)
    each = some_passes(3) / 3
    same, timed = None, passes
    if each * passes <= longest:
        other, naive = image(cached=False)
        same = float((other == drawn).double().mean())
    else:
        timed = max(1, int(longest / each))
        naive = some_passes(timed) / timed * passes
    return {
        "seconds_cached": cached,
        "seconds_naive": naive,
        "passes": passes,
        "passes_timed": timed,
        "same_pixels": same,
    }


def sampling_for_people(figures: dict[str, Any]) -> str:
    """The figures of `time_sampling`, as a line."""
    cached, naive = figures["seconds_cached"], figures["seconds_naive"]
    if figures["passes_timed"] < figures["passes"]:
        how = f"estimated from {figures['passes_timed']:,} of its {figures['passes']:,} passes"
    else:
        how = f"{figures['passes']:,} passes, {figures['same_pixels']:.2%} of the numbers the same"
    return f"one image in {_seconds(cached)} cached, {_seconds(naive)} naive: {naive / cached:,.0f}x ({how})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1.0 else f"{1e3 * seconds:.3g} ms"


def describe_pixel_model(saved: SavedPixelModel) -> dict[str, Any]:
    """What ``genfuse info CHECKPOINT`` says."""
    run = saved.config.get("run", {})
    arguments = saved.config["arguments"]
    described = {
        "model": saved.config["model"],
        "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
        **arguments,
        "data": run.get("data"),
        "binarised": "yes" if run.get("settings", {}).get("binary") else "no",
        "step": saved.metadata.get("step"),
    }
    try:
        results = json.loads((saved.folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        results = {}
    if arguments["levels"] != 2 and "bits_per_dim" in results:
        described["test bits/dim"] = f"{results['bits_per_dim']:.4f}"
    elif "nll_nats" in results:
        described["test NLL"] = f"{results['nll_nats']:.3f} nats"
    if "sampling" in results:
        described["sampling"] = sampling_for_people(results["sampling"])
    return {**described, "model hash": model_hash(saved.config)[:16]}
