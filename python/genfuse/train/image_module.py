"""Image models as Lightning trains them: steps and data. Nothing here has state that a checkpoint lacks.

The images and bits of step s come from `ImageBatches`; the rest of what makes a step a function of its number is in
`base_module`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base_module import EpochPlan, HeldOut, RunData, TrainingModule
from .images import ImageBatches, ImageData
from .order import BatchOrder

__all__ = ["ImageModule", "ImageRunData", "VQVAEModule"]

SEED_OF_EVALUATIONS = 20131220  # any: the same noise each time, so that evaluations can be compared


class ImageRunData(RunData):
    """The training batches, each float32 ``[batch, C, H, W]`` in [0, 1], and the held-out images."""

    def __init__(self, data: ImageData, order: BatchOrder) -> None:
        super().__init__(order.batch_size)
        self.images, self.batches = data, ImageBatches(data, order)

    def read(self, step: int, rows: slice) -> Tensor:
        return self.batches.read(step, rows)

    def held_out(self, rank: int, world: int) -> HeldOut:
        return HeldOut(self.images.held_out, rank, world)


class ImageModule(TrainingModule):
    """Training and evaluation steps around a model with `loss`, `elbo` and `nll`; losses are in nats per image.

    Args:
        model: of `genfuse.models`, or its twin of `genfuse.reference.vae`.
        settings: of the run.
        plan: of the run.
    """

    betas = (0.9, 0.999)
    model: Any
    settings: Any

    def __init__(self, model: Any, settings: Any, plan: EpochPlan) -> None:
        super().__init__(model, settings, plan)
        self._warmup_steps = settings.warmup_epochs * plan.steps_per_epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._warmup_steps > 0.0:
            self.model.beta = self.settings.beta * min(1.0, (self.global_step + 1) / self._warmup_steps)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model.loss(batch)
        self.loss = loss.detach()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        losses = self.held_out_losses(batch, torch.Generator(batch.device).manual_seed(SEED_OF_EVALUATIONS + batch_idx))
        trainer: Any = self.trainer
        counts = trainer.val_dataloaders.dataset.counts
        self._mean.update(losses, 1.0 if counts else 0.0)

    def held_out_losses(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What the best model is chosen by, of each image: the bound that is trained, less beta and free bits."""
        if getattr(self.model, "objective", "elbo") == "iwae":
            bound: Tensor = self.model.nll(images, self.settings.num_samples, generator=generator)
            return bound
        elbo: Tensor = self.model.elbo(images, generator=generator)
        return -elbo

    def is_decayed(self, name: str) -> bool:
        return name.endswith("weight")


class VQVAEModule(ImageModule):
    """Stage 0 trains the autoencoder, stage 1 the prior over its codes, with the autoencoder as it then is.

    The losses are those of the stage: reconstruction plus commitment, then ``-log p(codes)``. Neither touches the
    parameters of the other, nor does the second the codebook.
    """

    def _stage(self) -> int:
        return self.plan.stage(self.global_step)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model.loss(batch) if self._stage() == 0 else self.model.prior_loss(batch)
        self.loss = loss.detach()
        return loss

    def held_out_losses(self, images: Tensor, generator: torch.Generator) -> Tensor:
        # The step that an evaluation follows has been counted.
        first = self.plan.stage(self.global_step - 1) == 0
        mean: Tensor = self.model.loss(images) if first else self.model.prior_loss(images)
        return mean.expand(len(images))

    def learning_rate(self, name: str) -> float:
        prior: float = self.settings.prior_learning_rate
        return prior if name.startswith("prior.") else super().learning_rate(name)
