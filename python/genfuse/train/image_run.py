"""Training, evaluating and sampling image models: what the command line calls, and a script can call as well."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checkpoint import (
    CONFIG,
    IMAGES,
    WEIGHTS,
    SavedImageModel,
    load_image_model,
    make_config,
    model_class,
    model_hash,
    twin_of,
    write_json,
)
from .engine import Job, Outcome, duration, train
from .errors import UserError, memory_for
from .grids import draw_interpolation, draw_reconstructions, draw_samples
from .images import ImageData, Images, as_model_sees, load_images
from .measure import Measure, bits_per_dim
from .settings import (
    IMAGE_SETS,
    HierarchicalVAESettings,
    ImageSettings,
    VAESettings,
    VQVAESettings,
)

__all__ = ["describe_image_model", "evaluate_images", "sample_images", "score", "train_image_model"]

ELBO_DRAWS = 10
AT_ONCE = 100  # images scored between two moves of the progress bar
RESULTS, RECONSTRUCTIONS, SAMPLES, INTERPOLATION = (
    "results.json",
    "reconstructions.png",
    "samples.png",
    "interpolation.png",
)


def train_image_model(name: str, given: dict[str, Any], **options: Any) -> dict[str, Any] | None:
    """Train a model of images, keep the best one, and report how good it is.

    Args:
        name: ``"vae"``, ``"hvae"`` or ``"vqvae"``.
        given: settings that differ from the defaults of `VAESettings`, `HierarchicalVAESettings` or `VQVAESettings`.
            With `resume`, the saved ones hold, and only epochs may be given another value.
        options: ``out``, ``resume``, ``accelerator``, ``devices``, ``nodes``, ``strategy``, ``precision``, ``say``,
            ``progress``: see `genfuse.train.engine.train`.

    Returns:
        What ``results.json`` holds; None in processes other than the first.

    Raises:
        UserError: data, settings, folder or devices will not do.
        Stopped: SIGINT or SIGTERM came; ``last.ckpt`` holds the last step.

    Example:
        >>> train_image_model("vae", {"epochs": 1}, out=Path("runs/tiny"))  # doctest: +SKIP
    """
    return train(next(job for job in JOBS if job.name == name), given, **options)


class ImageJob(Job):
    """A run of ``genfuse train`` for a model of images."""

    format = IMAGES
    data_names = IMAGE_SETS
    report = RESULTS
    settings: Any

    @classmethod
    def read(cls, settings: ImageSettings) -> Images:
        return load_images(settings.data, image_size=settings.image_size, grey=settings.grey)

    def __init__(self, settings: ImageSettings, source: Images) -> None:
        from .base_module import EpochPlan

        self.settings = settings
        self.likelihood, binary = how_pixels_are_modelled(settings, source)
        self.data = ImageData(source, settings.held_out, settings.split_seed, binary)
        arguments = {"input_shape": list(source.shape), **settings.model_arguments()}
        levels = 2 if binary else source.levels
        self.arguments = {**arguments, "likelihood": self.likelihood, "levels": levels}
        self.check_model()
        run = {"settings": settings.to_json(), "data": source.name, "fingerprint": source.fingerprint}
        self.config = make_config(self.model, self.arguments, run)
        self.plan = self.batches = EpochPlan(len(self.data.train), settings)
        self.measures = self._measures()

    def _measures(self) -> list[Measure]:
        return [self._measure()]

    def _measure(self, stage: str = "", axis: str = "") -> Measure:
        probability = self.likelihood == "discretized_gaussian"
        return Measure(
            unit="bits/dim" if probability else "nats",
            key="bits_per_dim" if probability else "nats",
            scale=bits_per_dim(self.data.source.shape) if probability else 1.0,
            axis=(f"{axis}, " if axis else "") + ("bits per dimension" if probability else "nats per image"),
            held_out="images",
            items="images",
            items_per_step=self.settings.batch_size,
            stage=stage,
        )

    def build(self) -> torch.nn.Module:
        model: torch.nn.Module = model_class(self.model)(**self.arguments)
        return model

    def training(self, model: Any) -> Any:
        from .image_module import ImageModule, ImageRunData, VQVAEModule

        if self.settings.implementation == "torch":
            model = twin_of(model, self.arguments)
        kind = VQVAEModule if isinstance(self, VQVAEJob) else ImageModule
        return kind(model, self.settings, self.batches), ImageRunData(self.data, self.batches.order)

    def introduction(self) -> list[str]:
        source, settings, data = self.data.source, self.settings, self.data
        files = f" ({source.files} files, {source.skipped} passed over)" if source.files > 1 or source.skipped else ""
        total, kept = len(data.train) + len(data.held_out), len(data.held_out)
        size = " x ".join(map(str, source.shape if source.shape[0] > 1 else source.shape[1:]))
        seen = "binarised afresh each time they are read" if data.binary and source.levels > 2 else "as they are"
        epochs = " + ".join(f"{number}" for number in settings.stage_epochs)
        lines = [
            f"data      {source.name}{files}: {total:,} images of {size}, {kept:,} held out ({data.split}), {seen}",
            f"model     {self.model}: {self.sizes()}, {self.likelihood} pixels",
            f"training  {epochs} epochs, {self.plan.total_steps} steps of {settings.batch_size} images",
        ]
        if settings.implementation == "torch":
            lines[1] += ", the twin in plain PyTorch"
        brightest = int(data.train.max())
        if source.levels == 256 and brightest < 64:
            lines.append(
                f"warning   no pixel is brighter than {brightest} of 255: are these whole numbers of another range? "
                "Save them divided by their largest value."
            )
        return lines

    def sizes(self) -> str:
        """The model's, for people."""
        raise NotImplementedError

    def finish(self, outcome: Outcome) -> dict[str, Any]:
        folder, say, settings = outcome.folder, outcome.say, self.settings
        saved = load_image_model(folder, str(outcome.device))
        held_out, data = self.data.held_out, self.data
        say("")
        say(f"scoring {len(held_out):,} held-out images ...")
        with memory_for("scoring the held-out images"):
            figures = score(saved, held_out, settings.nll_samples, settings.seed, outcome.progress)
        images = self.plan.total_steps * settings.batch_size
        results = {
            **figures,
            "best_step": outcome.best[0],
            "steps": self.plan.total_steps,
            "likelihood": self.likelihood,
            "binarized": data.binary,
            "data": data.source.name,
            "implementation": settings.implementation,
            "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
            "seconds": round(outcome.seconds, 1),
            "images_per_second": round(images / max(outcome.seconds, 1e-9)),
        }
        draw_pictures(folder, saved, held_out, settings.seed)
        write_json(folder / RESULTS, results)
        say(f"best model at step {outcome.best[0]}, on held-out images:")
        for line in figures_for_people(results):
            say(f"  {line}")
        say(f"  {duration(outcome.seconds)} of training, {results['images_per_second']:,} images/s")
        say("")
        pictures = f"{RECONSTRUCTIONS}, {SAMPLES}, {INTERPOLATION}"
        say(f"saved in {folder}: {WEIGHTS}, {CONFIG}, {RESULTS}, loss.png, {pictures}, tensorboard/")
        say(f"more images: genfuse sample {folder} --out more.png")
        return results


