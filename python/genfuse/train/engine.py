"""What training any kind of model has in common: the folder, resuming, devices, and the order in which things happen.

A kind of model is a `Job`; `train` runs one. That a run cannot be is said before anything is written.
"""

from __future__ import annotations

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .checkpoint import (
    CONFIG,
    LAST,
    WEIGHTS,
    Format,
    first_line,
    read_config,
    remove_unfinished,
    write_json,
)
from .errors import UserError, memory_for
from .measure import Measure
from .plot import draw_curves
from .settings import Settings, process_rank

if TYPE_CHECKING:
    from .base_module import Plan, RunData, TrainingModule

__all__ = ["Job", "Outcome", "Say", "choose_folder", "duration", "train"]

RUNS = Path("runs")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a run has come to, for the report at its end."""

    folder: Path
    best: tuple[int, float]
    seconds: float
    device: torch.device
    say: Say
    progress: bool


class Job(ABC):
    """A run of one kind of model: data, model, plan, and what is said of them.

    Args:
        settings: of the run.
        source: what `read` gave.

    Attributes:
        plan: of the run.
        config: content of ``config.json``.
        measures: how the losses of each of the plan's stages are shown.
    """

    name: ClassVar[str]  # of the command, and of folders: runs/lstm, runs/lstm-2, ...
    format: ClassVar[Format]
    model: ClassVar[str]  # its class
    settings_class: ClassVar[type[Settings]]
    data_names: ClassVar[tuple[str | None, ...]]  # data that have a name instead of a path
    report: ClassVar[str]  # the file with the figures
    model_sizes: ClassVar[tuple[str, ...]]  # the settings that decide how much memory the model needs,
    step_sizes: ClassVar[tuple[str, ...]]  # and training it

    plan: Plan
    config: dict[str, Any]
    measures: Sequence[Measure]

    @classmethod
    @abstractmethod
    def read(cls, settings: Any) -> Any:
        """The data: something with a ``name`` and a ``fingerprint``, by which a resumed run knows them."""

    @abstractmethod
    def __init__(self, settings: Any, source: Any) -> None: ...

    settings: Any

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """The model, with random weights."""

    @abstractmethod
    def training(self, model: Any) -> tuple[TrainingModule, RunData]:
        """What Lightning trains, and on what."""

    @abstractmethod
    def introduction(self) -> list[str]:
        """Lines about data, model and training, for the beginning of a run."""

    @abstractmethod
    def finish(self, outcome: Outcome) -> dict[str, Any]:
        """Write and print the report: a function of the best model and the history, so that it survives a kill."""

    def check_model(self) -> None:
        """Raise a `UserError` where there is no model of these arguments, before anything else happens."""
        try:
            with torch.device("meta"), memory_for("a model of these sizes"):
                self.build()
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the model will not do: {first_line(error)}.") from None

    def check_extension(self, before: Any, done: int) -> None:  # noqa: B027  most have nothing to check
        """Raise a `UserError` where a run of settings `before` that is at step `done` cannot go on with these."""

    def strategy(self, name: str, several: bool) -> str:
        """Lightning's name of the strategy that a user calls `name`, for one process or several."""
        return name


def choose_folder(name: str, out: Path | None, resume: bool, processes: bool) -> Path:
    """The run's folder: `out`, or a new one under ``runs/``, or with `resume` the newest there.

    Args:
        name: of the kind of run, e.g. ``"lstm"``: folders are ``runs/lstm``, ``runs/lstm-2``, ...
        out: given by the user.
        resume: continue a run.
        processes: there are several, which must agree without talking: then the name is not numbered.
    """
    if out is not None:
        return out
    if resume:
        found = [path for path in (RUNS / name, *RUNS.glob(f"{name}-*")) if (path / CONFIG).exists()]
        if not found:
            raise UserError(f"there is no run in {RUNS / name} to resume: leave out --resume, or name it with --out.")
        return max(found, key=lambda path: (path / CONFIG).stat().st_mtime)
    folder, number = RUNS / name, 1
    while not processes and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


