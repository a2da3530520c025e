"""Everything that decides what a training run computes, in one record that is checked, saved and read back."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CELLS",
    "LEVELS",
    "FlowSettings",
    "GatedPixelCNNSettings",
    "GlowSettings",
    "HierarchicalVAESettings",
    "ImageSettings",
    "LanguageModelSettings",
    "MAFSettings",
    "NSFSettings",
    "PixelCNNPlusPlusSettings",
    "PixelCNNSettings",
    "PixelSNAILSettings",
    "PixelSettings",
    "RealNVPSettings",
    "Settings",
    "VAESettings",
    "VQVAESettings",
    "process_rank",
]

CELLS = ("lstm", "layernorm_lstm", "gru")
LEVELS = ("char", "byte")

IMAGE_SETS = ("digits", "mnist5k", "fashion-mnist")
TABLE_SETS = ("moons",)
LIKELIHOODS = ("bernoulli", "gaussian", "discretized_gaussian")
BINARIZE = ("dynamic", "none")
ARCHITECTURES = ("mlp", "conv")
OBJECTIVES = ("elbo", "iwae")
IMPLEMENTATIONS = ("genfuse", "torch")
LINEAR = ("lu", "permutation", "none")


class Settings:
    """What the settings of every kind of run have in common: their checks, and their JSON.

    Attributes:
        data_kind: what a run learns from, for messages.
        extendable: settings that a run may be resumed with another value of.
        option_names: the command line's spelling, where it is not the setting's own.
        sizes: settings that are several whole numbers.
        may_be_empty: those of them that may be none at all.
    """

    held_out: float | None
    batch_size: int
    epochs: int
    learning_rate: float
    weight_decay: float
    clip: float
    seed: int
    save_every: int

    data_kind: ClassVar[str] = "text"
    extendable: ClassVar[tuple[str, ...]] = ("epochs",)
    option_names: ClassVar[dict[str, str]] = {}
    sizes: ClassVar[tuple[str, ...]] = ()
    may_be_empty: ClassVar[tuple[str, ...]] = ()

    @property
    def stage_epochs(self) -> tuple[int, ...]:
        """Epochs of each stage of the training."""
        return (self.epochs,)

    @classmethod
    def option(cls, name: str) -> str:
        """The command line's spelling of a setting.

        Example:
            >>> LanguageModelSettings.option("batch_size")
            '--batch-size'
        """
        return "--" + cls.option_names.get(name, name).replace("_", "-")

    @classmethod
    def parse(cls, name: str, value: Any) -> Any:
        """A value as the command line gives it, as the setting holds it."""
        if name not in cls.sizes:
            return value
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        try:
            return tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            option = cls.option(name)
            raise UserError(f"{option} is whole numbers separated by commas, as in 400,200; not {value!r}.") from None

    def _check_sizes(self) -> None:
        for name in self.sizes:
            value = self.parse(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if min(value, default=1 if name in self.may_be_empty else 0) < 1:
                raise UserError(f"{self.option(name)} must be whole numbers of at least 1.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise UserError(f"{self.option(name)} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise UserError(f"{self.option(name)} must be at least {least}, not {getattr(self, name)}.")

    def _check_kernel(self, least: int, name: str) -> None:
        self._check_at_least(least, name)
        if getattr(self, name) % 2 == 0:
            raise UserError(f"{self.option(name)} must be odd, not {getattr(self, name)}.")

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise UserError(f"{self.option(name)} must not be negative, and was {getattr(self, name)}.")

    def _check_above_0(self, *names: str) -> None:
        for name in names:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise UserError(f"{self.option(name)} must be above 0, not {getattr(self, name)}.")

    def _check_run(self) -> None:
        if self.held_out is not None and not 0.0 < self.held_out < 1.0:
            raise UserError(
                f"--held-out is a share of the {self.data_kind}: it must be between 0 and 1, not {self.held_out}."
            )
        self._check_above_0("learning_rate")
        self._check_seed("seed")

    def _check_seed(self, name: str) -> None:
        if not 0 <= getattr(self, name) < 2**63:
            raise UserError(f"{self.option(name)} must be in [0, 2^63), not {getattr(self, name)}.")

    def to_json(self) -> dict[str, Any]:
        record: Any = self  # every kind is a dataclass
        return asdict(record)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The settings that `to_json` wrote; names that this version does not know are an error."""
        record: Any = cls
        unknown = set(values) - {field.name for field in fields(record)}
        if unknown:
            raise UserError(f"the saved settings have an unknown entry: {sorted(unknown)[0]}.")
        return cls(**values)