class VAEJob(ImageJob):
    name: ClassVar[str] = "vae"
    model = "VAE"
    settings_class = VAESettings
    model_sizes = ("hidden_dims", "latent_dim")
    step_sizes = ("batch_size", "hidden_dims", "num_samples")

    def sizes(self) -> str:
        settings = self.settings
        objective = f", iwae of {settings.num_samples} samples" if settings.objective == "iwae" else ""
        return f"{settings.architecture}, {settings.latent_dim} latents{objective}"


class HierarchicalVAEJob(ImageJob):
    name: ClassVar[str] = "hvae"
    model = "HierarchicalVAE"
    settings_class = HierarchicalVAESettings
    model_sizes = ("hidden_dim", "latent_dims")
    step_sizes = ("batch_size", "hidden_dim", "latent_dims")

    def sizes(self) -> str:
        return f"{len(self.settings.latent_dims)} layers of {', '.join(map(str, self.settings.latent_dims))} latents"


class VQVAEJob(ImageJob):
    name: ClassVar[str] = "vqvae"
    model = "VQVAE"
    settings_class = VQVAESettings
    model_sizes = ("num_embeddings", "embedding_dim", "hidden_dim", "prior_hidden_size")
    step_sizes = ("batch_size", "hidden_dim", "num_embeddings")

    def _measures(self) -> list[Measure]:
        return [
            self._measure("autoencoder", "reconstruction and commitment"),
            self._measure("prior", "prior over codes"),
        ]

    def sizes(self) -> str:
        _, height, width = self.data.source.shape
        return f"{height // 4} x {width // 4} codes of {self.settings.num_embeddings}, LSTM prior over them"

    def check_extension(self, before: VQVAESettings, done: int) -> None:
        old_end, new_end = (settings.epochs * self.batches.steps_per_epoch for settings in (before, self.settings))
        if new_end != old_end and (done > old_end or done > new_end):
            raise UserError(
                f"the prior has been trained on the codes of {before.epochs} epochs: the run cannot be resumed with "
                f"--epochs {self.settings.epochs}, only with other --prior-epochs."
            )

    def strategy(self, name: str, several: bool) -> str:
        # Either stage leaves the other's parameters without a gradient.
        return "ddp_find_unused_parameters_true" if name == "ddp" or (several and name == "auto") else name


