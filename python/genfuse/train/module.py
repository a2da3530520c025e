"""The language model as Lightning trains it: steps and data. Nothing here has state that a checkpoint lacks.

The windows of step s come from `WindowOrder`; the rest of what makes a step a function of its number is in
`base_module`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from genfuse.models import LSTMLanguageModel

from .base_module import Plan, RunData, TrainingModule
from .order import evaluations_per_epoch
from .settings import LanguageModelSettings
from .text import TextData, Tokens, WindowOrder

__all__ = ["EvaluationStreams", "LanguageModelData", "LanguageModelModule", "LanguageModelPlan"]


class LanguageModelPlan(Plan):
    """How many steps a run has, and when it looks at the held-out text.

    Args:
        tokens: number of tokens to learn from.
        settings: of the run.

    Attributes:
        order: which windows each step reads.
    """

    def __init__(self, tokens: int, settings: LanguageModelSettings) -> None:
        batch, context = settings.batch_size, settings.context
        evaluations = evaluations_per_epoch(WindowOrder(tokens, context, batch, settings.seed).steps_per_epoch)
        self.order = WindowOrder(tokens, context, batch, settings.seed, evaluations)
        steps = self.order.steps_per_epoch
        super().__init__([settings.epochs * steps], steps // evaluations)


class EvaluationStreams(IterableDataset[Tensor]):
    """A text to be scored, cut into parallel streams that are read from end to end, so that state can be carried.

    Args:
        tokens: at least two.
        rank, world: which of the processes reads here; each takes its share of the streams.
        streams: at most this many, of at least 256 tokens each.
        chunk: steps read at once.

    Attributes:
        counts: whether this process's chunks count; False where there are fewer streams than processes.

    Yields:
        int64 ``[streams, n + 1]`` with n up to `chunk`: inputs and targets overlap by one token.

    Example:
        >>> [tuple(tokens.shape) for tokens in EvaluationStreams(np.arange(1000), chunk=200)]
        [(3, 201), (3, 134)]
    """

    def __init__(self, tokens: Tokens, rank: int = 0, world: int = 1, streams: int = 16, chunk: int = 256) -> None:
        number = max(1, min(streams, len(tokens) // 256))
        length = (len(tokens) - 1) // number
        mine = list(range(rank, number, world))
        self.counts = bool(mine)
        starts = np.array(mine or [0]) * length
        self._tokens, self._starts, self._length, self._chunk = tokens, starts[:, None], length, chunk

    def __iter__(self) -> Iterator[Tensor]:
        for begin in range(0, self._length, self._chunk):
            end = min(begin + self._chunk, self._length)
            yield torch.from_numpy(self._tokens[self._starts + np.arange(begin, end + 1)].astype(np.int64))

    def __len__(self) -> int:
        return math.ceil(self._length / self._chunk)


class LanguageModelData(RunData):
    """The training windows, each int64 ``[context + 1]``, and the held-out streams."""

    def __init__(self, data: TextData, plan: LanguageModelPlan) -> None:
        super().__init__(plan.order.batch_size)
        self.data, self.plan = data, plan
        self._within = np.arange(plan.order.context + 1)

    def read(self, step: int, rows: slice) -> Tensor:
        starts = self.plan.order.starts(step)[rows]
        return torch.from_numpy(self.data.train[starts[:, None] + self._within].astype(np.int64))

    def held_out(self, rank: int, world: int) -> EvaluationStreams:
        return EvaluationStreams(self.data.held_out, rank, world)


class LanguageModelModule(TrainingModule):
    """Training and evaluation steps around `genfuse.models.LSTMLanguageModel`; losses are in nats per token."""

    model: LSTMLanguageModel

    def __init__(self, model: LSTMLanguageModel, settings: LanguageModelSettings, plan: Plan) -> None:
        super().__init__(model, settings, plan)
        self._state: Any = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        nll, penalty, _ = self.model.loss_parts(batch[:, :-1], batch[:, 1:])
        self.loss = nll.detach()
        return nll + penalty

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._state = None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        nll, _, self._state = self.model.loss_parts(batch[:, :-1], batch[:, 1:], self._state)
        trainer: Any = self.trainer
        counts = trainer.val_dataloaders.dataset.counts
        self._mean.update(nll, batch[:, 1:].numel() if counts else 0.0)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._state = None

    def is_decayed(self, name: str) -> bool:
        # The embedding's rows are seen too unevenly to be decayed.
        return name.split(".")[-1].startswith(("weight_ih", "weight_hh")) or name.endswith("head.weight")
