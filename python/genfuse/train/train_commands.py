"""The commands ``genfuse train ...``: their options and their help. Heavy imports happen when one runs.

`trains` makes a command: of the options that all models of its kind have, of those that its model alone has, and of the
settings, which hold every default.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from .errors import UserError
from .settings import (
    GatedPixelCNNSettings,
    GlowSettings,
    HierarchicalVAESettings,
    LanguageModelSettings,
    MAFSettings,
    NSFSettings,
    PixelCNNPlusPlusSettings,
    PixelCNNSettings,
    PixelSNAILSettings,
    RealNVPSettings,
    Settings,
    VAESettings,
    VQVAESettings,
)

__all__ = ["given_options", "require", "train"]

train = typer.Typer(help="Train a model.", rich_markup_mode="rich")

MODEL, REGULARISERS, MACHINE, DATA, PRIOR = "Model", "Regularisation", "Machine", "Data", "Prior over codes"
TRAINING = ("training", "lightning", "torchmetrics", "matplotlib", "tensorboard", "safetensors", "rich")


@dataclass(frozen=True)
class Option:
    """An option of a command, but its name in Python and its default.

    Attributes:
        kind: of its value.
        help: in a line.
        names: on the command line, where they are not the name in Python.
        metavar: what stands for its value.
        panel: of the help.
        show_default: in the help; False where `help` says it.
    """

    kind: Any
    help: str
    names: tuple[str, ...] = ()
    metavar: str | None = None
    panel: str | None = None
    show_default: bool = True

    def parameter(self, name: str, default: Any) -> inspect.Parameter:
        info = typer.Option(
            ",".join(map(str, default)) if isinstance(default, tuple) else default,
            *self.names,
            help=self.help,
            metavar=self.metavar,
            rich_help_panel=self.panel,
            show_default=self.show_default,
        )
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=self.kind)


@dataclass(frozen=True)
class Kind:
    """Models that are trained alike.

    Attributes:
        module: which has their `Job` classes in ``JOBS``.
        first: the options that all of them have, by name.
        last: those that come after a model's own.
    """

    module: str
    first: dict[str, Option]
    last: dict[str, Option]


def flag(help: str, *names: str, panel: str | None = None) -> Option:
    return Option(bool, help, names, panel=panel)


def of_model(kind: Any, help: str, *names: str, metavar: str | None = None, panel: str = MODEL) -> Option:
    return Option(kind, help, names, metavar, panel)


# Options that several kinds of training have.
RATE = Option(float, "Of AdamW.", ("--learning-rate", "--lr"))
CLIP = Option(float, "Largest norm of the gradient; 0 for no limit.")
RUN = {
    "out": Option(Path | None, "The run's folder; by default runs/{}[-N].", metavar="DIR"),
    "resume": flag("Go on from the last checkpoint in the folder.", "--resume"),
    "save_every": Option(int, "Steps between checkpoints."),
}
WEIGHT_DECAY = Option(float, "AdamW's, on the matrices.", panel=REGULARISERS)
IMPLEMENTATION = Option(
    str,
    "torch: train the model's twin in plain PyTorch instead, on the same batches, to compare.",
    metavar="genfuse|torch",
    panel=MACHINE,
)
DEVICES = {
    "accelerator": Option(str, "Kind of device.", metavar="auto|cpu|gpu|...", panel=MACHINE),
    "devices": Option(str, "Devices on each machine; by default 1, or torchrun's.", metavar="N", panel=MACHINE),
    "nodes": Option(int, "Machines.", metavar="N", panel=MACHINE),
    "strategy": Option(str, "How devices share the work.", metavar="auto|ddp|fsdp|...", panel=MACHINE),
    "precision": Option(str, "Of the arithmetic.", metavar="32-true|bf16-mixed|...", panel=MACHINE),
}
# Their defaults: they are no settings, since they do not change what a run is to compute.
DEFAULTS: dict[str, Any] = {
    "out": None,
    "resume": False,
    "accelerator": "auto",
    "devices": "auto",
    "nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
}
LAST = {"weight_decay": WEIGHT_DECAY, "implementation": IMPLEMENTATION, **DEVICES}
IMAGE_SOURCE = Option(
    str,
    "A data set by name, a folder of pictures or of idx files, or an idx, .npy or .npz file.",
    ("--data",),
    "digits|mnist5k|fashion-mnist|DIR|FILE",
)
PICTURES = {
    "image_size": Option(int | None, "Crop and resize a folder's pictures to N by N.", metavar="N", panel=DATA),
    "grey": flag("Make colours grey.", "--grey", "--gray", panel=DATA),
}


def trains(name: str, kind: Kind, settings: type[Settings], help: str, **options: Option | None) -> None:
    """Make the command ``genfuse train NAME``.

    Args:
        name: of the command and of its runs.
        kind: of model.
        settings: of a run; what they hold in a class variable of an option's name is its default.
        help: the first line is the summary.
        options: the model's own; one of a name that `kind` has as well replaces that, and None takes it away.
    """
    every = {option: one for option, one in {**kind.first, **options, **kind.last}.items() if one is not None}
    every["out"] = replace(every["out"], help=every["out"].help.format(name))

    def command(context: typer.Context, **values: Any) -> None:
        require(*TRAINING)
        from .engine import train as train_job

        jobs = importlib.import_module(kind.module, __package__).JOBS
        given = {_setting(option): value for option, value in given_options(context).items()}
        fields: Any = settings
        train_job(
            next(job for job in jobs if job.name == name),
            {option: value for option, value in given.items() if option in fields.__dataclass_fields__},
            **{option: values[option] for option in DEFAULTS},
            say=_say,
            progress=sys.stdout.isatty(),
        )

    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for option, declared in every.items():
        default = DEFAULTS[option] if option in DEFAULTS else getattr(settings, _setting(option))
        parameters.append(declared.parameter(option, default))
    shown: Any = command
    shown.__signature__ = inspect.Signature(parameters)
    shown.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    train.command(name, help=inspect.cleandoc(help))(command)


def _setting(option: str) -> str:
    """The setting that an option sets: ``context`` is Typer's word."""
    return {"context_length": "context"}.get(option, option)