JOBS: tuple[type[ImageJob], ...] = (VAEJob, HierarchicalVAEJob, VQVAEJob)


def how_pixels_are_modelled(settings: ImageSettings, source: Images) -> tuple[str, bool]:
    """The likelihood, and whether images are binarised: as the user says, or as the field does.

    Grey images are Bernoulli's, binarised afresh at each reading (Salakhutdinov and Murray 2008; Burda et al. 2015,
    arXiv 1509.00519, section 5); colours are discretised Gaussians.
    """
    likelihood = settings.likelihood
    if likelihood is None:
        likelihood = "bernoulli" if source.shape[0] == 1 else "discretized_gaussian"
    if settings.binarize == "dynamic" and likelihood != "bernoulli":
        raise UserError(f"--binarize dynamic wants --likelihood bernoulli, and for these images it is {likelihood}.")
    return likelihood, likelihood == "bernoulli" and settings.binarize != "none"


# Scoring and sampling.


@torch.no_grad()
def score(
    saved: SavedImageModel, images: Tensor, num_samples: int, seed: int, progress: bool = False
) -> dict[str, Any]:
    """How likely images are under a model.

    Args:
        saved: the model.
        images: float ``[N, C, H, W]``, as the model sees them.
        num_samples: of the importance-weighted likelihood (Burda et al. 2015, arXiv 1509.00519, eq. 8); of no effect
            on a VQ-VAE, whose bound has no noise.
        seed: of the noise.
        progress: show a bar.

    Returns:
        Nats per image: ``elbo_nats`` (ten draws), its parts ``reconstruction_nats`` and ``kl_nats`` (of a VQ-VAE
        ``codes_nats``; of a ladder ``kl_nats_by_layer``, too), ``nll_nats`` with ``nll_standard_error_nats`` (that of
        the mean over images) and ``nll_samples``; the same in ``elbo_bits_per_dim`` and ``nll_bits_per_dim`` where
        pixels have probabilities; ``images``.
    """
    model = saved.model
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    vq = saved.config["model"] == "VQVAE"
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in _tracked(torch.split(images, AT_ONCE), progress):
        part = part.to(device)
        if vq:
            nll = model.nll(part)
            codes = -model.prior_log_prob(model.encode(part))
            parts.append((nll - codes, codes[:, None], nll))
            continue
        draws = [model.elbo_terms(part, generator=generator) for _ in range(ELBO_DRAWS)]
        reconstruction = torch.stack([one for one, _ in draws]).mean(0)
        kl = torch.stack([one for _, one in draws]).mean(0)
        nll = model.nll(part, num_samples, generator=generator)
        parts.append((reconstruction, kl.view(len(part), -1), nll))
    reconstruction, kl, nll = (torch.cat(columns).double().cpu() for columns in zip(*parts, strict=True))
    elbo = -float(reconstruction.mean() + kl.sum(1).mean())
    figures: dict[str, Any] = {
        "elbo_nats": elbo,
        "reconstruction_nats": float(reconstruction.mean()),
        "codes_nats" if vq else "kl_nats": float(kl.sum(1).mean()),
        "nll_nats": float(nll.mean()),
        "nll_standard_error_nats": float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else None,
    }
    if kl.size(1) > 1:
        figures["kl_nats_by_layer"] = [float(value) for value in kl.mean(0)]
    if saved.config["arguments"]["likelihood"] != "gaussian":
        scale = bits_per_dim(images.shape[1:])
        figures |= {"elbo_bits_per_dim": elbo * scale, "nll_bits_per_dim": figures["nll_nats"] * scale}
    return {**figures, "nll_samples": None if vq else num_samples, "images": len(images)}


