"""The commands of ``genfuse``: train, sample, evaluate, info. Heavy imports happen inside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .train_commands import given_options, require, train

__all__ = ["app"]

app = typer.Typer(
    name="genfuse",
    help="Train, sample and evaluate generative models built from fused kernels.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(train, name="train")

TEXT, FLOWS = "Language models", "Image models and flows"
LATENTS, PIXELS = "Image models with latents", "Autoregressive image models"


@app.callback(invoke_without_command=True)
def genfuse(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(version_of("genfuse"))
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def sample(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run's folder, or its model.safetensors.")],
    seed: Annotated[int | None, typer.Option(help="For the same text or images each time.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from; by default a new line.", rich_help_panel=TEXT)] = "",
    length: Annotated[
        int, typer.Option(help="Tokens to write: characters, or bytes at byte level.", rich_help_panel=TEXT)
    ] = 500,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Low is cautious, above 1 is daring; by default 0.8, and 1 of flows. 0 always takes the likeliest.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest.", rich_help_panel=TEXT)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest of this total probability.", rich_help_panel=TEXT)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE.png",
            help="File to write; it is replaced. Of tables, .csv and .npy hold the rows themselves.",
            rich_help_panel=FLOWS,
        ),
    ] = Path("samples.png"),
    count: Annotated[int, typer.Option(help="How many images or rows.", rich_help_panel=FLOWS)] = 100,
    pixels: Annotated[
        bool,
        typer.Option("--pixels", help="Draw the pixels, too, instead of showing their means.", rich_help_panel=LATENTS),
    ] = False,
    label: Annotated[
        int | None, typer.Option(help="Class of all images; by default each in turn.", rich_help_panel=PIXELS)
    ] = None,
    complete: Annotated[
        bool,
        typer.Option("--complete", help="Complete images of which the first rows are given.", rich_help_panel=PIXELS),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR",
            help="The images to complete; by default the test part of the run's own.",
            rich_help_panel=PIXELS,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="How many are given; by default the upper half.", rich_help_panel=PIXELS, show_default=False),
    ] = None,
) -> None:
    """Write text, a picture or a table with a trained model."""
    require("sampling", "safetensors")
    from .checkpoint import SavedFlow, SavedImageModel, SavedPixelModel, load_any

    saved = load_any(checkpoint)
    if isinstance(saved, SavedFlow):
        _only(context, saved.config["model"], ("seed", "out", "count", "temperature"))
        from .flow_run import sample_flow

        heat = 1.0 if temperature is None else temperature
        sample_flow(saved, out, count=count, temperature=heat, seed=seed)
        print(f"{count} {'images' if saved.standardization is None else 'rows'} in {out}")
        return
    if isinstance(saved, SavedImageModel):
        _only(context, saved.config["model"], ("seed", "out", "count", "pixels"))
        from .image_run import sample_images

        sample_images(saved, out, count=count, pixels=pixels, seed=seed)
        print(f"{count} images in {out}")
        return
    if isinstance(saved, SavedPixelModel):
        _only(context, saved.config["model"], ("seed", "out", "count", "label", "complete", "data", "rows"))
        from .pixelcnn_run import sample_pixel_model

        drawn = sample_pixel_model(
            saved, out, count=count, seed=seed, label=label, complete=complete, data=data, rows=rows
        )
        print(f"{drawn} {'completed ' if complete else ''}images in {out}")
        return
    _only(context, saved.config["model"], ("seed", "prompt", "length", "temperature", "top_k", "top_p"))
    from .run import sample as continue_text

    unknown = saved.vocabulary.unknown(prompt)
    if unknown:
        characters = ", ".join(repr(character) for character in unknown)
        print(f"genfuse: the model has never seen {characters} and reads a placeholder instead.", file=sys.stderr)
    heat = 0.8 if temperature is None else temperature
    text = continue_text(saved, prompt, length, temperature=heat, top_k=top_k, top_p=top_p, seed=seed)
    print(prompt + text)


@app.command()
def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run's folder, or its model.safetensors.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE|DIR", help="What to score; by default the held-out part of the run's own data."),
    ] = None,
    nll_samples: Annotated[
        int, typer.Option(help="Of the importance-weighted likelihood, for each image.", rich_help_panel=LATENTS)
    ] = 5000,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Score the first N images or rows only.", rich_help_panel=FLOWS)
    ] = None,
) -> None:
    """Score a model: of text bits per character, perplexity, BLEU of samples; of VAEs ELBO and NLL; of others NLL."""
    require("evaluating", "lightning", "torchmetrics", "safetensors")
    import torch

    from .checkpoint import SavedFlow, SavedImageModel, SavedPixelModel, load_any

    saved = load_any(checkpoint)
    if isinstance(saved, SavedFlow):
        _only(context, saved.config["model"], ("data", "limit"))
        from . import flow_run

        if torch.cuda.is_available():
            saved.model.cuda()
        figures = flow_run.evaluate_flow(saved, data, limit=limit, progress=sys.stdout.isatty())
        items = "images" if saved.standardization is None else "rows"
        print(f"data  {figures['data']}: {figures[items]:,} {items}")
        for line in flow_run.figures_for_people(figures):
            print(line)
        return
    if isinstance(saved, SavedImageModel):
        _only(context, saved.config["model"], ("data", "nll_samples", "limit"))
        from .image_run import evaluate_images, figures_for_people

        if torch.cuda.is_available():
            saved.model.cuda()
        figures = evaluate_images(saved, data, num_samples=nll_samples, limit=limit, progress=sys.stdout.isatty())
        print(f"images  {figures['data']}: {figures['images']:,}{', binarised' if figures['binarized'] else ''}")
        for line in figures_for_people(figures):
            print(line)
        return
    if isinstance(saved, SavedPixelModel):
        _only(context, saved.config["model"], ("data", "limit"))
        from . import pixelcnn_run

        if torch.cuda.is_available():
            saved.model.cuda()
        figures = pixelcnn_run.evaluate_pixel_model(saved, data, limit=limit, progress=sys.stdout.isatty())
        print(f"data  {figures['data']}: {figures['images']:,} images of {figures['levels']} levels")
        for line in pixelcnn_run.figures_for_people(figures, figures["levels"]):
            print(line)
        return
    _only(context, saved.config["model"], ("data",))
    from .run import evaluate as score

    result = score(saved, data)
    print(f"text        {result['text']}: {result['characters']:,} characters")
    if result["unknown"]:
        print(f"unknown     {result['unknown']:.2%} of the characters are new to the model")
    print(f"bits/char   {result['bits_per_char']:.4f}")
    print(f"perplexity  {result['perplexity']:.4f} per character")
    print(f"BLEU-4      {result['bleu']:.4f} of samples")


def _only(context: typer.Context, model: str, options: tuple[str, ...]) -> None:
    """Refuse an option that means nothing to a model of this class."""
    for name in given_options(context):
        if name not in (*options, "checkpoint"):
            raise UserError(f"--{name.replace('_', '-')} is not for models of the class {model}.")


@app.command()
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="A run's folder, or its model.safetensors.")
    ] = None,
) -> None:
    """Describe a trained model, or this installation."""
    if checkpoint is not None:
        require("reading a checkpoint", "safetensors")
        from .checkpoint import SavedFlow, SavedImageModel, SavedPixelModel, load_any

        saved = load_any(checkpoint)
        if isinstance(saved, SavedFlow):
            from .flow_run import describe_flow

            _table(describe_flow(saved))
        elif isinstance(saved, SavedImageModel):
            from .image_run import describe_image_model

            _table(describe_image_model(saved))
        elif isinstance(saved, SavedPixelModel):
            from .pixelcnn_run import describe_pixel_model

            _table(describe_pixel_model(saved))
        else:
            from .run import describe

            _table(describe(saved))
        return
    import torch

    from genfuse import build_info

    try:
        built = build_info()
    except RuntimeError as error:
        built = {"native library": str(error)}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    _table({**built, "torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu})


def _table(rows: dict[str, Any]) -> None:
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        if isinstance(value, (list, tuple)):
            value = " ".join(str(part) for part in value)
        print(f"{name.replace('_', ' '):<{width}}  {'none' if value is None or value == '' else value}")
