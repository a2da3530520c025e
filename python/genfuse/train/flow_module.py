"""Flows of images and of tables as Lightning trains them: steps and data, with no state that a checkpoint lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base_module import HeldOut, RunData, TrainingModule
from .images import Images
from .order import BatchOrder
from .split import divide
from .tables import Standardization, Table, TableData

__all__ = ["FlowData", "FlowModule", "FlowRunData", "seeded_losses"]

SEED_OF_EVALUATIONS = 20141030  # any: the same dequantisation noise each time, so that evaluations can be compared


class FlowData:
    """Images or rows, divided into three parts, as a flow sees them.

    Args:
        source: what was read.
        held_out: share of each part that the data do not set apart themselves; None for a tenth.
        split_seed: of the division.

    Attributes:
        train, validation, test: uint8 ``[N, C, H, W]`` of images, float32 ``[N, D]`` of standardised rows.
        shape: of an item.
        items: ``"images"`` or ``"rows"``.
        split: how they were divided, for people.
        standardization: of rows; None of images.
    """

    def __init__(self, source: Images | Table, held_out: float | None, split_seed: int) -> None:
        self.source = source
        self.standardization: Standardization | None = None
        self.doubtful: list[str] = []
        if isinstance(source, Table):
            table = TableData(source, held_out, split_seed)
            self.train, self.validation, self.test = table.train, table.validation, table.test
            self.standardization, self.doubtful, parts = table.standardization, table.doubtful(), table.parts
        else:
            parts = divide(source.name, source.pixels, None, source.test, held_out, split_seed)
            self.train, self.validation, self.test = (
                torch.from_numpy(np.array(part)) for part in (parts.train, parts.validation, parts.test)
            )
        self.split, self.shape = parts.how, tuple(self.train.shape[1:])
        self.items = "images" if self.standardization is None else "rows"

    @property
    def log_volume(self) -> float:
        """What is added to ``-log p`` of an item as the model sees it, so that it is of the data's own units."""
        return 0.0 if self.standardization is None else self.standardization.log_volume


class FlowRunData(RunData):
    """The training batches, and what chooses the best model."""

    def __init__(self, data: FlowData, order: BatchOrder) -> None:
        super().__init__(order.batch_size)
        self.data, self.order = data, order

    def read(self, step: int, rows: slice) -> Tensor:
        return self.data.train[torch.from_numpy(self.order.rows(step)[rows])]

    def held_out(self, rank: int, world: int) -> HeldOut:
        return HeldOut(self.data.validation, rank, world)


class FlowModule(TrainingModule):
    """Training and evaluation steps around a model with `log_prob`; losses are in nats per image or row.

    Args:
        model: of `genfuse.models`, or its twin of `genfuse.reference.flow`.
        settings: of the run.
        plan: of the run.
        log_volume: see `FlowData.log_volume`.
    """

    betas = (0.9, 0.999)
    model: Any

    def __init__(self, model: Any, settings: Any, plan: Any, log_volume: float) -> None:
        super().__init__(model, settings, plan)
        self._log_volume = log_volume

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = -self.model.log_prob(batch).mean() + self._log_volume
        self.loss = loss.detach()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        losses = seeded_losses(self.model, batch, SEED_OF_EVALUATIONS + batch_idx) + self._log_volume
        trainer: Any = self.trainer
        counts = trainer.val_dataloaders.dataset.counts
        self._mean.update(losses, 1.0 if counts else 0.0)

    def is_decayed(self, name: str) -> bool:
        return name.endswith("weight")


@torch.no_grad()
def seeded_losses(model: Any, items: Tensor, seed: int) -> Tensor:
    """``-log p`` of each item, nats, ``[N]``, with dequantisation noise of this seed.

    Torch's own generators are left as they were.
    """
    devices = [items.device] if items.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        losses: Tensor = -model.log_prob(items)
    return losses