def _tracked(parts: Any, progress: bool) -> Any:
    if not progress:
        return parts
    from rich.progress import track

    return track(parts, description="scoring ", transient=True)


def figures_for_people(figures: dict[str, Any]) -> list[str]:
    """The figures of `score`, as lines."""
    in_bits = figures["likelihood"] == "discretized_gaussian"

    def shown(name: str) -> str:
        nats = f"{figures[f'{name}_nats']:.3f} nats"
        return f"{figures[f'{name}_bits_per_dim']:.4f} bits/dim ({nats})" if in_bits else nats

    error = figures["nll_standard_error_nats"]
    spread = "" if error is None else f", standard error over images {error:.3f}"
    if "codes_nats" in figures:
        parts = f"reconstruction {figures['reconstruction_nats']:.3f} + codes {figures['codes_nats']:.3f} nats"
        return [f"NLL at most {shown('nll')}: {parts}{spread}"]
    parts = f"reconstruction {figures['reconstruction_nats']:.3f}, KL {figures['kl_nats']:.3f} nats"
    layers = figures.get("kl_nats_by_layer")
    if layers is not None:
        parts += f" = {' + '.join(f'{value:.2f}' for value in layers)}"
    return [
        f"ELBO  {shown('elbo')}: {parts}",
        f"NLL   {shown('nll')}: importance weighted with {figures['nll_samples']:,} samples{spread}",
    ]


def draw_pictures(folder: Path, saved: SavedImageModel, held_out: Tensor, seed: int) -> None:
    """Write the three PNG files of a run."""
    model = saved.model
    device = next(model.parameters()).device
    some = held_out[:30].to(device)
    draw_reconstructions(folder / RECONSTRUCTIONS, model, some)
    draw_samples(folder / SAMPLES, model.sample(100, generator=torch.Generator(device).manual_seed(seed)))
    if len(some) > 1:
        draw_interpolation(folder / INTERPOLATION, model, some[:16])


def sample_images(
    saved: SavedImageModel, out: Path, *, count: int = 100, pixels: bool = False, seed: int | None = None
) -> None:
    """Write images of a model's own as a PNG.

    Args:
        saved: the model.
        out: the file.
        count: how many images.
        pixels: draw the pixels, too, instead of showing their means.
        seed: None draws other images each time.

    Raises:
        UserError: an option is out of its range, or the file cannot be written.
    """
    generator = check_sampling(count, seed, next(saved.model.parameters()).device)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} must be a .png file.")
    with memory_for(f"a picture of --count {count}"):
        images = saved.model.sample(count, generator=generator, sample_pixels=pixels)
        try:
            draw_samples(out, images)
        except OSError as error:
            raise UserError(f"cannot write {out}: {(error.strerror or str(error)).lower()}.") from None


