"""The commands of ``genfuse``: train, sample, evaluate, info. Heavy imports happen inside them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .settings import LanguageModelSettings

__all__ = ["app"]

app = typer.Typer(
    name="genfuse",
    help="Train, sample and evaluate generative models built from fused kernels.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Train a model.", rich_markup_mode="rich")
app.add_typer(train, name="train")

DEFAULT = LanguageModelSettings()
MODEL, REGULARISERS, MACHINE = "Model", "Regularisation", "Machine"


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


@train.callback(invoke_without_command=True)
def train_(context: typer.Context) -> None:
    """Train a model: choose which."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@train.command("lstm")
def train_lstm(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR", help="UTF-8 text file, or folder of them; by default Python's own language reference."
        ),
    ] = None,
    level: Annotated[str, typer.Option(metavar="char|byte", help="What a token is.")] = DEFAULT.level,
    epochs: Annotated[int, typer.Option(help="Times the text is read.")] = DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(help="Windows a step, over all processes.")] = DEFAULT.batch_size,
    context_length: Annotated[int, typer.Option("--context", help="Tokens in a window.")] = DEFAULT.context,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Of AdamW.")] = DEFAULT.learning_rate,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for no limit.")] = DEFAULT.clip,
    held_out: Annotated[float, typer.Option(help="Share of the text (its end) kept for testing.")] = DEFAULT.held_out,
    seed: Annotated[int, typer.Option(help="Of weights, order of the text, and masks.")] = DEFAULT.seed,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder; by default runs/lstm[-N].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = DEFAULT.save_every,
    cell: Annotated[
        str, typer.Option(metavar="lstm|layernorm_lstm|gru", help="Kind of recurrent layer.", rich_help_panel=MODEL)
    ] = DEFAULT.cell,
    hidden_size: Annotated[int, typer.Option(help="Cells in a layer.", rich_help_panel=MODEL)] = DEFAULT.hidden_size,
    embedding_dim: Annotated[
        int, typer.Option(help="Size of a token's vector.", rich_help_panel=MODEL)
    ] = DEFAULT.embedding_dim,
    layers: Annotated[int, typer.Option(help="Recurrent layers.", rich_help_panel=MODEL)] = DEFAULT.layers,
    tie_weights: Annotated[
        bool, typer.Option("--tie-weights", help="Head and embedding share weights.", rich_help_panel=MODEL)
    ] = DEFAULT.tie_weights,
    dropout: Annotated[
        float, typer.Option(help="On the last layer's output.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.dropout,
    input_dropout: Annotated[
        float, typer.Option(help="On the embedded tokens.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.input_dropout,
    hidden_dropout: Annotated[
        float, typer.Option(help="Between layers.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.hidden_dropout,
    embedding_dropout: Annotated[
        float, typer.Option(help="Of whole tokens.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.embedding_dropout,
    weight_drop: Annotated[
        float, typer.Option(help="DropConnect on the recurrent weights.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.weight_drop,
    zoneout_h: Annotated[
        float, typer.Option(help="Hidden units that keep their value.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.zoneout_h,
    zoneout_c: Annotated[
        float, typer.Option(help="Cells that keep their value.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.zoneout_c,
    activation_regularization: Annotated[
        float, typer.Option("--ar", help="Activation regularisation.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.activation_regularization,
    temporal_activation_regularization: Annotated[
        float, typer.Option("--tar", help="Temporal activation regularisation.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.temporal_activation_regularization,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's, on the matrices.", rich_help_panel=REGULARISERS)
    ] = DEFAULT.weight_decay,
    accelerator: Annotated[
        str, typer.Option(metavar="auto|cpu|gpu|...", help="Kind of device.", rich_help_panel=MACHINE)
    ] = "auto",
    devices: Annotated[
        str,
        typer.Option(
            metavar="N", help="Devices on each machine; by default 1, or torchrun's.", rich_help_panel=MACHINE
        ),
    ] = "auto",
    nodes: Annotated[int, typer.Option(metavar="N", help="Machines.", rich_help_panel=MACHINE)] = 1,
    strategy: Annotated[
        str, typer.Option(metavar="auto|ddp|fsdp|...", help="How devices share the work.", rich_help_panel=MACHINE)
    ] = "auto",
    precision: Annotated[
        str, typer.Option(metavar="32-true|bf16-mixed|...", help="Of the arithmetic.", rich_help_panel=MACHINE)
    ] = "32-true",
) -> None:
    """Train a recurrent language model on text.

    Without options: a character model of Python's own documentation, in a few minutes on two CPU cores. The run's
    folder receives the best model, the loss curve, TensorBoard logs and a sample. A run that was killed goes on with
    --resume, with the same result as if nothing had happened.

    Examples:

      genfuse train lstm

      genfuse train lstm --data book.txt --epochs 30 --out runs/book

      genfuse train lstm --out runs/book --resume

      torchrun --nproc-per-node 2 -m genfuse train lstm --data corpus/ --out runs/corpus --strategy ddp
    """
    _require("training", "lightning", "torchmetrics", "matplotlib", "tensorboard", "safetensors", "rich")
    from .run import train_language_model

    given: dict[str, Any] = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given[{"context_length": "context"}.get(name, name)] = value
    settings = {name: value for name, value in given.items() if name in LanguageModelSettings.__dataclass_fields__}
    train_language_model(
        settings,
        out=out,
        resume=resume,
        accelerator=accelerator,
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        precision=precision,
        say=_say,
        progress=sys.stdout.isatty(),
    )


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run's folder, or its model.safetensors.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from; by default a new line.")] = "",
    length: Annotated[int, typer.Option(help="Tokens to write: characters, or bytes at byte level.")] = 500,
    temperature: Annotated[
        float, typer.Option(help="Low is cautious, above 1 is daring; 0 always takes the likeliest.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest of this total probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="For the same text each time.")] = None,
) -> None:
    """Write text with a trained model."""
    _require("sampling", "safetensors")
    from .checkpoint import load_model
    from .run import sample as continue_text

    saved = load_model(checkpoint)
    unknown = saved.vocabulary.unknown(prompt)
    if unknown:
        characters = ", ".join(repr(character) for character in unknown)
        print(f"genfuse: the model has never seen {characters} and reads a placeholder instead.", file=sys.stderr)
    text = continue_text(saved, prompt, length, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    print(prompt + text)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run's folder, or its model.safetensors.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE|DIR", help="Text to score; by default the held-out part of the run's own."),
    ] = None,
) -> None:
    """Score a trained model: bits per character, perplexity, BLEU of samples."""
    _require("evaluating", "lightning", "torchmetrics", "safetensors")
    from .checkpoint import load_model
    from .run import evaluate as score

    result = score(load_model(checkpoint), data)
    print(f"text        {result['text']}: {result['characters']:,} characters")
    if result["unknown"]:
        print(f"unknown     {result['unknown']:.2%} of the characters are new to the model")
    print(f"bits/char   {result['bits_per_char']:.4f}")
    print(f"perplexity  {result['perplexity']:.4f} per character")
    print(f"BLEU-4      {result['bleu']:.4f} of samples")


@app.command()
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="A run's folder, or its model.safetensors.")
    ] = None,
) -> None:
    """Describe a trained model, or this installation."""
    if checkpoint is not None:
        _require("reading a checkpoint", "safetensors")
        from .checkpoint import load_model
        from .run import describe

        _table(describe(load_model(checkpoint)))
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


def _require(what: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{what} needs {package}, which is not installed: pip install 'genfuse[train]'.")


def _say(line: str) -> None:
    print(line, flush=True)