def given_options(context: typer.Context) -> dict[str, Any]:
    """The parameters that were given on the command line."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given[name] = value
    return given


def require(what: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{what} needs {package}, which is not installed: pip install 'genfuse[train]'.")


def _say(line: str) -> None:
    print(line, flush=True)


@train.callback(invoke_without_command=True)
def train_(context: typer.Context) -> None:
    """Train a model: choose which."""
    if context.invoked_subcommand is None:
        print(context.get_help())


# Language models.

LANGUAGE = Kind(
    ".run",
    {
        "data": Option(
            str | None,
            "UTF-8 text file, or folder of them; by default Python's own language reference.",
            metavar="FILE|DIR",
        ),
        "level": Option(str, "What a token is.", metavar="char|byte"),
        "epochs": Option(int, "Times the text is read."),
        "batch_size": Option(int, "Windows a step, over all processes."),
        "context_length": Option(int, "Tokens in a window.", ("--context",)),
        "learning_rate": RATE,
        "clip": CLIP,
        "held_out": Option(float, "Share of the text (its end) kept for testing."),
        "seed": Option(int, "Of weights, order of the text, and masks."),
        **RUN,
    },
    {"weight_decay": WEIGHT_DECAY, **DEVICES},
)

trains(
    "lstm",
    LANGUAGE,
    LanguageModelSettings,
    """Train a recurrent language model on text.

    Without options: a character model of Python's own documentation, in a few minutes on two CPU cores. The run's
    folder receives the best model, the loss curve, TensorBoard logs and a sample. A run that was killed goes on with
    --resume, with the same result as if nothing had happened.

    Examples:

      genfuse train lstm

      genfuse train lstm --data book.txt --epochs 30 --out runs/book

      genfuse train lstm --out runs/book --resume

      torchrun --nproc-per-node 2 -m genfuse train lstm --data corpus/ --out runs/corpus --strategy ddp
    """,
    cell=of_model(str, "Kind of recurrent layer.", metavar="lstm|layernorm_lstm|gru"),
    hidden_size=of_model(int, "Cells in a layer."),
    embedding_dim=of_model(int, "Size of a token's vector."),
    layers=of_model(int, "Recurrent layers."),
    tie_weights=of_model(bool, "Head and embedding share weights.", "--tie-weights"),
    dropout=of_model(float, "On the last layer's output.", panel=REGULARISERS),
    input_dropout=of_model(float, "On the embedded tokens.", panel=REGULARISERS),
    hidden_dropout=of_model(float, "Between layers.", panel=REGULARISERS),
    embedding_dropout=of_model(float, "Of whole tokens.", panel=REGULARISERS),
    weight_drop=of_model(float, "DropConnect on the recurrent weights.", panel=REGULARISERS),
    zoneout_h=of_model(float, "Hidden units that keep their value.", panel=REGULARISERS),
    zoneout_c=of_model(float, "Cells that keep their value.", panel=REGULARISERS),
    activation_regularization=of_model(float, "Activation regularisation.", "--ar", panel=REGULARISERS),
    temporal_activation_regularization=of_model(
        float, "Temporal activation regularisation.", "--tar", panel=REGULARISERS
    ),
)


# Image models with latents.

IMAGES = Kind(
    ".image_run",
    {
        "data": IMAGE_SOURCE,
        "epochs": Option(int, "Times the images are read."),
        "batch_size": Option(int, "Images a step, over all processes."),
        "learning_rate": RATE,
        "clip": CLIP,
        "nll_samples": Option(int, "Of the importance-weighted likelihood at the end."),
        "seed": Option(int, "Of weights, order of the images, their bits, and noise."),
        **RUN,
        **PICTURES,
        "held_out": Option(
            float | None,
            "Share of the images kept for testing; by default the data's test set, or 0.1.",
            panel=DATA,
            show_default=False,
        ),
        "split_seed": Option(int, "Of which images are held out, and of their bits.", panel=DATA),
        "binarize": Option(
            str | None,
            "Read grey values as chances of a white pixel, drawn anew each time; by default with Bernoulli pixels.",
            metavar="dynamic|none",
            panel=DATA,
        ),
    },
    LAST,
)
LIKELIHOOD = of_model(
    str | None,
    "Of a pixel; by default bernoulli, and discretized_gaussian for colours.",
    metavar="bernoulli|gaussian|discretized_gaussian",
)
BETA = Option(float, "Weight of the KL (beta-VAE).", panel=REGULARISERS)
FREE_BITS = Option(float, "Nats of KL that each latent may have for free.", panel=REGULARISERS)

trains(
    "vae",
    IMAGES,
    VAESettings,
    """Train a variational autoencoder on images.

    Without options: on scikit-learn's 1797 digits of 8 by 8 pixels, in about a minute on two CPU cores. The run's
    folder receives the best model, what it scores (ELBO, importance-weighted NLL), the loss curve, TensorBoard logs,
    and pictures of reconstructions, samples and interpolations. A run that was killed goes on with --resume.

    Examples:

      genfuse train vae

      genfuse train vae --data fashion-mnist --architecture conv --epochs 30 --out runs/fashion

      genfuse train vae --data photos/ --image-size 32 --likelihood discretized_gaussian

      genfuse train vae --data digits --objective iwae --samples 8
    """,
    architecture=of_model(str, "Dense layers, or convolutions.", metavar="mlp|conv"),
    latent_dim=of_model(int, "Numbers in an image's code."),
    hidden_dims=of_model(str, "Widths of the encoder's dense layers.", metavar="N,N,..."),
    likelihood=LIKELIHOOD,
    objective=of_model(str, "Bound that is trained.", metavar="elbo|iwae"),
    num_samples=of_model(int, "Samples of the latents for each image.", "--samples"),
    beta=BETA,
    free_bits=FREE_BITS,
    kl_warmup=Option(float, "Epochs in which the KL's weight grows from 0.", panel=REGULARISERS),
)
trains(
    "hvae",
    IMAGES,
    HierarchicalVAESettings,
    """Train a hierarchical (ladder) VAE on images.

    Several layers of latents, each the prior of the one below it. Data, folder and figures are those of
    genfuse train vae.

    Examples:

      genfuse train hvae

      genfuse train hvae --data fashion-mnist --latent-dims 32,16,8,4 --epochs 30 --out runs/ladder
    """,
    latent_dims=of_model(str, "Latents of each layer, the one at the image first.", metavar="N,N,..."),
    hidden_dim=of_model(int, "Width of the dense layers."),
    likelihood=LIKELIHOOD,
    beta=BETA,
    free_bits=FREE_BITS,
    kl_warmup=Option(
        float | None,
        "Epochs in which the KL's weight grows from 0; by default a third of them.",
        panel=REGULARISERS,
        show_default=False,
    ),
)
trains(
    "vqvae",
    IMAGES,
    VQVAESettings,
    """Train a VQ-VAE on images: an autoencoder with discrete codes, then an LSTM prior over the codes.

    Both stages are one run: a run that was killed in either goes on with --resume. Data and folder are those of
    genfuse train vae; the figure at the end is a bound, -log p(x | codes) - log p(codes).

    Examples:

      genfuse train vqvae

      genfuse train vqvae --data fashion-mnist --epochs 10 --prior-epochs 10 --out runs/vq
    """,
    epochs=Option(int, "Of the autoencoder."),
    prior_epochs=Option(int, "Of the prior over its codes, after that."),
    seed=Option(int, "Of weights, order of the images, and their bits."),
    nll_samples=None,  # its bound has no noise
    num_embeddings=of_model(int, "Codes in the codebook."),
    embedding_dim=of_model(int, "Size of a code's vector."),
    hidden_dim=of_model(int, "Channels of the convolutions."),
    likelihood=LIKELIHOOD,
    commitment_weight=Option(float, "Of drawing the encoder to its codes.", panel=REGULARISERS),
    decay=Option(float, "Of the codebook's moving averages.", panel=REGULARISERS),
    prior_hidden_size=of_model(int, "Cells of its LSTM.", panel=PRIOR),
    prior_learning_rate=of_model(float, "Of AdamW.", panel=PRIOR),
)


# Flows.

PART_HELD_OUT = Option(
    float | None,
    "Share for choosing the best model, and again for testing, where the data have no such sets; 0.1.",
    panel=DATA,
    show_default=False,
)
FLOWS = Kind(
    ".flow_run",
    {
        "data": Option(
            str,
            "A data set by name; a table, as text with a number in each cell, .npy or .npz; or images, as for vae.",
            metavar="moons|digits|mnist5k|fashion-mnist|TABLE.csv|FILE|DIR",
        ),
        "epochs": Option(int, "Times the data are read."),
        "batch_size": Option(int, "Images or rows a step, over all processes."),
        "learning_rate": RATE,
        "clip": CLIP,
        "seed": Option(int, "Of weights, order of the data, and noise."),
        **RUN,
        **PICTURES,
        "held_out": PART_HELD_OUT,
        "split_seed": Option(int, "Of which data are held out.", panel=DATA),
    },
    LAST,
)
LAYERS = of_model(int, "Transforms in a chain; of realnvp, for tables.", "--flows", "--transforms")
HIDDEN = of_model(str, "Widths of the conditioners' layers; of realnvp, for tables.", metavar="N,N,...")
LEVELS = of_model(int, "Of images: scales, each half as high and wide as the one before.")
CHANNELS = of_model(int, "Of images: of the couplings' convolutions.")
REVERSIBLE = of_model(bool, "Recompute activations instead of keeping them: slower, in less memory.", "--reversible")

trains(
    "realnvp",
    FLOWS,
    RealNVPSettings,
    """Train a RealNVP (affine couplings) on a table or on images.

    Without options: on two half moons, in about a minute on two CPU cores. Images are dequantised and modelled at
    several scales, in bits per dimension; tables are standardised, in nats. The run's folder receives the model that
    did best on the validation data, what it scores on the test data, the loss curve, TensorBoard logs, and pictures of
    samples, temperatures, density and round-trip error. A run that was killed goes on with --resume.

    Examples:

      genfuse train realnvp

      genfuse train realnvp --data measurements.csv --flows 12 --hidden 128,128 --out runs/measurements

      genfuse train realnvp --data digits --epochs 100
    """,
    flows=LAYERS,
    hidden=HIDDEN,
    levels=LEVELS,
    channels=CHANNELS,
    reversible=REVERSIBLE,
)
trains(
    "glow",
    FLOWS,
    GlowSettings,
    """Train a Glow on images.

    Without options: on scikit-learn's digits, in about two minutes on two CPU cores; bits per dimension. Folder and
    pictures are those of genfuse train realnvp.

    Examples:

      genfuse train glow

      genfuse train glow --data fashion-mnist --steps 16 --channels 128 --reversible --out runs/fashion
    """,
    data=IMAGE_SOURCE,
    levels=LEVELS,
    steps=of_model(int, "Of each level."),
    reversible=REVERSIBLE,
    channels=CHANNELS,
)
trains(
    "nsf",
    FLOWS,
    NSFSettings,
    """Train a neural spline flow (rational-quadratic splines) on a table or on images.

    Without options: on two half moons, in about a minute on two CPU cores. Folder and pictures are those of
    genfuse train realnvp.

    Examples:

      genfuse train nsf

      genfuse train nsf --data measurements.csv --autoregressive --out runs/measurements

      genfuse train nsf --data digits
    """,
    flows=LAYERS,
    bins=of_model(int, "Of each spline."),
    tail_bound=of_model(float, "Splines act in [-B, B] of the standardised columns."),
    autoregressive=of_model(bool, "Each column given all before it, not in halves.", "--autoregressive"),
    linear=of_model(str, "What mixes the columns in between.", metavar="lu|permutation|none"),
    hidden=HIDDEN,
)
trains(
    "maf",
    FLOWS,
    MAFSettings,
    """Train a masked autoregressive flow on a table or on images: fast to score, one number after the other to sample.

    Without options: on two half moons, in about a minute on two CPU cores. Folder and pictures are those of
    genfuse train realnvp.

    Examples:

      genfuse train maf

      genfuse train maf --data measurements.csv --flows 10 --hidden 256,256 --out runs/measurements
    """,
    flows=LAYERS,
    hidden=HIDDEN,
)
trains(
    "iaf",
    FLOWS,
    MAFSettings,
    """Train an inverse autoregressive flow on a table or images: fast to sample, one number after the other to score.

    Folder and pictures are those of genfuse train realnvp. Training scores, so that it is slow where there are many
    of them: genfuse train maf is the usual choice for a density.

    Example:

      genfuse train iaf
    """,
    flows=LAYERS,
    hidden=HIDDEN,
)


# Autoregressive models of images.

PIXELS = Kind(
    ".pixelcnn_run",
    {
        "data": IMAGE_SOURCE,
        "epochs": Option(int, "Times the images are read."),
        "batch_size": Option(int, "Images a step, over all processes."),
        "learning_rate": RATE,
        "clip": CLIP,
        "seed": Option(int, "Of weights, order of the images, their bits, and dropout."),
        **RUN,
        "binary": flag("Read grey values as chances of a white pixel, drawn anew each time.", "--binary", panel=DATA),
        "levels": Option(
            int | None,
            "Values that a pixel can have; by default the data's.",
            metavar="N",
            panel=DATA,
            show_default=False,
        ),
        "conditional": flag("Learn images given their class, where the data have labels.", "--conditional", panel=DATA),
        **PICTURES,
        "held_out": PART_HELD_OUT,
        "split_seed": Option(int, "Of which images are held out, and of their bits.", panel=DATA),
    },
    LAST,
)
CONVOLUTIONS = {
    "channels": of_model(int, "Of each layer."),
    "num_layers": of_model(int, "Masked layers.", "--layers"),
    "kernel_size": of_model(int, "Of each layer; an odd number."),
}
HEAD = of_model(str, "Channels of more 1 x 1 layers at the end.", metavar="N,N,...")
BLOCKS = {
    "nr_resnet": of_model(int, "Gated blocks, at each scale or before each attention.", "--resnets"),
    "nr_filters": of_model(int, "Channels of the blocks.", "--filters"),
    "nr_logistic_mix": of_model(
        int, "Logistics in a pixel's mixture; with 0, a probability for each level.", "--mixtures"
    ),
}
DROPOUT = Option(float, "In the blocks.", panel=REGULARISERS)

trains(
    "pixelcnn",
    PIXELS,
    PixelCNNSettings,
    """Train a PixelCNN on images: masked convolutions that give each pixel's distribution given those before it.

    Without options: on scikit-learn's 1797 digits of 8 by 8 pixels and 17 grey levels, in a minute or two on two CPU
    cores; bits per dimension. With --binary, on black and white images drawn from the grey ones; nats. The run's folder
    receives the model that did best on the validation images, what it scores on the test images, the time for one image
    (cached, and by the naive loop), the loss curve, TensorBoard logs, and pictures of samples and of completions of
    test images. A run that was killed goes on with --resume.

    Examples:

      genfuse train pixelcnn

      genfuse train pixelcnn --data fashion-mnist --binary --channels 64 --layers 8 --out runs/fashion

      genfuse train pixelcnn --data photos/ --image-size 32 --levels 32
    """,
    **CONVOLUTIONS,
    head_channels=HEAD,
    residual=of_model(bool, "Add each layer's input to its output.", "--residual"),
)
trains(
    "gated-pixelcnn",
    PIXELS,
    GatedPixelCNNSettings,
    """Train a Gated PixelCNN on images: a vertical and a horizontal stack, which see all that comes before a pixel.

    Without options: on scikit-learn's digits, in a minute or two on two CPU cores. Data, folder and figures are those
    of genfuse train pixelcnn.

    Examples:

      genfuse train gated-pixelcnn

      genfuse train gated-pixelcnn --data mnist5k --binary --conditional --out runs/mnist
    """,
    **CONVOLUTIONS,
    first_kernel_size=of_model(int, "Of the first layer; an odd number."),
    head_channels=HEAD,
    skip=of_model(bool, "Sum the layers' outputs for the head.", "--skip"),
)
trains(
    "pixelcnn++",
    PIXELS,
    PixelCNNPlusPlusSettings,
    """Train a PixelCNN++ on images: streams at several scales, and a mixture of logistics for each pixel.

    Without options: on scikit-learn's digits in 16 grey levels (a mixture of logistics is over a power of two), in
    a few minutes on two CPU cores. Data, folder and figures are those of genfuse train pixelcnn.

    Examples:

      genfuse train pixelcnn++

      genfuse train pixelcnn++ --data photos/ --image-size 32 --filters 64 --mixtures 10 --scales 3 --dropout 0.5
    """,
    **BLOCKS,
    scales=of_model(int, "Each half as high and wide as the one before."),
    dropout=DROPOUT,
)
trains(
    "pixelsnail",
    PIXELS,
    PixelSNAILSettings,
    """Train a PixelSNAIL on images: gated blocks and causal attention, and a mixture of logistics for each pixel.

    Without options: on scikit-learn's digits in 16 grey levels, in a minute or two on two CPU cores. Data, folder
    and figures are those of genfuse train pixelcnn.

    Examples:

      genfuse train pixelsnail

      genfuse train pixelsnail --data fashion-mnist --blocks 4 --filters 64 --out runs/fashion
    """,
    nr_blocks=of_model(int, "Attentions, each after some gated blocks.", "--blocks"),
    **BLOCKS,
    key_channels=of_model(int, "Channels of the attention's keys and queries.", "--keys"),
    num_heads=of_model(int, "Of the attention.", "--heads"),
    dropout=DROPOUT,
)