def check_sampling(count: int, seed: int | None, device: torch.device) -> torch.Generator:
    """What ``genfuse sample`` draws with: a generator of `seed`, or of any where that is None.

    Raises:
        UserError: there is nothing to draw, or torch takes no such seed.
    """
    if count < 1:
        raise UserError(f"--count must be at least 1, not {count}.")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise UserError(f"--seed must be a number of 64 bits, not {seed}.")
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def evaluate_images(
    saved: SavedImageModel,
    data: str | None = None,
    *,
    num_samples: int = 5000,
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a saved model on the held-out images of its own data, or on others: their test set, or all of them.

    Args:
        saved: the model.
        data: other images, as `load_images` takes them.
        num_samples: of the importance-weighted likelihood.
        limit: score this many images only, the first ones.
        progress: show a bar.

    Returns:
        The figures of `score`, ``data`` (what was scored), ``likelihood`` and ``binarized``.

    Raises:
        UserError: the images cannot be read, are of another size, or the run's own data have changed.
    """
    if num_samples < 1:
        raise UserError(f"--nll-samples must be at least 1, not {num_samples}.")
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}.")
    run, arguments = saved.config["run"], saved.config["arguments"]
    job = next(job for job in JOBS if job.model == saved.config["model"])
    settings: Any = job.settings_class.from_json(run["settings"])
    own = data is None
    path = settings.data if data is None else data
    resized = settings.image_size if own or os.path.isdir(path) else None
    source = load_images(path, image_size=resized, grey=settings.grey)
    likelihood = arguments["likelihood"]
    binary = likelihood == "bernoulli" and settings.binarize != "none"
    if own:
        if source.fingerprint != run["fingerprint"]:
            raise UserError(f"{source.name} has changed since the model was trained: name images with --data.")
        images = ImageData(source, settings.held_out, settings.split_seed, binary).held_out
        name = f"held-out part of {source.name}"
    else:
        if list(source.shape) != arguments["input_shape"]:
            sizes = [" x ".join(map(str, shape)) for shape in (source.shape, arguments["input_shape"])]
            raise UserError(f"{source.name} holds images of {sizes[0]}, and the model is of images of {sizes[1]}.")
        if likelihood == "discretized_gaussian" and source.levels != arguments["levels"]:
            raise UserError(
                f"{source.name} has pixels of {source.levels} values, and the model is of {arguments['levels']}: "
                "their likelihoods cannot be compared."
            )
        pixels, name = (
            (source.pixels, source.name) if source.test is None else (source.test, f"test set of {source.name}")
        )
        images = as_model_sees(pixels, source.levels, settings.split_seed if binary else None)
    with memory_for(f"scoring with --nll-samples {num_samples}"):
        figures = score(saved, images[:limit], num_samples, settings.seed, progress)
    return {**figures, "data": name, "likelihood": likelihood, "binarized": binary}


def describe_image_model(saved: SavedImageModel) -> dict[str, Any]:
    """What ``genfuse info CHECKPOINT`` says."""
    run = saved.config.get("run", {})
    described = {
        "model": saved.config["model"],
        "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
        **saved.config["arguments"],
        "data": run.get("data"),
        "step": saved.metadata.get("step"),
    }
    try:
        results = json.loads((saved.folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        results = {}
    for name, label in (("elbo_nats", "held-out ELBO"), ("nll_nats", "held-out NLL")):
        if name in results:
            described[label] = f"{results[name]:.3f} nats"
    if saved.config["arguments"]["likelihood"] == "discretized_gaussian" and "nll_bits_per_dim" in results:
        described["held-out bits/dim"] = f"{results['nll_bits_per_dim']:.4f}"
    return {**described, "model hash": model_hash(saved.config)[:16]}
