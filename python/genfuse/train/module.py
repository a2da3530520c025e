"""The language model as Lightning trains it: steps, optimiser, data. Nothing here has state that a checkpoint lacks.

What step s computes is a function of the weights, the optimiser's state, the seed and s: the windows come from
`WindowOrder`, and torch's generator, which the dropout masks are drawn from, is reseeded for each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from genfuse.models import LSTMLanguageModel

from .settings import LanguageModelSettings
from .text import TextData, Tokens, WindowOrder

__all__ = ["EvaluationStreams", "LanguageModelData", "LanguageModelModule", "Plan"]

WARMUP_STEPS = 100
MOST_STEPS_BETWEEN_EVALUATIONS = 1000


class Plan:
    """How many steps a run has, and when it looks at the held-out text.

    Args:
        tokens: number of tokens to learn from.
        settings: of the run.

    Attributes:
        order: which windows each step reads.
        total_steps: of the run.
        evaluate_every: steps; it divides `total_steps`.
    """

    def __init__(self, tokens: int, settings: LanguageModelSettings) -> None:
        batch, context = settings.batch_size, settings.context
        steps = WindowOrder(tokens, context, batch, settings.seed).steps_per_epoch
        evaluations = math.ceil(steps / MOST_STEPS_BETWEEN_EVALUATIONS)
        self.order = WindowOrder(tokens, context, batch, settings.seed, evaluations)
        self.total_steps = settings.epochs * self.order.steps_per_epoch
        self.evaluate_every = self.order.steps_per_epoch // evaluations


class WindowStream(IterableDataset[Tensor]):
    """The batches of global steps ``first_step()``, ``first_step() + 1``, ...: this process's rows of each.

    Yields:
        int64 ``[batch_size / world, context + 1]``.
    """

    def __init__(
        self, tokens: Tokens, order: WindowOrder, rank: int, world: int, first_step: Callable[[], int]
    ) -> None:
        self._tokens, self._order, self._first_step = tokens, order, first_step
        share = order.batch_size // world
        self._rows = slice(rank * share, (rank + 1) * share)
        self._within = np.arange(order.context + 1)

    def __iter__(self) -> Iterator[Tensor]:
        step = self._first_step()
        while True:
            starts = self._order.starts(step)[self._rows]
            yield torch.from_numpy(self._tokens[starts[:, None] + self._within].astype(np.int64))
            step += 1


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


class LanguageModelData(pl.LightningDataModule):
    """The training windows, endless and in the order of the global step, and the held-out streams."""

    def __init__(self, data: TextData, plan: Plan) -> None:
        super().__init__()
        self.data, self.plan = data, plan

    def train_dataloader(self) -> DataLoader[Tensor]:
        trainer: Any = self.trainer
        stream = WindowStream(
            self.data.train, self.plan.order, trainer.global_rank, trainer.world_size, lambda: int(trainer.global_step)
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        trainer: Any = self.trainer
        return DataLoader(
            EvaluationStreams(self.data.held_out, trainer.global_rank, trainer.world_size), batch_size=None
        )


class LanguageModelModule(pl.LightningModule):
    """Training and evaluation steps around `genfuse.models.LSTMLanguageModel`.

    AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with a linear warm-up and a cosine decay to 5 %.

    Attributes:
        nll: cross entropy of the last training step's batch, nats per token, on the device.
        held_out: cross entropy of the last evaluation, nats per token, over all processes; None before the first.
    """

    def __init__(self, model: LSTMLanguageModel, settings: LanguageModelSettings, total_steps: int) -> None:
        super().__init__()
        self.model, self.settings, self.total_steps = model, settings, total_steps
        self.nll: Tensor | None = None
        self.held_out: float | None = None
        self._mean = MeanMetric()
        self._state: Any = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        entropy = (self.settings.seed, self.global_step, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        nll, penalty, _ = self.model.loss_parts(batch[:, :-1], batch[:, 1:])
        self.nll = nll.detach()
        return nll + penalty

    def on_validation_epoch_start(self) -> None:
        self._mean.reset()
        self._state = None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        nll, _, self._state = self.model.loss_parts(batch[:, :-1], batch[:, 1:], self._state)
        trainer: Any = self.trainer
        counts = trainer.val_dataloaders.dataset.counts
        self._mean.update(nll, batch[:, 1:].numel() if counts else 0.0)

    def on_validation_epoch_end(self) -> None:
        self.held_out = float(self._mean.compute())
        self._state = None

    def configure_optimizers(self) -> Any:
        # By name and not by shape, which FSDP flattens. The embedding's rows are seen too unevenly to be decayed.
        named = list(self.model.named_parameters())
        decayed = [p for name, p in named if name.split(".")[-1].startswith(("weight_ih", "weight_hh"))]
        decayed += [p for name, p in named if name.endswith("head.weight")]
        chosen = {id(p) for p in decayed}
        rest = [p for _, p in named if id(p) not in chosen]
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
        optimizer = torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.99), fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Share of the learning rate at a step."""
        warmup = min(WARMUP_STEPS, max(1, self.total_steps // 20))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.settings.clip <= 0.0:
            return
        trainer: Any = self.trainer
        wrapped = trainer.strategy.model
        if hasattr(wrapped, "clip_grad_norm_"):  # FSDP: a process alone sees only its shard of the norm
            wrapped.clip_grad_norm_(self.settings.clip)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.settings.clip)
