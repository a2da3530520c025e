"""The commands of ``genfuse``: train, sample, evaluate, info. Heavy imports happen inside them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .settings import (
    GlowSettings,
    HierarchicalVAESettings,
    LanguageModelSettings,
    MAFSettings,
    NSFSettings,
    RealNVPSettings,
    Settings,
    VAESettings,
    VQVAESettings,
)

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
VAE, HVAE, VQVAE = VAESettings(), HierarchicalVAESettings(), VQVAESettings()
REALNVP, GLOW, NSF, MAF = RealNVPSettings(), GlowSettings(), NSFSettings(), MAFSettings()
REALNVP_HIDDEN, NSF_HIDDEN, MAF_HIDDEN = (",".join(map(str, kind.hidden)) for kind in (REALNVP, NSF, MAF))
MODEL, REGULARISERS, MACHINE, DATA, PRIOR = "Model", "Regularisation", "Machine", "Data", "Prior over codes"
TEXT, IMAGES, FLOWS = "Language models", "Image models", "Image models and flows"

# Options that several kinds of training have.
Rate = Annotated[float, typer.Option("--learning-rate", "--lr", help="Of AdamW.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for no limit.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Accelerator = Annotated[str, typer.Option(metavar="auto|cpu|gpu|...", help="Kind of device.", rich_help_panel=MACHINE)]
Devices = Annotated[
    str,
    typer.Option(metavar="N", help="Devices on each machine; by default 1, or torchrun's.", rich_help_panel=MACHINE),
]
Nodes = Annotated[int, typer.Option(metavar="N", help="Machines.", rich_help_panel=MACHINE)]
Strategy = Annotated[
    str, typer.Option(metavar="auto|ddp|fsdp|...", help="How devices share the work.", rich_help_panel=MACHINE)
]
Precision = Annotated[
    str, typer.Option(metavar="32-true|bf16-mixed|...", help="Of the arithmetic.", rich_help_panel=MACHINE)
]
ImageSource = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="digits|mnist5k|fashion-mnist|DIR|FILE",
        help="A data set by name, a folder of pictures or of idx files, or an idx, .npy or .npz file.",
    ),
]
Epochs = Annotated[int, typer.Option(help="Times the images are read.")]
BatchSize = Annotated[int, typer.Option(help="Images a step, over all processes.")]
Seed = Annotated[int, typer.Option(help="Of weights, order of the images, their bits, and noise.")]
NLLSamples = Annotated[int, typer.Option(help="Of the importance-weighted likelihood at the end.")]
ImageSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="Crop and resize a folder's pictures to N by N.", rich_help_panel=DATA),
]
Grey = Annotated[bool, typer.Option("--grey", "--gray", help="Make colours grey.", rich_help_panel=DATA)]
ImagesHeldOut = Annotated[
    float | None,
    typer.Option(
        "--held-out",
        help="Share of the images kept for testing; by default the data's test set, or 0.1.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
SplitSeed = Annotated[int, typer.Option(help="Of which images are held out, and of their bits.", rich_help_panel=DATA)]
Binarize = Annotated[
    str | None,
    typer.Option(
        metavar="dynamic|none",
        help="Read grey values as chances of a white pixel, drawn anew each time; by default with Bernoulli pixels.",
        rich_help_panel=DATA,
    ),
]
Likelihood = Annotated[
    str | None,
    typer.Option(
        metavar="bernoulli|gaussian|discretized_gaussian",
        help="Of a pixel; by default bernoulli, and discretized_gaussian for colours.",
        rich_help_panel=MODEL,
    ),
]
Implementation = Annotated[
    str,
    typer.Option(
        metavar="genfuse|torch",
        help="torch: train the model's twin in plain PyTorch instead, on the same batches, to compare.",
        rich_help_panel=MACHINE,
    ),
]
Beta = Annotated[float, typer.Option(help="Weight of the KL (beta-VAE).", rich_help_panel=REGULARISERS)]
FreeBits = Annotated[
    float, typer.Option(help="Nats of KL that each latent may have for free.", rich_help_panel=REGULARISERS)
]
KLWarmup = Annotated[
    float, typer.Option(help="Epochs in which the KL's weight grows from 0.", rich_help_panel=REGULARISERS)
]
WeightDecay = Annotated[float, typer.Option(help="AdamW's, on the matrices.", rich_help_panel=REGULARISERS)]


FlowSource = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="moons|digits|mnist5k|fashion-mnist|TABLE.csv|FILE|DIR",
        help="A data set by name; a table, as text with a number in each cell, .npy or .npz; or images, as for vae.",
    ),
]
FlowEpochs = Annotated[int, typer.Option(help="Times the data are read.")]
FlowBatchSize = Annotated[int, typer.Option(help="Images or rows a step, over all processes.")]
FlowSeed = Annotated[int, typer.Option(help="Of weights, order of the data, and noise.")]
PartHeldOut = Annotated[
    float | None,
    typer.Option(
        "--held-out",
        help="Share for choosing the best model, and again for testing, where the data have no such sets; 0.1.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
PartSeed = Annotated[int, typer.Option(help="Of which data are held out.", rich_help_panel=DATA)]
Hidden = Annotated[
    str,
    typer.Option(
        metavar="N,N,...", help="Widths of the conditioners' layers; of realnvp, for tables.", rich_help_panel=MODEL
    ),
]
Channels = Annotated[int, typer.Option(help="Of images: of the couplings' convolutions.", rich_help_panel=MODEL)]
Layers = Annotated[
    int,
    typer.Option(
        "--flows", "--transforms", help="Transforms in a chain; of realnvp, for tables.", rich_help_panel=MODEL
    ),
]
Levels = Annotated[
    int,
    typer.Option(help="Of images: scales, each half as high and wide as the one before.", rich_help_panel=MODEL),
]
Reversible = Annotated[
    bool,
    typer.Option(
        "--reversible",
        help="Recompute activations instead of keeping them: slower, in less memory.",
        rich_help_panel=MODEL,
    ),
]


def _out(name: str) -> Any:
    return typer.Option(metavar="DIR", help=f"The run's folder; by default runs/{name}[-N].")


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
    learning_rate: Rate = DEFAULT.learning_rate,
    clip: Clip = DEFAULT.clip,
    held_out: Annotated[float, typer.Option(help="Share of the text (its end) kept for testing.")] = DEFAULT.held_out,
    seed: Annotated[int, typer.Option(help="Of weights, order of the text, and masks.")] = DEFAULT.seed,
    out: Annotated[Path | None, _out("lstm")] = None,
    resume: Resume = False,
    save_every: SaveEvery = DEFAULT.save_every,
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
    weight_decay: WeightDecay = DEFAULT.weight_decay,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
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
    _require(*TRAINING)
    from .run import train_language_model

    _train(context, train_language_model, LanguageModelSettings)


@train.command("vae")
def train_vae(
    context: typer.Context,
    data: ImageSource = VAE.data,
    epochs: Epochs = VAE.epochs,
    batch_size: BatchSize = VAE.batch_size,
    learning_rate: Rate = VAE.learning_rate,
    clip: Clip = VAE.clip,
    nll_samples: NLLSamples = VAE.nll_samples,
    seed: Seed = VAE.seed,
    out: Annotated[Path | None, _out("vae")] = None,
    resume: Resume = False,
    save_every: SaveEvery = VAE.save_every,
    image_size: ImageSize = None,
    grey: Grey = False,
    held_out: ImagesHeldOut = None,
    split_seed: SplitSeed = VAE.split_seed,
    binarize: Binarize = None,
    architecture: Annotated[
        str, typer.Option(metavar="mlp|conv", help="Dense layers, or convolutions.", rich_help_panel=MODEL)
    ] = VAE.architecture,
    latent_dim: Annotated[
        int, typer.Option(help="Numbers in an image's code.", rich_help_panel=MODEL)
    ] = VAE.latent_dim,
    hidden_dims: Annotated[
        str, typer.Option(metavar="N,N,...", help="Widths of the encoder's dense layers.", rich_help_panel=MODEL)
    ] = ",".join(map(str, VAE.hidden_dims)),
    likelihood: Likelihood = None,
    objective: Annotated[
        str, typer.Option(metavar="elbo|iwae", help="Bound that is trained.", rich_help_panel=MODEL)
    ] = VAE.objective,
    num_samples: Annotated[
        int, typer.Option("--samples", help="Samples of the latents for each image.", rich_help_panel=MODEL)
    ] = VAE.num_samples,
    beta: Beta = VAE.beta,
    free_bits: FreeBits = VAE.free_bits,
    kl_warmup: KLWarmup = VAE.kl_warmup,
    weight_decay: WeightDecay = VAE.weight_decay,
    implementation: Implementation = VAE.implementation,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
) -> None:
    """Train a variational autoencoder on images.

    Without options: on scikit-learn's 1797 digits of 8 by 8 pixels, in about a minute on two CPU cores. The run's
    folder receives the best model, what it scores (ELBO, importance-weighted NLL), the loss curve, TensorBoard logs,
    and pictures of reconstructions, samples and interpolations. A run that was killed goes on with --resume.

    Examples:

      genfuse train vae

      genfuse train vae --data fashion-mnist --architecture conv --epochs 30 --out runs/fashion

      genfuse train vae --data photos/ --image-size 32 --likelihood discretized_gaussian

      genfuse train vae --data digits --objective iwae --samples 8
    """
    _require(*TRAINING)
    from .image_run import train_image_model

    _train(context, functools.partial(train_image_model, "vae"), VAESettings)


@train.command("hvae")
def train_hvae(
    context: typer.Context,
    data: ImageSource = HVAE.data,
    epochs: Epochs = HVAE.epochs,
    batch_size: BatchSize = HVAE.batch_size,
    learning_rate: Rate = HVAE.learning_rate,
    clip: Clip = HVAE.clip,
    nll_samples: NLLSamples = HVAE.nll_samples,
    seed: Seed = HVAE.seed,
    out: Annotated[Path | None, _out("hvae")] = None,
    resume: Resume = False,
    save_every: SaveEvery = HVAE.save_every,
    image_size: ImageSize = None,
    grey: Grey = False,
    held_out: ImagesHeldOut = None,
    split_seed: SplitSeed = HVAE.split_seed,
    binarize: Binarize = None,
    latent_dims: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", help="Latents of each layer, the one at the image first.", rich_help_panel=MODEL
        ),
    ] = ",".join(map(str, HVAE.latent_dims)),
    hidden_dim: Annotated[
        int, typer.Option(help="Width of the dense layers.", rich_help_panel=MODEL)
    ] = HVAE.hidden_dim,
    likelihood: Likelihood = None,
    beta: Beta = HVAE.beta,
    free_bits: FreeBits = HVAE.free_bits,
    kl_warmup: Annotated[
        float | None,
        typer.Option(
            help="Epochs in which the KL's weight grows from 0; by default a third of them.",
            show_default=False,
            rich_help_panel=REGULARISERS,
        ),
    ] = HVAE.kl_warmup,
    weight_decay: WeightDecay = HVAE.weight_decay,
    implementation: Implementation = HVAE.implementation,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
) -> None:
    """Train a hierarchical (ladder) VAE on images.

    Several layers of latents, each the prior of the one below it. Data, folder and figures are those of
    genfuse train vae.

    Examples:

      genfuse train hvae

      genfuse train hvae --data fashion-mnist --latent-dims 32,16,8,4 --epochs 30 --out runs/ladder
    """
    _require(*TRAINING)
    from .image_run import train_image_model

    _train(context, functools.partial(train_image_model, "hvae"), HierarchicalVAESettings)


@train.command("vqvae")
def train_vqvae(
    context: typer.Context,
    data: ImageSource = VQVAE.data,
    epochs: Annotated[int, typer.Option(help="Of the autoencoder.")] = VQVAE.epochs,
    prior_epochs: Annotated[int, typer.Option(help="Of the prior over its codes, after that.")] = VQVAE.prior_epochs,
    batch_size: BatchSize = VQVAE.batch_size,
    learning_rate: Rate = VQVAE.learning_rate,
    clip: Clip = VQVAE.clip,
    seed: Annotated[int, typer.Option(help="Of weights, order of the images, and their bits.")] = VQVAE.seed,
    out: Annotated[Path | None, _out("vqvae")] = None,
    resume: Resume = False,
    save_every: SaveEvery = VQVAE.save_every,
    image_size: ImageSize = None,
    grey: Grey = False,
    held_out: ImagesHeldOut = None,
    split_seed: SplitSeed = VQVAE.split_seed,
    binarize: Binarize = None,
    num_embeddings: Annotated[int, typer.Option(help="Codes in the codebook.", rich_help_panel=MODEL)] = (
        VQVAE.num_embeddings
    ),
    embedding_dim: Annotated[int, typer.Option(help="Size of a code's vector.", rich_help_panel=MODEL)] = (
        VQVAE.embedding_dim
    ),
    hidden_dim: Annotated[int, typer.Option(help="Channels of the convolutions.", rich_help_panel=MODEL)] = (
        VQVAE.hidden_dim
    ),
    likelihood: Likelihood = None,
    commitment_weight: Annotated[
        float, typer.Option(help="Of drawing the encoder to its codes.", rich_help_panel=REGULARISERS)
    ] = VQVAE.commitment_weight,
    decay: Annotated[
        float, typer.Option(help="Of the codebook's moving averages.", rich_help_panel=REGULARISERS)
    ] = VQVAE.decay,
    weight_decay: WeightDecay = VQVAE.weight_decay,
    prior_hidden_size: Annotated[int, typer.Option(help="Cells of its LSTM.", rich_help_panel=PRIOR)] = (
        VQVAE.prior_hidden_size
    ),
    prior_learning_rate: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=PRIOR)] = (
        VQVAE.prior_learning_rate
    ),
    implementation: Implementation = VQVAE.implementation,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
) -> None:
    """Train a VQ-VAE on images: an autoencoder with discrete codes, then an LSTM prior over the codes.

    Both stages are one run: a run that was killed in either goes on with --resume. Data and folder are those of
    genfuse train vae; the figure at the end is a bound, -log p(x | codes) - log p(codes).

    Examples:

      genfuse train vqvae

      genfuse train vqvae --data fashion-mnist --epochs 10 --prior-epochs 10 --out runs/vq
    """
    _require(*TRAINING)
    from .image_run import train_image_model

    _train(context, functools.partial(train_image_model, "vqvae"), VQVAESettings)


@train.command("realnvp")
def train_realnvp(
    context: typer.Context,
    data: FlowSource = REALNVP.data,
    epochs: FlowEpochs = REALNVP.epochs,
    batch_size: FlowBatchSize = REALNVP.batch_size,
    learning_rate: Rate = REALNVP.learning_rate,
    clip: Clip = REALNVP.clip,
    seed: FlowSeed = REALNVP.seed,
    out: Annotated[Path | None, _out("realnvp")] = None,
    resume: Resume = False,
    save_every: SaveEvery = REALNVP.save_every,
    image_size: ImageSize = None,
    grey: Grey = False,
    held_out: PartHeldOut = None,
    split_seed: PartSeed = REALNVP.split_seed,
    flows: Layers = REALNVP.flows,
    hidden: Hidden = REALNVP_HIDDEN,
    levels: Levels = REALNVP.levels,
    channels: Channels = REALNVP.channels,
    reversible: Reversible = REALNVP.reversible,
    weight_decay: WeightDecay = REALNVP.weight_decay,
    implementation: Implementation = REALNVP.implementation,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
) -> None:
    """Train a RealNVP (affine couplings) on a table or on images.

    Without options: on two half moons, in about a minute on two CPU cores. Images are dequantised and modelled at
    several scales, in bits per dimension; tables are standardised, in nats. The run's folder receives the model that
    did best on the validation data, what it scores on the test data, the loss curve, TensorBoard logs, and pictures of
    samples, temperatures, density and round-trip error. A run that was killed goes on with --resume.

    Examples:

      genfuse train realnvp

      genfuse train realnvp --data measurements.csv --flows 12 --hidden 128,128 --out runs/measurements

      genfuse train realnvp --data digits --epochs 100
    """
    _require(*TRAINING)
    from .flow_run import train_flow

    _train(context, functools.partial(train_flow, "realnvp"), RealNVPSettings)


@train.command("glow")
def train_glow(
    context: typer.Context,
    data: ImageSource = GLOW.data,
    epochs: FlowEpochs = GLOW.epochs,
    batch_size: FlowBatchSize = GLOW.batch_size,
    learning_rate: Rate = GLOW.learning_rate,
    clip: Clip = GLOW.clip,
    seed: FlowSeed = GLOW.seed,
    out: Annotated[Path | None, _out("glow")] = None,
    resume: Resume = False,
    save_every: SaveEvery = GLOW.save_every,
    image_size: ImageSize = None,
    grey: Grey = False,
    held_out: PartHeldOut = None,
    split_seed: PartSeed = GLOW.split_seed,
    levels: Levels = GLOW.levels,
    steps: Annotated[int, typer.Option(help="Of each level.", rich_help_panel=MODEL)] = GLOW.steps,
    reversible: Reversible = GLOW.reversible,
    channels: Channels = GLOW.channels,
    weight_decay: WeightDecay = GLOW.weight_decay,
    implementation: Implementation = GLOW.implementation,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
) -> None:
    """Train a Glow on images.

    Without options: on scikit-learn's digits, in about two minutes on two CPU cores; bits per dimension. Folder and
    pictures are those of genfuse train realnvp.

    Examples:

      genfuse train glow

      genfuse train glow --data fashion-mnist --steps 16 --channels 128 --reversible --out runs/fashion
    """
    _require(*TRAINING)
    from .flow_run import train_flow

    _train(context, functools.partial(train_flow, "glow"), GlowSettings)


@train.command("nsf")
def train_nsf(
    context: typer.Context,
    data: FlowSource = NSF.data,
    epochs: FlowEpochs = NSF.epochs,
    batch_size: FlowBatchSize = NSF.batch_size,
    learning_rate: Rate = NSF.learning_rate,
    clip: Clip = NSF.clip,
    seed: FlowSeed = NSF.seed,
    out: Annotated[Path | None, _out("nsf")] = None,
    resume: Resume = False,
    save_every: SaveEvery = NSF.save_every,
    held_out: PartHeldOut = None,
    split_seed: PartSeed = NSF.split_seed,
    image_size: ImageSize = None,
    grey: Grey = False,
    flows: Layers = NSF.flows,
    bins: Annotated[int, typer.Option(help="Of each spline.", rich_help_panel=MODEL)] = NSF.bins,
    tail_bound: Annotated[
        float, typer.Option(help="Splines act in [-B, B] of the standardised columns.", rich_help_panel=MODEL)
    ] = NSF.tail_bound,
    autoregressive: Annotated[
        bool,
        typer.Option("--autoregressive", help="Each column given all before it, not in halves.", rich_help_panel=MODEL),
    ] = NSF.autoregressive,
    linear: Annotated[
        str,
        typer.Option(metavar="lu|permutation|none", help="What mixes the columns in between.", rich_help_panel=MODEL),
    ] = NSF.linear,
    hidden: Hidden = NSF_HIDDEN,
    weight_decay: WeightDecay = NSF.weight_decay,
    implementation: Implementation = NSF.implementation,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
) -> None:
    """Train a neural spline flow (rational-quadratic splines) on a table or on images.

    Without options: on two half moons, in about a minute on two CPU cores. Folder and pictures are those of
    genfuse train realnvp.

    Examples:

      genfuse train nsf

      genfuse train nsf --data measurements.csv --autoregressive --out runs/measurements

      genfuse train nsf --data digits
    """
    _require(*TRAINING)
    from .flow_run import train_flow

    _train(context, functools.partial(train_flow, "nsf"), NSFSettings)


@train.command("maf")
def train_maf(
    context: typer.Context,
    data: FlowSource = MAF.data,
    epochs: FlowEpochs = MAF.epochs,
    batch_size: FlowBatchSize = MAF.batch_size,
    learning_rate: Rate = MAF.learning_rate,
    clip: Clip = MAF.clip,
    seed: FlowSeed = MAF.seed,
    out: Annotated[Path | None, _out("maf")] = None,
    resume: Resume = False,
    save_every: SaveEvery = MAF.save_every,
    held_out: PartHeldOut = None,
    split_seed: PartSeed = MAF.split_seed,
    image_size: ImageSize = None,
    grey: Grey = False,
    flows: Layers = MAF.flows,
    hidden: Hidden = MAF_HIDDEN,
    weight_decay: WeightDecay = MAF.weight_decay,
    implementation: Implementation = MAF.implementation,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
) -> None:
    """Train a masked autoregressive flow on a table or on images: fast to score, one number after the other to sample.

    Without options: on two half moons, in about a minute on two CPU cores. Folder and pictures are those of
    genfuse train realnvp.

    Examples:

      genfuse train maf

      genfuse train maf --data measurements.csv --flows 10 --hidden 256,256 --out runs/measurements
    """
    _require(*TRAINING)
    from .flow_run import train_flow

    _train(context, functools.partial(train_flow, "maf"), MAFSettings)


@train.command("iaf")
def train_iaf(
    context: typer.Context,
    data: FlowSource = MAF.data,
    epochs: FlowEpochs = MAF.epochs,
    batch_size: FlowBatchSize = MAF.batch_size,
    learning_rate: Rate = MAF.learning_rate,
    clip: Clip = MAF.clip,
    seed: FlowSeed = MAF.seed,
    out: Annotated[Path | None, _out("iaf")] = None,
    resume: Resume = False,
    save_every: SaveEvery = MAF.save_every,
    held_out: PartHeldOut = None,
    split_seed: PartSeed = MAF.split_seed,
    image_size: ImageSize = None,
    grey: Grey = False,
    flows: Layers = MAF.flows,
    hidden: Hidden = MAF_HIDDEN,
    weight_decay: WeightDecay = MAF.weight_decay,
    implementation: Implementation = MAF.implementation,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    nodes: Nodes = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
) -> None:
    """Train an inverse autoregressive flow on a table or images: fast to sample, one number after the other to score.

    Folder and pictures are those of genfuse train realnvp. Training scores, so that it is slow where there are many
    of them: genfuse train maf is the usual choice for a density.

    Example:

      genfuse train iaf
    """
    _require(*TRAINING)
    from .flow_run import train_flow

    _train(context, functools.partial(train_flow, "iaf"), MAFSettings)


TRAINING = ("training", "lightning", "torchmetrics", "matplotlib", "tensorboard", "safetensors", "rich")


def _train(context: typer.Context, begin: Callable[..., Any], settings: type[Settings]) -> None:
    """Begin a run with the settings that were given on the command line."""
    given = {{"context_length": "context"}.get(name, name): value for name, value in _given(context).items()}
    fields: Any = settings
    begin(
        {name: value for name, value in given.items() if name in fields.__dataclass_fields__},
        **{
            name: context.params[name]
            for name in ("out", "resume", "accelerator", "devices", "nodes", "strategy", "precision")
        },
        say=_say,
        progress=sys.stdout.isatty(),
    )


def _given(context: typer.Context) -> dict[str, Any]:
    """The parameters that were given on the command line."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given[name] = value
    return given


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
        typer.Option("--pixels", help="Draw the pixels, too, instead of showing their means.", rich_help_panel=IMAGES),
    ] = False,
) -> None:
    """Write text, a picture or a table with a trained model."""
    _require("sampling", "safetensors")
    from .checkpoint import SavedFlow, SavedImageModel, load_any

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
        int, typer.Option(help="Of the importance-weighted likelihood, for each image.", rich_help_panel=IMAGES)
    ] = 5000,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Score the first N images or rows only.", rich_help_panel=FLOWS)
    ] = None,
) -> None:
    """Score a model: bits per character, perplexity, BLEU of samples; of images, ELBO and NLL; of flows, NLL."""
    _require("evaluating", "lightning", "torchmetrics", "safetensors")
    import torch

    from .checkpoint import SavedFlow, SavedImageModel, load_any

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
    for name in _given(context):
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
        _require("reading a checkpoint", "safetensors")
        from .checkpoint import SavedFlow, SavedImageModel, load_any

        saved = load_any(checkpoint)
        if isinstance(saved, SavedFlow):
            from .flow_run import describe_flow

            _table(describe_flow(saved))
        elif isinstance(saved, SavedImageModel):
            from .image_run import describe_image_model

            _table(describe_image_model(saved))
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


def _require(what: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{what} needs {package}, which is not installed: pip install 'genfuse[train]'.")


def _say(line: str) -> None:
    print(line, flush=True)