def train(
    kind: type[Job],
    given: dict[str, Any],
    *,
    out: Path | None = None,
    resume: bool = False,
    accelerator: str = "auto",
    devices: str = "auto",
    nodes: int = 1,
    strategy: str = "auto",
    precision: str = "32-true",
    say: Say = print,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Train a model, keep the best one, and report how good it is.

    Args:
        kind: of run.
        given: settings that differ from the defaults. With `resume`, the saved ones hold, and only the extendable ones
            (`epochs`) may be given another value.
        out: the run's folder; see `choose_folder`.
        resume: continue from the folder's ``last.ckpt``: with the same result as if the run had not been interrupted.
        accelerator, devices, nodes, strategy, precision: as `lightning.pytorch.Trainer` takes them; ``devices="auto"``
            is one device, or under torchrun one for each of its processes.
        say: prints a line for the user; called in the first process only.
        progress: show a progress bar.

    Returns:
        What the report holds; None in processes other than the first.

    Raises:
        UserError: data, settings, folder or devices will not do.
        Stopped: SIGINT or SIGTERM came; ``last.ckpt`` holds the last step.
    """
    _quieten()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if devices == "auto":
        devices = str(local)
        nodes = (
            max(nodes, int(os.environ.get("WORLD_SIZE", 1)) // local) if "TORCHELASTIC_RUN_ID" in os.environ else nodes
        )
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"  # other devices have no kernels of ours
    first = process_rank() == 0
    say = say if first else _silent
    folder = choose_folder(kind.name, out, resume, processes=devices != "1" or nodes > 1)

    begun = (folder / CONFIG).exists()
    anew, resume = resume and not begun, resume and begun
    settings, before = _settings(kind, given, folder, resume)
    source = kind.read(settings)
    saved = read_config(folder, kind.format) if resume else None
    if saved is not None and saved["run"]["fingerprint"] != source.fingerprint:
        raise UserError(
            f"{source.name} has changed since the run in {folder} began, which cannot go on with other "
            f"{settings.data_kind}."
        )
    job = kind(settings, source)
    done = _checkpoint_step(folder, job) if resume else 0
    if before is not None:
        job.check_extension(before, done)
    machine = {
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": nodes,
        "strategy": job.strategy(strategy, several=devices != "1" or nodes > 1),
        "precision": precision,
    }
    # Before anything is written or said: a machine that cannot do it leaves no trace of the attempt.
    trainer, recorder = _trainer(folder, job, done, say, progress, machine)
    model = None
    if done < job.plan.total_steps:
        torch.manual_seed(settings.seed)
        with memory_for(f"a model with {_sizes(settings, kind.model_sizes)}"):
            model = job.build()
    if first:
        _prepare_folder(folder, job.config, resume)
    if anew:
        say(f"There is no run in {folder} yet: beginning one.")
    for line in job.introduction():
        say(line)
    say(f"folder    {folder}{_where(done) if resume else ''}")
    if model is not None:
        with memory_for(f"training with {_sizes(settings, kind.step_sizes)}"):
            _fit(trainer, job, model, folder / LAST if done else None)
    if not first:
        return None
    train_history, held_out, best, seconds = _history(folder, job, None if model is None else recorder, say)
    draw_curves(folder / "loss.png", job.plan, job.measures, train_history, held_out)
    return job.finish(Outcome(folder, best, seconds, trainer.strategy.root_device, say, progress))


def _settings(kind: type[Job], given: dict[str, Any], folder: Path, resume: bool) -> tuple[Any, Any]:
    """The settings of the run, and those of the run that it resumes."""
    options = kind.settings_class
    given = {name: options.parse(name, value) for name, value in given.items()}
    if "data" in given and given["data"] not in kind.data_names:
        given["data"] = os.path.abspath(given["data"])
    if not resume:
        return options(**given), None
    config = read_config(folder, kind.format)
    if config.get("model") != kind.model:
        raise UserError(f"the run in {folder} trains a {config.get('model')}, not a {kind.model}.")
    try:
        saved = options.from_json(config["run"]["settings"])
    except (KeyError, TypeError):
        raise UserError(f"{folder / CONFIG} does not hold the settings of a run.") from None
    for name, value in given.items():
        before = getattr(saved, name)
        if value != before and name not in options.extendable:
            option = options.option(name)
            if before is None or isinstance(before, bool):
                began = f"with {option}" if before else f"without {option}"
            else:
                began = f"with {option} {before}"
            if isinstance(value, bool):
                now = "with it" if value else "without it"
            else:
                now = f"with {value}"
            raise UserError(f"the run in {folder} began {began}: it cannot be resumed {now}.")
    more = {name: given[name] for name in options.extendable if name in given}
    return options(**{**saved.to_json(), **more}), saved


def _sizes(settings: Settings, names: Sequence[str]) -> str:
    """Settings as options: ``--layers 2 and --context 3``."""
    *rest, last = (f"{settings.option(name)} {_written(getattr(settings, name))}" for name in names)
    return f"{', '.join(rest)} and {last}" if rest else last


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _prepare_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        if not resume:
            taken = [name for name in (CONFIG, WEIGHTS, LAST) if (folder / name).exists()]
            if taken and CONFIG not in taken:
                raise UserError(f"{folder} holds {taken[0]} but no {CONFIG}: name another folder with --out.")
            if taken:
                raise UserError(f"{folder} already holds a run: continue it with --resume, or name another with --out.")
        write_json(folder / CONFIG, config)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {(error.strerror or str(error)).lower()}.") from None


def _checkpoint_step(folder: Path, job: Job) -> int:
    """The global step of ``last.ckpt``, 0 if there is none yet."""
    path = folder / LAST
    if not path.exists():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step = int(checkpoint["global_step"])
        shapes = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    except Exception as error:  # torch.load raises whatever its many readers raise
        raise UserError(f"{path} is damaged or no checkpoint of this program ({first_line(error)}).") from None
    with torch.device("meta"):
        model = job.build()
    if shapes != {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}:
        raise UserError(f"{path} is the checkpoint of another model than {folder / CONFIG} describes.")
    return step


def _where(done: int) -> str:
    return f": resuming at step {done}" if done else f": there is no {LAST} yet, beginning at step 0"


def _trainer(folder: Path, job: Job, done: int, say: Say, progress: bool, machine: dict[str, Any]) -> tuple[Any, Any]:
    """Lightning's trainer, and the recorder in it."""
    import lightning.pytorch as pl
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.loggers import TensorBoardLogger

    from .callbacks import AtomicCheckpointIO, ProgressBar, Recorder

    settings = job.settings
    recorder = Recorder(folder, job.config, job.plan, settings.save_every, job.measures, say)
    # What a killed process logged after its last checkpoint is logged again: drop the first account of it.
    logger = TensorBoardLogger(folder, name="tensorboard", version="", purge_step=done + 1 if done else None)
    try:
        trainer = pl.Trainer(
            **machine,
            plugins=[AtomicCheckpointIO()],
            callbacks=[recorder, *([ProgressBar(recorder)] if progress else [])],
            logger=logger,
            max_steps=job.plan.total_steps,
            max_epochs=-1,
            val_check_interval=job.plan.evaluate_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_progress_bar=progress,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"this machine cannot train that way: {first_line(error)}.") from None
    if settings.batch_size % trainer.world_size != 0:
        raise UserError(
            f"--batch-size {settings.batch_size} cannot be divided among {trainer.world_size} processes: "
            "make it a multiple of their number."
        )
    return trainer, recorder


def _fit(trainer: Any, job: Job, model: torch.nn.Module, resume_from: Path | None) -> None:
    module, data = job.training(model)
    try:
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=None if resume_from is None else str(resume_from),
            weights_only=True,
        )
    except SystemExit:
        if trainer.interrupted:  # Lightning's answer to a KeyboardInterrupt
            raise KeyboardInterrupt from None
        raise


def _history(folder: Path, job: Job, recorder: Any, say: Say) -> tuple[Any, Any, tuple[int, float], float]:
    """Losses of training and evaluations, the best model's step and loss, and the time, of a complete run."""
    if recorder is not None:
        recorder.state_dict()  # brings the clock up to date
        return recorder.train, recorder.held_out, recorder.best, recorder.seconds
    checkpoint = torch.load(folder / LAST, map_location="cpu", weights_only=True)
    history = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("Recorder"))
    if (folder / job.report).exists():
        say("the run is complete: there is nothing to resume.")
    return history["train"], history["held_out"], history["best"], history["seconds"]


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(75.2)
        '1 min 15 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _silent(line: str) -> None:
    pass


def _quieten() -> None:
    """Lightning's hints are for who writes training code, not for who runs it."""
    import lightning.pytorch  # noqa: F401  it sets the levels of its loggers when it is imported

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", module=r"torch\.optim\.lr_scheduler")
