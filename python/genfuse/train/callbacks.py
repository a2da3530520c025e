"""What happens around the steps: history, best model, checkpoints, stopping on a signal, the progress bar."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .base_module import Plan, TrainingModule
from .checkpoint import LAST, replacing, save_weights
from .errors import Stopped, UserError
from .measure import Measure
from .plot import draw_curves

__all__ = ["AtomicCheckpointIO", "ProgressBar", "Recorder"]

LOG_EVERY = 10
SECONDS_BETWEEN_PLOTS = 20.0


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are replaced in one step, and read back as tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Recorder(Checkpoint):
    """Keeps the run's history, writes its files, and stops it when asked to.

    ``last.ckpt`` is written every `save_every` steps: after the evaluation where one is due at that step, so that a
    resumed run neither repeats nor misses it. All that this callback knows is in the checkpoint. On SIGINT (Ctrl-C) or
    SIGTERM it finishes the step, writes ``last.ckpt`` and raises `Stopped`, in all processes at the same step.

    Args:
        folder: the run's.
        config: content of its ``config.json``.
        plan: of the run.
        save_every: steps between checkpoints.
        measures: how the losses of each of the plan's stages are shown.
        say: prints a line for the user (in the first process).
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        plan: Plan,
        save_every: int,
        measures: Sequence[Measure],
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.config, self.plan, self.save_every = folder, config, plan, save_every
        self.measures = measures
        self.say = say
        self.train: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self.best: tuple[int, float] | None = None
        self.seconds = 0.0
        self.speed = 0.0  # items a second, smoothed
        self._sum: float | torch.Tensor = 0.0
        self._count = 0
        self._clock = self._logged = self._plotted = time.monotonic()
        self._logged_step = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    # What a checkpoint remembers of it.

    def state_dict(self) -> dict[str, Any]:
        self._tick()
        return {
            "train": self.train,
            "held_out": self.held_out,
            "best": self.best,
            "seconds": self.seconds,
            "sum": float(self._sum),
            "count": self._count,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train, self.held_out = list(state_dict["train"]), list(state_dict["held_out"])
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]
        self._sum, self._count = state_dict["sum"], state_dict["count"]

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now

    # The run.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock = self._logged = time.monotonic()
        self._logged_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self._signal = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        step = trainer.global_step
        self._sum = self._sum + pl_module.loss  # type: ignore[operator]  # set by the step that has just run
        self._count += 1
        if step % LOG_EVERY == 0 or self.plan.ends_stage(step):
            self._log(trainer, step)
        if step % self.plan.evaluate_every != 0:
            self._save_or_stop(trainer, step)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        mean = torch.as_tensor(self._sum / self._count)
        nats = float(trainer.strategy.reduce(mean, reduce_op="mean")) if trainer.world_size > 1 else float(mean)
        self._sum, self._count = 0.0, 0
        _want_finite(nats, step)
        now = time.monotonic()
        measure = self.measure(step)
        speed = (step - self._logged_step) * measure.items_per_step / max(now - self._logged, 1e-9)
        self.speed = speed if self.speed == 0.0 else 0.8 * self.speed + 0.2 * speed
        self._logged, self._logged_step = now, step
        self.train.append((step, nats))
        if trainer.logger is not None:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            trainer.logger.log_metrics(
                {
                    **measure.logged("train", nats),
                    measure.log_name("train/learning_rate"): rate,
                    measure.log_name(f"train/{measure.items}_per_second"): speed,
                },
                step=step,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        step, nats = trainer.global_step, pl_module.held_out
        assert nats is not None
        _want_finite(nats, step)
        measure = self.measure(step)
        self.held_out.append((step, nats))
        if trainer.logger is not None:
            trainer.logger.log_metrics(measure.logged(measure.part_key, nats), step=step)
        stage = self.plan.stage(step - 1)
        best = self.best is None or self.plan.stage(self.best[0] - 1) < stage or nats < self.best[1]
        if best:
            self.best = (step, nats)
            state = trainer.strategy.lightning_module_state_dict()  # every process takes part: FSDP gathers here
            if trainer.is_global_zero:
                model = {
                    name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")
                }
                metadata = {"step": str(step), f"{measure.part_key}_{measure.key}": f"{nats * measure.scale:.6f}"}
                save_weights(self.folder, model, self.config, metadata)
        recent = [value for then, value in self.train[-5:] if self.plan.stage(then - 1) == stage]
        if not recent:  # none of this stage has been logged yet
            recent = [float(self._sum) / max(1, self._count)]
        speed = f"  {self.speed:,.0f} {measure.items}/s" if self.speed > 0.0 else ""
        self.say(
            f"step {step:>{len(str(self.plan.total_steps))}}/{self.plan.total_steps}"
            f"{'  ' if measure.stage else ''}{measure.stage}"
            f"  train {sum(recent) / len(recent) * measure.scale:.3f}"
            f"  {measure.part} {nats * measure.scale:.3f} {measure.unit}{' (best)' if best else ''}{speed}"
        )
        now = time.monotonic()
        if trainer.is_global_zero and now - self._plotted > SECONDS_BETWEEN_PLOTS:
            self.draw()
            self._plotted = time.monotonic()
        self._save_or_stop(trainer, step)
        # Looking at the held-out data is no training: keep it out of the speed.
        self._logged += time.monotonic() - now

    def measure(self, step: int) -> Measure:
        """How losses are shown after `step` steps."""
        return self.measures[self.plan.stage(step - 1)]

    def draw(self) -> None:
        """Draw the loss curve so far."""
        draw_curves(self.folder / "loss.png", self.plan, self.measures, self.train, self.held_out)

    def _save_or_stop(self, trainer: pl.Trainer, step: int) -> None:
        stop = self._signal is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop or step % self.save_every == 0 or step == self.plan.total_steps:
            trainer.save_checkpoint(self.folder / LAST)
        if stop and step < self.plan.total_steps:
            raise Stopped(self._signal or signal.SIGTERM, step)


def _want_finite(nats: float, step: int) -> None:
    """Stop a run that nothing can come of, before its NaN are saved as the best model."""
    if not math.isfinite(nats):
        raise UserError(f"the loss is {nats} at step {step}: training has diverged, try a smaller --learning-rate.")


class ProgressBar(RichProgressBar):
    """One bar for the whole run: steps, time spent and left, loss (in its unit, too), speed."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(refresh_rate=4, theme=RichProgressBarTheme(metrics_text_delimiter="  "))
        self._recorder = recorder

    @property
    def total_train_batches(self) -> int:
        return self._recorder.plan.total_steps

    @property
    def validation_description(self) -> str:
        return self._recorder.measures[0].part

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        ]

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        recorder = self._recorder
        if not recorder.train:
            return {}
        step, nats = recorder.train[-1]
        measure = recorder.measure(step)
        metrics = {} if measure.scale == 1.0 else {"loss": f"{nats:.3f}"}
        metrics[measure.unit] = f"{nats * measure.scale:.3f}"
        if recorder.speed:
            metrics[f"{measure.items}/s"] = f"{recorder.speed:,.0f}"
        return metrics
