"""Autoregressive models of images as Lightning trains them: data and steps, with no state that a checkpoint lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base_module import HeldOut, RunData, TrainingModule
from .errors import UserError
from .images import NUMBER_OF_HELD_OUT_BITS, ImageBatches, Images, Pixels, binarise, philox
from .order import BatchOrder
from .settings import PixelSettings
from .split import divide

__all__ = ["PixelData", "PixelModule", "PixelRunData", "as_levels", "quantise"]


def quantise(pixels: Pixels, levels: int, to: int) -> Pixels:
    """Whole numbers from 0 to ``levels - 1`` as such from 0 to ``to - 1``, each standing for as many as the others.

    Example:
        >>> quantise(np.arange(8, dtype=np.uint8), 8, to=4).tolist()
        [0, 0, 1, 1, 2, 2, 3, 3]
    """
    if to == levels:
        return pixels
    quantised: Pixels = (pixels.astype(np.uint32) * to // levels).astype(np.uint8)
    return quantised


def as_levels(source: Images, pixels: Pixels, settings: PixelSettings, number: int = NUMBER_OF_HELD_OUT_BITS) -> Tensor:
    """Pixels of `source` as a model scores them: uint8; bits are drawn once, the same way in every run.

    Args:
        source: of the pixels.
        pixels: uint8 ``[N, C, H, W]``, from 0 to ``source.levels - 1``.
        settings: of the run.
        number: of the bits' random stream, beside the split's seed.
    """
    if settings.binary:
        pixels = binarise(pixels, source.levels, philox(settings.split_seed, number))
    else:
        pixels = quantise(pixels, source.levels, settings.levels_of(source.levels))
    return torch.from_numpy(np.ascontiguousarray(pixels))


class PixelData:
    """Images divided into three parts, as whole numbers of the model's levels, or as bits.

    Bits of the images that are learnt from are drawn afresh each time they are read, a pixel of value v being 1 with
    probability ``v / (levels - 1)`` (Salakhutdinov and Murray 2008); those of the others once.

    Args:
        source: what was read.
        settings: of the run.

    Attributes:
        train: uint8 ``[N, C, H, W]``, from 0 to ``levels - 1``.
        levels: of `train`: where bits are drawn from it, the source's.
        validation, test: uint8, from 0 to ``seen - 1``.
        seen: how many values a pixel of the model has.
        binary: whether bits are drawn.
        labels: of the three parts, int64; None where the model knows of no classes.
        classes: how many there are.
        split: how the images were divided, for people.

    Raises:
        UserError: there are too few images, or too few levels.
    """

    def __init__(self, source: Images, settings: PixelSettings) -> None:
        self.source, self.binary, self.shape = source, settings.binary, source.shape
        self.seen = settings.levels_of(source.levels)
        if self.seen > source.levels:
            raise UserError(
                f"--levels {self.seen} cannot be made of the {source.levels} values that a pixel of {source.name} has."
            )
        own = source.test is not None
        parts = divide(
            source.name,
            np.arange(len(source.pixels)),
            None,
            np.arange(len(source.test)) if source.test is not None else None,
            settings.held_out,
            settings.split_seed,
        )
        held_out = source.pixels if source.test is None else source.test
        if self.binary:
            self.train, self.levels = source.pixels[parts.train], source.levels
        else:
            self.train, self.levels = as_levels(source, source.pixels[parts.train], settings).numpy(), self.seen
        # Streams of their own, so that the bits of the two parts are independent.
        self.validation = as_levels(source, source.pixels[parts.validation], settings, NUMBER_OF_HELD_OUT_BITS - 1)
        self.test = as_levels(source, held_out[parts.test], settings)
        self.split = parts.how
        self.labels: tuple[Tensor, Tensor, Tensor] | None = None
        self.classes: int | None = None
        if source.labels is not None:
            of_test = source.test_labels if own and source.test_labels is not None else source.labels
            self.classes = int(max(source.labels.max(), of_test.max())) + 1
            train, validation, test = (
                torch.from_numpy(labels[rows])
                for labels, rows in (
                    (source.labels, parts.train),
                    (source.labels, parts.validation),
                    (of_test, parts.test),
                )
            )
            self.labels = train, validation, test


class PixelRunData(RunData):
    """The training batches, uint8 ``[batch, C, H, W]`` or pairs of them and labels, and what chooses the best model."""

    def __init__(self, data: PixelData, order: BatchOrder) -> None:
        super().__init__(order.batch_size)
        self.data, self.order = data, order
        self.batches = ImageBatches(data, order)

    def read(self, step: int, rows: slice) -> Any:
        images = torch.from_numpy(self.batches.pixels(step, rows))
        if self.data.labels is None:
            return images
        return images, self.data.labels[0][torch.from_numpy(self.order.rows(step)[rows])]

    def held_out(self, rank: int, world: int) -> HeldOut:
        labels = None if self.data.labels is None else self.data.labels[1]
        return HeldOut(self.data.validation, rank, world, at_once=100, labels=labels)


class PixelModule(TrainingModule):
    """Training and evaluation steps around a model with `log_prob`; losses are in nats per image.

    Args:
        model: of `genfuse.models`, or its twin of `genfuse.reference.masked_conv.models`.
        settings: of the run.
        plan: of the run.
    """

    betas = (0.9, 0.999)
    model: Any

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.losses(batch).mean()
        self.loss = loss.detach()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        trainer: Any = self.trainer
        counts = trainer.val_dataloaders.dataset.counts
        self._mean.update(self.losses(batch), 1.0 if counts else 0.0)

    def losses(self, batch: Any) -> Tensor:
        """``-log p`` of each image of a batch."""
        images, labels = batch if isinstance(batch, (tuple, list)) else (batch, None)
        losses: Tensor = -self.model.log_prob(images, labels)
        return losses

    def is_decayed(self, name: str) -> bool:
        return name.endswith("weight")