@dataclass(frozen=True)
class LanguageModelSettings(Settings):
    """Settings of ``genfuse train lstm``; the defaults suit a few hundred kilobytes of text and two CPU cores.

    A window is `context` tokens; a step reads `batch_size` windows, over all processes together. The regularisers are
    those of `genfuse.models.LSTMLanguageModel`.

    Raises:
        UserError: a value is out of its range.
    """

    data: str | None = None
    level: Literal["char", "byte"] = "char"
    held_out: float = 0.1
    cell: str = "lstm"
    hidden_size: int = 384
    embedding_dim: int = 64
    layers: int = 1
    tie_weights: bool = False
    dropout: float = 0.1
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    embedding_dropout: float = 0.0
    weight_drop: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    activation_regularization: float = 0.0
    temporal_activation_regularization: float = 0.0
    context: int = 128
    batch_size: int = 32
    epochs: int = 12
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100

    option_names: ClassVar[dict[str, str]] = {
        "activation_regularization": "ar",
        "temporal_activation_regularization": "tar",
    }

    def __post_init__(self) -> None:
        self._check_choice("cell", CELLS)
        self._check_choice("level", LEVELS)
        self._check_at_least(
            1, "hidden_size", "embedding_dim", "layers", "context", "batch_size", "epochs", "save_every"
        )
        for name in (
            *("dropout", "input_dropout", "hidden_dropout", "embedding_dropout"),
            *("weight_drop", "zoneout_h", "zoneout_c"),
        ):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(
                    f"{self.option(name)} is a probability: it must be in [0, 1), not {getattr(self, name)}."
                )
        self._check_not_negative(
            "activation_regularization", "temporal_activation_regularization", "weight_decay", "clip"
        )
        self._check_run()
        if self.cell == "gru" and self.zoneout_c > 0.0:
            raise UserError("--zoneout-c needs a cell state, which a GRU does not have: use --zoneout-h.")

    def model_arguments(self, vocab_size: int) -> dict[str, Any]:
        """Keyword arguments of `genfuse.models.LSTMLanguageModel`."""
        same = (
            *("cell", "tie_weights", "embedding_dim", "hidden_size", "dropout", "input_dropout", "hidden_dropout"),
            *("embedding_dropout", "weight_drop", "zoneout_h", "zoneout_c"),
            *("activation_regularization", "temporal_activation_regularization"),
        )
        return {"vocab_size": vocab_size, "num_layers": self.layers, **{name: getattr(self, name) for name in same}}


