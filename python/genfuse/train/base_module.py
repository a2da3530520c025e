"""What every model's training has in common: optimiser, data streams, plan. Nothing here has state a checkpoint lacks.

What step s computes is a function of the weights, the optimiser's state, the seed and s: the batch is read by its
number, and torch's generator, which dropout masks and latent noise are drawn from, is reseeded for each step.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from .order import BatchOrder, evaluations_per_epoch
from .settings import Settings

__all__ = ["EpochPlan", "HeldOut", "Plan", "RunData", "TrainingModule"]

WARMUP_STEPS = 100
STEPS_BETWEEN_EVALUATIONS = 500


class Plan:
    """How many steps a run has, and when it looks at the held-out data.

    Args:
        stage_steps: steps of each stage; a stage has a learning-rate schedule and a best model of its own.
        evaluate_every: steps; it divides every stage.

    Attributes:
        total_steps: of the run.

    Example:
        >>> plan = Plan([10, 20], evaluate_every=5)
        >>> plan.total_steps, plan.stage(9), plan.stage(10), plan.within(12)
        (30, 0, 1, (2, 20))
    """

    def __init__(self, stage_steps: list[int], evaluate_every: int) -> None:
        self.stage_steps, self.evaluate_every = stage_steps, evaluate_every
        self.total_steps = sum(stage_steps)

    def stage(self, step: int) -> int:
        """The stage to which step `step` (from 0) belongs."""
        for stage, end in enumerate(np.cumsum(self.stage_steps)):
            if step < end:
                return stage
        return len(self.stage_steps) - 1

    def ends_stage(self, steps: int) -> bool:
        """Whether a stage is complete after this many steps."""
        return bool(np.isin(steps, np.cumsum(self.stage_steps)))

    def within(self, step: int) -> tuple[int, int]:
        """The place of step `step` in its stage, and the stage's length."""
        stage = self.stage(step)
        return step - sum(self.stage_steps[:stage]), self.stage_steps[stage]


class BatchStream(IterableDataset[Any]):
    """The batches of global steps ``first_step()``, ``first_step() + 1``, ...: this process's rows of each.

    Args:
        read: gives rows of a step's batch.
        batch_size: over all processes.
        rank, world: this process, and how many there are.
        first_step: asked when reading begins.
    """

    def __init__(
        self,
        read: Callable[[int, slice], Any],
        batch_size: int,
        rank: int,
        world: int,
        first_step: Callable[[], int],
    ) -> None:
        self._read, self._first_step = read, first_step
        share = batch_size // world
        self._rows = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[Any]:
        step = self._first_step()
        while True:
            yield self._read(step, self._rows)
            step += 1


class EpochPlan(Plan):
    """How many steps a run of so many epochs has, and when it looks at the held-out data.

    Every stage ends with an evaluation. There are some steps between evaluations, or a stage has about ten of them.

    Args:
        items: number of images or rows to learn from.
        settings: of the run.

    Attributes:
        order: which items each step reads.
        steps_per_epoch: of every stage.
    """

    def __init__(self, items: int, settings: Settings) -> None:
        batch, epochs = settings.batch_size, settings.stage_epochs
        evaluations = evaluations_per_epoch(BatchOrder(items, batch, settings.seed).steps_per_epoch)
        self.order = BatchOrder(items, batch, settings.seed, evaluations)
        self.steps_per_epoch = steps = self.order.steps_per_epoch
        common = math.gcd(*epochs)
        most = min(STEPS_BETWEEN_EVALUATIONS / steps, max(epochs) / 10)
        apart = max(number for number in range(1, common + 1) if common % number == 0 and number <= max(1, most))
        super().__init__([number * steps for number in epochs], apart * steps // evaluations)


class HeldOut(IterableDataset[Any]):
    """Held-out images or rows, some hundreds at a time; with `labels`, pairs of them and theirs.

    Attributes:
        counts: whether this process's items count; False where there are fewer items than processes.
    """

    def __init__(self, items: Tensor, rank: int, world: int, at_once: int = 500, labels: Tensor | None = None) -> None:
        self.counts = rank < len(items)
        mine = slice(rank, None, world) if self.counts else slice(1)
        self._items, self._labels = items[mine], None if labels is None else labels[mine]
        self._at_once = at_once

    def __iter__(self) -> Iterator[Any]:
        parts = torch.split(self._items, self._at_once)
        yield from parts if self._labels is None else zip(parts, torch.split(self._labels, self._at_once), strict=True)

    def __len__(self) -> int:
        return math.ceil(len(self._items) / self._at_once)


class RunData(pl.LightningDataModule):
    """The training batches, endless and in the order of the global step, and the held-out data.

    Args:
        batch_size: over all processes.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    @abstractmethod
    def read(self, step: int, rows: slice) -> Any:
        """These rows of the batch of global step `step`."""

    @abstractmethod
    def held_out(self, rank: int, world: int) -> IterableDataset[Any]:
        """What process `rank` of `world` evaluates."""

    def train_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        stream = BatchStream(
            self.read, self.batch_size, trainer.global_rank, trainer.world_size, lambda: int(trainer.global_step)
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        trainer: Any = self.trainer
        return DataLoader(self.held_out(trainer.global_rank, trainer.world_size), batch_size=None)


class TrainingModule(pl.LightningModule):
    """A model with AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), a linear warm-up and a cosine decay to 5 %.

    Attributes:
        loss: of the last training step's batch, without penalties, on the device.
        held_out: mean loss of the last evaluation, over all processes; None before the first.
    """

    betas = (0.9, 0.99)

    def __init__(self, model: torch.nn.Module, settings: Settings, plan: Plan) -> None:
        super().__init__()
        self.model, self.settings, self.plan = model, settings, plan
        self.loss: Tensor | None = None
        self.held_out: float | None = None
        self._mean = MeanMetric()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        entropy = (self.settings.seed, self.global_step, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def on_validation_epoch_start(self) -> None:
        self._mean.reset()

    def on_validation_epoch_end(self) -> None:
        self.held_out = float(self._mean.compute())

    def is_decayed(self, name: str) -> bool:
        """Whether weight decay holds for the parameter of this name (by name and not by shape, which FSDP flattens)."""
        raise NotImplementedError

    def learning_rate(self, name: str) -> float:
        """Largest learning rate of the parameter of this name."""
        return self.settings.learning_rate

    def configure_optimizers(self) -> Any:
        groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
        named = list(self.model.named_parameters())
        for decayed in (True, False):
            for name, parameter in named:
                if self.is_decayed(name) == decayed:
                    groups.setdefault((decayed, self.learning_rate(name)), []).append(parameter)
        fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
        optimizer = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": self.settings.weight_decay if decayed else 0.0, "lr": rate}
                for (decayed, rate), group in groups.items()
            ],
            lr=self.settings.learning_rate,
            betas=self.betas,
            fused=fused,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Share of the learning rate at a step."""
        place, steps = self.plan.within(step)
        warmup = min(WARMUP_STEPS, max(1, steps // 20))
        if place < warmup:
            return (place + 1) / warmup
        progress = min(1.0, (place - warmup) / max(1, steps - warmup))
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
