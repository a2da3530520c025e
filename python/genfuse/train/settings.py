"""Everything that decides what a training run computes, in one record that is checked, saved and read back."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .errors import UserError

__all__ = ["CELLS", "LEVELS", "LanguageModelSettings", "process_rank"]

CELLS = ("lstm", "layernorm_lstm", "gru")
LEVELS = ("char", "byte")


@dataclass(frozen=True)
class LanguageModelSettings:
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

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise UserError(f"--cell must be one of {', '.join(CELLS)}, not {self.cell!r}.")
        if self.level not in LEVELS:
            raise UserError(f"--level must be one of {', '.join(LEVELS)}, not {self.level!r}.")
        for name in ("hidden_size", "embedding_dim", "layers", "context", "batch_size", "epochs", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{_option(name)} must be at least 1, not {getattr(self, name)}.")
        for name in (
            *("dropout", "input_dropout", "hidden_dropout", "embedding_dropout"),
            *("weight_drop", "zoneout_h", "zoneout_c"),
        ):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{_option(name)} is a probability: it must be in [0, 1), not {getattr(self, name)}.")
        for name in ("activation_regularization", "temporal_activation_regularization", "weight_decay", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise UserError(f"{_option(name)} must not be negative, and was {getattr(self, name)}.")
        if not 0.0 < self.held_out < 1.0:
            raise UserError(f"--held-out is a share of the text: it must be between 0 and 1, not {self.held_out}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0.0):
            raise UserError(f"--learning-rate must be above 0, not {self.learning_rate}.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be in [0, 2^63), not {self.seed}.")
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LanguageModelSettings:
        """The settings that `to_json` wrote; names that this version does not know are an error."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"the saved settings have an unknown entry: {sorted(unknown)[0]}.")
        return cls(**values)


def _option(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + OPTION_NAMES.get(name, name).replace("_", "-")


OPTION_NAMES = {"activation_regularization": "ar", "temporal_activation_regularization": "tar"}


def process_rank() -> int:
    """This process's number among those of a run, from whoever started it: torchrun, Lightning, or Slurm."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0