@dataclass(frozen=True)
class ImageSettings(Settings):
    """Settings that ``genfuse train vae``, ``hvae`` and ``vqvae`` have in common.

    Raises:
        UserError: a value is out of its range.
    """

    data: str = "digits"
    image_size: int | None = None
    grey: bool = False
    held_out: float | None = None
    split_seed: int = 0
    likelihood: str | None = None
    binarize: str | None = None
    implementation: str = "genfuse"
    batch_size: int = 128
    epochs: int = 300
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 0.0
    nll_samples: int = 500
    seed: int = 0
    save_every: int = 500

    data_kind: ClassVar[str] = "images"
    arguments: ClassVar[tuple[str, ...]] = ()  # settings that the model's class takes by the same name

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.likelihood is not None:
            self._check_choice("likelihood", LIKELIHOODS)
        if self.binarize is not None:
            self._check_choice("binarize", BINARIZE)
            if self.binarize == "dynamic" and self.likelihood not in (None, "bernoulli"):
                raise UserError(
                    f"--binarize dynamic makes black and white images: --likelihood {self.likelihood} is for grey ones."
                )
        self._check_choice("implementation", IMPLEMENTATIONS)
        if self.image_size is not None:
            self._check_at_least(1, "image_size")
        self._check_at_least(1, "batch_size", "epochs", "nll_samples", "save_every")
        self._check_not_negative("weight_decay", "clip")
        self._check_run()
        self._check_seed("split_seed")

    @property
    def warmup_epochs(self) -> float:
        """Epochs in which the KL's weight grows from 0 to beta."""
        return 0.0

    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model's class, but those that follow from the data."""
        values = {name: getattr(self, name) for name in self.arguments}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class VAESettings(ImageSettings):
    """Settings of ``genfuse train vae``; the defaults suit scikit-learn's digits and two CPU cores."""

    latent_dim: int = 20
    hidden_dims: tuple[int, ...] = (400,)
    architecture: str = "mlp"
    objective: str = "elbo"
    num_samples: int = 1
    beta: float = 1.0
    free_bits: float = 0.0
    kl_warmup: float = 0.0

    option_names: ClassVar[dict[str, str]] = {"num_samples": "samples"}
    sizes: ClassVar[tuple[str, ...]] = ("hidden_dims",)
    arguments: ClassVar[tuple[str, ...]] = (
        "latent_dim",
        "hidden_dims",
        "architecture",
        "objective",
        "num_samples",
        "beta",
        "free_bits",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("architecture", ARCHITECTURES)
        self._check_choice("objective", OBJECTIVES)
        self._check_at_least(1, "latent_dim", "num_samples")
        self._check_not_negative("beta", "free_bits", "kl_warmup")
        if self.objective == "iwae" and (self.beta != 1.0 or self.free_bits > 0.0 or self.kl_warmup > 0.0):
            raise UserError("--objective iwae has no KL term: leave out --beta, --free-bits and --kl-warmup.")

    @property
    def warmup_epochs(self) -> float:
        return self.kl_warmup


@dataclass(frozen=True)
class HierarchicalVAESettings(ImageSettings):
    """Settings of ``genfuse train hvae``.

    The KL's weight grows from 0 in the first `kl_warmup` epochs, by default a third of them: without that, the latents
    tend to stay unused (Sonderby et al. 2016, arXiv 1602.02282, section 2.2).
    """

    latent_dims: tuple[int, ...] = (32, 16, 8)
    hidden_dim: int = 256
    beta: float = 1.0
    free_bits: float = 0.0
    kl_warmup: float | None = None

    sizes: ClassVar[tuple[str, ...]] = ("latent_dims",)
    arguments: ClassVar[tuple[str, ...]] = ("latent_dims", "hidden_dim", "beta", "free_bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least(1, "hidden_dim")
        self._check_not_negative("beta", "free_bits", *(() if self.kl_warmup is None else ("kl_warmup",)))

    @property
    def warmup_epochs(self) -> float:
        return self.epochs / 3 if self.kl_warmup is None else self.kl_warmup


@dataclass(frozen=True)
class VQVAESettings(ImageSettings):
    """Settings of ``genfuse train vqvae``: `epochs` are the autoencoder's, and `prior_epochs` come after them."""

    epochs: int = 100
    prior_epochs: int = 100
    prior_learning_rate: float = 3e-3
    num_embeddings: int = 128
    embedding_dim: int = 32
    hidden_dim: int = 64
    commitment_weight: float = 0.25
    decay: float = 0.99
    prior_hidden_size: int = 256

    extendable: ClassVar[tuple[str, ...]] = ("epochs", "prior_epochs")
    arguments: ClassVar[tuple[str, ...]] = (
        "num_embeddings",
        "embedding_dim",
        "hidden_dim",
        "commitment_weight",
        "decay",
        "prior_hidden_size",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least(1, "prior_epochs", "num_embeddings", "embedding_dim", "hidden_dim", "prior_hidden_size")
        self._check_above_0("prior_learning_rate")
        self._check_not_negative("commitment_weight")
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"--decay must be in [0, 1), not {self.decay}.")

    @property
    def stage_epochs(self) -> tuple[int, ...]:
        return (self.epochs, self.prior_epochs)


@dataclass(frozen=True)
class PartSettings(Settings):
    """Settings of runs whose data are divided in three: to learn from, to choose the best model, to test it.

    Raises:
        UserError: a value is out of its range.
    """

    data: str = "digits"
    image_size: int | None = None
    grey: bool = False
    held_out: float | None = None
    split_seed: int = 0
    implementation: str = "genfuse"
    batch_size: int = 64
    epochs: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 5.0
    seed: int = 0
    save_every: int = 500

    data_kind: ClassVar[str] = "data"
    counts: ClassVar[tuple[str, ...]] = ()  # settings of the model that are whole numbers of at least 1

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choice("implementation", IMPLEMENTATIONS)
        if self.image_size is not None:
            self._check_at_least(1, "image_size")
        self._check_at_least(1, "batch_size", "epochs", "save_every", *self.counts)
        self._check_not_negative("weight_decay", "clip")
        self._check_run()
        self._check_seed("split_seed")
        if self.held_out is not None and self.held_out >= 0.5:
            raise UserError(
                f"--held-out is kept twice, for choosing and for testing: it must be below 0.5, not {self.held_out}."
            )


@dataclass(frozen=True)
class FlowSettings(PartSettings):
    """Settings that the commands for flows have in common.

    Raises:
        UserError: a value is out of its range.
    """

    data: str = "moons"
    batch_size: int = 256
    epochs: int = 40
    learning_rate: float = 3e-3

    takes: ClassVar[tuple[str, ...]] = ("images", "tables")

    def model_arguments(self, shape: tuple[int, ...], levels: int) -> dict[str, Any]:
        """Keyword arguments of the model's class.

        Args:
            shape: of an item: (channels, height, width) of images, (columns,) of tables.
            levels: how many values a pixel can have.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RealNVPSettings(FlowSettings):
    """Settings of ``genfuse train realnvp``; the defaults suit two-dimensional points and two CPU cores.

    `flows` and `hidden` are of tables, `levels` and `channels` of images.
    """

    flows: int = 8
    hidden: tuple[int, ...] = (64, 64)
    levels: int = 2
    channels: int = 32
    reversible: bool = False

    sizes: ClassVar[tuple[str, ...]] = ("hidden",)
    counts: ClassVar[tuple[str, ...]] = ("flows", "levels", "channels")

    def model_arguments(self, shape: tuple[int, ...], levels: int) -> dict[str, Any]:
        if len(shape) == 1:
            size = {"input_shape": shape[0], "transforms": self.flows, "hidden": list(self.hidden)}
        else:
            size = {"input_shape": list(shape), "scales": self.levels, "channels": self.channels, "levels": levels}
        return {**size, "reversible": self.reversible}


@dataclass(frozen=True)
class GlowSettings(FlowSettings):
    """Settings of ``genfuse train glow``; the defaults suit scikit-learn's digits and two CPU cores."""

    data: str = "digits"
    levels: int = 2
    steps: int = 8
    channels: int = 64
    reversible: bool = False
    batch_size: int = 64
    epochs: int = 50
    learning_rate: float = 1e-3

    counts: ClassVar[tuple[str, ...]] = ("levels", "steps", "channels")
    takes: ClassVar[tuple[str, ...]] = ("images",)

    def model_arguments(self, shape: tuple[int, ...], levels: int) -> dict[str, Any]:
        same = {name: getattr(self, name) for name in ("levels", "steps", "channels", "reversible")}
        return {"input_shape": list(shape), **same, "pixel_levels": levels}


@dataclass(frozen=True)
class VectorFlowSettings(FlowSettings):
    """Settings of the flows that are of vectors: rows of tables, or images without their shape."""

    hidden: tuple[int, ...] = (64, 64)
    flows: int = 5

    sizes: ClassVar[tuple[str, ...]] = ("hidden",)
    counts: ClassVar[tuple[str, ...]] = ("flows",)

    def model_arguments(self, shape: tuple[int, ...], levels: int) -> dict[str, Any]:
        size = {"features": shape[0]} if len(shape) == 1 else {"features": list(shape), "levels": levels}
        return {**size, "transforms": self.flows, "hidden": list(self.hidden)}


@dataclass(frozen=True)
class NSFSettings(VectorFlowSettings):
    """Settings of ``genfuse train nsf``; the defaults suit two-dimensional points and two CPU cores."""

    bins: int = 8
    tail_bound: float = 3.0
    autoregressive: bool = False
    linear: str = "lu"

    counts: ClassVar[tuple[str, ...]] = ("flows", "bins")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_above_0("tail_bound")
        self._check_choice("linear", LINEAR)

    def model_arguments(self, shape: tuple[int, ...], levels: int) -> dict[str, Any]:
        return {
            **super().model_arguments(shape, levels),
            "num_bins": self.bins,
            "tail_bound": self.tail_bound,
            "coupling": not self.autoregressive,
            "linear": None if self.linear == "none" else self.linear,
        }


@dataclass(frozen=True)
class MAFSettings(VectorFlowSettings):
    """Settings of ``genfuse train maf`` and ``iaf``."""

    def model_arguments(self, shape: tuple[int, ...], levels: int) -> dict[str, Any]:
        # Without something to normalise between them the layers learn far more slowly (Papamakarios et al. 2017 have
        # batch normalisation there): on two half moons 1.46 nats after as many steps, and with it 1.05.
        return {**super().model_arguments(shape, levels), "actnorm": True}


@dataclass(frozen=True)
class PixelSettings(PartSettings):
    """Settings that the commands for autoregressive models of images have in common.

    Raises:
        UserError: a value is out of its range.
    """

    binary: bool = False
    levels: int | None = None
    conditional: bool = False
    epochs: int = 30
    clip: float = 1.0

    data_kind: ClassVar[str] = "images"
    shares: ClassVar[tuple[str, ...]] = ()  # settings of the model that are probabilities
    arguments: ClassVar[tuple[str, ...]] = ()  # settings that the model's class takes by the same name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels is not None:
            if self.binary:
                raise UserError("--binary makes pixels of two levels: leave out --levels.")
            if not 2 <= self.levels <= 256:
                raise UserError(f"--levels must be from 2 to 256, not {self.levels}.")
        for name in self.shares:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(
                    f"{self.option(name)} is a probability: it must be in [0, 1), not {getattr(self, name)}."
                )

    def levels_of(self, levels: int) -> int:
        """How many values a pixel of the model has, for data of `levels`."""
        if self.binary:
            return 2
        return levels if self.levels is None else self.levels

    def model_arguments(self, shape: tuple[int, ...], levels: int, classes: int | None) -> dict[str, Any]:
        """Keyword arguments of the model's class.

        Args:
            shape: (channels, height, width).
            levels: how many values a pixel has.
            classes: how many there are; None for a model that knows of none.
        """
        values = {name: getattr(self, name) for name in self.arguments}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        size = {"in_channels": shape[0], "image_size": list(shape[1:])}
        return {**size, **values, "levels": levels, "num_classes": classes}


@dataclass(frozen=True)
class PixelCNNSettings(PixelSettings):
    """Settings of ``genfuse train pixelcnn``; the defaults suit scikit-learn's digits and two CPU cores."""

    channels: int = 64
    num_layers: int = 6
    kernel_size: int = 5
    head_channels: tuple[int, ...] = ()
    residual: bool = False

    option_names: ClassVar[dict[str, str]] = {"num_layers": "layers"}
    sizes: ClassVar[tuple[str, ...]] = ("head_channels",)
    may_be_empty: ClassVar[tuple[str, ...]] = ("head_channels",)
    counts: ClassVar[tuple[str, ...]] = ("channels", "num_layers", "kernel_size")
    arguments: ClassVar[tuple[str, ...]] = ("channels", "num_layers", "kernel_size", "head_channels", "residual")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kernel(3, "kernel_size")


@dataclass(frozen=True)
class GatedPixelCNNSettings(PixelSettings):
    """Settings of ``genfuse train gated-pixelcnn``; the defaults suit scikit-learn's digits and two CPU cores."""

    channels: int = 48
    num_layers: int = 6
    kernel_size: int = 3
    first_kernel_size: int = 7
    head_channels: tuple[int, ...] = ()
    skip: bool = False

    option_names: ClassVar[dict[str, str]] = {"num_layers": "layers"}
    sizes: ClassVar[tuple[str, ...]] = ("head_channels",)
    may_be_empty: ClassVar[tuple[str, ...]] = ("head_channels",)
    counts: ClassVar[tuple[str, ...]] = ("channels", "num_layers", "kernel_size", "first_kernel_size")
    arguments: ClassVar[tuple[str, ...]] = (
        *("channels", "num_layers", "kernel_size", "first_kernel_size"),
        *("head_channels", "skip"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kernel(1, "kernel_size")
        self._check_kernel(3, "first_kernel_size")


@dataclass(frozen=True)
class MixtureSettings(PixelSettings):
    """Settings of the models whose pixels are mixtures of logistics, over a power of two levels."""

    nr_resnet: int = 2
    nr_filters: int = 32
    nr_logistic_mix: int = 5
    dropout: float = 0.0

    option_names: ClassVar[dict[str, str]] = {
        "nr_resnet": "resnets",
        "nr_filters": "filters",
        "nr_logistic_mix": "mixtures",
        "nr_blocks": "blocks",
    }
    counts: ClassVar[tuple[str, ...]] = ("nr_resnet", "nr_filters")
    shares: ClassVar[tuple[str, ...]] = ("dropout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least(0, "nr_logistic_mix")
        if self.levels is not None and self.nr_logistic_mix and self.levels & (self.levels - 1):
            raise UserError(
                f"--levels {self.levels} is no power of 2, which a mixture of logistics wants: choose one, or take a "
                "probability for each level with --mixtures 0."
            )

    def levels_of(self, levels: int) -> int:
        levels = super().levels_of(levels)
        return 1 << (levels.bit_length() - 1) if self.nr_logistic_mix else levels

    def model_arguments(self, shape: tuple[int, ...], levels: int, classes: int | None) -> dict[str, Any]:
        if shape[0] > 1 and (levels == 2 or not self.nr_logistic_mix):
            if self.binary:
                what = "--binary"
            elif levels == 2:
                what = "--levels 2" if self.levels == 2 else "data of 2 levels"
            else:
                what = "--mixtures 0"
            raise UserError(
                f"{what} will not do for colours, which this model makes mixtures of logistics over more than 2 "
                "levels: make them grey with --grey, or train a pixelcnn instead."
            )
        arguments = super().model_arguments(shape, levels, classes)
        return {**arguments, "nr_logistic_mix": self.nr_logistic_mix or None}


@dataclass(frozen=True)
class PixelCNNPlusPlusSettings(MixtureSettings):
    """Settings of ``genfuse train pixelcnn++``; the defaults suit scikit-learn's digits and two CPU cores."""

    scales: int = 2

    counts: ClassVar[tuple[str, ...]] = ("nr_resnet", "nr_filters", "scales")
    arguments: ClassVar[tuple[str, ...]] = ("nr_resnet", "nr_filters", "nr_logistic_mix", "dropout", "scales")

    def model_arguments(self, shape: tuple[int, ...], levels: int, classes: int | None) -> dict[str, Any]:
        _, height, width = shape
        sides = height | width
        most = (sides & -sides).bit_length()  # one more than how often 2 divides both
        if self.scales > most:
            raise UserError(f"--scales must be at most {most} for images of {height} x {width}, not {self.scales}.")
        return super().model_arguments(shape, levels, classes)


@dataclass(frozen=True)
class PixelSNAILSettings(MixtureSettings):
    """Settings of ``genfuse train pixelsnail``; the defaults suit scikit-learn's digits and two CPU cores."""

    nr_blocks: int = 2
    key_channels: int = 16
    num_heads: int = 1

    option_names: ClassVar[dict[str, str]] = {
        **MixtureSettings.option_names,
        "key_channels": "keys",
        "num_heads": "heads",
    }
    counts: ClassVar[tuple[str, ...]] = ("nr_blocks", "nr_resnet", "nr_filters", "key_channels", "num_heads")
    arguments: ClassVar[tuple[str, ...]] = (
        *("nr_blocks", "nr_resnet", "nr_filters", "nr_logistic_mix"),
        *("key_channels", "num_heads", "dropout"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        values = max(1, self.nr_filters // 2)
        if self.key_channels % self.num_heads or values % self.num_heads:
            raise UserError(
                f"--heads must divide --keys, {self.key_channels}, and half of --filters, {values}, and "
                f"{self.num_heads} does not."
            )


def process_rank() -> int:
    """This process's number among those of a run, from whoever started it: torchrun, Lightning, or Slurm."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0
